//! GKE: init claims one alias and nothing else, teardown leaves the instance's aliases and the shared range as they
//! were, and what goes wrong in between is said and can be carried on from.

#![allow(clippy::unwrap_used)]

mod cloud;
mod support;

use std::time::Duration;

use cloud::{CloudNode, How, POOL, Server};
use support::{Node, Output, SUBNET};

/// Aliases of others, as on the node that the Go program's state was recorded on.
const OTHERS: [(&str, &str); 2] = [("", "10.128.7.0/28"), ("gke-pods", "10.8.1.0/24")];

/// The VMs' subnet as an alias.
const OURS: &str = "cocoon-pods:172.20.100.0/24";

/// How long a cloud call and a wait for the cloud may take where they hang, in seconds.
const BRIEFLY: &str = "0.8";

/// A node with aliases of others, in a VPC subnet with a shared range.
fn node() -> CloudNode {
    let node = CloudNode::gke();
    node.world().gcloud.add_range("cocoon-pods", "172.20.0.0/16");
    node.world().gcloud.set_aliases(&OTHERS);
    node
}

fn with_ours() -> Vec<String> {
    vec!["10.128.7.0/28".to_owned(), "gke-pods:10.8.1.0/24".to_owned(), OURS.to_owned()]
}

fn without_ours() -> Vec<String> {
    with_ours()[..2].to_vec()
}

#[test]
fn init_claims_one_alias_and_teardown_leaves_everything_as_it_was() {
    let node = node();
    let ranges = node.world().gcloud.ranges.clone();
    let output = node.init("").succeeded();
    assert_eq!(output.stdout, "cocoon-net init complete: 140 IPs provisioned on 172.20.100.0/24 (gke)\n");
    assert_eq!(node.world().gcloud.aliases(), with_ours());
    assert_eq!(node.listed("ips"), 140);
    assert_eq!(node.state("ips")[0], "172.20.100.2");
    assert_eq!(node.state("aliasRangeName"), "cocoon-pods");
    assert_eq!(node.world().faults.changes().len(), 1);

    let output = node.cocoon("teardown").succeeded();
    assert_eq!(output.stdout, "cocoon-net teardown complete (gke)\n");
    assert_eq!(node.world().gcloud.aliases(), without_ours());
    assert_eq!(node.world().gcloud.ranges, ranges);
    assert!(!node.exists(POOL));
}

#[test]
fn a_second_init_changes_nothing() {
    let node = node();
    node.init("").succeeded();
    let ips = node.state("ips");
    node.world().faults.reset();
    node.init("").succeeded();
    assert_eq!(node.world().faults.changes(), Vec::<String>::new());
    assert_eq!(node.state("ips"), ips);
}

#[test]
fn the_only_alias_is_removed_with_an_empty_list() {
    let node = node();
    node.world().gcloud.set_aliases(&[]);
    node.init("").succeeded();
    assert_eq!(node.world().gcloud.aliases(), [OURS]);
    node.cocoon("teardown").succeeded();
    assert_eq!(node.world().gcloud.aliases(), Vec::<String>::new());
}

#[test]
fn a_missing_range_is_made_with_the_subnet_of_this_node_and_stays() {
    let node = CloudNode::gke();
    node.init("").succeeded();
    let ranges = node.world().gcloud.ranges.clone();
    assert_eq!(ranges.last().unwrap(), &("cocoon-pods".to_owned(), SUBNET.to_owned()));
    node.cocoon("teardown").succeeded();
    assert_eq!(node.world().gcloud.ranges, ranges);
}

#[test]
fn a_range_that_does_not_cover_the_subnet_is_named_with_it() {
    let node = CloudNode::gke();
    node.world().gcloud.add_range("cocoon-pods", "172.20.100.0/25");
    let output = node.init("").exited(1);
    for words in ["cocoon-pods", "172.20.100.0/25", "172.20.100.0/24", "--subnet"] {
        assert!(output.stderr.contains(words), "{words}: {output}");
    }
    assert_eq!(node.world().faults.changes(), Vec::<String>::new());
}

