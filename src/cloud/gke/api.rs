//! What is said to `gcloud` and what it answers: arguments and JSON, nothing that acts.
//!
//! Flags: <https://cloud.google.com/sdk/gcloud/reference/compute/instances/network-interfaces/update> and
//! <https://cloud.google.com/sdk/gcloud/reference/compute/networks/subnets/update>. Shapes: `instances.get` and
//! `subnetworks.get` of the Compute Engine API, version 1.

use ipnet::Ipv4Net;
use serde::Deserialize;

use crate::cloud::vendor::{self, Args};
use crate::config::Subnet;

/// The secondary range that aliases are cut from, one for all nodes of a VPC subnet.
pub const RANGE: &str = "cocoon-pods";

/// The interface that carries the alias.
pub const NIC: &str = "nic0";

/// Where this instance is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// Name of the instance.
    pub instance: String,
    /// Its zone, such as `asia-southeast1-b`.
    pub zone: String,
    /// Its project's id.
    pub project: String,
    /// Name of the VPC subnet that `nic0` is in.
    pub subnetwork: String,
}

impl Place {
    /// The region of the zone.
    #[must_use]
    pub fn region(&self) -> &str {
        self.zone.rsplit_once('-').map_or(self.zone.as_str(), |(region, _)| region)
    }
}

/// `compute networks subnets describe`.
#[must_use]
pub fn describe_subnet(place: &Place) -> Args {
    vendor::args([
        "compute",
        "networks",
        "subnets",
        "describe",
        &place.subnetwork,
        "--project",
        &place.project,
        "--region",
        place.region(),
        "--format",
        "json",
    ])
}

/// `compute networks subnets update`: adds the range, with this CIDR.
#[must_use]
pub fn add_range(place: &Place, subnet: Subnet) -> Args {
    vendor::args([
        "compute",
        "networks",
        "subnets",
        "update",
        &place.subnetwork,
        "--project",
        &place.project,
        "--region",
        place.region(),
        &format!("--add-secondary-ranges={RANGE}={subnet}"),
    ])
}

/// `compute instances describe`.
#[must_use]
pub fn describe_instance(place: &Place) -> Args {
    vendor::args([
        "compute",
        "instances",
        "describe",
        &place.instance,
        "--project",
        &place.project,
        "--zone",
        &place.zone,
        "--format",
        "json",
    ])
}

/// `compute instances network-interfaces update`: replaces all aliases of `nic0` by these; none of them removes all.
#[must_use]
pub fn set_aliases(place: &Place, aliases: &[Alias]) -> Args {
    let list: Vec<String> = aliases.iter().map(Alias::to_string).collect();
    vendor::args([
        "compute",
        "instances",
        "network-interfaces",
        "update",
        &place.instance,
        "--project",
        &place.project,
        "--zone",
        &place.zone,
        "--network-interface",
        NIC,
        "--aliases",
        &list.join(";"),
    ])
}

/// A VPC subnet, of which we need the secondary ranges.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct VpcSubnet {
    #[serde(default)]
    secondary_ip_ranges: Vec<SecondaryRange>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct SecondaryRange {
    range_name: String,
    ip_cidr_range: String,
}

impl VpcSubnet {
    /// The CIDR of [`RANGE`], as the cloud writes it.
    #[must_use]
    pub fn range(&self) -> Option<&str> {
        self.secondary_ip_ranges
            .iter()
            .find(|range| range.range_name == RANGE)
            .map(|range| range.ip_cidr_range.as_str())
    }
}

/// Whether a range as the cloud writes it covers the VMs' subnet.
#[must_use]
pub fn covers(range: &str, subnet: Subnet) -> bool {
    range.parse::<Ipv4Net>().is_ok_and(|range| range.contains(&subnet.net()))
}

/// An instance, of which we need the aliases of `nic0`.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Instance {
    #[serde(default)]
    network_interfaces: Vec<Interface>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Interface {
    name: String,
    #[serde(default)]
    alias_ip_ranges: Vec<Alias>,
}

