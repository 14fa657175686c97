//! Direct mappings that were made when a ghost that knows their memory was there
//! already.

use super::*;

/// A ghost that has opened a memory of 8 pages and has seen 64..=67 of it.
fn haunted() -> (Domain, Buffer) {
    let domain = served();
    join_by_frames(&domain, FIRST);
    let buffer = Buffer::register(&domain, DRIVER, 8);
    direct(&domain, buffer.at(64 * P, 4));
    open(&domain, FIRST, &buffer);
    fence(&domain, FIRST);
    (domain, buffer)
}

fn set(domain: &Domain, table: &[DirectMapping]) -> Removal {
    let set = domain.set_map(AS_DRIVER, table, None).unwrap();
    domain.check_invariants();
    Removal {
        generation: set.generation,
    }
}

/// Starts of the mappings of which it is known that they are younger than ghosts.
fn young(domain: &Domain) -> Vec<u64> {
    let state = domain.look();
    state
        .made
        .iter()
        .map(|(start, _)| start.get() / P)
        .collect()
}

fn held_back(domain: &Domain) -> usize {
    domain.usage().quarantined.mappings
}

/// A part of a memory that goes on as one from page 64 on.
fn part(buffer: &Buffer, range: IovaRange) -> DirectMapping {
    DirectMapping {
        offset: range.start().get() - 64 * P,
        ..buffer.entry(range)
    }
}

#[test]
fn what_was_made_after_the_fence_is_free_at_once_though_its_memory_is_known() {
    let (domain, buffer) = haunted();

    for round in 0..100 {
        let place = direct(&domain, buffer.at((70 + round % 2) * P, 1));
        let removal = unmap_direct(&domain, &[place]);

        assert_eq!(domain.progress(removal), Progress::Done);
        assert_eq!(limbo(&domain), []);
        assert_eq!(young(&domain), []);
    }
}

#[test]
fn what_was_made_before_the_fence_is_held_back() {
    let (domain, buffer) = haunted();
    direct(&domain, buffer.at(70 * P, 1));

    let removal = unmap_direct(&domain, &[pages(64, 67), pages(70, 70)]);

    assert_eq!(domain.progress(removal), quarantined(&[FIRST]));
    let held = (pages(64, 67), Phase::Quarantined, Some(FIRST));
    assert_eq!(limbo(&domain), [held]);
}

/// Its session saw it; whoever was fenced before did not.
#[test]
fn a_mapping_between_two_fences_is_held_back_by_the_second_ghost_only() {
    let (domain, buffer) = haunted();
    join_by_frames(&domain, SECOND);
    let place = direct(&domain, buffer.at(70 * P, 1));
    open(&domain, SECOND, &buffer);
    fence(&domain, SECOND);

    let removal = unmap_direct(&domain, &[place]);

    assert_eq!(domain.progress(removal), quarantined(&[SECOND]));
    leave(&domain, SECOND);
    assert_eq!(domain.progress(removal), Progress::Done);
    assert_eq!(held_back(&domain), 0);
}

/// Also when it is what is left of another one.
#[test]
fn what_is_left_of_a_mapping_between_two_fences_is_out_of_the_first_ghosts_reach() {
    let (domain, buffer) = haunted();
    join_by_frames(&domain, SECOND);
    let old = part(&buffer, pages(64, 67));
    set(&domain, &[old, buffer.entry(pages(70, 71))]);
    open(&domain, SECOND, &buffer);
    fence(&domain, SECOND);
    let shrunk = set(&domain, &[old, buffer.entry(pages(70, 70))]);
    assert_eq!(domain.progress(shrunk), quarantined(&[SECOND]));

    let removal = unmap_direct(&domain, &[pages(70, 70)]);

    assert_eq!(domain.progress(removal), quarantined(&[SECOND]));
    leave(&domain, SECOND);
    assert_eq!(domain.progress(removal), Progress::Done);
    assert_eq!(domain.progress(shrunk), Progress::Done);
}

