//! Rules that iptables-nft does not show whole: of a rule that somebody made or edited with nft(8) it leaves out lookups in
//! sets and maps, and prints what is left as if that were all. Such a rule of ours would be listed and not drop what it says.

use std::collections::BTreeSet;
use std::io;

use super::{Family, Ruleset};
use crate::netlink::{
    NFGENMSG, NFNL_SUBSYS_NFTABLES, NLM_F_DUMP, ask_netfilter, attribute, attributes, netfilter_message, text,
};

/// linux/netfilter/nf_tables.h.
const NFT_MSG_GETRULE: u16 = 7;
const NFTA_RULE_TABLE: u16 = 1;
const NFTA_RULE_CHAIN: u16 = 2;
const NFTA_RULE_EXPRESSIONS: u16 = 4;
const NFTA_LIST_ELEM: u16 = 1;
const NFTA_EXPR_NAME: u16 = 1;

/// The expressions that iptables makes our rules of.
const KNOWN: [&[u8]; 11] = [
    b"meta",
    b"cmp",
    b"payload",
    b"bitwise",
    b"immediate",
    b"counter",
    b"match",
    b"target",
    b"ct",
    b"masq",
    b"comment",
];

/// Marks the rules of ours that hold more than their text says.
///
/// # Errors
/// What the kernel answered.
pub(super) fn mark(family: Family, ruleset: &mut Ruleset) -> io::Result<()> {
    let chains: BTreeSet<(String, String)> =
        ruleset.ours().map(|(table, chain, _)| (table.to_owned(), chain.to_owned())).collect();
    for (table, chain) in chains {
        let masked = list(family, &table, &chain)?;
        let mut saved: Vec<_> = ruleset.chain_mut(&table, &chain).collect();
        // A chain that has changed in between is read again when the kernel tells of the change.
        if masked.len() == saved.len() {
            saved.iter_mut().zip(masked).for_each(|(saved, masked)| saved.masked = masked);
        }
    }
    Ok(())
}

/// For each rule of a chain, in order, whether there is an expression in it that iptables would not have made.
fn list(family: Family, table: &str, chain: &str) -> io::Result<Vec<bool>> {
    let name = |name: &str| [name.as_bytes(), &[0]].concat();
    let request = netfilter_message(
        NFNL_SUBSYS_NFTABLES << 8 | NFT_MSG_GETRULE,
        NLM_F_DUMP,
        family.protocol(),
        0,
        &[(NFTA_RULE_TABLE, &name(table)), (NFTA_RULE_CHAIN, &name(chain))],
    );
    let mut rules = Vec::new();
    ask_netfilter(&request, |_, payload| {
        let named =
            |kind, name: &str| attribute(payload, NFGENMSG, kind).is_some_and(|value| text(value) == name.as_bytes());
        if named(NFTA_RULE_TABLE, table) && named(NFTA_RULE_CHAIN, chain) {
            rules.push(is_masked(payload));
        }
    })?;
    Ok(rules)
}

fn is_masked(rule: &[u8]) -> bool {
    let expressions = attribute(rule, NFGENMSG, NFTA_RULE_EXPRESSIONS).unwrap_or_default();
    attributes(expressions)
        .filter(|(kind, _)| *kind == NFTA_LIST_ELEM)
        .filter_map(|(_, expression)| attribute(expression, 0, NFTA_EXPR_NAME))
        .any(|name| !KNOWN.contains(&text(name)))
}
