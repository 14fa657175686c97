//! `MappingService`: for each RPC who calls, and whether it was answered
//! before. What it does stands in [`bounced`], [`pipeline`], [`direct`], [`table`]
//! and [`translation`].

use std::sync::Arc;

use domaind_proto::v1::mapping_service_server::MappingService;
use domaind_proto::v1::{self, Refusal};
use domaind_proto::{Message, convert};
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, Streaming};

use super::caller::{Agent, session};
use super::pipeline::{self, Pipeline};
use super::{bounced, direct, room, table, translation};
use crate::hosted::Hosted;
use crate::live::Live;
use crate::offload::off_worker;
use crate::queue::{Queue, Queued};
use crate::registry::Registry;
use crate::replay::{Repeatable, Turn};
use crate::settle;
use crate::terms::InForce;
use crate::visitor::Need;

#[derive(Debug)]
pub(crate) struct Mappings {
    pub(crate) registry: Arc<Registry>,
    pub(crate) terms: InForce,
    pub(crate) queues: Queues,
    pub(crate) stop: CancellationToken,
}

/// Where calls wait that would be too much together.
#[derive(Clone, Debug)]
pub(crate) struct Queues {
    pub(crate) large_calls: Queue,
    pub(crate) table_streams: Queue,
}

type Answered<R> = Result<Response<R>, Status>;

#[tonic::async_trait]
impl MappingService for Mappings {
    async fn map(&self, request: Request<v1::MapRequest>) -> Answered<v1::MapResponse> {
        let (session, request, turn) = self.for_session(request).await?;
        answer(room::finding(&session, &request, turn, bounced::map).await)
    }

    async fn unmap(&self, request: Request<v1::UnmapRequest>) -> Answered<v1::UnmapResponse> {
        let (session, request, turn) = self.for_session(request).await?;
        answer(turn.take(|| bounced::unmap(&session, &request)))
    }

    async fn sync(&self, request: Request<v1::SyncRequest>) -> Answered<v1::SyncResponse> {
        let (session, request, turn) = self.for_session(request).await?;
        answer(turn.take(|| bounced::sync(&session, &request)))
    }

    type PipelineStream = Pipeline<Streaming<v1::PipelineRequest>>;

    async fn pipeline(
        &self,
        request: Request<Streaming<v1::PipelineRequest>>,
    ) -> Answered<Self::PipelineStream> {
        let session = session(&request, &self.registry, &self.terms)?;
        let open = pipeline::admit(&session, &self.registry)?;
        let requests = request.into_inner();
        let stop = self.stop.clone();
        answer(Ok(Pipeline::new(&session, requests, open, stop)))
    }

    async fn lease(&self, request: Request<v1::LeaseRequest>) -> Answered<v1::LeaseResponse> {
        let (session, request, turn) = self.for_session(request).await?;
        answer(room::finding(&session, &request, turn, bounced::lease).await)
    }

    async fn release(&self, request: Request<v1::ReleaseRequest>) -> Answered<v1::ReleaseResponse> {
        let (session, request, turn) = self.for_session(request).await?;
        let released = turn.take(|| bounced::release(&session, &request))?;
        settle::acknowledged(&session.domain, released.generation).await?;
        answer(Ok(released))
    }

    async fn alloc_coherent(
        &self,
        request: Request<v1::AllocCoherentRequest>,
    ) -> Answered<v1::AllocCoherentResponse> {
        let (session, request, turn) = self.for_session(request).await?;
        answer(room::finding(&session, &request, turn, bounced::alloc_coherent).await)
    }

    async fn free_coherent(
        &self,
        request: Request<v1::FreeCoherentRequest>,
    ) -> Answered<v1::FreeCoherentResponse> {
        let (session, request, turn) = self.for_session(request).await?;
        let freed = turn.take(|| bounced::free_coherent(&session, &request))?;
        settle::acknowledged(&session.domain, freed.generation).await?;
        answer(Ok(freed))
    }

