//! Events and ticks in, "reconcile now" out.
//!
//! The watch knows when the host may have drifted, never whether it has: that is the reconcile pass's question, and
//! there is one notion of drift in this program. A wake that finds nothing costs a pass and is otherwise harmless, so
//! the watch prefers one too many to one too few.
//!
//! | what may change | how it is noticed |
//! |---|---|
//! | the bridge, its ports, its addresses, the local route of a guest agent | rtnetlink events |
//! | rules, nftables backend | nftables events |
//! | rules, legacy backend | the iptables lock file is let go of; the saved tables each second |
//! | toggles in /proc/sys, `pool.json`, the ipset | a look that starts no process, three times a second (the set: once) |
//! | anything else | the slow full pass |
//!
//! [`pacer`] decides when; this module only carries.

use std::future::Future;
use std::io;
use std::path::PathBuf;
use std::pin::Pin;
use std::time::{Duration, Instant};

use nix::sys::resource::{UsageWho, getrusage};

use crate::command;

mod baseline;
mod events;
mod lock;
mod look;
mod pacer;

use baseline::Baseline;
use events::{Events, News};
use lock::LockFile;
use look::Glance;
pub use pacer::Outcome;
use pacer::{Due, Pacer};

/// How often the saved legacy tables are looked at in quiet times. When the lock file is watched too and the tables are
/// long, less often, so that looking costs at most a [`LEGACY_COST`]th of a core.
const LEGACY_LOOK: Duration = Duration::from_secs(1);
const LEGACY_LOOK_AT_MOST: Duration = Duration::from_secs(10);
const LEGACY_COST: u32 = 400;

/// How often the ipset is read in quiet times.
const SET_LOOK: Duration = Duration::from_secs(1);

/// Why the watch could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum WatchError {
    /// A subscription was refused.
    #[error("cannot subscribe to {what}; the daemon needs CAP_NET_ADMIN and a kernel with netlink and inotify")]
    Subscribe {
        /// What was subscribed to.
        what: &'static str,
        /// What the kernel answered.
        source: io::Error,
    },
}

/// Why it is time to reconcile.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Reason {
    /// The bridge or a port of it came, went or changed.
    Links,
    /// An address of the bridge came or went.
    Addresses,
    /// A subnet was routed to the local table.
    Routes,
    /// Tables that hold our rules changed.
    Rules,
    /// The ipset changed.
    Set,
    /// A toggle in /proc/sys changed.
    Toggles,
    /// A watched file changed.
    Files,
    /// Events were lost.
    Overrun,
    /// A repair is looked after, or a failed one tried again.
    FollowUp,
    /// The slow full pass.
    Interval,
    /// Someone asked: [`Watch::request`].
    Requested,
}

/// A call to reconcile.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wake {
    /// Why, each reason once, in order.
    pub reasons: Vec<Reason>,
    /// Who made the last change to the nftables ruleset, as far as the kernel tells: process name and id. It may be
    /// this program's own iptables.
    pub by: Option<(String, u32)>,
    /// Whether repairs are being undone again and again.
    pub besieged: bool,
}

/// Which backend holds the rules.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ruleset {
    /// nftables, which sends events.
    Nftables,
    /// Legacy xtables: these programs print the tables (`iptables-legacy-save`, ...).
    Legacy {
        /// Programs to run, without arguments.
        save: Vec<String>,
    },
    /// Rules are not ours to keep.
    Unwatched,
}

/// What to watch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Options {
    /// The bridge's name.
    pub bridge: String,
    /// Time between slow full passes.
    pub interval: Duration,
    /// Files whose change is a reason.
    pub files: Vec<PathBuf>,
    /// How rules are watched.
    pub ruleset: Ruleset,
}

/// The watch. Run [`Watch::next`], reconcile, call [`Watch::passed`], and again.
pub struct Watch {
    options: Options,
    set: Option<WatchedSet>,
    pacer: Pacer,
    links: Events,
    rules: Rules,
    reasons: Vec<Reason>,
    by: Option<(String, u32)>,
    /// When the pass under way began, and the CPU time used before it.
    started: Instant,
    spent_before: Duration,
    glance: Baseline<Glance>,
}

/// The ipset that is watched, and what it held when it was last read.
struct WatchedSet {
    name: String,
    digest: Option<u64>,
    read: Option<Instant>,
}

/// The part of the watch that depends on the backend.
enum Rules {
    Nftables(Events),
    Legacy(Box<Legacy>),
    Unwatched,
}

