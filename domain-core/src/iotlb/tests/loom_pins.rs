//! Memory is used again when no reader can reach it, and not before: one writer and two readers, in
//! every order and with every value that a weak memory may show.
//!
//! All models here but one are exhaustive: no bound on preemptions. What they are worth is shown by
//! the models that must fail: each has one bug, and the same code without it passes.
//!
//! Loom takes a `SeqCst` fence for more than C++ does: it also synchronizes with the next one. That
//! could hide a bug, and hides none of those below; that real fences are enough is argued in `page`.
//!
//! A reader here always has its fence. Where it omits it, the service's `membarrier` makes it pass one
//! at some place of its instructions, which is not one of loom's steps: for it, nothing is there. What these models say of
//! such a reader is that a fence between its store and its loads is enough. That a barrier which the
//! other side runs is as good, and works on this machine, is argued in `barrier` and tried by `tests/barrier.rs`, with
//! processors instead of models.

use std::sync::atomic::Ordering::{Acquire, Relaxed, Release, SeqCst};
use std::sync::{Arc, Mutex};

use ::loom::cell::UnsafeCell;
use ::loom::sync::atomic::{AtomicU64, fence};
use ::loom::thread;

use super::loom::{LoomWords, iotlb, own, slot_at};
use super::*;
use crate::iotlb::page::slot_word;

/// The granule of which everything here is about, and one that is always mapped: so the table
/// stays as high as it is, and the models small.
const GRANULE: u32 = 5;
const OTHER: u32 = 6;

/// What is done otherwise than it must be.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Bug {
    None,
    /// Nothing stands between the store of a pin and the walk.
    PinWithoutFence,
    /// The store of a pin does not release.
    PinRelaxed,
    /// The store that ends a pin does not release.
    UnpinRelaxed,
    /// The writer looks at the slots without a fence.
    LookWithoutFence,
    /// What is acknowledged is what is known, not what is held.
    AckTheNewest,
    /// The memory is used again at once.
    ReuseAtOnce,
    /// The fence word is looked at before the walk, and not after it.
    FenceBeforeWalk,
    /// A session is fenced after what it must not see is there.
    FenceTooLate,
    /// A lease's owner reads the count of revocations before it pins.
    RevocationsBeforePin,
    /// The service counts a revocation after it has published that the lease is hidden.
    RevokeAfterHiding,
    /// The service counts a revocation after it has looked at the slots.
    RevokeTooLate,
}

type Page = SessionPage<LoomWords>;

/// The memory behind [`GRANULE`]. Loom panics if two threads touch it without an order between
/// them. The lock is there because no cell can be shared without: it is std's, of which loom sees
/// nothing, and so orders nothing.
struct Memory(Mutex<UnsafeCell<()>>);

impl Memory {
    fn touch(&self) {
        self.0.lock().unwrap().with(|_| ());
    }

    fn use_for_something_else(&self) {
        self.0.lock().unwrap().with_mut(|_| ());
    }
}

/// What one session's threads have, and the service has too.
struct Shared {
    page: Page,
    memory: Memory,
}

impl Shared {
    fn new(slots: usize) -> Arc<Shared> {
        let page = SessionPage::format(LoomWords::new(page::WORDS));
        page.announce(slots);
        Arc::new(Shared {
            page,
            memory: Memory(Mutex::new(UnsafeCell::new(()))),
        })
    }

    /// Pins, walks, and touches what it has found.
    fn read(&self, walker: &Walker<Arc<LoomWords>>, slot: usize, bug: Bug) {
        self.pin(slot, walker.generation(), bug);
        self.walk(walker, bug);
        self.unpin(slot, bug);
    }

    fn walk(&self, walker: &Walker<Arc<LoomWords>>, bug: Bug) {
        let fenced_before = bug == Bug::FenceBeforeWalk && self.page.is_fenced();
        let found = slot_at(walker, GRANULE);
        let fenced = match bug {
            Bug::FenceBeforeWalk => fenced_before,
            _ => self.page.is_fenced(),
        };
        if found.is_some() && !fenced {
            self.memory.touch();
        }
    }

