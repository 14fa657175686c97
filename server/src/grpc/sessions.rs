//! `SessionService`.

use std::sync::Arc;

use domain_core::memory::MemoryId;
use domain_core::session::SessionId;
use domaind_proto::names::{DomainId, parse_session};
use domaind_proto::v1::session_service_server::SessionService;
use domaind_proto::v1::{self, EndReason, Refusal};
use tonic::{Request, Response, Status};

use super::caller::visitor;
use super::page;
use crate::hosted::Hosted;
use crate::live::Live;
use crate::offload::off_worker;
use crate::registry::Registry;
use crate::terms::InForce;
use crate::visitor::{Need, Visitor};

const PAGE: usize = 100;
const PAGE_MOST: usize = 1000;

#[derive(Debug)]
pub(crate) struct Sessions {
    pub(crate) registry: Arc<Registry>,
    pub(crate) terms: InForce,
}

#[tonic::async_trait]
impl SessionService for Sessions {
    async fn list_sessions(
        &self,
        request: Request<v1::ListSessionsRequest>,
    ) -> Result<Response<v1::ListSessionsResponse>, Status> {
        let who = visitor(&request, &self.terms)?;
        let v1::ListSessionsRequest {
            domain,
            page_size,
            page_token,
        } = request.into_inner();
        let domain = match domain.as_str() {
            "" => None,
            name => Some(self.domain(&who, name)?),
        };
        let size = page::size(page_size, PAGE, PAGE_MOST);
        let after = page::start(&page_token, |token| token.parse().ok().map(SessionId::new));
        let after = after.map_err(Refusal::from)?;
        let mut sessions = self
            .registry
            .sessions(&who, domain.as_ref(), after, size + 1);
        let next_page_token = page::cut(&mut sessions, size, |session| session.id.to_string());
        let sessions = sessions.iter().map(|session| session.view()).collect();
        Ok(Response::new(v1::ListSessionsResponse {
            sessions,
            next_page_token,
        }))
    }

    async fn get_session(
        &self,
        request: Request<v1::GetSessionRequest>,
    ) -> Result<Response<v1::Session>, Status> {
        let who = visitor(&request, &self.terms)?;
        let session = self.find(&who, &request.get_ref().name)?;
        Ok(Response::new(session.view()))
    }

    async fn evict_session(
        &self,
        request: Request<v1::EvictSessionRequest>,
    ) -> Result<Response<v1::EvictSessionResponse>, Status> {
        let who = visitor(&request, &self.terms)?;
        let request = request.into_inner();
        let turn = self.registry.users.turn(who.principal(), &request).await?;
        let registry = Arc::clone(&self.registry);
        let evict = move || {
            let session = who.session_to_end(&registry, parse_session(&request.name)?)?;
            registry.end(&session, EndReason::Evicted);
            Ok(v1::EvictSessionResponse {})
        };
        Ok(Response::new(off_worker(|| turn.take(evict)).await??))
    }

    async fn list_memories(
        &self,
        request: Request<v1::ListMemoriesRequest>,
    ) -> Result<Response<v1::ListMemoriesResponse>, Status> {
        let who = visitor(&request, &self.terms)?;
        let v1::ListMemoriesRequest {
            domain,
            page_size,
            page_token,
        } = request.into_inner();
        let domain = self.domain(&who, &domain)?;
        let size = page::size(page_size, PAGE, PAGE_MOST);
        let after =
            page::start(&page_token, |token| token.parse::<u64>().ok()).map_err(Refusal::from)?;
        let from = MemoryId::new(after.map_or(0, |last| last.saturating_add(1)));
        let mut memories = domain.core.memories(from, size + 1);
        let next_page_token = page::cut(&mut memories, size, |memory| memory.id.to_string());
        let memories = memories.into_iter().map(v1::Memory::from).collect();
        Ok(Response::new(v1::ListMemoriesResponse {
            memories,
            next_page_token,
        }))
    }
}

impl Sessions {
    fn domain(&self, who: &Visitor, name: &str) -> Result<Arc<Hosted>, Refusal> {
        who.domain(&self.registry, &DomainId::parse(name)?, Need::See)
    }

    fn find(&self, who: &Visitor, name: &str) -> Result<Arc<Live>, Refusal> {
        who.session(&self.registry, parse_session(name)?)
    }
}
