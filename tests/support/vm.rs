//! A VM: a namespace whose `eth0` is plugged into a bridge of the node.

use std::ops::Deref;

use super::GATEWAY;
use super::host::Host;
use super::node::Node;

/// A VM on the node. Runs commands as [`Host`] does.
pub struct Vm {
    host: Host,
    port: String,
    mac: [u8; 6],
    address: Option<String>,
}

impl Deref for Vm {
    type Target = Host;

    fn deref(&self) -> &Host {
        &self.host
    }
}

/// How a VM is to be.
#[must_use = "call build()"]
pub struct VmBuilder<'n> {
    node: &'n Node,
    name: String,
    number: u8,
    bridge: Option<String>,
    address: Option<String>,
    gateway: Option<String>,
    mac: [u8; 6],
}

impl<'n> VmBuilder<'n> {
    pub(super) fn new(node: &'n Node, name: &str, number: u8) -> Self {
        Self {
            node,
            name: name.to_owned(),
            number,
            bridge: Some("cni0".to_owned()),
            address: Some(format!("172.20.100.{number}/24")),
            gateway: Some(GATEWAY.to_owned()),
            mac: [2, 0, 0, 0, 0, number],
        }
    }

    /// Plugs it into another bridge.
    pub fn bridge(mut self, name: &str) -> Self {
        self.bridge = Some(name.to_owned());
        self
    }

    /// Leaves its port unplugged; `node.ip` or a CNI plugin's stand-in plugs it in.
    pub fn unplugged(mut self) -> Self {
        self.bridge = None;
        self
    }

    /// Gives it this address, with its prefix length.
    pub fn address(mut self, address: &str) -> Self {
        self.address = Some(address.to_owned());
        self
    }

    /// Gives it neither address nor route: a client that is to ask DHCP.
    pub fn unconfigured(mut self) -> Self {
        self.address = None;
        self.gateway = None;
        self
    }

    /// Sends its default route here instead of to 172.20.100.1.
    pub fn gateway(mut self, address: &str) -> Self {
        self.gateway = Some(address.to_owned());
        self
    }

    /// Leaves the default route out.
    pub fn no_default_route(mut self) -> Self {
        self.gateway = None;
        self
    }

    /// Gives it this MAC address instead of 02:00:00:00:00:NUMBER.
    pub fn mac(mut self, mac: [u8; 6]) -> Self {
        self.mac = mac;
        self
    }

    /// Makes it.
    #[track_caller]
    pub fn build(self) -> Vm {
        let host = Host::new(&self.name);
        let port = format!("veth-{}", self.name);
        let mac = text(self.mac);
        let mut lines = vec![
            "link set lo up".to_owned(),
            format!("link add eth0 address {mac} type veth peer name {port} netns {}", self.node.pid()),
        ];
        lines.extend(self.address.iter().map(|address| format!("address add {address} dev eth0")));
        lines.push("link set eth0 up".to_owned());
        lines.extend(self.gateway.iter().map(|gateway| format!("route add default via {gateway}")));
        host.ip(&lines.iter().map(String::as_str).collect::<Vec<_>>());
        if let Some(bridge) = self.bridge {
            let plug = format!("link set {port} master {bridge} up");
            self.node.ip(&[&plug]);
            host.wait_for_carrier("eth0");
        }
        let address = self.address.and_then(|address| Some(address.split_once('/')?.0.to_owned()));
        Vm { host, port, mac: self.mac, address }
    }
}

impl Vm {
    /// Its IPv4 address.
    #[track_caller]
    pub fn address(&self) -> &str {
        self.address.as_deref().expect("this VM was made without an address")
    }

    /// The name of its port on the node's bridge.
    pub fn port(&self) -> &str {
        &self.port
    }

    /// The MAC address of its `eth0`.
    pub fn mac(&self) -> [u8; 6] {
        self.mac
    }

    /// The MAC address of its `eth0`, with colons.
    pub fn mac_text(&self) -> String {
        text(self.mac)
    }

    /// Its IPv6 link-local address (RFC 4291, appendix A), with the scope that a neighbour needs: `fe80::...%eth0`.
    pub fn link_local(&self) -> String {
        let [a, b, c, d, e, f] = self.mac;
        format!("fe80::{:02x}{b:02x}:{c:02x}ff:fe{d:02x}:{e:02x}{f:02x}%eth0", a ^ 2)
    }

    /// Takes its cable out, as when a VM ends. (A dropped `Vm` goes too, but the kernel takes its time.)
    pub fn unplug(self) {
        self.ip(&["link del eth0"]);
    }
}

fn text(mac: [u8; 6]) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}
