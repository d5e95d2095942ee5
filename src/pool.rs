//! `pool.json`, the state that `init` and `adopt` leave to the daemon and to `teardown`.
//!
//! The keys, their order and their omission when empty are those of the Go program, so that either program reads what
//! the other wrote. Keys we do not know survive a rewrite. Every value that is read passes through the types of
//! [`crate::config`]; one that does not stops the command, naming file and key.

use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use jiff::Timestamp;
use serde_json::{Map, Value};

use crate::config::{self, ConfigError, Drops, InterfaceName, Mtu, NodeConfig, Platform, Subnet};
use crate::files::{self, FileError};

/// Mode of `pool.json`.
const MODE: u32 = 0o644;

/// Everything `pool.json` holds, validated.
#[derive(Debug, Clone, PartialEq)]
pub struct Pool {
    /// What the node is asked to be.
    pub config: NodeConfig,
    /// The addresses to lease; empty in the seed state of an `init` that has not finished.
    pub ips: Vec<Ipv4Addr>,
    /// Secondary ENIs that were made or taken for this node (Volcengine).
    pub eni_ids: Vec<String>,
    /// What was being claimed in the cloud when this was written, and may be seen there only later: the name of an ENI
    /// whose id is not known yet (Volcengine), an alias (GKE).
    pub pending_claim: Option<String>,
    /// The VPC subnet that the ENIs are in (Volcengine).
    pub subnet_id: Option<String>,
    /// The secondary range that the alias is cut from (GKE).
    pub alias_range_name: Option<String>,
    /// When this was written.
    pub updated_at: Timestamp,
    /// Keys that other versions wrote.
    pub unknown: Map<String, Value>,
}

/// Why `pool.json` could not be read.
#[derive(Debug, thiserror::Error)]
pub enum PoolError {
    /// There is none.
    #[error("there is no {}; run `cocoon-net init` or `cocoon-net adopt` first", .0.display())]
    Missing(PathBuf),
    /// It could not be read.
    #[error(transparent)]
    File(#[from] FileError),
    /// It is no JSON object.
    #[error(
        "{} is not a JSON object; restore it from a backup, or move it away and run `cocoon-net init` again",
        .path.display()
    )]
    Json {
        /// The file.
        path: PathBuf,
        /// Where it breaks.
        source: serde_json::Error,
    },
    /// A key is missing or of the wrong type.
    #[error("{}: key `{key}` {problem}; correct the file, or move it away and run `cocoon-net init` again", .path.display())]
    Shape {
        /// The file.
        path: PathBuf,
        /// The key.
        key: &'static str,
        /// What is wrong with it.
        problem: &'static str,
    },
    /// The value of a key is not valid.
    #[error("{}: the value of key `{key}` is not valid; correct the file, or move it away and run `cocoon-net init` again", .path.display())]
    Value {
        /// The file.
        path: PathBuf,
        /// The key.
        key: &'static str,
        /// Why the value was refused.
        source: ConfigError,
    },
}

impl PoolError {
    /// Whether the file or its folder may not be read by us.
    #[must_use]
    pub fn is_permission_denied(&self) -> bool {
        matches!(self, Self::File(FileError::Io { source, .. }) if source.kind() == std::io::ErrorKind::PermissionDenied)
    }
}

/// Path of `pool.json` in a state folder.
#[must_use]
pub fn path_in(state_dir: &Path) -> PathBuf {
    state_dir.join("pool.json")
}

impl Pool {
    /// A pool for `config` with these addresses and nothing of a cloud.
    #[must_use]
    pub fn new(config: NodeConfig, ips: Vec<Ipv4Addr>) -> Self {
        Self {
            config,
            ips,
            eni_ids: Vec::new(),
            pending_claim: None,
            subnet_id: None,
            alias_range_name: None,
            updated_at: Timestamp::now(),
            unknown: Map::new(),
        }
    }

    /// A pool for `config` that carries on from an earlier state: its addresses, what it holds in the cloud, and the
    /// keys of other versions.
    #[must_use]
    pub fn following(config: NodeConfig, earlier: Option<&Self>) -> Self {
        match earlier {
            Some(earlier) => Self { config, ..earlier.clone() },
            None => Self::new(config, Vec::new()),
        }
    }

