//! Direct mappings of a domain: entered, removed, replaced, translated.
//!
//! Nothing here copies, so every decision is whole when the lock is let go.
//! What can be checked without the lock (a table of 10^5 entries) is.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, MutexGuard};

use super::limbo::{Place, Retired, What};
use super::readers::Reach;
use super::state::{State, is_in_reach};
use super::{Domain, Settings, UpdateError};
use crate::addr::{Granule, Iova, IovaRange};
use crate::batch::{BatchError, BatchMode, BatchResult};
use crate::direct::{
    Actor, DirectMapping, DirectSpec, MapDirectError, MemoryFacts, Placement, Removed, SetMapError,
    TableSet, UnmapDirectError,
};
use crate::iotlb::{DirectTable, Entry, InsertError, Overlap, RegionId, Replaced, TranslateError};
use crate::layout::ApertureKind;
use crate::limits::{Quota, QuotaExceeded, TRANSLATE_PIECES};
use crate::mapping::{Held, MappingKind, MappingView, Phase};
use crate::memory::{MemoryId, MemoryMissing};
use crate::perm::Perm;
use crate::session::Removal;
use crate::space::Restrictions;

/// Above this many changes the free runs are made anew rather than one by one.
const REFILL_ABOVE: usize = 256;

/// What a part of a range leads to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Translated {
    /// Which addresses.
    pub range: IovaRange,
    /// What kind of mapping they belong to.
    pub kind: MappingKind,
    /// Where their bytes are.
    pub behind: Behind,
    /// Where `range` begins there, in bytes.
    pub offset: u64,
    /// What the mapping allows.
    pub perm: Perm,
}

/// Memory that a mapping leads to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Behind {
    /// That of an aperture.
    Aperture(ApertureKind),
    /// Registered memory.
    Memory(MemoryId),
}

/// Why a range was not translated.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs)] // the messages are the docs
pub enum TranslationError {
    #[error(transparent)]
    Translate(#[from] TranslateError),
    #[error("{range} has more than {most} pieces")]
    TooManyPieces { range: IovaRange, most: usize },
}

/// Why the bounce aperture was not reset.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs)] // the messages are the docs
pub enum ResetError {
    #[error(transparent)]
    Denied(#[from] crate::session::Denied),
    #[error("the domain has no bounce aperture")]
    NoAperture,
    #[error("drivers hold {streaming} streaming mappings and {leases} leases")]
    InUse { streaming: usize, leases: usize },
}

/// The bounce aperture was reset.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ResetBounce {
    /// Streaming mappings that were ended, those in transit included.
    pub ended_mappings: usize,
    /// Leases that were ended, those in transit included.
    pub ended_leases: usize,
    /// When nobody can still use them.
    pub removal: Removal,
}

impl Domain {
    /// Enters registered memory without a bounce.
    ///
    /// # Errors
    /// The first refused entry of an all-or-nothing batch; then nothing is
    /// changed.
    pub fn map_direct(
        &self,
        actor: Actor,
        specs: &[DirectSpec],
        mode: BatchMode,
    ) -> BatchResult<DirectMapping, MapDirectError> {
        let granule = self.layout.granule();
        let mut state = self.lock();
        if mode == BatchMode::AllOrNothing {
            return state.map_whole(granule, actor, specs);
        }
        let mut results = Vec::with_capacity(specs.len());
        for spec in specs {
            let entered = state.map_one(granule, actor, spec);
            let entered = entered.map_err(|error| blame_entry(error, &results));
            results.push(entered);
        }
        Ok(results)
    }

    /// Removes every direct mapping that lies inside one of the ranges.
    ///
    /// # Errors
    /// [`UnmapDirectError`]; nothing is removed.
    pub fn unmap_direct(
        &self,
        actor: Actor,
        ranges: &[IovaRange],
    ) -> Result<(Removed, Removal), UnmapDirectError> {
        let ranges = disjoint(ranges)?;
        let state = self.lock();
        state.may_act(actor)?;
        let mut doomed = Vec::new();
        for &range in &ranges {
            doomed.extend(state.inside(range, self.layout.limit())?);
        }
        self.remove_all(state, actor, &doomed)
    }