    fn pin(&self, slot: usize, view: u64, bug: Bug) {
        let store = |order| self.page.words().store(slot_word(slot), view + 1, order);
        match bug {
            Bug::PinWithoutFence => store(Release),
            Bug::PinRelaxed => {
                store(Relaxed);
                fence(SeqCst);
            }
            _ => self.page.enter(slot, view),
        }
    }

    fn unpin(&self, slot: usize, bug: Bug) {
        match bug {
            Bug::UnpinRelaxed => self.page.words().store(slot_word(slot), 0, Relaxed),
            _ => self.page.leave(slot),
        }
    }

    /// Is what was removed as `generation` nobody's any more, as the page has it?
    fn is_acked(&self, generation: u64, bug: Bug) -> bool {
        match bug {
            Bug::ReuseAtOnce => true,
            Bug::LookWithoutFence => (0..page::SLOTS).all(|slot| {
                let value = self.page.words().words()[slot_word(slot)].load(Acquire);
                value == 0 || value > generation
            }),
            _ => !self.page.holds_older_than(generation, &Barrier::run()),
        }
    }
}

/// A table with both granules.
fn mapped() -> Iotlb<LoomWords> {
    let mut iotlb = iotlb(1);
    iotlb.insert_all(&[own(GRANULE), own(OTHER)]).unwrap();
    iotlb
}

fn exhaustive(run: impl Fn() + Send + Sync + 'static) {
    ::loom::model::Builder::new().check(run);
}

/// The writer hides the granule, publishes that, looks at the page, and uses the memory again if
/// nobody holds it. Each reader pins so many times.
fn pinned(readers: usize, times: usize, bug: Bug) {
    exhaustive(move || {
        let mut iotlb = mapped();
        let shared = Shared::new(readers);
        let readers: Vec<_> = (0..readers)
            .map(|slot| {
                let (shared, walker) = (Arc::clone(&shared), iotlb.walker());
                thread::spawn(move || {
                    for _ in 0..times {
                        shared.read(&walker, slot, bug);
                    }
                })
            })
            .collect();
        iotlb.remove(own(GRANULE).range.start()).unwrap();
        if shared.is_acked(iotlb.generation(), bug) {
            shared.memory.use_for_something_else();
        }
        readers
            .into_iter()
            .for_each(|reader| reader.join().unwrap());
    });
}

#[test]
fn memory_is_used_again_only_when_no_slot_holds_an_older_view() {
    pinned(2, 1, Bug::None);
}

#[test]
fn a_slot_that_is_never_seen_empty_says_that_its_older_view_is_gone() {
    pinned(1, 2, Bug::None);
}

#[test]
#[should_panic(expected = "Causality violation: Concurrent read and write accesses")]
fn found_a_walk_that_overtakes_its_pin() {
    pinned(2, 1, Bug::PinWithoutFence);
}

#[test]
#[should_panic(expected = "Causality violation: Concurrent read and write accesses")]
fn found_a_look_that_overtakes_the_removal() {
    pinned(2, 1, Bug::LookWithoutFence);
}

#[test]
#[should_panic(expected = "Causality violation: Concurrent read and write accesses")]
fn found_an_unpin_that_overtakes_what_was_pinned() {
    pinned(2, 1, Bug::UnpinRelaxed);
}

#[test]
#[should_panic(expected = "Causality violation: Concurrent read and write accesses")]
fn found_a_next_pin_that_overtakes_what_was_pinned_before() {
    pinned(1, 2, Bug::PinRelaxed);
}

#[test]
#[should_panic(expected = "Causality violation: Concurrent read and write accesses")]
fn found_memory_that_is_used_again_before_the_acknowledgment() {
    pinned(2, 1, Bug::ReuseAtOnce);
}

