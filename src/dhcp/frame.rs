//! Ethernet, IPv4 and UDP around a DHCP message (RFC 894, RFC 791, RFC 768).
//!
//! The server speaks to the bridge in whole frames: a client without an address can be answered at its Ethernet address
//! only so, and only so is it known which station sent a request, whatever the request says.

use std::net::Ipv4Addr;

use super::Mac;
use super::reply::{Destination, Reply};
use super::wire::Datagram;

/// Port of the server, and of a relay.
pub const SERVER_PORT: u16 = 67;

/// Port of a client.
pub const CLIENT_PORT: u16 = 68;

const ETHERTYPE_IPV4: [u8; 2] = [0x08, 0x00];
const ETHERNET_LEN: usize = 14;
const IP_LEN: usize = 20;
const UDP_LEN: usize = 8;
const PROTOCOL_UDP: u8 = 17;
const TTL: u8 = 64;
/// Low delay, which dhclient and dhcpd have always set.
const TOS: u8 = 0x10;
const DONT_FRAGMENT: [u8; 2] = [0x40, 0x00];

/// The datagram inside a frame, if that is a whole and sound UDP packet to port 67.
///
/// The UDP checksum is not looked at: a VM whose network card computes it sends frames that do not hold it yet.
#[must_use]
pub fn open(frame: &[u8]) -> Option<Datagram<'_>> {
    let (ethernet, rest) = frame.split_first_chunk::<ETHERNET_LEN>()?;
    let sender = Mac([ethernet[6], ethernet[7], ethernet[8], ethernet[9], ethernet[10], ethernet[11]]);
    if ethernet[12..] != ETHERTYPE_IPV4 {
        return None;
    }
    let ip = rest.first_chunk::<IP_LEN>()?;
    let header_len = usize::from(ip[0] & 0x0f) * 4;
    let total_len = usize::from(u16::from_be_bytes([ip[2], ip[3]]));
    let header = rest.get(..header_len)?;
    let fragmented = ip[6] & 0x3f != 0 || ip[7] != 0;
    let sound = ip[0] >> 4 == 4 && header_len >= IP_LEN && checksum(&[header]) == 0;
    if !sound || fragmented || ip[9] != PROTOCOL_UDP {
        return None;
    }
    let source = Ipv4Addr::new(ip[12], ip[13], ip[14], ip[15]);
    let destination = Ipv4Addr::new(ip[16], ip[17], ip[18], ip[19]);
    let (udp, _) = rest.get(header_len..total_len)?.split_first_chunk::<UDP_LEN>()?;
    let udp_len = usize::from(u16::from_be_bytes([udp[4], udp[5]]));
    if u16::from_be_bytes([udp[2], udp[3]]) != SERVER_PORT {
        return None;
    }
    let payload = rest.get(header_len..total_len)?.get(UDP_LEN..udp_len)?;
    Some(Datagram { sender, source, destination, payload })
}

/// The frame that carries a reply from the server's addresses to where it goes.
#[must_use]
pub fn seal(reply: &Reply, from_mac: Mac, from: Ipv4Addr) -> Vec<u8> {
    let (to_mac, to, port) = match reply.to {
        Destination::Relay(address, mac) => (mac, address, SERVER_PORT),
        Destination::Client(address, mac) => (mac, address, CLIENT_PORT),
        Destination::Broadcast => (Mac::BROADCAST, Ipv4Addr::BROADCAST, CLIENT_PORT),
    };
    // A payload is at most 1472 bytes.
    let udp_len = u16::try_from(UDP_LEN + reply.payload.len()).unwrap_or(u16::MAX);
    let ip = ip_header(udp_len, from, to);
    let udp = udp_header(udp_len, from, to, port, &reply.payload);

    let mut frame = Vec::with_capacity(ETHERNET_LEN + IP_LEN + usize::from(udp_len));
    frame.extend_from_slice(&to_mac.0);
    frame.extend_from_slice(&from_mac.0);
    frame.extend_from_slice(&ETHERTYPE_IPV4);
    frame.extend_from_slice(&ip);
    frame.extend_from_slice(&udp);
    frame.extend_from_slice(&reply.payload);
    frame
}

