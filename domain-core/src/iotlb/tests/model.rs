//! Random operations against a slow, obvious model.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;

/// What is entered, by first granule. Overlaps are found by looking at every entry.
type Model = BTreeMap<u64, Entry>;

#[derive(Clone, Debug)]
enum Op {
    Insert(Spec),
    InsertAll(Vec<Spec>),
    /// The entry that is so many-th.
    Remove(usize),
    RemoveAll(Vec<usize>),
    Replace(Vec<Spec>),
    /// The table as it is, with one entry out.
    ReplaceBut(usize),
    Reclaim,
}

/// A range in granules, and where it leads.
#[derive(Clone, Copy, Debug)]
struct Spec {
    first: u64,
    count: u64,
    slot: u32,
    offset: u64,
    perm: Perm,
    /// Bytes left out at the start and at the end, inside the apertures.
    lead: u64,
    tail: u64,
}

impl Spec {
    fn entry(self) -> Entry {
        let count = self.count.min(TOP - self.first);
        let whole = entry(self.first, count, self.slot, self.offset);
        let inside = self.first + count <= APERTURES;
        let (lead, tail) = if inside {
            (self.lead, self.tail)
        } else {
            (0, 0)
        };
        let start = Iova::new(whole.range.start().get() + lead);
        let last = Iova::new(whole.range.last().get() - tail);
        Entry {
            range: IovaRange::new(start, last).unwrap(),
            target: Target {
                offset_bytes: whole.target.offset_bytes + lead,
                ..whole.target
            },
            perm: self.perm,
        }
    }
}

/// Around the places where slots of some height begin, and at the ends of the space.
fn first() -> impl Strategy<Value = u64> {
    let near = |at: u64| (0..8u64).prop_map(move |n| (at + n).saturating_sub(4).min(TOP - 1));
    prop_oneof![
        4 => 0..APERTURES,
        4 => APERTURES..4000u64,
        1 => Just(APERTURES),
        1 => Just(TOP - 1),
        2 => near(TOP - 4),
        4 => (0..5usize, 1..4u64).prop_flat_map(move |(power, times)| near(POWERS[power] * times)),
    ]
}

fn count() -> impl Strategy<Value = u64> {
    prop_oneof![
        6 => 1..4u64,
        2 => 1..1200u64,
        1 => Just(512u64),
        2 => (0..4usize, 0..3u64).prop_map(|(power, more)| POWERS[power] - 1 + more),
    ]
}

fn spec() -> impl Strategy<Value = Spec> {
    let perm = prop_oneof![Just(Perm::Read), Just(Perm::Write), Just(Perm::ReadWrite)];
    let to = (0..5u32, 0..100_000u64, perm);
    (first(), count(), to, 0..2000u64, 0..2000u64).prop_map(|(first, count, to, lead, tail)| Spec {
        first,
        count,
        slot: to.0,
        offset: to.1,
        perm: to.2,
        lead,
        tail,
    })
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        8 => spec().prop_map(Op::Insert),
        2 => prop::collection::vec(spec(), 0..5).prop_map(Op::InsertAll),
        5 => (0..64usize).prop_map(Op::Remove),
        1 => prop::collection::vec(0..64usize, 0..5).prop_map(Op::RemoveAll),
        2 => prop::collection::vec(spec(), 0..12).prop_map(Op::Replace),
        1 => (0..64usize).prop_map(Op::ReplaceBut),
        2 => Just(Op::Reclaim),
    ]
}

struct Pair {
    iotlb: Iotlb,
    model: Model,
}

impl Pair {
    fn is_free(&self, entry: &Entry) -> bool {
        let wide = widen(entry.range, Granule::Size4K);
        let mut others = self.model.values();
        !others.any(|other| widen(other.range, Granule::Size4K).overlaps(wide))
    }

    fn fits(&self, entry: &Entry) -> bool {
        let apertures = granules(0, APERTURES);
        self.is_free(entry) && (apertures.contains(entry.range) || !apertures.overlaps(entry.range))
    }

