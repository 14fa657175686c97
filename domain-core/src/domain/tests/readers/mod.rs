//! Who is waited for before something is used again, and who is not.

mod acks;
mod asks;
mod barrier;
mod direct;
mod fences;
mod ghosts;
mod leases;
mod nodes;
mod quotas;
mod set_map;
mod storm;
mod windows;

use std::sync::{Arc, Mutex};

use super::*;
use crate::coherent::{AllocCoherentError, Allocated, CoherentSpec};
use crate::iotlb::Barrier;
use crate::mapping::{MappingView, Phase};
use crate::session::{Account, Joining, Progress, Reader, Removal};

/// Bytes of a granule, for arrays.
const PAGE: usize = 4096;

/// Two who read.
const FIRST: SessionId = SessionId::new(11);
const SECOND: SessionId = SessionId::new(12);
/// Somebody who comes later.
const LATER: SessionId = SessionId::new(13);

/// A session as its domain sees it, that writes down what it is told.
#[derive(Debug, Default)]
pub(super) struct Fake {
    by_frames: bool,
    /// The oldest view that one of its threads holds.
    pinned: Mutex<Option<u64>>,
    asked: Mutex<Vec<u64>>,
    fenced: Mutex<Vec<u64>>,
    /// How much it had been asked when leases of it were taken away, each time.
    revoked: Mutex<Vec<usize>>,
}

impl Reader for Fake {
    fn by_frames(&self) -> bool {
        self.by_frames
    }

    fn holds_older_than(&self, generation: u64, _barrier: &Barrier) -> bool {
        assert!(!self.by_frames, "not asked of one that answers by frames");
        let pinned = *self.pinned.lock().unwrap();
        pinned.is_some_and(|view| view < generation)
    }

    fn ask(&self, generation: u64) {
        self.asked.lock().unwrap().push(generation);
    }

    fn fence(&self, generation: u64) {
        self.fenced.lock().unwrap().push(generation);
    }

    fn revoke(&self) {
        // Before it is asked, and before it is looked at.
        let asked = self.asked.lock().unwrap().len();
        self.revoked.lock().unwrap().push(asked);
    }
}

impl Fake {
    pub(super) fn frames() -> Arc<Fake> {
        Arc::new(Fake {
            by_frames: true,
            ..Fake::default()
        })
    }

    pub(super) fn pins() -> Arc<Fake> {
        Arc::new(Fake::default())
    }

    pub(super) fn pin(&self, view: u64) {
        *self.pinned.lock().unwrap() = Some(view);
    }

    pub(super) fn unpin(&self) {
        *self.pinned.lock().unwrap() = None;
    }

    /// What it was asked for since the last time.
    pub(super) fn asked(&self) -> Vec<u64> {
        std::mem::take(&mut self.asked.lock().unwrap())
    }

    /// How much it had been asked, since the last look at that, when leases of it
    /// were taken away, each time.
    pub(super) fn revoked(&self) -> Vec<usize> {
        self.revoked.lock().unwrap().clone()
    }

    /// The generations in which it was fenced.
    fn fenced(&self) -> Vec<u64> {
        self.fenced.lock().unwrap().clone()
    }
}

fn reading(role: Role, account: u32, fake: &Arc<Fake>) -> Joining {
    Joining {
        role,
        account: Account(account),
        reader: Some(Arc::clone(fake) as Arc<dyn Reader>),
    }
}

/// A device that acknowledges by frames.
fn join_by_frames(domain: &Domain, session: SessionId) -> Arc<Fake> {
    let fake = Fake::frames();
    domain
        .join(session, reading(Role::Device, 7, &fake))
        .unwrap();
    fake
}

/// A device that acknowledges by pins.
fn join_by_pins(domain: &Domain, session: SessionId) -> Arc<Fake> {
    let fake = Fake::pins();
    domain
        .join(session, reading(Role::Device, 7, &fake))
        .unwrap();
    fake
}

/// Apertures of 8 and 4 pages, and a driver that never translates. The first
/// page of all is never given away.
fn served() -> Domain {
    let domain = empty_domain(8, 4, Scrub::OnMap);
    domain.join(DRIVER, Role::Driver).unwrap();
    domain
}