#[test]
fn an_older_alias_of_ours_is_replaced() {
    let node = node();
    node.world().gcloud.set_aliases(&[OTHERS[0], ("cocoon-pods", "172.20.9.0/24"), OTHERS[1]]);
    node.init("").succeeded();
    assert_eq!(node.world().gcloud.aliases(), with_ours());
}

#[test]
fn an_alias_of_the_range_with_another_cidr_is_left_by_teardown() {
    let node = node();
    node.init("").succeeded();
    node.world().gcloud.set_aliases(&[OTHERS[0], ("cocoon-pods", "172.20.9.0/24")]);
    node.cocoon("teardown").succeeded();
    assert_eq!(node.world().gcloud.aliases(), ["10.128.7.0/28", "cocoon-pods:172.20.9.0/24"]);
}

#[test]
fn an_alias_that_is_seen_only_after_a_moment_is_waited_for() {
    let node = node();
    node.world().lag = 4;
    node.init("").succeeded();
    assert_eq!(node.world().gcloud.aliases(), with_ours());
    node.cocoon("teardown").succeeded();
    assert_eq!(node.world().gcloud.aliases(), without_ours());
}

#[test]
fn an_update_that_only_pretends_is_noticed_and_the_next_init_finishes() {
    let node = node();
    node.world().faults.on("network-interfaces update", How::Pretends);
    let output = node.init_within(BRIEFLY).exited(1);
    assert!(output.stderr.contains("reported success, but"), "{output}");
    assert_told(&output, "gcloud compute instances network-interfaces update", "the aliases of nic0", INIT_WAYS);
    node.world().faults.reset();
    node.init("").succeeded();
    node.world().faults.on("network-interfaces update", How::Pretends);
    node.teardown_within(BRIEFLY).exited(1);
    assert!(node.exists(POOL));
    node.world().faults.reset();
    node.cocoon("teardown").succeeded();
    assert_eq!(node.world().gcloud.aliases(), without_ours());
}

#[test]
fn an_instance_without_nic0_is_an_error() {
    let node = node();
    node.world().gcloud.has_nic = false;
    let output = node.init("").exited(1);
    assert!(output.stderr.contains("no interface `nic0`"), "{output}");
}

#[test]
fn a_bad_drop_makes_no_cloud_call_at_all() {
    let node = node();
    for bad in ["10.0.0.0/33", "2001:db8::/32", "10.0.0.1", "nonsense"] {
        let output = node.init(&format!("--drop-cidr {bad}")).failed();
        assert!(output.stderr.contains(bad), "{output}");
    }
    assert_eq!(node.world().faults.calls.len(), 0);
    assert!(!node.exists(POOL));
}

#[test]
fn a_missing_gcloud_is_named() {
    let node = node();
    node.without_tool("gcloud");
    let output = node.init("").exited(1);
    assert!(output.stderr.contains("`gcloud` was not found"), "{output}");
}

#[test]
fn a_dry_run_names_the_calls_and_makes_none() {
    let node = CloudNode::gke();
    node.world().gcloud.set_aliases(&OTHERS);
    let output = node.init("--dry-run").succeeded();
    for line in [
        "gcloud compute networks subnets update nodes --project acme-vms --region asia-southeast1 \
         --add-secondary-ranges=cocoon-pods=172.20.100.0/24",
        "gcloud compute instances network-interfaces update cocoon-node-1 --project acme-vms --zone asia-southeast1-b \
         --network-interface nic0 --aliases '10.128.7.0/28;gke-pods:10.8.1.0/24;cocoon-pods:172.20.100.0/24'",
    ] {
        assert!(output.stdout.contains(line), "{line}: {output}");
    }
    assert_eq!(node.world().faults.changes(), Vec::<String>::new());
    assert!(!node.exists(POOL));

    node.init("").succeeded();
    let output = node.init("--dry-run").succeeded();
    assert!(!output.stdout.contains("gcloud"), "{output}");
    let output = node.cocoon("teardown --dry-run").succeeded();
    assert!(output.stdout.contains("--aliases '10.128.7.0/28;gke-pods:10.8.1.0/24'"), "{output}");
    assert_eq!(node.world().gcloud.aliases(), with_ours());
}

