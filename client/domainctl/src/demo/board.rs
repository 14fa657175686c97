//! The rings through which driver and devices talk: one coherent allocation.
//!
//! ```text
//! granule 0       the doorbell that devices ring for the driver
//! granule 1 + k   device k: its pid, the stop word, two tails, and the
//!                 entries of both rings
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
use domaind_client::Session;

/// Blocks that one device may have at a time.
pub(crate) const ENTRIES: u32 = 16;
const RING_BYTES: u64 = 4096;
const ENTRY_WORDS: usize = 4;
const ENTRY_BYTES: u64 = 32;

// Places in a device's granule; what different processes write lies in
// different cache lines.
const PID: u64 = 0;
const STOP: u64 = 64;
const POSTED_TAIL: u64 = 128;
const DONE_TAIL: u64 = 192;
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
}

/// A block that a device has worked on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Done {
    pub(crate) block: u64,
    pub(crate) slot: u64,
    /// CRC-32C of the block as the device left it.
    pub(crate) checksum: u64,
}

/// Memory that a board for so many devices needs.
pub(crate) fn board_bytes(devices: u64) -> u64 {
    RING_BYTES * (1 + devices)
}

impl<'s> Board<'s> {
    pub(crate) fn at(session: &'s Session, base: Iova) -> Board<'s> {
        Board { session, base }
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
    /// The pid of the device, from its hello to its bye.
    pub(crate) fn pid(&self) -> anyhow::Result<Option<i32>> {
        let pid = self.word(PID)?;
        Ok(i32::try_from(pid).ok().filter(|pid| *pid > 0))
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
            [job.iova, job.len_bytes, job.block, job.slot],
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
        let [block, slot, checksum, _] = self.read_entry(DONE, self.done)?;
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
    pub(crate) fn hello(&self) -> anyhow::Result<()> {
        self.publish(PID, std::process::id())?;
        self.board.ring_bell()
    }

    /// The last word: the rings may be freed from here on.
    pub(crate) fn bye(&self) -> anyhow::Result<()> {
        self.publish(PID, 0)?;
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
        let [iova, len_bytes, block, slot] = self.read_entry(POSTED, self.posted)?;
        self.posted = self.posted.wrapping_add(1);
        Ok(Some(Job {
            iova,
            len_bytes,
            block,
            slot,
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
        self.write_entry(DONE, self.done, [done.block, done.slot, done.checksum, 0])?;
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
