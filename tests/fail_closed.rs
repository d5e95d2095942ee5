//! Isolation is never silently a no-op: what cannot be verified ends with an error, and with no path for VM traffic that
//! was not there before.

mod support;

use std::time::Duration;

use support::{Backend, GATEWAY, INSIDE_TEN, INTERNET, Node, Output, Snapshot};

const TOGGLE: &str = "net/bridge/bridge-nf-call-iptables";
const DROPS: &str = "--drop-internal-access --drop-cidr 10.0.0.0/8";
const STATE: &str = "/var/lib/cocoon/net/pool.json";

/// Runs `adopt` with drops, which must fail, name something, and leave nothing of ours behind.
#[track_caller]
fn fails_and_leaves_nothing(node: &Node, named: &str) -> Output {
    let before = node.snapshot();
    let output = node.adopt(DROPS).exited(1);
    assert!(output.stderr.contains(named), "{named} is not named: {output}");
    assert_nothing_of_ours(node, &before);
    output
}

/// Folders that came to be and a table that was looked at are no path for traffic; everything else counts.
#[track_caller]
fn assert_nothing_of_ours(node: &Node, before: &Snapshot) {
    node.assert_alike(before, |snapshot| snapshot.without(&["files"]).without_empty_tables());
    assert!(!node.exists(STATE));
    assert!(!node.exists("/etc/cni/net.d/30-cocoon-dhcp.conflist"));
}

fn fails(node: &Node, tool: &str) {
    node.fake_tool(tool, "#!/bin/sh\necho \"$0: no luck today\" >&2\nexit 1\n");
}

#[test]
fn a_failing_modprobe_is_fine_where_the_toggle_holds() {
    let node = Node::new();
    fails(&node, "modprobe");
    node.adopt(DROPS).succeeded();
    assert_eq!(node.sysctl(TOGGLE), "1");
    let (a, b) = (node.vm("a"), node.vm("b"));
    assert!(a.reaches(GATEWAY));
    assert!(a.is_cut_off_from(b.address()));
}

#[test]
fn a_missing_modprobe_is_fine_where_the_toggle_holds() {
    let node = Node::new();
    node.without_tool("modprobe");
    node.adopt(DROPS).succeeded();
    assert_eq!(node.sysctl(TOGGLE), "1");
}

#[test]
fn without_the_bridge_toggle_nothing_is_installed() {
    let node = Node::new();
    fails(&node, "modprobe");
    node.hide("/proc/sys/net/bridge");
    let output = fails_and_leaves_nothing(&node, "net.bridge.bridge-nf-call-iptables");
    assert!(output.stderr.contains("no luck today"), "why modprobe failed is not told: {output}");
}

#[test]
fn a_toggle_that_stays_at_0_is_not_believed() {
    let node = Node::new();
    node.fake_tool("sysctl", "#!/bin/sh\nexit 0\n");
    fails_and_leaves_nothing(&node, "net.bridge.bridge-nf-call-iptables");
}

#[test]
fn a_read_only_proc_sys_with_the_toggle_at_0_fails() {
    let node = Node::new();
    node.read_only("/proc/sys");
    fails_and_leaves_nothing(&node, "net.bridge.bridge-nf-call-iptables");
}

#[test]
fn a_read_only_proc_sys_that_is_already_right_is_fine() {
    let node = Node::new();
    for key in [TOGGLE, "net/bridge/bridge-nf-call-ip6tables", "net/ipv4/ip_forward"] {
        node.set_sysctl(key, "1");
    }
    for scope in ["all", "default", "ens4"] {
        node.set_sysctl(&format!("net/ipv4/conf/{scope}/rp_filter"), "0");
    }
    node.read_only("/proc/sys");
    node.adopt(DROPS).succeeded();
    let (a, b) = (node.vm("a"), node.vm("b"));
    assert!(a.reaches(GATEWAY));
    assert!(a.is_cut_off_from(b.address()));
}

#[test]
fn a_node_that_already_forwards_keeps_its_own_bridge_when_the_toggle_fails() {
    let node = Node::new();
    node.bridge("172.20.100.1/24");
    let (a, b) = (node.vm("a"), node.vm("b"));
    node.fake_tool("sysctl", "#!/bin/sh\nexit 0\n");
    fails_and_leaves_nothing(&node, "net.bridge.bridge-nf-call-iptables");
    assert!(a.reaches(b.address()), "what the operator had still works");
}

const IPTABLES: [&str; 3] = ["iptables", "iptables-save", "iptables-restore"];

