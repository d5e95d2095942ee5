//! `teardown` leaves the host as it was, and says so when it cannot.

mod support;

use std::time::Duration;

use support::{Backend, GATEWAY, Node, Snapshot};

const DROPS: &str = "--drop-internal-access --drop-cidr 10.0.0.0/8 --drop-metadata-access --drop-host-access";
const STATE: &str = "/var/lib/cocoon/net/pool.json";

/// Sysctls stay: by then something else may need forwarding. A table that was only looked at, and an empty folder, are
/// no change.
fn comparable(snapshot: &Snapshot) -> Snapshot {
    snapshot.without(&["sysctls"]).without_empty_tables().without_folders()
}

#[track_caller]
fn assert_as_it_was(node: &Node, before: &Snapshot) {
    node.assert_alike(before, comparable);
}

/// Rules of others whose comments look like ours, in both families and places where ours stand.
fn foreign_rules(node: &Node) {
    for rule in [
        "-A FORWARD -i cni0 -d 198.51.100.0/24 -m comment --comment cocoon-net-drop-not -j DROP",
        "-A FORWARD -m comment --comment my-cocoon-net -j ACCEPT",
        "-A FORWARD -m comment --comment 'says cocoon-net-drop, is theirs' -j ACCEPT",
        "-A FORWARD -i cni0 -o cni0 -j ACCEPT",
        "-t nat -A POSTROUTING -s 172.20.100.0/24 ! -o cni0 -j MASQUERADE",
        "-A INPUT -i cni0 -m comment --comment not-cocoon-net -j ACCEPT",
    ] {
        node.ok(["sh", "-c", &format!("iptables {rule}")]);
    }
    node.ok(["sh", "-c", "ip6tables -A FORWARD -m comment --comment xcocoon-net-drop -j DROP"]);
}

fn a_node_is_as_it_was(backend: Backend) {
    let node = Node::builder().backend(backend).build();
    foreign_rules(&node);
    let before = node.snapshot();
    node.adopt(DROPS).succeeded();
    assert_ne!(comparable(&before), comparable(&node.snapshot()), "adopt does something");
    let output = node.cocoon("teardown").succeeded();
    assert_eq!(output.stdout, "cocoon-net teardown complete (none)\n");
    assert_as_it_was(&node, &before);
}

#[test]
fn the_host_is_as_it_was_on_nft() {
    a_node_is_as_it_was(Backend::Nft);
}

#[test]
fn the_host_is_as_it_was_on_legacy() {
    a_node_is_as_it_was(Backend::Legacy);
}

#[test]
fn the_host_is_as_it_was_after_init_too() {
    let node = Node::new();
    let before = node.snapshot();
    node.cocoon(format!("init --platform none --node-name n1 --subnet 172.20.100.0/24 {DROPS}")).succeeded();
    node.cocoon("teardown").succeeded();
    assert_as_it_was(&node, &before);
}

#[test]
fn a_set_of_drops_goes_with_its_rule() {
    let node = Node::new();
    let before = node.snapshot();
    let many: Vec<String> = (0..40).map(|n| format!("--drop-cidr=192.0.{n}.0/24")).collect();
    node.adopt(&many).succeeded();
    assert!(node.snapshot().section("ipsets").iter().any(|line| line.contains("cocoon-net-drop")));
    node.cocoon("teardown").succeeded();
    assert_as_it_was(&node, &before);
}

#[test]
fn rules_of_ours_in_the_other_backend_go_too() {
    let node = Node::builder().backend(Backend::Nft).build();
    let before = node.snapshot();
    node.adopt(DROPS).succeeded();
    let legacy = node.real_tool("iptables-legacy");
    let ours = "-I FORWARD -i cni0 -d 10.0.0.0/8 -m comment --comment cocoon-net-drop -j DROP";
    node.ok(format!("{} {ours}", legacy.display()));
    node.cocoon("teardown").succeeded();
    assert_as_it_was(&node, &before);
}

#[test]
fn duplicates_of_our_rules_go_too() {
    let node = Node::new();
    let before = node.snapshot();
    node.adopt(DROPS).succeeded();
    for rule in node.rules("filter", "FORWARD") {
        node.ok(["sh", "-c", &format!("iptables {rule}")]);
    }
    node.cocoon("teardown").succeeded();
    assert_as_it_was(&node, &before);
}

