//! Which bytes travel when, and which never do.

use super::*;

/// Shapes that begin and end on, just before and just behind page borders.
fn shapes() -> impl Iterator<Item = (u64, u64)> {
    let lens = [1, 2, 4095, 4096, 4097, 8191, 8192, 8193, 65536];
    [0, 1, 100, 4095]
        .into_iter()
        .flat_map(move |offset| lens.map(|len| (offset, len)))
}

/// Every shape, every direction, with and without its low bits in the iova.
fn specs(memory: MemoryId) -> impl Iterator<Item = MapSpec> {
    shapes().flat_map(move |(offset, len)| {
        DIRECTIONS.into_iter().flat_map(move |direction| {
            [false, true].map(|keep_offset| MapSpec {
                keep_offset,
                ..MapSpec::new(memory, offset, len, direction)
            })
        })
    })
}

/// 24 pages that an earlier mapping has left full of dirt. The neighbours of
/// the next mapping take one page each, `below` before it and `above` behind.
struct Street {
    domain: Domain,
    buffer: Buffer,
    neighbour: Buffer,
    dirt: Buffer,
}

impl Street {
    fn new() -> Street {
        let domain = domain(24, 0);
        let buffer = Buffer::register(&domain, DRIVER, 20);
        let neighbour = Buffer::register(&domain, OTHER, 1);
        let dirt = Buffer::register(&domain, OTHER, 23);
        dirt.write(0, &vec![DIRT; size(23 * P)]);
        Street {
            domain,
            buffer,
            neighbour,
            dirt,
        }
    }

    /// Dirties everything, then maps the three side by side.
    fn map(&self, spec: MapSpec) -> (Mapped, Mapped, Mapped) {
        let dirty = self.dirt.spec(0, 23 * P, Direction::ToDevice);
        let dirty = map(&self.domain, OTHER, dirty).unwrap();
        unmap(&self.domain, OTHER, ending(dirty)).unwrap();
        let next_door = self.neighbour.spec(0, P, Direction::ToDevice);
        let below = map(&self.domain, OTHER, next_door).unwrap();
        let mapped = map(&self.domain, DRIVER, spec).unwrap();
        let above = map(&self.domain, OTHER, next_door).unwrap();
        let ours = granules(visible(mapped));
        assert_eq!(visible(below).last().checked_add(1), Some(ours.start()));
        assert_eq!(ours.last().checked_add(1), Some(above.iova));
        (below, mapped, above)
    }

    fn assert_neighbours_are_as_they_were(&self, below: Mapped, above: Mapped) {
        for neighbour in [below, above] {
            assert_eq!(seen(&self.domain, visible(neighbour)), pattern(P, 1));
            unmap(&self.domain, OTHER, ending(neighbour)).unwrap();
        }
        assert_eq!(self.neighbour.all(), pattern(P, 1));
    }
}

#[test]
fn the_device_sees_exactly_the_buffer_and_zeros_around_it() {
    let street = Street::new();
    for spec in specs(street.buffer.id) {
        let (below, mapped, above) = street.map(spec);

        let whole = granules(visible(mapped));
        let lead = size(mapped.iova.offset_from(whole.start()).unwrap());
        let mut expected = vec![0; size(whole.len_bytes().unwrap())];
        if spec.direction != Direction::FromDevice {
            let buffer = street.buffer.bytes(spec.offset, spec.len_bytes);
            expected[lead..lead + buffer.len()].copy_from_slice(&buffer);
        }
        assert!(seen(&street.domain, whole) == expected, "{spec:?}");

        unmap(&street.domain, DRIVER, discarding(mapped)).unwrap();
        street.assert_neighbours_are_as_they_were(below, above);
    }
}

