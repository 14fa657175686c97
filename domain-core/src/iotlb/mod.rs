//! What is visible where.
//!
//! The same entries are kept twice: as an ordered map of exact ranges, for enumeration, overlaps and
//! differences; and as a page table in granules (`format`), which readers walk without a lock
//! ([`Walker`]) while it is changed (`table` says why they may). One noun, one file:
//!
//! | module | noun |
//! |---|---|
//! | `entry` | ranges and where they lead |
//! | `ordered` | exact ranges, by address |
//! | `words` | the memory that the page table is written into |
//! | `format` | its words |
//! | `nodes` | its nodes: free, used, waiting for readers |
//! | `span` | runs of granules |
//! | `table` | the writer's side of it |
//! | `walker` | the reader's side of it |
//! | `page` | what a session's readers hold, in a page that they share with the service |
//! | `direct` | a whole table of direct mappings, checked aside |

pub mod barrier;
mod direct;
mod entry;
mod format;
mod nodes;
mod ordered;
pub mod page;
mod span;
mod table;
#[cfg(test)]
mod tests;
mod walker;
mod words;

use std::sync::Arc;

pub use self::barrier::{Barrier, Registered, Unfenced};
pub use self::direct::{BuildError, DirectTable, Replaced};
pub use self::entry::{Entry, Overlap, Piece, RegionId, Target, TranslateError};
pub use self::nodes::{NoRoom, TableUsage};
pub use self::page::{BYTES as SESSION_PAGE_BYTES, PageError, PageRegion, SessionPage};
pub use self::walker::{HeaderError, Hit, Walker};
pub use self::words::{
    Allowance, HeapWords, LoadWord, NoMemory, RegionWords, WordSink, WordSource, Words,
};

use self::format::OFFSET_GRANULES;
use self::ordered::Ordered;
use self::span::Span;
use self::table::{Run, Table, Tree};
use crate::addr::{Granule, Iova, IovaRange};
use crate::perm::Perm;

/// Why an entry was refused. Nothing is changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs)] // the messages are the docs
pub enum InsertError {
    #[error(transparent)]
    Overlap(#[from] Overlap),
    #[error("{range} crosses the edge of the apertures {apertures}")]
    CrossesAperture {
        range: IovaRange,
        apertures: IovaRange,
    },
    #[error(
        "{range} at offset {offset_bytes} is not made of whole granules of {granule_bytes} bytes"
    )]
    Misaligned {
        range: IovaRange,
        offset_bytes: u64,
        granule_bytes: u64,
    },
    #[error(
        "{range} leads to offset {offset_bytes} and on, past the {most_bytes} bytes that a region can have"
    )]
    TooFar {
        range: IovaRange,
        offset_bytes: u64,
        most_bytes: u64,
    },
    #[error(transparent)]
    NoRoom(#[from] NoRoom),
}

/// The entries of one domain, never overlapping, and the number of their state.
///
/// Entries inside the *apertures* and *direct* entries outside of them are two namespaces. A granule
/// belongs to one entry: two that share one overlap, even if their bytes do not. Direct entries are
/// made of whole granules; those in the apertures may begin and end inside one, with the same
/// offset in their target's granule.
///
/// Whoever changes it has it to itself; [`Walker`]s read all the while.
#[derive(Debug)]
pub struct Iotlb<W: Words = HeapWords> {
    granule: Granule,
    apertures: Option<IovaRange>,
    /// Entries inside `apertures`.
    inside: Ordered,
    /// Entries that do not touch `apertures`.
    direct: Ordered,
    table: Table<W>,
}

/// Reading.
impl<W: Words> Iotlb<W> {
    /// An empty IOTLB whose page table lies in `words`, which are all zero.
    ///
    /// # Errors
    /// [`NoRoom`] if there is no memory for the first two nodes.
    ///
    /// # Panics
    /// If the apertures are not made of whole granules or are the whole 64-bit space.
    pub fn new(
        words: W,
        granule: Granule,
        apertures: Option<IovaRange>,
    ) -> Result<Iotlb<W>, NoRoom> {
        assert!(
            apertures.is_none_or(|range| is_whole(range, granule)),
            "apertures are made of whole granules"
        );
        Ok(Iotlb {
            granule,
            apertures,
            inside: Ordered::within(apertures, granule),
            direct: Ordered::anywhere(granule),
            table: Table::new(Arc::new(words), granule, apertures)?,
        })
    }

