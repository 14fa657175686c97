//! Shared memory: memfds made, sealed, checked and mapped.
//!
//! Everything here counts in bytes and knows nothing of iovas, domains or sessions. There are four
//! ways in:
//!
//! * [`Region`] is memory that the daemon owns and gives to clients, as [`Grant`]s.
//! * [`SparseRegion`] is memory that the daemon alone writes, as an array of words, and that gets
//!   its pages as it is filled.
//! * [`ClientMemory`] is memory that a client owns and has registered. The daemon checks it and
//!   copies from and to it with system calls; it never maps it. [`driver_memfd`] makes a memfd that
//!   passes the check.
//! * [`SharedMemory`] is a run of addresses into which one or more memfds are mapped: the daemon's
//!   own view of a region, and a client's view of a whole aperture.
//!
//! # What holds for shared pages
//!
//! Another process may write to them at any instant, and it may be hostile. So no reference to them
//! ever leaves this module: bytes are copied ([`SharedMemory::copy_out`] and its siblings), words
//! are loaded and stored through cells ([`SharedU16`], [`SharedU32`], [`SharedU64`]). What is copied out is copied
//! once, and only then looked at.
//!
//! They never vanish under us: only a file that is sealed against shrinking and is long enough is
//! mapped. One gap stays: whoever may write to a hugetlb memfd may also punch a hole into it, and
//! if the pool of huge pages is dry at the next touch, that touch is a SIGBUS (an ordinary memfd
//! just gets a new page). Grant hugetlb regions read-write only to those you trust with the life of
//! every process that maps them.

#[cfg(not(all(target_os = "linux", target_pointer_width = "64")))]
compile_error!(
    "shared memory needs 64-bit Linux: memfd seals, futexes, and apertures larger than 4 GiB"
);

mod client_memory;
mod facts;
mod mapping;
mod mark;
mod memfd;
mod owned;
mod pieces;
mod seals;
mod sparse;
mod word;

pub use client_memory::{ClientMemory, MemoryRefused, ShareError, SharedFile, SpanError};
pub use mapping::{
    CopyError, MapError, SharedCell, SharedCellsMut, SharedMemory, SharedSlice, SharedWords,
    Window, Windows,
};
pub use memfd::{Backing, RegionError, driver_memfd};
pub use owned::{FileIdentity, Grant, Region};
pub use pieces::{Access, AccessError, Piece};
pub use seals::Seals;
pub use sparse::SparseRegion;
pub use word::{
    SharedU16, SharedU16Mut, SharedU32, SharedU32Mut, SharedU64, SharedU64Mut, WaitOutcome,
};
