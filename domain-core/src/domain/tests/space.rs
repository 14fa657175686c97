//! Which iovas a mapping gets, and what a refusal says.

use super::*;
use crate::alloc::AllocError;
use crate::iotlb::TranslateError;
use crate::mapping::{MappingFilter, MappingKind, Source, ViewKind};

use crate::region::SpanError;

/// A MiB at 0: 256 pages, of which page 0 is kept back.
fn mib() -> (Domain, Buffer) {
    let domain = domain(256, 0);
    let buffer = Buffer::register(&domain, DRIVER, 256);
    (domain, buffer)
}

fn full(refused: &MapError, largest_hole: u64) -> bool {
    matches!(refused, MapError::Alloc(AllocError::NoSpace { largest_hole_bytes, .. })
        if *largest_hole_bytes == largest_hole)
}

/// D3.
#[test]
fn a_mib_takes_255_pages_and_one_more_for_each_that_is_freed() {
    let (domain, buffer) = mib();
    let spec = buffer.spec(0, 1, Direction::FromDevice);
    let mapped: Vec<_> = (0..255)
        .map(|_| map(&domain, DRIVER, spec).unwrap())
        .collect();

    let refused = map(&domain, DRIVER, spec).unwrap_err();
    assert!(full(&refused, 0), "{refused}");
    assert!(mapped.iter().all(|mapped| mapped.iova.get() >= P));
    let occupancy = domain.usage().bounce;
    assert_eq!(
        (occupancy.used_bytes, occupancy.largest_hole_bytes),
        (255 * P, 0)
    );

    unmap(&domain, DRIVER, written(mapped[100], 1)).unwrap();
    assert_eq!(map(&domain, DRIVER, spec).unwrap().iova, mapped[100].iova);
    assert!(full(&map(&domain, DRIVER, spec).unwrap_err(), 0));
    domain.check_invariants();
}

/// D3.
#[test]
fn one_mapping_may_be_as_large_as_the_largest_hole_and_no_larger() {
    let (domain, buffer) = mib();
    let all = domain.usage().bounce.largest_hole_bytes;
    assert_eq!(all, 255 * P);

    let refused = map(
        &domain,
        DRIVER,
        buffer.spec(0, all + 1, Direction::ToDevice),
    )
    .unwrap_err();
    assert!(full(&refused, all), "{refused}");
    // The same length does not fit if it takes a granule more.
    let shifted = MapSpec {
        keep_offset: true,
        ..buffer.spec(1, all, Direction::ToDevice)
    };
    assert!(full(&map(&domain, DRIVER, shifted).unwrap_err(), all));

    let mapped = map(&domain, DRIVER, buffer.spec(0, all, Direction::ToDevice)).unwrap();
    assert_eq!(seen(&domain, visible(mapped)), pattern(all, 1));
}

/// D3.
#[test]
fn fifteen_mappings_of_seventeen_pages_fill_a_mib() {
    let (domain, buffer) = mib();
    let spec = buffer.spec(0, 17 * P, Direction::ToDevice);
    let mapped: Vec<_> = (0..15)
        .map(|_| map(&domain, DRIVER, spec).unwrap())
        .collect();

    assert!(full(&map(&domain, DRIVER, spec).unwrap_err(), 0));
    for (at, one) in mapped.iter().enumerate() {
        let others = &mapped[at + 1..];
        assert!(others.iter().all(|o| !visible(*one).overlaps(visible(*o))));
    }
}

/// D4.
#[test]
fn an_alignment_holds_for_the_first_granule() {
    let (domain, buffer) = mib();
    for pages in 1..=64_u64 {
        let align_bytes = pages.next_power_of_two() * P;
        let spec = MapSpec {
            align_bytes,
            keep_offset: true,
            ..buffer.spec(7, pages * P - 7, Direction::ToDevice)
        };
        let mapped = map(&domain, DRIVER, spec).unwrap();
        assert_eq!(mapped.iova.get() % align_bytes, 7);
        unmap(&domain, DRIVER, ending(mapped)).unwrap();
    }
    let odd = MapSpec {
        align_bytes: 3 * P,
        ..buffer.spec(0, P, Direction::ToDevice)
    };
    let refused = map(&domain, DRIVER, odd).unwrap_err();
    assert!(
        matches!(
            refused,
            MapError::Alloc(AllocError::BadAlignment { align_bytes: 12288 })
        ),
        "{refused}"
    );
}

