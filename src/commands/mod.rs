//! The commands: one file each, each the story of its command.

mod adopt;
mod changes;
mod check;
mod configure;
mod daemon;
mod docs;
mod init;
mod privileges;
mod request;
mod running;
mod status;
mod teardown;

use std::future::Future;
use std::io::Write;
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::cli::{Cli, Command};

pub use request::UsageError;

/// Exit status of `check` when the node is not as it must be.
const NOT_AS_WANTED: u8 = 3;

/// Runs a command.
///
/// # Errors
/// Whatever ended the command, with every cause. A [`UsageError`] among them means that it was called wrongly.
pub async fn run(cli: Cli) -> Result<ExitCode> {
    match cli.command {
        Command::Init(args) => init::run(args).await.map(|()| ExitCode::SUCCESS),
        Command::Adopt(args) => adopt::run(args).await.map(|()| ExitCode::SUCCESS),
        Command::Daemon(args) => daemon::run(args).await.map(|()| ExitCode::SUCCESS),
        Command::Status(args) => unless_interrupted(status::run(args)).await.map(|()| ExitCode::SUCCESS),
        Command::Check(args) => {
            let good = unless_interrupted(check::run(args)).await?;
            Ok(if good { ExitCode::SUCCESS } else { ExitCode::from(NOT_AS_WANTED) })
        }
        Command::Teardown(args) => unless_interrupted(teardown::run(args)).await.map(|()| ExitCode::SUCCESS),
        Command::Completions { shell } => docs::completions(shell).map(|()| ExitCode::SUCCESS),
        Command::Man { dir } => docs::man_pages(&dir).map(|()| ExitCode::SUCCESS),
    }
}

/// Runs something that a signal ends as a failure does, so that what it leaves can be undone.
async fn unless_interrupted<T>(work: impl Future<Output = Result<T>>) -> Result<T> {
    let mut interrupt = signal(SignalKind::interrupt()).context("cannot listen for signals")?;
    let mut terminate = signal(SignalKind::terminate()).context("cannot listen for signals")?;
    let mut hangup = Hangup::listen()?;
    tokio::select! {
        result = work => result,
        _ = interrupt.recv() => bail!("interrupted; run the same command again to carry on"),
        _ = terminate.recv() => bail!("told to stop; run the same command again to carry on"),
        () = hangup.received() => bail!("the terminal is gone; run the same command again to carry on"),
    }
}

/// SIGHUP, which nohup(1) has a command ignore.
struct Hangup(Option<Signal>);

impl Hangup {
    fn listen() -> Result<Self> {
        let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
        let ignored = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
        if ignored.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).is_some_and(|mask| mask & 1 == 1) {
            return Ok(Self(None));
        }
        Ok(Self(Some(signal(SignalKind::hangup()).context("cannot listen for signals")?)))
    }

    async fn received(&mut self) {
        match &mut self.0 {
            Some(hangup) => drop(hangup.recv().await),
            None => std::future::pending().await,
        }
    }
}

/// Prints one line of result on stdout.
fn print_line(line: &str) -> Result<()> {
    writeln!(std::io::stdout(), "{line}").context("cannot write to stdout")
}
