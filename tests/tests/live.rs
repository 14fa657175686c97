//! Removal and acknowledgment between real processes: nothing is used again
//! while somebody may still use it, and nobody waits longer than the timeout for
//! somebody who says nothing.

use std::collections::BTreeSet;
use std::fmt::Debug;
use std::future::Future;
use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixDatagram;
use std::pin::pin;
use std::process::Command;
use std::time::{Duration, Instant};

use domaind_proto::v1::client_frame::Body as AskBody;
use domaind_tests::accessor::{Accessor, Say};
use domaind_tests::actor::{number, text};
use domaind_tests::frames::{Acker, by_frames};
use domaind_tests::node::{greet, spec, without_settings};
use domaind_tests::raw::unmap_entry;
use domaind_tests::refusal::Refused;
use domaind_tests::v1::Direction::{Bidirectional, ToDevice};
use domaind_tests::v1::{MappingState, SessionState};
use domaind_tests::wait::{self, soon};
use domaind_tests::{Actor, Caller, Code, Node, P, Raw, Reason, children, files, refused, v1};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags};
use rustix::process::Signal;
use serde_json::{Value, json};

/// A short ack timeout, for tests in which it runs out.
const QUICK: &str = "--limits-ack-timeout-ms=400";
/// It, and what a busy machine may add.
const TIMEOUT: Duration = Duration::from_millis(400);
const SLACK: Duration = Duration::from_secs(4);
/// In which what does not wait has come, and what waits has not. Longer than
/// any answer takes on an idle machine; on a busy one a test may miss a fault,
/// but finds none that is not there.
const MOMENT: Duration = Duration::from_millis(60);
/// A page of the direct space, above the apertures.
const PAGE: u64 = 1 << 20;
const AT: (u64, u64) = (PAGE * P, PAGE * P + P - 1);

async fn with_d0(flags: &[&str]) -> Node {
    let node = Node::with(flags).await;
    node.domain("d0").await;
    node
}

/// Runs a removal: it asks this session, is not answered before it has
/// acknowledged, and is answered then.
async fn waits_for<T: Debug>(
    acker: &mut Acker,
    what: &str,
    removal: impl Future<Output = Refused<T>>,
) -> v1::Change {
    let mut removal = pin!(removal);
    let change = tokio::select! {
        answer = &mut removal => panic!("{what} did not ask: {answer:?}"),
        change = acker.asked() => change,
    };
    let early = tokio::time::timeout(MOMENT, &mut removal).await;
    assert!(early.is_err(), "{what} did not wait: {early:?}");
    // One of an older view does not count.
    acker.ack(change.generation - 1).await;
    let early = tokio::time::timeout(MOMENT, &mut removal).await;
    assert!(early.is_err(), "{what} took an old Ack: {early:?}");

    let begun = Instant::now();
    acker.ack(change.generation).await;
    let answer = soon(what, removal).await;
    answer.unwrap_or_else(|refusal| panic!("{what}: {refusal:?}"));
    assert!(
        begun.elapsed() < Duration::from_secs(1),
        "{what} went on waiting"
    );
    change
}

/// Whether the change says that this range is gone.
fn tells_of(change: &v1::Change, start: u64) -> bool {
    let holds = |range: &v1::IovaRange| range.start <= start && start <= range.last;
    change.everything || change.removed.iter().any(holds)
}

/// Case 63: an accessor that acks, asked by each call that removes.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_removal_is_answered_when_the_last_session_has_acknowledged_it_and_not_before() {
    let node = with_d0(&[]).await;
    let mut driver = Raw::driver(&node, "d0").await;
    let memory = driver.memory(4 * P).await;
    let caller = Caller::session(&driver);
    let mut acker = Acker::device(&node, "d0").await;
    let one_page = || memory.at(PAGE, 1);

    let ring = driver.alloc_len(P).await.unwrap();
    let free = driver.free(ring.iova, ring.mapping_id);
    let change = waits_for(&mut acker, "FreeCoherent", free).await;
    assert!(tells_of(&change, ring.iova), "{change:?}");

    caller.map(one_page()).await.unwrap();
    let change = waits_for(&mut acker, "UnmapDirect", caller.unmap(AT.0, AT.1)).await;
    assert!(tells_of(&change, AT.0), "{change:?}");

    caller.map(one_page()).await.unwrap();
    let change = waits_for(&mut acker, "SetMap", caller.set_map(Vec::new())).await;
    assert!(tells_of(&change, AT.0), "{change:?}");

    caller.map(one_page()).await.unwrap();
    let stream = caller.stream(caller.chunked(&[], 1));
    let change = waits_for(&mut acker, "StreamSetMap", stream).await;
    assert!(tells_of(&change, AT.0), "{change:?}");

    caller.map(one_page()).await.unwrap();
    let change = waits_for(&mut acker, "ClearMap", caller.clear(&[AT])).await;
    assert!(tells_of(&change, AT.0), "{change:?}");

    let entry = memory.entry(0, P, Bidirectional);
    let mapping = driver.map(entry).await.unwrap();
    let change = waits_for(&mut acker, "ResetBounce", caller.reset(true)).await;
    assert!(tells_of(&change, mapping.iova), "{change:?}");

    // Of nothing there is nothing to acknowledge.
    caller.clear(&[AT]).await.unwrap();
    assert!(acker.hears_nothing(MOMENT).await);
}

