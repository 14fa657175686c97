//! Where direct mappings may lie: the domain's space without its apertures and
//! without what was reserved.
//!
//! Reserved ranges bind every direct mapping, allowed ranges only those that
//! are placed automatically. Automatic placement takes the lowest place that
//! fits, from the index of free runs that the allocators use too; it costs the
//! same whatever else is mapped.

use crate::addr::{Granule, Iova, IovaRange};
use crate::alloc::AllocError;
use crate::alloc::holes::Holes;
use crate::layout::Layout;

/// Reserved and allowed ranges of one domain, each list ordered and disjoint.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Restrictions {
    reserved: Vec<IovaRange>,
    allowed: Vec<IovaRange>,
}

/// Why a list of ranges was not taken. The old one stays.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs)] // the messages are the docs
pub enum RestrictionError {
    #[error("{one} and {other} of one list overlap")]
    Overlapping { one: IovaRange, other: IovaRange },
    #[error("the allowed range {range} holds a single byte")]
    SingleByte { range: IovaRange },
    #[error("{ranges} ranges in one list, at most {most} are taken")]
    TooMany { ranges: usize, most: usize },
    #[error("the reserved range {range} touches {hit}, which is in use")]
    InUse { range: IovaRange, hit: IovaRange },
}

/// Ranges of one list.
pub const RESTRICTIONS: usize = 1024;

impl Restrictions {
    /// Both lists, in any order.
    ///
    /// # Errors
    /// [`RestrictionError`] for ranges of one list that overlap, for an allowed
    /// range of a single byte, and for too many.
    pub fn new(
        reserved: Vec<IovaRange>,
        allowed: Vec<IovaRange>,
    ) -> Result<Restrictions, RestrictionError> {
        let single = |range: &&IovaRange| range.start() == range.last();
        if let Some(&range) = allowed.iter().find(single) {
            return Err(RestrictionError::SingleByte { range });
        }
        Ok(Restrictions {
            reserved: ordered(reserved)?,
            allowed: ordered(allowed)?,
        })
    }

    /// Where no direct mapping may lie.
    #[must_use]
    pub fn reserved(&self) -> &[IovaRange] {
        &self.reserved
    }

    /// Where direct mappings are placed that name no iova; empty: anywhere.
    #[must_use]
    pub fn allowed(&self) -> &[IovaRange] {
        &self.allowed
    }

    /// Where direct mappings may lie in a new domain, before there is one.
    ///
    /// # Errors
    /// [`RestrictionError::InUse`] for a reserved range over an aperture.
    pub fn plan(&self, layout: &Layout) -> Result<Vec<IovaRange>, RestrictionError> {
        let mut space = Space::new(layout, Restrictions::default());
        space.restrict(self.clone(), &[])?;
        Ok(space.ranges())
    }
}

fn ordered(mut ranges: Vec<IovaRange>) -> Result<Vec<IovaRange>, RestrictionError> {
    if ranges.len() > RESTRICTIONS {
        return Err(RestrictionError::TooMany {
            ranges: ranges.len(),
            most: RESTRICTIONS,
        });
    }
    ranges.sort_by_key(|range| range.start());
    match ranges.windows(2).find(|pair| pair[0].overlaps(pair[1])) {
        Some(pair) => Err(RestrictionError::Overlapping {
            one: pair[0],
            other: pair[1],
        }),
        None => Ok(ranges),
    }
}

/// The lowest of some disjoint ranges, by address, that overlaps a range.
fn first_overlapping(ranges: &[IovaRange], range: IovaRange) -> Option<IovaRange> {
    let behind = ranges.partition_point(|there| there.last() < range.start());
    let there = ranges.get(behind).copied();
    there.filter(|there| there.overlaps(range))
}

/// Why no direct mapping may lie at a given place.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs)] // the messages are the docs
pub enum PlaceError {
    #[error("{range} reaches past the domain's last address {limit}")]
    PastLimit { range: IovaRange, limit: Iova },
    #[error("{range} touches the reserved range {reserved}")]
    Reserved {
        range: IovaRange,
        reserved: IovaRange,
    },
    #[error("{range} overlaps the domain's apertures {apertures}")]
    Aperture {
        range: IovaRange,
        apertures: IovaRange,
    },
}

