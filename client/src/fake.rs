//! A daemon for tests: says what it is told to, right or wrong.

use std::collections::{BTreeMap, VecDeque};
use std::future::pending;
use std::os::fd::{AsFd, OwnedFd};
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use domain_core::addr::{Granule, Iova, IovaRange};
use domain_core::iotlb::{Entry, Iotlb, PageRegion, RegionId, RegionWords, SessionPage, Target};
use domain_core::perm::Perm;
use domain_core::region::{Access, driver_memfd};
use domain_core::session::Role;
use domaind_proto::frame::FrameSocket;
use domaind_proto::names::DomainId;
use domaind_proto::paths::RuntimeDir;
use domaind_proto::v1;
use domaind_proto::v1::client_frame::Body as Ask;
use domaind_proto::v1::domain_service_server::{DomainService, DomainServiceServer};
use domaind_proto::v1::mapping_service_server::{MappingService, MappingServiceServer};
use domaind_proto::v1::server_frame::Body;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, socket_with};
use tempfile::TempDir;
use tokio::net::UnixListener;
use tokio::task::JoinHandle;
use tonic::codegen::tokio_stream::{self, Stream, StreamExt};
use tonic::transport::Server;
use tonic::{Code, Request, Response, Status};

use crate::client::{AttachOptions, Client};
use crate::session::Session;

pub(crate) const PAGE: u64 = 4096;
/// Where the bounce aperture of four pages begins; two pages of coherent
/// memory lie above it.
pub(crate) const BOUNCE: u64 = 0x10_0000;
pub(crate) const COHERENT: u64 = BOUNCE + BOUNCE_PAGES * PAGE;
const BOUNCE_PAGES: u64 = 4;

/// A test waits for nothing longer than this.
pub(crate) const SOON: Duration = Duration::from_secs(10);
/// Long enough for something that is wrong to happen.
pub(crate) const A_MOMENT: Duration = Duration::from_millis(50);

/// So long a detaching session waits for its pins.
pub(crate) const ACK_TIMEOUT_MS: u64 = 500;

/// Much of it is never backed.
pub(crate) const TABLE_BYTES: u64 = 64 << 20;

/// The daemon's end of an fd socket.
#[derive(Debug)]
pub(crate) struct FakePeer(FrameSocket);

impl FakePeer {
    /// Both ends: the client's first.
    pub(crate) fn pair() -> (FrameSocket, FakePeer) {
        let (client, daemon) = rustix::net::socketpair(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC,
            None,
        )
        .unwrap();
        let client = FrameSocket::new(client).unwrap();
        (client, FakePeer(FrameSocket::new(daemon).unwrap()))
    }

    pub(crate) async fn say(&self, request_id: u64, body: Body, fd: Option<&OwnedFd>) {
        let frame = v1::ServerFrame {
            request_id,
            body: Some(body),
        };
        self.0.send(&frame, fd.map(AsFd::as_fd)).await.unwrap();
    }

    /// Says nothing more, but keeps listening.
    pub(crate) fn fall_silent(&self) {
        rustix::net::shutdown(&self.0, rustix::net::Shutdown::Write).unwrap();
    }

    /// What the client says next; `None` when it has closed.
    pub(crate) async fn hear(&self) -> Option<v1::ClientFrame> {
        let heard = tokio::time::timeout(SOON, self.0.receive()).await;
        let packet = heard.expect("the client says something").unwrap();
        packet.map(|packet| packet.frame)
    }

    /// The client has said that it holds nothing any more, and closes.
    pub(crate) async fn hear_the_end(&self) {
        let last = self.hear().await.and_then(|frame| frame.body);
        assert_eq!(last, Some(Ask::Detach(v1::Detach {})));
        assert_eq!(self.hear().await, None);
    }

    /// All of a handshake that lets the client in.
    pub(crate) async fn welcome(&self) -> FakeMemory {
        let memory = FakeMemory::new();
        self.say(1, welcome(1), None).await;
        self.say(2, attached(4), None).await;
        for (region, fd) in memory.regions() {
            self.say(2, region, Some(&fd)).await;
        }
        let generation = memory.table.generation();
        self.say(2, Body::Ready(v1::Ready { generation }), None)
            .await;
        memory
    }

