//! The firewall: which rules stand, which are wanted, and one transaction from the one to the other.
//!
//! Rules are read by `iptables-save -c` and written by one `iptables-restore --noflush` for each address family, so
//! that every table changes as a whole or not at all.

mod diff;
mod masked;
mod rule;
mod save;
mod tables;

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::Duration;

pub use diff::{Action, ChainRules, RuleChange, Transaction, diff};
pub use rule::{DROP_TAG, Rule, RuleError, TAG};
pub use save::{Counters, Ruleset, SaveError, SavedRule, Table};

use crate::command::{self, Command, CommandError};
use crate::netlink::{NFPROTO_IPV4, NFPROTO_IPV6};

/// The built-in chains that there are in the tables we use.
const BUILT_IN: [&str; 5] = ["PREROUTING", "INPUT", "FORWARD", "OUTPUT", "POSTROUTING"];

/// How long iptables may wait for the xtables lock, in seconds.
const LOCK_WAIT_SECONDS: &str = "10";

/// How long an iptables tool may take in all.
const TIMEOUT: Duration = Duration::from_secs(20);

/// How long reading may take while somebody else keeps writing. iptables-nft starts over whenever the ruleset has changed
/// meanwhile, and so may never end, at full speed.
const TIMEOUT_IN_SIEGE: Duration = Duration::from_secs(1);

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
    /// What iptables does not show of its tables in nftables cannot be told.
    #[error("cannot list the tables and rules of nftables")]
    Tables(#[source] std::io::Error),
    /// A table would not be put on its hooks, or taken off.
    #[error(
        "cannot change whether packets meet the rules of table `{family} {table}`; `nft add table {family} {table}` \
         wakes one that is dormant, unless it belongs to a running process"
    )]
    Hook {
        /// The family, as nft names it.
        family: &'static str,
        /// The table.
        table: String,
        /// What the kernel answered.
        source: std::io::Error,
    },
    /// The transaction was refused: nothing of the table it broke in has changed.
    #[error("cannot write the rules{}", lock_hint(.0))]
    Write(#[source] CommandError),
}

impl FirewallError {
    /// Whether planning again may help: the tool ran and refused the transaction. One that waited for the xtables lock in
    /// vain has waited long enough.
    #[must_use]
    pub fn is_refusal(&self) -> bool {
        matches!(self, Self::Write(error @ CommandError::Failed { .. }) if !is_about_the_lock(error))
    }
}

impl Family {
    /// The number that netlink knows it by (linux/netfilter.h).
    fn protocol(self) -> u8 {
        match self {
            Self::V4 => NFPROTO_IPV4,
            Self::V6 => NFPROTO_IPV6,
        }
    }

    /// The name of the family in nft(8).
    #[must_use]
    pub fn nft(self) -> &'static str {
        match self {
            Self::V4 => "ip",
            Self::V6 => "ip6",
        }
    }

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

/// Reads every rule with its counters, and which tables are off their hooks.
///
/// # Errors
/// [`FirewallError`] unless the tool exits 0 and all of what it printed was understood.
pub async fn read(family: Family, backend: Backend) -> Result<Ruleset, FirewallError> {
    read_within(TIMEOUT, family, backend).await
}

/// The same where it is better to know nothing than to find out at any cost.
///
/// # Errors
/// As for [`read`].
pub async fn read_in_siege(family: Family, backend: Backend) -> Result<Ruleset, FirewallError> {
    read_within(TIMEOUT_IN_SIEGE, family, backend).await
}

