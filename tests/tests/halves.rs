//! `domainctl demo --role`: the two halves of the demo, started apart, who find
//! each other in the memory of a domain and nowhere else.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use domaind_client::v1;
use domaind_tests::ctl::Output;
use domaind_tests::{Ctl, Node, children, files, node};
use rustix::process::Signal;
use tempfile::TempDir;

/// A half has met the other one, lost it, or ended by then.
const LIMIT: Duration = Duration::from_secs(30);

/// A running half, which writes to files. Killed on drop.
struct Half {
    child: Child,
    stdout: PathBuf,
    stderr: PathBuf,
}

/// Where halves write, and the file that drivers pass.
struct Stage {
    dir: TempDir,
}

impl Stage {
    fn new() -> Stage {
        let dir = TempDir::new().unwrap();
        fs::write(dir.path().join("file"), files::pattern(7, FILE_BYTES)).unwrap();
        Stage { dir }
    }

    fn file(&self) -> String {
        self.dir.path().join("file").display().to_string()
    }

    fn driver(&self, node: &Node, more: &[&str]) -> Half {
        let file = self.file();
        self.start(node, "driver", &[more, &[file.as_str()]].concat())
    }

    fn device(&self, node: &Node, more: &[&str]) -> Half {
        self.start(node, "device", more)
    }

    fn start(&self, node: &Node, role: &str, more: &[&str]) -> Half {
        let line = [&["demo", "--domain", "d", "--role", role], more].concat();
        let number = fs::read_dir(self.dir.path()).unwrap().count();
        let path = |what: &str| self.dir.path().join(format!("{number}-{role}-{what}"));
        let (stdout, stderr) = (path("out"), path("err"));
        let mut command = Ctl::new(node).command(&line);
        command
            .stdout(File::create(&stdout).unwrap())
            .stderr(File::create(&stderr).unwrap())
            .stdin(Stdio::null());
        Half {
            child: children::spawn(&mut command),
            stdout,
            stderr,
        }
    }
}

/// Some blocks of the default 64 KiB, the last one short and odd.
const FILE_BYTES: usize = 5 * 65536 + 4321;
const FILE_BLOCKS: usize = 6;

impl Half {
    fn text(&self) -> String {
        read(&self.stdout)
    }

    fn count(&self, begins: &str) -> usize {
        let text = self.text();
        text.lines().filter(|line| line.starts_with(begins)).count()
    }

