//! The steps of a plan, and how an operator reads them.

use std::collections::BTreeMap;
use std::fmt;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};

use ipnet::Ipv4Net;

use super::backstop;
use super::desired::Bridge;
use super::firewall::{self, Backend, Counters, Family, Transaction};
use super::ipset::{self, SetState};
use super::links::{self, Mac};
use super::sysctl::Setting;
use crate::config::BRIDGE;

/// One thing to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// Make bridged frames pass through iptables, and read it back, before anything else.
    Guard(Vec<&'static str>),
    /// Fill the set of drop targets and swap it in.
    FillSet {
        /// What it must hold, each with what has been counted so far.
        entries: BTreeMap<Ipv4Net, Counters>,
        /// What it holds.
        old: SetState,
    },
    /// Change rules.
    Firewall {
        /// Of this family.
        family: Family,
        /// Where they stand: rules of ours may be stranded in the backend that is not the host's.
        backend: Backend,
        /// What to change.
        transaction: Transaction,
    },
    /// Put the chains of a table on their hooks, or take them off.
    Hook {
        /// The family of the table.
        family: Family,
        /// Its name.
        table: String,
        /// Whether it becomes dormant.
        dormant: bool,
    },
    /// Destroy the set, after its rule has gone.
    DestroySet(SetState),
    /// Destroy the set that a fill which was cut short left behind.
    DestroyLeftoverSet,
    /// Take down what a daemon may have left standing in a siege; see [`backstop`].
    LowerBackstop,
    /// Make the bridge.
    CreateBridge {
        /// Its Ethernet address.
        mac: Mac,
        /// What it must look like.
        bridge: Bridge,
    },
    /// Pin the Ethernet address that the bridge has.
    PinMac(Mac),
    /// Set the MTU of the bridge.
    SetMtu {
        /// From bytes.
        from: u32,
        /// To bytes.
        to: u32,
    },
    /// Put the gateway address on the bridge.
    AddAddress(Ipv4Net),
    /// Take an address off the bridge.
    RemoveAddress(Ipv4Net),
    /// Bring an interface up.
    SetUp(String),
    /// Take an interface down.
    SetDown(String),
    /// Isolate a port, or end its isolation.
    IsolatePort {
        /// The port.
        port: String,
        /// Whether it becomes isolated.
        isolated: bool,
    },
    /// Set kernel parameters; with each the value it has now.
    Sysctl(Vec<(Setting, Option<String>)>),
    /// Remove the guest agent's local route.
    RemoveLocalRoute {
        /// The uplink it is on.
        nic: String,
        /// The VMs' subnet.
        subnet: Ipv4Net,
    },
    /// Replace a file.
    WriteFile {
        /// Where.
        path: PathBuf,
        /// What it holds now.
        old: Option<Vec<u8>>,
        /// What it must hold.
        new: String,
        /// Its mode.
        mode: u32,
    },
    /// Remove a file.
    RemoveFile {
        /// Where.
        path: PathBuf,
        /// What it holds now.
        old: Vec<u8>,
    },
    /// Remove the routes of leases.
    RemoveLeaseRoutes {
        /// The VMs' subnet.
        subnet: Ipv4Net,
        /// The addresses that have one.
        addresses: Vec<Ipv4Addr>,
    },
    /// Delete the bridge.
    DeleteBridge,
}

/// One line of a dry run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Line {
    /// Whether it is added (or set) rather than removed.
    pub added: bool,
    /// The rule, link, parameter or file, as a command an operator knows.
    pub text: String,
}

impl fmt::Display for Line {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", if self.added { '+' } else { '-' }, self.text)
    }
}

