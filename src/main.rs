//! cocoon-net: logging, the runtime, the whole error chain and the exit status. Everything else is in the library.

use std::io::{self, IsTerminal, Write};
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::Parser;
use cocoon_net::cli::{Cli, USAGE_STATUS};
use cocoon_net::commands::{self, UsageError};
use tracing_subscriber::filter::LevelFilter;

fn main() -> ExitCode {
    let cli = Cli::parse();
    match start(cli) {
        Ok(code) => code,
        Err(error) => {
            if logs_json() {
                tracing::error!("{error:#}");
            } else {
                // Nowhere is left to report to when stderr is closed.
                let _ = writeln!(io::stderr(), "error: {error:#}");
            }
            if error.is::<UsageError>() { ExitCode::from(USAGE_STATUS) } else { ExitCode::FAILURE }
        }
    }
}

fn start(cli: Cli) -> Result<ExitCode> {
    set_up_logging();
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().context("cannot start the runtime")?;
    runtime.block_on(commands::run(cli))
}

fn logs_json() -> bool {
    std::env::var("COCOON_NET_LOG_FORMAT").is_ok_and(|format| format == "json")
}

fn set_up_logging() {
    let asked = std::env::var("COCOON_NET_LOG_LEVEL").unwrap_or_default();
    let level = match asked.to_ascii_lowercase().as_str() {
        "debug" => Some(LevelFilter::DEBUG),
        "" | "info" => Some(LevelFilter::INFO),
        "warn" => Some(LevelFilter::WARN),
        "error" => Some(LevelFilter::ERROR),
        _ => None,
    };
    let log = tracing_subscriber::fmt()
        .with_max_level(level.unwrap_or(LevelFilter::INFO))
        .with_target(false)
        .with_ansi(io::stderr().is_terminal())
        .with_writer(io::stderr);
    if logs_json() {
        log.json().init();
    } else {
        log.init();
    }
    if level.is_none() {
        tracing::warn!(level = asked, "COCOON_NET_LOG_LEVEL is none of debug, info, warn and error; taken for info");
    }
}
