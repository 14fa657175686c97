//! Probes and metrics over HTTP, spoken by hand: what a kubelet and Prometheus
//! see, also of a daemon that is stuck, or stops, or is pestered.

use std::collections::HashMap;
use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use domaind_tests::direct::stream;
use domaind_tests::node::{domaind, greet};
use domaind_tests::pipe::{maps, places, unmaps};
use domaind_tests::raw::{attach, unmap_entry};
use domaind_tests::v1::Direction::{Bidirectional, ToDevice};
use domaind_tests::wait::{self, soon};
use domaind_tests::{Caller, Code, Node, P, Pipe, Raw, children, users, v1};
use nix::sys::ptrace;
use nix::unistd::Pid;
use rustix::process::Signal;
use tonic::codegen::http::uri::PathAndQuery;
use tonic_prost::ProstCodec;

/// A probe that waits longer has failed, as kubelets see it.
const PROBE_LIMIT: Duration = Duration::from_secs(1);

/// An answer.
#[derive(Debug)]
struct Answer {
    status: u16,
    headers: String,
    body: String,
}

trait Stream: Read + Write {}
impl<S: Read + Write> Stream for S {}

fn parse(bytes: &[u8]) -> Answer {
    let text = String::from_utf8(bytes.to_vec()).expect("text");
    let (headers, body) = text.split_once("\r\n\r\n").unwrap_or((&text, ""));
    let status = headers
        .split(' ')
        .nth(1)
        .and_then(|status| status.parse().ok());
    Answer {
        status: status.unwrap_or_else(|| panic!("no status: {text:?}")),
        headers: headers.to_lowercase(),
        body: body.to_owned(),
    }
}

fn ask(mut stream: impl Stream, request: &str) -> Answer {
    stream.write_all(request.as_bytes()).expect("written");
    let mut bytes = Vec::new();
    match stream.read_to_end(&mut bytes) {
        Ok(_) => {}
        // What was not read of the request is answered by a reset behind the answer.
        Err(error) if error.kind() == ErrorKind::ConnectionReset => {}
        Err(error) => panic!("{error}: {request:?}"),
    }
    parse(&bytes)
}

fn get(path: &str) -> String {
    format!("GET {path} HTTP/1.1\r\nHost: probes\r\n\r\n")
}

/// A daemon that answers over TCP.
struct Probed {
    node: Node,
    address: SocketAddr,
}

impl Probed {
    async fn start() -> Probed {
        Probed::with(&[]).await
    }

    async fn with(flags: &[&str]) -> Probed {
        let flags: Vec<_> = ["--metrics-listen=127.0.0.1:0"]
            .iter()
            .chain(flags)
            .copied()
            .collect();
        let node = Node::with(&flags).await;
        let log = node.log();
        let address = log
            .split("\"address\":\"")
            .nth(1)
            .and_then(|rest| rest.split('"').next());
        let address = address.unwrap_or_else(|| panic!("no address in {log}"));
        Probed {
            address: address.parse().expect("an address"),
            node,
        }
    }

    fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(self.address).expect("it listens");
        stream.set_read_timeout(Some(wait::DEADLINE)).expect("set");
        stream
    }

    fn get(&self, path: &str) -> Answer {
        ask(self.connect(), &get(path))
    }

    fn scrape(&self) -> Samples {
        let answer = self.get("/metrics");
        assert_eq!(answer.status, 200);
        Samples::of(&answer.body)
    }
}

/// Every sample by its name and labels, as they stand there.
#[derive(Debug)]
struct Samples(HashMap<String, f64>);

impl Samples {
    fn of(text: &str) -> Samples {
        let lines = text.lines().filter(|line| !line.starts_with('#'));
        let samples = lines.map(|line| {
            let (name, value) = line.rsplit_once(' ').expect("a name and a value");
            (name.to_owned(), value.parse().expect("a number"))
        });
        Samples(samples.collect())
    }

    #[track_caller]
    fn get(&self, name: &str) -> f64 {
        let value = self.0.get(name);
        *value.unwrap_or_else(|| panic!("there is no {name} among {:#?}", self.0.keys()))
    }

