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
        space.restrict(self.clone(), std::iter::empty())?;
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
        let reserved = &self.restrictions.reserved;
        let behind = reserved.partition_point(|there| there.last() < range.start());
        match reserved.get(behind).filter(|there| there.overlaps(range)) {
            Some(&reserved) => Err(PlaceError::Reserved { range, reserved }),
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
            self.free
                .take(first, len)
                .expect("what nobody has mapped is free");
        }
    }

    /// Gives a place back.
    pub(crate) fn give(&mut self, range: IovaRange) {
        if let Some((first, len)) = self.granules(range) {
            self.free.give(first, len);
        }
    }

    /// Other restrictions, for a space in which these ranges are mapped.
    ///
    /// # Errors
    /// [`RestrictionError::InUse`] for a reserved range over one of them or over
    /// an aperture; nothing is changed.
    pub(crate) fn restrict(
        &mut self,
        restrictions: Restrictions,
        mapped: impl Iterator<Item = IovaRange> + Clone,
    ) -> Result<(), RestrictionError> {
        for &range in &restrictions.reserved {
            let hit = self.apertures.filter(|there| there.overlaps(range));
            let hit = hit.or_else(|| mapped.clone().find(|there| there.overlaps(range)));
            if let Some(hit) = hit {
                return Err(RestrictionError::InUse { range, hit });
            }
        }
        self.restrictions = restrictions;
        self.refill(mapped);
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
        let below = |range: &IovaRange| IovaRange::new(range.start(), range.last().min(limit)).ok();
        let windows = allowed.iter().filter_map(below);
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
