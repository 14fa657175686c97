//! Memfds mapped into this process. The home of unsafe code in this crate.
//!
//! Safe code would not do: mapping is a system call on raw addresses, and what is mapped may be
//! written by another process at any instant, which a Rust reference forbids. vm-memory would do
//! most of it, but neither reserves addresses first nor checks seals.
//!
//! # Races
//!
//! Bytes are copied with plain, non-atomic accesses through raw pointers, as vm-memory does. If a
//! peer writes to the same bytes meanwhile, the copy holds a mixture. That is all: the language's
//! memory model knows no other process, nothing here decides anything by the bytes it copies, and
//! no length or offset ever comes from shared pages. Two threads of *this* process must not copy to
//! the same bytes at the same time; the callers see to it by giving every range one owner at a time
//! (a mapping in transit belongs to the request that moves it).
#![allow(unsafe_code)] // mmap, copies through raw pointers, atomics over mapped pages

use std::ffi::c_void;
use std::fmt;
use std::io;
use std::marker::PhantomData;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU16, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use rustix::fs::{OFlags, fcntl_getfl};
use rustix::mm::{MapFlags, ProtFlags, mmap, mmap_anonymous, munmap};

use super::facts::{InspectError, MemfdFacts, inspect};
use super::pieces::{Access, AccessError, Piece, Pieces};
use super::seals::Seals;
use super::word::{SharedU16, SharedU16Mut, SharedU32, SharedU32Mut, SharedU64, SharedU64Mut};

/// A reserved run of addresses in this process, into which memfds are mapped piece by piece.
///
/// The addresses stay the same for its whole life. Where no piece is mapped they are inaccessible,
/// and every method here refuses them. Dropping it unmaps everything.
pub struct SharedMemory {
    /// Start of what was reserved from the kernel.
    whole: *mut u8,
    /// Length in bytes of what was reserved, padding included.
    whole_len: usize,
    /// The first usable address, in `whole`.
    start: *mut u8,
    /// Usable length in bytes, from `start`.
    len: usize,
    /// What `start` is aligned to.
    align_bytes: u64,
    pieces: Pieces,
    /// Runs of the reservation that may no longer be ours; see `place`. Sorted and disjoint.
    lost: Pieces,
}

// SAFETY: the fields are numbers, vectors of numbers and an address. The mapping is the process's,
// not a thread's: any thread may use and unmap it.
unsafe impl Send for SharedMemory {}

// SAFETY: what `&self` gives does not change the fields. Bytes behind `start` are reached only
// through raw pointers and atomics; the head of this file says what concurrent copies mean.
unsafe impl Sync for SharedMemory {}

/// Why addresses could not be reserved, or a memfd not be mapped there. What was mapped before is
/// as it was.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)] // the messages are the docs
pub enum MapError {
    #[error(
        "cannot reserve {len} bytes aligned to {align}: both must be multiples of {page}, the alignment a power of two"
    )]
    BadReservation { len: u64, align: u64, page: u64 },
    #[error("reserve {len} bytes of addresses")]
    Reserve { len: u64, source: io::Error },
    #[error("cannot map 0 bytes")]
    Empty,
    #[error("{len} bytes at offset {offset} do not lie inside the {reserved} reserved bytes")]
    OutsideReservation {
        offset: u64,
        len: u64,
        reserved: u64,
    },
    #[error(
        "offset {offset} and length {len} must be multiples of {unit}, in addresses aligned to as much (they are to {align})"
    )]
    Misaligned {
        offset: u64,
        len: u64,
        unit: u64,
        align: u64,
    },
    #[error(
        "{len} bytes at offset {offset} overlap the {mapped_len} bytes mapped at offset {mapped_offset}"
    )]
    Overlap {
        offset: u64,
        len: u64,
        mapped_offset: u64,
        mapped_len: u64,
    },
    #[error("the addresses at offset {offset} were lost when an earlier mapping there failed")]
    Lost { offset: u64 },
    #[error("not a memfd")]
    NotAMemfd,
    #[error("the memfd may shrink under the mapping (its seals: {seals})")]
    NotSealedAgainstShrinking { seals: Seals },
    #[error("the memfd cannot be written (its seals: {seals})")]
    WriteSealed { seals: Seals },
    #[error("the memfd was not opened for {wanted:?}")]
    NotPermitted { wanted: Access },
    #[error("cannot map {len} bytes of a memfd of {size}")]
    FileTooSmall { len: u64, size: u64 },
    #[error("inspect the memfd")]
    Inspect(#[source] io::Error),
    #[error("map {len} bytes at offset {offset}")]
    Map {
        offset: u64,
        len: u64,
        source: io::Error,
    },
}

impl From<InspectError> for MapError {
    fn from(error: InspectError) -> Self {
        match error {
            InspectError::NotAMemfd => MapError::NotAMemfd,
            InspectError::Io(source) => MapError::Inspect(source),
        }
    }
}

/// Why a copy between shared memory and a file failed. After `Short` and `Io` a part may have been
/// copied.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)] // the messages are the docs
pub enum CopyError {
    #[error("only {got} of {wanted} bytes could be copied")]
    Short { wanted: u64, got: u64 },
    #[error("copy between a file and shared memory")]
    Io(#[source] io::Error),
    #[error(transparent)]
    Access(#[from] AccessError),
}

impl SharedMemory {
    /// Reserves `len_bytes` of inaccessible addresses whose start is a multiple of `align_bytes`.
    ///
    /// Costs no memory. `align_bytes` is a power of two and at least a page; where hugetlb memfds
    /// are to be mapped it is at least their page (2 MiB).
    ///
    /// # Errors
    ///
    /// [`MapError::BadReservation`], and [`MapError::Reserve`] when the address space has no such
    /// run.
    pub fn reserve(len_bytes: u64, align_bytes: u64) -> Result<SharedMemory, MapError> {
        let page = host_size_to_u64(rustix::param::page_size());
        let len_is_whole = len_bytes > 0 && len_bytes.is_multiple_of(page);
        if !len_is_whole || !align_bytes.is_power_of_two() || align_bytes < page {
            return Err(MapError::BadReservation {
                len: len_bytes,
                align: align_bytes,
                page,
            });
        }
        // The kernel aligns to pages only: take more, and use the aligned part of it.
        let whole_bytes = len_bytes.saturating_add(align_bytes - page);
        let whole = reserve_addresses(whole_bytes).map_err(|source| MapError::Reserve {
            len: len_bytes,
            source,
        })?;
        let start = host_size_to_u64(whole.addr());
        Ok(SharedMemory {
            whole,
            whole_len: host_size(whole_bytes),
            start: whole.wrapping_add(host_size(start.next_multiple_of(align_bytes) - start)),
            len: host_size(len_bytes),
            align_bytes,
            pieces: Pieces::default(),
            lost: Pieces::default(),
        })
    }

    /// Maps the first `len_bytes` of the memfd at `offset_bytes` of the reservation.
    ///
    /// The descriptor is not kept. `&mut self` says that nobody is in the middle of an access.
    ///
    /// # Errors
    ///
    /// When the span is not whole pages of the memfd inside the reservation, or overlaps a mapped
    /// piece; when the memfd could shrink, is too short, or does not permit `access`; when the
    /// kernel refuses. Only the last may cost something: the addresses asked for can then be lost
    /// to this reservation ([`MapError::Lost`]).
    pub fn map_at(
        &mut self,
        offset_bytes: u64,
        len_bytes: u64,
        fd: BorrowedFd<'_>,
        access: Access,
    ) -> Result<(), MapError> {
        let piece = Piece {
            offset_bytes,
            len_bytes,
            access,
        };
        self.check_room(piece)?;
        let facts = inspect(fd)?;
        check_file(&facts, piece)?;
        self.check_alignment(&facts, piece)?;
        // SAFETY: `check_room` found the piece inside the reservation, on addresses that are ours
        // and unmapped; `check_alignment` that the kernel will round neither end of it.
        unsafe { self.place(piece, fd) }
    }

    /// The length of the reservation in bytes.
    pub fn len_bytes(&self) -> u64 {
        host_size_to_u64(self.len)
    }

    /// What is mapped, in ascending order of offset.
    pub fn pieces(&self) -> &[Piece] {
        self.pieces.as_slice()
    }

    /// Copies `into.len()` bytes at `offset` out of shared memory.
    ///
    /// # Errors
    ///
    /// When not all of them are mapped.
    pub fn copy_out(&self, offset: u64, into: &mut [u8]) -> Result<(), AccessError> {
        let span = self.span(offset, host_size_to_u64(into.len()), Access::ReadOnly)?;
        span.copy_out(into);
        Ok(())
    }

    /// Copies `from` into shared memory at `offset`.
    ///
    /// # Errors
    ///
    /// When not all of the bytes there are mapped read-write.
    pub fn copy_in(&self, offset: u64, from: &[u8]) -> Result<(), AccessError> {
        let span = self.span(offset, host_size_to_u64(from.len()), Access::ReadWrite)?;
        span.copy_in(from);
        Ok(())
    }

    /// Sets `len` bytes at `offset` to `byte`: zero, or a poison.
    ///
    /// # Errors
    ///
    /// When not all of them are mapped read-write.
    pub fn fill(&self, offset: u64, len: u64, byte: u8) -> Result<(), AccessError> {
        self.span(offset, len, Access::ReadWrite)?.fill(byte);
        Ok(())
    }

    /// Reads exactly `len` bytes of `file`, from `file_offset` on, straight into shared memory at
    /// `offset`.
    ///
    /// # Errors
    ///
    /// [`CopyError::Short`] when the file ends first.
    pub fn read_from(
        &self,
        offset: u64,
        len: u64,
        file: BorrowedFd<'_>,
        file_offset: u64,
    ) -> Result<(), CopyError> {
        let span = self.span(offset, len, Access::ReadWrite)?;
        transfer(len, |done| {
            span.skip(done)
                .read_some(file, position(file_offset, done)?)
        })
    }

    /// Writes exactly `len` bytes of shared memory at `offset` to `file`, from `file_offset` on.
    ///
    /// Lands at `file_offset` even if whoever shares the description sets `O_APPEND`: a client must
    /// not be able to move our writes. That the span lies inside the file is for the caller to
    /// check ([`ClientMemory::check_span`](super::ClientMemory::check_span)); otherwise a file that
    /// is not sealed against growing grows.
    ///
    /// # Errors
    ///
    /// `EOPNOTSUPP` in [`CopyError::Io`] when the description is `O_APPEND` and the kernel (before
    /// 6.9) cannot ignore that.
    pub fn write_to(
        &self,
        offset: u64,
        len: u64,
        file: BorrowedFd<'_>,
        file_offset: u64,
    ) -> Result<(), CopyError> {
        let span = self.span(offset, len, Access::ReadOnly)?;
        transfer(len, |done| {
            span.skip(done)
                .write_some_at(file, position(file_offset, done)?)
        })
    }

    /// The 32-bit word at `offset`, to load and to wait on.
    ///
    /// # Errors
    ///
    /// When `offset` is not a multiple of 4, or the word is not mapped.
    pub fn word32(&self, offset: u64) -> Result<SharedU32<'_>, AccessError> {
        self.atomic32(offset, Access::ReadOnly).map(SharedU32::new)
    }

    /// The 32-bit word at `offset`, to load, store, wait on and wake.
    ///
    /// # Errors
    ///
    /// As [`SharedMemory::word32`], and when it is mapped read-only.
    pub fn word32_mut(&self, offset: u64) -> Result<SharedU32Mut<'_>, AccessError> {
        self.atomic32(offset, Access::ReadWrite)
            .map(SharedU32Mut::new)
    }

