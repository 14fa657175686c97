//! P-04: what is repeated with the same `request_id` is done once.

use std::future::Future;

use domaind_tests::direct::{Messages, Table, bare, range, stream};
use domaind_tests::node::spec;
use domaind_tests::raw::Memory;
use domaind_tests::refusal::answer;
use domaind_tests::v1::Direction::{Bidirectional, ToDevice};
use domaind_tests::v1::{self, Perm};
use domaind_tests::{Caller, Code, Node, P, Raw, Reason, Refused, files, node, refused};

struct Bench {
    node: Node,
    driver: Raw,
    memory: Memory,
    caller: Caller,
}

impl Bench {
    async fn new() -> Bench {
        let node = Node::start().await;
        node.create("d0", spec(64 * P, 64 * P)).await.unwrap();
        let mut driver = Raw::driver(&node, "d0").await;
        let memory = driver.memory(64 * P).await;
        let caller = Caller::session(&driver);
        Bench {
            node,
            driver,
            memory,
            caller,
        }
    }

    /// Everything that could have changed.
    async fn state(&self) -> (Table, v1::Domain, Vec<u8>) {
        let bytes = files::peek(&self.memory.fd, 0, 64 * 4_096);
        let domain = self.node.get("d0").await.unwrap();
        (Table::of(&self.node, "d0").await, domain, bytes)
    }

    /// The call is done, once: the second answer is that of the first, and
    /// changes nothing. Asked otherwise under the same id it is refused.
    async fn once<T, F, G>(&self, what: &str, same: impl Fn() -> F, other: impl Fn() -> G) -> T
    where
        T: PartialEq + std::fmt::Debug,
        F: Future<Output = Refused<T>>,
        G: Future<Output = Refused<T>>,
    {
        let before = self.state().await;
        let first = same().await.unwrap_or_else(|r| panic!("{what}: {r:?}"));
        let after = self.state().await;
        assert!(before != after, "{what} has no effect");
        for _ in 0..3 {
            let again = same()
                .await
                .unwrap_or_else(|r| panic!("{what} again: {r:?}"));
            assert_eq!(again, first, "{what} again");
            assert!(self.state().await == after, "{what} was done twice");
        }
        refused_id(what, other().await);
        assert!(self.state().await == after, "{what}: other content");
        assert_eq!(same().await, Ok(first), "{what}: still remembered");
        same().await.unwrap()
    }
}

#[track_caller]
fn refused_id<T: std::fmt::Debug>(what: &str, answer: Refused<T>) {
    match answer {
        Err(refusal) => assert_eq!(
            (refusal.grpc_code(), refusal.reason()),
            (Code::InvalidArgument, Reason::RequestId),
            "{what}: {refusal:?}"
        ),
        Ok(value) => panic!("{what}: {value:?}"),
    }
}

