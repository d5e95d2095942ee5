//! Which addresses the probe may use, and which it aims at.

use std::collections::BTreeSet;
use std::net::Ipv4Addr;
use std::time::Duration;

use ipnet::Ipv4Net;

use super::frames::{End, arp_request, arp_sender};
use super::tap::{ARP, Tap};
use super::{ProbeError, Request};
use crate::host::links::Mac;

/// Documentation ranges (RFC 5737): nobody is there.
const NOWHERE: [Ipv4Addr; 3] =
    [Ipv4Addr::new(192, 0, 2, 1), Ipv4Addr::new(198, 51, 100, 1), Ipv4Addr::new(203, 0, 113, 1)];

/// How many addresses are asked for at once, how often, and how long an answer may take.
const BATCH: usize = 16;
const ASKS: usize = 3;
const ANSWER: Duration = Duration::from_millis(200);

/// How many addresses the control is sent to: a node may have a route to nowhere for those that are nobody's.
const CONTROLS: usize = 6;

/// How many addresses of a range are looked at for one that fits.
const TRIES: usize = 4096;

/// Two addresses that no VM has: outside of the pool if the subnet has room, else out of the pool but not
/// leased; in any case nobody may answer for them. The question goes out from the bridge itself, for an
/// isolated port would not reach the VMs.
pub(super) async fn two_free(request: &Request, bridge_mac: Mac) -> Result<[Ipv4Addr; 2], ProbeError> {
    let tap = Tap::on(&request.bridge, ARP).map_err(ProbeError::Tap)?;
    let mut free = Vec::new();
    let candidates: Vec<Ipv4Addr> = candidates(request).take(BATCH * 8).collect();
    for batch in candidates.chunks(BATCH) {
        let taken = answered(&tap, bridge_mac, batch).await?;
        free.extend(batch.iter().filter(|address| !taken.contains(address)));
        if let [first, second, ..] = free[..] {
            return Ok([first, second]);
        }
    }
    Err(ProbeError::NoAddress { subnet: request.subnet })
}

/// Candidates in order of preference, highest addresses first: DHCP servers and people start from below.
fn candidates(request: &Request) -> impl Iterator<Item = Ipv4Addr> {
    let hosts = || request.subnet.hosts().rev().take(TRIES);
    let usable = |address: &Ipv4Addr| *address != request.gateway && !request.leased.contains(address);
    let spare = hosts().filter(|address| !request.pool.contains(address));
    let pooled = hosts().filter(|address| request.pool.contains(address));
    spare.chain(pooled).filter(usable)
}

/// Which of these addresses someone answers for. The question names no sender (RFC 5227 section 2.1.1), so that it
/// changes nobody's mind.
async fn answered(tap: &Tap, bridge_mac: Mac, addresses: &[Ipv4Addr]) -> Result<BTreeSet<Ipv4Addr>, ProbeError> {
    let nobody = End { mac: bridge_mac, ip: Ipv4Addr::UNSPECIFIED };
    let mut taken = BTreeSet::new();
    for _ in 0..ASKS {
        for address in addresses {
            tap.send(&arp_request(nobody, *address, &[])).map_err(ProbeError::Tap)?;
        }
        tokio::time::sleep(ANSWER).await;
        taken.extend(tap.drain().iter().filter_map(|seen| arp_sender(&seen.frame)));
    }
    Ok(taken)
}

/// An address in a drop target to send at: not of the VMs' subnet, which the trials between guests cover, and not the
/// node's own, which is not forwarded to.
pub(super) fn inside(target: Ipv4Net, subnet: Ipv4Net, own: &BTreeSet<Ipv4Addr>) -> Option<Ipv4Addr> {
    let nowhere = NOWHERE.into_iter().filter(|address| target.contains(address));
    let fits = |address: &Ipv4Addr| !subnet.contains(address) && !own.contains(address) && is_unicast(*address);
    // Stepping over the subnet at once: it may be larger than what is looked at.
    let beyond = Ipv4Addr::from_bits(subnet.broadcast().to_bits().saturating_add(1));
    let far = std::iter::once(beyond).chain(spread()).filter(|address| target.contains(address));
    nowhere.chain(target.hosts().take(TRIES)).chain(far).find(fits)
}

