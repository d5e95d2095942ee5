//! What the server asks of the kernel: host routes, the bridge itself, its forwarding table and its neighbours.

use std::io;
use std::net::Ipv4Addr;

use rtnetlink::packet_core::{NLM_F_CREATE, NLM_F_REPLACE};
use rtnetlink::packet_route::link::{LinkAttribute, LinkFlags, LinkMessage};
use rtnetlink::packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourFlags, NeighbourMessage, NeighbourState,
};
use rtnetlink::packet_route::route::{
    RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteProtocol, RouteScope, RouteType,
};
use rtnetlink::packet_route::{AddressFamily, RouteNetlinkMessage};

use super::Mac;
use super::addresses::Port;
use super::netlink::Netlink;

/// A change of a host route.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Change {
    /// Put it in, in place of whatever is there.
    Add(Ipv4Addr),
    /// Take it out, if it is there.
    Remove(Ipv4Addr),
}

/// The bridge as it is now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Link {
    /// Interface index.
    pub index: u32,
    /// Its address.
    pub mac: Mac,
    /// Whether it is up: routes through an interface that goes down are gone.
    pub up: bool,
}

/// Looks the bridge up; `None` when there is none.
pub(super) fn link(netlink: &mut Netlink, name: &str) -> io::Result<Option<Link>> {
    let mut request = LinkMessage::default();
    request.attributes.push(LinkAttribute::IfName(name.to_owned()));
    let message = match netlink.get(RouteNetlinkMessage::GetLink(request)) {
        Ok(RouteNetlinkMessage::NewLink(message)) => message,
        Ok(_) => return Ok(None),
        Err(error) if error.raw_os_error() == Some(nix::libc::ENODEV) => return Ok(None),
        Err(error) => return Err(error),
    };
    let mac = message.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::Address(address) => address.as_slice().try_into().ok().map(Mac),
        _ => None,
    });
    let up = message.header.flags.contains(LinkFlags::Up);
    Ok(mac.map(|mac| Link { index: message.header.index, mac, up }))
}

/// Changes host routes through an interface, in order. The results are those of the changes.
pub(super) fn change(netlink: &mut Netlink, index: u32, changes: &[Change]) -> io::Result<Vec<io::Result<()>>> {
    let request = |change: &Change| match change {
        Change::Add(ip) => (RouteNetlinkMessage::NewRoute(host_route(*ip, index)), NLM_F_CREATE | NLM_F_REPLACE),
        Change::Remove(ip) => (RouteNetlinkMessage::DelRoute(host_route(*ip, index)), 0),
    };
    let mut results = netlink.execute(changes.iter().map(request).collect())?;
    for (result, change) in results.iter_mut().zip(changes) {
        let missing = result.as_ref().is_err_and(|error| error.raw_os_error() == Some(nix::libc::ESRCH));
        if missing && matches!(change, Change::Remove(_)) {
            *result = Ok(());
        }
    }
    Ok(results)
}

/// The addresses that have a host route of our kind through an interface.
pub(super) fn present(netlink: &mut Netlink, index: u32) -> io::Result<Vec<Ipv4Addr>> {
    let mut filter = RouteMessage::default();
    filter.header = our_header(0);
    filter.attributes.push(RouteAttribute::Oif(index));
    let ours = |message: RouteNetlinkMessage| match message {
        RouteNetlinkMessage::NewRoute(route) => our_destination(&route, index),
        _ => None,
    };
    Ok(netlink.dump(&RouteNetlinkMessage::GetRoute(filter))?.into_iter().filter_map(ours).collect())
}

/// `ip route replace ADDRESS dev BRIDGE proto boot scope global`.
fn host_route(ip: Ipv4Addr, index: u32) -> RouteMessage {
    let mut route = RouteMessage::default();
    route.header = our_header(32);
    route.attributes = vec![RouteAttribute::Destination(RouteAddress::Inet(ip)), RouteAttribute::Oif(index)];
    route
}

fn our_header(prefix_len: u8) -> RouteHeader {
    RouteHeader {
        address_family: AddressFamily::Inet,
        destination_prefix_length: prefix_len,
        table: RouteHeader::RT_TABLE_MAIN,
        protocol: RouteProtocol::Boot,
        scope: RouteScope::Universe,
        kind: RouteType::Unicast,
        ..Default::default()
    }
}