    /// Whether it holds anything in a cloud that only it knows of.
    #[must_use]
    pub fn has_claims(&self) -> bool {
        !self.eni_ids.is_empty() || self.alias_range_name.is_some() || self.pending_claim.is_some()
    }

    /// The earlier state with what this one has claimed in the cloud so far: addresses and drops stay the earlier ones
    /// until the new ones are in hand.
    #[must_use]
    pub fn claims_over(&self, earlier: &Self) -> Self {
        let config = NodeConfig { platform: self.config.platform, ..earlier.config.clone() };
        Self { config, ips: earlier.ips.clone(), ..self.clone() }
    }

    /// Reads `pool.json` from a state folder; `None` when there is none.
    ///
    /// # Errors
    /// [`PoolError`], naming the file and, where it is one, the key.
    pub fn load_optional(state_dir: &Path) -> Result<Option<Self>, PoolError> {
        let path = path_in(state_dir);
        match files::read_optional(&path)? {
            Some(bytes) => Self::parse(&path, &bytes).map(Some),
            None => Ok(None),
        }
    }

    /// Reads `pool.json` from a state folder.
    ///
    /// # Errors
    /// [`PoolError::Missing`] when there is none; otherwise as for [`Pool::load_optional`].
    pub fn load(state_dir: &Path) -> Result<Self, PoolError> {
        Self::load_optional(state_dir)?.ok_or_else(|| PoolError::Missing(path_in(state_dir)))
    }

    /// Writes `pool.json` durably into a state folder, stamped with the present time.
    ///
    /// # Errors
    /// [`FileError`]; the old file is then still in place.
    pub fn save(&mut self, state_dir: &Path) -> Result<(), FileError> {
        self.updated_at = Timestamp::now();
        files::write_durably(&path_in(state_dir), self.to_json().as_bytes(), MODE)
    }

    /// The contents of `pool.json`: 2-space indent, no newline at the end, as the Go program writes it.
    #[must_use]
    pub fn to_json(&self) -> String {
        let config = &self.config;
        let mut map = Map::new();
        let mut put = |key: &str, value: Value| {
            let empty = match &value {
                Value::Null | Value::Bool(false) => true,
                Value::String(text) => text.is_empty(),
                Value::Array(items) => items.is_empty() && key != "ips",
                _ => false,
            };
            if !empty {
                map.insert(key.to_owned(), value);
            }
        };
        put("platform", config.platform.name().into());
        put("nodeName", config.node_name.as_str().into());
        put("subnet", text(&config.subnet));
        put("gateway", text(&config.gateway));
        put("primaryNIC", text(&config.primary_nic));
        put("secondaryNICs", texts(&config.secondary_nics));
        put("ips", texts(&self.ips));
        put("eniIDs", self.eni_ids.clone().into());
        put("subnetID", self.subnet_id.clone().into());
        put("aliasRangeName", self.alias_range_name.clone().into());
        put("dnsServers", texts(&config.dns));
        put("dropInternalAccess", config.drops.internal.into());
        put("dropCIDRs", texts(&config.drops.cidrs));
        put("dropMetadataAccess", config.drops.metadata.into());
        put("dropHostAccess", config.drops.host.into());
        put("mtu", config.mtu.map(Mtu::bytes).into());
        put("pendingClaim", self.pending_claim.clone().into());
        if !config::is_default_cni_conf_dir(&config.cni_conf_dir) {
            put("cniConfDir", config.cni_conf_dir.to_string_lossy().into());
        }
        map.extend(self.unknown.clone());
        map.insert("updatedAt".to_owned(), text(&self.updated_at));
        serde_json::to_string_pretty(&map).unwrap_or_default()
    }