/// Of two mappings of one memory that lead elsewhere, one is in its reach.
#[test]
fn a_table_that_leads_old_and_young_mappings_elsewhere_waits_for_the_old_ones() {
    for [old, later] in [[70, 64], [64, 70]] {
        let domain = served();
        join_by_frames(&domain, FIRST);
        let [buffer, other] = [(); 2].map(|()| Buffer::register(&domain, DRIVER, 1));
        direct(&domain, buffer.at(old * P, 1));
        open(&domain, FIRST, &buffer);
        fence(&domain, FIRST);
        direct(&domain, buffer.at(later * P, 1));

        let table = [old, later].map(|page| other.entry(pages(page, page)));
        let removal = set(&domain, &table);

        assert_eq!(domain.progress(removal), quarantined(&[FIRST]));
        assert_eq!(limbo(&domain), []);
    }
}

#[test]
fn a_table_that_the_ghost_never_saw_is_replaced_without_waiting() {
    let (domain, buffer) = haunted();
    let mut table = vec![buffer.entry(pages(64, 67))];
    table.push(buffer.entry(pages(70, 73)));
    set(&domain, &table);

    // Cut, led elsewhere, and gone: of young ones nothing is left.
    for young in [Some(pages(70, 71)), Some(pages(71, 71)), None] {
        table.truncate(1);
        table.extend(young.map(|range| buffer.entry(range)));
        let removal = set(&domain, &table);

        assert_eq!(domain.progress(removal), Progress::Done, "{young:?}");
        assert_eq!(limbo(&domain), []);
    }
    let removal = set(&domain, &[]);
    assert_eq!(domain.progress(removal), quarantined(&[FIRST]));
}

#[test]
fn what_is_left_of_a_mapping_is_as_old_as_the_mapping_was() {
    for cut in [pages(64, 65), pages(65, 66), pages(66, 67)] {
        let (domain, buffer) = haunted();
        let shrunk = set(&domain, &[part(&buffer, cut)]);
        assert_eq!(domain.progress(shrunk), quarantined(&[FIRST]));
        assert_eq!(young(&domain), []);

        let removal = unmap_direct(&domain, &[cut]);

        assert_eq!(domain.progress(removal), quarantined(&[FIRST]), "{cut}");
        let whole: u64 = limbo(&domain)
            .iter()
            .filter_map(|(at, ..)| at.len_bytes())
            .sum();
        assert_eq!(whole, 4 * P);
    }
}

#[test]
fn a_mapping_that_was_split_or_has_grown_is_as_old_as_it_was() {
    let (domain, buffer) = haunted();
    let pieces = [pages(64, 64), pages(65, 67)].map(|piece| part(&buffer, piece));
    set(&domain, &pieces);
    assert_eq!(young(&domain), []);
    let grown = DirectMapping {
        offset: 0,
        ..part(&buffer, pages(64, 68))
    };
    set(&domain, &[grown]);
    assert_eq!(young(&domain), []);

    let removal = unmap_direct(&domain, &[pages(64, 68)]);

    assert_eq!(domain.progress(removal), quarantined(&[FIRST]));
    assert_eq!(held_back(&domain), 1);
}

/// The new one is younger than the ghost, but not all that it serves.
#[test]
fn a_mapping_in_place_of_an_old_and_a_young_one_is_as_old_as_the_old_one() {
    let (domain, buffer) = haunted();
    let old = part(&buffer, pages(64, 67));
    set(&domain, &[old, part(&buffer, pages(68, 69))]);
    assert_eq!(young(&domain), [68]);
    for table in [
        [part(&buffer, pages(64, 69)), part(&buffer, pages(70, 70))],
        // Of another one no part is that old.
        [part(&buffer, pages(64, 66)), part(&buffer, pages(70, 71))],
    ] {
        set(&domain, &table);
        assert_eq!(young(&domain), [70]);
    }

    let removal = unmap_direct(&domain, &[pages(70, 71)]);
    assert_eq!(domain.progress(removal), Progress::Done);
    let removal = unmap_direct(&domain, &[pages(64, 66)]);
    assert_eq!(domain.progress(removal), quarantined(&[FIRST]));
}

#[test]
fn a_place_that_led_to_other_memory_meanwhile_is_as_old_as_its_last_mapping() {
    let (domain, buffer) = haunted();
    let other = Buffer::register(&domain, DRIVER, 8);
    let table = |one: &Buffer, two: &Buffer| [one.entry(pages(64, 67)), two.entry(pages(70, 73))];
    let swapped = set(&domain, &table(&other, &buffer));
    assert_eq!(domain.progress(swapped), quarantined(&[FIRST]));
    assert_eq!(young(&domain), [64, 70]);

    // And back: the ghost never saw this one.
    let back = set(&domain, &table(&buffer, &other));

    assert_eq!(domain.progress(back), Progress::Done);
    assert_eq!(young(&domain), [64, 70]);
    let removal = unmap_direct(&domain, &[pages(64, 67)]);
    assert_eq!(domain.progress(removal), Progress::Done);
    assert_eq!(domain.progress(swapped), quarantined(&[FIRST]));
}

