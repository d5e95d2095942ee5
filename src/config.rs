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
    #[error(
        "`{0}` is not an interface name: 1 to 15 characters, no spaces, `/` or `:`, not starting with `-` or `!`, no `+`"
    )]
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

/// The VMs' subnet: IPv4, prefix 1 to 30, host bits masked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Subnet(Ipv4Net);

impl Subnet {
    /// The range itself.
    #[must_use]
    pub fn net(self) -> Ipv4Net {
        self.0
    }

    /// Length of the prefix in bits.
    #[must_use]
    pub fn prefix_len(self) -> u8 {
        self.0.prefix_len()
    }

    /// The first host address, which is the gateway unless told otherwise.
    #[must_use]
    pub fn first_host(self) -> Ipv4Addr {
        Ipv4Addr::from_bits(self.0.network().to_bits() + 1)
    }

    /// Whether the address is a host of the subnet: inside, and neither network nor broadcast address.
    #[must_use]
    pub fn is_host(self, address: Ipv4Addr) -> bool {
        self.0.contains(&address) && address != self.0.network() && address != self.0.broadcast()
    }

    /// The first `size` host addresses in numerical order, the gateway left out; fewer when the subnet holds fewer.
    #[must_use]
    pub fn pool(self, gateway: Ipv4Addr, size: usize) -> Vec<Ipv4Addr> {
        self.0.hosts().filter(|address| *address != gateway).take(size).collect()
    }
}

impl FromStr for Subnet {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let net = parse_cidr(text)?;
        if (1..=30).contains(&net.prefix_len()) { Ok(Self(net)) } else { Err(ConfigError::SubnetPrefix(net)) }
    }
}

impl fmt::Display for Subnet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A range the VMs may not reach: IPv4, any prefix, host bits masked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DropCidr(Ipv4Net);

impl DropCidr {
    /// The range itself.
    #[must_use]
    pub fn net(self) -> Ipv4Net {
        self.0
    }
}

impl FromStr for DropCidr {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        parse_cidr(text).map(Self)
    }
}

impl fmt::Display for DropCidr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// An interface name as the kernel accepts it (`dev_valid_name`), less what iptables would read as something else.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct InterfaceName(String);

impl InterfaceName {
    /// The name.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for InterfaceName {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let plain = |c: char| c.is_ascii_graphic() && !"/:+\"'\\".contains(c);
        let valid = (1..=15).contains(&text.len())
            && text.chars().all(plain)
            && !text.starts_with(['-', '!'])
            && text != "."
            && text != "..";
        if valid { Ok(Self(text.to_owned())) } else { Err(ConfigError::Interface(text.to_owned())) }
    }
}

impl fmt::Display for InterfaceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// An MTU in bytes, 68 to 65535: what DHCP option 26 can carry (RFC 2132 section 5.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Mtu(u16);

impl Mtu {
    /// The value in bytes.
    #[must_use]
    pub fn bytes(self) -> u16 {
        self.0
    }
}

impl TryFrom<u64> for Mtu {
    type Error = ConfigError;

    fn try_from(bytes: u64) -> Result<Self, Self::Error> {
        u16::try_from(bytes)
            .ok()
            .filter(|bytes| *bytes >= 68)
            .map(Self)
            .ok_or_else(|| ConfigError::Mtu(bytes.to_string()))
    }
}

impl FromStr for Mtu {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        text.parse::<u64>().map_err(|_| ConfigError::Mtu(text.to_owned()))?.try_into()
    }
}

/// The virtual node's name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeName(String);

impl NodeName {
    /// The name.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for NodeName {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let valid = !text.is_empty() && !text.contains(|c: char| c.is_whitespace() || c.is_control());
        if valid { Ok(Self(text.to_owned())) } else { Err(ConfigError::NodeName(text.to_owned())) }
    }
}

impl fmt::Display for NodeName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
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

/// An IPv4 address in dotted decimal, without leading zeros (which some tools read as octal).
///
/// # Errors
/// [`ConfigError::Ipv6`] for an IPv6 address, [`ConfigError::Address`] for anything else.
pub fn parse_address(text: &str) -> Result<Ipv4Addr, ConfigError> {
    text.parse().map_err(|_| {
        if text.contains(':') { ConfigError::Ipv6(text.to_owned()) } else { ConfigError::Address(text.to_owned()) }
    })
}

/// A comma-separated list of IPv4 addresses; blanks are ignored.
///
/// # Errors
/// As for [`parse_address`], for the first entry that is none.
pub fn parse_dns(text: &str) -> Result<Vec<Ipv4Addr>, ConfigError> {
    text.split(',').map(str::trim).filter(|entry| !entry.is_empty()).map(parse_address).collect()
}

/// Whether the path is the default place of the CNI configuration, which `pool.json` leaves out.
#[must_use]
pub fn is_default_cni_conf_dir(path: &Path) -> bool {
    path == Path::new(DEFAULT_CNI_CONF_DIR)
}

