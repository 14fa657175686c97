//! Holes against a sorted list of free granules.

use proptest::prelude::*;

use super::*;

/// Where every other test window ends.
const SPACE: u64 = 600;

#[test]
fn runs_that_touch_become_one_and_the_rest_of_a_cut_hole_stays() {
    let mut holes = Holes::new();
    holes.give(10, 5);
    holes.give(20, 5);
    holes.give(15, 5);
    assert_eq!(holes.iter().collect::<Vec<_>>(), [(10, 15)]);
    assert!(holes.take(12, 3));
    assert_eq!(holes.iter().collect::<Vec<_>>(), [(10, 2), (15, 10)]);
    assert!(!holes.take(11, 2), "it reaches past the hole");
    assert!(!holes.take(12, 1), "it is not free");
    assert_eq!((holes.count(), holes.total(), holes.largest()), (2, 12, 10));
    assert_eq!(holes.hole_at(11), Some((10, 2)));
    assert_eq!(holes.hole_at(12), None);
}

#[test]
fn the_lowest_place_inside_the_window_is_found() {
    let mut holes = Holes::from_sorted([(3, 2), (10, 6), (40, 20)].into_iter());
    assert_eq!(holes.first_fit(2, 0, 0..=u64::MAX), Some(3));
    assert_eq!(holes.first_fit(2, 0, 4..=u64::MAX), Some(10));
    assert_eq!(holes.first_fit(4, 0, 12..=15), Some(12));
    assert_eq!(holes.first_fit(4, 0, 13..=u64::MAX), Some(40));
    assert_eq!(holes.first_fit(4, 0, 13..=42), None);
    assert_eq!(holes.first_fit(4, 3, 0..=u64::MAX), Some(40));
    assert_eq!(holes.first_fit(8, 4, 0..=u64::MAX), Some(48));
    assert_eq!(holes.first_fit(13, 4, 0..=u64::MAX), None);
    assert_eq!(holes.first_fit(1, 63, 0..=u64::MAX), None);
    assert_eq!(holes.first_fit(u64::MAX, 0, 0..=u64::MAX), None);
}

#[test]
fn a_space_of_2_to_the_52_granules_costs_no_more_than_its_holes() {
    let top = 1 << 52;
    let mut holes = Holes::from_sorted([(1, top - 1)].into_iter());
    for shift in 0..52 {
        assert!(holes.take(1 << shift, 1));
    }
    assert_eq!(holes.take_first(1, 51, 0..=top), None);
    assert_eq!(holes.largest(), (1 << 51) - 1);
    assert!(holes.heap_bytes() < 16 << 10, "{}", holes.heap_bytes());
    holes.check_invariants();
}

#[test]
#[should_panic(expected = "was free already")]
fn what_is_free_cannot_be_given() {
    Holes::from_sorted([(5, 5)].into_iter()).give(9, 2);
}

#[test]
#[should_panic(expected = "sorted and disjoint")]
fn runs_out_of_order_are_refused() {
    let _ = Holes::from_sorted([(5, 5), (3, 1)].into_iter());
}

#[test]
fn a_checkerboard_is_built_emptied_and_filled_in_any_order() {
    let n = 5_000;
    for stride in [1, 7, 1009, 4999] {
        let mut holes = Holes::from_sorted((0..n).map(|at| (2 * at, 1)));
        holes.check_invariants();
        assert_eq!(holes.first_fit(1, 0, 1..=u64::MAX), Some(2));
        for at in (0..n).map(|at| at * stride % n) {
            holes.give(2 * at + 1, 1);
        }
        assert_eq!(holes.iter().collect::<Vec<_>>(), [(0, 2 * n)]);
        holes.check_invariants();
        for at in (0..n).map(|at| at * stride % n) {
            assert!(holes.take(2 * at, 1));
        }
        assert_eq!(holes.first_fit(1, 1, 0..=u64::MAX), None);
        assert_eq!(holes.first_fit(2, 0, 0..=u64::MAX), None);
        holes.check_invariants();
        for at in (0..n).map(|at| at * stride % n) {
            assert!(holes.take(2 * at + 1, 1));
        }
        assert_eq!((holes.count(), holes.total(), holes.largest()), (0, 0, 0));
        holes.check_invariants();
    }
}

/// One flag a granule.
struct Granules(Vec<bool>);

impl Granules {
    fn first_fit(&self, want: u64, shift: u32, low: u64, high: u64) -> Option<u64> {
        let high = high.min(SPACE - 1);
        let mut places = low..=(high + 1).checked_sub(want)?;
        places.find(|at| at.is_multiple_of(1 << shift) && self.is_free(*at, want))
    }

