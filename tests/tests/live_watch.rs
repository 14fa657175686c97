//! WatchDomain while others change things: no change is missed without a word.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use domaind_client::{DomainEvent, DomainWatch, MappingView};
use domaind_tests::node::domain_id;
use domaind_tests::v1::Direction::ToDevice;
use domaind_tests::wait::soon;
use domaind_tests::{Caller, Node, P, Raw, v1};

/// Pages of the direct space, above the apertures.
const PAGE: u64 = 1 << 20;
/// Mappings of one change, as many as the daemon remembers.
const BATCH: u64 = 200;

/// What a watcher knows.
#[derive(Debug, Default)]
struct Known {
    generation: u64,
    /// By first address: last address.
    mappings: BTreeMap<u64, u64>,
    /// The next snapshot is the first part of one.
    begins: bool,
    /// Parts are missing.
    partial: bool,
    changes: u64,
    resyncs: u64,
}

impl Known {
    fn new() -> Known {
        Known {
            begins: true,
            ..Known::default()
        }
    }

    /// Applies the next event; the generations must follow one another.
    fn apply(&mut self, event: DomainEvent) {
        match event {
            DomainEvent::Snapshot(snapshot) => {
                if std::mem::take(&mut self.begins) {
                    self.mappings.clear();
                    self.generation = snapshot.generation;
                }
                assert_eq!(snapshot.generation, self.generation, "parts of one state");
                self.mappings.extend(snapshot.mappings.iter().map(ends));
                self.partial = snapshot.more;
            }
            DomainEvent::Change(change) => {
                assert!(!self.begins, "a snapshot follows a resync");
                assert_eq!(change.generation, self.generation + 1, "a gap");
                self.generation = change.generation;
                self.changes += 1;
                for range in change.removed {
                    let last = self.mappings.remove(&range.start().get());
                    assert_eq!(last, Some(range.last().get()), "what was there is removed");
                }
                for (start, last) in change.added.iter().map(ends) {
                    assert_eq!(self.mappings.insert(start, last), None, "it was free");
                }
            }
            DomainEvent::Resync { generation } => {
                assert!(generation >= self.generation);
                self.resyncs += 1;
                self.begins = true;
            }
            DomainEvent::Status(_) => {}
        }
    }

    async fn follow(&mut self, watch: &mut DomainWatch, until: u64) {
        while self.generation < until || self.partial || self.begins {
            let event = soon("an event", watch.next()).await;
            self.apply(event.unwrap().expect("the watch goes on"));
        }
    }
}

fn ends(mapping: &MappingView) -> (u64, u64) {
    let range = mapping.visible;
    (range.start().get(), range.last().get())
}

/// What is visible now.
async fn visible(node: &Node) -> BTreeMap<u64, u64> {
    let mappings = node.mappings("d0").await;
    let live = mappings
        .iter()
        .filter(|one| one.state() == v1::MappingState::Live);
    live.map(|one| (one.iova, one.iova + one.len_bytes - 1))
        .collect()
}

/// One batch of the direct table, there and away again: two changes.
async fn flip(caller: &Caller, batch: &[v1::MapDirectEntry]) {
    caller.map_all(batch.to_vec(), false).await.unwrap();
    let last = (PAGE + 2 * BATCH) * P - 1;
    caller.clear(&[(PAGE * P, last)]).await.unwrap();
}

