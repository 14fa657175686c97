//! Exact ranges, by address.

use std::collections::BTreeMap;
use std::ops::{Bound, RangeBounds};

use super::entry::{Entry, Target};
use super::format::Word;
use super::table::Run;
use crate::addr::{Granule, Iova, IovaRange};
use crate::by_granule::ByGranule;

/// Entries that share no granule, by address.
///
/// Packed, because bytes an entry count: 24 with the key, not the 40 of an [`Entry`]. What comes out
/// is a copy.
#[derive(Debug)]
pub(super) struct Ordered {
    granule: Granule,
    entries: Entries,
}

#[derive(Debug)]
enum Entries {
    /// Anywhere in 64 bits.
    Anywhere(BTreeMap<Iova, Packed>),
    /// In a range that is no longer than the memory behind it. With their starts, which may lie
    /// inside of a granule.
    Within(ByGranule<(Iova, Packed)>),
}

/// All of an entry but its start.
#[derive(Clone, Copy, Debug)]
struct Packed {
    last: Iova,
    /// What the page table holds for its first granule. An entry starts as far inside a granule as
    /// its target does.
    leaf: Word,
}

impl Ordered {
    /// For entries anywhere.
    pub(super) fn anywhere(granule: Granule) -> Ordered {
        let entries = Entries::Anywhere(BTreeMap::new());
        Ordered { granule, entries }
    }

    /// For entries in a range that has memory behind all of it. Those come and go for nearly nothing.
    pub(super) fn within(range: Option<IovaRange>, granule: Granule) -> Ordered {
        let entries = Entries::Within(ByGranule::new(range, granule));
        Ordered { granule, entries }
    }

    /// Of entries anywhere that ascend and do not overlap. Takes no longer than copying them.
    pub(super) fn from_sorted(granule: Granule, entries: &[Entry]) -> Ordered {
        let packed = entries.iter().map(|entry| pack(entry, granule));
        let entries = Entries::Anywhere(packed.collect());
        Ordered { granule, entries }
    }

