//! The live proof: what really happens to frames between two VMs, to what they must not reach, and to the node.
//!
//! Two stand-in VMs, namespaces without a name, are plugged into the live bridge with addresses that nobody has. They
//! send, from raw sockets, everything a hostile VM could. What is believed is only what was seen:
//!
//! - **It was sent**: each frame was seen coming in at the sender's port, on the host.
//! - **It arrived**, or not: at the other guest's interface; going out at any other port of the bridge, which is how the
//!   real VMs are covered without their help; going out at any interface that is not of the bridge, for drop targets.
//! - **Silence means isolation**: both guests get their pings to the gateway answered, before and after; and for drop
//!   targets, a datagram to an address that no target covers is seen leaving the node. If a control fails, the rows that
//!   lean on it are "not proven", which is no success.
//!
//! What port isolation proves depends on who set it on the guests' ports ([`IsolatedBy`]), so the report says so. With
//! the daemon running, the probe touches nothing: a port that appears must be isolated by the daemon as a VM's would be.
//!
//! Datagrams beyond the node have two hops to live, so one that does get out dies at the next router.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

use futures_util::TryStreamExt;
use ipnet::Ipv4Net;
use rtnetlink::Handle;

use super::links::{Link, LinkError, Links, Mac};

mod addresses;
mod frames;
mod guest;
mod report;
mod tap;
mod trials;

use guest::Guest;
pub use report::{Expected, Report, Row, Verdict};
use tap::Tap;
use trials::{Trial, Trials};

/// The names of the guests' ports on the bridge.
pub const PORTS: [&str; 2] = ["cnprobe0", "cnprobe1"];

/// How long the daemon may take to isolate a port that appears, and a port to carry traffic.
const SETTLE: Duration = Duration::from_secs(3);

/// Each frame is sent this often, this far apart, and waited for so long after the last.
const ROUNDS: usize = 3;
const BETWEEN_ROUNDS: Duration = Duration::from_millis(200);
const LISTEN: Duration = Duration::from_millis(800);

/// How often the sockets are emptied.
const POLL: Duration = Duration::from_millis(20);

/// Frames sent before the sockets are emptied.
const BATCH: usize = 64;