/// P-04 for every call of `MappingService` that changes something.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn idempotent_retry() {
    let bench = Bench::new().await;
    let (driver, caller, memory) = (&bench.driver, &bench.caller, &bench.memory);
    let (node, id) = (&bench.node, |text: &str| text.to_owned());

    // Map: the same iovas, not others.
    let map = |len_bytes| {
        let request = v1::MapRequest {
            entries: vec![memory.entry(0, len_bytes, Bidirectional); 2],
            request_id: id("map"),
            ..Default::default()
        };
        let request = driver.signed(request);
        async move { answer(driver.calls.clone().map(request).await) }
    };
    let mapped = bench.once("Map", || map(100), || map(101)).await;
    let mappings: Vec<_> = mapped
        .results
        .into_iter()
        .map(|result| match result.outcome {
            Some(v1::map_result::Outcome::Mapping(mapping)) => mapping,
            other => panic!("{other:?}"),
        })
        .collect();

    // Sync copies once: what the device has written since stays where it is.
    driver.write(mappings[0].iova, b"first");
    let sync = |len_bytes| {
        let entry = v1::SyncEntry {
            iova: mappings[0].iova,
            mapping_id: mappings[0].mapping_id,
            offset: 0,
            len_bytes,
            target: v1::SyncTarget::ForCpu.into(),
        };
        let request = v1::SyncRequest {
            entries: vec![entry],
            request_id: id("sync"),
            ..Default::default()
        };
        let request = driver.signed(request);
        async move { answer(driver.calls.clone().sync(request).await) }
    };
    bench.once("Sync", || sync(5), || sync(4)).await;
    driver.write(mappings[0].iova, b"later");
    sync(5).await.unwrap();
    assert_eq!(files::peek(&memory.fd, 0, 5), b"first");

    // Unmap: not NOT_FOUND, the second time.
    let unmap = |written| {
        let request = v1::UnmapRequest {
            entries: vec![domaind_tests::raw::unmap_entry(&mappings[1], Some(written))],
            request_id: id("unmap"),
            ..Default::default()
        };
        let request = driver.signed(request);
        async move { answer(driver.calls.clone().unmap(request).await) }
    };
    driver.write(mappings[1].iova, b"UNMAPPED");
    let unmapped = bench.once("Unmap", || unmap(8), || unmap(7)).await;
    assert_eq!(unmapped.results[0].copied_bytes, 8);

    let alloc = |len_bytes| {
        let request = v1::AllocCoherentRequest {
            len_bytes,
            request_id: id("alloc"),
            ..Default::default()
        };
        driver.alloc(request)
    };
    let ring = bench.once("AllocCoherent", || alloc(9), || alloc(10)).await;
    let free = |mapping_id| {
        let request = v1::FreeCoherentRequest {
            iova: ring.iova,
            mapping_id,
            request_id: id("free"),
        };
        let request = driver.signed(request);
        async move { answer(driver.calls.clone().free_coherent(request).await) }
    };
    let name = ring.mapping_id;
    bench
        .once("FreeCoherent", || free(name), || free(name + 1))
        .await;

    let lease = |len_bytes| {
        let request = v1::LeaseRequest {
            len_bytes,
            request_id: id("lease"),
            ..Default::default()
        };
        let request = driver.signed(request);
        async move { answer(driver.calls.clone().lease(request).await) }
    };
    let leased = bench.once("Lease", || lease(P), || lease(2 * P)).await;
    let release = |mapping_id| {
        let request = v1::ReleaseRequest {
            iova: leased.iova,
            mapping_id,
            request_id: id("release"),
        };
        let request = driver.signed(request);
        async move { answer(driver.calls.clone().release(request).await) }
    };
    let name = leased.mapping_id;
    bench
        .once("Release", || release(name), || release(name + 1))
        .await;

    let map_direct = |pages, iova_page: Option<u64>| {
        let entry = v1::MapDirectEntry {
            iova: iova_page.map(|page| page * P),
            ..memory.anywhere(pages)
        };
        let request = v1::MapDirectRequest {
            entries: vec![entry],
            request_id: id("map direct"),
            ..Default::default()
        };
        let request = caller.signed(request);
        async move { answer(caller.calls().map_direct(request).await) }
    };
    bench
        .once(
            "MapDirect",
            || map_direct(2, None),
            || map_direct(2, Some(200)),
        )
        .await;

    let set_map = |page| {
        let request = v1::SetMapRequest {
            entries: vec![memory.row(page, 1), memory.row(600, 1)],
            request_id: id("set map"),
            ..Default::default()
        };
        let request = caller.signed(request);
        async move { answer(caller.calls().set_map(request).await) }
    };
    let set = bench.once("SetMap", || set_map(500), || set_map(501)).await;
    assert_eq!(
        (set.added, set.removed),
        (2, 1),
        "not (0, 0), the second time"
    );

    let stream_map = |page, chunk| {
        let header = v1::SetMapHeader {
            request_id: id("stream set map"),
            ..Default::default()
        };
        let table = [memory.row(page, 1), memory.row(710, 1)];
        let mut messages = caller.chunked(&table, chunk);
        messages[0].header = Some(header);
        async move { caller.stream(messages).await }
    };
    let set = bench
        .once("StreamSetMap", || stream_map(700, 1), || stream_map(701, 1))
        .await;
    assert_eq!((set.added, set.removed), (2, 2));

    let unmap_direct = |last| {
        let request = v1::UnmapDirectRequest {
            ranges: vec![range(700 * P, last)],
            request_id: id("unmap direct"),
            ..Default::default()
        };
        let request = caller.signed(request);
        async move { answer(caller.calls().unmap_direct(request).await) }
    };
    bench
        .once(
            "UnmapDirect",
            || unmap_direct(701 * P - 1),
            || unmap_direct(702 * P),
        )
        .await;

    let clear = |at| {
        let request = v1::ClearMapRequest {
            ranges: vec![range(at, at)],
            request_id: id("clear"),
            ..Default::default()
        };
        let request = caller.signed(request);
        async move { answer(caller.calls().clear_map(request).await) }
    };
    let cleared = bench.once("ClearMap", || clear(710 * P), || clear(0)).await;
    assert_eq!(cleared.removed_mappings, 1);

    let reset = |force| {
        let request = v1::ResetBounceRequest {
            force,
            request_id: id("reset"),
            ..Default::default()
        };
        let request = caller.signed(request);
        async move { answer(caller.calls().reset_bounce(request).await) }
    };
    let ended = bench
        .once("ResetBounce", || reset(true), || reset(false))
        .await;
    assert_eq!(ended.ended_mappings, 1);
    // A mapping made since is not ended by the repeated reset.
    let mapping = driver.map(memory.entry(0, 9, ToDevice)).await.unwrap();
    assert_eq!(reset(true).await, Ok(ended));
    driver.unmap(&mapping, None).await.unwrap();
    assert_eq!(node.usage("d0").await.streaming_mappings, 0);
}

