//! Talking to Volcengine: where this instance is, and one method for each thing that is asked or told.

use std::collections::HashSet;
use std::time::Duration;

use serde::de::DeserializeOwned;

use crate::cloud::CloudError;
use crate::cloud::limits::{Limits, wait_for};
use crate::cloud::metadata::{Metadata, MetadataError};
use crate::cloud::vendor::{CallError, Cli};
use crate::cloud::volcengine::VolcengineError;
use crate::cloud::volcengine::answers::{
    CreatedSubnet, Eni, EniState, Envelope, Listed, Page, SecurityGroup, VpcSubnet,
};
use crate::cloud::volcengine::calls;
use crate::cloud::volcengine::credentials::{self, Environment};
use crate::config::Subnet;

/// More pages than any list we read can have; an API that never comes to an end is not followed for ever.
const MOST_PAGES: usize = 1000;

/// A conversation with the cloud on behalf of this instance.
#[derive(Debug)]
pub struct Session<'a> {
    ve: Cli,
    metadata: &'a Metadata,
    limits: Limits,
    /// The VPC that the instance is in.
    pub vpc: String,
    /// The instance.
    pub instance: String,
}

impl<'a> Session<'a> {
    /// Finds out where this instance is. A region that the credentials do not name is told from the zone.
    ///
    /// # Errors
    /// When the metadata server does not say.
    pub async fn begin(
        environment: &Environment,
        metadata: &'a Metadata,
        limits: Limits,
    ) -> Result<Self, MetadataError> {
        let (vpc, instance) = (metadata.get("/vpc-id").await?, metadata.get("/instance-id").await?);
        let mut environment = environment.clone();
        if !credentials::has_region(&environment) {
            environment.push(credentials::region(credentials::region_of(&zone(metadata).await?)));
        }
        Ok(Self { ve: Cli::new("ve", environment, limits), metadata, limits, vpc, instance })
    }

    /// A call as an operator would type it.
    #[must_use]
    pub fn line(&self, call: &[String]) -> String {
        self.ve.line(call)
    }

    /// The error for a call that succeeded, without this coming true in time.
    #[must_use]
    pub fn no_effect(&self, call: &[String], missing: String, after: Duration) -> CloudError {
        CallError::NoEffect { call: self.line(call), missing, after }.into()
    }

    /// Makes a call and reads the result out of the envelope. An error in the envelope fails the call whatever the
    /// exit status.
    ///
    /// # Errors
    /// [`CallError`].
    pub async fn call<T: DeserializeOwned>(&self, call: &[String]) -> Result<T, CallError> {
        self.call_with(call, Envelope::result).await
    }

    /// Makes a call of which only the success matters.
    ///
    /// # Errors
    /// [`CallError`].
    pub async fn tell(&self, call: &[String]) -> Result<(), CallError> {
        self.call::<serde_json::Value>(call).await.map(drop)
    }

    /// A call that is refused because too many are made, by many nodes at once say, is made again after a while.
    async fn call_with<T>(
        &self,
        call: &[String],
        read: impl Fn(Envelope) -> Result<T, serde_json::Error>,
    ) -> Result<T, CallError> {
        let mut answer = self.call_once(call, &read).await;
        let mut first = true;
        wait_for(self.limits.visible, async || {
            if !std::mem::take(&mut first) {
                answer = self.call_once(call, &read).await;
            }
            Ok::<_, CallError>((!answer.as_ref().is_err_and(CallError::is_throttled)).then_some(()))
        })
        .await?;
        answer
    }

    async fn call_once<T>(
        &self,
        call: &[String],
        read: impl Fn(Envelope) -> Result<T, serde_json::Error>,
    ) -> Result<T, CallError> {
        let output = self.ve.output(call).await?;
        let envelope = serde_json::from_slice::<Envelope>(&output.stdout);
        if let Some((code, message, request_id)) = envelope.as_ref().ok().and_then(Envelope::refusal) {
            return Err(CallError::Refused { call: self.line(call), code, message, request_id });
        }
        if !output.status.success() {
            return Err(self.ve.failed(call, &output));
        }
        envelope.and_then(read).map_err(|source| self.ve.junk(call, &output, source))
    }

