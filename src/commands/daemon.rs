//! `daemon`: make the host as `pool.json` asks, keep it so, and serve DHCP, until told to stop.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use sd_notify::NotifyState;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::watch::{Receiver, channel};
use tokio::task::JoinHandle;

use crate::cli::DaemonArgs;
use crate::config::BRIDGE;
use crate::dhcp;
use crate::dhcp::leases;
use crate::files::{self, LockFile, PID_FILE, StateLock};
use crate::host::backstop::Backstop;
use crate::host::desired::{self, Rules};
use crate::host::firewall::Backend;
use crate::host::{Host, ipset};
use crate::log::chain;
use crate::metrics::{self, Health, Metrics};
use crate::pool::{self, Pool};
use crate::reconcile::{Listeners, Options, Reconciler};
use crate::systemd::notify;
use crate::watch::{self, Watch};

use super::privileges;

/// How long a daemon that is started during a `teardown` or `init` waits for its end.
const STATE_WAIT: Duration = Duration::from_secs(300);

/// Time between two tries to listen for scrapes of the metrics.
const METRICS_RETRY: Duration = Duration::from_secs(10);

/// Long enough for somebody who only looks whether the PID file is locked.
const PID_FILE_WAIT: Duration = Duration::from_millis(200);

/// Runs the daemon.
pub async fn run(args: DaemonArgs) -> Result<()> {
    privileges::require("daemon")?;
    let mut stop = StopSignals::listen()?;
    let mut hangup = signal(SignalKind::hangup()).context("cannot listen for SIGHUP")?;
    if let Some(other) = files::daemon(Path::new(PID_FILE))? {
        bail!("a daemon runs on this node already, {other}; stop it first");
    }
    let mut pid_file = LockFile::acquire(Path::new(PID_FILE), PID_FILE_WAIT)
        .await
        .context("another daemon may be running on this node")?;
    pid_file.write(&format!("{}\n", std::process::id()))?;

    let pool = tokio::select! {
        pool = load_pool(&args.state.state_dir) => pool?,
        () = stop.received() => return Ok(()),
    };
    let (health, health_seen) = channel(Health::Unhealthy("starting".to_owned()));
    let (grants, grants_seen) = channel(false);
    let metrics = Arc::new(Metrics::new());
    let options = Options {
        state_dir: args.state.state_dir.clone(),
        rules: if args.skip_iptables { Rules::Leave } else { Rules::Manage },
        quarantine: args.quarantine,
    };
    let listeners = Listeners { metrics: Arc::clone(&metrics), health, grants };
    let mut node = Reconciler::new(Host::open()?, Backstop::open(BRIDGE)?, pool, options, listeners);

    let dhcp = dhcp_config(&node, &args);
    let preparation = dhcp::Preparation::begin(&dhcp.interface, &dhcp.lease_file).context("cannot serve DHCP")?;
    let mut watch = tokio::select! {
        started = configure(&mut node, &args) => started?,
        () = stop.received() => return Ok(()),
    };
    let mut scrapes = metrics.scrapes();
    let _endpoint = serve_metrics(&args, &metrics, &health_seen).await;
    let mut server = dhcp::Server::start(preparation, dhcp_config(&node, &args), grants_seen, metrics)
        .await
        .context("cannot serve DHCP")?;
    notify(&[NotifyState::Ready]);
    tokio::spawn(feed_watchdog());
    tracing::info!(pool = node.pool().ips.len(), subnet = %node.pool().config.subnet, "ready");

    let mut served = dhcp_config(&node, &args);
    loop {
        tokio::select! {
            () = stop.received() => break,
            error = server.died() => return Err(error).context("the DHCP server ended"),
            Some(scrape) = scrapes.recv() => {
                // In a siege reading is left to the passes.
                if !watch.besieged() {
                    node.count_drops().await;
                }
                // Whoever scrapes may have gone away.
                let _ = scrape.send(());
            }
            _ = hangup.recv() => {
                tracing::info!("SIGHUP: reading pool.json again");
                watch.request();
            }
            wake = watch.next() => {
                let outcome = tokio::select! {
                    outcome = node.pass(Some(&wake)) => outcome.unwrap_or_else(|error| error.outcome()),
                    () = stop.received() => break,
                };
                watch.passed(outcome);
                if watch.besieged() && !node.backstop_stands() {
                    node.raise_backstop().await;
                }
                watch.set_backstop(node.can_do_without_rules());
                watch.watch_files(watched_files(node.pool(), &args.state.state_dir));
                watch.watch_set(set_to_watch(&node));
                if node.bridge_mended() {
                    server.check_routes()?;
                }
                let wanted = dhcp_config(&node, &args);
                if wanted != served && !wanted.addresses.is_empty() {
                    server.reload(wanted.clone())?;
                    served = wanted;
                }
            }
        }
    }
    tracing::info!("stopping: leases are saved, rules stay");
    notify(&[NotifyState::Stopping]);
    server.stop().await.context("cannot save the leases")
}

