//! A node that the Go program set up is taken over in place: its files load, its rules give way to ours, its traffic stays
//! isolated. The samples in `golden/` are what that program wrote.

mod support;

use serde_json::{Value, json};
use support::{GATEWAY, INSIDE_TEN, INTERNET, INTERNET_TOO, Node, NodeBuilder};

const STATE: &str = "/var/lib/cocoon/net/pool.json";
const CONFLIST: &str = "/etc/cni/net.d/30-cocoon-dhcp.conflist";
const DROPS: [&str; 3] = ["172.20.100.0/24", "10.0.0.0/8", "192.0.2.7/32"];

fn gke() -> NodeBuilder {
    Node::builder()
}

fn volcengine() -> NodeBuilder {
    Node::builder().uplink("eth0").volcengine_nics()
}

/// A node as the Go program leaves it after `init` or `adopt`, with its daemon stopped.
fn left_by_go(builder: NodeBuilder, state: &str, rules: &str) -> Node {
    let node = builder.build();
    node.write(STATE, state);
    node.write(CONFLIST, include_str!("golden/conflist.json"));
    node.command("iptables-restore").stdin(rules).run().succeeded();
    node.bridge("172.20.100.1/24");
    node.set_sysctl("net/bridge/bridge-nf-call-iptables", "1");
    node
}

fn assert_taken_over(node: &Node) {
    let (a, b) = (node.vm("a"), node.vm("b"));
    assert!(a.reaches(GATEWAY) && a.reaches(INTERNET));
    for dropped in [b.address(), INSIDE_TEN, INTERNET_TOO] {
        assert!(a.is_cut_off_from(dropped), "{dropped}");
    }
    let rules = node.rules("filter", "FORWARD");
    for drop in DROPS {
        let rule = format!("-A FORWARD -d {drop} -i cni0 -m comment --comment cocoon-net-drop -j DROP");
        assert_eq!(rules.iter().filter(|line| **line == rule).count(), 1, "{rule} in {rules:#?}");
        assert!(rules.iter().take(DROPS.len()).any(|line| *line == rule), "not at the head: {rule} in {rules:#?}");
    }
    let untagged = "-A FORWARD -i cni0 -o cni0 -j ACCEPT".to_owned();
    assert!(rules.contains(&untagged), "the Go program's own ACCEPT is not ours to remove: {rules:#?}");
    assert_eq!(
        node.read(CONFLIST),
        include_str!("golden/conflist.json"),
        "a conflist that says the same is left as it is"
    );
    node.cocoon("check").succeeded();
}

#[test]
fn the_daemon_takes_over_a_gke_node() {
    let node = left_by_go(gke(), include_str!("golden/gke-pool.json"), include_str!("golden/gke-iptables-save.txt"));
    let _daemon = node.daemon("--metrics-addr=");
    assert_taken_over(&node);
}

#[test]
fn the_daemon_takes_over_a_volcengine_node() {
    let state = include_str!("golden/volcengine-pool.json");
    let node = left_by_go(volcengine(), state, include_str!("golden/volcengine-iptables-save.txt"));
    let _daemon = node.daemon("--metrics-addr=");
    assert_taken_over(&node);
}

#[test]
fn the_daemon_leaves_the_go_programs_state_as_it_found_it() {
    let state = include_str!("golden/gke-pool.json");
    let node = left_by_go(gke(), state, include_str!("golden/gke-iptables-save.txt"));
    node.daemon("--metrics-addr=").stop().succeeded();
    assert_eq!(node.read(STATE), state);
}

#[test]
fn status_begins_with_the_go_programs_lines() {
    let node = left_by_go(gke(), include_str!("golden/gke-pool.json"), include_str!("golden/gke-iptables-save.txt"));
    let status = node.cocoon("status").succeeded();
    let head = |text: &str| text.lines().take(6).map(str::to_owned).collect::<Vec<_>>();
    assert_eq!(head(&status.stdout), head(include_str!("golden/gke-status.txt")), "{status}");
}

