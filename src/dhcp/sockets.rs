//! Packet sockets on the bridge: whole frames in and out (`packet(7)`).

use std::io::{self, Read};
use std::net::{Ipv4Addr, SocketAddrV4};
use std::os::fd::{AsFd, BorrowedFd};

use nix::libc::{AF_PACKET, sockaddr_ll};
use nix::sys::socket::{setsockopt, sockopt};
use socket2::{Domain, Protocol, SockAddr, SockAddrStorage, SockFilter, Socket, Type};

use super::frame::SERVER_PORT;
use super::routes::Link;

/// Room for what a thousand VMs send in the same instant. It is taken only as far as it is filled.
const RECEIVE_BUFFER: usize = 8 << 20;

const ETHERTYPE_IPV4: u16 = 0x0800;
const ETHERTYPE_ARP: u16 = 0x0806;

/// Frames of one kind, from and to the bridge.
#[derive(Debug)]
pub(super) struct FrameSocket(Socket);

impl FrameSocket {
    /// DHCP requests: IPv4, UDP, to port 67, not a fragment.
    pub fn dhcp(link: &Link) -> io::Result<Self> {
        let socket = Self::open(link, ETHERTYPE_IPV4, &dhcp_filter(link.index))?;
        grow_receive_buffer(&socket.0, RECEIVE_BUFFER);
        Ok(socket)
    }

    /// ARP packets, once [`FrameSocket::listen_for_arp`] says so.
    pub fn arp(link: &Link) -> io::Result<Self> {
        Self::open(link, ETHERTYPE_ARP, &[ret(0)])
    }

    /// Begins to hear ARP packets on this link, or ceases to. What was not read is thrown away. Closing the socket instead
    /// would wait for an RCU grace period.
    pub fn listen_for_arp(&self, link: &Link, listen: bool) -> io::Result<()> {
        if listen {
            self.0.attach_filter(&arp_filter(link.index))?;
        } else {
            self.0.attach_filter(&[ret(0)])?;
        }
        // An interface that was down meanwhile has left an error behind, once.
        let _ = self.receive(&mut [0]);
        while self.receive(&mut [0])?.is_some() {}
        Ok(())
    }

    /// Without a protocol it hears nothing before it is bound.
    fn open(link: &Link, ethertype: u16, filter: &[SockFilter]) -> io::Result<Self> {
        let socket = Socket::new(Domain::PACKET, Type::RAW, None)?;
        socket.attach_filter(filter)?;
        socket.set_nonblocking(true)?;
        socket.bind(&link_address(link, ethertype))?;
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

/// The address that makes a packet socket hear frames of this type on this interface (`struct sockaddr_ll`, packet(7)).
#[expect(
    unsafe_code,
    reason = "no crate makes this address with a protocol in it. A socket that is made with its protocol, and bound \
              without, hears every interface first; bind(2) then waits for an RCU grace period, tens of milliseconds \
              in which nobody is answered"
)]
fn link_address(link: &Link, ethertype: u16) -> SockAddr {
    let mut storage = SockAddrStorage::zeroed();
    // SAFETY: storage is large and aligned enough for every kind of address, and this kind has no invalid values.
    let address = unsafe { storage.view_as::<sockaddr_ll>() };
    address.sll_family = AF_PACKET as u16;
    address.sll_protocol = ethertype.to_be();
    address.sll_ifindex = link.index.cast_signed();
    // SAFETY: the address is that of its family, and as long as all of it.
    unsafe { SockAddr::new(storage, size_of::<sockaddr_ll>() as u32) }
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
