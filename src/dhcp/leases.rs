//! `leases.json`: what it holds and how it is read and written.
//!
//! It is an array of `{"mac", "ip", "expiry"}` that the Go program reads and writes too. It also keeps leases that have
//! run out, until somebody else gets the address, so that a client finds its address again after a restart.

use std::collections::{BTreeMap, HashMap};
use std::fmt::Write as _;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};

use jiff::Timestamp;
use serde::Deserialize;

use super::Mac;
use crate::files::{self, FileError};

/// An address, who holds it, and until when.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Lease {
    /// The client.
    pub mac: Mac,
    /// Its address.
    pub ip: Ipv4Addr,
    /// When the lease runs out.
    pub expiry: Timestamp,
}

/// A change to the leases.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Record {
    /// A lease was granted or extended.
    Grant(Lease),
    /// A lease was given back.
    Release {
        /// The client that held it.
        mac: Mac,
        /// The address.
        ip: Ipv4Addr,
    },
}

/// Why leases could not be read or kept.
#[derive(Debug, thiserror::Error)]
pub enum LeaseError {
    /// A file could not be read, written, moved or removed.
    #[error("the leases cannot be kept")]
    File(#[source] FileError),
    /// The journal could not be opened or written.
    #[error("cannot {doing} the lease journal {}", .path.display())]
    Journal {
        /// What was being done.
        doing: &'static str,
        /// The journal.
        path: PathBuf,
        /// What the system answered.
        source: std::io::Error,
    },
    /// The file is not a list of leases.
    #[error(
        "{} is not a list of leases; the daemon moves such a file aside when it starts and goes by its journal", .path.display()
    )]
    Unreadable {
        /// The file.
        path: PathBuf,
    },
    /// The thread that writes the leases could not be started, or has died.
    #[error("the thread that writes the leases is gone; restart the daemon, leases that were acknowledged are kept")]
    Thread,
}

/// Where the leases are unless told otherwise.
#[must_use]
pub fn path_in(state_dir: &Path) -> PathBuf {
    state_dir.join("leases.json")
}

/// The leases in a file, those that have run out among them; none when there is no file.
///
/// # Errors
/// [`LeaseError::File`] when it cannot be read, [`LeaseError::Unreadable`] when it is not a list of leases.
pub fn read(path: &Path) -> Result<Vec<Lease>, LeaseError> {
    let Some(bytes) = files::read_optional(path).map_err(LeaseError::File)? else { return Ok(Vec::new()) };
    let parsed = parse(&bytes);
    if parsed.damaged { Err(LeaseError::Unreadable { path: path.to_owned() }) } else { Ok(parsed.leases) }
}

/// What could be made of a lease file.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Parsed {
    /// Every entry that is a lease.
    pub leases: Vec<Lease>,
    /// Whether there was something that is none: leases may have been lost.
    pub damaged: bool,
}

#[derive(Deserialize)]
struct Entry<'a> {
    #[serde(borrow)]
    mac: std::borrow::Cow<'a, str>,
    ip: Ipv4Addr,
    expiry: Timestamp,
}

impl Entry<'_> {
    fn lease(&self) -> Option<Lease> {
        let mac = self.mac.parse::<Mac>().ok().filter(|mac| mac.is_station())?;
        Some(Lease { mac, ip: self.ip, expiry: self.expiry })
    }
}

/// Takes a lease file apart. `null` is how the Go program writes an empty list. What is not a lease in a list of them
/// does not cost the others.
pub(super) fn parse(bytes: &[u8]) -> Parsed {
    if let Ok(entries) = serde_json::from_slice::<Option<Vec<Entry<'_>>>>(bytes) {
        let entries = entries.unwrap_or_default();
        let leases: Vec<Lease> = entries.iter().filter_map(Entry::lease).collect();
        return Parsed { damaged: leases.len() < entries.len(), leases };
    }
    let values = serde_json::from_slice::<Vec<serde_json::Value>>(bytes).unwrap_or_default();
    let lease = |value: &serde_json::Value| Entry::deserialize(value).ok()?.lease();
    Parsed { leases: values.iter().filter_map(lease).collect(), damaged: true }
}

