//! Random operations against a model that is slow and obvious: it keeps every
//! byte of every memory, a list of what is live, and the direct table page by
//! page.

mod direct;
mod leases;
mod ops;
mod readers;

use std::collections::BTreeMap;
use std::io;

use proptest::prelude::*;

use self::ops::{EndWish, Kind, MapWish, Op, SyncWish, Twist, haunting_ops, kinds, ops};
use self::readers::{Gone, ModelReader, What};
use super::readers::Fake;
use super::*;
use crate::alloc::{AllocError, AllocRequest};
use crate::aperture::POISON;
use crate::coherent::{AllocCoherentError, CoherentSpec, FreeCoherentError};
use crate::lease::{LeaseBytesExceeded, LeaseError, LeaseSpec, LeaseTally, ReleaseError};
use crate::limits::{Quota, QuotaExceeded};
use crate::mapping::{MappingFilter, MappingId, Phase};
use crate::memory::{MemoryMissing, RegisterError, UnregisterError};
use crate::region::SpanError;
use crate::session::{Holdings, JoinError};

/// Pages of either aperture. They begin at 0, and page 0 is kept back, or at
/// page 5, between direct mappings.
const BOUNCE_PAGES: u64 = 12;
const COHERENT_PAGES: u64 = 6;
const PAGES: u64 = BOUNCE_PAGES + COHERENT_PAGES;
/// Cuts page 40: pages 0 to 39 are whole.
const LIMIT: u64 = 40 * P + 99;
const QUOTAS: Quotas = Quotas {
    sessions: 4,
    mappings: 7,
    memories: 4,
    direct: 6,
    leases: 3,
    lease_bytes: 6 * P,
};

struct ModelMemory {
    owner: Option<SessionId>,
    bytes: Vec<u8>,
    writable: bool,
    sealed: bool,
    file: File,
}

/// A live mapping or allocation.
#[derive(Clone)]
struct ModelHeld {
    id: MappingId,
    owner: Option<SessionId>,
    visible: IovaRange,
    /// `None` for coherent memory and leases.
    spec: Option<MapSpec>,
    is_lease: bool,
    /// When it was made, in operations.
    made: u64,
}

impl ModelHeld {
    fn pages(&self) -> std::ops::Range<u64> {
        self.visible.start().get() / P..self.visible.last().get() / P + 1
    }

    fn is_bounce(&self) -> bool {
        self.spec.is_some() || self.is_lease
    }

    fn is_coherent(&self) -> bool {
        !self.is_bounce()
    }

    fn perm(&self) -> Perm {
        self.spec
            .map_or(Perm::ReadWrite, |spec| spec.direction.perm())
    }
}

struct Model {
    domain: Domain,
    /// First page of the apertures.
    base: u64,
    /// What freed memory is overwritten with.
    scrub_byte: u8,
    scrub: Scrub,
    quotas: Quotas,
    restrictions: Restrictions,
    /// By page number.
    direct: BTreeMap<u64, direct::Page>,
    /// Number of the youngest direct mapping.
    next_entry: u64,
    direct_generation: u64,
    direct_before: Vec<DirectMapping>,
    sessions: BTreeMap<SessionId, Role>,
    memories: BTreeMap<MemoryId, ModelMemory>,
    /// Every id that ever was, so that dead ones are tried too.
    memory_ids: Vec<MemoryId>,
    held: Vec<ModelHeld>,
    /// Every name that ever was.
    names: Vec<(Iova, MappingId)>,
    /// All bytes up to the end of the apertures, by address.
    shared: Vec<u8>,
    generation: u64,
    entries: Vec<Entry>,
    /// Operations so far.
    clock: u64,
    /// Who has joined how often: each time as another session.
    lives: BTreeMap<u64, u64>,
    readers: BTreeMap<SessionId, ModelReader>,
    /// What was removed and somebody may still use.
    gone: Vec<Gone>,
    /// When pages were made that a new table shows as the old one did, or that
    /// belong to an entry where the old one led to the same memory.
    kept: BTreeMap<u64, u64>,
    /// Of the direct table, in the operation that is under way.
    direct_gone: Vec<Gone>,
    /// Generations in which something was.
    removals: Vec<u64>,
}

/// What errors and answers are compared as: their numbers too.
fn told(answer: &impl std::fmt::Debug) -> String {
    format!("{answer:?}")
}

/// As [`settle`](crate::batch::settle), on what is told.
fn settled<T>(
    mode: BatchMode,
    answers: Vec<Result<T, String>>,
) -> Result<Vec<Result<T, String>>, String> {
    match answers.iter().position(Result::is_err) {
        Some(index) if mode == BatchMode::AllOrNothing => match &answers[index] {
            Err(error) => Err(format!("BatchError {{ index: {index}, error: {error} }}")),
            Ok(_) => unreachable!(),
        },
        _ => Ok(answers),
    }
}