/// The destination of a route that could be one of ours. What an operator adds by hand has link scope.
fn our_destination(route: &RouteMessage, index: u32) -> Option<Ipv4Addr> {
    let header = &route.header;
    let ours = header.destination_prefix_length == 32
        && header.table == RouteHeader::RT_TABLE_MAIN
        && header.protocol == RouteProtocol::Boot
        && header.scope == RouteScope::Universe
        && header.kind == RouteType::Unicast;
    let through = |attribute: &RouteAttribute| matches!(attribute, RouteAttribute::Oif(oif) if *oif == index);
    let via = |attribute: &RouteAttribute| matches!(attribute, RouteAttribute::Gateway(_) | RouteAttribute::Via(_));
    if !ours || !route.attributes.iter().any(through) || route.attributes.iter().any(via) {
        return None;
    }
    route.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Destination(RouteAddress::Inet(ip)) => Some(*ip),
        _ => None,
    })
}

/// The addresses that someone behind an interface has answered ARP for, and who.
pub(super) fn neighbours(netlink: &mut Netlink, index: u32) -> io::Result<Vec<(Ipv4Addr, Mac)>> {
    let mut filter = NeighbourMessage::default();
    filter.header.family = AddressFamily::Inet;
    let live = |message: RouteNetlinkMessage| match message {
        RouteNetlinkMessage::NewNeighbour(entry) if entry.header.ifindex == index => live_neighbour(&entry),
        _ => None,
    };
    Ok(netlink.dump(&RouteNetlinkMessage::GetNeighbour(filter))?.into_iter().filter_map(live).collect())
}

fn live_neighbour(entry: &NeighbourMessage) -> Option<(Ipv4Addr, Mac)> {
    let silent = matches!(
        entry.header.state,
        NeighbourState::Incomplete | NeighbourState::Failed | NeighbourState::Noarp | NeighbourState::None
    );
    let ip = entry.attributes.iter().find_map(|attribute| match attribute {
        NeighbourAttribute::Destination(NeighbourAddress::Inet(ip)) => Some(*ip),
        _ => None,
    })?;
    Some((ip, hardware_address(entry)?)).filter(|_| !silent)
}

/// Where a bridge has a station.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Station {
    /// Behind this port, where it last saw it.
    Behind(Port),
    /// Nowhere: it never saw it.
    Unknown,
    /// It is the bridge itself, or one of its ports.
    Ourselves,
}

/// Looks a station up in the forwarding table of a bridge.
pub(super) fn station(netlink: &mut Netlink, bridge: u32, mac: Mac) -> io::Result<Station> {
    let mut request = NeighbourMessage::default();
    request.header.family = AddressFamily::Bridge;
    request.header.flags = NeighbourFlags::Controller;
    request.attributes =
        vec![NeighbourAttribute::LinkLayerAddress(mac.0.to_vec()), NeighbourAttribute::Controller(bridge)];
    match netlink.get(RouteNetlinkMessage::GetNeighbour(request)) {
        Ok(RouteNetlinkMessage::NewNeighbour(entry)) if is_local(&entry) => Ok(Station::Ourselves),
        Ok(RouteNetlinkMessage::NewNeighbour(entry)) => Ok(Station::Behind(Port(entry.header.ifindex))),
        Ok(_) => Ok(Station::Unknown),
        Err(error) if error.raw_os_error() == Some(nix::libc::ENOENT) => Ok(Station::Unknown),
        Err(error) => Err(error),
    }
}

/// The ports of a bridge behind which its stations are.
pub(super) fn ports(netlink: &mut Netlink, bridge: u32) -> io::Result<Vec<(Mac, Port)>> {
    let mut filter = NeighbourMessage::default();
    filter.header.family = AddressFamily::Bridge;
    filter.attributes = vec![NeighbourAttribute::Controller(bridge)];
    let station = |message: RouteNetlinkMessage| match message {
        RouteNetlinkMessage::NewNeighbour(entry) => {
            let of_bridge = entry.attributes.contains(&NeighbourAttribute::Controller(bridge));
            hardware_address(&entry)
                .filter(|_| of_bridge && !is_local(&entry))
                .map(|mac| (mac, Port(entry.header.ifindex)))
        }
        _ => None,
    };
    Ok(netlink.dump(&RouteNetlinkMessage::GetNeighbour(filter))?.into_iter().filter_map(station).collect())
}

/// The addresses of the bridge and of its ports are never learnt.
fn is_local(entry: &NeighbourMessage) -> bool {
    entry.header.state == NeighbourState::Permanent
}

fn hardware_address(entry: &NeighbourMessage) -> Option<Mac> {
    entry.attributes.iter().find_map(|attribute| match attribute {
        NeighbourAttribute::LinkLayerAddress(address) => address.as_slice().try_into().ok().map(Mac),
        _ => None,
    })
}
