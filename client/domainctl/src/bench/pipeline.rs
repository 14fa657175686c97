//! Scenario `pipeline`: buffers are mapped and unmapped in batches on one
//! pipeline, eight batches of 64 at a time, and the daemon copies the bytes of
//! each. The floor is a thread at the other end of a raw socket that copies the
//! same bytes, and sends back as many messages of about the same length.

use std::os::fd::OwnedFd;
use std::time::Instant;

use anyhow::{Context, anyhow, ensure};
use domain_core::Direction;
use domain_core::batch::BatchMode;
use domain_core::region::driver_memfd;
use domain_core::session::Role;
use domain_core::streaming::{MapSpec, UnmapSpec};
use domaind_client::{Answer, Buffer, MappedBatch, Pipeline, PipelineOptions, Session};

use super::echo::Echo;
use super::latency::Lap;
use super::party::{Party, Place};
use super::turns::Work;
use super::{BOUNCE_BYTES, Facts};

pub(super) const FACTS: Facts = Facts {
    operation: "Map and Unmap, 8 batches of 64 in flight",
    floor: "raw socket echo x 2 and pread, batched alike",
    // What is mapped at a time are 512 of them.
    size_bytes_most: 64 << 10,
    batch: LAP * ENTRIES,
    bounce_bytes,
};

/// Of one batch.
const ENTRIES: usize = 64;
const IN_FLIGHT: usize = 8;
/// Batches between two readings of the clock: the pipeline is empty then, and so
/// has to be full for most of the time between.
const LAP: usize = 32;
const PAGE: u64 = 4096;
const MODE: BatchMode = BatchMode::AllOrNothing;

/// About as long as the question and the answer of a batch are in the mean, of
/// both calls: addresses and numbers, some bytes each.
const MESSAGE_BYTES: usize = 320;
/// What the first byte of a message says.
const MAP: u8 = 1;
const UNMAP: u8 = 2;

struct Batcher {
    pipeline: Pipeline,
    /// The same buffers in each batch, each with pages of its own.
    maps: Vec<MapSpec>,
    unmaps: Vec<UnmapSpec>,
    echo: Echo<MESSAGE_BYTES>,
    _buffer: Buffer,
    _session: Session,
    party: Party,
}

pub(super) fn crew(place: &Place) -> anyhow::Result<Vec<Box<dyn Work>>> {
    let batcher = |_| -> anyhow::Result<Box<dyn Work>> { Ok(Box::new(Batcher::new(place)?)) };
    (0..place.threads).map(batcher).collect()
}

/// Twice what is mapped at a time: what was unmapped may wait for a moment.
fn bounce_bytes(threads: u64, size_bytes: u64) -> u64 {
    let at_a_time = (ENTRIES * IN_FLIGHT) as u64;
    BOUNCE_BYTES + size_bytes.next_multiple_of(PAGE) * at_a_time * 2 * threads
}

impl Batcher {
    fn new(place: &Place) -> anyhow::Result<Batcher> {
        let party = place.party()?;
        let session = party.run(party.attach(Role::Driver))?;
        let each = place.size_bytes.next_multiple_of(PAGE);
        let buffer = party.run(session.buffer(each * ENTRIES as u64))?;
        let memory = buffer.memory().id();
        let spec =
            |entry| MapSpec::new(memory, entry * each, place.size_bytes, Direction::ToDevice);
        let options = PipelineOptions {
            in_flight: IN_FLIGHT,
        };
        Ok(Batcher {
            pipeline: party.run(session.pipeline(options))?,
            maps: (0..ENTRIES as u64).map(spec).collect(),
            unmaps: Vec::with_capacity(ENTRIES),
            echo: copying_echo(place.size_bytes)?,
            _buffer: buffer,
            _session: session,
            party,
        })
    }
}

