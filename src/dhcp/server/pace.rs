//! Fewer wake-ups under load, as network cards moderate their interrupts.
//!
//! A thread that is woken for each frame spends its time on being woken, and that of whoever sends. When frames come
//! thick, the server looks at its sockets at intervals: one look finds many frames, one sync covers their leases.

use std::time::Duration;

/// Frames per [`WINDOW`] from which on they come thick: some 3000 exchanges a second.
const THICK: usize = 60;

/// How long frames are counted for.
const WINDOW: Duration = Duration::from_millis(10);

/// Time between two looks while frames come thick. An answer is late by at most this, and receive buffers hold much more
/// than arrives meanwhile.
const NAP: Duration = Duration::from_micros(500);

/// How many frames come. Times are those of a monotonic clock.
#[derive(Debug, Default)]
pub(super) struct Pace {
    window: Duration,
    frames: usize,
    thick: bool,
}

impl Pace {
    /// Counts the frames that a look has found. Returns how long to leave the sockets alone.
    pub fn found(&mut self, frames: usize, now: Duration) -> Option<Duration> {
        if now >= self.window + WINDOW {
            // After a quiet window the count is of another time.
            self.thick = self.frames >= THICK && now < self.window + 2 * WINDOW;
            (self.window, self.frames) = (now, 0);
        }
        self.frames += frames;
        self.thick.then_some(NAP)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The longest nap while this many frames come each millisecond for so many milliseconds.
    fn naps(pace: &mut Pace, from: u64, millis: u64, frames: usize) -> Option<Duration> {
        (from..from + millis).filter_map(|at| pace.found(frames, Duration::from_millis(at))).max()
    }

    #[test]
    fn a_node_whose_vms_ask_now_and_then_answers_at_once() {
        assert_eq!(naps(&mut Pace::default(), 0, 1000, 1), None);
    }

    #[test]
    fn a_storm_is_looked_at_in_intervals_and_its_end_is_noticed() {
        let mut pace = Pace::default();
        assert_eq!(naps(&mut pace, 0, 10, 20), None, "too early to tell");
        assert_eq!(naps(&mut pace, 10, 50, 20), Some(NAP));
        assert_eq!(pace.found(1, Duration::from_secs(5)), None, "long over");
    }
}
