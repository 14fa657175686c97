//! What a session hears of changes, for whoever wants to know.

use std::collections::VecDeque;
use std::mem;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use domain_core::addr::IovaRange;
use domain_core::perm::Perm;
use domaind_proto::{convert, v1};
use tokio::sync::Notify;

use crate::error::ProtocolError;

/// Changes that wait for one reader, at most.
const CHANGES_MOST: usize = 1024;
/// Ranges in them, at most.
const RANGES_MOST: usize = 1 << 14;

/// The IOTLB has changed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Change {
    /// Number of the state after the change.
    pub generation: u64,
    /// What is not mapped any more as it was.
    pub removed: Vec<IovaRange>,
    /// What has been mapped.
    pub added: Vec<AddedRange>,
    /// More has changed than is listed, perhaps all: look anew at what matters.
    pub everything: bool,
}

/// A range that has been mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AddedRange {
    /// Where.
    pub range: IovaRange,
    /// What the device side may do there.
    pub perm: Perm,
}

/// The changes of a session's domain, from [`Session::changes`] on.
///
/// A reader that is too slow loses some, and is told so by a change with
/// [`everything`](Change::everything) set.
///
/// [`Session::changes`]: crate::Session::changes
#[derive(Debug)]
pub struct Changes {
    queue: Arc<Queue>,
}

impl Changes {
    /// The next change; `None` when the session has ended and all were read.
    /// Cancel safe.
    pub async fn recv(&mut self) -> Option<Change> {
        loop {
            let come = self.queue.come.notified();
            if let Some(next) = self.try_next() {
                return next;
            }
            come.await;
        }
    }

    /// `None`: there may be one later. `Some(None)`: there will be none.
    fn try_next(&self) -> Option<Option<Change>> {
        let mut waiting = self.queue.waiting();
        match waiting.pop() {
            Some(change) => Some(Some(change)),
            None => waiting.is_ended.then_some(None),
        }
    }
}

/// What waits for one reader.
#[derive(Debug, Default)]
struct Queue {
    /// Held for single operations.
    waiting: Mutex<Waiting>,
    /// There is something to read.
    come: Notify,
}

impl Queue {
    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        // Its numbers are true after each operation.
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[derive(Debug, Default)]
struct Waiting {
    changes: VecDeque<Change>,
    /// All that `changes` list, together.
    ranges: usize,
    /// Nothing more will come.
    is_ended: bool,
}

impl Waiting {
    /// Never more than the limits: what does not fit becomes one change of
    /// everything.
    fn push(&mut self, change: &Change) {
        if let Some(last) = self.changes.back_mut().filter(|last| last.everything) {
            last.generation = change.generation;
            return;
        }
        let ranges = self.ranges + change.ranges();
        if change.everything || self.changes.len() == CHANGES_MOST || ranges > RANGES_MOST {
            self.changes.clear();
            self.ranges = 0;
            self.changes.push_back(Change {
                generation: change.generation,
                everything: true,
                ..Change::default()
            });
        } else {
            self.ranges = ranges;
            self.changes.push_back(change.clone());
        }
    }

    fn pop(&mut self) -> Option<Change> {
        let change = self.changes.pop_front()?;
        self.ranges -= change.ranges();
        Some(change)
    }
}

impl Change {
    pub(crate) fn read(wire: &v1::Change) -> Result<Change, ProtocolError> {
        let range = |wire: &v1::IovaRange| convert::range(*wire).map_err(ProtocolError::Range);
        Ok(Change {
            generation: wire.generation,
            removed: wire.removed.iter().map(range).collect::<Result<_, _>>()?,
            added: wire.added.iter().map(added).collect::<Result<_, _>>()?,
            everything: wire.everything,
        })
    }

    fn ranges(&self) -> usize {
        self.removed.len() + self.added.len()
    }
}

fn added(wire: &v1::AddedRange) -> Result<AddedRange, ProtocolError> {
    Ok(AddedRange {
        range: convert::given_range("range", wire.range)?,
        perm: convert::perm(wire.perm)?,
    })
}

/// Who wants to know.
#[derive(Debug, Default)]
pub(crate) struct Subscribers {
    /// `None` when the session has ended. Held for as long as a change is
    /// handed out, which waits for nobody.
    queues: Mutex<Option<Vec<Weak<Queue>>>>,
}

impl Subscribers {
    pub(crate) fn new() -> Subscribers {
        Subscribers {
            queues: Mutex::new(Some(Vec::new())),
        }
    }

    pub(crate) fn subscribe(&self) -> Changes {
        let queue = Arc::<Queue>::default();
        match self.queues().as_mut() {
            Some(queues) => {
                queues.retain(|queue| queue.strong_count() > 0);
                queues.push(Arc::downgrade(&queue));
            }
            None => queue.waiting().is_ended = true,
        }
        Changes { queue }
    }

