//! The one table of errors: what went wrong inside, and what is said of it on
//! gRPC and on the fd socket. Both say the same.
//!
//! Every match is exhaustive, so that a new error in the core cannot be
//! answered by accident.

mod direct;

use std::collections::{BTreeMap, HashMap};
use std::error::Error;
use std::fmt::Display;

use domain_core::addr::{IovaRange, RangeError};
use domain_core::alloc::AllocError;
use domain_core::batch::BatchError;
use domain_core::coherent::{AllocCoherentError, FreeCoherentError};
use domain_core::domain::{CreateError, InUse, OpenError, UpdateError};
use domain_core::layout::LayoutError;
use domain_core::lease::{LeaseBytesExceeded, LeaseError, ReleaseError};
use domain_core::limits::{
    BATCH_ENTRIES, Quota, QuotaExceeded, REQUEST_ID_BYTES, TABLE_ENTRIES_PER_REQUEST,
};
use domain_core::mapping::MappingMissing;
use domain_core::memory::{MemoryMissing, RegisterError, UnregisterError};
use domain_core::region::{MemoryRefused, RegionError, ShareError, SpanError};
use domain_core::session::{Denied, JoinError};
use domain_core::space::RestrictionError;
use domain_core::streaming::{MapError, Mapped, SyncError, UnmapError};
use rustix::io::Errno;
use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt};

use crate::convert::Malformed;
use crate::names::NameError;
use crate::v1::{ErrorReason, Refusal, UnmapResult, map_result};

/// `ErrorInfo.domain` of every error of this service.
pub const ERROR_DOMAIN: &str = "domaind";

impl Refusal {
    /// A refusal with one sentence for people.
    pub fn because(code: Code, reason: ErrorReason, message: impl Into<String>) -> Refusal {
        Refusal {
            code: code as i32,
            reason: reason.into(),
            message: message.into(),
            metadata: BTreeMap::new(),
        }
    }

    /// A refusal whose sentence is that of an error and its causes.
    pub fn of(code: Code, reason: ErrorReason, error: &dyn Error) -> Refusal {
        Refusal::because(code, reason, sentence(error))
    }

    /// Adds one number or word for programs.
    #[must_use]
    pub fn with(mut self, key: &str, value: impl Display) -> Refusal {
        self.metadata.insert(key.to_owned(), value.to_string());
        self
    }

    /// Adds a range as `{key}_start` and `{key}_last`.
    #[must_use]
    pub fn with_range(self, key: &str, range: IovaRange) -> Refusal {
        self.with(&format!("{key}_start"), range.start())
            .with(&format!("{key}_last"), range.last())
    }

    /// The gRPC code.
    #[must_use]
    pub fn grpc_code(&self) -> Code {
        Code::from_i32(self.code)
    }

    /// Whatever a status of this service, or of any other, says.
    #[must_use]
    pub fn from_status(status: &Status) -> Refusal {
        let info = status
            .get_details_error_info()
            .filter(|info| info.domain == ERROR_DOMAIN);
        let reason = info
            .as_ref()
            .and_then(|info| ErrorReason::from_str_name(&format!("ERROR_REASON_{}", info.reason)));
        Refusal {
            code: status.code() as i32,
            reason: reason.unwrap_or_default().into(),
            message: status.message().to_owned(),
            metadata: info
                .map(|info| info.metadata.into_iter().collect())
                .unwrap_or_default(),
        }
    }
}

impl From<Refusal> for Status {
    fn from(refusal: Refusal) -> Status {
        let metadata: HashMap<_, _> = refusal.metadata.clone().into_iter().collect();
        let name = refusal.reason().as_str_name();
        let reason = name.strip_prefix("ERROR_REASON_").unwrap_or(name);
        let details = ErrorDetails::with_error_info(reason, ERROR_DOMAIN, metadata);
        Status::with_error_details(refusal.grpc_code(), refusal.message, details)
    }
}

