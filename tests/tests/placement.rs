//! Where direct mappings lie that name no address, and where none may lie:
//! cases 20 to 35 of CASES.md.

use domaind_tests::direct::{EVERYTHING, Table, bare, ends, range, wire_ranges};
use domaind_tests::node::{self, spec};
use domaind_tests::raw::Memory;
use domaind_tests::refusal::assert_numbers;
use domaind_tests::v1::{self, MapDirectEntry};
use domaind_tests::{Caller, Code, Node, P, Raw, Reason, Refused, refused};

struct Bench {
    node: Node,
    _driver: Raw,
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
        let memory = driver.memory(1_024 * P).await;
        let caller = Caller::session(&driver);
        Bench {
            node,
            _driver: driver,
            memory,
            caller,
        }
    }

    /// Maps so many pages somewhere, and says where.
    async fn place(&self, pages: u64) -> (u64, u64) {
        let (start, last) = self.try_place(self.memory.anywhere(pages)).await.unwrap();
        assert_eq!((start % P, last - start + 1), (0, pages * P));
        (start, last)
    }

    async fn try_place(&self, entry: MapDirectEntry) -> Refused<(u64, u64)> {
        self.caller
            .map(entry)
            .await
            .map(|mapping| ends(mapping.range))
    }

    async fn exhausted(&self, entry: MapDirectEntry) -> v1::Refusal {
        let before = Table::of(&self.node, "d0").await;
        let (code, reason) = (Code::ResourceExhausted, Reason::NoSpace);
        let refusal = refused(self.try_place(entry).await, code, reason);
        assert_eq!(Table::of(&self.node, "d0").await, before);
        refusal
    }

    async fn reserve(&self, ranges: &[(u64, u64)]) -> Refused<v1::Domain> {
        self.node.update(reserved(ranges)).await
    }

    async fn allow(&self, ranges: &[(u64, u64)]) -> Refused<v1::Domain> {
        self.node.update(allowed(ranges)).await
    }

    async fn direct_ranges(&self) -> Vec<(u64, u64)> {
        pairs(&self.node.get("d0").await.unwrap().direct_ranges)
    }
}

fn list(ranges: &[(u64, u64)]) -> v1::IovaRangeList {
    v1::IovaRangeList {
        ranges: wire_ranges(ranges),
    }
}

fn reserved(ranges: &[(u64, u64)]) -> v1::UpdateDomainRequest {
    v1::UpdateDomainRequest {
        name: node::name("d0"),
        reserved: Some(list(ranges)),
        ..Default::default()
    }
}

fn allowed(ranges: &[(u64, u64)]) -> v1::UpdateDomainRequest {
    v1::UpdateDomainRequest {
        name: node::name("d0"),
        allowed: Some(list(ranges)),
        ..Default::default()
    }
}

fn pairs(ranges: &[v1::IovaRange]) -> Vec<(u64, u64)> {
    ranges
        .iter()
        .map(|range| (range.start, range.last))
        .collect()
}

fn overlap(one: (u64, u64), other: (u64, u64)) -> bool {
    one.0 <= other.1 && other.0 <= one.1
}

// ---- Automatic placement

/// Case 20.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn ten_placed_pages_are_ten_distinct_addresses_none_of_them_0() {
    let bench = Bench::new().await;
    let mut starts = Vec::new();
    for _ in 0..10 {
        starts.push(bench.place(1).await.0);
    }
    starts.sort_unstable();
    starts.dedup();
    assert_eq!(starts.len(), 10);
    assert!(starts[0] >= P, "0 is never chosen");
    // Though it may be asked for.
    let zero = bench.try_place(bench.memory.at(0, 1)).await;
    assert_eq!(zero, Ok((0, P - 1)));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn page_0_is_not_chosen_even_where_nothing_else_is_left() {
    let tiny = v1::DomainSpec {
        iova_limit: Some(4 * P - 1),
        ..spec(0, 0)
    };
    let bench = Bench::with(tiny).await;
    assert_eq!(bench.place(3).await, (P, 4 * P - 1));
    let refusal = bench.exhausted(bench.memory.anywhere(1)).await;
    assert_numbers(&refusal, &[("largest_hole_bytes", "0")]);
    bench.caller.clear(&[EVERYTHING]).await.unwrap();
    bench.allow(&[(0, P - 1)]).await.unwrap();
    bench.exhausted(bench.memory.anywhere(1)).await;
}