/// The place for direct mappings in one domain.
#[derive(Debug)]
pub(crate) struct Space {
    granule: Granule,
    limit: Iova,
    apertures: Option<IovaRange>,
    restrictions: Restrictions,
    /// Whole granules that are neither an aperture's, nor reserved, nor mapped,
    /// nor the first of a space that starts at 0.
    free: Holes,
}

impl Space {
    /// All of it is free.
    pub(crate) fn new(layout: &Layout, restrictions: Restrictions) -> Space {
        let mut space = Space {
            granule: layout.granule(),
            limit: layout.limit(),
            apertures: layout.apertures(),
            restrictions,
            free: Holes::new(),
        };
        space.refill(std::iter::empty());
        space
    }

    pub(crate) fn restrictions(&self) -> &Restrictions {
        &self.restrictions
    }

    /// The space up to the limit without apertures and reserved ranges, mapped
    /// or not.
    pub(crate) fn ranges(&self) -> Vec<IovaRange> {
        self.gaps(std::iter::empty())
    }

    /// May a direct mapping lie there, as far as the plan is concerned?
    pub(crate) fn check(&self, range: IovaRange) -> Result<(), PlaceError> {
        let limit = self.limit;
        if range.last() > limit {
            return Err(PlaceError::PastLimit { range, limit });
        }
        if let Some(apertures) = self.apertures.filter(|there| there.overlaps(range)) {
            return Err(PlaceError::Aperture { range, apertures });
        }
        match first_overlapping(&self.restrictions.reserved, range) {
            Some(reserved) => Err(PlaceError::Reserved { range, reserved }),
            None => Ok(()),
        }
    }

    /// The lowest free place for so many bytes, a multiple of the granule. It
    /// is not taken yet.
    pub(crate) fn place(
        &mut self,
        len_bytes: u64,
        align_bytes: u64,
        limit: Option<Iova>,
    ) -> Result<IovaRange, AllocError> {
        if len_bytes == 0 {
            return Err(AllocError::ZeroLength);
        }
        if align_bytes != 0 && !align_bytes.is_power_of_two() {
            return Err(AllocError::BadAlignment { align_bytes });
        }
        let align = align_bytes.max(self.granule.bytes());
        let shift = self.granule.shift();
        let want = len_bytes >> shift;
        let align_shift = align.trailing_zeros() - shift;
        let windows = self.windows(limit.unwrap_or(self.limit));
        let found = windows
            .iter()
            .find_map(|window| self.free.first_fit(want, align_shift, window.0..=window.1));
        match found {
            Some(first) => Ok(IovaRange::from_len(Iova::new(first << shift), len_bytes)
                .expect("a hole lies inside the space")),
            None => Err(AllocError::NoSpace {
                want_bytes: len_bytes,
                align_bytes: align,
                largest_hole_bytes: self.largest_in(&windows) << shift,
            }),
        }
    }

    /// Takes a place that is free.
    pub(crate) fn take(&mut self, range: IovaRange) {
        if let Some((first, len)) = self.granules(range) {
            let was_free = self.free.take(first, len);
            assert!(was_free, "what nobody has mapped is free");
        }
    }

    /// Gives a place back.
    pub(crate) fn give(&mut self, range: IovaRange) {
        if let Some((first, len)) = self.granules(range) {
            self.free.give(first, len);
        }
    }

    /// Other restrictions, for a space in which these ranges are mapped, by
    /// address.
    ///
    /// # Errors
    /// [`RestrictionError::InUse`] for a reserved range over one of them or over
    /// an aperture; nothing is changed.
    pub(crate) fn restrict(
        &mut self,
        restrictions: Restrictions,
        mapped: &[IovaRange],
    ) -> Result<(), RestrictionError> {
        for &range in &restrictions.reserved {
            let hit = self.apertures.filter(|there| there.overlaps(range));
            let hit = hit.or_else(|| first_overlapping(mapped, range));
            if let Some(hit) = hit {
                return Err(RestrictionError::InUse { range, hit });
            }
        }
        self.restrictions = restrictions;
        self.refill(mapped.iter().copied());
        Ok(())
    }

