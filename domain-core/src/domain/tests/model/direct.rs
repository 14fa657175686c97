//! The direct table of the model: page by page, and every question is answered
//! by looking at all of it.

use super::ops::{DirectWish, EntryWish, Expect, PlaceWish};
use super::readers::{Gone, What};
use super::*;
use crate::addr::RangeError;
use crate::direct::{Removed, SetMapError, TableSet, UnmapDirectError};
use crate::domain::{Behind, ResetError, Translated, TranslationError};
use crate::iotlb::TranslateError;
use crate::mapping::{MappingView, Source};
use crate::space::{PlaceError, RestrictionError};

/// What one page of the direct table shows.
#[derive(Clone, Copy)]
pub(super) struct Page {
    memory: MemoryId,
    /// Of this page, in bytes.
    offset: u64,
    perm: Perm,
    /// Which mapping it is a part of.
    entry: u64,
    /// When it was made, in operations.
    made: u64,
}

/// Something that is visible, with its place behind it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Shown {
    range: IovaRange,
    kind: MappingKind,
    behind: Behind,
    offset: u64,
    perm: Perm,
}

fn page_of(page: u64) -> IovaRange {
    pages(page, page)
}

/// How many bytes two ranges share.
fn shared_bytes(one: IovaRange, other: IovaRange) -> u64 {
    let (start, last) = (one.start().max(other.start()), one.last().min(other.last()));
    last.get()
        .checked_sub(start.get())
        .map_or(0, |span| span + 1)
}

fn pages_in(range: IovaRange) -> std::ops::RangeInclusive<u64> {
    range.start().get() / P..=range.last().get() / P
}

impl Model {
    fn may_act(&self, actor: Actor) -> Result<(), Denied> {
        match actor {
            Actor::Owner => Ok(()),
            Actor::Session(session) => self.driver(session),
        }
    }

    fn is_in_reach(&self, actor: Actor, memory: MemoryId) -> bool {
        let owner = self.memories[&memory].owner;
        owner.is_none() || actor == Actor::Owner || Some(actor) == owner.map(Actor::Session)
    }

    fn memory_for(&self, actor: Actor, id: MemoryId) -> Result<&ModelMemory, MemoryMissing> {
        let memory = self.memories.get(&id);
        let memory = memory.ok_or(MemoryMissing::NoSuchMemory { id })?;
        match self.is_in_reach(actor, id) {
            true => Ok(memory),
            false => Err(MemoryMissing::NotYours { id }),
        }
    }

    /// The mapping that an entry number stands for.
    fn entry(&self, number: u64) -> DirectMapping {
        let mut own = self.direct.iter().filter(|(_, page)| page.entry == number);
        let (first, page) = own.next().unwrap();
        let last = own.next_back().map_or(first, |(last, _)| last);
        DirectMapping {
            range: pages(*first, *last),
            memory: page.memory,
            offset: page.offset,
            perm: page.perm,
        }
    }

    /// All mappings by address, with their numbers.
    fn entries(&self) -> Vec<(u64, DirectMapping)> {
        let mut numbers: Vec<_> = self.direct.values().map(|page| page.entry).collect();
        numbers.dedup();
        numbers
            .into_iter()
            .map(|number| (number, self.entry(number)))
            .collect()
    }

    pub(super) fn direct_table(&self) -> Vec<DirectMapping> {
        self.entries().into_iter().map(|(_, entry)| entry).collect()
    }

    fn enter(&mut self, mapping: DirectMapping) {
        self.next_entry += 1;
        for (skipped, page) in pages_in(mapping.range).enumerate() {
            let shown = Page {
                memory: mapping.memory,
                offset: mapping.offset + skipped as u64 * P,
                perm: mapping.perm,
                entry: self.next_entry,
                made: self.kept.remove(&page).unwrap_or(self.clock),
            };
            assert!(self.direct.insert(page, shown).is_none());
        }
    }

