//! The protocol of the fd socket, one task per connection. The connection is
//! the session.

mod changes;

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use domain_core::iotlb::SESSION_PAGE_BYTES;
use domain_core::layout::ApertureKind;
use domain_core::limits::FRAME_BYTES;
use domain_core::memory::MemoryId;
use domain_core::region::{Access, Backing, ClientMemory, Grant, RegionError};
use domain_core::session::AckError;
use domaind_proto::frame::{FrameError, FrameSocket, Packet};
use domaind_proto::names::{DomainId, session_name};
use domaind_proto::v1::client_frame::Body as Asked;
use domaind_proto::v1::server_frame::Body as Answer;
use domaind_proto::v1::{self, ClientFrame, EndReason, ErrorReason, Refusal, ServerFrame};
use domaind_proto::{FD_PROTOCOL_MAX, FD_PROTOCOL_MIN, convert};
use rustix::net::Shutdown;
use tokio::io::unix::AsyncFd;
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tonic::Code;

use crate::accept::{Acceptor, Caller, Connection};
use crate::audit::{self, Decision, Event, Outcome};
use crate::live::{Live, Wants};
use crate::metrics::COUNTS;
use crate::offload::off_worker;
use crate::peer::Peer;
use crate::policy::Wish;
use crate::registry::{Admission, Registry};
use crate::rights::pass_fds;
use crate::terms::InForce;
use crate::visitor::{Leave, Visitor};
use crate::{ghost, settle};

/// A client that has not attached by then is not going to.
const HANDSHAKE_LIMIT: Duration = Duration::from_secs(10);
/// What is read of the name that a client gives itself.
const AGENT_CHARS: usize = 64;
/// Requests of one session that wait for others to acknowledge; further ones are
/// not read meanwhile.
const REQUESTS_WAITING: usize = 64;
/// A client that does not read is dropped, not buffered for.
const SEND_LIMIT: Duration = Duration::from_secs(5);

/// Serves the fd socket.
#[derive(Debug)]
pub(crate) struct FdSocket {
    pub(crate) registry: Arc<Registry>,
    pub(crate) terms: InForce,
    /// Differs between two runs of the daemon.
    pub(crate) instance: String,
    pub(crate) stop: CancellationToken,
}

/// Why a conversation came to its end.
#[derive(Debug)]
enum Over {
    /// The client says that it holds nothing any more.
    Detached,
    /// The client closed.
    Closed,
    /// The service ends it, and says why.
    Ended(EndReason, String),
}

impl FdSocket {
    /// Accepts until the daemon stops; waits for all conversations to end.
    pub(crate) async fn run(self: Arc<Self>, acceptor: Acceptor) {
        let conversations = TaskTracker::new();
        while let Some(connection) = acceptor.next().await {
            conversations.spawn(Arc::clone(&self).serve(connection));
        }
        conversations.close();
        conversations.wait().await;
    }

    async fn serve(self: Arc<Self>, connection: Connection) {
        let Connection {
            stream,
            caller,
            seat,
            ..
        } = connection;
        let frames = stream
            .into_std()
            .map(OwnedFd::from)
            .and_then(FrameSocket::new);
        let Ok(frames) = frames else { return };
        let (session, over) = self.converse(&frames, &caller).await;
        if let Over::Ended(reason, message) = &over {
            tracing::info!(peer = %caller.peer, ?reason, message, "ending a session");
            let ended = Answer::SessionEnded(v1::SessionEnded {
                reason: (*reason).into(),
                message: message.clone(),
            });
            let _ = send(&frames, 0, ended, None).await;
            // What the client still has to say is heard; the service has said all.
            let _ = rustix::net::shutdown(&frames, Shutdown::Write);
        }
        if let Some(session) = session {
            self.see_off(&frames, &session, &over).await;
        }
        drop(seat);
    }

