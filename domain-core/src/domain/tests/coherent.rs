//! Memory that both sides see all the time.

use super::*;
use crate::alloc::{AllocError, AllocRequest};
use crate::coherent::{AllocCoherentError, CoherentSpec, FreeCoherentError};
use crate::domain::{Behind, Translated};
use crate::mapping::MappingId;

fn persistent(len: u64) -> CoherentSpec {
    CoherentSpec {
        persistent: true,
        ..CoherentSpec::of(len)
    }
}

fn missing(refused: &FreeCoherentError) -> bool {
    matches!(
        refused,
        FreeCoherentError::Missing(MappingMissing::NoSuchMapping { .. })
    )
}

/// B-07 coherent_zero_on_alloc_and_free, the first half; D9.
#[test]
fn an_allocation_reads_zero_in_every_granule_after_dirty_use() {
    let domain = domain(4, 8);
    for len in [1, 100, P - 1, P, P + 1, 3 * P, 8 * P] {
        device_floods(&domain, ApertureKind::Coherent, DIRT);
        let made = domain
            .alloc_coherent(DRIVER, &CoherentSpec::of(len))
            .unwrap();
        let whole = granules(made.range);
        assert_eq!(
            seen(&domain, whole),
            vec![0; size(whole.len_bytes().unwrap())]
        );
        domain.free_coherent(DRIVER, made.iova(), made.id).unwrap();
    }
}

#[test]
fn making_and_freeing_an_allocation_zeroes_no_others_memory() {
    let domain = domain(4, 8);
    let made: Vec<_> = (0..3)
        .map(|_| domain.alloc_coherent(DRIVER, &CoherentSpec::of(P)).unwrap())
        .collect();
    for made in &made {
        device_writes(&domain, made.iova(), &pattern(P, 2));
    }

    domain
        .free_coherent(DRIVER, made[1].iova(), made[1].id)
        .unwrap();
    assert_eq!(seen(&domain, made[1].range), vec![0; size(P)]);
    domain.alloc_coherent(DRIVER, &CoherentSpec::of(P)).unwrap();

    assert_eq!(seen(&domain, made[0].range), pattern(P, 2));
    assert_eq!(seen(&domain, made[2].range), pattern(P, 2));
}

/// D9.
#[test]
fn an_allocation_lies_above_the_bounce_aperture_and_shows_its_exact_length() {
    for len in [1, 100, P, P + 1, 8 * P] {
        let domain = domain(4, 8);
        let made = domain
            .alloc_coherent(DRIVER, &CoherentSpec::of(len))
            .unwrap();
        let start = Iova::new(4 * P);
        let entry = Entry {
            range: IovaRange::from_len(start, len).unwrap(),
            target: Target {
                region: RegionId::COHERENT,
                offset_bytes: 0,
            },
            perm: Perm::ReadWrite,
        };
        assert_eq!(made.range, entry.range);
        assert_eq!(table(&domain).1, [entry]);
        let piece = Translated {
            range: entry.range,
            kind: MappingKind::Coherent,
            behind: Behind::Aperture(ApertureKind::Coherent),
            offset: 0,
            perm: entry.perm,
        };
        let (pieces, generation) = domain.translate(made.range, Perm::ReadWrite).unwrap();
        assert_eq!(pieces, [piece]);
        assert_eq!(generation, domain.usage().generation);
        let used = domain.usage().coherent_aperture.used_bytes;
        assert_eq!(used, len.next_multiple_of(P));
        domain.free_coherent(DRIVER, start, made.id).unwrap();
        assert_eq!(table(&domain).1, []);
    }
}

#[test]
fn two_allocations_never_share_a_granule() {
    let domain = domain(4, 8);
    let made: Vec<_> = (0..8)
        .map(|_| domain.alloc_coherent(DRIVER, &CoherentSpec::of(1)).unwrap())
        .collect();
    let starts: Vec<_> = made.iter().map(|made| made.iova().get()).collect();
    assert_eq!(starts, (4..12).map(|page| page * P).collect::<Vec<_>>());

    let full = domain
        .alloc_coherent(DRIVER, &CoherentSpec::of(1))
        .unwrap_err();
    assert!(
        matches!(
            full,
            AllocCoherentError::Alloc(AllocError::NoSpace {
                largest_hole_bytes: 0,
                ..
            })
        ),
        "{full}"
    );
}

