//! Running out of nodes, and using them again.

use super::*;
use std::sync::atomic::Ordering;

/// Everything that a failure must leave as it was.
fn picture(iotlb: &Iotlb<Stingy>) -> (u64, Vec<Entry>, TableUsage) {
    let entries = iotlb.entries().collect();
    (iotlb.generation(), entries, iotlb.table_usage())
}

/// Words of which only so many get memory.
#[derive(Debug)]
struct Stingy {
    words: HeapWords,
    backed_most: usize,
}

impl WordSource for Stingy {
    type Word = std::sync::atomic::AtomicU64;

    fn words(&self) -> &[Self::Word] {
        self.words.words()
    }
}

impl WordSink for Stingy {
    fn store(&self, index: usize, value: u64, order: Ordering) {
        assert!(
            index < self.backed_most,
            "words without memory are not written"
        );
        self.words.store(index, value, order);
    }
}

impl Words for Stingy {
    fn back(&self, count: usize) -> Result<(), NoMemory> {
        if count > self.backed_most {
            let want_bytes = count as u64 * 8;
            return Err(NoMemory { want_bytes });
        }
        Ok(())
    }
}

fn stingy(nodes: usize, backed: usize) -> Stingy {
    Stingy {
        words: heap(nodes),
        backed_most: (backed + 1) * format::NODE_WORDS,
    }
}

/// Tables that need one node more than there is, for every number there can be: once because the
/// table is full, once because memory is.
fn with_every_shortage(mut attempt: impl FnMut(&mut Iotlb<Stingy>) -> Result<(), InsertError>) {
    let mut succeeded = 0;
    for nodes in 1..40 {
        for words in [stingy(nodes, nodes), stingy(64, nodes)] {
            let mut iotlb =
                Iotlb::new(words, Granule::Size4K, Some(granules(0, APERTURES))).unwrap();
            // Something to be left as it was.
            let present = [entry(1000, 1, 0, 0), entry(3, 1, 0, 0)];
            if present.iter().any(|entry| iotlb.insert(*entry).is_err()) {
                continue;
            }
            let before = picture(&iotlb);
            match attempt(&mut iotlb) {
                Ok(()) => succeeded += 1,
                Err(InsertError::NoRoom(_)) => {
                    iotlb.check_invariants();
                    iotlb.reclaim(u64::MAX);
                    let after = picture(&iotlb);
                    assert_eq!(
                        (before.0, before.1, before.2.used),
                        (after.0, after.1, after.2.used)
                    );
                }
                Err(other) => panic!("{other}"),
            }
            iotlb.check_invariants();
        }
    }
    assert!(
        (2..78).contains(&succeeded),
        "some were short and some not: {succeeded}"
    );
}

#[test]
fn an_entry_without_room_changes_nothing() {
    // Unaligned at both ends on every level, and far from what is there: many nodes.
    with_every_shortage(|iotlb| iotlb.insert(entry(POWERS[3] - 5, POWERS[2], 1, 0)));
}

#[test]
fn a_batch_without_room_changes_nothing() {
    let batch = [
        entry(POWERS[3] + 7, 1, 1, 0),
        entry(5, 5, 1, 0),
        entry(POWERS[1] - 7, 9, 1, 0),
    ];
    with_every_shortage(|iotlb| iotlb.insert_all(&batch));
}

#[test]
fn a_table_without_room_leaves_the_old_one() {
    let entries: Vec<_> = (1..9).map(|n| entry(n * 5000, 3, 1, 0)).collect();
    let table = table(&entries);
    with_every_shortage(|iotlb| iotlb.replace_direct(&table).map(drop));
}

#[test]
fn a_reservation_without_room_changes_nothing() {
    with_every_shortage(|iotlb| Ok(iotlb.reserve(granules(500, 30))?));
}

#[test]
fn what_is_reserved_in_the_apertures_can_be_shown_again_and_again_without_more_room() {
    // The apertures' root, a node for each of their two 2 MiB, and one more.
    let mut iotlb = iotlb(4);
    let long = entry(500, 30, 0, 0);
    iotlb.reserve(long.range).unwrap();
    // Takes the last node.
    iotlb.insert(entry(1000, 1, 0, 0)).unwrap();
    assert_eq!(iotlb.table_usage().free, 0);
    for _ in 0..3 {
        iotlb.insert(long).unwrap();
        iotlb.remove(long.range.start()).unwrap();
        iotlb.check_invariants();
    }
    let refused = iotlb.insert(entry(5000, 1, 0, 0)).unwrap_err();
    let expected = NoRoom::Full {
        want: 2,
        used: 4,
        retired: 0,
        most: 4,
    };
    assert_eq!(refused, expected.into());
}

