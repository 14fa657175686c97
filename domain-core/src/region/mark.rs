//! Who still holds a grant: a lock that lives as long as the file description.
//!
//! A lock of an *open file description* (`F_OFD_SETLK`) goes when the last reference to the
//! description goes: every descriptor of it in every process, those on their way through a socket,
//! and every mapping made through it. So one that is set before a grant leaves this process, on a
//! byte that stands for its session, tells for as long as it is there that somebody may still reach
//! the memory through that grant, the session's children included. Whoever holds the grant can also
//! unlock it: it is proof among the honest.

use std::io;
use std::os::fd::AsFd;

use nix::fcntl::{FcntlArg, fcntl};

/// Marks a description that nobody else has yet.
pub(super) fn set(description: impl AsFd, mark: u64) -> io::Result<()> {
    // A read lock: that is what a read-only description can have.
    let lock = byte(mark, libc::F_RDLCK)?;
    fcntl(description, FcntlArg::F_OFD_SETLK(&lock))?;
    Ok(())
}

/// Is there another description of the same file with that mark?
pub(super) fn is_set(original: impl AsFd, mark: u64) -> io::Result<bool> {
    let mut lock = byte(mark, libc::F_WRLCK)?;
    fcntl(original, FcntlArg::F_OFD_GETLK(&mut lock))?;
    Ok(i32::from(lock.l_type) != libc::F_UNLCK)
}

/// A lock of the byte at `mark`, which need not lie inside the file.
fn byte(mark: u64, kind: i32) -> io::Result<libc::flock> {
    let kind = libc::c_short::try_from(kind).map_err(io::Error::other)?;
    Ok(libc::flock {
        l_type: kind,
        l_whence: libc::c_short::try_from(libc::SEEK_SET).map_err(io::Error::other)?,
        l_start: i64::try_from(mark).map_err(io::Error::other)?,
        l_len: 1,
        l_pid: 0,
    })
}
