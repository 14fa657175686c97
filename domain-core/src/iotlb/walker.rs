//! Translation without a lock: walking the published table.

use std::fmt;
use std::sync::Arc;

use super::entry::Target;
use super::format::{Leaf, MAGIC, NODE_BITS, Root, Word, header, place, slot_index};
use super::words::{HeapWords, LoadWord, WordSource};
use crate::addr::{Granule, Iova, IovaRange};
use crate::perm::Perm;

/// Reads a page table while its owner changes it: no lock, no system call, no allocation, and no
/// store that another reader would notice.
///
/// What it finds was true at some instant of the walk. How long it stays true is for the owner and
/// the reader to agree on: a walk must end, and what was derived from it must be given up, before
/// the reader says that it has seen a newer generation.
pub struct Walker<W = HeapWords> {
    words: Arc<W>,
    /// Binary logarithm of `granule`, which a walk needs twice.
    granule_shift: u32,
    granule: Granule,
    apertures_start: u64,
    /// 0: there are none.
    apertures_bytes: u64,
}

/// Where one address leads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hit {
    /// Exactly the byte that was asked for.
    pub target: Target,
    /// What the device side may do there.
    pub perm: Perm,
    /// The last address that the same leaf covers: up to there the target runs on. In whole
    /// granules, of which the last may be only partly visible; the rest of it has the same owner and
    /// reads zero.
    pub last: Iova,
}

/// Why words are not a page table that this code can read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs)] // the messages are the docs
pub enum HeaderError {
    #[error("a table begins with {MAGIC:#018x}, this with {found:#018x}")]
    Magic { found: u64 },
    #[error("no granule has 2^{shift} bytes")]
    Granule { shift: u64 },
    #[error("{words} words cannot hold the header of a table")]
    TooShort { words: usize },
}

impl<W: WordSource> Walker<W> {
    /// A walker over words that somebody else writes.
    ///
    /// # Errors
    /// [`HeaderError`] if they hold no table, or one of another version.
    pub fn open(words: Arc<W>) -> Result<Walker<W>, HeaderError> {
        let load = |index| {
            let all = words.words();
            let word = all.get(index).map(LoadWord::load_acquire);
            word.ok_or(HeaderError::TooShort { words: all.len() })
        };
        // The last word of the header that a walker reads.
        load(header::DIRECT_ROOT)?;
        let found = load(header::MAGIC)?;
        if found != MAGIC {
            return Err(HeaderError::Magic { found });
        }
        let shift = load(header::GRANULE_SHIFT)?;
        let bytes = 1u64.checked_shl(u32::try_from(shift).unwrap_or(u32::MAX));
        let granule = bytes
            .and_then(Granule::from_bytes)
            .ok_or(HeaderError::Granule { shift })?;
        let apertures_start = load(header::APERTURES_START)?;
        let apertures_bytes = load(header::APERTURES_BYTES)?;
        Ok(Walker {
            words,
            granule_shift: granule.shift(),
            granule,
            apertures_start,
            apertures_bytes,
        })
    }

    /// Where an address leads; `None` if nothing is mapped there.
    #[inline]
    #[must_use]
    pub fn translate(&self, iova: Iova) -> Option<Hit> {
        let words = self.words.words();
        // Wrapping, here and below: these shifts are less than 64, and a walk must not pay for
        // asking.
        let granule = iova.get().wrapping_shr(self.granule_shift);
        let root = Root::from_bits(words.get(self.root_of(iova))?.load_acquire())?;
        if !root.covers(granule) {
            return None;
        }
        let (mut node, mut shift) = (place(root.node), root.shift());
        loop {
            // A tree that is deeper than its root says is none of ours.
            shift = shift.checked_sub(NODE_BITS)?;
            let index = slot_index(granule.wrapping_shr(shift));
            let word = Word::from_bits(words.get(node | index)?.load_acquire());
            if let Some(leaf) = word.as_leaf() {
                return Some(self.hit(iova, leaf, shift));
            }
            node = word.as_place()?;
        }
    }

    /// Number of the newest state that is wholly visible: a translation that begins after this call
    /// sees that state or a newer one.
    #[must_use]
    pub fn generation(&self) -> u64 {
        self.words.words()[header::GENERATION].load_acquire()
    }

    /// The unit of the table.
    #[must_use]
    pub fn granule(&self) -> Granule {
        self.granule
    }

    /// Bounce and coherent aperture together, if the domain has any.
    #[must_use]
    pub fn apertures(&self) -> Option<IovaRange> {
        IovaRange::from_len(Iova::new(self.apertures_start), self.apertures_bytes).ok()
    }

    /// Which word of the header is the root for this address.
    #[inline]
    fn root_of(&self, iova: Iova) -> usize {
        if iova.get().wrapping_sub(self.apertures_start) < self.apertures_bytes {
            header::APERTURES_ROOT
        } else {
            header::DIRECT_ROOT
        }
    }

    /// `leaf` covers `1 << shift` granules around `iova`.
    #[inline]
    fn hit(&self, iova: Iova, leaf: Leaf, shift: u32) -> Hit {
        let covered = 1u64.wrapping_shl(shift.wrapping_add(self.granule_shift));
        let below = covered.wrapping_sub(1);
        let offset = leaf.offset_granules.wrapping_shl(self.granule_shift);
        Hit {
            target: Target {
                region: leaf.region,
                // In our own tables the sum stays below 2^63.
                offset_bytes: offset.wrapping_add(iova.get() & below),
            },
            perm: leaf.perm,
            last: Iova::new(iova.get() | below),
        }
    }
}

/// Without `W: Clone`: the words are shared.
impl<W> Clone for Walker<W> {
    fn clone(&self) -> Walker<W> {
        Walker {
            words: Arc::clone(&self.words),
            ..*self
        }
    }
}

impl<W> fmt::Debug for Walker<W> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Walker")
            .field("granule", &self.granule)
            .finish_non_exhaustive()
    }
}
