//! The domain: the one place where allocators, IOTLB, memory and sessions
//! meet.
//!
//! Every operation takes the lock for its decisions and lets go of it for its
//! copies. What is being copied is *in transit* meanwhile: it belongs to the
//! request that moves it, and everybody else sees it as absent. A request that
//! stops half way (an error, a panic) drops a guard that undoes what it had
//! reached.

mod chain;
mod desk;
mod direct;
mod lease;
mod limbo;
mod log;
mod made;
mod readers;
mod state;
#[cfg(test)]
mod tests;
mod transit;

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

pub(crate) use self::chain::{Chain, Link};
pub use self::desk::Desk;
pub use self::direct::{Behind, ResetBounce, ResetError, Translated, TranslationError};
use self::limbo::Limbo;
use self::log::ChangeLog;
pub use self::log::{Change, Listener, Lost};
use self::made::Made;
use self::readers::Readers;
use self::state::{State, Sweep};
use self::transit::{Draining, Making, Reservation, Syncing};
use crate::addr::{Iova, IovaRange};
use crate::alloc::IovaAllocator;
use crate::aperture::{Aperture, ScrubWith};
use crate::batch::{BatchError, BatchMode, BatchResult};
use crate::by_granule::ByGranule;
use crate::coherent::{AllocCoherentError, Allocated, CoherentSpec, FreeCoherentError};
use crate::crew::{Alone, Crew};
use crate::iotlb::{Allowance, Iotlb, RegionId, RegionWords, Walker};
use crate::layout::{ApertureKind, Layout};
use crate::lease::LeaseTally;
use crate::limits::{Quota, QuotaExceeded, Quotas, TABLE_BYTES_PER_DOMAIN};
use crate::mapping::{HeldKind, MappingFilter, MappingId, MappingView, Phase};
use crate::memory::{MemoryId, MemoryView, RegisterError, Registered, UnregisterError};
use crate::region::{ClientMemory, Grant, RegionError};
use crate::session::{
    AckError, Attached, Denied, Holdings, JoinError, Joining, Owed, Progress, Removal, SessionId,
};
use crate::space::{RestrictionError, Restrictions, Space};
use crate::streaming::{MapError, MapSpec, Mapped, SyncError, SyncSpec, UnmapError, UnmapSpec};

/// When bounce memory is zeroed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Scrub {
    /// Before a new mapping can show it.
    #[default]
    OnMap,
    /// Also when it is freed.
    OnUnmap,
}

/// What of a domain may be changed while it lives.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Settings {
    /// How much there may be.
    pub quotas: Quotas,
    /// When bounce memory is zeroed.
    pub scrub: Scrub,
    /// Where direct mappings may lie.
    pub restrictions: Restrictions,
}

/// Why settings were not changed, none of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs)] // the messages are the docs
pub enum UpdateError {
    #[error(transparent)]
    Quota(#[from] QuotaExceeded),
    #[error("a session holds {used} bytes in leases, {limit} would be less")]
    LeaseBytes { limit: u64, used: u64 },
    #[error(transparent)]
    Restriction(#[from] RestrictionError),
}

/// One IOVA domain: address plan, memory, and who holds what of it.
///
/// All methods may be called from any thread. None of them waits for a client.
#[derive(Debug)]
pub struct Domain {
    layout: Layout,
    bounce: Option<Aperture>,
    coherent: Option<Aperture>,
    /// Guards every decision. Held for bookkeeping only: never across a copy,
    /// a system call on a client's file, or the end of a client's fd.
    state: Mutex<State>,
}

/// What a domain holds at one moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Usage {
    /// Attached sessions.
    pub sessions: usize,
    /// Streaming mappings, those in transit included.
    pub streaming: usize,
    /// Coherent allocations, those in transit included.
    pub coherent: usize,
    /// Leases, those in transit included.
    pub leases: LeaseTally,
    /// Registered memories.
    pub memories: usize,
    /// Direct mappings.
    pub direct: usize,
    /// Bytes of the IOTLB's page table.
    pub table_bytes: u64,
    /// Generation in which the direct table became what it is.
    pub direct_generation: u64,
    /// Bytes of the bounce aperture.
    pub bounce: Occupancy,
    /// Bytes of the coherent aperture.
    pub coherent_aperture: Occupancy,
    /// Number of the IOTLB's state.
    pub generation: u64,
    /// Mappings that were removed and that some session has not acknowledged.
    pub invalidating: usize,
    /// Mappings in quarantine.
    pub quarantined: Quarantined,
    /// Sessions that have ended and may still reach something.
    pub fenced: usize,
}

/// What cannot be used again because somebody may still reach it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Quarantined {
    /// How many mappings.
    pub mappings: usize,
    /// Bytes of the apertures among them, in whole granules.
    pub bytes: u64,
}

