//! Bounced buffers: directions, copies, lengths.
//!
//! The rules, normative for every copy:
//!
//! * At map every byte of every granule is either copied from the driver's
//!   buffer or zero, so that nothing an earlier mapping left is ever visible.
//! * `FROM_DEVICE` starts from zeros, and only as many bytes flow back as the
//!   device says it wrote. `preserve` is swiotlb's rule instead: the buffer is
//!   copied in for every direction and back whole.
//! * Lengths, offsets and directions come from the record made at map, never
//!   from shared memory.

use std::os::fd::AsFd;
use std::sync::Arc;

use crate::addr::{Granule, Iova, IovaRange};
use crate::alloc::AllocError;
use crate::aperture::Aperture;
use crate::iotlb::NoRoom;
use crate::limits::QuotaExceeded;
use crate::mapping::{MappingId, MappingMissing};
use crate::memory::{MemoryId, MemoryMissing};
use crate::perm::Direction;
use crate::region::{ClientMemory, CopyError, SpanError};
use crate::session::Denied;

/// One buffer to map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MapSpec {
    /// The driver's memory.
    pub memory: MemoryId,
    /// Where the buffer begins in it, in bytes.
    pub offset: u64,
    /// Its length in bytes.
    pub len_bytes: u64,
    /// Which way bytes travel.
    pub direction: Direction,
    /// Keep the low bits of `offset` within the granule in the iova.
    pub keep_offset: bool,
    /// Copy in for every direction, copy the whole length back.
    pub preserve: bool,
    /// Copy nothing at map and unmap.
    pub skip_sync: bool,
    /// Alignment of the first granule, a power of two; 0 means the granule.
    pub align_bytes: u64,
    /// Last address that may be used.
    pub limit: Option<Iova>,
}

impl MapSpec {
    /// Are the buffer's bytes copied in when it is mapped?
    #[must_use]
    pub fn copies_in(&self) -> bool {
        copies_in(self.direction, self.preserve, self.skip_sync)
    }
}

fn copies_in(direction: Direction, preserve: bool, skip_sync: bool) -> bool {
    !skip_sync && (direction.copies_in() || preserve)
}

impl MapSpec {
    /// A buffer with nothing special about it.
    #[must_use]
    pub fn new(memory: MemoryId, offset: u64, len_bytes: u64, direction: Direction) -> MapSpec {
        MapSpec {
            memory,
            offset,
            len_bytes,
            direction,
            keep_offset: false,
            preserve: false,
            skip_sync: false,
            align_bytes: 0,
            limit: None,
        }
    }

    /// How far into its first granule the buffer begins.
    pub(crate) fn lead_bytes(&self, granule: Granule) -> u64 {
        if self.keep_offset {
            granule.offset_in(self.offset)
        } else {
            0
        }
    }
}

/// A live mapping.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mapped {
    /// Its name, with the iova.
    pub id: MappingId,
    /// Where the first byte of the buffer appears.
    pub iova: Iova,
    /// Length in bytes, as asked.
    pub len_bytes: u64,
}

/// One mapping to end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UnmapSpec {
    /// As at map.
    pub iova: Iova,
    /// As at map.
    pub id: MappingId,
    /// How many bytes the device wrote, from the start of the buffer.
    pub written_bytes: Option<u64>,
    /// Copy nothing back.
    pub skip_sync: bool,
}

/// Which way a sync copies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SyncTarget {
    /// Bounce memory to the driver's buffer.
    ForCpu,
    /// The driver's buffer to bounce memory.
    ForDevice,
}

/// A part of a live mapping to copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SyncSpec {
    /// As at map.
    pub iova: Iova,
    /// As at map.
    pub id: MappingId,
    /// Where the part begins within the mapping, in bytes.
    pub offset: u64,
    /// Its length in bytes.
    pub len_bytes: u64,
    /// Which way.
    pub target: SyncTarget,
}

