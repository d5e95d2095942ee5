//! What keeps the log readable: one line for an error with its causes, and no line over and over.

use std::collections::HashMap;
use std::error::Error;
use std::time::{Duration, Instant};

/// How soon a message of one kind may be logged again.
const INTERVAL: Duration = Duration::from_secs(10);

/// How many kinds are remembered before those that may be logged again are forgotten.
const KINDS: usize = 64;

/// Lets a message of a kind into the log every ten seconds at most.
#[derive(Debug)]
pub struct LogLimit {
    begin: Instant,
    kinds: HashMap<String, Kind>,
}

#[derive(Debug)]
struct Kind {
    next: Duration,
    held_back: u64,
}

impl Default for LogLimit {
    fn default() -> Self {
        Self { begin: Instant::now(), kinds: HashMap::new() }
    }
}

impl LogLimit {
    /// Whether to log a message of this kind now; with it, how many were held back since the last.
    pub fn allow(&mut self, kind: &str) -> Option<u64> {
        self.allow_at(kind, self.begin.elapsed())
    }

    fn allow_at(&mut self, kind: &str, now: Duration) -> Option<u64> {
        match self.kinds.get_mut(kind) {
            Some(known) if now < known.next => {
                known.held_back += 1;
                None
            }
            Some(known) => {
                known.next = now + INTERVAL;
                Some(std::mem::take(&mut known.held_back))
            }
            None => {
                if self.kinds.len() >= KINDS {
                    self.kinds.retain(|_, known| now < known.next);
                }
                self.kinds.insert(kind.to_owned(), Kind { next: now + INTERVAL, held_back: 0 });
                Some(0)
            }
        }
    }
}

/// An error with all its causes on one line.
#[must_use]
pub fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_kind_is_logged_once_in_a_while_and_counted_meanwhile() {
        let mut log = LogLimit::default();
        let seconds = Duration::from_secs;
        assert_eq!(log.allow_at("a", seconds(0)), Some(0));
        assert_eq!(log.allow_at("b", seconds(1)), Some(0), "another kind has its own say");
        assert_eq!((log.allow_at("a", seconds(2)), log.allow_at("a", seconds(9))), (None, None));
        assert_eq!(log.allow_at("a", seconds(10)), Some(2));
    }

    #[test]
    fn ever_new_kinds_are_forgotten_again() {
        let mut log = LogLimit::default();
        for second in 0..10_000 {
            assert_eq!(log.allow_at(&format!("kind {second}"), Duration::from_secs(second)), Some(0));
        }
        assert!(log.kinds.len() <= KINDS, "{}", log.kinds.len());
    }
}
