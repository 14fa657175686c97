//! Streaming mappings, leases and coherent memory: parse, one call into the core,
//! answer. Who calls was asked before; it is a session.

use domain_core::addr::Iova;
use domain_core::domain::{Desk, ResetBounce};
use domain_core::mapping::MappingId;
use domaind_proto::convert;
use domaind_proto::v1::{self, Refusal};

use super::batch;
use super::caller::Agent;
use crate::crew::Copiers;
use crate::live::Live;
use crate::metrics;
use crate::offload::copying;
use crate::visitor::Need;

pub(super) fn map(session: &Live, request: &v1::MapRequest) -> Result<v1::MapResponse, Refusal> {
    let v1::MapRequest {
        entries, partial, ..
    } = request;
    let core = &session.domain.core;
    let results = batch::run(entries, *partial, convert::map_spec, |specs, mode| {
        let mut desk = Desk::default();
        let mapped = core.map_at(&mut desk, session.id, specs, mode, Copiers::shared());
        mapped.map(|mapped| metrics::mapping(specs, mapped).collect())
    })?;
    let results = results.map(|outcome| v1::MapResult {
        outcome: Some(outcome.into()),
    });
    Ok(v1::MapResponse {
        results: results.collect(),
    })
}

pub(super) fn unmap(
    session: &Live,
    request: &v1::UnmapRequest,
) -> Result<v1::UnmapResponse, Refusal> {
    let v1::UnmapRequest {
        entries, partial, ..
    } = request;
    let core = &session.domain.core;
    let parse = |entry: &_| Ok(convert::unmap_spec(entry));
    let results = batch::run(entries, *partial, parse, |specs, mode| {
        let mut desk = Desk::default();
        let ended = core.unmap_at(&mut desk, session.id, specs, mode, Copiers::shared());
        ended.map(|ended| metrics::unmapping(ended).collect())
    })?;
    let results = results.map(v1::UnmapResult::from).collect();
    Ok(v1::UnmapResponse { results })
}

pub(super) fn sync(session: &Live, request: &v1::SyncRequest) -> Result<v1::SyncResponse, Refusal> {
    let v1::SyncRequest {
        entries, partial, ..
    } = request;
    let bytes = total(entries.iter().map(|entry| entry.len_bytes));
    let core = &session.domain.core;
    let results = batch::run(entries, *partial, convert::sync_spec, |specs, mode| {
        let synced = copying(bytes, || core.sync(session.id, specs, mode))?;
        Ok(metrics::syncing(specs, synced.into_iter()).collect())
    })?;
    let results = results.map(|outcome| v1::SyncResult {
        refusal: outcome.err(),
    });
    Ok(v1::SyncResponse {
        results: results.collect(),
    })
}

pub(super) fn lease(
    session: &Live,
    request: &v1::LeaseRequest,
) -> Result<v1::LeaseResponse, Refusal> {
    let spec = convert::lease_spec(request);
    let leased = copying(spec.place.len_bytes, || {
        session.domain.core.lease(session.id, &spec)
    });
    Ok(leased?.into())
}

pub(super) fn release(
    session: &Live,
    request: &v1::ReleaseRequest,
) -> Result<v1::ReleaseResponse, Refusal> {
    let (iova, id) = (Iova::new(request.iova), MappingId::new(request.mapping_id));
    let core = &session.domain.core;
    let bytes = core.visible_bytes([iova].into_iter());
    let removal = copying(bytes, || core.release_lease(session.id, iova, id))?;
    Ok(v1::ReleaseResponse {
        generation: removal.generation,
    })
}

pub(super) fn alloc_coherent(
    session: &Live,
    request: &v1::AllocCoherentRequest,
) -> Result<v1::AllocCoherentResponse, Refusal> {
    let spec = convert::coherent_spec(request);
    let allocated = copying(spec.place.len_bytes, || {
        session.domain.core.alloc_coherent(session.id, &spec)
    });
    Ok(allocated?.into())
}

pub(super) fn free_coherent(
    session: &Live,
    request: &v1::FreeCoherentRequest,
) -> Result<v1::FreeCoherentResponse, Refusal> {
    let (iova, id) = (Iova::new(request.iova), MappingId::new(request.mapping_id));
    let core = &session.domain.core;
    let bytes = core.visible_bytes([iova].into_iter());
    let removal = copying(bytes, || core.free_coherent(session.id, iova, id))?;
    Ok(v1::FreeCoherentResponse {
        generation: removal.generation,
    })
}

pub(super) fn reset(
    agent: &Agent,
    request: &v1::ResetBounceRequest,
) -> Result<v1::ResetBounceResponse, Refusal> {
    let (domain, actor) = agent.domain(&request.domain, Need::Manage)?;
    let ResetBounce {
        ended_mappings,
        ended_leases,
        removal,
    } = domain.core.reset_bounce(actor, request.force)?;
    tracing::info!(domain = %domain.id, ended_mappings, ended_leases, "bounce aperture reset");
    Ok(v1::ResetBounceResponse {
        ended_mappings: ended_mappings as u64,
        generation: removal.generation,
        ended_leases: ended_leases as u64,
    })
}

pub(super) fn total(lengths: impl Iterator<Item = u64>) -> u64 {
    lengths.fold(0, u64::saturating_add)
}
