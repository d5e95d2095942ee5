//! GKE: the VMs' subnet as an alias range on `nic0`, cut from the secondary range `cocoon-pods` of the VPC subnet.
//!
//! The range belongs to all nodes and stays; the alias is this node's. `gcloud` can only replace the whole list of
//! aliases, so others' entries are read first, written again, and looked for afterwards.

pub mod api;

use std::time::Duration;

use crate::cloud::gke::api::{Alias, Instance, Place, VpcSubnet};
use crate::cloud::limits::{Limits, wait_for};
use crate::cloud::metadata::{Metadata, MetadataError};
use crate::cloud::vendor::{Args, CallError, Cli};
use crate::cloud::{Checkpoint, CloudError, Provider, StatusRows};
use crate::config::Subnet;
use crate::pool::Pool;

/// Why the VPC does not allow what was asked.
#[derive(Debug, thiserror::Error)]
pub enum GkeError {
    /// The shared range is there, and the node's subnet is not inside it.
    #[error(
        "the secondary range {range} of the VPC subnet `{subnetwork}` is {have}, which does not cover --subnet {want}; \
         choose a --subnet inside it that no other node has, or make a larger range (it cannot be resized in place, \
         see docs/gke.md)", range = api::RANGE
    )]
    RangeTooSmall {
        /// The VPC subnet.
        subnetwork: String,
        /// The CIDR of the range.
        have: String,
        /// The VMs' subnet.
        want: Subnet,
    },
    /// The instance has no `nic0`.
    #[error("`{call}` shows no interface `nic0` on the instance; aliases can only be put there")]
    NoNic {
        /// The call that should have shown it.
        call: String,
    },
}

/// Google Cloud, through `gcloud`.
#[derive(Debug)]
pub struct Gke {
    gcloud: Cli,
    metadata: Metadata,
    limits: Limits,
}

impl Gke {
    /// Prepares to talk to Google Cloud with whatever account `gcloud` is logged in with.
    #[must_use]
    pub fn new(limits: Limits) -> Self {
        // Never a question on stdin, never a hint about updates.
        let env = ["CLOUDSDK_CORE_DISABLE_PROMPTS", "CLOUDSDK_COMPONENT_MANAGER_DISABLE_UPDATE_CHECK"]
            .map(|key| (key.to_owned(), "1".to_owned()));
        Self { gcloud: Cli::new("gcloud", env.into(), limits), metadata: Metadata::google(), limits }
    }

    async fn place(&self) -> Result<Place, MetadataError> {
        let last = |path: String| path.rsplit('/').next().unwrap_or_default().to_owned();
        Ok(Place {
            instance: self.metadata.get("/instance/name").await?,
            zone: last(self.metadata.get("/instance/zone").await?),
            project: self.metadata.get("/project/project-id").await?,
            subnetwork: last(self.metadata.get("/instance/network-interfaces/0/subnetwork").await?),
        })
    }

    async fn aliases(&self, place: &Place) -> Result<Vec<Alias>, CloudError> {
        let call = api::describe_instance(place);
        let instance: Instance = self.gcloud.json(&call).await?;
        instance.aliases().ok_or_else(|| GkeError::NoNic { call: self.gcloud.line(&call) }.into())
    }

    /// The call that is still needed for a range that covers the subnet, if any is.
    async fn missing_range(&self, place: &Place, subnet: Subnet) -> Result<Option<Args>, CloudError> {
        let found: VpcSubnet = self.gcloud.json(&api::describe_subnet(place)).await?;
        match found.range() {
            Some(range) if api::covers(range, subnet) => Ok(None),
            Some(range) => Err(GkeError::RangeTooSmall {
                subnetwork: place.subnetwork.clone(),
                have: range.to_owned(),
                want: subnet,
            }
            .into()),
            None => Ok(Some(api::add_range(place, subnet))),
        }
    }

    async fn ensure_range(&self, place: &Place, subnet: Subnet) -> Result<(), CloudError> {
        let Some(call) = self.missing_range(place, subnet).await? else { return Ok(()) };
        tracing::info!(range = api::RANGE, %subnet, subnetwork = %place.subnetwork, "adding the secondary range");
        if let Err(error) = self.gcloud.run(&call).await {
            // Another node may have added the range at the same moment.
            return match self.missing_range(place, subnet).await {
                Ok(None) => Ok(()),
                _ => Err(error.into()),
            };
        }
        let seen = wait_for(self.limits.visible, async || {
            Ok::<_, CloudError>(self.missing_range(place, subnet).await?.is_none().then_some(()))
        });
        seen.await?.ok_or_else(|| self.no_effect(&call, format!("the secondary range {} did not appear", api::RANGE)))
    }

