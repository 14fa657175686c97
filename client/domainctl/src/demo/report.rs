//! What the demo says at its end: a table for people, one object for programs.

use std::fmt::Write;
use std::io;
use std::path::Path;

use domaind_client::v1;
use serde::Serialize;

use super::DemoArgs;
use super::notes::{Latency, Outcome, Sharer};
use crate::cli::{Format, Global};
use crate::exit::Exit;
use crate::failure::Failure;
use crate::output::Printer;
use domaind_proto::size::human;

/// The object of `-o json`. Its keys are stable.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    verified: bool,
    /// The driver copied by itself, in leased memory.
    lease: bool,
    bytes: u64,
    blocks: u64,
    driver_pids: Vec<i32>,
    device_pids: Vec<i32>,
    maps_per_second: f64,
    throughput_bytes_per_second: f64,
    map_latency_ns: Latency,
    domain: DomainPart,
    per_device: Vec<DevicePart>,
    /// What only people are shown.
    #[serde(skip)]
    extra: Extra,
}

#[derive(Debug, Serialize)]
struct DomainPart {
    name: String,
    bounce_bytes: u64,
    coherent_bytes: u64,
}

#[derive(Debug, Serialize)]
struct DevicePart {
    pid: i32,
    blocks: u64,
}

#[derive(Debug)]
struct Extra {
    file: String,
    block_bytes: u64,
    direction: String,
    unmap_latency_ns: Latency,
    bounce: String,
    coherent: String,
    sharers: Vec<Sharer>,
}

impl Report {
    /// Only what was verified becomes a report.
    pub(crate) fn new(args: &DemoArgs, domain: &v1::Domain, outcome: Outcome) -> Report {
        let (drivers, devices) = outcome.sharers.split_at(1);
        let pids = |sharers: &[Sharer]| sharers.iter().map(|sharer| sharer.pid).collect();
        let per_second = |count: u64| rate(count, outcome.elapsed_ns);
        Report {
            verified: true,
            lease: args.copying.is_by_driver(),
            bytes: outcome.bytes,
            blocks: outcome.blocks,
            driver_pids: pids(drivers),
            device_pids: pids(devices),
            maps_per_second: per_second(outcome.blocks),
            throughput_bytes_per_second: per_second(outcome.bytes),
            map_latency_ns: outcome.map_latency_ns,
            domain: DomainPart {
                name: domain.name.clone(),
                bounce_bytes: domain.bounce_bytes,
                coherent_bytes: domain.coherent_bytes,
            },
            per_device: devices
                .iter()
                .map(|device| DevicePart {
                    pid: device.pid,
                    blocks: device.blocks,
                })
                .collect(),
            extra: Extra {
                file: args
                    .file
                    .as_deref()
                    .unwrap_or(Path::new("-"))
                    .display()
                    .to_string(),
                block_bytes: args.block,
                direction: domain_core::Direction::from(args.direction).to_string(),
                unmap_latency_ns: outcome.unmap_latency_ns,
                bounce: range(domain.bounce),
                coherent: range(domain.coherent),
                sharers: outcome.sharers,
            },
        }
    }

    /// Prints it as `-o` says.
    pub(crate) fn print(&self, global: &Global) -> Result<(), Failure> {
        let text = match global.output {
            Format::Table | Format::Wide => self.text(),
            Format::Json => serde_json::to_string_pretty(self).map_err(cannot_print)? + "\n",
            Format::Yaml => serde_saphyr::to_string(self).map_err(cannot_print)?,
            Format::Name => format!("{}\n", self.domain.name),
        };
        let mut out = Printer::new(io::stdout().lock());
        out.text(&text)
            .and_then(|()| out.finish())
            .map_err(cannot_print)
    }

    fn text(&self) -> String {
        let Extra {
            file,
            block_bytes,
            direction,
            ..
        } = &self.extra;
        let mut text = String::new();
        let mut line = |label: &str, value: String| {
            // Writing to a string does not fail.
            let _ = writeln!(text, "{label:<12}{value}");
        };
        line(
            "file",
            format!(
                "{file}: {} bytes, {} {} of up to {}",
                self.bytes,
                self.blocks,
                if self.blocks == 1 { "block" } else { "blocks" },
                human(*block_bytes)
            ),
        );
        line("verified", verdict(direction).to_owned());
        line("copied by", copier(self.lease).to_owned());
        line("domain", self.domain.name.clone());
        line(
            "  bounce",
            format!(
                "{} at {}",
                human(self.domain.bounce_bytes),
                self.extra.bounce
            ),
        );
        line(
            "  coherent",
            format!(
                "{} at {}",
                human(self.domain.coherent_bytes),
                self.extra.coherent
            ),
        );
        line(
            "shared by",
            "PID        SESSION        ROLE      BLOCKS".to_owned(),
        );
        for (number, sharer) in self.extra.sharers.iter().enumerate() {
            let role = if number == 0 { "driver" } else { "device" };
            line(
                "",
                format!(
                    "{:<11}{:<15}{role:<10}{}",
                    sharer.pid, sharer.session, sharer.blocks
                ),
            );
        }
        if self.blocks > 0 {
            line(
                "throughput",
                format!(
                    "{}/s, {:.0} maps/s",
                    human_rate(self.throughput_bytes_per_second),
                    self.maps_per_second
                ),
            );
            line("map", latency(self.map_latency_ns));
            line("unmap", latency(self.extra.unmap_latency_ns));
        }
        text
    }
}

fn copier(lease: bool) -> &'static str {
    match lease {
        true => "the driver, in memory it leased once: 0 calls to the daemon per block",
        false => "the daemon, from registered memory: 2 calls per block, Map and Unmap",
    }
}

pub(super) fn verdict(direction: &str) -> &'static str {
    match direction {
        "TO_DEVICE" => "every device saw exactly the file's bytes",
        "FROM_DEVICE" => "every block came back as its device wrote it",
        _ => "every block came back transformed, and undone it is the file",
    }
}

fn rate(count: u64, elapsed_ns: u64) -> f64 {
    if elapsed_ns == 0 {
        0.0
    } else {
        count as f64 * 1e9 / elapsed_ns as f64
    }
}

/// Whole bytes are exact enough for a rate.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a rate is not negative"
)]
fn human_rate(bytes_per_second: f64) -> String {
    human(bytes_per_second as u64)
}

fn latency(latency: Latency) -> String {
    let micros = |ns: u64| ns as f64 / 1e3;
    let Latency { p50, p99, max } = latency;
    format!(
        "p50 {:.0} us, p99 {:.0} us, max {:.0} us",
        micros(p50),
        micros(p99),
        micros(max)
    )
}

fn range(range: Option<v1::IovaRange>) -> String {
    range
        .map(|range| format!("[{:#x}, {:#x}]", range.start, range.last))
        .unwrap_or_default()
}

fn cannot_print(error: impl std::error::Error) -> Failure {
    Failure::of(Exit::Error, &error)
}