    /// Removes every direct mapping that overlaps one of the ranges, whole
    /// mappings.
    ///
    /// # Errors
    /// [`UnmapDirectError`] for another session's mapping; nothing is removed.
    pub fn clear_map(
        &self,
        actor: Actor,
        ranges: &[IovaRange],
    ) -> Result<(Removed, Removal), UnmapDirectError> {
        let ranges = joined(ranges);
        let state = self.lock();
        state.may_act(actor)?;
        let mut doomed: Vec<Entry> = Vec::new();
        for range in ranges {
            // A mapping that several ranges touch goes once.
            let seen = doomed.last().map(|entry| entry.range);
            let hit = state.direct_from(range.start());
            let hit = hit.take_while(|entry| entry.range.overlaps(range));
            doomed.extend(hit.filter(|entry| Some(entry.range) != seen));
        }
        self.remove_all(state, actor, &doomed)
    }

    fn remove_all(
        &self,
        mut state: MutexGuard<'_, State>,
        actor: Actor,
        doomed: &[Entry],
    ) -> Result<(Removed, Removal), UnmapDirectError> {
        let removed = state.remove_all(actor, doomed)?;
        let removal = state.removal();
        self.settle(state, Vec::new());
        Ok((removed, removal))
    }

    /// Replaces the direct table; nobody sees a mixture. The removal to wait for
    /// has the generation of the answer.
    ///
    /// # Errors
    /// [`SetMapError`]; the old table stays.
    pub fn set_map(
        &self,
        actor: Actor,
        mappings: &[DirectMapping],
        expected_generation: Option<u64>,
    ) -> Result<TableSet, SetMapError> {
        let memories = self.lock().facts(actor, mappings, expected_generation)?;
        let granule = self.layout.granule();
        let entries = mappings
            .iter()
            .map(|mapping| mapping.check(granule, &memories))
            .enumerate()
            .map(|(index, entry)| entry.map_err(|error| SetMapError::Entry { index, error }));
        let table = DirectTable::build(entries.collect::<Result<_, _>>()?)?;
        let mut state = self.lock();
        // Anything may have happened since.
        state.check_table(actor, mappings, expected_generation)?;
        let set = state.replace_direct(actor, mappings, &table)?;
        self.settle(state, Vec::new());
        Ok(set)
    }

    /// Ends all streaming mappings, without copying back, and zeroes the bounce
    /// aperture. Answers how many there were. A Map that is under way is refused
    /// at its end; what is in transit is zeroed when it is freed.
    ///
    /// # Errors
    /// [`ResetError`]; nothing is changed.
    pub fn reset_bounce(&self, actor: Actor, force: bool) -> Result<ResetBounce, ResetError> {
        let bounce = self.bounce.as_ref().ok_or(ResetError::NoAperture)?;
        let mut state = self.lock();
        let Ended {
            streaming: ended_mappings,
            leases: ended_leases,
            abandoned,
        } = state.end_bounced(actor, force)?;
        // Under the same lock: one removal, which the answer names, is all of it.
        let bounces = abandoned.into_iter().map(|at| state.retire(at, true));
        let bounces: Vec<_> = bounces.collect();
        if !bounces.is_empty() {
            state.ask_readers(&[], actor.session());
        }
        let removal = state.removal();
        self.settle(state, Vec::new());
        // The last to know a client's file may be among them: closed outside the lock.
        drop(bounces);
        // Nobody is ever given the first granule of the space, but a device may
        // have written there.
        if bounce.range().start() == Iova::new(0) {
            let first = IovaRange::from_len(Iova::new(0), self.layout.granule().bytes());
            bounce.scrub(first.expect("a granule is not empty"));
        }
        let mut next = Some(bounce.range().start());
        while let Some(from) = next {
            next = self.scrub_free_from(from);
        }
        Ok(ResetBounce {
            ended_mappings,
            ended_leases,
            removal,
        })
    }

    /// Overwrites the beginning of the first free run from `from` on; answers
    /// where to go on. Under the lock, so that nobody is given it meanwhile and
    /// nobody is refused for it, and little enough that nobody waits long.
    fn scrub_free_from(&self, from: Iova) -> Option<Iova> {
        const STEP_BYTES: u64 = 64 << 10;
        let mut state = self.lock();
        let run = state.bounce_iovas.as_mut()?.free_from(from)?;
        let step = STEP_BYTES.max(self.layout.granule().bytes());
        let part = IovaRange::from_len(run.start(), step)
            .ok()
            .filter(|part| run.contains(*part))
            .unwrap_or(run);
        self.held_aperture(ApertureKind::Bounce).scrub(part);
        part.last().checked_add(1)
    }

