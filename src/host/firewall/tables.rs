//! Tables of nftables that sleep: `flags dormant` (nft(8)) takes a table's chains off their hooks. iptables-nft lists the
//! rules of such a table as if nothing were wrong, while no packet meets them. So the flag is asked for by itself.

use std::collections::BTreeSet;
use std::io;

use nix::errno::Errno;

use super::Family;
use crate::netlink::{
    NFGENMSG, NFNL_SUBSYS_NFTABLES, NLM_F_ACK, NLM_F_DUMP, ask_netfilter, attribute, netfilter_message, text, u32_at,
};

/// linux/netfilter/nfnetlink.h: the messages around a transaction.
const NFNL_MSG_BATCH_BEGIN: u16 = 0x10;
const NFNL_MSG_BATCH_END: u16 = 0x11;

/// linux/netfilter/nf_tables.h.
const NFT_MSG_NEWTABLE: u16 = 0;
const NFT_MSG_GETTABLE: u16 = 1;
const NFTA_TABLE_NAME: u16 = 1;
const NFTA_TABLE_FLAGS: u16 = 2;
const NFT_TABLE_F_DORMANT: u32 = 1;

/// A table as the kernel lists it.
struct Listed {
    name: String,
    flags: u32,
}

/// The names of the tables of a family that are dormant; none on a kernel without nftables.
///
/// # Errors
/// What the kernel answered.
pub(super) fn dormant(family: Family) -> io::Result<BTreeSet<String>> {
    let dormant = |table: &Listed| table.flags & NFT_TABLE_F_DORMANT != 0;
    Ok(list(family)?.into_iter().filter(dormant).map(|table| table.name).collect())
}

/// Whether a family has any table in nftables.
///
/// # Errors
/// What the kernel answered.
pub(super) fn any(family: Family) -> io::Result<bool> {
    Ok(!list(family)?.is_empty())
}

/// Puts the chains of a table on their hooks, or takes them off. A table that is not there is left so.
///
/// # Errors
/// What the kernel answered: `EPERM` for a table that belongs to a running process (`flags owner`).
pub(super) fn set_dormant(family: Family, name: &str, dormant: bool) -> io::Result<()> {
    let Some(table) = list(family)?.into_iter().find(|table| table.name == name) else { return Ok(()) };
    let others = table.flags & !NFT_TABLE_F_DORMANT;
    let flags = if dormant { others | NFT_TABLE_F_DORMANT } else { others };
    let name = [name.as_bytes(), &[0]].concat();
    let change = netfilter_message(
        NFNL_SUBSYS_NFTABLES << 8 | NFT_MSG_NEWTABLE,
        NLM_F_ACK,
        family.protocol(),
        0,
        &[(NFTA_TABLE_NAME, &name), (NFTA_TABLE_FLAGS, &flags.to_be_bytes())],
    );
    let edge = |kind| netfilter_message(kind, 0, 0, NFNL_SUBSYS_NFTABLES, &[]);
    let transaction = [edge(NFNL_MSG_BATCH_BEGIN), change, edge(NFNL_MSG_BATCH_END)].concat();
    ask_netfilter(&transaction, |_, _| {})
}

fn list(family: Family) -> io::Result<Vec<Listed>> {
    let kind = NFNL_SUBSYS_NFTABLES << 8 | NFT_MSG_GETTABLE;
    let request = netfilter_message(kind, NLM_F_DUMP, family.protocol(), 0, &[]);
    let mut tables = Vec::new();
    match ask_netfilter(&request, |_, payload| tables.extend(read(payload))) {
        Err(error) if lacks_nftables(&error) => Ok(Vec::new()),
        result => result.map(|()| tables),
    }
}

fn read(payload: &[u8]) -> Option<Listed> {
    let name = attribute(payload, NFGENMSG, NFTA_TABLE_NAME)?;
    let flags = attribute(payload, NFGENMSG, NFTA_TABLE_FLAGS).and_then(|value| u32_at(value, 0));
    Some(Listed { name: String::from_utf8_lossy(text(name)).into_owned(), flags: flags.map_or(0, u32::from_be) })
}

fn lacks_nftables(error: &io::Error) -> bool {
    let lacking = [Errno::EINVAL, Errno::EPROTONOSUPPORT, Errno::EAFNOSUPPORT, Errno::EOPNOTSUPP];
    error.raw_os_error().is_some_and(|code| lacking.contains(&Errno::from_raw(code)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::netlink::NFPROTO_IPV4;

    #[test]
    fn name_and_flags_are_read() {
        let message = netfilter_message(0, 0, NFPROTO_IPV4, 0, &[(NFTA_TABLE_NAME, b"filter\0"), (2, &[0, 0, 0, 1])]);
        let table = read(&message[16..]).unwrap();
        assert_eq!((table.name.as_str(), table.flags), ("filter", NFT_TABLE_F_DORMANT));
        assert!(read(&[2, 0, 0, 0]).is_none());
    }
}
