//! What the server answers, and what has to be done first: pure, with the clock as an argument.
//!
//! [`Engine::handle`] takes a request and returns a [`Step`]: effects to carry out in order, and the reply that may go
//! out only when all of them have succeeded. A lease is granted the moment it is decided, so that no later request can
//! have its address; [`Engine::confirm`] or [`Engine::revoke`] says afterwards whether it became durable.

mod policy;

use std::collections::HashMap;
use std::net::Ipv4Addr;
use std::time::Duration;

use jiff::Timestamp;

use super::Mac;
use super::addresses::{Entry, Pool, Port, State};
use super::leases::{Lease, Record};
use super::reply::{Parameters, Reply};
use super::wire::{Kind, Request};

/// How long an offer keeps its address.
pub const OFFER_HOLD: Duration = Duration::from_secs(60);

/// How long an address rests that was found in use.
pub const DECLINE_REST: Duration = Duration::from_secs(600);

/// How long the server listens for an answer before it takes an address in doubt for unused.
pub const PROBE_WAIT: Duration = Duration::from_millis(400);

/// A lease of another configuration, or of a clock that was wrong, may last this long if leases are shorter here.
const LONGEST_FOREIGN_LEASE: Duration = Duration::from_secs(24 * 3600);

/// The time, on two clocks: leases are timed by the one that never steps, and written down by the one on the wall.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Now {
    /// Since any moment before, such as the start of the server.
    pub monotonic: Duration,
    /// For what outlives the process.
    pub wall: Timestamp,
}

impl Now {
    /// When a lease that ends at this point of the monotonic clock will have ended, in whole seconds, rounded up.
    fn wall_of(self, until: Duration) -> Timestamp {
        let left = i128::try_from(until.saturating_sub(self.monotonic).as_nanos()).unwrap_or(i128::MAX);
        let nanoseconds = self.wall.as_nanosecond().saturating_add(left);
        let seconds = nanoseconds.div_euclid(1_000_000_000) + i128::from(nanoseconds.rem_euclid(1_000_000_000) > 0);
        let seconds = i64::try_from(seconds).unwrap_or(i64::MAX);
        Timestamp::from_second(seconds).unwrap_or(Timestamp::MAX)
    }
}

/// Something to be done before the reply goes out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Effect {
    /// Put in the host route of an address.
    AddRoute(Ipv4Addr),
    /// Take out the host route of an address.
    RemoveRoute(Ipv4Addr),
    /// Write this down, durably.
    Write(Record),
    /// Ask by ARP who has this address; see [`Engine::in_use`].
    Probe(Ipv4Addr),
}

/// Why a request got no lease, or no answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// The relay's address is not the packet's source, or not one of the subnet.
    Relay,
    /// Neither an address to ask for nor a server to ask.
    Senseless,
    /// A client that the server has no record of wants to keep an address (RFC 2131 section 4.3.2: remain silent).
    Unknown,
    /// Someone who does not hold the address wants to end its lease.
    NotHolder,
    /// No address is free.
    PoolEmpty,
    /// The port holds as many addresses as one may.
    PortLimit,
    /// Isolation is not verified: no new lease.
    Withheld,
}

impl Refusal {
    /// The word for it in metrics and logs.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Relay => "relay",
            Self::Senseless => "senseless",
            Self::Unknown => "unknown_client",
            Self::NotHolder => "not_holder",
            Self::PoolEmpty => "pool_empty",
            Self::PortLimit => "port_limit",
            Self::Withheld => "isolation_unverified",
        }
    }
}

/// What follows from a request.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
#[must_use]
pub struct Step {
    /// To be done in this order, before the reply goes out.
    pub effects: Vec<Effect>,
    /// The answer, if there is one.
    pub reply: Option<Reply>,
    /// Why there is no lease in it.
    pub refusal: Option<Refusal>,
    /// The lease that must be durable for the reply to go out. A renewal has none: it extends one that already is.
    pub grant: Option<(Ipv4Addr, Mac)>,
}

