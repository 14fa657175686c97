//! Who is asked for an acknowledgment, and who has given it without.

use super::*;

#[test]
fn a_session_by_frames_is_asked_for_every_removal() {
    let domain = served();
    let fake = join_by_frames(&domain, FIRST);
    let made = [(); 2].map(|()| alloc(&domain, 1).unwrap());
    assert_eq!(fake.asked(), [], "nothing was removed");

    let removed = made.map(|made| free(&domain, made).generation);

    assert_eq!(fake.asked(), removed);
    let owed = domain.owed(FIRST).unwrap();
    assert_eq!(owed.generation, removed[1]);
    assert_eq!(owed.closed, []);
}

#[test]
fn pins_that_are_not_older_acknowledge_by_themselves() {
    let domain = served();
    let fake = join_by_pins(&domain, FIRST);
    let removal = free(&domain, alloc(&domain, 1).unwrap());
    assert_eq!(domain.progress(removal), Progress::Done);
    let made = alloc(&domain, 1).unwrap();
    // What the table becomes with the removal.
    fake.pin(generation(&domain) + 1);

    let removal = free(&domain, made);

    assert_eq!(domain.progress(removal), Progress::Done);
    assert_eq!(fake.asked(), []);
    assert_eq!(domain.owed(FIRST), None);
    assert_all_is_free(&domain);
}

#[test]
fn an_older_pin_must_be_acknowledged_by_a_frame() {
    let domain = served();
    let fake = join_by_pins(&domain, FIRST);
    let made = alloc(&domain, 1).unwrap();
    fake.pin(generation(&domain));

    let removal = free(&domain, made);

    assert_eq!(fake.asked(), [removal.generation]);
    assert_eq!(domain.progress(removal), waiting(&[FIRST]));
    // That the pin is gone nobody looks at.
    fake.unpin();
    assert_eq!(domain.progress(removal), waiting(&[FIRST]));
    ack(&domain, FIRST, removal.generation);
    assert_all_is_free(&domain);
}

/// A thread that dropped its pin may have handed on what it found.
#[test]
fn a_session_by_pins_that_owes_something_is_asked_again_for_what_comes_later() {
    let domain = served();
    let fake = join_by_pins(&domain, FIRST);
    let made = [(); 3].map(|()| alloc(&domain, 1).unwrap());
    fake.pin(generation(&domain));
    let first = free(&domain, made[0]);
    fake.unpin();

    let second = free(&domain, made[1]);

    assert_eq!(fake.asked(), [first.generation, second.generation]);
    ack(&domain, FIRST, first.generation);
    assert_eq!(domain.progress(first), Progress::Done);
    assert_eq!(domain.progress(second), waiting(&[FIRST]));
    ack(&domain, FIRST, second.generation);
    let third = free(&domain, made[2]);
    assert_eq!(fake.asked(), []);
    assert_eq!(domain.progress(third), Progress::Done);
}

fn driver_by_frames(domain: &Domain) -> (Arc<Fake>, [Allocated; 2]) {
    let fake = Fake::frames();
    domain.join(OTHER, reading(Role::Driver, 7, &fake)).unwrap();
    let alloc = || domain.alloc_coherent(OTHER, &CoherentSpec::of(P)).unwrap();
    (fake, [alloc(), alloc()])
}

#[test]
fn what_a_session_by_frames_removes_itself_it_has_acknowledged() {
    let domain = served();
    let (fake, made) = driver_by_frames(&domain);
    let witness = join_by_frames(&domain, FIRST);

    let removal = domain.free_coherent(OTHER, made[0].iova(), made[0].id);
    let removal = removal.unwrap();

    domain.check_invariants();
    assert_eq!(fake.asked(), []);
    assert_eq!(witness.asked(), [removal.generation]);
    assert_eq!(domain.progress(removal), waiting(&[FIRST]));
    ack(&domain, FIRST, removal.generation);
    assert_eq!(domain.progress(removal), Progress::Done);
}

#[test]
fn what_a_session_removes_itself_does_not_acknowledge_what_it_owes_for_others() {
    let domain = served();
    let (fake, made) = driver_by_frames(&domain);
    let foreign = free(&domain, alloc(&domain, 1).unwrap());

    let own = domain.free_coherent(OTHER, made[0].iova(), made[0].id);
    let own = own.unwrap();

    domain.check_invariants();
    assert_eq!(fake.asked(), [foreign.generation, own.generation]);
    assert_eq!(domain.progress(foreign), waiting(&[OTHER]));
    assert_eq!(domain.progress(own), waiting(&[OTHER]));
    ack(&domain, OTHER, foreign.generation);
    assert_eq!(domain.progress(own), waiting(&[OTHER]));
    ack(&domain, OTHER, own.generation);
    assert_eq!(domain.progress(own), Progress::Done);
}

#[test]
fn a_session_by_pins_is_looked_at_for_its_own_removals_too() {
    let domain = served();
    let fake = Fake::pins();
    domain.join(OTHER, reading(Role::Driver, 7, &fake)).unwrap();
    let made = domain.alloc_coherent(OTHER, &CoherentSpec::of(P)).unwrap();
    fake.pin(generation(&domain));

    let removal = domain.free_coherent(OTHER, made.iova(), made.id).unwrap();

    assert_eq!(domain.progress(removal), waiting(&[OTHER]));
}

