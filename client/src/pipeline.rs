//! Many transfers on one stream: batches of maps, unmaps and syncs, answered in
//! order.

use std::collections::VecDeque;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use domain_core::addr::Iova;
use domain_core::batch::BatchMode;
use domain_core::mapping::MappingId;
use domain_core::streaming::{MapSpec, Mapped, SyncSpec, UnmapSpec};
use domaind_proto::codec::{give_back, take};
use domaind_proto::convert::{Piped, batch_mode, check_answer};
use domaind_proto::v1::PipelineOperation;
use domaind_proto::v1::{self, Refusal};
use tokio::sync::{Semaphore, mpsc};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;

use crate::error::{Error, ProtocolError};
use crate::mapping::checked_place;
use crate::session::{Inner, Session};
use crate::undo::Undo;

/// More would only be memory: the daemon does one batch of a pipeline at a time.
const IN_FLIGHT_MOST: usize = 1024;

/// How a pipeline shall be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PipelineOptions {
    /// So many batches may be sent and not answered, at least 1 and at most 1024.
    pub in_flight: usize,
}

impl Default for PipelineOptions {
    fn default() -> PipelineOptions {
        PipelineOptions { in_flight: 8 }
    }
}

/// Batches of maps, unmaps and syncs on one stream, from
/// [`Session::pipeline`] on. For drivers that have many buffers at hand: a batch
/// costs about as much as one call, and while it is under way the next one is
/// written.
///
/// Sending never waits here. When [`PipelineOptions::in_flight`] batches are
/// unanswered it is [`Error::PipelineFull`], and an answer has to be read first;
/// where one task sends and another one reads there is [`Pipeline::split`].
///
/// What is mapped here are plain values and no guards: a mapping lives until it
/// is unmapped, on any way, or until the session ends. Only what the daemon
/// mapped and [`Pipeline::next`] did not answer any more, because the pipeline
/// was dropped, is unmapped again in the background, and nothing flows back.
///
/// A session may have
/// [`PIPELINES_PER_SESSION`](domain_core::limits::PIPELINES_PER_SESSION) of
/// them, and lives as long as one of them does.
#[derive(Debug)]
pub struct Pipeline {
    sender: PipelineSender,
    receiver: PipelineReceiver,
}

/// The half of a [`Pipeline`] that sends.
///
/// Dropping it ends the pipeline when all is answered.
#[derive(Debug)]
pub struct PipelineSender {
    shared: Arc<Shared>,
    /// `None`: there will be no more.
    requests: Option<mpsc::Sender<v1::PipelineRequest>>,
}

/// The half of a [`Pipeline`] that reads.
///
/// Dropping it ends the pipeline: [`PipelineSender`] sends no more, and what is
/// mapped by batches that are under way is unmapped again.
pub struct PipelineReceiver {
    shared: Arc<Shared>,
    /// `None` when the pipeline has ended.
    answers: Option<Streaming<v1::PipelineResponse>>,
    /// What was answered last, and to what; lent until the next one.
    last: Option<(Asked, v1::PipelineResponse)>,
}

/// What came of a batch. Borrowed until the next answer is asked for.
#[derive(Clone, Copy, Debug)]
pub enum Answer<'a> {
    /// Of [`Pipeline::map`].
    Mapped(MappedBatch<'a>),
    /// Of [`Pipeline::unmap`].
    Unmapped(UnmappedBatch<'a>),
    /// Of [`Pipeline::sync`].
    Synced(SyncedBatch<'a>),
    /// The whole batch was refused and has changed nothing; the pipeline goes
    /// on.
    Refused(&'a Refusal),
}

/// Buffers that were mapped.
#[derive(Clone, Copy, Debug)]
pub struct MappedBatch<'a> {
    response: &'a v1::PipelineResponse,
    lengths: &'a [u64],
}

/// Mappings that have ended.
#[derive(Clone, Copy, Debug)]
pub struct UnmappedBatch<'a> {
    response: &'a v1::PipelineResponse,
}

/// Parts that were copied.
#[derive(Clone, Copy, Debug)]
pub struct SyncedBatch<'a> {
    response: &'a v1::PipelineResponse,
}

