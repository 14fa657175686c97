//! Who pays for what is held back.

use super::*;
use crate::direct::SetMapError;
use crate::limits::{Quota, QuotaExceeded};

/// The user of the driver that lets others down, and another one.
const GUILTY: u32 = 7;
const INNOCENT: u32 = 8;

/// Three mappings may be; a driver of either user, none of which translates.
fn narrow() -> Domain {
    let domain = empty_domain(8, 4, Scrub::OnMap);
    let quotas = Quotas {
        mappings: 3,
        ..Quotas::default()
    };
    set_quotas(&domain, quotas).unwrap();
    for (session, account) in [(DRIVER, INNOCENT), (OTHER, GUILTY)] {
        let joining = Joining {
            role: Role::Driver,
            account: Account(account),
            reader: None,
        };
        domain.join(session, joining).unwrap();
    }
    join_by_frames(&domain, FIRST); // of the guilty user
    domain
}

/// How many mappings a session can make.
fn room(domain: &Domain, session: SessionId) -> usize {
    let made: Vec<_> = (0..9)
        .map_while(|_| domain.alloc_coherent(session, &CoherentSpec::of(1)).ok())
        .collect();
    for made in &made {
        let freed = domain.free_coherent(session, made.iova(), made.id);
        freed.unwrap();
    }
    domain.check_invariants();
    made.len()
}

#[test]
fn what_is_in_quarantine_is_charged_to_the_ghosts_user_and_to_nobody_else() {
    let domain = narrow();
    let made = [(); 2].map(|()| alloc(&domain, 1).unwrap());
    fence(&domain, FIRST);
    assert_eq!((room(&domain, DRIVER), room(&domain, OTHER)), (1, 1));

    for made in made {
        free(&domain, made);
    }

    assert_eq!(domain.usage().quarantined.mappings, 2);
    // Two of the four pages are held back.
    assert_eq!((room(&domain, DRIVER), room(&domain, OTHER)), (2, 1));
    let full = alloc(&domain, 2).unwrap();
    let spec = CoherentSpec::of(1);
    domain.free_coherent(DRIVER, full.iova(), full.id).unwrap();
    leave(&domain, FIRST);
    assert_eq!((room(&domain, DRIVER), room(&domain, OTHER)), (3, 3));
    assert!(domain.alloc_coherent(OTHER, &spec).is_ok());
}

#[test]
fn direct_mappings_in_quarantine_count_as_mappings_of_the_ghosts_user() {
    let domain = narrow();
    let buffer = Buffer::register(&domain, DRIVER, 1);
    let places = [64, 66, 68].map(|page| direct(&domain, buffer.at(page * P, 1)));
    open(&domain, FIRST, &buffer);
    fence(&domain, FIRST);

    unmap_direct(&domain, &places);

    let quarantined = domain.usage().quarantined;
    assert_eq!((quarantined.mappings, quarantined.bytes), (3, 0));
    let refused = domain.alloc_coherent(OTHER, &CoherentSpec::of(1));
    let exceeded = QuotaExceeded {
        quota: Quota::Mappings,
        limit: 3,
        used: 3,
    };
    assert_eq!(refused, Err(AllocCoherentError::Quota(exceeded)));
    let buffer = Buffer::register(&domain, OTHER, 1);
    let spec = buffer.spec(0, 1, Direction::ToDevice);
    assert!(map(&domain, OTHER, spec).is_err());
    assert_eq!(room(&domain, DRIVER), 3);
}

#[test]
fn what_waits_for_attached_sessions_counts_as_before() {
    let domain = narrow();
    let made = [(); 3].map(|()| alloc(&domain, 1).unwrap());
    for made in made {
        free(&domain, made);
    }

    assert_eq!((room(&domain, DRIVER), room(&domain, OTHER)), (0, 0));
    ack_all(&domain, FIRST);
    assert_eq!(domain.usage().invalidating, 0);
    alloc(&domain, 1).unwrap();
}

/// It would be refused also where it changes something else.
#[test]
fn what_is_in_quarantine_does_not_keep_the_settings_from_being_changed() {
    let domain = narrow();
    let made = [(); 3].map(|()| alloc(&domain, 1).unwrap());
    fence(&domain, FIRST);
    for made in made {
        free(&domain, made);
    }
    alloc(&domain, 1).unwrap();

    set_scrub(&domain, Scrub::OnUnmap);
    let quotas = |mappings| Quotas {
        mappings,
        ..Quotas::default()
    };
    set_quotas(&domain, quotas(1)).unwrap();
    assert!(set_quotas(&domain, quotas(0)).is_err());
}

/// Six direct mappings may be; a buffer, and a reader that has opened it.
fn six() -> (Domain, Buffer) {
    let domain = served();
    let quotas = Quotas {
        direct: 6,
        ..Quotas::default()
    };
    set_quotas(&domain, quotas).unwrap();
    join_by_frames(&domain, FIRST);
    let buffer = Buffer::register(&domain, DRIVER, 1);
    direct(&domain, buffer.at(64 * P, 1));
    open(&domain, FIRST, &buffer);
    (domain, buffer)
}

