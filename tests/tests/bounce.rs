//! What a streaming mapping copies, and what it does not: cases D3 to D9, and
//! B-01 to B-09 of ROBUSTNESS.md.

use domaind_tests::files::{peek, poke};
use domaind_tests::node::{POISON, scrubbed};
use domaind_tests::raw::{Memory, unmap_entry};
use domaind_tests::v1::Direction::{self, Bidirectional, FromDevice, ToDevice};
use domaind_tests::v1::{MapEntry, SyncTarget};
use domaind_tests::{Code, Node, P, Raw, Reason, files, node, refused, v1};

const OFFSETS: [u64; 4] = [0, 1, 100, 4_095];
const LENGTHS: [u64; 9] = [1, 2, 4_095, 4_096, 4_097, 8_191, 8_192, 8_193, 65_536];
const DIRECTIONS: [Direction; 3] = [ToDevice, FromDevice, Bidirectional];

/// Longer than any buffer of these tests, with room on both sides.
const MEMORY: u64 = 20 * P;

struct Bench {
    node: Node,
    driver: Raw,
    memory: Memory,
}

impl Bench {
    async fn new() -> Bench {
        Bench::with(16 << 20).await
    }

    /// With a bounce aperture of so many bytes.
    async fn with(bounce: u64) -> Bench {
        let node = Node::start().await;
        node.create("d0", node::spec(bounce, 4 << 20))
            .await
            .unwrap();
        let mut driver = Raw::driver(&node, "d0").await;
        let memory = driver.memory(MEMORY).await;
        Bench {
            node,
            driver,
            memory,
        }
    }

    /// The driver's memory, all of it.
    fn memory(&self) -> Vec<u8> {
        peek(&self.memory.fd, 0, usize(MEMORY))
    }
}

fn usize(value: u64) -> usize {
    usize::try_from(value).unwrap()
}

/// `[from, from + len)` of `bytes` replaced.
fn with(bytes: &[u8], from: u64, new: &[u8]) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    bytes[usize(from)..usize(from) + new.len()].copy_from_slice(new);
    bytes
}

/// D5, B-01: for every offset, length and direction exactly `len` bytes travel, and
/// the rest of the granules reads zero.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn exactly_the_buffer_travels_whatever_its_offset_and_length() {
    let bench = Bench::new().await;
    let before = files::pattern(7, usize(MEMORY));
    for (offset, len) in OFFSETS.iter().flat_map(|o| LENGTHS.map(|l| (*o, l))) {
        for direction in DIRECTIONS {
            for keep_offset in [false, true] {
                let what = format!("{offset} {len} {direction:?} {keep_offset}");
                poke(&bench.memory.fd, 0, &before);
                let entry = MapEntry {
                    keep_offset,
                    ..bench.memory.entry(offset, len, direction)
                };
                let mapping = bench.driver.map(entry).await.unwrap();
                let slack = mapping.iova % P;
                assert_eq!(slack, if keep_offset { offset % P } else { 0 }, "{what}");

                // To the device: the granules of the range, whole.
                let granules = (slack + len).div_ceil(P) * P;
                let shown = match direction {
                    FromDevice => vec![0; usize(len)],
                    _ => before[usize(offset)..usize(offset + len)].to_vec(),
                };
                let wanted = with(&vec![0; usize(granules)], slack, &shown);
                let seen = bench.driver.read(mapping.iova - slack, usize(granules));
                assert!(seen == wanted, "{what}: to the device");

                // From the device, which writes the slack as well.
                let written = files::pattern(8, usize(granules));
                bench.driver.write(mapping.iova - slack, &written);
                let written_bytes = (direction == FromDevice).then_some(len);
                bench.driver.unmap(&mapping, written_bytes).await.unwrap();
                let back = &written[usize(slack)..usize(slack + len)];
                let wanted = match direction {
                    ToDevice => before.clone(),
                    _ => with(&before, offset, back),
                };
                assert!(bench.memory() == wanted, "{what}: back");
            }
        }
    }
    assert_eq!(bench.node.usage("d0").await.bounce_used_bytes, 0);
}

