//! Who is not let in: other domains, other sessions, other processes, other
//! users, and whoever has not attached.

use std::io::ErrorKind;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::net::UnixStream;

use domaind_proto::frame::FrameError;
use domaind_tests::actor::text;
use domaind_tests::knock::{self, Verdict};
use domaind_tests::raw::{Wire, attach, hello, register};
use domaind_tests::refusal::answer;
use domaind_tests::users::{self, ALICE, BOB};
use domaind_tests::v1::Direction::{Bidirectional, ToDevice};
use domaind_tests::v1::client_frame::Body as Ask;
use domaind_tests::{
    Actor, Bytes, Code, Node, P, Raw, Reason, files, node, refused, script, v1, wait,
};
use sendfd::SendWithFd;
use tonic_health::pb::health_client::HealthClient;
use tonic_health::pb::{HealthCheckRequest, health_check_response::ServingStatus};
use tonic_reflection::pb::v1 as reflection;
use tonic_reflection::pb::v1::server_reflection_client::ServerReflectionClient;
use tonic_reflection::pb::v1::server_reflection_request::MessageRequest;

/// The token of a live session with its last bit changed.
fn nearly(token: &str) -> String {
    let (most, last) = token.split_at(token.len() - 1);
    let last = u8::from_str_radix(last, 16).expect("hexadecimal") ^ 1;
    format!("{most}{last:x}")
}

#[track_caller]
fn assert_all(verdicts: &[Verdict], code: Code, reason: Reason) {
    assert!(!verdicts.is_empty());
    for verdict in verdicts {
        assert!(
            verdict.is(code, reason),
            "expected {code:?} {reason:?}: {verdict:?}"
        );
    }
}

fn verdicts(value: serde_json::Value) -> Vec<Verdict> {
    serde_json::from_value(value).expect("verdicts")
}

// ---- Two domains

/// D13: the same addresses, other bytes.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn two_domains_have_the_same_iovas_and_nothing_else_in_common() {
    let node = Node::start().await;
    node.domain("left").await;
    node.domain("right").await;
    let (mut left, mut right) = (Actor::driver(&node, "left"), Actor::driver(&node, "right"));
    let mut left_device = Actor::device(&node, "left");
    let mut right_device = Actor::device(&node, "right");
    let (in_left, in_right) = (left.buffer(P), right.buffer(P));
    left.fill(in_left, 0, "only in the left domain");
    right.fill(in_right, 0, "RIGHT is where this is");

    let place = left.map(in_left, 0, 23, Bidirectional);
    let other = right.map(in_right, 0, 22, Bidirectional);
    let (ring, other_ring) = (left.alloc(P, false), right.alloc(P, false));
    assert_eq!((place.iova, ring.iova), (other.iova, other_ring.iova));

    left_device.assert_sees(place.iova, "only in the left domain");
    right_device.assert_sees(other.iova, "RIGHT is where this is");
    left_device.assert_never_sees("RIGHT is where");
    right_device.assert_never_sees("only in the left");
    left_device.write(ring.iova, "a ring of the left");
    right_device.assert_sees(other_ring.iova, Bytes::zeros(P));
    left.unmap(place, None);
    right_device.assert_sees(other.iova, "RIGHT is where this is");
    right.unmap(other, None);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn regions_of_two_domains_are_different_files() {
    let node = Node::start().await;
    node.domain("left").await;
    node.domain("right").await;
    let left = Raw::driver(&node, "left").await;
    let right = Raw::driver(&node, "right").await;
    let mut inodes: Vec<_> = [&left, &right]
        .iter()
        .flat_map(|raw| &raw.given.regions)
        .map(|(_, fd)| rustix::fs::fstat(fd).unwrap().st_ino)
        .collect();
    inodes.sort_unstable();
    inodes.dedup();
    assert_eq!(inodes.len(), 4);
}

// ---- Sessions

