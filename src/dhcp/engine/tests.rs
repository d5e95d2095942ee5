use super::*;
use crate::dhcp::reply::{Answer, Destination};

pub(super) const GATEWAY: Ipv4Addr = Ipv4Addr::new(172, 20, 100, 1);
const HOUR: u64 = 3600;

pub(super) fn ip(n: u8) -> Ipv4Addr {
    Ipv4Addr::new(172, 20, 100, n)
}

pub(super) fn mac(n: u8) -> Mac {
    Mac([0x52, 0x54, 0, 0, 0, n])
}

pub(super) fn settings() -> Settings {
    Settings {
        parameters: Parameters {
            gateway: GATEWAY,
            subnet: "172.20.100.0/24".parse().unwrap(),
            dns: vec![Ipv4Addr::new(8, 8, 8, 8)],
            mtu: None,
            lease_time: Duration::from_secs(HOUR),
        },
        port_lease_limit: 0,
    }
}

/// What a client sends that has no address yet.
pub(super) fn message(kind: Kind, client: u8) -> Request {
    Request {
        kind,
        xid: 7,
        flags: 0,
        ciaddr: Ipv4Addr::UNSPECIFIED,
        giaddr: Ipv4Addr::UNSPECIFIED,
        chaddr: mac(client),
        requested: None,
        server_id: None,
        max_message_size: None,
        client_id: None,
        relay_info: None,
        source: Ipv4Addr::UNSPECIFIED,
        sender: mac(client),
    }
}

pub(super) fn discover(client: u8) -> Request {
    message(Kind::Discover, client)
}

pub(super) fn select(client: u8, ip: Ipv4Addr) -> Request {
    Request { requested: Some(ip), server_id: Some(GATEWAY), ..message(Kind::Request, client) }
}

pub(super) fn reboot(client: u8, ip: Ipv4Addr) -> Request {
    Request { requested: Some(ip), ..message(Kind::Request, client) }
}

pub(super) fn renew(client: u8, ip: Ipv4Addr) -> Request {
    Request { ciaddr: ip, source: ip, ..message(Kind::Request, client) }
}

pub(super) fn release(client: u8, ip: Ipv4Addr) -> Request {
    Request { ciaddr: ip, source: ip, server_id: Some(GATEWAY), ..message(Kind::Release, client) }
}

pub(super) fn decline(client: u8, ip: Ipv4Addr) -> Request {
    Request { requested: Some(ip), server_id: Some(GATEWAY), ..message(Kind::Decline, client) }
}

/// An engine with a clock.
struct Bench {
    engine: Engine,
    now: Now,
    may_grant: bool,
}

impl Bench {
    /// A pool of .2 to .`last`.
    fn new(last: u8) -> Self {
        Self::with(settings(), last)
    }

    fn with(settings: Settings, last: u8) -> Self {
        let addresses: Vec<Ipv4Addr> = (2..=last).map(ip).collect();
        let now = Now { monotonic: Duration::from_secs(100), wall: Timestamp::from_second(1_800_000_000).unwrap() };
        Self { engine: Engine::new(settings, &addresses), now, may_grant: true }
    }

    fn step(&mut self, request: &Request) -> Step {
        self.engine.handle(request, None, self.now, self.may_grant)
    }

    fn answer(&mut self, request: &Request) -> Option<Answer> {
        let step = self.step(request);
        if let Some((ip, mac)) = step.grant {
            assert!(self.engine.confirm(ip, mac));
        }
        step.reply.map(|reply| reply.answer)
    }

    /// Offer and lease in one go.
    fn lease(&mut self, client: u8) -> Ipv4Addr {
        let Some(Answer::Offer(ip)) = self.answer(&discover(client)) else { panic!("no offer for {client}") };
        assert_eq!(self.answer(&select(client, ip)), Some(Answer::Ack(ip)));
        ip
    }

    fn pass(&mut self, seconds: u64) -> Vec<Step> {
        self.now.monotonic += Duration::from_secs(seconds);
        self.now.wall += Duration::from_secs(seconds);
        self.engine.tick(self.now, self.may_grant)
    }
}

fn is_nak(answer: Option<Answer>) -> bool {
    matches!(answer, Some(Answer::Nak(_)))
}

