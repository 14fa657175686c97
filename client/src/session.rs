//! One attached process: its memory, its calls, its end.

use std::fmt;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use domain_core::addr::{Granule, Iova, IovaRange};
use domain_core::iotlb::Registered;
use domain_core::region::{Access, SharedU32, SharedU32Mut, SharedU64, SharedU64Mut};
use domain_core::session::{Role, SessionId};
use domaind_proto::frame::FrameSocket;
use domaind_proto::names::{DomainId, session_name};
use tokio::runtime::Handle;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tonic::{Response, Status};

use crate::apertures::AddressError;
use crate::changes::Changes;
use crate::client::{AttachOptions, Client, DomainCalls};
use crate::connection::Connection;
use crate::error::{EndReason, Ended, Error};
use crate::handshake::{self, Attachment, Facts};
use crate::live::Live;
use crate::pin::Pin;
use crate::pins::Pins;
use crate::undo::{Reaper, Undo};

/// How long a daemon may take to let a session in.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);

/// This process, attached to one domain. Cheap to clone; usable from several
/// tasks and threads.
///
/// The session ends when the last clone and the last guard
/// ([`Mapping`](crate::Mapping), [`Coherent`](crate::Coherent),
/// [`Buffer`](crate::Buffer)) are dropped (as soon as its runtime has undone
/// what they left), on [`Session::detach`], or when the daemon says so. Then
/// the daemon releases all that it held. What was mapped of the domain's
/// memory stays readable here as long as a handle or guard exists.
///
/// Calls that leave a guard, and those that end one, run to their end on the
/// runtime in which the session was attached, even if whoever waits for them is
/// cancelled.
///
/// # Forks
///
/// A session does not survive a fork. Where pins stand is memory that a child
/// shares with its parent, slot by slot: a pin that a child makes, or drops, is
/// taken for one of its parent's, whose own is then not seen any more. A child
/// that does not exec must not use a session, a guard or a pin of its parent,
/// nor drop them; it ends with `_exit`. Until it does, it holds what its parent
/// was given: the daemon keeps that in quarantine if the parent dies, and does
/// not if the parent detaches. What is started with [`std::process::Command`]
/// is exec'd, and inherits nothing.
#[derive(Clone, Debug)]
pub struct Session {
    pub(crate) inner: Arc<Inner>,
    /// Of `inner`: a pin, whose fence keeps all loads behind it waiting, has one less.
    live: Arc<Live>,
}

impl Session {
    pub(crate) async fn attach(
        client: &Client,
        domain: &DomainId,
        options: AttachOptions,
    ) -> Result<Session, Error> {
        let path = client.runtime_dir().fd_socket();
        let socket =
            FrameSocket::connect(&path).map_err(|cause| Error::NoDaemon { path, cause })?;
        let handshake = handshake::attach(&socket, domain, options);
        let attached = tokio::time::timeout(HANDSHAKE_TIMEOUT, handshake).await;
        let attachment = attached.map_err(|_| Error::Timeout {
            what: "the handshake",
            after: HANDSHAKE_TIMEOUT,
        })??;
        Ok(Session::start(client, socket, attachment))
    }

    fn start(client: &Client, socket: FrameSocket, attachment: Attachment) -> Session {
        let live = Arc::new(attachment.live);
        let connection = Arc::new(Connection::new(socket, Arc::clone(&live)));
        let calls = client.domain_calls(attachment.token);
        let (undo, queue) = mpsc::unbounded_channel();
        let reaper = Reaper {
            queue,
            calls: calls.clone(),
            connection: Arc::clone(&connection),
        };
        tokio::spawn(reaper.run());
        omit_fences(&live.pins);
        Session {
            live: Arc::clone(&live),
            inner: Arc::new(Inner {
                facts: attachment.facts,
                live,
                connection,
                calls,
                undo,
                runtime: Handle::current(),
            }),
        }
    }

