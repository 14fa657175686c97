//! What a dropped guard leaves to do, and the task that does it.

use std::sync::Arc;
use std::time::Duration;

use domain_core::addr::Iova;
use domain_core::limits::BATCH_ENTRIES;
use domain_core::mapping::MappingId;
use domain_core::memory::MemoryId;
use domain_core::streaming::UnmapSpec;
use domaind_proto::v1;
use domaind_proto::v1::client_frame::Body as Ask;
use tokio::sync::mpsc::UnboundedReceiver;
use tonic::Code;

use crate::client::DomainCalls;
use crate::connection::Connection;
use crate::error::Error;
use crate::session::Inner;

/// How long the first repetition waits; each later one waits twice as long.
const PAUSE_MIN: Duration = Duration::from_millis(10);
/// How long a repetition waits at most.
const PAUSE_MAX: Duration = Duration::from_secs(1);

/// One thing in the daemon that nobody wants any more.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Undo {
    /// Copying nothing back: nobody said what the device wrote.
    Unmap {
        iova: Iova,
        id: MappingId,
    },
    Free {
        iova: Iova,
        id: MappingId,
    },
    Release {
        iova: Iova,
        id: MappingId,
    },
    Unregister {
        memory: MemoryId,
    },
}

/// Undoes something when it is dropped, unless it was disarmed. Keeps the
/// session alive.
///
/// Dropping never waits: it hands the work to the session's reaper. The queue
/// is unbounded and yet small: each entry stands for something that the
/// daemon still holds and counts against a quota.
#[derive(Debug)]
pub(crate) struct Guard {
    session: Arc<Inner>,
    undo: Option<Undo>,
}

impl Guard {
    pub(crate) fn new(session: Arc<Inner>, undo: Undo) -> Guard {
        Guard {
            session,
            undo: Some(undo),
        }
    }

    /// A guard of the same session that undoes nothing.
    pub(crate) fn unarmed(&self) -> Guard {
        Guard {
            session: Arc::clone(&self.session),
            undo: None,
        }
    }

    pub(crate) fn disarm(&mut self) {
        self.undo = None;
    }

    pub(crate) fn session(&self) -> &Arc<Inner> {
        &self.session
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        if let Some(undo) = self.undo.take() {
            self.session.undo_later(undo);
        }
    }
}

/// Does what dropped guards left, as long as the session lives.
pub(crate) struct Reaper {
    /// Ends when the last handle and guard of the session are gone.
    pub(crate) queue: UnboundedReceiver<Undo>,
    pub(crate) calls: DomainCalls,
    /// Stays open until the queue is empty.
    pub(crate) connection: Arc<Connection>,
}

impl Reaper {
    pub(crate) async fn run(mut self) {
        let mut todo = Vec::new();
        let mut pause = PAUSE_MIN;
        while self.refill(&mut todo, pause).await {
            todo = self.undo(todo).await;
            pause = if todo.is_empty() {
                PAUSE_MIN
            } else {
                PAUSE_MAX.min(pause * 2)
            };
        }
        // Nobody is left who could hold anything.
        self.connection.say_detach().await;
    }

    /// Waits for more to do; with something left over no longer than `pause`.
    /// False when there will be no more: what is left then ends with the
    /// session.
    async fn refill(&mut self, todo: &mut Vec<Undo>, pause: Duration) -> bool {
        let has_left = !todo.is_empty();
        tokio::select! {
            _ = self.connection.ended() => false,
            got = self.queue.recv_many(todo, BATCH_ENTRIES) => got > 0,
            () = tokio::time::sleep(pause), if has_left => true,
        }
    }

    /// Undoes what can be; returns what must be tried again.
    async fn undo(&mut self, todo: Vec<Undo>) -> Vec<Undo> {
        let (unmaps, others): (Vec<_>, Vec<_>) = todo
            .into_iter()
            .partition(|undo| matches!(undo, Undo::Unmap { .. }));
        let mut left = Vec::new();
        // Mappings first: a memory goes only when they are gone.
        for batch in unmaps.chunks(BATCH_ENTRIES) {
            left.extend(self.unmap(batch).await);
        }
        for undo in others {
            if self
                .undo_one(undo)
                .await
                .is_err_and(|error| is_passing(&error))
            {
                left.push(undo);
            }
        }
        left
    }