/// Case 63: the memory is given back when nobody can reach it any more.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn unregister_memory_is_answered_when_its_removal_is_acknowledged() {
    let node = with_d0(&[]).await;
    let mut driver = Raw::driver(&node, "d0").await;
    let memory = driver.memory(P).await;
    let caller = Caller::session(&driver);
    let mut acker = Acker::device(&node, "d0").await;
    caller.map(memory.at(PAGE, 1)).await.unwrap();
    let unmapping = tokio::spawn({
        let caller = caller.clone();
        async move { caller.unmap(AT.0, AT.1).await }
    });
    let change = acker.asked().await;

    let mut unregistering = pin!(driver.unregister(memory.id));
    let early = tokio::time::timeout(MOMENT, &mut unregistering).await;
    assert!(early.is_err(), "{early:?}");
    assert!(!unmapping.is_finished());

    acker
        .ack(
            node.get("d0")
                .await
                .unwrap()
                .generation
                .max(change.generation),
        )
        .await;
    soon("UnregisterMemory", unregistering).await.unwrap();
    soon("UnmapDirect", unmapping).await.unwrap().unwrap();
}

/// Streaming Unmap does not wait, but its range does.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn an_unmapped_range_is_used_again_only_when_it_is_acknowledged() {
    let node = Node::start().await;
    // Room for one mapping: the next one wants the same place. Page 0 is kept.
    node.create("d0", spec(2 * P, 0)).await.unwrap();
    let mut driver = Raw::driver(&node, "d0").await;
    let memory = driver.memory(P).await;
    let mut acker = Acker::device(&node, "d0").await;
    let entry = memory.entry(0, P, ToDevice);
    let first = driver.map(entry).await.unwrap();

    driver.unmap(&first, None).await.unwrap();

    let usage = node.usage("d0").await;
    assert_eq!(
        (usage.streaming_mappings, usage.invalidating_mappings),
        (0, 1)
    );
    let listed = node.mappings("d0").await;
    assert_eq!(listed.len(), 1);
    assert_eq!(listed[0].state(), MappingState::Invalidating);
    let change = waits_for(&mut acker, "Map", driver.map(entry)).await;
    assert!(tells_of(&change, first.iova), "{change:?}");
    let listed = node.mappings("d0").await;
    assert_eq!(
        (listed[0].iova, listed[0].state()),
        (first.iova, MappingState::Live)
    );
}

/// I-03, case 64: who never acknowledges is given up, and can reach only what
/// nobody else is given.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_session_that_never_acknowledges_is_fenced_and_what_it_could_reach_is_quarantined() {
    let node = with_d0(&[QUICK]).await;
    let driver = Raw::driver(&node, "d0").await;
    let mut mute = Acker::device(&node, "d0").await;
    assert_eq!(
        u128::from(mute.raw.given.attached.ack_timeout_ms),
        TIMEOUT.as_millis()
    );
    let usage = node.usage("d0").await;
    let ring = driver.alloc_len(P).await.unwrap();

    let begun = Instant::now();
    let answer = driver.free(ring.iova, ring.mapping_id).await;

    let waited = begun.elapsed();
    let refusal = refused(answer, Code::DeadlineExceeded, Reason::NotAcknowledged);
    assert_eq!(refusal.metadata["sessions"], mute.raw.name());
    assert!(
        (TIMEOUT / 2..TIMEOUT + SLACK).contains(&waited),
        "{waited:?}"
    );
    let change = mute.asked().await;
    assert_eq!(mute.end().await, v1::EndReason::Fenced);
    // It is done all the same.
    let again = driver.free(ring.iova, ring.mapping_id).await;
    refused(again, Code::NotFound, Reason::NoSuchMapping);

    // Visible to whoever looks.
    let held = node.usage("d0").await;
    assert_eq!((held.sessions, held.fenced_sessions), (1, 1));
    assert_eq!((held.quarantined_mappings, held.quarantined_bytes), (1, P));
    assert_eq!(
        (held.invalidating_mappings, held.coherent_allocations),
        (0, 0)
    );
    let listed = node.mappings("d0").await;
    assert_eq!(listed.len(), 1);
    assert_eq!(
        (listed[0].iova, listed[0].state()),
        (ring.iova, MappingState::Quarantined)
    );
    assert_eq!(listed[0].blocked_by, mute.raw.name());
    let sessions = node.sessions("d0").await;
    let fenced = sessions
        .iter()
        .find(|session| session.name == mute.raw.name());
    let fenced = fenced.expect("it is listed");
    assert_eq!(fenced.state(), SessionState::Fenced);
    assert_eq!(
        (fenced.quarantined_mappings, fenced.quarantined_bytes),
        (1, P)
    );
    assert!(
        fenced.acked_generation < fenced.asked_generation,
        "{fenced:?}"
    );

    // It has no say any more.
    let looked = Caller::session(&mute.raw)
        .translate(0, 0, v1::Perm::Read)
        .await;
    refused(looked, Code::NotFound, Reason::NoSuchSession);

    // The others go on, and nobody waits for it again.
    let begun = Instant::now();
    for _ in 0..20 {
        let mine = driver.alloc_len(P).await.unwrap();
        assert_ne!(mine.iova, ring.iova);
        driver.free(mine.iova, mine.mapping_id).await.unwrap();
    }
    assert!(begun.elapsed() < SLACK, "{:?}", begun.elapsed());
    let whole = driver.alloc_len(4 << 20).await;
    refused(whole, Code::ResourceExhausted, Reason::NoSpace);

    // What it says late counts.
    mute.ack(change.generation).await;
    let released = async || {
        let now = node.usage("d0").await;
        (
            now.quarantined_mappings,
            now.quarantined_bytes,
            now.coherent_used_bytes,
        )
    };
    wait::until_equal("the late Ack", (0, 0, 0), released).await;
    let whole = driver.alloc_len(4 << 20).await.unwrap();
    driver.free(whole.iova, whole.mapping_id).await.unwrap();
    mute.detach().await;
    let wanted = v1::DomainUsage {
        sessions: 1,
        ..usage
    };
    node.until_usage("d0", wanted).await;
    assert_eq!(node.sessions("d0").await.len(), 1);
}

