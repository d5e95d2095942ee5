//! The difference between the rules that stand and the rules that are wanted.
//!
//! Pure. Only rules of ours are ever deleted, by their full text, so that a table that moved underneath refuses the
//! transaction instead of losing somebody else's rule.

use std::collections::{HashMap, HashSet};
use std::fmt::Write as _;

use super::rule::Rule;
use super::save::{Counters, Ruleset, SavedRule};
use crate::host::plan::{Drift, Finding};

/// The rules of ours that are wanted in one chain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ChainRules {
    /// Table name.
    pub table: String,
    /// Chain name.
    pub chain: String,
    /// Rules that must be the first of the chain, in any order among themselves.
    pub head: Vec<Rule>,
    /// Rules that must be in the chain, anywhere; missing ones are appended.
    pub tail: Vec<Rule>,
}

impl ChainRules {
    /// Whether no rule of ours is wanted in the chain.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.head.is_empty() && self.tail.is_empty()
    }
}

/// What happens to a rule.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// `-D`: the first rule that equals it goes.
    Delete,
    /// `-I`: it becomes the first of its chain.
    Insert,
    /// `-A`: it becomes the last of its chain.
    Append,
}

/// One line of a transaction.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RuleChange {
    /// Table name.
    pub table: String,
    /// Chain name.
    pub chain: String,
    /// What happens.
    pub action: Action,
    /// To which rule.
    pub rule: Rule,
    /// What the rule had counted before it was moved.
    pub counters: Counters,
}

/// The changes that make the rules as wanted, and what made them necessary.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Transaction {
    /// In the order of application, tables together.
    pub changes: Vec<RuleChange>,
    /// What was found.
    pub findings: Vec<Finding>,
}

impl Transaction {
    /// Whether there is nothing to do.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.changes.is_empty()
    }

    /// Whether any rule that is added needs the ipset of this name.
    #[must_use]
    pub fn adds_use_of_set(&self, set: &str) -> bool {
        self.changes.iter().any(|change| change.action != Action::Delete && change.rule.uses_set(set))
    }

    /// The transaction as `iptables-restore --noflush --counters` reads it. Each table is committed as one.
    #[must_use]
    pub fn restore_input(&self) -> String {
        let mut input = String::new();
        let mut open: Option<&str> = None;
        for change in &self.changes {
            if open != Some(&change.table) {
                if open.is_some() {
                    input.push_str("COMMIT\n");
                }
                let _ = writeln!(input, "*{}", change.table);
                open = Some(&change.table);
            }
            if change.counters != Counters::default() {
                let _ = write!(input, "[{}:{}] ", change.counters.packets, change.counters.bytes);
            }
            let flag = match change.action {
                Action::Delete => "-D",
                Action::Insert => "-I",
                Action::Append => "-A",
            };
            let _ = writeln!(input, "{flag} {} {}", change.chain, change.rule.text());
        }
        if open.is_some() {
            input.push_str("COMMIT\n");
        }
        input
    }
}

/// Compares what stands with what is wanted. Rules of ours in chains that `wanted` does not name are to go.
#[must_use]
pub fn diff(wanted: &[ChainRules], standing: &Ruleset) -> Transaction {
    let mut transaction = Transaction::default();
    let mut seen: HashSet<(&str, &str)> = HashSet::new();
    for chain in wanted {
        seen.insert((&chain.table, &chain.chain));
        ChainDiff::new(chain, &standing.chain(&chain.table, &chain.chain)).report(&mut transaction);
    }
    for (table, chain, _) in standing.ours() {
        if seen.insert((table, chain)) {
            let nothing =
                ChainRules { table: table.to_owned(), chain: chain.to_owned(), head: Vec::new(), tail: Vec::new() };
            ChainDiff::new(&nothing, &standing.chain(table, chain)).report(&mut transaction);
        }
    }
    // filter before nat: no address is masqueraded before its drops stand. A stable sort keeps the order within.
    transaction.changes.sort_by(|a, b| a.table.cmp(&b.table));
    transaction
}