#[test]
fn status_shows_the_aliases_and_does_without_them_when_the_cloud_is_away() {
    let node = node();
    node.init("").succeeded();
    let output = node.cocoon("status").succeeded();
    let line = format!("Aliases:    {}\n", with_ours().join(", "));
    assert!(output.stdout.contains(&line), "{output}");
    node.world().faults.on("gcloud", How::Crashes);
    let output = node.cocoon("status").succeeded();
    assert!(output.stdout.contains("IPs:        140") && !output.stdout.contains("Aliases:"), "{output}");
    assert!(output.stderr.contains("connection reset"), "{output}");
}

#[test]
fn two_inits_at_once_make_one_alias() {
    let node = node();
    node.world().slow = Duration::from_millis(100);
    let (one, two) = (node.spawn_init(), node.spawn_init());
    let outputs = [one, two].map(|init| init.wait(Duration::from_secs(30)));
    assert!(outputs.iter().any(|output| output.status.success()), "{} {}", outputs[0], outputs[1]);
    assert_eq!(node.world().gcloud.aliases(), with_ours());
}

#[test]
fn a_failed_second_init_leaves_the_daemon_what_it_had() {
    let node = node();
    node.init("").succeeded();
    let (ips, range) = (node.state("ips"), node.state("aliasRangeName"));
    for number in 1..=2 {
        node.world().faults.at(number, How::Refused);
        node.init("").exited(1);
        assert_eq!((node.state("ips"), node.state("aliasRangeName")), (ips.clone(), range.clone()), "call {number}");
    }
}

// Which cloud this is.

const NO_PLATFORM: &str = "init --node-name n1 --subnet 172.20.100.0/24";

#[test]
fn the_platform_is_told_from_the_metadata_server_that_answers() {
    let node = node();
    let output = node.cocoon(NO_PLATFORM).succeeded();
    assert!(output.stdout.ends_with("(gke)\n"), "{output}");
}

#[test]
fn a_moved_metadata_server_is_found_by_its_variable() {
    let node = CloudNode::bare(Node::new(), "gke");
    node.serve_metadata(Server::GoogleElsewhere);
    node.set_env("GCE_METADATA_HOST", "127.0.0.1:8088");
    let output = node.cocoon(NO_PLATFORM).succeeded();
    assert!(output.stdout.ends_with("(gke)\n"), "{output}");
}

#[test]
fn no_metadata_server_or_both_or_web_pages_are_errors_that_name_the_flag() {
    let cases: [&[Server]; 4] = [
        &[],
        &[Server::Google, Server::Volcengine],
        &[Server::PageForGoogle, Server::PageForVolcengine],
        &[Server::PageForGoogle, Server::SilentForVolcengine],
    ];
    for servers in cases {
        let node = CloudNode::bare(Node::new(), "gke");
        for server in servers {
            node.serve_metadata(*server);
        }
        let output = node.cocoon(NO_PLATFORM).exited(1);
        assert!(output.stderr.contains("--platform"), "{servers:?}: {output}");
        assert_eq!(node.world().faults.calls.len(), 0, "{servers:?}");
        assert!(!node.exists(POOL), "{servers:?}");
    }
}

#[test]
fn a_web_page_in_the_place_of_metadata_ends_init() {
    let node = CloudNode::bare(Node::new(), "gke");
    node.serve_metadata(Server::PageForGoogle);
    let output = node.init("").exited(1);
    assert!(output.stderr.contains("a web page"), "{output}");
    assert_eq!(node.world().faults.calls.len(), 0);
}

#[test]
fn without_a_cloud_no_call_is_made() {
    let node = CloudNode::bare(Node::new(), "none");
    node.init("").succeeded();
    assert_eq!(node.listed("ips"), 140);
    node.cocoon("status").succeeded();
    node.cocoon("teardown").succeeded();
    assert_eq!(node.world().faults.calls.len(), 0);
}

// Every single call going wrong.

const INIT_WAYS: &[&str] = &["`cocoon-net init`", "`cocoon-net teardown`"];