/// D6, B-03: the device never sees the original, and k of n bytes come back.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn written_bytes_decide_how_much_flows_back_byte_by_byte() {
    let bench = Bench::new().await;
    let before = files::pattern(1, usize(MEMORY));
    for written in 0..=33 {
        poke(&bench.memory.fd, 0, &before);
        let entry = bench.memory.entry(4_080, 33, FromDevice);
        let mapping = bench.driver.map(entry).await.unwrap();
        assert_eq!(bench.driver.read(mapping.iova, 33), [0; 33]);
        bench.driver.write(mapping.iova, &[0xdd; 33]);
        assert!(bench.memory() == before, "not before unmap");

        let copied = bench.driver.unmap(&mapping, Some(written)).await.unwrap();

        assert_eq!(copied, written);
        let wanted = with(&before, 4_080, &vec![0xdd; usize(written)]);
        assert!(bench.memory() == wanted, "{written}");
    }
}

/// D6, D7.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn bidirectional_may_say_how_much_was_written_too() {
    let bench = Bench::new().await;
    let before = files::pattern(2, usize(MEMORY));
    for (said, flows) in [(None, 100), (Some(0), 0), (Some(40), 40), (Some(100), 100)] {
        poke(&bench.memory.fd, 0, &before);
        let entry = bench.memory.entry(10, 100, Bidirectional);
        let mapping = bench.driver.map(entry).await.unwrap();
        bench.driver.write(mapping.iova, &[0xdd; 100]);

        assert_eq!(bench.driver.unmap(&mapping, said).await.unwrap(), flows);

        let wanted = with(&before, 10, &vec![0xdd; usize(flows)]);
        assert!(bench.memory() == wanted, "{said:?}");
    }
}

/// D6, B-04, `preserve`: the device sees the original, and what it does not write
/// comes back as it was.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn preserve_copies_in_for_every_direction_and_back_the_whole_length() {
    let bench = Bench::new().await;
    let before = files::pattern(3, usize(MEMORY));
    for direction in DIRECTIONS {
        poke(&bench.memory.fd, 0, &before);
        let entry = MapEntry {
            preserve: true,
            ..bench.memory.entry(77, 5_000, direction)
        };
        let mapping = bench.driver.map(entry).await.unwrap();
        let seen = bench.driver.read(mapping.iova, 5_000);
        assert!(seen == before[77..5_077], "{direction:?}");
        bench.driver.write(mapping.iova + 1_000, b"only this");

        bench.driver.unmap(&mapping, None).await.unwrap();

        let wanted = match direction {
            ToDevice => before.clone(),
            _ => with(&before, 1_077, b"only this"),
        };
        assert!(bench.memory() == wanted, "{direction:?}");
    }
}

/// D7.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn skip_sync_copies_nothing_and_sync_copies_exactly_its_part() {
    let bench = Bench::new().await;
    let before = files::pattern(4, usize(MEMORY));
    poke(&bench.memory.fd, 0, &before);
    let entry = MapEntry {
        skip_sync: true,
        ..bench.memory.entry(123, 9_000, Bidirectional)
    };
    let mapping = bench.driver.map(entry).await.unwrap();
    let driver = &bench.driver;
    assert!(driver.read(mapping.iova, usize(3 * P)) == vec![0; usize(3 * P)]);

    // Driver to device, across a page.
    driver
        .sync(&mapping, 4_000, 200, SyncTarget::ForDevice)
        .await
        .unwrap();
    let wanted = with(&vec![0; usize(3 * P)], 4_000, &before[4_123..4_323]);
    assert!(driver.read(mapping.iova, usize(3 * P)) == wanted);

    // Device to driver.
    driver.write(mapping.iova, &vec![0xee; 9_000]);
    driver
        .sync(&mapping, 8_999, 1, SyncTarget::ForCpu)
        .await
        .unwrap();
    driver
        .sync(&mapping, 0, 10, SyncTarget::ForCpu)
        .await
        .unwrap();
    let wanted = with(&with(&before, 9_122, &[0xee]), 123, &[0xee; 10]);
    assert!(bench.memory() == wanted);

    assert_eq!(driver.unmap(&mapping, None).await.unwrap(), 0);
    assert!(bench.memory() == wanted, "unmap copies nothing");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn unmap_with_skip_sync_copies_nothing_back() {
    let bench = Bench::new().await;
    poke(&bench.memory.fd, 0, &[1; 100]);
    for direction in [FromDevice, Bidirectional] {
        let entry = bench.memory.entry(0, 100, direction);
        let mapping = bench.driver.map(entry).await.unwrap();
        bench.driver.write(mapping.iova, &[2; 100]);
        let entry = v1::UnmapEntry {
            skip_sync: true,
            ..unmap_entry(&mapping, None)
        };
        let answer = bench.driver.unmap_all(vec![entry], false).await.unwrap();
        assert_eq!(answer.results[0].copied_bytes, 0);
        assert_eq!(peek(&bench.memory.fd, 0, 100), [1; 100]);
    }
}

