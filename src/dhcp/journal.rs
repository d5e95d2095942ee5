//! `leases.journal`: what is newer than `leases.json`, one checksummed line per change, synced before it counts.
//!
//! Besides changes it holds the digest of every `leases.json` that it goes with. A `leases.json` with another digest was
//! written by another program after this journal was left behind.

use std::fmt::Write as _;
use std::fs::{File, OpenOptions};
use std::io::{self, Write as _};
use std::net::Ipv4Addr;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use jiff::Timestamp;

use super::leases::{FNV_OFFSET, Lease, Record, fnv1a};

/// What a line says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Line {
    /// A change.
    Change(Record),
    /// A `leases.json` with this digest is about to be in place, or is.
    Base(u64),
}

impl Line {
    /// Appends its text, with checksum and line end.
    pub fn write(self, text: &mut String) {
        let start = text.len();
        // Writing to a String cannot fail.
        let _ = match self {
            Self::Change(Record::Grant(Lease { mac, ip, expiry })) => write!(text, "grant {mac} {ip} {expiry}"),
            Self::Change(Record::Release { mac, ip }) => write!(text, "release {mac} {ip}"),
            Self::Base(digest) => write!(text, "base {digest:016x}"),
        };
        let sum = fnv1a(FNV_OFFSET, &text.as_bytes()[start..]);
        let _ = writeln!(text, " {sum:016x}");
    }

    /// Reads a line without its line end; `None` if it is not whole.
    fn read(line: &str) -> Option<Self> {
        let (body, sum) = line.rsplit_once(' ')?;
        if sum.len() != 16 || u64::from_str_radix(sum, 16).ok()? != fnv1a(FNV_OFFSET, body.as_bytes()) {
            return None;
        }
        let words: Vec<&str> = body.split(' ').collect();
        match words[..] {
            ["grant", mac, ip, expiry] => {
                let (ip, expiry): (Ipv4Addr, Timestamp) = (ip.parse().ok()?, expiry.parse().ok()?);
                Some(Self::Change(Record::Grant(Lease { mac: mac.parse().ok()?, ip, expiry })))
            }
            ["release", mac, ip] => {
                Some(Self::Change(Record::Release { mac: mac.parse().ok()?, ip: ip.parse().ok()? }))
            }
            ["base", digest] => u64::from_str_radix(digest, 16).ok().map(Self::Base),
            _ => None,
        }
    }
}

/// More bytes than the first line has.
const FIRST_LINE: usize = 128;

/// What a journal that was left behind says.
#[derive(Debug, Default)]
pub(super) struct Replay {
    /// The changes, oldest first.
    pub changes: Vec<Record>,
    /// Digests of the lease files that it goes with.
    pub bases: Vec<u64>,
    /// Whether a line is not whole that ends, or is followed by one that is. A last line that is cut short was never
    /// acknowledged.
    pub damaged: bool,
    /// How many bytes there are up to the end of the last whole line.
    pub len: u64,
}

impl Replay {
    /// Reads the contents of a journal.
    pub fn read(bytes: &[u8]) -> Self {
        let mut replay = Self::default();
        let (mut torn, mut read) = (false, 0);
        for line in bytes.split_inclusive(|byte| *byte == b'\n') {
            read += line.len() as u64;
            let ended = line.strip_suffix(b"\n");
            let whole = ended.and_then(|line| std::str::from_utf8(line).ok()).and_then(Line::read);
            let Some(line) = whole else {
                // A write that is cut short ends before its last newline.
                replay.damaged |= ended.is_some();
                torn = true;
                continue;
            };
            replay.damaged |= torn;
            replay.len = read;
            match line {
                Line::Change(record) => replay.changes.push(record),
                Line::Base(digest) => replay.bases.push(digest),
            }
        }
        // Of the first line there may be less than all; of more, nothing that makes sense is no journal.
        replay.damaged |= replay.len == 0 && bytes.len() > FIRST_LINE;
        replay
    }
}

/// The journal, open for writing. It is made when there is something to write.
#[derive(Debug)]
pub(super) struct Journal {
    path: PathBuf,
    file: Option<File>,
    /// How many bytes of it are synced.
    len: u64,
    /// A failed write may have left something behind the synced bytes.
    dirty_tail: bool,
}

