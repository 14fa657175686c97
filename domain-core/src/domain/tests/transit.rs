//! What others see, and what may happen, while a request is copying.
//!
//! A request is stopped between its steps by calling the steps: no thread and
//! no luck is needed to meet it half way.

use std::sync::mpsc;
use std::time::Duration;

use super::steps::{copy, copy_back, draining, ended, filled, go_live, reserved, syncing};
use super::*;
use crate::coherent::CoherentSpec;
use crate::crew::Alone;
use crate::domain::InUse;
use crate::domain::transit::{Making, Reservation};
use crate::iotlb::{Iotlb, RegionWords};
use crate::mapping::{MappingFilter, Phase};
use crate::memory::UnregisterError;

const ALL: BatchMode = BatchMode::AllOrNothing;

fn phases(domain: &Domain) -> Vec<Phase> {
    let listed = domain.mappings(MappingFilter::default(), Iova::new(0), 9);
    listed.iter().map(|view| view.phase).collect()
}

fn assert_nothing_is_held(domain: &Domain) {
    domain.check_invariants();
    let usage = domain.usage();
    assert_eq!((usage.streaming, usage.coherent), (0, 0));
    assert_eq!(usage.bounce.used_bytes, 0);
    assert_eq!(usage.coherent_aperture.used_bytes, 0);
    assert_eq!(table(domain).1, []);
}

/// A domain, its driver's one page, and what it maps of it.
fn fixture() -> (Domain, Buffer, MapSpec) {
    let domain = domain(8, 8);
    let buffer = Buffer::register(&domain, DRIVER, 1);
    let spec = buffer.spec(0, 100, Direction::Bidirectional);
    (domain, buffer, spec)
}

#[test]
fn a_mapping_that_is_being_made_is_counted_but_absent() {
    let (domain, buffer, spec) = fixture();
    let mut made = reserved(&domain, spec);
    let mapped = made.first().mapped();

    assert_eq!(domain.lookup(visible(mapped)), None);
    assert!(unmap(&domain, DRIVER, discarding(mapped)).is_err());
    assert!(sync(&domain, DRIVER, part(mapped, 0, 1, SyncTarget::ForCpu)).is_err());
    assert_eq!(phases(&domain), [Phase::Reserved]);
    assert_eq!(domain.holdings(DRIVER).unwrap().streaming, 1);
    assert_eq!(
        domain.unregister(DRIVER, buffer.id),
        Err(UnregisterError::InUse {
            id: buffer.id,
            mappings: 1,
            direct: 0
        })
    );
    assert!(matches!(
        domain.close(Close::IfUnused),
        Err(InUse { streaming: 1, .. })
    ));
    domain.check_invariants();

    drop(made);
    assert_nothing_is_held(&domain);
}

#[test]
fn a_mapping_that_is_being_ended_is_counted_but_absent() {
    let (domain, buffer, spec) = fixture();
    let mapped = map(&domain, DRIVER, spec).unwrap();
    let ended = draining(&domain, ending(mapped));

    assert_eq!(domain.lookup(visible(mapped)), None);
    let twice = unmap(&domain, DRIVER, ending(mapped)).unwrap_err();
    assert!(
        matches!(
            twice,
            UnmapError::Missing(MappingMissing::NoSuchMapping { .. })
        ),
        "{twice}"
    );
    assert!(sync(&domain, DRIVER, part(mapped, 0, 1, SyncTarget::ForCpu)).is_err());
    assert_eq!(phases(&domain), [Phase::Draining]);
    assert!(domain.unregister(DRIVER, buffer.id).is_err());
    assert_ne!(map(&domain, DRIVER, spec).unwrap().iova, mapped.iova);
    domain.check_invariants();

    drop(ended);
    assert_eq!(phases(&domain), [Phase::Live, Phase::Live]);
    unmap(&domain, DRIVER, ending(mapped)).unwrap();
}

#[test]
fn a_mapping_that_is_being_synced_cannot_be_ended_and_says_so() {
    let (domain, _buffer, spec) = fixture();
    let mapped = map(&domain, DRIVER, spec).unwrap();
    let whole = part(mapped, 0, 100, SyncTarget::ForCpu);
    let (one, another) = (syncing(&domain, whole), syncing(&domain, whole));

    for (copying, syncs) in [(one, 2), (another, 1)] {
        let busy = unmap(&domain, DRIVER, ending(mapped)).unwrap_err();
        assert!(
            matches!(busy, UnmapError::Busy { syncs: s, .. } if s == syncs),
            "{busy}"
        );
        assert!(domain.lookup(visible(mapped)).is_some());
        drop(copying);
    }
    unmap(&domain, DRIVER, ending(mapped)).unwrap();
    assert_nothing_is_held(&domain);
}

