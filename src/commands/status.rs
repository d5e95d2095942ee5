//! `status`: the pool, the leases, and each drop target with what it has dropped.

use std::path::Path;

use anyhow::Result;
use serde_json::json;

use crate::cli::StatusArgs;
use crate::cloud::limits::Limits;
use crate::cloud::progress::Progress;
use crate::cloud::{Cloud, StatusRows};
use crate::dhcp::leases::{self, Lease};
use crate::host::desired::Rules;
use crate::host::drops::{self, DropTarget};
use crate::host::{Host, Target};
use crate::log::chain;
use crate::pool::Pool;

use super::privileges;
use super::running::{self, RunningDaemon};

/// Runs `status`.
pub async fn run(args: StatusArgs) -> Result<()> {
    let can_look = privileges::can_look("status");
    let state_dir = &args.state.state_dir;
    let pool = Pool::load(state_dir)?;
    let cloud = cloud_rows(&pool).await;
    let leases = active_leases(&running::lease_file(RunningDaemon::find()?.as_ref(), state_dir));
    let looked = if can_look { look(&pool).await } else { None };
    if args.json {
        let drops = looked.as_ref().map(|looked| looked.drops.as_slice());
        return super::print_line(&format!("{:#}", to_json(&pool, &cloud, &leases, drops)));
    }
    super::print_line(&to_text(&pool, &cloud, &leases, looked.as_ref()))
}

/// What was found on the host.
struct Looked {
    drops: Vec<DropTarget>,
    host_is_closed: bool,
}

/// What the cloud adds; left out with a warning when it cannot be reached.
async fn cloud_rows(pool: &Pool) -> StatusRows {
    let rows = async { Cloud::connect(pool.config.platform, Limits::from_env(), Progress::Hidden)?.status(pool).await };
    rows.await.unwrap_or_else(|error| {
        tracing::warn!(error = %chain(&error), "the cloud could not be asked");
        Vec::new()
    })
}

fn active_leases(path: &Path) -> Vec<Lease> {
    let now = jiff::Timestamp::now();
    match leases::read(path) {
        Ok(leases) => leases.into_iter().filter(|lease| lease.expiry > now).collect(),
        Err(error) => {
            tracing::warn!(error = %chain(&error), "the leases could not be read");
            Vec::new()
        }
    }
}

async fn look(pool: &Pool) -> Option<Looked> {
    let look = async { Host::open_to_look()?.plan(Target::new(&pool.config, Rules::Manage)).await };
    match look.await {
        Ok((plan, observed)) => Some(Looked {
            drops: drops::read(&pool.config, &observed, &plan),
            host_is_closed: drops::host_is_closed(&plan),
        }),
        Err(error) => {
            tracing::warn!(error = %chain(&error), "the rules could not be read");
            None
        }
    }
}

fn to_text(pool: &Pool, cloud: &StatusRows, leases: &[Lease], looked: Option<&Looked>) -> String {
    let config = &pool.config;
    let updated = pool.updated_at.strftime("%Y-%m-%dT%H:%M:%SZ").to_string();
    let mut rows: Vec<(&str, String)> = vec![
        ("Platform", config.platform.to_string()),
        ("Node", config.node_name.to_string()),
        ("Subnet", config.subnet.to_string()),
        ("Gateway", config.gateway.to_string()),
        ("IPs", pool.ips.len().to_string()),
        ("Updated", updated),
    ];
    rows.extend(cloud.iter().cloned());
    rows.push(("Leases", format!("{} active, {} free", leases.len(), pool.ips.len().saturating_sub(leases.len()))));
    let targets = config.drop_targets();
    let lines: Vec<String> = match looked {
        Some(looked) => looked
            .drops
            .iter()
            .map(|drop| {
                let state = if drop.enforced { "enforced" } else { "NOT ENFORCED" };
                format!("{:<18} {state}, {} packets dropped", drop.cidr.to_string(), drop.packets)
            })
            .collect(),
        None => targets.iter().map(|cidr| format!("{:<18} not looked at", cidr.to_string())).collect(),
    };
    for (number, line) in lines.into_iter().enumerate() {
        rows.push((if number == 0 { "Drops" } else { "" }, line));
    }
    if config.drops.host {
        let state = match looked {
            Some(looked) if looked.host_is_closed => "new connections from VMs to this node are dropped",
            Some(_) => "NOT ENFORCED: VMs may open connections to this node",
            None => "not looked at",
        };
        rows.push(("Host", state.to_owned()));
    }
    let label = |label: &str| if label.is_empty() { String::new() } else { format!("{label}:") };
    rows.iter().map(|(name, value)| format!("{:<12}{value}", label(name))).collect::<Vec<_>>().join("\n")
}

fn to_json(pool: &Pool, cloud: &StatusRows, leases: &[Lease], drops: Option<&[DropTarget]>) -> serde_json::Value {
    let config = &pool.config;
    let lease =
        |lease: &Lease| json!({"mac": lease.mac.to_string(), "ip": lease.ip, "expiry": lease.expiry.to_string()});
    json!({
        "platform": config.platform.name(),
        "node": config.node_name.as_str(),
        "subnet": config.subnet.to_string(),
        "gateway": config.gateway,
        "ips": pool.ips.len(),
        "updated": pool.updated_at.to_string(),
        "cloud": cloud.iter().map(|(name, value)| ((*name).to_owned(), json!(value))).collect::<serde_json::Map<_, _>>(),
        "leases": leases.iter().map(lease).collect::<Vec<_>>(),
        "drops": drops,
        "dropInternalAccess": config.drops.internal,
        "dropMetadataAccess": config.drops.metadata,
        "dropHostAccess": config.drops.host,
    })
}
