//! Single values, each valid by itself.

use std::fmt;
use std::net::Ipv4Addr;
use std::str::FromStr;

use ipnet::Ipv4Net;

use super::ConfigError;

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
        if !(1..=30).contains(&net.prefix_len()) {
            return Err(ConfigError::SubnetPrefix(net));
        }
        let nobodys = [(Ipv4Addr::UNSPECIFIED, 8), (Ipv4Addr::new(127, 0, 0, 0), 8), (Ipv4Addr::new(224, 0, 0, 0), 4)];
        let inside = |(base, prefix)| Ipv4Net::new(base, prefix).is_ok_and(|range| range.contains(&net));
        if nobodys.into_iter().any(inside) { Err(ConfigError::SubnetKind(net)) } else { Ok(Self(net)) }
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

/// An interface name as the kernel accepts it (`dev_valid_name`), less what iptables, or a shell in the cron file, would
/// read as something else.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct InterfaceName(pub(super) String);

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
        let plain = |c: char| c.is_ascii_alphanumeric() || "-_.@".contains(c);
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
    use crate::config::{DEFAULT_DNS, check_gateway};

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
