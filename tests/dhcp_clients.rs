//! Real DHCP clients, each a VM in a namespace of its own, against the daemon.

mod dhcp_raw;
mod support;

use std::time::Duration;

use dhcp_raw::*;
use nix::sys::signal::Signal;
use support::{Node, Process, Vm};

fn node(pool: u8, flags: &str) -> (Node, Process) {
    let node = Node::new();
    node.adopt(format!("--pool-size {pool}")).succeeded();
    let daemon = node.daemon(flags);
    (node, daemon)
}

fn vm(node: &Node, name: &str) -> Vm {
    node.vm_builder(name).unconfigured().build()
}

/// What a client does with what it is given, for clients that ask a script to do it.
const SCRIPT: &str = "#!/bin/sh
# udhcpc passes the event as an argument, dhclient as $reason.
case \"$1$reason\" in
bound|renew|BOUND|RENEW|REBIND|REBOOT) ip address replace \"${ip:-$new_ip_address}/24\" dev eth0 ;;
deconfig|EXPIRE|RELEASE|STOP|PREINIT) ip address flush dev eth0; ip link set eth0 up ;;
esac
echo \"$1$reason $ip$new_ip_address mtu=$mtu$new_interface_mtu\" >> /run/events
";

fn with_script(vm: Vm) -> Vm {
    vm.write("/run/script", SCRIPT);
    vm.ok("chmod +x /run/script");
    vm
}

fn events(vm: &Vm) -> String {
    vm.try_read("/run/events").unwrap_or_default()
}

fn granted(node: &Node) -> u64 {
    metric(node, "cocoon_net_dhcp_lease_total{result=\"ok\"}")
}

#[test]
fn a_pool_of_four_serves_four_vms_the_fifth_waits_and_a_release_hands_the_address_on() {
    let (node, _daemon) = node(4, "");
    let vms: Vec<Vm> = ["a", "b", "c", "d"].iter().map(|name| with_script(vm(&node, name))).collect();
    let mut clients: Vec<Process> =
        vms.iter().map(|vm| vm.spawn("udhcpc -i eth0 -f -R -s /run/script -T 1 -t 5")).collect();
    for vm in &vms {
        eventually("the client is bound", || events(vm).contains("bound 172.20.100."));
    }
    assert_eq!(routes(&node).len(), 4);
    let fifth = with_script(vm(&node, "e"));
    assert_ne!(fifth.run("udhcpc -i eth0 -n -q -s /run/script -T 1 -t 2").code(), 0, "there is no fifth address");
    let given = routes(&node);

    // SIGTERM with -R: the client gives its address back.
    clients.remove(1).stop();
    eventually("one route is gone", || routes(&node).len() == 3);
    let freed = given.into_iter().find(|ip| !routes(&node).contains(ip)).unwrap();
    fifth.ok("udhcpc -i eth0 -n -q -s /run/script -T 1 -t 5");
    assert!(events(&fifth).contains(&format!("bound {freed}")), "{}", events(&fifth));
}

#[test]
fn udhcpc_renews_and_goes_on_over_a_restart_of_the_server() {
    let (node, daemon) = node(4, "");
    let vm = with_script(vm(&node, "a"));
    let mut client = vm.spawn("udhcpc -i eth0 -f -s /run/script -T 1");
    eventually("it is bound", || events(&vm).contains("bound 172.20.100.2"));
    assert!(vm.reaches(support::GATEWAY), "and the address works");
    // It renews by itself only leases of more than two minutes.
    client.signal(Signal::SIGUSR1);
    eventually("it renews", || granted(&node) == 2);
    daemon.stop();
    let _daemon = node.daemon("");
    client.signal(Signal::SIGUSR1);
    eventually("it renews with the new server", || granted(&node) == 1);
    assert_eq!(events(&vm).matches("deconfig").count(), 1, "{}", events(&vm));
}

#[test]
fn udhcpc_rebinds_when_its_server_was_away_at_renewal() {
    let (node, daemon) = node(4, "--lease-time 16s");
    let vm = with_script(vm(&node, "a"));
    let _client = vm.spawn("udhcpc -i eth0 -f -s /run/script -T 1");
    eventually("it is bound", || events(&vm).contains("bound 172.20.100.2"));
    daemon.stop();
    // It takes no lease for shorter than 16 s, and rebinds one as short as that in its last seconds.
    std::thread::sleep(Duration::from_secs(9));
    let _daemon = node.daemon("--lease-time 16s");
    eventually("it is renewed before the lease runs out", || granted(&node) >= 1);
    assert_eq!(events(&vm).matches("deconfig").count(), 1, "{}", events(&vm));
}

#[test]
fn dhclient_binds_renews_reboots_and_releases() {
    let (node, _daemon) = node(4, "--lease-time 6s");
    let vm = with_script(vm(&node, "a"));
    vm.write("/run/dhclient.conf", "request subnet-mask, routers, domain-name-servers, interface-mtu;\n");
    let dhclient =
        "dhclient -d -4 -cf /run/dhclient.conf -sf /run/script -lf /run/dhclient.leases -pf /run/dhclient.pid";
    let client = vm.spawn(format!("{dhclient} eth0"));
    eventually("it is bound", || events(&vm).contains("BOUND 172.20.100.2 mtu=1500"));
    eventually("it renews", || events(&vm).contains("RENEW 172.20.100.2"));
    // Killed, and started again with its lease: INIT-REBOOT.
    client.kill_after(Duration::ZERO);
    let _client = vm.spawn(format!("{dhclient} eth0"));
    eventually("it keeps its address", || events(&vm).contains("REBOOT 172.20.100.2"));
    vm.ok(format!("{dhclient} -r eth0"));
    eventually("it has given it back", || routes(&node).is_empty());
}

#[test]
fn dhcpcd_binds_and_releases() {
    let (node, _daemon) = node(4, "");
    let vm = vm(&node, "a");
    vm.write("/run/dhcpcd.conf", "option interface_mtu\nnoarp\n");
    vm.mkdir("/var/lib/dhcpcd");
    vm.mkdir("/run/dhcpcd");
    let mut client = vm.spawn("dhcpcd -4 -B -d -L -f /run/dhcpcd.conf eth0");
    let bound =
        client.wait_until(Duration::from_secs(15), |_| vm.ok("ip -4 address show eth0").contains("172.20.100.2/24"));
    assert!(bound, "{}{}", client.stdout(), client.stderr());
    assert_eq!(routes(&node), [ip(2)]);
    // It drops the address right behind the RELEASE, which is lost if the gateway has to be found by ARP first.
    assert!(vm.reaches(support::GATEWAY));
    let settled = client.wait_until(Duration::from_secs(10), |client| client.stderr().contains("spawned listener"));
    assert!(settled, "{}", client.stderr());
    client.signal(Signal::SIGALRM);
    let released = client.wait_until(Duration::from_secs(10), |client| client.stderr().contains("releasing lease"));
    assert!(released, "{}", client.stderr());
    eventually("it has given it back", || routes(&node).is_empty());
}

#[test]
fn perfdhcp_loses_nothing_at_a_gentle_rate() {
    let (node, _daemon) = node(100, "--port-lease-limit 0");
    let vm = node.vm_builder("a").address("172.20.100.250/24").build();
    let report = vm.run("perfdhcp -4 -l eth0 -R 50 -r 100 -n 200 -W 500000 172.20.100.1");
    let text = report.stdout;
    assert_eq!(text.matches("drops: 0").count(), 2, "{text}");
}
