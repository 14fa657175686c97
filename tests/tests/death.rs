//! Sessions that end, in order or not: all that they held is free again.

use domaind_tests::actor::{number, text};
use domaind_tests::children;
use domaind_tests::node::{Counts, scrubbed, spec};
use domaind_tests::users;
use domaind_tests::v1::Direction::{Bidirectional, FromDevice, ToDevice};
use domaind_tests::{Actor, Ask, Bytes, Code, Node, P, Raw, Reason, refused, v1, wait};
use rustix::process::Signal;
use serde_json::Value;

const SECRET: &str = "what only the dead knew";

/// Fills everything that a driver can hold with a secret.
fn hold_much(driver: &mut Actor, device: Option<&mut Actor>) {
    let mut last = None;
    for _ in 0..3 {
        let memory = driver.buffer(64 << 10);
        for page in 0..16 {
            driver.fill(memory, page * P, SECRET);
        }
        driver.map_many(memory, 0, 16 * P, ToDevice, 20);
        driver.map_many(memory, 3, 5_000, Bidirectional, 20);
        driver.map_many(memory, 0, 1, FromDevice, 20);
        let ring = driver.alloc(3 * P + 1, false);
        driver.write(ring.iova, SECRET);
        last = Some(ring);
    }
    if let (Some(device), Some(ring)) = (device, last) {
        device.assert_sees(ring.iova, SECRET);
    }
}

/// Everything is where it was: the counts of the daemon and of the domain.
async fn assert_released(node: &Node, counts: Counts, usage: v1::DomainUsage) {
    node.until_counts(counts).await;
    node.until_usage("d0", usage).await;
}

