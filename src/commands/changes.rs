//! What a dry run prints: the plan, in the manner of a diff.

use std::io::{self, Write};
use std::path::Path;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::host::plan::Plan;
use crate::host::step::{self, Line, Step};

/// Everything that a command would change.
#[derive(Debug, Default)]
pub struct Changes {
    lines: Vec<Line>,
    cloud: Vec<String>,
    obstacles: Vec<String>,
    notes: Vec<String>,
}

impl Changes {
    /// The changes of a plan.
    pub fn of(plan: &Plan) -> Self {
        // Nothing is done while there is an obstacle.
        let steps = if plan.obstacles.is_empty() { &plan.steps[..] } else { &[] };
        Self {
            lines: steps.iter().flat_map(Step::lines).collect(),
            obstacles: plan.obstacles.clone(),
            ..Self::default()
        }
    }

    /// Cloud calls that would change something.
    pub fn with_cloud(mut self, calls: Vec<String>) -> Self {
        self.cloud = calls;
        self
    }

    /// Something the reader has to know.
    pub fn note(&mut self, note: impl Into<String>) {
        self.notes.push(note.into());
    }

    /// A file that would be replaced or removed.
    pub fn file(&mut self, path: &Path, old: Option<&str>, new: Option<&str>) {
        self.lines.extend(step::file_lines(path, old, new));
    }

    /// Prints them on stdout; fails where the command would.
    pub fn print(&self, as_json: bool) -> Result<()> {
        let text = if as_json { format!("{:#}\n", self.to_json()) } else { self.to_text() };
        io::stdout().write_all(text.as_bytes()).context("cannot write to stdout")?;
        ensure!(self.obstacles.is_empty(), "something on this host stands in the way, so nothing would be changed");
        Ok(())
    }

    fn to_text(&self) -> String {
        let mut out: Vec<String> = self.notes.iter().map(|note| format!("# {note}")).collect();
        out.extend(self.obstacles.iter().map(|obstacle| format!("! {obstacle}")));
        out.extend(self.cloud.iter().map(|call| format!("+ cloud: {call}")));
        out.extend(self.lines.iter().map(ToString::to_string));
        if self.lines.is_empty() && self.cloud.is_empty() && self.obstacles.is_empty() {
            out.push("nothing to change".to_owned());
        }
        out.join("\n") + "\n"
    }

    fn to_json(&self) -> Value {
        let line = |line: &Line| json!({"action": if line.added { "add" } else { "remove" }, "what": line.text});
        json!({
            "notes": self.notes,
            "obstacles": self.obstacles,
            "cloud": self.cloud,
            "host": self.lines.iter().map(line).collect::<Vec<_>>(),
        })
    }
}