    /// Answers the session that there was, ended.
    async fn converse(&self, frames: &FrameSocket, caller: &Caller) -> (Option<Arc<Live>>, Over) {
        let handshake = timeout(HANDSHAKE_LIMIT, self.handshake(frames, caller));
        let attached = tokio::select! {
            () = self.stop.cancelled() => return (None, shutdown()),
            handshake = handshake => handshake,
        };
        let session = match attached {
            Ok(Ok(session)) => session,
            Ok(Err(over)) => return (None, over),
            Err(_) => {
                let over = broken(format!("not attached within {HANDSHAKE_LIMIT:?}"));
                return (None, over);
            }
        };
        let over = tokio::select! {
            biased;
            over = attend(frames, &session) => over,
            // Told by its registry entry, unless it came in while all were told.
            () = self.stop.cancelled() => shutdown(),
        };
        let live = Arc::clone(&session.live);
        session.end(&over).await;
        (Some(live), over)
    }

    /// A session has ended: listens to what it still has to say, and looks
    /// whether it can reach anything, until it cannot.
    async fn see_off(&self, frames: &FrameSocket, live: &Arc<Live>, over: &Over) {
        let by_itself = !matches!(over, Over::Ended(..)) || live.peer.is_dead();
        if ghost::looks_gone(&self.registry, live, by_itself).await {
            return;
        }
        let (registry, stop) = (Arc::clone(&self.registry), self.stop.clone());
        let looking = tokio::spawn(ghost::keep_looking(registry, Arc::clone(live), stop));
        // Another process that has the socket, too, does not speak for the one that is gone.
        if by_itself {
            return;
        }
        tokio::select! {
            () = self.stop.cancelled() => {}
            () = last_words(frames, &self.registry, live) => {}
            _ = looking => {}
        }
    }

    /// Hello, then Attach until one is granted.
    async fn handshake(&self, frames: &FrameSocket, caller: &Caller) -> Result<Attachment, Over> {
        let (request, hello) = match next_bare(frames).await? {
            (request, Asked::Hello(hello)) => (request, hello),
            _ => return Err(broken("the first frame must be Hello".into())),
        };
        self.welcome(frames, request, &hello).await?;
        let agent: String = hello.agent.chars().take(AGENT_CHARS).collect();
        tracing::debug!(peer = %caller.peer, agent, "hello");
        loop {
            let (request, attach) = match next_bare(frames).await? {
                (request, Asked::Attach(attach)) => (request, attach),
                (_, Asked::Detach(_)) => return Err(Over::Detached),
                _ => return Err(broken("Attach must follow Hello".into())),
            };
            match self.admit(caller, &attach) {
                Ok(session) => {
                    // Nobody sent one before: it would have failed.
                    let _ = pass_fds(frames, true);
                    session.introduce(frames, request).await?;
                    return Ok(session);
                }
                Err(refusal) => refuse(frames, request, refusal, &caller.peer).await?,
            }
        }
    }

    async fn welcome(
        &self,
        frames: &FrameSocket,
        request: u64,
        hello: &v1::Hello,
    ) -> Result<(), Over> {
        let newest = hello.max_version.min(FD_PROTOCOL_MAX);
        if newest < hello.min_version.max(FD_PROTOCOL_MIN) {
            let (min, max) = (hello.min_version, hello.max_version);
            return Err(broken(format!(
                "the client speaks versions {min} to {max}, this daemon {FD_PROTOCOL_MIN} to {FD_PROTOCOL_MAX}"
            )));
        }
        let welcome = v1::Welcome {
            version: newest,
            instance: self.instance.clone(),
            max_frame_bytes: convert::count(FRAME_BYTES),
        };
        send(frames, request, Answer::Welcome(welcome), None).await
    }

    /// Lets a peer in or not, and writes it down.
    fn admit(&self, caller: &Caller, attach: &v1::Attach) -> Result<Attachment, Refusal> {
        let admitted = self.try_admit(caller, attach);
        let wish = wish(attach).ok();
        let domain = DomainId::parse(&attach.domain).ok();
        let outcome = match &admitted {
            Ok((attachment, rule)) => Outcome::Granted {
                rule,
                session: attachment.live.id.get(),
            },
            Err(refusal) => Outcome::Denied(refusal),
        };
        audit::record(&Decision {
            event: Event::Attach,
            peer: &caller.peer,
            domain: domain.as_ref(),
            wish,
            outcome,
        });
        Ok(admitted?.0)
    }