    /// Its number on this node.
    #[must_use]
    pub fn id(&self) -> SessionId {
        self.inner.facts.id
    }

    /// Its resource name, `sessions/{session}`.
    #[must_use]
    pub fn name(&self) -> String {
        session_name(self.id())
    }

    /// The domain it is attached to.
    #[must_use]
    pub fn domain(&self) -> &DomainId {
        &self.inner.facts.domain
    }

    /// What it is there.
    #[must_use]
    pub fn role(&self) -> Role {
        self.inner.facts.role
    }

    /// How it may touch the domain's memory.
    #[must_use]
    pub fn access(&self) -> Access {
        self.inner.facts.access
    }

    /// False when read-only access is advisory.
    #[must_use]
    pub fn access_enforced(&self) -> bool {
        self.inner.facts.access_enforced
    }

    /// Generation of the IOTLB when the session was attached.
    #[must_use]
    pub fn generation(&self) -> u64 {
        self.inner.facts.generation
    }

    /// The domain's unit of allocation.
    #[must_use]
    pub fn granule(&self) -> Granule {
        self.inner.facts.granule
    }

    /// Where streaming mappings appear; `None` if the domain has no such
    /// aperture.
    #[must_use]
    pub fn bounce(&self) -> Option<IovaRange> {
        self.inner.live.apertures.bounce_range()
    }

    /// Where coherent memory lies; `None` if the domain has no such aperture.
    #[must_use]
    pub fn coherent(&self) -> Option<IovaRange> {
        self.inner.live.apertures.coherent_range()
    }

    /// Copies the domain's bytes at `iova` out of its aperture. A subtraction, a
    /// [pin](Session::pin) and a copy: no call, no system call.
    ///
    /// Other processes may write the same bytes meanwhile, and then the copy
    /// holds a mixture. Threads of this process must not: give each range one
    /// owner at a time. Nothing here knows whether the range is mapped for
    /// anybody ([`Pin::read`](crate::Pin::read) does); after the session's end
    /// the bytes may be anything.
    ///
    /// # Errors
    /// [`AddressError`] if not all of it lies in one aperture, backed.
    pub fn read(&self, iova: Iova, into: &mut [u8]) -> Result<(), AddressError> {
        // Without one after the end: then nobody waits for us any more.
        let _pin = self.pin().ok();
        self.live.apertures.read(iova, into)
    }

    /// Copies bytes into the domain at `iova`. Otherwise as
    /// [`Session::read`].
    ///
    /// # Errors
    /// [`AddressError`], also if the session is read-only, and after its end:
    /// the range may belong to somebody else by then.
    pub fn write(&self, iova: Iova, from: &[u8]) -> Result<(), AddressError> {
        let _pin = self.pin_to_write(iova, from.len() as u64)?;
        self.inner.live.apertures.write(iova, from)
    }

