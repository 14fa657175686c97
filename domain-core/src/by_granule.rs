//! Values by the granule at which they begin, in a range that is known beforehand.
//!
//! An ordered map for what lies in the apertures. Where a tree would go down three levels and split
//! and join nodes, this is one look at an array: an aperture has memory behind every granule, so four
//! bytes for each of them are a thousandth of what is there anyway. They come in shelves of 512
//! granules when the first value of a shelf does, and stay: whoever maps and unmaps allocates
//! nothing. Bits say which places are taken, so that neighbours are found without a look at each.

use std::ops::Index;

use slab::Slab;

use crate::addr::{Granule, Iova, IovaRange};

/// Values that begin in different granules, by address.
#[derive(Debug)]
pub(crate) struct ByGranule<T> {
    granule: Granule,
    /// Number of the first granule.
    first: u64,
    shelves: Vec<Option<Box<Shelf>>>,
    /// A bit for each shelf: is something there?
    used: Vec<u64>,
    values: Slab<T>,
}

const SHELF_GRANULES: usize = 512;
const WORD_BITS: usize = 64;
const EMPTY: [u64; SHELF_GRANULES / WORD_BITS] = [0; SHELF_GRANULES / WORD_BITS];

/// Some granules that follow one another.
#[derive(Debug)]
struct Shelf {
    /// A bit for each granule: does a value begin there?
    used: [u64; SHELF_GRANULES / WORD_BITS],
    /// Keys of values. Those whose bit is not set mean nothing.
    keys: [u32; SHELF_GRANULES],
}

/// Where a granule has its place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Place {
    shelf: usize,
    granule: usize,
}

impl<T> ByGranule<T> {
    /// Nothing, in a range of whole granules; without one nothing can ever be added.
    pub(crate) fn new(range: Option<IovaRange>, granule: Granule) -> ByGranule<T> {
        let number = |iova: Iova| iova.get() >> granule.shift();
        let first = range.map_or(0, |range| number(range.start()));
        let granules = range.map_or(0, |range| number(range.last()) - first + 1);
        let shelves = granules.div_ceil(SHELF_GRANULES as u64);
        let shelves = usize::try_from(shelves).expect("an aperture has memory behind it");
        ByGranule {
            granule,
            first,
            shelves: (0..shelves).map(|_| None).collect(),
            used: vec![0; shelves.div_ceil(WORD_BITS)],
            values: Slab::new(),
        }
    }

    pub(crate) fn len(&self) -> usize {
        self.values.len()
    }

    /// The value that begins in the granule of `at`.
    #[inline]
    pub(crate) fn get(&self, at: Iova) -> Option<&T> {
        self.values.get(self.key(at)?)
    }

    /// As [`get`](ByGranule::get).
    #[inline]
    pub(crate) fn get_mut(&mut self, at: Iova) -> Option<&mut T> {
        let key = self.key(at)?;
        self.values.get_mut(key)
    }

    /// Adds a value that begins in the granule of `at`.
    ///
    /// # Panics
    /// If one does already, or if it lies outside of the range.
    #[inline]
    pub(crate) fn insert(&mut self, at: Iova, value: T) {
        let place = self.place(at);
        let Place { shelf, granule } = place.expect("it lies in the range");
        let there = self.shelves[shelf].get_or_insert_with(Shelf::empty);
        assert!(!bit(&there.used, granule), "nothing begins at {at} yet");
        let key = self.values.insert(value);
        there.keys[granule] = u32::try_from(key).expect("quotas are far below");
        set_bit(&mut there.used, granule);
        set_bit(&mut self.used, shelf);
    }

    /// Takes out the value that begins in the granule of `at`.
    #[inline]
    pub(crate) fn remove(&mut self, at: Iova) -> Option<T> {
        let Place { shelf, granule } = self.place(at)?;
        let there = self.shelves[shelf].as_mut()?;
        if !bit(&there.used, granule) {
            return None;
        }
        clear_bit(&mut there.used, granule);
        if there.used == EMPTY {
            clear_bit(&mut self.used, shelf);
        }
        Some(self.values.remove(there.keys[granule] as usize))
    }