impl Work for Batcher {
    fn ours(&mut self) -> anyhow::Result<Lap> {
        let Batcher {
            pipeline,
            maps,
            unmaps,
            party,
            ..
        } = self;
        let start = Instant::now();
        party.run(async {
            for _ in 0..IN_FLIGHT {
                pipeline.map(maps, MODE)?;
            }
            let mut left = LAP - IN_FLIGHT;
            while let Some(answer) = pipeline.next().await? {
                match answer {
                    Answer::Mapped(batch) => {
                        endings(batch, unmaps)?;
                        pipeline.unmap(unmaps, MODE)?;
                    }
                    Answer::Refused(refusal) => {
                        return Err(domaind_client::Error::Refused(refusal.clone()).into());
                    }
                    // What ends is followed by the next one.
                    _ if left > 0 => {
                        left -= 1;
                        pipeline.map(maps, MODE)?;
                    }
                    _ => {}
                }
            }
            anyhow::Ok(())
        })?;
        Ok(lap(start))
    }

    fn floor(&mut self) -> anyhow::Result<Lap> {
        let echo = &mut self.echo;
        let start = Instant::now();
        for _ in 0..IN_FLIGHT {
            echo.send(&[MAP; MESSAGE_BYTES])?;
        }
        let mut left = LAP - IN_FLIGHT;
        for _ in 0..2 * LAP {
            let answer = echo.receive().context("the floor's answer")?;
            if answer[0] == MAP {
                echo.send(&[UNMAP; MESSAGE_BYTES])?;
            } else if left > 0 {
                left -= 1;
                echo.send(&[MAP; MESSAGE_BYTES])?;
            }
        }
        Ok(lap(start))
    }
}

/// How all of a batch is unmapped.
fn endings(batch: MappedBatch<'_>, unmaps: &mut Vec<UnmapSpec>) -> anyhow::Result<()> {
    unmaps.clear();
    for mapped in batch.iter() {
        let mapped = mapped.map_err(|refusal| anyhow!("{}", refusal.message))?;
        unmaps.push(UnmapSpec {
            iova: mapped.iova,
            id: mapped.id,
            written_bytes: None,
            skip_sync: false,
        });
    }
    ensure!(unmaps.len() == ENTRIES, "{} were mapped", unmaps.len());
    Ok(())
}

/// Copies what a batch maps, from a file of a driver's as the daemon does.
fn copying_echo(size_bytes: u64) -> anyhow::Result<Echo<MESSAGE_BYTES>> {
    let each = size_bytes.next_multiple_of(PAGE);
    let file = driver_memfd("domaind-bench", each * ENTRIES as u64)?;
    let mut into = vec![1; usize::try_from(size_bytes)?];
    let work = move |message: &[u8; MESSAGE_BYTES]| {
        if message[0] == MAP {
            copy_all(&file, each, &mut into);
        }
    };
    Ok(Echo::start(work)?)
}

fn copy_all(file: &OwnedFd, each: u64, into: &mut [u8]) {
    for entry in 0..ENTRIES as u64 {
        let read = rustix::io::pread(file, &mut *into, entry * each);
        assert_eq!(read, Ok(into.len()), "a memfd is as long as it was made");
    }
}

fn lap(start: Instant) -> Lap {
    Lap {
        took: start.elapsed(),
        ops: (LAP * ENTRIES) as u64,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_floor_answers_every_message_after_its_copies() {
        for size_bytes in [1, PAGE, 5000] {
            let mut echo = copying_echo(size_bytes).unwrap();
            for kind in [MAP, UNMAP, MAP] {
                echo.send(&[kind; MESSAGE_BYTES]).unwrap();
            }
            for kind in [MAP, UNMAP, MAP] {
                assert_eq!(echo.receive().unwrap(), [kind; MESSAGE_BYTES]);
            }
        }
    }

    #[test]
    fn there_is_room_for_what_is_in_flight_and_for_what_has_just_ended() {
        assert!(bounce_bytes(1, 1) >= 2 * 512 * PAGE);
        assert!(bounce_bytes(3, 5000) >= 3 * 2 * 512 * 2 * PAGE);
    }
}
