//! What is removed and cannot be used again yet: somebody may still use it.
//!
//! ```text
//! removed at R -> waiting -> all attached sessions acknowledged R -> freed
//!                               | a ghost could still reach it
//!                               v
//!                           quarantine -> that ghost acknowledged R, or is gone -> (the next ghost, or) freed
//! ```
//!
//! No timer leads out of here.

use std::collections::{BTreeMap, VecDeque};
use std::iter::Peekable;

use super::Quarantined;
use super::readers::{Reach, Readers};
use crate::addr::{Iova, IovaRange};
use crate::iotlb::RegionId;
use crate::layout::ApertureKind;
use crate::mapping::{MappingView, Phase, Source, ViewKind};
use crate::memory::MemoryId;
use crate::perm::Perm;
use crate::session::{Account, SessionId};

/// One thing that was removed.
#[derive(Clone, Copy, Debug)]
pub(super) struct Retired {
    /// Generation of the first state without it.
    pub(super) removed: u64,
    pub(super) what: What,
    pub(super) reach: Reach,
}

#[derive(Clone, Copy, Debug)]
pub(super) enum What {
    /// Granules of an aperture, with their record in `State::held`.
    Granules {
        at: Iova,
        kind: ApertureKind,
        bytes: u64,
    },
    /// Where direct mappings were, with its record here.
    Place(Iova),
    /// The number of a memory that is registered no more.
    Slot(RegionId),
    /// Addresses that lead elsewhere now: only the use of the memory behind them
    /// has to come to its end.
    Use,
}

/// Where direct mappings were.
#[derive(Clone, Copy, Debug)]
pub(super) struct Place {
    pub(super) range: IovaRange,
    pub(super) memory: MemoryId,
    pub(super) offset: u64,
    pub(super) perm: Perm,
    pub(super) owner: Option<SessionId>,
    /// Since when the mappings there were visible.
    pub(super) since: u64,
    pub(super) blocked_by: Option<SessionId>,
}

#[derive(Debug, Default)]
pub(super) struct Limbo {
    /// By generation: the oldest first.
    waiting: VecDeque<Retired>,
    /// By one of the ghosts that could reach it.
    quarantine: BTreeMap<SessionId, Ward>,
    /// What is being zeroed: how many of each generation.
    sweeping: BTreeMap<u64, usize>,
    /// By start, none overlapping another nor a direct mapping.
    places: BTreeMap<Iova, Place>,
    counts: Counts,
}

/// What is in here, so that nobody has to go through it to know.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Counts {
    /// Mappings whose granules are in here, those that are being zeroed included,
    /// by aperture.
    granules: [usize; 2],
    /// Bytes of these granules.
    bytes: u64,
    /// Mappings that wait for attached sessions.
    waiting: usize,
    /// Mappings whose granules are being zeroed.
    sweeping: usize,
    /// What is held back.
    quarantined: Quarantined,
    /// Mappings in apertures among that.
    quarantined_granules: usize,
    /// Mappings among that, by who pays for them.
    charged: BTreeMap<Account, usize>,
    /// Uses, wherever they wait.
    uses: usize,
}

/// What is held back because of one ghost.
#[derive(Debug)]
struct Ward {
    account: Account,
    held: Quarantined,
    retired: Vec<Retired>,
}

impl Limbo {
    pub(super) fn push(&mut self, retired: Retired) {
        let last = self.waiting.back().map_or(0, |last| last.removed);
        assert!(last <= retired.removed, "what is removed later is newer");
        if let What::Granules { kind, bytes, .. } = retired.what {
            self.counts.granules[of(kind)] += 1;
            self.counts.bytes += bytes;
        }
        self.counts.waiting += retired.what.mappings();
        self.counts.uses += usize::from(retired.what.is_use());
        self.waiting.push_back(retired);
    }

