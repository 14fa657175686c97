//! Who gets which iovas of an aperture.
//!
//! All granules are blocks (live, cached or hole) in one table, linked by address
//! (boundary tags), and there are four ways to find them:
//!
//! * `magazines`: stacks of blocks just freed, by length, after Bonwick and Adams,
//!   "Magazines and Vmem" (USENIX 2001). Most requests end here.
//! * `sizes`: lists of holes by length with bitmaps over them, after TLSF (Masmano
//!   et al., 2004) but exact up to 256 granules: best fit.
//! * `starts`: a hash table of live and cached blocks, so that nothing is freed that
//!   was not allocated exactly so. It grows a few entries at a time.
//! * `by_address`: [`holes`] and blocks in trees by address, for a limit, an
//!   alignment or a given range that the lists cannot serve. Built on first need.
//!   Who never asks never pays.
//!
//! | operation | worst case, with n blocks |
//! |---|---|
//! | `alloc` without limit or alignment, `free` | O(1), the tables' growth by copying aside; O(log n) once there are trees |
//! | `alloc` with either, `alloc_at` | O(log n) |
//! | what needs the trees for the first time | O(n) once, and once for each new alignment |
//! | the first refusal, or `alloc_at` of what a magazine holds | that for each of at most 925 cached blocks |
//! | `largest_hole_bytes` | O(cached + holes in the topmost list) |
//! | `used_bytes` | O(1) |
//!
//! Memory: an idle allocator has less than 3 KiB. A block takes 24 bytes, and one
//! that is live or cached 5 to 11 in the hash table. At most 2^32 - 4 granules are
//! used of an aperture: 16 TiB of 4 KiB, and every aperture is backed by memory.

mod blocks;
mod by_address;
pub mod holes;
mod magazines;
mod sizes;
mod space;
mod starts;
#[cfg(test)]
mod tests;

use self::blocks::MOST_GRANULES;
use self::space::Space;
use crate::addr::{Granule, Iova, IovaRange};

/// What is asked of an allocator.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AllocRequest {
    /// Length in bytes; whole granules are given.
    pub len_bytes: u64,
    /// Alignment of the start, a power of two; 0 and anything below the
    /// granule mean the granule.
    pub align_bytes: u64,
    /// Last address that may be used.
    pub limit: Option<Iova>,
}

impl AllocRequest {
    /// So many bytes, anywhere.
    #[must_use]
    pub fn of(len_bytes: u64) -> AllocRequest {
        AllocRequest {
            len_bytes,
            align_bytes: 0,
            limit: None,
        }
    }
}

/// Why nothing was allocated.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs)] // the messages are the docs
pub enum AllocError {
    #[error("a length of zero bytes")]
    ZeroLength,
    #[error("an alignment of {align_bytes} bytes, which is not a power of two")]
    BadAlignment { align_bytes: u64 },
    #[error(
        "no free run of {want_bytes} bytes (aligned to {align_bytes}); the largest hole is {largest_hole_bytes} bytes"
    )]
    NoSpace {
        want_bytes: u64,
        align_bytes: u64,
        largest_hole_bytes: u64,
    },
}

/// Why a given range was not allocated.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs)] // the messages are the docs
pub enum AllocAtError {
    #[error("{range} is not made of whole granules of {granule_bytes} bytes")]
    Misaligned {
        range: IovaRange,
        granule_bytes: u64,
    },
    #[error("{range} reaches outside of what may be allocated, {usable}")]
    Outside { range: IovaRange, usable: IovaRange },
    #[error("{range} overlaps the allocated {hit}")]
    Taken { range: IovaRange, hit: IovaRange },
}

/// Why nothing was freed. Nothing is changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs)] // the messages are the docs
pub enum FreeError {
    #[error("nothing is allocated at {start}")]
    NotAllocated { start: Iova },
    #[error("{range} is not what is allocated there, {allocated}")]
    WrongSize {
        range: IovaRange,
        allocated: IovaRange,
    },
}

/// Allocates whole granules of one aperture. Deterministic: the same calls get
/// the same answers.
#[derive(Debug)]
pub struct IovaAllocator {
    granule: Granule,
    /// The granule's, at hand.
    shift: u32,
    /// First granule that may be allocated: an address shifted right. This and
    /// its sums stay far below 2^64.
    first: u64,
    /// Number of granules that may be allocated.
    count: u32,
    space: Space,
    /// Number of granules that are live.
    used: u64,
}

