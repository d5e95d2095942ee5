//! A datagram of an untrusted VM becomes a [`Request`], or is refused.
//!
//! Only what the server acts on is read (RFC 2131 section 2, RFC 2132): an odd host name or vendor option is no reason to
//! leave a VM without an address. What is read is read strictly, options that run past their field included.

use std::net::Ipv4Addr;

use super::Mac;

/// Length of the fixed fields and the magic cookie.
pub(super) const FIXED_LEN: usize = 240;

/// What tells DHCP options from other vendor data (RFC 1497).
pub(super) const MAGIC_COOKIE: [u8; 4] = [99, 130, 83, 99];

const OP_REQUEST: u8 = 1;
const HTYPE_ETHERNET: u8 = 1;
const HLEN_ETHERNET: u8 = 6;
const BROADCAST_FLAG: u16 = 0x8000;

/// Codes of the options that are read or written (RFC 2132, RFC 3046).
pub(super) mod code {
    pub const PAD: u8 = 0;
    pub const SUBNET_MASK: u8 = 1;
    pub const ROUTER: u8 = 3;
    pub const DNS: u8 = 6;
    pub const MTU: u8 = 26;
    pub const REQUESTED_ADDRESS: u8 = 50;
    pub const LEASE_TIME: u8 = 51;
    pub const OVERLOAD: u8 = 52;
    pub const MESSAGE_TYPE: u8 = 53;
    pub const SERVER_ID: u8 = 54;
    pub const MESSAGE: u8 = 56;
    pub const MAX_MESSAGE_SIZE: u8 = 57;
    pub const RENEWAL_TIME: u8 = 58;
    pub const REBINDING_TIME: u8 = 59;
    pub const CLIENT_ID: u8 = 61;
    pub const RELAY_INFO: u8 = 82;
    pub const END: u8 = 255;
}

/// What a client wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Looks for servers.
    Discover,
    /// Takes an offer, or wants to keep what it has.
    Request,
    /// Found the address in use.
    Decline,
    /// Gives the address back.
    Release,
    /// Has an address and wants the other parameters.
    Inform,
}

/// What a client sent, less what the server has no use for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    /// What it wants.
    pub kind: Kind,
    /// Transaction id, echoed.
    pub xid: u32,
    /// Flags, echoed.
    pub flags: u16,
    /// The address that the client has and answers ARP for, or 0.0.0.0.
    pub ciaddr: Ipv4Addr,
    /// The relay's address, or 0.0.0.0.
    pub giaddr: Ipv4Addr,
    /// The client's hardware address.
    pub chaddr: Mac,
    /// Option 50.
    pub requested: Option<Ipv4Addr>,
    /// Option 54.
    pub server_id: Option<Ipv4Addr>,
    /// Option 57, in bytes of IP datagram.
    pub max_message_size: Option<u16>,
    /// Option 61, echoed (RFC 6842).
    pub client_id: Option<Vec<u8>>,
    /// Option 82, echoed (RFC 3046 section 2.2).
    pub relay_info: Option<Vec<u8>>,
    /// Source address of the IP packet.
    pub source: Ipv4Addr,
    /// Source address of the Ethernet frame: the client's, or the relay's.
    pub sender: Mac,
}

impl Request {
    /// Whether the client asks to be answered by broadcast.
    #[must_use]
    pub fn wants_broadcast(&self) -> bool {
        self.flags & BROADCAST_FLAG != 0
    }

    /// Whether a relay passed it on.
    #[must_use]
    pub fn is_relayed(&self) -> bool {
        !self.giaddr.is_unspecified()
    }
}

/// A UDP payload and where it came from.
#[derive(Debug, Clone, Copy)]
pub struct Datagram<'a> {
    /// Source address of the Ethernet frame.
    pub sender: Mac,
    /// Source address of the IP packet.
    pub source: Ipv4Addr,
    /// Its destination.
    pub destination: Ipv4Addr,
    /// The DHCP message.
    pub payload: &'a [u8],
}

/// Why a datagram is not a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Malformed {
    /// Shorter than the fixed fields.
    #[error("it is shorter than 240 bytes")]
    Short,
    /// Not a BOOTREQUEST: a reply, most likely of another server.
    #[error("it is not a request")]
    NotRequest,
    /// Hardware type and length are not those of Ethernet.
    #[error("its hardware address is not an Ethernet address")]
    Hardware,
    /// The hardware address is all zeros or a group address.
    #[error("its hardware address cannot be a station's")]
    NotStation,
    /// BOOTP without DHCP, or something else altogether.
    #[error("the magic cookie is missing")]
    Cookie,
    /// An option runs past the field that holds it.
    #[error("an option is truncated")]
    Truncated,
    /// An option that is read has a length that its type cannot have.
    #[error("option {0} has a wrong length")]
    OptionLength(u8),
    /// Option 52 has a value that does not exist.
    #[error("option overload is neither 1, 2 nor 3")]
    Overload,
    /// Option 53 is missing, or not one that a client sends.
    #[error("it is not a message that a client sends")]
    MessageType,
}

