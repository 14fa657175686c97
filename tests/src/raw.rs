//! A client that speaks the wire itself: it can say what the library cannot.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::net::UnixDatagram;
use std::path::Path;

use domaind_client::Client;
use domaind_proto::frame::{FrameError, FrameSocket, Packet};
use domaind_proto::v1::client_frame::Body as AskBody;
use domaind_proto::v1::mapping_service_client::MappingServiceClient;
use domaind_proto::v1::server_frame::Body as AnswerBody;
use domaind_proto::{SESSION_METADATA, v1};
use rustix::net::SendFlags;
use sendfd::SendWithFd;
use tonic::transport::Channel;

use crate::files;
use crate::node::{Node, name};
use crate::refusal::{Refused, answer};
use crate::wait::soon;

/// A connection to the fd socket, attached or not.
#[derive(Debug)]
pub struct Wire {
    socket: FrameSocket,
    next_id: u64,
}

/// How a connection was closed by the daemon.
#[derive(Debug, Default)]
pub struct Closed {
    /// What it said last, if anything.
    pub ended: Option<v1::SessionEnded>,
    /// Refusals that came before.
    pub refusals: Vec<v1::Refusal>,
    /// Fds that came before; there must be none.
    pub fds: usize,
}

impl Wire {
    /// Connects and says nothing.
    ///
    /// # Panics
    /// If it cannot.
    #[must_use]
    pub fn connect(path: &Path) -> Wire {
        Wire::new(FrameSocket::connect(path).expect("the fd socket takes connections"))
    }

    /// Takes a connected socket.
    #[must_use]
    pub fn new(socket: FrameSocket) -> Wire {
        Wire { socket, next_id: 1 }
    }

    /// Sends one frame.
    pub async fn send(
        &mut self,
        body: AskBody,
        fd: Option<BorrowedFd<'_>>,
    ) -> Result<u64, FrameError> {
        let request_id = self.next_id;
        self.next_id += 1;
        let frame = v1::ClientFrame {
            request_id,
            body: Some(body),
        };
        soon("sending", self.socket.send(&frame, fd)).await?;
        Ok(request_id)
    }

    /// Sends whatever this is, with any number of fds.
    pub fn send_packet(&self, bytes: &[u8], fds: &[RawFd]) -> std::io::Result<()> {
        if fds.is_empty() {
            rustix::net::send(&self.socket, bytes, SendFlags::NOSIGNAL)?;
            return Ok(());
        }
        let socket = UnixDatagram::from(self.socket.as_fd().try_clone_to_owned()?);
        socket.send_with_fd(bytes, fds).map(drop)
    }

    /// The next frame; `None` when the daemon has closed.
    pub async fn receive(&self) -> Option<Packet<v1::ServerFrame>> {
        match soon("a frame", self.socket.receive()).await {
            Ok(packet) => packet,
            // Closed with something of ours unread.
            Err(FrameError::Io(_)) => None,
            Err(error) => panic!("what the daemon sent: {error}"),
        }
    }

    /// Asks, and gets the answer to that.
    pub async fn ask(&mut self, body: AskBody, fd: Option<BorrowedFd<'_>>) -> Refused<AnswerBody> {
        let request_id = self.send(body, fd).await.expect("sent");
        let packet = self.receive().await.expect("an answer, not the end");
        assert_eq!(packet.frame.request_id, request_id, "{packet:?}");
        assert!(packet.fd.is_none(), "an answer brings no fd");
        match packet.frame.body.expect("an answer has a body") {
            AnswerBody::Refusal(refusal) => Err(refusal),
            other => Ok(other),
        }
    }

    /// Says hello properly.
    pub async fn hello(&mut self) -> v1::Welcome {
        match self.ask(hello(1, 1), None).await {
            Ok(AnswerBody::Welcome(welcome)) => welcome,
            other => panic!("{other:?} is not a welcome"),
        }
    }

    /// Says hello; false when the daemon closes instead of answering.
    pub async fn is_welcomed(&mut self) -> bool {
        let sent = self.send(hello(1, 1), None).await;
        sent.is_ok() && self.receive().await.is_some()
    }

    /// Waits until the daemon closes, and says how it did.
    pub async fn closed(&self) -> Closed {
        let mut closed = Closed::default();
        while let Some(packet) = self.receive().await {
            closed.fds += usize::from(packet.fd.is_some());
            match packet.frame.body {
                Some(AnswerBody::SessionEnded(ended)) => closed.ended = Some(ended),
                Some(AnswerBody::Refusal(refusal)) => closed.refusals.push(refusal),
                other => panic!("{other:?} instead of the end"),
            }
        }
        closed
    }

