//! What the clones of a pool share: where slots come from and go to.

use std::fmt;
use std::num::NonZeroU64;
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering::{Relaxed, SeqCst};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use domain_core::addr::Iova;
use domain_core::iotlb::Barrier;
use domain_core::region::SharedSlice;
use tokio::sync::Notify;
use tokio::sync::futures::Notified;

use super::cache::Cache;
use super::class::Class;
use super::heap::{Heap, Stock, Unit};
use super::keeper::Bell;
use super::{PoolError, PoolOptions};
use crate::lease::Lease;
use crate::live::Live;
use crate::pins::{OWN_SLOTS, PinAlone, PinGuard};
use crate::session::Session;

pub(super) struct Inner {
    session: Session,
    options: PoolOptions,
    /// Start of the bounce aperture.
    base: Iova,
    /// By pin slot: the thread that has the one has the other.
    caches: Box<[OnceLock<Box<Cache>>]>,
    /// Held for bookkeeping, never across a copy or an await.
    heap: Mutex<Heap<Lease>>,
    /// Somebody waits: slots go where everybody finds them.
    waiting: AtomicUsize,
    /// Something came back, or a lease came.
    room: Notify,
    pub(super) bell: Arc<Bell>,
}

/// A slot that is in use.
#[derive(Clone, Copy, Debug)]
pub(super) struct Place {
    slot: Slot,
    /// Bytes of the buffer.
    pub(super) len: usize,
}

/// Two words, so that it is returned in registers: written to memory in parts and read again as a
/// whole it was measured to cost more than all the rest of a mapping.
#[derive(Clone, Copy, Debug)]
struct Slot {
    /// The unit in the upper half; in the lower one the number of the class and one, or [`WHOLE_PAGES`].
    word: NonZeroU64,
    /// How many times leases had been taken away when it was taken.
    epoch: u64,
}

/// In place of a class: as many pages as the buffer needs.
const WHOLE_PAGES: u64 = 0xff;

impl Slot {
    #[inline(always)]
    fn new(unit: Unit, class: Option<Class>, epoch: u64) -> Slot {
        let class = class.map_or(WHOLE_PAGES, |class| class.index() as u64 + 1);
        let word = NonZeroU64::new(u64::from(unit.0) << 32 | class);
        let word = word.expect("a class is not 0");
        Slot { word, epoch }
    }

    #[inline(always)]
    fn unit(self) -> Unit {
        Unit((self.word.get() >> 32) as u32)
    }

    #[inline(always)]
    fn class(self) -> Option<Class> {
        Class::numbered((self.word.get() & 0xff) as usize - 1)
    }
}

/// What became of a lease.
pub(super) enum Added {
    Done,
    /// Leases have been taken away since it was asked for, maybe this one, too.
    TooLate(Lease),
    /// It lies where no slot can be.
    Useless(Lease),
}

/// While it lives nothing of the session's leases is used for anything else, if none was taken away
/// before.
struct Pinned<'p> {
    /// `None` when the daemon is gone: then nobody is left who could take a lease away.
    guard: Option<PinGuard<'p>>,
    /// How many times leases were taken away. Read behind the pin: who takes them away counts
    /// first, and then looks for pins.
    epoch: u64,
}

impl Pinned<'_> {
    /// The slot of its thread, if that has one of its own.
    #[inline(always)]
    fn slot(&self) -> usize {
        self.guard.as_ref().map_or(OWN_SLOTS, PinGuard::slot)
    }
}

/// A thread that is pinned, and what it keeps: of the leases as they are.
struct Alone<'p> {
    pool: &'p Inner,
    cache: &'p Cache,
    epoch: u64,
    pin: PinAlone<'p>,
}

impl Alone<'_> {
    #[inline(always)]
    fn take(&self, len: usize) -> Option<Slot> {
        let class = Class::of(len)?;
        let unit = self.cache.pop(class)?;
        Some(Slot::new(unit, Some(class), self.epoch))
    }

    /// `false` if it is to go elsewhere.
    #[inline(always)]
    fn put(&self, slot: Slot) -> bool {
        let is_wanted = self.pool.waiting.load(Relaxed) > 0;
        let class = slot.class().filter(|_| !is_wanted);
        class.is_some_and(|class| self.cache.push(class, slot.unit()))
    }
}