impl Session {
    /// Opens a stream for many maps, unmaps and syncs. For drivers. Cancelling
    /// leaves nothing.
    ///
    /// # Errors
    /// [`Error::Refused`] for a device, and when the session or the user has too
    /// many; [`Error::Ended`], [`Error::Transport`].
    pub async fn pipeline(&self, options: PipelineOptions) -> Result<Pipeline, Error> {
        let in_flight = options.in_flight.clamp(1, IN_FLIGHT_MOST);
        let (requests, sent) = mpsc::channel(in_flight);
        let mut calls = self.inner.calls();
        let opening = calls.pipeline(ReceiverStream::new(sent));
        let answers = self.inner.call(opening).await?;
        let shared = Arc::new(Shared {
            session: Arc::clone(&self.inner),
            in_flight,
            room: Semaphore::new(in_flight),
            ledger: Mutex::default(),
        });
        Ok(Pipeline {
            sender: PipelineSender {
                shared: Arc::clone(&shared),
                requests: Some(requests),
            },
            receiver: PipelineReceiver {
                shared,
                answers: Some(answers),
                last: None,
            },
        })
    }
}

impl Pipeline {
    /// Sends a batch of buffers to map. Never waits.
    ///
    /// # Errors
    /// [`Error::PipelineFull`]: read an answer first. [`Error::Refused`] for no
    /// entries or more than
    /// [`BATCH_ENTRIES`](domain_core::limits::BATCH_ENTRIES);
    /// [`Error::PipelineClosed`] and [`Error::Ended`] when nothing can be sent
    /// any more. Nothing is sent then.
    pub fn map(&mut self, specs: &[MapSpec], mode: BatchMode) -> Result<(), Error> {
        self.sender.send_now(specs, mode)
    }

    /// Sends a batch of mappings to end. Never waits.
    ///
    /// # Errors
    /// As [`Pipeline::map`].
    pub fn unmap(&mut self, specs: &[UnmapSpec], mode: BatchMode) -> Result<(), Error> {
        self.sender.send_now(specs, mode)
    }

    /// Sends a batch of parts of mappings to copy. Never waits.
    ///
    /// # Errors
    /// As [`Pipeline::map`].
    pub fn sync(&mut self, specs: &[SyncSpec], mode: BatchMode) -> Result<(), Error> {
        self.sender.send_now(specs, mode)
    }

    /// The answer to the oldest batch that is not answered; `None` if there is no
    /// such batch, and after an error. Cancel safe: the answer is then the next
    /// one's.
    ///
    /// # Errors
    /// What ends the pipeline: [`Error::Ended`], [`Error::Refused`] when the
    /// daemon stops or has a bug, [`Error::Transport`], [`Error::Protocol`].
    /// Whether batches that are not answered were done is then not known; what
    /// they have mapped lives no longer than the session.
    pub async fn next(&mut self) -> Result<Option<Answer<'_>>, Error> {
        match self.in_flight() {
            0 => Ok(None),
            _ => self.receiver.next().await,
        }
    }

    /// How many batches are sent and not answered.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.receiver.shared.ledger().unanswered.len()
    }

    /// Into two halves, for two tasks.
    #[must_use]
    pub fn split(self) -> (PipelineSender, PipelineReceiver) {
        (self.sender, self.receiver)
    }
}

impl PipelineSender {
    /// Sends a batch of buffers to map, when there is room for it. Cancel safe:
    /// what is cancelled was not sent.
    ///
    /// # Errors
    /// [`Error::Refused`] for no entries or more than
    /// [`BATCH_ENTRIES`](domain_core::limits::BATCH_ENTRIES);
    /// [`Error::PipelineClosed`] and [`Error::Ended`] when nothing can be sent
    /// any more. Nothing is sent then.
    pub async fn map(&mut self, specs: &[MapSpec], mode: BatchMode) -> Result<(), Error> {
        self.send(specs, mode).await
    }

    /// Sends a batch of mappings to end, when there is room for it. Cancel safe:
    /// what is cancelled was not sent.
    ///
    /// # Errors
    /// As [`PipelineSender::map`].
    pub async fn unmap(&mut self, specs: &[UnmapSpec], mode: BatchMode) -> Result<(), Error> {
        self.send(specs, mode).await
    }

    /// Sends a batch of parts of mappings to copy, when there is room for it.
    /// Cancel safe: what is cancelled was not sent.
    ///
    /// # Errors
    /// As [`PipelineSender::map`].
    pub async fn sync(&mut self, specs: &[SyncSpec], mode: BatchMode) -> Result<(), Error> {
        self.send(specs, mode).await
    }

