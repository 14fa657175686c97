//! The memory that a page table is written into.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::region::{Grant, RegionError, SharedWords, SparseRegion};

/// Words that can be read while somebody else writes them.
pub trait WordSource: Send + Sync {
    /// How many words there are at most. Those that have no memory yet are never read.
    fn len(&self) -> usize;

    /// Is there no word at all?
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The word's present value; `None` past the end.
    ///
    /// `order` is `Relaxed` or `Acquire`.
    fn load(&self, index: usize, order: Ordering) -> Option<u64>;
}

/// Words that the owner of a table can write. One thread at a time does.
pub trait Words: WordSource {
    /// Replaces a word that has memory.
    ///
    /// # Panics
    /// Past the end: the table has miscounted.
    fn store(&self, index: usize, value: u64, order: Ordering);

    /// Gives memory to the first `count` words, zeroes where there was none.
    ///
    /// # Errors
    /// [`NoMemory`]; what had memory still has it.
    fn back(&self, count: usize) -> Result<(), NoMemory>;
}

/// There is no memory for more words.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("no memory for a table of {want_bytes} bytes")]
pub struct NoMemory {
    /// How many bytes all words together would have had.
    pub want_bytes: u64,
}

/// Words on the heap, for tests and for tables that nobody else reads.
#[derive(Debug)]
pub struct HeapWords(Box<[AtomicU64]>);

impl HeapWords {
    /// So many words, all zero.
    #[must_use]
    pub fn new(count: usize) -> HeapWords {
        HeapWords((0..count).map(|_| AtomicU64::new(0)).collect())
    }
}

impl WordSource for HeapWords {
    #[inline]
    fn len(&self) -> usize {
        self.0.len()
    }

    #[inline]
    fn load(&self, index: usize, order: Ordering) -> Option<u64> {
        self.0.get(index).map(|word| word.load(order))
    }
}

impl Words for HeapWords {
    #[inline]
    fn store(&self, index: usize, value: u64, order: Ordering) {
        self.0[index].store(value, order);
    }

    fn back(&self, _count: usize) -> Result<(), NoMemory> {
        Ok(())
    }
}

/// Words in a memfd that can be granted to readers in other processes. Only this process can write
/// them.
#[derive(Debug)]
pub struct RegionWords(SparseRegion);

impl RegionWords {
    /// Room for `most_bytes`, a positive multiple of 4 KiB; memory only as it is needed. `name`
    /// shows in `/proc` only.
    ///
    /// # Errors
    /// [`RegionError`]; nothing is left behind.
    pub fn create(name: &str, most_bytes: u64) -> Result<RegionWords, RegionError> {
        SparseRegion::create(name, most_bytes).map(RegionWords)
    }

    /// Opens the memory once more, read-only, for one reader.
    ///
    /// # Errors
    /// [`RegionError::Reopen`], without `/proc` or without a free descriptor.
    pub fn grant(&self) -> Result<Grant, RegionError> {
        self.0.grant()
    }

    /// Bytes that a reader maps.
    #[must_use]
    pub fn len_bytes(&self) -> u64 {
        self.0.len_bytes()
    }
}

impl WordSource for RegionWords {
    #[inline]
    fn len(&self) -> usize {
        self.0.words().len()
    }

    #[inline]
    fn load(&self, index: usize, order: Ordering) -> Option<u64> {
        self.0.words().load(index, order)
    }
}

impl Words for RegionWords {
    #[inline]
    fn store(&self, index: usize, value: u64, order: Ordering) {
        self.0
            .words()
            .word_mut(index)
            .expect("the table stays inside its memory")
            .store(value, order);
    }

    fn back(&self, count: usize) -> Result<(), NoMemory> {
        let want_bytes = (count as u64).saturating_mul(8);
        // Whatever the kernel's reason was: there is no memory, and nothing has changed.
        self.0.back(want_bytes).map_err(|_| NoMemory { want_bytes })
    }
}

/// What a client makes of a table that it was granted.
impl WordSource for SharedWords {
    #[inline]
    fn len(&self) -> usize {
        SharedWords::len(self)
    }

    #[inline]
    fn load(&self, index: usize, order: Ordering) -> Option<u64> {
        SharedWords::load(self, index, order)
    }
}