impl IovaAllocator {
    /// An allocator for the whole granules of `aperture`. The first granule of
    /// a space that starts at 0 and a partial granule at either end are never
    /// given, and of more than 2^32 - 4 granules only so many.
    ///
    /// `None` if that leaves nothing.
    #[must_use]
    pub fn new(aperture: IovaRange, granule: Granule) -> Option<IovaAllocator> {
        let shift = granule.shift();
        let first = (aperture.start().get() >> shift)
            + u64::from(granule.offset_in(aperture.start().get()) != 0);
        let first = first.max(1);
        let ends_whole = granule.offset_in(aperture.last().get()) == granule.bytes() - 1;
        let end = (aperture.last().get() >> shift) + u64::from(ends_whole);
        let count = end.checked_sub(first).filter(|count| *count > 0)?;
        let count = u32::try_from(count).map_or(MOST_GRANULES, |count| count.min(MOST_GRANULES));
        Some(IovaAllocator {
            granule,
            shift,
            first,
            count,
            space: Space::new(first, count),
            used: 0,
        })
    }

    /// Gives a free run: if one of that length was freed lately the youngest of
    /// them, else a part of a hole.
    ///
    /// # Errors
    /// [`AllocError`]; `NoSpace` only if no run fits, naming the largest hole
    /// below the limit.
    // Always inline: a result of this size is otherwise handed over in memory, and
    // reading it back took as long as all the rest.
    #[inline(always)]
    pub fn alloc(&mut self, request: AllocRequest) -> Result<IovaRange, AllocError> {
        // What nearly every request is, before anything is worked out for others.
        let is_plain = request.align_bytes == 0 && request.limit.is_none();
        if is_plain
            && request.len_bytes != 0
            && let Ok(want) = u32::try_from(self.granules_of(request.len_bytes))
            && let Some(start) = self.space.take_any(want)
        {
            return Ok(self.taken(start, want));
        }
        self.alloc_otherwise(request)
    }

    /// Gives exactly `range`.
    ///
    /// # Errors
    /// [`AllocAtError`], naming what is in the way.
    pub fn alloc_at(&mut self, range: IovaRange) -> Result<(), AllocAtError> {
        let granule_bytes = self.granule.bytes();
        if !self.is_whole(range) {
            return Err(AllocAtError::Misaligned {
                range,
                granule_bytes,
            });
        }
        let usable = self.range(0, self.count);
        let inside = self.inside(range).filter(|_| usable.contains(range));
        let (at, want) = inside.ok_or(AllocAtError::Outside { range, usable })?;
        if !self.space.take_at(at, want) {
            self.space.drain();
            if !self.space.take_at(at, want) {
                let (start, len) = self.space.live_from(at);
                let hit = self.range(start, len);
                return Err(AllocAtError::Taken { range, hit });
            }
        }
        self.taken(at, want);
        Ok(())
    }

    /// Takes back exactly what was given.
    ///
    /// # Errors
    /// [`FreeError`] for anything else, twice the same included.
    #[inline(always)]
    pub fn free(&mut self, range: IovaRange) -> Result<(), FreeError> {
        if self.is_whole(range)
            && let Some((start, len)) = self.inside(range)
            && self.space.free(start, len)
        {
            self.used = self.used.wrapping_sub(u64::from(len));
            return Ok(());
        }
        Err(self.why_not_freed(range))
    }

    /// The free run that covers `from`, from there on, or the next one behind it.
    /// Looks at one block after the other, so it is for when there are few.
    pub fn free_from(&mut self, from: Iova) -> Option<IovaRange> {
        let granule = from.get() >> self.shift;
        let from = u32::try_from(granule.saturating_sub(self.first)).ok()?;
        let (start, len) = self.space.hole_from(from)?;
        Some(self.range(start, len))
    }

    /// The longest run that an unaligned, unlimited request can get, in bytes.
    #[must_use]
    pub fn largest_hole_bytes(&self) -> u64 {
        u64::from(self.space.longest_if_drained()) << self.shift
    }

    /// Allocated bytes, in whole granules.
    #[must_use]
    pub fn used_bytes(&self) -> u64 {
        self.used << self.shift
    }

    /// Number of live allocations.
    #[must_use]
    pub fn live_count(&self) -> usize {
        self.space.live_count()
    }

    /// Live allocations in order.
    pub fn live(&self) -> impl Iterator<Item = IovaRange> {
        self.space.live().map(|(start, len)| self.range(start, len))
    }

    /// Bytes of memory held beside the value itself.
    #[must_use]
    pub fn heap_bytes(&self) -> usize {
        self.space.heap_bytes()
    }

