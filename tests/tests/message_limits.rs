//! P-02: one below each limit of a message, the limit, and one above. The
//! lists of reserved and allowed ranges are in `placement.rs`.

use domaind_tests::bytes;
use domaind_tests::direct::{Table, bare, range};
use domaind_tests::node::spec;
use domaind_tests::raw::{Memory, Wire, unmap_entry};
use domaind_tests::refusal::{answer, assert_numbers};
use domaind_tests::v1::Direction::Bidirectional;
use domaind_tests::v1::{self, ListMappingsRequest, map_result::Outcome};
use domaind_tests::wait::until_equal;
use domaind_tests::{Caller, Code, Node, P, Raw, Reason, Refused, files, node, refused};
use prost::Message;

/// Entries of a batch.
const ENTRIES: usize = 1_024;
/// Bytes of a request.
const REQUEST: usize = 256 << 10;

struct Bench {
    node: Node,
    driver: Raw,
    memory: Memory,
    caller: Caller,
}

impl Bench {
    async fn new() -> Bench {
        let node = Node::start().await;
        node.create("d0", spec(16 << 20, 4 << 20)).await.unwrap();
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
}

/// Above the limit of a batch.
#[track_caller]
fn too_many<T: std::fmt::Debug>(answer: Refused<T>, entries: usize) {
    let refusal = refused(answer, Code::InvalidArgument, Reason::Malformed);
    let entries = entries.to_string();
    assert_numbers(&refusal, &[("entries", &entries), ("most", "1024")]);
}

// ---- Entries

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn message_limits_of_streaming_batches() {
    let bench = Bench::new().await;
    let driver = &bench.driver;
    let entry = bench.memory.entry(0, 1, Bidirectional);
    for entries in [ENTRIES - 1, ENTRIES, ENTRIES + 1] {
        for partial in [false, true] {
            let mapped = driver.map_all(vec![entry; entries], partial).await;
            let mapped = match entries <= ENTRIES {
                true => mapped.unwrap().results,
                false => {
                    too_many(mapped, entries);
                    // Too many to sync or unmap are refused whatever they are.
                    let nothing = v1::SyncEntry::default();
                    too_many(
                        driver.sync_all(vec![nothing; entries], partial).await,
                        entries,
                    );
                    let nothing = v1::UnmapEntry::default();
                    too_many(
                        driver.unmap_all(vec![nothing; entries], partial).await,
                        entries,
                    );
                    continue;
                }
            };
            let mappings = mapped.into_iter().map(|result| match result.outcome {
                Some(Outcome::Mapping(mapping)) => mapping,
                other => panic!("{other:?}"),
            });
            let mappings: Vec<_> = mappings.collect();
            let parts = mappings.iter().map(|mapping| v1::SyncEntry {
                iova: mapping.iova,
                mapping_id: mapping.mapping_id,
                offset: 0,
                len_bytes: 1,
                target: v1::SyncTarget::ForCpu.into(),
            });
            let synced = driver.sync_all(parts.collect(), partial).await.unwrap();
            assert_eq!(synced.results.len(), entries);
            let unmaps = mappings.iter().map(|mapping| unmap_entry(mapping, None));
            let unmapped = driver.unmap_all(unmaps.collect(), partial).await.unwrap();
            assert_eq!(unmapped.results.len(), entries);
        }
    }
    assert_eq!(bench.node.mappings("d0").await, []);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn message_limits_of_direct_batches() {
    let bench = Bench::new().await;
    let base = 1 << 20;
    for entries in [ENTRIES - 1, ENTRIES, ENTRIES + 1] {
        let batch: Vec<_> = (base..)
            .take(entries)
            .map(|page| bench.memory.at(2 * page, 1))
            .collect();
        let ranges: Vec<_> = (base..)
            .take(entries)
            .map(|page| (2 * page * P, 2 * page * P + P - 1))
            .collect();
        for partial in [false, true] {
            let mapped = bench.caller.map_all(batch.clone(), partial).await;
            if entries > ENTRIES {
                too_many(mapped, entries);
                too_many(bench.caller.unmap_all(&ranges).await, entries);
                too_many(bench.caller.clear(&ranges).await, entries);
                continue;
            }
            assert_eq!(mapped.unwrap().results.len(), entries);
            let counts = Ok((entries as u64, entries as u64 * P));
            if partial {
                assert_eq!(bench.caller.unmap_all(&ranges).await, counts);
            } else {
                assert_eq!(bench.caller.clear(&ranges).await, counts);
            }
        }
    }
    // None at all.
    let none = bench.caller.map_all(vec![], false).await;
    refused(none, Code::InvalidArgument, Reason::Malformed);
    assert_eq!(bench.node.mappings("d0").await, []);
}

/// A table in one request has at most 16384 entries, however short they are.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn message_limits_of_set_map() {
    const MOST: usize = 16_384;
    let bench = Bench::new().await;
    bench
        .caller
        .set_map(vec![bench.memory.row(1 << 20, 1)])
        .await
        .unwrap();
    let before = Table::of(&bench.node, "d0").await;
    for entries in [MOST - 1, MOST, MOST + 1] {
        // None of them has a range: nothing else is short enough to fit.
        let table = vec![v1::DirectMapping::default(); entries];
        let refusal = refused(
            bench.caller.set_map(table).await,
            Code::InvalidArgument,
            Reason::Malformed,
        );
        if entries > MOST {
            assert_numbers(&refusal, &[("entries", "16385"), ("most", "16384")]);
        } else {
            assert_eq!(refusal.metadata["entry_index"], "0", "{refusal:?}");
        }
        assert_eq!(Table::of(&bench.node, "d0").await, before);
    }
}

/// SetMap has as many entries as fit; what does not fit is for StreamSetMap.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_table_in_one_request_may_have_more_entries_than_a_batch() {
    let bench = Bench::new().await;
    let table: Vec<_> = (0..4_000)
        .map(|k| bench.memory.row((1 << 20) + 2 * k, 1))
        .collect();
    assert_eq!(bench.caller.set_map(table).await.unwrap().added, 4_000);
}