#[test]
fn one_leaf_takes_the_place_of_a_node_that_the_apertures_kept() {
    let mut iotlb = iotlb(8);
    iotlb.insert(entry(5, 1, 0, 0)).unwrap();
    iotlb.remove(Iova::new(5 * P)).unwrap();
    let kept = used(&mut iotlb);
    iotlb.insert(entry(0, 512, 0, 0)).unwrap();
    assert_eq!(iotlb.table_usage().retired, 1);
    assert_eq!(used(&mut iotlb), kept - 1);
    iotlb.check_invariants();
    iotlb.remove(Iova::new(0)).unwrap();
    iotlb.insert(entry(5, 1, 0, 0)).unwrap();
    iotlb.check_invariants();
}

#[test]
fn retired_nodes_are_not_used_again_before_all_readers_have_seen_that() {
    // The apertures' root, and two.
    let mut iotlb = iotlb(3);
    let (one, other) = (entry(1000, 1, 0, 0), entry(5000, 1, 0, 0));
    for old_first in [true, false] {
        let (out, into) = if old_first {
            (one, other)
        } else {
            (other, one)
        };
        if old_first {
            iotlb.insert(out).unwrap();
        }
        let seen = iotlb.generation();
        iotlb.remove(out.range.start()).unwrap();
        iotlb.insert(into).unwrap();
        iotlb.remove(into.range.start()).unwrap();
        // Both are waiting for readers now.
        for too_old in [0, seen] {
            iotlb.reclaim(too_old);
            let refused = iotlb.insert(out).unwrap_err();
            assert!(matches!(
                refused,
                InsertError::NoRoom(NoRoom::Full { retired: 2, .. })
            ));
        }
        iotlb.reclaim(seen + 1);
        assert_eq!(iotlb.table_usage().retired, 1);
        iotlb.insert(into).unwrap();
        iotlb.check_invariants();
        iotlb.reclaim(iotlb.generation());
    }
}

#[test]
fn a_reader_in_a_replaced_table_still_finds_all_of_it() {
    let mut iotlb = iotlb(64);
    let old: Vec<_> = (1..9).map(|n| entry(n * 1000, 2, 1, n)).collect();
    let new: Vec<_> = (1..9).map(|n| entry(n * 1000, 2, 2, n)).collect();
    iotlb.replace_direct(&table(&old)).unwrap();
    let root = iotlb.words().words()[format::header::DIRECT_ROOT].load_acquire();
    iotlb.replace_direct(&table(&new)).unwrap();
    // New nodes for other entries, while the old table's are still retired.
    iotlb.insert(entry(20_000, 1, 3, 0)).unwrap();
    // A reader that loaded the root before the replacement.
    let words = heap(64);
    for (place, word) in iotlb.words().words().iter().enumerate() {
        words.store(place, word.load_acquire(), Ordering::Relaxed);
    }
    words.store(format::header::DIRECT_ROOT, root, Ordering::Relaxed);
    let late = Walker::open(Arc::new(words)).unwrap();
    for entry in old {
        let hit = late.translate(entry.range.last()).unwrap();
        assert_eq!(hit.target.region, entry.target.region);
    }
}

#[test]
fn an_idle_table_costs_a_few_pages() {
    let words = RegionWords::create("idle", 64 << 20, None).unwrap();
    let apertures = bytes(0, 128 << 20);
    let iotlb = Iotlb::new(words, Granule::Size4K, Some(apertures)).unwrap();
    assert!(iotlb.table_usage().backed_bytes <= 32 << 10);
    assert_eq!(iotlb.words().len_bytes(), 64 << 20);
}

#[test]
fn what_is_removed_leaves_no_node_behind() {
    let mut iotlb = iotlb(4096);
    let empty = used(&mut iotlb);
    let scattered: Vec<_> = (0..1000).map(|n| entry(1000 + n * 700, 1, 0, n)).collect();
    for entry in &scattered {
        iotlb.insert(*entry).unwrap();
    }
    iotlb.check_invariants();
    assert!(used(&mut iotlb) > 1000);
    for entry in &scattered {
        iotlb.remove(entry.range.start()).unwrap();
    }
    iotlb.check_invariants();
    assert_eq!(used(&mut iotlb), empty);
}
