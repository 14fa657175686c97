//! All granules of a space as blocks, in order of address.
//!
//! Knuth's boundary tags (The Art of Computer Programming, 2.5): each block
//! knows the one before and the one after it, so that a freed block finds the
//! holes it touches without a search. The tags stand in a table beside the
//! space, because the space itself is the devices'.

use std::ops::{Index, IndexMut};

/// A block's place in the table.
pub(super) type Id = u32;

/// No block.
pub(super) const NONE: Id = u32::MAX - 3;
/// What stands in `back` of blocks that are not holes.
const SPARE: u32 = u32::MAX - 2;
const CACHED: u32 = u32::MAX - 1;
const LIVE: u32 = u32::MAX;

/// So many granules have room for every block, even of one granule each.
pub(super) const MOST_GRANULES: u32 = NONE;

/// The block that starts with the first granule, always.
pub(super) const FIRST: Id = 0;

#[derive(Clone, Copy, Debug)]
pub(super) struct Block {
    /// First granule, counted from the first of the space.
    pub(super) start: u32,
    /// Never 0.
    pub(super) len: u32,
    /// Neighbours by address.
    pub(super) before: Id,
    pub(super) after: Id,
    /// The next one in whatever list it is in.
    pub(super) next: Id,
    /// Of a hole the one before it in its list, of others what they are.
    back: u32,
}

impl Block {
    pub(super) fn end(&self) -> u32 {
        self.start + self.len
    }

    pub(super) fn is_live(&self) -> bool {
        self.back == LIVE
    }

    pub(super) fn is_cached(&self) -> bool {
        self.back == CACHED
    }

    pub(super) fn is_hole(&self) -> bool {
        self.back <= NONE
    }

    pub(super) fn make_live(&mut self) {
        self.back = LIVE;
    }

    /// Waits in a magazine, on top of `next`.
    pub(super) fn make_cached(&mut self, next: Id) {
        (self.back, self.next) = (CACHED, next);
    }

    /// A hole between two others in a list.
    pub(super) fn make_hole(&mut self, back: Id, next: Id) {
        (self.back, self.next) = (back, next);
    }

    /// The hole before it in its list.
    pub(super) fn back(&self) -> Id {
        self.back
    }

    pub(super) fn set_back(&mut self, back: Id) {
        self.back = back;
    }
}

/// Every granule is in exactly one block.
#[derive(Debug)]
pub(super) struct Blocks {
    all: Vec<Block>,
    /// Places that are not in use, linked by `next`.
    spare: Id,
}

impl Blocks {
    /// One hole, in no list yet.
    pub(super) fn new(granules: u32) -> Blocks {
        let whole = Block {
            start: 0,
            len: granules,
            before: NONE,
            after: NONE,
            next: NONE,
            back: NONE,
        };
        Blocks {
            all: vec![whole],
            spare: NONE,
        }
    }

    #[inline(always)]
    pub(super) fn get(&self, id: Id) -> Option<&Block> {
        self.all.get(id as usize)
    }

    #[inline(always)]
    pub(super) fn get_mut(&mut self, id: Id) -> Option<&mut Block> {
        self.all.get_mut(id as usize)
    }

    /// The block's neighbour, if it is a hole.
    pub(super) fn hole(&self, id: Id) -> Option<Id> {
        self.get(id).is_some_and(Block::is_hole).then_some(id)
    }

    /// Leaves a block its first `len` granules. The rest is a new hole after it,
    /// in no list yet.
    pub(super) fn split(&mut self, id: Id, len: u32) -> Id {
        let block = &mut self[id];
        let rest = Block {
            start: block.start + len,
            len: block.len - len,
            before: id,
            after: block.after,
            next: NONE,
            back: NONE,
        };
        block.len = len;
        let new = self.settle(rest);
        self[id].after = new;
        if rest.after != NONE {
            self[rest.after].before = new;
        }
        new
    }

    /// Lets a block take in the one after it.
    pub(super) fn absorb_next(&mut self, id: Id) {
        let gone = self[id].after;
        let Block { len, after, .. } = self[gone];
        self[id].len += len;
        self[id].after = after;
        if after != NONE {
            self[after].before = id;
        }
        let spare = self.spare;
        self[gone].make_hole(SPARE, spare);
        self.spare = gone;
    }

    /// All blocks in order of address.
    pub(super) fn iter(&self) -> impl Iterator<Item = (Id, &Block)> {
        let first = Some((FIRST, &self[FIRST]));
        std::iter::successors(first, |(_, block)| {
            Some((block.after, self.get(block.after)?))
        })
    }

    pub(super) fn heap_bytes(&self) -> usize {
        self.all.capacity() * size_of::<Block>()
    }

    /// Checks that blocks make the whole without gap or overlap, that links go
    /// both ways, and that every place is used or spare.
    ///
    /// # Panics
    /// If not.
    pub(super) fn check_invariants(&self, granules: u32) {
        let (mut before, mut end, mut used) = (NONE, 0, 0);
        for (id, block) in self.iter() {
            assert_eq!(block.before, before, "block {id} knows its neighbour");
            assert_eq!(block.start, end, "blocks neither overlap nor leave gaps");
            assert!(block.len > 0, "no block is empty");
            assert_ne!(block.back, SPARE, "block {id} is in use");
            (before, end, used) = (id, block.end(), used + 1);
        }
        assert_eq!(end, granules, "blocks make the whole");
        let next_spare = |block: &Block| self.get(block.next);
        let spare = std::iter::successors(self.get(self.spare), |block| next_spare(block));
        let spare = spare.filter(|block| block.back == SPARE).count();
        assert_eq!(used + spare, self.all.len(), "every place is used or spare");
    }

    fn settle(&mut self, block: Block) -> Id {
        if self.spare != NONE {
            let id = self.spare;
            self.spare = self[id].next;
            self[id] = block;
            return id;
        }
        self.add(block)
    }

    #[cold]
    fn add(&mut self, block: Block) -> Id {
        let id = Id::try_from(self.all.len()).expect("no more blocks than granules");
        if self.all.len() == self.all.capacity() {
            // By an eighth, not twofold: most of a space's memory is here.
            self.all.reserve_exact(self.all.len() / 8 + 8);
        }
        self.all.push(block);
        id
    }
}

impl Index<Id> for Blocks {
    type Output = Block;

    fn index(&self, id: Id) -> &Block {
        &self.all[id as usize]
    }
}

impl IndexMut<Id> for Blocks {
    fn index_mut(&mut self, id: Id) -> &mut Block {
        &mut self.all[id as usize]
    }
}
