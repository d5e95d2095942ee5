//! Volcengine: init claims seven ENIs with 140 addresses and nothing else, teardown gives back exactly what was claimed,
//! and what goes wrong in between is said and can be carried on from. See `volcengine_faults.rs` for every single call
//! going wrong.

#![allow(clippy::unwrap_used)]

mod cloud;
mod support;

use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

use cloud::{CloudNode, How, INSTANCE, POOL, Server};
use support::{Node, SUBNET};

#[test]
fn init_claims_seven_enis_and_140_addresses_and_teardown_gives_them_back() {
    let node = CloudNode::volcengine();
    let output = node.init("").succeeded();
    assert_eq!(output.stdout, "cocoon-net init complete: 140 IPs provisioned on 172.20.100.0/24 (volcengine)\n");
    node.assert_seven_enis();
    let ips: Vec<Ipv4Addr> = serde_json::from_value(node.state("ips")).unwrap();
    assert!(ips.is_sorted() && !ips.contains(&Ipv4Addr::new(172, 20, 100, 1)), "{ips:?}");
    let subnet = node.world().ve.subnets.last().unwrap().id.clone();
    assert_eq!(node.state("subnetID"), subnet);

    let output = node.cocoon("teardown").succeeded();
    assert_eq!(output.stdout, "cocoon-net teardown complete (volcengine)\n");
    node.assert_no_enis();
    assert!(node.world().ve.enis.iter().any(|eni| eni.kind == "primary" && eni.status == "InUse"));
}

#[test]
fn a_second_init_changes_nothing() {
    let node = CloudNode::volcengine();
    node.init("").succeeded();
    let (ips, ids) = (node.state("ips"), node.state("eniIDs"));
    node.world().faults.reset();
    node.init("").succeeded();
    assert_eq!(node.world().faults.changes(), Vec::<String>::new());
    assert_eq!((node.state("ips"), node.state("eniIDs")), (ips, ids));
}

#[test]
fn a_whole_init_and_teardown_waits_for_nothing_that_is_there() {
    let node = CloudNode::volcengine();
    let started = Instant::now();
    node.init("").succeeded();
    node.cocoon("teardown").succeeded();
    let taken = started.elapsed();
    assert!(taken < Duration::from_secs(5), "{taken:?}");
}

#[test]
fn what_is_seen_only_after_a_moment_is_waited_for() {
    let node = CloudNode::volcengine();
    node.world().lag = 3;
    node.init("").succeeded();
    node.assert_seven_enis();
    node.cocoon("teardown").succeeded();
    node.assert_no_enis();
}

#[test]
fn slow_answers_are_waited_for() {
    let node = CloudNode::volcengine();
    node.world().slow = Duration::from_millis(60);
    node.init("").succeeded();
    node.assert_seven_enis();
}

#[test]
fn a_cloud_that_is_called_too_often_is_called_again_after_a_while() {
    let node = CloudNode::volcengine();
    node.world().ve.throttled = 3;
    node.init("").succeeded();
    node.assert_seven_enis();
    node.world().ve.throttled = usize::MAX;
    let output = node.init_within("0.5").exited(1);
    assert!(output.stderr.contains("AccountFlowLimitExceeded"), "{output}");
}

#[test]
fn progress_is_on_stderr_a_line_for_each_step() {
    let node = CloudNode::volcengine();
    let output = node.init("").succeeded();
    for line in ["ENIs 1/21: made eni-", "ENIs 8/21: attached eni-", "ENIs 21/21: assigned 20 addresses to eni-"] {
        assert!(output.stderr.contains(line), "{line}: {output}");
    }
    assert_eq!(output.stdout.lines().count(), 1, "{output}");
}

#[test]
fn progress_is_a_bar_on_a_terminal() {
    let node = CloudNode::volcengine();
    let init = format!("{} init --platform volcengine --node-name n1 --subnet {SUBNET}", node.program());
    node.set_env("TERM", "xterm");
    let output = node.run(["script", "-qec", &init, "/dev/null"]).succeeded();
    assert!(output.stdout.contains("ENIs [") && output.stdout.contains("/21"), "{output}");
    assert!(!output.stdout.contains("ENIs 1/21: "), "{output}");
}

#[test]
fn the_subnet_is_found_among_130() {
    let node = CloudNode::volcengine();
    {
        let mut world = node.world();
        for n in 0..130 {
            world.ve.add_subnet(&format!("10.64.{n}.0/24"));
        }
        world.ve.add_subnet(SUBNET);
    }
    node.init("").succeeded();
    assert_eq!(node.world().faults.count("CreateSubnet"), 0);
    node.assert_seven_enis();
}