    pub(super) fn push_place(&mut self, removed: u64, place: Place) {
        let at = place.range.start();
        self.places.insert(at, place);
        self.push(Retired {
            removed,
            what: What::Place(at),
            reach: Reach::Memory {
                memory: place.memory,
                since: place.since,
            },
        });
    }

    /// The next thing that all attached sessions have acknowledged.
    pub(super) fn next(&mut self, floor: u64) -> Option<Retired> {
        let first = self.waiting.front()?;
        if first.removed > floor {
            return None;
        }
        self.counts.waiting -= first.what.mappings();
        self.waiting.pop_front()
    }

    /// Holds something back because of a ghost.
    pub(super) fn hold_back(&mut self, ghost: SessionId, account: Account, retired: Retired) {
        if let Some(place) = self.place_of(retired) {
            place.blocked_by = Some(ghost);
        }
        let ward = self.quarantine.entry(ghost).or_insert_with(|| Ward {
            account,
            held: Quarantined::default(),
            retired: Vec::new(),
        });
        ward.held.add(retired.what);
        ward.retired.push(retired);
        self.counts.hold_back(account, retired.what);
    }

    /// Takes out what was held back because of a ghost that has acknowledged
    /// something more, or is gone: the next look may find another ghost.
    pub(super) fn reconsider(&mut self, ghost: SessionId, readers: &Readers) -> Vec<Retired> {
        let Some(mut ward) = self.quarantine.remove(&ghost) else {
            return Vec::new();
        };
        let stays = |one: &Retired| readers.blocker(one.removed, one.reach) == Some(ghost);
        let (held, free): (Vec<_>, Vec<_>) = ward.retired.into_iter().partition(stays);
        for one in &free {
            ward.held.subtract(one.what);
            self.counts.let_go(ward.account, one.what);
        }
        if !held.is_empty() {
            ward.retired = held;
            self.quarantine.insert(ghost, ward);
        }
        free
    }

    /// Takes out where a direct mapping was.
    pub(super) fn take_place(&mut self, at: Iova) -> IovaRange {
        let place = self.places.remove(&at);
        place.expect("a place is here until it is free").range
    }

    /// The use of a memory has come to its end.
    pub(super) fn use_ended(&mut self) {
        self.counts.uses -= 1;
    }

    pub(super) fn begin_sweep(&mut self, removed: u64) {
        *self.sweeping.entry(removed).or_default() += 1;
        self.counts.sweeping += 1;
    }

    pub(super) fn end_sweep(&mut self, removed: u64) {
        let count = self.sweeping.get_mut(&removed).expect("it was begun");
        *count -= 1;
        if *count == 0 {
            self.sweeping.remove(&removed);
        }
        self.counts.sweeping -= 1;
    }

    /// Granules of one mapping have left.
    pub(super) fn granules_left(&mut self, kind: ApertureKind, bytes: u64) {
        self.counts.granules[of(kind)] -= 1;
        self.counts.bytes -= bytes;
    }

    /// Is something of that generation, or an older one, being zeroed?
    pub(super) fn is_sweeping(&self, removed: u64) -> bool {
        self.sweeping.range(..=removed).next().is_some()
    }

    /// Does an acknowledgment free granules?
    pub(super) fn awaits_granules(&self) -> bool {
        let granules: usize = self.counts.granules.iter().sum();
        granules > self.counts.quarantined_granules
    }

    /// Ghosts that hold back something of that generation.
    pub(super) fn blockers(&self, removed: u64) -> impl Iterator<Item = SessionId> {
        let holds = move |ward: &Ward| ward.retired.iter().any(|one| one.removed == removed);
        self.quarantine
            .iter()
            .filter(move |(_, ward)| holds(ward))
            .map(|(ghost, _)| *ghost)
    }

    /// The lowest place that overlaps `range`.
    pub(super) fn place_in(&self, range: IovaRange) -> Option<&Place> {
        let before = self.places.range(..range.start()).next_back();
        let within = self.places.range(range.start()..=range.last()).next();
        let near = before.into_iter().chain(within).map(|(_, place)| place);
        near.into_iter().find(|place| place.range.overlaps(range))
    }

