//! From what is to what must be: the steps, in the order in which they may be taken.
//!
//! Pure, and the only place that decides. A dry run prints a plan, `init`, `adopt` and the daemon apply it, `check` and
//! the watch ask whether it is empty, and so does the verification after each apply.

use std::fmt;
use std::net::Ipv4Addr;
use std::path::PathBuf;

use ipnet::Ipv4Net;

use super::cni;
use super::desired::{Bridge, Desired, Part};
use super::firewall::{self, Family, Transaction};
use super::guest_agent;
use super::ipset::{self, SetState};
use super::links::{self, Mac};
use super::observe::Observed;
use super::sysctl::Setting;
use crate::config::{BRIDGE, NodeConfig};

/// A kind of difference between the host and what it must be, as the metric `drift_repairs_total` counts it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Drift {
    /// Rules of ours are missing.
    RulesMissing,
    /// A rule of someone else's comes before our drops.
    RulesShadowed,
    /// Rules of ours that nobody asked for any more.
    RulesStale,
    /// Rules of ours more than once.
    RulesDuplicated,
    /// The set of drop targets differs.
    Set,
    /// Bridged frames do not pass through iptables.
    BridgeToggle,
    /// The bridge is missing, down, or without its address.
    Bridge,
    /// A port of the bridge is not isolated as it must be.
    PortIsolation,
    /// An uplink is down.
    Uplink,
    /// A kernel parameter differs.
    Sysctl,
    /// The guest agent's local route is back.
    LocalRoute,
    /// The CNI configuration differs.
    Conflist,
    /// The cron file differs.
    Cron,
    /// Routes of leases are left.
    LeaseRoutes,
}

impl Drift {
    /// The label used in metrics and JSON.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::RulesMissing => "rules_missing",
            Self::RulesShadowed => "rules_shadowed",
            Self::RulesStale => "rules_stale",
            Self::RulesDuplicated => "rules_duplicated",
            Self::Set => "set",
            Self::BridgeToggle => "bridge_toggle",
            Self::Bridge => "bridge",
            Self::PortIsolation => "port_isolation",
            Self::Uplink => "uplink",
            Self::Sysctl => "sysctl",
            Self::LocalRoute => "local_route",
            Self::Conflist => "conflist",
            Self::Cron => "cron",
            Self::LeaseRoutes => "lease_routes",
        }
    }

    /// Whether isolation may not hold while it is there.
    #[must_use]
    pub fn breaks_isolation(self) -> bool {
        matches!(
            self,
            Self::RulesMissing
                | Self::RulesShadowed
                | Self::RulesStale
                | Self::RulesDuplicated
                | Self::Set
                | Self::BridgeToggle
                | Self::PortIsolation
        )
    }
}

/// One difference, in words.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// Its kind.
    pub kind: Drift,
    /// What was found.
    pub text: String,
}

/// One thing to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// Make bridged frames pass through iptables, and read it back, before anything else.
    Guard(Vec<&'static str>),
    /// Fill the set of drop targets and swap it in.
    FillSet {
        /// What it must hold.
        entries: std::collections::BTreeSet<Ipv4Net>,
        /// What it holds: entries keep their counters.
        old: SetState,
    },
    /// Change rules.
    Firewall(Family, Transaction),
    /// Destroy the set, after its rule has gone.
    DestroySet(SetState),
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

/// The steps from what is to what must be, in order, and what makes them necessary.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Plan {
    /// What to do.
    pub steps: Vec<Step>,
    /// Why.
    pub findings: Vec<Finding>,
    /// What stands in the way: nothing is done while there is anything here.
    pub obstacles: Vec<String>,
}

impl Plan {
    /// Compares the host with what it must be.
    #[must_use]
    pub fn new(config: &NodeConfig, desired: &Desired, observed: &Observed) -> Self {
        let mut plan = Self::default();
        plan.guard(desired, observed);
        plan.firewall(desired, observed);
        // What is taken away on the way out is taken in the other order: nothing may lead to a port that is no longer
        // isolated, so the bridge goes last.
        plan.bridge(desired, observed);
        plan.ports(desired, observed);
        plan.uplinks(desired, observed);
        plan.sysctls(desired, observed);
        plan.guest_agent(config, desired, observed);
        plan.conflist(config, desired, observed);
        plan.removals(config, desired, observed);
        plan
    }