#[track_caller]
fn assert_told(output: &Output, call: &str, answer: &str, ways_on: &[&str]) {
    let call: String = call.chars().take(60).collect();
    for words in [call.as_str(), answer].iter().chain(ways_on) {
        assert!(output.stderr.contains(words), "`{words}` is missing from {output}");
    }
}

/// A node in a VPC subnet that has no shared range yet, so that init has most to do.
fn bare_vpc() -> CloudNode {
    let node = CloudNode::gke();
    node.world().gcloud.set_aliases(&OTHERS);
    node
}

/// Lets each call of `init` go wrong in turn; then another `init` finishes, or `teardown` gives back.
fn at_each_call_of_init(how: How, answer: &str, again: bool) {
    let calls = {
        let node = bare_vpc();
        node.init("").succeeded();
        node.world().faults.calls.len()
    };
    for number in 1..=calls {
        let node = bare_vpc();
        node.world().faults.at(number, how);
        let output = node.init_within(BRIEFLY);
        let call = node.world().faults.calls[number - 1].clone();
        node.world().faults.reset();
        if output.status.success() {
            assert!(matches!(how, How::Junk | How::Hangs), "call {number} is not looked at: {output}");
        } else {
            assert_told(&output.exited(1), &call, answer, INIT_WAYS);
        }
        if again {
            node.init("").succeeded();
            assert_eq!(node.world().gcloud.aliases(), with_ours());
        }
        node.teardown_within(BRIEFLY).succeeded();
        assert_eq!(node.world().gcloud.aliases(), without_ours());
    }
}

fn at_each_call_of_teardown(how: How, answer: &str) {
    let node = node();
    for number in 1..=3 {
        node.init("").succeeded();
        node.world().faults.at(number, how);
        let output = node.teardown_within(BRIEFLY);
        let call = node.world().faults.calls[number - 1].clone();
        node.world().faults.reset();
        if output.status.success() {
            assert!(matches!(how, How::Junk), "call {number} is not looked at: {output}");
        } else {
            assert_told(&output.exited(1), &call, answer, &["`cocoon-net teardown`"]);
            assert!(node.exists(POOL), "call {number}: the state must stay");
            node.cocoon("teardown").succeeded();
        }
        assert_eq!(node.world().gcloud.aliases(), without_ours());
    }
}

#[test]
fn a_call_of_init_that_is_refused_is_carried_on_from() {
    at_each_call_of_init(How::Refused, "permission", true);
}

#[test]
fn a_call_of_init_that_is_refused_is_torn_down_from() {
    at_each_call_of_init(How::Refused, "permission", false);
}

#[test]
fn a_call_of_init_that_crashes_is_carried_on_from() {
    at_each_call_of_init(How::Crashes, "connection reset", true);
}

#[test]
fn a_call_of_init_that_answers_junk_is_carried_on_from() {
    at_each_call_of_init(How::Junk, "Sign in", true);
}

#[test]
fn a_call_of_init_that_answers_junk_is_torn_down_from() {
    at_each_call_of_init(How::Junk, "Sign in", false);
}

#[test]
fn a_call_of_init_that_hangs_is_carried_on_from() {
    at_each_call_of_init(How::Hangs, "did not finish within 0.8 s", true);
}

#[test]
fn a_call_of_init_that_hangs_is_torn_down_from() {
    at_each_call_of_init(How::Hangs, "did not finish within 0.8 s", false);
}

#[test]
fn a_call_of_teardown_that_is_refused_is_carried_on_from() {
    at_each_call_of_teardown(How::Refused, "permission");
}

#[test]
fn a_call_of_teardown_that_crashes_is_carried_on_from() {
    at_each_call_of_teardown(How::Crashes, "connection reset");
}

#[test]
fn a_call_of_teardown_that_answers_junk_is_carried_on_from() {
    at_each_call_of_teardown(How::Junk, "Sign in");
}

#[test]
fn a_call_of_teardown_that_hangs_is_carried_on_from() {
    at_each_call_of_teardown(How::Hangs, "did not finish within 0.8 s");
}