    async fn map_direct(
        &self,
        request: Request<v1::MapDirectRequest>,
    ) -> Answered<v1::MapDirectResponse> {
        let (agent, request, turn) = self.for_agent(request).await?;
        answer(turn.take(|| direct::map(&agent, &request)))
    }

    async fn unmap_direct(
        &self,
        request: Request<v1::UnmapDirectRequest>,
    ) -> Answered<v1::UnmapDirectResponse> {
        let agent = self.agent(&request)?;
        let domain = agent.managed(&request.get_ref().domain);
        let removed = self
            .large(agent, request.into_inner(), direct::unmap)
            .await?;
        settled(domain, removed, |removed| removed.generation).await
    }

    async fn set_map(&self, request: Request<v1::SetMapRequest>) -> Answered<v1::SetMapResponse> {
        let agent = self.agent(&request)?;
        // What decoded into much more than it was does not wait.
        convert::table_size(request.get_ref().entries.len()).map_err(Refusal::from)?;
        let domain = agent.managed(&request.get_ref().domain);
        let set = self.large(agent, request.into_inner(), direct::set).await?;
        settled(domain, set, |set| set.generation).await
    }

    async fn stream_set_map(
        &self,
        request: Request<Streaming<v1::StreamSetMapRequest>>,
    ) -> Answered<v1::StreamSetMapResponse> {
        let agent = self.agent(&request)?;
        let large = self.queues.large_calls.enter(agent.tenant())?;
        let queued = self.queues.table_streams.enter(agent.tenant())?;
        let quota = |header: &v1::SetMapHeader| {
            let (domain, _) = agent.domain(&header.domain, Need::Manage)?;
            Ok(domain.core.settings().quotas.direct)
        };
        let (table, place) = table::receive(request.into_inner(), quota, queued).await?;
        let id = table.header.request_id.clone();
        let turn = agent.turn_of(&id, || table.fingerprint).await?;
        let domain = agent.managed(&table.header.domain);
        let set = aside(large, turn, move || {
            let _place = place;
            direct::set_streamed(&agent, &table)
        })
        .await?;
        let generation = |set: &v1::StreamSetMapResponse| {
            let outcome = set.outcome.as_ref();
            outcome.map_or(0, |outcome| outcome.generation)
        };
        settled(domain, set, generation).await
    }

    async fn clear_map(
        &self,
        request: Request<v1::ClearMapRequest>,
    ) -> Answered<v1::ClearMapResponse> {
        let agent = self.agent(&request)?;
        let domain = agent.managed(&request.get_ref().domain);
        let removed = self
            .large(agent, request.into_inner(), direct::clear)
            .await?;
        settled(domain, removed, |removed| removed.generation).await
    }

    async fn reset_bounce(
        &self,
        request: Request<v1::ResetBounceRequest>,
    ) -> Answered<v1::ResetBounceResponse> {
        let agent = self.agent(&request)?;
        let domain = agent.managed(&request.get_ref().domain);
        let reset = self
            .large(agent, request.into_inner(), bounced::reset)
            .await?;
        settled(domain, reset, |reset| reset.generation).await
    }

    async fn translate(
        &self,
        request: Request<v1::TranslateRequest>,
    ) -> Answered<v1::TranslateResponse> {
        let agent = self.agent(&request)?;
        answer(translation::translate(&agent, request.get_ref()))
    }

    async fn lookup(&self, request: Request<v1::LookupRequest>) -> Answered<v1::Mapping> {
        let agent = self.agent(&request)?;
        answer(translation::lookup(&agent, request.get_ref()))
    }

    async fn list_mappings(
        &self,
        request: Request<v1::ListMappingsRequest>,
    ) -> Answered<v1::ListMappingsResponse> {
        let agent = self.agent(&request)?;
        answer(translation::list(&agent, request.get_ref()))
    }
}

impl Mappings {
    fn agent<T>(&self, request: &Request<T>) -> Result<Agent, Refusal> {
        Agent::of(request, &self.registry, &self.terms)
    }

    /// Of a request that only sessions make: whose it is, itself, and its turn.
    async fn for_session<Q: Repeatable>(
        &self,
        request: Request<Q>,
    ) -> Result<(Arc<Live>, Q, Turn), Refusal> {
        let session = session(&request, &self.registry, &self.terms)?;
        let request = request.into_inner();
        let turn = session.answers.turn(&request).await?;
        Ok((session, request, turn))
    }