    /// The lowest mapping that is visible in `range`, whole.
    #[must_use]
    pub fn lookup(&self, range: IovaRange) -> Option<MappingView> {
        let state = self.lock();
        let entry = state.iotlb.lookup(range)?;
        if entry.target.region.slot().is_some() {
            return Some(state.direct_view(&entry));
        }
        let held = state.held.get(entry.range.start())?;
        debug_assert_eq!((held.visible, held.phase), (entry.range, Phase::Live));
        Some(held.view())
    }

    /// Pieces that together cover all of `range`, and the generation they
    /// belong to.
    ///
    /// # Errors
    /// [`TranslationError`] at the first hole, at too small a permission, and
    /// for too many pieces; then no piece is given.
    pub fn translate(
        &self,
        range: IovaRange,
        want: Perm,
    ) -> Result<(Vec<Translated>, u64), TranslationError> {
        let state = self.lock();
        // No more than tells that it is too much.
        let pieces = state.iotlb.pieces(range, want).take(TRANSLATE_PIECES + 1);
        let pieces: Vec<_> = pieces.collect::<Result<_, _>>()?;
        if pieces.len() > TRANSLATE_PIECES {
            return Err(TranslationError::TooManyPieces {
                range,
                most: TRANSLATE_PIECES,
            });
        }
        let translated = |piece: &Entry| Translated {
            range: piece.range,
            kind: state.kind_of(piece),
            behind: state.behind(piece.target.region),
            offset: piece.target.offset_bytes,
            perm: piece.perm,
        };
        let pieces = pieces.iter().map(translated).collect();
        Ok((pieces, state.iotlb.generation()))
    }

    /// Where direct mappings may lie: the space up to its limit without
    /// apertures and reserved ranges, mapped or not, by address.
    #[must_use]
    pub fn direct_ranges(&self) -> Vec<IovaRange> {
        self.look().space.ranges()
    }
}

impl State {
    /// Enters all of them in one generation, or none.
    fn map_whole(
        &mut self,
        granule: Granule,
        actor: Actor,
        specs: &[DirectSpec],
    ) -> BatchResult<DirectMapping, MapDirectError> {
        let mut answers = Vec::with_capacity(specs.len());
        let mut entries = Vec::with_capacity(specs.len());
        let mut planned = Places::new();
        for (index, spec) in specs.iter().enumerate() {
            match self.plan_direct(granule, actor, spec, &planned) {
                Ok((mapping, entry)) => {
                    planned.insert(mapping.range.start(), mapping.range);
                    answers.push(Ok(mapping));
                    entries.push(entry);
                }
                Err(error) => {
                    self.give_places(&entries);
                    let error = blame_entry(error, &answers);
                    return Err(BatchError { index, error });
                }
            }
        }
        if let Err(refused) = self.enter_all(&entries) {
            self.give_places(&entries);
            // Overlaps were refused above; the last entry is one too many.
            let (index, error) = (specs.len() - 1, refused.into());
            return Err(BatchError { index, error });
        }
        Ok(answers)
    }

    fn map_one(
        &mut self,
        granule: Granule,
        actor: Actor,
        spec: &DirectSpec,
    ) -> Result<DirectMapping, MapDirectError> {
        let (mapping, entry) = self.plan_direct(granule, actor, spec, &Places::new())?;
        if let Err(refused) = self.enter_all(&[entry]) {
            self.give_places(&[entry]);
            return Err(refused.into());
        }
        Ok(mapping)
    }

    fn enter_all(&mut self, entries: &[Entry]) -> Result<(), InsertError> {
        match self.iotlb.insert_all(entries) {
            Err(InsertError::NoRoom(_)) if self.finds_nodes() => self.iotlb.insert_all(entries)?,
            entered => entered?,
        }
        for entry in entries {
            self.count_direct(entry.target.region, 1);
        }
        if !entries.is_empty() {
            self.direct_generation = self.iotlb.generation();
            if self.readers.oldest_fence().is_some() {
                self.made.enter(entries, self.direct_generation);
            }
            self.committed(entries, &[], &[]);
        }
        Ok(())
    }