    async fn send<S: Batched>(&mut self, specs: &[S], mode: BatchMode) -> Result<(), Error> {
        check_size(specs.len())?;
        match self.shared.room.acquire().await {
            // Given back with the answer.
            Ok(room) => room.forget(),
            Err(_) => return Err(self.shared.closed()),
        }
        self.put(specs, mode)
    }

    fn send_now<S: Batched>(&mut self, specs: &[S], mode: BatchMode) -> Result<(), Error> {
        check_size(specs.len())?;
        match self.shared.room.try_acquire() {
            Ok(room) => room.forget(),
            Err(_) if self.shared.room.is_closed() => return Err(self.shared.closed()),
            Err(_) => {
                let in_flight = self.shared.in_flight;
                return Err(Error::PipelineFull { in_flight });
            }
        }
        self.put(specs, mode)
    }

    /// Sends a batch for which there is room.
    fn put<S: Batched>(&mut self, specs: &[S], mode: BatchMode) -> Result<(), Error> {
        let requests = self.requests.as_ref();
        let requests = requests.ok_or_else(|| self.shared.closed())?;
        let mut request: v1::PipelineRequest = take();
        request.partial = mode == BatchMode::Partial;
        S::write(specs, &mut request);
        // Both under the lock, so that nothing is sent whose answer nobody waits
        // for any more.
        let mut ledger = self.shared.ledger();
        let is_sent = !ledger.is_closed && requests.try_send(request).is_ok();
        if !is_sent {
            drop(ledger);
            return Err(self.shared.closed());
        }
        ledger.enter(specs, mode);
        Ok(())
    }
}

impl PipelineReceiver {
    /// The next answer; waits until there is one. `None` when the sender is
    /// dropped and all is answered, and after an error. Cancel safe: the answer
    /// is then the next one's.
    ///
    /// # Errors
    /// As [`Pipeline::next`].
    pub async fn next(&mut self) -> Result<Option<Answer<'_>>, Error> {
        if let Some((asked, response)) = self.last.take() {
            self.shared.ledger().spare.push(asked);
            give_back(response);
        }
        let Some(answers) = &mut self.answers else {
            return Ok(None);
        };
        let answer = match self.shared.answer(answers).await {
            Ok(Some(response)) => self.shared.checked(response).map(Some),
            Ok(None) => self.shared.all_answered().map(|()| None),
            Err(error) => Err(error),
        };
        match answer {
            Ok(Some(answer)) => {
                let (asked, response) = self.last.insert(answer);
                Ok(Some(Answer::of(asked, response)))
            }
            ended => {
                self.answers = None;
                self.shared.close();
                ended.map(|_| None)
            }
        }
    }
}

impl fmt::Debug for PipelineReceiver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PipelineReceiver")
            .field("shared", &self.shared)
            .finish_non_exhaustive()
    }
}

impl Drop for PipelineReceiver {
    fn drop(&mut self) {
        let Some(answers) = self.answers.take() else {
            return;
        };
        self.shared.close();
        let shared = Arc::clone(&self.shared);
        if !shared.ledger().unanswered.is_empty() {
            let session = Arc::clone(&shared.session);
            session.spawn(undo_rest(answers, shared));
        }
    }
}

/// Reads the answers that nobody waits for any more, and unmaps what they say is
/// mapped.
async fn undo_rest(mut answers: Streaming<v1::PipelineResponse>, shared: Arc<Shared>) {
    while !shared.ledger().unanswered.is_empty() {
        let Ok(Some(response)) = shared.answer(&mut answers).await else {
            return;
        };
        if let Ok((_, response)) = shared.checked(response) {
            shared.undo(&response);
            give_back(response);
        }
    }
}

impl<'a> Answer<'a> {
    fn of(asked: &'a Asked, response: &'a v1::PipelineResponse) -> Answer<'a> {
        match (&response.refusal, asked.operation) {
            (Some(refusal), _) => Answer::Refused(refusal),
            (None, PipelineOperation::Map) => Answer::Mapped(MappedBatch {
                response,
                lengths: &asked.lengths,
            }),
            (None, PipelineOperation::Unmap) => Answer::Unmapped(UnmappedBatch { response }),
            (None, _) => Answer::Synced(SyncedBatch { response }),
        }
    }
}

