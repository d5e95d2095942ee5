//! The DHCP server of the VMs' bridge (RFC 2131): leases, their host routes, and the file they live in.
//!
//! | where | what |
//! |---|---|
//! | [`addresses`] | the pool: who holds which address, and which one is next |
//! | [`wire`] | a datagram of an untrusted VM becomes a [`wire::Request`], or is refused |
//! | [`reply`] | what goes back, and where to (RFC 2131 section 4.1) |
//! | [`frame`] | Ethernet, IPv4 and UDP around both |
//! | [`engine`] | what is answered and what must be done first: pure, the clock an argument |
//! | [`leases`], [`store`] | `leases.json`, its journal, and the thread that syncs many grants at once |
//! | [`server`] | the loop that runs the engine's effects |

pub mod addresses;
mod arp;
pub mod engine;
pub mod frame;
mod journal;
pub mod leases;
mod netlink;
pub mod reply;
mod routes;
pub mod server;
mod sockets;
pub mod store;
pub mod wire;

use std::fmt;
use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

pub use server::{Error, Preparation, Server};

use crate::config::Subnet;

/// What the server is asked to be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// The bridge.
    pub interface: String,
    /// The VMs' subnet.
    pub subnet: Subnet,
    /// Address of the bridge: server identifier and router.
    pub gateway: Ipv4Addr,
    /// The pool.
    pub addresses: Vec<Ipv4Addr>,
    /// Resolvers for the VMs.
    pub dns: Vec<Ipv4Addr>,
    /// MTU for the VMs in bytes; none is handed out when there is none.
    pub mtu: Option<u16>,
    /// How long a lease lasts, at least two seconds: T1 and T2 come before its end.
    pub lease_time: Duration,
    /// How many addresses one port of the bridge may hold; 0: any number.
    pub port_lease_limit: u32,
    /// `leases.json`; the journal is beside it.
    pub lease_file: PathBuf,
}

/// The Ethernet address of a client.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Mac(pub [u8; 6]);

impl Mac {
    /// The address that every station listens to.
    pub const BROADCAST: Self = Self([0xff; 6]);

    /// Whether a station can have this address: neither all zeros nor a group address (IEEE 802 section 8.2).
    #[must_use]
    pub fn is_station(self) -> bool {
        self.0 != [0; 6] && self.0[0] & 1 == 0
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl fmt::Debug for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Not six pairs of hexadecimal digits with colons between them.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not an Ethernet address, such as 52:54:00:12:34:56")]
pub struct InvalidMac(String);

impl FromStr for Mac {
    type Err = InvalidMac;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let bad = || InvalidMac(text.to_owned());
        let mut octets = [0; 6];
        let mut pairs = text.split(':');
        for octet in &mut octets {
            let pair = pairs.next().filter(|pair| pair.len() == 2 && pair.bytes().all(|b| b.is_ascii_hexdigit()));
            *octet = u8::from_str_radix(pair.ok_or_else(bad)?, 16).map_err(|_| bad())?;
        }
        if pairs.next().is_none() { Ok(Self(octets)) } else { Err(bad()) }
    }
}
