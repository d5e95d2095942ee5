//! The daemon that runs on this host, and what its command line says of it. The Go program's has the same flags.

use std::path::{Path, PathBuf};

use anyhow::{Result, ensure};

use crate::cli::switch;
use crate::config::DEFAULT_STATE_DIR;
use crate::dhcp::leases;
use crate::files::{self, Holder, PID_FILE};

/// A running daemon.
#[derive(Debug)]
pub struct RunningDaemon {
    /// The process.
    pub holder: Holder,
    argv: Vec<String>,
}

impl RunningDaemon {
    /// The daemon that holds the PID file, if one does.
    pub fn find() -> Result<Option<Self>> {
        let holder = files::daemon(Path::new(PID_FILE))?;
        Ok(holder.map(|holder| Self { argv: holder.argv(), holder }))
    }

    /// Whether it goes by the state in this folder. One whose command line cannot be read is taken to.
    pub fn keeps(&self, state_dir: &Path) -> bool {
        self.state_dir().is_none_or(|theirs| {
            theirs == state_dir
                || theirs.canonicalize().is_ok_and(|theirs| state_dir.canonicalize().ok() == Some(theirs))
        })
    }

    /// Stops a command that would change the host under a daemon which goes by another state: it would undo the change.
    pub fn ensure_keeps(&self, state_dir: &Path) -> Result<()> {
        ensure!(
            self.keeps(state_dir),
            "the daemon on this host, {}, goes by {} and would undo what {} asks for, so nothing was changed; name that \
             folder with --state-dir, or stop the daemon first",
            self.holder,
            self.state_dir().unwrap_or_default().display(),
            state_dir.display()
        );
        Ok(())
    }

    /// Whether it was told to write no rules.
    pub fn skips_iptables(&self) -> bool {
        let mut values = self.argv.iter().filter_map(|word| word.strip_prefix("--skip-iptables"));
        values.any(|value| value.is_empty() || value.strip_prefix('=').is_some_and(|value| switch(value) == Ok(true)))
    }

    /// Where its leases are.
    pub fn lease_file(&self) -> Option<PathBuf> {
        let named = self.option("--lease-file").map(|file| self.absolute(file));
        named.or_else(|| self.state_dir().map(|folder| leases::path_in(&folder)))
    }

    /// The folder of its state; `None` when its command line cannot be read.
    pub fn state_dir(&self) -> Option<PathBuf> {
        let named = || self.option("--state-dir").unwrap_or(DEFAULT_STATE_DIR);
        (!self.argv.is_empty()).then(|| self.absolute(named()))
    }

    /// The value of an option, as `--option value` or `--option=value`; the last one counts.
    fn option(&self, name: &str) -> Option<&str> {
        let value = |(at, word): (usize, &'_ String)| match word.strip_prefix(name)? {
            "" => self.argv.get(at + 1).map(|_| at + 1),
            rest => rest.starts_with('=').then_some(at),
        };
        let at = self.argv.iter().enumerate().rev().find_map(value)?;
        let word = self.argv[at].as_str();
        Some(word.strip_prefix(name).and_then(|rest| rest.strip_prefix('=')).unwrap_or(word))
    }

    fn absolute(&self, path: &str) -> PathBuf {
        let cwd = self.holder.pid.and_then(|pid| std::fs::read_link(format!("/proc/{pid}/cwd")).ok());
        cwd.unwrap_or_default().join(path)
    }
}

/// Where the leases of the node in this folder are: where its daemon has them, if it runs.
pub fn lease_file(daemon: Option<&RunningDaemon>, state_dir: &Path) -> PathBuf {
    let theirs = daemon.filter(|daemon| daemon.keeps(state_dir)).and_then(RunningDaemon::lease_file);
    theirs.unwrap_or_else(|| leases::path_in(state_dir))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn daemon(argv: &str) -> RunningDaemon {
        RunningDaemon { holder: Holder { pid: None }, argv: argv.split(' ').map(str::to_owned).collect() }
    }

    #[test]
    fn a_command_line_says_where_state_and_leases_are() {
        let usual = daemon("cocoon-net daemon");
        assert_eq!(usual.state_dir(), Some(DEFAULT_STATE_DIR.into()));
        assert_eq!(usual.lease_file(), Some("/var/lib/cocoon/net/leases.json".into()));
        let elsewhere = daemon("cocoon-net daemon --state-dir /a --state-dir=/b --lease-time 1h");
        assert_eq!(elsewhere.lease_file(), Some("/b/leases.json".into()));
        assert!(elsewhere.keeps(Path::new("/b")) && !elsewhere.keeps(Path::new("/a")));
        assert_eq!(daemon("cocoon-net daemon --lease-file /c").lease_file(), Some("/c".into()));
    }

    #[test]
    fn the_switch_is_read_as_the_command_line_reads_it() {
        assert!(daemon("cocoon-net daemon --skip-iptables").skips_iptables());
        assert!(daemon("cocoon-net daemon --skip-iptables=T").skips_iptables());
        assert!(!daemon("cocoon-net daemon --skip-iptables=false").skips_iptables());
    }
}
