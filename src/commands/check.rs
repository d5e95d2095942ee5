//! `check`: compares the host with `pool.json`, and with `--probe` proves isolation live. Read-only, but for the
//! probe's own throwaway namespaces.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::path::Path;

use anyhow::Result;
use serde::Serialize;
use serde_json::json;

use crate::cli::CheckArgs;
use crate::command;
use crate::config::{BRIDGE, NodeConfig};
use crate::dhcp::leases;
use crate::files::{LOCK_WAIT, StateLock};
use crate::host::backstop::{self, Backstop};
use crate::host::desired::{self, Rules};
use crate::host::firewall::{self, Backend, Family};
use crate::host::observe::Observed;
use crate::host::plan::{Drift, Plan};
use crate::host::probe::{self, IsolatedBy};
use crate::host::{Host, Target, cni};
use crate::log::chain;
use crate::pool::Pool;

use super::privileges;
use super::running::{self, RunningDaemon};

/// What came of looking at one thing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Verdict {
    Ok,
    Warn,
    Fail,
}

/// One line of the report.
#[derive(Debug, Clone, Serialize)]
struct Row {
    verdict: Verdict,
    what: &'static str,
    found: String,
}

/// The report.
#[derive(Debug, Default)]
struct Rows(Vec<Row>);

impl Rows {
    fn add(&mut self, verdict: Verdict, what: &'static str, found: impl Into<String>) {
        self.0.push(Row { verdict, what, found: found.into() });
    }

    /// A row for each difference of these kinds, or one that says what is right.
    fn of_kinds(&mut self, plan: &Plan, what: &'static str, kinds: &[Drift], right: impl Into<String>) {
        let mut found = plan.findings.iter().filter(|finding| kinds.contains(&finding.kind)).peekable();
        if found.peek().is_none() {
            self.add(Verdict::Ok, what, right);
        }
        for finding in found {
            // The kernel of a host may refuse these; isolation does not need them.
            let verdict = if finding.kind == Drift::OptionalSysctl { Verdict::Warn } else { Verdict::Fail };
            self.add(verdict, what, finding.text.clone());
        }
    }

    fn good(&self) -> bool {
        self.0.iter().all(|row| row.verdict != Verdict::Fail)
    }
}

/// Runs `check`. Returns whether the node is as it must be.
pub async fn run(args: CheckArgs) -> Result<bool> {
    privileges::require("check")?;
    let pool = Pool::load(&args.state.state_dir)?;
    let host = Host::open_to_look()?;
    let daemon = RunningDaemon::find()?;
    let (plan, observed) = host.plan(Target::new(&pool.config, Rules::Manage)).await?;

    let mut rows = Rows::default();
    rows_of_host(&mut rows, &pool.config, &plan, &observed);
    rows_of_other_backend(&mut rows).await?;
    rows_of_cni(&mut rows, &pool.config, &observed, daemon.is_some()).await;
    rows_of_daemon(&mut rows, &pool, daemon.as_ref(), &args.state.state_dir);
    rows_of_backstop(&mut rows, daemon.is_some()).await?;
    let proof =
        if args.probe { Some(prove(&pool, &args.state.state_dir, &observed, daemon.as_ref()).await?) } else { None };

    let good = rows.good() && proof.as_ref().is_none_or(|report| report.verdict == probe::Verdict::Holds);
    if args.json {
        super::print_line(&format!("{:#}", json!({"ok": good, "checks": rows.0, "probe": proof})))?;
    } else {
        let mut text = String::new();
        for Row { verdict, what, found } in &rows.0 {
            let verdict = match verdict {
                Verdict::Ok => "ok",
                Verdict::Warn => "WARN",
                Verdict::Fail => "FAIL",
            };
            let _ = writeln!(text, "{verdict:<5} {what:<15} {found}");
        }
        if let Some(report) = &proof {
            let _ = write!(text, "\n{}\n", report.to_table());
        }
        text.push_str(if good { "the node is as pool.json asks" } else { "the node is NOT as pool.json asks" });
        super::print_line(&text)?;
    }
    Ok(good)
}

