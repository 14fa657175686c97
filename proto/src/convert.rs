//! The only conversion between wire and core types. Raw integers stop here.

mod direct;
mod pipeline;
mod settings;

use domain_core::addr::{Granule, Iova, IovaRange, RangeError};
use domain_core::alloc::AllocRequest;
use domain_core::batch::BatchMode;
use domain_core::coherent::{Allocated, CoherentSpec};
use domain_core::domain::{Scrub, Usage};
use domain_core::iotlb::RegionId;
use domain_core::layout::{ApertureKind, LayoutSpec};
use domain_core::lease::{LeaseSpec, Leased};
use domain_core::limits::{BATCH_ENTRIES, Quotas, REQUEST_ID_BYTES, TABLE_ENTRIES_PER_REQUEST};
use domain_core::mapping::{
    MappingFilter, MappingId, MappingKind, MappingView, Phase, Source, ViewKind,
};
use domain_core::memory::{MemoryId, MemoryView};
use domain_core::perm::{Direction, Perm};
use domain_core::region::{Access, Backing};
use domain_core::session::{Role, SessionId};
use domain_core::streaming::{MapSpec, Mapped, SyncSpec, SyncTarget, UnmapSpec};

pub use self::direct::{batch_ranges, direct_mapping, direct_mappings, direct_spec, table_size};
pub use self::pipeline::{AnswerMismatch, Piped, PipelineBatch, check_answer, pipeline_batch};
pub use self::settings::{change, settings};
use crate::names::session_name;
use crate::v1;

/// Why a message says nothing that could be asked of the core.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs)] // the messages are the docs
pub enum Malformed {
    #[error("{field} is missing")]
    Missing { field: &'static str },
    #[error("{field} has no value {value}")]
    UnknownValue { field: &'static str, value: i32 },
    #[error(
        "direction has no value {value}; it must be TO_DEVICE (1), FROM_DEVICE (2) or BIDIRECTIONAL (3)"
    )]
    UnknownDirection { value: i32 },
    #[error("perm has no value {value}; it must be READ (1), WRITE (2) or READ_WRITE (3)")]
    UnknownPerm { value: i32 },
    #[error(transparent)]
    Range(#[from] RangeError),
    #[error("{field}[{index}]: {error}")]
    RangeInList {
        field: &'static str,
        index: usize,
        error: RangeError,
    },
    #[error("a granule of {granule_bytes} bytes; there are 4096, 65536 and 2097152")]
    Granule { granule_bytes: u64 },
    #[error("{entries} entries; a batch has 1 to {BATCH_ENTRIES}")]
    BatchSize { entries: usize },
    #[error(
        "{entries} entries; a SetMap has at most {TABLE_ENTRIES_PER_REQUEST}, for more there is StreamSetMap"
    )]
    TableSize { entries: usize },
    #[error("region {number} is that of no registered memory; theirs are 2 to {most}", most = RegionId::MOST)]
    NoMemoryRegion { number: u32 },
    #[error("{one} and {other} exclude each other")]
    Exclusive {
        one: &'static str,
        other: &'static str,
    },
    #[error("a quota of {asked} {quota}; there may be {most}")]
    Quota {
        quota: &'static str,
        asked: u32,
        most: u32,
    },
    #[error("a request_id of {bytes} bytes; it has at most {REQUEST_ID_BYTES}")]
    RequestId { bytes: usize },
    #[error(
        "{values} values of {column} in a batch of {entries} entries; it has as many, or one for all, or none"
    )]
    ColumnLength {
        column: &'static str,
        values: usize,
        entries: usize,
    },
    #[error("{values} values of {column}, which the operation does not have")]
    ForeignColumn { column: &'static str, values: usize },
    #[error("a page token that this service did not make")]
    PageToken { token: String },
}