    /// Number of the present state.
    #[must_use]
    pub fn generation(&self) -> u64 {
        self.table.generation()
    }

    /// Number of entries.
    #[must_use]
    pub fn len(&self) -> usize {
        self.inside.len() + self.direct.len()
    }

    /// Is nothing visible?
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// All entries, by address.
    pub fn entries(&self) -> impl Iterator<Item = Entry> {
        let start = self.apertures.map_or(Iova::new(0), IovaRange::start);
        let below = self.direct.starting_in(..start);
        below
            .chain(self.inside.iter())
            .chain(self.direct.starting_in(start..))
    }

    /// Number of direct entries.
    #[must_use]
    pub fn direct_len(&self) -> usize {
        self.direct.len()
    }

    /// All direct entries, by address.
    pub fn direct_entries(&self) -> impl Iterator<Item = Entry> {
        self.direct.iter()
    }

    /// The direct entries that start at `from` or above, by address.
    pub fn direct_range(&self, from: Iova) -> impl Iterator<Item = Entry> {
        self.direct.starting_in(from..)
    }

    /// The lowest entry that overlaps `range`, whole.
    #[must_use]
    pub fn lookup(&self, range: IovaRange) -> Option<Entry> {
        match (self.inside.lookup(range), self.direct.lookup(range)) {
            (Some(one), Some(other)) => Some(if one.range < other.range { one } else { other }),
            (one, other) => one.or(other),
        }
    }

    /// Pieces that together cover all of `range`, in order, exact to the byte.
    ///
    /// # Errors
    /// [`TranslateError`] at the first hole or the first entry that allows too
    /// little; then no piece is given.
    pub fn translate(&self, range: IovaRange, want: Perm) -> Result<Vec<Piece>, TranslateError> {
        self.pieces(range, want).collect()
    }

    /// As [`translate`](Iotlb::translate), one piece after the other; the first
    /// error is the last item.
    pub fn pieces(
        &self,
        range: IovaRange,
        want: Perm,
    ) -> impl Iterator<Item = Result<Piece, TranslateError>> {
        let mut next = Some(range);
        std::iter::from_fn(move || {
            let rest = next.take()?;
            let at = rest.start();
            let namespace = self.namespace(at);
            let entry = match at == range.start() {
                true => namespace.holding(at),
                false => namespace.at(at),
            };
            let Some(found) = entry else {
                return Some(Err(TranslateError::Hole { at }));
            };
            let Entry { range, perm, .. } = found;
            if !perm.allows(want) {
                return Some(Err(TranslateError::Perm { range, perm, want }));
            }
            next = above(rest, range.last());
            Some(Ok(found.clip(rest)))
        })
    }

    /// A reader of the page table, for any thread.
    #[must_use]
    pub fn walker(&self) -> Walker<Arc<W>> {
        Walker::open(Arc::clone(self.table.words())).expect("the table is one")
    }

    /// The memory of the page table, to grant it to others.
    #[must_use]
    pub fn words(&self) -> &W {
        self.table.words()
    }

    /// What the page table uses.
    #[must_use]
    pub fn table_usage(&self) -> TableUsage {
        self.table.usage()
    }

    fn namespace(&self, iova: Iova) -> &Ordered {
        match self.apertures {
            Some(range) if range.start() <= iova && iova <= range.last() => &self.inside,
            _ => &self.direct,
        }
    }
}

/// Changing.
impl<W: Words> Iotlb<W> {
    /// Makes an entry visible.
    ///
    /// # Errors
    /// [`InsertError`]; nothing is changed.
    pub fn insert(&mut self, entry: Entry) -> Result<(), InsertError> {
        let (tree, run) = self.check(&entry)?;
        let missing = self.table.missing(tree, run.span);
        let missing = missing.map_err(|_occupied| self.overlap(entry.range))?;
        self.table.ensure(missing)?;
        self.table.fill(tree, run);
        self.ordered(tree).insert(entry);
        self.table.commit();
        Ok(())
    }

