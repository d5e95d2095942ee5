//! The addresses of the pool: who holds which, until when, and which one goes to the next newcomer.
//!
//! Every address is in exactly one [`State`], and every change goes through one function that keeps the indices in step,
//! so no address is ever held by two and none is lost. All operations take O(log n).
//!
//! Points in time are durations since a moment that the caller chooses, on a clock that never steps.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::net::Ipv4Addr;
use std::time::Duration;

use super::Mac;

/// A port of the bridge, by its interface index; 0 stands for a port that the bridge could not name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Port(pub u32);

/// What an address is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// Nobody holds it.
    Free,
    /// Kept for a client that has yet to take it.
    Offered {
        /// The client.
        to: Mac,
        /// When the offer lapses.
        until: Duration,
    },
    /// About to be offered, once it is known that nobody uses it.
    Probing {
        /// The client.
        to: Mac,
        /// When the silence counts as an answer.
        until: Duration,
    },
    /// Leased to its owner.
    Bound {
        /// When the lease runs out.
        until: Duration,
        /// Whether the lease has reached the disk.
        durable: bool,
    },
    /// Found in use by someone, and left alone for a while.
    Declined {
        /// When it may be tried again.
        until: Duration,
    },
    /// Perhaps leased, by leases that were lost: kept from everyone but its owner.
    Held {
        /// When whatever lease there was has run out.
        until: Duration,
    },
}

impl State {
    fn until(self) -> Option<Duration> {
        match self {
            Self::Free => None,
            Self::Offered { until, .. }
            | Self::Probing { until, .. }
            | Self::Bound { until, .. }
            | Self::Declined { until }
            | Self::Held { until } => Some(until),
        }
    }

    /// The client that the address is on its way to.
    fn promised_to(self) -> Option<Mac> {
        match self {
            Self::Offered { to, .. } | Self::Probing { to, .. } => Some(to),
            _ => None,
        }
    }

    /// Whether it counts against the limit of the port that caused it.
    fn counts(self) -> bool {
        !matches!(self, Self::Free | Self::Held { .. })
    }
}

/// An address and what is known of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    /// What it is doing.
    pub state: State,
    /// Who holds it, or held it last.
    pub owner: Option<Mac>,
    /// The bridge port that it counts against.
    pub port: Option<Port>,
    /// Whether there is reason to think that someone uses it though nobody holds it.
    pub doubtful: bool,
    /// Whether it is in the pool; if not, it is forgotten once its lease has run out.
    pub pooled: bool,
    /// Place in the order of resting: lower rested longer, 0 was never used.
    rest: u64,
}

impl Entry {
    const NEW: Self = Self { state: State::Free, owner: None, port: None, doubtful: false, pooled: false, rest: 0 };

    /// Whether its lease is this client's.
    #[must_use]
    pub fn is_bound_to(&self, mac: Mac) -> bool {
        matches!(self.state, State::Bound { .. }) && self.owner == Some(mac)
    }

    /// Whether it is on its way to this client.
    #[must_use]
    pub fn is_offered_to(&self, mac: Mac) -> bool {
        matches!(self.state, State::Offered { to, .. } if to == mac)
    }
}

/// The pool, and the leases of addresses that have left it.
#[derive(Debug, Default)]
pub struct Pool {
    entries: HashMap<Ipv4Addr, Entry>,
    /// The address that a client holds or held last.
    owned: HashMap<Mac, Ipv4Addr>,
    /// The address that is offered to a client, or probed for it.
    promised: HashMap<Mac, Ipv4Addr>,
    /// Free addresses of the pool in the order in which they go to newcomers: doubtful ones last.
    rested: BTreeSet<(bool, u64, Ipv4Addr)>,
    timers: BTreeSet<(Duration, Ipv4Addr)>,
    ports: HashMap<Port, u32>,
    bound: usize,
    rests: u64,
}

impl Pool {
    /// A pool of these addresses, all free and never used.
    #[must_use]
    pub fn new(addresses: &[Ipv4Addr]) -> Self {
        let mut pool = Self::default();
        pool.set_members(addresses);
        pool
    }

    /// Makes the pool consist of these addresses. One that is bound and no longer among them stays until its lease runs
    /// out; any other that is no longer among them is forgotten.
    pub fn set_members(&mut self, addresses: &[Ipv4Addr]) {
        let members: HashSet<Ipv4Addr> = addresses.iter().copied().collect();
        let gone: Vec<Ipv4Addr> = self.entries.keys().filter(|ip| !members.contains(ip)).copied().collect();
        for ip in gone {
            let entry = self.entry(ip);
            let state = if matches!(entry.state, State::Bound { .. }) { entry.state } else { State::Free };
            self.put(ip, Entry { pooled: false, state, ..entry });
        }
        for ip in members {
            let entry = self.entry(ip);
            self.put(ip, Entry { pooled: true, ..entry });
        }
    }

