//! What a streaming mapping copies, and what it does not: cases D3 to D9.

use domaind_tests::files::{peek, poke};
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
        let node = Node::start().await;
        node.domain("d0").await;
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

/// D5: for every offset, length and direction exactly `len` bytes travel, and
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

/// D6.
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

/// D6, `preserve`: the device sees the original, and what it does not write
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
    let bench = Bench::new().await;
    let mut mappings = Vec::new();
    for pages in 1..=20 {
        let align_bytes = (pages * P).next_power_of_two();
        let entry = MapEntry {
            align_bytes,
            ..bench.memory.entry(0, pages * P, ToDevice)
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

/// D9.
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
        driver.read(ring.iova, usize(2 * P)) == vec![0; usize(2 * P)],
        "zeroed"
    );

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
        quotas: None,
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

    assert!(bench.driver.read(mapping.iova, usize(2 * P)) == vec![0; usize(2 * P)]);
}

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