/// Why a domain was not created.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)] // the messages are the docs
pub enum CreateError {
    #[error(transparent)]
    Region(#[from] RegionError),
    #[error(transparent)]
    Restriction(#[from] RestrictionError),
}

/// How full an aperture is. All zero if there is none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Occupancy {
    /// Taken bytes, in whole granules.
    pub used_bytes: u64,
    /// Longest free run in bytes: the largest request that would succeed.
    pub largest_hole_bytes: u64,
}

/// Why a domain was not closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "the domain is in use: {sessions} sessions, {streaming} streaming mappings, \
     {leases} leases, {coherent} coherent allocations, {direct} direct mappings, \
     {memories} registered memories"
)]
pub struct InUse {
    /// Attached sessions.
    pub sessions: usize,
    /// Streaming mappings.
    pub streaming: usize,
    /// Leases.
    pub leases: usize,
    /// Coherent allocations.
    pub coherent: usize,
    /// Direct mappings.
    pub direct: usize,
    /// Registered memories.
    pub memories: usize,
}

/// What to do with a domain that is in use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Close {
    /// Refuse.
    IfUnused,
    /// Close it; its sessions are to be ended.
    Force,
}

impl Domain {
    /// Creates a domain and all its memory.
    ///
    /// # Errors
    /// [`CreateError`] if the memory is not to be had, or for a reserved range
    /// over an aperture; nothing is left behind.
    pub fn create(
        name: &str,
        layout: Layout,
        settings: Settings,
        scrub_with: ScrubWith,
    ) -> Result<Domain, CreateError> {
        Domain::create_within(name, layout, settings, scrub_with, None)
    }

    /// As [`create`](Domain::create), asking somebody before the page table
    /// gets more memory.
    ///
    /// # Errors
    /// As [`create`](Domain::create).
    pub fn create_within(
        name: &str,
        layout: Layout,
        settings: Settings,
        scrub_with: ScrubWith,
        allowance: Option<Arc<dyn Allowance>>,
    ) -> Result<Domain, CreateError> {
        let Settings {
            quotas,
            scrub,
            restrictions,
        } = settings;
        let mut space = Space::new(&layout, Restrictions::default());
        space.restrict(restrictions, &[])?;
        let aperture = |kind| {
            let range = layout.aperture(kind);
            range
                .map(|range| Aperture::create(name, kind, range, layout.backing(), scrub_with))
                .transpose()
        };
        let iovas = |kind| {
            let range = layout.aperture(kind);
            range.and_then(|range| IovaAllocator::new(range, layout.granule()))
        };
        Ok(Domain {
            layout,
            bounce: aperture(ApertureKind::Bounce)?,
            coherent: aperture(ApertureKind::Coherent)?,
            state: Mutex::new(State {
                closed: false,
                quotas,
                scrub,
                iotlb: new_iotlb(name, &layout, allowance)?,
                bounce_iovas: iovas(ApertureKind::Bounce),
                coherent_iovas: iovas(ApertureKind::Coherent),
                held: ByGranule::new(layout.apertures(), layout.granule()),
                sessions: BTreeMap::new(),
                memories: BTreeMap::new(),
                slots: Vec::new(),
                space,
                direct_generation: 0,
                bounce_epoch: 0,
                leases: LeaseTally::default(),
                next_mapping: 1,
                next_memory: 1,
                readers: Readers::default(),
                limbo: Limbo::default(),
                made: Made::default(),
                hidden: 0,
                log: None,
                listener: None,
            }),
        })
    }

    /// Its address plan.
    #[must_use]
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// An aperture with its memory, if the domain has it.
    #[must_use]
    pub fn aperture(&self, kind: ApertureKind) -> Option<&Aperture> {
        match kind {
            ApertureKind::Bounce => self.bounce.as_ref(),
            ApertureKind::Coherent => self.coherent.as_ref(),
        }
    }

