//! Since when direct mappings are visible.
//!
//! What was made after a ghost was fenced is out of its reach. So while a ghost
//! lives that has opened memory, it is noted when a direct mapping was made;
//! else there is nothing to tell apart, and nothing is noted, which keeps the
//! entries of the IOTLB as small as they are.

use std::collections::BTreeMap;

use crate::addr::Iova;
use crate::iotlb::{Entry, Replaced};

/// When direct mappings were made that some ghost cannot have seen.
#[derive(Debug, Default)]
pub(super) struct Made {
    /// By start. What is not here is older than every ghost that has opened memory.
    since: BTreeMap<Iova, u64>,
}

impl Made {
    /// The generation in which this mapping became visible; 0 if every ghost may
    /// have seen it.
    pub(super) fn since(&self, entry: &Entry) -> u64 {
        let since = self.since.get(&entry.range.start());
        since.copied().unwrap_or(0)
    }

    /// These are visible since `generation`.
    pub(super) fn enter(&mut self, entries: &[Entry], generation: u64) {
        let made = entries
            .iter()
            .map(|entry| (entry.range.start(), generation));
        self.since.extend(made);
    }

    pub(super) fn leave(&mut self, entries: &[Entry]) {
        if self.since.is_empty() {
            return;
        }
        for entry in entries {
            self.since.remove(&entry.range.start());
        }
    }

    /// A new table is visible since `generation`, in place of another; `until` is
    /// when the oldest of the ghosts was fenced.
    ///
    /// What a ghost has found in a mapping that is now cut, grown or moved inside
    /// its memory may be served by the new one in its place. That is as old as the
    /// oldest that it takes the place of, all of it.
    pub(super) fn replace(&mut self, replaced: &Replaced, generation: u64, until: u64) {
        let mut old = replaced.removed.as_slice();
        let mut made = Vec::new();
        for entry in &replaced.added {
            let start = entry.range.start();
            let below = old.iter().take_while(|was| was.range.last() < start);
            old = &old[below.count()..];
            let under = old.iter();
            let under = under.take_while(|was| was.range.start() <= entry.range.last());
            let same = under.filter(|was| was.target.region == entry.target.region);
            let since = same.map(|was| self.since(was)).fold(generation, u64::min);
            if since > until {
                made.push((start, since));
            }
        }
        self.leave(&replaced.removed);
        self.since.extend(made);
    }

    /// No ghost is left that has opened memory.
    pub(super) fn forget(&mut self) {
        self.since.clear();
    }

    /// Starts of mappings, and since when they are visible.
    pub(super) fn iter(&self) -> impl Iterator<Item = (Iova, u64)> {
        self.since.iter().map(|(start, since)| (*start, *since))
    }
}
