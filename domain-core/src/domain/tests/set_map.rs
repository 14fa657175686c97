//! A whole direct table at once, or none of it.

use super::*;
use crate::addr::RangeError;
use crate::coherent::CoherentSpec;
use crate::direct::{SetMapError, TableSet};
use crate::domain::Translated;
use crate::memory::MemoryMissing;
use crate::region::SpanError;
use crate::space::PlaceError;

/// A bounce aperture of pages 0 to 7, a coherent one of pages 8 to 15, and five
/// direct mappings of two pages each from page 20 on.
struct Fixture {
    domain: Domain,
    buffer: Buffer,
    five: Vec<DirectMapping>,
}

fn fixture() -> Fixture {
    let domain = domain(8, 8);
    let buffer = Buffer::register(&domain, DRIVER, 64);
    let entry = |at: u64| buffer.entry(pages(20 + 4 * at, 21 + 4 * at));
    let five: Vec<_> = (0..5).map(entry).collect();
    let specs: Vec<_> = five
        .iter()
        .map(|entry| buffer.at(entry.range.start().get(), 2))
        .collect();
    domain
        .map_direct(AS_DRIVER, &specs, BatchMode::AllOrNothing)
        .unwrap();
    Fixture {
        domain,
        buffer,
        five,
    }
}

impl Fixture {
    fn set(&self, table: &[DirectMapping]) -> Result<TableSet, SetMapError> {
        let set = self.domain.set_map(AS_DRIVER, table, None);
        self.domain.check_invariants();
        set
    }

    fn assert_translates(&self, table: &[DirectMapping]) {
        for entry in table {
            let (pieces, _) = self.domain.translate(entry.range, Perm::Read).unwrap();
            let piece = Translated {
                range: entry.range,
                kind: MappingKind::Direct,
                behind: crate::domain::Behind::Memory(entry.memory),
                offset: entry.offset,
                perm: entry.perm,
            };
            assert_eq!(pieces, [piece]);
        }
        assert_eq!(direct_table(&self.domain), table);
    }
}

fn refused(index: usize, error: MapDirectError) -> Result<TableSet, SetMapError> {
    Err(SetMapError::Entry { index, error })
}

/// Case 47.
#[test]
fn three_entries_take_the_place_of_five() {
    let at = fixture();
    let three = [30, 20, 50].map(|page| at.buffer.entry(pages(page, page + 2)));
    let set = at.set(&three).unwrap();
    assert_eq!((set.added, set.removed), (3, 5));
    let usage = at.domain.usage();
    assert_eq!(set.generation, usage.direct_generation);
    assert_eq!((usage.direct, usage.generation), (3, set.generation));
    at.assert_translates(&[three[1], three[0], three[2]]);
    for gone in [pages(28, 29), pages(36, 37)] {
        assert_eq!(at.domain.lookup(gone), None);
    }
    assert_eq!(at.domain.memories(at.buffer.id, 1)[0].direct, 3);
}

/// Case 48: the range itself cannot be said; what is said of it is the edge of
/// `IovaRange`.
#[test]
fn an_entry_that_ends_below_its_start_is_no_entry() {
    let (start, last) = (Iova::new(9 * P), Iova::new(9 * P - 1));
    let backwards = Err(RangeError::Backwards { start, last });
    assert_eq!(IovaRange::new(start, last), backwards);
}

/// Case 49.
#[test]
fn entries_that_overlap_each_other_leave_the_old_table() {
    let at = fixture();
    let before = dump(&at.domain);
    let table = [60, 70, 50, 69].map(|page| at.buffer.entry(pages(page, page + 1)));
    let clash = MapDirectError::OverlapsEntry {
        range: pages(69, 70),
        other: pages(70, 71),
        index: 1,
    };
    assert_eq!(at.set(&table), refused(3, clash));
    let twice = [at.five[0], at.five[0]];
    let clash = MapDirectError::OverlapsEntry {
        range: at.five[0].range,
        other: at.five[0].range,
        index: 0,
    };
    assert_eq!(at.set(&twice), refused(1, clash));
    assert_eq!(dump(&at.domain), before);
    at.assert_translates(&at.five);
}