// ---- Ids

/// 64 bytes, not characters.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn message_limits_of_request_ids() {
    let bench = Bench::new().await;
    // Behind two digits that differ from call to call.
    let ids = [
        ("a".repeat(61), true),
        ("b".repeat(62), true),
        ("ä".repeat(31), true),
        ("c".repeat(63), false),
        ("ö".repeat(31) + "d", false),
        ("e".repeat(10_000), false),
    ];
    for (tail, good) in ids {
        let bytes = (tail.len() + 2).to_string();
        let mut prepared = Prepared::new(&bench).await;
        let before = Table::of(&bench.node, "d0").await;
        for (k, call) in CALLS.iter().enumerate() {
            let answer = prepared.call(&bench, call, format!("{k:02}{tail}")).await;
            if good {
                answer.unwrap_or_else(|refusal| panic!("{call}: {refusal:?}"));
                continue;
            }
            let refusal = answer.expect_err(call);
            assert!(refusal.message.len() < 1_000, "{call} repeats a long id");
            let said = (refusal.grpc_code(), refusal.reason());
            assert_eq!(said, (Code::InvalidArgument, Reason::RequestId), "{call}");
            assert_numbers(&refusal, &[("bytes", &bytes), ("most", "64")]);
            assert_eq!(Table::of(&bench.node, "d0").await, before, "{call}");
        }
        prepared.clean(&bench).await;
    }
}

/// In an order in which each of them can be done.
const CALLS: [&str; 15] = [
    "CreateDomain",
    "UpdateDomain",
    "DeleteDomain",
    "EvictSession",
    "Sync",
    "Unmap",
    "Map",
    "FreeCoherent",
    "AllocCoherent",
    "MapDirect",
    "UnmapDirect",
    "SetMap",
    "StreamSetMap",
    "ClearMap",
    "ResetBounce",
];

/// What the calls need to find.
struct Prepared {
    victim: Option<Raw>,
    mapping: v1::StreamingMapping,
    ring: v1::AllocCoherentResponse,
}

impl Prepared {
    async fn new(bench: &Bench) -> Prepared {
        let entry = bench.memory.entry(0, 1, Bidirectional);
        Prepared {
            victim: Some(Raw::device(&bench.node, "d0").await),
            mapping: bench.driver.map(entry).await.unwrap(),
            ring: bench.driver.alloc_len(1).await.unwrap(),
        }
    }

