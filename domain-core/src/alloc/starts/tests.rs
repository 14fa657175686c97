//! The table of starts against an ordered map.

use std::collections::{BTreeMap, BTreeSet};

use super::*;
use proptest::prelude::*;

/// As many blocks of one granule; each has its start for an id.
fn single_granules(count: u32) -> Blocks {
    let mut blocks = Blocks::new(count);
    for id in 0..count - 1 {
        assert_eq!(blocks.split(id, 1), id + 1);
    }
    blocks
}

/// Starts whose homes in a table of 1,024 slots are among the last eight, so
/// that they push each other over the end and far from home.
fn crowded_at_the_end() -> Vec<u32> {
    let home = |start: u32| start.wrapping_mul(0x9E37_79B9) >> 22;
    (0..1 << 16).filter(|start| home(*start) >= 1016).collect()
}

/// Blocks get the lowest id that is free, as they do in a space.
struct Trial {
    blocks: Blocks,
    starts: Starts,
    held: BTreeMap<u32, Id>,
    free: BTreeSet<Id>,
}

impl Trial {
    fn new() -> Trial {
        Trial {
            blocks: single_granules(1 << 16),
            starts: Starts::new(),
            held: BTreeMap::new(),
            free: (0..1 << 16).collect(),
        }
    }

    fn add(&mut self, start: u32) {
        let id = self.free.pop_first().unwrap();
        self.blocks[id].start = start;
        self.starts.make_way(&self.blocks);
        self.starts.add(start, id);
        self.held.insert(start, id);
    }

    fn remove(&mut self, start: u32) {
        let (place, id) = self.starts.find(&self.blocks, start).unwrap();
        self.starts.remove(&self.blocks, place, start);
        assert_eq!(self.held.remove(&start), Some(id));
        self.free.insert(id);
    }

    fn check(&self) {
        let held = self.held.values().map(|id| (*id, &self.blocks[*id]));
        self.starts.check_invariants(&self.blocks, held);
    }
}

/// Adds what is absent and removes what is there, one of `pool` after another.
fn toggle(pool: &[u32], picks: &[prop::sample::Index]) {
    let mut trial = Trial::new();
    for (turn, pick) in picks.iter().enumerate() {
        let start = *pick.get(pool);
        let found = trial.starts.find(&trial.blocks, start).map(|(_, id)| id);
        assert_eq!(found, trial.held.get(&start).copied());
        match found {
            Some(_) => trial.remove(start),
            None => trial.add(start),
        }
        if turn % 32 == 0 {
            trial.check();
        }
    }
    trial.check();
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn the_table_agrees_with_a_set_while_it_grows(
        pool in 1..700_u32,
        picks in prop::collection::vec(any::<prop::sample::Index>(), 0..1500),
    ) {
        toggle(&(0..pool).collect::<Vec<_>>(), &picks);
    }

    #[test]
    fn what_is_crowded_over_the_end_is_found_and_removed(
        picks in prop::collection::vec(any::<prop::sample::Index>(), 0..1500),
    ) {
        toggle(&crowded_at_the_end(), &picks);
    }
}

#[test]
fn entries_far_from_home_are_removed_without_losing_others() {
    let (mut trial, pool) = (Trial::new(), crowded_at_the_end());
    pool.iter().for_each(|start| trial.add(*start));
    assert!(trial.starts.now.strays > 0, "or this tests nothing");
    for start in pool {
        trial.remove(start);
        trial.check();
    }
    assert_eq!(trial.starts.now.strays, 0);
}

#[test]
fn no_operation_moves_more_than_a_few_entries() {
    let blocks = single_granules(1 << 16);
    let mut starts = Starts::new();
    let mut growths = 0;
    for id in 0..1 << 16 {
        let (slots, moved) = (starts.now.slots.len(), starts.moved);
        starts.make_way(&blocks);
        starts.add(id, id);
        let grew = starts.now.slots.len() > slots;
        growths += usize::from(grew);
        assert!(grew || starts.moved <= moved + MOVED_AT_ONCE);
    }
    assert!(growths > 10, "or this tests nothing");
}
