use proptest::prelude::*;

use super::*;

const A: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 2);
const B: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 3);
const C: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 4);

fn mac(n: u8) -> Mac {
    Mac([2, 0, 0, 0, 0, n])
}

fn secs(n: u64) -> Duration {
    Duration::from_secs(n)
}

#[test]
fn the_address_that_rested_longest_goes_first() {
    let mut pool = Pool::new(&[C, A, B]);
    for (n, ip) in [(1, A), (2, B), (3, C)] {
        assert_eq!(pool.longest_rested().unwrap().0, ip, "never used: in numeric order");
        pool.bind(ip, mac(n), None, secs(60), true);
    }
    assert!(pool.longest_rested().is_none());
    for ip in [B, C, A] {
        pool.free_up(ip);
    }
    let mut order = Vec::new();
    for n in 4..7 {
        let (ip, _) = pool.longest_rested().unwrap();
        pool.bind(ip, mac(n), None, secs(60), true);
        order.push(ip);
    }
    assert_eq!(order, [B, C, A]);
}

#[test]
fn an_offer_nobody_took_costs_the_address_neither_its_place_nor_its_owner() {
    let mut pool = Pool::new(&[A, B]);
    pool.bind(A, mac(1), None, secs(10), true);
    pool.free_up(A);
    pool.bind(B, mac(2), None, secs(10), true);
    pool.free_up(B);
    pool.offer(A, mac(3), None, secs(60));
    assert_eq!(pool.promised_to(mac(3)).unwrap().0, A);
    assert!(pool.end_next(secs(59)).is_none());
    assert_eq!(pool.end_next(secs(60)).unwrap().0, A);
    assert_eq!(pool.longest_rested().unwrap().0, A);
    assert_eq!(pool.owned_by(mac(1)).unwrap().0, A);
    assert!(pool.promised_to(mac(3)).is_none());
}

#[test]
fn addresses_in_doubt_go_last() {
    let mut pool = Pool::new(&[A, B]);
    pool.doubt(A);
    assert_eq!(pool.longest_rested().unwrap().0, B);
    pool.bind(B, mac(1), None, secs(10), true);
    let (ip, entry) = pool.longest_rested().unwrap();
    assert!(ip == A && entry.doubtful);
}

#[test]
fn what_a_port_holds_is_counted_until_it_is_free() {
    let mut pool = Pool::new(&[A, B, C]);
    let port = Port(7);
    pool.offer(A, mac(1), Some(port), secs(60));
    pool.bind(B, mac(2), Some(port), secs(60), true);
    pool.decline(C, Some(port), secs(60));
    assert_eq!(pool.count_of(port), 3);
    pool.withdraw(mac(1));
    pool.free_up(B);
    pool.free_up(C);
    assert_eq!(pool.count_of(port), 0);
}

#[test]
fn a_lease_outlives_its_address_in_the_pool_but_nothing_else_does() {
    let mut pool = Pool::new(&[A, B, C]);
    pool.bind(A, mac(1), None, secs(10), true);
    pool.offer(B, mac(2), None, secs(60));
    pool.set_members(&[C]);
    assert!(pool.get(A).unwrap().is_bound_to(mac(1)));
    assert!(pool.get(B).is_none() && pool.promised_to(mac(2)).is_none());
    assert_eq!((pool.bound(), pool.free()), (1, 1));
    pool.end_next(secs(10)).unwrap();
    assert!(pool.get(A).is_none() && pool.owned_by(mac(1)).is_none());
    assert_eq!((pool.bound(), pool.free()), (0, 1));
}

#[derive(Debug, Clone)]
enum Op {
    Offer(u8, u8),
    Probe(u8, u8),
    Withdraw(u8),
    Bind(u8, u8),
    Free(u8),
    Decline(u8),
    Hold(u8, u8),
    Remember(u8, u8),
    Doubt(u8),
    Members(Vec<u8>),
    End(u64),
}

fn op() -> impl Strategy<Value = Op> {
    let (ip, client) = (0..6_u8, 0..6_u8);
    prop_oneof![
        (ip.clone(), client.clone()).prop_map(|(a, m)| Op::Offer(a, m)),
        (ip.clone(), client.clone()).prop_map(|(a, m)| Op::Probe(a, m)),
        client.clone().prop_map(Op::Withdraw),
        (ip.clone(), client.clone()).prop_map(|(a, m)| Op::Bind(a, m)),
        ip.clone().prop_map(Op::Free),
        ip.clone().prop_map(Op::Decline),
        (ip.clone(), client.clone()).prop_map(|(a, m)| Op::Hold(a, m)),
        (ip.clone(), client).prop_map(|(a, m)| Op::Remember(a, m)),
        ip.clone().prop_map(Op::Doubt),
        proptest::collection::vec(ip, 0..6).prop_map(Op::Members),
        (0..40_u64).prop_map(Op::End),
    ]
}

/// Everything that the indices say, computed anew from the entries.
fn check(pool: &Pool) {
    let (mut owned, mut promised, mut ports) = (HashMap::new(), HashMap::new(), HashMap::new());
    let (mut rested, mut timers, mut bound) = (BTreeSet::new(), BTreeSet::new(), 0);
    for (ip, entry) in pool.iter() {
        assert!(entry.pooled || entry.state != State::Free, "{ip} is of no use");
        if let Some(mac) = entry.owner {
            assert_eq!(owned.insert(mac, ip), None, "{mac} owns two addresses");
        }
        if let Some(mac) = entry.state.promised_to() {
            assert_eq!(promised.insert(mac, ip), None, "{mac} is promised two addresses");
        }
        match entry.state.until() {
            Some(until) => assert!(timers.insert((until, ip))),
            None => assert!(rested.insert((entry.doubtful, entry.rest, ip))),
        }
        if let Some(port) = entry.port.filter(|_| entry.state.counts()) {
            *ports.entry(port).or_insert(0) += 1;
        }
        bound += usize::from(matches!(entry.state, State::Bound { .. }));
    }
    assert_eq!((&owned, &promised, &ports), (&pool.owned, &pool.promised, &pool.ports));
    assert_eq!((&rested, &timers, bound), (&pool.rested, &pool.timers, pool.bound));
}

proptest! {
    #[test]
    fn the_indices_agree_with_the_entries(ops in proptest::collection::vec(op(), 1..60)) {
        let ip = |n: u8| Ipv4Addr::new(10, 0, 0, n);
        let mut pool = Pool::new(&[ip(0), ip(1), ip(2), ip(3)]);
        for (step, op) in ops.into_iter().enumerate() {
            let until = secs(step as u64 + 10);
            let port = Some(Port(step as u32 % 3));
            match op {
                Op::Offer(a, m) => pool.offer(ip(a), mac(m), port, until),
                Op::Probe(a, m) => pool.probe(ip(a), mac(m), port, until),
                Op::Withdraw(m) => pool.withdraw(mac(m)),
                Op::Bind(a, m) => pool.bind(ip(a), mac(m), port, until, true),
                Op::Free(a) => pool.free_up(ip(a)),
                Op::Decline(a) => pool.decline(ip(a), port, until),
                Op::Hold(a, m) => pool.hold(ip(a), Some(mac(m)), until),
                Op::Remember(a, m) => pool.remember(ip(a), mac(m)),
                Op::Doubt(a) => pool.doubt(ip(a)),
                Op::Members(members) => pool.set_members(&members.into_iter().map(ip).collect::<Vec<_>>()),
                Op::End(now) => { pool.end_next(secs(now)); }
            }
            check(&pool);
        }
    }
}
