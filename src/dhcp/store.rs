//! Durable leases with group commit: one thread writes and syncs, whatever arrives meanwhile shares the next sync.
//!
//! A change counts once it is in the journal. `leases.json` follows within a second, written by a thread of its own so
//! that no grant waits for it, and the journal is then cut back to what is newer.

use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use jiff::{SignedDuration, Timestamp};

use super::journal::{Journal, Line, Replay};
use super::leases::{self, Lease, LeaseError, Record, Table};
use crate::files;
use crate::log::chain;

/// How long `leases.json` may lag behind the journal before it is written again. With the time that the writing takes it
/// stays within a second.
const SNAPSHOT_DELAY: Duration = Duration::from_millis(500);

/// How long to wait after `leases.json` could not be written.
const SNAPSHOT_RETRY: Duration = Duration::from_secs(5);

/// A journal shorter than this, in bytes, is not worth cutting while changes keep coming.
const JOURNAL_WORTH_CUTTING: u64 = 1 << 20;

const LEASE_FILE_MODE: u32 = 0o644;

/// What is put behind the name of a damaged file that is moved aside, and the time of that behind it.
const ASIDE: &str = ".corrupt-";
const ASIDE_TIME: &str = "%Y%m%dT%H%M%SZ";

/// How long a lease that was lost may last: what leases last unless told otherwise.
const LONGEST_LOST: SignedDuration = SignedDuration::from_hours(24);

/// What was found on disk.
#[derive(Debug)]
pub struct Loaded {
    /// The leases, those that have run out among them.
    pub leases: Vec<Lease>,
    /// Whether leases may have been lost that still last: a file cannot be read and will be moved aside, or was lately.
    pub lost: bool,
    /// Whether there is neither file.
    pub missing: bool,
    damaged: Damaged,
    table: Table,
    journal: Journal,
    path: PathBuf,
    fresh: bool,
}

/// Which files hold something else than what we wrote.
#[derive(Debug, Clone, Copy)]
struct Damaged {
    leases: bool,
    journal: bool,
}

/// Reads `leases.json` and replays the journal beside it. Nothing on disk changes before [`Store::start`].
///
/// # Errors
/// When a file cannot be read for a reason other than its contents.
pub fn load(path: &Path) -> Result<Loaded, LeaseError> {
    let journal_path = path.with_extension("journal");
    let bytes = files::read_optional(path).map_err(LeaseError::File)?;
    let journal = files::read_optional(&journal_path).map_err(LeaseError::File)?;
    let parsed = bytes.as_deref().map(leases::parse).unwrap_or_default();
    let replay = journal.as_deref().map(Replay::read).unwrap_or_default();

    let mut table = Table::new(parsed.leases);
    // A missing or unreadable file contradicts no journal.
    let foreign = bytes.is_some() && !parsed.damaged && !replay.bases.contains(&table.digest());
    for record in &replay.changes {
        if foreign { table.add(*record) } else { table.apply(*record) }
    }
    let damaged = Damaged { leases: parsed.damaged, journal: replay.damaged };
    // What the journal said is in the table; it goes once the table is on disk.
    let fresh = journal.is_none() && !damaged.leases;
    let loaded = Loaded {
        leases: table.leases().collect(),
        lost: damaged.leases || damaged.journal || was_damaged_lately(path),
        missing: bytes.is_none() && journal.is_none(),
        damaged,
        table,
        journal: Journal::new(journal_path, if replay.damaged { 0 } else { replay.len }),
        path: path.to_owned(),
        fresh,
    };
    Ok(loaded)
}

/// Whether a damaged file was moved aside so lately that leases which were lost with it may still last.
fn was_damaged_lately(path: &Path) -> bool {
    let Some((folder, name)) = path.parent().zip(path.file_name().and_then(|name| name.to_str())) else { return false };
    let folder = if folder.as_os_str().is_empty() { Path::new(".") } else { folder };
    let journal = Path::new(name).with_extension("journal").to_string_lossy().into_owned();
    let prefixes = [name, &journal].map(|name| format!("{name}{ASIDE}"));
    let time = |entry: std::fs::DirEntry| {
        let name = entry.file_name().into_string().ok()?;
        let time = prefixes.iter().find_map(|prefix| name.strip_prefix(prefix.as_str()))?;
        Some(
            jiff::civil::DateTime::strptime(ASIDE_TIME, time).ok()?.to_zoned(jiff::tz::TimeZone::UTC).ok()?.timestamp(),
        )
    };
    let since = Timestamp::now() - LONGEST_LOST;
    std::fs::read_dir(folder).into_iter().flatten().flatten().filter_map(time).any(|time| time > since)
}