    fn give_places(&mut self, entries: &[Entry]) {
        let places = entries.iter().rev().map(|entry| entry.range);
        places.for_each(|place| self.space.give(place));
    }

    /// Checks everything about one mapping and takes its place, beside those of
    /// the same request that are planned already.
    fn plan_direct(
        &mut self,
        granule: Granule,
        actor: Actor,
        spec: &DirectSpec,
        planned: &Places,
    ) -> Result<(DirectMapping, Entry), MapDirectError> {
        self.may_act(actor)?;
        let fixed = spec.check(granule)?;
        let registered = self.memory_for(actor, spec.memory)?;
        let facts = MemoryFacts {
            region: registered.region,
            memory: Arc::clone(&registered.memory),
        };
        // A place for the checks that need none yet.
        let anywhere = IovaRange::from_len(Iova::new(0), spec.len_bytes)?;
        let mut mapping = DirectMapping {
            range: fixed.unwrap_or(anywhere),
            memory: spec.memory,
            offset: spec.offset,
            perm: spec.perm,
        };
        facts.entry(&mapping, spec.len_bytes)?;
        let used = self.iotlb.direct_len() + planned.len() + self.limbo.direct_records();
        self.quotas.admit(Quota::Direct, used)?;
        mapping.range = match (fixed, spec.placement) {
            (None, Placement::Anywhere { align_bytes, limit }) => {
                self.space.place(spec.len_bytes, align_bytes, limit)?
            }
            _ => mapping.range,
        };
        self.space.check(mapping.range)?;
        let range = mapping.range;
        let mapped = self.iotlb.lookup(range).map(|entry| entry.range);
        let hit = mapped.into_iter().chain(lowest_hit(planned, range)).min();
        if let Some(hit) = hit {
            return Err(MapDirectError::Overlap { range, hit });
        }
        self.check_limbo_at(range)?;
        let entry = facts.entry(&mapping, spec.len_bytes)?;
        self.space.take(range);
        Ok((mapping, entry))
    }

    fn count_direct(&mut self, region: RegionId, change: i64) {
        let id = self.memory_behind(region);
        let registered = self.memories.get_mut(&id).expect("it is registered");
        registered.direct = registered
            .direct
            .checked_add_signed(change)
            .expect("a mapping counts once");
    }

    /// Direct entries from the one that covers `from` on, by address.
    pub(super) fn direct_from(&self, from: Iova) -> impl Iterator<Item = Entry> {
        let byte = IovaRange::from_len(from, 1).expect("a byte is not empty");
        let covering = self.iotlb.lookup(byte);
        let covering = covering
            .filter(|entry| entry.target.region.slot().is_some() && entry.range.start() < from);
        covering.into_iter().chain(self.iotlb.direct_range(from))
    }

    /// Direct mappings inside a range.
    fn inside(&self, range: IovaRange, limit: Iova) -> Result<Vec<Entry>, UnmapDirectError> {
        let hit = self.direct_from(range.start());
        let hit = hit.take_while(|entry| entry.range.overlaps(range));
        let hit: Vec<_> = hit.collect();
        if let Some(cut) = hit.iter().find(|entry| !range.contains(entry.range)) {
            let cut = cut.range;
            return Err(UnmapDirectError::Cuts { range, cut });
        }
        let is_everything = range.start() == Iova::new(0) && range.last() >= limit;
        if hit.is_empty() && !is_everything {
            return Err(UnmapDirectError::NotMapped { range });
        }
        Ok(hit)
    }

    /// Removes them, if all of them are within reach.
    fn remove_all(&mut self, actor: Actor, doomed: &[Entry]) -> Result<Removed, UnmapDirectError> {
        let foreign = doomed.iter().find(|entry| !self.is_mine(actor, entry));
        if let Some(Entry { range, .. }) = foreign {
            return Err(UnmapDirectError::NotYours { range: *range });
        }
        let closed = self.take_out(doomed.iter().map(|entry| entry.range.start()));
        if !doomed.is_empty() {
            self.ask_readers(&closed, actor.session());
        }
        Ok(Removed::of(doomed.iter()))
    }

