//! Direct mappings: entered, placed, removed, translated.
//!
//! The numbers are those of the behaviour cases.

use super::*;
use crate::addr::RangeError;
use crate::alloc::AllocError;
use crate::direct::{Removed, UnmapDirectError};
use crate::domain::{Behind, InUse, Translated, TranslationError};
use crate::iotlb::TranslateError;
use crate::limits::{Quota, QuotaExceeded, TRANSLATE_PIECES};
use crate::memory::{MemoryMissing, UnregisterError};
use crate::region::SpanError;
use crate::session::Removal;
use crate::space::{PlaceError, RestrictionError};

const ALL: BatchMode = BatchMode::AllOrNothing;
const PARTIAL: BatchMode = BatchMode::Partial;

fn fixture() -> (Domain, Buffer) {
    let domain = bare();
    let buffer = Buffer::register(&domain, DRIVER, 64);
    (domain, buffer)
}

fn unmap(domain: &Domain, range: IovaRange) -> Result<Removed, UnmapDirectError> {
    counted(domain.unmap_direct(AS_DRIVER, &[range]))
}

fn clear(domain: &Domain, ranges: &[IovaRange]) -> Result<Removed, UnmapDirectError> {
    counted(domain.clear_map(AS_DRIVER, ranges))
}

/// Without what is to be waited for: nobody reads in these tests.
fn counted<E>(outcome: Result<(Removed, Removal), E>) -> Result<Removed, E> {
    outcome.map(|(removed, _)| removed)
}

fn removed(mappings: u64, pages: u64) -> Removed {
    let bytes = pages * P;
    Removed { mappings, bytes }
}

/// Four mappings of 8 pages, 16 pages apart, from page 100 on.
fn four(domain: &Domain, buffer: &Buffer) -> Vec<IovaRange> {
    let starts = [100, 116, 132, 148];
    let specs = starts.map(|page| buffer.at(page * P, 8));
    let mapped = domain.map_direct(AS_DRIVER, &specs, ALL).unwrap();
    mapped.into_iter().map(|one| one.unwrap().range).collect()
}

fn no_space(want_bytes: u64, largest_hole_bytes: u64) -> MapDirectError {
    let align_bytes = P;
    MapDirectError::NoSpace(AllocError::NoSpace {
        want_bytes,
        align_bytes,
        largest_hole_bytes,
    })
}

/// Case 1.
#[test]
fn unmapping_pages_of_an_empty_table_finds_nothing() {
    let (domain, _buffer) = fixture();
    let before = dump(&domain);
    for page in 0..10 {
        let range = pages(page, page);
        let nothing = UnmapDirectError::NotMapped { range };
        assert_eq!(unmap(&domain, range), Err(nothing));
    }
    assert_eq!(dump(&domain), before);
}

/// Case 2.
#[test]
fn ten_pages_go_one_by_one_as_they_came() {
    let (domain, buffer) = fixture();
    for page in 0..10 {
        let mapped = map_direct(&domain, AS_DRIVER, buffer.at(page * P, 1)).unwrap();
        assert_eq!(mapped, buffer.entry(pages(page, page)));
        domain.check_invariants();
    }
    for page in 0..10 {
        assert_eq!(unmap(&domain, pages(page, page)), Ok(removed(1, 1)));
        domain.check_invariants();
    }
    assert_eq!(domain.usage().direct, 0);
    domain.unregister(DRIVER, buffer.id).unwrap();
}

/// Cases 3 and 8.
#[test]
fn an_unmap_that_cuts_a_mapping_changes_nothing_and_names_it() {
    let (domain, buffer) = fixture();
    map_direct(&domain, AS_DRIVER, buffer.at(16 * P, 2)).unwrap();
    let four = four(&domain, &buffer);
    let before = dump(&domain);
    for (range, cut) in [
        (pages(16, 16), pages(16, 17)),
        (pages(17, 17), pages(16, 17)),
        (pages(15, 16), pages(16, 17)),
        (range(16 * P, 18 * P - 2), pages(16, 17)),
        (range(16 * P + 1, 18 * P - 1), pages(16, 17)),
        (pages(96, 103), four[0]),
        // The first and the second lie inside, the third does not.
        (pages(100, 132), four[2]),
    ] {
        let cuts = UnmapDirectError::Cuts { range, cut };
        assert_eq!(unmap(&domain, range), Err(cuts));
        assert_eq!(dump(&domain), before);
    }
    assert!(domain.translate(pages(16, 17), Perm::ReadWrite).is_ok());
}

/// Cases 7 and 10.
#[test]
fn unmapping_a_superset_counts_only_what_was_mapped() {
    let (domain, buffer) = fixture();
    four(&domain, &buffer);
    assert_eq!(unmap(&domain, pages(96, 160)), Ok(removed(4, 32)));
    assert_eq!(domain.usage().direct, 0);

    let specs: Vec<_> = (0..101).map(|at| buffer.at(2 * at * P, 1)).collect();
    domain.map_direct(AS_DRIVER, &specs, ALL).unwrap();
    let whole = range(0, u64::MAX);
    assert_eq!(unmap(&domain, whole), Ok(removed(101, 101)));
    domain.check_invariants();
}

#[test]
fn unmapping_everything_succeeds_on_an_empty_table_too() {
    let nothing = Ok(Removed::default());
    let (domain, _buffer) = fixture();
    assert_eq!(unmap(&domain, range(0, u64::MAX)), nothing);
    let range_but_one = range(1, u64::MAX);
    assert!(unmap(&domain, range_but_one).is_err());

    let small = bare_with(9 * P + 7, Granule::Size4K);
    assert_eq!(unmap(&small, range(0, 9 * P + 7)), nothing);
    assert_eq!(unmap(&small, range(0, u64::MAX)), nothing);
    assert!(unmap(&small, range(0, 9 * P + 6)).is_err());
}

