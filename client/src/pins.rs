//! What this process's threads hold of a session's page table.
//!
//! A thread pins before it walks the table and unpins when it is done with what it found. The first
//! pin of a thread gives it a slot of the [session page](domain_core::iotlb::page) of its own, which
//! it keeps until it ends; from then on a pin is a look at a thread-local, a store, and a fence, which it
//! could be [spared](domain_core::iotlb::barrier). No
//! thread writes what another one writes. Only when more than [`OWN_SLOTS`] threads live at once do
//! the others share the last slot, behind a lock.

use std::cell::{Cell, RefCell};
use std::marker::PhantomData;
use std::sync::atomic::Ordering::{Relaxed, SeqCst};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::time::Duration;

use domain_core::iotlb::page::{OwnSlot as PageSlot, SLOTS};
use domain_core::iotlb::{Barrier, Registered, SessionPage, Unfenced};
use domain_core::region::SharedWords;
use tokio::sync::Notify;
use tokio::time::{Instant, timeout};

/// Slots that belong to one thread at a time.
pub(crate) const OWN_SLOTS: usize = SLOTS - 1;
/// The slot of all other threads.
const CROWD_SLOT: usize = OWN_SLOTS;

/// How long a wait for older pins only yields: most pins are shorter.
const YIELD_FOR: Duration = Duration::from_micros(20);
/// How often it looks then by itself. Mostly the one who unpins says so.
const LOOK_EVERY: Duration = Duration::from_millis(1);

/// The pins of one session, for all threads of this process.
#[derive(Debug)]
pub(crate) struct Pins {
    page: SessionPage<SharedWords>,
    /// Never given to another session of this process.
    id: u64,
    closed: AtomicBool,
    /// Pins need no fence. Set once, at any moment: each thread begins when it sees it.
    unfenced: OnceLock<Unfenced>,
    /// Whoever unpins a view before this wakes those who wait; 0 if nobody does.
    awaited: AtomicU64,
    /// A view before `awaited` has gone.
    unpinned: Notify,
    /// How many guards each thread has besides its first. Only the thread of a slot looks at it.
    nested: [Nested; OWN_SLOTS],
    /// Held for a few instructions, and never while a closure of a caller runs.
    desk: Mutex<Desk>,
}

/// In a cache line of its own, as the slots in the page are.
#[derive(Debug, Default)]
#[repr(align(64))]
struct Nested(AtomicU32);

/// What is given out and what is left.
#[derive(Debug, Default)]
struct Desk {
    /// Of threads that have ended.
    given_back: Vec<usize>,
    /// The lowest slot that no thread ever had.
    fresh: usize,
    /// What the page says of used slots. Never less than it was.
    announced: usize,
    /// The views of all guards that share the last slot. `None`: a guard was there.
    crowd: Vec<Option<u64>>,
}

/// While it lives, this thread may work with what it finds in the page table: nothing of that is
/// used for anything else.
///
/// It stays on its thread, and it must not live long: the daemon gives a session up that holds
/// removed memory too long. One that is never dropped holds for ever.
#[derive(Debug)]
#[must_use = "what is found after it is dropped may be anything"]
pub(crate) struct PinGuard<'p> {
    pins: &'p Pins,
    /// Where its view stands: this slot, if that is one of a thread's own; else the place
    /// `at - OWN_SLOTS` in the crowd. One number, and no enum: a guard stays in registers then,
    /// which was measured to be worth more than all the rest of a pin.
    at: usize,
    /// The slot belongs to the thread.
    stays_on_its_thread: PhantomData<*const ()>,
}

impl Pins {
    /// The pins of a session that was given this page, and that nobody else in this process has.
    pub(crate) fn new(page: SessionPage<SharedWords>) -> Arc<Pins> {
        /// 0 is nobody.
        static NEXT_ID: AtomicU64 = AtomicU64::new(1);
        Arc::new(Pins {
            page,
            id: NEXT_ID.fetch_add(1, Relaxed),
            closed: AtomicBool::new(false),
            unfenced: OnceLock::new(),
            awaited: AtomicU64::new(0),
            unpinned: Notify::new(),
            nested: std::array::from_fn(|_| Nested::default()),
            desk: Mutex::default(),
        })
    }

