//! The bounce aperture is taken back (D11), also from whoever is copying.

use super::steps::{copy, copy_back, draining, ended, filled, go_live, reserved, syncing};
use super::*;
use crate::coherent::CoherentSpec;
use crate::domain::ResetError;
use crate::mapping::Phase;

fn fixture() -> (Domain, Buffer, MapSpec) {
    let domain = domain(8, 8);
    let buffer = Buffer::register(&domain, DRIVER, 1);
    let spec = buffer.spec(0, 100, Direction::Bidirectional);
    (domain, buffer, spec)
}

fn forced(domain: &Domain) -> usize {
    let ended = domain.reset_bounce(Actor::Owner, true).unwrap();
    let ended = ended.ended_mappings;
    domain.check_invariants();
    ended
}

/// All of the bounce aperture, the granule that nobody is given included.
fn assert_bounce_is_zero(domain: &Domain) {
    let aperture = domain.aperture(ApertureKind::Bounce).unwrap().range();
    assert!(seen(domain, aperture).iter().all(|byte| *byte == 0));
}

fn assert_nothing_streams(domain: &Domain) {
    domain.check_invariants();
    let usage = domain.usage();
    assert_eq!((usage.streaming, usage.bounce.used_bytes), (0, 0));
    assert_eq!(domain.memories(MemoryId::new(0), 1)[0].mappings, 0);
    assert_bounce_is_zero(domain);
}

fn missing<T: std::fmt::Debug>(answer: &Result<T, UnmapError>) -> bool {
    matches!(
        answer,
        Err(UnmapError::Missing(MappingMissing::NoSuchMapping { .. }))
    )
}

/// D11.
#[test]
fn a_reset_ends_what_streams_zeroes_the_aperture_and_keeps_all_else() {
    let (domain, buffer, spec) = fixture();
    let theirs = Buffer::register(&domain, OTHER, 1);
    let mapped = [0, 1].map(|_| map(&domain, DRIVER, spec).unwrap());
    map(&domain, OTHER, theirs.spec(0, P, Direction::FromDevice)).unwrap();
    let made = domain.alloc_coherent(OTHER, &CoherentSpec::of(P)).unwrap();
    let direct = map_direct(&domain, AS_DRIVER, buffer.at(100 * P, 1)).unwrap();
    device_floods(&domain, ApertureKind::Bounce, DIRT);
    device_floods(&domain, ApertureKind::Coherent, INTRUSION);
    let before = domain.usage();

    assert_eq!(forced(&domain), 3);

    assert_nothing_streams(&domain);
    assert_eq!(buffer.all(), pattern(P, 1), "nothing flows back");
    assert_eq!(theirs.all(), pattern(P, 1));
    assert_eq!(seen(&domain, made.range), vec![INTRUSION; size(P)]);
    assert!(domain.translate(made.range, Perm::ReadWrite).is_ok());
    assert_eq!(direct_table(&domain), [direct]);
    let usage = domain.usage();
    assert_eq!(usage.direct_generation, before.direct_generation);
    assert!(usage.generation > before.generation);
    for mapped in mapped {
        assert_eq!(domain.lookup(visible(mapped)), None);
        assert!(missing(&unmap(&domain, DRIVER, ending(mapped))));
        let request = part(mapped, 0, 1, SyncTarget::ForCpu);
        assert!(sync(&domain, DRIVER, request).is_err());
    }
    assert_eq!(domain.holdings(DRIVER).unwrap().streaming, 0);
    // Life goes on, under names of its own.
    let again = map(&domain, DRIVER, spec).unwrap();
    assert!(mapped.iter().all(|old| old.id != again.id));
    assert_eq!(seen(&domain, visible(again)), pattern(100, 1));
    unmap(&domain, DRIVER, ending(again)).unwrap();
}

#[test]
fn a_reset_is_refused_while_drivers_hold_mappings_unless_it_is_forced() {
    let (domain, buffer, spec) = fixture();
    let mapped = map(&domain, DRIVER, spec).unwrap();
    let before = dump(&domain);
    for actor in [Actor::Owner, AS_DRIVER, AS_OTHER] {
        let in_use = ResetError::InUse {
            streaming: 1,
            leases: 0,
        };
        assert_eq!(domain.reset_bounce(actor, false), Err(in_use));
        assert_eq!(dump(&domain), before);
        assert_eq!(seen(&domain, visible(mapped)), pattern(100, 1));
    }
    unmap(&domain, DRIVER, ending(mapped)).unwrap();
    device_floods(&domain, ApertureKind::Bounce, DIRT);
    map_direct(&domain, AS_DRIVER, buffer.at(100 * P, 1)).unwrap();
    domain.alloc_coherent(DRIVER, &CoherentSpec::of(1)).unwrap();

    assert_eq!(
        domain.reset_bounce(AS_OTHER, false).unwrap().ended_mappings,
        0
    );

    assert_bounce_is_zero(&domain);
    assert_eq!((domain.usage().direct, domain.usage().coherent), (1, 1));
}