    /// Makes the free runs anew, for a space in which these ranges are mapped,
    /// by address.
    pub(crate) fn refill(&mut self, mapped: impl Iterator<Item = IovaRange>) {
        let gaps = self.gaps(mapped);
        let runs = gaps.into_iter().filter_map(|gap| self.whole_granules(gap));
        self.free = Holes::from_sorted(runs);
    }

    /// What no mapping, aperture or reserved range covers, by address.
    fn gaps(&self, mapped: impl Iterator<Item = IovaRange>) -> Vec<IovaRange> {
        let mut taken: Vec<_> = self.restrictions.reserved.clone();
        taken.extend(self.apertures);
        taken.extend(mapped);
        taken.sort_by_key(|range| range.start());
        let mut gaps = Vec::with_capacity(taken.len() + 1);
        // `None` once everything up to 2^64-1 is taken.
        let mut next = Some(Iova::new(0));
        for range in taken {
            let Some(from) = next else { break };
            let before = range.start().get().checked_sub(1).map(Iova::new);
            if let Some(Ok(gap)) = before.map(|last| IovaRange::new(from, last.min(self.limit))) {
                gaps.push(gap);
            }
            next = range.last().checked_add(1).map(|behind| behind.max(from));
        }
        if let Some(Ok(gap)) = next.map(|from| IovaRange::new(from, self.limit)) {
            gaps.push(gap);
        }
        gaps
    }

    /// The whole granules inside, without granule 0, as (first, length).
    fn whole_granules(&self, range: IovaRange) -> Option<(u64, u64)> {
        let (first, last) = self.window(range)?;
        let first = first.max(1);
        (first <= last).then(|| (first, last - first + 1))
    }

    /// First and last whole granule inside.
    fn window(&self, range: IovaRange) -> Option<(u64, u64)> {
        let shift = self.granule.shift();
        let first = self.granule.round_up(range.start().get())? >> shift;
        // The granule behind the last whole one; none is behind the very last.
        let behind = match range.last().get().checked_add(1) {
            Some(end) => end >> shift,
            None => 1 << (64 - shift),
        };
        (first < behind).then(|| (first, behind - 1))
    }

    /// The granules of a mapping, without granule 0, as (first, length).
    fn granules(&self, range: IovaRange) -> Option<(u64, u64)> {
        self.whole_granules(range)
    }

    /// Where automatic placement may look, up to a limit.
    fn windows(&self, limit: Iova) -> Vec<(u64, u64)> {
        let whole = [IovaRange::new(Iova::new(0), self.limit).expect("0 is the lowest")];
        let allowed = match self.restrictions.allowed.as_slice() {
            [] => whole.as_slice(),
            some => some,
        };
        // Ranges that touch are one place.
        let mut joined: Vec<IovaRange> = Vec::with_capacity(allowed.len());
        for &range in allowed.iter().filter(|range| range.start() <= limit) {
            let last = range.last().min(limit);
            let start = match joined.last() {
                Some(before) if before.last().checked_add(1) == Some(range.start()) => {
                    joined.pop().expect("it is there").start()
                }
                _ => range.start(),
            };
            joined.push(IovaRange::new(start, last).expect("it starts at the limit or below"));
        }
        let windows = joined.into_iter();
        windows.filter_map(|range| self.window(range)).collect()
    }

    fn largest_in(&mut self, windows: &[(u64, u64)]) -> u64 {
        let largest = |window: &(u64, u64)| self.free.largest_in(window.0..=window.1);
        windows.iter().map(largest).max().unwrap_or(0)
    }

