//! The bridge while it is there: its sockets, and news of its coming and going.

use std::io;

use netlink_sys::{Socket as NetlinkSocket, SocketAddr, protocols::NETLINK_ROUTE};
use socket2::Socket;

use super::Error;
use crate::dhcp::netlink::Netlink;
use crate::dhcp::routes::{self, Link};
use crate::dhcp::sockets::{FrameSocket, claim_port};
use crate::netlink::{messages, u32_at};

/// `RTNLGRP_LINK`, `RTM_NEWLINK` and `IFF_UP` of rtnetlink(7) and netdevice(7).
const LINK_GROUP: u32 = 1;
const RTM_NEWLINK: u16 = 16;
const IFF_UP: u32 = 1;

/// The bridge, open for business.
#[derive(Debug)]
pub(super) struct Bridge {
    pub link: Link,
    pub frames: FrameSocket,
    /// Held, never read.
    _port: Socket,
}

impl Bridge {
    /// Opens the sockets on a bridge.
    pub fn open(interface: &str, link: Link) -> Result<Self, Error> {
        let io = |doing| move |source| Error::Io { doing, interface: interface.to_owned(), source };
        let port = claim_port(interface).map_err(|error| match error.kind() {
            io::ErrorKind::AddrInUse => Error::PortTaken { interface: interface.to_owned() },
            _ => io("listen on port 67 (CAP_NET_BIND_SERVICE and CAP_NET_RAW are needed)")(error),
        })?;
        let frames = FrameSocket::dhcp(&link).map_err(io("open a packet socket (CAP_NET_RAW is needed)"))?;
        Ok(Self { link, frames, _port: port })
    }
}

/// Tells when any link of the host changes.
pub(super) struct LinkWatch(NetlinkSocket);

impl LinkWatch {
    pub fn open() -> io::Result<Self> {
        let mut socket = NetlinkSocket::new(NETLINK_ROUTE)?;
        socket.bind(&SocketAddr::new(0, 0))?;
        socket.add_membership(LINK_GROUP)?;
        socket.set_non_blocking(true)?;
        Ok(Self(socket))
    }

    /// Reads what has been said, and whether the bridge of this index was down at some time: its routes went then,
    /// however soon it was up again. Whoever wants to know how things are now looks.
    pub fn drain(&self, bridge: Option<u32>) -> bool {
        let mut buffer = Vec::with_capacity(8192);
        let mut was_down = false;
        loop {
            buffer.clear();
            match self.0.recv(&mut buffer, 0) {
                Ok(_) => was_down |= messages(&buffer).any(|message| tells_of_down(message, bridge)),
                // Messages were lost: any may have been among them.
                Err(error) if error.raw_os_error() == Some(nix::libc::ENOBUFS) => was_down = true,
                Err(_) => return was_down,
            }
        }
    }
}

/// Whether a message (`struct ifinfomsg`, rtnetlink(7)) says that this interface is down.
fn tells_of_down((kind, payload): (u16, &[u8]), index: Option<u32>) -> bool {
    let down = u32_at(payload, 8).is_some_and(|flags| flags & IFF_UP == 0);
    kind == RTM_NEWLINK && down && index.is_some() && u32_at(payload, 4) == index
}

impl std::os::fd::AsFd for LinkWatch {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// The bridge as it is now.
pub(super) fn look_up(netlink: &mut Netlink, interface: &str) -> Result<Option<Link>, Error> {
    routes::link(netlink, interface).map_err(|source| Error::Io {
        doing: "look up its interface",
        interface: interface.to_owned(),
        source,
    })
}
