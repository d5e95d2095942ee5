//! Crashes, full disks, damaged files, a bridge that goes away: what was acknowledged stays.

#![allow(clippy::panic, clippy::unwrap_used)]

mod dhcp_raw;
mod support;

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::time::Duration;

use dhcp_raw::*;
use dhcproto::v4::MessageType;
use support::{Node, Process};

fn node(pool: u8, flags: &str) -> (Node, Process) {
    let node = Node::new();
    node.adopt(format!("--pool-size {pool}")).succeeded();
    let daemon = node.daemon(flags);
    (node, daemon)
}

#[test]
fn two_hundred_and_fifty_three_vms_that_start_together_all_get_an_address_at_the_first_try() {
    let (node, _daemon) = node(253, "--port-lease-limit 0");
    let vm = node.vm_builder("a").unconfigured().build();
    let raw = Raw::on(&vm);
    let acknowledged = raw.storm(1..=253, Duration::from_secs(20));
    assert_eq!(acknowledged.len(), 253);
    let addresses: std::collections::BTreeSet<_> = acknowledged.values().collect();
    assert_eq!(addresses.len(), 253, "each has its own");
    assert_eq!(routes(&node).len(), 253);
    assert_eq!(metric(&node, "cocoon_net_dhcp_lease_active"), 253);
    assert_eq!(metric(&node, "cocoon_net_dhcp_pool_available"), 0);
}

#[test]
fn every_acknowledged_address_is_still_its_owners_after_a_kill_under_load() {
    let (node, mut daemon) = node(253, "--port-lease-limit 0");
    let vm = node.vm_builder("a").unconfigured().build();
    let raw = Raw::on(&vm);
    let mut acknowledged = BTreeMap::new();
    // A machine that is busy may need longer until the storm is under way.
    for delay in [20, 60, 200, 600, 2000] {
        let killed = std::thread::spawn(move || daemon.kill_after(Duration::from_millis(delay)));
        acknowledged.extend(raw.storm(1..=200, Duration::from_millis(delay) + SILENCE));
        killed.join().unwrap();
        if !acknowledged.is_empty() {
            break;
        }
        daemon = node.daemon("--port-lease-limit 0");
    }
    assert!(!acknowledged.is_empty(), "nothing was acknowledged before the kill");

    let _daemon = node.daemon("--port-lease-limit 0");
    let routed = routes(&node);
    for (client, leased) in &acknowledged {
        assert!(routed.contains(leased), "{leased} has no route");
        let answer = raw.ask(&reboot(station(*client), *leased), PATIENCE).unwrap();
        assert_eq!((answer.kind(), answer.message.yiaddr()), (MessageType::Ack, *leased));
    }
    // Newcomers get none of them.
    let new = raw.storm(1001..=1020, Duration::from_secs(10));
    assert_eq!(new.len(), 20);
    assert!(new.values().all(|ip| !acknowledged.values().any(|held| held == ip)));
}

#[test]
fn a_full_disk_grants_nothing_new_and_renews_what_is_there() {
    let node = Node::new();
    node.mkdir("/var/lib/cocoon/net");
    node.ok("mount -t tmpfs -o size=256k,mode=750 tmpfs /var/lib/cocoon/net");
    node.adopt("--pool-size 200").succeeded();
    let mut daemon = node.daemon("--port-lease-limit 0");
    let vm = node.vm_builder("a").unconfigured().build();
    let raw = Raw::on(&vm);
    let leased = raw.lease_for(raw.mac).unwrap();
    node.run("dd if=/dev/zero of=/var/lib/cocoon/net/filler bs=1k");
    // The journal's last page still has room for a few leases.
    let refused = (1..=100).find_map(|n| {
        let offered = raw.offer_for(station(n), PATIENCE).unwrap();
        raw.ask(&select(station(n), offered), SILENCE).is_none().then_some(offered)
    });
    let refused = refused.expect("a hundred leases were acknowledged on a full disk");
    assert!(!routes(&node).contains(&refused), "a lease that was not granted has a route");
    let answer = raw.ask(&renew(raw.mac, leased), PATIENCE).unwrap();
    assert_eq!((answer.kind(), answer.message.yiaddr()), (MessageType::Ack, leased));
    assert!(daemon.wait_until(PATIENCE, |daemon| daemon.stderr().contains("leases cannot be written")));

    node.remove("/var/lib/cocoon/net/filler");
    assert!(raw.lease_for(station(300)).is_some(), "there is room again");
    let held = routes(&node);
    daemon.kill_after(Duration::ZERO);
    let _daemon = node.daemon("--port-lease-limit 0");
    assert_eq!(routes(&node), held, "what was acknowledged is what is there after a crash");
}

