//! Who comes, who goes, what is left, and how much there may be.

use super::*;
use crate::coherent::{AllocCoherentError, CoherentSpec, FreeCoherentError};
use crate::domain::InUse;
use crate::lease::LeaseTally;
use crate::limits::{Quota, QuotaExceeded};
use crate::mapping::MappingId;
use crate::memory::{RegisterError, UnregisterError};
use crate::session::{Holdings, JoinError};

fn some_memory() -> ClientMemory {
    ClientMemory::accept(driver_memfd("session-test", P).unwrap(), true).unwrap()
}

/// What a session of no rights is told by every operation, in their order.
fn refusals(domain: &Domain, session: SessionId, buffer: &Buffer, mapped: Mapped) -> Vec<Denied> {
    let spec = buffer.spec(0, 1, Direction::ToDevice);
    let unlucky = "an operation that is to be refused";
    let Err(RegisterError::Denied(register)) = domain.register(session, some_memory(), false)
    else {
        panic!("{unlucky}: register");
    };
    let Err(UnregisterError::Denied(unregister)) = domain.unregister(session, buffer.id) else {
        panic!("{unlucky}: unregister");
    };
    let Err(MapError::Denied(map)) = map(domain, session, spec) else {
        panic!("{unlucky}: map");
    };
    let Err(UnmapError::Denied(unmap)) = unmap(domain, session, ending(mapped)) else {
        panic!("{unlucky}: unmap");
    };
    let request = part(mapped, 0, 1, SyncTarget::ForDevice);
    let Err(SyncError::Denied(sync)) = sync(domain, session, request) else {
        panic!("{unlucky}: sync");
    };
    let Err(AllocCoherentError::Denied(alloc)) =
        domain.alloc_coherent(session, &CoherentSpec::of(1))
    else {
        panic!("{unlucky}: alloc_coherent");
    };
    let Err(FreeCoherentError::Denied(free)) =
        domain.free_coherent(session, mapped.iova, MappingId::new(1))
    else {
        panic!("{unlucky}: free_coherent");
    };
    vec![register, unregister, map, unmap, sync, alloc, free]
}

#[test]
fn a_device_or_a_stranger_is_refused_everything_and_changes_nothing() {
    let domain = domain(8, 8);
    let buffer = Buffer::register(&domain, DRIVER, 1);
    let mapped = map(&domain, DRIVER, buffer.spec(0, 1, Direction::ToDevice)).unwrap();
    let stranger = SessionId::new(99);
    let before = table(&domain);

    let wrong_role = Denied::WrongRole {
        session: DEVICE,
        role: Role::Device,
    };
    assert_eq!(refusals(&domain, DEVICE, &buffer, mapped), [wrong_role; 7]);
    let ended = Denied::SessionEnded { session: stranger };
    assert_eq!(refusals(&domain, stranger, &buffer, mapped), [ended; 7]);

    assert_eq!(table(&domain), before);
    assert_eq!(domain.holdings(stranger), None);
}

#[test]
fn joining_answers_the_generation_that_the_table_has() {
    let domain = empty_domain(8, 8, Scrub::OnMap);
    let first = domain.join(DRIVER, Role::Driver).unwrap();
    assert_eq!(first, domain.usage().generation);
    domain.alloc_coherent(DRIVER, &CoherentSpec::of(1)).unwrap();

    let second = domain.join(OTHER, Role::Driver).unwrap();
    assert!(second > first);
    assert_eq!(second, domain.usage().generation);
}

