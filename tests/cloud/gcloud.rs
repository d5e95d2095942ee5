//! `gcloud`, as far as cocoon-net uses it.
//!
//! Behaviour follows the reference of `gcloud compute networks subnets describe|update`, `gcloud compute instances
//! describe` and `gcloud compute instances network-interfaces update`
//! (<https://cloud.google.com/sdk/gcloud/reference/compute>) and the resources `subnetworks` and `instances` of the
//! Compute Engine API, version 1 (<https://cloud.google.com/compute/docs/reference/rest/v1>): data on stdout only with
//! `--format`, `Updated [URL].` and warnings on stderr, errors as `ERROR: (gcloud.COMMAND) ...` on stderr with status 1.

use ipnet::Ipv4Net;
use serde_json::{Value, json};

use super::{Answer, flag};

pub const PROJECT: &str = "acme-vms";
pub const ZONE: &str = "asia-southeast1-b";
pub const REGION: &str = "asia-southeast1";
pub const INSTANCE: &str = "cocoon-node-1";
pub const SUBNETWORK: &str = "nodes";

/// An alias range: range name (empty for the primary range) and CIDR.
pub type Alias = (&'static str, &'static str);

/// Aliases of others, as on the node that the Go program's state was recorded on.
pub const OTHERS: [Alias; 2] = [("", "10.128.7.0/28"), ("gke-pods", "10.8.1.0/24")];

/// The VMs' subnet as an alias.
pub const OURS: &str = "cocoon-pods:172.20.100.0/24";

/// [`OTHERS`] and [`OURS`], as nic0 has them after `init`.
pub fn with_ours() -> Vec<String> {
    [without_ours(), vec![OURS.to_owned()]].concat()
}

/// [`OTHERS`], as nic0 has them before `init` and after `teardown`.
pub fn without_ours() -> Vec<String> {
    vec!["10.128.7.0/28".to_owned(), "gke-pods:10.8.1.0/24".to_owned()]
}

/// One project with one VPC subnet and one instance in it.
#[derive(Debug)]
pub struct Gcloud {
    /// Secondary ranges of the subnet: name and CIDR.
    pub ranges: Vec<(String, String)>,
    /// Aliases of nic0: range name and CIDR.
    aliases: Vec<(String, String)>,
    /// Aliases that will be seen only after this many looks.
    coming: Option<(usize, Vec<(String, String)>)>,
    /// Whether the instance has a nic0.
    pub has_nic: bool,
}

impl Default for Gcloud {
    fn default() -> Self {
        Self {
            ranges: vec![("gke-pods".to_owned(), "10.8.0.0/14".to_owned())],
            aliases: Vec::new(),
            coming: None,
            has_nic: true,
        }
    }
}

impl Gcloud {
    /// Sets the aliases of nic0.
    pub fn set_aliases(&mut self, aliases: &[Alias]) {
        self.aliases = aliases.iter().map(|(range, cidr)| ((*range).to_owned(), (*cidr).to_owned())).collect();
    }

    /// The aliases of nic0 as they really are, seen or not: `RANGE:CIDR`.
    pub fn aliases(&self) -> Vec<String> {
        let now = self.coming.as_ref().map_or(&self.aliases, |(_, coming)| coming);
        now.iter().map(|(range, cidr)| format!("{range}:{cidr}").trim_start_matches(':').to_owned()).collect()
    }

    /// Adds a secondary range.
    pub fn add_range(&mut self, name: &str, cidr: &str) {
        self.ranges.push((name.to_owned(), cidr.to_owned()));
    }

    pub(super) fn call(&mut self, args: &[String], lag: usize) -> Answer {
        let words: Vec<&str> = args.iter().map(String::as_str).collect();
        if flag(args, "--project") != Some(PROJECT) {
            return error(args, "The required property [project] is not currently set, or not accessible");
        }
        match words.as_slice() {
            ["compute", "networks", "subnets", "describe", SUBNETWORK, ..] if in_region(args) => self.subnet(args),
            ["compute", "networks", "subnets", "update", SUBNETWORK, ..] if in_region(args) => self.add(args),
            ["compute", "instances", "describe", INSTANCE, ..] if in_zone(args) => self.instance(args),
            ["compute", "instances", "network-interfaces", "update", INSTANCE, ..] if in_zone(args) => {
                self.replace(args, lag)
            }
            _ => error(args, "Could not fetch resource: - The resource was not found"),
        }
    }

    fn subnet(&self, args: &[String]) -> Answer {
        let ranges: Vec<Value> =
            self.ranges.iter().map(|(name, cidr)| json!({"rangeName": name, "ipCidrRange": cidr})).collect();
        let mut subnet = json!({
            "kind": "compute#subnetwork", "name": SUBNETWORK, "ipCidrRange": "10.128.0.0/20", "privateIpGoogleAccess": true,
            "region": format!("https://www.googleapis.com/compute/v1/projects/{PROJECT}/regions/{REGION}"),
        });
        // The API leaves empty lists out.
        if !ranges.is_empty() {
            subnet["secondaryIpRanges"] = ranges.into();
        }
        data(args, &subnet)
    }