    /// What is known of an address; nothing of one that is neither in the pool nor leased.
    #[must_use]
    pub fn get(&self, ip: Ipv4Addr) -> Option<&Entry> {
        self.entries.get(&ip)
    }

    /// The address that a client holds, or held last and nobody has taken since.
    #[must_use]
    pub fn owned_by(&self, mac: Mac) -> Option<(Ipv4Addr, Entry)> {
        self.owned.get(&mac).map(|ip| (*ip, self.entry(*ip)))
    }

    /// The address that is offered to a client, or probed for it.
    #[must_use]
    pub fn promised_to(&self, mac: Mac) -> Option<(Ipv4Addr, Entry)> {
        self.promised.get(&mac).map(|ip| (*ip, self.entry(*ip)))
    }

    /// The free address that has rested longest; one that is in doubt only when there is no other.
    #[must_use]
    pub fn longest_rested(&self) -> Option<(Ipv4Addr, Entry)> {
        self.rested.first().map(|(_, _, ip)| (*ip, self.entry(*ip)))
    }

    /// How many addresses count against a port.
    #[must_use]
    pub fn count_of(&self, port: Port) -> u32 {
        self.ports.get(&port).copied().unwrap_or(0)
    }

    /// How many leases there are.
    #[must_use]
    pub fn bound(&self) -> usize {
        self.bound
    }

    /// How many addresses of the pool are free.
    #[must_use]
    pub fn free(&self) -> usize {
        self.rested.len()
    }

    /// Every address with what is known of it, in no order.
    pub fn iter(&self) -> impl Iterator<Item = (Ipv4Addr, &Entry)> {
        self.entries.iter().map(|(ip, entry)| (*ip, entry))
    }

    /// Keeps an address for a client, which loses whatever other address was kept for it.
    pub fn offer(&mut self, ip: Ipv4Addr, to: Mac, port: Option<Port>, until: Duration) {
        self.promise(ip, port, State::Offered { to, until }, to);
    }

    /// Keeps an address for a client while it is found out whether someone uses it.
    pub fn probe(&mut self, ip: Ipv4Addr, to: Mac, port: Option<Port>, until: Duration) {
        self.promise(ip, port, State::Probing { to, until }, to);
    }

    fn promise(&mut self, ip: Ipv4Addr, port: Option<Port>, state: State, to: Mac) {
        self.withdraw(to);
        let entry = self.entry(ip);
        self.put(ip, Entry { state, port, ..entry });
    }

    /// Takes back what was offered to a client. The address keeps its place in the order: it was never used.
    pub fn withdraw(&mut self, from: Mac) {
        if let Some(ip) = self.promised.get(&from).copied() {
            let entry = self.entry(ip);
            self.put(ip, Entry { state: State::Free, port: None, ..entry });
        }
    }

    /// Leases an address to a client, which loses whatever else it held or was offered.
    pub fn bind(&mut self, ip: Ipv4Addr, mac: Mac, port: Option<Port>, until: Duration, durable: bool) {
        self.withdraw(mac);
        if let Some(previous) = self.owned.get(&mac).copied().filter(|previous| *previous != ip) {
            self.free_up(previous);
        }
        let entry = self.entry(ip);
        let state = State::Bound { until, durable };
        self.put(ip, Entry { state, owner: Some(mac), port, doubtful: false, ..entry });
    }

    /// Notes that the lease of an address has reached the disk. Returns whether the client holds it still.
    pub fn confirm(&mut self, ip: Ipv4Addr, mac: Mac) -> bool {
        let entry = self.entry(ip);
        let State::Bound { until, .. } = entry.state else { return false };
        if entry.owner != Some(mac) {
            return false;
        }
        self.put(ip, Entry { state: State::Bound { until, durable: true }, ..entry });
        true
    }

    /// Ends whatever the address was doing. Its owner is remembered, and it is now the one that has rested least.
    pub fn free_up(&mut self, ip: Ipv4Addr) {
        self.rests += 1;
        let entry = self.entry(ip);
        self.put(ip, Entry { state: State::Free, port: None, rest: self.rests, ..entry });
    }

    /// Leaves an address alone that someone uses. It counts against the port that said so.
    pub fn decline(&mut self, ip: Ipv4Addr, port: Option<Port>, until: Duration) {
        self.rests += 1;
        let entry = self.entry(ip);
        let state = State::Declined { until };
        self.put(ip, Entry { state, owner: None, port, doubtful: true, rest: self.rests, ..entry });
    }

