//! What isolation changes, shown: `make demo`.
//!
//! A node, two VMs and an internet are made of network namespaces. What each VM reaches is tried out on the node as it
//! is and again after `cocoon-net init` with drops; then `check`, `status`, `teardown`, and a look at what stayed behind.

mod support;

use std::process::{ExitCode, exit};
use std::thread::{scope, sleep, spawn};
use std::time::{Duration, Instant};

use support::{Frame, GATEWAY, INSIDE_TEN, INTERNET, METADATA, Node, Output, Snapshot, Vm};

/// The demo ends by itself after this, whatever hangs.
const DEADLINE: Duration = Duration::from_secs(60);

const INIT: &str = "init --platform none --node-name demo --subnet 172.20.100.0/24 --drop-internal-access \
                    --drop-cidr 10.0.0.0/8 --drop-metadata-access --drop-host-access";

/// One line of the table: what a VM tries, and whether it is to work after `init`.
struct Row {
    what: &'static str,
    stays: bool,
    works: fn(&Vm, &Vm) -> bool,
}

const ROWS: [Row; 12] = [
    Row { what: "the gateway", stays: true, works: |vm, _| answers(vm, GATEWAY) },
    Row { what: "the internet", stays: true, works: |vm, _| answers(vm, INTERNET) },
    Row { what: "the internet, TCP port 80", stays: true, works: |vm, _| connects(vm, INTERNET, 80) },
    Row { what: "10.1.2.3, inside 10.0.0.0/8", stays: false, works: |vm, _| answers(vm, INSIDE_TEN) },
    Row { what: "the metadata service, TCP port 80", stays: false, works: |vm, _| connects(vm, METADATA, 80) },
    Row { what: "the node's own TCP port 22", stays: false, works: |vm, _| connects(vm, GATEWAY, 22) },
    Row { what: "the other VM", stays: false, works: |vm, other| answers(vm, other.address()) },
    Row { what: "the other VM, TCP port 80", stays: false, works: |vm, other| connects(vm, other.address(), 80) },
    Row { what: "the other VM, through the gateway", stays: false, works: |vm, other| answers(vm, &detour(other)) },
    Row { what: "the other VM, IPv6 link-local", stays: false, works: |vm, other| answers(vm, &other.link_local()) },
    Row {
        what: "the other VM, VLAN-tagged",
        stays: false,
        works: |vm, other| frame(vm, other, &Frame::new(0x0800).vlan(7)),
    },
    Row {
        what: "the other VM, ARP",
        stays: false,
        works: |vm, other| frame(vm, other, &Frame::new(0x0806).broadcast()),
    },
];

/// What both VMs found, row by row.
type Findings = Vec<[bool; 2]>;

