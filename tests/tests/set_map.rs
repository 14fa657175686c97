//! SetMap and StreamSetMap: the whole direct table at once, or nothing.
//! Cases 47 to 50 of CASES.md, D10, and P-05 of ROBUSTNESS.md.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use domaind_tests::direct::{self, EVERYTHING, Table, bare, range};
use domaind_tests::node::spec;
use domaind_tests::raw::Memory;
use domaind_tests::refusal::assert_numbers;
use domaind_tests::v1::Direction::{Bidirectional, FromDevice, ToDevice};
use domaind_tests::v1::{self, DirectMapping, ListMappingsRequest, Perm, StreamSetMapRequest};
use domaind_tests::{Caller, Code, Node, P, Raw, Reason, Refused, files, refused, wait};

struct Bench {
    node: Node,
    driver: Raw,
    memory: Memory,
    caller: Caller,
}

impl Bench {
    async fn new() -> Bench {
        Bench::with(bare()).await
    }

    async fn with(spec: v1::DomainSpec) -> Bench {
        let node = Node::start().await;
        node.create("d0", spec).await.unwrap();
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

    async fn table(&self) -> Table {
        Table::of(&self.node, "d0").await
    }

    async fn domain(&self) -> v1::Domain {
        self.node.get("d0").await.unwrap()
    }

    /// Five rows, with holes: 10, 12, 14, 16, 18.
    fn five(&self) -> Vec<DirectMapping> {
        (0..5)
            .map(|k| self.memory.row_from(10 + 2 * k, 1, k))
            .collect()
    }

    /// This table is refused both ways, and nothing has changed.
    async fn set_refused(
        &self,
        table: Vec<DirectMapping>,
        code: Code,
        reason: Reason,
    ) -> v1::Refusal {
        let before = self.table().await;
        let refusal = refused(self.caller.set_map(table.clone()).await, code, reason);
        assert_eq!(self.table().await, before, "{refusal:?}");
        let streamed = self.caller.stream(self.caller.chunked(&table, 3)).await;
        let streamed = refused(streamed, code, reason);
        assert_eq!(self.table().await, before, "{streamed:?}");
        assert_eq!(streamed, refusal, "streamed or not");
        refusal
    }
}

/// Case 47.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn three_entries_replace_five_and_only_they_translate() {
    let bench = Bench::new().await;
    let set = bench.caller.set_map(bench.five()).await.unwrap();
    assert_eq!((set.added, set.removed), (5, 0));
    assert_eq!(set.generation, bench.domain().await.direct_generation);
    let three = vec![
        bench.memory.row_from(14, 1, 2),  // as it was
        bench.memory.row_from(16, 1, 60), // elsewhere
        bench.memory.row_from(30, 2, 0),  // new
    ];
    let set = bench.caller.set_map(three).await.unwrap();
    assert_eq!((set.added, set.removed), (2, 4));
    assert_eq!(set.generation, bench.domain().await.direct_generation);
    for page in 0..40 {
        let byte = bench.caller.translate(page * P, page * P, Perm::Read).await;
        match page {
            14 => assert_eq!(byte.unwrap()[0].offset, 2 * P),
            16 => assert_eq!(byte.unwrap()[0].offset, 60 * P),
            30 => assert_eq!(byte.unwrap()[0].offset, 0),
            31 => assert_eq!(byte.unwrap()[0].offset, P),
            _ => drop(refused(byte, Code::NotFound, Reason::NotMapped)),
        }
    }
    let set = bench.caller.set_map(vec![]).await.unwrap();
    assert_eq!((set.added, set.removed), (0, 3), "empty clears it");
    assert_eq!(bench.table().await.mappings, []);
}

