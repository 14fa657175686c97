//! What is removed is used again when all who were there have acknowledged it.

use super::*;
use crate::aperture::POISON;
use crate::domain::Standing;
use crate::lease::LeaseTally;
use crate::memory::UnregisterError;
use crate::session::{AckError, Holdings};

#[test]
fn freed_coherent_memory_is_given_out_again_only_when_every_session_has_acknowledged() {
    let domain = served();
    join_by_frames(&domain, FIRST);
    join_by_pins(&domain, SECOND).pin(0);
    let made = alloc(&domain, 4).unwrap();

    let removal = free(&domain, made);

    assert_eq!(domain.progress(removal), waiting(&[FIRST, SECOND]));
    assert!(is_full(alloc(&domain, 1)));
    ack(&domain, SECOND, removal.generation);
    assert_eq!(domain.progress(removal), waiting(&[FIRST]));
    assert!(is_full(alloc(&domain, 1)));
    ack(&domain, FIRST, removal.generation);
    assert_eq!(domain.progress(removal), Progress::Done);
    assert_eq!(alloc(&domain, 4).unwrap().range, made.range);
}

#[test]
fn an_unmapped_streaming_range_waits_and_its_unmap_does_not() {
    let domain = served();
    join_by_frames(&domain, FIRST);
    let buffer = Buffer::register(&domain, DRIVER, 7);
    let mapped = stream(&domain, &buffer, 7);

    end(&domain, mapped);

    let spec = buffer.spec(0, 1, Direction::ToDevice);
    assert!(map(&domain, DRIVER, spec).is_err());
    let removal = domain.awaits_iovas().unwrap();
    assert_eq!(domain.progress(removal), waiting(&[FIRST]));
    ack(&domain, FIRST, removal.generation);
    assert_eq!(domain.awaits_iovas(), None);
    assert_eq!(stream(&domain, &buffer, 7).iova, mapped.iova);
}

#[test]
fn the_end_of_a_reader_is_as_good_as_its_acknowledgment() {
    let domain = served();
    join_by_frames(&domain, FIRST);
    join_by_frames(&domain, SECOND);
    let made = alloc(&domain, 4).unwrap();
    let removal = free(&domain, made);

    leave(&domain, FIRST);
    assert_eq!(domain.progress(removal), waiting(&[SECOND]));
    leave(&domain, SECOND);

    assert_eq!(domain.progress(removal), Progress::Done);
    assert_all_is_free(&domain);
}

#[test]
fn who_joins_later_is_not_waited_for() {
    let domain = served();
    join_by_frames(&domain, FIRST);
    let made = alloc(&domain, 4).unwrap();
    let removal = free(&domain, made);

    let start = domain
        .join(LATER, reading(Role::Device, 7, &Fake::frames()))
        .unwrap();

    assert_eq!(start, removal.generation);
    assert_eq!(domain.progress(removal), waiting(&[FIRST]));
    assert_eq!(domain.owed(LATER), None);
    ack(&domain, FIRST, removal.generation);
    assert_all_is_free(&domain);
}

#[test]
fn who_never_translates_is_never_waited_for() {
    let domain = served();
    domain.join(FIRST, Role::Device).unwrap();
    domain.join(SECOND, Role::Driver).unwrap();
    let buffer = Buffer::register(&domain, DRIVER, 7);
    let mapped = stream(&domain, &buffer, 7);
    let made = alloc(&domain, 4).unwrap();

    end(&domain, mapped);
    let removal = free(&domain, made);

    assert_eq!(domain.progress(removal), Progress::Done);
    assert_eq!(domain.owed(FIRST), None);
    assert_all_is_free(&domain);
    let usage = domain.usage();
    let all = usage.generation;
    let acked = domain.standings().into_iter().map(|one| one.acked);
    assert_eq!(acked.collect::<Vec<_>>(), [all; 3]);
}

#[test]
fn an_old_acknowledgment_changes_nothing() {
    let domain = served();
    join_by_frames(&domain, FIRST);
    let [one, two] = [1, 1].map(|pages| alloc(&domain, pages).unwrap());
    let before = free(&domain, one);
    ack(&domain, FIRST, before.generation);
    let removal = free(&domain, two);
    let dumped = dump(&domain);

    for old in [0, 1, before.generation - 1, before.generation] {
        ack(&domain, FIRST, old);
        assert_eq!(dump(&domain), dumped);
    }
    assert_eq!(domain.progress(removal), waiting(&[FIRST]));
}

