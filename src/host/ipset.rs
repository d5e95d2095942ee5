//! The ipset that stands in for a long list of drop rules (`ipset(8)`).
//!
//! One rule over a set costs each packet the same whatever the set holds. The set is filled under another name and
//! swapped in, so that no packet ever meets half a set; entries keep what they have counted.

mod kernel;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;

use ipnet::Ipv4Net;

use super::firewall::{Counters, DROP_TAG};
use crate::command::{Command, CommandError};
pub use kernel::digest;

/// Name of the set.
pub const SET: &str = DROP_TAG;

/// Name under which a new set is filled before it is swapped in.
pub const NEXT: &str = "cocoon-net-next";

/// The kernel's default for how many entries a set may hold.
const DEFAULT_MAX_ENTRIES: usize = 65_536;

/// What is known of the set.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SetState {
    /// Sets cannot be had on this host, and why.
    Unavailable(String),
    /// There is none of that name.
    Absent,
    /// It is there.
    Present(Set),
}

/// The contents of the set.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Set {
    /// Ranges that match, with what they have counted.
    pub entries: BTreeMap<Ipv4Net, Counters>,
    /// Whatever else it holds or is: exceptions (`nomatch`), timeouts, another type. Never ours.
    pub oddities: Vec<String>,
}

/// Why the set could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum SetError {
    /// `ipset` failed.
    #[error("cannot {doing} the ipset `{SET}`")]
    Command {
        /// What was being done.
        doing: &'static str,
        /// What the tool answered.
        source: CommandError,
    },
}

impl SetError {
    /// Whether the kernel or the tool said no, rather than nothing.
    #[must_use]
    pub fn is_refusal(&self) -> bool {
        matches!(self, Self::Command { source: CommandError::Failed { .. }, .. })
    }

    /// Whether a set is not to be had.
    #[must_use]
    pub fn refuses_to_fill(&self) -> bool {
        matches!(self, Self::Command { doing: "fill", source: CommandError::Failed { .. } })
    }
}

/// Reads the set. A host without `ipset`, or a kernel without sets, is a state and not an error. Where none is `wanted`
/// and the kernel has none, `ipset` is not asked whether it could make one.
///
/// # Errors
/// [`SetError`] when the tool hangs or cannot be started.
pub async fn read(wanted: bool) -> Result<SetState, SetError> {
    if !wanted && matches!(digest(SET), Ok(None)) {
        return Ok(SetState::Absent);
    }
    match Command::new("ipset").args(["save", SET]).run().await {
        Ok(output) => Ok(SetState::Present(Set::parse(&output.text()))),
        Err(CommandError::Failed { stderr, .. }) if stderr.contains("does not exist") => Ok(SetState::Absent),
        Err(CommandError::Failed { stderr, .. }) => Ok(SetState::Unavailable(stderr)),
        Err(CommandError::NotFound { .. }) => Ok(SetState::Unavailable("`ipset` is not installed".to_owned())),
        Err(source) => Err(SetError::Command { doing: "read", source }),
    }
}

/// Makes the set hold exactly these entries, counting on from what each has counted, in one swap.
///
/// # Errors
/// [`SetError`]; the old set is then still in place.
pub async fn fill(entries: &BTreeMap<Ipv4Net, Counters>, old: &SetState) -> Result<(), SetError> {
    destroy_leftover().await?;
    let restore = Command::new("ipset").arg("restore").stdin(fill_input(entries, old));
    let filled = restore.run().await.map(drop).map_err(|source| SetError::Command { doing: "fill", source });
    if filled.is_err() {
        let _ = destroy_leftover().await;
    }
    filled
}

/// Destroys the set, which no rule may use any more.
///
/// # Errors
/// [`SetError`] when it stays.
pub async fn destroy() -> Result<(), SetError> {
    let restore = Command::new("ipset").args(["destroy", SET]);
    restore.run().await.map(drop).map_err(|source| SetError::Command { doing: "destroy", source })
}

/// Destroys what a fill that was cut short left behind, if anything.
///
/// # Errors
/// [`SetError`] when it is there and stays.
pub async fn destroy_leftover() -> Result<(), SetError> {
    // Where the kernel does not say, `ipset` does; and what it cannot destroy then is no reason to stop.
    let known = match digest(NEXT) {
        Ok(None) => return Ok(()),
        Ok(Some(_)) => true,
        Err(_) => false,
    };
    match Command::new("ipset").args(["destroy", NEXT]).run().await {
        Ok(_) | Err(CommandError::NotFound { .. }) => Ok(()),
        Err(CommandError::Failed { .. }) if !known => Ok(()),
        Err(source) => Err(SetError::Command { doing: "destroy", source }),
    }
}