    pub(super) fn len(&self) -> usize {
        match &self.entries {
            Entries::Anywhere(by_start) => by_start.len(),
            Entries::Within(by_granule) => by_granule.len(),
        }
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = Entry> {
        self.starting_in(..)
    }

    /// Those that start in `starts`.
    pub(super) fn starting_in(
        &self,
        starts: impl RangeBounds<Iova> + Clone,
    ) -> impl Iterator<Item = Entry> {
        let (anywhere, within) = match &self.entries {
            Entries::Anywhere(by_start) => (Some(by_start.range(starts)), None),
            Entries::Within(by_granule) => (None, Some(started_in(by_granule, starts))),
        };
        let anywhere = anywhere.into_iter().flatten();
        let anywhere = anywhere.map(|(start, packed)| (*start, *packed));
        let packed = anywhere.chain(within.into_iter().flatten());
        packed.map(|(start, packed)| packed.unpack(start, self.granule))
    }

    /// Adds an entry. That it overlaps none, and that it fits into leaves, is the caller's promise.
    pub(super) fn insert(&mut self, entry: Entry) {
        let (start, packed) = pack(&entry, self.granule);
        match &mut self.entries {
            Entries::Anywhere(by_start) => {
                let was = by_start.insert(start, packed);
                assert!(was.is_none(), "the page table found no entry there");
            }
            Entries::Within(by_granule) => by_granule.insert(start, (start, packed)),
        }
    }

    /// Takes out the entry that starts exactly there.
    pub(super) fn remove(&mut self, start: Iova) -> Option<Entry> {
        let packed = match &mut self.entries {
            Entries::Anywhere(by_start) => by_start.remove(&start)?,
            Entries::Within(by_granule) => {
                let (at, packed) = by_granule.remove(start)?;
                if at != start {
                    by_granule.insert(at, (at, packed));
                    return None;
                }
                packed
            }
        };
        Some(packed.unpack(start, self.granule))
    }

    /// The entry that starts exactly there.
    pub(super) fn at(&self, start: Iova) -> Option<Entry> {
        let packed = match &self.entries {
            Entries::Anywhere(by_start) => by_start.get(&start),
            Entries::Within(by_granule) => {
                let found = by_granule.get(start).filter(|(at, _)| *at == start);
                found.map(|(_, packed)| packed)
            }
        };
        Some(packed?.unpack(start, self.granule))
    }

    /// The entry that an address lies in.
    pub(super) fn holding(&self, iova: Iova) -> Option<Entry> {
        let below = match &self.entries {
            Entries::Anywhere(by_start) => {
                let below = by_start.range(..=iova).next_back();
                below.map(|(start, packed)| (*start, *packed))
            }
            Entries::Within(by_granule) => by_granule.at_or_below(iova).copied(),
        };
        // What begins in the same granule may begin above, and then nothing else lies there.
        let (start, packed) =
            below.filter(|(start, packed)| *start <= iova && packed.last >= iova)?;
        Some(packed.unpack(start, self.granule))
    }

    /// The lowest entry that overlaps `range`.
    pub(super) fn lookup(&self, range: IovaRange) -> Option<Entry> {
        self.holding(range.start())
            .or_else(|| self.starting_in(range.start()..=range.last()).next())
    }
}

/// Those that start in `starts`, by address.
fn started_in(
    by_granule: &ByGranule<(Iova, Packed)>,
    starts: impl RangeBounds<Iova> + Clone,
) -> impl Iterator<Item = (Iova, Packed)> {
    let from = match starts.start_bound() {
        Bound::Included(from) | Bound::Excluded(from) => *from,
        Bound::Unbounded => Iova::new(0),
    };
    let is_above = {
        let starts = starts.clone();
        move |start: Iova| match starts.end_bound() {
            Bound::Included(last) => start > *last,
            Bound::Excluded(end) => start >= *end,
            Bound::Unbounded => false,
        }
    };
    let near = by_granule.from(from).map(|(_, entry)| *entry);
    near.take_while(move |(start, _)| !is_above(*start))
        .filter(move |(start, _)| starts.contains(start))
}

fn pack(entry: &Entry, granule: Granule) -> (Iova, Packed) {
    let packed = Packed {
        last: entry.range.last(),
        leaf: Word::leaf(Run::of(entry, granule).leaf),
    };
    let start = entry.range.start();
    debug_assert_eq!(packed.unpack(start, granule), *entry, "nothing is lost");
    (start, packed)
}

impl Packed {
    #[inline]
    fn unpack(self, start: Iova, granule: Granule) -> Entry {
        let leaf = self.leaf.as_leaf().expect("packed as a leaf");
        let inside = granule.offset_in(start.get());
        Entry {
            range: IovaRange::new(start, self.last).expect("packed from a range"),
            target: Target {
                region: leaf.region,
                offset_bytes: leaf.offset_granules << granule.shift() | inside,
            },
            perm: leaf.perm,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::iotlb::RegionId;
    use crate::iotlb::format::OFFSET_GRANULES;
    use crate::perm::Perm;

    #[test]
    fn an_entry_comes_back_from_24_bytes_whatever_its_granule_and_its_place_in_it() {
        assert_eq!(size_of::<Iova>() + size_of::<Packed>(), 24);
        let perms = [Perm::Read, Perm::Write, Perm::ReadWrite];
        for (granule, perm) in [Granule::Size4K, Granule::Size64K, Granule::Size2M]
            .into_iter()
            .zip(perms)
        {
            for inside in [0, 1, granule.bytes() - 1] {
                for offset_granules in [0, 1, OFFSET_GRANULES - 1] {
                    let start = Iova::new(granule.bytes() * 7 + inside);
                    let entry = Entry {
                        range: IovaRange::new(start, Iova::new(u64::MAX)).unwrap(),
                        target: Target {
                            region: RegionId::from_number(RegionId::MOST).unwrap(),
                            offset_bytes: offset_granules * granule.bytes() + inside,
                        },
                        perm,
                    };
                    let mut ordered = Ordered::anywhere(granule);
                    ordered.insert(entry);
                    assert_eq!(ordered.at(start), Some(entry));
                }
            }
        }
    }
}
