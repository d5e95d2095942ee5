//! What `ve` answers: JSON, nothing that acts.
//!
//! Shapes are those of the VPC API, version 2020-04-01 (<https://www.volcengine.com/docs/6401/70758> and its
//! neighbours).

use std::net::Ipv4Addr;

use serde::Deserialize;
use serde::de::DeserializeOwned;

use crate::cloud::volcengine::calls::PAGE_SIZE;
use crate::config::Subnet;

/// What every answer is wrapped in.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct Envelope {
    #[serde(default)]
    response_metadata: Option<ResponseMetadata>,
    #[serde(default)]
    result: Option<serde_json::Value>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct ResponseMetadata {
    #[serde(default)]
    request_id: String,
    #[serde(default)]
    error: Option<ApiError>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct ApiError {
    #[serde(default)]
    code: String,
    #[serde(default)]
    message: String,
}

/// The cloud's own error: code, message and request id.
pub type Refusal = (String, String, String);

impl Envelope {
    /// The error in it, if there is one.
    #[must_use]
    pub fn refusal(&self) -> Option<Refusal> {
        let metadata = self.response_metadata.as_ref()?;
        let error = metadata.error.as_ref()?;
        Some((error.code.clone(), error.message.clone(), metadata.request_id.clone()))
    }

    /// The result in it. An answer that is not wrapped at all is no result.
    ///
    /// # Errors
    /// When it does not have the shape asked for.
    pub fn result<T: DeserializeOwned>(self) -> Result<T, serde_json::Error> {
        if self.response_metadata.is_none() && self.result.is_none() {
            return Err(serde::de::Error::custom("neither `ResponseMetadata` nor `Result` in it"));
        }
        serde_json::from_value(self.result.unwrap_or(serde_json::Value::Null))
    }
}

/// A page of things: `T` picks its own list out of the result.
pub trait Listed: DeserializeOwned {
    /// The key that the list has in the result.
    const KEY: &'static str;
}

/// What a list call answers.
#[derive(Debug)]
pub struct Page<T> {
    /// The things on this page.
    pub items: Vec<T>,
    /// How many there are on all pages together, when the answer says so.
    pub total: Option<usize>,
}

impl<T: Listed> Page<T> {
    /// Reads a page out of a result.
    ///
    /// # Errors
    /// When the list is missing from it, or an entry does not have its shape. `null` is an empty list.
    pub fn read(mut result: serde_json::Value) -> Result<Self, serde_json::Error> {
        let list = result
            .get_mut(T::KEY)
            .map(serde_json::Value::take)
            .ok_or_else(|| serde::de::Error::custom(format!("`Result.{}` is missing", T::KEY)))?;
        let total = result.get("TotalCount").and_then(serde_json::Value::as_u64);
        Ok(Self {
            items: serde_json::from_value::<Option<Vec<T>>>(list)?.unwrap_or_default(),
            total: total.and_then(|total| usize::try_from(total).ok()),
        })
    }

    /// Whether another page has to be asked for, after this one has brought the number of things seen to `seen`.
    #[must_use]
    pub fn is_followed(&self, seen: usize) -> bool {
        !self.items.is_empty() && self.total.map_or(self.items.len() >= PAGE_SIZE, |total| seen < total)
    }
}

/// A security group.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct SecurityGroup {
    /// Its id.
    pub security_group_id: String,
}

impl Listed for SecurityGroup {
    const KEY: &'static str = "SecurityGroups";
}

/// A subnet of the VPC.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct VpcSubnet {
    /// Its id.
    pub subnet_id: String,
    cidr_block: String,
    #[serde(default)]
    status: String,
    /// Addresses that nobody has, when the answer says so.
    #[serde(default)]
    pub available_ip_address_count: Option<usize>,
}

impl Listed for VpcSubnet {
    const KEY: &'static str = "Subnets";
}

impl VpcSubnet {
    /// Whether it is the VMs' subnet.
    #[must_use]
    pub fn is(&self, subnet: Subnet) -> bool {
        self.cidr_block.parse::<ipnet::Ipv4Net>().is_ok_and(|net| net.trunc() == subnet.net())
    }

