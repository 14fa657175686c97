//! The rings through which driver and devices talk: one coherent allocation.
//!
//! ```text
//! granule 0       the doorbell that devices ring for the driver, and the
//!                 sign by which devices find a board nobody told them of
//! granule 1 + k   device k: its session, the stop word, two tails, its pulse,
//!                 and the entries of both rings
//! ```
//!
//! Each ring has one producer and one consumer. There are no heads: the driver
//! never has more blocks in one device's hands than a ring has entries, so
//! neither ring can run over. Whatever is read here was written by another
//! process and is checked before it is used.

use std::sync::atomic::Ordering;
use std::time::Duration;

use anyhow::{Context, ensure};
use domain_core::Iova;
use domain_core::session::SessionId;
use domaind_client::Session;

use super::Way;

/// Blocks that one device may have at a time.
pub(crate) const ENTRIES: u32 = 16;
const RING_BYTES: u64 = 4096;
const ENTRY_WORDS: usize = 5;
/// A power of two, so that no entry lies in two cache lines.
const ENTRY_BYTES: u64 = 64;

// Places in the first granule.
const SIGN: u64 = 64;
const DRIVER: u64 = 72;
const SEATS: u64 = 80;
const WAY: u64 = 88;
/// The sign itself: "domaind", and the version of what lies behind it.
const BOARD_IS_HERE: u64 = u64::from_le_bytes(*b"domaind\x01");
/// No driver lays out more.
pub(crate) const SEATS_MOST: u64 = 64;

/// In a seat that is free. The daemon counts sessions from 1.
const NOBODY: u64 = 0;

// Places in a device's granule; what different processes write lies in
// different cache lines.
const WHO: u64 = 0;
const STOP: u64 = 64;
const POSTED_TAIL: u64 = 128;
const DONE_TAIL: u64 = 192;
const PULSE: u64 = 256;
const POSTED: u64 = 512;
const DONE: u64 = POSTED + ENTRIES as u64 * ENTRY_BYTES;

/// The whole board.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Board<'s> {
    session: &'s Session,
    base: Iova,
}

/// One device's part of it. Each side counts for itself how far it is.
#[derive(Debug)]
pub(crate) struct Ring<'s> {
    board: Board<'s>,
    base: Iova,
    /// Posted by the driver, or taken by the device.
    posted: u32,
    /// Done by the device, or collected by the driver.
    done: u32,
}

/// A block that a device shall work on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Job {
    pub(crate) iova: u64,
    pub(crate) len_bytes: u64,
    /// Its number in the file.
    pub(crate) block: u64,
    /// The driver's name for it while it is under way.
    pub(crate) slot: u64,
    /// CRC-32C of the block as the driver has it.
    pub(crate) checksum: u64,
}

/// A block that a device has worked on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Done {
    pub(crate) block: u64,
    pub(crate) slot: u64,
    /// CRC-32C of the block as the device left it.
    pub(crate) checksum: u64,
}

/// What the sign of a board says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Sign {
    /// Whose board it is.
    pub(crate) driver: SessionId,
    pub(crate) seats: u64,
    pub(crate) way: Way,
}

/// Memory that a board for so many devices needs.
pub(crate) fn board_bytes(devices: u64) -> u64 {
    RING_BYTES * (1 + devices)
}

impl<'s> Board<'s> {
    pub(crate) fn at(session: &'s Session, base: Iova) -> Board<'s> {
        Board { session, base }
    }

    pub(crate) fn base(self) -> Iova {
        self.base
    }

    pub(crate) fn ring(self, device: u64) -> anyhow::Result<Ring<'s>> {
        let base = self.base.checked_add(RING_BYTES * (1 + device));
        let base = base.context("the board leaves the address space")?;
        Ok(Ring {
            board: self,
            base,
            posted: 0,
            done: 0,
        })
    }