/// Case 48, case 49.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_table_with_a_range_that_is_none_or_an_overlap_leaves_the_old_one() {
    let bench = Bench::new().await;
    bench.caller.set_map(bench.five()).await.unwrap();
    let backwards = DirectMapping {
        range: Some(range(4 * P, 4 * P - 1)),
        ..bench.memory.row(4, 1)
    };
    let table = vec![bench.memory.row(1, 1), backwards, bench.memory.row(9, 1)];
    let refusal = bench
        .set_refused(table, Code::InvalidArgument, Reason::InvalidRange)
        .await;
    assert_eq!(refusal.metadata["entry_index"], "1");
    for (one, two) in [
        ((4, 3), (6, 1)),
        ((4, 2), (4, 2)),
        ((4, 9), (7, 1)),
        ((7, 1), (0, 30)),
    ] {
        let table = vec![
            bench.memory.row(one.0, one.1),
            bench.memory.row(50, 1),
            bench.memory.row(two.0, two.1),
        ];
        let refusal = bench
            .set_refused(table, Code::InvalidArgument, Reason::OverlappingEntries)
            .await;
        let named = ["one_start", "one_last", "other_start", "other_last"];
        for key in named {
            assert!(refusal.metadata.contains_key(key), "{refusal:?}");
        }
        let index = &refusal.metadata["entry_index"];
        assert!(index == "0" || index == "2", "{refusal:?}");
    }
    assert_eq!(bench.table().await.mappings.len(), 5);
}

/// Case 50.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn the_same_table_again_changes_nothing_in_whatever_order() {
    let bench = Bench::new().await;
    let first = bench.caller.set_map(bench.five()).await.unwrap();
    let before = bench.table().await;
    let mut table = bench.five();
    table.reverse();
    table.swap(0, 2);
    for again in [bench.five(), table.clone()] {
        let set = bench.caller.set_map(again.clone()).await.unwrap();
        assert_eq!((set.added, set.removed), (0, 0));
        assert_eq!(set.generation, first.generation);
        let set = bench.caller.stream(bench.caller.chunked(&again, 2)).await;
        assert_eq!(
            set.unwrap(),
            v1::SetMapResponse {
                added: 0,
                removed: 0,
                ..first
            }
        );
        assert_eq!(bench.table().await, before);
    }
    // Another order is the same table from the beginning.
    bench.caller.clear(&[EVERYTHING]).await.unwrap();
    bench.caller.set_map(table).await.unwrap();
    assert_eq!(bench.table().await.mappings, before.mappings);
    // What differs in any part is another entry.
    let row = bench.five()[0];
    let others = [
        DirectMapping {
            perm: Perm::Read.into(),
            ..row
        },
        DirectMapping {
            offset: 9 * P,
            ..row
        },
        DirectMapping {
            range: Some(range(10 * P, 12 * P - 1)),
            ..row
        },
    ];
    let mut generation = bench.domain().await.direct_generation;
    for other in others {
        let mut table = bench.five();
        table[0] = other;
        let set = bench.caller.set_map(table).await.unwrap();
        assert_eq!((set.added, set.removed), (1, 1), "{other:?}");
        assert!(set.generation > generation);
        let set = bench.caller.set_map(bench.five()).await.unwrap();
        assert_eq!((set.added, set.removed), (1, 1), "{other:?}");
        generation = set.generation;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_table_that_has_changed_since_the_expected_generation_is_aborted() {
    let bench = Bench::with(spec(16 * P, 16 * P)).await;
    let five = || {
        (0..5)
            .map(|k| bench.memory.row_from(100 + 2 * k, 1, k))
            .collect::<Vec<_>>()
    };
    let fresh = bench.domain().await.direct_generation;
    let first = bench.caller.set_map_if(five(), Some(fresh)).await.unwrap();
    assert!(first.generation > fresh);
    // From before.
    let stale = async |expected: u64| {
        let before = bench.table().await;
        let current = before.direct_generation;
        let refusal = refused(
            bench.caller.set_map_if(vec![], Some(expected)).await,
            Code::Aborted,
            Reason::StaleGeneration,
        );
        let (expected, current) = (expected.to_string(), current.to_string());
        let numbers = [
            ("expected_generation", &*expected),
            ("direct_generation", &*current),
        ];
        assert_numbers(&refusal, &numbers);
        // Also for the table that is there already.
        let header = v1::SetMapHeader {
            expected_generation: Some(before.direct_generation - 1),
            ..bench.caller.header()
        };
        let whole = StreamSetMapRequest {
            header: Some(header),
            entries: vec![],
            commit: true,
        };
        refused(
            bench.caller.stream([whole]).await,
            Code::Aborted,
            Reason::StaleGeneration,
        );
        assert_eq!(bench.table().await, before);
    };
    stale(fresh).await;
    stale(first.generation - 1).await;
    // What is bounced and coherent does not count.
    let mapping = bench
        .driver
        .map(bench.memory.entry(0, 9, ToDevice))
        .await
        .unwrap();
    bench.driver.alloc_len(1).await.unwrap();
    let domain = bench.domain().await;
    assert!(domain.generation > first.generation);
    assert_eq!(domain.direct_generation, first.generation);
    for expected in [first.generation, domain.generation - 1, domain.generation] {
        let same = bench
            .caller
            .set_map_if(five(), Some(expected))
            .await
            .unwrap();
        assert_eq!((same.added, same.removed), (0, 0));
    }
    let next = bench
        .caller
        .set_map_if(five()[1..].to_vec(), Some(domain.generation))
        .await
        .unwrap();
    stale(first.generation).await;
    stale(domain.generation).await;
    // Every other way to change the table counts.
    bench.caller.map(bench.memory.at(200, 1)).await.unwrap();
    stale(next.generation).await;
    let mapped = bench.domain().await.direct_generation;
    bench.caller.unmap(200 * P, 201 * P - 1).await.unwrap();
    stale(mapped).await;
    let unmapped = bench.domain().await.direct_generation;
    bench.caller.clear(&[(102 * P, 102 * P)]).await.unwrap();
    stale(unmapped).await;
    // A refused change does not.
    let now = bench.domain().await.direct_generation;
    bench.caller.map(bench.memory.at(104, 1)).await.unwrap_err();
    bench.caller.set_map_if(vec![], Some(now)).await.unwrap();
    bench.driver.unmap(&mapping, None).await.unwrap();
}

/// D10: entries that touch the apertures are refused.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_table_that_touches_the_apertures_is_refused() {
    let based = v1::DomainSpec {
        aperture_base: 8 * P,
        ..spec(8 * P, 8 * P)
    };
    let bench = Bench::with(based).await;
    bench
        .caller
        .set_map(vec![bench.memory.row(30, 1)])
        .await
        .unwrap();
    for (page, pages) in [(7, 2), (8, 1), (15, 1), (16, 1), (23, 2), (0, 40)] {
        let table = vec![bench.memory.row(50, 1), bench.memory.row(page, pages)];
        let refusal = bench
            .set_refused(table, Code::AlreadyExists, Reason::Overlap)
            .await;
        assert_eq!(refusal.metadata["entry_index"], "1");
        assert!(refusal.metadata.contains_key("hit_start"), "{refusal:?}");
    }
    let beside = vec![bench.memory.row(7, 1), bench.memory.row(24, 1)];
    bench.caller.set_map(beside).await.unwrap();
}