    /// Asks for what is refused to everybody. When that is answered the daemon
    /// has done all that an attached session costs it; counts can be compared.
    ///
    /// # Panics
    /// If it is not refused.
    pub async fn settle(&mut self) {
        let memory_id = u64::MAX;
        let nothing = AskBody::UnregisterMemory(v1::UnregisterMemory { memory_id });
        self.ask(nothing, None).await.expect_err("there is none");
    }

    /// Attaches after hello.
    pub async fn attach(
        &mut self,
        domain: &str,
        role: v1::Role,
        access: v1::Access,
    ) -> Refused<Attachment> {
        let attached = match self.ask(attach(domain, role, access), None).await? {
            AnswerBody::Attached(attached) => attached,
            other => panic!("{other:?} instead of Attached"),
        };
        let mut regions = Vec::new();
        for _ in 0..attached.regions {
            let packet = self.receive().await.expect("a region");
            match (packet.frame.body, packet.fd) {
                (Some(AnswerBody::Region(region)), Some(fd)) => regions.push((region, fd)),
                other => panic!("{other:?} instead of a region with its fd"),
            }
        }
        let packet = self.receive().await.expect("ready");
        let shows_iovas = |(region, _): &(v1::Region, OwnedFd)| region.range.is_some();
        let (regions, tables) = regions.into_iter().partition(shows_iovas);
        match packet.frame.body {
            Some(AnswerBody::Ready(ready)) => Ok(Attachment {
                attached,
                regions,
                tables,
                ready,
            }),
            other => panic!("{other:?} instead of Ready"),
        }
    }
}

impl AsFd for Wire {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// What Attach brings.
#[derive(Debug)]
pub struct Attachment {
    /// The session.
    pub attached: v1::Attached,
    /// Its memory.
    pub regions: Vec<(v1::Region, OwnedFd)>,
    /// The page table and the session page.
    pub tables: Vec<(v1::Region, OwnedFd)>,
    /// The end of the handshake.
    pub ready: v1::Ready,
}

/// One attached session that does only what it is told.
#[derive(Debug)]
pub struct Raw {
    /// Its fd socket.
    pub wire: Wire,
    /// What it was given.
    pub given: Attachment,
    /// gRPC, without the token.
    pub calls: MappingServiceClient<Channel>,
}

impl Raw {
    /// Attaches to a domain of a node, read-write.
    ///
    /// # Panics
    /// If it is refused.
    pub async fn attach(node: &Node, domain: &str, role: v1::Role) -> Raw {
        let attached = Raw::try_attach(node, domain, role, v1::Access::ReadWrite).await;
        attached.expect("attached")
    }

    /// A driver.
    pub async fn driver(node: &Node, domain: &str) -> Raw {
        Raw::attach(node, domain, v1::Role::Driver).await
    }

    /// A device.
    pub async fn device(node: &Node, domain: &str) -> Raw {
        Raw::attach(node, domain, v1::Role::Device).await
    }

    /// Attaches, or says why not.
    pub async fn try_attach(
        node: &Node,
        domain: &str,
        role: v1::Role,
        access: v1::Access,
    ) -> Refused<Raw> {
        let mut wire = Wire::connect(&node.runtime_dir().fd_socket());
        wire.hello().await;
        let given = wire.attach(&name(domain), role, access).await?;
        wire.settle().await;
        let client: Client = node.client().await;
        Ok(Raw {
            wire,
            given,
            calls: MappingServiceClient::new(client.channel()),
        })
    }

    /// `sessions/{session}`.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.given.attached.session
    }

    /// The token as it travels.
    #[must_use]
    pub fn token(&self) -> String {
        hex(&self.given.attached.token)
    }

    /// A request in the name of this session.
    pub fn signed<T>(&self, message: T) -> tonic::Request<T> {
        with_token(message, &self.token())
    }

    /// Map.
    pub async fn map(&self, entry: v1::MapEntry) -> Refused<v1::StreamingMapping> {
        let results = self.map_all(vec![entry], false).await?.results;
        match results.into_iter().next().and_then(|result| result.outcome) {
            Some(v1::map_result::Outcome::Mapping(mapping)) => Ok(mapping),
            other => panic!("{other:?} without `partial`"),
        }
    }

