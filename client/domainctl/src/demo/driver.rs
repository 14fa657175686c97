//! The driver process: owns the buffers, and lets devices see one block at a
//! time.

use std::io;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use clap::Args;
use domain_core::coherent::CoherentSpec;
use domain_core::session::Role;
use domaind_client::blocking::{Client, Session};
use domaind_client::{Error, v1};
use hdrhistogram::Histogram;

use super::board::{Board, Done, ENTRIES, Job, Ring, board_bytes};
use super::carrier::{Carried, Carrier};
use super::input::{Input, Next};
use super::notes::{Latency, Note, Outcome, Sharer};
use super::transform::Key;
use super::{ActorArgs, Copying, Way};

/// Memory for blocks that are under way at a time.
const UNDER_WAY_BYTES: u64 = 64 << 20;
/// Blocks that one device has at a time, if memory allows.
const PER_DEVICE: u64 = 8;
/// How long to sleep at most when nothing rings.
const IDLE: Duration = Duration::from_millis(100);
/// How often to look whether the devices still live.
const LOOK_EVERY: Duration = Duration::from_millis(250);
/// A device has said hello, or bye, by then.
const GREETING_LIMIT: Duration = Duration::from_secs(20);
/// A device that lives but does nothing for so long has failed.
const STALL_LIMIT: Duration = Duration::from_secs(30);
const PROGRESS_EVERY: Duration = Duration::from_millis(50);

/// What the driver process is told. The file is its standard input.
#[derive(Clone, Debug, Args)]
pub(crate) struct DriverArgs {
    #[command(flatten)]
    actor: ActorArgs,
    #[arg(long)]
    devices: u64,
    #[arg(long)]
    block: u64,
    #[command(flatten)]
    copying: Copying,
}

/// How many blocks may be under way at a time.
pub(crate) fn slots(devices: u64, block_bytes: u64) -> u64 {
    (UNDER_WAY_BYTES / block_bytes).clamp(1, devices * PER_DEVICE)
}

/// Moves standard input through the domain.
pub(crate) fn run(args: &DriverArgs) -> anyhow::Result<()> {
    let (client, session) = args.actor.attach(Role::Driver)?;
    let memory = session.alloc_coherent(CoherentSpec::of(board_bytes(args.devices)))?;
    let board = Board::at(&session, memory.iova());
    let rings = (0..args.devices)
        .map(|device| board.ring(device))
        .collect::<Result<_, _>>()?;
    Note::Board {
        iova: memory.iova().get(),
    }
    .say()?;
    let mut driver = Driver::new(args, &client, &session, board, rings)?;
    driver.wait_for_all("come up", |ring| Ok(ring.pid()?.is_some()))?;
    driver.sharers = driver.find_sharers()?;
    let (session_of_reader, base) = (domaind_client::Session::clone(&session), memory.iova());
    let input = Input::open(io::stdin(), args.block, move || {
        // If the session has ended the driver finds it out by itself.
        let _ = Board::at(&session_of_reader, base).ring_bell();
    });
    let outcome = driver.move_all(&input)?;
    drop(input);
    driver.rings.iter().try_for_each(Ring::stop)?;
    // What is freed is zeroed: not under somebody who still reads it.
    driver.wait_for_all("stopped", |ring| Ok(ring.pid()?.is_none()))?;
    drop(driver);
    Note::Done(outcome).say()?;
    memory.free().map_err(Error::from)?;
    Ok(session.detach()?)
}

struct Driver<'s> {
    client: &'s Client,
    session: &'s Session,
    way: Way,
    board: Board<'s>,
    rings: Vec<Ring<'s>>,
    sharers: Vec<Sharer>,
    carrier: Carrier<'s>,
    /// Blocks under way, by slot.
    slots: Vec<Option<UnderWay>>,
    maps: Histogram<u64>,
    unmaps: Histogram<u64>,
    blocks: u64,
    bytes: u64,
}

/// A block in a device's hands.
struct UnderWay {
    carried: Carried,
    device: usize,
    block: u64,
    original: Vec<u8>,
}

