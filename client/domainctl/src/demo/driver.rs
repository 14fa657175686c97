//! The driver process: owns the buffers, and lets devices see one block at a
//! time.

use std::io;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use clap::Args;
use domain_core::coherent::CoherentSpec;
use domain_core::session::{Role, SessionId};
use domaind_client::blocking::{Client, Session};
use domaind_client::{Error, v1};
use domaind_proto::names::parse_session;

use super::board::{Board, Ring, board_bytes};
use super::carrier::{Carrier, whole_aperture};
use super::input::Input;
use super::mover::{Mover, nanos, slots};
use super::notes::{Note, Outcome, Sharer};
use super::{ActorArgs, Copying, Every};

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

/// Moves standard input through the domain.
pub(crate) fn run(args: &DriverArgs) -> anyhow::Result<()> {
    let (client, session) = args.actor.attach(Role::Driver)?;
    let memory = session.alloc_coherent(CoherentSpec::of(board_bytes(args.devices)))?;
    let board = Board::at(&session, memory.iova());
    Note::Board {
        iova: memory.iova().get(),
    }
    .say()?;
    let slots = slots(args.devices, args.block);
    let pool = whole_aperture(&session);
    let carrier = Carrier::new(&session, args.copying, slots, args.block, pool)?;
    let (way, rings) = (args.actor.direction, board.rings(args.devices)?);
    let mut mover = Mover::new(&session, way, board, rings, carrier, slots)?;
    let started = Instant::now();
    mover.wait_for_all(
        |ring| Ok(ring.who()?.is_some()),
        |device| in_time(device, "come up", started),
    )?;
    let sharers = find_sharers(&client, &session, &mover.rings)?;
    let outcome = move_all(&mut mover, &client, &session, args.block, sharers)?;
    mover.rings.iter().try_for_each(Ring::stop)?;
    // What is freed is zeroed: not under somebody who still reads it.
    let stopping = Instant::now();
    mover.wait_for_all(
        |ring| Ok(ring.who()?.is_none()),
        |device| in_time(device, "stopped", stopping),
    )?;
    drop(mover);
    Note::Done(outcome).say()?;
    memory.free().map_err(Error::from)?;
    Ok(session.detach()?)
}

fn in_time(device: usize, what: &str, since: Instant) -> anyhow::Result<()> {
    ensure!(
        since.elapsed() < GREETING_LIMIT,
        "device {device} has not {what} within {GREETING_LIMIT:?}"
    );
    Ok(())
}

fn move_all(
    mover: &mut Mover<'_>,
    client: &Client,
    session: &Session,
    block_bytes: u64,
    mut sharers: Vec<Sharer>,
) -> anyhow::Result<Outcome> {
    let input = Input::open(io::stdin(), block_bytes, mover.bell());
    let started = Instant::now();
    let (mut telling, mut looking) = (Every::new(PROGRESS_EVERY), Every::new(LOOK_EVERY));
    mover.move_all(&input, |mover, moved_at| {
        if looking.is_due() {
            mover.check_session()?;
            look_after(mover, &attached(client, session)?, &sharers, moved_at)?;
        }
        if telling.is_due() {
            let bytes = mover.tally().bytes;
            Note::Progress { bytes }.say()?;
        }
        Ok(())
    })?;
    let elapsed = started.elapsed();
    let tally = mover.tally();
    sharers[0].blocks = tally.blocks;
    for (device, served) in sharers[1..].iter_mut().zip(&tally.served) {
        device.blocks = *served;
    }
    let (map_latency_ns, unmap_latency_ns) = mover.latencies();
    Ok(Outcome {
        bytes: tally.bytes,
        blocks: tally.blocks,
        elapsed_ns: nanos(elapsed),
        map_latency_ns,
        unmap_latency_ns,
        sharers,
    })
}

/// Who is attached, as the daemon says: the driver, then every device.
fn find_sharers(
    client: &Client,
    session: &Session,
    rings: &[Ring<'_>],
) -> anyhow::Result<Vec<Sharer>> {
    let attached = attached(client, session)?;
    let mut sessions = vec![session.id()];
    for ring in rings {
        sessions.push(ring.who()?.context("a device took its name back")?);
    }
    let sharer = |session: SessionId| {
        let is_it = |one: &&v1::Session| parse_session(&one.name) == Ok(session);
        let found = attached.iter().find(is_it);
        let found = found.with_context(|| format!("session {session} has ended"))?;
        Ok(Sharer {
            pid: found.peer.as_ref().map_or(0, |peer| peer.pid),
            session: found.name.clone(),
            blocks: 0,
        })
    };
    sessions.into_iter().map(sharer).collect()
}

fn attached(client: &Client, session: &Session) -> anyhow::Result<Vec<v1::Session>> {
    let request = v1::ListSessionsRequest {
        domain: session.domain().name(),
        // More than the demo has processes.
        page_size: 1000,
        page_token: String::new(),
    };
    let mut service = client.sessions();
    let listed = client.block_on(service.list_sessions(request));
    Ok(listed.map_err(Error::from)?.into_inner().sessions)
}

/// Are all of them there, and does whoever has blocks work on them?
fn look_after(
    mover: &Mover<'_>,
    attached: &[v1::Session],
    sharers: &[Sharer],
    moved_at: Instant,
) -> anyhow::Result<()> {
    for sharer in sharers {
        let is_there = attached.iter().any(|one| one.name == sharer.session);
        ensure!(is_there, lost(sharer.pid));
    }
    let pids: Vec<_> = mover.busy().map(|device| sharers[1 + device].pid).collect();
    ensure!(
        pids.is_empty() || moved_at.elapsed() < STALL_LIMIT,
        "devices {pids:?} have done nothing for {STALL_LIMIT:?}"
    );
    Ok(())
}

fn lost(pid: i32) -> String {
    format!("the process with pid {pid} is gone: its session has ended")
}
