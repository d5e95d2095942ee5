//! What a host looks like, as text that can be compared.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::{self, Write};
use std::fs;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::Path;
use std::time::Duration;

use serde_json::Value;

use super::host::{HARNESS, Host};
use super::process::eventually;

/// Each section of a host's state (`iptables-nft`, `links`, `files`, ...), line by line.
#[derive(Clone, PartialEq, Eq)]
pub struct Snapshot(BTreeMap<String, Vec<String>>);

impl Host {
    /// Takes the host's state down, without changing it: tables of both backends (counters left out; a table that is not
    /// there and an empty one differ), ipsets, links with their bridge flags, addresses, routes, the sysctls that
    /// matter, and every file below /run, /etc/cni, /etc/cron.d and /var/lib/cocoon with mode and content.
    pub fn snapshot(&self) -> Snapshot {
        let mut sections = BTreeMap::new();
        for family in ["iptables", "ip6tables"] {
            for backend in ["nft", "legacy"] {
                let tool = self.real_tool(&format!("{family}-{backend}-save"));
                let saved = self.ok([tool.display()]);
                sections.insert(format!("{family}-{backend}"), saved.lines().filter_map(rule).collect());
            }
        }
        sections.insert("ipsets".to_owned(), self.ok("ipset save").lines().map(str::to_owned).collect());
        for (section, command) in [
            ("links", "ip -d -j link show"),
            ("addresses", "ip -j address show"),
            ("routes", "ip -4 -j route show table all"),
            ("routes6", "ip -6 -j route show table all"),
        ] {
            sections.insert(section.to_owned(), records(&self.ok(command)));
        }
        sections.insert("sysctls".to_owned(), self.enter(sysctls));
        sections.insert("files".to_owned(), self.enter(files));
        Snapshot(sections)
    }

    /// Panics, with what differs, unless the host is as it was; the kernel gets a few seconds to tidy up.
    #[track_caller]
    pub fn assert_back_to(&self, before: &Snapshot) {
        self.assert_back_to_but_for(before, &[]);
    }

    /// As [`Host::assert_back_to`], with sections left out.
    #[track_caller]
    pub fn assert_back_to_but_for(&self, before: &Snapshot, sections: &[&str]) {
        self.assert_alike(before, |snapshot| snapshot.without(sections));
    }

    /// As [`Host::assert_back_to`], looking only at what `part` leaves of a snapshot.
    #[track_caller]
    pub fn assert_alike(&self, before: &Snapshot, part: impl Fn(&Snapshot) -> Snapshot) {
        let before = part(before);
        let mut now = part(&self.snapshot());
        eventually(Duration::from_secs(3), || {
            now = part(&self.snapshot());
            now == before
        });
        assert!(now == before, "{} is not as it was:\n{}", self.name(), before.diff(&now));
    }
}

impl Snapshot {
    /// The lines of one section.
    #[track_caller]
    pub fn section(&self, name: &str) -> &[String] {
        self.0.get(name).unwrap_or_else(|| panic!("no section {name}; there are {:?}", self.0.keys()))
    }

    /// The same with sections left out.
    pub fn without(&self, sections: &[&str]) -> Self {
        Self(self.0.iter().filter(|(name, _)| !sections.contains(&name.as_str())).map(clone).collect())
    }

    /// The same with only these sections.
    pub fn only(&self, sections: &[&str]) -> Self {
        Self(self.0.iter().filter(|(name, _)| sections.contains(&name.as_str())).map(clone).collect())
    }

    /// The same with tables that hold no rule, no chain of a user and no policy but ACCEPT taken for absent ones: reading
    /// or emptying a table leaves such a table behind.
    pub fn without_empty_tables(&self) -> Self {
        let tables = |(name, lines): (&String, &Vec<String>)| {
            let kept =
                if name.starts_with("ip") && name.contains("tables-") { full_tables(lines) } else { lines.clone() };
            (name.clone(), kept)
        };
        Self(self.0.iter().map(tables).collect())
    }

    /// The same with folders left out, which say nothing while they are empty.
    pub fn without_folders(&self) -> Self {
        let mut kept = self.clone();
        if let Some(files) = kept.0.get_mut("files") {
            files.retain(|line| !line.contains("/ "));
        }
        kept
    }

    /// What is gone (`-`) and what is new (`+`) in a later snapshot, by section; empty if they are alike.
    pub fn diff(&self, later: &Self) -> String {
        let mut text = String::new();
        for name in self.0.keys().chain(later.0.keys()).collect::<BTreeSet<_>>() {
            let empty = Vec::new();
            let (old, new) = (self.0.get(name).unwrap_or(&empty), later.0.get(name).unwrap_or(&empty));
            if old != new {
                let _ = writeln!(text, "{name}:");
                line_diff(old, new).iter().for_each(|line| text += &format!("  {line}\n"));
            }
        }
        text
    }
}

impl fmt::Display for Snapshot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (name, lines) in &self.0 {
            writeln!(f, "{name}:")?;
            lines.iter().try_for_each(|line| writeln!(f, "  {line}"))?;
        }
        Ok(())
    }
}

