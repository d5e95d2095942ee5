//! Everything is validated before anything is touched: a bad value ends the command with a message that names it, and the
//! host stays as it was.

mod support;

use support::{Node, Output, Snapshot};

const SUBNETS: &[&str] = &[
    "",
    "172.20.100.0",
    "172.20.100.0/0",
    "172.20.100.0/31",
    "172.20.100.0/32",
    "172.20.100.0/33",
    "172.20.100.0/-1",
    "172.20.256.0/24",
    "172.020.100.0/24",
    "fd00::/64",
    "127.0.0.0/24",
    "224.0.1.0/24",
    "0.0.0.0/24",
    "subnet",
];
const DROP_CIDRS: &[&str] = &[
    "",
    "10.0.0.1",
    "10.0.0.0/33",
    "10.0.256.0/24",
    "010.0.0.0/8",
    "10.0.0.0/",
    "10.0.0/8",
    "fd00::/8",
    "::/0",
    "any",
    " 10.0.0.0/8",
];
const GATEWAYS: &[&str] = &["", "10.0.0.1", "172.20.100.0", "172.20.100.255", "172.20.101.1", "fe80::1", "gateway"];
const POOL_SIZES: &[&str] = &["", "0", "-1", "1.5", "many", "99999999999999999999999"];
const DNS: &[&str] = &["8.8.8", "resolver", "8.8.8.8;1.1.1.1"];
const NICS: &[&str] = &["", "eth 0", "../etc", "an-interface-name-that-is-too-long"];
const MTUS: &[&str] = &["", "0", "-1", "67", "65536", "large"];

/// A good command line; a flag given to a case comes on top.
fn command<'c>(name: &'c str, given: &'c str) -> Vec<&'c str> {
    let mut args = vec![name];
    for (flag, usual) in
        [("--platform", "--platform=none"), ("--node-name", "--node-name=n1"), ("--subnet", "--subnet=172.20.100.0/24")]
    {
        if !given.starts_with(flag) {
            args.push(usual);
        }
    }
    args.extend(["--drop-internal-access", given]);
    args
}

fn refused(node: &Node, untouched: &Snapshot, args: &[&str], flag: &str, value: &str) {
    let output = node.cocoon(args).exited(2);
    assert!(output.stderr.contains(flag), "the flag {flag} is not named: {output}");
    assert!(output.stderr.contains(value.trim()), "the value `{value}` is not named: {output}");
    assert_eq!(output.stdout, "", "{output}");
    node.assert_back_to(untouched);
}

fn all_refused(flag: &str, values: &[&str]) {
    let node = Node::new();
    let untouched = node.snapshot();
    for value in values {
        let given = format!("{flag}={value}");
        for name in ["init", "adopt"] {
            refused(&node, &untouched, &command(name, &given), flag, value);
        }
    }
}

#[test]
fn a_bad_subnet_is_refused() {
    all_refused("--subnet", SUBNETS);
}

#[test]
fn a_bad_drop_cidr_is_refused() {
    all_refused("--drop-cidr", DROP_CIDRS);
}

#[test]
fn a_bad_gateway_is_refused() {
    all_refused("--gateway", GATEWAYS);
}

#[test]
fn a_bad_pool_size_is_refused() {
    all_refused("--pool-size", POOL_SIZES);
}

#[test]
fn a_dns_server_that_is_no_address_is_refused() {
    all_refused("--dns", DNS);
}

#[test]
fn a_bad_interface_name_is_refused() {
    all_refused("--primary-nic", NICS);
}

#[test]
fn a_bad_mtu_is_refused() {
    all_refused("--mtu", MTUS);
}

#[test]
fn an_unknown_platform_and_an_empty_node_name_are_refused() {
    all_refused("--platform", &["aws", "GKE", ""]);
    all_refused("--node-name", &[""]);
}

#[test]
fn an_ipv6_drop_is_refused_by_name() {
    let node = Node::new();
    let output = node.adopt("--drop-cidr fd00::/8").exited(2);
    assert!(output.stderr.contains("IPv6"), "{output}");
}

