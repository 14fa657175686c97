//! Sessions that read, in the model: of every page that was removed it knows who
//! may still use it.

use std::collections::BTreeSet;
use std::sync::Arc;

use super::ops::{AckWish, Kind};
use super::*;
use crate::domain::OpenError;
use crate::iotlb::Barrier;
use crate::mapping::MappingView;
use crate::session::{Account, AckError, Joining, Owed, Progress, Reader, Removal};

/// A session that reads, attached or fenced.
pub(super) struct ModelReader {
    fake: Arc<Fake>,
    kind: Kind,
    acked: u64,
    asked: u64,
    /// Memories whose file it has, and by when they must be closed.
    opened: BTreeMap<MemoryId, Option<u64>>,
    /// When it was fenced, in operations.
    fenced: Option<u64>,
    /// How often leases of it were taken away.
    revocations: usize,
    /// It has not been asked since.
    revoked: bool,
}

/// Something that was removed, and is not free.
#[derive(Clone, Debug)]
pub(super) struct Gone {
    pub(super) what: What,
    /// When it was made, in operations.
    pub(super) made: u64,
    removed: u64,
    users: BTreeSet<SessionId>,
    /// Whose lease it was.
    pub(super) lease_of: Option<SessionId>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum What {
    /// Pages of an aperture; is it the bounce aperture, and are they zeroed?
    Aperture(std::ops::Range<u64>, bool, bool),
    /// A page where a direct mapping was.
    Direct(u64, MemoryId),
    /// The use of memory through addresses that lead elsewhere now.
    Use(MemoryId),
    /// The number of a memory.
    Number,
}

impl Gone {
    pub(super) fn aperture(held: &ModelHeld, scrub: bool) -> Gone {
        let what = What::Aperture(held.pages(), held.is_bounce(), scrub);
        Gone {
            lease_of: held.owner.filter(|_| held.is_lease),
            ..Gone::of(what, held.made)
        }
    }

    pub(super) fn aperture_bytes(&self) -> u64 {
        match &self.what {
            What::Aperture(pages, ..) => pages.clone().count() as u64 * P,
            _ => 0,
        }
    }

    pub(super) fn of(what: What, made: u64) -> Gone {
        Gone {
            what,
            made,
            removed: 0,
            users: BTreeSet::new(),
            lease_of: None,
        }
    }

    /// In which generation, if not in the present one.
    pub(super) fn at(self, removed: u64) -> Gone {
        Gone { removed, ..self }
    }
}

impl ModelReader {
    fn new(fake: Arc<Fake>, kind: Kind, generation: u64) -> ModelReader {
        ModelReader {
            fake,
            kind,
            acked: generation,
            asked: generation,
            opened: BTreeMap::new(),
            fenced: None,
            revocations: 0,
            revoked: false,
        }
    }

    /// May it still use that?
    fn can_use(&self, gone: &Gone) -> bool {
        let Some(fenced) = self.fenced else {
            return self.acked < gone.removed;
        };
        self.acked < gone.removed
            && match &gone.what {
                What::Aperture(..) => gone.made < fenced,
                What::Direct(_, memory) | What::Use(memory) => {
                    gone.made < fenced && self.opened.contains_key(memory)
                }
                What::Number => false,
            }
    }

    fn acknowledge(&mut self, generation: u64) {
        self.acked = self.acked.max(generation);
        let acked = self.acked;
        self.opened
            .retain(|_, closed| closed.is_none_or(|closed| closed > acked));
    }

    /// Answers what it is asked for.
    fn hear_of(&mut self, generation: u64, closed: &[MemoryId], is_own: bool) -> Option<u64> {
        let revoked = std::mem::take(&mut self.revoked) && self.kind == Kind::Pins;
        let mut must_close = false;
        for memory in closed {
            if let Some(open @ None) = self.opened.get_mut(memory) {
                *open = Some(generation);
                must_close = true;
            }
        }
        if !must_close && self.acked.max(self.asked) >= generation {
            return None;
        }
        let owes = self.asked > self.acked;
        let holds = match self.kind {
            Kind::Frames => !is_own,
            _ => revoked || self.fake.holds_older_than(generation, &Barrier::run()),
        };
        if must_close || owes || holds {
            self.asked = generation;
            return Some(generation);
        }
        self.acknowledge(generation);
        None
    }
}

impl Model {
    pub(super) fn account(session: SessionId) -> u32 {
        u32::try_from(session.get() % 2).unwrap()
    }

    pub(super) fn ghosts(&self) -> usize {
        let fenced = |reader: &&ModelReader| reader.fenced.is_some();
        self.readers.values().filter(fenced).count()
    }