#[test]
fn the_end_of_a_session_gives_back_all_it_held_zeroed_and_nothing_flows_back() {
    let domain = domain(8, 8);
    let buffer = Buffer::register(&domain, DRIVER, 2);
    let stays = Buffer::register(&domain, OTHER, 1);
    let spec = buffer.spec(0, P, Direction::Bidirectional);
    let gone = [0, 1].map(|_| map(&domain, DRIVER, spec).unwrap());
    let kept = map(&domain, OTHER, stays.spec(0, P, Direction::Bidirectional)).unwrap();
    domain.alloc_coherent(DRIVER, &CoherentSpec::of(1)).unwrap();
    device_floods(&domain, ApertureKind::Bounce, INTRUSION);
    assert_eq!(
        domain.holdings(DRIVER),
        Some(Holdings {
            streaming: 2,
            coherent: 1,
            leases: LeaseTally::default(),
            memories: 1
        })
    );

    domain.leave(DRIVER);

    domain.check_invariants();
    assert_eq!(buffer.all(), pattern(2 * P, 1));
    for mapped in gone {
        assert_eq!(seen(&domain, visible(mapped)), vec![0; size(P)]);
        assert_eq!(domain.lookup(visible(mapped)), None);
    }
    assert_eq!(seen(&domain, visible(kept)), vec![INTRUSION; size(P)]);
    let usage = domain.usage();
    assert_eq!(
        (
            usage.sessions,
            usage.streaming,
            usage.coherent,
            usage.memories
        ),
        (2, 1, 0, 1)
    );
    assert_eq!(usage.bounce.used_bytes, P);
    assert_eq!(usage.coherent_aperture.used_bytes, 0);
    assert_eq!(domain.holdings(DRIVER), None);
}

#[test]
fn leaving_twice_or_never_having_come_does_nothing() {
    let domain = domain(8, 8);
    domain.leave(DRIVER);
    let before = table(&domain);

    domain.leave(DRIVER);
    domain.leave(SessionId::new(99));

    assert_eq!(table(&domain), before);
}

#[test]
fn closing_an_unused_domain_lets_nobody_in_any_more() {
    let domain = empty_domain(8, 8, Scrub::OnMap);
    assert_eq!(domain.close(Close::IfUnused), Ok(vec![]));
    assert_eq!(
        domain.join(DRIVER, Role::Driver),
        Err(JoinError::DomainClosed)
    );
    // Deleting once more is not an error.
    assert_eq!(domain.close(Close::IfUnused), Ok(vec![]));
}

/// Case 67, D12.
#[test]
fn a_domain_in_use_is_not_closed_and_says_by_what() {
    let domain = domain(8, 8);
    let buffer = Buffer::register(&domain, DRIVER, 1);
    map(&domain, DRIVER, buffer.spec(0, 1, Direction::ToDevice)).unwrap();
    let persistent = CoherentSpec {
        persistent: true,
        ..CoherentSpec::of(1)
    };
    domain.alloc_coherent(DRIVER, &persistent).unwrap();
    let before = table(&domain);

    let in_use = InUse {
        sessions: 3,
        streaming: 1,
        leases: 0,
        coherent: 1,
        direct: 0,
        memories: 1,
    };
    assert_eq!(domain.close(Close::IfUnused), Err(in_use));
    assert_eq!(table(&domain), before);
    map(&domain, DRIVER, buffer.spec(0, 1, Direction::ToDevice)).unwrap();

    // A persistent allocation alone is use as well.
    for session in [DRIVER, OTHER, DEVICE] {
        domain.leave(session);
    }
    let left = InUse {
        sessions: 0,
        streaming: 0,
        leases: 0,
        coherent: 1,
        direct: 0,
        memories: 0,
    };
    assert_eq!(domain.close(Close::IfUnused), Err(left));
}

/// Case 67, D12.
#[test]
fn a_forced_close_names_the_sessions_and_refuses_everything_until_they_have_left() {
    let domain = domain(8, 8);
    let buffer = Buffer::register(&domain, DRIVER, 1);
    let mapped = map(&domain, DRIVER, buffer.spec(0, 1, Direction::ToDevice)).unwrap();

    assert_eq!(domain.close(Close::Force), Ok(vec![DRIVER, OTHER, DEVICE]));

    assert_eq!(
        domain.join(SessionId::new(9), Role::Driver),
        Err(JoinError::DomainClosed)
    );
    assert_eq!(
        refusals(&domain, DRIVER, &buffer, mapped),
        [Denied::DomainClosed; 7]
    );
    for session in [DRIVER, OTHER, DEVICE] {
        domain.leave(session);
        domain.check_invariants();
    }
    let usage = domain.usage();
    assert_eq!(
        (
            usage.sessions,
            usage.streaming,
            usage.memories,
            usage.bounce.used_bytes
        ),
        (0, 0, 0, 0)
    );
}

fn quotas(sessions: u32, mappings: u32, memories: u32) -> Quotas {
    Quotas {
        sessions,
        mappings,
        memories,
        ..Quotas::default()
    }
}