    /// Whether the host is as it must be.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.steps.is_empty() && self.obstacles.is_empty()
    }

    /// Whether isolation may not hold until it is applied.
    #[must_use]
    pub fn breaks_isolation(&self) -> bool {
        self.findings.iter().any(|finding| finding.kind.breaks_isolation())
    }

    /// The kinds of difference found, each once.
    #[must_use]
    pub fn kinds(&self) -> std::collections::BTreeSet<Drift> {
        self.findings.iter().map(|finding| finding.kind).collect()
    }

    fn step(&mut self, kind: Drift, text: impl Into<String>, step: Step) {
        self.findings.push(Finding { kind, text: text.into() });
        self.steps.push(step);
    }

    fn guard(&mut self, desired: &Desired, observed: &Observed) {
        let reads = |key: &str| observed.sysctls.get(key).map(String::as_str);
        let off: Vec<_> = desired.guard.iter().copied().filter(|key| reads(key) != Some("1")).collect();
        for key in &off {
            let reading = reads(key).map_or_else(|| "is missing".to_owned(), |value| format!("reads {value}"));
            let text = format!("{key} {reading}: bridged frames do not pass the rules");
            self.findings.push(Finding { kind: Drift::BridgeToggle, text });
        }
        if !off.is_empty() {
            self.steps.push(Step::Guard(off));
        }
    }

    fn firewall(&mut self, desired: &Desired, observed: &Observed) {
        let Some(wanted) = &desired.firewall else { return };
        if let Some(entries) = &wanted.set {
            let right = matches!(&observed.set, SetState::Present(set) if set.holds(entries));
            if !right {
                let text = match &observed.set {
                    SetState::Present(set) => set_difference(set, entries),
                    _ => format!("the ipset {} is missing", ipset::SET),
                };
                let step = Step::FillSet { entries: entries.clone(), old: observed.set.clone() };
                self.step(Drift::Set, text, step);
            }
        }
        for (family, chains, standing) in
            [(Family::V4, &wanted.v4, &observed.v4), (Family::V6, &wanted.v6, &observed.v6)]
        {
            let mut transaction = firewall::diff(chains, standing);
            if !transaction.is_empty() {
                let tool = family.tool(firewall::Backend::Host, "");
                for Finding { kind, text } in std::mem::take(&mut transaction.findings) {
                    self.findings.push(Finding { kind, text: format!("{tool}: {text}") });
                }
                self.steps.push(Step::Firewall(family, transaction));
            }
        }
        if wanted.set.is_none() && matches!(observed.set, SetState::Present(_)) {
            let text = format!("the ipset {} is not wanted", ipset::SET);
            self.step(Drift::Set, text, Step::DestroySet(observed.set.clone()));
        }
    }

    fn bridge(&mut self, desired: &Desired, observed: &Observed) {
        let Part::Present(wanted) = &desired.bridge else { return };
        let Some(link) = observed.bridge() else {
            let step = Step::CreateBridge { mac: links::mac_for(wanted.address.addr()), bridge: wanted.clone() };
            return self.step(Drift::Bridge, format!("{BRIDGE} is missing"), step);
        };
        if !link.is_bridge {
            return self.obstacles.push(format!(
                "{BRIDGE} is there but is not a bridge; rename or delete it (`ip link del {BRIDGE}`), then try again"
            ));
        }
        if let (Some(mac), Some(false)) = (link.mac, link.mac_pinned) {
            self.step(Drift::Bridge, format!("the address of {BRIDGE} is not pinned"), Step::PinMac(mac));
        }
        for old in desired.retired_addresses.iter().filter(|old| link.addresses.contains(old)) {
            self.step(Drift::Bridge, format!("{BRIDGE} still has {old}"), Step::RemoveAddress(*old));
        }
        if !link.addresses.contains(&wanted.address) {
            let text = format!("{BRIDGE} does not have its address {}", wanted.address);
            self.step(Drift::Bridge, text, Step::AddAddress(wanted.address));
        }
        if let Some(mtu) = wanted.mtu.filter(|mtu| *mtu != link.mtu) {
            let text = format!("the MTU of {BRIDGE} is {} and not {mtu}", link.mtu);
            self.step(Drift::Bridge, text, Step::SetMtu { from: link.mtu, to: mtu });
        }
        match (wanted.up, link.up) {
            (true, false) => self.step(Drift::Bridge, format!("{BRIDGE} is down"), Step::SetUp(BRIDGE.to_owned())),
            (false, true) => self.step(Drift::Bridge, format!("{BRIDGE} is up"), Step::SetDown(BRIDGE.to_owned())),
            _ => {}
        }
    }

    fn ports(&mut self, desired: &Desired, observed: &Observed) {
        let Some(isolated) = desired.ports_isolated else { return };
        for port in observed.ports().filter(|port| port.isolated != isolated) {
            let state = if isolated { "is not isolated" } else { "is isolated, which nobody asked for" };
            let step = Step::IsolatePort { port: port.name.clone(), isolated };
            self.step(Drift::PortIsolation, format!("port {} {state}", port.name), step);
        }
    }

    fn uplinks(&mut self, desired: &Desired, observed: &Observed) {
        let down = desired.uplinks_up.iter().filter_map(|nic| observed.link(nic.as_str())).filter(|link| !link.up);
        for link in down {
            self.step(Drift::Uplink, format!("{} is down", link.name), Step::SetUp(link.name.clone()));
        }
    }

    fn sysctls(&mut self, desired: &Desired, observed: &Observed) {
        let mut wrong = Vec::new();
        for setting in &desired.sysctls {
            let now = observed.sysctls.get(&setting.key).cloned();
            // A parameter of an interface that is not there cannot be set, and does not have to be.
            if now.as_ref() == Some(&setting.value) || (now.is_none() && !setting.required) {
                continue;
            }
            let reading = now.as_deref().map_or_else(|| "is missing".to_owned(), |value| format!("is {value}"));
            // That of a bridge which is missing is no news beside the missing bridge.
            if now.is_some() || observed.bridge().is_some() {
                let text = format!("{} {reading} and not {}", setting.key, setting.value);
                self.findings.push(Finding { kind: Drift::Sysctl, text });
            }
            wrong.push((setting.clone(), now));
        }
        if !wrong.is_empty() {
            self.steps.push(Step::Sysctl(wrong));
        }
    }

    fn guest_agent(&mut self, config: &NodeConfig, desired: &Desired, observed: &Observed) {
        if let Some(nic) = desired.no_local_route_on.as_ref().filter(|_| observed.local_route) {
            let subnet = config.subnet.net();
            let text = format!("table local sends {subnet} to this host");
            self.step(Drift::LocalRoute, text, Step::RemoveLocalRoute { nic: nic.to_string(), subnet });
        }
        let path = guest_agent::cron_path();
        match &desired.cron {
            Part::Present(line) if observed.cron.as_deref() != Some(line.as_bytes()) => {
                let (old, new, mode) = (observed.cron.clone(), line.clone(), guest_agent::CRON_MODE);
                self.step(Drift::Cron, differs(&path, &old), Step::WriteFile { path, old, new, mode });
            }
            Part::Absent => self.remove_file(Drift::Cron, path, &observed.cron),
            _ => {}
        }
    }

    fn conflist(&mut self, config: &NodeConfig, desired: &Desired, observed: &Observed) {
        let path = config.conflist_path();
        match &desired.conflist {
            Part::Present(wanted) => {
                let now = observed.conflist.as_deref().and_then(|bytes| serde_json::from_slice(bytes).ok());
                if now.as_ref() != Some(wanted) {
                    let (old, new, mode) = (observed.conflist.clone(), cni::to_text(wanted), cni::MODE);
                    self.step(Drift::Conflist, differs(&path, &old), Step::WriteFile { path, old, new, mode });
                }
            }
            Part::Absent => self.remove_file(Drift::Conflist, path, &observed.conflist),
            Part::Untouched => {}
        }
    }

    fn removals(&mut self, config: &NodeConfig, desired: &Desired, observed: &Observed) {
        if desired.no_lease_routes && !observed.lease_routes.is_empty() {
            let text = format!("{} routes of leases are left", observed.lease_routes.len());
            let addresses = observed.lease_routes.clone();
            self.step(Drift::LeaseRoutes, text, Step::RemoveLeaseRoutes { subnet: config.subnet.net(), addresses });
        }
        let Some(link) = observed.bridge().filter(|link| link.is_bridge && desired.bridge == Part::Absent) else {
            return;
        };
        let foreign: Vec<_> = link.addresses.iter().filter(|net| !desired.retired_addresses.contains(net)).collect();
        if observed.ports().next().is_none() && foreign.is_empty() {
            self.step(Drift::Bridge, format!("{BRIDGE} is left"), Step::DeleteBridge);
        } else {
            // Somebody else's ports or addresses are on it: it stays, without what is ours.
            for old in link.addresses.iter().filter(|net| desired.retired_addresses.contains(net)) {
                self.step(Drift::Bridge, format!("{BRIDGE} still has {old}"), Step::RemoveAddress(*old));
            }
        }
    }

    fn remove_file(&mut self, kind: Drift, path: PathBuf, old: &Option<Vec<u8>>) {
        if let Some(old) = old.clone() {
            self.step(kind, format!("{} is left", path.display()), Step::RemoveFile { path, old });
        }
    }
}