    /// Whether interfaces can be made in it. A new one is `Pending` for a moment.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        self.status.is_empty() || self.status == "Available"
    }
}

/// An elastic network interface.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct Eni {
    /// Its id.
    #[serde(rename = "NetworkInterfaceId")]
    pub id: String,
    /// Its name; the API gives it the id when none was asked for.
    #[serde(rename = "NetworkInterfaceName", default)]
    pub name: String,
    #[serde(rename = "Type", default)]
    kind: String,
    #[serde(default)]
    status: String,
    /// The instance that it is attached to; empty when it is not.
    #[serde(default)]
    pub device_id: String,
    /// The subnet that it is in.
    #[serde(default)]
    pub subnet_id: String,
    /// Made by another product of the vendor, which alone may change it.
    #[serde(default)]
    service_managed: bool,
    #[serde(default)]
    private_ip_sets: PrivateIpSets,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct PrivateIpSets {
    #[serde(default)]
    private_ip_set: Option<Vec<PrivateIp>>,
}

#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct PrivateIp {
    private_ip_address: Ipv4Addr,
    #[serde(default)]
    primary: bool,
}

impl Listed for Eni {
    const KEY: &'static str = "NetworkInterfaceSets";
}

/// How far an ENI is on its way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EniState {
    /// Attached to nothing, ready for anything.
    Available,
    /// Attached.
    InUse,
    /// Between two of the others.
    Changing,
}

impl std::fmt::Display for EniState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Available => "available",
            Self::InUse => "in use",
            Self::Changing => "changing",
        })
    }
}

impl Eni {
    /// One of which no more is known than this.
    #[must_use]
    pub fn new(id: String, name: String) -> Self {
        Self { id, name, ..Self::default() }
    }

    /// A secondary interface that nobody else manages.
    #[must_use]
    pub fn may_be_ours(&self) -> bool {
        !self.kind.eq_ignore_ascii_case("primary") && !self.service_managed
    }

    /// How far it is on its way. An answer without a status is judged by what it is attached to.
    #[must_use]
    pub fn state(&self) -> EniState {
        match (self.status.as_str(), self.device_id.is_empty()) {
            ("Available", _) | ("", true) => EniState::Available,
            ("InUse", _) | ("", false) => EniState::InUse,
            _ => EniState::Changing,
        }
    }

    /// Its secondary addresses.
    pub fn secondary_addresses(&self) -> impl Iterator<Item = Ipv4Addr> + '_ {
        let all = self.private_ip_sets.private_ip_set.as_deref().unwrap_or_default();
        all.iter().filter(|ip| !ip.primary).map(|ip| ip.private_ip_address)
    }
}

/// `CreateSubnet`.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct CreatedSubnet {
    /// Id of the new subnet.
    pub subnet_id: String,
}

