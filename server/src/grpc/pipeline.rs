//! Pipeline: batches of maps, unmaps and syncs, one after the other on one
//! stream.
//!
//! Pulled, as a watch is: the next batch is taken when the connection wants the
//! next answer, and is done within that poll. There is no task and no queue, so
//! who does not read answers has no batch of his done; HTTP/2's windows tell him
//! to wait. What a batch needs is kept for the next one, and a batch that neither
//! waits nor is refused allocates nothing here.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::sync::{Arc, Weak};
use std::task::{Context, Poll, ready};
use std::time::Instant;

use domain_core::domain::Desk;
use domain_core::session::{Denied, Removal, Role, SessionId};
use domain_core::streaming::{MapSpec, SyncSpec, UnmapSpec};
use domaind_proto::codec::{give_back, take};
use domaind_proto::convert::{Piped, PipelineBatch, pipeline_batch};
use domaind_proto::v1::PipelineOperation::{Map, Sync, Unmap, Unspecified};
use domaind_proto::v1::{self, EndReason, ErrorReason, Refusal};
use tokio::task::coop::poll_proceed;
use tokio_stream::Stream;
use tokio_util::sync::CancellationToken;
use tonic::Status;

use super::bounced::total;
use super::room;
use super::watch::stopping;
use crate::crew::Copiers;
use crate::live::{End, Live};
use crate::metrics::{self, COUNTS};
use crate::offload::{bug, copying};
use crate::registry::Registry;
use crate::streams::{Open, Piping};

/// Entries that count as much as one step of anything else when tokio asks
/// whether a task has run for long enough: each is a copy and two turns of a
/// lock.
const ENTRIES_PER_STEP: usize = 32;

/// Counts one more pipeline of a session.
///
/// # Errors
/// A refusal for who is no driver, or has too many.
pub(super) fn admit(session: &Live, registry: &Registry) -> Result<Open<Piping>, Refusal> {
    let (id, role) = (session.id, session.role);
    if role != Role::Driver {
        return Err(Denied::WrongRole { session: id, role }.into());
    }
    registry.pipelines.enter(Piping {
        session: id,
        tenant: session.peer.as_ref().into(),
    })
}

/// The answers to a stream of batches, as tonic takes them; an error is the
/// last.
pub(crate) struct Pipeline<R> {
    requests: R,
    /// Only lent while there is a batch: who leaves answers unread keeps no
    /// memory that others have given up.
    session: Weak<Live>,
    id: SessionId,
    /// Resolves when the daemon stops or the session ends.
    end: Pin<Box<dyn Future<Output = Refusal> + Send>>,
    /// The batch that has to wait, for its turn or for room.
    waiting: Option<Waiting>,
    lanes: Lanes,
    /// When the last batch was taken.
    taken: Instant,
    is_over: bool,
    _open: Open<Piping>,
}

type Waiting = Pin<Box<dyn Future<Output = Done> + Send>>;

/// A batch that has come to its end.
struct Done {
    request: v1::PipelineRequest,
    outcome: Result<v1::PipelineResponse, Refusal>,
    /// To be used again.
    lanes: Lanes,
}

impl<R> Pipeline<R> {
    pub(super) fn new(
        session: &Arc<Live>,
        requests: R,
        open: Open<Piping>,
        stop: CancellationToken,
    ) -> Pipeline<R> {
        Pipeline {
            requests,
            session: Arc::downgrade(session),
            id: session.id,
            end: Box::pin(end(stop, session.end.clone(), session.id)),
            waiting: None,
            lanes: Lanes::default(),
            taken: Instant::now(),
            is_over: false,
            _open: open,
        }
    }
}

/// Why the stream ends, when it has to.
async fn end(stop: CancellationToken, session: End, id: SessionId) -> Refusal {
    let reason = tokio::select! {
        biased; // a daemon that stops ends the sessions, too
        () = stop.cancelled() => EndReason::Shutdown,
        reason = session.called() => reason,
    };
    match reason {
        EndReason::Shutdown => stopping(),
        EndReason::DomainDeleted => Denied::DomainClosed.into(),
        _ => Denied::SessionEnded { session: id }.into(),
    }
}