    fn largest_in(&self, low: u64, high: u64) -> u64 {
        let (mut longest, mut run) = (0, 0);
        for at in low..=high.min(SPACE - 1) {
            run = if self.is_free(at, 1) { run + 1 } else { 0 };
            longest = longest.max(run);
        }
        longest
    }

    fn is_free(&self, at: u64, len: u64) -> bool {
        at + len <= SPACE && (at..at + len).all(|at| self.0[index(at)])
    }

    fn set(&mut self, at: u64, len: u64, free: bool) {
        self.0[index(at)..index(at + len)].fill(free);
    }
}

fn index(granule: u64) -> usize {
    usize::try_from(granule).unwrap()
}

/// What is done: a kind, a place, a length, an alignment and a window's end.
type Op = (u8, u64, u64, u32, u64);

fn op() -> impl Strategy<Value = Op> {
    let short_mostly = prop_oneof![4 => 1..4_u64, 1 => 1..80_u64];
    (0..11_u8, 0..SPACE, short_mostly, 0..9_u32, 0..2 * SPACE)
}

fn run(holes: &mut Holes, model: &mut Granules, (kind, at, len, shift, high): Op) {
    match kind {
        // Frees what is taken of a run, as its owners would.
        0..=3 => {
            for at in (at..at + len).filter(|at| *at < SPACE) {
                if !model.is_free(at, 1) {
                    holes.give(at, 1);
                    model.set(at, 1, true);
                }
            }
        }
        4..=5 => {
            let is_free = model.is_free(at, len);
            assert_eq!(holes.take(at, len), is_free, "{len} at {at}");
            if is_free {
                model.set(at, len, false);
            }
        }
        6..=7 => {
            let low = if kind == 6 { 0 } else { at };
            let expected = model.first_fit(len, shift, low, high);
            assert_eq!(holes.first_fit(len, shift, low..=high), expected);
            assert_eq!(holes.take_first(len, shift, low..=high), expected);
            if let Some(at) = expected {
                model.set(at, len, false);
            }
        }
        8 => {
            let expected = model.first_fit(len, 0, 0, SPACE);
            let taken = holes.take_good(len);
            assert_eq!(taken.is_some(), expected.is_some(), "{len}");
            if let Some(at) = taken {
                assert!(model.is_free(at, len), "{len} at {at}");
                model.set(at, len, false);
            }
        }
        9 => {
            assert_eq!(holes.largest_in(at..=high), model.largest_in(at, high));
            assert_eq!(holes.largest(), model.largest_in(0, SPACE));
        }
        _ => {
            let hole = holes.hole_at(at);
            assert_eq!(hole.is_some(), model.is_free(at, 1));
            if let Some((start, len)) = hole {
                assert!(model.is_free(start, len) && (start..start + len).contains(&at));
            }
        }
    }
}

proptest! {
    #[test]
    fn random_operations_agree_with_a_list_of_granules(
        checkered in any::<bool>(),
        ops in prop::collection::vec(op(), 1..300),
    ) {
        // Three hundred holes in a dozen leaves from the start, or one hole.
        let is_free = |at: &u64| !checkered || at.is_multiple_of(2);
        let mut holes = Holes::from_sorted((0..SPACE).filter(is_free).map(|at| (at, 1)));
        let mut model = Granules((0..SPACE).map(|at| is_free(&at)).collect());
        for op in ops {
            run(&mut holes, &mut model, op);
            holes.check_invariants();
        }
        let free: Vec<_> = (0..SPACE).filter(|at| model.is_free(*at, 1)).collect();
        let ours: Vec<_> = holes.iter().flat_map(|(start, len)| start..start + len).collect();
        prop_assert_eq!(ours, free);
    }

    #[test]
    fn a_bulk_build_is_what_giving_run_by_run_would_have_made(
        gaps in prop::collection::vec((0..3_u64, 1..4_u64), 0..3_000),
    ) {
        let mut next = 0;
        let runs: Vec<_> = gaps
            .into_iter()
            .map(|(gap, len)| {
                let start = next + gap;
                next = start + len;
                (start, len)
            })
            .collect();
        let built = Holes::from_sorted(runs.iter().copied());
        let mut given = Holes::new();
        for (start, len) in runs {
            given.give(start, len);
        }
        built.check_invariants();
        given.check_invariants();
        prop_assert!(built.iter().eq(given.iter()));
        prop_assert_eq!(built.total(), given.total());
    }
}
