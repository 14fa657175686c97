//! Whether a socket takes file descriptors at all.
//!
//! Whoever closes the last reference to a hostile file may be held up for as
//! long as that file likes (a lingering TCP socket, FUSE), and a received fd
//! that nobody wanted is closed by its receiver. So nobody may send one to a
//! socket that has no use for it: not on gRPC, and not on the fd socket before
//! the sender is attached.

#![allow(
    unsafe_code,
    reason = "no crate has a safe setter for SO_PASSRIGHTS; the one other home is the mapping of regions"
)]

use std::io;
use std::os::fd::{AsFd, AsRawFd};

/// asm-generic/socket.h; newer than libc's list.
const SO_PASSRIGHTS: libc::c_int = 83;

/// Lets fds through, or makes sending one fail with EPERM. Sockets that a
/// listener accepts begin as the listener is.
///
/// # Errors
/// `ENOPROTOOPT` before Linux 6.16, where they are always let through.
pub(crate) fn pass_fds(socket: impl AsFd, pass: bool) -> io::Result<()> {
    let value = libc::c_int::from(pass);
    let socket = socket.as_fd().as_raw_fd();
    // SAFETY: the pointer is to a live c_int and the length is its size, which
    // is what the kernel reads for this option; it keeps neither.
    let set = unsafe {
        libc::setsockopt(
            socket,
            libc::SOL_SOCKET,
            SO_PASSRIGHTS,
            (&raw const value).cast(),
            4,
        )
    };
    if set == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::features::Features;
    use rustix::net::{
        AddressFamily, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketAddrUnix,
        SocketFlags, SocketType,
    };
    use std::mem::MaybeUninit;
    use std::os::fd::OwnedFd;

    fn send_fd(socket: &OwnedFd) -> rustix::io::Result<usize> {
        let fds = [socket.as_fd()];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        assert!(control.push(SendAncillaryMessage::ScmRights(&fds)));
        let bytes = [io::IoSlice::new(b"x")];
        rustix::net::sendmsg(socket, &bytes, &mut control, SendFlags::NOSIGNAL)
    }

    #[test]
    fn a_socket_that_takes_no_fds_makes_sending_one_fail() {
        let dir = tempfile::tempdir_in("/tmp").unwrap();
        let address = SocketAddrUnix::new(dir.path().join("s")).unwrap();
        let socket = || {
            rustix::net::socket_with(
                AddressFamily::UNIX,
                SocketType::SEQPACKET,
                SocketFlags::CLOEXEC,
                None,
            )
        };
        let listener = socket().unwrap();
        let refused = pass_fds(&listener, false);
        if !Features::probe().pass_rights_off {
            assert_eq!(refused.unwrap_err().raw_os_error(), Some(libc::ENOPROTOOPT));
            return;
        }
        refused.unwrap();
        rustix::net::bind(&listener, &address).unwrap();
        rustix::net::listen(&listener, 1).unwrap();
        let client = socket().unwrap();
        rustix::net::connect(&client, &address).unwrap();

        // Also before it is accepted.
        assert_eq!(send_fd(&client), Err(rustix::io::Errno::PERM));
        let accepted = rustix::net::accept(&listener).unwrap();
        assert_eq!(send_fd(&client), Err(rustix::io::Errno::PERM));
        pass_fds(&accepted, true).unwrap();
        assert_eq!(send_fd(&client), Ok(1));
    }
}
