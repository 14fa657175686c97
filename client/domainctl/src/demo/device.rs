//! The device process: sees the domain, and nothing else of the driver.

use std::time::Duration;

use anyhow::{Context, bail, ensure};
use clap::Args;
use domain_core::Iova;
use domain_core::session::Role;
use domaind_client::Session;

use super::board::{Board, Done, Job, Ring};
use super::transform::{CHUNK_BYTES, Key};
use super::{ActorArgs, Way};

/// How long to sleep at most before looking whether the session still lives.
pub(super) const IDLE: Duration = Duration::from_millis(100);

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
    let ring = Board::at(&session, Iova::new(args.board)).ring(args.index)?;
    let mut worker = Worker::new(&session, ring, args.index, args.actor.direction);
    ensure!(worker.ring.hello()?, "device {} is there twice", args.index);
    loop {
        if worker.work_on_one()? {
            // There may be more.
        } else if worker.ring.is_stopped()? {
            worker.ring.bye()?;
            return Ok(session.detach()?);
        } else if let Some(ended) = session.is_ended() {
            bail!("device {}: {ended}", args.index);
        } else {
            worker.ring.wait(IDLE)?;
        }
    }
}

/// A device at its ring.
pub(super) struct Worker<'s> {
    session: &'s Session,
    pub(super) ring: Ring<'s>,
    index: u64,
    way: Way,
    chunk: Vec<u8>,
    /// Blocks that it has worked on, and their bytes.
    pub(super) blocks: u64,
    pub(super) bytes: u64,
}

impl<'s> Worker<'s> {
    pub(super) fn new(session: &'s Session, ring: Ring<'s>, index: u64, way: Way) -> Worker<'s> {
        Worker {
            session,
            ring,
            index,
            way,
            chunk: vec![0; CHUNK_BYTES],
            blocks: 0,
            bytes: 0,
        }
    }

    /// Takes the next block and works on it; is there one?
    pub(super) fn work_on_one(&mut self) -> anyhow::Result<bool> {
        let Some(job) = self.ring.take()? else {
            return Ok(false);
        };
        let checksum = self.work(&job)?;
        self.ring.finish(Done {
            block: job.block,
            slot: job.slot,
            checksum: checksum.into(),
        })?;
        self.ring.beat()?;
        self.blocks += 1;
        self.bytes += job.len_bytes;
        Ok(true)
    }

    /// Works on one block where it lies; answers its checksum as it is left.
    fn work(&mut self, job: &Job) -> anyhow::Result<u32> {
        let len =
            usize::try_from(job.len_bytes).context("a block that does not fit into memory")?;
        let key = Key::of(self.index, job.block);
        let (mut came, mut left) = (0, 0);
        for offset in (0..len).step_by(CHUNK_BYTES) {
            let part = &mut self.chunk[..CHUNK_BYTES.min(len - offset)];
            let at = Iova::new(job.iova).checked_add(offset as u64);
            let at = at.context("a block that leaves the address space")?;
            match self.way {
                Way::Both | Way::ToDevice => self.session.read(at, part)?,
                Way::FromDevice => part.fill(0),
            }
            came = crc32c::crc32c_append(came, part);
            if self.way != Way::ToDevice {
                key.apply(offset, part);
                self.session.write(at, part)?;
            }
            left = crc32c::crc32c_append(left, part);
        }
        ensure!(
            self.way == Way::FromDevice || u64::from(came) == job.checksum,
            "block {}: not what the driver has sent (CRC-32C {came:#010x}, it said {:#010x})",
            job.block,
            job.checksum
        );
        Ok(left)
    }
}
