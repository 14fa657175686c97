//! The daemon as a process: how it starts, how it stops, what it is told, and
//! what it does not let itself be talked into.

use std::fs;
use std::io::Read;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use domaind_tests::ctl::{self, Output};
use domaind_tests::node::{self, domaind, spec};
use domaind_tests::raw::Wire;
use domaind_tests::refusal::{answer, assert_numbers};
use domaind_tests::v1::Direction::Bidirectional;
use domaind_tests::{Actor, Ask, Bytes, Code, Node, P, Raw, Reason, children, refused, v1, wait};
use rustix::process::{Pid, Resource, Rlimit, Signal};

/// Runs `domaind` to its end.
fn run(line: &[&str]) -> Output {
    let mut command = domaind();
    command.args(line).stdin(Stdio::null());
    ctl::finish(ctl::start(command))
}

fn sockets(node: &Node) -> usize {
    let dir = node.runtime_dir();
    let entries = [dir.public(), dir.admin()].map(fs::read_dir);
    entries.into_iter().flatten().flatten().count()
}

// ---- Start and stop

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn sigterm_tells_the_sessions_takes_the_sockets_away_and_exits_0() {
    for signal in [Signal::TERM, Signal::INT] {
        let mut node = Node::start().await;
        node.domain("d0").await;
        let mut driver = Actor::driver(&node, "d0");
        let mut device = Actor::device(&node, "d0");
        let memory = driver.buffer(P);
        let place = driver.map(memory, 0, 17, Bidirectional);
        assert_eq!(sockets(&node), 3);

        if signal == Signal::INT {
            children::signal(node.pid(), signal);
        }
        let status = node.stop();

        assert_eq!(status.code(), Some(0), "{}", children::describe(status));
        assert_eq!(sockets(&node), 0, "a name is left");
        for actor in [&mut driver, &mut device] {
            assert_eq!(actor.end_reason(), "Shutdown");
        }
        // The session's bytes are scrubbed, the memory is still shared.
        device.write(place.iova, "goes on without");
        driver.assert_sees(place.iova, "goes on without");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_second_daemon_is_refused_and_the_first_serves_on() {
    let node = Node::start().await;
    node.domain("d0").await;
    let dir = node.runtime_dir();
    let second = run(&["serve", "--runtime-dir", dir.path().to_str().unwrap()]);
    assert_eq!(second.code, 1, "{second:?}");
    assert!(
        second.stderr.contains(&node.pid().to_string()),
        "it names the pid: {second:?}"
    );
    assert!(
        second.stderr.contains(dir.path().to_str().unwrap()),
        "{second:?}"
    );
    assert_eq!(sockets(&node), 3);
    node.client()
        .await
        .domains()
        .get_domain(v1::GetDomainRequest {
            name: node::name("d0"),
        })
        .await
        .unwrap();
    Raw::driver(&node, "d0").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn after_kill_9_the_next_starts_at_once_in_the_same_directory() {
    let mut node = Node::start().await;
    node.domain("d0").await;
    let first = node.info().await;
    let mut driver = Actor::driver(&node, "d0");
    let ring = driver.alloc(P, true);
    driver.write(ring.iova, "outlives the daemon");

    node.kill();
    assert_eq!(driver.end_reason(), "ConnectionLost");
    driver.assert_sees(ring.iova, "outlives the daemon");
    let begun = Instant::now();
    node.restart().await;
    assert!(begun.elapsed() < Duration::from_secs(5), "at once");

    let second = node.info().await;
    assert_ne!(first.instance, second.instance);
    assert_eq!(
        (second.domains, second.sessions, second.region_bytes),
        (0, 0, 0)
    );
    assert_eq!(sockets(&node), 3);
    node.domain("d0").await;
    driver.attach("d0", v1::Role::Driver);
    driver.assert_sees(ring.iova, Bytes::same(node::scrubbed(), P));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn without_a_command_it_serves() {
    let dir = tempfile::tempdir_in("/tmp").unwrap();
    let run_dir = dir.path().join("run");
    let mut command = domaind();
    command
        .arg("--runtime-dir")
        .arg(&run_dir)
        .stdin(Stdio::null());
    let mut child = ctl::start(command);
    let ready = run_dir.join("admin/admin.sock");
    let until = Instant::now() + wait::DEADLINE;
    while !ready.exists() && Instant::now() < until {
        if matches!(child.try_wait(), Ok(Some(_))) {
            panic!("it ended: {:?}", ctl::finish(child));
        }
        tokio::time::sleep(Duration::from_millis(3)).await;
    }
    children::signal(child.id(), Signal::TERM);
    let output = ctl::finish(child);
    assert_eq!(output.code, 0, "{output:?}");
    assert_eq!(output.stdout, "", "logs go to standard error");
}

/// A client that hangs, attached and connected, delays the end but does not
/// prevent it.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_hung_client_cannot_keep_the_daemon_from_stopping() {
    let mut node = Node::start().await;
    node.domain("d0").await;
    let hung = Actor::driver(&node, "d0");
    children::stop(hung.pid());
    // Node::stop gives up after a while; the daemon promises ten seconds.
    let status = node.stop();
    assert_eq!(status.code(), Some(0), "{}", children::describe(status));
    children::signal(hung.pid(), Signal::CONT);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn log_lines_are_json_on_request_and_tell_no_secret() {
    let mut node = Node::with(&["--log-level", "trace"]).await;
    node.domain("d0").await;
    let mut driver = Actor::driver(&node, "d0");
    let memory = driver.buffer(P);
    driver.fill(memory, 0, "SECRET-PAYLOAD");
    let place = driver.map(memory, 0, 14, Bidirectional);
    driver.unmap(place, None);
    let raw = Raw::driver(&node, "d0").await;
    let mapping = raw.alloc_len(1).await.unwrap();
    raw.free(mapping.iova, mapping.mapping_id).await.unwrap();
    let token = raw.token();
    node.stop();
    let log = node.log();
    assert!(log.lines().count() > 2);
    for line in log.lines() {
        let value: serde_json::Value = serde_json::from_str(line).unwrap_or_else(|error| {
            panic!("{error}: {line}");
        });
        assert!(
            value["timestamp"].is_string() && value["level"].is_string(),
            "{line}"
        );
    }
    assert!(!log.contains("SECRET-PAYLOAD"));
    assert!(!log.contains(&token), "a token is in the log");
    let decimal: Vec<_> = raw.given.attached.token.iter().map(u8::to_string).collect();
    assert!(!log.contains(&decimal.join(", ")), "a token is in the log");
}

// ---- Configuration

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_flag_wins_over_a_variable_and_a_variable_over_the_file() {
    let dir = tempfile::tempdir_in("/tmp").unwrap();
    let file = dir.path().join("domaind.toml");
    fs::write(
        &file,
        "config_version = 1\n[limits]\nregion_bytes = 11000000\n",
    )
    .unwrap();
    let config = format!("--config={}", file.display());
    let variable = ("DOMAIND_LIMITS_REGION_BYTES", "12000000");
    let flag = "--limits-region-bytes=13000000";
    type Row<'a> = (Vec<&'a str>, Vec<(&'a str, &'a str)>, u64);
    let table: Vec<Row> = vec![
        (vec![&config], vec![], 11_000_000),
        (
            vec![],
            vec![("DOMAIND_CONFIG", file.to_str().unwrap())],
            11_000_000,
        ),
        (vec![&config], vec![variable], 12_000_000),
        (vec![&config, flag], vec![variable], 13_000_000),
        (vec![flag], vec![], 13_000_000),
    ];
    for (flags, env, wanted) in table {
        let node = Node::configured(&flags, &env).await;
        assert_eq!(
            node.info().await.region_budget_bytes,
            wanted,
            "{flags:?} {env:?}"
        );
    }
}

#[test]
fn an_unknown_key_is_refused_with_the_nearest_valid_one() {
    let dir = tempfile::tempdir_in("/tmp").unwrap();
    let file = dir.path().join("domaind.toml");
    let run_dir = dir.path().join("run");
    let (config, runtime) = (file.to_str().unwrap(), run_dir.to_str().unwrap());
    for (text, key, nearest) in [
        (
            "[limits]\nregion_byte = 5\n",
            "region_byte",
            "limits.region_bytes",
        ),
        ("runtime_dri = '/x'\n", "runtime_dri", "runtime_dir"),
        (
            "[polciy]\nadvisory_read_only = true\n",
            "polciy",
            "policy.advisory_read_only",
        ),
    ] {
        fs::write(&file, text).unwrap();
        for command in ["check-config", "serve"] {
            let output = run(&[command, "--config", config, "--runtime-dir", runtime]);
            assert_eq!(output.code, 1, "{text} {output:?}");
            for word in [key, nearest, config] {
                assert!(output.stderr.contains(word), "{word} in {output:?}");
            }
            assert_eq!(output.stdout, "");
        }
    }
    assert!(!run_dir.exists(), "nothing was begun");
}

#[test]
fn the_default_config_passes_and_other_nonsense_does_not() {
    let dir = tempfile::tempdir_in("/tmp").unwrap();
    let file = dir.path().join("domaind.toml");
    let config = file.to_str().unwrap();
    let runtime = dir.path().join("run");
    let check = |more: &[&str]| {
        let line = [
            "check-config",
            "--config",
            config,
            "--runtime-dir",
            runtime.to_str().unwrap(),
        ];
        run(&[&line, more].concat())
    };
    let defaults = run(&["default-config"]);
    assert_eq!((defaults.code, defaults.stderr.as_str()), (0, ""));
    fs::write(&file, &defaults.stdout).unwrap();
    let output = check(&[]);
    assert_eq!(output.code, 0, "{output:?}");

    let missing = run(&["check-config", "--config", "/nonexistent/domaind.toml"]);
    assert_eq!(missing.code, 1);
    assert!(
        missing.stderr.contains("/nonexistent/domaind.toml"),
        "{missing:?}"
    );
    for text in [
        "config_version = 2\n",
        "[log]\nformat = 'xml'\n",
        "[limits]\nregion_bytes = -5\n",
        "[limits]\nregion_bytes = 'much'\n",
        "this is no TOML",
    ] {
        fs::write(&file, text).unwrap();
        let output = check(&[]);
        assert_eq!(output.code, 1, "{text}: {output:?}");
        assert!(
            output.stderr.contains(config),
            "it names the file: {output:?}"
        );
    }
    // Usage errors are 2, and say so.
    for line in [
        &["serve", "--no-such-flag"][..],
        &["sevre"],
        &["serve", "--limits-region-bytes=x"],
    ] {
        let output = run(line);
        assert_eq!(output.code, 2, "{line:?}: {output:?}");
    }
}

#[test]
fn a_log_level_that_is_none_and_a_path_too_long_for_a_socket_are_refused() {
    let dir = tempfile::tempdir_in("/tmp").unwrap();
    let run_dir = dir.path().join("run");
    let output = run(&[
        "serve",
        "--runtime-dir",
        run_dir.to_str().unwrap(),
        "--log-level",
        "=x=",
    ]);
    assert_eq!(output.code, 1, "{output:?}");
    assert!(output.stderr.contains("=x="), "{output:?}");
    assert!(!run_dir.join("public").exists());
    let long = dir.path().join("x".repeat(120));
    let output = run(&["serve", "--runtime-dir", long.to_str().unwrap()]);
    assert_eq!(output.code, 1, "{output:?}");
    assert!(output.stderr.contains("107"), "{output:?}");
    assert!(!long.exists());
}

#[test]
fn the_version_is_that_of_the_workspace() {
    let output = run(&["version"]);
    assert_eq!(
        (output.code, output.stdout.as_str()),
        (0, "domaind 0.1.0\n")
    );
}

// ---- Limits

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn the_byte_budget_is_checked_before_the_kernel_is_asked() {
    const BUDGET: u64 = 8 << 20;
    let node = Node::with(&["--limits-region-bytes=8388608"]).await;
    let before = node.counts().await;
    assert_eq!(node.info().await.region_budget_bytes, BUDGET);
    let exhausted = (Code::ResourceExhausted, Reason::NoMemory);
    // Far more than any machine has, too.
    for want in [BUDGET + P, 1 << 46] {
        let refusal = refused(
            node.create("d0", spec(want, 0)).await,
            exhausted.0,
            exhausted.1,
        );
        assert_numbers(&refusal, &[("want_bytes", &want.to_string())]);
        assert!(
            refusal.message.contains("8388608"),
            "the budget: {refusal:?}"
        );
        assert_eq!(node.counts().await, before, "something is left");
    }
    // Both apertures count, and what is free is what is left.
    let both = node.create("d0", spec(4 << 20, (4 << 20) + P)).await;
    refused(both, exhausted.0, exhausted.1);
    node.create("d0", spec(4 << 20, 2 << 20)).await.unwrap();
    refused(
        node.create("d1", spec((2 << 20) + P, 0)).await,
        exhausted.0,
        exhausted.1,
    );
    node.create("d1", spec(2 << 20, 0)).await.unwrap();
    assert_eq!(node.info().await.region_bytes, BUDGET);
    node.delete("d0", false).await.unwrap();
    node.create("d2", spec(6 << 20, 0)).await.unwrap();
    for id in ["d1", "d2"] {
        node.delete(id, false).await.unwrap();
    }
    node.until_counts(before).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn one_user_owns_at_most_1024_domains() {
    let node = Node::start().await;
    for index in 0..1_024 {
        node.create(&format!("d{index}"), spec(0, 0)).await.unwrap();
    }
    let one_more = node.create("d1024", spec(0, 0)).await;
    let refusal = refused(one_more, Code::ResourceExhausted, Reason::QuotaExceeded);
    assert_numbers(&refusal, &[("limit", "1024"), ("used", "1024")]);
    node.delete("d7", false).await.unwrap();
    node.create("d1024", spec(0, 0)).await.unwrap();
}

/// 512 connections to the fd socket; those above are closed, and those that
/// are in are served.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn connections_to_the_fd_socket_are_capped_per_user() {
    if !raise_own_limit() {
        return;
    }
    let node = Node::start().await;
    node.domain("d0").await;
    let base = node.counts().await;
    let mut driver = Raw::driver(&node, "d0").await;
    let before = node.counts().await;
    let mut inside = Vec::new();
    let mut refused = 0;
    for _ in 0..700 {
        let mut wire = Wire::connect(&node.runtime_dir().fd_socket());
        let hello = domaind_tests::raw::hello(1, 1);
        // A closed one may be noticed at either.
        let answered = wire.send(hello, None).await.is_ok() && wire.receive().await.is_some();
        match answered {
            true => inside.push(wire),
            false => refused += 1,
        }
    }
    assert_eq!(
        (inside.len(), refused),
        (511, 189),
        "one seat is the driver's"
    );
    let memory = driver.memory(P).await;
    driver.unregister(memory.id).await.unwrap();
    drop(inside);
    node.until_counts(before).await;
    Raw::device(&node, "d0").await;
    drop(driver);
    // The control plane's connections of the two sessions go as well.
    node.until_counts(base).await;
}

/// More connections than file descriptors: those that are there are served,
/// the daemon does not spin, and all is well when they are gone.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn running_out_of_file_descriptors_harms_only_newcomers() {
    let node = Node::start().await;
    node.domain("d0").await;
    let mut driver = Raw::driver(&node, "d0").await;
    let counts = node.counts().await;
    let pid = Pid::from_raw(node.pid().cast_signed());
    let few = u64::from(counts.open_fds) + 12;
    let limit = Rlimit {
        current: Some(few),
        maximum: Some(few),
    };
    rustix::process::prlimit(pid, Resource::Nofile, limit).expect("prlimit of a child");

    let dir = node.runtime_dir();
    let crowd: Vec<_> = (0..100)
        .map(|_| {
            (
                UnixStream::connect(dir.api_socket()),
                Wire::connect(&dir.fd_socket()),
            )
        })
        .collect();
    // GetInfo itself has to open a directory, so other calls are made.
    let (begun, cpu) = (Instant::now(), cpu_ticks(node.pid()));
    while begun.elapsed() < Duration::from_secs(1) {
        let asked = Instant::now();
        let ring = driver.alloc_len(P).await.unwrap();
        driver.free(ring.iova, ring.mapping_id).await.unwrap();
        assert!(
            asked.elapsed() < Duration::from_secs(1),
            "those inside wait"
        );
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let used = cpu_ticks(node.pid()) - cpu;
    assert!(used < 40, "{used} ticks of a hundred: it spins");
    // A registration that finds no descriptor free is refused in words, and the
    // driver is not blamed: its session goes on.
    let memfd = domaind_tests::files::good_memfd(P);
    let mut refusal = None;
    // Some may still be free, but never as many as this.
    for _ in 0..few {
        let ask = domaind_tests::raw::register(true);
        let fd = Some(std::os::fd::AsFd::as_fd(&memfd));
        if let Err(refused) = driver.wire.ask(ask, fd).await {
            refusal = Some(refused);
            break;
        }
    }
    let refusal = refusal.expect("the daemon has no descriptors for all of these");
    assert_eq!(
        (refusal.grpc_code(), refusal.reason()),
        (Code::ResourceExhausted, v1::ErrorReason::NoMemory),
        "{refusal:?}"
    );
    driver.alloc_len(P).await.expect("the session goes on");

    drop(crowd);
    drop(driver);
    let session = async || node.usage("d0").await.sessions;
    wait::until_equal("the end of the session", 0, session).await;
    // Both queues are served in order: whoever is answered now stands behind
    // the whole crowd. Until then the crowd may take what has become free.
    let answered = async || Wire::connect(&dir.fd_socket()).is_welcomed().await;
    wait::until_equal("an answer behind the crowd", true, answered).await;
    let called = async || {
        let client = domaind_client::Client::connect(&dir).await;
        let Ok(client) = client else { return false };
        client
            .domains()
            .list_domains(v1::ListDomainsRequest::default())
            .await
            .is_ok()
    };
    wait::until_equal("a call behind the crowd", true, called).await;
    let has_room = async || node.counts().await.open_fds < counts.open_fds;
    wait::until_equal("room for newcomers", true, has_room).await;
    // New ones are let in again.
    let again = Raw::driver(&node, "d0").await;
    drop(again);
    let sessions = async || node.sessions("d0").await.len();
    wait::until_equal("all sessions gone", 0, sessions).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn an_fd_connection_that_says_nothing_is_closed() {
    let node = Node::start().await;
    let before = node.counts().await;
    let silent = Wire::connect(&node.runtime_dir().fd_socket());
    let welcomed_only = {
        let mut wire = Wire::connect(&node.runtime_dir().fd_socket());
        wire.hello().await;
        wire
    };
    for wire in [silent, welcomed_only] {
        let ended = wire.closed().await.ended.expect("it says why");
        assert_eq!(ended.reason(), v1::EndReason::Protocol);
    }
    node.until_counts(before).await;
}

/// DESIGN.md section 6: connections without a preface are reaped.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_grpc_connection_that_says_nothing_is_closed() {
    let node = Node::start().await;
    let before = node.counts().await;
    let mut silent = UnixStream::connect(node.runtime_dir().api_socket()).unwrap();
    silent.set_read_timeout(Some(wait::DEADLINE)).unwrap();
    let reading = tokio::task::spawn_blocking(move || {
        // The server's own preface may come; then the end must.
        silent.read_to_end(&mut Vec::new()).is_ok()
    });
    assert!(
        reading.await.unwrap(),
        "a connection without a preface stays for ever"
    );
    node.until_counts(before).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn what_is_no_http2_is_closed_and_harms_nobody() {
    use std::io::Write;
    let node = Node::start().await;
    let before = node.counts().await;
    for bytes in [
        &b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"[..],
        &[0; 4_096],
        &[0xff; 100_000],
    ] {
        for path in [
            node.runtime_dir().api_socket(),
            node.runtime_dir().admin_socket(),
        ] {
            let mut stream = UnixStream::connect(path).unwrap();
            stream.set_read_timeout(Some(wait::DEADLINE)).unwrap();
            // It may be closed before all is written.
            let _ = stream.write_all(bytes);
            let mut said = Vec::new();
            if let Err(error) = stream.read_to_end(&mut said) {
                assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
            }
        }
    }
    node.until_counts(before).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn cancelled_calls_have_done_everything_or_nothing() {
    let node = Node::start().await;
    node.domain("d0").await;
    let mut driver = Raw::driver(&node, "d0").await;
    let memory = driver.memory(1 << 20).await;
    let usage = node.usage("d0").await;
    for round in 0..100_u64 {
        let entries = vec![memory.entry(0, 1 << 20, Bidirectional); 4];
        let map = driver.map_all(entries, false);
        // Dropped at some moment between the request and its answer.
        let moment = Duration::from_micros(round * 37);
        let _ = tokio::time::timeout(moment, map).await;
        // What was mapped all the same is taken back by what is listed.
        loop {
            let mappings = node.mappings("d0").await;
            let live = |mapping: &&v1::Mapping| mapping.state() == v1::MappingState::Live;
            if mappings.iter().filter(live).count() == mappings.len() {
                assert!(mappings.len() % 4 == 0, "half a batch: {}", mappings.len());
                let entries: Vec<_> = mappings
                    .iter()
                    .map(|mapping| v1::UnmapEntry {
                        iova: mapping.iova,
                        mapping_id: mapping.mapping_id,
                        ..Default::default()
                    })
                    .collect();
                if !entries.is_empty() {
                    driver.unmap_all(entries, true).await.unwrap();
                }
                break;
            }
        }
    }
    drop(driver);
    let wanted = v1::DomainUsage {
        sessions: 0,
        memories: 0,
        ..usage
    };
    node.until_usage("d0", wanted).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn updating_a_domain_changes_what_is_set_and_leaves_the_rest() {
    let node = Node::start().await;
    let before = node.domain("d0").await;
    let update = v1::UpdateDomainRequest {
        name: node::name("d0"),
        quotas: Some(v1::Quotas {
            memories: 5,
            ..Default::default()
        }),
        ..Default::default()
    };
    let after = answer(node.admin().domains().update_domain(update).await).unwrap();
    let quotas = v1::Quotas {
        memories: 5,
        ..before.quotas.unwrap()
    };
    assert_eq!(
        after,
        v1::Domain {
            quotas: Some(quotas),
            ..before
        }
    );
    let odd = v1::UpdateDomainRequest {
        name: node::name("d0"),
        scrub: 9,
        ..Default::default()
    };
    let odd = answer(node.admin().domains().update_domain(odd).await);
    refused(odd, Code::InvalidArgument, Reason::Malformed);
    assert_eq!(node.get("d0").await.unwrap(), after);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_runtime_directory_that_cannot_be_one_is_refused() {
    let dir = tempfile::tempdir_in("/tmp").unwrap();
    let file = dir.path().join("file");
    fs::write(&file, "").unwrap();
    let output = run(&["serve", "--runtime-dir", file.to_str().unwrap()]);
    assert_eq!(output.code, 1, "{output:?}");
    assert!(output.stderr.contains(file.to_str().unwrap()), "{output:?}");
    // A client has nothing to find there either.
    let said = no_daemon(&dir.path().join("none")).await;
    assert!(said.contains("api.sock"), "{said}");
}

async fn no_daemon(dir: &Path) -> String {
    let dir = domaind_client::RuntimeDir::new(dir).unwrap();
    let error = domaind_client::Client::connect(&dir).await.unwrap_err();
    assert_eq!(error.code(), Some(Code::Unavailable));
    error.to_string()
}

/// This process holds one end of each connection, and a daemon that it starts
/// inherits the limit. Says why if that is not enough.
fn raise_own_limit() -> bool {
    let limit = rustix::process::getrlimit(Resource::Nofile);
    let all = Rlimit {
        current: limit.maximum,
        ..limit
    };
    rustix::process::setrlimit(Resource::Nofile, all).expect("up to the hard limit");
    let enough = limit.maximum.is_none_or(|fds| fds >= 4_096);
    if !enough {
        println!(
            "not tried: a hard limit of {:?} file descriptors",
            limit.maximum
        );
    }
    enough
}

/// User and system time of a process, in hundredths of a second.
fn cpu_ticks(pid: u32) -> u64 {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).expect("it runs");
    let fields: Vec<_> = stat
        .rsplit_once(')')
        .unwrap()
        .1
        .split_whitespace()
        .collect();
    let ticks = |index: usize| fields[index].parse::<u64>().unwrap();
    ticks(11) + ticks(12)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn an_actor_cannot_be_driven_without_a_daemon() {
    // The harness itself: a dead daemon is an error of the asking, not a hang.
    let mut node = Node::start().await;
    let mut actor = Actor::start(&node);
    node.kill();
    let ask = Ask::Attach {
        domain: "d0".into(),
        role: v1::Role::Device,
        access: v1::Access::ReadWrite,
    };
    assert!(actor.fails(&ask).contains("no daemon"));
}