    /// The 64-bit word at `offset`, to load.
    ///
    /// # Errors
    ///
    /// When `offset` is not a multiple of 8, or the word is not mapped.
    pub fn word64(&self, offset: u64) -> Result<SharedU64<'_>, AccessError> {
        self.atomic64(offset, Access::ReadOnly).map(SharedU64::new)
    }

    /// The 64-bit word at `offset`, to load and store.
    ///
    /// # Errors
    ///
    /// As [`SharedMemory::word64`], and when it is mapped read-only.
    pub fn word64_mut(&self, offset: u64) -> Result<SharedU64Mut<'_>, AccessError> {
        self.atomic64(offset, Access::ReadWrite)
            .map(SharedU64Mut::new)
    }

    /// `len` bytes at `offset`, checked now and not again at every access.
    ///
    /// # Errors
    ///
    /// When not all of them are mapped with this access.
    pub fn slice(
        &self,
        offset: u64,
        len: u64,
        access: Access,
    ) -> Result<SharedSlice<'_>, AccessError> {
        let span = self.span(offset, len, access)?;
        Ok(SharedSlice { span, access })
    }

    /// What is mapped from `offset` to the end of its piece; `None` if nothing is.
    #[inline]
    pub fn rest(&self, offset: u64) -> Option<SharedSlice<'_>> {
        let piece = self.pieces.holding(offset)?;
        let len = piece.offset_bytes + piece.len_bytes - offset;
        let span = Span {
            start: self.address(offset),
            len: host_size(len),
            memory: PhantomData,
        };
        Some(SharedSlice {
            span,
            access: piece.access,
        })
    }

    /// All of it as words, to load.
    ///
    /// # Errors
    ///
    /// When not all of the reservation is mapped.
    pub fn cells(&self) -> Result<&[SharedCell], AccessError> {
        let span = self.span(0, self.len_bytes(), Access::ReadOnly)?;
        Ok(span.cells())
    }

    /// All of it as words that are checked now and not again at every access.
    ///
    /// # Errors
    ///
    /// When not all of the reservation is mapped with this access.
    pub fn into_words(self, access: Access) -> Result<SharedWords, AccessError> {
        let len_bytes = self.len_bytes();
        self.span(0, len_bytes, access)?;
        Ok(SharedWords {
            memory: self,
            access,
        })
    }

    /// Without `Access::ReadWrite` only relaxed loads may be done through the reference: the page
    /// may be read-only.
    fn atomic32(&self, offset: u64, wanted: Access) -> Result<&AtomicU32, AccessError> {
        Ok(self.word(offset, 4, wanted)?.atomic())
    }

    /// As `atomic32`.
    fn atomic64(&self, offset: u64, wanted: Access) -> Result<&AtomicU64, AccessError> {
        Ok(&self.word(offset, 8, wanted)?.cells()[0].0)
    }

    /// A naturally aligned word of `size` bytes.
    fn word(&self, offset: u64, size: u64, wanted: Access) -> Result<Span<'_>, AccessError> {
        // The reservation starts on a page, so an aligned offset is an aligned address.
        if !offset.is_multiple_of(size) {
            return Err(AccessError::Misaligned {
                offset,
                align: size,
            });
        }
        self.span(offset, size, wanted)
    }

    /// The one way from an offset to an address: whole inside mapped pieces that allow `wanted`, or
    /// refused.
    fn span(&self, offset: u64, len: u64, wanted: Access) -> Result<Span<'_>, AccessError> {
        self.pieces.check(offset, len, wanted)?;
        Ok(Span {
            start: self.address(offset),
            len: host_size(len),
            memory: PhantomData,
        })
    }

    /// A pointer with the reservation's provenance. Computing it is harmless whatever the offset.
    #[inline]
    fn address(&self, offset: u64) -> *mut u8 {
        self.start.wrapping_add(host_size(offset))
    }

    fn check_room(&self, piece: Piece) -> Result<(), MapError> {
        let Piece {
            offset_bytes: offset,
            len_bytes: len,
            ..
        } = piece;
        if len == 0 {
            return Err(MapError::Empty);
        }
        let reserved = self.len_bytes();
        let Some(end) = offset.checked_add(len).filter(|&end| end <= reserved) else {
            return Err(MapError::OutsideReservation {
                offset,
                len,
                reserved,
            });
        };
        if let Some(hit) = self.pieces.overlapping(offset, end) {
            let (mapped_offset, mapped_len) = (hit.offset_bytes, hit.len_bytes);
            return Err(MapError::Overlap {
                offset,
                len,
                mapped_offset,
                mapped_len,
            });
        }
        match self.lost.overlapping(offset, end) {
            Some(hit) => Err(MapError::Lost {
                offset: hit.offset_bytes,
            }),
            None => Ok(()),
        }
    }

    /// The kernel rounds up to pages of the file, for hugetlb 2 MiB, and so over what lies next to
    /// the piece.
    fn check_alignment(&self, facts: &MemfdFacts, piece: Piece) -> Result<(), MapError> {
        let Piece {
            offset_bytes: offset,
            len_bytes: len,
            ..
        } = piece;
        let unit = facts.page_bytes;
        let is_aligned = [self.align_bytes, offset, len]
            .iter()
            .all(|bytes| bytes.is_multiple_of(unit));
        if is_aligned {
            Ok(())
        } else {
            Err(MapError::Misaligned {
                offset,
                len,
                unit,
                align: self.align_bytes,
            })
        }
    }

    /// Maps the piece over the reserved addresses.
    ///
    /// When that fails, the kernel may already have dropped the reservation there (Linux 6.18 does,
    /// when the pool of huge pages is dry), and another thread may be given the addresses. They are
    /// never touched again, not even to unmap them; at worst inaccessible addresses leak.
    ///
    /// # Safety
    ///
    /// The piece lies inside the reservation, overlaps neither `pieces` nor `lost`, and begins and
    /// ends on page boundaries of the file.
    unsafe fn place(&mut self, piece: Piece, fd: BorrowedFd<'_>) -> Result<(), MapError> {
        let Piece {
            offset_bytes: offset,
            len_bytes: len,
            access,
        } = piece;
        let protection = match access {
            Access::ReadOnly => ProtFlags::READ,
            Access::ReadWrite => ProtFlags::READ | ProtFlags::WRITE,
        };
        let (at, flags) = (
            self.address(offset).cast::<c_void>(),
            MapFlags::SHARED | MapFlags::FIXED,
        );
        // SAFETY: the caller's promise makes these addresses ours and unused: nothing but our own
        // inaccessible reservation is replaced, and no reference or pointer into it exists.
        match unsafe { mmap(at, host_size(len), protection, flags, fd, 0) } {
            Ok(_) => {
                self.pieces.insert(piece);
                Ok(())
            }
            Err(errno) => {
                self.lost.insert(piece);
                Err(MapError::Map {
                    offset,
                    len,
                    source: errno.into(),
                })
            }
        }
    }

    /// Unmaps all of the reservation that is still ours, from `from` to `to` bytes above `whole`.
    fn unmap(&mut self, from: usize, to: usize) {
        if from < to {
            let start = self.whole.wrapping_add(from).cast::<c_void>();
            // SAFETY: inside the reservation and not lost, so ours. Every cell and span borrows
            // `self`, which is being dropped: none is left. Pieces are never cut, so a hugetlb
            // piece goes as a whole.
            let unmapped = unsafe { munmap(start, to - from) };
            // Can only fail when cutting a mapping in two meets the kernel's limit of them: then it
            // leaks.
            debug_assert!(unmapped.is_ok(), "munmap: {unmapped:?}");
        }
    }
}

impl Drop for SharedMemory {
    fn drop(&mut self) {
        let pad = self.start.addr() - self.whole.addr();
        let mut from = 0;
        for lost in std::mem::take(&mut self.lost).as_slice() {
            let lost_from = pad + host_size(lost.offset_bytes);
            self.unmap(from, lost_from);
            from = lost_from + host_size(lost.len_bytes);
        }
        self.unmap(from, self.whole_len);
    }
}

/// Says what is mapped, and no address: logs must not help an attacker.
impl fmt::Debug for SharedMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SharedMemory")
            .field("len", &self.len)
            .field("pieces", &self.pieces)
            .finish_non_exhaustive()
    }
}

/// Shared memory that is one array of 64-bit words, for those who read many words by number: what is
/// mapped was checked once.
#[derive(Debug)]
pub struct SharedWords {
    /// Mapped from end to end with `access`, and never changed any more.
    memory: SharedMemory,
    access: Access,
}

/// A word of [`SharedWords`], to load: what [`SharedU64`] refers to.
#[repr(transparent)]
pub struct SharedCell(AtomicU64);

impl SharedCell {
    /// As [`SharedU64::load`].
    ///
    /// # Panics
    ///
    /// As that.
    #[inline]
    pub fn load(&self, order: Ordering) -> u64 {
        SharedU64::new(&self.0).load(order)
    }
}

impl SharedWords {
    /// All words, to load.
    #[inline]
    pub fn cells(&self) -> &[SharedCell] {
        let all = Span {
            start: self.memory.address(0),
            len: self.memory.len,
            memory: PhantomData,
        };
        all.cells()
    }

    /// The first words, to load and store: checked here, and not at each access. `None` if there are not so
    /// many, and if they are mapped read-only.
    #[inline]
    pub fn first_cells_mut<const N: usize>(&self) -> Option<SharedCellsMut<'_, N>> {
        let cells = self.cells().first_chunk()?;
        (self.access == Access::ReadWrite).then_some(SharedCellsMut(cells))
    }

    /// The word, to load and store; `None` past the end, and for all words that are mapped
    /// read-only.
    #[inline]
    pub fn word_mut(&self, index: usize) -> Option<SharedU64Mut<'_>> {
        let cell = self.cells().get(index)?;
        (self.access == Access::ReadWrite).then(|| SharedU64Mut::new(&cell.0))
    }
}

