//! Direct mappings: what MapDirect, UnmapDirect and ClearMap do, to whom a
//! mapping belongs, and what none of them ever does.
//!
//! Cases 1 to 19 and 41 to 46 of CASES.md, by number at each test. The cases
//! that need live invalidation follow with it: 63, 64 and 65 (an accessor that
//! acknowledges, never does, or dies meanwhile), D9's wait for every session,
//! 68's acknowledgment, and whatever speaks of leases (D3, D11, D15).

use domaind_tests::direct::{self, EVERYTHING, Table, bare, ends};
use domaind_tests::node::{self, spec};
use domaind_tests::raw::Memory;
use domaind_tests::refusal::assert_numbers;
use domaind_tests::v1::Direction::ToDevice;
use domaind_tests::v1::{self, MapDirectEntry, Perm, map_direct_result::Outcome};
use domaind_tests::{
    Actor, Caller, Code, Node, P, Raw, Reason, Refused, children, files, refused, wait,
};

/// A driver in a space without apertures.
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

    /// Maps pages of the memory's beginning.
    async fn map(&self, iova_page: u64, pages: u64) {
        let mapped = self.caller.map(self.memory.at(iova_page, pages)).await;
        let range = ends(mapped.unwrap().range);
        assert_eq!(range, pages_at(iova_page, pages));
    }

    /// This map is refused, and nothing has changed.
    async fn map_refused(&self, entry: MapDirectEntry, code: Code, reason: Reason) -> v1::Refusal {
        let before = self.table().await;
        let refusal = refused(self.caller.map(entry).await, code, reason);
        assert_eq!(refusal.metadata["entry_index"], "0", "{refusal:?}");
        assert_eq!(self.table().await, before, "{refusal:?}");
        refusal
    }

    /// This unmap is refused, and nothing has changed.
    async fn unmap_refused(
        &self,
        ranges: &[(u64, u64)],
        code: Code,
        reason: Reason,
    ) -> v1::Refusal {
        let before = self.table().await;
        let refusal = refused(self.caller.unmap_all(ranges).await, code, reason);
        assert_eq!(self.table().await, before, "{refusal:?}");
        refusal
    }
}

/// First and last byte of so many pages.
fn pages_at(page: u64, pages: u64) -> (u64, u64) {
    (page * P, (page + pages) * P - 1)
}

/// As the metadata say a range.
fn named<'a>(prefix: &str, at: &'a (String, String)) -> [(String, &'a str); 2] {
    [
        (format!("{prefix}_start"), at.0.as_str()),
        (format!("{prefix}_last"), at.1.as_str()),
    ]
}

/// The metadata, and the sentence, name this range.
#[track_caller]
fn assert_names(refusal: &v1::Refusal, prefix: &str, (start, last): (u64, u64)) {
    let at = (format!("{start:#x}"), format!("{last:#x}"));
    let numbers = named(prefix, &at);
    let numbers: Vec<_> = numbers.iter().map(|(k, v)| (k.as_str(), *v)).collect();
    assert_numbers(refusal, &numbers);
}

// ---- UnmapDirect

/// Case 1.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn unmapping_what_is_not_mapped_is_not_found_page_by_page() {
    let bench = Bench::new().await;
    for page in 0..10 {
        let at = pages_at(page, 1);
        let refusal = bench
            .unmap_refused(&[at], Code::NotFound, Reason::NotMapped)
            .await;
        assert_names(&refusal, "range", at);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn unmapping_the_whole_space_succeeds_on_an_empty_table() {
    let limit = (1_u64 << 40) + 4_094;
    let limited = v1::DomainSpec {
        iova_limit: Some(limit),
        ..spec(0, 0)
    };
    let bench = Bench::with(limited).await;
    let before = bench.table().await;
    for last in [limit, limit + 1, u64::MAX] {
        assert_eq!(bench.caller.unmap(0, last).await, Ok((0, 0)), "{last:#x}");
    }
    assert_eq!(bench.table().await, before, "nothing is no change");
    for (start, last) in [(1, u64::MAX), (0, limit - 1), (P, limit)] {
        bench
            .unmap_refused(&[(start, last)], Code::NotFound, Reason::NotMapped)
            .await;
    }
    bench.map(3, 2).await;
    assert_eq!(bench.caller.unmap(0, limit).await, Ok((1, 2 * P)));
}

/// Case 2.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn ten_pages_are_mapped_and_unmapped_one_by_one() {
    let bench = Bench::new().await;
    for page in 0..10 {
        bench.map(page, 1).await;
        let usage = bench.node.usage("d0").await;
        assert_eq!(usage.direct_mappings, page + 1);
    }
    for page in 0..10 {
        let (start, last) = pages_at(page, 1);
        assert_eq!(bench.caller.unmap(start, last).await, Ok((1, P)));
        let left = bench.table().await.mappings;
        assert_eq!(left.len() as u64, 9 - page);
        assert!(left.iter().all(|mapping| mapping.0 > start));
    }
    assert_eq!(bench.node.usage("d0").await.direct_mappings, 0);
}

/// Case 3.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_mapping_is_never_split() {
    let bench = Bench::new().await;
    bench.map(16, 2).await;
    let whole = pages_at(16, 2);
    let cuts = [
        pages_at(16, 1),
        pages_at(17, 1),
        pages_at(15, 2),
        pages_at(17, 2),
        (whole.0 + 1, whole.1),
        (whole.0, whole.1 - 1),
        (whole.0, whole.0),
        (0, whole.1 - 1),
        (whole.1, u64::MAX),
    ];
    for range in cuts {
        let refusal = bench
            .unmap_refused(&[range], Code::NotFound, Reason::CutsMapping)
            .await;
        assert_names(&refusal, "cut", whole);
    }
    let pieces = bench
        .caller
        .translate(whole.0, whole.1, Perm::ReadWrite)
        .await;
    assert_eq!(pieces.unwrap().len(), 1);
    assert_eq!(
        bench.caller.unmap(whole.0, whole.1).await,
        Ok((1, 2 * P)),
        "exactly itself goes"
    );
}

