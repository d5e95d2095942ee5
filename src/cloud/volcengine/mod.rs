//! Volcengine: secondary private addresses on secondary ENIs, all in a VPC subnet of the node's own.
//!
//! The id of each ENI is in `pool.json` before the next is made, and the name of one is there before it is made, so
//! that a run that is interrupted at any moment leaves nothing that the next run, or `teardown`, would not find.

pub mod answers;
pub mod calls;
pub mod credentials;
mod provision;
mod session;
mod teardown;

use crate::cloud::limits::Limits;
use crate::cloud::metadata::{Metadata, MetadataError};
use crate::cloud::progress::Progress;
use crate::cloud::volcengine::credentials::{CredentialsError, Environment};
use crate::cloud::volcengine::session::Session;
use crate::cloud::{Checkpoint, CloudError, Provider, StatusRows};
use crate::config::Subnet;
use crate::pool::Pool;

/// Secondary ENIs of a node: an instance with room for eight has its primary one besides.
const ENIS: usize = 7;

/// Secondary addresses on each.
const ADDRESSES_PER_ENI: usize = 20;

/// Why the VPC does not allow what was asked.
#[derive(Debug, thiserror::Error)]
pub enum VolcengineError {
    /// The VPC has no security group.
    #[error("the VPC {vpc} has no security group to put ENIs into; make one that allows traffic inside the VPC")]
    NoSecurityGroup {
        /// The VPC.
        vpc: String,
    },
    /// The subnet does not have enough free addresses.
    #[error(
        "the VPC subnet {subnet} ({id}) has {available} free addresses and {needed} more are needed, for {ENIS} ENIs \
         with {ADDRESSES_PER_ENI} addresses each; use a --subnet of at least /24 that nothing else is in, or delete \
         unattached ENIs there"
    )]
    NotEnoughAddresses {
        /// The VMs' subnet.
        subnet: Subnet,
        /// Its id.
        id: String,
        /// What it has.
        available: usize,
        /// What is needed.
        needed: usize,
    },
    /// An ENI of an earlier run is in another subnet.
    #[error(
        "the ENI {id} of an earlier init is in the VPC subnet {have}, not in {want}; run `cocoon-net teardown` before \
         giving this node another --subnet"
    )]
    OtherSubnet {
        /// The ENI.
        id: String,
        /// Where it is.
        have: String,
        /// Where it would have to be.
        want: String,
    },
}

/// Volcengine, through `ve`.
#[derive(Debug)]
pub struct Volcengine {
    environment: Environment,
    metadata: Metadata,
    limits: Limits,
    progress: Progress,
}

impl Volcengine {
    /// Prepares to talk to Volcengine.
    ///
    /// # Errors
    /// When there are no credentials.
    pub fn new(limits: Limits, progress: Progress) -> Result<Self, CredentialsError> {
        Ok(Self { environment: credentials::find()?, metadata: Metadata::volcengine(), limits, progress })
    }

    async fn session(&self) -> Result<Session<'_>, MetadataError> {
        Session::begin(&self.environment, &self.metadata, self.limits).await
    }
}

impl Provider for Volcengine {
    async fn provision(&self, pool: &mut Pool, pool_size: usize, save: &mut Checkpoint<'_>) -> Result<(), CloudError> {
        let mut so_far = provision::SoFar::default();
        let done = self.claim(pool, pool_size, save, &mut so_far).await;
        done.map_err(|source| CloudError::Unfinished { made: so_far.describe(pool), source: Box::new(source) })
    }

    async fn status(&self, pool: &Pool) -> Result<StatusRows, CloudError> {
        let session = self.session().await?;
        let subnet_id = match &pool.subnet_id {
            Some(id) => Some(id.clone()),
            None => session.subnet(pool.config.subnet).await?.map(|subnet| subnet.subnet_id),
        };
        let mut enis = match &subnet_id {
            Some(id) => session.attached_in(id).await?,
            None => Vec::new(),
        };
        enis.retain(|eni| pool.eni_ids.is_empty() || pool.eni_ids.contains(&eni.id));
        Ok(vec![("ENIs", enis.len().to_string()), ("SubnetID", subnet_id.unwrap_or_else(|| "(none)".to_owned()))])
    }

    async fn teardown(&self, pool: &mut Pool, save: &mut Checkpoint<'_>) -> Result<(), CloudError> {
        self.give_back(pool, save).await
    }

    async fn provision_changes(&self, pool: &Pool) -> Result<Vec<String>, CloudError> {
        self.missing(pool).await
    }

    async fn teardown_changes(&self, pool: &Pool) -> Result<Vec<String>, CloudError> {
        self.removals(pool).await
    }
}
