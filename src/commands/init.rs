//! `init`: claim addresses in the cloud, make the host right, save the state.

use anyhow::{Context, Result};

use crate::cli::NodeArgs;
use crate::cloud::Cloud;
use crate::cloud::limits::Limits;
use crate::cloud::progress::Progress;
use crate::config::Platform;
use crate::files;
use crate::host::desired::Rules;
use crate::host::{Host, Target};
use crate::pool::Pool;

use super::configure;
use super::privileges;
use super::request::Request;

/// Addresses in the pool unless told otherwise: what Volcengine's seven ENIs hold.
const POOL_SIZE: usize = 140;

/// Runs `init`.
pub async fn run(args: NodeArgs) -> Result<()> {
    let request = Request::new(args, POOL_SIZE)?;
    if request.args().dry_run.dry_run {
        return dry_run(&request).await;
    }
    privileges::require("init")?;
    let state_dir = &request.args().state.state_dir;
    let config = request.resolve(true).await?;
    let cloud = Cloud::connect(config.platform, Limits::from_env(), Progress::Shown)?;
    let host = Host::open()?;

    let _lock = configure::lock_state(state_dir).await?;
    let earlier = Pool::load_optional(state_dir)?;
    configure::ensure_claims_are_kept(earlier.as_ref(), &config, state_dir)?;
    let mut pool = Pool::following(config.clone(), earlier.as_ref());
    if let Err(error) = claim_and_configure(&host, &cloud, &mut pool, earlier.as_ref(), &request).await {
        files::remove_made_folders(state_dir);
        return Err(error);
    }
    super::print_line(&format!(
        "cocoon-net init complete: {} IPs provisioned on {} ({})",
        pool.ips.len(),
        pool.config.subnet,
        pool.config.platform
    ))
}

async fn claim_and_configure(
    host: &Host,
    cloud: &Cloud,
    pool: &mut Pool,
    earlier: Option<&Pool>,
    request: &Request,
) -> Result<()> {
    // What would make isolation impossible is found out before the cloud is asked for anything.
    host.observe(Target::new(&pool.config, Rules::Manage))
        .await
        .context("cannot look at this host, so nothing was changed")?;
    let toggles = host.guard(&pool.config, Rules::Manage).await?;
    let config = earlier.map(|earlier| &earlier.config);
    let result = async {
        super::unless_interrupted(claim(cloud, pool, earlier, request)).await?;
        configure::host_then_state(host, pool, config, Rules::Manage, &request.args().state.state_dir).await
    };
    let result = result.await;
    if result.is_err() {
        toggles.restore().await;
    }
    result
}

/// Claims the addresses. Each step is in `pool.json` before the next, with the configuration of an earlier run until
/// everything is in hand, so that a daemon has what it had and `teardown` finds what there is.
async fn claim(cloud: &Cloud, pool: &mut Pool, earlier: Option<&Pool>, request: &Request) -> Result<()> {
    let state_dir = &request.args().state.state_dir;
    let mut save = |now: &mut Pool| match earlier {
        Some(earlier) => now.claims_over(earlier).save(state_dir),
        None => now.save(state_dir),
    };
    if pool.config.platform != Platform::None {
        save(pool).context("cannot save the state before the first cloud call, so none was made")?;
    }
    Ok(cloud.provision(pool, request.pool_size, &mut save).await?)
}

async fn dry_run(request: &Request) -> Result<()> {
    let can_look = privileges::can_look("init --dry-run");
    let config = request.resolve(can_look).await?;
    let state_dir = &request.args().state.state_dir;
    let earlier = configure::state_to_compare(state_dir, can_look)?;
    let mut pool = Pool::following(config.clone(), earlier.as_ref());
    let calls = Cloud::connect(config.platform, Limits::from_env(), Progress::Hidden)?.provision_changes(&pool).await?;

    let earlier_config = earlier.as_ref().map(|earlier| &earlier.config);
    let mut changes = configure::foretell(&config, Rules::Manage, earlier_config, can_look).await?.with_cloud(calls);
    if config.platform != Platform::Volcengine {
        pool.ips = config.subnet.pool(config.gateway, request.pool_size);
    } else if pool.ips.is_empty() {
        changes.note("the addresses are chosen by the cloud");
    }
    configure::foretell_state(&mut changes, &pool, earlier.as_ref(), state_dir);
    changes.print(request.args().dry_run.json)
}