/// D1: a limit that is not k*P-1 never yields a byte above it.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_granule_that_the_limit_cuts_is_never_given() {
    for cut in [0, 1, 100, P - 2] {
        let limited = v1::DomainSpec {
            iova_limit: Some(8 * P + cut),
            ..spec(0, 0)
        };
        let bench = Bench::with(limited).await;
        for _ in 1..8 {
            let (_, last) = bench.place(1).await;
            assert!(last < 8 * P);
        }
        bench.exhausted(bench.memory.anywhere(1)).await;
        let refusal = bench.try_place(bench.memory.at(8, 1)).await;
        let refusal = refused(refusal, Code::OutOfRange, Reason::PastIovaLimit);
        let limit = format!("{:#x}", 8 * P + cut);
        assert_numbers(&refusal, &[("iova_limit", &limit)]);
    }
}

/// Case 22.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn nothing_is_placed_in_a_reserved_range() {
    let bench = Bench::new().await;
    let kept = (4 * P, 104 * P - 1);
    bench.reserve(&[kept]).await.unwrap();
    let mut placed = Vec::new();
    for pages in 1..=10 {
        let at = bench.place(pages).await;
        assert!(!overlap(at, kept), "{at:x?}");
        assert!(placed.iter().all(|other| !overlap(at, *other)));
        placed.push(at);
    }
}

/// Case 23, case 24.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn what_is_placed_lies_in_the_allowed_ranges_until_they_are_lifted() {
    let bench = Bench::new().await;
    let domain = bench.allow(&[(200 * P, 600 * P - 1)]).await.unwrap();
    assert_eq!(pairs(&domain.allowed), [(200 * P, 600 * P - 1)]);
    for pages in 1..=10 {
        let (start, last) = bench.place(pages).await;
        assert!(200 * P <= start && last < 600 * P, "{start:#x}");
    }
    // Who names an address is not concerned.
    bench.try_place(bench.memory.at(700, 1)).await.unwrap();
    // One window that is too small and one that is not.
    let windows = [(800 * P, 803 * P - 1), (900 * P, 905 * P - 1)];
    bench.allow(&windows).await.unwrap();
    let at = bench.place(5).await;
    assert_eq!(at, (900 * P, 905 * P - 1));

    let domain = bench.allow(&[]).await.unwrap();
    assert_eq!(domain.allowed, []);
    let (start, last) = bench.place(500).await;
    assert!(
        windows
            .iter()
            .all(|window| !overlap((start, last), *window) || last > window.1)
    );
}

/// Case 25.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn an_allowed_window_can_be_filled_to_the_last_page() {
    let bench = Bench::new().await;
    let window = (200 * P, 216 * P - 1);
    bench.allow(&[window]).await.unwrap();
    let too_large = bench.exhausted(bench.memory.anywhere(17)).await;
    let (want, hole) = ((17 * P).to_string(), (16 * P).to_string());
    let numbers = [("want_bytes", &*want), ("largest_hole_bytes", &*hole)];
    assert_numbers(&too_large, &numbers);
    for pages in [7, 1, 5, 3] {
        let at = bench.place(pages).await;
        assert!(window.0 <= at.0 && at.1 <= window.1);
    }
    let full = bench.exhausted(bench.memory.anywhere(1)).await;
    assert_numbers(&full, &[("largest_hole_bytes", "0")]);
    // What is given back is given again, exactly.
    let mappings = Table::of(&bench.node, "d0").await.mappings;
    let one = mappings[1];
    bench.caller.unmap(one.0, one.1).await.unwrap();
    let pages = (one.1 - one.0 + 1) / P;
    bench.exhausted(bench.memory.anywhere(pages + 1)).await;
    assert_eq!(bench.place(pages).await, (one.0, one.1));
}

/// Case 26.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_length_of_half_the_space_is_out_of_range_and_no_hang() {
    let bench = Bench::new().await;
    let before = Table::of(&bench.node, "d0").await;
    for len_bytes in [1 << 63, (1 << 63) + P, u64::MAX - P + 1] {
        for iova in [None, Some(0), Some(P)] {
            let entry = MapDirectEntry {
                len_bytes,
                iova,
                ..bench.memory.anywhere(1)
            };
            let refusal = bench.caller.map(entry).await.unwrap_err();
            assert_eq!(refusal.grpc_code(), Code::OutOfRange, "{refusal:?}");
            assert_eq!(refusal.metadata["entry_index"], "0");
        }
    }
    assert_eq!(Table::of(&bench.node, "d0").await, before);
}