/// D10: traffic that is under way goes on, byte for byte.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn set_map_never_disturbs_what_is_bounced_and_coherent() {
    let bench = Bench::with(spec(1 << 20, 1 << 20)).await;
    let done = Arc::new(AtomicBool::new(false));
    let mut busy = Raw::driver(&bench.node, "d0").await;
    let buffer = busy.memory(8 * P).await;
    let ring = busy.alloc_len(3 * P).await.unwrap();
    let ring_holds = files::pattern(99, 3 * 4_096);
    busy.write(ring.iova, &ring_holds);
    let traffic = {
        let done = Arc::clone(&done);
        tokio::spawn(async move {
            let mut rounds = 0_u64;
            while !done.load(Relaxed) {
                rounds += 1;
                let sent = files::pattern(rounds, 9_000);
                files::poke(&buffer.fd, 100, &sent);
                let entry = buffer.entry(100, 9_000, Bidirectional);
                let mapping = busy.map(entry).await.unwrap();
                assert!(busy.read(mapping.iova, 9_000) == sent, "to the device");
                let answer = files::pattern(!rounds, 9_000);
                busy.write(mapping.iova, &answer);
                let coherent = busy.alloc_len(P).await.unwrap();
                assert!(
                    busy.read(coherent.iova, 4_096)
                        .iter()
                        .all(|byte| *byte == 0)
                );
                busy.write(coherent.iova, &[0xcc; 4_096]);
                busy.free(coherent.iova, coherent.mapping_id).await.unwrap();
                busy.unmap(&mapping, None).await.unwrap();
                assert!(files::peek(&buffer.fd, 100, 9_000) == answer, "and back");
                assert!(busy.read(ring.iova, 3 * 4_096) == ring_holds, "the ring");
            }
            rounds
        })
    };
    for round in 0..200_u64 {
        let rows = (0..20).map(|k| bench.memory.row_from(1_000 + k + 7 * (round % 3), 1, k));
        let set = bench.caller.set_map(rows.collect()).await.unwrap();
        assert!(round == 0 || set.added > 0);
        assert_eq!(bench.caller.list_all(of_direct()).await.len(), 20);
        assert!(!traffic.is_finished(), "the traffic has failed");
    }
    done.store(true, Relaxed);
    let rounds = traffic.await.unwrap();
    assert!(rounds > 2, "{rounds} are no traffic");
}

