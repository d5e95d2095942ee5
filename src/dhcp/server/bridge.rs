//! The bridge while it is there: its sockets, and news of its coming and going.

use std::io;

use netlink_sys::{Socket as NetlinkSocket, SocketAddr, protocols::NETLINK_ROUTE};
use socket2::Socket;

use super::Error;
use crate::dhcp::netlink::Netlink;
use crate::dhcp::routes::{self, Link};
use crate::dhcp::sockets::{FrameSocket, claim_port};

/// `RTNLGRP_LINK` of rtnetlink(7).
const LINK_GROUP: u32 = 1;

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

    /// Throws away what has been said: whoever wants to know how things are now looks.
    pub fn drain(&self) {
        let mut buffer = Vec::with_capacity(8192);
        loop {
            buffer.clear();
            match self.0.recv(&mut buffer, 0) {
                Ok(_) => {}
                // Messages were lost, which says that there were some.
                Err(error) if error.raw_os_error() == Some(nix::libc::ENOBUFS) => {}
                Err(_) => return,
            }
        }
    }
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