#[test]
fn memory_that_was_opened_and_that_nothing_leads_to_any_more_is_closed_by_a_frame() {
    for by_frames in [false, true] {
        let domain = served();
        let fake = match by_frames {
            true => join_by_frames(&domain, FIRST),
            false => join_by_pins(&domain, FIRST),
        };
        let buffer = Buffer::register(&domain, DRIVER, 1);
        let region = region_of(&domain, buffer.id);
        let both = [64, 66].map(|page| direct(&domain, buffer.at(page * P, 1)));
        open(&domain, FIRST, &buffer);
        assert!(domain.has_opened(FIRST));

        let first = unmap_direct(&domain, &both[..1]);
        // Something still leads there.
        assert_eq!(fake.asked().is_empty(), !by_frames);
        ack(&domain, FIRST, first.generation);
        let second = unmap_direct(&domain, &both[1..]);

        assert_eq!(fake.asked(), [second.generation]);
        let owed = domain.owed(FIRST).unwrap();
        assert_eq!(owed.closed, [region]);
        assert_eq!(domain.progress(second), waiting(&[FIRST]));
        assert!(domain.has_opened(FIRST));
        ack(&domain, FIRST, second.generation - 1);
        assert!(domain.has_opened(FIRST), "that was before it was closed");
        ack(&domain, FIRST, second.generation);
        assert!(!domain.has_opened(FIRST));
        assert_eq!(domain.progress(second), Progress::Done);
    }
}

#[test]
fn a_session_must_close_what_it_has_opened_even_if_it_removes_it_itself() {
    let domain = served();
    let fake = Fake::frames();
    domain.join(OTHER, reading(Role::Driver, 7, &fake)).unwrap();
    let buffer = Buffer::register(&domain, OTHER, 1);
    map_direct(&domain, AS_OTHER, buffer.at(64 * P, 1)).unwrap();
    open(&domain, OTHER, &buffer);

    let (_, removal) = domain.unmap_direct(AS_OTHER, &[pages(64, 64)]).unwrap();

    assert_eq!(fake.asked(), [removal.generation]);
    assert_eq!(domain.progress(removal), waiting(&[OTHER]));
}

#[test]
fn memory_that_was_opened_by_nobody_is_closed_by_nobody() {
    let domain = served();
    let fake = join_by_pins(&domain, FIRST);
    let buffer = Buffer::register(&domain, DRIVER, 1);
    let place = direct(&domain, buffer.at(64 * P, 1));

    let removal = unmap_direct(&domain, &[place]);

    assert_eq!(fake.asked(), []);
    assert_eq!(domain.progress(removal), Progress::Done);
}

#[test]
fn memory_is_opened_only_by_who_is_there_and_while_something_leads_to_it() {
    let domain = served();
    join_by_frames(&domain, FIRST);
    let buffer = Buffer::register(&domain, DRIVER, 1);
    let region = region_of(&domain, buffer.id);
    let refused = |session, region| domain.open_memory(session, region).map(drop).is_err();
    assert!(refused(FIRST, region), "nothing leads there yet");
    let place = direct(&domain, buffer.at(64 * P, 1));
    assert!(refused(LATER, region));
    assert!(refused(FIRST, RegionId::BOUNCE));
    assert!(refused(FIRST, RegionId::memory_slot(77)));
    assert!(!domain.has_opened(FIRST));

    open(&domain, FIRST, &buffer);
    unmap_direct(&domain, &[place]);

    assert!(refused(FIRST, region), "nothing leads there any more");
    fence(&domain, FIRST);
    direct(&domain, buffer.at(96 * P, 1));
    assert!(refused(FIRST, region), "it has ended");
}

#[test]
fn nobody_is_asked_when_nothing_is_removed() {
    let domain = served();
    let fake = join_by_frames(&domain, FIRST);
    domain.join(LATER, Role::Driver).unwrap();
    let buffer = Buffer::register(&domain, DRIVER, 1);
    // Something new that nobody needs to acknowledge.
    let place = direct(&domain, buffer.at(64 * P, 1));
    let before = dump(&domain);

    let (_, cleared) = domain.clear_map(AS_DRIVER, &[pages(70, 80)]).unwrap();
    let mapped = stream(&domain, &buffer, 1);
    let wrong = ending(Mapped {
        iova: Iova::new(0),
        ..mapped
    });
    let missed = domain.unmap(DRIVER, &[wrong], BatchMode::Partial).unwrap();
    leave(&domain, LATER);

    assert!(missed[0].is_err());
    assert_eq!(fake.asked(), []);
    assert_eq!(domain.progress(cleared), Progress::Done);
    assert_ne!(dump(&domain), before);
    assert_eq!(direct_ranges(&domain), [place]);
}

/// Case 50.
#[test]
fn a_table_set_once_more_asks_nobody_and_waits_for_nobody() {
    let domain = served();
    let fake = join_by_frames(&domain, FIRST);
    let buffer = Buffer::register(&domain, DRIVER, 1);
    // It is not asked to acknowledge what was added.
    direct(&domain, buffer.at(64 * P, 1));

    let table = direct_table(&domain);
    let set = domain.set_map(AS_DRIVER, &table, None).unwrap();

    assert_eq!((set.added, set.removed), (0, 0));
    assert_eq!(fake.asked(), []);
    let generation = set.generation;
    assert_eq!(domain.progress(Removal { generation }), Progress::Done);
}

#[test]
fn what_was_acknowledged_is_not_asked_for_again() {
    let domain = served();
    let fake = join_by_frames(&domain, FIRST);
    let buffer = Buffer::register(&domain, DRIVER, 1);
    let place = direct(&domain, buffer.at(64 * P, 1));
    let removal = unmap_direct(&domain, &[place]);
    ack(&domain, FIRST, removal.generation);
    assert_eq!(fake.asked(), [removal.generation]);

    let given_back = domain.unregister(DRIVER, buffer.id).unwrap();

    assert_eq!(given_back, removal, "nothing visible has changed");
    assert_eq!(fake.asked(), []);
    assert_eq!(domain.progress(given_back), Progress::Done);
}