    fn nth(&self, n: usize) -> Option<Entry> {
        let len = self.model.len().max(1);
        self.model.values().nth(n % len).copied()
    }

    fn enter(&mut self, entry: Entry) {
        self.model.insert(entry.range.start().get() / P, entry);
    }

    fn forget(&mut self, entry: &Entry) {
        self.model.remove(&(entry.range.start().get() / P));
    }

    fn apply(&mut self, op: Op) {
        let generation = self.iotlb.generation();
        let changed = match op {
            Op::Insert(spec) => self.insert(&[spec.entry()], |iotlb, all| iotlb.insert(all[0])),
            Op::InsertAll(specs) => {
                let all: Vec<_> = specs.into_iter().map(Spec::entry).collect();
                self.insert(&all, Iotlb::insert_all)
            }
            Op::Remove(n) => {
                let entry = self.nth(n);
                let start = entry.map_or(Iova::new(5), |entry| entry.range.start());
                assert_eq!(self.iotlb.remove(start), entry);
                entry.iter().for_each(|entry| self.forget(entry));
                entry.is_some()
            }
            Op::RemoveAll(all) => self.remove_all(&all),
            Op::Replace(specs) => self.replace(specs.into_iter().map(Spec::entry).collect()),
            Op::ReplaceBut(n) => {
                let mut all: Vec<_> = self.iotlb.direct_entries().collect();
                if !all.is_empty() {
                    all.swap_remove(n % all.len());
                }
                self.replace(all)
            }
            Op::Reclaim => {
                self.iotlb.reclaim(generation);
                assert_eq!(self.iotlb.table_usage().retired, 0);
                false
            }
        };
        assert_eq!(self.iotlb.generation(), generation + u64::from(changed));
    }

    fn insert(
        &mut self,
        all: &[Entry],
        insert: impl FnOnce(&mut Iotlb, &[Entry]) -> Result<(), InsertError>,
    ) -> bool {
        let before = self.model.clone();
        let mut fit = true;
        for entry in all {
            fit &= self.fits(entry);
            self.enter(*entry);
        }
        let inserted = insert(&mut self.iotlb, all);
        assert_eq!(inserted.is_ok(), fit, "{inserted:?}");
        if let Err(InsertError::Overlap(Overlap { range, hit })) = inserted {
            let wide = widen(range, Granule::Size4K);
            assert!(widen(hit, Granule::Size4K).overlaps(wide));
        }
        if !fit {
            self.model = before;
        }
        fit && !all.is_empty()
    }

    fn remove_all(&mut self, numbers: &[usize]) -> bool {
        let mut entries: Vec<_> = numbers.iter().filter_map(|n| self.nth(*n)).collect();
        let starts = entries.iter().map(|entry| entry.range.start());
        let removed = self.iotlb.remove_all(starts.collect::<Vec<_>>());
        let mut seen = std::collections::BTreeSet::new();
        entries.retain(|entry| seen.insert(entry.range));
        assert_eq!(removed, entries);
        entries.iter().for_each(|entry| self.forget(entry));
        !entries.is_empty()
    }

    fn replace(&mut self, mut given: Vec<Entry>) -> bool {
        let old: Vec<_> = self.iotlb.direct_entries().collect();
        // Some are refused already when the table is built.
        let Ok(table) = DirectTable::build(given.clone()) else {
            return false;
        };
        let apertures = granules(0, APERTURES);
        let outside = given.iter().all(|entry| !entry.range.overlaps(apertures));
        let replaced = self.iotlb.replace_direct(&table);
        assert_eq!(replaced.is_ok(), outside, "{replaced:?}");
        let Ok(replaced) = replaced else { return false };
        given.sort_by_key(|entry| entry.range);
        let only_in = |some: &[Entry], others: &[Entry]| -> Vec<Entry> {
            let mut some = some.to_vec();
            some.retain(|entry| !others.contains(entry));
            some
        };
        assert_eq!(replaced.added, only_in(&given, &old));
        assert_eq!(replaced.removed, only_in(&old, &given));
        old.iter().for_each(|entry| self.forget(entry));
        given.iter().for_each(|entry| self.enter(*entry));
        given != old
    }

