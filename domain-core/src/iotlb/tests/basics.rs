//! One entry at a time.

use super::*;

/// Direct entries `[1000, 1009]` and `[1010, 1019]` in granules touch; `[1030, 1039]` lies behind a
/// hole.
fn three() -> Iotlb {
    let mut iotlb = iotlb(64);
    for (first, perm) in [
        (1010, Perm::ReadWrite),
        (1000, Perm::Read),
        (1030, Perm::ReadWrite),
    ] {
        let entry = entry(first, 10, 0, first);
        iotlb.insert(Entry { perm, ..entry }).unwrap();
    }
    iotlb.check_invariants();
    iotlb
}

fn overlap(iotlb: &mut Iotlb, entry: Entry) -> IovaRange {
    let before = (iotlb.len(), iotlb.generation(), iotlb.table_usage());
    let refused = iotlb.insert(entry).unwrap_err();
    assert_eq!(
        before,
        (iotlb.len(), iotlb.generation(), iotlb.table_usage())
    );
    iotlb.check_invariants();
    let InsertError::Overlap(overlap) = refused else {
        panic!("{refused}")
    };
    assert_eq!(overlap.range, entry.range);
    overlap.hit
}

#[test]
fn an_overlap_is_refused_naming_the_lowest_that_is_there_and_changes_nothing() {
    let mut iotlb = three();
    assert_eq!(
        overlap(&mut iotlb, entry(1019, 12, 1, 0)),
        granules(1010, 10)
    );
    assert_eq!(overlap(&mut iotlb, entry(999, 2, 1, 0)), granules(1000, 10));
    // Over the whole tree, and far out of its height.
    assert_eq!(
        overlap(&mut iotlb, entry(APERTURES, 1 << 40, 1, 0)),
        granules(1000, 10)
    );
    iotlb.insert(entry(1020, 10, 1, 0)).unwrap();
    iotlb.check_invariants();
}

#[test]
fn a_large_entry_fits_into_the_hole_of_a_tree_that_reaches_around_it() {
    let mut iotlb = three();
    // What is there lies below 2^18, in slot 0 of a node of height 3; this is all the rest of that.
    iotlb.insert(entry(1040, POWERS[2] - 1040, 1, 3)).unwrap();
    iotlb
        .insert(entry(APERTURES, 1000 - APERTURES, 1, 3))
        .unwrap();
    iotlb.check_invariants();
    let hit = iotlb.walker().translate(Iova::new((POWERS[2] - 1) * P));
    assert_eq!(
        hit.unwrap().target.offset_bytes,
        (POWERS[2] - 1 - 1040 + 3) * P
    );
}

#[test]
fn lookup_gives_the_lowest_overlapping_entry_whole_in_either_namespace() {
    let mut iotlb = three();
    iotlb.insert(entry(700, 10, 0, 0)).unwrap();
    let lookup = |first, count| {
        let found = iotlb.lookup(granules(first, count));
        found.map(|entry| entry.range)
    };
    assert_eq!(lookup(1005, 100), Some(granules(1000, 10)));
    assert_eq!(lookup(0, 1001), Some(granules(700, 10)));
    assert_eq!(lookup(710, 300), Some(granules(1000, 10)));
    assert_eq!(lookup(1020, 11), Some(granules(1030, 10)));
    assert_eq!(lookup(1020, 10), None);
}

#[test]
fn entries_are_listed_by_address_across_the_namespaces() {
    let apertures = granules(100, 10);
    let mut iotlb = Iotlb::new(heap(16), Granule::Size4K, Some(apertures)).unwrap();
    for first in [300, 105, 50, 100, 110, 99] {
        iotlb.insert(entry(first, 1, 0, 0)).unwrap();
    }
    let starts = |entries: &mut dyn Iterator<Item = Entry>| -> Vec<u64> {
        entries.map(|entry| entry.range.start().get() / P).collect()
    };
    assert_eq!(starts(&mut iotlb.entries()), [50, 99, 100, 105, 110, 300]);
    assert_eq!(starts(&mut iotlb.direct_entries()), [50, 99, 110, 300]);
    let from = Iova::new(99 * P + 1);
    assert_eq!(starts(&mut iotlb.direct_range(from)), [110, 300]);
    assert_eq!((iotlb.len(), iotlb.direct_len()), (6, 4));
    iotlb.check_invariants();
}