/// Why the probe could not be made. What it found is never an error.
#[derive(Debug, thiserror::Error)]
pub enum ProbeError {
    /// There is no bridge to prove anything on.
    #[error("there is no bridge {0} to probe; run `cocoon-net init` or start the daemon")]
    NoBridge(String),
    /// Every address is taken.
    #[error(
        "the probe needs two addresses of {subnet} that nobody has, and found none: every one is leased or answers"
    )]
    NoAddress {
        /// The VMs' subnet.
        subnet: Ipv4Net,
    },
    /// A network namespace could not be made or entered.
    #[error("cannot make a network namespace; the probe needs CAP_SYS_ADMIN")]
    Namespace(#[source] io::Error),
    /// A veth pair could not be plugged in.
    #[error("cannot plug {port} into {bridge}")]
    Plug {
        /// The port.
        port: &'static str,
        /// The bridge.
        bridge: String,
        /// What the kernel answered.
        source: rtnetlink::Error,
    },
    /// A raw socket failed.
    #[error("cannot send or receive raw frames; the probe needs CAP_NET_RAW")]
    Tap(#[source] io::Error),
    /// The neighbours could not be listed.
    #[error("cannot list the node's neighbours")]
    Neighbours(#[source] rtnetlink::Error),
    /// A netlink request failed.
    #[error("cannot set up the probe's links")]
    Link(#[from] LinkError),
}

/// Who isolates the ports of VMs on this node, and so the probe's.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum IsolatedBy {
    /// The daemon, which is running: the probe waits for it to, and reports if it does not.
    #[default]
    Daemon,
    /// The CNI plugin, which is new enough, with our conflist: the probe sets the flag as the plugin would.
    CniPlugin,
    /// Nobody: a VM's port is not isolated, and neither is the probe's.
    Nobody,
}

/// What to prove, and on what.
#[derive(Debug, Clone)]
pub struct Request {
    /// The bridge.
    pub bridge: String,
    /// Its address.
    pub gateway: Ipv4Addr,
    /// The VMs' subnet.
    pub subnet: Ipv4Net,
    /// Nothing passes between VMs.
    pub internal: bool,
    /// VMs open no connection to the node.
    pub host: bool,
    /// Ranges that the VMs may not reach.
    pub targets: Vec<Ipv4Net>,
    /// Addresses that DHCP hands out.
    pub pool: BTreeSet<Ipv4Addr>,
    /// Addresses that are leased.
    pub leased: BTreeSet<Ipv4Addr>,
    /// Who isolates ports.
    pub isolated_by: IsolatedBy,
}

impl Default for Request {
    fn default() -> Self {
        Self {
            bridge: crate::config::BRIDGE.to_owned(),
            gateway: Ipv4Addr::UNSPECIFIED,
            subnet: Ipv4Net::default(),
            internal: false,
            host: false,
            targets: Vec::new(),
            pool: BTreeSet::new(),
            leased: BTreeSet::new(),
            isolated_by: IsolatedBy::default(),
        }
    }
}

/// Proves, live, what the request asks for. Takes a few seconds. The caller holds the state lock, so that there is one
/// probe at a time; whatever an earlier one left is removed first.
///
/// # Errors
/// [`ProbeError`] when the probe could not be made. A failed proof is a [`Report`].
pub async fn run(request: &Request) -> Result<Report, ProbeError> {
    let links = Links::open(false)?;
    unplug(&links).await?;
    let (connection, handle, _) =
        rtnetlink::new_connection().map_err(|error| ProbeError::Link(LinkError::Open(error)))?;
    tokio::spawn(connection);

    let result = prove(request, &links, &handle).await;
    let unplugged = unplug(&links).await;
    let report = result?;
    unplugged?;
    Ok(report)
}

/// Removes the probe's ports, and with them the guests.
async fn unplug(links: &Links) -> Result<(), ProbeError> {
    for port in PORTS {
        if let Some(index) = links.index_of(port).await? {
            match links.delete(index, port).await {
                // It went by itself in between.
                Err(_) if links.index_of(port).await?.is_none() => {}
                result => result?,
            }
        }
    }
    Ok(())
}

async fn prove(request: &Request, links: &Links, handle: &Handle) -> Result<Report, ProbeError> {
    let around = links.read().await?;
    let bridge = around.iter().find(|link| link.is_bridge && link.name == request.bridge);
    let bridge = bridge.ok_or_else(|| ProbeError::NoBridge(request.bridge.clone()))?;
    let gateway = bridge.mac.unwrap_or_default();
    let nonce = nonce();
    let [first, second] = addresses::two_free(request, gateway).await?;
    let guests = [
        Guest::plug(handle, bridge, PORTS[0], guest_mac(nonce, 0), within(request.subnet, first)).await?,
        Guest::plug(handle, bridge, PORTS[1], guest_mac(nonce, 1), within(request.subnet, second)).await?,
    ];
    let (mut rows, mut notes) = (Vec::new(), Vec::new());
    if request.internal {
        rows.extend(isolate(request.isolated_by, links, &mut notes).await?);
    }

    let wire = Tap::everywhere([guests[0].port_index, guests[1].port_index], nonce).map_err(ProbeError::Tap)?;
    let trials = Trials::for_request(request, &guests, gateway, &own_addresses(&around), nonce, &mut notes);
    let known = neighbours(handle).await?;
    let mut ears = Ears::new(nonce, &guests, &wire);
    let alive = ears.wait_for_pings(&trials).await?;
    ears.run(&trials.all).await?;
    let alive_still = ears.wait_for_pings(&trials).await?;
    forget(handle, bridge.index, &guests).await;
    // A datagram to an address on a link of the node's own waits for ARP, in vain: that the node asks shows that it would
    // have gone out.
    for (interface, address) in neighbours(handle).await?.difference(&known) {
        for trial in trials.all.iter().filter(|trial| trial.outside == Some(*address)) {
            ears.sightings.went_out.entry(trial.id).or_default().insert(*interface);
        }
    }

    let vms: Vec<&Link> = around.iter().filter(|link| link.master == Some(bridge.index)).collect();
    let ports = [guests[0].port_index, guests[1].port_index];
    rows.extend(trials.judge(request, &ears.sightings, bridge, &vms, ports, alive && alive_still));
    Ok(Report::of(rows, notes))
}

/// Sees to it that the guests' ports are what a VM's would be.
async fn isolate(by: IsolatedBy, links: &Links, notes: &mut Vec<String>) -> Result<Option<Row>, ProbeError> {
    let row =
        |isolated| Row::judge("port isolation", "the daemon", "ports that appear", Expected::Arrives, isolated, true);
    match by {
        IsolatedBy::Daemon => {
            let begun = Instant::now();
            while begun.elapsed() < SETTLE {
                if isolated_ports(links).await? == PORTS.len() {
                    notes.push(format!(
                        "the daemon isolated the probe's ports within {} ms",
                        begun.elapsed().as_millis()
                    ));
                    return Ok(Some(row(true)));
                }
                tokio::time::sleep(POLL).await;
            }
            notes.push(format!("the daemon did not isolate the probe's ports within {} s", SETTLE.as_secs()));
            Ok(Some(Row { verdict: Verdict::Broken, ..row(false) }))
        }
        IsolatedBy::CniPlugin => {
            for port in PORTS {
                if let Some(index) = links.index_of(port).await? {
                    links.isolate(index, port, true).await?;
                }
            }
            notes.push("no daemon is running: the probe isolated its ports as the CNI plugin would".to_owned());
            Ok(None)
        }
        IsolatedBy::Nobody => {
            notes.push(
                "nobody isolates ports on this node: no daemon is running, and the CNI plugin does not".to_owned(),
            );
            Ok(None)
        }
    }
}

async fn isolated_ports(links: &Links) -> Result<usize, ProbeError> {
    let all = links.read().await?;
    Ok(all.iter().filter(|link| PORTS.contains(&link.name.as_str()) && link.isolated).count())
}

/// The addresses that the node has looked for by ARP, found or not, and behind which interface.
async fn neighbours(handle: &Handle) -> Result<BTreeSet<(u32, Ipv4Addr)>, ProbeError> {
    use rtnetlink::packet_route::AddressFamily;
    use rtnetlink::packet_route::neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourMessage};
    let get = handle.neighbours().get().set_address_family(AddressFamily::Inet);
    let entries: Vec<NeighbourMessage> = get.execute().try_collect().await.map_err(ProbeError::Neighbours)?;
    let address = |entry: &NeighbourMessage| {
        entry.attributes.iter().find_map(|attribute| match attribute {
            NeighbourAttribute::Destination(NeighbourAddress::Inet(ip)) => Some((entry.header.ifindex, *ip)),
            _ => None,
        })
    };
    Ok(entries.iter().filter_map(address).collect())
}

/// Makes the kernel forget the guests' addresses, so that DHCP does not hold them back.
async fn forget(handle: &Handle, bridge: u32, guests: &[Guest]) {
    use rtnetlink::packet_route::AddressFamily;
    use rtnetlink::packet_route::neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourMessage};
    for guest in guests {
        let mut message = NeighbourMessage::default();
        message.header.family = AddressFamily::Inet;
        message.header.ifindex = bridge;
        message.attributes.push(NeighbourAttribute::Destination(NeighbourAddress::Inet(guest.ip())));
        if let Err(error) = handle.neighbours().del(message).execute().await {
            tracing::debug!(address = %guest.ip(), %error, "no neighbour entry of the probe to remove");
        }
    }
}