fn of_direct() -> ListMappingsRequest {
    ListMappingsRequest {
        kind: v1::MappingKind::Direct.into(),
        ..Default::default()
    }
}

/// Who looks while tables are swapped sees the one or the other, and what is
/// in both is there all the time.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nobody_ever_sees_a_mixture_of_two_tables() {
    let bench = Bench::new().await;
    let table = |shift: u64| {
        let mut rows: Vec<_> = (0..40)
            .map(|k| bench.memory.row_from(100 + k, 1, k + shift))
            .collect();
        rows.push(bench.memory.row_from(500, 1, 63));
        rows
    };
    bench.caller.set_map(table(0)).await.unwrap();
    let done = Arc::new(AtomicBool::new(false));
    let look = {
        let (caller, done) = (bench.caller.clone(), Arc::clone(&done));
        tokio::spawn(async move {
            let mut seen = [0_u64; 2];
            while !done.load(Relaxed) {
                let pieces = caller.translate(100 * P, 140 * P - 1, Perm::Read).await;
                let pieces = pieces.expect("there is always a table");
                let shifts = pieces
                    .iter()
                    .zip(0..)
                    .map(|(piece, k)| piece.offset / P - k);
                let shifts: Vec<u64> = shifts.collect();
                assert_eq!(shifts.len(), 40);
                let first = shifts[0];
                assert!(shifts.iter().all(|shift| *shift == first), "{shifts:?}");
                seen[usize::from(first != 0)] += 1;
                let stays = caller.translate(500 * P, 501 * P - 1, Perm::Read).await;
                assert_eq!(stays.expect("it never goes away")[0].offset, 63 * P);
            }
            seen
        })
    };
    for round in 0..200_u64 {
        bench
            .caller
            .set_map(table(20 * ((round + 1) % 2)))
            .await
            .unwrap();
        assert!(!look.is_finished(), "the other one has failed");
    }
    done.store(true, Relaxed);
    let seen = look.await.unwrap();
    assert!(seen[0] + seen[1] > 2, "{seen:?} is no look");
}

/// A table may hold memory of the domain beside the session's own.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn what_belongs_to_the_domain_is_replaced_by_any_driver() {
    let mut bench = Bench::new().await;
    let shared = bench.driver.memory_as(4 * P, true, true).await;
    bench
        .caller
        .set_map(vec![shared.row(10, 1), shared.row(20, 1)])
        .await
        .unwrap();
    let mut other = Raw::driver(&bench.node, "d0").await;
    let own = other.memory(4 * P).await;
    let caller = Caller::session(&other);
    let set = caller
        .set_map(vec![shared.row(20, 1), own.row(30, 1)])
        .await
        .unwrap();
    assert_eq!((set.added, set.removed), (1, 1));
    // Now it holds something of another's.
    for table in [vec![], vec![shared.row(20, 1), own.row(30, 1)]] {
        bench
            .set_refused(table, Code::PermissionDenied, Reason::NotYours)
            .await;
    }
    // The owner replaces everybody's, with anybody's.
    let owner = Caller::owner(&bench.node, "d0").await;
    let table = vec![bench.memory.row(1, 1), own.row(2, 1), shared.row(3, 1)];
    let set = owner.set_map(table.clone()).await.unwrap();
    assert_eq!((set.added, set.removed), (3, 2));
    let set = owner.stream(owner.chunked(&table, 1)).await.unwrap();
    assert_eq!((set.added, set.removed), (0, 0));
}

// ---- P-05

type Fault = (
    &'static str,
    Code,
    Reason,
    fn(&Faults, u64) -> DirectMapping,
);

/// What the faulty entries need.
struct Faults {
    memory: Memory,
    theirs: Memory,
    read_only: Memory,
}