    fn compare(&self) {
        self.iotlb.check_invariants();
        assert!(self.iotlb.entries().eq(self.model.values().copied()));
        let walker = self.iotlb.walker();
        for entry in self.model.values() {
            let (start, last) = (entry.range.start().get(), entry.range.last().get());
            let around = [start, last, start.wrapping_sub(P), last.wrapping_add(P)];
            let middle = start + (last - start) / 2;
            for iova in around.into_iter().chain([middle, start ^ (1 << 51)]) {
                self.compare_at(&walker, Iova::new(iova));
            }
        }
    }

    fn compare_at(&self, walker: &Walker<Arc<HeapWords>>, iova: Iova) {
        let granule = granules(iova.get() / P, 1);
        let mut entries = self.model.values();
        let expected = entries.find(|entry| widen(entry.range, Granule::Size4K).contains(granule));
        let hit = walker.translate(iova);
        assert_eq!(hit.is_some(), expected.is_some(), "{iova}");
        if let (Some(hit), Some(entry)) = (hit, expected) {
            let base = entry
                .target
                .offset_bytes
                .wrapping_sub(entry.range.start().get());
            assert_eq!(
                hit.target.offset_bytes,
                base.wrapping_add(iova.get()),
                "{iova}"
            );
            assert_eq!(
                (hit.target.region, hit.perm),
                (entry.target.region, entry.perm)
            );
        }
        let byte = IovaRange::new(iova, iova).unwrap();
        let exact = self.model.values().find(|entry| entry.range.contains(byte));
        assert_eq!(self.iotlb.lookup(byte), exact.copied());
        let pieces = self.iotlb.translate(byte, Perm::Read);
        assert_eq!(
            pieces.is_ok(),
            exact.is_some_and(|entry| entry.perm.allows(Perm::Read))
        );
    }
}

/// What a walker says of ranges, against what the entries say.
impl Pair {
    /// An entry in whole granules, which is all that the table knows of it.
    fn widened(entry: &Entry) -> Entry {
        let range = widen(entry.range, Granule::Size4K);
        let lead = entry.range.start().offset_from(range.start()).unwrap();
        let offset_bytes = entry.target.offset_bytes - lead;
        Entry {
            range,
            target: Target {
                offset_bytes,
                ..entry.target
            },
            ..*entry
        }
    }

    /// The pieces of a range, and where and why they end before it does.
    fn pieces(&self, range: IovaRange, want: Perm) -> (Vec<Piece>, Option<(Iova, Option<Perm>)>) {
        let (mut pieces, mut rest) = (Vec::<Piece>::new(), Some(range));
        while let Some(part) = rest {
            let byte = IovaRange::new(part.start(), part.start()).unwrap();
            let entries = self.iotlb.entries().map(|entry| Self::widened(&entry));
            let entry = entries.into_iter().find(|entry| entry.range.contains(byte));
            match entry {
                Some(entry) if entry.perm.allows(want) => join(&mut pieces, entry.clip(part)),
                refused => return (pieces, Some((part.start(), refused.map(|e| e.perm)))),
            }
            rest = above(part, entry.unwrap().range.last());
        }
        (pieces, None)
    }

    fn compare_pieces(&self, walker: &Walker<Arc<HeapWords>>, range: IovaRange, want: Perm) {
        let (mut found, mut end) = (Vec::new(), None);
        for piece in walker.pieces(range, want) {
            assert_eq!(end, None, "an error is the last item");
            match piece {
                Ok(piece) => found.push(piece),
                Err(TranslateError::Hole { at }) => end = Some((at, None)),
                Err(TranslateError::Perm {
                    range: part, perm, ..
                }) => {
                    assert!(range.contains(part));
                    end = Some((part.start(), Some(perm)));
                }
            }
        }
        assert_eq!((found, end), self.pieces(range, want), "{range} {want}");
    }