#[test]
fn a_translation_spans_neighbours_and_stops_at_a_hole() {
    let mut iotlb = three();
    iotlb.insert(entry(APERTURES - 2, 2, 7, 0)).unwrap();
    iotlb.insert(entry(APERTURES, 1, 8, 0)).unwrap();
    let pieces = iotlb
        .translate(bytes(1005 * P + 1, 10 * P), Perm::Read)
        .unwrap();
    let got: Vec<_> = pieces
        .iter()
        .map(|p| (p.range, p.target.offset_bytes))
        .collect();
    let expected = [
        (bytes(1005 * P + 1, 5 * P - 1), 1005 * P + 1),
        (bytes(1010 * P, 5 * P + 1), 1010 * P),
    ];
    assert_eq!(got, expected);
    let across = iotlb
        .translate(granules(APERTURES - 1, 2), Perm::Write)
        .unwrap();
    assert_eq!(across.len(), 2);
    for (asked, at) in [(granules(1015, 20), 1020), (granules(900, 101), 900)] {
        let hole = TranslateError::Hole {
            at: Iova::new(at * P),
        };
        assert_eq!(iotlb.translate(asked, Perm::Read), Err(hole));
    }
}

#[test]
fn a_translation_gives_no_more_than_the_entry_allows() {
    let refused = three().translate(granules(1000, 15), Perm::ReadWrite);
    let expected = TranslateError::Perm {
        range: granules(1000, 10),
        perm: Perm::Read,
        want: Perm::ReadWrite,
    };
    assert_eq!(refused, Err(expected));
}

#[test]
fn every_change_has_a_generation_of_its_own_that_readers_can_see() {
    let mut iotlb = three();
    let walker = iotlb.walker();
    assert_eq!((iotlb.generation(), walker.generation()), (3, 3));
    assert!(iotlb.remove(Iova::new(1005 * P)).is_none());
    assert_eq!((iotlb.generation(), walker.generation()), (3, 3));
    iotlb.remove(Iova::new(1000 * P)).unwrap();
    assert_eq!((iotlb.generation(), walker.generation()), (4, 4));
}

#[test]
fn several_go_in_one_generation_or_none_at_all() {
    let mut iotlb = three();
    let fresh = [
        entry(1020, 5, 1, 0),
        entry(5000, 1, 1, 0),
        entry(0, 3, 1, 0),
    ];
    let clash = [fresh[0], fresh[1], entry(1015, 1, 1, 0)];
    let twins = [fresh[0], fresh[2], entry(1024, 1, 1, 0)];
    for refused in [&clash[..], &twins[..]] {
        let error = iotlb.insert_all(refused).unwrap_err();
        assert!(matches!(error, InsertError::Overlap(_)), "{error}");
        assert_eq!((iotlb.len(), iotlb.generation()), (3, 3));
        iotlb.check_invariants();
    }
    iotlb.insert_all(&fresh).unwrap();
    assert_eq!((iotlb.len(), iotlb.generation()), (6, 4));
    iotlb.check_invariants();
    iotlb.insert_all(&[]).unwrap();
    let starts = [1000, 1, 5000, 0].map(|first| Iova::new(first * P));
    assert_eq!(iotlb.remove_all(starts).len(), 3);
    assert_eq!((iotlb.len(), iotlb.generation()), (3, 5));
    assert_eq!(iotlb.remove_all([Iova::new(1)]), []);
    assert_eq!(iotlb.generation(), 5);
    iotlb.check_invariants();
}

#[test]
fn the_last_byte_of_the_space_translates() {
    let mut iotlb = iotlb(16);
    iotlb.insert(entry(TOP - 3, 3, 0, 0)).unwrap();
    iotlb.check_invariants();
    let last = IovaRange::from_len(Iova::new(u64::MAX), 1).unwrap();
    let pieces = iotlb.translate(last, Perm::Read).unwrap();
    assert_eq!(pieces[0].range, last);
    let hit = iotlb.walker().translate(last.last()).unwrap();
    assert_eq!(
        (hit.target.offset_bytes, hit.last),
        (3 * P - 1, last.last())
    );
}

