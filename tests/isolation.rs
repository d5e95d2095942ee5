//! The headline promise, shown by traffic: what is dropped does not arrive, what is not does.

mod support;

use support::{Backend, Frame, GATEWAY, INSIDE_TEN, INTERNET, INTERNET_TOO, METADATA, Node};

const GKE: &str = "adopt --platform gke --node-name n1 --subnet 172.20.100.0/24 --manage-iptables";

fn drops(node: &Node) -> Vec<String> {
    let rules = node.rules("filter", "FORWARD");
    let ours = |rule: &String| rule.contains("--comment cocoon-net-drop ") && rule.ends_with("-j DROP");
    let head: Vec<_> = rules.iter().take_while(|rule| ours(rule)).cloned().collect();
    assert_eq!(head.len(), rules.iter().filter(|rule| ours(rule)).count(), "drops not at the head: {rules:#?}");
    head
}

fn neighbours_ranges_and_the_internet(backend: Backend) {
    let node = Node::builder().backend(backend).build();
    let two = format!("{GKE} --drop-internal-access --drop-cidr 10.1.2.3/8 --drop-cidr 10.0.0.0/8");
    let output = node.cocoon(&two).succeeded();
    assert_eq!(
        output.stdout.lines().last(),
        Some("cocoon-net adopt complete: 253 IPs registered on 172.20.100.0/24 (gke, cloud preserved)")
    );
    assert_eq!(drops(&node).len(), 2, "{:#?}", drops(&node));

    let (a, b) = (node.vm("a"), node.vm("b"));
    assert!(a.reaches(GATEWAY) && b.reaches(GATEWAY));
    assert!(a.reaches(INTERNET) && a.reaches(INTERNET_TOO));
    assert!(a.is_cut_off_from(b.address()) && b.is_cut_off_from(a.address()));
    assert!(a.is_cut_off_from(INSIDE_TEN));

    let rules = node.snapshot().only(&["iptables-nft", "iptables-legacy", "ip6tables-nft", "ip6tables-legacy"]);
    let (output, started) = node.execs(&two);
    output.succeeded();
    assert!(!started.is_empty() && started.iter().all(|argv| !argv.contains("restore")), "{started:#?}");
    assert_eq!(rules, node.snapshot().only(&["iptables-nft", "iptables-legacy", "ip6tables-nft", "ip6tables-legacy"]));

    node.cocoon(format!("{GKE} --drop-internal-access")).succeeded();
    assert_eq!(drops(&node).len(), 1);
    assert!(a.reaches(INSIDE_TEN), "no longer dropped");
    assert!(a.is_cut_off_from(b.address()));
}

#[test]
fn neighbours_and_ranges_do_not_answer_the_gateway_and_the_internet_do_on_nft() {
    neighbours_ranges_and_the_internet(Backend::Nft);
}

#[test]
fn neighbours_and_ranges_do_not_answer_the_gateway_and_the_internet_do_on_legacy() {
    neighbours_ranges_and_the_internet(Backend::Legacy);
}

fn everything(backend: Backend) {
    let node = Node::builder().backend(backend).build();
    node.adopt("--drop-cidr 203.0.113.0/24").succeeded();
    let (a, b) = (node.vm("a"), node.vm("b"));
    assert!(a.reaches(INTERNET_TOO) && a.reaches(b.address()), "open but for one range");
    assert!(a.is_cut_off_from(INTERNET));
    for round in ["first", "second"] {
        node.adopt("--drop-cidr 0.0.0.0/0").succeeded();
        for address in [INTERNET, INTERNET_TOO, INSIDE_TEN, METADATA] {
            assert!(a.is_cut_off_from(address), "{address} answers after the {round} run");
        }
        assert!(a.reaches(GATEWAY));
    }
    let mut daemon = node.daemon("--metrics-addr=");
    assert!(daemon.is_running() && a.is_cut_off_from(INTERNET));
}

#[test]
fn dropping_everything_cuts_all_egress_and_stays_on_nft() {
    everything(Backend::Nft);
}

