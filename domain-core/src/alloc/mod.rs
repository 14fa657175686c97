//! Who gets which iovas of an aperture.
//!
//! Three parts, and each does what it is best at:
//!
//! * Magazines: runs that were just freed wait on bounded stacks by length,
//!   after Bonwick and Adams, "Magazines and Vmem" (USENIX 2001). Most requests
//!   are for a page or a few, or for a usual buffer, and end here.
//! * [`holes`]: everything else that is free, in a B+-tree by address whose
//!   branches know what lies below them. A request is cut from the lowest hole
//!   of the smallest size class that surely fits (good fit, with the classes of
//!   TLSF: Masmano et al., "TLSF: a new dynamic memory allocator for real-time
//!   systems", 2004). With a limit or an alignment it gets the lowest place that
//!   fits (first fit): if that is too high, all are, so the answer is exact.
//!   Free runs join their neighbours at once.
//! * Live allocations: two bits a granule, so that nothing is freed that was not
//!   allocated exactly so.
//!
//! What was not taken: plain first fit, which after a while at 90 % full had no
//! hole of 256 granules left where good fit never failed; TLSF's own lists,
//! which know nothing of addresses, so that a limit or an alignment makes them
//! walk or refuse what would fit; buddies, which round 17 granules up to 32.
//!
//! | operation | worst case, with n holes |
//! |---|---|
//! | `alloc` and `free` through a magazine | O(1) |
//! | `alloc`, `alloc_at`, `free` otherwise | O(log n) |
//! | the first refusal, or `alloc_at` of what a magazine holds | O(log n) for each of at most 925 runs in magazines, which then are empty |
//! | the first request for an alignment | O(n): 3 to 20 ns a hole, once for each of at most 51 alignments |
//! | `largest_hole_bytes` | O(log n) for each run in a magazine |
//! | `used_bytes`, `live_count` | O(1) |
//!
//! Memory: an idle allocator of any size has less than 2 KiB. Beyond that, marks
//! of live allocations cost a quarter of a byte a granule (so 32 bytes for one of
//! 128 granules, 64 at most, about 30 for those longer than 256) in pages of
//! 1 KiB for 4,096 granules; a hole costs about 24 bytes; magazines 8 KiB at
//! most. A full aperture of 64 MiB has 4 KiB of marks. Nothing is laid out over
//! the address space.

pub mod holes;
mod live;
mod magazines;
#[cfg(test)]
mod tests;

use self::holes::Holes;
use self::live::Live;
use self::magazines::Magazines;
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

/// Numbers of granules: an address shifted right by the granule's shift. They
/// and their sums stay far below 2^64.
type Grain = u64;

/// Allocates whole granules of one aperture. Deterministic: the same calls get
/// the same answers.
#[derive(Debug)]
pub struct IovaAllocator {
    granule: Granule,
    /// The granule's, at hand.
    shift: u32,
    /// First and last granule that may be allocated.
    first: Grain,
    last: Grain,
    /// Each granule is in exactly one of these three.
    holes: Holes,
    magazines: Magazines,
    live: Live,
    /// Number of granules that are live.
    used: u64,
}

impl IovaAllocator {
    /// An allocator for the whole granules of `aperture`. The first granule of
    /// a space that starts at 0 and a partial granule at either end are never
    /// given.
    ///
    /// `None` if that leaves nothing.
    #[must_use]
    pub fn new(aperture: IovaRange, granule: Granule) -> Option<IovaAllocator> {
        let shift = granule.shift();
        let first = (aperture.start().get() >> shift)
            + u64::from(granule.offset_in(aperture.start().get()) != 0);
        let first = first.max(1);
        let ends_whole = granule.offset_in(aperture.last().get()) == granule.bytes() - 1;
        let last = (aperture.last().get() >> shift).checked_sub(u64::from(!ends_whole))?;
        if last < first {
            return None;
        }
        let mut holes = Holes::new();
        holes.give(first, last - first + 1);
        Some(IovaAllocator {
            granule,
            shift,
            first,
            last,
            holes,
            magazines: Magazines::new(),
            live: Live::new(first),
            used: 0,
        })
    }