impl Step {
    fn refused(refusal: Refusal) -> Self {
        Self { refusal: Some(refusal), ..Self::default() }
    }

    fn reply(reply: Reply) -> Self {
        Self { reply: Some(reply), ..Self::default() }
    }

    fn effects(effects: Vec<Effect>) -> Self {
        Self { effects, ..Self::default() }
    }
}

/// What the engine goes by.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    /// What clients are told.
    pub parameters: Parameters,
    /// How many addresses one port of the bridge may hold; 0: any number.
    pub port_lease_limit: u32,
}

/// A request that waits until it is known whether its address is in use.
#[derive(Debug, Clone)]
struct Waiting {
    request: Request,
    port: Option<Port>,
}

/// The lease engine.
#[derive(Debug)]
pub struct Engine {
    settings: Settings,
    pool: Pool,
    waiting: HashMap<Ipv4Addr, Waiting>,
}

impl Engine {
    /// An engine without leases.
    #[must_use]
    pub fn new(settings: Settings, addresses: &[Ipv4Addr]) -> Self {
        Self { settings, pool: Pool::new(addresses), waiting: HashMap::new() }
    }

    /// Goes by other settings and another pool from now on. Leases of addresses that left the pool stay until they run
    /// out or their holder asks to renew: it is then told to ask for another, as the old address no longer leads here.
    pub fn reconfigure(&mut self, settings: Settings, addresses: &[Ipv4Addr]) {
        self.settings = settings;
        self.pool.set_members(addresses);
        let pool = &self.pool;
        self.waiting.retain(|ip, _| pool.get(*ip).is_some_and(|entry| matches!(entry.state, State::Probing { .. })));
    }

    /// The addresses and what is known of them.
    #[must_use]
    pub fn pool(&self) -> &Pool {
        &self.pool
    }

    /// Takes in leases that were written down earlier. One that has run out is remembered, and its address is in doubt:
    /// the clock may have been wrong. One that lasts longer than any would that is granted here is cut.
    pub fn restore(&mut self, mut leases: Vec<Lease>, now: Now) {
        leases.sort_by_key(|lease| lease.expiry);
        let longest = self.settings.parameters.lease_time.max(LONGEST_FOREIGN_LEASE);
        for Lease { mac, ip, expiry } in leases {
            if !self.settings.parameters.subnet.is_host(ip) || ip == self.settings.parameters.gateway {
                tracing::warn!(%mac, %ip, "a lease of an address outside of the subnet is left out");
                continue;
            }
            match Duration::try_from(expiry.duration_since(now.wall)) {
                Ok(left) if !left.is_zero() => {
                    self.pool.bind(ip, mac, None, now.monotonic.saturating_add(left.min(longest)), true);
                    // It may last longer than was written down: renewals go on while the disk is full.
                    self.pool.doubt(ip);
                }
                _ => self.pool.remember(ip, mac),
            }
        }
    }

    /// Keeps an address from everyone but its owner, if one is known, for as long as a lost lease may last.
    pub fn hold(&mut self, ip: Ipv4Addr, owner: Option<Mac>, now: Now) {
        if self.pool.get(ip).is_some_and(|entry| entry.state == State::Free) {
            let longest = self.settings.parameters.lease_time.max(LONGEST_FOREIGN_LEASE);
            self.pool.hold(ip, owner, now.monotonic.saturating_add(longest));
        }
    }

    /// Notes that there is reason to think that someone uses an address.
    pub fn doubt(&mut self, ip: Ipv4Addr) {
        self.pool.doubt(ip);
    }

    /// Notes that there may be a lease of any address that is free.
    pub fn doubt_all(&mut self) {
        let all: Vec<Ipv4Addr> = self.pool.iter().map(|(ip, _)| ip).collect();
        all.into_iter().for_each(|ip| self.pool.doubt(ip));
    }

