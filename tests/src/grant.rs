//! What can be done with the fd of a region, tried out.

use std::fs::Permissions;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileExt, PermissionsExt};

use domain_core::region::{Access, SharedMemory};
use rustix::fs::{FallocateFlags, Mode, OFlags, SealFlags};
use serde::{Deserialize, Serialize};

use crate::files;

/// What an fd is, and what its holder can do with it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)] // the names are the docs
pub struct Report {
    pub inode: u64,
    pub owner_uid: u32,
    pub permissions: u32,
    pub size_bytes: u64,
    pub seals: u32,
    pub opened_read_only: bool,
    pub writes: bool,
    pub maps_writable: bool,
    pub punches: bool,
    pub shrinks: bool,
    pub grows: bool,
    pub seals_further: bool,
    pub becomes_executable: bool,
    pub opens_to_everybody: bool,
    pub reopens_for_reading: bool,
    pub reopens_for_writing: bool,
}

/// Tries everything. What succeeds is undone where that can be.
///
/// # Panics
/// If the fd is no memfd.
#[must_use]
pub fn inspect(fd: &OwnedFd) -> Report {
    let stat = rustix::fs::fstat(fd).expect("fstat");
    let size_bytes = u64::try_from(stat.st_size).expect("a size");
    let seals = rustix::fs::fcntl_get_seals(fd).expect("F_GET_SEALS");
    let flags = rustix::fs::fcntl_getfl(fd).expect("F_GETFL");
    let file = std::fs::File::from(fd.as_fd().try_clone_to_owned().expect("dup"));
    let last = size_bytes - 1;
    let byte = files::peek(fd, last, 1);
    let may = |mode| file.set_permissions(Permissions::from_mode(mode)).is_ok();
    let reopens = |flags| {
        rustix::fs::open(files::proc_path(fd), flags | OFlags::CLOEXEC, Mode::empty()).is_ok()
    };
    Report {
        inode: stat.st_ino,
        owner_uid: stat.st_uid,
        permissions: stat.st_mode & 0o7777,
        size_bytes,
        seals: seals.bits(),
        opened_read_only: flags & OFlags::RWMODE == OFlags::RDONLY,
        writes: file.write_all_at(&byte, last).is_ok(),
        maps_writable: maps_writable(fd),
        punches: punches(fd, last),
        shrinks: file.set_len(last).is_ok(),
        grows: file.set_len(size_bytes + 1).is_ok(),
        seals_further: rustix::fs::fcntl_add_seals(fd, SealFlags::FUTURE_WRITE).is_ok(),
        becomes_executable: may(0o700),
        opens_to_everybody: rustix::process::geteuid().as_raw() != stat.st_uid && may(0o666),
        reopens_for_reading: reopens(OFlags::RDONLY),
        reopens_for_writing: reopens(OFlags::RDWR),
    }
}

fn maps_writable(fd: &OwnedFd) -> bool {
    let mut memory = SharedMemory::reserve(4096, 4096).expect("addresses");
    memory
        .map_at(0, 4096, fd.as_fd(), Access::ReadWrite)
        .is_ok()
}

/// The last byte, which nobody uses.
fn punches(fd: &OwnedFd, at: u64) -> bool {
    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    rustix::fs::fallocate(fd, flags, at, 1).is_ok()
}