/// Case 11.
#[test]
fn what_was_unmapped_is_gone_and_its_address_has_one_owner_again() {
    let (domain, buffer) = fixture();
    let foreign = Buffer::register(&domain, OTHER, 1);
    map_direct(&domain, AS_DRIVER, buffer.at(P, 1)).unwrap();
    let page = pages(1, 1);
    unmap(&domain, page).unwrap();
    let nothing = UnmapDirectError::NotMapped { range: page };
    assert_eq!(unmap(&domain, page), Err(nothing));
    assert_eq!(domain.lookup(page), None);

    map_direct(&domain, AS_OTHER, foreign.at(P, 1)).unwrap();
    assert_eq!(direct_table(&domain), [foreign.entry(page)]);
    let theirs = UnmapDirectError::NotYours { range: page };
    assert_eq!(unmap(&domain, page), Err(theirs));
}

#[test]
fn an_unmap_of_many_ranges_takes_all_of_them_or_none() {
    let (domain, buffer) = fixture();
    let four = four(&domain, &buffer);
    let before = dump(&domain);
    let unmap_all = |ranges: &[IovaRange]| counted(domain.unmap_direct(AS_DRIVER, ranges));

    let empty = pages(3, 3);
    let refused = UnmapDirectError::NotMapped { range: empty };
    assert_eq!(unmap_all(&[four[0], empty, four[1]]), Err(refused));
    let cutting = pages(100, 116);
    let refused = UnmapDirectError::Cuts {
        range: cutting,
        cut: four[1],
    };
    assert_eq!(unmap_all(&[four[3], cutting]), Err(refused));
    let refused = UnmapDirectError::Overlapping {
        one: pages(90, 107),
        other: pages(107, 107),
    };
    assert_eq!(unmap_all(&[pages(107, 107), pages(90, 107)]), Err(refused));
    // A mapping is inside one range, or it is cut: two that touch are not one.
    let halves = [pages(100, 103), pages(104, 107)];
    let refused = UnmapDirectError::Cuts {
        range: halves[0],
        cut: four[0],
    };
    assert_eq!(unmap_all(&halves), Err(refused));
    assert_eq!(dump(&domain), before);

    assert_eq!(unmap_all(&[]), Ok(Removed::default()));
    assert_eq!(unmap_all(&[four[3], four[0]]), Ok(removed(2, 16)));
    assert_eq!(direct_ranges(&domain), four[1..3]);
}

/// Cases 12 and 13.
#[test]
fn an_overlap_is_refused_naming_what_is_there_and_touching_is_none() {
    let (domain, buffer) = fixture();
    map_direct(&domain, AS_DRIVER, buffer.at(16 * P, 2)).unwrap();
    let before = dump(&domain);
    let hit = pages(16, 17);
    for (page, count) in [(16, 2), (16, 1), (17, 1), (15, 2), (15, 3)] {
        let range = pages(page, page + count - 1);
        let refused = map_direct(&domain, AS_DRIVER, buffer.at(page * P, count));
        assert_eq!(refused, Err(MapDirectError::Overlap { range, hit }));
        assert_eq!(dump(&domain), before);
    }
    for page in [15, 18] {
        map_direct(&domain, AS_DRIVER, buffer.at(page * P, 1)).unwrap();
    }
    let all = [pages(15, 15), pages(16, 17), pages(18, 18)];
    assert_eq!(direct_ranges(&domain), all);
}

/// P-01 range_edges, cases 4, 15, 18 and 41: every number that is wrong by
/// itself, and the corrected request at once.
#[test]
fn range_edges_are_refused_with_their_numbers_and_leave_no_trace() {
    let (domain, buffer) = fixture();
    let good = buffer.at(16 * P, 2);
    let at = |iova| DirectSpec {
        placement: Placement::At(Iova::new(iova)),
        ..good
    };
    let long = |len_bytes| DirectSpec { len_bytes, ..good };
    let from = |offset| DirectSpec { offset, ..good };
    let misaligned = |what, value| MapDirectError::Misaligned {
        what,
        value,
        granule_bytes: P,
    };
    let outside = |offset, len| {
        MapDirectError::Span(SpanError::OutsideMemory {
            offset,
            len,
            size: 64 * P,
        })
    };
    let zero = |start| {
        MapDirectError::Range(RangeError::ZeroLength {
            start: Iova::new(start),
        })
    };
    let over = |start, len_bytes| {
        MapDirectError::Range(RangeError::Overflow {
            start: Iova::new(start),
            len_bytes,
        })
    };
    let too_long = |len_bytes| MapDirectError::TooLong { len_bytes };
    let top = u64::MAX - P + 1;
    let before = dump(&domain);
    for (spec, error) in [
        (at(16 * P + P / 2), misaligned("iova", 16 * P + P / 2)),
        (at(1), misaligned("iova", 1)),
        (at(u64::MAX), misaligned("iova", u64::MAX)),
        (from(1), misaligned("offset", 1)),
        (long(0), zero(16 * P)),
        (long(1), misaligned("len_bytes", 1)),
        (long(P + 1), misaligned("len_bytes", P + 1)),
        (long(1 << 63), too_long(1 << 63)),
        (long(u64::MAX), too_long(u64::MAX)),
        (long((1 << 63) - P), outside(0, (1 << 63) - P)),
        (at(top), over(top, 2 * P)),
        (from(63 * P), outside(63 * P, 2 * P)),
        (from(top), outside(top, 2 * P)),
        (long(65 * P), outside(0, 65 * P)),
    ] {
        assert_eq!(map_direct(&domain, AS_DRIVER, spec), Err(error));
        assert_eq!(dump(&domain), before, "{spec:?}");
    }
    // Up to the last byte of the memory, and of the space.
    map_direct(&domain, AS_DRIVER, good).unwrap();
    map_direct(&domain, AS_DRIVER, from(62 * P)).unwrap_err();
    let last = DirectSpec {
        len_bytes: P,
        offset: 63 * P,
        ..at(top)
    };
    let mapped = map_direct(&domain, AS_DRIVER, last).unwrap();
    assert_eq!(mapped.range, range(top, u64::MAX));
    assert_eq!(
        domain.lookup(range(u64::MAX, u64::MAX)).unwrap().visible,
        mapped.range
    );
    assert_eq!(unmap(&domain, mapped.range), Ok(removed(1, 1)));
}

