//! Packet sockets on the bridge: whole frames in and out (`packet(7)`).

use std::io::{self, Read};
use std::net::{Ipv4Addr, SocketAddrV4};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use nix::sys::socket::{LinkAddr, bind, setsockopt, sockopt};
use socket2::{Domain, Protocol, SockFilter, Socket, Type};

use super::frame::SERVER_PORT;
use super::routes::Link;

/// Room for what a thousand VMs send in the same instant. It is taken only as far as it is filled.
const RECEIVE_BUFFER: usize = 8 << 20;

const ETHERTYPE_IPV4: u16 = 0x0800;
const ETHERTYPE_ARP: u16 = 0x0806;

/// Frames of one kind, from and to the bridge.
pub(super) struct FrameSocket(Socket);

impl FrameSocket {
    /// DHCP requests: IPv4, UDP, to port 67, not a fragment.
    pub fn dhcp(interface: &str, link: &Link) -> io::Result<Self> {
        Self::open(interface, link, ETHERTYPE_IPV4, &dhcp_filter(link.index))
    }

    /// ARP packets.
    pub fn arp(interface: &str, link: &Link) -> io::Result<Self> {
        Self::open(interface, link, ETHERTYPE_ARP, &arp_filter(link.index))
    }

    fn open(interface: &str, link: &Link, ethertype: u16, filter: &[SockFilter]) -> io::Result<Self> {
        let protocol = Protocol::from(i32::from(ethertype.to_be()));
        let socket = Socket::new(Domain::PACKET, Type::RAW, Some(protocol))?;
        socket.attach_filter(filter)?;
        socket.set_nonblocking(true)?;
        // Until it is bound it hears every interface, and until it had its filter it heard everything.
        while receive(&socket, &mut [0])?.is_some() {}
        grow_receive_buffer(&socket, RECEIVE_BUFFER);
        bind(socket.as_raw_fd(), &link_address(interface, link.index)?)?;
        Ok(Self(socket))
    }

    /// Reads the next frame, if one is there, and returns its length. A frame longer than the buffer is cut.
    pub fn receive(&self, buffer: &mut [u8]) -> io::Result<Option<usize>> {
        receive(&self.0, buffer)
    }

    /// Sends a frame.
    pub fn send(&self, frame: &[u8]) -> io::Result<()> {
        self.0.send(frame).map(|_| ())
    }
}

impl AsFd for FrameSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Holds port 67, so that a second DHCP server on the bridge is noticed and no VM is told that nobody listens. Requests
/// are read from the packet socket; what arrives here is dropped.
pub(super) fn claim_port(interface: &str) -> io::Result<Socket> {
    let socket = Socket::new(Domain::IPV4, Type::DGRAM, Some(Protocol::UDP))?;
    socket.attach_filter(&[ret(0)])?;
    socket.bind_device(Some(interface.as_bytes()))?;
    socket.bind(&SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, SERVER_PORT).into())?;
    Ok(socket)
}

fn receive(mut socket: &Socket, buffer: &mut [u8]) -> io::Result<Option<usize>> {
    match socket.read(buffer) {
        Ok(len) => Ok(Some(len)),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
        Err(error) => Err(error),
    }
}

/// Past the limit that the system sets for everyone, where we may.
fn grow_receive_buffer(socket: &Socket, bytes: usize) {
    if setsockopt(socket, sockopt::RcvBufForce, &bytes).is_err()
        && let Err(error) = socket.set_recv_buffer_size(bytes)
    {
        tracing::warn!(%error, "the receive buffer stays small; VMs that start together may have to ask twice");
    }
}

/// The address to bind a packet socket to. Its protocol is 0, which leaves the socket the one that it was made with.
fn link_address(interface: &str, index: u32) -> io::Result<LinkAddr> {
    let addresses = nix::ifaddrs::getifaddrs().map_err(io::Error::from)?;
    addresses
        .filter(|entry| entry.interface_name == interface)
        .find_map(|entry| entry.address?.as_link_addr().copied())
        .filter(|address| u32::try_from(address.ifindex()) == Ok(index))
        .ok_or_else(|| io::Error::from_raw_os_error(nix::libc::ENODEV))
}

// Classic BPF, as in linux/filter.h: what to do, and the offset of what the kernel knows besides the bytes.
const LOAD_BYTE: u16 = 0x30;
const LOAD_HALF: u16 = 0x28;
const LOAD_WORD: u16 = 0x20;
const LOAD_HALF_AFTER_IP_HEADER: u16 = 0x48;
const LOAD_IP_HEADER_LEN: u16 = 0xb1;
const JUMP_IF_EQUAL: u16 = 0x15;
const JUMP_IF_ANY_BIT: u16 = 0x45;
const RETURN: u16 = 0x06;
const PACKET_TYPE: u32 = 0xffff_f004;
const INTERFACE_INDEX: u32 = 0xffff_f008;
const PACKET_OTHERHOST: u32 = 3;

fn ret(len: u32) -> SockFilter {
    SockFilter::new(RETURN, 0, 0, len)
}

fn load(how: u16, at: u32) -> SockFilter {
    SockFilter::new(how, 0, 0, at)
}

/// Goes on if the value is this one, else skips so many instructions.
fn want(value: u32, else_skip: u8) -> SockFilter {
    SockFilter::new(JUMP_IF_EQUAL, 0, else_skip, value)
}

/// A frame in a VLAN counts as somebody else's.
fn dhcp_filter(index: u32) -> [SockFilter; 15] {
    [
        load(LOAD_WORD, INTERFACE_INDEX),
        want(index, 12),
        load(LOAD_WORD, PACKET_TYPE),
        SockFilter::new(JUMP_IF_EQUAL, 10, 0, PACKET_OTHERHOST),
        load(LOAD_HALF, 12),
        want(u32::from(ETHERTYPE_IPV4), 8),
        load(LOAD_BYTE, 23),
        want(17, 6),
        load(LOAD_HALF, 20),
        SockFilter::new(JUMP_IF_ANY_BIT, 4, 0, 0x1fff),
        load(LOAD_IP_HEADER_LEN, 14),
        load(LOAD_HALF_AFTER_IP_HEADER, 16),
        want(u32::from(SERVER_PORT), 1),
        ret(u32::MAX),
        ret(0),
    ]
}

fn arp_filter(index: u32) -> [SockFilter; 6] {
    [
        load(LOAD_WORD, INTERFACE_INDEX),
        want(index, 3),
        load(LOAD_HALF, 12),
        want(u32::from(ETHERTYPE_ARP), 1),
        ret(u32::MAX),
        ret(0),
    ]
}
