//! Short blocks that were just freed, one stack for each length.
//!
//! Bonwick and Adams ("Magazines and Vmem") put a bounded stack of free objects
//! before the allocator that works for them. What was freed last is given next:
//! its page table entries and its bytes are still in the caches, and of the
//! allocator nothing is touched but the block itself, which also holds the link
//! of the stack it is in.

use super::blocks::{Block, Blocks, Id, NONE};

/// Stacks of blocks, by length.
#[derive(Debug)]
pub(super) struct Magazines {
    stacks: [Stack; STACKS],
}

#[derive(Clone, Copy, Debug)]
struct Stack {
    top: Id,
    /// How many more it may hold.
    room: u32,
}

impl Magazines {
    pub(super) fn new() -> Magazines {
        let stack = |room: u32| Stack { top: NONE, room };
        Magazines {
            stacks: MOST.map(stack),
        }
    }

    pub(super) fn count(&self) -> usize {
        let held = MOST.iter().zip(&self.stacks);
        held.map(|(most, stack)| (most - stack.room) as usize).sum()
    }

    /// Makes a live block a cached one. `false` if there is no place for it.
    #[inline(always)]
    pub(super) fn put(&mut self, block: &mut Block, id: Id) -> bool {
        let Some(slot) = slot(block.len) else {
            return false;
        };
        let stack = &mut self.stacks[slot];
        if stack.room == 0 {
            return false;
        }
        block.make_cached(stack.top);
        stack.top = id;
        stack.room = stack.room.wrapping_sub(1);
        true
    }

    /// Makes the youngest block of that length live, if it will do, and says
    /// where it starts. Older ones are not looked at.
    #[inline(always)]
    pub(super) fn get(
        &mut self,
        blocks: &mut Blocks,
        len: u32,
        will_do: impl Fn(u32) -> bool,
    ) -> Option<u32> {
        let stack = &mut self.stacks[slot(len)?];
        // Nothing stands at the place NONE.
        let block = blocks.get_mut(stack.top)?;
        if !will_do(block.start) {
            return None;
        }
        stack.top = block.next;
        stack.room = stack.room.wrapping_add(1);
        block.make_live();
        Some(block.start)
    }

    /// Takes out any one of them. It stays marked as cached.
    pub(super) fn pop_any(&mut self, blocks: &Blocks) -> Option<Id> {
        let stack = self.stacks.iter_mut().find(|stack| stack.top != NONE)?;
        let id = stack.top;
        stack.top = blocks[id].next;
        stack.room = stack.room.wrapping_add(1);
        Some(id)
    }

    /// Everything, in no order.
    pub(super) fn iter<'a>(&'a self, blocks: &'a Blocks) -> impl Iterator<Item = Id> {
        let known = |id: Id| (id != NONE).then_some(id);
        self.stacks.iter().flat_map(move |stack| {
            std::iter::successors(known(stack.top), move |id| known(blocks[*id].next))
        })
    }

    /// Checks that exactly the cached blocks are here, each in its stack.
    ///
    /// # Panics
    /// If not.
    pub(super) fn check_invariants(&self, blocks: &Blocks) {
        for id in self.iter(blocks) {
            assert!(blocks[id].is_cached(), "block {id} is cached");
        }
        let held = self.iter(blocks).count();
        let cached = blocks.iter().filter(|(_, block)| block.is_cached()).count();
        assert_eq!(held, cached, "every cached block is in a stack");
        assert_eq!(held, self.count(), "cached blocks are counted");
    }
}

const STACKS: usize = 20;

/// Blocks that each stack may hold, by length: 1 to 16 granules, and the powers
/// of two that most large buffers have. 256 granules of each length, the burst of
/// a deep queue, and never fewer than 16 blocks. Together 925, and not more,
/// because all have to be given back before anything is refused.
const MOST: [u32; STACKS] = [
    256, 128, 85, 64, 51, 42, 36, 32, 28, 25, 23, 21, 19, 18, 17, 16, 16, 16, 16, 16,
];

#[inline(always)]
fn slot(len: u32) -> Option<usize> {
    if len <= 16 {
        return Some(len.wrapping_sub(1) as usize);
    }
    long_slot(len)
}

fn long_slot(len: u32) -> Option<usize> {
    match len {
        32 => Some(16),
        64 => Some(17),
        128 => Some(18),
        256 => Some(19),
        _ => None,
    }
}