fn main() -> ExitCode {
    spawn(|| {
        sleep(DEADLINE);
        println!("\nThe demo did not end within {DEADLINE:?}: giving up.");
        exit(1);
    });
    let begin = Instant::now();

    println!("A node, two VMs on its bridge and an internet, made of network namespaces on this machine.");
    let node = Node::new();
    let untouched = node.snapshot();

    println!("Trying what the VMs reach on a bridge made by hand, without cocoon-net ...");
    node.bridge("172.20.100.1/24");
    let vms = plug_in(&node);
    let before = findings(&node, &vms);
    vms.into_iter().for_each(Vm::unplug);
    node.ip(&["link del cni0"]);
    node.set_sysctl("net/ipv4/ip_forward", "0");
    node.assert_back_to(&untouched);

    show(&node.cocoon(INIT).succeeded());
    let daemon = node.daemon("");
    println!("\n$ cocoon-net daemon &\nready\n\nTrying again ...");
    let vms = plug_in(&node);
    let after = findings(&node, &vms);
    let promised = print_table(&before, &after);

    show(&node.cocoon("check").succeeded());
    show(&node.cocoon("status").succeeded());
    vms.into_iter().for_each(Vm::unplug);
    show(&node.cocoon("teardown").succeeded());
    drop(daemon);
    let clean = print_leftovers(&node, &untouched);

    println!("\nDone in {:.0} s; the namespaces are gone with this process.", begin.elapsed().as_secs_f32());
    if promised && clean { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Plugs two VMs into `cni0`, each with a second address that its neighbour looks for behind the gateway.
fn plug_in(node: &Node) -> [Vm; 2] {
    let vms = [("a", "172.20.100.11/24"), ("b", "172.20.100.12/24")]
        .map(|(name, address)| node.vm_builder(name).address(address).build());
    let [a, b] = &vms;
    for (vm, other) in [(a, b), (b, a)] {
        vm.ok(format!("ip address add {}/32 dev eth0", detour(vm)));
        vm.ok(format!("ip route add {} via {GATEWAY}", detour(other)));
    }
    // The daemon isolates a new port within two seconds; the bridge made by hand gets them too.
    sleep(Duration::from_secs(2));
    vms
}

/// Lets both VMs try every row at once.
fn findings(node: &Node, [a, b]: &[Vm; 2]) -> Findings {
    let internet = node.internet();
    let _servers = [
        internet.echo(&format!("{INTERNET}:80")),
        internet.echo(&format!("{METADATA}:80")),
        node.echo("0.0.0.0:22"),
        a.echo("0.0.0.0:80"),
        b.echo("0.0.0.0:80"),
    ];
    scope(|scope| {
        let tries: Vec<_> =
            ROWS.iter().map(|row| [(a, b), (b, a)].map(|(vm, other)| scope.spawn(|| (row.works)(vm, other)))).collect();
        tries.into_iter().map(|both| both.map(|tried| tried.join().unwrap_or(false))).collect()
    })
}

/// Prints the table, and says whether every VM reached everything before, and afterwards what is promised and no more.
fn print_table(before: &Findings, after: &Findings) -> bool {
    println!("\n{:36}   {:^11}   {:^11}", "", "BEFORE", "AFTER init");
    println!("{:36}   {:^5} {:^5}   {:^5} {:^5}", "what a VM reaches", "vm a", "vm b", "vm a", "vm b");
    let mut all = true;
    for ((row, before), after) in ROWS.iter().zip(before).zip(after) {
        let kept = *before == [true; 2] && *after == [row.stays; 2];
        let [a, b, c, d] = [before[0], before[1], after[0], after[1]].map(|works| if works { "yes" } else { "-" });
        let verdict = if kept { "" } else { "  NOT AS PROMISED" };
        println!("{:36}   {a:^5} {b:^5}   {c:^5} {d:^5}{verdict}", row.what);
        all &= kept;
    }
    println!("\n{}", if all { "Every line is as promised." } else { "The marked lines are not as promised." });
    all
}

/// Compares the node with what it was, and says whether it is the same.
fn print_leftovers(node: &Node, untouched: &Snapshot) -> bool {
    let tidy = |snapshot: Snapshot| snapshot.without(&["sysctls"]).without_empty_tables().without_folders();
    let before = tidy(untouched.clone());
    let mut left = String::new();
    for _ in 0..20 {
        left = before.diff(&tidy(node.snapshot()));
        if left.is_empty() {
            println!("\nThe node is as it was: rules of both backends, ipsets, links, addresses, routes, files.");
            println!("Kernel parameters stay, since others may have come to rely on them:");
            let parameters = |snapshot: &Snapshot| snapshot.only(&["sysctls"]);
            print!("{}", parameters(untouched).diff(&parameters(&node.snapshot())));
            return true;
        }
        sleep(Duration::from_millis(100));
    }
    println!("\nNot as it was (- gone, + new):\n{left}");
    false
}

fn show(output: &Output) {
    let name = output.argv.split_once("cocoon-net ").map_or(output.argv.as_str(), |(_, args)| args);
    println!("\n$ cocoon-net {name}\n{}", output.stdout.trim_end());
}

fn answers(vm: &Vm, address: &str) -> bool {
    !vm.is_cut_off_from(address)
}

fn connects(vm: &Vm, address: &str, port: u16) -> bool {
    !vm.tcp_is_cut_off_from(&format!("{address}:{port}"))
}

fn frame(vm: &Vm, other: &Vm, frame: &Frame) -> bool {
    vm.frame_reaches(other, frame)
}

/// A second address of a VM, to which its neighbour has a route through the gateway.
fn detour(vm: &Vm) -> String {
    vm.address().replace("172.20.100.", "172.20.100.1")
}
