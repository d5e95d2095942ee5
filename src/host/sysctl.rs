//! Kernel parameters: read from /proc/sys, written by `sysctl(8)`, and the guard around bridge-netfilter.

use std::collections::BTreeMap;

use crate::command::{self, Command, CommandError};

/// Whether bridged IPv4 frames pass through iptables. While it is 0, no drop between VMs of one bridge applies.
pub const BRIDGE_CALLS_IPTABLES: &str = "net.bridge.bridge-nf-call-iptables";

/// The same for IPv6 and ip6tables.
pub const BRIDGE_CALLS_IP6TABLES: &str = "net.bridge.bridge-nf-call-ip6tables";

/// Whether the host forwards IPv4 packets.
pub const IP_FORWARD: &str = "net/ipv4/ip_forward";

/// A parameter and the value it must have.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Setting {
    /// The key. Slashes separate where the name of an interface is part of it, since that may hold dots.
    pub key: String,
    /// The value.
    pub value: String,
    /// Whether the host is not as wanted without it; otherwise a failure is a warning.
    pub required: bool,
}

/// Why a parameter does not have the value it must have.
#[derive(Debug, thiserror::Error)]
pub enum SysctlError {
    /// The read-back of a bridge-netfilter toggle says no.
    #[error(
        "cannot verify {key}: it {reading} after being set to 1. Drops between VMs on one bridge would not apply, so \
         nothing was changed. Load br_netfilter on the host (`modprobe br_netfilter`) and make sure that \
         /proc/sys/net/bridge is writable here, then try again{}", because(.tools)
    )]
    Guard {
        /// The key.
        key: &'static str,
        /// What it says instead.
        reading: String,
        /// What the tools that should have set it answered.
        tools: Vec<String>,
    },
    /// A required parameter could not be set.
    #[error(
        "cannot set {key} to {value}: it {reading}; set it on the host, or make /proc/sys writable here, then try \
         again{}", because(.tools)
    )]
    Refused {
        /// The key.
        key: String,
        /// The wanted value.
        value: String,
        /// What it says instead.
        reading: String,
        /// What `sysctl` answered.
        tools: Vec<String>,
    },
}

/// The value of a parameter, in either notation; `None` when it cannot be read.
#[must_use]
pub fn read(key: &str) -> Option<String> {
    let path = if key.contains('/') { key.to_owned() } else { key.replace('.', "/") };
    std::fs::read_to_string(format!("/proc/sys/{path}")).ok().map(|value| value.trim().to_owned())
}

/// The values of several parameters; those that cannot be read are left out.
#[must_use]
pub fn read_all<'a>(keys: impl IntoIterator<Item = &'a str>) -> BTreeMap<String, String> {
    keys.into_iter().filter_map(|key| Some((key.to_owned(), read(key)?))).collect()
}

/// Makes bridged frames pass through iptables, and believes only the read-back.
///
/// # Errors
/// [`SysctlError::Guard`] when a key does not verifiably read 1 afterwards.
pub async fn guard(keys: &[&'static str]) -> Result<(), SysctlError> {
    let mut tools = Vec::new();
    if keys.iter().any(|key| read(key).is_none()) {
        note(&mut tools, Command::new("modprobe").arg("br_netfilter").run().await);
    }
    let unset: Vec<_> = keys.iter().filter(|key| read(key).as_deref() != Some("1")).collect();
    if !unset.is_empty() {
        let settings = unset.iter().map(|key| format!("{key}=1"));
        note(&mut tools, Command::new("sysctl").arg("-w").args(settings).run().await);
    }
    for key in keys {
        if read(key).as_deref() != Some("1") {
            return Err(SysctlError::Guard { key, reading: reading(read(key)), tools });
        }
    }
    for tool in tools {
        tracing::debug!(answer = %tool, "a tool failed, but bridge-netfilter reads as it must");
    }
    Ok(())
}

/// Sets parameters with one `sysctl -w` and reads them back. Returns the keys that are not required and would not be set.
///
/// # Errors
/// [`SysctlError::Refused`] for the first required one that does not read as set; others are warned about.
pub async fn write(settings: &[Setting]) -> Result<Vec<String>, SysctlError> {
    let mut tools = Vec::new();
    let assignments = settings.iter().map(|setting| format!("{}={}", setting.key, setting.value));
    note(&mut tools, Command::new("sysctl").arg("-w").args(assignments).run().await);
    let mut given_up = Vec::new();
    for Setting { key, value, required } in settings {
        let now = read(key);
        if now.as_ref() == Some(value) {
            continue;
        }
        if *required {
            return Err(SysctlError::Refused { key: key.clone(), value: value.clone(), reading: reading(now), tools });
        }
        tracing::warn!(key, value, reading = %reading(now), "could not set a kernel parameter; going on without it");
        given_up.push(key.clone());
    }
    Ok(given_up)
}

fn note(tools: &mut Vec<String>, result: Result<command::Output, CommandError>) {
    if let Err(error) = result {
        tools.push(error.to_string());
    }
}

fn reading(value: Option<String>) -> String {
    value.map_or_else(|| "is missing".to_owned(), |value| format!("reads {value}"))
}

fn because(tools: &[String]) -> String {
    if tools.is_empty() { String::new() } else { format!(" ({})", tools.join("; ")) }
}
