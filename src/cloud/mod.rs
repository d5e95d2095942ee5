//! The clouds that lend the addresses.
//!
//! Three verbs: `provision` claims the pool's addresses, `status` shows them, `teardown` gives back exactly what was
//! claimed. Beside them, what a dry run shows: the calls that would change something.
//!
//! | where | what |
//! |---|---|
//! | [`metadata`] | which cloud this is, and where in it |
//! | [`gke`] | an alias range on `nic0`, through `gcloud` |
//! | [`volcengine`] | secondary addresses on seven secondary ENIs, through `ve` |
//! | [`vendor`] | the runner for both CLIs |
//! | [`limits`] | deadlines, and waiting without fixed sleeps |
//! | [`progress`] | what an operator sees meanwhile |
//!
//! Every failure is one that can be carried on from: what was made is in `pool.json` before the next thing is made, and
//! the error says what there is so far.

pub mod gke;
pub mod limits;
pub mod metadata;
pub mod progress;
pub mod vendor;
pub mod volcengine;

use crate::cloud::gke::{Gke, GkeError};
use crate::cloud::limits::Limits;
use crate::cloud::metadata::MetadataError;
use crate::cloud::progress::Progress;
use crate::cloud::vendor::CallError;
use crate::cloud::volcengine::credentials::CredentialsError;
use crate::cloud::volcengine::{Volcengine, VolcengineError};
use crate::config::{InterfaceName, Platform};
use crate::files::FileError;
use crate::pool::Pool;

/// Saves the pool as it is now. Called after each step that another run has to know of.
pub type Checkpoint<'a> = dyn FnMut(&mut Pool) -> Result<(), FileError> + 'a;

