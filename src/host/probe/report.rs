//! What the probe found: a row per thing tried, and what it all amounts to.

use serde::Serialize;

/// Everything that was tried.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Report {
    /// What it amounts to.
    pub verdict: Verdict,
    /// What was tried, controls first.
    pub rows: Vec<Row>,
    /// What a reader should know beside.
    pub notes: Vec<String>,
}

/// One thing tried.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Row {
    /// What was sent.
    pub what: String,
    /// By whom.
    pub from: String,
    /// To whom, or where it was watched for.
    pub to: String,
    /// What should become of it.
    pub expected: Expected,
    /// Whether it arrived.
    pub arrived: bool,
    /// What that means.
    pub verdict: Verdict,
}

/// What should become of what was sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Expected {
    /// It must arrive: a control.
    Arrives,
    /// It must not.
    Blocked,
}

/// What a result means.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    /// As it should be.
    Holds,
    /// Silence, but a control failed: it proves nothing.
    Unproven,
    /// Something got through that must not.
    Broken,
}

impl Row {
    /// A row whose verdict follows from what arrived. `proven`: whether silence means anything.
    pub(super) fn judge(
        what: impl Into<String>,
        from: impl Into<String>,
        to: impl Into<String>,
        expected: Expected,
        arrived: bool,
        proven: bool,
    ) -> Self {
        let verdict = match (expected, arrived) {
            (Expected::Arrives, true) => Verdict::Holds,
            (Expected::Arrives, false) => Verdict::Unproven,
            (Expected::Blocked, true) => Verdict::Broken,
            (Expected::Blocked, false) if proven => Verdict::Holds,
            (Expected::Blocked, false) => Verdict::Unproven,
        };
        Self { what: what.into(), from: from.into(), to: to.into(), expected, arrived, verdict }
    }
}

impl Report {
    /// A report whose verdict is that of its worst row.
    pub(super) fn of(rows: Vec<Row>, notes: Vec<String>) -> Self {
        let verdict = rows.iter().map(|row| row.verdict).max().unwrap_or(Verdict::Unproven);
        Self { verdict, rows, notes }
    }

    /// The rows in columns, then the notes, then the verdict.
    #[must_use]
    pub fn to_table(&self) -> String {
        let head = ["WHAT", "FROM", "TO", "EXPECTED", "SEEN", "VERDICT"].map(str::to_owned);
        let body = self.rows.iter().map(|row| {
            let expected = if row.expected == Expected::Arrives { "arrives" } else { "blocked" };
            let seen = if row.arrived { "arrived" } else { "nothing" };
            [&row.what, &row.from, &row.to, expected, seen, word(row.verdict)].map(str::to_owned)
        });
        let lines: Vec<[String; 6]> = std::iter::once(head).chain(body).collect();
        let width = |column: usize| lines.iter().map(|line| line[column].chars().count()).max().unwrap_or(0);
        let widths: [usize; 6] = std::array::from_fn(width);

        let mut table = String::new();
        for line in &lines {
            let cells: Vec<String> = line.iter().zip(widths).map(|(cell, width)| format!("{cell:width$}")).collect();
            table.push_str(cells.join("  ").trim_end());
            table.push('\n');
        }
        for note in &self.notes {
            table.push_str(&format!("note: {note}\n"));
        }
        table.push_str(&format!("probe: isolation {}\n", word(self.verdict)));
        table
    }
}

fn word(verdict: Verdict) -> &'static str {
    match verdict {
        Verdict::Holds => "holds",
        Verdict::Unproven => "is not proven",
        Verdict::Broken => "is broken",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(expected: Expected, arrived: bool, proven: bool) -> Row {
        Row::judge("IPv4", "a", "b", expected, arrived, proven)
    }

    #[test]
    fn silence_proves_nothing_when_the_probe_is_dead() {
        assert_eq!(row(Expected::Blocked, false, true).verdict, Verdict::Holds);
        assert_eq!(row(Expected::Blocked, false, false).verdict, Verdict::Unproven);
        assert_eq!(row(Expected::Arrives, false, true).verdict, Verdict::Unproven);
    }

    #[test]
    fn what_got_through_got_through_whatever_the_controls_say() {
        assert_eq!(row(Expected::Blocked, true, false).verdict, Verdict::Broken);
    }

    #[test]
    fn the_worst_row_decides_and_no_row_proves_nothing() {
        let rows = vec![row(Expected::Arrives, true, true), row(Expected::Blocked, true, true)];
        assert_eq!(Report::of(rows, Vec::new()).verdict, Verdict::Broken);
        assert_eq!(Report::of(Vec::new(), Vec::new()).verdict, Verdict::Unproven);
    }

    #[test]
    fn the_table_lines_up() {
        let report = Report::of(vec![row(Expected::Blocked, false, true)], vec!["the daemon isolates".to_owned()]);
        let lines: Vec<String> = report.to_table().lines().map(str::to_owned).collect();
        assert_eq!(lines[0], "WHAT  FROM  TO  EXPECTED  SEEN     VERDICT");
        assert_eq!(lines[1], "IPv4  a     b   blocked   nothing  holds");
        assert_eq!(lines[2], "note: the daemon isolates");
        assert_eq!(lines[3], "probe: isolation holds");
    }
}