/// Everything that a plan would repair.
fn rows_of_host(rows: &mut Rows, config: &NodeConfig, plan: &Plan, observed: &Observed) {
    for obstacle in &plan.obstacles {
        rows.add(Verdict::Fail, "host", obstacle.clone());
    }
    let targets = config.drop_targets();
    let toggles =
        if targets.is_empty() { "not needed: nothing forwarded is dropped" } else { "bridged frames pass iptables" };
    rows.of_kinds(plan, "bridge toggle", &[Drift::BridgeToggle], toggles);
    let rules = [
        Drift::RulesMissing,
        Drift::RulesShadowed,
        Drift::RulesMasked,
        Drift::RulesStale,
        Drift::RulesDuplicated,
        Drift::RulesDormant,
    ];
    let right = match config.isolation_summary() {
        summary if targets.is_empty() => format!("{summary}; ACCEPT and MASQUERADE rules are in place"),
        summary => format!("{summary}; at the head of FORWARD: {}", list(&targets)),
    };
    rows.of_kinds(plan, "rules", &rules, right);
    if desired::needs_set(config) || plan.kinds().contains(&Drift::Set) {
        rows.of_kinds(plan, "ipset", &[Drift::Set], "holds every drop target");
    }
    rows.of_kinds(plan, "bridge", &[Drift::Bridge], format!("{BRIDGE} is up with {}", config.gateway));
    rows_of_ports(rows, config, plan, observed);
    rows.of_kinds(plan, "uplinks", &[Drift::Uplink], list(config.uplinks()));
    for nic in config.uplinks().iter().filter(|nic| observed.link(nic.as_str()).is_none()) {
        rows.add(Verdict::Warn, "uplinks", format!("there is no interface {nic}"));
    }
    rows.of_kinds(plan, "sysctls", &[Drift::Sysctl, Drift::OptionalSysctl], "forwarding is on, rp_filter is off");
    if config.platform == crate::config::Platform::Gke {
        rows.of_kinds(plan, "local route", &[Drift::LocalRoute], "the guest agent's route is not there");
        rows.of_kinds(plan, "cron file", &[Drift::Cron], "in place");
    }
    rows.of_kinds(plan, "conflist", &[Drift::Conflist], config.conflist_path().display().to_string());
    for address in observed.own_addresses_in_drops(config) {
        if !config.drops.host {
            let found = format!(
                "{address} of this node lies inside a dropped range and VMs still reach it; see --drop-host-access"
            );
            rows.add(Verdict::Warn, "node address", found);
        }
    }
    for (target, rule) in observed.rewritten_targets(config) {
        let found = format!("nat sends addresses of {target} elsewhere before its drop sees them: {rule}");
        rows.add(Verdict::Warn, "nat", found);
    }
    if let Some(warning) = observed.set_warning(config) {
        rows.add(Verdict::Warn, "ipset", warning);
    }
}

/// Each port, and who asked for its isolation.
fn rows_of_ports(rows: &mut Rows, config: &NodeConfig, plan: &Plan, observed: &Observed) {
    const WHAT: &str = "port isolation";
    if !desired::wanted_isolation(config, observed).ports {
        return rows.add(Verdict::Ok, WHAT, "not asked for");
    }
    if !config.drops.internal {
        let path = config.conflist_path();
        rows.add(Verdict::Ok, WHAT, format!("asked for by {} alone, which had the key already", path.display()));
    }
    rows.of_kinds(plan, WHAT, &[Drift::PortIsolation], format!("{} ports", observed.ports().count()));
    for port in observed.ports().filter(|port| port.isolated) {
        rows.add(Verdict::Ok, WHAT, format!("port {} is isolated", port.name));
    }
}

/// Rules of ours in the backend that plain `iptables` does not show: enforced, and nobody sees why.
async fn rows_of_other_backend(rows: &mut Rows) -> Result<()> {
    const WHAT: &str = "other backend";
    let Some(backend) = firewall::other_backend().await? else { return Ok(()) };
    let name = if backend == Backend::Nft { "iptables-nft" } else { "iptables-legacy" };
    let mut stranded = Vec::new();
    for family in [Family::V4, Family::V6] {
        let rules = match firewall::read_other(family, backend).await {
            Ok(rules) => rules,
            Err(error) => {
                rows.add(Verdict::Fail, WHAT, format!("what stands in {name} cannot be read: {}", chain(&error)));
                continue;
            }
        };
        stranded.extend(rules.ours().map(|(table, chain, saved)| format!("{table} {chain}: {}", saved.rule.text())));
    }
    match stranded.first() {
        None => rows.add(Verdict::Ok, WHAT, format!("no rule of ours seen in {name}")),
        Some(first) => rows.add(
            Verdict::Fail,
            WHAT,
            format!(
                "{} of our rules stranded in {name}, enforced unseen; the daemon, or another init, removes them: {first}",
                stranded.len()
            ),
        ),
    }
    Ok(())
}