impl From<Result<Mapped, Refusal>> for map_result::Outcome {
    fn from(outcome: Result<Mapped, Refusal>) -> map_result::Outcome {
        match outcome {
            Ok(mapped) => map_result::Outcome::Mapping(mapped.into()),
            Err(refusal) => map_result::Outcome::Refusal(refusal),
        }
    }
}

impl From<Result<u64, Refusal>> for UnmapResult {
    fn from(outcome: Result<u64, Refusal>) -> UnmapResult {
        match outcome {
            Ok(copied_bytes) => UnmapResult {
                copied_bytes,
                refusal: None,
            },
            Err(refusal) => UnmapResult {
                copied_bytes: 0,
                refusal: Some(refusal),
            },
        }
    }
}

/// An error and its causes in one line.
#[must_use]
pub fn sentence(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}

/// Shorthand for the table below.
fn invalid(reason: ErrorReason, error: &dyn Error) -> Refusal {
    Refusal::of(Code::InvalidArgument, reason, error)
}

impl<E> From<BatchError<E>> for Refusal
where
    Refusal: From<E>,
{
    fn from(stopped: BatchError<E>) -> Refusal {
        let mut refusal = Refusal::from(stopped.error).with("entry_index", stopped.index);
        refusal.message = format!("entry {}: {}", stopped.index, refusal.message);
        refusal
    }
}

impl From<NameError> for Refusal {
    fn from(error: NameError) -> Refusal {
        let (NameError::BadDomainId { id: name }
        | NameError::NotADomainName { name }
        | NameError::NotASessionName { name }) = &error;
        invalid(ErrorReason::InvalidName, &error).with("name", name)
    }
}

impl From<Malformed> for Refusal {
    fn from(error: Malformed) -> Refusal {
        let malformed = || invalid(ErrorReason::Malformed, &error);
        match &error {
            Malformed::UnknownDirection { value } => {
                invalid(ErrorReason::UnknownDirection, &error).with("value", value)
            }
            Malformed::UnknownPerm { value } => {
                invalid(ErrorReason::UnknownPerm, &error).with("value", value)
            }
            Malformed::Range(range) => (*range).into(),
            Malformed::RangeInList {
                field,
                index,
                error: range,
            } => Refusal {
                message: error.to_string(),
                ..Refusal::from(*range)
                    .with("field", field)
                    .with("entry_index", index)
            },
            Malformed::RequestId { bytes } => invalid(ErrorReason::RequestId, &error)
                .with("bytes", bytes)
                .with("most", REQUEST_ID_BYTES),
            Malformed::Missing { field } => malformed().with("field", field),
            Malformed::UnknownValue { field, value } => {
                malformed().with("field", field).with("value", value)
            }
            Malformed::Granule { granule_bytes } => {
                malformed().with("granule_bytes", granule_bytes)
            }
            Malformed::BatchSize { entries } => malformed()
                .with("entries", entries)
                .with("most", BATCH_ENTRIES),
            Malformed::NoMemoryRegion { number } => malformed().with("region", number),
            Malformed::TableSize { entries } => malformed()
                .with("entries", entries)
                .with("most", TABLE_ENTRIES_PER_REQUEST),
            Malformed::Exclusive { one, other } => {
                malformed().with("field", one).with("other_field", other)
            }
            Malformed::Quota { quota, asked, most } => malformed()
                .with("quota", quota)
                .with("asked", asked)
                .with("most", most),
            Malformed::ColumnLength {
                column,
                values,
                entries,
            } => malformed()
                .with("column", column)
                .with("values", values)
                .with("entries", entries),
            Malformed::ForeignColumn { column, values } => malformed()
                .with("column", column)
                .with("values", values)
                .with("most", 0),
            Malformed::PageToken { token } => malformed().with("page_token", token),
        }
    }
}

