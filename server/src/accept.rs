//! Connections, counted per user.
//!
//! The loop is our own: tonic's and tokio's would spin when the process is out
//! of file descriptors, and know no limit per user.

use std::collections::HashMap;
use std::io;
use std::os::fd::AsFd;
use std::pin::Pin;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::SeqCst;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use rustix::io::Errno;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{UnixListener, UnixStream};
use tokio::time::{Instant, Sleep};
use tokio_util::sync::CancellationToken;
use tonic::transport::server::Connected;

use crate::features::Features;
use crate::metrics::COUNTS;
use crate::peer::Peer;
use crate::registry::Door;
use crate::rights::pass_fds;
use crate::tenant::Tenant;

/// How long a connection may say nothing after it was accepted.
const SILENCE_LIMIT: Duration = Duration::from_secs(5);
/// A peer that takes nothing for so long does not keep a daemon that stops: one
/// that never reads leaves its streams no room to end in, and never says goodbye.
const PARTING_LIMIT: Duration = Duration::from_millis(250);
/// How long to wait when the process is out of file descriptors.
const EXHAUSTED_PAUSE: Duration = Duration::from_millis(100);

/// Accepts connections of one socket.
#[derive(Debug)]
pub(crate) struct Acceptor {
    listener: UnixListener,
    door: Door,
    features: Features,
    seats: Seats,
    stop: CancellationToken,
}

/// Who calls: pinned when the connection was accepted.
#[derive(Clone, Debug)]
pub(crate) struct Caller {
    pub(crate) peer: Arc<Peer>,
    pub(crate) door: Door,
    /// Of this connection.
    pub(crate) calls: Calls,
}

/// The calls of one connection, counted. Clones share the counts.
#[derive(Clone, Debug, Default)]
pub(crate) struct Calls(Arc<CallCounts>);

#[derive(Debug, Default)]
struct CallCounts {
    begun: AtomicU64,
    answered: AtomicU64,
}

/// A call until it is answered, or given up. A stream is answered when it begins.
#[derive(Debug)]
pub(crate) struct UnderWay(Calls);

/// An accepted connection; it keeps its seat until it is dropped.
#[derive(Debug)]
pub(crate) struct Connection {
    pub(crate) stream: UnixStream,
    pub(crate) caller: Caller,
    pub(crate) seat: Seat,
    /// Until the first byte: who has nothing to say shall not keep a seat.
    silence: Option<Pin<Box<Sleep>>>,
    stop: CancellationToken,
    /// Since the daemon stops and the peer has taken nothing more.
    parting: Option<Parting>,
}

/// How long a connection may still keep a daemon that stops.
#[derive(Debug)]
struct Parting {
    limit: Pin<Box<Sleep>>,
    /// Calls that had been answered when it began.
    answered: u64,
}

impl Acceptor {
    /// Takes over a listening socket. Must be called inside a runtime.
    pub(crate) fn new(
        listener: std::os::unix::net::UnixListener,
        door: Door,
        features: Features,
        seats: Seats,
        stop: CancellationToken,
    ) -> io::Result<Acceptor> {
        Ok(Acceptor {
            listener: UnixListener::from_std(listener)?,
            door,
            features,
            seats,
            stop,
        })
    }

    /// The next connection that has a seat; `None` when the daemon stops.
    /// Cancelling closes the connection that was about to be seated.
    pub(crate) async fn next(&self) -> Option<Connection> {
        loop {
            let accepted = tokio::select! {
                () = self.stop.cancelled() => return None,
                accepted = self.listener.accept() => accepted,
            };
            match accepted {
                Ok((stream, _)) => match self.seat(stream).await {
                    Some(connection) => return Some(connection),
                    None => continue,
                },
                // The connection waits in the backlog; those that are open go on.
                Err(cause) => pause(&cause).await,
            }
        }
    }

    async fn seat(&self, stream: UnixStream) -> Option<Connection> {
        // It is as its listener was when it connected, which for one that waited
        // for us at a socket that was passed may be before we forbade them.
        let _ = pass_fds(&stream, false);
        let peer = loop {
            match Peer::of(stream.as_fd(), self.features) {
                Ok(peer) => break Arc::new(peer),
                // It took the last descriptor and its pidfd needs one more.
                Err(cause) if is_exhaustion(&cause) => pause(&cause).await,
                Err(cause) => {
                    tracing::debug!(%cause, "a peer whose identity is not to be had");
                    return None;
                }
            }
        };
        let Some(seat) = self.seats.take(peer.as_ref().into()) else {
            COUNTS.seats_refused.count();
            tracing::info!(%peer, limit = self.seats.per_user, "too many connections of one user");
            return None;
        };
        Some(Connection {
            stream,
            caller: Caller {
                peer,
                door: self.door,
                calls: Calls::default(),
            },
            seat,
            silence: Some(Box::pin(tokio::time::sleep(SILENCE_LIMIT))),
            stop: self.stop.clone(),
            parting: None,
        })
    }
}

