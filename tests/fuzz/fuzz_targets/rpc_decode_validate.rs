//! Requests as they come from the wire: decoded, parsed and asked of a real
//! domain. Whatever is in them, each is done or refused with a code and a
//! reason, and the domain is whole afterwards.
#![no_main]

use std::sync::OnceLock;

use domain_core::Domain;
use domain_core::addr::Iova;
use domain_core::aperture::ScrubWith;
use domain_core::batch::BatchMode;
use domain_core::direct::Actor;
use domain_core::domain::Settings;
use domain_core::layout::LayoutSpec;
use domain_core::mapping::MappingId;
use domain_core::region::{ClientMemory, driver_memfd};
use domain_core::session::{Role, SessionId};
use domaind_proto::convert;
use domaind_proto::names::{DomainId, parse_session};
use domaind_proto::v1::{self, ErrorReason, Refusal};
use libfuzzer_sys::fuzz_target;
use prost::Message;

const P: u64 = 4096;
const SESSION: SessionId = SessionId::new(1);
const ACTOR: Actor = Actor::Session(SESSION);

fn domain() -> &'static Domain {
    static DOMAIN: OnceLock<Domain> = OnceLock::new();
    DOMAIN.get_or_init(|| {
        let layout = LayoutSpec {
            bounce_bytes: 16 * P,
            coherent_bytes: 16 * P,
            ..LayoutSpec::default()
        };
        let layout = layout.plan().expect("a plan");
        Domain::create("fuzz", layout, Settings::default(), ScrubWith::Zero).expect("a domain")
    })
}

fuzz_target!(|data: &[u8]| {
    let domain = domain();
    domain.join(SESSION, Role::Driver).expect("the only one");
    for writable in [true, false] {
        let memory = ClientMemory::accept(driver_memfd("fuzz", 8 * P).expect("a memfd"), writable);
        let memory = memory.expect("accepted");
        domain.register(SESSION, memory, false).expect("registered");
    }
    // Requests of at most 255 bytes, one after the other: kind, length, bytes.
    let mut rest = data;
    while let [kind, len, bytes @ ..] = rest {
        let len = usize::from(*len).min(bytes.len());
        let (request, behind) = bytes.split_at(len);
        if let Some(Err(refusal)) = ask(domain, *kind, request) {
            check(&refusal);
        }
        rest = behind;
    }
    domain.check_invariants();
    domain.leave(SESSION);
    domain.set_map(Actor::Owner, &[], None).expect("an empty table");
    domain
        .update(|_| Ok::<_, domain_core::domain::UpdateError>(Settings::default()))
        .expect("nothing is in use");
    let usage = domain.usage();
    assert_eq!((usage.sessions, usage.streaming, usage.direct), (0, 0, 0));
    assert_eq!((usage.coherent, usage.memories), (persistent(domain), 0));
});

/// Coherent allocations that belong to the domain; freed, so that the next input
/// finds what this one found.
fn persistent(domain: &Domain) -> usize {
    let left = domain.mappings(Default::default(), Iova::new(0), usize::MAX);
    let count = left.len();
    domain.join(SESSION, Role::Driver).expect("nobody is there");
    for view in left {
        let id = view.id.expect("a coherent allocation");
        domain
            .free_coherent(SESSION, view.visible.start(), id)
            .expect("it belongs to the domain");
    }
    domain.leave(SESSION);
    count
}

/// What is refused says what and why.
fn check(refusal: &Refusal) {
    assert_ne!(refusal.code, 0, "{refusal:?}");
    assert_ne!(refusal.reason(), ErrorReason::Unspecified, "{refusal:?}");
    assert_ne!(refusal.reason(), ErrorReason::Bug, "{refusal:?}");
    assert!(!refusal.message.is_empty());
    let status = tonic::Status::from(refusal.clone());
    assert_eq!(Refusal::from_status(&status).reason, refusal.reason);
}

/// `None` for what is no request at all.
fn ask(domain: &Domain, kind: u8, bytes: &[u8]) -> Option<Result<(), Refusal>> {
    Some(match kind % 16 {
        0 => map(domain, &v1::MapRequest::decode(bytes).ok()?),
        1 => unmap(domain, &v1::UnmapRequest::decode(bytes).ok()?),
        2 => sync(domain, &v1::SyncRequest::decode(bytes).ok()?),
        3 => alloc(domain, &v1::AllocCoherentRequest::decode(bytes).ok()?),
        4 => free(domain, v1::FreeCoherentRequest::decode(bytes).ok()?),
        5 => map_direct(domain, &v1::MapDirectRequest::decode(bytes).ok()?),
        6 => unmap_direct(domain, &v1::UnmapDirectRequest::decode(bytes).ok()?),
        7 => set_map(domain, &v1::SetMapRequest::decode(bytes).ok()?),
        8 => clear_map(domain, &v1::ClearMapRequest::decode(bytes).ok()?),
        9 => translate(domain, v1::TranslateRequest::decode(bytes).ok()?),
        10 => list(domain, &v1::ListMappingsRequest::decode(bytes).ok()?),
        11 => update(domain, &v1::UpdateDomainRequest::decode(bytes).ok()?),
        12 => plan(&v1::CreateDomainRequest::decode(bytes).ok()?),
        13 => reset(domain, &v1::ResetBounceRequest::decode(bytes).ok()?),
        14 => frame(&v1::ClientFrame::decode(bytes).ok()?),
        _ => names(std::str::from_utf8(bytes).ok()?),
    })
}