impl From<RangeError> for Refusal {
    fn from(error: RangeError) -> Refusal {
        match error {
            RangeError::ZeroLength { start } => {
                invalid(ErrorReason::ZeroLength, &error).with("start", start)
            }
            RangeError::Backwards { start, last } => invalid(ErrorReason::InvalidRange, &error)
                .with("start", start)
                .with("last", last),
            RangeError::Overflow { start, len_bytes } => {
                Refusal::of(Code::OutOfRange, ErrorReason::AddressOverflow, &error)
                    .with("start", start)
                    .with("len_bytes", len_bytes)
            }
        }
    }
}

impl From<LayoutError> for Refusal {
    fn from(error: LayoutError) -> Refusal {
        let past = |reason| Refusal::of(Code::OutOfRange, reason, &error);
        match error {
            LayoutError::BaseMisaligned {
                base,
                granule_bytes,
            } => invalid(ErrorReason::Misaligned, &error)
                .with("aperture_base", base)
                .with("granule_bytes", granule_bytes),
            LayoutError::SingleGranule {
                aperture,
                bytes,
                granule_bytes,
            } => invalid(ErrorReason::ApertureTooSmall, &error)
                .with("aperture", aperture)
                .with("aperture_bytes", bytes)
                .with("granule_bytes", granule_bytes),
            LayoutError::Overflow {
                aperture,
                start,
                bytes,
            } => past(ErrorReason::AddressOverflow)
                .with("aperture", aperture)
                .with("aperture_start", start)
                .with("aperture_bytes", bytes),
            LayoutError::PastLimit {
                aperture,
                range,
                limit,
            } => past(ErrorReason::PastIovaLimit)
                .with("aperture", aperture)
                .with_range("aperture", range)
                .with("iova_limit", limit),
        }
    }
}

impl From<RegionError> for Refusal {
    fn from(error: RegionError) -> Refusal {
        match error {
            RegionError::NoMemory { want_bytes, .. } => {
                Refusal::of(Code::ResourceExhausted, ErrorReason::NoMemory, &error)
                    .with("want_bytes", want_bytes)
            }
            _ if is_exhaustion(&error) => {
                Refusal::of(Code::ResourceExhausted, ErrorReason::NoMemory, &error)
            }
            // Promises of ours, or of the kernel's, that were not kept.
            RegionError::BadName { .. }
            | RegionError::BadLength { .. }
            | RegionError::Create { .. }
            | RegionError::Protect { .. }
            | RegionError::Resize { .. }
            | RegionError::Allocate { .. }
            | RegionError::Seal { .. }
            | RegionError::NotSealed { .. }
            | RegionError::Mark { .. }
            | RegionError::Map { .. }
            | RegionError::Inspect { .. }
            | RegionError::Reopen { .. } => Refusal::of(Code::Internal, ErrorReason::Bug, &error),
        }
    }
}

impl From<CreateError> for Refusal {
    fn from(error: CreateError) -> Refusal {
        match error {
            CreateError::Region(region) => region.into(),
            CreateError::Restriction(restriction) => restriction.into(),
        }
    }
}

impl From<UpdateError> for Refusal {
    fn from(error: UpdateError) -> Refusal {
        match error {
            // Below what is in use: a state, not an exhaustion.
            UpdateError::Quota(quota) => Refusal {
                code: Code::FailedPrecondition as i32,
                ..quota.into()
            },
            UpdateError::LeaseBytes { limit, used } => {
                Refusal::of(Code::FailedPrecondition, ErrorReason::QuotaExceeded, &error)
                    .with("quota", LEASE_BYTES)
                    .with("limit", limit)
                    .with("used", used)
            }
            UpdateError::Restriction(restriction) => restriction.into(),
        }
    }
}

