//! What 1000 `--drop-cidr` cost, against a bare `iptables-restore` of as many rules in the same minute: `make bench-drops`.
//!
//! Numbers to look at, not a test: a fresh run is meant to stay below 6 times the bare restore, a second run below 3 times,
//! with at most 16 processes started.

#[path = "../tests/support/mod.rs"]
mod support;

use std::time::{Duration, Instant};

use support::{Backend, Node};

const RULES: usize = 1000;
const ROUNDS: usize = 15;

fn main() {
    println!("{RULES} drops, median of {ROUNDS} rounds of bare restore, first run and second run in turn:");
    for (name, backend) in [("nft", Backend::Nft), ("legacy", Backend::Legacy)] {
        let (mut bare, mut first, mut second) = (Vec::new(), Vec::new(), Vec::new());
        for _ in 0..ROUNDS {
            bare.push(bare_restore(backend));
            let node = node(backend);
            first.push(timed(|| drop(node.adopt(drops()).succeeded())));
            second.push(timed(|| drop(node.adopt(drops()).succeeded())));
        }
        let (bare, first, second) = (middle(bare), middle(first), middle(second));
        let [of_first, of_second] = processes(&node(backend));
        println!("  {name:6}  bare restore {bare:>8.1?}");
        println!("  {name:6}  first run    {first:>8.1?}  {:.2} times, {of_first} processes", ratio(first, bare));
        println!("  {name:6}  second run   {second:>8.1?}  {:.2} times, {of_second} processes", ratio(second, bare));
    }
}

/// How many processes a first run and a second run start.
fn processes(node: &Node) -> [usize; 2] {
    let usual = "adopt --platform none --node-name n1 --subnet 172.20.100.0/24 --manage-iptables";
    let args: Vec<String> = usual.split(' ').map(str::to_owned).chain(drops()).collect();
    [(); 2].map(|()| node.execs(&args).1.len())
}

fn node(backend: Backend) -> Node {
    Node::builder().backend(backend).build()
}

fn cidrs() -> impl Iterator<Item = String> {
    (0..RULES).map(|n| format!("198.{}.{}.0/24", 18 + n / 250, n % 250))
}

fn drops() -> Vec<String> {
    cidrs().map(|cidr| format!("--drop-cidr={cidr}")).collect()
}

fn bare_restore(backend: Backend) -> Duration {
    let node = node(backend);
    let mut lines = "*filter\n".to_owned();
    for cidr in cidrs() {
        lines += &format!("-A FORWARD -d {cidr} -i cni0 -m comment --comment cocoon-net-drop -j DROP\n");
    }
    lines += "COMMIT\n";
    timed(|| drop(node.command("iptables-restore --noflush --wait").stdin(lines).run().succeeded()))
}

fn timed(work: impl FnOnce()) -> Duration {
    let begin = Instant::now();
    work();
    begin.elapsed()
}

fn middle(mut times: Vec<Duration>) -> Duration {
    times.sort();
    times[times.len() / 2]
}

fn ratio(time: Duration, bare: Duration) -> f64 {
    time.as_secs_f64() / bare.as_secs_f64()
}
