//! With both layers nothing passes between two VMs, whatever it is; without them, all of it would.

#![expect(clippy::expect_used, reason = "a test fails by panicking")]

mod support;

use std::time::Duration;

use support::{Frame, GATEWAY, Host, INTERNET, METADATA, NODE_ADDRESS, Node, Vm};

const IPV4: u16 = 0x0800;

/// The frames that one VM can send at another.
fn frames(from: &Vm, to: &Vm) -> Vec<(&'static str, Frame)> {
    let (a, b) = (octets(from.address()), octets(to.address()));
    let ipv4 = || Frame::new(IPV4).header(ipv4_header(a, b));
    let ipv6 = |source: u8, destination: u8, prefix: [u8; 2]| {
        let address = |last: u8| [&prefix[..], &[0; 13], &[last]].concat();
        let header = [&[0x60, 0, 0, 0, 0, 40, 59, 64][..], &address(source), &address(destination)].concat();
        Frame::new(0x86dd).header(header)
    };
    vec![
        ("IPv4", ipv4()),
        ("IPv4 broadcast", ipv4().broadcast()),
        ("IPv4 from an address of another", Frame::new(IPV4).header(ipv4_header([172, 20, 100, 99], b))),
        ("IPv4 from another MAC address", ipv4().from([2, 0, 0, 0, 0, 0x99])),
        ("IPv6 link-local", ipv6(a[3], b[3], [0xfe, 0x80])),
        ("IPv6 global", ipv6(a[3], b[3], [0x20, 0x01])),
        ("VLAN 0", ipv4().vlan(0)),
        ("VLAN 5", ipv4().vlan(5)),
        ("VLAN 5 within VLAN 7", ipv4().vlan(5).vlan(7)),
        ("PPPoE discovery", Frame::new(0x8863).header([0x11, 0x09, 0, 0, 0, 0]).broadcast()),
        ("ARP", Frame::new(0x0806).header(arp_request(from.mac(), a, b)).broadcast()),
        ("an unknown ethertype", Frame::new(0x88b5)),
        ("an unknown ethertype, broadcast", Frame::new(0x88b5).broadcast()),
    ]
}

fn octets(address: &str) -> [u8; 4] {
    address.parse::<std::net::Ipv4Addr>().expect("an address").octets()
}

fn ipv4_header(from: [u8; 4], to: [u8; 4]) -> Vec<u8> {
    // Protocol 253 is for experiments (RFC 3692); the marker that follows is within the length.
    let mut header = [&[0x45, 0, 0, 46, 0, 0, 0, 0, 64, 253, 0, 0][..], &from, &to].concat();
    let sum: u32 = header.chunks(2).map(|word| u32::from(word[0]) << 8 | u32::from(word[1])).sum();
    let sum = !u16::try_from((sum & 0xffff) + (sum >> 16)).expect("two folds suffice for 20 bytes");
    header[10..12].copy_from_slice(&sum.to_be_bytes());
    header
}

fn arp_request(mac: [u8; 6], from: [u8; 4], to: [u8; 4]) -> Vec<u8> {
    [&[0, 1, 8, 0, 6, 4, 0, 1][..], &mac, &from, &[0; 6], &to].concat()
}

/// The detour: a neighbour's address, sent to the gateway's MAC address.
fn detour(node: &Node, from: &Vm, to: &Vm) -> Frame {
    let gateway: Vec<u8> =
        node.mac_of("cni0").split(':').filter_map(|byte| u8::from_str_radix(byte, 16).ok()).collect();
    let header = ipv4_header(octets(from.address()), octets(to.address()));
    Frame { destination: gateway.try_into().ok(), ..Frame::new(IPV4).header(header) }
}

fn isolated(flags: &str) -> (Node, support::Process, Vm, Vm) {
    let node = Node::new();
    node.adopt(flags).succeeded();
    let daemon = node.daemon("");
    let (a, b) = (node.vm("a"), node.vm("b"));
    let both = || node.ok("ip -d -o link show master cni0").matches("isolated on").count() == 2;
    assert!(!flags.contains("internal") || support::eventually(Duration::from_secs(2), both), "ports are isolated");
    (node, daemon, a, b)
}

/// The controls that give the silence of the other tests its meaning: these frames are well-formed, and a plain bridge
/// carries every one of them.
#[test]
fn on_a_plain_bridge_every_one_of_these_reaches_a_neighbour() {
    let node = Node::new();
    node.bridge("172.20.100.1/24");
    let (a, b) = (node.vm("a"), node.vm("b"));
    for (what, frame) in frames(&a, &b) {
        assert!(a.frame_reaches(&b, &frame), "{what}");
    }
    assert!(a.reaches(GATEWAY) && b.reaches(GATEWAY));
    assert!(a.frame_reaches(&b, &detour(&node, &a, &b)), "the detour through the gateway");
}