/// The entries that stand for these ranges: a `hash:net` cannot hold a prefix of 0, so the whole of IPv4 is two halves.
#[must_use]
pub fn entries(ranges: &BTreeSet<Ipv4Net>) -> BTreeSet<Ipv4Net> {
    ranges
        .iter()
        .flat_map(
            |range| {
                if range.prefix_len() == 0 { range.subnets(1).into_iter().flatten().collect() } else { vec![*range] }
            },
        )
        .collect()
}

fn fill_input(entries: &BTreeMap<Ipv4Net, Counters>, old: &SetState) -> String {
    let room = entries.len().next_power_of_two().max(DEFAULT_MAX_ENTRIES);
    let shape = format!("hash:net family inet maxelem {room} counters");
    let mut input = format!("create {NEXT} {shape}\n");
    for (range, Counters { packets, bytes }) in entries {
        let _ = writeln!(input, "add {NEXT} {range} packets {packets} bytes {bytes}");
    }
    if !matches!(old, SetState::Present(_)) {
        let _ = writeln!(input, "create {SET} {shape}");
    }
    let _ = write!(input, "swap {NEXT} {SET}\ndestroy {NEXT}\n");
    input
}

impl Set {
    /// Reads what `ipset save` prints for one set.
    fn parse(text: &str) -> Self {
        let mut set = Self::default();
        for line in text.lines().filter(|line| !line.trim().is_empty()) {
            match line.split_whitespace().collect::<Vec<_>>()[..] {
                ["create", _, "hash:net", "family", "inet", ref rest @ ..]
                    if rest.contains(&"counters") && !rest.contains(&"timeout") => {}
                ["add", _, range, "packets", packets, "bytes", bytes] => {
                    match (parse_entry(range), packets.parse(), bytes.parse()) {
                        (Some(range), Ok(packets), Ok(bytes)) => {
                            set.entries.insert(range, Counters { packets, bytes });
                        }
                        _ => set.oddities.push(line.to_owned()),
                    }
                }
                _ => set.oddities.push(line.to_owned()),
            }
        }
        set
    }

    /// Whether it holds exactly these entries and nothing odd.
    #[must_use]
    pub fn holds(&self, wanted: &BTreeSet<Ipv4Net>) -> bool {
        self.oddities.is_empty()
            && self.entries.len() == wanted.len()
            && wanted.iter().all(|e| self.entries.contains_key(e))
    }
}

fn parse_entry(text: &str) -> Option<Ipv4Net> {
    match text.split_once('/') {
        Some(_) => text.parse().ok(),
        None => text.parse::<std::net::Ipv4Addr>().ok().map(Ipv4Net::from),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SAVED: &str = "create cocoon-net-drop hash:net family inet hashsize 1024 maxelem 65536 counters bucketsize 12\n\
        add cocoon-net-drop 10.0.0.0/8 packets 5 bytes 10\nadd cocoon-net-drop 192.0.2.7 packets 0 bytes 0\n";

    fn ranges(texts: &[&str]) -> BTreeSet<Ipv4Net> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    #[test]
    fn a_saved_set_is_read_with_its_counters() {
        let set = Set::parse(SAVED);
        assert!(set.holds(&ranges(&["10.0.0.0/8", "192.0.2.7/32"])));
        assert!(!set.holds(&ranges(&["10.0.0.0/8"])));
        assert_eq!(set.entries[&"10.0.0.0/8".parse().unwrap()].packets, 5);
    }

    #[test]
    fn an_exception_in_the_set_is_not_what_we_wanted() {
        let set = Set::parse(&format!("{SAVED}add cocoon-net-drop 10.1.0.0/16 packets 0 bytes 0 nomatch\n"));
        assert!(!set.holds(&ranges(&["10.0.0.0/8", "192.0.2.7/32"])));
        let other_kind =
            Set::parse("create cocoon-net-drop hash:ip family inet hashsize 1024 maxelem 65536 counters\n");
        assert!(!other_kind.holds(&BTreeSet::new()));
    }

    #[test]
    fn the_whole_internet_is_two_halves() {
        assert_eq!(entries(&ranges(&["0.0.0.0/0", "10.0.0.0/8"])), ranges(&["0.0.0.0/1", "10.0.0.0/8", "128.0.0.0/1"]));
    }

    #[test]
    fn a_set_is_filled_beside_the_old_one_and_counts_on() {
        let entries = BTreeMap::from([("10.0.0.0/8".parse().unwrap(), Counters { packets: 5, bytes: 10 })]);
        let input = fill_input(&entries, &SetState::Present(Set::parse(SAVED)));
        assert!(input.contains("add cocoon-net-next 10.0.0.0/8 packets 5 bytes 10\n"), "{input}");
        assert!(!input.contains("create cocoon-net-drop "), "{input}");
        assert!(input.ends_with("swap cocoon-net-next cocoon-net-drop\ndestroy cocoon-net-next\n"), "{input}");
    }
}