    /// Takes pages out; answers what becomes of them.
    fn forget_pages(&mut self, is_doomed: impl Fn(&Self, &Page) -> bool) -> Vec<Gone> {
        let pages = self.direct.iter();
        let doomed = pages.filter(|(_, page)| is_doomed(self, page));
        let doomed: Vec<_> = doomed.map(|(at, page)| (*at, *page)).collect();
        for (at, _) in &doomed {
            self.direct.remove(at);
        }
        let gone = doomed.into_iter();
        gone.map(|(at, page)| Gone::of(What::Direct(at, page.memory), page.made))
            .collect()
    }

    pub(super) fn forget_direct_of_unknown_memories(&mut self) -> Vec<Gone> {
        self.forget_pages(|model, page| !model.memories.contains_key(&page.memory))
    }

    /// Memories that something led to, and nothing does any more.
    fn closed(&self, gone: &[Gone]) -> Vec<MemoryId> {
        let memories = gone.iter().filter_map(|one| match one.what {
            What::Direct(_, memory) | What::Use(memory) => Some(memory),
            _ => None,
        });
        let memories: std::collections::BTreeSet<_> = memories.collect();
        let closed = memories.into_iter();
        closed.filter(|id| self.direct_users_of(*id) == 0).collect()
    }

    pub(super) fn direct_users_of(&self, id: MemoryId) -> u64 {
        let table = self.direct_table();
        table.iter().filter(|entry| entry.memory == id).count() as u64
    }

    fn apertures(&self) -> IovaRange {
        pages(self.base, self.base + PAGES - 1)
    }

    /// May a mapping that names its place lie there?
    fn check_place(&self, range: IovaRange) -> Result<(), PlaceError> {
        let limit = Iova::new(LIMIT);
        if range.last() > limit {
            return Err(PlaceError::PastLimit { range, limit });
        }
        let apertures = self.apertures();
        if apertures.overlaps(range) {
            return Err(PlaceError::Aperture { range, apertures });
        }
        let mut reserved = self.restrictions.reserved().iter();
        match reserved.find(|reserved| reserved.overlaps(range)) {
            Some(&reserved) => Err(PlaceError::Reserved { range, reserved }),
            None => Ok(()),
        }
    }

    /// May an automatic mapping cover this page now?
    fn is_free(&self, page: u64, limit: Option<Iova>) -> bool {
        let range = page_of(page);
        let allowed = self.restrictions.allowed();
        let allowed_bytes: u64 = allowed.iter().map(|a| shared_bytes(*a, range)).sum();
        page > 0
            && self.check_place(range).is_ok()
            && limit.is_none_or(|limit| range.last() <= limit)
            && (allowed.is_empty() || allowed_bytes == P)
            && !self.direct.contains_key(&page)
            && !self.is_place_gone(page)
    }

    fn automatic(
        &self,
        len_bytes: u64,
        align_bytes: u64,
        limit: Option<Iova>,
    ) -> Result<IovaRange, AllocError> {
        if align_bytes != 0 && !align_bytes.is_power_of_two() {
            return Err(AllocError::BadAlignment { align_bytes });
        }
        let end = LIMIT / P + 1;
        let run = |from: u64| {
            (from..end)
                .take_while(|page| self.is_free(*page, limit))
                .count()
        };
        let want = len_bytes / P;
        let fits =
            |page: &u64| (page * P).is_multiple_of(align_bytes.max(P)) && run(*page) as u64 >= want;
        let lowest = (0..end).find(fits);
        lowest
            .map(|page| pages(page, page + want - 1))
            .ok_or_else(|| AllocError::NoSpace {
                want_bytes: len_bytes,
                align_bytes: align_bytes.max(P),
                largest_hole_bytes: (0..end).map(run).max().unwrap() as u64 * P,
            })
    }