    /// A whole list, read to its last page.
    async fn list<T: Listed>(&self, call: &[String]) -> Result<Vec<T>, CallError> {
        let mut all = Vec::new();
        for number in 1..=MOST_PAGES {
            let read = |envelope: Envelope| envelope.result().and_then(Page::read);
            let page: Page<T> = self.call_with(&calls::page(call, number), read).await?;
            let followed = page.is_followed(all.len() + page.items.len());
            all.extend(page.items);
            if !followed {
                break;
            }
        }
        Ok(all)
    }

    /// The security group for new ENIs: the first of the VPC.
    ///
    /// # Errors
    /// [`CallError`], and when the VPC has none.
    pub async fn security_group(&self) -> Result<String, CloudError> {
        let first = self.list::<SecurityGroup>(&calls::describe_security_groups(&self.vpc)).await?.into_iter().next();
        Ok(first.ok_or_else(|| VolcengineError::NoSecurityGroup { vpc: self.vpc.clone() })?.security_group_id)
    }

    /// The VMs' subnet in the VPC, if there is one.
    ///
    /// # Errors
    /// [`CallError`].
    pub async fn subnet(&self, subnet: Subnet) -> Result<Option<VpcSubnet>, CallError> {
        let all = self.list::<VpcSubnet>(&calls::describe_subnets(&self.vpc)).await?;
        Ok(all.into_iter().find(|candidate| candidate.is(subnet)))
    }

    /// The call that makes the VMs' subnet, in this instance's zone.
    ///
    /// # Errors
    /// When the metadata server does not say which zone this is.
    pub async fn create_subnet_call(&self, subnet: Subnet, node: &str) -> Result<Vec<String>, MetadataError> {
        Ok(calls::create_subnet(&self.vpc, subnet, &zone(self.metadata).await?, node))
    }

    /// The VMs' subnet, made if it is not there, and ready to have ENIs in it.
    ///
    /// # Errors
    /// [`CallError`].
    pub async fn ensure_subnet(&self, subnet: Subnet, node: &str) -> Result<VpcSubnet, CloudError> {
        let call = match self.subnet(subnet).await? {
            Some(ready) if ready.is_ready() => return Ok(ready),
            Some(_) => calls::describe_subnets(&self.vpc),
            None => self.create_subnet(subnet, node).await?,
        };
        let limit = self.limits.visible;
        let ready =
            wait_for(limit, async || Ok::<_, CallError>(self.subnet(subnet).await?.filter(VpcSubnet::is_ready)));
        ready.await?.ok_or_else(|| self.no_effect(&call, format!("the subnet {subnet} was not available"), limit))
    }

    async fn create_subnet(&self, subnet: Subnet, node: &str) -> Result<Vec<String>, CloudError> {
        let call = self.create_subnet_call(subnet, node).await?;
        tracing::info!(%subnet, vpc = %self.vpc, "making the VPC subnet");
        match self.call::<CreatedSubnet>(&call).await {
            Ok(created) => tracing::info!(%subnet, id = %created.subnet_id, "made the VPC subnet"),
            // Another run may have made it at the same moment, or an interrupted one be seen only now.
            Err(error) => match self.subnet(subnet).await {
                Ok(Some(_)) => tracing::info!(%error, "the VPC subnet is there all the same"),
                _ => return Err(error.into()),
            },
        }
        Ok(call)
    }

    /// The secondary ENIs that are attached to this instance in a subnet.
    ///
    /// # Errors
    /// [`CallError`].
    pub async fn attached_in(&self, subnet_id: &str) -> Result<Vec<Eni>, CallError> {
        let mut all: Vec<Eni> = self.list(&calls::interfaces_of_instance(&self.instance)).await?;
        all.retain(|eni| eni.may_be_ours() && eni.subnet_id == subnet_id && eni.device_id == self.instance);
        Ok(all)
    }