/// Takes each entry a step further. Behind the first failure of an all-or-nothing
/// batch nothing is done.
fn stepped<T, U>(
    mode: BatchMode,
    entries: Vec<Result<T, String>>,
    mut step: impl FnMut(T) -> Result<U, String>,
) -> Result<Vec<Result<U, String>>, String> {
    let mut answers = Vec::new();
    for entry in entries {
        answers.push(entry.and_then(&mut step));
        if mode == BatchMode::AllOrNothing && answers.last().is_some_and(Result::is_err) {
            break;
        }
    }
    settled(mode, answers)
}

/// The real answers in the model's terms.
fn heard<T, U, E: std::fmt::Debug>(
    answers: BatchResult<T, E>,
    view: impl Fn(T) -> U,
) -> Result<Vec<Result<U, String>>, String> {
    match answers {
        Err(refused) => Err(told(&refused)),
        Ok(answers) => Ok(answers
            .into_iter()
            .map(|answer| answer.map(&view).map_err(|error| told(&error)))
            .collect()),
    }
}

impl Model {
    fn new(base: u64, scrub_with: ScrubWith) -> Model {
        let layout = LayoutSpec {
            bounce_bytes: BOUNCE_PAGES * P,
            coherent_bytes: COHERENT_PAGES * P,
            aperture_base: base * P,
            iova_limit: LIMIT,
            ..LayoutSpec::default()
        };
        let settings = Settings {
            quotas: QUOTAS,
            ..Settings::default()
        };
        let layout = layout.plan().unwrap();
        let domain = Domain::create("model", layout, settings, scrub_with).unwrap();
        let scrub_byte = match scrub_with {
            ScrubWith::Zero => 0,
            ScrubWith::Poison => POISON,
        };
        Model {
            domain,
            base,
            scrub_byte,
            scrub: Scrub::OnMap,
            quotas: QUOTAS,
            restrictions: Restrictions::default(),
            direct: BTreeMap::new(),
            next_entry: 0,
            direct_generation: 0,
            direct_before: Vec::new(),
            sessions: BTreeMap::new(),
            memories: BTreeMap::new(),
            memory_ids: Vec::new(),
            held: Vec::new(),
            names: Vec::new(),
            // New memory counts as freed.
            shared: vec![scrub_byte; size((base + PAGES) * P)],
            generation: 0,
            entries: Vec::new(),
            clock: 0,
            lives: BTreeMap::new(),
            readers: BTreeMap::new(),
            gone: Vec::new(),
            kept: BTreeMap::new(),
            direct_gone: Vec::new(),
            removals: Vec::new(),
        }
    }

    fn bounce_pages(&self) -> std::ops::Range<u64> {
        self.base..self.base + BOUNCE_PAGES
    }

    fn coherent_pages(&self) -> std::ops::Range<u64> {
        self.base + BOUNCE_PAGES..self.base + PAGES
    }

    fn session(&self, who: u64) -> SessionId {
        let lives = self.lives.get(&who).copied().unwrap_or(0);
        SessionId::new(who + 10 * lives)
    }

    fn actor(&self, who: u64) -> Actor {
        match who {
            0 => Actor::Owner,
            who => Actor::Session(self.session(who)),
        }
    }

    fn run(&mut self, op: &Op) {
        self.clock += 1;
        match op {
            Op::Join(who, role, kind) => self.join(*who, *role, *kind),
            Op::Leave(who) => self.leave(self.session(*who)),
            Op::Fence(who) => self.fence(self.session(*who)),
            Op::Ack(who, wish) => self.acknowledges(self.session(*who), *wish),
            Op::Pin(who, back) => self.pins(self.session(*who), *back),
            Op::Open(who, which) => {
                let id = self.memory_id(*which);
                self.opens(self.session(*who), id);
            }
            Op::Register(who, pages, writable, persistent) => {
                self.register(self.session(*who), *pages, *writable, *persistent);
            }
            Op::Unregister(who, which) => {
                let id = self.memory_id(*which);
                self.unregister(self.session(*who), id);
            }
            Op::Map(who, mode, wishes) => self.map(self.session(*who), *mode, wishes),
            Op::Unmap(who, mode, wishes) => self.unmap(self.session(*who), *mode, wishes),
            Op::Sync(who, mode, wishes) => self.sync(self.session(*who), *mode, wishes),
            Op::Alloc(who, spec) => self.alloc(self.session(*who), spec),
            Op::Free(who, which, twist) => {
                let (iova, id) = self.name(*which, *twist);
                self.free(self.session(*who), iova, id);
            }
            Op::Lease(who, spec) => self.lease(self.session(*who), spec),
            Op::Release(who, which, twist) => {
                let (iova, id) = self.name(*which, *twist);
                self.release(self.session(*who), iova, id);
            }
            Op::Scrub(scrub) => {
                set_scrub(&self.domain, *scrub);
                self.scrub = *scrub;
            }
            Op::DeviceWrites(at, len, byte) => {
                let bytes = vec![*byte; size(*len)];
                let at = &(self.base * P + at);
                device_writes(&self.domain, Iova::new(*at), &bytes);
                self.shared[size(*at)..size(at + len)].copy_from_slice(&bytes);
            }
            Op::DriverWrites(which, at, len, byte) => {
                let id = self.memory_id(*which);
                if let Some(memory) = self.memories.get_mut(&id).filter(|m| !m.sealed) {
                    let at = size(*at) % memory.bytes.len();
                    let end = (at + size(*len)).min(memory.bytes.len());
                    memory.bytes[at..end].fill(*byte);
                    let at = u64::try_from(at).unwrap();
                    memory
                        .file
                        .write_all_at(&memory.bytes[size(at)..end], at)
                        .unwrap();
                }
            }
            Op::SealMemory(which) => {
                let id = self.memory_id(*which);
                if let Some(memory) = self.memories.get_mut(&id) {
                    fcntl_add_seals(&memory.file, SealFlags::FUTURE_WRITE).unwrap();
                    memory.sealed = true;
                }
            }
            Op::MapDirect(who, mode, wishes) => self.map_direct(self.actor(*who), *mode, wishes),
            Op::UnmapDirect(who, ranges) => self.unmap_direct(self.actor(*who), ranges),
            Op::ClearMap(who, ranges) => self.clear_map(self.actor(*who), ranges),
            Op::SetMap(who, table, expect) => {
                self.set_map(self.actor(*who), table.as_deref(), *expect)
            }
            Op::ResetBounce(who, force) => self.reset(self.actor(*who), *force),
            Op::Update(direct, scrub, reserved, allowed) => {
                self.update(*direct, *scrub, reserved, allowed);
            }
            Op::Translate(range, want) => self.translate(*range, *want),
            Op::Lookup(range) => self.lookup(*range),
        }
    }