    /// One entry of a request whose entries began with number `first`.
    fn place_direct(
        &self,
        actor: Actor,
        spec: &DirectSpec,
        first: u64,
        numbers: &[Option<u64>],
    ) -> Result<DirectMapping, MapDirectError> {
        self.may_act(actor)?;
        let start = match spec.placement {
            Placement::At(iova) => iova,
            Placement::Anywhere { .. } => Iova::new(0),
        };
        let len_bytes = spec.len_bytes;
        if len_bytes == 0 {
            return Err(RangeError::ZeroLength { start }.into());
        }
        if len_bytes >= 1 << 63 {
            return Err(MapDirectError::TooLong { len_bytes });
        }
        for (what, value) in [
            ("iova", start.get()),
            ("offset", spec.offset),
            ("len_bytes", len_bytes),
        ] {
            misaligned(what, value)?;
        }
        if u128::from(start.get()) + u128::from(len_bytes) > 1 << 64 {
            return Err(RangeError::Overflow { start, len_bytes }.into());
        }
        self.check_source(actor, spec.memory, spec.offset, len_bytes.into(), spec.perm)?;
        let used = self.entries().len() + self.direct_records();
        Self::room(Quota::Direct, self.quotas.direct, used)?;
        let range = match spec.placement {
            Placement::Anywhere { align_bytes, limit } => {
                self.automatic(len_bytes, align_bytes, limit)?
            }
            Placement::At(start) => IovaRange::from_len(start, len_bytes).unwrap(),
        };
        self.check_place(range)?;
        if let Some((_, page)) = self
            .direct
            .range(*pages_in(range).start()..=*pages_in(range).end())
            .next()
        {
            let hit = self.entry(page.entry).range;
            if page.entry < first {
                return Err(MapDirectError::Overlap { range, hit });
            }
            let index = numbers.iter().position(|n| *n == Some(page.entry)).unwrap();
            return Err(MapDirectError::OverlapsEntry {
                range,
                other: hit,
                index,
            });
        }
        if let Some(waits) = self.waits_in(range) {
            return Err(waits);
        }
        Ok(DirectMapping {
            range,
            memory: spec.memory,
            offset: spec.offset,
            perm: spec.perm,
        })
    }

    fn check_source(
        &self,
        actor: Actor,
        id: MemoryId,
        offset: u64,
        bytes: u128,
        perm: Perm,
    ) -> Result<(), MapDirectError> {
        let memory = self.memory_for(actor, id)?;
        if u128::from(offset) + bytes > memory.bytes.len() as u128 {
            return Err(MapDirectError::Span(SpanError::OutsideMemory {
                offset,
                len: u64::try_from(bytes).unwrap_or(u64::MAX),
                size: memory.bytes.len() as u64,
            }));
        }
        if perm != Perm::Read && !memory.writable {
            return Err(MapDirectError::MemoryReadOnly { id, perm });
        }
        Ok(())
    }

    pub(super) fn map_direct(&mut self, actor: Actor, mode: BatchMode, wishes: &[DirectWish]) {
        let specs: Vec<_> = wishes
            .iter()
            .map(|wish| DirectSpec {
                memory: self.memory_id(wish.memory),
                offset: wish.offset,
                len_bytes: wish.len_bytes,
                perm: wish.perm,
                placement: match wish.place {
                    PlaceWish::At(iova) => Placement::At(Iova::new(iova)),
                    PlaceWish::Anywhere(align_bytes, limit) => {
                        Placement::Anywhere { align_bytes, limit }
                    }
                },
            })
            .collect();
        let (before, first) = (self.direct.clone(), self.next_entry + 1);
        let mut numbers = Vec::new();
        let mut answers = Vec::new();
        for spec in &specs {
            let answer = self.place_direct(actor, spec, first, &numbers);
            numbers.push(answer.ok().map(|mapping| {
                self.enter(mapping);
                self.next_entry
            }));
            answers.push(answer.map_err(|error| told(&error)));
        }
        let expected = settled(mode, answers);
        if expected.is_err() {
            self.direct = before;
        }
        let answers = self.domain.map_direct(actor, &specs, mode);
        assert_eq!(heard(answers, |mapping| mapping), expected, "{specs:?}");
    }

