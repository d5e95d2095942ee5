//! Reading `iptables-save -c`.

use std::collections::{BTreeMap, BTreeSet};

use super::rule::Rule;
use super::{BUILT_IN, Backend};

/// All that one `iptables-save` printed: tables by name.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Ruleset {
    tables: BTreeMap<String, Table>,
    /// Which backend printed it, as far as it says.
    pub(super) printed_by: Option<Backend>,
    /// Chains of ours, as table and chain, that only have the name of a built-in one: no packet meets their rules.
    pub unhooked: BTreeSet<(String, String)>,
    /// Tables whose rules are listed here although no packet meets them (`flags dormant` of nft(8)).
    pub dormant: BTreeSet<String>,
}

/// One table.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Table {
    /// Chains in the order printed, with the policy of built-in ones (`-` for the others).
    pub chains: Vec<(String, String)>,
    rules: Vec<(String, SavedRule)>,
}

/// A rule that stands in a chain, with what it has counted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SavedRule {
    /// The rule.
    pub rule: Rule,
    /// How much traffic it has matched.
    pub counters: Counters,
    /// Whether it holds more than its text says.
    pub masked: bool,
}

/// How much traffic a rule or a set entry has matched.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counters {
    /// Packets.
    pub packets: u64,
    /// Bytes.
    pub bytes: u64,
}

impl std::ops::AddAssign for Counters {
    fn add_assign(&mut self, other: Self) {
        self.packets = self.packets.saturating_add(other.packets);
        self.bytes = self.bytes.saturating_add(other.bytes);
    }
}

/// Why the answer of `iptables-save` cannot be relied on.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SaveError {
    /// Somebody put rules into one of our tables that iptables cannot show.
    #[error(
        "table `{0}` holds native nftables rules that iptables cannot show, so isolation cannot be verified; \
         move them into a table of their own (see `nft list table ip {0}`)"
    )]
    Incompatible(String),
    /// The output ends within a table.
    #[error("the output ends within table `{0}`")]
    Truncated(String),
    /// A line that makes no sense.
    #[error("line {number} cannot be read: `{line}`")]
    Line {
        /// Its number, from 1.
        number: usize,
        /// The line.
        line: String,
    },
}

impl Ruleset {
    /// Reads the output of `iptables-save -c`.
    ///
    /// # Errors
    /// [`SaveError`] unless every line was understood and every table is whole.
    pub fn parse(text: &str) -> Result<Self, SaveError> {
        let mut ruleset = Self::default();
        let mut open: Option<(String, Table)> = None;
        for (index, line) in logical_lines(text).enumerate() {
            let bad = || SaveError::Line { number: index + 1, line: line.to_owned() };
            if let Some(comment) = line.strip_prefix('#') {
                if let Some(name) = incompatible_table(comment) {
                    return Err(SaveError::Incompatible(name.to_owned()));
                }
                ruleset.printed_by = ruleset.printed_by.or(backend_named_in(comment));
            } else if let Some(name) = line.strip_prefix('*') {
                if open.is_some() {
                    return Err(bad());
                }
                open = Some((name.trim().to_owned(), Table::default()));
            } else if line == "COMMIT" {
                let (name, table) = open.take().ok_or_else(bad)?;
                ruleset.unhooked.extend(table.unhooked_chains().map(|chain| (name.clone(), chain.to_owned())));
                ruleset.tables.insert(name, table);
            } else if !line.trim().is_empty() {
                let (_, table) = open.as_mut().ok_or_else(bad)?;
                table.read_line(line).ok_or_else(bad)?;
            }
        }
        match open {
            Some((name, _)) => Err(SaveError::Truncated(name)),
            None => Ok(ruleset),
        }
    }

    /// Whether nftables holds these rules. An empty ruleset does not tell.
    #[must_use]
    pub fn is_nft(&self) -> bool {
        self.printed_by == Some(Backend::Nft)
    }

    /// The tables by name.
    pub fn tables(&self) -> impl Iterator<Item = (&str, &Table)> {
        self.tables.iter().map(|(name, table)| (name.as_str(), table))
    }