/// The leases as they are, or are about to be, on disk.
#[derive(Debug, Clone, Default)]
pub(super) struct Table {
    by_ip: BTreeMap<Ipv4Addr, (Mac, Timestamp)>,
    by_mac: HashMap<Mac, Ipv4Addr>,
}

impl Table {
    /// Leases from a file. Of two for one address or one client the one that lasts longer counts.
    pub fn new(mut leases: Vec<Lease>) -> Self {
        leases.sort_by_key(|lease| lease.expiry);
        let mut table = Self::default();
        for lease in leases {
            table.apply(Record::Grant(lease));
        }
        table
    }

    /// Makes a change. Whoever else had the address, and whatever else the client had, is forgotten.
    pub fn apply(&mut self, record: Record) {
        match record {
            Record::Grant(Lease { mac, ip, expiry }) => {
                if let Some((previous, _)) = self.by_ip.insert(ip, (mac, expiry)).filter(|(owner, _)| *owner != mac) {
                    self.by_mac.remove(&previous);
                }
                if let Some(other) = self.by_mac.insert(mac, ip).filter(|other| *other != ip) {
                    self.by_ip.remove(&other);
                }
            }
            Record::Release { mac, ip } => {
                if self.by_ip.get(&ip).is_some_and(|(owner, _)| *owner == mac) {
                    self.by_ip.remove(&ip);
                    self.by_mac.remove(&mac);
                }
            }
        }
    }

    /// Whether a change renews or ends a lease that is here.
    pub fn continues(&self, record: &Record) -> bool {
        let (Record::Grant(Lease { mac, ip, .. }) | Record::Release { mac, ip }) = record;
        self.by_ip.get(ip).is_some_and(|(owner, _)| owner == mac)
    }

    /// Makes a change only if it contradicts nothing that is here.
    pub fn add(&mut self, record: Record) {
        if let Record::Grant(lease) = record
            && !self.by_ip.contains_key(&lease.ip)
            && !self.by_mac.contains_key(&lease.mac)
        {
            self.apply(record);
        }
    }

    /// The leases in the order of their addresses.
    pub fn leases(&self) -> impl Iterator<Item = Lease> {
        self.by_ip.iter().map(|(ip, (mac, expiry))| Lease { mac: *mac, ip: *ip, expiry: *expiry })
    }

    /// A number that two tables share only if they are the same.
    pub fn digest(&self) -> u64 {
        self.leases().fold(FNV_OFFSET, |hash, lease| {
            let hash = fnv1a(hash, &lease.ip.octets());
            let hash = fnv1a(hash, &lease.mac.0);
            fnv1a(hash, &lease.expiry.as_second().to_be_bytes())
        })
    }

    /// The text of `leases.json`, as Go's `json.MarshalIndent` would write it.
    pub fn to_json(&self) -> String {
        let mut text = String::with_capacity(2 + self.by_ip.len() * 110);
        text.push('[');
        for (at, Lease { mac, ip, expiry }) in self.leases().enumerate() {
            let comma = if at > 0 { "," } else { "" };
            // Writing to a String cannot fail.
            let _ = write!(
                text,
                "{comma}\n  {{\n    \"mac\": \"{mac}\",\n    \"ip\": \"{ip}\",\n    \"expiry\": \"{expiry}\"\n  }}"
            );
        }
        text.push_str(if self.by_ip.is_empty() { "]" } else { "\n]" });
        text
    }
}

/// Start value of [`fnv1a`].
pub(super) const FNV_OFFSET: u64 = 0xcbf2_9ce4_8422_2325;

