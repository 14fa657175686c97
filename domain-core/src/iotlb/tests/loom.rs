//! One writer and one reader, in every order and with every value that a weak memory may show.
//!
//! Runs with
//!
//! ```text
//! RUSTFLAGS="--cfg loom" cargo test -p domain-core --lib loom --release
//! ```
//!
//! The words are loom's atomics, with acquire loads. Those of shared memory are relaxed loads with
//! an acquire fence after them (see `region::word`), which order no less.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use ::loom::sync::atomic::AtomicU64;

use super::*;

pub(super) struct LoomWords(Vec<AtomicU64>);

impl LoomWords {
    pub(super) fn new(count: usize) -> LoomWords {
        LoomWords((0..count).map(|_| AtomicU64::new(0)).collect())
    }
}

impl WordSource for LoomWords {
    type Word = AtomicU64;

    fn words(&self) -> &[AtomicU64] {
        &self.0
    }
}

impl LoadWord for AtomicU64 {
    fn load_acquire(&self) -> u64 {
        self.load(Ordering::Acquire)
    }
}

impl WordSink for LoomWords {
    fn store(&self, index: usize, value: u64, order: Ordering) {
        self.0[index].store(value, order);
    }
}

impl Words for LoomWords {
    fn back(&self, _count: usize) -> Result<(), NoMemory> {
        Ok(())
    }
}

/// Room for exactly so many nodes.
pub(super) fn iotlb(nodes: u32) -> Iotlb<LoomWords> {
    let count = format::NODE_WORDS * (format::FIRST_NODE + nodes) as usize;
    Iotlb::new(LoomWords::new(count), Granule::Size4K, None).unwrap()
}

/// Each granule leads to memory of its own number; anything else is a stray walk.
pub(super) fn own(granule: u32) -> Entry {
    entry(u64::from(granule), 1, granule, 0)
}

pub(super) fn slot_at(walker: &Walker<Arc<LoomWords>>, granule: u32) -> Option<u32> {
    let hit = walker.translate(Iova::new(u64::from(granule) * P));
    hit.map(|hit| hit.target.region.slot().expect("all entries are direct"))
}

fn model(run: impl Fn() + Send + Sync + 'static) {
    let mut builder = ::loom::model::Builder::new();
    // Two threads: more switches than these show nothing new, and take hours.
    builder.preemption_bound = Some(3);
    builder.check(run);
}

#[test]
fn a_link_shows_a_filled_node_or_nothing_whatever_its_height() {
    model(|| {
        let mut iotlb = iotlb(3);
        iotlb.insert(own(5)).unwrap();
        let walker = iotlb.walker();
        let reader = ::loom::thread::spawn(move || {
            assert_eq!(
                slot_at(&walker, 5),
                Some(5),
                "it stays while the tree grows"
            );
            let seen = slot_at(&walker, 9);
            assert!(seen.is_none_or(|slot| slot == 9));
            if walker.generation() == 2 {
                assert_eq!(
                    slot_at(&walker, 9),
                    Some(9),
                    "a generation is wholly visible"
                );
            }
        });
        // In a node of its own, below a new root.
        iotlb.insert(own(9)).unwrap();
        reader.join().unwrap();
    });
}

#[test]
fn a_node_is_used_again_only_when_no_walk_can_be_in_it() {
    model(|| {
        let mut iotlb = iotlb(1);
        iotlb.insert(own(5)).unwrap();
        let walker = iotlb.walker();
        let acked = Arc::new(AtomicU64::new(0));
        let reader = ::loom::thread::spawn({
            let acked = Arc::clone(&acked);
            move || {
                for _ in 0..2 {
                    acked.store(walker.generation(), Ordering::Release);
                    for granule in [5, 9] {
                        let seen = slot_at(&walker, granule);
                        assert!(seen.is_none_or(|slot| slot == granule), "{seen:?}");
                    }
                }
            }
        });
        iotlb.remove(own(5).range.start()).unwrap();
        iotlb.reclaim(acked.load(Ordering::Acquire));
        // In the same node, if that was given back.
        let _ = iotlb.insert(own(9));
        reader.join().unwrap();
    });
}

#[test]
fn a_table_replaces_another_in_one_step() {
    model(|| {
        let mut iotlb = iotlb(4);
        let coloured = |slot| table(&[entry(5, 1, slot, 0), entry(9, 1, slot, 0)]);
        // Two nodes below a root; the other table is a root alone, with leaves of four granules.
        iotlb.replace_direct(&coloured(1)).unwrap();
        let walker = iotlb.walker();
        let reader = ::loom::thread::spawn(move || {
            let first = slot_at(&walker, 9);
            let second = slot_at(&walker, 5);
            assert!(first <= second, "never the old one after the new one");
            assert!(first.is_some() && second.is_some());
        });
        let replaced = iotlb.replace_direct(&table(&[entry(4, 8, 2, 0)]));
        assert!(replaced.is_ok(), "{replaced:?}");
        reader.join().unwrap();
    });
}