/// P-05: a fault at each entry of a table, of each kind, names that entry and
/// leaves the old table as it is, byte for byte.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn setmap_atomic() {
    const ENTRIES: u64 = 12;
    let plan = v1::DomainSpec {
        reserved: vec![range(900 * P, 901 * P - 1)],
        aperture_base: 1_000 * P,
        iova_limit: Some((1 << 40) - 1),
        ..spec(8 * P, 8 * P)
    };
    let mut bench = Bench::with(plan).await;
    let mut other = Raw::driver(&bench.node, "d0").await;
    let faults = Faults {
        memory: bench.driver.memory(4 * P).await,
        theirs: other.memory(4 * P).await,
        read_only: bench.driver.memory_as(4 * P, false, false).await,
    };
    let invalid = Code::InvalidArgument;
    let table: [Fault; 17] = [
        ("backwards", invalid, Reason::InvalidRange, |f, page| {
            DirectMapping {
                range: Some(range(page * P, page * P - 1)),
                ..f.memory.row(page, 1)
            }
        }),
        ("no range", invalid, Reason::Malformed, |f, page| {
            DirectMapping {
                range: None,
                ..f.memory.row(page, 1)
            }
        }),
        ("start", invalid, Reason::Misaligned, |f, page| {
            DirectMapping {
                range: Some(range(page * P + 1, page * P + P - 1)),
                ..f.memory.row(page, 1)
            }
        }),
        ("last", invalid, Reason::Misaligned, |f, page| {
            DirectMapping {
                range: Some(range(page * P, page * P + P)),
                ..f.memory.row(page, 1)
            }
        }),
        ("offset", invalid, Reason::Misaligned, |f, page| {
            DirectMapping {
                offset: 512,
                ..f.memory.row(page, 1)
            }
        }),
        ("no perm", invalid, Reason::UnknownPerm, |f, page| {
            DirectMapping {
                perm: 0,
                ..f.memory.row(page, 1)
            }
        }),
        ("odd perm", invalid, Reason::UnknownPerm, |f, page| {
            DirectMapping {
                perm: 4,
                ..f.memory.row(page, 1)
            }
        }),
        ("outside", invalid, Reason::OutsideMemory, |f, page| {
            f.memory.row_from(page, 1, 4)
        }),
        ("reserved", invalid, Reason::ReservedRange, |f, _| {
            f.memory.row(900, 1)
        }),
        ("overlap", invalid, Reason::OverlappingEntries, |f, page| {
            f.memory.row(page + 4, 2)
        }),
        ("bounce", Code::AlreadyExists, Reason::Overlap, |f, _| {
            f.memory.row(1_007, 1)
        }),
        ("coherent", Code::AlreadyExists, Reason::Overlap, |f, _| {
            f.memory.row(1_015, 2)
        }),
        ("limit", Code::OutOfRange, Reason::PastIovaLimit, |f, _| {
            f.memory.row((1 << 28) - 1, 2)
        }),
        (
            "overflow",
            Code::OutOfRange,
            Reason::AddressOverflow,
            |f, page| DirectMapping {
                offset: u64::MAX - P + 1,
                ..f.memory.row(page, 2)
            },
        ),
        (
            "no memory",
            Code::NotFound,
            Reason::NoSuchMemory,
            |f, page| DirectMapping {
                memory_id: 4_711,
                ..f.memory.row(page, 1)
            },
        ),
        (
            "theirs",
            Code::PermissionDenied,
            Reason::NotYours,
            |f, page| f.theirs.row(page, 1),
        ),
        (
            "read-only",
            Code::PermissionDenied,
            Reason::ReadOnly,
            |f, page| f.read_only.row(page, 1),
        ),
    ];
    bench.caller.set_map(bench.five()).await.unwrap();
    // Something of each kind, that must not be touched either.
    bench
        .driver
        .map(bench.memory.entry(0, 9, FromDevice))
        .await
        .unwrap();
    bench.driver.alloc_len(9).await.unwrap();
    let good: Vec<_> = (0..ENTRIES)
        .map(|k| faults.memory.row(100 + 5 * k, 4))
        .collect();
    for (what, code, reason, fault) in table {
        for k in 0..ENTRIES {
            let mut entries = good.clone();
            let index = usize::try_from(k).unwrap();
            let page = 100 + 5 * k;
            entries[index] = fault(&faults, page);
            let mut indices = vec![k.to_string()];
            if reason == Reason::OverlappingEntries {
                // With its right neighbour, or (the last) with a new one.
                if k + 1 == ENTRIES {
                    entries.push(faults.memory.row(page + 4, 1));
                }
                indices.push((k + 1).to_string());
            }
            let refusal = bench.set_refused(entries, code, reason).await;
            let said = &refusal.metadata["entry_index"];
            assert!(indices.contains(said), "{what} at {k}: {refusal:?}");
            assert!(!refusal.message.is_empty(), "{what} at {k}");
        }
    }
    // And without a fault it is taken.
    let set = bench.caller.set_map(good).await.unwrap();
    assert_eq!((set.added, set.removed), (ENTRIES, 5));
}