#[test]
fn alignment_and_limit_hold_and_a_refusal_leaves_no_trace() {
    let domain = domain(4, 16);
    let place = |len_bytes, align_bytes, limit: Option<u64>| CoherentSpec {
        place: AllocRequest {
            len_bytes,
            align_bytes,
            limit: limit.map(Iova::new),
        },
        persistent: false,
    };
    let before = table(&domain);
    for wrong in [
        place(0, 0, None),
        place(P, 3, None),
        place(17 * P, 0, None),
        place(u64::MAX, 0, None),
        place(1, 1 << 63, None),
        place(2 * P, 0, Some(5 * P)),
        place(1, 0, Some(0)),
    ] {
        assert!(domain.alloc_coherent(DRIVER, &wrong).is_err(), "{wrong:?}");
        assert_eq!(table(&domain), before, "{wrong:?}");
    }

    let low = domain
        .alloc_coherent(DRIVER, &place(P, 0, Some(5 * P - 1)))
        .unwrap();
    assert_eq!(low.iova(), Iova::new(4 * P));
    let aligned = domain
        .alloc_coherent(DRIVER, &place(1, 16 * P, None))
        .unwrap();
    assert_eq!(aligned.iova(), Iova::new(16 * P));
}

#[test]
fn a_free_needs_the_exact_name() {
    let domain = domain(4, 8);
    let buffer = Buffer::register(&domain, DRIVER, 1);
    let made = domain
        .alloc_coherent(DRIVER, &CoherentSpec::of(2 * P))
        .unwrap();
    let streaming = map(&domain, DRIVER, buffer.spec(0, 1, Direction::ToDevice)).unwrap();
    let before = table(&domain);
    let beside = |bytes| made.iova().checked_add(bytes).unwrap();

    for (iova, id) in [
        (beside(1), made.id),
        (beside(P), made.id),
        (Iova::new(made.iova().get() - 1), made.id),
        (made.iova(), MappingId::new(made.id.get() + 1)),
        (made.iova(), streaming.id),
        (streaming.iova, streaming.id),
    ] {
        let refused = domain.free_coherent(DRIVER, iova, id).unwrap_err();
        assert!(missing(&refused), "{refused}");
    }
    let foreign = domain
        .free_coherent(OTHER, made.iova(), made.id)
        .unwrap_err();
    assert!(
        matches!(
            foreign,
            FreeCoherentError::Missing(MappingMissing::NotYours { .. })
        ),
        "{foreign}"
    );
    assert_eq!(table(&domain), before);

    domain.free_coherent(DRIVER, made.iova(), made.id).unwrap();
    let again = domain
        .free_coherent(DRIVER, made.iova(), made.id)
        .unwrap_err();
    assert!(missing(&again), "{again}");
}

#[test]
fn an_allocation_is_no_streaming_mapping() {
    let domain = domain(4, 8);
    let made = domain.alloc_coherent(DRIVER, &CoherentSpec::of(P)).unwrap();
    let as_mapping = Mapped {
        id: made.id,
        iova: made.iova(),
        len_bytes: P,
    };

    assert!(unmap(&domain, DRIVER, discarding(as_mapping)).is_err());
    let request = part(as_mapping, 0, 1, SyncTarget::ForCpu);
    assert!(sync(&domain, DRIVER, request).is_err());
    assert_eq!(domain.usage().coherent, 1);
}

/// B-07 coherent_zero_on_alloc_and_free, the second half.
#[test]
fn the_end_of_a_session_frees_and_zeroes_its_allocations_only() {
    let domain = domain(4, 8);
    let gone = domain.alloc_coherent(DRIVER, &CoherentSpec::of(P)).unwrap();
    let stays = domain.alloc_coherent(OTHER, &CoherentSpec::of(P)).unwrap();
    device_floods(&domain, ApertureKind::Coherent, INTRUSION);

    domain.leave(DRIVER);

    assert_eq!(domain.lookup(gone.range), None);
    assert_eq!(seen(&domain, gone.range), vec![0; size(P)]);
    assert_eq!(seen(&domain, stays.range), vec![INTRUSION; size(P)]);
    assert_eq!(domain.usage().coherent, 1);
    domain.check_invariants();
}

#[test]
fn a_persistent_allocation_survives_its_session_and_any_driver_frees_it() {
    let domain = domain(4, 8);
    let made = domain.alloc_coherent(DRIVER, &persistent(100)).unwrap();
    device_writes(&domain, made.iova(), &pattern(100, 2));
    assert_eq!(domain.holdings(DRIVER).unwrap().coherent, 0);

    domain.leave(DRIVER);

    assert_eq!(seen(&domain, made.range), pattern(100, 2));
    assert!(domain.translate(made.range, Perm::ReadWrite).is_ok());
    assert_eq!(domain.usage().coherent, 1);
    domain.check_invariants();
    let device = domain.free_coherent(DEVICE, made.iova(), made.id);
    assert!(matches!(
        device,
        Err(FreeCoherentError::Denied(Denied::WrongRole { .. }))
    ));
    domain.free_coherent(OTHER, made.iova(), made.id).unwrap();
    assert_eq!(domain.usage().coherent_aperture.used_bytes, 0);
}
