//! `domainctl demo`: a file goes through a domain, across real processes.
//!
//! This process only arranges and watches. The driver and the devices are
//! processes of their own (this program again, with hidden commands), each of
//! which attaches by itself and touches nothing but its session:
//!
//! ```text
//! FILE -> driver: memory of its own -> [driver copies] -> leased bounce memory
//!                                                           | in place
//!         driver: compares, undoes  <- [driver copies] <- devices
//!                       ^--- rings in coherent memory ---^
//! ```
//!
//! With `--role` it is one half of that ([`half`]): a driver or a device of a
//! domain that is there, which finds the other half in the domain's memory alone.
//!
//! With `--calls` the daemon copies, from and to registered memory, and is asked
//! twice for each block.

mod arrange;
mod board;
mod carrier;
mod device;
mod driver;
mod half;
mod input;
mod mover;
mod notes;
mod report;
mod transform;

use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::{Args, ValueEnum};
use domain_core::Direction;
use domain_core::region::Access;
use domain_core::session::Role;
use domaind_client::blocking::{Client, Session};
use domaind_proto::names::DomainId;
use domaind_proto::paths::RuntimeDir;
use tokio::signal::unix::{SignalKind, signal};

use crate::cli::Global;
use crate::exit::Exit;
use crate::failure::Failure;
use domaind_proto::size;

pub(crate) use self::device::DeviceArgs;
pub(crate) use self::driver::DriverArgs;
use self::half::HalfArgs;

/// Blocks above this would not leave the driver's memory bounded.
const BLOCK_BYTES_MOST: u64 = 16 << 20;
const DEVICES_MOST: u64 = board::SEATS_MOST;
/// Without `--role`.
const DEVICES: u64 = 2;

/// What to move, and how.
#[derive(Clone, Debug, Args)]
pub(crate) struct DemoArgs {
    /// The file, or - for standard input; a device needs none
    #[arg(value_name = "FILE")]
    file: Option<std::path::PathBuf>,
    /// How many device processes share the domain; unset: 2, with --role 1
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=DEVICES_MOST))]
    devices: Option<u64>,
    /// How many bytes are mapped at a time, at most 16MiB
    #[arg(long, value_name = "SIZE", default_value = "64KiB", value_parser = block_bytes)]
    block: u64,
    /// Which way the bytes travel
    #[arg(long, value_enum, default_value_t)]
    direction: Way,
    #[command(flatten)]
    copying: Copying,
    #[command(flatten)]
    half: HalfArgs,
}

impl DemoArgs {
    fn devices(&self) -> u64 {
        let alone = match self.half.role {
            None => DEVICES,
            Some(_) => 1,
        };
        self.devices.unwrap_or(alone)
    }

    /// What is needed of all but devices.
    fn file(&self) -> Result<&std::path::Path, Failure> {
        self.file
            .as_deref()
            .ok_or_else(|| Failure::new(Exit::Usage, "which FILE? (only --role device needs none)"))
    }
}

/// Who copies the blocks.
#[derive(Clone, Copy, Debug, Args)]
struct Copying {
    /// The daemon copies each block, asked by a call to map it and another one to
    /// unmap it; else the driver copies by itself, in memory that it leased once
    #[arg(long)]
    calls: bool,
    /// The driver copies by itself, which is the default
    #[arg(long, conflicts_with = "calls")]
    lease: bool,
}

impl Copying {
    fn is_by_driver(self) -> bool {
        !self.calls
    }
}

/// Which way the bytes of a mapping travel. The numbers stand in memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum Way {
    /// Devices transform the blocks in place
    #[default]
    Both,
    /// Devices only read and checksum
    ToDevice,
    /// Devices write a pattern of their own
    FromDevice,
}

impl Way {
    /// As it stands on a board.
    fn code(self) -> u64 {
        self as u64
    }

    fn of_code(code: u64) -> Option<Way> {
        let ways = [Way::Both, Way::ToDevice, Way::FromDevice];
        ways.into_iter().find(|way| way.code() == code)
    }
}

impl From<Way> for Direction {
    fn from(way: Way) -> Direction {
        match way {
            Way::Both => Direction::Bidirectional,
            Way::ToDevice => Direction::ToDevice,
            Way::FromDevice => Direction::FromDevice,
        }
    }
}

/// What both kinds of process of the demo are told.
#[derive(Clone, Debug, Args)]
struct ActorArgs {
    #[arg(long)]
    dir: std::path::PathBuf,
    #[arg(long)]
    domain: String,
    #[arg(long)]
    parent: i32,
    #[arg(long, value_enum)]
    direction: Way,
}

impl ActorArgs {
    /// Makes this process a session of the demo's domain, for as long as the
    /// one that started it lives.
    fn attach(&self, role: Role) -> anyhow::Result<(Client, Session)> {
        die_with_parent(self.parent)?;
        let client = Client::connect(&RuntimeDir::new(&self.dir)?)?;
        let domain = DomainId::parse(&self.domain)?;
        let session = client.attach(&domain, role, Access::ReadWrite)?;
        Ok((client, session))
    }
}

/// Runs the demo.
pub(crate) async fn run(args: DemoArgs, global: &Global) -> Result<ExitCode, Failure> {
    if args.half.role.is_some() {
        return half::run(args, global).await;
    }
    let report = arrange::run(&args, args.file()?, global).await?;
    report.print(global)?;
    Ok(Exit::Ok.into())
}

/// Runs the driver, on a thread that may block.
pub(crate) async fn driver(args: DriverArgs) -> Result<ExitCode, Failure> {
    on_a_thread(move || driver::run(&args)).await
}

/// Runs one device, on a thread that may block.
pub(crate) async fn device(args: DeviceArgs) -> Result<ExitCode, Failure> {
    on_a_thread(move || device::run(&args)).await
}

async fn on_a_thread(
    work: impl FnOnce() -> anyhow::Result<()> + Send + 'static,
) -> Result<ExitCode, Failure> {
    // A terminal's Ctrl-C reaches everybody; whoever arranged this one decides.
    let _unheard =
        signal(SignalKind::interrupt()).map_err(|error| Failure::of(Exit::Error, &error))?;
    let done = tokio::task::spawn_blocking(work).await;
    done.map_err(|panic| Failure::of(Exit::Error, &panic))??;
    Ok(Exit::Ok.into())
}

/// Says when it is time again.
#[derive(Debug)]
struct Every {
    period: Duration,
    last: Instant,
}

impl Every {
    fn new(period: Duration) -> Every {
        let last = Instant::now();
        Every { period, last }
    }

    fn is_due(&mut self) -> bool {
        let is_due = self.last.elapsed() >= self.period;
        if is_due {
            self.last = Instant::now();
        }
        is_due
    }
}

fn block_bytes(text: &str) -> Result<u64, String> {
    let bytes = size::parse(text).map_err(|error| error.to_string())?;
    if !(1..=BLOCK_BYTES_MOST).contains(&bytes) {
        return Err(format!(
            "{bytes} bytes; a block has 1 to {BLOCK_BYTES_MOST}"
        ));
    }
    Ok(bytes)
}

/// A child that outlives who started it would serve nobody.
fn die_with_parent(parent: i32) -> anyhow::Result<()> {
    rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL))?;
    // It may have died before the line above.
    let now = rustix::process::getppid().map(|pid| pid.as_raw_nonzero().get());
    anyhow::ensure!(
        now == Some(parent),
        "the process that started this one has ended"
    );
    Ok(())
}
