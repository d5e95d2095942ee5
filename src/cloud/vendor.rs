//! The vendors' CLIs: one runner for `gcloud` and `ve`.
//!
//! Only stdout is parsed; what a CLI says on stderr goes to the log, and into the error when the call fails. A call
//! has a deadline, and its process group ends with it (see [`crate::command`]). Which calls there are is decided
//! elsewhere, by pure functions that return the arguments.

use std::collections::HashSet;
use std::process::ExitStatus;
use std::sync::{Arc, Mutex};

use serde::de::DeserializeOwned;

use crate::cloud::limits::Limits;
use crate::command::{Command, CommandError, Output};

/// How much of an answer is quoted in an error.
const EXCERPT: usize = 300;

/// A vendor's CLI, with the environment that it needs.
#[derive(Debug, Clone)]
pub struct Cli {
    program: &'static str,
    env: Vec<(String, String)>,
    limits: Limits,
    /// What it has said on stderr before: a hint that comes with each call is logged once.
    heard: Arc<Mutex<HashSet<String>>>,
}

/// The arguments of one call.
pub type Args = Vec<String>;

/// Why a call of a vendor's CLI did not give what it was asked for. Every text says which call it was.
#[derive(Debug, thiserror::Error)]
pub enum CallError {
    /// The CLI is not installed, could not be started, or ran past its deadline.
    #[error(transparent)]
    Run(#[from] CommandError),
    /// It ended with a status other than 0.
    #[error("`{call}` failed ({status}): {answer}")]
    Failed {
        /// The command line.
        call: String,
        /// How it ended.
        status: ExitStatus,
        /// What it wrote to stderr, or to stdout if stderr was empty.
        answer: String,
    },
    /// The cloud answered with an error of its own.
    #[error("`{call}` was refused: {code}: {message}{}", request(.request_id))]
    Refused {
        /// The command line.
        call: String,
        /// The vendor's error code.
        code: String,
        /// The vendor's text.
        message: String,
        /// What the vendor's support asks for.
        request_id: String,
    },
    /// What it wrote to stdout is not the JSON that the vendor documents.
    #[error("`{call}` answered something else than the JSON it should: {answer}")]
    Junk {
        /// The command line.
        call: String,
        /// The beginning of the answer.
        answer: String,
        /// Where it breaks.
        source: serde_json::Error,
    },
    /// It reported success, but what was asked for is not there by the deadline.
    #[error("`{call}` reported success, but {missing} within {} s", .after.as_secs_f32())]
    NoEffect {
        /// The command line.
        call: String,
        /// What did not come true.
        missing: String,
        /// How long was waited.
        after: std::time::Duration,
    },
}

impl CallError {
    /// Whether the cloud said that what was named does not exist.
    #[must_use]
    pub fn is_not_found(&self) -> bool {
        match self {
            Self::Refused { code, .. } => code.contains("NotFound"),
            Self::Failed { answer, .. } => answer.contains(".NotFound"),
            _ => false,
        }
    }

    /// Whether the cloud refused it for no other reason than that too many calls are made (`AccountFlowLimitExceeded`).
    #[must_use]
    pub fn is_throttled(&self) -> bool {
        matches!(self, Self::Refused { code, .. } if code.ends_with("FlowLimitExceeded"))
    }

    /// Whether the call is known to have changed nothing: the cloud refused it, or the CLI was never started. After a
    /// timeout, a crash or an internal error of the cloud it may have been done all the same.
    #[must_use]
    pub fn changed_nothing(&self) -> bool {
        match self {
            Self::Refused { code, .. } => !code.contains("Internal") && !code.contains("Unavailable"),
            Self::Run(error) => matches!(error, CommandError::NotFound { .. }),
            _ => false,
        }
    }
}

impl Cli {
    /// A runner for one program, found on `PATH`.
    #[must_use]
    pub fn new(program: &'static str, env: Vec<(String, String)>, limits: Limits) -> Self {
        Self { program, env, limits, heard: Arc::default() }
    }

    /// The command line of a call, as an operator would type it.
    #[must_use]
    pub fn line(&self, args: &[String]) -> String {
        Command::new(self.program).args(args).argv()
    }

    /// Runs a call whatever its exit status means.
    ///
    /// # Errors
    /// [`CallError::Run`].
    pub async fn output(&self, args: &[String]) -> Result<Output, CallError> {
        let mut command = Command::new(self.program).args(args).timeout(self.limits.call);
        for (key, value) in &self.env {
            command = command.env(key, value);
        }
        let output = command.output().await?;
        let new = |text: &str| self.heard.lock().is_ok_and(|mut heard| heard.insert(text.to_owned()));
        if !output.stderr.is_empty() && new(&output.stderr) {
            tracing::info!(call = %self.line(args), stderr = %output.stderr, "the vendor's CLI had something to say");
        }
        Ok(output)
    }

