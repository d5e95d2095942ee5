//! From flags to a validated [`NodeConfig`].

use std::net::Ipv4Addr;

use anyhow::Result;

use crate::cli::NodeArgs;
use crate::cloud::metadata;
use crate::config::{self, BRIDGE, ConfigError, Drops, InterfaceName, NodeConfig, Platform};
use crate::host::links::Links;

/// A value that is good by itself but not beside the others: wrong usage, as a bad value is.
#[derive(Debug, thiserror::Error)]
#[error("invalid value for `{flag}`")]
pub struct UsageError {
    /// The flag.
    pub flag: &'static str,
    /// Why the value was refused.
    #[source]
    pub source: ConfigError,
}

/// What was asked for, checked as far as it can be without looking at anything.
#[derive(Debug, Clone)]
pub struct Request {
    args: NodeArgs,
    gateway: Ipv4Addr,
    /// Addresses that the pool may hold at most.
    pub pool_size: usize,
}

impl Request {
    /// Checks the flags against each other. `usual_pool_size` applies when none was given.
    pub fn new(args: NodeArgs, usual_pool_size: usize) -> Result<Self, UsageError> {
        let gateway = args.gateway.unwrap_or_else(|| args.subnet.first_host());
        let refuse = |flag| move |source| UsageError { flag, source };
        config::check_gateway(args.subnet, gateway).map_err(refuse("--gateway"))?;
        if let Some(nic) = args.primary_nic.as_ref().filter(|nic| nic.as_str() == BRIDGE) {
            return Err(refuse("--primary-nic")(ConfigError::BridgeAsUplink(nic.clone())));
        }
        let pool_size = args.pool_size.unwrap_or(usual_pool_size);
        let room = args.subnet.pool(gateway, pool_size).len();
        if room == 0 {
            return Err(refuse("--subnet")(ConfigError::EmptyPool));
        }
        if args.pool_size.is_some_and(|wanted| room < wanted) {
            tracing::warn!(subnet = %args.subnet, wanted = pool_size, room, "the subnet holds fewer addresses than asked for");
        }
        Ok(Self { args, gateway, pool_size })
    }

    /// The flags.
    pub fn args(&self) -> &NodeArgs {
        &self.args
    }

    /// Fills in what depends on where we are: the platform and the uplink.
    pub async fn resolve(&self, can_look: bool) -> Result<NodeConfig> {
        let platform = match self.args.platform {
            Some(platform) => platform,
            None => metadata::detect().await?,
        };
        let primary_nic = match self.args.primary_nic.clone() {
            Some(nic) => nic,
            None => default_uplink(platform, can_look).await?,
        };
        let args = &self.args;
        let config = NodeConfig {
            platform,
            node_name: args.node_name.clone(),
            subnet: args.subnet,
            gateway: self.gateway,
            primary_nic,
            secondary_nics: platform.secondary_nics(),
            dns: args.dns.0.clone(),
            drops: Drops {
                internal: args.drop_internal_access,
                cidrs: args.drop_cidr.iter().copied().collect(),
                metadata: args.drop_metadata_access,
                host: args.drop_host_access,
            },
            mtu: args.mtu,
            // The daemon runs elsewhere.
            cni_conf_dir: std::path::absolute(&args.cni_conf_dir).unwrap_or_else(|_| args.cni_conf_dir.clone()),
        };
        Ok(config.checked().map_err(|source| UsageError { flag: "--primary-nic", source })?)
    }
}

/// The default route's interface, else the one that the platform usually has.
async fn default_uplink(platform: Platform, can_look: bool) -> Result<InterfaceName> {
    let found = if can_look { Links::open(false)?.default_route_interface().await? } else { None };
    Ok(found.filter(|nic| nic.as_str() != BRIDGE).unwrap_or_else(|| platform.usual_primary_nic()))
}
