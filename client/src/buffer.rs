//! Memory of a driver's own, registered and at hand.

use std::os::fd::{AsFd, OwnedFd};

use domain_core::addr::Granule;
use domain_core::region::{Access, AccessError, RegionError, SharedMemory, driver_memfd};
use domaind_proto::v1;

use crate::error::Error;
use crate::memory::Memory;
use crate::session::Session;
use crate::undo::Guard;

/// Memory that a driver fills and reads here, and maps through the daemon.
/// Devices never see it, only the copies that streaming mappings show, and what
/// of it is mapped directly.
///
/// Dropping it gives the registration back, in the background, as soon as no
/// mapping uses it any more.
#[derive(Debug)]
pub struct Buffer {
    memory: Memory,
    local: SharedMemory,
    _registration: Guard,
}

impl Session {
    /// Makes a buffer of zeroes, of `len_bytes` rounded up to 4 KiB, and
    /// registers it writable. For drivers. Its pages are allocated here and
    /// charged to this process.
    ///
    /// If this is cancelled, nothing stays of it.
    ///
    /// # Errors
    /// [`Error::Buffer`] when the memory cannot be had, else as
    /// [`Session::register`].
    pub async fn buffer(&self, len_bytes: u64) -> Result<Buffer, Error> {
        // Allocating pages takes about a millisecond for each 4 MiB.
        let made = self.inner.finish_blocking(move || make(len_bytes)).await?;
        let (memfd, local) = made.map_err(|cause| Error::Buffer { len_bytes, cause })?;
        // Not persistent: that would outlive this process and its view.
        let spec = v1::RegisterMemory {
            writable: true,
            persistent: false,
        };
        let (memory, registration) = self.register_guarded(memfd, spec).await?;
        Ok(Buffer {
            memory,
            local,
            _registration: registration,
        })
    }
}

impl Buffer {
    /// The registration, whose id goes into [`MapSpec`](crate::MapSpec).
    #[must_use]
    pub fn memory(&self) -> Memory {
        self.memory
    }

    /// Its length in bytes, whole pages of 4 KiB.
    #[must_use]
    pub fn len_bytes(&self) -> u64 {
        self.local.len_bytes()
    }

    /// Writes `from` into the buffer at `offset`. Threads must not write the
    /// same bytes at the same time.
    ///
    /// # Errors
    /// [`AccessError`] if it does not fit; nothing is written.
    pub fn copy_in(&self, offset: u64, from: &[u8]) -> Result<(), AccessError> {
        self.local.copy_in(offset, from)
    }

    /// Reads `into.len()` bytes of the buffer at `offset`.
    ///
    /// # Errors
    /// [`AccessError`] if there are not so many; nothing is read.
    pub fn copy_out(&self, offset: u64, into: &mut [u8]) -> Result<(), AccessError> {
        self.local.copy_out(offset, into)
    }
}

/// A memfd, and this process's view of it.
fn make(len_bytes: u64) -> Result<(OwnedFd, SharedMemory), RegionError> {
    // What cannot be rounded up is refused by its unrounded length.
    let len_bytes = Granule::Size4K.round_up(len_bytes).unwrap_or(len_bytes);
    let memfd = driver_memfd("domaind-buffer", len_bytes)?;
    let page = u64::try_from(rustix::param::page_size()).unwrap_or(len_bytes);
    let mut local = SharedMemory::reserve(len_bytes, page)?;
    local.map_at(0, len_bytes, memfd.as_fd(), Access::ReadWrite)?;
    Ok((memfd, local))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_buffer_is_whole_pages_of_zeroes_and_what_is_written_is_read() {
        let (_memfd, local) = make(4097).unwrap();

        assert_eq!(local.len_bytes(), 8192);
        local.copy_in(4095, b"ab").unwrap();
        let mut bytes = [0xff; 4];
        local.copy_out(4094, &mut bytes).unwrap();
        assert_eq!(&bytes, b"\0ab\0");
    }

    #[test]
    fn a_buffer_of_nothing_or_of_everything_is_refused() {
        for len_bytes in [0, u64::MAX] {
            let refused = make(len_bytes).unwrap_err();
            assert!(
                matches!(refused, RegionError::BadLength { .. }),
                "{refused}"
            );
        }
    }
}
