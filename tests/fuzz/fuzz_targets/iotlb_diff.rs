//! The IOTLB, its map, its page table and its walkers, against a list of
//! entries that is looked through one by one.
#![no_main]

use arbitrary::Arbitrary;
use domain_core::addr::{Granule, Iova, IovaRange};
use domain_core::iotlb::{
    DirectTable, Entry, HeapWords, InsertError, Iotlb, RegionId, Target, TranslateError,
};
use domain_core::perm::Perm;
use libfuzzer_sys::fuzz_target;

const P: u64 = 4096;
/// Granules of the apertures, which begin at this one.
const APERTURES: (u64, u64) = (512, 600);

#[derive(Arbitrary, Debug)]
struct Plan {
    /// How many nodes of the table there is room for.
    nodes: u8,
    ops: Vec<Op>,
}

#[derive(Arbitrary, Debug)]
enum Op {
    Insert(Row),
    Remove { which: u8 },
    RemoveAt { place: Place },
    Replace(Vec<Row>),
    Translate { place: Place, bytes: u32 },
    Reclaim,
}

#[derive(Arbitrary, Debug)]
struct Row {
    place: Place,
    len: Len,
    region: u8,
    offset: u32,
    perm: u8,
}

/// Where nodes and levels begin and end, mostly.
#[derive(Arbitrary, Debug)]
struct Place {
    level: u8,
    index: u16,
    near: i8,
}

#[derive(Arbitrary, Debug)]
enum Len {
    Small(u8),
    Large(u16),
    /// Whole nodes of a level.
    Nodes { level: u8, count: u8 },
}

impl Place {
    fn granule(&self) -> u64 {
        let level = 1u64 << (9 * u32::from(self.level % 6));
        let at = u64::from(self.index % 520).wrapping_mul(level);
        at.wrapping_add_signed(i64::from(self.near)) % (1 << 52)
    }
}

impl Row {
    fn entry(&self) -> Option<Entry> {
        let granules = match self.len {
            Len::Small(len) => u64::from(len % 4) + 1,
            Len::Large(len) => u64::from(len) + 1,
            Len::Nodes { level, count } => {
                (1u64 << (9 * u32::from(level % 5))).checked_mul(u64::from(count % 3) + 1)?
            }
        };
        let start = self.place.granule() * P;
        let range = IovaRange::from_len(Iova::new(start), granules.checked_mul(P)?).ok()?;
        Some(Entry {
            range,
            target: Target {
                region: RegionId::memory_slot(u32::from(self.region)),
                offset_bytes: u64::from(self.offset) * P,
            },
            perm: [Perm::Read, Perm::Write, Perm::ReadWrite][usize::from(self.perm % 3)],
        })
    }
}

#[derive(Default)]
struct Model {
    entries: Vec<Entry>,
}

impl Model {
    fn hit(&self, range: IovaRange) -> Option<&Entry> {
        let overlapping = self.entries.iter().filter(|entry| entry.range.overlaps(range));
        overlapping.min_by_key(|entry| entry.range.start())
    }

    fn at(&self, iova: Iova) -> Option<(Target, Perm)> {
        let entry = self.hit(IovaRange::from_len(iova, 1).expect("one byte"))?;
        let skipped = iova.offset_from(entry.range.start())?;
        let target = Target {
            offset_bytes: entry.target.offset_bytes + skipped,
            ..entry.target
        };
        Some((target, entry.perm))
    }

    fn sorted(&self) -> Vec<Entry> {
        let mut entries = self.entries.clone();
        entries.sort_by_key(|entry| entry.range.start());
        entries
    }
}

fn apertures() -> IovaRange {
    IovaRange::from_len(Iova::new(APERTURES.0 * P), APERTURES.1 * P).expect("a range")
}

fn crosses(range: IovaRange) -> bool {
    apertures().overlaps(range) && !apertures().contains(range)
}

fuzz_target!(|plan: Plan| {
    let words = HeapWords::new(512 * (usize::from(plan.nodes) + 3));
    let Ok(mut iotlb) = Iotlb::new(words, Granule::Size4K, Some(apertures())) else {
        return;
    };
    let mut model = Model::default();
    for op in &plan.ops {
        let before = iotlb.generation();
        let changed = step(op, &mut iotlb, &mut model);
        assert_eq!(iotlb.generation() > before, changed, "{op:?}");
        iotlb.check_invariants();
        assert!(iotlb.entries().eq(model.sorted()));
        look(&iotlb, &model);
    }
});