/// Case 4.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn an_unmap_of_nothing_is_an_invalid_argument() {
    let bench = Bench::new().await;
    bench.map(1, 1).await;
    let (invalid, backwards) = (Code::InvalidArgument, Reason::InvalidRange);
    for range in [(P, P - 1), (2 * P, P), (u64::MAX, 0), (1, 0)] {
        let refusal = bench.unmap_refused(&[range], invalid, backwards).await;
        assert_names_ends(&refusal, range);
    }
    bench.unmap_refused(&[], invalid, Reason::Malformed).await;
    // One that is wrong among others that are not.
    bench
        .unmap_refused(&[pages_at(1, 1), (9, 8)], invalid, backwards)
        .await;
}

/// The ends of a range that is none.
#[track_caller]
fn assert_names_ends(refusal: &v1::Refusal, (start, last): (u64, u64)) {
    let (start, last) = (format!("{start:#x}"), format!("{last:#x}"));
    assert_numbers(refusal, &[("start", &start), ("last", &last)]);
}

/// Case 7, case 8.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_range_takes_all_that_lie_inside_or_none() {
    let bench = Bench::new().await;
    let base = 100;
    for at in [0, 16, 32, 48] {
        bench.map(base + at, 8).await;
    }
    // Cuts the first.
    let (start, _) = pages_at(base - 4, 1);
    let cutting = (start, start + 8 * P - 1);
    let refusal = bench
        .unmap_refused(&[cutting], Code::NotFound, Reason::CutsMapping)
        .await;
    assert_names(&refusal, "cut", pages_at(base, 8));
    // Cuts the last, having all others inside.
    let cutting = (start, (base + 50) * P - 1);
    let refusal = bench
        .unmap_refused(&[cutting], Code::NotFound, Reason::CutsMapping)
        .await;
    assert_names(&refusal, "cut", pages_at(base + 48, 8));

    let all = (start, (base + 56 + 4) * P - 1);
    let unmapped = bench.caller.unmap(all.0, all.1).await;
    assert_eq!(unmapped, Ok((4, 32 * P)));
    assert_eq!(bench.table().await.mappings, []);
}

/// Case 10.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn holes_are_not_counted() {
    let bench = Bench::new().await;
    // Of one to three pages, each with a hole of two behind it.
    let entries: Vec<_> = (0..101)
        .map(|k| bench.memory.at(5 * k, 1 + k % 3))
        .collect();
    let bytes: u64 = entries.iter().map(|entry| entry.len_bytes).sum();
    bench.caller.map_all(entries, false).await.unwrap();
    let unmapped = bench.caller.unmap(0, 1_000 * P - 1).await;
    assert_eq!(unmapped, Ok((101, bytes)));
}

