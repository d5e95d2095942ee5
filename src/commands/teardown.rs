//! `teardown`: stop the daemon, give the addresses back, remove everything of ours, and last the state.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::cli::TeardownArgs;
use crate::cloud::Cloud;
use crate::cloud::limits::Limits;
use crate::cloud::progress::Progress;
use crate::files::{self, HOST_LOCK, LOCK_WAIT, LockFile, PID_FILE, StateLock};
use crate::host::Host;
use crate::pool::{self, Pool, PoolError};

use super::changes::Changes;
use super::privileges;
use super::running::{self, RunningDaemon};

/// How long the daemon may take to stop: it saves its leases.
const DAEMON_WAIT: Duration = Duration::from_secs(20);

/// Runs `teardown`.
pub async fn run(args: TeardownArgs) -> Result<()> {
    let state_dir = &args.state.state_dir;
    if args.dry_run.dry_run {
        return dry_run(state_dir, args.dry_run.json).await;
    }
    privileges::require("teardown")?;
    // Before the lock: without a state there may be no folder to lock.
    load(state_dir)?;
    let daemon = RunningDaemon::find()?;
    if let Some(daemon) = &daemon {
        daemon.ensure_keeps(state_dir)?;
    }
    let _lock = StateLock::acquire(state_dir, LOCK_WAIT).await?;
    let mut pool = load(state_dir)?;
    let platform = pool.config.platform;
    let lease_file = running::lease_file(daemon.as_ref(), state_dir);
    stop_daemon().await?;

    let mut failures: Vec<anyhow::Error> = Vec::new();
    if let Err(error) = give_back(&mut pool, state_dir).await {
        failures.push(error);
    }
    if let Err(errors) = clear_host(&pool).await {
        failures.extend(errors);
    }
    if failures.is_empty() {
        // A daemon that was killed has left its PID file. One that was started meanwhile holds it, and goes by itself.
        drop(LockFile::acquire(Path::new(PID_FILE), Duration::ZERO).await);
        failures.extend(remove_state(state_dir, &lease_file).err());
        files::remove_made_folders(&pool.config.cni_conf_dir);
        files::remove_made_folders(state_dir);
    }
    for failure in &failures {
        tracing::error!(error = %format!("{failure:#}"), "a part could not be torn down");
    }
    if let Some(first) = failures.into_iter().next() {
        return Err(first.context(format!(
            "teardown is not complete; {} is kept, so run `cocoon-net teardown` again once the cause is gone",
            pool::path_in(state_dir).display()
        )));
    }
    super::print_line(&format!("cocoon-net teardown complete ({platform})"))
}

fn load(state_dir: &Path) -> Result<Pool> {
    match Pool::load(state_dir) {
        Err(error @ PoolError::Missing(_)) => Err(error).context("nothing to tear down"),
        pool => Ok(pool?),
    }
}

/// Tells a running daemon to stop, and waits until it has.
async fn stop_daemon() -> Result<()> {
    let deadline = Instant::now() + DAEMON_WAIT;
    let mut told = None;
    while let Some(holder) = files::daemon(Path::new(PID_FILE))? {
        if holder.pid != told
            && let Some(pid) = holder.pid
        {
            tracing::info!(pid, "telling the daemon to stop");
            match kill(Pid::from_raw(pid), Signal::SIGTERM) {
                // It has ended by itself meanwhile.
                Ok(()) | Err(Errno::ESRCH) => {}
                Err(error) => return Err(error).with_context(|| format!("cannot stop the daemon, {holder}")),
            }
            told = Some(pid);
        }
        if Instant::now() >= deadline {
            bail!(
                "the daemon, {holder}, did not stop within {} s, so nothing was torn down; end it, then try again",
                DAEMON_WAIT.as_secs()
            );
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    Ok(())
}

async fn give_back(pool: &mut Pool, state_dir: &Path) -> Result<()> {
    let cloud = Cloud::connect(pool.config.platform, Limits::from_env(), Progress::Shown)?;
    Ok(cloud.teardown(pool, &mut |pool| pool.save(state_dir)).await?)
}

async fn clear_host(pool: &Pool) -> Result<(), Vec<anyhow::Error>> {
    let one = |error: anyhow::Error| vec![error];
    let _lock = LockFile::acquire(Path::new(HOST_LOCK), LOCK_WAIT).await.map_err(|error| one(error.into()))?;
    let host = Host::open().map_err(|error| one(error.into()))?;
    host.clear(&pool.config).await.map_err(|errors| errors.into_iter().map(anyhow::Error::from).collect())
}

/// Leases first: without `pool.json` nobody would look for them.
fn remove_state(state_dir: &Path, lease_file: &Path) -> Result<()> {
    for path in lease_files(state_dir, lease_file)? {
        files::remove(&path)?;
    }
    files::remove(&pool::path_in(state_dir))?;
    Ok(())
}

/// The files of the leases: in the state folder, and where the daemon was told to have them.
fn lease_files(state_dir: &Path, lease_file: &Path) -> Result<BTreeSet<PathBuf>> {
    let folder = std::fs::read_dir(state_dir).with_context(|| format!("cannot read {}", state_dir.display()))?;
    let beside = folder.flatten().filter(|entry| entry.file_name().to_str().is_some_and(is_beside_the_pool));
    let elsewhere = [lease_file.to_owned(), lease_file.with_extension("journal")];
    let elsewhere = elsewhere.into_iter().filter(|path| path.exists());
    Ok(beside.map(|entry| entry.path()).chain(elsewhere).collect())
}

/// The lease file, its journal, one that was being made, those that were moved aside, and what a killed writer left.
fn is_beside_the_pool(name: &str) -> bool {
    let whole = matches!(name, "leases.json" | "leases.journal" | "leases.journal.new");
    let aside = ["leases.json.corrupt-", "leases.journal.corrupt-"].iter().any(|aside| name.starts_with(aside));
    whole || aside || files::is_scratch(name)
}

async fn dry_run(state_dir: &Path, as_json: bool) -> Result<()> {
    let can_look = privileges::can_look("teardown --dry-run");
    let pool = load(state_dir)?;
    let cloud = Cloud::connect(pool.config.platform, Limits::from_env(), Progress::Hidden)?;
    let calls = cloud.teardown_changes(&pool).await?;
    let mut changes = if can_look {
        Changes::of(&Host::open_to_look()?.plan_to_clear(&pool.config).await?)
    } else {
        let mut changes = Changes::default();
        changes.note("not root: what is on the host could not be looked at");
        changes
    }
    .with_cloud(calls);
    let daemon = RunningDaemon::find()?;
    if let Some(daemon) = &daemon {
        daemon.ensure_keeps(state_dir)?;
        changes.note(format!("the daemon, {}, is told to stop first", daemon.holder));
    }
    for path in lease_files(state_dir, &running::lease_file(daemon.as_ref(), state_dir))? {
        changes.file(&path, Some(""), None);
    }
    changes.file(&pool::path_in(state_dir), Some(&pool.to_json()), None);
    changes.print(as_json)
}
