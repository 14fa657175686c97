//! Translate, Lookup and ListMappings: where bytes are, what is there, and
//! the same for every kind of mapping. Cases 55 to 59 of CASES.md, and D2.

use domaind_tests::direct::{EVERYTHING, bare, ends, range};
use domaind_tests::node::spec;
use domaind_tests::raw::Memory;
use domaind_tests::refusal::assert_numbers;
use domaind_tests::v1::Direction::{Bidirectional, FromDevice, ToDevice};
use domaind_tests::v1::MappingKind::{Coherent, Direct, Streaming};
use domaind_tests::v1::{self, ListMappingsRequest, MapDirectEntry, MappingKind, Perm};
use domaind_tests::{Caller, Code, Node, P, Raw, Reason, refused};

/// A bounce aperture of 8 pages, a coherent one of 8, and direct mappings
/// above: [0, 8P), [8P, 16P), and from page 16 on.
struct Bench {
    node: Node,
    driver: Raw,
    memory: Memory,
    caller: Caller,
}

impl Bench {
    async fn new() -> Bench {
        Bench::with(spec(8 * P, 8 * P)).await
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

    /// The first hole of a range is at this address.
    async fn hole(&self, start: u64, last: u64, at: u64) {
        let refusal = refused(
            self.caller.translate(start, last, Perm::Read).await,
            Code::NotFound,
            Reason::NotMapped,
        );
        assert_numbers(&refusal, &[("at", &format!("{at:#x}"))]);
    }
}

/// What a test wants to know of a piece.
type Seen = (u64, u64, MappingKind, u64, u64);

fn seen(piece: &v1::Piece) -> Seen {
    let (start, last) = ends(piece.range);
    (start, last, piece.kind(), piece.memory_id, piece.offset)
}

fn starts(mappings: &[v1::Mapping]) -> Vec<u64> {
    mappings.iter().map(|mapping| mapping.iova).collect()
}

/// D2.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_fresh_domain_translates_nothing() {
    let bench = Bench::new().await;
    let owner = Caller::owner(&bench.node, "d0").await;
    for caller in [&bench.caller, &owner] {
        for at in [0, 1, P, 7 * P, 8 * P, 12 * P + 9, 16 * P, 1 << 30, u64::MAX] {
            for (start, last) in [(at, at), (at, at.saturating_add(2 * P)), (at / 2, at)] {
                let hole = caller.translate(start, last, Perm::Read).await;
                let refusal = refused(hole, Code::NotFound, Reason::NotMapped);
                assert_numbers(&refusal, &[("at", &format!("{start:#x}"))]);
                let nothing = caller.lookup(start, last).await;
                refused(nothing, Code::NotFound, Reason::NotMapped);
            }
        }
        assert_eq!(caller.list_all(Default::default()).await, []);
    }
}

/// Case 57.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn neighbours_are_two_pieces_and_a_hole_is_an_error_and_nothing() {
    let bench = Bench::with(bare()).await;
    let (one, two) = (bench.memory.row(16, 2), bench.memory.row_from(18, 2, 30));
    let apart = bench.memory.row(21, 1);
    bench.caller.set_map(vec![two, apart, one]).await.unwrap();
    let id = bench.memory.id;
    let pieces = bench
        .caller
        .translate(17 * P + 100, 18 * P + 99, Perm::ReadWrite)
        .await
        .unwrap();
    assert_eq!(
        pieces.iter().map(seen).collect::<Vec<_>>(),
        [
            (17 * P + 100, 18 * P - 1, Direct, id, P + 100),
            (18 * P, 18 * P + 99, Direct, id, 30 * P),
        ]
    );
    assert!(pieces.iter().all(|piece| piece.perm() == Perm::ReadWrite));
    // Exactly one, and its ends.
    let one = bench.caller.translate(16 * P, 18 * P - 1, Perm::Read).await;
    assert_eq!(one.unwrap().len(), 1);
    for at in [16 * P, 18 * P - 1, 20 * P - 1, 21 * P] {
        let byte = bench.caller.translate(at, at, Perm::Write).await.unwrap();
        assert_eq!(byte.len(), 1, "{at:#x}");
        assert_eq!(ends(byte[0].range), (at, at));
    }
    bench.hole(15 * P, 17 * P, 15 * P).await;
    bench.hole(16 * P - 1, 16 * P, 16 * P - 1).await;
    bench.hole(16 * P, 22 * P - 1, 20 * P).await;
    bench.hole(18 * P, 20 * P, 20 * P).await;
    bench.hole(22 * P - 1, u64::MAX, 22 * P).await;
    bench.hole(0, u64::MAX, 0).await;
}