/// Fowler-Noll-Vo hash, variant 1a: enough to tell a torn line from a whole one.
pub(super) fn fnv1a(hash: u64, bytes: &[u8]) -> u64 {
    bytes.iter().fold(hash, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the Go program wrote under `TZ=Asia/Shanghai`.
    const GO_PROGRAM: &str = r#"[
  {
    "mac": "22:7d:15:b2:56:f1",
    "ip": "172.20.100.3",
    "expiry": "2026-11-24T12:00:32+08:00"
  },
  {
    "mac": "5a:69:1d:4c:e1:81",
    "ip": "172.20.100.6",
    "expiry": "2026-11-24T12:00:32+08:00"
  }
]"#;

    #[test]
    fn the_go_programs_file_loads_and_comes_back_in_its_form() {
        let parsed = parse(GO_PROGRAM.as_bytes());
        assert!(!parsed.damaged);
        assert_eq!(parsed.leases[0].mac, Mac([0x22, 0x7d, 0x15, 0xb2, 0x56, 0xf1]));
        assert_eq!(parsed.leases[0].expiry, "2026-11-24T04:00:32Z".parse().unwrap());
        let text = Table::new(parsed.leases).to_json();
        assert_eq!(text, GO_PROGRAM.replace("12:00:32+08:00", "04:00:32Z"));
        assert_eq!(Table::default().to_json(), "[]");
    }

    #[test]
    fn null_is_an_empty_list() {
        assert_eq!(parse(b"null"), Parsed::default());
        assert_eq!(parse(b"[]"), Parsed::default());
    }

    #[test]
    fn whatever_is_not_a_list_of_leases_is_damage() {
        let half = &GO_PROGRAM[..GO_PROGRAM.len() / 2];
        for bad in ["", " ", half, "{}", "[1]", "\0\0\0\0", r#"{"leases": []}"#] {
            let parsed = parse(bad.as_bytes());
            assert!(parsed.damaged && parsed.leases.is_empty(), "{bad:?}: {parsed:?}");
        }
    }

    #[test]
    fn an_entry_that_is_no_lease_does_not_cost_the_others() {
        for bad in [
            r#""mac": "22:7d:15:b2:56:zz""#,
            r#""mac": "ff:ff:ff:ff:ff:ff""#,
            r#""mac": 7"#,
            r#""Mac": "22:7d:15:b2:56:f1""#,
        ] {
            let parsed = parse(GO_PROGRAM.replace(r#""mac": "22:7d:15:b2:56:f1""#, bad).as_bytes());
            assert!(parsed.damaged, "{bad}");
            assert_eq!(parsed.leases.len(), 1, "{bad}");
        }
    }

    #[test]
    fn an_address_and_a_client_are_in_the_table_once() {
        let lease = |mac: u8, ip: u8, expiry| Lease {
            mac: Mac([2, 0, 0, 0, 0, mac]),
            ip: Ipv4Addr::new(10, 0, 0, ip),
            expiry: Timestamp::from_second(expiry).unwrap(),
        };
        let of = |leases: &[Lease]| Table::new(leases.to_vec()).leases().collect::<Vec<_>>();
        assert_eq!(of(&[lease(1, 2, 20), lease(2, 2, 10)]), [lease(1, 2, 20)]);
        assert_eq!(of(&[lease(1, 3, 10), lease(1, 2, 20)]), [lease(1, 2, 20)]);

        let mut table = Table::new(vec![lease(1, 2, 20)]);
        table.apply(Record::Release { mac: lease(2, 2, 0).mac, ip: lease(1, 2, 0).ip });
        assert_eq!(table.leases().count(), 1, "another client's release");
        table.add(Record::Grant(lease(2, 2, 30)));
        table.add(Record::Grant(lease(1, 3, 30)));
        table.add(Record::Grant(lease(3, 3, 30)));
        assert_eq!(table.leases().collect::<Vec<_>>(), [lease(1, 2, 20), lease(3, 3, 30)]);
    }
}
