//! Leases: whole granules of the bounce aperture, for one driver until its end.

use super::*;
use crate::alloc::{AllocError, AllocRequest};
use crate::aperture::POISON;
use crate::coherent::{CoherentSpec, FreeCoherentError};
use crate::domain::{InUse, ResetError};
use crate::lease::{LeaseBytesExceeded, LeaseError, LeaseSpec, LeaseTally, Leased, ReleaseError};
use crate::limits::{Quota, QuotaExceeded};
use crate::mapping::{MappingId, Phase};
use crate::session::{Removal, SessionId};

fn lease(domain: &Domain, session: SessionId, len_bytes: u64) -> Result<Leased, LeaseError> {
    let leased = domain.lease(session, &LeaseSpec::of(len_bytes));
    domain.check_invariants();
    leased
}

fn release(domain: &Domain, session: SessionId, leased: Leased) -> Result<Removal, ReleaseError> {
    let released = domain.release_lease(session, leased.iova(), leased.id);
    domain.check_invariants();
    released
}

fn missing(leased: Leased) -> ReleaseError {
    let (iova, id) = (leased.iova(), leased.id);
    MappingMissing::NoSuchMapping { iova, id }.into()
}

fn tally(count: usize, pages: u64) -> LeaseTally {
    LeaseTally {
        count,
        bytes: pages * P,
    }
}

fn is_all(domain: &Domain, part: IovaRange, byte: u8) -> bool {
    seen(domain, part).iter().all(|seen| *seen == byte)
}

/// D3.
#[test]
fn a_mib_leases_255_pages_and_one_more_for_each_that_is_released() {
    let domain = domain(256, 0);
    let leases: Vec<_> = (0..255)
        .map(|_| lease(&domain, DRIVER, P).unwrap())
        .collect();
    let full = LeaseError::Alloc(AllocError::NoSpace {
        want_bytes: P,
        align_bytes: P,
        largest_hole_bytes: 0,
    });
    assert_eq!(lease(&domain, DRIVER, P), Err(full));
    assert_eq!(domain.usage().leases, tally(255, 255));

    release(&domain, DRIVER, leases[77]).unwrap();

    let again = lease(&domain, OTHER, P).unwrap();
    assert_eq!(again.range, leases[77].range);
    assert!(leases.iter().all(|old| old.id != again.id));
    assert_eq!(lease(&domain, OTHER, P), Err(full));
}

#[test]
fn a_lease_is_whole_granules_zeroed_visible_and_said_to_be_one() {
    let domain = domain(8, 0);
    device_floods(&domain, ApertureKind::Bounce, DIRT);

    let leased = lease(&domain, DRIVER, P + 1).unwrap();

    assert_eq!(leased.range.len_bytes(), Some(2 * P));
    assert!(is_all(&domain, leased.range, 0));
    let (pieces, _) = domain.translate(leased.range, Perm::ReadWrite).unwrap();
    assert_eq!((pieces.len(), pieces[0].kind), (1, MappingKind::Lease));
    let view = domain.lookup(leased.range).unwrap();
    assert_eq!((view.id, view.owner), (Some(leased.id), Some(DRIVER)));
    assert_eq!((view.visible, view.perm), (leased.range, Perm::ReadWrite));
    assert_eq!((view.kind, view.source()), (ViewKind::Lease, None));
    let filter = MappingFilter {
        kind: Some(MappingKind::Lease),
        ..MappingFilter::default()
    };
    assert_eq!(domain.mappings(filter, Iova::new(0), 9), [view]);
    let usage = domain.usage();
    assert_eq!((usage.streaming, usage.leases), (0, tally(1, 2)));
    assert_eq!(domain.holdings(DRIVER).unwrap().leases, tally(1, 2));
    assert_eq!(domain.holdings(OTHER).unwrap().leases, tally(0, 0));
}

#[test]
fn a_lease_lies_as_aligned_and_as_low_as_asked() {
    let domain = domain(64, 0);
    let place = AllocRequest {
        len_bytes: P,
        align_bytes: 8 * P,
        limit: Some(Iova::new(9 * P - 1)),
    };
    let leased = domain.lease(DRIVER, &LeaseSpec { place }).unwrap();
    assert_eq!(leased.iova(), Iova::new(8 * P));
    assert!(domain.lease(DRIVER, &LeaseSpec { place }).is_err());
}

#[test]
fn what_was_leased_is_zero_when_it_is_free_and_poison_where_that_is_asked_for() {
    let zeroed = empty_domain(8, 0, Scrub::OnMap);
    for (domain, free) in [(zeroed, 0), (poisoned_domain(8, 0), POISON)] {
        domain.join(DRIVER, Role::Driver).unwrap();
        let leased = lease(&domain, DRIVER, 3 * P).unwrap();
        assert!(is_all(&domain, leased.range, 0));
        device_floods(&domain, ApertureKind::Bounce, INTRUSION);

        release(&domain, DRIVER, leased).unwrap();

        assert!(is_all(&domain, leased.range, free));
        assert_eq!(domain.lookup(leased.range), None);
        let again = lease(&domain, DRIVER, 3 * P).unwrap();
        assert!(is_all(&domain, again.range, 0));
    }
}

