//! The tests' own ground: what the support code says about traffic and state is so.

mod support;

use std::time::Duration;

use support::{Backend, Frame, GATEWAY, Host, INSIDE_TEN, INTERNET, METADATA, Node, assert_private};

fn open_node() -> Node {
    let node = Node::new();
    node.bridge("172.20.100.1/24");
    node
}

#[test]
#[should_panic(expected = "refusing to change the test's own network namespace")]
fn the_machines_own_network_is_refused() {
    assert_private();
}

#[test]
fn every_namespace_is_private() {
    let (one, two) = (Host::new("one"), Host::new("two"));
    one.enter(assert_private);
    two.enter(assert_private);
    one.ip(&["link add only-here type bridge"]);
    assert!(one.exists("/sys/class/net/only-here"));
    assert!(!two.exists("/sys/class/net/only-here"));
    assert!(!std::path::Path::new("/sys/class/net/only-here").exists());
}

#[test]
fn the_machines_files_stay_as_they_are() {
    let host = Host::new("host");
    for path in ["/run/mine", "/etc/mine", "/etc/cni/net.d/mine", "/etc/cron.d/mine", "/var/lib/cocoon/net/mine"] {
        host.write(path, "content");
        assert_eq!(host.read(path), "content");
        assert!(!std::path::Path::new(path).exists(), "{path}");
    }
    host.run("touch /usr/mine").exited(1);
}

#[test]
fn an_open_node_lets_everything_through() {
    let node = open_node();
    let (a, b) = (node.vm("a"), node.vm("b"));
    for address in [GATEWAY, b.address(), INTERNET, INSIDE_TEN, METADATA, &b.link_local()] {
        assert!(a.reaches(address), "{address}");
        assert!(!a.is_cut_off_from(address), "{address}");
    }
    let _echo = node.internet().echo("203.0.113.7:80");
    assert!(a.tcp_reaches("203.0.113.7:80") && !a.tcp_is_cut_off_from("203.0.113.7:80"));
    assert!(a.udp_reaches("203.0.113.7:80") && !a.udp_is_cut_off_from("203.0.113.7:80"));
    assert!(!a.tcp_is_cut_off_from("203.0.113.7:81"), "a refusal is an answer");
    let tagged = Frame::new(0x0800).vlan(7);
    for frame in [Frame::new(0x88b5), Frame::new(0x0806).broadcast(), tagged] {
        assert!(a.frame_reaches(&b, &frame), "{frame:x?}");
    }
}

#[test]
fn a_dropped_packet_counts_as_lost() {
    let node = open_node();
    let (a, b) = (node.vm("a"), node.vm("b"));
    node.set_sysctl("net/bridge/bridge-nf-call-iptables", "1");
    node.ok("iptables -I FORWARD -i cni0 -d 172.20.100.0/24 -j DROP");
    node.ok("iptables -I FORWARD -i cni0 -d 203.0.113.0/24 -j DROP");
    assert!(a.reaches(GATEWAY));
    assert!(a.is_cut_off_from(b.address()));
    assert!(a.tcp_is_cut_off_from("203.0.113.7:80"));
    assert!(a.udp_is_cut_off_from("203.0.113.7:80"));

    for vm in [&a, &b] {
        node.ok(format!("bridge link set dev {} isolated on", vm.port()));
    }
    assert!(!a.frame_reaches(&b, &Frame::new(0x88b5)));
    assert!(a.is_cut_off_from(b.link_local()));
}

#[test]
#[should_panic(expected = "no ping could be sent")]
fn a_vm_without_a_route_proves_nothing() {
    let node = open_node();
    node.vm_builder("a").unconfigured().build().is_cut_off_from(INTERNET);
}

