//! The IOTLB from outside: entries in, translations out.

// Under loom nodes are tiny and words are models: only the model itself makes sense there.
#![cfg_attr(loom, allow(dead_code, unused_imports))]

#[cfg(not(loom))]
mod basics;
#[cfg(loom)]
mod loom;
#[cfg(loom)]
mod loom_pins;
#[cfg(not(loom))]
mod model;
#[cfg(not(loom))]
mod readers;
#[cfg(not(loom))]
mod replace;
#[cfg(not(loom))]
mod room;

use super::*;

const P: u64 = 4096;
/// Granules below one word of a node of height 2, 3, and so on.
const POWERS: [u64; 5] = [1 << 9, 1 << 18, 1 << 27, 1 << 36, 1 << 45];
/// Granules of 4 KiB in the whole space.
const TOP: u64 = 1 << 52;
/// The apertures that tests have, in granules: at 0, 3 MiB long, so that their tree has two levels.
const APERTURES: u64 = 768;

fn bytes(start: u64, len: u64) -> IovaRange {
    IovaRange::from_len(Iova::new(start), len).unwrap()
}

/// `count` granules from number `first` on.
fn granules(first: u64, count: u64) -> IovaRange {
    IovaRange::new(
        Iova::new(first * P),
        Iova::new((first + count - 1) * P + (P - 1)),
    )
    .unwrap()
}

/// Leads to granule `offset` of memory slot `slot`.
fn entry(first: u64, count: u64, slot: u32, offset: u64) -> Entry {
    Entry {
        range: granules(first, count),
        target: Target {
            region: RegionId::memory_slot(slot),
            offset_bytes: offset * P,
        },
        perm: Perm::ReadWrite,
    }
}

/// `nodes` nodes, and the header.
fn heap(nodes: usize) -> HeapWords {
    HeapWords::new((nodes + 1) * format::NODE_WORDS)
}

fn iotlb(nodes: usize) -> Iotlb {
    Iotlb::new(heap(nodes), Granule::Size4K, Some(granules(0, APERTURES))).unwrap()
}

fn table(entries: &[Entry]) -> DirectTable {
    DirectTable::build(entries.to_vec()).unwrap()
}

/// Used nodes; all others are free after this.
fn used(iotlb: &mut Iotlb) -> usize {
    iotlb.reclaim(u64::MAX);
    let usage = iotlb.table_usage();
    assert_eq!(usage.retired, 0);
    usage.used
}