    /// The same of a request that owners make, too.
    async fn for_agent<Q: Repeatable>(
        &self,
        request: Request<Q>,
    ) -> Result<(Agent, Q, Turn), Refusal> {
        let agent = self.agent(&request)?;
        let request = request.into_inner();
        let turn = agent.turn(&request).await?;
        Ok((agent, request, turn))
    }

    /// Answers a request that is large, or refuses it when its user has too many
    /// of them: before its turn, because that may mean to wait, too.
    async fn large<Q: Repeatable + 'static, R: Message + Default + 'static>(
        &self,
        agent: Agent,
        request: Q,
        work: impl FnOnce(&Agent, &Q) -> Result<R, Refusal> + Send + 'static,
    ) -> Answered<R> {
        let queued = self.queues.large_calls.enter(agent.tenant())?;
        let turn = agent.turn(&request).await?;
        aside(queued, turn, move || work(&agent, &request)).await
    }
}

fn answer<R>(done: Result<R, Refusal>) -> Answered<R> {
    Ok(Response::new(done?))
}

/// Gives the answer to a removal when nobody can still use what it removed. One
/// that is given again because the request was repeated waits as well.
async fn settled<R>(
    domain: Option<Arc<Hosted>>,
    answered: Response<R>,
    generation: impl Fn(&R) -> u64,
) -> Answered<R> {
    // It is not there any more for one that is repeated after a delete.
    if let Some(domain) = domain {
        settle::acknowledged(&domain, generation(answered.get_ref())).await?;
    }
    Ok(answered)
}

/// What takes as long as a table is large or an aperture is long happens on a
/// thread that may block, of which it takes its share and no more. There it
/// comes to its end also when the caller has gone; who repeats it then gets its
/// answer. A caller that goes before has changed nothing and waits no longer.
async fn aside<R: Message + Default + 'static>(
    queued: Queued,
    turn: Turn,
    work: impl FnOnce() -> Result<R, Refusal> + Send + 'static,
) -> Answered<R> {
    let place = queued.place().await;
    let work = move || {
        let _place = place;
        turn.take(work)
    };
    answer(off_worker(work).await?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tenant::Tenant;
    use domain_core::limits::LARGE_CALLS_PER_USER;
    use std::time::Duration;
    use tokio::time::timeout;

    fn cleared() -> Result<v1::ClearMapResponse, Refusal> {
        Ok(v1::ClearMapResponse::default())
    }

    #[tokio::test]
    async fn a_large_call_keeps_its_place_until_its_work_is_done_whoever_has_gone() {
        let queue = Queue::of_large_calls();
        let enter = |uid| queue.enter(Tenant::user(uid)).unwrap();
        let (finish, finished) = std::sync::mpsc::channel::<()>();
        let finished = Arc::new(std::sync::Mutex::new(finished));
        let (start, mut started) = tokio::sync::mpsc::unbounded_channel();
        for _ in 0..LARGE_CALLS_PER_USER {
            let (start, finished) = (start.clone(), Arc::clone(&finished));
            let slow = aside(enter(1), Turn::Unnamed, move || {
                start.send(()).unwrap();
                finished.lock().unwrap().recv().unwrap();
                cleared()
            });
            let caller = tokio::spawn(slow);
            started.recv().await.unwrap();
            caller.abort();
            assert!(caller.await.unwrap_err().is_cancelled());
        }
        let soon = Duration::from_millis(10);
        let next = aside(enter(1), Turn::Unnamed, cleared);
        assert!(timeout(soon, next).await.is_err(), "it does not wait");
        let other = aside(enter(2), Turn::Unnamed, cleared).await;
        assert!(other.is_ok());
        for _ in 0..LARGE_CALLS_PER_USER {
            finish.send(()).unwrap();
        }
        let next = aside(enter(1), Turn::Unnamed, cleared).await;
        assert!(next.is_ok());
    }
}