    fn compare_next(&self, walker: &Walker<Arc<HeapWords>>, range: IovaRange) {
        let mut entries = self.iotlb.entries().map(|entry| Self::widened(&entry));
        let expected = entries.find(|entry| entry.range.overlaps(range));
        let found = walker.next_mapped(range);
        let found = found.map(|(at, hit)| (at, walker.translate(at), hit));
        let at = expected.map(|entry| entry.range.start().max(range.start()));
        assert_eq!(found.map(|(at, ..)| at), at, "{range}");
        if let Some((_, translated, hit)) = found {
            assert_eq!(translated, Some(hit));
        }
    }

    fn compare_ranges(&self) {
        let walker = self.iotlb.walker();
        let entries: Vec<_> = self.iotlb.entries().collect();
        let mut edges = vec![0, u64::MAX, APERTURES * P - 1, APERTURES * P];
        for entry in &entries {
            let (start, last) = (entry.range.start().get(), entry.range.last().get());
            edges.extend([start.saturating_sub(P), start, start + (last - start) / 3]);
            edges.extend([last, last.saturating_add(1 + P)]);
        }
        edges.sort_unstable();
        for (n, &from) in edges.iter().enumerate() {
            for step in [0, 1, 4, 9, 40] {
                let to = edges[(n + step).min(edges.len() - 1)];
                let range = IovaRange::new(Iova::new(from), Iova::new(to)).unwrap();
                self.compare_next(&walker, range);
                for want in [Perm::Read, Perm::ReadWrite] {
                    self.compare_pieces(&walker, range, want);
                }
            }
        }
    }
}

/// Adds a piece, to the last one if it leads on from there.
fn join(pieces: &mut Vec<Piece>, piece: Piece) {
    let Some(before) = pieces.last_mut() else {
        return pieces.push(piece);
    };
    let skipped = piece.range.start().offset_from(before.range.start());
    let goes_on = Target {
        offset_bytes: before.target.offset_bytes + skipped.unwrap(),
        ..before.target
    };
    if (piece.target, piece.perm) == (goes_on, before.perm) {
        before.range = IovaRange::new(before.range.start(), piece.range.last()).unwrap();
    } else {
        pieces.push(piece);
    }
}

/// Neighbours that continue one another, which random ones hardly ever are.
fn neighbours() -> impl Strategy<Value = Vec<Spec>> {
    let cut = (1..700u64, 0..5u8);
    (first(), prop::collection::vec(cut, 1..12)).prop_map(|(first, cuts)| {
        let mut at = first;
        let spec = |at: u64, count, slot, perm| Spec {
            first: at,
            count,
            slot,
            // Leads on where its neighbour does, and no further than a region can reach.
            offset: at & 0xfff_ffff,
            perm,
            lead: 0,
            tail: 0,
        };
        let specs = cuts
            .into_iter()
            .filter(|_| first < TOP / 2)
            .map(|(count, change)| {
                at += count + u64::from(change == 4);
                let perm = if change == 3 {
                    Perm::Read
                } else {
                    Perm::ReadWrite
                };
                spec(at - count, count, u32::from(change == 2), perm)
            });
        specs.collect()
    })
}

proptest! {
    #[test]
    fn a_walker_says_of_ranges_what_the_entries_say(
        ops in prop::collection::vec(op(), 0..30),
        runs in prop::collection::vec(neighbours(), 0..4),
    ) {
        let mut pair = Pair {
            iotlb: iotlb(2000),
            model: Model::new(),
        };
        for op in ops {
            pair.apply(op);
        }
        for spec in runs.into_iter().flatten() {
            pair.apply(Op::Insert(spec));
        }
        pair.compare_ranges();
    }

    #[test]
    fn an_iotlb_answers_as_a_list_of_entries_would(ops in prop::collection::vec(op(), 1..60)) {
        let mut pair = Pair {
            iotlb: iotlb(2000),
            model: Model::new(),
        };
        for op in ops {
            pair.apply(op);
            pair.compare();
        }
    }
}