/// W-01.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn slow_watcher_resync() {
    let node = Node::start().await;
    node.domain("d0").await;
    let mut driver = Raw::driver(&node, "d0").await;
    let memory = driver.memory(P).await;
    let caller = Caller::session(&driver);
    // Every second page, so that none leads on to the next.
    let batch: Vec<_> = (0..BATCH).map(|k| memory.at(PAGE + 2 * k, 1)).collect();
    flip(&caller, &batch).await;
    let client = node.client().await;
    let mut watch = client.watch_domain(&domain_id("d0"), None).await.unwrap();
    let mut known = Known::new();
    let now = node.get("d0").await.unwrap().generation;
    known.follow(&mut watch, now).await;
    assert!(known.mappings.is_empty());

    // Reads nothing for longer than is remembered and than its windows take.
    for _ in 0..600 {
        flip(&caller, &batch).await;
    }
    let stays = caller.map(memory.at(PAGE + 1, 1)).await.unwrap();
    let end = node.get("d0").await.unwrap().generation;

    soon("the newest state", known.follow(&mut watch, end)).await;
    assert_eq!(known.resyncs, 1, "told once");
    assert!(
        known.changes < 1200,
        "{} changes were kept for it",
        known.changes
    );
    assert_eq!(known.generation, end);
    assert_eq!(known.mappings, visible(&node).await);
    assert_eq!(known.mappings.len(), 1);
    let (start, last) = domaind_tests::direct::ends(stays.range);
    assert_eq!(known.mappings.get(&start), Some(&last));
    // And goes on, change by change.
    let changes = known.changes;
    flip(&caller, &batch).await;
    // The one in between was cleared with the rest.
    soon("two more", known.follow(&mut watch, end + 2)).await;
    assert_eq!((known.changes, known.resyncs), (changes + 2, 1));
    assert!(known.mappings.is_empty());
}

/// W-02.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn watch_no_gap() {
    let node = Arc::new(Node::start().await);
    node.domain("d0").await;
    let client = node.client().await;
    let mut watch = client.watch_domain(&domain_id("d0"), None).await.unwrap();
    let done = Arc::new(AtomicBool::new(false));
    let mut workers = Vec::new();
    for worker in 0..3_u64 {
        let mut driver = Raw::driver(&node, "d0").await;
        let memory = driver.memory(4 * P).await;
        let done = Arc::clone(&done);
        workers.push(tokio::spawn(async move {
            let caller = Caller::session(&driver);
            let at = PAGE + worker * 64;
            let mut live = Vec::new();
            while !done.load(Relaxed) {
                live.push(
                    driver
                        .map(memory.entry(0, 3 * P - 1, ToDevice))
                        .await
                        .unwrap(),
                );
                if live.len() > 5 {
                    driver.unmap(&live.swap_remove(2), None).await.unwrap();
                }
                caller.map(memory.at(at, 2)).await.unwrap();
                let ring = driver.alloc_len(2 * P).await.unwrap();
                caller.unmap(at * P, (at + 2) * P - 1).await.unwrap();
                driver.free(ring.iova, ring.mapping_id).await.unwrap();
            }
            // What it still has stays for the comparison.
            driver
        }));
    }
    let mut known = Known::new();
    known.follow(&mut watch, 1_500).await;
    done.store(true, Relaxed);
    let mut drivers = Vec::new();
    for worker in workers {
        // Read on meanwhile: it may be a lot.
        let mut worker = std::pin::pin!(worker);
        let driver = loop {
            tokio::select! {
                driver = &mut worker => break driver.expect("no panic"),
                event = watch.next() => known.apply(event.unwrap().expect("it goes on")),
            }
        };
        drivers.push(driver);
    }
    let end = node.get("d0").await.unwrap().generation;
    soon("the end", known.follow(&mut watch, end)).await;

    assert_eq!(known.generation, end);
    assert_eq!(known.mappings, visible(&node).await);
    println!("{} changes, {} resyncs", known.changes, known.resyncs);
    assert!(known.changes > 500, "{known:?}");

    // One who comes back with what it knows gets what came after it, and no more.
    drop(watch);
    let from = known.generation;
    let memory = drivers[0].memory(P).await;
    Caller::session(&drivers[0])
        .map(memory.at(PAGE + 1_000, 1))
        .await
        .unwrap();
    let mut watch = client
        .watch_domain(&domain_id("d0"), Some(from))
        .await
        .unwrap();
    let changes = known.changes;
    soon("one more", known.follow(&mut watch, from + 1)).await;
    assert_eq!(known.changes, changes + 1);
    assert_eq!(known.mappings, visible(&node).await);
}