#[test]
fn a_limit_that_cuts_a_granule_ends_before_it() {
    let domain = bare_with(9 * P + 7, Granule::Size4K);
    let buffer = Buffer::register(&domain, DRIVER, 64);
    let past = |first, last| {
        MapDirectError::Place(PlaceError::PastLimit {
            range: pages(first, last),
            limit: Iova::new(9 * P + 7),
        })
    };
    for (page, count) in [(9, 1), (8, 2), (10, 1)] {
        let refused = map_direct(&domain, AS_DRIVER, buffer.at(page * P, count));
        assert_eq!(refused, Err(past(page, page + count - 1)));
    }
    let whole = map_direct(&domain, AS_DRIVER, buffer.at(0, 9)).unwrap();
    assert_eq!(whole.range, pages(0, 8));
    let full = map_direct(&domain, AS_DRIVER, buffer.anywhere(1));
    assert_eq!(full, Err(no_space(P, 0)));
}

#[test]
fn a_huge_granule_binds_iova_offset_and_length() {
    const G: u64 = 2 << 20;
    let domain = bare_with(u64::MAX, Granule::Size2M);
    let buffer = Buffer::sparse(&domain, DRIVER, 8 * G);
    let spec = |iova, offset, len_bytes| DirectSpec {
        offset,
        len_bytes,
        ..buffer.at(iova, 0)
    };
    for wrong in [spec(P, 0, G), spec(G, P, G), spec(G, 0, G + P)] {
        let refused = map_direct(&domain, AS_DRIVER, wrong).unwrap_err();
        assert!(
            matches!(
                refused,
                MapDirectError::Misaligned {
                    granule_bytes: G,
                    ..
                }
            ),
            "{refused}"
        );
    }
    let last = spec(u64::MAX - G + 1, G, G);
    let mapped = map_direct(&domain, AS_DRIVER, last).unwrap();
    assert_eq!(mapped.range.last(), Iova::new(u64::MAX));
    let placed = DirectSpec {
        len_bytes: 3 * G,
        ..buffer.anywhere(0)
    };
    let placed = map_direct(&domain, AS_DRIVER, placed).unwrap();
    assert_eq!(placed.range, range(G, 4 * G - 1));
    domain.check_invariants();
}

/// Case 19: a file of one page where two are asked for.
#[test]
fn memory_that_ends_half_way_leaves_no_part_of_a_mapping() {
    let domain = bare();
    let half = Buffer::register(&domain, DRIVER, 1);
    let before = dump(&domain);
    let refused = map_direct(&domain, AS_DRIVER, half.at(P, 2)).unwrap_err();
    assert!(matches!(refused, MapDirectError::Span(_)), "{refused}");
    assert_eq!(dump(&domain), before);
    map_direct(&domain, AS_DRIVER, half.at(P, 1)).unwrap();
}

/// Case 20.
#[test]
fn ten_automatic_pages_have_ten_addresses_none_of_them_0() {
    let (domain, buffer) = fixture();
    let answers = domain.map_direct(AS_DRIVER, &[buffer.anywhere(1); 10], ALL);
    let placed: Vec<_> = answers
        .unwrap()
        .into_iter()
        .map(|one| one.unwrap().range)
        .collect();
    let expected: Vec<_> = (1..=10).map(|page| pages(page, page)).collect();
    assert_eq!(placed, expected);
    assert_eq!(direct_ranges(&domain), expected);
}

/// Cases 22 and 35.
#[test]
fn no_byte_lies_inside_a_reserved_range() {
    let (domain, buffer) = fixture();
    let reserved = pages(4, 103);
    restrict(&domain, vec![reserved], vec![]).unwrap();
    for count in 1..=10 {
        let placed = map_direct(&domain, AS_DRIVER, buffer.anywhere(count)).unwrap();
        assert!(!placed.range.overlaps(reserved), "{}", placed.range);
    }
    for (first, last) in [(3, 4), (103, 104), (50, 50), (3, 60)] {
        let range = pages(first, last);
        let fixed = buffer.at(first * P, last - first + 1);
        let touches = PlaceError::Reserved { range, reserved };
        let refused = map_direct(&domain, AS_DRIVER, fixed).unwrap_err();
        assert_eq!(refused, MapDirectError::Place(touches));
    }
}

/// Cases 23, 24 and 25.
#[test]
fn automatic_places_lie_wholly_inside_what_is_allowed() {
    let (domain, buffer) = fixture();
    let allowed = pages(200, 219);
    restrict(&domain, vec![], vec![allowed]).unwrap();
    for _ in 0..10 {
        let placed = map_direct(&domain, AS_DRIVER, buffer.anywhere(2)).unwrap();
        assert!(allowed.contains(placed.range), "{}", placed.range);
    }
    // It is full, to the last page.
    let full = map_direct(&domain, AS_DRIVER, buffer.anywhere(1));
    assert_eq!(full, Err(no_space(P, 0)));
    map_direct(&domain, AS_DRIVER, buffer.at(300 * P, 1)).unwrap();

    restrict(&domain, vec![], vec![]).unwrap();
    let placed = map_direct(&domain, AS_DRIVER, buffer.anywhere(1)).unwrap();
    assert_eq!(placed.range, pages(1, 1));
}

/// Case 26.
#[test]
fn lengths_that_no_file_has_are_refused_at_once() {
    let (domain, buffer) = fixture();
    for len_bytes in [1 << 63, (1 << 63) + P, u64::MAX - P + 1, u64::MAX] {
        let spec = DirectSpec {
            len_bytes,
            ..buffer.anywhere(1)
        };
        let refused = map_direct(&domain, AS_DRIVER, spec);
        assert_eq!(refused, Err(MapDirectError::TooLong { len_bytes }));
    }
}