    /// A poisoned lock means that a decision stopped half way: the domain
    /// fails closed, every later call panics too, and nothing is guessed.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state
            .lock()
            .expect("an earlier panic left this domain undecided")
    }

    /// For looking only: what a failed domain looks like may be wrong, but the
    /// operator must be able to see the others.
    fn look(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_poisoned(&self) -> bool {
        let mut apertures = self.bounce.iter().chain(&self.coherent);
        apertures.any(Aperture::is_poisoned)
    }

    fn held_aperture(&self, kind: ApertureKind) -> &Aperture {
        self.aperture(kind)
            .expect("what is held lies in an aperture")
    }
}

/// An empty table in memory of its own, which shows in `/proc` as `domaind:{domain}:iotlb`.
fn new_iotlb(
    name: &str,
    layout: &Layout,
    allowance: Option<Arc<dyn Allowance>>,
) -> Result<Iotlb<RegionWords>, RegionError> {
    let most_bytes = TABLE_BYTES_PER_DOMAIN + table_bytes(layout);
    let words = RegionWords::create(&format!("domaind:{name}:iotlb"), most_bytes, allowance)?;
    let table = Iotlb::new(words, layout.granule(), layout.apertures());
    // Of two causes only this one is left: that it has room for two nodes is above.
    table.map_err(|_| RegionError::NoMemory {
        want_bytes: TABLE_BYTES_PER_DOMAIN,
    })
}

/// Bytes of the page table of full apertures: a word a granule, in nodes of 4
/// KiB, and less than a hundredth more for the levels above.
fn table_bytes(layout: &Layout) -> u64 {
    const NODE_BYTES: u64 = 4096;
    let bytes = layout.apertures().and_then(IovaRange::len_bytes);
    let granules = bytes.unwrap_or(0) >> layout.granule().shift();
    let leaves = granules.div_ceil(512) + 1;
    (leaves + leaves.div_ceil(100) + 4) * NODE_BYTES
}

/// Sessions and the memory they register.
impl Domain {
    /// Lets a session in; answers the generation that it starts from, which it
    /// has acknowledged thereby.
    ///
    /// # Errors
    /// [`JoinError`] if the domain is closed or full. Sessions that have ended
    /// and may still reach something count.
    pub fn join(&self, session: SessionId, who: impl Into<Joining>) -> Result<u64, JoinError> {
        let Joining {
            role,
            account,
            reader,
        } = who.into();
        let mut state = self.lock();
        if state.closed {
            return Err(JoinError::DomainClosed);
        }
        let known = state.sessions.len() + state.readers.ghosts();
        state.quotas.admit(Quota::Sessions, known)?;
        let generation = state.iotlb.generation();
        let twice = state.sessions.contains_key(&session) || state.readers.is_ghost(session);
        if !twice {
            state.sessions.insert(session, Attached::new(role));
            state.readers.join(session, generation, account, reader);
            state.tell();
        }
        drop(state);
        // Outside the lock: a slip of the caller's must not fail the domain.
        assert!(!twice, "session {session} joins once");
        Ok(generation)
    }

    /// Ends a session that holds nothing any more, because it has said so or is
    /// proven gone, whether it was attached or fenced. Releases all it held,
    /// zeroed; nothing is copied back. What a call of the session is still copying
    /// is released when that call comes to its end. Does nothing for a session
    /// that is not there.
    pub fn leave(&self, session: SessionId) {
        self.end(session, Departure::Gone);
    }

    /// Ends a session that may still reach what it could reach: as
    /// [`leave`](Domain::leave), but that stays in quarantine until the session
    /// acknowledges it ([`acknowledge`](Domain::acknowledge)) or leaves.
    pub fn fence(&self, session: SessionId) {
        self.end(session, Departure::MayReach);
    }

    fn end(&self, session: SessionId, departure: Departure) {
        // A failed domain gives nothing back: what it held ends with it.
        let Ok(mut state) = self.state.lock() else {
            return;
        };
        // First: what is hidden below was in its reach.
        let freed = match departure {
            Departure::Gone => {
                state.readers.forget(session);
                state.reconsider(session)
            }
            Departure::MayReach => {
                let generation = state.iotlb.generation();
                state.readers.fence(session, generation);
                Vec::new()
            }
        };
        let (bounces, memories) = state.end_session(session);
        self.settle(state, freed);
        // Closing a client's file may block: outside the lock.
        drop((bounces, memories));
    }

