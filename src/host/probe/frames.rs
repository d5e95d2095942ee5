//! The frames that the probe sends, built byte by byte: what a hostile VM would send, not what a kernel would.

use std::net::{Ipv4Addr, Ipv6Addr};

use crate::host::links::Mac;

pub(super) const BROADCAST: Mac = [0xff; 6];
const ALL_NODES: Mac = [0x33, 0x33, 0, 0, 0, 1];

/// EtherTypes, IEEE 802 numbers.
const IPV4: u16 = 0x0800;
const ARP: u16 = 0x0806;
const IPV6: u16 = 0x86dd;
const PPPOE_DISCOVERY: u16 = 0x8863;
/// "Local Experimental Ethertype 1": no protocol has it.
const EXPERIMENTAL: u16 = 0x88b5;
/// Tag protocol identifiers of 802.1Q and 802.1ad.
const CUSTOMER_TAG: u16 = 0x8100;
const SERVICE_TAG: u16 = 0x88a8;

const ICMP: u8 = 1;
const TCP: u8 = 6;
const UDP: u8 = 17;

/// UDP "discard", RFC 863: whoever gets it has nothing to do.
pub(super) const DISCARD: u16 = 9;

/// The smallest Ethernet frame, without its check sequence.
const SMALLEST: usize = 60;

/// What marks every frame of a run: six random bytes, then the number of the trial.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Marker {
    pub nonce: [u8; 6],
    pub trial: u16,
}

impl Marker {
    fn bytes(self) -> [u8; 8] {
        let (n, t) = (self.nonce, self.trial.to_be_bytes());
        [n[0], n[1], n[2], n[3], n[4], n[5], t[0], t[1]]
    }

    /// The trial that a received frame belongs to, wherever in it the marker is.
    pub(super) fn find(nonce: [u8; 6], frame: &[u8]) -> Option<u16> {
        let at = frame.windows(nonce.len()).position(|window| window == nonce)?;
        Some(u16::from_be_bytes(frame.get(at + 6..at + 8)?.try_into().ok()?))
    }
}

/// One end of the conversation.
#[derive(Debug, Clone, Copy)]
pub(super) struct End {
    pub mac: Mac,
    pub ip: Ipv4Addr,
}

impl End {
    /// Its IPv6 link-local address (RFC 4291 appendix A).
    fn link_local(self) -> Ipv6Addr {
        let m = self.mac.map(u16::from);
        Ipv6Addr::new(0xfe80, 0, 0, 0, (m[0] ^ 2) << 8 | m[1], m[2] << 8 | 0xff, 0xfe00 | m[3], m[4] << 8 | m[5])
    }

    /// A global IPv6 address, from the documentation range (RFC 3849).
    fn global(self) -> Ipv6Addr {
        let o = self.ip.octets().map(u16::from);
        Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, o[0] << 8 | o[1], o[2] << 8 | o[3])
    }
}

/// What one VM can send at another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Ipv4,
    Ipv4Broadcast,
    Ipv4Spoofed,
    Detour,
    DetourSpoofed,
    Ipv6LinkLocal,
    Ipv6Multicast,
    Ipv6Global,
    Arp,
    Vlan0,
    Vlan5,
    ServiceVlan5,
    Pppoe,
    Unknown,
    UnknownBroadcast,
}

