//! The granules of one space: blocks, and the ways to find them.
//!
//! Speaks in granules, counted from the first of the space. What that is in
//! addresses and bytes is the allocator's business.

use super::blocks::{Block, Blocks, FIRST, Id};
use super::by_address::ByAddress;
use super::magazines::Magazines;
use super::sizes::{Fit, Sizes};
use super::starts::{Place, Starts};

/// Holes that are looked at one by one before an index is made of them.
const FEW_HOLES: usize = 64;

/// Each granule is in exactly one block: live, cached in a magazine, or a hole.
/// No two holes touch.
#[derive(Debug)]
pub(super) struct Space {
    /// The number of the first granule in the whole address space.
    origin: u64,
    granules: u32,
    blocks: Blocks,
    /// Live and cached blocks.
    starts: Starts,
    magazines: Magazines,
    sizes: Sizes,
    by_address: ByAddress,
}

impl Space {
    pub(super) fn new(origin: u64, granules: u32) -> Space {
        let mut blocks = Blocks::new(granules);
        let mut sizes = Sizes::new();
        sizes.put(&mut blocks, FIRST);
        Space {
            origin,
            granules,
            blocks,
            starts: Starts::new(),
            magazines: Magazines::new(),
            sizes,
            by_address: ByAddress::default(),
        }
    }

    /// Takes `want` granules: the youngest cached block of that length, else
    /// from the start of the shortest hole that has them.
    #[inline(always)]
    pub(super) fn take_any(&mut self, want: u32) -> Option<u32> {
        match self.magazines.get(&mut self.blocks, want, |_| true) {
            Some(start) => Some(start),
            None => self.take_shortest(want),
        }
    }

    /// Takes `want` granules from the start of the shortest hole that has them.
    #[inline(never)]
    fn take_shortest(&mut self, want: u32) -> Option<u32> {
        let Fit::Hole(hole) = self.sizes.best(&self.blocks, want) else {
            return None;
        };
        let at = self.blocks[hole].start;
        self.cut(hole, at, want);
        Some(at)
    }

    /// Takes `want` granules that begin at a multiple of `align`, a power of two,
    /// and end at `end` or before, both in granules of the whole address space.
    pub(super) fn take_where(&mut self, want: u32, align: u64, end: u64) -> Option<u32> {
        let origin = self.origin;
        let will_do = |start: u32| {
            let at = origin + u64::from(start);
            at & (align - 1) == 0 && at + u64::from(want) <= end
        };
        let cached = self.magazines.get(&mut self.blocks, want, will_do);
        if cached.is_some() {
            return cached;
        }
        // No address helps if no hole is long enough. Nothing but 0 is aligned to
        // more than the whole space.
        let none_is_long = self.sizes.best(&self.blocks, want) == Fit::Nothing;
        if none_is_long || align >= self.end() {
            return None;
        }
        let guess = self.guess(want, align, end);
        let (hole, at) = guess.or_else(|| self.lowest(want, align, end))?;
        self.cut(hole, at, want);
        Some(at)
    }

    /// Takes exactly these granules. `false` if they are not all in one hole.
    pub(super) fn take_at(&mut self, at: u32, want: u32) -> bool {
        let id = self.by_address.covering(&self.blocks, at);
        let block = &self.blocks[id];
        let fits = block.is_hole() && block.end() - at >= want;
        if fits {
            self.cut(id, at, want);
        }
        fits
    }

    /// Frees what is live exactly so. `false` if nothing is, and then nothing is
    /// changed.
    #[inline(always)]
    pub(super) fn free(&mut self, start: u32, len: u32) -> bool {
        self.starts.advance(&self.blocks);
        let Some((place, id)) = self.starts.find(&self.blocks, start) else {
            return false;
        };
        let block = &mut self.blocks[id];
        if block.len != len || !block.is_live() {
            return false;
        }
        if !self.magazines.put(block, id) {
            self.retire(place, start, id);
        }
        true
    }

    /// Makes holes of what is in magazines. `false` if that was nothing.
    pub(super) fn drain(&mut self) -> bool {
        let had_any = self.magazines.count() > 0;
        while let Some(id) = self.magazines.pop_any(&self.blocks) {
            let start = self.blocks[id].start;
            let found = self.starts.find(&self.blocks, start);
            let (place, _) = found.expect("cached blocks are found by their start");
            self.retire(place, start, id);
        }
        had_any
    }

