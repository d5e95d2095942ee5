//! The DHCP server among real clients, each a VM in a namespace of its own.

mod support;

use std::net::Ipv4Addr;
use std::sync::Arc;
use std::time::Duration;

use cocoon_net::dhcp::{Config, Server};
use cocoon_net::metrics::Metrics;
use support::{Node, SUBNET};
use tokio::sync::watch;

fn config(pool: usize) -> Config {
    let subnet: cocoon_net::config::Subnet = SUBNET.parse().unwrap();
    let gateway = subnet.first_host();
    Config {
        interface: "cni0".to_owned(),
        subnet,
        gateway,
        addresses: subnet.pool(gateway, pool),
        dns: vec![Ipv4Addr::new(8, 8, 8, 8)],
        mtu: Some(1460),
        lease_time: Duration::from_secs(3600),
        port_lease_limit: 8,
        lease_file: "/var/lib/cocoon/net/leases.json".into(),
    }
}

struct Dhcp {
    server: Option<Server>,
    grants: watch::Sender<bool>,
    metrics: Arc<Metrics>,
}

fn wait<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(future)
}

impl Dhcp {
    fn start(node: &Node, config: Config) -> Self {
        let (grants, receiver) = watch::channel(true);
        let metrics = Arc::new(Metrics::new());
        let counted = Arc::clone(&metrics);
        let server = node.enter(move || wait(Server::start(config, receiver, counted)).unwrap());
        Self { server: Some(server), grants, metrics }
    }

    fn stop(mut self) {
        wait(self.server.take().unwrap().stop()).unwrap();
    }
}

#[test]
fn udhcpc_gets_an_address_its_route_and_gives_it_back() {
    let node = Node::new();
    node.bridge("172.20.100.1/24");
    let dhcp = Dhcp::start(&node, config(4));
    let vm = node.vm_builder("a").unconfigured().build();
    let started = std::time::Instant::now();
    let said = vm.ok("udhcpc -i eth0 -f -n -q -s /bin/true -R");
    eprintln!("{said} {:?}", started.elapsed());
    eprintln!("{}", node.ok("ip route"));
    eprintln!("{}", dhcp.metrics.render());
    dhcp.stop();
    eprintln!("{}", node.ok("ls -la /var/lib/cocoon/net/"));
    eprintln!("{}", node.read("/var/lib/cocoon/net/leases.json"));
}
