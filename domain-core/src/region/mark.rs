//! Marks on grants: does anybody still have them?
//!
//! A grant is an open file description of its own. It lives as long as a descriptor of it does, in
//! any process, in a child that inherited it, in a message that nobody has received yet; and as long
//! as anything is mapped through it. The kernel does not tell who holds one, but a lock of the
//! description lives exactly as long. So a grant can carry a mark, a shared lock of one byte of the
//! file whose number is the mark, and the file can be asked whether any description still has it.
//!
//! It answers for those who keep what they were given. Whoever wants to hide can unlock the byte, or
//! open the file once more where its mode lets him, and can do the same to the marks of nobody else;
//! but he can keep a mark alive that is not his. A domain is the boundary: all of this is about
//! memory that its clients share already.

use std::io;
use std::os::fd::AsFd;

use nix::fcntl::{FcntlArg, fcntl};

/// Marks the description behind `fd`, until it is gone.
pub(super) fn set(fd: impl AsFd, mark: u64) -> io::Result<()> {
    let lock = byte(libc::F_RDLCK, mark)?;
    fcntl(fd, FcntlArg::F_OFD_SETLK(&lock))?;
    Ok(())
}

/// Has any description of the file, other than that of `fd`, this mark?
///
/// A process that is just being forked has a copy of every descriptor, for an instant those that it
/// closes when it runs its program, too: "no" is certain, "yes" is worth asking again.
pub(super) fn is_set(fd: impl AsFd, mark: u64) -> io::Result<bool> {
    // Could we lock it for ourselves alone? Asking takes no lock.
    let mut lock = byte(libc::F_WRLCK, mark)?;
    fcntl(fd, FcntlArg::F_OFD_GETLK(&mut lock))?;
    Ok(lock.l_type != short(libc::F_UNLCK))
}

fn byte(kind: libc::c_int, mark: u64) -> io::Result<libc::flock> {
    let start = libc::off_t::try_from(mark).map_err(|_| io::ErrorKind::InvalidInput)?;
    Ok(libc::flock {
        l_type: short(kind),
        l_whence: short(libc::SEEK_SET),
        l_start: start,
        l_len: 1,
        // What a lock of a description must say.
        l_pid: 0,
    })
}