/// A file that refuses what would be copied back: the error is that of the
/// call, and the mapping stays.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_file_that_cannot_be_written_fails_unmap_and_keeps_the_mapping() {
    let bench = Bench::new().await;
    let mapping = bench
        .driver
        .map(bench.memory.entry(8, 16, Bidirectional))
        .await
        .unwrap();
    bench.driver.write(mapping.iova, b"what was written");
    rustix::fs::fcntl_add_seals(&bench.memory.fd, rustix::fs::SealFlags::WRITE).unwrap();
    let before = bench.node.usage("d0").await;

    for _ in 0..2 {
        let refusal = refused(
            bench.driver.unmap(&mapping, None).await,
            Code::FailedPrecondition,
            Reason::CopyFailed,
        );
        let numbers = [("offset", "8"), ("len_bytes", "16")];
        domaind_tests::refusal::assert_numbers(&refusal, &numbers);
        assert_eq!(refusal.metadata["memory_id"], bench.memory.id.to_string());
        assert_eq!(bench.node.usage("d0").await, before);
    }
    refused(
        bench.driver.sync(&mapping, 0, 16, SyncTarget::ForCpu).await,
        Code::FailedPrecondition,
        Reason::CopyFailed,
    );
    // The device's bytes are still there, and the way out is open.
    assert_eq!(bench.driver.read(mapping.iova, 16), b"what was written");
    let entry = v1::UnmapEntry {
        skip_sync: true,
        ..unmap_entry(&mapping, None)
    };
    bench.driver.unmap_all(vec![entry], false).await.unwrap();
    assert_eq!(bench.node.usage("d0").await.streaming_mappings, 0);
}

/// D3: nothing of an aperture is wasted, and page 0 is never given.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn an_aperture_of_256_pages_holds_255_mappings_of_one() {
    let node = Node::start().await;
    node.create("d0", node::spec(1 << 20, 0)).await.unwrap();
    let mut driver = Raw::driver(&node, "d0").await;
    let memory = driver.memory(256 * P).await;
    let one = memory.entry(0, 1, ToDevice);

    let all = driver.map_all(vec![one; 255], false).await.unwrap().results;
    let mappings: Vec<_> = all
        .into_iter()
        .map(|result| match result.outcome {
            Some(v1::map_result::Outcome::Mapping(mapping)) => mapping,
            other => panic!("{other:?}"),
        })
        .collect();
    let mut iovas: Vec<_> = mappings.iter().map(|mapping| mapping.iova).collect();
    iovas.sort_unstable();
    iovas.dedup();
    assert_eq!(iovas.len(), 255);
    assert_eq!(iovas.first(), Some(&P), "page 0 is kept back");
    assert!(iovas.iter().all(|iova| iova % P == 0 && *iova < 1 << 20));

    let full = refused(
        driver.map(one).await,
        Code::ResourceExhausted,
        Reason::NoSpace,
    );
    domaind_tests::refusal::assert_numbers(&full, &[("largest_hole_bytes", "0")]);
    driver.unmap(&mappings[100], None).await.unwrap();
    assert_eq!(node.get("d0").await.unwrap().max_mapping_bytes, P);
    let again = driver.map(one).await.unwrap();
    assert_eq!(again.iova, mappings[100].iova);
    refused(
        driver.map(one).await,
        Code::ResourceExhausted,
        Reason::NoSpace,
    );
}

