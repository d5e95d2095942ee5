//! Reading an ipset through netlink, without starting a process: cheap enough for each second.
//!
//! The protocol is that of linux/netfilter/ipset/ip_set.h, version 6; ipset(8) speaks the same.

use std::collections::hash_map::DefaultHasher;
use std::hash::{Hash, Hasher};
use std::io;

use nix::errno::Errno;

use crate::netlink::{NFGENMSG, NLM_F_ACK, NLM_F_DUMP, ask_netfilter, attribute, attributes, netfilter_message};

const NFNL_SUBSYS_IPSET: u16 = 6;
const IPSET_CMD_LIST: u16 = 7;
const IPSET_PROTOCOL: u8 = 6;
const IPSET_ATTR_PROTOCOL: u16 = 1;
const IPSET_ATTR_SETNAME: u16 = 2;
const IPSET_ATTR_TYPENAME: u16 = 3;
const IPSET_ATTR_DATA: u16 = 7;
const IPSET_ATTR_ADT: u16 = 8;

/// Options of a set that change by themselves: the seed, the size of its table, how full it is, who uses it.
const COMING_AND_GOING: [u16; 5] = [17, 18, 24, 25, 26];

/// Attributes of an element that do: the time it has left, what it has counted.
const COUNTING: [u16; 3] = [6, 24, 25];

/// A digest of a set's type, options and elements, exceptions and timeouts included, whatever their counters say: it changes when the set is edited,
/// flushed, destroyed or replaced by another. `None`: there is no such set.
///
/// # Errors
/// What the kernel answered, `EPERM` and the lack of ipset support included.
pub fn digest(set: &str) -> io::Result<Option<u64>> {
    // Elements come in the order of a hash table whose seed changes with each set: sum up, do not chain.
    let mut sum = None;
    let list = netfilter_message(
        NFNL_SUBSYS_IPSET << 8 | IPSET_CMD_LIST,
        NLM_F_ACK | NLM_F_DUMP,
        0,
        0,
        &[(IPSET_ATTR_PROTOCOL, &[IPSET_PROTOCOL]), (IPSET_ATTR_SETNAME, &[set.as_bytes(), &[0]].concat())],
    );
    match ask_netfilter(&list, |_, payload| sum = Some(sum.unwrap_or(0u64).wrapping_add(elements(payload)))) {
        Err(error) if error.raw_os_error() == Some(Errno::ENOENT as i32) => Ok(None),
        result => result.map(|()| sum),
    }
}

fn elements(payload: &[u8]) -> u64 {
    let name = attribute(payload, NFGENMSG, IPSET_ATTR_TYPENAME);
    let options =
        attribute(payload, NFGENMSG, IPSET_ATTR_DATA).map(|options| but_values_of(&COMING_AND_GOING, options));
    let set = hash(&(name, options));
    let Some(list) = attribute(payload, NFGENMSG, IPSET_ATTR_ADT) else { return set };
    attributes(list)
        .filter(|(kind, _)| *kind == IPSET_ATTR_DATA)
        .map(|(_, element)| hash(&but_values_of(&COUNTING, element)))
        .fold(set, u64::wrapping_add)
}

/// The attributes, without the values of some of them: that these are there counts.
fn but_values_of<'a>(changing: &[u16], data: &'a [u8]) -> Vec<(u16, &'a [u8])> {
    attributes(data).map(|(kind, value)| (kind, if changing.contains(&kind) { &[][..] } else { value })).collect()
}

fn hash(value: &impl Hash) -> u64 {
    let mut hasher = DefaultHasher::new();
    value.hash(&mut hasher);
    hasher.finish()
}
