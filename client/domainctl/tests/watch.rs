//! `domainctl watch`: the program itself, at a daemon inside of the test; and
//! what a watcher that never reads does to that daemon.

use std::path::{Path, PathBuf};
use std::process::{Output, Stdio};
use std::time::{Duration, Instant};

use domain_core::addr::{Iova, IovaRange};
use domain_core::direct::DirectMapping;
use domain_core::memory::MemoryId;
use domain_core::perm::Perm;
use domaind_client::{Client, RuntimeDir, SetMapOptions};
use domaind_proto::names::DomainId;
use domaind_proto::v1;
use domaind_proto::v1::watch_domain_response::Event;
use domaind_server::{Config, Daemon};
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;
use tokio::io::{AsyncBufReadExt, BufReader, Lines};
use tokio::process::{Child, ChildStdout, Command};
use tokio::time::timeout;

const LIMIT: Duration = Duration::from_secs(20);

/// A daemon with a domain, and its runtime directory, which goes away with this.
struct Node {
    daemon: Daemon,
    dir: TempDir,
}

impl Node {
    async fn start() -> Node {
        let dir = TempDir::new().unwrap();
        let run = RuntimeDir::new(&run_dir(dir.path())).unwrap();
        let daemon = Daemon::start(Config::for_runtime_dir(run)).await.unwrap();
        let node = Node { daemon, dir };
        node.ok("create domain d0 --bounce 0 --coherent 1MiB").await;
        node
    }

    fn command(&self, line: &str) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_domainctl"));
        command.args(line.split_whitespace());
        command.arg("--runtime-dir").arg(run_dir(self.dir.path()));
        command
    }

    /// What a command prints that must succeed.
    async fn ok(&self, line: &str) -> String {
        let output = self.command(line).output().await.unwrap();
        assert!(output.status.success(), "{line}: {output:?}");
        String::from_utf8(output.stdout).unwrap()
    }

    fn watch(&self, line: &str) -> Watch {
        let mut command = self.command(line);
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.kill_on_drop(true).spawn().unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        Watch { child, lines }
    }

    async fn info(&self) -> serde_json::Value {
        serde_json::from_str(&self.ok("info -o json").await).unwrap()
    }
}

/// A `domainctl watch` that runs.
struct Watch {
    child: Child,
    lines: Lines<BufReader<ChildStdout>>,
}

impl Watch {
    async fn line(&mut self) -> String {
        let line = timeout(LIMIT, self.lines.next_line()).await;
        line.expect("a line comes").unwrap().expect("another line")
    }

    async fn event(&mut self) -> Event {
        let line = self.line().await;
        let event: v1::WatchDomainResponse = serde_json::from_str(&line).unwrap();
        event.event.unwrap()
    }

    /// Its exit code, and what it says, when it ends by itself: what it prints
    /// is read until then, since a reader that goes is a reason to end, too.
    async fn end(mut self) -> Output {
        let read_on = async { while self.lines.next_line().await.unwrap().is_some() {} };
        timeout(LIMIT, read_on).await.expect("it ends");
        self.unread().await
    }

    /// The same when nobody reads any more.
    async fn unread(self) -> Output {
        let Watch { child, lines } = self;
        drop(lines);
        timeout(LIMIT, child.wait_with_output())
            .await
            .expect("it ends")
            .unwrap()
    }
}

