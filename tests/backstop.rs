//! The backstop: without a single firewall rule, drop targets stay out of reach.

#![expect(clippy::expect_used, reason = "a test fails by panicking")]

mod support;

use std::collections::BTreeSet;

use cocoon_net::host::backstop::Backstop;
use ipnet::Ipv4Net;
use support::{GATEWAY, INSIDE_TEN, INTERNET, Node};

fn targets(list: &[&str]) -> BTreeSet<Ipv4Net> {
    list.iter().map(|target| target.parse().expect("a range")).collect()
}

/// Raises the wall for some ranges, or lowers it.
fn wall(node: &Node, steps: &'static [&'static [&'static str]]) {
    node.enter(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        runtime.block_on(async {
            let mut backstop = Backstop::open("cni0").expect("netlink");
            for step in steps {
                let result =
                    if step.is_empty() { backstop.lower().await } else { backstop.raise(&targets(step)).await };
                result.expect("the kernel agrees");
            }
        });
    });
}

#[test]
fn targets_lead_nowhere_and_everything_else_where_it_did() {
    let node = Node::new();
    node.bridge("172.20.100.1/24");
    node.ok("iptables -t nat -A POSTROUTING -s 172.20.100.0/24 ! -o cni0 -j MASQUERADE");
    let (a, b) = (node.vm("a"), node.vm("b"));
    a.ip(&[&format!("route add {} via {GATEWAY}", b.address())]);
    assert!(a.reaches(INSIDE_TEN) && a.reaches(b.address()), "nothing stands in the way");

    wall(&node, &[&["10.0.0.0/8", "172.20.100.0/24"]]);
    assert!(a.is_cut_off_from(INSIDE_TEN));
    assert!(a.is_cut_off_from(b.address()), "the detour through the gateway");
    assert!(a.reaches(GATEWAY) && a.reaches(INTERNET));
    assert!(node.reaches(a.address()) && node.reaches(INSIDE_TEN), "the node itself is not concerned");

    // The bridge is made again, and the rule still finds it.
    node.ip(&["link del cni0"]);
    node.bridge("172.20.100.1/24");
    node.ip(&["link set veth-a master cni0"]);
    a.ip(&["neigh flush dev eth0"]);
    assert!(a.reaches(INTERNET) && a.is_cut_off_from(INSIDE_TEN));

    wall(&node, &[&[]]);
    assert!(a.reaches(INSIDE_TEN));
}

#[test]
fn it_can_be_raised_again_for_others_and_leaves_nothing() {
    let node = Node::new();
    node.bridge("172.20.100.1/24");
    let state = || node.ok("ip rule") + &node.ok("ip route show table all");
    let before = state();
    wall(&node, &[&["10.0.0.0/8", "0.0.0.0/0"], &["10.0.0.0/8", "192.0.2.0/24"], &["10.0.0.0/8", "192.0.2.0/24"]]);
    let table = node.ok("ip route show table 9092");
    assert_eq!(table.lines().map(str::trim).collect::<Vec<_>>(), ["blackhole 10.0.0.0/8", "blackhole 192.0.2.0/24"]);
    assert_eq!(node.ok("ip rule").matches("9092").count(), 1, "one rule");
    wall(&node, &[&[], &[]]);
    assert_eq!(state(), before);
}

#[test]
fn the_whole_internet_leads_nowhere() {
    let node = Node::new();
    node.bridge("172.20.100.1/24");
    node.ok("iptables -t nat -A POSTROUTING -s 172.20.100.0/24 ! -o cni0 -j MASQUERADE");
    let a = node.vm("a");
    assert!(a.reaches(INTERNET));
    wall(&node, &[&["0.0.0.0/0"]]);
    assert!(a.is_cut_off_from(INTERNET) && a.reaches(GATEWAY));
}

#[test]
fn check_names_a_wall_that_stands() {
    let node = Node::new();
    node.adopt("--drop-cidr 10.0.0.0/8").succeeded();
    assert!(!node.cocoon("check").stdout.contains("backstop"));
    wall(&node, &[&["10.0.0.0/8"]]);
    let output = node.cocoon("check");
    assert!(output.stdout.contains("backstop"), "{output}");
    node.cocoon("teardown").succeeded();
    assert!(!node.ok("ip rule").contains("9092"));
}
