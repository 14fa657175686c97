//! F-01 to F-08: what may be registered as memory, and what becomes of
//! everything else that a client can put into a packet.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::time::{Duration, Instant};

use domaind_proto::v1::client_frame::Body as Ask;
use domaind_tests::raw::{Wire, attach, hello, register};
use domaind_tests::v1::Direction::{Bidirectional, ToDevice};
use domaind_tests::{Code, Node, P, Raw, Reason, files, refused, v1, wait};
use prost::Message;
use rustix::fs::{MemfdFlags, Mode, OFlags, SealFlags};

/// Everything that is no memory, by name.
fn impostors(node: &Node) -> Vec<(&'static str, OwnedFd)> {
    let regular = node.path().join("regular");
    std::fs::write(&regular, vec![0; 8192]).unwrap();
    let open =
        |path: &str, flags| rustix::fs::open(path, flags | OFlags::CLOEXEC, Mode::empty()).unwrap();
    let plain = rustix::fs::memfd_create("no-seals-allowed", MemfdFlags::CLOEXEC).unwrap();
    rustix::fs::ftruncate(&plain, P).unwrap();
    let (read_end, write_end) = rustix::pipe::pipe().unwrap();
    let good = files::good_memfd(P);
    let epoll = rustix::event::epoll::create(rustix::event::epoll::CreateFlags::CLOEXEC).unwrap();
    let event = rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC).unwrap();
    let (socket, _) = std::os::unix::net::UnixStream::pair().unwrap();
    let me = rustix::process::getpid();
    let pidfd = rustix::process::pidfd_open(me, rustix::process::PidfdFlags::empty()).unwrap();
    let mut all = vec![
        ("a memfd without seals", files::memfd(P, SealFlags::empty())),
        ("a memfd that may not be sealed", plain),
        (
            "a memfd that may shrink",
            files::memfd(P, SealFlags::GROW | SealFlags::SEAL),
        ),
        ("an empty memfd", files::memfd(0, files::GOOD_SEALS)),
        (
            "a memfd opened for writing only",
            files::reopen(&good, OFlags::WRONLY),
        ),
        ("a path to a memfd", files::reopen(&good, OFlags::PATH)),
        (
            "a regular file",
            open(regular.to_str().unwrap(), OFlags::RDWR),
        ),
        (
            "a directory",
            open("/tmp", OFlags::RDONLY | OFlags::DIRECTORY),
        ),
        ("/dev/null", open("/dev/null", OFlags::RDWR)),
        ("/dev/zero", open("/dev/zero", OFlags::RDWR)),
        ("a file of /proc", open("/proc/self/stat", OFlags::RDONLY)),
        ("the read end of a pipe", read_end),
        ("the write end of a pipe", write_end),
        ("a socket", socket.into()),
        ("an eventfd", event),
        ("an epoll", epoll),
        ("a pidfd", pidfd),
    ];
    if let Ok(shm) = tempfile::tempfile_in("/dev/shm") {
        shm.set_len(P).unwrap();
        all.push(("a file in /dev/shm", shm.into()));
    }
    all
}

/// A frame that asks for a registration, as bytes.
fn register_packet() -> Vec<u8> {
    frame(register(true))
}