async fn rows_of_cni(rows: &mut Rows, config: &NodeConfig, observed: &Observed, daemon: bool) {
    const WHAT: &str = "CNI plugin";
    let isolation = desired::wanted_isolation(config, observed);
    if isolation.mac_spoof_check && command::find("nft").is_none() {
        rows.add(
            Verdict::Warn,
            WHAT,
            "macspoofchk needs `nft`, which is not installed: a VM may take a neighbour's MAC",
        );
    }
    let Some(plugin) = cni::bridge_plugin() else {
        return rows.add(Verdict::Ok, WHAT, "no `bridge` plugin is installed");
    };
    let (knows, version) = cni::knows_port_isolation(&plugin).await;
    let path = plugin.display();
    match knows {
        _ if !isolation.ports => rows.add(Verdict::Ok, WHAT, format!("{path}, {version}")),
        Some(true) => rows.add(Verdict::Ok, WHAT, format!("{path}, {version}, isolates ports")),
        _ if daemon => rows.add(
            Verdict::Warn,
            WHAT,
            format!("{path}, {version}: before 1.7 it ignores portIsolation; the daemon isolates the ports instead"),
        ),
        Some(false) => rows.add(
            Verdict::Fail,
            WHAT,
            format!(
                "{path}, {version}, ignores portIsolation (1.7 is the first to know it), and no daemon isolates ports"
            ),
        ),
        None => rows.add(
            Verdict::Fail,
            WHAT,
            format!("{path}, {version}: it may not know portIsolation (since 1.7), and no daemon isolates ports"),
        ),
    }
}

fn rows_of_daemon(rows: &mut Rows, pool: &Pool, daemon: Option<&RunningDaemon>, state_dir: &Path) {
    match daemon {
        Some(daemon) if !daemon.keeps(state_dir) => rows.add(
            Verdict::Fail,
            "daemon",
            format!("{} goes by another state, {}", daemon.holder, daemon.state_dir().unwrap_or_default().display()),
        ),
        Some(daemon) if daemon.skips_iptables() && pool.config.wants_isolation() => rows.add(
            Verdict::Fail,
            "daemon",
            format!("{} writes no rules although drops are asked for; run it without --skip-iptables", daemon.holder),
        ),
        Some(daemon) => rows.add(Verdict::Ok, "daemon", format!("running, {}", daemon.holder)),
        None => rows.add(Verdict::Fail, "daemon", "not running: nothing keeps isolation true; start cocoon-net daemon"),
    }
    if pool.ips.is_empty() {
        rows.add(Verdict::Fail, "pool", "empty: an init was not finished; run it again, or teardown");
    }
}

/// Blackhole routes are the daemon's answer to a siege; without a daemon they only wait to be forgotten.
async fn rows_of_backstop(rows: &mut Rows, daemon: bool) -> Result<()> {
    if Backstop::open(BRIDGE)?.stands().await? {
        let why = if daemon {
            "something keeps undoing the rules, or they cannot be read: see the daemon's log for what"
        } else {
            "a daemon ended under siege has left it; the next one, or teardown, takes it down"
        };
        rows.add(
            Verdict::Warn,
            "backstop",
            format!("routing table {} leads the drop targets nowhere: {why}", backstop::TABLE),
        );
    }
    Ok(())
}

async fn prove(
    pool: &Pool,
    state_dir: &Path,
    observed: &Observed,
    daemon: Option<&RunningDaemon>,
) -> Result<probe::Report> {
    // Two probes would take each other's interfaces for leftovers.
    let _lock = StateLock::acquire(state_dir, LOCK_WAIT).await?;
    let config = &pool.config;
    let isolation = desired::wanted_isolation(config, observed).ports;
    let by_plugin = match cni::bridge_plugin() {
        Some(plugin) => cni::knows_port_isolation(&plugin).await.0 == Some(true),
        None => false,
    };
    let isolated_by = match (isolation, daemon.is_some()) {
        (true, true) => IsolatedBy::Daemon,
        (true, false) if by_plugin => IsolatedBy::CniPlugin,
        _ => IsolatedBy::Nobody,
    };
    let leased: BTreeSet<_> =
        leases::read(&running::lease_file(daemon, state_dir))?.into_iter().map(|lease| lease.ip).collect();
    let request = probe::Request {
        bridge: BRIDGE.to_owned(),
        gateway: config.gateway,
        subnet: config.subnet.net(),
        internal: config.drops.internal,
        host: config.drops.host,
        targets: config.drop_targets().into_iter().filter(|target| *target != config.subnet.net()).collect(),
        pool: pool.ips.iter().copied().collect(),
        leased,
        isolated_by,
    };
    Ok(probe::run(&request).await?)
}

fn list<T: ToString>(items: impl IntoIterator<Item = T>) -> String {
    let texts: Vec<String> = items.into_iter().map(|item| item.to_string()).collect();
    match texts.len() {
        0..=6 => texts.join(", "),
        count => format!("{}, ... ({count} in all)", texts[..5].join(", ")),
    }
}