    /// The value that begins last in the granule of `at` or below; `None` outside of the range, where
    /// nothing that begins inside can lie.
    pub(crate) fn at_or_below(&self, at: Iova) -> Option<&T> {
        let place = self.place(at)?;
        let same = self.shelf(place.shelf);
        let same = same.and_then(|shelf| last_bit(&shelf.used, place.granule));
        let found = match same {
            Some(granule) => Place { granule, ..place },
            None => {
                let shelf = last_bit(&self.used, place.shelf.checked_sub(1)?)?;
                let granule = last_bit(&self.shelf(shelf)?.used, SHELF_GRANULES - 1)?;
                Place { shelf, granule }
            }
        };
        Some(&self.values[self.key_at(found)?])
    }

    /// Values that begin in the granule of `from` or above, by address, each with its granule.
    pub(crate) fn from(&self, from: Iova) -> impl Iterator<Item = (Iova, &T)> {
        let mut next = self.next_place(from);
        std::iter::from_fn(move || {
            let place = next?;
            next = self.next_used(Place {
                granule: place.granule + 1,
                ..place
            });
            let key = self.key_at(place).expect("its bit is set");
            Some((self.iova(place), &self.values[key]))
        })
    }

    /// All values, by address, each with its granule.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (Iova, &T)> {
        self.from(Iova::new(0))
    }

    /// All values, by address.
    pub(crate) fn values(&self) -> impl Iterator<Item = &T> {
        self.iter().map(|(_, value)| value)
    }

    /// All values, in no order.
    pub(crate) fn values_mut(&mut self) -> impl Iterator<Item = &mut T> {
        self.values.iter_mut().map(|(_, value)| value)
    }

    #[inline]
    fn place(&self, at: Iova) -> Option<Place> {
        let number = (at.get() >> self.granule.shift()).checked_sub(self.first)?;
        let number = usize::try_from(number).ok()?;
        let shelf = number / SHELF_GRANULES;
        (shelf < self.shelves.len()).then_some(Place {
            shelf,
            granule: number % SHELF_GRANULES,
        })
    }

    fn iova(&self, place: Place) -> Iova {
        let number = place.shelf * SHELF_GRANULES + place.granule;
        Iova::new((self.first + number as u64) << self.granule.shift())
    }

    fn shelf(&self, shelf: usize) -> Option<&Shelf> {
        self.shelves[shelf].as_deref()
    }

    #[inline]
    fn key(&self, at: Iova) -> Option<usize> {
        self.key_at(self.place(at)?)
    }

    #[inline]
    fn key_at(&self, Place { shelf, granule }: Place) -> Option<usize> {
        let there = self.shelf(shelf)?;
        bit(&there.used, granule).then(|| there.keys[granule] as usize)
    }

    /// The first place at `from` or above, taken or not; `None` above the range.
    fn next_place(&self, from: Iova) -> Option<Place> {
        let start = Iova::new(self.first << self.granule.shift());
        self.next_used(self.place(from.max(start))?)
    }

    /// The first taken place at `from`, which may be the end of its shelf, or above.
    fn next_used(&self, from: Place) -> Option<Place> {
        let same = self.shelf(from.shelf);
        let same = same.and_then(|shelf| next_bit(&shelf.used, from.granule));
        if let Some(granule) = same {
            return Some(Place { granule, ..from });
        }
        let shelf = next_bit(&self.used, from.shelf + 1)?;
        let granule = next_bit(&self.shelf(shelf)?.used, 0)?;
        Some(Place { shelf, granule })
    }
}

impl<T> Index<&Iova> for ByGranule<T> {
    type Output = T;

    #[inline]
    fn index(&self, at: &Iova) -> &T {
        self.get(*at).expect("something begins there")
    }
}

impl Shelf {
    #[cold]
    fn empty() -> Box<Shelf> {
        Box::new(Shelf {
            used: EMPTY,
            keys: [0; SHELF_GRANULES],
        })
    }
}

#[inline]
fn bit(words: &[u64], at: usize) -> bool {
    words[at / WORD_BITS] >> (at % WORD_BITS) & 1 == 1
}

#[inline]
fn set_bit(words: &mut [u64], at: usize) {
    words[at / WORD_BITS] |= 1 << (at % WORD_BITS);
}

#[inline]
fn clear_bit(words: &mut [u64], at: usize) {
    words[at / WORD_BITS] &= !(1 << (at % WORD_BITS));
}