#[test]
fn a_pool_of_four_serves_four_and_a_release_hands_the_address_on() {
    let mut bench = Bench::new(5);
    let leases: Vec<Ipv4Addr> = (1..=4).map(|client| bench.lease(client)).collect();
    assert_eq!(leases, [ip(2), ip(3), ip(4), ip(5)]);
    assert_eq!(bench.step(&discover(5)).refusal, Some(Refusal::PoolEmpty));
    let step = bench.step(&release(2, ip(3)));
    let given_back = Record::Release { mac: mac(2), ip: ip(3) };
    assert_eq!(step.effects, [Effect::RemoveRoute(ip(3)), Effect::Write(given_back)], "route out, then free");
    assert_eq!(bench.lease(5), ip(3));
}

#[test]
fn a_grant_puts_the_route_in_and_is_written_down_before_its_ack() {
    let mut bench = Bench::new(5);
    bench.answer(&discover(1));
    let step = bench.step(&select(1, ip(2)));
    let expiry = bench.now.wall + Duration::from_secs(HOUR);
    let lease = Lease { mac: mac(1), ip: ip(2), expiry };
    assert_eq!(step.effects, [Effect::AddRoute(ip(2)), Effect::Write(Record::Grant(lease))]);
    assert_eq!(step.grant, Some((ip(2), mac(1))));
    assert_eq!(step.reply.unwrap().to, Destination::Client(ip(2), mac(1)));
}

#[test]
fn a_lease_that_does_not_become_durable_never_was() {
    let mut bench = Bench::new(2);
    bench.answer(&discover(1));
    let _ = bench.step(&select(1, ip(2)));
    let undo = bench.engine.revoke(ip(2), mac(1));
    assert_eq!(undo.effects, [Effect::RemoveRoute(ip(2))]);
    assert_eq!(bench.engine.pool().bound(), 0);
    assert!(!bench.engine.confirm(ip(2), mac(1)));
    assert_eq!(bench.lease(2), ip(2));
}

#[test]
fn a_renewal_does_not_depend_on_the_disk() {
    let mut bench = Bench::new(2);
    bench.lease(1);
    let step = bench.step(&renew(1, ip(2)));
    assert_eq!(step.grant, None);
    assert!(bench.engine.revoke(ip(2), mac(1)).effects.is_empty());
    assert!(bench.engine.pool().get(ip(2)).unwrap().is_bound_to(mac(1)));
}

#[test]
fn a_client_finds_its_address_again_after_its_lease_ran_out() {
    let mut bench = Bench::new(20);
    bench.lease(1);
    let mine = bench.lease(2);
    let ended = bench.pass(HOUR);
    assert_eq!(ended.len(), 2);
    assert_eq!(bench.engine.pool().bound(), 0);
    assert_eq!(bench.answer(&discover(2)), Some(Answer::Offer(mine)));
    // After a restart, without a DISCOVER, too.
    assert_eq!(bench.answer(&reboot(1, ip(2))), Some(Answer::Ack(ip(2))));
}

#[test]
fn an_offer_is_kept_for_a_minute() {
    let mut bench = Bench::new(2);
    bench.answer(&discover(1));
    bench.pass(59);
    assert_eq!(bench.step(&discover(2)).refusal, Some(Refusal::PoolEmpty));
    bench.pass(1);
    assert_eq!(bench.answer(&discover(2)), Some(Answer::Offer(ip(2))));
    assert!(is_nak(bench.answer(&select(1, ip(2)))));
}

#[test]
fn a_client_that_chose_another_server_frees_its_offer() {
    let mut bench = Bench::new(2);
    bench.answer(&discover(1));
    let elsewhere = Request { server_id: Some(ip(250)), ..select(1, ip(2)) };
    // Somebody else saying so does not count.
    assert_eq!(bench.step(&Request { sender: mac(9), ..elsewhere.clone() }), Step::default());
    assert_eq!(bench.step(&discover(2)).refusal, Some(Refusal::PoolEmpty));
    assert_eq!(bench.step(&elsewhere), Step::default());
    assert_eq!(bench.answer(&discover(2)), Some(Answer::Offer(ip(2))));
}

