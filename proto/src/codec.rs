//! How messages become bytes: as tonic's own codec does it, but for the
//! messages of a pipeline, which are used again.
//!
//! A batch of a thousand entries is a dozen columns, and each would be allocated
//! anew for every message. [`Message::clear`] keeps the capacity of a column, so
//! a cleared message is worth keeping: the decoder takes it from a short list of
//! its thread, and the encoder gives it back when it is written. Who handles
//! messages does the same with [`take`] and [`give_back`].
//!
//! Where one thread only takes and another one only gives back, as with a client
//! whose connection has a task of its own, what is one too many on this one goes
//! through a list that all threads share to that one.

use std::any::Any;
use std::cell::RefCell;
use std::marker::PhantomData;
use std::sync::{Mutex, MutexGuard, PoisonError};

use domain_core::limits::BATCH_ENTRIES;
use prost::Message;
use tonic::Status;
use tonic::codec::{BufferSettings, Codec, DecodeBuf, Decoder, EncodeBuf, Encoder};

use crate::v1::{PipelineRequest, PipelineResponse};

/// Messages of one kind that a thread keeps. A full one is some 100 KiB.
const KEPT: usize = 4;
/// Messages of one kind that are kept for all threads.
const SPARE: usize = 32;

static SPARE_REQUESTS: Spare<PipelineRequest> = Spare::new();
static SPARE_RESPONSES: Spare<PipelineResponse> = Spare::new();

thread_local! {
    static REQUESTS: RefCell<Kept<PipelineRequest>> = const { RefCell::new(Kept::new()) };
    static RESPONSES: RefCell<Kept<PipelineResponse>> = const { RefCell::new(Kept::new()) };
}

/// An empty message; one that was given back, on this thread if possible.
#[must_use]
pub fn take<M: Default + 'static>() -> M {
    let mut taken = None::<M>;
    let slot: &mut dyn Any = &mut taken;
    if let Some(slot) = slot.downcast_mut() {
        *slot = REQUESTS.with_borrow_mut(|kept| kept.take(&SPARE_REQUESTS));
    } else if let Some(slot) = slot.downcast_mut() {
        *slot = RESPONSES.with_borrow_mut(|kept| kept.take(&SPARE_RESPONSES));
    }
    taken.unwrap_or_default()
}

/// Takes a message that nobody needs any more. One of another kind, or one too
/// many, is dropped.
pub fn give_back<M: 'static>(message: M) {
    let mut given = Some(message);
    let slot: &mut dyn Any = &mut given;
    if let Some(slot) = slot.downcast_mut::<Option<PipelineRequest>>() {
        REQUESTS.with_borrow_mut(|kept| kept.put(slot.take(), &SPARE_REQUESTS));
    } else if let Some(slot) = slot.downcast_mut::<Option<PipelineResponse>>() {
        RESPONSES.with_borrow_mut(|kept| kept.put(slot.take(), &SPARE_RESPONSES));
    }
}

/// Cleared messages of one thread, a few.
struct Kept<M>(Vec<M>);

/// Cleared messages that a thread had too many of, for those that have none. Only
/// they touch it.
struct Spare<M> {
    /// Held to push or to pop; nothing is made or dropped meanwhile.
    messages: Mutex<Vec<M>>,
}

impl<M: Reusable> Kept<M> {
    const fn new() -> Kept<M> {
        Kept(Vec::new())
    }

    fn take(&mut self, spare: &Spare<M>) -> Option<M> {
        self.0.pop().or_else(|| spare.take())
    }

    fn put(&mut self, message: Option<M>, spare: &Spare<M>) {
        let Some(mut message) = message.filter(|message| !message.is_overgrown()) else {
            return;
        };
        message.clear();
        if self.0.len() < KEPT {
            self.0.push(message);
        } else {
            drop(spare.put(message));
        }
    }
}

impl<M> Spare<M> {
    const fn new() -> Spare<M> {
        Spare {
            messages: Mutex::new(Vec::new()),
        }
    }

    fn take(&self) -> Option<M> {
        self.messages().pop()
    }

    /// Gives it back if there are enough.
    fn put(&self, message: M) -> Option<M> {
        let mut messages = self.messages();
        if messages.len() >= SPARE {
            return Some(message);
        }
        messages.push(message);
        None
    }

