//! Direct mappings on the wire.

use domain_core::addr::{Iova, IovaRange};
use domain_core::batch::BatchError;
use domain_core::direct::{DirectMapping, DirectSpec, Placement, Removed, TableSet};
use domain_core::domain::{Behind, Translated};
use domain_core::limits::{BATCH_ENTRIES, TABLE_ENTRIES_PER_REQUEST};
use domain_core::memory::MemoryId;
use domain_core::session::Removal;

use super::{Malformed, given_range, perm, range};
use crate::v1;

/// One piece of registered memory to enter.
///
/// # Errors
/// [`Malformed::UnknownPerm`], and [`Malformed::Exclusive`] for an iova with what
/// is for choosing one.
pub fn direct_spec(entry: &v1::MapDirectEntry) -> Result<DirectSpec, Malformed> {
    Ok(DirectSpec {
        memory: MemoryId::new(entry.memory_id),
        offset: entry.offset,
        len_bytes: entry.len_bytes,
        perm: perm(entry.perm)?,
        placement: placement(entry)?,
    })
}

fn placement(entry: &v1::MapDirectEntry) -> Result<Placement, Malformed> {
    let exclusive = |other| Malformed::Exclusive { one: "iova", other };
    match (entry.iova, entry.align_bytes, entry.limit) {
        (Some(_), 1.., _) => Err(exclusive("align_bytes")),
        (Some(_), _, Some(_)) => Err(exclusive("limit")),
        (Some(iova), 0, None) => Ok(Placement::At(Iova::new(iova))),
        (None, align_bytes, limit) => Ok(Placement::Anywhere {
            align_bytes,
            limit: limit.map(Iova::new),
        }),
    }
}

/// One entry of a direct table.
///
/// # Errors
/// [`Malformed`] without a range, for one that ends before it starts, and for
/// [`Malformed::UnknownPerm`].
pub fn direct_mapping(wire: &v1::DirectMapping) -> Result<DirectMapping, Malformed> {
    Ok(DirectMapping {
        range: given_range("range", wire.range)?,
        memory: MemoryId::new(wire.memory_id),
        offset: wire.offset,
        perm: perm(wire.perm)?,
    })
}

/// Entries of a direct table, of which the first has the number `first`.
///
/// # Errors
/// What is wrong with the first one that is.
pub fn direct_mappings(
    wire: &[v1::DirectMapping],
    first: usize,
) -> Result<Vec<DirectMapping>, BatchError<Malformed>> {
    let numbered = (first..).zip(wire);
    let parse = |(index, entry)| direct_mapping(entry).map_err(|error| BatchError { index, error });
    numbered.map(parse).collect()
}

/// Checks how many entries a direct table in one request has.
///
/// # Errors
/// [`Malformed::TableSize`] for too many.
pub fn table_size(entries: usize) -> Result<(), Malformed> {
    if entries > TABLE_ENTRIES_PER_REQUEST {
        return Err(Malformed::TableSize { entries });
    }
    Ok(())
}

/// The ranges of a request that names 1 to 1024.
///
/// # Errors
/// [`Malformed`] for none, for too many, and for one that ends before it starts.
pub fn batch_ranges(wire: &[v1::IovaRange]) -> Result<Vec<IovaRange>, Malformed> {
    if !(1..=BATCH_ENTRIES).contains(&wire.len()) {
        return Err(Malformed::BatchSize {
            entries: wire.len(),
        });
    }
    ranges("ranges", wire)
}

/// A list of ranges.
///
/// # Errors
/// [`Malformed::RangeInList`] for the first that ends before it starts.
pub(super) fn ranges(
    field: &'static str,
    wire: &[v1::IovaRange],
) -> Result<Vec<IovaRange>, Malformed> {
    let refuse = |index, error| Malformed::RangeInList {
        field,
        index,
        error,
    };
    let numbered = wire.iter().enumerate();
    numbered
        .map(|(index, wire)| range(*wire).map_err(|error| refuse(index, error)))
        .collect()
}

impl From<&DirectSpec> for v1::MapDirectEntry {
    fn from(spec: &DirectSpec) -> v1::MapDirectEntry {
        let (iova, align_bytes, limit) = match spec.placement {
            Placement::At(iova) => (Some(iova), 0, None),
            Placement::Anywhere { align_bytes, limit } => (None, align_bytes, limit),
        };
        v1::MapDirectEntry {
            memory_id: spec.memory.get(),
            offset: spec.offset,
            len_bytes: spec.len_bytes,
            perm: v1::Perm::from(spec.perm).into(),
            iova: iova.map(Iova::get),
            align_bytes,
            limit: limit.map(Iova::get),
        }
    }
}

impl From<&DirectMapping> for v1::DirectMapping {
    fn from(mapping: &DirectMapping) -> v1::DirectMapping {
        v1::DirectMapping {
            range: Some(mapping.range.into()),
            memory_id: mapping.memory.get(),
            offset: mapping.offset,
            perm: v1::Perm::from(mapping.perm).into(),
        }
    }
}

impl From<(Removed, Removal)> for v1::UnmapDirectResponse {
    fn from((removed, removal): (Removed, Removal)) -> v1::UnmapDirectResponse {
        v1::UnmapDirectResponse {
            unmapped_mappings: removed.mappings,
            unmapped_bytes: removed.bytes,
            generation: removal.generation,
        }
    }
}

impl From<(Removed, Removal)> for v1::ClearMapResponse {
    fn from((removed, removal): (Removed, Removal)) -> v1::ClearMapResponse {
        v1::ClearMapResponse {
            removed_mappings: removed.mappings,
            removed_bytes: removed.bytes,
            generation: removal.generation,
        }
    }
}

