//! A session's fd socket: who waits for which answer, what has to be
//! acknowledged, and how it ended.

use std::collections::HashMap;
use std::ops::ControlFlow;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use domain_core::iotlb::RegionId;
use domain_core::region::MapError;
use domaind_proto::frame::{FrameError, FrameSocket, Packet};
use domaind_proto::v1;
use domaind_proto::v1::client_frame::Body as Ask;
use domaind_proto::v1::server_frame::Body as Answer;
use rustix::io::Errno;
use rustix::net::Shutdown;
use tokio::runtime::Handle;
use tokio::sync::{oneshot, watch};
use tokio_util::task::AbortOnDropHandle;

use crate::error::{EndReason, Ended, Error, ProtocolError};
use crate::handshake::{FIRST_FREE_ID, frame_name, out_of_turn};
use crate::live::Live;

type Waiting = HashMap<u64, Waiter>;
type Answered = Result<Answer, Error>;
/// A packet, the end, or what is wrong.
pub(crate) type Received = Result<Option<Packet<v1::ServerFrame>>, FrameError>;

/// The connection of an attached session. Closes when it is dropped, which
/// ends the session.
#[derive(Debug)]
pub(crate) struct Connection {
    shared: Arc<Shared>,
    /// Where it was made.
    runtime: Handle,
    _receiver: AbortOnDropHandle<()>,
    _acknowledger: AbortOnDropHandle<()>,
}

impl Connection {
    /// Takes the socket after the handshake. Inside a tokio runtime.
    pub(crate) fn new(socket: FrameSocket, live: Arc<Live>) -> Connection {
        let shared = Arc::new(Shared {
            socket,
            live,
            next_id: AtomicU64::new(FIRST_FREE_ID),
            waiting: Mutex::new(Some(HashMap::new())),
            detaching: AtomicBool::new(false),
            ended: watch::Sender::new(None),
        });
        let receiver = Receiver(Arc::clone(&shared));
        let acknowledger = acknowledge(Arc::clone(&shared));
        Connection {
            shared,
            runtime: Handle::current(),
            _receiver: AbortOnDropHandle::new(tokio::spawn(receiver.run())),
            _acknowledger: AbortOnDropHandle::new(tokio::spawn(acknowledger)),
        }
    }

    /// Asks, and waits for the answer. If this is cancelled the daemon may
    /// still do what it was asked to; the answer is then dropped, but opened
    /// memory is mapped.
    pub(crate) async fn request(
        &self,
        body: Ask,
        fd: Option<BorrowedFd<'_>>,
    ) -> Result<Answer, Error> {
        let request_id = self.shared.next_id();
        let answer = self.shared.expect(request_id, opened_by(&body))?;
        if let Err(error) = self.shared.send(request_id, body, fd).await {
            self.shared.forget(request_id);
            return Err(self
                .is_ended()
                .map_or_else(|| Error::from_frame(error), Error::Ended));
        }
        match answer.await {
            Ok(answer) => answer,
            Err(_) => Err(Error::Ended(self.ended().await)),
        }
    }

    /// Waits for all pins, asks the daemon to end the session, and waits until
    /// all is released.
    ///
    /// If this is cancelled, or the pins are not gone in time, that happens all
    /// the same as soon as they are.
    ///
    /// # Errors
    /// [`Error::Pinned`].
    pub(crate) async fn detach(&self, patience: Duration) -> Result<Ended, Error> {
        self.shared.detaching.store(true, Ordering::Relaxed);
        self.shared.live.close();
        let shared = Arc::clone(&self.shared);
        let leave = self.runtime.spawn(async move { shared.leave().await });
        tokio::select! {
            biased;
            // The connection may break while pins are held.
            ended = self.ended() => Ok(ended),
            left = tokio::time::timeout(patience, leave) => match left {
                Ok(_) => Ok(self.ended().await),
                Err(_) => Err(Error::Pinned { after: patience }),
            },
        }
    }

