//! Leases that somebody may still use when they have ended.

use super::*;
use crate::lease::{LeaseBytesExceeded, LeaseError, LeaseSpec, Leased};

fn lease(domain: &Domain, session: SessionId, pages: u64) -> Leased {
    let leased = domain.lease(session, &LeaseSpec::of(pages * P)).unwrap();
    domain.check_invariants();
    leased
}

fn join_driver(domain: &Domain, session: SessionId, fake: &Arc<Fake>) {
    domain
        .join(session, reading(Role::Driver, 7, fake))
        .unwrap();
}

#[test]
fn a_released_lease_is_nobodys_until_all_have_acknowledged_and_zero_then() {
    let domain = served();
    join_by_frames(&domain, FIRST);
    let leased = lease(&domain, DRIVER, 7);
    device_floods(&domain, ApertureKind::Bounce, INTRUSION);

    let removal = domain
        .release_lease(DRIVER, leased.iova(), leased.id)
        .unwrap();

    domain.check_invariants();
    assert_eq!(domain.progress(removal), waiting(&[FIRST]));
    assert_eq!(limbo(&domain), [(leased.range, Phase::Invalidating, None)]);
    assert_eq!(domain.usage().leases.count, 0);
    assert!(domain.awaits_iovas().is_some());
    assert!(domain.lease(DRIVER, &LeaseSpec::of(1)).is_err());
    ack(&domain, FIRST, removal.generation);
    assert_eq!(domain.progress(removal), Progress::Done);
    assert!(seen(&domain, leased.range).iter().all(|byte| *byte == 0));
    lease(&domain, DRIVER, 7);
}

#[test]
fn what_waits_counts_against_the_bytes_that_its_session_may_hold() {
    let domain = served();
    join_by_frames(&domain, FIRST);
    let quotas = Quotas {
        lease_bytes: 3 * P,
        ..Quotas::default()
    };
    set_quotas(&domain, quotas).unwrap();
    let leased = lease(&domain, DRIVER, 2);
    domain
        .release_lease(DRIVER, leased.iova(), leased.id)
        .unwrap();
    let bytes = LeaseBytesExceeded {
        limit: 3 * P,
        used: 2 * P,
        want: 2 * P,
    };
    let spec = LeaseSpec::of(2 * P);
    assert_eq!(domain.lease(DRIVER, &spec), Err(LeaseError::Bytes(bytes)));
    ack_all(&domain, FIRST);
    lease(&domain, DRIVER, 2);
}

#[test]
fn a_lease_that_a_ghost_can_reach_stays_in_quarantine_until_it_is_gone() {
    let domain = served();
    let fake = Fake::pins();
    join_driver(&domain, FIRST, &fake);
    let own = lease(&domain, FIRST, 2);
    let theirs = lease(&domain, DRIVER, 1);
    device_floods(&domain, ApertureKind::Bounce, INTRUSION);

    fence(&domain, FIRST);
    domain
        .release_lease(DRIVER, theirs.iova(), theirs.id)
        .unwrap();

    let held = [own, theirs].map(|lease| (lease.range, Phase::Quarantined, Some(FIRST)));
    assert_eq!(limbo(&domain), held);
    let quarantined = domain.usage().quarantined;
    assert_eq!((quarantined.mappings, quarantined.bytes), (2, 3 * P));
    // What was made since it does not reach.
    let young = lease(&domain, DRIVER, 1);
    domain
        .release_lease(DRIVER, young.iova(), young.id)
        .unwrap();
    assert_eq!(limbo(&domain), held);
    leave(&domain, FIRST);
    for lease in [own, theirs] {
        assert!(seen(&domain, lease.range).iter().all(|byte| *byte == 0));
    }
    assert_all_is_free(&domain);
}

/// What the bounce pool of a client lives by.
#[test]
fn a_reset_tells_each_owner_once_before_it_asks_and_a_release_tells_nobody() {
    let domain = served();
    let (owner, other, reader) = (Fake::pins(), Fake::frames(), Fake::pins());
    join_driver(&domain, FIRST, &owner);
    join_driver(&domain, SECOND, &other);
    join_driver(&domain, LATER, &reader);
    let released = lease(&domain, FIRST, 1);
    let before = generation(&domain);
    owner.pin(before);
    domain
        .release_lease(FIRST, released.iova(), released.id)
        .unwrap();
    assert_eq!(owner.revoked(), []);
    owner.unpin();
    ack_all(&domain, FIRST);
    ack_all(&domain, SECOND);
    let leases = [FIRST, FIRST, SECOND].map(|who| lease(&domain, who, 1));
    owner.pin(generation(&domain));
    let _before = (owner.asked(), other.asked());

    let reset = domain.reset_bounce(Actor::Owner, true).unwrap();

    domain.check_invariants();
    assert_eq!(reset.ended_leases, leases.len());
    // Told when nobody had been asked yet.
    assert_eq!((owner.revoked(), other.revoked()), (vec![0], vec![0]));
    assert_eq!(reader.revoked(), [], "it held none");
    let asked = [reset.removal.generation];
    assert_eq!((owner.asked(), other.asked()), (asked.into(), asked.into()));
    assert_eq!(domain.progress(reset.removal), waiting(&[FIRST, SECOND]));
    ack_all(&domain, FIRST);
    ack_all(&domain, SECOND);
    assert_all_is_free(&domain);
}
