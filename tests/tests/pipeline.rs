//! Pipelines: batches of Map, Unmap and Sync on one stream do what the calls do,
//! in order, as fast as their answers are read.

use std::time::{Duration, Instant};

use domaind_client::{
    Access, BatchMode, Direction as Way, Error, MapSpec, PipelineOptions, Role, driver_memfd,
};
use domaind_tests::files::{self, peek, poke};
use domaind_tests::frames::Acker;
use domaind_tests::node::{domain_id, spec};
use domaind_tests::pipe::{maps, places, syncs, unmaps};
use domaind_tests::raw::{Memory, unmap_entry};
use domaind_tests::refusal::assert_numbers;
use domaind_tests::v1::Direction::{Bidirectional, FromDevice, ToDevice};
use domaind_tests::v1::{
    MapEntry, PipelineOperation, PipelineRequest, PipelineResponse, Refusal, StreamingMapping,
    SyncTarget, map_result,
};
use domaind_tests::wait::{self, soon};
use domaind_tests::{Actor, Ask, Code, Node, P, Pipe, Raw, Reason, refused, v1};
use tonic::codegen::http::uri::PathAndQuery;
use tonic_prost::ProstCodec;

const MEMORY: u64 = 32 * P;
/// In which what does not wait has come, and what waits has not.
const MOMENT: Duration = Duration::from_millis(100);
/// The daemon would wait for so long if it waited.
const STOP_LIMIT: Duration = Duration::from_secs(10);

struct Bench {
    node: Node,
    driver: Raw,
    memory: Memory,
    pipe: Pipe,
}

impl Bench {
    async fn new() -> Bench {
        Bench::with(4096).await
    }

    /// With a bounce aperture of so many pages.
    async fn with(pages: u64) -> Bench {
        let node = Node::start().await;
        node.create("d0", spec(pages * P, 0)).await.unwrap();
        let mut driver = Raw::driver(&node, "d0").await;
        let memory = driver.memory(MEMORY).await;
        let pipe = Pipe::open(&driver).await.unwrap();
        Bench {
            node,
            driver,
            memory,
            pipe,
        }
    }

    /// Maps, all or nothing.
    async fn map(&mut self, entries: &[MapEntry]) -> Vec<StreamingMapping> {
        let lengths: Vec<_> = entries.iter().map(|entry| entry.len_bytes).collect();
        let answer = self.pipe.ask(maps(entries)).await.unwrap();
        assert_eq!(answer.entries as usize, entries.len());
        assert_eq!(answer.mapping_id.len(), entries.len());
        assert!(answer.refused.is_empty() && answer.copied_bytes.is_empty());
        places(&answer, &lengths)
    }

    async fn mapped(&self) -> u64 {
        self.node.usage("d0").await.streaming_mappings
    }
}

fn usize(value: u64) -> usize {
    usize::try_from(value).unwrap()
}

fn partial(request: PipelineRequest) -> PipelineRequest {
    PipelineRequest {
        partial: true,
        ..request
    }
}