    /// Who calls, parse, one call into the registry. Answers by which rule, too.
    fn try_admit(
        &self,
        caller: &Caller,
        attach: &v1::Attach,
    ) -> Result<(Attachment, String), Refusal> {
        let peer = &caller.peer;
        let terms = self.terms.get();
        let visitor = Visitor::new(caller, Arc::clone(&terms))?;
        if peer.is_dead() {
            let message = format!("{peer} has ended; its connection is not its successor's");
            let reason = ErrorReason::WrongPeer;
            return Err(Refusal::because(Code::PermissionDenied, reason, message));
        }
        let id = DomainId::parse(&attach.domain)?;
        let wish = wish(attach)?;
        let Wish { role, access } = wish;
        let ack_mode = convert::ack_mode(attach.ack_mode)?;
        let Leave { domain, rule } = visitor.to_attach(&self.registry, &id, wish)?;
        let access_enforced = terms.policy.check_access(peer, access)?;
        let admission = Admission {
            domain,
            role,
            access,
            access_enforced,
            peer: Arc::clone(peer),
            ack_mode,
            wants: Wants {
                removals: attach.wants_removals,
                additions: attach.wants_additions,
            },
        };
        let (live, generation) = self.registry.admit(admission)?;
        tracing::info!(%peer, session = %live.id, domain = %id, %role, ?access, "attached");
        let attachment = Attachment {
            registry: Arc::clone(&self.registry),
            live,
            generation,
            ack_timeout: terms.ack_timeout,
            ended: false,
            stop: self.stop.clone(),
        };
        Ok((attachment, rule))
    }
}

fn wish(attach: &v1::Attach) -> Result<Wish, Refusal> {
    Ok(Wish {
        role: convert::role(attach.role)?,
        access: convert::access(attach.access)?,
    })
}

/// A session between its admission and its end. Dropping it ends it, too: a
/// cancelled handshake or a panic leaves nothing behind.
#[derive(Debug)]
struct Attachment {
    registry: Arc<Registry>,
    live: Arc<Live>,
    generation: u64,
    /// How long it may owe an acknowledgment: what it is told when it attaches.
    ack_timeout: Duration,
    ended: bool,
    /// For whoever looks after it when it has been dropped.
    stop: CancellationToken,
}

impl Attachment {
    /// Tells the client who it is, and hands it the memory.
    async fn introduce(&self, frames: &FrameSocket, request: u64) -> Result<(), Over> {
        let live = &self.live;
        let apertures = [ApertureKind::Bounce, ApertureKind::Coherent];
        let apertures: Vec<_> = apertures
            .into_iter()
            .filter_map(|kind| live.domain.core.aperture(kind))
            .collect();
        let range = |wanted: ApertureKind| {
            apertures
                .iter()
                .find(|aperture| aperture.kind() == wanted)
                .map(|aperture| aperture.range().into())
        };
        let attached = v1::Attached {
            session: session_name(live.id),
            token: live.token.bytes(),
            granule_bytes: live.domain.core.layout().granule().bytes(),
            bounce: range(ApertureKind::Bounce),
            coherent: range(ApertureKind::Coherent),
            regions: convert::count(apertures.len() + 2),
            access_enforced: live.access_enforced,
            ack_timeout_ms: u64::try_from(self.ack_timeout.as_millis()).unwrap_or(u64::MAX),
        };
        send(frames, request, Answer::Attached(attached), None).await?;
        for aperture in &apertures {
            let region = v1::Region {
                kind: v1::RegionKind::from(aperture.kind()).into(),
                range: Some(aperture.range().into()),
                hugetlb: aperture.backing() == Backing::Hugetlb2M,
                size_bytes: aperture.range().len_bytes().unwrap_or(0),
            };
            let grant = aperture.grant(live.access, live.id.get());
            self.hand_over(frames, request, region, grant).await?;
        }
        let core = &live.domain.core;
        let table = v1::Region {
            kind: v1::RegionKind::Table.into(),
            size_bytes: core.table_len_bytes(),
            ..v1::Region::default()
        };
        let grant = core.grant_table(live.id.get());
        self.hand_over(frames, request, table, grant).await?;
        let page = v1::Region {
            kind: v1::RegionKind::SessionPage.into(),
            size_bytes: SESSION_PAGE_BYTES,
            ..v1::Region::default()
        };
        let grant = live.reader.grant_page();
        self.hand_over(frames, request, page, grant).await?;
        send(
            frames,
            request,
            Answer::Ready(v1::Ready {
                generation: self.generation,
            }),
            None,
        )
        .await
    }