    /// All places from `from` on, by address.
    pub(super) fn places(&self, from: Iova) -> impl Iterator<Item = &Place> {
        self.places.range(from..).map(|(_, place)| place)
    }

    pub(super) fn has_places(&self) -> bool {
        !self.places.is_empty()
    }

    /// What is kept here because of direct mappings that were removed.
    pub(super) fn direct_records(&self) -> usize {
        self.places.len() + self.counts.uses
    }

    /// Bytes of apertures in here.
    pub(super) fn waiting_bytes(&self) -> u64 {
        self.counts.bytes
    }

    /// Mappings in an aperture whose granules are in here.
    pub(super) fn granules(&self, kind: ApertureKind) -> usize {
        self.counts.granules[of(kind)]
    }

    /// Mappings that wait for attached sessions, or are being zeroed.
    pub(super) fn invalidating(&self) -> usize {
        self.counts.waiting + self.counts.sweeping
    }

    pub(super) fn quarantined(&self) -> Quarantined {
        self.counts.quarantined
    }

    pub(super) fn quarantined_by(&self, ghost: SessionId) -> Quarantined {
        let ward = self.quarantine.get(&ghost);
        ward.map_or(Quarantined::default(), |ward| ward.held)
    }

    /// Mappings that are held back because of sessions of one account.
    pub(super) fn charged_to(&self, account: Account) -> usize {
        self.counts.charged.get(&account).copied().unwrap_or(0)
    }

    /// Mappings in apertures that are held back.
    pub(super) fn quarantined_granules(&self) -> usize {
        self.counts.quarantined_granules
    }

    fn place_of(&mut self, retired: Retired) -> Option<&mut Place> {
        match retired.what {
            What::Place(at) => self.places.get_mut(&at),
            _ => None,
        }
    }

    /// Keys of the records whose granules are in here and not being zeroed.
    pub(super) fn keys(&self) -> impl Iterator<Item = Iova> {
        let key = |one: &Retired| match one.what {
            What::Granules { at, .. } => Some(at),
            _ => None,
        };
        self.records().filter_map(key)
    }

    /// All that waits or is held back.
    fn records(&self) -> impl Iterator<Item = &Retired> {
        let quarantine = self.quarantine.values().flat_map(|ward| &ward.retired);
        self.waiting.iter().chain(quarantine)
    }

    pub(super) fn check_invariants(&self) {
        let waiting = self.waiting.iter().map(|one| one.removed);
        assert!(waiting.is_sorted(), "the oldest waits first");
        let places = self.records();
        let places = places.filter(|one| matches!(one.what, What::Place(_)));
        assert_eq!(places.count(), self.places.len(), "every place waits once");
        self.check_counts();
        let mut last: Option<Iova> = None;
        for place in self.places.values() {
            let is_apart = last.is_none_or(|last| last < place.range.start());
            assert!(is_apart, "{:?} is one place", place.range);
            last = Some(place.range.last());
        }
    }

    /// Counts once more. How many granules there are only their records tell.
    fn check_counts(&self) {
        let mut counts = Counts {
            granules: self.counts.granules,
            bytes: self.counts.bytes,
            waiting: self.waiting.iter().map(|one| one.what.mappings()).sum(),
            sweeping: self.sweeping.values().sum(),
            uses: self.records().filter(|one| one.what.is_use()).count(),
            ..Counts::default()
        };
        for ward in self.quarantine.values() {
            let mut held = Quarantined::default();
            for one in &ward.retired {
                held.add(one.what);
                counts.hold_back(ward.account, one.what);
            }
            assert_eq!(held, ward.held, "what a ghost holds back is counted");
        }
        assert_eq!(counts, self.counts, "what is in here is counted");
    }
}

