//! The page table word by word: what the service writes and any reader, in this process or another,
//! understands.
//!
//! The table is an array of 64-bit words in native byte order. The first page is the header; every
//! further page is one *node* of 512 words, named by its place in the array. A word of a node is
//!
//! | bits | empty | leaf | pointer |
//! |---|---|---|---|
//! | 0..2 | 0 | perm: 1 read, 2 write, 3 both | 0 |
//! | 2 | 0 | 0 | 1 |
//! | 3..23 | 0 | region | from bit 9 on: node |
//! | 23..64 | 0 | offset in that region, in granules | |
//!
//! A leaf stands for as many granules as its place in the tree covers: one in a node of height 1,
//! 512 in a node of height 2, and so on. It covers whole granules; exact ends are not in the table.
//!
//! A root is a word too, so that one store replaces a whole tree whatever its height:
//!
//! | bits | |
//! |---|---|
//! | 0..3 | height of the root node; 0: the tree is empty |
//! | 3..21 | root node |
//! | 21..64 | prefix: what granule numbers below it have above their lowest `9 * height` bits |
//!
//! So a tree that maps only a few MiB is one node high wherever they lie in the 64-bit space.

use super::entry::RegionId;
use super::span::Span;
use crate::perm::Perm;

/// Binary logarithm of the words of a node. Tiny under loom, whose every word is a model.
pub(super) const NODE_BITS: u32 = if cfg!(loom) { 2 } else { 9 };
/// Words of a node.
pub(super) const NODE_WORDS: usize = 1 << NODE_BITS;
/// Bytes of a node: a page.
pub(super) const NODE_BYTES: u64 = 8 << NODE_BITS;
/// The lowest number of a node: what lies below is the header.
pub(super) const FIRST_NODE: u32 = if cfg!(loom) { 8 } else { 1 };
/// One more than the largest number of a node.
pub(super) const NODES_MOST: usize = 1 << 18;

/// Which word of the header is what. Words that change often, or that other readers want, have
/// cache lines of their own: streaming traffic does not slow down readers of direct mappings.
pub(super) mod header {
    /// [`MAGIC`](super::MAGIC).
    pub(in super::super) const MAGIC: usize = 0;
    /// Binary logarithm of the granule.
    pub(in super::super) const GRANULE_SHIFT: usize = 1;
    /// First address of the apertures.
    pub(in super::super) const APERTURES_START: usize = 2;
    /// Length of the apertures in bytes; 0: none.
    pub(in super::super) const APERTURES_BYTES: usize = 3;
    /// Number of the table's state.
    pub(in super::super) const GENERATION: usize = 8;
    /// Root of the tree for addresses inside the apertures.
    pub(in super::super) const APERTURES_ROOT: usize = 16;
    /// Root of the tree for all others.
    pub(in super::super) const DIRECT_ROOT: usize = 24;
}

/// Stands first in a table, and is stored last when one is made. The last byte is the version of
/// this format.
pub(super) const MAGIC: u64 = u64::from_be_bytes(*b"iotlbpt\x01");

const PERM: u64 = 0b11;
const POINTER: u64 = 0b100;
/// The node's number times the words of a node: a reader masks and need not shift.
const POINTER_SHIFT: u32 = 9;
const REGION_SHIFT: u32 = 3;
const OFFSET_SHIFT: u32 = 23;
/// What a leaf can say about an offset: less than so many granules.
pub(super) const OFFSET_GRANULES: u64 = 1 << (64 - OFFSET_SHIFT);

const HEIGHT: u64 = 0b111;
const ROOT_NODE_SHIFT: u32 = 3;
const ROOT_NODE: u64 = NODES_MOST as u64 - 1;
const PREFIX_SHIFT: u32 = 21;

/// A word of a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Word(u64);

/// What a word of a node says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Slot {
    Empty,
    Leaf(Leaf),
    Node(u32),
}

/// Where the first granule under a leaf leads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Leaf {
    pub(super) region: RegionId,
    /// Below [`OFFSET_GRANULES`].
    pub(super) offset_granules: u64,
    pub(super) perm: Perm,
}

impl Word {
    pub(super) const EMPTY: Word = Word(0);

    pub(super) const fn from_bits(bits: u64) -> Word {
        Word(bits)
    }

    pub(super) const fn bits(self) -> u64 {
        self.0
    }

    pub(super) const fn leaf(leaf: Leaf) -> Word {
        let perm = match leaf.perm {
            Perm::Read => 1,
            Perm::Write => 2,
            Perm::ReadWrite => 3,
        };
        let region = (leaf.region.get() as u64) << REGION_SHIFT;
        Word(leaf.offset_granules << OFFSET_SHIFT | region | perm)
    }

    pub(super) const fn pointer(node: u32) -> Word {
        Word((node as u64) << POINTER_SHIFT | POINTER)
    }