#[test]
fn without_iptables_nothing_is_installed() {
    let node = Node::new();
    for family in ["iptables", "ip6tables"] {
        for backend in ["", "-nft", "-legacy"] {
            for tool in ["", "-save", "-restore"] {
                node.without_tool(&format!("{family}{backend}{tool}"));
            }
        }
    }
    let output = node.adopt(DROPS).exited(1);
    assert!(output.stderr.contains("iptables"), "{output}");
    assert!(!node.exists("/sys/class/net/cni0") && !node.exists(STATE));
    assert_eq!(node.sysctl("net/ipv4/ip_forward"), "0");
}

#[test]
fn failing_iptables_tools_are_named_and_nothing_is_installed() {
    let node = Node::new();
    IPTABLES.iter().for_each(|tool| fails(&node, tool));
    let output = fails_and_leaves_nothing(&node, "iptables");
    assert!(output.stderr.contains("no luck today"), "what the tool said is not told: {output}");
}

#[test]
fn a_refused_restore_leaves_nothing() {
    let node = Node::new();
    node.fake_tool("iptables-restore", "#!/bin/sh\ncat >/dev/null\necho 'line 3 failed' >&2\nexit 1\n");
    fails_and_leaves_nothing(&node, "line 3 failed");
}

#[test]
fn a_restore_that_only_says_it_worked_is_not_believed() {
    let node = Node::new();
    node.fake_tool("iptables-restore", "#!/bin/sh\ncat >/dev/null\nexit 0\n");
    let output = node.adopt(DROPS).exited(1);
    assert!(!node.exists(STATE), "{output}");
    assert!(!node.exists("/sys/class/net/cni0"), "{output}");
}

#[test]
fn partial_output_with_exit_code_3_is_a_failure() {
    let node = Node::new();
    for tool in ["iptables", "iptables-save"] {
        node.fake_tool(
            tool,
            "#!/bin/sh\nprintf '*filter\\n:FORWARD ACCEPT [0:0]\\n'\necho 'table is incompatible' >&2\nexit 3\n",
        );
    }
    fails_and_leaves_nothing(&node, "table is incompatible");
}

#[test]
fn a_native_nft_rule_that_iptables_cannot_print_is_a_failure() {
    let node = Node::new();
    node.ok("iptables -A FORWARD -s 198.51.100.1 -j ACCEPT");
    node.ok(["nft", "add", "rule", "ip", "filter", "FORWARD", "meta", "cgroup", "1", "counter", "accept"]);
    if node.run("iptables -S FORWARD").code() == 0 && node.run("iptables-save").code() == 0 {
        // This iptables can print it: then it must have been left where it is.
        node.adopt(DROPS).succeeded();
        assert!(node.ok("nft list chain ip filter FORWARD").contains("cgroup 1"));
    } else {
        node.adopt(DROPS).exited(1);
        assert!(!node.exists(STATE) && !node.exists("/sys/class/net/cni0"));
    }
}

const SLEEP: [&str; 6] = ["nft", "add", "table", "ip", "filter", "{ flags dormant; }"];

fn sleeps(node: &Node) -> bool {
    node.ok("nft list table ip filter").contains("flags dormant")
}

#[test]
fn a_dormant_table_is_not_taken_for_isolation() {
    let node = Node::new();
    node.adopt(DROPS).succeeded();
    let (a, _daemonless) = (node.vm("a"), node.cocoon("check").exited(3));
    assert!(a.is_cut_off_from(INSIDE_TEN));
    node.ok(SLEEP);
    assert!(a.reaches(INSIDE_TEN), "a dormant table is no isolation, whatever iptables lists");
    let check = node.cocoon("check").exited(3);
    assert!(check.stdout.contains("FAIL  rules") && check.stdout.contains("dormant"), "{check}");
    let status = node.cocoon("status").succeeded();
    assert!(status.stdout.matches("NOT ENFORCED").count() == 2, "{status}");
}

#[test]
fn a_dormant_table_is_woken_and_said_to_be() {
    let node = Node::new();
    node.ok(SLEEP);
    let dry = node.adopt(format!("{DROPS} --dry-run")).succeeded();
    assert!(dry.stdout.contains("- table ip filter flags dormant"), "{dry}");
    assert!(sleeps(&node), "a dry run changes nothing");
    node.adopt(DROPS).succeeded();
    assert!(!sleeps(&node));
    let a = node.vm("a");
    assert!(a.is_cut_off_from(INSIDE_TEN) && a.reaches(INTERNET));
}

