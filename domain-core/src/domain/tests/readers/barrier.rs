//! When a removal fences for those who pin.

use super::*;
use crate::iotlb::barrier::trial;

/// A removal, and how many barriers it ran.
fn remove(domain: &Domain) -> (Removal, usize) {
    let made = alloc(domain, 1).unwrap();
    let before = trial::runs();
    let removal = free(domain, made);
    (removal, trial::runs() - before)
}

#[test]
fn a_removal_runs_one_barrier_for_all_sessions_that_pin() {
    let domain = served();
    join_by_pins(&domain, FIRST);
    join_by_pins(&domain, SECOND);
    join_by_frames(&domain, LATER);

    let (_, runs) = remove(&domain);

    assert_eq!(runs, 1);
}

#[test]
fn a_removal_at_which_nobody_s_pins_are_looked_at_runs_none() {
    let domain = served();
    assert_eq!(remove(&domain).1, 0, "nobody is attached who reads");

    join_by_frames(&domain, FIRST);
    assert_eq!(remove(&domain).1, 0);
}

#[test]
fn one_that_owes_is_not_looked_at_again() {
    let domain = served();
    let fake = join_by_pins(&domain, FIRST);
    fake.pin(generation(&domain));
    assert_eq!(remove(&domain).1, 1);

    assert_eq!(remove(&domain).1, 0, "only a frame can say it now");
}

#[test]
fn where_the_kernel_fails_everybody_is_asked() {
    let domain = served();
    let fake = join_by_pins(&domain, FIRST);
    trial::fail(true);

    let (removal, _) = remove(&domain);

    trial::fail(false);
    assert_eq!(
        fake.asked(),
        [removal.generation],
        "although nothing is pinned"
    );
    assert_eq!(domain.progress(removal), waiting(&[FIRST]));
    ack(&domain, FIRST, removal.generation);
    assert_eq!(domain.progress(removal), Progress::Done);
}
