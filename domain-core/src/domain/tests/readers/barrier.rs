//! Leases that are taken away are asked for: their owner's pins may have no fence.

use super::*;
use crate::lease::LeaseSpec;

#[test]
fn who_loses_a_lease_is_asked_although_nothing_is_seen_to_be_pinned() {
    let domain = served();
    let others = join_by_pins(&domain, FIRST);
    let fake = Fake::pins();
    domain.join(OTHER, reading(Role::Driver, 7, &fake)).unwrap();
    let leased = domain.lease(OTHER, &LeaseSpec::of(P)).unwrap();

    let removal = domain.reset_bounce(Actor::Owner, true).unwrap().removal;

    assert_eq!(fake.asked(), [removal.generation]);
    assert_eq!(others.asked(), [], "who had none is looked at");
    assert_eq!(domain.progress(removal), waiting(&[OTHER]));
    let waits = limbo(&domain).into_iter().map(|(range, ..)| range);
    assert_eq!(waits.collect::<Vec<_>>(), [leased.range]);
    // Others' removals do not say it for it either.
    let made = alloc(&domain, 1).unwrap();
    let later = free(&domain, made);
    assert_eq!(domain.progress(removal), waiting(&[OTHER]));
    ack(&domain, OTHER, later.generation);
    assert_eq!(domain.progress(removal), Progress::Done);
    assert_all_is_free(&domain);
}

#[test]
fn once_it_has_said_so_it_is_looked_at_again() {
    let domain = served();
    let fake = Fake::pins();
    domain.join(OTHER, reading(Role::Driver, 7, &fake)).unwrap();
    domain.lease(OTHER, &LeaseSpec::of(P)).unwrap();
    let removal = domain.reset_bounce(Actor::Owner, true).unwrap().removal;
    ack(&domain, OTHER, removal.generation);
    fake.asked();

    let made = alloc(&domain, 1).unwrap();
    let removal = free(&domain, made);

    assert_eq!(fake.asked(), []);
    assert_eq!(domain.progress(removal), Progress::Done);
}

/// A lease that its owner gives back is none that is taken away.
#[test]
fn who_releases_a_lease_is_not_asked() {
    let domain = served();
    let fake = Fake::pins();
    domain.join(OTHER, reading(Role::Driver, 7, &fake)).unwrap();
    let leased = domain.lease(OTHER, &LeaseSpec::of(P)).unwrap();

    let removal = domain.release_lease(OTHER, leased.iova(), leased.id);

    assert_eq!(fake.asked(), []);
    assert_eq!(domain.progress(removal.unwrap()), Progress::Done);
}
