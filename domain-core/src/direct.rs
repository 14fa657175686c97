//! Registered memory in the IOTLB without a bounce.
//!
//! A direct mapping belongs to whom its memory belongs: to a session, with
//! which it ends, or to the domain.

use std::collections::BTreeMap;

use crate::addr::{Granule, Iova, IovaRange, RangeError};
use crate::alloc::AllocError;
use crate::iotlb::{BuildError, Entry, InsertError, NoRoom, Overlap, RegionId};
use crate::limits::QuotaExceeded;
use crate::memory::{MemoryId, MemoryMissing};
use crate::perm::Perm;
use crate::region::SpanError;
use crate::session::{Denied, SessionId};
use crate::space::PlaceError;

/// On whose behalf a domain is changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Actor {
    /// A driver: may use and end what is its own or the domain's.
    Session(SessionId),
    /// The domain's owner or the operator: may use and end everything.
    Owner,
}

impl Actor {
    /// The session, if it is one.
    #[must_use]
    pub fn session(self) -> Option<SessionId> {
        match self {
            Actor::Session(session) => Some(session),
            Actor::Owner => None,
        }
    }
}

/// Where a direct mapping shall appear.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Placement {
    /// There, a multiple of the granule.
    At(Iova),
    /// Anywhere that is free and allowed.
    Anywhere {
        /// Alignment, a power of two; 0 means the granule.
        align_bytes: u64,
        /// Last address that may be used.
        limit: Option<Iova>,
    },
}

/// One piece of registered memory to enter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DirectSpec {
    /// The memory.
    pub memory: MemoryId,
    /// Where the piece begins in it, in bytes, a multiple of the granule.
    pub offset: u64,
    /// Its length in bytes, a multiple of the granule.
    pub len_bytes: u64,
    /// What the device side may do with it.
    pub perm: Perm,
    /// Where it shall appear.
    pub placement: Placement,
}

/// One entry of the direct table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DirectMapping {
    /// Where it appears: whole granules.
    pub range: IovaRange,
    /// The memory behind it.
    pub memory: MemoryId,
    /// Where it begins in the memory, in bytes, a multiple of the granule.
    pub offset: u64,
    /// What the device side may do with it.
    pub perm: Perm,
}