#[test]
fn a_snapshot_tells_what_changed() {
    let node = open_node();
    let before = node.snapshot();
    node.assert_back_to(&before);

    node.ok([node.real_tool("iptables-legacy").display().to_string().as_str(), "-A", "FORWARD", "-j", "DROP"]);
    node.ok("iptables -A FORWARD -s 10.0.0.1 -j DROP");
    node.ok("ip6tables -A FORWARD -j DROP");
    node.ok("ipset create mine hash:net");
    node.ok("ip link set cni0 mtu 1400");
    node.ok("ip route add 10.9.0.0/16 via 10.128.0.1");
    node.set_sysctl("net/ipv4/conf/cni0/rp_filter", "1");
    node.write("/etc/cni/net.d/x.conflist", "{}\n");
    let diff = before.diff(&node.snapshot());
    for wanted in [
        "iptables-legacy:\n  + *filter",
        "+ -A FORWARD -s 10.0.0.1/32 -j DROP",
        "ip6tables-nft:\n  + *filter",
        "+ create mine hash:net",
        "\"mtu\":1400",
        "10.9.0.0/16",
        "conf/cni0/rp_filter = 1",
        "+ /etc/cni/net.d/x.conflist| {}",
    ] {
        assert!(diff.contains(wanted), "no {wanted} in:\n{diff}");
    }
}

#[test]
fn an_absent_table_and_an_empty_one_differ_unless_told_otherwise() {
    let node = Node::builder().backend(Backend::Legacy).build();
    let before = node.snapshot();
    node.ok("iptables -S");
    let after = node.snapshot();
    assert_ne!(before, after);
    assert_eq!(before.without_empty_tables(), after.without_empty_tables());
    node.ok("iptables -P FORWARD DROP");
    assert_ne!(before.without_empty_tables(), node.snapshot().without_empty_tables());
}

#[test]
fn each_backend_is_what_iptables_means() {
    for (backend, words) in [(Backend::Nft, "nf_tables"), (Backend::Legacy, "legacy")] {
        let node = Node::builder().backend(backend).build();
        let version = node.ok("iptables --version");
        assert!(version.contains(words), "{version}");
    }
}

#[test]
fn faults_are_felt() {
    let node = Node::new();
    node.fake_tool("modprobe", "#!/bin/sh\nexit 7\n");
    node.run("modprobe br_netfilter").exited(7);
    node.fake_tool("iptables", "#!/bin/sh\nexit 3\n");
    node.run("iptables -S").exited(3);
    node.ok("ip6tables -S");
    node.without_tool("ip6tables-save");
    node.run(["sh", "-c", "ip6tables-save"]).exited(127);

    node.read_only("/var/lib/cocoon/net");
    node.run("touch /var/lib/cocoon/net/x").exited(1);
    node.unmount("/var/lib/cocoon/net");
    node.ok("touch /var/lib/cocoon/net/x");
    node.full("/var/lib/cocoon/net");
    node.run(["sh", "-c", "echo content > /var/lib/cocoon/net/x"]).failed();

    node.hide("/proc/sys/net/bridge");
    node.run("sysctl net.bridge.bridge-nf-call-iptables").failed();
    node.read_only("/proc/sys");
    node.run("sysctl -w net.ipv4.ip_forward=1").failed();
}

#[test]
fn processes_end_with_their_handle_and_their_node() {
    let node = Node::new();
    let sleeper = node.spawn("sleep 60");
    assert_eq!(node.processes(), [sleeper.pid()]);
    drop(sleeper);
    node.settle(&[]);

    let killed = node.spawn(["sh", "-c", "echo begun; sleep 60 & wait"]).kill_after(Duration::from_millis(200));
    assert_eq!((killed.stdout.as_str(), killed.code()), ("begun\n", -1));
    let [orphan] = node.processes()[..] else { panic!("the killed shell left one child") };
    drop(node);
    // Its new parent may take its time to collect it.
    let stat = || std::fs::read_to_string(format!("/proc/{orphan}/stat")).unwrap_or_default();
    let gone = || stat().is_empty() || stat().contains(") Z ");
    assert!((0..100).any(|_| {
        std::thread::sleep(Duration::from_millis(20));
        gone()
    }));
}