    fn memory_id(&self, which: usize) -> MemoryId {
        let never = MemoryId::new(999);
        let ids = &self.memory_ids;
        ids.get(which % ids.len().max(1)).copied().unwrap_or(never)
    }

    /// Mostly the youngest names, some of which are dead already.
    fn name(&self, which: usize, twist: Twist) -> (Iova, MappingId) {
        let never = (Iova::new(P), MappingId::new(999));
        let young = self.names.iter().rev();
        let (iova, id) = young
            .clone()
            .nth(which % young.len().max(1))
            .copied()
            .unwrap_or(never);
        match twist {
            Twist::None => (iova, id),
            Twist::Iova => (Iova::new(iova.get() + 1), id),
            Twist::Id => (iova, MappingId::new(id.get() + 1)),
        }
    }

    fn driver(&self, session: SessionId) -> Result<(), Denied> {
        match self.sessions.get(&session) {
            None => Err(Denied::SessionEnded { session }),
            Some(Role::Driver) => Ok(()),
            Some(role) => Err(Denied::WrongRole {
                session,
                role: *role,
            }),
        }
    }

    fn room(quota: Quota, limit: u32, used: usize) -> Result<(), QuotaExceeded> {
        if used < usize::try_from(limit).unwrap() {
            return Ok(());
        }
        Err(QuotaExceeded { quota, limit, used })
    }

    fn join(&mut self, who: u64, role: Role, kind: Kind) {
        let before = self.session(who);
        if self.sessions.contains_key(&before) || self.readers.contains_key(&before) {
            return; // as somebody else, once that one is gone
        }
        *self.lives.entry(who).or_default() += 1;
        let session = self.session(who);
        let known = self.sessions.len() + self.ghosts();
        let room = Self::room(Quota::Sessions, QUOTAS.sessions, known);
        let (joining, fake) = Model::joining(session, role, kind);
        let answer = self.domain.join(session, joining);
        let generation = self.domain.usage().generation;
        assert_eq!(answer, room.map(|()| generation).map_err(JoinError::Quota));
        if answer.is_ok() {
            self.sessions.insert(session, role);
            self.reads(session, kind, fake);
        }
    }

    fn leave(&mut self, session: SessionId) {
        self.domain.leave(session);
        self.ended(session, false);
    }

    fn fence(&mut self, session: SessionId) {
        let (reads, was_there) = (
            self.readers.contains_key(&session),
            self.sessions.contains_key(&session),
        );
        self.domain.fence(session);
        if was_there || !reads {
            self.ended(session, true);
        }
    }

    fn ended(&mut self, session: SessionId, fence: bool) {
        self.end_reading(session, fence);
        self.free_what_nobody_uses();
        if self.sessions.remove(&session).is_none() {
            return;
        }
        let (forgotten, stay) = std::mem::take(&mut self.memories)
            .into_iter()
            .partition(|(_, memory)| memory.owner == Some(session));
        self.memories = stay;
        let forgotten: BTreeMap<MemoryId, ModelMemory> = forgotten;
        let direct = self.forget_direct_of_unknown_memories();
        let (gone, stay) = self
            .held
            .drain(..)
            .partition::<Vec<_>, _>(|held| held.owner == Some(session));
        self.held = stay;
        if gone.is_empty() && forgotten.is_empty() {
            return;
        }
        // First the apertures, then the direct table: a generation each.
        let last = self.domain.usage().generation;
        let before = last - u64::from(!direct.is_empty());
        let mut all: Vec<_> = gone
            .iter()
            .map(|held| Gone::aperture(held, true).at(before))
            .collect();
        all.extend(direct);
        all.extend(forgotten.keys().map(|_| Gone::of(What::Number, 0)));
        let closed: Vec<_> = forgotten.into_keys().collect();
        self.removed(all, &closed, None);
    }