/// Case 50.
#[test]
fn the_same_table_again_changes_no_generation() {
    let at = fixture();
    let before = dump(&at.domain);
    let mut table = at.five.clone();
    table.reverse();
    let set = at.set(&table).unwrap();
    let generation = at.domain.usage().direct_generation;
    let nothing = TableSet {
        generation,
        added: 0,
        removed: 0,
    };
    assert_eq!(set, nothing);
    assert_eq!(dump(&at.domain), before);
}

#[test]
fn what_stands_in_both_tables_is_neither_added_nor_removed() {
    let at = fixture();
    let mut table = at.five.clone();
    // The same addresses with another offset, with another perm, and gone.
    table[1].offset = 7 * P;
    table[2].perm = Perm::Read;
    table.remove(4);
    let set = at.set(&table).unwrap();
    assert_eq!((set.added, set.removed), (2, 3));
    at.assert_translates(&table);
}

#[test]
fn an_empty_table_clears_and_clears_again() {
    let at = fixture();
    let set = at.set(&[]).unwrap();
    assert_eq!((set.added, set.removed), (0, 5));
    assert_eq!(at.domain.usage().direct, 0);
    let again = at.set(&[]).unwrap();
    assert_eq!((again.added, again.removed), (0, 0));
    assert_eq!(again.generation, set.generation);
    at.domain.unregister(DRIVER, at.buffer.id).unwrap();
}

/// P-05 setmap_atomic: whatever is wrong with entry k, and whatever k is, every
/// byte of the domain is as it was.
#[test]
fn setmap_atomic_a_table_that_fails_at_any_entry_leaves_the_old_one() {
    const ENTRIES: usize = 6;
    let at = fixture();
    let read_only = {
        let fd = driver_memfd("read-only", 64 * P).unwrap();
        let memory = ClientMemory::accept(fd, false).unwrap();
        at.domain.register(DRIVER, memory, false).unwrap()
    };
    let theirs = Buffer::register(&at.domain, OTHER, 64);
    let gone = Buffer::register(&at.domain, DRIVER, 1);
    at.domain.unregister(DRIVER, gone.id).unwrap();
    restrict(&at.domain, vec![pages(900, 900)], vec![pages(1, 2)]).unwrap();
    let limit = at.domain.layout().limit();
    let good = |k: u64| at.buffer.entry(pages(100 + 10 * k, 101 + 10 * k));
    let table: Vec<_> = (0..ENTRIES as u64).map(good).collect();
    let before = dump(&at.domain);
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
    for k in 0..ENTRIES {
        let is = table[k];
        let placed = |range| DirectMapping { range, ..is };
        let of = |memory| DirectMapping { memory, ..is };
        let from = |offset| DirectMapping { offset, ..is };
        let place = |error: PlaceError| MapDirectError::Place(error);
        let apertures = pages(0, 15);
        let top = range(u64::MAX - P + 1, u64::MAX);
        let wrong = [
            (
                placed(range(is.range.start().get() + 1, is.range.last().get())),
                misaligned("iova", is.range.start().get() + 1),
            ),
            (
                placed(range(is.range.start().get(), is.range.last().get() - 1)),
                misaligned("the end", is.range.last().get()),
            ),
            (from(5), misaligned("offset", 5)),
            (from(63 * P), outside(63 * P, 2 * P)),
            (
                placed(range(0, u64::MAX)),
                MapDirectError::TooLong {
                    len_bytes: u64::MAX,
                },
            ),
            (
                of(read_only),
                MapDirectError::MemoryReadOnly {
                    id: read_only,
                    perm: Perm::ReadWrite,
                },
            ),
            (
                of(theirs.id),
                MapDirectError::Memory(MemoryMissing::NotYours { id: theirs.id }),
            ),
            (
                of(gone.id),
                MapDirectError::Memory(MemoryMissing::NoSuchMemory { id: gone.id }),
            ),
            (
                placed(pages(900, 901)),
                place(PlaceError::Reserved {
                    range: pages(900, 901),
                    reserved: pages(900, 900),
                }),
            ),
            (
                placed(pages(7, 8)),
                place(PlaceError::Aperture {
                    range: pages(7, 8),
                    apertures,
                }),
            ),
            (
                placed(pages(15, 16)),
                place(PlaceError::Aperture {
                    range: pages(15, 16),
                    apertures,
                }),
            ),
            (
                placed(top),
                place(PlaceError::PastLimit { range: top, limit }),
            ),
        ];
        for (wrong, error) in wrong {
            let mut table = table.clone();
            table[k] = wrong;
            assert_eq!(at.set(&table), refused(k, error));
            assert_eq!(dump(&at.domain), before, "{wrong:?} at {k}");
        }
        // An overlap is the fault of the later of the two, whichever is lower.
        for (other, range) in [(0, table[0].range), (ENTRIES - 1, table[ENTRIES - 1].range)] {
            if other == k {
                continue;
            }
            let mut table = table.clone();
            table[k].range = range;
            let clash = MapDirectError::OverlapsEntry {
                range,
                other: range,
                index: k.min(other),
            };
            assert_eq!(at.set(&table), refused(k.max(other), clash));
            assert_eq!(dump(&at.domain), before);
        }
    }
    at.assert_translates(&at.five);
    at.set(&table).unwrap();
    at.assert_translates(&table);
}

