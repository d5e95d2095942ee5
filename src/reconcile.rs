//! One pass of the daemon over its node: `pool.json` read again, the host made right, and what follows from whether
//! that worked.
//!
//! The host itself is made right by [`Host::converge`], as by `init` and `adopt`. Here is what only a daemon has: it
//! says whether isolation is verified (health, metrics, systemd, the gate of new leases), counts and logs each repair,
//! and takes the bridge down when told to quarantine.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::watch::Sender;
use tokio::task::AbortHandle;
use tokio::time::{sleep, timeout};

use crate::config::{BRIDGE, NodeConfig};
use crate::files::{FileError, HOST_LOCK, LOCK_WAIT, LockFile};
use crate::host::backstop::Backstop;
use crate::host::desired::Rules;
use crate::host::drops::{self, Counted};
use crate::host::firewall::{Backend, Family, FirewallError};
use crate::host::plan::{Drift, Plan};
use crate::host::step::Step;
use crate::host::{self, Host, HostError, Outcome, Target, summary};
use crate::log::{LogLimit, chain};
use crate::metrics::{Health, Metrics};
use crate::pool::{Pool, PoolError};
use crate::systemd;
use crate::watch::{self, Reason, Wake};

/// How long isolation may be wanted and not verified before a quarantine.
const QUARANTINE_AFTER: Duration = Duration::from_secs(10);

/// How long a pass may take. Each tool has a deadline of its own; this is for whatever else may never answer.
const PASS_LIMIT: Duration = Duration::from_secs(180);

/// How long a pass may take before isolation counts as unverified. One that waits for a lock is done by then.
const VERDICT_LIMIT: Duration = Duration::from_secs(5);

/// Time between two counts of the drops for those who scrape the metrics, at least, and as a multiple of what one takes.
const COUNT_PAUSE: Duration = Duration::from_secs(1);
const COUNT_SHARE: u32 = 50;

