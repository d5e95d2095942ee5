//! Claiming: a subnet, seven ENIs attached, twenty secondary addresses on each, seven interfaces on the host.

use std::collections::BTreeSet;
use std::net::Ipv4Addr;
use std::time::Duration;

use nix::net::if_::if_nametoindex;

use crate::cloud::limits::{Limits, wait_for};
use crate::cloud::progress::Work;
use crate::cloud::vendor::{Args, CallError};
use crate::cloud::volcengine::answers::{CreatedInterface, Eni, EniState, VpcSubnet};
use crate::cloud::volcengine::calls;
use crate::cloud::volcengine::session::Session;
use crate::cloud::volcengine::{ADDRESSES_PER_ENI, ENIS, Volcengine, VolcengineError};
use crate::cloud::{Checkpoint, CloudError};
use crate::config::{InterfaceName, NodeConfig};
use crate::pool::Pool;

/// How far a run has come, for its message when it fails.
#[derive(Debug, Default)]
pub(super) struct SoFar {
    subnet_id: Option<String>,
    /// ENIs that are attached, and that have all their addresses.
    attached: usize,
    addressed: usize,
}

impl SoFar {
    /// What there is in the cloud.
    pub(super) fn describe(&self, pool: &Pool) -> String {
        let Some(subnet_id) = &self.subnet_id else { return "nothing yet".to_owned() };
        let mut text = format!("the VPC subnet {subnet_id}, {} of {ENIS} ENIs", pool.eni_ids.len());
        if !pool.eni_ids.is_empty() {
            let (ids, attached, addressed) = (pool.eni_ids.join(", "), self.attached, self.addressed);
            text += &format!(" ({ids}; {attached} attached, {addressed} with all their addresses)");
        }
        if let Some(name) = &pool.pending_claim {
            text += &format!(", perhaps one more ENI, named {name}");
        }
        text
    }
}

impl Volcengine {
    pub(super) async fn claim(
        &self,
        pool: &mut Pool,
        pool_size: usize,
        save: &mut Checkpoint<'_>,
        so_far: &mut SoFar,
    ) -> Result<(), CloudError> {
        let session = self.session().await?;
        let subnet = session.ensure_subnet(pool.config.subnet, pool.config.node_name.as_str()).await?;
        so_far.subnet_id = Some(subnet.subnet_id.clone());
        let claim = Claim { session: &session, limits: self.limits, subnet };

        let mut enis = claim.enis_so_far(pool).await?;
        claim.record(pool, &enis, save)?;
        claim.check_room(pool, &enis)?;
        let steps: usize = enis.iter().map(|eni| steps(eni, &session.instance).len()).sum();
        let mut work = self.progress.begin("ENIs", steps + 3 * ENIS.saturating_sub(enis.len()));

        claim.create_missing(pool, &mut enis, save, &mut work).await?;
        enis.truncate(ENIS);
        for eni in &mut enis {
            claim.attach(eni, &mut work).await?;
            so_far.attached += 1;
        }
        for eni in &enis {
            claim.assign(eni, &mut work).await?;
            so_far.addressed += 1;
        }
        let ips = claim.addresses(pool, &enis, pool_size).await?;
        interfaces(&pool.config.secondary_nics, self.limits).await?;
        pool.ips = ips;
        Ok(())
    }

    /// The calls that are still needed, for a dry run. What is not made yet has no id to show.
    pub(super) async fn missing(&self, pool: &Pool) -> Result<Vec<String>, CloudError> {
        let session = self.session().await?;
        let node = pool.config.node_name.as_str();
        let (mut calls, mut enis, subnet_id) = match session.subnet(pool.config.subnet).await? {
            Some(subnet) => {
                let claim = Claim { session: &session, limits: Limits::all(Duration::ZERO), subnet };
                let enis = claim.enis_so_far(pool).await?;
                claim.check_room(pool, &enis)?;
                (Vec::new(), enis, claim.subnet.subnet_id)
            }
            None => {
                let call = session.create_subnet_call(pool.config.subnet, node).await?;
                (vec![call], Vec::new(), format!("ID-OF-{node}-vms"))
            }
        };
        let group = if enis.len() < ENIS { session.security_group().await? } else { String::new() };
        for n in 0..ENIS {
            if n >= enis.len() {
                let name = calls::free_name(node, enis.iter().map(|eni| eni.name.as_str()));
                calls.push(calls::create_interface(&subnet_id, &group, &name));
                enis.push(Eni::new(format!("ID-OF-{name}"), name));
            }
            calls.extend(steps(&enis[n], &session.instance));
        }
        Ok(calls.iter().map(|call| session.line(call)).collect())
    }
}