impl fmt::Debug for Snapshot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "\n{self}")
    }
}

fn clone((name, lines): (&String, &Vec<String>)) -> (String, Vec<String>) {
    (name.clone(), lines.clone())
}

/// A line of `iptables-save` without counters; comments, which hold the time of day, are left out.
fn rule(line: &str) -> Option<String> {
    let chain = line.split(" [").next().filter(|_| line.starts_with(':'));
    (!line.starts_with('#')).then(|| chain.unwrap_or(line).to_owned())
}

fn full_tables(lines: &[String]) -> Vec<String> {
    let dull =
        |line: &String| line.starts_with('*') || line == "COMMIT" || line.ends_with(" ACCEPT") && line.starts_with(':');
    lines.split_inclusive(|line| line == "COMMIT").filter(|table| !table.iter().all(dull)).flatten().cloned().collect()
}

/// The objects of `ip -j`, a line each, without what changes by itself.
fn records(json: &str) -> Vec<String> {
    let mut records: Vec<Value> = serde_json::from_str(json).expect("ip -j prints JSON");
    records.iter_mut().for_each(still);
    records.iter().map(ToString::to_string).collect()
}

fn still(value: &mut Value) {
    match value {
        Value::Object(fields) => {
            fields.retain(|name, _| name != "operstate" && !name.ends_with("_timer") && !name.ends_with("_life_time"));
            fields.values_mut().for_each(still);
        }
        Value::Array(values) => {
            // Whether there is somebody at the other end of the cable is not the host's doing.
            values.retain(|value| !["NO-CARRIER", "LOWER_UP", "linkdown"].iter().any(|flag| value == flag));
            values.iter_mut().for_each(still);
        }
        _ => {}
    }
}

fn sysctls() -> Vec<String> {
    let mut keys = vec![
        "net/ipv4/ip_forward".to_owned(),
        "net/ipv6/conf/all/forwarding".to_owned(),
        "net/bridge/bridge-nf-call-iptables".to_owned(),
        "net/bridge/bridge-nf-call-ip6tables".to_owned(),
        "net/bridge/bridge-nf-call-arptables".to_owned(),
        "net/bridge/bridge-nf-filter-vlan-tagged".to_owned(),
    ];
    for entry in fs::read_dir("/proc/sys/net/ipv4/conf").expect("/proc/sys is readable").flatten() {
        keys.push(format!("net/ipv4/conf/{}/rp_filter", entry.file_name().to_string_lossy()));
    }
    keys.sort();
    let value = |key: &String| fs::read_to_string(format!("/proc/sys/{key}")).unwrap_or_else(|_| "absent".to_owned());
    keys.iter().map(|key| format!("{key} = {}", value(key).trim())).collect()
}

fn files() -> Vec<String> {
    let mut lines = Vec::new();
    for root in ["/run", "/etc/cni", "/etc/cron.d", "/var/lib/cocoon"] {
        walk(Path::new(root), &mut lines);
    }
    lines
}

fn walk(path: &Path, lines: &mut Vec<String>) {
    let Ok(metadata) = path.symlink_metadata() else { return };
    // iptables-legacy leaves its lock file behind whenever it looks.
    if path == Path::new(HARNESS) || path == Path::new("/run/xtables.lock") {
        return;
    }
    let mode = metadata.permissions().mode() & 0o7777;
    let shown = path.display();
    if metadata.is_dir() {
        lines.push(format!("{shown}/ {mode:04o}"));
        let mut entries: Vec<_> =
            fs::read_dir(path).expect("a directory").flatten().map(|entry| entry.path()).collect();
        entries.sort();
        entries.iter().for_each(|entry| walk(entry, lines));
    } else if metadata.is_file() {
        lines.push(format!("{shown} {mode:04o}"));
        let content = String::from_utf8_lossy(&fs::read(path).unwrap_or_default()).into_owned();
        lines.extend(content.lines().map(|line| format!("{shown}| {line}")));
    } else {
        let kind = if metadata.file_type().is_socket() { "socket" } else { "special" };
        lines.push(format!("{shown} {mode:04o} {kind}"));
    }
}

/// The lines that only one side has, in order, by the longest common subsequence.
fn line_diff(old: &[String], new: &[String]) -> Vec<String> {
    let mut common = vec![vec![0_u32; new.len() + 1]; old.len() + 1];
    for i in (0..old.len()).rev() {
        for j in (0..new.len()).rev() {
            let skip = common[i + 1][j].max(common[i][j + 1]);
            common[i][j] = if old[i] == new[j] { common[i + 1][j + 1] + 1 } else { skip };
        }
    }
    let (mut i, mut j, mut lines) = (0, 0, Vec::new());
    while i < old.len() || j < new.len() {
        if i < old.len() && j < new.len() && old[i] == new[j] {
            (i, j) = (i + 1, j + 1);
        } else if j == new.len() || i < old.len() && common[i + 1][j] >= common[i][j + 1] {
            lines.push(format!("- {}", old[i]));
            i += 1;
        } else {
            lines.push(format!("+ {}", new[j]));
            j += 1;
        }
    }
    lines
}