    /// Removes the direct mappings that start there, in one generation. Their
    /// places are free when nobody can still use them. Answers the memories that
    /// nothing leads to any more.
    fn take_out(&mut self, starts: impl Iterator<Item = Iova>) -> Vec<MemoryId> {
        let removed = self.iotlb.remove_all(starts);
        if removed.is_empty() {
            return Vec::new();
        }
        let generation = self.iotlb.generation();
        for place in self.places_of(&removed) {
            self.limbo.push_place(generation, place);
        }
        self.made.leave(&removed);
        for entry in &removed {
            self.count_direct(entry.target.region, -1);
        }
        self.direct_generation = generation;
        let closed = self.without_entries(&removed);
        self.committed(&[], &removed, &closed);
        closed
    }

    /// Where removed entries were, neighbours that continue one another in one.
    fn places_of(&self, removed: &[Entry]) -> Vec<Place> {
        let mut places: Vec<Place> = Vec::with_capacity(removed.len());
        for entry in removed {
            let place = self.place_of(entry);
            match places
                .last_mut()
                .filter(|last| last.is_continued_by(&place))
            {
                Some(last) => last.extend_to(place.range.last()),
                None => places.push(place),
            }
        }
        places
    }

    fn place_of(&self, entry: &Entry) -> Place {
        let memory = self.memory_behind(entry.target.region);
        Place {
            range: entry.range,
            memory,
            offset: entry.target.offset_bytes,
            perm: entry.perm,
            owner: self.memories[&memory].owner,
            since: self.made.since(entry),
            blocked_by: None,
        }
    }

    /// Memories among those of `removed` that nothing leads to any more.
    fn without_entries(&self, removed: &[Entry]) -> Vec<MemoryId> {
        let regions: BTreeSet<_> = removed.iter().map(|entry| entry.target.region).collect();
        let memories = regions.into_iter().map(|region| self.memory_behind(region));
        memories
            .filter(|memory| self.memories[memory].direct == 0)
            .collect()
    }

    /// Gives free places back.
    pub(super) fn free_places(&mut self, places: &[IovaRange]) {
        if places.len() > REFILL_ABOVE {
            self.refill();
        } else {
            places.iter().for_each(|place| self.space.give(*place));
        }
    }

    /// Makes the free runs anew.
    fn refill(&mut self) {
        let taken = self.taken();
        self.space.refill(taken.into_iter());
    }

    /// Where nothing direct can be placed: what is mapped, and what waits.
    pub(super) fn taken(&self) -> Vec<IovaRange> {
        let entries = self.iotlb.direct_entries().map(|entry| entry.range);
        let places = self.limbo.places(Iova::new(0)).map(|place| place.range);
        let mut taken: Vec<_> = entries.chain(places).collect();
        taken.sort_unstable();
        taken
    }

    /// Refuses what waits to be free.
    fn check_limbo_at(&self, range: IovaRange) -> Result<(), MapDirectError> {
        match self.limbo.place_in(range) {
            None => Ok(()),
            Some(place) => Err(MapDirectError::Invalidating {
                range,
                hit: place.range,
                blocked_by: place.blocked_by,
            }),
        }
    }

    /// Direct mappings from `from` on, those that wait to be free included, by
    /// address.
    pub(super) fn direct_views(&self, from: Iova) -> impl Iterator<Item = MappingView> {
        let mut mapped = self
            .direct_from(from)
            .map(|entry| self.direct_view(&entry))
            .peekable();
        let mut places = self.limbo.places(from).map(Place::view).peekable();
        std::iter::from_fn(move || match (mapped.peek(), places.peek()) {
            (Some(one), Some(other)) if other.visible < one.visible => places.next(),
            (None, _) => places.next(),
            (Some(_), _) => mapped.next(),
        })
    }

    fn is_mine(&self, actor: Actor, entry: &Entry) -> bool {
        let memory = self.memory_behind(entry.target.region);
        is_in_reach(actor, self.memories[&memory].owner)
    }

