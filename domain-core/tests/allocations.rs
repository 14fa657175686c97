//! A batch that is no larger than one before it allocates nothing.
//!
//! In a program of its own: the counter counts what all threads do.

use std::alloc::System;

use domain_core::aperture::ScrubWith;
use domain_core::batch::BatchMode;
use domain_core::crew::Alone;
use domain_core::domain::{Desk, Domain, Settings};
use domain_core::layout::LayoutSpec;
use domain_core::region::{ClientMemory, driver_memfd};
use domain_core::session::{Role, SessionId};
use domain_core::streaming::{MapSpec, SyncSpec, SyncTarget, UnmapSpec};
use domain_core::{Direction, Iova};
use stats_alloc::{INSTRUMENTED_SYSTEM, Region, StatsAlloc};

#[global_allocator]
static ALLOCATOR: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

const DRIVER: SessionId = SessionId::new(1);
const MODE: BatchMode = BatchMode::AllOrNothing;

/// What somebody keeps who makes many batches.
struct Batches {
    domain: Domain,
    desk: Desk,
    specs: Vec<MapSpec>,
    syncs: Vec<SyncSpec>,
    ends: Vec<UnmapSpec>,
}

impl Batches {
    fn new(entries: usize) -> Batches {
        let layout = LayoutSpec::default().plan().unwrap();
        let settings = Settings::default();
        let domain = Domain::create("allocations", layout, settings, ScrubWith::Zero).unwrap();
        domain.join(DRIVER, Role::Driver).unwrap();
        let memfd = driver_memfd("allocations", 1 << 20).unwrap();
        let memory = ClientMemory::accept(memfd, true).unwrap();
        let memory = domain.register(DRIVER, memory, false).unwrap();
        let spec = |entry: u64| {
            let offset = entry * 512;
            let direction = [Direction::ToDevice, Direction::Bidirectional];
            let direction = direction[usize::from(entry % 2 == 1)];
            MapSpec {
                skip_sync: entry.is_multiple_of(3),
                ..MapSpec::new(memory, offset, 1 + entry * 7, direction)
            }
        };
        Batches {
            domain,
            desk: Desk::default(),
            specs: (0..entries as u64).map(spec).collect(),
            syncs: Vec::with_capacity(entries),
            ends: Vec::with_capacity(entries),
        }
    }

    /// Maps all, syncs what can be, unmaps all.
    fn cycle(&mut self) {
        let Batches {
            domain,
            desk,
            specs,
            syncs,
            ends,
        } = self;
        let mapped = domain.map_at(desk, DRIVER, specs, MODE, &Alone).unwrap();
        ends.clear();
        syncs.clear();
        for (mapped, spec) in mapped.zip(specs) {
            let mapped = mapped.unwrap();
            assert_ne!(mapped.iova, Iova::new(0));
            let (iova, id) = (mapped.iova, mapped.id);
            ends.push(UnmapSpec {
                iova,
                id,
                written_bytes: None,
                skip_sync: false,
            });
            syncs.push(SyncSpec {
                iova,
                id,
                offset: 0,
                len_bytes: spec.len_bytes,
                target: SyncTarget::ForDevice,
            });
        }
        assert!(
            domain
                .sync_at(desk, DRIVER, syncs, MODE)
                .unwrap()
                .all(|one| one.is_ok())
        );
        assert!(
            domain
                .unmap_at(desk, DRIVER, ends, MODE, &Alone)
                .unwrap()
                .all(|one| one.is_ok())
        );
    }
}

#[test]
fn batches_that_come_and_go_allocate_nothing() {
    for entries in [1, 64, 1024] {
        let mut batches = Batches::new(entries);
        // What was unmapped is not the next to be mapped: until every place was used once.
        (0..200).for_each(|_| batches.cycle());

        let counted = Region::new(ALLOCATOR);
        (0..100).for_each(|_| batches.cycle());
        let change = counted.change();

        let count = change.allocations + change.reallocations;
        assert_eq!(count, 0, "{entries} entries: {change:?}");
        batches.domain.check_invariants();
    }
}