/// An IPv4 range; host bits are masked.
fn parse_cidr(text: &str) -> Result<Ipv4Net, ConfigError> {
    if text.contains(':') {
        return Err(ConfigError::Ipv6(text.to_owned()));
    }
    let parsed = text.split_once('/').and_then(|(address, prefix)| {
        let address: Ipv4Addr = address.parse().ok()?;
        let plain = !prefix.is_empty() && prefix.bytes().all(|b| b.is_ascii_digit());
        let unpadded = prefix == "0" || !prefix.starts_with('0');
        let prefix: u8 = (plain && unpadded).then(|| prefix.parse().ok()).flatten()?;
        Ipv4Net::new(address, prefix).ok()
    });
    parsed.map(|net| net.trunc()).ok_or_else(|| ConfigError::Cidr(text.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn host_bits_are_masked() {
        assert_eq!("10.1.2.3/8".parse::<DropCidr>().unwrap().to_string(), "10.0.0.0/8");
        assert_eq!("172.20.100.9/24".parse::<Subnet>().unwrap().to_string(), "172.20.100.0/24");
    }

    #[test]
    fn the_whole_internet_is_a_drop_target() {
        assert_eq!("0.0.0.0/0".parse::<DropCidr>().unwrap().to_string(), "0.0.0.0/0");
    }

    #[test]
    fn bad_ranges_are_refused_by_name() {
        for bad in [
            "",
            " ",
            "10.0.0.1",
            "10.0.0.0/33",
            "10.0.256.0/24",
            "010.0.0.0/8",
            "10.0.0.0/08",
            "10.0.0.0/+8",
            "10.0.0.0/",
            "/8",
            "10.0.0/8",
            "10.0.0.0/8 ",
            "ten/8",
            "10.0.0.0/8/8",
            "10.0.0.0/-1",
        ] {
            let error = bad.parse::<DropCidr>().unwrap_err();
            assert!(error.to_string().contains(&format!("`{bad}`")), "{error}");
        }
    }

    #[test]
    fn ipv6_is_refused_as_ipv6() {
        for bad in ["2001:db8::/32", "::/0", "fe80::1"] {
            assert_eq!(bad.parse::<DropCidr>().unwrap_err(), ConfigError::Ipv6(bad.to_owned()));
        }
        assert_eq!(parse_address("::1").unwrap_err(), ConfigError::Ipv6("::1".to_owned()));
    }

    #[test]
    fn a_subnet_needs_room_for_a_gateway_and_a_vm() {
        for bad in ["10.0.0.0/0", "10.0.0.0/31", "10.0.0.1/32"] {
            assert!(matches!(bad.parse::<Subnet>(), Err(ConfigError::SubnetPrefix(_))), "{bad}");
        }
        for good in ["0.0.0.0/1", "10.0.0.0/30"] {
            assert!(good.parse::<Subnet>().is_ok(), "{good}");
        }
    }

    #[test]
    fn the_gateway_is_a_host_of_the_subnet() {
        let subnet = "172.20.100.0/24".parse().unwrap();
        assert!(check_gateway(subnet, Ipv4Addr::new(172, 20, 100, 254)).is_ok());
        for bad in ["172.20.100.0", "172.20.100.255", "172.20.101.1"] {
            assert!(check_gateway(subnet, bad.parse().unwrap()).is_err(), "{bad}");
        }
    }

    #[test]
    fn the_pool_starts_at_the_first_host_and_leaves_the_gateway_out() {
        let subnet: Subnet = "172.20.100.0/29".parse().unwrap();
        let pool = |gateway: &str, size| {
            let pool = subnet.pool(gateway.parse().unwrap(), size);
            pool.iter().map(|ip| ip.octets()[3]).collect::<Vec<_>>()
        };
        assert_eq!(pool("172.20.100.1", 3), [2, 3, 4]);
        assert_eq!(pool("172.20.100.3", 3), [1, 2, 4]);
        assert_eq!(pool("172.20.100.1", 100), [2, 3, 4, 5, 6]);
    }

    #[test]
    fn interface_names_that_a_tool_would_misread_are_refused() {
        for bad in ["", ".", "..", "-i", "!eth0", "eth+", "eth 0", "a/b", "eth0:1", "sixteen-chars-xx", "é0", "e\"0"] {
            assert!(bad.parse::<InterfaceName>().is_err(), "{bad}");
        }
        for good in ["eth0", "eth0.100", "enp0s31f6", "br-1a2b3c", "eth0@x"] {
            assert!(good.parse::<InterfaceName>().is_ok(), "{good}");
        }
    }

    #[test]
    fn dns_lists_ignore_blanks_and_refuse_what_is_no_address() {
        assert_eq!(parse_dns(" 8.8.8.8, ,1.1.1.1,").unwrap(), DEFAULT_DNS);
        assert_eq!(parse_dns("8.8.8.8,dns.google").unwrap_err(), ConfigError::Address("dns.google".to_owned()));
        assert_eq!(parse_dns("").unwrap(), Vec::<Ipv4Addr>::new());
    }

    #[test]
    fn an_mtu_fits_option_26() {
        for bad in ["67", "65536", "-1", "", "1500b"] {
            assert!(bad.parse::<Mtu>().is_err(), "{bad}");
        }
        assert_eq!("8896".parse::<Mtu>().unwrap().bytes(), 8896);
    }
}
