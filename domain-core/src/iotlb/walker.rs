//! Translation without a lock: walking the published table.

use std::fmt;
use std::sync::Arc;

use super::above;
use super::entry::{Piece, Target, TranslateError};
use super::format::{
    Leaf, MAGIC, NODE_BITS, NODE_WORDS, Root, Slot, Word, header, place, slot_index,
};
use super::words::{HeapWords, LoadWord, WordSource};
use crate::addr::{Granule, Iova, IovaRange};
use crate::perm::Perm;

/// Reads a page table while its owner changes it: no lock, no system call, no allocation, and no
/// store that another reader would notice.
///
/// What it finds was true at some instant of the walk. How long it stays true is for the owner and
/// the reader to agree on: a walk must end, and what was derived from it must be given up, before
/// the reader says that it has seen a newer generation.
#[derive(Clone)]
pub struct Walker<W = Arc<HeapWords>> {
    words: W,
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
    pub fn open(words: W) -> Result<Walker<W>, HeaderError> {
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

    /// Pieces that together cover all of `range`, in order; the first error is the last item.
    ///
    /// As [`Iotlb::pieces`](super::Iotlb::pieces), but from the table, which knows no entries:
    /// neighbours that lead on in the same region with the same perm are one piece; a granule that
    /// is mapped in part counts as mapped; and of a range with too small a perm the error names what
    /// one leaf covers of it. Each leaf is as it was at some instant of its own.
    pub fn pieces(
        &self,
        range: IovaRange,
        want: Perm,
    ) -> impl Iterator<Item = Result<Piece, TranslateError>> {
        let mut next = Some(range);
        std::iter::from_fn(move || {
            let rest = next.take()?;
            let piece = self.leading_piece(rest, want);
            if let Ok(piece) = piece {
                next = above(rest, piece.range.last());
            }
            Some(piece)
        })
    }

    /// The lowest mapped address in `range`, and where it leads.
    ///
    /// What is empty is passed over in steps as large as the table has them.
    #[must_use]
    pub fn next_mapped(&self, range: IovaRange) -> Option<(Iova, Hit)> {
        let mut rest = Some(range);
        while let Some(part) = rest {
            match self.descend(part.start()) {
                Ok(hit) => return Some((part.start(), hit)),
                Err(empty_to) => rest = above(part, empty_to.max(part.start())),
            }
        }
        None
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

    /// The piece at the start of `rest`, as long as it is.
    fn leading_piece(&self, rest: IovaRange, want: Perm) -> Result<Piece, TranslateError> {
        let at = rest.start();
        let hit = self.translate(at).ok_or(TranslateError::Hole { at })?;
        let Hit { target, perm, last } = hit;
        if !perm.allows(want) {
            let range = until(rest, last);
            return Err(TranslateError::Perm { range, perm, want });
        }
        let mut last = last;
        while let Some(more) = above(rest, last) {
            let skipped = more.start().get().wrapping_sub(at.get());
            let offset_bytes = target.offset_bytes.wrapping_add(skipped);
            let goes_on = self.translate(more.start()).filter(|hit| {
                (hit.target, hit.perm)
                    == (
                        Target {
                            offset_bytes,
                            ..target
                        },
                        perm,
                    )
            });
            match goes_on {
                Some(hit) => last = hit.last,
                None => break,
            }
        }
        let range = until(rest, last);
        Ok(Piece {
            range,
            target,
            perm,
        })
    }

    /// As [`Walker::translate`]; where nothing is mapped, the last address up to which there is
    /// nothing either.
    fn descend(&self, iova: Iova) -> Result<Hit, Iova> {
        let words = self.words.words();
        let load = |index: usize| words.get(index).map(LoadWord::load_acquire);
        let end = self.namespace_end(iova);
        let granule = iova.get().wrapping_shr(self.granule_shift);
        let root = load(self.root_of(iova))
            .and_then(Root::from_bits)
            .ok_or(end)?;
        if !root.covers(granule) {
            return Err(self.before(root, granule).map_or(end, |last| last.min(end)));
        }
        let (mut node, mut shift) = (place(root.node), root.shift());
        loop {
            shift = shift.checked_sub(NODE_BITS).ok_or(end)?;
            let index = slot_index(granule.wrapping_shr(shift));
            let slot_at = |index| Word::from_bits(load(node | index).unwrap_or(0)).slot();
            match slot_at(index) {
                Slot::Leaf(leaf) => return Ok(self.hit(iova, leaf, shift)),
                Slot::Node(below) => node = place(below),
                Slot::Empty => {
                    let others = (index + 1)..NODE_WORDS;
                    let empty = others.take_while(|&index| slot_at(index) == Slot::Empty);
                    return Err(self.slots_end(iova, shift, empty.count() as u64).min(end));
                }
            }
        }
    }

    /// The last address that the tree of `iova` has to itself without a gap.
    fn namespace_end(&self, iova: Iova) -> Iova {
        match self.apertures() {
            Some(range) if iova < range.start() => Iova::new(range.start().get() - 1),
            Some(range) if iova <= range.last() => range.last(),
            _ => Iova::new(u64::MAX),
        }
    }

    /// The last address before all that lies below `root`; `None` if `granule` is not before it.
    fn before(&self, root: Root, granule: u64) -> Option<Iova> {
        let first = root.prefix.checked_shl(root.shift())?;
        let first_byte = first.checked_shl(self.granule_shift)?;
        (granule < first).then(|| Iova::new(first_byte.wrapping_sub(1)))
    }

    /// The last address of the slot of `1 << shift` granules around `iova`, and of so many more.
    fn slots_end(&self, iova: Iova, shift: u32, more: u64) -> Iova {
        let slot_bytes = 1u64.checked_shl(shift.wrapping_add(self.granule_shift));
        let end = slot_bytes.and_then(|bytes| {
            let end = iova.get() | (bytes - 1);
            end.checked_add(bytes.checked_mul(more)?)
        });
        Iova::new(end.unwrap_or(u64::MAX))
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

/// The part of `range` up to `last`, which lies at its start or above.
fn until(range: IovaRange, last: Iova) -> IovaRange {
    let last = last.min(range.last());
    IovaRange::new(range.start(), last).expect("a leaf covers what it was found for")
}

impl<W> fmt::Debug for Walker<W> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Walker")
            .field("granule", &self.granule)
            .finish_non_exhaustive()
    }
}