/// Why a pass did not leave the node verified.
#[derive(Debug, thiserror::Error)]
pub enum PassError {
    /// `pool.json` cannot be read: what it asks for is not known, so what it asked for last is kept.
    #[error("pool.json cannot be followed, so what it asked for last is kept")]
    Pool(#[from] PoolError),
    /// Somebody else is configuring the host.
    #[error("cannot take the host lock")]
    Lock(#[from] FileError),
    /// The host is not as it must be.
    #[error("the host cannot be made as pool.json asks")]
    Host(#[from] HostError),
    /// Something never answered.
    #[error("looking after the host took more than {} s and was given up", .0.as_secs())]
    Overdue(Duration),
}

impl PassError {
    /// What the pass came to, for the watch.
    #[must_use]
    pub fn outcome(&self) -> watch::Outcome {
        match self {
            Self::Host(HostError::NotConverged(_)) => watch::Outcome::Undone,
            _ => watch::Outcome::Failed,
        }
    }
}

/// How a daemon is to go about it.
#[derive(Debug, Clone)]
pub struct Options {
    /// Where `pool.json` is.
    pub state_dir: PathBuf,
    /// Whether rules are ours to write.
    pub rules: Rules,
    /// Whether the bridge is taken down when isolation cannot be verified.
    pub quarantine: bool,
}

/// Who is told what the passes come to.
#[derive(Debug, Clone)]
pub struct Listeners {
    /// Counters and gauges.
    pub metrics: Arc<Metrics>,
    /// `/healthz`.
    pub health: Sender<Health>,
    /// Whether new leases may be granted.
    pub grants: Sender<bool>,
}

impl Listeners {
    /// Isolation is as `pool.json` asks; `wishes` says what that is.
    fn holds(&self, wishes: &str) {
        self.publish(true, Health::Healthy, &format!("isolation as pool.json asks: {wishes}"));
    }

    /// Isolation is not verified.
    fn fails(&self, why: &str) {
        self.publish(false, Health::Unhealthy(why.to_owned()), &format!("isolation NOT verified: {why}"));
    }

    fn publish(&self, holds: bool, health: Health, status: &str) {
        self.metrics.set_isolation_enforced(holds);
        self.grants.send_if_modified(|granted| std::mem::replace(granted, holds) != holds);
        let changed = self.health.send_if_modified(|now| {
            let changed = *now != health;
            *now = health;
            changed
        });
        if changed {
            systemd::notify(&[sd_notify::NotifyState::Status(status)]);
        }
    }
}

/// The daemon's view of its node.
#[derive(Debug)]
pub struct Reconciler {
    host: Host,
    backstop: Backstop,
    options: Options,
    listeners: Listeners,
    pool: Pool,
    earlier: Option<NodeConfig>,
    mtu: Option<u16>,
    backend: Backend,
    started: bool,
    unverified_since: Option<Instant>,
    quarantined: bool,
    /// Whether it was said that drops are asked for and no rules are written.
    skipped: bool,
    /// Whether `pool.json` asks for something else than in the pass before: what is done then is no repair.
    changed: bool,
    repairs: LogLimit,
    troubles: LogLimit,
    /// Whether the bridge had to be mended in the last pass.
    bridge_mended: bool,
    /// When the drops may be counted again for a scrape.
    next_count: Instant,
    /// Whether the backend that is not the host's has been looked at.
    looked_elsewhere: bool,
    /// Indices of the interfaces that were isolated ports once.
    isolated_ports: HashSet<u32>,
}

impl Reconciler {
    /// A daemon that has not looked at its node yet: isolation is not verified.
    #[must_use]
    pub fn new(host: Host, backstop: Backstop, pool: Pool, options: Options, listeners: Listeners) -> Self {
        Self {
            host,
            backstop,
            options,
            listeners,
            pool,
            earlier: None,
            mtu: None,
            backend: Backend::Host,
            started: false,
            unverified_since: None,
            quarantined: false,
            skipped: false,
            changed: false,
            repairs: LogLimit::default(),
            troubles: LogLimit::default(),
            bridge_mended: false,
            next_count: Instant::now(),
            looked_elsewhere: false,
            isolated_ports: HashSet::new(),
        }
    }

    /// The state as last read.
    #[must_use]
    pub fn pool(&self) -> &Pool {
        &self.pool
    }

    /// MTU of the bridge in bytes, as last seen.
    #[must_use]
    pub fn mtu(&self) -> Option<u16> {
        self.mtu
    }

    /// Whether the last pass had to mend the bridge: routes through it may have gone with its address.
    #[must_use]
    pub fn bridge_mended(&self) -> bool {
        self.bridge_mended
    }

    /// Which backend holds the rules; known once a pass has succeeded.
    #[must_use]
    pub fn backend(&self) -> Backend {
        self.backend
    }

    /// One pass. `wake` says why, and is none for the first pass, whose work is no repair.
    ///
    /// # Errors
    /// [`PassError`], already counted and logged.
    pub async fn pass(&mut self, wake: Option<&Wake>) -> Result<watch::Outcome, PassError> {
        let begin = Instant::now();
        let besieged = wake.is_some_and(|wake| wake.besieged);
        self.host.set_besieged(besieged);
        self.bridge_mended = false;
        let alarm = self.alarm_when_late();
        // A quarantine comes when it is due, whatever hangs.
        let limit = if self.options.quarantine { QUARANTINE_AFTER } else { PASS_LIMIT };
        let work = async {
            if besieged {
                self.raise_backstop().await;
            }
            if self.quarantined {
                self.quarantine().await;
            }
            self.try_pass().await
        };
        let result = timeout(limit, work).await.unwrap_or(Err(PassError::Overdue(limit)));
        alarm.abort();
        self.listeners.metrics.reconcile_took(begin.elapsed());
        match result {
            Ok(outcome) => {
                self.bridge_mended = outcome.found.kinds().contains(&Drift::Bridge);
                let joined = self.ports_that_joined(&outcome);
                let repaired = !outcome.found.is_empty() && joined.is_empty();
                if repaired {
                    self.say_what_was_done(&outcome.found, wake);
                } else if !joined.is_empty() {
                    tracing::info!(ports = joined.join(", "), "isolated ports that joined {BRIDGE}");
                }
                self.note_drops(&outcome);
                self.verified();
                if !besieged {
                    self.lower_backstop().await;
                    self.clear_other_backend(wake).await;
                }
                Ok(if repaired { watch::Outcome::Repaired } else { watch::Outcome::Clean })
            }
            Err(error) => {
                // How far it came is not known.
                self.bridge_mended = error.outcome() == watch::Outcome::Undone;
                self.listeners.metrics.reconcile_failed();
                self.unverified(&error, begin).await;
                Err(error)
            }
        }
    }

    /// What was verified before a pass does not hold for ever: while one hangs, nobody knows.
    fn alarm_when_late(&self) -> AbortHandle {
        let (listeners, wanted) = (self.listeners.clone(), self.pool.config.wants_isolation());
        let alarm = async move {
            sleep(VERDICT_LIMIT).await;
            if wanted {
                listeners.fails("looking after the host takes long");
            }
        };
        tokio::spawn(alarm).abort_handle()
    }

    /// While something keeps undoing the rules, or nobody can tell whether they stand, the drop targets lead nowhere.
    pub async fn raise_backstop(&mut self) {
        let targets = self.pool.config.drop_targets();
        if self.options.rules == Rules::Leave || targets.is_empty() {
            return self.lower_backstop().await;
        }
        if let Err(error) = self.backstop.raise(&targets).await {
            tracing::warn!(error = %chain(&error), "cannot put up the blackhole routes");
        }
    }

    /// Rules of ours in the backend that is not the host's are enforced unseen. They change rarely: the slow passes look,
    /// and the first after the start.
    async fn clear_other_backend(&mut self, wake: Option<&Wake>) {
        let slow = wake.is_some_and(|wake| !self.looked_elsewhere || wake.reasons.contains(&Reason::Interval));
        if self.options.rules != Rules::Manage || !slow {
            return;
        }
        self.looked_elsewhere = true;
        for family in [Family::V4, Family::V6] {
            match host::clear_other_backend(family).await {
                Ok(0) => {}
                Ok(count) => {
                    tracing::warn!(count, "rules of ours were stranded in the other iptables backend; removed them");
                    self.listeners.metrics.drift_repaired("rules_stranded");
                }
                Err(error) => {
                    tracing::debug!(error = %chain(&error), "the other iptables backend cannot be seen to");
                }
            }
        }
    }

    async fn lower_backstop(&mut self) {
        if let Err(error) = self.backstop.lower().await {
            tracing::warn!(error = %chain(&error), "cannot take down the blackhole routes");
        }
    }

    /// Whether the drop targets lead nowhere, whatever becomes of the rules.
    #[must_use]
    pub fn backstop_stands(&self) -> bool {
        self.backstop.is_up()
    }

    /// Whether rules may be missing for a while: nothing is dropped, or the backstop does all that they would.
    #[must_use]
    pub fn can_do_without_rules(&self) -> bool {
        let config = &self.pool.config;
        !config.wants_isolation() || self.backstop.is_up() && !config.drops.host && !config.drops.metadata
    }

    async fn try_pass(&mut self) -> Result<Outcome, PassError> {
        let _lock = LockFile::acquire(Path::new(HOST_LOCK), LOCK_WAIT).await?;
        let followed = self.follow_pool();
        let target = Target {
            config: &self.pool.config,
            rules: self.options.rules,
            earlier: self.earlier.as_ref(),
            bridge_up: !self.quarantined,
        };
        // Even while pool.json is unreadable, what it asked for last is kept true. Whatever came of that, what it asks for
        // now is not known.
        let converged = self.host.converge(target).await;
        followed?;
        let mut outcome = converged?;
        if self.quarantined {
            tracing::warn!("isolation is verified again: taking {BRIDGE} up");
            self.quarantined = false;
            outcome.after = self.host.converge(Target { bridge_up: true, ..target }).await?.after;
        }
        self.backend = if outcome.after.v4.is_nft() { Backend::Nft } else { Backend::Legacy };
        self.mtu = outcome.after.bridge().and_then(|bridge| u16::try_from(bridge.mtu).ok());
        Ok(outcome)
    }

    /// Reads `pool.json` again.
    fn follow_pool(&mut self) -> Result<(), PoolError> {
        self.changed = false;
        let pool = Pool::load(&self.options.state_dir)?;
        if pool.config != self.pool.config {
            self.changed = true;
            if self.started {
                tracing::info!("pool.json changed: following it");
            }
            self.earlier = Some(self.pool.config.clone());
        }
        self.pool = pool;
        Ok(())
    }

    /// The ports that were isolated, if that is all that had to be done and none of them had been before: VMs that were
    /// started, and nothing that was undone.
    fn ports_that_joined(&mut self, Outcome { found, after }: &Outcome) -> Vec<String> {
        let mut joined = Vec::new();
        for step in &found.steps {
            match step {
                Step::IsolatePort { port, isolated: true } => joined.push(port.clone()),
                _ => joined.clear(),
            }
        }
        let index = |name: &String| after.link(name).map(|link| link.index);
        let others = found.steps.len() != joined.len();
        let again = joined.iter().filter_map(index).any(|index| self.isolated_ports.contains(&index));
        // A port that was taken away is remembered for as long as its interface is there.
        self.isolated_ports.retain(|index| after.links.iter().any(|link| link.index == *index));
        self.isolated_ports.extend(after.ports().filter(|port| port.isolated).map(|port| port.index));
        if others || again || !found.obstacles.is_empty() { Vec::new() } else { joined }
    }

    fn say_what_was_done(&mut self, found: &Plan, wake: Option<&Wake>) {
        let what = summary(&found.findings);
        let Some(wake) = wake.filter(|_| !self.changed) else {
            tracing::info!(found = %what, "configured the host");
            return;
        };
        let kinds: Vec<_> = found.kinds().into_iter().map(Drift::name).collect();
        for kind in &kinds {
            self.listeners.metrics.drift_repaired(kind);
        }
        let by = wake.by.as_ref().map(|(name, pid)| format!("{name} (PID {pid})"));
        if !wake.besieged {
            tracing::warn!(found = %what, by, "the host had drifted and was repaired");
        } else if let Some(held_back) = self.repairs.allow(&kinds.join(", ")) {
            tracing::warn!(found = %what, by, held_back, "something keeps undoing the host configuration; it is repaired each time");
        }
    }

    /// Brings the counters of the drop targets up to date, once a second at most.
    pub async fn count_drops(&mut self) {
        let config = &self.pool.config;
        let nothing = self.options.rules == Rules::Leave || config.drop_targets().is_empty();
        if nothing || Instant::now() < self.next_count {
            return;
        }
        let begin = Instant::now();
        // What cannot be read now is read by the next pass.
        if let Ok(Ok(counted)) = timeout(COUNT_PAUSE, self.host.count_drops(config)).await {
            self.note_counts(&counted);
        }
        self.next_count = Instant::now() + COUNT_PAUSE.max(COUNT_SHARE * begin.elapsed());
    }

    fn note_counts(&self, counted: &[Counted]) {
        for Counted { cidr, forward, input } in counted {
            let cidr = cidr.to_string();
            for (chain, reading) in [("FORWARD", *forward), ("INPUT", Some(*input))] {
                if let Some(reading) = reading {
                    self.listeners.metrics.drop_packets_read(&cidr, chain, reading);
                }
            }
        }
    }

    fn note_drops(&self, outcome: &Outcome) {
        if self.options.rules == Rules::Manage {
            self.note_counts(&drops::counted(&self.pool.config, &outcome.after));
        }
    }

    fn verified(&mut self) {
        let wanted = self.pool.config.wants_isolation();
        if wanted && self.options.rules == Rules::Leave {
            if !std::mem::replace(&mut self.skipped, true) {
                tracing::error!(
                    "pool.json asks for drops, but --skip-iptables writes no rules: isolation is NOT enforced, and no \
                     new lease is granted"
                );
            }
            self.started = true;
            return self.listeners.fails("drops are asked for, but the daemon runs with --skip-iptables");
        }
        if self.unverified_since.take().is_some() && self.started {
            tracing::info!("the host is as pool.json asks again");
        }
        self.troubles = LogLimit::default();
        self.skipped = false;
        self.started = true;
        self.listeners.holds(&self.pool.config.isolation_summary());
    }

    /// A pass that began at `begin` has failed.
    async fn unverified(&mut self, error: &PassError, begin: Instant) {
        let why = chain(error);
        if let Some(held_back) = self.troubles.allow(&why) {
            tracing::error!(error = %why, held_back, "the host is not as pool.json asks");
        }
        // Rules that could not be read just now will not be read at once, and in a siege what another look costs is not
        // worth what it tells.
        let blind =
            matches!(error, PassError::Host(HostError::Firewall(FirewallError::Read(_)))) || self.host.is_besieged();
        let late = begin.elapsed() >= VERDICT_LIMIT;
        if !blind && !late && timeout(VERDICT_LIMIT, self.isolation_holds()).await.unwrap_or(false) {
            self.unverified_since = None;
            return match error {
                // What it asked for last holds; whether that is what it asks for now nobody knows.
                PassError::Pool(_) => self.listeners.fails(&why),
                _ => self.listeners.holds(&self.pool.config.isolation_summary()),
            };
        }
        self.listeners.fails(&why);
        let since = *self.unverified_since.get_or_insert(begin);
        if self.options.quarantine && (self.quarantined || since.elapsed() >= QUARANTINE_AFTER) {
            self.quarantine().await;
        }
        // A daemon that does not start leaves the host as it is, and whoever holds the lock is changing it.
        if self.started && self.options.rules == Rules::Manage && !matches!(error, PassError::Lock(_)) {
            if !self.backstop.is_up() {
                self.raise_backstop().await;
            }
            // One that was undone has come as far as the other layer.
            if error.outcome() == watch::Outcome::Failed {
                self.do_without_rules().await;
            }
        }
    }

    /// What keeps VMs apart beside the rules is kept true also while these cannot be.
    async fn do_without_rules(&mut self) {
        let Ok(_lock) = LockFile::acquire(Path::new(HOST_LOCK), Duration::ZERO).await else { return };
        match timeout(VERDICT_LIMIT, self.host.do_without_rules(&self.pool.config)).await {
            Ok(Ok(done)) if done.is_empty() => {}
            Ok(Ok(done)) => {
                let kinds: Vec<_> = done.kinds().into_iter().map(Drift::name).collect();
                kinds.iter().for_each(|kind| self.listeners.metrics.drift_repaired(kind));
                if let Some(held_back) = self.repairs.allow(&kinds.join(", ")) {
                    tracing::warn!(found = %summary(&done.findings), held_back, "the host had drifted and was repaired");
                }
            }
            Ok(Err(error)) => tracing::debug!(error = %chain(&error), "ports and toggles cannot be seen to either"),
            Err(_) => tracing::debug!("seeing to ports and toggles takes too long"),
        }
    }

    /// Whether isolation is as asked for, although something else of the host is not.
    async fn isolation_holds(&self) -> bool {
        if !self.pool.config.wants_isolation() {
            return true;
        }
        let target = Target { earlier: self.earlier.as_ref(), ..Target::new(&self.pool.config, self.options.rules) };
        let looked = self.host.plan(target).await;
        self.options.rules == Rules::Manage
            && looked.is_ok_and(|(plan, _)| plan.obstacles.is_empty() && !plan.breaks_isolation())
    }

    /// After a first pass that failed: takes the bridge down unless isolation holds all the same.
    pub async fn quarantine_unless_isolated(&mut self) {
        if !timeout(VERDICT_LIMIT, self.isolation_holds()).await.unwrap_or(false) {
            self.quarantine().await;
        }
    }

    /// Takes the bridge down, so that no VM sends or receives anything until isolation is verified. Whoever plugs in a
    /// VM may take it up, so this comes with every pass until then.
    async fn quarantine(&mut self) {
        match self.host.links.find(BRIDGE).await {
            Ok(Some(bridge)) if self.quarantined && !bridge.up => {}
            Ok(Some(bridge)) => match self.host.links.set_down(bridge.index, BRIDGE).await {
                Ok(()) => {
                    self.quarantined = true;
                    tracing::error!("quarantine: {BRIDGE} is down until isolation is verified");
                }
                Err(error) => tracing::error!(error = %chain(&error), "quarantine failed: {BRIDGE} is still up"),
            },
            Ok(None) => {}
            Err(error) => tracing::error!(error = %chain(&error), "quarantine failed: {BRIDGE} cannot be found"),
        }
    }
}
