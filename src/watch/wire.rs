//! Walking netlink datagrams: messages (`struct nlmsghdr`, netlink(7)) and their attributes (`struct nlattr`).
//!
//! The watch only asks of each message whom it concerns, so it reads two or three fields instead of decoding all.
//! Whatever is cut short ends the walk; nothing here can fail.

/// Bytes of `struct nlmsghdr`.
pub(super) const MESSAGE_HEADER: usize = 16;

/// Bytes of `struct nlattr`.
const ATTRIBUTE_HEADER: usize = 4;

/// The bits of an attribute's type that are not flags (`NLA_TYPE_MASK`).
const TYPE_MASK: u16 = 0x3fff;

/// The messages of a datagram: type and payload.
pub(super) fn messages(mut datagram: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let length = usize::try_from(u32_at(datagram, 0)?).ok()?;
        let kind = u16_at(datagram, 4)?;
        let payload = datagram.get(MESSAGE_HEADER..length)?;
        datagram = datagram.get(aligned(length)..).unwrap_or_default();
        Some((kind, payload))
    })
}

/// The attributes in `bytes`: type without flags, and value.
pub(super) fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let length = usize::from(u16_at(bytes, 0)?);
        let kind = u16_at(bytes, 2)? & TYPE_MASK;
        let value = bytes.get(ATTRIBUTE_HEADER..length)?;
        bytes = bytes.get(aligned(length)..).unwrap_or_default();
        Some((kind, value))
    })
}

/// The value of the first attribute of this type, after a fixed header of `skip` bytes.
pub(super) fn attribute(payload: &[u8], skip: usize, kind: u16) -> Option<&[u8]> {
    attributes(payload.get(skip..)?).find(|(found, _)| *found == kind).map(|(_, value)| value)
}

/// A NUL-terminated string as the kernel sends names.
pub(super) fn text(value: &[u8]) -> &[u8] {
    value.split(|byte| *byte == 0).next().unwrap_or_default()
}

/// Appends an attribute, padded to four bytes.
pub(super) fn push_attribute(message: &mut Vec<u8>, kind: u16, value: &[u8]) {
    let length = u16::try_from(ATTRIBUTE_HEADER + value.len()).unwrap_or(u16::MAX);
    message.extend(length.to_ne_bytes());
    message.extend(kind.to_ne_bytes());
    message.extend(value);
    message.resize(aligned(message.len()), 0);
}

pub(super) fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

pub(super) fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
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