/// Case 29, what of it shows without a clock: the full upper half is not in the
/// way, and a limit and an alignment hold.
#[test]
fn a_limited_place_is_found_below_a_full_upper_half() {
    let domain = bare_with((1 << 33) - 1, Granule::Size4K);
    let buffer = Buffer::sparse(&domain, DRIVER, 1 << 32);
    let upper = buffer.at(1 << 32, 1 << 20);
    map_direct(&domain, AS_DRIVER, upper).unwrap();
    let limited = |align_bytes, limit| DirectSpec {
        placement: Placement::Anywhere {
            align_bytes,
            limit: Some(Iova::new(limit)),
        },
        ..buffer.anywhere(1)
    };
    let placed = |spec| map_direct(&domain, AS_DRIVER, spec).map(|mapped| mapped.range);
    assert_eq!(placed(limited(0, u64::from(u32::MAX))), Ok(pages(1, 1)));
    assert_eq!(placed(limited(8 * P, 9 * P - 1)), Ok(pages(8, 8)));
    assert_eq!(
        placed(limited(8 * P, 9 * P - 1)),
        Err(MapDirectError::NoSpace(AllocError::NoSpace {
            want_bytes: P,
            align_bytes: 8 * P,
            largest_hole_bytes: 6 * P
        }))
    );
    let odd = MapDirectError::NoSpace(AllocError::BadAlignment { align_bytes: 3 });
    assert_eq!(placed(limited(3, u64::MAX)), Err(odd));
}

/// Cases 30 and 32.
#[test]
fn restrictions_that_cannot_be_leave_the_old_ones_and_all_other_settings() {
    let (domain, buffer) = fixture();
    map_direct(&domain, AS_DRIVER, buffer.at(16 * P, 2)).unwrap();
    restrict(&domain, vec![pages(4, 5)], vec![pages(1, 99)]).unwrap();
    let before = dump(&domain);

    let range = pages(17, 30);
    let hit = pages(16, 17);
    let in_use = RestrictionError::InUse { range, hit };
    let restrictions = Restrictions::new(vec![range], vec![]).unwrap();
    let quotas = Quotas {
        direct: 7,
        ..Quotas::default()
    };
    let all = Settings {
        quotas,
        scrub: Scrub::OnUnmap,
        restrictions,
    };
    let refused = domain.update(|_| Ok(all));
    assert_eq!(refused, Err(UpdateError::Restriction(in_use)));
    let backwards = restrict(&domain, vec![], vec![pages(1, 9), pages(9, 10)]);
    assert!(backwards.is_err());
    assert_eq!(dump(&domain), before);
    // Beside it is fine, and so is what is allowed beside what is mapped.
    restrict(
        &domain,
        vec![pages(15, 15), pages(18, 18)],
        vec![pages(50, 60)],
    )
    .unwrap();
    domain.check_invariants();
}

#[test]
fn a_reserved_range_over_an_aperture_is_refused_at_create_and_later() {
    let layout = LayoutSpec {
        bounce_bytes: 4 * P,
        coherent_bytes: 0,
        ..LayoutSpec::default()
    };
    let layout = layout.plan().unwrap();
    let settings = Settings {
        restrictions: Restrictions::new(vec![pages(3, 9)], vec![]).unwrap(),
        ..Settings::default()
    };
    let refused = Domain::create("reserved", layout, settings, ScrubWith::Zero).unwrap_err();
    let hit = pages(0, 3);
    let range = pages(3, 9);
    let in_use = RestrictionError::InUse { range, hit };
    assert!(
        matches!(refused, crate::domain::CreateError::Restriction(error) if error == in_use),
        "{refused}"
    );
    assert_eq!(open_fds("domaind:reserved:bounce"), 0);
    let later = restrict(&domain(4, 0), vec![range], vec![]);
    assert_eq!(later, Err(UpdateError::Restriction(in_use)));
}

/// Case 33, of a domain.
#[test]
fn the_ranges_are_the_space_without_apertures_and_reserved_mapped_or_not() {
    let (domain, buffer) = fixture();
    assert_eq!(domain.direct_ranges(), [range(0, u64::MAX)]);
    restrict(&domain, vec![pages(1, 1)], vec![pages(50, 60)]).unwrap();
    map_direct(&domain, AS_DRIVER, buffer.at(2 * P, 5)).unwrap();
    let around = [range(0, P - 1), range(2 * P, u64::MAX)];
    assert_eq!(domain.direct_ranges(), around);
    let with_apertures = super::domain(4, 4);
    let above = range(8 * P, (1 << 48) - 1);
    assert_eq!(with_apertures.direct_ranges(), [above]);
}

/// Case 42.
#[test]
fn read_only_memory_is_mapped_for_reading_alone() {
    let domain = bare();
    let fd = driver_memfd("read-only", P).unwrap();
    let memory = ClientMemory::accept(fd, false).unwrap();
    let id = domain.register(DRIVER, memory, false).unwrap();
    let spec = |perm| DirectSpec {
        memory: id,
        offset: 0,
        len_bytes: P,
        perm,
        placement: Placement::At(Iova::new(P)),
    };
    for perm in [Perm::Write, Perm::ReadWrite] {
        let refused = map_direct(&domain, AS_DRIVER, spec(perm));
        assert_eq!(refused, Err(MapDirectError::MemoryReadOnly { id, perm }));
    }
    map_direct(&domain, AS_DRIVER, spec(Perm::Read)).unwrap();
    let too_much = TranslateError::Perm {
        range: pages(1, 1),
        perm: Perm::Read,
        want: Perm::Write,
    };
    let refused = domain.translate(pages(1, 1), Perm::Write);
    assert_eq!(refused, Err(TranslationError::Translate(too_much)));
}

/// Cases 46 and 59: one memory at two places, and the way back finds both.
#[test]
fn a_byte_of_a_memory_leads_back_to_every_mapping_that_shows_it() {
    let (domain, buffer) = fixture();
    let theirs = Buffer::register(&domain, OTHER, 64);
    let shifted = DirectSpec {
        offset: 3 * P,
        ..buffer.at(100 * P, 2)
    };
    let specs = [buffer.at(16 * P, 8), shifted, buffer.at(32 * P, 3)];
    domain.map_direct(AS_DRIVER, &specs, ALL).unwrap();
    map_direct(&domain, AS_OTHER, theirs.at(200 * P, 8)).unwrap();
    let shows = |memory, memory_offset| {
        let filter = MappingFilter {
            memory,
            memory_offset: Some(memory_offset),
            ..MappingFilter::default()
        };
        let listed = domain.mappings(filter, Iova::new(0), 99);
        listed.iter().map(|view| view.visible).collect::<Vec<_>>()
    };
    let both = [pages(16, 23), pages(100, 101)];
    assert_eq!(shows(Some(buffer.id), 3 * P), both);
    assert_eq!(shows(Some(buffer.id), 5 * P - 1), both);
    assert_eq!(shows(Some(buffer.id), 5 * P), [pages(16, 23)]);
    assert_eq!(
        shows(Some(buffer.id), 3 * P - 1),
        [pages(16, 23), pages(32, 34)]
    );
    assert_eq!(shows(Some(buffer.id), 8 * P), []);
    assert_eq!(shows(Some(theirs.id), 0), [pages(200, 207)]);
    assert_eq!(shows(None, 0).len(), 3);

    let piece = |page, offset| Translated {
        range: pages(page, page),
        kind: MappingKind::Direct,
        behind: Behind::Memory(buffer.id),
        offset,
        perm: Perm::ReadWrite,
    };
    let (pieces, _) = domain.translate(pages(19, 19), Perm::Read).unwrap();
    assert_eq!(pieces, [piece(19, 3 * P)]);
    let (pieces, _) = domain.translate(pages(100, 100), Perm::Read).unwrap();
    assert_eq!(pieces, [piece(100, 3 * P)]);
}