impl Inner {
    pub(super) fn new(session: &Session, base: Iova, options: PoolOptions) -> Inner {
        let epoch = session.live().pins.revocations();
        Inner {
            session: session.clone(),
            options,
            base,
            caches: (0..OWN_SLOTS).map(|_| OnceLock::new()).collect(),
            heap: Mutex::new(Heap::new(base, epoch)),
            waiting: AtomicUsize::new(0),
            room: Notify::new(),
            bell: Arc::default(),
        }
    }

    pub(super) fn session(&self) -> &Session {
        &self.session
    }

    /// Never panics, on purpose: what can unwind between map and unmap keeps a mapping in memory, and there its
    /// parts were measured to cost more than both.
    #[inline(always)]
    pub(super) fn iova(&self, place: Place) -> Iova {
        // A slot lies in the aperture: nothing wraps.
        let offset = place.slot.unit().offset_bytes();
        Iova::new(self.base.get().wrapping_add(offset))
    }

    /// Takes a slot that shows these bytes, and zeros behind them.
    #[inline(always)]
    pub(super) fn place_bytes(&self, bytes: &[u8]) -> Result<Place, PoolError> {
        if let Some(alone) = self.alone()
            && let Some(slot) = alone.take(bytes.len())
        {
            let place = Place {
                slot,
                len: bytes.len(),
            };
            self.slot(place).copy_in_padded(bytes).expect(LEASED);
            return Ok(place);
        }
        Ok(Place::of(&self.place_bytes_slowly(bytes)?, bytes.len()))
    }

    #[cold]
    #[inline(never)]
    fn place_bytes_slowly(&self, bytes: &[u8]) -> Result<Slot, PoolError> {
        let pinned = self.pinned()?;
        let place = self.take(&pinned, bytes.len())?;
        self.slot(place).copy_in_padded(bytes).expect(LEASED);
        Ok(place.slot)
    }

    /// Takes a slot for so many bytes that shows zeros.
    #[inline(always)]
    pub(super) fn place_zeros(&self, len: usize) -> Result<Place, PoolError> {
        if let Some(alone) = self.alone()
            && let Some(slot) = alone.take(len)
        {
            let place = Place { slot, len };
            self.slot(place).fill_from(0, 0).expect(LEASED);
            return Ok(place);
        }
        Ok(Place::of(&self.place_zeros_slowly(len)?, len))
    }

    #[cold]
    #[inline(never)]
    fn place_zeros_slowly(&self, len: usize) -> Result<Slot, PoolError> {
        let pinned = self.pinned()?;
        let place = self.take(&pinned, len)?;
        self.slot(place).fill_from(0, 0).expect(LEASED);
        Ok(place.slot)
    }

    /// Copies bytes to a place, behind `skip` of its bytes.
    pub(super) fn copy_in(&self, place: Place, skip: usize, from: &[u8]) -> Result<(), PoolError> {
        let _pinned = self.pinned_for(place)?;
        self.slot(place).copy_in(skip as u64, from).expect(LEASED);
        Ok(())
    }

    /// Copies bytes out of a place, from behind `skip` of its bytes.
    pub(super) fn copy_out(
        &self,
        place: Place,
        skip: usize,
        into: &mut [u8],
    ) -> Result<(), PoolError> {
        let _pinned = self.pinned_for(place)?;
        self.slot(place).copy_out(skip as u64, into).expect(LEASED);
        Ok(())
    }

    /// Copies the first bytes out, if any are wanted, and gives the slot back. After an error it is
    /// still the caller's.
    #[inline(always)]
    pub(super) fn end(&self, place: Place, into: Option<&mut [u8]>) -> Result<(), PoolError> {
        if let Some(alone) = self.alone()
            && alone.epoch == place.slot.epoch
        {
            if let Some(into) = into {
                self.slot(place).copy_out(0, into).expect(LEASED);
            }
            if !alone.put(place.slot) {
                self.put_slowly(alone.pin.slot(), place);
            }
            return Ok(());
        }
        self.end_slowly(place, into)
    }

    #[cold]
    #[inline(never)]
    fn end_slowly(&self, place: Place, into: Option<&mut [u8]>) -> Result<(), PoolError> {
        let pinned = self.pinned_for(place)?;
        if let Some(into) = into {
            self.slot(place).copy_out(0, into).expect(LEASED);
        }
        self.put(&pinned, place);
        Ok(())
    }

