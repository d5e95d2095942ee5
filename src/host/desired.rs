//! What the host must look like. Pure: no thinking about how to get there.

use std::collections::BTreeSet;
use std::fmt::Display;

use ipnet::Ipv4Net;
use serde_json::Value;

use super::cni;
use super::firewall::{ChainRules, DROP_TAG, Rule, TAG};
use super::guest_agent;
use super::ipset;
use super::observe::Observed;
use super::sysctl::{self, Setting};
use crate::config::{BRIDGE, InterfaceName, NodeConfig, Platform};

/// The most drop targets that get a rule each; more go into a set, since every packet walks every rule.
pub const MOST_PLAIN_DROPS: usize = 16;

/// Whether rules are ours to write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rules {
    /// Write them and keep them true.
    Manage,
    /// Leave iptables and its bridge toggles as they are.
    Leave,
}

/// A part of the host that can be there, be gone, or be none of our business.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Part<T> {
    /// It must be there, like this.
    Present(T),
    /// It must not be there.
    Absent,
    /// It stays as it is.
    #[default]
    Untouched,
}

/// The bridge as wanted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bridge {
    /// Its address and prefix: the VMs' gateway.
    pub address: Ipv4Net,
    /// MTU in bytes; `None` leaves the kernel's.
    pub mtu: Option<u32>,
    /// Whether it is up.
    pub up: bool,
}

/// The rules as wanted, both families and the set.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Firewall {
    /// IPv4 chains.
    pub v4: Vec<ChainRules>,
    /// IPv6 chains.
    pub v6: Vec<ChainRules>,
    /// Entries of the set, when the drops are in one.
    pub set: Option<BTreeSet<Ipv4Net>>,
}

impl Firewall {
    /// Whether anything is dropped.
    #[must_use]
    pub fn has_drops(&self) -> bool {
        self.v4.iter().chain(&self.v6).any(|chain| !chain.head.is_empty())
    }
}

/// Everything that must be true of the host.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Desired {
    /// Bridge-netfilter toggles that must read 1 before anything else is done.
    pub guard: Vec<&'static str>,
    /// The rules; `None` leaves them alone.
    pub firewall: Option<Firewall>,
    /// The bridge.
    pub bridge: Part<Bridge>,
    /// Addresses of an earlier configuration that must leave the bridge.
    pub retired_addresses: Vec<Ipv4Net>,
    /// Whether every port of the bridge is isolated; `None` leaves ports alone.
    pub ports_isolated: Option<bool>,
    /// Uplinks that must be up.
    pub uplinks_up: Vec<InterfaceName>,
    /// Kernel parameters.
    pub sysctls: Vec<Setting>,
    /// Interface on which the guest agent's local route for the subnet must not exist.
    pub no_local_route_on: Option<InterfaceName>,
    /// The CNI configuration.
    pub conflist: Part<Value>,
    /// The cron file that removes the guest agent's route at boot.
    pub cron: Part<String>,
    /// Whether the `/32` routes of leases must go.
    pub no_lease_routes: bool,
}

impl Desired {
    /// What a node of this configuration looks like. What the host cannot do, and what it already has and must not
    /// lose silently, is taken from `observed`.
    #[must_use]
    pub fn for_node(config: &NodeConfig, rules: Rules, observed: &Observed) -> Self {
        let isolation = wanted_isolation(config, observed);
        let prefix = config.subnet.prefix_len();
        let gke = config.platform == Platform::Gke;
        Self {
            guard: if rules == Rules::Manage { guard(config) } else { Vec::new() },
            firewall: (rules == Rules::Manage).then(|| firewall(config, observed.set_unavailable().is_none())),
            bridge: Part::Present(Bridge {
                address: Ipv4Net::new(config.gateway, prefix).unwrap_or(Ipv4Net::from(config.gateway)),
                mtu: config.mtu.map(|mtu| u32::from(mtu.bytes())).or_else(|| observed.mtu_of(&config.primary_nic)),
                up: true,
            }),
            retired_addresses: Vec::new(),
            ports_isolated: isolation.ports.then_some(true),
            uplinks_up: config.secondary_nics.clone(),
            sysctls: sysctls(config),
            no_local_route_on: gke.then(|| config.primary_nic.clone()),
            conflist: Part::Present(cni::conflist(BRIDGE, isolation)),
            cron: if gke { Part::Present(guest_agent::cron_line(config)) } else { Part::Untouched },
            no_lease_routes: false,
        }
    }