/// So many words that can be loaded and stored.
#[derive(Clone, Copy)]
pub struct SharedCellsMut<'a, const N: usize>(&'a [SharedCell; N]);

impl<'a, const N: usize> SharedCellsMut<'a, N> {
    /// The word of this number.
    ///
    /// # Panics
    ///
    /// If there are not so many.
    #[inline]
    #[must_use]
    pub fn word_mut(self, index: usize) -> SharedU64Mut<'a> {
        SharedU64Mut::new(&self.0[index].0)
    }
}

impl<const N: usize> fmt::Debug for SharedCellsMut<'_, N> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SharedCellsMut").finish_non_exhaustive()
    }
}

/// A part of shared memory that is mapped from end to end with one access.
///
/// Like a Rust slice, but of bytes that another process may be writing to. How long they mean what
/// they meant when it was made is for whoever made it to say; they stay mapped, or become
/// inaccessible ([`Window::revoke`]), and never become anything else.
#[derive(Clone, Copy)]
pub struct SharedSlice<'a> {
    span: Span<'a>,
    access: Access,
}

impl<'a> SharedSlice<'a> {
    /// Its length in bytes.
    #[inline]
    #[must_use]
    pub fn len(&self) -> u64 {
        host_size_to_u64(self.span.len)
    }

    /// Are there no bytes?
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.span.len == 0
    }

    /// What may be done with it.
    #[inline]
    #[must_use]
    pub fn access(&self) -> Access {
        self.access
    }

    /// Its first byte, for system calls and devices. Another process may write there at any
    /// instant: no Rust reference may be made of it.
    #[inline]
    #[must_use]
    pub fn as_ptr(&self) -> *const u8 {
        self.span.start.cast_const()
    }

    /// As [`SharedSlice::as_ptr`]; `None` if it is read-only.
    #[inline]
    #[must_use]
    pub fn as_mut_ptr(&self) -> Option<*mut u8> {
        (self.access == Access::ReadWrite).then_some(self.span.start)
    }

    /// The same bytes, to load only.
    #[inline]
    #[must_use]
    pub fn read_only(self) -> SharedSlice<'a> {
        let access = Access::ReadOnly;
        SharedSlice { access, ..self }
    }

    /// Its first `len` bytes, or all if it has not so many.
    #[inline]
    #[must_use]
    pub fn first(self, len: u64) -> SharedSlice<'a> {
        let mut span = self.span;
        span.len = span.len.min(usize::try_from(len).unwrap_or(usize::MAX));
        SharedSlice { span, ..self }
    }

    /// `len` of its bytes, from `offset` on.
    ///
    /// # Errors
    ///
    /// [`AccessError::OutOfBounds`] if there are not so many.
    #[inline]
    pub fn slice(&self, offset: u64, len: u64) -> Result<SharedSlice<'a>, AccessError> {
        let span = self.part(offset, len, Access::ReadOnly)?;
        Ok(SharedSlice { span, ..*self })
    }

    /// Copies `into.len()` bytes at `offset` out.
    ///
    /// # Errors
    ///
    /// When there are not so many.
    #[inline]
    pub fn copy_out(&self, offset: u64, into: &mut [u8]) -> Result<(), AccessError> {
        let len = host_size_to_u64(into.len());
        self.part(offset, len, Access::ReadOnly)?.copy_out(into);
        Ok(())
    }

    /// Copies `from` in at `offset`. Threads must not write the same bytes at the same time.
    ///
    /// # Errors
    ///
    /// When it does not fit, or the slice is read-only.
    #[inline]
    pub fn copy_in(&self, offset: u64, from: &[u8]) -> Result<(), AccessError> {
        let len = host_size_to_u64(from.len());
        self.part(offset, len, Access::ReadWrite)?.copy_in(from);
        Ok(())
    }

    /// Copies `from` to the beginning, and sets all bytes behind it to zero. Threads must not write
    /// the same bytes at the same time.
    ///
    /// # Errors
    ///
    /// When it does not fit, or the slice is read-only.
    #[inline]
    pub fn copy_in_padded(&self, from: &[u8]) -> Result<(), AccessError> {
        let len = host_size_to_u64(from.len());
        let part = self.part(0, len, Access::ReadWrite)?;
        part.copy_in(from);
        if self.span.len > part.len {
            self.span.skip(part.len).fill(0);
        }
        Ok(())
    }

    /// The 16-bit word at `offset`, to load.
    ///
    /// # Errors
    ///
    /// When it does not lie inside, or its address is not a multiple of 2.
    pub fn word16(&self, offset: u64) -> Result<SharedU16<'a>, AccessError> {
        let word = self.word(offset, 2, Access::ReadOnly)?;
        Ok(SharedU16::new(word.atomic()))
    }

    /// The 16-bit word at `offset`, to load and store.
    ///
    /// # Errors
    ///
    /// As [`SharedSlice::word16`], and when the slice is read-only.
    pub fn word16_mut(&self, offset: u64) -> Result<SharedU16Mut<'a>, AccessError> {
        let word = self.word(offset, 2, Access::ReadWrite)?;
        Ok(SharedU16Mut::new(word.atomic()))
    }

    /// Sets all bytes from `offset` on to `byte`.
    ///
    /// # Errors
    ///
    /// When the slice ends before `offset`, or is read-only.
    #[inline]
    pub fn fill_from(&self, offset: u64, byte: u8) -> Result<(), AccessError> {
        let len = self.len().saturating_sub(offset);
        self.part(offset, len, Access::ReadWrite)?.fill(byte);
        Ok(())
    }

    /// The 32-bit word at `offset`, to load and to wait on.
    ///
    /// # Errors
    ///
    /// When it does not lie inside, or its address is not a multiple of 4.
    pub fn word32(&self, offset: u64) -> Result<SharedU32<'a>, AccessError> {
        let word = self.word(offset, 4, Access::ReadOnly)?;
        Ok(SharedU32::new(word.atomic()))
    }

    /// The 32-bit word at `offset`, to load, store, wait on and wake.
    ///
    /// # Errors
    ///
    /// As [`SharedSlice::word32`], and when the slice is read-only.
    pub fn word32_mut(&self, offset: u64) -> Result<SharedU32Mut<'a>, AccessError> {
        let word = self.word(offset, 4, Access::ReadWrite)?;
        Ok(SharedU32Mut::new(word.atomic()))
    }

    /// The 64-bit word at `offset`, to load.
    ///
    /// # Errors
    ///
    /// When it does not lie inside, or its address is not a multiple of 8.
    pub fn word64(&self, offset: u64) -> Result<SharedU64<'a>, AccessError> {
        let word = self.word(offset, 8, Access::ReadOnly)?;
        Ok(SharedU64::new(&word.cells()[0].0))
    }

    /// The 64-bit word at `offset`, to load and store.
    ///
    /// # Errors
    ///
    /// As [`SharedSlice::word64`], and when the slice is read-only.
    pub fn word64_mut(&self, offset: u64) -> Result<SharedU64Mut<'a>, AccessError> {
        let word = self.word(offset, 8, Access::ReadWrite)?;
        Ok(SharedU64Mut::new(&word.cells()[0].0))
    }

    /// Unlike offsets in a reservation, those of a slice say nothing of the address.
    fn word(&self, offset: u64, size: u64, wanted: Access) -> Result<Span<'a>, AccessError> {
        let word = self.part(offset, size, wanted)?;
        if !host_size_to_u64(word.start.addr()).is_multiple_of(size) {
            let align = size;
            return Err(AccessError::Misaligned { offset, align });
        }
        Ok(word)
    }

    #[inline]
    fn part(&self, offset: u64, len: u64, wanted: Access) -> Result<Span<'a>, AccessError> {
        let whole = self.len();
        if offset > whole || len > whole - offset {
            let unmapped_at = whole.max(offset);
            return Err(AccessError::OutOfBounds {
                offset,
                len,
                unmapped_at,
            });
        }
        if !self.access.allows(wanted) {
            return Err(AccessError::ReadOnly {
                offset,
                len,
                read_only_at: offset,
            });
        }
        Ok(Span {
            start: self.span.start.wrapping_add(host_size(offset)),
            len: host_size(len),
            memory: PhantomData,
        })
    }
}

/// Says no address: logs must not help an attacker.
impl fmt::Debug for SharedSlice<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SharedSlice")
            .field("len", &self.span.len)
            .field("access", &self.access)
            .finish_non_exhaustive()
    }
}

/// A memfd that is mapped whole and can be taken back while others still know its addresses.
#[derive(Debug)]
pub struct Window {
    /// One piece, from end to end.
    memory: SharedMemory,
    access: Access,
    /// The kernel did not say whose the addresses are: see `SharedMemory::place`.
    is_lost: AtomicBool,
}

impl Window {
    /// Maps the first `len_bytes` of a memfd, whole pages of it. The descriptor is not kept.
    ///
    /// # Errors
    ///
    /// As [`SharedMemory::reserve`] and [`SharedMemory::map_at`].
    pub fn map(
        fd: BorrowedFd<'_>,
        len_bytes: u64,
        align_bytes: u64,
        access: Access,
    ) -> Result<Window, MapError> {
        let mut memory = SharedMemory::reserve(len_bytes, align_bytes)?;
        memory.map_at(0, len_bytes, fd, access)?;
        Ok(Window {
            memory,
            access,
            is_lost: AtomicBool::new(false),
        })
    }

    /// From `offset` to the end; `None` if that lies behind it.
    #[inline]
    pub fn rest(&self, offset: u64) -> Option<SharedSlice<'_>> {
        let len = self.memory.len_bytes();
        if offset >= len {
            return None;
        }
        let span = Span {
            start: self.memory.address(offset),
            len: host_size(len - offset),
            memory: PhantomData,
        };
        Some(SharedSlice {
            span,
            access: self.access,
        })
    }

    /// Its length in bytes.
    pub fn len_bytes(&self) -> u64 {
        self.memory.len_bytes()
    }

    /// Lets go of the memory. Inaccessible pages take its place until the window is dropped: who
    /// uses an address of it after all gets a SIGSEGV, as a device would get a fault, and never
    /// somebody else's memory.
    ///
    /// # Errors
    ///
    /// The kernel's, and then the memory may still be mapped.
    pub fn revoke(&self) -> io::Result<()> {
        let at = self.memory.address(0).cast::<c_void>();
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE | MapFlags::FIXED;
        // SAFETY: the window's own addresses, all of them, so that no piece is cut. Slices of it may
        // exist, and are raw pointers: what uses them now traps. What replaces the memory belongs
        // to nobody and can be neither read nor written.
        let revoked = unsafe { mmap_anonymous(at, self.memory.len, ProtFlags::empty(), flags) };
        if revoked.is_err() {
            self.is_lost.store(true, Ordering::Relaxed);
        }
        revoked?;
        Ok(())
    }
}

