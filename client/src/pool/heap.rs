//! What is leased and where it is free, for all threads.
//!
//! A lease is cut into *spans*: runs of pages, each of slots of one class, or of one block longer
//! than any class. A span that is free again gives its pages back to its lease, whatever class
//! needs them next; a lease that is free again can be given back to the daemon.
//!
//! Nothing here is ever written to leased memory, nor read from it.

use std::mem;

use domain_core::addr::{Granule, Iova, IovaRange};
use domain_core::alloc::{AllocRequest, IovaAllocator};

use super::class::{CLASSES, Class, PAGE_BYTES, UNIT_BYTES};

/// Bytes that a span of short slots has.
const SPAN_BYTES: usize = 64 << 10;
/// Slots of one span: the bits of its map.
const SPAN_SLOTS: usize = 64;
/// A page that belongs to no span.
const NO_SPAN: u32 = u32::MAX;

/// Where a slot begins: in units from the start of the aperture.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Unit(pub(super) u32);

impl Unit {
    #[inline]
    pub(super) fn offset_bytes(self) -> u64 {
        u64::from(self.0).wrapping_mul(UNIT_BYTES as u64)
    }
}

/// All leases of a pool. `L` is what keeps one alive.
#[derive(Debug)]
pub(super) struct Heap<L> {
    /// Start of the aperture.
    base: Iova,
    /// How many times leases had been taken away when these were given.
    epoch: u64,
    /// By address.
    lots: Vec<Lot<L>>,
    spans: Vec<Option<Span>>,
    /// Numbers of spans that are gone.
    spare: Vec<u32>,
    /// Spans of each class that have a free slot.
    open: [Vec<u32>; CLASSES],
}

#[derive(Debug)]
struct Lot<L> {
    first: Unit,
    range: IovaRange,
    pages: IovaAllocator,
    /// Which span each page belongs to.
    owners: Vec<u32>,
    lease: L,
    /// Nothing of it was in use when somebody last looked.
    idle: bool,
}

#[derive(Debug)]
struct Span {
    class: Class,
    first: Unit,
    range: IovaRange,
    /// One bit for each free slot.
    free: u64,
    slots: u32,
    /// Its place in `open`, while it has a free slot.
    listed: usize,
}

/// How much there is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Stock {
    pub(super) leases: usize,
    pub(super) leased_bytes: u64,
    /// Bytes in pages that belong to no span.
    pub(super) free_bytes: u64,
}

impl<L> Heap<L> {
    pub(super) fn new(base: Iova, epoch: u64) -> Heap<L> {
        Heap {
            base,
            epoch,
            lots: Vec::new(),
            spans: Vec::new(),
            spare: Vec::new(),
            open: [const { Vec::new() }; CLASSES],
        }
    }

    /// Are these leases still ours, when leases have been taken away so many times?
    pub(super) fn is_of(&self, epoch: u64) -> bool {
        self.epoch == epoch
    }

    /// All leases were taken away. The caller drops what kept them.
    #[must_use]
    pub(super) fn begin(&mut self, epoch: u64) -> Vec<L> {
        let old = mem::replace(self, Heap::new(self.base, epoch));
        old.lots.into_iter().map(|lot| lot.lease).collect()
    }

    /// Takes a lease in. Gives it back if it is none that slots could be cut from: it does not lie
    /// on whole pages, or beyond what a slot's number can say.
    pub(super) fn add(&mut self, range: IovaRange, lease: L) -> Result<(), L> {
        let Some((first, pages)) = self.place(range) else {
            return Err(lease);
        };
        let at = self.lots.partition_point(|lot| lot.first < first);
        let count = range.len_bytes().unwrap_or(0) / PAGE_BYTES as u64;
        let count = usize::try_from(count).expect("the place was checked");
        let lot = Lot {
            first,
            range,
            pages,
            owners: vec![NO_SPAN; count],
            lease,
            idle: false,
        };
        self.lots.insert(at, lot);
        Ok(())
    }

    fn place(&self, range: IovaRange) -> Option<(Unit, IovaAllocator)> {
        let page = PAGE_BYTES as u64;
        let offset = range.start().offset_from(self.base)?;
        let last = range.last().offset_from(self.base)?;
        u32::try_from(last / UNIT_BYTES as u64).ok()?;
        if offset % page != 0 || range.len_bytes()? % page != 0 {
            return None;
        }
        let first = Unit(u32::try_from(offset / UNIT_BYTES as u64).ok()?);
        Some((first, IovaAllocator::new(range, Granule::Size4K)?))
    }