/// Case 11.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn what_was_unmapped_is_gone_and_its_addresses_are_free_for_one() {
    let bench = Bench::new().await;
    bench.map(7, 3).await;
    let (start, last) = pages_at(7, 3);
    bench.caller.unmap(start, last).await.unwrap();
    bench
        .unmap_refused(&[(start, last)], Code::NotFound, Reason::NotMapped)
        .await;
    bench.map(7, 3).await;
    bench
        .map_refused(bench.memory.at(7, 3), Code::AlreadyExists, Reason::Overlap)
        .await;
    assert_eq!(bench.table().await.mappings.len(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn several_ranges_are_unmapped_all_or_none() {
    let bench = Bench::new().await;
    for page in [10, 20, 30] {
        bench.map(page, 2).await;
    }
    let (one, two, three) = (pages_at(10, 2), pages_at(20, 2), pages_at(30, 2));
    let not_found = Code::NotFound;
    for (ranges, reason) in [
        ([one, two, pages_at(40, 2)], Reason::NotMapped),
        ([pages_at(0, 2), one, two], Reason::NotMapped),
        ([one, pages_at(21, 1), three], Reason::CutsMapping),
        ([one, two, (three.0, three.1 + P)], Reason::Unspecified),
    ] {
        if reason == Reason::Unspecified {
            let counts = bench.caller.unmap_all(&ranges).await;
            assert_eq!(counts, Ok((3, 6 * P)), "the good one, last");
        } else {
            bench.unmap_refused(&ranges, not_found, reason).await;
        }
    }
    assert_eq!(bench.table().await.mappings, []);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn ranges_of_one_unmap_may_not_overlap() {
    let bench = Bench::new().await;
    bench.map(10, 2).await;
    bench.map(20, 2).await;
    let (one, two) = (pages_at(10, 2), pages_at(20, 2));
    for ranges in [
        vec![one, one],
        vec![one, two, (0, one.0)],
        vec![two, (0, u64::MAX)],
        vec![(two.1, two.1 + 1), (two.1 + 1, two.1 + 9)],
    ] {
        let refusal = bench
            .unmap_refused(&ranges, Code::InvalidArgument, Reason::OverlappingEntries)
            .await;
        for key in ["one_start", "one_last", "other_start", "other_last"] {
            assert!(refusal.metadata.contains_key(key), "{key}: {refusal:?}");
        }
    }
    // In any order, and touching.
    let ranges = [two, (one.0, two.0 - 1)];
    assert_eq!(bench.caller.unmap_all(&ranges).await, Ok((2, 4 * P)));
}

// ---- MapDirect

/// Case 12, case 13.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn what_overlaps_is_refused_by_the_name_of_what_it_hit_and_neighbours_are_not() {
    let bench = Bench::new().await;
    bench.map(16, 2).await;
    for (page, pages) in [(16, 2), (16, 1), (17, 1), (15, 2), (15, 3), (0, 64)] {
        let refusal = bench
            .map_refused(
                bench.memory.at(page, pages),
                Code::AlreadyExists,
                Reason::Overlap,
            )
            .await;
        assert_names(&refusal, "hit", pages_at(16, 2));
    }
    bench.map(15, 1).await;
    bench.map(18, 1).await;
    let all = bench.table().await.mappings;
    let starts: Vec<_> = all.iter().map(|mapping| mapping.0 / P).collect();
    assert_eq!(starts, [15, 16, 18]);
}

/// Case 15.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn what_is_not_granule_aligned_is_an_invalid_argument() {
    let granule = 2 << 20;
    for granule_bytes in [P, granule] {
        let coarse = v1::DomainSpec {
            granule_bytes,
            ..bare()
        };
        let mut bench = Bench::with(coarse).await;
        let memory = bench.driver.memory(4 * granule_bytes).await;
        let good = MapDirectEntry {
            memory_id: memory.id,
            offset: granule_bytes,
            len_bytes: granule_bytes,
            perm: Perm::Read.into(),
            iova: Some(granule_bytes),
            ..Default::default()
        };
        for by in [1, 512, granule_bytes / 2, granule_bytes - 1] {
            for (entry, field) in [
                (
                    MapDirectEntry {
                        iova: Some(granule_bytes + by),
                        ..good
                    },
                    "iova",
                ),
                (
                    MapDirectEntry {
                        offset: granule_bytes + by,
                        ..good
                    },
                    "offset",
                ),
                (
                    MapDirectEntry {
                        len_bytes: granule_bytes + by,
                        ..good
                    },
                    "len_bytes",
                ),
            ] {
                let refusal = bench
                    .map_refused(entry, Code::InvalidArgument, Reason::Misaligned)
                    .await;
                assert_eq!(refusal.metadata["field"], field, "{refusal:?}");
                let granule = granule_bytes.to_string();
                assert_numbers(&refusal, &[("granule_bytes", &granule)]);
            }
        }
        // Case 18: the correction is accepted at once, at the same address.
        let mapped = bench.caller.map(good).await.unwrap();
        assert_eq!(ends(mapped.range), (granule_bytes, 2 * granule_bytes - 1));
    }
}

/// Case 18.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_refused_map_leaves_no_trace_and_its_correction_gets_the_same_address() {
    let mut bench = Bench::new().await;
    let read_only = bench.driver.memory_as(4 * P, false, false).await;
    let good = bench.memory.at(5, 2);
    let wrong = [
        MapDirectEntry {
            len_bytes: 0,
            ..good
        },
        MapDirectEntry { perm: 0, ..good },
        MapDirectEntry { perm: 4, ..good },
        MapDirectEntry {
            memory_id: 4_711,
            ..good
        },
        MapDirectEntry {
            memory_id: read_only.id,
            ..good
        },
        MapDirectEntry {
            offset: 63 * P,
            ..good
        },
        MapDirectEntry {
            iova: Some(u64::MAX - P + 1),
            ..good
        },
    ];
    for entry in wrong {
        let before = bench.table().await;
        bench.caller.map(entry).await.unwrap_err();
        assert_eq!(bench.table().await, before, "{entry:?}");
        let mapped = bench.caller.map(good).await.unwrap();
        let (start, last) = ends(mapped.range);
        assert_eq!((start, last), pages_at(5, 2), "{entry:?}");
        bench.caller.unmap(start, last).await.unwrap();
    }
    // Chosen addresses, too: the refused one has used up none.
    let first = ends(
        bench
            .caller
            .map(bench.memory.anywhere(1))
            .await
            .unwrap()
            .range,
    );
    bench.caller.unmap(first.0, first.1).await.unwrap();
    let too_long = bench.memory.anywhere(65);
    bench
        .map_refused(too_long, Code::InvalidArgument, Reason::OutsideMemory)
        .await;
    let again = ends(
        bench
            .caller
            .map(bench.memory.anywhere(1))
            .await
            .unwrap()
            .range,
    );
    assert_eq!(again, first);
}

/// Who says where has nothing to wish for.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn an_address_and_a_wish_for_one_exclude_each_other() {
    let bench = Bench::new().await;
    for entry in [
        MapDirectEntry {
            align_bytes: P,
            ..bench.memory.at(8, 1)
        },
        MapDirectEntry {
            limit: Some(u64::MAX),
            ..bench.memory.at(8, 1)
        },
    ] {
        bench
            .map_refused(entry, Code::InvalidArgument, Reason::Malformed)
            .await;
    }
    bench.map(8, 1).await;
}

