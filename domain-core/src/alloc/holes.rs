//! Free runs, by address. A stand-in until the real index is merged.

use std::collections::BTreeMap;
use std::ops::RangeInclusive;

/// Free runs of granules.
#[derive(Debug, Default)]
pub struct Holes(BTreeMap<u64, u64>);

impl Holes {
    /// None.
    #[must_use]
    pub fn new() -> Holes {
        Holes::default()
    }

    /// From runs by address.
    pub fn from_sorted(runs: impl Iterator<Item = (u64, u64)>) -> Holes {
        Holes(runs.collect())
    }

    /// The lowest place inside the window.
    pub fn first_fit(
        &mut self,
        want: u64,
        align_shift: u32,
        window: RangeInclusive<u64>,
    ) -> Option<u64> {
        self.0.iter().find_map(|(&start, &len)| {
            let align = 1u64.checked_shl(align_shift)?;
            let from = start.max(*window.start()).checked_next_multiple_of(align)?;
            let end = (start + len - 1).min(*window.end());
            (from <= end && end - from + 1 >= want).then_some(from)
        })
    }

    /// Takes a part of one run.
    pub fn take(&mut self, start: u64, len: u64) -> Option<()> {
        let (&run, &run_len) = self.0.range(..=start).next_back()?;
        if run + run_len < start + len {
            return None;
        }
        self.0.remove(&run);
        if run < start {
            self.0.insert(run, start - run);
        }
        if start + len < run + run_len {
            self.0.insert(start + len, run + run_len - start - len);
        }
        Some(())
    }

    /// Gives a run back.
    pub fn give(&mut self, mut start: u64, mut len: u64) {
        if let Some((&before, &before_len)) = self.0.range(..start).next_back()
            && before + before_len == start
        {
            self.0.remove(&before);
            start = before;
            len += before_len;
        }
        if let Some(behind) = self.0.remove(&(start + len)) {
            len += behind;
        }
        self.0.insert(start, len);
    }

    /// The longest part of a run inside the window.
    pub fn largest_in(&mut self, window: RangeInclusive<u64>) -> u64 {
        let part = |(&start, &len): (&u64, &u64)| {
            let end = (start + len - 1).min(*window.end());
            (end + 1).saturating_sub(start.max(*window.start()))
        };
        self.0.iter().map(part).max().unwrap_or(0)
    }

    /// All runs by address.
    pub fn iter(&self) -> impl Iterator<Item = (u64, u64)> {
        self.0.iter().map(|(&start, &len)| (start, len))
    }
}
