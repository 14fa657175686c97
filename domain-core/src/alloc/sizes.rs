//! Holes by length.
//!
//! Lists and a bit for every list that is not empty, as TLSF has them (Masmano
//! et al., "TLSF: a new dynamic memory allocator for real-time systems", 2004).
//! Short lengths have a list each, so that the shortest hole that fits is found
//! in a few instructions; longer ones share lists by eighths of a power of two.
//! In a shared list that reaches from below to above what is asked for, only a
//! few holes are looked at. Whether there is one further down in it may then be
//! unknown here.

use super::blocks::{Block, Blocks, Id, NONE};

/// Longest hole that shares its list with no other length.
const LONGEST_ALONE: u32 = 256;
/// Lists for each power of two above that, as a power of two.
const SHARE_SHIFT: u32 = 3;
const LISTS: usize = 256 + 24 * (1 << SHARE_SHIFT);
const WORDS: usize = LISTS / 64;

/// Holes that are looked at in a shared list.
const LOOKED_AT: usize = 32;

/// What there is for a length.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fit {
    /// This one is long enough.
    Hole(Id),
    /// None is.
    Nothing,
    /// Those looked at are not, and there are more.
    Unknown,
}

#[derive(Debug)]
pub(super) struct Sizes {
    /// The youngest hole of each list.
    heads: Box<[Id; LISTS]>,
    /// A bit for each list that is not empty, and one for each word that has any.
    words: [u64; WORDS],
    summary: u32,
}

impl Sizes {
    pub(super) fn new() -> Sizes {
        Sizes {
            heads: Box::new([NONE; LISTS]),
            words: [0; WORDS],
            summary: 0,
        }
    }

    /// A hole of `want` granules or few more: of those of one length the
    /// youngest, and up to 256 granules none is shorter that fits.
    #[inline]
    pub(super) fn best(&self, blocks: &Blocks, want: u32) -> Fit {
        if want > LONGEST_ALONE {
            return self.best_long(blocks, want);
        }
        let found = self.list_from((want - 1) as usize);
        found.map_or(Fit::Nothing, |list| Fit::Hole(self.heads[list]))
    }

    /// Length of the longest hole, 0 if there is none. `None` if too many would
    /// have to be looked at.
    pub(super) fn longest(&self, blocks: &Blocks, most_looks: usize) -> Option<u32> {
        let Some(word) = self.summary.checked_ilog2() else {
            return Some(0);
        };
        let list = word * 64 + self.words[word as usize].ilog2();
        if list < LONGEST_ALONE {
            return Some(list + 1);
        }
        let mut holes = self.in_list(blocks, list as usize);
        let longest = holes.by_ref().take(most_looks).map(|(_, len)| len).max();
        longest.filter(|_| holes.next().is_none())
    }

    pub(super) fn put(&mut self, blocks: &mut Blocks, id: Id) {
        let list = list_of(blocks[id].len);
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
        let back = blocks[id].back();
        if next != NONE {
            blocks[next].set_back(back);
        }
        if back != NONE {
            blocks[back].next = next;
            return;
        }
        let list = list_of(len);
        self.heads[list] = next;
        if next == NONE {
            self.words[list / 64] &= !(1 << (list % 64));
            if self.words[list / 64] == 0 {
                self.summary &= !(1 << (list / 64));
            }
        }
    }

    pub(super) fn heap_bytes(&self) -> usize {
        size_of_val(&*self.heads)
    }

    /// Checks that exactly the given number of holes are here, each in its list.
    ///
    /// # Panics
    /// If not.
    pub(super) fn check_invariants(&self, blocks: &Blocks, holes: usize) {
        let mut count = 0;
        for (list, head) in self.heads.iter().enumerate() {
            let has_bit = self.words[list / 64] & (1 << (list % 64)) != 0;
            assert_eq!(has_bit, *head != NONE, "list {list} has its bit");
            let mut back = NONE;
            for (id, len) in self.in_list(blocks, list) {
                assert!(blocks[id].is_hole(), "block {id} is a hole");
                assert_eq!(list_of(len), list, "hole {id} is in its list");
                assert_eq!(blocks[id].back(), back, "links go both ways");
                (back, count) = (id, count + 1);
            }
        }
        for (at, word) in self.words.iter().enumerate() {
            assert_eq!(self.summary & (1 << at) != 0, *word != 0, "the summary");
        }
        assert_eq!(count, holes, "every hole is in a list");
    }

    #[cold]
    fn best_long(&self, blocks: &Blocks, want: u32) -> Fit {
        let list = list_of(want);
        let mut holes = self.in_list(blocks, list);
        let fit = holes.by_ref().take(LOOKED_AT).find(|(_, len)| *len >= want);
        match (fit, self.list_from(list + 1)) {
            (Some((id, _)), _) => Fit::Hole(id),
            (None, Some(list)) => Fit::Hole(self.heads[list]),
            (None, None) if holes.next().is_some() => Fit::Unknown,
            (None, None) => Fit::Nothing,
        }
    }

    /// The first list from that one on that is not empty.
    fn list_from(&self, list: usize) -> Option<usize> {
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

    /// Id and length of each hole in a list.
    fn in_list<'a>(&self, blocks: &'a Blocks, list: usize) -> impl Iterator<Item = (Id, u32)> + 'a {
        let known = |id: Id| Some((id, blocks.get(id)?.len));
        std::iter::successors(known(self.heads[list]), move |(id, _)| {
            known(blocks[*id].next)
        })
    }
}

fn list_of(len: u32) -> usize {
    if len <= LONGEST_ALONE {
        return (len - 1) as usize;
    }
    let power = len.ilog2();
    let share = (len >> (power - SHARE_SHIFT)) & ((1 << SHARE_SHIFT) - 1);
    let list = LONGEST_ALONE + ((power - 8) << SHARE_SHIFT) + share;
    list as usize
}