fn run_dir(dir: &Path) -> PathBuf {
    dir.join("run")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn everything_that_happens_is_printed_when_it_happens() {
    let node = Node::start().await;
    node.ok("alloc d0 4096").await;
    let mut watch = node.watch("watch domain d0");
    assert!(watch.line().await.starts_with("EVENT "));
    assert!(watch.line().await.starts_with("=  "));
    assert!(watch.line().await.starts_with("status "));
    node.ok("alloc d0 4096").await;
    let mut line = watch.line().await;
    while line.starts_with("status ") {
        line = watch.line().await;
    }
    assert!(
        line.starts_with("+  ") && line.contains("coherent"),
        "{line}"
    );
    node.ok("delete domain d0 --force").await;
    let ended = watch.end().await;
    assert_eq!(ended.status.code(), Some(3), "{ended:?}");
    node.daemon.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn json_is_read_line_by_line_and_gone_on_with() {
    let node = Node::start().await;
    let mut watch = node.watch("watch domain d0 -o json");
    let Event::Snapshot(part) = watch.event().await else {
        panic!("a snapshot comes first");
    };
    assert_eq!(node.info().await["watchers"], 1);
    drop(watch);
    node.ok("alloc d0 4096").await;
    let resumed = format!("watch domain d0 -o json --generation {}", part.generation);
    let Event::Change(change) = node.watch(&resumed).event().await else {
        panic!("a change comes first");
    };
    assert_eq!(change.generation, part.generation + 1);
    assert_eq!(change.added.len(), 1);
    node.daemon.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reader_that_goes_is_success_even_if_nothing_happens() {
    let node = Node::start().await;
    let mut watch = node.watch("watch domain d0");
    watch.line().await;
    let ended = watch.unread().await;
    assert_eq!(ended.status.code(), Some(0), "{ended:?}");
    node.daemon.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_interrupt_ends_it_and_a_daemon_that_stops_does() {
    let node = Node::start().await;
    let mut watch = node.watch("watch domain d0 -o json");
    watch.event().await;
    let pid = Pid::from_raw(i32::try_from(watch.child.id().unwrap()).unwrap());
    kill_process(pid.unwrap(), Signal::INT).unwrap();
    let ended = timeout(LIMIT, watch.child.wait()).await;
    let ended = ended.expect("nobody has it ignore interrupts").unwrap();
    let signal = std::os::unix::process::ExitStatusExt::signal(&ended);
    assert_eq!(signal, Some(2), "as a shell expects it");

    let mut watch = node.watch("watch domain d0 -o json");
    watch.event().await;
    let stopping = Instant::now();
    node.daemon.stop().await;
    assert!(stopping.elapsed() < Duration::from_secs(5));
    let ended = watch.end().await;
    assert_eq!(ended.status.code(), Some(5), "{ended:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_watcher_that_never_reads_stops_nobody_and_keeps_no_memory() {
    let node = Node::start().await;
    node.ok("create memory d0 --size 4KiB").await;
    let client = Client::connect(node.daemon.runtime_dir()).await.unwrap();
    let d0 = DomainId::new("d0").unwrap();
    // More than connections buffer: some four megabytes of events.
    let entry = |number: u64| DirectMapping {
        range: IovaRange::from_len(Iova::new((1 << 32) + (number << 13)), 4096).unwrap(),
        memory: MemoryId::new(1),
        offset: 0,
        perm: Perm::Read,
    };
    let entries = (0..100_000).map(entry);
    let set = client
        .as_owner(&d0)
        .stream_set_map(entries, SetMapOptions::default())
        .await;
    set.unwrap();
    let request = v1::WatchDomainRequest {
        name: d0.name(),
        generation: None,
    };
    let unread = client.domains().watch_domain(request).await.unwrap();
    // Until its connection takes no more.
    tokio::time::sleep(Duration::from_millis(500)).await;
    node.ok("alloc d0 4096").await;
    let mut other = node.watch("watch domain d0 -o json");
    assert!(matches!(other.event().await, Event::Snapshot(_)));
    drop(other);
    node.ok("delete domain d0 --force").await;
    let info = node.info().await;
    assert_eq!(
        (&info["regionBytes"], &info["domains"]),
        (&"0".into(), &0.into())
    );
    assert_ne!(info["watchers"], 0, "its stream is still open");
    // That it reads no more is known when it is gone, and at the latest when
    // the daemon has waited for it.
    drop((unread, client));
    node.daemon.stop().await;
}