    /// Takes mappings out if all of them are within reach.
    fn take_out(&mut self, actor: Actor, numbers: &[u64]) -> Result<Removed, UnmapDirectError> {
        let mut removed = Removed::default();
        for number in numbers {
            let DirectMapping { range, memory, .. } = self.entry(*number);
            if !self.is_in_reach(actor, memory) {
                return Err(UnmapDirectError::NotYours { range });
            }
            removed.mappings += 1;
            removed.bytes += range.len_bytes().unwrap();
        }
        let gone = self.forget_pages(|_, page| numbers.contains(&page.entry));
        self.direct_gone = gone;
        Ok(removed)
    }

    pub(super) fn unmap_direct(&mut self, actor: Actor, ranges: &[IovaRange]) {
        let expected = self.unmapped(actor, ranges);
        let unmapped = self.domain.unmap_direct(actor, ranges);
        let unmapped = unmapped.map(|(removed, _)| removed);
        assert_eq!(unmapped, expected, "{ranges:?}");
        self.bury_direct(actor);
    }

    /// After the domain has removed them, too.
    fn bury_direct(&mut self, actor: Actor) {
        let gone = std::mem::take(&mut self.direct_gone);
        if !gone.is_empty() {
            let closed = self.closed(&gone);
            self.removed(gone, &closed, actor.session());
        }
    }

    fn unmapped(
        &mut self,
        actor: Actor,
        ranges: &[IovaRange],
    ) -> Result<Removed, UnmapDirectError> {
        let mut ranges = ranges.to_vec();
        ranges.sort_by_key(|range| range.start());
        for pair in ranges.windows(2) {
            let (one, other) = (pair[0], pair[1]);
            if one.overlaps(other) {
                return Err(UnmapDirectError::Overlapping { one, other });
            }
        }
        self.may_act(actor)?;
        let mut doomed = Vec::new();
        for range in ranges {
            let touched = self.entries();
            let touched = touched
                .iter()
                .filter(|(_, entry)| entry.range.overlaps(range));
            let touched: Vec<_> = touched.collect();
            if let Some((_, entry)) = touched.iter().find(|(_, e)| !range.contains(e.range)) {
                let cut = entry.range;
                return Err(UnmapDirectError::Cuts { range, cut });
            }
            let is_everything = range.start().get() == 0 && range.last().get() >= LIMIT;
            if touched.is_empty() && !is_everything {
                return Err(UnmapDirectError::NotMapped { range });
            }
            doomed.extend(touched.iter().map(|(number, _)| *number));
        }
        self.take_out(actor, &doomed)
    }

    pub(super) fn clear_map(&mut self, actor: Actor, ranges: &[IovaRange]) {
        let expected = self.may_act(actor).map_err(UnmapDirectError::Denied);
        let expected = expected.and_then(|()| {
            let doomed = self.entries();
            let is_touched = |range: IovaRange| ranges.iter().any(|r| r.overlaps(range));
            let doomed = doomed.iter().filter(|(_, entry)| is_touched(entry.range));
            let doomed: Vec<_> = doomed.map(|(number, _)| *number).collect();
            self.take_out(actor, &doomed)
        });
        let cleared = self
            .domain
            .clear_map(actor, ranges)
            .map(|(removed, _)| removed);
        assert_eq!(cleared, expected, "{ranges:?}");
        self.bury_direct(actor);
    }