/// a token is good only from the process that attached.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_stolen_token_is_refused_to_every_other_process() {
    let node = Node::start().await;
    node.domain("d0").await;
    let mut victim = Raw::driver(&node, "d0").await;
    let memory = victim.memory(P).await;
    let mapping = victim.map(memory.entry(0, 8, ToDevice)).await.unwrap();
    let before = node.counts().await;
    let mut thief = Actor::start(&node);
    for admin in [false, true] {
        let token = Some(victim.token());
        let got = verdicts(thief.must(&script::Ask::Knock { token, admin }));
        assert_all(&got, Code::PermissionDenied, Reason::WrongPeer);
    }
    assert_eq!(node.usage("d0").await.streaming_mappings, 1);
    assert_eq!(node.counts().await.sessions, before.sessions);
    victim.unmap(&mapping, None).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_token_that_is_not_live_is_not_found_and_none_is_denied() {
    let node = Node::start().await;
    node.domain("d0").await;
    let gone = Raw::driver(&node, "d0").await;
    let (token, name) = (gone.token(), gone.name().to_owned());
    node.evict(&name).await.unwrap();
    let live = Raw::driver(&node, "d0").await;
    let channels = [node.client().await.channel(), node.admin().channel()];
    for channel in channels {
        let none = knock::mapping_calls(channel.clone(), None).await;
        assert_all(&none, Code::PermissionDenied, Reason::NoSession);
        for token in [
            token.as_str(),
            &nearly(live.token().as_str()),
            &nearly(&token),
        ] {
            let dead = knock::mapping_calls(channel.clone(), Some(token)).await;
            assert_all(&dead, Code::NotFound, Reason::NoSuchSession);
        }
        for odd in ["", "zz", "0011", &token.repeat(2), "sessions/1", "1"] {
            for verdict in knock::mapping_calls(channel.clone(), Some(odd)).await {
                assert_eq!(verdict.found, None, "{odd:?}: {verdict:?}");
                let code = Code::from_i32(verdict.code);
                let codes = [
                    Code::NotFound,
                    Code::InvalidArgument,
                    Code::PermissionDenied,
                ];
                assert!(codes.contains(&code), "{odd:?}: {verdict:?}");
            }
        }
    }
    // The refusals of a dead token and of a wrong one read the same.
    let channel = node.client().await.channel();
    let dead = knock::mapping_calls(channel.clone(), Some(&token)).await;
    let random = knock::mapping_calls(channel, Some(&nearly(&live.token()))).await;
    assert_eq!(dead, random);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn tokens_are_long_and_never_the_same() {
    let node = Node::start().await;
    node.domain("d0").await;
    let mut tokens = Vec::new();
    for _ in 0..20 {
        let raw = Raw::device(&node, "d0").await;
        assert!(raw.given.attached.token.len() >= 16);
        tokens.push(raw.token());
    }
    let log = node.log();
    assert!(
        tokens.iter().all(|token| !log.contains(token)),
        "a token is in the log"
    );
    tokens.sort_unstable();
    tokens.dedup();
    assert_eq!(tokens.len(), 20);
}

/// the same process may hold two sessions; each has its own things.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn what_one_session_holds_is_denied_to_another_of_the_domain() {
    let node = Node::start().await;
    node.domain("d0").await;
    node.domain("d1").await;
    let mut owner = Raw::driver(&node, "d0").await;
    let mut other = Raw::driver(&node, "d0").await;
    let mut elsewhere = Raw::driver(&node, "d1").await;
    let memory = owner.memory(P).await;
    let mapping = owner.map(memory.entry(0, 8, ToDevice)).await.unwrap();
    let ring = owner.alloc_len(8).await.unwrap();
    let usage = node.usage("d0").await;

    let (denied, not_yours) = (Code::PermissionDenied, Reason::NotYours);
    refused(
        other.map(memory.entry(0, 8, ToDevice)).await,
        denied,
        not_yours,
    );
    refused(other.unmap(&mapping, None).await, denied, not_yours);
    let target = v1::SyncTarget::ForDevice;
    refused(other.sync(&mapping, 0, 8, target).await, denied, not_yours);
    refused(
        other.free(ring.iova, ring.mapping_id).await,
        denied,
        not_yours,
    );
    refused(other.unregister(memory.id).await, denied, not_yours);
    // In another domain there is nothing of that name.
    let absent = Code::NotFound;
    let (no_memory, no_mapping) = (Reason::NoSuchMemory, Reason::NoSuchMapping);
    refused(
        elsewhere.map(memory.entry(0, 8, ToDevice)).await,
        absent,
        no_memory,
    );
    refused(elsewhere.unmap(&mapping, None).await, absent, no_mapping);
    refused(
        elsewhere.sync(&mapping, 0, 8, target).await,
        absent,
        no_mapping,
    );
    refused(
        elsewhere.free(ring.iova, ring.mapping_id).await,
        absent,
        no_mapping,
    );
    refused(elsewhere.unregister(memory.id).await, absent, no_memory);

    assert_eq!(node.usage("d0").await, usage);
    owner.unmap(&mapping, None).await.unwrap();
    owner.free(ring.iova, ring.mapping_id).await.unwrap();
}

