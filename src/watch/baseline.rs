//! What looks are compared with: what was seen when all was known to be well.

use std::time::{Duration, Instant};

use super::Outcome;

/// How long before a pass a look may have been taken to tell what the pass found.
const FRESH: Duration = Duration::from_millis(100);

/// What the last look saw and when, and what was seen when all was known to be well.
#[derive(Debug)]
pub(super) struct Baseline<T> {
    last: Option<(Instant, T)>,
    pub(super) good: Option<T>,
}

impl<T: Clone> Baseline<T> {
    pub(super) fn unknown() -> Self {
        Self { last: None, good: None }
    }

    pub(super) fn saw(&mut self, now: Instant, seen: T) {
        self.last = Some((now, seen));
    }

    /// Draws the conclusion from a pass that started at `started`. If it was clean, what was seen just before is good.
    /// After a repair nothing is known to be: what was seen before was the damage, and seeing that again must count.
    /// After a failure, only a change counts; the retries are the pacer's.
    pub(super) fn judge(&mut self, outcome: Outcome, started: Instant) {
        let fresh = self.last.as_ref().filter(|(at, _)| *at + FRESH >= started).map(|(_, seen)| seen.clone());
        match outcome {
            Outcome::Clean => self.good = fresh.or(self.good.take()),
            Outcome::Repaired => self.good = None,
            Outcome::Failed | Outcome::Undone => self.good = self.last.as_ref().map(|(_, seen)| seen.clone()),
        }
    }
}
