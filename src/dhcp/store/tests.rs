use std::net::Ipv4Addr;
use std::sync::mpsc::channel;

use super::*;
use crate::dhcp::Mac;

fn lease(n: u8) -> Lease {
    Lease {
        mac: Mac([2, 0, 0, 0, 0, n]),
        ip: Ipv4Addr::new(10, 0, 0, n),
        expiry: "2026-11-24T04:00:32Z".parse().unwrap(),
    }
}

fn grant(n: u8) -> Record {
    Record::Grant(lease(n))
}

fn later(n: u8) -> Lease {
    Lease { expiry: lease(n).expiry + jiff::SignedDuration::from_hours(1), ..lease(n) }
}

/// A store, and a way to wait for what it says.
struct Bench {
    dir: tempfile::TempDir,
    store: Option<Store>,
    outcomes: Receiver<Outcome>,
    batch: u64,
}

impl Bench {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let (_, outcomes) = channel();
        let mut bench = Self { dir, store: None, outcomes, batch: 0 };
        bench.start();
        bench
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("leases.json")
    }

    fn journal(&self) -> PathBuf {
        self.dir.path().join("leases.journal")
    }

    /// Starts another one, as after a crash. Returns what it found.
    fn start(&mut self) -> (Vec<Lease>, bool) {
        let loaded = load(&self.path()).unwrap();
        let found = (loaded.leases.clone(), loaded.lost);
        let (report, outcomes) = channel();
        self.outcomes = outcomes;
        self.store = Some(
            Store::start(loaded, move |outcome| {
                let _ = report.send(outcome);
            })
            .unwrap(),
        );
        found
    }

    fn write(&mut self, records: &[Record]) -> bool {
        self.batch += 1;
        self.store.as_ref().unwrap().write(self.batch, records.to_vec()).unwrap();
        loop {
            let outcome = self.outcomes.recv_timeout(Duration::from_secs(10)).unwrap();
            if outcome.up_to >= self.batch {
                return outcome.durable;
            }
        }
    }

    /// What a crash right now would leave, in a folder of its own.
    fn crash(&self) -> Self {
        let dir = tempfile::tempdir().unwrap();
        // In this order: a newer leases.json holds all that an older journal does.
        for file in [self.journal(), self.path()] {
            if file.exists() {
                std::fs::copy(&file, dir.path().join(file.file_name().unwrap())).unwrap();
            }
        }
        let (_, outcomes) = channel();
        Self { dir, store: None, outcomes, batch: 0 }
    }

    fn files(&self) -> Vec<String> {
        let names = std::fs::read_dir(self.dir.path()).unwrap();
        let mut names: Vec<String> = names.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }
}

#[test]
fn what_is_reported_durable_is_there_after_a_crash() {
    let mut bench = Bench::new();
    assert!(bench.write(&[grant(1), grant(2)]));
    assert!(bench.write(&[Record::Release { mac: lease(1).mac, ip: lease(1).ip }, grant(3)]));
    assert_eq!(bench.crash().start(), (vec![lease(2), lease(3)], false));
}

