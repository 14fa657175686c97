//! The part of the table that is about direct mappings, translation and reset.

use domain_core::addr::Iova;
use domain_core::batch::BatchError;
use domain_core::direct::{DirectMapping, MapDirectError, SetMapError, UnmapDirectError};
use domain_core::domain::{ResetError, TranslationError};
use domain_core::iotlb::{NoRoom, TranslateError};
use domain_core::limits::Quota;
use domain_core::space::PlaceError;
use tonic::Code;

use super::{invalid, quota_name};
use crate::names::session_name;
use crate::v1::{ErrorReason, Refusal, map_direct_result};

impl From<Result<DirectMapping, Refusal>> for map_direct_result::Outcome {
    fn from(outcome: Result<DirectMapping, Refusal>) -> map_direct_result::Outcome {
        match outcome {
            Ok(mapping) => map_direct_result::Outcome::Mapping((&mapping).into()),
            Err(refusal) => map_direct_result::Outcome::Refusal(refusal),
        }
    }
}

impl From<PlaceError> for Refusal {
    fn from(error: PlaceError) -> Refusal {
        match error {
            PlaceError::PastLimit { range, limit } => {
                Refusal::of(Code::OutOfRange, ErrorReason::PastIovaLimit, &error)
                    .with_range("range", range)
                    .with("iova_limit", limit)
            }
            PlaceError::Reserved { range, reserved } => invalid(ErrorReason::ReservedRange, &error)
                .with_range("range", range)
                .with_range("reserved", reserved),
            PlaceError::Aperture { range, apertures } => {
                Refusal::of(Code::AlreadyExists, ErrorReason::Overlap, &error)
                    .with_range("range", range)
                    .with_range("hit", apertures)
            }
        }
    }
}

impl From<NoRoom> for Refusal {
    fn from(error: NoRoom) -> Refusal {
        let refusal = Refusal::of(Code::ResourceExhausted, ErrorReason::NoMemory, &error);
        match error {
            NoRoom::Full {
                want, used, most, ..
            } => refusal
                .with("want_nodes", want)
                .with("used_nodes", used)
                .with("most_nodes", most),
            NoRoom::NoMemory { want, used } => {
                refusal.with("want_nodes", want).with("used_nodes", used)
            }
        }
    }
}

impl From<MapDirectError> for Refusal {
    fn from(error: MapDirectError) -> Refusal {
        match error {
            MapDirectError::Denied(denied) => denied.into(),
            MapDirectError::Misaligned {
                what,
                value,
                granule_bytes,
            } => invalid(ErrorReason::Misaligned, &error)
                .with("field", what)
                .with("value", Iova::new(value))
                .with("granule_bytes", granule_bytes),
            MapDirectError::Range(range) => range.into(),
            MapDirectError::TooLong { len_bytes } => {
                Refusal::of(Code::OutOfRange, ErrorReason::AddressOverflow, &error)
                    .with("len_bytes", len_bytes)
            }
            MapDirectError::Memory(missing) => missing.into(),
            MapDirectError::Span(span) => span.into(),
            MapDirectError::MemoryReadOnly { id, perm } => {
                Refusal::of(Code::PermissionDenied, ErrorReason::ReadOnly, &error)
                    .with("memory_id", id)
                    .with("perm", perm)
            }
            MapDirectError::Place(place) => place.into(),
            MapDirectError::Overlap { range, hit } => {
                Refusal::of(Code::AlreadyExists, ErrorReason::Overlap, &error)
                    .with_range("range", range)
                    .with_range("hit", hit)
            }
            MapDirectError::Invalidating {
                range,
                hit,
                blocked_by,
            } => {
                let reason = ErrorReason::Invalidating;
                let refusal = Refusal::of(Code::FailedPrecondition, reason, &error)
                    .with_range("range", range)
                    .with_range("hit", hit);
                match blocked_by {
                    Some(session) => refusal.with("sessions", session_name(session)),
                    None => refusal,
                }
            }
            MapDirectError::OverlapsEntry {
                range,
                other,
                index,
            } => invalid(ErrorReason::OverlappingEntries, &error)
                .with_range("one", range)
                .with_range("other", other)
                .with("other_index", index),
            MapDirectError::Quota(quota) => quota.into(),
            MapDirectError::NoSpace(alloc) => alloc.into(),
            MapDirectError::TooFar { offset, most_bytes } => {
                Refusal::of(Code::OutOfRange, ErrorReason::AddressOverflow, &error)
                    .with("offset", offset)
                    .with("most_bytes", most_bytes)
            }
            MapDirectError::NoRoom(no_room) => no_room.into(),
        }
    }
}

