//! Places of direct mappings that are gone.

use super::*;
use crate::domain::Quarantined;
use crate::space::RestrictionError;

/// `range` is refused because `hit` waits.
fn assert_waits(domain: &Domain, spec: DirectSpec, hit: IovaRange, blocked_by: Option<SessionId>) {
    let Placement::At(start) = spec.placement else {
        panic!("{spec:?} names no place");
    };
    let range = IovaRange::from_len(start, spec.len_bytes).unwrap();
    let before = dump(domain);
    let refused = MapDirectError::Invalidating {
        range,
        hit,
        blocked_by,
    };
    assert_eq!(map_direct(domain, AS_DRIVER, spec), Err(refused));
    assert_eq!(dump(domain), before);
}

/// Case 63.
#[test]
fn a_place_is_used_again_only_after_every_acknowledgment() {
    let domain = served();
    join_by_frames(&domain, FIRST);
    join_by_frames(&domain, SECOND);
    let buffer = Buffer::register(&domain, DRIVER, 4);
    let place = direct(&domain, buffer.at(64 * P, 2));

    let removal = unmap_direct(&domain, &[place]);

    assert_eq!(domain.lookup(place), None);
    assert_eq!(domain.progress(removal), waiting(&[FIRST, SECOND]));
    for (page, count) in [(64, 1), (65, 1), (64, 2), (63, 2), (65, 2), (63, 4)] {
        assert_waits(&domain, buffer.at(page * P, count), place, None);
    }
    // Its neighbours are free.
    direct(&domain, buffer.at(63 * P, 1));
    direct(&domain, buffer.at(66 * P, 1));
    ack(&domain, FIRST, removal.generation);
    assert_waits(&domain, buffer.at(64 * P, 1), place, None);
    ack(&domain, SECOND, removal.generation);
    assert_eq!(domain.progress(removal), Progress::Done);
    assert_eq!(direct(&domain, buffer.at(64 * P, 2)), place);
}

#[test]
fn automatic_placement_goes_elsewhere_and_comes_back() {
    let domain = served();
    join_by_frames(&domain, FIRST);
    let buffer = Buffer::register(&domain, DRIVER, 1);
    let [one, two] = [(); 2].map(|()| direct(&domain, buffer.anywhere(1)));

    unmap_direct(&domain, &[one]);
    let third = direct(&domain, buffer.anywhere(1));

    assert!(third > two, "{third:?}");
    assert_eq!(limbo(&domain), [(one, Phase::Invalidating, None)]);
    ack_all(&domain, FIRST);
    assert_eq!(direct(&domain, buffer.anywhere(1)), one);
}

/// Case 64.
#[test]
fn a_place_in_quarantine_is_refused_and_names_who_holds_it_back() {
    let domain = served();
    join_by_frames(&domain, FIRST);
    let buffer = Buffer::register(&domain, DRIVER, 1);
    let place = direct(&domain, buffer.anywhere(1));
    open(&domain, FIRST, &buffer);
    let removal = unmap_direct(&domain, &[place]);

    fence(&domain, FIRST);

    assert_eq!(domain.progress(removal), quarantined(&[FIRST]));
    let at = buffer.at(place.start().get(), 1);
    assert_waits(&domain, at, place, Some(FIRST));
    assert!(direct(&domain, buffer.anywhere(1)) > place);
    ack(&domain, FIRST, removal.generation);
    assert_eq!(domain.progress(removal), Progress::Done);
    assert_eq!(direct(&domain, at), place);
}

#[test]
fn only_ghosts_that_have_opened_the_memory_hold_its_places_back() {
    let domain = served();
    join_by_frames(&domain, FIRST);
    join_by_frames(&domain, SECOND);
    let [secret, known] = [(); 2].map(|()| Buffer::register(&domain, DRIVER, 1));
    let places = [(64, &secret), (66, &known)];
    let places = places.map(|(page, buffer)| direct(&domain, buffer.at(page * P, 1)));
    open(&domain, SECOND, &known);
    fence(&domain, FIRST);
    fence(&domain, SECOND);

    let both = unmap_direct(&domain, &places);

    assert_eq!(domain.progress(both), quarantined(&[SECOND]));
    let held = (places[1], Phase::Quarantined, Some(SECOND));
    assert_eq!(limbo(&domain), [held]);
    direct(&domain, secret.at(64 * P, 1));
}