    async fn hand_over(
        &self,
        frames: &FrameSocket,
        request: u64,
        region: v1::Region,
        grant: Result<Grant, RegionError>,
    ) -> Result<(), Over> {
        let grant = grant.map_err(|error| {
            tracing::error!(session = %self.live.id, %error, "granting a region");
            let message = "the region could not be opened".to_owned();
            Over::Ended(EndReason::Unspecified, message)
        })?;
        send(frames, request, Answer::Region(region), Some(grant.into())).await
    }

    /// Releases all that the session held. Zeroing it may take a while, so a
    /// thread does it that may block.
    async fn end(mut self, over: &Over) {
        let (registry, live) = (Arc::clone(&self.registry), Arc::clone(&self.live));
        let reason = match over {
            Over::Detached => None,
            Over::Closed => Some(EndReason::Unspecified),
            Over::Ended(reason, _) => Some(*reason),
        };
        let end = move || match reason {
            Some(reason) => registry.end(&live, reason),
            None => registry.forget(&live),
        };
        self.ended = tokio::task::spawn_blocking(end).await.is_ok();
    }
}

impl Drop for Attachment {
    fn drop(&mut self) {
        if !self.ended {
            let (registry, live) = (Arc::clone(&self.registry), Arc::clone(&self.live));
            let stop = self.stop.clone();
            let end = {
                let (registry, live) = (Arc::clone(&registry), Arc::clone(&live));
                move || registry.end(&live, EndReason::Unspecified)
            };
            // It may have much to zero; a panic may have left no runtime.
            match tokio::runtime::Handle::try_current() {
                Ok(runtime) => drop(runtime.spawn(async move {
                    let _ = off_worker(end).await;
                    if !ghost::looks_gone(&registry, &live, true).await {
                        ghost::keep_looking(registry, live, stop).await;
                    }
                })),
                Err(_) => end(),
            }
        }
        tracing::info!(peer = %self.live.peer, session = %self.live.id, "session ended");
    }
}

/// Serves an attached client until one side ends it.
async fn attend(frames: &FrameSocket, session: &Attachment) -> Over {
    let (live, joined) = (&session.live, session.generation);
    let ack_timeout = session.ack_timeout;
    tokio::select! {
        biased;
        reason = live.end.called() => Over::Ended(reason, explain(reason).into()),
        () = death(&live.peer) => {
            Over::Ended(EndReason::PeerGone, "the process that attached has ended".into())
        }
        over = requests(frames, live) => over,
        over = changes::tell(frames, live, joined, ack_timeout) => over,
    }
}

/// Reads what a session that was ended still says, until it says that it holds
/// nothing any more, or closes.
async fn last_words(frames: &FrameSocket, registry: &Arc<Registry>, live: &Arc<Live>) {
    loop {
        let said = match next(frames).await {
            Ok(packet) => packet.frame.body,
            Err(_) => return,
        };
        match said {
            Some(Asked::Ack(ack)) => {
                // One that is wrong counts for nothing.
                let _ = acknowledge(live, ack.generation).await;
            }
            Some(Asked::Detach(_)) => {
                let (registry, live) = (Arc::clone(registry), Arc::clone(live));
                let _ = off_worker(move || registry.forget(&live)).await;
                return;
            }
            _ => {}
        }
    }
}

/// Reads requests. Those that have to wait for others are answered when they
/// are done, and more is read meanwhile.
async fn requests(frames: &FrameSocket, live: &Arc<Live>) -> Over {
    let mut waiting = JoinSet::new();
    loop {
        let can_wait = waiting.len() < REQUESTS_WAITING;
        let done = tokio::select! {
            Some(done) = waiting.join_next() => match done {
                Ok((request, answer)) => reply(frames, live, request, answer).await,
                Err(_) => Err(Over::Ended(EndReason::Unspecified, "a bug in domaind".into())),
            },
            packet = next(frames), if can_wait => match packet {
                Ok(packet) => one_request(frames, live, packet, &mut waiting).await,
                Err(over) => Err(over),
            },
        };
        if let Err(over) = done {
            return over;
        }
    }
}

type Reply = Result<(Answer, Option<OwnedFd>), Refusal>;

