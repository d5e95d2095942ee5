//! Traffic that arrives, or does not.
//!
//! What should arrive gets a few seconds of tries (neighbour discovery, a server that starts); what should not, three.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, UdpSocket};
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::{JoinHandle, sleep, spawn};
use std::time::{Duration, Instant};
use std::{fmt, io};

use nix::ifaddrs::getifaddrs;
use nix::sys::socket::{
    AddressFamily, LinkAddr, MsgFlags, SockFlag, SockProtocol, SockType, bind, recv, send, setsockopt, socket, sockopt,
};
use nix::sys::time::TimeVal;
use socket2::{Domain, Socket, Type};

use super::host::Host;
use super::process::eventually;
use super::vm::Vm;

const PATIENCE: Duration = Duration::from_secs(5);
const ANSWER: Duration = Duration::from_millis(400);
const TRIES: usize = 3;

impl Host {
    /// Whether an address (`10.1.2.3`, `fe80::1%eth0`) answers one ping within a second.
    pub fn pings(&self, address: impl fmt::Display) -> bool {
        self.run(format!("ping -n -q -c 1 -W 1 {address}")).status.success()
    }

    /// Whether an address answers ping, within a few seconds of tries.
    pub fn reaches(&self, address: impl fmt::Display) -> bool {
        eventually(PATIENCE, || self.run(format!("ping -n -q -c 1 -W 0.5 {address}")).status.success())
    }

    /// Whether three pings of an address are all lost. Panics if none could be sent: that would prove nothing.
    #[track_caller]
    pub fn is_cut_off_from(&self, address: impl fmt::Display) -> bool {
        let ping = self.run(format!("ping -n -q -c {TRIES} -i 0.2 -W 0.5 {address}"));
        assert!(ping.code() < 2, "no ping could be sent: {ping}");
        ping.code() == 1
    }

    /// Whether a TCP connection to `10.1.2.3:80` is accepted, within a few seconds of tries.
    pub fn tcp_reaches(&self, address: &str) -> bool {
        let address = address.parse().expect("an address and a port");
        eventually(PATIENCE, || self.connect(address).is_ok())
    }

    /// Whether three connection attempts get no answer at all; a refusal is an answer.
    pub fn tcp_is_cut_off_from(&self, address: &str) -> bool {
        let address = address.parse().expect("an address and a port");
        (0..TRIES).all(|_| self.connect(address).is_err_and(|error| error.kind() != io::ErrorKind::ConnectionRefused))
    }

    /// Whether an [`Echo`] at `10.1.2.3:80` sends a UDP datagram back, within a few seconds of tries.
    pub fn udp_reaches(&self, address: &str) -> bool {
        let address = address.parse().expect("an address and a port");
        eventually(PATIENCE, || self.ask(address).is_ok())
    }

    /// Whether three UDP datagrams get no answer at all; a refusal is an answer.
    pub fn udp_is_cut_off_from(&self, address: &str) -> bool {
        let address = address.parse().expect("an address and a port");
        (0..TRIES).all(|_| self.ask(address).is_err_and(|error| error.kind() != io::ErrorKind::ConnectionRefused))
    }

    /// Serves TCP and UDP at an address of this namespace: what comes in goes back.
    pub fn echo(&self, address: &str) -> Echo {
        let address: SocketAddr = address.parse().expect("an address and a port");
        let sockets = self.enter(move || Ok::<_, io::Error>((TcpListener::bind(address)?, UdpSocket::bind(address)?)));
        let (tcp, udp) = sockets.unwrap_or_else(|error| panic!("cannot listen at {address}: {error}"));
        Echo::over(tcp, udp)
    }

    /// Takes down every frame that passes an interface, in either direction.
    pub fn sniff(&self, interface: &str) -> Sniffer {
        Sniffer(self.packet_socket(interface))
    }

    /// Sends a frame out of an interface as it is.
    pub fn send_frame(&self, interface: &str, frame: &[u8]) {
        let socket = self.packet_socket(interface);
        send(socket.as_raw_fd(), frame, MsgFlags::empty()).expect("cannot send a frame");
    }

    fn connect(&self, address: SocketAddr) -> io::Result<()> {
        let socket = self.enter(move || Socket::new(Domain::for_address(address), Type::STREAM, None))?;
        socket.connect_timeout(&address.into(), ANSWER)
    }

    fn ask(&self, address: SocketAddr) -> io::Result<()> {
        let socket: UdpSocket =
            self.enter(move || Socket::new(Domain::for_address(address), Type::DGRAM, None))?.into();
        socket.connect(address)?;
        socket.set_read_timeout(Some(ANSWER))?;
        socket.send(b"ping")?;
        socket.recv(&mut [0; 16]).map(|_| ())
    }

    fn packet_socket(&self, interface: &str) -> Socket {
        let name = interface.to_owned();
        let socket = self.enter(move || {
            let address = link_address(&name)?;
            let family = AddressFamily::Packet;
            let socket = socket(family, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::EthAll)?;
            bind(socket.as_raw_fd(), &address)?;
            Ok::<_, nix::Error>(Socket::from(socket))
        });
        socket.unwrap_or_else(|error| panic!("{}: cannot open a packet socket on {interface}: {error}", self.name()))
    }
}