    /// Notes the port of the bridge behind which a client is, for its lease to be counted against.
    pub fn locate(&mut self, mac: Mac, port: Port) {
        if let Some((ip, _)) = self.pool.owned_by(mac) {
            self.pool.set_port(ip, port);
        }
    }

    /// Every lease with its expiry by the wall clock as it is now.
    #[must_use]
    pub fn leases(&self, now: Now) -> Vec<Lease> {
        let lease = |(ip, entry): (Ipv4Addr, &Entry)| match (entry.state, entry.owner) {
            (State::Bound { until, .. }, Some(mac)) => Some(Lease { mac, ip, expiry: now.wall_of(until) }),
            _ => None,
        };
        self.pool.iter().filter_map(lease).collect()
    }

    /// The addresses that must have a host route, leased ones and those that may be.
    pub fn routed(&self) -> impl Iterator<Item = (Ipv4Addr, &Entry)> {
        self.pool.iter().filter(|(_, entry)| matches!(entry.state, State::Bound { .. } | State::Held { .. }))
    }

    /// When [`Engine::tick`] has something to do next, on the monotonic clock.
    #[must_use]
    pub fn next_tick(&self) -> Option<Duration> {
        self.pool.next_end()
    }

    /// Ends what has run out: leases, offers, rests and probes that nobody answered.
    pub fn tick(&mut self, now: Now, may_grant: bool) -> Vec<Step> {
        let mut steps = Vec::new();
        while let Some((ip, entry)) = self.pool.end_next(now.monotonic) {
            match entry.state {
                State::Bound { .. } | State::Held { .. } => {
                    if matches!(entry.state, State::Held { .. }) {
                        self.pool.doubt(ip);
                    }
                    steps.push(Step::effects(vec![Effect::RemoveRoute(ip)]));
                }
                State::Probing { to, .. } => steps.push(self.nobody_uses(ip, to, now, may_grant)),
                State::Free | State::Offered { .. } | State::Declined { .. } => {}
            }
        }
        steps
    }

    /// Someone answered a probe: the address rests, and the client that it was meant for gets another. It counts against
    /// the port that the answer came in by, and from a port that holds all it may no answer counts: a VM could claim every
    /// address otherwise.
    pub fn in_use(&mut self, ip: Ipv4Addr, by: Mac, from: Option<Port>, now: Now, may_grant: bool) -> Step {
        let Some(State::Probing { to, .. }) = self.pool.get(ip).map(|entry| entry.state) else {
            return Step::default();
        };
        if by == to {
            // It uses the address that it is about to get, which is no reason not to give it.
            self.pool.withdraw(to);
            return self.nobody_uses(ip, to, now, may_grant);
        }
        if self.is_over_limit(from) {
            return Step::default();
        }
        tracing::warn!(%ip, mac = %by, "an address that nobody leased is in use; it is left alone for ten minutes");
        self.pool.withdraw(to);
        self.pool.decline(ip, from, now.monotonic + DECLINE_REST);
        match self.waiting.remove(&ip) {
            Some(Waiting { request, port }) if request.kind == Kind::Discover => {
                self.allocate(&request, port, now, may_grant)
            }
            _ => Step::default(),
        }
    }

    /// The lease has reached the disk. Returns whether the client has it still.
    pub fn confirm(&mut self, ip: Ipv4Addr, mac: Mac) -> bool {
        self.pool.confirm(ip, mac)
    }

    /// The lease did not reach the disk, or its route could not be put in: it is as if it had never been granted.
    pub fn revoke(&mut self, ip: Ipv4Addr, mac: Mac) -> Step {
        match self.pool.get(ip) {
            Some(entry) if entry.is_bound_to(mac) && matches!(entry.state, State::Bound { durable: false, .. }) => {
                self.pool.free_up(ip);
                Step::effects(vec![Effect::RemoveRoute(ip)])
            }
            _ => Step::default(),
        }
    }
}

#[cfg(test)]
mod model;
#[cfg(test)]
mod tests;
