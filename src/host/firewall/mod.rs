//! The firewall: which rules stand, which are wanted, and one transaction from the one to the other.
//!
//! Rules are read by `iptables-save -c` and written by one `iptables-restore --noflush` for each address family, so
//! that every table changes as a whole or not at all.

mod diff;
mod rule;
mod save;

use std::time::Duration;

pub use diff::{Action, ChainRules, RuleChange, Transaction, diff};
pub use rule::{DROP_TAG, Rule, RuleError, TAG};
pub use save::{Counters, Ruleset, SaveError, SavedRule, Table};

use crate::command::{self, Command, CommandError};

/// How long iptables may wait for the xtables lock, in seconds.
const LOCK_WAIT_SECONDS: &str = "10";

/// How long an iptables tool may take in all.
const TIMEOUT: Duration = Duration::from_secs(20);

/// An address family with iptables tools of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Family {
    /// `iptables`
    V4,
    /// `ip6tables`
    V6,
}

/// Which kernel interface the tools speak to. Rules made through one cannot be seen through the other, and both are
/// enforced.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Backend {
    /// The one that plain `iptables` uses on this host.
    Host,
    /// nf_tables.
    Nft,
    /// The older x_tables.
    Legacy,
}

/// Why the rules could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum FirewallError {
    /// The tool failed.
    #[error("cannot read the rules")]
    Read(#[source] CommandError),
    /// What the tool printed cannot be relied on.
    #[error("cannot rely on what `{tool}` printed")]
    Parse {
        /// The tool.
        tool: String,
        /// What is wrong with it.
        source: SaveError,
    },
    /// The transaction was refused: nothing of the table it broke in has changed.
    #[error("cannot write the rules{}", lock_hint(.0))]
    Write(#[source] CommandError),
}

impl FirewallError {
    /// Whether planning again may help: the tool ran and refused the transaction.
    #[must_use]
    pub fn is_refusal(&self) -> bool {
        matches!(self, Self::Write(CommandError::Failed { .. }))
    }
}

impl Family {
    /// The name of a tool of this family: `iptables-save`, `ip6tables-legacy-restore`, ...
    #[must_use]
    pub fn tool(self, backend: Backend, verb: &str) -> String {
        let family = match self {
            Self::V4 => "iptables",
            Self::V6 => "ip6tables",
        };
        match backend {
            Backend::Host => format!("{family}{verb}"),
            Backend::Nft => format!("{family}-nft{verb}"),
            Backend::Legacy => format!("{family}-legacy{verb}"),
        }
    }
}

/// Reads every rule with its counters.
///
/// # Errors
/// [`FirewallError`] unless the tool exits 0 and all of what it printed was understood.
pub async fn read(family: Family, backend: Backend) -> Result<Ruleset, FirewallError> {
    let tool = family.tool(backend, "-save");
    let output = Command::new(&tool).arg("-c").timeout(TIMEOUT).run().await.map_err(FirewallError::Read)?;
    Ruleset::parse(&output.text()).map_err(|source| FirewallError::Parse { tool, source })
}

/// Runs a transaction, if there is anything in it.
///
/// # Errors
/// [`FirewallError::Write`]; [`FirewallError::is_refusal`] tells whether planning again may help.
pub async fn write(family: Family, backend: Backend, transaction: &Transaction) -> Result<(), FirewallError> {
    if transaction.is_empty() {
        return Ok(());
    }
    let restore = Command::new(family.tool(backend, "-restore"))
        .args(["--noflush", "--counters", "--wait", LOCK_WAIT_SECONDS])
        .stdin(transaction.restore_input())
        .timeout(TIMEOUT);
    restore.run().await.map(drop).map_err(FirewallError::Write)
}

/// Which backend plain `iptables` uses.
///
/// # Errors
/// [`FirewallError::Read`] when `iptables` cannot be run.
pub async fn host_backend() -> Result<Backend, FirewallError> {
    let version =
        Command::new("iptables").arg("--version").timeout(TIMEOUT).run().await.map_err(FirewallError::Read)?;
    // Versions before 1.8 know one backend and do not name it.
    Ok(if version.text().contains("nf_tables") { Backend::Nft } else { Backend::Legacy })
}

/// The backend that plain `iptables` does not use, if its tools are installed.
///
/// # Errors
/// As for [`host_backend`].
pub async fn other_backend() -> Result<Option<Backend>, FirewallError> {
    let other = if host_backend().await? == Backend::Nft { Backend::Legacy } else { Backend::Nft };
    Ok(command::find(&Family::V4.tool(other, "-save")).map(|_| other))
}

/// Removes nf_tables tables that hold nothing, as iptables-nft leaves them behind. A table that holds anything stays:
/// the chains are deleted first, which the kernel refuses for a chain with rules, and with them the whole transaction.
///
/// # Errors
/// [`FirewallError::Write`] when `nft` refuses.
pub async fn remove_blank_nft_tables(family: Family, ruleset: &Ruleset) -> Result<(), FirewallError> {
    let name = match family {
        Family::V4 => "ip",
        Family::V6 => "ip6",
    };
    let mut script = String::new();
    for (table, contents) in ruleset.tables().filter(|(_, contents)| contents.is_blank()) {
        for (chain, _) in &contents.chains {
            // iptables-save prints built-in chains that are not there; adding one makes the deletion good either way.
            script.push_str(&format!("add chain {name} {table} {chain}\ndelete chain {name} {table} {chain}\n"));
        }
        script.push_str(&format!("delete table {name} {table}\n"));
    }
    if script.is_empty() {
        return Ok(());
    }
    Command::new("nft")
        .args(["-f", "-"])
        .stdin(script)
        .timeout(TIMEOUT)
        .run()
        .await
        .map(drop)
        .map_err(FirewallError::Write)
}

fn lock_hint(error: &CommandError) -> &'static str {
    if error.exit_code() == Some(4) {
        ": another program holds the xtables lock; try again when it is done"
    } else {
        ""
    }
}