impl Instance {
    /// The aliases of `nic0`; `None` when the instance has no such interface.
    #[must_use]
    pub fn aliases(self) -> Option<Vec<Alias>> {
        self.network_interfaces.into_iter().find(|interface| interface.name == NIC).map(|nic| nic.alias_ip_ranges)
    }
}

/// One alias range of an interface; without a range name it is cut from the subnet's primary range.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Alias {
    #[serde(default)]
    subnetwork_range_name: String,
    ip_cidr_range: String,
}

impl Alias {
    /// The alias of a node with this subnet.
    #[must_use]
    pub fn of(range: &str, subnet: Subnet) -> Self {
        Self { subnetwork_range_name: range.to_owned(), ip_cidr_range: subnet.to_string() }
    }

    /// Reads an alias back from how it is displayed.
    #[must_use]
    pub fn parse(text: &str) -> Self {
        let (range, cidr) = text.rsplit_once(':').unwrap_or(("", text));
        Self { subnetwork_range_name: range.to_owned(), ip_cidr_range: cidr.to_owned() }
    }

    /// Whether both mean the same range. The cloud may write a CIDR in another way than we do.
    #[must_use]
    pub fn is(&self, other: &Self) -> bool {
        let net = |alias: &Self| alias.ip_cidr_range.parse::<Ipv4Net>().map(|net| net.trunc());
        self.subnetwork_range_name == other.subnetwork_range_name
            && match (net(self), net(other)) {
                (Ok(one), Ok(two)) => one == two,
                _ => self.ip_cidr_range == other.ip_cidr_range,
            }
    }
}

/// `RANGE:CIDR`, or `CIDR` alone, as `--aliases` takes it.
impl std::fmt::Display for Alias {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if !self.subnetwork_range_name.is_empty() {
            write!(f, "{}:", self.subnetwork_range_name)?;
        }
        f.write_str(&self.ip_cidr_range)
    }
}

/// The aliases to set so that ours is among them: others' stay, an older one of our range goes. `None` when ours is
/// there already.
#[must_use]
pub fn with_ours(aliases: &[Alias], ours: &Alias) -> Option<Vec<Alias>> {
    if aliases.iter().any(|alias| alias.is(ours)) {
        return None;
    }
    let others = aliases.iter().filter(|alias| alias.subnetwork_range_name != ours.subnetwork_range_name);
    Some(others.chain([ours]).cloned().collect())
}

