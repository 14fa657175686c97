//! This process as the kernel sees it, under the names that all exporters use.

use std::fs;
use std::time::{SystemTime, UNIX_EPOCH};

use rustix::param::{clock_ticks_per_second, page_size};
use rustix::process::{Resource, getrlimit};

use crate::proc;

/// What is read at one time. What cannot be read is `None`, and is not told.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Process {
    pub(super) resident_bytes: Option<u64>,
    pub(super) virtual_bytes: Option<u64>,
    pub(super) cpu_seconds: Option<f64>,
    pub(super) start_seconds: Option<f64>,
    pub(super) open_fds: usize,
    pub(super) max_fds: Option<u64>,
    pub(super) threads: usize,
}

impl Process {
    pub(super) fn read() -> Process {
        let memory = fs::read_to_string("/proc/self/statm").unwrap_or_default();
        let pages = |field| Some(number(&memory, field)? * page_size() as u64);
        let stat = fs::read_to_string("/proc/self/stat").unwrap_or_default();
        // The command may contain anything; fields behind it begin with the third.
        let behind = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
        let ticks = |field: usize| number(behind, field - 3);
        Process {
            virtual_bytes: pages(0),
            resident_bytes: pages(1),
            cpu_seconds: ticks(14).zip(ticks(15)).map(|(u, s)| seconds(u + s)),
            start_seconds: ticks(22).and_then(since_1970),
            open_fds: proc::open_fds(),
            max_fds: getrlimit(Resource::Nofile).current,
            threads: proc::threads(),
        }
    }
}

fn number(text: &str, field: usize) -> Option<u64> {
    text.split_ascii_whitespace().nth(field)?.parse().ok()
}

#[expect(clippy::cast_precision_loss, reason = "seconds for people")]
fn seconds(ticks: u64) -> f64 {
    ticks as f64 / clock_ticks_per_second() as f64
}

/// From a time since boot.
fn since_1970(ticks: u64) -> Option<f64> {
    let uptime = fs::read_to_string("/proc/uptime").ok()?;
    let uptime: f64 = uptime.split_ascii_whitespace().next()?.parse().ok()?;
    let now = SystemTime::now().duration_since(UNIX_EPOCH).ok()?;
    Some(now.as_secs_f64() - uptime + seconds(ticks))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_began_a_while_ago_and_uses_something() {
        let process = Process::read();
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
        let age = now.as_secs_f64() - process.start_seconds.unwrap();
        assert!((-1.0..600.0).contains(&age), "{age}");
        let resident = process.resident_bytes.unwrap();
        assert!((100_000..process.virtual_bytes.unwrap()).contains(&resident));
        assert!(process.open_fds > 2 && process.threads > 0);
        assert!(process.cpu_seconds.unwrap() < 600.0);
    }
}