#[test]
fn an_acknowledgment_of_what_is_still_to_come_is_refused_and_changes_nothing() {
    let domain = served();
    join_by_frames(&domain, FIRST);
    let made = alloc(&domain, 4).unwrap();
    let removal = free(&domain, made);
    let current = generation(&domain);
    for attached in [true, false] {
        let dumped = dump(&domain);
        for generation in [current + 1, u64::MAX] {
            let refused = AckError::Ahead {
                session: FIRST,
                generation,
                current,
            };
            assert_eq!(domain.acknowledge(FIRST, generation), Err(refused));
        }
        assert_eq!(dump(&domain), dumped);
        assert_ne!(domain.progress(removal), Progress::Done);
        if attached {
            fence(&domain, FIRST);
        }
    }
    assert_eq!(generation(&domain), current, "a device held nothing");
}

#[test]
fn a_stranger_acknowledges_nothing() {
    let domain = served();
    join_by_frames(&domain, FIRST);
    let removal = free(&domain, alloc(&domain, 1).unwrap());
    leave(&domain, FIRST);
    let dumped = dump(&domain);

    for session in [FIRST, LATER] {
        let refused = Err(AckError::NoSession { session });
        assert_eq!(domain.acknowledge(session, removal.generation), refused);
    }
    assert_eq!(dump(&domain), dumped);
}

#[test]
fn an_acknowledgment_frees_what_was_removed_up_to_it_and_nothing_later() {
    let domain = served();
    join_by_frames(&domain, FIRST);
    let made = [(); 3].map(|()| alloc(&domain, 1).unwrap());
    let removed = made.map(|made| free(&domain, made));
    let kept = |from: usize| {
        let kept = made[from..].iter();
        let kept = kept.map(|made| (made.range, Phase::Invalidating, None));
        kept.collect::<Vec<_>>()
    };
    assert_eq!(limbo(&domain), kept(0));

    ack(&domain, FIRST, removed[0].generation - 1);
    assert_eq!(limbo(&domain), kept(0));
    ack(&domain, FIRST, removed[1].generation);
    assert_eq!(limbo(&domain), kept(2));
    // Late.
    ack(&domain, FIRST, removed[0].generation);
    assert_eq!(limbo(&domain), kept(2));
    assert_eq!(domain.progress(removed[1]), Progress::Done);
    assert_eq!(domain.progress(removed[2]), waiting(&[FIRST]));
    ack(&domain, FIRST, removed[2].generation);
    assert_all_is_free(&domain);
}

#[test]
fn sessions_acknowledge_in_any_order() {
    let domain = served();
    join_by_frames(&domain, FIRST);
    join_by_frames(&domain, SECOND);
    let made = [(); 2].map(|()| alloc(&domain, 1).unwrap());
    let removed = made.map(|made| free(&domain, made));

    ack(&domain, SECOND, removed[1].generation);
    assert_eq!(domain.progress(removed[0]), waiting(&[FIRST]));
    ack(&domain, FIRST, removed[0].generation);
    assert_eq!(domain.progress(removed[0]), Progress::Done);
    assert_eq!(domain.progress(removed[1]), waiting(&[FIRST]));
    ack(&domain, FIRST, removed[1].generation);
    assert_all_is_free(&domain);
}

#[test]
fn memory_keeps_its_bytes_until_it_is_acknowledged_and_is_zeroed_before_it_is_free() {
    for poison in [false, true] {
        let (domain, freed) = match poison {
            true => (poisoned_domain(8, 4), POISON),
            false => (empty_domain(8, 4, Scrub::OnUnmap), 0),
        };
        domain.join(DRIVER, Role::Driver).unwrap();
        join_by_frames(&domain, FIRST);
        let buffer = Buffer::register(&domain, DRIVER, 1);
        let (mapped, made) = (stream(&domain, &buffer, 1), alloc(&domain, 1).unwrap());
        let ranges = [visible(mapped), made.range];
        for range in ranges {
            device_writes(&domain, range.start(), &[DIRT; PAGE]);
        }

        end(&domain, mapped);
        let removal = free(&domain, made);
        for range in ranges {
            let bytes = seen(&domain, range);
            assert_eq!(bytes, [DIRT; PAGE], "somebody may still use it");
        }
        ack(&domain, FIRST, removal.generation);

        for range in ranges {
            assert_eq!(seen(&domain, range), [freed; PAGE]);
        }
        assert_all_is_free(&domain);
    }
}

