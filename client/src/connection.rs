//! A session's fd socket: who waits for which answer, and how it ended.

use std::collections::HashMap;
use std::ops::ControlFlow;
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use domaind_proto::frame::{FrameError, FrameSocket, Packet};
use domaind_proto::v1;
use domaind_proto::v1::client_frame::Body as Ask;
use domaind_proto::v1::server_frame::Body as Answer;
use rustix::net::Shutdown;
use tokio::sync::{oneshot, watch};
use tokio_util::task::AbortOnDropHandle;

use crate::error::{EndReason, Ended, Error, ProtocolError};
use crate::handshake::{FIRST_FREE_ID, frame_name, out_of_turn};

type Waiting = HashMap<u64, oneshot::Sender<Result<Answer, v1::Refusal>>>;
/// A packet, the end, or what is wrong.
pub(crate) type Received = Result<Option<Packet<v1::ServerFrame>>, FrameError>;

/// The connection of an attached session. Closes when it is dropped, which
/// ends the session.
#[derive(Debug)]
pub(crate) struct Connection {
    shared: Arc<Shared>,
    next_id: AtomicU64,
    _receiver: AbortOnDropHandle<()>,
}

impl Connection {
    /// Takes the socket after the handshake. Inside a tokio runtime.
    pub(crate) fn new(socket: FrameSocket) -> Connection {
        let shared = Arc::new(Shared {
            socket,
            waiting: Mutex::new(Some(HashMap::new())),
            detaching: AtomicBool::new(false),
            ended: watch::Sender::new(None),
        });
        let receiver = Receiver(Arc::clone(&shared));
        Connection {
            shared,
            next_id: AtomicU64::new(FIRST_FREE_ID),
            _receiver: AbortOnDropHandle::new(tokio::spawn(receiver.run())),
        }
    }

    /// Asks, and waits for the answer. If this is cancelled the daemon may
    /// still do what it was asked to; the answer is then dropped.
    pub(crate) async fn request(
        &self,
        body: Ask,
        fd: Option<BorrowedFd<'_>>,
    ) -> Result<Answer, Error> {
        let request_id = self.next_id.fetch_add(1, Ordering::Relaxed);
        let answer = self.shared.expect(request_id)?;
        let frame = v1::ClientFrame {
            request_id,
            body: Some(body),
        };
        if let Err(error) = self.shared.socket.send(&frame, fd).await {
            self.shared.forget(request_id);
            return Err(self
                .is_ended()
                .map_or_else(|| Error::from_frame(error), Error::Ended));
        }
        match answer.await {
            Ok(answer) => answer.map_err(Error::Refused),
            Err(_) => Err(Error::Ended(self.ended().await)),
        }
    }

    /// Asks the daemon to end the session, and waits until all is released.
    pub(crate) async fn detach(&self) -> Ended {
        self.shared.detaching.store(true, Ordering::Relaxed);
        let frame = v1::ClientFrame {
            request_id: self.next_id.fetch_add(1, Ordering::Relaxed),
            body: Some(Ask::Detach(v1::Detach {})),
        };
        // If it cannot be sent the connection is broken, and the receiver says how.
        let _ = self.shared.socket.send(&frame, None).await;
        self.ended().await
    }

    pub(crate) fn is_ended(&self) -> Option<Ended> {
        self.shared.ended.borrow().clone()
    }

    pub(crate) async fn ended(&self) -> Ended {
        let mut ended = self.shared.ended.subscribe();
        match ended.wait_for(Option::is_some).await.as_deref() {
            Ok(Some(ended)) => ended.clone(),
            _ => unreachable!("the sender lives as long as `self`, and Some was waited for"),
        }
    }
}

#[derive(Debug)]
struct Shared {
    socket: FrameSocket,
    /// Who waits for which answer; `None` once the session has ended. Held for
    /// single operations of the map, never across an await.
    waiting: Mutex<Option<Waiting>>,
    /// This side asked for the end. Nothing else hangs on it: relaxed.
    detaching: AtomicBool,
    /// Set once.
    ended: watch::Sender<Option<Ended>>,
}

impl Shared {
    fn waiting(&self) -> MutexGuard<'_, Option<Waiting>> {
        // A map after a panic is still a map.
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn expect(
        &self,
        request_id: u64,
    ) -> Result<oneshot::Receiver<Result<Answer, v1::Refusal>>, Error> {
        let (sender, receiver) = oneshot::channel();
        match self.waiting().as_mut() {
            Some(waiting) => waiting.insert(request_id, sender),
            None => {
                let ended = self.ended.borrow().clone();
                return Err(Error::Ended(ended.unwrap_or_else(Ended::closed)));
            }
        };
        Ok(receiver)
    }

