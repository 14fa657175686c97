//! The nodes of a page table: which are free, which are used, which wait for readers.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering::{Relaxed, Release};

use super::format::{FIRST_NODE, NODE_BYTES, NODE_WORDS, NODES_MOST, Word};
use super::words::{LoadWord, NoMemory, Words};

/// Nodes that get memory at a time, at least: 16 KiB, so that a domain that maps little costs
/// little.
const STEP_NODES: u32 = 4;
/// And at most: 1 MiB, about 300 µs of the kernel's time.
const STEP_NODES_MOST: u32 = 256;

/// Why a page table cannot take an entry. The numbers are nodes of 4 KiB. Nothing is changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs)] // the messages are the docs
pub enum NoRoom {
    #[error(
        "the page table needs {want} more nodes; of {most}, {used} are used and {retired} wait for readers"
    )]
    Full {
        want: usize,
        used: usize,
        retired: usize,
        most: usize,
    },
    #[error("no memory for {want} more nodes of the page table beside the {used} used")]
    NoMemory { want: usize, used: usize },
}

/// How a page table uses its memory. All numbers are nodes of 4 KiB, but for the bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TableUsage {
    /// Nodes in the trees.
    pub used: usize,
    /// Nodes out of the trees that a reader may still be looking at.
    pub retired: usize,
    /// Nodes that can be used at once.
    pub free: usize,
    /// As many as there can ever be.
    pub most: usize,
    /// Bytes that have memory, the header and free nodes included. Memory that a table once had it
    /// keeps.
    pub backed_bytes: u64,
}

/// All nodes of a table.
///
/// A node is in one of four states: fresh (never used, perhaps without memory), free, used, or
/// retired. Fresh and free ones are all zero.
#[derive(Debug)]
pub(super) struct Nodes<W> {
    words: Arc<W>,
    /// Words that are not empty, by node; as long as there are nodes that are not fresh.
    filled: Vec<u16>,
    free: Vec<u32>,
    /// By generation: the oldest first.
    retired: VecDeque<Retired>,
    /// Up to here, exclusive, nodes have memory.
    backed_end: u32,
    /// Where nodes end.
    end: u32,
}

#[derive(Clone, Copy, Debug)]
struct Retired {
    node: u32,
    /// Readers that have seen this generation have left the node.
    generation: u64,
}

impl<W: Words> Nodes<W> {
    /// Gives memory to the header and the first nodes.
    pub(super) fn new(words: Arc<W>) -> Result<Nodes<W>, NoRoom> {
        let end = (words.words().len() / NODE_WORDS).min(NODES_MOST);
        let mut nodes = Nodes {
            words,
            filled: vec![0; index(FIRST_NODE)],
            free: Vec::new(),
            retired: VecDeque::new(),
            backed_end: FIRST_NODE,
            end: u32::try_from(end).expect("a node's number has 18 bits"),
        };
        nodes.back_more(1)?;
        Ok(nodes)
    }

    pub(super) fn words(&self) -> &Arc<W> {
        &self.words
    }

    pub(super) fn word(&self, node: u32, place: usize) -> Word {
        // The writer reads its own stores.
        Word::from_bits(self.words.words()[index(node) * NODE_WORDS + place].load_acquire())
    }

    /// How many words of a node are not empty.
    pub(super) fn filled(&self, node: u32) -> u16 {
        self.filled[index(node)]
    }

    /// Replaces a word, and all that hangs on it, for readers at once.
    pub(super) fn set(&mut self, node: u32, place: usize, word: Word) {
        let old = self.word(node, place);
        // Release, so that a reader that follows a pointer finds the node below it filled.
        self.words
            .store(index(node) * NODE_WORDS + place, word.bits(), Release);
        let filled = &mut self.filled[index(node)];
        *filled = *filled + u16::from(!word.is_empty()) - u16::from(!old.is_empty());
    }

