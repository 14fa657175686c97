//! What a domain has decided: everything behind its lock. Nothing here copies,
//! waits, or calls the system, but for a few pages of memory when the page
//! table grows.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::limbo::{Limbo, Retired, What};
use super::log::{Change, ChangeLog, Listener};
use super::made::Made;
use super::readers::{Reach, Readers};
use super::{Occupancy, Scrub, Standing, Usage};
use crate::addr::{Iova, IovaRange};
use crate::alloc::{AllocError, AllocRequest, IovaAllocator};
use crate::by_granule::ByGranule;
use crate::coherent::{AllocCoherentError, CoherentSpec};
use crate::direct::Actor;
use crate::iotlb::{Entry, Iotlb, NoRoom, RegionId, RegionWords, Target};
use crate::layout::{ApertureKind, Layout};
use crate::lease::LeaseTally;
use crate::limits::{Quota, Quotas};
use crate::mapping::{
    Held, HeldKind, MappingId, MappingKind, MappingMissing, MappingView, Phase, Source, Streaming,
    ViewKind,
};
use crate::memory::{MemoryId, MemoryMissing, Registered};
use crate::session::{Attached, Denied, Progress, Removal, Role, SessionId};
use crate::space::Space;
use crate::streaming::{
    Bounce, MapError, MapSpec, Part, SyncError, SyncSpec, UnmapError, UnmapSpec,
};

#[derive(Debug)]
pub(super) struct State {
    /// Nothing new may begin.
    pub(super) closed: bool,
    pub(super) quotas: Quotas,
    pub(super) scrub: Scrub,
    pub(super) iotlb: Iotlb<RegionWords>,
    pub(super) bounce_iovas: Option<IovaAllocator>,
    pub(super) coherent_iovas: Option<IovaAllocator>,
    /// By first granule; bounce and coherent, which never overlap.
    pub(super) held: ByGranule<Held>,
    pub(super) sessions: BTreeMap<SessionId, Attached>,
    pub(super) memories: BTreeMap<MemoryId, Registered>,
    /// Which memory has which number in the IOTLB.
    pub(super) slots: Vec<Slot>,
    /// Where direct mappings may lie.
    pub(super) space: Space,
    /// Generation in which the direct table became what it is.
    pub(super) direct_generation: u64,
    /// Resets of the bounce aperture so far.
    pub(super) bounce_epoch: u64,
    /// Leases that have not ended, those in transit included.
    pub(super) leases: LeaseTally,
    pub(super) next_mapping: u64,
    pub(super) next_memory: u64,
    /// Who has acknowledged what.
    pub(super) readers: Readers,
    /// What is removed and not acknowledged.
    pub(super) limbo: Limbo,
    /// Since when direct mappings are visible, where a ghost makes that matter.
    pub(super) made: Made,
    /// Mappings that are hidden while bytes are being copied: nobody was asked
    /// to acknowledge that yet.
    pub(super) hidden: usize,
    /// What has changed of late, once somebody has asked.
    pub(super) log: Option<ChangeLog>,
    /// Who is told of every change.
    pub(super) listener: Option<Arc<dyn Listener>>,
}

/// Granules to overwrite, and then to free.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sweep {
    pub(super) at: Iova,
    pub(super) kind: ApertureKind,
    pub(super) granules: IovaRange,
    removed: u64,
}

/// What a sweep has found.
#[derive(Default)]
struct Freed {
    sweeps: Vec<Sweep>,
    places: Vec<IovaRange>,
}

/// Who has a number in the IOTLB.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Slot {
    Free,
    Memory(MemoryId),
    /// That of a memory that is registered no more; somebody may still look for
    /// it under this number.
    Retired,
}

/// Whether a session may map, and how much it has: looked up once for a batch.
pub(super) struct Admission {
    session: SessionId,
    denied: Result<(), Denied>,
    /// What counts against the quota of mappings.
    charged: usize,
}

/// What becomes visible in one generation.
pub(super) struct Shown {
    /// Its number.
    generation: u64,
    any: bool,
    /// A session that is attached: of one batch all are the same one's.
    known: Option<SessionId>,
    /// What is to be remembered of it, if anything is.
    added: Option<Vec<Entry>>,
}

impl Shown {
    fn knows(&mut self, sessions: &BTreeMap<SessionId, Attached>, owner: SessionId) -> bool {
        if self.known != Some(owner) && sessions.contains_key(&owner) {
            self.known = Some(owner);
        }
        self.known == Some(owner)
    }
}

/// What goes out of sight in one generation.
struct Hidden {
    count: usize,
    /// What is to be remembered of it, if anything is.
    removed: Option<Vec<Entry>>,
}

impl Hidden {
    fn new(is_remembered: bool) -> Hidden {
        Hidden {
            count: 0,
            removed: is_remembered.then(Vec::new),
        }
    }

    fn add(&mut self, entry: Entry) {
        self.count += 1;
        if let Some(removed) = &mut self.removed {
            removed.push(entry);
        }
    }
}

/// What a fill needs to know, without the lock.
#[derive(Debug)]
pub(super) struct FillJob {
    /// Key in the table.
    pub(super) at: Iova,
    pub(super) id: MappingId,
    pub(super) granules: IovaRange,
    pub(super) visible: IovaRange,
    /// `None` for coherent memory and leases.
    pub(super) bounce: Option<Bounce>,
}