#[test]
fn no_byte_lies_above_a_limit() {
    let (domain, buffer) = mib();
    // Ends inside page 5: pages 1 to 4 may be used.
    let limited = |len| MapSpec {
        limit: Some(Iova::new(5 * P + 100)),
        ..buffer.spec(0, len, Direction::ToDevice)
    };

    let refused = map(&domain, DRIVER, limited(4 * P + 1)).unwrap_err();
    assert!(full(&refused, 4 * P), "{refused}");
    let mapped = map(&domain, DRIVER, limited(4 * P)).unwrap();
    assert_eq!(visible(mapped).last(), Iova::new(5 * P - 1));
    assert!(full(&map(&domain, DRIVER, limited(1)).unwrap_err(), 0));
}

#[test]
fn a_refused_map_leaves_no_trace_and_its_correction_gets_the_same_address() {
    let domain = domain(8, 0);
    let buffer = Buffer::register(&domain, DRIVER, 8);
    let foreign = Buffer::register(&domain, OTHER, 1);
    let good = buffer.spec(0, 2 * P, Direction::ToDevice);
    let fresh = table(&domain);
    let first = map(&domain, DRIVER, good).unwrap().iova;
    domain.leave(DRIVER);

    domain.join(DRIVER, Role::Driver).unwrap();
    let buffer = Buffer::register(&domain, DRIVER, 8);
    let good = MapSpec {
        memory: buffer.id,
        ..good
    };
    let wrong = [
        MapSpec {
            memory: MemoryId::new(99),
            ..good
        },
        MapSpec {
            memory: foreign.id,
            ..good
        },
        MapSpec {
            len_bytes: 0,
            ..good
        },
        MapSpec {
            offset: 7 * P,
            ..good
        },
        MapSpec {
            offset: u64::MAX,
            ..good
        },
        MapSpec {
            len_bytes: u64::MAX,
            offset: 1,
            ..good
        },
        MapSpec {
            len_bytes: 8 * P,
            ..good
        },
        MapSpec {
            align_bytes: 5,
            ..good
        },
        MapSpec {
            align_bytes: 1 << 63,
            ..good
        },
        MapSpec {
            limit: Some(Iova::new(0)),
            ..good
        },
    ];
    for spec in wrong {
        let before = table(&domain);
        assert!(map(&domain, DRIVER, spec).is_err(), "{spec:?}");
        assert_eq!(table(&domain), before, "{spec:?}");
        domain.check_invariants();

        let corrected = map(&domain, DRIVER, good).unwrap();
        assert_eq!(corrected.iova, first, "{spec:?}");
        unmap(&domain, DRIVER, ending(corrected)).unwrap();
    }
    assert_eq!(domain.usage().bounce, fresh.0.bounce);
}

#[test]
fn spans_that_are_empty_or_leave_the_memory_are_refused_with_their_numbers() {
    let domain = domain(8, 0);
    let buffer = Buffer::register(&domain, DRIVER, 2);
    let try_map = |offset, len| {
        let spec = buffer.spec(offset, len, Direction::ToDevice);
        map(&domain, DRIVER, spec).unwrap_err()
    };

    let empty = try_map(0, 0);
    assert!(matches!(empty, MapError::Span(SpanError::Empty)), "{empty}");
    for (offset, len) in [(0, 2 * P + 1), (2 * P, 1), (P + 1, P), (u64::MAX, 2)] {
        let outside = try_map(offset, len);
        let numbers = SpanError::OutsideMemory {
            offset,
            len,
            size: 2 * P,
        };
        assert!(
            matches!(outside, MapError::Span(span) if span == numbers),
            "{outside}"
        );
    }
    // Up to the last byte is fine.
    map(
        &domain,
        DRIVER,
        buffer.spec(2 * P - 1, 1, Direction::ToDevice),
    )
    .unwrap();
}