#[test]
fn exactly_the_buffer_comes_back_and_nothing_around_it() {
    let street = Street::new();
    for spec in specs(street.buffer.id) {
        street.buffer.write(0, &pattern(20 * P, 1));
        let (below, mapped, above) = street.map(spec);
        let whole = granules(visible(mapped));
        let intrusion = vec![INTRUSION; size(whole.len_bytes().unwrap())];
        device_writes(&street.domain, whole.start(), &intrusion);
        device_writes(&street.domain, mapped.iova, &pattern(spec.len_bytes, 2));

        let end = match spec.direction {
            Direction::FromDevice => written(mapped, spec.len_bytes),
            _ => ending(mapped),
        };
        let bytes_back = unmap(&street.domain, DRIVER, end).unwrap();

        let mut expected = pattern(20 * P, 1);
        if spec.direction == Direction::ToDevice {
            assert_eq!(bytes_back, 0);
        } else {
            assert_eq!(bytes_back, spec.len_bytes);
            let back = size(spec.offset)..size(spec.offset + spec.len_bytes);
            expected[back].copy_from_slice(&pattern(spec.len_bytes, 2));
        }
        assert!(street.buffer.all() == expected, "{spec:?}");
        street.assert_neighbours_are_as_they_were(below, above);
    }
}

#[test]
fn the_iova_keeps_the_low_bits_of_the_offset_only_if_asked() {
    let street = Street::new();
    for spec in specs(street.buffer.id) {
        let mapped = map(&street.domain, DRIVER, spec).unwrap();
        let low_bits = if spec.keep_offset { spec.offset % P } else { 0 };
        assert_eq!(mapped.iova.get() % P, low_bits, "{spec:?}");
        assert_eq!(mapped.len_bytes, spec.len_bytes);
        unmap(&street.domain, DRIVER, discarding(mapped)).unwrap();
    }
}

#[test]
fn the_iotlb_shows_exactly_the_length_with_the_perm_of_the_direction() {
    let street = Street::new();
    for spec in specs(street.buffer.id) {
        let mapped = map(&street.domain, DRIVER, spec).unwrap();
        let entry = Entry {
            range: visible(mapped),
            target: Target {
                region: crate::iotlb::RegionId::BOUNCE,
                // The aperture begins at 0.
                offset_bytes: mapped.iova.get(),
            },
            perm: spec.direction.perm(),
        };
        assert_eq!(table(&street.domain).1, [entry]);
        unmap(&street.domain, DRIVER, discarding(mapped)).unwrap();
        assert_eq!(table(&street.domain).1, []);
    }
}

#[test]
fn from_device_changes_nothing_before_unmap() {
    let domain = domain(4, 0);
    let buffer = Buffer::register(&domain, DRIVER, 1);
    let mapped = map(&domain, DRIVER, buffer.spec(10, 500, Direction::FromDevice)).unwrap();

    device_writes(&domain, mapped.iova, &pattern(500, 2));

    assert_eq!(buffer.all(), pattern(P, 1));
    unmap(&domain, DRIVER, written(mapped, 500)).unwrap();
    assert_eq!(buffer.bytes(10, 500), pattern(500, 2));
}

#[test]
fn every_count_of_written_bytes_brings_back_exactly_so_many() {
    // 300 bytes that cross a page border of the buffer, and of the bounce
    // range if its low bits are kept.
    let (offset, len) = (4000, 300);
    let domain = domain(8, 0);
    let buffer = Buffer::register(&domain, DRIVER, 2);
    for (k, keep_offset) in (0..=len).flat_map(|k| [(k, false), (k, true)]) {
        for direction in [Direction::FromDevice, Direction::Bidirectional] {
            buffer.write(0, &pattern(2 * P, 1));
            let spec = MapSpec {
                keep_offset,
                ..buffer.spec(offset, len, direction)
            };
            let mapped = map(&domain, DRIVER, spec).unwrap();
            device_floods(&domain, ApertureKind::Bounce, INTRUSION);

            let back = unmap(&domain, DRIVER, written(mapped, k)).unwrap();

            let mut expected = pattern(2 * P, 1);
            expected[size(offset)..size(offset + k)].fill(INTRUSION);
            assert_eq!(back, k);
            assert!(buffer.all() == expected, "{direction}, {k} written");
        }
    }
}

