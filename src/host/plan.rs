//! From what is to what must be: the steps, in the order in which they may be taken.
//!
//! Pure, and the only place that decides. A dry run prints a plan, `init`, `adopt` and the daemon apply it, `check` and
//! the watch ask whether it is empty, and so does the verification after each apply.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use ipnet::Ipv4Net;

use super::cni;
use super::desired::{Desired, Firewall, Part};
use super::drops::{self, Forwarded};
use super::firewall::{self, Family};
use super::guest_agent;
use super::ipset::{self, SetState};
use super::links;
use super::observe::Observed;
use super::step::Step;
use crate::config::{BRIDGE, NodeConfig, Platform};

/// A kind of difference between the host and what it must be, as the metric `drift_repairs_total` counts it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Drift {
    /// Rules of ours are missing.
    RulesMissing,
    /// A rule of someone else's comes before our drops.
    RulesShadowed,
    /// Rules of ours that hold more than iptables shows of them.
    RulesMasked,
    /// Rules of ours that nobody asked for any more.
    RulesStale,
    /// Rules of ours more than once.
    RulesDuplicated,
    /// A table that holds our rules is off its hooks.
    RulesDormant,
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
    /// A kernel parameter differs that the host is better off with, but can do without.
    OptionalSysctl,
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
            Self::RulesMasked => "rules_masked",
            Self::RulesStale => "rules_stale",
            Self::RulesDuplicated => "rules_duplicated",
            Self::RulesDormant => "rules_dormant",
            Self::Set => "set",
            Self::BridgeToggle => "bridge_toggle",
            Self::Bridge => "bridge",
            Self::PortIsolation => "port_isolation",
            Self::Uplink => "uplink",
            Self::Sysctl => "sysctl",
            Self::OptionalSysctl => "optional_sysctl",
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
                | Self::RulesMasked
                | Self::RulesStale
                | Self::RulesDuplicated
                | Self::RulesDormant
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
        // Ports before the bridge that may have to come up, and the bridge last when everything goes.
        plan.ports(desired, observed);
        plan.bridge(desired, observed);
        plan.uplinks(desired, observed);
        plan.sysctls(desired, observed);
        plan.guest_agent(config, desired, observed);
        plan.conflist(config, desired, observed);
        plan.removals(config, desired, observed);
        plan
    }

    /// Adds what an earlier configuration left in places that this one does not use.
    pub(super) fn retire_files(&mut self, config: &NodeConfig, earlier: &NodeConfig, observed: &Observed) {
        self.remove_file(Drift::Conflist, earlier.conflist_path(), &observed.retired_conflist);
        if earlier.platform == Platform::Gke && config.platform != Platform::Gke {
            self.remove_file(Drift::Cron, guest_agent::cron_path(), &observed.cron);
        }
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
    pub fn kinds(&self) -> BTreeSet<Drift> {
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
                // Entries count on from what the set or a rule in its stead has counted.
                let counted = Forwarded::read(observed);
                let entries = entries.iter().map(|entry| (*entry, counted.entry(*entry))).collect();
                let step = Step::FillSet { entries, old: observed.set.clone() };
                self.step(Drift::Set, text, step);
            }
        }
        for (family, chains, standing) in
            [(Family::V4, &wanted.v4, &observed.v4), (Family::V6, &wanted.v6, &observed.v6)]
        {
            let mut transaction = firewall::diff(chains, standing);
            if !transaction.is_empty() {
                count_on(&mut transaction, observed);
                let tool = family.tool(firewall::Backend::Host, "");
                for Finding { kind, text } in std::mem::take(&mut transaction.findings) {
                    self.findings.push(Finding { kind, text: format!("{tool}: {text}") });
                }
                self.steps.push(Step::Firewall { family, backend: firewall::Backend::Host, transaction });
            }
            for (table, chain) in &standing.unhooked {
                if chains.iter().any(|ours| ours.table == *table && ours.chain == *chain && !ours.is_empty()) {
                    let nft = family.nft();
                    self.obstacles.push(format!(
                        "chain `{chain}` of table `{nft} {table}` is on no hook, so no packet meets its rules; delete \
                         it (`nft delete chain {nft} {table} {chain}`), then try again"
                    ));
                }
            }
            // Once what must stand in it stands.
            let used: BTreeSet<_> = chains.iter().filter(|chain| !chain.is_empty()).map(|chain| &chain.table).collect();
            for table in standing.dormant.iter().filter(|table| used.contains(table)) {
                let text = format!(
                    "table {} {table} is dormant: its rules are listed, and no packet meets them",
                    family.nft()
                );
                self.step(Drift::RulesDormant, text, Step::Hook { family, table: table.clone(), dormant: false });
            }
        }
        if wanted.set.is_none() && matches!(observed.set, SetState::Present(_)) {
            let text = format!("the ipset {} is not wanted", ipset::SET);
            self.step(Drift::Set, text, Step::DestroySet(observed.set.clone()));
        }
    }

    fn bridge(&mut self, desired: &Desired, observed: &Observed) {
        let Part::Present(wanted) = &desired.bridge else { return };
        let ours = links::mac_for(wanted.address.addr());
        let Some(link) = observed.bridge() else {
            let step = Step::CreateBridge { mac: ours, bridge: wanted.clone() };
            return self.step(Drift::Bridge, format!("{BRIDGE} is missing"), step);
        };
        if !link.is_bridge {
            return self.obstacles.push(format!(
                "{BRIDGE} is there but is not a bridge; rename or delete it (`ip link del {BRIDGE}`), then try again"
            ));
        }
        let drops = desired.firewall.as_ref().is_some_and(Firewall::has_drops);
        if let Some(master) = link.master.filter(|_| drops) {
            let name = observed.links.iter().find(|link| link.index == master).map_or("another interface", |l| &l.name);
            return self.obstacles.push(format!(
                "{BRIDGE} belongs to {name}: what VMs send would come in by that and meet no drop; take it out \
                 (`ip link set {BRIDGE} nomaster`), then try again"
            ));
        }
        // The address that we make bridges with was pinned with them. Where somebody has made the bridge again, it gets the
        // one that VMs know.
        let known = observed.bridge_mac_before.filter(|mac| Some(*mac) != link.mac);
        let wanted_mac = known.or(link.mac.filter(|mac| *mac != ours));
        if let (Some(mac), Some(false)) = (wanted_mac, link.mac_pinned) {
            self.step(Drift::Bridge, format!("the address of {BRIDGE} is not pinned"), Step::PinMac(mac));
        }
        // The new one first: with the last address the kernel removes every route through the bridge.
        if !link.addresses.contains(&wanted.address) {
            let text = format!("{BRIDGE} does not have its address {}", wanted.address);
            self.step(Drift::Bridge, text, Step::AddAddress(wanted.address));
        }
        for old in desired.retired_addresses.iter().filter(|old| link.addresses.contains(old)) {
            self.step(Drift::Bridge, format!("{BRIDGE} still has {old}"), Step::RemoveAddress(*old));
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
                let kind = if setting.required { Drift::Sysctl } else { Drift::OptionalSysctl };
                self.findings.push(Finding { kind, text });
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
        if observed.ports().next().is_none() && foreign.is_empty() && !link.has_ipv6 {
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

/// Drop rules count on from those that they replace, from their entries in the set, or from what they had before they
/// were lost.
fn count_on(transaction: &mut firewall::Transaction, observed: &Observed) {
    let counted = Forwarded::read(observed);
    let inserted =
        |change: &&mut firewall::RuleChange| change.action == firewall::Action::Insert && change.chain == "FORWARD";
    for change in transaction.changes.iter_mut().filter(inserted) {
        if let Some(range) = drops::dropped_range(&change.rule) {
            change.counters = counted.target(range);
        }
    }
}

fn differs(path: &Path, old: &Option<Vec<u8>>) -> String {
    format!("{} {}", path.display(), if old.is_some() { "differs" } else { "is missing" })
}

fn set_difference(set: &ipset::Set, wanted: &BTreeSet<Ipv4Net>) -> String {
    let missing = wanted.iter().filter(|entry| !set.entries.contains_key(entry)).count();
    let stale = set.entries.keys().filter(|entry| !wanted.contains(entry)).count();
    let odd = set.oddities.first().map(|line| format!(", and it has `{line}`")).unwrap_or_default();
    format!("the ipset {} lacks {missing} of {} ranges and holds {stale} too many{odd}", ipset::SET, wanted.len())
}

#[cfg(test)]
mod tests {
    use super::super::desired::Rules;
    use super::super::links::Link;
    use super::*;
    use crate::config::Drops;

    fn config(drops: Drops) -> NodeConfig {
        NodeConfig {
            platform: Platform::None,
            node_name: "n1".parse().unwrap(),
            subnet: "172.20.100.0/24".parse().unwrap(),
            gateway: "172.20.100.1".parse().unwrap(),
            primary_nic: "eth0".parse().unwrap(),
            secondary_nics: Vec::new(),
            dns: Vec::new(),
            drops,
            mtu: None,
            cni_conf_dir: "/etc/cni/net.d".into(),
        }
    }

    fn plan(config: &NodeConfig, observed: &Observed) -> Plan {
        Plan::new(config, &Desired::for_node(config, Rules::Manage, observed), observed)
    }

    #[test]
    fn a_bridge_that_belongs_to_a_vrf_is_no_place_for_drops() {
        let vrf = Link { index: 7, name: "vrf-blue".to_owned(), ..Link::default() };
        let bridge = Link { index: 8, name: BRIDGE.to_owned(), is_bridge: true, master: Some(7), ..Link::default() };
        let observed = Observed { links: vec![vrf, bridge], ..Observed::default() };
        let isolated = plan(&config(Drops { internal: true, ..Drops::default() }), &observed);
        assert!(isolated.obstacles[0].contains("vrf-blue"), "{:?}", isolated.obstacles);
        assert!(plan(&config(Drops::default()), &observed).obstacles.is_empty(), "without drops it is their business");
    }

    #[test]
    fn a_chain_on_no_hook_stands_in_the_way_only_of_rules_in_it() {
        let mut observed = Observed::default();
        for chain in ["INPUT", "FORWARD"] {
            observed.v4.unhooked.insert(("filter".to_owned(), chain.to_owned()));
        }
        let obstacles = plan(&config(Drops::default()), &observed).obstacles;
        assert!(obstacles.len() == 1 && obstacles[0].contains("chain `FORWARD`"), "{obstacles:?}");
        let teardown = Plan::new(
            &config(Drops::default()),
            &Desired::nothing(&config(Drops::default()), Rules::Manage),
            &observed,
        );
        assert!(teardown.obstacles.is_empty());
    }
}
