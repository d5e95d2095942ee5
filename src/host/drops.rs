//! Each drop target: whether it is enforced, and how many packets it has dropped.

use ipnet::Ipv4Net;
use serde::Serialize;

use super::desired::drop_rule;
use super::firewall::{Counters, Rule};
use super::ipset::{self, SetState};
use super::observe::Observed;
use super::plan::Plan;
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

/// Every drop target of the configuration.
#[must_use]
pub fn read(config: &NodeConfig, observed: &Observed, plan: &Plan) -> Vec<DropTarget> {
    let bridged = !plan.steps.iter().any(|step| matches!(step, Step::Guard(_)));
    config
        .drop_targets()
        .into_iter()
        .map(|cidr| {
            let enforced = bridged && !touched(plan, cidr, observed);
            DropTarget { cidr, enforced, packets: counted(cidr, observed) }
        })
        .collect()
}

/// Whether the plan has to do anything about what drops this range.
fn touched(plan: &Plan, cidr: Ipv4Net, observed: &Observed) -> bool {
    let rule = Rule::parse(&drop_rule(cidr)).ok();
    let by_set = in_set(observed);
    plan.steps.iter().any(|step| match step {
        Step::FillSet { .. } => by_set,
        Step::Firewall(_, transaction) => {
            let concerned = |change: &Rule| Some(change) == rule.as_ref() || (by_set && change.uses_set(ipset::SET));
            transaction.changes.iter().any(|change| concerned(&change.rule))
        }
        _ => false,
    })
}

fn in_set(observed: &Observed) -> bool {
    observed
        .v4
        .chain("filter", "FORWARD")
        .iter()
        .any(|saved| saved.rule.is_our_drop() && saved.rule.uses_set(ipset::SET))
}

fn counted(cidr: Ipv4Net, observed: &Observed) -> u64 {
    let mut counters = Counters::default();
    if let Ok(rule) = Rule::parse(&drop_rule(cidr)) {
        for saved in observed.v4.chain("filter", "FORWARD").iter().filter(|saved| saved.rule == rule) {
            counters += saved.counters;
        }
    }
    // What was dropped on its way to a metadata server on the node itself.
    let asked_for = cidr.addr().to_string();
    for saved in observed.v4.chain("filter", "INPUT") {
        if saved.rule.is_our_drop() && saved.rule.argument("--ctorigdst") == Some(&asked_for) {
            counters += saved.counters;
        }
    }
    if let (true, SetState::Present(set)) = (in_set(observed), &observed.set) {
        for entry in ipset::entries(&[cidr].into()) {
            counters += set.entries.get(&entry).copied().unwrap_or_default();
        }
    }
    counters.packets
}