/// `CreateNetworkInterface`.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct CreatedInterface {
    /// Id of the new interface.
    pub network_interface_id: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the API documents for `DescribeNetworkInterfaces`, with one interface in use and one that is not.
    const INTERFACES: &str = r#"{
      "ResponseMetadata": {"RequestId": "2021062415303301022514515207C4", "Action": "DescribeNetworkInterfaces",
        "Version": "2020-04-01", "Service": "vpc", "Region": "cn-beijing"},
      "Result": {"RequestId": "2021062415303301022514515207C4", "PageNumber": 1, "PageSize": 100, "TotalCount": 3,
        "NetworkInterfaceSets": [
          {"NetworkInterfaceId": "eni-1", "NetworkInterfaceName": "node-eni-1", "Type": "secondary", "Status": "InUse",
           "DeviceId": "i-1", "SubnetId": "subnet-1", "ServiceManaged": false, "MacAddress": "00:16:3e:7a:01:02",
           "PrivateIpSets": {"PrivateIpSet": [
             {"Primary": true, "PrivateIpAddress": "172.20.100.3", "AssociatedElasticIp": {"AllocationId": ""}},
             {"Primary": false, "PrivateIpAddress": "172.20.100.10", "AssociatedElasticIp": {"AllocationId": ""}},
             {"Primary": false, "PrivateIpAddress": "172.20.100.9"}]}},
          {"NetworkInterfaceId": "eni-2", "Type": "secondary", "Status": "Creating", "DeviceId": "",
           "SubnetId": "subnet-1", "PrivateIpSets": {"PrivateIpSet": null}}
        ]}}"#;

    fn interfaces() -> Page<Eni> {
        let envelope: Envelope = serde_json::from_str(INTERFACES).unwrap();
        Page::read(envelope.result().unwrap()).unwrap()
    }

    #[test]
    fn interfaces_are_read() {
        let page = interfaces();
        assert_eq!(page.total, Some(3));
        let (used, new) = (&page.items[0], &page.items[1]);
        assert_eq!(used.state(), EniState::InUse);
        assert_eq!(new.state(), EniState::Changing);
        let addresses: Vec<String> = used.secondary_addresses().map(|ip| ip.to_string()).collect();
        assert_eq!(addresses, ["172.20.100.10", "172.20.100.9"]);
        assert_eq!(new.secondary_addresses().count(), 0);
        assert!(used.may_be_ours());
    }

    #[test]
    fn primary_and_managed_interfaces_are_never_ours() {
        for theirs in [r#""Type":"primary""#, r#""Type":"secondary","ServiceManaged":true"#] {
            let eni: Eni = serde_json::from_str(&format!(r#"{{"NetworkInterfaceId":"eni-0",{theirs}}}"#)).unwrap();
            assert!(!eni.may_be_ours(), "{theirs}");
        }
    }

    #[test]
    fn the_last_page_is_known_by_the_total_count_or_by_not_being_full() {
        let page = |items: usize, total| {
            let items = (0..items).map(|n| SecurityGroup { security_group_id: n.to_string() }).collect();
            Page { items, total }
        };
        assert!(page(100, Some(130)).is_followed(100));
        assert!(!page(30, Some(130)).is_followed(130));
        assert!(page(10, Some(130)).is_followed(10), "the API may give smaller pages than asked for");
        assert!(!page(0, Some(130)).is_followed(129), "things may go while the pages are read");
        assert!(page(100, None).is_followed(100));
        assert!(!page(99, None).is_followed(99));
    }

    #[test]
    fn an_error_in_the_body_is_a_refusal() {
        let body = r#"{"ResponseMetadata":{"RequestId":"r1","Action":"CreateNetworkInterface",
            "Error":{"CodeN":1000,"Code":"QuotaExceeded.Eni","Message":"too many"}}}"#;
        let envelope: Envelope = serde_json::from_str(body).unwrap();
        assert_eq!(envelope.refusal(), Some(("QuotaExceeded.Eni".into(), "too many".into(), "r1".into())));
    }

    #[test]
    fn an_answer_without_its_list_or_its_id_is_junk_and_not_an_empty_one() {
        for junk in ["{}", r#"{"ResponseMetadata":{}}"#, r#"{"Result":{}}"#, r#"{"Result":{"Subnets":{}}}"#] {
            let envelope: Envelope = serde_json::from_str(junk).unwrap();
            let read = envelope.result::<serde_json::Value>().and_then(Page::<VpcSubnet>::read);
            assert!(read.is_err(), "{junk}");
        }
        let envelope: Envelope = serde_json::from_str(r#"{"Result":{"RequestId":"r"}}"#).unwrap();
        assert!(envelope.result::<CreatedInterface>().is_err());
        let envelope: Envelope = serde_json::from_str(r#"{"Result":{"Subnets":null,"TotalCount":0}}"#).unwrap();
        assert!(Page::<VpcSubnet>::read(envelope.result().unwrap()).unwrap().items.is_empty());
    }

    #[test]
    fn our_subnet_is_known_by_its_cidr() {
        let json =
            r#"{"SubnetId":"subnet-1","CidrBlock":"172.20.100.0/24","Status":"Pending","AvailableIpAddressCount":252}"#;
        let subnet: VpcSubnet = serde_json::from_str(json).unwrap();
        assert!(subnet.is("172.20.100.0/24".parse().unwrap()));
        assert!(!subnet.is("172.20.100.0/25".parse().unwrap()));
        assert!(!subnet.is_ready());
        assert_eq!(subnet.available_ip_address_count, Some(252));
    }
}
