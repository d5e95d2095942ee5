//! Links, addresses, bridge ports and routes over netlink (`rtnetlink(7)`).

use std::net::{IpAddr, Ipv4Addr};
use std::sync::Mutex;

use futures_util::TryStreamExt;
use ipnet::Ipv4Net;
use rtnetlink::packet_route::AddressFamily;
use rtnetlink::packet_route::address::{AddressAttribute, AddressScope};
use rtnetlink::packet_route::link::{
    InfoBridgePort, InfoKind, InfoPortData, LinkAttribute, LinkExtentMask, LinkFlags, LinkInfo, LinkMessage,
};
use rtnetlink::packet_route::route::{
    RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteProtocol, RouteType,
};
use rtnetlink::{AddressMessageBuilder, Handle, LinkBridge, LinkBridgePort, LinkUnspec};

use crate::config::InterfaceName;

/// An Ethernet address.
pub type Mac = [u8; 6];

/// `NET_ADDR_SET`: an address that somebody chose, which a bridge then keeps whatever ports join
/// (`Documentation/ABI/testing/sysfs-class-net`).
const ADDRESS_WAS_SET: &str = "3";

/// The kernel's own table of local addresses (`linux/rtnetlink.h`).
const RT_TABLE_LOCAL: u8 = 255;

/// A network interface as the kernel describes it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Link {
    /// Interface index.
    pub index: u32,
    /// Name.
    pub name: String,
    /// Whether it is a bridge.
    pub is_bridge: bool,
    /// Whether it is administratively up.
    pub up: bool,
    /// MTU in bytes.
    pub mtu: u32,
    /// Ethernet address, if it has one.
    pub mac: Option<Mac>,
    /// Whether the Ethernet address stays when ports join; `None` where the kernel cannot be asked.
    pub mac_pinned: Option<bool>,
    /// Index of the bridge that it is a port of.
    pub master: Option<u32>,
    /// `BR_ISOLATED`, for a port of a bridge.
    pub isolated: bool,
    /// IPv4 addresses, each with its prefix.
    pub addresses: Vec<Ipv4Net>,
    /// Whether somebody gave it an IPv6 address beyond the link-local one.
    pub has_ipv6: bool,
}

/// A netlink request that failed.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// No netlink socket could be had.
    #[error("cannot open a netlink socket")]
    Open(#[source] std::io::Error),
    /// The kernel refused a request.
    #[error("cannot {doing}")]
    Request {
        /// What was being done, and to what.
        doing: String,
        /// What the kernel answered.
        source: rtnetlink::Error,
    },
}

fn failed(doing: impl Into<String>) -> impl FnOnce(rtnetlink::Error) -> LinkError {
    let doing = doing.into();
    move |source| LinkError::Request { doing, source }
}

/// The netlink connection.
#[derive(Debug)]
pub struct Links {
    handle: Handle,
    /// For route dumps that the kernel filters (`NETLINK_GET_STRICT_CHK`).
    strict: Handle,
    /// The bridge whose address this process has pinned: not every kernel view tells (see [`mac_pinned`]).
    pinned: Mutex<Option<(u32, Mac)>>,
    /// Whether an address of which the kernel does not tell counts as not pinned: it may be pinned again at no harm.
    assume_unpinned: bool,
}

impl Links {
    /// Opens the connection, for changing things or only for looking. Must be called within a tokio runtime.
    ///
    /// # Errors
    /// [`LinkError::Open`].
    pub fn open(changing: bool) -> Result<Self, LinkError> {
        let (connection, handle, _) = rtnetlink::new_connection().map_err(LinkError::Open)?;
        tokio::spawn(connection);
        let (connection, strict, _) = rtnetlink::new_connection_with_strict_check().map_err(LinkError::Open)?;
        tokio::spawn(connection);
        Ok(Self { handle, strict, pinned: Mutex::new(None), assume_unpinned: changing })
    }