/// Why a piece was not entered. The table is unchanged.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs)] // the messages are the docs
pub enum MapDirectError {
    #[error(transparent)]
    Denied(#[from] Denied),
    #[error("{what} {value:#x} is no multiple of the granule of {granule_bytes} bytes")]
    Misaligned {
        what: &'static str,
        value: u64,
        granule_bytes: u64,
    },
    #[error(transparent)]
    Range(#[from] RangeError),
    #[error("a length of {len_bytes} bytes, 2^63 or more, for which no file has room")]
    TooLong { len_bytes: u64 },
    #[error(transparent)]
    Memory(#[from] MemoryMissing),
    #[error(transparent)]
    Span(#[from] SpanError),
    #[error("memory {id} is registered read-only, and {perm} is wanted")]
    MemoryReadOnly { id: MemoryId, perm: Perm },
    #[error(
        "offset {offset} and on lies past the {most_bytes} bytes of a memory that can be mapped"
    )]
    TooFar { offset: u64, most_bytes: u64 },
    #[error(transparent)]
    Place(#[from] PlaceError),
    #[error("{range} overlaps {hit}, which is mapped")]
    Overlap { range: IovaRange, hit: IovaRange },
    #[error("{range} overlaps {hit}, which is removed, and which some session may still use")]
    Invalidating {
        range: IovaRange,
        hit: IovaRange,
        blocked_by: Option<SessionId>,
    },
    #[error("{range} overlaps {other} of entry {index} of the same request")]
    OverlapsEntry {
        range: IovaRange,
        other: IovaRange,
        index: usize,
    },
    #[error(transparent)]
    Quota(#[from] QuotaExceeded),
    #[error(transparent)]
    NoSpace(#[from] AllocError),
    #[error(transparent)]
    NoRoom(#[from] NoRoom),
}

/// What was removed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Removed {
    /// How many mappings.
    pub mappings: u64,
    /// How many bytes they covered together; 2^64-1 if more.
    pub bytes: u64,
}

/// Why nothing was removed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs)] // the messages are the docs
pub enum UnmapDirectError {
    #[error(transparent)]
    Denied(#[from] Denied),
    #[error("{one} and {other} of one request overlap")]
    Overlapping { one: IovaRange, other: IovaRange },
    #[error("nothing is mapped inside {range}")]
    NotMapped { range: IovaRange },
    #[error("{range} would cut the mapping {cut}")]
    Cuts { range: IovaRange, cut: IovaRange },
    #[error("the mapping {range} belongs to another session")]
    NotYours { range: IovaRange },
}

/// A new table took the place of the old one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TableSet {
    /// Generation in which the table became what it is.
    pub generation: u64,
    /// Entries that were not there before.
    pub added: usize,
    /// Entries that are not there any more.
    pub removed: usize,
}

/// Why the old table stays.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs)] // the messages are the docs
pub enum SetMapError {
    #[error(transparent)]
    Denied(#[from] Denied),
    #[error("the table is that of generation {current}, not of {expected}")]
    Stale { expected: u64, current: u64 },
    #[error("the quota of {limit} direct mappings does not allow {asked}")]
    TooMany { asked: usize, limit: u32 },
    #[error(
        "the quota of {limit} direct mappings does not allow {asked} beside {waiting} that are \
         removed, and that some session may still use"
    )]
    TooManyWaiting {
        asked: usize,
        waiting: usize,
        limit: u32,
    },
    #[error("entry {index}: {error}")]
    Entry { index: usize, error: MapDirectError },
    #[error("the mapping {range} belongs to another session")]
    NotYours { range: IovaRange },
    #[error(transparent)]
    NoRoom(#[from] NoRoom),
}

/// What a table needs to know of a registered memory, so that it can be checked
/// without the domain's lock.
#[derive(Clone, Debug)]
pub(crate) struct MemoryFacts {
    pub(crate) region: RegionId,
    pub(crate) memory: std::sync::Arc<crate::region::ClientMemory>,
}

impl DirectSpec {
    /// Everything that can be said without the table. Answers the range of a
    /// mapping that names its place.
    pub(crate) fn check(&self, granule: Granule) -> Result<Option<IovaRange>, MapDirectError> {
        let at = match self.placement {
            Placement::At(iova) => Some(iova),
            Placement::Anywhere { .. } => None,
        };
        let start = at.unwrap_or(Iova::new(0));
        if self.len_bytes == 0 {
            return Err(RangeError::ZeroLength { start }.into());
        }
        if self.len_bytes >= 1 << 63 {
            return Err(MapDirectError::TooLong {
                len_bytes: self.len_bytes,
            });
        }
        let numbers = [
            ("iova", start.get()),
            ("offset", self.offset),
            ("len_bytes", self.len_bytes),
        ];
        check_alignment(&numbers, granule)?;
        Ok(at
            .map(|iova| IovaRange::from_len(iova, self.len_bytes))
            .transpose()?)
    }
}

impl DirectMapping {
    /// The entry of the IOTLB that this is, as far as it can be checked without
    /// the table.
    pub(crate) fn check(
        &self,
        granule: Granule,
        memories: &BTreeMap<MemoryId, Result<MemoryFacts, MemoryMissing>>,
    ) -> Result<Entry, MapDirectError> {
        // Not the length: of the whole space it is 2^64.
        let end = self.range.last().get().wrapping_add(1);
        let numbers = [
            ("iova", self.range.start().get()),
            ("offset", self.offset),
            ("the end", end),
        ];
        check_alignment(&numbers, granule)?;
        let len_bytes = self.range.len_bytes().unwrap_or(u64::MAX);
        if len_bytes >= 1 << 63 {
            return Err(MapDirectError::TooLong { len_bytes });
        }
        let facts = memories[&self.memory]
            .as_ref()
            .map_err(|missing| *missing)?;
        facts.entry(self, len_bytes)
    }
}

impl MemoryFacts {
    /// The entry for a part of this memory.
    pub(crate) fn entry(
        &self,
        mapping: &DirectMapping,
        len_bytes: u64,
    ) -> Result<Entry, MapDirectError> {
        self.memory.check_span(mapping.offset, len_bytes)?;
        if mapping.perm.allows(Perm::Write) && !self.memory.is_writable() {
            return Err(MapDirectError::MemoryReadOnly {
                id: mapping.memory,
                perm: mapping.perm,
            });
        }
        Ok(Entry {
            range: mapping.range,
            target: crate::iotlb::Target {
                region: self.region,
                offset_bytes: mapping.offset,
            },
            perm: mapping.perm,
        })
    }
}

impl Removed {
    pub(crate) fn of<'e>(entries: impl Iterator<Item = &'e Entry>) -> Removed {
        entries.fold(Removed::default(), |sum, entry| Removed {
            mappings: sum.mappings + 1,
            bytes: sum
                .bytes
                .saturating_add(entry.range.len_bytes().unwrap_or(u64::MAX)),
        })
    }
}

impl From<BuildError> for SetMapError {
    fn from(error: BuildError) -> SetMapError {
        SetMapError::Entry {
            index: error.index,
            error: MapDirectError::OverlapsEntry {
                range: error.range,
                other: error.hit,
                index: error.hit_index,
            },
        }
    }
}

impl From<InsertError> for MapDirectError {
    fn from(error: InsertError) -> MapDirectError {
        match error {
            InsertError::Overlap(Overlap { range, hit }) => MapDirectError::Overlap { range, hit },
            InsertError::NoRoom(no_room) => no_room.into(),
            InsertError::TooFar {
                offset_bytes,
                most_bytes,
                ..
            } => MapDirectError::TooFar {
                offset: offset_bytes,
                most_bytes,
            },
            InsertError::CrossesAperture { .. } | InsertError::Misaligned { .. } => {
                unreachable!("checked before: {error}")
            }
        }
    }
}

fn check_alignment(
    numbers: &[(&'static str, u64)],
    granule: Granule,
) -> Result<(), MapDirectError> {
    match numbers
        .iter()
        .find(|(_, value)| granule.offset_in(*value) != 0)
    {
        Some(&(what, value)) => Err(MapDirectError::Misaligned {
            what,
            value,
            granule_bytes: granule.bytes(),
        }),
        None => Ok(()),
    }
}