/// Case 55.
#[test]
fn a_lookup_finds_the_lowest_mapping_whole() {
    let (domain, buffer) = fixture();
    let specs = [10, 20, 30].map(|page| buffer.at(page * P, 4));
    domain.map_direct(AS_DRIVER, &specs, ALL).unwrap();
    let found = |first, last| domain.lookup(range(first, last)).map(|view| view.visible);
    assert_eq!(found(0, u64::MAX), Some(pages(10, 13)));
    assert_eq!(found(12 * P + 7, 31 * P), Some(pages(10, 13)));
    assert_eq!(found(14 * P, 21 * P), Some(pages(20, 23)));
    assert_eq!(found(24 * P - 1, 24 * P - 1), Some(pages(20, 23)));
    assert_eq!(found(24 * P, 30 * P - 1), None);
    let view = domain.lookup(pages(12, 12)).unwrap();
    assert_eq!((view.id, view.owner), (None, Some(DRIVER)));
    assert_eq!(view.source().unwrap().memory, buffer.id);
}

/// Case 57.
#[test]
fn a_translation_spans_neighbours_and_shows_nothing_before_a_hole() {
    let (domain, buffer) = fixture();
    let second = DirectSpec {
        offset: 9 * P,
        perm: Perm::Read,
        ..buffer.at(12 * P, 2)
    };
    domain
        .map_direct(AS_DRIVER, &[buffer.at(10 * P, 2), second], ALL)
        .unwrap();
    let (pieces, generation) = domain
        .translate(range(11 * P + 5, 13 * P), Perm::Read)
        .unwrap();
    let piece = |range, offset, perm| Translated {
        range,
        kind: MappingKind::Direct,
        behind: Behind::Memory(buffer.id),
        offset,
        perm,
    };
    let both = [
        piece(range(11 * P + 5, 12 * P - 1), P + 5, Perm::ReadWrite),
        piece(range(12 * P, 13 * P), 9 * P, Perm::Read),
    ];
    assert_eq!(pieces, both);
    assert_eq!(generation, domain.usage().generation);
    for (first, last, at) in [(10 * P, 14 * P, 14 * P), (9 * P, 12 * P, 9 * P)] {
        let at = Iova::new(at);
        let hole = TranslateError::Hole { at };
        let refused = domain.translate(range(first, last), Perm::Read);
        assert_eq!(refused, Err(TranslationError::Translate(hole)));
    }
}

#[test]
fn a_translation_of_too_many_pieces_is_refused() {
    let (domain, buffer) = fixture();
    let most = TRANSLATE_PIECES;
    let last = most as u64;
    for chunk in (0..=last).collect::<Vec<_>>().chunks(1000) {
        let specs: Vec<_> = chunk.iter().map(|page| buffer.at(page * P, 1)).collect();
        domain.map_direct(AS_DRIVER, &specs, ALL).unwrap();
    }
    let (pieces, _) = domain.translate(pages(1, last), Perm::Read).unwrap();
    assert_eq!(pieces.len(), most);
    let range = pages(0, last);
    let refused = domain.translate(range, Perm::Read);
    assert_eq!(
        refused,
        Err(TranslationError::TooManyPieces { range, most })
    );
}

/// Case 62, and clear_map in general.
#[test]
fn clearing_one_byte_takes_the_whole_mapping_and_no_other() {
    let (domain, buffer) = fixture();
    let four = four(&domain, &buffer);
    let byte = |page| range(page * P + 9, page * P + 9);
    assert_eq!(clear(&domain, &[byte(103)]), Ok(removed(1, 8)));
    assert_eq!(direct_ranges(&domain), four[1..]);
    // A mapping that several ranges touch goes once; nothing is no error.
    let ranges = [byte(117), byte(116), pages(50, 116), byte(116), byte(0)];
    assert_eq!(clear(&domain, &ranges), Ok(removed(1, 8)));
    assert_eq!(clear(&domain, &ranges), Ok(Removed::default()));
    assert_eq!(clear(&domain, &[]), Ok(Removed::default()));
    // Two ranges that touch one mapping, none overlapping the other.
    assert_eq!(
        clear(&domain, &[byte(139), byte(132), byte(149)]),
        Ok(removed(2, 16))
    );
    assert_eq!(domain.usage().direct, 0);
    domain.check_invariants();
}

/// Case 51.
#[test]
fn clearing_one_listed_and_one_absent_range_takes_only_the_listed() {
    let (domain, buffer) = fixture();
    let four = four(&domain, &buffer);
    assert_eq!(clear(&domain, &[four[2], pages(1, 9)]), Ok(removed(1, 8)));
    assert_eq!(direct_ranges(&domain), [four[0], four[1], four[3]]);
}

/// A thousand times the whole space costs what one time costs: with each range
/// for itself this would be 10^8 steps under the lock.
#[test]
fn clearing_the_same_range_again_and_again_in_one_request_is_one_clearing() {
    let (domain, buffer) = fixture();
    for chunk in (0..100).collect::<Vec<u64>>().chunks(50) {
        let specs: Vec<_> = chunk.iter().map(|page| buffer.at(page * P, 1)).collect();
        domain.map_direct(AS_DRIVER, &specs, ALL).unwrap();
    }
    let all = vec![range(0, u64::MAX); 1024];
    assert_eq!(clear(&domain, &all), Ok(removed(100, 100)));
}

