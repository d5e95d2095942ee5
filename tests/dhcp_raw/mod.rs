//! A DHCP client that says whatever a test wants, in whole frames, and other things that the DHCP tests share.

// Every test file is a crate of its own and uses the part it needs.
#![allow(dead_code, clippy::expect_used, clippy::panic, clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpStream};
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use dhcproto::v4::{DhcpOption, Message, MessageType};
use dhcproto::{Decodable, Decoder, Encodable, Encoder};
use socket2::{Domain, Protocol, Socket, Type};

use crate::support::{Node, Vm};

/// The server.
pub const SERVER: Ipv4Addr = Ipv4Addr::new(172, 20, 100, 1);

/// No address.
pub const NONE: Ipv4Addr = Ipv4Addr::UNSPECIFIED;

/// How long an answer may take that is expected.
pub const PATIENCE: Duration = Duration::from_secs(5);

/// How long to listen for one that must not come.
pub const SILENCE: Duration = Duration::from_millis(1500);

static XID: AtomicU32 = AtomicU32::new(1);

/// A host address of the subnet.
pub fn ip(n: u8) -> Ipv4Addr {
    Ipv4Addr::new(172, 20, 100, n)
}

/// A made-up station.
pub fn station(n: u16) -> [u8; 6] {
    let [high, low] = n.to_be_bytes();
    [0x52, 0x54, 0, 0, high, low]
}

/// An answer, with what the frame around it says.
#[derive(Debug)]
pub struct Answer {
    pub message: Message,
    pub to_mac: [u8; 6],
    pub to: Ipv4Addr,
    pub len: usize,
}

impl Answer {
    pub fn kind(&self) -> MessageType {
        self.message.opts().msg_type().expect("an answer has a type")
    }
}

/// A packet socket in a VM.
pub struct Raw {
    socket: Socket,
    pub mac: [u8; 6],
}

impl Raw {
    pub fn on(vm: &Vm) -> Self {
        let socket = vm.enter(|| {
            let socket = Socket::new(Domain::PACKET, Type::RAW, Some(Protocol::from(0x0800_i32.swap_bytes() >> 16)))
                .expect("a packet socket");
            let mut links = nix::ifaddrs::getifaddrs().expect("interfaces");
            let link = links.find_map(|link| {
                Some(link).filter(|link| link.interface_name == "eth0")?.address?.as_link_addr().copied()
            });
            nix::sys::socket::bind(socket.as_raw_fd(), &link.expect("eth0")).expect("bind to eth0");
            socket.set_recv_buffer_size(8 << 20).expect("a larger buffer");
            socket
        });
        Self { socket, mac: vm.mac() }
    }

    /// Sends a message in a frame from this station and this address.
    pub fn send_as(&self, sender: [u8; 6], source: Ipv4Addr, payload: &[u8]) {
        self.send_to(sender, source, Ipv4Addr::BROADCAST, payload);
    }

    /// The same to another address than everybody's.
    pub fn send_to(&self, sender: [u8; 6], source: Ipv4Addr, destination: Ipv4Addr, payload: &[u8]) {
        let udp_len = u16::try_from(8 + payload.len()).unwrap();
        let mut header = vec![0x45, 0];
        header.extend((20 + udp_len).to_be_bytes());
        header.extend([0, 0, 0, 0, 64, 17, 0, 0]);
        header.extend(source.octets());
        header.extend(destination.octets());
        let mut sum: u32 = header.chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(pair[1])).sum();
        while sum > 0xffff {
            sum = (sum & 0xffff) + (sum >> 16);
        }
        header[10..12].copy_from_slice(&(!(sum as u16)).to_be_bytes());
        let mut frame = vec![0xff; 6];
        frame.extend(sender);
        frame.extend([0x08, 0x00]);
        frame.extend(header);
        frame.extend([0, 68, 0, 67]);
        frame.extend(udp_len.to_be_bytes());
        frame.extend([0, 0]);
        frame.extend(payload);
        self.socket.send(&frame).expect("send");
    }

    pub fn send(&self, message: &Message) {
        self.send_as(self.mac, message.ciaddr(), &bytes(message));
    }

    /// The next answer to whatever `wanted` takes.
    pub fn receive_any(&self, within: Duration, wanted: impl Fn(&Message) -> bool) -> Option<Answer> {
        let end = Instant::now() + within;
        let mut frame = [0; 2048];
        loop {
            let left = end.checked_duration_since(Instant::now()).filter(|left| !left.is_zero())?;
            self.socket.set_read_timeout(Some(left)).unwrap();
            let Ok(len) = (&self.socket).read(&mut frame) else { continue };
            let Some(udp) = frame.get(34..len).filter(|udp| udp.len() > 8 && udp[..2] == [0, 67]) else { continue };
            let Ok(message) = Message::decode(&mut Decoder::new(&udp[8..])) else { continue };
            if wanted(&message) {
                let to = Ipv4Addr::new(frame[30], frame[31], frame[32], frame[33]);
                return Some(Answer { message, to_mac: frame[..6].try_into().unwrap(), to, len: udp.len() - 8 });
            }
        }
    }

    /// Sends a message as this client and waits for its answer.
    pub fn ask(&self, message: &Message, within: Duration) -> Option<Answer> {
        self.send(message);
        self.receive_any(within, |answer| answer.xid() == message.xid())
    }

    /// The address that a client is offered.
    pub fn offer_for(&self, chaddr: [u8; 6], within: Duration) -> Option<Ipv4Addr> {
        self.ask(&discover(chaddr), within).map(|answer| answer.message.yiaddr())
    }

    /// Asks for so many leases at once and returns those that were acknowledged in time. Nothing is sent twice.
    pub fn storm(&self, clients: std::ops::RangeInclusive<u16>, within: Duration) -> BTreeMap<u16, Ipv4Addr> {
        let mut acknowledged = BTreeMap::new();
        let end = Instant::now() + within;
        let wanted = clients.clone().count();
        clients.for_each(|client| self.send(&discover(station(client))));
        while acknowledged.len() < wanted {
            let Some(left) = end.checked_duration_since(Instant::now()) else { break };
            let Some(answer) = self.receive_any(left, |_| true) else { break };
            let chaddr: [u8; 6] = answer.message.chaddr().try_into().unwrap();
            match answer.kind() {
                MessageType::Offer => self.send(&select(chaddr, answer.message.yiaddr())),
                MessageType::Ack => {
                    let client = u16::from_be_bytes([chaddr[4], chaddr[5]]);
                    acknowledged.insert(client, answer.message.yiaddr());
                }
                other => panic!("{other:?} for {chaddr:?}"),
            }
        }
        acknowledged
    }

    /// DISCOVER, OFFER, REQUEST, ACK.
    pub fn lease_for(&self, chaddr: [u8; 6]) -> Option<Ipv4Addr> {
        let offered = self.offer_for(chaddr, SILENCE)?;
        let answer = self.ask(&select(chaddr, offered), PATIENCE).expect("an offer is kept");
        assert_eq!((answer.kind(), answer.message.yiaddr()), (MessageType::Ack, offered));
        Some(offered)
    }
}

