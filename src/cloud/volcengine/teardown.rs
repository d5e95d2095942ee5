//! Giving back: each ENI of this node is detached and deleted, and leaves `pool.json` once it is gone from the cloud.
//! One that will not go does not keep the others.

use std::time::Duration;

use crate::cloud::limits::wait_for;
use crate::cloud::vendor::{Args, CallError};
use crate::cloud::volcengine::Volcengine;
use crate::cloud::volcengine::answers::{Eni, EniState};
use crate::cloud::volcengine::calls;
use crate::cloud::volcengine::session::Session;
use crate::cloud::{Checkpoint, CloudError};
use crate::log::chain;
use crate::pool::Pool;

/// The ENIs of this node: their ids, and those of them that the cloud shows.
#[derive(Debug, Default)]
struct Ours {
    ids: Vec<String>,
    seen: Vec<Eni>,
}

impl Volcengine {
    pub(super) async fn give_back(&self, pool: &mut Pool, save: &mut Checkpoint<'_>) -> Result<(), CloudError> {
        let found = async {
            let session = self.session().await?;
            find(&session, pool, self.limits.visible).await.map(|ours| (session, ours))
        };
        let (session, ours) = found.await.map_err(|source| not_given_back(pool, source))?;
        if pool.eni_ids != ours.ids || pool.pending_claim.is_some() {
            (pool.eni_ids, pool.pending_claim) = (ours.ids.clone(), None);
            save(pool)?;
        }

        let (mut deleted, mut failed) = (Vec::new(), None);
        let mut work = self.progress.begin("ENIs given back", ours.ids.len());
        for id in &ours.ids {
            match self.delete(&session, id, ours.seen.iter().find(|eni| eni.id == *id)).await {
                Ok(()) => {
                    work.step(&format!("deleted {id}"));
                    deleted.push(id.clone());
                }
                Err(error) => {
                    tracing::error!(%id, error = %chain(&error), "this ENI will not go; going on with the others");
                    failed.get_or_insert(error);
                }
            }
        }
        let left = session.still_there(&deleted).await;
        let left = left.map_err(|source| not_given_back(pool, source.into()))?;
        if let Some(id) = left.first() {
            let missing = format!("{id} was still there");
            failed.get_or_insert(session.no_effect(&calls::delete(id), missing, self.limits.visible));
        }
        if !deleted.is_empty() {
            pool.eni_ids.retain(|id| left.contains(id) || !deleted.contains(id));
            save(pool)?;
        }
        failed.map_or(Ok(()), |source| Err(not_given_back(pool, source)))
    }

    /// Detaches an ENI if it is attached, then deletes it.
    async fn delete(&self, session: &Session<'_>, id: &str, eni: Option<&Eni>) -> Result<(), CloudError> {
        let delete = calls::delete(id);
        let state = match eni.map(Eni::state) {
            Some(EniState::Changing) => self.at_rest(session, id).await?,
            // Not seen may mean made a moment ago: the cloud itself has to say that there is nothing to delete.
            None => match session.tell(&delete).await {
                Err(error) if !error.is_not_found() => Some(self.appeared(session, id, error).await?),
                _ => return Ok(()),
            },
            state => state,
        };
        if state == Some(EniState::InUse) {
            self.detach(session, id).await?;
        }
        match session.tell(&delete).await {
            Err(error) if error.is_not_found() => Ok(()),
            answer => Ok(answer?),
        }
    }

    async fn detach(&self, session: &Session<'_>, id: &str) -> Result<(), CloudError> {
        let detach = calls::detach(id, &session.instance);
        if let Err(error) = session.tell(&detach).await {
            // An interrupted run may have detached it, and be seen only now.
            match self.at_rest(session, id).await {
                Ok(Some(EniState::Available) | None) => tracing::info!(%error, "it is detached all the same"),
                _ => return Err(error.into()),
            }
        }
        session.settled(id, EniState::Available, &detach, self.limits.attach).await.map(drop)
    }