    /// Says that nothing is held any more. For the end, when nobody is left who
    /// could hold something.
    pub(crate) async fn say_detach(&self) {
        if self.is_ended().is_none() {
            self.shared.say_detach().await;
        }
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
    /// What changes are about.
    live: Arc<Live>,
    next_id: AtomicU64,
    /// Who waits for which answer; `None` once the session has ended. Held for
    /// single operations of the map, never across an await.
    waiting: Mutex<Option<Waiting>>,
    /// This side asked for the end. Nothing else hangs on it: relaxed.
    detaching: AtomicBool,
    /// Set once.
    ended: watch::Sender<Option<Ended>>,
}

/// Who waits for an answer.
#[derive(Debug)]
struct Waiter {
    answer: oneshot::Sender<Answered>,
    /// The memory that was asked for.
    opens: Option<Opening>,
}

/// Memory that is on its way.
#[derive(Debug)]
struct Opening {
    region: RegionId,
    /// A change has closed the region meanwhile. What comes may be what was
    /// there before: the daemon tells of changes while it opens files.
    is_overtaken: bool,
}

/// How receiving ends.
enum End {
    /// The daemon has said that the session ends; it still listens.
    Told(Ended),
    /// There is nobody, or nobody to talk to.
    Broken(Ended),
}

impl Shared {
    fn waiting(&self) -> MutexGuard<'_, Option<Waiting>> {
        // A map after a panic is still a map.
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn next_id(&self) -> u64 {
        self.next_id.fetch_add(1, Ordering::Relaxed)
    }

    async fn send(
        &self,
        request_id: u64,
        body: Ask,
        fd: Option<BorrowedFd<'_>>,
    ) -> Result<(), FrameError> {
        let frame = v1::ClientFrame {
            request_id,
            body: Some(body),
        };
        self.socket.send(&frame, fd).await
    }

    /// Waits for the last pin, and then detaches. `Live::close` comes first.
    async fn leave(&self) {
        self.live.at_rest().await;
        self.say_detach().await;
    }

    async fn say_detach(&self) {
        self.detaching.store(true, Ordering::Relaxed);
        let detach = Ask::Detach(v1::Detach {});
        // If it cannot be sent the connection is broken, and the receiver says how.
        let _ = self.send(self.next_id(), detach, None).await;
    }

    fn expect(
        &self,
        request_id: u64,
        opens: Option<RegionId>,
    ) -> Result<oneshot::Receiver<Answered>, Error> {
        let (answer, receiver) = oneshot::channel();
        let opens = opens.map(|region| Opening {
            region,
            is_overtaken: false,
        });
        match self.waiting().as_mut() {
            Some(waiting) => waiting.insert(request_id, Waiter { answer, opens }),
            None => {
                let ended = self.ended.borrow().clone();
                return Err(Error::Ended(ended.unwrap_or_else(Ended::closed)));
            }
        };
        Ok(receiver)
    }

    fn forget(&self, request_id: u64) {
        drop(self.take_waiter(request_id));
    }

    fn take_waiter(&self, request_id: u64) -> Option<Waiter> {
        self.waiting().as_mut()?.remove(&request_id)
    }

    /// Who waits for an answer, and does so no longer.
    fn waiter(&self, request_id: u64) -> Result<Waiter, ProtocolError> {
        self.take_waiter(request_id)
            .ok_or(ProtocolError::UnknownRequest { request_id })
    }

    /// Ends the session for this side; the first reason stays. Whoever waits
    /// is told.
    fn conclude(&self, ended: Ended) {
        self.ended.send_if_modified(|known| {
            let is_first = known.is_none();
            known.get_or_insert(ended);
            is_first
        });
        // In this order: who finds nobody to answer, or no pin, finds the reason.
        drop(self.waiting().take());
        self.live.close();
    }

    /// As `conclude`, and the daemon is told, too.
    fn hang_up(&self, ended: Ended) {
        self.conclude(ended);
        let _ = rustix::net::shutdown(&self.socket, Shutdown::Both);
    }