fn parsed<W, S>(
    entries: &[W],
    partial: bool,
    parse: impl Fn(&W) -> Result<S, convert::Malformed>,
) -> Result<(Vec<S>, BatchMode), Refusal> {
    let mode = convert::batch_mode(entries.len(), partial)?;
    let specs: Result<Vec<_>, _> = entries.iter().map(parse).collect();
    Ok((specs?, mode))
}

fn answer<T, E>(
    results: Result<Vec<Result<T, E>>, domain_core::batch::BatchError<E>>,
) -> Result<(), Refusal>
where
    Refusal: From<E>,
{
    for refused in results?.into_iter().filter_map(Result::err) {
        check(&refused.into());
    }
    Ok(())
}

fn map(domain: &Domain, request: &v1::MapRequest) -> Result<(), Refusal> {
    let (specs, mode) = parsed(&request.entries, request.partial, convert::map_spec)?;
    answer(domain.map(SESSION, &specs, mode))
}

fn unmap(domain: &Domain, request: &v1::UnmapRequest) -> Result<(), Refusal> {
    let parse = |entry: &_| Ok(convert::unmap_spec(entry));
    let (specs, mode) = parsed(&request.entries, request.partial, parse)?;
    answer(domain.unmap(SESSION, &specs, mode))
}

fn sync(domain: &Domain, request: &v1::SyncRequest) -> Result<(), Refusal> {
    let (specs, mode) = parsed(&request.entries, request.partial, convert::sync_spec)?;
    answer(domain.sync(SESSION, &specs, mode))
}

fn alloc(domain: &Domain, request: &v1::AllocCoherentRequest) -> Result<(), Refusal> {
    domain.alloc_coherent(SESSION, &convert::coherent_spec(request))?;
    Ok(())
}

fn free(domain: &Domain, request: v1::FreeCoherentRequest) -> Result<(), Refusal> {
    let (iova, id) = (Iova::new(request.iova), MappingId::new(request.mapping_id));
    domain.free_coherent(SESSION, iova, id)?;
    Ok(())
}

fn map_direct(domain: &Domain, request: &v1::MapDirectRequest) -> Result<(), Refusal> {
    let (specs, mode) = parsed(&request.entries, request.partial, convert::direct_spec)?;
    answer(domain.map_direct(ACTOR, &specs, mode))
}

fn unmap_direct(domain: &Domain, request: &v1::UnmapDirectRequest) -> Result<(), Refusal> {
    domain.unmap_direct(ACTOR, &convert::batch_ranges(&request.ranges)?)?;
    Ok(())
}

fn clear_map(domain: &Domain, request: &v1::ClearMapRequest) -> Result<(), Refusal> {
    domain.clear_map(ACTOR, &convert::batch_ranges(&request.ranges)?)?;
    Ok(())
}

fn set_map(domain: &Domain, request: &v1::SetMapRequest) -> Result<(), Refusal> {
    let before = domain.usage().direct_generation;
    let table: Result<Vec<_>, _> = request.entries.iter().map(convert::direct_mapping).collect();
    let set = domain.set_map(ACTOR, &table?, request.expected_generation);
    if set.is_err() {
        assert_eq!(domain.usage().direct_generation, before);
    }
    set?;
    Ok(())
}

fn translate(domain: &Domain, request: v1::TranslateRequest) -> Result<(), Refusal> {
    let range = convert::given_range("range", request.range)?;
    let _ = domain.lookup(range);
    domain.translate(range, convert::perm(request.want)?)?;
    Ok(())
}

fn list(domain: &Domain, request: &v1::ListMappingsRequest) -> Result<(), Refusal> {
    let owner = match request.session.as_str() {
        "" => None,
        name => Some(parse_session(name)?),
    };
    let filter = convert::mapping_filter(request, owner)?;
    for view in domain.mappings(filter, Iova::new(0), 100) {
        let _ = v1::Mapping::from(view);
    }
    Ok(())
}

fn update(domain: &Domain, request: &v1::UpdateDomainRequest) -> Result<(), Refusal> {
    domain.update(|settings| convert::change(request, settings))
}

fn plan(request: &v1::CreateDomainRequest) -> Result<(), Refusal> {
    DomainId::parse(&format!("domains/{}", request.domain_id))?;
    let spec = request.spec.clone().unwrap_or_default();
    convert::settings(&spec)?;
    convert::layout_spec(&spec)?.plan()?;
    Ok(())
}

fn reset(domain: &Domain, request: &v1::ResetBounceRequest) -> Result<(), Refusal> {
    domain.reset_bounce(ACTOR, request.force)?;
    Ok(())
}

fn frame(frame: &v1::ClientFrame) -> Result<(), Refusal> {
    if let Some(v1::client_frame::Body::Attach(attach)) = &frame.body {
        DomainId::parse(&attach.domain)?;
        convert::role(attach.role)?;
        convert::access(attach.access)?;
    }
    Ok(())
}

fn names(text: &str) -> Result<(), Refusal> {
    convert::request_id(text)?;
    let domain = DomainId::parse(text);
    if let Ok(id) = &domain {
        assert_eq!(id.name(), text);
    }
    parse_session(text).map(drop).or(domain.map(drop))?;
    Ok(())
}