    /// Keeps an address from everyone but its owner, if one is known.
    pub fn hold(&mut self, ip: Ipv4Addr, owner: Option<Mac>, until: Duration) {
        let owner = owner.filter(|mac| self.owned.get(mac).is_none_or(|held| *held == ip));
        let entry = self.entry(ip);
        self.put(ip, Entry { state: State::Held { until }, owner, port: None, doubtful: true, ..entry });
    }

    /// Notes whose a free address was, before this program knew of it. Later calls count as more recent use.
    pub fn remember(&mut self, ip: Ipv4Addr, mac: Mac) {
        self.rests += 1;
        let free = self.entries.get(&ip).is_some_and(|entry| entry.state == State::Free);
        if free && !self.owned.contains_key(&mac) {
            let entry = self.entry(ip);
            self.put(ip, Entry { owner: Some(mac), doubtful: true, rest: self.rests, ..entry });
        }
    }

    /// Notes that there is reason to think that someone uses an address, or will when its lease has run out.
    pub fn doubt(&mut self, ip: Ipv4Addr) {
        if let Some(entry) = self.entries.get(&ip).copied() {
            self.put(ip, Entry { doubtful: true, ..entry });
        }
    }

    /// Notes the port behind which a lease's holder is.
    pub fn set_port(&mut self, ip: Ipv4Addr, port: Port) {
        if let Some(entry) = self.entries.get(&ip).copied().filter(|entry| entry.state.counts()) {
            self.put(ip, Entry { port: Some(port), ..entry });
        }
    }

    /// When the next lease, offer or rest ends.
    #[must_use]
    pub fn next_end(&self) -> Option<Duration> {
        self.timers.first().map(|(until, _)| *until)
    }

    /// The next address whose time is up, with what it was doing. It is free afterwards, but for one that was being
    /// probed, which the caller decides on.
    pub fn end_next(&mut self, now: Duration) -> Option<(Ipv4Addr, Entry)> {
        let (_, ip) = self.timers.first().copied().filter(|(until, _)| *until <= now)?;
        let entry = self.entry(ip);
        match entry.state {
            // An offer that nobody took leaves the address where it was in the order.
            State::Offered { to, .. } | State::Probing { to, .. } => self.withdraw(to),
            _ => self.free_up(ip),
        }
        Some((ip, entry))
    }

    fn entry(&self, ip: Ipv4Addr) -> Entry {
        self.entries.get(&ip).copied().unwrap_or(Entry::NEW)
    }

    /// The one place where an address changes. It takes the old entry out of the indices and puts the new one in.
    fn put(&mut self, ip: Ipv4Addr, new: Entry) {
        if let Some(old) = self.entries.remove(&ip) {
            self.unindex(ip, &old);
        }
        // An address takes its new owner from wherever that client was remembered.
        if let Some(other) = new.owner.and_then(|mac| self.owned.get(&mac).copied()).filter(|other| *other != ip) {
            let forgotten = Entry { owner: None, ..self.entry(other) };
            self.put(other, forgotten);
        }
        if new.pooled || new.state != State::Free {
            self.index(ip, &new);
            self.entries.insert(ip, new);
        }
    }

    fn index(&mut self, ip: Ipv4Addr, entry: &Entry) {
        if let Some(mac) = entry.owner {
            self.owned.insert(mac, ip);
        }
        if let Some(mac) = entry.state.promised_to() {
            self.promised.insert(mac, ip);
        }
        if let Some(until) = entry.state.until() {
            self.timers.insert((until, ip));
        }
        if entry.state == State::Free {
            self.rested.insert((entry.doubtful, entry.rest, ip));
        }
        if let Some(port) = entry.port.filter(|_| entry.state.counts()) {
            *self.ports.entry(port).or_default() += 1;
        }
        self.bound += usize::from(matches!(entry.state, State::Bound { .. }));
    }

    fn unindex(&mut self, ip: Ipv4Addr, entry: &Entry) {
        if let Some(mac) = entry.owner {
            self.owned.remove(&mac);
        }
        if let Some(mac) = entry.state.promised_to() {
            self.promised.remove(&mac);
        }
        if let Some(until) = entry.state.until() {
            self.timers.remove(&(until, ip));
        }
        self.rested.remove(&(entry.doubtful, entry.rest, ip));
        if let Some(port) = entry.port.filter(|_| entry.state.counts())
            && let Some(count) = self.ports.get_mut(&port)
        {
            *count -= 1;
            if *count == 0 {
                self.ports.remove(&port);
            }
        }
        self.bound -= usize::from(matches!(entry.state, State::Bound { .. }));
    }
}

#[cfg(test)]
mod tests;
