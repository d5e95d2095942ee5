//! When to reconcile: a state machine that is told the time and never asks for it.
//!
//! Three promises pull at it. A repair must come at once, for until then isolation is open. Someone who undoes it in a
//! loop must not make the daemon burn the node. And what no event tells must be found all the same.
//!
//! - The first event of a quiet time is acted on without delay; passes that follow each other closely are spread.
//! - Passes and looks are paid for, in CPU time, out of a [`Budget`] that refills at a fixed share of a core. While it
//!   lasts, every offence is repaired at once; when it is used up, repairs come as often as it refills. That is the
//!   back-off: it needs no guess at how costly a pass is, and it never waits longer than [`LATEST`], or in a siege
//!   [`LATEST_IN_SIEGE`] times what a pass costs: then the backstop stands while passes are rare.
//! - After a repair come looks at growing intervals, because whoever undid it once is likely still at it.
//! - While someone keeps undoing, looks come often ([`SIEGE_LOOK`]): not everything that matters sends events.

use std::time::{Duration, Instant};

/// Share of one core that passes and looks may use in the long run, in percent.
const SHARE_PERCENT: u32 = 6;

/// CPU time that may be spent at once after a quiet time.
const BURST: Duration = Duration::from_millis(400);

/// However busy it gets, a wanted pass starts at most this long after the one before it ended (a pass that itself
/// costs more is waited out once).
const LATEST: Duration = Duration::from_secs(1);

/// The same in a siege, as a multiple of what the pass before cost: some 4 % of a core. The offender may have made passes
/// dear, with thousands of rules of its own.
const LATEST_IN_SIEGE: u32 = 24;

/// However dear passes are, they are not further apart than this.
const RAREST: Duration = Duration::from_secs(60);

/// Bounds of the pause between passes that follow each other closely.
const PAUSE: (Duration, Duration) = (Duration::from_millis(10), Duration::from_millis(100));

/// So long without a pass and the next event counts as the first of a quiet time again.
const CALM: Duration = Duration::from_millis(150);

/// Passes after a repair, counted from the pass before.
const FOLLOW_UPS: [Duration; 4] =
    [Duration::from_millis(50), Duration::from_millis(250), Duration::from_secs(1), Duration::from_secs(4)];

/// Passes after one that failed; the last interval repeats.
const RETRIES: [Duration; 4] =
    [Duration::from_millis(50), Duration::from_millis(200), Duration::from_millis(500), Duration::from_secs(1)];

/// Repairs, and tries at them, no further apart than this belong to one contest.
const CONTEST_QUIET: Duration = Duration::from_millis(2500);

/// From this many repairs on, a contest is a siege; a pass that failed counts twice.
const SIEGE: u32 = 4;

/// Interval of the looks in quiet times and in a siege.
const LOOK: Duration = Duration::from_millis(300);
const SIEGE_LOOK: Duration = Duration::from_millis(50);

/// What a pass came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// Nothing had to be changed.
    Clean,
    /// Drift was found and repaired.
    Repaired,
    /// Drift was found, or the host could not be read, and it is not repaired.
    Failed,
    /// Drift was found, and what was repaired of it was undone again before the pass had ended.
    Undone,
}

/// What is due at a moment.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Due {
    /// Something was reported: [`Pacer::report`].
    pub reported: bool,
    /// A look after a repair, or another try after a failure.
    pub follow_up: bool,
    /// The slow full pass.
    pub interval: bool,
}

impl Due {
    /// Whether there is anything to do.
    pub(super) fn any(self) -> bool {
        self.reported || self.follow_up || self.interval
    }
}

/// Decides when the next pass and the next look are due.
#[derive(Debug)]
pub(super) struct Pacer {
    interval: Duration,
    budget: Budget,
    /// When the first report came that no pass has answered yet.
    reported: Option<Instant>,
    /// The scheduled pass after a repair or a failure, and how many came before it.
    follow_up: Option<(Instant, usize)>,
    /// The next slow full pass.
    slow: Instant,
    /// When the pass that is under way began.
    started: Instant,
    /// When the last pass ended, and what it cost.
    ended: Option<(Instant, Duration)>,
    pause: Duration,
    look: Instant,
    /// Repairs of the contest, and when the last of them was.
    contest: Option<(u32, Instant)>,
    /// Whether drop targets are out of reach between two passes, so that these may be rare.
    pub(super) backstop: bool,
}

impl Pacer {
    /// A pacer whose slow full pass comes each `interval`, the first one `interval` from now.
    pub(super) fn new(now: Instant, interval: Duration) -> Self {
        Self {
            interval,
            budget: Budget::full(now),
            reported: None,
            follow_up: None,
            slow: now + interval,
            started: now,
            ended: None,
            pause: PAUSE.0,
            look: now + LOOK,
            contest: None,
            backstop: false,
        }
    }

    /// Takes note that something may have changed.
    pub(super) fn report(&mut self, now: Instant) {
        self.reported.get_or_insert(now);
    }

    /// When the next pass should start.
    pub(super) fn next_pass(&self) -> Instant {
        [self.reported_due(), self.follow_up.map(|(at, _)| self.afford(at)), Some(self.afford(self.slow))]
            .into_iter()
            .flatten()
            .min()
            .unwrap_or(self.slow)
    }

    /// When the next look should be taken.
    pub(super) fn next_look(&self) -> Instant {
        self.look
    }

