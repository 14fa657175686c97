//! Requests of many entries: all of them, or each for itself.

use super::*;
use crate::alloc::AllocError;
use crate::crew::{Crew, Part};
use crate::domain::Desk;

const ALL: BatchMode = BatchMode::AllOrNothing;
const PARTIAL: BatchMode = BatchMode::Partial;

#[test]
fn the_answers_stand_in_the_order_of_the_request() {
    let domain = domain(16, 0);
    let buffer = Buffer::register(&domain, DRIVER, 8);
    let lens = [3, 5000, 1, 4096];
    let specs = lens.map(|len| buffer.spec(len, len, Direction::ToDevice));
    for mode in [ALL, PARTIAL] {
        let answers = domain.map(DRIVER, &specs, mode).unwrap();
        let mapped: Vec<_> = answers.into_iter().map(Result::unwrap).collect();
        for (mapped, len) in mapped.iter().zip(lens) {
            assert_eq!(mapped.len_bytes, len);
            assert_eq!(seen(&domain, visible(*mapped)), buffer.bytes(len, len));
        }
        let ends: Vec<_> = mapped.into_iter().rev().map(ending).collect();
        assert_eq!(domain.unmap(DRIVER, &ends, mode).unwrap().len(), 4);
    }
}

#[test]
fn a_batch_of_nothing_is_answered_with_nothing() {
    let domain = domain(4, 0);
    let before = table(&domain);
    for mode in [ALL, PARTIAL] {
        assert!(domain.map(DRIVER, &[], mode).unwrap().is_empty());
        assert!(domain.unmap(DRIVER, &[], mode).unwrap().is_empty());
        assert!(domain.sync(DRIVER, &[], mode).unwrap().is_empty());
    }
    assert_eq!(table(&domain), before);
}

#[test]
fn a_map_batch_with_one_refused_entry_changes_nothing() {
    let domain = domain(16, 0);
    let buffer = Buffer::register(&domain, DRIVER, 20);
    let fits = buffer.spec(0, 5 * P, Direction::ToDevice);
    // 15 pages are free: whichever place it stands at, it does not fit.
    let too_large = buffer.spec(0, 16 * P, Direction::ToDevice);
    let unknown = MapSpec {
        memory: MemoryId::new(77),
        ..fits
    };
    let before = table(&domain);

    for (refused_at, wrong) in [(0, too_large), (1, unknown), (2, too_large)] {
        let mut specs = [fits; 3];
        specs[refused_at] = wrong;
        let refused = domain.map(DRIVER, &specs, ALL).unwrap_err();
        assert_eq!(refused.index, refused_at);
        assert_eq!(table(&domain), before);
        domain.check_invariants();
    }

    let answers = domain.map(DRIVER, &[fits; 3], ALL).unwrap();
    let iovas = answers.into_iter().map(|mapped| mapped.unwrap().iova.get());
    assert_eq!(iovas.collect::<Vec<_>>(), [P, 6 * P, 11 * P]);
}

/// They ask for more than there is only together.
#[test]
fn a_map_batch_that_runs_out_on_the_way_changes_nothing() {
    let domain = domain(16, 0);
    let buffer = Buffer::register(&domain, DRIVER, 8);
    let spec = buffer.spec(0, 8 * P, Direction::FromDevice);
    let before = table(&domain);

    let refused = domain.map(DRIVER, &[spec, spec], ALL).unwrap_err();

    assert_eq!(refused.index, 1);
    // What the first entry had reached counts as taken.
    assert!(
        matches!(
            refused.error,
            MapError::Alloc(AllocError::NoSpace { largest_hole_bytes, .. }) if largest_hole_bytes == 7 * P
        ),
        "{refused}"
    );
    assert_eq!(table(&domain), before);
    assert_eq!(map(&domain, DRIVER, spec).unwrap().iova, Iova::new(P));
}

#[test]
fn a_partial_map_batch_maps_what_can_be_mapped() {
    let domain = domain(16, 0);
    let buffer = Buffer::register(&domain, DRIVER, 16);
    let spec = |pages| buffer.spec(0, pages * P, Direction::ToDevice);

    let specs = [spec(8), spec(8), spec(7), spec(0), spec(1)];
    let answers = domain.map(DRIVER, &specs, PARTIAL).unwrap();

    let went_well: Vec<_> = answers.iter().map(Result::is_ok).collect();
    assert_eq!(went_well, [true, false, true, false, false]);
    assert_eq!(domain.usage().streaming, 2);
    assert_eq!(domain.usage().bounce.used_bytes, 15 * P);
    domain.check_invariants();
}