    /// The 32-bit word at `iova`, to load and to wait on.
    ///
    /// As all words that come from here it is good for who knows that the range
    /// stays mapped, as the owner of a mapping does: nobody waits for it when
    /// the range is unmapped. Those of a [`Pin`](crate::Pin) are waited for.
    ///
    /// # Errors
    /// [`AddressError`], also if `iova` is not a multiple of 4.
    pub fn word32(&self, iova: Iova) -> Result<SharedU32<'_>, AddressError> {
        self.inner.live.apertures.word32(iova)
    }

    /// The 32-bit word at `iova`, to load, store, wait on and wake.
    ///
    /// # Errors
    /// As [`Session::word32`], also if the session is read-only or has ended.
    pub fn word32_mut(&self, iova: Iova) -> Result<SharedU32Mut<'_>, AddressError> {
        let _pin = self.pin_to_write(iova, 4)?;
        self.inner.live.apertures.word32_mut(iova)
    }

    /// The 64-bit word at `iova`, to load.
    ///
    /// # Errors
    /// [`AddressError`], also if `iova` is not a multiple of 8.
    pub fn word64(&self, iova: Iova) -> Result<SharedU64<'_>, AddressError> {
        self.inner.live.apertures.word64(iova)
    }

    /// The 64-bit word at `iova`, to load and store.
    ///
    /// # Errors
    /// As [`Session::word64`], also if the session is read-only or has ended.
    pub fn word64_mut(&self, iova: Iova) -> Result<SharedU64Mut<'_>, AddressError> {
        let _pin = self.pin_to_write(iova, 8)?;
        self.inner.live.apertures.word64_mut(iova)
    }

    /// Resolves when the session has ended, and says how. Cancel safe.
    pub async fn ended(&self) -> Ended {
        self.inner.connection.ended().await
    }

    /// How the session ended; `None` while it lives.
    #[must_use]
    pub fn is_ended(&self) -> Option<Ended> {
        self.inner.connection.is_ended()
    }

    /// What changes in the domain, from now on: all that the session was
    /// attached to hear ([`AttachOptions`]), and what was asked to be given back.
    /// Each call has its own stream.
    #[must_use]
    pub fn changes(&self) -> Changes {
        self.inner.live.changes.subscribe()
    }

    /// Ends the session in order, for all clones and guards: waits until no
    /// [`Pin`](crate::Pin) is left, says to the daemon that nothing is held any
    /// more, and waits until it has released everything. If it is cancelled the
    /// session ends all the same.
    ///
    /// Pins of other clones are waited for as long as the daemon would wait for
    /// them. One that the same task holds never goes while it waits here.
    ///
    /// # Errors
    /// [`Error::Pinned`] when pins are left after that: nobody can pin any more,
    /// and the session ends when they are gone. [`Error::Ended`] if the session
    /// had ended otherwise before.
    pub async fn detach(self) -> Result<(), Error> {
        let patience = self.inner.facts.ack_timeout;
        let ended = self.inner.connection.detach(patience).await?;
        match ended.reason {
            EndReason::Detached => Ok(()),
            _ => Err(Error::Ended(ended)),
        }
    }

    #[inline]
    pub(crate) fn live(&self) -> &Live {
        &self.live
    }

    /// Runs a task where the session was attached.
    pub(crate) fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        self.inner.spawn(task);
    }

    /// `None` where there is nobody left who could use the range again.
    fn pin_to_write(&self, iova: Iova, len: u64) -> Result<Option<Pin<'_>>, AddressError> {
        match self.pin() {
            Ok(pin) if !self.live.pins.is_fenced() => Ok(Some(pin)),
            _ if self.has_memory_to_itself() => Ok(None),
            _ => Err(AddressError::Ended { iova, len }),
        }
    }

    /// Has the session ended in a way that nobody is left who could use its memory for anything
    /// else?
    #[cold]
    pub(crate) fn has_memory_to_itself(&self) -> bool {
        let ended = self.is_ended().map(|ended| ended.reason);
        matches!(
            ended,
            Some(EndReason::DomainDeleted | EndReason::Shutdown | EndReason::ConnectionLost)
        )
    }
}

/// Lets pins for leases do without fences, as soon as that may be. To register takes milliseconds, once in a process:
/// nobody waits for it.
fn omit_fences(pins: &Arc<Pins>) {
    if !pins.may_omit_fences() {
        return;
    }
    if let Some(process) = Registered::already() {
        return pins.omit_fences(process);
    }
    let pins = Arc::clone(pins);
    tokio::task::spawn_blocking(move || {
        if let Some(process) = Registered::register() {
            pins.omit_fences(process);
        }
    });
}

/// What all handles and guards of a session share.
pub(crate) struct Inner {
    facts: Facts,
    live: Arc<Live>,
    pub(crate) connection: Arc<Connection>,
    calls: DomainCalls,
    undo: mpsc::UnboundedSender<Undo>,
    /// Where the session was attached.
    runtime: Handle,
}

