//! Who pays for what is held back.

use super::*;
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