    /// What one packet, or the lack of one, means.
    fn take(&self, received: Received) -> ControlFlow<End> {
        let broken = |ended| ControlFlow::Break(End::Broken(ended));
        let packet = match received {
            Ok(Some(packet)) => packet,
            Ok(None) => return broken(self.how_it_closed(Ended::closed())),
            Err(FrameError::Io(cause)) => return broken(self.how_it_closed(Ended::lost(&cause))),
            Err(error) => return broken(ProtocolError::Frame(error).into()),
        };
        if let Some(Answer::SessionEnded(ended)) = packet.frame.body {
            return ControlFlow::Break(End::Told(ended.into()));
        }
        match self.deliver(packet) {
            Ok(()) => ControlFlow::Continue(()),
            Err(error) => broken(error.into()),
        }
    }

    fn deliver(&self, packet: Packet<v1::ServerFrame>) -> Result<(), ProtocolError> {
        let v1::ServerFrame { request_id, body } = packet.frame;
        let body = body.ok_or(ProtocolError::Missing { field: "body" })?;
        let answer = match (body, packet.fd) {
            (Answer::MemoryOpened(opened), fd) => {
                let fd = match packet.lost_fd {
                    true => None,
                    false => Some(fd.ok_or(ProtocolError::MissingFd)?),
                };
                return self.open(request_id, opened, fd);
            }
            (body, Some(_)) => {
                let frame = frame_name(&body);
                return Err(ProtocolError::UnwantedFd { frame });
            }
            (Answer::Change(change), None) => {
                self.overtake(&change);
                return self.live.change(&change);
            }
            (Answer::Refusal(refusal), None) => Err(Error::Refused(refusal)),
            (body @ (Answer::MemoryRegistered(_) | Answer::MemoryUnregistered(_)), None) => {
                Ok(body)
            }
            (other, None) => return Err(out_of_turn(&other, "an answer")),
        };
        // Whoever asked may have been cancelled.
        let _ = self.waiter(request_id)?.answer.send(answer);
        Ok(())
    }

    /// Memory that is on its way is not what a change closes.
    fn overtake(&self, change: &v1::Change) {
        let mut waiting = self.waiting();
        let openings = waiting.iter_mut().flat_map(Waiting::values_mut);
        for opening in openings.filter_map(|waiter| waiter.opens.as_mut()) {
            let closes = change.closed.contains(&opening.region.get());
            opening.is_overtaken |= closes || change.everything;
        }
    }

    /// Maps what has come, here and not where it was asked for, so that a change
    /// behind it finds it mapped. What a change has overtaken is dropped, and who
    /// asked looks at the table again. `None`: this process had no descriptor
    /// free.
    fn open(
        &self,
        request_id: u64,
        opened: v1::MemoryOpened,
        fd: Option<OwnedFd>,
    ) -> Result<(), ProtocolError> {
        let Waiter { answer, opens } = self.waiter(request_id)?;
        let body = Answer::MemoryOpened(opened);
        let Opening {
            region,
            is_overtaken,
        } = opens.ok_or_else(|| out_of_turn(&body, "another answer"))?;
        let mapped = match fd {
            _ if is_overtaken => Ok(()),
            Some(fd) => self.live.open(region, &opened, fd),
            None => Err(no_descriptor()),
        };
        let region = region.get();
        let mapped = mapped.map_err(|cause| Error::Opened { region, cause });
        let _ = answer.send(mapped.map(|()| body));
        Ok(())
    }

