//! Translating one address, in random order.
//!
//! Every range is a page, and a page with nothing follows it; so neighbours
//! never merge and a miss lies between hits. Lookups do not wait for each
//! other: what counts is how many a reader gets done.

use std::hint::black_box;
use std::io;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, Instant};

use crate::clock::{Batch, race};
use crate::peers::{
    BTreeTable, FlatTable, IotlbTable, Mapping, NoditTable, PAGE, RangeMapTable, Table, VmIotlb,
};
use crate::random::Random;
use crate::report::{Limit, Report, Row, Unit};
use crate::rounds::{Contender, Scale, interleave};

const RANGES: [(u64, &str); 5] = [
    (8, "8"),
    (64, "64"),
    (1 << 10, "1k"),
    (1 << 16, "64k"),
    (1 << 20, "1M"),
];
/// Lookups are drawn at least this many at a time.
const QUERIES: u64 = 1 << 16;
/// Where the ranges begin.
const BASE: u64 = 1 << 32;

/// Prints all rows of this family.
pub(crate) fn rows(report: &Report, scale: &Scale) -> io::Result<()> {
    for (ranges, name) in RANGES {
        let kinds = [true, false].map(|hit| [1, 2].map(|readers| Kind { hit, readers }));
        let kinds = kinds.as_flattened();
        let names: Vec<String> = kinds.iter().map(|kind| kind.row(name)).collect();
        if !report.wants_any(&names) {
            continue;
        }
        let tables = Tables::build(ranges);
        for (kind, name) in kinds.iter().zip(names) {
            let outcomes = interleave(scale.rounds, tables.contenders(*kind, scale));
            let goal = [
                Limit::Peer(VmIotlb::NAME, 1.0 / 5.0),
                Limit::Peer(RangeMapTable::NAME, 1.0 / 3.0),
                Limit::Peer(BTreeTable::NAME, 1.0 / 3.0),
                Limit::Floor(2.5),
            ];
            report.print(&Row::new(name, Unit::Nanoseconds, outcomes, goal))?;
        }
    }
    Ok(())
}

/// Which lookups.
#[derive(Clone, Copy)]
struct Kind {
    hit: bool,
    readers: usize,
}

impl Kind {
    fn row(self, ranges: &str) -> String {
        let found = if self.hit { "hit" } else { "miss" };
        let readers = if self.readers == 1 {
            "1 reader"
        } else {
            "2 readers"
        };
        format!("lookup/{ranges}/{found}/{readers}")
    }
}

/// So many ranges of one page, with a page between them.
pub(crate) fn spaced(ranges: u64) -> Vec<Mapping> {
    every(ranges, 2)
}

/// So many ranges of one page, none of which continues the one before.
pub(crate) fn adjacent(ranges: u64) -> Vec<Mapping> {
    every(ranges, 1)
}

fn every(ranges: u64, pages: u64) -> Vec<Mapping> {
    let mut targets: Vec<u64> = (0..ranges).collect();
    Random::stream(10).shuffle(&mut targets);
    let starts = (0..).map(|place| BASE + place * pages * PAGE);
    let mapping = |(start, target)| Mapping {
        start,
        len_bytes: PAGE,
        // Not even where the order is left as it was.
        target: 2 * (1 + target) * PAGE,
    };
    starts.zip(targets).map(mapping).collect()
}

/// Everybody with the same ranges.
struct Tables {
    ranges: u64,
    ours: Arc<RwLock<IotlbTable>>,
    vm_memory: Arc<RwLock<VmIotlb>>,
    rangemap: Arc<RwLock<RangeMapTable>>,
    nodit: Arc<RwLock<NoditTable>>,
    btree: Arc<RwLock<BTreeTable>>,
    flat: Arc<RwLock<FlatTable>>,
}

impl Tables {
    fn build(ranges: u64) -> Tables {
        // As mappings come: ascending ones leave nodes of a B-tree half empty.
        let mut mappings = spaced(ranges);
        Random::stream(12).shuffle(&mut mappings);
        Tables {
            ranges,
            ours: shared(&mappings),
            vm_memory: shared(&mappings),
            rangemap: shared(&mappings),
            nodit: shared(&mappings),
            btree: shared(&mappings),
            flat: shared(&mappings),
        }
    }

    fn contenders(&self, kind: Kind, scale: &Scale) -> Vec<Contender<'static>> {
        let lookups = Arc::new(self.queries(kind));
        vec![
            contender(&self.ours, &lookups, kind, scale),
            contender(&self.vm_memory, &lookups, kind, scale),
            contender(&self.rangemap, &lookups, kind, scale),
            contender(&self.nodit, &lookups, kind, scale),
            contender(&self.btree, &lookups, kind, scale),
            contender(&self.flat, &lookups, kind, scale),
        ]
    }

    fn queries(&self, kind: Kind) -> Vec<u64> {
        let mut random = Random::stream(11);
        let page = |random: &mut Random| {
            let page = BASE + 2 * random.below(self.ranges) * PAGE;
            if kind.hit { page } else { page + PAGE }
        };
        (0..QUERIES.max(self.ranges))
            .map(|_| page(&mut random) + random.below(PAGE))
            .collect()
    }
}

fn shared<T: Table>(mappings: &[Mapping]) -> Arc<RwLock<T>> {
    Arc::new(RwLock::new(T::build(mappings)))
}

fn contender<T: Table + 'static>(
    table: &Arc<RwLock<T>>,
    lookups: &Arc<Vec<u64>>,
    kind: Kind,
    scale: &Scale,
) -> Contender<'static> {
    let reader = |first| Reader {
        table: Arc::clone(table),
        lookups: Arc::clone(lookups),
        at: first,
        // Who is alone with a table needs no lock.
        locks: T::LOCKS && kind.readers > 1,
    };
    let (mut one, mut other) = (reader(0), reader(lookups.len() / 2));
    assert_eq!(one.look_up(), kind.hit, "{} answers wrongly", T::NAME);
    let mut batch = Batch::lasting(scale.turn);
    let turn = move || match kind.readers {
        1 => batch.run(|ops| one.run(ops)),
        _ => batch.run(|ops| race(|| one.run(ops), || other.run(ops))),
    };
    Contender::new(T::ROLE, T::NAME, turn)
}

/// One reader and what it looks up. On cache lines of its own.
#[repr(align(128))]
struct Reader<T> {
    table: Arc<RwLock<T>>,
    lookups: Arc<Vec<u64>>,
    at: usize,
    locks: bool,
}

impl<T: Table> Reader<T> {
    fn look_up(&self) -> bool {
        let table = self.table.read().unwrap_or_else(PoisonError::into_inner);
        table.lookup(self.lookups[self.at]).is_some()
    }

    fn run(&mut self, ops: u64) -> Duration {
        let lookups = &self.lookups[..];
        let mut at = self.at;
        let mut next = || {
            at = if at + 1 < lookups.len() { at + 1 } else { 0 };
            black_box(lookups[at])
        };
        let read = || self.table.read().unwrap_or_else(PoisonError::into_inner);
        let start = Instant::now();
        if self.locks {
            for _ in 0..ops {
                black_box(read().lookup(next()));
            }
        } else {
            let table = read();
            for _ in 0..ops {
                black_box(table.lookup(next()));
            }
        }
        let took = start.elapsed();
        self.at = at;
        took
    }
}