    fn parse(path: &Path, bytes: &[u8]) -> Result<Self, PoolError> {
        let map = serde_json::from_slice(bytes).map_err(|source| PoolError::Json { path: path.to_owned(), source })?;
        let mut keys = Keys { path, map };

        let platform: Platform = keys.required("platform")?;
        let node_name = keys.required("nodeName")?;
        let subnet: Subnet = keys.required("subnet")?;
        let gateway = keys.optional_with("gateway", config::parse_address)?.unwrap_or_else(|| subnet.first_host());
        config::check_gateway(subnet, gateway).map_err(keys.refuse("gateway"))?;
        let primary_nic: InterfaceName = keys.optional("primaryNIC")?.unwrap_or_else(|| platform.usual_primary_nic());
        let mut secondary_nics: Vec<InterfaceName> = keys.list("secondaryNICs", InterfaceName::from_str)?;
        if secondary_nics.is_empty() {
            secondary_nics = platform.secondary_nics();
        }
        let mut ips = keys.list("ips", config::parse_address)?;
        if let Some(bad) = ips.iter().find(|ip| !subnet.is_host(**ip) || **ip == gateway) {
            return Err(keys.refuse("ips")(ConfigError::PoolAddress { address: *bad, subnet }));
        }
        ips.sort_unstable();
        ips.dedup();
        let eni_ids = keys.strings("eniIDs")?;
        let pending_claim = keys.string("pendingClaim")?;
        let subnet_id = keys.string("subnetID")?;
        let alias_range_name = keys.string("aliasRangeName")?;
        let mut dns = keys.list("dnsServers", config::parse_address)?;
        if dns.is_empty() {
            tracing::warn!(file = %path.display(), "no `dnsServers`: VMs are given 8.8.8.8 and 1.1.1.1");
            dns = config::DEFAULT_DNS.to_vec();
        }
        let drops = Drops {
            internal: keys.flag("dropInternalAccess")?,
            cidrs: keys.list("dropCIDRs", FromStr::from_str)?.into_iter().collect(),
            metadata: keys.flag("dropMetadataAccess")?,
            host: keys.flag("dropHostAccess")?,
        };
        let mtu = keys.number("mtu")?.map(Mtu::try_from).transpose().map_err(keys.refuse("mtu"))?;
        let cni_conf_dir = keys.string("cniConfDir")?.map_or(config::DEFAULT_CNI_CONF_DIR.into(), PathBuf::from);
        // A time that does not parse is no reason to stop a node: it is shown, and nothing depends on it.
        let updated_at = keys.string("updatedAt")?.and_then(|time| time.parse().ok()).unwrap_or(Timestamp::UNIX_EPOCH);

        let config = NodeConfig {
            platform,
            node_name,
            subnet,
            gateway,
            primary_nic,
            secondary_nics,
            dns,
            drops,
            mtu,
            cni_conf_dir,
        };
        let key = if config.primary_nic.as_str() == config::BRIDGE { "primaryNIC" } else { "secondaryNICs" };
        let config = config.checked().map_err(keys.refuse(key))?;
        Ok(Self { config, ips, eni_ids, pending_claim, subnet_id, alias_range_name, updated_at, unknown: keys.map })
    }
}

/// The keys not read yet; what is left at the end are those we do not know. `null` counts as missing.
struct Keys<'a> {
    path: &'a Path,
    map: Map<String, Value>,
}

impl Keys<'_> {
    fn take(&mut self, key: &str) -> Option<Value> {
        self.map.shift_remove(key).filter(|value| !value.is_null())
    }

    fn shape(&self, key: &'static str, problem: &'static str) -> PoolError {
        PoolError::Shape { path: self.path.to_owned(), key, problem }
    }

    fn refuse(&self, key: &'static str) -> impl Fn(ConfigError) -> PoolError + use<> {
        let path = self.path.to_owned();
        move |source| PoolError::Value { path: path.clone(), key, source }
    }

    fn string(&mut self, key: &'static str) -> Result<Option<String>, PoolError> {
        match self.take(key) {
            Some(Value::String(text)) => Ok((!text.is_empty()).then_some(text)),
            Some(_) => Err(self.shape(key, "must be a string")),
            None => Ok(None),
        }
    }

    fn strings(&mut self, key: &'static str) -> Result<Vec<String>, PoolError> {
        let Some(value) = self.take(key) else { return Ok(Vec::new()) };
        serde_json::from_value(value).map_err(|_| self.shape(key, "must be a list of strings"))
    }

    fn flag(&mut self, key: &'static str) -> Result<bool, PoolError> {
        match self.take(key) {
            Some(Value::Bool(flag)) => Ok(flag),
            Some(_) => Err(self.shape(key, "must be true or false")),
            None => Ok(false),
        }
    }

    fn number(&mut self, key: &'static str) -> Result<Option<u64>, PoolError> {
        match self.take(key) {
            Some(value) => value.as_u64().map(Some).ok_or_else(|| self.shape(key, "must be a whole number")),
            None => Ok(None),
        }
    }

    fn optional_with<T>(
        &mut self,
        key: &'static str,
        parse: impl Fn(&str) -> Result<T, ConfigError>,
    ) -> Result<Option<T>, PoolError> {
        self.string(key)?.map(|text| parse(&text)).transpose().map_err(self.refuse(key))
    }

    fn optional<T: FromStr<Err = ConfigError>>(&mut self, key: &'static str) -> Result<Option<T>, PoolError> {
        self.optional_with(key, T::from_str)
    }

    fn required<T: FromStr<Err = ConfigError>>(&mut self, key: &'static str) -> Result<T, PoolError> {
        self.optional(key)?.ok_or_else(|| self.shape(key, "is missing"))
    }

    fn list<T>(
        &mut self,
        key: &'static str,
        parse: impl Fn(&str) -> Result<T, ConfigError>,
    ) -> Result<Vec<T>, PoolError> {
        self.strings(key)?.iter().map(|text| parse(text)).collect::<Result<_, _>>().map_err(self.refuse(key))
    }
}

