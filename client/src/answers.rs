//! What the daemon answers about direct mappings, read as what the core calls
//! it, and not believed where it answers something else.

use domain_core::addr::{Iova, IovaRange};
use domain_core::direct::{DirectMapping, DirectSpec, Placement, TableSet};
use domain_core::domain::{Behind, Translated};
use domain_core::layout::ApertureKind;
use domain_core::mapping::{MappingId, MappingKind, MappingView, Phase, Source, ViewKind};
use domain_core::memory::MemoryId;
use domaind_proto::convert;
use domaind_proto::names::parse_session;
use domaind_proto::v1;

use crate::error::ProtocolError;

/// Where the bytes of a range are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Translation {
    /// In order and without a gap, together exactly the range that was asked.
    pub pieces: Vec<Translated>,
    /// Generation of the IOTLB that they belong to.
    pub generation: u64,
}

/// What a reset of the bounce aperture has ended.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BounceReset {
    /// Streaming mappings.
    pub mappings: u64,
    /// Leases.
    pub leases: u64,
}

/// A direct mapping that was asked for.
pub(crate) fn entered(
    asked: &DirectSpec,
    wire: &v1::DirectMapping,
) -> Result<DirectMapping, ProtocolError> {
    let got = convert::direct_mapping(wire)?;
    let start = match asked.placement {
        Placement::At(iova) => iova,
        Placement::Anywhere { .. } => got.range.start(),
    };
    let expected = IovaRange::from_len(start, asked.len_bytes).ok();
    let is_it = expected == Some(got.range)
        && (got.memory, got.offset, got.perm) == (asked.memory, asked.offset, asked.perm);
    is_it
        .then_some(got)
        .ok_or(ProtocolError::Direct { range: got.range })
}

pub(crate) fn table_set(wire: &v1::SetMapResponse) -> Result<TableSet, ProtocolError> {
    let count = |number| usize::try_from(number).map_err(|_| ProtocolError::Count { number });
    Ok(TableSet {
        generation: wire.generation,
        added: count(wire.added)?,
        removed: count(wire.removed)?,
    })
}

/// Pieces that cover `asked`, as promised.
pub(crate) fn translation(
    asked: IovaRange,
    wire: &v1::TranslateResponse,
) -> Result<Translation, ProtocolError> {
    let pieces: Vec<_> = wire.pieces.iter().map(piece).collect::<Result<_, _>>()?;
    let edges = pieces.first().zip(pieces.last());
    let covers = edges.is_some_and(|(first, last)| {
        first.range.start() == asked.start() && last.range.last() == asked.last()
    });
    let touch =
        |pair: &[Translated]| pair[0].range.last().checked_add(1) == Some(pair[1].range.start());
    if !covers || !pieces.windows(2).all(touch) {
        return Err(ProtocolError::Pieces { range: asked });
    }
    Ok(Translation {
        pieces,
        generation: wire.generation,
    })
}

fn piece(wire: &v1::Piece) -> Result<Translated, ProtocolError> {
    let bounce = Behind::Aperture(ApertureKind::Bounce);
    let (kind, behind) = match wire.kind() {
        v1::MappingKind::Streaming => (MappingKind::Streaming, bounce),
        v1::MappingKind::Lease => (MappingKind::Lease, bounce),
        v1::MappingKind::Coherent => (
            MappingKind::Coherent,
            Behind::Aperture(ApertureKind::Coherent),
        ),
        v1::MappingKind::Direct => (
            MappingKind::Direct,
            Behind::Memory(MemoryId::new(wire.memory_id)),
        ),
        v1::MappingKind::Unspecified => return Err(ProtocolError::Missing { field: "kind" }),
    };
    Ok(Translated {
        range: convert::given_range("range", wire.range)?,
        kind,
        behind,
        offset: wire.offset,
        perm: convert::perm(wire.perm)?,
    })
}