    fn zero(&mut self, pages: std::ops::Range<u64>) {
        self.shared[size(pages.start * P)..size(pages.end * P)].fill(0);
    }

    /// What happens to memory that is freed.
    fn scrub(&mut self, pages: std::ops::Range<u64>) {
        self.shared[size(pages.start * P)..size(pages.end * P)].fill(self.scrub_byte);
    }

    fn register(&mut self, session: SessionId, pages: u64, writable: bool, persistent: bool) {
        let expected = self
            .driver(session)
            .map_err(RegisterError::Denied)
            .and_then(|()| {
                let known = self.memories.len() + self.numbers_gone();
                Self::room(Quota::Memories, QUOTAS.memories, known).map_err(RegisterError::Quota)
            });
        let fd = driver_memfd("domain-model", pages * P).unwrap();
        let file = File::from(fd.try_clone().unwrap());
        let bytes = pattern(pages * P, u64::try_from(self.memory_ids.len()).unwrap());
        file.write_all_at(&bytes, 0).unwrap();
        let memory = ClientMemory::accept(fd, writable).unwrap();

        match self.domain.register(session, memory, persistent) {
            Ok(id) => {
                assert!(expected.is_ok());
                assert!(!self.memory_ids.contains(&id));
                self.memory_ids.push(id);
                let memory = ModelMemory {
                    owner: (!persistent).then_some(session),
                    bytes,
                    writable,
                    sealed: false,
                    file,
                };
                self.memories.insert(id, memory);
            }
            Err(refused) => assert_eq!(told(&refused), told(&expected.unwrap_err())),
        }
    }

    fn memory_of(&self, session: SessionId, id: MemoryId) -> Result<&ModelMemory, MemoryMissing> {
        match self.memories.get(&id) {
            None => Err(MemoryMissing::NoSuchMemory { id }),
            Some(memory) if memory.owner.is_some_and(|owner| owner != session) => {
                Err(MemoryMissing::NotYours { id })
            }
            Some(memory) => Ok(memory),
        }
    }

    fn users_of(&self, id: MemoryId) -> u64 {
        let specs = self.held.iter().filter_map(|held| held.spec);
        specs
            .filter(|spec| spec.memory == id)
            .count()
            .try_into()
            .unwrap()
    }

    fn unregister(&mut self, session: SessionId, id: MemoryId) {
        let expected = (|| {
            self.driver(session)?;
            self.memory_of(session, id)?;
            match (self.users_of(id), self.direct_users_of(id)) {
                (0, 0) => Ok(()),
                (mappings, direct) => Err(UnregisterError::InUse {
                    id,
                    mappings,
                    direct,
                }),
            }
        })();
        assert_eq!(self.domain.unregister(session, id).map(drop), expected);
        if expected.is_ok() {
            self.memories.remove(&id);
            self.removed(vec![Gone::of(What::Number, 0)], &[id], Some(session));
        }
    }

    fn map(&mut self, session: SessionId, mode: BatchMode, wishes: &[MapWish]) {
        let specs: Vec<_> = wishes
            .iter()
            .map(|wish| MapSpec {
                memory: self.memory_id(wish.memory),
                ..wish.spec
            })
            .collect();
        let held_before = self.held.clone();
        match self.domain.map(session, &specs, mode) {
            Ok(answers) => {
                assert_eq!(answers.len(), specs.len());
                for (spec, answer) in specs.iter().zip(answers) {
                    assert!(mode == BatchMode::Partial || answer.is_ok());
                    self.mapped(session, spec, answer);
                }
            }
            Err(refused) => {
                assert_eq!(mode, BatchMode::AllOrNothing);
                let (before, last) = (&specs[..refused.index], &specs[refused.index]);
                let error = told(&refused.error);
                let is_right = self.some_placement_ends_so(session, before, last, &error);
                assert!(is_right, "{error} for {last:?} after {before:?}");
                self.held = held_before;
            }
        }
    }

    /// One entry's answer: where it lies is the allocator's choice, that it
    /// may lie there is not.
    fn mapped(&mut self, session: SessionId, spec: &MapSpec, answer: Result<Mapped, MapError>) {
        match (answer, self.places(session, spec)) {
            (Ok(mapped), Ok(places)) => {
                assert!(places.contains(&visible(mapped)), "{mapped:?} for {spec:?}");
                let mut held = ModelHeld {
                    id: MappingId::new(0), // learnt below
                    owner: Some(session),
                    visible: visible(mapped),
                    spec: Some(*spec),
                    is_lease: false,
                    made: self.clock,
                };
                self.learn(&mut held, mapped.id);
                self.fill(&held);
                self.held.push(held);
            }
            (Err(refused), Err(expected)) => {
                assert_eq!(told(&refused), told(&expected), "{spec:?}");
            }
            (answer, places) => panic!("{answer:?}, expected {places:?} for {spec:?}"),
        }
    }