#[test]
fn a_table_woken_in_vain_sleeps_again() {
    let node = Node::new();
    node.ok(SLEEP);
    node.full("/var/lib/cocoon/net");
    node.adopt(DROPS).exited(1);
    assert!(sleeps(&node));
}

#[test]
fn a_chain_on_no_hook_is_not_taken_for_a_built_in_one() {
    let node = Node::new();
    node.ok("nft add table ip filter");
    node.ok("nft add chain ip filter FORWARD");
    fails_and_leaves_nothing(&node, "chain `FORWARD` of table `ip filter` is on no hook");
}

#[test]
fn a_hanging_tool_is_ended_with_its_children_and_nothing_is_installed() {
    let node = Node::new();
    for tool in IPTABLES {
        node.fake_tool(tool, "#!/bin/sh\nsleep 300 & wait\n");
    }
    let begin = std::time::Instant::now();
    fails_and_leaves_nothing(&node, "iptables");
    assert!(begin.elapsed() < Duration::from_secs(55), "it took {:?}", begin.elapsed());
    node.settle(&[]);
}

#[test]
fn a_lock_held_by_someone_else_is_waited_for() {
    let node = Node::builder().backend(Backend::Legacy).build();
    node.ok("iptables -S");
    let lock = node.hold_lock("/run/xtables.lock");
    let release = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_secs(1));
        drop(lock);
    });
    node.adopt(DROPS).succeeded();
    assert!(node.rules("filter", "FORWARD")[0].ends_with("-j DROP"));
    release.join().unwrap();
}

#[test]
fn a_lock_that_is_never_released_is_named_and_nothing_is_installed() {
    let node = Node::builder().backend(Backend::Legacy).build();
    node.ok("iptables -S");
    let _holder = node.hold_lock("/run/xtables.lock");
    let output = node.adopt(DROPS).exited(1);
    assert!(output.stderr.contains("lock"), "{output}");
    assert!(!node.exists(STATE) && !node.exists("/sys/class/net/cni0"), "{output}");
}

#[test]
fn a_read_only_state_directory_stops_adopt_before_anything() {
    let node = Node::new();
    node.read_only("/var/lib/cocoon/net");
    fails_and_leaves_nothing(&node, "/var/lib/cocoon/net");
}

#[test]
fn a_full_state_directory_never_leaves_an_accept_without_its_drops() {
    let node = Node::new();
    node.full("/var/lib/cocoon/net");
    let output = node.adopt(DROPS).exited(1);
    assert!(output.stderr.contains("/var/lib/cocoon/net"), "{output}");
    assert!(!node.exists(STATE));
    assert_drops_guard_every_path(&node);

    node.unmount("/var/lib/cocoon/net");
    node.adopt(DROPS).succeeded();
}

/// Never a path without its guard: where there is an ACCEPT of ours or a bridge, the drops stand ahead and apply.
#[track_caller]
fn assert_drops_guard_every_path(node: &Node) {
    let rules = node.rules("filter", "FORWARD");
    let drops = ["-d 172.20.100.0/24 -i cni0", "-d 10.0.0.0/8 -i cni0"];
    let guarded = drops.iter().all(|drop| {
        rules.iter().take(2).any(|rule| rule.contains(drop) && rule.ends_with("--comment cocoon-net-drop -j DROP"))
    });
    let path = rules.iter().any(|rule| rule.ends_with("-j ACCEPT")) || node.exists("/sys/class/net/cni0");
    let listing = rules.join("\n");
    assert!(!path || guarded, "a path without its drops:\n{listing}");
    assert!(!path || node.sysctl(TOGGLE) == "1", "a path with the bridge toggle at 0:\n{listing}");
}

const ADOPT: &str = "adopt --platform none --node-name n1 --subnet 172.20.100.0/24 --manage-iptables \
                     --drop-internal-access --drop-cidr 10.0.0.0/8";

/// Whatever a killed run left, it is guarded; and the next run completes.
#[track_caller]
fn assert_guarded_and_repairable(node: &Node, backend: Backend) {
    node.settle(&[]);
    assert_drops_guard_every_path(node);
    node.adopt(DROPS).succeeded();
    assert_drops_guard_every_path(node);
    assert!(node.exists(STATE));
    let again = Node::builder().backend(backend).build();
    again.adopt(DROPS).succeeded();
    let tables = |node: &Node| node.snapshot().only(&["iptables-nft", "iptables-legacy", "sysctls"]);
    assert_eq!(tables(node), tables(&again), "a re-run ends where a first run does");
}