// ---- Users

/// To another user a domain looks absent, whatever is asked, in words that
/// are the same for a domain that is not there.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_foreign_user_sees_no_domain_no_session_and_no_mapping() {
    if !users::is_root() {
        let node = Node::start().await;
        let domain = node.domain("mine").await;
        assert_eq!(domain.owner_uid, users::own_uid());
        // Peers of the same user see each other's domains: that is the rule.
        let mut actor = Actor::start(&node);
        actor.attach("mine", v1::Role::Device);
        return;
    }
    let node = Node::shared(&[]).await;
    node.domain("roots").await;
    let mut alice = Actor::start_as(&node, ALICE);
    let mut bob = Actor::start_as(&node, BOB);
    alice.create("alices");
    assert_eq!(node.get("alices").await.unwrap().owner_uid, ALICE.uid);
    let session = alice.attach("alices", v1::Role::Driver);
    let memory = alice.buffer(P);
    alice.map(memory, 0, 8, ToDevice);
    let counts = node.counts().await;

    for domain in ["alices", "roots"] {
        let ask = |domain: &str, session: &str| script::Ask::Names {
            domain: domain.to_owned(),
            session: session.to_owned(),
        };
        let seen = verdicts(bob.must(&ask(domain, &session)));
        let absent = verdicts(bob.must(&ask("nowhere", "sessions/4711")));
        for (seen, absent) in seen.iter().zip(&absent) {
            let in_words = |text: &str| {
                let text = text.replace(domain, "nowhere");
                text.replace(session.trim_start_matches("sessions/"), "4711")
            };
            assert_eq!(in_words(&seen.message), absent.message, "{}", seen.call);
            assert_eq!((seen.code, &seen.reason), (absent.code, &absent.reason));
            match seen.call.as_str() {
                "ListDomains" | "ListSessions" => assert_eq!(seen.found, Some(0), "{seen:?}"),
                "GetSession" | "EvictSession" => {
                    assert!(seen.is(Code::NotFound, Reason::NoSuchSession), "{seen:?}");
                }
                _ => assert!(seen.is(Code::NotFound, Reason::NoSuchDomain), "{seen:?}"),
            }
        }
        for role in [v1::Role::Driver, v1::Role::Device] {
            let attach = script::Ask::Attach {
                domain: domain.to_owned(),
                role,
                access: v1::Access::ReadWrite,
            };
            refused(bob.ask(&attach), Code::NotFound, Reason::NoSuchDomain);
        }
    }
    assert_eq!(node.counts().await.sessions, counts.sessions);
    // Alice sees her own, and only that.
    let own = verdicts(alice.must(&script::Ask::Names {
        domain: "nowhere".into(),
        session,
    }));
    let found = |call: &str| own.iter().find(|v| v.call == call).unwrap().found;
    assert_eq!(found("ListDomains"), Some(1));
    assert_eq!(found("ListSessions"), Some(1));
}

/// The operator's socket is not for clients, whatever its directory allows.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn the_sockets_have_the_documented_modes() {
    use std::os::unix::fs::{FileTypeExt, MetadataExt};
    let shared = users::is_root();
    let node = if shared {
        Node::shared(&[]).await
    } else {
        Node::start().await
    };
    let dir = node.runtime_dir();
    for (path, mode) in [
        (dir.api_socket(), 0o660),
        (dir.fd_socket(), 0o660),
        (dir.admin_socket(), 0o600),
    ] {
        let meta = std::fs::metadata(&path).unwrap();
        assert!(meta.file_type().is_socket());
        assert_eq!(meta.mode() & 0o7777, mode, "{path:?}");
        if shared && mode == 0o660 {
            assert_eq!(meta.gid(), users::CLIENT_GID);
        }
    }
    let admin = std::fs::metadata(dir.admin()).unwrap();
    assert_eq!(admin.mode() & 0o7777, 0o700);
    // Nothing of the work of binding is left: `.{name}.{pid}`.
    for dir in [dir.public(), dir.admin()] {
        for entry in std::fs::read_dir(dir).unwrap() {
            let name = entry.unwrap().file_name();
            assert!(!name.to_string_lossy().starts_with('.'), "{name:?}");
        }
    }
    if shared {
        let mut bob = Actor::start_as(&node, BOB);
        let said = bob.fails(&script::Ask::Knock {
            token: None,
            admin: true,
        });
        assert!(said.contains("admin.sock"), "{said}");
    }
}