/// Case 57, over all three kinds.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_range_over_all_three_kinds_is_a_piece_of_each() {
    let bench = Bench::new().await;
    let entry = bench.memory.entry(3 * P, 7 * P, Bidirectional);
    let streaming = bench.driver.map(entry).await.unwrap();
    assert_eq!(streaming.iova, P, "all of the aperture but page 0");
    let ring = bench.driver.alloc_len(8 * P).await.unwrap();
    assert_eq!(ring.iova, 8 * P);
    bench.caller.map(bench.memory.at(16, 1)).await.unwrap();

    let pieces = bench
        .caller
        .translate(2 * P, 17 * P - 1, Perm::ReadWrite)
        .await
        .unwrap();
    assert_eq!(
        pieces.iter().map(seen).collect::<Vec<_>>(),
        [
            (2 * P, 8 * P - 1, Streaming, 0, 2 * P),
            (8 * P, 16 * P - 1, Coherent, 0, 0),
            (16 * P, 17 * P - 1, Direct, bench.memory.id, 0),
        ]
    );
    // Offsets are those of the region: there the bytes are.
    bench.driver.write(8 * P + 5, b"in the ring");
    let (_, region) = &bench.driver.given.regions[1];
    let pieces = bench
        .caller
        .translate(8 * P + 5, 8 * P + 15, Perm::Read)
        .await;
    let offset = pieces.unwrap()[0].offset;
    assert_eq!(
        domaind_tests::files::peek(region, offset, 11),
        b"in the ring"
    );

    bench.driver.unmap(&streaming, None).await.unwrap();
    bench.hole(2 * P, 17 * P - 1, 2 * P).await;
    bench
        .caller
        .translate(8 * P, 17 * P - 1, Perm::Read)
        .await
        .unwrap();
    bench.driver.free(ring.iova, ring.mapping_id).await.unwrap();
    bench.hole(8 * P, 17 * P - 1, 8 * P).await;
}

/// D9: exact lengths, to the byte.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn what_was_not_asked_for_does_not_translate() {
    let bench = Bench::new().await;
    let entry = v1::MapEntry {
        keep_offset: true,
        ..bench.memory.entry(100, 50, ToDevice)
    };
    let streaming = bench.driver.map(entry).await.unwrap();
    let ring = bench.driver.alloc_len(5_000).await.unwrap();
    for (iova, len) in [(streaming.iova, 50), (ring.iova, 5_000)] {
        let whole = bench
            .caller
            .translate(iova, iova + len - 1, Perm::Read)
            .await;
        assert_eq!(whole.unwrap().len(), 1);
        bench.hole(iova, iova + len, iova + len).await;
        bench.hole(iova - 1, iova, iova - 1).await;
        bench.hole(iova + len, iova + len, iova + len).await;
    }
    assert_eq!(streaming.iova % P, 100);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn less_than_was_wanted_is_denied_and_says_what_is_allowed() {
    let bench = Bench::new().await;
    let row = |page, perm: Perm| v1::DirectMapping {
        perm: perm.into(),
        ..bench.memory.row(page, 1)
    };
    let (read, write, both) = (Perm::Read, Perm::Write, Perm::ReadWrite);
    bench
        .caller
        .set_map(vec![row(16, read), row(17, write), row(18, both)])
        .await
        .unwrap();
    let allows = |perm: Perm, want: Perm| perm as i32 & want as i32 == want as i32;
    for (page, perm) in [(16, read), (17, write), (18, both)] {
        for want in [read, write, both] {
            let (start, last) = (page * P, page * P + 9);
            let answer = bench.caller.translate(start, last, want).await;
            if allows(perm, want) {
                assert_eq!(answer.unwrap()[0].perm(), perm, "more than was wanted");
                continue;
            }
            let refusal = refused(answer, Code::PermissionDenied, Reason::PermTooSmall);
            let at = format!("{:#x}", page * P);
            assert_numbers(&refusal, &[("mapping_start", &at)]);
        }
    }
    // All of a range must allow it.
    let mixed = bench.caller.translate(16 * P, 19 * P - 1, read).await;
    refused(mixed, Code::PermissionDenied, Reason::PermTooSmall);
    bench
        .caller
        .translate(17 * P, 19 * P - 1, write)
        .await
        .unwrap();
    // What a direction allows to the device.
    for (direction, perm) in [(ToDevice, read), (FromDevice, write), (Bidirectional, both)] {
        let entry = bench.memory.entry(0, 8, direction);
        let mapping = bench.driver.map(entry).await.unwrap();
        for want in [read, write, both] {
            let (start, last) = (mapping.iova, mapping.iova + 7);
            let answer = bench.caller.translate(start, last, want).await;
            assert_eq!(answer.is_ok(), allows(perm, want), "{direction:?} {want:?}");
        }
    }
    for want in [0, 4, 99, -1] {
        let request = v1::TranslateRequest {
            domain: String::new(),
            range: Some(range(18 * P, 18 * P)),
            want,
        };
        let request = bench.caller.signed(request);
        let answer = bench.caller.calls().translate(request).await;
        let answer = domaind_tests::refusal::answer(answer);
        refused(answer, Code::InvalidArgument, Reason::UnknownPerm);
    }
}