    /// Length of what is live from `start` on.
    pub(super) fn live_len(&self, start: u32) -> Option<u32> {
        let (_, id) = self.starts.find(&self.blocks, start)?;
        let block = &self.blocks[id];
        block.is_live().then_some(block.len)
    }

    /// The block that has this granule, or the one after if that is a hole. As
    /// (start, length); asked when magazines are empty, so that it is live.
    pub(super) fn live_from(&mut self, granule: u32) -> (u32, u32) {
        let mut block = &self.blocks[self.by_address.covering(&self.blocks, granule)];
        if block.is_hole() {
            block = &self.blocks[block.after];
        }
        assert!(block.is_live(), "what is not free is live");
        (block.start, block.len)
    }

    /// What of the first hole that ends behind `granule` lies there or behind,
    /// as (start, length). Empties the magazines.
    pub(super) fn hole_from(&mut self, granule: u32) -> Option<(u32, u32)> {
        self.drain();
        let mut holes = self.blocks.iter().filter(|(_, block)| block.is_hole());
        let (_, hole) = holes.find(|(_, hole)| hole.end() > granule)?;
        let start = hole.start.max(granule);
        Some((start, hole.end() - start))
    }

    /// Number of live blocks.
    pub(super) fn live_count(&self) -> usize {
        self.starts.count() - self.magazines.count()
    }

    /// What is live as (start, length), in order.
    pub(super) fn live(&self) -> impl Iterator<Item = (u32, u32)> {
        let live = self.blocks.iter().filter(|(_, block)| block.is_live());
        live.map(|(_, block)| (block.start, block.len))
    }

    /// The longest hole there would be with empty magazines. They are left as
    /// they are, so that a question changes no later answer.
    pub(super) fn longest_if_drained(&self) -> u32 {
        let cached = self.magazines.iter(&self.blocks);
        let runs = cached.filter_map(|id| self.free_run_of(id));
        let known = self.by_address.longest().map(granules);
        let longest = known.or_else(|| self.sizes.longest(&self.blocks, usize::MAX));
        runs.fold(longest.unwrap_or(0), u32::max)
    }

    /// The longest run of free granules before `end`, a granule of the whole
    /// address space. Asked when magazines are empty.
    pub(super) fn longest_below(&mut self, end: u64) -> u32 {
        let Some(last) = end.checked_sub(1) else {
            return 0;
        };
        let is_whole = end >= self.end();
        if is_whole && let Some(longest) = self.sizes.longest(&self.blocks, FEW_HOLES) {
            return longest;
        }
        let holes = self.by_address.holes(&self.blocks, self.origin);
        granules(holes.largest_in(0..=last))
    }

    pub(super) fn heap_bytes(&self) -> usize {
        self.blocks.heap_bytes()
            + self.starts.heap_bytes()
            + self.sizes.heap_bytes()
            + self.by_address.heap_bytes()
    }

    /// Checks that blocks make the whole, that no two holes touch, and that
    /// every look-up agrees with the blocks.
    ///
    /// # Panics
    /// If not.
    pub(super) fn check_invariants(&self) {
        let blocks = &self.blocks;
        blocks.check_invariants(self.granules);
        let holes = || blocks.iter().filter(|(_, block)| block.is_hole());
        let others = || blocks.iter().filter(|(_, block)| !block.is_hole());
        for (id, hole) in holes() {
            assert_eq!(blocks.hole(hole.after), None, "hole {id} stands apart");
        }
        self.starts.check_invariants(blocks, others());
        self.sizes.check_invariants(blocks, holes().count());
        self.magazines.check_invariants(blocks);
        self.by_address.check_invariants(blocks, self.origin);
    }

    /// One past the last granule, in granules of the whole address space.
    fn end(&self) -> u64 {
        self.origin + u64::from(self.granules)
    }

