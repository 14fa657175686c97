//! Fences on one side only: who looks at pins pays for all who pin.
//!
//! A pin needs that its store comes before the loads behind it, and who looks needs that its own stores
//! come before its look ([`page`](super::page)). With a `SeqCst` fence on either side that is so. But a driver pins
//! for each buffer that it bounces in its leases, and there the fence costs more than all the rest. Linux can fence for
//! the other threads of a process: `membarrier` with PRIVATE_EXPEDITED makes every thread of it that runs pass a full
//! barrier, and one that does not run has passed one when it was stopped. So where only its own process looks, a
//! pin may keep its compiler from reordering and no more ([`Unfenced`]), and who looks calls the kernel
//! ([`Barrier::run_within`]).
//!
//! # Whose pins only their own process looks at
//!
//! Those that are there for leased memory alone ([`SessionPage::unfenced`](super::SessionPage::unfenced)). It is
//! the daemon's to look at pins when it removes something; what it may then miss is harmless, because a lease
//! goes only when its own process gives it back, when its session ends (and then nothing of that is used again before the
//! process is gone), or when a reset takes it away. That is rare. So the daemon does not look then:
//! it asks by a frame, whatever is pinned, and has said so before (word 4). The process hears that behind the new count of
//! word 3, and looks at its own pins behind its own barrier: it finds a pin that was made before, and who pins later finds
//! the new count.
//!
//! # Why it is enough
//!
//! Let the barrier be at one place of the pinning thread's instructions: the one at which its processor took it. If the
//! pin's store lies before, the look finds it. If it lies behind, then so do the loads after it, and they find all
//! that was stored before the barrier was called for. That is what two fences give, at every moment that counts.
//! A thread omits its fence when it has loaded, with acquire, that its process has registered. Who was told by the kernel that
//! it has not ([`Errno::PERM`]) stands, behind a fence of its own, before the registration, and so before all of that.
//! Models with loom have fences on both sides, which is what the barrier is to a thread at the moment at which it runs;
//! that the kernel does what it says they cannot see: `tests/barrier.rs` plays it on real processors.
//!
//! # Why not for all pins
//!
//! The daemon would need GLOBAL_EXPEDITED, which is said to reach every process that has registered. Linux 6.18 was seen not to
//! keep it: Dekker's game was lost once in twenty runs, and `ci/membarrier-trial.c` shows it at will, where
//! PRIVATE_EXPEDITED never misses. A miss would be memory that is used again under somebody who holds it.
//!
//! # Where it does not work
//!
//! On kernels before 4.14, and behind a filter of system calls that forbids it, nobody is registered and both sides have
//! their fences, as ever. A call that fails although the process is registered (memory is short) is no barrier: nothing is
//! known of any pin then, and whoever asked takes it for held.

use std::sync::OnceLock;
#[cfg(not(all(loom, test)))]
use std::sync::atomic::fence;
use std::sync::atomic::{Ordering::SeqCst, compiler_fence};

#[cfg(all(loom, test))]
use ::loom::sync::atomic::fence;

use rustix::io::Errno;
use rustix::thread::{MembarrierCommand, membarrier, membarrier_query};

/// What this thread stored before is visible to every pin that a look from now on does not find.
///
/// To be had only by running one, after the stores that it is for, and good for looks at as many pages as
/// one likes; not for another removal.
#[derive(Debug)]
pub struct Barrier(());

impl Barrier {
    /// Orders this thread against all who pin with a fence.
    #[must_use]
    pub fn run() -> Barrier {
        fence(SeqCst);
        Barrier(())
    }

    /// Orders this thread against all who pin in this process, with a fence or without one. A system call of a microsecond
    /// or less, where the kernel has it.
    ///
    /// `None` if it should have worked and did not: whatever is looked at may be held.
    #[must_use]
    pub fn run_within() -> Option<Barrier> {
        let barrier = Barrier::run();
        if !is_supported() {
            return Some(barrier);
        }
        match membarrier(MembarrierCommand::PrivateExpedited) {
            // Nobody has registered: everybody fences, and will see what stands before our fence.
            Ok(()) | Err(Errno::PERM) => Some(Barrier::run()),
            Err(_) => None,
        }
    }
}

/// The same answer for as long as the process lives.
fn is_supported() -> bool {
    static SUPPORTED: OnceLock<bool> = OnceLock::new();
    let probe = || {
        let known = membarrier_query();
        known.contains_command(MembarrierCommand::PrivateExpedited)
            && known.contains_command(MembarrierCommand::RegisterPrivateExpedited)
    };
    // Models have fences.
    !cfg!(loom) && *SUPPORTED.get_or_init(probe)
}

/// This process has asked the kernel to be reached by its own barriers.
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
            let register = MembarrierCommand::RegisterPrivateExpedited;
            let works = is_supported() && membarrier(register).is_ok();
            works.then_some(Registered(()))
        })
    }
}

/// Pins of this process for leased memory need no fence.
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
