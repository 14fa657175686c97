//! P-01: the edges of the space, for every call that takes a range, an address
//! or a length: exact codes and reasons.

use std::sync::Mutex;

use domaind_tests::direct::{EVERYTHING, Table, bare, range};
use domaind_tests::node::spec;
use domaind_tests::raw::Memory;
use domaind_tests::v1::Direction::Bidirectional;
use domaind_tests::v1::{self, DirectMapping, ListMappingsRequest, MapDirectEntry, Perm};
use domaind_tests::{Caller, Code, Node, P, Raw, Reason, Refused, node};

/// Nothing above it.
const MAX: u64 = u64::MAX;
/// First byte of the last page.
const LAST_PAGE: u64 = MAX - (P - 1);
/// Half the space, in bytes.
const HALF: u64 = 1 << 63;

/// What a call must say; `None`: it is done.
type Says = Option<(Code, Reason)>;

const DONE: Says = None;
const BACKWARDS: Says = Some((Code::InvalidArgument, Reason::InvalidRange));
const MISALIGNED: Says = Some((Code::InvalidArgument, Reason::Misaligned));
const ZERO: Says = Some((Code::InvalidArgument, Reason::ZeroLength));
const OUTSIDE: Says = Some((Code::InvalidArgument, Reason::OutsideMemory));
const OUTSIDE_MAPPING: Says = Some((Code::InvalidArgument, Reason::OutsideMapping));
const OVERFLOW: Says = Some((Code::OutOfRange, Reason::AddressOverflow));
const PAST: Says = Some((Code::OutOfRange, Reason::PastIovaLimit));
const HOLE: Says = Some((Code::NotFound, Reason::NotMapped));
const NO_MAPPING: Says = Some((Code::NotFound, Reason::NoSuchMapping));

struct Bench {
    node: Node,
    driver: Raw,
    memory: Memory,
    caller: Caller,
    wrong: Mutex<Vec<String>>,
}

/// A table is looked at whole before the test fails.
impl Drop for Bench {
    fn drop(&mut self) {
        let wrong = self.wrong.get_mut().expect("no panic while it was locked");
        assert!(std::thread::panicking() || wrong.is_empty(), "{wrong:#?}");
    }
}

impl Bench {
    async fn with(spec: v1::DomainSpec, memory: u64) -> Bench {
        let node = Node::start().await;
        node.create("d0", spec).await.unwrap();
        let mut driver = Raw::driver(&node, "d0").await;
        let memory = driver.memory(memory).await;
        let caller = Caller::session(&driver);
        Bench {
            node,
            driver,
            memory,
            caller,
            wrong: Mutex::default(),
        }
    }

    /// What was said is what must be; refused, nothing has changed, and what
    /// was done is undone.
    async fn check<T: std::fmt::Debug>(&self, what: &str, answer: Refused<T>, says: Says) {
        let said = match &answer {
            Ok(_) => None,
            Err(refusal) => Some((refusal.grpc_code(), refusal.reason())),
        };
        if said != says {
            let text = format!("{what}: {answer:?}, not {says:?}");
            self.wrong.lock().unwrap().push(text);
        }
        if answer.is_ok() {
            self.caller.clear(&[EVERYTHING]).await.unwrap();
        }
        let left = Table::of(&self.node, "d0").await.mappings;
        assert_eq!(left, [], "{what} leaves something");
    }

    fn entry(&self, iova: u64, len_bytes: u64) -> MapDirectEntry {
        MapDirectEntry {
            len_bytes,
            iova: Some(iova),
            ..self.memory.anywhere(1)
        }
    }

    fn row(&self, start: u64, last: u64) -> DirectMapping {
        DirectMapping {
            range: Some(range(start, last)),
            ..self.memory.row(0, 1)
        }
    }
}