    /// Waits until so many lines begin so.
    #[track_caller]
    fn until(&self, begins: &str, times: usize) {
        let until = Instant::now() + LIMIT;
        while self.count(begins) < times {
            let so_far = (self.text(), read(&self.stderr));
            assert!(
                Instant::now() < until,
                "no {times} {begins:?} in {so_far:?}"
            );
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn signal(&self, signal: Signal) {
        children::signal(self.child.id(), signal);
    }

    #[track_caller]
    fn end(mut self) -> Output {
        let status = children::end_of(&mut self.child, LIMIT);
        Output {
            code: status.code().unwrap_or(256),
            stdout: self.text(),
            stderr: read(&self.stderr),
        }
    }

    /// It was told to stop, or had nothing more to do.
    #[track_caller]
    fn ends_well(self) -> String {
        let output = self.end();
        assert_eq!((output.code, output.stderr.as_str()), (0, ""), "{output:?}");
        output.stdout
    }
}

impl Drop for Half {
    fn drop(&mut self) {
        let _ = children::kill(&mut self.child);
    }
}

fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_default()
}

async fn create(node: &Node) {
    let request = v1::CreateDomainRequest {
        domain_id: "d".into(),
        spec: Some(node::spec(8 << 20, 1 << 20)),
        ..Default::default()
    };
    let client = node.client().await;
    client.domains().create_domain(request).await.unwrap();
}

async fn node_with_domain() -> Node {
    let node = Node::start().await;
    create(&node).await;
    node
}

/// What a driver says of a pass.
fn pass(number: usize) -> String {
    format!(
        "pass {number}: {FILE_BYTES} bytes, {FILE_BLOCKS} blocks: every block came back transformed"
    )
}

#[tokio::test]
async fn a_file_is_passed_whichever_half_comes_first() {
    let (node, stage) = (node_with_domain().await, Stage::new());
    for driver_first in [true, false] {
        let (driver, device) = if driver_first {
            let driver = stage.driver(&node, &[]);
            driver.until("attached to domains/d as", 1);
            (driver, stage.device(&node, &[]))
        } else {
            let device = stage.device(&node, &[]);
            device.until("attached to domains/d as", 1);
            (stage.driver(&node, &[]), device)
        };
        let (driver, device) = (driver.ends_well(), device.ends_well());
        assert!(driver.contains(&pass(1)), "{driver}");
        let all = format!("dismissed after {FILE_BYTES} bytes, {FILE_BLOCKS} blocks");
        assert!(device.contains(&all), "{device}");
    }
}

#[tokio::test]
async fn several_devices_have_a_seat_each_and_the_daemon_may_copy_too() {
    let (node, stage) = (node_with_domain().await, Stage::new());
    for way in ["both", "to-device", "from-device"] {
        let line = [
            "--devices",
            "3",
            "--block",
            "10000",
            "--calls",
            "--direction",
            way,
        ];
        let driver = stage.driver(&node, &line);
        let devices = [(); 3].map(|()| stage.device(&node, &[]));
        let driver = driver.ends_well();
        assert!(
            driver.contains(&format!("pass 1: {FILE_BYTES} bytes, 34 blocks")),
            "{driver}"
        );
        let mut seats = devices.map(|device| {
            let text = device.ends_well();
            let seat = text.lines().find(|line| line.contains(" of the driver "));
            seat.expect("a seat")
                .split(" of the")
                .next()
                .unwrap()
                .to_owned()
        });
        seats.sort();
        assert_eq!(seats, ["device 0", "device 1", "device 2"]);
    }
}

#[tokio::test]
async fn halves_that_repeat_attach_anew_when_the_daemon_was_killed() {
    let (mut node, stage) = (node_with_domain().await, Stage::new());
    let line = ["--repeat", "--every", "50ms"];
    let (driver, device) = (
        stage.driver(&node, &line),
        stage.device(&node, &["--repeat"]),
    );
    driver.until("pass ", 2);
    node.kill();
    for half in [&driver, &device] {
        half.until("lost: ", 1);
    }
    node.restart().await;
    for half in [&driver, &device] {
        half.until("lost: there is no domain d; trying again", 1);
    }
    create(&node).await;
    for half in [&driver, &device] {
        half.until("attached to ", 2);
    }
    let passed = driver.count("pass ");
    driver.until("pass ", passed + 2);
    for half in [driver, device] {
        half.signal(Signal::TERM);
        let text = half.ends_well();
        assert!(
            text.ends_with("stopped\n") || text.contains("dismissed"),
            "{text}"
        );
    }
}

#[tokio::test]
async fn another_half_takes_the_place_of_one_that_was_killed() {
    let (node, stage) = (node_with_domain().await, Stage::new());
    let line = ["--repeat", "--every", "50ms"];
    let (driver, device) = (
        stage.driver(&node, &line),
        stage.device(&node, &["--repeat"]),
    );
    driver.until("pass ", 1);

    drop(device);
    driver.until(
        "lost: device 0 has shown no sign of life for 5s; trying again",
        1,
    );
    let device = stage.device(&node, &["--repeat"]);
    driver.until("device 0 has come: ", 2);

    drop(driver);
    device.until("lost: the driver sessions/", 1);
    let driver = stage.driver(&node, &line);
    driver.until("pass ", 2);
    device.until("device 0 of the driver ", 2);
}

#[tokio::test]
async fn a_device_that_is_told_to_stop_leaves_its_seat_to_another_one() {
    let (node, stage) = (node_with_domain().await, Stage::new());
    let driver = stage.driver(&node, &["--repeat", "--every", "50ms"]);
    let device = stage.device(&node, &["--repeat"]);
    driver.until("pass ", 1);
    device.signal(Signal::TERM);
    assert!(device.ends_well().ends_with("stopped\n"));
    driver.until("lost: device 0 has left; trying again", 1);
    let _device = stage.device(&node, &[]);
    driver.until("device 0 has come: ", 2);
    // Who drives is through, and says so to whoever serves.
    driver.signal(Signal::INT);
    assert!(driver.ends_well().ends_with("stopped\n"));
}

#[tokio::test]
async fn what_was_half_way_through_is_not_begun_anew_unless_asked_for() {
    let (node, stage) = (node_with_domain().await, Stage::new());
    // Standard input that never ends keeps the driver in its pass.
    let (reader, _writer) = std::io::pipe().unwrap();
    let mut command = Ctl::new(&node).command(&["demo", "--domain", "d", "--role", "driver", "-"]);
    let (out, err) = (stage.dir.path().join("out"), stage.dir.path().join("err"));
    command.stdin(reader).stdout(File::create(&out).unwrap());
    command.stderr(File::create(&err).unwrap());
    let child = children::spawn(&mut command);
    drop(command);
    let driver = Half {
        child,
        stdout: out,
        stderr: err,
    };
    let device = stage.device(&node, &[]);
    driver.until("device 0 has come: ", 1);
    drop(device);
    let output = driver.end();
    assert_eq!(output.code, 1, "{output:?}");
    assert!(
        output.stderr.contains("device 0 has shown no sign of life"),
        "{output:?}"
    );
    assert!(!output.stdout.contains("lost: "), "{output:?}");
}

#[tokio::test]
async fn a_half_gives_up_after_its_wait_and_says_for_what() {
    let (node, stage) = (node_with_domain().await, Stage::new());
    let line = ["--wait", "300ms"];
    // One after the other: together they would find each other.
    let driver = stage.driver(&node, &line).end();
    let device = stage.device(&node, &line).end();
    for (output, what) in [
        (driver, "no device has taken seat 0 within 300ms (--wait)"),
        (
            device,
            "no driver has a seat free in domains/d within 300ms (--wait)",
        ),
    ] {
        assert_eq!(output.code, 5, "{output:?}");
        assert!(output.stderr.contains(what), "{output:?}");
    }
    let nowhere = stage.dir.path().join("nowhere");
    let line = [
        "demo", "--domain", "d", "--role", "device", "--wait", "300ms",
    ];
    let output = Ctl::at(&nowhere).run(&line);
    assert_eq!(output.code, 5, "{output:?}");
    assert!(
        output.stderr.contains("no daemon can be reached"),
        "{output:?}"
    );
}

#[tokio::test]
async fn touching_reaches_all_of_the_memory_and_changes_nothing() {
    let (node, stage) = (node_with_domain().await, Stage::new());
    let driver = stage.driver(&node, &["--touch"]);
    let device = stage.device(&node, &["--touch"]);
    // 8 MiB and 1 MiB, less the first granule, which is nobody's.
    let touched = format!("touched {} bytes\n", (9 << 20) - 4096);
    for half in [driver, device] {
        let text = half.ends_well();
        assert!(text.contains(&touched), "{text}");
    }
}

#[tokio::test]
async fn a_block_that_the_domain_has_no_room_for_is_refused_with_both_numbers() {
    let (node, stage) = (node_with_domain().await, Stage::new());
    let output = stage.driver(&node, &["--block", "16MiB"]).end();
    assert_eq!(output.code, 1, "{output:?}");
    let says =
        "a block of 16777216 bytes needs 20979712 bytes of the bounce aperture, which has 8384512";
    assert!(output.stderr.contains(says), "{output:?}");
}

#[tokio::test]
async fn what_makes_no_sense_for_a_half_is_wrong_usage() {
    let node = node_with_domain().await;
    for (line, says) in [
        (&["--role", "driver", "x"][..], "--domain"),
        (&["--domain", "d", "x"], "--role"),
        (&["--repeat", "x"], "--role"),
        (&["--role", "driver", "--domain", "d"], "which FILE?"),
        (&[], "which FILE?"),
        (
            &["--role", "device", "--domain", "d", "x"],
            "a device takes no FILE",
        ),
        (
            &["--role", "device", "--domain", "d", "--devices", "2"],
            "--devices is the driver's",
        ),
        (
            &["--role", "driver", "--domain", "d", "--repeat", "-"],
            "standard input cannot be passed again",
        ),
        (
            &["--role", "device", "--domain", "d", "-o", "yaml"],
            "-o table or -o json",
        ),
        (&["--role", "device", "--domain", "No"], "No"),
    ] {
        let said = Ctl::new(&node).fails(&[&["demo"], line].concat(), 2);
        assert!(said.contains(says), "{line:?}: {said}");
    }
}

#[tokio::test]
async fn lines_for_programs_are_json() {
    let (node, stage) = (node_with_domain().await, Stage::new());
    let driver = stage.driver(&node, &["-o", "json"]);
    let device = stage.device(&node, &["-o", "json"]);
    let mut events = Vec::new();
    for half in [driver, device] {
        for line in half.ends_well().lines() {
            let value: serde_json::Value = serde_json::from_str(line).unwrap();
            events.push(value["event"].as_str().unwrap().to_owned());
        }
    }
    let wanted = [
        "attached",
        "seated",
        "passed",
        "attached",
        "sat",
        "dismissed",
    ];
    assert_eq!(events, wanted);
}