/// One run that claims addresses: where it talks, and what it has found.
struct Claim<'a> {
    session: &'a Session<'a>,
    limits: Limits,
    subnet: VpcSubnet,
}

impl Claim<'_> {
    /// The ENIs that an earlier run made, and those attached to this instance in our subnet: at most seven, recorded
    /// ones first.
    async fn enis_so_far(&self, pool: &Pool) -> Result<Vec<Eni>, CloudError> {
        let subnet_id = &self.subnet.subnet_id;
        let mut enis = self.recorded(pool).await?;
        if let Some(name) = &pool.pending_claim {
            enis.extend(self.session.interrupted(name, subnet_id, &pool.eni_ids, self.limits.visible).await?);
        }
        for eni in self.session.attached_in(subnet_id).await? {
            if !enis.iter().any(|known| known.id == eni.id) {
                enis.push(eni);
            }
        }
        enis.truncate(ENIS.max(pool.eni_ids.len()));
        Ok(enis)
    }

    /// The ENIs of `pool.json`. One made a moment ago may be seen only later, so those missing are waited for; one that
    /// stays missing has been deleted by somebody, and one that is attached elsewhere is not ours any more.
    async fn recorded(&self, pool: &Pool) -> Result<Vec<Eni>, CloudError> {
        let ids = &pool.eni_ids;
        let mut found = Vec::new();
        wait_for(self.limits.visible, async || {
            found = self.session.by_ids(ids).await?;
            Ok::<_, CallError>((found.len() == ids.len()).then_some(()))
        })
        .await?;
        found.retain(|eni| eni.device_id.is_empty() || eni.device_id == self.session.instance);
        for id in ids.iter().filter(|id| !found.iter().any(|eni| eni.id == **id)) {
            tracing::warn!(%id, "an ENI of pool.json is gone, or attached to another instance: it is made anew");
        }
        let want = &self.subnet.subnet_id;
        match found.iter().find(|eni| eni.subnet_id != *want) {
            Some(eni) => Err(VolcengineError::OtherSubnet {
                id: eni.id.clone(),
                have: eni.subnet_id.clone(),
                want: want.clone(),
            }
            .into()),
            None => Ok(found),
        }
    }

    fn record(&self, pool: &mut Pool, enis: &[Eni], save: &mut Checkpoint<'_>) -> Result<(), CloudError> {
        let ids: Vec<String> = enis.iter().map(|eni| eni.id.clone()).collect();
        let subnet_id = Some(self.subnet.subnet_id.clone());
        if (&pool.eni_ids, &pool.subnet_id, &pool.pending_claim) != (&ids, &subnet_id, &None) {
            (pool.eni_ids, pool.subnet_id, pool.pending_claim) = (ids, subnet_id, None);
            save(pool)?;
        }
        Ok(())
    }

    /// Refuses before anything is made what the cloud would refuse halfway.
    fn check_room(&self, pool: &Pool, enis: &[Eni]) -> Result<(), VolcengineError> {
        let shortfalls: usize = enis.iter().map(shortfall).sum();
        let needed = shortfalls + ENIS.saturating_sub(enis.len()) * (ADDRESSES_PER_ENI + 1);
        match self.subnet.available_ip_address_count {
            Some(available) if available < needed => Err(VolcengineError::NotEnoughAddresses {
                subnet: pool.config.subnet,
                id: self.subnet.subnet_id.clone(),
                available,
                needed,
            }),
            _ => Ok(()),
        }
    }

    /// Makes the ENIs that are missing, then waits until all are there: a new one is seen only after a moment, and is
    /// `Creating` for another.
    async fn create_missing(
        &self,
        pool: &mut Pool,
        enis: &mut Vec<Eni>,
        save: &mut Checkpoint<'_>,
        work: &mut Work,
    ) -> Result<(), CloudError> {
        let mut last = calls::interfaces_of_instance(&self.session.instance);
        if enis.len() < ENIS {
            let group = self.session.security_group().await?;
            for _ in enis.len()..ENIS {
                let name = calls::free_name(pool.config.node_name.as_str(), enis.iter().map(|eni| eni.name.as_str()));
                last = calls::create_interface(&self.subnet.subnet_id, &group, &name);
                let id = self.create(pool, &name, &last, save).await?;
                work.step(&format!("made {id}"));
                enis.push(Eni::new(id, name));
            }
        } else if enis.iter().all(|eni| eni.state() != EniState::Changing) {
            return Ok(());
        }
        *enis = self.session.all_at_rest(&pool.eni_ids, &last, self.limits.visible).await?;
        Ok(())
    }

    /// Makes one ENI. Its name is in `pool.json` before it is made, its id right afterwards.
    async fn create(
        &self,
        pool: &mut Pool,
        name: &str,
        call: &[String],
        save: &mut Checkpoint<'_>,
    ) -> Result<String, CloudError> {
        pool.pending_claim = Some(name.to_owned());
        save(pool)?;
        match self.session.call::<CreatedInterface>(call).await {
            Ok(created) => {
                pool.eni_ids.push(created.network_interface_id.clone());
                pool.pending_claim = None;
                save(pool)?;
                Ok(created.network_interface_id)
            }
            Err(error) => {
                if error.changed_nothing() {
                    pool.pending_claim = None;
                    save(pool)?;
                }
                Err(error.into())
            }
        }
    }

    /// Attaches an ENI to this instance. One after the other: the host names its interfaces in the order they come.
    async fn attach(&self, eni: &mut Eni, work: &mut Work) -> Result<(), CloudError> {
        if eni.state() == EniState::Available {
            let call = calls::attach(&eni.id, &self.session.instance);
            let answer = self.session.tell(&call).await;
            self.unless(answer, &eni.id, |now| now.state() != EniState::Available).await?;
            *eni = self.session.settled(&eni.id, EniState::InUse, &call, self.limits.attach).await?;
            work.step(&format!("attached {}", eni.id));
        }
        Ok(())
    }

    /// Gives an ENI the addresses that it lacks.
    async fn assign(&self, eni: &Eni, work: &mut Work) -> Result<(), CloudError> {
        let short = shortfall(eni);
        if short > 0 {
            let answer = self.session.tell(&calls::assign(&eni.id, short)).await;
            self.unless(answer, &eni.id, |now| shortfall(now) == 0).await?;
            work.step(&format!("assigned {short} addresses to {}", eni.id));
        }
        Ok(())
    }

    /// Passes a failure over if what the call should have done is done: an interrupted run had made the same call, and
    /// was seen too late.
    async fn unless(
        &self,
        answer: Result<(), CallError>,
        id: &str,
        done: impl Fn(&Eni) -> bool,
    ) -> Result<(), CloudError> {
        let Err(error) = answer else { return Ok(()) };
        match self.session.by_id(id).await {
            Ok(Some(now)) if done(&now) => {
                tracing::info!(%error, "it is done all the same");
                Ok(())
            }
            _ => Err(error.into()),
        }
    }

    /// The addresses of all ENIs, once each of them shows its twenty: lowest first, the gateway left out.
    async fn addresses(&self, pool: &Pool, enis: &[Eni], pool_size: usize) -> Result<Vec<Ipv4Addr>, CloudError> {
        let (ids, limit): (Vec<String>, _) = (enis.iter().map(|eni| eni.id.clone()).collect(), self.limits.visible);
        let mut short = None;
        let seen = wait_for(limit, async || {
            let enis = self.session.by_ids(&ids).await?;
            let lacks = |id: &&String| enis.iter().find(|eni| eni.id == **id).is_none_or(|eni| shortfall(eni) > 0);
            short = ids.iter().find(lacks).cloned();
            Ok::<_, CallError>(short.is_none().then_some(enis))
        });
        match (seen.await?, short) {
            (Some(enis), _) => Ok(leasable(&pool.config, &enis).into_iter().take(pool_size).collect()),
            (None, id) => {
                let id = id.unwrap_or_default();
                let missing = format!("{id} did not show {ADDRESSES_PER_ENI} secondary addresses");
                Err(self.session.no_effect(&calls::assign(&id, ADDRESSES_PER_ENI), missing, limit))
            }
        }
    }
}