#[test]
fn memory_that_a_session_has_closed_its_ghost_does_not_hold_back() {
    let domain = served();
    join_by_frames(&domain, FIRST);
    let buffer = Buffer::register(&domain, DRIVER, 1);
    let place = direct(&domain, buffer.at(64 * P, 1));
    open(&domain, FIRST, &buffer);
    let closed = unmap_direct(&domain, &[place]);
    ack(&domain, FIRST, closed.generation);
    direct(&domain, buffer.at(64 * P, 1));
    fence(&domain, FIRST);

    let again = unmap_direct(&domain, &[place]);

    assert_eq!(domain.progress(again), Progress::Done);
}

#[test]
fn memory_that_was_opened_once_more_is_held_back() {
    let domain = served();
    join_by_frames(&domain, FIRST);
    let buffer = Buffer::register(&domain, DRIVER, 1);
    let place = direct(&domain, buffer.at(64 * P, 1));
    open(&domain, FIRST, &buffer);
    let closed = unmap_direct(&domain, &[place]);
    let other = direct(&domain, buffer.at(66 * P, 1));
    open(&domain, FIRST, &buffer);
    ack(&domain, FIRST, closed.generation);
    assert!(domain.has_opened(FIRST));
    fence(&domain, FIRST);

    let again = unmap_direct(&domain, &[other]);

    assert_eq!(domain.progress(again), quarantined(&[FIRST]));
}

/// The acknowledgment that it was first closed for says that the file is closed;
/// that it was closed once more meanwhile, without being opened again, does not
/// open it.
#[test]
fn memory_that_is_closed_twice_is_closed_by_the_first_acknowledgment() {
    let domain = served();
    let fake = join_by_frames(&domain, FIRST);
    let buffer = Buffer::register(&domain, DRIVER, 1);
    let place = direct(&domain, buffer.at(64 * P, 1));
    open(&domain, FIRST, &buffer);
    let first = unmap_direct(&domain, &[place]);
    let other = direct(&domain, buffer.at(66 * P, 1));
    let second = unmap_direct(&domain, &[other]);
    assert_eq!(fake.asked(), [first.generation, second.generation]);
    let owed = domain.owed(FIRST).unwrap();
    assert_eq!(owed.closed, [region_of(&domain, buffer.id)]);

    ack(&domain, FIRST, first.generation);

    assert!(!domain.has_opened(FIRST));
    let owed = domain.owed(FIRST).unwrap();
    assert_eq!((owed.generation, owed.closed), (second.generation, vec![]));
    // So its end leaves nothing of that memory behind.
    fence(&domain, FIRST);
    assert_eq!(domain.progress(second), Progress::Done);
}

/// It has the file, but it does not know of a mapping that was made later, and
/// it knows no other: nothing led to the memory in between.
#[test]
fn memory_that_was_closed_after_the_fence_is_held_back_no_more_when_it_is_mapped_again() {
    let domain = served();
    join_by_frames(&domain, FIRST);
    let buffer = Buffer::register(&domain, DRIVER, 1);
    let place = direct(&domain, buffer.at(64 * P, 1));
    open(&domain, FIRST, &buffer);
    fence(&domain, FIRST);
    let removal = unmap_direct(&domain, &[place]);
    assert_eq!(domain.progress(removal), quarantined(&[FIRST]));

    let other = direct(&domain, buffer.at(66 * P, 1));
    let again = unmap_direct(&domain, &[other]);

    assert_eq!(domain.progress(again), Progress::Done);
    assert_eq!(domain.progress(removal), quarantined(&[FIRST]));
    assert_eq!(domain.usage().quarantined.mappings, 1);
}

/// It walked the table again before it heard that it has to close the file.
#[test]
fn memory_that_was_closed_and_mapped_again_before_the_fence_is_held_back() {
    let domain = served();
    join_by_frames(&domain, FIRST);
    let buffer = Buffer::register(&domain, DRIVER, 1);
    let place = direct(&domain, buffer.at(64 * P, 1));
    open(&domain, FIRST, &buffer);
    unmap_direct(&domain, &[place]);
    let other = direct(&domain, buffer.at(66 * P, 1));
    fence(&domain, FIRST);

    let removal = unmap_direct(&domain, &[other]);

    assert_eq!(domain.progress(removal), quarantined(&[FIRST]));
    assert_eq!(domain.usage().quarantined.mappings, 2);
}