type Answer = Result<v1::PipelineResponse, Status>;

impl<R> Stream for Pipeline<R>
where
    R: Stream<Item = Result<v1::PipelineRequest, Status>> + Unpin,
{
    type Item = Answer;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Answer>> {
        let pipeline = self.get_mut();
        if pipeline.is_over {
            return Poll::Ready(None);
        }
        let answer = ready!(pipeline.poll_answer(cx));
        pipeline.is_over = !matches!(answer, Some(Ok(_)));
        Poll::Ready(answer)
    }
}

impl<R> Pipeline<R>
where
    R: Stream<Item = Result<v1::PipelineRequest, Status>> + Unpin,
{
    fn poll_answer(&mut self, cx: &mut Context<'_>) -> Poll<Option<Answer>> {
        if let Poll::Ready(refusal) = self.end.as_mut().poll(cx) {
            return Poll::Ready(Some(Err(refusal.into())));
        }
        let step = ready!(poll_proceed(cx));
        if self.waiting.is_none() {
            let request = match ready!(Pin::new(&mut self.requests).poll_next(cx)) {
                Some(Ok(request)) => request,
                ended => return Poll::Ready(ended.map(|request| Err(request.unwrap_err()))),
            };
            if let Some(answer) = self.begin(request, cx) {
                step.made_progress();
                return Poll::Ready(Some(answer));
            }
        }
        let done = ready!(self.poll_waiting(cx));
        step.made_progress();
        self.waiting = None;
        Poll::Ready(Some(match done {
            Ok(Done {
                request,
                outcome,
                lanes,
            }) => {
                self.lanes = lanes;
                self.answer(request, outcome, cx)
            }
            Err(refusal) => Err(refusal.into()),
        }))
    }

    /// Does a batch at once; `None` if it has to wait.
    fn begin(&mut self, request: v1::PipelineRequest, cx: &mut Context<'_>) -> Option<Answer> {
        self.taken = Instant::now();
        let Some(session) = self.session.upgrade() else {
            let session = self.id;
            return Some(Err(Refusal::from(Denied::SessionEnded { session }).into()));
        };
        if !request.request_id.is_empty() {
            let lanes = std::mem::take(&mut self.lanes);
            self.waiting = Some(Box::pin(in_turn(session, request, lanes)));
            return None;
        }
        // A panic in here would take the other calls of the connection with it.
        let run = AssertUnwindSafe(|| {
            let outcome = self.lanes.run(&session, &request);
            let removal = room::awaited(&session, &outcome);
            (outcome, removal)
        });
        match catch_unwind(run) {
            Ok((outcome, None)) => Some(self.answer(request, outcome, cx)),
            Ok((_, Some(removal))) => {
                let lanes = std::mem::take(&mut self.lanes);
                self.waiting = Some(Box::pin(in_room(session, request, removal, lanes)));
                None
            }
            Err(_) => Some(Err(bug().into())),
        }
    }

    fn poll_waiting(&mut self, cx: &mut Context<'_>) -> Poll<Result<Done, Refusal>> {
        let waiting = self.waiting.as_mut().expect("asked only if there is one");
        let poll = AssertUnwindSafe(|| waiting.as_mut().poll(cx));
        match catch_unwind(poll) {
            Ok(done) => done.map(Ok),
            Err(_) => Poll::Ready(Err(bug())),
        }
    }

    /// The answer to a batch, or the end of the stream if there is nobody any
    /// more whose batch it could be.
    fn answer(
        &mut self,
        request: v1::PipelineRequest,
        outcome: Result<v1::PipelineResponse, Refusal>,
        cx: &mut Context<'_>,
    ) -> Answer {
        let operation = request.operation;
        COUNTS.batch(operation, self.taken.elapsed(), outcome.is_ok());
        give_back(request);
        match outcome {
            Ok(response) => {
                spend(response.entries as usize / ENTRIES_PER_STEP, cx);
                Ok(response)
            }
            Err(refusal) if ends_the_stream(&refusal) => Err(refusal.into()),
            Err(refusal) => Ok(refused(operation, refusal)),
        }
    }
}