/// Case 55, case 56.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn lookup_finds_the_lowest_and_gives_it_whole() {
    let bench = Bench::with(bare()).await;
    let table = vec![
        bench.memory.row(40, 4),
        bench.memory.row_from(20, 4, 7),
        bench.memory.row(30, 4),
    ];
    bench.caller.set_map(table).await.unwrap();
    for (start, last, found) in [
        (0, u64::MAX, 20),
        (22 * P, 42 * P, 20),
        (24 * P - 1, 24 * P - 1, 20),
        (24 * P, 30 * P, 30),
        (33 * P + 5, 50 * P, 30),
        (34 * P, u64::MAX, 40),
        (43 * P, 44 * P - 1, 40),
    ] {
        let mapping = bench.caller.lookup(start, last).await.unwrap();
        assert_eq!((mapping.iova, mapping.len_bytes), (found * P, 4 * P));
        assert_eq!((mapping.kind(), mapping.perm()), (Direct, Perm::ReadWrite));
        assert_eq!(mapping.offset, if found == 20 { 7 * P } else { 0 });
        assert_eq!(
            (mapping.memory_id, mapping.mapping_id),
            (bench.memory.id, 0)
        );
        assert_eq!(mapping.session, bench.driver.name());
        assert_eq!(mapping.state(), v1::MappingState::Live);
    }
    for (start, last) in [(0, 20 * P - 1), (24 * P, 30 * P - 1), (44 * P, u64::MAX)] {
        let nothing = bench.caller.lookup(start, last).await;
        refused(nothing, Code::NotFound, Reason::NotMapped);
    }
    let invalid = Code::InvalidArgument;
    for (start, last) in [(1, 0), (u64::MAX, 0), (22 * P, 22 * P - 1)] {
        let looked = bench.caller.lookup(start, last).await;
        refused(looked, invalid, Reason::InvalidRange);
        let translated = bench.caller.translate(start, last, Perm::Read).await;
        refused(translated, invalid, Reason::InvalidRange);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn lookup_finds_what_is_bounced_and_what_is_coherent_too() {
    let bench = Bench::new().await;
    let entry = bench.memory.entry(9, 100, FromDevice);
    let streaming = bench.driver.map(entry).await.unwrap();
    let ring = bench.driver.alloc_len(77).await.unwrap();
    let found = bench.caller.lookup(0, u64::MAX).await.unwrap();
    assert_eq!(found.kind(), Streaming);
    assert_eq!(
        (found.iova, found.mapping_id),
        (streaming.iova, streaming.mapping_id)
    );
    assert_eq!((found.len_bytes, found.offset), (100, 9));
    let found = bench.caller.lookup(8 * P, u64::MAX).await.unwrap();
    assert_eq!(found.kind(), Coherent);
    assert_eq!(
        (found.iova, found.mapping_id, found.len_bytes),
        (ring.iova, ring.mapping_id, 77)
    );
    // Past its exact end there is nothing, though its page is taken.
    let nothing = bench.caller.lookup(ring.iova + 77, 16 * P - 1).await;
    refused(nothing, Code::NotFound, Reason::NotMapped);
}

/// Case 59.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn every_alias_of_a_byte_is_found() {
    let mut bench = Bench::new().await;
    let other = bench.driver.memory(64 * P).await;
    let table = vec![
        bench.memory.row(20, 8),
        bench.memory.row_from(40, 1, 4),
        bench.memory.row_from(50, 4, 5),
        other.row(60, 8),
    ];
    bench.caller.set_map(table).await.unwrap();
    // Byte 4P + 10 for the device, and around it.
    let entry = bench.memory.entry(4 * P + 10, 100, ToDevice);
    let streaming = bench.driver.map(entry).await.unwrap();
    bench.driver.alloc_len(1).await.unwrap();
    let owner = Caller::owner(&bench.node, "d0").await;
    let aliases = async |memory_id, memory_offset| {
        let request = ListMappingsRequest {
            memory_id,
            memory_offset,
            ..Default::default()
        };
        let found = bench.caller.list_all(request.clone()).await;
        assert_eq!(owner.list_all(request).await, found);
        starts(&found)
    };
    let (id, s) = (bench.memory.id, streaming.iova);
    for (offset, wanted) in [
        (0, vec![20 * P]),
        (4 * P - 1, vec![20 * P]),
        (4 * P, vec![20 * P, 40 * P]),
        (4 * P + 9, vec![20 * P, 40 * P]),
        (4 * P + 10, vec![s, 20 * P, 40 * P]),
        (4 * P + 109, vec![s, 20 * P, 40 * P]),
        (4 * P + 110, vec![20 * P, 40 * P]),
        (5 * P - 1, vec![20 * P, 40 * P]),
        (5 * P, vec![20 * P, 50 * P]),
        (8 * P, vec![50 * P]),
        (9 * P - 1, vec![50 * P]),
        (9 * P, vec![]),
        (u64::MAX, vec![]),
    ] {
        assert_eq!(aliases(id, Some(offset)).await, wanted, "{offset}");
    }
    assert_eq!(aliases(id, None).await, [s, 20 * P, 40 * P, 50 * P]);
    assert_eq!(aliases(other.id, None).await, [60 * P]);
    assert_eq!(aliases(other.id, Some(0)).await, [60 * P]);
    assert!(aliases(4_711, None).await.is_empty());
}