    /// Takes back what is there, whether the calls were done or not.
    async fn clean(self, bench: &Bench) {
        bench.caller.clear(&[(0, u64::MAX)]).await.unwrap();
        bench.caller.reset(true).await.unwrap();
        for ring in bench.node.mappings("d0").await {
            bench.driver.free(ring.iova, ring.mapping_id).await.unwrap();
        }
    }

    /// A call that can be done, under this id.
    async fn call(&mut self, bench: &Bench, call: &str, request_id: String) -> Refused<()> {
        let (driver, caller, memory) = (&bench.driver, &bench.caller, &bench.memory);
        let mut calls = driver.calls.clone();
        let mut domains = bench.node.admin().domains();
        let name = node::name("d1");
        match call {
            "CreateDomain" => {
                let request = v1::CreateDomainRequest {
                    domain_id: "d1".into(),
                    spec: Some(spec(0, 0)),
                    request_id,
                    ..Default::default()
                };
                answer(domains.create_domain(request).await).map(drop)
            }
            "UpdateDomain" => {
                let request = v1::UpdateDomainRequest {
                    name,
                    request_id,
                    ..Default::default()
                };
                bench.node.update(request).await.map(drop)
            }
            "DeleteDomain" => {
                let request = v1::DeleteDomainRequest {
                    name,
                    request_id,
                    ..Default::default()
                };
                answer(domains.delete_domain(request).await).map(drop)
            }
            "EvictSession" => {
                let request = v1::EvictSessionRequest {
                    name: self.victim.as_ref().expect("once").name().to_owned(),
                    request_id,
                };
                let mut sessions = bench.node.admin().sessions();
                answer(sessions.evict_session(request).await)?;
                // Nothing waits for who is gone.
                drop(self.victim.take());
                let fenced = async || bench.node.usage("d0").await.fenced_sessions;
                until_equal("nobody", 0, fenced).await;
                Ok(())
            }
            "Sync" => {
                let part = v1::SyncEntry {
                    iova: self.mapping.iova,
                    mapping_id: self.mapping.mapping_id,
                    offset: 0,
                    len_bytes: 1,
                    target: v1::SyncTarget::ForCpu.into(),
                };
                let request = driver.signed(v1::SyncRequest {
                    entries: vec![part],
                    request_id,
                    ..Default::default()
                });
                answer(calls.sync(request).await).map(drop)
            }
            "Unmap" => {
                let request = driver.signed(v1::UnmapRequest {
                    entries: vec![unmap_entry(&self.mapping, None)],
                    request_id,
                    ..Default::default()
                });
                answer(calls.unmap(request).await).map(drop)
            }
            "Map" => {
                let request = driver.signed(v1::MapRequest {
                    entries: vec![memory.entry(0, 1, Bidirectional)],
                    request_id,
                    ..Default::default()
                });
                answer(calls.map(request).await).map(drop)
            }
            "FreeCoherent" => {
                let request = driver.signed(v1::FreeCoherentRequest {
                    iova: self.ring.iova,
                    mapping_id: self.ring.mapping_id,
                    request_id,
                });
                answer(calls.free_coherent(request).await).map(drop)
            }
            "AllocCoherent" => {
                let request = v1::AllocCoherentRequest {
                    len_bytes: 1,
                    request_id,
                    ..Default::default()
                };
                driver.alloc(request).await.map(drop)
            }
            "MapDirect" => {
                let request = caller.signed(v1::MapDirectRequest {
                    entries: vec![memory.at(1 << 20, 1)],
                    request_id,
                    ..Default::default()
                });
                answer(calls.map_direct(request).await).map(drop)
            }
            "UnmapDirect" => {
                let request = caller.signed(v1::UnmapDirectRequest {
                    ranges: vec![range(0, u64::MAX)],
                    request_id,
                    ..Default::default()
                });
                answer(calls.unmap_direct(request).await).map(drop)
            }
            "SetMap" => {
                let request = caller.signed(v1::SetMapRequest {
                    entries: vec![memory.row(1 << 20, 1)],
                    request_id,
                    ..Default::default()
                });
                answer(calls.set_map(request).await).map(drop)
            }
            "StreamSetMap" => {
                let header = v1::SetMapHeader {
                    request_id,
                    ..Default::default()
                };
                let whole = v1::StreamSetMapRequest {
                    header: Some(header),
                    entries: vec![memory.row(2 << 20, 1)],
                    commit: true,
                };
                caller.stream([whole]).await.map(drop)
            }
            "ClearMap" => {
                let request = caller.signed(v1::ClearMapRequest {
                    ranges: vec![range(0, u64::MAX)],
                    request_id,
                    ..Default::default()
                });
                answer(calls.clear_map(request).await).map(drop)
            }
            "ResetBounce" => {
                let request = caller.signed(v1::ResetBounceRequest {
                    force: true,
                    request_id,
                    ..Default::default()
                });
                answer(calls.reset_bounce(request).await).map(drop)
            }
            other => panic!("{other} is no call"),
        }
    }
}