    /// Makes several entries visible, or none, in one generation.
    ///
    /// # Errors
    /// [`InsertError`] of the first that is refused; nothing is changed.
    pub fn insert_all(&mut self, entries: &[Entry]) -> Result<(), InsertError> {
        if entries.is_empty() {
            return Ok(());
        }
        let checked = entries.iter().map(|entry| self.check_free(entry));
        let checked: Vec<_> = checked.collect::<Result<_, _>>()?;
        self.expect_apart(entries)?;
        self.prepare_all(&checked)?;
        for ((tree, run), entry) in checked.into_iter().zip(entries) {
            self.table.fill(tree, run);
            self.ordered(tree).insert(*entry);
        }
        self.table.commit();
        Ok(())
    }

    /// Makes room for an entry inside the apertures: entering one of the same granules, once or
    /// several times, then needs no more of it, for good.
    ///
    /// # Errors
    /// [`NoRoom`]; nothing is changed.
    ///
    /// # Panics
    /// If `granules` do not lie in the apertures, or something is visible there.
    pub fn reserve(&mut self, granules: IovaRange) -> Result<(), NoRoom> {
        let inside = self.apertures.is_some_and(|range| range.contains(granules));
        assert!(inside, "only the apertures keep what is reserved");
        let span = Span::of(granules, self.granule);
        let missing = self.table.missing(Tree::Apertures, span);
        let missing = missing.expect("what is reserved is free");
        if missing > 0 {
            self.table.ensure(missing)?;
            self.table.prepare(Tree::Apertures, span);
        }
        Ok(())
    }

    /// Enters what room was made for ([`Iotlb::reserve`]) and what is free since. Readers know that
    /// it is all there after [`Iotlb::commit`].
    pub fn enter_reserved(&mut self, entry: Entry) {
        let run = Run::of(&entry, self.granule);
        debug_assert!(
            self.check_inside(&entry).is_ok(),
            "it leads to its own offset"
        );
        debug_assert!(
            matches!(self.table.missing(Tree::Apertures, run.span), Ok(0)),
            "granules that are held by one are visible once, and had room made"
        );
        self.table.fill(Tree::Apertures, run);
        self.inside.insert(entry);
    }

    /// Hides the entry inside the apertures that starts there. Readers know that it is gone after
    /// [`Iotlb::commit`].
    ///
    /// # Panics
    /// If there is none.
    pub fn take_reserved(&mut self, start: Iova) -> Entry {
        let removed = self.inside.remove(start);
        let removed = removed.expect("what is live is visible");
        self.table
            .clear(Tree::Apertures, Span::of(removed.range, self.granule));
        removed
    }

    /// Ends a change of several steps: the next generation.
    pub fn commit(&mut self) {
        self.table.commit();
    }

    /// Hides the entry that starts at `start`; `None` if there is none.
    pub fn remove(&mut self, start: Iova) -> Option<Entry> {
        let removed = self.take(start)?;
        self.table.commit();
        Some(removed)
    }

    /// Hides the entries that start there, in one generation. Answers those that there were.
    pub fn remove_all(&mut self, starts: impl IntoIterator<Item = Iova>) -> Vec<Entry> {
        let removed: Vec<_> = starts
            .into_iter()
            .filter_map(|start| self.take(start))
            .collect();
        if !removed.is_empty() {
            self.table.commit();
        }
        removed
    }

    /// Puts a whole table of direct entries in place of the present one. Readers see the old table
    /// or the new one and never a mixture; entries in the apertures are not touched. The same table
    /// again changes nothing, not even the generation.
    ///
    /// # Errors
    /// [`InsertError`] of the first entry that is refused; the old table stays. While both tables
    /// exist there must be room for both.
    pub fn replace_direct(&mut self, table: &DirectTable) -> Result<Replaced, InsertError> {
        let entries = table.entries();
        for entry in entries {
            self.check_direct(entry)?;
        }
        let replaced = Replaced::between(&self.direct, entries);
        if replaced == Replaced::default() {
            return Ok(replaced);
        }
        // Derived once more: cheaper than keeping them, of which there may be many.
        let runs = entries.iter().map(|entry| Run::of(entry, self.granule));
        let root = self.table.build_aside(runs)?;
        self.direct = Ordered::from_sorted(self.granule, entries);
        self.table.replace(Tree::Direct, root);
        self.table.commit();
        Ok(replaced)
    }