/// P-04 for domains and sessions, whose caller is a user.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn idempotent_retry_of_domains_and_sessions() {
    let node = Node::start().await;
    let mut domains = node.admin().domains();
    let mut sessions = node.admin().sessions();
    let create = |domain_id: &str, bounce| v1::CreateDomainRequest {
        domain_id: domain_id.to_owned(),
        spec: Some(spec(bounce, 0)),
        request_id: "create".into(),
        ..Default::default()
    };
    let first = answer(domains.create_domain(create("d0", 16 * P)).await).unwrap();
    let counts = node.counts().await;
    let again = answer(domains.create_domain(create("d0", 16 * P)).await).unwrap();
    assert_eq!((again.uid, again.name), (first.uid, first.name));
    assert_eq!(node.counts().await, counts);
    for other in [create("d0", 17 * P), create("d1", 16 * P)] {
        refused_id("CreateDomain", answer(domains.create_domain(other).await));
    }
    assert_eq!(node.counts().await, counts);

    let update = |memories| v1::UpdateDomainRequest {
        name: node::name("d0"),
        quotas: Some(v1::Quotas {
            memories,
            ..Default::default()
        }),
        request_id: "update".into(),
        ..Default::default()
    };
    let updated = node.update(update(5)).await.unwrap();
    // Changed by somebody else meanwhile, and not changed back.
    let other = v1::UpdateDomainRequest {
        request_id: String::new(),
        ..update(6)
    };
    node.update(other).await.unwrap();
    let again = node.update(update(5)).await.unwrap();
    assert_eq!(again.quotas, updated.quotas, "the answer of the first time");
    let now = node.get("d0").await.unwrap();
    assert_eq!(now.quotas.unwrap().memories, 6, "and no effect");
    refused_id("UpdateDomain", node.update(update(7)).await);

    let one = Raw::device(&node, "d0").await;
    let two = Raw::device(&node, "d0").await;
    let evict = |name: &str| v1::EvictSessionRequest {
        name: name.to_owned(),
        request_id: "evict".into(),
    };
    for _ in 0..3 {
        answer(sessions.evict_session(evict(one.name())).await).unwrap();
    }
    refused_id(
        "EvictSession",
        answer(sessions.evict_session(evict(two.name())).await),
    );
    let sessions = node.sessions("d0").await;
    let attached = |session: &&v1::Session| session.state() == v1::SessionState::Attached;
    assert_eq!(sessions.iter().filter(attached).count(), 1);

    let delete = |force| v1::DeleteDomainRequest {
        name: node::name("d0"),
        force,
        request_id: "delete".into(),
        ..Default::default()
    };
    // It is done, although nobody listens who is attached there.
    let refusal = answer(domains.delete_domain(delete(true)).await).unwrap_err();
    assert_eq!(refusal.reason(), Reason::NotAcknowledged);
    let deleted = v1::DeleteDomainResponse { ended_sessions: 1 };
    // One of the same name, made since, is not the one that was meant.
    let second = node.create("d0", spec(0, 0)).await.unwrap();
    for _ in 0..3 {
        let again = answer(domains.delete_domain(delete(true)).await);
        assert_eq!(again, Ok(deleted));
    }
    refused_id(
        "DeleteDomain",
        answer(domains.delete_domain(delete(false)).await),
    );
    assert_eq!(node.get("d0").await.unwrap().uid, second.uid);
}