/// Every call that takes a range from start to last, on an empty table of the
/// whole space.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn range_edges() {
    let bench = Bench::with(bare(), 64 * P).await;
    let caller = &bench.caller;
    // unmap, clear, translate, lookup, list; SetMap and StreamSetMap.
    let looks = [HOLE, DONE, HOLE, HOLE, DONE];
    let none = [BACKWARDS; 5];
    let whole = [DONE, DONE, HOLE, HOLE, DONE];
    let table: [((u64, u64), [Says; 5], Says); 24] = [
        ((0, 0), looks, MISALIGNED),
        ((0, P - 1), looks, DONE),
        ((0, P), looks, MISALIGNED),
        ((0, MAX), whole, OVERFLOW),
        ((0, MAX - 1), looks, MISALIGNED),
        ((1, MAX), looks, MISALIGNED),
        ((1, P), looks, MISALIGNED),
        ((1, 0), none, BACKWARDS),
        ((P, P - 1), none, BACKWARDS),
        ((MAX, 0), none, BACKWARDS),
        ((MAX, MAX - 1), none, BACKWARDS),
        ((MAX, MAX), looks, MISALIGNED),
        ((LAST_PAGE, MAX), looks, DONE),
        ((LAST_PAGE, MAX - 1), looks, MISALIGNED),
        ((LAST_PAGE - 1, MAX), looks, MISALIGNED),
        ((LAST_PAGE - P, MAX), looks, DONE),
        ((LAST_PAGE - 63 * P, MAX), looks, DONE),
        ((LAST_PAGE - 64 * P, MAX), looks, OUTSIDE),
        ((0, 64 * P - 1), looks, DONE),
        ((0, 65 * P - 1), looks, OUTSIDE),
        ((0, HALF - 1), looks, OVERFLOW),
        ((P, HALF + P - 1), looks, OVERFLOW),
        ((P, HALF - 1), looks, OUTSIDE),
        ((HALF, MAX), looks, OVERFLOW),
    ];
    for ((start, last), [unmap, clear, translate, lookup, list], set_map) in table {
        let at = format!("[{start:#x}, {last:#x}]");
        let what = |call: &str| format!("{call} {at}");
        let answer = caller.unmap(start, last).await;
        bench.check(&what("UnmapDirect"), answer, unmap).await;
        let answer = caller.clear(&[(start, last)]).await;
        bench.check(&what("ClearMap"), answer, clear).await;
        for perm in [Perm::Read, Perm::Write, Perm::ReadWrite] {
            let answer = caller.translate(start, last, perm).await;
            bench.check(&what("Translate"), answer, translate).await;
        }
        let answer = caller.lookup(start, last).await;
        bench.check(&what("Lookup"), answer, lookup).await;
        let request = ListMappingsRequest {
            range: Some(range(start, last)),
            ..Default::default()
        };
        let answer = caller.list(request).await;
        bench.check(&what("ListMappings"), answer, list).await;
        let row = bench.row(start, last);
        let answer = caller.set_map(vec![row]).await;
        bench.check(&what("SetMap"), answer, set_map).await;
        let answer = caller.stream(caller.chunked(&[row], 1)).await;
        bench.check(&what("StreamSetMap"), answer, set_map).await;
    }
}

/// A range that is not there.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_missing_range_is_malformed_except_in_a_filter() {
    let bench = Bench::with(bare(), P).await;
    let caller = &bench.caller;
    let malformed = Some((Code::InvalidArgument, Reason::Malformed));
    let translate = v1::TranslateRequest {
        want: Perm::Read.into(),
        ..Default::default()
    };
    let translate = caller.signed(translate);
    let answer = caller.calls().translate(translate).await;
    let answer = domaind_tests::refusal::answer(answer);
    bench.check("Translate", answer, malformed).await;
    let lookup = caller.signed(v1::LookupRequest::default());
    let answer = caller.calls().lookup(lookup).await;
    let answer = domaind_tests::refusal::answer(answer);
    bench.check("Lookup", answer, malformed).await;
    let row = DirectMapping {
        range: None,
        ..bench.row(0, P - 1)
    };
    let answer = caller.set_map(vec![row]).await;
    bench.check("SetMap", answer, malformed).await;
    let answer = caller.list(Default::default()).await;
    bench.check("ListMappings", answer, DONE).await;
}