fn frame(body: Ask) -> Vec<u8> {
    let frame = v1::ClientFrame {
        request_id: 77,
        body: Some(body),
    };
    frame.encode_to_vec()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn what_is_no_memory_is_refused_and_closed_and_the_session_goes_on() {
    let node = Node::start().await;
    node.domain("d0").await;
    let mut driver = Raw::driver(&node, "d0").await;
    let before = node.counts().await;
    for (what, fd) in impostors(&node) {
        for writable in [false, true] {
            let refusal = driver.register(&fd, writable).await.expect_err(what);
            assert_eq!(
                refusal.reason(),
                Reason::MemoryRefused,
                "{what}: {refusal:?}"
            );
            let codes = [Code::InvalidArgument, Code::PermissionDenied];
            assert!(codes.contains(&refusal.grpc_code()), "{what}: {refusal:?}");
            if !writable {
                // Not a matter of rights.
                assert_eq!(
                    refusal.grpc_code(),
                    Code::InvalidArgument,
                    "{what}: {refusal:?}"
                );
            }
            assert_eq!(node.counts().await, before, "{what}");
        }
    }
    driver.memory(P).await;
}

/// Case 42: a read-only fd, and write permission.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn memory_that_is_to_be_written_must_be_writable() {
    let node = Node::start().await;
    node.domain("d0").await;
    let mut driver = Raw::driver(&node, "d0").await;
    let good = files::good_memfd(P);
    let read_only = files::reopen(&good, OFlags::RDONLY);
    let sealed = files::memfd(P, SealFlags::SHRINK | SealFlags::WRITE);
    let future = files::memfd(P, SealFlags::SHRINK | SealFlags::FUTURE_WRITE);
    let (code, reason) = (Code::PermissionDenied, Reason::MemoryRefused);
    for fd in [&read_only, &sealed, &future] {
        refused(driver.register(fd, true).await, code, reason);
        let registered = driver.register(fd, false).await.expect("to be read only");
        let entry = v1::MapEntry {
            memory_id: registered.memory_id,
            len_bytes: P,
            direction: ToDevice.into(),
            ..Default::default()
        };
        let mapping = driver.map(entry).await.unwrap();
        driver.unmap(&mapping, None).await.unwrap();
        driver.unregister(registered.memory_id).await.unwrap();
    }
}

/// Sparse, and larger than any machine: it costs the daemon nothing, and what
/// is not there reads as zeros.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_sparse_terabyte_is_accepted_and_costs_nothing() {
    let node = Node::start().await;
    node.domain("d0").await;
    let mut driver = Raw::driver(&node, "d0").await;
    let before = node.counts().await;
    let memory = driver.memory(1 << 40).await;
    files::poke(&memory.fd, (1 << 40) - 4, b"last");

    let after = node.counts().await;
    assert_eq!(after.region_bytes, before.region_bytes);
    assert_eq!((after.memories, after.open_fds), (1, before.open_fds + 1));
    for offset in [0, 1 << 39, (1 << 40) - (1 << 20)] {
        let mapping = driver
            .map(memory.entry(offset, 1 << 20, ToDevice))
            .await
            .unwrap();
        let seen = driver.read(mapping.iova, (1 << 20) - 4);
        assert!(seen.iter().all(|byte| *byte == 0));
        driver.unmap(&mapping, None).await.unwrap();
    }
    let mapping = driver
        .map(memory.entry((1 << 40) - 4, 4, Bidirectional))
        .await
        .unwrap();
    assert_eq!(driver.read(mapping.iova, 4), b"last");
    // Reading holes has filled none of them.
    let stat = rustix::fs::fstat(&memory.fd).unwrap();
    assert!(stat.st_blocks < 64, "{} blocks", stat.st_blocks);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn more_seals_than_needed_and_growth_do_no_harm() {
    let node = Node::start().await;
    node.domain("d0").await;
    let mut driver = Raw::driver(&node, "d0").await;
    let all = SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
    driver.register(files::memfd(P, all), true).await.unwrap();
    // Grown after registration: the size that was said stands.
    let memory = driver.memory(P).await;
    rustix::fs::ftruncate(&memory.fd, 4 * P).unwrap();
    let beyond = driver.map(memory.entry(P, 1, ToDevice)).await;
    refused(beyond, Code::InvalidArgument, Reason::OutsideMemory);
    driver.map(memory.entry(0, P, ToDevice)).await.unwrap();
}