#[test]
fn a_batch_is_entered_whole_or_not_at_all() {
    let (domain, buffer) = fixture();
    map_direct(&domain, AS_DRIVER, buffer.at(16 * P, 2)).unwrap();
    let before = table(&domain);
    let good = [buffer.at(P, 1), buffer.anywhere(1), buffer.at(40 * P, 1)];
    let unknown = DirectSpec {
        memory: MemoryId::new(99),
        ..good[0]
    };
    for refused_at in 0..=3 {
        let mut specs = good.to_vec();
        specs.insert(refused_at, unknown);
        let refused = domain.map_direct(AS_DRIVER, &specs, ALL).unwrap_err();
        assert_eq!(refused.index, refused_at);
        let id = MemoryId::new(99);
        let missing = MemoryMissing::NoSuchMemory { id };
        assert_eq!(refused.error, MapDirectError::Memory(missing));
        // Only the number of the state may have grown; that of the table has not.
        let after = table(&domain);
        let generation = before.0.generation;
        assert_eq!(
            Usage {
                generation,
                ..after.0
            },
            before.0
        );
        assert_eq!(after.1, before.1);
        domain.check_invariants();
    }
    let answers = domain.map_direct(AS_DRIVER, &good, ALL).unwrap();
    let starts: Vec<_> = answers.iter().map(|one| one.unwrap().range).collect();
    assert_eq!(starts, [pages(1, 1), pages(2, 2), pages(40, 40)]);
}

#[test]
fn a_partial_batch_answers_each_entry_for_itself() {
    let (domain, buffer) = fixture();
    let (first, second) = (buffer.at(P, 2), buffer.at(2 * P, 2));
    let after = buffer.at(3 * P, 1);
    let answers = domain.map_direct(AS_DRIVER, &[first, second, after, second], PARTIAL);
    let clash = |other, index| {
        Err(MapDirectError::OverlapsEntry {
            range: pages(2, 3),
            other,
            index,
        })
    };
    let entered = |range| Ok(buffer.entry(range));
    let expected = [
        entered(pages(1, 2)),
        clash(pages(1, 2), 0),
        entered(pages(3, 3)),
        clash(pages(1, 2), 0),
    ];
    assert_eq!(answers.unwrap(), expected);
    assert_eq!(direct_ranges(&domain), [pages(1, 2), pages(3, 3)]);
}

#[test]
fn an_overlap_inside_a_request_is_told_from_one_with_the_table() {
    let (domain, buffer) = fixture();
    map_direct(&domain, AS_DRIVER, buffer.at(50 * P, 1)).unwrap();
    let inside = [buffer.at(9 * P, 1), buffer.at(P, 4), buffer.at(4 * P, 1)];
    let refused = domain.map_direct(AS_DRIVER, &inside, ALL).unwrap_err();
    let clash = MapDirectError::OverlapsEntry {
        range: pages(4, 4),
        other: pages(1, 4),
        index: 1,
    };
    assert_eq!((refused.index, refused.error), (2, clash));
    let outside = [buffer.at(9 * P, 1), buffer.at(49 * P, 3)];
    let refused = domain.map_direct(AS_DRIVER, &outside, ALL).unwrap_err();
    let hit = MapDirectError::Overlap {
        range: pages(49, 51),
        hit: pages(50, 50),
    };
    assert_eq!((refused.index, refused.error), (1, hit));
    assert_eq!(direct_ranges(&domain), [pages(50, 50)]);
}

#[test]
fn the_quota_of_direct_mappings_is_reached_exactly() {
    let (domain, buffer) = fixture();
    let quotas = Quotas {
        direct: 3,
        ..Quotas::default()
    };
    set_quotas(&domain, quotas).unwrap();
    let full = QuotaExceeded {
        quota: Quota::Direct,
        limit: 3,
        used: 3,
    };
    let refused = domain.map_direct(AS_DRIVER, &[buffer.anywhere(1); 4], ALL);
    assert_eq!(refused.unwrap_err().error, MapDirectError::Quota(full));
    domain
        .map_direct(AS_DRIVER, &[buffer.anywhere(1); 3], ALL)
        .unwrap();
    let refused = map_direct(&domain, AS_DRIVER, buffer.anywhere(1));
    assert_eq!(refused, Err(MapDirectError::Quota(full)));
    unmap(&domain, pages(2, 2)).unwrap();
    map_direct(&domain, AS_DRIVER, buffer.anywhere(1)).unwrap();

    let below = Quotas {
        direct: 2,
        ..quotas
    };
    let below_use = QuotaExceeded { limit: 2, ..full };
    assert_eq!(
        set_quotas(&domain, below),
        Err(UpdateError::Quota(below_use))
    );
    assert_eq!(domain.settings().quotas, quotas);
}

#[test]
fn memory_that_is_mapped_directly_stays_and_says_by_how_many() {
    let (domain, buffer) = fixture();
    let id = buffer.id;
    domain
        .map_direct(AS_DRIVER, &[buffer.anywhere(1); 2], ALL)
        .unwrap();
    let in_use = |direct| {
        Err(UnregisterError::InUse {
            id,
            mappings: 0,
            direct,
        })
    };
    assert_eq!(domain.unregister(DRIVER, id), in_use(2));
    assert_eq!(domain.memories(id, 1)[0].direct, 2);
    unmap(&domain, pages(1, 1)).unwrap();
    assert_eq!(domain.unregister(DRIVER, id), in_use(1));
    unmap(&domain, pages(2, 2)).unwrap();
    domain.unregister(DRIVER, id).unwrap();
}