/// Refusals of a partial batch, at their places.
fn refusals(answer: &PipelineResponse) -> Vec<Option<Refusal>> {
    let mut all = vec![None; answer.entries as usize];
    for one in &answer.refused {
        all[one.index as usize] = one.refusal.clone();
    }
    all
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn the_bytes_of_a_batch_travel_as_those_of_the_calls_do_and_slack_reads_zero() {
    let mut bench = Bench::new().await;
    let before = files::pattern(7, usize(MEMORY));
    poke(&bench.memory.fd, 0, &before);
    let mut entries = Vec::new();
    // Apart from one another, so that what flows back is told apart.
    for (slot, offset) in (0..).map(|slot| slot * 2 * P).zip([0, 1, 100, 4_000]) {
        for (more, direction) in [ToDevice, FromDevice, Bidirectional]
            .into_iter()
            .enumerate()
        {
            let at = slot + offset + 500 * more as u64;
            entries.push(MapEntry {
                keep_offset: more != 1,
                ..bench.memory.entry(at, 333, direction)
            });
        }
    }

    let mapped = bench.map(&entries).await;

    let mut wanted = before.clone();
    let mut ends = Vec::new();
    for (entry, mapping) in entries.iter().zip(&mapped) {
        let slack = if entry.keep_offset {
            entry.offset % P
        } else {
            0
        };
        assert_eq!(mapping.iova % P, slack);
        let granules = usize((slack + 333).div_ceil(P) * P);
        let (at, from) = (usize(slack), usize(entry.offset));
        let mut shown = vec![0; granules];
        if entry.direction() != FromDevice {
            shown[at..at + 333].copy_from_slice(&before[from..from + 333]);
        }
        let seen = bench.driver.read(mapping.iova - slack, granules);
        assert!(seen == shown, "{entry:?} to the device");
        // The device writes the slack as well; 200 of its bytes count.
        let written = files::pattern(8, granules);
        bench.driver.write(mapping.iova - slack, &written);
        let count = (entry.direction() != ToDevice).then_some(200);
        ends.push(unmap_entry(mapping, count));
        if count.is_some() {
            wanted[from..from + 200].copy_from_slice(&written[at..at + 200]);
        }
    }
    let ended = bench.pipe.ask(unmaps(&ends)).await.unwrap();
    let copied: Vec<_> = ends
        .iter()
        .map(|end| end.written_bytes.unwrap_or(0))
        .collect();
    assert_eq!(ended.copied_bytes, copied);
    assert!(peek(&bench.memory.fd, 0, usize(MEMORY)) == wanted);
    assert_eq!(bench.node.usage("d0").await.bounce_used_bytes, 0);
    bench.pipe.finish().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_sync_copies_a_part_one_way() {
    let mut bench = Bench::new().await;
    poke(&bench.memory.fd, 0, b"from the driver");
    let [one] = bench.map(&[bench.memory.entry(0, 15, Bidirectional)]).await[..] else {
        panic!("one")
    };
    let part = |offset, len_bytes, target: SyncTarget| v1::SyncEntry {
        iova: one.iova,
        mapping_id: one.mapping_id,
        offset,
        len_bytes,
        target: target.into(),
    };
    bench.driver.write(one.iova, b"FROM THE DEVICE");
    let to_cpu = [
        part(0, 4, SyncTarget::ForCpu),
        part(9, 6, SyncTarget::ForCpu),
    ];
    let synced = bench.pipe.ask(syncs(&to_cpu)).await.unwrap();
    assert_eq!((synced.entries, synced.refused.len()), (2, 0));
    assert_eq!(peek(&bench.memory.fd, 0, 15), b"FROM the DEVICE");
    poke(&bench.memory.fd, 0, b"once more again");
    let to_device = syncs(&[part(5, 4, SyncTarget::ForDevice)]);
    bench.pipe.ask(to_device).await.unwrap();
    assert_eq!(bench.driver.read(one.iova, 15), b"FROM moreDEVICE");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn batches_are_done_and_answered_in_the_order_in_which_they_were_sent() {
    let mut bench = Bench::new().await;
    let one = maps(&[bench.memory.entry(0, P, Bidirectional)]);
    // Which place and number each of them gets, nobody being beside.
    let first = bench.pipe.ask(one.clone()).await.unwrap();
    for k in 0..50 {
        let sync = syncs(&[v1::SyncEntry {
            iova: first.iova[0],
            mapping_id: first.mapping_id[0],
            offset: k,
            len_bytes: 1,
            target: SyncTarget::ForCpu.into(),
        }]);
        let nothing = unmaps(&[v1::UnmapEntry::default()]);
        for request in [one.clone(), sync, nothing] {
            bench.pipe.send(request);
        }
    }
    let mut ids = vec![first.mapping_id[0]];
    for _ in 0..50 {
        let mapped = bench.pipe.next().await.unwrap().unwrap();
        assert_eq!(mapped.operation(), PipelineOperation::Map);
        ids.extend(mapped.mapping_id);
        let synced = bench.pipe.next().await.unwrap().unwrap();
        assert_eq!(synced.operation(), PipelineOperation::Sync);
        assert_eq!((synced.entries, &synced.refusal), (1, &None));
        let refused = bench.pipe.next().await.unwrap().unwrap();
        assert_eq!(refused.operation(), PipelineOperation::Unmap);
        let refusal = refused.refusal.unwrap();
        assert_eq!(refusal.reason(), Reason::NoSuchMapping);
    }
    assert!(ids.is_sorted() && ids.len() == 51, "{ids:?}");
    let Bench { node, pipe, .. } = bench;
    pipe.finish().await.unwrap();
    let usage = node.usage("d0").await;
    assert_eq!(
        usage.streaming_mappings, 51,
        "they do not end with the stream"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_refused_batch_changes_nothing_and_the_corrected_one_gets_the_same_place() {
    let mut bench = Bench::new().await;
    let good = bench.memory.entry(0, P, ToDevice);
    let held = bench.map(&[good]).await;
    let usage = bench.node.usage("d0").await;
    let bad = MapEntry {
        memory_id: 999,
        ..good
    };
    let wrong = maps(&[good, good, bad, good]);
    let refusal = refused(
        bench.pipe.ask(wrong).await,
        Code::NotFound,
        Reason::NoSuchMemory,
    );
    assert_eq!(refusal.metadata["entry_index"], "2");
    assert_eq!(bench.node.usage("d0").await, usage);

    let again = bench.map(&[good; 4]).await;

    let free: Vec<_> = (1..=4).map(|page| held[0].iova + page * P).collect();
    let taken: Vec<_> = again.iter().map(|mapping| mapping.iova).collect();
    assert_eq!(taken, free);
    // An Unmap that is refused for its last entry ends none.
    let mut ends: Vec<_> = again.iter().map(|one| unmap_entry(one, None)).collect();
    ends[3].mapping_id += 1;
    let missing = bench.pipe.ask(unmaps(&ends)).await;
    refused(missing, Code::NotFound, Reason::NoSuchMapping);
    assert_eq!(bench.mapped().await, 5);
    ends[3].mapping_id -= 1;
    bench.pipe.ask(unmaps(&ends)).await.unwrap();
    assert_eq!(bench.node.usage("d0").await, usage);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_partial_batch_answers_each_entry_as_the_call_does() {
    let mut bench = Bench::new().await;
    let good = bench.memory.entry(0, P, FromDevice);
    let entries = [
        good,
        MapEntry {
            memory_id: 999,
            ..good
        },
        MapEntry {
            direction: 9,
            ..good
        },
        MapEntry {
            len_bytes: 0,
            ..good
        },
        MapEntry {
            offset: MEMORY,
            ..good
        },
        MapEntry {
            offset: u64::MAX,
            ..good
        },
        MapEntry {
            align_bytes: 3,
            ..good
        },
        MapEntry {
            limit: Some(P),
            ..good
        },
        good,
    ];
    let called = bench.driver.map_all(entries.to_vec(), true).await.unwrap();
    let answer = bench.pipe.ask(partial(maps(&entries))).await.unwrap();
    let by_call = called
        .results
        .into_iter()
        .map(|result| match result.outcome {
            Some(map_result::Outcome::Refusal(refusal)) => Some(refusal),
            _ => None,
        });
    let by_call: Vec<_> = by_call.collect();
    assert_eq!(refusals(&answer), by_call);
    assert_eq!(by_call.iter().flatten().count(), 7);
    let is_there: Vec<_> = answer.iova.iter().map(|iova| *iova != 0).collect();
    let mut wanted = [false; 9];
    (wanted[0], wanted[8]) = (true, true);
    assert_eq!(is_there, wanted);

    let mapping = places(&answer, &[P])[0];
    let end = unmap_entry(&mapping, Some(P));
    let ends = [
        v1::UnmapEntry { iova: 1, ..end },
        v1::UnmapEntry {
            written_bytes: None,
            ..end
        },
        v1::UnmapEntry {
            written_bytes: Some(P + 1),
            ..end
        },
        v1::UnmapEntry {
            skip_sync: true,
            ..end
        },
    ];
    let called = bench.driver.unmap_all(ends.to_vec(), true).await.unwrap();
    let by_call: Vec<_> = called.results.into_iter().map(|one| one.refusal).collect();
    let answer = bench.pipe.ask(partial(unmaps(&ends))).await.unwrap();
    assert_eq!(refusals(&answer), by_call);
    assert_eq!(by_call.iter().flatten().count(), 4);
    assert_eq!(answer.copied_bytes, [0; 4]);

    let part = v1::SyncEntry {
        iova: mapping.iova,
        mapping_id: mapping.mapping_id,
        offset: 0,
        len_bytes: 1,
        target: SyncTarget::ForCpu.into(),
    };
    let parts = [
        v1::SyncEntry { target: 9, ..part },
        v1::SyncEntry { offset: P, ..part },
        part,
        v1::SyncEntry {
            target: SyncTarget::ForDevice.into(),
            ..part
        },
    ];
    let called = bench.driver.sync_all(parts.to_vec(), true).await.unwrap();
    let by_call: Vec<_> = called.results.into_iter().map(|one| one.refusal).collect();
    let answer = bench.pipe.ask(partial(syncs(&parts))).await.unwrap();
    assert_eq!(refusals(&answer), by_call);
    assert_eq!(by_call.iter().flatten().count(), 3);

    // All or nothing, a call says the same of the first bad entry.
    let call = bench.driver.map_all(entries.to_vec(), false).await;
    assert_eq!(
        bench.pipe.ask(maps(&entries)).await.unwrap_err(),
        call.unwrap_err()
    );
    let call = bench.driver.sync_all(parts.to_vec(), false).await;
    assert_eq!(
        bench.pipe.ask(syncs(&parts)).await.unwrap_err(),
        call.unwrap_err()
    );
    assert_eq!(bench.mapped().await, 4);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_column_has_a_value_for_each_or_one_for_all_or_none() {
    let mut bench = Bench::new().await;
    let short = PipelineRequest {
        operation: PipelineOperation::Map.into(),
        memory_id: vec![bench.memory.id],
        offset: vec![0, P, 2 * P],
        len_bytes: vec![100],
        direction: vec![ToDevice.into()],
        ..Default::default()
    };
    let answer = bench.pipe.ask(short.clone()).await.unwrap();
    assert_eq!((answer.entries, answer.mapping_id.len()), (3, 3));
    let malformed = |answer| refused(answer, Code::InvalidArgument, Reason::Malformed);
    let uneven = PipelineRequest {
        keep_offset: vec![true; 2],
        ..short.clone()
    };
    let refusal = malformed(bench.pipe.ask(uneven).await);
    let numbers = [("column", "keep_offset"), ("values", "2"), ("entries", "3")];
    assert_numbers(&refusal, &numbers);
    let foreign = PipelineRequest {
        iova: vec![1],
        ..short.clone()
    };
    let refusal = malformed(bench.pipe.ask(foreign).await);
    assert_numbers(&refusal, &[("column", "iova"), ("values", "1")]);
    let empty = PipelineRequest {
        operation: PipelineOperation::Sync.into(),
        ..Default::default()
    };
    malformed(bench.pipe.ask(empty.clone()).await);
    let nothing = PipelineRequest {
        operation: 0,
        ..empty
    };
    malformed(bench.pipe.ask(nothing).await);
    for (entries, is_good) in [(1_024, true), (1_025, false)] {
        let many = PipelineRequest {
            offset: vec![0; entries],
            ..short.clone()
        };
        let answer = bench.pipe.ask(many).await;
        assert_eq!(answer.is_ok(), is_good, "{entries}");
    }
    assert_eq!(bench.mapped().await, 3 + 1_024);
}

/// P-04.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_batch_that_is_sent_again_on_another_stream_has_one_effect_and_one_answer() {
    let mut bench = Bench::new().await;
    let mut other = Pipe::open(&bench.driver).await.unwrap();
    let named = PipelineRequest {
        request_id: "batch".to_owned(),
        ..maps(&[bench.memory.entry(0, P, ToDevice); 3])
    };
    let first = bench.pipe.ask(named.clone()).await.unwrap();
    assert_eq!(other.ask(named.clone()).await, Ok(first.clone()));
    assert_eq!(bench.pipe.ask(named.clone()).await, Ok(first));
    assert_eq!(bench.mapped().await, 3);
    let another = PipelineRequest {
        partial: true,
        ..named
    };
    let taken = other.ask(another).await;
    refused(taken, Code::InvalidArgument, Reason::RequestId);
    let long = PipelineRequest {
        request_id: "x".repeat(65),
        ..maps(&[bench.memory.entry(0, P, ToDevice)])
    };
    let too_long = other.ask(long).await;
    refused(too_long, Code::InvalidArgument, Reason::RequestId);
    // Of a refused batch nothing is kept.
    let missing = PipelineRequest {
        request_id: "later".to_owned(),
        memory_id: vec![bench.memory.id + 1],
        ..maps(&[bench.memory.entry(0, P, ToDevice)])
    };
    let early = other.ask(missing.clone()).await;
    refused(early, Code::NotFound, Reason::NoSuchMemory);
    let later = bench.driver.memory(P).await;
    assert_eq!(later.id, bench.memory.id + 1);
    assert_eq!(bench.pipe.ask(missing).await.unwrap().entries, 1);
    other.finish().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_device_has_no_pipeline_and_a_driver_not_more_than_its_quota() {
    let bench = Bench::new().await;
    let device = Raw::device(&bench.node, "d0").await;
    let denied = Pipe::open(&device).await;
    refused(denied, Code::PermissionDenied, Reason::WrongRole);
    let mut more = Vec::new();
    for _ in 0..3 {
        more.push(Pipe::open(&bench.driver).await.unwrap());
    }
    let refusal = refused(
        Pipe::open(&bench.driver).await,
        Code::ResourceExhausted,
        Reason::QuotaExceeded,
    );
    assert_eq!(refusal.metadata["limit"], "4");
    assert_numbers(&refusal, &[("quota", "pipelines"), ("used", "4")]);
    let other = Raw::driver(&bench.node, "d0").await;
    Pipe::open(&other).await.unwrap().finish().await.unwrap();
    more.pop().unwrap().finish().await.unwrap();
    drop(more);
    let opened = async {
        while Pipe::open(&bench.driver).await.is_err() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    soon("a free place", opened).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn the_end_of_the_session_or_the_domain_ends_its_pipelines_and_what_they_mapped() {
    let mut bench = Bench::new().await;
    bench.map(&[bench.memory.entry(0, P, ToDevice); 9]).await;
    bench.node.evict(bench.driver.name()).await.unwrap();
    let end = bench.pipe.next().await.expect("an error");
    refused(end, Code::FailedPrecondition, Reason::SessionEnded);
    wait::until_equal("the mappings", 0, || bench.mapped()).await;

    let mut second = Raw::driver(&bench.node, "d0").await;
    let memory = second.memory(P).await;
    let mut pipe = Pipe::open(&second).await.unwrap();
    pipe.ask(maps(&[memory.entry(0, P, ToDevice)]))
        .await
        .unwrap();
    // It is answered late, because the test keeps what the session could reach.
    let deleting = bench.node.delete("d0", true);
    let (_, end) = tokio::join!(deleting, pipe.next());
    let end = end.expect("an error");
    refused(end, Code::FailedPrecondition, Reason::DomainClosed);

    // One that ends by itself, and asks no more.
    bench.node.domain("d1").await;
    let third = Raw::driver(&bench.node, "d1").await;
    let mut pipe = Pipe::open(&third).await.unwrap();
    drop(third);
    let end = pipe.next().await.expect("an error");
    refused(end, Code::FailedPrecondition, Reason::SessionEnded);
}

/// Who reads no answers has no more batches done, and others do not notice.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn who_reads_no_answers_is_served_no_more_until_he_reads() {
    const BATCHES: u64 = 1_000;
    let mut bench = Bench::new().await;
    // Each maps one buffer, and its answer says at length what it thinks of the
    // others: some 15 KiB, where the client lets 2 MiB come.
    let good = bench.memory.entry(0, P, ToDevice);
    let mut entries = vec![
        MapEntry {
            memory_id: 999,
            ..good
        };
        256
    ];
    entries[0] = good;
    let batch = partial(maps(&entries));
    for _ in 0..BATCHES {
        bench.pipe.send(batch.clone());
    }
    // Until it has not gone on for a while.
    let stalled = async {
        let mut before = 0;
        loop {
            tokio::time::sleep(5 * MOMENT).await;
            let mapped = bench.mapped().await;
            if mapped == before && mapped > 0 {
                return mapped;
            }
            before = mapped;
        }
    };
    let stalled = soon("an end of it", stalled).await;
    assert!(stalled < BATCHES / 2, "{stalled} batches are done unread");
    let mut other = Raw::driver(&bench.node, "d0").await;
    let memory = other.memory(P).await;
    let mut theirs = Pipe::open(&other).await.unwrap();
    for _ in 0..20 {
        let one = maps(&[memory.entry(0, P, ToDevice)]);
        let mapped = theirs.ask(one).await.unwrap();
        let end = unmap_entry(&places(&mapped, &[P])[0], None);
        theirs.ask(unmaps(&[end])).await.unwrap();
    }
    assert_eq!(bench.mapped().await, stalled);

    for _ in 0..BATCHES {
        let answer = bench.pipe.next().await.unwrap().unwrap();
        assert_eq!((answer.entries, answer.refused.len()), (256, 255));
    }
    assert_eq!(bench.mapped().await, BATCHES);
}

/// D15.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_client_that_is_killed_with_batches_in_flight_leaves_nothing() {
    let node = Node::start().await;
    node.domain("d0").await;
    let (usage, counts) = (node.usage("d0").await, node.counts().await);
    let mut driver = Actor::driver(&node, "d0");
    let memory = driver.buffer(P);
    let pipe = Ask::Pipe {
        memory,
        len: P,
        entries: 100,
    };
    driver.begin(&pipe);
    let works = async {
        while node.usage("d0").await.streaming_mappings == 0 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    soon("a batch", works).await;

    driver.kill();

    node.until_usage("d0", usage).await;
    node.until_counts(counts).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn what_a_dropped_pipeline_did_not_deliver_is_unmapped_and_what_it_did_stays() {
    let node = Node::start().await;
    node.domain("d0").await;
    let client = node.client().await;
    let domain = domain_id("d0");
    let attach = client.attach(&domain, Role::Driver, Access::ReadWrite);
    let driver = attach.await.unwrap();
    let memfd = driver_memfd("pipeline", P).unwrap();
    let memory = driver.register(memfd, true).await.unwrap();
    let options = PipelineOptions { in_flight: 4 };
    let mut pipeline = driver.pipeline(options).await.unwrap();
    let specs = vec![MapSpec::new(memory.id(), 0, P, Way::ToDevice); 100];
    for _ in 0..4 {
        pipeline.map(&specs, BatchMode::AllOrNothing).unwrap();
    }
    let full = pipeline.map(&specs, BatchMode::AllOrNothing);
    assert!(matches!(full, Err(Error::PipelineFull { in_flight: 4 })));
    assert!(pipeline.next().await.unwrap().is_some());

    drop(pipeline);

    let look = async || node.usage("d0").await.streaming_mappings;
    // Some of it may not even be mapped yet; it does not stay so.
    wait::until_equal("the rest", 100, look).await;
    tokio::time::sleep(MOMENT).await;
    wait::until_equal("the rest", 100, look).await;
    driver.detach().await.unwrap();
    wait::until_equal("the mappings", 0, look).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_daemon_stops_in_time_beside_open_pipelines() {
    let mut bench = Bench::with(2).await;
    // One that waits for room, one that is asked nothing.
    let _silent = Acker::device(&bench.node, "d0").await;
    let one = maps(&[bench.memory.entry(0, P, ToDevice)]);
    let mapped = bench.pipe.ask(one.clone()).await.unwrap();
    let end = unmaps(&[unmap_entry(&places(&mapped, &[P])[0], None)]);
    bench.pipe.ask(end).await.unwrap();
    bench.pipe.send(one);
    let mut idle = Pipe::open(&bench.driver).await.unwrap();
    let early = tokio::time::timeout(MOMENT, bench.pipe.next()).await;
    assert!(early.is_err(), "{early:?}");
    let Bench {
        mut node, mut pipe, ..
    } = bench;
    let begun = Instant::now();
    let stopping = tokio::task::spawn_blocking(move || node.stop());
    for pipe in [&mut pipe, &mut idle] {
        let end = pipe.next().await.expect("an error");
        refused(end, Code::Unavailable, Reason::Draining);
    }
    assert!(soon("the stop", stopping).await.unwrap().success());
    assert!(begun.elapsed() < STOP_LIMIT / 2, "{:?}", begun.elapsed());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_batch_that_finds_no_room_waits_for_the_acknowledgment_and_those_behind_it_too() {
    // Room for one mapping; page 0 is kept.
    let mut bench = Bench::with(2).await;
    let mut acker = Acker::device(&bench.node, "d0").await;
    for request_id in ["", "named"] {
        let one = PipelineRequest {
            request_id: request_id.to_owned(),
            ..maps(&[bench.memory.entry(0, P, ToDevice)])
        };
        let first = bench.driver.map(bench.memory.entry(0, P, ToDevice)).await;
        let first = first.unwrap();
        // While nothing is about to be free, there is no room.
        let plain = PipelineRequest {
            request_id: String::new(),
            ..one.clone()
        };
        let full = bench.pipe.ask(plain).await;
        refused(full, Code::ResourceExhausted, Reason::NoSpace);
        bench.driver.unmap(&first, None).await.unwrap();
        bench.pipe.send(one);
        bench.pipe.send(unmaps(&[v1::UnmapEntry::default()]));
        let change = acker.asked().await;
        let early = tokio::time::timeout(MOMENT, bench.pipe.next()).await;
        assert!(early.is_err(), "{early:?}");

        acker.ack(change.generation).await;

        let mapped = bench.pipe.next().await.unwrap().unwrap();
        assert_eq!(mapped.iova, [first.iova], "{mapped:?}");
        let behind = bench.pipe.next().await.unwrap().unwrap();
        assert_eq!(behind.operation(), PipelineOperation::Unmap);
        let place = places(&mapped, &[P])[0];
        bench.driver.unmap(&place, None).await.unwrap();
        let change = acker.asked().await;
        acker.ack(change.generation).await;
        let look = async || bench.node.usage("d0").await.invalidating_mappings;
        wait::until_equal("what is removed", 0, look).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn what_is_no_batch_ends_its_stream_and_no_other() {
    let mut bench = Bench::new().await;
    let (sender, sent) = domaind_tests::direct::stream();
    // A list where a number should be.
    let strange = v1::MapRequest {
        entries: vec![MapEntry::default()],
        ..Default::default()
    };
    sender.send(strange).unwrap();
    let mut grpc = tonic::client::Grpc::new(bench.node.client().await.channel());
    grpc.ready().await.unwrap();
    let path = PathAndQuery::from_static("/domaind.v1.MappingService/Pipeline");
    let codec = ProstCodec::<v1::MapRequest, PipelineResponse>::default();
    let opened = grpc.streaming(bench.driver.signed(sent), path, codec).await;
    let mut answers = opened.unwrap().into_inner();
    let end = soon("the end", answers.message()).await.unwrap_err();
    assert_eq!(end.code(), Code::Internal, "{end:?}");
    bench.map(&[bench.memory.entry(0, P, ToDevice)]).await;
}