/// A fenced session that says Detach holds nothing.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_fenced_session_that_detaches_late_gives_all_back() {
    let node = with_d0(&[QUICK]).await;
    let driver = Raw::driver(&node, "d0").await;
    let usage = node.usage("d0").await;
    let mut mute = Acker::device(&node, "d0").await;
    let ring = driver.alloc_len(P).await.unwrap();
    let answer = driver.free(ring.iova, ring.mapping_id).await;
    refused(answer, Code::DeadlineExceeded, Reason::NotAcknowledged);
    assert_eq!(mute.end().await, v1::EndReason::Fenced);

    mute.detach().await;

    node.until_usage("d0", usage).await;
    assert!(node.mappings("d0").await.is_empty());
}

/// A process that holds a pin on a direct mapping, with what it read there.
async fn pinned(node: &Node, driver: &mut Raw, letter: u8) -> (Accessor, String) {
    let memory = driver.memory(P).await;
    files::poke(&memory.fd, 0, &[letter; 4096]);
    Caller::session(driver)
        .map(memory.at(PAGE, 1))
        .await
        .unwrap();
    let (mut accessor, session) = Accessor::device(node, "d0");
    accessor.must(&Say::Open {
        start: AT.0,
        len: P,
    });
    accessor.must(&Say::Pin);
    assert_eq!(accessor.read(AT.0, 8).unwrap(), [letter; 8]);
    (accessor, session)
}

/// Waits until a session owes an Ack.
async fn until_asked(node: &Node, session: &str) {
    let owes = async || {
        let sessions = node.sessions("d0").await;
        let it = sessions.iter().find(|it| it.name == session);
        it.is_some_and(|it| it.asked_generation > it.acked_generation)
    };
    wait::until_equal("a session that is asked", true, owes).await;
}

/// Case 65.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn an_accessor_that_is_killed_while_an_unmap_waits_for_it_lets_it_complete() {
    let node = with_d0(&[]).await;
    let mut driver = Raw::driver(&node, "d0").await;
    let usage = node.usage("d0").await;
    let (mut accessor, session) = pinned(&node, &mut driver, b'k').await;
    let caller = Caller::session(&driver);
    let unmapping = tokio::spawn(async move { caller.unmap(AT.0, AT.1).await });
    until_asked(&node, &session).await;
    assert!(!unmapping.is_finished());

    let begun = Instant::now();
    accessor.kill();

    let unmapped = soon("UnmapDirect", unmapping).await.unwrap();
    assert_eq!(unmapped.unwrap(), (1, P));
    assert!(
        begun.elapsed() < Duration::from_secs(2),
        "{:?}",
        begun.elapsed()
    );
    let wanted = v1::DomainUsage {
        memories: 1,
        ..usage
    };
    node.until_usage("d0", wanted).await;
}

/// Cases 63 and 68.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_translation_fails_when_its_removal_was_acknowledged() {
    let node = with_d0(&[]).await;
    let mut driver = Raw::driver(&node, "d0").await;
    let (mut accessor, session) = pinned(&node, &mut driver, b't').await;
    let caller = Caller::session(&driver);
    let unmapping = tokio::spawn({
        let caller = caller.clone();
        async move { caller.unmap(AT.0, AT.1).await }
    });
    until_asked(&node, &session).await;
    tokio::time::sleep(MOMENT).await;
    assert!(!unmapping.is_finished(), "it did not wait for a pin");
    // Not even under the pin is it found anew.
    accessor.read(AT.0, 8).unwrap_err();

    accessor.must(&Say::Unpin);

    soon("UnmapDirect", unmapping).await.unwrap().unwrap();
    accessor.read(AT.0, 8).unwrap_err();
    let looked = caller.translate(AT.0, AT.1, v1::Perm::Read).await;
    refused(looked, Code::NotFound, Reason::NotMapped);
    accessor.must(&Say::Detach);
}