    /// Runs a call that must end with status 0.
    ///
    /// # Errors
    /// [`CallError::Run`] and [`CallError::Failed`].
    pub async fn run(&self, args: &[String]) -> Result<Output, CallError> {
        let output = self.output(args).await?;
        if output.status.success() { Ok(output) } else { Err(self.failed(args, &output)) }
    }

    /// Runs a call that must end with status 0 and answer with JSON of this shape.
    ///
    /// # Errors
    /// As for [`Cli::run`], and [`CallError::Junk`].
    pub async fn json<T: DeserializeOwned>(&self, args: &[String]) -> Result<T, CallError> {
        let output = self.run(args).await?;
        serde_json::from_slice(&output.stdout).map_err(|source| self.junk(args, &output, source))
    }

    /// The error for a call that did not end with status 0.
    #[must_use]
    pub fn failed(&self, args: &[String], output: &Output) -> CallError {
        let answer = if output.stderr.is_empty() { excerpt(&output.stdout) } else { output.stderr.clone() };
        CallError::Failed { call: self.line(args), status: output.status, answer }
    }

    /// The error for a call whose answer is not the JSON that was expected.
    #[must_use]
    pub fn junk(&self, args: &[String], output: &Output, source: serde_json::Error) -> CallError {
        CallError::Junk { call: self.line(args), answer: excerpt(&output.stdout), source }
    }
}

/// Owned arguments from borrowed ones.
pub fn args<const N: usize>(words: [&str; N]) -> Args {
    words.iter().map(|word| (*word).to_owned()).collect()
}

fn excerpt(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes);
    let text = text.trim();
    if text.is_empty() {
        return "nothing at all".to_owned();
    }
    let mut short: String = text.chars().take(EXCERPT).collect();
    if short.len() < text.len() {
        short.push_str(" ...");
    }
    format!("{short:?}")
}

fn request(id: &str) -> String {
    if id.is_empty() { String::new() } else { format!(" (request {id})") }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn sh(script: &str) -> (Cli, Args) {
        (Cli::new("sh", Vec::new(), Limits::all(Duration::from_secs(10))), args(["-c", script]))
    }

    #[tokio::test]
    async fn a_warning_on_stderr_does_not_spoil_the_json() {
        let (cli, args) = sh("echo 'WARNING: new version' >&2; echo '[1]'");
        assert_eq!(cli.json::<Vec<u8>>(&args).await.unwrap(), [1]);
    }

    #[tokio::test]
    async fn a_failure_says_which_call_and_what_it_answered() {
        let (cli, args) = sh("echo 'ERROR: (gcloud.compute) no such instance' >&2; exit 1");
        let text = cli.run(&args).await.unwrap_err().to_string();
        assert!(text.contains("sh -c") && text.contains("no such instance") && text.contains('1'), "{text}");
    }

    #[tokio::test]
    async fn junk_is_quoted_and_cut() {
        let (cli, args) = sh("printf '<html>%01000d' 0");
        let text = cli.json::<Vec<u8>>(&args).await.unwrap_err().to_string();
        assert!(text.contains("<html>") && text.ends_with("...\"") && text.len() < 500, "{text}");
        let (cli, args) = sh("true");
        assert!(cli.json::<Vec<u8>>(&args).await.unwrap_err().to_string().contains("nothing at all"));
    }

    #[tokio::test]
    async fn a_hanging_call_is_ended_and_may_have_changed_something() {
        let (mut cli, args) = sh("sleep 60");
        cli.limits = Limits::all(Duration::from_millis(100));
        let error = cli.run(&args).await.unwrap_err();
        assert!(error.to_string().contains("did not finish within 0.1 s"), "{error}");
        assert!(!error.changed_nothing());
    }

    #[tokio::test]
    async fn the_environment_reaches_the_cli() {
        let (mut cli, args) = sh("printf '\"%s\"' \"$VOLCENGINE_REGION\"");
        cli.env = vec![("VOLCENGINE_REGION".to_owned(), "cn-beijing".to_owned())];
        assert_eq!(cli.json::<String>(&args).await.unwrap(), "cn-beijing");
    }

    #[test]
    fn a_refusal_is_told_from_an_internal_error() {
        let refused = |code: &str| CallError::Refused {
            call: "ve vpc CreateNetworkInterface".to_owned(),
            code: code.to_owned(),
            message: "m".to_owned(),
            request_id: "r".to_owned(),
        };
        assert!(refused("QuotaExceeded.Eni").changed_nothing());
        assert!(!refused("InternalError").changed_nothing());
        assert!(refused("InvalidEniId.NotFound").is_not_found());
        assert!(refused("AccountFlowLimitExceeded").is_throttled() && !refused("QuotaExceeded.Eni").is_throttled());
    }
}