    pub(super) fn joining(session: SessionId, role: Role, kind: Kind) -> (Joining, Arc<Fake>) {
        let fake = match kind {
            Kind::Frames => Fake::frames(),
            Kind::Pins | Kind::Nothing => Fake::pins(),
        };
        let reader = Arc::clone(&fake) as Arc<dyn Reader>;
        let joining = Joining {
            role,
            account: Account(Model::account(session)),
            reader: (kind != Kind::Nothing).then_some(reader),
        };
        (joining, fake)
    }

    pub(super) fn reads(&mut self, session: SessionId, kind: Kind, fake: Arc<Fake>) {
        if kind != Kind::Nothing {
            let reader = ModelReader::new(fake, kind, self.generation);
            self.readers.insert(session, reader);
        }
    }

    /// A session ends: it holds nothing, or it may go on.
    pub(super) fn end_reading(&mut self, session: SessionId, fence: bool) {
        let now = self.clock;
        match self.readers.get_mut(&session) {
            Some(reader) if fence => {
                reader.fenced.get_or_insert(now);
            }
            _ => drop(self.readers.remove(&session)),
        }
    }

    /// Things were removed, in the present generation if they say nothing else:
    /// all who may still use them are asked.
    pub(super) fn removed(
        &mut self,
        gone: Vec<Gone>,
        closed: &[MemoryId],
        actor: Option<SessionId>,
    ) {
        let generation = self.domain.usage().generation;
        for (session, reader) in &mut self.readers {
            if reader.fenced.is_some() {
                for memory in closed {
                    if let Some(open) = reader.opened.get_mut(memory) {
                        open.get_or_insert(generation);
                    }
                }
                continue;
            }
            let asked = reader.hear_of(generation, closed, actor == Some(*session));
            let asked: Vec<_> = asked.into_iter().collect();
            assert_eq!(reader.fake.asked(), asked, "session {session}");
        }
        for mut one in gone {
            if one.removed == 0 {
                one.removed = generation;
            }
            let users = self
                .readers
                .iter()
                .filter(|(_, reader)| reader.can_use(&one));
            one.users = users.map(|(session, _)| *session).collect();
            self.gone.push(one);
        }
        self.removals.push(generation);
        self.free_what_nobody_uses();
    }

    /// Somebody else ended these: their attached owners were told so, once, before
    /// they were asked for anything.
    pub(super) fn revoked(&mut self, gone: &[ModelHeld]) {
        let leases = gone.iter().filter(|held| held.is_lease);
        let owners: BTreeSet<_> = leases.filter_map(|held| held.owner).collect();
        for owner in owners {
            if let Some(reader) = self.readers.get_mut(&owner) {
                reader.revocations += 1;
                reader.revoked = true;
            }
        }
    }

    /// Nobody else becomes a user of what is gone.
    pub(super) fn free_what_nobody_uses(&mut self) {
        let mut gone = std::mem::take(&mut self.gone);
        for one in &mut gone {
            let readers = &self.readers;
            let may = |session: &SessionId| readers.get(session).is_some_and(|r| r.can_use(one));
            let users: BTreeSet<_> = one.users.iter().copied().filter(may).collect();
            one.users = users;
        }
        let (free, gone): (Vec<_>, _) = gone.into_iter().partition(|one| one.users.is_empty());
        self.gone = gone;
        for one in free {
            if let What::Aperture(pages, _, true) = one.what {
                self.scrub(pages);
            }
        }
    }

    /// Must an aperture's page be left alone?
    pub(super) fn is_gone(&self, page: u64) -> bool {
        let is_there =
            |one: &Gone| matches!(&one.what, What::Aperture(at, ..) if at.contains(&page));
        self.gone.iter().any(is_there)
    }

    pub(super) fn is_place_gone(&self, page: u64) -> bool {
        let is_there = |one: &Gone| matches!(one.what, What::Direct(at, _) if at == page);
        self.gone.iter().any(is_there)
    }

    pub(super) fn numbers_gone(&self) -> usize {
        let numbers = self.gone.iter().filter(|one| one.what == What::Number);
        numbers.count()
    }

    /// What a reset of the bounce aperture makes of what waits.
    pub(super) fn zero_gone_bounces(&mut self) {
        for one in &mut self.gone {
            if let What::Aperture(_, true, scrub) = &mut one.what {
                *scrub = true;
            }
        }
    }

    /// What counts against the quota of direct mappings beside those there are:
    /// each place, and each memory that a new table led away from.
    pub(super) fn direct_records(&self) -> usize {
        let places = self.limbo_views(Some(MappingKind::Direct)).len();
        let uses = self.gone.iter().filter_map(|one| match one.what {
            What::Use(memory) => Some((one.removed, memory)),
            _ => None,
        });
        places + uses.collect::<BTreeSet<_>>().len()
    }