    /// Takes a client's memory into the domain. If it is persistent it belongs
    /// to the domain, and stays when the session ends.
    ///
    /// # Errors
    /// [`RegisterError`]; the memory is dropped.
    pub fn register(
        &self,
        session: SessionId,
        memory: ClientMemory,
        persistent: bool,
    ) -> Result<MemoryId, RegisterError> {
        // Declared first, dropped last: a refused file is closed outside the lock.
        let memory = Arc::new(memory);
        let mut state = self.lock();
        state.driver(session)?;
        state
            .quotas
            .admit(Quota::Memories, state.known_memories())?;
        let id = MemoryId::new(state.next_memory);
        state.next_memory += 1;
        let registered = Registered {
            owner: (!persistent).then_some(session),
            memory: Arc::clone(&memory),
            mappings: 0,
            direct: 0,
            region: state.take_slot(id),
        };
        state.memories.insert(id, registered);
        if !persistent {
            state.attached(session).memories.insert(id);
        }
        Ok(id)
    }

    /// Gives a registration back.
    ///
    /// # Errors
    /// [`UnregisterError`]; the registration stays.
    pub fn unregister(&self, session: SessionId, id: MemoryId) -> Result<Removal, UnregisterError> {
        let mut state = self.lock();
        state.driver(session)?;
        let &Registered {
            mappings, direct, ..
        } = state.memory_of(session, id)?;
        if mappings + direct > 0 {
            return Err(UnregisterError::InUse {
                id,
                mappings,
                direct,
            });
        }
        state.attached(session).memories.remove(&id);
        let forgotten = state.forget_memory(id);
        state.ask_readers(&[id], Some(session));
        let removal = state.removal();
        self.settle(state, Vec::new());
        drop(forgotten);
        Ok(removal)
    }

    /// Stops everything but [`leave`](Domain::leave). With [`Close::Force`] it
    /// answers the sessions that are to be ended; each of them must still
    /// leave, and loses what it has not copied back.
    ///
    /// # Errors
    /// [`InUse`] for [`Close::IfUnused`] on a domain that is in use.
    pub fn close(&self, how: Close) -> Result<Vec<SessionId>, InUse> {
        // Also a failed domain can be closed: it is the way to be rid of it.
        let mut state = self.look();
        let Usage {
            sessions,
            streaming,
            coherent,
            leases: LeaseTally { count: leases, .. },
            direct,
            memories,
            ..
        } = state.usage();
        let unused = sessions + streaming + leases + coherent + direct + memories == 0;
        if how == Close::IfUnused && !unused {
            return Err(InUse {
                sessions,
                streaming,
                leases,
                coherent,
                direct,
                memories,
            });
        }
        state.closed = true;
        Ok(state.sessions.keys().copied().collect())
    }
}

/// Streaming mappings.
impl Domain {
    /// Bounces buffers: takes iovas, copies in, makes them visible.
    ///
    /// # Errors
    /// The first refused entry of an all-or-nothing batch; nothing is changed.
    pub fn map(
        &self,
        session: SessionId,
        specs: &[MapSpec],
        mode: BatchMode,
    ) -> BatchResult<Mapped, MapError> {
        let mut desk = Desk::default();
        let answers = self.map_at(&mut desk, session, specs, mode, &Alone)?;
        Ok(answers.collect())
    }