/// Case 68: one table after the other, at the same addresses.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn when_a_table_is_replaced_old_translations_fail_after_the_ack_and_new_ones_work() {
    let node = with_d0(&[]).await;
    let mut driver = Raw::driver(&node, "d0").await;
    let (mut accessor, _session) = pinned(&node, &mut driver, b'1').await;
    accessor.must(&Say::Unpin);
    let second = driver.memory(P).await;
    files::poke(&second.fd, 0, &[b'2'; 4096]);

    let caller = Caller::session(&driver);
    let set = caller.set_map(vec![second.row(PAGE, 1)]).await;
    set.unwrap();

    // Whatever it sees from now on is the new one.
    accessor.must(&Say::Open {
        start: AT.0,
        len: P,
    });
    assert_eq!(accessor.read(AT.0, 8).unwrap(), [b'2'; 8]);
    accessor.must(&Say::Detach);
}

/// I-04.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_stale_mapper_sees_no_byte_of_later_mappings() {
    let node = Node::with(&[QUICK]).await;
    node.create("d0", spec(64 * P, 0)).await.unwrap();
    let mut driver = Raw::driver(&node, "d0").await;
    let memory = driver.memory(P).await;
    let stale = Acker::device(&node, "d0").await;
    files::poke(&memory.fd, 0, &[0x11; 4096]);
    let entry = memory.entry(0, P, ToDevice);
    let mapping = driver.map(entry).await.unwrap();
    assert_eq!(stale.raw.read(mapping.iova, 4096), [0x11; 4096]);

    driver.unmap(&mapping, None).await.unwrap();

    files::poke(&memory.fd, 0, &[0x22; 4096]);
    let assert_unseen = || {
        let seen = stale.raw.read(mapping.iova, 4096);
        assert!(!seen.contains(&0x22), "a byte of somebody else");
    };
    // While it is asked, and when it is fenced: everything else is used again
    // and again. What it could see when it was fenced stays, and is few.
    for _ in 0..20 {
        driver.map(entry).await.unwrap();
        assert_unseen();
    }
    assert_eq!(stale.end().await, v1::EndReason::Fenced);
    for _ in 0..50 {
        let mut live = Vec::new();
        for _ in 0..40 {
            live.push(driver.map(entry).await.unwrap());
        }
        assert_unseen();
        let entries = live.iter().map(|one| unmap_entry(one, None)).collect();
        driver.unmap_all(entries, false).await.unwrap();
    }
    let listed = node.mappings("d0").await;
    let listed = listed.iter().find(|one| one.iova == mapping.iova);
    assert_eq!(
        listed.expect("held back").state(),
        MappingState::Quarantined
    );
    // Until nothing else is left.
    while let Ok(one) = driver.map(entry).await {
        assert_ne!(one.iova, mapping.iova);
        assert_unseen();
    }
}

/// I-05. On a busy machine the kernel may take its time; once in five it does
/// not.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn client_kill9_releases() {
    let node = with_d0(&[]).await;
    let _witness = Raw::device(&node, "d0").await;
    let usage = node.usage("d0").await;
    let mut best = Duration::MAX;
    for _ in 0..5 {
        let mut driver = Actor::driver(&node, "d0");
        let memory = driver.buffer(16 * P);
        driver.map_many(memory, 0, 16 * P, Bidirectional, 100);
        driver.alloc(100 * P, false);
        let begun = Instant::now();
        driver.kill();
        node.until_usage("d0", usage).await;
        best = best.min(begun.elapsed());
    }
    assert!(best < Duration::from_secs(1), "{best:?}");
}

/// The session is fenced, and holds one mapping back.
async fn assert_holds_back(node: &Node, session: &str, iova: u64) {
    let sessions = node.sessions("d0").await;
    let fenced = sessions.iter().find(|it| it.name == session);
    let fenced = fenced.expect("it is still listed");
    assert_eq!(
        (fenced.state(), fenced.quarantined_mappings),
        (SessionState::Fenced, 1)
    );
    let listed = node.mappings("d0").await;
    let held = listed.iter().find(|one| one.iova == iova).expect("listed");
    assert_eq!(
        (held.state(), held.blocked_by.as_str()),
        (MappingState::Quarantined, session)
    );
}

