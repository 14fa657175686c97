//! Who gets which iovas of an aperture.
//!
//! Free runs are kept twice: by address, to join neighbours, and by length, to
//! find the shortest run that fits (best fit, lowest address first among
//! equals). Without `limit` and with granule alignment, which is what nearly
//! every request wants, alloc and free cost O(log n) in the number of runs.
//! With them the runs that are long enough are looked at one by one, so a
//! request fails only if truly no run fits.

pub mod holes;

use std::collections::{BTreeMap, BTreeSet};

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
    /// First and last granule that may be allocated.
    first: Grain,
    last: Grain,
    /// Free runs, start to length. Disjoint, never touching, never empty.
    free: BTreeMap<Grain, u64>,
    /// The same runs as (length, start).
    free_by_len: BTreeSet<(u64, Grain)>,
    /// Live allocations, start to length.
    live: BTreeMap<Grain, u64>,
    /// Sum of their lengths.
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
        let len = last - first + 1;
        Some(IovaAllocator {
            granule,
            first,
            last,
            free: BTreeMap::from([(first, len)]),
            free_by_len: BTreeSet::from([(len, first)]),
            live: BTreeMap::new(),
            used: 0,
        })
    }

    /// Gives a free run: the shortest that fits, the lowest among equals.
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
        if len_bytes == 0 {
            return Err(AllocError::ZeroLength);
        }
        if align_bytes != 0 && !align_bytes.is_power_of_two() {
            return Err(AllocError::BadAlignment { align_bytes });
        }
        let align = align_bytes.max(self.granule.bytes()) >> self.granule.shift();
        let want = len_bytes.div_ceil(self.granule.bytes());
        let end = self.end(limit);
        let found = self
            .free_by_len
            .range((want, 0)..)
            .find_map(|&(len, start)| fit(start, len, want, align, end).map(|at| (start, len, at)));
        let Some((start, len, at)) = found else {
            return Err(AllocError::NoSpace {
                want_bytes: len_bytes,
                align_bytes: align << self.granule.shift(),
                largest_hole_bytes: self.largest_hole_below(end) << self.granule.shift(),
            });
        };
        self.carve(start, len, at, want);
        Ok(self.range(at, want))
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
        let run = self
            .free
            .range(..=at)
            .next_back()
            .map(|(&start, &len)| (start, len));
        match run {
            Some((start, len)) if start + len >= at + want => {
                self.carve(start, len, at, want);
                Ok(())
            }
            _ => Err(AllocAtError::Taken {
                range,
                hit: self.first_live_in(at, want),
            }),
        }
    }

    /// Takes back exactly what was given.
    ///
    /// # Errors
    /// [`FreeError`] for anything else, twice the same included.
    pub fn free(&mut self, range: IovaRange) -> Result<(), FreeError> {
        let start = range.start();
        let at = start.get() >> self.granule.shift();
        let len = *self
            .live
            .get(&at)
            .ok_or(FreeError::NotAllocated { start })?;
        let allocated = self.range(at, len);
        if allocated != range {
            return Err(FreeError::WrongSize { range, allocated });
        }
        self.live.remove(&at);
        self.used -= len;
        self.join(at, len);
        Ok(())
    }

    /// The free run that covers `from`, from there on, or the next one behind it.
    pub fn free_from(&mut self, from: Iova) -> Option<IovaRange> {
        let from = from.get() >> self.granule.shift();
        let (start, len) = self
            .free
            .iter()
            .map(|(start, len)| (*start, *len))
            .find(|(start, len)| start + len > from)?;
        let first = start.max(from);
        Some(self.range(first, start + len - first))
    }

    /// The longest run that an unaligned, unlimited request can get, in bytes.
    #[must_use]
    pub fn largest_hole_bytes(&self) -> u64 {
        self.free_by_len
            .last()
            .map_or(0, |&(len, _)| len << self.granule.shift())
    }

    /// Allocated bytes, in whole granules.
    #[must_use]
    pub fn used_bytes(&self) -> u64 {
        self.used << self.granule.shift()
    }

    /// Number of live allocations.
    #[must_use]
    pub fn live_count(&self) -> usize {
        self.live.len()
    }

    /// Live allocations in order.
    pub fn live(&self) -> impl Iterator<Item = IovaRange> {
        self.live
            .iter()
            .map(|(&start, &len)| self.range(start, len))
    }

    /// Checks that free and live runs are disjoint and make the whole, that no
    /// two free runs touch, and that both indexes agree.
    ///
    /// # Panics
    /// If they do not.
    pub fn check_invariants(&self) {
        let by_len: BTreeSet<_> = self
            .free
            .iter()
            .map(|(&start, &len)| (len, start))
            .collect();
        assert_eq!(
            by_len, self.free_by_len,
            "both indexes of the free runs agree"
        );
        let mut runs: Vec<_> = self.free.iter().map(|(&s, &l)| (s, l, true)).collect();
        runs.extend(self.live.iter().map(|(&s, &l)| (s, l, false)));
        runs.sort_unstable();
        let mut next = self.first;
        let mut after_free = false;
        for (start, len, is_free) in runs {
            assert_eq!(start, next, "runs neither overlap nor leave gaps");
            assert!(len > 0, "no run is empty");
            assert!(
                !(after_free && is_free),
                "free neighbours at {start} are joined"
            );
            next = start + len;
            after_free = is_free;
        }
        assert_eq!(next, self.last + 1, "runs make the whole");
        let used: u64 = self.live.values().sum();
        assert_eq!(used, self.used, "what is used is counted");
    }

    /// One past the last granule that may be used.
    fn end(&self, limit: Option<Iova>) -> Grain {
        let below_limit = limit.map(|last| {
            let whole = self.granule.offset_in(last.get()) == self.granule.bytes() - 1;
            (last.get() >> self.granule.shift()) + u64::from(whole)
        });
        below_limit.unwrap_or(Grain::MAX).min(self.last + 1)
    }

    fn largest_hole_below(&self, end: Grain) -> u64 {
        if end > self.last {
            return self.free_by_len.last().map_or(0, |&(len, _)| len);
        }
        self.free
            .range(..end)
            .map(|(&start, &len)| len.min(end - start))
            .max()
            .unwrap_or(0)
    }

    fn carve(&mut self, start: Grain, len: u64, at: Grain, want: u64) {
        self.forget(start, len);
        if at > start {
            self.remember(start, at - start);
        }
        if start + len > at + want {
            self.remember(at + want, start + len - (at + want));
        }
        self.live.insert(at, want);
        self.used += want;
    }

    fn join(&mut self, mut at: Grain, mut len: u64) {
        let before = self.free.range(..at).next_back().map(|(&s, &l)| (s, l));
        if let Some((start, before_len)) = before.filter(|(s, l)| s + l == at) {
            self.forget(start, before_len);
            at = start;
            len += before_len;
        }
        if let Some(&after_len) = self.free.get(&(at + len)) {
            self.forget(at + len, after_len);
            len += after_len;
        }
        self.remember(at, len);
    }

    fn remember(&mut self, start: Grain, len: u64) {
        self.free.insert(start, len);
        self.free_by_len.insert((len, start));
    }

    fn forget(&mut self, start: Grain, len: u64) {
        self.free.remove(&start);
        self.free_by_len.remove(&(len, start));
    }

    fn first_live_in(&self, at: Grain, want: u64) -> IovaRange {
        let before = self
            .live
            .range(..=at)
            .next_back()
            .filter(|(s, l)| *s + *l > at);
        let hit = before.or_else(|| self.live.range(at..at + want).next());
        let (&start, &len) = hit.expect("what is not free is live");
        self.range(start, len)
    }

    fn grains(&self, range: IovaRange) -> Option<(Grain, u64)> {
        let (start, last) = (range.start().get(), range.last().get());
        let whole = self.granule.offset_in(start) == 0
            && self.granule.offset_in(last) == self.granule.bytes() - 1;
        let (at, to) = (start >> self.granule.shift(), last >> self.granule.shift());
        whole.then_some((at, to - at + 1))
    }

    fn range(&self, at: Grain, len: u64) -> IovaRange {
        let shift = self.granule.shift();
        let start = Iova::new(at << shift);
        let last = Iova::new(((at + len - 1) << shift) | (self.granule.bytes() - 1));
        IovaRange::new(start, last).expect("a run is not empty")
    }
}

