//! How long the clouds are given, and how we wait for them: no fixed sleeps, only looks at growing intervals up to a
//! deadline.

use std::time::{Duration, Instant};

/// Overrides every limit, in seconds, for operators with a slow API and for tests with an instant one.
pub const TIMEOUT_VARIABLE: &str = "COCOON_NET_CLOUD_TIMEOUT";

/// The first interval between two looks; each is [`GROWTH`] times the one before, up to [`LONGEST`].
const SHORTEST: Duration = Duration::from_millis(50);
const GROWTH: f64 = 1.5;
const LONGEST: Duration = Duration::from_secs(2);

/// Deadlines of the calls and of what they set in motion.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// One call of a vendor's CLI.
    pub call: Duration,
    /// From a call that succeeded until what it made is seen by the next (both APIs are eventually consistent).
    pub visible: Duration,
    /// From a call that attaches or detaches an interface until it is done, in the cloud and on the host.
    pub attach: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self { call: Duration::from_secs(60), visible: Duration::from_secs(30), attach: Duration::from_secs(60) }
    }
}

impl Limits {
    /// All three limits the same.
    #[must_use]
    pub fn all(limit: Duration) -> Self {
        Self { call: limit, visible: limit, attach: limit }
    }

    /// The defaults, or [`TIMEOUT_VARIABLE`] for all three. What is no positive number of seconds is passed over with
    /// a warning.
    #[must_use]
    pub fn from_env() -> Self {
        let Ok(text) = std::env::var(TIMEOUT_VARIABLE) else { return Self::default() };
        let seconds = text.trim().parse::<f64>().ok().filter(|seconds| (0.001..=86_400.0).contains(seconds));
        match seconds {
            Some(seconds) => Self::all(Duration::from_secs_f64(seconds)),
            None => {
                tracing::warn!(value = %text, "{TIMEOUT_VARIABLE} is not a number of seconds; using the defaults");
                Self::default()
            }
        }
    }
}

/// Looks until there is something to see; `None` when there is nothing by the deadline. Looks at least once, and once
/// more at the deadline itself.
///
/// # Errors
/// The first error of a look ends the wait.
pub async fn wait_for<T, E>(
    limit: Duration,
    mut look: impl AsyncFnMut() -> Result<Option<T>, E>,
) -> Result<Option<T>, E> {
    let deadline = Instant::now() + limit;
    let mut interval = SHORTEST;
    loop {
        if let Some(found) = look().await? {
            return Ok(Some(found));
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(None);
        }
        tokio::time::sleep(interval.min(left)).await;
        interval = interval.mul_f64(GROWTH).min(LONGEST);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_wait_ends_with_the_first_thing_seen() {
        let mut looks = 0;
        let found = wait_for(Duration::from_secs(5), async || {
            looks += 1;
            Ok::<_, ()>((looks == 3).then_some("here"))
        });
        assert_eq!(found.await, Ok(Some("here")));
        assert_eq!(looks, 3);
    }

    #[tokio::test]
    async fn a_wait_ends_with_the_first_error() {
        assert_eq!(wait_for(Duration::from_secs(5), async || Err::<Option<()>, _>("no")).await, Err("no"));
    }

    #[tokio::test]
    async fn a_wait_of_nothing_looks_once() {
        let mut looks = 0;
        let found = wait_for(Duration::ZERO, async || {
            looks += 1;
            Ok::<Option<()>, ()>(None)
        });
        assert_eq!(found.await, Ok(None));
        assert_eq!(looks, 1);
    }
}