/// What a copy back needs to know, without the lock.
#[derive(Debug)]
pub(super) struct DrainJob {
    pub(super) at: Iova,
    pub(super) iova: Iova,
    /// `None` before it is hidden.
    pub(super) bounce: Option<Bounce>,
    pub(super) bytes_back: u64,
}

/// What a sync needs to know, without the lock.
#[derive(Debug)]
pub(super) struct SyncJob {
    pub(super) at: Iova,
    pub(super) iova: Iova,
    pub(super) bounce: Bounce,
    pub(super) part: Part,
}

impl State {
    pub(super) fn driver(&self, session: SessionId) -> Result<(), Denied> {
        if self.closed {
            return Err(Denied::DomainClosed);
        }
        let attached = self
            .sessions
            .get(&session)
            .ok_or(Denied::SessionEnded { session })?;
        match attached.role {
            Role::Driver => Ok(()),
            role @ Role::Device => Err(Denied::WrongRole { session, role }),
        }
    }

    /// May this actor change something?
    pub(super) fn may_act(&self, actor: Actor) -> Result<(), Denied> {
        match actor {
            Actor::Session(session) => self.driver(session),
            Actor::Owner if self.closed => Err(Denied::DomainClosed),
            Actor::Owner => Ok(()),
        }
    }

    pub(super) fn attached(&mut self, session: SessionId) -> &mut Attached {
        self.sessions
            .get_mut(&session)
            .expect("checked by driver()")
    }

    pub(super) fn held_mut(&mut self, at: Iova) -> &mut Held {
        self.held
            .get_mut(at)
            .expect("whoever is in transit keeps its record")
    }

    pub(super) fn iovas_mut(&mut self, kind: ApertureKind) -> Option<&mut IovaAllocator> {
        match kind {
            ApertureKind::Bounce => self.bounce_iovas.as_mut(),
            ApertureKind::Coherent => self.coherent_iovas.as_mut(),
        }
    }

    pub(super) fn memory_of(
        &self,
        session: SessionId,
        id: MemoryId,
    ) -> Result<&Registered, MemoryMissing> {
        self.memory_for(Actor::Session(session), id)
    }

    /// A memory that this actor may use.
    pub(super) fn memory_for(
        &self,
        actor: Actor,
        id: MemoryId,
    ) -> Result<&Registered, MemoryMissing> {
        let registered = self
            .memories
            .get(&id)
            .ok_or(MemoryMissing::NoSuchMemory { id })?;
        if !is_in_reach(actor, registered.owner) {
            return Err(MemoryMissing::NotYours { id });
        }
        Ok(registered)
    }

    /// Memories that are registered, and those that are not and keep their
    /// number until nobody can look for them under it.
    pub(super) fn known_memories(&self) -> usize {
        self.slots
            .iter()
            .filter(|slot| **slot != Slot::Free)
            .count()
    }

    /// A number in the IOTLB that no memory has.
    pub(super) fn take_slot(&mut self, id: MemoryId) -> RegionId {
        let free = self.slots.iter().position(|slot| *slot == Slot::Free);
        let slot = free.unwrap_or_else(|| {
            self.slots.push(Slot::Free);
            self.slots.len() - 1
        });
        self.slots[slot] = Slot::Memory(id);
        RegionId::memory_slot(u32::try_from(slot).expect("the quota of memories is far below"))
    }

    /// Takes a registration out. The record is for the caller to drop, without
    /// the lock.
    pub(super) fn forget_memory(&mut self, id: MemoryId) -> Option<Registered> {
        let registered = self.memories.remove(&id)?;
        *self.slot_mut(registered.region) = Slot::Retired;
        self.limbo.push(Retired {
            removed: self.iotlb.generation(),
            what: What::Slot(registered.region),
            reach: Reach::Nothing,
        });
        Some(registered)
    }

    /// Who has a memory's number.
    pub(super) fn slot_mut(&mut self, region: RegionId) -> &mut Slot {
        let slot = region.slot().expect("a memory's number") as usize;
        &mut self.slots[slot]
    }

    /// What a direct entry of the IOTLB looks like to others.
    pub(super) fn direct_view(&self, entry: &Entry) -> MappingView {
        let memory = self.memory_behind(entry.target.region);
        MappingView {
            id: None,
            owner: self.memories[&memory].owner,
            visible: entry.range,
            perm: entry.perm,
            phase: Phase::Live,
            blocked_by: None,
            kind: ViewKind::Direct {
                source: Source {
                    memory,
                    offset: entry.target.offset_bytes,
                },
            },
        }
    }

    /// The memory that a direct entry leads to.
    pub(super) fn memory_behind(&self, region: RegionId) -> MemoryId {
        self.memory_at(region)
            .expect("a memory that is mapped is registered")
    }

    /// The registered memory of a number.
    pub(super) fn memory_at(&self, region: RegionId) -> Option<MemoryId> {
        match self.slots.get(region.slot()? as usize)? {
            Slot::Memory(id) => Some(*id),
            Slot::Free | Slot::Retired => None,
        }
    }

    /// The live streaming mapping of that name.
    pub(super) fn streaming_of(
        &self,
        session: SessionId,
        iova: Iova,
        id: MappingId,
    ) -> Result<(&Held, &Bounce), MappingMissing> {
        let missing = MappingMissing::NoSuchMapping { iova, id };
        let held = self.held.get(iova).ok_or(missing)?;
        let bounce = held.bounce().ok_or(missing)?;
        Ok((self.yours(session, Some(held), iova, id)?, bounce))
    }

