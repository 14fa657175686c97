//! What happens to readers between the steps of a request that copies.

use std::sync::atomic::{AtomicBool, Ordering};

use super::*;
use crate::domain::tests::steps;
use crate::domain::tests::steps::reserved;
use crate::domain::transit::Draining;

/// An unmap that is hidden and has copied nothing yet.
fn draining(domain: &Domain, mapped: Mapped) -> Draining<'_> {
    steps::draining(domain, ending(mapped))
}

/// The last step of such an unmap.
fn ended(domain: &Domain, draining: Draining<'_>) {
    steps::ended(domain, draining);
    domain.check_invariants();
}

/// It was seen before it was hidden, and that does not end by its coming back.
#[test]
fn an_unmap_that_fails_does_not_make_the_mapping_younger_than_a_fence() {
    let domain = served();
    join_by_frames(&domain, FIRST);
    let buffer = Buffer::register(&domain, DRIVER, 1);
    let mapped = stream(&domain, &buffer, 1);
    let failing = draining(&domain, mapped);
    fence(&domain, FIRST);
    drop(failing);
    domain.check_invariants();

    end(&domain, mapped);

    let held = (visible(mapped), Phase::Quarantined, Some(FIRST));
    assert_eq!(limbo(&domain), [held]);
}

/// It let go of what it removed itself, not of what another request has hidden
/// meanwhile and not asked anybody for yet.
#[test]
fn an_own_removal_does_not_acknowledge_what_is_hidden_and_still_being_copied() {
    let domain = served();
    let fake = Fake::frames();
    domain.join(OTHER, reading(Role::Driver, 7, &fake)).unwrap();
    let own = domain.alloc_coherent(OTHER, &CoherentSpec::of(P)).unwrap();
    let buffer = Buffer::register(&domain, DRIVER, 1);
    let mapped = stream(&domain, &buffer, 1);

    let copying = draining(&domain, mapped);
    let removal = domain.free_coherent(OTHER, own.iova(), own.id).unwrap();
    ended(&domain, copying);

    let waits = limbo(&domain).into_iter().map(|(range, ..)| range);
    assert!(waits.collect::<Vec<_>>().contains(&visible(mapped)));
    assert_eq!(domain.progress(removal), waiting(&[OTHER]));
    ack_all(&domain, OTHER);
    assert_all_is_free(&domain);
    // Nothing is left behind by what was put back, either.
    let mapped = stream(&domain, &buffer, 1);
    drop(draining(&domain, mapped));
    end(&domain, mapped);
    ack_all(&domain, OTHER);
    fake.asked();
    let own = domain.alloc_coherent(OTHER, &CoherentSpec::of(P)).unwrap();
    let removal = domain.free_coherent(OTHER, own.iova(), own.id).unwrap();
    assert_eq!(fake.asked(), []);
    assert_eq!(domain.progress(removal), Progress::Done);
}

#[test]
fn who_joins_while_a_mapping_is_being_ended_never_saw_it() {
    let domain = served();
    let buffer = Buffer::register(&domain, DRIVER, 1);
    let mapped = stream(&domain, &buffer, 1);
    let copying = draining(&domain, mapped);
    join_by_frames(&domain, FIRST);

    ended(&domain, copying);

    assert_all_is_free(&domain);
}

#[test]
fn what_nobody_has_ever_seen_waits_for_nobody() {
    let domain = served();
    join_by_frames(&domain, FIRST);
    join_by_frames(&domain, SECOND);
    let buffer = Buffer::register(&domain, DRIVER, 1);
    let made = reserved(&domain, buffer.spec(0, 1, Direction::ToDevice));
    fence(&domain, SECOND);

    drop(made);

    assert_all_is_free(&domain);
}

#[test]
fn a_mapping_that_goes_live_after_a_fence_is_out_of_the_ghosts_reach() {
    let domain = served();
    join_by_frames(&domain, FIRST);
    let buffer = Buffer::register(&domain, DRIVER, 1);
    let made = reserved(&domain, buffer.spec(0, 1, Direction::ToDevice));
    fence(&domain, FIRST);
    let mapped = steps::go_live(made).unwrap();

    end(&domain, mapped);

    assert_all_is_free(&domain);
}

/// D15.
#[test]
fn what_a_fenced_driver_was_copying_back_waits_when_the_copy_is_over() {
    let domain = served();
    domain
        .join(OTHER, reading(Role::Driver, 7, &Fake::frames()))
        .unwrap();
    let buffer = Buffer::register(&domain, OTHER, 1);
    let spec = buffer.spec(0, P, Direction::Bidirectional);
    let mapped = map(&domain, OTHER, spec).unwrap();
    let copying = steps::draining_by(&domain, OTHER, ending(mapped));
    fence(&domain, OTHER);

    drop(copying);

    domain.check_invariants();
    let held = (visible(mapped), Phase::Quarantined, Some(OTHER));
    assert_eq!(limbo(&domain), [held]);
    leave(&domain, OTHER);
    assert_eq!(seen(&domain, visible(mapped)), [0; PAGE]);
    assert_all_is_free(&domain);
}

/// Others change the domain while it ends one mapping after the other; the young
/// ones, which are zeroed, give them time to.
#[test]
fn what_a_reset_ends_is_one_removal_however_much_it_is() {
    // Whether the other one gets its turn in between is chance.
    for _ in 0..6 {
        reset_beside_another_driver();
    }
}

fn reset_beside_another_driver() {
    const YOUNG: u64 = 300;
    let domain = empty_domain(8 * YOUNG + 2, 2, Scrub::OnMap);
    for driver in [DRIVER, OTHER] {
        domain.join(driver, Role::Driver).unwrap();
    }
    let buffer = Buffer::register(&domain, DRIVER, 8 * YOUNG);
    // Above all others.
    let below = stream(&domain, &buffer, 8 * YOUNG);
    let old = stream(&domain, &buffer, 1);
    end(&domain, below);
    join_by_frames(&domain, FIRST);
    fence(&domain, FIRST);
    for _ in 0..YOUNG {
        let spec = buffer.spec(0, 8 * P, Direction::ToDevice);
        map(&domain, DRIVER, spec).unwrap();
    }

    let is_over = AtomicBool::new(false);
    let reset = std::thread::scope(|scope| {
        scope.spawn(|| {
            while !is_over.load(Ordering::Relaxed) {
                let made = domain.alloc_coherent(OTHER, &CoherentSpec::of(P)).unwrap();
                domain.free_coherent(OTHER, made.iova(), made.id).unwrap();
            }
        });
        let before = generation(&domain);
        while generation(&domain) == before {
            std::thread::yield_now();
        }
        let reset = domain.reset_bounce(AS_DRIVER, true);
        is_over.store(true, Ordering::Relaxed);
        reset
    });
    let reset = reset.unwrap();
    let removal = reset.removal;
    assert_eq!(reset.ended_mappings as u64, YOUNG + 1);

    assert_eq!(domain.progress(removal), quarantined(&[FIRST]));
    let held = (visible(old), Phase::Quarantined, Some(FIRST));
    assert_eq!(limbo(&domain), [held]);
    ack(&domain, FIRST, removal.generation);
    assert_eq!(limbo(&domain), []);
    assert_eq!(domain.progress(removal), Progress::Done);
}