/// As many direct mappings as there is room for, apart from each other.
fn fill_direct(domain: &Domain, buffer: &Buffer, from: u64) -> Vec<IovaRange> {
    let specs = (0..9).map(|at| buffer.at((from + 2 * at) * P, 1));
    let made = specs.map_while(|spec| map_direct(domain, AS_DRIVER, spec).ok());
    made.map(|made| made.range).collect()
}

fn exceeded(used: usize) -> MapDirectError {
    MapDirectError::Quota(QuotaExceeded {
        quota: Quota::Direct,
        limit: 6,
        used,
    })
}

#[test]
fn direct_mappings_that_wait_count_with_those_there_are() {
    let (domain, buffer) = six();
    let made = fill_direct(&domain, &buffer, 70);
    assert_eq!(made.len(), 5);

    unmap_direct(&domain, &made[..3]);

    let refused = map_direct(&domain, AS_DRIVER, buffer.at(90 * P, 1));
    assert_eq!(refused, Err(exceeded(6)));
    let moved = [buffer.entry(pages(100, 100))];
    let refused = domain.set_map(AS_DRIVER, &[moved[0]; 4], None);
    let waiting = SetMapError::TooManyWaiting {
        asked: 4,
        waiting: 3,
        limit: 6,
    };
    assert_eq!(refused, Err(waiting));
    // This leaves three places more behind, and the use of the memory there.
    domain.set_map(AS_DRIVER, &moved, None).unwrap();
    domain.check_invariants();
    let refused = map_direct(&domain, AS_DRIVER, buffer.at(90 * P, 1));
    assert_eq!(refused, Err(exceeded(1 + 6 + 1)));
    // To give back is always allowed.
    assert_eq!(domain.set_map(AS_DRIVER, &[], None).unwrap().removed, 1);
    ack_all(&domain, FIRST);
    assert_eq!(fill_direct(&domain, &buffer, 70).len(), 6);
}

#[test]
fn direct_mappings_in_quarantine_count_until_the_ghost_is_gone() {
    for late_ack in [false, true] {
        let (domain, buffer) = six();
        let mut old = fill_direct(&domain, &buffer, 70);
        old.push(pages(64, 64));
        fence(&domain, FIRST);

        let removal = unmap_direct(&domain, &old);

        assert_eq!(domain.progress(removal), quarantined(&[FIRST]));
        assert_eq!(domain.usage().direct, 0);
        let refused = map_direct(&domain, AS_DRIVER, buffer.at(90 * P, 1));
        assert_eq!(refused, Err(exceeded(6)));
        let before = dump(&domain);
        let refused = domain.set_map(AS_DRIVER, &[buffer.entry(pages(90, 90))], None);
        let waiting = SetMapError::TooManyWaiting {
            asked: 1,
            waiting: 6,
            limit: 6,
        };
        assert_eq!(refused, Err(waiting));
        assert_eq!(dump(&domain), before);

        match late_ack {
            true => ack(&domain, FIRST, removal.generation),
            false => leave(&domain, FIRST),
        }
        assert_eq!(fill_direct(&domain, &buffer, 70).len(), 6);
        domain.check_invariants();
    }
}

/// What nobody acknowledges does not grow without end.
#[test]
fn uses_of_memory_that_a_ghost_holds_back_are_bounded() {
    let (domain, buffer) = six();
    let other = Buffer::register(&domain, DRIVER, 1);
    open(&domain, FIRST, &buffer);
    join_by_frames(&domain, SECOND); // acknowledges nothing

    let swaps = (0..).map_while(|round: u64| {
        let memory = [&other, &buffer][usize::try_from(round % 2).unwrap()];
        let table = [memory.entry(pages(64, 64))];
        domain.set_map(AS_DRIVER, &table, None).ok()
    });

    assert_eq!(swaps.count(), 6);
    domain.check_invariants();
    assert_eq!(domain.usage().invalidating, 0, "no place waits");
    ack_all(&domain, SECOND);
    ack_all(&domain, FIRST);
    assert_eq!(fill_direct(&domain, &buffer, 70).len(), 5);
}

/// Nobody who is acknowledged sees the old table in the new one's way.
#[test]
fn a_table_as_large_as_the_quota_is_replaced_again_and_again() {
    let (domain, buffer) = six();
    let table = |from: u64| {
        let entry = |at| buffer.entry(pages(from + at, from + at));
        (0..6).map(entry).collect::<Vec<_>>()
    };
    for round in 0..9 {
        let set = domain.set_map(AS_DRIVER, &table(100 + 7 * round), None);
        assert_eq!(set.unwrap().added, 6);
        ack_all(&domain, FIRST);
    }
    assert_eq!(limbo(&domain), []);
}