/// What a new domain's address space shall be.
///
/// # Errors
/// [`Malformed`] for a granule or backing that does not exist.
pub fn layout_spec(spec: &v1::DomainSpec) -> Result<LayoutSpec, Malformed> {
    let default = LayoutSpec::default();
    let granule_bytes = spec.granule_bytes;
    let granule = match granule_bytes {
        0 => default.granule,
        bytes => Granule::from_bytes(bytes).ok_or(Malformed::Granule { granule_bytes })?,
    };
    let backing = match v1::Backing::try_from(spec.backing) {
        Ok(v1::Backing::Unspecified | v1::Backing::Memfd) => Backing::Memfd,
        Ok(v1::Backing::Hugetlb2m) => Backing::Hugetlb2M,
        Err(_) => {
            return Err(Malformed::UnknownValue {
                field: "backing",
                value: spec.backing,
            });
        }
    };
    Ok(LayoutSpec {
        bounce_bytes: spec.bounce_bytes.unwrap_or(default.bounce_bytes),
        coherent_bytes: spec.coherent_bytes.unwrap_or(default.coherent_bytes),
        iova_limit: spec.iova_limit.unwrap_or(default.iova_limit),
        aperture_base: spec.aperture_base,
        granule,
        backing,
    })
}

/// A direction, which must be one.
///
/// # Errors
/// [`Malformed::UnknownDirection`].
pub fn direction(value: i32) -> Result<Direction, Malformed> {
    match v1::Direction::try_from(value) {
        Ok(v1::Direction::ToDevice) => Ok(Direction::ToDevice),
        Ok(v1::Direction::FromDevice) => Ok(Direction::FromDevice),
        Ok(v1::Direction::Bidirectional) => Ok(Direction::Bidirectional),
        Ok(v1::Direction::Unspecified) | Err(_) => Err(Malformed::UnknownDirection { value }),
    }
}

/// A permission, which must be one.
///
/// # Errors
/// [`Malformed::UnknownPerm`].
pub fn perm(value: i32) -> Result<Perm, Malformed> {
    match v1::Perm::try_from(value) {
        Ok(v1::Perm::Read) => Ok(Perm::Read),
        Ok(v1::Perm::Write) => Ok(Perm::Write),
        Ok(v1::Perm::ReadWrite) => Ok(Perm::ReadWrite),
        Ok(v1::Perm::Unspecified) | Err(_) => Err(Malformed::UnknownPerm { value }),
    }
}

/// A role, which must be one.
///
/// # Errors
/// [`Malformed`].
pub fn role(value: i32) -> Result<Role, Malformed> {
    match v1::Role::try_from(value) {
        Ok(v1::Role::Driver) => Ok(Role::Driver),
        Ok(v1::Role::Device) => Ok(Role::Device),
        Ok(v1::Role::Unspecified) | Err(_) => Err(Malformed::UnknownValue {
            field: "role",
            value,
        }),
    }
}

/// How a session acknowledges; unset means by frames.
///
/// # Errors
/// [`Malformed`].
pub fn ack_mode(value: i32) -> Result<v1::AckMode, Malformed> {
    match v1::AckMode::try_from(value) {
        Ok(v1::AckMode::Unspecified | v1::AckMode::Frames) => Ok(v1::AckMode::Frames),
        Ok(v1::AckMode::Pins) => Ok(v1::AckMode::Pins),
        Err(_) => Err(Malformed::UnknownValue {
            field: "ack_mode",
            value,
        }),
    }
}

/// A region of registered memory, as a leaf of the page table has it.
///
/// # Errors
/// [`Malformed`] for an aperture's, and for none at all.
pub fn memory_region(number: u32) -> Result<RegionId, Malformed> {
    let region = RegionId::from_number(number).filter(|region| region.slot().is_some());
    region.ok_or(Malformed::NoMemoryRegion { number })
}

/// An access, which must be one.
///
/// # Errors
/// [`Malformed`].
pub fn access(value: i32) -> Result<Access, Malformed> {
    match v1::Access::try_from(value) {
        Ok(v1::Access::ReadOnly) => Ok(Access::ReadOnly),
        Ok(v1::Access::ReadWrite) => Ok(Access::ReadWrite),
        Ok(v1::Access::Unspecified) | Err(_) => Err(Malformed::UnknownValue {
            field: "access",
            value,
        }),
    }
}