    /// Checks that holes, magazines and live runs are disjoint and make the
    /// whole, and that every look-up agrees with them.
    ///
    /// # Panics
    /// If not.
    pub fn check_invariants(&self) {
        self.space.check_invariants();
        let used: u64 = self.space.live().map(|(_, len)| u64::from(len)).sum();
        assert_eq!(used, self.used, "what is used is counted");
        assert_eq!(
            self.space.live().count(),
            self.live_count(),
            "live ones are counted"
        );
    }

    /// With a limit or an alignment, or when there is no hole at hand.
    /// Magazines are emptied before there is said to be none.
    #[cold]
    #[inline(never)]
    fn alloc_otherwise(&mut self, request: AllocRequest) -> Result<IovaRange, AllocError> {
        let AllocRequest {
            len_bytes,
            align_bytes,
            limit,
        } = request;
        if len_bytes == 0 {
            return Err(AllocError::ZeroLength);
        }
        if align_bytes != 0 && !align_bytes.is_power_of_two() {
            return Err(AllocError::BadAlignment { align_bytes });
        }
        let align = align_bytes.max(self.granule.bytes()) >> self.shift;
        let end = self.end(limit);
        let want = u32::try_from(self.granules_of(len_bytes)).ok();
        let take = |space: &mut Space| Some((space.take_where(want?, align, end)?, want?));
        let mut taken = take(&mut self.space);
        if taken.is_none() && self.space.drain() {
            taken = take(&mut self.space);
        }
        if let Some((start, want)) = taken {
            return Ok(self.taken(start, want));
        }
        Err(AllocError::NoSpace {
            want_bytes: len_bytes,
            align_bytes: align << self.shift,
            largest_hole_bytes: u64::from(self.space.longest_below(end)) << self.shift,
        })
    }

    #[inline(always)]
    fn taken(&mut self, start: u32, want: u32) -> IovaRange {
        self.used = self.used.wrapping_add(u64::from(want));
        self.range(start, want)
    }

    #[cold]
    #[inline(never)]
    fn why_not_freed(&self, range: IovaRange) -> FreeError {
        let start = range.start();
        let at = (start.get() >> self.shift).checked_sub(self.first);
        let at = at.and_then(|at| u32::try_from(at).ok());
        let allocated = at.and_then(|at| Some(self.range(at, self.space.live_len(at)?)));
        allocated.map_or(FreeError::NotAllocated { start }, |allocated| {
            FreeError::WrongSize { range, allocated }
        })
    }

    /// One past the last granule that may be used.
    fn end(&self, limit: Option<Iova>) -> u64 {
        let below_limit = limit.map(|last| {
            let whole = self.granule.offset_in(last.get()) == self.granule.bytes() - 1;
            (last.get() >> self.shift) + u64::from(whole)
        });
        let end = self.first + u64::from(self.count);
        below_limit.unwrap_or(end).min(end)
    }

    /// Not a division, which would be a third of the time of a short alloc.
    #[inline(always)]
    fn granules_of(&self, len_bytes: u64) -> u64 {
        // Here and below `wrapping` only saves a check: shifts are below 64, and
        // numbers of granules and their sums far below 2^64.
        (len_bytes.wrapping_sub(1))
            .wrapping_shr(self.shift)
            .wrapping_add(1)
    }

    /// Ones below the granule in `last`, none in `start`.
    #[inline(always)]
    fn is_whole(&self, range: IovaRange) -> bool {
        (range.start().get() | !range.last().get()) & self.granule_mask() == 0
    }

    /// Start and length in granules, counted from the first. `None` if they are
    /// no numbers of granules that this allocator may have.
    #[inline(always)]
    fn inside(&self, range: IovaRange) -> Option<(u32, u32)> {
        let at = range.start().get().wrapping_shr(self.shift);
        let last = range.last().get().wrapping_shr(self.shift);
        let start = u32::try_from(at.wrapping_sub(self.first)).ok()?;
        let len = u32::try_from(last.wrapping_sub(at).wrapping_add(1)).ok()?;
        Some((start, len))
    }

    #[inline(always)]
    fn granule_mask(&self) -> u64 {
        1_u64.wrapping_shl(self.shift).wrapping_sub(1)
    }

    #[inline(always)]
    fn range(&self, start: u32, len: u32) -> IovaRange {
        let at = self.first.wrapping_add(u64::from(start));
        let end = at.wrapping_add(u64::from(len));
        let start = Iova::new(at.wrapping_shl(self.shift));
        // One past it may be 2^64.
        let last = Iova::new(end.wrapping_shl(self.shift).wrapping_sub(1));
        IovaRange::new(start, last).expect("a run is not empty")
    }
}
