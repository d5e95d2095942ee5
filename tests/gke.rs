//! GKE: init claims one alias and nothing else, teardown leaves the instance's aliases and the shared range as they
//! were, and what goes wrong in between is said and can be carried on from.

#![allow(clippy::unwrap_used)]

mod cloud;
mod support;

use std::time::Duration;

use cloud::{CloudNode, How, OTHERS, OURS, POOL, with_ours, without_ours};
use support::SUBNET;

#[test]
fn init_claims_one_alias_and_teardown_leaves_everything_as_it_was() {
    let node = CloudNode::gke_with_range();
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
    let node = CloudNode::gke_with_range();
    node.init("").succeeded();
    let ips = node.state("ips");
    node.world().faults.reset();
    node.init("").succeeded();
    assert_eq!(node.world().faults.changes(), Vec::<String>::new());
    assert_eq!(node.state("ips"), ips);
}

#[test]
fn the_only_alias_is_removed_with_an_empty_list() {
    let node = CloudNode::gke_with_range();
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
    let node = CloudNode::gke_with_range();
    node.world().gcloud.set_aliases(&[OTHERS[0], ("cocoon-pods", "172.20.9.0/24"), OTHERS[1]]);
    node.init("").succeeded();
    assert_eq!(node.world().gcloud.aliases(), with_ours());
}

#[test]
fn an_alias_of_the_range_with_another_cidr_is_left_by_teardown() {
    let node = CloudNode::gke_with_range();
    node.init("").succeeded();
    node.world().gcloud.set_aliases(&[OTHERS[0], ("cocoon-pods", "172.20.9.0/24")]);
    node.cocoon("teardown").succeeded();
    assert_eq!(node.world().gcloud.aliases(), ["10.128.7.0/28", "cocoon-pods:172.20.9.0/24"]);
}

#[test]
fn an_alias_that_is_seen_only_after_a_moment_is_waited_for() {
    let node = CloudNode::gke_with_range();
    node.world().lag = 4;
    node.init("").succeeded();
    assert_eq!(node.world().gcloud.aliases(), with_ours());
    node.cocoon("teardown").succeeded();
    assert_eq!(node.world().gcloud.aliases(), without_ours());
}

#[test]
fn an_instance_without_nic0_is_an_error() {
    let node = CloudNode::gke_with_range();
    node.world().gcloud.has_nic = false;
    let output = node.init("").exited(1);
    assert!(output.stderr.contains("no interface `nic0`"), "{output}");
}

#[test]
fn a_bad_drop_makes_no_cloud_call_at_all() {
    let node = CloudNode::gke_with_range();
    for bad in ["10.0.0.0/33", "2001:db8::/32", "10.0.0.1", "nonsense"] {
        let output = node.init(&format!("--drop-cidr {bad}")).failed();
        assert!(output.stderr.contains(bad), "{output}");
    }
    assert_eq!(node.world().faults.calls.len(), 0);
    assert!(!node.exists(POOL));
}

#[test]
fn a_missing_gcloud_is_named() {
    let node = CloudNode::gke_with_range();
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
    let node = CloudNode::gke_with_range();
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
    let node = CloudNode::gke_with_range();
    node.world().slow = Duration::from_millis(100);
    let (one, two) = (node.spawn_init(), node.spawn_init());
    let outputs = [one, two].map(|init| init.wait(Duration::from_secs(30)));
    assert!(outputs.iter().any(|output| output.status.success()), "{} {}", outputs[0], outputs[1]);
    assert_eq!(node.world().gcloud.aliases(), with_ours());
}

#[test]
fn a_failed_second_init_leaves_the_daemon_what_it_had() {
    let node = CloudNode::gke_with_range();
    node.init("").succeeded();
    let (ips, range) = (node.state("ips"), node.state("aliasRangeName"));
    for number in 1..=2 {
        node.world().faults.at(number, How::Refused);
        node.init("").exited(1);
        assert_eq!((node.state("ips"), node.state("aliasRangeName")), (ips.clone(), range.clone()), "call {number}");
    }
}