#[test]
fn preserve_shows_the_original_and_unwritten_bytes_come_back_as_they_were() {
    let domain = domain(4, 0);
    for direction in DIRECTIONS {
        let buffer = Buffer::register(&domain, DRIVER, 2);
        let spec = MapSpec {
            preserve: true,
            ..buffer.spec(100, P, direction)
        };
        let mapped = map(&domain, DRIVER, spec).unwrap();
        assert_eq!(seen(&domain, visible(mapped)), buffer.bytes(100, P));

        // In the middle: no count of written bytes could say this.
        let middle = mapped.iova.checked_add(1000).unwrap();
        device_writes(&domain, middle, &pattern(50, 2));
        let back = unmap(&domain, DRIVER, ending(mapped)).unwrap();

        let mut expected = pattern(2 * P, 1);
        if direction != Direction::ToDevice {
            expected[1100..1150].copy_from_slice(&pattern(50, 2));
        }
        assert_eq!(buffer.all(), expected, "{direction}");
        assert_eq!(
            back,
            if direction == Direction::ToDevice {
                0
            } else {
                P
            }
        );
    }
}

#[test]
fn bidirectional_takes_the_present_bytes_in_and_the_devices_back() {
    let domain = domain(4, 0);
    let buffer = Buffer::register(&domain, DRIVER, 1);
    let spec = buffer.spec(1, 1000, Direction::Bidirectional);
    let mapped = map(&domain, DRIVER, spec).unwrap();
    assert_eq!(seen(&domain, visible(mapped)), buffer.bytes(1, 1000));

    device_writes(&domain, mapped.iova, &pattern(1000, 2));
    // What the driver writes meanwhile is the driver's own fault.
    buffer.write(0, &pattern(P, 3));
    unmap(&domain, DRIVER, ending(mapped)).unwrap();

    let mut expected = pattern(P, 3);
    expected[1..1001].copy_from_slice(&pattern(1000, 2));
    assert_eq!(buffer.all(), expected);
}

#[test]
fn a_mapping_with_skip_sync_shows_zeros_and_brings_nothing_back() {
    let domain = domain(4, 0);
    let buffer = Buffer::register(&domain, DRIVER, 2);
    for direction in DIRECTIONS {
        for preserve in [false, true] {
            device_floods(&domain, ApertureKind::Bounce, DIRT);
            let spec = MapSpec {
                skip_sync: true,
                preserve,
                ..buffer.spec(100, 5000, direction)
            };
            let mapped = map(&domain, DRIVER, spec).unwrap();
            let whole = granules(visible(mapped));
            assert_eq!(seen(&domain, whole), vec![0; size(2 * P)]);

            device_writes(&domain, whole.start(), &pattern(2 * P, 2));
            assert_eq!(unmap(&domain, DRIVER, ending(mapped)).unwrap(), 0);
            assert_eq!(buffer.all(), pattern(2 * P, 1), "{direction}");
        }
    }
}

#[test]
fn an_unmap_with_skip_sync_brings_nothing_back() {
    let domain = domain(4, 0);
    let buffer = Buffer::register(&domain, DRIVER, 1);
    for (direction, preserve) in DIRECTIONS.into_iter().flat_map(|d| [(d, false), (d, true)]) {
        let spec = MapSpec {
            preserve,
            ..buffer.spec(0, P, direction)
        };
        let mapped = map(&domain, DRIVER, spec).unwrap();
        device_writes(&domain, mapped.iova, &pattern(P, 2));

        assert_eq!(unmap(&domain, DRIVER, discarding(mapped)).unwrap(), 0);
        assert_eq!(buffer.all(), pattern(P, 1), "{direction}");
    }
}

/// Parts of 5000 bytes that begin and end around page borders.
const PARTS: [(u64, u64); 6] = [
    (0, 1),
    (4999, 1),
    (0, 5000),
    (3000, 2000),
    (3995, 102),
    (1, 4998),
];

