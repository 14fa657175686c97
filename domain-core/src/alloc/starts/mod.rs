//! Which block starts at a granule.
//!
//! A hash table with linear probing, of four bytes a slot: a block's id, and in
//! the bits that ids do not need a part of the hash, so that a block is looked
//! at only if it almost surely is the one (as in Swiss tables). The key itself
//! stands in the block. What is removed leaves no tombstone: those after it
//! move back (Knuth, 6.4, algorithm R).
//!
//! A table that is three quarters full gets one of twice the size beside it, and
//! every operation from then on moves a few slots over: none pays for all.

#[cfg(test)]
mod tests;

use super::blocks::{Block, Blocks, Id, NONE};

const EMPTY: u32 = 0;
/// What has left the old table.
const GONE: u32 = 1;
/// Ids are stored with this added.
const ID_BIAS: u32 = 2;

/// Slots of the first table, as a power of two.
const FEWEST_BITS: u32 = 4;

/// More are not needed: so many slots are more than there may be granules.
const MOST_BITS: u32 = 32;

/// Slots of the old table that one operation moves. Two would do: a table is
/// half as big again when it has to grow.
const MOVED_AT_ONCE: usize = 8;

/// The slot of what is not in a table yet.
const WAITING: usize = usize::MAX;

/// Where the entry of a block was found; no longer true after any change.
#[derive(Clone, Copy, Debug)]
pub(super) struct Place {
    slot: usize,
    is_old: bool,
}

#[derive(Debug)]
pub(super) struct Starts {
    now: Table,
    /// The table before, until all is moved; else of no slots.
    old: Table,
    /// Slots of the old table below this one are moved.
    moved: usize,
    /// The last one that came: its start and id, or NONE. It goes to the table
    /// with the next one's coming. Its slot is most likely not in the cache, and
    /// is then fetched while the next one's hole is, not after that.
    waiting: (u32, Id),
    count: usize,
}

impl Starts {
    pub(super) fn new() -> Starts {
        Starts {
            now: Table::new(FEWEST_BITS),
            old: Table::none(),
            moved: 0,
            waiting: (0, NONE),
            count: 0,
        }
    }

    pub(super) fn count(&self) -> usize {
        self.count
    }

    /// Goes on with what is to be moved, if there is anything.
    #[inline(always)]
    pub(super) fn advance(&mut self, blocks: &Blocks) {
        if !self.old.slots.is_empty() {
            self.move_some(blocks);
        }
    }

    #[inline(always)]
    pub(super) fn find(&self, blocks: &Blocks, start: u32) -> Option<(Place, Id)> {
        if let Some((slot, id)) = self.now.find(blocks, start) {
            let is_old = false;
            return Some((Place { slot, is_old }, id));
        }
        self.find_elsewhere(blocks, start)
    }

    #[cold]
    #[inline(never)]
    fn find_elsewhere(&self, blocks: &Blocks, start: u32) -> Option<(Place, Id)> {
        let (waits_for, id) = self.waiting;
        if id != NONE && waits_for == start {
            let (slot, is_old) = (WAITING, false);
            return Some((Place { slot, is_old }, id));
        }
        if self.old.slots.is_empty() {
            return None;
        }
        let (slot, id) = self.old.find(blocks, start)?;
        let is_old = true;
        Some((Place { slot, is_old }, id))
    }

    /// Puts the one that waits into the table.
    #[inline]
    pub(super) fn make_way(&mut self, blocks: &Blocks) {
        self.advance(blocks);
        let (start, id) = self.waiting;
        if id == NONE {
            return;
        }
        self.waiting.1 = NONE;
        if self.count > self.now.slots.len() / 4 * 3 && self.now.bits < MOST_BITS {
            self.grow();
        }
        self.now.insert(start, id);
    }