#[test]
fn a_bridge_that_carries_something_else_stays() {
    let node = Node::new();
    node.adopt(DROPS).succeeded();
    let a = node.vm("a");
    let output = node.cocoon("teardown").succeeded();
    assert!(node.exists("/sys/class/net/cni0"), "a VM is still plugged in: {output}");
    assert!(node.exists(format!("/sys/class/net/cni0/brif/{}", a.port())));
    assert_eq!(node.read(format!("/sys/class/net/{}/brport/isolated", a.port())).trim(), "0");
    assert!(node.rules("filter", "FORWARD").is_empty());
}

#[test]
fn without_a_state_there_is_nothing_to_tear_down() {
    let node = Node::new();
    let before = node.snapshot();
    let output = node.cocoon("teardown").exited(1);
    assert!(output.stderr.contains("nothing to tear down"), "{output}");
    assert!(output.stderr.contains(STATE) || output.stderr.contains("/var/lib/cocoon/net"), "{output}");
    assert_as_it_was(&node, &before);
}

#[test]
fn a_second_teardown_has_nothing_to_do() {
    let node = Node::new();
    node.adopt(DROPS).succeeded();
    node.cocoon("teardown").succeeded();
    node.cocoon("teardown").exited(1);
}

#[test]
fn a_part_that_fails_does_not_stop_the_rest_and_keeps_the_state() {
    let node = Node::new();
    let before = node.snapshot();
    node.adopt(DROPS).succeeded();
    node.fake_tool("iptables-restore", "#!/bin/sh\ncat >/dev/null\necho 'no luck today' >&2\nexit 1\n");
    let output = node.cocoon("teardown").exited(1);
    assert!(output.stderr.contains("no luck today"), "{output}");
    assert!(node.exists(STATE), "the state is kept for another try");
    assert!(!node.exists("/etc/cni/net.d/30-cocoon-dhcp.conflist"), "the conflist is another part: {output}");

    let node_again = node;
    let multi = node_again.real_tool("xtables-nft-multi");
    node_again.fake_tool("iptables-restore", &format!("#!/bin/sh\nexec {} iptables-restore \"$@\"\n", multi.display()));
    node_again.cocoon("teardown").succeeded();
    assert_as_it_was(&node_again, &before);
}

#[test]
fn a_failed_teardown_never_opens_what_stays_reachable() {
    let node = Node::new();
    node.adopt(DROPS).succeeded();
    let (a, b) = (node.vm("a"), node.vm("b"));
    assert!(a.reaches(GATEWAY));
    node.fake_tool("iptables-restore", "#!/bin/sh\ncat >/dev/null\nexit 1\n");
    node.cocoon("teardown").exited(1);
    assert!(a.is_cut_off_from(b.address()), "the drops could not be removed, so they still stand");
}

#[test]
fn a_running_daemon_is_told_to_stop() {
    let node = Node::new();
    let before = node.snapshot();
    node.adopt(DROPS).succeeded();
    let mut daemon = node.daemon("--metrics-addr=");
    assert!(daemon.is_running());
    node.cocoon("teardown").succeeded();
    assert!(!daemon.is_running());
    daemon.wait(Duration::from_secs(5)).succeeded();
    assert_as_it_was(&node, &before);
}

#[test]
fn host_routes_of_leases_go() {
    let node = Node::new();
    let before = node.snapshot();
    node.adopt(DROPS).succeeded();
    node.ok("ip route add 172.20.100.7/32 dev cni0 proto boot");
    let a = node.vm("a");
    node.cocoon("teardown").succeeded();
    assert!(!node.ok("ip route").contains("172.20.100.7"), "the bridge stays, the route does not");
    a.unplug();
    node.ip(&["link del cni0"]);
    assert_as_it_was(&node, &before);
}

#[test]
fn a_dry_run_tears_nothing_down() {
    let node = Node::new();
    node.adopt(DROPS).succeeded();
    let before = node.snapshot();
    let output = node.cocoon("teardown --dry-run").succeeded();
    assert!(output.stdout.contains("cocoon-net-drop"), "{output}");
    node.assert_back_to(&before);
}