/// The aliases to set so that none of ours is among them. `None` when there is none.
#[must_use]
pub fn without_ours(aliases: &[Alias], ours: &[Alias]) -> Option<Vec<Alias>> {
    let is_ours = |alias: &&Alias| ours.iter().any(|our| our.is(alias));
    let rest: Vec<Alias> = aliases.iter().filter(|alias| !is_ours(alias)).cloned().collect();
    (rest.len() < aliases.len()).then_some(rest)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What `gcloud compute instances describe --format json` prints, cut to a few fields that we do not use.
    const INSTANCE: &str = r#"{
      "kind": "compute#instance", "name": "cocoon-1", "status": "RUNNING",
      "networkInterfaces": [{
        "kind": "compute#networkInterface", "name": "nic0", "networkIP": "10.128.0.7", "stackType": "IPV4_ONLY",
        "aliasIpRanges": [
          {"ipCidrRange": "10.128.7.0/28"},
          {"ipCidrRange": "10.8.1.0/24", "subnetworkRangeName": "gke-pods"},
          {"ipCidrRange": "172.20.9.0/24", "subnetworkRangeName": "cocoon-pods"}
        ],
        "fingerprint": "qNSMuLHKnQs="
      }, {"name": "nic1"}]}"#;

    fn place() -> Place {
        Place {
            instance: "cocoon-1".to_owned(),
            zone: "asia-southeast1-b".to_owned(),
            project: "acme-vms".to_owned(),
            subnetwork: "nodes".to_owned(),
        }
    }

    fn subnet() -> Subnet {
        "172.20.100.0/24".parse().unwrap()
    }

    fn aliases() -> Vec<Alias> {
        serde_json::from_str::<Instance>(INSTANCE).unwrap().aliases().unwrap()
    }

    fn shown(aliases: &[Alias]) -> Vec<String> {
        aliases.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn the_calls_are_those_of_the_manual() {
        assert_eq!(
            describe_subnet(&place()).join(" "),
            "compute networks subnets describe nodes --project acme-vms --region asia-southeast1 --format json"
        );
        assert_eq!(
            add_range(&place(), subnet()).join(" "),
            "compute networks subnets update nodes --project acme-vms --region asia-southeast1 \
             --add-secondary-ranges=cocoon-pods=172.20.100.0/24"
        );
        assert_eq!(
            describe_instance(&place()).join(" "),
            "compute instances describe cocoon-1 --project acme-vms --zone asia-southeast1-b --format json"
        );
        let set = set_aliases(&place(), &aliases());
        assert_eq!(
            set[..11].join(" "),
            "compute instances network-interfaces update cocoon-1 --project acme-vms --zone asia-southeast1-b \
             --network-interface nic0"
        );
        assert_eq!(set[11..], ["--aliases", "10.128.7.0/28;gke-pods:10.8.1.0/24;cocoon-pods:172.20.9.0/24"]);
        assert_eq!(set_aliases(&place(), &[])[11..], ["--aliases", ""]);
    }

    #[test]
    fn an_older_alias_of_ours_is_replaced_and_others_stay() {
        let wanted = with_ours(&aliases(), &Alias::of(RANGE, subnet())).unwrap();
        assert_eq!(shown(&wanted), ["10.128.7.0/28", "gke-pods:10.8.1.0/24", "cocoon-pods:172.20.100.0/24"]);
    }

    #[test]
    fn an_alias_that_is_there_already_needs_no_call() {
        let ours = Alias::of(RANGE, "172.20.9.0/24".parse().unwrap());
        assert_eq!(with_ours(&aliases(), &ours), None);
    }

    #[test]
    fn only_our_very_alias_is_taken_away() {
        let ours = [Alias::of(RANGE, "172.20.9.0/24".parse().unwrap()), Alias::of(RANGE, subnet())];
        let rest = ["10.128.7.0/28", "gke-pods:10.8.1.0/24"];
        assert_eq!(shown(&without_ours(&aliases(), &ours).unwrap()), rest);
        assert_eq!(shown(&without_ours(&aliases(), &ours[..1]).unwrap()), rest);
        assert_eq!(without_ours(&aliases(), &ours[1..]), None);
        assert_eq!(without_ours(&aliases(), &[Alias::of("", "172.20.9.0/24".parse().unwrap())]), None);
    }

    #[test]
    fn an_alias_reads_back_as_it_is_displayed() {
        for alias in aliases() {
            assert_eq!(Alias::parse(&alias.to_string()), alias);
        }
    }

    #[test]
    fn a_range_covers_what_lies_inside_it() {
        let json = r#"{"name":"nodes","ipCidrRange":"10.128.0.0/20","secondaryIpRanges":[
            {"rangeName":"gke-pods","ipCidrRange":"10.8.0.0/14"},
            {"rangeName":"cocoon-pods","ipCidrRange":"172.20.0.0/16"}]}"#;
        let found: VpcSubnet = serde_json::from_str(json).unwrap();
        assert_eq!(found.range(), Some("172.20.0.0/16"));
        assert!(covers("172.20.0.0/16", subnet()) && covers("172.20.100.0/24", subnet()));
        for small in ["172.20.100.0/25", "172.21.0.0/16", "fd00::/8", ""] {
            assert!(!covers(small, subnet()), "{small}");
        }
    }

    #[test]
    fn missing_lists_are_empty_ones() {
        assert_eq!(serde_json::from_str::<VpcSubnet>("{}").unwrap().range(), None);
        assert_eq!(serde_json::from_str::<Instance>("{}").unwrap().aliases(), None);
        let bare = r#"{"networkInterfaces":[{"name":"nic0"}]}"#;
        assert_eq!(serde_json::from_str::<Instance>(bare).unwrap().aliases(), Some(Vec::new()));
    }

    #[test]
    fn the_region_is_the_zone_less_its_last_part() {
        assert_eq!(place().region(), "asia-southeast1");
    }
}
