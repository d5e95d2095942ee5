//! Reading an ipset through netlink, without starting a process: cheap enough for each second.
//!
//! The protocol is that of linux/netfilter/ipset/ip_set.h, version 6; ipset(8) speaks the same.

use std::collections::hash_map::DefaultHasher;
use std::hash::{Hash, Hasher};
use std::io;

use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_NETFILTER};
use nix::errno::Errno;

use super::wire::{MESSAGE_HEADER, attribute, attributes, messages, push_attribute, u32_at};

const NFNL_SUBSYS_IPSET: u16 = 6;
const IPSET_CMD_LIST: u16 = 7;
const IPSET_PROTOCOL: u8 = 6;
const IPSET_ATTR_PROTOCOL: u16 = 1;
const IPSET_ATTR_SETNAME: u16 = 2;
const IPSET_ATTR_TYPENAME: u16 = 3;
const IPSET_ATTR_DATA: u16 = 7;
const IPSET_ATTR_ADT: u16 = 8;
const IPSET_ATTR_IP: u16 = 1;
const IPSET_ATTR_CIDR: u16 = 3;
const NFGENMSG: usize = 4;

const NLM_F_REQUEST: u16 = 0x1;
const NLM_F_ACK: u16 = 0x4;
const NLM_F_DUMP: u16 = 0x300;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;

/// A digest of a set's name, type and elements, whatever their counters say: it changes when the set is edited,
/// flushed, destroyed or replaced by another. `None`: there is no such set.
///
/// # Errors
/// What the kernel answered, `EPERM` and the lack of ipset support included.
pub(super) fn digest(set: &str) -> io::Result<Option<u64>> {
    let mut socket = Socket::new(NETLINK_NETFILTER)?;
    socket.bind_auto()?;
    // Netlink answers within the system call that asks, so a read that would block means a lost answer.
    socket.set_non_blocking(true)?;
    socket.send_to(&list_request(set), &SocketAddr::new(0, 0), 0)?;

    // Elements come in the order of a hash table whose seed changes with each set: sum up, do not chain.
    let (mut sum, mut found) = (0u64, false);
    let mut buffer = Vec::with_capacity(64 << 10);
    loop {
        buffer.clear();
        socket.recv(&mut buffer, 0)?;
        for (kind, payload) in messages(&buffer) {
            match kind {
                NLMSG_DONE | NLMSG_ERROR => return ended(payload).map(|()| found.then_some(sum)),
                _ => {
                    found = true;
                    sum = sum.wrapping_add(elements(payload));
                }
            }
        }
    }
}

/// How a dump ended: `ENOENT` means that there is no such set.
fn ended(payload: &[u8]) -> io::Result<()> {
    let code = u32_at(payload, 0).map_or(0, u32::cast_signed).saturating_neg();
    match Errno::from_raw(code) {
        _ if code <= 0 => Ok(()),
        Errno::ENOENT => Ok(()),
        errno => Err(io::Error::from(errno)),
    }
}

fn elements(payload: &[u8]) -> u64 {
    let name = attribute(payload, NFGENMSG, IPSET_ATTR_TYPENAME).map_or(0, |name| hash(&name));
    let Some(list) = attribute(payload, NFGENMSG, IPSET_ATTR_ADT) else { return name };
    attributes(list)
        .filter(|(kind, _)| *kind == IPSET_ATTR_DATA)
        .map(|(_, element)| hash(&(attribute(element, 0, IPSET_ATTR_IP), attribute(element, 0, IPSET_ATTR_CIDR))))
        .fold(name, u64::wrapping_add)
}

fn hash(value: &impl Hash) -> u64 {
    let mut hasher = DefaultHasher::new();
    value.hash(&mut hasher);
    hasher.finish()
}

fn list_request(set: &str) -> Vec<u8> {
    let mut message = vec![0; MESSAGE_HEADER + NFGENMSG];
    push_attribute(&mut message, IPSET_ATTR_PROTOCOL, &[IPSET_PROTOCOL]);
    push_attribute(&mut message, IPSET_ATTR_SETNAME, &[set.as_bytes(), &[0]].concat());
    let length = u32::try_from(message.len()).unwrap_or(0);
    message[0..4].copy_from_slice(&length.to_ne_bytes());
    message[4..6].copy_from_slice(&(NFNL_SUBSYS_IPSET << 8 | IPSET_CMD_LIST).to_ne_bytes());
    message[6..8].copy_from_slice(&(NLM_F_REQUEST | NLM_F_ACK | NLM_F_DUMP).to_ne_bytes());
    message
}
