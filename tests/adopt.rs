//! `adopt` and `init` on a node: what they write, what they leave alone, and how a dry run foretells it.

mod support;

use serde_json::Value;
use support::{GATEWAY, INSIDE_TEN, INTERNET, Node, Output, Snapshot};

const STATE: &str = "/var/lib/cocoon/net/pool.json";
const DROPS: &str = "--drop-internal-access --drop-cidr 10.0.0.0/8";
const UNMANAGED: &str = "adopt --platform none --node-name n1 --subnet 172.20.100.0/24";

fn state(node: &Node) -> Value {
    node.read_json(STATE)
}

fn last_line(output: &Output) -> &str {
    output.stdout.lines().last().unwrap_or_default()
}

#[test]
fn without_manage_iptables_the_rules_are_left_alone_and_the_daemon_brings_them() {
    let node = Node::new();
    let tables = ["iptables-nft", "iptables-legacy", "ip6tables-nft", "ip6tables-legacy"];
    let before = node.snapshot().only(&tables);
    let output = node.cocoon(format!("{UNMANAGED} {DROPS}")).succeeded();
    assert!(output.stdout.contains("when the daemon starts"), "{output}");
    assert_eq!(before.without_empty_tables(), node.snapshot().only(&tables).without_empty_tables());
    assert_eq!(state(&node)["dropInternalAccess"], Value::Bool(true));

    let _daemon = node.daemon("--metrics-addr=");
    let a = node.vm("a");
    assert!(a.reaches(INTERNET));
    assert!(a.is_cut_off_from(INSIDE_TEN));
}

#[test]
fn the_last_line_is_what_scripts_read() {
    let node = Node::new();
    let adopt = node.adopt("").succeeded();
    assert_eq!(
        last_line(&adopt),
        "cocoon-net adopt complete: 253 IPs registered on 172.20.100.0/24 (none, cloud preserved)"
    );
    let init = node.cocoon("init --platform none --node-name n1 --subnet 172.20.100.0/24").succeeded();
    assert_eq!(last_line(&init), "cocoon-net init complete: 140 IPs provisioned on 172.20.100.0/24 (none)");
}

#[test]
fn the_pool_leaves_the_gateway_out_and_ends_with_the_subnet() {
    let node = Node::new();
    node.cocoon("init --platform none --node-name n1 --subnet 172.20.100.0/29 --gateway 172.20.100.3").succeeded();
    let state = state(&node);
    assert_eq!(state["gateway"], "172.20.100.3");
    let ips: Vec<_> = state["ips"].as_array().expect("a list").iter().filter_map(Value::as_str).collect();
    assert_eq!(ips, ["172.20.100.1", "172.20.100.2", "172.20.100.4", "172.20.100.5", "172.20.100.6"]);
}

#[test]
fn the_bridge_has_the_gateway_address_the_mtu_and_a_mac_that_stays() {
    let node = Node::new();
    node.adopt("--mtu 1400").succeeded();
    let bridge = node.ok("ip -4 address show dev cni0");
    assert!(bridge.contains("172.20.100.1/24") && bridge.contains("mtu 1400"), "{bridge}");
    let pinned = node.mac_of("cni0");
    let vms = ["a", "b"].map(|name| node.vm(name));
    node.ok(format!("ip link set {} address 00:00:00:00:00:01", vms[0].port()));
    assert_eq!(node.mac_of("cni0"), pinned);
    assert!(vms[0].reaches(GATEWAY));
}

#[test]
fn the_mtu_follows_the_primary_nic() {
    let node = Node::new();
    node.ip(&["link set ens4 mtu 1460"]);
    node.adopt("").succeeded();
    assert!(node.ok("ip link show dev cni0").contains("mtu 1460"));
}