// ---- StreamSetMap

fn chunk(entries: Vec<DirectMapping>) -> StreamSetMapRequest {
    StreamSetMapRequest {
        entries,
        ..Default::default()
    }
}

/// A header, entries and commit may come in one message or in many.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_stream_says_the_same_in_chunks_of_any_size() {
    let bench = Bench::new().await;
    let caller = &bench.caller;
    let five = bench.five();
    for size in [1, 2, 5] {
        let set = caller.stream(caller.chunked(&five, size)).await.unwrap();
        assert_eq!((set.added, set.removed), (5, 0), "{size}");
        assert_eq!(bench.table().await.mappings.len(), 5);
        assert_eq!(set.generation, bench.domain().await.direct_generation);
        let nothing = caller.stream(caller.chunked(&[], 1)).await.unwrap();
        assert_eq!((nothing.added, nothing.removed), (0, 5), "{size}");
    }
    let whole = StreamSetMapRequest {
        header: Some(caller.header()),
        entries: five.clone(),
        commit: true,
    };
    assert_eq!(caller.stream([whole]).await.unwrap().added, 5);
    // Empty chunks are chunks; the last may bring entries with the commit.
    let first = StreamSetMapRequest {
        header: Some(caller.header()),
        entries: five[..1].to_vec(),
        commit: false,
    };
    let last = StreamSetMapRequest {
        header: None,
        entries: five[1..2].to_vec(),
        commit: true,
    };
    let set = caller.stream([first, chunk(vec![]), last]).await.unwrap();
    assert_eq!((set.added, set.removed), (0, 3));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_stream_that_is_not_a_header_chunks_and_a_commit_changes_nothing() {
    let bench = Bench::new().await;
    bench.caller.set_map(bench.five()).await.unwrap();
    let header = || StreamSetMapRequest {
        header: Some(bench.caller.header()),
        ..Default::default()
    };
    let row = |page| chunk(vec![bench.memory.row(page, 1)]);
    let commit = || StreamSetMapRequest {
        commit: true,
        ..Default::default()
    };
    let streams = [
        ("nothing", vec![]),
        ("no header", vec![row(1), commit()]),
        ("only a commit", vec![commit()]),
        ("an empty first", vec![chunk(vec![]), header(), commit()]),
        ("no commit", vec![header(), row(1), row(2)]),
        ("only a header", vec![header()]),
        ("two headers", vec![header(), row(1), header(), commit()]),
        (
            "a late header",
            vec![
                header(),
                row(1),
                StreamSetMapRequest {
                    commit: true,
                    ..header()
                },
            ],
        ),
        (
            "entries after the commit",
            vec![header(), row(1), commit(), row(2)],
        ),
        ("two commits", vec![header(), row(1), commit(), commit()]),
    ];
    for (what, messages) in streams {
        let before = bench.table().await;
        let answer = bench.caller.stream(messages).await;
        let Err(refusal) = answer else {
            panic!("{what}: {answer:?}");
        };
        let said = (refusal.grpc_code(), refusal.reason());
        assert_eq!(said, (Code::InvalidArgument, Reason::Malformed), "{what}");
        assert_eq!(bench.table().await, before, "{what}");
    }
}

/// A client that goes away in the middle has changed nothing, and leaves
/// nothing.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_cancelled_stream_changes_nothing() {
    let bench = Bench::new().await;
    bench.caller.set_map(bench.five()).await.unwrap();
    let before = bench.table().await;
    for round in 0..20_usize {
        let (sender, messages) = direct::stream();
        let caller = bench.caller.clone();
        let call = tokio::spawn(async move { caller.stream_from(messages).await });
        let table: Vec<_> = (0..1_000).map(|k| bench.memory.row(100 + k, 1)).collect();
        let chunks = bench.caller.chunked(&table, 100);
        for message in chunks.into_iter().take(1 + round / 2) {
            sender.send(message).unwrap();
        }
        if round % 3 == 0 {
            tokio::task::yield_now().await;
        }
        call.abort();
        call.await.unwrap_err();
        assert_eq!(bench.table().await, before, "{round}");
    }
    let next = bench
        .caller
        .set_map_if(vec![], Some(before.generation))
        .await;
    assert_eq!(next.unwrap().removed, 5);
}