#[test]
fn a_fill_that_fails_gives_everything_back_zeroed() {
    let (domain, buffer, spec) = fixture();
    let before = table(&domain);
    let mut made = Making::reserve(&domain, DRIVER, &[spec, spec], ALL, Vec::new()).unwrap();
    // As if the file ended where the buffer begins.
    let job = &mut made.nth(1).job;
    job.bounce.as_mut().unwrap().file_offset = P;
    let granules = job.granules;

    let refused = made.fill(ALL, &Alone).unwrap_err();
    drop(made);

    assert_eq!(refused.index, 1);
    assert!(
        matches!(
            refused.error,
            MapError::Copy {
                cause: CopyError::Short { got: 0, .. },
                ..
            }
        ),
        "{refused}"
    );
    assert_eq!(table(&domain), before);
    assert_eq!(seen(&domain, granules), vec![0; size(P)]);
    assert_nothing_is_held(&domain);
    assert_eq!(map(&domain, DRIVER, spec).unwrap().iova, Iova::new(P));
    assert_eq!(buffer.all(), pattern(P, 1));
}

#[test]
fn a_session_that_leaves_during_its_map_gets_nothing_and_leaves_nothing() {
    let (domain, _buffer, spec) = fixture();
    let mut made = filled(&domain, spec);
    let granules = made.first().job.granules;

    domain.leave(DRIVER);
    domain.check_invariants();
    // Bytes are still being copied there: nobody may be given them.
    let other = Buffer::register(&domain, OTHER, 1);
    let elsewhere = map(&domain, OTHER, other.spec(0, 1, Direction::ToDevice)).unwrap();
    assert!(!granules.overlaps(visible(elsewhere)));

    let refused = go_live(made).unwrap_err();
    assert!(
        matches!(
            refused,
            MapError::Denied(Denied::SessionEnded { session: DRIVER })
        ),
        "{refused}"
    );
    assert_eq!(seen(&domain, granules), vec![0; size(P)]);
    unmap(&domain, OTHER, ending(elsewhere)).unwrap();
    assert_nothing_is_held(&domain);
}

#[test]
fn a_session_that_leaves_during_its_allocation_leaves_nothing() {
    let (domain, _buffer, _) = fixture();
    let job = domain
        .lock()
        .reserve_coherent(DRIVER, &CoherentSpec::of(1))
        .unwrap();
    let made = Reservation::new(&domain, job);

    domain.leave(DRIVER);

    drop(made);
    assert_nothing_is_held(&domain);
}

#[test]
fn a_session_that_leaves_during_its_unmap_is_gone_whether_the_copy_succeeds_or_not() {
    for succeeds in [true, false] {
        let (domain, _buffer, spec) = fixture();
        let mapped = map(&domain, DRIVER, spec).unwrap();
        let mut ending = draining(&domain, ending(mapped));

        domain.leave(DRIVER);
        domain.check_invariants();
        assert_eq!(phases(&domain), [Phase::Draining]);
        assert_eq!(domain.usage().bounce.used_bytes, P);

        if succeeds {
            copy_back(&mut ending).unwrap();
            ended(&domain, ending);
        } else {
            drop(ending);
        }
        assert_nothing_is_held(&domain);
    }
}

#[test]
fn a_session_that_leaves_during_its_syncs_is_gone_with_the_last_of_them() {
    let (domain, _buffer, spec) = fixture();
    let mapped = map(&domain, DRIVER, spec).unwrap();
    let whole = part(mapped, 0, 100, SyncTarget::ForCpu);
    let (one, mut another) = (syncing(&domain, whole), syncing(&domain, whole));
    device_floods(&domain, ApertureKind::Bounce, INTRUSION);

    domain.leave(DRIVER);
    assert_eq!(domain.lookup(visible(mapped)), None);
    drop(one);
    domain.check_invariants();
    assert_eq!(domain.usage().bounce.used_bytes, P);

    copy(&mut another);
    drop(another);
    assert_nothing_is_held(&domain);
    assert_eq!(seen(&domain, visible(mapped)), vec![0; 100]);
}

