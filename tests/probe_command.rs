//! `check --probe` on a live node: what it says beside a running daemon, and that it leaves nothing, killed or not.

mod support;

use std::time::Duration;

use nix::sys::signal::Signal;
use support::{Backend, INTERNET, Node, Process, Vm, eventually};

fn live(backend: Backend, flags: &str) -> (Node, Process, Vm) {
    let node = Node::builder().backend(backend).build();
    node.adopt(flags).succeeded();
    let daemon = node.daemon("");
    let vm = node.vm("a");
    assert!(vm.reaches(INTERNET));
    let isolated = || node.ok("ip -d -o link show master cni0").contains("isolated on");
    assert!(!flags.contains("internal") || eventually(Duration::from_secs(2), isolated));
    (node, daemon, vm)
}

/// What the probe could leave behind.
fn traces(node: &Node) -> String {
    let links = node.ok("ip -o link");
    let names: Vec<_> = links.lines().filter_map(|line| line.split_whitespace().nth(1)).collect();
    format!("{names:?} {} {}", node.ok("ip route"), node.ok("ip rule"))
}

const EVERYTHING: &str = "--drop-internal-access --drop-host-access --drop-metadata-access --drop-cidr 10.0.0.0/8";

#[test]
fn a_node_that_isolates_is_proved_to_on_both_backends() {
    for backend in [Backend::Nft, Backend::Legacy] {
        let (node, _daemon, _vm) = live(backend, EVERYTHING);
        let before = traces(&node);
        let output = node.cocoon("check --probe").succeeded();
        for line in
            ["isolation holds", "the daemon isolated the probe's ports", "169.254.169.254", "10.0.0.0/8", "port veth-a"]
        {
            assert!(output.stdout.contains(line), "{line}: {output}");
        }
        assert_eq!(traces(&node), before);
        let json = node.cocoon("check --probe --json").succeeded().json();
        assert_eq!(json["probe"]["verdict"], "holds", "{json:#}");
    }
}

#[test]
fn what_rules_cannot_tell_the_probe_finds() {
    let (node, _daemon, _vm) = live(Backend::Nft, "--drop-cidr 10.0.0.0/8");
    node.cocoon("check --probe").succeeded();
    // Packets change their destination before FORWARD sees them, and every rule of ours is in place.
    node.ok("iptables -t nat -A PREROUTING -i cni0 -d 10.0.0.1 -p udp -j DNAT --to 203.0.113.7");
    node.cocoon("check").succeeded();
    let output = node.cocoon("check --probe").exited(3);
    assert!(output.stdout.contains("is broken"), "{output}");
}

#[test]
fn many_targets_are_probed_each() {
    let many: Vec<String> = (0..100).map(|n| format!("--drop-cidr=198.18.{n}.0/24")).collect();
    let (node, _daemon, _vm) = live(Backend::Nft, &many.join(" "));
    let output = node.cocoon("check --probe").succeeded();
    assert_eq!(output.stdout.matches(" in 198.18.").count(), 100, "{output}");
    node.ok("ipset del cocoon-net-drop 198.18.7.0/24");
    // The daemon puts it back, so that a probe right afterwards may find either.
    assert!(eventually(Duration::from_secs(2), || node.ok("ipset list cocoon-net-drop").contains("198.18.7.0/24")));
}

#[test]
fn a_killed_probe_leaves_nothing() {
    let (node, daemon, _vm) = live(Backend::Nft, EVERYTHING);
    let before = traces(&node);
    for millis in [300, 900, 1500, 2200] {
        let probe = node.spawn_cocoon("check --probe");
        let _ = probe.kill_after(Duration::from_millis(millis));
        let gone = || traces(&node) == before;
        assert!(eventually(Duration::from_secs(5), gone), "killed after {millis} ms: {}", traces(&node));
    }
    let mut probe = node.spawn_cocoon("check --probe");
    std::thread::sleep(Duration::from_millis(1200));
    probe.signal(Signal::SIGINT);
    probe.wait(Duration::from_secs(5));
    assert!(eventually(Duration::from_secs(5), || traces(&node) == before), "{}", traces(&node));
    node.cocoon("check --probe").succeeded();
    drop(daemon);
}

#[test]
fn without_a_daemon_and_with_an_old_plugin_ports_are_found_open() {
    let (node, daemon, _vm) = live(Backend::Nft, "--drop-internal-access");
    daemon.stop();
    let output = node.cocoon("check --probe").exited(3);
    assert!(output.stdout.contains("IPv6 link-local"), "{output}");
    assert!(output.stdout.contains("is broken"), "{output}");
}