    /// The ENIs with these ids, as far as the cloud knows them.
    ///
    /// # Errors
    /// [`CallError`].
    pub async fn by_ids(&self, ids: &[String]) -> Result<Vec<Eni>, CallError> {
        if ids.is_empty() {
            return Ok(Vec::new());
        }
        let wanted: HashSet<&String> = ids.iter().collect();
        let mut found: Vec<Eni> = match self.list(&calls::interfaces_by_id(ids)).await {
            // One that is gone must not hide the others.
            Err(error) if error.is_not_found() && ids.len() > 1 => {
                let mut found = Vec::new();
                for id in ids {
                    found.extend(self.by_id(id).await?);
                }
                return Ok(found);
            }
            Err(error) if error.is_not_found() => Vec::new(),
            answer => answer?,
        };
        found.retain(|eni| wanted.contains(&eni.id));
        Ok(found)
    }

    /// The ENI with this id, if the cloud knows it.
    ///
    /// # Errors
    /// [`CallError`].
    pub async fn by_id(&self, id: &str) -> Result<Option<Eni>, CallError> {
        Ok(Box::pin(self.by_ids(&[id.to_owned()])).await?.into_iter().next())
    }

    /// An ENI of this name in this subnet that is attached to nothing, or to this instance: what became of a call that
    /// was interrupted before it could say the id. It may be seen only after a moment.
    ///
    /// # Errors
    /// [`CallError`].
    pub async fn interrupted(
        &self,
        name: &str,
        subnet_id: &str,
        known: &[String],
        limit: Duration,
    ) -> Result<Option<Eni>, CallError> {
        tracing::info!(name, "looking for an ENI that an interrupted run may have made");
        wait_for(limit, async || {
            let all: Vec<Eni> = self.list(&calls::interfaces_in_subnet(subnet_id)).await?;
            Ok(all.into_iter().find(|eni| {
                let free = eni.device_id.is_empty() || eni.device_id == self.instance;
                eni.name == name && eni.subnet_id == subnet_id && eni.may_be_ours() && free && !known.contains(&eni.id)
            }))
        })
        .await
    }

    /// Waits until an ENI is in this state.
    ///
    /// # Errors
    /// [`CallError`]; [`CallError::NoEffect`] for `call` when it is not by the deadline.
    pub async fn settled(
        &self,
        id: &str,
        state: EniState,
        call: &[String],
        limit: Duration,
    ) -> Result<Eni, CloudError> {
        let seen =
            wait_for(limit, async || Ok::<_, CallError>(self.by_id(id).await?.filter(|eni| eni.state() == state)));
        seen.await?.ok_or_else(|| self.no_effect(call, format!("{id} was not {state}"), limit))
    }

    /// Waits until all these ENIs are there, none of them between two states; in the order of the ids.
    ///
    /// # Errors
    /// [`CallError`]; [`CallError::NoEffect`] for `call` when one is not by the deadline.
    pub async fn all_at_rest(&self, ids: &[String], call: &[String], limit: Duration) -> Result<Vec<Eni>, CloudError> {
        let mut restless = String::new();
        let seen = wait_for(limit, async || {
            let found = self.by_ids(ids).await?;
            let at_rest = |id: &String| found.iter().find(|eni| eni.id == *id && eni.state() != EniState::Changing);
            if let Some(id) = ids.iter().find(|id| at_rest(id).is_none()) {
                restless.clone_from(id);
                return Ok::<_, CallError>(None);
            }
            Ok(Some(ids.iter().filter_map(at_rest).cloned().collect()))
        });
        seen.await?.ok_or_else(|| self.no_effect(call, format!("{restless} was not available"), limit))
    }

    /// The ENIs of these that are still there after they have been given time to go.
    ///
    /// # Errors
    /// [`CallError`].
    pub async fn still_there(&self, ids: &[String]) -> Result<Vec<String>, CallError> {
        let mut left = Vec::new();
        wait_for(self.limits.visible, async || {
            left = self.by_ids(ids).await?.into_iter().map(|eni| eni.id).collect();
            Ok::<_, CallError>(left.is_empty().then_some(()))
        })
        .await?;
        Ok(left)
    }
}

async fn zone(metadata: &Metadata) -> Result<String, MetadataError> {
    metadata.get("/placement/availability-zone").await
}