impl<'a> MappedBatch<'a> {
    /// What came of each buffer, in the order of the batch. Without
    /// [`BatchMode::Partial`] none is refused.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = Result<Mapped, &'a Refusal>> + use<'a> {
        let MappedBatch { response, lengths } = *self;
        entries(response, move |index| Mapped {
            id: MappingId::new(response.mapping_id[index]),
            iova: Iova::new(response.iova[index]),
            len_bytes: lengths[index],
        })
    }
}

impl<'a> UnmappedBatch<'a> {
    /// How many bytes of each mapping flowed back, in the order of the batch.
    /// Without [`BatchMode::Partial`] none is refused.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = Result<u64, &'a Refusal>> + use<'a> {
        let response = self.response;
        entries(response, |index| response.copied_bytes[index])
    }
}

impl<'a> SyncedBatch<'a> {
    /// Whether each part was copied, in the order of the batch. Without
    /// [`BatchMode::Partial`] all are.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = Result<(), &'a Refusal>> + use<'a> {
        entries(self.response, |_| ())
    }
}

/// What came of each entry of an answer that was checked.
fn entries<'a, T>(
    response: &'a v1::PipelineResponse,
    done: impl Fn(usize) -> T + 'a,
) -> impl ExactSizeIterator<Item = Result<T, &'a Refusal>> {
    let mut refused = response.refused.iter().peekable();
    let count = usize::try_from(response.entries).expect("as many as were asked for");
    (0..count).map(move |index| {
        match refused.next_if(|refused| usize::try_from(refused.index) == Ok(index)) {
            Some(refused) => Err(refused.refusal.as_ref().expect("it was checked")),
            None => Ok(done(index)),
        }
    })
}

/// What both halves know.
struct Shared {
    session: Arc<Inner>,
    in_flight: usize,
    /// How many batches may still be sent. Closed with the pipeline.
    room: Semaphore,
    /// Held for one look; a panic leaves it whole.
    ledger: Mutex<Ledger>,
}

/// What was asked and is not answered.
#[derive(Debug, Default)]
struct Ledger {
    /// The oldest first.
    unanswered: VecDeque<Asked>,
    /// To be used again.
    spare: Vec<Asked>,
    /// Nobody waits for answers any more.
    is_closed: bool,
}

/// One batch, as far as its answer has to fit it.
#[derive(Debug)]
struct Asked {
    operation: PipelineOperation,
    mode: BatchMode,
    entries: usize,
    /// Of the buffers of a batch that maps.
    lengths: Vec<u64>,
}

/// An entry whose answer can be checked.
trait Batched: Piped {
    /// The length of what is mapped then.
    fn maps_bytes(&self) -> Option<u64> {
        None
    }
}

impl Batched for MapSpec {
    fn maps_bytes(&self) -> Option<u64> {
        Some(self.len_bytes)
    }
}

impl Batched for UnmapSpec {}

impl Batched for SyncSpec {}

impl Ledger {
    fn enter<S: Batched>(&mut self, specs: &[S], mode: BatchMode) {
        let spare = self.spare.pop();
        let mut lengths = spare.map(|asked| asked.lengths).unwrap_or_default();
        lengths.clear();
        lengths.extend(specs.iter().filter_map(S::maps_bytes));
        self.unanswered.push_back(Asked {
            operation: S::OPERATION,
            mode,
            entries: specs.len(),
            lengths,
        });
    }
}

impl Shared {
    fn ledger(&self) -> MutexGuard<'_, Ledger> {
        self.ledger.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn close(&self) {
        self.ledger().is_closed = true;
        self.room.close();
    }

    /// Why nothing can be sent any more, as far as this side knows.
    fn closed(&self) -> Error {
        self.session.is_ended_or(Error::PipelineClosed)
    }

    /// Waits for an answer, but not past the session's end. Cancel safe.
    async fn answer(
        &self,
        answers: &mut Streaming<v1::PipelineResponse>,
    ) -> Result<Option<v1::PipelineResponse>, Error> {
        tokio::select! {
            biased; // an answer that came is worth more than the end behind it
            answer = answers.message() => {
                answer.map_err(|status| self.session.is_ended_or(status.into()))
            }
            ended = self.session.connection.ended() => Err(Error::Ended(ended)),
        }
    }

