//! Who is at the other end of a socket, as the kernel says. Nothing that a
//! client sends is believed about it.

use std::fmt;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use domaind_proto::v1;
use nix::sys::socket::{getsockopt, sockopt};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::fstat;

use crate::features::Features;
use crate::placement::{Placement, PodUid};
use crate::proc;

/// Capabilities (linux/capability.h) each of which undoes a read-only grant:
/// `DAC_OVERRIDE` opens any file for writing, `FOWNER` changes its mode,
/// `SETUID` becomes its owner, `SYS_PTRACE` and `SYS_ADMIN` reach into us.
const CAPABILITIES_THAT_UNDO: [u32; 5] = [1, 3, 7, 19, 21];

/// A process, pinned when it connected.
#[derive(Debug)]
pub(crate) struct Peer {
    pid: i32,
    uid: u32,
    gid: u32,
    /// Refers to that process even when its pid is used by another one.
    /// `None` where the kernel has no such thing.
    pidfd: Option<OwnedFd>,
    mark: Mark,
    /// `None` where it cannot be said, as for a process that is not to be seen
    /// from here.
    placement: Option<Placement>,
    attested: bool,
}

/// What tells two processes apart that had the same pid one after the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mark {
    /// Inode of the pidfd: unique until the node reboots.
    Inode(u64),
    /// Start time in clock ticks.
    StartTime(u64),
}

impl Peer {
    /// Who connected at the other end of `socket`.
    ///
    /// # Errors
    /// If the kernel does not say it any more: the peer has died meanwhile, or
    /// cannot be seen from here.
    pub(crate) fn of(socket: BorrowedFd<'_>, features: Features) -> io::Result<Peer> {
        // nix, not rustix: rustix's pid type has no 0, and 0 is what the kernel
        // says of a peer in a pid namespace that cannot be seen from here.
        let credentials = getsockopt(&socket, sockopt::PeerCredentials)?;
        let (pid, uid, gid) = (credentials.pid(), credentials.uid(), credentials.gid());
        let pidfd = if features.peer_pidfd {
            Some(peer_pidfd(socket)?)
        } else {
            None
        };
        let mark = match &pidfd {
            Some(pidfd) if features.pidfd_inode => Mark::Inode(fstat(pidfd)?.st_ino),
            _ if pid == 0 => Mark::StartTime(0),
            _ => Mark::StartTime(proc::start_time(pid)?),
        };
        let mut peer = Peer {
            pid,
            uid,
            gid,
            pidfd,
            mark,
            placement: None,
            attested: false,
        };
        let placement = Placement::of(pid, uid, gid);
        // What was read must have been this process, not the next with its pid.
        peer.placement = placement.filter(|_| !peer.is_dead());
        peer.attested = pid > 0 && uid != proc::overflow_uid() && peer.placement.is_some();
        Ok(peer)
    }

    pub(crate) fn pid(&self) -> i32 {
        self.pid
    }

    pub(crate) fn uid(&self) -> u32 {
        self.uid
    }

    pub(crate) fn gid(&self) -> u32 {
        self.gid
    }

    /// The pod that it runs in.
    pub(crate) fn pod(&self) -> Option<PodUid> {
        self.placement.as_ref()?.pod
    }

    /// The container that it runs in.
    pub(crate) fn container(&self) -> Option<&str> {
        self.placement.as_ref()?.container.as_deref()
    }

    /// The systemd unit that it belongs to; never in a pod.
    pub(crate) fn unit(&self) -> Option<&str> {
        self.placement.as_ref()?.unit.as_deref()
    }

    /// Is it in this group, by whichever of its groups?
    pub(crate) fn is_in_group(&self, gid: u32) -> bool {
        let further = self.placement.as_ref();
        self.gid == gid || further.is_some_and(|placement| placement.groups.contains(&gid))
    }

    /// Could the kernel say who it is and where it runs? It cannot across user
    /// and pid namespaces, and of nobody who is not to be seen in `/proc`.
    pub(crate) fn is_attested(&self) -> bool {
        self.attested
    }

    /// Is it the same process, not only the same pid?
    pub(crate) fn is_same_process(&self, other: &Peer) -> bool {
        (self.pid, self.uid, self.gid, self.mark) == (other.pid, other.uid, other.gid, other.mark)
    }

    /// Has the process ended? Its connections may outlive it in a child.
    pub(crate) fn is_dead(&self) -> bool {
        let Some(pidfd) = &self.pidfd else {
            let now = proc::start_time(self.pid).map(Mark::StartTime);
            return now.ok() != Some(self.mark);
        };
        let mut ready = [PollFd::new(pidfd, PollFlags::IN)];
        // A pidfd becomes readable when its process ends.
        poll(
            &mut ready,
            Some(&Timespec {
                tv_sec: 0,
                tv_nsec: 0,
            }),
        )
        .is_ok_and(|count| count > 0)
    }

    /// A second handle to wait for its end; `None` where the kernel has none.
    pub(crate) fn pidfd(&self) -> Option<io::Result<OwnedFd>> {
        self.pidfd
            .as_ref()
            .map(|pidfd| pidfd.as_fd().try_clone_to_owned())
    }

