//! What has changed of late, for those who watch a domain.
//!
//! A ring of the last changes, one for each generation without a gap. Nobody
//! has a queue of their own in here: who asks says how far they have come, and
//! who has come less far than the ring reaches back is lost and starts over.

use std::collections::VecDeque;
use std::fmt::Debug;
use std::sync::Arc;

use crate::addr::IovaRange;
use crate::iotlb::RegionId;
use crate::limits::{WATCH_CHANGE_ITEMS, WATCH_CHANGES, WATCH_ITEMS};
use crate::mapping::MappingView;

/// One change of what is visible.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Change {
    /// Number of the state after it.
    pub generation: u64,
    /// What is visible now and was not before. Of a mapping whose place was taken
    /// by another in one change the old one is in `removed` and the new one here.
    pub added: Vec<MappingView>,
    /// What is not visible any more, whole mappings.
    pub removed: Vec<IovaRange>,
    /// Regions of registered memory that nothing leads to any more.
    pub closed: Vec<RegionId>,
}

/// Changes were forgotten, or are still to come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("what has changed up to generation {generation} is not known any more")]
pub struct Lost {
    /// The present state.
    pub generation: u64,
}

/// Is told that something has changed: what is visible, who is attached, or what
/// waits to be free.
///
/// Called under the domain's lock, so it must neither block nor ask the domain.
/// Who reads the domain after it began to listen, and then waits to be told, has
/// missed nothing.
pub trait Listener: Debug + Send + Sync {
    /// Something has changed.
    fn changed(&self);
}

/// The last changes of a domain.
#[derive(Debug)]
pub(super) struct ChangeLog {
    /// The state before the oldest change; the present one if there is none.
    since: u64,
    /// Each one generation further than the one before.
    changes: VecDeque<Arc<Change>>,
    /// Of all changes together.
    items: usize,
}

impl Change {
    fn items(&self) -> usize {
        self.added.len() + self.removed.len() + self.closed.len()
    }
}

impl ChangeLog {
    /// Knows of nothing before `generation`.
    pub(super) fn starting_at(generation: u64) -> ChangeLog {
        ChangeLog {
            since: generation,
            changes: VecDeque::new(),
            items: 0,
        }
    }

    /// The present state.
    pub(super) fn generation(&self) -> u64 {
        let newest = self.changes.back();
        newest.map_or(self.since, |change| change.generation)
    }

    /// Is a change of so many mappings, ranges and regions worth to be put
    /// together? If not, it is [passed over](ChangeLog::pass_over).
    pub(super) fn fits(items: usize) -> bool {
        items <= WATCH_CHANGE_ITEMS
    }

    /// Remembers a change, and forgets the oldest for it. One that is too large
    /// is passed over.
    ///
    /// # Panics
    /// If it is not the next generation.
    pub(super) fn push(&mut self, change: Change) {
        self.expect_next(change.generation);
        let items = change.items();
        if !ChangeLog::fits(items) {
            return self.restart(change.generation);
        }
        self.items += items;
        self.changes.push_back(Arc::new(change));
        while self.changes.len() > WATCH_CHANGES || self.items > WATCH_ITEMS {
            let oldest = self.changes.pop_front().expect("one alone fits");
            self.items -= oldest.items();
            self.since = oldest.generation;
        }
    }

    /// A change that is too large to be remembered. Nobody can come past it, so
    /// what was before it is forgotten, too.
    ///
    /// # Panics
    /// If it is not the next generation.
    pub(super) fn pass_over(&mut self, generation: u64) {
        self.expect_next(generation);
        self.restart(generation);
    }

    /// At most `max` of the changes behind the state `after`, in order; none if
    /// that is the present one.
    ///
    /// # Errors
    /// [`Lost`] if the first of them is not known any more, or if there was no
    /// such state yet.
    pub(super) fn since(&self, after: u64, max: usize) -> Result<Vec<Arc<Change>>, Lost> {
        let generation = self.generation();
        if !(self.since..=generation).contains(&after) {
            return Err(Lost { generation });
        }
        let known = usize::try_from(after - self.since).expect("the ring is short");
        Ok(self.changes.iter().skip(known).take(max).cloned().collect())
    }

    fn expect_next(&self, generation: u64) {
        let present = self.generation();
        assert!(
            present.checked_add(1) == Some(generation),
            "generation {generation} follows {present}"
        );
    }

