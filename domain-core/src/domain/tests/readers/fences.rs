//! Sessions that have ended and may still reach something.

use super::*;
use crate::session::JoinError;

#[test]
fn a_fence_releases_all_that_the_session_held() {
    let domain = served();
    let fake = Fake::frames();
    domain.join(OTHER, reading(Role::Driver, 7, &fake)).unwrap();
    join_by_frames(&domain, FIRST);
    let buffer = Buffer::register(&domain, OTHER, 2);
    let spec = buffer.spec(0, P, Direction::Bidirectional);
    let mapped = map(&domain, OTHER, spec).unwrap();
    let made = domain.alloc_coherent(OTHER, &CoherentSpec::of(P)).unwrap();
    map_direct(&domain, AS_OTHER, buffer.at(64 * P, 2)).unwrap();
    device_writes(&domain, mapped.iova, &[INTRUSION; PAGE]);
    let last = generation(&domain);

    fence(&domain, OTHER);

    assert_eq!(fake.fenced(), [last]);
    assert_eq!(buffer.all(), pattern(2 * P, 1), "nothing flows back");
    let usage = domain.usage();
    assert_eq!((usage.sessions, usage.fenced), (2, 1));
    assert_eq!((usage.streaming, usage.coherent), (0, 0));
    assert_eq!((usage.memories, usage.direct), (0, 0));
    assert_eq!(domain.holdings(OTHER), None);
    assert!(domain.is_fenced(OTHER) && domain.is_known(OTHER));
    let gone = [visible(mapped), made.range, pages(64, 65)];
    assert_eq!(gone.map(|range| domain.lookup(range)), [None, None, None]);
    // The other one may use it all the same.
    let phases = gone.map(|range| (range, Phase::Invalidating, None));
    assert_eq!(limbo(&domain), phases);
    ack_all(&domain, FIRST);
    // Its own memory it never opened.
    let held = |range| (range, Phase::Quarantined, Some(OTHER));
    assert_eq!(limbo(&domain), [held(gone[0]), held(gone[1])]);
    leave(&domain, OTHER);
    assert!(!domain.is_fenced(OTHER) && !domain.is_known(OTHER));
    assert_all_is_free(&domain);
}

#[test]
fn a_fence_stops_nobody_who_never_translates() {
    let domain = served();
    domain.join(OTHER, Role::Driver).unwrap();
    domain.alloc_coherent(OTHER, &CoherentSpec::of(P)).unwrap();

    fence(&domain, OTHER);

    assert_eq!(domain.usage().fenced, 0);
    assert!(!domain.is_known(OTHER));
    assert_all_is_free(&domain);
}

#[test]
fn a_fence_twice_or_of_a_stranger_does_nothing() {
    let domain = served();
    let fake = join_by_frames(&domain, FIRST);
    let made = [(); 2].map(|()| alloc(&domain, 1).unwrap());
    let removal = free(&domain, made[0]);
    fence(&domain, FIRST);
    alloc(&domain, 1).unwrap();
    let dumped = dump(&domain);

    fence(&domain, FIRST);
    fence(&domain, LATER);

    assert_eq!(dump(&domain), dumped);
    assert_eq!(fake.fenced().len(), 1);
    assert_eq!(domain.progress(removal), quarantined(&[FIRST]));
}

#[test]
fn what_a_session_could_reach_is_in_quarantine_after_its_fence() {
    let domain = served();
    join_by_frames(&domain, FIRST);
    let made = alloc(&domain, 4).unwrap();
    let removal = free(&domain, made);
    assert_eq!(domain.progress(removal), waiting(&[FIRST]));

    fence(&domain, FIRST);

    assert_eq!(domain.progress(removal), quarantined(&[FIRST]));
    assert!(is_full(alloc(&domain, 1)));
    assert_eq!(domain.awaits_iovas(), None, "no acknowledgment helps");
    let usage = domain.usage();
    assert_eq!((usage.fenced, usage.invalidating), (1, 0));
    let held = usage.quarantined;
    assert_eq!((held.mappings, held.bytes), (1, 4 * P));
    assert_eq!(
        limbo(&domain),
        [(made.range, Phase::Quarantined, Some(FIRST))]
    );
}

#[test]
fn what_is_removed_after_the_fence_is_held_back_if_it_was_made_before() {
    let domain = served();
    join_by_frames(&domain, FIRST);
    let made = alloc(&domain, 1).unwrap();
    // Made last before the fence: in the generation in which it happens.
    let newest = alloc(&domain, 1).unwrap();
    fence(&domain, FIRST);
    let later = alloc(&domain, 1).unwrap();

    let removed = [made, newest, later].map(|made| free(&domain, made));

    let held = quarantined(&[FIRST]);
    let progress = removed.map(|removal| domain.progress(removal));
    assert_eq!(progress, [held.clone(), held, Progress::Done]);
    let usage = domain.usage();
    assert_eq!(usage.quarantined.mappings, 2);
    assert_eq!(usage.coherent_aperture.used_bytes, 2 * P);
}

