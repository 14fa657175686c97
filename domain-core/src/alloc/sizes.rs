//! Holes by length.
//!
//! A list for every short length and a bit for every list that is not empty, as
//! TLSF has them (Masmano et al., "TLSF: a new dynamic memory allocator for
//! real-time systems", 2004), but exact: the shortest hole that fits is found in
//! a few instructions. Longer holes are few, because each takes up so much of
//! the space, and stand in an ordered set.

use std::collections::BTreeSet;

use super::blocks::{Block, Blocks, Id, NONE};

/// Longest hole that has a list.
const LONGEST_LISTED: u32 = 512;
const LISTS: usize = LONGEST_LISTED as usize;
const WORDS: usize = LISTS / 64;

#[derive(Debug)]
pub(super) struct Sizes {
    /// The youngest hole of each length from 1 on.
    heads: Box<[Id; LISTS]>,
    /// A bit for each list that is not empty, and one for each word that has any.
    words: [u64; WORDS],
    summary: u32,
    /// Length and id, the length in the upper half.
    long: BTreeSet<u64>,
}

impl Sizes {
    pub(super) fn new() -> Sizes {
        Sizes {
            heads: Box::new([NONE; LISTS]),
            words: [0; WORDS],
            summary: 0,
            long: BTreeSet::new(),
        }
    }

    /// The youngest of the shortest holes of `want` granules or more.
    pub(super) fn best(&self, want: u32) -> Option<Id> {
        if let Some(list) = self.list_from(want) {
            return Some(self.heads[list]);
        }
        let from = u64::from(want) << 32;
        self.long.range(from..).next().copied().map(id_of)
    }

    /// Length of the longest hole; 0 if there is none.
    pub(super) fn longest(&self) -> u32 {
        if let Some(key) = self.long.last() {
            return len_of(*key);
        }
        let Some(word) = self.summary.checked_ilog2() else {
            return 0;
        };
        let bit = self.words[word as usize].ilog2();
        word * 64 + bit + 1
    }

    pub(super) fn put(&mut self, blocks: &mut Blocks, id: Id) {
        let len = blocks[id].len;
        if len > LONGEST_LISTED {
            blocks[id].make_hole(NONE, NONE);
            self.long.insert(key(len, id));
            return;
        }
        let list = (len - 1) as usize;
        let head = std::mem::replace(&mut self.heads[list], id);
        blocks[id].make_hole(NONE, head);
        if head == NONE {
            self.words[list / 64] |= 1 << (list % 64);
            self.summary |= 1 << (list / 64);
        } else {
            blocks[head].set_back(id);
        }
    }

    pub(super) fn remove(&mut self, blocks: &mut Blocks, id: Id) {
        let Block { len, next, .. } = blocks[id];
        if len > LONGEST_LISTED {
            self.long.remove(&key(len, id));
            return;
        }
        let back = blocks[id].back();
        if next != NONE {
            blocks[next].set_back(back);
        }
        if back != NONE {
            blocks[back].next = next;
            return;
        }
        let list = (len - 1) as usize;
        self.heads[list] = next;
        if next == NONE {
            self.words[list / 64] &= !(1 << (list % 64));
            if self.words[list / 64] == 0 {
                self.summary &= !(1 << (list / 64));
            }
        }
    }

    /// Bytes of memory held beside the value itself; those of the set estimated
    /// from how full its nodes are on average.
    pub(super) fn heap_bytes(&self) -> usize {
        size_of_val(&*self.heads) + self.long.len() * 12
    }

    /// Checks that exactly the given holes are here, each in its list.
    ///
    /// # Panics
    /// If not.
    pub(super) fn check_invariants<'a>(
        &self,
        blocks: &Blocks,
        holes: impl Iterator<Item = (Id, &'a Block)>,
    ) {
        let mut count = 0;
        for (list, head) in self.heads.iter().enumerate() {
            let has_bit = self.words[list / 64] & (1 << (list % 64)) != 0;
            assert_eq!(has_bit, *head != NONE, "list {list} has its bit");
            let (mut back, mut id) = (NONE, *head);
            while id != NONE {
                let hole = &blocks[id];
                assert!(hole.is_hole(), "block {id} is a hole");
                assert_eq!(hole.len as usize, list + 1, "hole {id} is in its list");
                assert_eq!(hole.back(), back, "links go both ways");
                (back, id, count) = (id, hole.next, count + 1);
            }
        }
        for (at, word) in self.words.iter().enumerate() {
            assert_eq!(self.summary & (1 << at) != 0, *word != 0, "the summary");
        }
        let mut expected = 0;
        for (id, hole) in holes {
            let is_long = self.long.contains(&key(hole.len, id));
            assert_eq!(is_long, hole.len > LONGEST_LISTED, "hole {id} is known");
            expected += 1;
        }
        assert_eq!(count + self.long.len(), expected, "every hole is known");
    }

    /// The list of the shortest listed holes that fit.
    fn list_from(&self, want: u32) -> Option<usize> {
        let list = (want - 1) as usize;
        let word = list / 64;
        let here = self.words.get(word)? & (u64::MAX << (list % 64));
        if here != 0 {
            return Some(word * 64 + here.trailing_zeros() as usize);
        }
        let above = self.summary & (u32::MAX << word << 1);
        if above == 0 {
            return None;
        }
        let word = above.trailing_zeros() as usize;
        Some(word * 64 + self.words[word].trailing_zeros() as usize)
    }
}

fn key(len: u32, id: Id) -> u64 {
    (u64::from(len) << 32) | u64::from(id)
}

fn len_of(key: u64) -> u32 {
    u32::try_from(key >> 32).expect("the upper half")
}

fn id_of(key: u64) -> Id {
    Id::try_from(key & u64::from(u32::MAX)).expect("the lower half")
}
