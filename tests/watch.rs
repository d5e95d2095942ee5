//! The watch in a network namespace of its own: what others do to the host is noticed, and soon.

#![expect(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

mod support;

use std::process::Command;
use std::time::{Duration, Instant};

use cocoon_net::watch::{Options, Outcome, Reason, Ruleset, Watch};
use support::Host;

const SOON: Duration = Duration::from_millis(200);

/// Runs a test on a host of its own that has a bridge `cni0`.
fn in_namespace<F: Future<Output = ()>>(test: impl FnOnce() -> F + Send + 'static) {
    Host::new("node").enter(move || {
        sh("ip link set lo up; ip link add cni0 type bridge; ip link set cni0 up");
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(test());
    });
}

fn sh(script: &str) {
    let output = Command::new("sh").args(["-ec", script]).output().unwrap();
    assert!(output.status.success(), "{script}: {}", String::from_utf8_lossy(&output.stderr));
}

fn open(ruleset: Ruleset) -> Watch {
    let interval = Duration::from_secs(600);
    Watch::open(Options { bridge: "cni0".to_owned(), interval, files: Vec::new(), ruleset }).unwrap()
}

fn legacy() -> Ruleset {
    Ruleset::Legacy { save: vec!["iptables-legacy-save".to_owned()] }
}

/// Answers every wake with `outcome` until it has been quiet for `quiet`.
async fn settle(watch: &mut Watch, quiet: Duration) -> usize {
    let mut wakes = 0;
    while tokio::time::timeout(quiet, watch.next()).await.is_ok() {
        watch.passed(Outcome::Clean);
        wakes += 1;
        assert!(wakes < 100, "the watch does not come to rest");
    }
    wakes
}

/// Does something to the host and wants a wake for `reason` within `limit`.
async fn noticed(watch: &mut Watch, script: &str, reason: Reason, limit: Duration) {
    settle(watch, Duration::from_millis(500)).await;
    sh(script);
    let done = Instant::now();
    loop {
        let left = limit.saturating_sub(done.elapsed());
        let wake = tokio::time::timeout(left, watch.next()).await;
        let wake = wake.unwrap_or_else(|_| panic!("`{script}` was not noticed within {limit:?}"));
        watch.passed(Outcome::Clean);
        if wake.reasons.contains(&reason) {
            return;
        }
    }
}

#[test]
fn ports_and_addresses_of_the_bridge_are_noticed_at_once() {
    in_namespace(|| async {
        // The kernel tells of a flag of a port only while the port is up; a port that is down carries nothing.
        sh("ip link add v0 type veth peer name v1; ip link add br9 type bridge; ip link set v1 up; ip link set v0 up");
        let mut watch = open(Ruleset::Unwatched);
        for (script, reason) in [
            ("ip link set v0 master cni0", Reason::Links),
            ("ip link set v0 type bridge_slave isolated on", Reason::Links),
            ("echo 0 > /sys/class/net/v0/brport/isolated", Reason::Links),
            ("ip link set v0 master br9", Reason::Links),
            ("ip link set v0 master cni0", Reason::Links),
            ("ip link del v0", Reason::Links),
            ("ip addr add 172.20.100.1/24 dev cni0", Reason::Addresses),
            ("ip addr flush dev cni0", Reason::Addresses),
            ("ip route add local 172.20.100.0/24 dev lo table local", Reason::Routes),
            ("ip link del cni0; ip link add cni0 type bridge", Reason::Links),
            ("ip link set cni0 up", Reason::Links),
        ] {
            noticed(&mut watch, script, reason, SOON).await;
        }
    });
}

#[test]
fn other_peoples_links_and_tables_are_left_alone() {
    in_namespace(|| async {
        let mut watch = open(Ruleset::Nftables);
        settle(&mut watch, Duration::from_millis(500)).await;
        sh("ip link add br9 type bridge; ip link add v0 type veth peer name v1; ip link set v0 master br9; \
            ip addr add 10.9.9.1/24 dev br9; nft add table ip theirs; nft add table inet filter");
        assert_eq!(settle(&mut watch, Duration::from_millis(500)).await, 0);
    });
}

#[test]
fn nftables_changes_are_noticed_at_once() {
    in_namespace(|| async {
        sh("iptables-nft -A FORWARD -i cni0 -j DROP; ip6tables-nft -A FORWARD -i cni0 -j DROP");
        let mut watch = open(Ruleset::Nftables);
        for script in [
            "iptables-nft -I FORWARD -j ACCEPT",
            "iptables-nft -F FORWARD",
            "printf '*filter\n:FORWARD ACCEPT\nCOMMIT\n' | iptables-nft-restore",
            "ip6tables-nft -F FORWARD",
            "iptables-nft -t nat -A POSTROUTING -j MASQUERADE",
            "nft flush ruleset",
        ] {
            noticed(&mut watch, script, Reason::Rules, SOON).await;
        }
    });
}