fn differs(path: &std::path::Path, old: &Option<Vec<u8>>) -> String {
    format!("{} {}", path.display(), if old.is_some() { "differs" } else { "is missing" })
}

fn set_difference(set: &ipset::Set, wanted: &std::collections::BTreeSet<Ipv4Net>) -> String {
    let missing = wanted.iter().filter(|entry| !set.entries.contains_key(entry)).count();
    let stale = set.entries.keys().filter(|entry| !wanted.contains(entry)).count();
    let odd = set.oddities.first().map(|line| format!(", and it has `{line}`")).unwrap_or_default();
    format!("the ipset {} lacks {missing} of {} ranges and holds {stale} too many{odd}", ipset::SET, wanted.len())
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
            Self::Firewall(family, transaction) => rule_lines(*family, transaction),
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

fn rule_lines(family: Family, transaction: &Transaction) -> Vec<Line> {
    let tool = family.tool(firewall::Backend::Host, "");
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

fn set_lines(new: Option<&std::collections::BTreeSet<Ipv4Net>>, old: &SetState) -> Vec<Line> {
    let nothing = ipset::Set::default();
    let (had, old) = match old {
        SetState::Present(set) => (true, set),
        _ => (false, &nothing),
    };
    let mut lines = Vec::new();
    if had != new.is_some() {
        lines.push(Line { added: new.is_some(), text: format!("ipset {} hash:net counters", ipset::SET) });
    }
    let is_new = |entry: &Ipv4Net| new.is_some_and(|new| new.contains(entry));
    let entry = |added, entry: &dyn fmt::Display| Line { added, text: format!("ipset {} {entry}", ipset::SET) };
    lines.extend(old.entries.keys().filter(|range| !is_new(range)).map(|range| entry(false, range)));
    lines.extend(old.oddities.iter().map(|oddity| entry(false, oddity)));
    lines.extend(
        new.into_iter().flatten().filter(|range| !old.entries.contains_key(range)).map(|range| entry(true, range)),
    );
    lines
}

/// A file that is made, replaced or removed: what its old and its new text share at both ends is left out.
#[must_use]
pub fn file_lines(path: &std::path::Path, old: Option<&str>, new: Option<&str>) -> Vec<Line> {
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