/// What makes a repeated request known; `None` if it is empty.
///
/// # Errors
/// [`Malformed::RequestId`] for one that is too long.
pub fn request_id(id: &str) -> Result<Option<&str>, Malformed> {
    match id.len() {
        0 => Ok(None),
        1..=REQUEST_ID_BYTES => Ok(Some(id)),
        bytes => Err(Malformed::RequestId { bytes }),
    }
}

/// Checks the size of a batch, and says what one refused entry means.
///
/// # Errors
/// [`Malformed::BatchSize`] for none or too many entries.
pub fn batch_mode(entries: usize, partial: bool) -> Result<BatchMode, Malformed> {
    if !(1..=BATCH_ENTRIES).contains(&entries) {
        return Err(Malformed::BatchSize { entries });
    }
    Ok(if partial {
        BatchMode::Partial
    } else {
        BatchMode::AllOrNothing
    })
}

/// One buffer to map.
///
/// # Errors
/// [`Malformed::UnknownDirection`].
pub fn map_spec(entry: &v1::MapEntry) -> Result<MapSpec, Malformed> {
    Ok(MapSpec {
        memory: MemoryId::new(entry.memory_id),
        offset: entry.offset,
        len_bytes: entry.len_bytes,
        direction: direction(entry.direction)?,
        keep_offset: entry.keep_offset,
        preserve: entry.preserve,
        skip_sync: entry.skip_sync,
        align_bytes: entry.align_bytes,
        limit: entry.limit.map(Iova::new),
    })
}

/// One mapping to end.
#[must_use]
pub fn unmap_spec(entry: &v1::UnmapEntry) -> UnmapSpec {
    UnmapSpec {
        iova: Iova::new(entry.iova),
        id: MappingId::new(entry.mapping_id),
        written_bytes: entry.written_bytes,
        skip_sync: entry.skip_sync,
    }
}

/// Which way a sync copies; it must be one.
///
/// # Errors
/// [`Malformed`] for a target that does not exist.
fn sync_target(value: i32) -> Result<SyncTarget, Malformed> {
    match v1::SyncTarget::try_from(value) {
        Ok(v1::SyncTarget::ForCpu) => Ok(SyncTarget::ForCpu),
        Ok(v1::SyncTarget::ForDevice) => Ok(SyncTarget::ForDevice),
        Ok(v1::SyncTarget::Unspecified) | Err(_) => Err(Malformed::UnknownValue {
            field: "target",
            value,
        }),
    }
}

/// One part to sync.
///
/// # Errors
/// [`Malformed`] for a target that does not exist.
pub fn sync_spec(entry: &v1::SyncEntry) -> Result<SyncSpec, Malformed> {
    Ok(SyncSpec {
        iova: Iova::new(entry.iova),
        id: MappingId::new(entry.mapping_id),
        offset: entry.offset,
        len_bytes: entry.len_bytes,
        target: sync_target(entry.target)?,
    })
}

/// Coherent memory to allocate.
#[must_use]
pub fn coherent_spec(request: &v1::AllocCoherentRequest) -> CoherentSpec {
    CoherentSpec {
        place: AllocRequest {
            len_bytes: request.len_bytes,
            align_bytes: request.align_bytes,
            limit: request.limit.map(Iova::new),
        },
        persistent: request.persistent,
    }
}

/// Bounce memory to lease.
#[must_use]
pub fn lease_spec(request: &v1::LeaseRequest) -> LeaseSpec {
    LeaseSpec {
        place: AllocRequest {
            len_bytes: request.len_bytes,
            align_bytes: request.align_bytes,
            limit: request.limit.map(Iova::new),
        },
    }
}

