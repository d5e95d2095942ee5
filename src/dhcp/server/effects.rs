//! Carrying out what the engine decided: routes first, then the disk, then the reply.

use std::net::Ipv4Addr;

use super::Error;
use super::worker::Worker;
use crate::dhcp::Mac;
use crate::dhcp::engine::{Effect, Refusal, Step};
use crate::dhcp::frame;
use crate::dhcp::leases::Record;
use crate::dhcp::reply::{Answer, Reply};
use crate::dhcp::routes::{self, Change};
use crate::dhcp::wire::{Kind, Request};

/// An ACK that goes out when its lease is durable.
pub(super) struct Waiting {
    pub batch: u64,
    pub reply: Reply,
    /// The lease, if it is a new one: without it there is nothing to acknowledge.
    pub grant: Option<(Ipv4Addr, Mac)>,
}

impl Worker {
    /// Carries out steps that were decided on together. All route changes go to the kernel in one call, all records to
    /// the store in one batch.
    pub(super) fn carry_out(&mut self, steps: Vec<Step>) -> Result<(), Error> {
        if steps.is_empty() {
            return Ok(());
        }
        let routed = self.change_routes(&steps);
        let (mut records, mut waiting) = (Vec::new(), Vec::new());
        self.batch += 1;
        for (mut step, routed) in steps.into_iter().zip(routed) {
            if !routed {
                self.give_up(&mut step);
            }
            let before = records.len();
            for effect in &step.effects {
                match effect {
                    Effect::Write(record) => records.push(*record),
                    Effect::Probe(ip) => self.start_probe(*ip),
                    Effect::AddRoute(_) | Effect::RemoveRoute(_) => {}
                }
            }
            let writes = records.len() > before;
            match step.reply {
                Some(reply) if writes => waiting.push(Waiting { batch: self.batch, reply, grant: step.grant }),
                Some(reply) => self.send(&reply),
                None => {}
            }
        }
        self.waiting.extend(waiting);
        if !records.is_empty() {
            self.store.write(self.batch, records)?;
        }
        Ok(())
    }

    /// Changes the routes that the steps ask for, and says for each whether it got those that it needs.
    fn change_routes(&mut self, steps: &[Step]) -> Vec<bool> {
        let (mut changes, mut owners) = (Vec::new(), Vec::new());
        for (step, effects) in steps.iter().map(|step| &step.effects).enumerate() {
            for effect in effects {
                let change = match effect {
                    Effect::AddRoute(ip) => Change::Add(*ip),
                    Effect::RemoveRoute(ip) => Change::Remove(*ip),
                    Effect::Write(_) | Effect::Probe(_) => continue,
                };
                changes.push(change);
                owners.push(step);
            }
        }
        let mut routed = vec![true; steps.len()];
        if changes.is_empty() {
            return routed;
        }
        let failed = |change: &Change, error: &std::io::Error| {
            tracing::warn!(?change, %error, "cannot change a host route");
        };
        let results = match &self.bridge {
            Some(bridge) => routes::change(&mut self.netlink, bridge.link.index, &changes),
            None => Err(std::io::Error::from_raw_os_error(nix::libc::ENODEV)),
        };
        let Ok(results) = results.inspect_err(|error| failed(&changes[0], error)) else {
            for (change, step) in changes.iter().zip(&owners) {
                routed[*step] &= matches!(change, Change::Remove(_));
            }
            return routed;
        };
        for ((result, change), step) in results.iter().zip(&changes).zip(&owners) {
            if let Err(error) = result {
                failed(change, error);
                routed[*step] &= matches!(change, Change::Remove(_));
            }
        }
        routed
    }

    /// A step whose route could not be put in: no lease is written down, no reply sent.
    fn give_up(&mut self, step: &mut Step) {
        self.metrics.lease_failed();
        step.reply = None;
        step.effects.retain(|effect| !matches!(effect, Effect::Write(Record::Grant(_))));
        if let Some((ip, mac)) = step.grant.take() {
            let _ = self.engine.revoke(ip, mac);
        }
    }

