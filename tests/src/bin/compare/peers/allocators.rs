//! Allocators of runs of pages.

use buddy_system_allocator::FrameAllocator;
use domain_core::alloc::{AllocRequest, IovaAllocator};
use domain_core::{Granule, Iova, IovaRange};
use nodit::interval::ii;
use nodit::{Interval, NoditSet};
use offset_allocator::{Allocation, Allocator};
use rangemap::RangeSet;
use vm_allocator::{AddressAllocator, AllocPolicy, RangeInclusive};

use crate::rounds::Role;

pub(crate) const PAGE: u64 = 4096;
/// Where the spaces of those begin that count in bytes; not 0, whose first
/// page some of them keep back.
const BASE: u64 = 1 << 20;

/// Gives runs of 4 KiB pages.
pub(crate) trait PageAllocator: Send + Sized {
    const NAME: &'static str;
    const ROLE: Role = Role::Peer;
    /// What is needed to free a run.
    type Run: Copy + Send;

    /// An allocator of so many pages, of which at most `runs` are ever live.
    fn new(pages: u32, runs: u32) -> Self;
    fn alloc(&mut self, pages: u32) -> Option<Self::Run>;
    fn free(&mut self, run: Self::Run);
    /// Where a run begins, to put runs in order.
    fn start(run: Self::Run) -> u64;

    /// Does the allocator itself say that a run of so many pages is free?
    fn claims_room(&self, _pages: u32) -> bool {
        false
    }
}

pub(crate) struct Ours(IovaAllocator);

impl PageAllocator for Ours {
    const NAME: &'static str = "domaind";
    const ROLE: Role = Role::Ours;
    type Run = IovaRange;

    fn new(pages: u32, _runs: u32) -> Ours {
        let space = IovaRange::from_len(Iova::new(BASE), u64::from(pages) * PAGE);
        let iovas = IovaAllocator::new(space.expect("some pages"), Granule::Size4K);
        Ours(iovas.expect("some pages"))
    }

    fn alloc(&mut self, pages: u32) -> Option<IovaRange> {
        self.0.alloc(AllocRequest::of(u64::from(pages) * PAGE)).ok()
    }

    fn free(&mut self, run: IovaRange) {
        self.0.free(run).expect("it is live");
    }

    fn start(run: IovaRange) -> u64 {
        run.start().get()
    }

    fn claims_room(&self, pages: u32) -> bool {
        self.0.largest_hole_bytes() >= u64::from(pages) * PAGE
    }
}

pub(crate) struct OffsetAllocator(Allocator);

impl PageAllocator for OffsetAllocator {
    const NAME: &'static str = "offset-allocator";
    type Run = Allocation;

    /// It needs a node for every run, live or free; between two live ones lies
    /// at most one free one.
    fn new(pages: u32, runs: u32) -> OffsetAllocator {
        OffsetAllocator(Allocator::with_max_allocs(pages, 2 * runs + 2))
    }

    fn alloc(&mut self, pages: u32) -> Option<Allocation> {
        self.0.allocate(pages)
    }

    fn free(&mut self, run: Allocation) {
        self.0.free(run);
    }

    fn start(run: Allocation) -> u64 {
        u64::from(run.offset)
    }
}

pub(crate) struct Buddy(FrameAllocator);

impl PageAllocator for Buddy {
    const NAME: &'static str = "buddy_system_allocator";
    /// First page and number of pages.
    type Run = (usize, usize);

    fn new(pages: u32, _runs: u32) -> Buddy {
        let mut frames = FrameAllocator::new();
        frames.add_frame(0, size(pages));
        Buddy(frames)
    }

    fn alloc(&mut self, pages: u32) -> Option<(usize, usize)> {
        let pages = size(pages);
        Some((self.0.alloc(pages)?, pages))
    }

    fn free(&mut self, (start, pages): (usize, usize)) {
        self.0.dealloc(start, pages);
    }

    fn start((start, _): (usize, usize)) -> u64 {
        u64::try_from(start).expect("64 bits")
    }
}

pub(crate) struct VmAllocator(AddressAllocator);

impl PageAllocator for VmAllocator {
    const NAME: &'static str = "vm-allocator";
    type Run = RangeInclusive;