    /// What keeps the VMs of such a node apart beside its rules.
    #[must_use]
    pub fn beside_rules(config: &NodeConfig, observed: &Observed) -> Self {
        let ports_isolated = wanted_isolation(config, observed).ports.then_some(true);
        Self { guard: guard(config), ports_isolated, ..Self::default() }
    }

    /// The same, coming from an earlier configuration whose gateway address must leave the bridge.
    #[must_use]
    pub fn replacing(mut self, earlier: Option<&NodeConfig>) -> Self {
        let Part::Present(bridge) = &self.bridge else { return self };
        let retired = earlier.and_then(|old| Ipv4Net::new(old.gateway, old.subnet.prefix_len()).ok());
        self.retired_addresses = retired.filter(|old| *old != bridge.address).into_iter().collect();
        self
    }

    /// The same with the bridge down, so that no VM sends or receives anything.
    #[must_use]
    pub fn with_bridge_down(mut self) -> Self {
        if let Part::Present(bridge) = &mut self.bridge {
            bridge.up = false;
        }
        self
    }

    /// What is left when the node is given back: nothing of ours. Kernel parameters stay, since others may have come
    /// to rely on them.
    #[must_use]
    pub fn nothing(config: &NodeConfig, rules: Rules) -> Self {
        Self {
            firewall: (rules == Rules::Manage).then(Firewall::default),
            bridge: Part::Absent,
            retired_addresses: Ipv4Net::new(config.gateway, config.subnet.prefix_len()).into_iter().collect(),
            ports_isolated: Some(false),
            conflist: Part::Absent,
            cron: if config.platform == Platform::Gke { Part::Absent } else { Part::Untouched },
            no_lease_routes: true,
            ..Self::default()
        }
    }
}

/// The isolation keys of the CNI configuration: what is asked for, and what the node already has.
#[must_use]
pub fn wanted_isolation(config: &NodeConfig, observed: &Observed) -> cni::Isolation {
    let asked = cni::Isolation { ports: config.drops.internal, mac_spoof_check: config.drops.internal };
    asked.or(observed.conflist_isolation())
}

/// Whether the drops of this configuration need a set.
#[must_use]
pub fn needs_set(config: &NodeConfig) -> bool {
    config.drop_targets().len() > MOST_PLAIN_DROPS
}

/// The rule that drops what VMs send to a target, as `iptables-save` prints it.
#[must_use]
pub fn drop_rule(target: Ipv4Net) -> Rule {
    let destination = if target.prefix_len() == 0 { String::new() } else { format!("-d {target} ") };
    drop(format!("{destination}-i {BRIDGE}"))
}

/// Drops what matches.
fn drop(matches: impl Display) -> Rule {
    Rule::unquoted(format!("{matches} -m comment --comment {DROP_TAG} -j DROP"))
}

/// Does this with what matches.
fn tagged(matches: impl Display, target: &str) -> Rule {
    Rule::unquoted(format!("{matches} -m comment --comment {TAG} -j {target}"))
}

fn guard(config: &NodeConfig) -> Vec<&'static str> {
    let mut keys = Vec::new();
    if !config.drop_targets().is_empty() {
        keys.push(sysctl::BRIDGE_CALLS_IPTABLES);
    }
    if config.drops.internal {
        keys.push(sysctl::BRIDGE_CALLS_IP6TABLES);
    }
    keys
}

