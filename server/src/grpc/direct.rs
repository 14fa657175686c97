//! Direct mappings: parse, one call into the core, answer.

use domain_core::direct::DirectMapping;
use domaind_proto::convert;
use domaind_proto::v1::{self, Refusal};

use super::batch;
use super::caller::Agent;
use super::table::Table;
use crate::offload::yielding;
use crate::visitor::Need;

/// Batches above this many entries make room for other calls first.
const MANY_ENTRIES: usize = 64;

pub(super) fn map(
    agent: &Agent,
    request: &v1::MapDirectRequest,
) -> Result<v1::MapDirectResponse, Refusal> {
    let (domain, actor) = agent.domain(&request.domain, Need::Manage)?;
    let entries = &request.entries;
    let results = yielding(entries.len() > MANY_ENTRIES, || {
        let parse = convert::direct_spec;
        batch::run(entries, request.partial, parse, |specs, mode| {
            domain.core.map_direct(actor, specs, mode)
        })
    })?;
    let results = results.map(|outcome| v1::MapDirectResult {
        outcome: Some(outcome.into()),
    });
    Ok(v1::MapDirectResponse {
        results: results.collect(),
    })
}

pub(super) fn unmap(
    agent: &Agent,
    request: &v1::UnmapDirectRequest,
) -> Result<v1::UnmapDirectResponse, Refusal> {
    let (domain, actor) = agent.domain(&request.domain, Need::Manage)?;
    let ranges = convert::batch_ranges(&request.ranges)?;
    Ok(domain.core.unmap_direct(actor, &ranges)?.into())
}

pub(super) fn clear(
    agent: &Agent,
    request: &v1::ClearMapRequest,
) -> Result<v1::ClearMapResponse, Refusal> {
    let (domain, actor) = agent.domain(&request.domain, Need::Manage)?;
    let ranges = convert::batch_ranges(&request.ranges)?;
    Ok(domain.core.clear_map(actor, &ranges)?.into())
}

pub(super) fn set(
    agent: &Agent,
    request: &v1::SetMapRequest,
) -> Result<v1::SetMapResponse, Refusal> {
    let mappings = convert::direct_mappings(&request.entries, 0)?;
    replace(
        agent,
        &request.domain,
        &mappings,
        request.expected_generation,
    )
}

pub(super) fn set_streamed(
    agent: &Agent,
    table: &Table,
) -> Result<v1::StreamSetMapResponse, Refusal> {
    let v1::SetMapHeader {
        domain,
        expected_generation,
        ..
    } = &table.header;
    let outcome = replace(agent, domain, &table.mappings, *expected_generation)?;
    Ok(v1::StreamSetMapResponse {
        outcome: Some(outcome),
    })
}

fn replace(
    agent: &Agent,
    domain: &str,
    mappings: &[DirectMapping],
    expected_generation: Option<u64>,
) -> Result<v1::SetMapResponse, Refusal> {
    let (domain, actor) = agent.domain(domain, Need::Manage)?;
    let core = &domain.core;
    Ok(core.set_map(actor, mappings, expected_generation)?.into())
}
