//! Scenario `translate`: a device pins, translates an address of a thousand
//! direct mappings, and unpins. The floor is a flat table with a word for each
//! page, which has no permissions and no lifetimes, and takes room for holes.

use std::hint::black_box;
use std::sync::Arc;
use std::time::Instant;

use anyhow::Context;
use domain_core::addr::{Iova, IovaRange};
use domain_core::direct::DirectMapping;
use domain_core::memory::MemoryId;
use domain_core::perm::Perm;
use domain_core::region::driver_memfd;
use domain_core::session::Role;
use domaind_client::{Session, SetMapOptions};

use super::latency::Lap;
use super::party::{Device, Party, Place};
use super::turns::Work;
use super::{BOUNCE_BYTES, Facts};

pub(super) const FACTS: Facts = Facts {
    operation: "pin, translate, unpin",
    floor: "flat table lookup",
    // Larger ones would need more of a page table than a domain has.
    size_bytes_most: 2 << 20,
    batch: BATCH,
    bounce_bytes: |_, _| BOUNCE_BYTES,
};

/// To read the clock takes longer than one operation.
const BATCH: usize = 1000;
const MAPPINGS: u64 = 1024;
const PAGE: u64 = 4096;
/// Where the mappings begin: above all apertures.
const BASE: u64 = 1 << 32;
/// Mappings of large pieces show the same memory several times.
const MEMORY_BYTES_MOST: u64 = 64 << 20;
/// Batches until the same addresses come again.
const BATCHES: usize = 16;

struct Translator {
    session: Device,
    /// Whoever set the table up stays for as long as somebody uses it, and so
    /// stands behind the session here.
    table: Arc<Table>,
    ranges: Vec<IovaRange>,
    /// Which batch of the ranges comes next.
    next: usize,
}

/// Mappings with holes between them, and the same as a flat table.
struct Table {
    entries: Vec<DirectMapping>,
    /// For each page from `BASE` on its page in the memory, counted from 1.
    flat: Vec<u32>,
    _driver: Session,
    _party: Party,
}

pub(super) fn crew(place: &Place) -> anyhow::Result<Vec<Box<dyn Work>>> {
    let table = Arc::new(Table::set(place)?);
    let translator = |thread| -> anyhow::Result<Box<dyn Work>> {
        Ok(Box::new(Translator::new(place, &table, thread)?))
    };
    (0..place.threads as u64).map(translator).collect()
}

impl Table {
    fn set(place: &Place) -> anyhow::Result<Table> {
        let party = place.party()?;
        let driver = party.run(party.attach(Role::Driver))?;
        let each = place.size_bytes.next_multiple_of(PAGE);
        let pieces = (MEMORY_BYTES_MOST / each).clamp(1, MAPPINGS);
        let memfd = driver_memfd("domaind-bench", pieces * each)?;
        let memory = party.run(driver.register(memfd, true))?.id();
        let entries = entries(memory, each, pieces);
        party.run(driver.set_map(&entries, SetMapOptions::default()))?;
        Ok(Table {
            flat: flat(&entries)?,
            entries,
            _driver: driver,
            _party: party,
        })
    }
}

/// Every mapping is followed by a hole of its length. No two neighbours show
/// neighbouring memory.
fn entries(memory: MemoryId, each: u64, pieces: u64) -> Vec<DirectMapping> {
    let entry = |number: u64| {
        let start = Iova::new(BASE + number * 2 * each);
        DirectMapping {
            range: IovaRange::from_len(start, each).expect("far from the end of the space"),
            memory,
            // Odd, so that all pieces come.
            offset: number * 613 % pieces * each,
            perm: Perm::ReadWrite,
        }
    };
    (0..MAPPINGS).map(entry).collect()
}

fn flat(entries: &[DirectMapping]) -> anyhow::Result<Vec<u32>> {
    let last = entries.iter().map(|entry| entry.range.last().get()).max();
    let pages = (last.unwrap_or(BASE) - BASE) / PAGE + 1;
    let mut flat = vec![0; usize::try_from(pages)?];
    for entry in entries {
        let first = usize::try_from((entry.range.start().get() - BASE) / PAGE)?;
        let pages = entry.range.len_bytes().context("less than all")? / PAGE;
        let numbers = entry.offset / PAGE + 1..;
        for (place, number) in flat[first..]
            .iter_mut()
            .zip(numbers.take(usize::try_from(pages)?))
        {
            *place = u32::try_from(number)?;
        }
    }
    Ok(flat)
}

