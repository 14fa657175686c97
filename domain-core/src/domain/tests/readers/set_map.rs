//! A new direct table while somebody still uses the old one.

use super::*;
use crate::direct::SetMapError;

/// A table of 64..=67 in one and 70 in another memory; a reader by frames.
fn fixture() -> (Domain, Buffer, Buffer) {
    let domain = served();
    join_by_frames(&domain, FIRST);
    let one = Buffer::register(&domain, DRIVER, 8);
    let other = Buffer::register(&domain, DRIVER, 8);
    let table = [one.entry(pages(64, 67)), other.entry(pages(70, 70))];
    set(&domain, &table).unwrap();
    ack_all(&domain, FIRST);
    (domain, one, other)
}

fn set(domain: &Domain, table: &[DirectMapping]) -> Result<Removal, SetMapError> {
    let set = domain.set_map(AS_DRIVER, table, None)?;
    domain.check_invariants();
    let generation = set.generation;
    Ok(Removal { generation })
}

fn places(domain: &Domain) -> Vec<IovaRange> {
    limbo(domain).into_iter().map(|(at, ..)| at).collect()
}

#[test]
fn a_table_that_only_adds_waits_for_nobody() {
    let (domain, one, other) = fixture();
    let mut table = direct_table(&domain);
    table.push(one.entry(pages(80, 80)));
    table.push(other.entry(pages(71, 71)));

    let removal = set(&domain, &table).unwrap();

    assert_eq!(domain.owed(FIRST), None);
    assert_eq!(domain.progress(removal), Progress::Done);
    assert_eq!(places(&domain), []);
    assert_eq!(domain.usage().invalidating, 0);
}

#[test]
fn places_that_the_new_table_does_not_use_wait() {
    let (domain, one, _) = fixture();

    // Shrunk at its end and at its start, another one in its middle, and gone.
    for (kept, left) in [
        (vec![pages(64, 65)], vec![pages(66, 67), pages(70, 70)]),
        (vec![pages(66, 67)], vec![pages(64, 65), pages(70, 70)]),
        (
            vec![pages(65, 65)],
            vec![pages(64, 64), pages(66, 67), pages(70, 70)],
        ),
        (
            vec![pages(60, 64), pages(66, 66), pages(67, 69)],
            vec![pages(65, 65), pages(70, 70)],
        ),
        (vec![pages(60, 63)], vec![pages(64, 67), pages(70, 70)]),
        (vec![], vec![pages(64, 67), pages(70, 70)]),
    ] {
        let before = direct_table(&domain);
        let table: Vec<_> = kept.iter().map(|range| one.entry(*range)).collect();
        let removal = set(&domain, &table).unwrap();

        assert_eq!(direct_ranges_live(&domain), kept);
        assert_eq!(places(&domain), left, "{kept:?}");
        assert_eq!(domain.progress(removal), waiting(&[FIRST]));
        for place in left {
            let hit = table.iter().map(|entry| entry.range).min();
            let anywhere = one.entry(place);
            let refused = set(&domain, &[anywhere]).unwrap_err();
            let waits = MapDirectError::Invalidating {
                range: place,
                hit: place,
                blocked_by: None,
            };
            let expected = SetMapError::Entry {
                index: 0,
                error: waits,
            };
            assert_eq!(refused, expected, "{hit:?}");
        }
        ack_all(&domain, FIRST);
        assert_eq!(places(&domain), []);
        assert_eq!(domain.progress(removal), Progress::Done);
        set(&domain, &before).unwrap();
        ack_all(&domain, FIRST);
    }
}

/// What waits says where in the memory its bytes are, which is not where the entry
/// began that it is left of.
#[test]
fn what_is_left_of_an_entry_leads_where_it_led() {
    for (kept, left, offsets) in [
        (pages(64, 65), vec![pages(66, 67)], vec![2]),
        (pages(66, 67), vec![pages(64, 65)], vec![0]),
        (
            pages(65, 65),
            vec![pages(64, 64), pages(66, 67)],
            vec![0, 2],
        ),
    ] {
        let (domain, one, other) = fixture();
        let offset = 3 * P;
        let whole = DirectMapping {
            offset,
            ..one.entry(pages(64, 67))
        };
        set(&domain, &[whole]).unwrap();
        ack_all(&domain, FIRST);

        set(&domain, &[other.entry(kept)]).unwrap();

        let waits: Vec<_> = views(&domain)
            .into_iter()
            .filter(|view| view.phase != Phase::Live)
            .collect();
        assert!(waits.iter().map(|view| view.visible).eq(left));
        for (view, skipped) in waits.iter().zip(offsets) {
            let source = view.source().unwrap();
            assert_eq!(source.memory, one.id);
            assert_eq!(source.offset, offset + skipped * P, "{view:?}");
        }
    }
}