impl From<RestrictionError> for Refusal {
    fn from(error: RestrictionError) -> Refusal {
        match error {
            RestrictionError::Overlapping { one, other } => {
                invalid(ErrorReason::OverlappingEntries, &error)
                    .with_range("one", one)
                    .with_range("other", other)
            }
            RestrictionError::SingleByte { range } => {
                invalid(ErrorReason::InvalidRange, &error).with_range("range", range)
            }
            RestrictionError::TooMany { ranges, most } => invalid(ErrorReason::Malformed, &error)
                .with("entries", ranges)
                .with("most", most),
            RestrictionError::InUse { range, hit } => {
                Refusal::of(Code::AlreadyExists, ErrorReason::Overlap, &error)
                    .with_range("range", range)
                    .with_range("hit", hit)
            }
        }
    }
}

/// Under which name [`crate::v1::Quotas`] has it.
fn quota_name(quota: Quota) -> &'static str {
    match quota {
        Quota::Sessions => "sessions",
        Quota::Mappings => "mappings",
        Quota::Memories => "memories",
        Quota::Direct => "direct",
        Quota::Leases => "leases",
    }
}

/// The quota of bytes, as [`quota_name`] says those of numbers.
const LEASE_BYTES: &str = "lease_bytes";

impl From<QuotaExceeded> for Refusal {
    fn from(error: QuotaExceeded) -> Refusal {
        Refusal::of(Code::ResourceExhausted, ErrorReason::QuotaExceeded, &error)
            .with("quota", quota_name(error.quota))
            .with("limit", error.limit)
            .with("used", error.used)
    }
}

impl From<Denied> for Refusal {
    fn from(error: Denied) -> Refusal {
        match error {
            Denied::DomainClosed => {
                Refusal::of(Code::FailedPrecondition, ErrorReason::DomainClosed, &error)
            }
            Denied::SessionEnded { session } => {
                Refusal::of(Code::FailedPrecondition, ErrorReason::SessionEnded, &error)
                    .with("session", session)
            }
            Denied::BounceReset => {
                Refusal::of(Code::FailedPrecondition, ErrorReason::BounceReset, &error)
            }
            Denied::WrongRole { session, role } => {
                Refusal::of(Code::PermissionDenied, ErrorReason::WrongRole, &error)
                    .with("session", session)
                    .with("role", role)
            }
        }
    }
}

impl From<JoinError> for Refusal {
    fn from(error: JoinError) -> Refusal {
        match error {
            JoinError::DomainClosed => Denied::DomainClosed.into(),
            JoinError::Quota(quota) => quota.into(),
        }
    }
}

impl From<InUse> for Refusal {
    fn from(error: InUse) -> Refusal {
        Refusal::of(Code::FailedPrecondition, ErrorReason::DomainInUse, &error)
            .with("sessions", error.sessions)
            .with("streaming_mappings", error.streaming)
            .with("leases", error.leases)
            .with("coherent_allocations", error.coherent)
            .with("direct_mappings", error.direct)
            .with("memories", error.memories)
    }
}

impl From<AllocError> for Refusal {
    fn from(error: AllocError) -> Refusal {
        match error {
            AllocError::ZeroLength => invalid(ErrorReason::ZeroLength, &error),
            AllocError::BadAlignment { align_bytes } => {
                invalid(ErrorReason::Misaligned, &error).with("align_bytes", align_bytes)
            }
            AllocError::NoSpace {
                want_bytes,
                align_bytes,
                largest_hole_bytes,
            } => Refusal::of(Code::ResourceExhausted, ErrorReason::NoSpace, &error)
                .with("want_bytes", want_bytes)
                .with("align_bytes", align_bytes)
                .with("largest_hole_bytes", largest_hole_bytes),
        }
    }
}

impl From<SpanError> for Refusal {
    fn from(error: SpanError) -> Refusal {
        match error {
            SpanError::Empty => invalid(ErrorReason::ZeroLength, &error),
            SpanError::OutsideMemory { offset, len, .. } if offset.checked_add(len).is_none() => {
                overflow(&error, offset, len)
            }
            SpanError::OutsideMemory { offset, len, size } => {
                invalid(ErrorReason::OutsideMemory, &error)
                    .with("offset", offset)
                    .with("len_bytes", len)
                    .with("size_bytes", size)
            }
        }
    }
}