    /// Adds a block that is not there yet, when way was made.
    pub(super) fn add(&mut self, start: u32, id: Id) {
        assert_eq!(self.waiting.1, NONE, "only one waits");
        self.waiting = (start, id);
        self.count += 1;
    }

    pub(super) fn remove(&mut self, blocks: &Blocks, place: Place, start: u32) {
        self.count -= 1;
        if place.slot == WAITING {
            self.waiting.1 = NONE;
        } else if place.is_old {
            self.old.slots[place.slot] = GONE;
        } else {
            self.now.remove(blocks, place.slot, start);
        }
    }

    pub(super) fn heap_bytes(&self) -> usize {
        (self.now.slots.capacity() + self.old.slots.capacity()) * size_of::<u32>()
    }

    /// Checks that exactly the given blocks are here and are found.
    ///
    /// # Panics
    /// If not.
    pub(super) fn check_invariants<'a>(
        &self,
        blocks: &Blocks,
        held: impl Iterator<Item = (Id, &'a Block)>,
    ) {
        let mut count = 0;
        for (id, block) in held {
            let found = self.find(blocks, block.start).map(|(_, id)| id);
            assert_eq!(found, Some(id), "the block at {} is found", block.start);
            count += 1;
        }
        assert_eq!(count, self.count, "all is counted");
        let entries = self.now.slots.iter().chain(&self.old.slots);
        let entries = entries.filter(|entry| **entry > GONE).count();
        let waiting = usize::from(self.waiting.1 != NONE);
        assert_eq!(entries + waiting, count, "each is here once");
        self.now.check_strays(blocks);
    }

    #[cold]
    #[inline(never)]
    fn grow(&mut self) {
        assert!(self.old.slots.is_empty(), "all was moved long before");
        let twice = Table::new(self.now.bits + 1);
        self.old = std::mem::replace(&mut self.now, twice);
        self.moved = 0;
    }

    #[cold]
    #[inline(never)]
    fn move_some(&mut self, blocks: &Blocks) {
        let end = (self.moved + MOVED_AT_ONCE).min(self.old.slots.len());
        for slot in self.moved..end {
            if let Some(id) = self.old.id(self.old.slots[slot]) {
                self.now.insert(blocks[id].start, id);
                // Probes go on past it. Empty slots stay empty, or probes for what
                // is nowhere would find no end.
                self.old.slots[slot] = GONE;
            }
        }
        self.moved = end;
        if end == self.old.slots.len() {
            self.old = Table::none();
        }
    }
}

/// 2^`bits` slots, each of a tag in the upper bits and an id, biased, in the
/// lower `bits` + 1. That is enough for ids: never more than three quarters of
/// the slots were used, ids are given from the lowest up, and a space has at
/// most one hole more than other blocks.
///
/// The tag begins with the lower bits of the entry's home, and goes on with the
/// bits of the hash below those.
#[derive(Debug)]
struct Table {
    bits: u32,
    tag_mask: u32,
    /// So many bits of its home are in an entry's tag.
    known_bits: u32,
    /// Entries so far from home that these bits do not tell how far.
    strays: usize,
    slots: Vec<u32>,
}

impl Table {
    fn new(bits: u32) -> Table {
        let known_bits = bits.min(8).min(31_u32.saturating_sub(bits));
        Table {
            bits,
            tag_mask: u32::MAX.checked_shl(bits + 1).unwrap_or(0),
            known_bits,
            strays: 0,
            slots: vec![EMPTY; 1 << bits],
        }
    }

    fn none() -> Table {
        Table {
            bits: 0,
            tag_mask: 0,
            known_bits: 0,
            strays: 0,
            slots: Vec::new(),
        }
    }

    #[inline(always)]
    fn find(&self, blocks: &Blocks, start: u32) -> Option<(usize, Id)> {
        let (mut slot, tag) = self.home_and_tag(start);
        loop {
            let entry = self.slots[slot];
            if entry & self.tag_mask == tag {
                // No block has the id that EMPTY and GONE would have.
                let id = (entry & !self.tag_mask).wrapping_sub(ID_BIAS);
                if blocks.get(id).is_some_and(|block| block.start == start) {
                    return Some((slot, id));
                }
            }
            if entry == EMPTY {
                return None;
            }
            slot = self.after(slot);
        }
    }

