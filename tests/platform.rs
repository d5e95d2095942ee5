//! Which cloud this is: the one whose metadata server answers, and answers like one.

#![allow(clippy::unwrap_used)]

mod cloud;
mod support;

use cloud::{CloudNode, POOL, Server};
use support::Node;

const NO_PLATFORM: &str = "init --node-name n1 --subnet 172.20.100.0/24";

#[test]
fn the_platform_is_told_from_the_metadata_server_that_answers() {
    let node = CloudNode::gke_with_range();
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