#[test]
fn damaged_lease_files_cost_nobody_an_address_that_is_in_use() {
    for contents in ["", "[{\"mac\": \"02:00", "{\"leases\": 7}"] {
        let (node, daemon) = node(6, "");
        let (a, b) = (node.vm_builder("a").unconfigured().build(), node.vm_builder("b").unconfigured().build());
        let (a, b) = (Raw::on(&a), Raw::on(&b));
        let leased = a.lease_for(a.mac).unwrap();
        daemon.stop();
        node.write(LEASES, contents);
        let _daemon = node.daemon("");
        assert!(node.ok("ls /var/lib/cocoon/net").contains("leases.json.corrupt-"), "{contents:?}");
        assert_eq!(routes(&node), [leased], "the route is what tells that it is in use");
        // Five addresses are left, all in doubt, and none of them is the one that is held.
        let other = b.offer_for(b.mac, PATIENCE).unwrap();
        assert_ne!(other, leased);
        // Its owner asks for it by name and gets it.
        let answer = a.ask(&renew(a.mac, leased), PATIENCE).unwrap();
        assert_eq!((answer.kind(), answer.message.yiaddr()), (MessageType::Ack, leased));
    }
}

#[test]
fn a_lease_file_of_the_go_program_is_taken_over() {
    let node = Node::new();
    node.adopt("--pool-size 8").succeeded();
    let entry =
        |mac: &str, ip: &str, expiry: &str| format!(r#"{{"mac": "{mac}", "ip": "{ip}", "expiry": "{expiry}"}}"#);
    let shanghai = jiff::Zoned::now().with_time_zone(jiff::tz::TimeZone::fixed(jiff::tz::offset(8)));
    let live = (shanghai.clone() + jiff::SignedDuration::from_hours(3)).strftime("%Y-%m-%dT%H:%M:%S%:z").to_string();
    let dead = (shanghai - jiff::SignedDuration::from_hours(3)).strftime("%Y-%m-%dT%H:%M:%S%:z").to_string();
    let leases = [entry("02:00:00:00:00:0b", "172.20.100.5", &live), entry("02:00:00:00:00:0c", "172.20.100.6", &dead)];
    node.write(LEASES, format!("[{}]", leases.join(",")));
    // A route of a lease that ran out while nobody watched, and one that somebody else made.
    node.ip(&["route add 172.20.100.6 dev cni0 scope global", "route add 172.20.100.77 dev cni0"]);
    let daemon = node.daemon("");
    assert_eq!(routes(&node), [ip(5), ip(77)], "missing ones in, strays out, others' left alone");
    let (a, b) = (node.vm_builder("a").unconfigured().build(), node.vm_builder("b").unconfigured().build());
    let (a, b) = (Raw::on(&a), Raw::on(&b));
    assert_eq!(a.lease_for(a.mac), Some(ip(5)));
    assert_eq!(b.lease_for(b.mac), Some(ip(6)), "known, and free");
    daemon.stop();
    let leases = node.read_json(LEASES);
    let ips: Vec<&str> = leases.as_array().unwrap().iter().map(|lease| lease["ip"].as_str().unwrap()).collect();
    assert_eq!(ips, ["172.20.100.5", "172.20.100.6"]);
    assert!(!node.exists("/var/lib/cocoon/net/leases.journal"));
}

#[test]
fn a_bridge_that_is_deleted_and_made_again_is_served_again() {
    let (node, _daemon) = node(8, "");
    let vm = node.vm_builder("a").unconfigured().build();
    let raw = Raw::on(&vm);
    let leased = raw.lease_for(raw.mac).unwrap();
    node.ip(&["link delete cni0"]);
    // The daemon makes it again; the port has to be plugged in anew, as a CNI plugin would.
    eventually("the bridge is back", || node.run("ip link show cni0 up").code() == 0);
    node.ip(&[&format!("link set {} master cni0 up", vm.port())]);
    eventually("its route is back", || routes(&node) == [leased]);
    eventually("the lease is renewed", || raw.ask(&renew(raw.mac, leased), SILENCE).is_some());
}

#[test]
fn a_pool_that_shrinks_under_a_running_daemon_moves_its_vms() {
    let (node, _daemon) = node(8, "");
    let vm = node.vm_builder("a").unconfigured().build();
    let raw = Raw::on(&vm);
    let old = raw.lease_for(raw.mac).unwrap();
    let mut pool = node.read_json("/var/lib/cocoon/net/pool.json");
    pool["ips"] = serde_json::json!(["172.20.100.40", "172.20.100.41"]);
    node.write("/var/lib/cocoon/net/pool.json", serde_json::to_string_pretty(&pool).unwrap());
    eventually("the renewal is refused", || {
        raw.ask(&renew(raw.mac, old), SILENCE).is_some_and(|answer| answer.kind() == MessageType::Nak)
    });
    assert_eq!(raw.lease_for(raw.mac), Some(ip(40)));
    assert_eq!(routes(&node), [ip(40)]);
}

#[test]
fn an_address_in_doubt_is_probed_and_left_alone_while_someone_uses_it() {
    let node = Node::new();
    node.adopt("--pool-size 1").succeeded();
    let squatter = node.vm_builder("a").address("172.20.100.2/24").build();
    // A route without a lease is a reason for doubt.
    node.ip(&["route add 172.20.100.2 dev cni0 scope global"]);
    let _daemon = node.daemon("");
    let vm = node.vm_builder("b").unconfigured().build();
    let raw = Raw::on(&vm);
    assert_eq!(raw.offer_for(raw.mac, Duration::from_secs(2)), None);
    // The one who uses it may have it.
    let squatter = Raw::on(&squatter);
    eventually("ten minutes of rest are counted", || {
        squatter.offer_for(squatter.mac, SILENCE);
        metric(&node, "cocoon_net_dhcp_dropped_total{reason=\"pool_empty\"}") > 0
    });
}

#[test]
fn a_lease_that_runs_out_takes_its_route_along() {
    let (node, _daemon) = node(2, "--lease-time 2s");
    let (a, b) = (node.vm_builder("a").unconfigured().build(), node.vm_builder("b").unconfigured().build());
    let (a, b) = (Raw::on(&a), Raw::on(&b));
    let leased = a.lease_for(a.mac).unwrap();
    assert_eq!(routes(&node), [leased]);
    eventually("the route goes", || routes(&node).is_empty());
    assert_eq!(metric(&node, "cocoon_net_dhcp_lease_active"), 0);
    assert_ne!(b.lease_for(b.mac).unwrap(), leased, "the other one has rested longer");
    assert_eq!(a.lease_for(a.mac), Some(leased), "a known client gets its address back");
}

#[test]
fn what_happened_on_a_full_disk_is_written_down_once_there_is_room() {
    let node = Node::new();
    node.mkdir("/var/lib/cocoon/net");
    node.ok("mount -t tmpfs -o size=256k,mode=750 tmpfs /var/lib/cocoon/net");
    node.adopt("--pool-size 200").succeeded();
    let daemon = node.daemon("--port-lease-limit 0 --lease-time 60s");
    let vm = node.vm_builder("a").unconfigured().build();
    let raw = Raw::on(&vm);
    let (kept, given_back) = (raw.lease_for(raw.mac).unwrap(), raw.lease_for(station(1)).unwrap());
    std::thread::sleep(Duration::from_secs(2));
    let expiry = |ip: Ipv4Addr| {
        let leases = node.read_json(LEASES);
        let lease = leases.as_array().unwrap().iter().find(|lease| lease["ip"] == ip.to_string()).cloned();
        lease.map(|lease| lease["expiry"].as_str().unwrap().to_owned())
    };
    let before = expiry(kept);
    assert!(before.is_some() && expiry(given_back).is_some());
    node.run("dd if=/dev/zero of=/var/lib/cocoon/net/filler bs=1k");
    for n in 2..=100 {
        // Until the journal's last page is full, too.
        let offered = raw.offer_for(station(n), PATIENCE).unwrap();
        if raw.ask(&select(station(n), offered), SILENCE).is_none() {
            break;
        }
    }
    assert_eq!(raw.ask(&renew(raw.mac, kept), PATIENCE).unwrap().kind(), MessageType::Ack);
    raw.send_as(station(1), given_back, &bytes(&release(station(1), given_back)));
    eventually("the route of the lease that was given back goes", || !routes(&node).contains(&given_back));
    node.remove("/var/lib/cocoon/net/filler");
    daemon.stop();
    assert!(expiry(kept) > before, "the renewal");
    assert_eq!(expiry(given_back), None, "the release");
}

#[test]
fn an_address_whose_lease_was_lost_is_kept_over_several_restarts() {
    let (node, daemon) = node(2, "");
    let (a, b) = (node.vm_builder("a").unconfigured().build(), node.vm_builder("b").unconfigured().build());
    let (a, b) = (Raw::on(&a), Raw::on(&b));
    let leased = a.lease_for(a.mac).unwrap();
    daemon.stop();
    node.write(LEASES, "[{");
    node.daemon("").stop();
    node.daemon("").stop();
    let _daemon = node.daemon("");
    assert_eq!(routes(&node), [leased], "the live VM keeps its route");
    assert_ne!(b.lease_for(b.mac), Some(leased));
    assert_eq!(a.ask(&renew(a.mac, leased), PATIENCE).unwrap().kind(), MessageType::Ack);
}

#[test]
fn routes_without_any_lease_file_are_somebodys() {
    let (node, daemon) = node(4, "");
    let a = node.vm_builder("a").unconfigured().build();
    let a = Raw::on(&a);
    let leased = a.lease_for(a.mac).unwrap();
    daemon.stop();
    node.remove(LEASES);
    let _daemon = node.daemon("");
    assert_eq!(routes(&node), [leased]);
    assert_eq!(a.ask(&renew(a.mac, leased), PATIENCE).unwrap().kind(), MessageType::Ack);
}

#[test]
fn routes_come_back_at_once_after_the_bridge_was_down_or_lost_its_address() {
    let (node, _daemon) = node(4, "");
    let vm = node.vm_builder("a").unconfigured().build();
    let raw = Raw::on(&vm);
    let leased = raw.lease_for(raw.mac).unwrap();
    for offence in ["printf 'link set cni0 down\nlink set cni0 up\n' | ip -batch -", "ip addr flush dev cni0"] {
        for _ in 0..3 {
            node.ok(["sh", "-c", offence]);
            let back = support::eventually(Duration::from_secs(2), || routes(&node) == [leased]);
            assert!(back, "{offence}");
        }
    }
}

#[test]
fn a_lease_file_may_not_have_the_journals_name() {
    let node = Node::new();
    node.adopt("").succeeded();
    let output = node.cocoon("daemon --lease-file /run/leases.journal").exited(2);
    assert!(output.stderr.contains("--lease-file"), "{output}");
}
