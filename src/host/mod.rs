//! The host configuration: desired, observed, plan, apply, verify.
//!
//! [`Host::converge`] is the one way in which a host is made to be as it must be: `init`, `adopt` and the daemon come
//! through it, and it ends only when a fresh look finds nothing left to do.

mod apply;
pub mod backstop;
pub mod cni;
pub mod desired;
pub mod drops;
pub mod firewall;
pub mod guest_agent;
pub mod ipset;
pub mod links;
pub mod observe;
pub mod plan;
pub mod probe;
mod revert;
pub mod step;
pub mod sysctl;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use desired::{Desired, Rules};
use drops::{Counted, Forwarded};
use firewall::{Backend, Family, FirewallError};
use observe::{Observed, Scope};
use plan::{Finding, Plan};
use step::Step;

use crate::command;
use crate::config::{BRIDGE, NodeConfig};
use crate::files::FileError;
use crate::log::chain;

/// How often the host is looked at again when it does not become as planned.
const ATTEMPTS: usize = 4;

/// Why the host is not as it must be.
#[derive(Debug, thiserror::Error)]
pub enum HostError {
    /// iptables.
    #[error(transparent)]
    Firewall(#[from] firewall::FirewallError),
    /// ipset.
    #[error(transparent)]
    Set(#[from] ipset::SetError),
    /// Netlink.
    #[error(transparent)]
    Link(#[from] links::LinkError),
    /// Kernel parameters.
    #[error(transparent)]
    Sysctl(#[from] sysctl::SysctlError),
    /// Files.
    #[error(transparent)]
    File(#[from] FileError),
    /// An interface went away, or never was there.
    #[error("there is no interface {0}")]
    NoSuchInterface(String),
    /// Something stands in the way; nothing was done.
    #[error("{0}")]
    Obstacle(String),
    /// Everything was done, and the host still differs: someone else is changing it at the same time.
    #[error(
        "the host is not as it must be although everything was applied: {0}; find out what else changes it, then try again"
    )]
    NotConverged(String),
}

/// The hands on the host, and what was learnt about it.
#[derive(Debug)]
pub struct Host {
    /// Netlink.
    pub links: links::Links,
    /// Whether it was opened for changing things.
    changing: bool,
    /// Why iptables would not take a rule over a set, once it would not.
    set_refused: Mutex<Option<String>>,
    /// Whether somebody keeps changing the rules.
    besieged: AtomicBool,
    /// Kernel parameters that are not required and would not be set: said once, and not tried again.
    given_up: Mutex<BTreeSet<String>>,
    /// What was dropped up to the last look that found the host as wanted.
    dropped: Mutex<Forwarded>,
    /// The Ethernet address of the bridge at that look.
    bridge_mac: Mutex<Option<links::Mac>>,
    /// The isolation keys of the CNI configuration when it was last read.
    isolation: Mutex<cni::Isolation>,
}

/// What the host is to be made.
#[derive(Debug, Clone, Copy)]
pub struct Target<'a> {
    /// The configuration.
    pub config: &'a NodeConfig,
    /// Whether rules are ours to write.
    pub rules: Rules,
    /// The configuration before this one: what of it is on the bridge must go.
    pub earlier: Option<&'a NodeConfig>,
    /// Whether the bridge is to be up. A quarantined one stays down until isolation is verified.
    pub bridge_up: bool,
}

impl<'a> Target<'a> {
    /// A host of this configuration, with nothing before it and the bridge up.
    #[must_use]
    pub fn new(config: &'a NodeConfig, rules: Rules) -> Self {
        Self { config, rules, earlier: None, bridge_up: true }
    }

    /// The same, coming from an earlier configuration.
    #[must_use]
    pub fn replacing(self, earlier: Option<&'a NodeConfig>) -> Self {
        Self { earlier, ..self }
    }

    fn desired(&self, observed: &Observed) -> Desired {
        let desired = Desired::for_node(self.config, self.rules, observed).replacing(self.earlier);
        if self.bridge_up { desired } else { desired.with_bridge_down() }
    }
}

/// Bridge-netfilter toggles as they were before [`Host::guard`].
#[derive(Debug)]
pub struct Toggles(BTreeMap<String, String>);

impl Toggles {
    /// Sets them back.
    pub async fn restore(&self) {
        let changed = self.0.iter().filter(|(key, value)| sysctl::read(key).as_ref() != Some(*value));
        let settings: Vec<_> = changed
            .map(|(key, value)| sysctl::Setting { key: key.clone(), value: value.clone(), required: false })
            .collect();
        if !settings.is_empty() {
            // What cannot be set back has been warned about.
            let _ = sysctl::write(&settings).await;
        }
    }
}

/// What converging came to.
#[derive(Debug, Clone)]
pub struct Outcome {
    /// What was found at the first look; empty when nothing had to be done.
    pub found: Plan,
    /// The host as it is now.
    pub after: Observed,
}

impl Host {
    /// Opens the host for changing it. Must be called within a tokio runtime.
    ///
    /// # Errors
    /// [`HostError::Link`] when there is no netlink socket to be had.
    pub fn open() -> Result<Self, HostError> {
        Ok(Self::with(links::Links::open(true)?, true))
    }

    /// Opens the host for looking only.
    ///
    /// # Errors
    /// As for [`Host::open`].
    pub fn open_to_look() -> Result<Self, HostError> {
        Ok(Self::with(links::Links::open(false)?, false))
    }

    /// The same, as one that changes things would find it: what that would try first is part of its plan.
    #[must_use]
    pub fn as_if_changing(self) -> Self {
        Self { changing: true, ..self }
    }

    fn with(links: links::Links, changing: bool) -> Self {
        Self {
            links,
            changing,
            set_refused: Mutex::default(),
            besieged: AtomicBool::default(),
            given_up: Mutex::default(),
            dropped: Mutex::default(),
            bridge_mac: Mutex::default(),
            isolation: Mutex::default(),
        }
    }

    /// Says whether somebody keeps changing the rules, so that reading them may never end.
    pub fn set_besieged(&self, besieged: bool) {
        self.besieged.store(besieged, Ordering::Relaxed);
    }

    /// Whether somebody keeps changing the rules.
    #[must_use]
    pub fn is_besieged(&self) -> bool {
        self.besieged.load(Ordering::Relaxed)
    }

    async fn read_rules(&self, family: Family) -> Result<firewall::Ruleset, FirewallError> {
        if self.is_besieged() {
            firewall::read_in_siege(family, Backend::Host).await
        } else {
            firewall::read(family, Backend::Host).await
        }
    }

    /// Compares the host with what the configuration wants.
    ///
    /// # Errors
    /// [`HostError`] when the host cannot be read.
    pub async fn plan(&self, target: Target<'_>) -> Result<(Plan, Observed), HostError> {
        let observed = Observed::read(self, target, Scope::Node).await?;
        let mut desired = target.desired(&observed);
        if let Ok(given_up) = self.given_up.lock() {
            desired.sysctls.retain(|setting| setting.required || !given_up.contains(&setting.key));
        }
        let mut plan = Plan::new(target.config, &desired, &observed);
        if let Some(earlier) = target.earlier {
            plan.retire_files(target.config, earlier, &observed);
        }
        Ok((plan, observed))
    }

    /// Looks at the host, for [`Host::revert`].
    ///
    /// # Errors
    /// [`HostError`] when the host cannot be read.
    pub async fn observe(&self, target: Target<'_>) -> Result<Observed, HostError> {
        Observed::read(self, target, Scope::Node).await
    }

    /// How many packets each drop target has dropped.
    ///
    /// # Errors
    /// [`HostError`] when the rules cannot be read.
    pub async fn count_drops(&self, config: &NodeConfig) -> Result<Vec<Counted>, HostError> {
        let (v4, set) = tokio::join!(self.read_rules(Family::V4), ipset::read(desired::needs_set(config)));
        let observed = Observed { v4: v4?, set: set?, ..Observed::default() };
        // A rule that is lost now is put back with what was told of it.
        if let Ok(mut dropped) = self.dropped.lock() {
            dropped.update(Forwarded::standing(&observed));
        }
        Ok(drops::counted(config, &observed))
    }

    /// Makes sure that bridged frames pass through iptables, where the configuration depends on it. Nothing else of
    /// the host is changed. Returns the toggles as they were.
    ///
    /// # Errors
    /// [`HostError::Sysctl`] when that cannot be verified; the toggles are then as they were.
    pub async fn guard(&self, config: &NodeConfig, rules: Rules) -> Result<Toggles, HostError> {
        let keys = Desired::for_node(config, rules, &Observed::default()).guard;
        let before = Toggles(sysctl::read_all(keys.iter().copied()));
        match sysctl::guard(&keys).await {
            Ok(()) => Ok(before),
            Err(error) => {
                before.restore().await;
                Err(error.into())
            }
        }
    }

    /// Makes the host be as wanted, and looks again until there is nothing left to do. When the rules
    /// moved underneath and a transaction was refused, it plans again.
    ///
    /// # Errors
    /// [`HostError`]; [`HostError::NotConverged`] when the host keeps differing.
    pub async fn converge(&self, target: Target<'_>) -> Result<Outcome, HostError> {
        let mut first: Option<Plan> = None;
        let mut refused = None;
        // In a siege each further attempt is as likely to be undone, and reading may be dear.
        let attempts = if self.is_besieged() { 1 } else { ATTEMPTS };
        for _ in 0..attempts {
            let (plan, observed) = self.plan(target).await?;
            let found = first.get_or_insert_with(|| plan.clone());
            if plan.is_empty() {
                return Ok(self.converged(std::mem::take(found), observed).await);
            }
            refused = match self.apply(&plan).await {
                Ok(()) => None,
                Err(HostError::Firewall(error)) if error.is_refusal() => {
                    self.learn_about_sets(&plan, &error);
                    Some(error)
                }
                // Plain rules do what the set would have done.
                Err(HostError::Set(error)) if error.refuses_to_fill() && self.set_refused().is_none() => {
                    tracing::warn!(error = %chain(&error), "no ipset can be had: each drop target gets a rule of its own");
                    self.refuse_sets(chain(&error));
                    None
                }
                Err(error) => return Err(error),
            };
        }
        let (plan, after) = self.plan(target).await?;
        match (first, refused) {
            (Some(found), _) if plan.is_empty() => Ok(self.converged(found, after).await),
            (_, Some(error)) => Err(error.into()),
            (_, None) => Err(HostError::NotConverged(summary(&plan.findings))),
        }
    }

    /// Sees to what keeps VMs apart beside the rules, and says what was found. For when the rules can be neither read nor
    /// written: each of the two layers holds by itself. Nothing is opened that may have been closed on purpose.
    ///
    /// # Errors
    /// [`HostError`] when the host cannot be read, or the first of the steps that failed.
    pub async fn do_without_rules(&self, config: &NodeConfig) -> Result<Plan, HostError> {
        let observed = Observed::read(self, Target::new(config, Rules::Leave), Scope::Node).await?;
        let plan = Plan::new(config, &Desired::beside_rules(config, &observed), &observed);
        match self.apply_all(&plan).await {
            Ok(()) => Ok(plan),
            Err(failures) => failures.into_iter().next().map_or(Ok(plan), Err),
        }
    }

    async fn converged(&self, found: Plan, after: Observed) -> Outcome {
        // A set that no rule was to be had over is of no use.
        if self.set_refused().is_some() && matches!(ipset::digest(ipset::SET), Ok(Some(_))) {
            let _ = ipset::destroy().await;
        }
        if let Ok(mut dropped) = self.dropped.lock() {
            *dropped = Forwarded::standing(&after);
        }
        if let (Ok(mut known), Some(mac)) = (self.bridge_mac.lock(), after.bridge().and_then(|bridge| bridge.mac)) {
            *known = Some(mac);
        }
        Outcome { found, after }
    }

    /// What [`Host::clear`] would do.
    ///
    /// # Errors
    /// [`HostError`] when the host cannot be read.
    pub async fn plan_to_clear(&self, config: &NodeConfig) -> Result<Plan, HostError> {
        let mut plan = Plan::default();
        for family in [Family::V4, Family::V6] {
            let (backend, transaction) = stranded_rules(family).await?;
            plan.steps.extend((!transaction.is_empty()).then_some(Step::Firewall { family, backend, transaction }));
        }
        let here = self.plan_to_clear_part(config, Rules::Manage).await?;
        plan.steps.extend(here.steps);
        if matches!(ipset::digest(ipset::NEXT), Ok(Some(_))) {
            plan.steps.push(Step::DestroyLeftoverSet);
        }
        if backstop::Backstop::open(BRIDGE)?.stands().await? {
            plan.steps.push(Step::LowerBackstop);
        }
        Ok(plan)
    }

    /// Removes everything of ours that is left of a node. A part that fails does not stop the others.
    ///
    /// # Errors
    /// All that failed.
    pub async fn clear(&self, config: &NodeConfig) -> Result<(), Vec<HostError>> {
        let mut failures: Vec<HostError> = Vec::new();
        // The other backend first: a rule there may hold the set.
        for family in [Family::V4, Family::V6] {
            failures.extend(clear_other_backend(family).await.err().map(HostError::from));
        }
        match self.plan_to_clear_part(config, Rules::Manage).await {
            Ok(plan) => failures.extend(self.apply_all(&plan).await.err().unwrap_or_default()),
            Err(error) => {
                failures.push(error);
                failures.extend(self.clear_what_can_be_read(config).await);
            }
        }
        let leftovers = Plan { steps: vec![Step::DestroyLeftoverSet, Step::LowerBackstop], ..Plan::default() };
        failures.extend(self.apply_all(&leftovers).await.err().unwrap_or_default());
        if command::find("nft").is_some() {
            for family in [Family::V4, Family::V6] {
                failures.extend(firewall::remove_blank_nft_tables(family).await.err().map(HostError::from));
            }
        }
        if failures.is_empty() { Ok(()) } else { Err(failures) }
    }

    /// Each family's rules by themselves, and all that is not rules.
    async fn clear_what_can_be_read(&self, config: &NodeConfig) -> Vec<HostError> {
        let mut failures = Vec::new();
        for family in [Family::V4, Family::V6] {
            // One that cannot be read has been reported already.
            if let Ok(standing) = firewall::read(family, Backend::Host).await {
                let cleared = firewall::write(family, Backend::Host, &firewall::diff(&[], &standing)).await;
                failures.extend(cleared.err().map(HostError::from));
            }
        }
        match self.plan_to_clear_part(config, Rules::Leave).await {
            Ok(plan) => failures.extend(self.apply_all(&plan).await.err().unwrap_or_default()),
            Err(error) => failures.push(error),
        }
        failures
    }

    async fn plan_to_clear_part(&self, config: &NodeConfig, rules: Rules) -> Result<Plan, HostError> {
        let observed = Observed::read(self, Target::new(config, rules), Scope::Everything).await?;
        Ok(Plan::new(config, &Desired::nothing(config, rules), &observed))
    }

    /// Why sets cannot be had, when iptables refused a rule over one.
    fn set_refused(&self) -> Option<String> {
        self.set_refused.lock().ok().and_then(|refused| refused.clone())
    }

    /// The same as far as it shows on the host: whoever only looks has tried nothing, and finds plain rules that stand in
    /// for a set. Whoever changes the host tries again.
    fn set_was_refused(&self, config: &NodeConfig, v4: &firewall::Ruleset) -> Option<String> {
        let stand_in = || {
            let forward = v4.chain("filter", "FORWARD");
            config.drop_targets().into_iter().all(|target| {
                let rule = desired::drop_rule(target);
                forward.iter().any(|saved| saved.rule == rule)
            })
        };
        let shows = !self.changing && desired::needs_set(config) && stand_in();
        shows.then(|| "whoever made the rules could not have one".to_owned())
    }

    /// The isolation keys that a CNI configuration had which is gone or no longer readable: it does not lose them.
    fn lost_isolation(&self, conflist: Option<&[u8]>) -> cni::Isolation {
        let Ok(mut last) = self.isolation.lock() else { return cni::Isolation::default() };
        match conflist.and_then(cni::Isolation::of) {
            Some(keys) => {
                *last = keys;
                cni::Isolation::default()
            }
            None => *last,
        }
    }

    fn bridge_mac_before(&self) -> Option<links::Mac> {
        self.bridge_mac.lock().ok().and_then(|known| *known)
    }

    fn dropped_before(&self) -> Forwarded {
        self.dropped.lock().map(|dropped| dropped.clone()).unwrap_or_default()
    }

    fn learn_about_sets(&self, plan: &Plan, error: &firewall::FirewallError) {
        let uses_set = plan
            .steps
            .iter()
            .any(|step| matches!(step, Step::Firewall { transaction, .. } if transaction.adds_use_of_set(ipset::SET)));
        let reason = chain(error);
        let about_sets = ["`set'", "xt_set", "ipset"].iter().any(|word| reason.contains(word));
        if uses_set && about_sets {
            self.refuse_sets(reason);
        }
    }

    fn refuse_sets(&self, reason: String) {
        if let Ok(mut refused) = self.set_refused.lock() {
            *refused = Some(reason);
        }
    }
}

/// Removes rules of ours that stand in the backend which plain `iptables` cannot see, and enforces them all the same.
/// Returns how many there were.
///
/// # Errors
/// [`FirewallError`] when they cannot be read or removed.
pub async fn clear_other_backend(family: Family) -> Result<usize, FirewallError> {
    let (backend, stranded) = stranded_rules(family).await?;
    firewall::write(family, backend, &stranded).await?;
    Ok(stranded.changes.len())
}

/// The other backend, and what would clear it of our rules.
async fn stranded_rules(family: Family) -> Result<(Backend, firewall::Transaction), FirewallError> {
    match firewall::other_backend().await? {
        Some(backend) => Ok((backend, firewall::diff(&[], &firewall::read_other(family, backend).await?))),
        None => Ok((Backend::Host, firewall::Transaction::default())),
    }
}

/// What was found, in one line.
#[must_use]
pub fn summary(findings: &[Finding]) -> String {
    findings.iter().map(|finding| finding.text.as_str()).collect::<Vec<_>>().join("; ")
}