    fn forget(&self, request_id: u64) {
        if let Some(waiting) = self.waiting().as_mut() {
            waiting.remove(&request_id);
        }
    }

    /// Gives an answer to whoever waits for it.
    fn answer(
        &self,
        request_id: u64,
        answer: Result<Answer, v1::Refusal>,
    ) -> Result<(), ProtocolError> {
        let waiter = self
            .waiting()
            .as_mut()
            .and_then(|waiting| waiting.remove(&request_id));
        let waiter = waiter.ok_or(ProtocolError::UnknownRequest { request_id })?;
        // Whoever asked may have been cancelled.
        let _ = waiter.send(answer);
        Ok(())
    }

    /// Ends the session for this side; the first reason stays. Whoever waits
    /// is told, and the daemon, too.
    fn end(&self, ended: Ended) {
        self.ended.send_if_modified(|known| {
            let is_first = known.is_none();
            known.get_or_insert(ended);
            is_first
        });
        // In this order: who finds nobody to answer finds the reason.
        drop(self.waiting().take());
        let _ = rustix::net::shutdown(&self.socket, Shutdown::Both);
    }

    /// What one packet, or the lack of one, means.
    fn take(&self, received: Received) -> ControlFlow<Ended> {
        let packet = match received {
            Ok(Some(packet)) => packet,
            Ok(None) => return ControlFlow::Break(self.how_it_closed(Ended::closed())),
            Err(FrameError::Io(cause)) => {
                return ControlFlow::Break(self.how_it_closed(Ended::lost(&cause)));
            }
            Err(broken) => return ControlFlow::Break(ProtocolError::Frame(broken).into()),
        };
        if let Some(Answer::SessionEnded(ended)) = packet.frame.body {
            return ControlFlow::Break(ended.into());
        }
        match self.deliver(packet) {
            Ok(()) => ControlFlow::Continue(()),
            Err(broken) => ControlFlow::Break(broken.into()),
        }
    }

    fn deliver(&self, packet: Packet<v1::ServerFrame>) -> Result<(), ProtocolError> {
        let v1::ServerFrame { request_id, body } = packet.frame;
        let body = body.ok_or(ProtocolError::Missing { field: "body" })?;
        if packet.fd.is_some() {
            let frame = frame_name(&body);
            return Err(ProtocolError::UnwantedFd { frame });
        }
        match body {
            Answer::Refusal(refusal) => self.answer(request_id, Err(refusal)),
            Answer::MemoryRegistered(_) | Answer::MemoryUnregistered(_) => {
                self.answer(request_id, Ok(body))
            }
            other => Err(out_of_turn(&other, "an answer")),
        }
    }

    fn how_it_closed(&self, otherwise: Ended) -> Ended {
        if self.detaching.load(Ordering::Relaxed) {
            Ended::new(EndReason::Detached, "detached")
        } else {
            otherwise
        }
    }
}

/// Owns receiving. When it goes, for whatever reason, the session has ended.
struct Receiver(Arc<Shared>);

impl Receiver {
    async fn run(self) {
        let ended = loop {
            let received = self.0.socket.receive().await;
            if let ControlFlow::Break(ended) = self.0.take(received) {
                break ended;
            }
        };
        self.0.end(ended);
    }
}