async fn one_request(
    frames: &FrameSocket,
    live: &Arc<Live>,
    packet: Packet<ClientFrame>,
    waiting: &mut JoinSet<(u64, Reply)>,
) -> Result<(), Over> {
    let Packet { frame, fd, lost_fd } = packet;
    let request = frame.request_id;
    if lost_fd {
        let message = "the daemon has no free file descriptor for what came along";
        let refusal = Refusal::because(Code::ResourceExhausted, ErrorReason::NoMemory, message);
        return refuse(frames, request, refusal, &live.peer).await;
    }
    let answer = match (frame.body, fd) {
        (Some(Asked::RegisterMemory(asked)), Some(fd)) => register(live, fd, asked).await,
        (Some(Asked::UnregisterMemory(asked)), None) => {
            let (live, id) = (Arc::clone(live), MemoryId::new(asked.memory_id));
            waiting.spawn(async move { (request, unregister(&live, id).await) });
            return Ok(());
        }
        (Some(Asked::Ack(ack)), None) => return acknowledge(live, ack.generation).await,
        (Some(Asked::OpenMemory(asked)), None) => open(live, asked.region).await,
        (Some(Asked::Detach(_)), None) => return Err(Over::Detached),
        (Some(Asked::RegisterMemory(_)), None) => {
            return Err(broken("RegisterMemory without its fd".into()));
        }
        (Some(Asked::Hello(_) | Asked::Attach(_)), None) => Err(Refusal::because(
            Code::FailedPrecondition,
            ErrorReason::OutOfTurn,
            "this connection is a session already",
        )),
        (_, Some(_)) => return Err(broken("an fd with a frame that takes none".into())),
        (None, None) => return Err(broken("a frame without a body".into())),
    };
    reply(frames, live, request, answer).await
}

async fn reply(frames: &FrameSocket, live: &Live, request: u64, answer: Reply) -> Result<(), Over> {
    match answer {
        Ok((answer, fd)) => send(frames, request, answer, fd).await,
        Err(refusal) => refuse(frames, request, refusal, &live.peer).await,
    }
}

/// What it frees may be much to zero: on a thread that may block, if it is.
async fn acknowledge(live: &Arc<Live>, generation: u64) -> Result<(), Over> {
    let acknowledge = {
        let live = Arc::clone(live);
        move || live.domain.core.acknowledge(live.id, generation)
    };
    let acknowledged = match live.domain.core.awaits_much() {
        true => match off_worker(acknowledge).await {
            Ok(acknowledged) => acknowledged,
            Err(bug) => return Err(Over::Ended(EndReason::Unspecified, bug.message)),
        },
        false => acknowledge(),
    };
    live.reader.ring();
    match acknowledged {
        Ok(()) => Ok(()),
        // Forgotten meanwhile.
        Err(AckError::NoSession { .. }) => Ok(()),
        Err(error @ AckError::Ahead { .. }) => Err(broken(error.to_string())),
    }
}

/// On a thread that may block: closing a hostile file can.
async fn register(live: &Arc<Live>, fd: OwnedFd, asked: v1::RegisterMemory) -> Reply {
    let live = Arc::clone(live);
    off_worker(move || {
        let memory = ClientMemory::accept(fd, asked.writable)?;
        let size_bytes = memory.size_bytes();
        let core = &live.domain.core;
        let id = core.register(live.id, memory, asked.persistent)?;
        let registered = v1::MemoryRegistered {
            memory_id: id.get(),
            size_bytes,
        };
        Ok((Answer::MemoryRegistered(registered), None))
    })
    .await?
}

async fn unregister(live: &Arc<Live>, id: MemoryId) -> Reply {
    let unregister = {
        let live = Arc::clone(live);
        move || live.domain.core.unregister(live.id, id)
    };
    let removal = off_worker(unregister).await??;
    settle::acknowledged(&live.domain, removal.generation).await?;
    let done = Answer::MemoryUnregistered(v1::MemoryUnregistered {});
    Ok((done, None))
}