    /// An answer with what it answers, if it fits; then there is room for one
    /// batch more.
    fn checked(
        &self,
        response: v1::PipelineResponse,
    ) -> Result<(Asked, v1::PipelineResponse), Error> {
        let asked = self.ledger().unanswered.pop_front();
        let fits = match &asked {
            Some(asked) => self.check(asked, &response),
            None => Err(ProtocolError::OutOfTurn {
                got: "an answer",
                wanted: "a batch",
            }),
        };
        match (fits, asked) {
            (Ok(()), Some(asked)) => {
                self.room.add_permits(1);
                Ok((asked, response))
            }
            (Err(error), _) => {
                self.undo(&response);
                Err(error.into())
            }
            (Ok(()), None) => unreachable!("an answer to nothing does not fit"),
        }
    }

    fn check(&self, asked: &Asked, response: &v1::PipelineResponse) -> Result<(), ProtocolError> {
        check_answer(response, asked.operation, asked.mode, asked.entries)?;
        let places = response.iova.iter().zip(&asked.lengths);
        let mapped = entries(response, |_| ()).zip(places);
        for (outcome, (iova, len_bytes)) in mapped {
            if outcome.is_ok() {
                let aperture = self.session.bounce();
                checked_place(aperture, Iova::new(*iova), *len_bytes, *len_bytes)?;
            }
        }
        Ok(())
    }

    /// Unmaps in the background what an answer says is mapped.
    fn undo(&self, response: &v1::PipelineResponse) {
        for (iova, id) in response.iova.iter().zip(&response.mapping_id) {
            if *id != 0 {
                let (iova, id) = (Iova::new(*iova), MappingId::new(*id));
                self.session.undo_later(Undo::Unmap { iova, id });
            }
        }
    }

    /// The daemon may close only when it has answered everything.
    fn all_answered(&self) -> Result<(), Error> {
        match self.ledger().unanswered.len() {
            0 => Ok(()),
            wanted => Err(ProtocolError::AnswerCount { got: 0, wanted }.into()),
        }
    }
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shared")
            .field("in_flight", &self.in_flight)
            .field("unanswered", &self.ledger().unanswered.len())
            .finish_non_exhaustive()
    }
}