/// Keeps a damaged file for someone to look at, under another name. `leases.json` keeps its own as well, until what could
/// be read of it is written in its place.
fn set_aside(path: &Path, keep: bool) -> Result<(), LeaseError> {
    let time = Timestamp::now().strftime(ASIDE_TIME).to_string();
    let mut aside = path.as_os_str().to_owned();
    aside.push(format!("{ASIDE}{time}"));
    let aside = PathBuf::from(aside);
    let linked = if keep { std::fs::hard_link(path, &aside) } else { std::fs::rename(path, &aside) };
    match linked {
        // Within a second of the last start.
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => Ok(()),
        Ok(()) => {
            tracing::error!(
                file = %path.display(), moved_to = %aside.display(),
                "the lease file is damaged and was moved aside; addresses that seem to be in use are kept from others"
            );
            Ok(())
        }
        Err(source) => {
            Err(LeaseError::File(files::FileError::Io { doing: "move aside", path: path.to_owned(), source }))
        }
    }
}

/// What became of changes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Outcome {
    /// It speaks of every batch up to this number that it has not spoken of before.
    pub up_to: u64,
    /// Whether they are on disk.
    pub durable: bool,
}

enum Message {
    Write {
        batch: u64,
        records: Vec<Record>,
    },
    /// The wall clock was set: these expiries replace those written down.
    Correct(Vec<Lease>),
    Snapshot(Result<(), LeaseError>),
    Stop,
}

/// The lease store: hands changes to its thread.
#[derive(Debug)]
pub struct Store {
    sender: Sender<Message>,
    thread: Option<JoinHandle<Result<(), LeaseError>>>,
}

impl Store {
    /// Starts the thread. It tells `report` what became of each batch, in order.
    ///
    /// # Errors
    /// [`LeaseError::Thread`] when there can be no thread; else when the journal that was replayed cannot be replaced.
    pub fn start(loaded: Loaded, report: impl Fn(Outcome) + Send + 'static) -> Result<Self, LeaseError> {
        let (sender, receiver) = mpsc::channel();
        let mut writer = Writer {
            table: loaded.table,
            journal: loaded.journal,
            path: loaded.path,
            header: String::new(),
            behind_since: None,
            snapshot: None,
            corrected: false,
            failing: false,
            to_self: sender.clone(),
        };
        writer.begin(loaded.fresh, loaded.damaged)?;
        let thread = std::thread::Builder::new()
            .name("leases".to_owned())
            .stack_size(256 << 10)
            .spawn(move || writer.run(&receiver, &report))
            .map_err(|_| LeaseError::Thread)?;
        Ok(Self { sender, thread: Some(thread) })
    }

    /// Hands over changes, to be durable together. Batches are numbered in rising order.
    ///
    /// # Errors
    /// [`LeaseError::Thread`] when the thread has died.
    pub fn write(&self, batch: u64, records: Vec<Record>) -> Result<(), LeaseError> {
        self.send(Message::Write { batch, records })
    }

    /// Replaces the expiries that are written down, after the wall clock was set.
    ///
    /// # Errors
    /// [`LeaseError::Thread`] when the thread has died.
    pub fn correct(&self, leases: Vec<Lease>) -> Result<(), LeaseError> {
        self.send(Message::Correct(leases))
    }

    fn send(&self, message: Message) -> Result<(), LeaseError> {
        self.sender.send(message).map_err(|_| LeaseError::Thread)
    }

    /// Writes `leases.json` a last time and removes the journal.
    ///
    /// # Errors
    /// When that fails: the journal then stays, and nothing that was acknowledged is lost.
    pub fn stop(mut self) -> Result<(), LeaseError> {
        self.send(Message::Stop)?;
        let thread = self.thread.take().ok_or(LeaseError::Thread)?;
        thread.join().map_err(|_| LeaseError::Thread)?
    }
}