#[test]
fn a_lease_ends_once_and_only_by_its_owner_and_its_name() {
    let domain = domain(8, 8);
    let leased = lease(&domain, DRIVER, 2 * P).unwrap();
    let before = dump(&domain);
    let (iova, id) = (leased.iova(), leased.id);
    let not_yours = ReleaseError::Missing(MappingMissing::NotYours { iova, id });
    assert_eq!(release(&domain, OTHER, leased), Err(not_yours));
    let stale = Leased {
        id: MappingId::new(id.get() + 1),
        ..leased
    };
    assert_eq!(release(&domain, DRIVER, stale), Err(missing(stale)));
    let inside = Leased {
        range: pages(2, 2),
        ..leased
    };
    assert_eq!(release(&domain, DRIVER, inside), Err(missing(inside)));
    assert_eq!(dump(&domain), before);

    release(&domain, DRIVER, leased).unwrap();

    assert_eq!(release(&domain, DRIVER, leased), Err(missing(leased)));
    let again = lease(&domain, DRIVER, 2 * P).unwrap();
    assert_eq!(again.iova(), iova);
    assert_eq!(release(&domain, DRIVER, leased), Err(missing(leased)));
}

#[test]
fn nothing_else_ends_a_lease_and_release_ends_nothing_else() {
    let domain = domain(8, 8);
    let buffer = Buffer::register(&domain, DRIVER, 1);
    let leased = lease(&domain, DRIVER, P).unwrap();
    let as_mapping = Mapped {
        id: leased.id,
        iova: leased.iova(),
        len_bytes: P,
    };
    let mapped = map(&domain, DRIVER, buffer.spec(0, P, Direction::ToDevice)).unwrap();
    let made = domain.alloc_coherent(DRIVER, &CoherentSpec::of(P)).unwrap();
    let before = dump(&domain);

    for session in [DRIVER, OTHER] {
        let unmapped = unmap(&domain, session, ending(as_mapping)).unwrap_err();
        let is_missing = |error: &MappingMissing| matches!(error, MappingMissing::NoSuchMapping { id, .. } if *id == leased.id);
        assert!(matches!(&unmapped, UnmapError::Missing(missing) if is_missing(missing)));
        let synced = part(as_mapping, 0, 1, SyncTarget::ForCpu);
        let synced = sync(&domain, session, synced).unwrap_err();
        assert!(matches!(&synced, SyncError::Missing(missing) if is_missing(missing)));
        let freed = domain.free_coherent(session, leased.iova(), leased.id);
        let Err(FreeCoherentError::Missing(freed)) = freed else {
            panic!("{freed:?}");
        };
        assert!(is_missing(&freed));
    }
    let others = [(mapped.id, visible(mapped)), (made.id, made.range)];
    for other in others.map(|(id, range)| Leased { id, range }) {
        for session in [DRIVER, OTHER] {
            assert_eq!(release(&domain, session, other), Err(missing(other)));
        }
    }
    assert_eq!(dump(&domain), before);
}

#[test]
fn leases_are_for_drivers_of_a_domain_with_a_bounce_aperture() {
    let wrong = Denied::WrongRole {
        session: DEVICE,
        role: Role::Device,
    };
    let with = domain(8, 0);
    assert_eq!(lease(&with, DEVICE, P), Err(LeaseError::Denied(wrong)));
    let leased = lease(&with, DRIVER, P).unwrap();
    assert_eq!(
        release(&with, DEVICE, leased),
        Err(ReleaseError::Denied(wrong))
    );
    let without = domain(0, 8);
    assert_eq!(lease(&without, DRIVER, P), Err(LeaseError::NoAperture));
    let nothing = LeaseError::Alloc(AllocError::ZeroLength);
    assert_eq!(lease(&with, DRIVER, 0), Err(nothing));
    assert!(matches!(
        lease(&with, DRIVER, u64::MAX),
        Err(LeaseError::Alloc(AllocError::NoSpace { .. }))
    ));
}

#[test]
fn quotas_bound_the_number_and_the_bytes_of_each_sessions_leases() {
    let domain = domain(32, 0);
    let quotas = Quotas {
        leases: 2,
        lease_bytes: 5 * P,
        ..Quotas::default()
    };
    set_quotas(&domain, quotas).unwrap();
    let first = lease(&domain, DRIVER, 3 * P).unwrap();
    let bytes = LeaseBytesExceeded {
        limit: 5 * P,
        used: 3 * P,
        want: 3 * P,
    };
    let refused = lease(&domain, DRIVER, 2 * P + 1);
    assert_eq!(refused, Err(LeaseError::Bytes(bytes)));
    lease(&domain, DRIVER, 2 * P).unwrap();
    let number = QuotaExceeded {
        quota: Quota::Leases,
        limit: 2,
        used: 2,
    };
    assert_eq!(lease(&domain, DRIVER, P), Err(LeaseError::Quota(number)));
    lease(&domain, OTHER, 5 * P).unwrap();

    // Not below what some session holds.
    let below = QuotaExceeded { limit: 1, ..number };
    let asked = Quotas {
        leases: 1,
        ..quotas
    };
    assert_eq!(set_quotas(&domain, asked), Err(UpdateError::Quota(below)));
    let asked = Quotas {
        lease_bytes: 5 * P - 1,
        ..quotas
    };
    let below = UpdateError::LeaseBytes {
        limit: 5 * P - 1,
        used: 5 * P,
    };
    assert_eq!(set_quotas(&domain, asked), Err(below));

    release(&domain, DRIVER, first).unwrap();
    lease(&domain, DRIVER, 3 * P).unwrap();
}