/// Why a buffer was not mapped. The domain is unchanged.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)] // the messages are the docs
pub enum MapError {
    #[error(transparent)]
    Denied(#[from] Denied),
    #[error(transparent)]
    Quota(#[from] QuotaExceeded),
    #[error("the domain has no bounce aperture")]
    NoAperture,
    #[error(transparent)]
    Memory(#[from] MemoryMissing),
    #[error(transparent)]
    Span(#[from] SpanError),
    #[error("memory {id} is registered read-only, and {direction} writes it back")]
    MemoryReadOnly { id: MemoryId, direction: Direction },
    #[error("memory {id} lies on huge pages, which cannot be bounced")]
    HugetlbMemory { id: MemoryId },
    #[error(transparent)]
    Alloc(#[from] AllocError),
    #[error(transparent)]
    NoRoom(#[from] NoRoom),
    #[error("copying {len_bytes} bytes at {offset} of memory {memory} in")]
    Copy {
        memory: MemoryId,
        offset: u64,
        len_bytes: u64,
        #[source]
        cause: CopyError,
    },
}

/// Why a mapping was not ended. It is as it was.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)] // the messages are the docs
pub enum UnmapError {
    #[error(transparent)]
    Denied(#[from] Denied),
    #[error(transparent)]
    Missing(#[from] MappingMissing),
    #[error("mapping {id} stands twice in one request")]
    Duplicate { id: MappingId },
    #[error("{syncs} syncs of mapping {id} are under way")]
    Busy { id: MappingId, syncs: u32 },
    #[error("written_bytes must say how many of the {len_bytes} bytes the device wrote")]
    WrittenMissing { len_bytes: u64 },
    #[error("written_bytes {written_bytes} is more than the mapping's {len_bytes}")]
    WrittenTooLarge { written_bytes: u64, len_bytes: u64 },
    #[error("written_bytes {written_bytes} where nothing flows back that could be cut ({why})")]
    WrittenUnwanted {
        written_bytes: u64,
        why: &'static str,
    },
    #[error("copying {len_bytes} bytes back to {offset} of memory {memory}")]
    Copy {
        memory: MemoryId,
        offset: u64,
        len_bytes: u64,
        #[source]
        cause: CopyError,
    },
}

/// Why a part was not copied, or not wholly.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)] // the messages are the docs
pub enum SyncError {
    #[error(transparent)]
    Denied(#[from] Denied),
    #[error(transparent)]
    Missing(#[from] MappingMissing),
    #[error("a part of zero bytes")]
    ZeroLength,
    #[error("{len_bytes} bytes at {offset} reach past the mapping of {mapping_bytes} bytes")]
    OutsideMapping {
        offset: u64,
        len_bytes: u64,
        mapping_bytes: u64,
    },
    #[error("a {direction} mapping has nothing to sync that way")]
    WrongDirection { direction: Direction },
    #[error("syncing {len_bytes} bytes at {offset} of memory {memory}")]
    Copy {
        memory: MemoryId,
        offset: u64,
        len_bytes: u64,
        #[source]
        cause: CopyError,
    },
}

/// Everything about a mapping's copies, fixed at map.
#[derive(Clone, Debug)]
pub(crate) struct Bounce {
    pub(crate) memory_id: MemoryId,
    pub(crate) memory: Arc<ClientMemory>,
    /// Where the buffer begins in the memory.
    pub(crate) file_offset: u64,
    pub(crate) len_bytes: u64,
    pub(crate) direction: Direction,
    pub(crate) preserve: bool,
    pub(crate) skip_sync: bool,
}

/// A checked part of a mapping and the way it is copied.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Part {
    pub(crate) offset: u64,
    pub(crate) len_bytes: u64,
    pub(crate) target: SyncTarget,
}

impl Bounce {
    /// Makes the granules show the buffer or zeros, every byte of them.
    pub(crate) fn fill(
        &self,
        aperture: &Aperture,
        granules: IovaRange,
        visible: IovaRange,
    ) -> Result<(), MapError> {
        if !copies_in(self.direction, self.preserve, self.skip_sync) {
            aperture.zero(granules);
            return Ok(());
        }
        zero_slack(aperture, granules, visible);
        self.copy_in(aperture, visible.start(), 0, self.len_bytes)
            .map_err(|cause| MapError::Copy {
                memory: self.memory_id,
                offset: self.file_offset,
                len_bytes: self.len_bytes,
                cause,
            })
    }

    /// How many bytes flow back when the mapping ends.
    pub(crate) fn bytes_back(&self, spec: &UnmapSpec) -> Result<u64, UnmapError> {
        let silent = self.skip_sync || spec.skip_sync;
        let refuse = |why| match spec.written_bytes {
            Some(written_bytes) => Err(UnmapError::WrittenUnwanted { written_bytes, why }),
            None => Ok(()),
        };
        let len_bytes = self.len_bytes;
        match (self.direction, spec.written_bytes) {
            _ if silent => refuse("copies are skipped").map(|()| 0),
            (Direction::ToDevice, _) => refuse("TO_DEVICE").map(|()| 0),
            _ if self.preserve => refuse("preserve").map(|()| len_bytes),
            (_, Some(written_bytes)) if written_bytes > len_bytes => {
                Err(UnmapError::WrittenTooLarge {
                    written_bytes,
                    len_bytes,
                })
            }
            (_, Some(written_bytes)) => Ok(written_bytes),
            (Direction::FromDevice, None) => Err(UnmapError::WrittenMissing { len_bytes }),
            (Direction::Bidirectional, None) => Ok(len_bytes),
        }
    }

    /// Copies the first `len_bytes` back into the driver's memory.
    pub(crate) fn copy_back(
        &self,
        aperture: &Aperture,
        iova: Iova,
        len_bytes: u64,
    ) -> Result<(), UnmapError> {
        self.copy_out(aperture, iova, 0, len_bytes)
            .map_err(|cause| UnmapError::Copy {
                memory: self.memory_id,
                offset: self.file_offset,
                len_bytes,
                cause,
            })
    }

    /// Is this a part that can be synced that way?
    pub(crate) fn check_part(&self, spec: &SyncSpec) -> Result<Part, SyncError> {
        let SyncSpec {
            offset,
            len_bytes,
            target,
            ..
        } = *spec;
        if len_bytes == 0 {
            return Err(SyncError::ZeroLength);
        }
        if offset
            .checked_add(len_bytes)
            .is_none_or(|end| end > self.len_bytes)
        {
            return Err(SyncError::OutsideMapping {
                offset,
                len_bytes,
                mapping_bytes: self.len_bytes,
            });
        }
        let has_a_way = match target {
            SyncTarget::ForCpu => self.direction.copies_back(),
            SyncTarget::ForDevice => self.direction.copies_in() || self.preserve,
        };
        if !has_a_way {
            return Err(SyncError::WrongDirection {
                direction: self.direction,
            });
        }
        Ok(Part {
            offset,
            len_bytes,
            target,
        })
    }

    /// Copies a part one way.
    pub(crate) fn sync(
        &self,
        aperture: &Aperture,
        iova: Iova,
        part: Part,
    ) -> Result<(), SyncError> {
        let copied = match part.target {
            SyncTarget::ForCpu => self.copy_out(aperture, iova, part.offset, part.len_bytes),
            SyncTarget::ForDevice => self.copy_in(aperture, iova, part.offset, part.len_bytes),
        };
        copied.map_err(|cause| SyncError::Copy {
            memory: self.memory_id,
            offset: self.file_offset + part.offset,
            len_bytes: part.len_bytes,
            cause,
        })
    }

    fn copy_in(
        &self,
        aperture: &Aperture,
        iova: Iova,
        skip: u64,
        len_bytes: u64,
    ) -> Result<(), CopyError> {
        let to = aperture.offset(iova) + skip;
        aperture.memory().read_from(
            to,
            len_bytes,
            self.memory.as_ref().as_fd(),
            self.file_offset + skip,
        )
    }

    fn copy_out(
        &self,
        aperture: &Aperture,
        iova: Iova,
        skip: u64,
        len_bytes: u64,
    ) -> Result<(), CopyError> {
        let from = aperture.offset(iova) + skip;
        aperture.memory().write_to(
            from,
            len_bytes,
            self.memory.as_ref().as_fd(),
            self.file_offset + skip,
        )
    }
}

/// Zeroes what lies in the granules before and behind the visible bytes.
fn zero_slack(aperture: &Aperture, granules: IovaRange, visible: IovaRange) {
    let before = visible.start().offset_from(granules.start()).unwrap_or(0);
    if let Ok(slack) = IovaRange::from_len(granules.start(), before) {
        aperture.zero(slack);
    }
    if let Some(Ok(slack)) = visible
        .last()
        .checked_add(1)
        .map(|next| IovaRange::new(next, granules.last()))
    {
        aperture.zero(slack);
    }
}