/// The first bit that is set at `from` or above.
fn next_bit(words: &[u64], from: usize) -> Option<usize> {
    let mut index = from / WORD_BITS;
    let mut word = words.get(index)? & (u64::MAX << (from % WORD_BITS));
    while word == 0 {
        index += 1;
        word = *words.get(index)?;
    }
    Some(index * WORD_BITS + word.trailing_zeros() as usize)
}

/// The last bit that is set at `from` or below.
fn last_bit(words: &[u64], from: usize) -> Option<usize> {
    let mut index = from / WORD_BITS;
    let mut word = words[index] & (u64::MAX >> (WORD_BITS - 1 - from % WORD_BITS));
    while word == 0 {
        index = index.checked_sub(1)?;
        word = words[index];
    }
    Some(index * WORD_BITS + WORD_BITS - 1 - word.leading_zeros() as usize)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    const P: u64 = 4096;

    fn range(first: u64, granules: u64) -> IovaRange {
        IovaRange::from_len(Iova::new(first * P), granules * P).unwrap()
    }

    fn map(first: u64, granules: u64) -> ByGranule<u64> {
        ByGranule::new(Some(range(first, granules)), Granule::Size4K)
    }

    #[test]
    fn outside_of_the_range_nothing_begins() {
        let map = map(2, 600);
        for outside in [0, P, 2 * P - 1, (2 + 1024) * P, u64::MAX] {
            assert_eq!(map.get(Iova::new(outside)), None);
        }
        assert_eq!(map.at_or_below(Iova::new(P)), None);
        assert_eq!(map.from(Iova::new(u64::MAX)).count(), 0);
        let none = ByGranule::<u64>::new(None, Granule::Size4K);
        assert_eq!((none.get(Iova::new(0)), none.iter().count()), (None, 0));
    }

    #[test]
    #[should_panic(expected = "nothing begins at 0x3000 yet")]
    fn two_that_begin_in_one_granule_are_a_bug() {
        let mut map = map(2, 600);
        map.insert(Iova::new(3 * P + 5), 1);
        map.insert(Iova::new(3 * P), 2);
    }

    #[test]
    fn what_is_added_and_taken_out_again_and_again_needs_no_more_room() {
        let mut map = map(2, 600);
        let cycle = |map: &mut ByGranule<u64>| {
            (2..602).for_each(|number| map.insert(Iova::new(number * P), number));
            (2..602).for_each(|number| assert_eq!(map.remove(Iova::new(number * P)), Some(number)));
        };
        cycle(&mut map);
        let room = map.values.capacity();
        (0..10).for_each(|_| cycle(&mut map));
        assert_eq!((map.values.capacity(), map.len()), (room, 0));
    }

    #[derive(Clone, Copy, Debug)]
    enum Op {
        Insert,
        Remove,
        Look,
    }

    proptest! {
        #[test]
        fn it_is_an_ordered_map(
            ops in prop::collection::vec((0..3_u8, 0..2048_u64, 0..P), 1..400),
            first in prop::sample::select(vec![0, 1, 7, 511, 512, 1 << 40]),
        ) {
            // Two thirds of the places are near each other, the others anywhere in five shelves.
            let mut ours = map(first, 2500);
            let mut model = BTreeMap::new();
            for (op, number, inside) in ops {
                let number = first + if number % 3 == 0 { number } else { number % 16 };
                let at = Iova::new(number * P + inside);
                let op = [Op::Insert, Op::Remove, Op::Look][usize::from(op)];
                match op {
                    Op::Insert if !model.contains_key(&number) => {
                        ours.insert(at, number);
                        model.insert(number, number);
                    }
                    Op::Remove => prop_assert_eq!(ours.remove(at), model.remove(&number)),
                    Op::Insert | Op::Look => {}
                }
                prop_assert_eq!(ours.get(at), model.get(&number));
                let below = model.range(..=number).next_back().map(|(_, value)| value);
                prop_assert_eq!(ours.at_or_below(at), below);
                let above: Vec<_> = model.range(number..).map(|(at, value)| (Iova::new(at * P), value)).collect();
                prop_assert_eq!(ours.from(at).collect::<Vec<_>>(), above);
                prop_assert_eq!(ours.len(), model.len());
            }
            prop_assert!(ours.values().eq(model.values()));
            prop_assert_eq!(ours.values_mut().count(), model.len());
        }
    }
}