fn firewall(config: &NodeConfig, sets_available: bool) -> Firewall {
    let targets = config.drop_targets();
    let in_set = needs_set(config) && sets_available;
    let drops = if in_set {
        vec![drop(format!("-i {BRIDGE} -m set --match-set {} dst", ipset::SET))]
    } else {
        targets.iter().map(|target| drop_rule(*target)).collect()
    };

    let mut accepts = Vec::new();
    for uplink in config.uplinks() {
        accepts.push(tagged(format!("-i {uplink} -o {BRIDGE}"), "ACCEPT"));
        accepts.push(tagged(format!("-i {BRIDGE} -o {uplink}"), "ACCEPT"));
    }
    accepts.push(tagged(format!("-i {BRIDGE} -o {BRIDGE}"), "ACCEPT"));
    let masquerade = tagged(format!("-s {} ! -o {BRIDGE}", config.subnet), "MASQUERADE");

    let chain = |table: &str, chain: &str, head: Vec<Rule>, tail: Vec<Rule>| ChainRules {
        table: table.to_owned(),
        chain: chain.to_owned(),
        head,
        tail,
    };
    let mut v4 =
        vec![chain("filter", "FORWARD", drops, accepts), chain("nat", "POSTROUTING", vec![], vec![masquerade])];
    let mut v6 = Vec::new();
    if config.drops.metadata || config.drops.host {
        v4.push(chain("filter", "INPUT", input_drops(config), vec![]));
    }
    if config.drops.internal {
        v6.push(chain("filter", "FORWARD", vec![drop(format!("-i {BRIDGE} -o {BRIDGE}"))], vec![]));
    }
    if config.drops.host {
        // Neighbour discovery is ICMPv6, and so is ping.
        let new = "-m conntrack ! --ctstate RELATED,ESTABLISHED";
        let drops = vec![drop(format!("-i {BRIDGE} ! -p ipv6-icmp {new}"))];
        v6.push(chain("filter", "INPUT", drops, vec![]));
    }
    Firewall { v4, v6, set: in_set.then(|| ipset::entries(&targets)) }
}

/// What a VM may not open to the node itself. No rule accepts anything, so that an operator's own INPUT rules keep
/// their say, and each rule holds by itself, so that their order does not matter.
fn input_drops(config: &NodeConfig) -> Vec<Rule> {
    let mut rules = Vec::new();
    if config.drops.metadata {
        // A metadata server on the node itself, and one that the node redirects to (as GKE's does): the address the
        // VM asked for is the one conntrack remembers, unless it is told not to track.
        for range in config.platform.metadata_ranges() {
            rules.push(drop(format!("-d {range} -i {BRIDGE}")));
            rules.push(drop(format!("-i {BRIDGE} -m conntrack --ctorigdst {}", range.addr())));
        }
    }
    if config.drops.host {
        let new = "-m conntrack ! --ctstate RELATED,ESTABLISHED";
        rules.push(drop(format!("-i {BRIDGE} ! -p icmp {new} ! --ctproto 17")));
        rules.push(drop(format!("-i {BRIDGE} -p udp -m udp ! --dport 67 {new}")));
        rules.push(drop(format!("-i {BRIDGE} -p icmp -m icmp ! --icmp-type 8 {new}")));
    }
    rules
}

fn sysctls(config: &NodeConfig) -> Vec<Setting> {
    let reverse_path = |interface: &str| format!("net/ipv4/conf/{interface}/rp_filter");
    let required = |key: String, value: &str| Setting { key, value: value.to_owned(), required: true };
    let mut settings = vec![required(sysctl::IP_FORWARD.to_owned(), "1")];
    settings.extend(["all", "default", BRIDGE].map(|interface| required(reverse_path(interface), "0")));
    settings.extend(config.uplinks().iter().map(|uplink| Setting {
        key: reverse_path(uplink.as_str()),
        value: "0".to_owned(),
        required: false,
    }));
    settings
}