#[test]
fn what_a_session_had_acknowledged_its_ghost_does_not_hold_back() {
    let domain = served();
    join_by_frames(&domain, FIRST);
    join_by_frames(&domain, SECOND);
    let made = [(); 2].map(|()| alloc(&domain, 1).unwrap());
    let removed = made.map(|made| free(&domain, made));
    ack(&domain, FIRST, removed[0].generation);

    fence(&domain, FIRST);

    assert_eq!(domain.progress(removed[0]), waiting(&[SECOND]));
    ack(&domain, SECOND, removed[1].generation);
    assert_eq!(domain.progress(removed[0]), Progress::Done);
    assert_eq!(domain.progress(removed[1]), quarantined(&[FIRST]));
}

#[test]
fn a_late_acknowledgment_frees_exactly_what_was_removed_up_to_it() {
    let domain = served();
    join_by_frames(&domain, FIRST);
    let made = [(); 3].map(|()| alloc(&domain, 1).unwrap());
    let first = free(&domain, made[0]);
    fence(&domain, FIRST);
    let [second, third] = [made[1], made[2]].map(|made| free(&domain, made));
    let held = |from: usize| {
        let held = made[from..].iter();
        let held = held.map(|made| (made.range, Phase::Quarantined, Some(FIRST)));
        held.collect::<Vec<_>>()
    };
    device_floods(&domain, ApertureKind::Coherent, DIRT);

    ack(&domain, FIRST, first.generation - 1);
    assert_eq!(limbo(&domain), held(0));
    ack(&domain, FIRST, second.generation);
    assert_eq!(limbo(&domain), held(2));
    assert_eq!(domain.progress(third), quarantined(&[FIRST]));
    assert_eq!(domain.usage().quarantined.bytes, P);
    let bytes = |at: usize| seen(&domain, made[at].range);
    assert_eq!(bytes(0), [0; PAGE], "zeroed before it is free");
    assert_eq!(bytes(2), [DIRT; PAGE], "and not before");
    // Older once more.
    ack(&domain, FIRST, first.generation);
    assert_eq!(limbo(&domain), held(2));

    ack(&domain, FIRST, third.generation);
    assert_eq!(bytes(2), [0; PAGE]);
    assert_all_is_free(&domain);
    assert!(domain.is_fenced(FIRST), "it may still leave");
    leave(&domain, FIRST);
    assert_eq!(domain.usage().fenced, 0);
}

#[test]
fn a_ghost_that_leaves_frees_everything_zeroed() {
    let domain = served();
    join_by_frames(&domain, FIRST);
    let buffer = Buffer::register(&domain, DRIVER, 2);
    let mapped = stream(&domain, &buffer, 2);
    let made = alloc(&domain, 4).unwrap();
    let place = direct(&domain, buffer.at(64 * P, 1));
    open(&domain, FIRST, &buffer);
    fence(&domain, FIRST);
    device_floods(&domain, ApertureKind::Coherent, DIRT);
    end(&domain, mapped);
    let removed = [free(&domain, made), unmap_direct(&domain, &[place])];
    assert_eq!(domain.usage().quarantined.mappings, 3);

    leave(&domain, FIRST);

    for removal in removed {
        assert_eq!(domain.progress(removal), Progress::Done);
    }
    assert_eq!(seen(&domain, made.range), [0; 4 * PAGE]);
    assert_all_is_free(&domain);
    assert_eq!(direct(&domain, buffer.at(64 * P, 1)), place);
}

#[test]
fn what_several_ghosts_can_reach_waits_for_all_of_them() {
    for late_acks in [false, true] {
        for order in [[FIRST, SECOND], [SECOND, FIRST]] {
            let domain = served();
            join_by_frames(&domain, FIRST);
            join_by_pins(&domain, SECOND).pin(0);
            let buffer = Buffer::register(&domain, DRIVER, 1);
            let made = alloc(&domain, 4).unwrap();
            let place = direct(&domain, buffer.at(64 * P, 1));
            open(&domain, FIRST, &buffer);
            open(&domain, SECOND, &buffer);
            let before = free(&domain, made);
            fence(&domain, order[0]);
            assert_eq!(domain.progress(before), waiting(&order[1..]));
            fence(&domain, order[1]);
            let behind = unmap_direct(&domain, &[place]);
            let both = [before, behind];
            assert_eq!(domain.progress(before), quarantined(&[FIRST]));

            let goes = |session| match late_acks {
                true => ack(&domain, session, behind.generation),
                false => leave(&domain, session),
            };
            goes(order[0]);
            for removal in both {
                assert_eq!(domain.progress(removal), quarantined(&order[1..]));
            }
            let blamed = limbo(&domain)
                .into_iter()
                .map(|(_, phase, who)| (phase, who));
            let expected = [(Phase::Quarantined, Some(order[1])); 2];
            assert_eq!(blamed.collect::<Vec<_>>(), expected);
            assert!(is_full(alloc(&domain, 1)));
            assert_eq!(domain.usage().quarantined.mappings, 2);

            goes(order[1]);
            for removal in both {
                assert_eq!(domain.progress(removal), Progress::Done);
            }
            assert_all_is_free(&domain);
        }
    }
}