/// An id is that of a call: under the id of one no other is done.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn an_id_of_one_call_is_refused_for_another() {
    let bench = Bench::new().await;
    let ring = v1::AllocCoherentRequest {
        len_bytes: 1,
        request_id: "one".into(),
        ..Default::default()
    };
    let ring = bench.driver.alloc(ring).await.unwrap();
    let before = bench.state().await;
    let free = v1::FreeCoherentRequest {
        iova: ring.iova,
        mapping_id: ring.mapping_id,
        request_id: "one".into(),
    };
    let free = bench.driver.signed(free);
    refused_id(
        "FreeCoherent",
        answer(bench.driver.calls.clone().free_coherent(free).await),
    );
    let clear = v1::ClearMapRequest {
        ranges: vec![range(0, u64::MAX)],
        request_id: "one".into(),
        ..Default::default()
    };
    let clear = bench.caller.signed(clear);
    refused_id(
        "ClearMap",
        answer(bench.caller.calls().clear_map(clear).await),
    );
    assert!(bench.state().await == before);
}

/// What was refused has changed nothing, and is not remembered: the same call
/// is done when it can be.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_refused_call_is_not_remembered() {
    let bench = Bench::new().await;
    let caller = &bench.caller;
    let request = |page| v1::MapDirectRequest {
        entries: vec![bench.memory.at(page, 1)],
        request_id: "again".into(),
        ..Default::default()
    };
    let map = |page| {
        let request = caller.signed(request(page));
        async move { answer(caller.calls().map_direct(request).await) }
    };
    caller.map(bench.memory.at(200, 1)).await.unwrap();
    for _ in 0..2 {
        refused(map(200).await, Code::AlreadyExists, Reason::Overlap);
    }
    caller.unmap(200 * P, 201 * P - 1).await.unwrap();
    map(200).await.unwrap();
    // Nor does a refused one keep its id from another call.
    let alloc = |len_bytes| v1::AllocCoherentRequest {
        len_bytes,
        request_id: "too large".into(),
        ..Default::default()
    };
    refused(
        bench.driver.alloc(alloc(1 << 30)).await,
        Code::ResourceExhausted,
        Reason::NoSpace,
    );
    bench.driver.alloc(alloc(1)).await.unwrap();
    // An answer that refuses a part is one.
    let partial = v1::MapDirectRequest {
        entries: vec![bench.memory.at(300, 1), bench.memory.at(200, 1)],
        partial: true,
        request_id: "partial".into(),
        ..Default::default()
    };
    let call = || {
        let request = caller.signed(partial.clone());
        async move { answer(caller.calls().map_direct(request).await) }
    };
    let first = call().await.unwrap();
    caller.unmap(200 * P, 201 * P - 1).await.unwrap();
    assert_eq!(call().await, Ok(first));
    assert_eq!(Table::of(&bench.node, "d0").await.mappings.len(), 1);
}