/// I-06 and A-04: not the process that attached counts, but who has what it was
/// given; and a child that has its connection, too, does not speak for it.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn fork_and_die() {
    let node = with_d0(&[]).await;
    let mut driver = Raw::driver(&node, "d0").await;
    let memory = driver.memory(P).await;
    let mut parent = Accessor::start(&node);
    parent.begin(&Say::Leave {
        domain: "d0".into(),
    });
    // In any order.
    let said = [parent.hear().unwrap(), parent.hear().unwrap()];
    assert!(said.contains(&json!("holds")), "{said:?}");
    let left = said.iter().find(|one| one.is_object()).unwrap();
    let (child, session) = (number(&left["child"]), text(&left["session"]));
    let child = u32::try_from(child).unwrap();
    let mapping = driver.map(memory.entry(0, P, ToDevice)).await.unwrap();

    parent.kill();
    let ended = async || {
        let sessions = node.sessions("d0").await;
        sessions
            .iter()
            .any(|it| it.name == session && it.state() == SessionState::Fenced)
    };
    wait::until_equal("the end of the parent's session", true, ended).await;
    assert_eq!(parent.hear(), Ok(json!("spoke")));
    driver.unmap(&mapping, None).await.unwrap();

    // However long it takes.
    for _ in 0..5 {
        tokio::time::sleep(Duration::from_millis(150)).await;
        assert_holds_back(&node, &session, mapping.iova).await;
    }
    assert!(children::is_alive(child));
    let begun = Instant::now();
    children::signal(child, Signal::KILL);
    let left = async || {
        let now = node.usage("d0").await;
        (
            now.fenced_sessions,
            now.quarantined_mappings,
            now.bounce_used_bytes,
        )
    };
    wait::until_equal("the release", (0, 0, 0), left).await;
    assert!(begun.elapsed() < SLACK, "{:?}", begun.elapsed());
    assert!(node.mappings("d0").await.is_empty());
}

/// Takes the fd that lies in a socket.
fn take_fd(socket: &UnixDatagram) -> OwnedFd {
    let mut bytes = [0; 64];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let mut into = [IoSliceMut::new(&mut bytes)];
    rustix::net::recvmsg(socket, &mut into, &mut ancillary, RecvFlags::CMSG_CLOEXEC).unwrap();
    let mut fds = ancillary.drain().filter_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
        _ => None,
    });
    fds.next().expect("an fd")
}

/// I-07: handed to another process, and still in the socket in between.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn fd_passed_on() {
    let node = with_d0(&[]).await;
    let mut driver = Raw::driver(&node, "d0").await;
    let memory = driver.memory(P).await;
    let usage = node.usage("d0").await;
    for is_taken in [true, false] {
        let path = node.path().join(format!("mail-{is_taken}"));
        let mailbox = UnixDatagram::bind(&path).unwrap();
        let mut accessor = Accessor::start(&node);
        let session = accessor.must(&Say::Post {
            domain: "d0".into(),
            to: path.to_str().unwrap().to_owned(),
        });
        let session = text(&session);
        let mapping = driver.map(memory.entry(0, P, ToDevice)).await.unwrap();
        accessor.kill();
        let ended = async || {
            let sessions = node.sessions("d0").await;
            sessions
                .iter()
                .any(|it| it.name == session && it.state() == SessionState::Fenced)
        };
        wait::until_equal("the end of its session", true, ended).await;
        driver.unmap(&mapping, None).await.unwrap();

        // No process has it: it is in flight.
        tokio::time::sleep(Duration::from_millis(600)).await;
        assert_holds_back(&node, &session, mapping.iova).await;
        if is_taken {
            let fd = take_fd(&mailbox);
            drop(mailbox);
            tokio::time::sleep(Duration::from_millis(600)).await;
            assert_holds_back(&node, &session, mapping.iova).await;
            drop(fd);
        } else {
            drop(mailbox);
        }
        node.until_usage("d0", usage).await;
    }
}

/// I-10: what a client writes into its session page harms only itself.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn hostile_ack_page() {
    let node = with_d0(&[QUICK]).await;
    let driver = Raw::driver(&node, "d0").await;
    let caller = Caller::session(&driver);
    let bystander = Raw::device(&node, "d0").await;
    let ring = driver.alloc_len(P).await.unwrap();
    let is_page = |region: &v1::Region| region.kind() == v1::RegionKind::SessionPage;
    let noise = files::pattern(0x5eed_0010, 60_000);
    let mut noise = noise
        .chunks_exact(8)
        .map(|bytes| u64::from_ne_bytes(bytes.try_into().unwrap()));
    let mut next = || noise.next().unwrap();
    let mut fenced = 0;
    for round in 0..12 {
        let hostile = Raw::device(&node, "d0").await;
        let tables = &hostile.given.tables;
        let (_, page) = tables.iter().find(|(region, _)| is_page(region)).unwrap();
        for _ in 0..100 {
            let (word, value) = (next() % 512, next());
            // Small numbers are views that there were.
            let value = if value % 2 == 0 {
                value >> 1
            } else {
                value % 20
            };
            files::poke(page, word * 8, &value.to_ne_bytes());
        }
        if round % 3 == 0 {
            files::poke(page, 0, &[0xff; 4096]);
        }
        if round % 3 == 1 {
            // It seems to hold the oldest of all views.
            files::poke(page, 16, &63_u64.to_ne_bytes());
            files::poke(page, 64, &1_u64.to_ne_bytes());
        }
        let mine = driver.alloc_len(P).await.unwrap();
        let begun = Instant::now();
        let freed = driver.free(mine.iova, mine.mapping_id).await;
        assert!(begun.elapsed() < TIMEOUT + SLACK);
        if let Err(refusal) = freed {
            assert_eq!(refusal.reason(), Reason::NotAcknowledged, "{refusal:?}");
            assert_eq!(refusal.metadata["sessions"], hostile.name());
            fenced += 1;
        }
        // All others are as they were.
        let sessions = node.sessions("d0").await;
        for good in [driver.name(), bystander.name()] {
            let it = sessions.iter().find(|it| it.name == good).expect("listed");
            assert_eq!(it.state(), SessionState::Attached);
            assert!(it.acked_generation >= it.asked_generation, "{it:?}");
        }
        let last = ring.iova + P - 1;
        caller
            .translate(ring.iova, last, v1::Perm::Read)
            .await
            .unwrap();
        let looked = Caller::session(&bystander);
        looked
            .translate(ring.iova, last, v1::Perm::Read)
            .await
            .unwrap();
    }
    assert!(fenced >= 4, "the oldest view was seen in {fenced} rounds");
    greet(&node.client().await).await;
}

