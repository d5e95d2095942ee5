//! What the probe tries, and what becomes of it means.

use std::collections::BTreeSet;
use std::net::Ipv4Addr;

use ipnet::Ipv4Net;

use super::addresses::{inside, outside};
use super::frames::{self, DISCARD, Kind, Marker, Pair};
use super::guest::Guest;
use super::report::{Expected, Row};
use super::{Request, Sightings};
use crate::host::links::{Link, Mac};

/// One frame, and where it is watched for.
#[derive(Debug)]
pub(super) struct Trial {
    pub id: u16,
    pub what: &'static str,
    /// The guest that sends it.
    pub from: usize,
    /// What its destination is called in the report.
    to: String,
    /// The address outside that it is for.
    pub outside: Option<Ipv4Addr>,
    at: At,
    expected: Expected,
    pub frame: Vec<u8>,
}

/// Where a trial is watched for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum At {
    /// At the other guest.
    Other,
    /// At an interface that is not of the bridge.
    Outside,
    /// At the sender itself: an answer.
    Back,
}

/// Everything to try.
#[derive(Debug)]
pub(super) struct Trials {
    /// The controls that both guests live.
    pub pings: Vec<Trial>,
    /// The rest.
    pub all: Vec<Trial>,
    /// Whether there is a control that the node forwards; there is none where everything is dropped.
    forwards: bool,
}

impl Trials {
    /// What a request calls for.
    pub(super) fn for_request(
        request: &Request,
        guests: &[Guest; 2],
        gateway: Mac,
        own: &BTreeSet<Ipv4Addr>,
        nonce: [u8; 6],
        notes: &mut Vec<String>,
    ) -> Self {
        let mut maker = Maker { guests, gateway, nonce, next: 0 };
        let pings = (0..guests.len()).map(|from| maker.ping(from, request.gateway)).collect();
        let mut all = Vec::new();
        if request.internal {
            all.extend(maker.between(0, 1, request.subnet));
            all.extend(maker.between(1, 0, request.subnet));
        }
        let controls = maker.controls(request, own, notes);
        let forwards = !controls.is_empty();
        all.extend(maker.targets(request, own, notes));
        if request.host {
            // A few addresses tell as much as all of a node with hundreds.
            let others = own.iter().copied().filter(|address| *address != request.gateway && !address.is_loopback());
            for address in std::iter::once(request.gateway).chain(others).take(8) {
                all.extend(maker.host(address));
            }
        }
        all.extend(controls);
        Self { pings, all, forwards }
    }

    /// The rows of the report. `ports`: those of the guests. `alive`: the gateway answered both, before and after.
    pub(super) fn judge(
        &self,
        request: &Request,
        seen: &Sightings,
        bridge: &Link,
        vms: &[&Link],
        ports: [u32; 2],
        alive: bool,
    ) -> Vec<Row> {
        // What the node answers a guest goes out at its port.
        let inner: BTreeSet<u32> = vms.iter().map(|port| port.index).chain(ports).chain([bridge.index]).collect();
        let arrived = |trial: &Trial| match trial.at {
            At::Other => seen.guests[1 - trial.from].contains(&trial.id),
            At::Back => seen.guests[trial.from].contains(&trial.id),
            At::Outside => seen.went_out.get(&trial.id).is_some_and(|out| out.iter().any(|link| !inner.contains(link))),
        };
        let sent = |trial: &Trial| seen.came_in.contains_key(&trial.id) || is_syn(trial);
        let controls = || self.all.iter().filter(|trial| trial.is_control());
        let forwards = !self.forwards || controls().any(arrived);
        // One of them is enough: a node may know better than to forward to some.
        let control = controls().find(|trial| arrived(trial)).or(controls().next());

        let name = |guest: usize| super::PORTS[guest].to_owned();
        let mut rows: Vec<Row> = self
            .pings
            .iter()
            .map(|ping| {
                Row::judge(ping.what, name(ping.from), &ping.to, Expected::Arrives, alive && arrived(ping), true)
            })
            .collect();
        rows.extend(control.into_iter().chain(self.all.iter().filter(|trial| !trial.is_control())).map(|trial| {
            let proven = alive && sent(trial) && (trial.at != At::Outside || forwards);
            Row::judge(trial.what, name(trial.from), &trial.to, trial.expected, arrived(trial), proven)
        }));
        if request.internal {
            rows.extend(vms.iter().map(|port| self.judge_port(seen, port, alive)));
        }
        rows
    }