/// F-08, case 44: truncated all the while it is registered.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn truncating_while_registering_is_either_refused_or_too_late() {
    let node = Node::start().await;
    node.domain("d0").await;
    let mut driver = Raw::driver(&node, "d0").await;
    let before = node.counts().await;
    for round in 0_u64..200 {
        let fd = files::memfd(4 * P, SealFlags::empty());
        let racer = {
            let fd = fd.try_clone().unwrap();
            std::thread::spawn(move || {
                rustix::fs::ftruncate(&fd, (round % 3) * P).ok();
                rustix::fs::fcntl_add_seals(&fd, SealFlags::SHRINK).ok();
                rustix::fs::ftruncate(&fd, 0).is_ok()
            })
        };
        let registered = driver.register(&fd, true).await;
        let shrunk_after_seal = racer.join().unwrap();
        assert!(!shrunk_after_seal || round % 3 == 0);
        if let Ok(memory) = registered {
            let entry = v1::MapEntry {
                memory_id: memory.memory_id,
                len_bytes: memory.size_bytes,
                direction: Bidirectional.into(),
                ..Default::default()
            };
            let mapping = driver
                .map(entry)
                .await
                .expect("all of what was said is there");
            driver.unmap(&mapping, None).await.unwrap();
            driver.unregister(memory.memory_id).await.unwrap();
        }
    }
    assert_eq!(node.counts().await, before);
}

/// Each of a thousand refusals closes its fd; so does each connection that is
/// closed for what it sent.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_thousand_refused_fds_leave_none_open() {
    let node = Node::start().await;
    node.domain("d0").await;
    let mut driver = Raw::driver(&node, "d0").await;
    let before = node.counts().await;
    let impostors = impostors(&node);
    for (what, fd) in impostors.iter().cycle().take(1_000) {
        driver.register(fd, true).await.expect_err(what);
    }
    assert_eq!(node.counts().await, before);
    // And registrations that are given back.
    for _ in 0..200 {
        let memory = driver.memory(P).await;
        driver.unregister(memory.id).await.unwrap();
    }
    assert_eq!(node.counts().await, before);
}

/// A surplus, wherever it comes: the connection is closed, the fds with it.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn surplus_fds_close_the_connection_and_are_closed() {
    let node = Node::start().await;
    node.domain("d0").await;
    let (before, usage) = (node.counts().await, node.usage("d0").await);
    let memfd = files::good_memfd(P);
    let one = memfd.as_raw_fd();
    let detach = frame(Ask::Detach(v1::Detach {}));
    let unregister = frame(Ask::UnregisterMemory(v1::UnregisterMemory { memory_id: 1 }));
    let table: Vec<(&str, Vec<u8>, Vec<RawFd>)> = vec![
        ("two with RegisterMemory", register_packet(), vec![one; 2]),
        ("three with RegisterMemory", register_packet(), vec![one; 3]),
        ("253 with RegisterMemory", register_packet(), vec![one; 253]),
        ("none with RegisterMemory", register_packet(), vec![]),
        ("one with Detach", detach, vec![one]),
        ("one with UnregisterMemory", unregister, vec![one]),
        ("two with nothing readable", vec![0xff; 20], vec![one; 2]),
    ];
    for round in 0..30 {
        for (what, bytes, fds) in &table {
            let driver = Raw::driver(&node, "d0").await;
            driver.wire.send_packet(bytes, fds).unwrap();
            let closed = driver.wire.closed().await;
            let ended = closed
                .ended
                .unwrap_or_else(|| panic!("{what} {round}: it says why"));
            assert_eq!(ended.reason(), v1::EndReason::Protocol, "{what}");
            assert!(!ended.message.is_empty());
        }
    }
    node.until_counts(before).await;
    node.until_usage("d0", usage).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn packets_that_are_no_frames_end_the_connection_and_nothing_else() {
    let node = Node::start().await;
    node.domain("d0").await;
    let mut bystander = Raw::driver(&node, "d0").await;
    let (before, usage) = (node.counts().await, node.usage("d0").await);
    let no_body = v1::ClientFrame {
        request_id: 5,
        body: None,
    }
    .encode_to_vec();
    let long_hello = v1::Hello {
        agent: "x".repeat(3_000),
        ..Default::default()
    };
    let table: Vec<(&str, Vec<u8>)> = vec![
        ("garbage", vec![0xff; 100]),
        ("one byte", vec![0x80]),
        ("no body", no_body),
        ("too long by one", vec![0; 4_097]),
        ("very long", vec![0; 100_000]),
        ("a long agent", frame(Ask::Hello(long_hello))),
    ];
    for attached in [false, true] {
        for (what, bytes) in &table {
            let wire = match attached {
                true => Raw::driver(&node, "d0").await.wire,
                false => Wire::connect(&node.runtime_dir().fd_socket()),
            };
            wire.send_packet(bytes, &[]).unwrap();
            // Closed, or refused in words; never a region.
            let packet = wire.receive().await;
            if let Some(packet) = packet {
                assert!(packet.fd.is_none(), "{what}");
                use v1::server_frame::Body::{Refusal, SessionEnded};
                let body = packet.frame.body;
                assert!(
                    matches!(body, Some(Refusal(_) | SessionEnded(_))),
                    "{what}: {body:?}"
                );
            }
        }
    }
    node.until_counts(before).await;
    node.until_usage("d0", usage).await;
    bystander.memory(P).await;
}