async fn read_within(timeout: Duration, family: Family, backend: Backend) -> Result<Ruleset, FirewallError> {
    let tool = family.tool(backend, "-save");
    let output = Command::new(&tool).arg("-c").timeout(timeout).run().await.map_err(FirewallError::Read)?;
    let mut ruleset = Ruleset::parse(&output.text()).map_err(|source| FirewallError::Parse { tool, source })?;
    if backend != Backend::Host {
        ruleset.printed_by = Some(backend);
    } else if ruleset.printed_by.is_none() {
        ruleset.printed_by = Some(host_backend().await?);
    }
    if ruleset.is_nft() {
        ruleset.dormant = tables::dormant(family).map_err(FirewallError::Tables)?;
        masked::mark(family, &mut ruleset).map_err(FirewallError::Tables)?;
    }
    Ok(ruleset)
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

/// Puts the chains of a table of nftables on their hooks, or takes them off.
///
/// # Errors
/// [`FirewallError::Hook`].
pub fn set_dormant(family: Family, table: &str, dormant: bool) -> Result<(), FirewallError> {
    tables::set_dormant(family, table, dormant).map_err(|source| FirewallError::Hook {
        family: family.nft(),
        table: table.to_owned(),
        source,
    })
}

/// Which backend plain `iptables` uses.
///
/// # Errors
/// [`FirewallError::Read`] when `iptables` cannot be run.
pub async fn host_backend() -> Result<Backend, FirewallError> {
    // Another program of this name is asked anew.
    let asked = command::find("iptables").and_then(|path| Program::of(&path));
    if let (Some(program), Ok(known)) = (&asked, KNOWN_BACKEND.lock())
        && let Some((_, backend)) = known.as_ref().filter(|(of, _)| of == program)
    {
        return Ok(*backend);
    }
    let version =
        Command::new("iptables").arg("--version").timeout(TIMEOUT).run().await.map_err(FirewallError::Read)?;
    // Versions before 1.8 know one backend and do not name it.
    let backend = if version.text().contains("nf_tables") { Backend::Nft } else { Backend::Legacy };
    if let (Some(program), Ok(mut known)) = (asked, KNOWN_BACKEND.lock()) {
        *known = Some((program, backend));
    }
    Ok(backend)
}

/// What `iptables` said of itself, and which program that was.
static KNOWN_BACKEND: Mutex<Option<(Program, Backend)>> = Mutex::new(None);

/// A program behind all its links: where it is, and what changes when it is replaced.
#[derive(Debug, PartialEq, Eq)]
struct Program {
    path: PathBuf,
    device: u64,
    inode: u64,
    size: u64,
    modified: (i64, i64),
}

impl Program {
    fn of(path: &Path) -> Option<Self> {
        let path = path.canonicalize().ok()?;
        let file = path.metadata().ok()?;
        let modified = (file.mtime(), file.mtime_nsec());
        Some(Self { path, device: file.dev(), inode: file.ino(), size: file.size(), modified })
    }
}

/// The backend that plain `iptables` does not use, if its tools are installed.
///
/// # Errors
/// As for [`host_backend`].
pub async fn other_backend() -> Result<Option<Backend>, FirewallError> {
    let other = if host_backend().await? == Backend::Nft { Backend::Legacy } else { Backend::Nft };
    Ok(command::find(&Family::V4.tool(other, "-save")).map(|_| other))
}

/// Reads the rules of a family in the backend that is not the host's. Where the kernel has no tables there, or cannot
/// have any, no tool is asked.
///
/// # Errors
/// As for [`read`].
pub async fn read_other(family: Family, backend: Backend) -> Result<Ruleset, FirewallError> {
    let any = match backend {
        Backend::Legacy => has_legacy_tables(family),
        _ => tables::any(family).map_err(FirewallError::Tables)?,
    };
    if any { read(family, backend).await } else { Ok(Ruleset::default()) }
}

/// Whether x_tables holds any table of a family; a table is made by the first that looks at it.
fn has_legacy_tables(family: Family) -> bool {
    let names = match family {
        Family::V4 => "/proc/net/ip_tables_names",
        Family::V6 => "/proc/net/ip6_tables_names",
    };
    match std::fs::read_to_string(names) {
        Ok(names) => !names.trim().is_empty(),
        // Only root may read it; the tool then says why it cannot.
        Err(error) => error.kind() != std::io::ErrorKind::NotFound,
    }
}

/// Removes the tables that iptables-nft made for our rules, where nothing is left in them. Whether that is so is asked
/// of `nft`: iptables shows a table as empty that holds sets, maps or native chains of somebody else's.
///
/// # Errors
/// [`FirewallError::Write`] when `nft` refuses.
pub async fn remove_blank_nft_tables(family: Family) -> Result<(), FirewallError> {
    let tables: &[&str] = match family {
        Family::V4 => &["filter", "nat"],
        Family::V6 => &["filter"],
    };
    let family = family.nft();
    for table in tables {
        let listed = nft().args(["-j", "list", "table", family, table]).run().await;
        // A table that is not there is as good as one that is removed.
        let Ok(listed) = listed else { continue };
        if let Some(chains) = blank_chains(&listed.stdout) {
            // Chains first: the kernel refuses that for one that got a rule meanwhile, and with it the transaction.
            let chains = chains.iter().map(|chain| format!("delete chain {family} {table} {chain}\n"));
            let script = chains.chain([format!("delete table {family} {table}\n")]).collect::<String>();
            nft().args(["-f", "-"]).stdin(script).run().await.map_err(FirewallError::Write)?;
        }
    }
    Ok(())
}

fn nft() -> Command {
    Command::new("nft").timeout(TIMEOUT)
}

/// The chains of a table, as `nft -j list table` prints it, that holds nothing but built-in chains with policy accept.
fn blank_chains(json: &[u8]) -> Option<Vec<String>> {
    let listed: serde_json::Value = serde_json::from_slice(json).ok()?;
    let mut chains = Vec::new();
    for object in listed["nftables"].as_array()? {
        let (kind, contents) = object.as_object()?.iter().next()?;
        match kind.as_str() {
            "metainfo" | "table" => {}
            "chain" if contents["policy"] == "accept" => {
                chains.push(contents["name"].as_str().filter(|name| BUILT_IN.contains(name))?.to_owned());
            }
            _ => return None,
        }
    }
    Some(chains)
}

/// Exit status 4 is `RESOURCE_PROBLEM`, which is more than the lock.
fn is_about_the_lock(error: &CommandError) -> bool {
    error.exit_code() == Some(4) && error.to_string().contains("lock")
}

fn lock_hint(error: &CommandError) -> &'static str {
    if is_about_the_lock(error) { ": another program holds the xtables lock; try again when it is done" } else { "" }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_with_anything_of_somebody_elses_is_not_blank() {
        let table = |objects: &str| {
            let json = format!(r#"{{"nftables":[{{"metainfo":{{}}}},{{"table":{{"name":"filter"}}}}{objects}]}}"#);
            blank_chains(json.as_bytes())
        };
        let forward = r#",{"chain":{"name":"FORWARD","hook":"forward","policy":"accept"}}"#;
        assert_eq!(table(forward), Some(vec!["FORWARD".to_owned()]));
        assert_eq!(table(""), Some(Vec::new()));
        for theirs in [
            r#",{"chain":{"name":"FORWARD","hook":"forward","policy":"drop"}}"#,
            r#",{"chain":{"name":"input","hook":"input","policy":"accept"}}"#,
            r#",{"chain":{"name":"DOCKER"}}"#,
            r#",{"rule":{"chain":"FORWARD"}}"#,
            r#",{"set":{"name":"banned"}}"#,
        ] {
            assert_eq!(table(&format!("{forward}{theirs}")), None, "{theirs}");
        }
        assert_eq!(blank_chains(b"junk"), None);
    }
}