    /// The rules of a chain in their order; none when there is no such table or chain.
    #[must_use]
    pub fn chain(&self, table: &str, chain: &str) -> Vec<&SavedRule> {
        let rules = self.tables.get(table).map_or(&[][..], |table| &table.rules);
        rules.iter().filter(|(name, _)| name == chain).map(|(_, rule)| rule).collect()
    }

    /// The same, for writing.
    pub(super) fn chain_mut(&mut self, table: &str, chain: &str) -> impl Iterator<Item = &mut SavedRule> {
        let rules = self.tables.get_mut(table).map_or(&mut [][..], |table| &mut table.rules);
        rules.iter_mut().filter(move |(name, _)| name == chain).map(|(_, rule)| rule)
    }

    /// The rules of a table as `(chain, rule)`.
    pub fn rules(&self, table: &str) -> impl Iterator<Item = (&str, &Rule)> {
        let rules = self.tables.get(table).map_or(&[][..], |table| &table.rules);
        rules.iter().map(|(chain, saved)| (chain.as_str(), &saved.rule))
    }

    /// Every rule of ours as `(table, chain, rule)`.
    pub fn ours(&self) -> impl Iterator<Item = (&str, &str, &SavedRule)> {
        self.tables().flat_map(|(name, table)| {
            let ours = table.rules.iter().filter(|(_, saved)| saved.rule.is_ours());
            ours.map(move |(chain, saved)| (name, chain.as_str(), saved))
        })
    }
}

impl Table {
    /// Chains with the name of a built-in one that are none: nftables lets anyone make them, and they have no policy.
    fn unhooked_chains(&self) -> impl Iterator<Item = &str> {
        let unhooked = |(chain, policy): &&(String, String)| policy == "-" && BUILT_IN.contains(&chain.as_str());
        self.chains.iter().filter(unhooked).map(|(chain, _)| chain.as_str())
    }

    fn read_line(&mut self, line: &str) -> Option<()> {
        if let Some(chain) = line.strip_prefix(':') {
            let mut words = chain.split_whitespace();
            self.chains.push((words.next()?.to_owned(), words.next()?.to_owned()));
            return Some(());
        }
        let (counters, rest) = match line.strip_prefix('[') {
            Some(rest) => {
                let (counters, rest) = rest.split_once("] ")?;
                let (packets, bytes) = counters.split_once(':')?;
                (Counters { packets: packets.parse().ok()?, bytes: bytes.parse().ok()? }, rest)
            }
            None => (Counters::default(), line),
        };
        let (chain, text) = rest.strip_prefix("-A ")?.split_once(' ').unwrap_or((rest.strip_prefix("-A ")?, ""));
        self.rules.push((chain.to_owned(), SavedRule { rule: Rule::parse(text).ok()?, counters, masked: false }));
        Some(())
    }
}

/// The lines of a text; one that ends within quotes goes on in the next, for comments may hold newlines.
fn logical_lines(text: &str) -> impl Iterator<Item = &str> {
    let mut rest = text;
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let (mut quoted, mut escaped) = (false, false);
        let is_rule = rest.starts_with(['[', '-']);
        let end = rest.bytes().position(|byte| {
            quoted ^= is_rule && byte == b'"' && !escaped;
            escaped = byte == b'\\' && !escaped;
            byte == b'\n' && !quoted
        });
        let (line, behind) = rest.split_at(end.unwrap_or(rest.len()));
        rest = behind.strip_prefix('\n').unwrap_or(behind);
        Some(line)
    })
}

/// The backend that a line `# Generated by iptables-save v1.8.9 (nf_tables) on ...` names. Versions before 1.8.8 print the
/// same line whichever it is.
fn backend_named_in(comment: &str) -> Option<Backend> {
    let (_, version) = comment.strip_prefix(" Generated by ")?.split_once(" v")?;
    let (version, rest) = version.split_once(' ').unwrap_or((version, ""));
    if rest.starts_with("(nf_tables)") {
        return Some(Backend::Nft);
    }
    let mut numbers = version.split('.').map(|number| number.parse::<u32>().ok());
    let version = (numbers.next()??, numbers.next()??, numbers.next().flatten().unwrap_or(0));
    (!(((1, 8, 0)..(1, 8, 8)).contains(&version))).then_some(Backend::Legacy)
}

