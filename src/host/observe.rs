//! What the host looks like. Reads, and never writes.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;

use ipnet::Ipv4Net;

use super::cni::Isolation;
use super::desired::{Rules, needs_set};
use super::drops::Forwarded;
use super::firewall::{Family, Ruleset};
use super::guest_agent;
use super::ipset::{self, SetState};
use super::links::{Link, Mac};
use super::sysctl;
use super::{Host, HostError, Target};
use crate::config::{BRIDGE, InterfaceName, NodeConfig, Platform};
use crate::files;

/// Everything about the host that a plan depends on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Observed {
    /// IPv4 rules; empty where rules are not ours to write.
    pub v4: Ruleset,
    /// IPv6 rules.
    pub v6: Ruleset,
    /// The set of drop targets.
    pub set: SetState,
    /// Network interfaces.
    pub links: Vec<Link>,
    /// Kernel parameters that could be read.
    pub sysctls: BTreeMap<String, String>,
    /// The CNI configuration, if there is one.
    pub conflist: Option<Vec<u8>>,
    /// The CNI configuration in the folder of an earlier configuration of this node, if that was another one.
    pub retired_conflist: Option<Vec<u8>>,
    /// The isolation keys that the CNI configuration had before it was lost, if it was.
    pub lost_isolation: Isolation,
    /// The cron file, if there is one.
    pub cron: Option<Vec<u8>>,
    /// Whether the guest agent's local route is there.
    pub local_route: bool,
    /// Addresses that have the route of a lease; read only when the node is given back.
    pub lease_routes: Vec<Ipv4Addr>,
    /// The Ethernet address that the bridge had at the last look that found the host as wanted: VMs know it.
    pub bridge_mac_before: Option<Mac>,
    /// What was dropped up to the last look that found the host as wanted, by rules that may since be gone.
    pub dropped_before: Forwarded,
}

impl Default for Observed {
    fn default() -> Self {
        Self {
            v4: Ruleset::default(),
            v6: Ruleset::default(),
            set: SetState::Absent,
            links: Vec::new(),
            sysctls: BTreeMap::new(),
            conflist: None,
            retired_conflist: None,
            lost_isolation: Isolation::default(),
            cron: None,
            local_route: false,
            lease_routes: Vec::new(),
            bridge_mac_before: None,
            dropped_before: Forwarded::default(),
        }
    }
}

/// How much is looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scope {
    /// What keeping the node true depends on.
    Node,
    /// That, and what giving it back must find.
    Everything,
}

impl Observed {
    /// Looks at the host, also at what an earlier configuration has left where the target does not look.
    ///
    /// # Errors
    /// [`HostError`] when any part cannot be read: what was not seen must not be taken for absent.
    pub async fn read(host: &Host, target: Target<'_>, scope: Scope) -> Result<Self, HostError> {
        let Target { config, rules, earlier, .. } = target;
        let (v4, v6, set) = match rules {
            Rules::Manage => {
                let (v4, v6, set) = tokio::join!(
                    host.read_rules(Family::V4),
                    host.read_rules(Family::V6),
                    ipset::read(needs_set(config))
                );
                let v4 = v4?;
                let set = match host.set_refused().or_else(|| host.set_was_refused(config, &v4)) {
                    Some(reason) => SetState::Unavailable(reason),
                    None => set?,
                };
                (v4, v6?, set)
            }
            Rules::Leave => (Ruleset::default(), Ruleset::default(), SetState::Absent),
        };
        let links = host.links.read().await?;
        let index = |name: &str| links.iter().find(|link| link.name == name).map(|link| link.index);

        let local_route = match index(config.primary_nic.as_str()) {
            Some(nic) if config.platform == Platform::Gke => {
                host.links.has_local_route(nic, config.subnet.net()).await?
            }
            _ => false,
        };
        let lease_routes = match index(BRIDGE) {
            Some(bridge) if scope == Scope::Everything => host.links.lease_routes(bridge, config.subnet.net()).await?,
            _ => Vec::new(),
        };
        let conf = |interface: &str| format!("net/ipv4/conf/{interface}/rp_filter");
        let uplinks = config.uplinks().iter().map(InterfaceName::as_str);
        let keys: Vec<String> = [sysctl::BRIDGE_CALLS_IPTABLES, sysctl::BRIDGE_CALLS_IP6TABLES, sysctl::IP_FORWARD]
            .into_iter()
            .map(str::to_owned)
            .chain(["all", "default", BRIDGE].into_iter().chain(uplinks).map(conf))
            .collect();
        let conflist = files::read_optional(&config.conflist_path())?;
        Ok(Self {
            v4,
            v6,
            set,
            sysctls: sysctl::read_all(keys.iter().map(String::as_str)),
            links,
            lost_isolation: host.lost_isolation(conflist.as_deref()),
            conflist,
            retired_conflist: match earlier.map(NodeConfig::conflist_path) {
                Some(path) if path != config.conflist_path() => files::read_optional(&path)?,
                _ => None,
            },
            cron: files::read_optional(&guest_agent::cron_path())?,
            local_route,
            lease_routes,
            bridge_mac_before: host.bridge_mac_before(),
            dropped_before: host.dropped_before(),
        })
    }