pub fn bytes(message: &Message) -> Vec<u8> {
    let mut bytes = Vec::new();
    message.encode(&mut Encoder::new(&mut bytes)).expect("a message can be encoded");
    bytes
}

pub fn message(kind: MessageType, chaddr: [u8; 6]) -> Message {
    let mut message = Message::default();
    message.set_chaddr(&chaddr).set_xid(XID.fetch_add(1, Ordering::Relaxed));
    message.opts_mut().insert(DhcpOption::MessageType(kind));
    message
}

pub fn discover(chaddr: [u8; 6]) -> Message {
    message(MessageType::Discover, chaddr)
}

pub fn select(chaddr: [u8; 6], ip: Ipv4Addr) -> Message {
    let mut request = reboot(chaddr, ip);
    request.opts_mut().insert(DhcpOption::ServerIdentifier(SERVER));
    request
}

pub fn reboot(chaddr: [u8; 6], ip: Ipv4Addr) -> Message {
    let mut request = message(MessageType::Request, chaddr);
    request.opts_mut().insert(DhcpOption::RequestedIpAddress(ip));
    request
}

pub fn renew(chaddr: [u8; 6], ip: Ipv4Addr) -> Message {
    let mut request = message(MessageType::Request, chaddr);
    request.set_ciaddr(ip);
    request
}

pub fn release(chaddr: [u8; 6], ip: Ipv4Addr) -> Message {
    let mut request = message(MessageType::Release, chaddr);
    request.set_ciaddr(ip).opts_mut().insert(DhcpOption::ServerIdentifier(SERVER));
    request
}

pub fn decline(chaddr: [u8; 6], ip: Ipv4Addr) -> Message {
    let mut request = message(MessageType::Decline, chaddr);
    request.opts_mut().insert(DhcpOption::RequestedIpAddress(ip));
    request.opts_mut().insert(DhcpOption::ServerIdentifier(SERVER));
    request
}

/// Where the leases are.
pub const LEASES: &str = "/var/lib/cocoon/net/leases.json";

/// The value of a metric, 0 when it is not there.
pub fn metric(node: &Node, sample: &str) -> u64 {
    let text = node.enter(|| {
        let mut stream = TcpStream::connect(("127.0.0.1", 9092)).expect("the metrics end listens");
        stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: n\r\nConnection: close\r\n\r\n").expect("ask");
        let mut text = String::new();
        stream.read_to_string(&mut text).expect("an answer");
        text
    });
    let value = text.lines().find_map(|line| line.strip_prefix(sample)?.strip_prefix(' '));
    value.map_or(0, |value| value.parse().expect("a number"))
}

/// The addresses that have a host route through the bridge, in order.
pub fn routes(node: &Node) -> Vec<Ipv4Addr> {
    let listed = node.ok("ip -4 route show dev cni0 proto boot");
    let mut routes: Vec<Ipv4Addr> =
        listed.lines().filter_map(|line| line.split_whitespace().next()?.parse().ok()).collect();
    routes.sort();
    routes
}

/// Waits until something holds, for a few seconds.
#[track_caller]
pub fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(10);
    while !holds() {
        assert!(Instant::now() < end, "not within ten seconds: {what}");
        std::thread::sleep(Duration::from_millis(50));
    }
}
