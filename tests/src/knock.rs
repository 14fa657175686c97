//! Asking for everything, to see what one gets.

use domaind_client::{Client, v1};
use domaind_proto::v1::mapping_service_client::MappingServiceClient;
use serde::{Deserialize, Serialize};
use tonic::transport::Channel;
use tonic::{Code, Request};

use crate::direct::{range, stream};
use crate::node::name;
use crate::raw::with_token;
use crate::refusal::{Refused, answer};

/// What one call gave.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Verdict {
    /// The RPC.
    pub call: String,
    /// How many things it showed; unset if it was refused.
    pub found: Option<usize>,
    /// gRPC code as a number.
    pub code: i32,
    /// Name of the reason.
    pub reason: String,
    /// The sentence.
    pub message: String,
}

impl Verdict {
    fn new(call: &str, answer: Refused<usize>) -> Verdict {
        let (found, refusal) = match answer {
            Ok(found) => (Some(found), v1::Refusal::default()),
            Err(refusal) => (None, refusal),
        };
        Verdict {
            call: call.to_owned(),
            found,
            code: refusal.code,
            reason: refusal.reason().as_str_name().to_owned(),
            message: refusal.message,
        }
    }

    /// Whether it was refused with this code for this reason.
    #[must_use]
    pub fn is(&self, code: Code, reason: v1::ErrorReason) -> bool {
        self.found.is_none() && self.code == code as i32 && self.reason == reason.as_str_name()
    }
}

/// Every call of `MappingService` that acts for a session, with arguments that
/// a driver might send.
pub async fn mapping_calls(channel: Channel, token: Option<&str>) -> Vec<Verdict> {
    let mut calls = MappingServiceClient::new(channel);
    let map = v1::MapRequest {
        entries: vec![v1::MapEntry {
            memory_id: 1,
            len_bytes: 1,
            direction: v1::Direction::ToDevice.into(),
            ..Default::default()
        }],
        ..Default::default()
    };
    let unmap = v1::UnmapRequest {
        entries: vec![v1::UnmapEntry {
            iova: 4096,
            mapping_id: 1,
            ..Default::default()
        }],
        ..Default::default()
    };
    let sync = v1::SyncRequest {
        entries: vec![v1::SyncEntry {
            iova: 4096,
            mapping_id: 1,
            len_bytes: 1,
            target: v1::SyncTarget::ForDevice.into(),
            ..Default::default()
        }],
        ..Default::default()
    };
    let alloc = v1::AllocCoherentRequest {
        len_bytes: 1,
        ..Default::default()
    };
    let free = v1::FreeCoherentRequest {
        iova: 4096,
        mapping_id: 1,
        ..Default::default()
    };
    let lease = v1::LeaseRequest {
        len_bytes: 1,
        ..Default::default()
    };
    let release = v1::ReleaseRequest {
        iova: 4096,
        mapping_id: 1,
        ..Default::default()
    };
    let mut verdicts = vec![
        one("Lease", calls.lease(signed(lease, token)).await),
        one("Release", calls.release(signed(release, token)).await),
        one("Map", calls.map(signed(map, token)).await),
        one("Unmap", calls.unmap(signed(unmap, token)).await),
        one("Sync", calls.sync(signed(sync, token)).await),
        one("Pipeline", calls.pipeline(signed(stream().1, token)).await),
        one(
            "AllocCoherent",
            calls.alloc_coherent(signed(alloc, token)).await,
        ),
        one(
            "FreeCoherent",
            calls.free_coherent(signed(free, token)).await,
        ),
    ];
    if token.is_some() {
        // Without one they are for the owner, who names the domain.
        verdicts.extend(direct_changes(calls.clone(), token, "").await);
        verdicts.extend(direct_looks(calls, token, "").await);
    }
    verdicts
}

/// Every call that changes the direct table or the bounce aperture.
pub async fn direct_changes(
    mut calls: MappingServiceClient<Channel>,
    token: Option<&str>,
    domain: &str,
) -> Vec<Verdict> {
    let domain = || domain.to_owned();
    let map = v1::MapDirectRequest {
        domain: domain(),
        entries: vec![v1::MapDirectEntry {
            memory_id: 1,
            len_bytes: 4096,
            perm: v1::Perm::Read.into(),
            ..Default::default()
        }],
        ..Default::default()
    };
    let unmap = v1::UnmapDirectRequest {
        domain: domain(),
        ranges: vec![range(0, u64::MAX)],
        ..Default::default()
    };
    let set_map = v1::SetMapRequest {
        domain: domain(),
        ..Default::default()
    };
    let header = v1::SetMapHeader {
        domain: domain(),
        ..Default::default()
    };
    let whole = v1::StreamSetMapRequest {
        header: Some(header),
        commit: true,
        ..Default::default()
    };
    let clear = v1::ClearMapRequest {
        domain: domain(),
        ranges: vec![range(0, u64::MAX)],
        ..Default::default()
    };
    let reset = v1::ResetBounceRequest {
        domain: domain(),
        force: true,
        ..Default::default()
    };
    let whole = tonic::codegen::tokio_stream::once(whole);
    vec![
        one("MapDirect", calls.map_direct(signed(map, token)).await),
        one(
            "UnmapDirect",
            calls.unmap_direct(signed(unmap, token)).await,
        ),
        one("SetMap", calls.set_map(signed(set_map, token)).await),
        one(
            "StreamSetMap",
            calls.stream_set_map(signed(whole, token)).await,
        ),
        one("ClearMap", calls.clear_map(signed(clear, token)).await),
        one(
            "ResetBounce",
            calls.reset_bounce(signed(reset, token)).await,
        ),
    ]
}