    /// As [`map`](Domain::map), at a desk that is kept from one batch to the next, with a crew that
    /// copies. The lock is taken once before the copies and once behind them. All is done when this
    /// returns, whether the answers are looked at or not.
    ///
    /// # Errors
    /// As [`map`](Domain::map).
    pub fn map_at<'k>(
        &self,
        desk: &'k mut Desk,
        session: SessionId,
        specs: &[MapSpec],
        mode: BatchMode,
        crew: &dyn Crew,
    ) -> Result<
        impl ExactSizeIterator<Item = Result<Mapped, MapError>> + use<'k>,
        BatchError<MapError>,
    > {
        let room = desk.room_for_maps();
        let mut making = Making::reserve(self, session, specs, mode, room)?;
        making.fill(mode, crew)?;
        making.go_live(mode)?;
        desk.maps = making.finish();
        let made = desk.maps.drain(..);
        Ok(made.map(|entry| entry.map(|made| made.mapped())))
    }

    /// Copies back what flows back, then frees.
    ///
    /// # Errors
    /// The first refused entry of an all-or-nothing batch; all mappings stay.
    /// If it was a copy that failed, others have been copied back and will be again.
    pub fn unmap(
        &self,
        session: SessionId,
        specs: &[UnmapSpec],
        mode: BatchMode,
    ) -> BatchResult<u64, UnmapError> {
        let mut desk = Desk::default();
        let answers = self.unmap_at(&mut desk, session, specs, mode, &Alone)?;
        Ok(answers.collect())
    }

    /// As [`unmap`](Domain::unmap), at a desk that is kept from one batch to the next, with a crew
    /// that copies: of buffers that overlap any may come last. The lock is taken once if nothing
    /// flows back, else before the copies and behind them.
    ///
    /// # Errors
    /// As [`unmap`](Domain::unmap).
    pub fn unmap_at<'k>(
        &self,
        desk: &'k mut Desk,
        session: SessionId,
        specs: &[UnmapSpec],
        mode: BatchMode,
        crew: &dyn Crew,
    ) -> Result<
        impl ExactSizeIterator<Item = Result<u64, UnmapError>> + use<'k>,
        BatchError<UnmapError>,
    > {
        let mut draining = Draining::new(self, session, desk.room_for_unmaps());
        let mut state = self.lock();
        draining.hide(&mut state, specs, mode)?;
        if draining.copies_back() {
            drop(state);
            draining.copy_back(mode, crew)?;
            state = self.lock();
        }
        draining.end(state, crew);
        desk.unmaps = draining.finish();
        let ended = desk.unmaps.drain(..);
        Ok(ended.map(|entry| entry.map(|job| job.bytes_back)))
    }

    /// Copies parts of live mappings one way.
    ///
    /// # Errors
    /// The first refused entry of an all-or-nothing batch; then no part was
    /// copied, unless copying itself failed.
    pub fn sync(
        &self,
        session: SessionId,
        specs: &[SyncSpec],
        mode: BatchMode,
    ) -> BatchResult<(), SyncError> {
        let mut desk = Desk::default();
        let answers = self.sync_at(&mut desk, session, specs, mode)?;
        Ok(answers.collect())
    }

    /// As [`sync`](Domain::sync), at a desk that is kept from one batch to the next. Parts may
    /// overlap, and are copied in their order: without a crew.
    ///
    /// # Errors
    /// As [`sync`](Domain::sync).
    pub fn sync_at<'k>(
        &self,
        desk: &'k mut Desk,
        session: SessionId,
        specs: &[SyncSpec],
        mode: BatchMode,
    ) -> Result<impl ExactSizeIterator<Item = Result<(), SyncError>> + use<'k>, BatchError<SyncError>>
    {
        let room = desk.room_for_syncs();
        let mut syncing = Syncing::begin(self, session, specs, mode, room)?;
        syncing.copy(mode)?;
        desk.syncs = syncing.finish();
        let synced = desk.syncs.drain(..);
        Ok(synced.map(|entry| entry.map(|_| ())))
    }

    /// Ends what was visible and is not any more: it is free when nobody can
    /// still use it, zeroed if asked, or if a reset could not zero it because it
    /// was in transit. Does nothing in a domain that has failed: guards call this
    /// while a panic unwinds, and a second panic would end the process.
    fn retire(&self, keys: &[Iova], actor: Option<SessionId>, scrub: impl FnOnce(&State) -> bool) {
        if keys.is_empty() {
            return;
        }
        let Ok(mut state) = self.state.lock() else {
            return;
        };
        let scrub = self.is_poisoned() || scrub(&state);
        let bounces: Vec<_> = keys.iter().map(|at| state.retire(*at, scrub)).collect();
        state.ask_readers(&[], actor);
        self.settle(state, Vec::new());
        // The last to know a client's file may be among them: closed outside the lock.
        drop(bounces);
    }

    /// Frees what nobody can use any more, zeroed where it must be.
    fn settle(&self, state: MutexGuard<'_, State>, freed: Vec<Sweep>) {
        self.settle_with(&Alone, state, freed);
    }

    /// As [`settle`](Domain::settle), with somebody who knows what is long.
    fn settle_with(&self, crew: &dyn Crew, mut state: MutexGuard<'_, State>, freed: Vec<Sweep>) {
        let mut sweeps = freed;
        sweeps.extend(state.sweep());
        state.tell();
        if sweeps.is_empty() {
            return;
        }
        drop(state);
        let bytes = sweeps.iter().map(|sweep| sweep.granules.bytes());
        let bytes = u64::try_from(bytes.sum::<u128>()).unwrap_or(u64::MAX);
        crew.attend(bytes, &mut || {
            for sweep in &sweeps {
                self.held_aperture(sweep.kind).scrub(sweep.granules);
            }
        });
        if let Ok(mut state) = self.state.lock() {
            state.swept(&sweeps);
            state.tell();
        }
    }

    /// Frees granules that nobody has ever seen, zeroed if asked, or if a reset
    /// could not zero them because they were in transit. As
    /// [`retire`](Domain::retire) in a domain that has failed.
    fn give_back(&self, keys: &[Iova], scrub: bool) {
        let Ok(mut state) = self.state.lock() else {
            return;
        };
        let is_stale = |at: &Iova| state.has_outlived_a_reset(*at);
        if scrub || self.is_poisoned() || keys.iter().any(is_stale) {
            let part = |at| (state.held[at].aperture(), state.held[at].granules);
            let parts: Vec<_> = keys.iter().map(part).collect();
            drop(state);
            for (kind, granules) in parts {
                self.held_aperture(kind).scrub(granules);
            }
            let Ok(again) = self.state.lock() else {
                return;
            };
            state = again;
        }
        let released: Vec<_> = keys.iter().map(|at| state.release(*at)).collect();
        drop(state);
        // The last to know a client's file may be among them: closed outside the lock.
        drop(released);
    }
}