/// Filters together, and pages of every size, over all kinds.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn lists_are_filtered_and_come_in_pages_of_any_size() {
    let bench = Bench::new().await;
    let mut other = Raw::driver(&bench.node, "d0").await;
    let theirs = other.memory(8 * P).await;
    for _ in 0..3 {
        bench
            .driver
            .map(bench.memory.entry(0, 9, ToDevice))
            .await
            .unwrap();
        other.alloc_len(9).await.unwrap();
    }
    other.map(theirs.entry(0, 9, ToDevice)).await.unwrap();
    bench.driver.alloc_len(9).await.unwrap();
    for k in 0..4 {
        bench
            .caller
            .map(bench.memory.at(20 + 2 * k, 1))
            .await
            .unwrap();
        Caller::session(&other)
            .map(theirs.at(21 + 2 * k, 1))
            .await
            .unwrap();
    }
    let all = bench.caller.list_all(Default::default()).await;
    assert_eq!(all.len(), 16);
    assert!(all.windows(2).all(|pair| pair[0].iova < pair[1].iova));

    let kinds = [MappingKind::Unspecified, Streaming, Coherent, Direct];
    let sessions = ["", bench.driver.name(), other.name()];
    let memories = [0, bench.memory.id, theirs.id];
    let ranges = [
        None,
        Some((0, 8 * P - 1)),
        Some((2 * P + 8, 22 * P)),
        Some((22 * P + 9, 22 * P + 9)),
    ];
    for kind in kinds {
        for session in sessions {
            for memory_id in memories {
                for within in ranges {
                    let wanted: Vec<_> = all
                        .iter()
                        .filter(|m| kind == MappingKind::Unspecified || m.kind() == kind)
                        .filter(|m| session.is_empty() || m.session == session)
                        .filter(|m| memory_id == 0 || m.memory_id == memory_id)
                        .filter(|m| {
                            within.is_none_or(|(start, last)| {
                                m.iova <= last && m.iova + m.len_bytes > start
                            })
                        })
                        .cloned()
                        .collect();
                    for page_size in [1, 2, 3, 0] {
                        let request = ListMappingsRequest {
                            session: session.to_owned(),
                            kind: kind.into(),
                            memory_id,
                            range: within.map(|(start, last)| range(start, last)),
                            page_size,
                            ..Default::default()
                        };
                        let listed = bench.caller.list_all(request.clone()).await;
                        assert_eq!(listed, wanted, "{request:?}");
                        let first = bench.caller.list(request).await.unwrap().mappings;
                        let most = if page_size == 0 {
                            1_000
                        } else {
                            page_size as usize
                        };
                        assert_eq!(first.len(), wanted.len().min(most));
                    }
                }
            }
        }
    }
    let backwards = ListMappingsRequest {
        range: Some(range(9, 8)),
        ..Default::default()
    };
    let refusal = bench.caller.list(backwards).await;
    refused(refusal, Code::InvalidArgument, Reason::InvalidRange);
}

