//! Short runs that were just freed, one stack for each length.
//!
//! Bonwick and Adams ("Magazines and Vmem") put a bounded stack of free objects
//! before the allocator that works for them. What was freed last is given next:
//! its marks, its page table entries and its bytes are still in the caches, and
//! the tree of holes is not touched at all.

/// Stacks of starts, by length.
#[derive(Debug)]
pub(super) struct Magazines {
    stacks: [Vec<u64>; STACKS],
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
        let Some(slot) = slot(len) else {
            return false;
        };
        let stack = &mut self.stacks[slot];
        if stack.len() == MOST[slot] {
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
        let stacks = LENS.into_iter().zip(&mut self.stacks);
        stacks.flat_map(|(len, stack)| stack.drain(..).map(move |start| (start, len)))
    }

    /// Everything, in no order.
    pub(super) fn iter(&self) -> impl Iterator<Item = (u64, u64)> {
        let stacks = LENS.into_iter().zip(&self.stacks);
        stacks.flat_map(|(len, stack)| stack.iter().map(move |start| (*start, len)))
    }

    /// Bytes of memory held beside the value itself.
    pub(super) fn heap_bytes(&self) -> usize {
        let starts: usize = self.stacks.iter().map(Vec::capacity).sum();
        starts * size_of::<u64>()
    }
}

const STACKS: usize = 20;

/// The length of the runs in each stack: all short ones, and the powers of two
/// that most large buffers have.
const LENS: [u64; STACKS] = [
    1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 32, 64, 128, 256,
];

/// Runs that each stack may hold: 256 granules of each length, the burst of a
/// deep queue, and never fewer than 16 runs. Together 925, and not more, because
/// all have to be given back before anything is refused.
const MOST: [usize; STACKS] = [
    256, 128, 85, 64, 51, 42, 36, 32, 28, 25, 23, 21, 19, 18, 17, 16, 16, 16, 16, 16,
];

fn slot(len: u64) -> Option<usize> {
    let slot = match len {
        1..=16 => len - 1,
        32 | 64 | 128 | 256 => u64::from(len.trailing_zeros()) + 11,
        _ => return None,
    };
    usize::try_from(slot).ok()
}