impl Kind {
    /// Every kind, and what it is called in a report.
    pub(super) const ALL: [(Self, &'static str); 15] = [
        (Self::Ipv4, "IPv4"),
        (Self::Ipv4Broadcast, "IPv4 broadcast"),
        (Self::Ipv4Spoofed, "IPv4, source spoofed"),
        (Self::Detour, "IPv4 through the gateway"),
        (Self::DetourSpoofed, "IPv4 through the gateway, source spoofed"),
        (Self::Ipv6LinkLocal, "IPv6 link-local"),
        (Self::Ipv6Multicast, "IPv6 multicast"),
        (Self::Ipv6Global, "IPv6 global"),
        (Self::Arp, "ARP"),
        (Self::Vlan0, "VLAN 0"),
        (Self::Vlan5, "VLAN 5"),
        (Self::ServiceVlan5, "VLAN 5, 802.1ad"),
        (Self::Pppoe, "PPPoE discovery"),
        (Self::Unknown, "unknown ethertype"),
        (Self::UnknownBroadcast, "unknown ethertype, broadcast"),
    ];
}

/// Two VMs on one bridge.
#[derive(Debug, Clone, Copy)]
pub(super) struct Pair {
    pub from: End,
    pub to: End,
    /// MAC address of the bridge.
    pub gateway: Mac,
    /// Broadcast address of their subnet.
    pub broadcast: Ipv4Addr,
}

impl Pair {
    /// A frame of this kind from one to the other.
    pub(super) fn frame(&self, kind: Kind, marker: Marker) -> Vec<u8> {
        // Documentation range, RFC 5737.
        let stranger = Ipv4Addr::new(192, 0, 2, 77);
        let all_nodes = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
        let (from, to) = (self.from, self.to);
        let udp = |source, destination| udp4(source, destination, 64, marker);
        let plain = |mac, ethertype, payload: &[u8]| ethernet(mac, from.mac, &[], ethertype, payload);
        let tagged = |tag| ethernet(to.mac, from.mac, &[tag], IPV4, &udp(from.ip, to.ip));
        match kind {
            Kind::Ipv4 => plain(to.mac, IPV4, &udp(from.ip, to.ip)),
            Kind::Ipv4Broadcast => plain(BROADCAST, IPV4, &udp(from.ip, self.broadcast)),
            Kind::Ipv4Spoofed => plain(to.mac, IPV4, &udp(stranger, to.ip)),
            Kind::Detour => plain(self.gateway, IPV4, &udp(from.ip, to.ip)),
            Kind::DetourSpoofed => plain(self.gateway, IPV4, &udp(stranger, to.ip)),
            Kind::Ipv6LinkLocal => plain(to.mac, IPV6, &udp6(from.link_local(), to.link_local(), marker)),
            Kind::Ipv6Multicast => plain(ALL_NODES, IPV6, &udp6(from.link_local(), all_nodes, marker)),
            Kind::Ipv6Global => plain(to.mac, IPV6, &udp6(from.global(), to.global(), marker)),
            Kind::Arp => arp_request(from, to.ip, &marker.bytes()),
            Kind::Vlan0 => tagged((CUSTOMER_TAG, 0)),
            Kind::Vlan5 => tagged((CUSTOMER_TAG, 5)),
            Kind::ServiceVlan5 => tagged((SERVICE_TAG, 5)),
            Kind::Pppoe => plain(BROADCAST, PPPOE_DISCOVERY, &padi(marker)),
            Kind::Unknown => plain(to.mac, EXPERIMENTAL, &marker.bytes()),
            Kind::UnknownBroadcast => plain(BROADCAST, EXPERIMENTAL, &marker.bytes()),
        }
    }
}

/// A UDP datagram to an address beyond the gateway. It has two hops to live: one to be forwarded by the node, so that a
/// frame that does get out dies at the next router.
pub(super) fn to_outside(from: End, gateway: Mac, target: Ipv4Addr, marker: Marker) -> Vec<u8> {
    ethernet(gateway, from.mac, &[], IPV4, &udp4(from.ip, target, 2, marker))
}

/// A UDP datagram to a port of the node that nobody listens on: an open node answers "port unreachable".
pub(super) fn to_host(from: End, gateway: Mac, address: Ipv4Addr, marker: Marker) -> Vec<u8> {
    ethernet(gateway, from.mac, &[], IPV4, &udp4(from.ip, address, 64, marker))
}

/// An ICMP echo request (RFC 792), which comes back with the marker in it.
pub(super) fn ping(from: End, gateway: Mac, address: Ipv4Addr, marker: Marker) -> Vec<u8> {
    let mut icmp = vec![8, 0, 0, 0];
    icmp.extend(marker.trial.to_be_bytes());
    icmp.extend([0, 1]);
    icmp.extend(marker.bytes());
    let sum = checksum(&[&icmp]);
    icmp[2..4].copy_from_slice(&sum.to_be_bytes());
    ethernet(gateway, from.mac, &[], IPV4, &ipv4(from.ip, address, 64, ICMP, &icmp))
}

/// A TCP SYN (RFC 9293) from a port that is the trial's own. An open node answers SYN-ACK or RST.
pub(super) fn syn(from: End, gateway: Mac, address: Ipv4Addr, port: u16, marker: Marker) -> Vec<u8> {
    let mut tcp = Vec::new();
    tcp.extend(syn_port(marker.trial).to_be_bytes());
    tcp.extend(port.to_be_bytes());
    tcp.extend(&marker.bytes()[..4]);
    tcp.extend([0, 0, 0, 0, 5 << 4, 0x02, 0x40, 0, 0, 0, 0, 0]);
    let length = u16::try_from(tcp.len()).unwrap_or(0).to_be_bytes();
    let pseudo = [&from.ip.octets()[..], &address.octets(), &[0, TCP], &length].concat();
    let sum = checksum(&[&pseudo, &tcp]);
    tcp[16..18].copy_from_slice(&sum.to_be_bytes());
    ethernet(gateway, from.mac, &[], IPV4, &ipv4(from.ip, address, 64, TCP, &tcp))
}

/// The trial whose SYN this frame answers.
pub(super) fn answered_syn(frame: &[u8]) -> Option<u16> {
    let ip = frame.get(14..).filter(|_| frame.get(12..14) == Some(&IPV4.to_be_bytes()))?;
    let header = usize::from(ip.first()? & 0x0f) * 4;
    let tcp = ip.get(header..).filter(|_| ip.get(9) == Some(&TCP))?;
    let port = u16::from_be_bytes(tcp.get(2..4)?.try_into().ok()?);
    port.checked_sub(SYN_PORTS)
}

/// First of the source ports that SYNs are sent from: the dynamic range (RFC 6335).
const SYN_PORTS: u16 = 49_152;

fn syn_port(trial: u16) -> u16 {
    SYN_PORTS.saturating_add(trial)
}

/// An ARP request (RFC 826). Its trailer, which nobody reads, holds `trailer`.
pub(super) fn arp_request(from: End, wanted: Ipv4Addr, trailer: &[u8]) -> Vec<u8> {
    let mut arp = vec![0, 1, 8, 0, 6, 4, 0, 1];
    arp.extend(from.mac);
    arp.extend(from.ip.octets());
    arp.extend([0; 6]);
    arp.extend(wanted.octets());
    arp.extend(trailer);
    ethernet(BROADCAST, from.mac, &[], ARP, &arp)
}

/// The address that an ARP frame speaks for: its sender's.
pub(super) fn arp_sender(frame: &[u8]) -> Option<Ipv4Addr> {
    let arp = frame.get(14..).filter(|_| frame.get(12..14) == Some(&ARP.to_be_bytes()))?;
    let octets: [u8; 4] = arp.get(14..18)?.try_into().ok()?;
    Some(octets.into())
}

fn ethernet(destination: Mac, source: Mac, tags: &[(u16, u16)], ethertype: u16, payload: &[u8]) -> Vec<u8> {
    let mut frame = [destination, source].concat();
    for (protocol, tag) in tags {
        frame.extend(protocol.to_be_bytes());
        frame.extend(tag.to_be_bytes());
    }
    frame.extend(ethertype.to_be_bytes());
    frame.extend(payload);
    frame.resize(frame.len().max(SMALLEST), 0);
    frame
}

fn udp4(source: Ipv4Addr, destination: Ipv4Addr, ttl: u8, marker: Marker) -> Vec<u8> {
    // A checksum of 0 means none (RFC 768).
    ipv4(
        source,
        destination,
        ttl,
        UDP,
        &[&DISCARD.to_be_bytes()[..], &DISCARD.to_be_bytes(), &[0, 16, 0, 0], &marker.bytes()].concat(),
    )
}

fn ipv4(source: Ipv4Addr, destination: Ipv4Addr, ttl: u8, protocol: u8, payload: &[u8]) -> Vec<u8> {
    let length = u16::try_from(20 + payload.len()).unwrap_or(u16::MAX).to_be_bytes();
    let mut packet = vec![0x45, 0, length[0], length[1], 0, 0, 0, 0, ttl, protocol, 0, 0];
    packet.extend(source.octets());
    packet.extend(destination.octets());
    let sum = checksum(&[&packet]);
    packet[10..12].copy_from_slice(&sum.to_be_bytes());
    packet.extend(payload);
    packet
}

fn udp6(source: Ipv6Addr, destination: Ipv6Addr, marker: Marker) -> Vec<u8> {
    let mut udp = [&DISCARD.to_be_bytes()[..], &DISCARD.to_be_bytes(), &[0, 16, 0, 0], &marker.bytes()].concat();
    let pseudo = [&source.octets()[..], &destination.octets(), &[0, 0, 0, 16, 0, 0, 0, UDP]].concat();
    let sum = checksum(&[&pseudo, &udp]);
    udp[6..8].copy_from_slice(&sum.to_be_bytes());
    [&[0x60, 0, 0, 0, 0, 16, UDP, 64][..], &source.octets(), &destination.octets(), &udp].concat()
}

/// A PPPoE Active Discovery Initiation (RFC 2516 section 5.1) with the marker as its Host-Uniq tag.
fn padi(marker: Marker) -> Vec<u8> {
    [&[0x11, 0x09, 0, 0, 0, 12, 0x01, 0x03, 0, 8][..], &marker.bytes()].concat()
}

/// The Internet checksum (RFC 1071) over parts of even length.
fn checksum(parts: &[&[u8]]) -> u16 {
    let words = parts.iter().flat_map(|part| part.chunks(2));
    let mut sum: u32 = words.map(|word| u32::from(u16::from_be_bytes([word[0], *word.get(1).unwrap_or(&0)]))).sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !u16::try_from(sum).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: End = End { mac: [2, 0, 0, 0, 0, 0xa], ip: Ipv4Addr::new(172, 20, 100, 10) };
    const B: End = End { mac: [2, 0, 0, 0, 0, 0xb], ip: Ipv4Addr::new(172, 20, 100, 11) };
    const GATEWAY: Mac = [2, 0, 0, 0, 0, 1];

    fn marker(trial: u16) -> Marker {
        Marker { nonce: *b"\xc0\xc0random".first_chunk().unwrap(), trial }
    }

    #[test]
    fn every_frame_carries_its_trial() {
        let pair = Pair { from: A, to: B, gateway: GATEWAY, broadcast: Ipv4Addr::new(172, 20, 100, 255) };
        for (trial, (kind, name)) in (1..).zip(Kind::ALL) {
            let frame = pair.frame(kind, marker(trial));
            assert_eq!(Marker::find(marker(0).nonce, &frame), Some(trial), "{name}");
            assert!(frame.len() >= SMALLEST, "{name}");
            assert_eq!(frame[6..12], A.mac, "{name}: the sender's MAC address must not be someone else's");
        }
    }

    #[test]
    fn checksums_add_up() {
        let verified = |bytes: &[u8]| checksum(&[bytes]) == 0;
        let frame = ping(A, GATEWAY, Ipv4Addr::new(172, 20, 100, 1), marker(7));
        assert!(verified(&frame[14..34]), "IPv4 header");
        assert!(verified(&frame[34..50]), "ICMP");
        let frame = syn(A, GATEWAY, Ipv4Addr::new(172, 20, 100, 1), 22, marker(7));
        let pseudo = [&frame[26..34], &[0, 6, 0, 20]].concat();
        assert_eq!(checksum(&[&pseudo, &frame[34..54]]), 0, "TCP");
    }

    #[test]
    fn the_answer_to_a_syn_is_told_by_its_port() {
        let gateway = End { mac: GATEWAY, ip: Ipv4Addr::new(172, 20, 100, 1) };
        let mut answer = syn(gateway, A.mac, A.ip, 0, marker(0));
        answer[36..38].copy_from_slice(&syn_port(7).to_be_bytes());
        assert_eq!(answered_syn(&answer), Some(7));
        assert_eq!(answered_syn(&ping(gateway, A.mac, A.ip, marker(7))), None);
    }

    #[test]
    fn what_gets_out_dies_at_the_next_router() {
        assert_eq!(to_outside(A, GATEWAY, Ipv4Addr::new(10, 0, 0, 1), marker(1))[14 + 8], 2);
    }

    #[test]
    fn an_arp_frame_speaks_for_its_sender() {
        assert_eq!(arp_sender(&arp_request(A, B.ip, &[])), Some(A.ip));
        assert_eq!(arp_sender(&ping(A, GATEWAY, B.ip, marker(1))), None);
    }
}
