//! The device process: sees the domain, and nothing else of the driver.

use std::time::Duration;

use anyhow::{Context, bail};
use clap::Args;
use domain_core::Iova;
use domain_core::session::Role;
use domaind_client::Session;

use super::board::{Board, Done, Job};
use super::transform::{CHUNK_BYTES, Key};
use super::{ActorArgs, Way};

/// How long to sleep at most before looking whether the session still lives.
const IDLE: Duration = Duration::from_millis(100);

/// What a device process is told.
#[derive(Clone, Debug, Args)]
pub(crate) struct DeviceArgs {
    #[command(flatten)]
    actor: ActorArgs,
    #[arg(long)]
    index: u64,
    #[arg(long)]
    board: u64,
}

/// Works on blocks until the driver says stop.
pub(crate) fn run(args: &DeviceArgs) -> anyhow::Result<()> {
    let (_client, session) = args.actor.attach(Role::Device)?;
    let mut ring = Board::at(&session, Iova::new(args.board)).ring(args.index)?;
    ring.hello()?;
    let mut chunk = vec![0; CHUNK_BYTES];
    loop {
        if let Some(job) = ring.take()? {
            let key = Key::of(args.index, job.block);
            let checksum = work(&session, &job, key, args.actor.direction, &mut chunk)?;
            ring.finish(Done {
                block: job.block,
                slot: job.slot,
                checksum: checksum.into(),
            })?;
        } else if ring.is_stopped()? {
            ring.bye()?;
            return Ok(session.detach()?);
        } else if let Some(ended) = session.is_ended() {
            bail!("device {}: {ended}", args.index);
        } else {
            ring.wait(IDLE)?;
        }
    }
}

/// Works on one block where it lies; answers its checksum as it is left.
fn work(session: &Session, job: &Job, key: Key, way: Way, chunk: &mut [u8]) -> anyhow::Result<u32> {
    let len = usize::try_from(job.len_bytes).context("a block that does not fit into memory")?;
    let mut checksum = 0;
    for offset in (0..len).step_by(CHUNK_BYTES) {
        let part = &mut chunk[..CHUNK_BYTES.min(len - offset)];
        let at = Iova::new(job.iova).checked_add(offset as u64);
        let at = at.context("a block that leaves the address space")?;
        match way {
            Way::Both | Way::ToDevice => session.read(at, part)?,
            Way::FromDevice => part.fill(0),
        }
        if way != Way::ToDevice {
            key.apply(offset, part);
            session.write(at, part)?;
        }
        checksum = crc32c::crc32c_append(checksum, part);
    }
    Ok(checksum)
}
