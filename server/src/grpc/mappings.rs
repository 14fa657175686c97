//! `MappingService`: for each RPC who calls, and whether it was answered
//! before. What it does stands in [`bounced`], [`direct`], [`table`] and
//! [`translation`].

use std::sync::Arc;

use domaind_proto::Message;
use domaind_proto::v1::mapping_service_server::MappingService;
use domaind_proto::v1::{self, Refusal};
use tonic::{Request, Response, Status, Streaming};

use super::caller::{Agent, session};
use super::table::{self, TableSeats};
use super::{bounced, direct, translation};
use crate::config::Policy;
use crate::live::Live;
use crate::offload::off_worker;
use crate::registry::Registry;
use crate::replay::{Repeatable, Turn};

#[derive(Debug)]
pub(crate) struct Mappings {
    pub(crate) registry: Arc<Registry>,
    pub(crate) policy: Policy,
    pub(crate) tables: TableSeats,
}

type Answered<R> = Result<Response<R>, Status>;

#[tonic::async_trait]
impl MappingService for Mappings {
    async fn map(&self, request: Request<v1::MapRequest>) -> Answered<v1::MapResponse> {
        let (session, request, turn) = self.for_session(request).await?;
        answer(turn.take(|| bounced::map(&session, request)))
    }

    async fn unmap(&self, request: Request<v1::UnmapRequest>) -> Answered<v1::UnmapResponse> {
        let (session, request, turn) = self.for_session(request).await?;
        answer(turn.take(|| bounced::unmap(&session, request)))
    }

    async fn sync(&self, request: Request<v1::SyncRequest>) -> Answered<v1::SyncResponse> {
        let (session, request, turn) = self.for_session(request).await?;
        answer(turn.take(|| bounced::sync(&session, request)))
    }

    async fn alloc_coherent(
        &self,
        request: Request<v1::AllocCoherentRequest>,
    ) -> Answered<v1::AllocCoherentResponse> {
        let (session, request, turn) = self.for_session(request).await?;
        answer(turn.take(|| bounced::alloc_coherent(&session, &request)))
    }

    async fn free_coherent(
        &self,
        request: Request<v1::FreeCoherentRequest>,
    ) -> Answered<v1::FreeCoherentResponse> {
        let (session, request, turn) = self.for_session(request).await?;
        answer(turn.take(|| bounced::free_coherent(&session, &request)))
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
        let (agent, request, turn) = self.for_agent(request).await?;
        aside(turn, move || direct::unmap(&agent, &request)).await
    }

    async fn set_map(&self, request: Request<v1::SetMapRequest>) -> Answered<v1::SetMapResponse> {
        let (agent, request, turn) = self.for_agent(request).await?;
        aside(turn, move || direct::set(&agent, &request)).await
    }

    async fn stream_set_map(
        &self,
        request: Request<Streaming<v1::StreamSetMapRequest>>,
    ) -> Answered<v1::StreamSetMapResponse> {
        let agent = self.agent(&request)?;
        let seat = self.tables.take(agent.uid()).await?;
        let quota = |header: &v1::SetMapHeader| {
            let (domain, _) = agent.domain(&header.domain)?;
            Ok(domain.core.settings().quotas.direct)
        };
        let table = table::receive(request.into_inner(), quota).await?;
        let id = table.header.request_id.clone();
        let turn = agent.answers().turn_of(&id, || table.fingerprint).await?;
        aside(turn, move || {
            let _seat = seat;
            direct::set_streamed(&agent, &table)
        })
        .await
    }

    async fn clear_map(
        &self,
        request: Request<v1::ClearMapRequest>,
    ) -> Answered<v1::ClearMapResponse> {
        let (agent, request, turn) = self.for_agent(request).await?;
        aside(turn, move || direct::clear(&agent, &request)).await
    }

    async fn reset_bounce(
        &self,
        request: Request<v1::ResetBounceRequest>,
    ) -> Answered<v1::ResetBounceResponse> {
        let (agent, request, turn) = self.for_agent(request).await?;
        aside(turn, move || bounced::reset(&agent, &request)).await
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
        Agent::of(request, &self.registry, &self.policy)
    }

    /// Of a request that only sessions make: whose it is, itself, and its turn.
    async fn for_session<Q: Repeatable>(
        &self,
        request: Request<Q>,
    ) -> Result<(Arc<Live>, Q, Turn), Refusal> {
        let session = session(&request, &self.registry, &self.policy)?;
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
}

fn answer<R>(done: Result<R, Refusal>) -> Answered<R> {
    Ok(Response::new(done?))
}

/// What takes as long as a table is large or an aperture is long happens on a
/// thread that may block, and comes to its end there also when the caller has
/// gone; who repeats it then gets its answer.
async fn aside<R: Message + Default + 'static>(
    turn: Turn,
    work: impl FnOnce() -> Result<R, Refusal> + Send + 'static,
) -> Answered<R> {
    answer(off_worker(move || turn.take(work)).await?)
}
