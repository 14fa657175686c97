//! What the bench says at its end: a picture for people, one object for
//! programs.

use std::fmt::Write;
use std::io;

use serde::Serialize;

use super::BenchArgs;
use super::latency::{Latencies, Step};
use super::turns::Measured;
use crate::cli::{Format, Global};
use crate::exit::Exit;
use crate::failure::Failure;
use crate::output::Printer;
use domaind_proto::size::human;

/// Lines of the picture at most, and how wide its widest is.
const STEPS: usize = 16;
const BAR_WIDTH: usize = 40;

/// The object of `-o json`. Its keys are stable.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    scenario: String,
    threads: u64,
    size_bytes: u64,
    seconds: f64,
    ops_per_second: f64,
    ns_per_op: Percentiles,
    floor: Floor,
    /// Our median by the floor's.
    ratio: f64,
    /// What only people are shown.
    #[serde(skip)]
    extra: Extra,
}

#[derive(Clone, Copy, Debug, Serialize)]
struct Percentiles {
    p50: f64,
    p99: f64,
    p999: f64,
}

#[derive(Debug, Serialize)]
struct Floor {
    name: &'static str,
    /// Its median.
    ns_per_op: f64,
}

#[derive(Debug)]
struct Extra {
    /// Whose numbers these are.
    daemon: String,
    operation: &'static str,
    batch: usize,
    floor: Percentiles,
    steps: Vec<Step>,
}

impl Percentiles {
    fn of(latencies: &Latencies) -> Percentiles {
        let ns = |share| rounded(latencies.quantile_ns(share), 10.0);
        Percentiles {
            p50: ns(0.5),
            p99: ns(0.99),
            p999: ns(0.999),
        }
    }
}

impl Report {
    pub(super) fn new(args: &BenchArgs, daemon: String, measured: &Measured) -> Report {
        let Measured { ours, floor, .. } = measured;
        let facts = args.scenario.facts();
        let of_floor = Percentiles::of(floor);
        Report {
            scenario: args.scenario.name(),
            threads: args.threads,
            size_bytes: args.size,
            seconds: args.seconds.as_secs_f64(),
            ops_per_second: rounded(measured.ops_per_second, 10.0),
            ns_per_op: Percentiles::of(ours),
            floor: Floor {
                name: facts.floor,
                ns_per_op: of_floor.p50,
            },
            ratio: rounded(ours.quantile_ns(0.5) / floor.quantile_ns(0.5), 1000.0),
            extra: Extra {
                daemon,
                operation: facts.operation,
                batch: facts.batch,
                floor: of_floor,
                steps: ours.steps(STEPS),
            },
        }
    }

    /// Prints it as `-o` says.
    pub(super) fn print(&self, global: &Global) -> Result<(), Failure> {
        let text = match global.output {
            Format::Table | Format::Wide => self.text(),
            Format::Json => serde_json::to_string_pretty(self).map_err(cannot_print)? + "\n",
            Format::Yaml => serde_saphyr::to_string(self).map_err(cannot_print)?,
            Format::Name => format!("{}\n", self.scenario),
        };
        let mut out = Printer::new(io::stdout().lock());
        out.text(&text)
            .and_then(|()| out.finish())
            .map_err(cannot_print)
    }

    fn text(&self) -> String {
        let Extra {
            daemon,
            operation,
            batch,
            floor,
            steps,
        } = &self.extra;
        let mut lines = vec![
            format!(
                "{:<12}{operation}, {}, {}, {} s, against {daemon}",
                self.scenario,
                human(self.size_bytes),
                threads(self.threads),
                self.seconds
            ),
            format!("{:<12}{:>10}{:>10}{:>10}", "", "p50", "p99", "p99.9"),
            format!("{:<12}{}", "domaind", self.ns_per_op.text()),
            format!("{:<12}{}  {}", "floor", floor.text(), self.floor.name),
            format!("{:<12}{:>9.2}x  by the medians", "ratio", self.ratio),
            format!("{:<12}{:>10.0}  a second", "rate", self.ops_per_second),
            String::new(),
        ];
        lines.extend(bars(steps));
        if *batch > 1 {
            lines.push(format!(
                "\nThe clock was read once in {batch} operations: these are means of so many."
            ));
        }
        lines.iter().fold(String::new(), |mut text, line| {
            // Writing to a string does not fail.
            let _ = writeln!(text, "{line}");
            text
        })
    }
}

impl Percentiles {
    fn text(self) -> String {
        let Percentiles { p50, p99, p999 } = self;
        let [p50, p99, p999] = [p50, p99, p999].map(human_ns);
        format!("{p50:>10}{p99:>10}{p999:>10}")
    }
}

