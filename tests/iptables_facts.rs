//! What the code takes for granted about the kernel and iptables. When one of these fails after an upgrade, the code
//! that leans on it needs a look.

mod support;

use support::{Backend, Host, Node};

fn both(test: impl Fn(&Node)) {
    for backend in [Backend::Nft, Backend::Legacy] {
        test(&Node::builder().backend(backend).build());
    }
}

fn restore(node: &Node, lines: &str) -> i32 {
    node.command("iptables-restore --noflush --wait 5").stdin(lines).run().code()
}

#[test]
fn listing_masks_host_bits_adds_32_leaves_out_everything_and_prints_d_before_i() {
    both(|node| {
        for rule in ["-i cni0 -d 10.0.0.1", "-i cni0 -d 10.1.2.3/8", "-i cni0 -d 0.0.0.0/0", "-i cni0 ! -d 192.0.2.1"] {
            node.ok(format!("iptables -A FORWARD {rule} -j DROP"));
        }
        assert_eq!(
            node.rules("filter", "FORWARD"),
            [
                "-A FORWARD -d 10.0.0.1/32 -i cni0 -j DROP",
                "-A FORWARD -d 10.0.0.0/8 -i cni0 -j DROP",
                "-A FORWARD -i cni0 -j DROP",
                "-A FORWARD ! -d 192.0.2.1/32 -i cni0 -j DROP",
            ]
        );
    });
}

#[test]
fn comments_of_other_than_plain_characters_are_quoted() {
    both(|node| {
        for comment in ["cocoon-net_1", "with space", "a:b", "it's", "say \"x\""] {
            node.ok(["iptables", "-A", "FORWARD", "-m", "comment", "--comment", comment, "-j", "DROP"]);
        }
        let rules = node.rules("filter", "FORWARD");
        let shown: Vec<_> =
            rules.iter().filter_map(|rule| rule.split_once("--comment ")?.1.strip_suffix(" -j DROP")).collect();
        assert_eq!(shown, ["cocoon-net_1", "\"with space\"", "\"a:b\"", r#""it\'s""#, r#""say \"x\"""#]);
    });
}

#[test]
fn checking_for_a_rule_tells_absent_from_broken() {
    both(|node| {
        node.run("iptables -C FORWARD -i cni0 -j DROP").exited(1);
        node.run("iptables -C NOWHERE -i cni0 -j DROP").exited(1);
        node.run("iptables -C FORWARD -m nosuchmatch -j DROP").exited(2);
    });
}

#[test]
fn one_bad_line_refuses_the_whole_restore() {
    both(|node| {
        assert_ne!(restore(node, "*filter\n-A FORWARD -i cni0 -j DROP\n-D FORWARD -i not-there -j DROP\nCOMMIT\n"), 0);
        assert!(node.rules("filter", "FORWARD").is_empty());
    });
}

#[test]
fn deletes_and_inserts_go_in_one_restore_that_keeps_what_it_does_not_name() {
    both(|node| {
        node.ok("iptables -A FORWARD -s 198.51.100.1 -j ACCEPT");
        node.ok("iptables -A FORWARD -i cni0 -j DROP");
        let lines = "*filter\n-D FORWARD -i cni0 -j DROP\n-I FORWARD 1 -i cni0 -d 10.0.0.0/8 -j DROP\nCOMMIT\n";
        assert_eq!(restore(node, lines), 0);
        let rules = ["-A FORWARD -d 10.0.0.0/8 -i cni0 -j DROP", "-A FORWARD -s 198.51.100.1/32 -j ACCEPT"];
        assert_eq!(node.rules("filter", "FORWARD"), rules);
    });
}

#[test]
fn the_backends_do_not_see_each_other_and_a_drop_in_either_wins() {
    let node = Node::new();
    node.bridge("172.20.100.1/24");
    let a = node.vm("a");
    assert!(a.reaches("203.0.113.7"));
    node.ok(format!("{} -A FORWARD -d 203.0.113.7 -j DROP", node.real_tool("iptables-legacy").display()));
    node.ok("iptables -A FORWARD -i cni0 -j ACCEPT");
    assert_eq!(node.rules("filter", "FORWARD"), ["-A FORWARD -i cni0 -j ACCEPT"]);
    assert!(a.reaches("192.0.2.7"));
    assert!(a.is_cut_off_from("203.0.113.7"));
}

#[test]
fn legacy_exits_with_4_when_the_lock_stays_taken() {
    let node = Node::builder().backend(Backend::Legacy).build();
    node.ok("iptables -S");
    let _holder = node.hold_lock("/run/xtables.lock");
    node.run("iptables -w 1 -A FORWARD -j DROP").exited(4);
}

#[test]
fn the_bridge_toggles_belong_to_each_namespace() {
    let (one, two) = (Host::new("one"), Host::new("two"));
    one.set_sysctl("net/bridge/bridge-nf-call-iptables", "1");
    assert_eq!(two.sysctl("net/bridge/bridge-nf-call-iptables"), "0");
}

#[test]
fn a_bridge_without_a_mac_of_its_own_takes_its_lowest_ports() {
    let node = Node::new();
    node.bridge("172.20.100.1/24");
    let first = node.vm("a");
    node.ok(format!("ip link set {} address 02:00:00:00:00:01", first.port()));
    let taken = node.mac_of("cni0");
    assert_eq!(taken, "02:00:00:00:00:01");
    node.ok("ip link set cni0 address 02:00:00:00:99:99");
    let second = node.vm("b");
    node.ok(format!("ip link set {} address 00:00:00:00:00:02", second.port()));
    assert_eq!(node.mac_of("cni0"), "02:00:00:00:99:99", "once set, it stays");
}
