//! The live proof, on bridges whose isolation is known to hold, to be broken, or not to be provable.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use std::process::Command;

use cocoon_net::host::probe::{self, Expected, IsolatedBy, Report, Request, Verdict};
use support::Host;

/// A node by hand: a bridge with a VM on it, and an uplink whose next hop is a MAC address that nobody has.
const NODE: &str = "
    ip link set lo up
    sysctl -qw net.ipv4.ip_forward=1
    ip link add cni0 address 02:00:00:00:00:01 type bridge
    ip addr add 172.20.100.1/24 dev cni0
    ip link set cni0 up
    ip link add vm0 type veth peer name vm0in
    ip link set vm0 master cni0
    ip link set vm0 up
    ip link set vm0in up
    ip link add up0 type veth peer name up1
    ip addr add 10.9.0.1/24 dev up0
    ip link set up0 up
    ip link set up1 up
    ip neigh add 10.9.0.2 lladdr 02:00:00:00:00:99 dev up0
    ip route add default via 10.9.0.2
    sysctl -qw net.bridge.bridge-nf-call-iptables=1 net.bridge.bridge-nf-call-ip6tables=1";

const ISOLATED_VM: &str = "ip link set vm0 type bridge_slave isolated on";
const DROP_INTERNAL: &str = "iptables -I FORWARD -i cni0 -d 172.20.100.0/24 -j DROP";
const DROP_TARGETS: &str = "iptables -I FORWARD -i cni0 -d 10.0.0.0/8 -j DROP
    iptables -I FORWARD -i cni0 -d 192.0.2.7/32 -j DROP";
const DROP_HOST: &str = "iptables -I INPUT -i cni0 -m conntrack --ctstate NEW -j DROP
    iptables -I INPUT -i cni0 -p icmp --icmp-type echo-request -j ACCEPT";

/// Builds a node in namespaces of its own and probes it.
fn probe(setup: &[&str], request: Request) -> Report {
    let script = [&[NODE], setup].concat().join("\n");
    let report = Host::new("node").enter(move || {
        sh(&script);
        let before = state();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let report = runtime.block_on(probe::run(&request)).unwrap();
        assert_eq!(state(), before, "the probe left something behind");
        report
    });
    println!("{}", report.to_table());
    report
}

