//! How the daemon stops beside clients that do not help: nobody who never reads
//! can hold it up, and calls under way come to their end.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use domaind_proto::Message;
use domaind_tests::direct::stream;
use domaind_tests::node::{domain_id, greet, name};
use domaind_tests::wait::{self, soon};
use domaind_tests::{Caller, Node, P, Raw, children, v1};
use rustix::process::Signal;
use tonic::codegen::http::uri::PathAndQuery;
use tonic_prost::ProstCodec;

/// The daemon would wait for so long if it waited.
const STOP_LIMIT: Duration = Duration::from_secs(10);
/// "At once", on a busy machine.
const AT_ONCE: Duration = Duration::from_secs(2);
/// Longer than the daemon waits for whoever does not read.
const LONG: Duration = Duration::from_millis(1_500);
/// A page of the direct space, above the apertures.
const PAGE: u64 = 1 << 20;
/// Mappings of a snapshot that is larger than what a socket takes: some 50 bytes
/// each.
const MANY: u64 = 16_000;

/// A domain of which there is much to tell.
async fn with_much() -> (Node, Raw) {
    let node = Node::start().await;
    node.domain("d0").await;
    let mut driver = Raw::driver(&node, "d0").await;
    let memory = driver.memory(P).await;
    // Every second page, so that none leads on to the next.
    let table: Vec<_> = (0..MANY).map(|k| memory.row(PAGE + 2 * k, 1)).collect();
    let caller = Caller::session(&driver);
    caller.stream(caller.chunked(&table, 4_000)).await.unwrap();
    (node, driver)
}

fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let len = u32::try_from(payload.len()).expect("short").to_be_bytes();
    let mut frame = vec![len[1], len[2], len[3], kind, flags];
    frame.extend(stream.to_be_bytes());
    frame.extend(payload);
    frame
}

/// A header that is not in anybody's table.
fn header(name: &str, value: &str) -> Vec<u8> {
    let text = |text: &str| {
        let len = u8::try_from(text.len()).expect("short");
        [&[len], text.as_bytes()].concat()
    };
    [vec![0], text(name), text(value)].concat()
}

/// Begins a WatchDomain in HTTP/2 by hand, says how much it would take, and
/// does not read a byte.
fn watch_by_hand(node: &Node, window_bytes: u32) -> UnixStream {
    let request = v1::WatchDomainRequest {
        name: name("d0"),
        ..Default::default()
    };
    let message = request.encode_to_vec();
    let len = u32::try_from(message.len()).expect("short").to_be_bytes();
    let body = [&[0], &len[..], &message].concat();
    let headers = [
        header(":method", "POST"),
        header(":scheme", "http"),
        header(":path", "/domaind.v1.DomainService/WatchDomain"),
        header(":authority", "localhost"),
        header("content-type", "application/grpc"),
        header("te", "trailers"),
    ]
    .concat();
    // SETTINGS_INITIAL_WINDOW_SIZE, and the connection's, which begins at 64 KiB.
    let setting = [&[0, 4], &window_bytes.to_be_bytes()[..]].concat();
    let more = (window_bytes - 65_535).max(1).to_be_bytes();
    let mut socket = UnixStream::connect(node.runtime_dir().api_socket()).expect("connected");
    let all = [
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec(),
        frame(4, 0, 0, &setting),
        frame(8, 0, 0, &more),
        frame(1, 4, 1, &headers),
        frame(0, 1, 1, &body),
    ];
    socket.write_all(&all.concat()).expect("written");
    socket
}

/// Waits until nothing more comes: as much is unread as the daemon can send.
fn until_full(socket: &UnixStream, at_least: u64) {
    let mut before = (0, Instant::now());
    wait::until("a socket full of what nobody reads", || {
        let unread = rustix::io::ioctl_fionread(socket).expect("FIONREAD");
        if unread != before.0 {
            before = (unread, Instant::now());
        }
        unread >= at_least && before.1.elapsed() > Duration::from_millis(200)
    });
}

#[track_caller]
fn assert_stops(mut node: Node, within: Duration) {
    let begun = Instant::now();
    let status = node.stop();
    let took = begun.elapsed();
    println!("stopped within {took:?}");
    assert_eq!(status.code(), Some(0), "{}", children::describe(status));
    assert!(took < within, "it took {took:?}");
    assert!(!node.log().contains("did not end in time"));
}

/// Its stream has no room left to end in.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_watcher_whose_window_is_full_does_not_hold_up_the_stop() {
    let (node, _driver) = with_much().await;
    let mut socket = watch_by_hand(&node, 65_535);
    until_full(&socket, 60_000);

    assert_stops(node, AT_ONCE);

    // What was sent before can still be read, and then nothing.
    let mut rest = Vec::new();
    let _ = socket.read_to_end(&mut rest);
    assert!(rest.len() >= 60_000);
}