    fn restart(&mut self, generation: u64) {
        *self = ChangeLog::starting_at(generation);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::addr::Iova;

    /// A change that carries so many items.
    fn change(generation: u64, items: usize) -> Change {
        let page = IovaRange::from_len(Iova::new(0x1000), 0x1000).unwrap();
        Change {
            generation,
            added: Vec::new(),
            removed: vec![page; items],
            closed: Vec::new(),
        }
    }

    fn generations(log: &ChangeLog, after: u64, max: usize) -> Result<Vec<u64>, Lost> {
        let changes = log.since(after, max)?;
        Ok(changes.iter().map(|change| change.generation).collect())
    }

    #[test]
    fn what_was_pushed_comes_back_in_order_from_any_known_state_on() {
        let mut log = ChangeLog::starting_at(7);
        assert_eq!(generations(&log, 7, 9), Ok(vec![]));
        (8..=12).for_each(|generation| log.push(change(generation, 1)));
        assert_eq!(generations(&log, 7, 9), Ok(vec![8, 9, 10, 11, 12]));
        assert_eq!(generations(&log, 9, 2), Ok(vec![10, 11]));
        assert_eq!(generations(&log, 12, 9), Ok(vec![]));
        assert_eq!(log.since(8, 1).unwrap()[0].removed.len(), 1);
    }

    #[test]
    fn who_was_never_there_and_who_is_ahead_is_lost() {
        let mut log = ChangeLog::starting_at(7);
        log.push(change(8, 0));
        for after in [0, 6, 9, u64::MAX] {
            assert_eq!(generations(&log, after, 1), Err(Lost { generation: 8 }));
        }
    }

    #[test]
    fn the_ring_is_bounded_in_changes() {
        let most = WATCH_CHANGES as u64;
        let mut log = ChangeLog::starting_at(0);
        (1..=most + 3).for_each(|generation| log.push(change(generation, 0)));
        assert_eq!(log.changes.len(), WATCH_CHANGES);
        let lost = Lost {
            generation: most + 3,
        };
        assert_eq!(generations(&log, 2, 1), Err(lost));
        assert_eq!(generations(&log, 3, 1), Ok(vec![4]));
    }

    #[test]
    fn the_ring_is_bounded_in_what_the_changes_carry() {
        let mut log = ChangeLog::starting_at(0);
        let fit = (WATCH_ITEMS / WATCH_CHANGE_ITEMS) as u64;
        (1..=fit + 2).for_each(|generation| log.push(change(generation, WATCH_CHANGE_ITEMS)));
        assert_eq!(log.items, WATCH_ITEMS);
        assert!(generations(&log, 1, 1).is_err());
        assert_eq!(generations(&log, 2, 1), Ok(vec![3]));
        // A small one takes the place of a large one.
        log.push(change(fit + 3, 1));
        assert_eq!(log.items, WATCH_ITEMS - WATCH_CHANGE_ITEMS + 1);
    }

    #[test]
    fn nobody_comes_past_a_change_that_is_too_large() {
        let too_large = [
            |log: &mut ChangeLog| log.push(change(2, WATCH_CHANGE_ITEMS + 1)),
            |log: &mut ChangeLog| log.pass_over(2),
        ];
        for push in too_large {
            let mut log = ChangeLog::starting_at(0);
            log.push(change(1, 1));
            push(&mut log);
            log.push(change(3, WATCH_CHANGE_ITEMS));
            for after in [0, 1] {
                assert_eq!(generations(&log, after, 9), Err(Lost { generation: 3 }));
            }
            assert_eq!(generations(&log, 2, 9), Ok(vec![3]));
            assert_eq!(log.items, WATCH_CHANGE_ITEMS);
        }
    }

    #[test]
    #[should_panic(expected = "generation 10 follows 8")]
    fn a_gap_is_a_bug() {
        let mut log = ChangeLog::starting_at(7);
        log.push(change(8, 0));
        log.push(change(10, 0));
    }

    #[test]
    #[should_panic(expected = "generation 8 follows 8")]
    fn a_generation_twice_is_a_bug() {
        let mut log = ChangeLog::starting_at(7);
        log.pass_over(8);
        log.push(change(8, 0));
    }
}