impl Journal {
    /// A journal of which this many bytes count; whatever is behind them is cut off at the first write.
    pub fn new(path: PathBuf, len: u64) -> Self {
        Self { path, file: None, len, dirty_tail: false }
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// How many bytes it holds.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Appends whole lines and syncs them. After an error none of them counts.
    pub fn append(&mut self, lines: &str) -> io::Result<()> {
        let file = match &mut self.file {
            Some(file) => file,
            None => self.file.insert(open(&self.path, self.len)?),
        };
        if self.dirty_tail {
            cut(file, self.len)?;
            self.dirty_tail = false;
        }
        let written = file.write_all(lines.as_bytes()).and_then(|()| file.sync_data());
        match written {
            Ok(()) => {
                self.len += lines.len() as u64;
                Ok(())
            }
            Err(error) => {
                // If this fails, too, the next write tries again.
                self.dirty_tail = cut(file, self.len).is_err();
                Err(error)
            }
        }
    }

    /// Starts over with these lines, which replace all that was in it at once.
    pub fn restart(&mut self, lines: &str) -> io::Result<()> {
        let fresh = self.path.with_extension("journal.new");
        let mut file = open(&fresh, 0)?;
        file.write_all(lines.as_bytes())?;
        file.sync_data()?;
        std::fs::rename(&fresh, &self.path)?;
        sync_folder(&self.path)?;
        (self.file, self.len, self.dirty_tail) = (Some(file), lines.len() as u64, false);
        Ok(())
    }

    /// Removes it. It is made anew at the next write.
    pub fn remove(&mut self) -> io::Result<()> {
        (self.file, self.len) = (None, 0);
        match std::fs::remove_file(&self.path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => sync_folder(&self.path),
        }
    }
}

/// Opens a file of which this many bytes count, made durable by name. Writes go to its end, also after it has been cut.
fn open(path: &Path, len: u64) -> io::Result<File> {
    let file = OpenOptions::new().create(true).append(true).mode(0o644).open(path)?;
    cut(&file, len)?;
    sync_folder(path)?;
    Ok(file)
}

fn cut(file: &File, len: u64) -> io::Result<()> {
    file.set_len(len)?;
    file.sync_data()
}

fn sync_folder(path: &Path) -> io::Result<()> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    File::open(folder)?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dhcp::Mac;

    fn grant(n: u8) -> Record {
        let expiry = "2026-11-24T04:00:32Z".parse().unwrap();
        Record::Grant(Lease { mac: Mac([2, 0, 0, 0, 0, n]), ip: Ipv4Addr::new(10, 0, 0, n), expiry })
    }

    fn text(lines: &[Line]) -> String {
        let mut text = String::new();
        lines.iter().for_each(|line| line.write(&mut text));
        text
    }

    #[test]
    fn what_is_written_is_read_back() {
        let release = Record::Release { mac: Mac([2, 0, 0, 0, 0, 1]), ip: Ipv4Addr::new(10, 0, 0, 1) };
        let text = text(&[Line::Base(7), Line::Change(grant(1)), Line::Change(release), Line::Base(u64::MAX)]);
        let replay = Replay::read(text.as_bytes());
        assert_eq!((replay.changes, replay.bases, replay.damaged), (vec![grant(1), release], vec![7, u64::MAX], false));
    }

    #[test]
    fn a_tail_torn_anywhere_costs_the_last_line_alone() {
        let first = text(&[Line::Change(grant(1))]);
        let both = text(&[Line::Change(grant(1)), Line::Change(grant(2))]);
        for len in first.len()..both.len() {
            let mut torn = both.as_bytes()[..len].to_vec();
            // A file system may also leave zeros where data never arrived.
            torn.resize(both.len(), 0);
            for bytes in [&both.as_bytes()[..len], &torn] {
                let replay = Replay::read(bytes);
                assert!(replay.changes == [grant(1)] && !replay.damaged, "cut at {len}");
            }
        }
    }

    #[test]
    fn a_bent_line_is_damage_and_costs_no_other() {
        let good = text(&[Line::Change(grant(1)), Line::Change(grant(2)), Line::Change(grant(3))]);
        let line = good.find('\n').unwrap() + 1;
        for at in line..2 * line - 1 {
            let mut bent = good.clone().into_bytes();
            bent[at] ^= 1;
            let replay = Replay::read(&bent);
            assert!(replay.changes == [grant(1), grant(3)] && replay.damaged, "byte {at}");
        }
    }

    #[test]
    fn a_journal_starts_over_with_what_is_still_new() {
        let dir = tempfile::tempdir().unwrap();
        let mut journal = Journal::new(dir.path().join("leases.journal"), 0);
        let read = |journal: &Journal| Replay::read(&std::fs::read(journal.path()).unwrap()).changes;
        journal.append(&text(&[Line::Change(grant(1))])).unwrap();
        journal.append(&text(&[Line::Change(grant(2))])).unwrap();
        assert_eq!(read(&journal), [grant(1), grant(2)]);
        journal.restart(&text(&[Line::Change(grant(3))])).unwrap();
        journal.append(&text(&[Line::Change(grant(4))])).unwrap();
        assert_eq!(read(&journal), [grant(3), grant(4)]);
        assert_eq!(journal.len(), std::fs::metadata(journal.path()).unwrap().len());
        journal.remove().unwrap();
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}