#[test]
fn a_failed_second_init_with_other_drops_keeps_the_first_ones() {
    let node = CloudNode::gke_with_range();
    node.init("--drop-cidr 10.0.0.0/8").succeeded();
    let rules = node.rules("filter", "FORWARD");
    node.world().faults.at(1, How::Refused);
    node.init("--drop-cidr 192.0.2.0/24 --drop-internal-access").exited(1);
    assert_eq!(node.state("dropCIDRs"), serde_json::json!(["10.0.0.0/8"]));
    assert!(node.state("dropInternalAccess").is_null());
    assert_eq!(node.rules("filter", "FORWARD"), rules);
}

#[test]
fn an_init_that_the_cloud_refuses_leaves_the_host_as_it_was_and_a_state_to_tear_down() {
    let node = CloudNode::gke_with_range();
    let before = node.snapshot();
    node.world().faults.on("network-interfaces update", How::Refused);
    node.init("--drop-internal-access").exited(1);
    node.assert_back_to_but_for(&before, &["files"]);
    assert_eq!(node.state("platform"), "gke");
    assert_eq!(node.listed("ips"), 0);
    node.world().faults.reset();
    node.teardown_within("1").succeeded();
    assert_eq!(node.world().gcloud.aliases(), without_ours());
}

// The host, beside the cloud.

const ALIAS_ROUTE: &str = "local 172.20.100.0/24 dev ens4";
const CRON: &str = "/etc/cron.d/cocoon-net-fix-alias";

fn has_alias_route(node: &CloudNode) -> bool {
    node.ok("ip route show table local").contains(ALIAS_ROUTE)
}

#[test]
fn the_route_of_the_guest_agent_goes_and_the_cron_file_comes_and_goes() {
    let node = CloudNode::gke_with_range();
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
    let node = CloudNode::gke_with_range();
    node.init("").succeeded();
    let mut daemon = node.daemon("--metrics-addr=");
    for _ in 0..2 {
        node.ip(&[&format!("route add {ALIAS_ROUTE} table local")]);
        assert!(daemon.wait_until(Duration::from_secs(10), |_| !has_alias_route(&node)));
    }
}

#[test]
fn a_node_of_the_go_program_is_torn_down() {
    let node = CloudNode::gke_with_range();
    node.world().gcloud.set_aliases(&[OTHERS[0], OTHERS[1], ("cocoon-pods", SUBNET)]);
    node.write(POOL, include_str!("golden/gke-pool.json"));
    let output = node.cocoon("teardown").succeeded();
    assert_eq!(output.stdout, include_str!("golden/gke-teardown.stdout.txt"));
    assert_eq!(node.world().gcloud.aliases(), without_ours());
}

#[test]
fn the_status_of_a_node_of_the_go_program_is_what_it_was() {
    let node = CloudNode::gke_with_range();
    node.world().gcloud.set_aliases(&[OTHERS[0], ("cocoon-pods", SUBNET)]);
    node.write(POOL, include_str!("golden/gke-pool.json"));
    let output = node.cocoon("status").succeeded();
    assert!(output.stdout.starts_with(include_str!("golden/gke-status.txt").trim_end()), "{output}");
}

#[test]
fn init_over_a_working_node_keeps_its_leases() {
    let node = CloudNode::gke_with_range();
    node.init("").succeeded();
    let mut daemon = node.daemon("--metrics-addr=");
    let vm = node.vm_builder("a").unconfigured().build();
    let address = cloud::lease(&vm);
    node.init("").succeeded();
    for number in 1..=2 {
        node.world().faults.at(number, How::Refused);
        node.init("").exited(1);
        assert_eq!(cloud::lease(&vm), address, "after call {number} was refused");
    }
    assert!(daemon.is_running());
    assert_eq!(node.listed("ips"), 140);
}

#[test]
fn what_makes_isolation_impossible_is_found_out_before_the_cloud_is_changed() {
    let node = CloudNode::gke_with_range();
    node.set_sysctl("net/bridge/bridge-nf-call-iptables", "0");
    node.fake_tool("sysctl", "#!/bin/sh\nexit 0\n");
    let output = node.init("--drop-internal-access").exited(1);
    assert!(output.stderr.contains("bridge-nf-call-iptables"), "{output}");
    assert_eq!(node.world().faults.changes(), Vec::<String>::new());
    assert!(!node.exists(POOL));
}
