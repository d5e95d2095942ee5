//! Each drop target: whether it is enforced, and how many packets it has dropped.

use std::collections::BTreeMap;

use ipnet::Ipv4Net;
use serde::Serialize;

use super::desired::drop_rule;
use super::firewall::{Counters, Family, Rule};
use super::ipset::{self, SetState};
use super::observe::Observed;
use super::plan::{Drift, Plan};
use super::step::Step;
use crate::config::NodeConfig;

/// A drop target as it stands.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct DropTarget {
    /// The range that VMs may not reach.
    pub cidr: Ipv4Net,
    /// Whether its rule stands where it must, and bridged frames meet it.
    pub enforced: bool,
    /// Packets dropped, as its rule or its entry in the set has counted.
    pub packets: u64,
}

/// Every drop target of the configuration. `plan` is what would have to be done for them to be enforced.
#[must_use]
pub fn read(config: &NodeConfig, observed: &Observed, plan: &Plan) -> Vec<DropTarget> {
    let met = are_met(plan);
    let forwarded = Forwarded::read(observed);
    let targets = config.drop_targets().into_iter();
    let read = |cidr| {
        let between_vms = config.drops.internal && cidr == config.subnet.net();
        let enforced = met && !is_touched(plan, cidr) && !(between_vms && leaks_between_vms(plan));
        let mut counters = forwarded.target(cidr);
        counters += dropped_by_input(cidr, observed);
        DropTarget { cidr, enforced, packets: counters.packets }
    };
    targets.map(read).collect()
}

/// What the kernel's counters of a drop target read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Counted {
    /// The range.
    pub cidr: Ipv4Net,
    /// Packets dropped by FORWARD; `None` while nothing there drops it: what was just lost is put back with its count, and
    /// must not be seen at zero in between.
    pub forward: Option<u64>,
    /// Packets dropped by INPUT, where a rule that is put back starts over.
    pub input: u64,
}

/// What the counters of each drop target read.
#[must_use]
pub fn counted(config: &NodeConfig, observed: &Observed) -> Vec<Counted> {
    let standing = Forwarded::standing(observed);
    let stands = |cidr: Ipv4Net| ipset::entries(&[cidr].into()).iter().any(|entry| standing.0.contains_key(entry));
    let count = |cidr| Counted {
        cidr,
        forward: stands(cidr).then(|| standing.target(cidr).packets),
        input: dropped_by_input(cidr, observed).packets,
    };
    config.drop_targets().into_iter().map(count).collect()
}

/// Whether the node itself is closed to the VMs, where that is asked for.
#[must_use]
pub fn host_is_closed(plan: &Plan) -> bool {
    let touches_input = |step: &Step| match step {
        Step::Firewall { transaction, .. } => transaction.changes.iter().any(|change| change.chain == "INPUT"),
        _ => false,
    };
    are_met(plan) && !plan.steps.iter().any(touches_input)
}

/// Whether packets meet the rules that stand, whatever these say.
fn are_met(plan: &Plan) -> bool {
    let kinds = plan.kinds();
    plan.obstacles.is_empty() && !kinds.contains(&Drift::BridgeToggle) && !kinds.contains(&Drift::RulesDormant)
}

/// Whether the plan has to do anything about the rules or the set that drop this range.
fn is_touched(plan: &Plan, cidr: Ipv4Net) -> bool {
    let rule = drop_rule(cidr);
    let asked_for = cidr.addr().to_string();
    let drops_it = |other: &Rule| {
        *other == rule || other.uses_set(ipset::SET) || other.argument("--ctorigdst") == Some(asked_for.as_str())
    };
    plan.steps.iter().any(|step| match step {
        Step::FillSet { .. } => true,
        Step::Firewall { family: Family::V4, transaction, .. } => {
            transaction.changes.iter().any(|change| drops_it(&change.rule))
        }
        _ => false,
    })
}

/// Whether anything beside the rule of the subnet is missing that keeps VMs from each other.
fn leaks_between_vms(plan: &Plan) -> bool {
    let v6 = plan.steps.iter().any(|step| matches!(step, Step::Firewall { family: Family::V6, .. }));
    v6 || plan.kinds().contains(&Drift::PortIsolation)
}

fn in_set(observed: &Observed) -> bool {
    observed
        .v4
        .chain("filter", "FORWARD")
        .iter()
        .any(|saved| saved.rule.is_our_drop() && saved.rule.uses_set(ipset::SET))
}

/// What FORWARD has dropped so far of each range, by a rule of its own or by an entry of the set.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Forwarded(BTreeMap<Ipv4Net, Counters>);

impl Forwarded {
    /// What the rules and the set that stand have counted; where neither is left, what they had before.
    #[must_use]
    pub fn read(observed: &Observed) -> Self {
        let mut this = Self::standing(observed);
        for (range, counters) in &observed.dropped_before.0 {
            this.0.entry(*range).or_insert(*counters);
        }
        this
    }

    /// What the rules and the set that stand have counted.
    #[must_use]
    pub fn standing(observed: &Observed) -> Self {
        let mut this = Self::default();
        let chain = observed.v4.chain("filter", "FORWARD");
        for (range, counters) in chain.iter().filter_map(|saved| Some((dropped_range(&saved.rule)?, saved.counters))) {
            this.add(range, counters);
        }
        if let (true, SetState::Present(set)) = (in_set(observed), &observed.set) {
            for (entry, counters) in &set.entries {
                this.add(*entry, *counters);
            }
        }
        this
    }

    /// Takes over what a later look has read.
    pub fn update(&mut self, later: Self) {
        self.0.extend(later.0);
    }

    fn add(&mut self, range: Ipv4Net, counters: Counters) {
        for entry in ipset::entries(&[range].into()).into_iter().take(1) {
            *self.0.entry(entry).or_default() += counters;
        }
    }

    /// What an entry of the set counts on from.
    #[must_use]
    pub fn entry(&self, entry: Ipv4Net) -> Counters {
        self.0.get(&entry).copied().unwrap_or_default()
    }

    /// What the rule of a drop target counts on from.
    #[must_use]
    pub fn target(&self, cidr: Ipv4Net) -> Counters {
        let mut sum = Counters::default();
        for entry in ipset::entries(&[cidr].into()) {
            sum += self.entry(entry);
        }
        sum
    }
}

/// The range that a plain drop rule of ours is about.
#[must_use]
pub fn dropped_range(rule: &Rule) -> Option<Ipv4Net> {
    let range = match rule.argument("-d") {
        Some(range) => range.parse().ok()?,
        None => Ipv4Net::default(),
    };
    (rule.is_our_drop() && drop_rule(range) == *rule).then_some(range)
}

/// What INPUT has dropped: on its way to a metadata server on the node itself, or by way of a redirection to one.
fn dropped_by_input(cidr: Ipv4Net, observed: &Observed) -> Counters {
    let asked_for = cidr.addr().to_string();
    let mut sum = Counters::default();
    for saved in observed.v4.chain("filter", "INPUT") {
        let rule = &saved.rule;
        let redirected = rule.is_our_drop() && rule.argument("--ctorigdst") == Some(&asked_for);
        if redirected || dropped_range(rule) == Some(cidr) {
            sum += saved.counters;
        }
    }
    sum
}
