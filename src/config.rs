//! The validated request: what a node is asked to be.
//!
//! Whatever is typed and whatever is read from `pool.json` passes through the types of this module; past them nothing
//! can hold a bad subnet, an IPv6 drop or an interface name that a tool would read as an option.

use std::collections::BTreeSet;
use std::fmt;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use ipnet::Ipv4Net;

mod values;

pub use values::{DropCidr, InterfaceName, Mtu, NodeName, Subnet, parse_address, parse_dns};

/// Name of the bridge that the VMs' TAP devices are plugged into.
pub const BRIDGE: &str = "cni0";

/// Where the CNI configuration lives unless told otherwise.
pub const DEFAULT_CNI_CONF_DIR: &str = "/etc/cni/net.d";

/// Where `pool.json` lives unless told otherwise.
pub const DEFAULT_STATE_DIR: &str = "/var/lib/cocoon/net";

/// The resolvers handed to the VMs when none were asked for.
pub const DEFAULT_DNS: [Ipv4Addr; 2] = [Ipv4Addr::new(8, 8, 8, 8), Ipv4Addr::new(1, 1, 1, 1)];

/// Why a value was refused. The text names the value and what would be accepted; the caller names the flag or key.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// An IPv6 address or range where only IPv4 can be enforced or served.
    #[error("`{0}` is IPv6; only IPv4 is supported here, such as 10.0.0.0/8")]
    Ipv6(String),
    /// Not an IPv4 range.
    #[error("`{0}` is not an IPv4 range: write ADDRESS/PREFIX, such as 10.0.0.0/8 (a single host is 192.0.2.7/32)")]
    Cidr(String),
    /// Not an IPv4 address.
    #[error("`{0}` is not an IPv4 address, such as 172.20.100.1 (no leading zeros)")]
    Address(String),
    /// A subnet with no room for a gateway and a VM.
    #[error("`{0}` cannot be the VMs' subnet: the prefix must be between /1 and /30")]
    SubnetPrefix(Ipv4Net),
    /// A subnet of addresses that no VM can have (RFC 6890).
    #[error(
        "`{0}` cannot be the VMs' subnet: it lies in 0.0.0.0/8, 127.0.0.0/8 or 224.0.0.0/4, whose addresses no VM can have"
    )]
    SubnetKind(Ipv4Net),
    /// The gateway cannot be an address of the bridge.
    #[error(
        "gateway `{gateway}` must be a host address inside {subnet}, neither its network nor its broadcast address"
    )]
    Gateway {
        /// The refused address.
        gateway: Ipv4Addr,
        /// The subnet it would have to be in.
        subnet: Subnet,
    },
    /// Not a name the kernel gives to an interface.
    #[error("`{0}` is not an interface name: 1 to 15 letters, digits, `-`, `_`, `.` or `@`, not starting with `-`")]
    Interface(String),
    /// The bridge itself named as uplink.
    #[error("`{0}` is the VMs' bridge and cannot be the uplink")]
    BridgeAsUplink(InterfaceName),
    /// Not a usable MTU.
    #[error("`{0}` is not an MTU: write a number of bytes between 68 and 65535")]
    Mtu(String),
    /// Not a usable node name.
    #[error("`{0}` is not a node name: it must not be empty or hold spaces or control characters")]
    NodeName(String),
    /// Not a platform.
    #[error("`{0}` is not a platform: write gke, volcengine or none")]
    Platform(String),
    /// A pool without an address.
    #[error("the pool would be empty: it must hold at least one address")]
    EmptyPool,
    /// An address of the pool that cannot be leased.
    #[error("`{address}` cannot be leased: it must be a host address inside {subnet} and not the gateway")]
    PoolAddress {
        /// The refused address.
        address: Ipv4Addr,
        /// The subnet it would have to be in.
        subnet: Subnet,
    },
}

/// Who routes the VMs' addresses to this node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Platform {
    /// Google Kubernetes Engine: an alias range on `nic0`.
    Gke,
    /// Volcengine: secondary addresses on secondary ENIs.
    Volcengine,
    /// Any Linux host: no cloud call is ever made.
    None,
}

impl Platform {
    /// The word used for it on the command line and in `pool.json`.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Gke => "gke",
            Self::Volcengine => "volcengine",
            Self::None => "none",
        }
    }

    /// The uplink assumed when the host has no default route.
    #[must_use]
    pub fn usual_primary_nic(self) -> InterfaceName {
        InterfaceName(match self {
            Self::Gke | Self::None => "ens4".to_owned(),
            Self::Volcengine => "eth0".to_owned(),
        })
    }

    /// The uplinks besides the primary NIC: Volcengine's seven secondary ENIs.
    #[must_use]
    pub fn secondary_nics(self) -> Vec<InterfaceName> {
        match self {
            Self::Volcengine => (1..=7).map(|n| InterfaceName(format!("eth{n}"))).collect(),
            Self::Gke | Self::None => Vec::new(),
        }
    }

    /// Where a VM would find the credentials of the node: the cloud's metadata service.
    #[must_use]
    pub fn metadata_ranges(self) -> Vec<Ipv4Net> {
        let link_local = Ipv4Net::from(Ipv4Addr::new(169, 254, 169, 254));
        match self {
            Self::Gke | Self::None => vec![link_local],
            Self::Volcengine => vec![link_local, Ipv4Net::from(Ipv4Addr::new(100, 96, 0, 96))],
        }
    }
}