/// The quota is checked as entries come: nobody can make the daemon keep more,
/// and the answer does not wait for the end.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn too_many_entries_are_refused_before_the_stream_ends() {
    let limited = v1::DomainSpec {
        quotas: Some(v1::Quotas {
            direct: 1_000,
            ..Default::default()
        }),
        ..bare()
    };
    let bench = Bench::with(limited).await;
    bench.caller.set_map(bench.five()).await.unwrap();
    let before = bench.table().await;
    let (sender, messages) = direct::stream();
    let table: Vec<_> = (0..1_100).map(|k| bench.memory.row(100 + k, 1)).collect();
    for message in bench.caller.chunked(&table, 100).into_iter().take(12) {
        sender.send(message).unwrap();
    }
    // The sender stays: this stream has no end.
    let answer = wait::soon("the refusal", bench.caller.stream_from(messages)).await;
    let refusal = refused(answer, Code::ResourceExhausted, Reason::QuotaExceeded);
    assert_numbers(&refusal, &[("quota", "direct"), ("limit", "1000")]);
    assert_eq!(bench.table().await, before);
    drop(sender);
    // Exactly so many are fine.
    let set = bench
        .caller
        .stream(bench.caller.chunked(&table[..1_000], 64))
        .await;
    assert_eq!(set.unwrap().added, 1_000);
}

/// A stream on which nothing comes any more is ended, and has changed nothing.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_stream_that_stalls_is_ended_and_changes_nothing() {
    let bench = Bench::new().await;
    bench.caller.set_map(bench.five()).await.unwrap();
    let before = bench.table().await;
    // In the middle, and with all but the end.
    for messages in [2, 3] {
        let (sender, stream) = direct::stream();
        let table = [bench.memory.row(100, 1)];
        for message in bench.caller.chunked(&table, 1).into_iter().take(messages) {
            sender.send(message).unwrap();
        }
        let answer = wait::soon("the end", bench.caller.stream_from(stream)).await;
        let refusal = answer.unwrap_err();
        assert_eq!(refusal.grpc_code(), Code::DeadlineExceeded, "{refusal:?}");
        assert_eq!(bench.table().await, before);
        drop(sender);
    }
    bench
        .caller
        .stream(bench.caller.chunked(&[], 1))
        .await
        .unwrap();
}

/// One user streams four tables at a time; the fifth is refused, and the four
/// go on.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_fifth_stream_of_a_user_is_refused() {
    let bench = Bench::new().await;
    let mut open = Vec::new();
    let mut calls = tokio::task::JoinSet::new();
    for _ in 0..5 {
        let (sender, messages) = direct::stream();
        let caller = bench.caller.clone();
        calls.spawn(async move { caller.stream_from(messages).await });
        let header = bench.caller.chunked(&[], 1).swap_remove(0);
        sender.send(header).unwrap();
        open.push(sender);
    }
    // Something comes on each all the while, so that none of them stalls.
    let first = wait::soon("a refusal", async {
        loop {
            tokio::select! {
                ended = calls.join_next() => break ended,
                () = tokio::time::sleep(std::time::Duration::from_millis(300)) => {
                    open.retain(|sender| sender.send(chunk(vec![])).is_ok());
                }
            }
        }
    });
    let refusal = refused(
        first.await.expect("a call").expect("no panic"),
        Code::ResourceExhausted,
        Reason::QuotaExceeded,
    );
    let numbers = [("quota", "table_streams"), ("limit", "4")];
    for (key, value) in numbers {
        assert_eq!(refusal.metadata[key], value, "{refusal:?}");
    }
    for sender in open {
        let commit = StreamSetMapRequest {
            commit: true,
            ..Default::default()
        };
        // The refused one does not listen any more.
        let _ = sender.send(commit);
    }
    let mut done = 0;
    while let Some(call) = calls.join_next().await {
        call.unwrap().unwrap();
        done += 1;
    }
    assert_eq!(done, 4);
}