/// Are there no file descriptors left, for this process or for anybody?
fn is_exhaustion(cause: &io::Error) -> bool {
    matches!(
        Errno::from_io_error(cause),
        Some(Errno::MFILE | Errno::NFILE)
    )
}

async fn pause(cause: &io::Error) {
    tracing::warn!(%cause, "cannot accept a connection, pausing");
    tokio::time::sleep(EXHAUSTED_PAUSE).await;
}

/// How many connections each user has. Clones share the count.
#[derive(Clone, Debug)]
pub(crate) struct Seats {
    per_user: u32,
    /// Only users with at least one connection. Held for one look-up.
    taken: Arc<Mutex<HashMap<Tenant, u32>>>,
}

/// One connection's place; dropping it gives the place back.
#[derive(Debug)]
pub(crate) struct Seat {
    seats: Seats,
    tenant: Tenant,
}

impl Seats {
    pub(crate) fn new(per_user: u32) -> Seats {
        Seats {
            per_user,
            taken: Arc::default(),
        }
    }

    pub(crate) fn take(&self, tenant: Tenant) -> Option<Seat> {
        let mut taken = self.lock();
        let count = taken.get(&tenant).copied().unwrap_or(0);
        if count >= self.per_user {
            return None;
        }
        taken.insert(tenant, count + 1);
        Some(Seat {
            seats: self.clone(),
            tenant,
        })
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Tenant, u32>> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        let mut taken = self.seats.lock();
        match taken.get(&self.tenant).copied() {
            Some(count) if count > 1 => {
                taken.insert(self.tenant, count - 1);
            }
            _ => {
                taken.remove(&self.tenant);
            }
        }
    }
}

impl Calls {
    /// Counts one that begins.
    pub(crate) fn begin(&self) -> UnderWay {
        self.0.begun.fetch_add(1, SeqCst);
        UnderWay(self.clone())
    }

    fn answered(&self) -> u64 {
        self.0.answered.load(SeqCst)
    }

    /// How many were answered; `None` while one is under way.
    fn all_answered(&self) -> Option<u64> {
        let answered = self.answered();
        (self.0.begun.load(SeqCst) == answered).then_some(answered)
    }
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        self.0.0.answered.fetch_add(1, SeqCst);
    }
}

impl Parting {
    fn new(calls: &Calls) -> Parting {
        Parting {
            limit: Box::pin(tokio::time::sleep(PARTING_LIMIT)),
            answered: calls.answered(),
        }
    }

    /// Waits until no call has been under way for a whole limit: an answer that
    /// was just given must have its chance to be written.
    fn poll(&mut self, calls: &Calls, cx: &mut Context<'_>) -> Poll<()> {
        loop {
            ready!(self.limit.as_mut().poll(cx));
            if calls.all_answered() == Some(self.answered) {
                return Poll::Ready(());
            }
            self.answered = calls.answered();
            self.renew();
        }
    }

    /// The whole limit again, for whoever waits for it, too.
    fn renew(&mut self) {
        self.limit.as_mut().reset(Instant::now() + PARTING_LIMIT);
    }
}

impl Connection {
    /// For whenever the peer has nothing, or takes nothing: fails when it has
    /// kept a daemon that stops for long enough. That the daemon stops wakes
    /// whoever serves the connection anyway.
    fn poll_parting(&mut self, cx: &mut Context<'_>) -> Poll<io::Error> {
        if !self.stop.is_cancelled() {
            return Poll::Pending;
        }
        let calls = &self.caller.calls;
        let parting = self.parting.get_or_insert_with(|| Parting::new(calls));
        ready!(parting.poll(calls, cx));
        let message = format!("the daemon stops, and nothing was taken within {PARTING_LIMIT:?}");
        Poll::Ready(io::Error::new(io::ErrorKind::TimedOut, message))
    }