#[test]
fn the_end_of_a_session_takes_its_direct_mappings_and_no_others() {
    let (domain, buffer) = fixture();
    let theirs = Buffer::register(&domain, OTHER, 4);
    map_direct(&domain, AS_DRIVER, buffer.at(P, 1)).unwrap();
    // Entered by the owner, and of the session's memory all the same.
    map_direct(&domain, Actor::Owner, buffer.at(2 * P, 1)).unwrap();
    map_direct(&domain, AS_OTHER, theirs.at(3 * P, 1)).unwrap();
    let before = domain.usage();

    domain.leave(DRIVER);

    assert_eq!(direct_ranges(&domain), [pages(3, 3)]);
    let usage = domain.usage();
    assert!(usage.direct_generation > before.direct_generation);
    domain.check_invariants();
    // Its number in the table is another's now, and leads there.
    let next = Buffer::register(&domain, OTHER, 4);
    map_direct(&domain, AS_OTHER, next.at(P, 1)).unwrap();
    let memories: Vec<_> = direct_table(&domain)
        .iter()
        .map(|entry| entry.memory)
        .collect();
    assert_eq!(memories, [next.id, theirs.id]);
}

#[test]
fn persistent_memory_outlives_its_session_and_any_driver_uses_and_ends_it() {
    let domain = domain(8, 0);
    let fd_name = "persistent-memory";
    let fd = driver_memfd(fd_name, 4 * P).unwrap();
    let memory = ClientMemory::accept(fd, true).unwrap();
    let id = domain.register(DRIVER, memory, true).unwrap();
    assert_eq!(domain.holdings(DRIVER).unwrap().memories, 0);
    assert_eq!(domain.memories(id, 1)[0].owner, None);
    let spec = DirectSpec {
        memory: id,
        offset: 0,
        len_bytes: P,
        perm: Perm::ReadWrite,
        placement: Placement::At(Iova::new(100 * P)),
    };
    map_direct(&domain, AS_DRIVER, spec).unwrap();

    domain.leave(DRIVER);

    domain.check_invariants();
    assert_eq!(direct_ranges(&domain), [pages(100, 100)]);
    assert_eq!(domain.lookup(pages(100, 100)).unwrap().owner, None);
    let bounced = MapSpec::new(id, 0, 10, Direction::ToDevice);
    let mapped = map(&domain, OTHER, bounced).unwrap();
    let in_use = UnregisterError::InUse {
        id,
        mappings: 1,
        direct: 1,
    };
    assert_eq!(domain.unregister(OTHER, id), Err(in_use));
    super::unmap(&domain, OTHER, ending(mapped)).unwrap();
    domain.unmap_direct(AS_OTHER, &[pages(100, 100)]).unwrap();
    assert!(domain.unregister(DEVICE, id).is_err());
    assert_eq!(open_fds(fd_name), 1);
    domain.unregister(OTHER, id).unwrap();
    assert_eq!(open_fds(fd_name), 0);
}

#[test]
fn what_is_anothers_can_be_seen_but_neither_used_nor_ended() {
    let (domain, buffer) = fixture();
    let mine = map_direct(&domain, AS_DRIVER, buffer.at(P, 2)).unwrap();
    let before = dump(&domain);
    assert_eq!(domain.lookup(mine.range).unwrap().owner, Some(DRIVER));
    let id = buffer.id;
    let missing = MapDirectError::Memory(MemoryMissing::NotYours { id });
    assert_eq!(
        map_direct(&domain, AS_OTHER, buffer.at(9 * P, 1)),
        Err(missing)
    );
    let theirs = UnmapDirectError::NotYours { range: mine.range };
    assert_eq!(domain.unmap_direct(AS_OTHER, &[mine.range]), Err(theirs));
    assert_eq!(domain.clear_map(AS_OTHER, &[mine.range]), Err(theirs));
    assert_eq!(dump(&domain), before);
    // The owner may.
    map_direct(&domain, Actor::Owner, buffer.at(9 * P, 1)).unwrap();
    let whole = range(0, u64::MAX);
    assert_eq!(
        counted(domain.unmap_direct(Actor::Owner, &[whole])),
        Ok(removed(2, 3))
    );
}

#[test]
fn a_foreign_mapping_among_ones_own_keeps_all_of_them() {
    let (domain, buffer) = fixture();
    let theirs = Buffer::register(&domain, OTHER, 4);
    map_direct(&domain, AS_DRIVER, buffer.at(P, 1)).unwrap();
    map_direct(&domain, AS_OTHER, theirs.at(2 * P, 1)).unwrap();
    let before = dump(&domain);
    let foreign = UnmapDirectError::NotYours { range: pages(2, 2) };
    assert_eq!(unmap(&domain, pages(0, 9)), Err(foreign));
    assert_eq!(clear(&domain, &[pages(1, 2)]), Err(foreign));
    assert_eq!(dump(&domain), before);
}

#[test]
fn devices_strangers_and_a_closed_domain_change_no_direct_mapping() {
    let (domain, buffer) = fixture();
    map_direct(&domain, AS_DRIVER, buffer.at(P, 1)).unwrap();
    let refusals = |actor| {
        let spec = buffer.at(9 * P, 1);
        let Err(MapDirectError::Denied(map)) = map_direct(&domain, actor, spec) else {
            panic!("it maps");
        };
        let all = [pages(1, 1)];
        let Err(UnmapDirectError::Denied(unmap)) = domain.unmap_direct(actor, &all) else {
            panic!("it unmaps");
        };
        let Err(UnmapDirectError::Denied(clear)) = domain.clear_map(actor, &all) else {
            panic!("it clears");
        };
        let set = domain.set_map(actor, &[], None);
        let Err(crate::direct::SetMapError::Denied(set)) = set else {
            panic!("it sets");
        };
        [map, unmap, clear, set]
    };
    let before = dump(&domain);
    let wrong_role = Denied::WrongRole {
        session: DEVICE,
        role: Role::Device,
    };
    assert_eq!(refusals(Actor::Session(DEVICE)), [wrong_role; 4]);
    let session = SessionId::new(99);
    let ended = Denied::SessionEnded { session };
    assert_eq!(refusals(Actor::Session(session)), [ended; 4]);
    assert_eq!(dump(&domain), before);

    domain.close(Close::Force).unwrap();
    for actor in [AS_DRIVER, Actor::Owner] {
        assert_eq!(refusals(actor), [Denied::DomainClosed; 4]);
    }
    // What is mapped can still be looked at until its session has left.
    assert!(domain.lookup(pages(1, 1)).is_some());
    domain.leave(DRIVER);
    assert_eq!(domain.usage().direct, 0);
}