    /// Takes at most `most` slots of one class. None at all if there is no room for one.
    pub(super) fn take(&mut self, class: Class, most: usize, mut to: impl FnMut(Unit)) -> usize {
        let mut taken = 0;
        while taken < most {
            let Some(number) = self.open_span(class) else {
                break;
            };
            let span = self.spans[number as usize].as_mut().expect("an open span");
            while taken < most && span.free != 0 {
                to(span.take());
                taken += 1;
            }
            if span.free == 0 {
                self.unlist(number);
            }
        }
        taken
    }

    /// A slot comes back.
    pub(super) fn give(&mut self, class: Class, unit: Unit) {
        let number = self.owner(unit);
        let span = self.spans[number as usize]
            .as_mut()
            .expect("a slot lies in a span");
        debug_assert_eq!(span.class, class, "a slot keeps its class");
        let was_full = span.free == 0;
        span.give(unit);
        let is_free = span.is_free();
        if was_full {
            self.list(number);
        }
        if is_free {
            self.unlist(number);
            self.end_span(number);
        }
    }

    /// Takes whole pages for something longer than any class.
    pub(super) fn take_pages(&mut self, bytes: usize) -> Option<Unit> {
        let request = AllocRequest::of(bytes as u64);
        let range = self
            .lots
            .iter_mut()
            .find_map(|lot| lot.pages.alloc(request).ok())?;
        Some(self.unit_of(range))
    }

    /// Whole pages come back.
    pub(super) fn give_pages(&mut self, unit: Unit, bytes: usize) {
        let start = self.iova_of(unit);
        let pages = bytes.div_ceil(PAGE_BYTES) * PAGE_BYTES;
        let range = IovaRange::from_len(start, pages as u64).expect("it was taken");
        self.lot_of(unit).pages.free(range).expect("it was taken");
    }

    pub(super) fn stock(&self) -> Stock {
        let mut stock = Stock {
            leases: self.lots.len(),
            ..Stock::default()
        };
        for lot in &self.lots {
            let bytes = lot.range.len_bytes().unwrap_or(0);
            stock.leased_bytes += bytes;
            stock.free_bytes += bytes - lot.pages.used_bytes();
        }
        stock
    }

    /// Would so many bytes in one piece be found?
    pub(super) fn has_run(&self, bytes: u64) -> bool {
        let mut lots = self.lots.iter();
        lots.any(|lot| lot.pages.largest_hole_bytes() >= bytes)
    }

    /// Takes out leases of which nothing is in use, now as the last time, as long as `keep_bytes`
    /// stay leased.
    #[must_use]
    pub(super) fn shed(&mut self, keep_bytes: u64) -> Vec<L> {
        let mut leased = self.stock().leased_bytes;
        let mut shed = Vec::new();
        let mut at = 0;
        while let Some(lot) = self.lots.get_mut(at) {
            let bytes = lot.range.len_bytes().unwrap_or(0);
            let was_idle = mem::replace(&mut lot.idle, lot.pages.used_bytes() == 0);
            if was_idle && lot.idle && leased - bytes >= keep_bytes {
                leased -= bytes;
                shed.push(self.lots.remove(at).lease);
            } else {
                at += 1;
            }
        }
        shed
    }

    /// A span with a free slot, made if need be.
    fn open_span(&mut self, class: Class) -> Option<u32> {
        match self.open[class.index()].last() {
            Some(number) => Some(*number),
            None => self.make_span(class),
        }
    }

    fn make_span(&mut self, class: Class) -> Option<u32> {
        let stride = class.stride_pages() * PAGE_BYTES;
        let most = SPAN_SLOTS / class.group_slots();
        let groups = (SPAN_BYTES / stride).clamp(1, most);
        // Where there is no room for many, one group is better than nothing.
        let range = self.run(groups * stride).or_else(|| self.run(stride))?;
        let groups = range.len_bytes().expect("a run of pages") / stride as u64;
        let slots = usize::try_from(groups).expect("at most 64") * class.group_slots();
        let free = u64::MAX >> (SPAN_SLOTS - slots);
        let span = Span {
            class,
            first: self.unit_of(range),
            range,
            free,
            slots: free.count_ones(),
            listed: 0,
        };
        let number = self.enter(span);
        self.set_owner(range, number);
        self.list(number);
        Some(number)
    }

    fn run(&mut self, bytes: usize) -> Option<IovaRange> {
        let request = AllocRequest::of(bytes as u64);
        self.lots
            .iter_mut()
            .find_map(|lot| lot.pages.alloc(request).ok())
    }

    fn enter(&mut self, span: Span) -> u32 {
        if let Some(number) = self.spare.pop() {
            self.spans[number as usize] = Some(span);
            return number;
        }
        self.spans.push(Some(span));
        u32::try_from(self.spans.len() - 1).expect("fewer spans than pages")
    }