impl<'a> TryFrom<Datagram<'a>> for Request {
    type Error = Malformed;

    fn try_from(datagram: Datagram<'a>) -> Result<Self, Malformed> {
        let (fixed, field) = datagram.payload.split_first_chunk::<FIXED_LEN>().ok_or(Malformed::Short)?;
        if fixed[0] != OP_REQUEST {
            return Err(Malformed::NotRequest);
        }
        // Before anything takes `hlen` for the length of `chaddr`: it may say 255, and `chaddr` has 16 bytes.
        if fixed[1] != HTYPE_ETHERNET || fixed[2] != HLEN_ETHERNET {
            return Err(Malformed::Hardware);
        }
        if fixed[236..] != MAGIC_COOKIE {
            return Err(Malformed::Cookie);
        }
        let chaddr = Mac([fixed[28], fixed[29], fixed[30], fixed[31], fixed[32], fixed[33]]);
        if !chaddr.is_station() {
            return Err(Malformed::NotStation);
        }
        let options = Options::read(fixed, field)?;
        Ok(Self {
            kind: options.kind.ok_or(Malformed::MessageType)?,
            xid: u32::from_be_bytes([fixed[4], fixed[5], fixed[6], fixed[7]]),
            flags: u16::from_be_bytes([fixed[10], fixed[11]]),
            ciaddr: Ipv4Addr::new(fixed[12], fixed[13], fixed[14], fixed[15]),
            giaddr: Ipv4Addr::new(fixed[24], fixed[25], fixed[26], fixed[27]),
            chaddr,
            requested: options.requested,
            server_id: options.server_id,
            max_message_size: options.max_message_size,
            client_id: options.client_id,
            relay_info: options.relay_info,
            source: datagram.source,
            sender: datagram.sender,
        })
    }
}

/// The options that are read.
#[derive(Default)]
struct Options {
    kind: Option<Kind>,
    overload: u8,
    requested: Option<Ipv4Addr>,
    server_id: Option<Ipv4Addr>,
    max_message_size: Option<u16>,
    client_id: Option<Vec<u8>>,
    relay_info: Option<Vec<u8>>,
}

impl Options {
    /// Reads the options field, then, when option 52 says so, `file` and `sname`, in that order (RFC 2131 section 4.1).
    fn read(fixed: &[u8; FIXED_LEN], field: &[u8]) -> Result<Self, Malformed> {
        let (sname, file) = (&fixed[44..108], &fixed[108..236]);
        let mut options = Self::default();
        options.walk(field)?;
        // Read once: an overload option inside an overloaded field is not a thing.
        let overload = options.overload;
        if overload & 1 != 0 {
            options.walk(file)?;
        }
        if overload & 2 != 0 {
            options.walk(sname)?;
        }
        Ok(options)
    }

    /// Takes one field apart. A missing end marker is forgiven, as some clients fill the field to its last byte.
    fn walk(&mut self, mut field: &[u8]) -> Result<(), Malformed> {
        loop {
            match *field {
                [] | [code::END, ..] => return Ok(()),
                [code::PAD, ref rest @ ..] => field = rest,
                [option, length, ref rest @ ..] => {
                    let (value, rest) = rest.split_at_checked(length.into()).ok_or(Malformed::Truncated)?;
                    self.take(option, value)?;
                    field = rest;
                }
                [_] => return Err(Malformed::Truncated),
            }
        }
    }

    fn take(&mut self, option: u8, value: &[u8]) -> Result<(), Malformed> {
        let bad_length = || Malformed::OptionLength(option);
        let address = || value.try_into().map(|octets: [u8; 4]| Ipv4Addr::from(octets)).map_err(|_| bad_length());
        match option {
            code::MESSAGE_TYPE => {
                let [value] = *value else { return Err(bad_length()) };
                self.kind = Some(kind(value).ok_or(Malformed::MessageType)?);
            }
            code::OVERLOAD => match *value {
                [overload @ 1..=3] => self.overload = overload,
                [_] => return Err(Malformed::Overload),
                _ => return Err(bad_length()),
            },
            code::REQUESTED_ADDRESS => self.requested = Some(address()?),
            code::SERVER_ID => self.server_id = Some(address()?),
            code::MAX_MESSAGE_SIZE => {
                self.max_message_size = Some(u16::from_be_bytes(value.try_into().map_err(|_| bad_length())?));
            }
            // These two may be longer than one option holds: their parts are joined (RFC 3396).
            code::CLIENT_ID => self.client_id.get_or_insert_default().extend_from_slice(value),
            code::RELAY_INFO => self.relay_info.get_or_insert_default().extend_from_slice(value),
            _ => {}
        }
        Ok(())
    }
}

/// The messages that clients send, by their value of option 53 (RFC 2132 section 9.6).
fn kind(value: u8) -> Option<Kind> {
    match value {
        1 => Some(Kind::Discover),
        3 => Some(Kind::Request),
        4 => Some(Kind::Decline),
        7 => Some(Kind::Release),
        8 => Some(Kind::Inform),
        _ => None,
    }
}

#[cfg(test)]
mod tests;