/// Kills `adopt` at moments spread over its whole run.
fn killed_at_any_moment(backend: Backend) {
    let whole = {
        let node = Node::builder().backend(backend).build();
        let begin = std::time::Instant::now();
        node.adopt(DROPS).succeeded();
        begin.elapsed()
    };
    let moments = 24;
    for moment in 0..moments {
        let node = Node::builder().backend(backend).build();
        node.spawn_cocoon(ADOPT).kill_after(whole * moment / moments);
        assert_guarded_and_repairable(&node, backend);
    }
}

#[test]
fn killed_at_any_moment_adopt_leaves_no_path_without_its_drops_on_nft() {
    killed_at_any_moment(Backend::Nft);
}

#[test]
fn killed_at_any_moment_adopt_leaves_no_path_without_its_drops_on_legacy() {
    killed_at_any_moment(Backend::Legacy);
}

/// Kills `adopt` around the nth tool it starts, for each n: before the tool has run, or after.
fn killed_around_each_tool(kill_line: &str) {
    for nth in 1.. {
        let node = Node::new();
        for tool in ["iptables-save", "iptables-restore", "ip6tables-save", "ip6tables-restore", "sysctl", "modprobe"] {
            let real = node.real_tool(if tool.starts_with("ip") { "xtables-nft-multi" } else { tool });
            let call =
                if tool.starts_with("ip") { format!("{} {tool}", real.display()) } else { real.display().to_string() };
            let count = "/run/.harness/count";
            let script = format!(
                "#!/bin/sh\nexec 9>>{count}\nflock 9\necho x >&9\nturn=$([ $(wc -l <{count}) = {nth} ] && echo yes)\nexec 9>&-\n{}\n",
                kill_line.replace("TOOL", &format!("{call} \"$@\""))
            );
            node.fake_tool(tool, &script);
        }
        let output = node.run([env!("CARGO_BIN_EXE_cocoon-net").to_owned(), ADOPT.to_owned()].join(" "));
        if output.status.success() {
            assert!(nth > 4, "adopt started only {nth} tools: the stand-ins are not what it runs");
            return;
        }
        assert_eq!(output.code(), -1, "not killed: {output}");
        // From here on the stand-ins never come to their turn again.
        node.write("/run/.harness/count", "x\n".repeat(1000));
        assert_guarded_and_repairable(&node, Backend::Nft);
    }
}

#[test]
fn killed_before_any_tool_ran_adopt_leaves_no_path_without_its_drops() {
    killed_around_each_tool("[ \"$turn\" ] && kill -9 $PPID && exit 1\nexec TOOL");
}

#[test]
fn killed_after_any_tool_ran_adopt_leaves_no_path_without_its_drops() {
    killed_around_each_tool("TOOL\nstatus=$?\n[ \"$turn\" ] && kill -9 $PPID\nexit $status");
}

#[test]
fn a_hangup_in_the_middle_undoes_what_was_done() {
    let node = Node::new();
    let before = node.snapshot();
    let real = node.real_tool("sysctl");
    node.fake_tool("sysctl", &format!("#!/bin/sh\nsleep 1\nexec {} \"$@\"\n", real.display()));
    let mut adopt = node.spawn_cocoon(format!(
        "adopt --platform none --node-name n1 --subnet 172.20.100.0/24 --manage-iptables {DROPS}"
    ));
    std::thread::sleep(std::time::Duration::from_millis(500));
    adopt.signal(nix::sys::signal::Signal::SIGHUP);
    adopt.wait(std::time::Duration::from_secs(20)).exited(1);
    node.assert_alike(&before, support::Snapshot::without_empty_tables);
}

#[test]
fn rules_that_cannot_be_read_any_more_do_not_keep_the_rest_from_being_undone() {
    let node = Node::new();
    let real = node.real_tool("iptables-nft-save");
    // It can be looked at twice, and never again.
    node.fake_tool(
        "iptables-save",
        &format!(
            "#!/bin/sh\necho x >>/run/looks\n[ $(wc -l </run/looks) -gt 2 ] && exit 4\nexec {} \"$@\"\n",
            real.display()
        ),
    );
    node.adopt(DROPS).exited(1);
    assert!(!node.exists("/sys/class/net/cni0") && !node.exists("/etc/cni/net.d/30-cocoon-dhcp.conflist"));
    assert!(!node.exists(STATE));
}