    pub(super) fn set_map(&mut self, actor: Actor, wishes: Option<&[EntryWish]>, expect: Expect) {
        let wished = |wish: &EntryWish| DirectMapping {
            range: wish.range,
            memory: self.memory_id(wish.memory),
            offset: wish.offset,
            perm: wish.perm,
        };
        // None: the table as it is, the other way round.
        let mut table: Vec<_> = match wishes {
            Some(wishes) => wishes.iter().map(wished).collect(),
            None => self.direct_table(),
        };
        table.reverse();
        let now = self.domain.usage().generation;
        let expected = match expect {
            Expect::Anything => None,
            Expect::Now => Some(now),
            Expect::Older(by) => Some(now.saturating_sub(by)),
        };
        let waits: Vec<_> = table
            .iter()
            .map(|entry| self.waits_in(entry.range))
            .collect();
        let waiting = self.direct_records();
        let answer = self.domain.set_map(actor, &table, expected);
        if let Err(error) = self.may_set(actor, &table, expected, waiting) {
            assert_eq!(answer, Err(error), "{table:?}");
            return;
        }
        let clash = |one: usize, other: usize| table[one].range.overlaps(table[other].range);
        let any_clash = (0..table.len()).any(|other| (0..other).any(|one| clash(one, other)));
        if any_clash {
            // Which of several clashes is told is not promised.
            let Err(SetMapError::Entry {
                index,
                error:
                    MapDirectError::OverlapsEntry {
                        range,
                        other,
                        index: with,
                    },
            }) = answer
            else {
                panic!("{answer:?} to {table:?}");
            };
            assert!(with < index && clash(with, index));
            assert_eq!((range, other), (table[index].range, table[with].range));
            return;
        }
        for (index, entry) in table.iter().enumerate() {
            let placed = self.check_place(entry.range).map_err(Into::into);
            if let Some(error) = placed.err().or(waits[index]) {
                assert_eq!(answer, Err(SetMapError::Entry { index, error }));
                return;
            }
        }
        let old = self.direct_table();
        let added = table.iter().filter(|entry| !old.contains(entry)).count();
        let removed = old.iter().filter(|entry| !table.contains(entry)).count();
        let gone = self.replaced(&table);
        table.iter().for_each(|entry| self.enter(*entry));
        let generation = match added + removed {
            0 => self.direct_generation,
            _ => self.domain.usage().generation,
        };
        let set = TableSet {
            generation,
            added,
            removed,
        };
        assert_eq!(answer, Ok(set), "{table:?}");
        if removed > 0 {
            let closed = self.closed(&gone);
            self.removed(gone, &closed, actor.session());
        }
    }

    /// Empties the table for a new one. What that does not show in the same way
    /// is gone: the places that it leaves, and of others the use.
    fn replaced(&mut self, table: &[DirectMapping]) -> Vec<Gone> {
        let old = self.entries();
        let kept: Vec<_> = old
            .iter()
            .filter(|(_, entry)| table.contains(entry))
            .collect();
        let stays = |number| kept.iter().any(|(kept, _)| *kept == number);
        let mut gone = Vec::new();
        for (at, page) in std::mem::take(&mut self.direct) {
            if stays(page.entry) {
                self.kept.insert(at, page.made);
                continue;
            }
            gone.push(Gone::of(What::Use(page.memory), page.made));
            let new = table.iter().find(|e| e.range.overlaps(page_of(at)));
            match new {
                None => gone.push(Gone::of(What::Direct(at, page.memory), page.made)),
                // What serves an old translation is as old as that, all of it.
                Some(new) if new.memory == page.memory => self.inherit(new.range, page.made),
                Some(_) => {}
            }
        }
        gone
    }

    fn inherit(&mut self, range: IovaRange, made: u64) {
        for page in pages_in(range) {
            let kept = self.kept.entry(page).or_insert(made);
            *kept = made.min(*kept);
        }
    }

