//! `check` and `status` see what is true: a host that does not isolate is found out, and looking changes nothing.

mod support;

use nix::sys::signal::Signal;
use support::{INSIDE_TEN, INTERNET, Node, Process};

const DROPS: &str = "--drop-internal-access --drop-cidr 10.0.0.0/8";

fn isolated() -> Node {
    let node = Node::new();
    node.adopt(DROPS).succeeded();
    node
}

/// A daemon that is alive and repairs nothing.
fn paused_daemon(node: &Node) -> Process {
    let mut daemon = node.daemon("--metrics-addr=");
    daemon.signal(Signal::SIGSTOP);
    daemon
}

#[test]
fn a_node_that_isolates_passes() {
    let node = isolated();
    let _daemon = paused_daemon(&node);
    let before = node.snapshot();
    node.cocoon("check").succeeded();
    node.assert_back_to(&before);
}

#[test]
fn a_node_without_its_daemon_is_told_so() {
    let node = isolated();
    let output = node.cocoon("check").exited(3);
    assert!(output.stdout.contains("not running"), "{output}");
}

/// Breaks a node that was right; `check` must say so, exit with 3, and leave it as it is.
#[track_caller]
fn is_found_out(named: &str, breaking: impl FnOnce(&Node)) {
    let node = isolated();
    let _vm = node.vm("a");
    let _daemon = paused_daemon(&node);
    node.cocoon("check").succeeded();
    breaking(&node);
    let before = node.snapshot();
    let output = node.cocoon("check").exited(3);
    assert!(output.stdout.contains(named), "{named} is not named: {output}");
    node.assert_back_to(&before);
    assert_eq!(node.cocoon("check --json").exited(3).json()["ok"], false);
}

#[test]
fn flushed_rules_are_found_out() {
    is_found_out("10.0.0.0/8", |node| drop(node.ok("iptables -F FORWARD")));
}

#[test]
fn one_deleted_drop_is_found_out() {
    is_found_out("10.0.0.0/8", |node| {
        node.ok("iptables -D FORWARD -d 10.0.0.0/8 -i cni0 -m comment --comment cocoon-net-drop -j DROP");
    });
}

#[test]
fn a_drop_that_was_softened_is_found_out() {
    is_found_out("10.0.0.0/8", |node| {
        node.ok("iptables -D FORWARD -d 10.0.0.0/8 -i cni0 -m comment --comment cocoon-net-drop -j DROP");
        node.ok("iptables -I FORWARD -d 10.0.0.0/8 -i cni0 -p tcp -m comment --comment cocoon-net-drop -j DROP");
    });
}

#[test]
fn a_foreign_accept_above_the_drops_is_found_out() {
    is_found_out("FORWARD", |node| drop(node.ok("iptables -I FORWARD -i cni0 -j ACCEPT")));
}

#[test]
fn a_reset_bridge_toggle_is_found_out() {
    is_found_out("bridge-nf-call-iptables", |node| node.set_sysctl("net/bridge/bridge-nf-call-iptables", "0"));
}

#[test]
fn a_port_that_is_not_isolated_is_found_out() {
    is_found_out("veth-a", |node| drop(node.ok("bridge link set dev veth-a isolated off")));
}

#[test]
fn an_ipv6_path_between_vms_is_found_out() {
    is_found_out("ip6tables", |node| drop(node.ok("ip6tables -F FORWARD")));
}

#[test]
fn a_missing_bridge_is_found_out() {
    is_found_out("cni0", |node| node.ip(&["link del cni0"]));
}

#[test]
fn without_a_state_check_cannot_judge() {
    let node = Node::new();
    let output = node.cocoon("check").exited(1);
    assert!(output.stderr.contains("pool.json"), "{output}");
}

#[test]
fn a_stale_drop_is_found_out() {
    is_found_out("192.0.2.0/24", |node| {
        drop(node.ok("iptables -I FORWARD -i cni0 -d 192.0.2.0/24 -m comment --comment cocoon-net-drop -j DROP"));
    });
}

