//! `MappingService`.

use std::sync::Arc;

use domain_core::addr::Iova;
use domain_core::mapping::MappingId;
use domaind_proto::convert;
use domaind_proto::names::{DomainId, parse_session};
use domaind_proto::v1::mapping_service_server::MappingService;
use domaind_proto::v1::{self, Refusal};
use tonic::{Request, Response, Status};

use super::batch::{self, copying};
use super::caller::{principal, session};
use super::page;
use crate::config::Policy;
use crate::live::Live;
use crate::registry::Registry;

const PAGE: usize = 1000;
const PAGE_MOST: usize = 10_000;

#[derive(Debug)]
pub(crate) struct Mappings {
    pub(crate) registry: Arc<Registry>,
    pub(crate) policy: Policy,
}

#[tonic::async_trait]
impl MappingService for Mappings {
    async fn map(
        &self,
        request: Request<v1::MapRequest>,
    ) -> Result<Response<v1::MapResponse>, Status> {
        let session = self.session(&request)?;
        let v1::MapRequest { entries, partial } = request.into_inner();
        let bytes = total(entries.iter().map(|entry| entry.len_bytes));
        let results = copying(bytes, || {
            let core = &session.domain.core;
            batch::run(&entries, partial, convert::map_spec, |specs, mode| {
                core.map(session.id, specs, mode)
            })
        })?;
        let results = results.into_iter().map(|outcome| v1::MapResult {
            outcome: Some(outcome.into()),
        });
        Ok(Response::new(v1::MapResponse {
            results: results.collect(),
        }))
    }

    async fn unmap(
        &self,
        request: Request<v1::UnmapRequest>,
    ) -> Result<Response<v1::UnmapResponse>, Status> {
        let session = self.session(&request)?;
        let v1::UnmapRequest { entries, partial } = request.into_inner();
        // Before anything that costs as much as there are entries.
        convert::batch_mode(entries.len(), partial).map_err(Refusal::from)?;
        let core = &session.domain.core;
        let bytes = core.visible_bytes(entries.iter().map(|entry| Iova::new(entry.iova)));
        let results = copying(bytes, || {
            let parse = |entry: &_| Ok(convert::unmap_spec(entry));
            batch::run(&entries, partial, parse, |specs, mode| {
                core.unmap(session.id, specs, mode)
            })
        })?;
        let results = results.into_iter().map(v1::UnmapResult::from).collect();
        Ok(Response::new(v1::UnmapResponse { results }))
    }

    async fn sync(
        &self,
        request: Request<v1::SyncRequest>,
    ) -> Result<Response<v1::SyncResponse>, Status> {
        let session = self.session(&request)?;
        let v1::SyncRequest { entries, partial } = request.into_inner();
        let bytes = total(entries.iter().map(|entry| entry.len_bytes));
        let results = copying(bytes, || {
            let core = &session.domain.core;
            batch::run(&entries, partial, convert::sync_spec, |specs, mode| {
                core.sync(session.id, specs, mode)
            })
        })?;
        let results = results.into_iter().map(|outcome| v1::SyncResult {
            refusal: outcome.err(),
        });
        Ok(Response::new(v1::SyncResponse {
            results: results.collect(),
        }))
    }

    async fn alloc_coherent(
        &self,
        request: Request<v1::AllocCoherentRequest>,
    ) -> Result<Response<v1::AllocCoherentResponse>, Status> {
        let session = self.session(&request)?;
        let spec = convert::coherent_spec(request.get_ref());
        let allocated = copying(spec.place.len_bytes, || {
            session.domain.core.alloc_coherent(session.id, &spec)
        });
        Ok(Response::new(allocated.map_err(Refusal::from)?.into()))
    }

    async fn free_coherent(
        &self,
        request: Request<v1::FreeCoherentRequest>,
    ) -> Result<Response<v1::FreeCoherentResponse>, Status> {
        let session = self.session(&request)?;
        let v1::FreeCoherentRequest { iova, mapping_id } = *request.get_ref();
        let (iova, id) = (Iova::new(iova), MappingId::new(mapping_id));
        let core = &session.domain.core;
        let bytes = core.visible_bytes([iova].into_iter());
        let freed = copying(bytes, || core.free_coherent(session.id, iova, id));
        freed.map_err(Refusal::from)?;
        Ok(Response::new(v1::FreeCoherentResponse {}))
    }

    async fn list_mappings(
        &self,
        request: Request<v1::ListMappingsRequest>,
    ) -> Result<Response<v1::ListMappingsResponse>, Status> {
        let who = principal(&request, &self.policy)?;
        let request = request.into_inner();
        let id = DomainId::parse(&request.domain).map_err(Refusal::from)?;
        let domain = self.registry.domain(who, &id).map_err(Refusal::from)?;
        let owner = match request.session.as_str() {
            "" => None,
            name => Some(parse_session(name).map_err(Refusal::from)?),
        };
        let filter = convert::mapping_filter(request.kind, owner).map_err(Refusal::from)?;
        let size = page::size(request.page_size, PAGE, PAGE_MOST);
        let from = page::start(&request.page_token, next_iova).map_err(Refusal::from)?;
        let mut mappings = domain
            .core
            .mappings(filter, from.unwrap_or(Iova::new(0)), size + 1);
        let next_page_token =
            page::cut(&mut mappings, size, |last| last.visible.last().to_string());
        let mappings = mappings.into_iter().map(v1::Mapping::from).collect();
        Ok(Response::new(v1::ListMappingsResponse {
            mappings,
            next_page_token,
        }))
    }
}

impl Mappings {
    fn session<T>(&self, request: &Request<T>) -> Result<Arc<Live>, Refusal> {
        session(request, &self.registry, &self.policy)
    }
}

fn total(lengths: impl Iterator<Item = u64>) -> u64 {
    lengths.fold(0, u64::saturating_add)
}

/// A token is the last address of the page before.
fn next_iova(token: &str) -> Option<Iova> {
    let last = u64::from_str_radix(token.strip_prefix("0x")?, 16).ok()?;
    Iova::new(last).checked_add(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_begins_behind_the_last_address_of_the_one_before() {
        assert_eq!(next_iova("0x1fff"), Some(Iova::new(0x2000)));
        assert_eq!(next_iova(&Iova::new(u64::MAX).to_string()), None);
        assert_eq!(next_iova("1fff"), None);
    }
}
