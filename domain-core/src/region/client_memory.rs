//! Memory that a client registers.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::fs::{Mode, OFlags, fstat, open};
use rustix::io::Errno;

use super::facts::{InspectError, MemfdFacts, inspect};
use super::pieces::Access;
use super::seals::Seals;

/// A client's memfd, checked. The daemon copies from and to it with `pread` and `pwritev2` and
/// never maps it.
///
/// The description is shared with the client, who may change its flags and offset at any time: use
/// neither. The client may also punch holes, which read as zeroes, and seal it against writing,
/// which makes our writes fail.
#[derive(Debug)]
pub struct ClientMemory {
    fd: OwnedFd,
    /// The size when it was accepted. It is sealed against shrinking, so at least so much is there
    /// for ever.
    size_bytes: u64,
    writable: bool,
    hugetlb: bool,
}

/// Why a client's file was not accepted. It has been closed.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)] // the messages are the docs
pub enum MemoryRefused {
    #[error("not a memfd")]
    NotAMemfd,
    #[error("the memfd must be sealed against shrinking (its seals: {seals})")]
    NotSealedAgainstShrinking { seals: Seals },
    #[error("not a regular file")]
    NotAFile,
    #[error("the memfd is empty")]
    Empty,
    #[error("the memfd was opened without read access")]
    NotReadable,
    #[error("the memfd was opened without write access, and is to be used writable")]
    NotWritable,
    #[error("the memfd is sealed against writing, and is to be used writable (its seals: {seals})")]
    WriteSealed { seals: Seals },
    #[error("inspect the memfd")]
    Io(#[source] io::Error),
}

/// A client's memory, opened for another client.
#[derive(Debug)]
pub struct SharedFile {
    /// What is sent.
    pub fd: OwnedFd,
    /// It can be written through.
    pub writable: bool,
    /// Who may open it for writing, whatever it was opened for here.
    pub owner_uid: u32,
    /// Everybody may who is in its group, or everybody.
    pub others_may_write: bool,
}

/// Why a client's memory was not opened for another one.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)] // the messages are the docs
pub enum ShareError {
    #[error("the memory's mode {mode:#o} does not let the daemon open it for another client")]
    Mode { mode: u32 },
    #[error("open the memory once more")]
    NoDescriptor(#[source] io::Error),
}

/// Why a span is not part of a client's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs)] // the messages are the docs
pub enum SpanError {
    #[error("{len} bytes at offset {offset} do not lie inside the memory of {size} bytes")]
    OutsideMemory { offset: u64, len: u64, size: u64 },
    #[error("a span of 0 bytes")]
    Empty,
}

impl From<InspectError> for MemoryRefused {
    fn from(error: InspectError) -> Self {
        match error {
            InspectError::NotAMemfd => MemoryRefused::NotAMemfd,
            InspectError::Io(source) => MemoryRefused::Io(source),
        }
    }
}

impl ClientMemory {
    /// Checks a file that a client has sent, and takes it. `writable`: the daemon shall also write
    /// to it.
    ///
    /// The seals are asked first, before anything that could block on a hostile file.
    ///
    /// # Errors
    ///
    /// When it is not a memfd, could shrink, is empty, or does not permit what `writable` says.
    pub fn accept(fd: OwnedFd, writable: bool) -> Result<ClientMemory, MemoryRefused> {
        let facts = inspect(fd.as_fd())?;
        check(&facts, writable)?;
        Ok(ClientMemory {
            fd,
            size_bytes: facts.size_bytes,
            writable,
            hugetlb: facts.is_hugetlb,
        })
    }

    /// Opens the memory once more, for another client: for reading, or, if it was accepted to be
    /// written, as `access` says.
    ///
    /// A description of its own, unless the file's mode forbids us to open it for writing: then it
    /// is the one that was registered, whose flags and offset both clients can change. Neither is
    /// ever used here.
    ///
    /// # Errors
    ///
    /// [`ShareError`], when the mode does not let us read it, or without a free descriptor.
    pub fn share(&self, access: Access) -> Result<SharedFile, ShareError> {
        let stat = fstat(&self.fd).map_err(|errno| ShareError::NoDescriptor(errno.into()))?;
        let facts = |fd, writable| SharedFile {
            fd,
            writable,
            owner_uid: stat.st_uid,
            others_may_write: stat.st_mode & 0o022 != 0,
        };
        let for_writing = access == Access::ReadWrite && self.writable;
        let mode = if for_writing {
            OFlags::RDWR
        } else {
            OFlags::RDONLY
        };
        let path = format!("/proc/self/fd/{}", self.fd.as_raw_fd());
        match open(path, mode | OFlags::CLOEXEC, Mode::empty()) {
            Ok(fd) => Ok(facts(fd, for_writing)),
            Err(Errno::ACCESS | Errno::PERM) if for_writing => {
                let same = self.fd.try_clone().map_err(ShareError::NoDescriptor)?;
                Ok(facts(same, true))
            }
            Err(Errno::ACCESS | Errno::PERM) => Err(ShareError::Mode {
                mode: stat.st_mode & 0o7777,
            }),
            Err(errno) => Err(ShareError::NoDescriptor(errno.into())),
        }
    }

