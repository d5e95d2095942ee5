//! Taking back what a command did to the host before it failed.

use ipnet::Ipv4Net;

use super::desired::{Desired, Firewall, Part, Rules};
use super::firewall::{ChainRules, Family, Ruleset};
use super::ipset::SetState;
use super::observe::{Observed, Scope};
use super::plan::Plan;
use super::step::Step;
use super::sysctl::Setting;
use super::{Host, HostError, Target, guest_agent};
use super::{cni, links::Link};
use crate::config::BRIDGE;

impl Host {
    /// Makes everything of ours be as it was when `before` was observed. A part that fails does not stop the others.
    ///
    /// # Errors
    /// All that failed.
    pub async fn revert(&self, target: Target<'_>, before: &Observed) -> Result<(), Vec<HostError>> {
        let (target, mut failures) = match Observed::read(self, target, Scope::Node).await {
            Ok(now) => return self.apply_all(&plan(target, before, &now)).await,
            // Rules that cannot be read any more are no reason to leave the rest.
            Err(error) => (Target { rules: Rules::Leave, ..target }, vec![error]),
        };
        match Observed::read(self, target, Scope::Node).await {
            Ok(now) => failures.extend(self.apply_all(&plan(target, before, &now)).await.err().unwrap_or_default()),
            Err(error) => failures.push(error),
        }
        Err(failures)
    }
}

fn plan(target: Target<'_>, before: &Observed, now: &Observed) -> Plan {
    let Target { config, rules, earlier, .. } = target;
    let desired = Desired {
        firewall: (rules == Rules::Manage).then(|| firewall(before)),
        bridge: if before.bridge().is_none() { Part::Absent } else { Part::Untouched },
        retired_addresses: Ipv4Net::new(config.gateway, config.subnet.prefix_len()).into_iter().collect(),
        conflist: if before.conflist.is_none() { Part::Absent } else { Part::Untouched },
        cron: if before.cron.is_none() { Part::Absent } else { Part::Untouched },
        ..Desired::default()
    };
    let mut plan = Plan::new(config, &desired, now);
    // What was put on its hooks for our rules; a rule of ours that stood in it stood there asleep.
    plan.steps.retain(|step| !matches!(step, Step::Hook { .. }));
    for (family, old, new) in [(Family::V4, &before.v4, &now.v4), (Family::V6, &before.v6, &now.v6)] {
        let woken = old.dormant.difference(&new.dormant).cloned();
        plan.steps.extend(woken.map(|table| Step::Hook { family, table, dormant: true }));
    }
    if let (Some(old), Some(new)) = (before.bridge(), now.bridge()) {
        plan.steps.extend(bridge_steps(old, new));
    }
    for port in now.ports() {
        if let Some(old) = before.link(&port.name).filter(|old| old.isolated != port.isolated) {
            plan.steps.push(Step::IsolatePort { port: port.name.clone(), isolated: old.isolated });
        }
    }
    let changed: Vec<_> = before
        .sysctls
        .iter()
        .filter(|(key, old)| now.sysctls.get(*key).is_some_and(|value| value != *old))
        .map(|(key, old)| (Setting { key: key.clone(), value: old.clone(), required: true }, None))
        .collect();
    if !changed.is_empty() {
        plan.steps.push(Step::Sysctl(changed));
    }
    let retired = earlier.unwrap_or(config).conflist_path();
    for (path, old, new, mode) in [
        (config.conflist_path(), &before.conflist, &now.conflist, cni::MODE),
        (retired, &before.retired_conflist, &now.retired_conflist, cni::MODE),
        (guest_agent::cron_path(), &before.cron, &now.cron, guest_agent::CRON_MODE),
    ] {
        if let Some(bytes) = old.as_ref().filter(|_| old != new) {
            let text = String::from_utf8_lossy(bytes).into_owned();
            plan.steps.push(Step::WriteFile { path, old: new.clone(), new: text, mode });
        }
    }
    plan
}

/// The rules of ours that stood, as wanted ones.
fn firewall(before: &Observed) -> Firewall {
    let set = match &before.set {
        SetState::Present(set) => Some(set.entries.keys().copied().collect()),
        SetState::Absent | SetState::Unavailable(_) => None,
    };
    Firewall { v4: chains(&before.v4), v6: chains(&before.v6), set }
}

fn chains(ruleset: &Ruleset) -> Vec<ChainRules> {
    let mut chains: Vec<ChainRules> = Vec::new();
    for (table, chain, saved) in ruleset.ours() {
        let at = chains.iter().position(|known| known.table == table && known.chain == chain).unwrap_or_else(|| {
            let (table, chain) = (table.to_owned(), chain.to_owned());
            chains.push(ChainRules { table, chain, head: Vec::new(), tail: Vec::new() });
            chains.len() - 1
        });
        let rules = if saved.rule.is_our_drop() { &mut chains[at].head } else { &mut chains[at].tail };
        if !rules.contains(&saved.rule) {
            rules.push(saved.rule.clone());
        }
    }
    chains
}

fn bridge_steps(old: &Link, new: &Link) -> Vec<Step> {
    let added = new.addresses.iter().filter(|address| !old.addresses.contains(address));
    let removed = old.addresses.iter().filter(|address| !new.addresses.contains(address));
    let mut steps: Vec<Step> = removed.copied().map(Step::AddAddress).collect();
    steps.extend(added.copied().map(Step::RemoveAddress));
    if old.mtu != new.mtu {
        steps.push(Step::SetMtu { from: new.mtu, to: old.mtu });
    }
    if new.up && !old.up {
        steps.push(Step::SetDown(BRIDGE.to_owned()));
    }
    steps
}