    /// "Adds secondary IP ranges"; a name that is taken, or a CIDR that overlaps, is refused.
    fn add(&mut self, args: &[String]) -> Answer {
        let added = args.iter().find_map(|arg| arg.strip_prefix("--add-secondary-ranges=")?.split_once('='));
        let Some((name, cidr)) = added else { return error(args, "argument --add-secondary-ranges: Bad syntax") };
        let Ok(net) = cidr.parse::<Ipv4Net>() else { return error(args, "Invalid value for field 'ipCidrRange'") };
        let overlaps = |range: &(String, String)| {
            range.1.parse::<Ipv4Net>().is_ok_and(|old| old.contains(&net) || net.contains(&old))
        };
        if self.ranges.iter().any(|range| range.0 == name || overlaps(range)) {
            return error(args, "Invalid IPCidrRange: it conflicts with an existing secondary range");
        }
        self.add_range(name, cidr);
        success(args)
    }

    fn instance(&mut self, args: &[String]) -> Answer {
        match self.coming.take() {
            Some((0, aliases)) => self.aliases = aliases,
            Some((looks, aliases)) => self.coming = Some((looks - 1, aliases)),
            None => {}
        }
        let aliases: Vec<Value> = self
            .aliases
            .iter()
            .map(|(range, cidr)| match range.as_str() {
                "" => json!({"ipCidrRange": cidr}),
                range => json!({"ipCidrRange": cidr, "subnetworkRangeName": range}),
            })
            .collect();
        let mut nic = json!({"kind": "compute#networkInterface", "name": "nic0", "networkIP": "10.128.0.2"});
        if !aliases.is_empty() {
            nic["aliasIpRanges"] = aliases.into();
        }
        let nics = if self.has_nic { vec![nic, json!({"name": "nic1"})] } else { Vec::new() };
        data(
            args,
            &json!({"kind": "compute#instance", "name": INSTANCE, "status": "RUNNING", "networkInterfaces": nics}),
        )
    }

    /// `--aliases` replaces the whole list, entries separated by semicolons, none with an empty value. A range must be
    /// one of the subnet, and cover the alias.
    fn replace(&mut self, args: &[String], lag: usize) -> Answer {
        let (Some("nic0"), Some(list)) = (flag(args, "--network-interface"), flag(args, "--aliases")) else {
            return error(args, "argument --aliases: expected one argument");
        };
        let mut wanted = Vec::new();
        for entry in list.split(';').filter(|entry| !entry.is_empty()) {
            let (range, cidr) = entry.split_once(':').unwrap_or(("", entry));
            let of = match range {
                "" => Some("10.128.0.0/20"),
                range => self.ranges.iter().find(|(name, _)| name == range).map(|(_, cidr)| cidr.as_str()),
            };
            let inside = |of: &str| of.parse::<Ipv4Net>().ok()?.contains(&cidr.parse::<Ipv4Net>().ok()?).then_some(());
            if of.and_then(inside).is_none() {
                return error(
                    args,
                    "Invalid value for field 'resource.aliasIpRanges[0].ipCidrRange': not in the range",
                );
            }
            wanted.push((range.to_owned(), cidr.to_owned()));
        }
        if lag == 0 {
            (self.aliases, self.coming) = (wanted, None);
        } else {
            self.coming = Some((lag, wanted));
        }
        success(args)
    }
}

fn in_region(args: &[String]) -> bool {
    flag(args, "--region") == Some(REGION)
}

fn in_zone(args: &[String]) -> bool {
    flag(args, "--zone") == Some(ZONE)
}

/// Data goes to stdout, in the format asked for. Beside it, what a CLI of some age always has to say.
fn data(args: &[String], value: &Value) -> Answer {
    if flag(args, "--format") != Some("json") {
        return Answer { stdout: "kind: not JSON\n".to_owned(), ..Answer::default() };
    }
    let stderr = "WARNING: Python 3.7 will be deprecated. Updates are available for some Google Cloud CLI components.";
    Answer { code: 0, stderr: stderr.to_owned(), stdout: format!("{value:#}\n") }
}

pub(super) fn success(args: &[String]) -> Answer {
    if args.iter().any(|arg| arg == "describe") {
        return data(args, &json!({"networkInterfaces": [{"name": "nic0"}]}));
    }
    Answer {
        stderr: "Updated [https://www.googleapis.com/compute/v1/projects/acme-vms].".to_owned(),
        ..Answer::default()
    }
}

pub(super) fn refusal(args: &[String]) -> Answer {
    error(args, "Required 'compute.instances.updateNetworkInterface' permission for 'projects/acme-vms'")
}

fn error(args: &[String], text: &str) -> Answer {
    let command: Vec<&str> = args.iter().map(String::as_str).take_while(|arg| !arg.starts_with('-')).collect();
    let command = command[..command.len().saturating_sub(1)].join(".");
    Answer { code: 1, stderr: format!("ERROR: (gcloud.{command}) {text}"), stdout: String::new() }
}

pub(super) fn metadata(path: &str) -> Option<String> {
    let value = match path.strip_prefix("/computeMetadata/v1")? {
        "/instance/name" => INSTANCE.to_owned(),
        "/instance/zone" => format!("projects/123456789012/zones/{ZONE}"),
        "/project/project-id" => PROJECT.to_owned(),
        "/instance/network-interfaces/0/subnetwork" => {
            format!("projects/{PROJECT}/regions/{REGION}/subnetworks/{SUBNETWORK}")
        }
        _ => return None,
    };
    Some(value)
}