fn direct_ranges_live(domain: &Domain) -> Vec<IovaRange> {
    let live = views(domain).into_iter();
    let live = live.filter(|view| view.phase == Phase::Live);
    live.map(|view| view.visible).collect()
}

#[test]
fn a_place_that_leads_elsewhere_is_used_at_once_and_its_memory_is_waited_for() {
    let (domain, one, other) = fixture();
    open(&domain, FIRST, &one);
    let swapped = [other.entry(pages(64, 67)), one.entry(pages(70, 70))];

    let removal = set(&domain, &swapped).unwrap();

    assert_eq!(places(&domain), []);
    assert_eq!(domain.usage().invalidating, 0);
    assert_eq!(domain.progress(removal), waiting(&[FIRST]));
    let view = domain.lookup(pages(64, 64)).unwrap();
    assert_eq!(view.source().unwrap().memory, other.id);
    fence(&domain, FIRST);
    assert_eq!(domain.progress(removal), quarantined(&[FIRST]));
    // Nothing of it can be counted, or used up.
    assert_eq!(domain.usage().quarantined.mappings, 0);
    ack(&domain, FIRST, removal.generation);
    assert_eq!(domain.progress(removal), Progress::Done);
}

#[test]
fn the_use_of_memory_that_a_ghost_has_not_opened_is_over() {
    let (domain, one, other) = fixture();
    open(&domain, FIRST, &other);
    let table = [other.entry(pages(64, 67)), other.entry(pages(70, 70))];
    fence(&domain, FIRST);

    let removal = set(&domain, &table).unwrap();

    assert_eq!(domain.progress(removal), Progress::Done);
    // Nor has it seen the other one there.
    let table = [one.entry(pages(64, 67)), other.entry(pages(70, 70))];
    let removal = set(&domain, &table).unwrap();
    assert_eq!(domain.progress(removal), Progress::Done);
    let removal = set(&domain, &table[..1]).unwrap();
    assert_eq!(domain.progress(removal), quarantined(&[FIRST]));
}

#[test]
fn memory_that_a_table_leaves_out_is_closed() {
    let (domain, one, other) = fixture();
    open(&domain, FIRST, &one);
    open(&domain, FIRST, &other);

    let removal = set(&domain, &[one.entry(pages(70, 71))]).unwrap();

    let owed = domain.owed(FIRST).unwrap();
    assert_eq!(owed.generation, removal.generation);
    assert_eq!(owed.closed, [region_of(&domain, other.id)]);
}

#[test]
fn a_table_over_a_place_in_quarantine_is_refused_and_the_old_one_stays() {
    let (domain, one, other) = fixture();
    open(&domain, FIRST, &other);
    fence(&domain, FIRST);
    set(&domain, &[one.entry(pages(64, 67))]).unwrap();
    let before = dump(&domain);

    let table = [one.entry(pages(64, 67)), one.entry(pages(69, 71))];
    let refused = set(&domain, &table).unwrap_err();

    let error = MapDirectError::Invalidating {
        range: pages(69, 71),
        hit: pages(70, 70),
        blocked_by: Some(FIRST),
    };
    assert_eq!(refused, SetMapError::Entry { index: 1, error });
    assert_eq!(dump(&domain), before);
    leave(&domain, FIRST);
    set(&domain, &table).unwrap();
}

/// So large that free runs are made anew rather than one by one.
#[test]
fn places_that_wait_stay_taken_when_a_large_table_is_set() {
    let domain = served();
    join_by_frames(&domain, FIRST);
    let buffer = Buffer::register(&domain, DRIVER, 2);
    let entry = |at: u64| buffer.entry(pages(64 + 2 * at, 64 + 2 * at));
    let large: Vec<_> = (1..600).map(entry).collect();
    let first = [entry(0)];
    set(&domain, &first).unwrap();
    restrict(&domain, vec![], vec![pages(64, 2000)]).unwrap();

    set(&domain, &large).unwrap();
    assert_eq!(places(&domain), [pages(64, 64)]);
    assert_eq!(direct(&domain, buffer.anywhere(1)), pages(65, 65));
    set(&domain, &[]).unwrap();
    assert_eq!(places(&domain).len(), 601);
    assert_eq!(
        direct(&domain, buffer.anywhere(2)),
        pages(64 + 1199, 64 + 1200)
    );

    ack_all(&domain, FIRST);
    assert_eq!(places(&domain), []);
    assert_eq!(direct(&domain, buffer.anywhere(1)), pages(64, 64));
}
