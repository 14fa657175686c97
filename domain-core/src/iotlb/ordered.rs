//! Exact ranges, by address.

use std::collections::BTreeMap;
use std::ops::RangeBounds;

use super::entry::{Entry, Target};
use super::format::Word;
use super::table::Run;
use crate::addr::{Granule, Iova, IovaRange};

/// Entries that do not overlap, by address.
///
/// Packed, because bytes an entry count: 24 with the key, not the 40 of an [`Entry`]. What comes out
/// is a copy.
#[derive(Debug)]
pub(super) struct Ordered {
    granule: Granule,
    by_start: BTreeMap<Iova, Packed>,
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
    pub(super) fn new(granule: Granule) -> Ordered {
        Ordered {
            granule,
            by_start: BTreeMap::new(),
        }
    }

    /// Of entries that ascend and do not overlap. Takes no longer than copying them.
    pub(super) fn from_sorted(granule: Granule, entries: &[Entry]) -> Ordered {
        let packed = entries.iter().map(|entry| pack(entry, granule));
        Ordered {
            granule,
            by_start: packed.collect(),
        }
    }

    pub(super) fn len(&self) -> usize {
        self.by_start.len()
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = Entry> {
        let packed = self.by_start.iter();
        packed.map(|(start, packed)| packed.unpack(*start, self.granule))
    }

    /// Those that start in `starts`.
    pub(super) fn starting_in(
        &self,
        starts: impl RangeBounds<Iova>,
    ) -> impl Iterator<Item = Entry> {
        let packed = self.by_start.range(starts);
        packed.map(|(start, packed)| packed.unpack(*start, self.granule))
    }

    /// Adds an entry. That it overlaps none, and that it fits into leaves, is the caller's promise.
    pub(super) fn insert(&mut self, entry: Entry) {
        let (start, packed) = pack(&entry, self.granule);
        let was = self.by_start.insert(start, packed);
        assert!(was.is_none(), "the page table found no entry there");
    }

    /// Takes out the entry that starts exactly there.
    pub(super) fn remove(&mut self, start: Iova) -> Option<Entry> {
        let packed = self.by_start.remove(&start)?;
        Some(packed.unpack(start, self.granule))
    }

    /// The entry that starts exactly there.
    pub(super) fn at(&self, start: Iova) -> Option<Entry> {
        let packed = self.by_start.get(&start)?;
        Some(packed.unpack(start, self.granule))
    }

    /// The entry that an address lies in.
    pub(super) fn holding(&self, iova: Iova) -> Option<Entry> {
        let (start, packed) = self.by_start.range(..=iova).next_back()?;
        (packed.last >= iova).then(|| packed.unpack(*start, self.granule))
    }

    /// The lowest entry that overlaps `range`.
    pub(super) fn lookup(&self, range: IovaRange) -> Option<Entry> {
        self.holding(range.start())
            .or_else(|| self.starting_in(range.start()..=range.last()).next())
    }
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
                    let mut ordered = Ordered::new(granule);
                    ordered.insert(entry);
                    assert_eq!(ordered.at(start), Some(entry));
                }
            }
        }
    }
}