    /// Checks that free and taken make the whole.
    pub(crate) fn check_invariants(&self, mapped: impl Iterator<Item = IovaRange>) {
        let expected: Vec<_> = self
            .gaps(mapped)
            .into_iter()
            .filter_map(|gap| self.whole_granules(gap))
            .collect();
        let free: Vec<_> = self.free.iter().collect();
        assert_eq!(free, expected, "free is what nobody has mapped");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::LayoutSpec;

    const P: u64 = 4096;

    fn range(start: u64, last: u64) -> IovaRange {
        IovaRange::new(Iova::new(start), Iova::new(last)).unwrap()
    }

    /// Pages `first..=last`.
    fn pages(first: u64, last: u64) -> IovaRange {
        range(first * P, last * P + P - 1)
    }

    /// Without apertures, up to `limit`.
    fn space(limit: u64, granule: Granule) -> Space {
        let layout = LayoutSpec {
            bounce_bytes: 0,
            coherent_bytes: 0,
            iova_limit: limit,
            granule,
            ..LayoutSpec::default()
        };
        Space::new(&layout.plan().unwrap(), Restrictions::default())
    }

    fn whole() -> Space {
        space(u64::MAX, Granule::Size4K)
    }

    fn restricted(space: &mut Space, reserved: Vec<IovaRange>, allowed: Vec<IovaRange>) {
        let restrictions = Restrictions::new(reserved, allowed).unwrap();
        space.restrict(restrictions, &[]).unwrap();
    }

    fn no_space(want_bytes: u64, largest_hole_bytes: u64) -> Result<IovaRange, AllocError> {
        Err(AllocError::NoSpace {
            want_bytes,
            align_bytes: P,
            largest_hole_bytes,
        })
    }

    #[test]
    fn the_lowest_place_that_fits_is_given_and_never_page_0() {
        let mut space = whole();
        assert_eq!(space.place(P, 0, None), Ok(pages(1, 1)));
        space.take(pages(1, 1));
        space.take(pages(4, 4));
        assert_eq!(space.place(P, 0, None), Ok(pages(2, 2)));
        assert_eq!(space.place(3 * P, 0, None), Ok(pages(5, 7)));
        space.give(pages(1, 1));
        assert_eq!(space.place(3 * P, 0, None), Ok(pages(1, 3)));
        space.check_invariants(std::iter::once(pages(4, 4)));
    }

    #[test]
    fn page_0_can_be_mapped_where_it_is_asked_for() {
        let mut space = whole();
        assert_eq!(space.check(pages(0, 0)), Ok(()));
        space.take(pages(0, 1));
        space.check_invariants(std::iter::once(pages(0, 1)));
        assert_eq!(space.place(P, 0, None), Ok(pages(2, 2)));
        space.give(pages(0, 1));
        space.check_invariants(std::iter::empty());
        assert_eq!(space.place(P, 0, None), Ok(pages(1, 1)));
    }

    #[test]
    fn an_alignment_that_is_no_power_of_two_is_refused_below_the_granule_too() {
        let mut space = whole();
        for align_bytes in [3, P - 1, 3 * P, u64::MAX] {
            let refused = Err(AllocError::BadAlignment { align_bytes });
            assert_eq!(space.place(P, align_bytes, None), refused);
        }
        for align_bytes in [0, 1, 2, P] {
            assert_eq!(space.place(P, align_bytes, None), Ok(pages(1, 1)));
        }
        assert_eq!(space.place(P, 16 * P, None), Ok(pages(16, 16)));
        let top = range(1 << 63, (1 << 63) + P - 1);
        assert_eq!(space.place(P, 1 << 63, None), Ok(top));
    }

    #[test]
    fn no_byte_is_placed_above_a_limit_that_cuts_a_granule() {
        // Ends in the middle of page 5: pages 1 to 4 can be used.
        for (mut space, limit) in [
            (space(5 * P + 100, Granule::Size4K), None),
            (whole(), Some(Iova::new(5 * P + 100))),
        ] {
            assert_eq!(space.place(4 * P, 0, limit), Ok(pages(1, 4)));
            assert_eq!(space.place(5 * P, 0, limit), no_space(5 * P, 4 * P));
        }
        for limit in [0, P - 1, P, 2 * P - 2] {
            let limited = whole().place(P, 0, Some(Iova::new(limit)));
            assert_eq!(limited, no_space(P, 0));
            assert_eq!(
                space(limit, Granule::Size4K).place(P, 0, None),
                no_space(P, 0)
            );
        }
    }

    #[test]
    fn a_fixed_place_ends_at_the_limit_or_below() {
        let space = space(10 * P + 7, Granule::Size4K);
        assert_eq!(space.check(pages(0, 9)), Ok(()));
        let past = PlaceError::PastLimit {
            range: pages(10, 10),
            limit: Iova::new(10 * P + 7),
        };
        assert_eq!(space.check(pages(10, 10)), Err(past));
        assert_eq!(whole().check(range(0, u64::MAX)), Ok(()));
    }

    #[test]
    fn the_top_of_the_64_bit_space_can_be_placed_in_at_every_granule() {
        for granule in [Granule::Size4K, Granule::Size64K, Granule::Size2M] {
            let mut space = space(u64::MAX, granule);
            let top = range(u64::MAX - 2 * granule.bytes() + 1, u64::MAX);
            let restrictions = Restrictions::new(vec![], vec![top]).unwrap();
            space.restrict(restrictions, &[]).unwrap();
            assert_eq!(space.place(2 * granule.bytes(), 0, None), Ok(top));
            space.take(top);
            space.check_invariants(std::iter::once(top));
            let full = space.place(granule.bytes(), 0, None).unwrap_err();
            assert!(matches!(
                full,
                AllocError::NoSpace {
                    largest_hole_bytes: 0,
                    ..
                }
            ));
            space.give(top);
            space.check_invariants(std::iter::empty());
        }
    }

    /// Case 33.
    #[test]
    fn the_ranges_are_the_space_without_what_is_reserved() {
        let mut space = whole();
        assert_eq!(space.ranges(), [range(0, u64::MAX)]);
        restricted(&mut space, vec![pages(1, 1)], vec![]);
        assert_eq!(space.ranges(), [range(0, P - 1), range(2 * P, u64::MAX)]);
        // Touching ones, one at each end, and one that is no whole page.
        let last = range(u64::MAX, u64::MAX);
        let odd = range(9 * P + 5, 9 * P + 6);
        restricted(
            &mut space,
            vec![last, odd, pages(1, 1), pages(0, 0)],
            vec![],
        );
        let left = [range(2 * P, 9 * P + 4), range(9 * P + 7, u64::MAX - 1)];
        assert_eq!(space.ranges(), left);
        restricted(&mut space, vec![range(0, u64::MAX)], vec![]);
        assert_eq!(space.ranges(), []);
        assert_eq!(space.place(P, 0, None), no_space(P, 0));
    }

    #[test]
    fn reserved_ranges_beyond_the_limit_leave_the_space_whole() {
        let mut space = space(9 * P - 1, Granule::Size4K);
        let beyond = vec![pages(9, 9), pages(20, 30), range(u64::MAX - 9, u64::MAX)];
        restricted(&mut space, beyond, vec![]);
        assert_eq!(space.ranges(), [pages(0, 8)]);
        restricted(&mut space, vec![pages(8, 12)], vec![]);
        assert_eq!(space.ranges(), [pages(0, 7)]);
    }

    #[test]
    fn apertures_are_no_place_for_direct_mappings() {
        let layout = LayoutSpec {
            bounce_bytes: 2 * P,
            coherent_bytes: 3 * P,
            aperture_base: 4 * P,
            ..LayoutSpec::default()
        };
        let mut space = Space::new(&layout.plan().unwrap(), Restrictions::default());
        let apertures = pages(4, 8);
        for inside in [pages(4, 4), pages(3, 4), pages(8, 9), pages(0, 99)] {
            let range = inside;
            let refused = PlaceError::Aperture { range, apertures };
            assert_eq!(space.check(inside), Err(refused));
        }
        assert_eq!(space.place(3 * P, 0, None), Ok(pages(1, 3)));
        assert_eq!(space.place(4 * P, 0, None), Ok(pages(9, 12)));
    }

    #[test]
    fn a_fixed_place_that_touches_a_reserved_byte_is_refused_naming_it() {
        let mut space = whole();
        let odd = range(9 * P + 5, 9 * P + 6);
        restricted(&mut space, vec![odd, pages(3, 4), pages(20, 20)], vec![]);
        for (place, reserved) in [
            (pages(9, 9), odd),
            (pages(2, 3), pages(3, 4)),
            (pages(4, 4), pages(3, 4)),
            (pages(5, 30), odd),
            (pages(0, 99), pages(3, 4)),
        ] {
            let range = place;
            let refused = PlaceError::Reserved { range, reserved };
            assert_eq!(space.check(place), Err(refused));
        }
        for free in [pages(0, 2), pages(5, 8), pages(10, 19), pages(21, 99)] {
            assert_eq!(space.check(free), Ok(()));
        }
    }

    #[test]
    fn only_the_whole_granules_of_allowed_ranges_are_placed_in() {
        let mut space = whole();
        let allowed = vec![range(3 * P + 1, 6 * P + 5), range(10 * P - 9, 11 * P - 2)];
        restricted(&mut space, vec![], allowed);
        assert_eq!(space.place(2 * P, 0, None), Ok(pages(4, 5)));
        assert_eq!(space.place(3 * P, 0, None), no_space(3 * P, 2 * P));
        // Fixed places are not bound by them.
        assert_eq!(space.check(pages(100, 100)), Ok(()));
    }

    #[test]
    fn allowed_ranges_that_touch_are_one_place() {
        let mut space = whole();
        // They meet in the middle of page 5.
        let allowed = vec![range(5 * P + 9, 7 * P - 1), range(4 * P, 5 * P + 8)];
        restricted(&mut space, vec![], allowed.clone());
        assert_eq!(space.place(3 * P, 0, None), Ok(pages(4, 6)));
        assert_eq!(space.place(4 * P, 0, None), no_space(4 * P, 3 * P));
        // They are shown as they were given.
        assert_eq!(space.restrictions().allowed(), [allowed[1], allowed[0]]);
    }

    #[test]
    fn reserved_binds_inside_allowed() {
        let mut space = whole();
        restricted(&mut space, vec![pages(5, 5)], vec![pages(4, 8)]);
        assert_eq!(space.place(P, 0, None), Ok(pages(4, 4)));
        assert_eq!(space.place(2 * P, 0, None), Ok(pages(6, 7)));
        assert_eq!(space.place(4 * P, 0, None), no_space(4 * P, 3 * P));
    }

    /// Case 32, what the lists say of themselves.
    #[test]
    fn lists_that_overlap_hold_single_bytes_or_are_too_long_are_refused() {
        let (a, b) = (pages(1, 5), range(6 * P - 1, 9 * P));
        let overlapping = Err(RestrictionError::Overlapping { one: a, other: b });
        assert_eq!(Restrictions::new(vec![b, a], vec![]), overlapping);
        assert_eq!(Restrictions::new(vec![], vec![b, a]), overlapping);
        assert!(Restrictions::new(vec![a], vec![b]).is_ok());

        let byte = range(7, 7);
        let single = Err(RestrictionError::SingleByte { range: byte });
        assert_eq!(Restrictions::new(vec![], vec![a, byte]), single);
        assert!(Restrictions::new(vec![byte], vec![]).is_ok());

        let many = |count: u64| {
            (0..count)
                .map(|at| pages(2 * at, 2 * at))
                .collect::<Vec<_>>()
        };
        let most = RESTRICTIONS;
        assert!(Restrictions::new(many(1024), many(1024)).is_ok());
        let ranges = 1025;
        let too_many = Err(RestrictionError::TooMany { ranges, most });
        assert_eq!(Restrictions::new(many(1025), vec![]), too_many);
        assert_eq!(Restrictions::new(vec![], many(1025)), too_many);
    }

    /// Case 30.
    #[test]
    fn reserving_what_is_in_use_changes_nothing_and_names_it() {
        let mut space = whole();
        let mapped = [pages(2, 3), pages(6, 6)];
        for range in mapped {
            space.take(range);
        }
        restricted_with(&mut space, vec![pages(4, 4)], &mapped).unwrap();
        let before = space.restrictions().clone();
        for (reserved, hit) in [
            (range(4 * P - 1, 4 * P), pages(2, 3)),
            (range(2 * P, 2 * P), pages(2, 3)),
            (pages(5, 9), pages(6, 6)),
            (pages(0, 99), pages(2, 3)),
        ] {
            let range = reserved;
            let in_use = Err(RestrictionError::InUse { range, hit });
            assert_eq!(restricted_with(&mut space, vec![reserved], &mapped), in_use);
            assert_eq!(*space.restrictions(), before);
            space.check_invariants(mapped.into_iter());
        }
    }

    fn restricted_with(
        space: &mut Space,
        reserved: Vec<IovaRange>,
        mapped: &[IovaRange],
    ) -> Result<(), RestrictionError> {
        let restrictions = Restrictions::new(reserved, vec![]).unwrap();
        space.restrict(restrictions, mapped)
    }
}