/// A batch is all or nothing, by the index of what failed, or each entry
/// stands for itself.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_batch_is_mapped_whole_or_not_at_all_unless_it_may_be_partial() {
    let bench = Bench::new().await;
    bench.map(16, 2).await;
    let batch = vec![
        bench.memory.at(10, 1),
        bench.memory.at(17, 1),
        bench.memory.anywhere(1),
    ];
    let before = bench.table().await;
    let refusal = refused(
        bench.caller.map_all(batch.clone(), false).await,
        Code::AlreadyExists,
        Reason::Overlap,
    );
    assert_eq!(refusal.metadata["entry_index"], "1");
    assert_names(&refusal, "hit", pages_at(16, 2));
    assert_eq!(bench.table().await, before);

    let results = bench.caller.map_all(batch, true).await.unwrap().results;
    assert_eq!(results.len(), 3);
    for (index, result) in results.into_iter().enumerate() {
        match result.outcome {
            Some(Outcome::Mapping(_)) if index != 1 => {}
            Some(Outcome::Refusal(refusal)) if index == 1 => {
                let refusal: Refused<()> = Err(refusal);
                refused(refusal, Code::AlreadyExists, Reason::Overlap);
            }
            other => panic!("{index}: {other:?}"),
        }
    }
    assert_eq!(bench.table().await.mappings.len(), 3);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn entries_of_one_batch_that_overlap_are_refused_by_the_names_of_both() {
    let bench = Bench::new().await;
    let batch = vec![
        bench.memory.at(1, 1),
        bench.memory.at(20, 4),
        bench.memory.at(23, 2),
    ];
    let before = bench.table().await;
    let refusal = refused(
        bench.caller.map_all(batch, false).await,
        Code::InvalidArgument,
        Reason::OverlappingEntries,
    );
    assert_eq!(refusal.metadata["entry_index"], "2", "{refusal:?}");
    assert_eq!(refusal.metadata["other_index"], "1", "{refusal:?}");
    assert_names(&refusal, "one", pages_at(23, 2));
    assert_names(&refusal, "other", pages_at(20, 4));
    assert_eq!(bench.table().await, before);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn the_quota_of_direct_mappings_is_kept_and_names_its_limit_and_use() {
    let limited = v1::DomainSpec {
        quotas: Some(v1::Quotas {
            direct: 3,
            ..Default::default()
        }),
        ..bare()
    };
    let bench = Bench::with(limited).await;
    bench.map(1, 1).await;
    bench.map(2, 1).await;
    let exhausted =
        |answer: Refused<()>| refused(answer, Code::ResourceExhausted, Reason::QuotaExceeded);
    let before = bench.table().await;
    let two = vec![bench.memory.at(3, 1), bench.memory.at(4, 1)];
    let refusal = exhausted(bench.caller.map_all(two, false).await.map(drop));
    assert_numbers(&refusal, &[("quota", "direct"), ("limit", "3")]);
    assert_eq!(bench.table().await, before);
    bench.map(3, 1).await;
    let refusal = exhausted(bench.caller.map(bench.memory.at(4, 1)).await.map(drop));
    let numbers = [("quota", "direct"), ("limit", "3"), ("used", "3")];
    assert_numbers(&refusal, &numbers);
    // A table of four, too; one of three in its place is fine.
    let rows = |n| (0..n).map(|k| bench.memory.row(10 + k, 1)).collect();
    let before = bench.table().await;
    let refusal = exhausted(bench.caller.set_map(rows(4)).await.map(drop));
    assert_numbers(&refusal, &[("quota", "direct"), ("limit", "3")]);
    assert_eq!(bench.table().await, before);
    assert_eq!(bench.caller.set_map(rows(3)).await.unwrap().added, 3);
    // Below what is in use it cannot go, above it can.
    let update = |direct| v1::UpdateDomainRequest {
        name: node::name("d0"),
        quotas: Some(v1::Quotas {
            direct,
            ..Default::default()
        }),
        ..Default::default()
    };
    let refusal = refused(
        bench.node.update(update(2)).await,
        Code::FailedPrecondition,
        Reason::QuotaExceeded,
    );
    assert_numbers(&refusal, &[("quota", "direct"), ("used", "3")]);
    bench.node.update(update(4)).await.unwrap();
    bench.map(30, 1).await;
}

/// Where what is bounced lies, and where coherent memory lies, nothing else
/// does: used or not.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn the_apertures_are_refused_at_their_first_and_last_page() {
    let based = v1::DomainSpec {
        aperture_base: 8 * P,
        ..spec(8 * P, 8 * P)
    };
    let bench = Bench::with(based).await;
    for (page, pages) in [(7, 2), (8, 1), (15, 2), (23, 1), (23, 2), (0, 64)] {
        let refusal = bench
            .map_refused(
                bench.memory.at(page, pages),
                Code::AlreadyExists,
                Reason::Overlap,
            )
            .await;
        let hit = u64::from_str_radix(&refusal.metadata["hit_start"][2..], 16).unwrap();
        assert!((8 * P..24 * P).contains(&hit), "{refusal:?}");
    }
    bench.map(7, 1).await;
    bench.map(24, 1).await;
    let refusal = bench.caller.unmap(8 * P, 24 * P - 1).await;
    refused(refusal, Code::NotFound, Reason::NotMapped);
}

// ---- Memory

/// Case 41.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_piece_may_end_where_its_memory_ends_and_not_later() {
    let bench = Bench::new().await;
    let entry = |offset, len_bytes| MapDirectEntry {
        offset,
        len_bytes,
        ..bench.memory.at(1, 1)
    };
    let outside = [
        (63 * P, 2 * P),
        (64 * P, P),
        (0, 65 * P),
        (P, 64 * P),
        (1 << 40, P),
    ];
    for (offset, len_bytes) in outside {
        let refusal = bench
            .map_refused(
                entry(offset, len_bytes),
                Code::InvalidArgument,
                Reason::OutsideMemory,
            )
            .await;
        let numbers = [
            ("offset", &*offset.to_string()),
            ("len_bytes", &*len_bytes.to_string()),
            ("size_bytes", &*(64 * P).to_string()),
        ];
        assert_numbers(&refusal, &numbers);
    }
    bench
        .map_refused(entry(0, 0), Code::InvalidArgument, Reason::ZeroLength)
        .await;
    bench.caller.map(entry(63 * P, P)).await.unwrap();
    bench.caller.unmap(P, 2 * P - 1).await.unwrap();
    bench.caller.map(entry(0, 64 * P)).await.unwrap();
}

