//! `domainctl demo`: the main job, on real files, across real processes.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use domaind_client::{Client, RuntimeDir};
use domaind_tests::ctl::{self, Output};
use domaind_tests::{Ctl, Node, children, files, v1, wait};
use rustix::process::Signal;
use serde_json::Value;
use tempfile::TempDir;

/// Where a demo works: its file, and the directory of its temporary files.
struct Stage {
    dir: TempDir,
}

impl Stage {
    fn new() -> Stage {
        let dir = tempfile::Builder::new()
            .prefix("domaind-d")
            .tempdir_in("/tmp");
        let stage = Stage {
            dir: dir.expect("a temporary directory"),
        };
        fs::create_dir(stage.tmp()).unwrap();
        stage
    }

    fn tmp(&self) -> PathBuf {
        self.dir.path().join("tmp")
    }

    /// A file of so many bytes that differ from place to place.
    fn file(&self, len: usize) -> PathBuf {
        let path = self.dir.path().join(format!("file-{len}"));
        fs::write(&path, files::pattern(len as u64, len)).unwrap();
        path
    }

    /// The command, with its temporary files here.
    fn command(&self, line: &[&str]) -> std::process::Command {
        let mut command = Ctl::alone().command(&[&["demo"], line].concat());
        command.env("TMPDIR", self.tmp());
        command
    }

    fn run(&self, line: &[&str]) -> Output {
        let output = ctl::finish(ctl::start(self.command(line)));
        self.assert_clean();
        output
    }

    /// Runs it with `-o json`; it must verify.
    #[track_caller]
    fn verify(&self, line: &[&str]) -> Report {
        let output = self.run(&[line, &["-o", "json"]].concat());
        assert_eq!(output.code, 0, "{line:?}: {output:?}");
        let report = Report::read(&output.stdout);
        assert_eq!(report.lease, !line.contains(&"--calls"), "{line:?}");
        report
    }

    /// Nothing of a demo is left in its temporary directory.
    #[track_caller]
    fn assert_clean(&self) {
        let left: Vec<_> = fs::read_dir(self.tmp()).unwrap().flatten().collect();
        assert!(left.is_empty(), "left behind: {left:?}");
    }

    /// The directory of the embedded daemon, once it is up.
    fn embedded(&self) -> PathBuf {
        wait::find("the embedded daemon", || socket_below(&self.tmp(), 3))
    }
}

/// The runtime directory in which there is an admin socket.
fn socket_below(dir: &Path, depth: usize) -> Option<PathBuf> {
    if dir.join("admin/admin.sock").exists() && dir.join("public/fd.sock").exists() {
        return Some(dir.to_owned());
    }
    let entries = fs::read_dir(dir).ok()?.flatten();
    let dirs = entries.filter(|entry| entry.path().is_dir() && depth > 0);
    dirs.map(|entry| entry.path())
        .find_map(|path| socket_below(&path, depth - 1))
}

/// The object of the issue, and nothing but it.
#[derive(Debug)]
struct Report {
    /// The driver has copied, and not the daemon.
    lease: bool,
    bytes: u64,
    blocks: u64,
    driver_pids: Vec<u64>,
    device_pids: Vec<u64>,
    per_device: Vec<(u64, u64)>,
    domain: String,
}

