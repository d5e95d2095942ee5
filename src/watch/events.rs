//! What the kernel tells by itself: links, addresses and routes (rtnetlink(7)), and nftables transactions.

use std::io;
use std::task::{Context, Poll};
use std::time::Duration;

use netlink_sys::protocols::{NETLINK_NETFILTER, NETLINK_ROUTE};
use netlink_sys::{AsyncSocket, TokioSocket};
use nix::errno::Errno;

use super::{Reason, WatchError};
use crate::netlink::{NFGENMSG, NFNL_SUBSYS_NFTABLES, NFPROTO_IPV4, NFPROTO_IPV6, attribute, messages, text, u32_at};

/// `RTNLGRP_LINK`, `RTNLGRP_IPV4_IFADDR` and `RTNLGRP_IPV4_ROUTE` of linux/rtnetlink.h.
const ROUTE_GROUPS: [u32; 3] = [1, 5, 7];

/// `NFNLGRP_NFTABLES` of linux/netfilter/nfnetlink.h.
const NFTABLES_GROUP: u32 = 7;

/// Message types of linux/rtnetlink.h.
const RTM_NEWLINK: u16 = 16;
const RTM_DELLINK: u16 = 17;
const RTM_NEWADDR: u16 = 20;
const RTM_DELADDR: u16 = 21;
const RTM_NEWROUTE: u16 = 24;

/// Attributes and fixed headers of `RTM_*LINK` (`struct ifinfomsg`) and `RTM_*ROUTE` (`struct rtmsg`).
const IFLA_IFNAME: u16 = 3;
const IFLA_MASTER: u16 = 10;
const IFINFOMSG: usize = 16;
const RT_TABLE_LOCAL: u8 = 255;

/// Messages of linux/netfilter/nf_tables.h.
const NFT_MSG_NEWCHAIN: u16 = 3;
const NFT_MSG_DELCHAIN: u16 = 5;
const NFT_MSG_NEWRULE: u16 = 6;
const NFT_MSG_DELRULE: u16 = 8;
const NFT_MSG_NEWGEN: u16 = 15;
const NFTA_TABLE: u16 = 1;
const NFTA_CHAIN_NAME: u16 = 3;
const NFTA_RULE_CHAIN: u16 = 2;
const NFTA_GEN_PROC_PID: u16 = 2;
const NFTA_GEN_PROC_NAME: u16 = 3;

/// The tables that iptables-nft keeps our rules in.
const OUR_TABLES: [&[u8]; 2] = [b"filter", b"nat"];

/// The chains that they stand in. What others do in chains of their own is none of our business: no packet gets there
/// before our drops.
const OUR_CHAINS: [&[u8]; 3] = [b"FORWARD", b"INPUT", b"POSTROUTING"];

/// Room for one datagram: the kernel sends multicasts of at most `NLMSG_GOODSIZE` plus one message.
const DATAGRAM: usize = 64 << 10;

/// A netlink socket subscribed to multicast groups.
pub(super) struct Events {
    socket: TokioSocket,
    buffer: Vec<u8>,
    read: fn(&[u8], Option<u32>, &mut News),
}

/// What a stretch of events amounts to.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct News {
    /// What of ours may have changed.
    pub reasons: Vec<Reason>,
    /// Who made the last nftables transaction: process name and id.
    pub by: Option<(String, u32)>,
    /// CPU time used to find out, when it is worth telling.
    pub cost: Duration,
}

impl News {
    fn add(&mut self, reason: Reason) {
        if !self.reasons.contains(&reason) {
            self.reasons.push(reason);
        }
    }
}

impl Events {
    /// Subscribes to links, IPv4 addresses and IPv4 routes.
    pub(super) fn of_links() -> Result<Self, WatchError> {
        Self::subscribe(NETLINK_ROUTE, &ROUTE_GROUPS, "link, address and route events", read_route)
    }

    /// Subscribes to nftables changes.
    pub(super) fn of_nftables() -> Result<Self, WatchError> {
        Self::subscribe(NETLINK_NETFILTER, &[NFTABLES_GROUP], "nftables events", read_nftables)
    }

    fn subscribe(
        protocol: isize,
        groups: &[u32],
        what: &'static str,
        read: fn(&[u8], Option<u32>, &mut News),
    ) -> Result<Self, WatchError> {
        let failed = |source| WatchError::Subscribe { what, source };
        let mut socket = TokioSocket::new(protocol).map_err(failed)?;
        socket.socket_mut().bind_auto().map_err(failed)?;
        for group in groups {
            socket.socket_ref().add_membership(*group).map_err(failed)?;
        }
        Ok(Self { socket, buffer: Vec::with_capacity(DATAGRAM), read })
    }

    /// Waits for events that concern `bridge`. Cancel safe: what was received is also handed over.
    pub(super) async fn next(&mut self, bridge: &str) -> News {
        std::future::poll_fn(|cx| self.poll_next(cx, bridge)).await
    }

