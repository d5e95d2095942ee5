//! What goes back to a client, and where to (RFC 2131 sections 4.1 and 4.3).

use std::net::Ipv4Addr;
use std::time::Duration;

use super::Mac;
use super::wire::{FIXED_LEN, MAGIC_COOKIE, Request, code};
use crate::config::Subnet;

/// BOOTP clients drop anything shorter (RFC 1542 section 2.1).
const MIN_LEN: usize = 300;

/// Every client takes a message of this length: 576 bytes of IP datagram less its headers (RFC 2131 section 2).
const USUAL_MAX_LEN: usize = 548;

/// IPv4 and UDP headers, which option 57 counts and a payload does not hold.
const HEADERS_LEN: usize = 28;

/// The longest payload sent, whatever a client says it can take.
const MAX_LEN: usize = 1472;

const OP_REPLY: u8 = 2;
const BROADCAST_FLAG: u16 = 0x8000;

/// What is told to every client.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Parameters {
    /// Server identifier and router.
    pub gateway: Ipv4Addr,
    /// Whence the subnet mask.
    pub subnet: Subnet,
    /// Resolvers.
    pub dns: Vec<Ipv4Addr>,
    /// MTU in bytes; left out when there is none.
    pub mtu: Option<u16>,
    /// How long a lease lasts.
    pub lease_time: Duration,
}

/// What kind of answer it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answer {
    /// DHCPOFFER of this address.
    Offer(Ipv4Addr),
    /// DHCPACK of a lease of this address.
    Ack(Ipv4Addr),
    /// DHCPACK to an INFORM: parameters without a lease.
    Inform,
    /// DHCPNAK, and why, in words for whoever reads the client's log.
    Nak(&'static str),
}

/// Where an answer is sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Destination {
    /// Port 67 of the relay, at the Ethernet address that it sent from.
    Relay(Ipv4Addr, Mac),
    /// Port 68 of the client, straight to its Ethernet address: it may not answer ARP yet.
    Client(Ipv4Addr, Mac),
    /// Port 68 of everyone.
    Broadcast,
}

/// An answer on its way.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reply {
    /// What it says.
    pub answer: Answer,
    /// Where it goes.
    pub to: Destination,
    /// Whom it is for.
    pub chaddr: Mac,
    /// The DHCP message.
    pub payload: Vec<u8>,
}

impl Reply {
    /// Composes the answer to a request.
    #[must_use]
    pub fn new(request: &Request, answer: Answer, parameters: &Parameters) -> Self {
        let to = destination(request, answer);
        Self { answer, to, chaddr: request.chaddr, payload: encode(request, answer, parameters) }
    }
}

/// RFC 2131 section 4.1, fourth and following paragraphs.
fn destination(request: &Request, answer: Answer) -> Destination {
    if request.is_relayed() {
        return Destination::Relay(request.giaddr, request.sender);
    }
    match answer {
        Answer::Nak(_) => Destination::Broadcast,
        _ if !request.ciaddr.is_unspecified() => Destination::Client(request.ciaddr, request.chaddr),
        _ if request.wants_broadcast() => Destination::Broadcast,
        Answer::Offer(yiaddr) | Answer::Ack(yiaddr) => Destination::Client(yiaddr, request.chaddr),
        Answer::Inform => Destination::Client(request.source, request.chaddr),
    }
}