fn text(value: &impl ToString) -> Value {
    Value::String(value.to_string())
}

fn texts<'a, T: ToString + 'a>(values: impl IntoIterator<Item = &'a T>) -> Value {
    values.into_iter().map(text).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(json: &str) -> Result<Pool, PoolError> {
        Pool::parse(Path::new("/s/pool.json"), json.as_bytes())
    }

    const SMALL: &str = r#"{"platform":"gke","nodeName":"n","subnet":"10.0.0.0/24","ips":null}"#;

    #[test]
    fn the_seed_state_of_the_go_program_loads_with_defaults() {
        let pool = parse(SMALL).unwrap();
        assert!(pool.ips.is_empty());
        assert_eq!(pool.config.gateway, Ipv4Addr::new(10, 0, 0, 1));
        assert_eq!(pool.config.primary_nic.as_str(), "ens4");
        assert_eq!(pool.config.dns, config::DEFAULT_DNS);
        assert_eq!(pool.config.drops, Drops::default());
    }

    #[test]
    fn what_is_written_reads_back_and_unknown_keys_survive() {
        let mut pool =
            parse(&SMALL.replace("\"ips\":null", r#""ips":["10.0.0.9","10.0.0.10"],"later":{"a":[1]}"#)).unwrap();
        pool.config.drops =
            Drops { internal: true, cidrs: ["10.1.2.3/8".parse().unwrap()].into(), metadata: true, host: true };
        pool.config.mtu = Some("1460".parse().unwrap());
        pool.pending_claim = Some("n-eni-3".to_owned());
        pool.config.cni_conf_dir = "/tmp/cni".into();
        let again = parse(&pool.to_json()).unwrap();
        assert_eq!(again, pool);
        assert_eq!(again.unknown["later"]["a"][0], 1);
    }

    #[test]
    fn a_bad_value_names_file_and_key() {
        for (key, value) in [
            ("subnet", r#""10.0.0.0/33""#),
            ("gateway", r#""10.0.1.1""#),
            ("ips", r#"["10.0.0.2","10.0.0.255"]"#),
            ("ips", r#"["10.0.0.1"]"#),
            ("ips", r#""10.0.0.2""#),
            ("dropCIDRs", r#"["2001:db8::/32"]"#),
            ("dropInternalAccess", r#""yes""#),
            ("dnsServers", r#"["dns.google"]"#),
            ("primaryNIC", r#""-i""#),
            ("primaryNIC", r#""cni0""#),
            ("mtu", "12"),
            ("mtu", "-1"),
            ("platform", r#""aws""#),
        ] {
            let mut map: Map<String, Value> = serde_json::from_str(SMALL).unwrap();
            map.insert(key.to_owned(), serde_json::from_str(value).unwrap());
            let error = parse(&Value::Object(map).to_string()).unwrap_err().to_string();
            assert!(error.contains("/s/pool.json") && error.contains(&format!("`{key}`")), "{error}");
        }
    }

    #[test]
    fn junk_is_an_error_and_not_an_empty_state() {
        for junk in ["", "{", "[]", "null", "{\"platform\":"] {
            assert!(matches!(parse(junk), Err(PoolError::Json { .. })), "{junk}");
        }
    }
}
