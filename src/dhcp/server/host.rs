//! What the host says and the leases say, brought together: at the start, when the bridge changes, and now and then.

use std::collections::{HashMap, HashSet};
use std::net::Ipv4Addr;

use super::Error;
use super::bridge::{self, Bridge};
use super::worker::Worker;
use crate::dhcp::addresses::State;
use crate::dhcp::engine::Now;
use crate::dhcp::routes::{self, Change};

impl Worker {
    /// At the start: addresses that seem to be in use though their leases are lost are kept from others, ports of the
    /// bridge are told apart, and the routes are made to match the leases.
    pub(super) fn meet_the_host(&mut self, lost: bool, missing: bool, now: Now) -> Result<(), Error> {
        let Some(index) = self.bridge.as_ref().map(|bridge| bridge.link.index) else { return Ok(()) };
        // Routes of leases without any lease file: that is no first start.
        let gone = missing && routes::present(&mut self.netlink, index).is_ok_and(|routes| !routes.is_empty());
        if lost || gone {
            self.hold_what_lives(index, now).map_err(self.io("find out which addresses are in use"))?;
        }
        if self.config.port_lease_limit > 0 {
            for (mac, port) in routes::ports(&mut self.netlink, index).map_err(self.io("read the bridge's stations"))? {
                self.engine.locate(mac, port);
            }
        }
        self.match_routes(index).map_err(self.io("make the host routes match the leases"))
    }

    fn hold_what_lives(&mut self, index: u32, now: Now) -> std::io::Result<()> {
        let mut live: HashMap<Ipv4Addr, _> =
            routes::present(&mut self.netlink, index)?.into_iter().map(|ip| (ip, None)).collect();
        let neighbours = routes::neighbours(&mut self.netlink, index)?;
        live.extend(neighbours.into_iter().map(|(ip, mac)| (ip, Some(mac))));
        for (ip, mac) in &live {
            self.engine.hold(*ip, *mac, now);
        }
        // Whoever is silent now may still have a lease.
        self.engine.doubt_all();
        tracing::warn!(addresses = live.len(), "leases were lost; addresses that seem to be in use are held back");
        Ok(())
    }

    /// Adds the routes that are missing and removes those of ours that nobody holds a lease for.
    fn match_routes(&mut self, index: u32) -> std::io::Result<()> {
        let present: HashSet<Ipv4Addr> = routes::present(&mut self.netlink, index)?.into_iter().collect();
        let mut changes = Vec::new();
        let mut wanted = HashSet::new();
        for (ip, entry) in self.engine.routed() {
            wanted.insert(ip);
            if matches!(entry.state, State::Bound { .. }) && !present.contains(&ip) {
                changes.push(Change::Add(ip));
            }
        }
        let missing = changes.len();
        let strays = present.iter().filter(|ip| !wanted.contains(ip) && self.config.subnet.is_host(**ip));
        for ip in strays {
            // Nobody holds a lease, yet somebody was given a route.
            self.engine.doubt(*ip);
            changes.push(Change::Remove(*ip));
        }
        if changes.is_empty() {
            return Ok(());
        }
        tracing::info!(missing, strays = changes.len() - missing, "host routes are made to match the leases");
        let results = routes::change(&mut self.netlink, index, &changes)?;
        results.into_iter().collect()
    }

    /// Compares the routes with the leases and repairs them.
    pub(super) fn repair_routes(&mut self) {
        let Some(bridge) = self.bridge.as_ref().filter(|bridge| bridge.link.up) else { return };
        if let Err(error) = self.match_routes(bridge.link.index) {
            tracing::warn!(%error, "cannot make the host routes match the leases");
        }
    }

    /// Looks at the bridge again: it may be gone, another one, or up again without its routes.
    pub(super) fn follow_the_bridge(&mut self) -> Result<(), Error> {
        let link = bridge::look_up(&mut self.netlink, &self.config.interface)?;
        let before = self.bridge.as_ref().map(|bridge| bridge.link);
        if link == before {
            return Ok(());
        }
        let interface = &self.config.interface;
        match (link, &mut self.bridge) {
            (None, gone) => {
                *gone = None;
                tracing::warn!(interface, "the bridge is gone; DHCP waits for it to come back");
            }
            (Some(link), Some(same)) if same.link.index == link.index => same.link = link,
            (Some(link), other) => {
                // The port can only be claimed anew once the old claim is gone.
                *other = None;
                *other = Bridge::open(interface, link)
                    .inspect_err(|error| tracing::warn!(%error, "cannot serve the bridge yet"))
                    .ok();
                self.prober.reset();
                tracing::info!(interface, "the bridge is another one; DHCP serves it");
            }
        }
        if link.is_some_and(|link| link.up) && before.is_none_or(|before| !before.up || link != Some(before)) {
            self.repair_routes();
        }
        Ok(())
    }
}