    fn end_span(&mut self, number: u32) {
        let span = self.spans[number as usize]
            .take()
            .expect("a span ends once");
        self.set_owner(span.range, NO_SPAN);
        let lot = self.lot_of(span.first);
        lot.pages
            .free(span.range)
            .expect("a span's pages were taken");
        self.spare.push(number);
    }

    fn list(&mut self, number: u32) {
        let span = self.spans[number as usize]
            .as_mut()
            .expect("a span that lives");
        let open = &mut self.open[span.class.index()];
        span.listed = open.len();
        open.push(number);
    }

    fn unlist(&mut self, number: u32) {
        let span = self.spans[number as usize]
            .as_ref()
            .expect("a span that lives");
        let (at, open) = (span.listed, &mut self.open[span.class.index()]);
        open.swap_remove(at);
        if let Some(moved) = open.get(at).copied() {
            let moved = self.spans[moved as usize].as_mut();
            moved.expect("what is open lives").listed = at;
        }
    }

    fn owner(&mut self, unit: Unit) -> u32 {
        let lot = self.lot_of(unit);
        let page = (unit.0 - lot.first.0) as usize * UNIT_BYTES / PAGE_BYTES;
        lot.owners[page]
    }

    fn set_owner(&mut self, range: IovaRange, number: u32) {
        let first = self.unit_of(range);
        let lot = self.lot_of(first);
        let page = (first.0 - lot.first.0) as usize * UNIT_BYTES / PAGE_BYTES;
        let bytes = range.len_bytes().expect("a run of pages");
        let count = usize::try_from(bytes).expect("part of a lease") / PAGE_BYTES;
        lot.owners[page..page + count].fill(number);
    }

    /// The lease that a slot was cut from.
    fn lot_of(&mut self, unit: Unit) -> &mut Lot<L> {
        let behind = self.lots.partition_point(|lot| lot.first <= unit);
        let at = behind.checked_sub(1).expect("a slot lies in a lease");
        &mut self.lots[at]
    }

    fn unit_of(&self, range: IovaRange) -> Unit {
        let offset = range
            .start()
            .offset_from(self.base)
            .expect("inside the aperture");
        let unit = u32::try_from(offset / UNIT_BYTES as u64);
        Unit(unit.expect("checked when the lease came"))
    }

    fn iova_of(&self, unit: Unit) -> Iova {
        let iova = self.base.checked_add(unit.offset_bytes());
        iova.expect("inside the aperture")
    }
}

impl Span {
    fn take(&mut self) -> Unit {
        let slot = self.free.trailing_zeros();
        self.free &= self.free - 1;
        let units = self.class.slot_units(slot as usize);
        Unit(self.first.0 + u32::try_from(units).expect("part of a lease"))
    }

    fn give(&mut self, unit: Unit) {
        let bit = 1 << self.class.slot_at((unit.0 - self.first.0) as usize);
        assert_eq!(self.free & bit, 0, "a slot comes back once");
        self.free |= bit;
    }

