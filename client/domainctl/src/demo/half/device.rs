//! The device alone: looks for a board with a sign, takes a seat, and checks and
//! transforms what comes.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::Context;
use domain_core::addr::{Iova, IovaRange};
use domain_core::mapping::{MappingView, Phase, ViewKind};
use domaind_client::blocking::Session;
use domaind_proto::names::session_name;
use tonic::Code;

use super::lines::Line;
use super::{Actor, STEP, Setback};
use crate::demo::Every;
use crate::demo::board::{Board, Ring, Sign, board_bytes};
use crate::demo::device::{IDLE, Worker};

/// How often to look for a board.
const SEARCH_EVERY: Duration = Duration::from_millis(200);
/// How often to tell how far it is, at most.
const TELL_EVERY: Duration = Duration::from_secs(1);

/// All memory of a driver that is gone is zeroed within this.
const VANISHING_LIMIT: Duration = Duration::from_millis(500);

/// A place at a driver's board.
struct Seat<'s> {
    board: Board<'s>,
    sign: Sign,
    ring: Ring<'s>,
    number: u64,
}

/// One session of a device; several drivers with `--repeat`.
pub(super) fn play(actor: &Actor, session: &Session) -> anyhow::Result<()> {
    loop {
        let seat = search(actor, session)?;
        actor.tell(&Line::Sat {
            seat: seat.number,
            driver: &session_name(seat.sign.driver),
        })?;
        actor.meets();
        serve(actor, session, seat)?;
        if !actor.repeat() {
            return Ok(());
        }
    }
}

/// Looks until there is a free seat.
fn search<'s>(actor: &Actor, session: &'s Session) -> anyhow::Result<Seat<'s>> {
    actor.still_there();
    loop {
        if let Some(seat) = find(session)? {
            return Ok(seat);
        }
        if let Some(ended) = session.is_ended() {
            return Err(Setback::Passing(format!("the device's session: {ended}")).into());
        }
        let nobody = || format!("no driver has a seat free in {}", session.domain().name());
        actor.waits_on(nobody)?;
        actor.sleep(SEARCH_EVERY)?;
    }
}

/// Goes through what is mapped in the coherent aperture.
fn find(session: &Session) -> anyhow::Result<Option<Seat<'_>>> {
    let whole = session.coherent();
    let whole = whole.context("the domain has no coherent memory, where a driver would wait")?;
    let mut next = Some(whole.start());
    while let Some(range) = next.and_then(|start| IovaRange::new(start, whole.last()).ok()) {
        let mapping = match session.lookup(range) {
            Ok(mapping) => mapping,
            Err(error) if error.code() == Some(Code::NotFound) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        if let Some(seat) = sit_down(session, &mapping)? {
            return Ok(Some(seat));
        }
        next = mapping.visible.last().checked_add(1);
    }
    Ok(None)
}

/// Takes a seat at the board that begins here, if one does and has one free.
fn sit_down<'s>(session: &'s Session, mapping: &MappingView) -> anyhow::Result<Option<Seat<'s>>> {
    // A driver that is gone has left a board in quarantine.
    if mapping.kind != ViewKind::Coherent || mapping.phase != Phase::Live {
        return Ok(None);
    }
    let at: Iova = mapping.visible.start();
    let board = Board::at(session, at);
    let Some(sign) = board.sign()? else {
        return Ok(None);
    };
    // Whoever may write here may have made it up.
    let has_bytes = mapping.visible.len_bytes().unwrap_or(u64::MAX);
    if board_bytes(sign.seats) > has_bytes {
        return Ok(None);
    }
    for number in 0..sign.seats {
        let ring = board.ring(number)?;
        if ring.who()?.is_none() && ring.hello()? {
            return Ok(Some(Seat {
                board,
                sign,
                ring,
                number,
            }));
        }
    }
    Ok(None)
}

/// Works until the driver is through, gone, or this half is told to stop.
fn serve(actor: &Actor, session: &Session, seat: Seat<'_>) -> anyhow::Result<()> {
    let Seat {
        board,
        sign,
        ring,
        number,
    } = seat;
    let mut worker = Worker::new(session, ring, number, sign.way);
    let (mut telling, mut told_blocks) = (Every::new(TELL_EVERY), 0);
    let mut gone = false;
    loop {
        if let Err(told) = actor.goes_on() {
            worker.ring.bye()?;
            return Err(told.into());
        }
        match worker.work_on_one() {
            Ok(true) => continue,
            Ok(false) => {}
            // Memory of a driver that is gone is zeroed, here or there first: what
            // makes no sense then is not the failure to tell.
            Err(_) if has_vanished(board, sign)? => return Err(gone_with(sign)),
            Err(error) => return Err(error),
        }
        let (bytes, blocks) = (worker.bytes, worker.blocks);
        if worker.ring.is_stopped()? {
            worker.ring.bye()?;
            actor.tell(&Line::Dismissed { bytes, blocks })?;
            return Ok(());
        }
        if let Some(ended) = session.is_ended() {
            return Err(Setback::Passing(format!("the device's session: {ended}")).into());
        }
        // A driver takes the sign down first and says stop then: only a board that
        // is still bare a moment later is one whose driver has vanished.
        let bare = board.sign()? != Some(sign);
        if bare && gone {
            return Err(gone_with(sign));
        }
        gone = bare;
        if blocks > told_blocks && telling.is_due() {
            actor.tell(&Line::Served { bytes, blocks })?;
            told_blocks = blocks;
        }
        worker.ring.beat()?;
        actor.still_there();
        worker.ring.wait(IDLE)?;
    }
}

/// Does the sign go within a moment?
fn has_vanished(board: Board<'_>, sign: Sign) -> anyhow::Result<bool> {
    let started = Instant::now();
    while started.elapsed() < VANISHING_LIMIT {
        if board.sign()? != Some(sign) {
            return Ok(true);
        }
        thread::sleep(STEP);
    }
    Ok(false)
}

fn gone_with(sign: Sign) -> anyhow::Error {
    let driver = session_name(sign.driver);
    Setback::Passing(format!("the driver {driver} is gone")).into()
}
