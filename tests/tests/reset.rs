//! ResetBounce: the whole bounce aperture back, and nothing else. D11, as far
//! as it goes without leases.

use domaind_tests::direct::{EVERYTHING, Table};
use domaind_tests::node::{scrubbed, spec};
use domaind_tests::raw::{Memory, unmap_entry};
use domaind_tests::refusal::assert_numbers;
use domaind_tests::v1::Direction::{Bidirectional, FromDevice, ToDevice};
use domaind_tests::v1::{self, Perm, SyncTarget};
use domaind_tests::{Caller, Code, Node, P, Raw, Reason, files, refused};

/// What the aperture holds.
const BOUNCE: u64 = 64 * P;

struct Bench {
    node: Node,
    driver: Raw,
    other: Raw,
    memory: Memory,
    caller: Caller,
}

impl Bench {
    async fn new() -> Bench {
        let node = Node::start().await;
        node.create("d0", spec(BOUNCE, 16 * P)).await.unwrap();
        let mut driver = Raw::driver(&node, "d0").await;
        let other = Raw::driver(&node, "d0").await;
        let memory = driver.memory(16 * P).await;
        let caller = Caller::session(&driver);
        Bench {
            node,
            driver,
            other,
            memory,
            caller,
        }
    }

    /// Three streaming mappings, of two sessions.
    async fn stream(&mut self) -> Vec<v1::StreamingMapping> {
        let mut mappings = Vec::new();
        for direction in [ToDevice, Bidirectional] {
            let entry = self.memory.entry(0, 3 * P, direction);
            mappings.push(self.driver.map(entry).await.unwrap());
        }
        let theirs = self.other.memory(4 * P).await;
        let entry = theirs.entry(5, 700, FromDevice);
        mappings.push(self.other.map(entry).await.unwrap());
        mappings
    }
}