    /// Could it open a read-only grant again for writing? Our own uid owns the
    /// file, and some capabilities need nobody's leave, also when they are only
    /// permitted now. Assumed where it cannot be told.
    pub(crate) fn can_undo_read_only(&self) -> bool {
        let own = self.uid == rustix::process::geteuid().as_raw();
        let undoes = |permitted: u64| {
            CAPABILITIES_THAT_UNDO
                .iter()
                .any(|bit| permitted & (1 << bit) != 0)
        };
        let overrides = proc::permitted_capabilities(self.pid).map_or(true, undoes);
        // What was read must have been this process, not one with its pid.
        own || overrides || self.is_dead()
    }
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "pid {} uid {} gid {}", self.pid, self.uid, self.gid)?;
        match (self.pod(), self.unit()) {
            (Some(pod), _) => write!(f, " pod {pod}"),
            (None, Some(unit)) => write!(f, " unit {unit}"),
            (None, None) => Ok(()),
        }
    }
}

impl From<&Peer> for v1::Peer {
    fn from(peer: &Peer) -> v1::Peer {
        let pidfd_inode = match peer.mark {
            Mark::Inode(inode) => inode,
            Mark::StartTime(_) => 0,
        };
        v1::Peer {
            pid: peer.pid,
            uid: peer.uid,
            gid: peer.gid,
            pidfd_inode,
            pod_uid: peer.pod().map(|pod| pod.to_string()).unwrap_or_default(),
            container_id: peer.container().unwrap_or_default().to_owned(),
            unit: peer.unit().unwrap_or_default().to_owned(),
        }
    }
}

/// The pidfd of whoever connected, even if it has died since.
pub(crate) fn peer_pidfd(socket: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    Ok(getsockopt(&socket, sockopt::PeerPidfd)?)
}

#[cfg(test)]
impl Peer {
    /// This process, as if it were somebody else.
    pub(crate) fn pretending(uid: u32, gid: u32, placement: Option<Placement>) -> Peer {
        let (near, _far) = std::os::unix::net::UnixStream::pair().unwrap();
        Peer {
            uid,
            gid,
            attested: placement.is_some(),
            placement,
            ..Peer::of(near.as_fd(), Features::probe()).unwrap()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::{UnixListener, UnixStream};
    use std::process::Command;

    const HELPER_SOCKET: &str = "DOMAIND_TEST_HELPER_SOCKET";

    /// Run as a process of its own by the test below; otherwise it does nothing.
    #[test]
    fn helper_connects_and_waits() {
        let Some(path) = std::env::var_os(HELPER_SOCKET) else {
            return;
        };
        let mut stream = UnixStream::connect(path).unwrap();
        let end = std::io::Read::read(&mut stream, &mut [0]).unwrap();
        assert_eq!(end, 0);
    }

    fn connected() -> (UnixStream, UnixStream) {
        UnixStream::pair().unwrap()
    }

    #[test]
    fn our_own_peer_is_ourselves_and_alive() {
        let (left, right) = connected();
        let features = Features::probe();
        let (a, b) = (
            Peer::of(left.as_fd(), features).unwrap(),
            Peer::of(right.as_fd(), features).unwrap(),
        );
        assert_eq!(u32::try_from(a.pid).unwrap(), std::process::id());
        assert!(a.is_same_process(&b) && !a.is_dead() && a.can_undo_read_only());
    }

    #[test]
    fn without_pidfds_processes_are_told_apart_by_their_start() {
        let (left, _right) = connected();
        let old = Features {
            memfd_noexec_seal: false,
            peer_pidfd: false,
            pass_rights_off: false,
            pidfd_inode: false,
        };
        let peer = Peer::of(left.as_fd(), old).unwrap();
        assert!(matches!(peer.mark, Mark::StartTime(_)) && !peer.is_dead());
        assert_eq!(v1::Peer::from(&peer).pidfd_inode, 0);
    }

    #[test]
    fn a_dead_peer_is_known_to_be_dead_and_is_nobody_else() {
        let dir = tempfile::tempdir_in("/tmp").unwrap();
        let path = dir.path().join("s");
        let listener = UnixListener::bind(&path).unwrap();
        let this = std::env::current_exe().unwrap();
        let helper = ["--exact", "peer::tests::helper_connects_and_waits"];
        let mut child = Command::new(this)
            .args(helper)
            .env(HELPER_SOCKET, &path)
            .spawn()
            .unwrap();
        let (stream, _) = listener.accept().unwrap();
        let peer = Peer::of(stream.as_fd(), Features::probe()).unwrap();
        assert_eq!(u32::try_from(peer.pid).unwrap(), child.id());
        assert!(!peer.is_dead());
        drop(stream);
        child.wait().unwrap();
        assert!(peer.is_dead() && peer.can_undo_read_only());
        let (own, _other) = connected();
        assert!(!peer.is_same_process(&Peer::of(own.as_fd(), Features::probe()).unwrap()));
    }
}