    /// The first so many rings.
    pub(crate) fn rings(self, devices: u64) -> anyhow::Result<Vec<Ring<'s>>> {
        (0..devices).map(|device| self.ring(device)).collect()
    }

    /// Puts up the sign: devices that were not told of the board may come.
    pub(crate) fn put_up(self, sign: Sign) -> anyhow::Result<()> {
        for (place, word) in [
            (DRIVER, sign.driver.get()),
            (SEATS, sign.seats),
            (WAY, sign.way.code()),
        ] {
            self.session
                .word64_mut(self.place(place))?
                .store(word, Ordering::Relaxed);
        }
        // Whoever sees this one sees the others.
        self.session
            .word64_mut(self.place(SIGN))?
            .store(BOARD_IS_HERE, Ordering::Release);
        Ok(())
    }

    /// Takes down the sign: nobody comes any more.
    pub(crate) fn take_down(self) -> anyhow::Result<()> {
        let sign = self.session.word64_mut(self.place(SIGN))?;
        sign.store(0, Ordering::Release);
        Ok(())
    }

    /// The sign, if there is one that makes sense.
    pub(crate) fn sign(self) -> anyhow::Result<Option<Sign>> {
        let word = |place| self.session.word64(self.place(place));
        if word(SIGN)?.load(Ordering::Acquire) != BOARD_IS_HERE {
            return Ok(None);
        }
        let seats = word(SEATS)?.load(Ordering::Relaxed);
        let way = Way::of_code(word(WAY)?.load(Ordering::Relaxed));
        let driver = SessionId::new(word(DRIVER)?.load(Ordering::Relaxed));
        let sign = way.map(|way| Sign { driver, seats, way });
        Ok(sign.filter(|sign| (1..=SEATS_MOST).contains(&sign.seats)))
    }

    fn place(self, place: u64) -> Iova {
        self.base
            .checked_add(place)
            .expect("a granule does not leave the address space")
    }

    /// How often it has rung so far; for [`wait`](Board::wait).
    pub(crate) fn rung(self) -> anyhow::Result<u32> {
        Ok(self.session.word32(self.base)?.load(Ordering::Acquire))
    }

    /// Waits until it rings again after it had rung `rung` times, or the time
    /// is over.
    pub(crate) fn wait(self, rung: u32, limit: Duration) -> anyhow::Result<()> {
        self.session.word32(self.base)?.wait(rung, Some(limit))?;
        Ok(())
    }

    /// Wakes the driver.
    pub(crate) fn ring_bell(self) -> anyhow::Result<()> {
        let bell = self.session.word32_mut(self.base)?;
        bell.fetch_add(1, Ordering::Release);
        bell.wake(1)?;
        Ok(())
    }
}

/// The driver's side.
impl Ring<'_> {
    /// The session of the device, from its hello to its bye.
    pub(crate) fn who(&self) -> anyhow::Result<Option<SessionId>> {
        let session = self.board.session.word64(self.at(WHO))?;
        let number = session.load(Ordering::Acquire);
        Ok((number != NOBODY).then_some(SessionId::new(number)))
    }

    /// How often the device has shown so far that it lives.
    pub(crate) fn pulse(&self) -> anyhow::Result<u32> {
        self.word(PULSE)
    }

    /// How many blocks the device has.
    pub(crate) fn under_way(&self) -> u32 {
        self.posted.wrapping_sub(self.done)
    }

    pub(crate) fn post(&mut self, job: Job) -> anyhow::Result<()> {
        assert!(
            self.under_way() < ENTRIES,
            "the driver counts what it posts"
        );
        self.write_entry(
            POSTED,
            self.posted,
            [job.iova, job.len_bytes, job.block, job.slot, job.checksum],
        )?;
        self.posted = self.posted.wrapping_add(1);
        self.publish(POSTED_TAIL, self.posted)
    }

    /// The next block that the device has done.
    pub(crate) fn collect(&mut self) -> anyhow::Result<Option<Done>> {
        let tail = self.word(DONE_TAIL)?;
        if tail == self.done {
            return Ok(None);
        }
        let ahead = tail.wrapping_sub(self.done);
        ensure!(
            ahead <= self.under_way(),
            "a device claims {ahead} blocks done, it had {}",
            self.under_way()
        );
        let [block, slot, checksum, ..] = self.read_entry(DONE, self.done)?;
        self.done = self.done.wrapping_add(1);
        Ok(Some(Done {
            block,
            slot,
            checksum,
        }))
    }

    pub(crate) fn stop(&self) -> anyhow::Result<()> {
        self.board
            .session
            .word32_mut(self.at(STOP))?
            .store(1, Ordering::Release);
        // It waits for the tail.
        self.board
            .session
            .word32_mut(self.at(POSTED_TAIL))?
            .wake(1)?;
        Ok(())
    }
}