/// The thread's side.
struct Writer {
    table: Table,
    journal: Journal,
    path: PathBuf,
    /// The line that names the `leases.json` in place, for the head of a new journal.
    header: String,
    /// Since when there are leases that `leases.json` does not hold.
    behind_since: Option<Instant>,
    /// The `leases.json` that is being written.
    snapshot: Option<Snapshot>,
    /// The journal holds expiries by a clock that has been set since.
    corrected: bool,
    /// The last write to the journal failed.
    failing: bool,
    to_self: Sender<Message>,
}

/// A `leases.json` that is being written.
struct Snapshot {
    /// The line that names it in the journal.
    header: String,
    /// The lines of the journal that it does not hold.
    since: String,
    /// Whether the journal must not outlive it, as it holds expiries by another clock.
    corrects: bool,
}

impl Writer {
    /// Makes the files on disk a pair that belongs together: what was replayed goes into `leases.json` before the journal
    /// is started over.
    fn begin(&mut self, fresh: bool, damaged: Damaged) -> Result<(), LeaseError> {
        Line::Base(self.table.digest()).write(&mut self.header);
        if let Some(folder) = self.path.parent().filter(|folder| !folder.as_os_str().is_empty()) {
            files::make_folders(folder, files::STATE_FOLDER_MODE).map_err(LeaseError::File)?;
        }
        if fresh {
            return Ok(());
        }
        if damaged.leases {
            set_aside(&self.path, true)?;
        }
        let saved = files::write_durably(&self.path, self.table.to_json().as_bytes(), LEASE_FILE_MODE);
        if damaged.journal {
            set_aside(self.journal.path(), false)?;
        }
        if let Err(source) = saved {
            // A full disk, most likely. The journal that was replayed stays until there is room.
            tracing::error!(error = ?source, "the replayed leases cannot be written to leases.json yet");
            self.behind_since = Some(Instant::now());
            return Ok(());
        }
        let path = self.journal.path().to_owned();
        self.journal.remove().map_err(|source| LeaseError::Journal { doing: "remove", path, source })
    }

    fn run(mut self, receiver: &Receiver<Message>, report: &dyn Fn(Outcome)) -> Result<(), LeaseError> {
        loop {
            let first = match self.next_snapshot() {
                None => receiver.recv().map_err(|_| LeaseError::Thread)?,
                Some(at) => match receiver.recv_timeout(at.saturating_duration_since(Instant::now())) {
                    Ok(message) => message,
                    Err(RecvTimeoutError::Timeout) => {
                        self.start_snapshot();
                        continue;
                    }
                    Err(RecvTimeoutError::Disconnected) => return Err(LeaseError::Thread),
                },
            };
            if self.take(first, receiver, report) {
                return self.finish(receiver);
            }
            if self.next_snapshot().is_some_and(|at| at <= Instant::now()) {
                self.start_snapshot();
            }
        }
    }

    /// Takes a message and every one that waits behind it: the changes among them share one sync. Returns whether it is
    /// time to stop.
    fn take(&mut self, first: Message, receiver: &Receiver<Message>, report: &dyn Fn(Outcome)) -> bool {
        let (mut records, mut last, mut stop) = (Vec::new(), None, false);
        for message in std::iter::once(first).chain(receiver.try_iter()) {
            match message {
                Message::Write { batch, records: more } => {
                    records.extend(more);
                    last = Some(batch);
                }
                Message::Correct(leases) => self.correct(leases),
                Message::Snapshot(result) => self.snapshot_done(result),
                Message::Stop => stop = true,
            }
        }
        if let Some(up_to) = last {
            report(Outcome { up_to, durable: self.commit(&records) });
        }
        stop
    }

    /// Appends changes to the journal and syncs it. Returns whether they are durable.
    fn commit(&mut self, records: &[Record]) -> bool {
        let mut lines = String::new();
        records.iter().for_each(|record| Line::Change(*record).write(&mut lines));
        let result = if self.journal.len() == 0 {
            self.journal.append(&format!("{}{lines}", self.header))
        } else {
            self.journal.append(&lines)
        };
        match result {
            Ok(()) => {
                if std::mem::take(&mut self.failing) {
                    tracing::info!("leases can be written again");
                }
                records.iter().for_each(|record| self.table.apply(*record));
                if let Some(snapshot) = &mut self.snapshot {
                    snapshot.since.push_str(&lines);
                }
                self.behind_since.get_or_insert_with(Instant::now);
                true
            }
            Err(error) => {
                if !std::mem::replace(&mut self.failing, true) {
                    let journal = self.journal.path().display();
                    tracing::error!(%error, %journal, "leases cannot be written; none is granted until they can");
                }
                // A renewal is acknowledged all the same, and what ends a lease has happened: both are written to
                // leases.json once there is room.
                for record in records {
                    if self.table.continues(record) {
                        self.table.apply(*record);
                        self.behind_since.get_or_insert_with(Instant::now);
                    }
                }
                false
            }
        }
    }