#[test]
fn the_subnet_stays_and_is_used_again() {
    let node = CloudNode::volcengine();
    for _ in 0..2 {
        node.init("").succeeded();
        node.cocoon("teardown").succeeded();
    }
    assert_eq!(node.world().faults.count("CreateSubnet"), 1);
}

#[test]
fn lists_are_read_to_their_last_page_however_small_the_pages_are() {
    let node = CloudNode::volcengine();
    node.world().ve.page = 3;
    node.init("").succeeded();
    node.assert_seven_enis();
    node.world().faults.reset();
    node.init("").succeeded();
    assert_eq!(node.world().faults.changes(), Vec::<String>::new());
    node.cocoon("teardown").succeeded();
    node.assert_no_enis();
}

#[test]
fn answers_without_statuses_and_counts_will_do() {
    let node = CloudNode::volcengine();
    node.world().ve.sparse = true;
    node.init("").succeeded();
    node.assert_seven_enis();
    node.world().faults.reset();
    node.init("").succeeded();
    assert_eq!(node.world().faults.changes(), Vec::<String>::new());
    node.cocoon("teardown").succeeded();
    node.assert_no_enis();
}

#[test]
fn enis_of_others_are_neither_taken_nor_removed() {
    let node = CloudNode::volcengine();
    let theirs = {
        let mut world = node.world();
        world.ve.enis_per_instance = 9;
        let ours = world.ve.add_subnet(SUBNET);
        world.ve.add_eni("on-our-instance", "subnet-hosts", INSTANCE);
        world.ve.add_eni("in-our-subnet", &ours, "");
        world.ve.add_eni("n1-eni-1", &ours, "i-another");
        world.ve.secondary().into_iter().cloned().collect::<Vec<_>>()
    };
    node.init("").succeeded();
    assert_eq!(node.listed("eniIDs"), 7);
    assert_eq!(node.world().ve.secondary().len(), 10);
    node.cocoon("teardown").succeeded();
    let left: Vec<_> = node.world().ve.secondary().into_iter().cloned().collect();
    assert_eq!(left, theirs);
}

#[test]
fn an_eni_of_the_state_that_was_moved_to_another_instance_stays_there() {
    let node = CloudNode::volcengine();
    node.init("").succeeded();
    let moved = {
        let mut world = node.world();
        let eni = world.ve.enis.last_mut().unwrap();
        "i-another".clone_into(&mut eni.device);
        eni.id.clone()
    };
    node.cocoon("teardown").succeeded();
    assert_eq!(node.world().ve.ids(), [moved]);
}

#[test]
fn enis_of_an_earlier_run_are_used_and_only_the_rest_is_made() {
    let node = CloudNode::volcengine();
    {
        let mut world = node.world();
        let subnet = world.ve.add_subnet(SUBNET);
        for n in 1..=3 {
            world.ve.add_eni(&format!("n1-eni-{n}"), &subnet, INSTANCE);
        }
        world.ve.enis.last_mut().unwrap().secondary = (20..30).map(|n| format!("172.20.100.{n}")).collect();
    }
    node.init("").succeeded();
    node.assert_seven_enis();
    let world = node.world();
    assert_eq!(world.faults.count("CreateNetworkInterface"), 4);
    assert_eq!(world.faults.count("SecondaryPrivateIpAddressCount 10"), 1);
    assert_eq!(world.faults.count("--NetworkInterfaceName n1-eni-1"), 0);
}

#[test]
fn state_of_the_go_program_gives_back_what_is_attached_in_our_subnet() {
    let node = CloudNode::volcengine();
    node.init("").succeeded();
    let other = node.world().ve.add_eni("theirs", "subnet-hosts", INSTANCE);
    let mut state: serde_json::Value = serde_json::from_str(&node.read(POOL)).unwrap();
    for key in ["eniIDs", "subnetID"] {
        state.as_object_mut().unwrap().remove(key);
    }
    node.write(POOL, state.to_string());
    node.cocoon("teardown").succeeded();
    assert_eq!(node.world().ve.ids(), [other]);
}

#[test]
fn an_eni_that_will_not_go_keeps_the_state_and_not_the_others() {
    let node = CloudNode::volcengine();
    node.init("").succeeded();
    let stuck = node.world().ve.ids()[2].clone();
    node.world().faults.on(&format!("DeleteNetworkInterface --NetworkInterfaceId {stuck}"), How::Refused);
    let output = node.cocoon("teardown").exited(1);
    for words in [stuck.as_str(), "AccessDenied", "cocoon-net teardown"] {
        assert!(output.stderr.contains(words), "{words}: {output}");
    }
    assert_eq!(node.world().ve.ids(), std::slice::from_ref(&stuck));
    assert_eq!(node.state("eniIDs"), serde_json::json!([stuck]));
    node.world().faults.reset();
    node.cocoon("teardown").succeeded();
    node.assert_no_enis();
}