#[test]
fn an_unmap_batch_with_one_wrong_name_ends_nothing_and_copies_nothing() {
    let domain = domain(16, 0);
    let buffer = Buffer::register(&domain, DRIVER, 4);
    let foreign = Buffer::register(&domain, OTHER, 1);
    let spec = buffer.spec(0, P, Direction::Bidirectional);
    let mine = [0, 1].map(|_| map(&domain, DRIVER, spec).unwrap());
    let theirs = map(&domain, OTHER, foreign.spec(0, P, Direction::ToDevice)).unwrap();
    device_floods(&domain, ApertureKind::Bounce, INTRUSION);
    let before = table(&domain);

    let ends = [ending(mine[0]), ending(mine[1]), ending(theirs)];
    let refused = domain.unmap(DRIVER, &ends, ALL).unwrap_err();

    assert_eq!(refused.index, 2);
    assert!(
        matches!(
            refused.error,
            UnmapError::Missing(MappingMissing::NotYours { .. })
        ),
        "{refused}"
    );
    assert_eq!(table(&domain), before);
    assert_eq!(buffer.all(), pattern(4 * P, 1));

    let answers = domain.unmap(DRIVER, &ends, PARTIAL).unwrap();
    let went_well: Vec<_> = answers.iter().map(Result::is_ok).collect();
    assert_eq!(went_well, [true, true, false]);
    assert_eq!(domain.usage().streaming, 1);
}

#[test]
fn an_unmap_batch_puts_everything_back_when_one_copy_fails() {
    let domain = domain(16, 0);
    let buffer = Buffer::register(&domain, DRIVER, 4);
    let sealed = Buffer::register(&domain, DRIVER, 4);
    let good = map(&domain, DRIVER, buffer.spec(0, P, Direction::ToDevice)).unwrap();
    let back = buffer.spec(P, 9, Direction::Bidirectional);
    let back = map(&domain, DRIVER, back).unwrap();
    let bad = sealed.spec(0, P, Direction::Bidirectional);
    let bad = map(&domain, DRIVER, bad).unwrap();
    sealed.seal_against_writing();
    let (usage, entries) = table(&domain);
    let ends = [ending(good), ending(back), ending(bad)];

    let refused = domain.unmap(DRIVER, &ends, ALL).unwrap_err();

    assert_eq!(refused.index, 2);
    assert!(
        matches!(refused.error, UnmapError::Copy { .. }),
        "{refused}"
    );
    domain.check_invariants();
    assert_eq!(table(&domain).1, entries);
    assert_eq!(domain.usage().bounce, usage.bounce);

    let answers = domain.unmap(DRIVER, &ends, PARTIAL).unwrap();
    let went_well: Vec<_> = answers.iter().map(Result::is_ok).collect();
    assert_eq!(went_well, [true, true, false]);
    assert_eq!(table(&domain).1.len(), 1);
    unmap(&domain, DRIVER, discarding(bad)).unwrap();
}

#[test]
fn a_mapping_that_stands_twice_in_one_unmap_is_ended_once() {
    let domain = domain(16, 0);
    let buffer = Buffer::register(&domain, DRIVER, 4);
    let mapped = map(&domain, DRIVER, buffer.spec(0, P, Direction::ToDevice)).unwrap();
    let before = table(&domain);

    let twice = [ending(mapped), discarding(mapped)];
    let refused = domain.unmap(DRIVER, &twice, ALL).unwrap_err();
    assert_eq!(refused.index, 1);
    assert!(
        matches!(refused.error, UnmapError::Duplicate { id } if id == mapped.id),
        "{refused}"
    );
    assert_eq!(table(&domain), before);

    let answers = domain.unmap(DRIVER, &twice, PARTIAL).unwrap();
    assert!(answers[0].is_ok());
    assert!(matches!(answers[1], Err(UnmapError::Duplicate { .. })));
    assert_eq!(domain.usage().streaming, 0);
    domain.check_invariants();
}