    fn is_free(&self) -> bool {
        self.free.count_ones() == self.slots
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    const PAGE: u64 = PAGE_BYTES as u64;
    /// Not zero, so that an iova is never by chance an offset.
    const BASE: Iova = Iova::new(0x10_0000);

    fn range(page: u64, pages: u64) -> IovaRange {
        let start = BASE.checked_add(page * PAGE).unwrap();
        IovaRange::from_len(start, pages * PAGE).unwrap()
    }

    /// With one lease of so many pages, which is called `name`.
    fn heap(pages: u64, name: &'static str) -> Heap<&'static str> {
        let mut heap = Heap::new(BASE, 0);
        heap.add(range(3, pages), name).unwrap();
        heap
    }

    fn take(heap: &mut Heap<&'static str>, len: usize) -> Option<Unit> {
        let Some(class) = Class::of(len) else {
            return heap.take_pages(len);
        };
        let mut taken = None;
        heap.take(class, 1, |unit| taken = Some(unit));
        taken
    }

    fn give(heap: &mut Heap<&'static str>, unit: Unit, len: usize) {
        match Class::of(len) {
            Some(class) => heap.give(class, unit),
            None => heap.give_pages(unit, len),
        }
    }

    #[test]
    fn what_is_not_whole_pages_inside_of_the_aperture_is_no_lease() {
        let mut heap = heap(4, "a");
        let odd = IovaRange::from_len(BASE, PAGE + 256).unwrap();
        let below = IovaRange::from_len(Iova::new(0xf_f000), PAGE).unwrap();
        let far = IovaRange::from_len(Iova::new(1 << 41), PAGE).unwrap();

        for range in [odd, below, far] {
            assert_eq!(heap.add(range, "b"), Err("b"), "{range:?}");
        }
        assert_eq!(heap.stock().leases, 1);
    }

    #[test]
    fn a_lease_is_used_to_its_last_page_by_whatever_needs_it() {
        let mut heap = heap(17, "a");
        let pages: Vec<_> = (0..17).map(|_| take(&mut heap, 4096).unwrap()).collect();
        assert_eq!(take(&mut heap, 1), None);

        for unit in pages {
            give(&mut heap, unit, 4096);
        }

        assert_eq!(heap.stock().free_bytes, 17 * PAGE, "all spans are gone");
        let short: Vec<_> = std::iter::from_fn(|| take(&mut heap, 256)).collect();
        assert_eq!(short.len(), 17 * 16);
    }

    #[test]
    fn what_is_longer_than_any_class_takes_whole_pages_and_gives_them_back() {
        let mut heap = heap(600, "a");
        let len = 280 * PAGE_BYTES - 1;
        assert_eq!(Class::of(len), None);

        let first = take(&mut heap, len).unwrap();
        let second = take(&mut heap, len).unwrap();

        assert_eq!(second.offset_bytes() - first.offset_bytes(), 280 * PAGE);
        assert_eq!(take(&mut heap, len), None);
        give(&mut heap, first, len);
        give(&mut heap, second, len);
        assert!(heap.has_run(600 * PAGE));
    }

    #[test]
    fn a_lease_that_is_idle_twice_is_shed_but_not_below_what_is_kept() {
        let mut heap = heap(16, "a");
        heap.add(range(100, 16), "b").unwrap();
        let used = take(&mut heap, 4096).unwrap();

        assert_eq!(heap.shed(0), [""; 0], "seen for the first time");
        assert_eq!(
            heap.shed(17 * PAGE),
            [""; 0],
            "less would stay than is kept"
        );
        assert_eq!(heap.shed(16 * PAGE), ["b"]);
        assert_eq!(heap.shed(0), [""; 0], "in use");
        give(&mut heap, used, 4096);
        assert_eq!(heap.shed(0), [""; 0]);
        assert_eq!(heap.shed(0), ["a"]);
        assert_eq!(heap.stock(), Stock::default());
    }

    #[test]
    fn a_new_epoch_begins_with_nothing() {
        let mut heap = heap(16, "a");
        let _lost = take(&mut heap, 4096).unwrap();

        assert_eq!(heap.begin(1), ["a"]);

        assert!(heap.is_of(1) && !heap.is_of(0));
        assert_eq!(take(&mut heap, 1), None);
        heap.add(range(3, 16), "b").unwrap();
        assert!(take(&mut heap, 1).is_some());
    }

    proptest! {
        /// Slots lie in leases, apart from each other, and no byte is lost for ever.
        #[test]
        fn live_slots_are_disjoint_and_all_comes_back(
            steps in prop::collection::vec((any::<bool>(), 1_usize..1_200_000, any::<prop::sample::Index>()), 1..200),
        ) {
            let mut heap = heap(300, "a");
            heap.add(range(500, 64), "b").unwrap();
            let leased = [range(3, 300), range(500, 64)];
            let mut live: BTreeMap<u64, (Unit, usize, u64)> = BTreeMap::new();
            for (takes, len, which) in steps {
                // Short ones mostly.
                let len = if len % 3 == 0 { len } else { len % 9000 + 1 };
                if takes || live.is_empty() {
                    let Some(unit) = take(&mut heap, len) else { continue };
                    let class = Class::of(len);
                    let bytes = class.map_or(len.next_multiple_of(PAGE_BYTES), Class::slot_bytes);
                    let start = unit.offset_bytes();
                    let end = start + bytes as u64;
                    let place = IovaRange::from_len(BASE.checked_add(start).unwrap(), bytes as u64).unwrap();
                    prop_assert!(leased.iter().any(|lease| lease.contains(place)));
                    let below = live.range(..=start).next_back();
                    prop_assert!(below.is_none_or(|(_, (_, _, end))| *end <= start));
                    let above = live.range(start..).next();
                    prop_assert!(above.is_none_or(|(above, _)| end <= *above));
                    live.insert(start, (unit, len, end));
                } else {
                    let key = *which.get(&live.keys().copied().collect::<Vec<_>>());
                    let (unit, len, _) = live.remove(&key).unwrap();
                    give(&mut heap, unit, len);
                }
            }
            for (unit, len, _) in live.into_values() {
                give(&mut heap, unit, len);
            }
            prop_assert_eq!(heap.stock().free_bytes, 364 * PAGE);
        }
    }
}