#[test]
fn requests_for_what_is_not_theirs_are_refused_as_section_4_3_2_says() {
    let mut bench = Bench::new(10);
    let mine = bench.lease(1);
    bench.lease(2);
    assert!(is_nak(bench.answer(&select(1, ip(3)))), "selecting another's");
    assert!(is_nak(bench.answer(&reboot(1, ip(3)))), "rebooting with another's");
    assert!(is_nak(bench.answer(&renew(1, ip(3)))), "renewing another's");
    assert!(is_nak(bench.answer(&reboot(9, Ipv4Addr::new(10, 0, 0, 9)))), "of another network");
    assert_eq!(bench.step(&reboot(9, ip(3))).refusal, Some(Refusal::Unknown), "a stranger: silence");
    assert_eq!(bench.step(&message(Kind::Request, 1)).refusal, Some(Refusal::Senseless));
    assert_eq!(bench.answer(&renew(1, mine)), Some(Answer::Ack(mine)));
    assert_eq!(bench.answer(&reboot(1, mine)), Some(Answer::Ack(mine)));
}

#[test]
fn only_the_holder_can_give_an_address_back_or_decline_it() {
    let mut bench = Bench::new(10);
    let mine = bench.lease(1);
    bench.lease(2);
    for forged in [
        release(2, mine),
        Request { source: ip(3), ..release(1, mine) },
        Request { sender: mac(2), ..release(1, mine) },
        Request { giaddr: ip(3), source: ip(3), ..release(1, mine) },
        decline(2, mine),
        Request { sender: mac(2), ..decline(1, mine) },
        Request { server_id: Some(ip(250)), ..decline(1, mine) },
        Request { server_id: Some(ip(250)), ..release(1, mine) },
    ] {
        assert_eq!(bench.step(&forged).refusal, Some(Refusal::NotHolder), "{forged:?}");
    }
    assert!(bench.engine.pool().get(mine).unwrap().is_bound_to(mac(1)));
    assert_eq!(bench.step(&release(1, mine)).refusal, None);
}

#[test]
fn a_client_that_is_suddenly_behind_another_port_cannot_end_its_lease() {
    let mut bench = Bench::new(10);
    let (here, elsewhere) = (Some(Port(4)), Some(Port(5)));
    let Some(Answer::Offer(mine)) = bench.engine.handle(&discover(1), here, bench.now, true).reply.map(|r| r.answer)
    else {
        panic!("no offer")
    };
    let _ = bench.engine.handle(&select(1, mine), here, bench.now, true);
    for forged in [release(1, mine), decline(1, mine)] {
        assert_eq!(bench.engine.handle(&forged, elsewhere, bench.now, true).refusal, Some(Refusal::NotHolder));
    }
    assert_eq!(bench.engine.handle(&release(1, mine), here, bench.now, true).refusal, None);
}

#[test]
fn an_address_in_doubt_is_probed_also_for_the_one_who_had_it_last() {
    for request in [discover(1), reboot(1, ip(2)), renew(1, ip(2))] {
        let mut bench = Bench::new(4);
        assert_eq!(bench.lease(1), ip(2));
        bench.pass(HOUR);
        // Someone uses it meanwhile.
        assert_eq!(bench.step(&renew(9, ip(2))).refusal, Some(Refusal::Unknown));
        assert_eq!(bench.step(&request).effects, [Effect::Probe(ip(2))], "{request:?}");
        let found = bench.engine.in_use(ip(2), mac(9), None, bench.now, true);
        assert_eq!(found.grant, None);
        assert!(!bench.engine.pool().get(ip(2)).unwrap().is_bound_to(mac(1)));
    }
}

#[test]
fn a_declined_address_rests_for_ten_minutes_and_is_probed_afterwards() {
    let mut bench = Bench::new(2);
    bench.lease(1);
    assert_eq!(bench.step(&decline(1, ip(2))).effects.len(), 2);
    bench.pass(599);
    assert_eq!(bench.step(&discover(1)).refusal, Some(Refusal::PoolEmpty));
    bench.pass(1);
    assert_eq!(bench.step(&discover(1)).effects, [Effect::Probe(ip(2))]);
    bench.now.monotonic += PROBE_WAIT;
    let offers = bench.engine.tick(bench.now, true);
    assert_eq!(offers[0].reply.as_ref().unwrap().answer, Answer::Offer(ip(2)));
}