/// Where an aperture is counted.
fn of(kind: ApertureKind) -> usize {
    match kind {
        ApertureKind::Bounce => 0,
        ApertureKind::Coherent => 1,
    }
}

impl What {
    /// As how many mappings it counts.
    fn mappings(self) -> usize {
        match self {
            What::Granules { .. } | What::Place(_) => 1,
            What::Slot(_) | What::Use => 0,
        }
    }

    /// Bytes of an aperture.
    fn bytes(self) -> u64 {
        match self {
            What::Granules { bytes, .. } => bytes,
            _ => 0,
        }
    }

    fn is_granules(self) -> bool {
        matches!(self, What::Granules { .. })
    }

    fn is_use(self) -> bool {
        matches!(self, What::Use)
    }
}

impl Counts {
    fn hold_back(&mut self, account: Account, what: What) {
        self.quarantined.add(what);
        self.quarantined_granules += usize::from(what.is_granules());
        if what.mappings() > 0 {
            *self.charged.entry(account).or_default() += what.mappings();
        }
    }

    fn let_go(&mut self, account: Account, what: What) {
        self.quarantined.subtract(what);
        self.quarantined_granules -= usize::from(what.is_granules());
        if let Some(charged) = self.charged.get_mut(&account) {
            *charged -= what.mappings();
            // Nobody is remembered for what is gone.
            if *charged == 0 {
                self.charged.remove(&account);
            }
        }
    }
}

impl Place {
    /// What others see of it.
    pub(super) fn view(&self) -> MappingView {
        MappingView {
            id: None,
            owner: self.owner,
            visible: self.range,
            perm: self.perm,
            phase: match self.blocked_by {
                Some(_) => Phase::Quarantined,
                None => Phase::Invalidating,
            },
            kind: ViewKind::Direct {
                source: Source {
                    memory: self.memory,
                    offset: self.offset,
                },
            },
            blocked_by: self.blocked_by,
        }
    }

    /// Does `next` go on where this ends, in the table and in the memory?
    pub(super) fn is_continued_by(&self, next: &Place) -> bool {
        let follows = self.range.last().checked_add(1) == Some(next.range.start());
        let bytes = self.range.len_bytes();
        let offset = bytes.and_then(|bytes| self.offset.checked_add(bytes));
        let same = self.memory == next.memory && self.perm == next.perm;
        follows && same && self.since == next.since && offset == Some(next.offset)
    }

    pub(super) fn extend_to(&mut self, last: Iova) {
        let range = IovaRange::new(self.range.start(), last);
        self.range = range.expect("it is continued upwards");
    }

    /// The parts of it that none of `others` uses, which ascend; those that end
    /// below are taken out of them.
    pub(super) fn without(
        &self,
        others: &mut Peekable<impl Iterator<Item = IovaRange>>,
    ) -> Vec<Place> {
        let mut parts = Vec::new();
        let mut rest = Some(self.range);
        while let Some(part) = rest {
            while others
                .next_if(|other| other.last() < part.start())
                .is_some()
            {}
            let Some(other) = others.peek().filter(|other| other.overlaps(part)) else {
                parts.push(self.part(part));
                break;
            };
            let below = other.start().get().checked_sub(1).map(Iova::new);
            let below = below.and_then(|last| IovaRange::new(part.start(), last).ok());
            parts.extend(below.map(|below| self.part(below)));
            let above = other.last().checked_add(1);
            rest = above.and_then(|start| IovaRange::new(start, part.last()).ok());
        }
        parts
    }

    fn part(&self, range: IovaRange) -> Place {
        let skipped = range.start().offset_from(self.range.start());
        Place {
            range,
            offset: self.offset + skipped.expect("it is a part"),
            ..*self
        }
    }
}

impl Quarantined {
    fn add(&mut self, what: What) {
        self.mappings += what.mappings();
        self.bytes += what.bytes();
    }

    fn subtract(&mut self, what: What) {
        self.mappings -= what.mappings();
        self.bytes -= what.bytes();
    }
}