#[test]
fn bounce_memory_that_is_zeroed_on_map_only_is_zero_when_it_is_seen_again() {
    let domain = served();
    join_by_frames(&domain, FIRST);
    let buffer = Buffer::register(&domain, DRIVER, 1);
    let mapped = stream(&domain, &buffer, 1);
    device_writes(&domain, mapped.iova, &[DIRT; PAGE]);
    end(&domain, mapped);
    ack_all(&domain, FIRST);

    let spec = buffer.spec(0, 5, Direction::FromDevice);
    let again = map(&domain, DRIVER, spec).unwrap();

    assert_eq!(again.iova, mapped.iova);
    assert_eq!(seen(&domain, granules(visible(again))), [0; PAGE]);
}

#[test]
fn what_is_being_zeroed_is_waited_for_and_nobody_is_named() {
    let domain = served();
    join_by_frames(&domain, FIRST);
    let made = alloc(&domain, 4).unwrap();
    let removal = free(&domain, made);

    // The acknowledgment, stopped between its steps.
    let sweeps = {
        let mut state = domain.lock();
        let acked = removal.generation;
        state.readers.acknowledge(FIRST, acked, acked).unwrap();
        state.sweep()
    };

    assert_eq!(sweeps.len(), 1);
    assert_eq!(domain.progress(removal), waiting(&[]));
    assert_eq!(domain.usage().invalidating, 1);
    assert_eq!(domain.awaits_iovas(), Some(removal));
    assert!(is_full(alloc(&domain, 1)));
    domain.check_invariants();
    domain.lock().swept(&sweeps);
    assert_eq!(domain.progress(removal), Progress::Done);
    assert_all_is_free(&domain);
}

#[test]
fn a_region_number_waits_for_whoever_may_still_look_for_it() {
    let domain = served();
    join_by_frames(&domain, FIRST);
    let buffer = Buffer::register(&domain, DRIVER, 1);
    let number = region_of(&domain, buffer.id);
    let place = direct(&domain, buffer.at(64 * P, 1));
    unmap_direct(&domain, &[place]);

    let removal = domain.unregister(DRIVER, buffer.id).unwrap();
    domain.check_invariants();
    let other = Buffer::register(&domain, DRIVER, 1);
    assert_ne!(region_of(&domain, other.id), number);
    ack(&domain, FIRST, removal.generation);

    let third = Buffer::register(&domain, DRIVER, 1);
    assert_eq!(region_of(&domain, third.id), number);
}

#[test]
fn numbers_that_wait_count_against_the_quota_of_memories() {
    let domain = served();
    join_by_frames(&domain, FIRST);
    let quotas = Quotas {
        memories: 1,
        ..Quotas::default()
    };
    set_quotas(&domain, quotas).unwrap();
    let buffer = Buffer::register(&domain, DRIVER, 1);
    alloc(&domain, 1).unwrap();
    let removal = domain.unregister(DRIVER, buffer.id).unwrap();
    let memory = || {
        let fd = driver_memfd("domain-test", P).unwrap();
        ClientMemory::accept(fd, true).unwrap()
    };

    assert!(domain.register(DRIVER, memory(), false).is_err());
    ack(&domain, FIRST, removal.generation);
    assert!(domain.register(DRIVER, memory(), false).is_ok());
}

#[test]
fn nodes_of_the_page_table_are_recycled_only_after_every_acknowledgment() {
    let domain = served();
    join_by_frames(&domain, FIRST);
    join_by_frames(&domain, SECOND);
    let buffer = Buffer::register(&domain, DRIVER, 1);
    // Far from everything else: it needs nodes of its own.
    let place = direct(&domain, buffer.at(1 << 40, 1));
    let nodes = || domain.look().iotlb.table_usage();
    let used = nodes().used;

    let removal = unmap_direct(&domain, &[place]);

    let retired = nodes().retired;
    assert!(retired > 0 && nodes().used < used, "{:?}", nodes());
    ack(&domain, FIRST, removal.generation);
    assert_eq!(nodes().retired, retired);
    ack(&domain, SECOND, removal.generation);
    assert_eq!(nodes().retired, 0);
}

