//! Raw sockets (packet(7)): sending frames as they are, and seeing what passes.

use std::io;
use std::os::fd::AsRawFd;

use nix::ifaddrs::getifaddrs;
use nix::sys::socket::{LinkAddr, SockaddrLike, bind, recvfrom};
use socket2::{Domain, Protocol, SockFilter, Socket, Type};

/// `ETH_P_ALL` and `ETH_P_ARP` of linux/if_ether.h.
pub(super) const EVERYTHING: u16 = 0x0003;
pub(super) const ARP: u16 = 0x0806;

/// `PACKET_OUTGOING`: a frame that this host sends.
const OUTGOING: u8 = 4;

/// Opcodes of the classic packet filter (linux/filter.h): load a word, compare, return.
const LOAD: u16 = 0x20;
const JUMP_IF_EQUAL: u16 = 0x15;
const RETURN: u16 = 0x06;
/// `SKF_AD_OFF + SKF_AD_IFINDEX`: the interface, instead of the frame.
const INTERFACE: u32 = 0xffff_f000 + 8;
/// `SKF_NET_OFF`: offsets from here count from the network header, whatever the link layer.
const NETWORK: u32 = 0xfff0_0000;

/// A raw socket.
#[derive(Debug)]
pub(super) struct Tap(Socket);

/// A frame that passed.
#[derive(Debug)]
pub(super) struct Seen {
    /// Index of the interface where it was seen.
    pub interface: u32,
    /// Whether the host sent it there, rather than received it.
    pub outgoing: bool,
    /// The frame, link-layer header included.
    pub frame: Vec<u8>,
}

impl Tap {
    /// A raw socket on one interface of the calling thread's network namespace.
    pub(super) fn on(interface: &str, protocol: u16) -> io::Result<Self> {
        let tap = Self::open(protocol)?;
        let address = link_address(interface)?;
        bind(tap.0.as_raw_fd(), &address)?;
        Ok(tap)
    }

    /// A raw socket that sees, on every interface, what carries the marker in the place where the probe's UDP datagrams,
    /// ARP requests and bare frames carry it; and on `ports` everything. The kernel filters, so that a busy node does
    /// not notice.
    pub(super) fn everywhere(ports: [u32; 2], nonce: [u8; 6]) -> io::Result<Self> {
        let tap = Self::open(EVERYTHING)?;
        let marker = u32::from_be_bytes([nonce[0], nonce[1], nonce[2], nonce[3]]);
        // A load past the end of the frame refuses it, so the offsets are tried from the nearest to the farthest.
        let filter = [
            SockFilter::new(LOAD, 0, 0, INTERFACE),
            SockFilter::new(JUMP_IF_EQUAL, 8, 0, ports[0]),
            SockFilter::new(JUMP_IF_EQUAL, 7, 0, ports[1]),
            SockFilter::new(LOAD, 0, 0, NETWORK),
            SockFilter::new(JUMP_IF_EQUAL, 5, 0, marker),
            SockFilter::new(LOAD, 0, 0, NETWORK + 28),
            SockFilter::new(JUMP_IF_EQUAL, 3, 0, marker),
            SockFilter::new(LOAD, 0, 0, NETWORK + 48),
            SockFilter::new(JUMP_IF_EQUAL, 1, 0, marker),
            SockFilter::new(RETURN, 0, 0, 0),
            SockFilter::new(RETURN, 0, 0, u32::MAX),
        ];
        tap.0.attach_filter(&filter)?;
        Ok(tap)
    }

    fn open(protocol: u16) -> io::Result<Self> {
        let socket = Socket::new(Domain::PACKET, Type::RAW, Some(Protocol::from(i32::from(protocol.to_be()))))?;
        socket.set_nonblocking(true)?;
        // As much as `net.core.rmem_max` allows, so that nothing is lost between two looks.
        socket.set_recv_buffer_size(1 << 20)?;
        Ok(Self(socket))
    }

    /// Sends a whole frame. A full queue is not an error: the frame is sent more than once anyway.
    pub(super) fn send(&self, frame: &[u8]) -> io::Result<()> {
        match self.0.send(frame) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(()),
            Err(error) if error.raw_os_error() == Some(nix::errno::Errno::ENOBUFS as i32) => Ok(()),
            result => result.map(drop),
        }
    }

    /// What has passed since the last call.
    pub(super) fn drain(&self) -> Vec<Seen> {
        let mut seen = Vec::new();
        let mut buffer = [0; 2048];
        while let Ok((length, Some(from))) = recvfrom::<LinkAddr>(self.0.as_raw_fd(), &mut buffer) {
            let frame = buffer[..length.min(buffer.len())].to_vec();
            let interface = u32::try_from(from.ifindex()).unwrap_or(0);
            seen.push(Seen { interface, outgoing: from.pkttype() == OUTGOING, frame });
        }
        seen
    }
}

/// The link-layer socket address of an interface. getifaddrs(3) is where one can be had without unsafe code; its protocol
/// is 0, for which packet(7) takes the socket's own.
fn link_address(interface: &str) -> io::Result<LinkAddr> {
    getifaddrs()?
        .filter(|entry| entry.interface_name == interface)
        .find_map(|entry| entry.address.as_ref().and_then(|address| address.as_link_addr().copied()))
        .filter(|address| address.len() > 0)
        .ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, format!("no interface {interface}")))
}