#[test]
fn a_sync_for_the_cpu_copies_exactly_its_part() {
    let domain = domain(4, 0);
    let buffer = Buffer::register(&domain, DRIVER, 2);
    for direction in [Direction::FromDevice, Direction::Bidirectional] {
        for (skip_sync, keep_offset) in [(false, false), (false, true), (true, false)] {
            let spec = MapSpec {
                skip_sync,
                keep_offset,
                ..buffer.spec(100, 5000, direction)
            };
            let mapped = map(&domain, DRIVER, spec).unwrap();
            device_floods(&domain, ApertureKind::Bounce, INTRUSION);
            for (offset, len) in PARTS {
                buffer.write(0, &pattern(2 * P, 1));

                let request = part(mapped, offset, len, SyncTarget::ForCpu);
                sync(&domain, DRIVER, request).unwrap();

                let mut expected = pattern(2 * P, 1);
                expected[size(100 + offset)..size(100 + offset + len)].fill(INTRUSION);
                assert!(buffer.all() == expected, "{spec:?}, {request:?}");
            }
            unmap(&domain, DRIVER, discarding(mapped)).unwrap();
        }
    }
}

#[test]
fn a_sync_for_the_device_copies_exactly_its_part() {
    let domain = domain(4, 0);
    let buffer = Buffer::register(&domain, DRIVER, 2);
    for direction in [Direction::ToDevice, Direction::Bidirectional] {
        for (skip_sync, keep_offset) in [(false, false), (false, true), (true, false)] {
            let spec = MapSpec {
                skip_sync,
                keep_offset,
                ..buffer.spec(100, 5000, direction)
            };
            let mapped = map(&domain, DRIVER, spec).unwrap();
            for (offset, len) in PARTS {
                device_floods(&domain, ApertureKind::Bounce, INTRUSION);

                let request = part(mapped, offset, len, SyncTarget::ForDevice);
                sync(&domain, DRIVER, request).unwrap();

                let mut expected = vec![INTRUSION; size(4 * P)];
                let at = size(mapped.iova.get() + offset);
                expected[at..at + size(len)].copy_from_slice(&buffer.bytes(100 + offset, len));
                let aperture = domain.aperture(ApertureKind::Bounce).unwrap().range();
                assert!(seen(&domain, aperture) == expected, "{spec:?}, {request:?}");
            }
            assert_eq!(buffer.all(), pattern(2 * P, 1));
            unmap(&domain, DRIVER, discarding(mapped)).unwrap();
        }
    }
}

#[test]
fn a_sync_against_the_direction_is_refused() {
    let domain = domain(4, 0);
    let buffer = Buffer::register(&domain, DRIVER, 1);
    for (direction, target) in [
        (Direction::ToDevice, SyncTarget::ForCpu),
        (Direction::FromDevice, SyncTarget::ForDevice),
    ] {
        let mapped = map(&domain, DRIVER, buffer.spec(0, P, direction)).unwrap();
        device_floods(&domain, ApertureKind::Bounce, INTRUSION);

        let refused = sync(&domain, DRIVER, part(mapped, 0, 1, target)).unwrap_err();

        assert!(
            matches!(refused, SyncError::WrongDirection { direction: d } if d == direction),
            "{refused}"
        );
        assert_eq!(buffer.all(), pattern(P, 1));
        assert_eq!(seen(&domain, visible(mapped)), vec![INTRUSION; size(P)]);
        unmap(&domain, DRIVER, discarding(mapped)).unwrap();
    }
}

#[test]
fn a_preserved_mapping_can_be_synced_for_the_device_whatever_its_direction() {
    let domain = domain(4, 0);
    let buffer = Buffer::register(&domain, DRIVER, 1);
    let spec = MapSpec {
        preserve: true,
        ..buffer.spec(0, P, Direction::FromDevice)
    };
    let mapped = map(&domain, DRIVER, spec).unwrap();
    buffer.write(0, &pattern(P, 2));

    sync(&domain, DRIVER, part(mapped, 0, P, SyncTarget::ForDevice)).unwrap();

    assert_eq!(seen(&domain, visible(mapped)), pattern(P, 2));
}

#[test]
fn a_sync_of_nothing_or_past_the_end_is_refused() {
    let domain = domain(4, 0);
    let buffer = Buffer::register(&domain, DRIVER, 2);
    let spec = buffer.spec(0, 5000, Direction::Bidirectional);
    let mapped = map(&domain, DRIVER, spec).unwrap();

    for offset in [0, 5000, u64::MAX] {
        let empty = part(mapped, offset, 0, SyncTarget::ForCpu);
        let refused = sync(&domain, DRIVER, empty).unwrap_err();
        assert!(matches!(refused, SyncError::ZeroLength), "{refused}");
    }
    for (offset, len) in [
        (0, 5001),
        (4999, 2),
        (5000, 1),
        (1, u64::MAX),
        (u64::MAX, u64::MAX),
    ] {
        let outside = part(mapped, offset, len, SyncTarget::ForCpu);
        let refused = sync(&domain, DRIVER, outside).unwrap_err();
        assert!(
            matches!(refused, SyncError::OutsideMapping { offset: o, len_bytes: l, mapping_bytes: 5000 }
                if (o, l) == (offset, len)),
            "{refused}"
        );
    }
}