/// The comparison of one chain.
struct ChainDiff<'a> {
    wanted: &'a ChainRules,
    stale: Vec<&'a SavedRule>,
    duplicates: Vec<&'a SavedRule>,
    misplaced: Vec<&'a SavedRule>,
    masked: Vec<&'a SavedRule>,
    above: Option<&'a SavedRule>,
    insert: Vec<(&'a Rule, Counters)>,
    missing_head: usize,
    append: Vec<&'a Rule>,
}

impl<'a> ChainDiff<'a> {
    fn new(wanted: &'a ChainRules, standing: &[&'a SavedRule]) -> Self {
        let head: HashSet<&Rule> = wanted.head.iter().collect();
        let tail: HashSet<&Rule> = wanted.tail.iter().collect();
        let mut copies: HashMap<&Rule, (usize, Counters)> = HashMap::new();
        // -D takes the first copy, which may be the whole one: all go and one comes back.
        let masked: HashSet<&Rule> = standing.iter().filter(|saved| saved.masked).map(|saved| &saved.rule).collect();
        for saved in standing.iter().filter(|saved| saved.rule.is_ours() && !masked.contains(&saved.rule)) {
            let copy = copies.entry(&saved.rule).or_default();
            copy.0 += 1;
            copy.1 += saved.counters;
        }
        let count = |rule: &Rule| copies.get(rule).map_or(0, |copy| copy.0);

        let mut this = Self {
            wanted,
            stale: Vec::new(),
            duplicates: Vec::new(),
            misplaced: Vec::new(),
            masked: Vec::new(),
            above: None,
            insert: Vec::new(),
            missing_head: 0,
            append: wanted.tail.iter().filter(|rule| count(rule) == 0).collect(),
        };
        let mut in_place: HashSet<&Rule> = HashSet::new();
        let mut spare: HashMap<&Rule, usize> = HashMap::new();
        for &saved in standing {
            let rule = &saved.rule;
            if rule.is_ours() && masked.contains(rule) {
                this.masked.push(saved);
            } else if head.contains(rule) {
                if count(rule) > 1 {
                    // -D takes the first copy, which may be the one in place: all go and one comes back.
                    this.duplicates.push(saved);
                } else if this.above.is_some() {
                    this.misplaced.push(saved);
                } else {
                    in_place.insert(rule);
                }
            } else if rule.is_ours() && !tail.contains(rule) {
                this.stale.push(saved);
            } else {
                if tail.contains(rule) {
                    let spare = spare.entry(rule).or_insert_with(|| count(rule) - 1);
                    if *spare > 0 {
                        *spare -= 1;
                        this.duplicates.push(saved);
                        continue;
                    }
                }
                this.above.get_or_insert(saved);
            }
        }
        for rule in wanted.head.iter().filter(|rule| !in_place.contains(rule)) {
            let (copies, counters) = copies.get(rule).copied().unwrap_or_default();
            this.missing_head += usize::from(copies == 0 && !this.masked.iter().any(|saved| saved.rule == *rule));
            this.insert.push((rule, counters));
        }
        this
    }

    /// Rules that are there and go, for others like them to be put in their place.
    fn moved(&self) -> impl Iterator<Item = &&'a SavedRule> {
        self.masked.iter().chain(&self.misplaced).chain(&self.duplicates)
    }

    fn report(self, transaction: &mut Transaction) {
        let place = format!("{} {}", self.wanted.table, self.wanted.chain);
        let mut find = |kind, count: usize, what: String| {
            if count > 0 {
                transaction.findings.push(Finding { kind, text: what });
            }
        };
        let missing: Vec<&Rule> = self
            .insert
            .iter()
            .filter(|(rule, _)| !self.moved().any(|saved| saved.rule == **rule))
            .map(|(rule, _)| *rule)
            .take(1)
            .chain(self.append.iter().copied())
            .collect();
        let missing_count = self.missing_head + self.append.len();
        find(Drift::RulesMissing, missing_count, {
            let example = missing.first().map_or("", |rule| rule.text());
            format!("{} missing from {place}: {example}{}", rules(missing_count), more(missing_count))
        });
        find(Drift::RulesShadowed, self.misplaced.len(), {
            let above = self.above.map_or("", |saved| saved.rule.text());
            let count = self.misplaced.len();
            format!("{} of {place} below a rule of someone else's that is looked at first: {above}", rules(count))
        });
        for (kind, word, found) in [
            (Drift::RulesMasked, "with conditions that iptables does not show in", &self.masked),
            (Drift::RulesStale, "not wanted in", &self.stale),
            (Drift::RulesDuplicated, "more than once in", &self.duplicates),
        ] {
            let example = found.first().map_or("", |saved| saved.rule.text());
            find(kind, found.len(), format!("{} {word} {place}: {example}{}", rules(found.len()), more(found.len())));
        }

        let mut change = |action, rule: &Rule, counters| {
            transaction.changes.push(RuleChange {
                table: self.wanted.table.clone(),
                chain: self.wanted.chain.clone(),
                action,
                rule: rule.clone(),
                counters,
            });
        };
        for saved in self.masked.iter().chain(&self.stale).chain(&self.duplicates).chain(&self.misplaced) {
            change(Action::Delete, &saved.rule, Counters::default());
        }
        // Each -I becomes the first, so the last wanted one goes in first.
        for (rule, counters) in self.insert.iter().rev() {
            change(Action::Insert, rule, *counters);
        }
        for rule in &self.append {
            change(Action::Append, rule, Counters::default());
        }
    }
}