fn generation(domain: &Domain) -> u64 {
    domain.usage().generation
}

fn ack(domain: &Domain, session: SessionId, generation: u64) {
    domain.acknowledge(session, generation).unwrap();
    domain.check_invariants();
}

/// All that there is now.
fn ack_all(domain: &Domain, session: SessionId) {
    ack(domain, session, generation(domain));
}

fn fence(domain: &Domain, session: SessionId) {
    domain.fence(session);
    domain.check_invariants();
}

fn leave(domain: &Domain, session: SessionId) {
    domain.leave(session);
    domain.check_invariants();
}

fn alloc(domain: &Domain, pages: u64) -> Result<Allocated, AllocCoherentError> {
    let made = domain.alloc_coherent(DRIVER, &CoherentSpec::of(pages * P));
    domain.check_invariants();
    made
}

fn free(domain: &Domain, made: Allocated) -> Removal {
    let removal = domain.free_coherent(DRIVER, made.iova(), made.id).unwrap();
    domain.check_invariants();
    removal
}

fn stream(domain: &Domain, buffer: &Buffer, pages: u64) -> Mapped {
    let spec = buffer.spec(0, pages * P, Direction::Bidirectional);
    map(domain, DRIVER, spec).unwrap()
}

fn end(domain: &Domain, mapped: Mapped) {
    unmap(domain, DRIVER, discarding(mapped)).unwrap();
    domain.check_invariants();
}

fn direct(domain: &Domain, spec: DirectSpec) -> IovaRange {
    let mapped = map_direct(domain, AS_DRIVER, spec).unwrap();
    domain.check_invariants();
    mapped.range
}

fn unmap_direct(domain: &Domain, ranges: &[IovaRange]) -> Removal {
    let (_, removal) = domain.unmap_direct(AS_DRIVER, ranges).unwrap();
    domain.check_invariants();
    removal
}

fn region_of(domain: &Domain, id: MemoryId) -> RegionId {
    domain.look().memories[&id].region
}

/// A session is given the file of what lies behind a region.
fn open(domain: &Domain, session: SessionId, buffer: &Buffer) {
    let region = region_of(domain, buffer.id);
    let (id, _) = domain.open_memory(session, region).unwrap();
    assert_eq!(id, buffer.id);
    domain.check_invariants();
}

fn waiting(sessions: &[SessionId]) -> Progress {
    Progress::Waiting(sessions.to_vec())
}

fn quarantined(sessions: &[SessionId]) -> Progress {
    Progress::Quarantined(sessions.to_vec())
}

fn views(domain: &Domain) -> Vec<MappingView> {
    domain.mappings(MappingFilter::default(), Iova::new(0), 999)
}

/// Ranges that are not live, with who is to blame.
fn limbo(domain: &Domain) -> Vec<(IovaRange, Phase, Option<SessionId>)> {
    let views = views(domain);
    let gone = views.iter().filter(|view| view.phase != Phase::Live);
    gone.map(|view| (view.visible, view.phase, view.blocked_by))
        .collect()
}

fn is_full<T: std::fmt::Debug>(answer: Result<T, AllocCoherentError>) -> bool {
    matches!(answer, Err(AllocCoherentError::Alloc(_)))
}

/// Nothing waits for anybody, and every granule is free.
fn assert_all_is_free(domain: &Domain) {
    domain.check_invariants();
    let usage = domain.usage();
    assert_eq!(limbo(domain), []);
    assert_eq!((usage.invalidating, usage.quarantined.mappings), (0, 0));
    assert_eq!(usage.quarantined.bytes, 0);
    assert_eq!(usage.bounce.used_bytes, 0);
    assert_eq!(usage.coherent_aperture.used_bytes, 0);
    assert_eq!(usage.bounce.largest_hole_bytes, 7 * P);
    assert_eq!(usage.coherent_aperture.largest_hole_bytes, 4 * P);
    assert_eq!(domain.awaits_iovas(), None);
}
