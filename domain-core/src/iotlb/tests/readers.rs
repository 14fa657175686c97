//! Walkers on other threads, while the table changes and its nodes are used again.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;

use super::*;

const READERS: usize = 2;

/// What readers have said: each the generation that it saw before its present round.
#[derive(Default)]
struct Acks([AtomicU64; READERS]);

impl Acks {
    fn oldest(&self) -> u64 {
        let acks = self.0.iter().map(|ack| ack.load(Ordering::Acquire));
        acks.min().expect("there are readers")
    }
}

/// Also when the writer panics: its readers would never end.
struct DoneOnDrop<'d>(&'d AtomicBool);

impl Drop for DoneOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Runs `write` while walkers run `read` in rounds, each after saying which generation it has seen.
fn against_readers(
    iotlb: &mut Iotlb<RegionWords>,
    write: impl FnOnce(&mut Iotlb<RegionWords>, &Acks),
    read: impl Fn(&Walker<Arc<RegionWords>>) + Sync,
) {
    let (done, acks) = (AtomicBool::new(false), Acks::default());
    thread::scope(|scope| {
        for ack in &acks.0 {
            let (walker, done, read) = (iotlb.walker(), &done, &read);
            scope.spawn(move || {
                while !done.load(Ordering::Relaxed) {
                    ack.store(walker.generation(), Ordering::Release);
                    read(&walker);
                }
            });
        }
        let _done = DoneOnDrop(&done);
        write(iotlb, &acks);
    });
    iotlb.check_invariants();
}

/// Little memory, so that nodes are soon used again.
fn shared(nodes: u64) -> Iotlb<RegionWords> {
    let words = RegionWords::create("readers", (nodes + 1) * 4096, None).unwrap();
    Iotlb::new(words, Granule::Size4K, Some(granules(0, APERTURES))).unwrap()
}

/// Every round has a table of its own colour. If a reader found one of a round at one address and
/// then an older one at another, it would have seen a mixture.
#[test]
fn readers_see_the_old_table_or_the_new_one_and_never_a_mixture() {
    const AT: [u64; 4] = [1000, 1008, 2000, 3392];
    let coloured = |round: u32| -> DirectTable {
        let mut all: Vec<_> = (0..300).map(|n| entry(1000 + n * 8, 1, round, n)).collect();
        // Every other table is higher.
        all.extend(
            round
                .is_multiple_of(2)
                .then(|| entry(POWERS[3], 1, round, 0)),
        );
        table(&all)
    };
    let mut iotlb = shared(400);
    iotlb.replace_direct(&coloured(1)).unwrap();
    against_readers(
        &mut iotlb,
        |iotlb, acks| {
            for round in 2..600 {
                let table = coloured(round);
                while let Err(refused) = iotlb.replace_direct(&table) {
                    assert!(matches!(refused, InsertError::NoRoom(_)), "{refused}");
                    thread::yield_now();
                    iotlb.reclaim(acks.oldest());
                }
            }
        },
        |walker| {
            // The generation counts the rounds, too.
            let mut round = walker.generation();
            for at in AT {
                let hit = walker
                    .translate(Iova::new(at * P))
                    .expect("all tables map it");
                let colour = u64::from(hit.target.region.slot().unwrap());
                assert!(colour >= round, "{colour} after {round}");
                assert_eq!(hit.target.offset_bytes, (at - 1000) / 8 * P);
                round = colour;
            }
            // The swap is visible before its generation is, at most one of them.
            assert!(round <= walker.generation() + 1);
        },
    );
}

/// Each granule leads to memory of its own number, always. Nodes are used again for others all the
/// time: a walk that ended in one would find a foreign number.
#[test]
fn readers_find_an_entry_whole_or_nothing_and_never_a_foreign_region() {
    /// Each alone in its node.
    const FAR: u64 = 700;
    let own = |n: u32| entry(2000 + u64::from(n) * FAR, 3, n, u64::from(n) * 11);
    let mut iotlb = shared(40);
    against_readers(
        &mut iotlb,
        |iotlb, acks| {
            for step in 0..6000u32 {
                let entry = own(step * 7 % 60);
                if iotlb.remove(entry.range.start()).is_some() {
                    continue;
                }
                while let Err(refused) = iotlb.insert(entry) {
                    assert!(matches!(refused, InsertError::NoRoom(_)), "{refused}");
                    let first = iotlb.direct_entries().next();
                    if let Some(first) = first {
                        iotlb.remove(first.range.start());
                    }
                    thread::yield_now();
                    iotlb.reclaim(acks.oldest());
                }
            }
        },
        |walker| {
            for n in 0..60 {
                let own = own(n);
                let Some(hit) = walker.translate(own.range.last()) else {
                    continue;
                };
                assert_eq!(hit.target.region, own.target.region);
                assert_eq!(hit.target.offset_bytes, own.target.offset_bytes + 3 * P - 1);
                assert_eq!(hit.perm, own.perm);
            }
        },
    );
}

/// What 'Live sessions' will do: nothing but the memfd goes to the reader.
#[test]
fn a_reader_needs_nothing_but_the_memfd() {
    use crate::region::{Access, SharedMemory};
    use std::os::fd::AsFd;
    let mut iotlb = shared(64);
    iotlb.insert(entry(3, 1, 0, 9)).unwrap();
    let grant = iotlb.words().grant().unwrap();
    let len = iotlb.words().len_bytes();
    let mut memory = SharedMemory::reserve(len, 4096).unwrap();
    memory
        .map_at(0, len, grant.as_fd(), Access::ReadOnly)
        .unwrap();
    let words = memory.into_words(Access::ReadOnly).unwrap();

    let walker = Walker::open(Arc::new(words)).unwrap();
    iotlb.insert(entry(5000, 1, 1, 8)).unwrap();

    assert_eq!(walker.apertures(), Some(granules(0, APERTURES)));
    assert_eq!(walker.granule(), Granule::Size4K);
    assert_eq!(walker.generation(), 2);
    for (first, offset) in [(3, 9), (5000, 8)] {
        let hit = walker.translate(Iova::new(first * P + 1)).unwrap();
        assert_eq!(hit.target.offset_bytes, offset * P + 1);
    }
    assert_eq!(walker.translate(Iova::new(5001 * P)), None);
}