#[test]
fn written_bytes_are_required_exactly_where_they_decide() {
    let domain = domain(4, 0);
    let buffer = Buffer::register(&domain, DRIVER, 1);
    let plain = |direction| buffer.spec(0, 100, direction);
    let from = map(&domain, DRIVER, plain(Direction::FromDevice)).unwrap();
    let to = map(&domain, DRIVER, plain(Direction::ToDevice)).unwrap();
    let preserved = MapSpec {
        preserve: true,
        ..plain(Direction::FromDevice)
    };
    let preserved = map(&domain, DRIVER, preserved).unwrap();

    let refused = unmap(&domain, DRIVER, ending(from)).unwrap_err();
    assert!(
        matches!(refused, UnmapError::WrittenMissing { len_bytes: 100 }),
        "{refused}"
    );
    for (mapped, why) in [(to, "TO_DEVICE"), (preserved, "preserve")] {
        let refused = unmap(&domain, DRIVER, written(mapped, 100)).unwrap_err();
        assert!(
            matches!(refused, UnmapError::WrittenUnwanted { written_bytes: 100, why: w } if w == why),
            "{refused}"
        );
    }

    // Every refused one is still there, and its correction succeeds.
    assert_eq!(unmap(&domain, DRIVER, written(from, 0)).unwrap(), 0);
    assert_eq!(unmap(&domain, DRIVER, ending(to)).unwrap(), 0);
    assert_eq!(unmap(&domain, DRIVER, ending(preserved)).unwrap(), 100);
}

#[test]
fn written_bytes_beside_skip_sync_are_refused() {
    let domain = domain(4, 0);
    let buffer = Buffer::register(&domain, DRIVER, 1);
    for direction in DIRECTIONS {
        for at_map in [false, true] {
            let spec = MapSpec {
                skip_sync: at_map,
                ..buffer.spec(0, 100, direction)
            };
            let mapped = map(&domain, DRIVER, spec).unwrap();
            let end = UnmapSpec {
                skip_sync: !at_map,
                ..written(mapped, 0)
            };
            let refused = unmap(&domain, DRIVER, end).unwrap_err();
            assert!(
                matches!(refused, UnmapError::WrittenUnwanted { .. }),
                "{refused}"
            );
            unmap(&domain, DRIVER, discarding(mapped)).unwrap();
        }
    }
}

#[test]
fn more_written_bytes_than_the_mapping_has_are_refused() {
    let domain = domain(4, 0);
    let buffer = Buffer::register(&domain, DRIVER, 1);
    for direction in [Direction::FromDevice, Direction::Bidirectional] {
        let mapped = map(&domain, DRIVER, buffer.spec(0, 100, direction)).unwrap();
        for too_many in [101, P, u64::MAX] {
            let refused = unmap(&domain, DRIVER, written(mapped, too_many)).unwrap_err();
            assert!(
                matches!(refused, UnmapError::WrittenTooLarge { written_bytes, len_bytes: 100 }
                    if written_bytes == too_many),
                "{refused}"
            );
        }
        assert_eq!(buffer.all(), pattern(P, 1));
        unmap(&domain, DRIVER, discarding(mapped)).unwrap();
    }
}