#[test]
fn a_mapping_that_a_new_table_keeps_stays_as_old_as_it_is() {
    let (domain, buffer) = haunted();
    let old = buffer.entry(pages(64, 67));
    let later = buffer.entry(pages(70, 70));
    set(&domain, &[old, later]);
    set(&domain, &[old, later, buffer.entry(pages(72, 72))]);
    assert_eq!(young(&domain), [70, 72]);

    let removal = unmap_direct(&domain, &[pages(70, 70)]);
    assert_eq!(domain.progress(removal), Progress::Done);
    let removal = unmap_direct(&domain, &[pages(64, 67)]);
    assert_eq!(domain.progress(removal), quarantined(&[FIRST]));
}

/// One that is of no use to the ghost does not hide how old the other is.
#[test]
fn neighbours_of_different_age_wait_as_two_places() {
    let (domain, buffer) = haunted();
    let later = DirectSpec {
        offset: 4 * P,
        ..buffer.at(68 * P, 1)
    };
    direct(&domain, later);

    unmap_direct(&domain, &[pages(64, 68)]);

    let held = (pages(64, 67), Phase::Quarantined, Some(FIRST));
    assert_eq!(limbo(&domain), [held]);
    direct(&domain, later);
}

#[test]
fn ages_are_kept_while_a_ghost_lives_that_has_opened_memory_and_no_longer() {
    let (domain, buffer) = haunted();
    direct(&domain, buffer.at(70 * P, 1));
    assert_eq!(young(&domain), [70]);
    leave(&domain, FIRST);
    assert_eq!(young(&domain), []);

    // Nothing to tell apart, either for one that has opened nothing.
    join_by_frames(&domain, SECOND);
    fence(&domain, SECOND);
    direct(&domain, buffer.at(72 * P, 1));
    assert_eq!(young(&domain), []);

    // Nor for one that has closed what it had.
    join_by_frames(&domain, LATER);
    open(&domain, LATER, &buffer);
    fence(&domain, LATER);
    direct(&domain, buffer.at(74 * P, 1));
    assert_eq!(young(&domain), [74]);
    let all = unmap_direct(&domain, &[pages(64, 67), pages(70, 74)]);
    assert_eq!(domain.progress(all), quarantined(&[LATER]));
    direct(&domain, buffer.at(76 * P, 1));
    ack(&domain, LATER, all.generation);
    assert_eq!(domain.progress(all), Progress::Done);
    assert!(domain.is_fenced(LATER) && !domain.has_opened(LATER));
    assert_eq!(young(&domain), []);
}

/// By its number, which the next memory gets, nobody reaches anything.
#[test]
fn a_memory_that_has_the_number_of_one_that_a_ghost_has_opened_is_another() {
    let (domain, buffer) = haunted();
    let number = region_of(&domain, buffer.id);
    let old = unmap_direct(&domain, &[pages(64, 67)]);
    domain.unregister(DRIVER, buffer.id).unwrap();
    let other = Buffer::register(&domain, DRIVER, 8);
    assert_eq!(region_of(&domain, other.id), number);
    let place = direct(&domain, other.at(70 * P, 1));

    let removal = unmap_direct(&domain, &[place]);

    assert_eq!(domain.progress(removal), Progress::Done);
    assert_eq!(domain.progress(old), quarantined(&[FIRST]));
}

/// It was young when it was removed, and seen by who was fenced since.
#[test]
fn who_is_fenced_while_a_removal_waits_holds_back_what_it_saw() {
    let (domain, buffer) = haunted();
    join_by_frames(&domain, SECOND);
    let place = direct(&domain, buffer.at(70 * P, 1));
    open(&domain, SECOND, &buffer);
    let removal = unmap_direct(&domain, &[place]);
    assert_eq!(domain.progress(removal), waiting(&[SECOND]));

    fence(&domain, SECOND);

    assert_eq!(domain.progress(removal), quarantined(&[SECOND]));
    assert_eq!(limbo(&domain), [(place, Phase::Quarantined, Some(SECOND))]);
}
