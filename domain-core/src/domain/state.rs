//! What a domain has decided: everything behind its lock. Nothing here copies,
//! waits, or calls the system, but for a few pages of memory when the page
//! table grows.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::{Occupancy, Scrub, Usage};
use crate::addr::{Iova, IovaRange};
use crate::alloc::{AllocError, AllocRequest, IovaAllocator};
use crate::coherent::{AllocCoherentError, CoherentSpec};
use crate::direct::Actor;
use crate::iotlb::{Entry, Iotlb, NoRoom, RegionId, RegionWords, Target};
use crate::layout::{ApertureKind, Layout};
use crate::limits::{Quota, Quotas};
use crate::mapping::{
    Held, HeldKind, MappingId, MappingMissing, MappingView, Phase, Source, ViewKind,
};
use crate::memory::{MemoryId, MemoryMissing, Registered};
use crate::session::{Attached, Denied, Role, SessionId};
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
    pub(super) held: BTreeMap<Iova, Held>,
    pub(super) sessions: BTreeMap<SessionId, Attached>,
    pub(super) memories: BTreeMap<MemoryId, Registered>,
    /// Which memory has which number in the IOTLB.
    pub(super) slots: Vec<Option<MemoryId>>,
    /// Where direct mappings may lie.
    pub(super) space: Space,
    /// Generation in which the direct table became what it is.
    pub(super) direct_generation: u64,
    /// Resets of the bounce aperture so far.
    pub(super) bounce_epoch: u64,
    pub(super) next_mapping: u64,
    pub(super) next_memory: u64,
}

/// What a fill needs to know, without the lock.
pub(super) struct FillJob {
    /// Key in the table.
    pub(super) at: Iova,
    pub(super) id: MappingId,
    pub(super) granules: IovaRange,
    pub(super) visible: IovaRange,
    /// `None` for coherent memory.
    pub(super) bounce: Option<Bounce>,
}

/// What a copy back needs to know, without the lock.
pub(super) struct DrainJob {
    pub(super) at: Iova,
    pub(super) iova: Iova,
    pub(super) bounce: Bounce,
    pub(super) bytes_back: u64,
}

