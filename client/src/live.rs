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
    pub(crate) pins: Arc<Pins>,
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
        let barrier = self.pins.wait_until_newer(first).await;
        // Not more than was noted before the look at the pins: a pin that is
        // newer than the look may use what was closed after it.
        let oldest = self.pins.oldest(&barrier);
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
        (ripe, self.asked.drain(..count).next_back())
    }
}

fn memory_region(number: u32) -> Result<RegionId, ProtocolError> {
    RegionId::from_number(number)
        .filter(|region| region.slot().is_some())
        .ok_or(ProtocolError::NoMemory { region: number })
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::fd::OwnedFd;
    use std::sync::mpsc;
    use std::thread;
    use std::time::Duration;

    use domain_core::addr::{Iova, IovaRange};
    use domain_core::perm::Perm;
    use domain_core::region::driver_memfd;
    use domain_core::session::Role;
    use domaind_proto::v1::client_frame::Body as Ask;
    use tokio::time::timeout;

    use super::*;
    use crate::client::AttachOptions;
    use crate::error::{EndReason, Error};
    use crate::fake::{A_MOMENT, ACK_TIMEOUT_MS, FakeDaemon, PAGE, SOON, in_memory, memfd};
    use crate::pin::{Pin, PinError};
    use crate::session::Session;

    /// Where no aperture is.
    const DIRECT: u64 = 0x4000_0000;

    fn direct(page: u64) -> IovaRange {
        IovaRange::from_len(Iova::new(DIRECT + page * PAGE), PAGE).unwrap()
    }

    /// So many pages of memories of their own from `DIRECT` on, none open.
    async fn with_pages(pages: u32) -> FakeDaemon {
        let mut fake = FakeDaemon::start().await;
        for page in 0..pages {
            let iova = DIRECT + u64::from(page) * PAGE;
            let target = in_memory(page, 0);
            fake.memory.map(iova, 1, target, Perm::ReadWrite);
        }
        fake
    }

    async fn open(fake: &FakeDaemon, page: u64, memory: &OwnedFd) {
        let opening = fake.session.open(direct(page), Perm::Read);
        let (opened, _) = tokio::join!(opening, fake.peer.open(memory, 1));
        opened.unwrap();
    }

    /// The change that removes a page, to be acknowledged.
    fn unmap(fake: &mut FakeDaemon, page: u64) -> v1::Change {
        let change = fake.memory.unmap(DIRECT + page * PAGE);
        v1::Change {
            ack: true,
            ..change
        }
    }

    /// A page is removed whose memory nothing leads to any more.
    fn close(fake: &mut FakeDaemon, page: u32) -> v1::Change {
        v1::Change {
            closed: vec![page + 2],
            ..unmap(fake, page.into())
        }
    }

    fn address(pin: &Pin<'_>, page: u64) -> Option<*const u8> {
        let found = pin.address(direct(page).start(), Perm::Read);
        found.map(|memory| memory.as_ptr())
    }

    /// How the mapping that holds an address may be accessed.
    fn protection(address: *const u8) -> Option<String> {
        let maps = fs::read_to_string("/proc/self/maps").unwrap();
        let holds = |line: &&str| {
            let (start, end) = line.split_once(' ').unwrap().0.split_once('-').unwrap();
            let number = |text| usize::from_str_radix(text, 16).unwrap();
            (number(start)..number(end)).contains(&address.addr())
        };
        let line = maps.lines().find(holds)?;
        line.split(' ').nth(1).map(str::to_owned)
    }

    /// Waits until the receiver has done what it was told before.
    async fn heard(session: &Session, fake: &FakeDaemon) {
        let ask = Ask::UnregisterMemory(v1::UnregisterMemory { memory_id: 1 });
        let answer = async {
            let asked = fake.peer.hear().await.unwrap();
            let body = v1::server_frame::Body::MemoryUnregistered(v1::MemoryUnregistered {});
            fake.peer.say(asked.request_id, body, None).await;
        };
        let (answered, ()) = tokio::join!(session.inner.connection.request(ask, None), answer);
        answered.unwrap();
    }

    #[tokio::test]
    async fn a_removal_is_acknowledged_when_the_older_pins_are_gone_and_not_before() {
        let mut fake = with_pages(2).await;
        let session = fake.session.clone();
        let old = session.pin().unwrap();
        let change = unmap(&mut fake, 0);
        let generation = change.generation;

        fake.peer.say_change(change).await;
        fake.peer.hear_nothing().await;
        // Frames are still received, and answered.
        heard(&session, &fake).await;
        fake.peer.hear_nothing().await;

        drop(old);
        let _newer = session.pin().unwrap();
        assert_eq!(fake.peer.hear_ack().await, generation);
        fake.peer.hear_nothing().await;
    }

    #[tokio::test]
    async fn what_is_not_asked_for_is_not_acknowledged() {
        let mut fake = with_pages(1).await;
        let change = v1::Change {
            ack: false,
            ..unmap(&mut fake, 0)
        };
        fake.peer.say_change(change).await;
        fake.peer.hear_nothing().await;
    }

    #[tokio::test]
    async fn several_changes_are_answered_by_one_ack_of_the_last() {
        let mut fake = with_pages(3).await;
        let session = fake.session.clone();
        let old = session.pin().unwrap();
        for page in 0..3 {
            let change = unmap(&mut fake, page);
            fake.peer.say_change(change).await;
        }
        heard(&session, &fake).await;
        drop(old);

        assert_eq!(fake.peer.hear_ack().await, fake.memory.table.generation());
        fake.peer.hear_nothing().await;
    }

    #[tokio::test]
    async fn an_ack_names_the_view_that_is_held_and_not_the_newest() {
        let mut fake = with_pages(3).await;
        let session = fake.session.clone();
        let first = unmap(&mut fake, 0);
        let held = session.pin().unwrap();
        assert_eq!(held.view(), first.generation);
        let second = unmap(&mut fake, 1);
        let (first_generation, last) = (first.generation, second.generation);

        fake.peer.say_change(first).await;
        fake.peer.say_change(second).await;

        assert_eq!(fake.peer.hear_ack().await, first_generation);
        fake.peer.hear_nothing().await;
        drop(held);
        assert_eq!(fake.peer.hear_ack().await, last);
    }

    #[tokio::test]
    async fn closed_memory_faults_and_its_addresses_are_never_used_again() {
        let mut fake = with_pages(1).await;
        let session = fake.session.clone();
        let memory = memfd(1);
        open(&fake, 0, &memory).await;
        let change = close(&mut fake, 0);
        let pin = session.pin().unwrap();
        fake.memory.map(DIRECT, 1, in_memory(0, 0), Perm::Read);
        let place = address(&pin, 0).unwrap();
        assert_eq!(protection(place).unwrap(), "rw-s");

        fake.peer.say_change(change).await;
        fake.peer.hear_ack().await;

        assert_eq!(protection(place).unwrap(), "---p");
        drop(pin);
        let again = session.pin().unwrap();
        assert_eq!(address(&again, 0), None);
        drop(again);
        open(&fake, 0, &memory).await;
        let again = session.pin().unwrap();
        assert_ne!(address(&again, 0), Some(place));
        assert_eq!(protection(place).unwrap(), "---p");
    }

    #[tokio::test]
    async fn memory_that_was_closed_serves_the_older_pins_and_nobody_else() {
        let mut fake = with_pages(1).await;
        let session = fake.session.clone();
        let memory = memfd(1);
        rustix::io::pwrite(&memory, b"abc", 0).unwrap();
        open(&fake, 0, &memory).await;
        let old = session.pin().unwrap();
        let slice = old.address(direct(0).start(), Perm::Read).unwrap();
        let change = close(&mut fake, 0);
        // The daemon is slow to take it from the table.
        fake.memory.map(DIRECT, 1, in_memory(0, 0), Perm::Read);

        fake.peer.say_change(change).await;
        heard(&session, &fake).await;

        let mut bytes = [0; 3];
        slice.copy_out(0, &mut bytes).unwrap();
        assert_eq!(&bytes, b"abc");
        let newer = old.translate(direct(0), Perm::Read).unwrap_err();
        assert!(matches!(newer, PinError::NotOpen { region: 2, .. }));
        let place = slice.as_ptr();
        drop(old);
        fake.peer.hear_ack().await;
        assert_eq!(protection(place).unwrap(), "---p");
    }

    #[tokio::test]
    async fn what_is_closed_is_given_back_also_if_nobody_waits_for_it() {
        let mut fake = with_pages(1).await;
        open(&fake, 0, &memfd(1)).await;
        let place = address(&fake.session.pin().unwrap(), 0).unwrap();
        let change = v1::Change {
            ack: false,
            ..close(&mut fake, 0)
        };

        fake.peer.say_change(change).await;
        fake.peer.hear_nothing().await;

        assert_eq!(protection(place).unwrap(), "---p");
    }

    #[tokio::test]
    async fn everything_closes_all_that_is_open() {
        let fake = with_pages(2).await;
        open(&fake, 0, &memfd(1)).await;
        open(&fake, 1, &memfd(1)).await;
        let places = [0, 1].map(|page| address(&fake.session.pin().unwrap(), page).unwrap());

        let change = v1::Change {
            generation: fake.memory.table.generation(),
            ack: true,
            everything: true,
            ..v1::Change::default()
        };
        fake.peer.say_change(change).await;
        fake.peer.hear_ack().await;

        assert_eq!(places.map(|place| protection(place).unwrap()), ["---p"; 2]);
        // What the table still has is fetched anew.
        open(&fake, 1, &memfd(1)).await;
        assert!(address(&fake.session.pin().unwrap(), 1).is_some());
    }

    #[tokio::test]
    async fn what_is_closed_right_behind_its_opening_is_not_open() {
        let mut fake = with_pages(1).await;
        let memory = memfd(1);
        let session = fake.session.clone();
        let opening = session.open(direct(0), Perm::Read);
        let daemon = async {
            let asked = fake.peer.hear().await.unwrap();
            let opened = crate::fake::opened(1);
            let change = close(&mut fake, 0);
            fake.peer.say(asked.request_id, opened, Some(&memory)).await;
            fake.peer.say_change(change).await;
            fake.peer.hear_ack().await;
        };

        let (opening, ()) = tokio::join!(opening, daemon);

        let error = opening.unwrap_err();
        assert!(
            matches!(error, Error::Pin(PinError::Translate(_))),
            "{error:?}"
        );
        assert_eq!(address(&fake.session.pin().unwrap(), 0), None);
    }

    #[tokio::test]
    async fn memory_that_comes_after_the_change_that_closed_it_is_not_used() {
        let mut fake = with_pages(1).await;
        let session = fake.session.clone();
        let (old, new) = (memfd(1), memfd(1));
        rustix::io::pwrite(&old, b"old", 0).unwrap();
        rustix::io::pwrite(&new, b"new", 0).unwrap();
        let opening = session.open(direct(0), Perm::Read);
        let daemon = async {
            let asked = fake.peer.hear().await.unwrap();
            let change = close(&mut fake, 0);
            fake.peer.say_change(change).await;
            fake.peer.hear_ack().await;
            // The number is used again.
            fake.memory.map(DIRECT, 1, in_memory(0, 0), Perm::Read);
            let opened = crate::fake::opened(1);
            fake.peer.say(asked.request_id, opened, Some(&old)).await;
            fake.peer.open(&new, 1).await;
        };

        let (opened, ()) = timeout(SOON, async { tokio::join!(opening, daemon) })
            .await
            .unwrap();

        opened.unwrap();
        let mut bytes = [0; 3];
        let pin = session.pin().unwrap();
        pin.read(direct(0).start(), &mut bytes).unwrap();
        assert_eq!(&bytes, b"new");
    }

    #[tokio::test]
    async fn a_change_that_goes_back_or_closes_an_aperture_breaks_the_protocol() {
        let broken = [
            v1::Change {
                generation: 0,
                ..v1::Change::default()
            },
            v1::Change {
                generation: 9,
                closed: vec![1],
                ..v1::Change::default()
            },
            v1::Change {
                generation: 9,
                closed: vec![1 << 20],
                ..v1::Change::default()
            },
        ];
        for change in broken {
            let fake = FakeDaemon::start().await;
            let good = v1::Change {
                generation: 8,
                ..v1::Change::default()
            };
            // Twice the same is a change in two frames.
            fake.peer.say_change(good.clone()).await;
            fake.peer.say_change(good).await;
            heard(&fake.session, &fake).await;

            fake.peer.say_change(change).await;

            let ended = timeout(SOON, fake.session.ended()).await.unwrap();
            assert_eq!(ended.reason, EndReason::DaemonProtocol);
            assert!(fake.session.pin().is_err());
        }
    }

    #[tokio::test]
    async fn changes_are_told_in_order_and_end_with_the_session() {
        let options = AttachOptions {
            removals: true,
            additions: true,
            ..AttachOptions::new(Role::Device, Access::ReadWrite)
        };
        let fake = FakeDaemon::start_with(options).await;
        let mut changes = fake.session.changes();
        for generation in 1..=3 {
            let added = v1::AddedRange {
                range: Some(direct(generation).into()),
                perm: v1::Perm::Read.into(),
            };
            let change = v1::Change {
                generation,
                removed: vec![direct(0).into()],
                added: vec![added],
                ..v1::Change::default()
            };
            fake.peer.say_change(change).await;
        }
        fake.peer.say_ended(v1::EndReason::Evicted).await;

        for generation in 1..=3 {
            let change = timeout(SOON, changes.recv()).await.unwrap().unwrap();
            assert_eq!(change.generation, generation);
            assert_eq!(change.removed, [direct(0)]);
            assert_eq!(change.added[0].range, direct(generation));
            assert_eq!(change.added[0].perm, Perm::Read);
            assert!(!change.everything);
        }
        assert_eq!(timeout(SOON, changes.recv()).await.unwrap(), None);
    }

    #[tokio::test]
    async fn acks_find_their_way_between_copies_that_never_stop() {
        let mut fake = with_pages(1).await;
        let writer = fake.session.clone();
        let (stop, stopped) = mpsc::channel::<()>();
        let (started, is_started) = tokio::sync::oneshot::channel();
        let copies = thread::spawn(move || {
            let bytes = vec![1; 4 * 4096];
            let bounce = Iova::new(crate::fake::BOUNCE);
            writer.write(bounce, &bytes).unwrap();
            started.send(()).unwrap();
            while stopped.try_recv() == Err(mpsc::TryRecvError::Empty) {
                writer.write(bounce, &bytes).unwrap();
            }
        });
        is_started.await.unwrap();
        // Pins come and go all the time, and every ack finds its gap.
        for _ in 0..100 {
            let change = unmap(&mut fake, 0);
            let generation = change.generation;
            fake.peer.say_change(change).await;
            assert_eq!(fake.peer.hear_ack().await, generation);
            fake.memory.map(DIRECT, 1, in_memory(0, 0), Perm::Read);
        }
        drop(stop);
        copies.join().unwrap();
    }

    #[tokio::test]
    async fn a_fenced_session_detaches_when_its_last_pin_is_gone_and_acks_until_then() {
        let mut fake = with_pages(1).await;
        let session = fake.session.clone();
        let pin = session.pin().unwrap();
        let change = unmap(&mut fake, 0);
        fake.peer.say_change(change).await;
        fake.memory.page.fence(fake.memory.table.generation());
        fake.peer.say_ended(v1::EndReason::Fenced).await;

        let ended = timeout(SOON, session.ended()).await.unwrap();

        assert_eq!(ended.reason, EndReason::Fenced);
        assert!(session.pin().is_err());
        fake.peer.hear_nothing().await;
        drop(pin);
        let mut said = Vec::new();
        while let Some(frame) = fake.peer.hear().await {
            said.push(frame.body.unwrap());
        }
        assert_eq!(said.last(), Some(&Ask::Detach(v1::Detach {})));
        let acks = &said[..said.len() - 1];
        assert!(
            acks.iter().all(|ask| matches!(ask, Ask::Ack(_))),
            "{said:?}"
        );
    }

    #[tokio::test]
    async fn a_detaching_session_waits_for_the_pins_of_others() {
        let fake = with_pages(1).await;
        let (session, other) = (fake.session.clone(), fake.session.clone());
        let (go, wait) = mpsc::channel::<()>();
        let (pinned, is_pinned) = tokio::sync::oneshot::channel();
        let holder = thread::spawn(move || {
            let _pin = other.pin().unwrap();
            pinned.send(()).unwrap();
            let _ = wait.recv();
        });
        is_pinned.await.unwrap();
        let detaching = session.detach();
        let daemon = async {
            fake.peer.hear_nothing().await;
            assert!(fake.session.pin().is_err(), "nobody comes in any more");
            drop(go);
            let last = fake.peer.hear().await.unwrap();
            assert_eq!(last.body, Some(Ask::Detach(v1::Detach {})));
            fake.peer.fall_silent();
        };

        let (detached, ()) = tokio::join!(detaching, daemon);

        detached.unwrap();
        holder.join().unwrap();
    }

    #[tokio::test]
    async fn a_pin_that_never_goes_is_named_and_the_session_ends_when_it_does() {
        let fake = with_pages(1).await;
        let session = fake.session.clone();
        let pin = session.pin().unwrap();

        let detached = timeout(SOON, fake.session.clone().detach()).await.unwrap();

        let after = Duration::from_millis(ACK_TIMEOUT_MS);
        let error = detached.unwrap_err();
        assert!(
            matches!(error, Error::Pinned { after: a } if a == after),
            "{error:?}"
        );
        drop(pin);
        let last = fake.peer.hear().await.unwrap();
        assert_eq!(last.body, Some(Ask::Detach(v1::Detach {})));
    }

    #[tokio::test]
    async fn the_last_handle_takes_all_memory_with_it() {
        let mut fake = with_pages(1).await;
        let name = format!("last-handle-{}", std::process::id());
        let is_mapped = || {
            let maps = fs::read_to_string("/proc/self/maps").unwrap();
            maps.contains(&name)
        };
        open(&fake, 0, &driver_memfd(&name, PAGE).unwrap()).await;
        assert!(is_mapped());

        // The only handle of the session goes.
        let other = FakeDaemon::start().await;
        fake.session = other.session.clone();

        fake.peer.hear_the_end().await;
        let gone = async {
            while is_mapped() {
                tokio::time::sleep(A_MOMENT / 10).await;
            }
        };
        timeout(SOON, gone).await.unwrap();
    }

    #[test]
    fn what_is_asked_without_end_takes_no_memory_without_end() {
        let mut due = Due {
            newest: 0,
            asked: VecDeque::new(),
            retired: VecDeque::new(),
        };
        for generation in 1..=3000 {
            due.enter(generation).unwrap();
            due.owe(generation, true, Vec::new());
        }
        assert_eq!(due.asked.len(), ASKED_MOST);
        assert_eq!(due.span(), Some((1, 3000)));
        assert_eq!(due.take_up_to(10).1, Some(10));
        assert_eq!(due.take_up_to(2999).1, Some(ASKED_MOST as u64 - 1));
        assert_eq!(due.take_up_to(3000).1, Some(3000));
        assert_eq!(due.span(), None);
    }
}