#[test]
fn adopt_writes_the_state_the_go_program_wrote() {
    let node = volcengine().build();
    for folder in ["/var/lib/cocoon/net", "/etc/cni/net.d"] {
        node.mkdir(folder);
    }
    let output = node.cocoon(
        "adopt --platform volcengine --node-name cocoon-pool --subnet 172.20.100.0/24 --pool-size 8 --manage-iptables \
         --drop-internal-access --drop-cidr 10.1.2.3/8 --drop-cidr 192.0.2.7/32",
    );
    let output = output.succeeded();
    assert_eq!(output.stdout.lines().last(), include_str!("golden/volcengine-adopt.stdout.txt").lines().last());

    let parse = |text: &str| -> Value { serde_json::from_str(text).unwrap() };
    let (ours, mut theirs) = (node.read_json(STATE), parse(include_str!("golden/volcengine-pool.json")));
    let keys = |state: &Value| state.as_object().unwrap().keys().cloned().collect::<Vec<_>>();
    assert_eq!(keys(&ours), keys(&theirs), "the same keys in the same order");
    theirs["dropCIDRs"] = json!(["10.0.0.0/8", "192.0.2.7/32"]);
    theirs["updatedAt"] = ours["updatedAt"].clone();
    assert_eq!(ours, theirs);
}

#[test]
fn the_rules_are_the_go_programs_with_our_comment() {
    let node = volcengine().build();
    node.cocoon(
        "adopt --platform volcengine --node-name cocoon-pool --subnet 172.20.100.0/24 --manage-iptables \
         --drop-internal-access --drop-cidr 10.1.2.3/8 --drop-cidr 192.0.2.7/32",
    )
    .succeeded();
    let plain = |line: &str| {
        line.replace(" -m comment --comment cocoon-net-drop", "").replace(" -m comment --comment cocoon-net", "")
    };
    let sorted = |lines: Vec<String>| {
        let mut lines = lines;
        lines.sort();
        lines
    };
    let mut ours = node.rules("filter", "FORWARD");
    ours.extend(node.rules("nat", "POSTROUTING"));
    let theirs = include_str!("golden/volcengine-iptables-save.txt").lines().filter(|line| line.starts_with("-A"));
    assert_eq!(
        sorted(ours.iter().map(|line| plain(line)).collect()),
        sorted(theirs.map(plain).collect()),
        "the same rules, whatever their order"
    );
}

#[test]
fn a_state_with_null_lists_and_without_dns_servers_loads() {
    let node = gke().build();
    let mut state: Value = serde_json::from_str(include_str!("golden/gke-pool.json")).unwrap();
    state["ips"] = Value::Null;
    state["secondaryNICs"] = Value::Null;
    state.as_object_mut().unwrap().remove("dnsServers");
    node.write(STATE, serde_json::to_string_pretty(&state).unwrap());
    let status = node.cocoon("status").succeeded();
    assert!(status.stdout.contains("IPs:        0"), "{status}");
}

#[test]
fn unknown_keys_survive_a_rewrite() {
    let node = gke().build();
    node.adopt("").succeeded();
    let mut state = node.read_json(STATE);
    state["future"] = json!({"kept": [1, 2, 3]});
    node.write(STATE, serde_json::to_string_pretty(&state).unwrap());
    node.adopt("--drop-internal-access").succeeded();
    let state = node.read_json(STATE);
    assert_eq!((&state["future"], &state["dropInternalAccess"]), (&json!({"kept": [1, 2, 3]}), &json!(true)));
}

#[test]
fn the_state_and_the_conflist_have_the_modes_others_expect() {
    let node = gke().build();
    node.adopt("--drop-internal-access").succeeded();
    let files = node.snapshot();
    let files = files.section("files");
    for line in [
        "/var/lib/cocoon/net/ 0750",
        "/var/lib/cocoon/net/pool.json 0644",
        "/etc/cni/net.d/30-cocoon-dhcp.conflist 0644",
    ] {
        assert!(files.contains(&line.to_owned()), "no `{line}` in {files:#?}");
    }
}

#[test]
fn port_isolation_that_a_node_has_is_not_lost_silently() {
    let node = gke().build();
    node.write(CONFLIST, include_str!("golden/conflist.json"));
    node.adopt("").succeeded();
    let conflist = node.read_json(CONFLIST);
    assert_eq!(conflist["plugins"][0]["portIsolation"], json!(true), "{conflist}");
    assert_eq!(conflist["plugins"][0]["macspoofchk"], json!(true), "{conflist}");
}

#[test]
fn port_isolation_that_a_node_has_moves_with_the_cni_folder() {
    let node = gke().build();
    node.write(CONFLIST, include_str!("golden/conflist.json"));
    node.adopt("").succeeded();
    node.adopt("--cni-conf-dir /run/cni").succeeded();
    let conflist = node.read_json("/run/cni/30-cocoon-dhcp.conflist");
    assert!(!node.exists(CONFLIST), "the old one is gone");
    assert_eq!(conflist["plugins"][0]["portIsolation"], json!(true), "{conflist}");
    assert_eq!(conflist["plugins"][0]["macspoofchk"], json!(true), "{conflist}");
}