    /// Is there a way to place the entries before it so that the last one is
    /// refused with that error? Where they lay nobody knows: they were undone.
    fn some_placement_ends_so(
        &mut self,
        session: SessionId,
        before: &[MapSpec],
        last: &MapSpec,
        error: &str,
    ) -> bool {
        let Some((first, rest)) = before.split_first() else {
            let refused = self.places(session, last).err();
            return refused.is_some_and(|refused| told(&refused) == error);
        };
        let places = self.places(session, first).unwrap_or_default();
        places.into_iter().any(|visible| {
            self.held.push(ModelHeld {
                id: MappingId::new(0),
                owner: Some(session),
                visible,
                spec: Some(*first),
                is_lease: false,
                made: self.clock,
            });
            let ends_so = self.some_placement_ends_so(session, rest, last, error);
            self.held.pop();
            ends_so
        })
    }

    /// Ids are never used again.
    fn learn(&mut self, held: &mut ModelHeld, id: MappingId) {
        assert!(self.names.iter().all(|(_, old)| *old < id));
        held.id = id;
        self.names.push((held.visible.start(), id));
    }

    /// Which iovas the mapping may get, or why none.
    fn places(&self, session: SessionId, spec: &MapSpec) -> Result<Vec<IovaRange>, MapError> {
        self.driver(session)?;
        let memory = self.memory_of(session, spec.memory)?;
        let bytes = u64::try_from(memory.bytes.len()).unwrap();
        if spec.len_bytes == 0 {
            return Err(SpanError::Empty.into());
        }
        if spec.offset + spec.len_bytes > bytes {
            return Err(MapError::Span(SpanError::OutsideMemory {
                offset: spec.offset,
                len: spec.len_bytes,
                size: bytes,
            }));
        }
        if spec.direction != Direction::ToDevice && !memory.writable {
            return Err(MapError::MemoryReadOnly {
                id: spec.memory,
                direction: spec.direction,
            });
        }
        Self::room(Quota::Mappings, QUOTAS.mappings, self.charged(session))?;
        let lead = if spec.keep_offset { spec.offset % P } else { 0 };
        let request = AllocRequest {
            len_bytes: lead + spec.len_bytes,
            align_bytes: spec.align_bytes,
            limit: spec.limit,
        };
        let pages = self.fits(self.bounce_pages(), request)?;
        let visible = |page| IovaRange::from_len(Iova::new(page * P + lead), spec.len_bytes);
        Ok(pages
            .into_iter()
            .map(|page| visible(page).unwrap())
            .collect())
    }

    /// All pages where the request fits, or why there is none.
    fn fits(
        &self,
        pages: std::ops::Range<u64>,
        request: AllocRequest,
    ) -> Result<Vec<u64>, AllocError> {
        let AllocRequest {
            len_bytes,
            align_bytes,
            limit,
        } = request;
        if len_bytes == 0 {
            return Err(AllocError::ZeroLength);
        }
        if align_bytes != 0 && !align_bytes.is_power_of_two() {
            return Err(AllocError::BadAlignment { align_bytes });
        }
        let want = len_bytes.div_ceil(P);
        let is_usable = |page: u64| {
            let below_limit = limit.is_none_or(|last| page * P + P - 1 <= last.get());
            let is_free = !self.held.iter().any(|held| held.pages().contains(&page));
            page > 0 && pages.contains(&page) && below_limit && is_free && !self.is_gone(page)
        };
        // For each page, how many may be used from there on.
        let run = |page: u64| (page..).take_while(|page| is_usable(*page)).count() as u64;
        let is_aligned = |page: u64| (page * P).is_multiple_of(align_bytes.max(P));
        let fits = pages
            .clone()
            .filter(|page| is_aligned(*page) && run(*page) >= want);
        let fits: Vec<_> = fits.collect();
        if fits.is_empty() {
            return Err(AllocError::NoSpace {
                want_bytes: len_bytes,
                align_bytes: align_bytes.max(P),
                largest_hole_bytes: pages.clone().map(run).max().unwrap_or(0) * P,
            });
        }
        Ok(fits)
    }

    /// All granules zero, then the driver's bytes if they travel.
    fn fill(&mut self, held: &ModelHeld) {
        self.zero(held.pages());
        let Some(spec) = held.spec else { return };
        if !spec.skip_sync && (spec.direction != Direction::FromDevice || spec.preserve) {
            self.copy_in(held.visible.start(), spec, 0, spec.len_bytes);
        }
    }

    fn copy_in(&mut self, iova: Iova, spec: MapSpec, skip: u64, len: u64) {
        let (to, from) = (size(iova.get() + skip), size(spec.offset + skip));
        let bytes = &self.memories[&spec.memory].bytes[from..from + size(len)];
        self.shared[to..to + size(len)].copy_from_slice(bytes);
    }

    /// `false` if the driver has sealed its memory.
    fn copy_out(&mut self, iova: Iova, spec: MapSpec, skip: u64, len: u64) -> bool {
        let (from, to) = (size(iova.get() + skip), size(spec.offset + skip));
        let memory = self.memories.get_mut(&spec.memory).unwrap();
        if !memory.sealed {
            memory.bytes[to..to + size(len)].copy_from_slice(&self.shared[from..from + size(len)]);
        }
        !memory.sealed
    }