    fn poll_next(&mut self, cx: &mut Context<'_>, bridge: &str) -> Poll<News> {
        let mut news = News::default();
        loop {
            self.buffer.clear();
            match self.socket.poll_recv(cx, &mut self.buffer) {
                Poll::Pending if news.reasons.is_empty() => return Poll::Pending,
                Poll::Pending => return Poll::Ready(news),
                Poll::Ready(result) => self.take(result, bridge, &mut news),
            }
            if !news.reasons.is_empty() {
                return Poll::Ready(news);
            }
        }
    }

    /// Reads everything that has arrived, without waiting. The socket's receive buffer bounds the work.
    pub(super) fn drain(&mut self, bridge: &str) -> News {
        let mut news = News::default();
        for _ in 0..10_000 {
            self.buffer.clear();
            match self.socket.socket_ref().recv(&mut self.buffer, 0) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                result => self.take(result.map(drop), bridge, &mut news),
            }
        }
        news
    }

    fn take(&mut self, result: io::Result<()>, bridge: &str, news: &mut News) {
        match result {
            Ok(()) => (self.read)(&self.buffer, nix::net::if_::if_nametoindex(bridge).ok(), news),
            Err(error) if error.raw_os_error() == Some(Errno::ENOBUFS as i32) => news.add(Reason::Overrun),
            Err(error) => {
                tracing::warn!(error = %error, "cannot read kernel events; looking for myself");
                news.add(Reason::Overrun);
            }
        }
    }
}

/// What a datagram of route events means to the bridge of this index.
fn read_route(datagram: &[u8], bridge: Option<u32>, news: &mut News) {
    for (kind, payload) in messages(datagram) {
        let reason = match kind {
            RTM_NEWLINK | RTM_DELLINK => concerns_ports(payload, bridge).then_some(Reason::Links),
            RTM_NEWADDR | RTM_DELADDR => concerns_bridge(payload, bridge).then_some(Reason::Addresses),
            RTM_NEWROUTE => swallows_a_subnet(payload).then_some(Reason::Routes),
            _ => None,
        };
        reason.into_iter().for_each(|reason| news.add(reason));
    }
}

/// A link message about the bridge itself, about one of its ports, or about a port that just left it (then the
/// bridge's own message, family `AF_BRIDGE`, still names it as master). While there is no bridge, any link may be it.
fn concerns_ports(payload: &[u8], bridge: Option<u32>) -> bool {
    let Some(bridge) = bridge else { return attribute(payload, IFINFOMSG, IFLA_IFNAME).is_some() };
    let master = attribute(payload, IFINFOMSG, IFLA_MASTER).and_then(|value| u32_at(value, 0));
    u32_at(payload, 4) == Some(bridge) || master == Some(bridge)
}

/// An address message (`struct ifaddrmsg`) about the bridge.
fn concerns_bridge(payload: &[u8], bridge: Option<u32>) -> bool {
    bridge.is_some() && u32_at(payload, 4) == bridge
}

/// A new route of the local table wider than one address: what a cloud's guest agent adds for an alias range.
fn swallows_a_subnet(payload: &[u8]) -> bool {
    let (prefix, table) = (payload.get(1), payload.get(4));
    prefix.is_some_and(|prefix| *prefix < 32) && table == Some(&RT_TABLE_LOCAL)
}

/// What a datagram of nftables events means: whether tables of ours changed, and who did it.
fn read_nftables(datagram: &[u8], _bridge: Option<u32>, news: &mut News) {
    for (kind, payload) in messages(datagram) {
        if kind >> 8 != NFNL_SUBSYS_NFTABLES {
            continue;
        }
        if kind & 0xff == NFT_MSG_NEWGEN {
            news.by = transaction_owner(payload).or(news.by.take());
        } else if concerns_our_rules(kind & 0xff, payload) {
            news.add(Reason::Rules);
        }
    }
}

fn concerns_our_rules(kind: u16, payload: &[u8]) -> bool {
    let ip = matches!(payload.first(), Some(&(NFPROTO_IPV4 | NFPROTO_IPV6)));
    let named = |attribute_type, names: &[&[u8]]| {
        attribute(payload, NFGENMSG, attribute_type).is_none_or(|name| names.contains(&text(name)))
    };
    let chain = match kind {
        NFT_MSG_NEWCHAIN | NFT_MSG_DELCHAIN => named(NFTA_CHAIN_NAME, &OUR_CHAINS),
        NFT_MSG_NEWRULE | NFT_MSG_DELRULE => named(NFTA_RULE_CHAIN, &OUR_CHAINS),
        _ => true,
    };
    ip && chain && named(NFTA_TABLE, &OUR_TABLES)
}