impl Report {
    /// Reads it, and checks that it agrees with itself.
    #[track_caller]
    fn read(text: &str) -> Report {
        let value: Value = serde_json::from_str(text).unwrap_or_else(|e| panic!("{e}: {text}"));
        assert_keys(
            &value,
            &[
                "verified",
                "lease",
                "bytes",
                "blocks",
                "driver_pids",
                "device_pids",
                "maps_per_second",
                "throughput_bytes_per_second",
                "map_latency_ns",
                "domain",
                "per_device",
            ],
        );
        assert_keys(&value["map_latency_ns"], &["p50", "p99", "max"]);
        assert_keys(
            &value["domain"],
            &["name", "bounce_bytes", "coherent_bytes"],
        );
        assert_eq!(value["verified"], true, "{text}");
        let number = |value: &Value| {
            value
                .as_u64()
                .unwrap_or_else(|| panic!("{value} in {text}"))
        };
        let numbers = |value: &Value| -> Vec<u64> {
            value
                .as_array()
                .unwrap_or_else(|| panic!("{text}"))
                .iter()
                .map(number)
                .collect()
        };
        let per_device = value["per_device"].as_array().unwrap();
        let per_device = per_device.iter().map(|one| {
            assert_keys(one, &["pid", "blocks"]);
            (number(&one["pid"]), number(&one["blocks"]))
        });
        let report = Report {
            lease: value["lease"].as_bool().unwrap(),
            bytes: number(&value["bytes"]),
            blocks: number(&value["blocks"]),
            driver_pids: numbers(&value["driver_pids"]),
            device_pids: numbers(&value["device_pids"]),
            per_device: per_device.collect(),
            domain: value["domain"]["name"].as_str().unwrap().to_owned(),
        };
        let latency = &value["map_latency_ns"];
        let (p50, p99, max) = (
            number(&latency["p50"]),
            number(&latency["p99"]),
            number(&latency["max"]),
        );
        assert!(p50 <= p99 && p99 <= max, "{text}");
        for rate in ["maps_per_second", "throughput_bytes_per_second"] {
            let rate = value[rate].as_f64().unwrap();
            assert!(
                rate.is_finite() && (rate > 0.0) == (report.bytes > 0),
                "{text}"
            );
        }
        assert!(number(&value["domain"]["bounce_bytes"]) > 0);
        assert!(number(&value["domain"]["coherent_bytes"]) > 0);
        report.check();
        report
    }

    #[track_caller]
    fn check(&self) {
        let sum: u64 = self.per_device.iter().map(|(_, blocks)| blocks).sum();
        assert_eq!(sum, self.blocks, "{self:?}");
        let mut of_blocks: Vec<_> = self.per_device.iter().map(|(pid, _)| *pid).collect();
        let mut devices = self.device_pids.clone();
        of_blocks.sort_unstable();
        devices.sort_unstable();
        assert_eq!(of_blocks, devices, "{self:?}");
        assert_eq!(self.driver_pids.len(), 1, "{self:?}");
        let mut all = [&self.driver_pids[..], &self.device_pids].concat();
        all.sort_unstable();
        all.dedup();
        assert_eq!(
            all.len(),
            1 + self.device_pids.len(),
            "distinct processes: {self:?}"
        );
        for pid in all {
            assert!(
                !children::is_alive(u32::try_from(pid).unwrap()),
                "{pid} still runs"
            );
        }
    }
}

/// The object has exactly these keys.
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

// ---- Files

/// Copied by the driver itself, and by the daemon.
const MODES: [&[&str]; 2] = [&[], &["--calls"]];

#[test]
fn every_size_around_a_page_and_a_block_is_verified() {
    let stage = Stage::new();
    for len in [0, 1, 4_095, 4_096, 4_097, 65_535, 65_536, 65_537] {
        let file = stage.file(len);
        for mode in MODES {
            let report = stage.verify(&[&[file.to_str().unwrap()], mode].concat());
            let len = len as u64;
            assert_eq!((report.bytes, report.blocks), (len, len.div_ceil(65_536)));
            assert_eq!(report.device_pids.len(), 2, "the default");
        }
    }
}

#[test]
fn several_megabytes_in_odd_blocks_are_shared_by_the_devices() {
    let stage = Stage::new();
    let file = stage.file(3_000_001);
    let file = file.to_str().unwrap();
    for mode in MODES {
        let odd = [file, "--block", "12345", "--devices", "3"];
        let report = stage.verify(&[&odd, mode].concat());
        assert_eq!((report.bytes, report.blocks), (3_000_001, 244));
        assert_eq!(report.device_pids.len(), 3);
        for (pid, blocks) in &report.per_device {
            assert!(*blocks > 0, "device {pid} took no share: {report:?}");
        }
        let few = [file, "--block", "1MiB", "--devices", "1"];
        let report = stage.verify(&[&few, mode].concat());
        assert_eq!((report.blocks, report.device_pids.len()), (3, 1));
    }
}