    fn named(
        &self,
        session: SessionId,
        iova: Iova,
        id: MappingId,
    ) -> Result<&ModelHeld, MappingMissing> {
        let held = self
            .held
            .iter()
            .find(|held| held.visible.start() == iova && held.id == id)
            .ok_or(MappingMissing::NoSuchMapping { iova, id })?;
        match held.owner {
            Some(owner) if owner != session => Err(MappingMissing::NotYours { iova, id }),
            _ => Ok(held),
        }
    }

    fn streaming(
        &self,
        session: SessionId,
        iova: Iova,
        id: MappingId,
    ) -> Result<MapSpec, MappingMissing> {
        let missing = MappingMissing::NoSuchMapping { iova, id };
        let is_coherent = iova.get() >= self.coherent_pages().start * P;
        // A lease is no streaming mapping, whoever owns it.
        if is_coherent || self.is_lease(id) {
            return Err(missing);
        }
        self.named(session, iova, id)?.spec.ok_or(missing)
    }

    fn unmap(&mut self, session: SessionId, mode: BatchMode, wishes: &[EndWish]) {
        let ends: Vec<_> = wishes
            .iter()
            .map(|wish| {
                let (iova, id) = self.name(wish.mapping, wish.twist);
                UnmapSpec {
                    iova,
                    id,
                    written_bytes: wish.written_bytes,
                    skip_sync: wish.skip_sync,
                }
            })
            .collect();
        let mut named = Vec::new();
        let checked = ends.iter().map(|end| {
            let back = self
                .bytes_back(session, end)
                .map_err(|error| told(&error))?;
            if named.contains(&end.id) {
                return Err(told(&UnmapError::Duplicate { id: end.id }));
            }
            named.push(end.id);
            Ok((*end, back))
        });
        let checked = checked.collect();
        let expected = settled(mode, checked).and_then(|checked| {
            stepped(mode, checked, |(end, back)| {
                self.copy_back(session, end, back)
            })
        });

        let answers = self.domain.unmap(session, &ends, mode);
        assert_eq!(heard(answers, |back| back), expected, "{ends:?}");

        let mut gone = Vec::new();
        for (end, outcome) in ends.iter().zip(expected.into_iter().flatten()) {
            if outcome.is_ok() {
                let at = self.held.iter().position(|held| held.id == end.id).unwrap();
                let ended = self.held.remove(at);
                let scrub = self.scrub == Scrub::OnUnmap || self.scrub_byte != 0;
                gone.push(Gone::aperture(&ended, scrub));
            }
        }
        if !gone.is_empty() {
            self.removed(gone, &[], Some(session));
        }
    }

    fn bytes_back(&self, session: SessionId, end: &UnmapSpec) -> Result<u64, UnmapError> {
        self.driver(session)?;
        let spec = self.streaming(session, end.iova, end.id)?;
        let len_bytes = spec.len_bytes;
        let (decides, all) = if spec.skip_sync || end.skip_sync {
            (Err("copies are skipped"), 0)
        } else if spec.direction == Direction::ToDevice {
            (Err("TO_DEVICE"), 0)
        } else if spec.preserve {
            (Err("preserve"), len_bytes)
        } else {
            (Ok(()), len_bytes)
        };
        let must_decide = decides.is_ok() && spec.direction == Direction::FromDevice;
        match (decides, end.written_bytes) {
            (Err(why), Some(written_bytes)) => {
                Err(UnmapError::WrittenUnwanted { written_bytes, why })
            }
            (Ok(()), Some(written_bytes)) if written_bytes > len_bytes => {
                Err(UnmapError::WrittenTooLarge {
                    written_bytes,
                    len_bytes,
                })
            }
            (Ok(()), Some(written_bytes)) => Ok(written_bytes),
            (_, None) if must_decide => Err(UnmapError::WrittenMissing { len_bytes }),
            (_, None) => Ok(all),
        }
    }

    fn copy_back(&mut self, session: SessionId, end: UnmapSpec, back: u64) -> Result<u64, String> {
        let spec = self.streaming(session, end.iova, end.id).unwrap();
        if back == 0 || self.copy_out(end.iova, spec, 0, back) {
            return Ok(back);
        }
        Err(told(&UnmapError::Copy {
            memory: spec.memory,
            offset: spec.offset,
            len_bytes: back,
            cause: sealed(),
        }))
    }

    fn sync(&mut self, session: SessionId, mode: BatchMode, wishes: &[SyncWish]) {
        let parts: Vec<_> = wishes
            .iter()
            .map(|wish| {
                let (iova, id) = self.name(wish.mapping, wish.twist);
                SyncSpec {
                    iova,
                    id,
                    offset: wish.offset,
                    len_bytes: wish.len_bytes,
                    target: wish.target,
                }
            })
            .collect();
        let checked = parts.iter().map(|part| {
            let spec = self
                .check_part(session, part)
                .map_err(|error| told(&error))?;
            Ok((*part, spec))
        });
        let checked = checked.collect();
        let expected = settled(mode, checked)
            .and_then(|checked| stepped(mode, checked, |(part, spec)| self.copy_part(part, spec)));

        let answers = self.domain.sync(session, &parts, mode);
        assert_eq!(heard(answers, |()| ()), expected, "{parts:?}");
    }