impl Vm {
    /// Whether another VM receives a frame that this one sends to it, within three tries.
    pub fn frame_reaches(&self, other: &Vm, frame: &Frame) -> bool {
        static COUNT: AtomicUsize = AtomicUsize::new(0);
        let marker = format!("<cocoon-net test frame {}>", COUNT.fetch_add(1, Ordering::Relaxed));
        let bytes = frame.bytes(self.mac(), other.mac(), marker.as_bytes());
        let ears = other.sniff("eth0");
        (0..TRIES).any(|_| {
            self.send_frame("eth0", &bytes);
            ears.hears(marker.as_bytes(), Duration::from_millis(200))
        })
    }
}

/// An Ethernet frame from one VM to another; its payload ends with a marker that is looked for on the other side.
#[derive(Debug, Clone, Default)]
pub struct Frame {
    /// The innermost EtherType, as in `0x88b5`.
    pub ethertype: u16,
    /// VLAN ids of 802.1Q tags, outermost first.
    pub vlans: Vec<u16>,
    /// What precedes the marker: an ARP or IP header, for instance.
    pub header: Vec<u8>,
    /// Where it goes, if not to the other VM's MAC address.
    pub destination: Option<[u8; 6]>,
    /// Where it claims to come from, if not from the VM's own MAC address.
    pub source: Option<[u8; 6]>,
}

impl Frame {
    /// A frame of this EtherType.
    pub fn new(ethertype: u16) -> Self {
        Self { ethertype, ..Self::default() }
    }

    /// The frame within an 802.1Q tag.
    pub fn vlan(mut self, id: u16) -> Self {
        self.vlans.insert(0, id);
        self
    }

    /// With a protocol header before the marker.
    pub fn header(mut self, header: impl Into<Vec<u8>>) -> Self {
        self.header = header.into();
        self
    }

    /// Sent to everyone.
    pub fn broadcast(mut self) -> Self {
        self.destination = Some([0xff; 6]);
        self
    }

    /// Sent under another's MAC address.
    pub fn from(mut self, mac: [u8; 6]) -> Self {
        self.source = Some(mac);
        self
    }

    fn bytes(&self, from: [u8; 6], to: [u8; 6], marker: &[u8]) -> Vec<u8> {
        let mut frame = [self.destination.unwrap_or(to), self.source.unwrap_or(from)].concat();
        for vlan in &self.vlans {
            frame.extend([0x8100_u16.to_be_bytes(), vlan.to_be_bytes()].concat());
        }
        frame.extend(self.ethertype.to_be_bytes());
        frame.extend(&self.header);
        frame.extend(marker);
        frame.resize(frame.len().max(60), 0);
        frame
    }
}

/// A capture that runs from when it is made.
pub struct Sniffer(Socket);

impl Sniffer {
    /// Whether a frame that contains these bytes comes by within this time.
    pub fn hears(&self, marker: &[u8], patience: Duration) -> bool {
        self.find(patience, |frame| frame.windows(marker.len()).any(|window| window == marker)).is_some()
    }

    /// The first frame that fits, if it comes by within this time. The kernel has taken a VLAN tag off by then.
    pub fn find(&self, patience: Duration, fits: impl Fn(&[u8]) -> bool) -> Option<Vec<u8>> {
        let end = Instant::now() + patience;
        let mut frame = vec![0; 65536];
        while let Some(left) = end.checked_duration_since(Instant::now()).filter(|left| left.as_micros() > 0) {
            let left = TimeVal::new(left.as_secs().try_into().ok()?, left.subsec_micros().into());
            setsockopt(&self.0, sockopt::ReceiveTimeout, &left).expect("a timeout above zero");
            match recv(self.0.as_raw_fd(), &mut frame, MsgFlags::empty()) {
                Ok(length) if fits(&frame[..length]) => return Some(frame[..length].to_vec()),
                _ => {}
            }
        }
        None
    }
}

/// A TCP and UDP server that sends back what it gets, until it is dropped.
pub struct Echo {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Echo {
    fn over(tcp: TcpListener, udp: UdpSocket) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        tcp.set_nonblocking(true).expect("a socket can be non-blocking");
        udp.set_read_timeout(Some(Duration::from_millis(50))).expect("a timeout above zero");
        let (on_tcp, on_udp) = (Arc::clone(&stop), Arc::clone(&stop));
        let tcp = spawn(move || {
            while !on_tcp.load(Ordering::Relaxed) {
                match tcp.accept() {
                    Ok((mut stream, _)) => {
                        let mut bytes = [0; 2048];
                        let _ = stream.set_read_timeout(Some(Duration::from_millis(200)));
                        let _ = stream.read(&mut bytes).and_then(|length| stream.write_all(&bytes[..length]));
                    }
                    Err(_) => sleep(Duration::from_millis(10)),
                }
            }
        });
        let udp = spawn(move || {
            let mut bytes = [0; 2048];
            while !on_udp.load(Ordering::Relaxed) {
                if let Ok((length, from)) = udp.recv_from(&mut bytes) {
                    let _ = udp.send_to(&bytes[..length], from);
                }
            }
        });
        Self { stop, threads: vec![tcp, udp] }
    }
}

impl Drop for Echo {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

fn link_address(interface: &str) -> nix::Result<LinkAddr> {
    let mine = |entry: nix::ifaddrs::InterfaceAddress| {
        let address = entry.address?;
        (entry.interface_name == interface).then_some(*address.as_link_addr()?)
    };
    getifaddrs()?.find_map(mine).ok_or(nix::Error::ENODEV)
}