#[test]
fn an_existing_bridge_keeps_its_mac_and_its_ports() {
    let node = Node::new();
    node.bridge("172.20.100.1/24");
    node.ip(&["link set cni0 address 02:11:22:33:44:55"]);
    let a = node.vm("a");
    node.adopt(DROPS).succeeded();
    assert_eq!(node.mac_of("cni0"), "02:11:22:33:44:55");
    assert!(a.reaches(GATEWAY));
}

#[test]
fn the_sysctls_vm_traffic_needs_are_set() {
    let node = Node::builder().uplink("eth0.100").build();
    for scope in ["all", "default", "eth0.100"] {
        node.set_sysctl(&format!("net/ipv4/conf/{scope}/rp_filter"), "1");
    }
    node.adopt(DROPS).succeeded();
    assert_eq!(node.sysctl("net/ipv4/ip_forward"), "1");
    for scope in ["all", "default", "cni0", "eth0.100"] {
        assert_eq!(node.sysctl(&format!("net/ipv4/conf/{scope}/rp_filter")), "0", "{scope}");
    }
    for family in ["iptables", "ip6tables"] {
        assert_eq!(node.sysctl(&format!("net/bridge/bridge-nf-call-{family}")), "1");
    }
}

#[test]
fn a_second_run_changes_nothing_but_the_time() {
    let node = Node::new();
    node.adopt(DROPS).succeeded();
    let (before, first) = (node.snapshot(), node.read(STATE));
    node.adopt(DROPS).succeeded();
    let second = node.read(STATE);
    node.assert_back_to_but_for(&before, &["files"]);
    let timeless = |text: &str| text.lines().filter(|line| !line.contains("updatedAt")).collect::<Vec<_>>().join("\n");
    assert_eq!(timeless(&first), timeless(&second));
}

#[test]
fn without_a_default_route_the_platforms_usual_uplink_is_taken() {
    let node = Node::builder().no_default_route().build();
    node.adopt("").succeeded();
    assert_eq!(state(&node)["primaryNIC"], "ens4");
}

#[test]
fn a_missing_secondary_nic_is_named() {
    let node = Node::builder().uplink("eth0").nics(["eth1", "eth2", "eth3", "eth4", "eth5", "eth6"]).build();
    let output = node.cocoon("adopt --platform volcengine --node-name n1 --subnet 172.20.100.0/24 --manage-iptables");
    assert!(output.stderr.contains("eth7"), "{output}");
}

#[test]
fn volcengine_brings_its_secondary_nics_up_and_lets_them_through() {
    let node = Node::builder().uplink("eth0").volcengine_nics().build();
    let output = node
        .cocoon("adopt --platform volcengine --node-name n1 --subnet 172.20.100.0/24 --manage-iptables")
        .succeeded();
    assert!(last_line(&output).contains("253 IPs"), "{output}");
    let rules = node.rules("filter", "FORWARD").join("\n");
    for number in 1..=7 {
        assert!(node.ok(format!("ip link show dev eth{number}")).contains("UP"), "eth{number}");
        assert!(
            rules.contains(&format!("-i cni0 -o eth{number} ")) && rules.contains(&format!("-i eth{number} -o cni0 "))
        );
    }
    assert!(!rules.contains("eth0 "), "the primary NIC is no uplink of the VMs here: {rules}");
}

#[test]
fn another_state_directory_and_cni_folder_are_used_throughout() {
    let node = Node::new();
    let elsewhere = "--state-dir /run/elsewhere/state --cni-conf-dir /run/elsewhere/cni";
    let output = node.adopt(format!("{DROPS} {elsewhere}")).succeeded();
    assert!(node.exists("/run/elsewhere/state/pool.json") && !node.exists(STATE), "{output}");
    assert!(node.exists("/run/elsewhere/cni/30-cocoon-dhcp.conflist"), "{output}");
    assert!(!node.exists("/etc/cni/net.d/30-cocoon-dhcp.conflist"), "{output}");
    let daemon = node.daemon("--metrics-addr= --state-dir /run/elsewhere/state");
    node.cocoon("check --state-dir /run/elsewhere/state").succeeded();
    drop(daemon);
    node.cocoon("teardown --state-dir /run/elsewhere/state").succeeded();
    assert!(!node.exists("/run/elsewhere/cni/30-cocoon-dhcp.conflist"));
}