    /// Says a change of this generation.
    pub(crate) async fn say_change(&self, change: v1::Change) {
        self.say(0, Body::Change(change), None).await;
    }

    pub(crate) async fn say_ended(&self, reason: v1::EndReason) {
        let ended = v1::SessionEnded {
            reason: reason.into(),
            message: "as the test wants it".to_owned(),
        };
        self.say(0, Body::SessionEnded(ended), None).await;
    }

    /// Hears that memory is asked for, and hands it out.
    pub(crate) async fn open(&self, fd: &OwnedFd, pages: u64) -> u32 {
        let asked = self.hear().await.unwrap();
        let Some(Ask::OpenMemory(open)) = asked.body else {
            panic!("{asked:?}")
        };
        self.say(asked.request_id, opened(pages), Some(fd)).await;
        open.region
    }

    /// What the client acknowledges next.
    pub(crate) async fn hear_ack(&self) -> u64 {
        let heard = self.hear().await.unwrap();
        match heard.body {
            Some(Ask::Ack(ack)) => ack.generation,
            other => panic!("{other:?}"),
        }
    }

    /// The client says nothing for a moment.
    pub(crate) async fn hear_nothing(&self) {
        let heard = tokio::time::timeout(A_MOMENT, self.0.receive::<v1::ClientFrame>()).await;
        assert!(heard.is_err(), "{heard:?}");
    }
}

/// Memory of a domain: a real table, a real session page.
#[derive(Debug)]
pub(crate) struct FakeMemory {
    pub(crate) table: Iotlb<RegionWords>,
    pub(crate) page: SessionPage<PageRegion>,
    pub(crate) bounce: OwnedFd,
    pub(crate) coherent: OwnedFd,
}

impl FakeMemory {
    pub(crate) fn new() -> FakeMemory {
        let words = RegionWords::create("fake-table", TABLE_BYTES, None).unwrap();
        let apertures = IovaRange::from_len(Iova::new(BOUNCE), 6 * PAGE).ok();
        let page = SessionPage::create("fake-session-page").unwrap();
        page.promise_to_ask();
        FakeMemory {
            table: Iotlb::new(words, Granule::Size4K, apertures).unwrap(),
            page,
            bounce: memfd(4),
            coherent: memfd(2),
        }
    }

    /// What a handshake says of it, with the fds.
    pub(crate) fn regions(&self) -> [(Body, OwnedFd); 4] {
        let kinds = [v1::RegionKind::Bounce, v1::RegionKind::Coherent];
        [
            (region(kinds[0], BOUNCE, 4), copy(&self.bounce)),
            (region(kinds[1], COHERENT, 2), copy(&self.coherent)),
            self.table_region(),
            self.page_region(),
        ]
    }

    pub(crate) fn table_region(&self) -> (Body, OwnedFd) {
        let grant = self.table.words().grant().unwrap();
        (words(v1::RegionKind::Table, TABLE_BYTES), grant.into())
    }

    pub(crate) fn page_region(&self) -> (Body, OwnedFd) {
        let grant = self.page.grant().unwrap();
        (words(v1::RegionKind::SessionPage, PAGE), grant.into())
    }

    /// Enters pages in the table. Answers the generation.
    pub(crate) fn map(&mut self, iova: u64, pages: u64, target: Target, perm: Perm) -> u64 {
        let range = IovaRange::from_len(Iova::new(iova), pages * PAGE).unwrap();
        let entry = Entry {
            range,
            target,
            perm,
        };
        self.table.insert(entry).unwrap();
        self.table.generation()
    }

    /// Removes what begins there. Answers the change that says so.
    pub(crate) fn unmap(&mut self, iova: u64) -> v1::Change {
        let removed = self.table.remove(Iova::new(iova)).unwrap();
        v1::Change {
            generation: self.table.generation(),
            removed: vec![removed.range.into()],
            ..v1::Change::default()
        }
    }
}

/// The byte behind so many pages of the registered memory in a slot.
pub(crate) fn in_memory(slot: u32, page: u64) -> Target {
    Target {
        region: RegionId::memory_slot(slot),
        offset_bytes: page * PAGE,
    }
}

pub(crate) fn words(kind: v1::RegionKind, size_bytes: u64) -> Body {
    Body::Region(v1::Region {
        kind: kind.into(),
        range: None,
        hugetlb: false,
        size_bytes,
    })
}

