//! `domainctl bench`: what the daemon's work costs on this machine, and beside
//! each number the least that it could cost here.
//!
//! Each scenario is a file: what one thread of it does, and its floor. A new one
//! is a file, a name in [`Scenario`], and a line in its two tables.

mod arrange;
mod attach;
mod echo;
mod invalidate;
mod latency;
mod lease;
mod map;
mod party;
mod pipeline;
mod report;
mod translate;
mod turns;

use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, ValueEnum};

use self::party::Place;
use self::turns::Work;
use crate::cli::Global;
use crate::exit::Exit;
use crate::failure::Failure;
use domaind_proto::size::{self, human};

/// Each has a session of its own.
const THREADS_MOST: u64 = 64;
const SECONDS_MOST: f64 = 3600.0;
/// Apertures of the domain, where a scenario needs no more.
const BOUNCE_BYTES: u64 = 1 << 20;
const COHERENT_BYTES: u64 = 1 << 20;

/// What to measure, and for how long.
#[derive(Clone, Debug, Args)]
pub(crate) struct BenchArgs {
    /// Which operation
    #[arg(long, value_enum, default_value_t)]
    scenario: Scenario,
    /// How many threads do it at the same time, each with a session and a
    /// connection of its own
    #[arg(long, value_name = "N", default_value_t = 1, allow_negative_numbers = true, value_parser = clap::value_parser!(u64).range(1..=THREADS_MOST))]
    threads: u64,
    /// Length of the buffer (map, lease, pipeline), of each address range (translate), of the
    /// mapping, in whole pages (invalidate); attach does not use it
    #[arg(long, value_name = "SIZE", default_value = "4KiB", value_parser = size::parse)]
    size: u64,
    /// For how long, half of it for the floor; fractions are fine
    #[arg(long, value_name = "S", default_value = "5", allow_negative_numbers = true, value_parser = seconds)]
    seconds: Duration,
}

/// What can be measured.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum Scenario {
    /// Map and unmap a buffer, one call each; the floor: two empty calls
    #[default]
    Map,
    /// Map and unmap buffers on one pipeline, 8 batches of 64 in flight, copies
    /// included; a time is that of 32 batches by their entries; the floor: a
    /// raw socket's echo that copies as much
    Pipeline,
    /// Pin, translate and unpin; the floor: a flat table
    Translate,
    /// Map and unmap a buffer in leased memory, without a call; the floor:
    /// memcpy
    Lease,
    /// Become a session, with all memory mapped; the floor: a raw socket
    Attach,
    /// End a mapping while a session holds pins; the floor: a socket's round
    /// trip
    Invalidate,
}

/// What is to be known of a scenario before it runs.
#[derive(Clone, Copy, Debug)]
struct Facts {
    /// For people.
    operation: &'static str,
    /// What the floor is.
    floor: &'static str,
    /// What `--size` may be at most, in bytes.
    size_bytes_most: u64,
    /// How many operations lie between two readings of the clock.
    batch: usize,
    /// How large the bounce aperture has to be, for so many threads and bytes.
    bounce_bytes: fn(u64, u64) -> u64,
}

impl Scenario {
    fn facts(self) -> Facts {
        match self {
            Scenario::Map => map::FACTS,
            Scenario::Pipeline => pipeline::FACTS,
            Scenario::Translate => translate::FACTS,
            Scenario::Lease => lease::FACTS,
            Scenario::Attach => attach::FACTS,
            Scenario::Invalidate => invalidate::FACTS,
        }
    }

    /// Sets everything up; what each thread is to do.
    fn crew(self, place: &Place) -> anyhow::Result<Vec<Box<dyn Work>>> {
        match self {
            Scenario::Map => map::crew(place),
            Scenario::Pipeline => pipeline::crew(place),
            Scenario::Translate => translate::crew(place),
            Scenario::Lease => lease::crew(place),
            Scenario::Attach => attach::crew(place),
            Scenario::Invalidate => invalidate::crew(place),
        }
    }

    /// As it is typed.
    fn name(self) -> String {
        let value = self.to_possible_value();
        let value = value.expect("every scenario has a name");
        value.get_name().to_owned()
    }
}

/// Measures, and says what it found.
pub(crate) async fn run(args: BenchArgs, global: &Global) -> Result<ExitCode, Failure> {
    args.check()?;
    let report = arrange::run(&args, global).await?;
    report.print(global)?;
    Ok(Exit::Ok.into())
}

impl BenchArgs {
    /// What no option can say of itself.
    fn check(&self) -> Result<(), Failure> {
        let most = self.scenario.facts().size_bytes_most;
        if (1..=most).contains(&self.size) {
            return Ok(());
        }
        let (size, scenario) = (self.size, self.scenario.name());
        let text = format!(
            "--size {size}: {scenario} takes 1 to {most} bytes ({})",
            human(most)
        );
        Err(Failure::new(Exit::Usage, text))
    }
}

fn seconds(text: &str) -> Result<Duration, String> {
    let seconds: f64 = text
        .parse()
        .map_err(|_| "not a number of seconds (5, 0.5)".to_owned())?;
    // Too short for the clock is nothing, too. What is no number is not in any range.
    let length = Duration::try_from_secs_f64(seconds).unwrap_or_default();
    match length > Duration::ZERO && seconds <= SECONDS_MOST {
        true => Ok(length),
        false => Err(format!(
            "{seconds} is not more than 0 and at most {SECONDS_MOST} seconds"
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seconds_may_be_a_fraction_but_not_nothing_and_not_forever() {
        assert_eq!(seconds("5"), Ok(Duration::from_secs(5)));
        assert_eq!(seconds("0.25"), Ok(Duration::from_millis(250)));
        for wrong in ["0", "-1", "0.0", "1e-12", "3601", "inf", "nan", "1e300"] {
            let refused = seconds(wrong).unwrap_err();
            assert!(refused.contains("3600"), "{wrong}: {refused}");
        }
        assert!(seconds("soon").is_err());
    }

    #[test]
    fn a_size_that_a_scenario_cannot_take_is_refused_with_the_numbers() {
        for scenario in Scenario::value_variants() {
            let most = scenario.facts().size_bytes_most;
            let check = |size| {
                let args = BenchArgs {
                    scenario: *scenario,
                    threads: 1,
                    size,
                    seconds: Duration::from_secs(1),
                };
                args.check()
            };
            assert!(check(1).is_ok() && check(most).is_ok());
            for size in [0, most + 1] {
                let refused = check(size).unwrap_err();
                assert_eq!(refused.exit(), Exit::Usage);
                let text = refused.to_string();
                assert!(text.contains(&size.to_string()) && text.contains(&most.to_string()));
            }
        }
    }
}