    /// Every interface, with its IPv4 addresses.
    ///
    /// # Errors
    /// [`LinkError::Request`].
    pub async fn read(&self) -> Result<Vec<Link>, LinkError> {
        let get = self.handle.link().get().set_filter_mask(AddressFamily::Unspec, vec![LinkExtentMask::SkipStats]);
        let messages: Vec<LinkMessage> = get.execute().try_collect().await.map_err(failed("list the interfaces"))?;
        let mut links: Vec<Link> = messages.iter().map(read_link).collect();

        let get = self.handle.address().get();
        let messages: Vec<_> = get.execute().try_collect().await.map_err(failed("list the addresses"))?;
        for message in messages {
            if message.header.family == AddressFamily::Inet6 && message.header.scope != AddressScope::Link {
                let link = links.iter_mut().find(|link| link.index == message.header.index);
                link.into_iter().for_each(|link| link.has_ipv6 = true);
                continue;
            }
            let local = message.attributes.iter().find_map(|attribute| match attribute {
                AddressAttribute::Local(IpAddr::V4(address)) => Some(*address),
                _ => None,
            });
            let net = local.and_then(|address| Ipv4Net::new(address, message.header.prefix_len).ok());
            if let (Some(net), Some(link)) = (net, links.iter_mut().find(|link| link.index == message.header.index)) {
                link.addresses.push(net);
            }
        }
        for link in links.iter_mut().filter(|link| link.is_bridge) {
            let remembered = self.pinned.lock().is_ok_and(|pinned| Some(link.index).zip(link.mac) == *pinned);
            link.mac_pinned =
                if remembered { Some(true) } else { mac_pinned(link).or(self.assume_unpinned.then_some(false)) };
        }
        Ok(links)
    }

    /// The interface of the IPv4 default route with the lowest metric.
    ///
    /// # Errors
    /// [`LinkError::Request`].
    pub async fn default_route_interface(&self) -> Result<Option<InterfaceName>, LinkError> {
        let routes = self.routes(RouteHeader::RT_TABLE_MAIN, RouteType::Unicast, None).await?;
        let best = routes
            .iter()
            .filter(|route| route.header.destination_prefix_length == 0)
            .filter_map(|route| Some((priority(route), output_interface(route)?)))
            .min_by_key(|(priority, _)| *priority)
            .map(|(_, interface)| interface);
        let Some(index) = best else { return Ok(None) };
        let links = self.read().await?;
        Ok(links.iter().find(|link| link.index == index).and_then(|link| link.name.parse().ok()))
    }

    /// Whether table `local` sends `subnet` to this host through `interface`: what GKE's guest agent adds for an
    /// alias range.
    ///
    /// # Errors
    /// [`LinkError::Request`].
    pub async fn has_local_route(&self, interface: u32, subnet: Ipv4Net) -> Result<bool, LinkError> {
        let routes = self.routes(RT_TABLE_LOCAL, RouteType::Local, Some(interface)).await?;
        Ok(routes.iter().any(|route| destination(route) == Some(subnet)))
    }

    /// Removes that route.
    ///
    /// # Errors
    /// [`LinkError::Request`].
    pub async fn remove_local_route(&self, interface: u32, subnet: Ipv4Net) -> Result<(), LinkError> {
        let routes = self.routes(RT_TABLE_LOCAL, RouteType::Local, Some(interface)).await?;
        for route in routes.into_iter().filter(|route| destination(route) == Some(subnet)) {
            let doing = format!("remove the route `local {subnet}` from table local");
            self.handle.route().del(route).execute().await.map_err(failed(doing))?;
        }
        Ok(())
    }

    /// The `/32` routes through the bridge that leases were given: `proto boot`, inside the subnet.
    ///
    /// # Errors
    /// [`LinkError::Request`].
    pub async fn lease_routes(&self, bridge: u32, subnet: Ipv4Net) -> Result<Vec<Ipv4Addr>, LinkError> {
        let routes = self.routes_of_leases(bridge, subnet).await?;
        Ok(routes.iter().filter_map(destination).map(|net| net.addr()).collect())
    }

    /// Removes those routes.
    ///
    /// # Errors
    /// [`LinkError::Request`].
    pub async fn remove_lease_routes(&self, bridge: u32, subnet: Ipv4Net) -> Result<(), LinkError> {
        for route in self.routes_of_leases(bridge, subnet).await? {
            let doing = destination(&route).map(|net| format!("remove the route to {net}")).unwrap_or_default();
            self.handle.route().del(route).execute().await.map_err(failed(doing))?;
        }
        Ok(())
    }