#[test]
fn leases_json_follows_within_a_second_and_is_whole_at_every_moment() {
    let mut bench = Bench::new();
    let started = Instant::now();
    for n in 1..=200 {
        assert!(bench.write(&[grant(n)]));
        if bench.path().exists() {
            leases::read(&bench.path()).unwrap();
        }
    }
    let written = started.elapsed();
    while leases::read(&bench.path()).unwrap().len() < 200 {
        assert!(started.elapsed() < written + Duration::from_secs(5), "leases.json does not follow");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn an_orderly_stop_leaves_leases_json_alone() {
    let mut bench = Bench::new();
    assert!(bench.write(&[grant(1)]));
    bench.store.take().unwrap().stop().unwrap();
    assert_eq!(bench.files(), ["leases.json"]);
    assert_eq!(leases::read(&bench.path()).unwrap(), [lease(1)]);
    assert_eq!(bench.start(), (vec![lease(1)], false));
}

#[test]
fn changes_during_a_snapshot_are_not_lost_when_the_journal_is_cut() {
    let mut bench = Bench::new();
    let mut newest = 0;
    let end = Instant::now() + Duration::from_millis(2500);
    while Instant::now() < end {
        newest = newest % 250 + 1;
        assert!(bench.write(&[grant(newest)]));
        if newest.is_multiple_of(100) {
            let (found, lost) = bench.crash().start();
            assert!(!lost && found.contains(&lease(newest)), "{newest} is lost");
        }
    }
}

#[test]
fn a_torn_journal_costs_what_was_never_acknowledged() {
    let mut bench = Bench::new();
    assert!(bench.write(&[grant(1)]));
    assert!(bench.write(&[grant(2)]));
    let mut crashed = bench.crash();
    let journal = std::fs::read(crashed.journal()).unwrap();
    std::fs::write(crashed.journal(), &journal[..journal.len() - 5]).unwrap();
    assert_eq!(crashed.start(), (vec![lease(1)], false));
    assert!(crashed.write(&[grant(3)]));
    assert_eq!(crashed.crash().start(), (vec![lease(1), lease(3)], false));
}

#[test]
fn an_unreadable_lease_file_is_moved_aside_and_the_journal_still_counts() {
    for contents in ["", "[{\"mac\":", "{}", "\0\0\0"] {
        let mut bench = Bench::new();
        assert!(bench.write(&[grant(1)]));
        let mut crashed = bench.crash();
        std::fs::write(crashed.path(), contents).unwrap();
        assert_eq!(crashed.start(), (vec![lease(1)], true), "{contents:?}");
        let files = crashed.files();
        let aside = files.iter().find(|name| name.starts_with("leases.json.corrupt-")).unwrap();
        assert_eq!(std::fs::read_to_string(crashed.dir.path().join(aside)).unwrap(), contents);
        assert_eq!(leases::read(&crashed.path()).unwrap(), [lease(1)]);
    }
}

#[test]
fn a_start_that_comes_to_nothing_forgets_nothing() {
    let mut bench = Bench::new();
    assert!(bench.write(&[grant(1)]));
    let mut crashed = bench.crash();
    std::fs::write(crashed.path(), "torn").unwrap();
    for _ in 0..2 {
        let loaded = load(&crashed.path()).unwrap();
        assert_eq!((loaded.leases.as_slice(), loaded.lost), ([lease(1)].as_slice(), true));
        assert_eq!(std::fs::read_to_string(crashed.path()).unwrap(), "torn");
    }
    assert_eq!(crashed.start(), (vec![lease(1)], true));
}

#[test]
fn a_damaged_journal_is_moved_aside_and_costs_no_whole_line() {
    let mut bench = Bench::new();
    assert!(bench.write(&[grant(1), grant(2), grant(3)]));
    let mut crashed = bench.crash();
    let text = std::fs::read_to_string(crashed.journal()).unwrap();
    std::fs::write(crashed.journal(), text.replace("10.0.0.2", "10.0.0.9")).unwrap();
    assert_eq!(crashed.start(), (vec![lease(1), lease(3)], true));
    assert!(crashed.files().iter().any(|name| name.starts_with("leases.journal.corrupt-")));
}

#[test]
fn a_lease_file_of_another_program_outranks_an_old_journal() {
    let mut bench = Bench::new();
    assert!(bench.write(&[grant(1), grant(2)]));
    let mut crashed = bench.crash();
    // Meanwhile the other program gave .1 to another client, and renewed .3.
    let taken = Lease { mac: lease(7).mac, ..later(1) };
    let table = Table::new(vec![taken, later(3)]);
    std::fs::write(crashed.path(), table.to_json()).unwrap();
    assert_eq!(crashed.start(), (vec![taken, lease(2), later(3)], false));
}

#[test]
fn corrected_expiries_outlive_the_journal_that_holds_the_wrong_ones() {
    let mut bench = Bench::new();
    assert!(bench.write(&[grant(1)]));
    bench.store.as_ref().unwrap().correct(vec![later(1)]).unwrap();
    let started = Instant::now();
    while bench.crash().start().0 != [later(1)] {
        assert!(started.elapsed() < Duration::from_secs(5), "the journal still rules");
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn many_writers_share_a_sync() {
    let mut bench = Bench::new();
    assert!(bench.write(&[grant(1)]));
    for batch in 2..=200_u8 {
        bench.store.as_ref().unwrap().write(batch.into(), vec![grant(batch)]).unwrap();
    }
    let (mut outcomes, mut up_to) = (0, 0);
    while up_to < 200 {
        let outcome = bench.outcomes.recv_timeout(Duration::from_secs(10)).unwrap();
        assert!(outcome.durable && outcome.up_to > up_to);
        (outcomes, up_to) = (outcomes + 1, outcome.up_to);
    }
    assert!(outcomes < 100, "{outcomes} syncs for 199 batches");
}

#[test]
fn a_folder_that_cannot_be_written_makes_nothing_durable_until_it_can() {
    let mut bench = Bench::new();
    assert!(bench.write(&[grant(1)]));
    // The journal that is open goes on; one that has to be made cannot be.
    bench.store.take().unwrap().stop().unwrap();
    bench.start();
    let hidden = bench.dir.path().with_extension("hidden");
    std::fs::rename(bench.dir.path(), &hidden).unwrap();
    assert!(!bench.write(&[grant(2)]));
    std::fs::rename(&hidden, bench.dir.path()).unwrap();
    assert!(bench.write(&[grant(3)]));
    assert_eq!(bench.crash().start(), (vec![lease(1), lease(3)], false));
}