    /// Everything but what the entries say of each other and of their places.
    fn may_set(
        &self,
        actor: Actor,
        table: &[DirectMapping],
        expected: Option<u64>,
        waiting: usize,
    ) -> Result<(), SetMapError> {
        self.may_act(actor)?;
        let current = self.direct_generation;
        let newest = self.domain.usage().generation;
        let is_stale = |expected: &u64| *expected < current || *expected > newest;
        if let Some(expected) = expected.filter(is_stale) {
            return Err(SetMapError::Stale { expected, current });
        }
        let (asked, limit) = (table.len(), self.quotas.direct);
        if asked > limit as usize {
            return Err(SetMapError::TooMany { asked, limit });
        }
        if asked > 0 && asked + waiting > limit as usize {
            return Err(SetMapError::TooManyWaiting {
                asked,
                waiting,
                limit,
            });
        }
        for entry in self.direct_table() {
            if !self.is_in_reach(actor, entry.memory) {
                return Err(SetMapError::NotYours { range: entry.range });
            }
        }
        for (index, entry) in table.iter().enumerate() {
            let checked = (|| {
                let end = entry.range.last().get().wrapping_add(1);
                misaligned("iova", entry.range.start().get())?;
                misaligned("offset", entry.offset)?;
                misaligned("the end", end)?;
                if entry.range.bytes() >= 1 << 63 {
                    let len_bytes = entry.range.len_bytes().unwrap_or(u64::MAX);
                    return Err(MapDirectError::TooLong { len_bytes });
                }
                let bytes = entry.range.bytes();
                self.check_source(actor, entry.memory, entry.offset, bytes, entry.perm)
            })();
            checked.map_err(|error| SetMapError::Entry { index, error })?;
        }
        Ok(())
    }

    pub(super) fn reset(&mut self, actor: Actor, force: bool) {
        let streaming = self.held.iter().filter(|held| held.spec.is_some()).count();
        let leases = self.leases_held(None).count;
        let is_used = streaming + leases > 0;
        let expected = match self.may_act(actor) {
            Err(denied) => Err(ResetError::Denied(denied)),
            Ok(()) if is_used && !force => Err(ResetError::InUse { streaming, leases }),
            Ok(()) => Ok((streaming, leases)),
        };
        let reset = self
            .domain
            .reset_bounce(actor, force)
            .map(|reset| (reset.ended_mappings, reset.ended_leases));
        assert_eq!(reset, expected);
        if expected.is_ok() {
            let (gone, stay): (Vec<_>, Vec<_>) =
                self.held.drain(..).partition(ModelHeld::is_bounce);
            self.held = stay;
            self.revoked(&gone);
            let gone: Vec<_> = gone.iter().map(|held| Gone::aperture(held, true)).collect();
            self.zero_gone_bounces();
            if !gone.is_empty() {
                self.removed(gone, &[], actor.session());
            }
            for page in self.base..self.base + BOUNCE_PAGES {
                if !self.is_gone(page) {
                    self.scrub(page..page + 1);
                }
            }
        }
    }

    pub(super) fn update(
        &mut self,
        direct: u32,
        scrub: Scrub,
        reserved: &[IovaRange],
        allowed: &[IovaRange],
    ) {
        let made = Restrictions::new(reserved.to_vec(), allowed.to_vec());
        let clash = |list: &[IovaRange]| {
            (0..list.len()).any(|at| list[..at].iter().any(|r| r.overlaps(list[at])))
        };
        let single = allowed.iter().any(|range| range.bytes() == 1);
        assert_eq!(made.is_err(), single || clash(reserved) || clash(allowed));
        let Ok(restrictions) = made else { return };
        let quotas = Quotas {
            direct,
            ..self.quotas
        };
        let settings = Settings {
            quotas,
            scrub,
            restrictions,
        };
        let expected = self.may_update(&settings);
        let answer = self.domain.update(|_| Ok(settings.clone()));
        assert_eq!(answer, expected, "{settings:?}");
        if expected.is_ok() {
            (self.quotas, self.scrub) = (quotas, scrub);
            self.restrictions = settings.restrictions;
        }
    }