    fn correct(&mut self, leases: Vec<Lease>) {
        leases.into_iter().for_each(|lease| self.table.apply(Record::Grant(lease)));
        self.corrected = true;
        self.behind_since.get_or_insert_with(Instant::now);
    }

    fn next_snapshot(&self) -> Option<Instant> {
        self.behind_since.filter(|_| self.snapshot.is_none()).map(|since| since + SNAPSHOT_DELAY)
    }

    /// Lets another thread write the table as it is now to `leases.json`.
    fn start_snapshot(&mut self) {
        let (table, path, done) = (self.table.clone(), self.path.clone(), self.to_self.clone());
        let mut header = String::new();
        Line::Base(table.digest()).write(&mut header);
        // The journal must know the new file before the new file can be in place.
        let announced = if self.journal.len() > 0 { self.journal.append(&header) } else { Ok(()) };
        self.snapshot = Some(Snapshot { header, since: String::new(), corrects: std::mem::take(&mut self.corrected) });
        self.behind_since = None;
        if let Err(source) = announced {
            let path = self.journal.path().to_owned();
            return self.snapshot_done(Err(LeaseError::Journal { doing: "write to", path, source }));
        }
        let write = move || {
            let result = files::write_durably(&path, table.to_json().as_bytes(), LEASE_FILE_MODE);
            // If the store is gone, so is the need to know.
            let _ = done.send(Message::Snapshot(result.map_err(LeaseError::File)));
        };
        if std::thread::Builder::new().name("leases.json".to_owned()).stack_size(256 << 10).spawn(write).is_err() {
            self.snapshot_done(Err(LeaseError::Thread));
        }
    }

    /// Cuts the journal back to what the new `leases.json` does not hold.
    fn snapshot_done(&mut self, written: Result<(), LeaseError>) {
        let Some(snapshot) = self.snapshot.take() else { return };
        if let Err(error) = written.and_then(|()| self.cut_journal(&snapshot)) {
            // That there is no room has been said.
            if !self.failing {
                let error = chain(&error);
                tracing::warn!(error, "leases.json is older than the leases, which are safe in the journal");
            }
            self.corrected |= snapshot.corrects;
            self.behind_since = Some(Instant::now() + SNAPSHOT_RETRY);
        }
    }

    fn cut_journal(&mut self, snapshot: &Snapshot) -> Result<(), LeaseError> {
        self.header.clone_from(&snapshot.header);
        let worth_it = snapshot.since.is_empty() || snapshot.corrects || self.journal.len() > JOURNAL_WORTH_CUTTING;
        if self.journal.len() == 0 || !worth_it {
            return Ok(());
        }
        let path = self.journal.path().to_owned();
        let lines = format!("{}{}", snapshot.header, snapshot.since);
        self.journal.restart(&lines).map_err(|source| LeaseError::Journal { doing: "cut", path, source })
    }

    /// The last snapshot, after which the journal is of no use.
    fn finish(mut self, receiver: &Receiver<Message>) -> Result<(), LeaseError> {
        while self.snapshot.is_some() {
            match receiver.recv().map_err(|_| LeaseError::Thread)? {
                Message::Snapshot(result) => self.snapshot_done(result),
                // Nothing is written after the stop; a second stop says nothing new.
                Message::Write { .. } | Message::Correct(_) | Message::Stop => {}
            }
        }
        files::write_durably(&self.path, self.table.to_json().as_bytes(), LEASE_FILE_MODE).map_err(LeaseError::File)?;
        let path = self.journal.path().to_owned();
        self.journal.remove().map_err(|source| LeaseError::Journal { doing: "remove", path, source })
    }
}

#[cfg(test)]
mod tests;