#[test]
fn a_dry_run_foretells_every_change_and_makes_none() {
    let node = Node::new();
    let before = node.snapshot();
    for command in [format!("{UNMANAGED} --manage-iptables"), UNMANAGED.replace("adopt", "init")] {
        let output = node.cocoon(format!("{command} {DROPS} --dry-run")).succeeded();
        for foretold in [
            "cocoon-net-drop",
            "10.0.0.0/8",
            "MASQUERADE",
            "cni0",
            "bridge-nf-call-iptables",
            "ip_forward",
            "30-cocoon-dhcp.conflist",
            "pool.json",
        ] {
            assert!(output.stdout.contains(foretold), "no {foretold} in {output}");
        }
        node.assert_alike(&before, Snapshot::without_empty_tables);
    }
}

#[test]
fn a_dry_run_on_a_node_that_is_right_has_no_rule_to_change() {
    let node = Node::new();
    node.adopt(DROPS).succeeded();
    let output = node.cocoon(format!("{UNMANAGED} --manage-iptables {DROPS} --dry-run")).succeeded();
    assert!(!output.stdout.lines().any(|line| line.starts_with(['+', '-']) && line.contains("FORWARD")), "{output}");
}

#[test]
fn a_dry_run_can_be_read_by_machines() {
    let node = Node::new();
    let output = node.cocoon(format!("{UNMANAGED} --manage-iptables {DROPS} --dry-run --json")).succeeded();
    assert!(output.json().is_object(), "{output}");
}

#[test]
fn a_second_command_waits_for_the_lock_then_names_who_holds_it() {
    let node = Node::new();
    node.adopt("").succeeded();
    let holder = node.hold_lock("/var/lib/cocoon/net");
    let output = node.adopt(DROPS).exited(1);
    assert!(output.stderr.contains(&format!("PID {}", std::process::id())), "{output}");
    drop(holder);
    node.adopt(DROPS).succeeded();
}

#[test]
fn two_at_once_end_as_one() {
    let node = Node::new();
    let adopt = format!("{UNMANAGED} --manage-iptables {DROPS}");
    let both = [node.spawn_cocoon(&adopt), node.spawn_cocoon(&adopt)];
    for run in both {
        run.wait(std::time::Duration::from_secs(30)).succeeded();
    }
    let rules = node.rules("filter", "FORWARD");
    assert_eq!(rules.iter().filter(|rule| rule.ends_with("-j DROP")).count(), 2, "{rules:#?}");
    let _daemon = node.daemon("--metrics-addr=");
    node.cocoon("check").succeeded();
}

/// Runs the program as an ordinary user.
fn as_nobody(node: &Node, args: &str) -> Output {
    let binary = env!("CARGO_BIN_EXE_cocoon-net");
    // The build folder may lie where only root can go.
    node.ok(format!("install -D -m 0755 {binary} /run/nobody/cocoon-net"));
    node.run(format!("setpriv --reuid 65534 --regid 65534 --clear-groups /run/nobody/cocoon-net {args}"))
}

#[test]
fn without_root_commands_say_so_first() {
    let node = Node::new();
    for command in [&format!("{UNMANAGED} --manage-iptables"), "teardown", "check", "daemon"] {
        let output = as_nobody(&node, command).exited(1);
        assert!(output.stderr.contains("root"), "{output}");
    }
}