    async fn unmap(&mut self, batch: &[Undo]) -> Vec<Undo> {
        let request = v1::UnmapRequest {
            entries: batch.iter().filter_map(unmap_entry).collect(),
            partial: true,
            request_id: String::new(),
        };
        let answer = self.calls.unmap(request).await.map_err(Error::from);
        match answer {
            Ok(response) => left_of(batch, response.into_inner().results),
            Err(error) if is_passing(&error) => batch.to_vec(),
            Err(_) => Vec::new(),
        }
    }

    async fn undo_one(&mut self, undo: Undo) -> Result<(), Error> {
        match undo {
            Undo::Unmap { .. } => unreachable!("unmaps go in batches"),
            Undo::Free { iova, id } => {
                self.calls
                    .free_coherent(v1::FreeCoherentRequest::from((iova, id)))
                    .await?;
            }
            Undo::Release { iova, id } => {
                self.calls
                    .release(v1::ReleaseRequest::from((iova, id)))
                    .await?;
            }
            Undo::Unregister { memory } => {
                let memory_id = memory.get();
                let ask = Ask::UnregisterMemory(v1::UnregisterMemory { memory_id });
                self.connection.request(ask, None).await?;
            }
        }
        Ok(())
    }
}

fn unmap_entry(undo: &Undo) -> Option<v1::UnmapEntry> {
    match *undo {
        Undo::Unmap { iova, id } => Some(v1::UnmapEntry::from(&UnmapSpec {
            iova,
            id,
            written_bytes: None,
            skip_sync: true,
        })),
        Undo::Free { .. } | Undo::Release { .. } | Undo::Unregister { .. } => None,
    }
}

/// The entries of a batch that must be tried again.
fn left_of(batch: &[Undo], results: Vec<v1::UnmapResult>) -> Vec<Undo> {
    let is_left = |result: v1::UnmapResult| {
        result
            .refusal
            .is_some_and(|refusal| is_passing(&Error::Refused(refusal)))
    };
    let entries = batch.iter().zip(results);
    entries
        .filter_map(|(undo, result)| is_left(result).then_some(*undo))
        .collect()
}