/// Case 29: below a limit there is room, however full it is above.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_limited_request_finds_its_place_below_a_hundred_thousand_others() {
    let bench = Bench::new().await;
    let above = |k: u64| bench.memory.row((1 << 20) + 2 * k, 1);
    let table: Vec<_> = (0..100_000).map(above).collect();
    let messages = bench.caller.chunked(&table, 2_000);
    bench.caller.stream(messages).await.unwrap();
    let limited = MapDirectEntry {
        limit: Some((1 << 32) - 1),
        ..bench.memory.anywhere(3)
    };
    let mut placed: Vec<(u64, u64)> = Vec::new();
    for _ in 0..50 {
        let at = bench.try_place(limited).await.unwrap();
        assert!(at.0 >= P && at.1 < 1 << 32);
        assert!(placed.iter().all(|other| !overlap(at, *other)));
        placed.push(at);
    }
    // The holes of one page between those above are found as well.
    bench
        .allow(&[(1 << 32, (1 << 32) + 199_999 * P - 1)])
        .await
        .unwrap();
    let at = bench.place(1).await;
    assert!(at.0 >= 1 << 32 && (at.0 / P) % 2 == 1);
    bench.exhausted(bench.memory.anywhere(2)).await;
}

/// D4 for direct mappings.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn alignment_and_limit_are_kept_where_the_address_is_chosen() {
    let bench = Bench::new().await;
    for pages in 1..=64_u64 {
        let align_bytes = (pages * P).next_power_of_two();
        let entry = MapDirectEntry {
            align_bytes,
            ..bench.memory.anywhere(pages)
        };
        let at = bench.try_place(entry).await.unwrap();
        assert_eq!(at.0 % align_bytes, 0, "{pages}");
    }
    bench.caller.clear(&[EVERYTHING]).await.unwrap();
    for align_bytes in [3, 4_097, 12_288, u64::MAX] {
        let entry = MapDirectEntry {
            align_bytes,
            ..bench.memory.anywhere(1)
        };
        let refusal = refused(
            bench.try_place(entry).await,
            Code::InvalidArgument,
            Reason::Misaligned,
        );
        assert_numbers(&refusal, &[("align_bytes", &align_bytes.to_string())]);
    }
    let limited = |limit| MapDirectEntry {
        limit: Some(limit),
        ..bench.memory.anywhere(2)
    };
    for limit in [0, P, 3 * P - 2] {
        bench.exhausted(limited(limit)).await;
    }
    let at = bench.try_place(limited(3 * P - 1)).await;
    assert_eq!(at, Ok((P, 3 * P - 1)));
    bench.exhausted(limited(3 * P - 1)).await;
    // No limit is beyond the domain's own.
    let at = bench.try_place(limited(u64::MAX)).await.unwrap();
    assert!(at.1 < u64::MAX - P);
}

/// Neither in an aperture, nor across it.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn what_is_placed_goes_around_the_apertures() {
    let between = v1::DomainSpec {
        aperture_base: 4 * P,
        iova_limit: Some(32 * P - 1),
        ..spec(8 * P, 8 * P)
    };
    let bench = Bench::with(between).await;
    assert_eq!(
        bench.direct_ranges().await,
        [(0, 4 * P - 1), (20 * P, 32 * P - 1)]
    );
    let refusal = bench.exhausted(bench.memory.anywhere(13)).await;
    let hole = (12 * P).to_string();
    assert_numbers(&refusal, &[("largest_hole_bytes", &hole)]);
    assert_eq!(bench.place(12).await, (20 * P, 32 * P - 1));
    assert_eq!(bench.place(3).await, (P, 4 * P - 1));
    bench.exhausted(bench.memory.anywhere(1)).await;
}

// ---- Reserved and allowed ranges