#[test]
fn an_address_found_in_use_by_a_probe_goes_to_nobody() {
    let mut bench = Bench::new(3);
    bench.engine.doubt_all();
    assert_eq!(bench.step(&discover(1)).effects, [Effect::Probe(ip(2))]);
    assert_eq!(bench.step(&discover(1)), Step::default(), "asking again changes nothing");
    let step = bench.engine.in_use(ip(2), mac(9), None, bench.now, true);
    assert_eq!(step.effects, [Effect::Probe(ip(3))], "the next one is tried");
    // The client itself answering is no objection.
    let step = bench.engine.in_use(ip(3), mac(1), None, bench.now, true);
    assert_eq!(step.reply.unwrap().answer, Answer::Offer(ip(3)));
    assert_eq!(bench.step(&discover(2)).refusal, Some(Refusal::PoolEmpty));
}

#[test]
fn whoever_renews_an_address_that_nobody_leased_makes_it_doubtful() {
    let mut bench = Bench::new(2);
    assert_eq!(bench.step(&renew(9, ip(2))).refusal, Some(Refusal::Unknown));
    assert_eq!(bench.step(&discover(1)).effects, [Effect::Probe(ip(2))]);
}

#[test]
fn held_addresses_go_to_their_owners_alone() {
    let mut bench = Bench::new(4);
    bench.engine.hold(ip(2), Some(mac(1)), bench.now);
    bench.engine.hold(ip(3), None, bench.now);
    assert_eq!(bench.lease(8), ip(4));
    assert_eq!(bench.step(&discover(9)).refusal, Some(Refusal::PoolEmpty));
    assert_eq!(bench.answer(&renew(1, ip(2))), Some(Answer::Ack(ip(2))));
    // Nobody knows whose .3 was: who asks for it by name gets it if nobody else answers for it.
    assert_eq!(bench.step(&renew(2, ip(3))).effects, [Effect::Probe(ip(3))]);
    bench.now.monotonic += PROBE_WAIT;
    let steps = bench.engine.tick(bench.now, true);
    assert_eq!(steps[0].reply.as_ref().unwrap().answer, Answer::Ack(ip(3)));
}

#[test]
fn a_port_gets_its_limit_whatever_addresses_its_vm_makes_up() {
    let mut bench = Bench::with(Settings { port_lease_limit: 2, ..settings() }, 10);
    let (bad, good) = (Some(Port(4)), Some(Port(5)));
    let mut granted = 0;
    for client in 1..=20 {
        let rotating = Request { sender: mac(99), ..discover(client) };
        let step = bench.engine.handle(&rotating, bad, bench.now, true);
        granted += u32::from(step.reply.is_some());
        assert!(step.reply.is_some() || step.refusal == Some(Refusal::PortLimit));
    }
    assert_eq!(granted, 2);
    // A DECLINE does not make room.
    let _ = bench.engine.handle(&decline(1, ip(2)), bad, bench.now, true);
    assert_eq!(bench.engine.handle(&discover(30), bad, bench.now, true).refusal, Some(Refusal::PortLimit));
    assert!(bench.engine.handle(&discover(40), good, bench.now, true).reply.is_some());
}

#[test]
fn relays_count_only_from_inside_and_in_their_own_name() {
    let mut bench = Bench::new(10);
    let relayed = |giaddr, source| Request { giaddr, source, sender: mac(77), ..discover(1) };
    assert!(bench.answer(&relayed(ip(9), ip(9))).is_some());
    let outside = Ipv4Addr::new(10, 0, 0, 9);
    for (giaddr, source) in [(ip(9), ip(8)), (outside, outside), (ip(255), ip(255))] {
        assert_eq!(bench.step(&relayed(giaddr, source)).refusal, Some(Refusal::Relay));
    }
}

#[test]
fn without_verified_isolation_leases_are_renewed_but_not_granted() {
    let mut bench = Bench::new(10);
    let mine = bench.lease(1);
    bench.answer(&discover(2));
    bench.may_grant = false;
    assert_eq!(bench.step(&discover(3)).refusal, Some(Refusal::Withheld));
    assert_eq!(bench.step(&discover(2)).refusal, Some(Refusal::Withheld), "an offer made before");
    assert_eq!(bench.step(&select(2, ip(3))).refusal, Some(Refusal::Withheld), "an offer taken up");
    assert_eq!(bench.answer(&discover(1)), Some(Answer::Offer(mine)));
    assert_eq!(bench.answer(&renew(1, mine)), Some(Answer::Ack(mine)));
    bench.may_grant = true;
    assert!(bench.answer(&select(2, ip(3))).is_some());
}