    /// Everything about the memories of a table.
    pub(super) fn facts(
        &self,
        actor: Actor,
        mappings: &[DirectMapping],
        expected_generation: Option<u64>,
    ) -> Result<BTreeMap<MemoryId, Result<MemoryFacts, MemoryMissing>>, SetMapError> {
        self.check_before_table(actor, mappings.len(), expected_generation)?;
        let mut facts = BTreeMap::new();
        for mapping in mappings {
            facts.entry(mapping.memory).or_insert_with(|| {
                let registered = self.memory_for(actor, mapping.memory)?;
                Ok(MemoryFacts {
                    region: registered.region,
                    memory: Arc::clone(&registered.memory),
                })
            });
        }
        Ok(facts)
    }

    fn check_before_table(
        &self,
        actor: Actor,
        asked: usize,
        expected_generation: Option<u64>,
    ) -> Result<(), SetMapError> {
        self.may_act(actor)?;
        let current = self.direct_generation;
        // One that is still to come is of another daemon's life.
        let unchanged = current..=self.iotlb.generation();
        if let Some(expected) = expected_generation.filter(|at| !unchanged.contains(at)) {
            return Err(SetMapError::Stale { expected, current });
        }
        let limit = self.quotas.direct;
        let most = usize::try_from(limit).unwrap_or(usize::MAX);
        if asked > most {
            return Err(SetMapError::TooMany { asked, limit });
        }
        // Of earlier removals: what this one leaves behind is the old table's,
        // which had its room. They count whoever holds them back: sessions come
        // into a domain by its owner's leave, and the quota is the owner's.
        let waiting = self.limbo.direct_records();
        if asked + waiting > most && asked > 0 {
            return Err(SetMapError::TooManyWaiting {
                asked,
                waiting,
                limit,
            });
        }
        let foreign = self
            .memories
            .values()
            .any(|memory| memory.direct > 0 && !is_in_reach(actor, memory.owner));
        if !foreign {
            return Ok(());
        }
        let mut entries = self.iotlb.direct_entries();
        match entries.find(|entry| !self.is_mine(actor, entry)) {
            Some(entry) => Err(SetMapError::NotYours { range: entry.range }),
            None => Ok(()),
        }
    }

    /// Is a table that was checked before still right?
    pub(super) fn check_table(
        &self,
        actor: Actor,
        mappings: &[DirectMapping],
        expected_generation: Option<u64>,
    ) -> Result<(), SetMapError> {
        self.check_before_table(actor, mappings.len(), expected_generation)?;
        let mut known = None;
        for (index, mapping) in mappings.iter().enumerate() {
            let refuse = |error| SetMapError::Entry { index, error };
            // Most entries lead to the same memory as the one before.
            if known != Some(mapping.memory) {
                let there = self.memory_for(actor, mapping.memory);
                there.map_err(|missing| refuse(missing.into()))?;
                known = Some(mapping.memory);
            }
            let placed = self.space.check(mapping.range);
            placed.map_err(|error| refuse(error.into()))?;
            if self.limbo.has_places() {
                self.check_limbo_at(mapping.range).map_err(refuse)?;
            }
        }
        Ok(())
    }

    fn replace_direct(
        &mut self,
        actor: Actor,
        mappings: &[DirectMapping],
        table: &DirectTable,
    ) -> Result<TableSet, SetMapError> {
        let mut replaced = self.iotlb.replace_direct(table);
        if matches!(replaced, Err(InsertError::NoRoom(_))) && self.finds_nodes() {
            replaced = self.iotlb.replace_direct(table);
        }
        let replaced = replaced.map_err(|refused| blame_mapping(refused, mappings))?;
        let (added, removed) = (replaced.added.len(), replaced.removed.len());
        let is_large = added + removed > REFILL_ABOVE;
        for entry in &replaced.removed {
            self.count_direct(entry.target.region, -1);
            if !is_large {
                self.space.give(entry.range);
            }
        }
        for entry in &replaced.added {
            self.count_direct(entry.target.region, 1);
            if !is_large {
                self.space.take(entry.range);
            }
        }
        if added + removed > 0 {
            self.direct_generation = self.iotlb.generation();
            let left = self.retire_replaced(&replaced);
            if let Some(until) = self.readers.oldest_fence() {
                let generation = self.direct_generation;
                self.made.replace(&replaced, generation, until);
            }
            if !is_large {
                left.iter().for_each(|place| self.space.take(*place));
            }
            let closed = self.without_entries(&replaced.removed);
            self.committed(&replaced.added, &replaced.removed, &closed);
            if removed > 0 {
                self.ask_readers(&closed, actor.session());
            }
        }
        if is_large {
            self.refill();
        }
        Ok(TableSet {
            generation: self.direct_generation,
            added,
            removed,
        })
    }