#[test]
fn one_bad_drop_among_good_ones_refuses_all() {
    let node = Node::new();
    let untouched = node.snapshot();
    for name in ["init", "adopt"] {
        let mut args = command(name, "--drop-cidr=10.0.0.0/8");
        args.extend(["--drop-cidr=192.0.2.7", "--drop-cidr=203.0.113.0/24"]);
        refused(&node, &untouched, &args, "--drop-cidr", "192.0.2.7");
    }
}

#[test]
fn one_bad_dns_server_among_good_ones_is_named() {
    let node = Node::new();
    let untouched = node.snapshot();
    refused(&node, &untouched, &command("adopt", "--dns=8.8.8.8,nope,1.1.1.1"), "--dns", "nope");
}

#[test]
fn blanks_in_the_dns_list_are_ignored() {
    let node = Node::new();
    let list =
        ["adopt", "--platform=none", "--node-name=n1", "--subnet=172.20.100.0/24", "--dns", " 8.8.8.8, ,9.9.9.9 "];
    node.cocoon(list).succeeded();
    let state = node.read("/var/lib/cocoon/net/pool.json");
    assert!(state.contains("\"dnsServers\": [\n    \"8.8.8.8\",\n    \"9.9.9.9\"\n  ]"), "{state}");
}

#[test]
fn a_missing_subnet_or_node_name_is_wrong_usage() {
    let node = Node::new();
    for args in
        ["init --platform none --node-name n1", "adopt --platform none --subnet 172.20.100.0/24", "", "frobnicate"]
    {
        node.cocoon(args).exited(2);
    }
}

/// An adopted node whose `pool.json` somebody has edited.
fn edited(from: &str, to: &str) -> (Node, Snapshot) {
    let node = Node::new();
    node.adopt("--drop-internal-access --drop-cidr 10.0.0.0/8").succeeded();
    let state = node.read("/var/lib/cocoon/net/pool.json");
    assert!(state.contains(from), "{from} is not in {state}");
    node.write("/var/lib/cocoon/net/pool.json", state.replace(from, to));
    let snapshot = node.snapshot();
    (node, snapshot)
}

#[test]
fn a_persisted_value_that_does_not_validate_stops_every_command_and_leaves_the_rules_standing() {
    for (from, to, key) in [
        ("\"10.0.0.0/8\"", "\"fd00::/8\"", "dropCIDRs"),
        ("\"10.0.0.0/8\"", "\"10.0.0.1\"", "dropCIDRs"),
        ("\"subnet\": \"172.20.100.0/24\"", "\"subnet\": \"172.20.100.0\"", "subnet"),
        ("\"gateway\": \"172.20.100.1\"", "\"gateway\": \"10.0.0.1\"", "gateway"),
        ("\"172.20.100.2\"", "\"172.20.100\"", "ips"),
        ("\"8.8.8.8\"", "\"dns.google\"", "dnsServers"),
        ("\"primaryNIC\": \"ens4\"", "\"primaryNIC\": \"../ens4\"", "primaryNIC"),
        ("\"platform\": \"none\"", "\"platform\": \"aws\"", "platform"),
    ] {
        let (node, before) = edited(from, to);
        for command in ["daemon --metrics-addr=", "check", "teardown"] {
            let output = node.cocoon(command).exited(1);
            assert!(output.stderr.contains("/var/lib/cocoon/net/pool.json"), "the file is not named: {output}");
            assert!(output.stderr.contains(key), "the key {key} is not named: {output}");
        }
        node.assert_back_to_but_for(&before, &["files"]);
    }
}

#[test]
fn a_state_that_is_not_json_stops_the_command_and_leaves_the_rules_standing() {
    let (node, before) = edited("\"platform\"", "platform");
    let output: Output = node.cocoon("daemon --metrics-addr=").exited(1);
    assert!(output.stderr.contains("pool.json"), "{output}");
    node.assert_back_to_but_for(&before, &["files"]);
}