#[test]
fn blocks_of_one_byte_and_of_the_whole_file_work() {
    let stage = Stage::new();
    let file = stage.file(301);
    let file = file.to_str().unwrap();
    for mode in MODES {
        let blocks = |block| {
            stage
                .verify(&[&[file, "--block", block], mode].concat())
                .blocks
        };
        assert_eq!([blocks("1"), blocks("301"), blocks("16MiB")], [301, 1, 1]);
    }
}

#[test]
fn every_direction_is_verified() {
    let stage = Stage::new();
    let file = stage.file(500_000);
    for direction in ["both", "to-device", "from-device"] {
        for (devices, mode) in ["1", "2"].into_iter().flat_map(|n| MODES.map(|m| (n, m))) {
            let file = file.to_str().unwrap();
            let line = [file, "--direction", direction, "--devices", devices];
            let report = stage.verify(&[&line, mode].concat());
            assert_eq!((report.bytes, report.blocks), (500_000, 8), "{direction}");
        }
    }
}

/// A reader that cannot seek and gives what it has in small pieces.
#[test]
fn a_pipe_works_by_the_name_of_a_dash_and_of_dev_stdin() {
    let stage = Stage::new();
    for (name, mode) in ["-", "/dev/stdin"].into_iter().zip(MODES) {
        let line = [name, "--block", "10000", "-o", "json"];
        let mut command = stage.command(&[&line, mode].concat());
        command.stdin(Stdio::piped());
        let mut child = ctl::start(command);
        let mut stdin = child.stdin.take().unwrap();
        let feeder = std::thread::spawn(move || {
            for piece in files::pattern(5, 1_000_003).chunks(777) {
                stdin.write_all(piece).unwrap();
            }
        });
        let output = ctl::finish(child);
        feeder.join().unwrap();
        assert_eq!(output.code, 0, "{name}: {output:?}");
        let report = Report::read(&output.stdout);
        assert_eq!((report.bytes, report.blocks), (1_000_003, 101), "{name}");
        stage.assert_clean();
    }
    // Nothing comes at all.
    for mode in MODES {
        let mut command = stage.command(&[&["-", "-o", "json"], mode].concat());
        command.stdin(Stdio::piped());
        let mut child = ctl::start(command);
        ctl::feed(&mut child, b"");
        let report = Report::read(&ctl::finish(child).stdout);
        assert_eq!((report.bytes, report.blocks), (0, 0));
    }
}

#[test]
fn a_named_pipe_works() {
    let stage = Stage::new();
    let path = stage.dir.path().join("fifo");
    rustix::fs::mknodat(
        rustix::fs::CWD,
        &path,
        rustix::fs::FileType::Fifo,
        rustix::fs::Mode::from_raw_mode(0o600),
        0,
    )
    .unwrap();
    let child = ctl::start(stage.command(&[path.to_str().unwrap(), "-o", "json"]));
    File::options()
        .write(true)
        .open(&path)
        .unwrap()
        .write_all(&[7; 100_000])
        .unwrap();
    let report = Report::read(&ctl::finish(child).stdout);
    assert_eq!((report.bytes, report.blocks), (100_000, 2));
}

