//! `ve vpc`, as far as cocoon-net uses it.
//!
//! Behaviour follows the VPC API, version 2020-04-01: `CreateNetworkInterface` is asynchronous, the interface is
//! `Creating` and then `Available` (<https://www.volcengine.com/docs/6401/70758>); attaching needs an `Available` one and
//! a free place on the instance, and goes through `Attaching` to `InUse` (<https://www.volcengine.com/docs/6401/70763>);
//! detaching goes through `Detaching` back to `Available`, and only then may it be deleted; secondary addresses are
//! limited by the instance's specification (<https://www.volcengine.com/docs/6401/100673>); a subnet is `Pending` and
//! then `Available`, and counts its free addresses (<https://www.volcengine.com/docs/6401/70498>). Lists come in pages
//! of at most 100. Error codes are those that the API documents and
//! <https://github.com/volcengine/cello> handles. The CLI reports missing credentials on stderr with status 1
//! (<https://github.com/volcengine/volcengine-cli>, Usage); an error of the API is on stdout, in `ResponseMetadata`.

use std::net::Ipv4Addr;

use ipnet::Ipv4Net;
use serde_json::{Value, json};

use super::eni::{Eni, describe};
use super::{Answer, flag};

pub const REGION: &str = "cn-beijing";
pub const ZONE: &str = "cn-beijing-a";
pub const VPC: &str = "vpc-13f8kx1example";
pub const INSTANCE: &str = "i-ybo19qc2zqexample";

/// A subnet of the VPC.
#[derive(Debug, Clone)]
pub struct Subnet {
    /// Its id.
    pub id: String,
    /// Its range.
    pub cidr: String,
    /// Looks until it is `Available`.
    looks: usize,
}

/// One VPC with one instance in it.
#[derive(Debug)]
pub struct Ve {
    /// Security groups.
    pub groups: Vec<String>,
    /// Subnets.
    pub subnets: Vec<Subnet>,
    /// Interfaces.
    pub enis: Vec<Eni>,
    /// How many interfaces the instance may have, the primary one included.
    pub enis_per_instance: usize,
    /// How many secondary addresses an attached interface may have.
    pub addresses_per_eni: usize,
    /// Calls from now on that are refused because there are too many.
    pub throttled: usize,
    /// Leave out of answers what an API of another version may not have.
    pub sparse: bool,
    /// Things on a page, at most.
    pub page: usize,
    made: usize,
}

impl Default for Ve {
    fn default() -> Self {
        let host = Subnet { id: "subnet-hosts".to_owned(), cidr: "10.128.0.0/20".to_owned(), looks: 0 };
        let primary = Eni {
            id: "eni-primary".to_owned(),
            subnet: host.id.clone(),
            kind: "primary",
            status: "InUse",
            device: INSTANCE.to_owned(),
            address: "10.128.0.2".to_owned(),
            ..Eni::default()
        };
        Self {
            groups: vec!["sg-default".to_owned(), "sg-other".to_owned()],
            subnets: vec![host],
            enis: vec![primary],
            enis_per_instance: 8,
            addresses_per_eni: 20,
            throttled: 0,
            sparse: false,
            page: 100,
            made: 0,
        }
    }
}

impl Ve {
    /// Everything but the primary interface.
    pub fn secondary(&self) -> Vec<&Eni> {
        self.enis.iter().filter(|eni| eni.kind == "secondary").collect()
    }

    /// The ids of everything but the primary interface, in order.
    pub fn ids(&self) -> Vec<String> {
        let mut ids: Vec<String> = self.secondary().iter().map(|eni| eni.id.clone()).collect();
        ids.sort();
        ids
    }

    /// How many secondary addresses there are.
    pub fn addresses(&self) -> usize {
        self.enis.iter().map(|eni| eni.secondary.len()).sum()
    }

    /// Makes a subnet, as somebody else would.
    pub fn add_subnet(&mut self, cidr: &str) -> String {
        self.made += 1;
        let id = format!("subnet-{:04}", self.made);
        self.subnets.push(Subnet { id: id.clone(), cidr: cidr.to_owned(), looks: 0 });
        id
    }

    /// Makes an interface in a subnet, as somebody else would; attached if there is an instance.
    pub fn add_eni(&mut self, name: &str, subnet: &str, instance: &str) -> String {
        self.made += 1;
        let id = format!("eni-{:04}", self.made);
        let address = self.free_addresses(subnet).first().map(ToString::to_string).unwrap_or_default();
        self.enis.push(Eni {
            id: id.clone(),
            name: name.to_owned(),
            subnet: subnet.to_owned(),
            kind: "secondary",
            status: if instance.is_empty() { "Available" } else { "InUse" },
            device: instance.to_owned(),
            address,
            ..Eni::default()
        });
        id
    }