impl Drop for Window {
    fn drop(&mut self) {
        if *self.is_lost.get_mut() {
            let whole = self.memory.pieces.as_slice()[0];
            self.memory.lost.insert(whole);
        }
    }
}

/// Windows by number. Each can be replaced; none is dropped before all are: who has looked one up may
/// go on using it without a lock.
pub struct Windows {
    /// Null, or into `all`.
    slots: Box<[AtomicPtr<Window>]>,
    /// Whatever was ever put in. Only grows. Held for single pushes.
    all: Mutex<Vec<Arc<Window>>>,
}

impl Windows {
    /// Room for so many, all empty.
    #[must_use]
    pub fn new(count: usize) -> Windows {
        Windows {
            slots: (0..count).map(|_| AtomicPtr::default()).collect(),
            all: Mutex::default(),
        }
    }

    /// The window of this number.
    #[inline]
    #[must_use]
    pub fn get(&self, number: usize) -> Option<&Window> {
        let window = self.slots.get(number)?.load(Ordering::Acquire);
        // SAFETY: null, or from an `Arc` that `put` stored in `all`, where it stays while `self`
        // lives; nobody has a `&mut Window` before that ends.
        unsafe { window.as_ref() }
    }

    /// Puts a window in; what was there before is no longer found.
    ///
    /// # Panics
    ///
    /// If there is no such number.
    pub fn put(&self, number: usize, window: Arc<Window>) {
        // A `Vec` after a panic is still one.
        let mut all = self.all.lock().unwrap_or_else(PoisonError::into_inner);
        let address = Arc::as_ptr(&window).cast_mut();
        all.push(window);
        self.slots[number].store(address, Ordering::Release);
    }

    /// Takes a window out: it is no longer found. Whoever has found it before still has it.
    pub fn take(&self, number: usize) {
        if let Some(slot) = self.slots.get(number) {
            slot.store(ptr::null_mut(), Ordering::Release);
        }
    }
}

impl fmt::Debug for Windows {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Windows").finish_non_exhaustive()
    }
}

/// Mapped bytes that allow the access that was asked for. Made by [`SharedMemory::span`] and of what
/// that has checked.
#[derive(Clone, Copy)]
struct Span<'a> {
    start: *mut u8,
    len: usize,
    memory: PhantomData<&'a SharedMemory>,
}

/// What a word of shared memory may be referred to as. Implemented here and only for atomics of the
/// standard library: that any bytes are a valid one, and that others may write to it meanwhile, is
/// what [`Span::atomic`] relies on.
trait Atomic {}

impl Atomic for AtomicU16 {}
impl Atomic for AtomicU32 {}

impl<'a> Span<'a> {
    /// The whole words in a span that starts on a word. Only relaxed loads, unless it is writable.
    #[inline]
    fn cells(self) -> &'a [SharedCell] {
        let start = self.start.cast_const().cast::<SharedCell>();
        debug_assert!(start.is_aligned(), "a span of words starts on a word");
        // SAFETY: as in `atomic`, for as many words as the mapped bytes hold, aligned to eight:
        // the reservation starts on a page, and what callers add to that are multiples of eight.
        // A cell is an atomic, `repr(transparent)`.
        unsafe { std::slice::from_raw_parts(start, self.len / 8) }
    }
}

impl<'a> Span<'a> {
    /// The word that it is. Only relaxed loads, unless it is writable.
    #[inline]
    fn atomic<A: Atomic>(self) -> &'a A {
        let word = self.start.cast_const().cast::<A>();
        debug_assert!(
            word.is_aligned() && self.len == size_of::<A>(),
            "a span of one word"
        );
        // SAFETY: as many mapped bytes as an `A` has, aligned to as many, that stay mapped while the
        // memory is borrowed. Any bytes are a valid atomic, and an atomic is the one thing that
        // others may write to while it is referred to. Not `from_ptr`, which asks for writable
        // memory even of a caller who only loads.
        unsafe { &*word }
    }

    /// `into` is as long as the span.
    #[inline]
    fn copy_out(self, into: &mut [u8]) {
        assert_eq!(self.len, into.len(), "a span is what was asked for");
        // SAFETY: `into.len()` mapped, readable bytes. `into` is Rust's own memory, and no Rust
        // slice ever lies in a reservation, so the two do not overlap.
        unsafe { copy(self.start, into.as_mut_ptr(), self.len) };
    }

    /// `from` is as long as the span, which is writable.
    #[inline]
    fn copy_in(self, from: &[u8]) {
        assert_eq!(self.len, from.len(), "a span is what was asked for");
        // SAFETY: as in `copy_out`, and the span is writable.
        unsafe { copy(from.as_ptr(), self.start, self.len) };
    }

    /// The span is writable.
    #[inline]
    fn fill(self, byte: u8) {
        // SAFETY: `self.len` mapped, writable bytes.
        unsafe { ptr::write_bytes(self.start, byte, self.len) };
    }
}

/// Lengths that are copied by vectors where the processor has them. Shorter ones `memcpy` does as well. For longer ones
/// it is best; in between glibc takes `rep movsb`, which on current Intel processors copies 4 KiB back to a buffer that
/// is not aligned to 64 bytes in 120 ns, where this takes 30.
#[cfg(all(target_arch = "x86_64", not(miri)))]
const BY_VECTORS: std::ops::RangeInclusive<usize> = 2048..=16384;

/// Copies each byte once.
///
/// # Safety
/// `len` bytes can be read at `from` and written at `to`, and the two do not overlap.
#[inline(always)]
unsafe fn copy(from: *const u8, to: *mut u8, len: usize) {
    #[cfg(all(target_arch = "x86_64", not(miri)))]
    if BY_VECTORS.contains(&len) && is_x86_feature_detected!("avx") {
        // SAFETY: the caller's, and the processor has what it takes.
        return unsafe { copy_by_vectors(from, to, len) };
    }
    // SAFETY: the caller's.
    unsafe { ptr::copy_nonoverlapping(from, to, len) };
}

/// As [`copy`], 128 bytes at a time, to aligned places: a vector that is stored across two cache lines costs more than one
/// that is loaded so.
///
/// # Safety
/// As [`copy`].
#[cfg(all(target_arch = "x86_64", not(miri)))]
#[target_feature(enable = "avx")]
unsafe fn copy_by_vectors(from: *const u8, to: *mut u8, len: usize) {
    use std::arch::x86_64::{__m256i, _mm256_loadu_si256, _mm256_storeu_si256};
    const STEP: usize = 4 * size_of::<__m256i>();
    let head = to.align_offset(align_of::<__m256i>()).min(len);
    let end = head + (len - head) / STEP * STEP;
    // SAFETY: the first of the caller's bytes.
    unsafe { ptr::copy_nonoverlapping(from, to, head) };
    let mut at = head;
    while at < end {
        let (from, to) = (from.wrapping_add(at), to.wrapping_add(at));
        let (from, to) = (from.cast::<__m256i>(), to.cast::<__m256i>());
        // SAFETY: four vectors end at `end` at most, which is no more than `len`; neither side need be aligned.
        let load = |vector| unsafe { _mm256_loadu_si256(from.wrapping_add(vector)) };
        let vectors = [load(0), load(1), load(2), load(3)];
        for (place, vector) in vectors.into_iter().enumerate() {
            // SAFETY: as for the loads.
            unsafe { _mm256_storeu_si256(to.wrapping_add(place), vector) };
        }
        at += STEP;
    }
    // SAFETY: the rest of the caller's bytes.
    unsafe { ptr::copy_nonoverlapping(from.wrapping_add(end), to.wrapping_add(end), len - end) };
}

impl Span<'_> {
    /// Without the first `done` bytes.
    #[inline]
    fn skip(self, done: usize) -> Self {
        assert!(
            done <= self.len,
            "a system call cannot move more bytes than it was asked to"
        );
        Span {
            start: self.start.wrapping_add(done),
            len: self.len - done,
            ..self
        }
    }

    /// One `pread`. The span is writable.
    fn read_some(self, file: BorrowedFd<'_>, file_offset: i64) -> io::Result<usize> {
        // SAFETY: the kernel writes at most `len` bytes to a span of that many mapped, writable
        // bytes. If a page cannot be had it answers EFAULT, where a load of ours would be a SIGBUS.
        let moved =
            unsafe { libc::pread(file.as_raw_fd(), self.start.cast(), self.len, file_offset) };
        usize::try_from(moved).map_err(|_| io::Error::last_os_error())
    }

    /// One write that lands at `file_offset`, whatever the description's flags.
    fn write_some_at(self, file: BorrowedFd<'_>, file_offset: i64) -> io::Result<usize> {
        match self.write_some(file, file_offset, libc::RWF_NOAPPEND) {
            Err(error) if may_be_unknown_flag(&error) && !is_append(file)? => {
                self.write_some(file, file_offset, 0)
            }
            answer => answer,
        }
    }

    /// One `pwritev2`. With `flags` 0 that is `pwrite`.
    fn write_some(self, file: BorrowedFd<'_>, file_offset: i64, flags: i32) -> io::Result<usize> {
        let bytes = libc::iovec {
            iov_base: self.start.cast(),
            iov_len: self.len,
        };
        // SAFETY: one iovec, which outlives the call; the kernel only reads, at most `len` mapped
        // bytes.
        let moved =
            unsafe { libc::pwritev2(file.as_raw_fd(), &raw const bytes, 1, file_offset, flags) };
        usize::try_from(moved).map_err(|_| io::Error::last_os_error())
    }
}

/// Takes inaccessible addresses from the kernel, any that are free.
fn reserve_addresses(len_bytes: u64) -> io::Result<*mut u8> {
    let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
    // SAFETY: the hint is null, so the kernel picks an unused run and nothing Rust knows of is
    // replaced.
    let start = unsafe {
        mmap_anonymous(
            ptr::null_mut(),
            host_size(len_bytes),
            ProtFlags::empty(),
            flags,
        )
    }?;
    Ok(start.cast())
}

