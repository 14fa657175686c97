//! Exact ranges, by address.

use std::borrow::Borrow;
use std::cmp::Ordering;
use std::collections::BTreeSet;
use std::ops::RangeBounds;

use super::entry::Entry;
use crate::addr::{Iova, IovaRange};

/// Entries that do not overlap, by address.
#[derive(Debug, Default)]
pub(super) struct Ordered(BTreeSet<ByStart>);

/// A set and not a map: the key is in the entry already, and 8 bytes an entry count.
#[derive(Debug)]
struct ByStart(Entry);

impl Ordered {
    /// Of entries that ascend and do not overlap. Takes no longer than copying them.
    pub(super) fn from_sorted(entries: &[Entry]) -> Ordered {
        Ordered(entries.iter().copied().map(ByStart).collect())
    }

    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &Entry> {
        self.0.iter().map(|by_start| &by_start.0)
    }

    /// Those that start in `starts`.
    pub(super) fn starting_in(
        &self,
        starts: impl RangeBounds<Iova>,
    ) -> impl Iterator<Item = &Entry> {
        self.0.range(starts).map(|by_start| &by_start.0)
    }

    /// Adds an entry. That it overlaps none is the caller's promise.
    pub(super) fn insert(&mut self, entry: Entry) {
        let is_new = self.0.insert(ByStart(entry));
        assert!(is_new, "the page table found no entry there");
    }

    /// Takes out the entry that starts exactly there.
    pub(super) fn remove(&mut self, start: Iova) -> Option<Entry> {
        self.0.take(&start).map(|by_start| by_start.0)
    }

    /// The entry that starts exactly there.
    pub(super) fn at(&self, start: Iova) -> Option<&Entry> {
        self.0.get(&start).map(|by_start| &by_start.0)
    }

    /// The entry that an address lies in.
    pub(super) fn holding(&self, iova: Iova) -> Option<&Entry> {
        let ByStart(entry) = self.0.range(..=iova).next_back()?;
        (entry.range.last() >= iova).then_some(entry)
    }

    /// The lowest entry that overlaps `range`.
    pub(super) fn lookup(&self, range: IovaRange) -> Option<&Entry> {
        self.holding(range.start())
            .or_else(|| self.starting_in(range.start()..=range.last()).next())
    }
}

impl Borrow<Iova> for ByStart {
    fn borrow(&self) -> &Iova {
        self.0.range.start_ref()
    }
}

impl Ord for ByStart {
    fn cmp(&self, other: &ByStart) -> Ordering {
        self.0.range.start().cmp(&other.0.range.start())
    }
}

impl PartialOrd for ByStart {
    fn partial_cmp(&self, other: &ByStart) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for ByStart {
    fn eq(&self, other: &ByStart) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for ByStart {}