    /// Gives a slot back, if its lease is still ours.
    #[cold]
    pub(super) fn give(&self, place: Place) {
        if let Ok(pinned) = self.pinned_for(place) {
            self.put(&pinned, place);
        }
    }

    /// How many times leases of the session have been taken away.
    pub(super) fn epoch(&self) -> u64 {
        self.live().pins.revocations()
    }

    pub(super) fn stock(&self) -> Stock {
        self.heap().stock()
    }

    /// While it lives whoever unmaps says so.
    pub(super) fn waits(&self) -> Waits<'_> {
        self.waiting.fetch_add(1, SeqCst);
        Waits(&self.waiting)
    }

    /// Resolves when something comes back after this call, or a lease comes.
    pub(super) fn room(&self) -> Notified<'_> {
        self.room.notified()
    }

    /// Takes a lease in that was asked for when leases had been taken away `epoch` times.
    pub(super) fn add(&self, lease: Lease, epoch: u64) -> Added {
        let mut heap = self.heap();
        if self.epoch() != epoch {
            return Added::TooLate(lease);
        }
        let revoked = match heap.is_of(epoch) {
            true => Vec::new(),
            false => heap.begin(epoch),
        };
        let added = heap.add(lease.range(), lease);
        drop(heap);
        forget(revoked);
        self.room.notify_waiters();
        added.map_or_else(Added::Useless, |()| Added::Done)
    }

    /// How many bytes to lease next, for a mapping of `wanted`; `None` if nothing is needed or no
    /// more is allowed.
    pub(super) fn lacks(&self, wanted: u64) -> Option<u64> {
        let heap = self.heap();
        let stock = heap.stock();
        let is_short = stock.free_bytes < self.options.spare_bytes;
        if !is_short && (wanted == 0 || heap.has_run(wanted)) {
            return None;
        }
        let granule = self.session.granule().bytes();
        let left = self.options.most_bytes.saturating_sub(stock.leased_bytes);
        let left = left / granule * granule;
        let want = self.options.lease_bytes.max(wanted).min(left);
        (want > 0 && want >= wanted).then_some(want)
    }

    /// Takes back what threads keep and do not use, and gives leases back that are not used.
    pub(super) fn tidy(&self) {
        let epoch = self.epoch();
        let mut heap = self.heap();
        if !heap.is_of(epoch) {
            return;
        }
        let idle = |cache: &Cache| !cache.was_used();
        self.drain(&mut heap, epoch, idle);
        let shed = heap.shed(self.options.keep_bytes);
        drop(heap);
        drop(shed);
    }

    #[inline(always)]
    fn live(&self) -> &Live {
        self.session.live()
    }

    /// The memory of a slot, all of it.
    #[inline(always)]
    fn slot(&self, place: Place) -> SharedSlice<'_> {
        let memory = self
            .live()
            .apertures
            .bounce_from(place.slot.unit().offset_bytes());
        memory.expect(LEASED).first(place.room_bytes())
    }

    /// For a thread whose pin and whose slots are where they were the last time: all of a transfer, mostly.
    #[inline(always)]
    fn alone(&self) -> Option<Alone<'_>> {
        let live = self.live();
        let pin = live.pins.pin_alone(live.table.generation())?;
        if pin.is_fenced() {
            return None;
        }
        let epoch = pin.revocations();
        let cache = self.caches.get(pin.slot())?.get()?;
        let is_own = cache.is_of(epoch);
        is_own.then_some(Alone {
            pool: self,
            cache,
            epoch,
            pin,
        })
    }

    fn pinned(&self) -> Result<Pinned<'_>, PoolError> {
        let live = self.live();
        let guard = live.pins.pin(live.table.generation());
        if (guard.is_none() || live.pins.is_fenced()) && !self.session.has_memory_to_itself() {
            return Err(PoolError::Ended);
        }
        let epoch = live.pins.revocations();
        Ok(Pinned { guard, epoch })
    }

    fn pinned_for(&self, place: Place) -> Result<Pinned<'_>, PoolError> {
        let pinned = self.pinned()?;
        match pinned.epoch == place.slot.epoch {
            true => Ok(pinned),
            false => Err(PoolError::Revoked),
        }
    }

    /// What this thread keeps, if it may use it.
    fn cache(&self, pinned: &Pinned<'_>) -> Option<&Cache> {
        let cache = self.caches.get(pinned.slot())?.get()?;
        cache.is_of(pinned.epoch).then_some(cache)
    }

    fn take(&self, pinned: &Pinned<'_>, len: usize) -> Result<Place, PoolError> {
        let slot = match self.take_own(pinned, len) {
            Some(slot) => Some(slot),
            None => self.take_slowly(pinned.slot(), len),
        };
        match slot {
            Some(slot) => Ok(Place { slot, len }),
            None => Err(self.why_not(len)),
        }
    }

    /// From what this thread keeps.
    fn take_own(&self, pinned: &Pinned<'_>, len: usize) -> Option<Slot> {
        let class = Class::of(len)?;
        let unit = self.cache(pinned)?.pop(class)?;
        Some(Slot::new(unit, Some(class), pinned.epoch))
    }

    /// For a thread that is pinned in this slot.
    #[cold]
    fn take_slowly(&self, pinned_in: usize, len: usize) -> Option<Slot> {
        self.check_len(len).ok()?;
        let mut heap = self.heap();
        let (epoch, revoked) = self.current(&mut heap);
        let mut unit = self.take_from(&mut heap, pinned_in, epoch, len);
        if unit.is_none() {
            self.drain(&mut heap, epoch, |_| true);
            self.flush(&mut heap, pinned_in, epoch);
            unit = self.take_from(&mut heap, pinned_in, epoch, len);
        }
        let stock = heap.stock();
        drop(heap);
        forget(revoked);
        if unit.is_none() {
            self.bell.ring_for(Class::room_bytes(len) as u64);
        } else if stock.free_bytes < self.options.spare_bytes
            && stock.leased_bytes < self.options.most_bytes
        {
            self.bell.ring_for(0);
        }
        Some(Slot::new(unit?, Class::of(len), epoch))
    }

    /// Why no slot was taken for so many bytes.
    #[cold]
    fn why_not(&self, len: usize) -> PoolError {
        let full = |leased_bytes| PoolError::Full {
            len_bytes: len as u64,
            leased_bytes,
            most_bytes: self.options.most_bytes,
        };
        let too_long = self.check_len(len).err();
        too_long.unwrap_or_else(|| full(self.stock().leased_bytes))
    }

    fn check_len(&self, len: usize) -> Result<(), PoolError> {
        let (len_bytes, most_bytes) = (len as u64, self.options.most_bytes);
        match len_bytes {
            0 => Err(PoolError::ZeroLength),
            _ if Class::room_bytes(len) as u64 > most_bytes => Err(PoolError::TooLong {
                len_bytes,
                most_bytes,
            }),
            _ => Ok(()),
        }
    }

    /// How many times leases have been taken away by now. If that is news to the heap it has none
    /// any more; what kept those is for the caller to drop, without the lock.
    fn current(&self, heap: &mut Heap<Lease>) -> (u64, Vec<Lease>) {
        let epoch = self.epoch();
        match heap.is_of(epoch) {
            true => (epoch, Vec::new()),
            false => (epoch, heap.begin(epoch)),
        }
    }

    /// One slot, and some more for this thread to keep.
    fn take_from(
        &self,
        heap: &mut Heap<Lease>,
        pinned_in: usize,
        epoch: u64,
        len: usize,
    ) -> Option<Unit> {
        let Some(class) = Class::of(len) else {
            return heap.take_pages(len);
        };
        let cache = self.own_cache(pinned_in, epoch);
        let batch = cache.map_or(1, |_| Cache::batch(class));
        let mut first = None;
        let mut surplus = Vec::new();
        heap.take(class, batch, |unit| match (first, cache) {
            (None, _) => first = Some(unit),
            (Some(_), Some(cache)) if cache.push(class, unit) => {}
            (Some(_), _) => surplus.push(unit),
        });
        for unit in surplus {
            heap.give(class, unit);
        }
        first
    }

    /// What this thread keeps, for the right epoch. Under the heap's lock, so that nobody empties
    /// it meanwhile.
    fn own_cache(&self, pinned_in: usize, epoch: u64) -> Option<&Cache> {
        let slot = self.caches.get(pinned_in)?;
        let cache = slot.get_or_init(|| Box::new(Cache::new(epoch)));
        if !cache.is_of(epoch) {
            cache.begin(epoch);
        }
        Some(cache)
    }

    fn put(&self, pinned: &Pinned<'_>, place: Place) {
        let Slot { epoch, .. } = place.slot;
        let (unit, class) = (place.slot.unit(), place.slot.class());
        if let (Some(class), Some(cache)) = (class, self.cache(pinned))
            && self.waiting.load(Relaxed) == 0
            && cache.push(class, unit)
        {
            return;
        }
        debug_assert_eq!(epoch, pinned.epoch, "only what is still ours comes back");
        self.put_slowly(pinned.slot(), place);
    }

    /// For a thread that is pinned in this slot.
    #[cold]
    fn put_slowly(&self, pinned_in: usize, place: Place) {
        let mut heap = self.heap();
        let (epoch, revoked) = self.current(&mut heap);
        if epoch == place.slot.epoch {
            self.put_to(&mut heap, pinned_in, place);
        }
        drop(heap);
        forget(revoked);
        if self.waiting.load(Relaxed) > 0 {
            self.room.notify_waiters();
        }
    }

    /// With half of what this thread keeps of the class, so that the next ones stay with it; with
    /// all of it when somebody waits.
    fn put_to(&self, heap: &mut Heap<Lease>, pinned_in: usize, place: Place) {
        let Slot { epoch, .. } = place.slot;
        let (unit, class) = (place.slot.unit(), place.slot.class());
        let Some(class) = class else {
            return heap.give_pages(unit, place.len);
        };
        heap.give(class, unit);
        if self.waiting.load(Relaxed) > 0 {
            return self.flush(heap, pinned_in, epoch);
        }
        if let Some(cache) = self.own_cache(pinned_in, epoch) {
            let surplus = (0..Cache::batch(class)).map_while(|_| cache.pop(class));
            surplus.for_each(|unit| heap.give(class, unit));
        }
    }

    /// Takes back what this thread keeps.
    fn flush(&self, heap: &mut Heap<Lease>, pinned_in: usize, epoch: u64) {
        let Some(cache) = self.own_cache(pinned_in, epoch) else {
            return;
        };
        for class in Class::all() {
            while let Some(unit) = cache.pop(class) {
                heap.give(class, unit);
            }
        }
    }

    /// Takes back what other threads keep that are doing nothing with it right now.
    fn drain(&self, heap: &mut Heap<Lease>, epoch: u64, which: impl Fn(&Cache) -> bool) {
        let used = self.caches.iter().map(OnceLock::get);
        let used = used.map(|cache| cache.filter(|cache| which(cache)));
        let seized: Vec<_> = used.map(|cache| cache.map(|cache| cache.seize())).collect();
        if seized.iter().all(Option::is_none) {
            return;
        }
        // One for all of them. Without it nobody is known to do nothing.
        let Some(barrier) = Barrier::run_within() else {
            return;
        };
        for (slot, seized) in seized.into_iter().enumerate() {
            if let Some(seized) = seized
                && !self.live().pins.is_pinned(slot, &barrier)
            {
                seized.empty(epoch, &mut |class, unit| heap.give(class, unit));
            }
        }
    }

    fn heap(&self) -> MutexGuard<'_, Heap<Lease>> {
        // Nothing panics in the middle of a change.
        self.heap.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.bell.ring_for(0);
    }
}

impl fmt::Debug for Inner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pool")
            .field("options", &self.options)
            .field("stock", &self.stock())
            .finish_non_exhaustive()
    }
}

/// Leases that the daemon has taken away: there is nothing to give back.
fn forget(revoked: Vec<Lease>) {
    for lease in revoked {
        let _gone = lease.into_parts();
    }
}

const LEASED: &str = "leased memory is mapped, and may be written";

impl Place {
    /// Part by part: what the slow way returns through memory must not force the quick one there.
    #[inline(always)]
    fn of(slot: &Slot, len: usize) -> Place {
        let Slot { word, epoch } = *slot;
        let slot = Slot { word, epoch };
        Place { slot, len }
    }

    /// Bytes of the slot.
    #[inline(always)]
    fn room_bytes(self) -> u64 {
        Class::room_bytes(self.len) as u64
    }
}

/// Counts as somebody who waits.
pub(super) struct Waits<'p>(&'p AtomicUsize);

impl Drop for Waits<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Relaxed);
    }
}
