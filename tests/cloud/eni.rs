//! A network interface of Volcengine, and the states that it goes through: see [`super::ve`].

use serde_json::{Value, json};

/// A network interface.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Eni {
    /// Its id.
    pub id: String,
    /// Its name.
    pub name: String,
    /// The subnet it is in.
    pub subnet: String,
    /// `primary` or `secondary`.
    pub kind: &'static str,
    /// Its status.
    pub status: &'static str,
    /// The instance it is attached to.
    pub device: String,
    /// Its own address.
    pub address: String,
    /// Its secondary addresses.
    pub secondary: Vec<String>,
    /// Looks until it is seen at all, then until it is in its next state.
    pub(super) unseen: usize,
    pub(super) looks: usize,
}

impl Eni {
    /// Goes to a passing state, and on to the one that follows after so many looks.
    pub(super) fn become_after(&mut self, looks: usize, passing: &'static str) {
        (self.status, self.looks) = (passing, looks);
        if looks == 0 {
            self.arrive();
        }
    }

    /// Somebody looked: time goes on by one look.
    pub(super) fn pass(&mut self) {
        if self.unseen > 0 {
            self.unseen -= 1;
        } else if self.looks > 0 {
            self.looks -= 1;
            if self.looks == 0 {
                self.arrive();
            }
        }
    }

    fn arrive(&mut self) {
        self.status = match self.status {
            "Attaching" => "InUse",
            "Deleting" => "Deleted",
            _ => {
                self.device.clear();
                "Available"
            }
        };
    }
}

/// As `DescribeNetworkInterfaces` shows it.
pub(super) fn describe(eni: &Eni) -> Value {
    let secondary = eni.secondary.iter().map(|ip| json!({"Primary": false, "PrivateIpAddress": ip}));
    let all: Vec<Value> = secondary.chain([json!({"Primary": true, "PrivateIpAddress": eni.address})]).collect();
    json!({
        "NetworkInterfaceId": eni.id, "NetworkInterfaceName": eni.name, "Type": eni.kind, "Status": eni.status,
        "DeviceId": eni.device, "SubnetId": eni.subnet, "VpcId": super::ve::VPC, "ServiceManaged": false,
        "PrimaryIpAddress": eni.address, "PrivateIpSets": {"PrivateIpSet": all}, "SecurityGroupIds": ["sg-default"],
    })
}