#[test]
fn memory_can_be_given_back_while_the_range_it_was_seen_through_still_waits() {
    let domain = served();
    join_by_frames(&domain, FIRST);
    let buffer = Buffer::register(&domain, DRIVER, 1);
    let mapped = stream(&domain, &buffer, 1);
    let place = direct(&domain, buffer.at(64 * P, 1));
    let (id, fd) = (buffer.id, &buffer.file);
    assert!(matches!(
        domain.unregister(DRIVER, id),
        Err(UnregisterError::InUse { .. })
    ));
    end(&domain, mapped);
    unmap_direct(&domain, &[place]);

    domain.unregister(DRIVER, id).unwrap();

    domain.check_invariants();
    assert_eq!(domain.memories(MemoryId::new(0), 9), []);
    let what_waits = [visible(mapped), place].map(|at| (at, Phase::Invalidating, None));
    assert_eq!(limbo(&domain), what_waits);
    let sources = views(&domain).into_iter().map(|view| view.source());
    assert!(sources.flatten().all(|source| source.memory == id));
    assert_eq!(fd.metadata().unwrap().len(), P);
    ack_all(&domain, FIRST);
    assert_all_is_free(&domain);
}

#[test]
fn what_waits_is_counted_as_that_and_as_nothing_else() {
    let domain = served();
    let fake = Fake::frames();
    domain.join(OTHER, reading(Role::Driver, 7, &fake)).unwrap();
    join_by_frames(&domain, FIRST);
    let buffer = Buffer::register(&domain, OTHER, 2);
    let spec = buffer.spec(0, 2 * P, Direction::ToDevice);
    let mapped = map(&domain, OTHER, spec).unwrap();
    let made = domain.alloc_coherent(OTHER, &CoherentSpec::of(P)).unwrap();
    map_direct(&domain, AS_OTHER, buffer.at(64 * P, 2)).unwrap();

    unmap(&domain, OTHER, ending(mapped)).unwrap();
    domain.free_coherent(OTHER, made.iova(), made.id).unwrap();
    domain.unmap_direct(AS_OTHER, &[pages(64, 65)]).unwrap();

    domain.check_invariants();
    let usage = domain.usage();
    assert_eq!((usage.streaming, usage.coherent, usage.direct), (0, 0, 0));
    assert_eq!((usage.invalidating, usage.fenced), (3, 0));
    assert_eq!(usage.quarantined.mappings, 0);
    assert_eq!(usage.bounce.used_bytes, 2 * P);
    assert_eq!(usage.coherent_aperture.used_bytes, P);
    let holdings = Holdings {
        streaming: 0,
        coherent: 0,
        leases: LeaseTally::default(),
        memories: 1,
    };
    assert_eq!(domain.holdings(OTHER), Some(holdings));
}

#[test]
fn standings_tell_what_everybody_was_asked_for_and_has_acknowledged() {
    let domain = served();
    join_by_frames(&domain, SECOND);
    join_by_frames(&domain, FIRST);
    let start = generation(&domain);
    let removal = free(&domain, alloc(&domain, 1).unwrap());
    ack(&domain, FIRST, removal.generation);
    fence(&domain, SECOND);

    let standing = |session, fenced, acked, quarantined| Standing {
        session,
        fenced,
        acked,
        asked: removal.generation,
        quarantined,
    };
    let held = crate::domain::Quarantined {
        mappings: 1,
        bytes: P,
    };
    let expected = [
        standing(FIRST, false, removal.generation, Default::default()),
        standing(SECOND, true, start, held),
    ];
    assert_eq!(domain.standings()[1..], expected);
    assert_eq!(domain.owed(FIRST), None);
    assert_eq!(domain.owed(SECOND), None, "nobody waits for it any more");
}

/// The rest of it is gone with the domain's memory, which no other domain is given.
#[test]
fn a_domain_can_be_closed_as_unused_while_something_waits_or_is_in_quarantine() {
    let domain = served();
    join_by_frames(&domain, FIRST);
    join_by_frames(&domain, SECOND);
    free(&domain, alloc(&domain, 1).unwrap());
    fence(&domain, FIRST);
    leave(&domain, DRIVER);
    assert!(domain.close(Close::IfUnused).is_err(), "one is attached");
    fence(&domain, SECOND);

    assert_eq!(domain.usage().quarantined.mappings, 1);
    assert_eq!(domain.close(Close::IfUnused), Ok(vec![]));
}