impl From<MappingMissing> for Refusal {
    fn from(error: MappingMissing) -> Refusal {
        let (code, reason, iova, id) = match error {
            MappingMissing::NoSuchMapping { iova, id } => {
                (Code::NotFound, ErrorReason::NoSuchMapping, iova, id)
            }
            MappingMissing::NotYours { iova, id } => {
                (Code::PermissionDenied, ErrorReason::NotYours, iova, id)
            }
        };
        Refusal::of(code, reason, &error)
            .with("iova", iova)
            .with("mapping_id", id)
    }
}

impl From<MemoryMissing> for Refusal {
    fn from(error: MemoryMissing) -> Refusal {
        let (code, reason, id) = match error {
            MemoryMissing::NoSuchMemory { id } => (Code::NotFound, ErrorReason::NoSuchMemory, id),
            MemoryMissing::NotYours { id } => (Code::PermissionDenied, ErrorReason::NotYours, id),
        };
        Refusal::of(code, reason, &error).with("memory_id", id)
    }
}

impl From<MemoryRefused> for Refusal {
    fn from(error: MemoryRefused) -> Refusal {
        let refused = |code| Refusal::of(code, ErrorReason::MemoryRefused, &error);
        match &error {
            MemoryRefused::NotWritable => refused(Code::PermissionDenied),
            MemoryRefused::WriteSealed { seals } => {
                refused(Code::PermissionDenied).with("seals", seals)
            }
            MemoryRefused::NotSealedAgainstShrinking { seals } => {
                refused(Code::InvalidArgument).with("seals", seals)
            }
            MemoryRefused::NotAMemfd
            | MemoryRefused::NotAFile
            | MemoryRefused::Empty
            | MemoryRefused::NotReadable
            | MemoryRefused::Io { .. } => refused(Code::InvalidArgument),
        }
    }
}

impl From<RegisterError> for Refusal {
    fn from(error: RegisterError) -> Refusal {
        match error {
            RegisterError::Denied(denied) => denied.into(),
            RegisterError::Quota(quota) => quota.into(),
        }
    }
}

impl From<OpenError> for Refusal {
    fn from(error: OpenError) -> Refusal {
        match error {
            OpenError::Denied(denied) => denied.into(),
            OpenError::NoSuchRegion { region } => {
                Refusal::of(Code::NotFound, ErrorReason::NoSuchMemory, &error)
                    .with("region", region.get())
            }
        }
    }
}

impl From<ShareError> for Refusal {
    fn from(error: ShareError) -> Refusal {
        let of = |code, reason| Refusal::of(code, reason, &error);
        match &error {
            ShareError::Mode { .. } => {
                of(Code::FailedPrecondition, ErrorReason::MemoryNotShareable)
            }
            ShareError::NoDescriptor(_) => of(Code::ResourceExhausted, ErrorReason::NoMemory),
        }
    }
}

impl From<UnregisterError> for Refusal {
    fn from(error: UnregisterError) -> Refusal {
        match error {
            UnregisterError::Denied(denied) => denied.into(),
            UnregisterError::Missing(missing) => missing.into(),
            UnregisterError::InUse {
                id,
                mappings,
                direct,
            } => Refusal::of(Code::FailedPrecondition, ErrorReason::MemoryInUse, &error)
                .with("memory_id", id)
                .with("mappings", mappings)
                .with("direct_mappings", direct),
        }
    }
}

impl From<MapError> for Refusal {
    fn from(error: MapError) -> Refusal {
        match error {
            MapError::Denied(denied) => denied.into(),
            MapError::Quota(quota) => quota.into(),
            MapError::NoAperture => invalid(ErrorReason::NoAperture, &error),
            MapError::Memory(missing) => missing.into(),
            MapError::Span(span) => span.into(),
            MapError::MemoryReadOnly { id, .. } => {
                Refusal::of(Code::PermissionDenied, ErrorReason::ReadOnly, &error)
                    .with("memory_id", id)
            }
            MapError::HugetlbMemory { id } => {
                invalid(ErrorReason::MemoryRefused, &error).with("memory_id", id)
            }
            MapError::Alloc(alloc) => alloc.into(),
            MapError::NoRoom(no_room) => no_room.into(),
            MapError::Copy {
                memory,
                offset,
                len_bytes,
                ..
            } => copy_failed(&error, memory.get(), offset, len_bytes),
        }
    }
}