pub(crate) fn opened(pages: u64) -> Body {
    Body::MemoryOpened(v1::MemoryOpened {
        memory_id: 1,
        size_bytes: pages * PAGE,
        writable: true,
        hugetlb: false,
        access_enforced: true,
    })
}

fn copy(fd: &OwnedFd) -> OwnedFd {
    fd.try_clone().unwrap()
}

pub(crate) fn memfd(pages: u64) -> OwnedFd {
    driver_memfd("fake-region", pages * PAGE).unwrap()
}

pub(crate) fn welcome(version: u32) -> Body {
    Body::Welcome(v1::Welcome {
        version,
        instance: "fake".to_owned(),
        max_frame_bytes: 4096,
    })
}

pub(crate) fn wire_range(start: u64, pages: u64) -> v1::IovaRange {
    v1::IovaRange {
        start,
        last: start + pages * PAGE - 1,
    }
}

pub(crate) fn attached(regions: u32) -> Body {
    Body::Attached(v1::Attached {
        session: "sessions/9".to_owned(),
        token: vec![0xab; 16],
        granule_bytes: PAGE,
        bounce: Some(wire_range(BOUNCE, 4)),
        coherent: Some(wire_range(COHERENT, 2)),
        regions,
        access_enforced: true,
        ack_timeout_ms: ACK_TIMEOUT_MS,
    })
}

pub(crate) fn region(kind: v1::RegionKind, start: u64, pages: u64) -> Body {
    Body::Region(v1::Region {
        kind: kind.into(),
        range: Some(wire_range(start, pages)),
        hugetlb: false,
        size_bytes: pages * PAGE,
    })
}

/// A daemon on both public sockets, with one session.
pub(crate) struct FakeDaemon {
    pub(crate) client: Client,
    pub(crate) session: Session,
    pub(crate) peer: FakePeer,
    pub(crate) memory: FakeMemory,
    pub(crate) calls: Arc<Calls>,
    server: JoinHandle<()>,
    _dir: TempDir,
}

impl FakeDaemon {
    pub(crate) async fn start() -> FakeDaemon {
        let options = AttachOptions::new(Role::Driver, Access::ReadWrite);
        FakeDaemon::start_with(options).await
    }

    pub(crate) async fn start_with(options: AttachOptions) -> FakeDaemon {
        let temp = tempfile::tempdir_in("/tmp").unwrap();
        let dir = RuntimeDir::new(temp.path()).unwrap();
        std::fs::create_dir(dir.public()).unwrap();
        let calls = Arc::new(Calls::default());
        let server = tokio::spawn(serve(&dir, Arc::clone(&calls)));
        let listener = listen(&dir);
        let domain = DomainId::new("d").unwrap();
        let client = Client::connect(&dir).await.unwrap();
        let attach = client.attach_with(&domain, options);
        let (session, (peer, memory)) = tokio::join!(attach, accept(listener));
        FakeDaemon {
            client,
            session: session.unwrap(),
            peer,
            memory,
            calls,
            server,
            _dir: temp,
        }
    }
}

impl Drop for FakeDaemon {
    fn drop(&mut self) {
        self.server.abort();
    }
}

fn listen(dir: &RuntimeDir) -> OwnedFd {
    let kind = SocketType::SEQPACKET;
    let listener = socket_with(AddressFamily::UNIX, kind, SocketFlags::CLOEXEC, None).unwrap();
    let address = SocketAddrUnix::new(dir.fd_socket()).unwrap();
    rustix::net::bind(&listener, &address).unwrap();
    rustix::net::listen(&listener, 1).unwrap();
    listener
}

async fn accept(listener: OwnedFd) -> (FakePeer, FakeMemory) {
    let accepted = tokio::task::spawn_blocking(move || rustix::net::accept(&listener).unwrap());
    let peer = FakePeer(FrameSocket::new(accepted.await.unwrap()).unwrap());
    let memory = peer.welcome().await;
    // Hello and Attach, which were said meanwhile.
    peer.hear().await;
    peer.hear().await;
    (peer, memory)
}