fn own_addresses(around: &[Link]) -> BTreeSet<Ipv4Addr> {
    around.iter().flat_map(|link| &link.addresses).map(Ipv4Net::addr).collect()
}

fn within(subnet: Ipv4Net, address: Ipv4Addr) -> Ipv4Net {
    Ipv4Net::new(address, subnet.prefix_len()).unwrap_or(subnet)
}

/// A locally administered unicast address of this run.
fn guest_mac(nonce: [u8; 6], guest: u8) -> Mac {
    [0x02, 0xc0, nonce[3], nonce[4], nonce[5], guest]
}

/// Random bytes: the standard library seeds its hash maps with them. The first byte is no protocol's beginning.
fn nonce() -> [u8; 6] {
    use std::hash::{BuildHasher, RandomState};
    let b = RandomState::new().hash_one(std::process::id()).to_ne_bytes();
    [0xc0, b[1], b[2], b[3], b[4], b[5]]
}

/// What was seen of each trial.
#[derive(Debug, Default)]
struct Sightings {
    /// Trials whose marker, or answer, reached this guest.
    guests: [BTreeSet<u16>; 2],
    /// Interfaces of the host that a trial came in at, and went out at.
    came_in: BTreeMap<u16, BTreeSet<u32>>,
    went_out: BTreeMap<u16, BTreeSet<u32>>,
}