#[test]
fn a_table_that_has_changed_meanwhile_is_not_replaced() {
    let at = fixture();
    let seen = at.domain.usage().generation;
    let set = |expected| at.domain.set_map(AS_DRIVER, &at.five[..1], Some(expected));
    // What is bounced and coherent makes generations, and does not concern it.
    at.domain
        .alloc_coherent(DRIVER, &CoherentSpec::of(1))
        .unwrap();
    at.domain.check_invariants();
    let before = dump(&at.domain);
    let stale = SetMapError::Stale {
        expected: seen - 1,
        current: seen,
    };
    assert_eq!(set(seen - 1), Err(stale));
    assert_eq!(dump(&at.domain), before);
    let done = set(seen).unwrap();
    assert_eq!(done.removed, 4);
    let stale = SetMapError::Stale {
        expected: seen,
        current: done.generation,
    };
    assert_eq!(set(seen), Err(stale));
    // A refused batch changes nothing, so it makes no table stale either.
    let clash = [at.buffer.at(900 * P, 1), at.buffer.at(20 * P, 1)];
    at.domain
        .map_direct(AS_DRIVER, &clash, BatchMode::AllOrNothing)
        .unwrap_err();
    assert_eq!(set(done.generation).unwrap().removed, 0);
    at.domain.clear_map(AS_DRIVER, &[pages(20, 20)]).unwrap();
    assert!(set(done.generation).is_err());
}

#[test]
fn a_table_with_another_sessions_mapping_is_not_replaced() {
    let at = fixture();
    let theirs = Buffer::register(&at.domain, OTHER, 4);
    map_direct(&at.domain, AS_OTHER, theirs.at(100 * P, 1)).unwrap();
    let before = dump(&at.domain);
    let foreign = SetMapError::NotYours {
        range: pages(100, 100),
    };
    assert_eq!(at.set(&at.five), Err(foreign));
    assert_eq!(at.set(&[]), Err(foreign));
    let lowest = SetMapError::NotYours {
        range: at.five[0].range,
    };
    assert_eq!(at.domain.set_map(AS_OTHER, &[], None), Err(lowest));
    assert_eq!(dump(&at.domain), before);
    // The owner may use and replace everything.
    let table = [theirs.entry(pages(50, 51)), at.buffer.entry(pages(40, 41))];
    let set = at.domain.set_map(Actor::Owner, &table, None).unwrap();
    assert_eq!((set.added, set.removed), (2, 6));
    at.domain.check_invariants();
}