    /// Map, several.
    pub async fn map_all(
        &self,
        entries: Vec<v1::MapEntry>,
        partial: bool,
    ) -> Refused<v1::MapResponse> {
        let request = self.signed(v1::MapRequest {
            entries,
            partial,
            ..Default::default()
        });
        answer(self.calls.clone().map(request).await)
    }

    /// Unmap; how many bytes flowed back.
    pub async fn unmap(
        &self,
        mapping: &v1::StreamingMapping,
        written_bytes: Option<u64>,
    ) -> Refused<u64> {
        let entry = unmap_entry(mapping, written_bytes);
        let response = self.unmap_all(vec![entry], false).await?;
        Ok(response.results[0].copied_bytes)
    }

    /// Unmap, several.
    pub async fn unmap_all(
        &self,
        entries: Vec<v1::UnmapEntry>,
        partial: bool,
    ) -> Refused<v1::UnmapResponse> {
        let request = self.signed(v1::UnmapRequest {
            entries,
            partial,
            ..Default::default()
        });
        answer(self.calls.clone().unmap(request).await)
    }

    /// Sync, several.
    pub async fn sync_all(
        &self,
        entries: Vec<v1::SyncEntry>,
        partial: bool,
    ) -> Refused<v1::SyncResponse> {
        let request = self.signed(v1::SyncRequest {
            entries,
            partial,
            ..Default::default()
        });
        answer(self.calls.clone().sync(request).await)
    }

    /// Sync of one part.
    pub async fn sync(
        &self,
        mapping: &v1::StreamingMapping,
        offset: u64,
        len_bytes: u64,
        target: v1::SyncTarget,
    ) -> Refused<()> {
        let entry = v1::SyncEntry {
            iova: mapping.iova,
            mapping_id: mapping.mapping_id,
            offset,
            len_bytes,
            target: target.into(),
        };
        self.sync_all(vec![entry], false).await.map(drop)
    }

    /// Lease.
    pub async fn lease(&self, request: v1::LeaseRequest) -> Refused<v1::LeaseResponse> {
        let request = self.signed(request);
        answer(self.calls.clone().lease(request).await)
    }

    /// Lease of so many bytes.
    pub async fn lease_len(&self, len_bytes: u64) -> Refused<v1::LeaseResponse> {
        self.lease(v1::LeaseRequest {
            len_bytes,
            ..Default::default()
        })
        .await
    }

    /// Release.
    pub async fn release(&self, iova: u64, mapping_id: u64) -> Refused<v1::ReleaseResponse> {
        let request = self.signed(v1::ReleaseRequest {
            iova,
            mapping_id,
            ..Default::default()
        });
        answer(self.calls.clone().release(request).await)
    }

    /// AllocCoherent.
    pub async fn alloc(
        &self,
        request: v1::AllocCoherentRequest,
    ) -> Refused<v1::AllocCoherentResponse> {
        let request = self.signed(request);
        answer(self.calls.clone().alloc_coherent(request).await)
    }

    /// AllocCoherent of so many bytes.
    pub async fn alloc_len(&self, len_bytes: u64) -> Refused<v1::AllocCoherentResponse> {
        self.alloc(v1::AllocCoherentRequest {
            len_bytes,
            ..Default::default()
        })
        .await
    }

    /// FreeCoherent.
    pub async fn free(&self, iova: u64, mapping_id: u64) -> Refused<()> {
        let request = self.signed(v1::FreeCoherentRequest {
            iova,
            mapping_id,
            ..Default::default()
        });
        answer(self.calls.clone().free_coherent(request).await).map(drop)
    }

    /// Registers an fd.
    pub async fn register(
        &mut self,
        fd: impl AsFd,
        writable: bool,
    ) -> Refused<v1::MemoryRegistered> {
        self.register_as(fd, writable, false).await
    }

    /// Registers an fd for this session, or for the domain.
    pub async fn register_as(
        &mut self,
        fd: impl AsFd,
        writable: bool,
        persistent: bool,
    ) -> Refused<v1::MemoryRegistered> {
        let ask = AskBody::RegisterMemory(v1::RegisterMemory {
            writable,
            persistent,
        });
        match self.wire.ask(ask, Some(fd.as_fd())).await? {
            AnswerBody::MemoryRegistered(registered) => Ok(registered),
            other => panic!("{other:?} instead of MemoryRegistered"),
        }
    }

    /// Makes and registers memory of so many bytes, writable.
    ///
    /// # Panics
    /// If it is refused.
    pub async fn memory(&mut self, len_bytes: u64) -> Memory {
        self.memory_as(len_bytes, true, false).await
    }