    /// Everything that has changed, by how much, but for what every scrape and
    /// every test of ours changes.
    fn since(&self, before: &Samples) -> Vec<(String, f64)> {
        let is_steady = |name: &&String| {
            !["process_", "grpc_", "domaind_map_duration_seconds_"]
                .iter()
                .any(|prefix| name.starts_with(prefix))
        };
        let mut changed: Vec<_> = self
            .0
            .keys()
            .filter(is_steady)
            .map(|name| {
                (
                    name.clone(),
                    self.get(name) - before.0.get(name).copied().unwrap_or(0.0),
                )
            })
            .filter(|(_, change)| *change != 0.0)
            .collect();
        changed.sort_by(|(one, _), (other, _)| one.cmp(other));
        changed
    }
}

fn by(changes: &[(&str, f64)]) -> Vec<(String, f64)> {
    let mut changes: Vec<_> = changes
        .iter()
        .map(|(name, by)| ((*name).to_owned(), *by))
        .collect();
    changes.sort_by(|(one, _), (other, _)| one.cmp(other));
    changes
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_daemon_that_serves_lives_and_is_ready_and_tells_what_it_counts() {
    let probed = Probed::start().await;
    for path in ["/livez", "/readyz"] {
        let answer = probed.get(path);
        assert_eq!(
            (answer.status, answer.body.as_str()),
            (200, "ok\n"),
            "{path}"
        );
        assert!(answer.headers.contains("cache-control: no-store"));
    }
    let plain = probed.get("/metrics?format=any");
    assert_eq!(plain.status, 200);
    assert!(
        plain.headers.contains("text/plain; version=0.0.4"),
        "{}",
        plain.headers
    );
    assert!(plain.body.contains("# TYPE domaind_attach_total counter\n"));
    let request = "GET /metrics HTTP/1.1\r\nHost: p\r\nAccept: application/openmetrics-text;version=1.0.0,*/*;q=0.1\r\n\r\n";
    let open = ask(probed.connect(), request);
    assert!(
        open.headers
            .contains("application/openmetrics-text; version=1.0.0")
    );
    assert!(
        open.body.ends_with("# EOF\n") && open.body.contains("# TYPE domaind_attach counter\n")
    );
    let (plain, open) = (Samples::of(&plain.body), Samples::of(&open.body));
    assert_eq!(open.since(&plain), []);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn what_is_none_of_the_three_is_refused() {
    let probed = Probed::start().await;
    for (request, status) in [
        (get("/"), 404),
        (get("/livez/"), 404),
        (get("/metrics/../livez"), 404),
        (get("/livez").replace("GET", "POST"), 405),
        (get("/metrics").replace("GET", "DELETE"), 405),
        (
            "POST /livez HTTP/1.1\r\nHost: p\r\nContent-Length: 1\r\n\r\nx".into(),
            405,
        ),
        (
            "GET /livez HTTP/1.1\r\nHost: p\r\nContent-Length: 1\r\n\r\nx".into(),
            413,
        ),
        (
            "GET /livez HTTP/1.1\r\nHost: p\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n".into(),
            413,
        ),
        (
            format!("GET /livez HTTP/1.1\r\n{}\r\n", "X: y\r\n".repeat(65)),
            431,
        ),
        (
            format!("GET /livez HTTP/1.1\r\nX: {}\r\n\r\n", "y".repeat(9000)),
            431,
        ),
        ("nonsense\r\n\r\n".into(), 400),
    ] {
        let answer = ask(probed.connect(), &request);
        assert_eq!(
            answer.status,
            status,
            "{}",
            &request[..request.len().min(80)]
        );
        assert_eq!(answer.headers.contains("allow: get, head"), status == 405);
    }
    let head = ask(probed.connect(), &get("/livez").replace("GET", "HEAD"));
    assert_eq!((head.status, head.body.as_str()), (200, ""));
    // One request for each connection.
    let twice = ask(probed.connect(), &[get("/livez"), get("/livez")].concat());
    assert!(
        twice.headers.contains("connection: close"),
        "{}",
        twice.headers
    );
    assert_eq!(twice.body, "ok\n");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_unix_socket_answers_the_same_and_goes_with_the_daemon() {
    let dir = tempfile::tempdir_in("/tmp").expect("a directory");
    let path = dir.path().join("metrics.sock");
    let flag = format!("--metrics-listen=unix:{}", path.display());
    let mut node = Node::with(&[&flag]).await;
    let connect = || UnixStream::connect(&path).expect("it listens");
    let mode = || {
        fs::symlink_metadata(&path)
            .expect("it is there")
            .permissions()
            .mode()
    };
    assert_eq!(mode() & 0o7777, 0o660);
    assert_eq!(ask(connect(), &get("/readyz")).status, 200);
    assert!(
        ask(connect(), &get("/metrics"))
            .body
            .contains("domaind_build_info{version=")
    );
    // What a killed one has left is in nobody's way.
    node.kill();
    assert!(path.exists());
    node.restart().await;
    assert_eq!(ask(connect(), &get("/livez")).status, 200);
    assert!(node.stop().success());
    assert!(!path.exists());
}

#[test]
fn a_place_that_clients_are_given_or_that_is_none_is_refused() {
    let dir = tempfile::tempdir_in("/tmp").expect("a directory");
    let run = dir.path().join("run");
    let says = |command: &str, listen: &str| {
        let output = domaind()
            .arg(command)
            .arg("--runtime-dir")
            .arg(&run)
            .args(["--metrics-listen", listen])
            .output()
            .expect("it runs");
        assert!(!output.status.success(), "{listen}");
        String::from_utf8(output.stderr).expect("text")
    };
    let public = format!("unix:{}", run.join("public/m.sock").display());
    for command in ["serve", "check-config"] {
        assert!(says(command, &public).contains("which clients are given"));
        for wrong in ["9464", "localhost:9464", "unix:here"] {
            assert!(says(command, wrong).contains("neither IP:port, nor unix:/path"));
        }
    }
    let taken = std::net::TcpListener::bind("127.0.0.1:0").expect("bound");
    let taken = taken.local_addr().expect("bound").to_string();
    assert!(says("serve", &taken).contains(&format!("listening at {taken}")));
    assert!(!run.join("public/api.sock").exists());
}

/// More of them than there are places, each as slow as it can be.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn slow_and_mute_connections_do_not_keep_a_probe_waiting() {
    let probed = Probed::start().await;
    let mut slow: Vec<_> = (0..80).map(|_| probed.connect()).collect();
    for (k, stream) in slow.iter_mut().enumerate().filter(|(k, _)| k % 2 == 0) {
        let _ = write!(stream, "GET /livez HTTP/1.1\r\nX-{k}: ");
    }
    for _ in 0..10 {
        for stream in slow.iter_mut().step_by(2) {
            let _ = stream.write_all(b"y");
        }
        let begun = Instant::now();
        assert_eq!(probed.get("/livez").status, 200);
        let took = begun.elapsed();
        assert!(took < PROBE_LIMIT, "{took:?}");
    }
    // The eldest have lost their places, and nobody keeps one for ever.
    for stream in &mut slow {
        let mut rest = Vec::new();
        let _ = stream.read_to_end(&mut rest);
    }
    let open = probed.scrape().get("process_open_fds");
    assert!(open < 60.0, "{open} fds");
}

/// It sends half of a request and never reads the answer of another.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn who_closes_half_way_is_nobodys_trouble() {
    let probed = Probed::start().await;
    let stream = probed.connect();
    (&stream)
        .write_all(get("/metrics").as_bytes())
        .expect("written");
    drop(stream);
    let stream = probed.connect();
    (&stream).write_all(b"GET /liv").expect("written");
    stream.shutdown(Shutdown::Write).expect("shut");
    assert_eq!(probed.get("/livez").status, 200);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_daemon_that_stops_is_not_ready_and_lives_to_its_end() {
    let mut probed = Probed::start().await;
    probed.node.domain("d0").await;
    // A call that is under way for as long as the test likes.
    let owner = Caller::owner(&probed.node, "d0").await;
    let (pieces, table) = stream();
    let header = v1::StreamSetMapRequest {
        header: Some(owner.header()),
        ..Default::default()
    };
    pieces.send(header).expect("sent");
    let mut setting = Box::pin(owner.stream_from(table));
    tokio::select! {
        biased;
        early = &mut setting => panic!("{early:?}"),
        listed = owner.list(v1::ListMappingsRequest::default()) => drop(listed.expect("listed")),
    }

    children::signal(probed.node.pid(), Signal::TERM);
    let mut last = String::new();
    wait::until("a daemon that is not ready", || {
        let answer = probed.get("/readyz");
        last = answer.body;
        answer.status == 503
    });
    assert_eq!(last, "the daemon stops\n");
    assert_eq!(probed.get("/livez").status, 200);
    assert_eq!(probed.get("/metrics").status, 200);

    let commit = v1::StreamSetMapRequest {
        commit: true,
        ..Default::default()
    };
    pieces.send(commit).expect("sent");
    drop(pieces);
    soon("the table", setting).await.expect("set");
    assert!(probed.node.stop().success());
    assert!(TcpStream::connect(probed.address).is_err());
}

/// Stops every thread of a process but one, as a debugger does, until it is
/// dropped. Who traces must be one thread of ours, so it has its own.
struct Frozen {
    thaw: Option<mpsc::Sender<()>>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Frozen {
    fn all_but(pid: u32, spared: &'static str) -> Frozen {
        let (thaw, thawed) = mpsc::channel::<()>();
        let (ready, is_ready) = mpsc::channel();
        let thread = std::thread::spawn(move || {
            let tasks = fs::read_dir(format!("/proc/{pid}/task")).expect("it is there");
            let tids = tasks.flatten().filter_map(|task| {
                let name = fs::read_to_string(task.path().join("comm")).ok()?;
                let tid: i32 = task.file_name().to_str()?.parse().ok()?;
                (name.trim() != spared).then_some(tid)
            });
            let tids: Vec<_> = tids.collect();
            for tid in &tids {
                ptrace::seize(Pid::from_raw(*tid), ptrace::Options::empty()).expect("seized");
                ptrace::interrupt(Pid::from_raw(*tid)).expect("interrupted");
            }
            ready.send(tids.len()).expect("the test waits");
            let _ = thawed.recv();
            // What it traced goes on when it ends.
        });
        assert!(is_ready.recv().expect("frozen") >= 2);
        Frozen {
            thaw: Some(thaw),
            thread: Some(thread),
        }
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        drop(self.thaw.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Its threads are all there, and none of those that serve moves.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_daemon_whose_runtime_is_stuck_does_not_live_and_does_again_when_it_goes_on() {
    let probed = Probed::start().await;
    if !users::is_root() {
        // A process that is not dumpable can only be traced by root; the limit
        // itself is tested beside it, in probes.rs.
        let own = children::tries(&["test", "-r", &format!("/proc/{}/mem", probed.node.pid())]);
        assert!(own.is_err(), "it could be traced");
        return;
    }
    let frozen = Frozen::all_but(probed.node.pid(), "probes");
    let begun = Instant::now();
    assert_eq!(probed.get("/livez").status, 200);
    let stuck = wait::find("a daemon that is stuck", || {
        Some(probed.get("/livez")).filter(|answer| answer.status == 503)
    });
    let took = begun.elapsed();
    assert!(
        (Duration::from_secs(8)..Duration::from_secs(13)).contains(&took),
        "{took:?}"
    );
    assert!(stuck.body.contains("was last alive 10."), "{}", stuck.body);
    drop(frozen);
    wait::until("a daemon that lives again", || {
        probed.get("/livez").status == 200
    });
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn counters_move_by_what_was_done_and_gauges_show_what_is_there() {
    let probed = Probed::start().await;
    let node = &probed.node;
    let start = probed.scrape();
    node.domain("d0").await;
    let with_domain = probed.scrape();
    let table_bytes = with_domain.get("domaind_region_bytes{kind=\"table\"}");
    let used = with_domain.get("domaind_quota_used_bytes") - start.get("domaind_quota_used_bytes");
    assert!(used >= f64::from(20 << 20), "{used}");
    assert_eq!(
        with_domain.since(&start),
        by(&[
            ("domaind_domains", 1.0),
            ("domaind_region_bytes{kind=\"bounce\"}", f64::from(16 << 20)),
            (
                "domaind_region_bytes{kind=\"coherent\"}",
                f64::from(4 << 20)
            ),
            ("domaind_region_bytes{kind=\"table\"}", table_bytes),
            ("domaind_regions{kind=\"bounce\"}", 1.0),
            ("domaind_regions{kind=\"coherent\"}", 1.0),
            ("domaind_regions{kind=\"table\"}", 1.0),
            ("domaind_quota_used_bytes", used),
        ])
    );

    let mut driver = Raw::driver(node, "d0").await;
    let memory = driver.memory(32 * P).await;
    let attached = probed.scrape();
    assert_eq!(
        attached.since(&with_domain),
        by(&[
            ("domaind_attach_total{result=\"granted\"}", 1.0),
            ("domaind_clients{role=\"driver\"}", 1.0),
            // Two apertures, the table and the session page.
            ("domaind_fds_passed_total", 4.0),
            ("domaind_memories", 1.0),
        ])
    );

    // One call of two entries, of which one copies; a refused one; the way back.
    let both = vec![
        memory.entry(0, 100, ToDevice),
        memory.entry(P, 3 * P, v1::Direction::FromDevice),
    ];
    let mapped = driver.map_all(both, false).await.expect("mapped").results;
    let mapped: Vec<_> = mapped
        .into_iter()
        .map(|result| match result.outcome {
            Some(v1::map_result::Outcome::Mapping(mapping)) => mapping,
            other => panic!("{other:?}"),
        })
        .collect();
    driver
        .map(memory.entry(0, 1 << 40, ToDevice))
        .await
        .expect_err("outside of its memory");
    let maps_done = probed.scrape();
    assert_eq!(
        maps_done.since(&attached),
        by(&[
            (
                "domaind_bounce_copied_bytes_total{direction=\"to_device\"}",
                100.0
            ),
            (
                "domaind_map_operations_total{op=\"map\",result=\"ok\"}",
                1.0
            ),
            (
                "domaind_map_operations_total{op=\"map\",result=\"refused\"}",
                1.0
            ),
            ("domaind_mappings{kind=\"streaming\"}", 2.0),
        ])
    );
    driver.unmap(&mapped[0], None).await.expect("unmapped");
    driver
        .unmap(&mapped[1], Some(P + 1))
        .await
        .expect("unmapped");
    let unmapped = probed.scrape();
    assert_eq!(
        unmapped.since(&maps_done),
        by(&[
            (
                "domaind_bounce_copied_bytes_total{direction=\"from_device\"}",
                4097.0
            ),
            (
                "domaind_map_operations_total{op=\"unmap\",result=\"ok\"}",
                2.0
            ),
            ("domaind_mappings{kind=\"streaming\"}", -2.0),
        ])
    );

    // The same on a pipeline, where a batch is an operation.
    let mut pipe = Pipe::open(&driver).await.expect("opened");
    let entries: Vec<_> = (0..8)
        .map(|k| memory.entry(k * P, 64, Bidirectional))
        .collect();
    let answer = pipe.ask(maps(&entries)).await.expect("mapped");
    let places = places(&answer, &[64; 8]);
    let piped = probed.scrape();
    assert_eq!(
        piped.since(&unmapped),
        by(&[
            (
                "domaind_bounce_copied_bytes_total{direction=\"to_device\"}",
                512.0
            ),
            (
                "domaind_map_operations_total{op=\"map\",result=\"ok\"}",
                1.0
            ),
            ("domaind_mappings{kind=\"streaming\"}", 8.0),
        ])
    );
    let ends: Vec<_> = places
        .iter()
        .map(|place| unmap_entry(place, None))
        .collect();
    pipe.ask(unmaps(&ends)).await.expect("unmapped");
    pipe.ask(unmaps(&ends[..1]))
        .await
        .expect_err("it is not there any more");
    pipe.finish().await.expect("ended");
    driver.lease_len(2 * P).await.expect("leased");
    driver.alloc_len(P).await.expect("allocated");
    let leased = probed.scrape();
    assert_eq!(
        leased.since(&piped),
        by(&[
            (
                "domaind_bounce_copied_bytes_total{direction=\"from_device\"}",
                512.0
            ),
            ("domaind_lease_bytes", 8192.0),
            (
                "domaind_map_operations_total{op=\"alloc_coherent\",result=\"ok\"}",
                1.0
            ),
            (
                "domaind_map_operations_total{op=\"lease\",result=\"ok\"}",
                1.0
            ),
            (
                "domaind_map_operations_total{op=\"unmap\",result=\"ok\"}",
                1.0
            ),
            (
                "domaind_map_operations_total{op=\"unmap\",result=\"refused\"}",
                1.0
            ),
            ("domaind_mappings{kind=\"coherent\"}", 1.0),
            ("domaind_mappings{kind=\"lease\"}", 1.0),
            ("domaind_mappings{kind=\"streaming\"}", -8.0),
        ])
    );

    // Each call once, with its code and a time.
    let calls = |samples: &Samples, code| {
        let name = format!(
            "grpc_server_handled_total{{grpc_service=\"domaind.v1.MappingService\",grpc_method=\"Map\",grpc_code=\"{code}\"}}"
        );
        samples.get(&name)
    };
    assert_eq!(calls(&leased, "OK"), 1.0);
    assert_eq!(calls(&leased, "INVALID_ARGUMENT"), 1.0);
    let took = "{grpc_service=\"domaind.v1.MappingService\",grpc_method=\"Map\"}";
    assert_eq!(
        leased.get(&format!("grpc_server_handling_seconds_count{took}")),
        2.0
    );
    assert_eq!(
        leased.get("domaind_map_duration_seconds_count{op=\"map\"}"),
        3.0
    );
    assert_eq!(
        leased.get("domaind_map_duration_seconds_bucket{op=\"map\",le=\"+Inf\"}"),
        3.0
    );
    assert!(leased.get("domaind_map_duration_seconds_sum{op=\"map\"}") > 0.0);

    // What ends takes with it what it held.
    drop(driver);
    wait::until("a session that is gone", || {
        let samples = probed.scrape();
        [
            "domaind_clients{role=\"driver\"}",
            "domaind_ghosts",
            "domaind_mappings{kind=\"lease\"}",
        ]
        .iter()
        .all(|name| samples.get(name) == 0.0)
    });
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn who_may_not_is_counted_by_why_and_who_has_no_seat_is_counted() {
    let probed = Probed::start().await;
    let node = &probed.node;
    node.domain("d0").await;
    let start = probed.scrape();
    let mut wire = domaind_tests::raw::Wire::connect(&node.runtime_dir().fd_socket());
    wire.hello().await;
    let ask = attach("domains/none", v1::Role::Driver, v1::Access::ReadWrite);
    wire.ask(ask, None).await.expect_err("there is none");
    // Our own uid could undo it.
    let ask = attach("domains/d0", v1::Role::Device, v1::Access::ReadOnly);
    wire.ask(ask, None).await.expect_err("it would not hold");
    let client = node.client().await;
    let request = v1::MapRequest::default();
    client
        .mappings()
        .map(request)
        .await
        .expect_err("no session");
    let changed = probed.scrape().since(&start);
    assert_eq!(
        changed,
        by(&[
            ("domaind_attach_total{result=\"refused\"}", 2.0),
            ("domaind_auth_denied_total{reason=\"no_session\"}", 1.0),
            ("domaind_auth_denied_total{reason=\"unenforceable\"}", 1.0),
            (
                "domaind_map_operations_total{op=\"map\",result=\"refused\"}",
                1.0
            ),
        ])
    );

    let before = probed.scrape().get("domaind_rate_limited_total");
    let api = node.runtime_dir().api_socket();
    let mut streams: Vec<UnixStream> = Vec::new();
    wait::until("a user without a seat", || {
        streams.extend((0..64).filter_map(|_| UnixStream::connect(&api).ok()));
        probed.scrape().get("domaind_rate_limited_total") > before
    });
}

fn words(path: &Path) -> &'static str {
    // A path is static for tonic; this one is the test's for as long as it runs.
    Box::leak(path.to_str().expect("text").to_owned().into_boxed_str())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn nothing_that_a_client_says_becomes_a_label() {
    const WORD: &str = "zyx";
    let probed = Probed::start().await;
    let node = &probed.node;
    let lines = |probed: &Probed| probed.get("/metrics").body.lines().count();
    let before = lines(&probed);
    node.domain(&format!("{WORD}-domain")).await;
    let driver = Raw::driver(node, &format!("{WORD}-domain")).await;
    let client = node.client().await;
    greet(&client).await;
    for path in [
        format!("/{WORD}.Service/{WORD}"),
        format!("/domaind.v1.MappingService/{WORD}"),
    ] {
        let mut grpc = tonic::client::Grpc::new(client.channel());
        grpc.ready().await.expect("ready");
        let path = PathAndQuery::from_static(words(Path::new(&path)));
        let codec = ProstCodec::<v1::GetDomainRequest, v1::Domain>::default();
        let request = tonic::Request::new(v1::GetDomainRequest { name: WORD.into() });
        let refused = grpc
            .unary(request, path, codec)
            .await
            .expect_err("there is none");
        assert_eq!(refused.code(), Code::Unimplemented);
    }
    let text = probed.get("/metrics").body;
    assert!(!text.contains(WORD), "{text}");
    let samples = Samples::of(&text);
    let unknown = "grpc_server_handled_total{grpc_service=\"unknown\",grpc_method=\"unknown\",grpc_code=\"UNIMPLEMENTED\"}";
    assert_eq!(samples.get(unknown), 2.0);
    // However often, and by whatever name.
    let most = before + 400;
    assert!(
        text.lines().count() < most,
        "{} lines",
        text.lines().count()
    );
    drop(driver);
}