    fn start_probe(&mut self, ip: Ipv4Addr) {
        let now = self.now().monotonic;
        let Some(bridge) = &self.bridge else { return };
        if let Err(error) = self.prober.start(&bridge.link, ip, now) {
            tracing::warn!(%error, %ip, "cannot probe whether an address is in use");
        }
    }

    /// Sends the replies whose leases have become durable, and takes back the leases that have not.
    pub(super) fn settle(&mut self) -> Result<(), Error> {
        while let Some(outcome) = self.next_outcome() {
            while self.waiting.front().is_some_and(|waiting| waiting.batch <= outcome.up_to) {
                let Some(waiting) = self.waiting.pop_front() else { break };
                if outcome.durable { self.acknowledge(&waiting)? } else { self.take_back(&waiting)? }
            }
        }
        Ok(())
    }

    fn acknowledge(&mut self, Waiting { reply, grant, .. }: &Waiting) -> Result<(), Error> {
        if let Some((ip, mac)) = *grant
            && !self.engine.confirm(ip, mac)
        {
            // Taken back meanwhile: what was written down must not outlive it.
            self.batch += 1;
            return Ok(self.store.write(self.batch, vec![Record::Release { mac, ip }])?);
        }
        tracing::debug!(mac = %reply.chaddr, answer = ?reply.answer, "lease granted");
        self.send(reply);
        Ok(())
    }

    fn take_back(&mut self, Waiting { reply, grant, .. }: &Waiting) -> Result<(), Error> {
        match *grant {
            // The lease that is being renewed is on disk already, and stays good.
            None => self.send(reply),
            Some((ip, mac)) => {
                self.metrics.lease_failed();
                let undo = self.engine.revoke(ip, mac);
                self.carry_out(vec![undo])?;
            }
        }
        Ok(())
    }

    pub(super) fn send(&mut self, reply: &Reply) {
        match reply.answer {
            Answer::Ack(_) => self.metrics.lease_granted(),
            Answer::Nak(_) => self.metrics.lease_failed(),
            Answer::Offer(_) | Answer::Inform => {}
        }
        let Some(bridge) = &self.bridge else { return };
        let frame = frame::seal(reply, bridge.link.mac, self.config.gateway);
        if let Err(error) = bridge.frames.send(&frame) {
            tracing::warn!(%error, mac = %reply.chaddr, "cannot send a reply; the client will ask again");
        }
    }

    /// Counts and logs a request that was refused.
    pub(super) fn note_refusal(&mut self, request: &Request, port: Option<crate::dhcp::addresses::Port>, step: &Step) {
        let Some(refusal) = step.refusal else { return };
        let (reason, mac) = (refusal.name(), request.chaddr);
        self.dropped(reason);
        if matches!(refusal, Refusal::PoolEmpty | Refusal::PortLimit) {
            self.metrics.lease_failed();
        }
        if refusal == Refusal::PortLimit {
            self.metrics.port_limit_refused();
        }
        let Some(more) = self.log.allow(reason) else { return };
        match refusal {
            Refusal::PortLimit => tracing::warn!(
                %mac, port = port.map(|port| port.0), limit = self.config.port_lease_limit, more,
                "no lease: the bridge port holds as many addresses as --port-lease-limit allows"
            ),
            Refusal::PoolEmpty => tracing::warn!(%mac, more, "no lease: every address of the pool is taken"),
            Refusal::Withheld => tracing::warn!(%mac, more, "no lease: isolation is not verified"),
            Refusal::Relay | Refusal::NotHolder => {
                tracing::warn!(%mac, sender = %request.sender, source = %request.source, reason, more, "refused");
            }
            Refusal::Senseless | Refusal::Unknown => {
                tracing::debug!(%mac, kind = ?request.kind, reason, more, "not answered");
            }
        }
        debug_assert!(request.kind != Kind::Release || step.reply.is_none());
    }

    pub(super) fn dropped(&self, reason: &'static str) {
        self.metrics.dhcp_dropped(reason);
    }

    pub(super) fn update_gauges(&self) {
        let pool = self.engine.pool();
        self.metrics.set_leases(pool.bound(), pool.free());
    }
}