fn step(op: &Op, iotlb: &mut Iotlb, model: &mut Model) -> bool {
    match op {
        Op::Insert(row) => insert(row, iotlb, model),
        Op::Remove { which } => {
            let Some(at) = usize::from(*which).checked_rem(model.entries.len()) else {
                return false;
            };
            let entry = model.entries.swap_remove(at);
            assert_eq!(iotlb.remove(entry.range.start()), Some(entry));
            true
        }
        Op::RemoveAt { place } => {
            let start = Iova::new(place.granule() * P);
            let there = model.entries.iter().position(|e| e.range.start() == start);
            let expected = there.map(|at| model.entries.swap_remove(at));
            assert_eq!(iotlb.remove(start), expected);
            expected.is_some()
        }
        Op::Replace(rows) => replace(rows, iotlb, model),
        Op::Translate { place, bytes } => {
            let start = Iova::new(place.granule() * P);
            if let Ok(range) = IovaRange::from_len(start, u64::from(*bytes) + 1) {
                translate(range, iotlb, model);
            }
            false
        }
        Op::Reclaim => {
            iotlb.reclaim(iotlb.generation());
            false
        }
    }
}

fn insert(row: &Row, iotlb: &mut Iotlb, model: &mut Model) -> bool {
    let Some(entry) = row.entry() else {
        return false;
    };
    match iotlb.insert(entry) {
        Ok(()) => {
            assert!(model.hit(entry.range).is_none() && !crosses(entry.range));
            model.entries.push(entry);
            true
        }
        Err(InsertError::Overlap(overlap)) => {
            assert_eq!(Some(overlap.hit), model.hit(entry.range).map(|e| e.range));
            false
        }
        Err(InsertError::CrossesAperture { .. }) => {
            assert!(crosses(entry.range));
            false
        }
        Err(InsertError::NoRoom(_) | InsertError::TooFar { .. }) => false,
        Err(InsertError::Misaligned { .. }) => panic!("{entry:?} is aligned"),
    }
}

fn replace(rows: &[Row], iotlb: &mut Iotlb, model: &mut Model) -> bool {
    let entries: Vec<_> = rows.iter().filter_map(Row::entry).collect();
    let mut sorted = entries.clone();
    sorted.sort_by_key(|entry| entry.range.start());
    let overlaps = sorted.windows(2).any(|pair| pair[0].range.overlaps(pair[1].range));
    let table = match DirectTable::build(entries) {
        Ok(table) => table,
        Err(_) => {
            assert!(overlaps);
            return false;
        }
    };
    assert!(!overlaps);
    let Ok(replaced) = iotlb.replace_direct(&table) else {
        return false;
    };
    let (direct, inside): (Vec<_>, Vec<_>) = model
        .entries
        .drain(..)
        .partition(|entry| !apertures().overlaps(entry.range));
    let added = sorted.iter().filter(|entry| !direct.contains(entry)).count();
    let removed = direct.iter().filter(|entry| !sorted.contains(entry)).count();
    assert_eq!((replaced.added.len(), replaced.removed.len()), (added, removed));
    model.entries = inside;
    model.entries.extend(&sorted);
    added + removed > 0
}

fn translate(range: IovaRange, iotlb: &Iotlb, model: &Model) {
    match iotlb.translate(range, Perm::Read) {
        Ok(pieces) => {
            let mut next = Some(range.start());
            for piece in &pieces {
                assert_eq!(Some(piece.range.start()), next);
                for at in [piece.range.start(), piece.range.last()] {
                    let (target, perm) = model.at(at).expect("it is mapped");
                    let skipped = at.offset_from(piece.range.start()).expect("inside");
                    assert_eq!(piece.target.offset_bytes + skipped, target.offset_bytes);
                    assert_eq!((piece.target.region, piece.perm), (target.region, perm));
                    assert!(perm.allows(Perm::Read));
                }
                next = piece.range.last().checked_add(1);
            }
            assert_eq!(pieces.last().map(|piece| piece.range.last()), Some(range.last()));
        }
        Err(TranslateError::Hole { at }) => assert!(model.at(at).is_none()),
        Err(TranslateError::Perm { range, perm, .. }) => {
            let there = model.hit(range).expect("it is mapped");
            assert_eq!((there.range, there.perm), (range, perm));
            assert!(!perm.allows(Perm::Read));
        }
    }
}

/// The walker sees what the model has, at both ends of every entry and beside.
fn look(iotlb: &Iotlb, model: &Model) {
    let walker = iotlb.walker();
    for entry in &model.entries {
        let (start, last) = (entry.range.start().get(), entry.range.last().get());
        let middle = start + (last - start) / 2;
        for at in [start.wrapping_sub(1), start, middle, last, last.wrapping_add(1)] {
            let at = Iova::new(at);
            let seen = walker.translate(at).map(|hit| (hit.target, hit.perm));
            assert_eq!(seen, model.at(at), "{at}");
        }
    }
}