    /// What a new table has replaced waits: the use of its memories, and its
    /// places that the new table does not use. Answers these.
    fn retire_replaced(&mut self, replaced: &Replaced) -> Vec<IovaRange> {
        let generation = self.iotlb.generation();
        let mut left = Vec::new();
        let mut added = replaced.added.iter().map(|entry| entry.range).peekable();
        for entry in &replaced.removed {
            let place = self.place_of(entry);
            left.extend(place.without(&mut added));
        }
        for (region, since) in self.oldest_uses(&replaced.removed) {
            let memory = self.memory_behind(region);
            self.limbo.push(Retired {
                removed: generation,
                what: What::Use,
                reach: Reach::Memory { memory, since },
            });
        }
        let ranges = left.iter().map(|place| place.range).collect();
        for place in left {
            self.limbo.push_place(generation, place);
        }
        ranges
    }

    /// The memories of entries, each with the age of the oldest.
    fn oldest_uses(&self, entries: &[Entry]) -> BTreeMap<RegionId, u64> {
        let mut uses = BTreeMap::new();
        for entry in entries {
            let since = self.made.since(entry);
            let oldest = uses.entry(entry.target.region).or_insert(since);
            *oldest = since.min(*oldest);
        }
        uses
    }

    /// Removes the direct mappings of memories that are about to go.
    pub(super) fn drop_direct(&mut self, memories: &BTreeSet<MemoryId>) {
        let used = memories
            .iter()
            .filter_map(|id| self.memories.get(id))
            .filter(|memory| memory.direct > 0);
        let regions: BTreeSet<_> = used.map(|memory| memory.region).collect();
        if regions.is_empty() {
            return;
        }
        let entries = self.iotlb.direct_entries();
        let doomed = entries.filter(|entry| regions.contains(&entry.target.region));
        let doomed: Vec<_> = doomed.map(|entry| entry.range.start()).collect();
        // That they are closed is said with the end of their memories.
        let _closed = self.take_out(doomed.into_iter());
    }

    /// Ends all streaming mappings and leases, and tells the owners of these.
    fn end_bounced(&mut self, actor: Actor, force: bool) -> Result<Ended, ResetError> {
        self.may_act(actor)?;
        let is_bounced =
            |held: &Held| held.aperture() == ApertureKind::Bounce && !held.is_retired();
        let bounced = self.held.iter().filter(|(_, held)| is_bounced(held));
        let bounced: Vec<_> = bounced.map(|(at, _)| at).collect();
        let leases = self.leases.count;
        let streaming = bounced.len() - leases;
        if !bounced.is_empty() && !force {
            return Err(ResetError::InUse { streaming, leases });
        }
        // What is in transit ends with the request that moves it.
        self.bounce_epoch += 1;
        // And what has ended and waits is not free either, and is zeroed then.
        let held = self.held.values_mut();
        let bounces = held.filter(|held| held.aperture() == ApertureKind::Bounce);
        bounces
            .filter(|held| held.is_retired())
            .for_each(|held| held.scrub = true);
        // First: who has loaded the generation without them must find this, too.
        self.revoke_leases(&bounced);
        let abandoned = self.abandon_all(bounced);
        Ok(Ended {
            streaming,
            leases,
            abandoned,
        })
    }

    fn behind(&self, region: RegionId) -> Behind {
        match region {
            RegionId::BOUNCE => Behind::Aperture(ApertureKind::Bounce),
            RegionId::COHERENT => Behind::Aperture(ApertureKind::Coherent),
            memory => Behind::Memory(self.memory_behind(memory)),
        }
    }