#[test]
fn without_an_aperture_there_is_nothing_to_map_or_allocate_in() {
    let domain = domain(0, 2);
    let buffer = Buffer::register(&domain, DRIVER, 1);
    let refused = map(&domain, DRIVER, buffer.spec(0, 1, Direction::ToDevice)).unwrap_err();
    assert!(matches!(refused, MapError::NoAperture), "{refused}");
    assert_eq!(domain.usage().bounce, Occupancy::default());

    let domain = super::domain(2, 0);
    let spec = crate::coherent::CoherentSpec::of(1);
    let refused = domain.alloc_coherent(DRIVER, &spec).unwrap_err();
    assert_eq!(refused, crate::coherent::AllocCoherentError::NoAperture);
    assert_eq!(domain.usage().coherent_aperture, Occupancy::default());
}

/// D2.
#[test]
fn a_fresh_domain_translates_nothing() {
    let domain = domain(8, 8);
    for at in [0, P, 8 * P, 16 * P, u64::MAX] {
        let range = IovaRange::from_len(Iova::new(at), 1).unwrap();
        assert_eq!(domain.lookup(range), None);
        let hole = TranslateError::Hole { at: Iova::new(at) };
        assert_eq!(domain.translate(range, Perm::Read), Err(hole.into()));
    }
}

#[test]
fn a_translation_stops_at_the_exact_end_and_at_too_little_permission() {
    let domain = domain(8, 0);
    let buffer = Buffer::register(&domain, DRIVER, 2);
    let mapped = map(&domain, DRIVER, buffer.spec(0, 100, Direction::ToDevice)).unwrap();
    let inside = visible(mapped);

    let (pieces, _) = domain.translate(inside, Perm::Read).unwrap();
    assert_eq!(pieces.len(), 1);
    assert_eq!(pieces[0].range, inside);

    let longer = IovaRange::from_len(mapped.iova, 101).unwrap();
    let end = inside.last().checked_add(1).unwrap();
    assert_eq!(
        domain.translate(longer, Perm::Read),
        Err(TranslateError::Hole { at: end }.into())
    );
    for want in [Perm::Write, Perm::ReadWrite] {
        assert_eq!(
            domain.translate(inside, want),
            Err(TranslateError::Perm {
                range: inside,
                perm: Perm::Read,
                want
            }
            .into())
        );
    }
}

#[test]
fn a_listing_begins_with_the_mapping_that_starts_at_its_from() {
    let domain = domain(16, 4);
    let buffer = Buffer::register(&domain, DRIVER, 4);
    let spec = MapSpec {
        keep_offset: true,
        ..buffer.spec(100, P, Direction::ToDevice)
    };
    let mapped: Vec<_> = (0..3)
        .map(|_| map(&domain, DRIVER, spec).unwrap())
        .collect();
    let starts = |from, max| -> Vec<Iova> {
        let listed = domain.mappings(MappingFilter::default(), from, max);
        listed.iter().map(|view| view.visible.start()).collect()
    };
    let iovas: Vec<_> = mapped.iter().map(|mapped| mapped.iova).collect();

    assert_eq!(starts(Iova::new(0), 9), iovas);
    assert_eq!(starts(Iova::new(0), 2), iovas[..2]);
    assert_eq!(starts(iovas[1], 9), iovas[1..]);
    // A page of a listing goes on behind the last one that was shown.
    assert_eq!(starts(iovas[1].checked_add(1).unwrap(), 9), iovas[2..]);
    assert_eq!(starts(Iova::new(u64::MAX), 9), []);
}

#[test]
fn a_listing_shows_what_its_filter_names() {
    let domain = domain(8, 8);
    let buffer = Buffer::register(&domain, DRIVER, 1);
    let foreign = Buffer::register(&domain, OTHER, 1);
    let mine = map(&domain, DRIVER, buffer.spec(3, 9, Direction::FromDevice)).unwrap();
    let theirs = map(&domain, OTHER, foreign.spec(0, P, Direction::ToDevice)).unwrap();
    let spec = crate::coherent::CoherentSpec::of(10);
    let shared = domain.alloc_coherent(OTHER, &spec).unwrap();
    let ids = |owner, kind| -> Vec<_> {
        let filter = MappingFilter {
            owner,
            kind,
            ..MappingFilter::default()
        };
        let listed = domain.mappings(filter, Iova::new(0), 9);
        listed.iter().filter_map(|view| view.id).collect()
    };

    assert_eq!(ids(None, None), [mine.id, theirs.id, shared.id]);
    assert_eq!(ids(Some(DRIVER), None), [mine.id]);
    assert_eq!(ids(None, Some(MappingKind::Coherent)), [shared.id]);
    assert_eq!(ids(Some(OTHER), Some(MappingKind::Streaming)), [theirs.id]);
    assert_eq!(ids(None, Some(MappingKind::Direct)), []);
    assert_eq!(ids(Some(DEVICE), None), []);

    let view = domain.mappings(MappingFilter::default(), Iova::new(0), 1)[0];
    assert_eq!((view.owner, view.visible), (Some(DRIVER), visible(mine)));
    let kind = ViewKind::Streaming {
        direction: Direction::FromDevice,
        source: Source {
            memory: buffer.id,
            offset: 3,
        },
    };
    assert_eq!(view.kind, kind);
}

