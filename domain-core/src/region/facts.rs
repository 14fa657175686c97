//! What the kernel says about a file that claims to be a memfd.

use std::io;
use std::os::fd::BorrowedFd;

use rustix::fs::{FileType, OFlags, fcntl_getfl, fstat, fstatfs};
use rustix::io::Errno;

use super::seals::Seals;

/// `f_type` of hugetlbfs. Defined here because the type of libc's constant differs between libcs.
const HUGETLBFS_MAGIC: u64 = 0x9584_58f6;

/// Facts about one open memfd.
///
/// With `seals.forbid_shrinking()`, `size_bytes` is a lower bound for ever: it was asked after the
/// seals.
#[derive(Clone, Copy, Debug)]
pub(super) struct MemfdFacts {
    pub(super) seals: Seals,
    /// Whether this description may be read, and whether it may be written.
    pub(super) readable: bool,
    pub(super) writable: bool,
    pub(super) is_regular: bool,
    pub(super) size_bytes: u64,
    pub(super) is_hugetlb: bool,
    /// The unit in which the kernel maps this file: it silently rounds lengths up to it.
    pub(super) page_bytes: u64,
}

#[derive(Debug)]
pub(super) enum InspectError {
    /// The file is of a kind that has no seals: a regular file, a pipe, an `O_PATH` handle, secret
    /// memory.
    NotAMemfd,
    Io(io::Error),
}

impl<E: Into<io::Error>> From<E> for InspectError {
    fn from(error: E) -> Self {
        InspectError::Io(error.into())
    }
}

/// Asks the seals first: only memfds answer, without calling into any file system, so that none of
/// the later questions can block on a hostile one (FUSE).
pub(super) fn inspect(fd: BorrowedFd<'_>) -> Result<MemfdFacts, InspectError> {
    let seals = match Seals::of(fd) {
        Err(Errno::INVAL | Errno::BADF) => return Err(InspectError::NotAMemfd),
        answer => answer?,
    };
    let (readable, writable) = open_mode(fd)?;
    let stat = fstat(fd)?;
    let fs = fstatfs(fd)?;
    Ok(MemfdFacts {
        seals,
        readable,
        writable,
        is_regular: FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile,
        size_bytes: u64::try_from(stat.st_size).unwrap_or(0),
        is_hugetlb: u64::try_from(fs.f_type).is_ok_and(|magic| magic == HUGETLBFS_MAGIC),
        page_bytes: u64::try_from(fs.f_bsize).map_err(io::Error::other)?,
    })
}

/// (readable, writable). Access mode 3 is a Linux oddity that allows neither.
fn open_mode(fd: BorrowedFd<'_>) -> Result<(bool, bool), Errno> {
    let mode = fcntl_getfl(fd)? & OFlags::ACCMODE;
    Ok((
        mode == OFlags::RDONLY || mode == OFlags::RDWR,
        mode == OFlags::WRONLY || mode == OFlags::RDWR,
    ))
}