#[test]
fn a_second_unmap_finds_nothing_and_frees_nothing_of_others() {
    let domain = domain(8, 0);
    let buffer = Buffer::register(&domain, DRIVER, 1);
    let spec = buffer.spec(0, P, Direction::ToDevice);
    let mapped = map(&domain, DRIVER, spec).unwrap();
    unmap(&domain, DRIVER, ending(mapped)).unwrap();

    let again = unmap(&domain, DRIVER, ending(mapped)).unwrap_err();
    assert!(
        matches!(
            again,
            UnmapError::Missing(MappingMissing::NoSuchMapping { .. })
        ),
        "{again}"
    );
    let (first, second) = (
        map(&domain, DRIVER, spec).unwrap(),
        map(&domain, DRIVER, spec).unwrap(),
    );
    assert!(!visible(first).overlaps(visible(second)));

    // The first of them has the iova of the ended one, under another id.
    assert_eq!(first.iova, mapped.iova);
    let stale = unmap(&domain, DRIVER, ending(mapped)).unwrap_err();
    assert!(
        matches!(
            stale,
            UnmapError::Missing(MappingMissing::NoSuchMapping { .. })
        ),
        "{stale}"
    );
    assert_eq!(domain.usage().streaming, 2);
}

#[test]
fn a_wrong_name_ends_nothing_and_syncs_nothing() {
    let domain = domain(8, 0);
    let buffer = Buffer::register(&domain, DRIVER, 3);
    let spec = buffer.spec(0, 3 * P, Direction::Bidirectional);
    let mapped = map(&domain, DRIVER, spec).unwrap();
    let before = table(&domain);
    let named = |iova: u64, id| Mapped {
        iova: Iova::new(iova),
        id,
        ..mapped
    };
    let iova = mapped.iova.get();
    let stranger = crate::mapping::MappingId::new(mapped.id.get() + 1);
    let inside_and_stale = [
        named(iova + 1, mapped.id),
        named(iova + P, mapped.id),
        named(iova + 3 * P, mapped.id),
        named(iova - 1, mapped.id),
        named(0, mapped.id),
        named(u64::MAX, mapped.id),
        named(iova, stranger),
    ];

    for wrong in inside_and_stale {
        let end = unmap(&domain, DRIVER, ending(wrong)).unwrap_err();
        let copy = sync(&domain, DRIVER, part(wrong, 0, 1, SyncTarget::ForCpu)).unwrap_err();
        assert!(
            matches!(
                end,
                UnmapError::Missing(MappingMissing::NoSuchMapping { .. })
            ),
            "{end}"
        );
        assert!(
            matches!(
                copy,
                SyncError::Missing(MappingMissing::NoSuchMapping { .. })
            ),
            "{copy}"
        );
    }
    let end = unmap(&domain, OTHER, ending(mapped)).unwrap_err();
    let copy = sync(&domain, OTHER, part(mapped, 0, 1, SyncTarget::ForCpu)).unwrap_err();
    assert!(
        matches!(end, UnmapError::Missing(MappingMissing::NotYours { .. })),
        "{end}"
    );
    assert!(
        matches!(copy, SyncError::Missing(MappingMissing::NotYours { .. })),
        "{copy}"
    );

    assert_eq!(table(&domain), before);
    unmap(&domain, DRIVER, ending(mapped)).unwrap();
}

/// Lengths and places come from the record made at map: a device that writes
/// everywhere all the time moves nothing else.
#[test]
fn a_device_that_floods_the_aperture_changes_nothing_outside_the_buffer() {
    let domain = domain(8, 0);
    let buffer = Buffer::register(&domain, DRIVER, 4);
    let transfers = || {
        for round in 0..300 {
            let (offset, len) = (round * 13 % 5000, round * 29 % 8000 + 1);
            let count = round * 31 % (len + 1);
            let spec = buffer.spec(offset, len, Direction::FromDevice);
            buffer.write(0, &pattern(4 * P, round));
            let mapped = map(&domain, DRIVER, spec).unwrap();
            let came_back = unmap(&domain, DRIVER, written(mapped, count)).unwrap();

            assert_eq!(came_back, count);
            let (now, before) = (buffer.all(), pattern(4 * P, round));
            let (start, end) = (size(offset), size(offset + count));
            assert!(now[..start] == before[..start]);
            assert!(now[end..] == before[end..]);
        }
    };
    std::thread::scope(|scope| {
        let transfers = scope.spawn(transfers);
        while !transfers.is_finished() {
            device_floods(&domain, ApertureKind::Bounce, INTRUSION);
            device_floods(&domain, ApertureKind::Bounce, DIRT);
        }
    });
}