#[test]
fn dropping_everything_cuts_all_egress_and_stays_on_legacy() {
    everything(Backend::Legacy);
}

#[test]
fn ports_already_on_the_bridge_are_isolated_below_ip() {
    let node = Node::new();
    node.bridge("172.20.100.1/24");
    let (a, b) = (node.vm("a"), node.vm("b"));
    let frames = [Frame::new(0x88b5), Frame::new(0x0806).broadcast(), Frame::new(0x0800).vlan(7), Frame::new(0x8864)];
    for frame in &frames {
        assert!(a.frame_reaches(&b, frame), "the positive control: {frame:x?}");
    }
    assert!(a.reaches(b.link_local()));

    node.adopt("--drop-internal-access").succeeded();
    assert!(a.reaches(GATEWAY));
    for frame in &frames {
        assert!(!a.frame_reaches(&b, frame), "{frame:x?}");
    }
    assert!(a.is_cut_off_from(b.link_local()));
}

#[test]
fn a_detour_through_the_gateway_is_no_way_to_a_neighbour() {
    let node = Node::new();
    node.bridge("172.20.100.1/24");
    let (a, b) = (node.vm("a"), node.vm("b"));
    for (vm, other) in [(&a, &b), (&b, &a)] {
        vm.ok(format!("ip route add {}/32 via {GATEWAY}", other.address()));
        vm.set_sysctl("net/ipv4/conf/eth0/accept_redirects", "0");
        vm.set_sysctl("net/ipv4/conf/all/accept_redirects", "0");
    }
    assert!(a.reaches(b.address()), "the positive control");
    node.adopt("--drop-internal-access").succeeded();
    assert!(a.reaches(GATEWAY));
    assert!(a.is_cut_off_from(b.address()));
}

#[test]
fn tcp_and_udp_are_dropped_as_ping_is() {
    let node = Node::new();
    let servers = ["203.0.113.7:80", "10.1.2.3:80"].map(|address| node.internet().echo(address));
    node.adopt("--drop-cidr 10.0.0.0/8").succeeded();
    let a = node.vm("a");
    assert!(a.tcp_reaches("203.0.113.7:80") && a.udp_reaches("203.0.113.7:80"));
    assert!(a.tcp_is_cut_off_from("10.1.2.3:80") && a.udp_is_cut_off_from("10.1.2.3:80"));
    drop(servers);
}

#[test]
fn the_metadata_service_is_out_of_reach_when_asked_for() {
    let node = Node::new();
    node.adopt("").succeeded();
    let a = node.vm("a");
    assert!(a.reaches(METADATA));
    node.adopt("--drop-metadata-access").succeeded();
    assert!(a.reaches(INTERNET));
    assert!(a.is_cut_off_from(METADATA));
}

#[test]
fn the_node_itself_is_out_of_reach_when_asked_for_but_for_ping() {
    let node = Node::new();
    node.adopt("").succeeded();
    let servers = [node.echo("172.20.100.1:2222"), node.echo("10.128.0.2:2222")];
    let a = node.vm("a");
    let own = a.echo("172.20.100.11:2222");
    assert!(a.tcp_reaches("172.20.100.1:2222") && a.udp_reaches("10.128.0.2:2222"));

    node.adopt("--drop-host-access").succeeded();
    assert!(a.tcp_is_cut_off_from("172.20.100.1:2222") && a.udp_is_cut_off_from("172.20.100.1:2222"));
    assert!(a.tcp_is_cut_off_from("10.128.0.2:2222"));
    assert!(a.reaches(GATEWAY), "ping to the gateway stays");
    assert!(node.tcp_reaches("172.20.100.11:2222"), "the node still reaches its VM");
    drop((servers, own));
}

#[test]
fn a_node_inside_a_dropped_range_is_named() {
    let node = Node::new();
    let output = node.adopt("--drop-cidr 10.0.0.0/8").succeeded();
    assert!(output.stderr.contains("10.128.0.2") && output.stderr.contains("--drop-host-access"), "{output}");
}