#[test]
fn a_table_larger_than_the_quota_is_refused_and_one_as_large_is_not() {
    let at = fixture();
    let quotas = Quotas {
        direct: 5,
        ..Quotas::default()
    };
    set_quotas(&at.domain, quotas).unwrap();
    let before = dump(&at.domain);
    let entry = |page| at.buffer.entry(pages(page, page));
    let six: Vec<_> = (100..106).map(entry).collect();
    let too_many = SetMapError::TooMany { asked: 6, limit: 5 };
    assert_eq!(at.set(&six), Err(too_many));
    assert_eq!(dump(&at.domain), before);
    assert_eq!(at.set(&six[..5]).unwrap().added, 5);
}

/// D10.
#[test]
fn a_new_table_disturbs_neither_what_streams_nor_what_is_coherent() {
    let at = fixture();
    let spec = at.buffer.spec(0, 5000, Direction::Bidirectional);
    let mapped = map(&at.domain, DRIVER, spec).unwrap();
    let made = at
        .domain
        .alloc_coherent(DRIVER, &CoherentSpec::of(100))
        .unwrap();
    device_writes(&at.domain, mapped.iova, &pattern(5000, 2));
    device_writes(&at.domain, made.iova(), &pattern(100, 3));
    // One more is on its way.
    let filled = steps::filled(&at.domain, spec);

    for table in [&at.five[..2], &[], &at.five[3..]] {
        at.set(table).unwrap();
        assert!(at.domain.translate(visible(mapped), Perm::Read).is_ok());
        assert!(at.domain.translate(made.range, Perm::Read).is_ok());
    }

    assert_eq!(seen(&at.domain, made.range), pattern(100, 3));
    let live = steps::go_live(filled).unwrap();
    unmap(&at.domain, DRIVER, discarding(live)).unwrap();
    unmap(&at.domain, DRIVER, ending(mapped)).unwrap();
    assert_eq!(at.buffer.bytes(0, 5000), pattern(5000, 2));
    at.domain
        .free_coherent(DRIVER, made.iova(), made.id)
        .unwrap();
}

/// Above a few hundred changes the free runs are made anew.
#[test]
fn a_large_table_leaves_the_free_places_right() {
    let at = fixture();
    let entry = |k: u64| at.buffer.entry(pages(100 + 2 * k, 100 + 2 * k));
    let large: Vec<_> = (0..1000).map(entry).collect();
    assert_eq!(at.set(&large).unwrap().added, 1000);
    let placed = map_direct(&at.domain, AS_DRIVER, at.buffer.anywhere(64)).unwrap();
    assert_eq!(placed.range, pages(16, 79));
    // Half of it goes, and one is moved.
    let mut half = large[..500].to_vec();
    half[7].range = pages(5000, 5000);
    assert_eq!(at.set(&half).unwrap().removed, 502);
    assert_eq!(at.set(&at.five).unwrap().removed, 500);
}

/// So they are when as much goes at once, in one generation.
#[test]
fn a_large_removal_leaves_the_free_places_right() {
    let at = fixture();
    let entry = |k: u64| at.buffer.entry(pages(100 + 2 * k, 100 + 2 * k));
    let large: Vec<_> = (0..1000).map(entry).collect();
    let remove = [
        |domain: &Domain| {
            domain.clear_map(AS_DRIVER, &[pages(0, 9999)]).unwrap();
        },
        |domain: &Domain| {
            domain.unmap_direct(AS_DRIVER, &[pages(0, 9999)]).unwrap();
        },
        |domain: &Domain| domain.leave(DRIVER),
    ];
    for remove in remove {
        let before = at.set(&large).unwrap().generation;
        remove(&at.domain);
        at.domain.check_invariants();
        let usage = at.domain.usage();
        assert_eq!((usage.direct, usage.direct_generation), (0, before + 1));
    }
}

