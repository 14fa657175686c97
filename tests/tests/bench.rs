//! `domainctl bench`: short runs of every scenario, and what they leave: nothing.

use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use domaind_tests::ctl::{self, Output};
use domaind_tests::{Ctl, Node, children, wait};
use rustix::process::Signal;
use serde_json::Value;
use tempfile::TempDir;

/// Every scenario, and the name of its floor.
const SCENARIOS: [(&str, &str); 6] = [
    ("map", "empty RPC x 2"),
    ("pipeline", "raw socket echo x 2 and pread, batched alike"),
    ("lease", "memcpy"),
    ("translate", "flat table lookup"),
    ("attach", "raw connect, 2 fds, 2 mmaps"),
    ("invalidate", "socket round trip"),
];

/// Where a bench works: the directory of its temporary files.
struct Stage {
    tmp: TempDir,
}

impl Stage {
    fn new() -> Stage {
        let tmp = tempfile::Builder::new()
            .prefix("domaind-b")
            .tempdir_in("/tmp");
        Stage {
            tmp: tmp.expect("a temporary directory"),
        }
    }

    fn command(&self, ctl: &Ctl, line: &[&str]) -> Command {
        let mut command = ctl.command(&[&["bench"], line].concat());
        command.env("TMPDIR", self.tmp.path());
        command
    }

    fn run(&self, ctl: &Ctl, line: &[&str]) -> Output {
        let output = ctl::finish(ctl::start(self.command(ctl, line)));
        self.assert_clean();
        output
    }

    /// Measures for a moment; what it found, and what it said on stderr.
    #[track_caller]
    fn measure(&self, ctl: &Ctl, line: &[&str]) -> (Value, String) {
        let line = [line, &["--seconds", "0.1", "-o", "json"]].concat();
        let output = self.run(ctl, &line);
        assert_eq!(output.code, 0, "{line:?}: {output:?}");
        let found = serde_json::from_str(&output.stdout);
        let found = found.unwrap_or_else(|error| panic!("{error}: {output:?}"));
        (found, output.stderr)
    }

    #[track_caller]
    fn assert_clean(&self) {
        let left: Vec<_> = self.files().collect();
        assert!(left.is_empty(), "left behind: {left:?}");
    }

    fn files(&self) -> impl Iterator<Item = PathBuf> {
        let entries = fs::read_dir(self.tmp.path()).unwrap().flatten();
        entries.map(|entry| entry.path())
    }
}

/// It has exactly the keys that are promised, and its numbers agree.
#[track_caller]
fn check(found: &Value, scenario: &str, floor: &str, (threads, size): (u64, u64)) {
    assert_keys(
        found,
        &[
            "scenario",
            "threads",
            "size_bytes",
            "seconds",
            "ops_per_second",
            "ns_per_op",
            "floor",
            "ratio",
        ],
    );
    assert_keys(&found["ns_per_op"], &["p50", "p99", "p999"]);
    assert_keys(&found["floor"], &["name", "ns_per_op"]);
    assert_eq!(found["scenario"], scenario);
    assert_eq!(found["threads"], threads);
    assert_eq!(found["size_bytes"], size);
    assert_eq!(found["seconds"], 0.1);
    assert_eq!(found["floor"]["name"], floor);
    let number = |value: &Value| {
        let number = value
            .as_f64()
            .unwrap_or_else(|| panic!("{value} in {found}"));
        assert!(number.is_finite() && number > 0.0, "{value} in {found}");
        number
    };
    let [p50, p99, p999] = ["p50", "p99", "p999"].map(|key| number(&found["ns_per_op"][key]));
    assert!(p50 <= p99 && p99 <= p999, "{found}");
    let ratio = p50 / number(&found["floor"]["ns_per_op"]);
    // Of few nanoseconds the last digit matters.
    assert!(
        (number(&found["ratio"]) / ratio - 1.0).abs() < 0.1,
        "{found}"
    );
    number(&found["ops_per_second"]);
}