/// Case 30.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn what_is_mapped_cannot_be_reserved() {
    let bench = Bench::with(spec(16 * P, 16 * P)).await;
    let taken = bench.memory.at(100, 4);
    bench.try_place(taken).await.unwrap();
    let old = [(1_000 * P, 1_001 * P - 1)];
    bench.reserve(&old).await.unwrap();
    let before = bench.node.get("d0").await.unwrap();
    let hits = [
        (0, u64::MAX),
        (100 * P, 100 * P),
        (104 * P - 1, 104 * P - 1),
        (90 * P, 101 * P),
        // The apertures.
        (0, 0),
        (16 * P - 1, 16 * P - 1),
        (16 * P, 16 * P),
        (32 * P - 1, 40 * P),
    ];
    for hit in hits {
        // Also behind one that is fine.
        for ranges in [vec![hit], vec![(2_000 * P, 2_000 * P), hit]] {
            if overlap(ranges[0], hit) && ranges.len() == 2 {
                continue;
            }
            let refusal = refused(
                bench.reserve(&ranges).await,
                Code::AlreadyExists,
                Reason::Overlap,
            );
            let text = format!("{:#x}", hit.0);
            assert_eq!(refusal.metadata["range_start"], text, "{refusal:?}");
            assert!(refusal.metadata.contains_key("hit_start"), "{refusal:?}");
            assert_eq!(bench.node.get("d0").await.unwrap(), before);
        }
    }
    let around = [(99 * P, 100 * P - 1), (104 * P, 104 * P)];
    bench.reserve(&around).await.expect("beside it");
}

/// Case 32.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn lists_that_are_none_are_refused_and_the_old_ones_stay() {
    let bench = Bench::new().await;
    let (kept, open) = ((P, 2 * P - 1), (10 * P, 20 * P - 1));
    bench.reserve(&[kept]).await.unwrap();
    bench.allow(&[open]).await.unwrap();
    let before = bench.node.get("d0").await.unwrap();
    let invalid = Code::InvalidArgument;
    let (backwards, overlapping) = (Reason::InvalidRange, Reason::OverlappingEntries);
    let many: Vec<_> = (0..1_025).map(|k| (4 * k * P, (4 * k + 1) * P)).collect();
    let both = [
        (vec![(5, 4)], backwards),
        (vec![(u64::MAX, 0)], backwards),
        (vec![(30 * P, 40 * P), (9, 8)], backwards),
        (vec![(P, 3 * P), (3 * P, 4 * P)], overlapping),
        (vec![(5 * P, 6 * P), (0, u64::MAX)], overlapping),
        (vec![(7 * P, 8 * P), (7 * P, 8 * P)], overlapping),
        (many, Reason::Malformed),
    ];
    for (ranges, reason) in &both {
        refused(bench.allow(ranges).await, invalid, *reason);
        refused(bench.reserve(ranges).await, invalid, *reason);
        let spec = v1::DomainSpec {
            reserved: wire_ranges(ranges),
            ..bare()
        };
        refused(bench.node.create("d1", spec).await, invalid, *reason);
        let spec = v1::DomainSpec {
            allowed: wire_ranges(ranges),
            ..bare()
        };
        refused(bench.node.create("d1", spec).await, invalid, *reason);
    }
    for byte in [0, P, u64::MAX] {
        refused(bench.allow(&[(byte, byte)]).await, invalid, backwards);
        let spec = v1::DomainSpec {
            allowed: vec![range(byte, byte)],
            ..bare()
        };
        refused(bench.node.create("d1", spec).await, invalid, backwards);
    }
    assert_eq!(bench.node.get("d0").await.unwrap(), before);
    // A good list beside a bad one is not taken either.
    let half = v1::UpdateDomainRequest {
        reserved: Some(list(&[(50 * P, 60 * P)])),
        scrub: v1::Scrub::OnUnmap.into(),
        quotas: Some(v1::Quotas {
            direct: 7,
            ..Default::default()
        }),
        ..allowed(&[(5, 4)])
    };
    refused(bench.node.update(half).await, invalid, backwards);
    assert_eq!(bench.node.get("d0").await.unwrap(), before);
    let (start, last) = bench.place(10).await;
    assert_eq!((start, last), open);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_list_may_have_1024_ranges_and_touching_ones() {
    let bench = Bench::new().await;
    let most: Vec<_> = (0..1_024).map(|k| (k * P, k * P + P - 1)).collect();
    let domain = bench.allow(&most).await.unwrap();
    assert_eq!(domain.allowed.len(), 1_024);
    let kept: Vec<_> = (0..1_024)
        .map(|k| ((2_000 + 2 * k) * P, (2_000 + 2 * k) * P))
        .collect();
    let domain = bench.reserve(&kept).await.unwrap();
    assert_eq!(domain.reserved.len(), 1_024);
    assert_eq!(domain.direct_ranges.len(), 1_025);
    bench.place(1).await;
}