/// Counts so many steps of this task. If they are more than it may make in one
/// go, its next one comes after others had their turn.
fn spend(steps: usize, cx: &mut Context<'_>) {
    for _ in 0..steps {
        match poll_proceed(cx) {
            Poll::Ready(step) => step.made_progress(),
            Poll::Pending => return,
        }
    }
}

fn ends_the_stream(refusal: &Refusal) -> bool {
    let reasons = [ErrorReason::SessionEnded, ErrorReason::DomainClosed];
    reasons.contains(&refusal.reason())
}

fn refused(operation: i32, refusal: Refusal) -> v1::PipelineResponse {
    tracing::info!(
        operation = v1::PipelineOperation::try_from(operation)
            .unwrap_or(Unspecified)
            .as_str_name(),
        code = ?refusal.grpc_code(),
        message = refusal.message,
        "batch refused"
    );
    let mut response: v1::PipelineResponse = take();
    response.operation = operation;
    response.refusal = Some(refusal);
    response
}

/// A batch with an id: it may have been answered before, and then it is not done.
async fn in_turn(session: Arc<Live>, request: v1::PipelineRequest, mut lanes: Lanes) -> Done {
    let outcome = match session.answers.turn(&request).await {
        Ok(turn) => {
            let work = |session: &Live, request: &_| lanes.run(session, request);
            room::finding(&session, &request, turn, work).await
        }
        Err(refusal) => Err(refusal),
    };
    Done {
        request,
        outcome,
        lanes,
    }
}

/// A batch that has found no room, when there may be some.
async fn in_room(
    session: Arc<Live>,
    request: v1::PipelineRequest,
    removal: Removal,
    mut lanes: Lanes,
) -> Done {
    let work = |session: &Live, request: &_| lanes.run(session, request);
    let outcome = room::once_more(&session, &request, removal, work).await;
    Done {
        request,
        outcome,
        lanes,
    }
}

/// Where batches become entries of the core, kept from one to the next.
#[derive(Debug, Default)]
struct Lanes {
    maps: Vec<MapSpec>,
    unmaps: Vec<UnmapSpec>,
    syncs: Vec<SyncSpec>,
    /// Entries of a partial batch that could not be read.
    refused: Vec<v1::EntryRefusal>,
    desk: Desk,
}

impl Lanes {
    /// Runs a batch through the core.
    ///
    /// # Errors
    /// The refusal of the whole batch; nothing is changed.
    fn run(
        &mut self,
        session: &Live,
        request: &v1::PipelineRequest,
    ) -> Result<v1::PipelineResponse, Refusal> {
        let batch = pipeline_batch(request)?;
        let (core, id, mode) = (&session.domain.core, session.id, batch.mode);
        let Lanes {
            maps,
            unmaps,
            syncs,
            refused,
            desk,
        } = self;
        match batch.operation {
            Map => {
                batch.read(maps, refused)?;
                let mapped = core.map_at(desk, id, maps, mode, Copiers::shared())?;
                let mapped = metrics::mapping(maps, mapped);
                Ok(answered::<MapSpec, _>(&batch, refused, mapped))
            }
            Unmap => {
                batch.read(unmaps, refused)?;
                let copied = core.unmap_at(desk, id, unmaps, mode, Copiers::shared())?;
                let copied = metrics::unmapping(copied);
                Ok(answered::<UnmapSpec, _>(&batch, refused, copied))
            }
            Sync => {
                batch.read(syncs, refused)?;
                let bytes = total(syncs.iter().map(|spec| spec.len_bytes));
                let synced = copying(bytes, || core.sync_at(desk, id, syncs, mode))?;
                let synced = metrics::syncing(syncs, synced);
                Ok(answered::<SyncSpec, _>(&batch, refused, synced))
            }
            Unspecified => unreachable!("refused when the batch was read"),
        }
    }
}

fn answered<S: Piped, E>(
    batch: &PipelineBatch<'_>,
    refused: &mut Vec<v1::EntryRefusal>,
    results: impl Iterator<Item = Result<S::Outcome, E>>,
) -> v1::PipelineResponse
where
    Refusal: From<E>,
{
    let results = results.map(|result| result.map_err(Refusal::from));
    let mut response = take();
    batch.answer::<S>(refused, results, &mut response);
    response
}