/// Everything of the node that the probe could leave behind.
fn state() -> String {
    // Carrier and duplicate address detection settle by themselves.
    sh("ip -o link | awk '{print $2, $9, $10, $11}'
        ip -4 -o addr | sed 's/ valid_lft.*//'
        ip route | sed 's/ linkdown//'
        ip neigh show dev cni0
        iptables-save | sed '/^[#:]/d'")
}

fn sh(script: &str) -> String {
    let output = Command::new("sh").args(["-ec", script]).output().unwrap();
    assert!(output.status.success(), "{script}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

fn request() -> Request {
    Request {
        gateway: "172.20.100.1".parse().unwrap(),
        subnet: "172.20.100.0/24".parse().unwrap(),
        isolated_by: IsolatedBy::CniPlugin,
        ..Request::default()
    }
}

fn internal() -> Request {
    Request { internal: true, ..request() }
}

fn with_targets() -> Request {
    let targets = ["10.0.0.0/8", "192.0.2.7/32"].map(|target| target.parse().unwrap()).to_vec();
    Request { targets, ..request() }
}

/// The names of the trials that got through though they must not.
fn broken(report: &Report) -> Vec<&str> {
    let mut names: Vec<&str> =
        report.rows.iter().filter(|row| row.verdict == Verdict::Broken).map(|row| row.what.as_str()).collect();
    names.sort_unstable();
    names.dedup();
    names
}

#[test]
fn with_both_layers_isolation_holds() {
    let report = probe(&[ISOLATED_VM, DROP_INTERNAL], internal());
    assert_eq!(report.verdict, Verdict::Holds, "{}", report.to_table());
    assert!(report.rows.iter().filter(|row| row.expected == Expected::Blocked).count() > 30);
}

#[test]
fn rules_alone_let_everything_but_ipv4_through() {
    let request = Request { isolated_by: IsolatedBy::Nobody, ..internal() };
    let report = probe(&[DROP_INTERNAL], request);
    assert_eq!(report.verdict, Verdict::Broken);
    let broken = broken(&report);
    for kind in [
        "IPv6 link-local",
        "IPv6 global",
        "VLAN 5",
        "PPPoE discovery",
        "ARP",
        "unknown ethertype",
        "broadcasts and multicasts",
    ] {
        assert!(broken.contains(&kind), "{kind} should get through: {broken:?}");
    }
    for kind in ["IPv4", "IPv4 through the gateway"] {
        assert!(!broken.contains(&kind), "{kind} should be dropped: {broken:?}");
    }
}

#[test]
fn port_isolation_alone_lets_the_detour_through() {
    let report = probe(&[ISOLATED_VM], internal());
    assert_eq!(broken(&report), ["IPv4 through the gateway", "IPv4 through the gateway, source spoofed"]);
}

#[test]
fn a_vm_port_that_is_not_isolated_is_found_without_its_help() {
    let report = probe(&[DROP_INTERNAL], internal());
    // The guests' own ports are isolated, so they reach a port that is not.
    assert_eq!(broken(&report), ["broadcasts and multicasts"]);
    assert!(report.to_table().contains("port vm0"));
}

#[test]
fn a_daemon_that_does_not_isolate_is_found_out() {
    let request = Request { isolated_by: IsolatedBy::Daemon, ..internal() };
    assert!(broken(&probe(&[DROP_INTERNAL], request)).contains(&"port isolation"));
}

#[test]
fn dropped_targets_stay_in_and_others_get_out() {
    let report = probe(&[DROP_TARGETS], with_targets());
    assert_eq!(report.verdict, Verdict::Holds, "{}", report.to_table());
    let table = report.to_table();
    assert!(table.contains("in 10.0.0.0/8") && table.contains("in 192.0.2.7/32"));
}

#[test]
fn a_missing_drop_is_seen_on_the_uplink() {
    let report = probe(&["iptables -I FORWARD -i cni0 -d 10.0.0.0/8 -j DROP"], with_targets());
    assert_eq!(broken(&report), ["UDP out of the node"]);
    let row = report.rows.iter().find(|row| row.verdict == Verdict::Broken).unwrap();
    assert!(row.to.contains("192.0.2.7"), "{row:?}");
}

#[test]
fn a_target_on_a_link_of_the_node_is_seen_to_be_open() {
    let onlink =
        |rules: &[&str]| probe(rules, Request { targets: vec!["10.9.0.128/25".parse().unwrap()], ..request() });
    assert_eq!(broken(&onlink(&[])), ["UDP out of the node"]);
    let dropped = onlink(&["iptables -I FORWARD -i cni0 -d 10.9.0.128/25 -j DROP"]);
    assert_eq!(dropped.verdict, Verdict::Holds, "{}", dropped.to_table());
}

#[test]
fn what_the_node_answers_its_guest_has_not_left_it() {
    for unreachable in ["ip route del default", "ip route replace unreachable default"] {
        let report = probe(&[DROP_TARGETS, unreachable], with_targets());
        assert!(broken(&report).is_empty() && report.verdict == Verdict::Unproven, "{}", report.to_table());
    }
}

#[test]
fn a_node_that_forwards_nothing_to_documentation_ranges_is_still_proved() {
    let bogons = "ip route add blackhole 192.0.2.0/24; ip route add blackhole 198.51.100.0/24";
    let report = probe(&[DROP_TARGETS, bogons], with_targets());
    assert_eq!(report.verdict, Verdict::Holds, "{}", report.to_table());
}

#[test]
fn without_forwarding_silence_proves_nothing() {
    let report = probe(&[DROP_TARGETS, "sysctl -qw net.ipv4.ip_forward=0"], with_targets());
    assert_eq!(report.verdict, Verdict::Unproven);
}

#[test]
fn with_a_dead_gateway_silence_proves_nothing() {
    let report = probe(&[ISOLATED_VM, DROP_INTERNAL, "iptables -I INPUT -i cni0 -j DROP"], internal());
    assert_eq!(report.verdict, Verdict::Unproven);
    assert!(report.rows.iter().all(|row| row.verdict != Verdict::Holds), "{}", report.to_table());
}

#[test]
fn the_node_does_not_answer_when_host_access_is_dropped() {
    let report = probe(&[DROP_HOST], Request { host: true, ..request() });
    assert_eq!(report.verdict, Verdict::Holds, "{}", report.to_table());
}

#[test]
fn an_open_node_answers() {
    let report = probe(&[], Request { host: true, ..request() });
    assert_eq!(broken(&report), ["TCP connection", "UDP"]);
}

#[test]
fn addresses_that_answer_are_not_used() {
    // A /29 with room for one guest more than there are free addresses, were it not for the VM that answers.
    let subnet = "ip addr flush dev cni0; ip addr add 172.20.100.1/29 dev cni0";
    let vm = "unshare -n sh -c 'echo $$ > /run/vm; exec sleep 20' >/dev/null 2>&1 & while ! [ -s /run/vm ]; do sleep 0.1; done
        ip link set vm0in netns $(cat /run/vm); nsenter -t $(cat /run/vm) -n sh -c \
        'ip addr add 172.20.100.6/29 dev vm0in; ip link set vm0in up'; sleep 1";
    let request = Request { subnet: "172.20.100.0/29".parse().unwrap(), ..internal() };
    let leased = ["172.20.100.2", "172.20.100.3"].map(|address| address.parse().unwrap()).into();
    let report = probe(&[subnet, ISOLATED_VM, DROP_INTERNAL, vm], Request { leased, ..request });
    assert_eq!(report.verdict, Verdict::Holds, "{}", report.to_table());
}
