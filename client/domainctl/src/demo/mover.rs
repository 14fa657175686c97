//! Moves the blocks of an input through the rings and back, and compares. Who
//! the devices are, and whether they still live, is for the caller to know.

use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use domaind_client::blocking::Session;
use hdrhistogram::Histogram;

use super::Way;
use super::board::{Board, Done, ENTRIES, Job, Ring};
use super::carrier::{Carried, Carrier};
use super::input::{Input, Next};
use super::notes::Latency;
use super::transform::Key;

/// Memory for blocks that are under way at a time.
const UNDER_WAY_BYTES: u64 = 64 << 20;
/// Blocks that one device has at a time, if memory allows.
const PER_DEVICE: u64 = 8;
/// How long to sleep at most when nothing rings.
pub(super) const IDLE: Duration = Duration::from_millis(100);

/// How many blocks may be under way at a time.
pub(super) fn slots(devices: u64, block_bytes: u64) -> u64 {
    (UNDER_WAY_BYTES / block_bytes).clamp(1, devices * PER_DEVICE)
}

/// The rings, what is in the devices' hands, and what came of it so far.
pub(super) struct Mover<'s> {
    session: &'s Session,
    way: Way,
    board: Board<'s>,
    pub(super) rings: Vec<Ring<'s>>,
    carrier: Carrier<'s>,
    /// Blocks under way, by slot.
    slots: Vec<Option<UnderWay>>,
    maps: Histogram<u64>,
    unmaps: Histogram<u64>,
    /// Blocks that were sent.
    blocks: u64,
    tally: Tally,
}

/// What has come back and was right.
#[derive(Clone, Debug, Default)]
pub(super) struct Tally {
    pub(super) bytes: u64,
    pub(super) blocks: u64,
    /// By device.
    pub(super) served: Vec<u64>,
}

/// A block in a device's hands.
struct UnderWay {
    carried: Carried,
    device: usize,
    block: u64,
    original: Vec<u8>,
}