impl From<UnmapError> for Refusal {
    fn from(error: UnmapError) -> Refusal {
        let written = |written_bytes: u64| {
            invalid(ErrorReason::WrittenBytes, &error).with("written_bytes", written_bytes)
        };
        match error {
            UnmapError::Denied(denied) => denied.into(),
            UnmapError::Missing(missing) => missing.into(),
            UnmapError::Duplicate { id } => {
                invalid(ErrorReason::DuplicateEntry, &error).with("mapping_id", id)
            }
            UnmapError::Busy { id, syncs } => {
                Refusal::of(Code::FailedPrecondition, ErrorReason::MappingBusy, &error)
                    .with("mapping_id", id)
                    .with("syncs", syncs)
            }
            UnmapError::WrittenMissing { len_bytes } => {
                invalid(ErrorReason::WrittenBytes, &error).with("len_bytes", len_bytes)
            }
            UnmapError::WrittenTooLarge {
                written_bytes,
                len_bytes,
            } => written(written_bytes).with("len_bytes", len_bytes),
            UnmapError::WrittenUnwanted { written_bytes, .. } => written(written_bytes),
            UnmapError::Copy {
                memory,
                offset,
                len_bytes,
                ..
            } => copy_failed(&error, memory.get(), offset, len_bytes),
        }
    }
}

impl From<SyncError> for Refusal {
    fn from(error: SyncError) -> Refusal {
        match error {
            SyncError::Denied(denied) => denied.into(),
            SyncError::Missing(missing) => missing.into(),
            SyncError::ZeroLength => invalid(ErrorReason::ZeroLength, &error),
            SyncError::OutsideMapping {
                offset, len_bytes, ..
            } if offset.checked_add(len_bytes).is_none() => overflow(&error, offset, len_bytes),
            SyncError::OutsideMapping {
                offset,
                len_bytes,
                mapping_bytes,
            } => invalid(ErrorReason::OutsideMapping, &error)
                .with("offset", offset)
                .with("len_bytes", len_bytes)
                .with("mapping_bytes", mapping_bytes),
            SyncError::WrongDirection { direction } => {
                invalid(ErrorReason::WrongDirection, &error).with("direction", direction)
            }
            SyncError::Copy {
                memory,
                offset,
                len_bytes,
                ..
            } => copy_failed(&error, memory.get(), offset, len_bytes),
        }
    }
}

impl From<AllocCoherentError> for Refusal {
    fn from(error: AllocCoherentError) -> Refusal {
        match error {
            AllocCoherentError::Denied(denied) => denied.into(),
            AllocCoherentError::Quota(quota) => quota.into(),
            AllocCoherentError::NoAperture => invalid(ErrorReason::NoAperture, &error),
            AllocCoherentError::Alloc(alloc) => alloc.into(),
            AllocCoherentError::NoRoom(no_room) => no_room.into(),
        }
    }
}

impl From<FreeCoherentError> for Refusal {
    fn from(error: FreeCoherentError) -> Refusal {
        match error {
            FreeCoherentError::Denied(denied) => denied.into(),
            FreeCoherentError::Missing(missing) => missing.into(),
        }
    }
}

impl From<LeaseError> for Refusal {
    fn from(error: LeaseError) -> Refusal {
        match error {
            LeaseError::Denied(denied) => denied.into(),
            LeaseError::Quota(quota) => quota.into(),
            LeaseError::Bytes(bytes) => bytes.into(),
            LeaseError::NoAperture => invalid(ErrorReason::NoAperture, &error),
            LeaseError::Alloc(alloc) => alloc.into(),
            LeaseError::NoRoom(no_room) => no_room.into(),
        }
    }
}

