//! Requests to the kernel over one blocking rtnetlink socket: many in one call, each with its own answer.
//!
//! The kernel answers within the call that sends, so nothing here waits.

use std::io;
use std::time::Duration;

use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};
use rtnetlink::packet_core::{
    NLM_F_ACK, NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage, NetlinkPayload,
};
use rtnetlink::packet_route::RouteNetlinkMessage;
use socket2::SockRef;

/// Requests sent at once. Their answers must fit into the socket's receive buffer.
const BATCH: usize = 64;

/// The largest piece of a dump that the kernel sends.
const RECEIVE_LEN: usize = 32 << 10;

/// How often a dump is tried again that changed while it was read.
const DUMP_TRIES: u32 = 5;

/// Nothing takes this long; it only keeps a lost answer from stopping the server for ever.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);

/// A connection to the kernel's routing tables.
pub(super) struct Netlink {
    socket: Socket,
    sequence: u32,
    buffer: Vec<u8>,
}

impl Netlink {
    /// Connects.
    pub fn open() -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_ROUTE)?;
        socket.bind_auto()?;
        socket.connect(&SocketAddr::new(0, 0))?;
        // Lets dumps be filtered by the kernel; one too old for that filters nothing, and we do it again ourselves.
        let _ = socket.set_netlink_get_strict_chk(true);
        SockRef::from(&socket).set_read_timeout(Some(ANSWER_TIMEOUT))?;
        Ok(Self { socket, sequence: 0, buffer: Vec::new() })
    }

    /// Carries out requests in order, whatever becomes of each.
    pub fn execute(&mut self, requests: Vec<(RouteNetlinkMessage, u16)>) -> io::Result<Vec<io::Result<()>>> {
        let mut results: Vec<io::Result<()>> = Vec::with_capacity(requests.len());
        let mut requests = requests.into_iter().peekable();
        while requests.peek().is_some() {
            let first = self.sequence.wrapping_add(1);
            let mut bytes = Vec::new();
            let mut sent = 0;
            for (message, flags) in requests.by_ref().take(BATCH) {
                self.push(&mut bytes, message, NLM_F_REQUEST | NLM_F_ACK | flags);
                sent += 1;
            }
            self.socket.send(&bytes, 0)?;
            let start = results.len();
            results.resize_with(start + sent, || Err(io::ErrorKind::TimedOut.into()));
            let mut missing = sent;
            while missing > 0 {
                self.receive(|header, payload| {
                    let index = header.sequence_number.wrapping_sub(first) as usize;
                    if let (NetlinkPayload::Error(error), Some(result)) = (payload, results.get_mut(start + index)) {
                        *result = if error.code.is_some() { Err(error.to_io()) } else { Ok(()) };
                        missing = missing.saturating_sub(1);
                    }
                })?;
            }
        }
        Ok(results)
    }

    /// Asks for one object.
    pub fn get(&mut self, message: RouteNetlinkMessage) -> io::Result<RouteNetlinkMessage> {
        let mut bytes = Vec::new();
        let sequence = self.push(&mut bytes, message, NLM_F_REQUEST);
        self.socket.send(&bytes, 0)?;
        let mut answer = None;
        while answer.is_none() {
            self.receive(|header, payload| {
                if header.sequence_number == sequence {
                    answer = match payload {
                        NetlinkPayload::InnerMessage(message) => Some(Ok(message)),
                        NetlinkPayload::Error(error) => Some(Err(error.to_io())),
                        _ => None,
                    };
                }
            })?;
        }
        answer.unwrap_or_else(|| Err(io::ErrorKind::TimedOut.into()))
    }

    /// Asks for all objects of a kind. A list that changed while it was read is read again.
    pub fn dump(&mut self, message: &RouteNetlinkMessage) -> io::Result<Vec<RouteNetlinkMessage>> {
        for _ in 0..DUMP_TRIES {
            if let Some(objects) = self.dump_once(message.clone())? {
                return Ok(objects);
            }
        }
        Err(io::Error::other("the list kept changing while it was read"))
    }

    fn dump_once(&mut self, message: RouteNetlinkMessage) -> io::Result<Option<Vec<RouteNetlinkMessage>>> {
        let mut bytes = Vec::new();
        let sequence = self.push(&mut bytes, message, NLM_F_REQUEST | NLM_F_DUMP);
        self.socket.send(&bytes, 0)?;
        let (mut objects, mut interrupted, mut end) = (Vec::new(), false, None);
        while end.is_none() {
            self.receive(|header, payload| {
                if header.sequence_number != sequence {
                    return;
                }
                interrupted |= header.flags & NLM_F_DUMP_INTR != 0;
                match payload {
                    NetlinkPayload::InnerMessage(message) => objects.push(message),
                    NetlinkPayload::Done(_) => end = Some(Ok(())),
                    NetlinkPayload::Error(error) => end = Some(Err(error.to_io())),
                    _ => {}
                }
            })?;
        }
        end.unwrap_or(Ok(()))?;
        Ok((!interrupted).then_some(objects))
    }

    fn push(&mut self, bytes: &mut Vec<u8>, message: RouteNetlinkMessage, flags: u16) -> u32 {
        self.sequence = self.sequence.wrapping_add(1);
        let mut header = NetlinkHeader::default();
        header.flags = flags;
        header.sequence_number = self.sequence;
        let mut message = NetlinkMessage::new(header, NetlinkPayload::from(message));
        message.finalize();
        let start = bytes.len();
        bytes.resize(start + message.buffer_len().next_multiple_of(4), 0);
        message.serialize(&mut bytes[start..]);
        self.sequence
    }

    /// Receives one piece of an answer and hands its messages on.
    fn receive(&mut self, mut each: impl FnMut(NetlinkHeader, NetlinkPayload<RouteNetlinkMessage>)) -> io::Result<()> {
        self.buffer.clear();
        self.buffer.reserve(RECEIVE_LEN);
        self.socket.recv(&mut self.buffer, 0)?;
        let mut rest = self.buffer.as_slice();
        while !rest.is_empty() {
            let message = NetlinkMessage::<RouteNetlinkMessage>::deserialize(rest).map_err(io::Error::other)?;
            let len = (message.header.length as usize).next_multiple_of(4).max(4);
            each(message.header, message.payload);
            rest = rest.get(len..).unwrap_or_default();
        }
        Ok(())
    }
}