/// I-10: Acks of what was long ago, of what is, and of what has not been.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_backward_ack_means_nothing_and_a_future_one_ends_its_session_only() {
    let node = with_d0(&[]).await;
    let driver = Raw::driver(&node, "d0").await;
    // Something that was before.
    for _ in 0..3 {
        driver.alloc_len(P).await.unwrap();
    }
    let mut odd = Acker::device(&node, "d0").await;
    let bystander = Acker::device(&node, "d0").await;
    let generation = async || node.get("d0").await.unwrap().generation;
    for old in [0, 1, generation().await] {
        odd.ack(old).await;
    }
    let ring = driver.alloc_len(P).await.unwrap();
    let now = generation().await;
    for any in [now, 0, now - 1, 1] {
        odd.ack(any).await;
    }
    assert!(odd.hears_nothing(MOMENT).await, "it is still attached");
    let acked = async || {
        let sessions = node.sessions("d0").await;
        let it = sessions.iter().find(|it| it.name == odd.raw.name());
        it.map(|it| it.acked_generation)
    };
    wait::until_equal("the newest Ack", Some(now), acked).await;

    odd.ack(u64::MAX).await;

    assert_eq!(odd.end().await, v1::EndReason::Protocol);
    assert!(bystander.hears_nothing(MOMENT).await);
    let gone = Caller::session(&odd.raw)
        .translate(0, 0, v1::Perm::Read)
        .await;
    refused(gone, Code::NotFound, Reason::NoSuchSession);
    // A generation more than there is, by one.
    let mut odd = Acker::device(&node, "d0").await;
    odd.ack(generation().await + 1).await;
    assert_eq!(odd.end().await, v1::EndReason::Protocol);
    let token = Caller::session(&driver);
    token
        .translate(ring.iova, ring.iova, v1::Perm::Read)
        .await
        .unwrap();
}

/// I-03: a process that hangs with a pin.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_stopped_process_with_a_pin_holds_back_only_what_it_could_reach_until_it_goes_on() {
    let node = with_d0(&[QUICK]).await;
    let mut driver = Raw::driver(&node, "d0").await;
    let (mut hung, session) = pinned(&node, &mut driver, b'h').await;
    let caller = Caller::session(&driver);
    children::stop(hung.pid());

    let unmapped = caller.unmap(AT.0, AT.1).await;
    let refusal = refused(unmapped, Code::DeadlineExceeded, Reason::NotAcknowledged);
    assert_eq!(refusal.metadata["sessions"], session);

    // Others, and the same driver elsewhere.
    let mut other = Raw::driver(&node, "d0").await;
    let memory = other.memory(P).await;
    let there = Caller::session(&other);
    let begun = Instant::now();
    for _ in 0..20 {
        there.map(memory.at(PAGE + 7, 1)).await.unwrap();
        there
            .unmap((PAGE + 7) * P, (PAGE + 8) * P - 1)
            .await
            .unwrap();
        let mapping = other.map(memory.entry(0, P, Bidirectional)).await.unwrap();
        other.unmap(&mapping, None).await.unwrap();
    }
    assert!(begun.elapsed() < SLACK, "{:?}", begun.elapsed());
    let same = there.map(memory.at(PAGE, 1)).await;
    refused(same, Code::FailedPrecondition, Reason::Invalidating);
    let held = node.usage("d0").await;
    assert_eq!((held.fenced_sessions, held.quarantined_mappings), (1, 1));

    children::signal(hung.pid(), Signal::CONT);
    assert_eq!(hung.must(&Say::Ended), json!("Fenced"));
    // It still has its pin.
    tokio::time::sleep(MOMENT).await;
    assert_eq!(node.usage("d0").await.quarantined_mappings, 1);
    hung.read(AT.0, 8).unwrap_err();
    hung.must(&Say::Unpin);
    let quarantined = async || node.usage("d0").await.quarantined_mappings;
    wait::until_equal("the late Ack", 0, quarantined).await;
    there.map(memory.at(PAGE, 1)).await.unwrap();
    assert!(hung.ask(&Say::Pin).is_err(), "its session has ended");
}