/// Coherent memory.
impl Domain {
    /// Allocates zeroed memory that all sessions see.
    ///
    /// # Errors
    /// [`AllocCoherentError`]; nothing is changed.
    pub fn alloc_coherent(
        &self,
        session: SessionId,
        spec: &CoherentSpec,
    ) -> Result<Allocated, AllocCoherentError> {
        let job = self.lock().reserve_coherent(session, spec)?;
        let mut made = Reservation::new(self, job);
        self.held_aperture(ApertureKind::Coherent)
            .zero(made.job.granules);
        let live = made.go_live(&mut self.lock());
        live?;
        Ok(Allocated {
            id: made.job.id,
            range: made.job.visible,
        })
    }

    /// Frees one allocation, zeroing it.
    ///
    /// # Errors
    /// [`FreeCoherentError`]; the allocation is as it was.
    pub fn free_coherent(
        &self,
        session: SessionId,
        iova: Iova,
        id: MappingId,
    ) -> Result<Removal, FreeCoherentError> {
        let mut state = self.lock();
        state.driver(session)?;
        state.coherent_of(session, iova, id)?;
        state.hide_all(&[iova]);
        let nothing = state.retire(iova, true);
        debug_assert!(nothing.is_none(), "coherent memory keeps no client's file");
        state.ask_readers(&[], Some(session));
        let removal = state.removal();
        self.settle(state, Vec::new());
        Ok(removal)
    }
}

/// Sessions that read, and what waits for them.
impl Domain {
    /// A session, attached or fenced, holds no translation that is older than
    /// `generation`. Less than it has said before changes nothing.
    ///
    /// # Errors
    /// [`AckError`]; nothing is changed.
    pub fn acknowledge(&self, session: SessionId, generation: u64) -> Result<(), AckError> {
        let mut state = self.lock();
        let current = state.iotlb.generation();
        state.readers.acknowledge(session, generation, current)?;
        let freed = state.reconsider(session);
        self.settle(state, freed);
        Ok(())
    }

    /// What an attached session was asked to acknowledge and has not.
    #[must_use]
    pub fn owed(&self, session: SessionId) -> Option<Owed> {
        self.look().readers.owed(session)
    }

    /// Number of the IOTLB's state.
    #[must_use]
    pub fn generation(&self) -> u64 {
        self.look().iotlb.generation()
    }

    /// May an acknowledgment free so much that zeroing it takes long?
    #[must_use]
    pub fn awaits_much(&self) -> bool {
        const MUCH_BYTES: u64 = 1 << 20;
        self.look().limbo.waiting_bytes() > MUCH_BYTES
    }

    /// Has this session ended, and may it still reach something?
    #[must_use]
    pub fn is_fenced(&self, session: SessionId) -> bool {
        self.look().readers.is_ghost(session)
    }

    /// Is this session attached, or may it still reach something?
    #[must_use]
    pub fn is_known(&self, session: SessionId) -> bool {
        let state = self.look();
        state.sessions.contains_key(&session) || state.readers.is_ghost(session)
    }

    /// How far a removal has come.
    #[must_use]
    pub fn progress(&self, removal: Removal) -> Progress {
        self.look().progress(removal.generation)
    }

