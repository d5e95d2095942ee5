//! Volcengine, with every single cloud call going wrong in every way, at init and at teardown: the message says which
//! call it was, the next init makes no eighth ENI, and teardown leaves none.

#![allow(clippy::unwrap_used)]

mod cloud;
mod support;

use cloud::{CloudNode, How, POOL};
use support::Output;

/// How long a cloud call and a wait for the cloud may take where they hang, in seconds.
const BRIEFLY: &str = "0.8";

/// How many calls a whole `init`, and a whole `teardown`, make.
fn calls() -> (usize, usize) {
    let node = CloudNode::volcengine();
    node.init("").succeeded();
    let init = node.world().faults.calls.len();
    node.world().faults.reset();
    node.cocoon("teardown").succeeded();
    let teardown = node.world().faults.calls.len();
    (init, teardown)
}

/// A message is worth its name if it says which call, what became of it, and how to go on.
#[track_caller]
fn assert_told(output: &Output, call: &str, answer: &str, ways_on: &[&str]) {
    let call: String = call.chars().take(60).collect();
    for words in [call.as_str(), answer].iter().chain(ways_on) {
        assert!(output.stderr.contains(words), "`{words}` is missing from {output}");
    }
}

/// Lets each call of `init` go wrong in turn. Where `init` does fail, `then` sees to what it left; where what went
/// wrong was done all the same, `init` may carry on by itself.
fn at_each_call_of_init(how: How, answer: &str, then: impl Fn(&CloudNode)) {
    let (init, _) = calls();
    let node = CloudNode::volcengine();
    for number in 1..=init {
        node.world().faults.at(number, how);
        let output = node.init_within(BRIEFLY);
        let call = node.world().faults.calls[number - 1].clone();
        node.world().faults.reset();
        if how == How::Pretends && call.contains("Describe") {
            // An empty list is no pretence.
            node.world().ve = cloud::Ve::default();
            continue;
        }
        if output.status.success() {
            assert!(matches!(how, How::Junk | How::Hangs | How::Pretends), "call {number} is not looked at: {output}");
            node.assert_seven_enis();
        } else {
            assert_told(&output.exited(1), &call, answer, &["`cocoon-net init`", "`cocoon-net teardown`"]);
            then(&node);
        }
        node.teardown_within(BRIEFLY).succeeded();
        node.assert_no_enis();
        node.world().ve = cloud::Ve::default();
    }
}

fn at_each_call_of_teardown(how: How, answer: &str) {
    let (_, teardown) = calls();
    let node = CloudNode::volcengine();
    for number in 1..=teardown {
        node.init("").succeeded();
        node.world().faults.at(number, how);
        let output = node.teardown_within(BRIEFLY);
        let call = node.world().faults.calls[number - 1].clone();
        node.world().faults.reset();
        if output.status.success() {
            assert!(matches!(how, How::Junk | How::Hangs), "call {number} is not looked at: {output}");
        } else {
            assert_told(&output.exited(1), &call, answer, &["`cocoon-net teardown`"]);
            assert!(node.exists(POOL), "call {number}: the state must stay");
            node.cocoon("teardown").succeeded();
        }
        node.assert_no_enis();
    }
}

fn init_again(node: &CloudNode) {
    node.init_within(BRIEFLY).succeeded();
    node.assert_seven_enis();
}

#[test]
fn a_call_of_init_that_is_refused_is_carried_on_from() {
    at_each_call_of_init(How::Refused, "AccessDenied", init_again);
}

#[test]
fn a_call_of_init_that_is_refused_is_torn_down_from() {
    at_each_call_of_init(How::Refused, "AccessDenied", |_| {});
}

#[test]
fn a_call_of_init_that_crashes_is_carried_on_from() {
    at_each_call_of_init(How::Crashes, "connection reset", init_again);
}

#[test]
fn a_call_of_init_that_answers_junk_is_carried_on_from() {
    at_each_call_of_init(How::Junk, "Sign in", init_again);
}

#[test]
fn a_call_of_init_that_answers_junk_is_torn_down_from() {
    at_each_call_of_init(How::Junk, "Sign in", |_| {});
}

#[test]
fn a_call_of_init_that_hangs_is_carried_on_from() {
    at_each_call_of_init(How::Hangs, "did not finish within 0.8 s", init_again);
}

#[test]
fn a_call_of_init_that_only_pretends_is_noticed() {
    at_each_call_of_init(How::Pretends, "", init_again);
}

#[test]
fn a_call_of_teardown_that_is_refused_is_carried_on_from() {
    at_each_call_of_teardown(How::Refused, "AccessDenied");
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

/// Kills `init` right after each of its calls was done, on a cloud where new things are seen only after some looks.
fn kill_init_after_each_call(then: impl Fn(&CloudNode)) {
    let (init, _) = calls();
    let node = CloudNode::volcengine();
    for number in 1..=init {
        node.world().lag = 1;
        assert!(node.killed_at(number, "init"), "init makes more calls than {number}");
        node.world().faults.reset();
        node.world().lag = 0;
        then(&node);
        node.teardown_within(BRIEFLY).succeeded();
        node.assert_no_enis();
        node.world().ve = cloud::Ve::default();
    }
}

#[test]
fn an_init_that_is_killed_after_any_call_is_carried_on_from() {
    kill_init_after_each_call(init_again);
}

#[test]
fn an_init_that_is_killed_after_any_call_is_torn_down_from() {
    kill_init_after_each_call(|_| {});
}

#[test]
fn a_teardown_that_is_killed_after_any_call_is_carried_on_from() {
    let (_, teardown) = calls();
    let node = CloudNode::volcengine();
    for number in 1..=teardown {
        node.init("").succeeded();
        node.world().lag = 1;
        assert!(node.killed_at(number, "teardown"), "teardown makes more calls than {number}");
        node.world().faults.reset();
        node.world().lag = 0;
        node.cocoon("teardown").succeeded();
        node.assert_no_enis();
    }
}

#[test]
fn a_call_that_hangs_does_not_outlive_its_timeout() {
    let node = CloudNode::volcengine();
    node.world().faults.on("DescribeSubnets", How::Hangs);
    node.init_within(BRIEFLY).exited(1);
    for p in node.processes() {
        println!("{:?}", node.read(format!("/proc/{p}/cmdline")));
    }
    node.settle(&[]);
}
