//! Packets per second through the node with more and more drop targets, both directions: `make bench-isolation`.
//!
//! Beyond 16 targets the program uses one rule over an ipset; the same targets as plain rules stand beside it. Numbers to
//! look at, not a test: with 1000 targets both directions are meant to stay within 15 % of none.

#![expect(clippy::expect_used, reason = "it fails by panicking")]

#[path = "../tests/support/mod.rs"]
mod support;

use std::net::UdpSocket;
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use support::{Backend, Host, INTERNET, Node};

const TARGETS: [usize; 6] = [0, 10, 16, 17, 100, 1000];
/// From this many targets on there is a set, and something to compare it with.
const SET_FROM: usize = 17;
/// Many short rounds, the best of which was not disturbed by whatever else runs on the machine.
const ROUNDS: usize = 30;
const ROUND: Duration = Duration::from_millis(60);
/// UDP "discard".
const PORT: u16 = 9;

fn main() {
    println!("Packets per second through the node, best of {ROUNDS} rounds of {} ms:", ROUND.as_millis());
    println!("  {:8}{:>8}  {:22}{:>12}{:>8}{:>12}{:>8}", "backend", "targets", "rules", "from VM", "", "to VM", "");
    for (name, backend) in [("nft", Backend::Nft), ("legacy", Backend::Legacy)] {
        // Everything is compared with this one, so it is measured twice.
        let (first, second) = (measure(backend, 0, true), measure(backend, 0, true));
        let base = (first.0.max(second.0), first.1.max(second.1));
        for targets in TARGETS {
            let set = if targets == 0 { base } else { measure(backend, targets, true) };
            print(name, targets, if targets < SET_FROM { "plain" } else { "one over a set" }, set, base);
            if targets >= SET_FROM {
                print(name, targets, "plain, for comparison", measure(backend, targets, false), base);
            }
        }
    }
}

/// Packets per second from a VM, and to it.
type Rates = (f64, f64);

fn print(backend: &str, targets: usize, rules: &str, (out, back): Rates, (out_base, back_base): Rates) {
    let change = |rate: f64, base: f64| format!("{:+.0} %", (rate / base - 1.0) * 100.0);
    println!(
        "  {backend:8}{targets:>8}  {rules:22}{out:>12.0}{:>8}{back:>12.0}{:>8}",
        change(out, out_base),
        change(back, back_base)
    );
}

fn measure(backend: Backend, targets: usize, ipset: bool) -> Rates {
    let node = Node::builder().backend(backend).build();
    if !ipset {
        node.without_tool("ipset");
    }
    let flags: Vec<String> =
        (0..targets).map(|n| format!("--drop-cidr=198.{}.{}.0/24", 18 + n / 250, n % 250)).collect();
    node.adopt(flags).succeeded();
    let vm = node.vm("a");
    assert!(vm.reaches(INTERNET), "the node forwards");
    let (mut out, mut back) = (0.0_f64, 0.0_f64);
    for _ in 0..ROUNDS {
        out = out.max(rate(&vm, node.internet(), "node0", INTERNET));
        back = back.max(rate(node.internet(), &vm, "eth0", vm.address()));
    }
    (out, back)
}

/// Packets per second that arrive at an interface of `to` while `from` sends as fast as it can.
fn rate(from: &Host, to: &Host, interface: &str, address: &str) -> f64 {
    // Somebody has the port, or every packet would be answered by ICMP.
    let _discards = to.enter(|| UdpSocket::bind(("0.0.0.0", PORT)).expect("the port is free"));
    let received = || to.read(format!("/sys/class/net/{interface}/statistics/rx_packets"));
    let count = || received().trim().parse::<f64>().expect("a number");
    let address = address.to_owned();
    let socket = from.enter(|| UdpSocket::bind(("0.0.0.0", 0)).expect("a socket"));
    socket.connect((address.as_str(), PORT)).expect("a route");

    let (done, finished) = channel();
    let before = count();
    let sender = std::thread::spawn(move || {
        let begin = Instant::now();
        while begin.elapsed() < ROUND {
            for _ in 0..256 {
                // A full queue loses the packet, as on a wire.
                let _ = socket.send(&[0; 18]);
            }
        }
        let _ = done.send(begin.elapsed());
    });
    let elapsed = finished.recv().expect("the sender lives");
    sender.join().expect("the sender lives");
    (count() - before) / elapsed.as_secs_f64()
}