impl Inner {
    /// Runs `work` to its end, even if whoever waits here is cancelled. What
    /// it returns is then dropped: guards undo themselves.
    pub(crate) async fn finish<T: Send + 'static>(
        &self,
        work: impl Future<Output = T> + Send + 'static,
    ) -> Result<T, Error> {
        joined(self.runtime.spawn(work)).await
    }

    /// As `finish`, for work that blocks its thread.
    pub(crate) async fn finish_blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, Error> {
        joined(self.runtime.spawn_blocking(work)).await
    }

    /// Runs a task where the session was attached.
    pub(crate) fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        self.runtime.spawn(task);
    }

    /// Waits for a call of this session, but not past the session's end.
    pub(crate) async fn call<T>(
        &self,
        answer: impl Future<Output = Result<Response<T>, Status>>,
    ) -> Result<T, Error> {
        if let Some(ended) = self.connection.is_ended() {
            return Err(Error::Ended(ended));
        }
        tokio::select! {
            biased; // an answer that came is worth more than the end behind it
            answer = answer => match answer {
                Ok(response) => Ok(response.into_inner()),
                Err(status) => Err(self.is_ended_or(status.into())),
            },
            ended = self.connection.ended() => Err(Error::Ended(ended)),
        }
    }

    #[inline]
    pub(crate) fn live(&self) -> &Live {
        &self.live
    }

    /// The way to the daemon, with the session's token.
    pub(crate) fn calls(&self) -> DomainCalls {
        self.calls.clone()
    }

    /// Never waits. After the session's end there is nothing left to undo.
    pub(crate) fn undo_later(&self, undo: Undo) {
        let _ = self.undo.send(undo);
    }

    pub(crate) fn bounce(&self) -> Option<IovaRange> {
        self.live.apertures.bounce_range()
    }

    pub(crate) fn coherent(&self) -> Option<IovaRange> {
        self.live.apertures.coherent_range()
    }

    /// The end of a session explains the failure of its calls.
    pub(crate) fn is_ended_or(&self, error: Error) -> Error {
        self.connection.is_ended().map_or(error, Error::Ended)
    }
}

/// A panic of the task is a panic here; else a task ends early only with its
/// runtime.
async fn joined<T>(task: JoinHandle<T>) -> Result<T, Error> {
    match task.await {
        Ok(done) => Ok(done),
        Err(failed) if failed.is_panic() => std::panic::resume_unwind(failed.into_panic()),
        Err(_) => Err(Error::Ended(Ended::runtime_gone())),
    }
}

impl fmt::Debug for Inner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Session")
            .field("facts", &self.facts)
            .field("live", &self.live)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use domain_core::coherent::CoherentSpec;
    use domain_core::streaming::MapSpec;

    use super::*;
    use crate::{Buffer, Coherent, Lease, LeaseSpec, Mapping, Owner, SetMapOptions};

    fn may_be_spawned<T: Send>(_: &T) {}
    fn may_be_shared<T: Send + Sync + 'static>() {}

    /// Compiles, that is all.
    #[allow(dead_code)]
    fn everything_works_from_several_tasks(session: Session, spec: MapSpec, mapping: Mapping) {
        may_be_shared::<(
            Client,
            Session,
            Owner,
            Mapping,
            Coherent,
            Lease,
            Buffer,
            Error,
        )>();
        may_be_spawned(&session.map(spec));
        may_be_spawned(&session.buffer(1));
        may_be_spawned(&session.alloc_coherent(CoherentSpec::of(1)));
        may_be_spawned(&session.lease(LeaseSpec::of(1)));
        may_be_spawned(&session.ended());
        may_be_spawned(&session.stream_set_map([], SetMapOptions::default()));
        may_be_spawned(&mapping.sync_for_cpu(0, 1));
        may_be_spawned(&mapping.unmap(None));
        may_be_spawned(&session.detach());
    }
}