/// Where an address leads to, as a flat table says it.
#[inline]
fn look_up(flat: &[u32], iova: Iova) -> Option<u64> {
    let offset = iova.get() - BASE;
    let page = flat.get(usize::try_from(offset / PAGE).ok()?)?;
    let before = u64::from(*page).checked_sub(1)?;
    Some(before * PAGE + offset % PAGE)
}

impl Translator {
    fn new(place: &Place, table: &Arc<Table>, thread: u64) -> anyhow::Result<Translator> {
        let session = Device::attach(place)?;
        // The memory is one: what leads to its beginning fetches all of it.
        session.open(table.entries[0].range, Perm::Read)?;
        let mut random = Random(thread + 1);
        let ranges =
            (0..BATCHES * BATCH).map(|_| random.range_in(&table.entries, place.size_bytes));
        Ok(Translator {
            table: Arc::clone(table),
            ranges: ranges.collect(),
            next: 0,
            session,
        })
    }
}

impl Work for Translator {
    fn ours(&mut self) -> anyhow::Result<Lap> {
        let ranges = batch(&self.ranges, &mut self.next);
        let start = Instant::now();
        for range in ranges {
            let pin = self.session.pin()?;
            let pieces = pin.translate(*range, Perm::Read)?;
            black_box(pieces.first().memory.as_ptr());
        }
        Ok(lap(start))
    }

    fn floor(&mut self) -> anyhow::Result<Lap> {
        let ranges = batch(&self.ranges, &mut self.next);
        let start = Instant::now();
        for range in ranges {
            let found = look_up(&self.table.flat, range.start());
            black_box(found.context("a hole in the flat table")?);
        }
        Ok(lap(start))
    }
}

fn batch<'r>(ranges: &'r [IovaRange], next: &mut usize) -> &'r [IovaRange] {
    let first = *next * BATCH;
    *next = (*next + 1) % BATCHES;
    &ranges[first..first + BATCH]
}

fn lap(start: Instant) -> Lap {
    Lap {
        took: start.elapsed(),
        ops: BATCH as u64,
    }
}

/// Vigna's `SplitMix64`: the same numbers in every run.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ (mixed >> 31)) % bound
    }

    /// So many bytes anywhere in one of the mappings.
    fn range_in(&mut self, entries: &[DirectMapping], len_bytes: u64) -> IovaRange {
        let number = self.below(entries.len() as u64);
        let entry = entries[usize::try_from(number).expect("64 bits")];
        let room = entry.range.last().get() - entry.range.start().get() + 1 - len_bytes;
        let start = entry.range.start().get() + self.below(room + 1);
        IovaRange::from_len(Iova::new(start), len_bytes).expect("it lies in the mapping")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_flat_table_leads_where_the_mappings_do_and_nowhere_between_them() {
        let entries = entries(MemoryId::new(1), 2 * PAGE, 64);
        let flat = flat(&entries).unwrap();

        for entry in &entries {
            let start = entry.range.start().get();
            for offset in [0, 5, PAGE, 2 * PAGE - 1] {
                let found = look_up(&flat, Iova::new(start + offset));
                assert_eq!(found, Some(entry.offset + offset));
            }
            assert_eq!(look_up(&flat, Iova::new(start + 2 * PAGE)), None);
        }
    }

    #[test]
    fn random_ranges_lie_in_a_mapping_and_reach_its_end() {
        let entries = entries(MemoryId::new(1), PAGE, 64);
        let mut random = Random(1);
        let ranges: Vec<_> = (0..10_000)
            .map(|_| random.range_in(&entries, 4090))
            .collect();

        let within = |range: &IovaRange| entries.iter().any(|entry| entry.range.contains(*range));
        assert!(ranges.iter().take(500).all(within));
        let ends = ranges
            .iter()
            .filter(|range| range.last().get() % PAGE == PAGE - 1);
        assert!(ends.count() > 0);
    }
}
