//! The CNI configuration that plugs VMs into the bridge, and the plugin that reads it.

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::{Value, json};

use crate::command::Command;

/// Mode of the configuration file.
pub const MODE: u32 = 0o644;

/// Where CNI plugins are installed, in the order we look.
const PLUGIN_FOLDERS: [&str; 3] = ["/opt/cni/bin", "/usr/lib/cni", "/usr/libexec/cni"];

/// The first version of the plugins whose `bridge` knows `portIsolation`.
const PORT_ISOLATION_SINCE: (u32, u32) = (1, 7);

/// The isolation keys of a configuration.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Isolation {
    /// `portIsolation`: the plugin isolates the port of each VM.
    pub ports: bool,
    /// `macspoofchk`: a VM may send only from the address it was given. Needs `nft` on the host.
    pub mac_spoof_check: bool,
}

impl Isolation {
    /// Reads the keys out of an existing configuration of ours; of anything else they cannot be read.
    #[must_use]
    pub fn of(conflist: &[u8]) -> Option<Self> {
        let config: Value = serde_json::from_slice(conflist).ok()?;
        if config["name"] != "cocoon-dhcp" {
            return None;
        }
        let plugins = config["plugins"].as_array().map_or(&[][..], Vec::as_slice);
        let any = |key: &str| plugins.iter().any(|plugin| plugin[key] == true);
        Some(Self { ports: any("portIsolation"), mac_spoof_check: any("macspoofchk") })
    }

    /// What a configuration must say when these keys are wanted and those are there: a node does not lose isolation
    /// silently, so what is there stays.
    #[must_use]
    pub fn or(self, other: Self) -> Self {
        Self { ports: self.ports || other.ports, mac_spoof_check: self.mac_spoof_check || other.mac_spoof_check }
    }
}

/// The configuration: CNI 1.0.0, one `bridge` plugin, keys in the order the Go program writes them.
#[must_use]
pub fn conflist(bridge: &str, isolation: Isolation) -> Value {
    let mut plugin = serde_json::Map::new();
    plugin.insert("bridge".into(), bridge.into());
    plugin.insert("ipMasq".into(), false.into());
    plugin.insert("ipam".into(), json!({}));
    plugin.insert("isGateway".into(), false.into());
    if isolation.mac_spoof_check {
        plugin.insert("macspoofchk".into(), true.into());
    }
    if isolation.ports {
        plugin.insert("portIsolation".into(), true.into());
    }
    plugin.insert("type".into(), "bridge".into());
    json!({"cniVersion": "1.0.0", "name": "cocoon-dhcp", "plugins": [plugin]})
}

/// The configuration as it is written.
#[must_use]
pub fn to_text(conflist: &Value) -> String {
    format!("{}\n", serde_json::to_string_pretty(conflist).unwrap_or_default())
}

/// Where the `bridge` plugin is.
#[must_use]
pub fn bridge_plugin() -> Option<PathBuf> {
    PLUGIN_FOLDERS.iter().map(|folder| Path::new(folder).join("bridge")).find(|path| path.is_file())
}

/// Whether the `bridge` plugin at `path` knows `portIsolation`, and the version it states. `None` when it does not say:
/// distributions build it without a version.
pub async fn knows_port_isolation(path: &Path) -> (Option<bool>, String) {
    let run = Command::new(path.to_string_lossy()).timeout(Duration::from_secs(3)).output().await;
    let said = run.map(|output| format!("{}\n{}", output.text(), output.stderr)).unwrap_or_default();
    let version =
        said.lines().find_map(|line| line.trim().strip_prefix("CNI bridge plugin ")).unwrap_or("version unknown");
    (parse_version(version).map(|version| version >= PORT_ISOLATION_SINCE), version.to_owned())
}

fn parse_version(text: &str) -> Option<(u32, u32)> {
    let mut parts = text.trim().strip_prefix('v')?.split('.');
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn isolation_keys_are_there_only_when_wanted() {
        let plain = conflist("cni0", Isolation::default());
        assert!(plain["plugins"][0].get("portIsolation").is_none());
        let both = conflist("cni0", Isolation { ports: true, mac_spoof_check: true });
        assert_eq!(Isolation::of(to_text(&both).as_bytes()), Some(Isolation { ports: true, mac_spoof_check: true }));
    }

    #[test]
    fn keys_of_a_foreign_configuration_do_not_count() {
        assert_eq!(Isolation::of(br#"{"name":"x","plugins":[{"portIsolation":true}]}"#), None);
        assert_eq!(Isolation::of(b"junk"), None);
    }

    #[test]
    fn versions_are_read_as_the_plugin_states_them() {
        assert_eq!(parse_version("v1.6.2"), Some((1, 6)));
        assert_eq!(parse_version("version unknown"), None);
    }
}