fn serve(dir: &RuntimeDir, calls: Arc<Calls>) -> impl Future<Output = ()> + use<> {
    let listener = UnixListener::bind(dir.api_socket()).unwrap();
    async move {
        let (stream, _) = listener.accept().await.unwrap();
        let incoming = tokio_stream::StreamExt::chain(
            tokio_stream::once(Ok::<_, std::io::Error>(stream)),
            tokio_stream::pending(),
        );
        let domains = DomainServiceServer::from_arc(Arc::clone(&calls));
        let mappings = MappingServiceServer::from_arc(calls);
        let server = Server::builder().add_service(domains).add_service(mappings);
        server.serve_with_incoming(incoming).await.unwrap();
    }
}

/// What the gRPC side was asked, and what it shall say.
#[derive(Debug, Default)]
pub(crate) struct Calls {
    /// Entries of Unmap, in the order in which they came.
    pub(crate) unmapped: Mutex<Vec<v1::UnmapEntry>>,
    /// Mapping ids of FreeCoherent.
    pub(crate) freed: Mutex<Vec<u64>>,
    /// Mapping ids of Release, in the order in which they came.
    pub(crate) released: Mutex<Vec<u64>>,
    /// What Lease answers once, right or wrong, in place of what is free.
    pub(crate) lease_as: Mutex<Option<v1::LeaseResponse>>,
    /// Live leases, by first page of the bounce aperture.
    leases: Mutex<BTreeMap<u64, v1::LeaseResponse>>,
    /// Refusals for the next entries of Unmap; without one an entry succeeds.
    pub(crate) refuse_unmaps: Mutex<VecDeque<v1::Refusal>>,
    /// Map, Lease and AllocCoherent answer after so long.
    pub(crate) delay: Mutex<Duration>,
    /// Map never answers.
    pub(crate) hang: Mutex<bool>,
    /// How each StreamSetMap began.
    pub(crate) headers: Mutex<Vec<v1::SetMapHeader>>,
    /// What WatchDomain was asked.
    pub(crate) watched: Mutex<Vec<v1::WatchDomainRequest>>,
    /// What it says, before the domain is deleted.
    pub(crate) watch: Mutex<Vec<v1::WatchDomainResponse>>,
    /// What Pipeline was asked, and what it says.
    pub(crate) batches: Arc<Batches>,
    next_id: Mutex<u64>,
}

pub(crate) type PipelineAnswer = Result<v1::PipelineResponse, Status>;

/// Batches of all pipelines.
#[derive(Debug, Default)]
pub(crate) struct Batches {
    pub(crate) asked: Mutex<Vec<v1::PipelineRequest>>,
    /// What each is answered, right or wrong; when there is no more, that the
    /// daemon stops.
    pub(crate) answers: Mutex<VecDeque<v1::PipelineResponse>>,
}

impl Batches {
    fn next(&self, asked: v1::PipelineRequest) -> PipelineAnswer {
        self.asked.lock().unwrap().push(asked);
        let answer = self.answers.lock().unwrap().pop_front();
        answer.ok_or_else(|| Status::unavailable("the fake stops"))
    }
}

impl Calls {
    fn next_id(&self) -> u64 {
        let mut next = self.next_id.lock().unwrap();
        *next += 1;
        *next
    }

    async fn wait(&self) {
        if *self.hang.lock().unwrap() {
            pending::<()>().await;
        }
        let delay = *self.delay.lock().unwrap();
        tokio::time::sleep(delay).await;
    }

    /// The lowest pages of the bounce aperture that are free, as a lease.
    fn lease_one(&self, len_bytes: u64) -> Result<v1::LeaseResponse, v1::Refusal> {
        let pages = len_bytes.div_ceil(PAGE).max(1);
        let mut leases = self.leases.lock().unwrap();
        let is_free = |first: u64| {
            let taken = leases.iter();
            let mut taken = taken.map(|(at, lease)| *at..at + lease.len_bytes / PAGE);
            !taken.any(|taken| taken.start < first + pages && first < taken.end)
        };
        let last = BOUNCE_PAGES.checked_sub(pages);
        let first = last.and_then(|last| (0..=last).find(|first| is_free(*first)));
        let Some(first) = first else {
            return Err(v1::Refusal::because(
                Code::ResourceExhausted,
                v1::ErrorReason::NoSpace,
                "no hole".to_owned(),
            ));
        };
        let leased = v1::LeaseResponse {
            mapping_id: self.next_id(),
            iova: BOUNCE + first * PAGE,
            len_bytes: pages * PAGE,
        };
        leases.insert(first, leased);
        Ok(leased)
    }