    /// A list is whole after any panic.
    fn messages(&self) -> MutexGuard<'_, Vec<M>> {
        self.messages.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A message whose cleared self keeps what it has allocated.
trait Reusable: Message {
    /// Has it room for more than the largest batch that is ever answered?
    fn is_overgrown(&self) -> bool;
}

/// Has a column room for more than a full batch? A `Vec` that grows by itself
/// doubles, and may so come to twice as much less one.
fn is_long<T>(column: &Vec<T>) -> bool {
    column.capacity() >= 2 * BATCH_ENTRIES
}

impl Reusable for PipelineRequest {
    fn is_overgrown(&self) -> bool {
        let numbers = [
            &self.memory_id,
            &self.offset,
            &self.len_bytes,
            &self.align_bytes,
            &self.limit,
            &self.iova,
            &self.mapping_id,
            &self.written_bytes,
        ];
        let flags = [&self.keep_offset, &self.preserve, &self.skip_sync];
        let words = [&self.direction, &self.target];
        numbers.into_iter().any(is_long)
            || flags.into_iter().any(is_long)
            || words.into_iter().any(is_long)
            || self.request_id.capacity() > BATCH_ENTRIES
    }
}

impl Reusable for PipelineResponse {
    fn is_overgrown(&self) -> bool {
        let numbers = [&self.mapping_id, &self.iova, &self.copied_bytes];
        numbers.into_iter().any(is_long) || is_long(&self.refused)
    }
}

/// Encodes `T` and decodes `U`, as prost does.
#[derive(Clone, Debug)]
pub struct MessageCodec<T, U>(PhantomData<(T, U)>);

impl<T, U> Default for MessageCodec<T, U> {
    fn default() -> MessageCodec<T, U> {
        MessageCodec(PhantomData)
    }
}

impl<T, U> Codec for MessageCodec<T, U>
where
    T: Message + 'static,
    U: Message + Default + 'static,
{
    type Encode = T;
    type Decode = U;
    type Encoder = MessageEncoder<T>;
    type Decoder = MessageDecoder<U>;

    fn encoder(&mut self) -> MessageEncoder<T> {
        MessageEncoder(PhantomData)
    }

    fn decoder(&mut self) -> MessageDecoder<U> {
        MessageDecoder(PhantomData)
    }
}

/// Writes messages, and gives them back.
#[derive(Clone, Debug)]
pub struct MessageEncoder<T>(PhantomData<T>);

/// Reads messages into those that were given back.
#[derive(Clone, Debug)]
pub struct MessageDecoder<U>(PhantomData<U>);

impl<T: Message + 'static> Encoder for MessageEncoder<T> {
    type Item = T;
    type Error = Status;

    fn encode(&mut self, item: T, into: &mut EncodeBuf<'_>) -> Result<(), Status> {
        item.encode(into).expect("the buffer grows as it is needed");
        give_back(item);
        Ok(())
    }

    fn buffer_settings(&self) -> BufferSettings {
        BufferSettings::default()
    }
}

