//! Fences on one side only: who looks at pins pays for all who pin.
//!
//! A pin needs that its store comes before the loads behind it, and who looks needs that its own stores
//! come before its look ([`page`](super::page)). With a `SeqCst` fence on either side that is so; but pins are
//! made a million times for one look, and the fence costs more than all the rest of a pin. Linux can fence for
//! others: `membarrier` with GLOBAL_EXPEDITED makes every running thread of every process that has
//! registered pass a full barrier, and a thread that is not running has passed one when it was stopped.
//! So where both sides agree on it ([`Unfenced`]), a reader only keeps its compiler from reordering, and
//! who looks calls the kernel once before ([`Barrier`]).
//!
//! # It is off
//!
//! [`RELIED_ON`] is false: [`Barrier::run`] is a fence, nobody promises or registers anything, and every pin has its
//! fence. The argument below is right about what the kernel promises, and Linux 6.18 was seen not to keep it:
//! `tests/barrier.rs` failed once in twenty runs (39 of 10^6 rounds missed by both sides, on a loaded machine), and
//! `ci/membarrier-trial.c` shows it at will, where readers with fences and PRIVATE_EXPEDITED never miss. Which race in the
//! kernel it is has not been found. A miss is memory that is used again under somebody who holds it.
//!
//! # Why it is enough
//!
//! Let the barrier be at one place of the reader's instructions: the one at which its processor took it. If the
//! pin's store lies before, the look finds it. If it lies behind, then so do the loads after it, and they find all
//! that was stored before the barrier was called for. That is what two fences give, at every moment that counts.
//!
//! # Beginning to omit fences
//!
//! A process may begin at any moment after its registration has returned, each thread for itself, as soon as it has
//! loaded, with acquire, that it has. Of a call of `membarrier` the kernel says that it either reaches a processor on which
//! the process runs, or has found it, behind a full barrier, not registered. In the second case registration
//! put its mark there later, and has itself passed full barriers before it returned: what was stored before
//! the call is then visible to whoever knows that registration has returned, fence or no fence. What
//! nobody may do is look with a fence of his own where some thread might omit its: so [`Barrier::run`]
//! calls the kernel wherever it can, whether or not anybody is registered.
//!
//! # Where it does not work
//!
//! On kernels before 4.16, and behind a filter of system calls that forbids it, [`Barrier::run`] is a
//! fence and nobody promises or registers anything: both sides have their fences, as ever. If only one side has
//! it, readers fence. A call that fails although the first one did not (memory is short) is no barrier: then nothing is
//! known of any pin, and whoever asked takes it for held.

use std::sync::OnceLock;
#[cfg(not(all(loom, test)))]
use std::sync::atomic::fence;
use std::sync::atomic::{Ordering::SeqCst, compiler_fence};

#[cfg(all(loom, test))]
use ::loom::sync::atomic::fence;

use rustix::thread::{MembarrierCommand, membarrier, membarrier_query};

/// May pins do without fences where the kernel says that it fences for them? Not while `ci/membarrier-trial.c`
/// finds misses.
pub const RELIED_ON: bool = false;

/// What this process stored before is visible to every pin that a look from now on does not find.
///
/// To be had only by [`Barrier::run`], after the stores that it is for, and good for looks at as many pages as
/// one likes; not for another removal.
#[derive(Debug)]
pub struct Barrier(());

impl Barrier {
    /// Orders this thread, and all threads that omit their fences. A system call of a microsecond or two, where the
    /// kernel has it.
    ///
    /// `None` if it should have worked and did not: whatever is looked at may be held.
    #[must_use]
    pub fn run() -> Option<Barrier> {
        #[cfg(test)]
        if trial::fails() {
            return None;
        }
        if !Barrier::reaches_others() {
            fence(SeqCst);
            return Some(Barrier(()));
        }
        membarrier(MembarrierCommand::GlobalExpedited).ok()?;
        // The call is a full barrier for the kernel; the compiler, and whatever models this, see one here.
        fence(SeqCst);
        Some(Barrier(()))
    }

    /// Does it order threads that have no fence of their own? The same answer for as long as the process lives.
    #[must_use]
    pub fn reaches_others() -> bool {
        static REACHES: OnceLock<bool> = OnceLock::new();
        // Models have fences.
        RELIED_ON && !cfg!(loom) && *REACHES.get_or_init(probe)
    }
}

fn probe() -> bool {
    let run = MembarrierCommand::GlobalExpedited;
    let register = MembarrierCommand::RegisterGlobalExpedited;
    let known = membarrier_query();
    known.contains_command(run) && known.contains_command(register) && membarrier(run).is_ok()
}

/// This process has asked the kernel to be reached by the barriers of others.
#[derive(Clone, Copy, Debug)]
pub struct Registered(());

static REGISTERED: OnceLock<Option<Registered>> = OnceLock::new();

impl Registered {
    /// Was that done already? Without a wait.
    #[must_use]
    pub fn already() -> Option<Registered> {
        *REGISTERED.get()?
    }

    /// Registers, once for the process; `None` where that does not work, now or later. A process of several threads waits
    /// for all processors, which takes milliseconds.
    pub fn register() -> Option<Registered> {
        *REGISTERED.get_or_init(|| {
            let register = MembarrierCommand::RegisterGlobalExpedited;
            let works = Barrier::reaches_others() && membarrier(register).is_ok();
            works.then_some(Registered(()))
        })
    }
}

/// Whoever looks at this page runs a [`Barrier`] that reaches this process: pins need no fence.
///
/// To be had from [`SessionPage::unfenced`](super::SessionPage::unfenced).
#[derive(Clone, Copy, Debug)]
pub struct Unfenced(pub(super) ());

impl Unfenced {
    /// Stands where the fence would, and keeps the compiler's order.
    #[inline(always)]
    pub(super) fn fence(self) {
        compiler_fence(SeqCst);
    }
}

/// What tests see and change of barriers on their own thread.
#[cfg(test)]
pub(crate) mod trial {
    use std::cell::Cell;

    thread_local! {
        static RUNS: Cell<usize> = const { Cell::new(0) };
        static FAILS: Cell<bool> = const { Cell::new(false) };
    }

    /// How many were run.
    pub(crate) fn runs() -> usize {
        RUNS.get()
    }

    /// From now on the kernel has no memory for one, or has again.
    pub(crate) fn fail(fails: bool) {
        FAILS.set(fails);
    }

    pub(super) fn fails() -> bool {
        RUNS.set(RUNS.get() + 1);
        FAILS.get()
    }
}