    /// Waits for an ENI that was not seen, and that the cloud did not delete for this reason.
    async fn appeared(&self, session: &Session<'_>, id: &str, refused: CallError) -> Result<EniState, CloudError> {
        let seen = wait_for(self.limits.visible, async || {
            let state = session.by_id(id).await?.map(|eni| eni.state());
            Ok::<_, CallError>(state.filter(|state| *state != EniState::Changing))
        });
        seen.await?.ok_or_else(|| refused.into())
    }

    /// Waits for an ENI that is being attached, detached or deleted; `None` when it is gone.
    async fn at_rest(&self, session: &Session<'_>, id: &str) -> Result<Option<EniState>, CloudError> {
        let limit = self.limits.attach;
        let rest = wait_for(limit, async || {
            Ok::<_, CallError>(match session.by_id(id).await?.map(|eni| eni.state()) {
                Some(EniState::Changing) => None,
                rest => Some(rest),
            })
        });
        let missing = || format!("{id} was neither available nor in use");
        rest.await?.ok_or_else(|| session.no_effect(&calls::interfaces_by_id(&[id.to_owned()]), missing(), limit))
    }

    /// The calls that `give_back` would make, for a dry run.
    pub(super) async fn removals(&self, pool: &Pool) -> Result<Vec<String>, CloudError> {
        let session = self.session().await?;
        let ours = find(&session, pool, Duration::ZERO).await?;
        let calls = ours.seen.iter().flat_map(|eni| -> Vec<Args> {
            let detach = (eni.state() != EniState::Available).then(|| calls::detach(&eni.id, &session.instance));
            detach.into_iter().chain([calls::delete(&eni.id)]).collect()
        });
        Ok(calls.map(|call| session.line(&call)).collect())
    }
}

/// This node's ENIs: those of `pool.json`, less any that somebody attached to another instance, and one that was being
/// made when a run was interrupted, which is looked for until `limit`. State of the Go program records none, not even
/// the subnet: then those attached to this instance in our subnet.
async fn find(session: &Session<'_>, pool: &Pool, limit: Duration) -> Result<Ours, CloudError> {
    if pool.eni_ids.is_empty() && pool.subnet_id.is_none() {
        let Some(subnet) = session.subnet(pool.config.subnet).await? else { return Ok(Ours::default()) };
        let seen = session.attached_in(&subnet.subnet_id).await?;
        return Ok(Ours { ids: seen.iter().map(|eni| eni.id.clone()).collect(), seen });
    }
    let elsewhere = |eni: &Eni| !eni.device_id.is_empty() && eni.device_id != session.instance;
    let known = session.by_ids(&pool.eni_ids).await?;
    let (theirs, mut seen): (Vec<Eni>, Vec<Eni>) =
        known.into_iter().partition(|eni| elsewhere(eni) || !eni.may_be_ours());
    for eni in &theirs {
        tracing::warn!(id = %eni.id, instance = %eni.device_id, "an ENI of pool.json belongs to somebody else: it stays");
    }
    let mut ids = pool.eni_ids.clone();
    ids.retain(|id| !theirs.iter().any(|eni| eni.id == *id));
    if let (Some(name), Some(subnet_id)) = (&pool.pending_claim, &pool.subnet_id)
        && let Some(eni) = session.interrupted(name, subnet_id, &pool.eni_ids, limit).await?
    {
        ids.push(eni.id.clone());
        seen.push(eni);
    }
    Ok(Ours { ids, seen })
}

fn not_given_back(pool: &Pool, source: CloudError) -> CloudError {
    let left = match pool.eni_ids.as_slice() {
        [] => "nothing that pool.json records, but perhaps ENIs of this instance in its subnet".to_owned(),
        ids => format!("{} ENIs ({})", ids.len(), ids.join(", ")),
    };
    CloudError::NotGivenBack { left, source: Box::new(source) }
}