    /// Pins the table's generation, which was loaded just now; or keeps pinned what this thread has
    /// pinned already: then the older view stays the one that counts. `None` after
    /// [`Pins::close`].
    // What a pin does is little, and returned through memory it would cost twice as much: measured.
    #[inline(always)]
    pub(crate) fn pin(self: &Arc<Self>, view: u64) -> Option<PinGuard<'_>> {
        let (id, slot) = LAST.get();
        let guard = if id == self.id {
            self.pin_own(slot, view)
        } else {
            self.pin_slowly(view)
        };
        // After it has pinned: who closes and then sees no pin knows that there will be none.
        if self.closed.load(Relaxed) {
            return None;
        }
        Some(guard)
    }

    /// As [`Pins::pin`], to work with leased memory and nothing else, for a thread that pinned this session last, and has
    /// nothing of it pinned now: nearly always. `None` otherwise, and then nothing is pinned. It has no fence where none is
    /// needed for that.
    #[inline(always)]
    pub(crate) fn pin_alone(&self, view: u64) -> Option<PinAlone<'_>> {
        let (id, number) = LAST.get();
        if id != self.id {
            return None;
        }
        let nested = &self.nested.get(number)?.0;
        let slot = self.page.own_slot(number)?;
        if slot.is_pinned() {
            return None;
        }
        slot.enter(view, self.unfenced.get().copied());
        let pin = PinAlone {
            pins: self,
            slot,
            nested,
            number,
            view,
            stays_on_its_thread: PhantomData,
        };
        match self.closed.load(Relaxed) {
            true => None,
            false => Some(pin),
        }
    }

    /// Might pins for leases do without fences, once this process is registered?
    pub(crate) fn may_omit_fences(&self) -> bool {
        self.page.promises_to_ask() && self.unfenced.get().is_none()
    }

    /// From now on pins for leases have no fence, if the daemon leaves the looking to this process.
    pub(crate) fn omit_fences(&self, process: Registered) {
        if let Some(unfenced) = self.page.unfenced(process) {
            let _ = self.unfenced.set(unfenced);
        }
    }

    /// The oldest view that a guard holds.
    pub(crate) fn oldest(&self, barrier: &Barrier) -> Option<u64> {
        self.page.oldest(barrier)
    }

    /// Has the daemon given the session up? Ask after each walk, and use what it found only if this
    /// is `false`.
    #[inline]
    pub(crate) fn is_fenced(&self) -> bool {
        self.page.is_fenced()
    }

    /// How many times leases of the session were taken away. What a thread finds behind a pin is
    /// what counts while it is pinned.
    #[inline]
    pub(crate) fn revocations(&self) -> u64 {
        self.page.revocations()
    }

    /// Is a thread pinned that has a slot of its own? After whatever it must have seen if not, and a
    /// barrier.
    pub(crate) fn is_pinned(&self, slot: usize, _barrier: &Barrier) -> bool {
        self.page.view(slot).is_some()
    }

    /// Resolves when no guard holds a view older than `generation`. At once, mostly: then it does
    /// not yield. Threads that pin newer views are not slowed down by it. Cancel safe.
    ///
    /// Answers the barrier behind which that was seen.
    pub(crate) async fn wait_until_newer(&self, generation: u64) -> Barrier {
        if let Some(barrier) = self.seen_newer(generation) {
            return barrier;
        }
        let start = Instant::now();
        while start.elapsed() < YIELD_FOR {
            tokio::task::yield_now().await;
            if let Some(barrier) = self.seen_newer(generation) {
                return barrier;
            }
        }
        loop {
            let unpinned = self.unpinned.notified();
            self.awaited.fetch_max(generation, Relaxed);
            // One that unpins right now may tell nobody: where a thread unpins there is no fence, because
            // that would cost more than all of it, and what seems held is not worth a barrier.
            if let Some(barrier) = self.seen_newer(generation) {
                return barrier;
            }
            let _ = timeout(LOOK_EVERY, unpinned).await;
        }
    }

    /// Does no guard hold a view older than `generation`? `None` also if no barrier is to be had.
    fn seen_newer(&self, generation: u64) -> Option<Barrier> {
        // What is held is mostly seen to be without a system call.
        if self.page.is_seen_older_than(generation) {
            return None;
        }
        let barrier = Barrier::run_within()?;
        let is_newer = !self.page.holds_older_than(generation, &barrier);
        is_newer.then_some(barrier)
    }

    /// From now on nothing is pinned. Guards that there are stay: after this,
    /// [`Pins::wait_until_newer`] of `u64::MAX` waits for the last of them.
    pub(crate) fn close(&self) {
        // Before the barrier with which the page is looked at, as a pin stands before its fence.
        self.closed.store(true, SeqCst);
    }

    #[inline(always)]
    fn pin_own(&self, slot: usize, view: u64) -> PinGuard<'_> {
        match self.page.view(slot) {
            None => self.page.enter(slot, view),
            Some(_) => {
                let nested = &self.nested[slot].0;
                nested.store(nested.load(Relaxed) + 1, Relaxed);
                // The first one may be there for leases alone, and without a fence: this one walks.
                if self.unfenced.get().is_some() {
                    let _fenced = Barrier::run();
                }
            }
        }
        self.guard(slot)
    }

    /// Not the session that this thread pinned last.
    #[cold]
    fn pin_slowly(self: &Arc<Self>, view: u64) -> PinGuard<'_> {
        match self.own_slot() {
            Some(slot) => self.pin_own(slot, view),
            None => self.pin_in_crowd(view),
        }
    }

    /// The slot that this thread has or can have.
    fn own_slot(self: &Arc<Self>) -> Option<usize> {
        // Where a thread's own values are gone already it is about to end: that is the crowd's.
        let slot = OWN.try_with(|own| own.find(self.id).or_else(|| own.take(self)));
        let slot = slot.ok().flatten()?;
        LAST.set((self.id, slot));
        Some(slot)
    }

    /// A slot that no thread has, if there is one.
    fn free_slot(&self) -> Option<usize> {
        let mut desk = self.desk();
        if let Some(slot) = desk.given_back.pop() {
            return Some(slot);
        }
        let slot = desk.fresh;
        if slot == OWN_SLOTS {
            return None;
        }
        desk.fresh = slot + 1;
        self.announce(&mut desk, slot + 1);
        Some(slot)
    }

    /// A thread ends. If it has left a guard behind, the slot stays its own for ever.
    fn give_back(&self, slot: usize) {
        if self.page.view(slot).is_none() {
            self.desk().given_back.push(slot);
        }
    }

    fn announce(&self, desk: &mut Desk, slots: usize) {
        if desk.announced < slots {
            self.page.announce(slots);
            desk.announced = slots;
        }
    }

    fn pin_in_crowd(&self, view: u64) -> PinGuard<'_> {
        let mut desk = self.desk();
        self.announce(&mut desk, SLOTS);
        let place = desk.join_crowd(view);
        // Also if the oldest view stays: this thread's walk needs the fence.
        let oldest = desk.oldest_of_crowd();
        self.page
            .enter(CROWD_SLOT, oldest.expect("one has just come"));
        self.guard(OWN_SLOTS + place)
    }

    #[cold]
    fn leave_crowd(&self, place: usize) {
        let mut desk = self.desk();
        let view = desk.crowd[place].take();
        match desk.oldest_of_crowd() {
            None => self.page.leave(CROWD_SLOT),
            Some(oldest) => self.page.enter(CROWD_SLOT, oldest),
        }
        drop(desk);
        self.left(view);
    }

    #[inline(always)]
    fn leave_own(&self, slot: usize) {
        let nested = &self.nested[slot].0;
        match nested.load(Relaxed) {
            0 => {
                let view = self.page.view(slot);
                self.page.leave(slot);
                self.left(view);
            }
            others => nested.store(others - 1, Relaxed),
        }
    }

    /// A view is held no more.
    #[inline]
    fn left(&self, view: Option<u64>) {
        let awaited = self.awaited.load(Relaxed);
        if awaited != 0 && view < Some(awaited) {
            self.wake();
        }
    }

    #[cold]
    fn wake(&self) {
        self.awaited.store(0, Relaxed);
        self.unpinned.notify_waiters();
    }

    #[inline]
    fn guard(&self, at: usize) -> PinGuard<'_> {
        PinGuard {
            pins: self,
            at,
            stays_on_its_thread: PhantomData,
        }
    }

    fn desk(&self) -> MutexGuard<'_, Desk> {
        // Nothing panics in the middle of a change.
        self.desk.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// As a [`PinGuard`], where nothing else of its thread is pinned when it is made: it knows what it wrote, and
