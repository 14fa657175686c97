//! Slots that a thread keeps.
//!
//! Only the thread that has the pin slot of a cache takes from it and puts into it, and only while
//! it is pinned. So whoever wants to empty the cache of a thread that does nothing says so first,
//! and then looks whether the thread is pinned; the thread pins first, and then looks. Between the two
//! stand the [`Barrier`](domain_core::iotlb::Barrier) of the one and what a pin has in place of it, and so at
//! most one of them goes on.
//!
//! The cells are atomics because two threads may *look* at the same time; on all machines of ours
//! relaxed loads and stores are plain ones.

use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize};

use super::class::{self, CLASSES, Class};
use super::heap::Unit;

/// Slots of a class that a thread keeps at most.
const SLOTS: usize = 32;
/// Bytes of a class that a thread keeps at most, but for one slot.
const BYTES: usize = 128 << 10;
/// The first of the two limits, for each class.
const ROOM: [usize; CLASSES] = room();
/// In place of an epoch: nobody takes slots from here.
const TAKEN: u64 = 0;

/// What one thread keeps.
#[derive(Debug)]
#[repr(align(128))]
pub(super) struct Cache {
    /// The epoch whose slots these are, and one; or [`TAKEN`].
    epoch: AtomicU64,
    /// Used since somebody last looked.
    used: AtomicBool,
    stacks: [Stack; CLASSES],
}

#[derive(Debug)]
struct Stack {
    len: AtomicUsize,
    slots: [AtomicU32; SLOTS],
}

impl Cache {
    pub(super) fn new(epoch: u64) -> Cache {
        Cache {
            epoch: AtomicU64::new(epoch.wrapping_add(1)),
            used: AtomicBool::new(false),
            stacks: std::array::from_fn(|_| Stack::new()),
        }
    }

    /// May its thread, which is pinned, take slots of this epoch from it?
    #[inline(always)]
    pub(super) fn is_of(&self, epoch: u64) -> bool {
        self.epoch.load(Acquire) == epoch.wrapping_add(1)
    }

    /// For its thread, pinned, when it [is](Cache::is_of) of the right epoch.
    #[inline(always)]
    pub(super) fn pop(&self, class: Class) -> Option<Unit> {
        let stack = &self.stacks[class.index()];
        let len = stack.len.load(Relaxed).checked_sub(1)?;
        let unit = stack.slots[len % SLOTS].load(Relaxed);
        stack.len.store(len, Relaxed);
        Some(Unit(unit))
    }

    /// For its thread, pinned, when it [is](Cache::is_of) of the right epoch. `false` if it keeps no
    /// more of this class.
    #[inline(always)]
    pub(super) fn push(&self, class: Class, unit: Unit) -> bool {
        let stack = &self.stacks[class.index()];
        let len = stack.len.load(Relaxed);
        if len >= ROOM[class.index()] {
            return false;
        }
        stack.slots[len % SLOTS].store(unit.0, Relaxed);
        stack.len.store(len + 1, Relaxed);
        if !self.used.load(Relaxed) {
            self.used.store(true, Relaxed);
        }
        true
    }

    /// How many slots its thread gets at once, and gives back at once: half of what it keeps.
    pub(super) fn batch(class: Class) -> usize {
        (ROOM[class.index()] / 2).max(1)
    }

    /// Forgets what it has: the leases of these slots were taken away. For its thread, pinned.
    pub(super) fn begin(&self, epoch: u64) {
        for stack in &self.stacks {
            stack.len.store(0, Relaxed);
        }
        self.epoch.store(epoch.wrapping_add(1), Release);
    }

    /// Was it used since this was asked last?
    pub(super) fn was_used(&self) -> bool {
        self.used.swap(false, Relaxed)
    }

    /// Says that nobody takes from it, until the answer is gone. One thread at a time does this.
    pub(super) fn seize(&self) -> Seized<'_> {
        let before = self.epoch.swap(TAKEN, Relaxed);
        Seized {
            cache: self,
            before,
        }
    }
}

/// A cache of which its thread takes nothing, if that was not pinned when a barrier had been run after it
/// was seized.
pub(super) struct Seized<'c> {
    cache: &'c Cache,
    before: u64,
}

impl Seized<'_> {
    /// Empties it, for who has seen behind a barrier that its thread was not pinned. Answers slots only
    /// of this `epoch`; others have no lease any more.
    pub(super) fn empty(self, epoch: u64, to: &mut impl FnMut(Class, Unit)) {
        for class in Class::all() {
            while let Some(unit) = self.cache.pop(class) {
                if self.before == epoch.wrapping_add(1) {
                    to(class, unit);
                }
            }
        }
    }
}

impl Drop for Seized<'_> {
    fn drop(&mut self) {
        // With release: its thread finds the stacks as they are now.
        self.cache.epoch.store(self.before, Release);
    }
}

impl Stack {
    fn new() -> Stack {
        Stack {
            len: AtomicUsize::new(0),
            slots: [const { AtomicU32::new(0) }; SLOTS],
        }
    }
}