#[test]
fn a_ghost_does_not_free_what_attached_sessions_have_not_acknowledged() {
    let domain = served();
    join_by_frames(&domain, FIRST);
    join_by_frames(&domain, SECOND);
    let removal = free(&domain, alloc(&domain, 4).unwrap());
    fence(&domain, FIRST);

    ack(&domain, FIRST, removal.generation);
    assert_eq!(domain.progress(removal), waiting(&[SECOND]));
    leave(&domain, FIRST);

    assert_eq!(domain.progress(removal), waiting(&[SECOND]));
    assert!(is_full(alloc(&domain, 1)));
}

#[test]
fn ghosts_hold_back_neither_nodes_nor_numbers() {
    let domain = served();
    join_by_frames(&domain, FIRST);
    let buffer = Buffer::register(&domain, DRIVER, 1);
    let number = region_of(&domain, buffer.id);
    direct(&domain, buffer.at(1 << 40, 1));
    open(&domain, FIRST, &buffer);
    fence(&domain, FIRST);

    unmap_direct(&domain, &[range(1 << 40, (1 << 40) + P - 1)]);
    domain.unregister(DRIVER, buffer.id).unwrap();

    domain.check_invariants();
    assert_eq!(domain.look().iotlb.table_usage().retired, 0);
    assert_eq!(domain.usage().quarantined.mappings, 1);
    let other = Buffer::register(&domain, DRIVER, 1);
    assert_eq!(region_of(&domain, other.id), number);
}

#[test]
fn ghosts_count_against_the_quota_of_sessions_until_they_are_gone() {
    let domain = served();
    let quotas = Quotas {
        sessions: 2,
        ..Quotas::default()
    };
    set_quotas(&domain, quotas).unwrap();
    join_by_frames(&domain, FIRST);
    fence(&domain, FIRST);

    let refused = domain.join(LATER, Role::Device);
    assert!(matches!(refused, Err(JoinError::Quota(_))), "{refused:?}");
    leave(&domain, FIRST);
    assert!(domain.join(LATER, Role::Device).is_ok());
}

#[test]
#[should_panic(expected = "joins once")]
fn a_ghost_does_not_come_back() {
    let domain = served();
    join_by_frames(&domain, FIRST);
    fence(&domain, FIRST);
    let _ = domain.join(FIRST, Role::Device);
}

/// D11.
#[test]
fn a_reset_takes_back_what_readers_and_ghosts_let_go() {
    let domain = served();
    join_by_frames(&domain, FIRST);
    join_by_frames(&domain, SECOND);
    let buffer = Buffer::register(&domain, DRIVER, 1);
    let mapped = stream(&domain, &buffer, 1);
    fence(&domain, SECOND);
    let later = stream(&domain, &buffer, 1);

    let reset = domain.reset_bounce(AS_DRIVER, true).unwrap();
    let (ended, removal) = (reset.ended_mappings, reset.removal);

    domain.check_invariants();
    assert_eq!(ended, 2);
    assert_eq!(domain.progress(removal), waiting(&[FIRST]));
    let phase = |mapped, phase, who| (visible(mapped), phase, who);
    let waits = [mapped, later].map(|mapped| phase(mapped, Phase::Invalidating, None));
    assert_eq!(limbo(&domain), waits);
    device_floods(&domain, ApertureKind::Bounce, DIRT);
    ack(&domain, FIRST, removal.generation);
    assert_eq!(domain.progress(removal), quarantined(&[SECOND]));
    let held = phase(mapped, Phase::Quarantined, Some(SECOND));
    assert_eq!(limbo(&domain), [held]);
    assert_eq!(seen(&domain, visible(later)), [0; PAGE]);
    leave(&domain, SECOND);
    assert_eq!(seen(&domain, visible(mapped)), [0; PAGE]);
    assert_all_is_free(&domain);
}

/// D11: what has been unmapped is of the time before the reset, too.
#[test]
fn memory_that_was_waiting_at_a_reset_is_zero_when_it_is_free() {
    let domain = served();
    join_by_frames(&domain, FIRST);
    join_by_frames(&domain, SECOND);
    let buffer = Buffer::register(&domain, DRIVER, 2);
    let [waits, held] = [(); 2].map(|()| stream(&domain, &buffer, 1));
    end(&domain, held);
    ack_all(&domain, SECOND);
    fence(&domain, FIRST);
    ack_all(&domain, SECOND);
    end(&domain, waits);
    device_floods(&domain, ApertureKind::Bounce, DIRT);

    let ended = domain
        .reset_bounce(AS_DRIVER, false)
        .unwrap()
        .ended_mappings;

    assert_eq!(ended, 0);
    assert_eq!(domain.usage().bounce.used_bytes, 2 * P);
    ack_all(&domain, SECOND);
    leave(&domain, FIRST);
    assert_all_is_free(&domain);
    let aperture = domain.aperture(ApertureKind::Bounce).unwrap().range();
    assert!(seen(&domain, aperture).iter().all(|byte| *byte == 0));
}
