//! Which request gets what: RFC 2131 section 4.3, one function per message.

use std::net::Ipv4Addr;

use super::{Effect, Engine, Now, OFFER_HOLD, PROBE_WAIT, Refusal, Step, Waiting};
use crate::dhcp::Mac;
use crate::dhcp::addresses::{Entry, Port, State};
use crate::dhcp::engine::DECLINE_REST;
use crate::dhcp::leases::{Lease, Record};
use crate::dhcp::reply::{Answer, Reply};
use crate::dhcp::wire::{Kind, Request};

impl Engine {
    /// Decides on a request. `port` is the port of the bridge that it came in by, `None` when ports do not matter;
    /// without `may_grant` only those who hold a lease are answered.
    pub fn handle(&mut self, request: &Request, port: Option<Port>, now: Now, may_grant: bool) -> Step {
        let parameters = &self.settings.parameters;
        if request.is_relayed() && (request.giaddr != request.source || !parameters.subnet.is_host(request.giaddr)) {
            return Step::refused(Refusal::Relay);
        }
        match request.kind {
            Kind::Discover => self.discover(request, port, now, may_grant),
            Kind::Request => self.request(request, port, now, may_grant),
            Kind::Decline => self.decline(request, port, now),
            Kind::Release => self.release(request, port),
            Kind::Inform => self.inform(request),
        }
    }

    /// Section 4.3.1: the address that the client has, else the one it was offered, else the one it had, else another.
    fn discover(&mut self, request: &Request, port: Option<Port>, now: Now, may_grant: bool) -> Step {
        let mac = request.chaddr;
        let owned = self.pool.owned_by(mac).filter(|(_, entry)| entry.pooled);
        if let Some((ip, _)) = owned.filter(|(_, entry)| matches!(entry.state, State::Bound { durable: true, .. })) {
            return Step::reply(self.answer(request, Answer::Offer(ip)));
        }
        if !may_grant {
            return Step::refused(Refusal::Withheld);
        }
        if let Some((ip, entry)) = self.pool.promised_to(mac) {
            return match entry.state {
                // The answer to the probe will be the answer to this request, too.
                State::Probing { .. } => {
                    self.waiting.insert(ip, Waiting { request: request.clone(), port });
                    Step::default()
                }
                _ => self.offer(ip, request, entry.port, now),
            };
        }
        if self.is_over_limit(port) {
            return Step::refused(Refusal::PortLimit);
        }
        match owned {
            Some((ip, entry)) if entry.doubtful && entry.state == State::Free => self.probe(ip, request, port, now),
            Some((ip, entry)) if matches!(entry.state, State::Free | State::Held { .. }) => {
                self.offer(ip, request, port, now)
            }
            // Granted, and on its way to the disk.
            Some((ip, entry)) if matches!(entry.state, State::Bound { .. }) => {
                Step::reply(self.answer(request, Answer::Offer(ip)))
            }
            _ => match request.requested.filter(|ip| self.is_held_for_someone(*ip)) {
                Some(ip) => self.probe(ip, request, port, now),
                None => self.allocate(request, port, now, may_grant),
            },
        }
    }

    /// Gives a newcomer the address that has rested longest.
    pub(super) fn allocate(&mut self, request: &Request, port: Option<Port>, now: Now, may_grant: bool) -> Step {
        if !may_grant {
            return Step::refused(Refusal::Withheld);
        }
        match self.pool.longest_rested() {
            None => Step::refused(Refusal::PoolEmpty),
            Some((ip, entry)) if entry.doubtful => self.probe(ip, request, port, now),
            Some((ip, _)) => self.offer(ip, request, port, now),
        }
    }

    fn offer(&mut self, ip: Ipv4Addr, request: &Request, port: Option<Port>, now: Now) -> Step {
        self.pool.offer(ip, request.chaddr, port, now.monotonic + OFFER_HOLD);
        Step::reply(self.answer(request, Answer::Offer(ip)))
    }

    /// Finds out whether an address is in use before the request is answered.
    fn probe(&mut self, ip: Ipv4Addr, request: &Request, port: Option<Port>, now: Now) -> Step {
        self.pool.probe(ip, request.chaddr, port, now.monotonic + PROBE_WAIT);
        self.waiting.insert(ip, Waiting { request: request.clone(), port });
        Step::effects(vec![Effect::Probe(ip)])
    }