    fn unmap_one(&self, entry: v1::UnmapEntry) -> v1::UnmapResult {
        self.unmapped.lock().unwrap().push(entry);
        v1::UnmapResult {
            copied_bytes: entry.written_bytes.unwrap_or(0),
            refusal: self.refuse_unmaps.lock().unwrap().pop_front(),
        }
    }
}

#[tonic::async_trait]
impl MappingService for Calls {
    async fn map(
        &self,
        request: Request<v1::MapRequest>,
    ) -> Result<Response<v1::MapResponse>, Status> {
        // A handler that is dropped at its first await did nothing.
        let results = request.into_inner().entries.into_iter().map(|entry| {
            let mapping = v1::StreamingMapping {
                mapping_id: self.next_id(),
                iova: BOUNCE,
                len_bytes: entry.len_bytes,
            };
            let outcome = Some(v1::map_result::Outcome::Mapping(mapping));
            v1::MapResult { outcome }
        });
        let results = results.collect();
        self.wait().await;
        Ok(Response::new(v1::MapResponse { results }))
    }

    async fn unmap(
        &self,
        request: Request<v1::UnmapRequest>,
    ) -> Result<Response<v1::UnmapResponse>, Status> {
        let v1::UnmapRequest {
            entries, partial, ..
        } = request.into_inner();
        let results: Vec<_> = entries.into_iter().map(|e| self.unmap_one(e)).collect();
        match results.iter().find_map(|result| result.refusal.clone()) {
            Some(refusal) if !partial => Err(refusal.into()),
            _ => Ok(Response::new(v1::UnmapResponse { results })),
        }
    }

    async fn sync(
        &self,
        _: Request<v1::SyncRequest>,
    ) -> Result<Response<v1::SyncResponse>, Status> {
        Err(Status::unimplemented("not in the fake"))
    }

    type PipelineStream = Pin<Box<dyn Stream<Item = PipelineAnswer> + Send>>;

    async fn pipeline(
        &self,
        request: Request<tonic::Streaming<v1::PipelineRequest>>,
    ) -> Result<Response<Self::PipelineStream>, Status> {
        let script = Arc::clone(&self.batches);
        let answers = request.into_inner().map(move |asked| script.next(asked?));
        Ok(Response::new(Box::pin(answers)))
    }

    async fn lease(
        &self,
        request: Request<v1::LeaseRequest>,
    ) -> Result<Response<v1::LeaseResponse>, Status> {
        let told = self.lease_as.lock().unwrap().take();
        let leased = match told {
            Some(told) => told,
            None => self.lease_one(request.get_ref().len_bytes)?,
        };
        self.wait().await;
        Ok(Response::new(leased))
    }

    async fn release(
        &self,
        request: Request<v1::ReleaseRequest>,
    ) -> Result<Response<v1::ReleaseResponse>, Status> {
        let id = request.get_ref().mapping_id;
        self.leases
            .lock()
            .unwrap()
            .retain(|_, lease| lease.mapping_id != id);
        self.released.lock().unwrap().push(id);
        Ok(Response::new(v1::ReleaseResponse::default()))
    }

    async fn alloc_coherent(
        &self,
        request: Request<v1::AllocCoherentRequest>,
    ) -> Result<Response<v1::AllocCoherentResponse>, Status> {
        let allocated = v1::AllocCoherentResponse {
            mapping_id: self.next_id(),
            iova: COHERENT,
            len_bytes: request.get_ref().len_bytes,
        };
        self.wait().await;
        Ok(Response::new(allocated))
    }

    async fn free_coherent(
        &self,
        request: Request<v1::FreeCoherentRequest>,
    ) -> Result<Response<v1::FreeCoherentResponse>, Status> {
        self.freed
            .lock()
            .unwrap()
            .push(request.get_ref().mapping_id);
        Ok(Response::new(v1::FreeCoherentResponse::default()))
    }