#[test]
fn with_both_layers_nothing_passes_between_vms() {
    let (node, _daemon, a, b) = isolated("--drop-internal-access");
    assert!(a.reaches(GATEWAY) && b.reaches(GATEWAY) && a.reaches(INTERNET));
    for (from, to) in [(&a, &b), (&b, &a)] {
        for (what, frame) in frames(from, to) {
            let arrives = node.sniff(from.port());
            assert!(!from.frame_reaches(to, &frame), "{what} passed");
            let tail = b"<cocoon-net test frame";
            assert!(arrives.hears(tail, Duration::from_millis(200)), "{what} was never sent");
        }
        assert!(!from.frame_reaches(to, &detour(&node, from, to)), "the detour through the gateway passed");
        // A host route through the gateway, as the VM's own kernel would take it.
        from.ip(&[&format!("route add {} via {GATEWAY}", to.address())]);
        assert!(from.is_cut_off_from(to.address()), "the host route passed");
        from.ip(&[&format!("route del {}", to.address())]);
        assert!(from.is_cut_off_from(to.link_local()));
    }
    assert!(a.reaches(GATEWAY) && b.reaches(GATEWAY) && a.reaches(INTERNET), "both live still");
}

#[test]
fn the_metadata_service_answers_the_node_and_not_its_vms() {
    let (node, _daemon, a, _b) = isolated("--drop-metadata-access");
    let _service = node.internet().echo(&format!("{METADATA}:80"));
    let _other = node.internet().echo(&format!("{INTERNET}:80"));
    let address = format!("{METADATA}:80");
    assert!(a.tcp_reaches(&format!("{INTERNET}:80")), "another server answers the VM");
    assert!(a.tcp_is_cut_off_from(&address) && a.udp_is_cut_off_from(&address));
    assert!(node.tcp_reaches(&address) && node.udp_reaches(&address), "the node needs it");
}

#[test]
fn the_node_opens_connections_to_vms_that_cannot_open_any_to_it() {
    let (node, _daemon, a, _b) = isolated("--drop-host-access");
    let _service = node.echo("0.0.0.0:8080");
    let _in_vm = a.echo(&format!("{}:80", a.address()));
    for address in [GATEWAY, NODE_ADDRESS] {
        assert!(a.tcp_is_cut_off_from(&format!("{address}:8080")), "{address}");
        assert!(a.udp_is_cut_off_from(&format!("{address}:8080")), "{address}");
    }
    assert!(a.reaches(GATEWAY) && a.reaches(INTERNET));
    assert!(node.tcp_reaches(&format!("{}:80", a.address())) && node.udp_reaches(&format!("{}:80", a.address())));
    assert!(node.internet().tcp_reaches(&format!("{NODE_ADDRESS}:8080")), "others still reach the node");
}

#[test]
fn dhcp_is_served_to_vms_that_cannot_reach_the_node() {
    let node = Node::new();
    node.adopt("--drop-host-access --drop-internal-access").succeeded();
    let _daemon = node.daemon("");
    let vm = node.vm_builder("c").unconfigured().build();
    vm.run("udhcpc -i eth0 -n -q -t 5 -T 1 -s /bin/true").succeeded();
}

/// The reference CNI plugin, with our configuration.
#[test]
fn ports_of_the_real_cni_plugin_are_isolated() {
    let node = Node::new();
    node.adopt("--drop-internal-access").succeeded();
    let _daemon = node.daemon("");
    let list: serde_json::Value =
        serde_json::from_str(&node.read("/etc/cni/net.d/30-cocoon-dhcp.conflist")).expect("the conflist is JSON");
    let mut plugin = list["plugins"][0].clone();
    plugin["name"] = list["name"].clone();
    plugin["cniVersion"] = list["cniVersion"].clone();

    let vms = ["a", "b"].map(Host::new);
    for (number, vm) in (11..).zip(&vms) {
        let output = node
            .command("/usr/lib/cni/bridge")
            .env("CNI_COMMAND", "ADD")
            .env("CNI_CONTAINERID", vm.name())
            .env("CNI_NETNS", &format!("/proc/{}/ns/net", vm.pid()))
            .env("CNI_IFNAME", "eth0")
            .env("CNI_PATH", "/usr/lib/cni")
            .stdin(plugin.to_string())
            .run();
        output.succeeded();
        vm.ip(&[
            &format!("address add 172.20.100.{number}/24 dev eth0"),
            "link set eth0 up",
            &format!("route add default via {GATEWAY}"),
        ]);
    }
    let both = || node.ok("ip -d -o link show master cni0").matches("isolated on").count() == 2;
    assert!(support::eventually(Duration::from_secs(2), both), "{}", node.ok("ip -d -o link show master cni0"));
    assert!(vms[0].reaches(GATEWAY) && vms[1].reaches(GATEWAY) && vms[0].reaches(INTERNET));
    assert!(vms[0].is_cut_off_from("172.20.100.12") && vms[1].is_cut_off_from("172.20.100.11"));
}