/// What a sync needs to know, without the lock.
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
            .get_mut(&at)
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

    /// A number in the IOTLB that no memory has.
    pub(super) fn take_slot(&mut self, id: MemoryId) -> RegionId {
        let free = self.slots.iter().position(Option::is_none);
        let slot = free.unwrap_or_else(|| {
            self.slots.push(None);
            self.slots.len() - 1
        });
        self.slots[slot] = Some(id);
        RegionId::memory_slot(u32::try_from(slot).expect("the quota of memories is far below"))
    }

    /// Takes a registration out. The record is for the caller to drop, without
    /// the lock.
    pub(super) fn forget_memory(&mut self, id: MemoryId) -> Option<Registered> {
        let registered = self.memories.remove(&id)?;
        let slot = registered.region.slot().expect("a memory's number") as usize;
        self.slots[slot] = None;
        Some(registered)
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
        let slot = region.slot().expect("a direct entry leads to a memory") as usize;
        self.slots[slot].expect("a memory that is mapped is registered")
    }

    /// The live streaming mapping of that name.
    pub(super) fn streaming_of(
        &self,
        session: SessionId,
        iova: Iova,
        id: MappingId,
    ) -> Result<(&Held, &Bounce), MappingMissing> {
        let missing = MappingMissing::NoSuchMapping { iova, id };
        let (_, held) = self.held.range(..=iova).next_back().ok_or(missing)?;
        let bounce = held.bounce().ok_or(missing)?;
        Ok((self.yours(session, held, iova, id)?, bounce))
    }

    /// The live coherent allocation of that name.
    pub(super) fn coherent_of(
        &self,
        session: SessionId,
        iova: Iova,
        id: MappingId,
    ) -> Result<&Held, MappingMissing> {
        let missing = MappingMissing::NoSuchMapping { iova, id };
        let held = self
            .held
            .get(&iova)
            .filter(|held| held.bounce().is_none())
            .ok_or(missing)?;
        self.yours(session, held, iova, id)
    }

    pub(super) fn yours<'h>(
        &self,
        session: SessionId,
        held: &'h Held,
        iova: Iova,
        id: MappingId,
    ) -> Result<&'h Held, MappingMissing> {
        let named = held.visible.start() == iova && held.id == id && held.phase == Phase::Live;
        if !named {
            return Err(MappingMissing::NoSuchMapping { iova, id });
        }
        match held.owner {
            Some(owner) if owner != session => Err(MappingMissing::NotYours { iova, id }),
            _ => Ok(held),
        }
    }

    pub(super) fn reserve_streaming(
        &mut self,
        layout: &Layout,
        session: SessionId,
        spec: &MapSpec,
    ) -> Result<FillJob, MapError> {
        self.driver(session)?;
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
        self.quotas.admit(Quota::Mappings, self.held.len())?;
        let granules = self.take(ApertureKind::Bounce, place)?;
        self.make_room(ApertureKind::Bounce, granules)?;
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
        let kind = HeldKind::Streaming(bounce.clone());
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
        self.quotas.admit(Quota::Mappings, self.held.len())?;
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
    fn make_room(&mut self, kind: ApertureKind, granules: IovaRange) -> Result<(), NoRoom> {
        let room = self.iotlb.reserve(granules);
        if room.is_err() {
            let iovas = self.iovas_mut(kind).expect("they were taken from it");
            iovas.free(granules).expect("they were just taken");
        }
        room
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
        let held = Held {
            id,
            owner,
            visible,
            granules,
            phase: Phase::Reserved,
            syncs: 0,
            epoch: self.bounce_epoch,
            kind,
        };
        self.held.insert(granules.start(), held);
        if let Some(owner) = owner {
            self.attached(owner).mappings.insert(granules.start());
        }
        id
    }

    /// Makes a mapping visible, unless its session has ended.
    pub(super) fn go_live(&mut self, layout: &Layout, at: Iova) -> Result<(), Denied> {
        let held = &self.held[&at];
        if let Some(session) = held
            .owner
            .filter(|owner| !self.sessions.contains_key(owner))
        {
            return Err(Denied::SessionEnded { session });
        }
        if self.has_outlived_a_reset(at) {
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
        self.iotlb
            .insert(entry)
            .expect("granules that are held by one are visible once, and had room made");
        self.reclaim();
        self.held_mut(at).phase = Phase::Live;
        Ok(())
    }

    pub(super) fn check_unmap(
        &self,
        session: SessionId,
        spec: &UnmapSpec,
    ) -> Result<DrainJob, UnmapError> {
        self.driver(session)?;
        let (held, bounce) = self.streaming_of(session, spec.iova, spec.id)?;
        if held.syncs > 0 {
            return Err(UnmapError::Busy {
                id: spec.id,
                syncs: held.syncs,
            });
        }
        let bytes_back = bounce.bytes_back(spec)?;
        Ok(DrainJob {
            at: held.granules.start(),
            iova: spec.iova,
            bounce: bounce.clone(),
            bytes_back,
        })
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
        let held = &self.held[&at];
        held.bounce().is_some() && held.epoch != self.bounce_epoch
    }

    /// The table has no readers yet but the domain itself, under its lock.
    pub(super) fn reclaim(&mut self) {
        self.iotlb.reclaim(self.iotlb.generation());
    }

    /// Takes a live mapping out of sight.
    pub(super) fn hide(&mut self, at: Iova) {
        let held = self.held_mut(at);
        held.phase = Phase::Draining;
        let start = held.visible.start();
        self.iotlb.remove(start).expect("what is live is visible");
        self.reclaim();
    }

    /// The session of a mapping has ended. May the caller release it now? If
    /// not, whoever is copying will.
    pub(super) fn abandon(&mut self, at: Iova) -> bool {
        if self.held[&at].phase != Phase::Live {
            return false;
        }
        self.hide(at);
        self.held[&at].syncs == 0
    }

    /// Frees the granules. The record is for the caller to drop, without the lock.
    pub(super) fn release(&mut self, at: Iova) -> Held {
        let held = self.held.remove(&at).expect("released once");
        let iovas = self
            .iovas_mut(held.aperture())
            .expect("what is held lies in an aperture");
        iovas
            .free(held.granules)
            .expect("what is held is allocated");
        if let Some(attached) = held.owner.and_then(|owner| self.sessions.get_mut(&owner)) {
            attached.mappings.remove(&at);
        }
        let memory = held
            .bounce()
            .and_then(|bounce| self.memories.get_mut(&bounce.memory_id));
        if let Some(registered) = memory {
            registered.mappings -= 1;
        }
        held
    }

    pub(super) fn usage(&self) -> Usage {
        let live =
            |iovas: &Option<IovaAllocator>| iovas.as_ref().map_or(0, IovaAllocator::live_count);
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
            streaming: live(&self.bounce_iovas),
            coherent: live(&self.coherent_iovas),
            memories: self.memories.len(),
            direct: self.iotlb.direct_len(),
            table_bytes: self.iotlb.table_usage().backed_bytes,
            direct_generation: self.direct_generation,
            bounce: occupancy(&self.bounce_iovas),
            coherent_aperture: occupancy(&self.coherent_iovas),
            generation: self.iotlb.generation(),
            invalidating: 0,
            quarantined: super::Quarantined::default(),
            fenced: 0,
        }
    }

    pub(super) fn check_invariants(&self) {
        self.iotlb.check_invariants();
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
        for (at, held) in &self.held {
            assert_eq!(
                *at,
                held.granules.start(),
                "a record stands under its first granule"
            );
            assert!(
                held.granules.contains(held.visible),
                "nothing outside its granules is visible"
            );
            let counted = held.owner.and_then(|owner| self.sessions.get(&owner));
            assert!(
                counted.is_none_or(|owner| owner.mappings.contains(at)),
                "an owner knows what it holds"
            );
        }
        let known: usize = self
            .sessions
            .values()
            .map(|attached| attached.mappings.len())
            .sum();
        let owned = self
            .held
            .values()
            .filter(|held| held.owner.is_some_and(|o| self.sessions.contains_key(&o)));
        assert_eq!(known, owned.count(), "every mapping counts once");
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
                .filter(|held| held.bounce().is_some_and(|b| b.memory_id == *id))
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

    fn check_direct(&self) {
        let entries = || self.iotlb.direct_entries();
        self.space
            .check_invariants(entries().map(|entry| entry.range));
        for (id, registered) in &self.memories {
            let used = entries().filter(|entry| entry.target.region == registered.region);
            assert_eq!(
                registered.direct,
                used.count() as u64,
                "memory {id} knows its direct mappings"
            );
            let slot = registered.region.slot().expect("a memory's number") as usize;
            assert_eq!(self.slots[slot], Some(*id), "memory {id} has its number");
        }
        let numbered = self.slots.iter().flatten().count();
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