/// Every call that tells what is mapped.
pub async fn direct_looks(
    mut calls: MappingServiceClient<Channel>,
    token: Option<&str>,
    domain: &str,
) -> Vec<Verdict> {
    let translate = v1::TranslateRequest {
        domain: domain.to_owned(),
        range: Some(range(4096, 4096)),
        want: v1::Perm::Read.into(),
    };
    let lookup = v1::LookupRequest {
        domain: domain.to_owned(),
        range: Some(range(0, u64::MAX)),
    };
    let list = v1::ListMappingsRequest {
        domain: domain.to_owned(),
        ..Default::default()
    };
    vec![
        one("Translate", calls.translate(signed(translate, token)).await),
        one("Lookup", calls.lookup(signed(lookup, token)).await),
        many(
            "ListMappings",
            calls.list_mappings(signed(list, token)).await,
            |page| page.mappings.len(),
        ),
    ]
}

/// Every call that names a domain or a session, except those that would
/// change it.
pub async fn names(client: &Client, domain: &str, session: &str) -> Vec<Verdict> {
    let (mut domains, mut sessions) = (client.domains(), client.sessions());
    let domain = name(domain);
    let get = v1::GetDomainRequest {
        name: domain.clone(),
    };
    let of_domain = v1::ListSessionsRequest {
        domain: domain.clone(),
        ..Default::default()
    };
    let get_session = v1::GetSessionRequest {
        name: session.to_owned(),
    };
    let memories = v1::ListMemoriesRequest {
        domain: domain.clone(),
        ..Default::default()
    };
    let mut verdicts = vec![
        one("GetDomain", domains.get_domain(get).await),
        many(
            "ListDomains",
            domains
                .list_domains(v1::ListDomainsRequest::default())
                .await,
            |page| page.domains.len(),
        ),
        many(
            "ListSessions of the domain",
            sessions.list_sessions(of_domain).await,
            |page| page.sessions.len(),
        ),
        many(
            "ListSessions",
            sessions
                .list_sessions(v1::ListSessionsRequest::default())
                .await,
            |page| page.sessions.len(),
        ),
        one("GetSession", sessions.get_session(get_session).await),
        many(
            "ListMemories",
            sessions.list_memories(memories).await,
            |page| page.memories.len(),
        ),
    ];
    verdicts.extend(direct_looks(client.mappings(), None, &domain).await);
    verdicts
}

/// Every call that would change a domain or a session, harmlessly or not.
pub async fn changes(client: &Client, domain: &str, session: &str) -> Vec<Verdict> {
    let (mut domains, mut sessions) = (client.domains(), client.sessions());
    let update = v1::UpdateDomainRequest {
        name: name(domain),
        scrub: v1::Scrub::OnUnmap.into(),
        ..Default::default()
    };
    let evict = v1::EvictSessionRequest {
        name: session.to_owned(),
        ..Default::default()
    };
    let delete = v1::DeleteDomainRequest {
        name: name(domain),
        force: true,
        ..Default::default()
    };
    let mut verdicts = direct_changes(client.mappings(), None, &name(domain)).await;
    verdicts.extend([
        one("UpdateDomain", domains.update_domain(update).await),
        one("EvictSession", sessions.evict_session(evict).await),
        one("DeleteDomain", domains.delete_domain(delete).await),
    ]);
    verdicts
}

fn one<T>(call: &str, response: Result<tonic::Response<T>, tonic::Status>) -> Verdict {
    many(call, response, |_| 1)
}

fn many<T>(
    call: &str,
    response: Result<tonic::Response<T>, tonic::Status>,
    count: impl FnOnce(T) -> usize,
) -> Verdict {
    Verdict::new(call, answer(response).map(count))
}

fn signed<T>(message: T, token: Option<&str>) -> Request<T> {
    match token {
        Some(token) => with_token(message, token),
        None => Request::new(message),
    }
}