struct Legacy {
    save: Vec<String>,
    lock: LockFile,
    tables: Baseline<u64>,
    /// A look under way. It is kept here so that a caller who drops [`Watch::next`] does not make it start over.
    look: Option<LegacyLook>,
    next_look: Instant,
}

/// A look at the saved tables that is under way, and the CPU time used before it.
struct LegacyLook {
    spent_before: Duration,
    tables: Pin<Box<dyn Future<Output = u64> + Send>>,
}

impl Watch {
    /// Subscribes to everything. Must be called in a tokio runtime with I/O and time enabled, and in the network
    /// namespace to be watched. The first [`Watch::next`] comes within a moment, so that nothing that happened before
    /// the subscriptions stays unseen.
    ///
    /// # Errors
    /// [`WatchError`] when the kernel refuses a subscription.
    pub fn open(options: Options) -> Result<Self, WatchError> {
        let now = Instant::now();
        let rules = match &options.ruleset {
            Ruleset::Nftables => Rules::Nftables(Events::of_nftables()?),
            Ruleset::Legacy { save } => Rules::Legacy(Box::new(Legacy::open(save.clone(), now)?)),
            Ruleset::Unwatched => Rules::Unwatched,
        };
        Ok(Self {
            pacer: Pacer::new(now, options.interval),
            links: Events::of_links()?,
            rules,
            options,
            set: None,
            reasons: Vec::new(),
            by: None,
            started: now,
            spent_before: cpu_time(),
            glance: Baseline::unknown(),
        })
    }

    /// Watches this ipset from now on, or none.
    pub fn watch_set(&mut self, set: Option<&str>) {
        if self.set.as_ref().map(|watched| watched.name.as_str()) == set {
            return;
        }
        self.set = set.map(|name| WatchedSet { name: name.to_owned(), digest: None, read: None });
    }

    /// Whether repairs are being undone again and again: [`Wake::besieged`], as of now.
    #[must_use]
    pub fn besieged(&self) -> bool {
        self.pacer.besieged(Instant::now())
    }

    /// Says whether drop targets are out of reach between two passes: in a siege these may then be rare.
    pub fn set_backstop(&mut self, stands: bool) {
        self.pacer.backstop = stands;
    }

    /// Watches these files from now on.
    pub fn watch_files(&mut self, files: Vec<PathBuf>) {
        self.options.files = files;
    }

    /// Makes the next [`Watch::next`] return as soon as the budget allows.
    pub fn request(&mut self) {
        self.report([Reason::Requested]);
    }

    /// Waits until it is time to reconcile. Cancel safe: no reason is lost.
    pub async fn next(&mut self) -> Wake {
        loop {
            let now = Instant::now();
            let due = self.pacer.start(now);
            if due.any() {
                return self.wake(now, due);
            }
            if now >= self.pacer.next_look() {
                self.look(now);
                continue;
            }
            self.wait(self.pacer.next_pass().min(self.pacer.next_look())).await;
        }
    }

    /// Takes note of how the pass after the last [`Watch::next`] went. Its CPU time, that of the tools it ran included,
    /// decides how soon the next one may come when changes keep coming.
    pub fn passed(&mut self, outcome: Outcome) {
        let cost = cpu_time().saturating_sub(self.spent_before);
        self.pacer.passed(Instant::now(), cost, outcome);
        self.glance.judge(outcome, self.started);
        if let Rules::Legacy(legacy) = &mut self.rules {
            legacy.tables.judge(outcome, self.started);
        }
    }

    /// Waits for one thing to happen, at most until `until`. Once something is reported, the sockets are left alone
    /// until the pass starts: in a storm, reading on would cost as much as the storm.
    async fn wait(&mut self, until: Instant) {
        let (bridge, idle) = (self.options.bridge.as_str(), self.reasons.is_empty());
        let news = tokio::select! {
            news = self.links.next(bridge), if idle => news,
            news = self.rules.next(bridge), if idle => news,
            () = tokio::time::sleep_until(until.into()) => return,
        };
        self.take(news);
    }

    fn wake(&mut self, now: Instant, due: Due) -> Wake {
        (self.started, self.spent_before) = (now, cpu_time());
        // Read what has come meanwhile: the pass that starts now answers it.
        let news = self.links.drain(&self.options.bridge);
        self.take(news);
        let news = self.rules.drain(&self.options.bridge);
        self.take(news);
        self.glance_around(now, true);
        self.pacer.forget_reports();

        let mut reasons = std::mem::take(&mut self.reasons);
        reasons.extend(due.follow_up.then_some(Reason::FollowUp));
        reasons.extend(due.interval.then_some(Reason::Interval));
        reasons.sort_unstable();
        reasons.dedup();
        Wake { reasons, by: self.by.take(), besieged: self.pacer.besieged(now) }
    }

