//! What it costs to keep a node true while someone keeps undoing it, and how well it is kept: `make bench-drift`.
//!
//! Each offence is done in a loop for a minute. A VM sends to a dropped range all the while; what arrives there leaked. The
//! daemon is meant to stay under 10 % of a core, its tools included, and isolation to hold 95 % of the time. At rest it is
//! meant to cost less than 0.5 %. `BENCH_SECONDS` (60) and `BENCH_ONLY` (part of `nft flush 0.2`, say) can be set.

#![expect(clippy::expect_used, reason = "it fails by panicking")]

#[path = "../tests/support/mod.rs"]
mod support;

use std::net::UdpSocket;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{sleep, spawn};
use std::time::{Duration, Instant};

use support::{Backend, INSIDE_TEN, INTERNET, Node, Process};

const PORT: u16 = 9;
const PACKET: Duration = Duration::from_millis(1);

const OFFENCES: [(&str, &str); 7] = [
    ("flush", "iptables -F FORWARD"),
    ("ACCEPT at the head", "iptables -I FORWARD -j ACCEPT"),
    ("whole-table restore", "printf '*filter\n:FORWARD ACCEPT\nCOMMIT\n' | iptables-restore"),
    ("bridge toggle to 0", "sysctl -qw net.bridge.bridge-nf-call-iptables=0"),
    ("port away and back", "ip link set veth-a nomaster; ip link set veth-a master cni0"),
    ("bridge made again", "ip link del cni0; ip link add cni0 type bridge; ip link set veth-a master cni0"),
    (NFT_ONLY, "nft flush ruleset"),
];

/// Legacy rules are no part of the ruleset that nft knows.
const NFT_ONLY: &str = "nft flush ruleset";

/// Pauses between two offences, in seconds.
const PAUSES: [&str; 3] = ["1", "0.2", "0"];

fn main() {
    let seconds = std::env::var("BENCH_SECONDS").ok().and_then(|text| text.parse().ok()).unwrap_or(60);
    let time = Duration::from_secs(seconds);
    let only = std::env::var("BENCH_ONLY").unwrap_or_default();
    println!("  {:8}{:24}{:>8}{:>12}{:>12}{:>14}", "backend", "what", "pause", "CPU", "held", "log lines/s");
    for (name, backend) in [("nft", Backend::Nft), ("legacy", Backend::Legacy)] {
        if format!("{name} nothing").contains(&only) {
            let (cpu, held, _) = measure(backend, None, time);
            println!("  {name:8}{:24}{:>8}{:>10.2} %{:>10.1} %", "nothing", "", cpu * 100.0, held * 100.0);
        }
        for (what, offence) in OFFENCES.into_iter().filter(|(what, _)| name == "nft" || *what != NFT_ONLY) {
            for pause in PAUSES.into_iter().filter(|pause| format!("{name} {what} {pause}").contains(&only)) {
                let looped = format!("while :; do {offence}; sleep {pause}; done");
                let (cpu, held, lines) = measure(backend, Some(&looped), time);
                println!("  {name:8}{what:24}{pause:>6} s{:>10.2} %{:>10.1} %{lines:>14.1}", cpu * 100.0, held * 100.0);
            }
        }
    }
}

/// CPU share of the daemon, share of packets that did not leak, lines that it logged per second.
fn measure(backend: Backend, offence: Option<&str>, time: Duration) -> (f64, f64, f64) {
    let node = Node::builder().backend(backend).build();
    node.adopt("--drop-internal-access --drop-cidr 10.0.0.0/8").succeeded();
    let vm = node.vm("a");
    assert!(vm.reaches(INTERNET) && vm.is_cut_off_from(INSIDE_TEN), "the node is isolated");
    let daemon = node.daemon("");
    sleep(Duration::from_secs(6));

    let victim = node.internet().enter(|| UdpSocket::bind((INSIDE_TEN, PORT)).expect("the port is free"));
    victim.set_nonblocking(true).expect("a socket");
    let socket = vm.enter(|| UdpSocket::bind(("0.0.0.0", 0)).expect("a socket"));
    let stop = Arc::new(AtomicBool::new(false));
    let stopped = Arc::clone(&stop);
    let sender = spawn(move || {
        let mut sent = 0_u32;
        while !stopped.load(Ordering::Relaxed) {
            // Where the route is gone for a moment, nothing leaks either.
            let _ = socket.send_to(&[0; 18], (INSIDE_TEN, PORT));
            sent += 1;
            sleep(PACKET);
        }
        sent
    });

    let offender = offence.map(|script| node.spawn(["sh", "-c", script]));
    let (cpu, begin) = (cpu_ticks(&daemon), Instant::now());
    let mut leaked = 0_u32;
    while begin.elapsed() < time {
        sleep(Duration::from_millis(20));
        while victim.recv(&mut [0; 64]).is_ok() {
            leaked += 1;
        }
    }
    let used = (cpu_ticks(&daemon) - cpu) / 100.0 / begin.elapsed().as_secs_f64();
    drop(offender);
    stop.store(true, Ordering::Relaxed);
    let sent = sender.join().expect("the sender lives");
    let lines = daemon.stderr().matches("WARN").count();
    (used, 1.0 - f64::from(leaked) / f64::from(sent), f64::from(u32::try_from(lines).unwrap_or(0)) / time.as_secs_f64())
}

/// CPU time of the daemon and the tools it has waited for, in hundredths of a second (proc(5), fields 14 to 17).
fn cpu_ticks(daemon: &Process) -> f64 {
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", daemon.pid())).expect("the daemon lives");
    let fields = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
    fields.split_whitespace().skip(11).take(4).filter_map(|field| field.parse::<f64>().ok()).sum()
}
