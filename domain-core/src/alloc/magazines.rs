//! Short runs that were just freed, one stack for each length.
//!
//! Bonwick and Adams ("Magazines and Vmem") put a bounded stack of free objects
//! before the allocator that works for them. What was freed last is given next:
//! its marks, its page table entries and its bytes are still in the caches, and
//! the tree of holes is not touched at all.

/// Granules of the longest run that is kept; what is longer costs more to copy
/// than to find.
const LONGEST: usize = 16;

/// Runs kept of each length. Enough for bursts of a queue's depth, few enough
/// that giving all of them back takes microseconds.
const MOST: usize = 64;

/// Stacks of starts, by length.
#[derive(Debug)]
pub(super) struct Magazines {
    stacks: [Vec<u64>; LONGEST],
    runs: usize,
}

impl Magazines {
    pub(super) fn new() -> Magazines {
        Magazines {
            stacks: std::array::from_fn(|_| Vec::new()),
            runs: 0,
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.runs == 0
    }

    /// `false` if there is no place for it.
    pub(super) fn put(&mut self, start: u64, len: u64) -> bool {
        let Some(stack) = slot(len).map(|slot| &mut self.stacks[slot]) else {
            return false;
        };
        if stack.len() == MOST {
            return false;
        }
        stack.push(start);
        self.runs += 1;
        true
    }

    /// The youngest run of that length, if it will do. Older ones are not
    /// looked at.
    pub(super) fn get(&mut self, len: u64, will_do: impl Fn(u64) -> bool) -> Option<u64> {
        let stack = &mut self.stacks[slot(len)?];
        let start = stack.pop_if(|start| will_do(*start))?;
        self.runs -= 1;
        Some(start)
    }

    /// Hands out everything.
    pub(super) fn drain(&mut self) -> impl Iterator<Item = (u64, u64)> {
        self.runs = 0;
        let stacks = (1..).zip(&mut self.stacks);
        stacks.flat_map(|(len, stack)| stack.drain(..).map(move |start| (start, len)))
    }

    /// Everything, in no order.
    pub(super) fn iter(&self) -> impl Iterator<Item = (u64, u64)> {
        let stacks = (1..).zip(&self.stacks);
        stacks.flat_map(|(len, stack)| stack.iter().map(move |start| (*start, len)))
    }

    /// Bytes of memory held beside the value itself.
    pub(super) fn heap_bytes(&self) -> usize {
        let starts: usize = self.stacks.iter().map(Vec::capacity).sum();
        starts * size_of::<u64>()
    }
}

fn slot(len: u64) -> Option<usize> {
    let slot = usize::try_from(len.checked_sub(1)?).ok()?;
    (slot < LONGEST).then_some(slot)
}
