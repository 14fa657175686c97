//! Words in shared memory, as cells.
//!
//! A cell stands for one naturally aligned word. There is a cell that can only load and one that
//! can also store; which one is to be had is decided when it is made, so that a store to a
//! read-only page cannot be written.

use std::fmt;
use std::io;
use std::ops::Deref;
use std::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, Ordering, fence};
use std::time::Duration;

use rustix::io::Errno;
use rustix::thread::futex;

macro_rules! shared_word {
    ($read:ident, $write:ident, $atomic:ty, $int:ty, $bits:literal) => {
        #[doc = concat!("A ", $bits, "-bit word in shared memory that can be loaded.")]
        ///
        /// Native byte order. Another process may change it between any two loads.
        #[derive(Clone, Copy)]
        pub struct $read<'a>(&'a $atomic);

        impl<'a> $read<'a> {
            #[inline]
            pub(super) fn new(word: &'a $atomic) -> Self {
                $read(word)
            }

            /// The word's present value.
            ///
            /// # Panics
            ///
            /// When `order` is `Release` or `AcqRel`, which no load can have.
            #[inline]
            pub fn load(&self, order: Ordering) -> $int {
                // The page may be mapped read-only. There only relaxed loads are promised to be
                // plain loads (see `std::sync::atomic`, "Atomic accesses to read-only memory");
                // fences supply the rest.
                if order == Ordering::SeqCst {
                    fence(Ordering::SeqCst);
                }
                let value = self.0.load(Ordering::Relaxed);
                match order {
                    Ordering::Relaxed => {}
                    Ordering::Acquire | Ordering::SeqCst => fence(Ordering::Acquire),
                    _ => panic!("a load cannot have release semantics"),
                }
                value
            }
        }

        /// Says nothing of the value: it may be a client's data.
        impl fmt::Debug for $read<'_> {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.debug_struct(stringify!($read)).finish_non_exhaustive()
            }
        }

        #[doc = concat!("A ", $bits, "-bit word in shared memory that can be loaded and stored.")]
        #[derive(Clone, Copy, Debug)]
        pub struct $write<'a>($read<'a>);

        impl<'a> $write<'a> {
            /// The page under `word` must be mapped read-write.
            #[inline]
            pub(super) fn new(word: &'a $atomic) -> Self {
                $write($read(word))
            }

            /// Replaces the word.
            ///
            /// # Panics
            ///
            /// When `order` is `Acquire` or `AcqRel`, which no store can have.
            #[inline]
            pub fn store(&self, value: $int, order: Ordering) {
                self.0.0.store(value, order);
            }

            /// Replaces the word and returns what it was.
            pub fn swap(&self, value: $int, order: Ordering) -> $int {
                self.0.0.swap(value, order)
            }

            /// Adds, wrapping around, and returns what the word was.
            pub fn fetch_add(&self, value: $int, order: Ordering) -> $int {
                self.0.0.fetch_add(value, order)
            }

            /// Stores `new` if the word is `current`. Returns what the word was: `Ok` if it was
            /// `current`.
            ///
            /// # Errors
            ///
            /// The value found, when it was not `current`. Nothing was stored.
            ///
            /// # Panics
            ///
            /// When `failure` is `Release` or `AcqRel`.
            pub fn compare_exchange(
                &self,
                current: $int,
                new: $int,
                success: Ordering,
                failure: Ordering,
            ) -> Result<$int, $int> {
                self.0.0.compare_exchange(current, new, success, failure)
            }
        }

        impl<'a> Deref for $write<'a> {
            type Target = $read<'a>;

            fn deref(&self) -> &$read<'a> {
                &self.0
            }
        }
    };
}

shared_word!(SharedU16, SharedU16Mut, AtomicU16, u16, "16");
shared_word!(SharedU32, SharedU32Mut, AtomicU32, u32, "32");
shared_word!(SharedU64, SharedU64Mut, AtomicU64, u64, "64");

/// How a [`SharedU32::wait`] ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WaitOutcome {
    /// Somebody woke us, or nobody did (a signal): look at the word again.
    Woken,
    /// The word was not `expected` to begin with.
    Changed,
    /// The timeout ran out first.
    TimedOut,
}

impl SharedU32<'_> {
    /// Sleeps while the word is `expected`, until a wake, a signal or the timeout (`None`: for
    /// ever).
    ///
    /// Works between processes and between mappings: the futex belongs to the place in the memfd,
    /// not to the address. Whoever may write there may also wake, or never wake, so a waiter on a
    /// peer's word wants a timeout.
    ///
    /// # Errors
    ///
    /// What the kernel answers, when it is none of the outcomes.
    pub fn wait(&self, expected: u32, timeout: Option<Duration>) -> io::Result<WaitOutcome> {
        // Too long for the kernel's type is longer than any uptime.
        let timeout = timeout.and_then(|timeout| futex::Timespec::try_from(timeout).ok());
        // No PRIVATE flag: that would key the futex by address and never meet another mapping.
        match futex::wait(self.0, futex::Flags::empty(), expected, timeout.as_ref()) {
            Ok(()) | Err(Errno::INTR) => Ok(WaitOutcome::Woken),
            Err(Errno::AGAIN) => Ok(WaitOutcome::Changed),
            Err(Errno::TIMEDOUT) => Ok(WaitOutcome::TimedOut),
            Err(errno) => Err(errno.into()),
        }
    }
}

impl SharedU32Mut<'_> {
    /// Wakes at most `count` waiters on this word, in any process, and returns how many there were.
    ///
    /// Change the word first: a waiter that is woken and finds it unchanged goes back to sleep.
    ///
    /// # Errors
    ///
    /// What the kernel answers.
    pub fn wake(&self, count: u32) -> io::Result<usize> {
        // The kernel reads the count as a signed number.
        let count = count.min(i32::MAX.unsigned_abs());
        Ok(futex::wake(self.0.0, futex::Flags::empty(), count)?)
    }
}