pub(crate) fn mapping(wire: &v1::Mapping) -> Result<MappingView, ProtocolError> {
    let source = Source {
        memory: MemoryId::new(wire.memory_id),
        offset: wire.offset,
    };
    let kind = match wire.kind() {
        v1::MappingKind::Streaming => ViewKind::Streaming {
            direction: convert::direction(wire.direction)?,
            source,
        },
        v1::MappingKind::Coherent => ViewKind::Coherent,
        v1::MappingKind::Lease => ViewKind::Lease,
        v1::MappingKind::Direct => ViewKind::Direct { source },
        v1::MappingKind::Unspecified => return Err(ProtocolError::Missing { field: "kind" }),
    };
    let phase = match wire.state() {
        v1::MappingState::Reserved => Phase::Reserved,
        v1::MappingState::Live => Phase::Live,
        v1::MappingState::Draining => Phase::Draining,
        v1::MappingState::Invalidating => Phase::Invalidating,
        v1::MappingState::Quarantined => Phase::Quarantined,
        v1::MappingState::Unspecified => return Err(ProtocolError::Missing { field: "state" }),
    };
    let owner = match wire.session.as_str() {
        "" => None,
        name => Some(parse_session(name).map_err(ProtocolError::Name)?),
    };
    let blocked_by = match wire.blocked_by.as_str() {
        "" => None,
        name => Some(parse_session(name).map_err(ProtocolError::Name)?),
    };
    let visible = IovaRange::from_len(Iova::new(wire.iova), wire.len_bytes);
    Ok(MappingView {
        id: (wire.mapping_id != 0).then(|| MappingId::new(wire.mapping_id)),
        owner,
        visible: visible.map_err(ProtocolError::Range)?,
        perm: convert::perm(wire.perm)?,
        phase,
        kind,
        blocked_by,
    })
}

#[cfg(test)]
mod tests {
    use domain_core::perm::{Direction, Perm};
    use domain_core::session::SessionId;

    use super::*;

    fn range(start: u64, last: u64) -> IovaRange {
        IovaRange::new(Iova::new(start), Iova::new(last)).unwrap()
    }

    fn translated(start: u64, last: u64) -> Translated {
        Translated {
            range: range(start, last),
            kind: MappingKind::Direct,
            behind: Behind::Memory(MemoryId::new(3)),
            offset: 0,
            perm: Perm::Read,
        }
    }

    #[test]
    fn pieces_must_cover_what_was_asked_without_a_gap() {
        let answer = |pieces: &[Translated]| v1::TranslateResponse {
            pieces: pieces.iter().map(Into::into).collect(),
            generation: 7,
        };
        let [low, high, higher] =
            [(0, 9), (10, u64::MAX), (11, u64::MAX)].map(|(a, b)| translated(a, b));
        let whole = range(0, u64::MAX);

        let good = translation(whole, &answer(&[low, high])).unwrap();
        assert_eq!((good.pieces, good.generation), (vec![low, high], 7));
        for wrong in [&[][..], &[low], &[high], &[low, higher], &[high, low]] {
            assert!(translation(whole, &answer(wrong)).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn a_mapping_is_read_as_the_daemon_means_it() {
        let source = Source {
            memory: MemoryId::new(3),
            offset: 4096,
        };
        let direct = MappingView {
            id: None,
            owner: None,
            visible: range(0x1000, 0x1fff),
            perm: Perm::Write,
            phase: Phase::Live,
            kind: ViewKind::Direct { source },
            blocked_by: None,
        };
        let streaming = MappingView {
            id: Some(MappingId::new(9)),
            owner: Some(SessionId::new(2)),
            kind: ViewKind::Streaming {
                direction: Direction::FromDevice,
                source,
            },
            ..direct
        };
        let coherent = MappingView {
            kind: ViewKind::Coherent,
            ..streaming
        };
        let lease = MappingView {
            kind: ViewKind::Lease,
            ..streaming
        };
        for view in [direct, streaming, coherent, lease] {
            assert_eq!(mapping(&v1::Mapping::from(view)).unwrap(), view);
        }
        assert!(mapping(&v1::Mapping::default()).is_err());
    }
}