    async fn map_direct(
        &self,
        request: Request<v1::MapDirectRequest>,
    ) -> Result<Response<v1::MapDirectResponse>, Status> {
        let page = v1::DirectMapping {
            range: Some(wire_range(PAGE, 1)),
            memory_id: 1,
            offset: 0,
            perm: v1::Perm::Read.into(),
        };
        let outcome = Some(v1::map_direct_result::Outcome::Mapping(page));
        let count = request.get_ref().entries.len();
        let results = vec![v1::MapDirectResult { outcome }; count];
        Ok(Response::new(v1::MapDirectResponse { results }))
    }

    async fn stream_set_map(
        &self,
        request: Request<tonic::Streaming<v1::StreamSetMapRequest>>,
    ) -> Result<Response<v1::StreamSetMapResponse>, Status> {
        let mut messages = request.into_inner();
        let mut added = 0;
        while let Some(message) = messages.message().await? {
            self.headers.lock().unwrap().extend(message.header);
            added += message.entries.len() as u64;
        }
        let outcome = v1::SetMapResponse {
            generation: 7,
            added,
            removed: 0,
        };
        Ok(Response::new(v1::StreamSetMapResponse {
            outcome: Some(outcome),
        }))
    }

    async fn unmap_direct(
        &self,
        _: Request<v1::UnmapDirectRequest>,
    ) -> Result<Response<v1::UnmapDirectResponse>, Status> {
        Err(Status::unimplemented("not in the fake"))
    }

    async fn set_map(
        &self,
        _: Request<v1::SetMapRequest>,
    ) -> Result<Response<v1::SetMapResponse>, Status> {
        Err(Status::unimplemented("not in the fake"))
    }

    async fn clear_map(
        &self,
        _: Request<v1::ClearMapRequest>,
    ) -> Result<Response<v1::ClearMapResponse>, Status> {
        Err(Status::unimplemented("not in the fake"))
    }

    async fn reset_bounce(
        &self,
        _: Request<v1::ResetBounceRequest>,
    ) -> Result<Response<v1::ResetBounceResponse>, Status> {
        Err(Status::unimplemented("not in the fake"))
    }

    async fn translate(
        &self,
        _: Request<v1::TranslateRequest>,
    ) -> Result<Response<v1::TranslateResponse>, Status> {
        Err(Status::unimplemented("not in the fake"))
    }

    async fn lookup(&self, _: Request<v1::LookupRequest>) -> Result<Response<v1::Mapping>, Status> {
        Err(Status::unimplemented("not in the fake"))
    }

    async fn list_mappings(
        &self,
        _: Request<v1::ListMappingsRequest>,
    ) -> Result<Response<v1::ListMappingsResponse>, Status> {
        Err(Status::unimplemented("not in the fake"))
    }
}

#[tonic::async_trait]
impl DomainService for Calls {
    type WatchDomainStream =
        tokio_stream::Iter<std::vec::IntoIter<Result<v1::WatchDomainResponse, Status>>>;

    async fn watch_domain(
        &self,
        request: Request<v1::WatchDomainRequest>,
    ) -> Result<Response<Self::WatchDomainStream>, Status> {
        self.watched.lock().unwrap().push(request.into_inner());
        let said = std::mem::take(&mut *self.watch.lock().unwrap());
        let mut said: Vec<_> = said.into_iter().map(Ok).collect();
        said.push(Err(Status::not_found("the domain is deleted")));
        Ok(Response::new(tokio_stream::iter(said)))
    }

    async fn create_domain(
        &self,
        _: Request<v1::CreateDomainRequest>,
    ) -> Result<Response<v1::Domain>, Status> {
        Err(Status::unimplemented("not in the fake"))
    }

    async fn get_domain(
        &self,
        _: Request<v1::GetDomainRequest>,
    ) -> Result<Response<v1::Domain>, Status> {
        Err(Status::unimplemented("not in the fake"))
    }

    async fn list_domains(
        &self,
        _: Request<v1::ListDomainsRequest>,
    ) -> Result<Response<v1::ListDomainsResponse>, Status> {
        Err(Status::unimplemented("not in the fake"))
    }

    async fn update_domain(
        &self,
        _: Request<v1::UpdateDomainRequest>,
    ) -> Result<Response<v1::Domain>, Status> {
        Err(Status::unimplemented("not in the fake"))
    }

    async fn delete_domain(
        &self,
        _: Request<v1::DeleteDomainRequest>,
    ) -> Result<Response<v1::DeleteDomainResponse>, Status> {
        Err(Status::unimplemented("not in the fake"))
    }
}
