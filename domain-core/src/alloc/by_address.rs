//! What is found by address, for those who ask for that.
//!
//! Plain requests and frees never do, so nothing here is built before the first
//! request that lists by length cannot answer: a limit or an alignment that the
//! hole they offer does not meet, or a given range. That looks at every block
//! once; from then on every change is told.

use std::collections::BTreeMap;

use super::blocks::{Blocks, Id};
use super::holes::Holes;

#[derive(Debug, Default)]
pub(super) struct ByAddress {
    /// Every block by its start.
    blocks: Option<BTreeMap<u32, Id>>,
    /// Every hole, in granules of the whole address space, because alignments
    /// are measured there.
    holes: Option<Holes>,
}

impl ByAddress {
    /// The block that a granule belongs to.
    pub(super) fn covering(&mut self, blocks: &Blocks, granule: u32) -> Id {
        let all = self.blocks.get_or_insert_with(|| {
            let all = blocks.iter();
            all.map(|(id, block)| (block.start, id)).collect()
        });
        let found = all.range(..=granule).next_back();
        *found.expect("every granule is in a block").1
    }

    /// The holes; `origin` is where the space begins.
    pub(super) fn holes(&mut self, blocks: &Blocks, origin: u64) -> &mut Holes {
        self.holes.get_or_insert_with(|| {
            let holes = blocks.iter().filter(|(_, block)| block.is_hole());
            let runs = holes.map(|(_, hole)| (origin + u64::from(hole.start), u64::from(hole.len)));
            Holes::from_sorted(runs)
        })
    }

    /// Length of the longest hole, if anybody ever asked for holes.
    pub(super) fn longest(&self) -> Option<u64> {
        self.holes.as_ref().map(Holes::largest)
    }

    /// A block begins.
    #[inline]
    pub(super) fn begin(&mut self, start: u32, id: Id) {
        if let Some(all) = &mut self.blocks {
            all.insert(start, id);
        }
    }

    /// A block is no more.
    #[inline]
    pub(super) fn end(&mut self, start: u32) {
        if let Some(all) = &mut self.blocks {
            all.remove(&start);
        }
    }

    /// The holes, to be told of a change, if anybody ever asked for them.
    #[inline]
    pub(super) fn known_holes(&mut self) -> Option<&mut Holes> {
        self.holes.as_mut()
    }

    /// Bytes of memory held beside the value itself; those of the map estimated
    /// from how full its nodes are on average.
    pub(super) fn heap_bytes(&self) -> usize {
        let blocks = self.blocks.as_ref().map_or(0, BTreeMap::len);
        blocks * 14 + self.holes.as_ref().map_or(0, Holes::heap_bytes)
    }

    /// Checks that what was built agrees with the blocks.
    ///
    /// # Panics
    /// If not.
    pub(super) fn check_invariants(&self, blocks: &Blocks, origin: u64) {
        if let Some(all) = &self.blocks {
            let expected = blocks.iter().map(|(id, block)| (block.start, id));
            assert!(all.iter().map(|(start, id)| (*start, *id)).eq(expected));
        }
        if let Some(holes) = &self.holes {
            holes.check_invariants();
            let expected = blocks.iter().filter(|(_, block)| block.is_hole());
            let expected =
                expected.map(|(_, hole)| (origin + u64::from(hole.start), u64::from(hole.len)));
            assert!(holes.iter().eq(expected), "holes by address");
        }
    }
}