fn transaction_owner(payload: &[u8]) -> Option<(String, u32)> {
    let name = attribute(payload, NFGENMSG, NFTA_GEN_PROC_NAME)?;
    let pid = attribute(payload, NFGENMSG, NFTA_GEN_PROC_PID)?;
    let pid = u32::from_be(u32_at(pid, 0)?);
    Some((String::from_utf8_lossy(text(name)).into_owned(), pid))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::netlink::{MESSAGE_HEADER, push_attribute};

    fn datagram(kind: u16, header: &[u8], attributes: &[(u16, &[u8])]) -> Vec<u8> {
        let mut payload = header.to_vec();
        for (kind, value) in attributes {
            push_attribute(&mut payload, *kind, value);
        }
        let length = u32::try_from(MESSAGE_HEADER + payload.len()).unwrap();
        let mut message = length.to_ne_bytes().to_vec();
        message.extend(kind.to_ne_bytes());
        message.resize(MESSAGE_HEADER, 0);
        message.extend(payload);
        message
    }

    fn link(index: u32, attributes: &[(u16, &[u8])]) -> Vec<u8> {
        let mut header = [0; IFINFOMSG];
        header[4..8].copy_from_slice(&index.to_ne_bytes());
        datagram(RTM_NEWLINK, &header, attributes)
    }

    fn reasons(read: fn(&[u8], Option<u32>, &mut News), bytes: &[u8], bridge: Option<u32>) -> Vec<Reason> {
        let mut news = News::default();
        read(bytes, bridge, &mut news);
        news.reasons
    }

    #[test]
    fn links_count_when_they_are_the_bridge_or_its_ports() {
        let ours = Some(7);
        assert_eq!(reasons(read_route, &link(7, &[]), ours), [Reason::Links]);
        assert_eq!(reasons(read_route, &link(9, &[(IFLA_MASTER, &7u32.to_ne_bytes())]), ours), [Reason::Links]);
        assert_eq!(reasons(read_route, &link(9, &[(IFLA_MASTER, &8u32.to_ne_bytes())]), ours), []);
        assert_eq!(reasons(read_route, &link(9, &[(IFLA_IFNAME, b"eth0\0")]), ours), []);
        assert_eq!(reasons(read_route, &link(9, &[(IFLA_IFNAME, b"cni0\0")]), None), [Reason::Links]);
    }

    #[test]
    fn only_wide_routes_of_the_local_table_count() {
        let route = |prefix, table| {
            let mut header = [0; 12];
            (header[1], header[4]) = (prefix, table);
            reasons(read_route, &datagram(RTM_NEWROUTE, &header, &[]), Some(7))
        };
        assert_eq!(route(24, 255), [Reason::Routes]);
        assert_eq!(route(32, 255), []);
        assert_eq!(route(24, 254), []);
    }

    #[test]
    fn nftables_events_count_when_they_are_about_our_tables() {
        let change = |family, table: &[u8]| {
            let bytes = datagram(10 << 8 | 6, &[family, 0, 0, 0], &[(NFTA_TABLE, table)]);
            reasons(read_nftables, &bytes, None)
        };
        assert_eq!(change(2, b"filter\0"), [Reason::Rules]);
        assert_eq!(change(10, b"filter\0"), [Reason::Rules]);
        assert_eq!(change(2, b"nat\0"), [Reason::Rules]);
        assert_eq!(change(2, b"kube-proxy\0"), []);
        assert_eq!(change(1, b"filter\0"), []);
    }

    #[test]
    fn what_others_do_in_their_own_chains_does_not_count() {
        let change = |kind, attribute, chain: &[u8]| {
            let bytes = datagram(10 << 8 | kind, &[2, 0, 0, 0], &[(NFTA_TABLE, b"nat\0"), (attribute, chain)]);
            reasons(read_nftables, &bytes, None)
        };
        for (kind, attribute) in [(NFT_MSG_NEWRULE, NFTA_RULE_CHAIN), (NFT_MSG_DELCHAIN, NFTA_CHAIN_NAME)] {
            assert_eq!(change(kind, attribute, b"KUBE-SERVICES\0"), []);
            assert_eq!(change(kind, attribute, b"POSTROUTING\0"), [Reason::Rules]);
        }
    }

    #[test]
    fn the_end_of_a_transaction_names_who_made_it() {
        let attributes: [(u16, &[u8]); 2] =
            [(NFTA_GEN_PROC_PID, &4711u32.to_be_bytes()), (NFTA_GEN_PROC_NAME, b"iptables\0")];
        let mut news = News::default();
        read_nftables(&datagram(10 << 8 | NFT_MSG_NEWGEN, &[0; 4], &attributes), None, &mut news);
        assert_eq!(news.by, Some(("iptables".to_owned(), 4711)));
        assert_eq!(news.reasons, []);
    }

    #[test]
    fn a_storm_of_one_kind_is_one_reason() {
        let mut bytes = link(7, &[]);
        bytes.extend(link(7, &[]));
        assert_eq!(reasons(read_route, &bytes, Some(7)), [Reason::Links]);
    }
}