    /// The live coherent allocation of that name.
    pub(super) fn coherent_of(
        &self,
        session: SessionId,
        iova: Iova,
        id: MappingId,
    ) -> Result<&Held, MappingMissing> {
        let held = self.held.get(iova);
        let found = held.filter(|held| matches!(held.kind, HeldKind::Coherent));
        self.yours(session, found, iova, id)
    }

    /// The live lease of that name.
    pub(super) fn lease_of(
        &self,
        session: SessionId,
        iova: Iova,
        id: MappingId,
    ) -> Result<&Held, MappingMissing> {
        let found = self.held.get(iova).filter(|held| held.is_lease());
        self.yours(session, found, iova, id)
    }

    pub(super) fn yours<'h>(
        &self,
        session: SessionId,
        found: Option<&'h Held>,
        iova: Iova,
        id: MappingId,
    ) -> Result<&'h Held, MappingMissing> {
        let is_named = |held: &&Held| {
            held.visible.start() == iova && held.id == id && held.phase == Phase::Live
        };
        let missing = MappingMissing::NoSuchMapping { iova, id };
        let held = found.filter(is_named).ok_or(missing)?;
        match held.owner {
            Some(owner) if owner != session => Err(MappingMissing::NotYours { iova, id }),
            _ => Ok(held),
        }
    }

    pub(super) fn admission(&self, session: SessionId) -> Admission {
        Admission {
            session,
            denied: self.driver(session),
            charged: self.charged_mappings(session),
        }
    }

    pub(super) fn reserve_streaming(
        &mut self,
        layout: &Layout,
        admission: &mut Admission,
        spec: &MapSpec,
    ) -> Result<FillJob, MapError> {
        let Admission {
            session,
            denied,
            charged,
        } = admission;
        let session = *session;
        (*denied)?;
        if self.bounce_iovas.is_none() {
            return Err(MapError::NoAperture);
        }
        let bounce = self.bounce_of(session, spec)?;
        let lead_bytes = spec.lead_bytes(layout.granule());
        let len_bytes = spec.len_bytes;
        let total = lead_bytes
            .checked_add(len_bytes)
            .expect("a buffer inside a file is far from 2^64 bytes");
        let place = AllocRequest {
            len_bytes: total,
            align_bytes: spec.align_bytes,
            limit: spec.limit,
        };
        self.quotas.admit(Quota::Mappings, *charged)?;
        let granules = self.take(ApertureKind::Bounce, place)?;
        self.make_room(ApertureKind::Bounce, granules)?;
        *charged += 1;
        let start = granules
            .start()
            .checked_add(lead_bytes)
            .expect("the lead lies inside the granules");
        let visible =
            IovaRange::from_len(start, len_bytes).expect("the buffer lies inside the granules");
        self.memories
            .get_mut(&spec.memory)
            .expect("checked by bounce_of()")
            .mappings += 1;
        let kind = HeldKind::Streaming(Streaming::of(&bounce));
        let id = self.hold(Some(session), granules, visible, kind);
        Ok(FillJob {
            at: granules.start(),
            id,
            granules,
            visible,
            bounce: Some(bounce),
        })
    }

    /// May this session bounce this buffer that way?
    pub(super) fn bounce_of(&self, session: SessionId, spec: &MapSpec) -> Result<Bounce, MapError> {
        let id = spec.memory;
        let memory = &self.memory_of(session, id)?.memory;
        memory.check_span(spec.offset, spec.len_bytes)?;
        if memory.is_hugetlb() {
            return Err(MapError::HugetlbMemory { id });
        }
        if spec.direction.copies_back() && !memory.is_writable() {
            return Err(MapError::MemoryReadOnly {
                id,
                direction: spec.direction,
            });
        }
        Ok(Bounce {
            memory_id: id,
            memory: Arc::clone(memory),
            file_offset: spec.offset,
            len_bytes: spec.len_bytes,
            direction: spec.direction,
            preserve: spec.preserve,
            skip_sync: spec.skip_sync,
        })
    }

    pub(super) fn reserve_coherent(
        &mut self,
        session: SessionId,
        spec: &CoherentSpec,
    ) -> Result<FillJob, AllocCoherentError> {
        self.driver(session)?;
        if self.coherent_iovas.is_none() {
            return Err(AllocCoherentError::NoAperture);
        }
        self.quotas
            .admit(Quota::Mappings, self.charged_mappings(session))?;
        let granules = self.take(ApertureKind::Coherent, spec.place)?;
        self.make_room(ApertureKind::Coherent, granules)?;
        let visible =
            IovaRange::from_len(granules.start(), spec.place.len_bytes).expect("not empty");
        let owner = (!spec.persistent).then_some(session);
        let id = self.hold(owner, granules, visible, HeldKind::Coherent);
        Ok(FillJob {
            at: granules.start(),
            id,
            granules,
            visible,
            bounce: None,
        })
    }

    /// What counts against the quota of mappings when this session wants one
    /// more: what others' ghosts hold back does not.
    pub(super) fn charged_mappings(&self, session: SessionId) -> usize {
        let account = self.readers.account(session).unwrap_or_default();
        let own = self.limbo.charged_to(account);
        self.held.len() - self.limbo.quarantined_granules() + own
    }

    /// Is bounce memory of this session zeroed when it is freed? That of one
    /// that has ended always.
    pub(super) fn scrubs_what_it_frees(&self, session: SessionId) -> bool {
        self.scrub == Scrub::OnUnmap || !self.sessions.contains_key(&session)
    }

    pub(super) fn take(
        &mut self,
        kind: ApertureKind,
        place: AllocRequest,
    ) -> Result<IovaRange, AllocError> {
        self.iovas_mut(kind)
            .expect("checked by the caller")
            .alloc(place)
    }

    /// Makes sure that granules just taken can be shown, also again after they
    /// were hidden; gives them back if not.
    pub(super) fn make_room(
        &mut self,
        kind: ApertureKind,
        granules: IovaRange,
    ) -> Result<(), NoRoom> {
        let mut room = self.iotlb.reserve(granules);
        if room.is_err() && self.finds_nodes() {
            room = self.iotlb.reserve(granules);
        }
        if room.is_err() {
            let iovas = self.iovas_mut(kind).expect("they were taken from it");
            iovas.free(granules).expect("they were just taken");
        }
        room
    }

    /// Nodes of the page table that are out of use wait for the next removal to be
    /// acknowledged. Where they are needed, that is asked for now; answers whether
    /// it gave any back.
    pub(super) fn finds_nodes(&mut self) -> bool {
        let retired = self.iotlb.table_usage().retired;
        if retired == 0 {
            return false;
        }
        self.ask_readers(&[], None);
        self.iotlb
            .reclaim(self.readers.floor(self.iotlb.generation()));
        self.iotlb.table_usage().retired < retired
    }

    pub(super) fn hold(
        &mut self,
        owner: Option<SessionId>,
        granules: IovaRange,
        visible: IovaRange,
        kind: HeldKind,
    ) -> MappingId {
        let id = MappingId::new(self.next_mapping);
        self.next_mapping += 1;
        let lease = matches!(kind, HeldKind::Lease).then_some(granules);
        let link = owner.map(|owner| self.link(owner, granules.start(), lease));
        let held = Held {
            id,
            owner,
            visible,
            granules,
            phase: Phase::Reserved,
            syncs: 0,
            epoch: self.bounce_epoch,
            since: None,
            scrub: false,
            blocked_by: None,
            link: link.unwrap_or_default(),
            kind,
        };
        self.held.insert(granules.start(), held);
        if let Some(granules) = lease {
            self.leases.add(granules);
        }
        id
    }

    /// Makes a mapping visible, unless its session has ended. Its transfer comes with it, or stays
    /// where it is.
    pub(super) fn go_live(
        &mut self,
        layout: &Layout,
        at: Iova,
        bounce: &mut Option<Bounce>,
    ) -> Result<(), Denied> {
        let mut shown = self.showing();
        let live = self.show(layout, at, bounce, &mut shown);
        self.shown(shown);
        live
    }

    /// The next generation begins to be made.
    pub(super) fn showing(&self) -> Shown {
        Shown {
            generation: self.iotlb.generation() + 1,
            any: false,
            known: None,
            added: self.log.as_ref().map(|_| Vec::new()),
        }
    }

    /// Makes a mapping visible in a generation that is being made; as [`State::go_live`].
    pub(super) fn show(
        &mut self,
        layout: &Layout,
        at: Iova,
        bounce: &mut Option<Bounce>,
        shown: &mut Shown,
    ) -> Result<(), Denied> {
        let held = self.held.get_mut(at);
        let held = held.expect("whoever is in transit keeps its record");
        if let Some(session) = held
            .owner
            .filter(|owner| !shown.knows(&self.sessions, *owner))
        {
            return Err(Denied::SessionEnded { session });
        }
        if held.outlived(self.bounce_epoch) {
            return Err(Denied::BounceReset);
        }
        let aperture = layout
            .aperture(held.aperture())
            .expect("what is held lies in an aperture");
        let offset_bytes = held
            .visible
            .start()
            .offset_from(aperture.start())
            .expect("it lies inside");
        let entry = Entry {
            range: held.visible,
            target: Target {
                region: held.aperture().into(),
                offset_bytes,
            },
            perm: held.perm(),
        };
        held.put_bounce(bounce.take());
        let was = std::mem::replace(&mut held.phase, Phase::Live);
        // One that is put back has been seen before.
        held.since.get_or_insert(shown.generation);
        self.hidden -= usize::from(was == Phase::Draining);
        self.iotlb.enter_reserved(entry);
        shown.any = true;
        if let Some(added) = &mut shown.added {
            added.push(entry);
        }
        Ok(())
    }

    /// The generation is made, if anything is in it.
    pub(super) fn shown(&mut self, shown: Shown) {
        if shown.any {
            self.iotlb.commit();
            self.committed(&shown.added.unwrap_or_default(), &[], &[]);
        }
    }

    /// Lets a mapping be ended by one batch: nobody else can end it any more. It is still visible,
    /// until [`State::hide_marked`].
    pub(super) fn mark_draining(
        &mut self,
        session: SessionId,
        spec: &UnmapSpec,
    ) -> Result<DrainJob, UnmapError> {
        let held = self.held.get_mut(spec.iova);
        let held = held.filter(|held| held.is_live_as(session, spec.iova, spec.id));
        let Some(held) = held else {
            return Err(self.why_not_drained(session, spec));
        };
        if held.syncs > 0 {
            return Err(UnmapError::Busy {
                id: spec.id,
                syncs: held.syncs,
            });
        }
        let missing = MappingMissing::NoSuchMapping {
            iova: spec.iova,
            id: spec.id,
        };
        let bytes_back = held.bounce().ok_or(missing)?.bytes_back(spec)?;
        held.phase = Phase::Draining;
        Ok(DrainJob {
            at: held.granules.start(),
            iova: spec.iova,
            bytes_back,
            bounce: None,
        })
    }

    #[cold]
    fn why_not_drained(&self, session: SessionId, spec: &UnmapSpec) -> UnmapError {
        if let Some(marked) = self.marked(session, spec) {
            let misused = marked.bytes_back(spec).err();
            return misused.unwrap_or(UnmapError::Duplicate { id: spec.id });
        }
        match self.streaming_of(session, spec.iova, spec.id) {
            Err(missing) => missing.into(),
            Ok(_) => unreachable!("it is live, and would be drained"),
        }
    }

    /// The transfer of a mapping that is marked by the batch that has the lock: then, and only then,
    /// it is draining, and its transfer is still here though nobody copies it.
    fn marked(&self, session: SessionId, spec: &UnmapSpec) -> Option<&Bounce> {
        let is_marked = |held: &&Held| {
            held.phase == Phase::Draining
                && held.syncs == 0
                && held.visible.start() == spec.iova
                && held.id == spec.id
                && held.owner == Some(session)
        };
        self.held.get(spec.iova).filter(is_marked)?.bounce()
    }

    /// The batch was refused.
    pub(super) fn unmark_draining(&mut self, job: DrainJob) {
        self.held_mut(job.at).phase = Phase::Live;
    }

    /// Takes marked mappings out of sight, in one generation; their transfers go with them.
    pub(super) fn hide_marked<'j>(&mut self, jobs: impl Iterator<Item = &'j mut DrainJob>) {
        let mut hidden = Hidden::new(self.log.is_some());
        for job in jobs {
            let held = self.held_mut(job.at);
            job.bounce = held.take_bounce();
            let start = held.visible.start();
            hidden.add(self.iotlb.take_reserved(start));
        }
        self.hid(hidden);
    }

    pub(super) fn check_sync(
        &self,
        session: SessionId,
        spec: &SyncSpec,
    ) -> Result<SyncJob, SyncError> {
        self.driver(session)?;
        let (held, bounce) = self.streaming_of(session, spec.iova, spec.id)?;
        let part = bounce.check_part(spec)?;
        Ok(SyncJob {
            at: held.granules.start(),
            iova: spec.iova,
            bounce: bounce.clone(),
            part,
        })
    }

    /// Was the bounce aperture reset while this was in transit?
    pub(super) fn has_outlived_a_reset(&self, at: Iova) -> bool {
        self.held[&at].outlived(self.bounce_epoch)
    }

    /// What has just been done, and is to be waited for.
    pub(super) fn removal(&self) -> Removal {
        Removal {
            generation: self.iotlb.generation(),
        }
    }

    pub(super) fn progress(&self, removed: u64) -> Progress {
        let behind: Vec<_> = self.readers.behind(removed).collect();
        if !behind.is_empty() || self.limbo.is_sweeping(removed) {
            return Progress::Waiting(behind);
        }
        let blockers: Vec<_> = self.limbo.blockers(removed).collect();
        match blockers.is_empty() {
            true => Progress::Done,
            false => Progress::Quarantined(blockers),
        }
    }

    pub(super) fn standing(&self, session: SessionId) -> Option<Standing> {
        let (acked, asked) = self.readers.acked_and_asked(session)?;
        Some(Standing {
            session,
            fenced: self.readers.is_ghost(session),
            acked,
            asked,
            quarantined: self.limbo.quarantined_by(session),
        })
    }

    /// Releases all that a session held. What is left of clients is for the
    /// caller to drop, without the lock.
    pub(super) fn end_session(
        &mut self,
        session: SessionId,
    ) -> (Vec<Option<Bounce>>, Vec<Registered>) {
        let Some(attached) = self.sessions.remove(&session) else {
            return (Vec::new(), Vec::new());
        };
        let held = self.held_by(&attached).map(|held| held.granules.start());
        let mut held: Vec<_> = held.collect();
        held.sort_unstable();
        let abandoned = self.abandon_all(held);
        let bounces = abandoned.into_iter().map(|at| self.retire(at, true));
        let bounces: Vec<_> = bounces.collect();
        self.drop_direct(&attached.memories);
        let memories = attached.memories.iter();
        let forgotten = memories.filter_map(|id| self.forget_memory(*id)).collect();
        let closed: Vec<_> = attached.memories.into_iter().collect();
        if bounces.len() + closed.len() > 0 {
            self.ask_readers(&closed, None);
        }
        (bounces, forgotten)
    }

    /// Takes live mappings out of sight, in one generation.
    pub(super) fn hide_all(&mut self, keys: &[Iova]) {
        let mut hidden = Hidden::new(self.log.is_some());
        for at in keys {
            let held = self.held_mut(*at);
            held.phase = Phase::Draining;
            let start = held.visible.start();
            hidden.add(self.iotlb.take_reserved(start));
        }
        self.hid(hidden);
    }

    fn hid(&mut self, hidden: Hidden) {
        self.hidden += hidden.count;
        if hidden.count > 0 {
            self.iotlb.commit();
            self.committed(&[], &hidden.removed.unwrap_or_default(), &[]);
        }
    }

    /// The IOTLB has a new generation, and everything else is in step with it.
    pub(super) fn committed(&mut self, added: &[Entry], removed: &[Entry], closed: &[MemoryId]) {
        if let Some(mut log) = self.log.take() {
            self.note(&mut log, added, removed, closed);
            self.log = Some(log);
        }
        self.tell();
    }

    fn note(&self, log: &mut ChangeLog, added: &[Entry], removed: &[Entry], closed: &[MemoryId]) {
        let generation = self.iotlb.generation();
        if !ChangeLog::fits(added.len() + removed.len() + closed.len()) {
            return log.pass_over(generation);
        }
        let region = |memory: &MemoryId| self.memories[memory].region;
        log.push(Change {
            generation,
            added: added.iter().map(|entry| self.view_of(entry)).collect(),
            removed: removed.iter().map(|entry| entry.range).collect(),
            closed: closed.iter().map(region).collect(),
        });
    }

    /// Something has changed: what is visible, who is there, or what is held back.
    pub(super) fn tell(&self) {
        if let Some(listener) = &self.listener {
            listener.changed();
        }
    }

    /// All mappings that start at `from` or above, by address, those that wait to
    /// be free included.
    pub(super) fn views(
        &self,
        apertures: Option<IovaRange>,
        granule: Iova,
        from: Iova,
    ) -> impl Iterator<Item = MappingView> {
        let held = self.held.from(granule).map(|(_, held)| held.view());
        // Nothing direct lies between two that are held: these come all before
        // or all behind.
        let is_below = move |view: &MappingView| apertures.is_none_or(|there| view.visible < there);
        let below = self.direct_views(from).take_while(is_below);
        let above = self.direct_views(from).skip_while(is_below);
        let all = below.chain(held).chain(above);
        all.filter(move |view| view.visible.start() >= from)
    }

    /// What an entry of the IOTLB looks like to others.
    fn view_of(&self, entry: &Entry) -> MappingView {
        match entry.target.region.slot() {
            Some(_) => self.direct_view(entry),
            None => self.held_at(entry).view(),
        }
    }

    /// What kind of mapping an entry of the IOTLB, or a part of one, belongs to.
    pub(super) fn kind_of(&self, entry: &Entry) -> MappingKind {
        match entry.target.region {
            RegionId::BOUNCE if self.leases.count == 0 => MappingKind::Streaming,
            RegionId::BOUNCE => self.held_at(entry).view().kind.kind(),
            RegionId::COHERENT => MappingKind::Coherent,
            _ => MappingKind::Direct,
        }
    }

    /// Who holds what an entry in an aperture, or a part of one, shows.
    fn held_at(&self, entry: &Entry) -> &Held {
        let held = self.held.at_or_below(entry.range.start());
        held.expect("what is visible in an aperture is held")
    }

    /// The end of mappings that others brought about. Hides those that are live;
    /// answers those that the caller is to retire. Whoever is copying retires the
    /// others.
    pub(super) fn abandon_all(&mut self, keys: impl IntoIterator<Item = Iova>) -> Vec<Iova> {
        let is_live = |at: &Iova| self.held[at].phase == Phase::Live;
        let live: Vec<_> = keys.into_iter().filter(is_live).collect();
        self.hide_all(&live);
        let idle = |at: &Iova| self.held[at].syncs == 0;
        live.into_iter().filter(idle).collect()
    }

    /// Streaming mappings that one batch of a session has hidden have come to their end: they are
    /// free at once if nobody can still use them, and else wait.
    pub(super) fn end_hidden(
        &mut self,
        session: SessionId,
        keys: impl Iterator<Item = Iova> + Clone,
        scrub: bool,
    ) {
        let count = keys.clone().count();
        if count == 0 {
            return;
        }
        self.hidden -= count;
        self.ask_readers(&[], Some(session));
        let all_let_go = !scrub && self.readers.all_let_go_of(self.iotlb.generation());
        for at in keys {
            // What a reset could not zero, because it was in transit, is zeroed first.
            if all_let_go && !self.has_outlived_a_reset(at) {
                drop(self.release(at));
            } else {
                let nothing = self.wait_for_readers(at, scrub);
                debug_assert!(nothing.is_none(), "its transfer is with who ended it");
            }
        }
    }

    /// What was visible has come to its end: its granules wait until nobody can
    /// still use them. What it kept of a client is for the caller to drop,
    /// without the lock.
    pub(super) fn retire(&mut self, at: Iova, scrub: bool) -> Option<Bounce> {
        self.hidden -= 1;
        self.wait_for_readers(at, scrub)
    }

    fn wait_for_readers(&mut self, at: Iova, scrub: bool) -> Option<Bounce> {
        let removed = self.iotlb.generation();
        let epoch = self.bounce_epoch;
        let held = self.held_mut(at);
        let scrub = scrub || held.outlived(epoch);
        let used = held.uses();
        held.scrub = scrub;
        held.phase = Phase::Invalidating;
        let retired = Retired {
            removed,
            what: What::Granules {
                at,
                kind: held.aperture(),
                bytes: held.granules.len_bytes().unwrap_or(u64::MAX),
            },
            reach: Reach::Aperture {
                since: held.since.expect("it was visible"),
            },
        };
        let bounce = held.take_bounce();
        let lease = held.is_lease().then_some(held.granules);
        if let Some(granules) = lease {
            self.leases.subtract(granules);
        }
        if let Some(memory) = used {
            self.count_down(memory);
        }
        self.limbo.push(retired);
        bounce
    }

    /// One streaming mapping less uses a memory, if that is still registered.
    fn count_down(&mut self, memory: MemoryId) {
        if let Some(registered) = self.memories.get_mut(&memory) {
            registered.mappings -= 1;
        }
    }

    /// Something was removed: who may still use it is asked to say when not.
    pub(super) fn ask_readers(&mut self, closed: &[MemoryId], actor: Option<SessionId>) {
        // Whoever removes something has let go of that, and not of what others
        // have hidden meanwhile.
        let actor = actor.filter(|_| self.hidden == 0);
        self.readers.ask(self.iotlb.generation(), closed, actor);
    }

    /// Frees what nobody can use any more. Answers granules that are to be
    /// zeroed first, and then given to [`State::swept`].
    pub(super) fn sweep(&mut self) -> Vec<Sweep> {
        let floor = self.readers.floor(self.iotlb.generation());
        // A ghost's walks are void: nodes do not wait for it.
        self.iotlb.reclaim(floor);
        let mut freed = Freed::default();
        while let Some(retired) = self.limbo.next(floor) {
            self.let_go(retired, &mut freed);
        }
        self.free_places(&freed.places);
        freed.sweeps
    }

    /// A ghost has acknowledged something, or is gone.
    pub(super) fn reconsider(&mut self, ghost: SessionId) -> Vec<Sweep> {
        if self.readers.oldest_fence().is_none() {
            self.made.forget();
        }
        let mut freed = Freed::default();
        for retired in self.limbo.reconsider(ghost, &self.readers) {
            self.let_go(retired, &mut freed);
        }
        self.free_places(&freed.places);
        freed.sweeps
    }

    /// All attached sessions have acknowledged that this is gone.
    fn let_go(&mut self, retired: Retired, freed: &mut Freed) {
        let Retired {
            removed,
            what,
            reach,
        } = retired;
        let blocker = self.readers.blocker(removed, reach);
        let mut sweep = None;
        if let What::Granules { at, .. } = what {
            let held = self.held_mut(at);
            sweep = held.scrub.then(|| (held.aperture(), held.granules));
            held.blocked_by = blocker;
            held.phase = match blocker {
                Some(_) => Phase::Quarantined,
                None => Phase::Invalidating,
            };
        }
        if let Some(ghost) = blocker {
            let account = self.readers.account(ghost).expect("a ghost is known");
            return self.limbo.hold_back(ghost, account, retired);
        }
        match (what, sweep) {
            (What::Granules { at, .. }, Some((kind, granules))) => {
                self.limbo.begin_sweep(removed);
                freed.sweeps.push(Sweep {
                    at,
                    kind,
                    granules,
                    removed,
                });
            }
            (What::Granules { at, .. }, None) => self.release_retired(at),
            (What::Place(at), _) => freed.places.push(self.limbo.take_place(at)),
            (What::Slot(region), _) => *self.slot_mut(region) = Slot::Free,
            (What::Use, _) => self.limbo.use_ended(),
        }
    }

    /// Granules were zeroed.
    pub(super) fn swept(&mut self, sweeps: &[Sweep]) {
        for sweep in sweeps {
            self.limbo.end_sweep(sweep.removed);
            self.release_retired(sweep.at);
        }
    }

    fn release_retired(&mut self, at: Iova) {
        // It keeps nothing of a client any more, and may be dropped here.
        let held = self.release(at);
        let bytes = held.granules.len_bytes().unwrap_or(u64::MAX);
        self.limbo.granules_left(held.aperture(), bytes);
    }

    /// Frees the granules. The record is for the caller to drop, without the lock.
    pub(super) fn release(&mut self, at: Iova) -> Held {
        let held = self.held.remove(at).expect("released once");
        let iovas = self
            .iovas_mut(held.aperture())
            .expect("what is held lies in an aperture");
        iovas
            .free(held.granules)
            .expect("what is held is allocated");
        if let Some(owner) = held.owner {
            self.unlink(owner, &held);
        }
        if held.is_lease() && !held.is_retired() {
            self.leases.subtract(held.granules);
        }
        if let Some(memory) = held.uses() {
            self.count_down(memory);
        }
        held
    }

    pub(super) fn usage(&self) -> Usage {
        // What has ended keeps its iovas until nobody can still use it.
        let live = |kind, iovas: &Option<IovaAllocator>| {
            let taken = iovas.as_ref().map_or(0, IovaAllocator::live_count);
            taken - self.limbo.granules(kind)
        };
        let occupancy = |iovas: &Option<IovaAllocator>| {
            iovas
                .as_ref()
                .map_or(Occupancy::default(), |iovas| Occupancy {
                    used_bytes: iovas.used_bytes(),
                    largest_hole_bytes: iovas.largest_hole_bytes(),
                })
        };
        Usage {
            sessions: self.sessions.len(),
            streaming: live(ApertureKind::Bounce, &self.bounce_iovas) - self.leases.count,
            coherent: live(ApertureKind::Coherent, &self.coherent_iovas),
            leases: self.leases,
            memories: self.memories.len(),
            direct: self.iotlb.direct_len(),
            table_bytes: self.iotlb.table_usage().backed_bytes,
            direct_generation: self.direct_generation,
            bounce: occupancy(&self.bounce_iovas),
            coherent_aperture: occupancy(&self.coherent_iovas),
            generation: self.iotlb.generation(),
            invalidating: self.limbo.invalidating(),
            quarantined: self.limbo.quarantined(),
            fenced: self.readers.ghosts(),
        }
    }

    pub(super) fn check_invariants(&self) {
        self.iotlb.check_invariants();
        self.readers.check_invariants(self.iotlb.generation());
        self.limbo.check_invariants();
        self.check_limbo();
        for (kind, iovas) in [
            (ApertureKind::Bounce, &self.bounce_iovas),
            (ApertureKind::Coherent, &self.coherent_iovas),
        ] {
            let held = self
                .held
                .values()
                .filter(|held| held.aperture() == kind)
                .map(|held| held.granules);
            let live = iovas.iter().flat_map(IovaAllocator::live);
            assert!(
                live.eq(held),
                "{kind} iovas are allocated exactly where something is held"
            );
            iovas.iter().for_each(IovaAllocator::check_invariants);
        }
        let live = self
            .held
            .values()
            .filter(|held| held.phase == Phase::Live)
            .map(|held| held.visible);
        let bounced = self
            .iotlb
            .entries()
            .filter(|entry| entry.target.region.slot().is_none());
        assert!(
            live.eq(bounced.map(|entry| entry.range)),
            "visible is exactly what is live"
        );
        self.check_direct();
        self.check_made();
        self.check_leases();
        for (at, held) in self.held.iter() {
            assert_eq!(
                at,
                held.granules.start(),
                "a record stands under its first granule"
            );
            assert!(
                held.granules.contains(held.visible),
                "nothing outside its granules is visible"
            );
        }
        for (session, attached) in &self.sessions {
            let chained = self.held_by(attached).map(|held| held.granules.start());
            let chained: BTreeSet<_> = chained.take(self.held.len()).collect();
            let owned = self
                .held
                .values()
                .filter(|held| held.owner == Some(*session));
            let owned: BTreeSet<_> = owned.map(|held| held.granules.start()).collect();
            assert_eq!(chained, owned, "session {session} knows what it holds");
            assert_eq!(
                attached.mappings.len(),
                owned.len(),
                "every mapping of session {session} counts once"
            );
        }
        let known: usize = self
            .sessions
            .values()
            .map(|attached| attached.memories.len())
            .sum();
        let owned = self.memories.values().filter(|m| m.owner.is_some());
        assert_eq!(known, owned.count(), "every memory counts once");
        for (id, registered) in &self.memories {
            let used = self
                .held
                .values()
                .filter(|held| held.uses() == Some(*id))
                .count();
            assert_eq!(
                registered.mappings, used as u64,
                "memory {id} knows its mappings"
            );
            let owner = registered.owner.map(|owner| &self.sessions[&owner]);
            assert!(
                owner.is_none_or(|owner| owner.memories.contains(id)),
                "memory {id} has its owner"
            );
        }
    }

    fn check_limbo(&self) {
        let held = self.held.values();
        let hidden = held.filter(|held| held.phase == Phase::Draining);
        assert_eq!(hidden.count(), self.hidden, "what is hidden is counted");
        let retired = || self.held.values().filter(|held| held.is_retired());
        for kind in [ApertureKind::Bounce, ApertureKind::Coherent] {
            let there = retired().filter(|held| held.aperture() == kind);
            let waits = self.limbo.granules(kind);
            assert_eq!(there.count(), waits, "what has ended waits");
        }
        let bytes = retired().filter_map(|held| held.granules.len_bytes());
        let waits = self.limbo.waiting_bytes();
        assert_eq!(bytes.sum::<u64>(), waits, "all of what has ended waits");
        for at in self.limbo.keys() {
            assert!(self.held[&at].is_retired(), "{at:?} waits and has ended");
        }
        for place in self.limbo.places(Iova::new(0)) {
            let hit = self.iotlb.lookup(place.range);
            assert_eq!(hit, None, "{:?} is not used again", place.range);
        }
    }

    fn check_made(&self) {
        let is_needed = self.readers.oldest_fence().is_some();
        assert!(
            is_needed || self.made.iter().next().is_none(),
            "no ghost asks"
        );
        for (start, since) in self.made.iter() {
            let mut entries = self.iotlb.direct_range(start);
            let is_there = entries
                .next()
                .is_some_and(|entry| entry.range.start() == start);
            assert!(is_there, "{start:?} is mapped");
            assert!(since <= self.direct_generation, "{start:?} was made");
        }
    }

    fn check_direct(&self) {
        let entries = || self.iotlb.direct_entries();
        self.space.check_invariants(self.taken().into_iter());
        for (id, registered) in &self.memories {
            let used = entries().filter(|entry| entry.target.region == registered.region);
            assert_eq!(
                registered.direct,
                used.count() as u64,
                "memory {id} knows its direct mappings"
            );
            let slot = registered.region.slot().expect("a memory's number") as usize;
            let there = self.slots[slot];
            assert_eq!(there, Slot::Memory(*id), "memory {id} has its number");
        }
        let numbered = self
            .slots
            .iter()
            .filter(|slot| matches!(slot, Slot::Memory(_)));
        let numbered = numbered.count();
        assert_eq!(numbered, self.memories.len(), "every number has its memory");
        for entry in entries() {
            let placed = self.space.check(entry.range);
            assert_eq!(placed, Ok(()), "{:?} lies where it may", entry.range);
        }
    }
}

/// May this actor use and end what belongs to this owner?
pub(super) fn is_in_reach(actor: Actor, owner: Option<SessionId>) -> bool {
    match actor {
        Actor::Session(session) => owner.is_none_or(|owner| owner == session),
        Actor::Owner => true,
    }
}