#[test]
fn a_subnet_without_enough_addresses_is_refused_before_anything_is_made() {
    let node = CloudNode::volcengine();
    node.world().ve.add_subnet("172.20.100.0/25");
    let output = node.cocoon("init --platform volcengine --node-name n1 --subnet 172.20.100.0/25").exited(1);
    assert!(output.stderr.contains("has 125 free addresses and 147 more are needed"), "{output}");
    assert_eq!(node.world().faults.changes(), Vec::<String>::new());
}

#[test]
fn addresses_that_run_out_halfway_are_named_and_all_is_given_back() {
    let node = CloudNode::volcengine();
    node.world().ve.sparse = true;
    let output = node.cocoon("init --platform volcengine --node-name n1 --subnet 172.20.100.0/25").exited(1);
    for words in ["AssignPrivateIpAddresses", "InsufficientIpInSubnet", "7 attached, 5 with all their addresses"] {
        assert!(output.stderr.contains(words), "{words}: {output}");
    }
    node.cocoon("teardown").succeeded();
    node.assert_no_enis();
}

#[test]
fn an_instance_that_takes_fewer_enis_is_named_and_all_is_given_back() {
    let node = CloudNode::volcengine();
    node.world().ve.enis_per_instance = 4;
    let output = node.init("").exited(1);
    for words in ["LimitExceeded.EnisPerInstance", "7 of 7 ENIs", "3 attached", "cocoon-net teardown"] {
        assert!(output.stderr.contains(words), "{words}: {output}");
    }
    node.cocoon("teardown").succeeded();
    node.assert_no_enis();
}

#[test]
fn a_missing_interface_is_named_and_init_can_be_run_again() {
    let nics = ["eth1", "eth2", "eth3", "eth4", "eth6", "eth7"];
    let node = CloudNode::volcengine_with(Node::builder().uplink("eth0").nics(nics).build());
    let output = node.init_within("1").exited(1);
    assert!(output.stderr.contains("eth5 did not appear"), "{output}");
    assert_eq!(node.listed("eniIDs"), 7);
    node.ip(&["link add eth5 type veth peer name eth5peer"]);
    node.init("").succeeded();
    node.assert_seven_enis();
}

#[test]
fn a_failed_second_init_leaves_the_daemon_what_it_had() {
    let node = CloudNode::volcengine();
    node.init("").succeeded();
    let (ips, ids) = (node.state("ips"), node.state("eniIDs"));
    node.world().faults.reset();
    node.init("").succeeded();
    let calls = node.world().faults.calls.len();
    for number in 1..=calls {
        node.world().faults.at(number, How::Refused);
        node.init("").exited(1);
        assert_eq!((node.state("ips"), node.state("eniIDs")), (ips.clone(), ids.clone()), "call {number}");
    }
}

#[test]
fn another_subnet_is_refused_while_enis_of_the_first_are_there() {
    let node = CloudNode::volcengine();
    node.init("").succeeded();
    let output = node.cocoon("init --platform volcengine --node-name n1 --subnet 172.20.101.0/24").exited(1);
    assert!(output.stderr.contains("run `cocoon-net teardown` before"), "{output}");
    node.cocoon("teardown").succeeded();
    node.assert_no_enis();
}

#[test]
fn missing_credentials_are_named_before_any_call() {
    let node = CloudNode::volcengine();
    node.set_env("VOLCENGINE_ACCESS_KEY_ID", "");
    let output = node.init("").exited(1);
    let names =
        ["VOLCENGINE_ACCESS_KEY_ID", "VOLCENGINE_SECRET_ACCESS_KEY", "VOLCENGINE_REGION", ".volcengine/config.json"];
    for name in names {
        assert!(output.stderr.contains(name), "{name}: {output}");
    }
    assert_eq!(node.world().faults.calls.len(), 0);
    assert!(!node.exists(POOL));
}