/// Whether the file can be mapped as `piece` wants, and never goes away under it.
fn check_file(facts: &MemfdFacts, piece: Piece) -> Result<(), MapError> {
    let seals = facts.seals;
    let writes = piece.access == Access::ReadWrite;
    if !seals.forbid_shrinking() {
        return Err(MapError::NotSealedAgainstShrinking { seals });
    }
    // A shared mapping needs a readable description even where it only writes.
    if !facts.readable || (writes && !facts.writable) {
        return Err(MapError::NotPermitted {
            wanted: piece.access,
        });
    }
    if writes && seals.forbid_writing() {
        return Err(MapError::WriteSealed { seals });
    }
    if facts.size_bytes < piece.len_bytes {
        return Err(MapError::FileTooSmall {
            len: piece.len_bytes,
            size: facts.size_bytes,
        });
    }
    Ok(())
}

/// Repeats `step(done)` until all `len` bytes are moved or it moves none. Signals do not end it.
fn transfer(len: u64, mut step: impl FnMut(usize) -> io::Result<usize>) -> Result<(), CopyError> {
    let wanted = host_size(len);
    let mut done = 0;
    while done < wanted {
        match step(done) {
            Ok(0) => {
                return Err(CopyError::Short {
                    wanted: len,
                    got: host_size_to_u64(done),
                });
            }
            Ok(moved) => done += moved,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(CopyError::Io(error)),
        }
    }
    Ok(())
}

/// A place in a file, as system calls count it.
fn position(file_offset: u64, done: usize) -> io::Result<i64> {
    file_offset
        .checked_add(host_size_to_u64(done))
        .and_then(|at| i64::try_from(at).ok())
        .ok_or_else(|| io::Error::from_raw_os_error(libc::EOVERFLOW))
}

/// How kernels and libcs say that they do not know a flag of `pwritev2`, or the call.
fn may_be_unknown_flag(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EOPNOTSUPP | libc::EINVAL | libc::ENOSYS)
    )
}

fn is_append(file: BorrowedFd<'_>) -> io::Result<bool> {
    Ok(fcntl_getfl(file)?.contains(OFlags::APPEND))
}

/// Lossless: `region` compiles for 64-bit targets only.
#[allow(clippy::cast_possible_truncation)]
#[inline]
fn host_size(bytes: u64) -> usize {
    bytes as usize
}

/// Lossless, as `host_size`.
fn host_size_to_u64(bytes: usize) -> u64 {
    bytes as u64
}

#[cfg(test)]
mod tests {
    use std::fs::{self, File};
    use std::io::{Read, Seek, Write};
    use std::os::fd::{AsFd, OwnedFd};
    use std::sync::atomic::Ordering::{Acquire, Relaxed, SeqCst};
    use std::sync::mpsc;
    use std::thread;
    use std::time::{Duration, Instant};

    use proptest::prelude::*;
    use rustix::fs::{
        MemfdFlags, Mode, SealFlags, fcntl_add_seals, fcntl_setfl, ftruncate, memfd_create, open,
    };

    use super::*;
    use crate::region::{WaitOutcome, driver_memfd};

    const PAGE: u64 = 4096;

    fn memfd(pages: u64) -> OwnedFd {
        driver_memfd("mapping-test", pages * PAGE).unwrap()
    }