    /// The newest removal whose end gives iovas back; `None` if no
    /// acknowledgment would.
    #[must_use]
    pub fn awaits_iovas(&self) -> Option<Removal> {
        let state = self.look();
        state.limbo.awaits_granules().then(|| state.removal())
    }

    /// Gives a session the file of the memory that a region of the page table
    /// leads to. From then on it is told when nothing leads there any more, and
    /// must acknowledge that itself.
    ///
    /// # Errors
    /// [`OpenError`]; nothing is changed.
    pub fn open_memory(
        &self,
        session: SessionId,
        region: RegionId,
    ) -> Result<(MemoryId, Arc<ClientMemory>), OpenError> {
        let mut state = self.lock();
        if !state.sessions.contains_key(&session) {
            return Err(Denied::SessionEnded { session }.into());
        }
        let missing = OpenError::NoSuchRegion { region };
        let id = state.memory_at(region).ok_or(missing)?;
        let registered = &state.memories[&id];
        if registered.direct == 0 {
            return Err(missing);
        }
        let memory = Arc::clone(&registered.memory);
        state.readers.open(session, id, region);
        Ok((id, memory))
    }

    /// Was this session given the file of a memory?
    #[must_use]
    pub fn has_opened(&self, session: SessionId) -> bool {
        self.look().readers.has_opened(session)
    }

    /// Everybody who reads, attached or fenced, by number.
    #[must_use]
    pub fn standings(&self) -> Vec<Standing> {
        let state = self.look();
        let standings = state.readers.all();
        standings.filter_map(|one| state.standing(one)).collect()
    }

    /// How one session stands; `None` if it is not known.
    #[must_use]
    pub fn standing(&self, session: SessionId) -> Option<Standing> {
        self.look().standing(session)
    }

    /// A reader of the page table, for any thread of this process. What it finds
    /// is true at that moment; nobody waits for it.
    #[must_use]
    pub fn walker(&self) -> Walker<Arc<RegionWords>> {
        self.look().iotlb.walker()
    }

    /// Opens the page table once more, read-only, for one session; under a mark
    /// that [`Domain::is_granted`] asks for.
    ///
    /// # Errors
    /// [`RegionError`].
    pub fn grant_table(&self, mark: u64) -> Result<Grant, RegionError> {
        self.look().iotlb.words().grant_marked(mark)
    }

    /// Is a file of this domain's memory that was granted under this mark still
    /// open or mapped anywhere: in a process, in its children, on its way through
    /// a socket? Whoever holds one can say that it is not; see SECURITY.md.
    ///
    /// # Errors
    /// The kernel's, for instance where it has no such locks.
    pub fn is_granted(&self, mark: u64) -> io::Result<bool> {
        for aperture in self.bounce.iter().chain(&self.coherent) {
            if aperture.is_granted(mark)? {
                return Ok(true);
            }
        }
        self.look().iotlb.words().is_marked(mark)
    }

    /// Bytes of the page table that a session maps.
    #[must_use]
    pub fn table_len_bytes(&self) -> u64 {
        self.look().iotlb.words().len_bytes()
    }
}

/// How a session ends.
#[derive(Clone, Copy, Debug)]
enum Departure {
    /// It holds nothing any more.
    Gone,
    /// It may still reach what it could reach.
    MayReach,
}

/// How one session stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Standing {
    /// Which.
    pub session: SessionId,
    /// It has ended, and may still reach something.
    pub fenced: bool,
    /// It holds nothing older.
    pub acked: u64,
    /// What it was asked to acknowledge.
    pub asked: u64,
    /// What is held back because of it.
    pub quarantined: Quarantined,
}

/// Why a session was not given a memory's file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs)] // the messages are the docs
pub enum OpenError {
    #[error(transparent)]
    Denied(#[from] Denied),
    #[error("nothing leads to {region}")]
    NoSuchRegion { region: RegionId },
}

/// Watching.
impl Domain {
    /// Who is told of every change from now on, in place of whoever was before.
    pub fn listen(&self, listener: Arc<dyn Listener>) {
        self.look().listener = Some(listener);
    }

    /// From now on changes are remembered for a while. Answers the present
    /// generation.
    pub fn watch(&self) -> u64 {
        let mut state = self.look();
        let generation = state.iotlb.generation();
        let new = || ChangeLog::starting_at(generation);
        state.log.get_or_insert_with(new);
        generation
    }