/// Case 41, for a file that is no multiple of the granule: its last page is
/// not there as a whole.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_file_that_ends_within_a_page_is_mapped_up_to_that_page() {
    let mut bench = Bench::new().await;
    let odd = bench.driver.memory(2 * P + 100).await;
    let three = bench
        .map_refused(odd.at(1, 3), Code::InvalidArgument, Reason::OutsideMemory)
        .await;
    assert_numbers(&three, &[("size_bytes", "8292")]);
    let exact = MapDirectEntry {
        len_bytes: 2 * P + 100,
        ..odd.at(1, 1)
    };
    bench
        .map_refused(exact, Code::InvalidArgument, Reason::Misaligned)
        .await;
    bench.caller.map(odd.at(1, 2)).await.unwrap();
}

/// Case 42.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn read_only_memory_is_mapped_for_reading_only() {
    let mut bench = Bench::new().await;
    let memory = bench.driver.memory_as(4 * P, false, false).await;
    for perm in [Perm::Write, Perm::ReadWrite] {
        let entry = MapDirectEntry {
            perm: perm.into(),
            ..memory.at(1, 1)
        };
        let refusal = bench
            .map_refused(entry, Code::PermissionDenied, Reason::ReadOnly)
            .await;
        assert_eq!(refusal.metadata["memory_id"], memory.id.to_string());
    }
    let entry = MapDirectEntry {
        perm: Perm::Read.into(),
        ..memory.at(1, 1)
    };
    bench.caller.map(entry).await.unwrap();
    let refusal = bench.caller.translate(P, P, Perm::Write).await;
    refused(refusal, Code::PermissionDenied, Reason::PermTooSmall);
}

/// Case 19, case 44: what could shrink is not accepted, what was accepted
/// cannot shrink, and what has grown since is as large as it was.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_source_that_ends_half_way_is_refused_as_a_whole() {
    let mut bench = Bench::new().await;
    let unsealed = files::memfd(4 * P, rustix::fs::SealFlags::empty());
    refused(
        bench.driver.register(&unsealed, true).await,
        Code::InvalidArgument,
        Reason::MemoryRefused,
    );
    rustix::fs::ftruncate(&bench.memory.fd, 32 * P).expect_err("sealed");

    let fd = files::good_memfd(2 * P);
    let id = bench.driver.register(&fd, true).await.unwrap().memory_id;
    let memory = Memory { fd, id };
    rustix::fs::ftruncate(&memory.fd, 8 * P).unwrap();
    let batch = vec![memory.at(1, 2), memory.at(10, 4)];
    let before = bench.table().await;
    let refusal = refused(
        bench.caller.map_all(batch, false).await,
        Code::InvalidArgument,
        Reason::OutsideMemory,
    );
    assert_eq!(refusal.metadata["entry_index"], "1");
    assert_eq!(bench.table().await, before, "no partial entry");
    bench.caller.map(memory.at(10, 2)).await.unwrap();
    rustix::fs::ftruncate(&memory.fd, P).expect_err("sealed");
}

/// Case 46.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn one_file_aliases_at_two_addresses_and_for_two_sessions() {
    let bench = Bench::new().await;
    let mut other = Raw::driver(&bench.node, "d0").await;
    let theirs = other.register(&bench.memory.fd, true).await.unwrap();
    assert_ne!(theirs.memory_id, bench.memory.id, "a registration each");
    bench.map(10, 4).await;
    bench.map(20, 4).await;
    let entry = MapDirectEntry {
        memory_id: theirs.memory_id,
        ..bench.memory.at(30, 4)
    };
    Caller::session(&other).map(entry).await.unwrap();
    // The same byte of the file, by three addresses, for everybody.
    for caller in [&bench.caller, &Caller::session(&other)] {
        for (page, memory) in [
            (10, bench.memory.id),
            (20, bench.memory.id),
            (30, theirs.memory_id),
        ] {
            let at = (page + 2) * P + 5;
            let pieces = caller.translate(at, at, Perm::ReadWrite).await.unwrap();
            assert_eq!(pieces.len(), 1);
            assert_eq!((pieces[0].memory_id, pieces[0].offset), (memory, 2 * P + 5));
        }
    }
    // Each may give its own back, and only when it is not mapped.
    let refusal = refused(
        other.unregister(theirs.memory_id).await,
        Code::FailedPrecondition,
        Reason::MemoryInUse,
    );
    assert_numbers(&refusal, &[("direct_mappings", "1")]);
    Caller::session(&other)
        .unmap(30 * P, 34 * P - 1)
        .await
        .unwrap();
    other.unregister(theirs.memory_id).await.unwrap();
    assert_eq!(bench.table().await.mappings.len(), 2, "the others stay");
}

/// A page of memory may be bounced and mapped directly at the same time.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn memory_in_use_either_way_is_not_unregistered() {
    let mut bench = Bench::with(spec(16 * P, 0)).await;
    let streaming = bench.driver.map(bench.memory.entry(0, P, ToDevice)).await;
    let streaming = streaming.unwrap();
    bench.map(100, 1).await;
    let in_use = async |driver: &mut Raw, id, mappings, direct| {
        let refusal = refused(
            driver.unregister(id).await,
            Code::FailedPrecondition,
            Reason::MemoryInUse,
        );
        let numbers = [("mappings", mappings), ("direct_mappings", direct)];
        for (key, value) in numbers {
            assert_eq!(refusal.metadata[key], value, "{refusal:?}");
        }
    };
    let id = bench.memory.id;
    in_use(&mut bench.driver, id, "1", "1").await;
    bench.driver.unmap(&streaming, None).await.unwrap();
    in_use(&mut bench.driver, id, "0", "1").await;
    let memories = v1::ListMemoriesRequest {
        domain: node::name("d0"),
        ..Default::default()
    };
    let mut sessions = bench.node.admin().sessions();
    let listed = sessions.list_memories(memories).await.unwrap().into_inner();
    let counts: Vec<_> = listed
        .memories
        .iter()
        .map(|memory| (memory.mappings, memory.direct_mappings))
        .collect();
    assert_eq!(counts, [(0, 1)]);
    bench.caller.unmap(100 * P, 101 * P - 1).await.unwrap();
    bench.driver.unregister(id).await.unwrap();
}