/// Rows that a cloud adds to `status`: label (without the colon) and value.
pub type StatusRows = Vec<(&'static str, String)>;

/// Why the cloud did not give, show or take back the addresses.
#[derive(Debug, thiserror::Error)]
pub enum CloudError {
    /// The metadata server did not say where this instance is.
    #[error(transparent)]
    Metadata(#[from] MetadataError),
    /// There are no credentials.
    #[error(transparent)]
    Credentials(#[from] CredentialsError),
    /// A call of the vendor's CLI failed.
    #[error(transparent)]
    Call(#[from] CallError),
    /// What the cloud holds does not allow it (GKE).
    #[error(transparent)]
    Gke(#[from] GkeError),
    /// What the cloud holds does not allow it (Volcengine).
    #[error(transparent)]
    Volcengine(#[from] VolcengineError),
    /// The state could not be saved.
    #[error(transparent)]
    File(#[from] FileError),
    /// The interfaces were attached, but did not all appear on the host.
    #[error(
        "{} did not appear on this host within {} s after the ENIs had been attached; look for it with `ip link`, and \
         in the kernel log for why", names(.missing), .after.as_secs_f32()
    )]
    NoInterface {
        /// Those that are not there.
        missing: Vec<InterfaceName>,
        /// How long was waited.
        after: std::time::Duration,
    },
    /// Addresses were being claimed when something failed.
    #[error(
        "not all addresses could be claimed; so far there is in the cloud: {made}. `cocoon-net init` with the same \
         arguments carries on from there, `cocoon-net teardown` gives it back"
    )]
    Unfinished {
        /// What there is so far.
        made: String,
        /// What failed.
        source: Box<CloudError>,
    },
    /// Not everything could be given back.
    #[error(
        "not everything was given back to the cloud. Still there: {left}. pool.json keeps it: run \
         `cocoon-net teardown` again once the cause is gone"
    )]
    NotGivenBack {
        /// What is still there.
        left: String,
        /// What failed, first.
        source: Box<CloudError>,
    },
}

/// The three verbs of a cloud, and what a dry run needs.
///
/// `pool` is the state as it stands, addresses and ENI ids of an earlier run included. What is replaced in it is
/// replaced once the new values are in hand.
pub(crate) trait Provider {
    /// Claims the addresses and puts them into `pool`: `pool_size` of them, fewer when the cloud holds fewer. What is
    /// claimed already is kept, so a second run changes nothing.
    async fn provision(&self, pool: &mut Pool, pool_size: usize, save: &mut Checkpoint<'_>) -> Result<(), CloudError>;

    /// What the cloud holds for this node.
    async fn status(&self, pool: &Pool) -> Result<StatusRows, CloudError>;

    /// Gives back what was claimed for this node, and nothing else.
    async fn teardown(&self, pool: &mut Pool, save: &mut Checkpoint<'_>) -> Result<(), CloudError>;

    /// The calls by which `provision` would change something.
    async fn provision_changes(&self, pool: &Pool) -> Result<Vec<String>, CloudError>;

    /// The calls by which `teardown` would change something.
    async fn teardown_changes(&self, pool: &Pool) -> Result<Vec<String>, CloudError>;
}

/// The cloud of a platform.
#[derive(Debug)]
pub enum Cloud {
    /// Google Cloud.
    Gke(Gke),
    /// Volcengine.
    Volcengine(Volcengine),
    /// No cloud: no call is ever made.
    None,
}

/// Runs one verb of whichever cloud this is; without a cloud, the last expression.
macro_rules! dispatch {
    ($cloud:expr, $provider:ident => $verb:expr, $nothing:expr) => {
        match $cloud {
            Cloud::Gke($provider) => $verb.await,
            Cloud::Volcengine($provider) => $verb.await,
            Cloud::None => $nothing,
        }
    };
}

impl Cloud {
    /// Prepares to talk to a platform's cloud. Reads credentials, asks nobody.
    ///
    /// # Errors
    /// [`CloudError::Credentials`] when there are none where the platform needs them.
    pub fn connect(platform: Platform, limits: Limits, progress: Progress) -> Result<Self, CloudError> {
        Ok(match platform {
            Platform::Gke => Self::Gke(Gke::new(limits)),
            Platform::Volcengine => Self::Volcengine(Volcengine::new(limits, progress)?),
            Platform::None => Self::None,
        })
    }

    /// Claims the addresses and puts them into `pool`, which is saved by `save` after each step that another run has
    /// to know of. The caller saves the final state. Safe to run again, over a node that works as well as over one
    /// where an earlier run was interrupted. Without a cloud the pool is the first hosts of the subnet.
    ///
    /// # Errors
    /// [`CloudError::Unfinished`], saying what there is so far; its source says which call failed and how.
    pub async fn provision(
        &self,
        pool: &mut Pool,
        pool_size: usize,
        save: &mut Checkpoint<'_>,
    ) -> Result<(), CloudError> {
        dispatch!(self, cloud => cloud.provision(pool, pool_size, save), {
            pool.ips = pool.config.subnet.pool(pool.config.gateway, pool_size);
            Ok(())
        })
    }

    /// The rows that this cloud adds to `status`.
    ///
    /// # Errors
    /// When the cloud cannot be asked; `status` then leaves the rows out.
    pub async fn status(&self, pool: &Pool) -> Result<StatusRows, CloudError> {
        dispatch!(self, cloud => cloud.status(pool), Ok(Vec::new()))
    }

    /// Gives back what was claimed for this node, and nothing else. Safe to run again.
    ///
    /// # Errors
    /// [`CloudError::NotGivenBack`]; `pool` and what `save` wrote then hold what is left.
    pub async fn teardown(&self, pool: &mut Pool, save: &mut Checkpoint<'_>) -> Result<(), CloudError> {
        dispatch!(self, cloud => cloud.teardown(pool, save), Ok(()))
    }

    /// The calls by which [`Cloud::provision`] would change something, as command lines. Only reads.
    ///
    /// # Errors
    /// When the cloud cannot be asked.
    pub async fn provision_changes(&self, pool: &Pool) -> Result<Vec<String>, CloudError> {
        dispatch!(self, cloud => cloud.provision_changes(pool), Ok(Vec::new()))
    }

    /// The calls by which [`Cloud::teardown`] would change something, as command lines. Only reads.
    ///
    /// # Errors
    /// When the cloud cannot be asked.
    pub async fn teardown_changes(&self, pool: &Pool) -> Result<Vec<String>, CloudError> {
        dispatch!(self, cloud => cloud.teardown_changes(pool), Ok(Vec::new()))
    }
}

fn names(interfaces: &[InterfaceName]) -> String {
    interfaces.iter().map(InterfaceName::as_str).collect::<Vec<_>>().join(", ")
}