#[test]
fn neighbours_that_continue_one_another_wait_as_one_place() {
    let domain = served();
    join_by_frames(&domain, FIRST);
    let buffer = Buffer::register(&domain, DRIVER, 4);
    let part = |page: u64, offset: u64| DirectSpec {
        offset: offset * P,
        ..buffer.at(page * P, 1)
    };
    // The second goes on where the first ends; the third does not.
    let parts = [part(64, 0), part(65, 1), part(66, 0)];
    let places = parts.map(|part| direct(&domain, part));

    let removal = unmap_direct(&domain, &places);

    let whole = pages(64, 65);
    let waits = [whole, places[2]].map(|place| (place, Phase::Invalidating, None));
    assert_eq!(limbo(&domain), waits);
    assert_eq!(domain.usage().invalidating, 2);
    assert_waits(&domain, buffer.at(65 * P, 1), whole, None);
    ack(&domain, FIRST, removal.generation);
    assert_eq!(limbo(&domain), []);
    direct(&domain, buffer.at(64 * P, 3));
}

#[test]
fn clear_map_waits_as_unmap_does() {
    let domain = served();
    join_by_frames(&domain, FIRST);
    let buffer = Buffer::register(&domain, DRIVER, 2);
    let place = direct(&domain, buffer.at(64 * P, 2));

    let (_, removal) = domain.clear_map(AS_DRIVER, &[pages(65, 65)]).unwrap();

    domain.check_invariants();
    assert_eq!(domain.progress(removal), waiting(&[FIRST]));
    assert_waits(&domain, buffer.at(65 * P, 1), place, None);
    ack(&domain, FIRST, removal.generation);
    assert_eq!(direct(&domain, buffer.at(64 * P, 2)), place);
}

#[test]
fn the_places_of_a_session_that_ends_wait() {
    for fenced in [false, true] {
        let domain = served();
        domain.join(OTHER, Role::Driver).unwrap();
        join_by_frames(&domain, FIRST);
        let buffer = Buffer::register(&domain, OTHER, 1);
        let mine = Buffer::register(&domain, DRIVER, 1);
        map_direct(&domain, AS_OTHER, buffer.at(64 * P, 1)).unwrap();
        match fenced {
            true => fence(&domain, OTHER),
            false => leave(&domain, OTHER),
        }

        assert_waits(&domain, mine.at(64 * P, 1), pages(64, 64), None);
        assert_eq!(views(&domain)[0].owner, Some(OTHER));
        ack_all(&domain, FIRST);
        direct(&domain, mine.at(64 * P, 1));
    }
}

#[test]
fn a_place_that_waits_cannot_be_reserved() {
    let domain = served();
    join_by_frames(&domain, FIRST);
    let buffer = Buffer::register(&domain, DRIVER, 1);
    let place = direct(&domain, buffer.at(64 * P, 1));
    unmap_direct(&domain, &[place]);

    let hit = place;
    let refused = RestrictionError::InUse { range: hit, hit };
    let answer = restrict(&domain, vec![place], vec![]);
    assert_eq!(answer, Err(UpdateError::Restriction(refused)));
    // Other restrictions do not make it free.
    restrict(&domain, vec![pages(70, 71)], vec![pages(64, 65)]).unwrap();
    domain.check_invariants();
    assert_eq!(direct(&domain, buffer.anywhere(1)), pages(65, 65));
    ack_all(&domain, FIRST);
    restrict(&domain, vec![place], vec![]).unwrap();
    domain.check_invariants();
}

/// So many that free runs are made anew rather than one by one.
#[test]
fn many_places_wait_and_are_free_again() {
    let domain = served();
    join_by_frames(&domain, FIRST);
    let buffer = Buffer::register(&domain, DRIVER, 1);
    let specs: Vec<_> = (0..600).map(|at| buffer.at((64 + 2 * at) * P, 1)).collect();
    let all = domain.map_direct(AS_DRIVER, &specs, BatchMode::AllOrNothing);
    all.unwrap();
    open(&domain, FIRST, &buffer);

    let removal = unmap_direct(&domain, &[pages(64, 64 + 1200)]);

    assert_eq!(domain.usage().invalidating, 600);
    assert_eq!(limbo(&domain).len(), 600);
    fence(&domain, FIRST);
    let held = Quarantined {
        mappings: 600,
        bytes: 0,
    };
    assert_eq!(domain.usage().quarantined, held);
    assert_eq!(domain.progress(removal), quarantined(&[FIRST]));
    ack(&domain, FIRST, removal.generation);
    assert_eq!(domain.usage().quarantined, Quarantined::default());
    let all = domain.map_direct(AS_DRIVER, &specs, BatchMode::AllOrNothing);
    assert_eq!(all.unwrap().len(), 600);
    domain.check_invariants();
}