    fn check_part(&self, session: SessionId, part: &SyncSpec) -> Result<MapSpec, SyncError> {
        self.driver(session)?;
        let spec = self.streaming(session, part.iova, part.id)?;
        if part.len_bytes == 0 {
            return Err(SyncError::ZeroLength);
        }
        if part.offset + part.len_bytes > spec.len_bytes {
            return Err(SyncError::OutsideMapping {
                offset: part.offset,
                len_bytes: part.len_bytes,
                mapping_bytes: spec.len_bytes,
            });
        }
        let direction = spec.direction;
        let against = match part.target {
            SyncTarget::ForCpu => direction == Direction::ToDevice,
            SyncTarget::ForDevice => direction == Direction::FromDevice && !spec.preserve,
        };
        if against {
            return Err(SyncError::WrongDirection { direction });
        }
        Ok(spec)
    }

    fn copy_part(&mut self, part: SyncSpec, spec: MapSpec) -> Result<(), String> {
        if part.target == SyncTarget::ForDevice {
            self.copy_in(part.iova, spec, part.offset, part.len_bytes);
            return Ok(());
        }
        if self.copy_out(part.iova, spec, part.offset, part.len_bytes) {
            return Ok(());
        }
        Err(told(&SyncError::Copy {
            memory: spec.memory,
            offset: spec.offset + part.offset,
            len_bytes: part.len_bytes,
            cause: sealed(),
        }))
    }

    fn alloc(&mut self, session: SessionId, spec: &CoherentSpec) {
        let expected = (|| {
            self.driver(session)?;
            Self::room(Quota::Mappings, QUOTAS.mappings, self.charged(session))?;
            Ok::<_, AllocCoherentError>(self.fits(self.coherent_pages(), spec.place)?)
        })();
        let answer = self.domain.alloc_coherent(session, spec);
        assert_eq!(answer.as_ref().err(), expected.as_ref().err());
        let (Ok(made), Ok(pages)) = (answer, expected) else {
            return;
        };
        let visible = |page| IovaRange::from_len(Iova::new(page * P), spec.place.len_bytes);
        assert!(
            pages.iter().any(|page| visible(*page) == Ok(made.range)),
            "{made:?}"
        );
        let mut held = ModelHeld {
            id: made.id,
            owner: (!spec.persistent).then_some(session),
            visible: made.range,
            spec: None,
            is_lease: false,
            made: self.clock,
        };
        self.learn(&mut held, made.id);
        self.fill(&held);
        self.held.push(held);
    }

    fn free(&mut self, session: SessionId, iova: Iova, id: MappingId) {
        let expected = (|| {
            self.driver(session)?;
            let held = self.named(session, iova, id);
            // A streaming mapping is no allocation, whoever owns it.
            if iova.get() < self.coherent_pages().start * P {
                return Err(MappingMissing::NoSuchMapping { iova, id }.into());
            }
            held.map(|_| ()).map_err(FreeCoherentError::Missing)
        })();
        let freed = self.domain.free_coherent(session, iova, id);
        assert_eq!(freed.map(drop), expected);
        if expected.is_ok() {
            let at = self.held.iter().position(|held| held.id == id).unwrap();
            let freed = self.held.remove(at);
            let gone = Gone::aperture(&freed, true);
            self.removed(vec![gone], &[], Some(session));
        }
    }

    fn check(&mut self) {
        self.domain.check_invariants();
        self.check_bytes();
        self.check_table();
        self.check_direct();
        self.check_counts();
        self.check_readers();
    }

    /// What is live shows exactly the model's bytes. What is free may have been
    /// scrubbed at any time, and shows nothing new.
    fn check_bytes(&mut self) {
        for page in self.base..self.base + PAGES {
            let range = IovaRange::from_len(Iova::new(page * P), P).unwrap();
            let actual = seen(&self.domain, range);
            let is_gone = self.is_gone(page);
            let model = &mut self.shared[size(page * P)..size(page * P + P)];
            let is_live = self.held.iter().any(|held| held.pages().contains(&page));
            let is_scrubbed = actual.iter().all(|byte| *byte == self.scrub_byte);
            assert!(
                actual == model || (!is_live && !is_gone && is_scrubbed),
                "page {page} shows what it should not"
            );
            model.copy_from_slice(&actual);
        }
        for (id, memory) in &self.memories {
            let mut actual = vec![0; memory.bytes.len()];
            memory.file.read_exact_at(&mut actual, 0).unwrap();
            assert!(actual == memory.bytes, "memory {id} was changed");
        }
    }