#[test]
fn a_reset_is_for_drivers_and_owners_of_a_domain_with_a_bounce_aperture() {
    let (domain, _buffer, spec) = fixture();
    map(&domain, DRIVER, spec).unwrap();
    let before = dump(&domain);
    let stranger = SessionId::new(99);
    for (session, denied) in [
        (
            DEVICE,
            Denied::WrongRole {
                session: DEVICE,
                role: Role::Device,
            },
        ),
        (stranger, Denied::SessionEnded { session: stranger }),
    ] {
        let refused = domain.reset_bounce(Actor::Session(session), true);
        assert_eq!(refused, Err(ResetError::Denied(denied)));
    }
    assert_eq!(dump(&domain), before);
    let none = super::domain(0, 8).reset_bounce(Actor::Owner, true);
    assert_eq!(none, Err(ResetError::NoAperture));
    domain.close(Close::Force).unwrap();
    let closed = domain.reset_bounce(Actor::Owner, true);
    assert_eq!(closed, Err(ResetError::Denied(Denied::DomainClosed)));
}

#[test]
fn a_map_under_way_during_a_reset_is_refused_and_leaves_nothing() {
    for is_filled in [false, true] {
        let (domain, buffer, spec) = fixture();
        device_floods(&domain, ApertureKind::Bounce, DIRT);
        let made = match is_filled {
            true => filled(&domain, spec),
            false => reserved(&domain, spec),
        };
        let in_use = ResetError::InUse {
            streaming: 1,
            leases: 0,
        };
        assert_eq!(domain.reset_bounce(Actor::Owner, false), Err(in_use));

        assert_eq!(forced(&domain), 1);
        // It is still being copied to: nobody may be given it.
        assert_eq!(domain.usage().bounce.used_bytes, P);

        let refused = go_live(made).unwrap_err();
        assert!(
            matches!(refused, MapError::Denied(Denied::BounceReset)),
            "{refused}"
        );
        assert_nothing_streams(&domain);
        assert_eq!(buffer.all(), pattern(P, 1));
        let again = map(&domain, DRIVER, spec).unwrap();
        assert_eq!(again.iova, Iova::new(P));
    }
}

/// The copy in of a request fails, and a reset has passed meanwhile.
#[test]
fn a_map_that_is_given_up_after_a_reset_leaves_zeroes() {
    let (domain, _buffer, spec) = fixture();
    device_floods(&domain, ApertureKind::Bounce, DIRT);
    let made = reserved(&domain, spec);

    forced(&domain);

    drop(made);
    assert_nothing_streams(&domain);
}

#[test]
fn an_unmap_under_way_during_a_reset_copies_back_and_frees_zeroed() {
    let (domain, buffer, spec) = fixture();
    let mapped = map(&domain, DRIVER, spec).unwrap();
    let mut unmapping = draining(&domain, ending(mapped));
    device_floods(&domain, ApertureKind::Bounce, INTRUSION);

    assert_eq!(forced(&domain), 1);
    assert_eq!(domain.usage().bounce.used_bytes, P);
    assert_eq!(seen(&domain, visible(mapped)), vec![INTRUSION; 100]);

    copy_back(&mut unmapping).unwrap();
    assert_eq!(ended(&domain, unmapping), 100);
    assert_eq!(buffer.bytes(0, 100), vec![INTRUSION; 100]);
    assert_nothing_streams(&domain);
}

#[test]
fn an_unmap_whose_copy_back_fails_after_a_reset_frees() {
    let (domain, buffer, spec) = fixture();
    let mapped = map(&domain, DRIVER, spec).unwrap();
    let mut unmapping = draining(&domain, ending(mapped));
    buffer.seal_against_writing();

    forced(&domain);

    assert!(copy_back(&mut unmapping).is_err());
    drop(unmapping);
    assert_nothing_streams(&domain);
    assert!(missing(&unmap(&domain, DRIVER, ending(mapped))));
}

#[test]
fn a_sync_under_way_during_a_reset_keeps_its_granules_until_it_ends() {
    for target in [SyncTarget::ForCpu, SyncTarget::ForDevice] {
        let (domain, _buffer, spec) = fixture();
        let mapped = map(&domain, DRIVER, spec).unwrap();
        let whole = part(mapped, 0, 100, target);
        let (one, mut another) = (syncing(&domain, whole), syncing(&domain, whole));

        assert_eq!(forced(&domain), 1);

        assert_eq!(domain.lookup(visible(mapped)), None);
        assert!(missing(&unmap(&domain, DRIVER, discarding(mapped))));
        let listed = domain.mappings(MappingFilter::default(), Iova::new(0), 9);
        assert_eq!(listed[0].phase, Phase::Draining);
        let elsewhere = map(&domain, DRIVER, spec).unwrap();
        assert_ne!(elsewhere.iova, mapped.iova);
        unmap(&domain, DRIVER, ending(elsewhere)).unwrap();
        device_floods(&domain, ApertureKind::Bounce, 0);
        drop(one);
        domain.check_invariants();
        assert_eq!(domain.usage().bounce.used_bytes, P);
        copy(&mut another);
        drop(another);
        assert_nothing_streams(&domain);
    }
}