    pub(super) fn apply(&mut self, settings: Settings) -> Result<(), UpdateError> {
        let Settings {
            quotas,
            scrub,
            restrictions,
        } = settings;
        // What ghosts hold back is not the domain's use.
        let mappings = self.held.len() - self.limbo.quarantined_granules();
        let uses = [
            (Quota::Sessions, quotas.sessions, self.sessions.len()),
            (Quota::Mappings, quotas.mappings, mappings),
            (Quota::Memories, quotas.memories, self.memories.len()),
            (Quota::Direct, quotas.direct, self.iotlb.direct_len()),
            (Quota::Leases, quotas.leases, self.most_leased().count),
        ];
        for (quota, limit, used) in uses {
            if used > usize::try_from(limit).unwrap_or(usize::MAX) {
                return Err(QuotaExceeded { quota, limit, used }.into());
            }
        }
        let (limit, used) = (quotas.lease_bytes, self.most_leased().bytes);
        if used > limit {
            return Err(UpdateError::LeaseBytes { limit, used });
        }
        self.restrict(restrictions)?;
        (self.quotas, self.scrub) = (quotas, scrub);
        Ok(())
    }

    fn restrict(&mut self, restrictions: Restrictions) -> Result<(), UpdateError> {
        if *self.space.restrictions() == restrictions {
            return Ok(());
        }
        let taken = self.taken();
        Ok(self.space.restrict(restrictions, &taken)?)
    }
}

/// What a reset has ended.
struct Ended {
    streaming: usize,
    leases: usize,
    /// Keys of those that are for the caller to retire.
    abandoned: Vec<Iova>,
}

/// Which entry of a table was refused, by the range that the refusal names.
fn blame_mapping(refused: InsertError, mappings: &[DirectMapping]) -> SetMapError {
    let range = match refused {
        InsertError::NoRoom(no_room) => return no_room.into(),
        InsertError::TooFar { range, .. }
        | InsertError::Misaligned { range, .. }
        | InsertError::CrossesAperture { range, .. }
        | InsertError::Overlap(Overlap { range, .. }) => range,
    };
    let index = mappings.iter().position(|mapping| mapping.range == range);
    SetMapError::Entry {
        index: index.expect("an entry of the table was refused"),
        error: refused.into(),
    }
}

/// By start, none overlapping another.
type Places = BTreeMap<Iova, IovaRange>;

/// The lowest place that overlaps `range`.
fn lowest_hit(places: &Places, range: IovaRange) -> Option<IovaRange> {
    let before = places.range(..range.start()).next_back();
    let within = places.range(range.start()..=range.last()).next();
    let near = before.into_iter().chain(within).map(|(_, place)| *place);
    near.into_iter().find(|place| place.overlaps(range))
}

/// An overlap with an earlier entry of the same request is the request's fault.
fn blame_entry(
    error: MapDirectError,
    before: &[Result<DirectMapping, MapDirectError>],
) -> MapDirectError {
    let MapDirectError::Overlap { range, hit } = error else {
        return error;
    };
    let is_hit = |entry: &Result<DirectMapping, _>| entry.is_ok_and(|there| there.range == hit);
    match before.iter().position(is_hit) {
        Some(index) => MapDirectError::OverlapsEntry {
            range,
            other: hit,
            index,
        },
        None => error,
    }
}

/// What some ranges cover together, by address: a thousand times the whole space
/// is looked at once.
fn joined(ranges: &[IovaRange]) -> Vec<IovaRange> {
    let mut ranges = ranges.to_vec();
    ranges.sort_by_key(|range| range.start());
    let mut joined: Vec<IovaRange> = Vec::with_capacity(ranges.len());
    for range in ranges {
        match joined.last_mut().filter(|before| before.overlaps(range)) {
            Some(before) => {
                let last = before.last().max(range.last());
                *before = IovaRange::new(before.start(), last).expect("it begins no later");
            }
            None => joined.push(range),
        }
    }
    joined
}

/// By address, none overlapping another.
fn disjoint(ranges: &[IovaRange]) -> Result<Vec<IovaRange>, UnmapDirectError> {
    let mut ranges = ranges.to_vec();
    ranges.sort_by_key(|range| range.start());
    match ranges.windows(2).find(|pair| pair[0].overlaps(pair[1])) {
        Some(pair) => Err(UnmapDirectError::Overlapping {
            one: pair[0],
            other: pair[1],
        }),
        None => Ok(ranges),
    }
}