/// Which mappings to list; whose, was read before.
///
/// # Errors
/// [`Malformed`] for a kind that does not exist, a range that ends before it
/// starts, and a place in no memory.
pub fn mapping_filter(
    request: &v1::ListMappingsRequest,
    owner: Option<SessionId>,
) -> Result<MappingFilter, Malformed> {
    let kind = match v1::MappingKind::try_from(request.kind) {
        Ok(v1::MappingKind::Unspecified) => None,
        Ok(v1::MappingKind::Streaming) => Some(MappingKind::Streaming),
        Ok(v1::MappingKind::Coherent) => Some(MappingKind::Coherent),
        Ok(v1::MappingKind::Direct) => Some(MappingKind::Direct),
        Ok(v1::MappingKind::Lease) => Some(MappingKind::Lease),
        Err(_) => {
            return Err(Malformed::UnknownValue {
                field: "kind",
                value: request.kind,
            });
        }
    };
    let memory = (request.memory_id != 0).then(|| MemoryId::new(request.memory_id));
    if memory.is_none() && request.memory_offset.is_some() {
        return Err(Malformed::Missing { field: "memory_id" });
    }
    Ok(MappingFilter {
        owner,
        kind,
        memory,
        memory_offset: request.memory_offset,
        range: request.range.map(range).transpose()?,
    })
}

/// A range from the wire.
///
/// # Errors
/// [`RangeError`] if it ends before it starts.
pub fn range(wire: v1::IovaRange) -> Result<IovaRange, RangeError> {
    IovaRange::new(Iova::new(wire.start), Iova::new(wire.last))
}

/// A range from the wire, which must be there.
///
/// # Errors
/// [`Malformed`] if it is not, or ends before it starts.
pub fn given_range(
    field: &'static str,
    wire: Option<v1::IovaRange>,
) -> Result<IovaRange, Malformed> {
    Ok(range(wire.ok_or(Malformed::Missing { field })?)?)
}

impl From<IovaRange> for v1::IovaRange {
    fn from(range: IovaRange) -> v1::IovaRange {
        v1::IovaRange {
            start: range.start().get(),
            last: range.last().get(),
        }
    }
}

impl From<Backing> for v1::Backing {
    fn from(backing: Backing) -> v1::Backing {
        match backing {
            Backing::Memfd => v1::Backing::Memfd,
            Backing::Hugetlb2M => v1::Backing::Hugetlb2m,
        }
    }
}

impl From<Scrub> for v1::Scrub {
    fn from(scrub: Scrub) -> v1::Scrub {
        match scrub {
            Scrub::OnMap => v1::Scrub::OnMap,
            Scrub::OnUnmap => v1::Scrub::OnUnmap,
        }
    }
}

impl From<Quotas> for v1::Quotas {
    fn from(quotas: Quotas) -> v1::Quotas {
        let Quotas {
            sessions,
            mappings,
            memories,
            direct,
            leases,
            lease_bytes,
        } = quotas;
        v1::Quotas {
            sessions,
            mappings,
            memories,
            direct,
            leases,
            lease_bytes,
        }
    }
}

impl From<Direction> for v1::Direction {
    fn from(direction: Direction) -> v1::Direction {
        match direction {
            Direction::ToDevice => v1::Direction::ToDevice,
            Direction::FromDevice => v1::Direction::FromDevice,
            Direction::Bidirectional => v1::Direction::Bidirectional,
        }
    }
}

impl From<Perm> for v1::Perm {
    fn from(perm: Perm) -> v1::Perm {
        match perm {
            Perm::Read => v1::Perm::Read,
            Perm::Write => v1::Perm::Write,
            Perm::ReadWrite => v1::Perm::ReadWrite,
        }
    }
}

impl From<Role> for v1::Role {
    fn from(role: Role) -> v1::Role {
        match role {
            Role::Driver => v1::Role::Driver,
            Role::Device => v1::Role::Device,
        }
    }
}

impl From<Access> for v1::Access {
    fn from(access: Access) -> v1::Access {
        match access {
            Access::ReadOnly => v1::Access::ReadOnly,
            Access::ReadWrite => v1::Access::ReadWrite,
        }
    }
}

impl From<ApertureKind> for v1::RegionKind {
    fn from(kind: ApertureKind) -> v1::RegionKind {
        match kind {
            ApertureKind::Bounce => v1::RegionKind::Bounce,
            ApertureKind::Coherent => v1::RegionKind::Coherent,
        }
    }
}

impl From<Phase> for v1::MappingState {
    fn from(phase: Phase) -> v1::MappingState {
        match phase {
            Phase::Reserved => v1::MappingState::Reserved,
            Phase::Live => v1::MappingState::Live,
            Phase::Draining => v1::MappingState::Draining,
            Phase::Invalidating => v1::MappingState::Invalidating,
            Phase::Quarantined => v1::MappingState::Quarantined,
        }
    }
}