fn rules(count: usize) -> String {
    if count == 1 { "1 rule".to_owned() } else { format!("{count} rules") }
}

fn more(count: usize) -> String {
    if count > 1 { format!(" (and {} more)", count - 1) } else { String::new() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const ACCEPT: &str = "-i cni0 -o cni0 -m comment --comment cocoon-net -j ACCEPT";

    fn drop(range: &str) -> String {
        format!("-d {range} -i cni0 -m comment --comment cocoon-net-drop -j DROP")
    }

    fn wanted(head: &[&str], tail: &[&str]) -> Vec<ChainRules> {
        let parse = |texts: &[&str]| texts.iter().map(|text| Rule::parse(text).unwrap()).collect();
        vec![ChainRules { table: "filter".into(), chain: "FORWARD".into(), head: parse(head), tail: parse(tail) }]
    }

    fn standing(rules: &[&str]) -> Ruleset {
        let lines: String = rules.iter().map(|rule| format!("[1:10] -A FORWARD {rule}\n")).collect();
        Ruleset::parse(&format!("*filter\n:FORWARD ACCEPT [0:0]\n{lines}COMMIT\n")).unwrap()
    }

    /// What the kernel does with a transaction.
    fn apply(standing: &Ruleset, transaction: &Transaction) -> Vec<SavedRule> {
        let mut chain: Vec<SavedRule> = standing.chain("filter", "FORWARD").into_iter().cloned().collect();
        for change in &transaction.changes {
            let saved = SavedRule { rule: change.rule.clone(), counters: change.counters, masked: false };
            match change.action {
                Action::Delete => {
                    let at = chain.iter().position(|other| other.rule == change.rule).expect("-D of a missing rule");
                    chain.remove(at);
                }
                Action::Insert => chain.insert(0, saved),
                Action::Append => chain.push(saved),
            }
        }
        chain
    }

    fn texts(chain: &[SavedRule]) -> Vec<&str> {
        chain.iter().map(|saved| saved.rule.text()).collect()
    }

    #[test]
    fn nothing_is_written_when_nothing_differs() {
        let (a, b) = (drop("10.0.0.0/8"), drop("11.0.0.0/8"));
        let transaction = diff(&wanted(&[&a, &b], &[ACCEPT]), &standing(&[&b, &a, "-j X", ACCEPT]));
        assert_eq!(transaction, Transaction::default());
        assert_eq!(transaction.restore_input(), "");
    }

    #[test]
    fn drops_go_to_the_head_and_accepts_to_the_end() {
        let (a, b) = (drop("10.0.0.0/8"), drop("11.0.0.0/8"));
        let before = standing(&["-j FOREIGN"]);
        let transaction = diff(&wanted(&[&a, &b], &[ACCEPT]), &before);
        assert_eq!(texts(&apply(&before, &transaction)), [&a, &b, "-j FOREIGN", ACCEPT]);
        assert_eq!(transaction.findings[0].kind, Drift::RulesMissing);
    }

    #[test]
    fn a_foreign_rule_above_the_drops_is_found_and_the_drops_move_with_their_counters() {
        let (a, b) = (drop("10.0.0.0/8"), drop("11.0.0.0/8"));
        let before = standing(&[&a, "-j ACCEPT", &b]);
        let transaction = diff(&wanted(&[&a, &b], &[]), &before);
        let after = apply(&before, &transaction);
        assert_eq!(texts(&after), [&b, &a, "-j ACCEPT"]);
        assert_eq!(after[0].counters, Counters { packets: 1, bytes: 10 });
        assert_eq!(transaction.findings.len(), 1);
        assert_eq!(transaction.findings[0].kind, Drift::RulesShadowed);
        assert!(transaction.restore_input().contains("[1:10] -I FORWARD -d 11.0.0.0/8"));
    }

    #[test]
    fn a_copy_below_does_not_cost_the_rule_its_place() {
        let a = drop("10.0.0.0/8");
        let before = standing(&[&a, "-j ACCEPT", &a]);
        let after = apply(&before, &diff(&wanted(&[&a], &[]), &before));
        assert_eq!(texts(&after), [&a, "-j ACCEPT"]);
        assert_eq!(after[0].counters, Counters { packets: 2, bytes: 20 });
    }

    #[test]
    fn rules_of_ours_in_other_chains_go_and_foreign_ones_stay() {
        let text = "*mangle\n:FORWARD ACCEPT [0:0]\n-A FORWARD -m comment --comment cocoon-net -j ACCEPT\n\
                    -A FORWARD -m comment --comment cocoon-netx -j ACCEPT\nCOMMIT\n";
        let transaction = diff(&[], &Ruleset::parse(text).unwrap());
        assert_eq!(transaction.changes.len(), 1);
        assert_eq!(transaction.findings[0].kind, Drift::RulesStale);
    }

    #[test]
    fn filter_is_committed_before_nat() {
        let nat = ChainRules {
            table: "nat".into(),
            chain: "POSTROUTING".into(),
            head: Vec::new(),
            tail: vec![Rule::parse("-m comment --comment cocoon-net -j MASQUERADE").unwrap()],
        };
        let mut both = vec![nat];
        both.extend(wanted(&[&drop("10.0.0.0/8")], &[]));
        let input = diff(&both, &Ruleset::default()).restore_input();
        assert!(input.starts_with("*filter\n-I FORWARD -d 10.0.0.0/8"), "{input}");
        assert!(
            input.ends_with("COMMIT\n*nat\n-A POSTROUTING -m comment --comment cocoon-net -j MASQUERADE\nCOMMIT\n")
        );
    }

    proptest! {
        /// From any mix of our own, stale, doubled and foreign rules: one transaction makes it right, a second finds
        /// nothing, the drops are the head, and the foreign rules are all there in their order.
        #[test]
        fn one_transaction_makes_any_chain_right(picks in prop::collection::vec(0usize..9, 0..16), wants in 0u8..16) {
            let ours: Vec<String> = (1..=4).map(|n| drop(&format!("{n}.0.0.0/8"))).collect();
            let foreign = ["-j A", "-j B", "-i cni0 -m comment --comment cocoon-net-dropx -j ACCEPT"];
            let all: Vec<&str> = ours.iter().map(String::as_str).chain(foreign).chain([ACCEPT, "-m comment --comment cocoon-net -j Z"]).collect();
            let before = standing(&picks.iter().map(|pick| all[*pick]).collect::<Vec<_>>());
            let head: Vec<&str> = (0..4).filter(|n| wants & (1 << n) != 0).map(|n| all[n]).collect();
            let wanted = wanted(&head, &[ACCEPT]);

            let after = apply(&before, &diff(&wanted, &before));
            let lines = texts(&after);
            let at_head: HashSet<&str> = lines.iter().take(head.len()).copied().collect();
            prop_assert_eq!(at_head, head.iter().copied().collect::<HashSet<_>>());
            prop_assert_eq!(lines.iter().filter(|line| **line == ACCEPT).count(), 1);
            let is_foreign = |line: &&str| foreign.contains(line);
            let kept: Vec<&str> = lines.iter().copied().filter(is_foreign).collect();
            prop_assert_eq!(kept, picks.iter().map(|pick| all[*pick]).filter(is_foreign).collect::<Vec<_>>());
            prop_assert!(diff(&wanted, &standing(&lines)).is_empty());
        }
    }
}