/// D3.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn the_largest_mapping_that_is_reported_can_be_made() {
    let node = Node::start().await;
    node.create("d0", node::spec(1 << 20, 0)).await.unwrap();
    let mut driver = Raw::driver(&node, "d0").await;
    let memory = driver.memory(256 * P).await;
    assert_eq!(node.get("d0").await.unwrap().max_mapping_bytes, 255 * P);

    let whole = driver
        .map(memory.entry(0, 255 * P, ToDevice))
        .await
        .unwrap();
    assert_eq!(node.get("d0").await.unwrap().max_mapping_bytes, 0);
    driver.unmap(&whole, None).await.unwrap();

    // Exact fit: fifteen of 17 pages leave none over.
    let seventeen = memory.entry(0, 17 * P, ToDevice);
    driver.map_all(vec![seventeen; 15], false).await.unwrap();
    refused(
        driver.map(memory.entry(0, 1, ToDevice)).await,
        Code::ResourceExhausted,
        Reason::NoSpace,
    );
}

/// D4.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn alignment_and_limit_are_kept_on_request() {
    let mut bench = Bench::new().await;
    let mut mappings = Vec::new();
    let memory = bench.driver.memory(64 * P).await;
    for pages in 1..=64 {
        let align_bytes = (pages * P).next_power_of_two();
        let entry = MapEntry {
            align_bytes,
            ..memory.entry(0, pages * P, ToDevice)
        };
        let mapping = bench.driver.map(entry).await.unwrap();
        assert_eq!(mapping.iova % align_bytes, 0, "{pages}");
        mappings.push(mapping);
    }
    for mapping in mappings {
        bench.driver.unmap(&mapping, None).await.unwrap();
    }

    let entry = MapEntry {
        limit: Some(9 * P - 1),
        ..bench.memory.entry(0, P, ToDevice)
    };
    let below = bench.driver.map_all(vec![entry; 8], false).await.unwrap();
    for result in below.results {
        match result.outcome {
            Some(v1::map_result::Outcome::Mapping(mapping)) => assert!(mapping.iova <= 8 * P),
            other => panic!("{other:?}"),
        }
    }
    refused(
        bench.driver.map(entry).await,
        Code::ResourceExhausted,
        Reason::NoSpace,
    );
}

/// D9, B-07.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn coherent_allocations_own_whole_granules_and_say_their_exact_length() {
    let bench = Bench::new().await;
    let coherent = bench.node.get("d0").await.unwrap().coherent.unwrap();
    let driver = &bench.driver;
    let ring = driver.alloc_len(5_000).await.unwrap();
    assert_eq!((ring.len_bytes, ring.iova % P), (5_000, 0));
    assert!(coherent.start <= ring.iova && ring.iova + 2 * P - 1 <= coherent.last);
    let listed = bench.node.mappings("d0").await;
    assert_eq!(listed.len(), 1);
    assert_eq!((listed[0].iova, listed[0].len_bytes), (ring.iova, 5_000));
    assert_eq!(bench.node.usage("d0").await.coherent_used_bytes, 2 * P);

    driver.write(ring.iova, &vec![0xcc; usize(2 * P)]);
    driver.free(ring.iova, ring.mapping_id).await.unwrap();
    assert!(
        driver.read(ring.iova, usize(2 * P)) == vec![scrubbed(); usize(2 * P)],
        "scrubbed when it is freed"
    );
    let again = driver.alloc_len(2 * P).await.unwrap();
    assert_eq!(again.iova, ring.iova);
    assert!(
        driver.read(ring.iova, usize(2 * P)) == vec![0; usize(2 * P)],
        "zero when it is allocated"
    );
    driver.free(again.iova, again.mapping_id).await.unwrap();

    let aligned = driver
        .alloc(v1::AllocCoherentRequest {
            len_bytes: 1,
            align_bytes: 64 * P,
            ..Default::default()
        })
        .await
        .unwrap();
    assert_eq!(aligned.iova % (64 * P), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn scrub_on_unmap_leaves_no_old_bytes_about() {
    let bench = Bench::new().await;
    poke(&bench.memory.fd, 0, &[0x77; 5_000]);
    let update = v1::UpdateDomainRequest {
        name: "domains/d0".into(),
        scrub: v1::Scrub::OnUnmap.into(),
        ..Default::default()
    };
    let mut domains = bench.node.admin().domains();
    let updated = domains.update_domain(update).await.unwrap().into_inner();
    assert_eq!(updated.scrub(), v1::Scrub::OnUnmap);

    let mapping = bench
        .driver
        .map(bench.memory.entry(0, 5_000, ToDevice))
        .await
        .unwrap();
    // The device leaves something in the tail, too.
    bench.driver.write(mapping.iova + 5_000, &[0x77; 100]);
    bench.driver.unmap(&mapping, None).await.unwrap();

    assert!(bench.driver.read(mapping.iova, usize(2 * P)) == vec![scrubbed(); usize(2 * P)]);
}

/// Case 46 for bounced buffers.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn the_same_memory_serves_several_mappings_and_several_domains() {
    let bench = Bench::new().await;
    bench.node.domain("d1").await;
    let mut other = Raw::driver(&bench.node, "d1").await;
    let elsewhere = other.register(&bench.memory.fd, true).await.unwrap();
    poke(&bench.memory.fd, 0, b"shared by all");

    let one = bench
        .driver
        .map(bench.memory.entry(0, 13, Bidirectional))
        .await
        .unwrap();
    let two = bench
        .driver
        .map(bench.memory.entry(0, 13, Bidirectional))
        .await
        .unwrap();
    let entry = MapEntry {
        memory_id: elsewhere.memory_id,
        ..bench.memory.entry(0, 13, Bidirectional)
    };
    let three = other.map(entry).await.unwrap();
    assert_ne!(one.iova, two.iova);
    assert_eq!(bench.driver.read(two.iova, 13), b"shared by all");
    assert_eq!(other.read(three.iova, 13), b"shared by all");
    other.write(three.iova, b"SHARED");
    other.unmap(&three, Some(6)).await.unwrap();
    assert_eq!(peek(&bench.memory.fd, 0, 13), b"SHARED by all");
    // The bounced copies are copies.
    assert_eq!(bench.driver.read(one.iova, 13), b"shared by all");
}