#[test]
fn for_people_it_is_a_short_table_with_the_pids_and_who_copied() {
    let stage = Stage::new();
    let file = stage.file(200_000);
    let copiers = ["the driver", "the daemon"].into_iter();
    let asked = ["0 calls to the daemon per block", "2 calls per block"];
    for ((mode, copier), asked) in MODES.into_iter().zip(copiers).zip(asked) {
        let output = stage.run(&[&[file.to_str().unwrap()], mode].concat());
        assert_eq!(output.code, 0, "{output:?}");
        for word in ["verified", "200000", "driver", "device"] {
            assert!(output.stdout.contains(word), "{word} in {output:?}");
        }
        let line = output
            .stdout
            .lines()
            .find_map(|line| line.strip_prefix("copied by"));
        let line = line.unwrap_or_else(|| panic!("{output:?}"));
        assert!(line.contains(copier) && line.contains(asked), "{line}");
        assert!(output.stdout.lines().count() < 40, "{output:?}");
        assert_eq!(output.stderr, "", "a progress bar only on a terminal");
        assert!(!output.stdout.contains('\u{1b}'), "no colours into a pipe");
    }
}

/// What was asked for when it was not the default.
#[test]
fn the_default_has_a_name_and_conflicts_with_the_other_mode() {
    let stage = Stage::new();
    let file = stage.file(70_000);
    let file = file.to_str().unwrap();

    assert!(stage.verify(&[file, "--lease"]).lease);
    for line in [[file, "--lease", "--calls"], [file, "--calls", "--lease"]] {
        let output = stage.run(&line);
        assert_eq!((output.code, output.stdout.as_str()), (2, ""), "{output:?}");
        for name in ["--lease", "--calls"] {
            assert!(output.stderr.contains(name), "{name} in {output:?}");
        }
    }
}

// ---- Wrong files and wrong usage

#[test]
fn what_cannot_be_read_is_said_and_leaves_nothing() {
    let stage = Stage::new();
    let missing = stage.dir.path().join("missing");
    let mut table = vec![missing, stage.dir.path().to_owned()];
    if !domaind_tests::users::is_root() {
        // Root may read everything.
        let closed = stage.file(10);
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o000);
        fs::set_permissions(&closed, mode).unwrap();
        table.push(closed);
    }
    for path in table {
        let path = path.to_str().unwrap();
        for format in ["table", "json"] {
            let output = stage.run(&[path, "-o", format]);
            assert_eq!(output.code, 1, "{output:?}");
            assert!(output.stderr.contains(path), "it names {path}: {output:?}");
            assert_eq!(output.stdout, "");
        }
    }
}

/// It opens, and then cannot be read at its beginning.
#[test]
fn a_file_that_fails_while_it_is_read_is_an_error() {
    let stage = Stage::new();
    let output = stage.run(&["/proc/self/mem", "-o", "json"]);
    assert_eq!((output.code, output.stdout.as_str()), (1, ""), "{output:?}");
    assert!(output.stderr.contains("reading"), "{output:?}");
}

#[test]
fn wrong_usage_is_2_and_starts_nothing() {
    let stage = Stage::new();
    let file = stage.file(10);
    let file = file.to_str().unwrap();
    for line in [
        &[][..],
        &[file, "--devices", "0"],
        &[file, "--devices", "x"],
        &[file, "--devices", "-1"],
        &[file, "--block", "0"],
        &[file, "--block", "much"],
        &[file, "--direction", "sideways"],
        &[file, file],
    ] {
        let output = stage.run(line);
        assert_eq!(output.code, 2, "{line:?}: {output:?}");
        assert_eq!(output.stdout, "");
    }
}

// ---- Death

/// A demo in mid-run: its input is a pipe that does not end.
struct Endless {
    child: Child,
    feeder: Option<std::thread::JoinHandle<()>>,
    fed_bytes: Arc<AtomicU64>,
}

/// More than lies in the pipe, is read ahead, and is in the hands of devices.
const MID_RUN_BYTES: u64 = 8 << 20;

impl Endless {
    fn start(stage: &Stage, line: &[&str]) -> Endless {
        let mut command = stage.command(&[&["-"], line].concat());
        command.stdin(Stdio::piped());
        let mut child = ctl::start(command);
        let mut stdin = child.stdin.take().unwrap();
        let fed_bytes = Arc::new(AtomicU64::new(0));
        let fed = Arc::clone(&fed_bytes);
        let feeder = std::thread::spawn(move || {
            // Until nobody reads any more; bounded, should that never be.
            let until = Instant::now() + Duration::from_secs(50);
            while Instant::now() < until && stdin.write_all(&[0x5a; 65_536]).is_ok() {
                fed.fetch_add(65_536, Ordering::Relaxed);
            }
        });
        Endless {
            child,
            feeder: Some(feeder),
            fed_bytes,
        }
    }

