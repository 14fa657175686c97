//! `domainctl` against a daemon: what it prints, where, and how it exits.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::process::Stdio;

use domaind_tests::ctl;
use domaind_tests::raw::with_token;
use domaind_tests::users::{self, ALICE};
use domaind_tests::v1::Direction::{Bidirectional, ToDevice};
use domaind_tests::{Actor, Code, Ctl, Node, P, Raw, Reason, refused, v1};
use serde_json::Value;

/// Reads proto3 JSON back into the message it was.
#[track_caller]
fn read<M: serde::de::DeserializeOwned>(value: Value) -> M {
    serde_json::from_value(value.clone()).unwrap_or_else(|error| panic!("{error}: {value}"))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn the_three_commands_of_the_issue() {
    let node = Node::start().await;
    let ctl = Ctl::new(&node);
    let base = node.counts().await;

    let said = ctl.ok(&[
        "create",
        "domain",
        "d0",
        "--bounce",
        "64MiB",
        "--coherent",
        "16MiB",
    ]);
    assert!(said.contains("d0"), "{said}");
    let listed = ctl.json(&["get", "domains"]);
    let page: v1::ListDomainsResponse = read(listed);
    let domain = node.get("d0").await.unwrap();
    assert_eq!(
        (domain.bounce_bytes, domain.coherent_bytes),
        (64 << 20, 16 << 20)
    );
    assert_eq!(page.domains, vec![domain]);
    let said = ctl.ok(&["delete", "domain", "d0"]);
    assert!(said.contains("d0"), "{said}");
    node.until_counts(base).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn json_says_what_grpc_says() {
    let node = Node::start().await;
    let ctl = Ctl::new(&node);
    let created = ctl.json(&[
        "create",
        "domain",
        "d0",
        "--bounce",
        "1000000",
        "--coherent",
        "0x100000",
        "--granule",
        "64KiB",
        "--scrub",
        "on-unmap",
        "--quota-sessions",
        "7",
    ]);
    let created: v1::Domain = read(created);
    assert_eq!(
        (created.bounce_bytes, created.granule_bytes),
        (1_048_576, 65_536)
    );
    assert_eq!(
        (created.scrub(), created.quotas.unwrap().sessions),
        (v1::Scrub::OnUnmap, 7)
    );
    assert_eq!(created, node.get("d0").await.unwrap());
    let _ = ctl.ok(&["create", "domain", "d1"]);

    let mut driver = Raw::driver(&node, "d0").await;
    let memory = driver.memory(P).await;
    let mapping = driver
        .map(memory.entry(1, 100, Bidirectional))
        .await
        .unwrap();
    let alloc: v1::AllocCoherentResponse = read(ctl.json(&["alloc", "d0", "5000"]));
    let mappings: v1::ListMappingsResponse = read(ctl.json(&["get", "mappings", "d0"]));
    assert_eq!(mappings.mappings, node.mappings("d0").await);
    assert_eq!(mappings.mappings.len(), 2);
    assert_eq!(
        (alloc.len_bytes, alloc.iova),
        (5_000, mappings.mappings[1].iova)
    );
    assert!(
        mappings.mappings[1].persistent,
        "it stays when domainctl is gone"
    );
    let streaming = ctl.json(&["get", "mappings", "d0", "--kind", "streaming"]);
    let streaming: v1::ListMappingsResponse = read(streaming);
    assert_eq!(streaming.mappings.len(), 1);
    assert_eq!(streaming.mappings[0].mapping_id, mapping.mapping_id);
    let sessions: v1::ListSessionsResponse = read(ctl.json(&["get", "sessions"]));
    assert_eq!(sessions.sessions, node.sessions("d0").await);
    let memories: v1::ListMemoriesResponse = read(ctl.json(&["get", "memories", "d0"]));
    assert_eq!(
        (memories.memories.len(), memories.memories[0].mappings),
        (1, 1)
    );
    let named = ctl.json(&["get", "domains", "d0"]);
    assert!(named.to_string().contains("domains/d0") && !named.to_string().contains("domains/d1"));

    let id = alloc.mapping_id.to_string();
    let freed = ctl.run(&["free", "d0", &format!("{:#x}", alloc.iova), "--id", &id]);
    assert_eq!(freed.code, 0, "{freed:?}");
    assert_eq!(node.usage("d0").await.coherent_allocations, 0);
    // 64-bit numbers are strings in proto3 JSON.
    let raw = ctl.json(&["get", "domains", "d0"]).to_string();
    assert!(raw.contains(r#""bounceBytes":"1048576""#), "{raw}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn every_format_names_what_is_there() {
    let node = Node::start().await;
    let ctl = Ctl::new(&node);
    assert!(!ctl.run(&["get", "domains"]).stdout.contains("d0"));
    let empty: v1::ListDomainsResponse = read(ctl.json(&["get", "domains"]));
    assert!(empty.domains.is_empty());
    node.domain("d0").await;
    node.domain("d1").await;
    let names = ctl.ok(&["get", "domains", "-o", "name"]);
    assert_eq!(names, "domains/d0\ndomains/d1\n");
    let table = ctl.ok(&["get", "domains"]);
    assert_eq!(table.lines().count(), 3, "{table}");
    assert!(table.starts_with("NAME"), "{table}");
    assert!(!table.contains('\u{1b}'), "no colours into a pipe");
    let bare = ctl.ok(&["get", "domains", "--no-headers"]);
    assert_eq!(bare.lines().count(), 2, "{bare}");
    let wide = ctl.ok(&["get", "domains", "-o", "wide"]);
    assert!(wide.lines().next().unwrap().len() > table.lines().next().unwrap().len());
    let yaml = ctl.ok(&["get", "domains", "-o", "yaml"]);
    assert!(yaml.contains("name: domains/d0"), "{yaml}");
    let described = ctl.ok(&["describe", "domain", "d0"]);
    for word in ["d0", "16777216", "4194304", "Quotas"] {
        assert!(described.contains(word), "{word} in {described}");
    }
    // What is printed as a name can be typed back.
    let _ = ctl.ok(&["delete", "domain", names.lines().next().unwrap(), "d1"]);
    assert_eq!(node.info().await.domains, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn health_version_info_and_completion() {
    let node = Node::start().await;
    let ctl = Ctl::new(&node);
    for line in [
        &["health"][..],
        &["health", "--socket", "admin"],
        &["health", "--admin"],
    ] {
        assert_eq!(ctl.ok(line).trim(), "SERVING");
    }
    let version = ctl.json(&["version"]);
    assert_eq!(version["clientVersion"], "0.1.0", "{version}");
    assert_eq!(version["daemonVersion"], "0.1.0", "{version}");
    assert!(Ctl::alone().ok(&["version", "--client"]).contains("0.1.0"));
    let info: v1::Info = read(ctl.json(&["info"]));
    assert_eq!(info.pid, node.pid());
    for shell in ["bash", "zsh", "fish"] {
        let script = Ctl::alone().ok(&["completion", shell]);
        for word in ["domainctl", "create", "evict", "completion"] {
            assert!(script.contains(word), "{word} for {shell}");
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn evict_ends_the_session_it_names() {
    let node = Node::start().await;
    node.domain("d0").await;
    let ctl = Ctl::new(&node);
    let mut actor = Actor::start(&node);
    let session = actor.attach("d0", v1::Role::Driver);
    let listed = ctl.ok(&["get", "sessions", "--domain", "d0", "-o", "name"]);
    assert_eq!(listed.trim(), session);
    let described = ctl.ok(&["describe", "session", &session]);
    assert!(described.contains(&actor.pid().to_string()), "{described}");

    let _ = ctl.ok(&["evict", &session]);

    assert_eq!(actor.end_reason(), "Evicted");
    ctl.fails(&["evict", &session], 3);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn update_changes_scrubbing_and_quotas() {
    let node = Node::start().await;
    node.domain("d0").await;
    let ctl = Ctl::new(&node);
    let _ = ctl.ok(&[
        "update",
        "domain",
        "d0",
        "--scrub",
        "on-unmap",
        "--quota-mappings",
        "9",
    ]);
    let domain = node.get("d0").await.unwrap();
    assert_eq!(
        (domain.scrub(), domain.quotas.unwrap().mappings),
        (v1::Scrub::OnUnmap, 9)
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn dry_run_creates_nothing_and_says_what_would_be() {
    let shared = users::is_root();
    let node = match shared {
        true => Node::shared(&[]).await,
        false => Node::start().await,
    };
    let base = node.counts().await;
    let line = ["create", "domain", "d0", "--dry-run", "-o", "json"];
    let (command, uid) = match shared {
        // Root's number is that of a field nobody has set.
        true => (Ctl::command_as(&node, ALICE, &line), ALICE.uid),
        false => (Ctl::new(&node).command(&line), users::own_uid()),
    };
    let output = ctl::finish(ctl::start(command));
    assert_eq!(output.code, 0, "{output:?}");
    let planned: v1::Domain = serde_json::from_str(&output.stdout).unwrap();
    assert_eq!(
        (planned.name.as_str(), planned.bounce_bytes),
        ("domains/d0", 64 << 20)
    );
    assert_eq!(planned.owner_uid, uid);
    node.until_counts(base).await;
}

// ---- Exit codes

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn exit_codes_say_what_kind_of_trouble_it_is() {
    let node = Node::with(&["--limits-region-bytes=33554432"]).await;
    node.domain("d0").await;
    let _held = Raw::driver(&node, "d0").await;
    let ctl = Ctl::new(&node);
    // 1: refused for what was asked, in the daemon's words.
    let said = ctl.fails(
        &[
            "create",
            "domain",
            "d1",
            "--bounce",
            "4KiB",
            "--coherent",
            "0",
        ],
        1,
    );
    assert!(said.contains("4096"), "{said}");
    // 2: usage; the daemon is not asked.
    for line in [
        &["get", "nothing"][..],
        &["create", "domain"],
        &["create", "domain", "D0"],
        &["create", "domain", "d1", "--bounce", "many"],
        &["get", "domains", "-o", "xml"],
        &["--no-such-flag"],
        &["evict", "nobody"],
        &[],
    ] {
        let output = ctl.run(line);
        assert_eq!(output.code, 2, "{line:?}: {output:?}");
        assert_eq!(output.stdout, "", "{line:?}");
        assert!(!output.stderr.is_empty());
        assert_eq!(
            Ctl::at(&node.path().join("none")).run(line).code,
            2,
            "{line:?}"
        );
    }
    // 3: not there.
    for line in [
        &["get", "domains", "d7"][..],
        &["describe", "domain", "d7"],
        &["delete", "domain", "d7"],
        &["get", "mappings", "d7"],
        &["get", "sessions", "--domain", "d7"],
        &["get", "sessions", "4711"],
        &["alloc", "d7", "4096"],
        &["free", "d0", "0x1000000", "--id", "4711"],
        &["evict", "4711"],
    ] {
        ctl.fails(line, 3);
    }
    let _ = ctl.ok(&["delete", "domain", "d7", "--ignore-not-found"]);
    // 6: there already, or in use.
    ctl.fails(&["create", "domain", "d0"], 6);
    let said = ctl.fails(&["delete", "domain", "d0"], 6);
    assert!(said.contains("1 session"), "{said}");
    // 7: used up, by budget and by space.
    let said = ctl.fails(&["create", "domain", "d1", "--bounce", "1GiB"], 7);
    assert!(said.contains("33554432"), "the budget: {said}");
    ctl.fails(&["alloc", "d0", "1GiB"], 7);
    assert_eq!(node.info().await.domains, 1);
    // One of several: what can be done is done, and the trouble is told.
    node.create("d2", domaind_tests::node::spec(0, 0))
        .await
        .unwrap();
    let output = ctl.run(&["delete", "domain", "d7", "d2"]);
    assert_eq!(output.code, 3, "{output:?}");
    assert!(
        output.stderr.contains("d7") && node.get("d2").await.is_err(),
        "{output:?}"
    );
    // 5: who is attached there does not listen.
    let said = ctl.fails(&["delete", "domain", "d0", "--force"], 5);
    assert!(said.contains("sessions/1"), "{said}");
    assert_eq!(node.info().await.domains, 0, "it is done all the same");
}

/// 4: whoever may not enter the operator's directory is told so.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn exit_code_4_is_for_those_who_may_not() {
    if users::is_root() {
        let node = Node::shared(&[]).await;
        node.domain("d0").await;
        let run = |line: &[&str]| ctl::finish(ctl::start(Ctl::command_as(&node, ALICE, line)));
        for line in [&["info"][..], &["get", "domains", "--admin"]] {
            let output = run(line);
            assert_eq!(output.code, 4, "{line:?}: {output:?}");
            assert_eq!(output.stdout, "");
        }
        // Foreign names look absent, so that is 3.
        assert_eq!(run(&["delete", "domain", "d0"]).code, 3);
        let listed: v1::ListDomainsResponse =
            serde_json::from_str(&run(&["get", "domains", "-o", "json"]).stdout).unwrap();
        assert!(listed.domains.is_empty());
        return;
    }
    let node = Node::start().await;
    let admin = node.runtime_dir().admin();
    fs::set_permissions(&admin, fs::Permissions::from_mode(0o000)).unwrap();
    let output = Ctl::new(&node).run(&["info"]);
    fs::set_permissions(&admin, fs::Permissions::from_mode(0o700)).unwrap();
    assert_eq!((output.code, output.stdout.as_str()), (4, ""), "{output:?}");
}

/// 5: no daemon, or one that does not answer in time.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn exit_code_5_is_for_no_daemon_and_for_a_silent_one() {
    let dir = tempfile::tempdir_in("/tmp").unwrap();
    let nobody = Ctl::at(dir.path());
    for line in [
        &["get", "domains"][..],
        &["health"],
        &["info"],
        &["alloc", "d0", "1"],
    ] {
        let output = nobody.run(line);
        assert_eq!(output.code, 5, "{line:?}: {output:?}");
        assert!(
            output.stderr.contains(".sock"),
            "{line:?} names the socket: {output:?}"
        );
    }
    let node = Node::start().await;
    domaind_tests::children::stop(node.pid());
    let output = Ctl::new(&node).run(&["get", "domains", "--timeout", "300ms"]);
    domaind_tests::children::signal(node.pid(), rustix::process::Signal::CONT);
    assert_eq!((output.code, output.stdout.as_str()), (5, ""), "{output:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn the_runtime_directory_comes_from_the_flag_or_the_variable() {
    let node = Node::start().await;
    node.domain("d0").await;
    let mut command = Ctl::alone().command(&["get", "domains", "-o", "name"]);
    command.env("DOMAIND_RUNTIME_DIR", node.runtime_dir().path());
    let output = ctl::finish(ctl::start(command));
    assert_eq!(
        (output.code, output.stdout.as_str()),
        (0, "domains/d0\n"),
        "{output:?}"
    );
    let mut command = Ctl::new(&node).command(&["get", "domains", "-o", "name"]);
    command.env("DOMAIND_RUNTIME_DIR", "/nonexistent");
    let output = ctl::finish(ctl::start(command));
    assert_eq!(
        (output.code, output.stdout.as_str()),
        (0, "domains/d0\n"),
        "{output:?}"
    );
}

// ---- Pipes

/// `domainctl get domains | head -0`: the reader is gone before anything is
/// written, and that is nobody's fault.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_closed_pipe_is_success() {
    let node = Node::start().await;
    for index in 0..300 {
        node.create(&format!("d{index}"), domaind_tests::node::spec(0, 0))
            .await
            .unwrap();
    }
    for line in [
        &["get", "domains"][..],
        &["get", "domains", "-o", "json"],
        &["get", "domains", "-o", "yaml"],
        &["get", "domains", "-o", "name"],
        &["describe", "domain", "d0"],
        &["completion", "bash"],
        &["info"],
    ] {
        let (read_end, write_end) = rustix::pipe::pipe().unwrap();
        drop(read_end);
        let mut command = Ctl::new(&node).command(line);
        command
            .stdout(Stdio::from(write_end))
            .stderr(Stdio::piped());
        let output = ctl::finish(command.spawn().unwrap());
        assert_eq!(
            (output.code, output.stderr.as_str()),
            (0, ""),
            "{line:?}: {output:?}"
        );
    }
}

/// A full disk is not a closed pipe.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn output_that_cannot_be_written_is_an_error() {
    let node = Node::start().await;
    node.domain("d0").await;
    let Ok(full) = fs::File::options().write(true).open("/dev/full") else {
        println!("not tried: there is no /dev/full");
        return;
    };
    let mut command = Ctl::new(&node).command(&["get", "domains"]);
    command.stdout(Stdio::from(full)).stderr(Stdio::piped());
    let output = ctl::finish(command.spawn().unwrap());
    assert_eq!(output.code, 1, "{output:?}");
    assert!(!output.stderr.is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn what_domainctl_allocates_stays_and_leaves_no_session() {
    let node = Node::start().await;
    node.domain("d0").await;
    let ctl = Ctl::new(&node);
    let alloc: v1::AllocCoherentResponse =
        read(ctl.json(&["alloc", "d0", "64KiB", "--align", "1MiB"]));
    assert_eq!(alloc.iova % (1 << 20), 0);
    let usage = node.usage("d0").await;
    assert_eq!(
        (usage.coherent_allocations, usage.coherent_used_bytes),
        (1, 64 << 10)
    );
    node.until_usage(
        "d0",
        v1::DomainUsage {
            sessions: 0,
            ..usage
        },
    )
    .await;
    // A driver's own is not domainctl's to free.
    let mut driver = Raw::driver(&node, "d0").await;
    let own = driver.alloc_len(P).await.unwrap();
    let id = own.mapping_id.to_string();
    ctl.fails(&["free", "d0", &own.iova.to_string(), "--id", &id], 4);
    let memory = driver.memory(P).await;
    driver.map(memory.entry(0, 1, ToDevice)).await.unwrap();
    // Nor is a token that is none taken for no token.
    let request = with_token(
        v1::ListMappingsRequest {
            domain: "domains/d0".into(),
            ..Default::default()
        },
        "00",
    );
    let listed = domaind_tests::refusal::answer(driver.calls.clone().list_mappings(request).await);
    refused(listed, Code::InvalidArgument, Reason::Malformed);
}