/// The lowest aligned place for `want` granules in a free run, below `end`.
fn fit(start: Grain, len: u64, want: u64, align: u64, end: Grain) -> Option<Grain> {
    let at = start.checked_next_multiple_of(align)?;
    let to = at.checked_add(want)?;
    (to <= start + len && to <= end).then_some(at)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const P: u64 = 4096;

    fn mib_at_zero() -> IovaAllocator {
        let aperture = IovaRange::from_len(Iova::new(0), 1 << 20).unwrap();
        IovaAllocator::new(aperture, Granule::Size4K).unwrap()
    }

    fn aligned(len_bytes: u64, align_bytes: u64) -> AllocRequest {
        AllocRequest {
            align_bytes,
            ..AllocRequest::of(len_bytes)
        }
    }

    #[test]
    fn a_mib_at_zero_holds_255_pages_and_never_gives_page_zero() {
        let mut iovas = mib_at_zero();
        let got: Vec<_> = (0..255)
            .map(|_| iovas.alloc(AllocRequest::of(1)).unwrap())
            .collect();
        assert!(got.iter().all(|range| range.start().get() >= P));
        let full = iovas.alloc(AllocRequest::of(P)).unwrap_err();
        assert_eq!(
            full,
            AllocError::NoSpace {
                want_bytes: P,
                align_bytes: P,
                largest_hole_bytes: 0
            }
        );
        iovas.free(got[77]).unwrap();
        assert_eq!(iovas.alloc(AllocRequest::of(P)).unwrap(), got[77]);
        assert!(iovas.alloc(AllocRequest::of(P)).is_err());
        iovas.check_invariants();
    }

    #[test]
    fn a_request_takes_exactly_its_granules() {
        let mut iovas = mib_at_zero();
        assert_eq!(
            iovas.alloc(AllocRequest::of(255 * P)).unwrap().bytes(),
            u128::from(255 * P)
        );
        let mut iovas = mib_at_zero();
        for _ in 0..15 {
            iovas.alloc(AllocRequest::of(17 * P)).unwrap();
        }
        assert_eq!(iovas.used_bytes(), 255 * P);
        assert_eq!(iovas.largest_hole_bytes(), 0);
    }

    #[test]
    fn natural_alignment_is_given_on_request() {
        for pages in 1..=64u64 {
            let align = (pages * P).next_power_of_two();
            let mut iovas = mib_at_zero();
            iovas.alloc(AllocRequest::of(P)).unwrap();
            let range = iovas.alloc(aligned(pages * P, align)).unwrap();
            assert_eq!(range.start().get() % align, 0, "{pages} pages");
        }
        let odd = mib_at_zero().alloc(aligned(P, 3 * P)).unwrap_err();
        assert_eq!(odd, AllocError::BadAlignment { align_bytes: 3 * P });
    }

    #[test]
    fn a_limit_is_kept_and_the_largest_hole_is_the_one_below_it() {
        let mut iovas = mib_at_zero();
        let limit = Some(Iova::new(8 * P - 1));
        let below = AllocRequest {
            limit,
            ..AllocRequest::of(7 * P)
        };
        let too_long = AllocRequest {
            limit,
            ..AllocRequest::of(8 * P)
        };
        let refused = iovas.alloc(too_long).unwrap_err();
        assert!(
            matches!(refused, AllocError::NoSpace { largest_hole_bytes, .. } if largest_hole_bytes == 7 * P)
        );
        assert!(iovas.alloc(below).unwrap().last() <= Iova::new(8 * P - 1));
        // One byte short of the granule's end: the granule is not to be had.
        let cut = AllocRequest {
            limit: Some(Iova::new(9 * P - 2)),
            ..AllocRequest::of(1)
        };
        assert!(iovas.alloc(cut).is_err());
    }

    #[test]
    fn a_double_or_wrong_size_free_changes_nothing() {
        let mut iovas = mib_at_zero();
        let range = iovas.alloc(AllocRequest::of(2 * P)).unwrap();
        let half = IovaRange::from_len(range.start(), P).unwrap();
        assert_eq!(
            iovas.free(half),
            Err(FreeError::WrongSize {
                range: half,
                allocated: range
            })
        );
        iovas.free(range).unwrap();
        assert_eq!(
            iovas.free(range),
            Err(FreeError::NotAllocated {
                start: range.start()
            })
        );
        iovas.check_invariants();
    }

    #[test]
    fn alloc_at_names_what_is_in_the_way() {
        let mut iovas = mib_at_zero();
        let range = |start, len| IovaRange::from_len(Iova::new(start), len).unwrap();
        iovas.alloc_at(range(16 * P, 2 * P)).unwrap();
        for (start, len) in [(16, 2), (16, 1), (17, 1), (15, 2), (15, 3)] {
            let refused = iovas.alloc_at(range(start * P, len * P)).unwrap_err();
            assert!(
                matches!(refused, AllocAtError::Taken { hit, .. } if hit == range(16 * P, 2 * P))
            );
        }
        iovas.alloc_at(range(15 * P, P)).unwrap();
        iovas.alloc_at(range(18 * P, P)).unwrap();
        assert!(matches!(
            iovas.alloc_at(range(0, P)),
            Err(AllocAtError::Outside { .. })
        ));
        assert!(matches!(
            iovas.alloc_at(range(P + 1, P)),
            Err(AllocAtError::Misaligned { .. })
        ));
        iovas.check_invariants();
    }

    #[test]
    fn a_partial_granule_at_the_end_is_never_given() {
        let aperture = IovaRange::new(Iova::new(0), Iova::new(4 * P - 2)).unwrap();
        let mut iovas = IovaAllocator::new(aperture, Granule::Size4K).unwrap();
        assert_eq!(iovas.largest_hole_bytes(), 2 * P);
        assert_eq!(
            iovas.alloc(AllocRequest::of(2 * P)).unwrap().last(),
            Iova::new(3 * P - 1)
        );
        let nothing = IovaRange::new(Iova::new(0), Iova::new(2 * P - 2)).unwrap();
        assert!(IovaAllocator::new(nothing, Granule::Size4K).is_none());
    }

    #[test]
    fn the_top_of_the_64_bit_space_can_be_allocated() {
        let top = IovaRange::new(Iova::new(u64::MAX - 4 * P + 1), Iova::new(u64::MAX)).unwrap();
        let mut iovas = IovaAllocator::new(top, Granule::Size4K).unwrap();
        assert_eq!(iovas.alloc(AllocRequest::of(4 * P)).unwrap(), top);
        iovas.free(top).unwrap();
        iovas.check_invariants();
    }

    /// The slow, obvious model: one flag a page.
    struct Pages(Vec<bool>);

    impl Pages {
        fn fits(&self, want: usize, align: usize, end: usize) -> bool {
            (1..=256 - want.min(255)).any(|at| {
                at % align == 0
                    && at + want <= end
                    && self.0[at..(at + want).min(256)].iter().all(|used| !used)
            })
        }

        fn set(&mut self, range: IovaRange, used: bool) {
            let page = |iova: Iova| usize::try_from(iova.get() / P).unwrap();
            for slot in &mut self.0[page(range.start())..=page(range.last())] {
                assert_ne!(*slot, used, "{range} was given twice or freed twice");
                *slot = used;
            }
        }
    }

    #[derive(Clone, Debug)]
    enum Op {
        Alloc {
            pages: usize,
            align_log2: u32,
            end: usize,
        },
        Free(prop::sample::Index),
    }

    fn op() -> impl Strategy<Value = Op> {
        prop_oneof![
            (
                1usize..24,
                0u32..5,
                prop_oneof![Just(256usize), 1usize..=256]
            )
                .prop_map(|(pages, align_log2, end)| Op::Alloc {
                    pages,
                    align_log2,
                    end
                }),
            any::<prop::sample::Index>().prop_map(Op::Free),
        ]
    }

    proptest! {
        #[test]
        fn random_operations_agree_with_a_page_by_page_model(ops in prop::collection::vec(op(), 1..200)) {
            let mut iovas = mib_at_zero();
            let mut model = Pages(vec![false; 256]);
            let mut live: Vec<IovaRange> = Vec::new();
            for op in ops {
                match op {
                    Op::Alloc { pages, align_log2, end } => {
                        let align = 1usize << align_log2;
                        let got = iovas.alloc(AllocRequest {
                            len_bytes: pages as u64 * P,
                            align_bytes: align as u64 * P,
                            limit: Some(Iova::new(end as u64 * P - 1)),
                        });
                        prop_assert_eq!(got.is_ok(), model.fits(pages, align, end));
                        if let Ok(range) = got {
                            prop_assert!(range.start().get() % (align as u64 * P) == 0);
                            prop_assert!(range.last().get() < end as u64 * P);
                            model.set(range, true);
                            live.push(range);
                        }
                    }
                    Op::Free(index) if !live.is_empty() => {
                        let range = live.swap_remove(index.index(live.len()));
                        iovas.free(range).unwrap();
                        model.set(range, false);
                    }
                    Op::Free(_) => {}
                }
                iovas.check_invariants();
            }
        }
    }
}