/// Serves the metrics, now or as soon as their port is free: isolation and leases do not wait for it.
async fn serve_metrics(args: &DaemonArgs, metrics: &Arc<Metrics>, health: &Receiver<Health>) -> JoinHandle<()> {
    let (addr, metrics, health) = (args.metrics_addr.clone(), Arc::clone(metrics), health.clone());
    let first = metrics::serve(&addr, Arc::clone(&metrics), health.clone()).await;
    tokio::spawn(async move {
        let mut served = first;
        loop {
            match served {
                Ok(_endpoint) => return std::future::pending().await,
                Err(error) => tracing::error!(error = %chain(&error), "there are no metrics until this is mended"),
            }
            tokio::time::sleep(METRICS_RETRY).await;
            served = metrics::serve(&addr, Arc::clone(&metrics), health.clone()).await;
        }
    })
}

/// Reads the state once nobody is changing it: after a `teardown` there is none, and nothing to do.
async fn load_pool(state_dir: &Path) -> Result<Pool> {
    if state_dir.is_dir() {
        StateLock::acquire(state_dir, STATE_WAIT).await?;
    }
    let pool = Pool::load(state_dir)?;
    ensure!(
        !pool.ips.is_empty(),
        "{} holds no addresses: an init was not finished; run `cocoon-net init` again",
        pool::path_in(state_dir).display()
    );
    Ok(pool)
}

/// Makes the host right for the first time, then watches it: what changes in between the watch's own first call finds.
/// What cannot be verified ends the daemon, with the rules that stand left standing and, if so told, the bridge down.
async fn configure(node: &mut Reconciler, args: &DaemonArgs) -> Result<Watch> {
    if let Err(error) = node.pass(None).await {
        if args.quarantine {
            node.quarantine_unless_isolated().await;
        }
        return Err(error).context("this node could not be configured, so the daemon does not start");
    }
    let mut watch = Watch::open(watch::Options {
        bridge: BRIDGE.to_owned(),
        interval: args.reconcile_interval,
        files: watched_files(node.pool(), &args.state.state_dir),
        ruleset: ruleset(node, args.skip_iptables),
    })?;
    watch.watch_set(set_to_watch(node));
    Ok(watch)
}

/// How changes of the rules make themselves known on this host. There are rules of ours by now.
fn ruleset(node: &Reconciler, skip_iptables: bool) -> watch::Ruleset {
    match node.backend() {
        _ if skip_iptables => watch::Ruleset::Unwatched,
        Backend::Legacy => {
            watch::Ruleset::Legacy { save: vec!["iptables-save".to_owned(), "ip6tables-save".to_owned()] }
        }
        Backend::Nft | Backend::Host => watch::Ruleset::Nftables,
    }
}

fn watched_files(pool: &Pool, state_dir: &Path) -> Vec<PathBuf> {
    vec![pool::path_in(state_dir), pool.config.conflist_path()]
}

fn set_to_watch(node: &Reconciler) -> Option<&'static str> {
    desired::needs_set(&node.pool().config).then_some(ipset::SET)
}

fn dhcp_config(node: &Reconciler, args: &DaemonArgs) -> dhcp::Config {
    let pool = node.pool();
    dhcp::Config {
        interface: BRIDGE.to_owned(),
        subnet: pool.config.subnet,
        gateway: pool.config.gateway,
        addresses: pool.ips.clone(),
        dns: pool.config.dns.clone(),
        mtu: node.mtu(),
        lease_time: args.lease_time,
        port_lease_limit: args.port_lease_limit,
        lease_file: args.lease_file.clone().unwrap_or_else(|| leases::path_in(&args.state.state_dir)),
    }
}

/// Tells systemd, if it listens, that this process is alive (`sd_watchdog_enabled(3)`).
async fn feed_watchdog() {
    let Some(timeout) = sd_notify::watchdog_enabled() else { return };
    let mut beat = tokio::time::interval(timeout / 2);
    loop {
        beat.tick().await;
        notify(&[NotifyState::Watchdog]);
    }
}

/// SIGTERM and SIGINT.
struct StopSignals {
    terminate: Signal,
    interrupt: Signal,
}

impl StopSignals {
    fn listen() -> Result<Self> {
        let listen = |kind| signal(kind).context("cannot listen for signals");
        Ok(Self { terminate: listen(SignalKind::terminate())?, interrupt: listen(SignalKind::interrupt())? })
    }

    async fn received(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}
