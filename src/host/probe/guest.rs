//! A stand-in for a VM: a network namespace without a name, plugged into the bridge by a veth pair.
//!
//! Nothing but a file descriptor of this process keeps the namespace alive. When the process ends, however it ends, the
//! kernel takes the namespace down, the veth end in it, and with that the bridge port.

use std::fs::File;
use std::io;
use std::net::Ipv4Addr;
use std::os::fd::{AsRawFd, OwnedFd};

use ipnet::Ipv4Net;
use nix::sched::{CloneFlags, setns, unshare};
use rtnetlink::packet_route::link::{InfoData, InfoKind, InfoVeth};
use rtnetlink::{Handle, LinkMessageBuilder, LinkUnspec, LinkVeth};

use super::ProbeError;
use super::frames::End;
use super::tap::{EVERYTHING, Tap};
use crate::host::links::{Link, Links, Mac};

/// The name of a guest's end of the veth pair, inside.
const INSIDE: &str = "eth0";

/// A stand-in VM.
#[derive(Debug)]
pub(super) struct Guest {
    /// Index of its port on the bridge.
    pub port_index: u32,
    /// Its own addresses.
    pub end: End,
    /// Its network interface.
    pub tap: Tap,
    _namespace: Namespace,
}

impl Guest {
    /// Makes a namespace and plugs it into the bridge as `port`, with this address.
    pub(super) async fn plug(
        handle: &Handle,
        bridge: &Link,
        port: &'static str,
        mac: Mac,
        address: Ipv4Net,
    ) -> Result<Self, ProbeError> {
        let namespace = Namespace::new().map_err(ProbeError::Namespace)?;
        let inside = LinkMessageBuilder::<LinkUnspec>::new()
            .name(INSIDE)
            .mtu(bridge.mtu)
            .address(mac.to_vec())
            .setns_by_fd(namespace.0.as_raw_fd())
            .build();
        let pair = LinkMessageBuilder::<LinkVeth>::new_with_info_kind(InfoKind::Veth)
            .name(port)
            .mtu(bridge.mtu)
            .address(port_mac(mac).to_vec())
            .controller(bridge.index)
            .up()
            .set_info_data(InfoData::Veth(InfoVeth::Peer(inside)))
            .build();
        let plugged = |source| ProbeError::Plug { port, bridge: bridge.name.clone(), source };
        handle.link().add(pair).execute().await.map_err(plugged)?;

        let links = namespace.links().map_err(ProbeError::Namespace)??;
        if let Some(index) = links.index_of(INSIDE).await? {
            links.set_up(index, INSIDE).await?;
            links.add_address(index, INSIDE, address).await?;
        }
        let tap = namespace.run(|| Tap::on(INSIDE, EVERYTHING)).and_then(|tap| tap).map_err(ProbeError::Tap)?;
        let port_index = nix::net::if_::if_nametoindex(port).map_err(|errno| ProbeError::Tap(errno.into()))?;
        Ok(Self { port_index, end: End { mac, ip: address.addr() }, tap, _namespace: namespace })
    }

    /// The guest's address.
    pub(super) fn ip(&self) -> Ipv4Addr {
        self.end.ip
    }
}

/// The MAC address of the port on the host's side. It is high, so that a bridge whose own address follows its lowest
/// port's does not change it because of us.
fn port_mac(mac: Mac) -> Mac {
    [0xfe, mac[1], mac[2], mac[3], mac[4], mac[5]]
}

/// A network namespace that lives as long as this.
#[derive(Debug)]
struct Namespace(OwnedFd);

impl Namespace {
    fn new() -> io::Result<Self> {
        in_thread(|| {
            unshare(CloneFlags::CLONE_NEWNET)?;
            Ok(Self(File::open("/proc/thread-self/ns/net")?.into()))
        })?
    }

    /// Runs `work` in the namespace: on a thread of its own, for a thread is what a namespace is entered with.
    fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> io::Result<T> {
        in_thread(|| {
            setns(&self.0, CloneFlags::CLONE_NEWNET)?;
            Ok::<_, io::Error>(work())
        })?
    }

    /// A netlink connection into the namespace, driven by the calling runtime.
    fn links(&self) -> io::Result<Result<Links, crate::host::links::LinkError>> {
        let runtime = tokio::runtime::Handle::current();
        self.run(|| {
            let _entered = runtime.enter();
            Links::open(false)
        })
    }
}

fn in_thread<T: Send>(work: impl FnOnce() -> T + Send) -> io::Result<T> {
    std::thread::scope(|scope| scope.spawn(work).join())
        .map_err(|_| io::Error::other("the thread that enters the namespace died"))
}