/// Between two pages others come and go: what was there all the while is
/// listed exactly once.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn pages_show_once_what_was_there_all_the_while() {
    let bench = Bench::with(bare()).await;
    let table = |odd: u64| (0..30).map(move |k| (2 * k + 100 + odd * 1_000, 1));
    let rows = |odd| {
        table(odd)
            .map(|(page, n)| bench.memory.row(page, n))
            .collect::<Vec<_>>()
    };
    bench.caller.set_map(rows(0)).await.unwrap();
    let mut request = ListMappingsRequest {
        page_size: 7,
        ..Default::default()
    };
    let mut seen = Vec::new();
    for round in 0.. {
        let page = bench.caller.list(request.clone()).await.unwrap();
        seen.extend(starts(&page.mappings));
        if page.next_page_token.is_empty() {
            break;
        }
        request.page_token = page.next_page_token;
        // One below, one in between, one above, each gone one page later.
        bench
            .caller
            .map(bench.memory.at(90 - round, 1))
            .await
            .unwrap();
        let mut table = rows(0);
        table.push(bench.memory.row(101 + 2 * round, 1));
        table.push(bench.memory.row(5_000 + round, 1));
        bench.caller.set_map(table).await.unwrap();
    }
    let wanted: Vec<_> = table(0).map(|(page, _)| page * P).collect();
    let kept: Vec<_> = wanted.iter().filter(|iova| seen.contains(iova)).collect();
    assert_eq!(kept.len(), wanted.len(), "one is missing: {seen:x?}");
    assert!(seen.windows(2).all(|pair| pair[0] < pair[1]), "{seen:x?}");
    bench.caller.clear(&[EVERYTHING]).await.unwrap();
}

/// Too many pieces for one answer.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_translation_has_at_most_16384_pieces() {
    let bench = Bench::with(bare()).await;
    let table: Vec<_> = (1..=16_385).map(|page| bench.memory.row(page, 1)).collect();
    let messages = bench.caller.chunked(&table, 2_000);
    bench.caller.stream(messages).await.unwrap();
    let most = bench.caller.translate(P, 16_385 * P - 1, Perm::Read).await;
    assert_eq!(most.unwrap().len(), 16_384);
    let more = bench.caller.translate(P, 16_385 * P, Perm::Read).await;
    let refusal = refused(more, Code::ResourceExhausted, Reason::QuotaExceeded);
    assert_numbers(&refusal, &[("limit", "16384")]);
    let entry = MapDirectEntry {
        perm: Perm::Read.into(),
        ..bench.memory.at(20_000, 64)
    };
    bench.caller.map(entry).await.unwrap();
}

/// Pieces belong to a generation: that of the domain when they were looked up.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_translation_names_the_generation_that_it_belongs_to() {
    let bench = Bench::new().await;
    bench.caller.map(bench.memory.at(20, 1)).await.unwrap();
    let mut last = 0;
    for _ in 0..3 {
        let request = v1::TranslateRequest {
            domain: String::new(),
            range: Some(range(20 * P, 20 * P)),
            want: Perm::Read.into(),
        };
        let request = bench.caller.signed(request);
        let answer = bench
            .caller
            .calls()
            .translate(request)
            .await
            .unwrap()
            .into_inner();
        let domain = bench.node.get("d0").await.unwrap();
        assert_eq!(answer.generation, domain.generation);
        assert!(answer.generation > last);
        last = answer.generation;
        bench.driver.alloc_len(1).await.unwrap();
    }
}