/// A client that asks and never reads: it is dropped, not buffered for, and
/// others are served meanwhile.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_client_that_never_reads_is_dropped_and_others_are_served() {
    let node = Node::start().await;
    node.domain("d0").await;
    let mut bystander = Raw::driver(&node, "d0").await;
    let (before, usage) = (node.counts().await, node.usage("d0").await);
    let deaf = Raw::driver(&node, "d0").await;
    let ask = frame(Ask::UnregisterMemory(v1::UnregisterMemory { memory_id: 1 }));
    let mut sent = 0;
    // Until neither direction takes any more: the daemon has stopped reading.
    let mut quiet = Instant::now();
    while quiet.elapsed() < Duration::from_millis(300) {
        match deaf.wire.send_packet(&ask, &[]) {
            Ok(()) => (sent, quiet) = (sent + 1, Instant::now()),
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                tokio::task::yield_now().await;
            }
            Err(_) => break,
        }
        assert!(sent < 2_000_000, "the daemon takes everything");
    }
    // Others are served promptly while it hangs, until it is gone.
    let until = Instant::now() + wait::DEADLINE;
    while node.counts().await.sessions > before.sessions {
        let begun = Instant::now();
        let memory = bystander.memory(P).await;
        bystander.unregister(memory.id).await.unwrap();
        assert!(begun.elapsed() < Duration::from_secs(2), "others wait");
        assert!(Instant::now() < until, "the deaf client is never dropped");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    drop(deaf);
    node.until_counts(before).await;
    assert_eq!(node.usage("d0").await, usage);
}

/// The same before it is attached: regions are asked for and never taken.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn clients_that_attach_and_leave_without_reading_cost_nothing() {
    let node = Node::start().await;
    node.domain("d0").await;
    let (before, usage) = (node.counts().await, node.usage("d0").await);
    for _ in 0..50 {
        let mut wire = Wire::connect(&node.runtime_dir().fd_socket());
        wire.send(hello(1, 1), None).await.unwrap();
        let attach = attach("domains/d0", v1::Role::Driver, v1::Access::ReadWrite);
        wire.send(attach, None).await.unwrap();
        let memfd = files::good_memfd(P);
        // It may be too early for the daemon to take fds at all.
        let _ = wire.send(register(true), Some(memfd.as_fd())).await;
    }
    node.until_counts(before).await;
    node.until_usage("d0", usage).await;
}

/// O_APPEND on a shared description would send what flows back to the end of
/// the file (S-05).
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn flags_and_offset_of_the_clients_description_do_not_matter() {
    let node = Node::start().await;
    node.domain("d0").await;
    let mut driver = Raw::driver(&node, "d0").await;
    let memory = driver.memory(2 * P).await;
    files::poke(&memory.fd, 0, &[b'.'; 8192]);
    rustix::fs::fcntl_setfl(&memory.fd, OFlags::APPEND).unwrap();
    rustix::fs::seek(&memory.fd, rustix::fs::SeekFrom::Start(5_000)).unwrap();

    let mapping = driver
        .map(memory.entry(10, 5, Bidirectional))
        .await
        .unwrap();
    driver.write(mapping.iova, b"where");
    driver.unmap(&mapping, None).await.unwrap();

    assert_eq!(files::peek(&memory.fd, 0, 16), b"..........where.");
    let file = File::from(memory.fd.as_fd().try_clone_to_owned().unwrap());
    assert_eq!(
        file.metadata().unwrap().len(),
        2 * P,
        "nothing was appended"
    );
}