/// On a thread that may block: the file is a client's.
async fn open(live: &Arc<Live>, region: u32) -> Reply {
    let live = Arc::clone(live);
    off_worker(move || {
        let region = convert::memory_region(region)?;
        let (id, memory) = live.domain.core.open_memory(live.id, region)?;
        let shared = memory.share(live.access)?;
        let is_kept = !shared.others_may_write && shared.owner_uid != live.peer.uid();
        let access_enforced = shared.writable || (live.access_enforced && is_kept);
        if live.access == Access::ReadOnly && live.access_enforced && !access_enforced {
            let message =
                format!("the mode of memory {id} would not hold a read-only session to reading");
            let reason = ErrorReason::Unenforceable;
            return Err(Refusal::because(Code::PermissionDenied, reason, message));
        }
        let opened = v1::MemoryOpened {
            memory_id: id.get(),
            size_bytes: memory.size_bytes(),
            writable: shared.writable,
            hugetlb: memory.is_hugetlb(),
            access_enforced,
        };
        Ok((Answer::MemoryOpened(opened), Some(shared.fd)))
    })
    .await?
}

/// Resolves when the process has died; never where the kernel has no pidfds.
async fn death(peer: &Peer) {
    let watched = peer.pidfd().and_then(|pidfd| watch(pidfd.ok()?).ok());
    match watched {
        // An error means that nothing is to be learnt here; the connection's
        // end still ends the session.
        Some(pidfd) => match pidfd.readable().await {
            Ok(_) => {}
            Err(_) => std::future::pending().await,
        },
        None => std::future::pending().await,
    }
}

#[expect(
    deprecated,
    reason = "its successor is unsafe to call, for types that lie about their fd; OwnedFd does not"
)]
fn watch(pidfd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    AsyncFd::with_interest(pidfd, tokio::io::Interest::READABLE)
}

async fn next(frames: &FrameSocket) -> Result<Packet<ClientFrame>, Over> {
    match frames.receive().await {
        Ok(Some(packet)) => Ok(packet),
        // A reset is how a killed client's end looks.
        Ok(None) | Err(FrameError::Io(_)) => Err(Over::Closed),
        Err(error) => Err(broken(error.to_string())),
    }
}

/// A frame that brings no fd.
async fn next_bare(frames: &FrameSocket) -> Result<(u64, Asked), Over> {
    match next(frames).await? {
        Packet { fd: Some(_), .. } => Err(broken("an fd with a frame that takes none".into())),
        Packet {
            frame:
                ClientFrame {
                    request_id,
                    body: Some(body),
                },
            ..
        } => Ok((request_id, body)),
        Packet {
            frame: ClientFrame { body: None, .. },
            ..
        } => Err(broken("a frame without a body".into())),
    }
}

async fn send(
    frames: &FrameSocket,
    request_id: u64,
    answer: Answer,
    fd: Option<OwnedFd>,
) -> Result<(), Over> {
    let frame = ServerFrame {
        request_id,
        body: Some(answer),
    };
    let sent = timeout(
        SEND_LIMIT,
        frames.send(&frame, fd.as_ref().map(AsFd::as_fd)),
    )
    .await;
    match sent {
        Ok(Ok(())) => {
            if fd.is_some() {
                COUNTS.fds_passed.count();
            }
            Ok(())
        }
        Ok(Err(error)) => {
            tracing::debug!(%error, "a client that cannot be answered");
            Err(Over::Closed)
        }
        Err(_) => Err(broken(format!(
            "the client has read nothing for {SEND_LIMIT:?}"
        ))),
    }
}

async fn refuse(
    frames: &FrameSocket,
    request: u64,
    refusal: Refusal,
    peer: &Peer,
) -> Result<(), Over> {
    tracing::info!(%peer, reason = refusal.reason().as_str_name(), message = refusal.message, "refused");
    send(frames, request, Answer::Refusal(refusal), None).await
}

fn broken(message: String) -> Over {
    Over::Ended(EndReason::Protocol, message)
}

fn shutdown() -> Over {
    Over::Ended(EndReason::Shutdown, explain(EndReason::Shutdown).into())
}

fn explain(reason: EndReason) -> &'static str {
    match reason {
        EndReason::Unspecified => "the session has ended",
        EndReason::Evicted => "the session was evicted",
        EndReason::DomainDeleted => "the domain was deleted",
        EndReason::Shutdown => "the daemon stops",
        EndReason::Protocol => "the protocol was broken",
        EndReason::PeerGone => "the process that attached has ended",
        EndReason::Fenced => "the session did not acknowledge in time what was removed",
    }
}