/// Case 67 and D12, what of it the core decides.
#[test]
fn direct_mappings_and_memories_are_use_and_a_close_says_so() {
    let domain = bare();
    let kept = Buffer::persistent(&domain, DRIVER, 1);
    map_direct(&domain, AS_DRIVER, kept.at(P, 1)).unwrap();
    for session in [DRIVER, OTHER, DEVICE] {
        domain.leave(session);
    }
    let in_use = |direct| {
        Err(InUse {
            sessions: 0,
            streaming: 0,
            leases: 0,
            coherent: 0,
            direct,
            memories: 1,
        })
    };
    assert_eq!(domain.close(Close::IfUnused), in_use(1));
    domain.clear_map(Actor::Owner, &[pages(1, 1)]).unwrap();
    assert_eq!(domain.close(Close::IfUnused), in_use(0));
    assert_eq!(domain.close(Close::Force), Ok(vec![]));
}

/// Cases 68 and D13.
#[test]
fn two_domains_have_independent_tables() {
    let (here, there) = (bare(), bare());
    let one = Buffer::register(&here, DRIVER, 1);
    let two = Buffer::register(&there, DRIVER, 2);
    map_direct(&here, AS_DRIVER, one.at(P, 1)).unwrap();
    assert_eq!(there.lookup(pages(1, 1)), None);
    map_direct(&there, AS_DRIVER, two.at(P, 2)).unwrap();
    here.clear_map(AS_DRIVER, &[range(0, u64::MAX)]).unwrap();
    assert_eq!(here.usage().direct, 0);
    assert_eq!(direct_ranges(&there), [pages(1, 2)]);
}

/// D2.
#[test]
fn direct_ranges_of_a_fresh_domain_translate_nothing() {
    let domain = bare();
    for at in [0, P, 1 << 32, u64::MAX] {
        let byte = range(at, at);
        let at = Iova::new(at);
        let hole = TranslationError::Translate(TranslateError::Hole { at });
        assert_eq!(domain.translate(byte, Perm::Read), Err(hole));
        assert_eq!(domain.lookup(byte), None);
    }
}

#[test]
fn every_change_and_no_refusal_has_a_direct_generation_of_its_own() {
    let domain = domain(8, 8);
    let buffer = Buffer::register(&domain, DRIVER, 8);
    let number = || domain.usage().direct_generation;
    assert_eq!(number(), 0);
    map_direct(&domain, AS_DRIVER, buffer.at(100 * P, 1)).unwrap();
    let mapped = number();
    assert_eq!(mapped, domain.usage().generation);
    // Not of what is bounced, nor of what is refused, nor of an empty clearing.
    map(&domain, DRIVER, buffer.spec(0, 1, Direction::ToDevice)).unwrap();
    let refused = [buffer.at(200 * P, 1), buffer.at(100 * P, 1)];
    domain.map_direct(AS_DRIVER, &refused, ALL).unwrap_err();
    clear(&domain, &[pages(300, 300)]).unwrap();
    unmap(&domain, pages(300, 300)).unwrap_err();
    assert_eq!(number(), mapped);
    clear(&domain, &[pages(100, 100)]).unwrap();
    assert!(number() > mapped);
    assert_eq!(number(), domain.usage().generation);
}

#[test]
fn direct_mappings_below_and_above_the_apertures_are_listed_in_order() {
    let layout = LayoutSpec {
        bounce_bytes: 4 * P,
        coherent_bytes: 4 * P,
        aperture_base: 16 * P,
        ..LayoutSpec::default()
    };
    let layout = layout.plan().unwrap();
    let domain = Domain::create("middle", layout, Settings::default(), ScrubWith::Zero).unwrap();
    domain.join(DRIVER, Role::Driver).unwrap();
    let buffer = Buffer::register(&domain, DRIVER, 4);
    let specs = [15, 2, 24, 40].map(|page| buffer.at(page * P, 1));
    domain.map_direct(AS_DRIVER, &specs, ALL).unwrap();
    let mapped = map(&domain, DRIVER, buffer.spec(0, P, Direction::ToDevice)).unwrap();
    let made = domain
        .alloc_coherent(DRIVER, &crate::coherent::CoherentSpec::of(P))
        .unwrap();
    let all = [
        pages(2, 2),
        pages(15, 15),
        visible(mapped),
        made.range,
        pages(24, 24),
        pages(40, 40),
    ];
    let listed = |from, max| -> Vec<_> {
        let views = domain.mappings(MappingFilter::default(), from, max);
        views.iter().map(|view| view.visible).collect()
    };
    assert_eq!(listed(Iova::new(0), 99), all);
    for (at, range) in all.iter().enumerate() {
        assert_eq!(listed(range.start(), 99), all[at..], "from {range}");
        assert_eq!(listed(range.start(), 1), all[at..=at]);
        let behind = range.start().checked_add(1).unwrap();
        assert_eq!(listed(behind, 99), all[at + 1..], "behind {range}");
    }
    let filter = MappingFilter {
        range: Some(range(15 * P + 9, 24 * P)),
        ..MappingFilter::default()
    };
    let views = domain.mappings(filter, Iova::new(0), 99);
    let shown: Vec<_> = views.iter().map(|view| view.visible).collect();
    assert_eq!(shown, all[1..5]);
}

/// Sparse: no huge page is needed to have a hugetlb file.
#[test]
fn memory_on_huge_pages_is_mapped_directly() {
    use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
    let flags = MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB | MemfdFlags::ALLOW_SEALING;
    let Ok(fd) = memfd_create("huge", flags | MemfdFlags::CLOEXEC) else {
        return; // no such pages in this kernel
    };
    ftruncate(&fd, 2 << 20).unwrap();
    fcntl_add_seals(&fd, SealFlags::SHRINK).unwrap();
    let domain = bare();
    let memory = ClientMemory::accept(fd, true).unwrap();
    let id = domain.register(DRIVER, memory, false).unwrap();
    let spec = DirectSpec {
        memory: id,
        offset: 0,
        len_bytes: 2 << 20,
        perm: Perm::ReadWrite,
        placement: Placement::Anywhere {
            align_bytes: 2 << 20,
            limit: None,
        },
    };
    let mapped = map_direct(&domain, AS_DRIVER, spec).unwrap();
    assert_eq!(mapped.range, range(2 << 20, (4 << 20) - 1));
}