    /// A hole that will most likely do, and the place in it.
    fn guess(&self, want: u32, align: u64, end: u64) -> Option<(Id, u32)> {
        let in_hole = |hole: Id| {
            let block = &self.blocks[hole];
            let start = self.origin + u64::from(block.start);
            let at = (start + (align - 1)) & !(align - 1);
            let ends = at + u64::from(want);
            let fits = ends <= end && ends <= start + u64::from(block.len);
            fits.then(|| Some((hole, u32::try_from(at - self.origin).ok()?)))?
        };
        let with_slack = u32::try_from(u64::from(want) + (align - 1)).ok();
        let lens = [Some(want), with_slack].into_iter().flatten();
        let fits = lens.map(|len| self.sizes.best(&self.blocks, len));
        fits.filter_map(|fit| match fit {
            Fit::Hole(hole) => in_hole(hole),
            Fit::Nothing | Fit::Unknown => None,
        })
        .next()
    }

    /// The lowest place that will do, and the hole it is in.
    fn lowest(&mut self, want: u32, align: u64, end: u64) -> Option<(Id, u32)> {
        let window = 0..=end.checked_sub(1)?;
        let holes = self.by_address.holes(&self.blocks, self.origin);
        let at = holes.first_fit(u64::from(want), align.trailing_zeros(), window)?;
        let at = u32::try_from(at - self.origin).expect("a hole of this space");
        Some((self.by_address.covering(&self.blocks, at), at))
    }

    /// Makes live a part of a hole.
    fn cut(&mut self, hole: Id, at: u32, want: u32) {
        self.starts.make_way(&self.blocks);
        if let Some(holes) = self.by_address.known_holes() {
            let taken = holes.take(self.origin + u64::from(at), u64::from(want));
            assert!(taken, "holes by address are the same");
        }
        self.sizes.remove(&mut self.blocks, hole);
        let mut id = hole;
        let head = at - self.blocks[hole].start;
        if head > 0 {
            id = self.split(hole, head);
            self.sizes.put(&mut self.blocks, hole);
        }
        if self.blocks[id].len > want {
            let tail = self.split(id, want);
            self.sizes.put(&mut self.blocks, tail);
        }
        self.blocks[id].make_live();
        self.starts.add(at, id);
    }

    /// Makes a hole of a live block, or a cached one that has left its magazine.
    #[inline(never)]
    fn retire(&mut self, place: Place, start: u32, id: Id) {
        self.starts.remove(&self.blocks, place, start);
        self.make_hole(id);
    }

    /// Makes a hole of a block that is not among the starts any more, and one
    /// with the holes that it touches.
    fn make_hole(&mut self, id: Id) {
        let Block {
            start,
            len,
            before,
            after,
            ..
        } = self.blocks[id];
        if let Some(holes) = self.by_address.known_holes() {
            holes.give(self.origin + u64::from(start), u64::from(len));
        }
        // Both are looked at before anything depends on one of them: most likely
        // neither is in the cache.
        let (before, after) = (self.blocks.hole(before), self.blocks.hole(after));
        let mut whole = id;
        if let Some(after) = after {
            self.sizes.remove(&mut self.blocks, after);
            self.by_address.end(self.blocks[after].start);
            self.blocks.absorb_next(id);
        }
        if let Some(before) = before {
            self.sizes.remove(&mut self.blocks, before);
            self.by_address.end(start);
            self.blocks.absorb_next(before);
            whole = before;
        }
        self.sizes.put(&mut self.blocks, whole);
    }

    fn split(&mut self, id: Id, len: u32) -> Id {
        let rest = self.blocks.split(id, len);
        self.by_address.begin(self.blocks[rest].start, rest);
        rest
    }

    /// Length of the free run that a cached block is in, if it is the first
    /// cached one there.
    fn free_run_of(&self, id: Id) -> Option<u32> {
        let block = &self.blocks[id];
        let hole_before = self.blocks.hole(block.before);
        let start = hole_before.map_or(block.start, |hole| self.blocks[hole].start);
        let before = hole_before.map_or(block.before, |hole| self.blocks[hole].before);
        if self.blocks.get(before).is_some_and(Block::is_cached) {
            return None;
        }
        let mut end = block.end();
        let mut next = self.blocks.get(block.after);
        while let Some(free) = next.filter(|block| !block.is_live()) {
            end = free.end();
            next = self.blocks.get(free.after);
        }
        Some(end - start)
    }
}

/// A number of granules of this space.
fn granules(count: u64) -> u32 {
    u32::try_from(count).expect("no more than the space has")
}
