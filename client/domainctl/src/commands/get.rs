//! `get`.

use domain_core::session::SessionId;
use domaind_client::Client;
use domaind_proto::names::{DomainId, session_name};
use domaind_proto::v1;

use super::{pages, target};
use crate::cli::{Get, GetDomains, GetLeases, GetMappings, GetMemories, GetSessions};
use crate::context::Context;
use crate::exit::Exit;
use crate::failure::Failure;
use crate::output::{Lease, List, One, Row};

/// The most that the daemon answers at once, so that lists take few calls.
const PAGE_SIZE: u32 = 1000;
const MAPPINGS_PAGE_SIZE: u32 = 10_000;

pub(super) async fn run(what: Get, context: &mut Context) -> Result<Exit, Failure> {
    match what {
        Get::Domains(args) => domains(args, context).await?,
        Get::Sessions(args) => sessions(args, context).await?,
        Get::Mappings(args) => mappings(args, context).await?,
        Get::Leases(args) => leases(args, context).await?,
        Get::Memories(args) => memories(args, context).await?,
    }
    Ok(Exit::Ok)
}

async fn domains(args: GetDomains, context: &mut Context) -> Result<(), Failure> {
    let client = context.connect().await?;
    if args.names.is_empty() {
        let domains = all_domains(&client, context).await?;
        return context.show(&List::of(domains));
    }
    let mut domains = Vec::new();
    for name in &args.names {
        domains.push(one_domain(&client, name, context).await?);
    }
    show_named(domains, context)
}

async fn sessions(args: GetSessions, context: &mut Context) -> Result<(), Failure> {
    let client = context.connect().await?;
    if args.sessions.is_empty() {
        let sessions = all_sessions(&client, args.domain.as_ref(), context).await?;
        return context.show(&List::of(sessions));
    }
    let mut sessions = Vec::new();
    for id in args.sessions {
        sessions.push(one_session(&client, id, context).await?);
    }
    show_named(sessions, context)
}

async fn mappings(args: GetMappings, context: &mut Context) -> Result<(), Failure> {
    let asked = args.domain.id();
    let memory_domain = args
        .memory
        .as_ref()
        .and_then(|memory| memory.domain.clone());
    let range_domain = args.range.as_ref().and_then(|range| range.domain.clone());
    target::agreed([Some(asked.clone()), memory_domain, range_domain])?;
    let client = context.connect().await?;
    let domain = asked.name();
    let kind = args.kind.map(v1::MappingKind::from).unwrap_or_default();
    let filter = v1::ListMappingsRequest {
        domain: domain.clone(),
        session: args.session.map(session_name).unwrap_or_default(),
        kind: kind.into(),
        page_size: MAPPINGS_PAGE_SIZE,
        page_token: String::new(),
        memory_id: args.memory.map_or(0, |memory| memory.thing.get()),
        memory_offset: args.offset,
        range: args.range.map(|range| range.thing.into()),
    };
    let mappings = all_mappings(&client, filter, context).await?;
    context.show(&List::within(&domain, mappings))
}

async fn leases(args: GetLeases, context: &mut Context) -> Result<(), Failure> {
    let client = context.connect().await?;
    let domain = args.domain.id().name();
    let filter = v1::ListMappingsRequest {
        domain: domain.clone(),
        session: args.session.map(session_name).unwrap_or_default(),
        kind: v1::MappingKind::Lease.into(),
        page_size: MAPPINGS_PAGE_SIZE,
        ..v1::ListMappingsRequest::default()
    };
    let leases = all_mappings(&client, filter, context).await?;
    let leases = leases.into_iter().map(Lease).collect();
    context.show(&List::<Lease>::within(&domain, leases))
}

async fn all_mappings(
    client: &Client,
    filter: v1::ListMappingsRequest,
    context: &Context,
) -> Result<Vec<v1::Mapping>, Failure> {
    pages::all(async |page_token| {
        let request = v1::ListMappingsRequest {
            page_token,
            ..filter.clone()
        };
        let page = context
            .call(client.mappings().list_mappings(request))
            .await?;
        Ok((page.mappings, page.next_page_token))
    })
    .await
}

async fn memories(args: GetMemories, context: &mut Context) -> Result<(), Failure> {
    let client = context.connect().await?;
    let domain = args.domain.id().name();
    let memories = pages::all(async |page_token| {
        let request = v1::ListMemoriesRequest {
            domain: domain.clone(),
            page_size: PAGE_SIZE,
            page_token,
        };
        let page = context
            .call(client.sessions().list_memories(request))
            .await?;
        Ok((page.memories, page.next_page_token))
    });
    let memories = memories.await?;
    context.show(&List::within(&domain, memories))
}

/// One thing asked for by name is answered as itself, several as a list, as
/// kubectl does it.
fn show_named<T: Row>(mut items: Vec<T>, context: &mut Context) -> Result<(), Failure> {
    match items.len() {
        1 => context.show(&One::of(items.remove(0))),
        _ => context.show(&List::of(items)),
    }
}

pub(super) async fn all_domains(
    client: &Client,
    context: &Context,
) -> Result<Vec<v1::Domain>, Failure> {
    pages::all(async |page_token| {
        let request = v1::ListDomainsRequest {
            page_size: PAGE_SIZE,
            page_token,
        };
        let page = context.call(client.domains().list_domains(request)).await?;
        Ok((page.domains, page.next_page_token))
    })
    .await
}

/// The sessions of a domain, or all that the caller may see.
pub(super) async fn all_sessions(
    client: &Client,
    domain: Option<&DomainId>,
    context: &Context,
) -> Result<Vec<v1::Session>, Failure> {
    pages::all(async |page_token| {
        let request = v1::ListSessionsRequest {
            domain: domain.map(DomainId::name).unwrap_or_default(),
            page_size: PAGE_SIZE,
            page_token,
        };
        let page = context
            .call(client.sessions().list_sessions(request))
            .await?;
        Ok((page.sessions, page.next_page_token))
    })
    .await
}

pub(super) async fn one_domain(
    client: &Client,
    id: &DomainId,
    context: &Context,
) -> Result<v1::Domain, Failure> {
    let request = v1::GetDomainRequest { name: id.name() };
    context.call(client.domains().get_domain(request)).await
}

pub(super) async fn one_session(
    client: &Client,
    id: SessionId,
    context: &Context,
) -> Result<v1::Session, Failure> {
    let request = v1::GetSessionRequest {
        name: session_name(id),
    };
    context.call(client.sessions().get_session(request)).await
}
