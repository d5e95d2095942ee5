//! The way of a packet: frame, request, engine, reply, frame. `cargo +nightly fuzz run packets`.
//!
//! The input is a sequence of messages, each behind three bytes: its length, and by how much time moves on before it.
//! Whatever they say, nothing panics, every reply can be read by a client, and no address is leased twice.

#![no_main]

use std::collections::HashSet;
use std::net::Ipv4Addr;
use std::time::Duration;

use cocoon_net::dhcp::Mac;
use cocoon_net::dhcp::addresses::Port;
use cocoon_net::dhcp::engine::{Effect, Engine, Now, Settings, Step};
use cocoon_net::dhcp::reply::{Answer, Destination, Parameters, Reply};
use cocoon_net::dhcp::wire::{Datagram, Request};
use cocoon_net::dhcp::frame;
use jiff::Timestamp;
use libfuzzer_sys::fuzz_target;

const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 1);

fuzz_target!(|data: &[u8]| {
    let _ = frame::open(data);
    let (mut engine, mut now) = start();
    let mut rest = data;
    while let [low, high, pause, following @ ..] = rest {
        let len = usize::from(u16::from_le_bytes([*low, *high])).min(following.len());
        let (payload, following) = following.split_at(len);
        rest = following;
        let pause = Duration::from_millis(u64::from(*pause) * u64::from(*pause) * 100);
        (now.monotonic, now.wall) = (now.monotonic + pause, now.wall + pause);
        for step in engine.tick(now, true) {
            carry_out(&mut engine, &step);
        }
        let Some(request) = read(payload) else { continue };
        let step = engine.handle(&request, Some(Port(u32::from(request.chaddr.0[5] % 3))), now, true);
        carry_out(&mut engine, &step);
    }
});

fn start() -> (Engine, Now) {
    let parameters = Parameters {
        gateway: GATEWAY,
        subnet: "10.0.0.0/29".parse().expect("a subnet"),
        dns: vec![Ipv4Addr::new(8, 8, 8, 8)],
        mtu: Some(1500),
        lease_time: Duration::from_secs(60),
    };
    let addresses: Vec<Ipv4Addr> = (2..6).map(|n| Ipv4Addr::new(10, 0, 0, n)).collect();
    let now = Now { monotonic: Duration::from_secs(1), wall: Timestamp::from_second(1_800_000_000).expect("a time") };
    let mut engine = Engine::new(Settings { parameters, port_lease_limit: 3 }, &addresses);
    engine.hold(addresses[3], None, now);
    (engine, now)
}

/// A message as it would arrive: straight from its client, or, when it names a relay, from there.
fn read(payload: &[u8]) -> Option<Request> {
    let address = |at: usize| -> Option<Ipv4Addr> {
        Some(Ipv4Addr::from(<[u8; 4]>::try_from(payload.get(at..at + 4)?).ok()?))
    };
    let giaddr = address(24)?;
    let source = if giaddr.is_unspecified() { address(12)? } else { giaddr };
    let sender = Mac(payload.get(28..34)?.try_into().ok()?);
    // Through a frame, as far as a payload fits into one.
    let carrier = Reply {
        answer: Answer::Inform,
        to: Destination::Relay(GATEWAY, Mac::BROADCAST),
        chaddr: sender,
        payload: payload.get(..1472).unwrap_or(payload).to_vec(),
    };
    let frame = frame::seal(&carrier, sender, source);
    let opened = frame::open(&frame).expect("a sealed frame opens");
    Request::try_from(Datagram { sender, source, ..opened }).ok()
}

fn carry_out(engine: &mut Engine, step: &Step) {
    if let Some((ip, mac)) = step.grant {
        assert!(engine.confirm(ip, mac), "what was just granted is there");
    }
    for effect in &step.effects {
        if let Effect::Write(_) = effect {
            let leases = engine.pool().iter().filter_map(|(_, entry)| entry.owner);
            let mut seen = HashSet::new();
            assert!(leases.into_iter().all(|mac| seen.insert(mac)), "a client holds two addresses");
        }
    }
    if let Some(reply) = &step.reply {
        assert!((300..=1472).contains(&reply.payload.len()));
        assert_eq!(reply.payload[236..240], [99, 130, 83, 99]);
        if let Answer::Offer(ip) | Answer::Ack(ip) = reply.answer {
            assert!(ip != GATEWAY && engine.pool().get(ip).is_some());
        }
        let frame = frame::seal(reply, Mac([2, 0, 0, 0, 0, 1]), GATEWAY);
        assert_eq!(frame.len(), reply.payload.len() + 42);
    }
}
