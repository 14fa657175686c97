//! What is visible where: the ordered map of exact ranges.

use std::collections::BTreeMap;

use crate::addr::{Iova, IovaRange};
use crate::layout::ApertureKind;
use crate::perm::Perm;

/// Which memory, as a number of 20 bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RegionId(u32);

impl RegionId {
    /// The bounce region.
    pub const BOUNCE: RegionId = RegionId(0);
    /// The coherent region.
    pub const COHERENT: RegionId = RegionId(1);

    /// A registered memory.
    #[must_use]
    pub const fn memory_slot(slot: u32) -> RegionId {
        RegionId(slot + 2)
    }

    /// The slot of a registered memory; `None` for an aperture's region.
    #[must_use]
    pub const fn slot(self) -> Option<u32> {
        self.0.checked_sub(2)
    }
}

impl From<ApertureKind> for RegionId {
    fn from(kind: ApertureKind) -> RegionId {
        match kind {
            ApertureKind::Bounce => RegionId::BOUNCE,
            ApertureKind::Coherent => RegionId::COHERENT,
        }
    }
}

/// The table has no room for more nodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("no room for the page table: {used_bytes} of {limit_bytes} bytes are in use")]
pub struct NoRoom {
    /// In use.
    pub used_bytes: u64,
    /// At most.
    pub limit_bytes: u64,
}

/// Why an entry was not entered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs)] // the messages are the docs
pub enum InsertError {
    #[error(transparent)]
    Overlap(#[from] Overlap),
    #[error(transparent)]
    NoRoom(#[from] NoRoom),
}

/// Two entries of one table overlap.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BuildError {
    /// Which, as given.
    pub first: usize,
    /// Which, as given; above `first`.
    pub second: usize,
    /// Its range.
    pub first_range: IovaRange,
    /// Its range.
    pub second_range: IovaRange,
}

/// A checked direct table that is not yet in force.
#[derive(Debug)]
pub struct DirectTable(Vec<Entry>);

impl DirectTable {
    /// Orders and checks.
    ///
    /// # Errors
    /// [`BuildError`] if two entries overlap.
    pub fn build(entries: Vec<Entry>) -> Result<DirectTable, BuildError> {
        let mut order: Vec<usize> = (0..entries.len()).collect();
        order.sort_by_key(|&index| entries[index].range.start());
        for pair in order.windows(2) {
            let (a, b) = (entries[pair[0]].range, entries[pair[1]].range);
            if a.overlaps(b) {
                let (first, second) = (pair[0].min(pair[1]), pair[0].max(pair[1]));
                return Err(BuildError {
                    first,
                    second,
                    first_range: entries[first].range,
                    second_range: entries[second].range,
                });
            }
        }
        Ok(DirectTable(
            order.into_iter().map(|index| entries[index]).collect(),
        ))
    }

    /// Its entries, by address.
    #[must_use]
    pub fn entries(&self) -> &[Entry] {
        &self.0
    }
}

/// What a new table changed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Replaced {
    /// Not there before.
    pub added: Vec<Entry>,
    /// Not there any more.
    pub removed: Vec<Entry>,
}

/// Where the bytes of a range are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Target {
    /// The region that backs this aperture.
    pub region: RegionId,
    /// Where in it, in bytes.
    pub offset_bytes: u64,
}

/// One entry of the IOTLB.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Exactly what is visible.
    pub range: IovaRange,
    /// Where it leads.
    pub target: Target,
    /// What the device side may do with it.
    pub perm: Perm,
}

/// Part of an entry that a translation needs, clipped to what was asked.
pub type Piece = Entry;

/// The entry that is in the way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{range} overlaps {hit}")]
pub struct Overlap {
    /// What was to be entered.
    pub range: IovaRange,
    /// What is there.
    pub hit: IovaRange,
}

/// Why a range has no translation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs)] // the messages are the docs
pub enum TranslateError {
    #[error("nothing is mapped at {at}")]
    Hole { at: Iova },
    #[error("{range} allows {perm}, not {want}")]
    Perm {
        range: IovaRange,
        perm: Perm,
        want: Perm,
    },
}

/// Exact ranges, never overlapping, and the number of their state.
#[derive(Debug, Default)]
pub struct Iotlb {
    /// By start.
    entries: BTreeMap<Iova, Entry>,
    /// Grows with every change.
    generation: u64,
}

