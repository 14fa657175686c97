//! Files of every kind that somebody may pass as memory.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;

use rustix::fs::{MemfdFlags, Mode, OFlags, SealFlags};

/// What a memory must be sealed against.
pub const GOOD_SEALS: SealFlags = SealFlags::SHRINK;

/// A memfd of so many bytes with these seals.
///
/// # Panics
/// If the kernel does not give one.
#[must_use]
pub fn memfd(len_bytes: u64, seals: SealFlags) -> OwnedFd {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let fd = rustix::fs::memfd_create("domaind-tests", flags).expect("memfd_create");
    rustix::fs::ftruncate(&fd, len_bytes).expect("ftruncate");
    rustix::fs::fcntl_add_seals(&fd, seals).expect("F_ADD_SEALS");
    fd
}

/// Memory that must be accepted.
#[must_use]
pub fn good_memfd(len_bytes: u64) -> OwnedFd {
    memfd(len_bytes, GOOD_SEALS)
}

/// A memfd on huge pages, which may be made even if there are none.
///
/// # Panics
/// If the kernel knows no huge pages.
#[must_use]
pub fn huge_memfd(len_bytes: u64) -> Option<OwnedFd> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING | MemfdFlags::HUGE_2MB;
    let flags = flags | MemfdFlags::HUGETLB;
    let fd = rustix::fs::memfd_create("domaind-tests-huge", flags).ok()?;
    rustix::fs::ftruncate(&fd, len_bytes).ok()?;
    rustix::fs::fcntl_add_seals(&fd, GOOD_SEALS).ok()?;
    Some(fd)
}

/// The same file through another open description, with other rights.
///
/// # Panics
/// If it cannot be opened.
#[must_use]
pub fn reopen(fd: impl AsFd, flags: OFlags) -> OwnedFd {
    let path = proc_path(fd);
    rustix::fs::open(path, flags | OFlags::CLOEXEC, Mode::empty()).expect("reopening")
}

/// A path that leads to what an fd of this process refers to.
#[must_use]
pub fn proc_path(fd: impl AsFd) -> String {
    format!("/proc/self/fd/{}", fd.as_fd().as_raw_fd())
}

/// Reads `len` bytes at `offset`.
///
/// # Panics
/// If they are not there.
#[must_use]
pub fn peek(fd: impl AsFd, offset: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    file(fd).read_exact_at(&mut bytes, offset).expect("pread");
    bytes
}

/// Writes bytes at `offset`.
///
/// # Panics
/// If the file does not take them.
pub fn poke(fd: impl AsFd, offset: u64, bytes: &[u8]) {
    file(fd).write_all_at(bytes, offset).expect("pwrite");
}

fn file(fd: impl AsFd) -> File {
    File::from(fd.as_fd().try_clone_to_owned().expect("dup"))
}

/// Open fds of this process that refer to memfds of the daemon or of these
/// tests.
///
/// # Panics
/// Without /proc.
#[must_use]
pub fn own_memfds() -> usize {
    let fds = std::fs::read_dir("/proc/self/fd").expect("/proc is there");
    let links = fds
        .flatten()
        .filter_map(|fd| std::fs::read_link(fd.path()).ok());
    links
        .filter(|link| link.to_string_lossy().starts_with("/memfd:"))
        .count()
}

/// Bytes that differ from place to place, so that a shift is seen.
#[must_use]
pub fn pattern(seed: u64, len: usize) -> Vec<u8> {
    // xorshift64*; a seed of 0 would stay 0.
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let next = std::iter::repeat_with(|| {
        state ^= state >> 12;
        state ^= state << 25;
        state ^= state >> 27;
        state.wrapping_mul(0x2545_f491_4f6c_dd1d).to_be_bytes()[0]
    });
    next.take(len).collect()
}

/// Where `needle` lies in `hay`.
#[must_use]
pub fn position(hay: &[u8], needle: &[u8]) -> Option<usize> {
    hay.windows(needle.len())
        .position(|window| window == needle)
}