    /// Makes a bridge with an address that does not change when ports join.
    ///
    /// # Errors
    /// [`LinkError::Request`].
    pub async fn create_bridge(&self, name: &str, mac: Mac) -> Result<(), LinkError> {
        let message = LinkBridge::new(name).address(mac.to_vec()).build();
        self.handle.link().add(message).execute().await.map_err(failed(format!("make the bridge {name}")))
    }

    /// Sets the Ethernet address of a bridge, which pins it.
    ///
    /// # Errors
    /// [`LinkError::Request`].
    pub async fn pin_mac(&self, bridge: u32, name: &str, mac: Mac) -> Result<(), LinkError> {
        let message = LinkUnspec::new_with_index(bridge).address(mac.to_vec()).build();
        self.change(message, format!("pin the Ethernet address of {name}")).await?;
        if let Ok(mut pinned) = self.pinned.lock() {
            *pinned = Some((bridge, mac));
        }
        Ok(())
    }

    /// Sets the MTU in bytes.
    ///
    /// # Errors
    /// [`LinkError::Request`].
    pub async fn set_mtu(&self, index: u32, name: &str, mtu: u32) -> Result<(), LinkError> {
        self.change(LinkUnspec::new_with_index(index).mtu(mtu).build(), format!("set the MTU of {name} to {mtu}")).await
    }

    /// Brings an interface up.
    ///
    /// # Errors
    /// [`LinkError::Request`].
    pub async fn set_up(&self, index: u32, name: &str) -> Result<(), LinkError> {
        self.change(LinkUnspec::new_with_index(index).up().build(), format!("bring {name} up")).await
    }

    /// Takes an interface down.
    ///
    /// # Errors
    /// [`LinkError::Request`].
    pub async fn set_down(&self, index: u32, name: &str) -> Result<(), LinkError> {
        self.change(LinkUnspec::new_with_index(index).down().build(), format!("take {name} down")).await
    }

    /// Sets `BR_ISOLATED` on a port: isolated ports of a bridge exchange no frames of any kind (`bridge(8)`).
    ///
    /// # Errors
    /// [`LinkError::Request`].
    pub async fn isolate(&self, port: u32, name: &str, isolated: bool) -> Result<(), LinkError> {
        let message = LinkBridgePort::new(port).isolated(isolated).build();
        let doing = format!("{} port {name}", if isolated { "isolate" } else { "end the isolation of" });
        self.handle.link().set_port(message).execute().await.map_err(failed(doing))
    }

    /// Adds an IPv4 address.
    ///
    /// # Errors
    /// [`LinkError::Request`].
    pub async fn add_address(&self, index: u32, name: &str, address: Ipv4Net) -> Result<(), LinkError> {
        let add = self.handle.address().add(index, address.addr().into(), address.prefix_len()).replace();
        add.execute().await.map_err(failed(format!("add the address {address} to {name}")))
    }

    /// Removes an IPv4 address.
    ///
    /// # Errors
    /// [`LinkError::Request`].
    pub async fn remove_address(&self, index: u32, name: &str, address: Ipv4Net) -> Result<(), LinkError> {
        let message =
            AddressMessageBuilder::<Ipv4Addr>::new().index(index).address(address.addr(), address.prefix_len()).build();
        let remove = self.handle.address().del(message);
        remove.execute().await.map_err(failed(format!("remove the address {address} from {name}")))
    }

    /// Deletes an interface.
    ///
    /// # Errors
    /// [`LinkError::Request`].
    pub async fn delete(&self, index: u32, name: &str) -> Result<(), LinkError> {
        self.handle.link().del(index).execute().await.map_err(failed(format!("delete {name}")))
    }

    /// An interface by its name.
    ///
    /// # Errors
    /// [`LinkError::Request`]; an interface that is not there is `None`.
    pub async fn find(&self, name: &str) -> Result<Option<Link>, LinkError> {
        Ok(self.read().await?.into_iter().find(|link| link.name == name))
    }