    fn may_update(&self, settings: &Settings) -> Result<(), UpdateError> {
        let (limit, used) = (settings.quotas.direct, self.entries().len());
        if used > limit as usize {
            let quota = Quota::Direct;
            return Err(QuotaExceeded { quota, limit, used }.into());
        }
        for &range in settings.restrictions.reserved() {
            let mut in_use = vec![self.apertures()];
            let mut mapped: Vec<_> = self.direct_table().iter().map(|e| e.range).collect();
            let waiting = self.limbo_views(Some(MappingKind::Direct)).into_iter();
            mapped.extend(waiting.map(|view| view.visible));
            mapped.sort_unstable();
            in_use.extend(mapped);
            if let Some(&hit) = in_use.iter().find(|there| there.overlaps(range)) {
                return Err(RestrictionError::InUse { range, hit }.into());
            }
        }
        Ok(())
    }

    /// All that is visible, by address.
    fn shown(&self) -> Vec<Shown> {
        let mut shown: Vec<_> = self.held.iter().map(|held| self.shown_of(held)).collect();
        shown.extend(self.direct_table().iter().map(|entry| Shown {
            range: entry.range,
            kind: MappingKind::Direct,
            behind: Behind::Memory(entry.memory),
            offset: entry.offset,
            perm: entry.perm,
        }));
        shown.sort_by_key(|one| one.range.start());
        shown
    }

    fn shown_of(&self, held: &ModelHeld) -> Shown {
        let (aperture, first) = match held.is_bounce() {
            true => (ApertureKind::Bounce, self.base),
            false => (ApertureKind::Coherent, self.base + BOUNCE_PAGES),
        };
        let kind = match (held.is_lease, held.spec) {
            (true, _) => MappingKind::Lease,
            (false, Some(_)) => MappingKind::Streaming,
            (false, None) => MappingKind::Coherent,
        };
        Shown {
            range: held.visible,
            kind,
            behind: Behind::Aperture(aperture),
            offset: held.visible.start().get() - first * P,
            perm: held.perm(),
        }
    }

    pub(super) fn translate(&self, range: IovaRange, want: Perm) {
        let expected = self.translated(range, want);
        let answer = self.domain.translate(range, want);
        let expected = expected
            .map(|pieces| (pieces, self.domain.usage().generation))
            .map_err(TranslationError::Translate);
        assert_eq!(answer, expected, "{range}");
    }

    fn translated(&self, range: IovaRange, want: Perm) -> Result<Vec<Translated>, TranslateError> {
        let shown = self.shown();
        let mut pieces = Vec::new();
        let mut at = range.start();
        loop {
            let byte = IovaRange::from_len(at, 1).unwrap();
            let there = shown.iter().find(|one| one.range.contains(byte));
            let there = there.ok_or(TranslateError::Hole { at })?;
            let perm = there.perm;
            if perm != want && perm != Perm::ReadWrite {
                return Err(TranslateError::Perm {
                    range: there.range,
                    perm,
                    want,
                });
            }
            let last = there.range.last().min(range.last());
            pieces.push(Translated {
                range: IovaRange::new(at, last).unwrap(),
                kind: there.kind,
                behind: there.behind,
                offset: there.offset + (at.get() - there.range.start().get()),
                perm,
            });
            if last == range.last() {
                return Ok(pieces);
            }
            at = last.checked_add(1).unwrap();
        }
    }

    pub(super) fn lookup(&self, range: IovaRange) {
        let shown = self.shown();
        let lowest = shown.iter().find(|one| one.range.overlaps(range));
        let answer = self.domain.lookup(range);
        assert_eq!(
            answer.as_ref().map(|view| view.visible),
            lowest.map(|one| one.range)
        );
        if let Some(view) = answer {
            self.check_view(&view);
        }
    }