    /// Gives a free run: if one of that length was freed lately the youngest of
    /// them, else a part of a hole.
    ///
    /// # Errors
    /// [`AllocError`]; `NoSpace` only if no run fits, naming the largest hole
    /// below the limit.
    pub fn alloc(&mut self, request: AllocRequest) -> Result<IovaRange, AllocError> {
        let AllocRequest {
            len_bytes,
            align_bytes,
            limit,
        } = request;
        // What nearly every request is, before anything is worked out for others.
        if align_bytes == 0 && limit.is_none() && len_bytes != 0 {
            let want = ((len_bytes - 1) >> self.shift) + 1;
            if let Some(at) = self.magazines.get(want, |_| true) {
                return Ok(self.taken(at, want));
            }
        }
        if len_bytes == 0 {
            return Err(AllocError::ZeroLength);
        }
        if align_bytes != 0 && !align_bytes.is_power_of_two() {
            return Err(AllocError::BadAlignment { align_bytes });
        }
        let align = align_bytes.max(self.granule.bytes()) >> self.shift;
        // Not a division, which would be a third of the time of a short alloc.
        let want = ((len_bytes - 1) >> self.shift) + 1;
        let end = self.end(limit);
        let Some(at) = self.place(want, align, end) else {
            return Err(AllocError::NoSpace {
                want_bytes: len_bytes,
                align_bytes: align << self.shift,
                largest_hole_bytes: self.largest_hole_below(end) << self.shift,
            });
        };
        Ok(self.taken(at, want))
    }

    /// Gives exactly `range`.
    ///
    /// # Errors
    /// [`AllocAtError`], naming what is in the way.
    pub fn alloc_at(&mut self, range: IovaRange) -> Result<(), AllocAtError> {
        let usable = self.range(self.first, self.last - self.first + 1);
        let (at, want) = self.grains(range).ok_or(AllocAtError::Misaligned {
            range,
            granule_bytes: self.granule.bytes(),
        })?;
        if !usable.contains(range) {
            return Err(AllocAtError::Outside { range, usable });
        }
        let taken = self.holes.take(at, want) || self.drain() && self.holes.take(at, want);
        if !taken {
            let hit = self.live_above(at);
            return Err(AllocAtError::Taken { range, hit });
        }
        self.taken(at, want);
        Ok(())
    }

    /// Takes back exactly what was given.
    ///
    /// # Errors
    /// [`FreeError`] for anything else, twice the same included.
    pub fn free(&mut self, range: IovaRange) -> Result<(), FreeError> {
        let granules = self.grains(range);
        let Some((at, len)) = granules.filter(|(at, len)| self.live.remove(*at, *len)) else {
            return Err(self.why_not_freed(range));
        };
        self.used -= len;
        if !self.magazines.put(at, len) {
            self.holes.give(at, len);
        }
        Ok(())
    }

    /// The longest run that an unaligned, unlimited request can get, in bytes.
    #[must_use]
    pub fn largest_hole_bytes(&self) -> u64 {
        let joined = self.longest_with_magazines();
        self.holes.largest().max(joined) << self.shift
    }

    /// Allocated bytes, in whole granules.
    #[must_use]
    pub fn used_bytes(&self) -> u64 {
        self.used << self.shift
    }

    /// Number of live allocations.
    #[must_use]
    pub fn live_count(&self) -> usize {
        self.live.count()
    }

    /// Live allocations in order.
    pub fn live(&self) -> impl Iterator<Item = IovaRange> {
        self.live.iter().map(|(start, len)| self.range(start, len))
    }

    /// Bytes of memory held beside the value itself.
    #[must_use]
    pub fn heap_bytes(&self) -> usize {
        self.holes.heap_bytes() + self.magazines.heap_bytes() + self.live.heap_bytes()
    }

    /// Checks that holes, magazines and live runs are disjoint and make the
    /// whole, and that each of them is sound.
    ///
    /// # Panics
    /// If not.
    pub fn check_invariants(&self) {
        self.holes.check_invariants();
        self.live.check_invariants();
        let free = self.holes.iter().chain(self.magazines.iter());
        let mut runs: Vec<_> = free.chain(self.live.iter()).collect();
        runs.sort_unstable();
        let mut next = self.first;
        for (start, len) in runs {
            assert_eq!(start, next, "runs neither overlap nor leave gaps");
            assert!(len > 0, "no run is empty");
            next = start + len;
        }
        assert_eq!(next, self.last + 1, "runs make the whole");
        let used: u64 = self.live.iter().map(|(_, len)| len).sum();
        assert_eq!(used, self.used, "what is used is counted");
    }

