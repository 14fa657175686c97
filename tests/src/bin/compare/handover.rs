//! Attaching, beside the least that it could be: a connection, three messages
//! with their answers, two fds, and two mappings.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use domain_core::region::{Access, SharedMemory, driver_memfd};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags, SocketType,
};

use crate::attached::attaching;
use crate::attend::{Attendance, say_there};
use crate::peers::PAGE;
use crate::report::{Limit, Report, Row, Unit};
use crate::rounds::{Contender, Role, Scale, interleave};
use crate::world::{Attendant, MESSAGE_BYTES, World, typical};

const ATTACH: &str = "attach/mapped and ready";
const MOST: f64 = 3.0;
/// As large as the apertures of the domain beside it.
const MEMORIES: [u64; 2] = [16 << 20, 4 << 20];
const BACKLOG: i32 = 8;

/// Prints the row of this family.
pub(crate) fn rows(report: &Report, scale: &Scale) -> io::Result<()> {
    if !report.wants(ATTACH) {
        return Ok(());
    }
    let world = World::start()?;
    let _driver = world.driver("attach");
    let raw = Raw::start(&world);
    let contenders = vec![
        attaching(&world, Role::Ours, "domaind", "attach"),
        Contender::new(Role::Floor, "raw socket", || typical(|| raw.attach())),
    ];
    let outcomes = interleave(scale.rounds, contenders);
    let goal = [Limit::Floor(MOST)];
    report.print(&Row::new(
        ATTACH.to_owned(),
        Unit::Nanoseconds,
        outcomes,
        goal,
    ))
}

/// A process that hands memory to whoever asks three times.
struct Raw {
    path: PathBuf,
    _server: Vec<Attendant>,
}

impl Raw {
    fn start(world: &World) -> Raw {
        let path = world.path().join("hand");
        let server = world.attendants(&Attendance::Hand { path: path.clone() }, 1);
        Raw {
            path,
            _server: server,
        }
    }

    fn attach(&self) -> Duration {
        let start = Instant::now();
        let mapped = self.mapped().expect("it answers");
        let took = start.elapsed();
        drop(mapped);
        took
    }

    fn mapped(&self) -> io::Result<[SharedMemory; 2]> {
        let socket = socket()?;
        rustix::net::connect(&socket, &SocketAddrUnix::new(&self.path)?)?;
        assert!(ask(&socket)?.is_none());
        let [first, second] = MEMORIES;
        let mapped = |len_bytes| map(&ask(&socket)?.expect("with an fd"), len_bytes);
        Ok([mapped(first)?, mapped(second)?])
    }
}

/// In a child process: serves one after the other, for ever.
pub(crate) fn hand(path: &Path) -> io::Result<()> {
    let listener = socket()?;
    rustix::net::bind(&listener, &SocketAddrUnix::new(path)?)?;
    rustix::net::listen(&listener, BACKLOG)?;
    let memfds = MEMORIES.map(|len_bytes| driver_memfd("hand", len_bytes).expect("memory"));
    let [first, second] = memfds.each_ref().map(AsFd::as_fd);
    say_there()?;
    loop {
        let connection = rustix::net::accept_with(&listener, SocketFlags::CLOEXEC)?;
        for fd in [None, Some(first), Some(second)] {
            answer(&connection, fd)?;
        }
    }
}

fn ask(socket: &OwnedFd) -> io::Result<Option<OwnedFd>> {
    let mut message = [1; MESSAGE_BYTES];
    rustix::net::send(socket, &message, SendFlags::NOSIGNAL)?;
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut bytes = [IoSliceMut::new(&mut message)];
    let flags = RecvFlags::CMSG_CLOEXEC;
    let received = rustix::net::recvmsg(socket, &mut bytes, &mut control, flags)?;
    assert_eq!(received.bytes, MESSAGE_BYTES, "a packet is whole");
    let mut fds = control.drain().filter_map(|message| match message {
        RecvAncillaryMessage::ScmRights(fds) => Some(fds),
        _ => None,
    });
    Ok(fds.next().and_then(|mut fds| fds.next()))
}

fn answer(connection: &OwnedFd, fd: Option<BorrowedFd<'_>>) -> io::Result<()> {
    let mut message = [0; MESSAGE_BYTES];
    rustix::net::recv(connection, &mut message, RecvFlags::empty())?;
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let fds: Vec<_> = fd.into_iter().collect();
    if !fds.is_empty() {
        let has_room = control.push(SendAncillaryMessage::ScmRights(&fds));
        assert!(has_room, "there is room for one");
    }
    let bytes = [IoSlice::new(&message)];
    rustix::net::sendmsg(connection, &bytes, &mut control, SendFlags::NOSIGNAL)?;
    Ok(())
}

/// As a session maps what it is given.
fn map(fd: &OwnedFd, len_bytes: u64) -> io::Result<SharedMemory> {
    let memory = SharedMemory::reserve(len_bytes, PAGE);
    let mut memory = memory.map_err(io::Error::other)?;
    let mapped = memory.map_at(0, len_bytes, fd.as_fd(), Access::ReadWrite);
    mapped.map_err(io::Error::other)?;
    Ok(memory)
}

fn socket() -> io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None);
    Ok(socket?)
}