#[test]
fn the_process_that_changed_the_ruleset_is_named() {
    in_namespace(|| async {
        sh("iptables-nft -A FORWARD -i cni0 -j DROP");
        let mut watch = open(Ruleset::Nftables);
        settle(&mut watch, Duration::from_millis(500)).await;
        sh("nft flush ruleset");
        let wake = watch.next().await;
        assert_eq!(wake.by.map(|(name, _)| name).as_deref(), Some("nft"));
    });
}

#[test]
fn legacy_changes_are_noticed_at_once_by_the_lock() {
    in_namespace(|| async {
        sh("iptables-legacy -A FORWARD -i cni0 -j DROP");
        let mut watch = open(legacy());
        for script in ["iptables-legacy -I FORWARD -j ACCEPT", "iptables-legacy -F FORWARD"] {
            noticed(&mut watch, script, Reason::Rules, SOON).await;
        }
    });
}

#[test]
fn legacy_changes_under_another_lock_are_noticed_within_two_seconds() {
    in_namespace(|| async {
        sh("iptables-legacy -A FORWARD -i cni0 -j DROP");
        let mut watch = open(legacy());
        let script = "XTABLES_LOCKFILE=/run/other.lock iptables-legacy -F FORWARD";
        noticed(&mut watch, script, Reason::Rules, Duration::from_secs(2)).await;
    });
}

#[test]
fn the_same_damage_is_noticed_again_after_each_repair() {
    in_namespace(|| async {
        let toggle = "/proc/sys/net/bridge/bridge-nf-call-iptables";
        std::fs::write(toggle, "1").unwrap();
        let mut watch = open(Ruleset::Unwatched);
        settle(&mut watch, Duration::from_millis(500)).await;
        for _ in 0..5 {
            std::fs::write(toggle, "0").unwrap();
            let until = Instant::now() + Duration::from_millis(500);
            while std::fs::read_to_string(toggle).unwrap().trim() == "0" {
                tokio::time::timeout_at(until.into(), watch.next()).await.expect("noticed");
                std::fs::write(toggle, "1").unwrap();
                watch.passed(Outcome::Repaired);
            }
        }
    });
}

#[test]
fn a_set_that_is_edited_flushed_or_replaced_is_noticed() {
    in_namespace(|| async {
        sh("ipset create ours hash:net counters; ipset add ours 10.0.0.0/8; ipset add ours 192.0.2.0/24");
        let mut watch = open(Ruleset::Unwatched);
        watch.watch_set(Some("ours"));
        for script in [
            "ipset add ours 198.51.100.0/24",
            "ipset del ours 10.0.0.0/8; ipset add ours 11.0.0.0/8",
            "ipset add ours 11.0.0.0/8 packets 7 -exist; ipset del ours 192.0.2.0/24",
            "ipset flush ours",
            "ipset destroy ours",
        ] {
            noticed(&mut watch, script, Reason::Set, Duration::from_millis(1200)).await;
        }
    });
}

#[test]
fn counters_of_a_set_are_no_change() {
    in_namespace(|| async {
        sh(
            "ipset create ours hash:net counters; for n in $(seq 200); do echo add ours 10.0.$n.0/24; done | ipset restore",
        );
        let mut watch = open(Ruleset::Unwatched);
        watch.watch_set(Some("ours"));
        settle(&mut watch, Duration::from_millis(500)).await;
        sh("ipset add ours 10.0.7.0/24 packets 7 bytes 420 -exist");
        assert_eq!(settle(&mut watch, Duration::from_millis(700)).await, 0);
    });
}

#[test]
fn lost_events_are_a_reason_to_look() {
    in_namespace(|| async {
        let mut watch = open(Ruleset::Nftables);
        settle(&mut watch, Duration::from_millis(500)).await;
        let rules = "for n in $(seq 20000); do echo -A FORWARD -s 10.$((n/256%256)).$((n%256)).0/24 -j ACCEPT; done";
        sh(&format!("(echo '*filter'; {rules}; echo COMMIT) | iptables-nft-restore"));
        let wake = tokio::time::timeout(SOON, watch.next()).await.expect("noticed");
        assert!(wake.reasons.contains(&Reason::Overrun), "{wake:?}");
        watch.passed(Outcome::Clean);
        assert!(settle(&mut watch, Duration::from_millis(500)).await < 5);
    });
}

#[test]
fn a_change_while_nobody_waits_is_not_lost() {
    in_namespace(|| async {
        let mut watch = open(Ruleset::Nftables);
        settle(&mut watch, Duration::from_millis(500)).await;
        // A caller that is interrupted again and again, as one in a `select!` is.
        sh("iptables-nft -A FORWARD -j ACCEPT");
        for _ in 0..20 {
            if let Ok(wake) = tokio::time::timeout(Duration::from_millis(1), watch.next()).await {
                assert!(wake.reasons.contains(&Reason::Rules), "{wake:?}");
                return;
            }
        }
        panic!("the change was lost");
    });
}