#[test]
fn a_lease_counts_as_one_mapping() {
    let domain = domain(32, 8);
    let quotas = Quotas {
        mappings: 2,
        ..Quotas::default()
    };
    set_quotas(&domain, quotas).unwrap();
    lease(&domain, DRIVER, 5 * P).unwrap();
    domain.alloc_coherent(DRIVER, &CoherentSpec::of(1)).unwrap();
    let full = QuotaExceeded {
        quota: Quota::Mappings,
        limit: 2,
        used: 2,
    };
    assert_eq!(lease(&domain, DRIVER, P), Err(LeaseError::Quota(full)));
}

#[test]
fn the_end_of_a_session_gives_its_leases_back_zeroed_and_no_others() {
    let domain = domain(8, 0);
    let gone = lease(&domain, DRIVER, 2 * P).unwrap();
    let kept = lease(&domain, OTHER, P).unwrap();
    device_floods(&domain, ApertureKind::Bounce, INTRUSION);
    assert!(matches!(
        domain.close(Close::IfUnused),
        Err(InUse { leases: 2, .. })
    ));

    domain.leave(DRIVER);

    domain.check_invariants();
    assert!(is_all(&domain, gone.range, 0));
    assert!(is_all(&domain, kept.range, INTRUSION));
    assert_eq!(domain.usage().leases, tally(1, 1));
    assert_eq!(domain.usage().bounce.used_bytes, P);
}

/// D11.
#[test]
fn a_reset_takes_leases_away_only_by_force_and_zeroes_them() {
    let domain = domain(8, 0);
    let buffer = Buffer::register(&domain, DRIVER, 1);
    let leases = [(DRIVER, P), (DRIVER, 2 * P), (OTHER, P)];
    let leases = leases.map(|(who, len)| (who, lease(&domain, who, len).unwrap()));
    map(&domain, DRIVER, buffer.spec(0, P, Direction::ToDevice)).unwrap();
    let in_use = ResetError::InUse {
        streaming: 1,
        leases: 3,
    };
    assert_eq!(domain.reset_bounce(Actor::Owner, false), Err(in_use));
    device_floods(&domain, ApertureKind::Bounce, INTRUSION);

    let reset = domain.reset_bounce(Actor::Owner, true).unwrap();

    domain.check_invariants();
    assert_eq!((reset.ended_mappings, reset.ended_leases), (1, 3));
    let aperture = domain.aperture(ApertureKind::Bounce).unwrap().range();
    assert!(is_all(&domain, aperture, 0));
    assert_eq!(domain.usage().bounce.used_bytes, 0);
    for (owner, leased) in leases {
        assert_eq!(release(&domain, owner, leased), Err(missing(leased)));
    }
    assert!(domain.reset_bounce(Actor::Owner, false).is_ok());
}

/// The request has taken its granules, and a reset passes before it goes live.
#[test]
fn a_lease_under_way_during_a_reset_or_its_sessions_end_is_refused_and_leaves_zeroes() {
    use crate::domain::transit::Reservation;
    type End = fn(&Domain);
    let ends: [(End, Denied); 2] = [
        (
            |domain| {
                domain.reset_bounce(Actor::Owner, true).unwrap();
            },
            Denied::BounceReset,
        ),
        (
            |domain| domain.leave(DRIVER),
            Denied::SessionEnded { session: DRIVER },
        ),
    ];
    for (end, denied) in ends {
        let domain = domain(8, 0);
        let spec = LeaseSpec::of(2 * P);
        let granule = domain.layout().granule();
        let job = domain.lock().reserve_lease(granule, DRIVER, &spec);
        let mut made = Reservation::new(&domain, job.unwrap());
        assert_eq!(domain.usage().leases, tally(1, 2), "it is counted");
        let listed = domain.mappings(MappingFilter::default(), Iova::new(0), 9);
        assert_eq!(listed[0].phase, Phase::Reserved);
        assert_eq!(domain.lookup(pages(1, 2)), None, "and nobody sees it");
        device_floods(&domain, ApertureKind::Bounce, DIRT);

        end(&domain);
        assert_eq!(made.go_live(&mut domain.lock()), Err(denied));
        drop(made);

        domain.check_invariants();
        assert_eq!(domain.usage().leases, tally(0, 0));
        assert_eq!(domain.usage().bounce.used_bytes, 0);
        // What a reset could not zero then is zeroed when it is free.
        if denied == Denied::BounceReset {
            assert!(is_all(&domain, pages(1, 2), 0));
        }
    }
}