/// B-02: whatever was there before, a shorter mapping over it shows zeros
/// around its bytes.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn slack_is_zero_after_reuse() {
    // Four pages besides page 0: what comes second lies where the first lay.
    let bench = Bench::with(5 * P).await;
    let driver = &bench.driver;
    let (long, old) = (4 * P, vec![0xa5; usize(4 * P)]);
    for (offset, len) in OFFSETS
        .iter()
        .flat_map(|o| [1, 33, P - 1, P, P + 1].map(|l| (*o, l)))
    {
        for direction in DIRECTIONS {
            poke(&bench.memory.fd, 0, &old);
            let first = bench.memory.entry(0, long, Bidirectional);
            let first = driver.map(first).await.unwrap();
            driver.write(first.iova, &old);
            driver.unmap(&first, None).await.unwrap();

            poke(&bench.memory.fd, 0, &vec![0x11; usize(long)]);
            let entry = MapEntry {
                keep_offset: true,
                ..bench.memory.entry(offset, len, direction)
            };
            let second = driver.map(entry).await.unwrap();
            let slack = second.iova % P;
            let granules = (slack + len).div_ceil(P) * P;
            let shown = if direction == FromDevice { 0 } else { 0x11 };
            let wanted = with(&vec![0; usize(granules)], slack, &vec![shown; usize(len)]);
            let seen = driver.read(second.iova - slack, usize(granules));
            assert!(seen == wanted, "{offset} {len} {direction:?}");
            driver
                .unmap(&second, (direction == FromDevice).then_some(0))
                .await
                .unwrap();
        }
    }
}