    /// Does a view say what the model knows of what is visible there?
    fn check_view(&self, view: &MappingView) {
        assert_eq!(view.phase, Phase::Live);
        if let Some(held) = self.held.iter().find(|held| held.visible == view.visible) {
            assert_eq!((view.id, view.owner), (Some(held.id), held.owner));
            assert_eq!(view.perm, held.perm());
            let other = match held.is_lease {
                true => ViewKind::Lease,
                false => ViewKind::Coherent,
            };
            let kind = held.spec.map_or(other, |spec| ViewKind::Streaming {
                direction: spec.direction,
                source: Source {
                    memory: spec.memory,
                    offset: spec.offset,
                },
            });
            assert_eq!(view.kind, kind);
            return;
        }
        let table = self.direct_table();
        let entry = table.iter().find(|entry| entry.range == view.visible);
        let entry = entry.expect("it is held or it is direct");
        assert_eq!(
            (view.id, view.owner),
            (None, self.memories[&entry.memory].owner)
        );
        let source = Source {
            memory: entry.memory,
            offset: entry.offset,
        };
        assert_eq!(
            (view.perm, view.kind),
            (entry.perm, ViewKind::Direct { source })
        );
    }

    pub(super) fn check_direct(&mut self) {
        let table = self.direct_table();
        let mut live = super::direct_table(&self.domain);
        let waiting = self.limbo_views(Some(MappingKind::Direct));
        live.retain(|entry| waiting.iter().all(|view| view.visible != entry.range));
        assert_eq!(live, table);
        let usage = self.domain.usage();
        assert_eq!(usage.direct, table.len());
        let is_same = table == self.direct_before;
        let has_grown = usage.direct_generation > self.direct_generation;
        assert_eq!(has_grown, !is_same, "a number for each table, and no other");
        assert!(is_same == (usage.direct_generation == self.direct_generation));
        assert!(usage.direct_generation <= usage.generation);
        self.direct_generation = usage.direct_generation;
        self.direct_before = table;

        let listed = self
            .domain
            .mappings(MappingFilter::default(), Iova::new(0), 999);
        let is_sorted = listed.is_sorted_by_key(|view| view.visible);
        assert!(is_sorted, "{listed:?}");
        let listed = listed.into_iter();
        let listed: Vec<_> = listed.filter(|view| view.phase == Phase::Live).collect();
        let shown = self.shown();
        let ranges = shown.iter().map(|one| one.range);
        assert!(listed.iter().map(|view| view.visible).eq(ranges));
        listed.iter().for_each(|view| self.check_view(view));
        let settings = Settings {
            quotas: self.quotas,
            scrub: self.scrub,
            restrictions: self.restrictions.clone(),
        };
        assert_eq!(self.domain.settings(), settings);
        self.check_ranges();
    }

    /// Every edge that there is, and its neighbours.
    fn check_ranges(&self) {
        let ranges = self.domain.direct_ranges();
        for pair in ranges.windows(2) {
            assert!(pair[0].last().get() + 1 < pair[1].start().get());
        }
        let mut edges = vec![
            0,
            LIMIT,
            self.apertures().start().get(),
            self.apertures().last().get(),
        ];
        for range in self.restrictions.reserved() {
            edges.extend([range.start().get(), range.last().get()]);
        }
        for at in edges
            .into_iter()
            .flat_map(|at| [at.saturating_sub(1), at, at.saturating_add(1)])
        {
            let byte = range(at, at);
            let is_shown = ranges.iter().any(|range| range.contains(byte));
            assert_eq!(is_shown, self.check_place(byte).is_ok(), "{at:#x}");
        }
    }
}

fn misaligned(what: &'static str, value: u64) -> Result<(), MapDirectError> {
    match value.is_multiple_of(P) {
        true => Ok(()),
        false => Err(MapDirectError::Misaligned {
            what,
            value,
            granule_bytes: P,
        }),
    }
}