/// Case 33.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn the_ranges_query_shows_the_space_without_what_is_reserved() {
    let bench = Bench::new().await;
    assert_eq!(bench.direct_ranges().await, [(0, u64::MAX)]);
    bench.reserve(&[(P, 2 * P - 1)]).await.unwrap();
    let two = [(0, P - 1), (2 * P, u64::MAX)];
    assert_eq!(bench.direct_ranges().await, two);
    // Mapped or not.
    bench.try_place(bench.memory.at(2, 4)).await.unwrap();
    assert_eq!(bench.direct_ranges().await, two);
    // Replaced as a whole; in any order, to the byte.
    bench
        .reserve(&[(u64::MAX, u64::MAX), (100, 199), (0, 49)])
        .await
        .unwrap();
    assert_eq!(bench.direct_ranges().await, [(50, 99), (200, u64::MAX - 1)]);
    bench.reserve(&[]).await.unwrap();
    assert_eq!(bench.direct_ranges().await, [(0, u64::MAX)]);
    // What is set when the domain is created.
    let planned = v1::DomainSpec {
        reserved: wire_ranges(&[(100 * P, 101 * P - 1)]),
        allowed: wire_ranges(&[(50 * P, 120 * P - 1)]),
        iova_limit: Some(1 << 40),
        ..spec(8 * P, 8 * P)
    };
    let domain = bench.node.create("d1", planned).await.unwrap();
    assert_eq!(pairs(&domain.reserved), [(100 * P, 101 * P - 1)]);
    assert_eq!(pairs(&domain.allowed), [(50 * P, 120 * P - 1)]);
    assert_eq!(
        pairs(&domain.direct_ranges),
        [(16 * P, 100 * P - 1), (101 * P, 1 << 40)]
    );
    assert_eq!(bench.node.get("d1").await.unwrap(), domain);
}

/// Case 35.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_fixed_mapping_that_touches_a_reserved_byte_is_refused() {
    let bench = Bench::new().await;
    // Not one of them a whole page.
    let kept = [(5 * P + 7, 5 * P + 7), (10 * P - 1, 12 * P)];
    bench.reserve(&kept).await.unwrap();
    let before = Table::of(&bench.node, "d0").await;
    for (page, pages, hit) in [
        (5, 1, kept[0]),
        (4, 2, kept[0]),
        (9, 1, kept[1]),
        (12, 1, kept[1]),
        (10, 2, kept[1]),
        (6, 10, kept[1]),
    ] {
        let refusal = refused(
            bench.try_place(bench.memory.at(page, pages)).await,
            Code::InvalidArgument,
            Reason::ReservedRange,
        );
        let (start, last) = (format!("{:#x}", hit.0), format!("{:#x}", hit.1));
        let numbers = [("reserved_start", &*start), ("reserved_last", &*last)];
        assert_numbers(&refusal, &numbers);
        let row = bench.memory.row(page, pages);
        let refusal = refused(
            bench
                .caller
                .set_map(vec![bench.memory.row(50, 1), row])
                .await,
            Code::InvalidArgument,
            Reason::ReservedRange,
        );
        assert_numbers(&refusal, &numbers);
        assert_eq!(refusal.metadata["entry_index"], "1");
    }
    assert_eq!(Table::of(&bench.node, "d0").await, before);
    for page in [4, 6, 13] {
        bench.try_place(bench.memory.at(page, 1)).await.unwrap();
    }
    // Chosen addresses keep away from the page with the one byte, too.
    bench.caller.clear(&[EVERYTHING]).await.unwrap();
    bench.allow(&[(3 * P, 14 * P - 1)]).await.unwrap();
    let mut starts = Vec::new();
    for _ in 0..6 {
        starts.push(bench.place(1).await.0 / P);
    }
    starts.sort_unstable();
    assert_eq!(starts, [3, 4, 6, 7, 8, 13]);
    bench.exhausted(bench.memory.anywhere(1)).await;
}