impl Drop for Receiver {
    fn drop(&mut self) {
        // After run() this changes nothing.
        self.0.end(Ended::runtime_gone());
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::timeout;
    use tonic::Code;

    use super::*;
    use crate::fake::{FakePeer, SOON, memfd};

    fn connected() -> (Connection, FakePeer) {
        let (client, daemon) = FakePeer::pair();
        (Connection::new(client), daemon)
    }

    fn unregister(memory_id: u64) -> Ask {
        Ask::UnregisterMemory(v1::UnregisterMemory { memory_id })
    }

    fn registered(memory_id: u64) -> Answer {
        Answer::MemoryRegistered(v1::MemoryRegistered {
            memory_id,
            size_bytes: 0,
        })
    }

    /// How the session ends when the daemon says this unasked.
    async fn end_after(body: Answer, fd: Option<&std::os::fd::OwnedFd>) -> EndReason {
        let (connection, daemon) = connected();
        daemon.say(99, body, fd).await;
        let ended = timeout(SOON, connection.ended()).await.unwrap();
        // The daemon learns of it.
        assert!(daemon.hear().await.is_none());
        ended.reason
    }

    #[tokio::test]
    async fn answers_find_who_asked_in_whatever_order_they_come() {
        let (connection, daemon) = connected();
        let daemon_side = async {
            let asked = [daemon.hear().await.unwrap(), daemon.hear().await.unwrap()];
            for frame in asked.into_iter().rev() {
                let Some(Ask::UnregisterMemory(about)) = frame.body else {
                    panic!("{frame:?}")
                };
                let answer = registered(about.memory_id);
                daemon.say(frame.request_id, answer, None).await;
            }
        };

        let (first, second, ()) = tokio::join!(
            connection.request(unregister(1), None),
            connection.request(unregister(2), None),
            daemon_side
        );

        assert_eq!(
            (first.unwrap(), second.unwrap()),
            (registered(1), registered(2))
        );
    }

    #[tokio::test]
    async fn a_refusal_answers_its_request_and_leaves_the_session() {
        let (connection, daemon) = connected();
        let refusal = v1::Refusal::because(Code::NotFound, v1::ErrorReason::NoSuchMemory, "no");
        let daemon_side = async {
            let asked = daemon.hear().await.unwrap();
            let body = Answer::Refusal(refusal.clone());
            daemon.say(asked.request_id, body, None).await;
        };

        let (answer, ()) = tokio::join!(connection.request(unregister(1), None), daemon_side);

        assert_eq!(answer.unwrap_err().reason(), v1::ErrorReason::NoSuchMemory);
        assert_eq!(connection.is_ended(), None);
    }

    #[tokio::test]
    async fn the_end_of_a_session_reaches_who_waits_and_who_comes_later() {
        let (connection, daemon) = connected();
        let daemon_side = async {
            daemon.hear().await.unwrap();
            let ended = v1::SessionEnded {
                reason: v1::EndReason::Evicted.into(),
                message: "by the operator".to_owned(),
            };
            daemon.say(0, Answer::SessionEnded(ended), None).await;
        };

        let (waiting, ()) = tokio::join!(connection.request(unregister(1), None), daemon_side);
        let later = connection.request(unregister(2), None).await;

        let evicted = Ended::new(EndReason::Evicted, "by the operator");
        for outcome in [waiting, later] {
            let Err(Error::Ended(ended)) = outcome else {
                panic!("{outcome:?}")
            };
            assert_eq!(ended, evicted);
        }
        assert_eq!(connection.is_ended(), Some(evicted));
    }

    #[tokio::test]
    async fn the_reason_of_an_end_is_heard_even_if_the_daemon_did_not_read_our_last_frames() {
        let (connection, daemon) = connected();
        let ended = v1::SessionEnded {
            reason: v1::EndReason::Shutdown.into(),
            message: "the daemon stops".to_owned(),
        };
        // The daemon closes over a frame that it has not read.
        let unread = v1::ClientFrame {
            request_id: 3,
            body: Some(unregister(1)),
        };
        connection.shared.socket.send(&unread, None).await.unwrap();
        daemon.say(0, Answer::SessionEnded(ended), None).await;
        drop(daemon);

        let ended = timeout(SOON, connection.ended()).await.unwrap();

        assert_eq!(ended.reason, EndReason::Shutdown);
    }

    #[tokio::test]
    async fn a_daemon_that_dies_is_a_lost_connection() {
        let (connection, daemon) = connected();
        let request = connection.request(unregister(1), None);
        let death = async {
            daemon.hear().await.unwrap();
            drop(daemon);
        };

        let (outcome, ()) = tokio::join!(request, death);

        assert!(
            matches!(&outcome, Err(Error::Ended(ended)) if ended.reason == EndReason::ConnectionLost),
            "{outcome:?}"
        );
    }

    #[tokio::test]
    async fn a_daemon_that_breaks_the_protocol_is_left() {
        let broken = EndReason::DaemonProtocol;
        assert_eq!(
            end_after(registered(1), None).await,
            broken,
            "no such request"
        );
        assert_eq!(
            end_after(registered(1), Some(&memfd(1))).await,
            broken,
            "an fd"
        );
        let again = Answer::Ready(v1::Ready { generation: 1 });
        assert_eq!(end_after(again, None).await, broken, "out of turn");
    }

    #[tokio::test]
    async fn detaching_waits_until_the_daemon_closes() {
        let (connection, daemon) = connected();
        let daemon_side = async {
            let asked = daemon.hear().await.unwrap();
            assert!(matches!(asked.body, Some(Ask::Detach(_))));
            assert_eq!(connection.is_ended(), None);
            drop(daemon);
        };

        let (ended, ()) = tokio::join!(connection.detach(), daemon_side);

        assert_eq!(ended.reason, EndReason::Detached);
    }

    #[tokio::test]
    async fn dropping_the_connection_closes_it() {
        let (connection, daemon) = connected();
        drop(connection);
        assert!(daemon.hear().await.is_none());
    }

    #[test]
    fn a_runtime_that_shuts_down_ends_the_session() {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        let (connection, _daemon) = runtime.block_on(async { connected() });

        drop(runtime);

        let reason = connection.is_ended().map(|ended| ended.reason);
        assert_eq!(reason, Some(EndReason::RuntimeGone));
    }
}