/// D15.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_killed_driver_leaves_no_mapping_memory_fd_or_byte_behind() {
    let node = Node::start().await;
    node.domain("d0").await;
    let witness = Raw::device(&node, "d0").await;
    let (counts, usage) = (node.counts().await, node.usage("d0").await);
    let mut driver = Actor::driver(&node, "d0");
    hold_much(&mut driver, None);
    let held = node.usage("d0").await;
    assert_eq!(
        (held.streaming_mappings, held.coherent_allocations),
        (180, 3)
    );
    assert_eq!((held.memories, held.sessions), (3, 2));
    assert!(node.counts().await.open_fds > counts.open_fds);

    driver.kill();

    assert_released(&node, counts, usage).await;
    for (start, bytes) in witness.view() {
        // In poison mode what was never used is not zero either.
        let left = bytes.iter().position(|byte| *byte != scrubbed());
        assert_eq!(left, None, "something is left above {start:#x}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn what_the_dead_left_is_never_shown_by_a_mapping() {
    let node = Node::start().await;
    node.create("d0", spec(4 << 20, 1 << 20)).await.unwrap();
    let (counts, usage) = (node.counts().await, node.usage("d0").await);
    let mut driver = Actor::driver(&node, "d0");
    let memory = driver.buffer(1 << 20);
    driver.fill(memory, 0, Bytes::same(0x5b, 1 << 20));
    driver.map_many(memory, 0, 1 << 20, ToDevice, 3);
    let ring = driver.alloc(1 << 20, false);
    driver.write(ring.iova, Bytes::same(0x5b, 1 << 20));
    driver.kill();
    assert_released(&node, counts, usage).await;

    let mut heir = Raw::driver(&node, "d0").await;
    let memory = heir.memory(2 << 20).await;
    let entry = memory.entry(0, (2 << 20) - 100, FromDevice);
    for _ in 0..4 {
        let mapping = heir.map(entry).await.unwrap();
        let seen = heir.read(mapping.iova, 2 << 20);
        assert!(seen.iter().all(|byte| *byte == 0));
        heir.unmap(&mapping, Some(0)).await.unwrap();
    }
    let ring = heir.alloc_len(1 << 20).await.unwrap();
    assert!(heir.read(ring.iova, 1 << 20).iter().all(|byte| *byte == 0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_killed_device_changes_nothing_for_the_others() {
    let node = Node::start().await;
    node.domain("d0").await;
    let mut driver = Actor::driver(&node, "d0");
    let mut survivor = Actor::device(&node, "d0");
    let memory = driver.buffer(P);
    driver.fill(memory, 0, "goes on");
    let place = driver.map(memory, 0, 7, Bidirectional);
    let (counts, usage) = (node.counts().await, node.usage("d0").await);
    let mut victim = Actor::device(&node, "d0");
    victim.write(place.iova, "GOES");

    victim.kill();

    assert_released(&node, counts, usage).await;
    survivor.assert_sees(place.iova, "GOES on");
    assert_eq!(driver.unmap(place, None), 7);
    driver.assert_holds(memory, 0, "GOES on");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn detaching_in_order_has_released_everything_when_it_returns() {
    let node = Node::start().await;
    node.domain("d0").await;
    let mut device = Actor::device(&node, "d0");
    let usage = node.usage("d0").await;
    let mut driver = Actor::driver(&node, "d0");
    hold_much(&mut driver, Some(&mut device));

    driver.must(&Ask::Detach);

    assert_eq!(node.usage("d0").await, usage, "not a moment later");
    driver.attach("d0", v1::Role::Driver);
    driver.buffer(P);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn closing_the_socket_without_a_word_ends_the_session() {
    let node = Node::start().await;
    node.domain("d0").await;
    let (counts, usage) = (node.counts().await, node.usage("d0").await);
    for _ in 0..20 {
        let mut driver = Raw::driver(&node, "d0").await;
        let memory = driver.memory(P).await;
        driver
            .map_all(vec![memory.entry(0, P, ToDevice); 50], false)
            .await
            .unwrap();
        driver.alloc_len(1).await.unwrap();
    }
    assert_released(&node, counts, usage).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_persistent_allocation_outlives_its_session_with_its_bytes() {
    let node = Node::start().await;
    node.domain("d0").await;
    let mut driver = Actor::driver(&node, "d0");
    let stays = driver.alloc(P, true);
    let goes = driver.alloc(P, false);
    driver.write(stays.iova, "for ever");
    driver.write(goes.iova, "not for long");

    driver.kill();

    let usage = v1::DomainUsage {
        coherent_allocations: 1,
        coherent_used_bytes: P,
        sessions: 0,
        memories: 0,
        // The rest, at whatever moment of its end the session is now.
        invalidating_mappings: 0,
        quarantined_mappings: 0,
        quarantined_bytes: 0,
        fenced_sessions: 0,
        ..node.usage("d0").await
    };
    node.until_usage(
        "d0",
        v1::DomainUsage {
            coherent_largest_hole_bytes: (4 << 20) - P,
            ..usage
        },
    )
    .await;
    let listed = node.mappings("d0").await;
    assert_eq!(listed.len(), 1);
    assert_eq!(
        (listed[0].iova, listed[0].mapping_id),
        (stays.iova, stays.id)
    );
    assert!(listed[0].persistent && listed[0].session.is_empty());
    let mut heir = Actor::driver(&node, "d0");
    heir.assert_sees(stays.iova, "for ever");
    heir.assert_sees(goes.iova, Bytes::same(scrubbed(), P));
    heir.must(&Ask::Free {
        iova: stays.iova,
        id: stays.id,
    });
    heir.assert_sees(stays.iova, Bytes::same(scrubbed(), P));
}

/// the connection lives on in a child, but the process that attached is
/// dead; so is its session.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_child_that_inherits_the_connection_does_not_inherit_the_session() {
    let node = Node::start().await;
    node.domain("d0").await;
    let (counts, usage) = (node.counts().await, node.usage("d0").await);
    let mut parent = Actor::start(&node);
    let inherited = parent.must(&Ask::Inherit {
        domain: "d0".into(),
    });
    let child = u32::try_from(number(&inherited["child"])).unwrap();
    let session = text(&inherited["session"]);
    assert_eq!(node.sessions("d0").await[0].name, session);

    parent.kill();

    // The child is alive, and with it the connection.
    assert!(children::is_alive(child));
    assert_released(&node, counts, usage).await;
    let spoke = parent.must(&Ask::SpeakInherited);
    assert_eq!(spoke["registered"], Value::Bool(false), "{spoke}");
    assert_eq!(spoke["reason"], "END_REASON_PEER_GONE", "{spoke}");
    // The secret went with it, too.
    let token = Some(text(&inherited["token"]));
    let verdicts = parent.must(&Ask::Knock {
        token,
        admin: false,
    });
    for verdict in verdicts.as_array().unwrap() {
        let reason = verdict["reason"].as_str().unwrap();
        let refused = ["ERROR_REASON_NO_SUCH_SESSION", "ERROR_REASON_WRONG_PEER"];
        assert!(refused.contains(&reason), "{verdict}");
    }
    drop(parent);
    children::wait_until_gone(child);
}

/// While the parent lives its child cannot act for the session by the token.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_child_is_another_process_even_with_its_parents_token() {
    let node = Node::start().await;
    node.domain("d0").await;
    let mut parent = Actor::start(&node);
    let inherited = parent.must(&Ask::Inherit {
        domain: "d0".into(),
    });
    let token = Some(text(&inherited["token"]));
    // The parent obeys no more: this is the child's answer.
    let verdicts = parent.must(&Ask::Knock {
        token,
        admin: false,
    });
    for verdict in verdicts.as_array().unwrap() {
        assert_eq!(verdict["reason"], "ERROR_REASON_WRONG_PEER", "{verdict}");
    }
    parent.kill();
    let child = u32::try_from(number(&inherited["child"])).unwrap();
    drop(parent);
    children::wait_until_gone(child);
}

/// D15, B-06: killed in the middle of whatever it is doing.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn drivers_killed_in_the_middle_of_a_storm_leave_nothing() {
    let node = Node::start().await;
    node.domain("d0").await;
    let witness = Raw::device(&node, "d0").await;
    let (counts, usage) = (node.counts().await, node.usage("d0").await);
    for round in 0_u64..12 {
        let mut stormers = [Actor::driver(&node, "d0"), Actor::driver(&node, "d0")];
        for (stormer, colour) in stormers.iter_mut().zip([0x11, 0x22]) {
            let seed = round * 1_000 + u64::from(colour);
            stormer.begin(&Ask::Storm {
                colour,
                seed,
                max_len: 40_000,
            });
        }
        // A moment that is different each time: so many changes later.
        let begun = node.get("d0").await.unwrap().generation;
        let enough = begun + 1 + (round * 37) % 150;
        let until = std::time::Instant::now() + wait::DEADLINE;
        while node.get("d0").await.unwrap().generation < enough {
            assert!(std::time::Instant::now() < until, "no storm");
        }
        stormers.iter_mut().for_each(Actor::kill);
        assert_released(&node, counts, usage).await;
    }
    // Each held something at each moment; what they unmapped in order before
    // may lie about in the bounce aperture (scrub on map), coherent memory not.
    let (start, coherent) = witness.view().pop().unwrap();
    assert_eq!(
        Some(start),
        node.get("d0")
            .await
            .unwrap()
            .coherent
            .map(|range| range.start)
    );
    assert!(coherent.iter().all(|byte| *byte == scrubbed()));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn an_evicted_client_is_told_and_keeps_what_it_has_mapped() {
    let node = Node::start().await;
    node.domain("d0").await;
    let (counts, usage) = (node.counts().await, node.usage("d0").await);
    let mut driver = Actor::start(&node);
    let session = driver.attach("d0", v1::Role::Driver);
    hold_much(&mut driver, None);
    let ring = driver.alloc(P, true);
    driver.write(ring.iova, "still readable");

    node.evict(&session).await.unwrap();

    assert_eq!(driver.end_reason(), "Evicted");
    driver.assert_sees(ring.iova, "still readable");
    let said = driver.fails(&Ask::Buffer { len: P });
    assert!(said.contains("evicted"), "{said}");
    let mut other = Actor::driver(&node, "d0");
    other.must(&Ask::Free {
        iova: ring.iova,
        id: ring.id,
    });
    drop(other);
    node.until_counts_but_fds(counts).await;
    node.until_usage("d0", usage).await;
    refused(
        node.evict(&session).await,
        Code::NotFound,
        Reason::NoSuchSession,
    );
    // It may come again.
    driver.attach("d0", v1::Role::Driver);
    drop(driver);
    assert_released(&node, counts, usage).await;
}

/// D12, case 67: forced, all are told.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_forced_delete_ends_the_sessions_and_leaves_clients_their_pages() {
    let node = Node::start().await;
    let empty = node.counts().await;
    let first = node.domain("d0").await;
    let mut driver = Actor::driver(&node, "d0");
    let mut device = Actor::device(&node, "d0");
    hold_much(&mut driver, Some(&mut device));
    let ring = driver.alloc(P, false);
    driver.write(ring.iova, "what was mapped");

    assert_eq!(node.delete("d0", true).await.unwrap().ended_sessions, 2);

    for actor in [&mut driver, &mut device] {
        assert_eq!(actor.end_reason(), "DomainDeleted");
    }
    // Readable, writable, and shared by those who have it.
    device.write(ring.iova + 100, "and written");
    driver.assert_sees(ring.iova + 100, "and written");
    refused(node.get("d0").await, Code::NotFound, Reason::NoSuchDomain);
    node.until_counts_but_fds(empty).await;

    // The next of that name has nothing of the first.
    let second = node.domain("d0").await;
    assert_ne!(first.uid, second.uid);
    let mut heir = Actor::device(&node, "d0");
    let byte = scrubbed();
    assert_eq!(heir.must(&Ask::FirstOther { byte }), Value::Null);
    heir.write(ring.iova, "another file");
    driver.assert_sees(ring.iova + 100, "and written");
    drop((driver, device, heir));
    node.delete("d0", true).await.unwrap();
    node.until_counts(empty).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_stopped_client_harms_nobody_and_can_be_evicted() {
    let node = Node::start().await;
    node.domain("d0").await;
    let (counts, usage) = (node.counts().await, node.usage("d0").await);
    let mut hung = Actor::start(&node);
    let session = hung.attach("d0", v1::Role::Driver);
    let memory = hung.buffer(P);
    hung.map(memory, 0, P, ToDevice);
    children::stop(hung.pid());

    let mut driver = Actor::driver(&node, "d0");
    let memory = driver.buffer(P);
    let place = driver.map(memory, 0, P, ToDevice);
    driver.unmap(place, None);
    drop(driver);
    node.evict(&session).await.unwrap();
    node.until_counts_but_fds(counts).await;
    // It is stopped, not gone: what it could reach nobody else is given. The driver is gone, once that is found.
    let fenced = || async {
        let held = node.usage("d0").await;
        (held.fenced_sessions, held.quarantined_mappings)
    };
    wait::until_equal("what is held back", (1, 1), fenced).await;
    let held = node.usage("d0").await;
    assert_eq!(held.bounce_used_bytes, usage.bounce_used_bytes + P);

    children::signal(hung.pid(), Signal::CONT);
    assert_eq!(hung.end_reason(), "Evicted");
    node.until_usage("d0", usage).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn sessions_of_another_user_die_as_cleanly() {
    let shared = users::is_root();
    let node = if shared {
        Node::shared(&[]).await
    } else {
        Node::start().await
    };
    let mut actor = match shared {
        true => Actor::start_as(&node, users::ALICE),
        false => Actor::start(&node),
    };
    actor.create("d0");
    drop(actor);
    let (counts, usage) = (node.counts().await, node.usage("d0").await);
    for _ in 0..3 {
        let mut actor = match shared {
            true => Actor::start_as(&node, users::ALICE),
            false => Actor::start(&node),
        };
        actor.attach("d0", v1::Role::Driver);
        let memory = actor.buffer(P);
        actor.map_many(memory, 0, P, ToDevice, 30);
        actor.kill();
        node.until_usage("d0", usage).await;
    }
    node.until_counts_but_fds(counts).await;
}