    /// All readers have seen `generation`, or will never read again: what was retired up to there
    /// can be used again. While nobody but the owner reads, that is the present one.
    pub fn reclaim(&mut self, generation: u64) {
        self.table.reclaim(generation);
    }

    fn take(&mut self, start: Iova) -> Option<Entry> {
        let tree = match self.apertures {
            Some(range) if range.start() <= start && start <= range.last() => Tree::Apertures,
            _ => Tree::Direct,
        };
        let removed = self.ordered(tree).remove(start)?;
        self.table
            .clear(tree, Span::of(removed.range, self.granule));
        Some(removed)
    }

    fn ordered(&mut self, tree: Tree) -> &mut Ordered {
        match tree {
            Tree::Apertures => &mut self.inside,
            Tree::Direct => &mut self.direct,
        }
    }

    /// Checks an entry, and that nothing is in its way.
    fn check_free(&self, entry: &Entry) -> Result<(Tree, Run), InsertError> {
        let (tree, run) = self.check(entry)?;
        match self.table.missing(tree, run.span) {
            Ok(_) => Ok((tree, run)),
            Err(_occupied) => Err(self.overlap(entry.range).into()),
        }
    }

    /// Builds all nodes before the first leaf: what is refused has never been visible.
    fn prepare_all(&mut self, runs: &[(Tree, Run)]) -> Result<(), NoRoom> {
        for (done, (tree, run)) in runs.iter().enumerate() {
            let missing = self.table.missing(*tree, run.span);
            let room = self.table.ensure(missing.expect("what is entered is free"));
            if room.is_err() {
                self.unprepare_all(&runs[..done]);
                return room;
            }
            self.table.prepare(*tree, run.span);
        }
        Ok(())
    }

    /// Unlinks nodes that stayed empty. Those of the apertures stay: see `table`.
    fn unprepare_all(&mut self, runs: &[(Tree, Run)]) {
        let direct = runs.iter().filter(|(tree, _)| *tree == Tree::Direct);
        for (tree, run) in direct {
            self.table.clear(*tree, run.span);
        }
    }

    /// What is in the way of `range`, in whole granules.
    fn overlap(&self, range: IovaRange) -> Overlap {
        let hit = self.lookup(widen(range, self.granule));
        let hit = hit.expect("what is in the page table is in the map").range;
        Overlap { range, hit }
    }

    /// Refuses entries that share a granule.
    fn expect_apart(&self, entries: &[Entry]) -> Result<(), Overlap> {
        let mut ranges: Vec<_> = entries.iter().map(|entry| entry.range).collect();
        ranges.sort_unstable();
        let shared = ranges
            .windows(2)
            .find(|pair| widen(pair[0], self.granule).last() >= pair[1].start());
        match shared {
            None => Ok(()),
            Some(pair) => Err(Overlap {
                range: pair[1],
                hit: pair[0],
            }),
        }
    }

    /// Checks all that depends on the entry alone.
    fn check(&self, entry: &Entry) -> Result<(Tree, Run), InsertError> {
        match self.apertures {
            Some(apertures) if apertures.contains(entry.range) => {
                Ok((Tree::Apertures, self.check_inside(entry)?))
            }
            _ => Ok((Tree::Direct, self.check_direct(entry)?)),
        }
    }

    fn check_inside(&self, entry: &Entry) -> Result<Run, InsertError> {
        let (start, offset_bytes) = (entry.range.start().get(), entry.target.offset_bytes);
        if self.granule.offset_in(start) != self.granule.offset_in(offset_bytes) {
            return Err(self.misaligned(entry));
        }
        self.run(entry)
    }