    /// Whether anything the guests sent to everybody went out at the port of a VM.
    fn judge_port(&self, seen: &Sightings, port: &Link, alive: bool) -> Row {
        let reached = self.all.iter().any(|trial| {
            trial.at == At::Other && seen.went_out.get(&trial.id).is_some_and(|out| out.contains(&port.index))
        });
        Row::judge(
            "broadcasts and multicasts",
            "both guests",
            format!("port {}", port.name),
            Expected::Blocked,
            reached,
            alive,
        )
    }
}

impl Trial {
    /// Whether it shows that the node forwards at all.
    fn is_control(&self) -> bool {
        self.at == At::Outside && self.expected == Expected::Arrives
    }
}

/// A SYN has no room for the whole marker, so it cannot be told on the wire; the pings vouch for the guest.
fn is_syn(trial: &Trial) -> bool {
    trial.what.starts_with("TCP")
}

/// Makes trials and counts them.
struct Maker<'a> {
    guests: &'a [Guest; 2],
    gateway: Mac,
    nonce: [u8; 6],
    next: u16,
}

impl Maker<'_> {
    fn mark(&mut self) -> Marker {
        self.next += 1;
        Marker { nonce: self.nonce, trial: self.next }
    }

    fn ping(&mut self, from: usize, address: Ipv4Addr) -> Trial {
        let marker = self.mark();
        let frame = frames::ping(self.guests[from].end, self.gateway, address, marker);
        let to = format!("gateway {address}");
        Trial {
            id: marker.trial,
            what: "ping",
            from,
            to,
            outside: None,
            at: At::Back,
            expected: Expected::Arrives,
            frame,
        }
    }

    fn between(&mut self, from: usize, to: usize, subnet: Ipv4Net) -> Vec<Trial> {
        let [sender, receiver] = [&self.guests[from], &self.guests[to]].map(|guest| guest.end);
        let pair = Pair { from: sender, to: receiver, gateway: self.gateway, broadcast: subnet.broadcast() };
        let trial = |(kind, what)| {
            let marker = self.mark();
            let (to, frame) = (super::PORTS[to].to_owned(), pair.frame(kind, marker));
            Trial { id: marker.trial, what, from, to, outside: None, at: At::Other, expected: Expected::Blocked, frame }
        };
        Kind::ALL.into_iter().map(trial).collect()
    }

    /// Datagrams at addresses that no target covers.
    fn controls(&mut self, request: &Request, own: &BTreeSet<Ipv4Addr>, notes: &mut Vec<String>) -> Vec<Trial> {
        if request.targets.is_empty() {
            return Vec::new();
        }
        let addresses = outside(&request.targets, request.subnet, own);
        if addresses.is_empty() {
            notes.push("every address is dropped, so that forwarding at all could not be shown".to_owned());
        }
        let control = |address| self.outwards(address, format!("{address}, not dropped"), Expected::Arrives);
        addresses.into_iter().map(control).collect()
    }

    /// A datagram at each drop target.
    fn targets(&mut self, request: &Request, own: &BTreeSet<Ipv4Addr>, notes: &mut Vec<String>) -> Vec<Trial> {
        let mut trials = Vec::new();
        for target in &request.targets {
            match inside(*target, request.subnet, own) {
                Some(address) => {
                    trials.push(self.outwards(address, format!("{address} in {target}"), Expected::Blocked));
                }
                None => notes.push(format!("{target} holds nothing beyond this node and its VMs: not probed")),
            }
        }
        trials
    }

    fn outwards(&mut self, address: Ipv4Addr, to: String, expected: Expected) -> Trial {
        let marker = self.mark();
        let frame = frames::to_outside(self.guests[0].end, self.gateway, address, marker);
        let (what, outside) = ("UDP out of the node", Some(address));
        Trial { id: marker.trial, what, from: 0, to, outside, at: At::Outside, expected, frame }
    }

    fn host(&mut self, address: Ipv4Addr) -> [Trial; 2] {
        let (end, gateway) = (self.guests[0].end, self.gateway);
        let (tcp, udp) = (self.mark(), self.mark());
        let trial = |what, id, frame| {
            let to = format!("node {address}");
            Trial { id, what, from: 0, to, outside: None, at: At::Back, expected: Expected::Blocked, frame }
        };
        [
            trial("TCP connection", tcp.trial, frames::syn(end, gateway, address, DISCARD, tcp)),
            trial("UDP", udp.trial, frames::to_host(end, gateway, address, udp)),
        ]
    }
}