impl From<Mapped> for v1::StreamingMapping {
    fn from(mapped: Mapped) -> v1::StreamingMapping {
        v1::StreamingMapping {
            mapping_id: mapped.id.get(),
            iova: mapped.iova.get(),
            len_bytes: mapped.len_bytes,
        }
    }
}

impl From<Allocated> for v1::AllocCoherentResponse {
    fn from(allocated: Allocated) -> v1::AllocCoherentResponse {
        v1::AllocCoherentResponse {
            mapping_id: allocated.id.get(),
            iova: allocated.iova().get(),
            len_bytes: len_bytes(allocated.range),
        }
    }
}

impl From<Leased> for v1::LeaseResponse {
    fn from(leased: Leased) -> v1::LeaseResponse {
        v1::LeaseResponse {
            mapping_id: leased.id.get(),
            iova: leased.iova().get(),
            len_bytes: len_bytes(leased.range),
        }
    }
}

impl From<&MapSpec> for v1::MapEntry {
    fn from(spec: &MapSpec) -> v1::MapEntry {
        v1::MapEntry {
            memory_id: spec.memory.get(),
            offset: spec.offset,
            len_bytes: spec.len_bytes,
            direction: v1::Direction::from(spec.direction).into(),
            keep_offset: spec.keep_offset,
            preserve: spec.preserve,
            skip_sync: spec.skip_sync,
            align_bytes: spec.align_bytes,
            limit: spec.limit.map(Iova::get),
        }
    }
}

impl From<&UnmapSpec> for v1::UnmapEntry {
    fn from(spec: &UnmapSpec) -> v1::UnmapEntry {
        v1::UnmapEntry {
            iova: spec.iova.get(),
            mapping_id: spec.id.get(),
            written_bytes: spec.written_bytes,
            skip_sync: spec.skip_sync,
        }
    }
}

impl From<&SyncSpec> for v1::SyncEntry {
    fn from(spec: &SyncSpec) -> v1::SyncEntry {
        v1::SyncEntry {
            iova: spec.iova.get(),
            mapping_id: spec.id.get(),
            offset: spec.offset,
            len_bytes: spec.len_bytes,
            target: v1::SyncTarget::from(spec.target).into(),
        }
    }
}

impl From<SyncTarget> for v1::SyncTarget {
    fn from(target: SyncTarget) -> v1::SyncTarget {
        match target {
            SyncTarget::ForCpu => v1::SyncTarget::ForCpu,
            SyncTarget::ForDevice => v1::SyncTarget::ForDevice,
        }
    }
}

impl From<(Iova, MappingId)> for v1::FreeCoherentRequest {
    fn from((iova, id): (Iova, MappingId)) -> v1::FreeCoherentRequest {
        v1::FreeCoherentRequest {
            iova: iova.get(),
            mapping_id: id.get(),
            request_id: String::new(),
        }
    }
}

impl From<&CoherentSpec> for v1::AllocCoherentRequest {
    fn from(spec: &CoherentSpec) -> v1::AllocCoherentRequest {
        v1::AllocCoherentRequest {
            len_bytes: spec.place.len_bytes,
            align_bytes: spec.place.align_bytes,
            limit: spec.place.limit.map(Iova::get),
            persistent: spec.persistent,
            request_id: String::new(),
        }
    }
}

impl From<(Iova, MappingId)> for v1::ReleaseRequest {
    fn from((iova, id): (Iova, MappingId)) -> v1::ReleaseRequest {
        v1::ReleaseRequest {
            iova: iova.get(),
            mapping_id: id.get(),
            request_id: String::new(),
        }
    }
}

impl From<&LeaseSpec> for v1::LeaseRequest {
    fn from(spec: &LeaseSpec) -> v1::LeaseRequest {
        v1::LeaseRequest {
            len_bytes: spec.place.len_bytes,
            align_bytes: spec.place.align_bytes,
            limit: spec.place.limit.map(Iova::get),
            request_id: String::new(),
        }
    }
}