    fn check_table(&mut self) {
        self.held.sort_by_key(|held| held.visible.start());
        let entry = |held: &ModelHeld| {
            let is_bounce = held.is_bounce();
            let first = if is_bounce {
                self.bounce_pages().start
            } else {
                self.coherent_pages().start
            };
            Entry {
                range: held.visible,
                target: Target {
                    region: if is_bounce {
                        RegionId::BOUNCE
                    } else {
                        RegionId::COHERENT
                    },
                    offset_bytes: held.visible.start().get() - first * P,
                },
                perm: held.perm(),
            }
        };
        let expected: Vec<_> = self.held.iter().map(entry).collect();
        let (usage, entries) = table(&self.domain);
        let bounced = entries
            .iter()
            .filter(|entry| entry.target.region.slot().is_none());
        assert!(bounced.eq(&expected));
        let is_same = entries == self.entries;
        assert!(
            usage.generation > self.generation || (is_same && usage.generation == self.generation)
        );
        (self.generation, self.entries) = (usage.generation, entries);
    }

    fn check_counts(&self) {
        let usage = self.domain.usage();
        let of =
            |is_counted: &dyn Fn(&&ModelHeld) -> bool| self.held.iter().filter(is_counted).count();
        let granted = |is_bounce: bool| -> u64 {
            let held = self.held.iter();
            let held = held.filter(|held| held.is_bounce() == is_bounce);
            let held: u64 = held.map(|held| held.pages().count() as u64 * P).sum();
            let gone = self.gone.iter().filter_map(|one| match &one.what {
                What::Aperture(pages, bounce, _) if *bounce == is_bounce => Some(pages),
                _ => None,
            });
            held + gone
                .map(|pages| pages.clone().count() as u64 * P)
                .sum::<u64>()
        };
        assert_eq!(usage.sessions, self.sessions.len());
        assert_eq!(usage.memories, self.memories.len());
        assert_eq!(usage.streaming, of(&|held| held.spec.is_some()));
        assert_eq!(usage.coherent, of(&|held| held.is_coherent()));
        assert_eq!(usage.leases, self.leases_held(None));
        assert_eq!(usage.bounce.used_bytes, granted(true));
        assert_eq!(usage.coherent_aperture.used_bytes, granted(false));
        for session in (1..=5).map(|who| self.session(who)) {
            let mine = |held: &ModelHeld| held.owner == Some(session);
            let expected = self.sessions.contains_key(&session).then(|| Holdings {
                streaming: of(&|held| mine(held) && held.spec.is_some()),
                coherent: of(&|held| mine(held) && held.is_coherent()),
                leases: self.leases_held(Some(session)),
                memories: self
                    .memories
                    .values()
                    .filter(|m| m.owner == Some(session))
                    .count(),
            });
            assert_eq!(self.domain.holdings(session), expected);
        }
        let views = self.domain.memories(MemoryId::new(0), 99);
        let users: Vec<_> = views
            .iter()
            .map(|view| (view.id, view.owner, view.mappings, view.direct))
            .collect();
        let expected = self.memories.iter().map(|(id, memory)| {
            let (mappings, direct) = (self.users_of(*id), self.direct_users_of(*id));
            (*id, memory.owner, mappings, direct)
        });
        assert_eq!(users, expected.collect::<Vec<_>>());
    }
}

/// What the kernel says of a write into memory that is sealed against it.
fn sealed() -> CopyError {
    CopyError::Io(io::Error::from_raw_os_error(libc::EPERM))
}

/// Cases of each test; [`TEST_ROUNDS`] times as many if it is set.
fn cases() -> u32 {
    const TEST_ROUNDS: &str = "DOMAIND_TEST_ROUNDS";
    let times = std::env::var(TEST_ROUNDS).map(|times| times.parse::<u32>());
    300 * times.map_or(1, |times| times.expect(TEST_ROUNDS))
}

proptest! {
    #![proptest_config(ProptestConfig { cases: cases(), ..ProptestConfig::default() })]

    #[test]
    fn a_domain_answers_and_shows_what_the_model_says(
        base in prop_oneof![Just(0), Just(5)],
        drivers in [kinds(), kinds()],
        ops in prop::collection::vec(ops(), 1..80),
    ) {
        run(Model::new(base, ScrubWith::Zero), drivers, &ops);
    }

    /// B-08 poison_mode: what is visible is never poison where the model says
    /// payload or zero, and what is free is poison.
    #[test]
    fn a_domain_in_poison_mode_shows_what_the_model_says(
        base in prop_oneof![Just(0), Just(5)],
        drivers in [kinds(), kinds()],
        ops in prop::collection::vec(ops(), 1..80),
    ) {
        run(Model::new(base, ScrubWith::Poison), drivers, &ops);
    }

    #[test]
    fn a_domain_with_ghosts_holds_back_what_the_model_says_and_nothing_else(
        base in prop_oneof![Just(0), Just(5)],
        ops in prop::collection::vec(haunting_ops(), 1..80),
    ) {
        run(Model::new(base, ScrubWith::Zero), [Kind::Nothing; 2], &ops);
    }
}

fn run(mut model: Model, drivers: [Kind; 2], ops: &[Op]) {
    // Two drivers with memory to begin with: most operations need them.
    for (who, kind) in [1, 2].into_iter().zip(drivers) {
        model.join(who, Role::Driver, kind);
        model.register(model.session(who), 3, true, false);
    }
    for op in ops {
        model.run(op);
        model.check();
    }
    model.clock += 1;
    model.check_end();
}