impl From<TableSet> for v1::SetMapResponse {
    fn from(set: TableSet) -> v1::SetMapResponse {
        v1::SetMapResponse {
            generation: set.generation,
            added: set.added as u64,
            removed: set.removed as u64,
        }
    }
}

impl From<&Translated> for v1::Piece {
    fn from(piece: &Translated) -> v1::Piece {
        let memory_id = match piece.behind {
            Behind::Aperture(_) => 0,
            Behind::Memory(memory) => memory.get(),
        };
        v1::Piece {
            range: Some(piece.range.into()),
            kind: v1::MappingKind::from(piece.kind).into(),
            memory_id,
            offset: piece.offset,
            perm: v1::Perm::from(piece.perm).into(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use domain_core::addr::RangeError;
    use domain_core::perm::Perm;

    fn range_of(start: u64, last: u64) -> IovaRange {
        IovaRange::new(Iova::new(start), Iova::new(last)).unwrap()
    }

    #[test]
    fn what_a_client_asks_is_what_the_daemon_reads() {
        let placements = [
            Placement::At(Iova::new(0)),
            Placement::Anywhere {
                align_bytes: 8192,
                limit: Some(Iova::new(4)),
            },
            Placement::Anywhere {
                align_bytes: 0,
                limit: None,
            },
        ];
        let perms = [Perm::Read, Perm::Write, Perm::ReadWrite];
        for (placement, perm) in placements.into_iter().zip(perms) {
            let spec = DirectSpec {
                memory: MemoryId::new(1),
                offset: 2,
                len_bytes: 3,
                perm,
                placement,
            };
            assert_eq!(direct_spec(&v1::MapDirectEntry::from(&spec)), Ok(spec));
            let mapping = DirectMapping {
                range: range_of(5, u64::MAX),
                memory: MemoryId::new(6),
                offset: 7,
                perm,
            };
            let wire = v1::DirectMapping::from(&mapping);
            assert_eq!(direct_mapping(&wire), Ok(mapping));
        }
    }

    #[test]
    fn an_iova_with_what_is_for_choosing_one_is_refused() {
        let at = v1::MapDirectEntry {
            iova: Some(0),
            perm: v1::Perm::Read.into(),
            ..v1::MapDirectEntry::default()
        };
        assert!(direct_spec(&at).is_ok());
        for (align_bytes, limit, other) in [
            (0, Some(0), "limit"),
            (1, None, "align_bytes"),
            (4096, Some(u64::MAX), "align_bytes"),
        ] {
            let both = v1::MapDirectEntry {
                align_bytes,
                limit,
                ..at
            };
            let refused = direct_spec(&both).unwrap_err();
            let expected = Malformed::Exclusive { one: "iova", other };
            assert_eq!(refused, expected);
            let refusal = v1::Refusal::from(refused);
            assert_eq!(refusal.reason(), v1::ErrorReason::Malformed);
            assert_eq!(refusal.metadata["field"], "iova");
            assert_eq!(refusal.metadata["other_field"], other);
        }
    }

    #[test]
    fn a_table_in_one_request_has_so_many_entries_and_no_more() {
        assert_eq!(table_size(0), Ok(()));
        assert_eq!(table_size(TABLE_ENTRIES_PER_REQUEST), Ok(()));
        let refused = table_size(TABLE_ENTRIES_PER_REQUEST + 1).unwrap_err();
        let refusal = v1::Refusal::from(refused);
        assert_eq!(refusal.grpc_code(), tonic::Code::InvalidArgument);
        assert_eq!(refusal.reason(), v1::ErrorReason::Malformed);
        assert_eq!(refusal.metadata["entries"], "16385");
        assert_eq!(refusal.metadata["most"], "16384");
        assert!(refusal.message.contains("StreamSetMap"));
    }

    #[test]
    fn the_first_bad_entry_of_a_table_is_named_by_its_place_in_all_of_it() {
        let good = v1::DirectMapping {
            range: Some(v1::IovaRange { start: 0, last: 1 }),
            perm: v1::Perm::Read.into(),
            ..v1::DirectMapping::default()
        };
        let backwards = Some(v1::IovaRange { start: 2, last: 1 });
        let bad = [
            (None, 1, Malformed::Missing { field: "range" }),
            (good.range, 9, Malformed::UnknownPerm { value: 9 }),
            (
                backwards,
                1,
                Malformed::Range(RangeError::Backwards {
                    start: Iova::new(2),
                    last: Iova::new(1),
                }),
            ),
        ];
        for (range, perm, expected) in bad {
            let wrong = v1::DirectMapping {
                range,
                perm,
                ..good
            };
            let refused = direct_mappings(&[good, wrong, wrong], 100).unwrap_err();
            assert_eq!((refused.index, refused.error), (101, expected));
        }
        assert_eq!(direct_mappings(&[good, good], 100).unwrap().len(), 2);
    }

    #[test]
    fn no_ranges_too_many_and_backward_ones_are_refused() {
        let wire = v1::IovaRange { start: 5, last: 5 };
        assert_eq!(batch_ranges(&[wire]), Ok(vec![range_of(5, 5)]));
        assert!(batch_ranges(&[]).is_err());
        assert!(batch_ranges(&vec![wire; BATCH_ENTRIES + 1]).is_err());
        let backwards = v1::IovaRange { start: 5, last: 4 };
        let refused = batch_ranges(&[wire, backwards]).unwrap_err();
        let named = matches!(
            refused,
            Malformed::RangeInList {
                field: "ranges",
                index: 1,
                ..
            }
        );
        assert!(named, "{refused}");
    }
}