impl From<MappingKind> for v1::MappingKind {
    fn from(kind: MappingKind) -> v1::MappingKind {
        match kind {
            MappingKind::Streaming => v1::MappingKind::Streaming,
            MappingKind::Coherent => v1::MappingKind::Coherent,
            MappingKind::Direct => v1::MappingKind::Direct,
            MappingKind::Lease => v1::MappingKind::Lease,
        }
    }
}

impl From<MappingView> for v1::Mapping {
    fn from(view: MappingView) -> v1::Mapping {
        let direction = match view.kind {
            ViewKind::Streaming { direction, .. } => direction.into(),
            ViewKind::Coherent | ViewKind::Lease | ViewKind::Direct { .. } => {
                v1::Direction::Unspecified
            }
        };
        let (memory_id, offset) = match view.source() {
            Some(Source { memory, offset }) => (memory.get(), offset),
            None => (0, 0),
        };
        v1::Mapping {
            kind: v1::MappingKind::from(view.kind.kind()).into(),
            mapping_id: view.id.map_or(0, MappingId::get),
            iova: view.visible.start().get(),
            len_bytes: len_bytes(view.visible),
            perm: v1::Perm::from(view.perm).into(),
            direction: direction.into(),
            session: view.owner.map(session_name).unwrap_or_default(),
            memory_id,
            offset,
            state: v1::MappingState::from(view.phase).into(),
            persistent: view.owner.is_none(),
            blocked_by: view.blocked_by.map(session_name).unwrap_or_default(),
        }
    }
}

impl From<MemoryView> for v1::Memory {
    fn from(view: MemoryView) -> v1::Memory {
        v1::Memory {
            memory_id: view.id.get(),
            session: view.owner.map(session_name).unwrap_or_default(),
            size_bytes: view.size_bytes,
            writable: view.writable,
            hugetlb: view.hugetlb,
            mappings: view.mappings,
            direct_mappings: view.direct,
        }
    }
}

impl From<Usage> for v1::DomainUsage {
    fn from(usage: Usage) -> v1::DomainUsage {
        v1::DomainUsage {
            sessions: count(usage.sessions),
            streaming_mappings: usage.streaming as u64,
            coherent_allocations: usage.coherent as u64,
            memories: count(usage.memories),
            bounce_used_bytes: usage.bounce.used_bytes,
            coherent_used_bytes: usage.coherent_aperture.used_bytes,
            bounce_largest_hole_bytes: usage.bounce.largest_hole_bytes,
            coherent_largest_hole_bytes: usage.coherent_aperture.largest_hole_bytes,
            direct_mappings: usage.direct as u64,
            table_bytes: usage.table_bytes,
            invalidating_mappings: usage.invalidating as u64,
            quarantined_mappings: usage.quarantined.mappings as u64,
            quarantined_bytes: usage.quarantined.bytes,
            fenced_sessions: count(usage.fenced),
            leases: usage.leases.count as u64,
            lease_bytes: usage.leases.bytes,
        }
    }
}

/// The length of a range on the wire: no file is as long as the whole space,
/// which is the only one that does not fit.
fn len_bytes(range: IovaRange) -> u64 {
    range.len_bytes().unwrap_or(u64::MAX)
}

