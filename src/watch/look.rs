//! A cheap look at what sends no events: toggles in /proc/sys, files, an ipset, and legacy iptables tables.
//!
//! A look is compared with the one before it, so it need not know what is right: it only notices change. Deciding
//! whether a change is drift is the reconcile pass's business.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::Reason;
use crate::command::Command;
use crate::host::ipset;

/// The toggles that isolation and forwarding depend on.
const TOGGLES: [&str; 6] = [
    "/proc/sys/net/bridge/bridge-nf-call-iptables",
    "/proc/sys/net/bridge/bridge-nf-call-ip6tables",
    "/proc/sys/net/ipv4/ip_forward",
    "/proc/sys/net/ipv4/conf/all/rp_filter",
    "/proc/sys/net/ipv4/conf/default/rp_filter",
    "/proc/sys/net/ipv4/conf/cni0/rp_filter",
];

/// What a look that starts no process saw.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Glance {
    toggles: [Option<Vec<u8>>; TOGGLES.len()],
    files: Vec<Option<FileIdentity>>,
    set: Option<u64>,
}

/// Device, inode, size and time of change: what a rename or a write in place alters.
type FileIdentity = (u64, u64, u64, i64, i64);

impl Glance {
    /// Looks at the toggles and at `files`; `set` is the [`set_digest`] of the ipset, if one is watched.
    pub(super) fn take(files: &[PathBuf], set: Option<u64>) -> Self {
        Self {
            toggles: TOGGLES.map(|path| std::fs::read(path).ok()),
            files: files.iter().map(|path| identity(path)).collect(),
            set,
        }
    }

    /// What differs from the look before.
    pub(super) fn changes_since(&self, before: &Self) -> Vec<Reason> {
        let mut reasons = Vec::new();
        if self.toggles != before.toggles {
            reasons.push(Reason::Toggles);
        }
        if self.files != before.files {
            reasons.push(Reason::Files);
        }
        if self.set != before.set {
            reasons.push(Reason::Set);
        }
        reasons
    }
}

/// A digest of an ipset, counters left out; `None` where there is none, or it cannot be read.
pub(super) fn set_digest(name: &str) -> Option<u64> {
    ipset::digest(name).unwrap_or_else(|error| {
        tracing::debug!(set = name, error = %error, "cannot read the set");
        None
    })
}

fn identity(path: &Path) -> Option<FileIdentity> {
    let meta = std::fs::metadata(path).ok()?;
    Some((meta.dev(), meta.ino(), meta.size(), meta.ctime(), meta.ctime_nsec()))
}

/// A digest of the tables that these `*-save` programs print, packet counters left out. A failure has a digest too:
/// the change to it and from it is what counts.
pub(super) async fn saved_tables(programs: Vec<String>) -> u64 {
    let mut hasher = DefaultHasher::new();
    for program in programs {
        match Command::new(program).output().await {
            Ok(output) => {
                output.status.code().hash(&mut hasher);
                rules_only(&output.text()).for_each(|line| line.hash(&mut hasher));
            }
            Err(error) => error.to_string().hash(&mut hasher),
        }
    }
    hasher.finish()
}

/// The lines of a save without comments and without the packet counters of the chains.
fn rules_only(saved: &str) -> impl Iterator<Item = &str> {
    saved.lines().filter(|line| !line.starts_with('#')).map(|line| match line.split_once(" [") {
        Some((chain, _)) if line.starts_with(':') => chain,
        _ => line,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_and_comments_of_a_save_do_not_count() {
        let save =
            |time: &str, packets: &str| format!("# at {time}\n*filter\n:FORWARD ACCEPT [{packets}]\n-A FORWARD\n");
        let (early, late) = (save("12:00", "0:0"), save("12:01", "7:420"));
        assert!(rules_only(&early).eq(rules_only(&late)));
        assert!(!rules_only(&early).eq(rules_only(&late.replace("ACCEPT", "DROP"))));
    }

    #[test]
    fn a_file_that_is_replaced_written_or_removed_has_changed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pool.json");
        let look = || Glance::take(std::slice::from_ref(&path), None);
        let absent = look();
        std::fs::write(&path, "{}").unwrap();
        let first = look();
        assert_eq!(first.changes_since(&absent), [Reason::Files]);
        assert_eq!(look().changes_since(&first), []);

        std::fs::write(dir.path().join("new"), "{}").unwrap();
        std::fs::rename(dir.path().join("new"), &path).unwrap();
        let replaced = look();
        assert_eq!(replaced.changes_since(&first), [Reason::Files]);
        std::fs::remove_file(&path).unwrap();
        assert_eq!(look().changes_since(&replaced), [Reason::Files]);
    }
}