/// looks nothing up again.
#[derive(Debug)]
#[must_use = "what is found after it is dropped may be anything"]
pub(crate) struct PinAlone<'p> {
    pins: &'p Pins,
    slot: PageSlot<'p>,
    nested: &'p AtomicU32,
    number: usize,
    view: u64,
    stays_on_its_thread: PhantomData<*const ()>,
}

impl PinAlone<'_> {
    /// The slot of its thread.
    #[inline(always)]
    pub(crate) fn slot(&self) -> usize {
        self.number
    }

    /// As [`Pins::is_fenced`].
    #[inline(always)]
    pub(crate) fn is_fenced(&self) -> bool {
        self.slot.is_fenced()
    }

    /// As [`Pins::revocations`].
    #[inline(always)]
    pub(crate) fn revocations(&self) -> u64 {
        self.slot.revocations()
    }
}

impl Drop for PinAlone<'_> {
    #[inline(always)]
    fn drop(&mut self) {
        match self.nested.load(Relaxed) {
            0 => {
                self.slot.leave();
                self.pins.left(Some(self.view));
            }
            // A waker that ran meanwhile has pinned, and kept it.
            others => self.nested.store(others - 1, Relaxed),
        }
    }
}

impl PinGuard<'_> {
    /// The slot of its thread; at least [`OWN_SLOTS`] if that has none of its own.
    #[inline]
    pub(crate) fn slot(&self) -> usize {
        self.at
    }

    /// What it holds is at least as new: its view, or an older one that its thread had pinned
    /// before, or that others share its slot with.
    pub(crate) fn view(&self) -> u64 {
        let view = self.pins.page.view(self.at.min(CROWD_SLOT));
        // Nobody but its threads writes a slot, and they hold this.
        view.unwrap_or(0)
    }
}