    /// Makes sure that the next `want` calls of [`Nodes::take`] succeed.
    pub(super) fn ensure(&mut self, want: usize) -> Result<(), NoRoom> {
        let ready = self.free.len() + index(self.backed_end) - self.filled.len();
        if want <= ready {
            return Ok(());
        }
        self.back_more(want)
    }

    #[cold]
    fn back_more(&mut self, want: usize) -> Result<(), NoRoom> {
        let used = self.used();
        let needed = self.filled.len() + want - self.free.len();
        if needed > index(self.end) {
            return Err(NoRoom::Full {
                want,
                used,
                retired: self.retired.len(),
                most: self.most(),
            });
        }
        // In growing steps, so that system calls stay rare; the bare need if that is too much.
        let step = (self.backed_end / 4).clamp(STEP_NODES, STEP_NODES_MOST);
        let roomy = index(self.backed_end.saturating_add(step).min(self.end));
        self.back(needed.max(roomy))
            .or_else(|_| self.back(needed))
            .map_err(|_| NoRoom::NoMemory { want, used })
    }

    fn back(&mut self, end: usize) -> Result<(), NoMemory> {
        self.words.back(end * NODE_WORDS)?;
        self.backed_end = u32::try_from(end).expect("not above the last node");
        Ok(())
    }

    /// An empty node. That there is one is the caller's promise: see [`Nodes::ensure`].
    pub(super) fn take(&mut self) -> u32 {
        if let Some(node) = self.free.pop() {
            return node;
        }
        let node = u32::try_from(self.filled.len()).expect("a node's number has 18 bits");
        assert!(node < self.backed_end, "room was made before");
        self.filled.push(0);
        node
    }

    /// Takes back a node that is not linked any more, once all readers have seen `generation`.
    pub(super) fn retire(&mut self, node: u32, generation: u64) {
        self.retired.push_back(Retired { node, generation });
    }

    /// Takes back a node that no reader has ever seen.
    pub(super) fn give_back(&mut self, node: u32) {
        if std::mem::take(&mut self.filled[index(node)]) > 0 {
            let first = index(node) * NODE_WORDS;
            for place in first..first + NODE_WORDS {
                self.words.store(place, 0, Relaxed);
            }
        }
        self.free.push(node);
    }

    /// All readers have seen `generation`.
    pub(super) fn reclaim(&mut self, generation: u64) {
        while let Some(retired) = self.retired.front() {
            if retired.generation > generation {
                break;
            }
            let node = retired.node;
            self.retired.pop_front();
            self.give_back(node);
        }
    }

    pub(super) fn usage(&self) -> TableUsage {
        TableUsage {
            used: self.used(),
            retired: self.retired.len(),
            free: self.free.len() + index(self.backed_end) - self.filled.len(),
            most: self.most(),
            backed_bytes: u64::from(self.backed_end) * NODE_BYTES,
        }
    }

    fn used(&self) -> usize {
        self.filled.len() - index(FIRST_NODE) - self.free.len() - self.retired.len()
    }

    fn most(&self) -> usize {
        index(self.end.saturating_sub(FIRST_NODE))
    }

    /// Checks that every node is in one state and that free ones are empty. `used` are those found
    /// in the trees.
    pub(super) fn check_invariants(&self, used: &[u32]) {
        let retired = self.retired.iter().map(|retired| &retired.node);
        let mut all: Vec<u32> = used
            .iter()
            .chain(&self.free)
            .chain(retired)
            .copied()
            .collect();
        all.sort_unstable();
        let known = u32::try_from(self.filled.len()).expect("a node's number has 18 bits");
        assert!(
            all.iter().copied().eq(FIRST_NODE..known),
            "every node is used, free or retired"
        );
        for node in &self.free {
            let is_zero = (0..NODE_WORDS).all(|place| self.word(*node, place).is_empty());
            assert!(is_zero, "free node {node} is empty");
        }
        let generations = self.retired.iter().map(|retired| retired.generation);
        assert!(generations.is_sorted(), "the oldest are retired first");
    }
}

/// A node's number as an index.
const fn index(node: u32) -> usize {
    node as usize
}