/// The message: fixed fields as RFC 2131 table 3 has them, options, padding.
fn encode(request: &Request, answer: Answer, parameters: &Parameters) -> Vec<u8> {
    let (ciaddr, yiaddr) = match answer {
        Answer::Offer(yiaddr) => (Ipv4Addr::UNSPECIFIED, yiaddr),
        Answer::Ack(yiaddr) => (request.ciaddr, yiaddr),
        Answer::Inform => (request.ciaddr, Ipv4Addr::UNSPECIFIED),
        Answer::Nak(_) => (Ipv4Addr::UNSPECIFIED, Ipv4Addr::UNSPECIFIED),
    };
    // A relay must broadcast a NAK: the client may have no address that it answers for.
    let relayed_nak = matches!(answer, Answer::Nak(_)) && request.is_relayed();
    let flags = if relayed_nak { request.flags | BROADCAST_FLAG } else { request.flags };

    let mut message = Vec::with_capacity(MIN_LEN);
    message.extend_from_slice(&[OP_REPLY, 1, 6, 0]);
    message.extend_from_slice(&request.xid.to_be_bytes());
    message.extend_from_slice(&[0, 0]);
    message.extend_from_slice(&flags.to_be_bytes());
    for address in [ciaddr, yiaddr, Ipv4Addr::UNSPECIFIED, request.giaddr] {
        message.extend_from_slice(&address.octets());
    }
    message.extend_from_slice(&request.chaddr.0);
    message.resize(FIXED_LEN - MAGIC_COOKIE.len(), 0);
    message.extend_from_slice(&MAGIC_COOKIE);

    push(&mut message, code::MESSAGE_TYPE, &[message_type(answer)]);
    push(&mut message, code::SERVER_ID, &parameters.gateway.octets());
    match answer {
        Answer::Offer(_) | Answer::Ack(_) => {
            push_times(&mut message, parameters.lease_time);
            push_network(&mut message, parameters);
        }
        Answer::Inform => push_network(&mut message, parameters),
        Answer::Nak(reason) => push(&mut message, code::MESSAGE, reason.as_bytes()),
    }
    push_echoes(&mut message, request);
    message.push(code::END);
    if message.len() < MIN_LEN {
        message.resize(MIN_LEN, code::PAD);
    }
    message
}

fn message_type(answer: Answer) -> u8 {
    match answer {
        Answer::Offer(_) => 2,
        Answer::Ack(_) | Answer::Inform => 5,
        Answer::Nak(_) => 6,
    }
}

/// Lease time, T1 at a half and T2 at seven eighths of it (RFC 2131 section 4.4.5).
fn push_times(message: &mut Vec<u8>, lease_time: Duration) {
    let seconds = lease_seconds(lease_time);
    let rebinding = u32::try_from(u64::from(seconds) * 7 / 8).unwrap_or(u32::MAX);
    push(message, code::LEASE_TIME, &seconds.to_be_bytes());
    push(message, code::RENEWAL_TIME, &(seconds / 2).to_be_bytes());
    push(message, code::REBINDING_TIME, &rebinding.to_be_bytes());
}

/// Whole seconds, at least one and short of the value that stands for ever (RFC 2131 section 3.3).
fn lease_seconds(lease_time: Duration) -> u32 {
    u32::try_from(lease_time.as_secs()).unwrap_or(u32::MAX).clamp(1, u32::MAX - 1)
}

fn push_network(message: &mut Vec<u8>, parameters: &Parameters) {
    push(message, code::SUBNET_MASK, &parameters.subnet.net().netmask().octets());
    push(message, code::ROUTER, &parameters.gateway.octets());
    // Sixteen leave room for everything else in the message that every client takes.
    let dns: Vec<u8> = parameters.dns.iter().take(16).flat_map(std::net::Ipv4Addr::octets).collect();
    if !dns.is_empty() {
        push(message, code::DNS, &dns);
    }
    if let Some(mtu) = parameters.mtu {
        push(message, code::MTU, &mtu.to_be_bytes());
    }
}

/// Client identifier, when there is room, and relay agent information, which must be the last option.
fn push_echoes(message: &mut Vec<u8>, request: &Request) {
    let agreed = request.max_message_size.map_or(0, |size| usize::from(size).saturating_sub(HEADERS_LEN));
    let limit = agreed.clamp(USUAL_MAX_LEN, MAX_LEN);
    let relay_info = request.relay_info.as_deref().unwrap_or_default();
    let reserved = encoded_len(relay_info) + 1;
    if let Some(client_id) = &request.client_id
        && message.len() + encoded_len(client_id) + reserved <= limit
    {
        push(message, code::CLIENT_ID, client_id);
    }
    if request.relay_info.is_some() && message.len() + reserved <= MAX_LEN {
        push(message, code::RELAY_INFO, relay_info);
    }
}

/// How long an option becomes with the headers of its parts.
fn encoded_len(value: &[u8]) -> usize {
    value.len() + 2 * value.len().div_ceil(255).max(1)
}

/// Adds an option; one longer than 255 bytes in parts (RFC 3396).
fn push(message: &mut Vec<u8>, option: u8, value: &[u8]) {
    if value.is_empty() {
        message.extend_from_slice(&[option, 0]);
    }
    for part in value.chunks(255) {
        // A part has at most 255 bytes.
        message.extend_from_slice(&[option, u8::try_from(part.len()).unwrap_or(u8::MAX)]);
        message.extend_from_slice(part);
    }
}

#[cfg(test)]
mod tests;
