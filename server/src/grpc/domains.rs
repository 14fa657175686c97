//! `DomainService`.

use std::sync::Arc;

use domain_core::domain::Close;
use domain_core::limits::Quotas;
use domaind_proto::convert;
use domaind_proto::names::DomainId;
use domaind_proto::v1::domain_service_server::DomainService;
use domaind_proto::v1::{self, Refusal};
use tonic::{Code, Request, Response, Status};

use super::caller::principal;
use super::page;
use crate::config::Policy;
use crate::hosted::{Hosted, planned};
use crate::offload::off_worker;
use crate::registry::{Missing, Plan, Principal, Registry};

const PAGE: usize = 100;
const PAGE_MOST: usize = 1000;

#[derive(Debug)]
pub(crate) struct Domains {
    pub(crate) registry: Arc<Registry>,
    pub(crate) policy: Policy,
}

#[tonic::async_trait]
impl DomainService for Domains {
    async fn create_domain(
        &self,
        request: Request<v1::CreateDomainRequest>,
    ) -> Result<Response<v1::Domain>, Status> {
        let who = principal(&request, &self.policy)?;
        let request = request.into_inner();
        let plan = plan(&request)?;
        if request.validate_only {
            self.registry
                .check_create(who.uid, &plan)
                .map_err(Refusal::from)?;
            return Ok(Response::new(v1::Domain {
                owner_uid: who.uid,
                ..planned(&plan.id, &plan.layout, plan.quotas, plan.scrub)
            }));
        }
        let registry = Arc::clone(&self.registry);
        // The whole change happens on that thread: a cancelled call leaves it
        // to come to its end.
        let created = off_worker(move || registry.create(who.uid, plan)).await?;
        let domain = created.map_err(Refusal::from)?;
        tracing::info!(domain = %domain.id, owner_uid = domain.owner_uid, "created");
        Ok(Response::new(domain.view()))
    }

    async fn get_domain(
        &self,
        request: Request<v1::GetDomainRequest>,
    ) -> Result<Response<v1::Domain>, Status> {
        let who = principal(&request, &self.policy)?;
        let domain = self.find(who, &request.get_ref().name)?;
        Ok(Response::new(domain.view()))
    }

    async fn list_domains(
        &self,
        request: Request<v1::ListDomainsRequest>,
    ) -> Result<Response<v1::ListDomainsResponse>, Status> {
        let who = principal(&request, &self.policy)?;
        let v1::ListDomainsRequest {
            page_size,
            page_token,
        } = request.into_inner();
        let size = page::size(page_size, PAGE, PAGE_MOST);
        let after =
            page::start(&page_token, |token| DomainId::new(token).ok()).map_err(Refusal::from)?;
        let mut domains = self.registry.domains(who, after.as_ref(), size + 1);
        let next_page_token = page::cut(&mut domains, size, |domain| domain.id.to_string());
        let domains = domains.iter().map(|domain| domain.view()).collect();
        Ok(Response::new(v1::ListDomainsResponse {
            domains,
            next_page_token,
        }))
    }

    async fn update_domain(
        &self,
        request: Request<v1::UpdateDomainRequest>,
    ) -> Result<Response<v1::Domain>, Status> {
        let who = principal(&request, &self.policy)?;
        let request = request.into_inner();
        let domain = self.find(who, &request.name)?;
        let asked = request.quotas.as_ref();
        convert::check_quotas(asked).map_err(Refusal::from)?;
        let scrub = convert::scrub(request.scrub).map_err(Refusal::from)?;
        let change = |quotas, in_force| (convert::quotas(asked, quotas), scrub.unwrap_or(in_force));
        // A quota below what is in use is a state, not an exhaustion.
        domain.core.update(change).map_err(|error| Refusal {
            code: Code::FailedPrecondition as i32,
            ..Refusal::from(error)
        })?;
        Ok(Response::new(domain.view()))
    }

    async fn delete_domain(
        &self,
        request: Request<v1::DeleteDomainRequest>,
    ) -> Result<Response<v1::DeleteDomainResponse>, Status> {
        let who = principal(&request, &self.policy)?;
        let v1::DeleteDomainRequest {
            name,
            force,
            allow_missing,
        } = request.into_inner();
        let id = DomainId::parse(&name).map_err(Refusal::from)?;
        let domain = match self.registry.domain(who, &id) {
            Err(Missing::Domain(_)) if allow_missing => {
                return Ok(Response::new(v1::DeleteDomainResponse {
                    ended_sessions: 0,
                }));
            }
            found => found.map_err(Refusal::from)?,
        };
        let how = if force { Close::Force } else { Close::IfUnused };
        let registry = Arc::clone(&self.registry);
        let deleted = off_worker(move || registry.delete(&domain, how)).await?;
        let ended = deleted.map_err(Refusal::from)?;
        tracing::info!(domain = %id, ended_sessions = ended, "deleted");
        Ok(Response::new(v1::DeleteDomainResponse {
            ended_sessions: convert::count(ended),
        }))
    }
}

impl Domains {
    fn find(&self, who: Principal, name: &str) -> Result<Arc<Hosted>, Refusal> {
        Ok(self.registry.domain(who, &DomainId::parse(name)?)?)
    }
}

fn plan(request: &v1::CreateDomainRequest) -> Result<Plan, Refusal> {
    let spec = request.spec.unwrap_or_default();
    convert::check_quotas(spec.quotas.as_ref())?;
    Ok(Plan {
        id: DomainId::new(&request.domain_id)?,
        layout: convert::layout_spec(&spec)?.plan()?,
        quotas: convert::quotas(spec.quotas.as_ref(), Quotas::default()),
        scrub: convert::scrub(spec.scrub)?.unwrap_or_default(),
    })
}