/// The mark of used slots is as good as a slot: what is announced before the pin is seen with it.
#[test]
fn a_slot_that_was_announced_just_before_the_pin_is_looked_at() {
    exhaustive(|| {
        let mut iotlb = mapped();
        let shared = Shared::new(0);
        let reader = {
            let (shared, walker) = (Arc::clone(&shared), iotlb.walker());
            thread::spawn(move || {
                shared.page.announce(1);
                shared.read(&walker, 0, Bug::None);
            })
        };
        iotlb.remove(own(GRANULE).range.start()).unwrap();
        if shared.is_acked(iotlb.generation(), Bug::None) {
            shared.memory.use_for_something_else();
        }
        reader.join().unwrap();
    });
}

/// What is known, but for what is held.
fn ack(page: &Page, walker: &Walker<Arc<LoomWords>>, bug: Bug) -> u64 {
    // The newest first: the other way round, a view that was pinned between the two would be
    // passed over.
    let newest = walker.generation();
    let held = match bug {
        Bug::AckTheNewest => None,
        _ => page.oldest(&Barrier::run()),
    };
    held.map_or(newest, |held| held.min(newest))
}

/// Who acknowledges for a session.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Receiver {
    /// A thread that does nothing else.
    OwnThread,
    /// The last reader, before it reads.
    Reader,
}

/// A session whose page the service does not look at: it acknowledges with a frame, for which
/// `acked` stands.
fn asked(readers: usize, receiver: Receiver, bound: Option<usize>, bug: Bug) {
    let mut builder = ::loom::model::Builder::new();
    builder.preemption_bound = bound;
    builder.check(move || {
        let mut iotlb = mapped();
        let shared = Shared::new(readers);
        let acked = Arc::new(AtomicU64::new(0));
        let spawn = |reads: Option<usize>, acks: bool| {
            let (shared, walker) = (Arc::clone(&shared), iotlb.walker());
            let acked = Arc::clone(&acked);
            thread::spawn(move || {
                if acks {
                    acked.store(ack(&shared.page, &walker, bug), Release);
                }
                if let Some(slot) = reads {
                    shared.read(&walker, slot, bug);
                }
            })
        };
        let is_last = |slot| slot + 1 == readers;
        let mut threads: Vec<_> = (0..readers)
            .map(|slot| spawn(Some(slot), receiver == Receiver::Reader && is_last(slot)))
            .collect();
        threads.extend((receiver == Receiver::OwnThread).then(|| spawn(None, true)));
        iotlb.remove(own(GRANULE).range.start()).unwrap();
        if acked.load(Acquire) >= iotlb.generation() {
            shared.memory.use_for_something_else();
        }
        for thread in threads {
            thread.join().unwrap();
        }
    });
}

#[test]
fn an_ack_that_names_the_held_view_lets_memory_be_used_again_in_time() {
    asked(1, Receiver::OwnThread, None, Bug::None);
}

#[test]
fn an_ack_of_one_thread_speaks_for_the_other_and_for_what_it_reads_itself_then() {
    asked(2, Receiver::Reader, None, Bug::None);
}

/// Four threads: all orders would take hours, so no more than two preemptions.
#[test]
fn an_ack_speaks_for_two_readers() {
    asked(2, Receiver::OwnThread, Some(2), Bug::None);
}

#[test]
#[should_panic(expected = "Causality violation: Concurrent read and write accesses")]
fn found_an_ack_that_names_the_newest_view() {
    asked(2, Receiver::OwnThread, Some(2), Bug::AckTheNewest);
}