impl From<LeaseBytesExceeded> for Refusal {
    fn from(error: LeaseBytesExceeded) -> Refusal {
        Refusal::of(Code::ResourceExhausted, ErrorReason::QuotaExceeded, &error)
            .with("quota", LEASE_BYTES)
            .with("limit", error.limit)
            .with("used", error.used)
            .with("want", error.want)
    }
}

impl From<ReleaseError> for Refusal {
    fn from(error: ReleaseError) -> Refusal {
        match error {
            ReleaseError::Denied(denied) => denied.into(),
            ReleaseError::Missing(missing) => missing.into(),
        }
    }
}

/// Is the cause that something of the machine is used up: fds, memory, space?
fn is_exhaustion(error: &(dyn Error + 'static)) -> bool {
    let exhausted = [Errno::MFILE, Errno::NFILE, Errno::NOMEM, Errno::NOSPC];
    let mut cause: Option<&(dyn Error + 'static)> = Some(error);
    while let Some(error) = cause {
        let errno = error.downcast_ref().and_then(Errno::from_io_error);
        if errno.is_some_and(|errno| exhausted.contains(&errno)) {
            return true;
        }
        cause = error.source();
    }
    false
}

/// An offset and a length whose sum leaves 64 bits.
fn overflow(error: &dyn Error, offset: u64, len_bytes: u64) -> Refusal {
    Refusal::of(Code::OutOfRange, ErrorReason::AddressOverflow, error)
        .with("offset", offset)
        .with("len_bytes", len_bytes)
}

fn copy_failed(error: &dyn Error, memory: u64, offset: u64, len_bytes: u64) -> Refusal {
    Refusal::of(Code::FailedPrecondition, ErrorReason::CopyFailed, error)
        .with("memory_id", memory)
        .with("offset", offset)
        .with("len_bytes", len_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use domain_core::addr::Iova;
    use domain_core::mapping::MappingId;

    fn no_space() -> BatchError<MapError> {
        let error = AllocError::NoSpace {
            want_bytes: 8192,
            align_bytes: 4096,
            largest_hole_bytes: 4096,
        };
        BatchError {
            index: 3,
            error: MapError::Alloc(error),
        }
    }

    #[test]
    fn a_refusal_names_the_numbers_for_people_and_for_programs() {
        let refusal = Refusal::from(no_space());
        assert_eq!(refusal.grpc_code(), Code::ResourceExhausted);
        assert_eq!(refusal.reason(), ErrorReason::NoSpace);
        assert!(refusal.message.contains("8192") && refusal.message.contains("4096"));
        assert_eq!(refusal.metadata["largest_hole_bytes"], "4096");
        assert_eq!(refusal.metadata["entry_index"], "3");
    }

    #[test]
    fn a_status_says_exactly_what_the_refusal_said() {
        let refusal = Refusal::from(no_space());
        assert_eq!(
            Refusal::from_status(&Status::from(refusal.clone())),
            refusal
        );
        let foreign = Refusal::from_status(&Status::unavailable("gone"));
        assert_eq!(
            (foreign.grpc_code(), foreign.reason()),
            (Code::Unavailable, ErrorReason::Unspecified)
        );
    }

    #[test]
    fn addresses_are_hexadecimal_in_the_metadata() {
        let missing = MappingMissing::NoSuchMapping {
            iova: Iova::new(4096),
            id: MappingId::new(9),
        };
        assert_eq!(Refusal::from(missing).metadata["iova"], "0x1000");
    }

    #[test]
    fn causes_are_told_once_and_in_order() {
        let cause = std::io::Error::other("the disk is full");
        let error = crate::frame::FrameError::Io(cause);
        assert_eq!(sentence(&error), "the fd socket: the disk is full");
    }
}