impl<U: Message + Default + 'static> Decoder for MessageDecoder<U> {
    type Item = U;
    type Error = Status;

    fn decode(&mut self, from: &mut DecodeBuf<'_>) -> Result<Option<U>, Status> {
        let mut message: U = take();
        // INTERNAL is what gRPC prescribes for a message that cannot be read.
        let merged = message.merge(from);
        merged.map_err(|error| Status::internal(error.to_string()))?;
        Ok(Some(message))
    }

    fn buffer_settings(&self) -> BufferSettings {
        BufferSettings::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::v1::{self, EntryRefusal, MapEntry, MapRequest};
    use tonic::Code;
    use tonic::codec::{EncodeBody, Streaming};
    use tonic::codegen::tokio_stream;

    /// What a message is after it was encoded as `T` and decoded as `U`. All on
    /// this thread, and so with one list.
    async fn travelled<T, U>(message: T) -> Result<U, Status>
    where
        T: Message + 'static,
        U: Message + Default + 'static,
    {
        let encoder = MessageCodec::<T, U>::default().encoder();
        let decoder = MessageCodec::<T, U>::default().decoder();
        let sent = tokio_stream::iter([Ok(message)]);
        let body = EncodeBody::new_client(encoder, sent, None, None);
        let mut received = Streaming::new_request(decoder, body, None, None);
        Ok(received.message().await?.expect("one was sent"))
    }

    fn full_request() -> PipelineRequest {
        let numbers = || (0..BATCH_ENTRIES as u64).collect::<Vec<_>>();
        PipelineRequest {
            operation: v1::PipelineOperation::Map.into(),
            partial: true,
            request_id: "one".to_owned(),
            memory_id: numbers(),
            offset: numbers(),
            len_bytes: numbers(),
            direction: vec![1; BATCH_ENTRIES],
            keep_offset: vec![true; BATCH_ENTRIES],
            preserve: vec![true; BATCH_ENTRIES],
            skip_sync: vec![true; BATCH_ENTRIES],
            align_bytes: numbers(),
            limit: numbers(),
            iova: numbers(),
            mapping_id: numbers(),
            written_bytes: numbers(),
            target: vec![2; BATCH_ENTRIES],
        }
    }

    fn full_response() -> PipelineResponse {
        let numbers = || (1..=BATCH_ENTRIES as u64).collect::<Vec<_>>();
        PipelineResponse {
            operation: v1::PipelineOperation::Unmap.into(),
            mapping_id: numbers(),
            iova: numbers(),
            copied_bytes: numbers(),
            entries: 7,
            refused: vec![EntryRefusal::default(); 3],
            refusal: Some(v1::Refusal::default()),
        }
    }

    #[tokio::test]
    async fn a_message_arrives_in_the_columns_of_the_one_that_was_sent_before() {
        let (sent, copy) = (full_request(), full_request());
        let columns = (sent.offset.as_ptr(), sent.target.as_ptr());

        let received: PipelineRequest = travelled(sent).await.unwrap();

        assert_eq!(received, copy);
        let same = (received.offset.as_ptr(), received.target.as_ptr());
        assert_eq!(same, columns, "nothing was allocated for it");
        let again: PipelineRequest = travelled(received).await.unwrap();
        assert_eq!((again.offset.as_ptr(), &again), (columns.0, &copy));

        let (sent, copy) = (full_response(), full_response());
        let columns = (sent.iova.as_ptr(), sent.refused.as_ptr());
        let received: PipelineResponse = travelled(sent).await.unwrap();
        let same = (received.iova.as_ptr(), received.refused.as_ptr());
        assert_eq!((same, received), (columns, copy));
    }

    #[tokio::test]
    async fn nothing_of_a_message_is_in_the_next_one() {
        give_back(full_request());
        let empty: PipelineRequest = travelled(take::<PipelineRequest>()).await.unwrap();
        assert_eq!(empty, PipelineRequest::default());
        assert!(empty.offset.capacity() >= BATCH_ENTRIES, "but for its room");
        give_back(full_response());
        let empty: PipelineResponse = travelled(take::<PipelineResponse>()).await.unwrap();
        assert_eq!(empty, PipelineResponse::default());
        // Half of a message that cannot be read is dropped with it.
        give_back(full_request());
        let _ = travelled::<_, PipelineRequest>(MapRequest {
            entries: vec![MapEntry::default()],
            ..MapRequest::default()
        })
        .await;
        assert_eq!(take::<PipelineRequest>(), PipelineRequest::default());
    }

    /// How many of so many that are taken have been used before.
    fn used<M: Reusable>(kept: &mut Kept<M>, spare: &Spare<M>, count: usize) -> usize {
        (0..count).filter_map(|_| kept.take(spare)).count()
    }

    #[test]
    fn a_thread_keeps_few_messages_all_threads_some_more_and_none_that_is_larger_than_a_batch() {
        let (mut kept, spare) = (Kept::new(), Spare::new());
        let mut large = full_request();
        large.keep_offset.reserve_exact(2 * BATCH_ENTRIES);
        kept.put(Some(large), &spare);
        assert_eq!(used(&mut kept, &spare, 1), 0);

        for _ in 0..KEPT + SPARE + 1 {
            kept.put(Some(full_request()), &spare);
        }
        let mut other = Kept::new();
        assert_eq!(used(&mut other, &spare, KEPT + SPARE), SPARE);
        assert_eq!(used(&mut kept, &spare, KEPT + SPARE), KEPT);
    }

    /// As the client's requests go: made here, written by the connection's task.
    #[test]
    fn what_one_thread_only_gives_back_another_one_takes() {
        let (mut writer, spare) = (Kept::new(), Spare::new());
        for _ in 0..=KEPT {
            writer.put(Some(full_request()), &spare);
        }
        let mut maker = Kept::new();
        for _ in 0..100 {
            let message = maker.take(&spare).expect("one was too many there");
            assert_eq!(message, PipelineRequest::default());
            assert!(message.offset.capacity() >= BATCH_ENTRIES);
            writer.put(Some(message), &spare);
        }
        assert_eq!(used(&mut maker, &spare, 2), 1);
    }

    #[test]
    fn messages_come_from_thread_to_thread() {
        // More than one keeps; other tests may take some of them meanwhile.
        let given = || (0..SPARE).for_each(|_| give_back(full_request()));
        let found = (0..100).any(|_| {
            std::thread::spawn(given).join().unwrap();
            let taken = [(); KEPT + 1].map(|()| take::<PipelineRequest>());
            taken.iter().all(|one| one.offset.capacity() > 0)
        });
        assert!(found);
    }

    #[tokio::test]
    async fn other_messages_are_as_ever_and_what_is_none_is_internal() {
        let sent = MapRequest {
            entries: vec![MapEntry::default()],
            partial: true,
            request_id: "two".to_owned(),
        };
        let received: MapRequest = travelled(sent.clone()).await.unwrap();
        assert_eq!(received, sent);
        assert_eq!(take::<MapRequest>(), MapRequest::default());
        // A list where a number should be.
        let unreadable = travelled::<_, PipelineRequest>(sent).await.unwrap_err();
        assert_eq!(unreadable.code(), Code::Internal);
    }
}