/// A hundred thousand entries, committed once, and each of them there.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_hundred_thousand_entries_are_one_change() {
    const ENTRIES: u64 = 100_000;
    let bench = Bench::new().await;
    let before = bench.domain().await;
    let row = |k: u64| bench.memory.row_from(16 + 3 * k, 1 + k % 3, k % 61);
    // In no order: 7919 has no factor in common with 10^5.
    let table: Vec<_> = (0..ENTRIES).map(|k| row(k * 7_919 % ENTRIES)).collect();
    let set = bench
        .caller
        .stream(bench.caller.chunked(&table, 4_000))
        .await
        .unwrap();
    assert_eq!((set.added, set.removed), (ENTRIES, 0));
    let domain = bench.domain().await;
    assert_eq!(domain.generation, before.generation + 1, "one change");
    assert_eq!(domain.usage.unwrap().direct_mappings, ENTRIES);

    let request = ListMappingsRequest {
        page_size: 10_000,
        ..of_direct()
    };
    let listed = bench.caller.list_all(request).await;
    assert_eq!(listed.len() as u64, ENTRIES);
    for (mapping, k) in listed.iter().zip(0..) {
        let wanted = ((16 + 3 * k) * P, (1 + k % 3) * P, (k % 61) * P);
        let found = (mapping.iova, mapping.len_bytes, mapping.offset);
        assert_eq!(found, wanted, "{k}");
    }
    for k in [0, 1, 2, 3, 511, 512, 513, 50_000, 77_777, 99_998, 99_999] {
        let start = (16 + 3 * k) * P;
        let last = start + (1 + k % 3) * P - 1;
        let pieces = bench
            .caller
            .translate(start + 5, last, Perm::ReadWrite)
            .await
            .unwrap();
        assert_eq!(
            (pieces.len(), pieces[0].offset),
            (1, (k % 61) * P + 5),
            "{k}"
        );
        if k % 3 != 2 {
            let hole = bench.caller.translate(last + 1, last + 1, Perm::Read).await;
            refused(hole, Code::NotFound, Reason::NotMapped);
        }
    }
    // The same again is nothing, without one it is one.
    let set = bench
        .caller
        .stream(bench.caller.chunked(&table, 4_000))
        .await
        .unwrap();
    assert_eq!(
        (set.added, set.removed, set.generation),
        (0, 0, domain.direct_generation)
    );
    let set = bench
        .caller
        .stream(bench.caller.chunked(&table[1..], 4_000))
        .await
        .unwrap();
    assert_eq!((set.added, set.removed), (0, 1));
    let (removed, _) = bench.caller.clear(&[EVERYTHING]).await.unwrap();
    assert_eq!(removed, ENTRIES - 1);
}

/// The page table's memory is counted, and used again: doing the same for ever
/// needs no more than doing it once.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn the_page_tables_bytes_are_counted_and_used_again() {
    let bench = Bench::new().await;
    let empty = bench.node.table_bytes("d0").await;
    // Of one page each, a gigabyte apart: nothing of the table is shared.
    let rows = |shift: u64| -> Vec<_> {
        let pages = (1..300).map(|k| (k << 18) + (shift << 9));
        pages.map(|page| bench.memory.row(page, 1)).collect()
    };
    let mut most = 0;
    for round in 0..40 {
        bench.caller.set_map(rows(round)).await.unwrap();
        let bytes = bench.node.table_bytes("d0").await;
        // One table gives way to the next: there may be two for a moment.
        if round < 2 {
            most = most.max(2 * bytes);
        }
        assert!(bytes > empty, "{bytes} with 299 mappings");
        assert!(bytes <= most, "{bytes} in round {round}, {most} once");
        if round % 3 == 0 {
            bench.caller.clear(&[EVERYTHING]).await.unwrap();
        }
    }
}

/// Two that set at the same time: one after the other, and with an expected
/// generation only one of them.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_two_that_expect_the_same_generation_one_is_aborted() {
    let bench = Bench::new().await;
    for round in 0..30_u64 {
        let generation = bench.domain().await.generation;
        let race: Vec<_> = (0..4_u64)
            .map(|k| {
                let row = bench.memory.row(100 + 10 * round + k, 1);
                let caller = bench.caller.clone();
                tokio::spawn(async move { caller.set_map_if(vec![row], Some(generation)).await })
            })
            .collect();
        let mut won = 0;
        for runner in race {
            let answer: Refused<_> = runner.await.unwrap();
            match answer {
                Ok(_) => won += 1,
                Err(refusal) => assert_eq!(refusal.reason(), Reason::StaleGeneration),
            }
        }
        assert_eq!(won, 1);
        assert_eq!(bench.table().await.mappings.len(), 1);
    }
}