fn bars(steps: &[Step]) -> impl Iterator<Item = String> {
    let widest = steps.iter().map(|step| step.share).fold(0.0, f64::max);
    steps.iter().map(move |step| {
        let share = step.share * 100.0;
        let width = step.share / widest * BAR_WIDTH as f64;
        let bar: String = (0..BAR_WIDTH)
            .take_while(|place| (*place as f64) < width)
            .map(|_| '#')
            .collect();
        let line = format!("from {:>9} {share:>5.1} %  {bar}", human_ns(step.from_ns));
        line.trim_end().to_owned()
    })
}

/// `5.1 ns`, `93.2 us`.
fn human_ns(ns: f64) -> String {
    let units = [(1e9, "s"), (1e6, "ms"), (1e3, "us")];
    // What would be rounded to a thousand is one of the next unit.
    let unit = units.iter().find(|(size, _)| ns >= size * 0.999_95);
    let (size, unit) = unit.copied().unwrap_or((1.0, "ns"));
    format!("{:.1} {unit}", ns / size)
}

fn threads(count: u64) -> String {
    match count {
        1 => "1 thread".to_owned(),
        count => format!("{count} threads"),
    }
}

/// To so many parts of one.
fn rounded(value: f64, parts: f64) -> f64 {
    (value * parts).round() / parts
}

fn cannot_print(error: impl std::error::Error) -> Failure {
    Failure::of(Exit::Error, &error)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use serde_json::json;

    use super::super::Scenario;
    use super::super::latency::Lap;
    use super::*;

    /// So many that each took so long.
    fn latencies(of_each: &[(u64, u64)]) -> Latencies {
        let mut latencies = Latencies::new();
        for (count, nanos) in of_each {
            for _ in 0..*count {
                let took = Duration::from_nanos(*nanos);
                latencies.record(Lap { took, ops: 1 });
            }
        }
        latencies
    }

    fn report(scenario: Scenario) -> Report {
        let args = BenchArgs {
            scenario,
            threads: 2,
            size: 4096,
            seconds: Duration::from_millis(500),
        };
        let measured = Measured {
            ours: latencies(&[(90, 1_000), (9, 2_000), (1, 4_000)]),
            floor: latencies(&[(100, 500)]),
            ops_per_second: 1234.56,
        };
        Report::new(&args, "a daemon".to_owned(), &measured)
    }

    #[test]
    fn the_object_has_these_keys_and_no_others() {
        let object = serde_json::to_value(report(Scenario::Map)).unwrap();

        let wanted = json!({
            "scenario": "map",
            "threads": 2,
            "size_bytes": 4096,
            "seconds": 0.5,
            "ops_per_second": 1234.6,
            "ns_per_op": {"p50": 1000.4, "p99": 2000.9, "p999": 4001.8},
            "floor": {"name": "empty RPC x 2", "ns_per_op": 500.2},
            "ratio": 2.0,
        });
        assert_eq!(object, wanted);
    }

    #[test]
    fn people_see_both_beside_each_other_and_a_picture() {
        let text = report(Scenario::Map).text();

        for word in [
            "4 KiB, 2 threads, 0.5 s, against a daemon",
            "2.00x",
            "p99.9",
        ] {
            assert!(text.contains(word), "{word} in {text}");
        }
        let row = |name: &str| {
            let row = text.lines().find(|line| line.starts_with(name));
            row.unwrap_or_else(|| panic!("{name} in {text}")).to_owned()
        };
        assert!(row("domaind").contains("1.0 us    2.0 us    4.0 us"));
        assert!(row("floor").contains("500.2 ns") && row("floor").ends_with("empty RPC x 2"));
        let widest = "#".repeat(BAR_WIDTH);
        let is_widest = |line: &&str| line.contains(" 90.0 %") && line.ends_with(&widest);
        assert_eq!(text.lines().filter(is_widest).count(), 1, "{text}");
        assert!(text.lines().count() <= 7 + STEPS && !text.contains("means of so many"));
    }

    #[test]
    fn what_was_timed_in_batches_says_so() {
        let text = report(Scenario::Translate).text();
        assert!(text.contains("once in 1000 operations"), "{text}");
    }

    #[test]
    fn times_are_said_in_the_unit_that_fits() {
        let table = [
            (0.0, "0.0 ns"),
            (5.14, "5.1 ns"),
            (999.9, "999.9 ns"),
            (999.96, "1.0 us"),
            (93_210.0, "93.2 us"),
            (4.0e6, "4.0 ms"),
            (2.5e9, "2.5 s"),
        ];
        for (ns, text) in table {
            assert_eq!(human_ns(ns), text);
        }
    }
}
