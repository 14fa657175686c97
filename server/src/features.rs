//! What the kernel offers, probed once at start. What is missing puts the
//! daemon in a stricter mode, and shows in `GetInfo`.

use std::os::fd::AsFd;

use rustix::fs::{MemfdFlags, fstatfs, memfd_create};
use rustix::net::{AddressFamily, SocketFlags, SocketType};
use rustix::process::{PidfdFlags, getpid, pidfd_open};

use crate::peer::peer_pidfd;
use crate::rights::pass_fds;

/// `f_type` of the filesystem that pidfds live on since Linux 6.9
/// (`PID_FS_MAGIC` of linux/magic.h).
const PID_FS_MAGIC: i128 = 0x5049_4446;

/// Kernel features that the daemon makes use of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Features {
    /// memfds that can never become executable (Linux 6.3).
    pub memfd_noexec_seal: bool,
    /// The peer's pidfd at accept (Linux 6.5). Without it a session ends with
    /// its connection only.
    pub peer_pidfd: bool,
    /// Sockets that take no fds (Linux 6.16). Without it a client that may
    /// connect can have hostile files closed by the daemon.
    pub pass_rights_off: bool,
    /// pidfds with inodes of their own (Linux 6.9). Without them processes are
    /// told apart by pid and start time.
    pub pidfd_inode: bool,
}

impl Features {
    /// Asks the kernel.
    #[must_use]
    pub fn probe() -> Features {
        Features {
            memfd_noexec_seal: has_noexec_seal(),
            peer_pidfd: has_peer_pidfd(),
            pass_rights_off: has_pass_rights(),
            pidfd_inode: has_pidfd_inode(),
        }
    }
}

fn has_noexec_seal() -> bool {
    memfd_create("probe", MemfdFlags::CLOEXEC | MemfdFlags::NOEXEC_SEAL).is_ok()
}

fn has_peer_pidfd() -> bool {
    let pair = rustix::net::socketpair(
        AddressFamily::UNIX,
        SocketType::STREAM,
        SocketFlags::CLOEXEC,
        None,
    );
    pair.is_ok_and(|(left, _right)| peer_pidfd(left.as_fd()).is_ok())
}

fn has_pass_rights() -> bool {
    let socket = rustix::net::socket_with(
        AddressFamily::UNIX,
        SocketType::STREAM,
        SocketFlags::CLOEXEC,
        None,
    );
    socket.is_ok_and(|socket| pass_fds(socket, false).is_ok())
}

fn has_pidfd_inode() -> bool {
    let pidfd = pidfd_open(getpid(), PidfdFlags::empty());
    pidfd.is_ok_and(|pidfd| fstatfs(pidfd).is_ok_and(|fs| i128::from(fs.f_type) == PID_FS_MAGIC))
}