/// Will the same request do better later?
fn is_passing(error: &Error) -> bool {
    let waits = [v1::ErrorReason::MappingBusy, v1::ErrorReason::MemoryInUse];
    waits.contains(&error.reason()) || error.code() == Some(Code::Unavailable)
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use domain_core::coherent::CoherentSpec;
    use domain_core::perm::Direction;
    use domain_core::streaming::MapSpec;
    use tokio::time::{sleep, timeout};

    use super::*;
    use crate::apertures::AddressError;
    use crate::error::EndReason;
    use crate::fake::{A_MOMENT, BOUNCE, FakeDaemon, SOON};

    /// Longer than a call takes to set out.
    const DELAY: Duration = Duration::from_millis(200);

    fn spec() -> MapSpec {
        MapSpec::new(MemoryId::new(1), 0, 100, Direction::FromDevice)
    }

    fn busy() -> v1::Refusal {
        v1::Refusal::because(
            Code::FailedPrecondition,
            v1::ErrorReason::MappingBusy,
            "a sync copies",
        )
    }

    /// The list, when it has so many entries.
    async fn seen<T: Clone>(list: &Mutex<Vec<T>>, count: usize) -> Vec<T> {
        let come = async {
            while list.lock().unwrap().len() < count {
                sleep(Duration::from_millis(1)).await;
            }
        };
        timeout(SOON, come).await.expect("the daemon is asked");
        list.lock().unwrap().clone()
    }

    #[tokio::test]
    async fn a_dropped_mapping_is_unmapped_and_copies_nothing_back() {
        let fake = FakeDaemon::start().await;
        let mapping = fake.session.map(spec()).await.unwrap();
        let id = mapping.id().get();
        assert_eq!(mapping.iova(), Iova::new(BOUNCE));

        drop(mapping);

        let unmapped = seen(&fake.calls.unmapped, 1).await;
        let expected = v1::UnmapEntry {
            iova: BOUNCE,
            mapping_id: id,
            written_bytes: None,
            skip_sync: true,
        };
        assert_eq!(unmapped, [expected]);
    }

    #[tokio::test]
    async fn an_unmapped_or_dismembered_mapping_is_not_unmapped_again() {
        let fake = FakeDaemon::start().await;

        let copied = fake
            .session
            .map(spec())
            .await
            .unwrap()
            .unmap(Some(60))
            .await;
        let _parts = fake.session.map(spec()).await.unwrap().into_parts();
        let last = fake.session.map(spec()).await.unwrap();
        let last_id = last.id().get();
        drop(last);

        assert_eq!(copied.unwrap(), 60);
        let unmapped = seen(&fake.calls.unmapped, 2).await;
        assert_eq!(unmapped[0].written_bytes, Some(60));
        assert_eq!(unmapped[1].mapping_id, last_id);
    }

    #[tokio::test]
    async fn a_refused_unmap_gives_the_mapping_back() {
        let fake = FakeDaemon::start().await;
        let mapping = fake.session.map(spec()).await.unwrap();
        let id = mapping.id();
        let refusal = v1::Refusal::because(
            Code::FailedPrecondition,
            v1::ErrorReason::CopyFailed,
            "the file is sealed",
        );
        fake.calls.refuse_unmaps.lock().unwrap().push_back(refusal);

        let kept = mapping.unmap(Some(1)).await.unwrap_err();

        assert_eq!(kept.error.reason(), v1::ErrorReason::CopyFailed);
        assert_eq!(kept.guard.id(), id);
        assert_eq!(kept.guard.unmap(Some(1)).await.unwrap(), 1);
    }

    #[tokio::test]
    async fn what_a_cancelled_map_maps_is_unmapped() {
        let fake = FakeDaemon::start().await;
        *fake.calls.delay.lock().unwrap() = DELAY;

        let cancelled = timeout(A_MOMENT, fake.session.map(spec())).await;

        assert!(cancelled.is_err());
        let unmapped = seen(&fake.calls.unmapped, 1).await;
        assert!(unmapped[0].skip_sync);
    }

    #[tokio::test]
    async fn a_busy_mapping_is_unmapped_when_it_no_longer_is() {
        let fake = FakeDaemon::start().await;
        let mapping = fake.session.map(spec()).await.unwrap();
        fake.calls
            .refuse_unmaps
            .lock()
            .unwrap()
            .extend([busy(), busy()]);

        drop(mapping);

        let unmapped = seen(&fake.calls.unmapped, 3).await;
        assert_eq!(unmapped[0], unmapped[2]);
        sleep(A_MOMENT).await;
        assert_eq!(fake.calls.unmapped.lock().unwrap().len(), 3);
    }

    #[tokio::test]
    async fn coherent_memory_is_freed_unless_it_is_persistent() {
        let fake = FakeDaemon::start().await;
        let persistent = CoherentSpec {
            persistent: true,
            ..CoherentSpec::of(64)
        };

        drop(fake.session.alloc_coherent(persistent).await.unwrap());
        let coherent = fake
            .session
            .alloc_coherent(CoherentSpec::of(64))
            .await
            .unwrap();
        let id = coherent.id().get();
        drop(coherent);

        assert_eq!(seen(&fake.calls.freed, 1).await, [id]);
    }

    #[tokio::test]
    async fn persistent_memory_that_nobody_learned_of_is_freed() {
        let fake = FakeDaemon::start().await;
        *fake.calls.delay.lock().unwrap() = DELAY;
        let persistent = CoherentSpec {
            persistent: true,
            ..CoherentSpec::of(64)
        };

        let cancelled = timeout(A_MOMENT, fake.session.alloc_coherent(persistent)).await;

        assert!(cancelled.is_err());
        seen(&fake.calls.freed, 1).await;
    }

    #[tokio::test]
    async fn a_dropped_buffer_is_unregistered_when_no_mapping_uses_it_any_more() {
        let fake = FakeDaemon::start().await;
        let peer = &fake.peer;
        let in_use = v1::Refusal::because(
            Code::FailedPrecondition,
            v1::ErrorReason::MemoryInUse,
            "still mapped",
        );
        let registering = async {
            let asked = peer.hear().await.unwrap();
            let registered = v1::MemoryRegistered {
                memory_id: 5,
                size_bytes: 4096,
            };
            let body = v1::server_frame::Body::MemoryRegistered(registered);
            peer.say(asked.request_id, body, None).await;
        };
        let (buffer, ()) = tokio::join!(fake.session.buffer(1), registering);

        drop(buffer.unwrap());

        let first = peer.hear().await.unwrap();
        assert_eq!(
            first.body,
            Some(Ask::UnregisterMemory(v1::UnregisterMemory { memory_id: 5 }))
        );
        let refusal = v1::server_frame::Body::Refusal(in_use);
        peer.say(first.request_id, refusal, None).await;
        assert_eq!(peer.hear().await.unwrap().body, first.body);
    }

    #[tokio::test]
    async fn the_end_of_the_session_ends_a_call_that_hangs_and_guards_stay_harmless() {
        let fake = FakeDaemon::start().await;
        let mapping = fake.session.map(spec()).await.unwrap();
        *fake.calls.hang.lock().unwrap() = true;
        let evict = async {
            sleep(A_MOMENT).await;
            let ended = v1::SessionEnded {
                reason: v1::EndReason::Evicted.into(),
                message: "by the operator".to_owned(),
            };
            let body = v1::server_frame::Body::SessionEnded(ended);
            fake.peer.say(0, body, None).await;
        };

        let (hanging, ()) = tokio::join!(timeout(SOON, fake.session.map(spec())), evict);
        let kept = mapping.unmap(Some(1)).await.unwrap_err();

        let evicted = |error: &Error| matches!(error, Error::Ended(ended) if ended.reason == EndReason::Evicted);
        assert!(evicted(&hanging.unwrap().unwrap_err()) && evicted(&kept.error));
        drop(kept);
        sleep(A_MOMENT).await;
        assert!(fake.calls.unmapped.lock().unwrap().is_empty());
        // What was mapped of the domain can still be read.
        fake.session.read(Iova::new(BOUNCE), &mut [0]).unwrap();
        let written = fake.session.write(Iova::new(BOUNCE), &[0]);
        assert!(matches!(written, Err(AddressError::Ended { .. })));
        let word = fake.session.word32_mut(Iova::new(BOUNCE));
        assert!(matches!(word, Err(AddressError::Ended { .. })));
    }

    #[tokio::test]
    async fn the_session_ends_with_its_last_handle_or_guard() {
        let mut fake = FakeDaemon::start().await;
        let mapping = fake.session.map(spec()).await.unwrap();
        let other = FakeDaemon::start().await;
        // The only handle of the first session goes; its guard stays.
        fake.session = other.session.clone();
        sleep(A_MOMENT).await;
        assert!(fake.calls.unmapped.lock().unwrap().is_empty());

        drop(mapping);

        fake.peer.hear_the_end().await;
        assert_eq!(fake.calls.unmapped.lock().unwrap().len(), 1);
    }

    #[test]
    fn guards_may_be_dropped_where_no_runtime_is() {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        let fake = runtime.block_on(FakeDaemon::start());
        let [first, second] = [(); 2].map(|()| runtime.block_on(fake.session.map(spec())).unwrap());

        drop(first);
        let unmapped = runtime.block_on(seen(&fake.calls.unmapped, 1));
        assert_eq!(unmapped.len(), 1);

        drop(runtime);
        drop(second);
    }
}
