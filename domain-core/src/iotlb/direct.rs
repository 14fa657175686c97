//! A table of direct mappings, checked before it is put in place of another.

use std::cmp::Ordering;

use super::entry::Entry;
use super::ordered::Ordered;
use crate::addr::IovaRange;

/// Entries that ascend and do not overlap: a whole new table of direct mappings.
///
/// Built outside any lock; what depends on the domain is checked when it takes effect.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DirectTable(Vec<Entry>);

/// Two entries of one table overlap.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("entry {index}, {range}, overlaps entry {hit_index}, {hit}")]
pub struct BuildError {
    /// The later of the two, as they were given, counted from 0.
    pub index: usize,
    /// Its range.
    pub range: IovaRange,
    /// The earlier of the two.
    pub hit_index: usize,
    /// Its range.
    pub hit: IovaRange,
}

/// What became visible and what vanished. An entry that was changed is in both.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Replaced {
    /// By address.
    pub added: Vec<Entry>,
    /// By address.
    pub removed: Vec<Entry>,
}

impl DirectTable {
    /// Sorts and checks entries that come in any order.
    ///
    /// # Errors
    /// [`BuildError`], naming two entries that overlap.
    pub fn build(entries: Vec<Entry>) -> Result<DirectTable, BuildError> {
        if are_apart(&entries) {
            return Ok(DirectTable(entries));
        }
        // By number: moving whole entries about costs more than fetching each once.
        let mut order: Vec<_> = entries
            .iter()
            .enumerate()
            .map(|(index, entry)| (entry.range.start(), index))
            .collect();
        order.sort_unstable();
        let sorted: Vec<_> = order.iter().map(|(_, index)| entries[*index]).collect();
        match first_overlap(&sorted) {
            None => Ok(DirectTable(sorted)),
            Some(at) => Err(BuildError::of(&entries, order[at].1, order[at + 1].1)),
        }
    }

    /// By address.
    #[must_use]
    pub fn entries(&self) -> &[Entry] {
        &self.0
    }

    /// Number of entries.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Has it no entry?
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl BuildError {
    fn of(entries: &[Entry], one: usize, other: usize) -> BuildError {
        let (hit_index, index) = (one.min(other), one.max(other));
        BuildError {
            index,
            range: entries[index].range,
            hit_index,
            hit: entries[hit_index].range,
        }
    }
}

impl Replaced {
    /// What is in one table and not in the other.
    pub(super) fn between(old: &Ordered, new: &[Entry]) -> Replaced {
        // Address space for the worst case, given back below: growing in steps would copy.
        let mut replaced = Replaced {
            added: Vec::with_capacity(new.len()),
            removed: Vec::with_capacity(old.len()),
        };
        replaced.compare(old.iter(), new.iter().copied());
        replaced.added.shrink_to_fit();
        replaced.removed.shrink_to_fit();
        replaced
    }

    fn compare(&mut self, old: impl Iterator<Item = Entry>, new: impl Iterator<Item = Entry>) {
        let (mut old, mut new) = (old.peekable(), new.peekable());
        loop {
            let order = match (old.peek(), new.peek()) {
                (None, None) => return,
                (Some(_), None) => Ordering::Less,
                (None, Some(_)) => Ordering::Greater,
                (Some(was), Some(is)) => was.range.start().cmp(&is.range.start()),
            };
            let was = old.next_if(|_| order.is_le());
            let is = new.next_if(|_| order.is_ge());
            if was != is {
                self.removed.extend(was);
                self.added.extend(is);
            }
        }
    }
}

fn are_apart(entries: &[Entry]) -> bool {
    first_overlap(entries).is_none()
}

/// The first entry that does not end before the next one starts.
fn first_overlap(entries: &[Entry]) -> Option<usize> {
    entries
        .windows(2)
        .position(|pair| pair[0].range.last() >= pair[1].range.start())
}