impl Desk {
    /// Answers the place that the view has from now on.
    fn join_crowd(&mut self, view: u64) -> usize {
        let free = self.crowd.iter().position(Option::is_none);
        let place = free.unwrap_or(self.crowd.len());
        if free.is_none() {
            self.crowd.push(None);
        }
        self.crowd[place] = Some(view);
        place
    }

    fn oldest_of_crowd(&self) -> Option<u64> {
        self.crowd.iter().flatten().min().copied()
    }
}

impl Drop for PinGuard<'_> {
    #[inline(always)]
    fn drop(&mut self) {
        match self.at.checked_sub(OWN_SLOTS) {
            None => self.pins.leave_own(self.at),
            Some(place) => self.pins.leave_crowd(place),
        }
    }
}

thread_local! {
    /// Which session this thread pinned last, and its slot there: the whole search, mostly.
    static LAST: Cell<(u64, usize)> = const { Cell::new((0, 0)) };
    /// The slots that this thread has.
    static OWN: OwnSlots = const { OwnSlots(RefCell::new(Vec::new())) };
}

/// At most one for each session that lives, and a few of those that have ended.
struct OwnSlots(RefCell<Vec<OwnSlot>>);

/// Given back when the thread ends.
struct OwnSlot {
    slot: usize,
    id: u64,
    /// Gone when the session is.
    pins: Weak<Pins>,
}

impl OwnSlots {
    fn find(&self, id: u64) -> Option<usize> {
        let own = self.0.borrow();
        own.iter().find(|own| own.id == id).map(|own| own.slot)
    }

    /// Also forgets the slots of sessions that have ended.
    fn take(&self, pins: &Arc<Pins>) -> Option<usize> {
        let slot = pins.free_slot()?;
        let mut own = self.0.borrow_mut();
        own.retain(|own| own.pins.strong_count() > 0);
        own.push(OwnSlot {
            slot,
            id: pins.id,
            pins: Arc::downgrade(pins),
        });
        Some(slot)
    }
}