/// Each entry of a partial batch stands for itself: one that ends nothing is
/// no reason to refuse the one that names the mapping rightly.
#[test]
fn a_refused_entry_does_not_make_a_duplicate_of_the_right_one() {
    let domain = domain(16, 0);
    let buffer = Buffer::register(&domain, DRIVER, 4);
    let spec = buffer.spec(0, P, Direction::FromDevice);
    let mapped = map(&domain, DRIVER, spec).unwrap();
    let stale = Mapped {
        id: crate::mapping::MappingId::new(mapped.id.get() + 9),
        ..mapped
    };

    let ends = [
        written(stale, 0),
        ending(mapped), // must say how much was written
        written(mapped, 0),
    ];
    let answers = domain.unmap(DRIVER, &ends, PARTIAL).unwrap();

    assert!(matches!(
        answers[0],
        Err(UnmapError::Missing(MappingMissing::NoSuchMapping { .. }))
    ));
    assert!(matches!(answers[1], Err(UnmapError::WrittenMissing { .. })));
    assert!(answers[2].is_ok(), "{:?}", answers[2]);
    assert_eq!(domain.usage().streaming, 0);
}

#[test]
fn a_sync_batch_with_one_refused_part_copies_nothing() {
    let domain = domain(16, 0);
    let buffer = Buffer::register(&domain, DRIVER, 4);
    let spec = buffer.spec(0, P, Direction::Bidirectional);
    let mapped = map(&domain, DRIVER, spec).unwrap();
    device_writes(&domain, mapped.iova, &pattern(P, 2));
    let good = part(mapped, 10, 20, SyncTarget::ForCpu);
    let bad = part(mapped, P, 1, SyncTarget::ForCpu);

    let refused = domain.sync(DRIVER, &[good, bad], ALL).unwrap_err();
    assert_eq!(refused.index, 1);
    assert_eq!(buffer.all(), pattern(4 * P, 1));

    let answers = domain.sync(DRIVER, &[bad, good], PARTIAL).unwrap();
    assert!(answers[0].is_err() && answers[1].is_ok());
    let mut expected = pattern(4 * P, 1);
    expected[10..30].copy_from_slice(&pattern(P, 2)[10..30]);
    assert_eq!(buffer.all(), expected);

    // None of them holds the mapping any longer.
    unmap(&domain, DRIVER, discarding(mapped)).unwrap();
}

#[test]
fn a_sync_batch_may_name_one_mapping_many_times_and_is_copied_in_order() {
    let domain = domain(16, 0);
    let buffer = Buffer::register(&domain, DRIVER, 1);
    let spec = buffer.spec(0, P, Direction::Bidirectional);
    let mapped = map(&domain, DRIVER, spec).unwrap();
    device_writes(&domain, mapped.iova, &pattern(P, 2));

    let parts = [
        part(mapped, 0, 100, SyncTarget::ForCpu),
        part(mapped, 0, P, SyncTarget::ForDevice),
    ];
    domain.sync(DRIVER, &parts, ALL).unwrap();

    let mut expected = pattern(P, 1);
    expected[..100].copy_from_slice(&pattern(P, 2)[..100]);
    assert_eq!(buffer.all(), expected);
    assert_eq!(seen(&domain, visible(mapped)), expected);
    unmap(&domain, DRIVER, ending(mapped)).unwrap();
}

#[test]
fn a_sync_batch_whose_copy_fails_lets_go_of_every_mapping() {
    let domain = domain(16, 0);
    let buffer = Buffer::register(&domain, DRIVER, 1);
    let spec = buffer.spec(0, P, Direction::Bidirectional);
    let mapped = [0, 1].map(|_| map(&domain, DRIVER, spec).unwrap());
    buffer.seal_against_writing();
    let before = table(&domain);

    for mode in [ALL, PARTIAL] {
        let parts = mapped.map(|mapped| part(mapped, 0, 1, SyncTarget::ForCpu));
        match domain.sync(DRIVER, &parts, mode) {
            Err(refused) => assert_eq!((mode, refused.index), (ALL, 0)),
            Ok(answers) => assert!(answers.iter().all(Result::is_err)),
        }
    }

    assert_eq!(table(&domain), before);
    for mapped in mapped {
        unmap(&domain, DRIVER, discarding(mapped)).unwrap();
    }
}