/// What the daemon would refuse, and for what a message would be too large.
fn check_size(entries: usize) -> Result<(), Error> {
    let mode = batch_mode(entries, false);
    mode.map(drop).map_err(|error| Error::Refused(error.into()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fake::{A_MOMENT, BOUNCE, FakeDaemon, PAGE, SOON};
    use domain_core::memory::MemoryId;
    use domain_core::perm::Direction;
    use domain_core::streaming::SyncTarget;
    use domaind_proto::v1::EntryRefusal;
    use tokio::time::{sleep, timeout};
    use tonic::Code;

    const ALL: BatchMode = BatchMode::AllOrNothing;

    fn spec(len_bytes: u64) -> MapSpec {
        MapSpec::new(MemoryId::new(1), 0, len_bytes, Direction::FromDevice)
    }

    /// What a daemon says that has mapped buffers at these pages; `None` for one
    /// that it has refused.
    fn mapped(pages: &[Option<u64>]) -> v1::PipelineResponse {
        let value = |value: fn(u64) -> u64| {
            let each = pages.iter().map(move |page| page.map_or(0, value));
            each.collect::<Vec<_>>()
        };
        let refused = pages.iter().zip(0..).filter(|(page, _)| page.is_none());
        v1::PipelineResponse {
            operation: PipelineOperation::Map.into(),
            mapping_id: value(|page| page + 1),
            iova: value(|page| BOUNCE + page * PAGE),
            entries: u32::try_from(pages.len()).unwrap(),
            refused: refused.map(|(_, index)| refusal(index)).collect(),
            ..v1::PipelineResponse::default()
        }
    }

    fn refusal(index: u32) -> EntryRefusal {
        let reason = v1::ErrorReason::NoSuchMemory;
        let refusal = Some(Refusal::because(Code::NotFound, reason, "no"));
        EntryRefusal { index, refusal }
    }

    fn unmapped(copied_bytes: Vec<u64>) -> v1::PipelineResponse {
        v1::PipelineResponse {
            operation: PipelineOperation::Unmap.into(),
            entries: u32::try_from(copied_bytes.len()).unwrap(),
            copied_bytes,
            ..v1::PipelineResponse::default()
        }
    }

    async fn scene(answers: Vec<v1::PipelineResponse>, in_flight: usize) -> (FakeDaemon, Pipeline) {
        let fake = FakeDaemon::start().await;
        *fake.calls.batches.answers.lock().unwrap() = answers.into();
        let options = PipelineOptions { in_flight };
        let pipeline = fake.session.pipeline(options).await.unwrap();
        (fake, pipeline)
    }

    async fn until_unmapped(fake: &FakeDaemon, ids: &[u64]) {
        let seen = || {
            let unmapped = fake.calls.unmapped.lock().unwrap();
            let mut ids: Vec<_> = unmapped.iter().map(|entry| entry.mapping_id).collect();
            ids.sort_unstable();
            ids
        };
        let come = async {
            while seen() != ids {
                sleep(A_MOMENT / 10).await;
            }
        };
        timeout(SOON, come).await.expect("they are unmapped");
    }

    #[tokio::test]
    async fn each_batch_is_answered_as_what_it_was() {
        let no = Refusal::because(Code::InvalidArgument, v1::ErrorReason::ZeroLength, "no");
        let refused = v1::PipelineResponse {
            operation: PipelineOperation::Sync.into(),
            refusal: Some(no.clone()),
            ..v1::PipelineResponse::default()
        };
        let answers = vec![
            mapped(&[Some(0), None, Some(2)]),
            refused,
            unmapped(vec![7, 8]),
        ];
        let (fake, mut pipeline) = scene(answers, 3).await;
        let part = SyncSpec {
            iova: Iova::new(BOUNCE),
            id: MappingId::new(1),
            offset: 0,
            len_bytes: 0,
            target: SyncTarget::ForCpu,
        };
        let end = |id| UnmapSpec {
            iova: Iova::new(BOUNCE),
            id: MappingId::new(id),
            written_bytes: Some(7),
            skip_sync: false,
        };
        pipeline
            .map(&[spec(10), spec(20), spec(30)], BatchMode::Partial)
            .unwrap();
        pipeline.sync(&[part], ALL).unwrap();
        pipeline.unmap(&[end(1), end(2)], ALL).unwrap();
        assert_eq!(pipeline.in_flight(), 3);

        let Some(Answer::Mapped(batch)) = pipeline.next().await.unwrap() else {
            panic!("mapped")
        };
        let places: Vec<_> = batch
            .iter()
            .map(|one| one.map_err(Refusal::reason))
            .collect();
        let place = |page, len_bytes| Mapped {
            id: MappingId::new(page + 1),
            iova: Iova::new(BOUNCE + page * PAGE),
            len_bytes,
        };
        let missing = v1::ErrorReason::NoSuchMemory;
        assert_eq!(places, [Ok(place(0, 10)), Err(missing), Ok(place(2, 30))]);
        let Some(Answer::Refused(why)) = pipeline.next().await.unwrap() else {
            panic!("refused")
        };
        assert_eq!(why, &no);
        let Some(Answer::Unmapped(batch)) = pipeline.next().await.unwrap() else {
            panic!("unmapped")
        };
        assert_eq!(batch.iter().collect::<Vec<_>>(), [Ok(7), Ok(8)]);
        assert!(pipeline.next().await.unwrap().is_none(), "nothing is asked");

        let asked = fake.calls.batches.asked.lock().unwrap().clone();
        assert!(asked[0].partial && !asked[1].partial);
        assert_eq!(asked[0].len_bytes, [10, 20, 30]);
        assert_eq!(asked[2].mapping_id, [1, 2]);
        drop(pipeline);
        sleep(A_MOMENT).await;
        let unmapped = fake.calls.unmapped.lock().unwrap().len();
        assert_eq!(unmapped, 0, "what was answered is the caller's");
    }

    #[tokio::test]
    async fn a_full_pipeline_says_so_and_takes_more_when_an_answer_is_read() {
        let one = || mapped(&[Some(0)]);
        let (fake, mut pipeline) = scene(vec![one(), one(), one()], 2).await;
        pipeline.map(&[spec(1)], ALL).unwrap();
        pipeline.map(&[spec(1)], ALL).unwrap();
        let full = pipeline.map(&[spec(1)], ALL).unwrap_err();
        assert!(matches!(full, Error::PipelineFull { in_flight: 2 }));
        pipeline.next().await.unwrap().unwrap();
        pipeline.map(&[spec(1)], ALL).unwrap();

        let (mut sender, mut receiver) = pipeline.split();
        let waiting = timeout(A_MOMENT, sender.map(&[spec(1)], ALL)).await;
        assert!(waiting.is_err(), "two are not answered");
        let none = sender.map(&[], ALL).await.unwrap_err();
        assert_eq!(none.reason(), v1::ErrorReason::Malformed);
        for _ in 0..2 {
            receiver.next().await.unwrap().unwrap();
        }
        drop(sender);
        assert!(receiver.next().await.unwrap().is_none());
        let asked = fake.calls.batches.asked.lock().unwrap().len();
        assert_eq!(asked, 3, "what was cancelled was not sent");
    }

    #[tokio::test]
    async fn what_a_dropped_pipeline_has_not_delivered_is_unmapped() {
        let answers = vec![mapped(&[Some(0)]), mapped(&[Some(1), None, Some(2)])];
        let (fake, mut pipeline) = scene(answers, 4).await;
        pipeline.map(&[spec(1)], ALL).unwrap();
        pipeline.map(&[spec(1); 3], BatchMode::Partial).unwrap();
        pipeline.next().await.unwrap().unwrap();

        drop(pipeline);

        until_unmapped(&fake, &[2, 3]).await;
    }

    #[tokio::test]
    async fn a_sender_whose_receiver_is_gone_is_told() {
        let (_fake, pipeline) = scene(vec![], 1).await;
        let (mut sender, receiver) = pipeline.split();
        drop(receiver);
        let closed = sender.map(&[spec(1)], ALL).await.unwrap_err();
        assert!(matches!(closed, Error::PipelineClosed), "{closed}");
    }

    #[tokio::test]
    async fn an_answer_that_does_not_fit_ends_the_pipeline_and_is_undone() {
        let outside = v1::PipelineResponse {
            iova: vec![BOUNCE, BOUNCE + 4 * PAGE],
            ..mapped(&[Some(0), Some(1)])
        };
        let unasked = mapped(&[Some(0), None]);
        let too_few = mapped(&[Some(0)]);
        for (answer, ids) in [
            (outside, vec![1, 2]),
            (unasked, vec![1]),
            (too_few, vec![1]),
        ] {
            let (fake, mut pipeline) = scene(vec![answer.clone()], 2).await;
            pipeline.map(&[spec(1), spec(1)], ALL).unwrap();
            let error = pipeline.next().await.unwrap_err();
            assert!(matches!(error, Error::Protocol(_)), "{error:?}");
            until_unmapped(&fake, &ids).await;
            assert!(pipeline.next().await.unwrap().is_none());
            let closed = pipeline.map(&[spec(1)], ALL).unwrap_err();
            assert!(matches!(closed, Error::PipelineClosed), "{closed}");
        }
    }

    #[tokio::test]
    async fn the_end_of_the_session_or_of_the_daemon_ends_the_pipeline() {
        let (_fake, mut pipeline) = scene(vec![], 1).await;
        pipeline.map(&[spec(1)], ALL).unwrap();
        let stopped = pipeline.next().await.unwrap_err();
        assert_eq!(stopped.code(), Some(Code::Unavailable));

        let (fake, pipeline) = scene(vec![], 1).await;
        let (_sender, mut receiver) = pipeline.split();
        let evict = fake.peer.say_ended(v1::EndReason::Evicted);
        let (ended, ()) = tokio::join!(timeout(SOON, receiver.next()), evict);
        let ended = ended.unwrap().unwrap_err();
        assert!(matches!(ended, Error::Ended(_)), "{ended}");
    }

    fn may_be_spawned<T: Send>(_: &T) {}
    fn may_be_shared<T: Send + Sync + 'static>() {}

    /// Compiles, that is all.
    #[allow(dead_code)]
    fn everything_works_from_several_tasks(mut pipeline: Pipeline, session: &Session) {
        may_be_shared::<(Pipeline, PipelineSender, PipelineReceiver)>();
        may_be_spawned(&session.pipeline(PipelineOptions::default()));
        may_be_spawned(&pipeline.next());
        let (mut sender, _) = pipeline.split();
        may_be_spawned(&sender.map(&[], ALL));
    }
}