    fn check_direct(&self, entry: &Entry) -> Result<Run, InsertError> {
        let range = entry.range;
        let apertures = self.apertures.filter(|apertures| apertures.overlaps(range));
        if let Some(apertures) = apertures {
            return Err(InsertError::CrossesAperture { range, apertures });
        }
        let offset_bytes = entry.target.offset_bytes;
        if !is_whole(range, self.granule) || self.granule.offset_in(offset_bytes) != 0 {
            return Err(self.misaligned(entry));
        }
        self.run(entry)
    }

    fn misaligned(&self, entry: &Entry) -> InsertError {
        InsertError::Misaligned {
            range: entry.range,
            offset_bytes: entry.target.offset_bytes,
            granule_bytes: self.granule.bytes(),
        }
    }

    /// The leaves of an entry.
    fn run(&self, entry: &Entry) -> Result<Run, InsertError> {
        let run = Run::of(entry, self.granule);
        if run.leaf.offset_granules + (run.span.last - run.span.first) < OFFSET_GRANULES {
            return Ok(run);
        }
        Err(InsertError::TooFar {
            range: entry.range,
            offset_bytes: entry.target.offset_bytes,
            most_bytes: OFFSET_GRANULES << self.granule.shift(),
        })
    }
}

/// Checking.
impl<W: Words> Iotlb<W> {
    /// Checks that ordered map and page table agree leaf by leaf, that no two entries share a
    /// granule, that each is in its namespace, and that no node is lost.
    ///
    /// # Panics
    /// Naming the promise that is broken.
    pub fn check_invariants(&self) {
        self.check_order();
        let mapped = self.table.check_invariants();
        for (ordered, mapped) in [&self.inside, &self.direct].into_iter().zip(mapped) {
            let granules = ordered
                .iter()
                .map(|entry| Span::of(entry.range, self.granule).granules());
            assert_eq!(
                granules.sum::<u64>(),
                mapped,
                "the table maps what is entered"
            );
        }
        let walker = self.walker();
        assert_eq!(
            walker.generation(),
            self.generation(),
            "readers can know the generation"
        );
        for entry in self.entries() {
            self.check_leaves(&walker, &entry);
        }
    }

    fn check_order(&self) {
        let inside = |range| {
            self.apertures
                .is_some_and(|apertures| apertures.contains(range))
        };
        let touches = |range| {
            self.apertures
                .is_some_and(|apertures| apertures.overlaps(range))
        };
        assert!(
            self.inside.iter().all(|entry| inside(entry.range)),
            "apertures hold their own"
        );
        assert!(
            !self.direct.iter().any(|entry| touches(entry.range)),
            "direct is outside"
        );
        let mut previous: Option<IovaRange> = None;
        for entry in self.entries() {
            let range = entry.range;
            let is_apart = previous.is_none_or(|p| widen(p, self.granule).last() < range.start());
            assert!(is_apart, "{range:?} shares a granule");
            previous = Some(range);
        }
        assert_eq!(
            self.entries().count(),
            self.len(),
            "every entry is listed once"
        );
    }

    /// Walks through an entry, leaf by leaf.
    fn check_leaves(&self, walker: &Walker<Arc<W>>, entry: &Entry) {
        let mut rest = Some(entry.range);
        while let Some(part) = rest {
            let hit = walker.translate(part.start());
            let hit = hit.unwrap_or_else(|| panic!("{:?} is mapped", part.start()));
            let piece = entry.clip(part);
            assert_eq!(
                (hit.target, hit.perm),
                (piece.target, piece.perm),
                "{part:?}"
            );
            assert!(
                hit.last <= widen(entry.range, self.granule).last(),
                "{part:?} ends"
            );
            rest = above(part, hit.last);
        }
    }
}

/// Is `range` made of whole granules?
fn is_whole(range: IovaRange, granule: Granule) -> bool {
    widen(range, granule) == range
}

/// All granules that `range` touches.
fn widen(range: IovaRange, granule: Granule) -> IovaRange {
    let below = granule.bytes() - 1;
    let start = Iova::new(range.start().get() & !below);
    let last = Iova::new(range.last().get() | below);
    IovaRange::new(start, last).expect("rounded outwards")
}

/// What of `range` lies above `last`.
fn above(range: IovaRange, last: Iova) -> Option<IovaRange> {
    let start = last.checked_add(1)?;
    IovaRange::new(start, range.last()).ok()
}