impl Iotlb {
    /// Number of the present state.
    #[must_use]
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// Number of entries.
    #[must_use]
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Is nothing visible?
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// All entries, by address.
    pub fn entries(&self) -> impl Iterator<Item = &Entry> {
        self.entries.values()
    }

    /// Makes an entry visible.
    ///
    /// # Errors
    /// [`Overlap`], naming what is in the way; nothing is changed.
    pub fn insert(&mut self, entry: Entry) -> Result<(), InsertError> {
        if let Some(hit) = self.lookup(entry.range) {
            return Err(InsertError::Overlap(Overlap {
                range: entry.range,
                hit: hit.range,
            }));
        }
        self.entries.insert(entry.range.start(), entry);
        self.generation += 1;
        Ok(())
    }

    /// Direct entries from the one that covers `from` on, by address.
    pub fn direct_from(&self, from: Iova) -> impl Iterator<Item = &Entry> {
        let covering = self.entries.range(..from).next_back();
        let covering = covering
            .map(|(_, entry)| entry)
            .filter(move |entry| entry.range.last() >= from);
        let rest = self.entries.range(from..).map(|(_, entry)| entry);
        let all = covering.into_iter().chain(rest);
        all.filter(|entry| entry.target.region.slot().is_some())
    }

    /// Number of direct entries.
    #[must_use]
    pub fn direct_len(&self) -> usize {
        self.direct_from(Iova::new(0)).count()
    }

    /// Puts a direct table in the place of the old one.
    ///
    /// # Errors
    /// [`NoRoom`]; the old one stays.
    pub fn replace_direct(&mut self, table: DirectTable) -> Result<Replaced, NoRoom> {
        let old: Vec<_> = self.direct_from(Iova::new(0)).copied().collect();
        let added: Vec<_> = table
            .0
            .iter()
            .filter(|e| !old.contains(e))
            .copied()
            .collect();
        let removed: Vec<_> = old
            .iter()
            .filter(|e| !table.0.contains(e))
            .copied()
            .collect();
        if added.is_empty() && removed.is_empty() {
            return Ok(Replaced::default());
        }
        for entry in &removed {
            self.entries.remove(&entry.range.start());
        }
        for entry in &added {
            self.entries.insert(entry.range.start(), *entry);
        }
        self.generation += 1;
        Ok(Replaced { added, removed })
    }

    /// Bytes of the page table.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        0
    }

    /// Hides the entry that starts at `start`; `None` if there is none.
    pub fn remove(&mut self, start: Iova) -> Option<Entry> {
        let removed = self.entries.remove(&start)?;
        self.generation += 1;
        Some(removed)
    }

    /// The lowest entry that overlaps `range`, whole.
    #[must_use]
    pub fn lookup(&self, range: IovaRange) -> Option<&Entry> {
        let before = self
            .entries
            .range(..=range.start())
            .next_back()
            .map(|(_, entry)| entry);
        before
            .filter(|entry| entry.range.overlaps(range))
            .or_else(|| {
                self.entries
                    .range(range.start()..=range.last())
                    .next()
                    .map(|(_, entry)| entry)
            })
    }

    /// Pieces that together cover all of `range`, in order.
    ///
    /// # Errors
    /// [`TranslateError`] at the first hole or the first entry that allows too
    /// little; then no piece is given.
    pub fn translate(&self, range: IovaRange, want: Perm) -> Result<Vec<Piece>, TranslateError> {
        let mut pieces = Vec::new();
        let mut rest = range;
        loop {
            let at = rest.start();
            let entry = self.lookup(rest).filter(|entry| entry.range.start() <= at);
            let entry = entry.ok_or(TranslateError::Hole { at })?;
            if !entry.perm.allows(want) {
                return Err(TranslateError::Perm {
                    range: entry.range,
                    perm: entry.perm,
                    want,
                });
            }
            pieces.push(clip(entry, rest));
            if entry.range.last() >= range.last() {
                return Ok(pieces);
            }
            let next = entry
                .range
                .last()
                .checked_add(1)
                .expect("there is more above it");
            rest = IovaRange::new(next, range.last()).expect("there is more above it");
        }
    }

    /// Checks that no two entries overlap.
    ///
    /// # Panics
    /// If two do.
    pub fn check_invariants(&self) {
        let mut previous: Option<IovaRange> = None;
        for entry in self.entries.values() {
            assert!(
                previous.is_none_or(|p| p.last() < entry.range.start()),
                "{:?} overlaps",
                entry.range
            );
            previous = Some(entry.range);
        }
    }
}