    /// Index of an interface by its name.
    ///
    /// # Errors
    /// [`LinkError::Request`]; an interface that is not there is `None`.
    pub async fn index_of(&self, name: &str) -> Result<Option<u32>, LinkError> {
        Ok(self.find(name).await?.map(|link| link.index))
    }

    async fn routes_of_leases(&self, bridge: u32, subnet: Ipv4Net) -> Result<Vec<RouteMessage>, LinkError> {
        let mut routes = self.routes(RouteHeader::RT_TABLE_MAIN, RouteType::Unicast, Some(bridge)).await?;
        routes.retain(|route| {
            let host = destination(route).is_some_and(|net| net.prefix_len() == 32 && subnet.contains(&net));
            host && route.header.protocol == RouteProtocol::Boot
        });
        Ok(routes)
    }

    async fn change(&self, message: LinkMessage, doing: impl Into<String>) -> Result<(), LinkError> {
        self.handle.link().change(message).execute().await.map_err(failed(doing))
    }

    async fn routes(&self, table: u8, kind: RouteType, oif: Option<u32>) -> Result<Vec<RouteMessage>, LinkError> {
        let mut message = RouteMessage::default();
        message.header.address_family = AddressFamily::Inet;
        message.header.table = table;
        message.header.kind = kind;
        message.attributes.extend(oif.map(RouteAttribute::Oif));
        let get = self.strict.route().get(message);
        get.execute().try_collect().await.map_err(failed("list the routes"))
    }
}

/// A new Ethernet address for a bridge: locally administered, unicast, and the same for the same gateway, so that VMs
/// which have it cached still reach a bridge that was made again.
#[must_use]
pub fn mac_for(gateway: Ipv4Addr) -> Mac {
    let [a, b, c, d] = gateway.octets();
    [0x02, 0xc0, a, b, c, d]
}

/// An Ethernet address in the usual notation.
#[must_use]
pub fn format_mac(mac: Mac) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}

fn read_link(message: &LinkMessage) -> Link {
    let mut link =
        Link { index: message.header.index, up: message.header.flags.contains(LinkFlags::Up), ..Link::default() };
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::IfName(name) => link.name.clone_from(name),
            LinkAttribute::Mtu(mtu) => link.mtu = *mtu,
            LinkAttribute::Address(bytes) => link.mac = bytes.as_slice().try_into().ok(),
            LinkAttribute::Controller(index) => link.master = Some(*index),
            LinkAttribute::LinkInfo(infos) => {
                for info in infos {
                    match info {
                        LinkInfo::Kind(kind) => link.is_bridge = *kind == InfoKind::Bridge,
                        LinkInfo::PortData(InfoPortData::BridgePort(port)) => {
                            link.isolated = port.contains(&InfoBridgePort::Isolated(true));
                        }
                        _ => {}
                    }
                }
            }
            _ => {}
        }
    }
    link
}

/// Whether the address of a bridge is pinned, as sysfs tells: netlink does not. `None` where sysfs shows another
/// network namespace than the one we are in.
fn mac_pinned(link: &Link) -> Option<bool> {
    let attribute = |name: &str| std::fs::read_to_string(format!("/sys/class/net/{}/{name}", link.name)).ok();
    let mac = format_mac(link.mac?);
    let same = attribute("ifindex")?.trim() == link.index.to_string() && attribute("address")?.trim() == mac;
    same.then(|| attribute("addr_assign_type")).flatten().map(|kind| kind.trim() == ADDRESS_WAS_SET)
}

fn destination(route: &RouteMessage) -> Option<Ipv4Net> {
    route.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Destination(RouteAddress::Inet(address)) => {
            Ipv4Net::new(*address, route.header.destination_prefix_length).ok()
        }
        _ => None,
    })
}

/// The interface that a route leads out of; the first of several.
fn output_interface(route: &RouteMessage) -> Option<u32> {
    route.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Oif(index) => Some(*index),
        RouteAttribute::MultiPath(hops) => hops.first().map(|hop| hop.interface_index),
        _ => None,
    })
}

fn priority(route: &RouteMessage) -> u32 {
    let metric = route.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Priority(metric) => Some(*metric),
        _ => None,
    });
    metric.unwrap_or(0)
}
