//! The node under test, and the internet behind its uplink.

use std::ops::Deref;
use std::path::Path;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::Duration;

use super::host::{HARNESS, Host};
use super::process::{IntoArgs, Output, Process};
use super::vm::{Vm, VmBuilder};
use super::{INSIDE_TEN, INTERNET, INTERNET_TOO, METADATA, METADATA_VOLCENGINE, NODE_ADDRESS, ROUTER, SUBNET};

/// Which kernel interface `iptables` speaks to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Backend {
    /// nf_tables, as most hosts have it.
    Nft,
    /// The older ip_tables.
    Legacy,
}

/// A host that runs cocoon-net, connected to an internet of its own. Runs commands as [`Host`] does.
pub struct Node {
    host: Host,
    internet: Host,
    backend: Backend,
    vms: AtomicU8,
}

impl Deref for Node {
    type Target = Host;

    fn deref(&self) -> &Host {
        &self.host
    }
}

/// How a node is to be.
#[derive(Debug, Clone)]
#[must_use = "call build()"]
pub struct NodeBuilder {
    backend: Backend,
    uplink: String,
    nics: Vec<String>,
    default_route: bool,
}

impl Node {
    /// A fresh host: uplink `ens4`, default route, iptables on nf_tables, no bridge.
    pub fn new() -> Self {
        Self::builder().build()
    }

    /// A host that differs from [`Node::new`].
    pub fn builder() -> NodeBuilder {
        NodeBuilder { backend: Backend::Nft, uplink: "ens4".to_owned(), nics: Vec::new(), default_route: true }
    }

    /// What is behind the uplink: run servers and captures there.
    pub fn internet(&self) -> &Host {
        &self.internet
    }

    /// The backend `iptables` uses in here.
    pub fn backend(&self) -> Backend {
        self.backend
    }

    /// Runs the program under test to its end.
    #[track_caller]
    pub fn cocoon(&self, args: impl IntoArgs) -> Output {
        self.run(cocoon(args))
    }

    /// Starts the program under test beside the test.
    #[track_caller]
    pub fn spawn_cocoon(&self, args: impl IntoArgs) -> Process {
        self.spawn(cocoon(args))
    }

    /// Runs `adopt` for [`SUBNET`] on platform none, rules included, with more flags (`""` for none).
    #[track_caller]
    pub fn adopt(&self, flags: impl IntoArgs) -> Output {
        let usual = format!("adopt --platform none --node-name n1 --subnet {SUBNET} --manage-iptables");
        self.cocoon([usual.into_args(), flags.into_args()].concat())
    }

    /// The rules of a chain as `iptables -S` prints them, the policy left out.
    #[track_caller]
    pub fn rules(&self, table: &str, chain: &str) -> Vec<String> {
        let listed = self.ok(["iptables", "-t", table, "-S", chain]);
        listed.lines().filter(|line| line.starts_with("-A")).map(str::to_owned).collect()
    }

    /// Starts `cocoon-net daemon` with more flags (`""` for none) and waits until it tells systemd that it is ready.
    #[track_caller]
    pub fn daemon(&self, flags: impl IntoArgs) -> Process {
        let args = [vec!["daemon".to_owned()], flags.into_args()].concat();
        let mut daemon = self.command(cocoon(args)).with_notify_socket().spawn();
        let ready = daemon.notified("READY=1", Duration::from_secs(20));
        assert!(ready, "the daemon did not become ready; it said:\n{}{}", daemon.stdout(), daemon.stderr());
        daemon
    }

    /// Makes `cni0` by hand, with forwarding on: a node where VMs reach each other and everything, without cocoon-net.
    pub fn bridge(&self, address: &str) {
        let address = format!("address add {address} dev cni0");
        self.ip(&["link add cni0 type bridge", &address, "link set cni0 up"]);
        self.set_sysctl("net/ipv4/ip_forward", "1");
    }

    /// A VM on `cni0`, which must be there: the first is 172.20.100.11, the next .12, and so on.
    #[track_caller]
    pub fn vm(&self, name: &str) -> Vm {
        self.vm_builder(name).build()
    }

