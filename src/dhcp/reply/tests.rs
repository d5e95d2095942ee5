use dhcproto::v4::{self, DhcpOption, MessageType, OptionCode};
use dhcproto::{Decodable, Decoder};

use super::*;
use crate::dhcp::wire::Kind;

const MAC: Mac = Mac([0x52, 0x54, 0, 0x12, 0x34, 0x56]);
const RELAY_MAC: Mac = Mac([0x52, 0x54, 0, 0, 0, 9]);
const ADDRESS: Ipv4Addr = Ipv4Addr::new(172, 20, 100, 7);
const GATEWAY: Ipv4Addr = Ipv4Addr::new(172, 20, 100, 1);

fn parameters() -> Parameters {
    Parameters {
        gateway: GATEWAY,
        subnet: "172.20.100.0/24".parse().unwrap(),
        dns: vec![Ipv4Addr::new(8, 8, 8, 8), Ipv4Addr::new(1, 1, 1, 1)],
        mtu: Some(1460),
        lease_time: Duration::from_secs(86400),
    }
}

fn request() -> Request {
    Request {
        kind: Kind::Request,
        xid: 0xdead_beef,
        flags: 0,
        ciaddr: Ipv4Addr::UNSPECIFIED,
        giaddr: Ipv4Addr::UNSPECIFIED,
        chaddr: MAC,
        requested: Some(ADDRESS),
        server_id: Some(GATEWAY),
        max_message_size: None,
        client_id: None,
        relay_info: None,
        source: Ipv4Addr::UNSPECIFIED,
        sender: MAC,
    }
}

fn decode(reply: &Reply) -> v4::Message {
    v4::Message::decode(&mut Decoder::new(&reply.payload)).unwrap()
}

#[test]
fn an_ack_says_all_that_a_vm_needs_to_know() {
    let reply = Reply::new(&request(), Answer::Ack(ADDRESS), &parameters());
    assert_eq!(reply.payload.len(), 300);
    let message = decode(&reply);
    assert_eq!((message.opcode(), message.xid()), (v4::Opcode::BootReply, 0xdead_beef));
    assert_eq!((message.yiaddr(), message.chaddr()), (ADDRESS, &MAC.0[..]));
    let options: Vec<DhcpOption> = message.opts().iter().map(|(_, option)| option.clone()).collect();
    assert_eq!(
        options,
        [
            DhcpOption::SubnetMask(Ipv4Addr::new(255, 255, 255, 0)),
            DhcpOption::Router(vec![GATEWAY]),
            DhcpOption::DomainNameServer(parameters().dns),
            DhcpOption::InterfaceMtu(1460),
            DhcpOption::AddressLeaseTime(86400),
            DhcpOption::MessageType(MessageType::Ack),
            DhcpOption::ServerIdentifier(GATEWAY),
            DhcpOption::Renewal(43200),
            DhcpOption::Rebinding(75600),
        ]
    );
}

#[test]
fn an_inform_is_answered_without_a_lease() {
    let inform = Request { kind: Kind::Inform, ciaddr: ADDRESS, ..request() };
    let message = decode(&Reply::new(&inform, Answer::Inform, &parameters()));
    assert_eq!((message.ciaddr(), message.yiaddr()), (ADDRESS, Ipv4Addr::UNSPECIFIED));
    assert!(message.opts().contains(OptionCode::Router));
    for code in [OptionCode::AddressLeaseTime, OptionCode::Renewal, OptionCode::Rebinding] {
        assert!(!message.opts().contains(code), "{code:?}");
    }
}

#[test]
fn a_nak_carries_no_address_and_no_lease() {
    let message =
        decode(&Reply::new(&Request { ciaddr: ADDRESS, ..request() }, Answer::Nak("not yours"), &parameters()));
    assert_eq!((message.ciaddr(), message.yiaddr()), (Ipv4Addr::UNSPECIFIED, Ipv4Addr::UNSPECIFIED));
    let codes: Vec<OptionCode> = message.opts().iter().map(|(code, _)| *code).collect();
    assert_eq!(codes, [OptionCode::MessageType, OptionCode::ServerIdentifier, OptionCode::Message]);
}

#[test]
fn replies_go_where_section_4_1_sends_them() {
    let plain = request();
    let broadcast = Request { flags: 0x8000, ..request() };
    let renewing = Request { ciaddr: ADDRESS, flags: 0x8000, ..request() };
    let relayed = Request { giaddr: Ipv4Addr::new(172, 20, 100, 9), sender: RELAY_MAC, ..renewing.clone() };
    let to = |request: &Request, answer| Reply::new(request, answer, &parameters()).to;
    let (ack, nak) = (Answer::Ack(ADDRESS), Answer::Nak("no"));

    assert_eq!(to(&plain, ack), Destination::Client(ADDRESS, MAC));
    assert_eq!(to(&broadcast, ack), Destination::Broadcast);
    assert_eq!(to(&renewing, ack), Destination::Client(ADDRESS, MAC));
    assert_eq!(to(&relayed, ack), Destination::Relay(relayed.giaddr, RELAY_MAC));
    assert_eq!(to(&plain, nak), Destination::Broadcast);
    assert_eq!(to(&renewing, nak), Destination::Broadcast);
    assert_eq!(to(&relayed, nak), Destination::Relay(relayed.giaddr, RELAY_MAC));
}

#[test]
fn a_relayed_nak_asks_the_relay_to_broadcast() {
    let relayed = Request { giaddr: Ipv4Addr::new(172, 20, 100, 9), ..request() };
    assert!(decode(&Reply::new(&relayed, Answer::Nak("no"), &parameters())).flags().broadcast());
    assert!(!decode(&Reply::new(&relayed, Answer::Ack(ADDRESS), &parameters())).flags().broadcast());
}

#[test]
fn relay_information_comes_back_byte_for_byte_and_last() {
    let info = vec![1, 4, b'e', b't', b'h', b'0', 200, 1, 0];
    let relayed = Request { relay_info: Some(info.clone()), client_id: Some(vec![1, 2]), ..request() };
    let payload = Reply::new(&relayed, Answer::Ack(ADDRESS), &parameters()).payload;
    let mut tail = vec![82, 9];
    tail.extend(info);
    tail.push(255);
    let end = payload.iter().rposition(|byte| *byte == 255).unwrap();
    assert_eq!(payload[end + 1 - tail.len()..=end], tail);
}

#[test]
fn a_client_identifier_is_echoed_when_there_is_room() {
    let echoed = |len: usize, max_message_size| {
        let request = Request { client_id: Some(vec![7; len]), max_message_size, ..request() };
        let reply = Reply::new(&request, Answer::Ack(ADDRESS), &parameters());
        assert!(reply.payload.len() <= MAX_LEN);
        decode(&reply).opts().contains(OptionCode::ClientIdentifier)
    };
    assert!(echoed(7, None));
    assert!(!echoed(400, None));
    assert!(echoed(255, Some(1500)));
    assert!(!echoed(1300, Some(1500)));
}

#[test]
fn a_lease_is_never_for_ever_nor_for_no_time() {
    assert_eq!(lease_seconds(Duration::MAX), u32::MAX - 1);
    assert_eq!(lease_seconds(Duration::from_millis(10)), 1);
}