/// Whoever calls has ids of its own.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn ids_of_two_callers_do_not_meet() {
    let bench = Bench::new().await;
    let other = Raw::driver(&bench.node, "d0").await;
    let alloc = |len_bytes| v1::AllocCoherentRequest {
        len_bytes,
        request_id: "the same".into(),
        ..Default::default()
    };
    let one = bench.driver.alloc(alloc(1)).await.unwrap();
    let two = other.alloc(alloc(2)).await.unwrap();
    assert_ne!(one.iova, two.iova);
    assert_eq!(bench.driver.alloc(alloc(1)).await, Ok(one));
    assert_eq!(other.alloc(alloc(2)).await, Ok(two));
    // The owner is a third one.
    let owner = Caller::owner(&bench.node, "d0").await;
    let request = v1::ClearMapRequest {
        domain: node::name("d0"),
        ranges: vec![range(0, u64::MAX)],
        request_id: "the same".into(),
    };
    answer(owner.calls().clear_map(owner.signed(request)).await).unwrap();
    // The next session of the same process begins with none.
    let mappings = bench.node.mappings("d0").await;
    let ids: Vec<_> = mappings.iter().map(|mapping| mapping.mapping_id).collect();
    drop(other);
    let next = Raw::driver(&bench.node, "d0").await;
    let three = next.alloc(alloc(3)).await.unwrap();
    assert!(!ids.contains(&three.mapping_id));
}

/// A retry that overtakes: two calls with one id at the same time.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_call_that_races_with_its_own_retry_has_one_effect() {
    // So much to copy that the retry comes while the first call is under way.
    const LEN: u64 = 12 << 20;
    let node = Node::start().await;
    node.create("d0", spec(64 << 20, 0)).await.unwrap();
    let mut driver = Raw::driver(&node, "d0").await;
    let memory = driver.memory(LEN).await;
    let caller = Caller::session(&driver);
    let bench = Bench {
        node,
        driver,
        memory,
        caller,
    };
    let second = bench.node.client().await;
    for round in 0..10 {
        let request = v1::MapRequest {
            entries: vec![bench.memory.entry(0, LEN, Bidirectional)],
            request_id: format!("race {round}"),
            ..Default::default()
        };
        let race: Vec<_> = (0..4)
            .map(|k| {
                let request = bench.driver.signed(request.clone());
                let mut calls = match k % 2 {
                    0 => bench.driver.calls.clone(),
                    _ => second.mappings(),
                };
                tokio::spawn(async move { answer(calls.map(request).await) })
            })
            .collect();
        let mut answers = Vec::new();
        for runner in race {
            answers.push(runner.await.unwrap().unwrap());
        }
        assert!(
            answers.windows(2).all(|pair| pair[0] == pair[1]),
            "{answers:?}"
        );
        let mappings = bench.node.mappings("d0").await;
        assert_eq!(mappings.len(), 1, "{round}");
        let entry = v1::UnmapEntry {
            iova: mappings[0].iova,
            mapping_id: mappings[0].mapping_id,
            ..Default::default()
        };
        let unmap = v1::UnmapRequest {
            entries: vec![entry],
            request_id: format!("unmap {round}"),
            ..Default::default()
        };
        let race: Vec<_> = (0..4)
            .map(|_| {
                let request = bench.driver.signed(unmap.clone());
                let mut calls = bench.driver.calls.clone();
                tokio::spawn(async move { answer(calls.unmap(request).await) })
            })
            .collect();
        for runner in race {
            let answer = runner.await.unwrap().expect("once, and four answers");
            assert_eq!(answer.results[0].copied_bytes, LEN);
        }
    }
}