impl From<UnmapDirectError> for Refusal {
    fn from(error: UnmapDirectError) -> Refusal {
        let not_found = |reason| Refusal::of(Code::NotFound, reason, &error);
        match error {
            UnmapDirectError::Denied(denied) => denied.into(),
            UnmapDirectError::Overlapping { one, other } => {
                invalid(ErrorReason::OverlappingEntries, &error)
                    .with_range("one", one)
                    .with_range("other", other)
            }
            UnmapDirectError::NotMapped { range } => {
                not_found(ErrorReason::NotMapped).with_range("range", range)
            }
            UnmapDirectError::Cuts { range, cut } => not_found(ErrorReason::CutsMapping)
                .with_range("range", range)
                .with_range("cut", cut),
            UnmapDirectError::NotYours { range } => {
                Refusal::of(Code::PermissionDenied, ErrorReason::NotYours, &error)
                    .with_range("mapping", range)
            }
        }
    }
}

impl From<SetMapError> for Refusal {
    fn from(error: SetMapError) -> Refusal {
        match error {
            SetMapError::Denied(denied) => denied.into(),
            SetMapError::Stale { expected, current } => {
                Refusal::of(Code::Aborted, ErrorReason::StaleGeneration, &error)
                    .with("expected_generation", expected)
                    .with("direct_generation", current)
            }
            SetMapError::TooMany { asked, limit } => {
                Refusal::of(Code::ResourceExhausted, ErrorReason::QuotaExceeded, &error)
                    .with("quota", quota_name(Quota::Direct))
                    .with("limit", limit)
                    .with("asked", asked)
            }
            SetMapError::TooManyWaiting {
                asked,
                waiting,
                limit,
            } => Refusal::of(Code::ResourceExhausted, ErrorReason::QuotaExceeded, &error)
                .with("quota", quota_name(Quota::Direct))
                .with("limit", limit)
                .with("asked", asked)
                .with("waiting", waiting),
            SetMapError::Entry { index, error } => BatchError { index, error }.into(),
            SetMapError::NotYours { range } => {
                Refusal::of(Code::PermissionDenied, ErrorReason::NotYours, &error)
                    .with_range("mapping", range)
            }
            SetMapError::NoRoom(no_room) => no_room.into(),
        }
    }
}

impl From<TranslationError> for Refusal {
    fn from(error: TranslationError) -> Refusal {
        match error {
            TranslationError::Translate(TranslateError::Hole { at }) => {
                Refusal::of(Code::NotFound, ErrorReason::NotMapped, &error).with("at", at)
            }
            TranslationError::Translate(TranslateError::Perm { range, perm, want }) => {
                Refusal::of(Code::PermissionDenied, ErrorReason::PermTooSmall, &error)
                    .with_range("mapping", range)
                    .with("perm", perm)
                    .with("want", want)
            }
            TranslationError::TooManyPieces { range, most } => {
                Refusal::of(Code::ResourceExhausted, ErrorReason::QuotaExceeded, &error)
                    .with("quota", "pieces")
                    .with("limit", most)
                    .with_range("range", range)
            }
        }
    }
}