#[test]
fn an_init_that_is_killed_after_any_call_is_carried_on_or_torn_down_from() {
    for again in [true, false] {
        for number in 1.. {
            let node = bare_vpc();
            node.world().lag = 1;
            if !node.killed_at(number, "init") {
                assert!(number > 4, "init makes at least its two changes and two looks");
                break;
            }
            node.world().faults.reset();
            if again {
                node.init("").succeeded();
                assert_eq!(node.world().gcloud.aliases(), with_ours());
            }
            node.cocoon("teardown").succeeded();
            assert_eq!(node.world().gcloud.aliases(), without_ours());
        }
    }
}

#[test]
fn a_teardown_that_is_killed_after_any_call_is_carried_on_from() {
    for number in 1..=3 {
        let node = node();
        node.init("").succeeded();
        assert!(node.killed_at(number, "teardown"));
        node.world().faults.reset();
        node.cocoon("teardown").succeeded();
        assert_eq!(node.world().gcloud.aliases(), without_ours());
    }
}

// The host, beside the cloud.

const ALIAS_ROUTE: &str = "local 172.20.100.0/24 dev ens4";
const CRON: &str = "/etc/cron.d/cocoon-net-fix-alias";

fn has_alias_route(node: &CloudNode) -> bool {
    node.ok("ip route show table local").contains(ALIAS_ROUTE)
}

#[test]
fn the_route_of_the_guest_agent_goes_and_the_cron_file_comes_and_goes() {
    let node = node();
    node.ip(&[&format!("route add {ALIAS_ROUTE} table local")]);
    assert!(has_alias_route(&node));
    node.init("").succeeded();
    assert!(!has_alias_route(&node));
    assert_eq!(node.read(CRON), include_str!("golden/gke-cron.txt"));
    node.cocoon("teardown").succeeded();
    assert!(!node.exists(CRON));
}

#[test]
fn the_daemon_removes_the_route_of_the_guest_agent_whenever_it_comes_back() {
    let node = node();
    node.init("").succeeded();
    let mut daemon = node.daemon("--metrics-addr=");
    for _ in 0..2 {
        node.ip(&[&format!("route add {ALIAS_ROUTE} table local")]);
        assert!(daemon.wait_until(Duration::from_secs(10), |_| !has_alias_route(&node)));
    }
}

#[test]
fn a_node_of_the_go_program_is_torn_down() {
    let node = node();
    node.world().gcloud.set_aliases(&[OTHERS[0], OTHERS[1], ("cocoon-pods", SUBNET)]);
    node.write(POOL, include_str!("golden/gke-pool.json"));
    let output = node.cocoon("teardown").succeeded();
    assert_eq!(output.stdout, include_str!("golden/gke-teardown.stdout.txt"));
    assert_eq!(node.world().gcloud.aliases(), without_ours());
}

#[test]
fn the_status_of_a_node_of_the_go_program_is_what_it_was() {
    let node = node();
    node.world().gcloud.set_aliases(&[OTHERS[0], ("cocoon-pods", SUBNET)]);
    node.write(POOL, include_str!("golden/gke-pool.json"));
    let output = node.cocoon("status").succeeded();
    assert!(output.stdout.starts_with(include_str!("golden/gke-status.txt").trim_end()), "{output}");
}

#[test]
fn init_over_a_working_node_keeps_its_leases() {
    let node = node();
    node.init("").succeeded();
    let _daemon = node.daemon("--metrics-addr=");
    let vm = node.vm_builder("a").unconfigured().build();
    let lease = || vm.ok("udhcpc -i eth0 -f -q -n -t 5 -s /bin/true");
    lease();
    let leases = node.read("/var/lib/cocoon/net/leases.json");
    node.init("").succeeded();
    for number in 1..=2 {
        node.world().faults.at(number, How::Refused);
        node.init("").exited(1);
    }
    lease();
    let addresses = |text: &str| text.matches("\"ip\"").count();
    assert_eq!(addresses(&node.read("/var/lib/cocoon/net/leases.json")), addresses(&leases));
    assert_eq!(node.listed("ips"), 140);
}