#[test]
fn nothing_of_an_earlier_mapping_shows_under_either_policy() {
    for scrub in [Scrub::OnMap, Scrub::OnUnmap] {
        let domain = empty_domain(8, 0, scrub);
        domain.join(DRIVER, Role::Driver).unwrap();
        let buffer = Buffer::register(&domain, DRIVER, 7);
        let dirty = map(&domain, DRIVER, buffer.spec(0, 7 * P, Direction::ToDevice)).unwrap();
        unmap(&domain, DRIVER, ending(dirty)).unwrap();

        let left = seen(&domain, visible(dirty));
        match scrub {
            Scrub::OnMap => assert_eq!(left, pattern(7 * P, 1)),
            Scrub::OnUnmap => assert_eq!(left, vec![0; size(7 * P)]),
        }

        let short = map(&domain, DRIVER, buffer.spec(0, 5, Direction::FromDevice)).unwrap();
        assert_eq!(
            seen(&domain, granules(visible(short))),
            vec![0; size(P)],
            "{scrub:?}"
        );
    }
}

#[test]
fn a_changed_scrub_policy_holds_from_the_next_unmap_on() {
    let domain = domain(8, 0);
    let buffer = Buffer::register(&domain, DRIVER, 1);
    let mapped = map(&domain, DRIVER, buffer.spec(0, P, Direction::ToDevice)).unwrap();

    domain.update(|quotas, _| (quotas, Scrub::OnUnmap)).unwrap();
    unmap(&domain, DRIVER, ending(mapped)).unwrap();

    assert_eq!(domain.scrub(), Scrub::OnUnmap);
    assert_eq!(seen(&domain, visible(mapped)), vec![0; size(P)]);
}

#[test]
fn a_copy_back_that_fails_leaves_the_mapping_live_and_endable() {
    let domain = domain(8, 0);
    let buffer = Buffer::register(&domain, DRIVER, 1);
    let spec = buffer.spec(8, 100, Direction::FromDevice);
    let mapped = map(&domain, DRIVER, spec).unwrap();
    device_writes(&domain, mapped.iova, &pattern(100, 2));
    let (usage, entries) = table(&domain);
    buffer.seal_against_writing();

    let refused = unmap(&domain, DRIVER, written(mapped, 60)).unwrap_err();
    assert!(
        matches!(
            &refused,
            UnmapError::Copy {
                offset: 8,
                len_bytes: 60,
                cause: CopyError::Io(_),
                ..
            }
        ),
        "{refused}"
    );
    let stuck = sync(&domain, DRIVER, part(mapped, 0, 9, SyncTarget::ForCpu)).unwrap_err();
    assert!(
        matches!(&stuck, SyncError::Copy { len_bytes: 9, .. }),
        "{stuck}"
    );

    domain.check_invariants();
    let (usage_after, entries_after) = table(&domain);
    assert_eq!(entries_after, entries);
    // Hidden and shown again: only the number of the state may differ.
    assert_eq!(
        Usage {
            generation: usage.generation,
            ..usage_after
        },
        usage
    );
    assert_eq!(seen(&domain, visible(mapped)), pattern(100, 2));
    unmap(&domain, DRIVER, discarding(mapped)).unwrap();
    assert_eq!(buffer.all(), pattern(P, 1));
    assert_eq!(domain.usage().bounce.used_bytes, 0);
}

#[test]
fn read_only_memory_is_bounced_to_the_device_and_no_other_way() {
    let domain = domain(8, 0);
    let fd = driver_memfd("read-only", P).unwrap();
    let id = domain
        .register(DRIVER, ClientMemory::accept(fd, false).unwrap())
        .unwrap();

    for direction in [Direction::FromDevice, Direction::Bidirectional] {
        let refused = map(&domain, DRIVER, MapSpec::new(id, 0, P, direction)).unwrap_err();
        assert!(
            matches!(refused, MapError::MemoryReadOnly { direction: d, .. } if d == direction),
            "{refused}"
        );
    }
    map(&domain, DRIVER, MapSpec::new(id, 0, P, Direction::ToDevice)).unwrap();
}