    /// Waits until blocks have come back. The daemon does not know of it if the
    /// driver copies by itself.
    async fn in_mid_run(&self) {
        let until = Instant::now() + wait::DEADLINE;
        while self.fed_bytes.load(Ordering::Relaxed) < MID_RUN_BYTES {
            assert!(Instant::now() < until, "nothing moves");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    fn end(mut self) -> Output {
        let output = ctl::finish(self.child);
        self.feeder.take().unwrap().join().unwrap();
        output
    }
}

/// The processes that are attached, once all are: (driver, devices).
async fn attached(dir: &Path, devices: usize) -> (u32, Vec<u32>) {
    let dir = RuntimeDir::new(dir).unwrap();
    let until = Instant::now() + wait::DEADLINE;
    loop {
        assert!(Instant::now() < until, "they never attach");
        if let Ok(client) = Client::connect_admin(&dir).await
            && let Ok(page) = client
                .sessions()
                .list_sessions(v1::ListSessionsRequest::default())
                .await
        {
            let sessions = page.into_inner().sessions;
            let pids = |role| -> Vec<u32> {
                let of_role = sessions.iter().filter(|session| session.role() == role);
                of_role
                    .filter_map(|session| u32::try_from(session.peer.as_ref()?.pid).ok())
                    .collect()
            };
            let (drivers, found) = (pids(v1::Role::Driver), pids(v1::Role::Device));
            if drivers.len() == 1 && found.len() == devices {
                return (drivers[0], found);
            }
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_device_killed_in_mid_run_is_named_and_nothing_is_left() {
    let stage = Stage::new();
    let victims = [(2, 0, "json"), (2, 1, "table"), (1, 0, "json")];
    for ((devices, victim, format), mode) in victims
        .into_iter()
        .flat_map(|victim| MODES.map(|mode| (victim, mode)))
    {
        let count = devices.to_string();
        let line = ["--devices", &count, "-o", format];
        let demo = Endless::start(&stage, &[&line, mode].concat());
        let dir = stage.embedded();
        let (driver, pids) = attached(&dir, devices).await;
        demo.in_mid_run().await;
        let family = children::descendants(demo.child.id());
        assert!(family.contains(&driver) && pids.iter().all(|pid| family.contains(pid)));

        children::signal(pids[victim], Signal::KILL);

        let output = demo.end();
        assert_eq!(output.code, 1, "{output:?}");
        let pid = pids[victim].to_string();
        assert!(output.stderr.contains(&pid), "it names {pid}: {output:?}");
        assert!(output.stderr.contains("device"), "{output:?}");
        assert_eq!(output.stdout, "", "nothing was verified");
        for pid in family {
            children::wait_until_gone(pid);
        }
        stage.assert_clean();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_driver_killed_in_mid_run_is_told_and_nothing_is_left() {
    let stage = Stage::new();
    for mode in MODES {
        let demo = Endless::start(&stage, &[&["-o", "json"], mode].concat());
        let dir = stage.embedded();
        let (driver, _) = attached(&dir, 2).await;
        demo.in_mid_run().await;
        let family = children::descendants(demo.child.id());

        children::signal(driver, Signal::KILL);

        let output = demo.end();
        assert_eq!(output.code, 1, "{output:?}");
        assert!(output.stderr.contains("driver"), "{output:?}");
        for pid in family {
            children::wait_until_gone(pid);
        }
        stage.assert_clean();
    }
}

/// The one in the foreground: its children must not outlive it.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_demo_that_is_killed_takes_its_processes_along() {
    let stage = Stage::new();
    let signals = [Signal::INT, Signal::TERM, Signal::KILL];
    for (signal, mode) in signals
        .into_iter()
        .flat_map(|signal| MODES.map(|mode| (signal, mode)))
    {
        let demo = Endless::start(&stage, &[&["-o", "json"], mode].concat());
        let dir = stage.embedded();
        attached(&dir, 2).await;
        demo.in_mid_run().await;
        let family = children::descendants(demo.child.id());

        children::signal(demo.child.id(), signal);

        let output = demo.end();
        assert_ne!(output.code, 0, "{output:?}");
        for pid in family {
            children::wait_until_gone(pid);
        }
        if signal == Signal::KILL {
            // Nobody is left to remove it.
            fs::remove_dir_all(stage.tmp()).unwrap();
            fs::create_dir(stage.tmp()).unwrap();
        }
        stage.assert_clean();
    }
}

// ---- With a daemon that runs already

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn with_a_runtime_directory_it_uses_that_daemon_and_leaves_it_as_it_was() {
    let node = Node::start().await;
    node.domain("others").await;
    let base = node.counts().await;
    let stage = Stage::new();
    let file = stage.file(400_000);
    let generation = node.get("others").await.unwrap().generation;
    let run_dir = node.runtime_dir();
    let dir = run_dir.path().to_str().unwrap();

    for mode in MODES {
        let line = [file.to_str().unwrap(), "--runtime-dir", dir];
        let report = stage.verify(&[&line, mode].concat());

        assert_eq!(report.bytes, 400_000);
        let id = report.domain.trim_start_matches("domains/").to_owned();
        assert!(node.get(&id).await.is_err(), "its domain is deleted");
        assert_eq!(node.get("others").await.unwrap().generation, generation);
        node.until_counts(base).await;
        // It was there that it worked.
        let log = node.log();
        for pid in report.device_pids.iter().chain(&report.driver_pids) {
            assert!(
                log.contains(&format!("pid {pid}")),
                "{pid} in the log of the daemon"
            );
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_device_killed_leaves_nothing_in_a_daemon_that_runs_on() {
    let node = Node::start().await;
    let base = node.counts().await;
    let stage = Stage::new();
    let run_dir = node.runtime_dir();
    let dir = run_dir.path();
    for mode in MODES {
        let line = ["--runtime-dir", dir.to_str().unwrap()];
        let demo = Endless::start(&stage, &[&line, mode].concat());
        let (_, pids) = attached(dir, 2).await;
        demo.in_mid_run().await;

        children::signal(pids[1], Signal::KILL);

        let output = demo.end();
        assert_eq!(output.code, 1, "{output:?}");
        assert!(output.stderr.contains(&pids[1].to_string()), "{output:?}");
        node.until_counts(base).await;
        stage.assert_clean();
    }
}

#[test]
fn with_a_runtime_directory_of_nobody_it_says_so() {
    let stage = Stage::new();
    let file = stage.file(10);
    let nowhere = stage.dir.path().join("nowhere");
    let output = stage.run(&[
        file.to_str().unwrap(),
        "--runtime-dir",
        nowhere.to_str().unwrap(),
    ]);
    assert_ne!(output.code, 0);
    assert!(output.stderr.contains("nowhere"), "{output:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn two_demos_can_use_one_daemon_at_the_same_time() {
    let node = Node::start().await;
    let base = node.counts().await;
    let stage = Stage::new();
    let file = stage.file(2_000_000);
    let dir = node.runtime_dir();
    let line = [
        file.to_str().unwrap(),
        "-o",
        "json",
        "--runtime-dir",
        dir.path().to_str().unwrap(),
    ];
    let demos = MODES.map(|mode| ctl::start(stage.command(&[&line, mode].concat())));
    for demo in demos {
        let output = ctl::finish(demo);
        assert_eq!(output.code, 0, "{output:?}");
        Report::read(&output.stdout);
    }
    node.until_counts(base).await;
}