fn short(constant: libc::c_int) -> libc::c_short {
    libc::c_short::try_from(constant).expect("the kernel's field is as short")
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::fd::{AsFd, OwnedFd};
    use std::os::unix::net::UnixStream;
    use std::process::{Child, Command, Stdio};
    use std::time::{Duration, Instant};

    use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
    use rustix::process::{Pid, Signal, kill_process};

    use crate::region::{Access, Backing, Grant, Region, SharedMemory, SparseRegion};

    const LEN: u64 = 4096;
    const HELPER: &str = "DOMAIND_TEST_MARK_HELPER";

    fn region() -> Region {
        Region::create("mark-test", LEN, Backing::Memfd).unwrap()
    }

    fn marked(region: &Region, mark: u64) -> Grant {
        region.grant_marked(Access::ReadWrite, mark).unwrap()
    }

    /// Run as a process of its own by the tests below, with a grant for its standard input;
    /// otherwise it does nothing. Says that it is there, and ends when it is killed.
    #[test]
    fn helper_holds_its_standard_input() {
        let Some(how) = std::env::var_os(HELPER) else {
            return;
        };
        let grant = std::io::stdin();
        let mapping = (how == "mapped").then(|| {
            let mut memory = SharedMemory::reserve(LEN, LEN).unwrap();
            memory
                .map_at(0, LEN, grant.as_fd(), Access::ReadWrite)
                .unwrap();
            // Standard input is something else from now on: only the mapping is left.
            let null = std::fs::File::open("/dev/null").unwrap();
            nix::unistd::dup2_stdin(&null).unwrap();
            memory
        });
        std::io::stderr().write_all(b"!").unwrap();
        loop {
            std::thread::park();
            assert!(mapping.is_some() || how == "open");
        }
    }

    /// A process that has the grant, and nobody else any more when this returns.
    fn helper(how: &str, grant: Grant) -> Child {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args([
                "--exact",
                "region::mark::tests::helper_holds_its_standard_input",
            ])
            .arg("--nocapture")
            .env(HELPER, how)
            .stdin(Stdio::from(OwnedFd::from(grant)))
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut said = [0];
        let stderr = child.stderr.as_mut().unwrap();
        stderr.read_exact(&mut said).unwrap();
        assert_eq!(&said, b"!");
        child
    }

    /// Soon: what another test of this process is just forking has all our descriptors until it
    /// runs its program.
    fn is_gone(region: &Region, mark: u64) -> bool {
        let deadline = Instant::now() + Duration::from_secs(10);
        while region.is_marked(mark).unwrap() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(1));
        }
        !region.is_marked(mark).unwrap()
    }

    fn kill(mut child: Child) {
        child.kill().unwrap();
        child.wait().unwrap();
    }

    #[test]
    fn a_mark_is_there_from_the_grant_to_the_last_close_and_is_nobody_elses() {
        let region = region();
        assert!(!region.is_marked(7).unwrap());

        let grant = OwnedFd::from(marked(&region, 7));
        let copy = grant.try_clone().unwrap();
        let _unmarked = region.grant(Access::ReadWrite).unwrap();
        assert!(region.is_marked(7).unwrap());
        assert!(!region.is_marked(6).unwrap() && !region.is_marked(8).unwrap());

        drop(grant);
        assert!(region.is_marked(7).unwrap());
        drop(copy);
        assert!(is_gone(&region, 7));
    }

    #[test]
    fn grants_of_one_mark_keep_it_together_whatever_their_access() {
        let region = region();
        let read_only = region.grant_marked(Access::ReadOnly, 0).unwrap();
        let read_write = marked(&region, 0);

        drop(read_write);
        assert!(region.is_marked(0).unwrap());
        drop(read_only);
        assert!(is_gone(&region, 0));
    }

    #[test]
    fn what_no_file_can_be_long_enough_for_is_no_mark() {
        let region = region();
        let most = u64::MAX >> 1;

        let _grant = marked(&region, most - 1);

        assert!(region.is_marked(most - 1).unwrap());
        assert!(region.grant_marked(Access::ReadOnly, most + 1).is_err());
        assert!(region.is_marked(most + 1).is_err());
    }

    #[test]
    fn a_sparse_region_knows_its_marks_too() {
        let region = SparseRegion::create("mark-test", LEN).unwrap();
        let _grant = region.grant_marked(3).unwrap();
        assert!(region.is_marked(3).unwrap());
        assert!(!region.is_marked(4).unwrap());
    }

    #[test]
    fn a_mark_lives_as_long_as_the_process_that_has_the_grant() {
        let region = region();
        let (one, other) = (
            helper("open", marked(&region, 1)),
            helper("open", marked(&region, 2)),
        );

        kill(one);

        assert!(is_gone(&region, 1));
        assert!(region.is_marked(2).unwrap());
        kill(other);
        assert!(is_gone(&region, 2));
    }

    #[test]
    fn a_mark_outlives_the_process_in_a_child_that_inherited_the_grant() {
        let region = region();
        let parent = Command::new("sh")
            .args(["-c", "exec 3<&0; sleep 600 >/dev/null 2>&1 & echo $!"])
            .stdin(Stdio::from(OwnedFd::from(marked(&region, 5))))
            .output()
            .unwrap();
        let child = String::from_utf8(parent.stdout).unwrap();
        assert!(region.is_marked(5).unwrap());

        let child = Pid::from_raw(child.trim().parse().unwrap()).unwrap();
        kill_process(child, Signal::KILL).unwrap();

        assert!(is_gone(&region, 5));
    }

    #[test]
    fn a_mark_lives_as_long_as_memory_is_mapped_through_the_grant() {
        let region = region();
        let child = helper("mapped", marked(&region, 9));
        assert!(region.is_marked(9).unwrap());

        kill(child);

        assert!(is_gone(&region, 9));
    }

    #[test]
    fn a_mark_lives_in_a_message_that_nobody_has_received() {
        let region = region();
        let (sender, receiver) = UnixStream::pair().unwrap();
        let grant = marked(&region, 4);
        let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        let fds = [grant.as_fd()];
        assert!(control.push(SendAncillaryMessage::ScmRights(&fds)));
        let data = [std::io::IoSlice::new(b"x")];
        sendmsg(&sender, &data, &mut control, SendFlags::empty()).unwrap();

        drop(grant);
        drop(sender);
        assert!(region.is_marked(4).unwrap());

        drop(receiver);
        assert!(is_gone(&region, 4));
    }
}