// ---- ClearMap

/// Case 51.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn clear_map_removes_what_overlaps_and_takes_absence_for_success() {
    let bench = Bench::new().await;
    for page in [10, 20, 30] {
        bench.map(page, 4).await;
    }
    let absent = pages_at(50, 4);
    let cleared = bench.caller.clear(&[pages_at(20, 4), absent]).await;
    assert_eq!(cleared, Ok((1, 4 * P)));
    let starts: Vec<_> = bench.table().await.mappings.iter().map(|m| m.0).collect();
    assert_eq!(starts, [10 * P, 30 * P]);
    // Nothing there is no change.
    let before = bench.table().await;
    assert_eq!(bench.caller.clear(&[absent, absent]).await, Ok((0, 0)));
    assert_eq!(bench.table().await, before);
    // Ranges that overlap each other count once what they hit.
    let cleared = bench.caller.clear(&[(0, u64::MAX), (0, u64::MAX)]).await;
    assert_eq!(cleared, Ok((2, 8 * P)));
    assert_eq!(bench.table().await.mappings, []);
}

/// Case 62.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn one_byte_of_a_mapping_clears_it_whole() {
    let bench = Bench::new().await;
    for byte in [0, 1, P - 1, P, 4 * P - 1] {
        bench.map(10, 4).await;
        bench.map(9, 1).await;
        bench.map(14, 1).await;
        let at = 10 * P + byte;
        assert_eq!(bench.caller.clear(&[(at, at)]).await, Ok((1, 4 * P)));
        let hole = bench.caller.translate(at, at, Perm::Read).await;
        refused(hole, Code::NotFound, Reason::NotMapped);
        assert_eq!(bench.table().await.mappings.len(), 2, "the neighbours stay");
        bench.caller.clear(&[EVERYTHING]).await.unwrap();
    }
    let invalid = Code::InvalidArgument;
    let backwards = bench.caller.clear(&[(P, P - 1)]).await;
    refused(backwards, invalid, Reason::InvalidRange);
    refused(bench.caller.clear(&[]).await, invalid, Reason::Malformed);
}

// ---- Who may

/// A device reads the table and changes nothing.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_device_may_look_and_not_change() {
    let bench = Bench::with(spec(16 * P, 16 * P)).await;
    bench.map(100, 2).await;
    let attached = Raw::device(&bench.node, "d0").await;
    let device = Caller::session(&attached);
    let before = bench.table().await;
    let row = bench.memory.row(100, 2);
    let answers = [
        device.map(bench.memory.at(200, 1)).await.map(drop),
        device.unmap(100 * P, 102 * P - 1).await.map(drop),
        device.clear(&[EVERYTHING]).await.map(drop),
        device.set_map(vec![row]).await.map(drop),
        device.stream(device.chunked(&[row], 1)).await.map(drop),
        device.reset(true).await.map(drop),
    ];
    for answer in answers {
        refused(answer, Code::PermissionDenied, Reason::WrongRole);
    }
    assert_eq!(bench.table().await, before);
    let pieces = device.translate(100 * P, 100 * P, Perm::Read).await;
    assert_eq!(pieces.unwrap().len(), 1);
    assert_eq!(device.lookup(0, u64::MAX).await.unwrap().iova, 100 * P);
    assert_eq!(device.list_all(Default::default()).await.len(), 1);
}

/// Another session's memory, and what is mapped of it.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn what_belongs_to_another_session_is_denied_and_stays() {
    let bench = Bench::new().await;
    bench.map(10, 2).await;
    let mut other = Raw::driver(&bench.node, "d0").await;
    let own = other.memory(4 * P).await;
    let caller = Caller::session(&other);
    caller.map(own.at(12, 2)).await.unwrap();
    let before = bench.table().await;
    let (denied, not_yours) = (Code::PermissionDenied, Reason::NotYours);
    refused(caller.map(bench.memory.at(20, 1)).await, denied, not_yours);
    // Also where some of what is hit is the caller's own.
    for range in [pages_at(10, 2), pages_at(10, 4), EVERYTHING] {
        let refusal = refused(caller.unmap(range.0, range.1).await, denied, not_yours);
        assert_names(&refusal, "mapping", pages_at(10, 2));
        let refusal = refused(caller.clear(&[range]).await, denied, not_yours);
        assert_names(&refusal, "mapping", pages_at(10, 2));
    }
    for table in [vec![], vec![own.row(12, 2)], vec![bench.memory.row(10, 2)]] {
        refused(caller.set_map(table).await, denied, not_yours);
    }
    assert_eq!(bench.table().await, before);
    // Its own it may end, and the owner all.
    assert_eq!(caller.unmap(12 * P, 14 * P - 1).await, Ok((1, 2 * P)));
    let owner = Caller::owner(&bench.node, "d0").await;
    assert_eq!(owner.clear(&[EVERYTHING]).await, Ok((1, 2 * P)));
}