/// Its socket has no room left for anything, not even for a goodbye.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_watcher_whose_socket_is_full_does_not_hold_up_the_stop() {
    let (node, _driver) = with_much().await;
    let socket = watch_by_hand(&node, 1 << 30);
    until_full(&socket, 100_000);
    assert_stops(node, AT_ONCE);
    drop(socket);
}

/// It has room, and says nothing: not even that it has heard the goodbye.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn those_who_say_nothing_do_not_hold_up_the_stop() {
    let node = Node::start().await;
    node.domain("d0").await;
    let idle = watch_by_hand(&node, 65_535);
    wait::until("a snapshot", || {
        rustix::io::ioctl_fionread(&idle).expect("FIONREAD") > 60
    });
    let dir = node.runtime_dir();
    let mute = [dir.api_socket(), dir.fd_socket(), dir.admin_socket()]
        .map(|path| UnixStream::connect(path).ok());
    assert_stops(node, AT_ONCE);
    drop((idle, mute));
}

/// The same with the library, whose connection is alive while nobody asks the
/// watch for anything; and one who does is told.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn watchers_of_the_library_are_told_and_do_not_hold_up_the_stop() {
    let (node, driver) = with_much().await;
    let client = node.client().await;
    let mut unread = client.watch_domain(&domain_id("d0"), None).await.unwrap();
    let mut read = client.watch_domain(&domain_id("d0"), None).await.unwrap();
    let told = tokio::spawn(async move {
        loop {
            match read.next().await {
                Ok(Some(_)) => {}
                other => return other,
            }
        }
    });
    let caller = Caller::session(&driver);
    let last = (PAGE + 2 * MANY) * P;
    for _ in 0..3 {
        caller.clear(&[(PAGE * P, last)]).await.unwrap();
    }
    assert_stops(node, AT_ONCE);
    let ended = soon("the end of a watch", told).await.unwrap();
    let error = ended.expect_err("it says why");
    assert!(format!("{error:?}").contains("stopping"), "{error:?}");
    while let Ok(Some(_)) = soon("the end of the other", unread.next()).await {}
}

/// A call that is under way when the daemon is told to stop is answered, however
/// many there are who never read.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_long_call_is_answered_while_the_daemon_stops() {
    let (mut node, _driver) = with_much().await;
    let full = watch_by_hand(&node, 1 << 30);
    until_full(&full, 100_000);
    let client = node.client().await;
    // On the wire a unary call is a stream of one message; this one comes late,
    // and so the call is under way for as long as the test likes.
    let (asks, messages) = stream::<v1::GetDomainRequest>();
    let mut grpc = tonic::client::Grpc::new(client.channel());
    let mut call = Box::pin(async move {
        grpc.ready().await.expect("ready");
        let path = PathAndQuery::from_static("/domaind.v1.DomainService/GetDomain");
        let codec = ProstCodec::<v1::GetDomainRequest, v1::Domain>::default();
        let request = tonic::Request::new(messages);
        grpc.client_streaming(request, path, codec).await
    });
    // What is asked behind it on its connection is answered: it has arrived.
    tokio::select! {
        biased;
        early = &mut call => panic!("{early:?}"),
        () = greet(&client) => {}
    }
    // The same for a table that comes in pieces.
    let owner = Caller::owner(&node, "d0").await;
    let (pieces, table) = stream();
    let header = v1::StreamSetMapRequest {
        header: Some(owner.header()),
        ..Default::default()
    };
    pieces.send(header).unwrap();
    let mut setting = Box::pin(owner.stream_from(table));
    tokio::select! {
        biased;
        early = &mut setting => panic!("{early:?}"),
        listed = owner.list(v1::ListMappingsRequest::default()) => drop(listed.unwrap()),
    }

    let begun = Instant::now();
    children::signal(node.pid(), Signal::TERM);
    let api = node.runtime_dir().api_socket();
    wait::until("the stop", || !api.exists());
    let early = tokio::time::timeout(LONG, &mut call).await;
    assert!(early.is_err(), "{early:?}");
    assert!(children::is_alive(node.pid()), "it did not wait for a call");
    let commit = v1::StreamSetMapRequest {
        commit: true,
        ..Default::default()
    };
    pieces.send(commit).unwrap();
    drop(pieces);
    let set = soon("the table", setting).await.unwrap();
    // What was there has ended with the session of its memory.
    assert_eq!((set.added, set.removed), (0, 0));
    let name = name("d0");
    asks.send(v1::GetDomainRequest { name: name.clone() })
        .unwrap();
    drop(asks);
    let answered = soon("the answer", call).await;
    assert_eq!(answered.unwrap().into_inner().name, name);

    let status = node.stop();
    let took = begun.elapsed();
    assert_eq!(status.code(), Some(0), "{}", children::describe(status));
    assert!((LONG..STOP_LIMIT).contains(&took), "{took:?}");
    drop(full);
}
