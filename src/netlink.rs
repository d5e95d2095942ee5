//! Netlink where no crate reaches: netfilter's subsystems, and events of which two or three fields count.
//!
//! Messages (`struct nlmsghdr`, netlink(7)) and their attributes (`struct nlattr`) are walked instead of decoded. What
//! is cut short ends the walk.

use std::io;

use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_NETFILTER};
use nix::errno::Errno;

/// Bytes of `struct nlmsghdr`.
pub(crate) const MESSAGE_HEADER: usize = 16;

/// Bytes of `struct nfgenmsg` (linux/netfilter/nfnetlink.h), which begins every netfilter message.
pub(crate) const NFGENMSG: usize = 4;

/// The subsystem of nftables (linux/netfilter/nfnetlink.h), and the families of its tables (linux/netfilter.h).
pub(crate) const NFNL_SUBSYS_NFTABLES: u16 = 10;
pub(crate) const NFPROTO_IPV4: u8 = 2;
pub(crate) const NFPROTO_IPV6: u8 = 10;

/// Flags and types of linux/netlink.h.
pub(crate) const NLM_F_ACK: u16 = 0x4;
pub(crate) const NLM_F_DUMP: u16 = 0x300;
const NLM_F_REQUEST: u16 = 0x1;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;

/// Room for one datagram: the kernel answers with at most 32 KiB at a time.
const DATAGRAM: usize = 64 << 10;

/// Bytes of `struct nlattr`.
const ATTRIBUTE_HEADER: usize = 4;

/// The bits of an attribute's type that are not flags (`NLA_TYPE_MASK`).
const TYPE_MASK: u16 = 0x3fff;

/// A netfilter message: `kind` is subsystem and command, `resource` the `res_id` that only batches use.
pub(crate) fn netfilter_message(
    kind: u16,
    flags: u16,
    family: u8,
    resource: u16,
    attributes: &[(u16, &[u8])],
) -> Vec<u8> {
    let mut message = vec![0; MESSAGE_HEADER];
    message.extend([family, 0]);
    message.extend(resource.to_be_bytes());
    for (kind, value) in attributes {
        push_attribute(&mut message, *kind, value);
    }
    let length = u32::try_from(message.len()).unwrap_or(u32::MAX);
    message[0..4].copy_from_slice(&length.to_ne_bytes());
    message[4..6].copy_from_slice(&kind.to_ne_bytes());
    message[6..8].copy_from_slice(&(NLM_F_REQUEST | flags).to_ne_bytes());
    message
}

/// Sends a request to netfilter and hands each message of the answer to `each`, until the kernel says that it is done.
/// The request must be one that is answered: a dump, or one with [`NLM_F_ACK`].
///
/// # Errors
/// What the kernel answered; `EINVAL` when it does not have the subsystem.
pub(crate) fn ask_netfilter(request: &[u8], mut each: impl FnMut(u16, &[u8])) -> io::Result<()> {
    let mut socket = Socket::new(NETLINK_NETFILTER)?;
    socket.bind_auto()?;
    // Netlink answers within the system call that asks, so a read that would block means a lost answer.
    socket.set_non_blocking(true)?;
    socket.send_to(request, &SocketAddr::new(0, 0), 0)?;
    let mut buffer = Vec::with_capacity(DATAGRAM);
    loop {
        buffer.clear();
        socket.recv(&mut buffer, 0)?;
        for (kind, payload) in messages(&buffer) {
            match kind {
                NLMSG_DONE | NLMSG_ERROR => return ended(payload),
                _ => each(kind, payload),
            }
        }
    }
}

/// How an answer ended (`struct nlmsgerr`).
fn ended(payload: &[u8]) -> io::Result<()> {
    match u32_at(payload, 0).map_or(0, u32::cast_signed).saturating_neg() {
        ..=0 => Ok(()),
        code => Err(Errno::from_raw(code).into()),
    }
}

/// The messages of a datagram: type and payload.
pub(crate) fn messages(mut datagram: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let length = usize::try_from(u32_at(datagram, 0)?).ok()?;
        let kind = u16_at(datagram, 4)?;
        let payload = datagram.get(MESSAGE_HEADER..length)?;
        datagram = datagram.get(aligned(length)..).unwrap_or_default();
        Some((kind, payload))
    })
}

/// The attributes in `bytes`: type without flags, and value.
pub(crate) fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let length = usize::from(u16_at(bytes, 0)?);
        let kind = u16_at(bytes, 2)? & TYPE_MASK;
        let value = bytes.get(ATTRIBUTE_HEADER..length)?;
        bytes = bytes.get(aligned(length)..).unwrap_or_default();
        Some((kind, value))
    })
}

/// The value of the first attribute of this type, after a fixed header of `skip` bytes.
pub(crate) fn attribute(payload: &[u8], skip: usize, kind: u16) -> Option<&[u8]> {
    attributes(payload.get(skip..)?).find(|(found, _)| *found == kind).map(|(_, value)| value)
}

/// A NUL-terminated string as the kernel sends names.
pub(crate) fn text(value: &[u8]) -> &[u8] {
    value.split(|byte| *byte == 0).next().unwrap_or_default()
}

/// Appends an attribute, padded to four bytes.
pub(crate) fn push_attribute(message: &mut Vec<u8>, kind: u16, value: &[u8]) {
    let length = u16::try_from(ATTRIBUTE_HEADER + value.len()).unwrap_or(u16::MAX);
    message.extend(length.to_ne_bytes());
    message.extend(kind.to_ne_bytes());
    message.extend(value);
    message.resize(aligned(message.len()), 0);
}

pub(crate) fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

pub(crate) fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

/// Messages and attributes begin at multiples of four bytes.
fn aligned(length: usize) -> usize {
    length.next_multiple_of(4)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_are_walked_over_their_padding() {
        let mut bytes = Vec::new();
        push_attribute(&mut bytes, 3, b"cni0\0");
        push_attribute(&mut bytes, 10 | 0x8000, &7u32.to_ne_bytes());
        let found: Vec<_> = attributes(&bytes).collect();
        assert_eq!(found, [(3, &b"cni0\0"[..]), (10, &7u32.to_ne_bytes()[..])]);
        assert_eq!(text(found[0].1), b"cni0");
    }

    #[test]
    fn a_cut_or_lying_length_ends_the_walk() {
        let mut bytes = Vec::new();
        push_attribute(&mut bytes, 1, b"whole");
        push_attribute(&mut bytes, 2, b"cut short");
        assert_eq!(attributes(&bytes[..bytes.len() - 4]).count(), 1);
        assert_eq!(attributes(&[0, 0, 1, 0]).count(), 0, "a length of 0 must not loop");
        assert_eq!(messages(&[0; 64]).count(), 0, "a length of 0 must not loop");
        assert_eq!(messages(&[255; 64]).count(), 0);
    }
}