/// The table is checked without the lock. What happens meanwhile is staged by
/// many threads here; what must hold is that the table is always one of those
/// that were set, and that no entry leads to a memory that took over a number.
#[test]
fn tables_set_by_many_threads_are_never_mixed_while_memories_come_and_go() {
    let domain = bare();
    std::thread::scope(|scope| {
        for thread in 0..3_u64 {
            let domain = &domain;
            scope.spawn(move || {
                for round in 0..150 {
                    let shared = Buffer::persistent(domain, DRIVER, 4);
                    let entry = |k: u64| DirectMapping {
                        offset: thread * P,
                        ..shared.entry(pages(10 + k * (thread + 1), 10 + k * (thread + 1)))
                    };
                    let table: Vec<_> = (0..40).map(entry).collect();
                    domain.set_map(AS_DRIVER, &table, None).unwrap();
                    let now = direct_table(domain);
                    let memory = now.first().map(|entry| entry.memory);
                    let same = now.iter().all(|entry| Some(entry.memory) == memory);
                    assert!(same, "a mixture: {now:?}");
                    assert!(now.is_empty() || now.len() == 40);
                    if round % 2 == 0 {
                        domain.set_map(AS_DRIVER, &[], None).unwrap();
                    }
                    let _ = domain.unregister(DRIVER, shared.id);
                }
            });
        }
    });
    domain.check_invariants();
}

/// Between the two locks of a set_map the memory goes and its number in the
/// table is another's: the table must not lead there.
#[test]
fn a_memory_that_goes_while_a_table_is_checked_is_missing_at_the_end() {
    let domain = bare();
    let going = Buffer::register(&domain, DRIVER, 4);
    let table = [going.entry(pages(1, 1))];
    let facts = domain.lock().facts(AS_DRIVER, &table, None).unwrap();
    let entry = table[0].check(Granule::Size4K, &facts).unwrap();

    domain.unregister(DRIVER, going.id).unwrap();
    let next = Buffer::register(&domain, DRIVER, 4);
    let state = domain.lock();
    // The number really is the same, and the check at the end sees through it.
    assert_eq!(state.memory_behind(entry.target.region), next.id);
    let id = going.id;
    let missing = MapDirectError::Memory(MemoryMissing::NoSuchMemory { id });
    let checked = state.check_table(AS_DRIVER, &table, None);
    let entry = SetMapError::Entry {
        index: 0,
        error: missing,
    };
    assert_eq!(checked, Err(entry));
}

/// What others may do between the two locks, each refused at the end.
#[test]
fn a_table_is_judged_by_what_holds_when_it_takes_its_place() {
    let at = fixture();
    let table = [at.buffer.entry(pages(100, 101))];
    let seen = at.domain.usage().generation;
    at.domain
        .lock()
        .facts(AS_DRIVER, &table, Some(seen))
        .unwrap();
    let judged = |expected| at.domain.lock().check_table(AS_DRIVER, &table, expected);
    assert_eq!(judged(Some(seen)), Ok(()));

    restrict(&at.domain, vec![pages(101, 101)], vec![]).unwrap();
    let reserved = PlaceError::Reserved {
        range: pages(100, 101),
        reserved: pages(101, 101),
    };
    let entry = SetMapError::Entry {
        index: 0,
        error: MapDirectError::Place(reserved),
    };
    assert_eq!(judged(None), Err(entry));
    restrict(&at.domain, vec![], vec![]).unwrap();
    at.domain.clear_map(AS_DRIVER, &[pages(20, 20)]).unwrap();
    let current = at.domain.usage().direct_generation;
    let expected = seen;
    let stale = SetMapError::Stale { expected, current };
    assert_eq!(judged(Some(seen)), Err(stale));
    let theirs = Buffer::register(&at.domain, OTHER, 1);
    map_direct(&at.domain, AS_OTHER, theirs.at(200 * P, 1)).unwrap();
    let range = pages(200, 200);
    assert_eq!(judged(None), Err(SetMapError::NotYours { range }));
    at.domain.leave(OTHER);
    at.domain.leave(DRIVER);
    let ended = Denied::SessionEnded { session: DRIVER };
    assert_eq!(judged(None), Err(SetMapError::Denied(ended)));
}
