//! What `init` and `adopt` share: the host is made right and the state saved, or both are as they were.

use std::io::ErrorKind;
use std::path::Path;

use anyhow::{Context, Result, ensure};

use crate::command;
use crate::config::{NodeConfig, Platform};
use crate::files::{self, FileError, HOST_LOCK, LOCK_WAIT, LockFile, StateLock};
use crate::host::desired::{Desired, Rules};
use crate::host::firewall::Family;
use crate::host::observe::Observed;
use crate::host::plan::Plan;
use crate::host::{self, Host, Target};
use crate::log::chain;
use crate::pool::{self, Pool};

use super::changes::Changes;
use super::running::RunningDaemon;

/// Locks the state, having made sure that it can be written and that no daemon of another state runs here, before
/// anything is changed.
pub async fn lock_state(state_dir: &Path) -> Result<StateLock> {
    if let Some(daemon) = RunningDaemon::find()? {
        daemon.ensure_keeps(state_dir)?;
    }
    let lock = async {
        files::make_folders(state_dir, files::STATE_FOLDER_MODE)?;
        files::check_writable(state_dir)?;
        StateLock::acquire(state_dir, LOCK_WAIT).await
    };
    let locked = match lock.await {
        // A teardown removed the folder while we waited for it.
        Err(FileError::Io { source, .. }) if source.kind() == ErrorKind::NotFound => {
            files::make_folders(state_dir, files::STATE_FOLDER_MODE)?;
            StateLock::acquire(state_dir, LOCK_WAIT).await
        }
        locked => locked,
    };
    locked
        .inspect_err(|error| {
            // The folder of whoever holds the lock is theirs.
            if !matches!(error, FileError::Locked { .. }) {
                files::remove_made_folders(state_dir);
            }
        })
        .context("the state could not be locked and written, so nothing was changed")
}

/// Stops a command that would forget what an earlier one has claimed in a cloud: nothing would give it back.
pub fn ensure_claims_are_kept(earlier: Option<&Pool>, config: &NodeConfig, state_dir: &Path) -> Result<()> {
    let Some(earlier) = earlier.filter(|earlier| earlier.has_claims()) else { return Ok(()) };
    ensure!(
        earlier.config.platform == config.platform,
        "this node holds addresses of {} ({}), which nothing would give back, so nothing was changed; run `cocoon-net \
         teardown` first, or stay with --platform {}",
        earlier.config.platform,
        pool::path_in(state_dir).display(),
        earlier.config.platform
    );
    Ok(())
}

/// Makes the host right, then saves the state, or leaves both as they were. The host lock keeps a running daemon from
/// comparing a half-changed host with the old state.
pub async fn host_then_state(
    host: &Host,
    pool: &mut Pool,
    earlier: Option<&NodeConfig>,
    rules: Rules,
    state_dir: &Path,
) -> Result<()> {
    let _lock = LockFile::acquire(Path::new(HOST_LOCK), LOCK_WAIT).await?;
    let config = pool.config.clone();
    let target = Target::new(&config, rules).replacing(earlier);
    let before = host.observe(target).await.context("cannot look at this host, so it was left as it is")?;
    let change = async {
        let outcome = host.converge(target).await.context("cannot configure this host")?;
        pool.save(state_dir)?;
        Ok(outcome)
    };
    match super::unless_interrupted(change).await {
        Ok(outcome) => {
            if rules == Rules::Manage {
                clear_other_backend().await;
            }
            warn_about(&config, &outcome.after);
            Ok(())
        }
        Err(error) => Err(undone(error, host, target, &before).await),
    }
}

/// Removes rules of ours that an earlier run left in the backend that is no longer the host's, once those that replace
/// them stand.
async fn clear_other_backend() {
    for family in [Family::V4, Family::V6] {
        match host::clear_other_backend(family).await {
            Ok(0) => {}
            Ok(count) => {
                tracing::warn!(count, "rules of ours were stranded in the other iptables backend; removed them");
            }
            Err(error) => tracing::warn!(error = %chain(&error), "the other iptables backend cannot be seen to"),
        }
    }
}

/// Takes back what was done to the host, after `error`, and returns that error.
async fn undone(error: anyhow::Error, host: &Host, target: Target<'_>, before: &Observed) -> anyhow::Error {
    let reverted = host.revert(target, before).await;
    files::remove_made_folders(&target.config.cni_conf_dir);
    match reverted {
        Ok(()) => error,
        Err(failures) => {
            for failure in failures {
                tracing::error!(error = %chain(&failure), "could not undo a change");
            }
            error.context("the command failed, and not all of its changes could be undone (see the log above)")
        }
    }
}

/// The state that a dry run compares with. To others than root its folder is closed.
pub fn state_to_compare(state_dir: &Path, can_look: bool) -> Result<Option<Pool>> {
    match Pool::load_optional(state_dir) {
        Err(error) if !can_look && error.is_permission_denied() => Ok(None),
        state => Ok(state?),
    }
}

/// What the command would change on the host, compared with the host as far as it can be looked at.
pub async fn foretell(
    config: &NodeConfig,
    rules: Rules,
    earlier: Option<&NodeConfig>,
    can_look: bool,
) -> Result<Changes> {
    if can_look {
        let (plan, _) =
            Host::open_to_look()?.as_if_changing().plan(Target::new(config, rules).replacing(earlier)).await?;
        return Ok(Changes::of(&plan));
    }
    let nothing = Observed::default();
    let mut changes = Changes::of(&Plan::new(config, &Desired::for_node(config, rules, &nothing), &nothing));
    changes.note("not root: this is all that is wanted, not compared with the host");
    Ok(changes)
}

/// Adds the state file to what would change.
pub fn foretell_state(changes: &mut Changes, pool: &Pool, earlier: Option<&Pool>, state_dir: &Path) {
    let same = earlier.is_some_and(|old| Pool { updated_at: old.updated_at, ..pool.clone() } == *old);
    if !same {
        let old = earlier.map(Pool::to_json);
        changes.file(&pool::path_in(state_dir), old.as_deref(), Some(&pool.to_json()));
    }
}

/// Says what an operator would want to know although nothing failed.
fn warn_about(config: &NodeConfig, observed: &Observed) {
    for address in observed.own_addresses_in_drops(config) {
        if !config.drops.host {
            tracing::warn!(
                %address,
                "this address of the node lies inside a dropped range; drops are about forwarded traffic, so VMs still \
                 reach it (see --drop-host-access)"
            );
        }
    }
    for (target, rule) in observed.rewritten_targets(config) {
        tracing::warn!(
            %target, %rule,
            "a nat rule sends addresses of this drop target elsewhere before the drops see them, so VMs reach what is there"
        );
    }
    if let Some(warning) = observed.set_warning(config) {
        tracing::warn!("{warning}");
    }
    if observed.conflist_isolation().mac_spoof_check && command::find("nft").is_none() {
        tracing::warn!("the CNI configuration asks for macspoofchk, which needs `nft`; install nftables on this node");
    }
    for nic in config.uplinks().iter().filter(|nic| observed.link(nic.as_str()).is_none()) {
        tracing::warn!(interface = %nic, "there is no such interface: VM traffic cannot leave through it");
    }
    if config.platform != Platform::None && !config.drops.metadata {
        tracing::warn!(
            "VMs can reach the cloud's metadata service and read this node's credentials from it (see \
             --drop-metadata-access)"
        );
    }
}
