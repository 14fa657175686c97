//! Replacing a whole table of direct mappings, beside a reader.

use std::fmt;
use std::io;
use std::panic::resume_unwind;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Instant;

use domain_core::Iova;
use domain_core::iotlb::{DirectTable, Entry, RegionWords, Walker};

use crate::lookup::spaced;
use crate::peers::{
    BTreeTable, FlatTable, IotlbTable, Mapping, NoditTable, PAGE, RangeMapTable, Table, VmIotlb,
};
use crate::random::Random;
use crate::report::{Limit, Report, Row, Unit};
use crate::rounds::{Contender, Role, Scale, interleave};

const ENTRIES: u64 = 100_000;
const MOST_MS: f64 = 30.0;
const NAME: &str = "set_map/100k";
/// Between two looks at the generation.
const LOOKUPS: u64 = 64;

/// Prints the row of this family.
pub(crate) fn rows(report: &Report, scale: &Scale) -> io::Result<()> {
    if !report.wants(NAME) {
        return Ok(());
    }
    let table = IotlbTable::build(&[]);
    let reader = Reader {
        walker: table.walker(),
        starts: spaced(ENTRIES)
            .iter()
            .map(|mapping| mapping.start)
            .collect(),
        ended: AtomicBool::new(false),
        seen: AtomicU64::new(0),
    };
    let (mut outcomes, watched) = thread::scope(|scope| {
        let watching = scope.spawn(|| reader.watch());
        let outcomes = interleave(scale.replacements, contenders(table, &reader));
        reader.ended.store(true, Ordering::Release);
        let watched = watching.join();
        (
            outcomes,
            watched.unwrap_or_else(|panic| resume_unwind(panic)),
        )
    });
    for ours in outcomes
        .iter_mut()
        .filter(|outcome| outcome.role == Role::Ours)
    {
        ours.note = Some(watched.to_string());
        ours.value = ours.value.filter(|_| watched.mixtures == 0);
    }
    let row = Row::new(
        NAME.to_owned(),
        Unit::Milliseconds,
        outcomes,
        [Limit::AtMost(MOST_MS)],
    );
    report.print(&row)
}

fn contenders(table: IotlbTable, reader: &Reader) -> Vec<Contender<'_>> {
    vec![
        ours(table, reader),
        peer::<VmIotlb>(),
        peer::<RangeMapTable>(),
        peer::<NoditTable>(),
        peer::<BTreeTable>(),
        peer::<FlatTable>(),
    ]
}

/// Builds, checks, swaps and says what has changed: every entry.
fn ours(mut table: IotlbTable, reader: &Reader) -> Contender<'_> {
    let mut version = 0;
    Contender::new(IotlbTable::ROLE, IotlbTable::NAME, move || {
        let entries: Vec<Entry> = unordered(version).into_iter().map(Mapping::entry).collect();
        version += 1;
        let start = Instant::now();
        let direct = DirectTable::build(entries).expect("they do not overlap");
        let replaced = table.replace(&direct);
        let took = start.elapsed();
        assert_eq!(replaced.added.len(), direct.len());
        // Only then may nodes of the old table be used again.
        reader.acknowledge(table.generation());
        table.reclaim();
        took.as_secs_f64() * 1e3
    })
}

/// Builds another table and puts it in place of the old one; knows no changes.
fn peer<T: Table + 'static>() -> Contender<'static> {
    let mut version = 0;
    let mut present = T::build(&[]);
    Contender::new(T::ROLE, T::NAME, move || {
        let mappings = unordered(version);
        version += 1;
        let start = Instant::now();
        let old = std::mem::replace(&mut present, T::build(&mappings));
        let took = start.elapsed();
        drop(old);
        took.as_secs_f64() * 1e3
    })
}

/// The entries of one version, in any order. Where each leads names both.
fn unordered(version: u64) -> Vec<Mapping> {
    let mut mappings = spaced(ENTRIES);
    for (index, mapping) in (0..).zip(&mut mappings) {
        mapping.target = (version * ENTRIES + index) * PAGE;
    }
    Random::stream(30).shuffle(&mut mappings);
    mappings
}

/// Looks things up while the table is replaced again and again.
struct Reader {
    walker: Walker<Arc<RegionWords>>,
    starts: Vec<u64>,
    ended: AtomicBool,
    /// No translation of an older generation is in use.
    seen: AtomicU64,
}

/// What a reader has seen.
#[derive(Clone, Copy, Debug, Default)]
struct Watched {
    lookups: u64,
    mixtures: u64,
}

impl fmt::Display for Watched {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Watched { lookups, mixtures } = self;
        write!(f, "{lookups} lookups beside it saw {mixtures} mixtures")
    }
}

impl Reader {
    /// Once it has seen a version anywhere, an older one, a hole or another
    /// entry's target anywhere else is a mixture.
    fn watch(&self) -> Watched {
        let mut watched = Watched::default();
        let mut newest = None;
        let mut random = Random::stream(31);
        while !self.ended.load(Ordering::Acquire) {
            let generation = self.walker.generation();
            self.seen.store(generation, Ordering::Release);
            if generation == 0 {
                continue;
            }
            for _ in 0..LOOKUPS {
                let version = self.version(random.index(self.starts.len()));
                watched.mixtures += u64::from(version.is_none() || version < newest);
                newest = newest.max(version);
            }
            watched.lookups += LOOKUPS;
        }
        watched
    }

    fn version(&self, index: usize) -> Option<u64> {
        let hit = self.walker.translate(Iova::new(self.starts[index]))?;
        let target = hit.target.offset_bytes / PAGE;
        let index = u64::try_from(index).expect("64 bits");
        (target % ENTRIES == index).then_some(target / ENTRIES)
    }

    /// Waits until the reader holds nothing older.
    fn acknowledge(&self, generation: u64) {
        while self.seen.load(Ordering::Acquire) < generation {
            thread::yield_now();
        }
    }
}
