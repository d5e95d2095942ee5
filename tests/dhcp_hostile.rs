//! VMs that do not play by the rules, against the daemon.

mod dhcp_raw;
mod support;

use std::net::Ipv4Addr;

use dhcp_raw::*;
use dhcproto::v4::{DhcpOption, MessageType, OptionCode};
use support::{Node, Process};

fn node(pool: u8, flags: &str) -> (Node, Process) {
    let node = Node::new();
    node.adopt(format!("--pool-size {pool}")).succeeded();
    let daemon = node.daemon(flags);
    (node, daemon)
}

#[test]
fn malformed_messages_are_dropped_and_counted_and_the_next_one_is_served() {
    let (node, _daemon) = node(4, "");
    let vm = node.vm_builder("a").unconfigured().build();
    let raw = Raw::on(&vm);
    let good = bytes(&discover(raw.mac));
    let bent = |at: usize, value: u8| {
        let mut bytes = good.clone();
        bytes[at] = value;
        bytes
    };
    let mut overload = good[..240].to_vec();
    overload.extend([53, 1, 1, 52, 1, 3, 255]);
    overload[108..110].copy_from_slice(&[12, 200]);
    let mut truncated = good[..240].to_vec();
    truncated.extend([53, 1, 1, 50, 200, 1]);
    // hlen, htype, group address, cookie, options.
    let malformed = [bent(2, 255), bent(2, 0), bent(1, 7), bent(28, 1), bent(236, 0), overload, truncated];
    for bytes in &malformed {
        raw.send_as(raw.mac, NONE, bytes);
    }
    assert!(raw.lease_for(raw.mac).is_some());
    assert_eq!(metric(&node, "cocoon_net_dhcp_dropped_total{reason=\"malformed\"}"), malformed.len() as u64);
}

#[test]
fn another_vms_release_or_decline_changes_nothing() {
    let (node, _daemon) = node(4, "");
    let (victim, other) = (node.vm_builder("a").unconfigured().build(), node.vm_builder("b").unconfigured().build());
    let (victim, other) = (Raw::on(&victim), Raw::on(&other));
    let leased = victim.lease_for(victim.mac).unwrap();
    // In its own name, in the victim's name, and from the victim's address.
    other.send(&release(other.mac, leased));
    other.send(&release(victim.mac, leased));
    other.send(&decline(victim.mac, leased));
    other.send_as(other.mac, ip(9), &bytes(&release(victim.mac, leased)));
    eventually("the four are counted", || metric(&node, "cocoon_net_dhcp_dropped_total{reason=\"not_holder\"}") == 4);
    assert_eq!(routes(&node), [leased]);
    // The positive control: the holder's own counts.
    victim.send(&release(victim.mac, leased));
    eventually("the route is gone", || routes(&node).is_empty());
}

#[test]
fn one_vm_that_makes_up_addresses_cannot_take_the_pool() {
    let (node, mut daemon) = node(30, "--port-lease-limit 3");
    let (bad, good) = (node.vm_builder("a").unconfigured().build(), node.vm_builder("b").unconfigured().build());
    let (bad, good) = (Raw::on(&bad), Raw::on(&good));
    // Only in the message, as a relay would, and in the frame, too, as another VM would.
    for n in 1..=20 {
        let sender = if n % 2 == 0 { station(n) } else { bad.mac };
        bad.send_as(sender, NONE, &bytes(&discover(station(n))));
    }
    for _ in 0..3 {
        assert!(bad.receive_any(PATIENCE, |_| true).is_some(), "a port gets what its limit allows");
    }
    assert!(bad.receive_any(SILENCE, |_| true).is_none(), "a port got more than its limit allows");
    assert!(good.lease_for(good.mac).is_some());
    assert_eq!(metric(&node, "cocoon_net_dhcp_port_limit_refusals_total"), 17);
    daemon.wait_until(PATIENCE, |daemon| daemon.stderr().contains("--port-lease-limit"));
    let lines = daemon.stderr().lines().filter(|line| line.contains("--port-lease-limit allows")).count();
    assert!((1..=3).contains(&lines), "{lines} lines in the log for 17 refusals");
}

