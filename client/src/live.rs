//! What keeps a session true to its domain: the table, what of it is in use
//! here, and what has to be given back.

use std::collections::VecDeque;
use std::io;
use std::mem;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use domain_core::iotlb::{RegionId, SessionPage, Target, Walker};
use domain_core::region::{Access, MapError, SharedSlice, SharedWords, Window};
use domaind_proto::v1;
use tokio::sync::Notify;

use crate::apertures::Apertures;
use crate::changes::{Change, Subscribers};
use crate::error::ProtocolError;
use crate::handshake::Facts;
use crate::opened::Opened;
use crate::pins::Pins;

/// All that a session can reach, shared by its handles and its connection.
#[derive(Debug)]
pub(crate) struct Live {
    pub(crate) table: Walker<SharedWords>,
    pub(crate) pins: Pins,
    pub(crate) apertures: Apertures,
    pub(crate) opened: Opened,
    pub(crate) changes: Subscribers,
    access: Access,
    /// Held for single operations, never across an await.
    due: Mutex<Due>,
    /// There is something to do for [`Live::settle`].
    pub(crate) is_due: Notify,
}

/// Generations that are to be acknowledged one by one; of more, the last stands
/// for those behind it.
const ASKED_MOST: usize = 1024;

/// What the daemon waits for. Both lists are in order.
#[derive(Debug)]
struct Due {
    /// Of the last change.
    newest: u64,
    /// Of the changes that are to be acknowledged and are not.
    asked: VecDeque<u64>,
    /// Memory that was closed, and that older pins may still use.
    retired: VecDeque<Retired>,
}

#[derive(Debug)]
struct Retired {
    /// Of the change that closed it.
    generation: u64,
    window: Arc<Window>,
}

impl Live {
    pub(crate) fn new(
        facts: &Facts,
        apertures: Apertures,
        table: Walker<SharedWords>,
        page: SessionPage<SharedWords>,
    ) -> Live {
        Live {
            table,
            pins: Pins::new(page),
            apertures,
            opened: Opened::new(),
            changes: Subscribers::new(),
            access: facts.access,
            due: Mutex::new(Due {
                newest: facts.generation,
                asked: VecDeque::new(),
                retired: VecDeque::new(),
            }),
            is_due: Notify::new(),
        }
    }

    /// The memory behind a target, from there to its end. Takes no lock.
    #[inline]
    pub(crate) fn memory(&self, target: Target) -> Option<SharedSlice<'_>> {
        match target.region.slot() {
            Some(_) => self.opened.get(target.region)?.rest(target.offset_bytes),
            None => self.apertures.rest(target),
        }
    }

    /// Can the memory behind a region be reached?
    pub(crate) fn is_open(&self, region: RegionId) -> bool {
        region.slot().is_none() || self.opened.get(region).is_some()
    }

    /// Maps what came for a region, unless it is mapped.
    pub(crate) fn open(
        &self,
        region: RegionId,
        opened: &v1::MemoryOpened,
        fd: OwnedFd,
    ) -> Result<(), MapError> {
        self.opened.put(region, opened, fd, self.access)
    }

    /// Takes a change note of. Closed memory is not found any more from now
    /// on; all that takes time is left to [`Live::settle`].
    pub(crate) fn change(&self, wire: &v1::Change) -> Result<(), ProtocolError> {
        let change = Change::read(wire)?;
        let closed = wire.closed.iter().map(|number| memory_region(*number));
        let closed: Vec<_> = closed.collect::<Result<_, _>>()?;
        self.due().enter(change.generation)?;
        let closed = match change.everything {
            true => self.opened.retire_all(),
            false => closed
                .into_iter()
                .filter_map(|region| self.opened.retire(region))
                .collect(),
        };
        self.due().owe(change.generation, wire.ack, closed);
        self.is_due.notify_one();
        self.changes.publish(&change);
        Ok(())
    }

    /// Waits until something can be settled: no pin is older than the answer,
    /// and changes up to there are noted. `None` if nothing is due. Cancel safe.
    pub(crate) async fn ripe(&self) -> Option<u64> {
        let (first, last) = self.due().span()?;
        self.pins.wait_until_newer(first).await;
        // Not more than was noted before the look at the pins: a pin that is
        // newer than the look may use what was closed after it.
        let oldest = self.pins.oldest();
        Some(oldest.map_or(last, |view| view.clamp(first, last)))
    }

    /// Gives back what was closed up to a generation that is ripe. Answers what
    /// is to be acknowledged, if anything is.
    ///
    /// That is never more than was asked for, even if all pins are newer: what
    /// newer changes close may not even be known yet.
    pub(crate) fn settle(&self, generation: u64) -> io::Result<Option<u64>> {
        let (retired, asked) = self.due().take_up_to(generation);
        for retired in retired {
            retired.window.revoke()?;
        }
        Ok(asked)
    }

    /// Nothing is pinned any more, and nothing told. What is pinned stays.
    pub(crate) fn close(&self) {
        self.pins.close();
        self.changes.end();
    }

    /// Waits for the last pin, after which nothing here is in use.
    pub(crate) async fn at_rest(&self) {
        self.pins.wait_until_newer(u64::MAX).await;
    }

    fn due(&self) -> MutexGuard<'_, Due> {
        // Its parts are true by themselves.
        self.due.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Due {
    /// Changes come in order. Several may have one generation: a frame is short.
    fn enter(&mut self, generation: u64) -> Result<(), ProtocolError> {
        let newest = self.newest;
        if generation < newest {
            return Err(ProtocolError::Generation { generation, newest });
        }
        self.newest = generation;
        Ok(())
    }

    fn owe(&mut self, generation: u64, ack: bool, closed: Vec<Arc<Window>>) {
        if ack {
            if self.asked.len() == ASKED_MOST || self.asked.back() == Some(&generation) {
                self.asked.pop_back();
            }
            self.asked.push_back(generation);
        }
        let retired = closed
            .into_iter()
            .map(|window| Retired { generation, window });
        self.retired.extend(retired);
    }

    /// The first and the last generation of which something is due.
    fn span(&self) -> Option<(u64, u64)> {
        let retired = |one: Option<&Retired>| one.map(|retired| retired.generation);
        let edge = |one: Option<&u64>, other: Option<u64>| one.copied().into_iter().chain(other);
        let first = edge(self.asked.front(), retired(self.retired.front())).min()?;
        let last = edge(self.asked.back(), retired(self.retired.back())).max()?;
        Some((first, last))
    }

    fn take_up_to(&mut self, generation: u64) -> (VecDeque<Retired>, Option<u64>) {
        let ripe = self
            .retired
            .partition_point(|retired| retired.generation <= generation);
        let rest = self.retired.split_off(ripe);
        let ripe = mem::replace(&mut self.retired, rest);
        let count = self.asked.partition_point(|asked| *asked <= generation);
        (ripe, self.asked.drain(..count).last())
    }
}

fn memory_region(number: u32) -> Result<RegionId, ProtocolError> {
    RegionId::from_number(number)
        .filter(|region| region.slot().is_some())
        .ok_or(ProtocolError::NoMemory { region: number })
}
