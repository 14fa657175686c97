//! Connections, counted per user.
//!
//! The loop is our own: tonic's and tokio's would spin when the process is out
//! of file descriptors, and know no limit per user.

use std::collections::HashMap;
use std::io;
use std::os::fd::AsFd;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use rustix::io::Errno;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{UnixListener, UnixStream};
use tokio::time::Sleep;
use tokio_util::sync::CancellationToken;
use tonic::transport::server::Connected;

use crate::features::Features;
use crate::peer::Peer;
use crate::registry::Door;

/// How long a connection may say nothing after it was accepted.
const SILENCE_LIMIT: Duration = Duration::from_secs(5);
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
}

/// An accepted connection; it keeps its seat until it is dropped.
#[derive(Debug)]
pub(crate) struct Connection {
    pub(crate) stream: UnixStream,
    pub(crate) caller: Caller,
    pub(crate) seat: Seat,
    /// Until the first byte: who has nothing to say shall not keep a seat.
    silence: Option<Pin<Box<Sleep>>>,
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
        let Some(seat) = self.seats.take(peer.uid()) else {
            tracing::info!(%peer, limit = self.seats.per_user, "too many connections of one user");
            return None;
        };
        Some(Connection {
            stream,
            caller: Caller {
                peer,
                door: self.door,
            },
            seat,
            silence: Some(Box::pin(tokio::time::sleep(SILENCE_LIMIT))),
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
    taken: Arc<Mutex<HashMap<u32, u32>>>,
}

/// One connection's place; dropping it gives the place back.
#[derive(Debug)]
pub(crate) struct Seat {
    seats: Seats,
    uid: u32,
}

impl Seats {
    pub(crate) fn new(per_user: u32) -> Seats {
        Seats {
            per_user,
            taken: Arc::default(),
        }
    }

    pub(crate) fn take(&self, uid: u32) -> Option<Seat> {
        let mut taken = self.lock();
        let count = taken.get(&uid).copied().unwrap_or(0);
        if count >= self.per_user {
            return None;
        }
        taken.insert(uid, count + 1);
        Some(Seat {
            seats: self.clone(),
            uid,
        })
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<u32, u32>> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        let mut taken = self.seats.lock();
        match taken.get(&self.uid).copied() {
            Some(count) if count > 1 => {
                taken.insert(self.uid, count - 1);
            }
            _ => {
                taken.remove(&self.uid);
            }
        }
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
        match &mut self.silence {
            Some(silence) => silence.as_mut().poll(cx).map(|()| {
                let message = format!("nothing was said within {SILENCE_LIMIT:?}");
                Err(io::Error::new(io::ErrorKind::TimedOut, message))
            }),
            None => Poll::Pending,
        }
    }
}

impl AsyncWrite for Connection {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
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
        Pin::new(&mut self.stream).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_users_flood_leaves_seats_for_others() {
        let seats = Seats::new(2);
        let held = [seats.take(1).unwrap(), seats.take(1).unwrap()];
        assert!(seats.take(1).is_none());
        assert!(seats.take(2).is_some());
        drop(held);
        assert!(seats.take(1).is_some());
        assert!(seats.lock().is_empty());
    }
}