const fn room() -> [usize; CLASSES] {
    let mut all = [1; CLASSES];
    let mut index = 0;
    while index < CLASSES {
        let slots = BYTES / class::slot_bytes_of(index);
        if slots > 1 {
            all[index] = if slots < SLOTS { slots } else { SLOTS };
        }
        index += 1;
    }
    all
}

#[cfg(test)]
mod tests {
    use std::sync::Barrier;
    use std::sync::atomic::Ordering::SeqCst;
    use std::sync::atomic::fence;
    use std::thread;

    use super::*;

    fn short() -> Class {
        Class::of(1).unwrap()
    }

    fn drained(cache: &Cache, epoch: u64, is_pinned: bool) -> Vec<Unit> {
        let mut units = Vec::new();
        let seized = cache.seize();
        if !is_pinned {
            seized.empty(epoch, &mut |_, unit| units.push(unit));
        }
        units
    }

    #[test]
    fn what_was_put_last_comes_first() {
        let cache = Cache::new(0);
        assert!(cache.push(short(), Unit(1)) && cache.push(short(), Unit(2)));

        assert_eq!(cache.pop(short()), Some(Unit(2)));
        assert_eq!(cache.pop(Class::of(300).unwrap()), None, "of another class");
        assert_eq!(cache.pop(short()), Some(Unit(1)));
        assert_eq!(cache.pop(short()), None);
    }

    #[test]
    fn a_thread_keeps_so_many_bytes_of_a_class_and_none_of_the_longest() {
        let cache = Cache::new(0);
        let kept = |len| {
            let class = Class::of(len).unwrap();
            (0..100)
                .take_while(|unit| cache.push(class, Unit(*unit)))
                .count()
        };

        assert_eq!([kept(256), kept(4096), kept(64 << 10)], [32, 32, 2]);
        assert_eq!(kept(128 << 10), 1);
    }

    #[test]
    fn a_pinned_thread_keeps_what_it_has() {
        let cache = Cache::new(5);
        cache.push(short(), Unit(7));

        assert_eq!(drained(&cache, 5, true), []);
        assert!(cache.is_of(5));
        assert_eq!(drained(&cache, 5, false), [Unit(7)]);
        assert_eq!(drained(&cache, 5, false), []);
    }

    #[test]
    fn slots_of_leases_that_were_taken_away_go_nowhere() {
        let cache = Cache::new(5);
        cache.push(short(), Unit(7));
        assert!(!cache.is_of(6));
        assert_eq!(drained(&cache, 6, false), []);

        cache.push(short(), Unit(8));
        cache.begin(6);
        assert!(cache.is_of(6) && cache.pop(short()).is_none());
    }

    #[test]
    fn used_is_said_once() {
        let cache = Cache::new(0);
        assert!(!cache.was_used());
        cache.push(short(), Unit(1));
        assert!(cache.was_used() && !cache.was_used());
    }

    /// One thread uses the cache, pinned, and another one empties it whenever that is not pinned:
    /// whatever the order, every slot is in one hand.
    #[test]
    fn a_slot_is_never_in_two_hands() {
        const SLOTS: u32 = 8;
        const TURNS: usize = 200_000;
        let cache = Cache::new(0);
        let pinned = AtomicBool::new(false);
        let hands: [AtomicUsize; SLOTS as usize] = std::array::from_fn(|_| AtomicUsize::new(0));
        let shelf = std::sync::Mutex::new((0..SLOTS).map(Unit).collect::<Vec<_>>());
        let done = AtomicBool::new(false);
        let start = Barrier::new(2);
        let take = |unit: Unit| {
            let others = hands[unit.0 as usize].fetch_add(1, Relaxed);
            assert_eq!(others, 0, "{unit:?} is in two hands");
            hands[unit.0 as usize].fetch_sub(1, Relaxed);
        };
        thread::scope(|scope| {
            scope.spawn(|| {
                start.wait();
                for _ in 0..TURNS {
                    pinned.store(true, Relaxed);
                    fence(SeqCst);
                    if cache.is_of(0) {
                        let unit = cache.pop(short()).or_else(|| shelf.lock().unwrap().pop());
                        if let Some(unit) = unit {
                            take(unit);
                            assert!(cache.push(short(), unit));
                        }
                    }
                    pinned.store(false, Release);
                }
                done.store(true, Release);
            });
            start.wait();
            while !done.load(Acquire) {
                let mut shelf = shelf.lock().unwrap();
                let seized = cache.seize();
                fence(SeqCst);
                if !pinned.load(Acquire) {
                    seized.empty(0, &mut |_, unit| {
                        take(unit);
                        shelf.push(unit);
                    });
                }
            }
        });
        let mut all = shelf.into_inner().unwrap();
        all.extend(drained(&cache, 0, false));
        all.sort_unstable();
        assert_eq!(all, (0..SLOTS).map(Unit).collect::<Vec<_>>());
    }
}