// ---- The unattached

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn an_unattached_peer_gets_nothing_over_grpc() {
    let node = Node::start().await;
    node.domain("d0").await;
    let mut actor = Actor::start(&node);
    let live = Raw::driver(&node, "d0").await;
    for admin in [false, true] {
        let none = verdicts(actor.must(&script::Ask::Knock { token: None, admin }));
        assert_all(&none, Code::PermissionDenied, Reason::NoSession);
        let token = Some(nearly(&live.token()));
        let random = verdicts(actor.must(&script::Ask::Knock { token, admin }));
        assert_all(&random, Code::NotFound, Reason::NoSuchSession);
    }
    let usage = node.usage("d0").await;
    assert_eq!(
        (usage.streaming_mappings, usage.coherent_allocations),
        (0, 0)
    );
}

/// No fd ever reaches a peer that has not attached.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn an_unattached_peer_gets_no_fd_whatever_it_sends() {
    let node = Node::start().await;
    node.domain("d0").await;
    let before = node.counts().await;
    let memfd = files::good_memfd(P);
    let (role, access) = (v1::Role::Driver, v1::Access::ReadWrite);
    let first: Vec<(Ask, bool)> = vec![
        (attach("domains/d0", role, access), false),
        (attach("domains/d0", role, access), true),
        (register(true), true),
        (register(true), false),
        (hello(9, 9), false),
        (Ask::Detach(v1::Detach {}), false),
    ];
    for (ask, with_fd) in first {
        let mut wire = Wire::connect(&node.runtime_dir().fd_socket());
        let what = format!("{ask:?} {with_fd}");
        send_somehow(&mut wire, ask, with_fd.then_some(memfd.as_fd())).await;
        let closed = wire.closed().await;
        assert_eq!(closed.fds, 0, "{what}");
    }
    let mut wire = Wire::connect(&node.runtime_dir().fd_socket());
    if wire.send(hello(1, 1), Some(memfd.as_fd())).await.is_ok() {
        assert_eq!(wire.closed().await.fds, 0);
    }
    drop(wire);
    // After Hello, before Attach.
    for with_fd in [false, true] {
        let mut wire = Wire::connect(&node.runtime_dir().fd_socket());
        wire.hello().await;
        let nowhere = attach("domains/nowhere", role, access);
        refused(
            wire.ask(nowhere, None).await,
            Code::NotFound,
            Reason::NoSuchDomain,
        );
        let fd = with_fd.then_some(memfd.as_fd());
        send_somehow(&mut wire, register(true), fd).await;
        assert_eq!(wire.closed().await.fds, 0);
    }
    node.until_counts(before).await;
    assert_eq!(before.sessions + u32::try_from(before.memories).unwrap(), 0);
}

/// With its fd, or without where the kernel (Linux 6.16, `SO_PASSRIGHTS`) does
/// not let an fd through to a daemon that does not want it yet.
async fn send_somehow(wire: &mut Wire, ask: Ask, fd: Option<BorrowedFd<'_>>) {
    match wire.send(ask.clone(), fd).await {
        Ok(_) => {}
        Err(FrameError::Io(cause)) if cause.kind() == ErrorKind::PermissionDenied => {
            wire.send(ask, None).await.expect("sent without");
        }
        Err(error) => panic!("{error}"),
    }
}

/// Fds that are sent to a gRPC socket are nobody's: not taken, or closed.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn fds_sent_to_a_grpc_socket_do_not_stay() {
    let node = Node::start().await;
    let before = node.counts().await;
    let memfd = files::good_memfd(P);
    let dir = node.runtime_dir();
    for path in [dir.api_socket(), dir.admin_socket()] {
        let mut streams = Vec::new();
        for _ in 0..20 {
            let stream = UnixStream::connect(&path).unwrap();
            let fds = [memfd.as_raw_fd(); 10];
            match stream.send_with_fd(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", &fds) {
                Ok(_) => {}
                Err(error) => assert_eq!(error.kind(), ErrorKind::PermissionDenied, "{error}"),
            }
            streams.push(stream);
        }
        // While they are connected no more than a connection costs.
        let per_connection = async || {
            let now = node.counts().await.open_fds;
            (now - before.open_fds) / 20
        };
        wait::until_equal("two fds for each connection", 2, per_connection).await;
        drop(streams);
        node.until_counts(before).await;
    }
}