    /// Refuses spans that are empty or do not lie wholly inside the memory.
    ///
    /// # Errors
    ///
    /// The numbers, when it does not.
    pub fn check_span(&self, offset: u64, len: u64) -> Result<(), SpanError> {
        if len == 0 {
            return Err(SpanError::Empty);
        }
        match offset.checked_add(len) {
            Some(end) if end <= self.size_bytes => Ok(()),
            _ => Err(SpanError::OutsideMemory {
                offset,
                len,
                size: self.size_bytes,
            }),
        }
    }

    /// Its size in bytes when it was accepted. It may have grown since; what was added is not part
    /// of it.
    pub fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    /// Whether it was accepted to be written.
    pub fn is_writable(&self) -> bool {
        self.writable
    }

    /// Whether it has huge pages. Such memory can be mapped by peers, but the kernel does not write
    /// to it for us.
    pub fn is_hugetlb(&self) -> bool {
        self.hugetlb
    }
}

impl AsFd for ClientMemory {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

fn check(facts: &MemfdFacts, writable: bool) -> Result<(), MemoryRefused> {
    let seals = facts.seals;
    if !seals.forbid_shrinking() {
        return Err(MemoryRefused::NotSealedAgainstShrinking { seals });
    }
    if !facts.is_regular {
        return Err(MemoryRefused::NotAFile);
    }
    if facts.size_bytes == 0 {
        return Err(MemoryRefused::Empty);
    }
    if !facts.readable {
        return Err(MemoryRefused::NotReadable);
    }
    if writable && !facts.writable {
        return Err(MemoryRefused::NotWritable);
    }
    if writable && seals.forbid_writing() {
        return Err(MemoryRefused::WriteSealed { seals });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::fd::AsRawFd;

    use rustix::fs::{
        MemfdFlags, Mode, OFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create, open,
    };
    use rustix::pipe::pipe;

    use super::*;
    use crate::region::driver_memfd;

    const LEN: u64 = 3 * 4096;

    fn good() -> OwnedFd {
        driver_memfd("client-test", LEN).unwrap()
    }

    fn memfd(flags: MemfdFlags, len: u64, seals: SealFlags) -> OwnedFd {
        let fd = memfd_create(
            "client-test",
            flags | MemfdFlags::ALLOW_SEALING | MemfdFlags::CLOEXEC,
        )
        .unwrap();
        ftruncate(&fd, len).unwrap();
        fcntl_add_seals(&fd, seals).unwrap();
        fd
    }

    fn reopened(fd: &OwnedFd, mode: OFlags) -> OwnedFd {
        open(
            format!("/proc/self/fd/{}", fd.as_raw_fd()),
            mode | OFlags::CLOEXEC,
            Mode::empty(),
        )
        .unwrap()
    }

    fn refusal(fd: OwnedFd, writable: bool) -> MemoryRefused {
        ClientMemory::accept(fd, writable).unwrap_err()
    }

    #[test]
    fn a_driver_memfd_is_accepted_for_reading_and_for_writing() {
        for writable in [false, true] {
            let memory = ClientMemory::accept(good(), writable).unwrap();

            assert_eq!(memory.size_bytes(), LEN);
            assert_eq!(memory.is_writable(), writable);
            assert!(!memory.is_hugetlb());
        }
    }

    #[test]
    fn files_that_are_no_memfds_are_refused_as_such() {
        let regular = tempfile::tempfile().unwrap();
        regular.set_len(LEN).unwrap();
        let (read_end, write_end) = pipe().unwrap();
        let directory = File::open("/proc/self").unwrap();
        let path_only = reopened(&good(), OFlags::PATH);

        for fd in [
            regular.into(),
            read_end,
            write_end,
            directory.into(),
            path_only,
        ] {
            let refused = refusal(fd, false);
            assert!(matches!(refused, MemoryRefused::NotAMemfd), "{refused}");
        }
    }

    /// A file in a tmpfs has seals, but only the one against further sealing.
    #[test]
    fn a_file_in_dev_shm_is_refused_because_it_could_shrink() {
        let Ok(file) = tempfile::tempfile_in("/dev/shm") else {
            return;
        };
        file.set_len(LEN).unwrap();

        let refused = refusal(file.into(), false);

        assert_eq!(
            refused.to_string(),
            "the memfd must be sealed against shrinking (its seals: seal)"
        );
    }

    #[test]
    fn a_memfd_that_could_shrink_is_refused_with_the_seals_it_has() {
        let refused = refusal(
            memfd(MemfdFlags::empty(), LEN, SealFlags::GROW | SealFlags::SEAL),
            false,
        );

        let MemoryRefused::NotSealedAgainstShrinking { seals } = refused else {
            panic!("{refused}")
        };
        assert_eq!(
            seals.bits() & (SealFlags::GROW | SealFlags::SHRINK).bits(),
            SealFlags::GROW.bits()
        );
    }

    #[test]
    fn an_empty_memfd_is_refused() {
        let refused = refusal(
            memfd(MemfdFlags::empty(), 0, SealFlags::SHRINK | SealFlags::GROW),
            false,
        );

        assert!(matches!(refused, MemoryRefused::Empty), "{refused}");
    }

    #[test]
    fn a_write_only_description_is_refused() {
        for writable in [false, true] {
            let refused = refusal(reopened(&good(), OFlags::WRONLY), writable);
            assert!(matches!(refused, MemoryRefused::NotReadable), "{refused}");
        }
    }

    #[test]
    fn a_read_only_description_is_accepted_for_reading_alone() {
        let refused = refusal(reopened(&good(), OFlags::RDONLY), true);
        assert!(matches!(refused, MemoryRefused::NotWritable), "{refused}");

        assert!(ClientMemory::accept(reopened(&good(), OFlags::RDONLY), false).is_ok());
    }

    #[test]
    fn memory_sealed_against_writing_is_accepted_for_reading_alone() {
        for seal in [SealFlags::WRITE, SealFlags::FUTURE_WRITE] {
            let sealed = || memfd(MemfdFlags::empty(), LEN, SealFlags::SHRINK | seal);

            let refused = refusal(sealed(), true);

            assert!(
                matches!(refused, MemoryRefused::WriteSealed { .. }),
                "{refused}"
            );
            assert!(ClientMemory::accept(sealed(), false).is_ok());
        }
    }

    /// Sparse: no huge page is needed to have a hugetlb file.
    #[test]
    fn hugetlb_memory_is_accepted_and_says_so() {
        let flags = MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB;
        if memfd_create("client-probe", flags).is_err() {
            return; // no such pages in this kernel
        }

        let memory = ClientMemory::accept(memfd(flags, 2 << 20, SealFlags::SHRINK), true).unwrap();

        assert!(memory.is_hugetlb());
        assert_eq!(memory.size_bytes(), 2 << 20);
    }

    #[test]
    fn a_refused_file_is_closed() {
        let (read_end, write_end) = pipe().unwrap();

        refusal(read_end, false);

        // SIGPIPE is ignored in Rust programs; nobody can read any more.
        assert_eq!(
            rustix::io::write(&write_end, b"x"),
            Err(rustix::io::Errno::PIPE)
        );
    }

    #[test]
    fn spans_may_reach_exactly_to_the_end() {
        let memory = ClientMemory::accept(good(), false).unwrap();

        assert_eq!(memory.check_span(0, LEN), Ok(()));
        assert_eq!(memory.check_span(LEN - 1, 1), Ok(()));
        for (offset, len) in [
            (0, LEN + 1),
            (LEN - 1, 2),
            (LEN, 1),
            (u64::MAX, 1),
            (1, u64::MAX),
            (u64::MAX, u64::MAX),
        ] {
            let outside = SpanError::OutsideMemory {
                offset,
                len,
                size: LEN,
            };
            assert_eq!(memory.check_span(offset, len), Err(outside));
        }
    }

    #[test]
    fn an_empty_span_is_refused_wherever_it_is() {
        let memory = ClientMemory::accept(good(), false).unwrap();

        for offset in [0, LEN, u64::MAX] {
            assert_eq!(memory.check_span(offset, 0), Err(SpanError::Empty));
        }
    }

    #[test]
    fn memory_that_grows_later_keeps_the_size_it_was_accepted_with() {
        let fd = memfd(MemfdFlags::empty(), LEN, SealFlags::SHRINK);
        let memory = ClientMemory::accept(fd, false).unwrap();

        ftruncate(&memory, 2 * LEN).unwrap();

        assert_eq!(memory.size_bytes(), LEN);
        assert!(memory.check_span(LEN, 1).is_err());
    }
}