/// A few addresses that no target covers, for the control that shows that the node forwards at all.
pub(super) fn outside(targets: &[Ipv4Net], subnet: Ipv4Net, own: &BTreeSet<Ipv4Addr>) -> Vec<Ipv4Addr> {
    let free = |address: &Ipv4Addr| !targets.iter().any(|target| target.contains(address));
    let others = |address: &Ipv4Addr| !subnet.contains(address) && !own.contains(address);
    NOWHERE.into_iter().chain(spread()).filter(free).filter(others).take(CONTROLS).collect()
}

/// One unicast address in each `/8`, for targets whose first hosts are none that can be sent to (0.0.0.0/1).
fn spread() -> impl Iterator<Item = Ipv4Addr> {
    (1..224).map(|first| Ipv4Addr::new(first, 0, 113, 1)).filter(|address| is_unicast(*address))
}

fn is_unicast(address: Ipv4Addr) -> bool {
    !address.is_multicast() && !address.is_broadcast() && !address.is_loopback() && address.octets()[0] != 0
}

#[cfg(test)]
mod tests {
    use super::*;

    fn net(text: &str) -> Ipv4Net {
        text.parse().unwrap()
    }

    fn request(subnet: &str, pool: &[&str], leased: &[&str]) -> Request {
        let set = |list: &[&str]| list.iter().map(|address| address.parse().unwrap()).collect();
        let subnet = net(subnet);
        let gateway = subnet.hosts().next().unwrap();
        Request { subnet, gateway, pool: set(pool), leased: set(leased), ..Request::default() }
    }

    #[test]
    fn addresses_outside_of_the_pool_come_first_and_used_ones_never() {
        let request = request("10.0.0.0/29", &["10.0.0.2", "10.0.0.3", "10.0.0.6"], &["10.0.0.5", "10.0.0.3"]);
        let order: Vec<u8> = candidates(&request).map(|address| address.octets()[3]).collect();
        assert_eq!(order, [4, 6, 2]);
    }

    #[test]
    fn a_huge_subnet_is_not_walked() {
        assert!(candidates(&request("0.0.0.0/1", &[], &[])).count() <= TRIES);
    }

    #[test]
    fn the_sample_of_a_target_is_in_it_and_is_forwarded() {
        let subnet = net("172.20.100.0/24");
        let own = BTreeSet::from([Ipv4Addr::new(10, 0, 0, 1)]);
        for target in ["10.0.0.0/8", "0.0.0.0/0", "169.254.169.254/32", "172.20.0.0/16", "172.20.100.0/23", "0.0.0.0/1"]
        {
            let sample = inside(net(target), subnet, &own).unwrap();
            assert!(
                net(target).contains(&sample) && !subnet.contains(&sample) && !own.contains(&sample),
                "{target}: {sample}"
            );
        }
        for target in ["172.20.100.0/24", "172.20.100.128/25", "10.0.0.1/32"] {
            assert_eq!(inside(net(target), subnet, &own), None, "{target}");
        }
    }

    #[test]
    fn the_forwarding_control_avoids_every_target() {
        let subnet = net("172.20.100.0/24");
        let targets = [net("192.0.2.0/24"), net("198.51.100.0/24"), net("203.0.0.0/8")];
        let samples = outside(&targets, subnet, &BTreeSet::new());
        assert_eq!(samples.len(), CONTROLS);
        assert!(samples.iter().all(|sample| targets.iter().all(|target| !target.contains(sample))));
        assert!(outside(&[net("0.0.0.0/0")], subnet, &BTreeSet::new()).is_empty());
    }
}
