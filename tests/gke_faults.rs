//! GKE, with every single cloud call going wrong in every way, at init and at teardown: the message says which call it
//! was, the next init finishes, and teardown leaves the aliases of others alone.

#![allow(clippy::unwrap_used)]

mod cloud;
mod support;

use cloud::{CloudNode, How, OTHERS, POOL, with_ours, without_ours};
use support::Output;

/// How long a cloud call and a wait for the cloud may take where they hang, in seconds.
const BRIEFLY: &str = "0.8";

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
    let node = CloudNode::gke_with_range();
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
fn an_init_for_another_subnet_that_is_killed_after_any_call_is_torn_down_from() {
    for number in 1.. {
        let node = CloudNode::gke_with_range();
        node.init("").succeeded();
        node.world().lag = 1;
        if !node.killed_at(number, "init --platform gke --node-name n1 --subnet 172.20.101.0/24") {
            assert!(number > 3, "init makes at least one change and two looks");
            break;
        }
        node.world().faults.reset();
        node.cocoon("teardown").succeeded();
        assert_eq!(node.world().gcloud.aliases(), without_ours(), "call {number}");
    }
}

#[test]
fn a_teardown_that_is_killed_after_any_call_is_carried_on_from() {
    for number in 1..=3 {
        let node = CloudNode::gke_with_range();
        node.init("").succeeded();
        assert!(node.killed_at(number, "teardown"));
        node.world().faults.reset();
        node.cocoon("teardown").succeeded();
        assert_eq!(node.world().gcloud.aliases(), without_ours());
    }
}

#[test]
fn an_update_that_only_pretends_is_noticed_and_the_next_init_finishes() {
    let node = CloudNode::gke_with_range();
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