/// The other half: without a pin nobody waits for it at all.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_stopped_process_without_a_pin_delays_nobody() {
    // So long that a wait would be seen.
    let node = with_d0(&["--limits-ack-timeout-ms=600000"]).await;
    let mut driver = Raw::driver(&node, "d0").await;
    let memory = driver.memory(P).await;
    let caller = Caller::session(&driver);
    let ring = driver.alloc_len(P).await.unwrap();
    let (mut hung, session) = Accessor::device(&node, "d0");
    // It has pinned once.
    hung.read(ring.iova, 8).unwrap();
    children::stop(hung.pid());

    caller.map(memory.at(PAGE, 1)).await.unwrap();
    soon("UnmapDirect", caller.unmap(AT.0, AT.1)).await.unwrap();
    let free = driver.free(ring.iova, ring.mapping_id);
    soon("FreeCoherent", free).await.unwrap();
    driver.map(memory.entry(0, P, ToDevice)).await.unwrap();
    soon("ResetBounce", caller.reset(true)).await.unwrap();

    let usage = node.usage("d0").await;
    assert_eq!((usage.invalidating_mappings, usage.fenced_sessions), (0, 0));
    children::signal(hung.pid(), Signal::CONT);
    hung.read(ring.iova, 8).unwrap_err();
    assert!(
        node.sessions("d0")
            .await
            .iter()
            .any(|it| it.name == session)
    );
    hung.must(&Say::Detach);
}

/// Four sessions that acknowledge by their pages: they need not be asked.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn with_four_sessions_attached_a_removal_asks_none_that_holds_nothing() {
    let node = with_d0(&["--limits-ack-timeout-ms=600000"]).await;
    let mut driver = Raw::driver(&node, "d0").await;
    let memory = driver.memory(P).await;
    let mut others = Vec::new();
    for _ in 0..4 {
        others.push(Raw::device(&node, "d0").await);
    }
    let caller = Caller::session(&driver);

    for _ in 0..50 {
        caller.map(memory.at(PAGE, 1)).await.unwrap();
        soon("UnmapDirect", caller.unmap(AT.0, AT.1)).await.unwrap();
        let ring = driver.alloc_len(P).await.unwrap();
        let free = driver.free(ring.iova, ring.mapping_id);
        soon("FreeCoherent", free).await.unwrap();
        let mapping = driver.map(memory.entry(0, P, ToDevice)).await.unwrap();
        driver.unmap(&mapping, None).await.unwrap();
    }

    for other in &others {
        let heard = tokio::time::timeout(MOMENT, other.wire.receive()).await;
        assert!(heard.is_err(), "{heard:?}");
    }
    assert_eq!(node.usage("d0").await.invalidating_mappings, 0);
}

/// I-02, but for the time: who acknowledges by frames is told of each removal
/// once, is asked once, and not again when it has answered; who acknowledges by
/// its page and holds nothing hears nothing.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_removal_asks_each_session_by_frames_once_and_those_that_hold_nothing_not_at_all() {
    const ROUNDS: u64 = 15;
    let node = with_d0(&["--limits-ack-timeout-ms=600000"]).await;
    let mut driver = Raw::driver(&node, "d0").await;
    let memory = driver.memory(P).await;
    let mut silent = [
        Raw::device(&node, "d0").await,
        Raw::device(&node, "d0").await,
    ];
    let mut ackers = [
        Acker::device(&node, "d0").await,
        Acker::device(&node, "d0").await,
    ];
    // A process that has pinned, and holds nothing any more.
    let (mut accessor, session) = Accessor::device(&node, "d0");
    accessor.must(&Say::Pin);
    accessor.must(&Say::Unpin);
    let caller = Caller::session(&driver);
    for _ in 0..ROUNDS {
        caller.map(memory.at(PAGE, 1)).await.unwrap();
        once_for_each(&mut ackers, AT.0, caller.unmap(AT.0, AT.1)).await;
        let ring = driver.alloc_len(P).await.unwrap();
        let free = driver.free(ring.iova, ring.mapping_id);
        once_for_each(&mut ackers, ring.iova, free).await;
        let mapping = driver.map(memory.entry(0, P, ToDevice)).await.unwrap();
        let unmap = driver.unmap(&mapping, None);
        once_for_each(&mut ackers, mapping.iova, unmap).await;
    }
    // Behind what is asked now nothing has come, nor comes anything.
    for wire in silent.iter_mut().map(|raw| &mut raw.wire) {
        wire.settle().await;
        let heard = tokio::time::timeout(MOMENT, wire.receive()).await;
        assert!(heard.is_err(), "{heard:?}");
    }
    for acker in &mut ackers {
        acker.raw.wire.settle().await;
        assert!(acker.hears_nothing(MOMENT).await);
    }
    // Of the process the daemon knows that it was never asked.
    let sessions = node.sessions("d0").await;
    let it = sessions.iter().find(|it| it.name == session).unwrap();
    assert!(it.asked_generation <= it.acked_generation, "{it:?}");
    accessor.must(&Say::Detach);
}

/// Runs a removal: each session by frames hears once what is gone, and
/// acknowledges that once.
async fn once_for_each<T: Debug>(
    ackers: &mut [Acker],
    start: u64,
    removal: impl Future<Output = Refused<T>>,
) {
    let acknowledged = async {
        for acker in ackers {
            let asked = acker.change().await;
            assert!(asked.ack && tells_of(&asked, start), "{asked:?}");
            assert_eq!(asked.removed.len(), 1, "{asked:?}");
            acker.ack(asked.generation).await;
        }
    };
    let (removed, ()) = tokio::join!(soon("a removal", removal), acknowledged);
    removed.unwrap();
}