/// The device's side.
impl Ring<'_> {
    /// Takes the seat, unless somebody else has it.
    pub(crate) fn hello(&self) -> anyhow::Result<bool> {
        let session = self.board.session;
        let who = session.word64_mut(self.at(WHO))?;
        let own = session.id().get();
        let taken = who.compare_exchange(NOBODY, own, Ordering::AcqRel, Ordering::Relaxed);
        self.board.ring_bell()?;
        Ok(taken.is_ok())
    }

    /// Shows that the device lives.
    pub(crate) fn beat(&self) -> anyhow::Result<()> {
        let pulse = self.board.session.word32_mut(self.at(PULSE))?;
        pulse.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    /// The last word: the rings may be freed from here on.
    pub(crate) fn bye(&self) -> anyhow::Result<()> {
        let who = self.board.session.word64_mut(self.at(WHO))?;
        who.store(NOBODY, Ordering::Release);
        self.board.ring_bell()
    }

    pub(crate) fn is_stopped(&self) -> anyhow::Result<bool> {
        Ok(self.word(STOP)? != 0)
    }

    /// The next block to work on.
    pub(crate) fn take(&mut self) -> anyhow::Result<Option<Job>> {
        let tail = self.word(POSTED_TAIL)?;
        if tail == self.posted {
            return Ok(None);
        }
        let ahead = tail.wrapping_sub(self.posted);
        ensure!(
            ahead <= ENTRIES,
            "the driver claims {ahead} blocks posted, the ring has {ENTRIES}"
        );
        let [iova, len_bytes, block, slot, checksum] = self.read_entry(POSTED, self.posted)?;
        self.posted = self.posted.wrapping_add(1);
        Ok(Some(Job {
            iova,
            len_bytes,
            block,
            slot,
            checksum,
        }))
    }

    /// Waits until more is posted, the driver stops, or the time is over.
    pub(crate) fn wait(&self, limit: Duration) -> anyhow::Result<()> {
        self.board
            .session
            .word32(self.at(POSTED_TAIL))?
            .wait(self.posted, Some(limit))?;
        Ok(())
    }

    pub(crate) fn finish(&mut self, done: Done) -> anyhow::Result<()> {
        self.write_entry(
            DONE,
            self.done,
            [done.block, done.slot, done.checksum, 0, 0],
        )?;
        self.done = self.done.wrapping_add(1);
        self.publish(DONE_TAIL, self.done)?;
        self.board.ring_bell()
    }
}

impl Ring<'_> {
    fn at(&self, place: u64) -> Iova {
        self.base
            .checked_add(place)
            .expect("a granule does not leave the address space")
    }

    fn word(&self, place: u64) -> anyhow::Result<u32> {
        Ok(self
            .board
            .session
            .word32(self.at(place))?
            .load(Ordering::Acquire))
    }

    /// Everything written before is seen by whoever sees this.
    fn publish(&self, place: u64, value: u32) -> anyhow::Result<()> {
        let word = self.board.session.word32_mut(self.at(place))?;
        word.store(value, Ordering::Release);
        word.wake(1)?;
        Ok(())
    }

    fn write_entry(&self, ring: u64, number: u32, words: [u64; ENTRY_WORDS]) -> anyhow::Result<()> {
        let mut bytes = [0; ENTRY_WORDS * 8];
        for (place, word) in bytes.chunks_exact_mut(8).zip(words) {
            place.copy_from_slice(&word.to_le_bytes());
        }
        Ok(self.board.session.write(self.entry(ring, number), &bytes)?)
    }

    fn read_entry(&self, ring: u64, number: u32) -> anyhow::Result<[u64; ENTRY_WORDS]> {
        let mut bytes = [0; ENTRY_WORDS * 8];
        self.board
            .session
            .read(self.entry(ring, number), &mut bytes)?;
        let mut words = [0; ENTRY_WORDS];
        for (word, place) in words.iter_mut().zip(bytes.chunks_exact(8)) {
            *word = u64::from_le_bytes(place.try_into().expect("eight bytes"));
        }
        Ok(words)
    }

    fn entry(&self, ring: u64, number: u32) -> Iova {
        self.at(ring + u64::from(number % ENTRIES) * ENTRY_BYTES)
    }
}