/// Addresses and lengths of MapDirect.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn range_edges_of_map_direct() {
    let bench = Bench::with(bare(), 64 * P).await;
    let table: [(u64, u64, Says); 19] = [
        (0, 0, ZERO),
        (P, 0, ZERO),
        (LAST_PAGE, 0, ZERO),
        (0, P, DONE),
        (0, 64 * P, DONE),
        (0, 65 * P, OUTSIDE),
        (0, 1, MISALIGNED),
        (0, P + 1, MISALIGNED),
        (1, P, MISALIGNED),
        (P - 1, P, MISALIGNED),
        (MAX, P, MISALIGNED),
        (LAST_PAGE, P, DONE),
        (LAST_PAGE, 2 * P, OVERFLOW),
        (LAST_PAGE - P, 2 * P, DONE),
        (LAST_PAGE - P, 3 * P, OVERFLOW),
        (0, HALF, OVERFLOW),
        (0, HALF - P, OUTSIDE),
        (P, LAST_PAGE, OVERFLOW),
        (HALF, HALF, OVERFLOW),
    ];
    for (iova, len_bytes, says) in table {
        let what = format!("{iova:#x} + {len_bytes:#x}");
        let answer = bench.caller.map(bench.entry(iova, len_bytes)).await;
        bench.check(&what, answer, says).await;
    }
    let offsets: [(u64, u64, Says); 10] = [
        (0, P, DONE),
        (63 * P, P, DONE),
        (63 * P, 2 * P, OUTSIDE),
        (64 * P, P, OUTSIDE),
        (1, P, MISALIGNED),
        (MAX, P, MISALIGNED),
        (HALF, P, OUTSIDE),
        (LAST_PAGE - P, P, OUTSIDE),
        (LAST_PAGE, 2 * P, OVERFLOW),
        (MAX - 63 * P + 1, 64 * P, OVERFLOW),
    ];
    for (offset, len_bytes, says) in offsets {
        let what = format!("from {offset:#x} + {len_bytes:#x}");
        let entry = MapDirectEntry {
            offset,
            ..bench.entry(P, len_bytes)
        };
        let answer = bench.caller.map(entry).await;
        bench.check(&what, answer, says).await;
        // Where the address is chosen, too.
        let entry = MapDirectEntry {
            iova: None,
            ..entry
        };
        let answer = bench.caller.map(entry).await;
        bench.check(&what, answer, says).await;
        let last = P.wrapping_add(len_bytes) - 1;
        let row = DirectMapping {
            offset,
            ..bench.row(P, last)
        };
        let answer = bench.caller.set_map(vec![row]).await;
        bench.check(&what, answer, says).await;
    }
}

/// A limit that is not a multiple of the granule less one.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn range_edges_below_a_limit_that_cuts_a_page() {
    const TOP: u64 = 1 << 40;
    let limit = TOP + P - 2;
    let limited = v1::DomainSpec {
        iova_limit: Some(limit),
        ..spec(16 * P, 16 * P)
    };
    let bench = Bench::with(limited, 64 * P).await;
    let caller = &bench.caller;
    let overlap = Some((Code::AlreadyExists, Reason::Overlap));
    let table: [(u64, u64, Says); 9] = [
        (TOP - P, P, DONE),
        (TOP - 64 * P, 64 * P, DONE),
        (TOP, P, PAST),
        (TOP - P, 2 * P, PAST),
        (TOP + P, P, PAST),
        (LAST_PAGE, P, PAST),
        (31 * P, P, overlap),
        (0, P, overlap),
        (32 * P, P, DONE),
    ];
    for (iova, len_bytes, says) in table {
        let what = format!("{iova:#x} + {len_bytes:#x}");
        let answer = caller.map(bench.entry(iova, len_bytes)).await;
        bench.check(&what, answer, says).await;
        let row = bench.row(iova, iova + (len_bytes - 1));
        let answer = caller.set_map(vec![row]).await;
        bench.check(&what, answer, says).await;
    }
    let ranges: [((u64, u64), Says, Says); 8] = [
        ((0, limit), DONE, HOLE),
        ((0, limit - 1), HOLE, HOLE),
        ((0, MAX), DONE, HOLE),
        ((1, MAX), HOLE, HOLE),
        ((limit, limit), HOLE, HOLE),
        ((limit + 1, limit + 1), HOLE, HOLE),
        ((limit + 1, MAX), HOLE, HOLE),
        ((MAX, MAX), HOLE, HOLE),
    ];
    for ((start, last), unmap, look) in ranges {
        let what = format!("[{start:#x}, {last:#x}]");
        bench
            .check(&what, caller.unmap(start, last).await, unmap)
            .await;
        let answer = caller.translate(start, last, Perm::Read).await;
        bench.check(&what, answer, look).await;
        bench
            .check(&what, caller.lookup(start, last).await, look)
            .await;
        let answer = caller.clear(&[(start, last)]).await;
        bench.check(&what, answer, DONE).await;
    }
}