    /// What a subnet has left, in an order that is not numerical. The first host is the VPC's own.
    fn free_addresses(&self, subnet: &str) -> Vec<Ipv4Addr> {
        let Some(subnet) = self.subnets.iter().find(|candidate| candidate.id == subnet) else { return Vec::new() };
        let net: Ipv4Net = subnet.cidr.parse().expect("subnets are IPv4 ranges");
        let taken = |ip: &Ipv4Addr| {
            let ip = ip.to_string();
            self.enis.iter().any(|eni| eni.address == ip || eni.secondary.contains(&ip))
        };
        let mut free: Vec<Ipv4Addr> = net.hosts().skip(1).filter(|ip| !taken(ip)).collect();
        free.sort_by_key(|ip| u32::from(*ip).wrapping_mul(37) % 251);
        free
    }

    pub(super) fn call(&mut self, args: &[String], env: &str, lag: usize) -> Answer {
        if env != format!("id,key,secret,{REGION}") {
            let text = "credentials not configured, please run 've login' or 've configure set', or set \
                        VOLCENGINE_ACCESS_KEY and VOLCENGINE_SECRET_KEY environment variables";
            return Answer { code: 1, stderr: format!("Error: {text} (got {env})"), stdout: String::new() };
        }
        if self.throttled > 0 {
            self.throttled -= 1;
            return error(args, "AccountFlowLimitExceeded", "The request was denied due to request throttling");
        }
        let action = args.get(1).map(String::as_str).unwrap_or_default();
        let result = match action {
            "DescribeSecurityGroups" => self.list(args, "SecurityGroups", self.security_groups(args)),
            "DescribeSubnets" => {
                let subnets = self.describe_subnets(args);
                self.list(args, "Subnets", subnets)
            }
            "DescribeNetworkInterfaces" => {
                let enis = self.describe_enis(args);
                self.list(args, "NetworkInterfaceSets", enis)
            }
            "CreateSubnet" => self.create_subnet(args, lag),
            "CreateNetworkInterface" => self.create(args, lag),
            "AttachNetworkInterface" => self.attach(args, lag),
            "DetachNetworkInterface" => self.detach(args, lag),
            "DeleteNetworkInterface" => self.delete(args, lag),
            "AssignPrivateIpAddresses" => self.assign(args),
            _ => Err(("InvalidActionOrVersion", "The specified action is not found")),
        };
        match result {
            Ok(result) if self.sparse => wrap(args, thinned(result)),
            Ok(result) => wrap(args, result),
            Err((code, message)) => error(args, code, message),
        }
    }

    /// `PageNumber` and `PageSize`, at most 100; `TotalCount` counts all pages.
    fn list(&self, args: &[String], key: &str, all: Vec<Value>) -> Result<Value, Failure> {
        let number = |name| flag(args, name).and_then(|text| text.parse::<usize>().ok());
        let size = number("--PageSize").unwrap_or(20);
        if size > 100 {
            return Err(("InvalidPageSize.Malformed", "The specified PageSize is out of range"));
        }
        let (size, page) = (size.min(self.page), number("--PageNumber").unwrap_or(1));
        let total = all.len();
        let items: Vec<Value> = all.into_iter().skip(size * page.saturating_sub(1)).take(size).collect();
        Ok(json!({ key: items, "TotalCount": total, "PageNumber": page, "PageSize": size }))
    }

    fn security_groups(&self, args: &[String]) -> Vec<Value> {
        let groups = if flag(args, "--VpcId") == Some(VPC) { self.groups.as_slice() } else { &[] };
        groups.iter().map(|id| json!({"SecurityGroupId": id, "VpcId": VPC, "Status": "Available"})).collect()
    }

    fn describe_subnets(&mut self, args: &[String]) -> Vec<Value> {
        if flag(args, "--VpcId") != Some(VPC) {
            return Vec::new();
        }
        let mut seen = Vec::new();
        for subnet in self.subnets.clone() {
            let status = if subnet.looks == 0 { "Available" } else { "Pending" };
            seen.push(json!({
                "SubnetId": subnet.id, "CidrBlock": subnet.cidr, "Status": status, "VpcId": VPC, "ZoneId": ZONE,
                "AvailableIpAddressCount": self.free_addresses(&subnet.id).len(),
            }));
        }
        for subnet in &mut self.subnets {
            subnet.looks = subnet.looks.saturating_sub(1);
        }
        seen
    }