    fn new(pages: u32, _runs: u32) -> VmAllocator {
        let space = AddressAllocator::new(BASE, u64::from(pages) * PAGE);
        VmAllocator(space.expect("some pages"))
    }

    fn alloc(&mut self, pages: u32) -> Option<RangeInclusive> {
        let bytes = u64::from(pages) * PAGE;
        self.0.allocate(bytes, PAGE, AllocPolicy::FirstMatch).ok()
    }

    fn free(&mut self, run: RangeInclusive) {
        self.0.free(&run).expect("it is live");
    }

    fn start(run: RangeInclusive) -> u64 {
        run.start()
    }
}

/// A set of the free runs, of which the first that fits is cut. (A set of the
/// live ones and a search of its gaps is slower.)
pub(crate) struct RangeMap(RangeSet<u64>);

impl PageAllocator for RangeMap {
    const NAME: &'static str = "rangemap";
    /// First page and first page behind it.
    type Run = (u64, u64);

    fn new(pages: u32, _runs: u32) -> RangeMap {
        let mut free = RangeSet::new();
        free.insert(0..u64::from(pages));
        RangeMap(free)
    }

    fn alloc(&mut self, pages: u32) -> Option<(u64, u64)> {
        let pages = u64::from(pages);
        let start = self
            .0
            .iter()
            .find(|run| run.end - run.start >= pages)?
            .start;
        self.0.remove(start..start + pages);
        Some((start, start + pages))
    }

    fn free(&mut self, (start, end): (u64, u64)) {
        self.0.insert(start..end);
    }

    fn start((start, _): (u64, u64)) -> u64 {
        start
    }
}

/// As [`RangeMap`].
pub(crate) struct Nodit(NoditSet<u64, Interval<u64>>);

impl PageAllocator for Nodit {
    const NAME: &'static str = "nodit";
    type Run = Interval<u64>;

    fn new(pages: u32, _runs: u32) -> Nodit {
        let mut free = NoditSet::new();
        let space = ii(0, u64::from(pages) - 1);
        free.insert_strict(space).expect("it is empty");
        Nodit(free)
    }

    fn alloc(&mut self, pages: u32) -> Option<Interval<u64>> {
        let span = u64::from(pages) - 1;
        let start = *self
            .0
            .iter()
            .find(|run| run.end() - run.start() >= span)?
            .start();
        let run = ii(start, start + span);
        drop(self.0.cut(&run));
        Some(run)
    }

    fn free(&mut self, run: Interval<u64>) {
        self.0.insert_merge_touching(run).expect("it is not free");
    }

    fn start(run: Interval<u64>) -> u64 {
        *run.start()
    }
}

/// The floor for single pages: a bit a page, a bit a word of those, and where
/// to begin. It cannot give runs.
pub(crate) struct Bitmap {
    /// Set: free.
    pages: Vec<u64>,
    /// Set: the word of `pages` has a free page.
    words: Vec<u64>,
    /// No word of `words` below it is set.
    first: usize,
}

impl PageAllocator for Bitmap {
    const NAME: &'static str = "two-level bitmap";
    const ROLE: Role = Role::Floor;
    type Run = u32;

    fn new(pages: u32, _runs: u32) -> Bitmap {
        let words = size(pages).div_ceil(64);
        Bitmap {
            pages: vec![u64::MAX; words],
            words: vec![u64::MAX; words.div_ceil(64)],
            first: 0,
        }
    }

    #[inline]
    fn alloc(&mut self, _pages: u32) -> Option<u32> {
        let past = self.words[self.first..]
            .iter()
            .position(|word| *word != 0)?;
        self.first += past;
        let word = self.first * 64 + size(self.words[self.first].trailing_zeros());
        let bit = self.pages[word].trailing_zeros();
        self.pages[word] &= self.pages[word] - 1;
        if self.pages[word] == 0 {
            self.words[self.first] &= self.words[self.first] - 1;
        }
        u32::try_from(word * 64).ok().map(|base| base + bit)
    }

    #[inline]
    fn free(&mut self, page: u32) {
        let word = size(page / 64);
        self.pages[word] |= 1 << (page % 64);
        self.words[word / 64] |= 1 << (word % 64);
        self.first = self.first.min(word / 64);
    }

    fn start(page: u32) -> u64 {
        u64::from(page)
    }
}

fn size(count: u32) -> usize {
    usize::try_from(count).expect("64 bits")
}