    fn how_it_closed(&self, otherwise: Ended) -> Ended {
        if self.detaching.load(Ordering::Relaxed) {
            Ended::new(EndReason::Detached, "detached")
        } else {
            otherwise
        }
    }
}

fn no_descriptor() -> MapError {
    MapError::Inspect(Errno::MFILE.into())
}

/// Which memory a request is about.
fn opened_by(body: &Ask) -> Option<RegionId> {
    match body {
        Ask::OpenMemory(open) => RegionId::from_number(open.region),
        _ => None,
    }
}

/// Owns receiving. When it goes, for whatever reason, the session has ended.
struct Receiver(Arc<Shared>);

impl Receiver {
    async fn run(self) {
        let end = loop {
            let received = self.0.socket.receive().await;
            if let ControlFlow::Break(end) = self.0.take(received) {
                break end;
            }
        };
        match end {
            End::Broken(ended) => self.0.hang_up(ended),
            End::Told(ended) => {
                self.0.conclude(ended.clone());
                // Until then what this side could reach stays in quarantine.
                self.0.leave().await;
                self.0.hang_up(ended);
            }
        }
    }
}

impl Drop for Receiver {
    fn drop(&mut self) {
        // After run() this changes nothing.
        self.0.hang_up(Ended::runtime_gone());
    }
}

/// Gives back what was closed, and acknowledges, when no pin is in the way. For
/// as long as the connection lives, and thus also when the session has ended:
/// acks that come late are worth something.
async fn acknowledge(shared: Arc<Shared>) {
    loop {
        shared.live.is_due.notified().await;
        while let Some(generation) = shared.live.ripe().await {
            let asked = match shared.live.settle(generation) {
                Ok(asked) => asked,
                Err(cause) => {
                    let message = format!("memory could not be given back: {cause}");
                    let ended = Ended::new(EndReason::NotGivenBack, message);
                    return shared.hang_up(ended);
                }
            };
            if let Some(generation) = asked {
                let ack = Ask::Ack(v1::Ack { generation });
                // If it cannot be sent, the receiver says why.
                let _ = shared.send(shared.next_id(), ack, None).await;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use domain_core::region::Access;
    use domain_core::session::Role;
    use domaind_proto::names::DomainId;
    use tokio::time::timeout;
    use tonic::Code;

    use super::*;
    use crate::client::AttachOptions;
    use crate::fake::{FakePeer, SOON, memfd};
    use crate::handshake;

    async fn connected() -> (Connection, FakePeer) {
        let (client, daemon) = FakePeer::pair();
        daemon.welcome().await;
        let domain = DomainId::new("d").unwrap();
        let options = AttachOptions::new(Role::Driver, Access::ReadWrite);
        let attachment = handshake::attach(&client, &domain, options).await.unwrap();
        // Hello and Attach.
        daemon.hear().await;
        daemon.hear().await;
        (Connection::new(client, Arc::new(attachment.live)), daemon)
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
        let (connection, daemon) = connected().await;
        daemon.say(99, body, fd).await;
        let ended = timeout(SOON, connection.ended()).await.unwrap();
        // The daemon learns of it.
        assert!(daemon.hear().await.is_none());
        ended.reason
    }

    #[tokio::test]
    async fn answers_find_who_asked_in_whatever_order_they_come() {
        let (connection, daemon) = connected().await;
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
        let (connection, daemon) = connected().await;
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
        let (connection, daemon) = connected().await;
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
        let (connection, daemon) = connected().await;
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
        let (connection, daemon) = connected().await;
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
        let (connection, daemon) = connected().await;
        let daemon_side = async {
            let asked = daemon.hear().await.unwrap();
            assert!(matches!(asked.body, Some(Ask::Detach(_))));
            assert_eq!(connection.is_ended(), None);
            drop(daemon);
        };

        let (ended, ()) = tokio::join!(connection.detach(SOON), daemon_side);

        assert_eq!(ended.unwrap().reason, EndReason::Detached);
    }

    #[tokio::test]
    async fn dropping_the_connection_closes_it() {
        let (connection, daemon) = connected().await;
        drop(connection);
        assert!(daemon.hear().await.is_none());
    }

    #[test]
    fn a_runtime_that_shuts_down_ends_the_session() {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        let (connection, _daemon) = runtime.block_on(connected());

        drop(runtime);

        let reason = connection.is_ended().map(|ended| ended.reason);
        assert_eq!(reason, Some(EndReason::RuntimeGone));
    }
}