/// B-05: whatever the sizes and offsets, no page belongs to two sessions, and
/// what one writes the other does not find in its own.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn two_sessions_never_share_page() {
    const SEED: u64 = 0x5eed_0b05;
    println!("seed {SEED:#x}");
    let bench = Bench::new().await;
    let mut other = Raw::driver(&bench.node, "d0").await;
    let theirs = other.memory(MEMORY).await;
    let sides = [
        (&bench.driver, &bench.memory, 0x11),
        (&other, &theirs, 0x22),
    ];
    for (_, memory, colour) in sides {
        poke(&memory.fd, 0, &vec![colour; usize(MEMORY)]);
    }
    let mut random = SEED;
    let mut next = |below: u64| {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        random % below
    };
    let mut live: Vec<(usize, v1::StreamingMapping)> = Vec::new();
    for _ in 0..400 {
        let side = usize(next(2));
        let (driver, memory, _) = sides[side];
        if live.len() > 30 || (next(3) == 0 && !live.is_empty()) {
            let (side, mapping) = live.swap_remove(usize(next(live.len() as u64)));
            let (driver, _, colour) = sides[side];
            let seen = driver.read(mapping.iova, usize(mapping.len_bytes));
            assert!(seen.iter().all(|byte| *byte == colour), "somebody else's");
            driver.unmap(&mapping, None).await.unwrap();
            continue;
        }
        let len = 1 + next(3 * P);
        let entry = MapEntry {
            keep_offset: next(2) == 0,
            ..memory.entry(next(P), len, Bidirectional)
        };
        live.push((side, driver.map(entry).await.unwrap()));
        let pages = |wanted: usize| {
            let own = live.iter().filter(move |(side, _)| *side == wanted);
            own.flat_map(|(_, m)| m.iova / P..=(m.iova + m.len_bytes - 1) / P)
        };
        let own: Vec<u64> = pages(0).collect();
        assert!(pages(1).all(|page| !own.contains(&page)), "a shared page");
    }
}

/// B-09: who scribbles into the bounce memory while it is copied back decides
/// about bytes of its buffer, and about nothing else.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn single_fetch() {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
    const LEN: u64 = 15 * P;
    let bench = Bench::with(17 * P).await;
    let scribbler = Raw::device(&bench.node, "d0").await;
    let done = Arc::new(AtomicBool::new(false));
    let adversary = {
        let done = Arc::clone(&done);
        std::thread::spawn(move || {
            let (ones, twos) = (vec![0x01; usize(16 * P)], vec![0x02; usize(16 * P)]);
            let mut rounds = 0_u64;
            while !done.load(Relaxed) {
                scribbler.write(P, &ones);
                scribbler.write(P, &twos);
                rounds += 1;
            }
            rounds
        })
    };
    let before = vec![0x77; usize(MEMORY)];
    for round in 0..100 {
        poke(&bench.memory.fd, 0, &before);
        let written = 1 + round * 601 % LEN;
        let direction = if round % 2 == 0 {
            FromDevice
        } else {
            Bidirectional
        };
        let entry = bench.memory.entry(100, LEN, direction);
        let mapping = bench.driver.map(entry).await.unwrap();
        let copied = bench.driver.unmap(&mapping, Some(written)).await.unwrap();
        assert_eq!(copied, written, "lengths are not read from shared memory");
        let after = bench.memory();
        let (head, rest) = after.split_at(100);
        let (middle, tail) = rest.split_at(usize(written));
        assert!(head.iter().chain(tail).all(|byte| *byte == 0x77), "{round}");
        // A byte is what somebody wrote: the adversary, the copy in, or zero.
        assert!(
            middle.iter().all(|byte| [0, 1, 2, 0x77].contains(byte)),
            "{round}"
        );
    }
    done.store(true, Relaxed);
    assert!(adversary.join().unwrap() > 0);
    assert_eq!(bench.node.usage("d0").await.streaming_mappings, 0);
}

/// D3: page 0 is never given, in so many random operations, and what is given
/// never overlaps. `DOMAIND_TEST_ROUNDS` makes them more.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn page_0_is_never_given_and_nothing_twice() {
    const SEED: u64 = 0x5eed_0003;
    println!("seed {SEED:#x}");
    let rounds = domaind_tests::rounds(40);
    let node = Node::start().await;
    node.create("d0", node::spec(1 << 20, 1 << 20))
        .await
        .unwrap();
    let mut driver = Raw::driver(&node, "d0").await;
    let memory = driver.memory(40 * P).await;
    let mut random = SEED;
    let mut next = |below: u64| {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        random % below
    };
    let mut live: Vec<v1::StreamingMapping> = Vec::new();
    for _ in 0..rounds {
        // In batches: what does not fit is refused by itself.
        let entries = (0..64).map(|_| {
            let pages = if next(4) == 0 { 1 + next(20) } else { 1 };
            memory.entry(0, pages * P, ToDevice)
        });
        let mapped = driver.map_all(entries.collect(), true).await.unwrap();
        live.extend(
            mapped
                .results
                .into_iter()
                .filter_map(|result| match result.outcome {
                    Some(v1::map_result::Outcome::Mapping(mapping)) => Some(mapping),
                    _ => None,
                }),
        );
        live.sort_unstable_by_key(|mapping| mapping.iova);
        assert!(live[0].iova >= P, "page 0 was given");
        let apart =
            |pair: &[v1::StreamingMapping]| pair[0].iova + pair[0].len_bytes <= pair[1].iova;
        assert!(live.windows(2).all(apart), "given twice");
        let (go, stay) = live.into_iter().partition::<Vec<_>, _>(|_| next(2) == 0);
        live = stay;
        let entries: Vec<_> = go
            .iter()
            .map(|mapping| unmap_entry(mapping, None))
            .collect();
        if !entries.is_empty() {
            driver.unmap_all(entries, false).await.unwrap();
        }
        let rings = [
            driver.alloc_len(1 + next(9 * P)).await,
            driver.alloc_len(1).await,
        ];
        for ring in rings.into_iter().flatten() {
            assert!(ring.iova >= 1 << 20, "coherent memory lies above");
            driver.free(ring.iova, ring.mapping_id).await.unwrap();
        }
    }
    assert_eq!(node.mappings("d0").await.len(), live.len());
}

