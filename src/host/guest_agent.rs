//! GKE's guest agent adds `local SUBNET dev NIC table local` for an alias range, which swallows the VMs' return
//! traffic. The route is removed, again at each boot (cron), and by the daemon whenever it comes back.

use std::path::{Path, PathBuf};

use crate::config::NodeConfig;

/// Mode of the cron file.
pub const CRON_MODE: u32 = 0o644;

/// Path of the cron file.
#[must_use]
pub fn cron_path() -> PathBuf {
    Path::new("/etc/cron.d/cocoon-net-fix-alias").to_owned()
}

/// The cron file: removes the route at boot, before the daemon runs.
#[must_use]
pub fn cron_line(config: &NodeConfig) -> String {
    let (subnet, nic) = (config.subnet, &config.primary_nic);
    format!("@reboot root ip route del local {subnet} dev {nic} table local 2>/dev/null || true\n")
}