    /// The interface of this name.
    #[must_use]
    pub fn link(&self, name: &str) -> Option<&Link> {
        self.links.iter().find(|link| link.name == name)
    }

    /// The bridge, if there is an interface of its name.
    #[must_use]
    pub fn bridge(&self) -> Option<&Link> {
        self.link(BRIDGE)
    }

    /// The ports of the bridge.
    pub fn ports(&self) -> impl Iterator<Item = &Link> {
        let bridge = self.bridge().map(|bridge| bridge.index);
        self.links.iter().filter(move |link| link.master.is_some() && link.master == bridge)
    }

    /// MTU of an interface in bytes.
    #[must_use]
    pub fn mtu_of(&self, nic: &InterfaceName) -> Option<u32> {
        self.link(nic.as_str()).map(|link| link.mtu)
    }

    /// The isolation keys that the CNI configuration already has, be it where another one was.
    #[must_use]
    pub fn conflist_isolation(&self) -> Isolation {
        let keys = |conflist: &Option<Vec<u8>>| conflist.as_deref().and_then(Isolation::of).unwrap_or_default();
        keys(&self.conflist).or(keys(&self.retired_conflist)).or(self.lost_isolation)
    }

    /// Why sets cannot be had on this host, if they cannot.
    #[must_use]
    pub fn set_unavailable(&self) -> Option<&str> {
        match &self.set {
            SetState::Unavailable(reason) => Some(reason),
            SetState::Absent | SetState::Present(_) => None,
        }
    }

    /// A warning when the drops would be in a set but the host has none.
    #[must_use]
    pub fn set_warning(&self, config: &NodeConfig) -> Option<String> {
        let reason = self.set_unavailable().filter(|_| needs_set(config))?;
        Some(format!(
            "{} drop targets are plain rules, since no ipset can be had ({reason}): each packet of this node passes all \
             of them, about 33 ns a rule with nft and 5 ns with legacy; install ipset to make it one rule",
            config.drop_targets().len()
        ))
    }

    /// Drop targets of which nat rules send some addresses elsewhere, each with the first such rule: the drops look at
    /// a packet only after that, as they do for the service addresses of Kubernetes.
    #[must_use]
    pub fn rewritten_targets(&self, config: &NodeConfig) -> BTreeMap<Ipv4Net, String> {
        const KEEPS_DESTINATION: [&str; 6] = ["RETURN", "ACCEPT", "DROP", "MARK", "LOG", "MASQUERADE"];
        let targets = config.drop_targets();
        let mut rewritten = BTreeMap::new();
        for (chain, rule) in self.v4.rules("nat").filter(|(chain, rule)| *chain != "POSTROUTING" && !rule.is_ours()) {
            let jumps = rule.argument("-j").is_some_and(|to| !KEEPS_DESTINATION.contains(&to));
            let range: Option<Ipv4Net> = rule.argument("-d").filter(|_| jumps).and_then(|range| range.parse().ok());
            let Some(range) = range else { continue };
            for target in targets.iter().filter(|target| target.contains(&range) || range.contains(*target)) {
                rewritten.entry(*target).or_insert_with(|| format!("-A {chain} {}", rule.text()));
            }
        }
        rewritten
    }

    /// Addresses of the node that lie inside a dropped range. The drops are about forwarded traffic, so these stay
    /// reachable for the VMs.
    #[must_use]
    pub fn own_addresses_in_drops(&self, config: &NodeConfig) -> Vec<Ipv4Addr> {
        let targets = config.drops.cidrs.iter().map(|cidr| cidr.net()).collect::<Vec<_>>();
        let own = self.links.iter().filter(|link| link.name != "lo").flat_map(|link| &link.addresses);
        own.map(Ipv4Net::addr).filter(|address| targets.iter().any(|target| target.contains(address))).collect()
    }
}