/// The owner and the operator need no session, and use any memory.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn the_owner_and_the_operator_map_any_memory_without_a_session() {
    let bench = Bench::with(spec(16 * P, 0)).await;
    let owner = Caller::owner(&bench.node, "d0").await;
    for caller in [owner, Caller::operator(&bench.node, "d0")] {
        let chosen = caller.map(bench.memory.anywhere(2)).await.unwrap();
        caller.map(bench.memory.at(100, 1)).await.unwrap();
        let listed = caller.list_all(Default::default()).await;
        assert_eq!(listed.len(), 2);
        for mapping in &listed {
            // It is the session's, whose memory it is.
            assert_eq!(mapping.session, bench.driver.name());
            assert!(!mapping.persistent && mapping.mapping_id == 0);
        }
        let (start, last) = ends(chosen.range);
        assert_eq!(caller.unmap(start, last).await, Ok((1, 2 * P)));
        let set = caller.set_map(vec![bench.memory.row(40, 1)]).await.unwrap();
        assert_eq!((set.added, set.removed), (1, 1));
        assert_eq!(caller.clear(&[pages_at(40, 1)]).await, Ok((1, P)));
        assert_eq!(caller.reset(false).await, Ok(0));
        refused(
            caller.map(bench.memory.at(1, 1)).await,
            Code::AlreadyExists,
            Reason::Overlap,
        );
        let unknown = caller.naming("domains/d1");
        refused(
            unknown.map(bench.memory.at(50, 1)).await,
            Code::NotFound,
            Reason::NoSuchDomain,
        );
        // Without a token somebody must say where.
        let nowhere = caller.naming("").clear(&[EVERYTHING]).await.unwrap_err();
        let codes = [Code::InvalidArgument, Code::PermissionDenied];
        assert!(codes.contains(&nowhere.grpc_code()), "{nowhere:?}");
    }
}

/// A session acts in its own domain, whether it names it or not.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_session_that_names_another_domain_finds_none() {
    let bench = Bench::new().await;
    bench.node.create("d1", bare()).await.unwrap();
    let named = bench.caller.naming("domains/d0");
    named.map(bench.memory.at(1, 1)).await.unwrap();
    for domain in ["domains/d1", "domains/d2"] {
        let wrong = bench.caller.naming(domain);
        let answers = [
            wrong.map(bench.memory.at(9, 1)).await.map(drop),
            wrong.unmap(0, u64::MAX).await.map(drop),
            wrong.set_map(vec![]).await.map(drop),
            wrong.stream(wrong.chunked(&[], 1)).await.map(drop),
            wrong.clear(&[EVERYTHING]).await.map(drop),
            wrong.reset(true).await.map(drop),
            wrong.translate(P, P, Perm::Read).await.map(drop),
            wrong.lookup(0, 9).await.map(drop),
            wrong.list(Default::default()).await.map(drop),
        ];
        for answer in answers {
            refused(answer, Code::NotFound, Reason::NoSuchDomain);
        }
    }
    assert_eq!(bench.table().await.mappings.len(), 1);
}

/// D13 for direct mappings: two domains have the same addresses, and nothing
/// in common but the file.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn two_domains_have_direct_tables_of_their_own() {
    let bench = Bench::new().await;
    bench.node.create("d1", bare()).await.unwrap();
    let mut other = Raw::driver(&bench.node, "d1").await;
    let id = other
        .register(&bench.memory.fd, true)
        .await
        .unwrap()
        .memory_id;
    bench.map(10, 4).await;
    let there = Caller::session(&other);
    let hole = there.translate(10 * P, 10 * P, Perm::Read).await;
    refused(hole, Code::NotFound, Reason::NotMapped);
    let entry = MapDirectEntry {
        memory_id: id,
        offset: P,
        ..bench.memory.at(10, 2)
    };
    there.map(entry).await.unwrap();
    bench.caller.clear(&[EVERYTHING]).await.unwrap();
    let pieces = there
        .translate(10 * P, 12 * P - 1, Perm::Read)
        .await
        .unwrap();
    assert_eq!((pieces[0].memory_id, pieces[0].offset), (id, P));
    // A memory's id is that of its domain, too.
    let foreign = MapDirectEntry {
        memory_id: 77,
        ..bench.memory.at(1, 1)
    };
    refused(
        there.map(foreign).await,
        Code::NotFound,
        Reason::NoSuchMemory,
    );
}

/// Case 68, as far as it goes without invalidation: who leaves a domain for
/// another has the addresses of the other one.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_client_that_changes_its_domain_has_the_other_ones_translations() {
    let bench = Bench::new().await;
    bench.node.create("d1", bare()).await.unwrap();
    let fd = files::reopen(&bench.memory.fd, rustix::fs::OFlags::RDWR);
    bench.map(10, 1).await;
    let old = bench.caller.clone();
    drop(bench.driver);
    let look = async || {
        let usage = bench.node.usage("d0").await;
        (usage.sessions, usage.memories, usage.direct_mappings)
    };
    wait::until_equal("the end of the session", (0, 0, 0), look).await;
    let mut again = Raw::driver(&bench.node, "d1").await;
    let id = again.register(&fd, true).await.unwrap().memory_id;
    let caller = Caller::session(&again);
    let hole = caller.translate(10 * P, 10 * P, Perm::Read).await;
    refused(hole, Code::NotFound, Reason::NotMapped);
    let entry = MapDirectEntry {
        memory_id: id,
        ..bench.memory.at(20, 1)
    };
    caller.map(entry).await.unwrap();
    caller.translate(20 * P, 20 * P, Perm::Read).await.unwrap();
    refused(
        old.translate(10 * P, 10 * P, Perm::Read).await,
        Code::NotFound,
        Reason::NoSuchSession,
    );
}

// ---- Lifetime

