//! The driver alone: lays out a board with a sign, waits for devices, and passes
//! its file through their hands.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use domain_core::coherent::CoherentSpec;
use domaind_client::Error;
use domaind_client::blocking::Session;
use domaind_proto::names::session_name;

use super::lines::Line;
use super::{Actor, Setback};
use crate::demo::board::{Board, Ring, Sign, board_bytes};
use crate::demo::carrier::{Carrier, aperture_bytes, share_of_aperture, slot_bytes};
use crate::demo::input::Input;
use crate::demo::mover::{self, Mover};
use crate::demo::report::verdict;

/// A device shows ten times a second that it lives; one that has not for so long
/// is gone, or as good as gone.
const PULSE_LIMIT: Duration = Duration::from_secs(5);
/// Devices that were told to stop have so long to leave.
const LEAVING_LIMIT: Duration = Duration::from_secs(2);

/// One session of a driver.
pub(super) fn play(actor: &Actor, session: &Session) -> anyhow::Result<()> {
    let args = &actor.args;
    let devices = args.devices();
    let memory = session.alloc_coherent(CoherentSpec::of(board_bytes(devices)))?;
    let board = Board::at(session, memory.iova());
    let slots = slots(session, devices, args.block)?;
    let pool = share_of_aperture(session, slots, args.block);
    let carrier = Carrier::new(session, args.copying, slots, args.block, pool)?;
    let (way, rings) = (args.direction, board.rings(devices)?);
    let mut mover = Mover::new(session, way, board, rings, carrier, slots)?;
    board.put_up(Sign {
        driver: session.id(),
        seats: devices,
        way,
    })?;
    let played = gather(actor, &mover).and_then(|()| pass_all(actor, &mut mover));
    match played {
        Ok(()) => dismiss(&mover, board)?,
        // The first failure is the one to tell.
        Err(error) => {
            let _ = dismiss(&mover, board);
            return Err(error);
        }
    }
    drop(mover);
    Ok(memory.free().map_err(Error::from)?)
}

/// As many blocks at a time as the domain has room for.
fn slots(session: &Session, devices: u64, block_bytes: u64) -> anyhow::Result<u64> {
    let (has, needs) = (aperture_bytes(session), slot_bytes(session, block_bytes));
    ensure!(
        has >= needs,
        "a block of {block_bytes} bytes needs {needs} bytes of the bounce aperture, which has {has}"
    );
    Ok(mover::slots(devices, block_bytes).min(has / needs))
}

/// Waits until every seat is taken.
fn gather(actor: &Actor, mover: &Mover<'_>) -> anyhow::Result<()> {
    mover.wait_for_all(
        |ring| Ok(ring.who()?.is_some()),
        |seat| Ok(actor.waits_on(|| format!("no device has taken seat {seat}"))?),
    )?;
    for (seat, ring) in mover.rings.iter().enumerate() {
        let device = ring.who()?.map(session_name).unwrap_or_default();
        let device = &device;
        actor.tell(&Line::Seated { seat, device })?;
    }
    actor.meets();
    Ok(())
}

/// Passes the file once, or again and again.
fn pass_all(actor: &Actor, mover: &mut Mover<'_>) -> anyhow::Result<()> {
    let verdict = verdict(&domain_core::Direction::from(actor.args.direction).to_string());
    let mut pulses = Pulses::of(&mover.rings);
    for pass in 1.. {
        let before = mover.tally().clone();
        let input = Input::open(open(&actor.file)?, actor.args.block, mover.bell());
        mover.move_all(&input, |mover, _| look(actor, mover, &mut pulses))?;
        let after = mover.tally();
        actor.tell(&Line::Passed {
            pass,
            bytes: after.bytes - before.bytes,
            blocks: after.blocks - before.blocks,
            verdict,
        })?;
        if !actor.repeat() {
            break;
        }
        let passed = Instant::now();
        while passed.elapsed() < actor.args.half.every {
            look(actor, mover, &mut pulses)?;
            actor.sleep(mover::IDLE.min(actor.args.half.every))?;
        }
    }
    Ok(())
}

fn open(path: &Path) -> anyhow::Result<Box<dyn Read + Send>> {
    if path == Path::new("-") {
        return Ok(Box::new(io::stdin()));
    }
    let opened = File::open(path).with_context(|| format!("opening {}", path.display()))?;
    Ok(Box::new(opened))
}

/// Whether to go on.
fn look(actor: &Actor, mover: &Mover<'_>, pulses: &mut Pulses) -> anyhow::Result<()> {
    actor.goes_on()?;
    mover.check_session()?;
    pulses.check(&mover.rings)?;
    actor.still_there();
    Ok(())
}

/// Lets the devices go home. Those that are gone already are not waited for.
fn dismiss(mover: &Mover<'_>, board: Board<'_>) -> anyhow::Result<()> {
    board.take_down()?;
    mover.rings.iter().try_for_each(Ring::stop)?;
    let stopping = Instant::now();
    // What is freed is zeroed: not under somebody who still reads it.
    mover.wait_for_all(
        |ring| Ok(ring.who()?.is_none() || stopping.elapsed() > LEAVING_LIMIT),
        |_| Ok(()),
    )
}

/// When each device has last shown that it lives.
struct Pulses(Vec<(u32, Instant)>);

impl Pulses {
    fn of(rings: &[Ring<'_>]) -> Pulses {
        Pulses(rings.iter().map(|_| (0, Instant::now())).collect())
    }

    /// The pods of others have pids that mean nothing here, and their sessions are
    /// not for us to list: what they do to the board is all that is known.
    fn check(&mut self, rings: &[Ring<'_>]) -> anyhow::Result<()> {
        for (seat, (ring, (seen, at))) in rings.iter().zip(&mut self.0).enumerate() {
            if ring.who()?.is_none() {
                return Err(Setback::Passing(format!("device {seat} has left")).into());
            }
            let pulse = ring.pulse()?;
            if pulse != *seen {
                (*seen, *at) = (pulse, Instant::now());
            } else if at.elapsed() > PULSE_LIMIT {
                let silent = format!("device {seat} has shown no sign of life for {PULSE_LIMIT:?}");
                return Err(Setback::Passing(silent).into());
            }
        }
        Ok(())
    }
}
