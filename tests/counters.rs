//! What was dropped is counted per target, whatever becomes of the rules; and targets never open while they change.

#![expect(clippy::expect_used, reason = "a test fails by panicking")]

mod support;

use std::io::{Read, Write};
use std::net::{TcpStream, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use support::{Backend, INSIDE_TEN, INTERNET, Node, Vm, eventually};

const PROMISE: Duration = Duration::from_secs(2);

/// `cocoon_net_drop_packets_total` of a target.
fn dropped(node: &Node, cidr: &str) -> u64 {
    let text = node.enter(|| {
        let mut stream = TcpStream::connect("127.0.0.1:9092").expect("the daemon serves metrics");
        stream.write_all(b"GET /metrics HTTP/1.0\r\nHost: node\r\n\r\n").expect("a request");
        let mut answer = String::new();
        let _ = stream.read_to_string(&mut answer);
        answer
    });
    let sample = format!("cocoon_net_drop_packets_total{{cidr=\"{cidr}\"}} ");
    text.lines().find_map(|line| line.strip_prefix(&sample)).and_then(|value| value.parse().ok()).unwrap_or(0)
}

/// Packets that a VM sends in vain.
fn knock(vm: &Vm, packets: u64) {
    let socket = vm.enter(|| UdpSocket::bind(("0.0.0.0", 0)).expect("a socket"));
    for _ in 0..packets {
        socket.send_to(b"knock", (INSIDE_TEN, 9)).expect("a route");
    }
}

fn flags(targets: usize) -> String {
    let more: Vec<String> = (1..targets).map(|n| format!("--drop-cidr 198.18.{n}.0/24")).collect();
    format!("--drop-cidr 10.0.0.0/8 {}", more.join(" "))
}

/// The daemon reads the counters with each pass; one is asked for.
#[track_caller]
fn comes_to_count(node: &Node, daemon: &mut support::Process, packets: u64) {
    daemon.signal(nix::sys::signal::Signal::SIGHUP);
    let counted = eventually(PROMISE, || dropped(node, "10.0.0.0/8") == packets);
    assert!(counted, "{} instead of {packets}", dropped(node, "10.0.0.0/8"));
}

fn counters_survive(backend: Backend, targets: usize) {
    let node = Node::builder().backend(backend).build();
    node.adopt(flags(targets)).succeeded();
    let vm = node.vm("a");
    assert!(vm.reaches(INTERNET));
    let mut daemon = node.daemon("");
    knock(&vm, 7);
    comes_to_count(&node, &mut daemon, 7);

    // The rules are rewritten: a foreign rule above them makes the daemon take them to the head again.
    node.ok("iptables -I FORWARD -j ACCEPT");
    assert!(eventually(PROMISE, || node.rules("filter", "FORWARD")[0].contains("cocoon-net-drop")));
    knock(&vm, 5);
    comes_to_count(&node, &mut daemon, 12);

    // The daemon is started again.
    daemon.stop();
    knock(&vm, 3);
    let mut daemon = node.daemon("");
    comes_to_count(&node, &mut daemon, 15);

    // The rules are lost with their counters, and put back.
    node.ok("iptables -F FORWARD");
    assert!(eventually(PROMISE, || node
        .rules("filter", "FORWARD")
        .iter()
        .any(|rule| rule.contains("cocoon-net-drop"))));
    daemon.stop();
    let mut daemon = node.daemon("");
    comes_to_count(&node, &mut daemon, 15);

    // A target more, and over or under the number from which on there is a set.
    node.adopt(flags(if targets < 16 { 30 } else { 3 })).succeeded();
    knock(&vm, 2);
    comes_to_count(&node, &mut daemon, 17);
    daemon.stop();
    let mut daemon = node.daemon("");
    comes_to_count(&node, &mut daemon, 17);
    assert!(vm.is_cut_off_from(INSIDE_TEN));
}

#[test]
fn packet_counts_survive_rewrites_and_restarts_on_nft() {
    counters_survive(Backend::Nft, 2);
}

#[test]
fn packet_counts_survive_rewrites_and_restarts_on_legacy() {
    counters_survive(Backend::Legacy, 2);
}

#[test]
fn packet_counts_of_a_set_survive_rewrites_and_restarts_on_nft() {
    counters_survive(Backend::Nft, 20);
}

#[test]
fn packet_counts_of_a_set_survive_rewrites_and_restarts_on_legacy() {
    counters_survive(Backend::Legacy, 20);
}

fn nothing_gets_through_while_targets_change(backend: Backend) {
    let node = Node::builder().backend(backend).build();
    node.adopt(flags(2)).succeeded();
    let vm = node.vm("a");
    assert!(vm.reaches(INTERNET) && vm.is_cut_off_from(INSIDE_TEN));
    let victim = node.internet().enter(|| UdpSocket::bind((INSIDE_TEN, 9)).expect("the port is free"));
    let bystander = node.internet().enter(|| UdpSocket::bind((INTERNET, 9)).expect("the port is free"));
    for socket in [&victim, &bystander] {
        socket.set_nonblocking(true).expect("a socket");
    }
    let socket = vm.enter(|| UdpSocket::bind(("0.0.0.0", 0)).expect("a socket"));
    let stop = Arc::new(AtomicBool::new(false));
    let stopped = Arc::clone(&stop);
    let sender = std::thread::spawn(move || {
        while !stopped.load(Ordering::Relaxed) {
            let _ = socket.send_to(b"in vain", (INSIDE_TEN, 9));
            let _ = socket.send_to(b"control", (INTERNET, 9));
            std::thread::sleep(Duration::from_micros(200));
        }
    });
    let _daemon = node.daemon("");
    for targets in [16, 17, 16, 100, 17, 2, 30, 31, 1] {
        node.adopt(flags(targets)).succeeded();
        let set = node.run("ipset list -n").stdout.contains("cocoon-net-drop");
        assert_eq!(set, targets > 16, "{targets} targets");
    }
    stop.store(true, Ordering::Relaxed);
    sender.join().expect("the sender lives");
    let count = |socket: &UdpSocket| std::iter::from_fn(|| socket.recv(&mut [0; 16]).ok()).count();
    assert!(count(&bystander) > 10, "the VM sends, and the node forwards");
    assert_eq!(count(&victim), 0, "packets got through");
}

#[test]
fn nothing_gets_through_while_targets_come_and_go_on_nft() {
    nothing_gets_through_while_targets_change(Backend::Nft);
}

#[test]
fn nothing_gets_through_while_targets_come_and_go_on_legacy() {
    nothing_gets_through_while_targets_change(Backend::Legacy);
}

#[test]
fn a_scrape_sees_what_was_dropped_a_moment_ago() {
    let node = Node::new();
    node.adopt(flags(2)).succeeded();
    let vm = node.vm("a");
    assert!(vm.reaches(INTERNET));
    let _daemon = node.daemon("--reconcile-interval 1h");
    std::thread::sleep(Duration::from_secs(6));
    for round in 1..=3 {
        knock(&vm, 4);
        assert!(eventually(PROMISE, || dropped(&node, "10.0.0.0/8") == round * 4), "{}", dropped(&node, "10.0.0.0/8"));
    }
}
