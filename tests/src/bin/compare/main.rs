//! Ours beside its peers, in one process and by turns.
//!
//! No number of a shared machine says anything alone; what counts is the ratio
//! to a peer or a floor that was measured in the same run. So everybody who
//! takes part in a row is set up first, then has a turn in each round, and the
//! one that begins changes from round to round. A value is the median of the
//! turns; percentiles are those of all single operations of all turns.
//! Everybody gets the same random numbers. Peers are used as their own
//! documentation says and built as their own users build them.

mod alloc;
mod allocations;
mod attached;
mod attend;
mod clock;
mod copy;
mod crowd;
mod handover;
mod lease;
mod lookup;
mod memory;
mod mixed;
mod peers;
mod pipeline;
mod random;
mod removal;
mod report;
mod rounds;
mod set_map;
mod translate;
mod unary;
mod update;
mod world;

use std::io;
use std::process::ExitCode;

use clap::Parser;

use crate::attend::Attendance;
use crate::clock::Clock;
use crate::random::SEED;
use crate::report::Report;
use crate::rounds::Scale;

/// Compares domaind's parts with their peers, by turns in one process.
///
/// Each row prints our value, those of the peers and of the floor (the least
/// that the work can cost), the goal and whether it was met in this run. Means
/// come from batches; percentiles from single operations, each between two
/// readings of the clock, less the clock's own cost. Two threads: nanoseconds
/// that each thread waits for one operation. Memory is weighed in child
/// processes: what became resident, of the heap and of memfds. Allocations are
/// counted in one that holds a daemon and its driver.
#[derive(Debug, Parser)]
#[command(name = "compare")]
struct Cli {
    /// One JSON object a line on stdout; the heading goes to stderr.
    #[arg(long)]
    json: bool,
    /// About two minutes instead of twelve.
    #[arg(long)]
    quick: bool,
    /// Only rows whose name contains this.
    #[arg(long, value_name = "FILTER")]
    rows: Option<String>,
    /// What a child process weighs.
    #[arg(long, hide = true)]
    weigh: Option<String>,
    /// What a child process attends.
    #[arg(long, hide = true)]
    attend: Option<String>,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    match run(cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("compare: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(cli: Cli) -> io::Result<()> {
    if let Some(load) = cli.weigh {
        return memory::weigh(&load);
    }
    if let Some(attendance) = cli.attend {
        return Attendance::attend(&attendance);
    }
    let scale = if cli.quick { Scale::QUICK } else { Scale::FULL };
    let clock = Clock::calibrate();
    let report = Report::new(cli.json, cli.rows);
    report.heading(&heading(&scale, clock))?;
    alloc::rows(&report, &scale)?;
    mixed::rows(&report, &scale, clock)?;
    lookup::rows(&report, &scale)?;
    update::rows(&report, &scale)?;
    set_map::rows(&report, &scale)?;
    copy::rows(&report, &scale)?;
    lease::rows(&report, &scale)?;
    translate::rows(&report, &scale)?;
    removal::rows(&report, &scale)?;
    attached::rows(&report, &scale)?;
    unary::rows(&report, &scale)?;
    pipeline::rows(&report, &scale)?;
    handover::rows(&report, &scale)?;
    crowd::rows(&report, &scale)?;
    allocations::rows(&report)?;
    memory::rows(&report)
}

fn heading(scale: &Scale, clock: Clock) -> Vec<String> {
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    let system = rustix::system::uname();
    vec![
        format!(
            "machine: {cores} cores, {} {}, {}; the clock takes {} ns",
            system.sysname().to_string_lossy(),
            system.release().to_string_lossy(),
            system.machine().to_string_lossy(),
            clock.overhead_ns(),
        ),
        format!(
            "method: {} rounds of {:?}, percentiles of {} x {} operations, seed {SEED:#x}",
            scale.rounds, scale.turn, scale.single_rounds, scale.singles,
        ),
    ]
}