#[test]
fn an_aperture_away_from_zero_gives_its_first_granule_and_counts_from_its_start() {
    let base = 1 << 32;
    let layout = LayoutSpec {
        bounce_bytes: 4 * P,
        coherent_bytes: 4 * P,
        aperture_base: base,
        ..LayoutSpec::default()
    };
    let layout = layout.plan().unwrap();
    let domain = Domain::create("high", layout, Settings::default(), ScrubWith::Zero).unwrap();
    domain.join(DRIVER, Role::Driver).unwrap();
    let buffer = Buffer::register(&domain, DRIVER, 4);

    let whole = buffer.spec(0, 4 * P, Direction::Bidirectional);
    let mapped = map(&domain, DRIVER, whole).unwrap();
    assert_eq!(mapped.iova, Iova::new(base));
    let made = domain
        .alloc_coherent(DRIVER, &crate::coherent::CoherentSpec::of(1))
        .unwrap();
    assert_eq!(made.iova(), Iova::new(base + 4 * P));
    let offsets = table(&domain).1.into_iter().map(|e| e.target.offset_bytes);
    assert_eq!(offsets.collect::<Vec<_>>(), [0, 0]);

    assert_eq!(seen(&domain, visible(mapped)), pattern(4 * P, 1));
    device_writes(&domain, mapped.iova, &pattern(4 * P, 2));
    unmap(&domain, DRIVER, ending(mapped)).unwrap();
    assert_eq!(buffer.all(), pattern(4 * P, 2));
}

#[test]
fn a_larger_granule_is_owned_and_zeroed_whole() {
    const GRANULE: u64 = 64 << 10;
    let layout = LayoutSpec {
        bounce_bytes: 4 * GRANULE,
        coherent_bytes: 2 * GRANULE,
        granule: crate::addr::Granule::Size64K,
        ..LayoutSpec::default()
    };
    let layout = layout.plan().unwrap();
    let domain = Domain::create("large", layout, Settings::default(), ScrubWith::Zero).unwrap();
    domain.join(DRIVER, Role::Driver).unwrap();
    let buffer = Buffer::register(&domain, DRIVER, 40);
    device_floods(&domain, ApertureKind::Bounce, DIRT);
    device_floods(&domain, ApertureKind::Coherent, DIRT);

    // 5000 bytes into the second granule of the memory.
    let spec = MapSpec {
        keep_offset: true,
        ..buffer.spec(GRANULE + 5000, 100, Direction::ToDevice)
    };
    let mapped = map(&domain, DRIVER, spec).unwrap();
    let made = domain
        .alloc_coherent(DRIVER, &crate::coherent::CoherentSpec::of(1))
        .unwrap();

    assert_eq!(mapped.iova, Iova::new(GRANULE + 5000));
    let mut expected = vec![0; size(GRANULE)];
    expected[5000..5100].copy_from_slice(&buffer.bytes(GRANULE + 5000, 100));
    let granule = |start| IovaRange::from_len(Iova::new(start), GRANULE).unwrap();
    assert!(seen(&domain, granule(GRANULE)) == expected);
    assert_eq!(made.iova(), Iova::new(4 * GRANULE));
    assert!(seen(&domain, granule(4 * GRANULE)) == vec![0; size(GRANULE)]);
    let usage = domain.usage();
    assert_eq!(usage.bounce.used_bytes, GRANULE);
    assert_eq!(usage.coherent_aperture.used_bytes, GRANULE);
}