fn ip_header(udp_len: u16, from: Ipv4Addr, to: Ipv4Addr) -> [u8; IP_LEN] {
    let mut header = [0; IP_LEN];
    header[0] = 0x45;
    header[1] = TOS;
    header[2..4].copy_from_slice(&udp_len.saturating_add(IP_LEN as u16).to_be_bytes());
    header[6..8].copy_from_slice(&DONT_FRAGMENT);
    header[8] = TTL;
    header[9] = PROTOCOL_UDP;
    header[12..16].copy_from_slice(&from.octets());
    header[16..20].copy_from_slice(&to.octets());
    let sum = checksum(&[&header]);
    header[10..12].copy_from_slice(&sum.to_be_bytes());
    header
}

fn udp_header(udp_len: u16, from: Ipv4Addr, to: Ipv4Addr, port: u16, payload: &[u8]) -> [u8; UDP_LEN] {
    let mut header = [0; UDP_LEN];
    header[0..2].copy_from_slice(&SERVER_PORT.to_be_bytes());
    header[2..4].copy_from_slice(&port.to_be_bytes());
    header[4..6].copy_from_slice(&udp_len.to_be_bytes());
    let [high, low] = udp_len.to_be_bytes();
    let sum = checksum(&[&from.octets(), &to.octets(), &[0, PROTOCOL_UDP, high, low], &header, payload]);
    // Zero stands for "not computed"; its other form in one's complement arithmetic stands for itself.
    header[6..8].copy_from_slice(&if sum == 0 { 0xffff } else { sum }.to_be_bytes());
    header
}

/// The Internet checksum (RFC 1071) over parts that, but for the last, have even lengths; 0 when they hold a right one.
fn checksum(parts: &[&[u8]]) -> u16 {
    let words = parts.iter().flat_map(|part| part.chunks(2));
    let mut sum: u32 = words.map(|word| u32::from(word[0]) << 8 | u32::from(*word.get(1).unwrap_or(&0))).sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dhcp::reply::Answer;

    const SERVER_MAC: Mac = Mac([2, 0, 0, 0, 0, 1]);
    const CLIENT_MAC: Mac = Mac([2, 0, 0, 0, 0, 2]);

    fn reply(to: Destination, payload: Vec<u8>) -> Reply {
        Reply { answer: Answer::Nak("test"), to, chaddr: CLIENT_MAC, payload }
    }

    /// A sealed reply is addressed to a relay's port 67, so `open` reads it back.
    #[test]
    fn what_is_sealed_opens_again() {
        for payload in [vec![], vec![1], vec![0xff; 301]] {
            let gateway = Ipv4Addr::new(172, 20, 100, 1);
            let relay = Destination::Relay(Ipv4Addr::new(172, 20, 100, 9), CLIENT_MAC);
            let frame = seal(&reply(relay, payload.clone()), SERVER_MAC, gateway);
            let opened = open(&frame).unwrap();
            assert_eq!((opened.sender, opened.source, opened.payload), (SERVER_MAC, gateway, payload.as_slice()));
        }
    }

    #[test]
    fn a_sealed_datagram_sums_to_zero() {
        let from = Ipv4Addr::new(172, 20, 100, 1);
        let frame = seal(&reply(Destination::Broadcast, vec![7; 300]), SERVER_MAC, from);
        let udp = &frame[ETHERNET_LEN + IP_LEN..];
        let pseudo = [0, PROTOCOL_UDP, udp[4], udp[5]];
        assert_eq!(checksum(&[&from.octets(), &Ipv4Addr::BROADCAST.octets(), &pseudo, udp]), 0);
        assert_eq!(frame[..6], [0xff; 6]);
    }

    /// The example of RFC 1071 section 3.
    #[test]
    fn the_checksum_is_the_internets() {
        assert_eq!(!checksum(&[&[0x00, 0x01, 0xf2, 0x03], &[0xf4, 0xf5, 0xf6, 0xf7]]), 0xddf2);
    }

    #[test]
    fn whatever_is_cut_or_bent_does_not_open() {
        let relay = Destination::Relay(Ipv4Addr::new(172, 20, 100, 9), CLIENT_MAC);
        let good = seal(&reply(relay, vec![1; 20]), SERVER_MAC, Ipv4Addr::new(172, 20, 100, 1));
        for len in 0..good.len() {
            assert!(open(&good[..len]).is_none(), "cut to {len}");
        }
        // Every bit of the IPv4 header counts: its checksum covers it.
        for bit in 0..IP_LEN * 8 {
            let mut bent = good.clone();
            bent[ETHERNET_LEN + bit / 8] ^= 1 << (bit % 8);
            assert!(open(&bent).is_none(), "bit {bit}");
        }
    }
}