    /// A VM that differs from [`Node::vm`].
    pub fn vm_builder(&self, name: &str) -> VmBuilder<'_> {
        VmBuilder::new(self, name, self.vms.fetch_add(1, Ordering::Relaxed) + 11)
    }
}

impl Default for Node {
    fn default() -> Self {
        Self::new()
    }
}

impl NodeBuilder {
    /// Puts this backend behind `iptables`, `ip6tables` and their `-save` and `-restore`.
    pub fn backend(mut self, backend: Backend) -> Self {
        self.backend = backend;
        self
    }

    /// Names the uplink; `ens4` unless set.
    pub fn uplink(mut self, name: &str) -> Self {
        name.clone_into(&mut self.uplink);
        self
    }

    /// Adds interfaces that are down and have no address: `["eth1", "eth2"]`.
    pub fn nics<'n>(mut self, names: impl IntoIterator<Item = &'n str>) -> Self {
        self.nics.extend(names.into_iter().map(str::to_owned));
        self
    }

    /// Adds eth1 to eth7, as on Volcengine.
    pub fn volcengine_nics(self) -> Self {
        self.nics(["eth1", "eth2", "eth3", "eth4", "eth5", "eth6", "eth7"])
    }

    /// Leaves the default route out.
    pub fn no_default_route(mut self) -> Self {
        self.default_route = false;
        self
    }

    /// Makes it.
    pub fn build(self) -> Node {
        let (host, internet) = (Host::new("node"), Host::new("internet"));
        select_backend(&host, self.backend);
        cable(&host, &internet, &self);
        host.wait_for_carrier(&self.uplink);
        Node { host, internet, backend: self.backend, vms: AtomicU8::new(0) }
    }
}

/// Lays the uplink and the extra interfaces between the node and the internet.
fn cable(node: &Host, internet: &Host, wanted: &NodeBuilder) {
    let uplink = &wanted.uplink;
    let peer = internet.pid();
    let mut lines = vec![
        "link set lo up".to_owned(),
        format!("link add {uplink} address 02:00:00:00:01:02 type veth peer name node0 netns {peer}"),
        format!("address add {NODE_ADDRESS}/24 dev {uplink}"),
        format!("link set {uplink} up"),
    ];
    if wanted.default_route {
        lines.push(format!("route add default via {ROUTER} dev {uplink}"));
    }
    for (number, nic) in wanted.nics.iter().enumerate() {
        lines.push(format!("link add {nic} type veth peer name node{} netns {peer}", number + 1));
    }
    node.ip(&lines.iter().map(String::as_str).collect::<Vec<_>>());

    let mut lines = vec![
        "link set lo up".to_owned(),
        format!("address add {ROUTER}/24 dev node0"),
        "link set node0 up".to_owned(),
        // The VPC routes the VMs' addresses to their node.
        format!("route add 172.20.0.0/16 via {NODE_ADDRESS}"),
    ];
    for address in [INTERNET, INTERNET_TOO, INSIDE_TEN, METADATA, METADATA_VOLCENGINE, "8.8.8.8", "1.1.1.1"] {
        lines.push(format!("address add {address}/32 dev lo"));
    }
    internet.ip(&lines.iter().map(String::as_str).collect::<Vec<_>>());
}

/// Decides what `iptables` means in the namespace, whatever it means on the machine.
fn select_backend(host: &Host, backend: Backend) {
    let multi = match backend {
        Backend::Nft => "xtables-nft-multi",
        Backend::Legacy => "xtables-legacy-multi",
    };
    let multi = host.real_tool(multi);
    host.enter(move || {
        for family in ["iptables", "ip6tables"] {
            for tool in ["", "-save", "-restore"] {
                let link = format!("{HARNESS}/bin/{family}{tool}");
                std::os::unix::fs::symlink(&multi, Path::new(&link)).expect("cannot write to a private /run");
            }
        }
    });
}

/// The command line of the program under test.
pub(super) fn cocoon(args: impl IntoArgs) -> Vec<String> {
    [vec![env!("CARGO_BIN_EXE_cocoon-net").to_owned()], args.into_args()].concat()
}