    fn is_quarantined(&self, gone: &Gone) -> bool {
        let is_ghost = |session: &SessionId| self.readers[session].fenced.is_some();
        gone.users.iter().all(is_ghost)
    }

    /// What counts against the quota of mappings for a session.
    pub(super) fn charged(&self, session: SessionId) -> usize {
        let is_aperture = |one: &&Gone| matches!(one.what, What::Aperture(..));
        let waiting = self.gone.iter().filter(is_aperture);
        let waiting = waiting.filter(|one| !self.is_quarantined(one)).count();
        let mine = |who: SessionId| Model::account(who) == Model::account(session);
        let held_back = self.limbo_views(None).into_iter();
        let held_back = held_back.filter(|view| view.blocked_by.is_some_and(mine));
        self.held.len() + waiting + held_back.count()
    }

    /// What is listed and not live.
    pub(super) fn limbo_views(&self, kind: Option<MappingKind>) -> Vec<MappingView> {
        let filter = MappingFilter {
            kind,
            ..MappingFilter::default()
        };
        let listed = self.domain.mappings(filter, Iova::new(0), 999);
        let gone = listed.into_iter().filter(|view| view.phase != Phase::Live);
        gone.collect()
    }

    /// The place that waits in a range, as a refusal names it.
    pub(super) fn waits_in(&self, range: IovaRange) -> Option<MapDirectError> {
        let views = self.limbo_views(Some(MappingKind::Direct));
        let hit = views.iter().find(|view| view.visible.overlaps(range));
        let refused = hit.map(|view| MapDirectError::Invalidating {
            range,
            hit: view.visible,
            blocked_by: view.blocked_by,
        });
        let is_gone = (0..=LIMIT / P + 1)
            .any(|page| pages(page, page).overlaps(range) && self.is_place_gone(page));
        assert_eq!(refused.is_some(), is_gone, "{range}");
        refused
    }

    pub(super) fn acknowledges(&mut self, session: SessionId, wish: AckWish) {
        let current = self.domain.usage().generation;
        let reader = self.readers.get_mut(&session);
        let asked = reader.as_ref().map_or(0, |reader| reader.asked);
        let generation = match wish {
            AckWish::Now => current,
            AckWish::Asked => asked,
            AckWish::Back(by) => current.saturating_sub(by),
            AckWish::Ahead(by) => current + by,
        };
        let expected = match (&reader, generation > current) {
            (None, _) if !self.sessions.contains_key(&session) => {
                Err(AckError::NoSession { session })
            }
            (_, true) => Err(AckError::Ahead {
                session,
                generation,
                current,
            }),
            _ => Ok(()),
        };
        assert_eq!(self.domain.acknowledge(session, generation), expected);
        if let (Ok(()), Some(reader)) = (expected, reader) {
            reader.acknowledge(generation);
            self.free_what_nobody_uses();
        }
    }

    pub(super) fn pins(&mut self, session: SessionId, back: Option<u64>) {
        let generation = self.domain.usage().generation;
        if let Some(reader) = self.readers.get(&session) {
            match back {
                Some(back) => reader.fake.pin(generation.saturating_sub(back)),
                None => reader.fake.unpin(),
            }
        }
    }

    pub(super) fn opens(&mut self, session: SessionId, id: MemoryId) {
        let known = self.domain.look().memories.get(&id).map(|m| m.region);
        let region = known.unwrap_or(RegionId::memory_slot(77));
        let missing = OpenError::NoSuchRegion { region };
        let expected = match (
            self.sessions.contains_key(&session),
            self.direct_users_of(id),
        ) {
            (false, _) => Err(Denied::SessionEnded { session }.into()),
            (true, 0) => Err(missing),
            (true, _) => Ok(id),
        };
        let answer = self.domain.open_memory(session, region);
        assert_eq!(answer.map(|(id, _)| id), expected);
        let reader = self.readers.get_mut(&session);
        if let (Ok(id), Some(reader)) = (expected, reader) {
            reader.opened.insert(id, None);
        }
    }

    /// Who owes what, and what waits for whom.
    pub(super) fn check_readers(&self) {
        for (session, reader) in &self.readers {
            assert_eq!(
                reader.fake.asked(),
                [],
                "{session} is asked for nothing else"
            );
            let standing = self.domain.standing(*session).unwrap();
            let told = (standing.fenced, standing.acked, standing.asked);
            let expected = (reader.fenced.is_some(), reader.acked, reader.asked);
            assert_eq!(told, expected, "session {session}");
            let owes = reader.fenced.is_none() && reader.asked > reader.acked;
            let owed = self.domain.owed(*session);
            assert_eq!(owed.is_some(), owes);
            let Some(Owed { closed, .. }) = owed else {
                continue;
            };
            let must_close = reader.opened.values().filter(|closed| closed.is_some());
            assert_eq!(closed.len(), must_close.count());
        }
        for (session, reader) in &self.readers {
            let revoked = reader.fake.revoked();
            assert_eq!(revoked, vec![0; reader.revocations], "session {session}");
            let has_opened = !reader.opened.is_empty();
            assert_eq!(self.domain.has_opened(*session), has_opened, "{session}");
        }
        assert_eq!(self.domain.usage().fenced, self.ghosts());
        self.check_limbo();
        for removed in &self.removals {
            self.check_progress(*removed);
        }
    }