/// The part of `entry` inside `window`; `window` starts inside `entry`.
fn clip(entry: &Entry, window: IovaRange) -> Piece {
    let last = entry.range.last().min(window.last());
    let skipped = window
        .start()
        .offset_from(entry.range.start())
        .expect("the window starts inside");
    Piece {
        range: IovaRange::new(window.start(), last).expect("the window starts inside"),
        target: Target {
            offset_bytes: entry.target.offset_bytes + skipped,
            ..entry.target
        },
        perm: entry.perm,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(start: u64, last: u64) -> IovaRange {
        IovaRange::new(Iova::new(start), Iova::new(last)).unwrap()
    }

    fn entry(start: u64, last: u64, perm: Perm) -> Entry {
        Entry {
            range: range(start, last),
            target: Target {
                region: RegionId::BOUNCE,
                offset_bytes: start,
            },
            perm,
        }
    }

    /// `[100, 199]` and `[200, 299]` touch; `[400, 499]` lies behind a hole.
    fn three() -> Iotlb {
        let mut iotlb = Iotlb::default();
        for (start, perm) in [
            (200, Perm::ReadWrite),
            (100, Perm::Read),
            (400, Perm::ReadWrite),
        ] {
            iotlb.insert(entry(start, start + 99, perm)).unwrap();
        }
        iotlb
    }

    #[test]
    fn an_overlap_is_refused_naming_what_is_there_and_changes_nothing() {
        let mut iotlb = three();
        let before = iotlb.generation();
        let refused = iotlb.insert(entry(299, 400, Perm::Read)).unwrap_err();
        assert!(matches!(refused, InsertError::Overlap(there) if there.hit == range(200, 299)));
        assert_eq!((iotlb.len(), iotlb.generation()), (3, before));
        iotlb.insert(entry(300, 399, Perm::Read)).unwrap();
        iotlb.check_invariants();
    }

    #[test]
    fn lookup_gives_the_lowest_overlapping_entry_whole() {
        let iotlb = three();
        assert_eq!(
            iotlb.lookup(range(150, 450)).unwrap().range,
            range(100, 199)
        );
        assert_eq!(iotlb.lookup(range(0, 100)).unwrap().range, range(100, 199));
        assert_eq!(
            iotlb.lookup(range(300, 400)).unwrap().range,
            range(400, 499)
        );
        assert!(iotlb.lookup(range(300, 399)).is_none());
    }

    #[test]
    fn a_translation_spans_neighbours_and_stops_at_a_hole() {
        let iotlb = three();
        let pieces = iotlb.translate(range(150, 249), Perm::Read).unwrap();
        let got: Vec<_> = pieces
            .iter()
            .map(|p| (p.range, p.target.offset_bytes))
            .collect();
        assert_eq!(got, [(range(150, 199), 150), (range(200, 249), 200)]);
        let hole = TranslateError::Hole { at: Iova::new(300) };
        assert_eq!(iotlb.translate(range(250, 450), Perm::Read), Err(hole));
        let hole = TranslateError::Hole { at: Iova::new(0) };
        assert_eq!(iotlb.translate(range(0, 150), Perm::Read), Err(hole));
    }

    #[test]
    fn a_translation_gives_no_more_than_the_entry_allows() {
        let refused = three()
            .translate(range(100, 250), Perm::ReadWrite)
            .unwrap_err();
        let expected = TranslateError::Perm {
            range: range(100, 199),
            perm: Perm::Read,
            want: Perm::ReadWrite,
        };
        assert_eq!(refused, expected);
    }

    #[test]
    fn every_change_has_a_generation_of_its_own() {
        let mut iotlb = three();
        assert_eq!(iotlb.generation(), 3);
        assert!(iotlb.remove(Iova::new(150)).is_none());
        assert_eq!(iotlb.generation(), 3);
        iotlb.remove(Iova::new(100)).unwrap();
        assert_eq!(iotlb.generation(), 4);
    }

    #[test]
    fn the_last_byte_of_the_space_translates() {
        let mut iotlb = Iotlb::default();
        iotlb
            .insert(entry(u64::MAX - 9, u64::MAX, Perm::Read))
            .unwrap();
        let pieces = iotlb
            .translate(range(u64::MAX, u64::MAX), Perm::Read)
            .unwrap();
        assert_eq!(pieces[0].range, range(u64::MAX, u64::MAX));
    }
}