#[test]
fn a_dry_run_names_what_others_and_a_killed_daemon_have_left() {
    let node = Node::new();
    node.adopt(DROPS).succeeded();
    let legacy = node.real_tool("iptables-legacy");
    node.ok(format!("{} -A FORWARD -i cni0 -o cni0 -m comment --comment cocoon-net -j ACCEPT", legacy.display()));
    node.ok("ipset create cocoon-net-next hash:net");
    let _daemon = node.daemon("--metrics-addr= --skip-iptables");
    node.ok("ip route add blackhole 10.0.0.0/8 table 9092");
    node.ok("ip rule add iif cni0 lookup 9092 pref 1");
    let before = node.snapshot();
    let output = node.cocoon("teardown --dry-run").succeeded();
    for line in ["- iptables-legacy -t filter -A FORWARD", "- ipset cocoon-net-next", "table 9092", "# the daemon"] {
        assert!(output.stdout.contains(line), "no `{line}` in {output}");
    }
    node.assert_back_to(&before);
}

#[test]
fn a_daemon_of_another_state_is_not_pulled_the_host_from_under() {
    let node = Node::new();
    node.adopt(DROPS).succeeded();
    let _daemon = node.daemon("--metrics-addr=");
    let before = node.snapshot();
    let elsewhere = "--platform none --node-name n2 --subnet 172.20.101.0/24 --state-dir /run/other";
    for command in [format!("init {elsewhere}"), format!("adopt {elsewhere} --manage-iptables")] {
        let output = node.cocoon(command).exited(1);
        assert!(output.stderr.contains("/var/lib/cocoon/net") && output.stderr.contains("--state-dir"), "{output}");
    }
    node.assert_back_to(&before);

    node.mkdir("/run/other");
    node.ok(format!("cp {STATE} /run/other/pool.json"));
    node.cocoon("teardown --state-dir /run/other").exited(1);
    let output = node.cocoon("check --state-dir /run/other").exited(3);
    assert!(output.stdout.lines().any(|row| row.starts_with("FAIL") && row.contains("another state")), "{output}");
}

#[test]
fn leases_that_were_kept_elsewhere_go_with_the_rest() {
    let node = Node::new();
    let before = node.snapshot();
    node.adopt(DROPS).succeeded();
    node.mkdir("/run/leases");
    node.daemon("--metrics-addr= --lease-file /run/leases/here.json").stop();
    assert!(node.exists("/run/leases/here.json"), "--lease-file is followed");
    let _daemon = node.daemon("--metrics-addr= --lease-file=/run/leases/here.json");
    node.cocoon("teardown").succeeded();
    assert!(!node.exists("/run/leases/here.json"));
    node.ok("rmdir /run/leases");
    assert_as_it_was(&node, &before);
}

#[test]
fn what_a_killed_daemon_left_in_run_goes_too() {
    let node = Node::new();
    let before = node.snapshot();
    node.adopt(DROPS).succeeded();
    node.daemon("--metrics-addr=").kill_after(Duration::ZERO);
    assert!(node.exists("/run/cocoon-net.pid"));
    node.cocoon("teardown").succeeded();
    assert!(!node.exists("/run/cocoon-net.pid"));
    assert_as_it_was(&node, &before);
}

#[test]
fn a_state_that_cannot_be_read_is_not_called_nothing() {
    let node = Node::new();
    node.adopt(DROPS).succeeded();
    node.write(STATE, "{");
    let output = node.cocoon("teardown").exited(1);
    assert!(!output.stderr.contains("nothing to tear down") && output.stderr.contains("not a JSON object"), "{output}");
}

#[test]
fn a_bridge_with_an_ipv6_address_of_somebody_elses_stays() {
    let node = Node::new();
    node.adopt(DROPS).succeeded();
    node.ok("ip -6 addr add 2001:db8::1/64 dev cni0 nodad");
    node.cocoon("teardown").succeeded();
    let addresses = node.ok("ip -o addr show dev cni0");
    assert!(addresses.contains("2001:db8::1") && !addresses.contains("172.20.100.1"), "{addresses}");
}