    /// Page by page: what is listed as gone is what somebody may still use.
    fn check_limbo(&self) {
        let views = self.limbo_views(None);
        let mut listed: Vec<_> = Vec::new();
        for view in &views {
            for page in view.visible.start().get() / P..=view.visible.last().get() / P {
                listed.push((page, view.phase));
                let one = self.gone.iter().find(|one| match &one.what {
                    What::Aperture(pages, ..) => pages.contains(&page),
                    What::Direct(at, _) => *at == page,
                    What::Use(_) | What::Number => false,
                });
                let one = one.unwrap_or_else(|| panic!("nobody can use page {page}"));
                let blocked_by = view.blocked_by.is_none_or(|who| one.users.contains(&who));
                assert!(blocked_by, "{view:?} but {one:?}");
            }
        }
        let phase = |one: &Gone| match self.is_quarantined(one) {
            true => Phase::Quarantined,
            false => Phase::Invalidating,
        };
        let mut expected: Vec<_> = Vec::new();
        for one in &self.gone {
            match &one.what {
                What::Aperture(pages, ..) => {
                    expected.extend(pages.clone().map(|page| (page, phase(one))));
                }
                What::Direct(page, _) => expected.push((*page, phase(one))),
                What::Use(_) | What::Number => {}
            }
        }
        listed.sort_by_key(|(page, _)| *page);
        expected.sort_by_key(|(page, _)| *page);
        assert_eq!(listed, expected);
        let usage = self.domain.usage();
        let count = |phase| views.iter().filter(|view| view.phase == phase).count();
        assert_eq!(usage.invalidating, count(Phase::Invalidating));
        assert_eq!(usage.quarantined.mappings, count(Phase::Quarantined));
        let held_back = self.gone.iter().filter(|one| self.is_quarantined(one));
        let held_back = held_back.filter_map(|one| match &one.what {
            What::Aperture(pages, ..) => Some(pages.clone().count() as u64 * P),
            _ => None,
        });
        assert_eq!(usage.quarantined.bytes, held_back.sum::<u64>());
    }

    fn check_progress(&self, generation: u64) {
        let readers = self.readers.iter();
        let attached = readers.filter(|(_, reader)| reader.fenced.is_none());
        let behind = attached.filter(|(_, r)| r.acked < generation && r.asked > r.acked);
        let behind: Vec<_> = behind.map(|(session, _)| *session).collect();
        let progress = self.domain.progress(Removal { generation });
        let same = self.gone.iter().filter(|one| one.removed == generation);
        let same: Vec<_> = same.collect();
        match progress {
            Progress::Waiting(sessions) => assert_eq!(sessions, behind),
            Progress::Quarantined(sessions) => {
                assert_eq!(behind, []);
                let is_user = |session| same.iter().any(|one| one.users.contains(session));
                assert!(!sessions.is_empty() && sessions.iter().all(is_user));
            }
            Progress::Done => {
                assert_eq!(behind, []);
                let numbers = same.iter().filter(|one| one.what != What::Number);
                assert_eq!(numbers.count(), 0, "{same:?}");
            }
        }
    }

    /// When everybody has acknowledged, or is gone, nothing is held back, and
    /// when everything is given back, everything is free.
    pub(super) fn check_end(&mut self) {
        for who in [2, 4] {
            self.leave(self.session(who));
            self.check();
        }
        for who in [1, 3, 5] {
            self.acknowledges(self.session(who), AckWish::Now);
            self.check();
        }
        assert!(self.gone.is_empty(), "{:?}", self.gone);
        (1..=5).for_each(|who| self.leave(self.session(who)));
        self.join(1, Role::Driver, Kind::Nothing);
        for held in self.held.clone() {
            self.free(self.session(1), held.visible.start(), held.id);
        }
        self.clear_map(Actor::Owner, &[range(0, u64::MAX)]);
        self.check();
        let usage = self.domain.usage();
        let usable = BOUNCE_PAGES - u64::from(self.base == 0);
        assert_eq!(usage.bounce.largest_hole_bytes, usable * P);
        let coherent = usage.coherent_aperture;
        assert_eq!(coherent.largest_hole_bytes, COHERENT_PAGES * P);
    }
}
