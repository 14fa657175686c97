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

use super::blocks::{Block, Blocks, Id};

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
    count: usize,
}

impl Starts {
    pub(super) fn new() -> Starts {
        Starts {
            now: Table::new(FEWEST_BITS),
            old: Table::none(),
            moved: 0,
            count: 0,
        }
    }

    /// Goes on with what is to be moved, if there is anything.
    #[inline]
    pub(super) fn advance(&mut self, blocks: &Blocks) {
        if !self.old.slots.is_empty() {
            self.move_some(blocks);
        }
    }

    #[inline]
    pub(super) fn find(&self, blocks: &Blocks, start: u32) -> Option<(Place, Id)> {
        let found = self.now.find(blocks, start);
        if let Some((slot, id)) = found {
            let is_old = false;
            return Some((Place { slot, is_old }, id));
        }
        if self.old.slots.is_empty() {
            return None;
        }
        let (slot, id) = self.old.find(blocks, start)?;
        let is_old = true;
        Some((Place { slot, is_old }, id))
    }

    /// The block must not be there yet.
    pub(super) fn insert(&mut self, blocks: &Blocks, id: Id) {
        self.advance(blocks);
        self.count += 1;
        if self.count > self.now.slots.len() / 4 * 3 && self.now.bits < MOST_BITS {
            self.grow();
        }
        self.now.insert(blocks[id].start, id);
    }

    pub(super) fn remove(&mut self, blocks: &Blocks, place: Place) {
        self.count -= 1;
        if place.is_old {
            self.old.slots[place.slot] = GONE;
        } else {
            self.now.remove(blocks, place.slot);
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
        assert_eq!(entries, count, "each is here once");
    }

    #[cold]
    fn grow(&mut self) {
        assert!(self.old.slots.is_empty(), "all was moved long before");
        let twice = Table::new(self.now.bits + 1);
        self.old = std::mem::replace(&mut self.now, twice);
        self.moved = 0;
    }

    #[cold]
    fn move_some(&mut self, blocks: &Blocks) {
        let end = (self.moved + MOVED_AT_ONCE).min(self.old.slots.len());
        for slot in self.moved..end {
            if let Some(id) = self.old.id(self.old.slots[slot]) {
                self.now.insert(blocks[id].start, id);
            }
            // What probes go past must not become empty.
            self.old.slots[slot] = GONE;
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
#[derive(Debug)]
struct Table {
    bits: u32,
    tag_mask: u32,
    slots: Vec<u32>,
}

impl Table {
    fn new(bits: u32) -> Table {
        Table {
            bits,
            tag_mask: u32::MAX.checked_shl(bits + 1).unwrap_or(0),
            slots: vec![EMPTY; 1 << bits],
        }
    }

    fn none() -> Table {
        Table {
            bits: 0,
            tag_mask: 0,
            slots: Vec::new(),
        }
    }

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
        let (mut slot, tag) = self.home_and_tag(start);
        while self.slots[slot] != EMPTY {
            slot = self.after(slot);
        }
        self.slots[slot] = tag | (id + ID_BIAS);
    }

    fn remove(&mut self, blocks: &Blocks, slot: usize) {
        let (mut gap, mut at) = (slot, slot);
        loop {
            at = self.after(at);
            let entry = self.slots[at];
            let Some(id) = self.id(entry) else {
                break;
            };
            let (home, _) = self.home_and_tag(blocks[id].start);
            // It may move to the gap unless its home lies behind that.
            if self.distance(home, at) >= self.distance(gap, at) {
                self.slots[gap] = entry;
                gap = at;
            }
        }
        self.slots[gap] = EMPTY;
    }

    fn id(&self, entry: u32) -> Option<Id> {
        (entry & !self.tag_mask).checked_sub(ID_BIAS)
    }

    /// Fibonacci hashing (Knuth, 6.4): the upper bits of the product. Starts in
    /// a row are spread evenly.
    fn home_and_tag(&self, start: u32) -> (usize, u32) {
        let hash = start.wrapping_mul(0x9E37_79B9);
        let home = hash.wrapping_shr(32 - self.bits);
        // Of 32 bits the mask leaves nothing.
        (home as usize, hash.wrapping_shl(self.bits) & self.tag_mask)
    }

    fn after(&self, slot: usize) -> usize {
        (slot + 1) & (self.slots.len() - 1)
    }

    fn distance(&self, from: usize, to: usize) -> usize {
        to.wrapping_sub(from) & (self.slots.len() - 1)
    }
}