    /// At most `max` of the changes behind the state `after`, in order; none if
    /// that is the present one.
    ///
    /// # Errors
    /// [`Lost`] if the first of them is not known any more.
    pub fn changes(&self, after: u64, max: usize) -> Result<Vec<Arc<Change>>, Lost> {
        let state = self.look();
        let generation = state.iotlb.generation();
        let log = state.log.as_ref().ok_or(Lost { generation })?;
        log.since(after, max)
    }

    /// At most `max` visible mappings that start at `from` or above, by address,
    /// and the generation in which they are.
    #[must_use]
    pub fn visible(&self, from: Iova, max: usize) -> (Vec<MappingView>, u64) {
        let state = self.look();
        let views = state.views(self.layout.apertures(), self.granule_of(from), from);
        let visible = views.filter(|view| view.phase == Phase::Live);
        (visible.take(max).collect(), state.iotlb.generation())
    }
}

/// What everybody may ask.
impl Domain {
    /// What the domain holds.
    #[must_use]
    pub fn usage(&self) -> Usage {
        self.look().usage()
    }

    /// Bytes that are visible through the mappings at these addresses: a hint
    /// of what ending them will cost. Addresses where none begins count nothing.
    #[must_use]
    pub fn visible_bytes(&self, iovas: impl Iterator<Item = Iova>) -> u64 {
        let state = self.lock();
        let bytes = |iova| {
            let held = state.held.get(iova)?;
            held.visible
                .len_bytes()
                .filter(|_| held.visible.start() == iova)
        };
        iovas.filter_map(bytes).fold(0, u64::saturating_add)
    }

    /// What one session holds; `None` if it is not attached.
    #[must_use]
    pub fn holdings(&self, session: SessionId) -> Option<Holdings> {
        let state = self.look();
        let attached = state.sessions.get(&session)?;
        // What has ended it does not hold, though that may have to wait.
        let mappings = state.held_by(attached).filter(|held| !held.is_retired());
        let mut holdings = Holdings {
            memories: attached.memories.len(),
            ..Holdings::default()
        };
        for held in mappings {
            match held.kind {
                HeldKind::Streaming(_) => holdings.streaming += 1,
                HeldKind::Coherent => holdings.coherent += 1,
                HeldKind::Lease => holdings.leases.add(held.granules),
            }
        }
        Some(holdings)
    }

    /// At most `max` mappings that start at `from` or above, by address.
    #[must_use]
    pub fn mappings(&self, filter: MappingFilter, from: Iova, max: usize) -> Vec<MappingView> {
        let state = self.lock();
        let views = state.views(self.layout.apertures(), self.granule_of(from), from);
        views.filter(|view| filter.admits(view)).take(max).collect()
    }

    /// Records stand under their first granule, which may begin before they do.
    fn granule_of(&self, iova: Iova) -> Iova {
        Iova::new(iova.get() - self.layout.granule().offset_in(iova.get()))
    }

    /// At most `max` registered memories from `from` on, by id.
    #[must_use]
    pub fn memories(&self, from: MemoryId, max: usize) -> Vec<MemoryView> {
        let state = self.lock();
        let view = |(&id, registered): (&MemoryId, &Registered)| MemoryView {
            id,
            owner: registered.owner,
            size_bytes: registered.memory.size_bytes(),
            writable: registered.memory.is_writable(),
            hugetlb: registered.memory.is_hugetlb(),
            mappings: registered.mappings,
            direct: registered.direct,
        };
        state.memories.range(from..).take(max).map(view).collect()
    }

    /// Settings in force.
    #[must_use]
    pub fn settings(&self) -> Settings {
        let state = self.look();
        Settings {
            quotas: state.quotas,
            scrub: state.scrub,
            restrictions: state.space.restrictions().clone(),
        }
    }

    /// Changes the settings to what `change` makes of those in force, or none
    /// of them.
    ///
    /// # Errors
    /// What `change` says; [`UpdateError`] for a quota below what is in use and
    /// for a reserved range over what is mapped.
    pub fn update<E: From<UpdateError>>(
        &self,
        change: impl FnOnce(Settings) -> Result<Settings, E>,
    ) -> Result<(), E> {
        let mut state = self.lock();
        let settings = change(Settings {
            quotas: state.quotas,
            scrub: state.scrub,
            restrictions: state.space.restrictions().clone(),
        })?;
        Ok(state.apply(settings)?)
    }

    /// Checks everything that must always hold between two operations.
    ///
    /// # Panics
    /// Naming the promise that is broken.
    pub fn check_invariants(&self) {
        self.lock().check_invariants();
    }
}