/// The session is fenced. What becomes visible after that is used again without asking it.
fn fenced(bug: Bug) {
    exhaustive(move || {
        let mut iotlb = iotlb(1);
        iotlb.insert(own(OTHER)).unwrap();
        let shared = Shared::new(2);
        let readers = [(), ()].map(|()| {
            let (shared, walker) = (Arc::clone(&shared), iotlb.walker());
            // Without a pin, whose fence could only help.
            thread::spawn(move || shared.walk(&walker, bug))
        });
        if bug != Bug::FenceTooLate {
            shared.page.fence(iotlb.generation());
        }
        iotlb.insert(own(GRANULE)).unwrap();
        if bug == Bug::FenceTooLate {
            shared.page.fence(iotlb.generation());
        }
        iotlb.remove(own(GRANULE).range.start()).unwrap();
        shared.memory.use_for_something_else();
        for reader in readers {
            reader.join().unwrap();
        }
    });
}

#[test]
fn a_fenced_reader_never_touches_what_was_made_after_its_fence() {
    fenced(Bug::None);
}

#[test]
#[should_panic(expected = "Causality violation: Concurrent read and write accesses")]
fn found_a_fence_word_that_is_looked_at_before_the_walk() {
    fenced(Bug::FenceBeforeWalk);
}

#[test]
#[should_panic(expected = "Causality violation: Concurrent read and write accesses")]
fn found_a_fence_that_comes_too_late() {
    fenced(Bug::FenceTooLate);
}

/// A lease is taken away. Its owner does not walk: it pins, reads the count of revocations, and writes
/// if that is what it was when it was given the lease. The revocation is counted, the entry hidden, and
/// the memory used again if no slot holds an older view.
fn leased(times: usize, bug: Bug) {
    exhaustive(move || {
        let mut iotlb = mapped();
        let shared = Shared::new(1);
        let given = shared.page.revocations();
        let owner = {
            let (shared, walker) = (Arc::clone(&shared), iotlb.walker());
            thread::spawn(move || {
                for _ in 0..times {
                    shared.write_leased(&walker, given, bug);
                }
            })
        };
        let is_late = matches!(bug, Bug::RevokeAfterHiding | Bug::RevokeTooLate);
        if !is_late {
            shared.page.revoke();
        }
        iotlb.remove(own(GRANULE).range.start()).unwrap();
        if bug == Bug::RevokeAfterHiding {
            shared.page.revoke();
        }
        let is_acked = shared.is_acked(iotlb.generation(), bug);
        if bug == Bug::RevokeTooLate {
            shared.page.revoke();
        }
        if is_acked {
            shared.memory.use_for_something_else();
        }
        owner.join().unwrap();
    });
}

impl Shared {
    fn write_leased(&self, walker: &Walker<Arc<LoomWords>>, given: u64, bug: Bug) {
        let before = (bug == Bug::RevocationsBeforePin).then(|| self.page.revocations());
        self.pin(0, walker.generation(), bug);
        let revocations = before.unwrap_or_else(|| self.page.revocations());
        if revocations == given {
            self.memory.touch();
        }
        self.unpin(0, bug);
    }
}

#[test]
fn a_lease_is_used_again_only_when_its_owner_is_gone_from_it_or_sees_that_it_is_revoked() {
    leased(1, Bug::None);
}

#[test]
fn an_owner_that_pins_again_and_again_sees_that_its_lease_is_revoked() {
    leased(2, Bug::None);
}

#[test]
#[should_panic(expected = "Causality violation: Concurrent read and write accesses")]
fn found_a_count_of_revocations_that_is_read_before_the_pin() {
    leased(1, Bug::RevocationsBeforePin);
}

#[test]
#[should_panic(expected = "Causality violation: Concurrent read and write accesses")]
fn found_a_revocation_that_comes_after_the_look_at_the_slots() {
    leased(1, Bug::RevokeTooLate);
}

/// An owner that pins the new view is not waited for, and would not see the word.
#[test]
#[should_panic(expected = "Causality violation: Concurrent read and write accesses")]
fn found_a_revocation_that_comes_after_the_lease_is_hidden() {
    leased(1, Bug::RevokeAfterHiding);
}

#[test]
#[should_panic(expected = "Causality violation: Concurrent read and write accesses")]
fn found_an_owner_whose_pin_has_no_fence() {
    leased(1, Bug::PinWithoutFence);
}
