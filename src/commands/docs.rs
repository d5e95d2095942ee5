//! `completions` and `man`: made from the clap definitions, so that they are always true.

use std::io::{self, Write};
use std::path::Path;

use anyhow::{Context, Result};
use clap::CommandFactory;

use crate::cli::Cli;

/// Prints a completion script.
pub fn completions(shell: clap_complete::Shell) -> Result<()> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "cocoon-net", &mut script);
    io::stdout().write_all(&script).context("cannot write to stdout")
}

/// Writes `cocoon-net.8` and a page for each command.
pub fn man_pages(dir: &Path) -> Result<()> {
    let mut cli = Cli::command();
    cli.build();
    let commands = cli.get_subcommands().filter(|command| !command.is_hide_set() && command.get_name() != "help");
    for command in commands.chain([&cli]) {
        let name = command.get_display_name().unwrap_or_else(|| command.get_name()).to_owned();
        let path = dir.join(format!("{name}.8"));
        let page = clap_mangen::Man::new(command.clone()).section("8").title(name.clone());
        let mut text = Vec::new();
        page.render(&mut text).with_context(|| format!("cannot render the man page {name}"))?;
        std::fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(())
}