// ---- Services by socket

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn the_admin_service_does_not_exist_on_the_public_socket() {
    let node = Node::start().await;
    let client = node.client().await;
    let status = client
        .admin()
        .get_info(v1::GetInfoRequest {})
        .await
        .unwrap_err();
    assert_eq!(status.code(), Code::Unimplemented, "{status:?}");
    let info = node.info().await;
    assert_eq!(info.pid, node.pid());
    assert_eq!(
        info.runtime_dir,
        node.runtime_dir().path().to_string_lossy()
    );
    assert!(!info.version.is_empty() && !info.instance.is_empty());
    let proc = std::fs::read_dir(format!("/proc/{}/fd", node.pid())).map(Iterator::count);
    if let Ok(fds) = proc {
        // The count is taken from the same place, a moment earlier.
        assert!(
            fds.abs_diff(info.open_fds as usize) <= 2,
            "{fds} {}",
            info.open_fds
        );
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn reflection_is_only_on_the_admin_socket() {
    let node = Node::start().await;
    let list = || {
        let request = reflection::ServerReflectionRequest {
            host: String::new(),
            message_request: Some(MessageRequest::ListServices(String::new())),
        };
        tokio_stream(request)
    };
    let mut public = ServerReflectionClient::new(node.client().await.channel());
    let status = public
        .server_reflection_info(list())
        .await
        .map(drop)
        .unwrap_err();
    assert_eq!(status.code(), Code::Unimplemented);

    let mut admin = ServerReflectionClient::new(node.admin().channel());
    let mut answers = admin
        .server_reflection_info(list())
        .await
        .unwrap()
        .into_inner();
    let first = answers.message().await.unwrap().unwrap();
    let services = format!("{:?}", first.message_response);
    for service in ["Domain", "Mapping", "Session", "Admin"] {
        assert!(
            services.contains(&format!("domaind.v1.{service}Service")),
            "{services}"
        );
    }
}

/// A stream of one request.
fn tokio_stream(
    request: reflection::ServerReflectionRequest,
) -> impl tonic::IntoStreamingRequest<Message = reflection::ServerReflectionRequest> {
    tonic::Request::new(tonic::codegen::tokio_stream::once(request))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn health_is_on_both_sockets() {
    let node = Node::start().await;
    for channel in [node.client().await.channel(), node.admin().channel()] {
        let mut health = HealthClient::new(channel);
        let request = HealthCheckRequest {
            service: String::new(),
        };
        let answer = health.check(request).await.unwrap().into_inner();
        assert_eq!(answer.status(), ServingStatus::Serving);
        let request = HealthCheckRequest {
            service: "no.such.Service".into(),
        };
        let status = health.check(request).await.unwrap_err();
        assert_eq!(status.code(), Code::NotFound);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn sessions_are_shown_as_the_kernel_knows_them() {
    let node = Node::start().await;
    node.domain("d0").await;
    let mut actor = Actor::start(&node);
    let name = actor.attach("d0", v1::Role::Device);
    let sessions = node.sessions("d0").await;
    assert_eq!(sessions.len(), 1);
    let session = &sessions[0];
    assert_eq!(
        (session.name.as_str(), session.role()),
        (name.as_str(), v1::Role::Device)
    );
    assert_eq!(
        (session.domain.as_str(), session.access()),
        ("domains/d0", v1::Access::ReadWrite)
    );
    assert!(session.access_enforced);
    let peer = session.peer.clone().unwrap();
    assert_eq!(peer.pid.cast_unsigned(), actor.pid());
    assert_eq!(peer.uid, users::own_uid());
    let request = v1::GetSessionRequest { name };
    let one = answer(node.admin().sessions().get_session(request).await).unwrap();
    assert_eq!(&one, session);
    assert_eq!(text(&serde_json::json!(one.domain)), node::name("d0"));
}
