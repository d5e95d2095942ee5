//! The pacer under a clock that the test turns.

use super::*;

const INTERVAL: Duration = Duration::from_secs(30);

/// A host whose passes cost `pass` of CPU time, driven in steps of a millisecond.
struct Simulation {
    now: Instant,
    pacer: Pacer,
    pass: Duration,
    broken_since: Option<Instant>,
    open: Duration,
    spent: Duration,
    passes: usize,
    worst: Duration,
    /// Whether drop targets are led nowhere in a siege.
    has_backstop: bool,
}

impl Simulation {
    fn new(pass: Duration) -> Self {
        let now = Instant::now();
        let pacer = Pacer::new(now, INTERVAL);
        let zero = Duration::ZERO;
        Self {
            now,
            pacer,
            pass,
            broken_since: None,
            open: zero,
            spent: zero,
            passes: 0,
            worst: zero,
            has_backstop: true,
        }
    }

    fn offend(&mut self) {
        self.broken_since.get_or_insert(self.now);
        self.pacer.report(self.now);
    }

    fn step(&mut self) {
        self.now += Duration::from_millis(1);
        if self.now < self.pacer.next_pass() || !self.pacer.start(self.now).any() {
            return;
        }
        // A pass that finds nothing only reads.
        let broken = self.broken_since.take();
        let cost = if broken.is_some() { self.pass } else { self.pass / 3 };
        self.now += cost;
        if let Some(since) = broken {
            self.open += self.now - since;
            self.worst = self.worst.max(self.now - since);
        }
        let outcome = if broken.is_some() { Outcome::Repaired } else { Outcome::Clean };
        self.pacer.passed(self.now, cost, outcome);
        self.pacer.backstop = self.has_backstop && self.pacer.besieged(self.now);
        self.spent += cost;
        self.passes += 1;
        if broken.is_some() {
            // The kernel reports what we wrote ourselves, too.
            self.pacer.report(self.now);
        }
    }

    /// Offends each `period` for a minute.
    fn siege(&mut self, period: Duration) {
        let (start, mut next) = (self.now, self.now);
        while self.now < start + Duration::from_secs(60) {
            if self.now >= next {
                self.offend();
                next = self.now + period;
            }
            self.step();
        }
    }
}

fn millis(n: u64) -> Duration {
    Duration::from_millis(n)
}

#[test]
fn the_first_report_is_acted_on_at_once() {
    let mut host = Simulation::new(millis(10));
    for _ in 0..5000 {
        host.step();
    }
    assert_eq!(host.passes, 0, "nothing was reported");
    host.offend();
    for _ in 0..20 {
        host.step();
    }
    assert!(host.worst <= millis(12), "open for {:?}", host.worst);
}

#[test]
fn our_own_writes_do_not_keep_it_going() {
    let mut host = Simulation::new(millis(10));
    host.offend();
    for _ in 0..20_000 {
        host.step();
    }
    // The repair, the look that its own events cause, and the follow-ups.
    assert_eq!(host.passes, 2 + FOLLOW_UPS.len());
}

#[test]
fn each_offence_of_a_slow_loop_is_repaired_at_once() {
    for period in [millis(1000), millis(500), millis(300)] {
        let mut host = Simulation::new(millis(10));
        host.siege(period);
        assert!(host.open < millis(3000), "{period:?}: open for {:?} of a minute", host.open);
        assert!(host.spent < millis(6000), "{period:?}: spent {:?} in a minute", host.spent);
    }
}

#[test]
fn a_tight_loop_cannot_make_it_burn_the_node() {
    for (pass, period) in [(10, 1), (10, 20), (50, 5), (100, 1), (400, 1)] {
        let mut host = Simulation::new(millis(pass));
        host.siege(millis(period));
        assert!(host.spent < millis(6000), "passes of {pass} ms, offence each {period} ms: spent {:?}", host.spent);
    }
}