/// Everything that listens.
struct Ears<'a> {
    nonce: [u8; 6],
    guests: &'a [Guest; 2],
    wire: &'a Tap,
    sightings: Sightings,
}

impl<'a> Ears<'a> {
    fn new(nonce: [u8; 6], guests: &'a [Guest; 2], wire: &'a Tap) -> Self {
        Self { nonce, guests, wire, sightings: Sightings::default() }
    }

    /// Sends every trial a few times, listening all the while and some time after.
    async fn run(&mut self, trials: &[Trial]) -> Result<(), ProbeError> {
        for _ in 0..ROUNDS {
            for batch in trials.chunks(BATCH) {
                for trial in batch {
                    self.guests[trial.from].tap.send(&trial.frame).map_err(ProbeError::Tap)?;
                }
                self.listen(POLL).await;
            }
            self.listen(BETWEEN_ROUNDS).await;
        }
        self.listen(LISTEN).await;
        Ok(())
    }

    /// Pings the gateway from both guests until it has answered both, or long enough.
    async fn wait_for_pings(&mut self, trials: &Trials) -> Result<bool, ProbeError> {
        let begun = Instant::now();
        self.sightings
            .guests
            .iter_mut()
            .for_each(|seen| seen.retain(|trial| !trials.pings.iter().any(|p| p.id == *trial)));
        while begun.elapsed() < SETTLE {
            for ping in &trials.pings {
                self.guests[ping.from].tap.send(&ping.frame).map_err(ProbeError::Tap)?;
            }
            self.listen(BETWEEN_ROUNDS).await;
            if trials.pings.iter().all(|ping| self.sightings.guests[ping.from].contains(&ping.id)) {
                return Ok(true);
            }
        }
        Ok(false)
    }

    async fn listen(&mut self, time: Duration) {
        let begun = Instant::now();
        loop {
            self.hear();
            if begun.elapsed() >= time {
                return;
            }
            tokio::time::sleep(POLL.min(time)).await;
        }
    }

    fn hear(&mut self) {
        for (guest, seen) in self.guests.iter().zip(&mut self.sightings.guests) {
            let incoming = guest.tap.drain().into_iter().filter(|frame| !frame.outgoing);
            seen.extend(incoming.filter_map(|heard| {
                frames::Marker::find(self.nonce, &heard.frame).or_else(|| frames::answered_syn(&heard.frame))
            }));
        }
        for seen in self.wire.drain() {
            if let Some(trial) = frames::Marker::find(self.nonce, &seen.frame) {
                let side = if seen.outgoing { &mut self.sightings.went_out } else { &mut self.sightings.came_in };
                side.entry(trial).or_default().insert(seen.interface);
            }
        }
    }
}
