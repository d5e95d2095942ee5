//! A backstop for as long as the rules are being pulled down.
//!
//! Rules that someone deletes in a tight loop cannot be put back fast enough: between two repairs the drop targets are
//! open. Firewall tools leave policy routing alone, though. So while a siege lasts, one rule (ip-rule(8)) sends what
//! comes in from the bridge to a routing table of ours first, in which every drop target leads nowhere. For all else the
//! lookup goes on as before. Addresses of the node itself are found earlier, in table `local`, so VMs keep reaching
//! their gateway; drops in INPUT, IPv6 and frames between two ports of the bridge are not its business either.
//!
//! It is put up in a millisecond, needs no process, and is taken down once nobody undoes the rules any more.

use std::collections::BTreeSet;
use std::net::Ipv4Addr;

use futures_util::TryStreamExt;
use ipnet::Ipv4Net;
use nix::errno::Errno;
use rtnetlink::packet_route::AddressFamily;
use rtnetlink::packet_route::route::{RouteAddress, RouteAttribute, RouteMessage, RouteProtocol, RouteType};
use rtnetlink::packet_route::rule::{RuleAction, RuleMessage};
use rtnetlink::{Handle, RouteMessageBuilder};

use super::links::LinkError;

/// Number of the routing table.
pub const TABLE: u32 = 9092;

/// Preference of the rule that leads to it: after table `local`, before whatever else routes by source.
const PREFERENCE: u32 = 1;

/// The backstop.
#[derive(Debug)]
pub struct Backstop {
    handle: Handle,
    bridge: String,
    /// Whether there may be something to take down.
    up: bool,
    /// Whether all of it stands, as far as we know.
    whole: bool,
}

impl Backstop {
    /// Opens a netlink connection. Must be called within a tokio runtime. One left standing by an earlier process is
    /// taken for ours: [`Backstop::lower`] removes it.
    ///
    /// # Errors
    /// [`LinkError::Open`].
    pub fn open(bridge: &str) -> Result<Self, LinkError> {
        let (connection, handle, _) = rtnetlink::new_connection_with_strict_check().map_err(LinkError::Open)?;
        tokio::spawn(connection);
        Ok(Self { handle, bridge: bridge.to_owned(), up: true, whole: false })
    }

    /// Whether it stands on the host, whoever raised it.
    ///
    /// # Errors
    /// [`LinkError::Request`].
    pub async fn stands(&self) -> Result<bool, LinkError> {
        Ok(!self.routes().await?.is_empty())
    }

    /// Leads these ranges nowhere, and no others. Doing it again mends what is missing.
    ///
    /// # Errors
    /// [`LinkError::Request`].
    pub async fn raise(&mut self, targets: &BTreeSet<Ipv4Net>) -> Result<(), LinkError> {
        (self.up, self.whole) = (true, false);
        for target in targets {
            let add = self.handle.route().add(nowhere(*target)).replace();
            add.execute().await.map_err(failed(format!("route {target} to nowhere in table {TABLE}")))?;
        }
        let stale = self.routes().await?.into_iter().filter(|route| !targets.contains(&destination(route)));
        self.remove(stale).await?;
        self.add_rule().await?;
        self.whole = true;
        Ok(())
    }

    /// Whether we have put it up.
    #[must_use]
    pub fn is_up(&self) -> bool {
        self.whole
    }

    /// Takes it down, if it is up.
    ///
    /// # Errors
    /// [`LinkError::Request`].
    pub async fn lower(&mut self) -> Result<(), LinkError> {
        self.whole = false;
        if !self.up {
            return Ok(());
        }
        match self.handle.rule().del(self.rule()).execute().await {
            Err(error) if errno(&error) == Some(Errno::ENOENT) => {}
            result => result.map_err(failed(format!("remove the routing rule to table {TABLE}")))?,
        }
        let routes = self.routes().await?;
        self.remove(routes).await?;
        self.up = false;
        Ok(())
    }

    async fn add_rule(&self) -> Result<(), LinkError> {
        let mut add = self.handle.rule().add();
        *add.message_mut() = self.rule();
        match add.execute().await {
            Err(error) if errno(&error) == Some(Errno::EEXIST) => Ok(()),
            result => result.map_err(failed(format!("add a routing rule to table {TABLE}"))),
        }
    }

    fn rule(&self) -> RuleMessage {
        let add = self.handle.rule().add().input_interface(&self.bridge).table_id(TABLE).priority(PREFERENCE);
        add.action(RuleAction::ToTable).v4().message_mut().clone()
    }

    async fn routes(&self) -> Result<Vec<RouteMessage>, LinkError> {
        let mut message = RouteMessage::default();
        message.header.address_family = AddressFamily::Inet;
        message.attributes.push(RouteAttribute::Table(TABLE));
        match self.handle.route().get(message).execute().try_collect().await {
            // A table that never held a route is not there.
            Err(error) if errno(&error) == Some(Errno::ENOENT) => Ok(Vec::new()),
            result => {
                let mut routes: Vec<RouteMessage> =
                    result.map_err(failed(format!("list the routes of table {TABLE}")))?;
                // Whatever else is in that table is somebody else's.
                let ours = (RouteType::BlackHole, RouteProtocol::Boot);
                routes.retain(|route| (route.header.kind, route.header.protocol) == ours);
                Ok(routes)
            }
        }
    }

    async fn remove(&self, routes: impl IntoIterator<Item = RouteMessage>) -> Result<(), LinkError> {
        for route in routes {
            let target = destination(&route);
            let remove = self.handle.route().del(route).execute().await;
            remove.map_err(failed(format!("remove the route of {target} to nowhere from table {TABLE}")))?;
        }
        Ok(())
    }
}

fn nowhere(target: Ipv4Net) -> RouteMessage {
    let route = RouteMessageBuilder::<Ipv4Addr>::new().kind(RouteType::BlackHole).protocol(RouteProtocol::Boot);
    let route =
        if target.prefix_len() == 0 { route } else { route.destination_prefix(target.network(), target.prefix_len()) };
    route.table_id(TABLE).build()
}

fn destination(route: &RouteMessage) -> Ipv4Net {
    let address = route.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Destination(RouteAddress::Inet(address)) => Some(*address),
        _ => None,
    });
    Ipv4Net::new(address.unwrap_or(Ipv4Addr::UNSPECIFIED), route.header.destination_prefix_length).unwrap_or_default()
}

fn errno(error: &rtnetlink::Error) -> Option<Errno> {
    match error {
        rtnetlink::Error::NetlinkError(message) => Some(Errno::from_raw(message.raw_code().saturating_neg())),
        _ => None,
    }
}

fn failed(doing: String) -> impl FnOnce(rtnetlink::Error) -> LinkError {
    move |source| LinkError::Request { doing, source }
}
