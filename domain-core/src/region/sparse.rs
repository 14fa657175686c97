//! Memory that the daemon alone writes, and that gets its pages as it is filled.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};

use memfd::{FileSeal, Memfd};
use std::os::fd::AsFd;

use super::mapping::{SharedMemory, SharedWords};
use super::mark;
use super::memfd::{Backing, RegionError, allocate, seal, sized};
use super::owned::{Grant, reopen, reopen_marked};
use super::pieces::Access;

/// A memfd of fixed size whose pages are allocated step by step, from the start.
///
/// The daemon has the only mapping that can write: once that exists the memfd is sealed against
/// every further one, whoever asks. What has no page yet must not be touched, by a reader neither: it
/// would be charged for the page.
#[derive(Debug)]
pub struct SparseRegion {
    /// The original description. It never leaves the process.
    memfd: Memfd,
    words: SharedWords,
    len_bytes: u64,
    /// How far it has pages. Written by [`SparseRegion::back`] alone.
    backed_bytes: AtomicU64,
}

impl SparseRegion {
    /// Makes a region of `len_bytes`, a positive multiple of 4 KiB, without any page. `name` shows
    /// in `/proc` only.
    ///
    /// # Errors
    ///
    /// [`RegionError`]; nothing is left behind.
    pub fn create(name: &str, len_bytes: u64) -> Result<SparseRegion, RegionError> {
        let memfd = sized(name, len_bytes, Backing::Memfd)?;
        seal(&memfd, &[FileSeal::SealShrink, FileSeal::SealGrow])?;
        let mut memory = SharedMemory::reserve(len_bytes, Backing::Memfd.page_bytes())?;
        memory.map_at(0, len_bytes, memfd.as_file().as_fd(), Access::ReadWrite)?;
        // Only after our own mapping, which it would forbid.
        seal(&memfd, &[FileSeal::SealFutureWrite, FileSeal::SealSeal])?;
        let words = memory.into_words(Access::ReadWrite);
        Ok(SparseRegion {
            memfd,
            len_bytes,
            words: words.expect("all of it was mapped read-write"),
            backed_bytes: AtomicU64::new(0),
        })
    }

    /// Gives pages of zeroes to all of its first `bytes` that have none.
    ///
    /// Past a cgroup's limit that is an OOM kill and not an error.
    ///
    /// # Errors
    ///
    /// [`RegionError::NoMemory`] when the pages cannot be had. Some may have been.
    ///
    /// # Panics
    ///
    /// Past the region's end.
    pub fn back(&self, bytes: u64) -> Result<(), RegionError> {
        assert!(bytes <= self.len_bytes(), "a region never grows");
        let backed = self.backed_bytes.load(Ordering::Relaxed);
        if backed < bytes {
            allocate(self.memfd.as_file(), backed, bytes)?;
            self.backed_bytes.store(bytes, Ordering::Relaxed);
        }
        Ok(())
    }

    /// How many of its first bytes have pages.
    pub fn backed_bytes(&self) -> u64 {
        self.backed_bytes.load(Ordering::Relaxed)
    }

    /// Opens the memory once more, read-only, for one client: see
    /// [`Region::grant`](super::Region::grant). Nobody can write through it, whatever their rights.
    ///
    /// # Errors
    ///
    /// [`RegionError::Reopen`], without `/proc` or without a free descriptor.
    pub fn grant(&self) -> Result<Grant, RegionError> {
        reopen(&self.memfd, Access::ReadOnly)
    }

    /// As [`SparseRegion::grant`], with a mark: see
    /// [`Region::grant_marked`](super::Region::grant_marked).
    ///
    /// # Errors
    ///
    /// As that.
    pub fn grant_marked(&self, mark: u64) -> Result<Grant, RegionError> {
        reopen_marked(&self.memfd, Access::ReadOnly, mark)
    }

    /// As [`Region::is_marked`](super::Region::is_marked).
    ///
    /// # Errors
    ///
    /// As that.
    pub fn is_marked(&self, mark: u64) -> io::Result<bool> {
        mark::is_set(self.memfd.as_file(), mark)
    }

    /// The daemon's own mapping of it.
    #[inline]
    pub fn words(&self) -> &SharedWords {
        &self.words
    }

    /// Its length in bytes, pages or not.
    pub fn len_bytes(&self) -> u64 {
        self.len_bytes
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd;
    use std::sync::atomic::Ordering::{Acquire, Release};

    use rustix::fs::{FallocateFlags, Mode, OFlags, fallocate, fstat, open};
    use rustix::io::Errno;

    use super::*;
    use crate::region::MapError;

    const PAGE: u64 = 4096;
    const LEN: u64 = 1024 * PAGE;

    fn region() -> SparseRegion {
        SparseRegion::create("sparse-test", LEN).unwrap()
    }

    fn backed_bytes(region: &SparseRegion) -> u64 {
        let blocks = fstat(region.memfd.as_file()).unwrap().st_blocks;
        u64::try_from(blocks).unwrap() * 512
    }

    #[test]
    fn it_has_exactly_the_pages_that_were_asked_for_although_nobody_can_map_it_writable() {
        let region = region();
        assert_eq!(backed_bytes(&region), 0);
        for bytes in [PAGE, 7 * PAGE, 3 * PAGE, LEN] {
            let before = backed_bytes(&region);
            region.back(bytes).unwrap();
            assert_eq!(backed_bytes(&region), before.max(bytes));
        }
    }

    #[test]
    fn a_reader_sees_our_words_and_can_neither_write_nor_punch_even_with_our_rights() {
        let region = region();
        region.back(PAGE).unwrap();
        region.words().word_mut(5).unwrap().store(77, Release);
        let grant = region.grant().unwrap();

        let mut memory = SharedMemory::reserve(LEN, PAGE).unwrap();
        memory
            .map_at(0, LEN, grant.as_fd(), Access::ReadOnly)
            .unwrap();
        let reader = memory.into_words(Access::ReadOnly).unwrap();

        assert_eq!(reader.cells()[5].load(Acquire), 77);
        assert!(reader.word_mut(5).is_none());
        let path = format!("/proc/self/fd/{}", grant.as_fd().as_raw_fd());
        let writable = open(path, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()).unwrap();
        let mut memory = SharedMemory::reserve(LEN, PAGE).unwrap();
        let refused = memory.map_at(0, LEN, writable.as_fd(), Access::ReadWrite);
        assert!(matches!(refused, Err(MapError::WriteSealed { .. })));
        assert_eq!(rustix::io::pwrite(&writable, b"x", 0), Err(Errno::PERM));
        let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        assert_eq!(fallocate(&writable, punch, 0, PAGE), Err(Errno::PERM));
    }

    #[test]
    fn words_end_where_the_region_ends() {
        let region = region();
        let count = region.words().cells().len();
        region.back(LEN).unwrap();

        region
            .words()
            .word_mut(count - 1)
            .unwrap()
            .store(1, Release);

        assert_eq!(region.words().cells()[count - 1].load(Acquire), 1);
        assert_eq!(count as u64 * 8, LEN);
        assert!(region.words().word_mut(count).is_none());
    }
}