#[test]
fn without_root_a_dry_run_shows_what_is_wanted() {
    let node = Node::new();
    let output = as_nobody(&node, &format!("{UNMANAGED} --manage-iptables {DROPS} --dry-run")).succeeded();
    assert!(output.stdout.contains("cocoon-net-drop") && output.stdout.contains("10.0.0.0/8"), "{output}");

    // The state is there, in a folder that only root may enter.
    node.adopt(DROPS).succeeded();
    let again = as_nobody(&node, &format!("{UNMANAGED} --manage-iptables {DROPS} --dry-run")).succeeded();
    assert_eq!(again.stdout.lines().count(), output.stdout.lines().count(), "nothing is compared with it");
    let output = as_nobody(&node, "status").exited(1);
    assert!(output.stderr.lines().next().is_some_and(|line| line.contains("root")), "{output}");
}

#[test]
fn results_go_to_stdout_and_talk_to_stderr() {
    let node = Node::new();
    let output = node.command([env!("CARGO_BIN_EXE_cocoon-net")]).run().exited(2);
    assert_eq!(output.stdout, "", "{output}");
    let verbose = format!("{} {UNMANAGED} --manage-iptables {DROPS}", env!("CARGO_BIN_EXE_cocoon-net"));
    let output = node.command(verbose).env("COCOON_NET_LOG_LEVEL", "debug").run().succeeded();
    assert_eq!(output.stdout.lines().count(), 1, "{output}");
    assert!(!output.stderr.is_empty());
}

#[test]
fn rules_that_another_backend_is_left_with_go_once_new_ones_stand() {
    let node = Node::new();
    let many: Vec<String> = (1..=17).map(|n| format!("--drop-cidr 10.{n}.0.0/16")).collect();
    node.adopt(many.join(" ")).succeeded();
    assert!(node.ok("ipset list -n").contains("cocoon-net-drop"));
    // The host's administrator switches to legacy, with the old rules over the set still there.
    for tool in ["iptables", "ip6tables"] {
        for verb in ["", "-save", "-restore"] {
            let real = node.real_tool("xtables-legacy-multi");
            node.fake_tool(
                &format!("{tool}{verb}"),
                &format!("#!/bin/sh\nexec {} {tool}{verb} \"$@\"\n", real.display()),
            );
        }
    }
    node.adopt("--drop-cidr 10.0.0.0/8").succeeded();
    assert!(!node.ok("iptables-nft-save").contains("cocoon-net"), "nothing is stranded");
    assert!(node.ok("iptables -S FORWARD").contains("-d 10.0.0.0/8"));
    assert!(!node.run("ipset list -n").stdout.contains("cocoon-net-drop"));
    let _daemon = node.daemon("--metrics-addr=");
    node.cocoon("check").succeeded();

    // And back, under a running daemon.
    let nft = node.real_tool("iptables-nft");
    node.ok(format!("{} -A FORWARD -i cni0 -o cni0 -m comment --comment cocoon-net -j ACCEPT", nft.display()));
    let mut daemon = _daemon;
    daemon.signal(nix::sys::signal::Signal::SIGTERM);
    daemon.wait(std::time::Duration::from_secs(5));
    let _daemon = node.daemon("--metrics-addr=");
    let cleared = || !node.ok("iptables-nft-save").contains("cocoon-net");
    assert!(support::eventually(std::time::Duration::from_secs(5), cleared));
}

#[test]
fn where_no_set_is_to_be_had_plain_rules_do_and_nobody_minds() {
    for (tool, refusal) in [
        ("ipset", "[ \"$1\" = restore ] && { echo 'Kernel error received: set type not supported' >&2; exit 1; }"),
        (
            "iptables-restore",
            "input=$(cat); case $input in *--match-set*) echo \"Couldn't load match \\`set'\" >&2; exit 2; esac",
        ),
    ] {
        let node = Node::new();
        let real = if tool == "ipset" { node.real_tool("ipset") } else { node.real_tool("iptables-nft-restore") };
        let run = if tool == "ipset" { "exec" } else { "printf '%s\\n' \"$input\" | exec" };
        node.fake_tool(tool, &format!("#!/bin/sh\n{refusal}\n{run} {} \"$@\"\n", real.display()));
        let many: Vec<String> = (1..=17).map(|n| format!("--drop-cidr 10.{n}.0.0/16")).collect();
        let output = node.adopt(many.join(" ")).succeeded();
        assert!(output.stderr.contains("plain rules"), "{tool}: {output}");
        assert!(!node.run("ipset list -n").stdout.contains("cocoon-net"), "{tool}: a set is left over");
        let _daemon = node.daemon("--metrics-addr=");
        let check = node.cocoon("check").succeeded();
        assert!(check.stdout.lines().any(|row| row.starts_with("WARN") && row.contains("ipset")), "{tool}: {check}");
        assert!(!node.cocoon("status").succeeded().stdout.contains("NOT ENFORCED"), "{tool}");
    }
}