    /// Nobody else answered for an address that was probed: its client may have it.
    pub(super) fn nobody_uses(&mut self, ip: Ipv4Addr, to: Mac, now: Now, may_grant: bool) -> Step {
        let Some(Waiting { request, port }) = self.waiting.remove(&ip) else { return Step::default() };
        if !may_grant || request.chaddr != to {
            return Step::refused(Refusal::Withheld);
        }
        self.pool.offer(ip, to, port, now.monotonic + OFFER_HOLD);
        match request.kind {
            Kind::Request => self.grant(ip, &request, port, now, may_grant),
            _ => Step::reply(self.answer(&request, Answer::Offer(ip))),
        }
    }

    /// Section 4.3.2: which of the four kinds of request it is shows in what it carries.
    fn request(&mut self, request: &Request, port: Option<Port>, now: Now, may_grant: bool) -> Step {
        let ours = self.settings.parameters.gateway;
        match (request.server_id, request.requested) {
            (Some(id), _) if id != ours => {
                // It has chosen another server. Only it can know.
                if request.sender == request.chaddr {
                    self.pool.withdraw(request.chaddr);
                }
                Step::default()
            }
            (Some(_), Some(ip)) => self.select(ip, request, port, now, may_grant),
            (_, None) if !request.ciaddr.is_unspecified() => self.keep(request.ciaddr, request, port, now, may_grant),
            (None, Some(ip)) => self.keep(ip, request, port, now, may_grant),
            (_, None) => Step::refused(Refusal::Senseless),
        }
    }

    /// The client takes an offer of ours.
    fn select(&mut self, ip: Ipv4Addr, request: &Request, port: Option<Port>, now: Now, may_grant: bool) -> Step {
        match self.entitled(ip, request.chaddr) {
            true => self.grant(ip, request, port, now, may_grant),
            false => self.nak(request, "the address is not offered to you"),
        }
    }

    /// The client has an address and wants to keep it: after a restart, or to renew or rebind its lease.
    fn keep(&mut self, ip: Ipv4Addr, request: &Request, port: Option<Port>, now: Now, may_grant: bool) -> Step {
        let mac = request.chaddr;
        if !self.settings.parameters.subnet.is_host(ip) {
            return self.nak(request, "the address is not one of this network");
        }
        if self.pool.get(ip).is_some_and(|entry| !entry.pooled && entry.is_bound_to(mac)) {
            return self.nak(request, "the address has left the pool");
        }
        let in_doubt = |entry: &Entry| entry.doubtful && entry.state == State::Free;
        let in_doubt = self.pool.get(ip).is_some_and(in_doubt) && self.pool.promised_to(mac).is_none();
        if self.entitled(ip, mac) && !in_doubt {
            return self.grant(ip, request, port, now, may_grant);
        }
        if self.is_held_for_someone(ip) || in_doubt && self.entitled(ip, mac) {
            let refusal = if may_grant { None } else { Some(Refusal::Withheld) };
            let refusal = refusal.or(self.is_over_limit(port).then_some(Refusal::PortLimit));
            return refusal.map_or_else(|| self.probe(ip, request, port, now), Step::refused);
        }
        if self.pool.owned_by(mac).is_some() || self.pool.promised_to(mac).is_some() {
            return self.nak(request, "the address is not leased to you");
        }
        if !request.ciaddr.is_unspecified() {
            // Whoever it is, it uses the address.
            self.pool.doubt(ip);
        }
        Step::refused(Refusal::Unknown)
    }

    /// Whether a client may have an address for the asking: it holds it, was offered it, or held it last.
    fn entitled(&self, ip: Ipv4Addr, mac: Mac) -> bool {
        let may_have = |entry: &Entry| match entry.state {
            State::Offered { to, .. } => to == mac,
            State::Free | State::Bound { .. } | State::Held { .. } => entry.owner == Some(mac),
            State::Probing { .. } | State::Declined { .. } => false,
        };
        self.pool.get(ip).is_some_and(|entry| entry.pooled && may_have(entry))
    }

    /// Whether an address is kept for the unknown holder of a lease that was lost. Whoever asks for it by name may have
    /// it if nobody else answers for it.
    fn is_held_for_someone(&self, ip: Ipv4Addr) -> bool {
        let held = |entry: &Entry| matches!(entry.state, State::Held { .. }) && entry.owner.is_none();
        self.pool.get(ip).is_some_and(held)
    }