    fn insert(&mut self, start: u32, id: Id) {
        let (home, tag) = self.home_and_tag(start);
        let mut slot = home;
        while self.slots[slot] != EMPTY {
            slot = self.after(slot);
        }
        let entry = id + ID_BIAS;
        assert_eq!(entry & self.tag_mask, 0, "ids have room beside the tag");
        self.slots[slot] = tag | entry;
        self.strays += usize::from(self.is_stray(home, slot));
    }

    /// Takes out the entry of the block that starts at `start`.
    fn remove(&mut self, blocks: &Blocks, slot: usize, start: u32) {
        let (home, _) = self.home_and_tag(start);
        self.strays -= usize::from(self.is_stray(home, slot));
        let (mut gap, mut at) = (slot, slot);
        loop {
            at = self.after(at);
            let entry = self.slots[at];
            if entry == EMPTY {
                break;
            }
            // It may move to the gap unless its home lies behind that.
            let away = self.displacement(blocks, entry, at);
            if away >= self.distance(gap, at) {
                if self.strays > 0 {
                    let home = at.wrapping_sub(away) & (self.slots.len() - 1);
                    self.strays -= usize::from(self.is_stray(home, at));
                    self.strays += usize::from(self.is_stray(home, gap));
                }
                self.slots[gap] = entry;
                gap = at;
            }
        }
        self.slots[gap] = EMPTY;
    }

    /// How far from its home an entry stands. That takes no look at the block,
    /// which would most likely not be in the cache, unless there are strays.
    fn displacement(&self, blocks: &Blocks, entry: u32, at: usize) -> usize {
        if self.strays > 0 {
            let id = self.id(entry).expect("an entry of a block");
            let (home, _) = self.home_and_tag(blocks[id].start);
            return self.distance(home, at);
        }
        let home = u64::from(entry) >> (32 - self.known_bits);
        at.wrapping_sub(usize::try_from(home).expect("a few bits")) & (self.known() - 1)
    }

    fn is_stray(&self, home: usize, slot: usize) -> bool {
        self.distance(home, slot) >= self.known()
    }

    fn known(&self) -> usize {
        1 << self.known_bits
    }

    fn check_strays(&self, blocks: &Blocks) {
        let entries = self.slots.iter().enumerate();
        let entries = entries.filter_map(|(at, entry)| Some((at, self.id(*entry)?)));
        let homes = entries.map(|(at, id)| (self.home_and_tag(blocks[id].start).0, at));
        let strays = homes.filter(|(home, at)| self.is_stray(*home, *at));
        assert_eq!(strays.count(), self.strays, "strays are counted");
    }

    fn id(&self, entry: u32) -> Option<Id> {
        (entry & !self.tag_mask).checked_sub(ID_BIAS)
    }

    /// Fibonacci hashing (Knuth, 6.4): the upper bits of the product. Starts in
    /// a row are spread evenly.
    #[inline(always)]
    fn home_and_tag(&self, start: u32) -> (usize, u32) {
        let hash = start.wrapping_mul(0x9E37_79B9);
        let home = hash.wrapping_shr(32_u32.wrapping_sub(self.bits));
        let tag = hash.wrapping_shl(self.bits.wrapping_sub(self.known_bits)) & self.tag_mask;
        (home as usize, tag)
    }

    #[inline(always)]
    fn after(&self, slot: usize) -> usize {
        slot.wrapping_add(1) & self.slots.len().wrapping_sub(1)
    }

    fn distance(&self, from: usize, to: usize) -> usize {
        to.wrapping_sub(from) & (self.slots.len() - 1)
    }
}