// ---- Bytes

/// Every call takes 256 KiB, and not one byte more.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn message_limits_of_bytes() {
    let bench = Bench::new().await;
    let channel = bench.node.admin().channel();
    let token = bench.driver.token();
    let calls = [
        "DomainService/CreateDomain",
        "DomainService/GetDomain",
        "DomainService/ListDomains",
        "DomainService/UpdateDomain",
        "DomainService/DeleteDomain",
        "SessionService/ListSessions",
        "SessionService/GetSession",
        "SessionService/EvictSession",
        "SessionService/ListMemories",
        "MappingService/Map",
        "MappingService/Unmap",
        "MappingService/Sync",
        "MappingService/AllocCoherent",
        "MappingService/FreeCoherent",
        "MappingService/MapDirect",
        "MappingService/UnmapDirect",
        "MappingService/SetMap",
        "MappingService/ClearMap",
        "MappingService/Translate",
        "MappingService/Lookup",
        "MappingService/ListMappings",
        "AdminService/GetInfo",
    ];
    for call in calls {
        let token = call.starts_with("Mapping").then_some(token.as_str());
        let plain = bytes::call(channel.clone(), call, vec![], token).await;
        for len in [REQUEST - 1, REQUEST, REQUEST + 1, 4 * REQUEST] {
            let padded = padded(len);
            let answer = bytes::call(channel.clone(), call, padded, token).await;
            let refusal = match &answer {
                Ok(_) => v1::Refusal::default(),
                Err(refusal) => refusal.clone(),
            };
            if len <= REQUEST {
                // Whatever is unknown in it, it says the same.
                let plain = plain.clone().map(drop);
                assert_eq!(answer.map(drop), plain, "{call} {len}");
            } else {
                let codes = [Code::OutOfRange, Code::ResourceExhausted];
                assert!(
                    codes.contains(&refusal.grpc_code()),
                    "{call} {len}: {answer:?}"
                );
                assert_eq!(refusal.reason(), Reason::Unspecified, "{call} {len}");
            }
        }
    }
}

/// A message of exactly so many bytes, of a field that nobody knows.
fn padded(len: usize) -> Vec<u8> {
    let mut message = Vec::new();
    bytes::put_message(&mut message, 1_000, &vec![0; len]);
    let overhead = message.len() - len;
    message.clear();
    bytes::put_message(&mut message, 1_000, &vec![0; len - overhead]);
    assert_eq!(message.len(), len);
    message
}

/// A chunk of StreamSetMap as well; the table as a whole may be larger.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn message_limits_of_bytes_in_a_stream() {
    let bench = Bench::new().await;
    let row = |k: u64| bench.memory.row((1 << 20) + 2 * k, 1);
    let one = v1::StreamSetMapRequest {
        entries: vec![row(0)],
        ..Default::default()
    };
    let per_entry = one.encoded_len();
    let fits = REQUEST / per_entry;
    let table: Vec<_> = (0..3 * fits as u64).map(row).collect();
    let fine = bench
        .caller
        .stream(bench.caller.chunked(&table, fits))
        .await;
    assert_eq!(fine.unwrap().added, 3 * fits as u64);
    let before = Table::of(&bench.node, "d0").await;
    let large = bench
        .caller
        .stream(bench.caller.chunked(&table, fits + fits / 8))
        .await;
    let codes = [Code::OutOfRange, Code::ResourceExhausted];
    let refusal = large.unwrap_err();
    assert!(codes.contains(&refusal.grpc_code()), "{refusal:?}");
    assert_eq!(Table::of(&bench.node, "d0").await, before);
}