    /// What is due now. A pass that starts answers everything reported so far.
    pub(super) fn start(&mut self, now: Instant) -> Due {
        let due = Due {
            reported: self.reported_due().is_some_and(|at| at <= now),
            follow_up: self.follow_up.is_some_and(|(at, _)| self.afford(at) <= now),
            interval: self.afford(self.slow) <= now,
        };
        if due.any() {
            self.reported = None;
            self.started = now;
            if due.interval {
                self.slow = now + self.interval;
            }
        }
        due
    }

    /// Takes note of how the pass that was started went and what CPU time it cost.
    pub(super) fn passed(&mut self, now: Instant, cost: Duration, outcome: Outcome) {
        let calm = self.ended.is_none_or(|(ended, _)| self.started.saturating_duration_since(ended) >= CALM);
        self.pause = if calm { PAUSE.0 } else { (self.pause * 2).min(PAUSE.1) };
        self.ended = Some((now, cost));
        self.budget.spend(now, cost);
        self.follow_up = self.schedule(now, outcome);
        // A pass that could not win against someone is a siege by itself.
        let undone = match outcome {
            Outcome::Clean => 0,
            Outcome::Repaired => 1,
            Outcome::Failed => 2,
            Outcome::Undone => SIEGE,
        };
        if undone > 0 {
            self.contest = Some((self.contest(now) + undone, now));
        }
        self.look = self.look.min(now + self.look_interval(now));
    }

    /// Takes note that a look was taken and what CPU time it cost.
    pub(super) fn looked(&mut self, now: Instant, cost: Duration) {
        self.budget.spend(now, cost);
        self.look = now + self.look_interval(now);
    }

    /// Takes note of CPU time that was used for something else than passes and looks.
    pub(super) fn charge(&mut self, now: Instant, cost: Duration) {
        self.budget.spend(now, cost);
    }

    /// The pass that just started answers what was reported up to now, too.
    pub(super) fn forget_reports(&mut self) {
        self.reported = None;
    }

    /// Whether someone keeps undoing what is repaired.
    pub(super) fn besieged(&self, now: Instant) -> bool {
        self.contest(now) >= SIEGE
    }

    /// Whether costly looks may be taken now: in a siege they must leave enough for the repairs.
    pub(super) fn look_affordable(&self, now: Instant) -> bool {
        self.budget.at(now) >= Budget::micros(BURST) / 2
    }

    /// Repairs so far in the contest that is on at this moment.
    fn contest(&self, now: Instant) -> u32 {
        // Passes that come rarely must not look like peace.
        let quiet = CONTEST_QUIET.max(2 * self.ended.map_or(Duration::ZERO, |(_, cost)| apart_in_siege(cost)));
        self.contest.filter(|(_, last)| now.saturating_duration_since(*last) < quiet).map_or(0, |(n, _)| n)
    }

    fn look_interval(&self, now: Instant) -> Duration {
        if self.besieged(now) { SIEGE_LOOK } else { LOOK }
    }

    fn reported_due(&self) -> Option<Instant> {
        let at = self.reported?;
        let spread = self.ended.map_or(at, |(ended, _)| at.max(ended + self.pause));
        Some(self.afford(spread))
    }

    /// `at`, or when the budget allows another pass, if that is later; within bounds.
    fn afford(&self, at: Instant) -> Instant {
        let latest = self.ended.map_or(at, |(ended, cost)| {
            let most = if self.backstop && self.besieged(ended) { apart_in_siege(cost) } else { cost };
            ended + LATEST.max(most)
        });
        at.max(self.budget.positive_again().min(latest))
    }

    fn schedule(&self, now: Instant, outcome: Outcome) -> Option<(Instant, usize)> {
        let after = |steps: &[Duration], step: usize| steps.get(step).map(|wait| (now + *wait, step + 1));
        let done = self.follow_up.filter(|(at, _)| *at <= self.started);
        match outcome {
            Outcome::Repaired => after(&FOLLOW_UPS, 0),
            Outcome::Failed | Outcome::Undone => {
                after(&RETRIES, done.map_or(0, |(_, step)| step.min(RETRIES.len() - 1)))
            }
            Outcome::Clean => match done {
                Some((_, step)) => after(&FOLLOW_UPS, step),
                None => self.follow_up,
            },
        }
    }
}

/// How far apart passes of this cost may be in a siege.
fn apart_in_siege(cost: Duration) -> Duration {
    (cost * LATEST_IN_SIEGE).min(RAREST)
}

/// CPU time that may still be spent: it fills at [`SHARE_PERCENT`] of real time, up to [`BURST`], and may go below zero
/// by what one pass costs more than there was.
#[derive(Debug)]
struct Budget {
    micros: i64,
    since: Instant,
}

impl Budget {
    fn full(now: Instant) -> Self {
        Self { micros: Self::micros(BURST), since: now }
    }

    fn micros(duration: Duration) -> i64 {
        i64::try_from(duration.as_micros()).unwrap_or(i64::MAX)
    }

    fn at(&self, now: Instant) -> i64 {
        let earned = Self::micros(now.saturating_duration_since(self.since) * SHARE_PERCENT / 100);
        self.micros.saturating_add(earned).min(Self::micros(BURST))
    }

    fn spend(&mut self, now: Instant, cost: Duration) {
        *self = Self { micros: self.at(now).saturating_sub(Self::micros(cost)), since: now };
    }

    /// When there is something to spend again.
    fn positive_again(&self) -> Instant {
        let debt = u64::try_from(-self.micros).unwrap_or(0);
        self.since + Duration::from_micros(debt) * 100 / SHARE_PERCENT
    }
}

#[cfg(test)]
mod tests;
