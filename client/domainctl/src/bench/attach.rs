//! Scenario `attach`: a device connects, says hello, attaches, and has all of
//! the domain's memory mapped. The floor is what the kernel takes for the least
//! of it: a connection, a message and its answer with two fds, and two mappings.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Instant;

use anyhow::{Context, ensure};
use domain_core::region::{Access, SharedMemory, driver_memfd};
use domain_core::session::Role;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, Shutdown, SocketAddrAny, SocketAddrUnix, SocketFlags,
    SocketType,
};

use super::latency::Lap;
use super::party::{Party, Place};
use super::turns::Work;
use super::{BOUNCE_BYTES, COHERENT_BYTES, Facts};

pub(super) const FACTS: Facts = Facts {
    operation: "attach",
    floor: "raw connect, 2 fds, 2 mmaps",
    // It is not used.
    size_bytes_most: 64 << 20,
    batch: 1,
    bounce_bytes: |_, _| BOUNCE_BYTES,
};

/// Of a message and of its answer.
const MESSAGE_BYTES: usize = 64;
const PAGE: u64 = 4096;
/// Connections that wait: one is more than there ever are.
const BACKLOG: i32 = 1;

struct Attacher {
    raw: RawServer,
    party: Party,
}

pub(super) fn crew(place: &Place) -> anyhow::Result<Vec<Box<dyn Work>>> {
    let attacher = |_| -> anyhow::Result<Box<dyn Work>> {
        Ok(Box::new(Attacher {
            raw: RawServer::start()?,
            party: place.party()?,
        }))
    };
    (0..place.threads).map(attacher).collect()
}

impl Work for Attacher {
    fn ours(&mut self) -> anyhow::Result<Lap> {
        self.party.run(async {
            let start = Instant::now();
            let session = self.party.attach(Role::Device).await?;
            let took = start.elapsed();
            session.detach().await?;
            Ok(Lap { took, ops: 1 })
        })
    }

    fn floor(&mut self) -> anyhow::Result<Lap> {
        let start = Instant::now();
        let memory = self.raw.fetch()?;
        let took = start.elapsed();
        drop(memory);
        Ok(Lap { took, ops: 1 })
    }
}

/// A thread that hands two memfds, as large as the domain's apertures, to
/// whoever connects and asks.
struct RawServer {
    listener: Arc<OwnedFd>,
    address: SocketAddrAny,
    thread: Option<JoinHandle<()>>,
}

impl RawServer {
    fn start() -> anyhow::Result<RawServer> {
        let listener = Arc::new(socket()?);
        // Without a name the kernel finds one that is free, and not in the file
        // system.
        rustix::net::bind(&*listener, &SocketAddrUnix::new_unnamed())?;
        rustix::net::listen(&*listener, BACKLOG)?;
        let address = rustix::net::getsockname(&*listener)?;
        let memfds = [
            driver_memfd("domaind-bench", BOUNCE_BYTES)?,
            driver_memfd("domaind-bench", COHERENT_BYTES)?,
        ];
        let accepting = Arc::clone(&listener);
        let thread = thread::Builder::new().spawn(move || serve(&accepting, &memfds))?;
        Ok(RawServer {
            listener,
            address,
            thread: Some(thread),
        })
    }

    /// All that the floor is.
    fn fetch(&self) -> anyhow::Result<[SharedMemory; 2]> {
        let socket = socket()?;
        rustix::net::connect(&socket, &self.address)?;
        rustix::net::send(&socket, &[1; MESSAGE_BYTES], SendFlags::NOSIGNAL)?;
        let fds = receive(&socket).context("asking for two fds")?;
        let [bounce, coherent] = <[OwnedFd; 2]>::try_from(fds)
            .ok()
            .context("two fds were asked for")?;
        Ok([map(&bounce, BOUNCE_BYTES)?, map(&coherent, COHERENT_BYTES)?])
    }
}

impl Drop for RawServer {
    fn drop(&mut self) {
        // Whoever waits for a connection is woken.
        let _ = rustix::net::shutdown(&*self.listener, Shutdown::Both);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Until nobody can connect any more.
fn serve(listener: &OwnedFd, memfds: &[OwnedFd; 2]) {
    let fds = memfds.each_ref().map(AsFd::as_fd);
    while let Ok(connection) = rustix::net::accept_with(listener, SocketFlags::CLOEXEC) {
        // Who has gone meanwhile needs no answer.
        let _ = answer(&connection, &fds);
    }
}

fn answer(connection: &OwnedFd, fds: &[BorrowedFd<'_>; 2]) -> rustix::io::Result<()> {
    let mut message = [0; MESSAGE_BYTES];
    rustix::net::recv(connection, &mut message, RecvFlags::empty())?;
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    assert!(
        control.push(SendAncillaryMessage::ScmRights(fds)),
        "there is room for two"
    );
    let bytes = [IoSlice::new(&message)];
    rustix::net::sendmsg(connection, &bytes, &mut control, SendFlags::NOSIGNAL)?;
    Ok(())
}

fn receive(socket: &OwnedFd) -> anyhow::Result<Vec<OwnedFd>> {
    let mut message = [0; MESSAGE_BYTES];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut bytes = [IoSliceMut::new(&mut message)];
    let flags = RecvFlags::CMSG_CLOEXEC;
    let received = rustix::net::recvmsg(socket, &mut bytes, &mut control, flags)?;
    ensure!(
        received.bytes == MESSAGE_BYTES,
        "an answer of {} bytes",
        received.bytes
    );
    let fds = control.drain().filter_map(|message| match message {
        RecvAncillaryMessage::ScmRights(fds) => Some(fds),
        _ => None,
    });
    Ok(fds.flatten().collect())
}

/// As a session maps what it is given.
fn map(fd: &OwnedFd, len_bytes: u64) -> anyhow::Result<SharedMemory> {
    let mut memory = SharedMemory::reserve(len_bytes, PAGE)?;
    memory.map_at(0, len_bytes, fd.as_fd(), Access::ReadWrite)?;
    Ok(memory)
}

fn socket() -> rustix::io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC;
    rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_floor_maps_two_memories_and_its_server_ends() {
        let server = RawServer::start().unwrap();

        for _ in 0..3 {
            let memory = server.fetch().unwrap();
            let lens = memory.each_ref().map(SharedMemory::len_bytes);
            assert_eq!(lens, [BOUNCE_BYTES, COHERENT_BYTES]);
            memory[0].copy_in(0, b"shared").unwrap();
        }

        // One mapping is the same as the next.
        let mut bytes = [0; 6];
        server.fetch().unwrap()[0].copy_out(0, &mut bytes).unwrap();
        assert_eq!(&bytes, b"shared");
        drop(server);
    }
}