    /// What came of a write.
    fn written(
        &mut self,
        wrote: Poll<io::Result<usize>>,
        cx: &mut Context<'_>,
    ) -> Poll<io::Result<usize>> {
        if wrote.is_pending() {
            return self.poll_parting(cx).map(Err);
        }
        // Not dropped: whoever waits for it may not come again.
        if let Some(parting) = &mut self.parting {
            parting.renew();
        }
        wrote
    }
}

impl Connected for Connection {
    type ConnectInfo = Caller;

    fn connect_info(&self) -> Caller {
        self.caller.clone()
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let read = Pin::new(&mut self.stream).poll_read(cx, buf);
        if read.is_ready() {
            self.silence = None;
            return read;
        }
        if let Some(silence) = &mut self.silence
            && silence.as_mut().poll(cx).is_ready()
        {
            let message = format!("nothing was said within {SILENCE_LIMIT:?}");
            return Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, message)));
        }
        self.poll_parting(cx).map(Err)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        let wrote = Pin::new(&mut self.stream).poll_write(cx, buf);
        self.written(wrote, cx)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let wrote = Pin::new(&mut self.stream).poll_write_vectored(cx, bufs);
        self.written(wrote, cx)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::time::timeout;

    fn user(uid: u32) -> Tenant {
        Tenant::user(uid)
    }

    #[test]
    fn one_users_flood_leaves_seats_for_others() {
        let seats = Seats::new(2);
        let held = [seats.take(user(1)).unwrap(), seats.take(user(1)).unwrap()];
        assert!(seats.take(user(1)).is_none());
        assert!(seats.take(user(2)).is_some());
        drop(held);
        assert!(seats.take(user(1)).is_some());
        assert!(seats.lock().is_empty());
    }

    /// A connection, its peer, and what stops the daemon.
    fn connected() -> (Connection, UnixStream, CancellationToken) {
        let (near, far) = UnixStream::pair().unwrap();
        let stop = CancellationToken::new();
        let connection = Connection {
            caller: Caller {
                peer: Arc::new(Peer::of(near.as_fd(), Features::probe()).unwrap()),
                door: Door::Public,
                calls: Calls::default(),
            },
            stream: near,
            seat: Seats::new(1).take(user(1)).unwrap(),
            silence: None,
            stop: stop.clone(),
            parting: None,
        };
        (connection, far, stop)
    }

    #[tokio::test(start_paused = true)]
    async fn a_silent_peer_keeps_a_daemon_only_until_it_stops() {
        let (mut connection, _far, stop) = connected();
        let read = timeout(Duration::from_secs(60), connection.read_u8()).await;
        assert!(read.is_err(), "closed without a reason");
        stop.cancel();
        let begun = Instant::now();
        let error = connection.read_u8().await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        assert!(begun.elapsed() < 2 * PARTING_LIMIT);
    }

    #[tokio::test(start_paused = true)]
    async fn a_peer_that_does_not_read_keeps_it_no_longer() {
        let (mut connection, _far, stop) = connected();
        stop.cancel();
        let begun = Instant::now();
        let error = connection.write_all(&[0; 1 << 22]).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        assert!(begun.elapsed() < 2 * PARTING_LIMIT);
    }

    #[tokio::test(start_paused = true)]
    async fn what_it_takes_meanwhile_gives_it_more_time_and_not_for_ever() {
        let (connection, mut far, stop) = connected();
        let (mut read, mut write) = tokio::io::split(connection);
        stop.cancel();
        let begun = Instant::now();
        let reading = tokio::spawn(async move { read.read_u8().await });
        for _ in 0..5 {
            tokio::time::sleep(PARTING_LIMIT / 2).await;
            write.write_all(b"x").await.unwrap();
            far.read_u8().await.unwrap();
        }
        assert!(!reading.is_finished());
        reading.await.unwrap().unwrap_err();
        assert!(begun.elapsed() >= 3 * PARTING_LIMIT);
        assert!(begun.elapsed() < 5 * PARTING_LIMIT);
    }

    #[tokio::test(start_paused = true)]
    async fn a_call_under_way_keeps_it_until_its_answer_can_be_written() {
        let (mut connection, _far, stop) = connected();
        let call = connection.caller.calls.begin();
        stop.cancel();
        let read = timeout(40 * PARTING_LIMIT, connection.read_u8()).await;
        assert!(read.is_err(), "cut off under a call");
        drop(call);
        let begun = Instant::now();
        connection.read_u8().await.unwrap_err();
        assert!(begun.elapsed() >= PARTING_LIMIT);
    }
}