/// A client that stopped waiting asks again, and learns what has become of it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cancelled_call_is_repeated_safely() {
    let bench = Bench::new().await;
    for round in 0..60_u64 {
        let request = v1::AllocCoherentRequest {
            len_bytes: 1,
            request_id: format!("cancelled {round}"),
            ..Default::default()
        };
        let call = bench.driver.alloc(request.clone());
        // At some moment between the request and its answer.
        let moment = std::time::Duration::from_micros(round * 29);
        let _ = tokio::time::timeout(moment, call).await;
        let ring = bench.driver.alloc(request).await.unwrap();
        let usage = bench.node.usage("d0").await;
        assert_eq!(usage.coherent_allocations, 1, "{round}");
        bench.driver.free(ring.iova, ring.mapping_id).await.unwrap();
    }
}

/// The last 128 answers are kept, and no more: it must not grow.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn the_last_128_answers_are_kept() {
    let bench = Bench::new().await;
    let node = &bench.node;
    node.create("d1", bare()).await.unwrap();
    let driver = {
        let mut driver = Raw::driver(node, "d1").await;
        let memory = driver.memory(P).await;
        (driver, memory)
    };
    let caller = Caller::session(&driver.0);
    let map = |k: u64| {
        let request = v1::MapDirectRequest {
            entries: vec![driver.1.anywhere(1)],
            request_id: format!("number {k}"),
            ..Default::default()
        };
        let request = caller.signed(request);
        let caller = &caller;
        async move { answer(caller.calls().map_direct(request).await) }
    };
    let first = map(0).await.unwrap();
    for k in 1..128 {
        map(k).await.unwrap();
        // Calls without an id, and refused ones, push nothing out.
        caller.clear(&[(1 << 40, 1 << 40)]).await.unwrap();
        caller.map(driver.1.at(0, 2)).await.unwrap_err();
    }
    assert_eq!(map(0).await, Ok(first.clone()), "128 are kept");
    assert_eq!(node.usage("d1").await.direct_mappings, 128);
    for k in 128..400 {
        map(k).await.unwrap();
    }
    assert_eq!(node.usage("d1").await.direct_mappings, 400);
    assert_ne!(
        map(0).await.unwrap(),
        first,
        "long forgotten, and done anew"
    );
    assert_eq!(node.usage("d1").await.direct_mappings, 401);
    for k in 300..400 {
        map(k).await.unwrap();
    }
    assert_eq!(node.usage("d1").await.direct_mappings, 401);
}

/// Empty means none: nothing is remembered.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn without_an_id_every_call_is_a_new_one() {
    let bench = Bench::new().await;
    let one = bench.caller.map(bench.memory.anywhere(1)).await.unwrap();
    let two = bench.caller.map(bench.memory.anywhere(1)).await.unwrap();
    assert_ne!(one, two);
    assert_eq!(one.perm(), Perm::ReadWrite);
}

/// A stream that is repeated is compared as a whole, not by its header.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_repeated_stream_must_bring_the_same_table() {
    let bench = Bench::new().await;
    let caller = &bench.caller;
    let header = v1::StreamSetMapRequest {
        header: Some(v1::SetMapHeader {
            request_id: "table".into(),
            ..Default::default()
        }),
        ..Default::default()
    };
    let send = |pages: &[u64], commit: bool| {
        let (sender, messages): (_, Messages<_>) = stream();
        sender.send(header.clone()).unwrap();
        for page in pages {
            let entries = vec![bench.memory.row(*page, 1)];
            let chunk = v1::StreamSetMapRequest {
                entries,
                ..Default::default()
            };
            sender.send(chunk).unwrap();
        }
        let last = v1::StreamSetMapRequest {
            commit: true,
            ..Default::default()
        };
        if commit {
            sender.send(last).unwrap();
        }
        caller.stream_from(messages)
    };
    // Without a commit it was none.
    let cut = send(&[200, 201], false).await;
    refused(cut, Code::InvalidArgument, Reason::Malformed);
    let first = send(&[200, 201], true).await.unwrap();
    assert_eq!(first.added, 2);
    assert_eq!(send(&[200, 201], true).await, Ok(first));
    refused_id("another row", send(&[200, 202], true).await);
    refused_id("a row less", send(&[200], true).await);
    refused_id("a row more", send(&[200, 201, 202], true).await);
    assert_eq!(Table::of(&bench.node, "d0").await.mappings.len(), 2);
}