/// Counts on the wire stop at 2^32-1; quotas are far below.
#[must_use]
pub fn count(number: usize) -> u32 {
    u32::try_from(number).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unset_spec_is_the_documented_default() {
        assert_eq!(
            layout_spec(&v1::DomainSpec::default()).unwrap(),
            LayoutSpec::default()
        );
        let none = v1::DomainSpec {
            bounce_bytes: Some(0),
            ..v1::DomainSpec::default()
        };
        assert_eq!(layout_spec(&none).unwrap().bounce_bytes, 0);
    }

    #[test]
    fn values_of_a_later_version_are_refused_by_number() {
        assert_eq!(direction(9), Err(Malformed::UnknownDirection { value: 9 }));
        assert_eq!(direction(0), Err(Malformed::UnknownDirection { value: 0 }));
        assert!(role(0).is_err() && role(3).is_err() && access(0).is_err() && access(7).is_err());
        let odd = v1::DomainSpec {
            granule_bytes: 8192,
            ..v1::DomainSpec::default()
        };
        assert_eq!(
            layout_spec(&odd),
            Err(Malformed::Granule {
                granule_bytes: 8192
            })
        );
        assert_eq!(perm(0), Err(Malformed::UnknownPerm { value: 0 }));
        assert_eq!(perm(4), Err(Malformed::UnknownPerm { value: 4 }));
        let kind = v1::ListMappingsRequest {
            kind: 9,
            ..v1::ListMappingsRequest::default()
        };
        assert!(mapping_filter(&kind, None).is_err());
    }

    #[test]
    fn a_filter_asks_for_what_is_set_and_nothing_else() {
        let all = mapping_filter(&v1::ListMappingsRequest::default(), None);
        assert_eq!(all, Ok(MappingFilter::default()));
        let aliases = v1::ListMappingsRequest {
            kind: v1::MappingKind::Direct.into(),
            memory_id: 7,
            memory_offset: Some(0),
            range: Some(v1::IovaRange { start: 1, last: 2 }),
            ..v1::ListMappingsRequest::default()
        };
        let expected = MappingFilter {
            owner: Some(SessionId::new(3)),
            kind: Some(MappingKind::Direct),
            memory: Some(MemoryId::new(7)),
            memory_offset: Some(0),
            range: Some(IovaRange::new(Iova::new(1), Iova::new(2)).unwrap()),
        };
        let owner = Some(SessionId::new(3));
        assert_eq!(mapping_filter(&aliases, owner), Ok(expected));
        // A place in no memory is not a place.
        let nowhere = v1::ListMappingsRequest {
            memory_id: 0,
            ..aliases
        };
        let missing = Malformed::Missing { field: "memory_id" };
        assert_eq!(mapping_filter(&nowhere, owner), Err(missing));
    }

    #[test]
    fn an_empty_or_endless_batch_is_refused() {
        assert_eq!(
            batch_mode(0, true),
            Err(Malformed::BatchSize { entries: 0 })
        );
        assert_eq!(
            batch_mode(BATCH_ENTRIES, false),
            Ok(BatchMode::AllOrNothing)
        );
        assert_eq!(batch_mode(1, true), Ok(BatchMode::Partial));
        assert!(batch_mode(BATCH_ENTRIES + 1, false).is_err());
    }

    #[test]
    fn what_a_client_asks_is_what_the_daemon_reads() {
        let map = MapSpec {
            memory: MemoryId::new(1),
            offset: 2,
            len_bytes: 3,
            direction: Direction::FromDevice,
            keep_offset: true,
            preserve: false,
            skip_sync: true,
            align_bytes: 8192,
            limit: Some(Iova::new(4)),
        };
        assert_eq!(map_spec(&v1::MapEntry::from(&map)), Ok(map));
        let swapped = MapSpec {
            keep_offset: false,
            preserve: true,
            skip_sync: false,
            limit: None,
            ..map
        };
        assert_eq!(map_spec(&v1::MapEntry::from(&swapped)), Ok(swapped));

        let unmap = UnmapSpec {
            iova: Iova::new(5),
            id: MappingId::new(6),
            written_bytes: Some(7),
            skip_sync: true,
        };
        assert_eq!(unmap_spec(&v1::UnmapEntry::from(&unmap)), unmap);

        for target in [SyncTarget::ForCpu, SyncTarget::ForDevice] {
            let sync = SyncSpec {
                iova: Iova::new(8),
                id: MappingId::new(9),
                offset: 10,
                len_bytes: 11,
                target,
            };
            assert_eq!(sync_spec(&v1::SyncEntry::from(&sync)), Ok(sync));
        }

        let alloc = CoherentSpec {
            place: AllocRequest {
                len_bytes: 12,
                align_bytes: 13,
                limit: Some(Iova::new(14)),
            },
            persistent: true,
        };
        assert_eq!(
            coherent_spec(&v1::AllocCoherentRequest::from(&alloc)),
            alloc
        );
        let lease = LeaseSpec { place: alloc.place };
        assert_eq!(lease_spec(&v1::LeaseRequest::from(&lease)), lease);
    }
}