#[test]
fn credentials_in_the_file_are_handed_to_ve() {
    let node = CloudNode::volcengine();
    for name in ["VOLCENGINE_ACCESS_KEY_ID", "VOLCENGINE_SECRET_ACCESS_KEY", "VOLCENGINE_REGION"] {
        node.set_env(name, "");
    }
    let file = format!("{}/.volcengine/config.json", node.environment()["HOME"]);
    node.write(file, r#"{"access_key_id":"AK","secret_access_key":"SK","region":"cn-beijing"}"#);
    node.init("").succeeded();
    node.assert_seven_enis();
}

#[test]
fn a_region_that_is_not_given_is_that_of_the_zone() {
    let node = CloudNode::volcengine();
    node.set_env("VOLCENGINE_REGION", "");
    node.init("").succeeded();
    node.assert_seven_enis();
}

#[test]
fn a_metadata_server_that_answers_a_web_page_or_nothing_ends_init() {
    for (server, words) in [(Server::PageForVolcengine, "a web page"), (Server::SilentForVolcengine, "did not answer")]
    {
        let node = CloudNode::bare(Node::builder().uplink("eth0").volcengine_nics().build(), "volcengine");
        node.set_env("VOLCENGINE_ACCESS_KEY_ID", "AK");
        node.set_env("VOLCENGINE_SECRET_ACCESS_KEY", "SK");
        node.serve_metadata(server);
        let output = node.init("").exited(1);
        assert!(output.stderr.contains(words), "{words}: {output}");
        assert_eq!(node.world().faults.calls.len(), 0);
    }
}

#[test]
fn a_bad_drop_makes_no_cloud_call_at_all() {
    let node = CloudNode::volcengine();
    let output = node.init("--drop-cidr 10.0.0.0/33").failed();
    assert!(output.stderr.contains("10.0.0.0/33"), "{output}");
    assert_eq!(node.world().faults.calls.len(), 0);
    assert!(!node.exists(POOL));
}

#[test]
fn a_missing_ve_is_named() {
    let node = CloudNode::volcengine();
    node.without_tool("ve");
    let output = node.init("").exited(1);
    assert!(output.stderr.contains("`ve` was not found"), "{output}");
}

#[test]
fn a_dry_run_names_the_calls_and_makes_none() {
    let node = CloudNode::volcengine();
    let output = node.init("--dry-run").succeeded();
    for (words, count) in [("CreateSubnet", 1), ("CreateNetworkInterface", 7), ("AttachNetworkInterface", 7)] {
        assert_eq!(output.stdout.matches(words).count(), count, "{words}: {output}");
    }
    assert_eq!(node.world().faults.changes(), Vec::<String>::new());
    assert!(!node.exists(POOL));

    node.init("").succeeded();
    let output = node.init("--dry-run").succeeded();
    assert!(!output.stdout.contains("ve vpc"), "{output}");
    node.world().faults.reset();
    let output = node.cocoon("teardown --dry-run").succeeded();
    assert_eq!(output.stdout.matches("ve vpc DetachNetworkInterface").count(), 7, "{output}");
    assert_eq!(output.stdout.matches("ve vpc DeleteNetworkInterface").count(), 7, "{output}");
    assert_eq!(node.world().faults.changes(), Vec::<String>::new());
    node.assert_seven_enis();
}

#[test]
fn status_shows_enis_and_subnet_and_does_without_them_when_the_cloud_is_away() {
    let node = CloudNode::volcengine();
    node.init("").succeeded();
    let subnet = node.world().ve.subnets.last().unwrap().id.clone();
    let output = node.cocoon("status").succeeded();
    assert!(output.stdout.contains(&format!("ENIs:       7\nSubnetID:   {subnet}\n")), "{output}");
    node.world().faults.on("ve", How::Crashes);
    let output = node.cocoon("status").succeeded();
    assert!(output.stdout.contains("IPs:        140") && !output.stdout.contains("ENIs:"), "{output}");
    assert!(output.stderr.contains("connection reset"), "{output}");
}

#[test]
fn two_inits_at_once_make_seven_enis() {
    let node = CloudNode::volcengine();
    node.world().slow = Duration::from_millis(20);
    let (one, two) = (node.spawn_init(), node.spawn_init());
    let outputs = [one, two].map(|init| init.wait(Duration::from_secs(30)));
    assert!(outputs.iter().any(|output| output.status.success()), "{} {}", outputs[0], outputs[1]);
    node.assert_seven_enis();
    node.cocoon("teardown").succeeded();
    node.assert_no_enis();
}

#[test]
fn init_over_a_working_node_keeps_its_leases() {
    let node = CloudNode::volcengine();
    node.init("").succeeded();
    let mut daemon = node.daemon("--metrics-addr=");
    let vm = node.vm_builder("a").unconfigured().build();
    let address = cloud::lease(&vm);
    node.init("").succeeded();
    node.world().faults.on("DescribeNetworkInterfaces", How::Refused);
    node.init("").exited(1);
    assert_eq!(cloud::lease(&vm), address);
    assert!(daemon.is_running());
    assert_eq!(node.listed("ips"), 140);
}
