//! What is said to `ve`: arguments, nothing that acts.
//!
//! Actions and parameters are those of the VPC API, version 2020-04-01
//! (<https://www.volcengine.com/docs/6401/70758> and its neighbours).

use crate::cloud::vendor::{self, Args};
use crate::config::Subnet;

/// The largest page that the API gives.
pub const PAGE_SIZE: usize = 100;

/// First of `DescribeSecurityGroups` is the one that ENIs are put into.
#[must_use]
pub fn describe_security_groups(vpc: &str) -> Args {
    vendor::args(["vpc", "DescribeSecurityGroups", "--VpcId", vpc])
}

/// `DescribeSubnets` of a VPC.
#[must_use]
pub fn describe_subnets(vpc: &str) -> Args {
    vendor::args(["vpc", "DescribeSubnets", "--VpcId", vpc])
}

/// `CreateSubnet`, named after the node.
#[must_use]
pub fn create_subnet(vpc: &str, subnet: Subnet, zone: &str, node: &str) -> Args {
    vendor::args([
        "vpc",
        "CreateSubnet",
        "--VpcId",
        vpc,
        "--CidrBlock",
        &subnet.to_string(),
        "--ZoneId",
        zone,
        "--SubnetName",
        &format!("{node}-vms"),
    ])
}

/// `DescribeNetworkInterfaces` attached to an instance, the primary one included.
#[must_use]
pub fn interfaces_of_instance(instance: &str) -> Args {
    vendor::args(["vpc", "DescribeNetworkInterfaces", "--InstanceId", instance])
}

/// `DescribeNetworkInterfaces` in a subnet, attached or not, anybody's.
#[must_use]
pub fn interfaces_in_subnet(subnet_id: &str) -> Args {
    vendor::args(["vpc", "DescribeNetworkInterfaces", "--SubnetId", subnet_id])
}

/// `DescribeNetworkInterfaces` with these ids.
#[must_use]
pub fn interfaces_by_id(ids: &[String]) -> Args {
    let mut call = vendor::args(["vpc", "DescribeNetworkInterfaces"]);
    for (n, id) in ids.iter().enumerate() {
        call.extend([format!("--NetworkInterfaceIds.{}", n + 1), id.clone()]);
    }
    call
}

/// `CreateNetworkInterface`.
#[must_use]
pub fn create_interface(subnet_id: &str, security_group: &str, name: &str) -> Args {
    vendor::args([
        "vpc",
        "CreateNetworkInterface",
        "--SubnetId",
        subnet_id,
        "--SecurityGroupIds.1",
        security_group,
        "--NetworkInterfaceName",
        name,
    ])
}

/// `AttachNetworkInterface`.
#[must_use]
pub fn attach(id: &str, instance: &str) -> Args {
    vendor::args(["vpc", "AttachNetworkInterface", "--NetworkInterfaceId", id, "--InstanceId", instance])
}

/// `DetachNetworkInterface`.
#[must_use]
pub fn detach(id: &str, instance: &str) -> Args {
    vendor::args(["vpc", "DetachNetworkInterface", "--NetworkInterfaceId", id, "--InstanceId", instance])
}

/// `DeleteNetworkInterface`.
#[must_use]
pub fn delete(id: &str) -> Args {
    vendor::args(["vpc", "DeleteNetworkInterface", "--NetworkInterfaceId", id])
}

/// `AssignPrivateIpAddresses`: so many more secondary addresses, chosen by the cloud.
#[must_use]
pub fn assign(id: &str, count: usize) -> Args {
    vendor::args([
        "vpc",
        "AssignPrivateIpAddresses",
        "--NetworkInterfaceId",
        id,
        "--SecondaryPrivateIpAddressCount",
        &count.to_string(),
    ])
}

/// One page of a list call.
#[must_use]
pub fn page(call: &[String], number: usize) -> Args {
    let mut call = call.to_vec();
    call.extend(vendor::args(["--PageSize", &PAGE_SIZE.to_string(), "--PageNumber", &number.to_string()]));
    call
}

/// A name for one more ENI of a node: `NODE-eni-N`, N its place among those there are, or the next that none of them has.
#[must_use]
pub fn free_name<'a>(node: &str, taken: impl IntoIterator<Item = &'a str>) -> String {
    let taken: Vec<&str> = taken.into_iter().collect();
    let mut number = taken.len() + 1;
    loop {
        let name = format!("{node}-eni-{number}");
        if !taken.contains(&name.as_str()) {
            return name;
        }
        number += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_calls_are_those_of_the_manual() {
        let subnet = "172.20.100.0/24".parse().unwrap();
        assert_eq!(
            create_subnet("vpc-1", subnet, "cn-beijing-a", "node").join(" "),
            "vpc CreateSubnet --VpcId vpc-1 --CidrBlock 172.20.100.0/24 --ZoneId cn-beijing-a --SubnetName node-vms"
        );
        assert_eq!(
            create_interface("subnet-1", "sg-1", "node-eni-1").join(" "),
            "vpc CreateNetworkInterface --SubnetId subnet-1 --SecurityGroupIds.1 sg-1 --NetworkInterfaceName node-eni-1"
        );
        assert_eq!(
            assign("eni-1", 20).join(" "),
            "vpc AssignPrivateIpAddresses --NetworkInterfaceId eni-1 --SecondaryPrivateIpAddressCount 20"
        );
        assert_eq!(
            attach("eni-1", "i-1").join(" "),
            "vpc AttachNetworkInterface --NetworkInterfaceId eni-1 --InstanceId i-1"
        );
        assert_eq!(
            page(&interfaces_by_id(&["eni-1".into(), "eni-2".into()]), 2).join(" "),
            "vpc DescribeNetworkInterfaces --NetworkInterfaceIds.1 eni-1 --NetworkInterfaceIds.2 eni-2 \
             --PageSize 100 --PageNumber 2"
        );
    }

    #[test]
    fn a_free_name_is_numbered_by_its_place() {
        assert_eq!(free_name("n", []), "n-eni-1");
        assert_eq!(free_name("n", ["n-eni-1", "n-eni-2", "other"]), "n-eni-4");
        assert_eq!(free_name("n", ["n-eni-1", "n-eni-3"]), "n-eni-4");
    }
}
