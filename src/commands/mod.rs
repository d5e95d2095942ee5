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
mod status;
mod teardown;

use std::process::ExitCode;

use anyhow::Result;

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
        Command::Status(args) => status::run(args).await.map(|()| ExitCode::SUCCESS),
        Command::Check(args) => {
            check::run(args).await.map(|good| if good { ExitCode::SUCCESS } else { ExitCode::from(NOT_AS_WANTED) })
        }
        Command::Teardown(args) => teardown::run(args).await.map(|()| ExitCode::SUCCESS),
        Command::Completions { shell } => docs::completions(shell).map(|()| ExitCode::SUCCESS),
        Command::Man { dir } => docs::man_pages(&dir).map(|()| ExitCode::SUCCESS),
    }
}

/// Prints one line of result on stdout.
fn print_line(line: &str) -> Result<()> {
    use anyhow::Context;
    use std::io::Write;
    writeln!(std::io::stdout(), "{line}").context("cannot write to stdout")
}
