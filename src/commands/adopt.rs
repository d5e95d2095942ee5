//! `adopt`: take over addresses that are routed here already. No cloud call is made.

use anyhow::{Result, ensure};

use crate::cli::AdoptArgs;
use crate::files;
use crate::host::Host;
use crate::host::desired::Rules;
use crate::pool::Pool;

use super::configure;
use super::privileges;
use super::request::Request;

/// Addresses in the pool unless told otherwise: a /24 without its gateway.
const POOL_SIZE: usize = 253;

/// Runs `adopt`.
pub async fn run(args: AdoptArgs) -> Result<()> {
    let rules = if args.manage_iptables { Rules::Manage } else { Rules::Leave };
    let request = Request::new(args.node, POOL_SIZE)?;
    if request.args().dry_run.dry_run {
        return dry_run(&request, rules).await;
    }
    privileges::require("adopt")?;
    let state_dir = &request.args().state.state_dir;
    let config = request.resolve(true).await?;
    let host = Host::open()?;

    let _lock = configure::lock_state(state_dir).await?;
    let earlier = Pool::load_optional(state_dir)?;
    configure::ensure_claims_are_kept(earlier.as_ref(), &config, state_dir)?;
    if let Some(earlier) = earlier.as_ref().filter(|earlier| earlier.has_claims()) {
        ensure!(
            earlier.config.subnet == config.subnet,
            "this node holds addresses of {} in the cloud, which nothing would give back, so nothing was changed; run \
             `cocoon-net teardown` first",
            earlier.config.subnet
        );
    }
    let mut pool = adopted(&request, &config, earlier.as_ref());
    let earlier = earlier.as_ref().map(|earlier| &earlier.config);
    if let Err(error) = configure::host_then_state(&host, &mut pool, earlier, rules, state_dir).await {
        files::remove_made_folders(state_dir);
        return Err(error);
    }
    if rules == Rules::Leave && config.wants_isolation() {
        super::print_line(
            "iptables was left alone: the drops are saved, and take effect when the daemon starts \
             (or now, with --manage-iptables)",
        )?;
    }
    super::print_line(&format!(
        "cocoon-net adopt complete: {} IPs registered on {} ({}, cloud preserved)",
        pool.ips.len(),
        pool.config.subnet,
        pool.config.platform
    ))
}

fn adopted(request: &Request, config: &crate::config::NodeConfig, earlier: Option<&Pool>) -> Pool {
    let mut pool = Pool::following(config.clone(), earlier);
    pool.ips = config.subnet.pool(config.gateway, request.pool_size);
    pool
}

async fn dry_run(request: &Request, rules: Rules) -> Result<()> {
    let can_look = privileges::can_look("adopt --dry-run");
    let config = request.resolve(can_look).await?;
    let state_dir = &request.args().state.state_dir;
    let earlier = configure::state_to_compare(state_dir, can_look)?;
    let earlier_config = earlier.as_ref().map(|earlier| &earlier.config);
    let mut changes = configure::foretell(&config, rules, earlier_config, can_look).await?;
    if rules == Rules::Leave && config.wants_isolation() {
        changes.note("iptables is left alone: the drops take effect when the daemon starts");
    }
    configure::foretell_state(&mut changes, &adopted(request, &config, earlier.as_ref()), earlier.as_ref(), state_dir);
    changes.print(request.args().dry_run.json)
}