#[test]
fn a_plugin_too_old_for_port_isolation_matters_only_without_a_daemon() {
    let node = isolated();
    let without = node.cocoon("check").exited(3);
    assert!(without.stdout.lines().any(|row| row.starts_with("FAIL") && row.contains("CNI plugin")), "{without}");
    let _daemon = paused_daemon(&node);
    let with = node.cocoon("check").succeeded();
    assert!(with.stdout.lines().any(|row| row.starts_with("WARN") && row.contains("CNI plugin")), "{with}");
}

#[test]
fn a_node_inside_a_dropped_range_is_a_warning() {
    let node = isolated();
    let _daemon = paused_daemon(&node);
    // 10.128.0.2, on the uplink.
    let output = node.cocoon("check").succeeded();
    let warned =
        |row: &str| row.starts_with("WARN") && row.contains("10.128.0.2") && row.contains("--drop-host-access");
    assert!(output.stdout.lines().any(warned), "{output}");
}

#[test]
fn reverse_path_filtering_fails_on_the_bridge_and_is_a_warning_on_an_uplink() {
    is_found_out("net/ipv4/conf/cni0/rp_filter", |node| node.set_sysctl("net/ipv4/conf/cni0/rp_filter", "1"));
    let node = isolated();
    let _daemon = paused_daemon(&node);
    let uplink = "net/ipv4/conf/ens4/rp_filter";
    node.set_sysctl(uplink, "1");
    let output = node.cocoon("check").succeeded();
    assert!(output.stdout.lines().any(|row| row.starts_with("WARN") && row.contains(uplink)), "{output}");
}

#[test]
fn rules_stranded_in_the_other_backend_are_named() {
    let node = isolated();
    let _daemon = paused_daemon(&node);
    let legacy = node.real_tool("iptables-legacy");
    node.ok(format!("{} -A FORWARD -i cni0 -o cni0 -m comment --comment cocoon-net -j ACCEPT", legacy.display()));
    let output = node.cocoon("check").exited(3);
    assert!(output.stdout.contains("legacy"), "{output}");
}

#[test]
fn a_table_that_cannot_be_read_is_no_success() {
    let node = isolated();
    for tool in ["iptables", "iptables-save"] {
        node.fake_tool(tool, "#!/bin/sh\necho 'table is incompatible' >&2\nexit 3\n");
    }
    let output = node.cocoon("check");
    assert!(output.code() == 1 || output.code() == 3, "{output}");
}

#[test]
fn status_shows_each_drop_target_and_what_it_has_dropped() {
    let node = isolated();
    let a = node.vm("a");
    assert!(a.reaches(INTERNET));
    assert!(a.is_cut_off_from(INSIDE_TEN));
    let status = node.cocoon("status").succeeded();
    let line = status.stdout.lines().find(|line| line.contains("10.0.0.0/8")).unwrap_or_default();
    assert!(line.contains('3'), "three packets were dropped: {status}");
    let json = node.cocoon("status --json").succeeded().json();
    assert!(json.to_string().contains("10.0.0.0/8"), "{json}");
}

#[test]
fn status_without_root_shows_what_it_can() {
    let node = isolated();
    node.ok("chmod 0755 /var/lib/cocoon /var/lib/cocoon/net");
    node.ok(format!("install -D -m 0755 {} /run/nobody/cocoon-net", env!("CARGO_BIN_EXE_cocoon-net")));
    let status = "setpriv --reuid 65534 --regid 65534 --clear-groups /run/nobody/cocoon-net status";
    let output = node.run(status).succeeded();
    assert!(output.stdout.starts_with("Platform:   none\nNode:       n1\nSubnet:     172.20.100.0/24\n"), "{output}");
    assert!(output.stderr.lines().next().is_some_and(|line| line.contains("root")), "{output}");
}