#[track_caller]
fn assert_keys(value: &Value, keys: &[&str]) {
    let object = value
        .as_object()
        .unwrap_or_else(|| panic!("{value} is no object"));
    let mut found: Vec<_> = object.keys().map(String::as_str).collect();
    let mut wanted = keys.to_vec();
    found.sort_unstable();
    wanted.sort_unstable();
    assert_eq!(found, wanted);
}

// ---- With a daemon of its own

#[test]
fn every_scenario_runs_on_a_daemon_inside_of_it_and_leaves_nothing() {
    let stage = Stage::new();
    for (scenario, floor) in SCENARIOS {
        let (found, said) = stage.measure(&Ctl::alone(), &["--scenario", scenario]);
        check(&found, scenario, floor, (1, 4096));
        assert!(said.contains("a daemon inside of this process"), "{said}");
    }
}

#[test]
fn without_a_scenario_it_maps() {
    let stage = Stage::new();
    let (found, _) = stage.measure(&Ctl::alone(), &["--size", "1", "--threads", "3"]);
    check(&found, "map", "empty RPC x 2", (3, 1));
}

#[test]
fn for_people_it_is_a_picture_without_colours_and_progress() {
    let stage = Stage::new();
    let output = stage.run(
        &Ctl::alone(),
        &["--scenario", "translate", "--seconds", "0.1"],
    );
    assert_eq!(output.code, 0, "{output:?}");
    for word in [
        "p50",
        "p99.9",
        "floor",
        "flat table lookup",
        "ratio",
        "####",
    ] {
        assert!(output.stdout.contains(word), "{word} in {output:?}");
    }
    assert!(output.stdout.lines().count() < 30, "{output:?}");
    assert_eq!(output.stderr.lines().count(), 1, "{output:?}");
    let text = output.stdout + &output.stderr;
    assert!(!text.contains('\u{1b}') && !text.contains('\r'), "{text}");
}