impl Drop for OwnSlot {
    fn drop(&mut self) {
        // Whatever still runs on this thread must not use the slot any more.
        LAST.set((0, 0));
        if let Some(pins) = self.pins.upgrade() {
            pins.give_back(self.slot);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;
    use std::sync::Barrier as StartLine;
    use std::sync::atomic::AtomicUsize;
    use std::sync::mpsc;
    use std::thread;

    use domain_core::iotlb::PageRegion;
    use domain_core::iotlb::page::BYTES;
    use domain_core::region::{Access, SharedMemory};

    use super::*;

    type ServicePage = SessionPage<PageRegion>;

    /// The service's page of a new session, and the session's pins.
    fn session() -> (ServicePage, Arc<Pins>) {
        let service = SessionPage::create("pins-test").unwrap();
        let grant = service.grant().unwrap();
        let mut memory = SharedMemory::reserve(BYTES, BYTES).unwrap();
        memory
            .map_at(0, BYTES, grant.as_fd(), Access::ReadWrite)
            .unwrap();
        let words = memory.into_words(Access::ReadWrite).unwrap();
        let page = SessionPage::open(words).unwrap();
        (service, Pins::new(page))
    }

    fn barrier() -> Barrier {
        Barrier::run_within().unwrap()
    }

    fn slots_ever_used(pins: &Pins) -> usize {
        pins.desk().announced
    }

    /// Runs on a thread that has ended, with all that belongs to it, when this returns.
    fn on_a_thread<T: Send + 'static>(run: impl FnOnce() -> T + Send + 'static) -> T {
        thread::spawn(run).join().unwrap()
    }

    #[test]
    fn the_service_sees_a_view_from_the_pin_to_the_drop() {
        let (service, pins) = session();
        assert_eq!(service.oldest(&barrier()), None);

        let guard = pins.pin(7).unwrap();
        assert_eq!(
            (service.oldest(&barrier()), pins.oldest(&barrier())),
            (Some(7), Some(7))
        );
        assert!(
            service.holds_older_than(8, &barrier()) && !service.holds_older_than(7, &barrier())
        );

        drop(guard);
        assert_eq!(service.oldest(&barrier()), None);
    }

    #[test]
    fn nested_guards_hold_the_oldest_view_until_the_last_is_gone_in_any_order() {
        let (service, pins) = session();
        let outer = pins.pin(3).unwrap();
        let inner = pins.pin(9).unwrap();

        drop(outer);
        assert_eq!(service.oldest(&barrier()), Some(3));
        drop(inner);
        assert_eq!(service.oldest(&barrier()), None);

        let _again = pins.pin(9).unwrap();
        assert_eq!(service.oldest(&barrier()), Some(9));
    }

    #[test]
    fn threads_that_end_give_their_slots_back() {
        let (service, pins) = session();
        for view in 0..200 {
            let pins = Arc::clone(&pins);
            on_a_thread(move || drop(pins.pin(view).unwrap()));
        }
        assert_eq!(slots_ever_used(&pins), 1);
        assert_eq!(service.oldest(&barrier()), None);
    }

    #[test]
    fn threads_that_live_have_slots_of_their_own_and_the_oldest_counts() {
        let (service, pins) = session();
        let _here = pins.pin(20).unwrap();
        thread::scope(|scope| {
            let other = scope.spawn(|| {
                let guard = pins.pin(10).unwrap();
                assert_eq!(service.oldest(&barrier()), Some(10));
                drop(guard);
            });
            other.join().unwrap();
        });
        assert_eq!(slots_ever_used(&pins), 2);
        assert_eq!(service.oldest(&barrier()), Some(20));
    }

    #[test]
    fn two_sessions_in_one_thread_know_nothing_of_each_other() {
        let ((one_page, one), (other_page, other)) = (session(), session());
        let of_one = one.pin(1).unwrap();
        let of_other = other.pin(2).unwrap();
        let nested = one.pin(3).unwrap();
        assert_eq!(
            (one_page.oldest(&barrier()), other_page.oldest(&barrier())),
            (Some(1), Some(2))
        );

        drop(of_one);
        drop(of_other);
        assert_eq!(
            (one_page.oldest(&barrier()), other_page.oldest(&barrier())),
            (Some(1), None)
        );
        drop(nested);
        assert_eq!(one_page.oldest(&barrier()), None);
        assert_eq!((slots_ever_used(&one), slots_ever_used(&other)), (1, 1));
    }

    #[test]
    fn sessions_that_come_and_go_leave_nothing_in_a_thread_that_stays() {
        on_a_thread(|| {
            for view in 0..500 {
                let (service, pins) = session();
                let _guard = pins.pin(view).unwrap();
                assert_eq!(service.oldest(&barrier()), Some(view));
            }
            assert_eq!(OWN.with(|own| own.0.borrow().len()), 1);
        });
    }

    #[test]
    fn a_thread_that_ends_after_a_session_gives_nothing_back() {
        let (_service, pins) = session();
        let left = Arc::downgrade(&pins);
        on_a_thread(move || {
            drop(pins.pin(1).unwrap());
            drop(pins);
        });
        assert_eq!(left.strong_count(), 0);
    }

    /// One guard on each of more threads than there are slots, with views in any order.
    #[test]
    fn a_crowd_shares_the_last_slot_and_its_oldest_view_counts() {
        const CROWD: usize = 5;
        let (service, pins) = session();
        let (pinned, go) = (StartLine::new(OWN_SLOTS + 1), StartLine::new(OWN_SLOTS + 1));
        thread::scope(|scope| {
            for _ in 0..OWN_SLOTS {
                scope.spawn(|| {
                    let _guard = pins.pin(100).unwrap();
                    pinned.wait();
                    go.wait();
                });
            }
            pinned.wait();
            let views: [u64; CROWD] = [30, 10, 40, 10, 20];
            let mut guards: Vec<_> = views.map(|view| (view, pins.pin(view).unwrap())).into();
            assert_eq!(slots_ever_used(&pins), SLOTS);
            for expected in [10, 10, 20, 30, 40] {
                assert_eq!(service.oldest(&barrier()), Some(expected));
                let at = guards.iter().position(|(view, _)| *view == expected);
                drop(guards.swap_remove(at.unwrap()));
            }
            assert_eq!(service.oldest(&barrier()), Some(100));
            go.wait();
        });
        assert_eq!(service.oldest(&barrier()), None);
    }

    #[test]
    fn one_of_the_crowd_gets_a_slot_when_a_thread_has_ended() {
        let (_service, pins) = session();
        let (end, ended) = mpsc::channel::<()>();
        let ended = Arc::new(Mutex::new(ended));
        let started = Arc::new(StartLine::new(OWN_SLOTS + 1));
        let holders: Vec<_> = (0..OWN_SLOTS)
            .map(|_| {
                let (pins, ended) = (Arc::clone(&pins), Arc::clone(&ended));
                let started = Arc::clone(&started);
                thread::spawn(move || {
                    drop(pins.pin(1).unwrap());
                    started.wait();
                    let _ = ended.lock().unwrap().recv();
                })
            })
            .collect();
        started.wait();
        let crowded = pins.pin(2).unwrap();
        assert_eq!(crowded.at, OWN_SLOTS);
        drop(end);
        holders
            .into_iter()
            .for_each(|holder| holder.join().unwrap());

        let own = pins.pin(3).unwrap();

        assert!(own.at < OWN_SLOTS);
        assert_eq!(
            pins.oldest(&barrier()),
            Some(2),
            "the crowd's guard is still there"
        );
    }

    #[test]
    fn what_is_closed_pins_no_more_and_keeps_what_is_pinned() {
        let (service, pins) = session();
        let held = pins.pin(4).unwrap();

        pins.close();

        assert!(pins.pin(5).is_none());
        assert_eq!(service.oldest(&barrier()), Some(4));
        drop(held);
        assert!(pins.pin(6).is_none());
        assert_eq!(service.oldest(&barrier()), None);
    }

    #[test]
    fn pins_for_leases_have_no_fence_once_both_sides_say_so() {
        let (service, pins) = session();
        let Some(process) = Registered::register() else {
            return;
        };
        drop(pins.pin(1).unwrap());
        pins.omit_fences(process);
        assert!(!pins.may_omit_fences() && pins.unfenced.get().is_none());
        service.promise_to_ask();
        assert!(pins.may_omit_fences());

        let before = pins.pin_alone(4).unwrap();
        pins.omit_fences(process);
        assert_eq!(pins.oldest(&barrier()), Some(4));
        drop(before);
        let after = pins.pin_alone(6).unwrap();

        assert_eq!(pins.oldest(&barrier()), Some(6));
        drop(after);
        assert_eq!(pins.oldest(&barrier()), None);
        assert!(!pins.may_omit_fences(), "it is done");
    }

    #[test]
    fn a_pin_alone_is_one_for_a_thread_that_holds_nothing() {
        let (service, pins) = session();
        assert!(pins.pin_alone(1).is_none(), "it has no slot yet");
        drop(pins.pin(1).unwrap());

        let alone = pins.pin_alone(4).unwrap();
        assert_eq!(service.oldest(&barrier()), Some(4));
        assert!(pins.pin_alone(5).is_none(), "not alone");
        let outlives = pins.pin(5).unwrap();
        drop(alone);
        assert_eq!(service.oldest(&barrier()), Some(4), "the older view stays");
        drop(outlives);
        assert_eq!(service.oldest(&barrier()), None);

        pins.close();
        assert!(pins.pin_alone(7).is_none());
        assert_eq!(service.oldest(&barrier()), None);
    }

    #[test]
    fn a_fence_shows() {
        let (service, pins) = session();
        assert!(!pins.is_fenced());
        service.fence(3);
        assert!(pins.is_fenced());
    }

    #[tokio::test]
    async fn who_unpins_an_awaited_view_says_so_and_who_unpins_a_newer_one_does_not() {
        let (_service, pins) = session();
        let old = pins.pin(4).unwrap();
        let waiting = tokio::spawn({
            let pins = Arc::clone(&pins);
            async move { pins.wait_until_newer(5).await }
        });
        while pins.awaited.load(SeqCst) == 0 {
            tokio::task::yield_now().await;
        }

        let newer = Arc::clone(&pins);
        on_a_thread(move || drop(newer.pin(5).unwrap()));
        assert_eq!(pins.awaited.load(SeqCst), 5, "nobody was woken for that");
        drop(old);
        assert_eq!(pins.awaited.load(SeqCst), 0);

        tokio::time::timeout(Duration::from_secs(10), waiting)
            .await
            .expect("it was the last")
            .unwrap();
    }

    #[tokio::test]
    async fn a_wait_ends_with_the_last_older_guard_and_not_before() {
        let (_service, pins) = session();
        let done = Arc::new(AtomicBool::new(false));
        pins.wait_until_newer(u64::MAX).await;
        let old = pins.pin(4).unwrap();
        let waiting = tokio::spawn({
            let (pins, done) = (Arc::clone(&pins), Arc::clone(&done));
            async move {
                pins.wait_until_newer(5).await;
                done.store(true, SeqCst);
            }
        });
        tokio::time::sleep(Duration::from_millis(20)).await;
        assert!(!done.load(SeqCst));

        drop(old);
        let _newer = pins.pin(5).unwrap();

        tokio::time::timeout(Duration::from_secs(10), waiting)
            .await
            .expect("a newer guard does not keep it")
            .unwrap();
    }

    /// As the service does it: what is hidden is used for something else only when nobody holds a
    /// view that could show it. Also where pins for leases have no fence: these do.
    #[test]
    fn nobody_who_is_pinned_sees_memory_that_is_used_for_something_else() {
        for (promises, registers) in [(false, false), (false, true), (true, false), (true, true)] {
            hide_and_use(promises, registers);
        }
    }

    fn hide_and_use(promises: bool, registers: bool) {
        const ROUNDS: u64 = 3000;
        let (service, pins) = session();
        if promises {
            service.promise_to_ask();
        }
        let registered = Registered::register().filter(|_| registers);
        registered
            .into_iter()
            .for_each(|process| pins.omit_fences(process));
        let is_unfenced = pins.unfenced.get().is_some();
        assert_eq!(is_unfenced, promises && registered.is_some());
        let generation = AtomicU64::new(0);
        // Which of the two cells is visible, and whose round a cell belongs to: even, visible; odd,
        // used for something else.
        let (visible, cells) = (AtomicUsize::new(0), [AtomicU64::new(0), AtomicU64::new(1)]);
        let done = AtomicBool::new(false);
        thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| {
                    while !done.load(Relaxed) {
                        let _guard = pins.pin(generation.load(SeqCst)).unwrap();
                        let cell = visible.load(std::sync::atomic::Ordering::Acquire);
                        for _ in 0..10 {
                            assert!(cells[cell].load(Relaxed).is_multiple_of(2));
                        }
                    }
                });
            }
            for round in 1..=ROUNDS {
                let old = visible.load(Relaxed);
                cells[1 - old].store(round * 2, Relaxed);
                visible.store(1 - old, std::sync::atomic::Ordering::Release);
                generation.store(round, SeqCst);
                while service.holds_older_than(round, &Barrier::run()) {
                    thread::yield_now();
                }
                cells[old].store(round * 2 + 1, Relaxed);
            }
            done.store(true, Relaxed);
        });
    }

    /// Compiles while a guard can be sent to no other thread: else there were two ways to choose.
    #[allow(dead_code)]
    fn a_guard_stays_on_its_thread() {
        trait Chosen<Way> {
            fn choose() {}
        }
        struct IfSend;
        impl<T> Chosen<()> for T {}
        impl<T: Send> Chosen<IfSend> for T {}
        <PinGuard<'static> as Chosen<_>>::choose();
    }
}