/// The name within "Table `filter' is incompatible, use 'nft' tool.", which iptables-nft-save prints in place of the
/// table, with exit status 0. Only the tables that we put rules into matter.
fn incompatible_table(comment: &str) -> Option<&str> {
    let (name, rest) = comment.trim().strip_prefix("Table `")?.split_once('\'')?;
    (rest.contains("is incompatible") && matches!(name, "filter" | "nat")).then_some(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SAVED: &str = "# Generated by iptables-save v1.8.9 (nf_tables)\n*filter\n:INPUT ACCEPT [0:0]\n\
        :FORWARD ACCEPT [0:0]\n:DOCKER - [0:0]\n[3:252] -A FORWARD -d 10.0.0.0/8 -i cni0 -m comment --comment \
        cocoon-net-drop -j DROP\n-A FORWARD -j DOCKER\nCOMMIT\n# Completed\n";

    #[test]
    fn a_comment_of_several_lines_is_one_rule() {
        let rule = "-A FORWARD -m comment --comment \"a \\\" b\n*c\n\" -j ACCEPT";
        let rules =
            Ruleset::parse(&format!("*filter\n:FORWARD ACCEPT [0:0]\n{rule}\n-A FORWARD -j DROP\nCOMMIT\n")).unwrap();
        let forward = rules.chain("filter", "FORWARD");
        assert_eq!(forward.len(), 2);
        assert_eq!(forward[0].rule.argument("--comment"), Some("a \" b\n*c\n"));
        assert!(Ruleset::parse("*filter\n-A FORWARD --comment \"a\n-A FORWARD -j DROP\nCOMMIT\n").is_err());
    }

    #[test]
    fn chains_rules_and_counters_are_read() {
        let ruleset = Ruleset::parse(SAVED).unwrap();
        let forward = ruleset.chain("filter", "FORWARD");
        assert_eq!(forward.len(), 2);
        assert_eq!(forward[0].counters, Counters { packets: 3, bytes: 252 });
        assert_eq!(ruleset.ours().count(), 1);
        assert!(ruleset.chain("nat", "POSTROUTING").is_empty());
    }

    #[test]
    fn nothing_printed_is_an_empty_ruleset() {
        assert_eq!(Ruleset::parse("").unwrap(), Ruleset::default());
    }

    #[test]
    fn a_table_that_iptables_cannot_show_is_an_error_although_it_exits_with_0() {
        let error = Ruleset::parse("# Table `filter' is incompatible, use 'nft' tool.\n").unwrap_err();
        assert_eq!(error, SaveError::Incompatible("filter".to_owned()));
        assert!(Ruleset::parse("# Table `mangle' is incompatible, use 'nft' tool.\n").is_ok());
    }

    #[test]
    fn a_chain_that_only_has_the_name_of_a_built_in_one_is_told_apart() {
        assert!(Ruleset::parse(SAVED).unwrap().unhooked.is_empty());
        let ruleset = Ruleset::parse(&SAVED.replace(":FORWARD ACCEPT", ":FORWARD -")).unwrap();
        assert!(ruleset.unhooked.iter().eq([&("filter".to_owned(), "FORWARD".to_owned())]));
    }

    #[test]
    fn the_backend_is_read_from_the_comment_where_it_says() {
        for (comment, backend) in [
            (" Generated by iptables-save v1.8.9 (nf_tables) on Mon", Some(Backend::Nft)),
            (" Generated by iptables-save v1.8.9 on Mon", Some(Backend::Legacy)),
            (" Generated by iptables-nft-save v1.8.4 on Mon", None),
            (" Generated by iptables-save v1.8.7 on Mon", None),
            (" Generated by iptables-save v1.6.1 on Mon", Some(Backend::Legacy)),
            (" Generated by iptables-save v1.10 on Mon", Some(Backend::Legacy)),
            (" Completed on Mon", None),
        ] {
            assert_eq!(backend_named_in(comment), backend, "{comment}");
        }
    }

    #[test]
    fn partial_output_is_an_error() {
        for cut in 1..SAVED.find("COMMIT").unwrap() {
            if SAVED[..cut].contains('*') {
                assert!(Ruleset::parse(&SAVED[..cut]).is_err(), "{}", &SAVED[..cut]);
            }
        }
        assert!(matches!(Ruleset::parse("*filter\nnoise\nCOMMIT\n"), Err(SaveError::Line { number: 2, .. })));
    }
}