    fn describe_enis(&mut self, args: &[String]) -> Vec<Value> {
        let ids: Vec<&String> = args
            .iter()
            .zip(args.iter().skip(1))
            .filter(|(name, _)| name.starts_with("--NetworkInterfaceIds."))
            .map(|(_, id)| id)
            .collect();
        let is = |name, value: &str| flag(args, name).is_none_or(|wanted| wanted == value);
        let wanted = |eni: &&Eni| {
            let listed = ids.is_empty() || ids.contains(&&eni.id);
            listed && is("--InstanceId", &eni.device) && is("--SubnetId", &eni.subnet) && eni.unseen == 0
        };
        let seen = self.enis.iter().filter(wanted).map(describe).collect();
        for eni in &mut self.enis {
            eni.pass();
        }
        self.enis.retain(|eni| eni.status != "Deleted");
        seen
    }

    fn create_subnet(&mut self, args: &[String], lag: usize) -> Result<Value, Failure> {
        let cidr: Ipv4Net = flag(args, "--CidrBlock")
            .and_then(|cidr| cidr.parse().ok())
            .ok_or(("InvalidCidrBlock.Malformed", "The specified CidrBlock is not valid"))?;
        if flag(args, "--VpcId") != Some(VPC) || flag(args, "--ZoneId") != Some(ZONE) {
            return Err(("InvalidVpc.NotFound", "The specified VPC or zone does not exist"));
        }
        let overlaps = |subnet: &Subnet| subnet.cidr.parse::<Ipv4Net>().is_ok_and(|old| old.contains(&cidr));
        if self.subnets.iter().any(overlaps) {
            return Err(("InvalidCidrBlock.Conflict", "The specified CidrBlock conflicts with another subnet"));
        }
        let id = self.add_subnet(&cidr.to_string());
        if let Some(subnet) = self.subnets.last_mut() {
            subnet.looks = lag;
        }
        Ok(json!({"SubnetId": id}))
    }

    fn create(&mut self, args: &[String], lag: usize) -> Result<Value, Failure> {
        let subnet = flag(args, "--SubnetId").unwrap_or_default();
        if !self.subnets.iter().any(|known| known.id == subnet && known.looks == 0) {
            return Err(("InvalidSubnet.NotFound", "The specified subnet does not exist, or is not available"));
        }
        if !self.groups.iter().any(|group| Some(group.as_str()) == flag(args, "--SecurityGroupIds.1")) {
            return Err(("InvalidSecurityGroup.NotFound", "The specified security group does not exist"));
        }
        if self.free_addresses(subnet).is_empty() {
            return Err(("InsufficientIpInSubnet", "There are not enough free addresses in the subnet"));
        }
        let id = self.add_eni(flag(args, "--NetworkInterfaceName").unwrap_or_default(), subnet, "");
        if let Some(eni) = self.enis.last_mut() {
            eni.become_after(lag, "Creating");
            eni.unseen = lag;
        }
        Ok(json!({"NetworkInterfaceId": id}))
    }

    fn attach(&mut self, args: &[String], lag: usize) -> Result<Value, Failure> {
        if flag(args, "--InstanceId") != Some(INSTANCE) {
            return Err(("InvalidInstance.NotFound", "The specified instance does not exist"));
        }
        let full = self.enis.iter().filter(|eni| eni.device == INSTANCE).count() >= self.enis_per_instance;
        let eni = self.eni(args)?;
        if eni.status != "Available" || eni.unseen > 0 {
            return Err(INVALID_STATUS);
        }
        if full {
            return Err((
                "LimitExceeded.EnisPerInstance",
                "The instance has as many network interfaces as it may have",
            ));
        }
        INSTANCE.clone_into(&mut eni.device);
        eni.become_after(lag, "Attaching");
        Ok(json!({}))
    }

    fn detach(&mut self, args: &[String], lag: usize) -> Result<Value, Failure> {
        let instance = flag(args, "--InstanceId").unwrap_or_default().to_owned();
        let eni = self.eni(args)?;
        if eni.kind == "primary" {
            return Err(("InvalidEni.InvalidType", "The primary network interface cannot be detached"));
        }
        if eni.device != instance {
            return Err(("InvalidEni.InstanceMismatch", "The network interface is not attached to the instance"));
        }
        if eni.status != "InUse" {
            return Err(INVALID_STATUS);
        }
        eni.become_after(lag, "Detaching");
        Ok(json!({}))
    }