    /// Makes and registers memory of so many bytes.
    ///
    /// # Panics
    /// If it is refused.
    pub async fn memory_as(&mut self, len_bytes: u64, writable: bool, persistent: bool) -> Memory {
        let fd = files::good_memfd(len_bytes);
        let registered = self.register_as(&fd, writable, persistent).await;
        let registered = registered.expect("registered");
        assert_eq!(registered.size_bytes, len_bytes);
        Memory {
            fd,
            id: registered.memory_id,
        }
    }

    /// Gives a registration back.
    pub async fn unregister(&mut self, memory_id: u64) -> Refused<()> {
        let ask = AskBody::UnregisterMemory(v1::UnregisterMemory { memory_id });
        match self.wire.ask(ask, None).await? {
            AnswerBody::MemoryUnregistered(_) => Ok(()),
            other => panic!("{other:?} instead of MemoryUnregistered"),
        }
    }

    /// Reads the domain's memory through the fds of this session.
    ///
    /// # Panics
    /// If no region backs the bytes.
    #[must_use]
    pub fn read(&self, iova: u64, len: usize) -> Vec<u8> {
        let (start, fd) = self.region_at(iova);
        files::peek(fd, iova - start, len)
    }

    /// Writes the domain's memory.
    ///
    /// # Panics
    /// If no region backs the bytes.
    pub fn write(&self, iova: u64, bytes: &[u8]) {
        let (start, fd) = self.region_at(iova);
        files::poke(fd, iova - start, bytes);
    }

    /// Everything that this session can see, region by region, with the iova
    /// where each begins.
    ///
    /// # Panics
    /// If a region cannot be read.
    #[must_use]
    pub fn view(&self) -> Vec<(u64, Vec<u8>)> {
        let regions = self.given.regions.iter();
        regions
            .map(|(region, fd)| {
                let range = region.range.expect("a region has a range");
                let len = usize::try_from(range.last - range.start + 1).expect("it fits");
                (range.start, files::peek(fd, 0, len))
            })
            .collect()
    }

    fn region_at(&self, iova: u64) -> (u64, &OwnedFd) {
        let mut regions = self.given.regions.iter();
        let found = regions.find_map(|(region, fd)| {
            let range = region.range?;
            (range.start <= iova && iova <= range.last).then_some((range.start, fd))
        });
        found.unwrap_or_else(|| panic!("no region at {iova:#x}"))
    }
}

/// Memory of a driver, by its fd.
#[derive(Debug)]
pub struct Memory {
    /// The memfd.
    pub fd: OwnedFd,
    /// Its id in the domain.
    pub id: u64,
}

impl Memory {
    /// An entry for Map.
    #[must_use]
    pub fn entry(&self, offset: u64, len_bytes: u64, direction: v1::Direction) -> v1::MapEntry {
        v1::MapEntry {
            memory_id: self.id,
            offset,
            len_bytes,
            direction: direction.into(),
            ..Default::default()
        }
    }
}

/// An entry for Unmap.
#[must_use]
pub fn unmap_entry(mapping: &v1::StreamingMapping, written_bytes: Option<u64>) -> v1::UnmapEntry {
    v1::UnmapEntry {
        iova: mapping.iova,
        mapping_id: mapping.mapping_id,
        written_bytes,
        skip_sync: false,
    }
}

/// A Hello for these versions.
#[must_use]
pub fn hello(min_version: u32, max_version: u32) -> AskBody {
    AskBody::Hello(v1::Hello {
        min_version,
        max_version,
        agent: "domaind-tests".to_owned(),
    })
}

/// An Attach.
#[must_use]
pub fn attach(domain: &str, role: v1::Role, access: v1::Access) -> AskBody {
    AskBody::Attach(v1::Attach {
        domain: domain.to_owned(),
        role: role.into(),
        access: access.into(),
        // It never pins, and so never owes an Ack.
        ack_mode: v1::AckMode::Pins.into(),
        ..v1::Attach::default()
    })
}

/// A RegisterMemory.
#[must_use]
pub fn register(writable: bool) -> AskBody {
    AskBody::RegisterMemory(v1::RegisterMemory {
        writable,
        persistent: false,
    })
}

/// A request that carries a token.
///
/// # Panics
/// If the text cannot be metadata.
pub fn with_token<T>(message: T, token: &str) -> tonic::Request<T> {
    let mut request = tonic::Request::new(message);
    let token = token.parse().expect("ASCII");
    request.metadata_mut().insert(SESSION_METADATA, token);
    request
}

/// Bytes as hexadecimal.
#[must_use]
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