#[test]
fn the_port_limit_survives_a_restart() {
    let (node, daemon) = node(30, "--port-lease-limit 2");
    let vm = node.vm_builder("a").unconfigured().build();
    let raw = Raw::on(&vm);
    for n in 1..=2 {
        let offer = discover(station(n));
        raw.send_as(station(n), NONE, &bytes(&offer));
        let offered = raw.receive_any(PATIENCE, |answer| answer.xid() == offer.xid()).unwrap().message.yiaddr();
        let request = select(station(n), offered);
        raw.send_as(station(n), NONE, &bytes(&request));
        let answer = raw.receive_any(PATIENCE, |answer| answer.xid() == request.xid()).unwrap();
        assert_eq!(answer.kind(), MessageType::Ack);
    }
    daemon.stop();
    let _daemon = node.daemon("--port-lease-limit 2");
    assert_eq!(raw.offer_for(raw.mac, SILENCE), None);
    assert_eq!(metric(&node, "cocoon_net_dhcp_port_limit_refusals_total"), 1);
}

#[test]
fn a_relay_is_answered_only_in_its_own_name_and_from_inside() {
    let (node, _daemon) = node(8, "");
    let vm = node.vm_builder("a").unconfigured().build();
    let raw = Raw::on(&vm);
    let relayed = |giaddr: Ipv4Addr, source| {
        let mut message = discover(station(1));
        message.set_giaddr(giaddr);
        message.opts_mut().insert(DhcpOption::RelayAgentInformation(relay_info()));
        raw.send_as(raw.mac, source, &bytes(&message));
        raw.receive_any(SILENCE, |answer| answer.xid() == message.xid())
    };
    let answer = relayed(ip(200), ip(200)).unwrap();
    assert_eq!((answer.to, answer.to_mac), (ip(200), raw.mac), "to the relay");
    assert!(answer.message.opts().contains(OptionCode::RelayAgentInformation));
    let outside = Ipv4Addr::new(10, 9, 9, 9);
    assert!(relayed(ip(200), ip(201)).is_none());
    assert!(relayed(outside, outside).is_none());
    assert_eq!(metric(&node, "cocoon_net_dhcp_dropped_total{reason=\"relay\"}"), 2);
}

fn relay_info() -> dhcproto::v4::relay::RelayAgentInformation {
    let mut info = dhcproto::v4::relay::RelayAgentInformation::default();
    info.insert(dhcproto::v4::relay::RelayInfo::AgentCircuitId(b"port 7".to_vec()));
    info
}

#[test]
fn replies_reach_a_client_in_the_way_it_asks_for() {
    let (node, _daemon) = node(8, "");
    let vm = node.vm_builder("a").unconfigured().build();
    let raw = Raw::on(&vm);
    // To the client's hardware address: it does not answer ARP yet.
    let offer = raw.ask(&discover(raw.mac), PATIENCE).unwrap();
    assert_eq!((offer.to_mac, offer.to), (raw.mac, offer.message.yiaddr()));
    assert!(offer.len >= 300, "{} bytes", offer.len);
    // Windows: the broadcast flag, a client identifier, its vendor class.
    let mut windows = discover(raw.mac);
    windows.set_flags(dhcproto::v4::Flags::default().set_broadcast());
    let identifier = [&[1], &raw.mac[..]].concat();
    windows.opts_mut().insert(DhcpOption::ClientIdentifier(identifier.clone()));
    windows.opts_mut().insert(DhcpOption::ClassIdentifier(b"MSFT 5.0".to_vec()));
    windows.opts_mut().insert(DhcpOption::Hostname("DESKTOP".to_owned()));
    let offer = raw.ask(&windows, PATIENCE).unwrap();
    assert_eq!((offer.to_mac, offer.to), ([0xff; 6], Ipv4Addr::BROADCAST));
    assert_eq!(offer.message.opts().get(OptionCode::ClientIdentifier), Some(&DhcpOption::ClientIdentifier(identifier)));
    let leased = offer.message.yiaddr();
    let mut request = select(raw.mac, leased);
    request.set_flags(dhcproto::v4::Flags::default().set_broadcast());
    assert_eq!(raw.ask(&request, PATIENCE).unwrap().to, Ipv4Addr::BROADCAST);
    // Renewing and rebinding: to the address that it has. An INFORM, too.
    let answer = raw.ask(&renew(raw.mac, leased), PATIENCE).unwrap();
    assert_eq!((answer.kind(), answer.to), (MessageType::Ack, leased));
    let mut inform = message(MessageType::Inform, raw.mac);
    inform.set_ciaddr(leased);
    let answer = raw.ask(&inform, PATIENCE).unwrap();
    assert_eq!((answer.kind(), answer.message.yiaddr()), (MessageType::Ack, NONE));
    // A NAK: to everyone.
    let answer = raw.ask(&reboot(raw.mac, Ipv4Addr::new(10, 0, 0, 7)), PATIENCE).unwrap();
    assert_eq!((answer.kind(), answer.to), (MessageType::Nak, Ipv4Addr::BROADCAST));
}