    /// Leases an address, or extends its lease.
    fn grant(&mut self, ip: Ipv4Addr, request: &Request, port: Option<Port>, now: Now, may_grant: bool) -> Step {
        let mac = request.chaddr;
        let entry = self.pool.get(ip).copied();
        let renewal = entry
            .is_some_and(|entry| entry.is_bound_to(mac) && matches!(entry.state, State::Bound { durable: true, .. }));
        if !renewal && !may_grant {
            return Step::refused(Refusal::Withheld);
        }
        let counted = entry.is_some_and(|entry| entry.is_bound_to(mac) || entry.is_offered_to(mac));
        if !counted && self.is_over_limit(port) {
            return Step::refused(Refusal::PortLimit);
        }
        // What a relay passes on says nothing about the port of a client that is known.
        let port = if counted && request.sender != mac { entry.and_then(|entry| entry.port) } else { port };

        let mut effects = Vec::new();
        if let Some((other, entry)) = self.pool.owned_by(mac).filter(|(other, _)| *other != ip)
            && matches!(entry.state, State::Bound { .. })
        {
            effects.extend(ended(mac, other));
        }
        let until = now.monotonic.saturating_add(self.settings.parameters.lease_time);
        self.pool.bind(ip, mac, port, until, renewal);
        effects.push(Effect::AddRoute(ip));
        effects.push(Effect::Write(Record::Grant(Lease { mac, ip, expiry: now.wall_of(until) })));
        let reply = Some(self.answer(request, Answer::Ack(ip)));
        Step { effects, reply, refusal: None, grant: (!renewal).then_some((ip, mac)) }
    }

    /// Section 4.3.3: the client found the address in use. It counts only from the client that the address is for.
    fn decline(&mut self, request: &Request, port: Option<Port>, now: Now) -> Step {
        let mac = request.chaddr;
        let ours = request.server_id.is_none_or(|id| id == self.settings.parameters.gateway);
        let named = request.requested.and_then(|ip| self.pool.get(ip).map(|entry| (ip, *entry)));
        match named {
            Some((_, entry)) if entry.port.zip(port).is_some_and(|(was, is)| was != is) => {
                Step::refused(Refusal::NotHolder)
            }
            Some((ip, entry)) if ours && self.is_client_itself(request) && entry.is_bound_to(mac) => {
                self.pool.decline(ip, entry.port.or(port), now.monotonic + DECLINE_REST);
                tracing::warn!(%ip, %mac, "the client found its address in use; it rests for ten minutes");
                Step::effects(ended(mac, ip).into())
            }
            Some((ip, entry)) if ours && self.is_client_itself(request) && entry.is_offered_to(mac) => {
                self.pool.decline(ip, entry.port.or(port), now.monotonic + DECLINE_REST);
                Step::default()
            }
            _ => Step::refused(Refusal::NotHolder),
        }
    }

    /// Section 4.3.4: the client gives its address back. It counts only from the address and the client that hold it, and
    /// where the client is behind another port than it was, its word is not taken for it.
    fn release(&mut self, request: &Request, port: Option<Port>) -> Step {
        let (mac, ip) = (request.chaddr, request.ciaddr);
        let ours = request.server_id.is_none_or(|id| id == self.settings.parameters.gateway);
        let elsewhere = |entry: &Entry| entry.port.zip(port).is_some_and(|(was, is)| was != is);
        let holds = self.pool.get(ip).is_some_and(|entry| entry.is_bound_to(mac) && !elsewhere(entry));
        if !ours || !holds || !self.is_client_itself(request) || request.source != ip {
            return Step::refused(Refusal::NotHolder);
        }
        self.pool.free_up(ip);
        Step::effects(ended(mac, ip).into())
    }

    /// Section 4.3.5: the client has an address from elsewhere and wants the parameters.
    fn inform(&mut self, request: &Request) -> Step {
        let own = request.is_relayed() || request.source == request.ciaddr;
        match own && self.settings.parameters.subnet.is_host(request.ciaddr) {
            true => Step::reply(self.answer(request, Answer::Inform)),
            false => Step::refused(Refusal::Senseless),
        }
    }

    /// Whether the frame came from the station that the request speaks for.
    fn is_client_itself(&self, request: &Request) -> bool {
        request.sender == request.chaddr && !request.is_relayed()
    }

    pub(super) fn is_over_limit(&self, port: Option<Port>) -> bool {
        let limit = self.settings.port_lease_limit;
        limit > 0 && port.is_some_and(|port| self.pool.count_of(port) >= limit)
    }

    fn nak(&self, request: &Request, reason: &'static str) -> Step {
        Step::reply(self.answer(request, Answer::Nak(reason)))
    }

    fn answer(&self, request: &Request, answer: Answer) -> Reply {
        Reply::new(request, answer, &self.settings.parameters)
    }
}

/// What the end of a lease takes, in this order: no packet goes to the old holder once the address can have a new one.
fn ended(mac: Mac, ip: Ipv4Addr) -> [Effect; 2] {
    [Effect::RemoveRoute(ip), Effect::Write(Record::Release { mac, ip })]
}