#[test]
fn a_session_that_leaves_after_a_reset_in_its_call_leaves_nothing() {
    let (domain, _buffer, spec) = fixture();
    let stays = Buffer::register(&domain, OTHER, 1);
    let mapped = map(&domain, DRIVER, spec).unwrap();
    let unmapping = draining(&domain, ending(mapped));
    let mapping = filled(&domain, spec);
    let synced = map(&domain, DRIVER, spec).unwrap();
    let syncing = syncing(&domain, part(synced, 0, 9, SyncTarget::ForCpu));

    forced(&domain);
    domain.leave(DRIVER);
    domain.check_invariants();
    assert_eq!(domain.usage().streaming, 3);

    drop(unmapping);
    drop(syncing);
    let _ = go_live(mapping);
    assert_nothing_streams(&domain);
    assert_eq!(domain.memories(stays.id, 1)[0].mappings, 0);
}

#[test]
fn a_second_reset_leaves_what_is_in_transit_to_who_moves_it() {
    let (domain, _buffer, spec) = fixture();
    let mapped = map(&domain, DRIVER, spec).unwrap();
    let ended = draining(&domain, ending(mapped));
    assert_eq!(forced(&domain), 1);
    assert_eq!(forced(&domain), 1);
    drop(ended);
    assert_nothing_streams(&domain);
    assert_eq!(forced(&domain), 0);
}

/// What is not in transit is not concerned by the next reset.
#[test]
fn what_is_mapped_after_a_reset_is_put_back_if_its_unmap_fails() {
    let (domain, buffer, spec) = fixture();
    forced(&domain);
    let mapped = map(&domain, DRIVER, spec).unwrap();
    buffer.seal_against_writing();
    assert!(unmap(&domain, DRIVER, ending(mapped)).is_err());
    assert!(domain.lookup(visible(mapped)).is_some());
    unmap(&domain, DRIVER, discarding(mapped)).unwrap();
}

#[test]
fn an_aperture_away_from_zero_is_zeroed_from_its_first_to_its_last_byte() {
    // More than one step of the scrubbing, and not a multiple of it.
    let layout = LayoutSpec {
        bounce_bytes: 37 * P,
        coherent_bytes: 0,
        aperture_base: 1 << 32,
        ..LayoutSpec::default()
    };
    let layout = layout.plan().unwrap();
    let domain = Domain::create("high", layout, Settings::default(), ScrubWith::Zero).unwrap();
    domain.join(DRIVER, Role::Driver).unwrap();
    let buffer = Buffer::register(&domain, DRIVER, 8);
    let held: Vec<_> = (1..8)
        .map(|len| {
            map(
                &domain,
                DRIVER,
                buffer.spec(0, len * P, Direction::ToDevice),
            )
            .unwrap()
        })
        .collect();
    for mapped in held.iter().step_by(2) {
        unmap(&domain, DRIVER, ending(*mapped)).unwrap();
    }
    device_floods(&domain, ApertureKind::Bounce, DIRT);
    assert_eq!(forced(&domain), 3);
    assert_nothing_streams(&domain);
}

/// Many threads map and unmap while the owner resets again and again.
#[test]
fn resets_amid_maps_and_unmaps_leave_nothing_and_break_nothing() {
    let domain = domain(64, 0);
    std::thread::scope(|scope| {
        let workers: Vec<_> = [DRIVER, OTHER]
            .into_iter()
            .map(|session| {
                let domain = &domain;
                scope.spawn(move || {
                    let buffer = Buffer::register(domain, session, 4);
                    for round in 0..400 {
                        let len = round * 911 % (3 * P) + 1;
                        let spec = buffer.spec(1, len, Direction::Bidirectional);
                        match map(domain, session, spec) {
                            Ok(mapped) => {
                                let request = part(mapped, 0, len, SyncTarget::ForCpu);
                                let _ = sync(domain, session, request);
                                let ended = unmap(domain, session, ending(mapped));
                                assert!(ended.is_ok() || missing(&ended), "{ended:?}");
                            }
                            Err(MapError::Denied(Denied::BounceReset)) => (),
                            Err(refused) => panic!("{refused}"),
                        }
                    }
                })
            })
            .collect();
        while workers.iter().any(|worker| !worker.is_finished()) {
            forced(&domain);
            std::thread::sleep(std::time::Duration::from_micros(200));
        }
    });
    forced(&domain);
    assert_nothing_streams(&domain);
}