impl fmt::Display for Platform {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Platform {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "gke" => Ok(Self::Gke),
            "volcengine" => Ok(Self::Volcengine),
            "none" => Ok(Self::None),
            _ => Err(ConfigError::Platform(text.to_owned())),
        }
    }
}

/// What the VMs may not reach.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Drops {
    /// No traffic between VMs of the subnet.
    pub internal: bool,
    /// Ranges named by the operator.
    pub cidrs: BTreeSet<DropCidr>,
    /// The cloud's metadata service.
    pub metadata: bool,
    /// The node itself, but for DHCP and ping.
    pub host: bool,
}

/// What a node is asked to be. Every field is valid by itself and together with the others.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeConfig {
    /// Who routes the addresses here.
    pub platform: Platform,
    /// The virtual node's name.
    pub node_name: NodeName,
    /// The VMs' subnet.
    pub subnet: Subnet,
    /// Address of the bridge, a host of `subnet`.
    pub gateway: Ipv4Addr,
    /// The interface of the default route.
    pub primary_nic: InterfaceName,
    /// Further uplinks; when there are any, the VMs' traffic leaves through these.
    pub secondary_nics: Vec<InterfaceName>,
    /// Resolvers handed to the VMs.
    pub dns: Vec<Ipv4Addr>,
    /// What the VMs may not reach.
    pub drops: Drops,
    /// MTU of the bridge; the primary NIC's when none is given.
    pub mtu: Option<Mtu>,
    /// Where the CNI configuration is written.
    pub cni_conf_dir: PathBuf,
}

impl NodeConfig {
    /// The ranges that forwarded VM traffic must not reach, in order, each once.
    #[must_use]
    pub fn drop_targets(&self) -> BTreeSet<Ipv4Net> {
        let internal = self.drops.internal.then_some(self.subnet.net());
        let metadata = if self.drops.metadata { self.platform.metadata_ranges() } else { Vec::new() };
        self.drops.cidrs.iter().map(|cidr| cidr.net()).chain(internal).chain(metadata).collect()
    }

    /// Whether any isolation is asked for, of whatever kind.
    #[must_use]
    pub fn wants_isolation(&self) -> bool {
        self.drops.host || !self.drop_targets().is_empty()
    }

    /// The interfaces that VM traffic leaves through: the secondary NICs, or with none the primary NIC.
    #[must_use]
    pub fn uplinks(&self) -> &[InterfaceName] {
        if self.secondary_nics.is_empty() { std::slice::from_ref(&self.primary_nic) } else { &self.secondary_nics }
    }

    /// Path of the CNI configuration.
    #[must_use]
    pub fn conflist_path(&self) -> PathBuf {
        self.cni_conf_dir.join("30-cocoon-dhcp.conflist")
    }

    /// What VMs are kept from, in a few words.
    #[must_use]
    pub fn isolation_summary(&self) -> String {
        let targets = match self.drop_targets().len() {
            0 => "no drop target".to_owned(),
            1 => "1 drop target".to_owned(),
            count => format!("{count} drop targets"),
        };
        if self.drops.host { format!("{targets}, node closed to VMs") } else { targets }
    }

    /// Checks what no single field can: the gateway against the subnet, the uplinks against the bridge.
    ///
    /// # Errors
    /// [`ConfigError::Gateway`] and [`ConfigError::BridgeAsUplink`].
    pub fn checked(self) -> Result<Self, ConfigError> {
        check_gateway(self.subnet, self.gateway)?;
        match std::iter::once(&self.primary_nic).chain(&self.secondary_nics).find(|nic| nic.as_str() == BRIDGE) {
            Some(nic) => Err(ConfigError::BridgeAsUplink(nic.clone())),
            None => Ok(self),
        }
    }
}

/// Checks that the gateway can be an address of the bridge.
///
/// # Errors
/// [`ConfigError::Gateway`] when it is outside of the subnet, or its network or broadcast address.
pub fn check_gateway(subnet: Subnet, gateway: Ipv4Addr) -> Result<(), ConfigError> {
    if subnet.is_host(gateway) { Ok(()) } else { Err(ConfigError::Gateway { gateway, subnet }) }
}

/// Whether the path is the default place of the CNI configuration, which `pool.json` leaves out.
#[must_use]
pub fn is_default_cni_conf_dir(path: &Path) -> bool {
    path == Path::new(DEFAULT_CNI_CONF_DIR)
}