impl From<ResetError> for Refusal {
    fn from(error: ResetError) -> Refusal {
        match error {
            ResetError::Denied(denied) => denied.into(),
            ResetError::NoAperture => invalid(ErrorReason::NoAperture, &error),
            ResetError::InUse { streaming, leases } => {
                Refusal::of(Code::FailedPrecondition, ErrorReason::BounceInUse, &error)
                    .with("streaming_mappings", streaming)
                    .with("leases", leases)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use domain_core::addr::{IovaRange, RangeError};
    use domain_core::memory::MemoryId;
    use domain_core::perm::Perm;

    fn range(start: u64, last: u64) -> IovaRange {
        IovaRange::new(Iova::new(start), Iova::new(last)).unwrap()
    }

    /// The code and the reason that an error is answered with.
    fn answered(error: impl Into<Refusal>) -> (Code, ErrorReason) {
        let refusal = error.into();
        (refusal.grpc_code(), refusal.reason())
    }

    #[test]
    fn a_piece_that_cannot_lie_there_is_told_why() {
        let (piece, hit) = (range(0x1000, 0x1fff), range(0, 0xffff));
        let index = 4;
        let expected: [(MapDirectError, _, _); 9] = [
            (
                PlaceError::PastLimit {
                    range: piece,
                    limit: Iova::new(9),
                }
                .into(),
                Code::OutOfRange,
                ErrorReason::PastIovaLimit,
            ),
            (
                PlaceError::Reserved {
                    range: piece,
                    reserved: hit,
                }
                .into(),
                Code::InvalidArgument,
                ErrorReason::ReservedRange,
            ),
            (
                PlaceError::Aperture {
                    range: piece,
                    apertures: hit,
                }
                .into(),
                Code::AlreadyExists,
                ErrorReason::Overlap,
            ),
            (
                MapDirectError::Overlap { range: piece, hit },
                Code::AlreadyExists,
                ErrorReason::Overlap,
            ),
            (
                MapDirectError::OverlapsEntry {
                    range: piece,
                    other: hit,
                    index,
                },
                Code::InvalidArgument,
                ErrorReason::OverlappingEntries,
            ),
            (
                MapDirectError::TooLong { len_bytes: 1 << 63 },
                Code::OutOfRange,
                ErrorReason::AddressOverflow,
            ),
            (
                RangeError::ZeroLength {
                    start: Iova::new(0),
                }
                .into(),
                Code::InvalidArgument,
                ErrorReason::ZeroLength,
            ),
            (
                MapDirectError::MemoryReadOnly {
                    id: MemoryId::new(1),
                    perm: Perm::Write,
                },
                Code::PermissionDenied,
                ErrorReason::ReadOnly,
            ),
            (
                NoRoom::NoMemory { want: 2, used: 1 }.into(),
                Code::ResourceExhausted,
                ErrorReason::NoMemory,
            ),
        ];
        for (error, code, reason) in expected {
            assert_eq!(answered(error), (code, reason), "{error}");
        }
        let aperture = PlaceError::Aperture {
            range: piece,
            apertures: hit,
        };
        assert_eq!(Refusal::from(aperture).metadata["hit_last"], "0xffff");
        let twice = MapDirectError::OverlapsEntry {
            range: piece,
            other: hit,
            index,
        };
        assert_eq!(Refusal::from(twice).metadata["other_index"], "4");
    }

    #[test]
    fn a_misaligned_number_is_named() {
        let error = MapDirectError::Misaligned {
            what: "iova",
            value: 0x1001,
            granule_bytes: 4096,
        };
        let refusal = Refusal::from(error);
        assert_eq!(refusal.reason(), ErrorReason::Misaligned);
        assert_eq!(refusal.metadata["field"], "iova");
        assert_eq!(refusal.metadata["value"], "0x1001");
        assert_eq!(refusal.metadata["granule_bytes"], "4096");
    }

    #[test]
    fn a_range_that_cuts_and_one_that_is_empty_are_not_found() {
        let (asked, there) = (range(0, 0x1fff), range(0x1000, 0x2fff));
        let cuts = UnmapDirectError::Cuts {
            range: asked,
            cut: there,
        };
        assert_eq!(answered(cuts), (Code::NotFound, ErrorReason::CutsMapping));
        assert_eq!(Refusal::from(cuts).metadata["cut_start"], "0x1000");
        let empty = UnmapDirectError::NotMapped { range: asked };
        assert_eq!(answered(empty), (Code::NotFound, ErrorReason::NotMapped));
        let foreign = UnmapDirectError::NotYours { range: there };
        let denied = (Code::PermissionDenied, ErrorReason::NotYours);
        assert_eq!(answered(foreign), denied);
        assert_eq!(answered(SetMapError::NotYours { range: there }), denied);
    }

    #[test]
    fn an_entry_of_a_table_is_named_for_people_and_for_programs() {
        let error = MapDirectError::Overlap {
            range: range(0, 1),
            hit: range(1, 2),
        };
        let refusal = Refusal::from(SetMapError::Entry { index: 99, error });
        assert_eq!(refusal.metadata["entry_index"], "99");
        assert!(refusal.message.starts_with("entry 99: "));
        assert_eq!(refusal.reason(), ErrorReason::Overlap);
    }

    #[test]
    fn a_stale_generation_names_the_present_one() {
        let refusal = Refusal::from(SetMapError::Stale {
            expected: 3,
            current: 7,
        });
        assert_eq!(refusal.grpc_code(), Code::Aborted);
        assert_eq!(refusal.metadata["expected_generation"], "3");
        assert_eq!(refusal.metadata["direct_generation"], "7");
    }

    #[test]
    fn a_translation_fails_at_the_first_hole_or_small_permission() {
        let hole = TranslationError::Translate(TranslateError::Hole { at: Iova::new(16) });
        assert_eq!(answered(hole), (Code::NotFound, ErrorReason::NotMapped));
        assert_eq!(Refusal::from(hole).metadata["at"], "0x10");
        let small = TranslationError::Translate(TranslateError::Perm {
            range: range(0, 1),
            perm: Perm::Read,
            want: Perm::Write,
        });
        let denied = (Code::PermissionDenied, ErrorReason::PermTooSmall);
        assert_eq!(answered(small), denied);
        let many = TranslationError::TooManyPieces {
            range: range(0, 1),
            most: 1,
        };
        let exhausted = (Code::ResourceExhausted, ErrorReason::QuotaExceeded);
        assert_eq!(answered(many), exhausted);
    }

    #[test]
    fn a_reset_says_how_many_mappings_are_in_its_way() {
        let in_use = ResetError::InUse {
            streaming: 3,
            leases: 4,
        };
        let refusal = Refusal::from(in_use);
        assert_eq!(refusal.reason(), ErrorReason::BounceInUse);
        assert_eq!(refusal.metadata["streaming_mappings"], "3");
        assert_eq!(refusal.metadata["leases"], "4");
        let none = (Code::InvalidArgument, ErrorReason::NoAperture);
        assert_eq!(answered(ResetError::NoAperture), none);
    }
}
