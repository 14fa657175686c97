//! The memory that a page table is written into.

use std::fmt;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::region::{Grant, RegionError, SharedCell, SharedWords, SparseRegion};

/// Words that can be read while somebody else writes them.
pub trait WordSource: Send + Sync {
    /// What a word is read through.
    type Word: LoadWord;

    /// All words there can ever be. Those that have no memory yet are never read.
    fn words(&self) -> &[Self::Word];
}

/// One word that can be read while somebody else writes it.
pub trait LoadWord {
    /// Its present value, with acquire semantics: who reads a link also sees what it leads to.
    fn load_acquire(&self) -> u64;
}

/// Words that can be written.
pub trait WordSink: WordSource {
    /// Replaces a word that has memory. With [`Ordering::Release`], who reads it sees all that was
    /// stored before.
    ///
    /// # Panics
    /// Past the end, which somebody has miscounted, and where the memory is read-only.
    fn store(&self, index: usize, value: u64, order: Ordering);
}

/// Words that the owner of a table can write. One thread at a time does.
pub trait Words: WordSink {
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
    type Word = AtomicU64;

    #[inline]
    fn words(&self) -> &[AtomicU64] {
        &self.0
    }
}

impl LoadWord for AtomicU64 {
    #[inline]
    fn load_acquire(&self) -> u64 {
        self.load(Ordering::Acquire)
    }
}

impl WordSink for HeapWords {
    #[inline]
    fn store(&self, index: usize, value: u64, order: Ordering) {
        self.0[index].store(value, order);
    }
}

impl Words for HeapWords {
    fn back(&self, _count: usize) -> Result<(), NoMemory> {
        Ok(())
    }
}

/// Asked before a table gets more memory: past a cgroup's limit the kernel's answer is a kill and not
/// an error, so somebody has to count.
pub trait Allowance: fmt::Debug + Send + Sync {
    /// May the table have so many bytes in all? What was allowed before is given back by allowing
    /// less, which is never refused.
    fn allow(&self, total_bytes: u64) -> bool;
}

/// Words in a memfd that can be granted to readers in other processes. Only this process can write
/// them.
#[derive(Debug)]
pub struct RegionWords {
    region: SparseRegion,
    /// `None`: as much as there is room for.
    allowance: Option<Arc<dyn Allowance>>,
}

impl RegionWords {
    /// Room for `most_bytes`, a positive multiple of 4 KiB; memory only as it is needed and
    /// allowed. `name` shows in `/proc` only.
    ///
    /// # Errors
    /// [`RegionError`]; nothing is left behind.
    pub fn create(
        name: &str,
        most_bytes: u64,
        allowance: Option<Arc<dyn Allowance>>,
    ) -> Result<RegionWords, RegionError> {
        Ok(RegionWords {
            region: SparseRegion::create(name, most_bytes)?,
            allowance,
        })
    }

    /// Opens the memory once more, read-only, for one reader.
    ///
    /// # Errors
    /// [`RegionError::Reopen`], without `/proc` or without a free descriptor.
    pub fn grant(&self) -> Result<Grant, RegionError> {
        self.region.grant()
    }

    /// As [`RegionWords::grant`], with a mark: see
    /// [`Region::grant_marked`](crate::region::Region::grant_marked).
    ///
    /// # Errors
    /// As that.
    pub fn grant_marked(&self, mark: u64) -> Result<Grant, RegionError> {
        self.region.grant_marked(mark)
    }

    /// As [`Region::is_marked`](crate::region::Region::is_marked).
    ///
    /// # Errors
    /// As that.
    pub fn is_marked(&self, mark: u64) -> io::Result<bool> {
        self.region.is_marked(mark)
    }

    /// Bytes that a reader maps.
    #[must_use]
    pub fn len_bytes(&self) -> u64 {
        self.region.len_bytes()
    }
}

impl WordSource for RegionWords {
    type Word = SharedCell;

    #[inline]
    fn words(&self) -> &[SharedCell] {
        self.region.words().cells()
    }
}

impl LoadWord for SharedCell {
    #[inline]
    fn load_acquire(&self) -> u64 {
        self.load(Ordering::Acquire)
    }
}

impl WordSink for RegionWords {
    #[inline]
    fn store(&self, index: usize, value: u64, order: Ordering) {
        self.region.words().store(index, value, order);
    }
}

impl Words for RegionWords {
    fn back(&self, count: usize) -> Result<(), NoMemory> {
        let want_bytes = (count as u64).saturating_mul(8);
        let no_memory = NoMemory { want_bytes };
        let before = self.region.backed_bytes();
        if want_bytes <= before {
            return Ok(());
        }
        let allow = |bytes| self.allowance.as_ref().is_none_or(|all| all.allow(bytes));
        if !allow(want_bytes) {
            return Err(no_memory);
        }
        // Whatever the kernel's reason was: there is no memory, and nothing has changed.
        self.region.back(want_bytes).map_err(|_| {
            allow(before);
            no_memory
        })
    }
}

/// What a client makes of words that it was granted.
/// Words that several have.
impl<W: WordSource> WordSource for Arc<W> {
    type Word = W::Word;

    #[inline]
    fn words(&self) -> &[W::Word] {
        (**self).words()
    }
}

impl WordSource for SharedWords {
    type Word = SharedCell;

    #[inline]
    fn words(&self) -> &[SharedCell] {
        self.cells()
    }
}

impl WordSink for SharedWords {
    #[inline]
    fn store(&self, index: usize, value: u64, order: Ordering) {
        self.word_mut(index)
            .expect("who writes words stays inside them and has them mapped read-write")
            .store(value, order);
    }
}