#[test]
fn what_is_meant_for_another_server_is_not_answered() {
    let (node, _daemon) = node(4, "");
    let vm = node.vm_builder("a").unconfigured().build();
    let raw = Raw::on(&vm);
    let leased = raw.lease_for(raw.mac).unwrap();
    let elsewhere = Ipv4Addr::new(203, 0, 113, 9);
    let asked = renew(raw.mac, leased);
    raw.send_to(raw.mac, leased, elsewhere, &bytes(&asked));
    assert!(raw.receive_any(SILENCE, |answer| answer.xid() == asked.xid()).is_none());
    raw.send_to(raw.mac, leased, elsewhere, &bytes(&release(raw.mac, leased)));
    assert_eq!(metric(&node, "cocoon_net_dhcp_dropped_total{reason=\"not_for_us\"}"), 2);
    assert_eq!(routes(&node), [leased]);
    // The positive control: to the server's own address.
    let asked = renew(raw.mac, leased);
    raw.send_to(raw.mac, leased, SERVER, &bytes(&asked));
    assert!(raw.receive_any(PATIENCE, |answer| answer.xid() == asked.xid()).is_some());
}

#[test]
fn the_port_limit_is_not_got_round_in_the_name_of_the_bridge_or_another_port() {
    let (node, _daemon) = node(30, "--port-lease-limit 2");
    let (bad, good) = (node.vm_builder("a").unconfigured().build(), node.vm_builder("b").unconfigured().build());
    let (bad, good) = (Raw::on(&bad), Raw::on(&good));
    for interface in ["cni0", "veth-b"] {
        let text = node.read(format!("/sys/class/net/{interface}/address"));
        let octets: Vec<u8> = text.trim().split(':').map(|octet| u8::from_str_radix(octet, 16).unwrap()).collect();
        let spoofed: [u8; 6] = octets.try_into().unwrap();
        for n in 1..=4 {
            let asked = discover(station(n));
            bad.send_as(spoofed, NONE, &bytes(&asked));
        }
        assert!(bad.receive_any(SILENCE, |_| true).is_none(), "answered in the name of {interface}");
    }
    assert_eq!(metric(&node, "cocoon_net_dhcp_dropped_total{reason=\"spoofed_sender\"}"), 8);
    assert!(bad.lease_for(bad.mac).is_some() && good.lease_for(good.mac).is_some());
}

#[test]
fn a_release_in_a_neighbours_name_and_address_comes_from_the_wrong_port() {
    let (node, _daemon) = node(4, "");
    let (victim, other) = (node.vm_builder("a").unconfigured().build(), node.vm_builder("b").unconfigured().build());
    let (victim, other) = (Raw::on(&victim), Raw::on(&other));
    let leased = victim.lease_for(victim.mac).unwrap();
    other.send_as(victim.mac, leased, &bytes(&release(victim.mac, leased)));
    eventually("it is counted", || metric(&node, "cocoon_net_dhcp_dropped_total{reason=\"not_holder\"}") == 1);
    assert_eq!(routes(&node), [leased]);
    victim.send(&release(victim.mac, leased));
    eventually("the route is gone", || routes(&node).is_empty());
}