// ---- With a daemon that runs already

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn every_scenario_leaves_a_running_daemon_as_it_was() {
    let node = Node::start().await;
    node.domain("others").await;
    let base = node.counts().await;
    let generation = node.get("others").await.unwrap().generation;
    let stage = Stage::new();
    for (scenario, floor) in SCENARIOS {
        let line = ["--scenario", scenario, "--threads", "2", "--size", "5000"];
        let (found, said) = stage.measure(&Ctl::new(&node), &line);
        check(&found, scenario, floor, (2, 5000));
        let dir = node.runtime_dir();
        assert!(said.contains(dir.path().to_str().unwrap()), "{said}");
        node.until_counts(base).await;
    }
    assert_eq!(node.get("others").await.unwrap().generation, generation);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn an_interrupt_in_the_middle_leaves_no_domain_and_no_session() {
    let node = Node::start().await;
    let base = node.counts().await;
    let stage = Stage::new();
    for (scenario, signal) in [
        ("map", Signal::INT),
        ("pipeline", Signal::TERM),
        ("translate", Signal::TERM),
        ("attach", Signal::INT),
        ("invalidate", Signal::HUP),
    ] {
        let line = ["--scenario", scenario, "--seconds", "50"];
        let child = ctl::start(stage.command(&Ctl::new(&node), &line));
        until_at_work(&node, base.domains).await;

        children::signal(child.id(), signal);

        let output = ctl::finish(child);
        assert_eq!(output.code, 1, "{output:?}");
        assert_eq!(output.stdout, "", "nothing was measured to its end");
        assert!(output.stderr.contains("error: "), "{output:?}");
        node.until_counts(base).await;
        stage.assert_clean();
    }
}

/// At any moment, also while the domain is being made.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn an_interrupt_at_any_moment_leaves_nothing() {
    let node = Node::start().await;
    let base = node.counts().await;
    let stage = Stage::new();
    for millis in [5, 10, 15, 20, 25, 30, 40, 60] {
        let child = ctl::start(stage.command(&Ctl::new(&node), &["--seconds", "50"]));
        tokio::time::sleep(Duration::from_millis(millis)).await;

        children::signal(child.id(), Signal::INT);

        // By the signal itself, if it came before there was anything to clear.
        let output = ctl::finish(child);
        let by_signal = 256 + Signal::INT.as_raw();
        assert!([1, by_signal].contains(&output.code), "{output:?}");
        node.until_counts(base).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn an_interrupt_takes_its_own_daemon_along() {
    let stage = Stage::new();
    let child = ctl::start(stage.command(&Ctl::alone(), &["--seconds", "50"]));
    wait::find("the embedded daemon", || {
        stage
            .files()
            .find(|dir| dir.join("public/api.sock").exists())
    });

    children::signal(child.id(), Signal::INT);

    let output = ctl::finish(child);
    assert_eq!(output.code, 1, "{output:?}");
    assert!(output.stderr.contains("interrupted"), "{output:?}");
    stage.assert_clean();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_daemon_that_dies_in_the_middle_ends_it() {
    let mut node = Node::start().await;
    let base = node.counts().await;
    let stage = Stage::new();
    for (scenario, _) in SCENARIOS {
        let line = ["--scenario", scenario, "--seconds", "50"];
        let child = ctl::start(stage.command(&Ctl::new(&node), &line));
        until_at_work(&node, base.domains).await;

        node.kill();

        // Without a daemon a device would translate on: it hears of the end.
        let output = ctl::finish(child);
        assert_ne!(output.code, 0, "{scenario}: {output:?}");
        assert_eq!(output.stdout, "", "{scenario}: {output:?}");
        node.restart().await;
    }
}

/// Waits until somebody is attached to a domain that was not there before.
async fn until_at_work(node: &Node, domains: u32) {
    let until = Instant::now() + wait::DEADLINE;
    loop {
        let counts = node.counts().await;
        if counts.domains > domains && counts.sessions > 0 {
            return;
        }
        assert!(Instant::now() < until, "nobody begins to work");
        tokio::time::sleep(Duration::from_millis(3)).await;
    }
}

// ---- Wrong usage, wrong places

#[test]
fn wrong_usage_is_2_and_names_the_numbers() {
    let stage = Stage::new();
    for (line, numbers) in [
        (["--size", "0"], &["0", "67108864"][..]),
        (["--size", "65MiB"], &["68157440", "67108864"]),
        (["--size", "much"], &["much"]),
        (["--threads", "0"], &["0", "1..=64"]),
        (["--threads", "65"], &["65", "1..=64"]),
        (["--threads", "-1"], &["-1"]),
        (["--seconds", "0"], &["0", "3600"]),
        (["--seconds", "-0.5"], &["-0.5"]),
        (["--seconds", "4000"], &["4000", "3600"]),
        (["--seconds", "soon"], &["soon"]),
        (["--scenario=pipeline", "--size=65537"], &["65537", "65536"]),
        (["--scenario", "sideways"], &["sideways", "translate"]),
    ] {
        let output = stage.run(&Ctl::alone(), &line);
        assert_eq!(output.code, 2, "{line:?}: {output:?}");
        assert_eq!(output.stdout, "", "{line:?}");
        for number in numbers {
            assert!(output.stderr.contains(number), "{number} in {output:?}");
        }
    }
}

#[test]
fn a_directory_without_a_daemon_is_an_error_where_it_was_asked_for() {
    let stage = Stage::new();
    let nowhere = TempDir::new_in("/tmp").unwrap();
    let nowhere = nowhere.path().to_str().unwrap();

    let output = stage.run(&Ctl::alone(), &["--runtime-dir", nowhere]);

    assert_eq!(output.code, 5, "{output:?}");
    assert!(output.stderr.contains(nowhere), "{output:?}");
    // A variable may be left from another time.
    let line = ["--seconds", "0.1", "-o", "json"];
    let mut command = stage.command(&Ctl::alone(), &line);
    command.env("DOMAIND_RUNTIME_DIR", nowhere);
    let output = ctl::finish(ctl::start(command));
    assert_eq!(output.code, 0, "{output:?}");
    assert!(
        output.stderr.contains("a daemon inside of this process"),
        "{output:?}"
    );
    stage.assert_clean();
}