    fn look(&mut self, now: Instant) {
        let before = cpu_time();
        let besieged = self.pacer.besieged(now);
        self.glance_around(now, besieged);
        if let Rules::Legacy(legacy) = &mut self.rules {
            let soon = besieged && self.pacer.look_affordable(now);
            legacy.start_look(now, soon);
        }
        self.pacer.looked(now, cpu_time().saturating_sub(before));
    }

    /// Looks at what needs no process to be looked at. Where nothing is known to be good, a pass has to tell. The set is
    /// the costliest of it and is read `at_once` or each second.
    fn glance_around(&mut self, now: Instant, at_once: bool) {
        let due = |set: &&mut WatchedSet| at_once || set.read.is_none_or(|read| now >= read + SET_LOOK);
        if let Some(set) = self.set.as_mut().filter(due) {
            set.digest = look::set_digest(&set.name);
            set.read = Some(now);
        }
        let glance = Glance::take(&self.options.files, self.set.as_ref().and_then(|set| set.digest));
        match &self.glance.good {
            Some(good) => self.report(glance.changes_since(good)),
            None => self.report([Reason::FollowUp]),
        }
        self.glance.saw(now, glance);
    }

    fn take(&mut self, news: News) {
        // What we wrote ourselves is reported, too.
        self.by = news.by.filter(|(_, pid)| !command::was_started_here(*pid)).or(self.by.take());
        self.pacer.charge(Instant::now(), news.cost);
        self.report(news.reasons);
    }

    fn report(&mut self, reasons: impl IntoIterator<Item = Reason>) {
        for reason in reasons {
            if !self.reasons.contains(&reason) {
                self.reasons.push(reason);
            }
            self.pacer.report(Instant::now());
        }
    }
}

impl Rules {
    async fn next(&mut self, bridge: &str) -> News {
        match self {
            Self::Nftables(events) => events.next(bridge).await,
            Self::Legacy(legacy) => legacy.next().await,
            Self::Unwatched => std::future::pending().await,
        }
    }

    fn drain(&mut self, bridge: &str) -> News {
        match self {
            Self::Nftables(events) => events.drain(bridge),
            Self::Legacy(legacy) => {
                legacy.lock.drain();
                News::default()
            }
            Self::Unwatched => News::default(),
        }
    }
}

impl Legacy {
    fn open(save: Vec<String>, now: Instant) -> Result<Self, WatchError> {
        Ok(Self { save, lock: LockFile::open()?, tables: Baseline::unknown(), look: None, next_look: now })
    }

    /// Starts looking at the saved tables when it is time to; or `soon`, unless the lock file tells.
    fn start_look(&mut self, now: Instant, soon: bool) {
        let soon = soon && !self.lock.is_attached();
        if self.look.is_none() && (soon || now >= self.next_look) {
            self.lock.attach();
            let tables = Box::pin(look::saved_tables(self.save.clone()));
            self.look = Some(LegacyLook { spent_before: cpu_time(), tables });
        }
    }

    /// Waits until the tables have changed, or may have.
    async fn next(&mut self) -> News {
        let look = async {
            match &mut self.look {
                Some(look) => (look.spent_before, (&mut look.tables).await),
                None => std::future::pending().await,
            }
        };
        let (before, tables) = tokio::select! {
            () = self.lock.released() => return News { reasons: vec![Reason::Rules], ..News::default() },
            done = look => done,
        };
        let cost = cpu_time().saturating_sub(before);
        let most = if self.lock.is_attached() { LEGACY_LOOK_AT_MOST } else { LEGACY_LOOK };
        self.look = None;
        self.next_look = Instant::now() + (cost * LEGACY_COST).clamp(LEGACY_LOOK, most);
        self.tables.saw(Instant::now(), tables);
        let reasons = if self.tables.good == Some(tables) { Vec::new() } else { vec![Reason::Rules] };
        News { reasons, by: None, cost }
    }
}

/// CPU time used so far by this process and the children it has waited for.
fn cpu_time() -> Duration {
    [UsageWho::RUSAGE_SELF, UsageWho::RUSAGE_CHILDREN]
        .into_iter()
        .filter_map(|who| getrusage(who).ok())
        .flat_map(|usage| [usage.user_time(), usage.system_time()])
        .map(|time| Duration::from_micros(u64::try_from(time.tv_sec() * 1_000_000 + time.tv_usec()).unwrap_or(0)))
        .sum()
}
