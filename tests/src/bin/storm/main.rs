//! B-06: processes that map, allocate, free and unmap at random, each in its
//! own colour, beside devices that look and write under pins, while one of them
//! is killed every 50 ms. Nobody may ever meet a byte of another's colour, and
//! in the end nothing may be left.
//!
//! The processes are this program, started again with a hidden flag. They
//! report into one file of numbers, which is their standard input: a process
//! that is killed leaves its last numbers there.

mod colour;
mod device;
mod driver;
mod random;
mod storm;
mod tally;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use domaind_client::{EndReason, Error, RuntimeDir, v1};

use crate::tally::Tally;

/// Eight drivers and some devices in one domain, killed at random; what they
/// see of each other, and what is left when all are gone.
#[derive(Clone, Debug, Parser)]
#[command(name = "storm")]
struct Cli {
    /// Drivers at a time.
    #[arg(long, default_value_t = 8, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=64))]
    processes: u32,
    /// Devices at a time, besides.
    #[arg(long, default_value_t = 2, value_name = "N", value_parser = clap::value_parser!(u32).range(0..=64))]
    devices: u32,
    /// How long; 30 unless a number of cycles is given.
    #[arg(long, value_name = "N")]
    seconds: Option<u64>,
    /// How many operations of all drivers together.
    #[arg(long, value_name = "N")]
    cycles: Option<u64>,
    /// Milliseconds between two kills; 0 means none.
    #[arg(long, default_value_t = 50, value_name = "N")]
    kill_every_ms: u64,
    /// Of the random numbers; another one in each run unless given.
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
    /// Fills free memory with poison instead of zeros, so that what should have
    /// been zeroed is seen. What is promised to be zero still has to be.
    #[arg(long)]
    poison: bool,
    /// Milliseconds after which the daemon gives up a session that does not
    /// acknowledge.
    #[arg(long, value_name = "N")]
    ack_timeout_ms: Option<u64>,
    /// Takes the domaind that lies beside this program as it is.
    #[arg(long)]
    no_build: bool,
    /// One JSON object on stdout.
    #[arg(long)]
    json: bool,
    /// What a child process is.
    #[arg(long, hide = true, value_name = "ROLE")]
    child: Option<Role>,
    #[arg(long, hide = true)]
    runtime_dir: Option<PathBuf>,
    /// Its row in the tally.
    #[arg(long, hide = true, default_value_t = 0)]
    row: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Role {
    Driver,
    Device,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let done = match cli.child {
        Some(role) => child(&cli, role).map(|()| ExitCode::SUCCESS),
        None => storm::run(&cli),
    };
    done.unwrap_or_else(|error| {
        eprintln!("storm: {error:#}");
        ExitCode::FAILURE
    })
}

#[tokio::main(flavor = "current_thread")]
async fn child(cli: &Cli, role: Role) -> anyhow::Result<()> {
    let dir = cli.runtime_dir.as_deref().unwrap_or("/".as_ref());
    let dir = RuntimeDir::new(dir)?;
    let mut tally = Tally::inherited(cli.row)?;
    let seed = cli.seed.unwrap_or(0);
    let done = match role {
        Role::Driver => driver::run(&dir, &mut tally, seed).await,
        Role::Device => device::run(&dir, &mut tally, seed).await,
    };
    match done {
        // The storm is over, and the daemon with it.
        Err(error) if tally.is_over() && has_ended(&error) => Ok(()),
        Err(error) => Err(error.context(format!("{role:?} in row {}", cli.row))),
        Ok(()) => Ok(()),
    }
}

fn has_ended(error: &anyhow::Error) -> bool {
    let ended = error.downcast_ref::<Error>();
    matches!(ended, Some(Error::Ended(ended)) if ended.reason != EndReason::Fenced)
}

/// What a refusal was refused for; `Unspecified` for everything else.
fn reason(error: &Error) -> v1::ErrorReason {
    error.reason()
}