    fn delete(&mut self, args: &[String], lag: usize) -> Result<Value, Failure> {
        let eni = self.eni(args)?;
        if eni.status != "Available" {
            return Err(INVALID_STATUS);
        }
        eni.become_after(lag, "Deleting");
        self.enis.retain(|eni| eni.status != "Deleted");
        Ok(json!({}))
    }

    /// All or nothing.
    fn assign(&mut self, args: &[String]) -> Result<Value, Failure> {
        let count = flag(args, "--SecondaryPrivateIpAddressCount").and_then(|count| count.parse::<usize>().ok());
        let count = count.ok_or(("MissingParameter", "SecondaryPrivateIpAddressCount is missing"))?;
        let limit = self.addresses_per_eni;
        let subnet = self.eni(args)?.subnet.clone();
        let free: Vec<String> = self.free_addresses(&subnet).iter().take(count).map(ToString::to_string).collect();
        let eni = self.eni(args)?;
        if !["Available", "InUse"].contains(&eni.status) {
            return Err(INVALID_STATUS);
        }
        if eni.secondary.len() + count > limit {
            return Err((
                "LimitExceeded.PrivateIpsPerEni",
                "The network interface has as many addresses as it may have",
            ));
        }
        if free.len() < count {
            return Err(("InsufficientIpInSubnet", "There are not enough free addresses in the subnet"));
        }
        eni.secondary.extend(free.clone());
        Ok(json!({"NetworkInterfaceId": eni.id, "PrivateIpSet": free}))
    }

    fn eni(&mut self, args: &[String]) -> Result<&mut Eni, Failure> {
        let id = flag(args, "--NetworkInterfaceId").unwrap_or_default();
        let found = self.enis.iter_mut().find(|eni| eni.id == id);
        found.ok_or(("InvalidEniId.NotFound", "The specified network interface does not exist"))
    }
}

type Failure = (&'static str, &'static str);

const INVALID_STATUS: Failure = (
    "InvalidEni.InvalidStatus",
    "The specified elastic network interface is not in the correct status for the request.",
);

fn thinned(value: Value) -> Value {
    let kept = |key: &str| !["Status", "ServiceManaged", "TotalCount", "AvailableIpAddressCount"].contains(&key);
    match value {
        Value::Object(map) => {
            map.into_iter().filter(|(key, _)| kept(key)).map(|(key, value)| (key, thinned(value))).collect()
        }
        Value::Array(items) => items.into_iter().map(thinned).collect(),
        other => other,
    }
}

fn wrap(args: &[String], result: Value) -> Answer {
    let metadata = json!({"RequestId": "20260101120000000", "Action": args.get(1), "Version": "2020-04-01",
        "Service": "vpc", "Region": REGION});
    let body = json!({"ResponseMetadata": metadata, "Result": result});
    Answer { code: 0, stderr: String::new(), stdout: format!("{body:#}\n") }
}

fn error(args: &[String], code: &str, message: &str) -> Answer {
    let error = json!({"CodeN": 100_000, "Code": code, "Message": message});
    let body = json!({"ResponseMetadata": {"RequestId": "20260101120000000", "Action": args.get(1), "Error": error}});
    Answer { code: 0, stderr: String::new(), stdout: format!("{body:#}\n") }
}

pub(super) fn success(args: &[String]) -> Answer {
    let result = match args.get(1).map(String::as_str).unwrap_or_default() {
        "DescribeSecurityGroups" => json!({"SecurityGroups": [], "TotalCount": 0}),
        "DescribeSubnets" => json!({"Subnets": [], "TotalCount": 0}),
        "DescribeNetworkInterfaces" => json!({"NetworkInterfaceSets": [], "TotalCount": 0}),
        "CreateSubnet" => json!({"SubnetId": "subnet-that-is-not"}),
        "CreateNetworkInterface" => json!({"NetworkInterfaceId": "eni-that-is-not"}),
        _ => json!({}),
    };
    wrap(args, result)
}

pub(super) fn refusal(args: &[String]) -> Answer {
    error(args, "AccessDenied", "You are not authorized to perform this action")
}

pub(super) fn metadata(path: &str) -> Option<String> {
    let value = match path.strip_prefix("/latest/meta-data")? {
        "/vpc-id" => VPC,
        "/instance-id" => INSTANCE,
        "/placement/availability-zone" => ZONE,
        _ => return None,
    };
    Some(value.to_owned())
}
