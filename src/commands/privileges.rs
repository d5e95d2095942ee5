//! Whether this process may look at and change the host.

use anyhow::{Result, ensure};

/// `CAP_NET_ADMIN` (`capabilities(7)`).
const CAP_NET_ADMIN: u32 = 12;

/// Whether links, routes and rules can be read and changed: root has the capability, unless it was taken away.
pub fn can_administer() -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    effective
        .and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok())
        .is_some_and(|mask| mask >> CAP_NET_ADMIN & 1 == 1)
}

/// Whether the host can be looked at; says so when not, before the command shows what it can all the same.
pub fn can_look(command: &str) -> bool {
    let can = can_administer();
    if !can {
        tracing::warn!(
            "`cocoon-net {command}` shows only what it can read without root (or CAP_NET_ADMIN and CAP_NET_RAW); run it with sudo for the rest"
        );
    }
    can
}

/// Stops a command that could not do its work anyway, before it does half of it.
pub fn require(command: &str) -> Result<()> {
    ensure!(
        can_administer(),
        "`cocoon-net {command}` needs root (or CAP_NET_ADMIN and CAP_NET_RAW) to look at and change the host; run it with sudo"
    );
    Ok(())
}