#[test]
fn only_the_apertures_show_parts_of_granules_and_a_granule_has_one_holder() {
    let mut iotlb = iotlb(16);
    let piece = |start, len| Entry {
        range: bytes(start, len),
        target: Target {
            region: RegionId::BOUNCE,
            offset_bytes: 77 * P + start,
        },
        perm: Perm::Read,
    };
    iotlb.insert(piece(P + 100, 2 * P)).unwrap();
    iotlb.check_invariants();
    assert_eq!(
        overlap(&mut iotlb, piece(3 * P + 200, 8)),
        bytes(P + 100, 2 * P)
    );
    assert_eq!(overlap(&mut iotlb, piece(P, 8)), bytes(P + 100, 2 * P));
    // Exact in the map, in granules for walkers.
    let hole = TranslateError::Hole { at: Iova::new(P) };
    assert_eq!(iotlb.translate(bytes(P, 200), Perm::Read), Err(hole));
    let hit = iotlb.walker().translate(Iova::new(P + 101)).unwrap();
    assert_eq!(hit.target.offset_bytes, 78 * P + 101);
    assert_eq!(hit.last, Iova::new(2 * P - 1));
    let skewed = Entry {
        target: Target {
            offset_bytes: 1,
            ..piece(8 * P, P).target
        },
        ..piece(8 * P, P)
    };
    let refused = iotlb.insert(skewed).unwrap_err();
    assert!(
        matches!(refused, InsertError::Misaligned { .. }),
        "{refused}"
    );
}

#[test]
fn direct_entries_are_whole_granules_outside_of_the_apertures() {
    let mut iotlb = iotlb(16);
    let good = entry(1000, 2, 0, 4);
    let at = |offset_bytes| Target {
        offset_bytes,
        ..good.target
    };
    for (range, target) in [
        (bytes(1000 * P + 1, 2 * P - 1), good.target),
        (bytes(1000 * P, 2 * P - 1), good.target),
        (good.range, at(8)),
    ] {
        let refused = iotlb
            .insert(Entry {
                range,
                target,
                ..good
            })
            .unwrap_err();
        assert!(
            matches!(refused, InsertError::Misaligned { .. }),
            "{refused}"
        );
    }
    let refused = iotlb.insert(entry(APERTURES - 1, 2, 0, 0)).unwrap_err();
    let expected = InsertError::CrossesAperture {
        range: granules(APERTURES - 1, 2),
        apertures: granules(0, APERTURES),
    };
    assert_eq!(refused, expected);
    // One granule more would not fit the leaf's 41 bits.
    let far = (1 << 41) - 2;
    iotlb.insert(entry(1000, 2, 0, far)).unwrap();
    let refused = iotlb.insert(entry(2000, 3, 0, far)).unwrap_err();
    assert!(matches!(refused, InsertError::TooFar { .. }), "{refused}");
    iotlb.check_invariants();
    assert_eq!(iotlb.len(), 1);
}

#[test]
fn a_tree_is_as_low_as_it_can_be_wherever_it_lies() {
    let mut iotlb = iotlb(64);
    let empty = used(&mut iotlb);
    for first in [4096, POWERS[3] + 1, TOP - 1] {
        iotlb.insert(entry(first, 1, 0, 0)).unwrap();
        assert_eq!(used(&mut iotlb), empty + 1, "one granule, one node");
        // From one end of the space to the other and back.
        iotlb.insert(entry(APERTURES, 1, 0, 0)).unwrap();
        iotlb.check_invariants();
        assert!(used(&mut iotlb) > empty + 2);
        iotlb.remove(Iova::new(APERTURES * P)).unwrap();
        iotlb.check_invariants();
        assert_eq!(used(&mut iotlb), empty + 1);
        iotlb.remove(Iova::new(first * P)).unwrap();
        iotlb.check_invariants();
        assert_eq!(used(&mut iotlb), empty);
    }
}