    fn reopened_read_only(fd: &OwnedFd) -> OwnedFd {
        let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
        open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).unwrap()
    }

    fn mapped(fd: &OwnedFd, pages: u64, access: Access) -> SharedMemory {
        let mut memory = SharedMemory::reserve(pages * PAGE, PAGE).unwrap();
        memory.map_at(0, pages * PAGE, fd.as_fd(), access).unwrap();
        memory
    }

    fn read_write(pages: u64) -> SharedMemory {
        mapped(&memfd(pages), pages, Access::ReadWrite)
    }

    fn bytes(memory: &SharedMemory, offset: u64, len: usize) -> Vec<u8> {
        let mut into = vec![0; len];
        memory.copy_out(offset, &mut into).unwrap();
        into
    }

    /// Bytes that repeat with no power of two, so that a shift by any page or word shows.
    fn pattern(len: usize) -> Vec<u8> {
        (0u8..251).cycle().take(len).collect()
    }

    fn file_of(bytes: &[u8]) -> File {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(bytes).unwrap();
        file
    }

    /// The line of /proc/self/maps whose range holds `address`.
    fn maps_line(address: usize) -> Option<String> {
        let maps = fs::read_to_string("/proc/self/maps").unwrap();
        let holds = |line: &&str| {
            let (range, _) = line.split_once(' ').unwrap();
            let (start, end) = range.split_once('-').unwrap();
            let number = |text| usize::from_str_radix(text, 16).unwrap();
            (number(start)..number(end)).contains(&address)
        };
        maps.lines().find(holds).map(str::to_owned)
    }

    /// Also where vectors copy: every length and place around their edges, and nothing beside.
    #[test]
    fn copies_of_any_length_and_alignment_are_exact() {
        const ROOM: usize = 20_000;
        let memory = read_write(5);
        let bytes: Vec<u8> = (0..=250).cycle().take(ROOM).collect();
        for len in [2047, 2048, 2049, 4096, 4097 + 127, 16_383, 16_384, 16_385] {
            for skip in [0, 1, 16, 31, 32, 33] {
                for at in [0_u32, 1, 31, 32, 64] {
                    memory.fill(0, 20_480, 0xee).unwrap();
                    memory.copy_in(at.into(), &bytes[skip..skip + len]).unwrap();
                    let mut seen = vec![0; ROOM + 100];
                    memory.copy_out(0, &mut seen).unwrap();
                    let (before, rest) = seen.split_at(at as usize);
                    assert!(before.iter().all(|byte| *byte == 0xee));
                    assert_eq!(&rest[..len], &bytes[skip..skip + len]);
                    assert!(rest[len..].iter().all(|byte| *byte == 0xee));
                    let mut back = vec![0x11; len + 64];
                    memory
                        .copy_out(at.into(), &mut back[skip..skip + len])
                        .unwrap();
                    assert_eq!(&back[skip..skip + len], &bytes[skip..skip + len]);
                    assert!(
                        back[..skip]
                            .iter()
                            .chain(&back[skip + len..])
                            .all(|byte| *byte == 0x11)
                    );
                }
            }
        }
    }

    // Reservations.

    #[test]
    fn a_reservation_is_inaccessible_until_something_is_mapped_and_around_it_ever_after() {
        let mut memory = SharedMemory::reserve(16 * PAGE, PAGE).unwrap();
        assert!(
            maps_line(memory.address(0).addr())
                .unwrap()
                .contains(" ---p ")
        );

        memory
            .map_at(4 * PAGE, PAGE, memfd(1).as_fd(), Access::ReadWrite)
            .unwrap();

        let permissions = |page: u64| maps_line(memory.address(page * PAGE).addr()).unwrap();
        assert!(permissions(3).contains(" ---p "));
        assert!(permissions(4).contains(" rw-s "));
        assert!(permissions(5).contains(" ---p "));
        assert!(permissions(15).contains(" ---p "));
    }

    #[test]
    fn a_reservation_starts_at_a_multiple_of_its_alignment() {
        for align in [PAGE, 2 * PAGE, 2 << 20, 1 << 30] {
            let memory = SharedMemory::reserve(3 * PAGE, align).unwrap();

            assert_eq!(memory.address(0).addr() as u64 % align, 0);
            assert_eq!(memory.len_bytes(), 3 * PAGE);
            let pad = memory.start.addr() - memory.whole.addr();
            assert!(pad + memory.len <= memory.whole_len);
        }
    }

    #[test]
    fn a_reservation_of_no_or_broken_pages_or_of_an_odd_alignment_is_refused() {
        for (len, align) in [
            (0, PAGE),
            (1, PAGE),
            (PAGE + 1, PAGE),
            (PAGE, 0),
            (PAGE, 2048),
            (PAGE, 3 * PAGE),
        ] {
            let refused = SharedMemory::reserve(len, align).unwrap_err();
            assert!(
                matches!(refused, MapError::BadReservation { .. }),
                "{len} {align}: {refused}"
            );
        }
    }

    #[test]
    fn a_reservation_larger_than_the_address_space_is_an_error() {
        for (len, align) in [
            (1 << 62, PAGE),
            (u64::MAX - 4095, PAGE),
            (u64::MAX - 4095, 1 << 63),
        ] {
            let refused = SharedMemory::reserve(len, align).unwrap_err();
            assert!(matches!(refused, MapError::Reserve { .. }), "{refused}");
        }
    }

    #[test]
    fn dropping_unmaps_every_piece_and_the_reservation() {
        let name = format!("dropped-{}", std::process::id());
        let is_mapped = || {
            fs::read_to_string("/proc/self/maps")
                .unwrap()
                .contains(&name)
        };
        let fd = driver_memfd(&name, 2 * PAGE).unwrap();
        // A terabyte would be left over: no other test reserves so much.
        let before = huge_mappings();
        let mut memory = SharedMemory::reserve(1 << 40, 2 << 20).unwrap();
        memory
            .map_at(0, PAGE, fd.as_fd(), Access::ReadOnly)
            .unwrap();
        memory
            .map_at(1 << 30, 2 * PAGE, fd.as_fd(), Access::ReadWrite)
            .unwrap();
        assert!(is_mapped());

        drop(memory);

        assert!(!is_mapped());
        assert_eq!(huge_mappings(), before);
    }

    /// Mappings of half a terabyte or more; AddressSanitizer has some of its own.
    fn huge_mappings() -> usize {
        let maps = fs::read_to_string("/proc/self/maps").unwrap();
        let lengths = maps.lines().map(|line| {
            let (start, end) = line.split_once(' ').unwrap().0.split_once('-').unwrap();
            let number = |text| u64::from_str_radix(text, 16).unwrap_or(u64::MAX);
            number(end).wrapping_sub(number(start))
        });
        lengths.filter(|len| *len >= 1 << 39).count()
    }

    // Mapping.

    #[test]
    fn pieces_are_listed_in_order_of_offset() {
        let fd = memfd(2);
        let mut memory = SharedMemory::reserve(16 * PAGE, PAGE).unwrap();

        memory
            .map_at(8 * PAGE, 2 * PAGE, fd.as_fd(), Access::ReadOnly)
            .unwrap();
        memory
            .map_at(0, PAGE, fd.as_fd(), Access::ReadWrite)
            .unwrap();

        let first = Piece {
            offset_bytes: 0,
            len_bytes: PAGE,
            access: Access::ReadWrite,
        };
        let second = Piece {
            offset_bytes: 8 * PAGE,
            len_bytes: 2 * PAGE,
            access: Access::ReadOnly,
        };
        assert_eq!(memory.pieces(), [first, second]);
    }

    #[test]
    fn a_piece_is_never_mapped_over_another() {
        let mut memory = SharedMemory::reserve(16 * PAGE, PAGE).unwrap();
        memory
            .map_at(4 * PAGE, 4 * PAGE, memfd(4).as_fd(), Access::ReadWrite)
            .unwrap();
        memory.fill(4 * PAGE, 4 * PAGE, 0xA5).unwrap();

        for (first, pages) in [(4, 4), (3, 2), (7, 2), (5, 1), (0, 16)] {
            let refused = memory
                .map_at(
                    first * PAGE,
                    pages * PAGE,
                    memfd(16).as_fd(),
                    Access::ReadWrite,
                )
                .unwrap_err();
            assert!(
                matches!(
                    refused,
                    MapError::Overlap {
                        mapped_offset: 0x4000,
                        mapped_len: 0x4000,
                        ..
                    }
                ),
                "{refused}"
            );
        }

        assert!(
            bytes(&memory, 4 * PAGE, 0x4000)
                .iter()
                .all(|&byte| byte == 0xA5)
        );
        memory
            .map_at(3 * PAGE, PAGE, memfd(1).as_fd(), Access::ReadWrite)
            .unwrap();
        memory
            .map_at(8 * PAGE, PAGE, memfd(1).as_fd(), Access::ReadWrite)
            .unwrap();
    }

    #[test]
    fn a_piece_outside_the_reservation_is_refused() {
        let mut memory = SharedMemory::reserve(4 * PAGE, PAGE).unwrap();

        for (offset, len) in [
            (4 * PAGE, PAGE),
            (3 * PAGE, 2 * PAGE),
            (u64::MAX - 4095, PAGE),
            (PAGE, u64::MAX - 4095),
        ] {
            let refused = memory
                .map_at(offset, len, memfd(8).as_fd(), Access::ReadWrite)
                .unwrap_err();
            assert!(
                matches!(
                    refused,
                    MapError::OutsideReservation {
                        reserved: 0x4000,
                        ..
                    }
                ),
                "{refused}"
            );
        }
        assert!(memory.pieces().is_empty());
    }

    #[test]
    fn a_piece_of_no_or_broken_pages_is_refused() {
        let mut memory = SharedMemory::reserve(4 * PAGE, PAGE).unwrap();
        let fd = memfd(4);

        for (offset, len) in [(1, PAGE), (0, 1), (0, PAGE + 1), (2048, 2048)] {
            let refused = memory
                .map_at(offset, len, fd.as_fd(), Access::ReadWrite)
                .unwrap_err();
            assert!(
                matches!(refused, MapError::Misaligned { unit: PAGE, .. }),
                "{refused}"
            );
        }
        assert!(matches!(
            memory.map_at(0, 0, fd.as_fd(), Access::ReadWrite),
            Err(MapError::Empty)
        ));
    }

    #[test]
    fn a_memfd_that_could_shrink_is_not_mapped() {
        let fd = memfd_create("mapping-test", MemfdFlags::ALLOW_SEALING).unwrap();
        ftruncate(&fd, PAGE).unwrap();
        fcntl_add_seals(&fd, SealFlags::GROW).unwrap();
        let mut memory = SharedMemory::reserve(PAGE, PAGE).unwrap();

        let refused = memory
            .map_at(0, PAGE, fd.as_fd(), Access::ReadOnly)
            .unwrap_err();

        assert!(
            matches!(refused, MapError::NotSealedAgainstShrinking { .. }),
            "{refused}"
        );
        assert!(memory.copy_out(0, &mut [0]).is_err());
    }

    #[test]
    fn a_memfd_shorter_than_the_piece_is_not_mapped() {
        let mut memory = SharedMemory::reserve(4 * PAGE, PAGE).unwrap();

        let refused = memory
            .map_at(0, 3 * PAGE, memfd(2).as_fd(), Access::ReadOnly)
            .unwrap_err();

        assert!(
            matches!(
                refused,
                MapError::FileTooSmall {
                    len: 0x3000,
                    size: 0x2000
                }
            ),
            "{refused}"
        );
        memory
            .map_at(0, PAGE, memfd(2).as_fd(), Access::ReadOnly)
            .unwrap();
    }

    #[test]
    fn what_is_not_a_memfd_is_not_mapped() {
        let mut memory = SharedMemory::reserve(PAGE, PAGE).unwrap();

        let refused = memory
            .map_at(0, PAGE, file_of(&pattern(4096)).as_fd(), Access::ReadOnly)
            .unwrap_err();

        assert!(matches!(refused, MapError::NotAMemfd), "{refused}");
    }

    #[test]
    fn memory_sealed_against_writing_maps_read_only_alone() {
        let fd = memfd(1);
        fcntl_add_seals(&fd, SealFlags::FUTURE_WRITE).unwrap();
        let mut memory = SharedMemory::reserve(PAGE, PAGE).unwrap();

        let refused = memory
            .map_at(0, PAGE, fd.as_fd(), Access::ReadWrite)
            .unwrap_err();

        assert!(matches!(refused, MapError::WriteSealed { .. }), "{refused}");
        memory
            .map_at(0, PAGE, fd.as_fd(), Access::ReadOnly)
            .unwrap();
    }

    #[test]
    fn a_huge_page_needs_its_own_alignment_in_a_reservation_aligned_to_it() {
        const HUGE: u64 = 2 << 20;
        let Ok(fd) = memfd_create(
            "huge",
            MemfdFlags::ALLOW_SEALING | MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB,
        ) else {
            return; // no such pages in this kernel
        };
        ftruncate(&fd, HUGE).unwrap();
        fcntl_add_seals(&fd, SealFlags::SHRINK).unwrap();
        let mut by_page = SharedMemory::reserve(4 * HUGE, PAGE).unwrap();
        let mut by_huge = SharedMemory::reserve(4 * HUGE, HUGE).unwrap();

        // The kernel would silently map all of the huge page for a piece of 4 KiB.
        for refused in [
            by_page
                .map_at(0, HUGE, fd.as_fd(), Access::ReadWrite)
                .unwrap_err(),
            by_huge
                .map_at(0, PAGE, fd.as_fd(), Access::ReadWrite)
                .unwrap_err(),
            by_huge
                .map_at(PAGE, HUGE, fd.as_fd(), Access::ReadWrite)
                .unwrap_err(),
        ] {
            assert!(
                matches!(refused, MapError::Misaligned { unit: HUGE, .. }),
                "{refused}"
            );
        }
    }

    /// The kernel's own refusal, behind our check. The description does not permit writing.
    #[test]
    fn the_kernel_refuses_what_a_read_only_description_does_not_permit() {
        let fd = reopened_read_only(&memfd(1));
        let mut memory = SharedMemory::reserve(2 * PAGE, PAGE).unwrap();
        let piece = Piece {
            offset_bytes: 0,
            len_bytes: PAGE,
            access: Access::ReadWrite,
        };

        // SAFETY: the first page of an empty reservation of two.
        let refused = unsafe { memory.place(piece, fd.as_fd()) }.unwrap_err();

        let MapError::Map { source, .. } = refused else {
            panic!("{refused}")
        };
        assert_eq!(source.raw_os_error(), Some(libc::EACCES));
    }

    #[test]
    fn addresses_lost_in_a_failed_mapping_are_never_used_again() {
        let mut memory = SharedMemory::reserve(8 * PAGE, PAGE).unwrap();
        let lost = Piece {
            offset_bytes: 4 * PAGE,
            len_bytes: PAGE,
            access: Access::ReadWrite,
        };
        // SAFETY: the fifth page of an empty reservation of eight.
        unsafe { memory.place(lost, reopened_read_only(&memfd(1)).as_fd()) }.unwrap_err();

        let refused = memory
            .map_at(3 * PAGE, 2 * PAGE, memfd(2).as_fd(), Access::ReadWrite)
            .unwrap_err();

        assert!(
            matches!(refused, MapError::Lost { offset: 0x4000 }),
            "{refused}"
        );
        assert!(memory.copy_out(4 * PAGE, &mut [0]).is_err());
        memory
            .map_at(5 * PAGE, PAGE, memfd(1).as_fd(), Access::ReadWrite)
            .unwrap();

        // Dropped, all but the lost page goes. (Nobody else is given it: here it had stayed
        // reserved.)
        let (before, at, after) = (
            memory.address(3 * PAGE),
            memory.address(4 * PAGE),
            memory.address(5 * PAGE),
        );
        let (before, at, after) = (before.addr(), at.addr(), after.addr());
        drop(memory);
        assert!(maps_line(at).is_some_and(|line| line.contains(" ---p ")));
        let is_ours =
            |address| maps_line(address).is_some_and(|line| line.contains("mapping-test"));
        assert!(!is_ours(before) && !is_ours(after));
    }

    // Copies.

    #[test]
    fn copies_come_back_unchanged_at_every_length_and_at_odd_offsets() {
        let memory = read_write(4);
        let source = pattern(8193);
        let mut back = vec![0; 8193];

        for len in 1..=8193 {
            let offset = (len as u64 * 7) % 4099;
            memory.copy_in(offset, &source[..len]).unwrap();
            memory.copy_out(offset, &mut back[..len]).unwrap();
            assert_eq!(back[..len], source[..len], "{len} bytes at {offset}");
        }
    }

    #[test]
    fn a_copy_changes_no_byte_outside_its_span() {
        let memory = read_write(2);
        memory.fill(0, 2 * PAGE, 0xA5).unwrap();

        memory.copy_in(4090, &[1; 13]).unwrap();

        assert!(bytes(&memory, 0, 4090).iter().all(|&byte| byte == 0xA5));
        assert!(bytes(&memory, 4090, 13).iter().all(|&byte| byte == 1));
        assert!(
            bytes(&memory, 4103, 8192 - 4103)
                .iter()
                .all(|&byte| byte == 0xA5)
        );
    }

    #[test]
    fn fill_sets_exactly_its_span() {
        let memory = read_write(2);

        memory.fill(4095, 2, 0x5A).unwrap();

        assert_eq!(bytes(&memory, 4094, 4), [0, 0x5A, 0x5A, 0]);
    }

    #[test]
    fn an_access_may_end_where_the_mapping_ends_and_not_one_byte_later() {
        let memory = read_write(2);
        let end = 2 * PAGE;
        let outside = |offset, len| {
            Err(AccessError::OutOfBounds {
                offset,
                len,
                unmapped_at: end,
            })
        };

        assert_eq!(memory.copy_out(end - 3, &mut [0; 3]), Ok(()));
        assert_eq!(memory.copy_out(end - 3, &mut [0; 4]), outside(end - 3, 4));
        assert_eq!(memory.copy_in(end - 3, &[0; 4]), outside(end - 3, 4));
        assert_eq!(memory.fill(0, end + 1, 0), outside(0, end + 1));
        assert!(memory.fill(u64::MAX, 2, 0).is_err());
        assert!(memory.fill(2, u64::MAX, 0).is_err());
        assert!(memory.word32(end - 4).is_ok());
        assert!(memory.word64(end - 8).is_ok());
        assert!(memory.word32(end).is_err());
        assert!(memory.word64(u64::MAX - 7).is_err());
    }

    #[test]
    fn an_access_of_no_bytes_succeeds() {
        let memory = read_write(1);

        assert_eq!(memory.copy_out(PAGE, &mut []), Ok(()));
        assert_eq!(memory.copy_in(u64::MAX, &[]), Ok(()));
    }

    #[test]
    fn a_refused_write_changes_nothing() {
        let memory = read_write(1);

        memory.copy_in(PAGE - 2, &[1, 2, 3]).unwrap_err();

        assert_eq!(bytes(&memory, PAGE - 2, 2), [0, 0]);
    }

    #[test]
    fn an_access_across_adjacent_pieces_is_one_access_and_across_a_hole_none() {
        let mut memory = SharedMemory::reserve(8 * PAGE, PAGE).unwrap();
        for page in [0, 1, 3] {
            memory
                .map_at(page * PAGE, PAGE, memfd(1).as_fd(), Access::ReadWrite)
                .unwrap();
        }

        memory.copy_in(PAGE - 5, &pattern(10)).unwrap();

        assert_eq!(bytes(&memory, PAGE - 5, 10), pattern(10));
        let refused = memory.copy_in(2 * PAGE - 1, &pattern(4098)).unwrap_err();
        assert_eq!(
            refused,
            AccessError::OutOfBounds {
                offset: 2 * PAGE - 1,
                len: 4098,
                unmapped_at: 2 * PAGE
            }
        );
    }

    #[test]
    fn a_read_only_piece_can_be_read_in_every_way_and_written_in_none() {
        let fd = memfd(1);
        mapped(&fd, 1, Access::ReadWrite)
            .copy_in(0, &pattern(16))
            .unwrap();
        let memory = mapped(&reopened_read_only(&fd), 1, Access::ReadOnly);
        let file = file_of(&pattern(16));

        assert_eq!(bytes(&memory, 0, 16), pattern(16));
        assert_eq!(
            memory.word32(4).unwrap().load(SeqCst).to_ne_bytes(),
            [4, 5, 6, 7]
        );
        assert_eq!(
            memory.word64(8).unwrap().load(Acquire).to_ne_bytes(),
            [8, 9, 10, 11, 12, 13, 14, 15]
        );
        memory.write_to(0, 16, file.as_fd(), 0).unwrap();

        let read_only = |offset, len| AccessError::ReadOnly {
            offset,
            len,
            read_only_at: offset,
        };
        assert_eq!(memory.copy_in(1, &[0; 2]), Err(read_only(1, 2)));
        assert_eq!(memory.fill(1, 2, 0), Err(read_only(1, 2)));
        assert_eq!(memory.word32_mut(4).unwrap_err(), read_only(4, 4));
        assert_eq!(memory.word64_mut(8).unwrap_err(), read_only(8, 8));
        let refused = memory.read_from(1, 2, file.as_fd(), 0).unwrap_err();
        assert!(
            matches!(refused, CopyError::Access(AccessError::ReadOnly { .. })),
            "{refused}"
        );
    }

    proptest! {
        /// The model is a vector.
        #[test]
        fn random_copies_and_fills_agree_with_a_vector(
            steps in prop::collection::vec((0u64..9000, 0usize..9000, any::<u8>(), 0..3), 1..30),
        ) {
            let memory = read_write(2);
            let mut model = vec![0u8; 8192];
            for (offset, len, byte, kind) in steps {
                let end = host_size(offset) + len;
                let is_inside = len == 0 || end <= model.len();
                let done = match kind {
                    0 => memory.fill(offset, len as u64, byte),
                    1 => memory.copy_in(offset, &vec![byte; len]),
                    _ => memory.copy_out(offset, &mut vec![0; len]),
                };
                prop_assert_eq!(done.is_ok(), is_inside);
                if is_inside && len > 0 && kind < 2 {
                    model[host_size(offset)..end].fill(byte);
                }
            }
            prop_assert_eq!(bytes(&memory, 0, 8192), model);
        }
    }

    // Copies from and to files.

    #[test]
    fn a_file_is_read_to_the_byte_across_a_large_span() {
        // More than 4 MiB, and no whole page at either end.
        let len = (4 << 20) + 4097;
        let file = file_of(&pattern(len + 3));
        let memory = read_write(1030);

        memory.read_from(5, len as u64, file.as_fd(), 3).unwrap();

        assert_eq!(bytes(&memory, 0, 5), [0; 5]);
        assert!(bytes(&memory, 5, len) == pattern(len + 3)[3..]);
        assert_eq!(bytes(&memory, 5 + len as u64, 1), [0]);
    }

    #[test]
    fn a_file_that_ends_early_is_short_and_says_by_how_much() {
        let file = file_of(&pattern(100));
        let memory = read_write(1);

        let refused = memory.read_from(0, 64, file.as_fd(), 60).unwrap_err();
        assert!(
            matches!(
                refused,
                CopyError::Short {
                    wanted: 64,
                    got: 40
                }
            ),
            "{refused}"
        );

        let refused = memory.read_from(0, 64, file.as_fd(), 1000).unwrap_err();
        assert!(
            matches!(refused, CopyError::Short { wanted: 64, got: 0 }),
            "{refused}"
        );
    }

    #[test]
    fn reading_the_kernels_refusal_is_an_error_with_its_cause() {
        let (_, write_end) = rustix::pipe::pipe().unwrap();
        let memory = read_write(1);

        let refused = memory.read_from(0, 8, write_end.as_fd(), 0).unwrap_err();

        assert!(
            matches!(&refused, CopyError::Io(e) if e.raw_os_error() == Some(libc::ESPIPE)),
            "{refused}"
        );
    }

    #[test]
    fn a_file_offset_beyond_what_files_have_is_an_error() {
        let memory = read_write(1);
        let file = file_of(&[]);

        for offset in [u64::MAX, 1 << 63] {
            let refused = memory.read_from(0, 8, file.as_fd(), offset).unwrap_err();
            assert!(
                matches!(&refused, CopyError::Io(e) if e.raw_os_error() == Some(libc::EOVERFLOW)),
                "{refused}"
            );
            memory.write_to(0, 8, file.as_fd(), offset).unwrap_err();
        }
    }

    #[test]
    fn a_refused_span_reads_nothing_from_the_file_and_writes_nothing_to_it() {
        let file = file_of(&pattern(8));
        let memory = read_write(1);

        assert!(matches!(
            memory.read_from(PAGE - 4, 8, file.as_fd(), 0),
            Err(CopyError::Access(_))
        ));
        assert!(matches!(
            memory.write_to(PAGE - 4, 8, file.as_fd(), 0),
            Err(CopyError::Access(_))
        ));

        assert_eq!(bytes(&memory, PAGE - 4, 4), [0; 4]);
        let mut content = vec![0; 8];
        std::os::unix::fs::FileExt::read_exact_at(&file, &mut content, 0).unwrap();
        assert_eq!(content, pattern(8));
    }

    #[test]
    fn a_write_lands_at_its_offset_and_nowhere_else() {
        let mut file = file_of(&[0xA5; 100]);
        let memory = read_write(1);
        memory.copy_in(7, &pattern(20)).unwrap();

        memory.write_to(7, 20, file.as_fd(), 50).unwrap();

        let mut content = Vec::new();
        file.rewind().unwrap();
        file.read_to_end(&mut content).unwrap();
        assert_eq!(
            content,
            [&[0xA5; 50][..], &pattern(20), &[0xA5; 30]].concat()
        );
    }

    #[test]
    fn a_write_lands_at_its_offset_even_in_a_description_that_appends() {
        let client = memfd(2);
        fcntl_setfl(&client, OFlags::APPEND).unwrap();
        let memory = read_write(1);
        memory.fill(0, PAGE, 0x5A).unwrap();

        match memory.write_to(0, 100, client.as_fd(), 4000) {
            Ok(()) => {
                let seen = bytes(&mapped(&client, 2, Access::ReadOnly), 0, 8192);
                assert!((0..8192).all(|at| (seen[at] == 0x5A) == (4000..4100).contains(&at)));
            }
            // Kernels before 6.9: refused rather than appended.
            Err(error) => assert!(
                matches!(&error, CopyError::Io(e) if may_be_unknown_flag(e)),
                "{error}"
            ),
        }
    }

    #[test]
    fn a_large_span_is_written_to_the_byte() {
        let len = (4 << 20) + 4097;
        let client = memfd(1030);
        let memory = read_write(1030);
        memory.copy_in(5, &pattern(len)).unwrap();

        memory.write_to(5, len as u64, client.as_fd(), 9).unwrap();

        assert!(bytes(&mapped(&client, 1030, Access::ReadOnly), 9, len) == pattern(len));
    }

    #[test]
    fn writing_to_memory_that_its_owner_has_sealed_meanwhile_is_an_error() {
        let client = memfd(1);
        fcntl_add_seals(&client, SealFlags::WRITE).unwrap();

        let refused = read_write(1).write_to(0, 8, client.as_fd(), 0).unwrap_err();

        assert!(
            matches!(&refused, CopyError::Io(e) if e.raw_os_error() == Some(libc::EPERM)),
            "{refused}"
        );
    }

    #[test]
    fn a_transfer_goes_on_after_signals_and_short_moves() {
        let mut script = [
            Err(io::Error::from(io::ErrorKind::Interrupted)),
            Ok(3),
            Err(io::Error::from(io::ErrorKind::Interrupted)),
            Ok(7),
        ]
        .into_iter();
        let mut starts = Vec::new();

        let moved = transfer(10, |done| {
            starts.push(done);
            script.next().unwrap()
        });

        assert!(moved.is_ok());
        assert_eq!(starts, [0, 0, 3, 3]);
    }

    // Words.

    #[test]
    fn words_are_the_bytes_at_their_offset() {
        let memory = read_write(1);

        memory.word32_mut(8).unwrap().store(0x0403_0201, Relaxed);
        memory
            .word64_mut(16)
            .unwrap()
            .store(0x0807_0605_0403_0201, SeqCst);

        assert_eq!(bytes(&memory, 8, 4), 0x0403_0201_u32.to_ne_bytes());
        assert_eq!(
            bytes(&memory, 16, 8),
            0x0807_0605_0403_0201_u64.to_ne_bytes()
        );
        assert_eq!(
            memory.word64(16).unwrap().load(Relaxed),
            0x0807_0605_0403_0201
        );
    }

    #[test]
    fn a_word_off_its_natural_alignment_is_refused() {
        let memory = read_write(1);

        for offset in [1, 2, 3, 6] {
            assert_eq!(
                memory.word32(offset).unwrap_err(),
                AccessError::Misaligned { offset, align: 4 }
            );
        }
        for offset in [1, 4, 12] {
            assert_eq!(
                memory.word64(offset).unwrap_err(),
                AccessError::Misaligned { offset, align: 8 }
            );
        }
    }

    #[test]
    fn a_word_changes_only_if_it_was_what_was_expected() {
        let memory = read_write(1);
        let word = memory.word64_mut(0).unwrap();

        assert_eq!(word.compare_exchange(0, 5, SeqCst, SeqCst), Ok(0));
        assert_eq!(word.compare_exchange(0, 6, SeqCst, SeqCst), Err(5));
        assert_eq!(word.fetch_add(u64::MAX, SeqCst), 5);
        assert_eq!(word.swap(9, SeqCst), 4);
        assert_eq!(word.load(SeqCst), 9);
    }

    #[test]
    fn additions_from_many_threads_through_two_mappings_are_all_counted() {
        let fd = memfd(1);
        let mappings = [
            mapped(&fd, 1, Access::ReadWrite),
            mapped(&fd, 1, Access::ReadWrite),
        ];

        thread::scope(|scope| {
            for memory in mappings.iter().cycle().take(4) {
                scope.spawn(|| {
                    for _ in 0..10_000 {
                        memory.word64_mut(64).unwrap().fetch_add(1, Relaxed);
                    }
                });
            }
        });

        assert_eq!(mappings[0].word64(64).unwrap().load(SeqCst), 40_000);
    }

    // Waiting.

    #[test]
    fn a_store_and_wake_in_one_mapping_ends_the_wait_in_another_even_a_read_only_one() {
        let fd = memfd(1);
        let waker = mapped(&fd, 1, Access::ReadWrite);
        let waiter = mapped(&reopened_read_only(&fd), 1, Access::ReadOnly);
        let word = waker.word32_mut(128).unwrap();

        let (ended, end) = mpsc::channel();
        thread::scope(|scope| {
            scope.spawn(|| {
                let word = waiter.word32(128).unwrap();
                while word.load(Acquire) == 0 {
                    let outcome = word.wait(0, Some(Duration::from_secs(20))).unwrap();
                    assert_ne!(outcome, WaitOutcome::TimedOut);
                }
                ended.send(Instant::now()).unwrap();
            });
            // Wakes are counted before the store, so the count proves that the sleeper was met
            // through another mapping: it sleeps again until the word changes.
            let started = Instant::now();
            while word.wake(1).unwrap() == 0 {
                assert!(
                    started.elapsed() < Duration::from_secs(20),
                    "the futex is not shared between mappings"
                );
                thread::yield_now();
            }
            assert!(end.try_recv().is_err());
            word.store(1, SeqCst);
            while end.try_recv().is_err() {
                word.wake(u32::MAX).unwrap();
                assert!(started.elapsed() < Duration::from_secs(20));
                thread::yield_now();
            }
        });
    }

    #[test]
    fn waiting_on_a_word_that_has_changed_returns_at_once() {
        let memory = read_write(1);
        memory.word32_mut(0).unwrap().store(7, SeqCst);

        assert_eq!(
            memory.word32(0).unwrap().wait(6, None).unwrap(),
            WaitOutcome::Changed
        );
    }

    #[test]
    fn a_wait_that_nobody_ends_times_out_and_not_early() {
        let memory = read_write(1);
        let timeout = Duration::from_millis(30);
        let started = Instant::now();

        let outcome = memory.word32(0).unwrap().wait(0, Some(timeout)).unwrap();

        assert_eq!(outcome, WaitOutcome::TimedOut);
        assert!(started.elapsed() >= timeout);
    }

    #[test]
    fn waking_with_nobody_there_wakes_nobody() {
        assert_eq!(
            read_write(1).word32_mut(0).unwrap().wake(u32::MAX).unwrap(),
            0
        );
    }

    #[test]
    fn neither_addresses_nor_contents_show_in_debug_output() {
        let memory = read_write(1);
        memory.word32_mut(0).unwrap().store(0xDEAD, SeqCst);

        let shown = format!("{memory:?} {:?}", memory.word32_mut(0).unwrap());

        assert!(
            !shown.contains(&format!("{:x}", memory.address(0).addr())),
            "{shown}"
        );
        assert!(!shown.contains(&0xDEAD.to_string()), "{shown}");
    }

    // Slices and windows.

    #[test]
    fn a_slice_is_checked_once_and_bounds_what_is_done_with_it() {
        let memory = read_write(2);
        let slice = memory.slice(PAGE - 4, 8, Access::ReadWrite).unwrap();

        slice.copy_in(2, b"abc").unwrap();

        let mut around = [0xff; 8];
        slice.copy_out(0, &mut around).unwrap();
        assert_eq!(&around, b"\0\0abc\0\0\0");
        assert_eq!(bytes(&memory, PAGE - 2, 3), b"abc");
        assert_eq!(slice.as_ptr().addr(), memory.address(PAGE - 4).addr());
        for (offset, len) in [(6, 3), (8, 1), (9, 0), (u64::MAX, 2)] {
            assert!(
                matches!(
                    slice.copy_out(offset, &mut vec![0; len]),
                    Err(AccessError::OutOfBounds { .. })
                ),
                "{offset} {len}"
            );
        }
        let inner = slice.slice(2, 3).unwrap();
        inner.copy_out(0, &mut around[..3]).unwrap();
        assert_eq!(&around[..3], b"abc");
        assert!(slice.slice(6, 3).is_err() && inner.slice(0, 4).is_err());
        assert_eq!((inner.first(2).len(), inner.first(9).len()), (2, 3));
        assert!(memory.slice(PAGE, PAGE + 1, Access::ReadOnly).is_err());
    }

    #[test]
    fn words_of_a_slice_are_aligned_by_their_address_and_not_by_their_offset() {
        let memory = read_write(1);
        let slice = memory.slice(4, 12, Access::ReadWrite).unwrap();

        slice.word64_mut(4).unwrap().store(7, Relaxed);

        assert_eq!(memory.word64(8).unwrap().load(Relaxed), 7);
        assert_eq!(slice.word32(0).unwrap().load(Relaxed), 0);
        slice.word16_mut(2).unwrap().store(0x0102, Relaxed);
        assert_eq!(bytes(&memory, 4, 4)[2..], 0x0102_u16.to_ne_bytes());
        assert_eq!(slice.word16(2).unwrap().load(Relaxed), 0x0102);
        assert!(slice.word16(3).is_err() && slice.word16(12).is_err());
        let odd = slice.word64(0).unwrap_err();
        assert!(matches!(odd, AccessError::Misaligned { align: 8, .. }));
        assert!(slice.word64(8).is_err() && slice.word32(10).is_err());
    }

    #[test]
    fn a_read_only_slice_cannot_be_written_whatever_its_memory_allows() {
        let memory = read_write(1);
        let read_only = memory.rest(0).unwrap().read_only();

        assert!(matches!(
            read_only.copy_in(0, b"a"),
            Err(AccessError::ReadOnly { .. })
        ));
        assert!(read_only.word32_mut(0).is_err() && read_only.word64_mut(0).is_err());
        assert!(read_only.word16_mut(0).is_err() && read_only.word16(0).is_ok());
        assert_eq!(read_only.as_mut_ptr(), None);
        assert!(read_only.slice(0, 1).unwrap().as_mut_ptr().is_none());
    }

    #[test]
    fn the_rest_ends_with_the_piece() {
        let mut memory = SharedMemory::reserve(8 * PAGE, PAGE).unwrap();
        memory
            .map_at(PAGE, 2 * PAGE, memfd(2).as_fd(), Access::ReadOnly)
            .unwrap();

        let len = |offset| memory.rest(offset).map(|slice| slice.len());
        assert_eq!(len(PAGE), Some(2 * PAGE));
        assert_eq!(len(3 * PAGE - 1), Some(1));
        assert_eq!([0, PAGE - 1, 3 * PAGE, u64::MAX].map(len), [None; 4]);
    }

    fn window(name: &str, pages: u64) -> Window {
        let fd = driver_memfd(name, pages * PAGE).unwrap();
        Window::map(fd.as_fd(), pages * PAGE, PAGE, Access::ReadWrite).unwrap()
    }

    #[test]
    fn a_revoked_window_leaves_inaccessible_pages_that_nobody_else_gets() {
        let name = format!("revoked-{}", std::process::id());
        let is_mapped = || {
            let maps = fs::read_to_string("/proc/self/maps").unwrap();
            maps.contains(&name)
        };
        let window = window(&name, 4);
        let address = window.rest(0).unwrap().as_ptr().addr();
        assert!(is_mapped() && maps_line(address).unwrap().contains(" rw-s "));

        window.revoke().unwrap();

        assert!(!is_mapped(), "the memory is let go of");
        let places = [address, address + host_size(4 * PAGE) - 1];
        for place in places {
            assert!(maps_line(place).unwrap().contains(" ---p "));
        }
        // Much that is mapped later lies elsewhere.
        let later: Vec<_> = (0..100).map(|_| read_write(1)).collect();
        let taken = address..address + host_size(4 * PAGE);
        for memory in &later {
            assert!(!taken.contains(&memory.address(0).addr()));
        }
        drop(window);
    }

    #[test]
    fn windows_are_found_by_number_and_outlive_their_place() {
        let windows = Windows::new(2);
        assert!(windows.get(0).is_none() && windows.get(2).is_none());
        windows.put(1, Arc::new(window("first", 1)));
        let first = windows.get(1).unwrap();
        first.rest(0).unwrap().copy_in(0, b"first").unwrap();

        windows.put(1, Arc::new(window("second", 2)));

        assert_eq!(windows.get(1).unwrap().len_bytes(), 2 * PAGE);
        let mut bytes = [0; 5];
        first.rest(0).unwrap().copy_out(0, &mut bytes).unwrap();
        assert_eq!(&bytes, b"first");
        windows.take(1);
        windows.take(7);
        assert!(windows.get(1).is_none());
    }
}