    pub(super) const fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// The leaf, if it is one.
    #[inline]
    pub(super) const fn as_leaf(self) -> Option<Leaf> {
        if self.0 & PERM == 0 {
            return None;
        }
        // A table and no branches, which random permissions would mislead.
        const PERMS: [Perm; 4] = [Perm::Read, Perm::Read, Perm::Write, Perm::ReadWrite];
        Some(Leaf {
            region: RegionId::from_low_bits(self.0 >> REGION_SHIFT),
            offset_granules: self.0 >> OFFSET_SHIFT,
            perm: PERMS[host_size(self.0 & PERM)],
        })
    }

    /// The place in the table of the node's first word, if it is a pointer and no leaf.
    #[inline]
    pub(super) const fn as_place(self) -> Option<usize> {
        if self.0 & POINTER == 0 {
            return None;
        }
        Some(host_size(self.0 >> POINTER_SHIFT) << NODE_BITS)
    }

    /// The node, if it is a pointer and no leaf.
    #[allow(clippy::cast_possible_truncation)] // node numbers have 18 bits
    pub(super) const fn as_pointer(self) -> Option<u32> {
        if self.0 & POINTER == 0 || self.0 & PERM != 0 {
            return None;
        }
        Some((self.0 >> POINTER_SHIFT) as u32)
    }

    pub(super) const fn slot(self) -> Slot {
        match (self.as_leaf(), self.as_pointer()) {
            (Some(leaf), _) => Slot::Leaf(leaf),
            (None, Some(node)) => Slot::Node(node),
            (None, None) => Slot::Empty,
        }
    }
}

/// The top of a tree that is not empty.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Root {
    pub(super) node: u32,
    /// 1 for a node whose words stand for one granule each.
    pub(super) height: u32,
    pub(super) prefix: u64,
}

impl Root {
    /// `None` for an empty tree.
    #[inline]
    #[allow(clippy::cast_possible_truncation)] // masked to 18 and 3 bits
    pub(super) const fn from_bits(bits: u64) -> Option<Root> {
        let height = (bits & HEIGHT) as u32;
        if height == 0 {
            return None;
        }
        Some(Root {
            node: (bits >> ROOT_NODE_SHIFT & ROOT_NODE) as u32,
            height,
            prefix: bits >> PREFIX_SHIFT,
        })
    }

    pub(super) const fn bits(root: Option<Root>) -> u64 {
        match root {
            None => 0,
            Some(Root {
                node,
                height,
                prefix,
            }) => prefix << PREFIX_SHIFT | (node as u64) << ROOT_NODE_SHIFT | height as u64,
        }
    }

    /// Binary logarithm of the granules below it.
    #[inline]
    pub(super) const fn shift(self) -> u32 {
        self.height * NODE_BITS
    }

    /// Does the granule of this number lie below it?
    #[inline]
    pub(super) const fn covers(self, granule: u64) -> bool {
        granule >> self.shift() == self.prefix
    }

    /// Does all of a span lie below it?
    pub(super) const fn covers_all(self, span: Span) -> bool {
        self.covers(span.first) && self.covers(span.last)
    }
}

/// Where in the table a node begins.
#[inline]
pub(super) const fn place(node: u32) -> usize {
    node as usize * NODE_WORDS
}

/// Which word of its node a slot is, if slots are numbered through from address 0.
#[inline]
pub(super) const fn slot_index(slot: u64) -> usize {
    host_size(slot) & (NODE_WORDS - 1)
}

/// Lossless: shared memory is for 64-bit targets only.
#[inline]
#[allow(clippy::cast_possible_truncation)]
const fn host_size(bits: u64) -> usize {
    bits as usize
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_leaf_comes_back_from_its_word_and_is_no_pointer() {
        for perm in [Perm::Read, Perm::Write, Perm::ReadWrite] {
            for region in [0, 1, RegionId::MOST] {
                for offset_granules in [0, 1, OFFSET_GRANULES - 1] {
                    let region = RegionId::from_number(region).unwrap();
                    let leaf = Leaf {
                        region,
                        offset_granules,
                        perm,
                    };
                    assert_eq!(Word::leaf(leaf).slot(), Slot::Leaf(leaf));
                }
            }
        }
        assert_eq!(Word::EMPTY.slot(), Slot::Empty);
    }

    #[test]
    fn a_pointer_and_a_root_hold_every_node_height_and_prefix() {
        for node in [1, 77, u32::try_from(NODES_MOST).unwrap() - 1] {
            assert_eq!(Word::pointer(node).slot(), Slot::Node(node));
            // Above 9 bits of 52, the prefix has 43; above 54, none.
            for (height, prefix) in [(1, (1 << 43) - 1), (2, 1 << 33), (6, 0)] {
                let root = Some(Root {
                    node,
                    height,
                    prefix,
                });
                assert_eq!(Root::from_bits(Root::bits(root)), root);
            }
        }
        assert_eq!(Root::from_bits(Root::bits(None)), None);
    }
}