impl<'s> Driver<'s> {
    fn new(
        args: &DriverArgs,
        client: &'s Client,
        session: &'s Session,
        board: Board<'s>,
        rings: Vec<Ring<'s>>,
    ) -> anyhow::Result<Driver<'s>> {
        let slots = slots(args.devices, args.block);
        let carrier = Carrier::new(session, args.copying, slots, args.block)?;
        // Three significant digits, from a microsecond to a minute and more.
        let histogram = || Histogram::new(3).context("a histogram");
        Ok(Driver {
            client,
            session,
            way: args.actor.direction,
            board,
            rings,
            sharers: Vec::new(),
            carrier,
            slots: (0..slots).map(|_| None).collect(),
            maps: histogram()?,
            unmaps: histogram()?,
            blocks: 0,
            bytes: 0,
        })
    }

    fn wait_for_all(
        &self,
        what: &str,
        is_so: impl Fn(&Ring<'_>) -> anyhow::Result<bool>,
    ) -> anyhow::Result<()> {
        let started = Instant::now();
        for (device, ring) in self.rings.iter().enumerate() {
            loop {
                let rung = self.board.rung()?;
                if is_so(ring)? {
                    break;
                }
                let waited = started.elapsed();
                ensure!(
                    waited < GREETING_LIMIT,
                    "device {device} has not {what} within {GREETING_LIMIT:?}"
                );
                self.check_session()?;
                self.board.wait(rung, IDLE)?;
            }
        }
        Ok(())
    }

    fn check_session(&self) -> anyhow::Result<()> {
        match self.session.is_ended() {
            Some(ended) => bail!("the driver's session: {ended}"),
            None => Ok(()),
        }
    }

    /// Who is attached, as the daemon says: the driver, then every device.
    fn find_sharers(&self) -> anyhow::Result<Vec<Sharer>> {
        let attached = self.attached()?;
        let own = i32::try_from(std::process::id())?;
        let mut pids = vec![own];
        for ring in &self.rings {
            pids.push(ring.pid()?.context("a device took its pid back")?);
        }
        let sharer = |pid: i32| {
            let has_pid =
                |session: &&v1::Session| session.peer.as_ref().is_some_and(|peer| peer.pid == pid);
            let session = attached.iter().find(has_pid).with_context(|| lost(pid))?;
            Ok(Sharer {
                pid,
                session: session.name.clone(),
                blocks: 0,
            })
        };
        pids.into_iter().map(sharer).collect()
    }

    fn attached(&self) -> anyhow::Result<Vec<v1::Session>> {
        let request = v1::ListSessionsRequest {
            domain: self.session.domain().name(),
            // More than the demo has processes.
            page_size: 1000,
            page_token: String::new(),
        };
        let mut service = self.client.sessions();
        let listed = self.client.block_on(service.list_sessions(request));
        Ok(listed.map_err(Error::from)?.into_inner().sessions)
    }

    fn move_all(&mut self, input: &Input) -> anyhow::Result<Outcome> {
        let started = Instant::now();
        let mut told = started;
        let mut looked = started;
        let mut moved_at = started;
        let mut at_end = false;
        loop {
            let rung = self.board.rung()?;
            let sent = self.send_all(input, &mut at_end)?;
            let collected = self.collect_all()?;
            if at_end && self.slots.iter().all(Option::is_none) {
                return Ok(self.outcome(started.elapsed()));
            }
            if sent + collected > 0 {
                moved_at = Instant::now();
            } else {
                self.board.wait(rung, IDLE)?;
            }
            // Also while others make progress.
            if looked.elapsed() >= LOOK_EVERY {
                self.look_after_devices(moved_at)?;
                looked = Instant::now();
            }
            if told.elapsed() >= PROGRESS_EVERY {
                Note::Progress { bytes: self.bytes }.say()?;
                told = Instant::now();
            }
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
        self.bytes += original.len() as u64;
        self.sharers[0].blocks += 1;
        self.sharers[1 + device].blocks += 1;
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

    /// Are all of them there, and does whoever has blocks work on them?
    fn look_after_devices(&self, moved_at: Instant) -> anyhow::Result<()> {
        self.check_session()?;
        let attached = self.attached()?;
        let is_there = |pid: i32| {
            attached
                .iter()
                .any(|session| session.peer.as_ref().is_some_and(|peer| peer.pid == pid))
        };
        for sharer in &self.sharers {
            ensure!(is_there(sharer.pid), lost(sharer.pid));
        }
        let busy: Vec<_> = self
            .rings
            .iter()
            .zip(&self.sharers[1..])
            .filter(|(ring, _)| ring.under_way() > 0)
            .collect();
        let pids: Vec<_> = busy.iter().map(|(_, sharer)| sharer.pid).collect();
        ensure!(
            pids.is_empty() || moved_at.elapsed() < STALL_LIMIT,
            "devices {pids:?} have done nothing for {STALL_LIMIT:?}"
        );
        Ok(())
    }

    fn outcome(&self, elapsed: Duration) -> Outcome {
        Outcome {
            bytes: self.bytes,
            blocks: self.blocks,
            elapsed_ns: nanos(elapsed),
            map_latency_ns: percentiles(&self.maps),
            unmap_latency_ns: percentiles(&self.unmaps),
            sharers: self.sharers.clone(),
        }
    }
}

fn lost(pid: i32) -> String {
    format!("the process with pid {pid} is gone: its session has ended")
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

fn nanos(duration: Duration) -> u64 {
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