/// D15 for direct mappings: killed, whoever has made them; others' stay.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn direct_mappings_of_a_killed_sessions_memory_are_gone_and_others_stay() {
    let node = Node::start().await;
    node.domain("d0").await;
    let mut driver = Raw::driver(&node, "d0").await;
    let memory = driver.memory(P).await;
    let own = Caller::session(&driver);
    own.map(memory.at(1_000_000, 1)).await.unwrap();
    let (counts, before) = (node.counts().await, node.usage("d0").await);
    let mappings = node.mappings("d0").await;
    let owner = Caller::operator(&node, "d0");
    for _ in 0..3 {
        let mut victim = Actor::driver(&node, "d0");
        let buffer = victim.buffer(64 * P);
        let entry = |page| MapDirectEntry {
            memory_id: buffer,
            ..memory.at(page, 1)
        };
        let entries = (0..500).map(|k| entry(2_000_000 + 2 * k)).collect();
        owner.map_all(entries, false).await.unwrap();
        assert_eq!(node.usage("d0").await.direct_mappings, 501);

        victim.kill();

        node.until_usage("d0", before).await;
        node.until_counts(counts).await;
        assert_eq!(node.mappings("d0").await, mappings);
    }
    assert_eq!(own.unmap(0, u64::MAX).await, Ok((1, P)));
    drop(driver);
}

/// What belongs to the domain stays when its maker is killed, and any driver
/// may end it and give the memory back.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_persistent_memory_keeps_its_mappings_when_its_session_ends() {
    let node = Node::start().await;
    node.create("d0", bare()).await.unwrap();
    let mut maker = Raw::driver(&node, "d0").await;
    let stays = maker.memory_as(4 * P, true, true).await;
    let goes = maker.memory_as(4 * P, true, false).await;
    files::poke(&stays.fd, P, b"outlives its maker");
    let table = vec![stays.row(10, 2), goes.row(20, 2), stays.row(30, 4)];
    Caller::session(&maker).set_map(table).await.unwrap();
    let listed = node.mappings("d0").await;
    let flags: Vec<_> = listed
        .iter()
        .map(|m| (m.persistent, m.session.is_empty()))
        .collect();
    assert_eq!(flags, [(true, true), (false, false), (true, true)]);
    let kept: Vec<_> = [&listed[0], &listed[2]].map(Clone::clone).into();

    drop(maker);

    let look = async || node.mappings("d0").await;
    wait::until_equal("what stays", kept, look).await;
    let look = async || {
        let usage = node.usage("d0").await;
        (usage.sessions, usage.memories, usage.direct_mappings)
    };
    wait::until_equal("the rest", (0, 1, 2), look).await;
    let mut heir = Raw::driver(&node, "d0").await;
    let caller = Caller::session(&heir);
    let pieces = caller.translate(11 * P, 11 * P, Perm::Read).await.unwrap();
    assert_eq!((pieces[0].memory_id, pieces[0].offset), (stays.id, P));
    // It is the domain's: the heir may use it, end it, and give it back.
    caller.map(stays.at(40, 1)).await.unwrap();
    refused(
        heir.unregister(stays.id).await,
        Code::FailedPrecondition,
        Reason::MemoryInUse,
    );
    assert_eq!(caller.unmap(0, u64::MAX).await, Ok((3, 7 * P)));
    heir.unregister(stays.id).await.unwrap();
    assert_eq!(node.usage("d0").await.memories, 0);
}

/// A persistent memory is something that the domain holds.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_domain_with_direct_mappings_is_in_use_and_force_takes_them_along() {
    let node = Node::start().await;
    let counts = node.counts().await;
    node.create("d0", bare()).await.unwrap();
    let mut maker = Raw::driver(&node, "d0").await;
    let memory = maker.memory_as(4 * P, true, true).await;
    let caller = Caller::session(&maker);
    caller.map(memory.at(10, 2)).await.unwrap();
    drop((maker, caller));
    let look = async || node.usage("d0").await.sessions;
    wait::until_equal("the end of the session", 0, look).await;

    let refusal = refused(
        node.delete("d0", false).await,
        Code::FailedPrecondition,
        Reason::DomainInUse,
    );
    let numbers = [
        ("sessions", "0"),
        ("memories", "1"),
        ("direct_mappings", "1"),
    ];
    for (key, value) in numbers {
        assert_eq!(refusal.metadata[key], value, "{refusal:?}");
    }
    assert_eq!(node.mappings("d0").await.len(), 1);
    node.delete("d0", true).await.unwrap();
    node.until_counts(counts).await;
}

/// Many at once: every address has one owner, whoever was faster.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_many_that_want_the_same_address_one_gets_it() {
    let bench = Bench::new().await;
    for page in 0..20 {
        let race: Vec<_> = (0..8)
            .map(|_| {
                let (caller, entry) = (bench.caller.clone(), bench.memory.at(3 * page, 2));
                tokio::spawn(async move { caller.map(entry).await })
            })
            .collect();
        let mut winners = 0;
        for runner in race {
            match runner.await.unwrap() {
                Ok(_) => winners += 1,
                Err(refusal) => assert_eq!(refusal.reason(), Reason::Overlap),
            }
        }
        assert_eq!(winners, 1);
    }
    assert_eq!(bench.caller.unmap(0, u64::MAX).await, Ok((20, 40 * P)));
}

/// A process that is stopped while it owns memory harms nobody's table.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_stopped_owner_does_not_keep_its_mappings_from_being_ended() {
    let node = Node::start().await;
    node.create("d0", bare()).await.unwrap();
    let mut hung = Actor::start(&node);
    let session = hung.attach("d0", v1::Role::Driver);
    let buffer = hung.buffer(4 * P);
    let owner = Caller::operator(&node, "d0");
    let row = |page| v1::DirectMapping {
        range: Some(direct::range(page * P, page * P + P - 1)),
        memory_id: buffer,
        offset: 0,
        perm: Perm::Read.into(),
    };
    owner.set_map(vec![row(1), row(2)]).await.unwrap();
    children::stop(hung.pid());
    assert_eq!(owner.unmap(P, 2 * P - 1).await, Ok((1, P)));
    node.evict(&session).await.unwrap();
    let look = async || node.usage("d0").await.direct_mappings;
    wait::until_equal("the end of the session", 0, look).await;
}