impl Step {
    /// What the step adds and removes, in the manner of a diff.
    #[must_use]
    pub fn lines(&self) -> Vec<Line> {
        let add = |text: String| Line { added: true, text };
        let remove = |text: String| Line { added: false, text };
        match self {
            Self::Guard(keys) => keys.iter().map(|key| add(format!("sysctl {key}=1"))).collect(),
            Self::FillSet { entries, old } => set_lines(Some(entries), old),
            Self::DestroySet(old) => set_lines(None, old),
            Self::DestroyLeftoverSet => vec![remove(format!("ipset {}", ipset::NEXT))],
            Self::LowerBackstop => vec![remove(format!("rule and routes of table {}", backstop::TABLE))],
            Self::Firewall { family, backend, transaction } => rule_lines(&family.tool(*backend, ""), transaction),
            Self::Hook { family, table, dormant } => {
                vec![Line { added: *dormant, text: format!("table {} {table} flags dormant", family.nft()) }]
            }
            Self::CreateBridge { mac, bridge } => {
                let mac = links::format_mac(*mac);
                let mtu = bridge.mtu.map(|mtu| format!(" mtu {mtu}")).unwrap_or_default();
                vec![
                    add(format!("link {BRIDGE} type bridge address {mac}{mtu} up")),
                    add(format!("address {} dev {BRIDGE}", bridge.address)),
                ]
            }
            Self::PinMac(mac) => vec![add(format!("link {BRIDGE} address {}", links::format_mac(*mac)))],
            Self::SetMtu { from, to } => {
                vec![remove(format!("link {BRIDGE} mtu {from}")), add(format!("link {BRIDGE} mtu {to}"))]
            }
            Self::AddAddress(address) => vec![add(format!("address {address} dev {BRIDGE}"))],
            Self::RemoveAddress(address) => vec![remove(format!("address {address} dev {BRIDGE}"))],
            Self::SetUp(name) => vec![add(format!("link {name} up"))],
            Self::SetDown(name) => vec![remove(format!("link {name} up"))],
            Self::IsolatePort { port, isolated: true } => vec![add(format!("port {port} isolated on"))],
            Self::IsolatePort { port, isolated: false } => vec![remove(format!("port {port} isolated on"))],
            Self::Sysctl(settings) => settings
                .iter()
                .flat_map(|(setting, now)| {
                    let old = now.as_ref().map(|now| remove(format!("sysctl {}={now}", setting.key)));
                    old.into_iter().chain([add(format!("sysctl {}={}", setting.key, setting.value))])
                })
                .collect(),
            Self::RemoveLocalRoute { nic, subnet } => {
                vec![remove(format!("route local {subnet} dev {nic} table local"))]
            }
            Self::WriteFile { path, old, new, .. } => {
                let old = old.as_deref().map(String::from_utf8_lossy);
                file_lines(path, old.as_deref(), Some(new))
            }
            Self::RemoveFile { path, old } => file_lines(path, Some(&String::from_utf8_lossy(old)), None),
            Self::RemoveLeaseRoutes { addresses, .. } => {
                addresses.iter().map(|address| remove(format!("route {address}/32 dev {BRIDGE}"))).collect()
            }
            Self::DeleteBridge => vec![remove(format!("link {BRIDGE} type bridge"))],
        }
    }
}

fn rule_lines(tool: &str, transaction: &Transaction) -> Vec<Line> {
    let line = |change: &firewall::RuleChange| Line {
        added: change.action != firewall::Action::Delete,
        text: format!(
            "{tool} -t {} {} {} {}",
            change.table,
            if change.action == firewall::Action::Insert { "-I" } else { "-A" },
            change.chain,
            change.rule.text()
        ),
    };
    transaction.changes.iter().map(line).collect()
}

fn set_lines(new: Option<&BTreeMap<Ipv4Net, Counters>>, old: &SetState) -> Vec<Line> {
    let nothing = ipset::Set::default();
    let (had, old) = match old {
        SetState::Present(set) => (true, set),
        _ => (false, &nothing),
    };
    let mut lines = Vec::new();
    if had != new.is_some() {
        lines.push(Line { added: new.is_some(), text: format!("ipset {} hash:net counters", ipset::SET) });
    }
    let is_new = |entry: &Ipv4Net| new.is_some_and(|new| new.contains_key(entry));
    let entry = |added, entry: &dyn fmt::Display| Line { added, text: format!("ipset {} {entry}", ipset::SET) };
    lines.extend(old.entries.keys().filter(|range| !is_new(range)).map(|range| entry(false, range)));
    lines.extend(old.oddities.iter().map(|oddity| entry(false, oddity)));
    lines.extend(
        new.into_iter()
            .flat_map(BTreeMap::keys)
            .filter(|range| !old.entries.contains_key(range))
            .map(|range| entry(true, range)),
    );
    lines
}

/// A file that is made, replaced or removed: what its old and its new text share at both ends is left out.
#[must_use]
pub fn file_lines(path: &Path, old: Option<&str>, new: Option<&str>) -> Vec<Line> {
    let name = |added| Line { added, text: format!("file {}", path.display()) };
    let before: Vec<&str> = old.unwrap_or_default().lines().collect();
    let after: Vec<&str> = new.unwrap_or_default().lines().collect();
    let head = before.iter().zip(&after).take_while(|(a, b)| a == b).count();
    let tail = before[head..].iter().rev().zip(after[head..].iter().rev()).take_while(|(a, b)| a == b).count();
    let indented = |added, lines: &[&str]| -> Vec<Line> {
        lines.iter().map(|line| Line { added, text: format!("    {line}") }).collect()
    };
    let mut lines = Vec::new();
    lines.extend(old.map(|_| name(false)));
    lines.extend(indented(false, &before[head..before.len() - tail]));
    lines.extend(new.map(|_| name(true)));
    lines.extend(indented(true, &after[head..after.len() - tail]));
    lines
}