// ---- Pages

/// How many a page holds: what was asked, the default, and the most.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn message_limits_of_pages_of_mappings() {
    let bench = Bench::new().await;
    let table: Vec<_> = (0..10_001)
        .map(|k| bench.memory.row((1 << 20) + k, 1))
        .collect();
    let messages = bench.caller.chunked(&table, 4_000);
    bench.caller.stream(messages).await.unwrap();
    for (page_size, holds) in [
        (0, 1_000),
        (1, 1),
        (999, 999),
        (9_999, 9_999),
        (10_000, 10_000),
        (10_001, 10_000),
        (u32::MAX, 10_000),
    ] {
        let request = ListMappingsRequest {
            page_size,
            ..Default::default()
        };
        let page = bench.caller.list(request.clone()).await.unwrap();
        assert_eq!(page.mappings.len(), holds, "{page_size}");
        assert!(!page.next_page_token.is_empty());
        let rest = ListMappingsRequest {
            page_token: page.next_page_token,
            ..request
        };
        let next = bench.caller.list(rest).await.unwrap();
        assert_eq!(next.mappings[0].iova, ((1 << 20) + holds as u64) * P);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn message_limits_of_pages_of_domains_and_sessions() {
    let node = Node::start().await;
    for k in 0..1_001 {
        node.create(&format!("d{k}"), spec(0, 0)).await.unwrap();
    }
    let pages = [
        (0, 100),
        (1, 1),
        (999, 999),
        (1_000, 1_000),
        (1_001, 1_000),
        (u32::MAX, 1_000),
    ];
    for (page_size, holds) in pages {
        let request = v1::ListDomainsRequest {
            page_size,
            ..Default::default()
        };
        let mut domains = node.admin().domains();
        let page = domains.list_domains(request).await.unwrap().into_inner();
        assert_eq!(page.domains.len(), holds, "{page_size}");
        assert!(!page.next_page_token.is_empty());
    }
    let mut wires = Vec::new();
    for _ in 0..101 {
        let mut wire = Wire::connect(&node.runtime_dir().fd_socket());
        wire.hello().await;
        let (role, access) = (v1::Role::Device, v1::Access::ReadWrite);
        wire.attach("domains/d0", role, access).await.unwrap();
        wires.push(wire);
    }
    for (page_size, holds) in [(0, 100), (1, 1), (101, 101), (u32::MAX, 101)] {
        let request = v1::ListSessionsRequest {
            page_size,
            ..Default::default()
        };
        let mut sessions = node.admin().sessions();
        let page = sessions.list_sessions(request).await.unwrap().into_inner();
        assert_eq!(page.sessions.len(), holds, "{page_size}");
        assert_eq!(page.next_page_token.is_empty(), holds == 101);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn message_limits_of_pages_of_memories() {
    let node = Node::start().await;
    let roomy = v1::DomainSpec {
        quotas: Some(v1::Quotas {
            memories: 2_000,
            ..Default::default()
        }),
        ..bare()
    };
    node.create("d0", roomy).await.unwrap();
    let mut driver = Raw::driver(&node, "d0").await;
    let fd = files::good_memfd(P);
    for count in 0..1_001 {
        match driver.register(&fd, false).await {
            Ok(_) => {}
            // Each costs the daemon a descriptor, and it may have only 1024.
            Err(refusal) => {
                assert_eq!(refusal.grpc_code(), Code::ResourceExhausted, "{refusal:?}");
                println!("only {count} memories: the rest is not tried");
                return;
            }
        }
    }
    let pages = [
        (0, 100),
        (1, 1),
        (999, 999),
        (1_000, 1_000),
        (1_001, 1_000),
        (u32::MAX, 1_000),
    ];
    for (page_size, holds) in pages {
        let request = v1::ListMemoriesRequest {
            domain: node::name("d0"),
            page_size,
            ..Default::default()
        };
        let mut sessions = node.admin().sessions();
        let page = sessions.list_memories(request).await.unwrap().into_inner();
        assert_eq!(page.memories.len(), holds, "{page_size}");
        assert!(!page.next_page_token.is_empty());
    }
}