#[test]
fn however_costly_the_pass_drift_is_open_for_less_than_two_seconds_until_it_is_a_siege() {
    for pass in [10, 100, 400] {
        let mut host = Simulation::new(millis(pass));
        while !host.pacer.besieged(host.now) {
            host.offend();
            host.step();
        }
        assert!(host.worst < millis(2000), "passes of {pass} ms: open for {:?}", host.worst);
    }
}

#[test]
fn rare_passes_of_a_siege_do_not_look_like_peace() {
    let mut host = Simulation::new(millis(400));
    host.siege(millis(7));
    assert!(host.pacer.besieged(host.now));
    let rarest = apart_in_siege(millis(400)) + millis(400);
    assert!(host.worst <= rarest + PAUSE.1, "open for {:?}", host.worst);
    host.now += 3 * rarest;
    assert!(!host.pacer.besieged(host.now), "and peace does not look like a siege");
}

#[test]
fn passes_are_not_rare_while_nothing_else_holds() {
    let mut host = Simulation::new(millis(400));
    host.has_backstop = false;
    host.siege(millis(7));
    assert!(host.worst <= LATEST + millis(400) + PAUSE.1, "open for {:?}", host.worst);
}

#[test]
fn one_pass_that_is_undone_before_it_ends_is_a_siege() {
    let now = Instant::now();
    let mut pacer = Pacer::new(now, INTERVAL);
    pacer.passed(now, millis(10), Outcome::Undone);
    assert!(pacer.besieged(now));
}

#[test]
fn a_failed_pass_is_tried_again_soon_and_then_each_second() {
    let now = Instant::now();
    let mut pacer = Pacer::new(now, INTERVAL);
    pacer.report(now);
    let (mut at, mut waits) = (now, Vec::new());
    for _ in 0..6 {
        let next = pacer.next_pass();
        waits.push(next - at);
        assert!(pacer.start(next).any());
        pacer.passed(next, millis(1), Outcome::Failed);
        at = next;
    }
    assert_eq!(waits, [0, 50, 200, 500, 1000, 1000].map(millis));
}

#[test]
fn the_slow_pass_comes_without_any_report() {
    let now = Instant::now();
    let mut pacer = Pacer::new(now, INTERVAL);
    assert_eq!(pacer.next_pass(), now + INTERVAL);
    assert!(!pacer.start(now + INTERVAL / 2).any());
    assert_eq!(pacer.start(now + INTERVAL), Due { interval: true, ..Due::default() });
    pacer.passed(now + INTERVAL, millis(3), Outcome::Clean);
    assert_eq!(pacer.next_pass(), now + INTERVAL * 2);
}

#[test]
fn a_report_during_a_pass_leads_to_another_pass() {
    let now = Instant::now();
    let mut pacer = Pacer::new(now, INTERVAL);
    pacer.report(now);
    assert!(pacer.start(now).reported);
    pacer.report(now + millis(5));
    pacer.passed(now + millis(8), millis(8), Outcome::Clean);
    assert!(pacer.next_pass() <= now + millis(8) + PAUSE.1);
}

#[test]
fn looks_come_often_while_someone_keeps_undoing_and_calm_down_after() {
    let mut host = Simulation::new(millis(10));
    assert!(!host.pacer.besieged(host.now));
    for _ in 0..SIEGE {
        host.offend();
        for _ in 0..300 {
            host.step();
        }
    }
    assert!(host.pacer.besieged(host.now));
    host.pacer.looked(host.now, Duration::ZERO);
    assert_eq!(host.pacer.next_look(), host.now + SIEGE_LOOK);
    let later = host.now + CONTEST_QUIET;
    host.pacer.looked(later, Duration::ZERO);
    assert_eq!(host.pacer.next_look(), later + LOOK);
}

#[test]
fn costly_looks_leave_half_of_the_budget_to_repairs() {
    let now = Instant::now();
    let mut pacer = Pacer::new(now, INTERVAL);
    assert!(pacer.look_affordable(now));
    pacer.looked(now, BURST / 2 + millis(1));
    assert!(!pacer.look_affordable(now));
    assert!(pacer.look_affordable(now + millis(20)));
}
