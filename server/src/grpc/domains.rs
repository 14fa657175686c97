//! `DomainService`.

use std::sync::{Arc, OnceLock};

use domain_core::domain::Close;
use domain_core::session::SessionId;
use domaind_proto::convert;
use domaind_proto::names::DomainId;
use domaind_proto::v1::domain_service_server::DomainService;
use domaind_proto::v1::{self, Refusal};
use tokio_util::sync::CancellationToken;
use tonic::{Code, Request, Response, Status};

use super::caller::visitor;
use super::page;
use super::watch::{Events, Watcher};
use crate::hosted::{Hosted, planned};
use crate::offload::off_worker;
use crate::offload::yielding;
use crate::registry::{Plan, Registry};
use crate::settle;
use crate::tenant::Tenant;
use crate::terms::InForce;
use crate::visitor::{Need, Visitor};

const PAGE: usize = 100;
const PAGE_MOST: usize = 1000;

#[derive(Debug)]
pub(crate) struct Domains {
    pub(crate) registry: Arc<Registry>,
    /// Also how long a session may take to let go of a domain that is deleted.
    pub(crate) terms: InForce,
    /// Called when the daemon stops: what would go on for ever ends then.
    pub(crate) stop: CancellationToken,
}

#[tonic::async_trait]
impl DomainService for Domains {
    async fn create_domain(
        &self,
        request: Request<v1::CreateDomainRequest>,
    ) -> Result<Response<v1::Domain>, Status> {
        let who = visitor(&request, &self.terms)?;
        let request = request.into_inner();
        let plan = plan(&request)?;
        who.check_create(&plan.id)?;
        // Nothing is done, so nothing is kept: the id is still good for doing it.
        if request.validate_only {
            return Ok(Response::new(self.validate(who.tenant(), &plan)?));
        }
        let turn = self.registry.users.turn(who.principal(), &request).await?;
        let registry = Arc::clone(&self.registry);
        // The whole change happens on that thread: a cancelled call leaves it
        // to come to its end.
        let create = move || {
            let domain = registry.create(who.tenant(), plan)?;
            tracing::info!(domain = %domain.id, owner = %domain.owner, "created");
            Ok(domain.view())
        };
        Ok(Response::new(off_worker(|| turn.take(create)).await??))
    }

    type WatchDomainStream = Events;

    async fn watch_domain(
        &self,
        request: Request<v1::WatchDomainRequest>,
    ) -> Result<Response<Events>, Status> {
        let who = visitor(&request, &self.terms)?;
        let v1::WatchDomainRequest { name, generation } = request.into_inner();
        let domain = self.find(&who, &name, Need::See)?;
        let watching = self.registry.watchers.enter(who.principal())?;
        let watcher = Watcher::new(&domain, generation, watching, self.stop.clone());
        Ok(Response::new(watcher.events()))
    }

    async fn get_domain(
        &self,
        request: Request<v1::GetDomainRequest>,
    ) -> Result<Response<v1::Domain>, Status> {
        let who = visitor(&request, &self.terms)?;
        let domain = self.find(&who, &request.get_ref().name, Need::See)?;
        Ok(Response::new(domain.view()))
    }

    async fn list_domains(
        &self,
        request: Request<v1::ListDomainsRequest>,
    ) -> Result<Response<v1::ListDomainsResponse>, Status> {
        let who = visitor(&request, &self.terms)?;
        let v1::ListDomainsRequest {
            page_size,
            page_token,
        } = request.into_inner();
        let size = page::size(page_size, PAGE, PAGE_MOST);
        let after =
            page::start(&page_token, |token| DomainId::new(token).ok()).map_err(Refusal::from)?;
        let mut domains = self.registry.domains(&who, after.as_ref(), size + 1);
        let views = page::fitting(domains.iter().take(size).map(|domain| domain.view()));
        let next_page_token = page::cut(&mut domains, views.len(), |last| last.id.to_string());
        Ok(Response::new(v1::ListDomainsResponse {
            domains: views,
            next_page_token,
        }))
    }

    async fn update_domain(
        &self,
        request: Request<v1::UpdateDomainRequest>,
    ) -> Result<Response<v1::Domain>, Status> {
        let who = visitor(&request, &self.terms)?;
        let request = request.into_inner();
        let turn = self.registry.users.turn(who.principal(), &request).await?;
        let update = || {
            let domain = self.find(&who, &request.name, Need::Manage)?;
            let core = &domain.core;
            core.update(|in_force| convert::change(&request, in_force))?;
            Ok(domain.view())
        };
        // Reserved ranges are compared with all that is mapped.
        let is_long = request.reserved.is_some() || request.allowed.is_some();
        Ok(Response::new(yielding(is_long, || turn.take(update))?))
    }

    async fn delete_domain(
        &self,
        request: Request<v1::DeleteDomainRequest>,
    ) -> Result<Response<v1::DeleteDomainResponse>, Status> {
        let who = visitor(&request, &self.terms)?;
        let request = request.into_inner();
        let turn = self.registry.users.turn(who.principal(), &request).await?;
        let registry = Arc::clone(&self.registry);
        let ended = Arc::new(OnceLock::new());
        let note = Arc::clone(&ended);
        let delete = move || delete(&registry, &who, &request, &note);
        let deleted = off_worker(|| turn.take(delete)).await??;
        if let Some((domain, sessions)) = ended.get() {
            settle::gone(domain, sessions, self.terms.get().ack_timeout).await?;
        }
        Ok(Response::new(deleted))
    }
}

impl Domains {
    fn find(&self, who: &Visitor, name: &str, need: Need) -> Result<Arc<Hosted>, Refusal> {
        who.domain(&self.registry, &DomainId::parse(name)?, need)
    }

    fn validate(&self, owner: Tenant, plan: &Plan) -> Result<v1::Domain, Refusal> {
        self.registry.check_create(owner, plan)?;
        let Plan {
            id,
            layout,
            settings,
            direct_ranges,
        } = plan;
        Ok(v1::Domain {
            owner_uid: owner.uid,
            owner_pod_uid: owner.pod.map(|pod| pod.to_string()).unwrap_or_default(),
            ..planned(id, layout, settings, direct_ranges)
        })
    }
}

fn delete(
    registry: &Registry,
    who: &Visitor,
    request: &v1::DeleteDomainRequest,
    ended: &OnceLock<(Arc<Hosted>, Vec<SessionId>)>,
) -> Result<v1::DeleteDomainResponse, Refusal> {
    let id = DomainId::parse(&request.name)?;
    let domain = match who.domain(registry, &id, Need::Manage) {
        Err(refusal) if refusal.grpc_code() == Code::NotFound && request.allow_missing => {
            return Ok(v1::DeleteDomainResponse { ended_sessions: 0 });
        }
        found => found?,
    };
    let how = if request.force {
        Close::Force
    } else {
        Close::IfUnused
    };
    let sessions = registry.delete(&domain, how)?;
    let ended_sessions = convert::count(sessions.len());
    tracing::info!(domain = %id, ended_sessions, "deleted");
    let _ = ended.set((domain, sessions));
    Ok(v1::DeleteDomainResponse { ended_sessions })
}

fn plan(request: &v1::CreateDomainRequest) -> Result<Plan, Refusal> {
    let spec = request.spec.clone().unwrap_or_default();
    Plan::new(DomainId::new(&request.domain_id)?, &spec)
}