#[test]
fn many_drops_hold_as_few_do() {
    for backend in [Backend::Nft, Backend::Legacy] {
        let node = Node::builder().backend(backend).build();
        let mut flags: Vec<String> = (0..100).map(|n| format!("--drop-cidr=198.18.{n}.0/24")).collect();
        flags.extend(["--drop-cidr=10.0.0.0/8".to_owned(), "--drop-internal-access".to_owned()]);
        node.adopt(&flags).succeeded();
        assert_eq!(drops(&node).len(), 1, "one rule over a set");
        let (a, b) = (node.vm("a"), node.vm("b"));
        assert!(a.reaches(GATEWAY) && a.reaches(INTERNET));
        assert!(a.is_cut_off_from(INSIDE_TEN) && a.is_cut_off_from(b.address()));

        flags.push("--drop-cidr=0.0.0.0/0".to_owned());
        node.adopt(&flags).succeeded();
        assert!(a.is_cut_off_from(INTERNET));
        assert!(a.reaches(GATEWAY));
    }
}

#[test]
fn many_drops_without_ipset_are_plain_rules_and_a_warning() {
    let node = Node::new();
    node.without_tool("ipset");
    let flags: Vec<String> = (0..20).map(|n| format!("--drop-cidr=198.18.{n}.0/24")).collect();
    let output = node.adopt(&flags).succeeded();
    assert!(output.stderr.contains("ipset"), "{output}");
    assert_eq!(drops(&node).len(), 20);
}

#[test]
fn a_foreign_accept_above_the_drops_is_overtaken_by_the_next_run() {
    let node = Node::new();
    node.adopt("--drop-cidr 10.0.0.0/8").succeeded();
    let a = node.vm("a");
    node.ok("iptables -I FORWARD -i cni0 -j ACCEPT");
    assert!(a.reaches(INSIDE_TEN), "the foreign rule lets it through");
    assert_eq!(node.cocoon("check").code(), 3);
    node.adopt("--drop-cidr 10.0.0.0/8").succeeded();
    assert!(a.reaches(INTERNET));
    assert!(a.is_cut_off_from(INSIDE_TEN));
    assert!(node.rules("filter", "FORWARD").contains(&"-A FORWARD -i cni0 -j ACCEPT".to_owned()), "theirs is kept");
}

#[test]
fn an_operators_own_drop_keeps_its_say() {
    let node = Node::new();
    node.ok("iptables -A FORWARD -d 203.0.113.0/24 -j DROP");
    node.adopt("").succeeded();
    let a = node.vm("a");
    assert!(a.reaches(INTERNET_TOO));
    assert!(a.is_cut_off_from(INTERNET));
}

#[test]
fn vms_answer_from_their_own_address_inside_and_the_nodes_outside() {
    let node = Node::new();
    node.adopt("").succeeded();
    let a = node.vm("a");
    let ears = node.internet().sniff("node0");
    assert!(a.reaches(INTERNET));
    // An IPv4 ICMP echo request, from the node's address: masqueraded.
    let masqueraded = |frame: &[u8]| {
        frame.len() > 34 && frame[12..14] == [8, 0] && frame[23] == 1 && frame[26..30] == [10, 128, 0, 2]
    };
    assert!(ears.find(std::time::Duration::from_secs(1), masqueraded).is_some());
}

#[test]
fn a_thousand_drops_are_one_transaction() {
    let node = Node::new();
    let many: Vec<String> = (0..1000).map(|n| format!("--drop-cidr 10.{}.{}.0/24", n / 250, n % 250)).collect();
    let command = format!("{GKE} {}", many.join(" "));
    let (output, started) = node.execs(&command);
    output.succeeded();
    assert!(started.len() <= 16, "{started:#?}");
    let restores = started.iter().filter(|argv| argv.contains("/iptables-restore ")).count();
    assert_eq!(restores, 1, "{started:#?}");
}