    fn taken(&mut self, at: Grain, want: u64) -> IovaRange {
        self.live.insert(at, want);
        self.used += want;
        self.range(at, want)
    }

    fn why_not_freed(&self, range: IovaRange) -> FreeError {
        let start = range.start();
        let at = start.get() >> self.shift;
        let len = self.live.len_at(at);
        len.map_or(FreeError::NotAllocated { start }, |len| {
            FreeError::WrongSize {
                range,
                allocated: self.range(at, len),
            }
        })
    }

    /// Takes `want` free granules below `end`, the first at a multiple of
    /// `align`. Magazines are emptied before there is said to be none.
    fn place(&mut self, want: u64, align: u64, end: Grain) -> Option<Grain> {
        // Nothing but 0 is aligned to more than the whole space.
        if align > self.last {
            return None;
        }
        let will_do = |at: Grain| at & (align - 1) == 0 && at + want <= end;
        self.magazines
            .get(want, will_do)
            .or_else(|| self.take_hole(want, align, end))
            .or_else(|| self.drain().then(|| self.take_hole(want, align, end))?)
    }

    fn take_hole(&mut self, want: u64, align: u64, end: Grain) -> Option<Grain> {
        if align == 1 && end > self.last {
            return self.holes.take_good(want);
        }
        let window = 0..=end.checked_sub(1)?;
        self.holes.take_first(want, align.trailing_zeros(), window)
    }

    /// Gives what is in magazines back to the holes. `false` if they were empty.
    fn drain(&mut self) -> bool {
        if self.magazines.is_empty() {
            return false;
        }
        for (start, len) in self.magazines.drain() {
            self.holes.give(start, len);
        }
        true
    }

    /// One past the last granule that may be used.
    fn end(&self, limit: Option<Iova>) -> Grain {
        let below_limit = limit.map(|last| {
            let whole = self.granule.offset_in(last.get()) == self.granule.bytes() - 1;
            (last.get() >> self.shift) + u64::from(whole)
        });
        below_limit.unwrap_or(Grain::MAX).min(self.last + 1)
    }

    /// Asked when magazines are empty.
    fn largest_hole_below(&mut self, end: Grain) -> u64 {
        self.drain();
        match end.checked_sub(1) {
            Some(last) if last < self.last => self.holes.largest_in(0..=last),
            Some(_) => self.holes.largest(),
            None => 0,
        }
    }

    /// The longest run that draining the magazines would make. They are not
    /// drained, so that a question changes no later answer.
    fn longest_with_magazines(&self) -> u64 {
        let mut cached: Vec<_> = self.magazines.iter().collect();
        cached.sort_unstable();
        let hole_end = |at: Grain| self.holes.hole_at(at).map_or(at, |(s, len)| s + len);
        let hole_start = |at: Grain| self.holes.hole_at(at - 1).map_or(at, |(start, _)| start);
        let (mut longest, mut run, mut next) = (0, 0, 0);
        for (start, len) in cached {
            if start != next {
                run = hole_start(start);
            }
            next = hole_end(start + len);
            longest = longest.max(next - run);
        }
        longest
    }

    /// The lowest live run that `at` is part of or lies below. There is one,
    /// and magazines are empty.
    fn live_above(&self, at: Grain) -> IovaRange {
        let taken = self
            .holes
            .hole_at(at)
            .map_or(at, |(start, len)| start + len);
        let (start, len) = self.live.covering(taken).expect("what is not free is live");
        self.range(start, len)
    }

    fn grains(&self, range: IovaRange) -> Option<(Grain, u64)> {
        let (start, last) = (range.start().get(), range.last().get());
        // Ones below the granule in `last`, none in `start`.
        let whole = (start | !last) & self.granule_mask() == 0;
        let (at, to) = (start >> self.shift, last >> self.shift);
        whole.then_some((at, to - at + 1))
    }

    fn granule_mask(&self) -> u64 {
        (1 << self.shift) - 1
    }

    fn range(&self, at: Grain, len: u64) -> IovaRange {
        let start = Iova::new(at << self.shift);
        let last = Iova::new(((at + len - 1) << self.shift) | self.granule_mask());
        IovaRange::new(start, last).expect("a run is not empty")
    }
}
