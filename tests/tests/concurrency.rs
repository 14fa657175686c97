//! D13, B-06: processes that map, unmap and allocate at the same time never
//! meet.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Instant;

use domaind_tests::actor::number;
use domaind_tests::node::spec;
use domaind_tests::{Actor, Ask, Node, P, v1, wait};

/// Mappings that each process makes.
const ROUNDS: u64 = 800;

/// Looks until it is done; the most mappings that were seen at a time.
async fn watch(node: Arc<Node>, done: Arc<AtomicBool>) -> usize {
    let mut most = 0;
    while !done.load(Relaxed) {
        let mappings = node.mappings("d0").await;
        assert_disjoint(&mappings);
        most = most.max(mappings.len());
    }
    most
}

/// The granules that a mapping owns.
fn granules(mapping: &v1::Mapping) -> (u64, u64) {
    let last = mapping.iova + mapping.len_bytes - 1;
    (mapping.iova / P, last / P)
}

/// Ranges ordered by iova do not share a granule.
#[track_caller]
fn assert_disjoint(mappings: &[v1::Mapping]) {
    for pair in mappings.windows(2) {
        let (one, next) = (granules(&pair[0]), granules(&pair[1]));
        assert!(one.1 < next.0, "{:?} and {:?}", pair[0], pair[1]);
    }
    for mapping in mappings {
        assert!(mapping.iova >= P, "page 0: {mapping:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn four_processes_map_and_allocate_and_never_see_anothers_colour() {
    let node = Node::start().await;
    node.create("d0", spec(4 << 20, 2 << 20)).await.unwrap();
    let mut drivers: Vec<_> = (0..4).map(|_| Actor::driver(&node, "d0")).collect();
    let sessions = node.usage("d0").await;
    for (driver, colour) in drivers.iter_mut().zip(1_u8..) {
        driver.begin(&Ask::Colour {
            colour: colour * 0x11,
            rounds: ROUNDS,
            seed: 0x5eed_0000 + u64::from(colour),
            max_len: 50_000,
        });
    }
    // Looked at all the while, from a second thread.
    let done = Arc::new(AtomicBool::new(false));
    let node = Arc::new(node);
    let watcher = tokio::spawn(watch(Arc::clone(&node), Arc::clone(&done)));
    for driver in &mut drivers {
        let painted = driver.finish().expect("all was done");
        assert_eq!(number(&painted["maps"]), ROUNDS);
        assert_eq!(number(&painted["foreign"]), 0, "foreign bytes were seen");
    }
    done.store(true, Relaxed);
    let most = watcher.await.expect("always disjoint");
    assert!(most > 8, "at most {most} mappings at a time is no test");
    let usage = node.usage("d0").await;
    assert_eq!((usage.streaming_mappings, usage.bounce_used_bytes), (0, 0));
    assert_eq!(
        (usage.coherent_allocations, usage.coherent_used_bytes),
        (0, 0)
    );
    assert_eq!(
        usage.bounce_largest_hole_bytes,
        sessions.bounce_largest_hole_bytes
    );
    assert_eq!(usage.coherent_largest_hole_bytes, 2 << 20);
}

/// B-06: eight processes, each with a colour of its own, and some of them killed
/// at random moments; none that lives on ever sees another colour, nor poison.
/// For the night there is `DOMAIND_TEST_ROUNDS`.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn colour_storm() {
    const SEED: u64 = 0x5eed_0b06;
    println!("seed {SEED:#x}");
    let rounds = domaind_tests::rounds(150);
    let node = Node::configured(&[], &[("DOMAIND_POISON", "1")]).await;
    node.domain("d0").await;
    let usage = node.usage("d0").await;
    let max_len = 30_000;
    let mut painters: Vec<_> = (0..5).map(|_| Actor::driver(&node, "d0")).collect();
    for (painter, colour) in painters.iter_mut().zip(1_u8..) {
        painter.begin(&Ask::Colour {
            colour: colour * 0x11,
            rounds,
            seed: SEED + u64::from(colour),
            max_len,
        });
    }
    let storm = |seed: u64, colour: u8| {
        let mut victim = Actor::driver(&node, "d0");
        victim.begin(&Ask::Storm {
            colour,
            seed,
            max_len,
        });
        victim
    };
    let mut victims: Vec<_> = (6_u8..9).map(|k| storm(SEED, k * 0x11)).collect();
    let mut random = SEED;
    let mut killed = 0_u64;
    for painter in &mut painters {
        let painted = loop {
            if let Some(painted) = painter.poll() {
                break painted.expect("it lives on");
            }
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            // A moment that is different each time: so many changes later.
            let enough = node.get("d0").await.unwrap().generation + 1 + random % 60;
            let until = Instant::now() + wait::DEADLINE;
            while node.get("d0").await.unwrap().generation < enough {
                assert!(Instant::now() < until, "no storm");
            }
            let index = usize::try_from(random % 3).unwrap();
            victims[index].kill();
            victims[index] = storm(random, 0x66 + 0x11 * u8::try_from(index).unwrap());
            killed += 1;
        };
        assert_eq!(number(&painted["maps"]), rounds);
        assert_eq!(number(&painted["foreign"]), 0, "foreign bytes were seen");
    }
    println!("{killed} were killed");
    drop((painters, victims));
    node.until_usage("d0", usage).await;
}

/// The same in an aperture that is too small for all, with some killed.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn survivors_of_a_storm_see_no_foreign_byte() {
    let node = Node::start().await;
    node.domain("d0").await;
    let usage = node.usage("d0").await;
    let mut survivor = Actor::driver(&node, "d0");
    survivor.begin(&Ask::Colour {
        colour: 0x77,
        rounds: 400,
        seed: 7,
        max_len: 30_000,
    });
    for round in 0_u64..8 {
        let mut victim = Actor::driver(&node, "d0");
        victim.begin(&Ask::Storm {
            colour: 0x88,
            seed: round,
            max_len: 30_000,
        });
        let enough = node.get("d0").await.unwrap().generation + 20 + 11 * round;
        let until = Instant::now() + wait::DEADLINE;
        while node.get("d0").await.unwrap().generation < enough {
            assert!(Instant::now() < until, "no storm");
        }
        victim.kill();
        assert_disjoint(&node.mappings("d0").await);
    }
    let done = survivor.finish().expect("it outlived them all");
    assert_eq!(number(&done["foreign"]), 0);
    drop(survivor);
    node.until_usage("d0", usage).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn domains_are_created_and_deleted_by_many_at_once() {
    let node = Node::start().await;
    let base = node.counts().await;
    let work = |worker: u32| {
        let admin = node.admin();
        async move {
            let (mut created, mut exists) = (0, 0);
            for round in 0..25 {
                // Two workers want the same name.
                let id = format!("d{}", worker / 2);
                let request = v1::CreateDomainRequest {
                    domain_id: id.clone(),
                    spec: Some(spec(64 << 10, 64 << 10)),
                    ..Default::default()
                };
                match admin.domains().create_domain(request).await {
                    Ok(_) => created += 1,
                    Err(status) => {
                        assert_eq!(status.code(), tonic::Code::AlreadyExists, "{round}");
                        exists += 1;
                    }
                }
                let request = v1::DeleteDomainRequest {
                    name: format!("domains/{id}"),
                    force: true,
                    allow_missing: true,
                    ..Default::default()
                };
                admin
                    .domains()
                    .delete_domain(request)
                    .await
                    .expect("deleted");
            }
            (created, exists)
        }
    };
    let workers: Vec<_> = (0..8).map(|worker| tokio::spawn(work(worker))).collect();
    let mut created = 0;
    for worker in workers {
        created += worker.await.expect("no panic").0;
    }
    assert!(created > 0);
    node.until_counts(base).await;
}