impl<'s> Mover<'s> {
    /// One whose rings nobody uses yet.
    pub(super) fn new(
        session: &'s Session,
        way: Way,
        board: Board<'s>,
        rings: Vec<Ring<'s>>,
        carrier: Carrier<'s>,
        slots: u64,
    ) -> anyhow::Result<Mover<'s>> {
        // Three significant digits, from a microsecond to a minute and more.
        let histogram = || Histogram::new(3).context("a histogram");
        let served = vec![0; rings.len()];
        Ok(Mover {
            session,
            way,
            board,
            rings,
            carrier,
            slots: (0..slots).map(|_| None).collect(),
            maps: histogram()?,
            unmaps: histogram()?,
            blocks: 0,
            tally: Tally {
                served,
                ..Tally::default()
            },
        })
    }

    /// Waits until something is so of every ring. `look` is asked whether to
    /// wait on, and told for which device.
    pub(super) fn wait_for_all(
        &self,
        is_so: impl Fn(&Ring<'_>) -> anyhow::Result<bool>,
        look: impl Fn(usize) -> anyhow::Result<()>,
    ) -> anyhow::Result<()> {
        for (device, ring) in self.rings.iter().enumerate() {
            loop {
                let rung = self.board.rung()?;
                if is_so(ring)? {
                    break;
                }
                self.check_session()?;
                look(device)?;
                self.board.wait(rung, IDLE)?;
            }
        }
        Ok(())
    }

    /// Which devices have blocks in their hands.
    pub(super) fn busy(&self) -> impl Iterator<Item = usize> {
        let under_way = self.rings.iter().map(Ring::under_way).enumerate();
        under_way
            .filter(|(_, blocks)| *blocks > 0)
            .map(|(device, _)| device)
    }

    /// Wakes the mover; for who has something new for it.
    pub(super) fn bell(&self) -> impl Fn() + Send + 'static {
        let (session, base) = (
            domaind_client::Session::clone(self.session),
            self.board.base(),
        );
        move || {
            // If the session has ended the mover finds it out by itself.
            let _ = Board::at(&session, base).ring_bell();
        }
    }

    pub(super) fn tally(&self) -> &Tally {
        &self.tally
    }

    /// How long it took to map a block, and to unmap one.
    pub(super) fn latencies(&self) -> (Latency, Latency) {
        (percentiles(&self.maps), percentiles(&self.unmaps))
    }

    pub(super) fn check_session(&self) -> anyhow::Result<()> {
        match self.session.is_ended() {
            Some(ended) => bail!("the driver's session: {ended}"),
            None => Ok(()),
        }
    }

    /// Moves all of an input. `look` is asked again and again whether to go on,
    /// also while nothing moves, and is told when something last did.
    pub(super) fn move_all(
        &mut self,
        input: &Input,
        mut look: impl FnMut(&Mover<'s>, Instant) -> anyhow::Result<()>,
    ) -> anyhow::Result<()> {
        let mut moved_at = Instant::now();
        let mut at_end = false;
        loop {
            let rung = self.board.rung()?;
            let sent = self.send_all(input, &mut at_end)?;
            let collected = self.collect_all()?;
            if at_end && self.slots.iter().all(Option::is_none) {
                return Ok(());
            }
            if sent + collected > 0 {
                moved_at = Instant::now();
            } else {
                self.board.wait(rung, IDLE)?;
            }
            look(self, moved_at)?;
        }
    }

    /// Sends what has been read and has room.
    fn send_all(&mut self, input: &Input, at_end: &mut bool) -> anyhow::Result<u64> {
        let mut sent = 0;
        while !*at_end && self.has_room() {
            match input.next().context("reading the file")? {
                Next::Block(original) => self.send(original)?,
                Next::Later => break,
                Next::End => *at_end = true,
            }
            sent += 1;
        }
        Ok(sent)
    }

    fn has_room(&self) -> bool {
        self.slots.iter().any(Option::is_none)
            && self.rings.iter().any(|ring| ring.under_way() < ENTRIES)
    }

    /// Maps and posts one block.
    fn send(&mut self, original: Vec<u8>) -> anyhow::Result<()> {
        let slot = self
            .slots
            .iter()
            .position(Option::is_none)
            .expect("has_room() said so");
        let staged = self.carrier.stage(slot, &original)?;
        let started = Instant::now();
        let carried = staged.map(self.way)?;
        record(&mut self.maps, started);
        let (block, device) = (self.blocks, self.least_busy());
        let job = Job {
            iova: carried.iova().get(),
            len_bytes: original.len() as u64,
            block,
            slot: slot as u64,
            checksum: crc32c::crc32c(&original).into(),
        };
        self.rings[device].post(job)?;
        self.slots[slot] = Some(UnderWay {
            carried,
            device,
            block,
            original,
        });
        self.blocks += 1;
        Ok(())
    }

    fn least_busy(&self) -> usize {
        let busy = |device: &usize| self.rings[*device].under_way();
        (0..self.rings.len())
            .min_by_key(busy)
            .expect("there is at least one device")
    }

    /// Takes back every block that is done.
    fn collect_all(&mut self) -> anyhow::Result<u64> {
        let mut collected = 0;
        for device in 0..self.rings.len() {
            while let Some(done) = self.rings[device].collect()? {
                self.take_back(device, done)?;
                collected += 1;
            }
        }
        Ok(collected)
    }

    fn take_back(&mut self, device: usize, done: Done) -> anyhow::Result<()> {
        let slot = usize::try_from(done.slot)?;
        let is_its = |under_way: &&mut Option<UnderWay>| {
            under_way
                .as_ref()
                .is_some_and(|block| block.device == device && block.block == done.block)
        };
        let mine = self
            .slots
            .get_mut(slot)
            .filter(is_its)
            .and_then(Option::take);
        let UnderWay {
            carried,
            block,
            original,
            ..
        } = mine.with_context(|| {
            format!(
                "device {device} hands back block {} in slot {slot}, which it did not have",
                done.block
            )
        })?;
        let started = Instant::now();
        let arrived = carried.unmap(original.len())?;
        record(&mut self.unmaps, started);
        let came = arrived.open(block, original.len())?;
        self.verify(came, device as u64, block, &original, done.checksum)?;
        self.tally.bytes += original.len() as u64;
        self.tally.blocks += 1;
        self.tally.served[device] += 1;
        Ok(())
    }

    /// Exactly the right bytes came back, and undone they are the file again.
    fn verify(
        &self,
        mut came: Vec<u8>,
        device: u64,
        block: u64,
        original: &[u8],
        checksum: u64,
    ) -> anyhow::Result<()> {
        ensure!(
            u64::from(crc32c::crc32c(&came)) == checksum,
            "block {block}: not what device {device} left"
        );
        match self.way {
            Way::Both => Key::of(device, block).apply(0, &mut came),
            Way::ToDevice => {}
            Way::FromDevice => {
                Key::of(device, block).apply(0, &mut came);
                ensure!(
                    came.iter().all(|byte| *byte == 0),
                    "block {block}: not device {device}'s pattern"
                );
                return Ok(());
            }
        }
        ensure!(
            came == original,
            "block {block}: undone it differs from the file"
        );
        Ok(())
    }
}
fn record(histogram: &mut Histogram<u64>, started: Instant) {
    // It resizes itself; the only values it refuses are beyond centuries.
    let _ = histogram.record(nanos(started.elapsed()));
}

fn percentiles(histogram: &Histogram<u64>) -> Latency {
    Latency {
        p50: histogram.value_at_quantile(0.5),
        p99: histogram.value_at_quantile(0.99),
        max: histogram.max(),
    }
}

pub(super) fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_under_way_fit_into_bounded_memory_and_into_the_rings() {
        for devices in [1, 2, 64] {
            for block in [1, 4096, 64 << 10, 1 << 20, 16 << 20] {
                let slots = slots(devices, block);
                assert!(slots >= 1 && slots * block <= UNDER_WAY_BYTES);
                assert!(slots <= devices * u64::from(ENTRIES));
            }
        }
    }
}