#[test]
fn a_huge_range_takes_a_few_nodes_with_any_target() {
    let mut iotlb = iotlb(64);
    let empty = used(&mut iotlb);
    // 512 GiB from 1 TiB on, to an odd granule of its memory.
    iotlb.insert(entry(1 << 28, 1 << 27, 3, 12_345)).unwrap();
    assert_eq!(used(&mut iotlb), empty + 1);
    let at = (1 << 28) + 777_777;
    let hit = iotlb.walker().translate(Iova::new(at * P + 9)).unwrap();
    assert_eq!(hit.target.offset_bytes, (12_345 + 777_777) * P + 9);
    assert_eq!(hit.target.region, RegionId::memory_slot(3));
    iotlb.check_invariants();
}

#[test]
fn other_granules_have_as_much_room() {
    for granule in [Granule::Size64K, Granule::Size2M] {
        let mut iotlb = Iotlb::new(heap(64), granule, None).unwrap();
        let all = IovaRange::new(Iova::new(0), Iova::new(u64::MAX)).unwrap();
        let top = Iova::new(u64::MAX - granule.bytes() + 1);
        let range = IovaRange::new(top, all.last()).unwrap();
        let target = Target {
            region: RegionId::memory_slot(0),
            offset_bytes: 5 * granule.bytes(),
        };
        let perm = Perm::Write;
        iotlb
            .insert(Entry {
                range,
                target,
                perm,
            })
            .unwrap();
        let range = IovaRange::from_len(Iova::new(0), granule.bytes() << 30).unwrap();
        iotlb
            .insert(Entry {
                range,
                target,
                perm,
            })
            .unwrap();
        iotlb.check_invariants();
        let hit = iotlb.walker().translate(Iova::new(u64::MAX)).unwrap();
        assert_eq!(hit.target.offset_bytes, 6 * granule.bytes() - 1);
        assert_eq!(hit.last, Iova::new(u64::MAX));
        let beyond = Iova::new(granule.bytes() << 30);
        assert_eq!(iotlb.walker().translate(beyond), None);
    }
}

#[test]
fn the_whole_space_overlaps_whatever_there_is_and_is_too_far_for_any_region() {
    let mut iotlb = Iotlb::new(heap(64), Granule::Size4K, None).unwrap();
    let whole = entry(0, TOP, 0, 0);
    let refused = iotlb.insert(whole).unwrap_err();
    assert!(matches!(refused, InsertError::TooFar { .. }), "{refused}");
    // What a region can have, at either end of the space.
    iotlb.insert(entry(1, 1 << 41, 0, 0)).unwrap();
    iotlb.insert(entry(TOP - (1 << 41), 1 << 41, 1, 0)).unwrap();
    iotlb.check_invariants();
    assert!(iotlb.table_usage().used < 16);
}

#[test]
fn words_that_hold_no_table_are_not_opened() {
    let words = Arc::new(heap(1));
    let refused = Walker::open(Arc::clone(&words)).unwrap_err();
    assert_eq!(refused, HeaderError::Magic { found: 0 });
    let refused = Walker::open(Arc::new(HeapWords::new(0))).unwrap_err();
    assert_eq!(refused, HeaderError::TooShort { words: 0 });
    words.store(
        format::header::MAGIC,
        format::MAGIC,
        std::sync::atomic::Ordering::Relaxed,
    );
    let refused = Walker::open(words).unwrap_err();
    assert_eq!(refused, HeaderError::Granule { shift: 0 });
}

/// A walker is used on words that others write: it must end, and say nothing rather than panic.
#[test]
fn a_walker_survives_any_words() {
    use std::sync::atomic::Ordering::Relaxed;
    let mut iotlb = iotlb(4);
    iotlb.insert(entry(1000, 1, 0, 0)).unwrap();
    let walker = iotlb.walker();
    let mut state = 0x9E37_79B9_7F4A_7C15_u64;
    for _ in 0..2000 {
        for place in 16..iotlb.words().words().len() {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            iotlb.words().store(place, state.rotate_left(17), Relaxed);
        }
        for _ in 0..64 {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            let _ = walker.translate(Iova::new(state));
            let _ = walker.translate(Iova::new(state >> 40));
        }
        let range = bytes(state >> 8, 64 * P);
        if let Some((at, hit)) = walker.next_mapped(range) {
            assert!(range.start() <= at && at <= range.last() && at <= hit.last);
        }
        assert!(walker.pieces(range, Perm::Read).count() <= 64);
    }
}