    pub(crate) fn publish(&self, change: &Change) {
        if let Some(queues) = self.queues().as_ref() {
            for queue in queues.iter().filter_map(Weak::upgrade) {
                queue.waiting().push(change);
                queue.come.notify_one();
            }
        }
    }

    pub(crate) fn end(&self) {
        let queues = mem::take(&mut *self.queues());
        for queue in queues
            .into_iter()
            .flatten()
            .filter_map(|queue| queue.upgrade())
        {
            queue.waiting().is_ended = true;
            queue.come.notify_one();
        }
    }

    fn queues(&self) -> MutexGuard<'_, Option<Vec<Weak<Queue>>>> {
        self.queues.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use domain_core::addr::Iova;
    use tokio::time::timeout;

    use super::*;
    use crate::fake::SOON;

    fn change(generation: u64, ranges: u64) -> Change {
        let range = |page| IovaRange::from_len(Iova::new(page * 4096), 4096).unwrap();
        Change {
            generation,
            removed: (1..=ranges).map(range).collect(),
            ..Change::default()
        }
    }

    async fn next(changes: &mut Changes) -> Option<Change> {
        timeout(SOON, changes.recv()).await.unwrap()
    }

    #[tokio::test]
    async fn every_reader_gets_every_change_in_order_and_then_the_end() {
        let subscribers = Subscribers::new();
        let mut readers = [subscribers.subscribe(), subscribers.subscribe()];
        subscribers.publish(&change(1, 1));
        subscribers.publish(&change(2, 0));
        subscribers.end();

        for reader in &mut readers {
            assert_eq!(next(reader).await, Some(change(1, 1)));
            assert_eq!(next(reader).await, Some(change(2, 0)));
            assert_eq!(next(reader).await, None);
            assert_eq!(next(reader).await, None);
        }
        assert_eq!(next(&mut subscribers.subscribe()).await, None);
    }

    #[tokio::test]
    async fn a_reader_that_waits_is_woken() {
        let subscribers = Subscribers::new();
        let mut reader = subscribers.subscribe();
        let publish = async {
            tokio::task::yield_now().await;
            subscribers.publish(&change(3, 2));
        };

        let (got, ()) = tokio::join!(next(&mut reader), publish);

        assert_eq!(got, Some(change(3, 2)));
    }

    #[tokio::test]
    async fn a_slow_reader_gets_one_change_of_everything_and_costs_no_memory() {
        let subscribers = Subscribers::new();
        let mut slow = subscribers.subscribe();
        let mut quick = subscribers.subscribe();
        let count = CHANGES_MOST as u64 * 3;

        for generation in 1..=count {
            subscribers.publish(&change(generation, 1));
            assert_eq!(next(&mut quick).await, Some(change(generation, 1)));
            assert!(slow.queue.waiting().changes.len() <= CHANGES_MOST);
        }

        let everything = Change {
            generation: count,
            everything: true,
            ..Change::default()
        };
        assert_eq!(next(&mut slow).await, Some(everything));
        subscribers.publish(&change(count + 1, 1));
        assert_eq!(next(&mut slow).await, Some(change(count + 1, 1)));
    }

    #[tokio::test]
    async fn many_ranges_in_few_changes_count_as_well() {
        let subscribers = Subscribers::new();
        let mut slow = subscribers.subscribe();

        for generation in 1..=5 {
            subscribers.publish(&change(generation, RANGES_MOST as u64 / 4));
        }

        let got = next(&mut slow).await.unwrap();
        assert_eq!((got.generation, got.everything), (5, true));
        // What was read makes room.
        for generation in 6..20 {
            subscribers.publish(&change(generation, RANGES_MOST as u64 / 2));
            assert!(!next(&mut slow).await.unwrap().everything);
        }
    }

    #[tokio::test]
    async fn readers_that_have_gone_are_forgotten() {
        let subscribers = Subscribers::new();
        for _ in 0..100 {
            drop(subscribers.subscribe());
        }
        let _reader = subscribers.subscribe();
        assert_eq!(subscribers.queues().as_ref().unwrap().len(), 1);
    }

    #[test]
    fn what_the_daemon_says_is_checked() {
        let wire = v1::Change {
            generation: 4,
            removed: vec![v1::IovaRange { start: 9, last: 8 }],
            ..v1::Change::default()
        };
        assert!(Change::read(&wire).is_err());
        let wire = v1::Change {
            added: vec![v1::AddedRange::default()],
            ..v1::Change::default()
        };
        assert!(Change::read(&wire).is_err());
    }
}