#[test]
fn memory_of_a_session_that_left_stays_open_for_the_copy_and_no_longer() {
    let domain = domain(8, 0);
    let fd = driver_memfd("copy-keeps-open", P).unwrap();
    let memory = ClientMemory::accept(fd, true).unwrap();
    let id = domain.register(DRIVER, memory, false).unwrap();
    let spec = MapSpec::new(id, 0, 100, Direction::Bidirectional);
    let mapped = map(&domain, DRIVER, spec).unwrap();
    let mut copying = syncing(&domain, part(mapped, 0, 100, SyncTarget::ForCpu));

    domain.leave(DRIVER);
    assert_eq!(domain.usage().memories, 0);
    assert_eq!(open_fds("copy-keeps-open"), 1);
    copy(&mut copying);

    drop(copying);
    assert_eq!(open_fds("copy-keeps-open"), 0);
}

#[test]
fn a_forced_close_during_a_map_leaves_nothing_once_the_session_has_left() {
    let (domain, _buffer, spec) = fixture();
    let made = filled(&domain, spec);
    domain.close(Close::Force).unwrap();

    let _ = go_live(made);
    domain.check_invariants();
    domain.leave(DRIVER);

    assert_nothing_is_held(&domain);
}

/// Our own bug must be a panic of the request that meets it. A guard that is
/// dropped by that panic takes the lock: if the lock is still held then, the
/// thread waits for itself for ever.
#[test]
fn a_decision_that_panics_ends_its_request_and_does_not_hang() {
    for at_unmap in [false, true] {
        let (told, hears) = mpsc::channel();
        std::thread::spawn(move || {
            let (domain, _buffer, spec) = fixture();
            let mapped = [0, 1].map(|_| map(&domain, DRIVER, spec).unwrap());
            break_a_promise(&domain, mapped[1]);
            let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                if at_unmap {
                    let ends = mapped.map(discarding);
                    domain.unmap(DRIVER, &ends, ALL).is_ok()
                } else {
                    domain.map(DRIVER, &[spec; 3], ALL).is_ok()
                }
            }));
            told.send(outcome.is_err()).unwrap();
        });
        let panicked = hears
            .recv_timeout(Duration::from_secs(5))
            .expect("the request comes to an end");
        assert!(panicked);
    }
}

/// Hides a live mapping behind the domain's back, and shows something where
/// the second of the next mappings will be.
fn break_a_promise(domain: &Domain, live: Mapped) {
    let mut state = domain.lock();
    let iotlb: &mut Iotlb<RegionWords> = &mut state.iotlb;
    let entry = iotlb.remove(live.iova).unwrap();
    let next_but_one = live.iova.get() + 2 * P;
    let range = IovaRange::from_len(Iova::new(next_but_one), 1).unwrap();
    let perm = Perm::Read;
    iotlb
        .insert(Entry {
            range,
            perm,
            ..entry
        })
        .unwrap();
}

#[test]
fn what_a_session_leaves_behind_during_its_unmap_is_zeroed() {
    let (domain, _buffer, spec) = fixture();
    let mapped = map(&domain, DRIVER, spec).unwrap();
    let unmapping = draining(&domain, discarding(mapped));
    device_writes(&domain, mapped.iova, &[0xa5; 100]);

    domain.leave(DRIVER);
    ended(&domain, unmapping);

    assert_eq!(seen(&domain, visible(mapped)), [0; 100]);
    assert_nothing_is_held(&domain);
}

#[test]
fn a_domain_that_failed_can_still_be_seen_and_closed() {
    let (domain, _buffer, spec) = fixture();
    map(&domain, DRIVER, spec).unwrap();
    std::thread::scope(|scope| {
        let failing = scope.spawn(|| {
            let _state = domain.lock();
            panic!("half way through a decision");
        });
        assert!(failing.join().is_err());
    });

    assert_eq!(domain.usage().streaming, 1);
    assert_eq!(domain.holdings(DRIVER).unwrap().streaming, 1);
    assert!(domain.close(Close::IfUnused).is_err());
    assert!(domain.close(Close::Force).unwrap().contains(&DRIVER));
    // It gives nothing back, and does not panic.
    domain.leave(DRIVER);
}