#[test]
fn what_was_taken_first_is_given_back_last() {
    let (domain, untouched) = (domain(64, 0), domain(64, 0));
    let buffers = [&domain, &untouched].map(|domain| Buffer::register(domain, DRIVER, 64));
    let good = |buffer: &Buffer| [buffer.spec(0, 3 * P, Direction::ToDevice); 4];
    let mut bad = good(&buffers[0]);
    bad[3].offset = 64 * P;

    assert_eq!(domain.map(DRIVER, &bad, ALL).unwrap_err().index, 3);

    domain.check_invariants();
    let iovas = |mapped: Vec<Mapped>| mapped.into_iter().map(|one| one.iova).collect::<Vec<_>>();
    let corrected = iovas(map_all(&domain, &good(&buffers[0])));
    assert_eq!(corrected, iovas(map_all(&untouched, &good(&buffers[1]))));
}

/// Parts that several threads copy at once are what one alone would have copied.
#[test]
fn a_crew_copies_what_one_thread_would() {
    let domain = domain(64, 0);
    let buffer = Buffer::register(&domain, DRIVER, 64);
    let mut desk = Desk::default();
    let specs: Vec<_> = (0..60)
        .map(|page| buffer.spec(page * P + 7, P - 9, Direction::Bidirectional))
        .collect();
    let mapped = domain.map_at(&mut desk, DRIVER, &specs, ALL, &Threads);
    let mapped: Vec<_> = mapped.unwrap().map(Result::unwrap).collect();
    for (mapped, page) in mapped.iter().zip(0..) {
        let expected = buffer.bytes(page * P + 7, P - 9);
        assert_eq!(seen(&domain, visible(*mapped)), expected);
        device_writes(&domain, mapped.iova, &pattern(P - 9, page));
    }
    let ends: Vec<_> = mapped.iter().map(|mapped| ending(*mapped)).collect();
    let ended = domain.unmap_at(&mut desk, DRIVER, &ends, ALL, &Threads);
    assert!(ended.unwrap().all(|bytes| matches!(bytes, Ok(4087))));
    for page in 0..60 {
        assert_eq!(buffer.bytes(page * P + 7, P - 9), pattern(P - 9, page));
    }
    domain.check_invariants();
}

/// Of a batch whose copies fail here and there nothing is left; a partial one keeps the rest.
#[test]
fn a_crew_that_fails_leaves_nothing_or_what_is_good() {
    let domain = domain(64, 0);
    let buffer = Buffer::register(&domain, DRIVER, 64);
    let mut desk = Desk::default();
    let good = buffer.spec(0, P, Direction::Bidirectional);
    let mapped = map_all(&domain, &vec![good; 60]);
    let ends: Vec<_> = mapped.iter().map(|mapped| ending(*mapped)).collect();
    let before = table(&domain).1;
    buffer.seal_against_writing();

    let all = domain.unmap_at(&mut desk, DRIVER, &ends, ALL, &Threads);
    assert!(matches!(all.err().unwrap().error, UnmapError::Copy { .. }));
    assert_eq!(table(&domain).1, before);
    let mut mixed = ends.clone();
    mixed
        .iter_mut()
        .step_by(2)
        .for_each(|end| end.skip_sync = true);
    let some = domain.unmap_at(&mut desk, DRIVER, &mixed, PARTIAL, &Threads);
    let some: Vec<_> = some.unwrap().map(|one| one.is_ok()).collect();
    assert!(some.iter().step_by(2).all(|ok| *ok) && !some.iter().skip(1).step_by(2).any(|ok| *ok));
    domain.check_invariants();
    assert_eq!(domain.usage().streaming, 30);
}

fn map_all(domain: &Domain, specs: &[MapSpec]) -> Vec<Mapped> {
    let mapped = domain.map(DRIVER, specs, ALL).unwrap();
    mapped.into_iter().map(Result::unwrap).collect()
}

/// A thread for each part.
struct Threads;

impl Crew for Threads {
    fn attend(&self, _bytes: u64, work: &mut dyn FnMut()) {
        work();
    }

    fn parts(&self, _bytes: u64) -> usize {
        7
    }

    fn run(&self, parts: Vec<Part<'_>>) {
        std::thread::scope(|scope| {
            for part in parts {
                scope.spawn(part);
            }
        });
    }
}