    /// Replaces the aliases of `nic0`, then looks until they are what was asked for. What others add meanwhile is
    /// theirs: only what we set has to be there, and `gone` not.
    async fn set_aliases(&self, place: &Place, wanted: &[Alias], gone: &[Alias]) -> Result<(), CloudError> {
        let call = api::set_aliases(place, wanted);
        self.gcloud.run(&call).await?;
        let seen = wait_for(self.limits.visible, async || {
            let now = self.aliases(place).await?;
            let there = wanted.iter().all(|want| now.iter().any(|alias| alias.is(want)));
            let away = !now.iter().any(|alias| gone.iter().any(|gone| gone.is(alias)));
            Ok::<_, CloudError>((there && away).then_some(()))
        });
        seen.await?.ok_or_else(|| self.no_effect(&call, "the aliases of nic0 did not become these".to_owned()))
    }

    fn no_effect(&self, call: &[String], missing: String) -> CloudError {
        CallError::NoEffect { call: self.gcloud.line(call), missing, after: self.limits.visible }.into()
    }

    async fn claim(
        &self,
        pool: &mut Pool,
        save: &mut Checkpoint<'_>,
        made: &mut Vec<String>,
    ) -> Result<(), CloudError> {
        let (place, subnet) = (self.place().await?, pool.config.subnet);
        self.ensure_range(&place, subnet).await?;
        made.push(format!("the secondary range {} on the VPC subnet {}", api::RANGE, place.subnetwork));
        let ours = Alias::of(api::RANGE, subnet);
        if let Some(wanted) = api::with_ours(&self.aliases(&place).await?, &ours) {
            tracing::info!(alias = %ours, instance = %place.instance, "setting the alias on nic0");
            pool.pending_claim = Some(ours.to_string());
            save(pool)?;
            made.push(format!("perhaps the alias {ours} on nic0 of {}", place.instance));
            self.set_aliases(&place, &wanted, &[]).await?;
        }
        pool.pending_claim = None;
        Ok(())
    }

    async fn give_back(&self, pool: &Pool) -> Result<(), CloudError> {
        let place = self.place().await?;
        let ours = our_aliases(pool);
        // An init that was interrupted may have set it a moment ago.
        let limit = if pool.pending_claim.is_some() { self.limits.visible } else { Duration::ZERO };
        let rest =
            wait_for(limit, async || Ok::<_, CloudError>(api::without_ours(&self.aliases(&place).await?, &ours)));
        match rest.await? {
            Some(rest) => self.set_aliases(&place, &rest, &ours).await,
            None => {
                tracing::info!(alias = %list(&ours), instance = %place.instance, "not on nic0: nothing to remove");
                Ok(())
            }
        }
    }
}

impl Provider for Gke {
    async fn provision(&self, pool: &mut Pool, pool_size: usize, save: &mut Checkpoint<'_>) -> Result<(), CloudError> {
        let mut made = Vec::new();
        self.claim(pool, save, &mut made).await.map_err(|source| CloudError::Unfinished {
            made: if made.is_empty() { "nothing yet".to_owned() } else { made.join(", ") },
            source: Box::new(source),
        })?;
        pool.ips = pool.config.subnet.pool(pool.config.gateway, pool_size);
        pool.alias_range_name = Some(api::RANGE.to_owned());
        Ok(())
    }

    async fn status(&self, _: &Pool) -> Result<StatusRows, CloudError> {
        let aliases = self.aliases(&self.place().await?).await?;
        Ok(vec![("Aliases", if aliases.is_empty() { "(none)".to_owned() } else { list(&aliases) })])
    }

    async fn teardown(&self, pool: &mut Pool, _: &mut Checkpoint<'_>) -> Result<(), CloudError> {
        self.give_back(pool).await.map_err(|source| CloudError::NotGivenBack {
            left: format!("perhaps the alias {} on nic0", list(&our_aliases(pool))),
            source: Box::new(source),
        })
    }

    async fn provision_changes(&self, pool: &Pool) -> Result<Vec<String>, CloudError> {
        let place = self.place().await?;
        let subnet = pool.config.subnet;
        let range = self.missing_range(&place, subnet).await?;
        let alias = api::with_ours(&self.aliases(&place).await?, &Alias::of(api::RANGE, subnet))
            .map(|wanted| api::set_aliases(&place, &wanted));
        Ok(range.iter().chain(&alias).map(|call| self.gcloud.line(call)).collect())
    }

    async fn teardown_changes(&self, pool: &Pool) -> Result<Vec<String>, CloudError> {
        let place = self.place().await?;
        let rest = api::without_ours(&self.aliases(&place).await?, &our_aliases(pool));
        Ok(rest.iter().map(|rest| self.gcloud.line(&api::set_aliases(&place, rest))).collect())
    }
}

/// The alias of a node, and one that an interrupted init may have set for another subnet. State of an older version does
/// not name the range.
fn our_aliases(pool: &Pool) -> Vec<Alias> {
    let range = pool.alias_range_name.as_deref().unwrap_or(api::RANGE);
    let ours = Alias::of(range, pool.config.subnet);
    let pending = pool.pending_claim.as_deref().map(Alias::parse).filter(|pending| !pending.is(&ours));
    std::iter::once(ours).chain(pending).collect()
}

fn list(aliases: &[Alias]) -> String {
    aliases.iter().map(Alias::to_string).collect::<Vec<_>>().join(", ")
}