/// How many secondary addresses an ENI lacks.
fn shortfall(eni: &Eni) -> usize {
    ADDRESSES_PER_ENI.saturating_sub(eni.secondary_addresses().count())
}

/// The calls that an ENI still needs.
fn steps(eni: &Eni, instance: &str) -> Vec<Args> {
    let attach = (eni.state() != EniState::InUse).then(|| calls::attach(&eni.id, instance));
    let assign = (shortfall(eni) > 0).then(|| calls::assign(&eni.id, shortfall(eni)));
    attach.into_iter().chain(assign).collect()
}

/// The secondary addresses that a VM can have, each once, lowest first.
fn leasable(config: &NodeConfig, enis: &[Eni]) -> BTreeSet<Ipv4Addr> {
    let (usable, odd): (BTreeSet<Ipv4Addr>, BTreeSet<Ipv4Addr>) = enis
        .iter()
        .flat_map(Eni::secondary_addresses)
        .filter(|ip| *ip != config.gateway)
        .partition(|ip| config.subnet.is_host(*ip));
    if !odd.is_empty() {
        tracing::warn!(addresses = ?odd, subnet = %config.subnet, "leaving out addresses that are no hosts of the subnet");
    }
    usable
}

/// Waits until the host has the interfaces of the ENIs.
async fn interfaces(wanted: &[InterfaceName], limits: Limits) -> Result<(), CloudError> {
    let missing = || -> Vec<InterfaceName> {
        wanted.iter().filter(|name| if_nametoindex(name.as_str()).is_err()).cloned().collect()
    };
    let there = wait_for(limits.attach, async || Ok::<_, CloudError>(missing().is_empty().then_some(()))).await?;
    match there {
        Some(()) => Ok(()),
        None => Err(CloudError::NoInterface { missing: missing(), after: limits.attach }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn eni(json: &str) -> Eni {
        serde_json::from_str(json).unwrap()
    }

    #[test]
    fn a_run_that_fails_says_how_far_it_came() {
        let config = NodeConfig {
            platform: crate::config::Platform::Volcengine,
            node_name: "n".parse().unwrap(),
            subnet: "10.0.0.0/24".parse().unwrap(),
            gateway: Ipv4Addr::new(10, 0, 0, 1),
            primary_nic: "eth0".parse().unwrap(),
            secondary_nics: Vec::new(),
            dns: Vec::new(),
            drops: crate::config::Drops::default(),
            mtu: None,
            cni_conf_dir: "/etc/cni/net.d".into(),
        };
        let mut pool = Pool::new(config, Vec::new());
        assert_eq!(SoFar::default().describe(&pool), "nothing yet");
        let so_far = SoFar { subnet_id: Some("subnet-1".into()), attached: 1, addressed: 0 };
        assert_eq!(so_far.describe(&pool), "the VPC subnet subnet-1, 0 of 7 ENIs");
        pool.eni_ids = vec!["eni-1".into(), "eni-2".into()];
        pool.pending_claim = Some("n-eni-3".into());
        assert_eq!(
            so_far.describe(&pool),
            "the VPC subnet subnet-1, 2 of 7 ENIs (eni-1, eni-2; 1 attached, 0 with all their addresses), \
             perhaps one more ENI, named n-eni-3"
        );
    }

    #[test]
    fn an_eni_needs_what_it_lacks() {
        let free = eni(r#"{"NetworkInterfaceId":"eni-1","Status":"Available"}"#);
        assert_eq!(steps(&free, "i-1"), [calls::attach("eni-1", "i-1"), calls::assign("eni-1", 20)]);
        let partly = eni(r#"{"NetworkInterfaceId":"eni-1","Status":"InUse","DeviceId":"i-1","PrivateIpSets":
            {"PrivateIpSet":[{"PrivateIpAddress":"10.0.0.3","Primary":true},{"PrivateIpAddress":"10.0.0.4"}]}}"#);
        assert_eq!(steps(&partly, "i-1"), [calls::assign("eni-1", 19)]);
    }
}