#[test]
fn a_session_beyond_the_quota_stays_out_until_another_leaves() {
    let domain = domain(8, 8);
    set_quotas(&domain, quotas(3, 9, 9)).unwrap();
    let full = QuotaExceeded {
        quota: Quota::Sessions,
        limit: 3,
        used: 3,
    };

    let fourth = SessionId::new(4);
    assert_eq!(
        domain.join(fourth, Role::Device),
        Err(JoinError::Quota(full))
    );
    assert_eq!(domain.usage().sessions, 3);
    domain.leave(DEVICE);
    assert!(domain.join(fourth, Role::Device).is_ok());
}

#[test]
fn streaming_and_coherent_count_together_against_the_quota() {
    let domain = domain(8, 8);
    let buffer = Buffer::register(&domain, DRIVER, 1);
    let spec = buffer.spec(0, 1, Direction::ToDevice);
    set_quotas(&domain, quotas(9, 2, 9)).unwrap();
    let made = domain.alloc_coherent(DRIVER, &CoherentSpec::of(1)).unwrap();
    let full = QuotaExceeded {
        quota: Quota::Mappings,
        limit: 2,
        used: 2,
    };

    // All or nothing: the second entry is one too many.
    let refused = domain.map(DRIVER, &[spec, spec], BatchMode::AllOrNothing);
    assert_eq!(refused.unwrap_err().index, 1);
    let mapped = map(&domain, DRIVER, spec).unwrap();
    let refused = map(&domain, DRIVER, spec).unwrap_err();
    assert!(
        matches!(refused, MapError::Quota(quota) if quota == full),
        "{refused}"
    );
    assert_eq!(
        domain.alloc_coherent(OTHER, &CoherentSpec::of(1)),
        Err(AllocCoherentError::Quota(full))
    );

    domain.free_coherent(DRIVER, made.iova(), made.id).unwrap();
    let second = map(&domain, DRIVER, spec).unwrap();
    unmap(&domain, DRIVER, ending(mapped)).unwrap();
    unmap(&domain, DRIVER, ending(second)).unwrap();
    domain
        .map(DRIVER, &[spec, spec], BatchMode::AllOrNothing)
        .unwrap();
}

#[test]
fn a_memory_beyond_the_quota_is_refused_and_closed() {
    let domain = domain(8, 8);
    set_quotas(&domain, quotas(9, 9, 1)).unwrap();
    let first = Buffer::register(&domain, DRIVER, 1);
    let one_too_many = driver_memfd("one-memory-too-many", P).unwrap();
    let one_too_many = ClientMemory::accept(one_too_many, true).unwrap();

    let refused = domain.register(OTHER, one_too_many, false).unwrap_err();

    assert!(
        matches!(
            refused,
            RegisterError::Quota(QuotaExceeded {
                quota: Quota::Memories,
                limit: 1,
                used: 1
            })
        ),
        "{refused}"
    );
    assert_eq!(open_fds("one-memory-too-many"), 0);
    domain.unregister(DRIVER, first.id).unwrap();
    Buffer::register(&domain, OTHER, 1);
}

#[test]
fn an_update_below_what_is_in_use_changes_neither_quotas_nor_policy() {
    let domain = domain(8, 8);
    let buffer = Buffer::register(&domain, DRIVER, 1);
    let spec = buffer.spec(0, 1, Direction::ToDevice);
    domain
        .map(DRIVER, &[spec, spec], BatchMode::AllOrNothing)
        .unwrap();
    let before = domain.settings();

    for (wrong, quota, limit, used) in [
        (quotas(2, 9, 9), Quota::Sessions, 2, 3),
        (quotas(9, 1, 9), Quota::Mappings, 1, 2),
        (quotas(9, 9, 0), Quota::Memories, 0, 1),
    ] {
        let change = |settings| {
            Ok(Settings {
                quotas: wrong,
                scrub: Scrub::OnUnmap,
                ..settings
            })
        };
        let exceeded = QuotaExceeded { quota, limit, used };
        assert_eq!(domain.update(change), Err(UpdateError::Quota(exceeded)));
        assert_eq!(domain.settings(), before);
    }
    // Exactly what is in use is allowed.
    set_quotas(&domain, quotas(3, 2, 1)).unwrap();
    assert_eq!(domain.settings().quotas, quotas(3, 2, 1));
}