/// B-08: what is scrubbed is filled with a byte that nobody writes; whoever
/// sees it sees what was not given to him. The whole suite runs so with
/// `DOMAIND_TEST_POISON=1`.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn poison_mode() {
    const SEED: u64 = 0x5eed_0b08;
    println!("seed {SEED:#x}");
    let node = Node::configured(&[], &[("DOMAIND_POISON", "1")]).await;
    node.create("d0", node::spec(1 << 20, 1 << 20))
        .await
        .unwrap();
    let mut driver = Raw::driver(&node, "d0").await;
    let memory = driver.memory(MEMORY).await;
    // It is on: memory that was never given is not zero.
    for (start, bytes) in driver.view() {
        assert!(bytes.iter().all(|byte| *byte == POISON), "above {start:#x}");
    }
    let original = vec![0x11; usize(MEMORY)];
    let mut random = SEED;
    let mut next = |below: u64| {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        random % below
    };
    let mut rings: Vec<v1::AllocCoherentResponse> = Vec::new();
    for round in 0..domaind_tests::rounds(300) {
        poke(&memory.fd, 0, &original);
        let direction = DIRECTIONS[usize(next(3))];
        let (offset, len) = (next(2 * P), 1 + next(5 * P));
        let entry = MapEntry {
            keep_offset: next(2) == 0,
            preserve: next(4) == 0,
            skip_sync: next(4) == 0,
            ..memory.entry(offset, len, direction)
        };
        let mapping = driver.map(entry).await.unwrap();
        let slack = mapping.iova % P;
        let granules = (slack + len).div_ceil(P) * P;
        let seen = driver.read(mapping.iova - slack, usize(granules));
        assert!(!seen.contains(&POISON), "{round}: {entry:?}");
        // The device writes a part of it, or nothing.
        let written = next(len + 1);
        driver.write(mapping.iova, &vec![0x22; usize(written)]);
        if next(3) == 0 && direction != ToDevice {
            let sync = driver.sync(&mapping, 0, len, SyncTarget::ForCpu).await;
            sync.unwrap();
        }
        let cut = direction != ToDevice && !entry.preserve && !entry.skip_sync;
        driver
            .unmap(&mapping, cut.then_some(written))
            .await
            .unwrap();
        let held = peek(&memory.fd, 0, usize(MEMORY));
        assert!(!held.contains(&POISON), "{round}: {entry:?}");

        let ring = driver.alloc_len(1 + next(5 * P)).await.unwrap();
        let granules = ring.len_bytes.div_ceil(P) * P;
        let seen = driver.read(ring.iova, usize(granules));
        assert!(seen.iter().all(|byte| *byte == 0), "{round}: a ring");
        driver.write(ring.iova, &vec![0x33; usize(granules)]);
        rings.push(ring);
        if rings.len() > 3 {
            let ring = rings.remove(usize(next(4)));
            driver.free(ring.iova, ring.mapping_id).await.unwrap();
        }
        if next(20) == 0 {
            domaind_tests::Caller::session(&driver)
                .reset(true)
                .await
                .unwrap();
        }
    }
}