/// Granules of 2 MiB.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn range_edges_of_huge_granules() {
    const G: u64 = 2 << 20;
    let coarse = v1::DomainSpec {
        granule_bytes: G,
        ..bare()
    };
    let bench = Bench::with(coarse, 4 * G).await;
    let caller = &bench.caller;
    let table: [(u64, u64, u64, Says); 13] = [
        (0, 0, G, DONE),
        (G, 0, 4 * G, DONE),
        (MAX - G + 1, 0, G, DONE),
        (MAX - G + 1, 0, 2 * G, OVERFLOW),
        (G, 3 * G, G, DONE),
        (G, 3 * G, 2 * G, OUTSIDE),
        (G, 0, 5 * G, OUTSIDE),
        (P, 0, G, MISALIGNED),
        (G + G / 2, 0, G, MISALIGNED),
        (LAST_PAGE, 0, G, MISALIGNED),
        (G, P, G, MISALIGNED),
        (G, 0, P, MISALIGNED),
        (G, 0, 3 * G / 2, MISALIGNED),
    ];
    for (iova, offset, len_bytes, says) in table {
        let what = format!("{iova:#x} + {len_bytes:#x} from {offset:#x}");
        let entry = MapDirectEntry {
            offset,
            ..bench.entry(iova, len_bytes)
        };
        let answer = caller.map(entry).await;
        bench.check(&what, answer, says).await;
        let Some(last) = iova.checked_add(len_bytes - 1) else {
            continue;
        };
        let row = DirectMapping {
            offset,
            ..bench.row(iova, last)
        };
        let answer = caller.set_map(vec![row]).await;
        bench.check(&what, answer, says).await;
    }
    let at = caller.map(MapDirectEntry {
        len_bytes: G,
        ..bench.memory.anywhere(1)
    });
    let at = domaind_tests::direct::ends(at.await.unwrap().range);
    assert_eq!((at.0 % G, at.1 % G), (0, G - 1));
    assert!(at.0 >= G, "the first granule is kept back");
}

