//! B-08 poison_mode: memory that is freed is overwritten with a byte that no
//! zeroed memory holds, and so is memory that was never used. Whoever reads it
//! in a mapping has found a bug of ours.

use super::*;
use crate::aperture::POISON;
use crate::coherent::CoherentSpec;

fn poisoned() -> (Domain, Buffer) {
    let domain = poisoned_domain(8, 4);
    domain.join(DRIVER, Role::Driver).unwrap();
    domain.join(OTHER, Role::Driver).unwrap();
    let buffer = Buffer::register(&domain, DRIVER, 8);
    (domain, buffer)
}

fn is_poison(domain: &Domain, range: IovaRange) -> bool {
    seen(domain, range).iter().all(|byte| *byte == POISON)
}

fn apertures(domain: &Domain) -> [IovaRange; 2] {
    [ApertureKind::Bounce, ApertureKind::Coherent]
        .map(|kind| domain.aperture(kind).unwrap().range())
}

#[test]
fn memory_that_nobody_has_is_poison_from_the_beginning_and_again_at_the_end() {
    let (domain, buffer) = poisoned();
    let is_all_poison = || {
        apertures(&domain)
            .iter()
            .all(|range| is_poison(&domain, *range))
    };
    assert!(is_all_poison());

    for scrub in [Scrub::OnMap, Scrub::OnUnmap] {
        set_scrub(&domain, scrub);
        let spec = buffer.spec(3, 5000, Direction::Bidirectional);
        let mapped = map(&domain, DRIVER, spec).unwrap();
        let made = domain.alloc_coherent(DRIVER, &CoherentSpec::of(9)).unwrap();
        assert!(!is_all_poison());
        unmap(&domain, DRIVER, ending(mapped)).unwrap();
        domain.free_coherent(DRIVER, made.iova(), made.id).unwrap();
        assert!(is_all_poison(), "{scrub:?}");
    }
}

#[test]
fn no_mapping_and_no_allocation_shows_poison_in_any_byte_of_its_granules() {
    let (domain, buffer) = poisoned();
    for (direction, preserve, skip_sync) in DIRECTIONS
        .into_iter()
        .flat_map(|d| [(d, false, false), (d, true, false), (d, false, true)])
    {
        for (offset, len) in [(0, 1), (1, P), (P - 1, 2), (7, 2 * P)] {
            let spec = MapSpec {
                keep_offset: true,
                preserve,
                skip_sync,
                ..buffer.spec(offset, len, direction)
            };
            let mapped = map(&domain, DRIVER, spec).unwrap();
            let whole = granules(visible(mapped));
            let shown = !skip_sync && (preserve || direction != Direction::FromDevice);
            let mut expected = vec![0; size(whole.len_bytes().unwrap())];
            if shown {
                let lead = size(offset % P);
                expected[lead..lead + size(len)].copy_from_slice(&buffer.bytes(offset, len));
            }
            assert!(seen(&domain, whole) == expected, "{spec:?}");
            unmap(&domain, DRIVER, discarding(mapped)).unwrap();
        }
    }
    let made = domain
        .alloc_coherent(DRIVER, &CoherentSpec::of(P + 1))
        .unwrap();
    let zeroes = vec![0; size(2 * P)];
    assert_eq!(seen(&domain, granules(made.range)), zeroes);
}

#[test]
fn refused_maps_resets_and_ended_sessions_leave_poison() {
    let (domain, buffer) = poisoned();
    let [bounce, coherent] = apertures(&domain);
    let fits = buffer.spec(0, 2 * P, Direction::ToDevice);
    let batch = [fits, fits, fits, fits];
    domain
        .map(DRIVER, &batch, BatchMode::AllOrNothing)
        .unwrap_err();
    assert!(is_poison(&domain, bounce));

    map(&domain, DRIVER, fits).unwrap();
    domain.reset_bounce(Actor::Owner, true).unwrap();
    assert!(is_poison(&domain, bounce));

    map(&domain, DRIVER, fits).unwrap();
    domain.alloc_coherent(DRIVER, &CoherentSpec::of(1)).unwrap();
    domain.leave(DRIVER);
    assert!(is_poison(&domain, bounce) && is_poison(&domain, coherent));
}