#[test]
fn a_lease_whose_address_left_the_pool_runs_out_or_moves() {
    let mut bench = Bench::new(10);
    let old = bench.lease(1);
    bench.engine.reconfigure(settings(), &[ip(50), ip(51)]);
    assert_eq!(bench.engine.pool().bound(), 1);
    assert!(is_nak(bench.answer(&renew(1, old))), "the address no longer leads here");
    let Some(Answer::Offer(new)) = bench.answer(&discover(1)) else { panic!("no offer") };
    let step = bench.step(&select(1, new));
    assert_eq!((new, step.effects[0]), (ip(50), Effect::RemoveRoute(old)));
    assert!(bench.engine.pool().get(old).is_none());
}

#[test]
fn informs_are_answered_without_a_lease_and_only_to_their_sender() {
    let mut bench = Bench::new(10);
    let inform = |ciaddr, source| Request { ciaddr, source, ..message(Kind::Inform, 1) };
    assert_eq!(bench.answer(&inform(ip(200), ip(200))), Some(Answer::Inform));
    assert_eq!(bench.answer(&inform(ip(200), ip(201))), None);
    assert_eq!(bench.engine.pool().bound(), 0);
}

#[test]
fn leases_are_restored_by_the_wall_clock_and_kept_by_the_other() {
    let mut bench = Bench::new(10);
    let lease = |n: u8, seconds: i64| Lease {
        mac: mac(n),
        ip: ip(n),
        expiry: bench.now.wall + jiff::SignedDuration::from_secs(seconds),
    };
    let century = 100 * 365 * 24 * 3600;
    bench.engine.restore(vec![lease(2, 1800), lease(3, -10), lease(4, century), lease(1, 1800)], bench.now);
    assert_eq!(bench.engine.pool().bound(), 2, "the gateway's and the expired one are not leases");
    // The wall clock steps: nothing happens to leases.
    bench.now.wall += Duration::from_secs(100 * HOUR);
    assert!(bench.engine.tick(bench.now, true).is_empty());
    assert_eq!(bench.engine.leases(bench.now).iter().find(|lease| lease.ip == ip(2)).unwrap().expiry, {
        bench.now.wall + Duration::from_secs(1800)
    });
    assert_eq!(bench.pass(1800).len(), 1);
    // One that would last for ever ends after a day, and its address is then in doubt until it is probed.
    assert_eq!(bench.pass(24 * HOUR).len(), 1);
    assert_eq!(bench.step(&discover(3)).effects, [Effect::Probe(ip(3))], "remembered though expired, and in doubt");
    bench.now.monotonic += PROBE_WAIT;
    let offers = bench.engine.tick(bench.now, true);
    assert_eq!(offers[0].reply.as_ref().unwrap().answer, Answer::Offer(ip(3)));
}

#[test]
fn a_restored_lease_that_runs_out_unrenewed_leaves_its_address_in_doubt() {
    let mut bench = Bench::new(3);
    let lease = |n: u8| Lease { mac: mac(n), ip: ip(n), expiry: bench.now.wall + Duration::from_secs(60) };
    bench.engine.restore(vec![lease(2), lease(3)], bench.now);
    assert_eq!(bench.answer(&renew(3, ip(3))), Some(Answer::Ack(ip(3))));
    bench.pass(60);
    // Its holder may have renewed it when that could not be written down.
    assert_eq!(bench.step(&discover(9)).effects, [Effect::Probe(ip(2))]);
    bench.pass(HOUR);
    assert_eq!(bench.answer(&discover(8)), Some(Answer::Offer(ip(3))));
}

#[test]
fn a_port_that_claims_every_address_is_believed_up_to_its_limit() {
    let mut bench = Bench::with(Settings { port_lease_limit: 1, ..settings() }, 4);
    bench.engine.doubt_all();
    let bad = Some(Port(4));
    assert_eq!(bench.step(&discover(1)).effects, [Effect::Probe(ip(2))]);
    assert_eq!(bench.engine.in_use(ip(2), mac(9), bad, bench.now, true).effects, [Effect::Probe(ip(3))]);
    assert_eq!(bench.engine.in_use(ip(3), mac(9), bad, bench.now, true), Step::default());
    bench.now.monotonic += PROBE_WAIT;
    let offers = bench.engine.tick(bench.now, true);
    assert_eq!(offers[0].reply.as_ref().unwrap().answer, Answer::Offer(ip(3)));
}