/// What is bounced and what is coherent: offsets and lengths.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn range_edges_of_streaming_and_coherent() {
    let bench = Bench::with(spec(64 * P, 16 * P), 32 * P).await;
    let driver = &bench.driver;
    let size = 32 * P;
    let maps: [(u64, u64, Says); 11] = [
        (0, 0, ZERO),
        (size, 0, ZERO),
        (MAX, 0, ZERO),
        (0, 1, DONE),
        (size - 1, 1, DONE),
        (0, size, DONE),
        (size, 1, OUTSIDE),
        (0, size + 1, OUTSIDE),
        (0, MAX, OUTSIDE),
        (1, MAX, OVERFLOW),
        (MAX, 1, OVERFLOW),
    ];
    for (offset, len, says) in maps {
        let what = format!("Map {offset:#x} + {len:#x}");
        let answer = driver
            .map(bench.memory.entry(offset, len, Bidirectional))
            .await;
        if let Ok(mapping) = &answer {
            driver.unmap(mapping, None).await.unwrap();
        }
        bench.check(&what, answer, says).await;
    }
    let mapping = driver
        .map(bench.memory.entry(5, 100, Bidirectional))
        .await
        .unwrap();
    let syncs: [(u64, u64, Says); 9] = [
        (0, 0, ZERO),
        (100, 0, ZERO),
        (0, 1, DONE),
        (0, 100, DONE),
        (99, 1, DONE),
        (100, 1, OUTSIDE_MAPPING),
        (0, 101, OUTSIDE_MAPPING),
        (0, MAX, OUTSIDE_MAPPING),
        (MAX, 1, OVERFLOW),
    ];
    for (offset, len, says) in syncs {
        let what = format!("Sync {offset:#x} + {len:#x}");
        for target in [v1::SyncTarget::ForCpu, v1::SyncTarget::ForDevice] {
            let answer = driver.sync(&mapping, offset, len, target).await;
            bench.check(&what, answer, says).await;
        }
    }
    for iova in [0, 1, mapping.iova + 1, mapping.iova + 99, 64 * P, MAX] {
        let wrong = v1::StreamingMapping { iova, ..mapping };
        let what = format!("{iova:#x}");
        let answer = driver.unmap(&wrong, None).await;
        bench.check(&what, answer, NO_MAPPING).await;
        let answer = driver.sync(&wrong, 0, 1, v1::SyncTarget::ForCpu).await;
        bench.check(&what, answer, NO_MAPPING).await;
        let answer = driver.free(iova, mapping.mapping_id).await;
        bench.check(&what, answer, NO_MAPPING).await;
    }
    driver.unmap(&mapping, None).await.unwrap();
    let no_space = Some((Code::ResourceExhausted, Reason::NoSpace));
    for (len, says) in [
        (0, ZERO),
        (1, DONE),
        (16 * P, DONE),
        (16 * P + 1, no_space),
        (1 << 40, no_space),
    ] {
        let answer = driver.alloc_len(len).await;
        if let Ok(ring) = &answer {
            driver.free(ring.iova, ring.mapping_id).await.unwrap();
        }
        bench
            .check(&format!("AllocCoherent {len:#x}"), answer, says)
            .await;
    }
}

/// Reserved and allowed ranges to the byte.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn range_edges_of_restrictions() {
    let bench = Bench::with(bare(), P).await;
    let overlapping = Some((Code::InvalidArgument, Reason::OverlappingEntries));
    // As reserved, as allowed.
    type Row = (&'static [(u64, u64)], Says, Says);
    let table: [Row; 9] = [
        (&[(0, MAX)], DONE, DONE),
        (&[(0, 0)], DONE, BACKWARDS),
        (&[(MAX, MAX)], DONE, BACKWARDS),
        (&[(0, 1)], DONE, DONE),
        (&[(MAX - 1, MAX)], DONE, DONE),
        (&[(1, 0)], BACKWARDS, BACKWARDS),
        (&[(MAX, 0)], BACKWARDS, BACKWARDS),
        (&[(0, HALF), (HALF, MAX)], overlapping, overlapping),
        (&[(HALF, MAX), (0, HALF - 1)], DONE, DONE),
    ];
    for (ranges, reserved, allowed) in table {
        let list = || {
            Some(v1::IovaRangeList {
                ranges: domaind_tests::direct::wire_ranges(ranges),
            })
        };
        let clean = v1::UpdateDomainRequest {
            name: node::name("d0"),
            reserved: Some(v1::IovaRangeList::default()),
            allowed: Some(v1::IovaRangeList::default()),
            ..Default::default()
        };
        for (says, request) in [
            (
                reserved,
                v1::UpdateDomainRequest {
                    reserved: list(),
                    ..clean.clone()
                },
            ),
            (
                allowed,
                v1::UpdateDomainRequest {
                    allowed: list(),
                    ..clean.clone()
                },
            ),
        ] {
            let answer = bench.node.update(request).await;
            bench.check(&format!("{ranges:x?}"), answer, says).await;
            bench.node.update(clean.clone()).await.unwrap();
        }
    }
}