/// Who wants to know everything is told in order, also beside what it is asked.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn generations_do_not_go_back_whoever_removes_meanwhile() {
    const ROUNDS: usize = 150;
    let node = with_d0(&[]).await;
    let drivers = [
        Raw::driver(&node, "d0").await,
        Raw::driver(&node, "d0").await,
    ];
    let attach = v1::Attach {
        role: v1::Role::Device.into(),
        wants_removals: true,
        wants_additions: true,
        ..by_frames("d0")
    };
    let mut acker = Acker::attach(&node, attach).await;
    let cycles = async |driver: &Raw| {
        for _ in 0..ROUNDS {
            let ring = driver.alloc_len(P).await.unwrap();
            driver.free(ring.iova, ring.mapping_id).await.unwrap();
        }
    };
    let [one, other] = &drivers;
    let work = async { tokio::join!(cycles(one), cycles(other)) };
    let mut work = pin!(soon("all removals", work));
    let (mut newest, mut told) = (0, 0);
    loop {
        let change = tokio::select! {
            _ = &mut work => break,
            change = acker.change() => change,
        };
        assert!(change.generation >= newest, "{change:?} after {newest}");
        newest = change.generation;
        told += change.removed.len();
        if change.ack {
            acker.ack(newest).await;
        }
    }
    assert_eq!(told, drivers.len() * ROUNDS);
}

/// More than one frame can say.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn all_closed_memories_are_named_before_the_ack() {
    const MEMORIES: u64 = 600;
    let node = with_d0(&[]).await;
    let mut driver = Raw::driver(&node, "d0").await;
    let caller = Caller::session(&driver);
    let mut acker = Acker::device(&node, "d0").await;
    let mut regions = BTreeSet::new();
    for page in 0..MEMORIES {
        let memory = driver.memory(P).await;
        caller.map(memory.at(PAGE + page, 1)).await.unwrap();
        // The registered memories have the numbers behind the two apertures'.
        let region = u32::try_from(page + 2).unwrap();
        let open = AskBody::OpenMemory(v1::OpenMemory { region });
        acker.raw.wire.send(open, None).await.unwrap();
        let opened = acker.raw.wire.receive().await.unwrap();
        assert!(opened.fd.is_some(), "{opened:?}");
        regions.insert(region);
    }
    let clear = caller.clear(&[(0, u64::MAX)]);
    let acknowledged = async {
        let asked = acker.asked().await;
        acker.ack(asked.generation).await;
        asked
    };
    let (cleared, asked) = tokio::join!(soon("the removal", clear), acknowledged);
    assert_eq!(cleared.unwrap(), (MEMORIES, MEMORIES * P));
    assert_eq!(asked.closed.len(), regions.len());
    assert_eq!(BTreeSet::from_iter(asked.closed), regions);
    assert!(asked.everything, "more ranges than are remembered");
}

/// A domain that is deleted by force waits, too, and says for whom it did not.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_forced_delete_names_the_session_that_does_not_let_go() {
    let node = Node::with(&[QUICK]).await;
    let empty = node.info().await.region_bytes;
    node.domain("d0").await;
    let mut mute = Acker::device(&node, "d0").await;
    let session = mute.raw.name().to_owned();

    let deleted = node.delete("d0", true).await;

    let refusal = refused(deleted, Code::DeadlineExceeded, Reason::NotAcknowledged);
    assert_eq!(refusal.metadata["sessions"], session);
    refused(node.get("d0").await, Code::NotFound, Reason::NoSuchDomain);
    assert_eq!(mute.end().await, v1::EndReason::DomainDeleted);
    mute.detach().await;
    let bytes = async || node.info().await.region_bytes;
    wait::until_equal("the bytes of what was deleted", empty, bytes).await;
}

/// B-06, for a moment; the long one is `cargo run --release --bin storm`.
#[test]
fn a_short_storm_of_killed_processes_leaves_no_foreign_byte_and_no_range() {
    let mut storm = without_settings(Command::new(children::program("storm")));
    storm.args([
        "--no-build",
        "--json",
        "--poison",
        "--processes=4",
        "--devices=1",
    ]);
    storm.args(["--cycles", &domaind_tests::rounds(1_500).to_string()]);
    let output = storm.output().expect("it starts");
    let stderr = String::from_utf8_lossy(&output.stderr);
    let stdout = String::from_utf8_lossy(&output.stdout);
    let report: Value =
        serde_json::from_str(&stdout).unwrap_or_else(|_| panic!("{stdout}{stderr}"));
    assert!(output.status.success(), "{report}\n{stderr}");
    for zero in ["foreign_bytes", "leaked_ranges", "leaked_fds"] {
        assert_eq!(number(&report[zero]), 0, "{report}");
    }
    assert_eq!(report["audit"], "clean", "{report}");
    assert!(number(&report["checked_bytes"]) > 1 << 20, "{report}");
    assert_eq!(stdout.lines().count(), 1);
}