/// D11.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_forced_reset_ends_all_that_is_bounced_and_keeps_the_rest() {
    let mut bench = Bench::new().await;
    let secret = files::pattern(5, 3 * 4_096);
    files::poke(&bench.memory.fd, 0, &secret);
    let fresh = bench.node.usage("d0").await;
    let mappings = bench.stream().await;
    let ring = bench.driver.alloc_len(5_000).await.unwrap();
    bench.driver.write(ring.iova, b"the ring stays");
    bench.caller.map(bench.memory.at(1_000, 2)).await.unwrap();
    bench
        .driver
        .write(mappings[1].iova, b"from the device, and lost");

    // Not while there are any.
    let before = Table::of(&bench.node, "d0").await;
    let refusal = refused(
        bench.caller.reset(false).await,
        Code::FailedPrecondition,
        Reason::BounceInUse,
    );
    assert_numbers(&refusal, &[("streaming_mappings", "3")]);
    assert_eq!(Table::of(&bench.node, "d0").await, before);
    let seen = bench.driver.read(mappings[0].iova, 3 * 4_096);
    assert!(seen == secret, "what is mapped is still there");

    assert_eq!(bench.caller.reset(true).await, Ok(3));

    let usage = bench.node.usage("d0").await;
    assert_eq!((usage.streaming_mappings, usage.bounce_used_bytes), (0, 0));
    assert_eq!(
        usage.bounce_largest_hole_bytes,
        fresh.bounce_largest_hole_bytes
    );
    let left = bench.node.mappings("d0").await;
    assert_eq!(left.len(), 2, "{left:?}");
    // Nothing has flowed back, and nothing is left.
    assert!(files::peek(&bench.memory.fd, 0, 3 * 4_096) == secret);
    for reader in [&bench.driver, &bench.other] {
        let (start, bytes) = &reader.view()[0];
        let left = bytes.iter().position(|byte| *byte != scrubbed());
        assert_eq!(left, None, "above {start:#x}");
        assert_eq!(reader.read(ring.iova, 14), b"the ring stays");
    }
    let direct = bench
        .caller
        .translate(1_000 * P, 1_002 * P - 1, Perm::Read)
        .await;
    assert_eq!(direct.unwrap()[0].memory_id, bench.memory.id);
    // What was mapped is not any more.
    let not_found = Code::NotFound;
    for (mapping, owner) in mappings
        .iter()
        .zip([&bench.driver, &bench.driver, &bench.other])
    {
        let gone = Reason::NoSuchMapping;
        refused(owner.unmap(mapping, None).await, not_found, gone);
        let sync = owner.sync(mapping, 0, 1, SyncTarget::ForCpu).await;
        refused(sync, not_found, gone);
        let at = mapping.iova;
        let hole = bench.caller.translate(at, at, Perm::Read).await;
        refused(hole, not_found, Reason::NotMapped);
    }
    assert!(files::peek(&bench.memory.fd, 0, 3 * 4_096) == secret);
    // The ring can be freed, and memory unmapped and given back.
    bench.driver.free(ring.iova, ring.mapping_id).await.unwrap();
    bench.caller.clear(&[EVERYTHING]).await.unwrap();
    bench.driver.unregister(bench.memory.id).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_reset_aperture_is_used_again_from_its_first_page_to_its_last() {
    let mut bench = Bench::new().await;
    let old = bench.stream().await;
    assert_eq!(bench.caller.reset(true).await, Ok(3));
    let domain = bench.node.get("d0").await.unwrap();
    assert_eq!(domain.max_mapping_bytes, BOUNCE - P);
    // The same addresses, other names.
    let large = bench.driver.memory(BOUNCE).await;
    let entry = large.entry(0, BOUNCE - P, FromDevice);
    let whole = bench.driver.map(entry).await.unwrap();
    assert!(
        old.iter()
            .all(|mapping| mapping.mapping_id != whole.mapping_id)
    );
    let fresh = bench
        .driver
        .read(whole.iova, usize::try_from(BOUNCE - P).unwrap());
    assert!(
        fresh.iter().all(|byte| *byte == 0),
        "zero, in poison mode too"
    );
    for mapping in &old {
        let stale = v1::StreamingMapping {
            iova: whole.iova,
            ..*mapping
        };
        for mapping in [mapping, &stale] {
            let entry = unmap_entry(mapping, None);
            let refusal = bench.driver.unmap_all(vec![entry], false).await;
            refused(refusal, Code::NotFound, Reason::NoSuchMapping);
        }
    }
    bench.driver.unmap(&whole, Some(0)).await.unwrap();
    assert_eq!(bench.caller.reset(false).await, Ok(0), "nothing is in use");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn an_unused_aperture_is_reset_without_force_and_scrubbed() {
    let bench = Bench::new().await;
    files::poke(&bench.memory.fd, 0, &[0x77; 4_096]);
    let mapping = bench
        .driver
        .map(bench.memory.entry(0, P, ToDevice))
        .await
        .unwrap();
    bench.driver.unmap(&mapping, None).await.unwrap();
    // Whoever may write has scribbled where nothing is mapped, too.
    bench.driver.write(BOUNCE - 9, b"scribbled");
    let generation = bench.node.get("d0").await.unwrap().direct_generation;
    for force in [false, true] {
        assert_eq!(bench.caller.reset(force).await, Ok(0));
        let (_, bytes) = &bench.other.view()[0];
        assert!(bytes.iter().all(|byte| *byte == scrubbed()));
    }
    let after = bench.node.get("d0").await.unwrap().direct_generation;
    assert_eq!(after, generation, "the direct table is not concerned");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn without_a_bounce_aperture_there_is_nothing_to_reset() {
    let node = Node::start().await;
    node.create("d0", spec(0, 16 * P)).await.unwrap();
    let driver = Raw::driver(&node, "d0").await;
    let callers = [Caller::session(&driver), Caller::operator(&node, "d0")];
    for caller in callers {
        for force in [false, true] {
            let refusal = caller.reset(force).await;
            refused(refusal, Code::InvalidArgument, Reason::NoAperture);
        }
    }
}

/// Reset while others map, unmap and sync: each call has happened before or
/// after it, or says that it was in the way; nothing of an earlier buffer is
/// ever seen.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn resets_in_the_middle_of_traffic_leave_a_domain_that_works() {
    let mut bench = Bench::new().await;
    let memory = bench.other.memory(16 * P).await;
    files::poke(&memory.fd, 0, &[0x77; 16 * 4_096]);
    let Bench {
        node,
        driver,
        other,
        caller,
        ..
    } = bench;
    let traffic = tokio::spawn(async move {
        let mut lost = 0_u32;
        for round in 0..400_u64 {
            let direction = if round % 2 == 0 {
                FromDevice
            } else {
                Bidirectional
            };
            let entry = memory.entry(0, 1 + round * 97 % (8 * P), direction);
            let fine = [Reason::NoSuchMapping, Reason::BounceReset];
            let mapping = match other.map(entry).await {
                Ok(mapping) => mapping,
                Err(refusal) => {
                    assert_eq!(refusal.reason(), Reason::BounceReset, "{refusal:?}");
                    lost += 1;
                    continue;
                }
            };
            let written = (direction == FromDevice).then_some(0);
            if let Err(refusal) = other.unmap(&mapping, written).await {
                assert!(fine.contains(&refusal.reason()), "{refusal:?}");
                lost += 1;
            }
        }
        lost
    });
    let mut ended = 0;
    while !traffic.is_finished() {
        ended += caller.reset(true).await.unwrap();
    }
    let lost = traffic.await.unwrap();
    println!("{ended} mappings were ended, {lost} calls were told");
    caller.reset(true).await.unwrap();
    let usage = node.usage("d0").await;
    assert_eq!((usage.streaming_mappings, usage.bounce_used_bytes), (0, 0));
    assert_eq!(usage.bounce_largest_hole_bytes, BOUNCE - P);
    let (_, bytes) = &driver.view()[0];
    assert!(bytes.iter().all(|byte| *byte == scrubbed()));
}