#[test]
fn what_is_claimed_in_a_cloud_is_not_forgotten_for_another_platform() {
    let node = Node::builder().volcengine_nics().build();
    let mut state: serde_json::Value = serde_json::from_str(include_str!("golden/volcengine-pool.json")).unwrap();
    state["eniIDs"] = serde_json::json!(["eni-1", "eni-2"]);
    node.mkdir("/var/lib/cocoon/net");
    node.write(STATE, state.to_string());
    let before = node.snapshot();
    for command in ["adopt --manage-iptables", "init"] {
        let output =
            node.cocoon(format!("{command} --platform none --node-name n1 --subnet 172.20.100.0/24")).exited(1);
        assert!(output.stderr.contains("volcengine") && output.stderr.contains("teardown"), "{output}");
    }
    node.assert_back_to(&before);
}

#[test]
fn another_gateway_costs_no_route() {
    let node = Node::new();
    node.adopt("").succeeded();
    node.ok("ip route add 10.99.0.0/16 via 172.20.100.9 dev cni0");
    node.ok("ip route add 172.20.100.7/32 dev cni0 proto boot");
    node.adopt("--gateway 172.20.100.254").succeeded();
    let addresses = node.ok("ip -4 -o addr show dev cni0");
    assert!(addresses.contains("172.20.100.254/24") && !addresses.contains("172.20.100.1/24"), "{addresses}");
    let routes = node.ok("ip route");
    for route in ["10.99.0.0/16 via 172.20.100.9", "172.20.100.7 dev cni0", "172.20.100.0/24 dev cni0"] {
        assert!(routes.contains(route), "no {route} in {routes}");
    }
}

#[test]
fn a_relative_cni_folder_is_the_same_for_the_daemon() {
    let node = Node::new();
    let binary = env!("CARGO_BIN_EXE_cocoon-net");
    node.ok(["sh", "-c", &format!("cd /run && {binary} {UNMANAGED} --manage-iptables --cni-conf-dir rel")]);
    assert_eq!(node.read_json(STATE)["cniConfDir"], "/run/rel");
    assert!(node.exists("/run/rel/30-cocoon-dhcp.conflist"));
}

#[test]
fn the_uplink_is_found_behind_several_default_routes() {
    let node = Node::builder().uplink("eth7").nics(["eth9"]).no_default_route().build();
    node.ok("ip addr add 198.51.100.2/24 dev eth9");
    node.ok("ip link set eth9 up");
    node.ok("ip route add default nexthop via 10.128.0.1 dev eth7 nexthop via 198.51.100.1 dev eth9");
    node.adopt("").succeeded();
    assert_eq!(node.read_json(STATE)["primaryNIC"], "eth7");
}

#[test]
fn a_dry_run_that_would_fail_says_so_and_promises_nothing() {
    let node = Node::new();
    node.ok("ip link add cni0 type veth peer name other");
    let output = node.cocoon(format!("{UNMANAGED} --manage-iptables {DROPS} --dry-run")).exited(1);
    assert!(output.stdout.contains("! cni0") && !output.stdout.contains("+ iptables"), "{output}");
}
