//! The pool of the client library, on a real daemon: what a driver copies by
//! itself obeys the rules of what the daemon copies (3.3, 3.4 of DESIGN.md).

use std::collections::BTreeSet;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};
use std::sync::atomic::{AtomicBool, AtomicUsize};
use std::time::Duration;

use domaind_client::pool::{
    Bidirectional, FromDevice, Mapping, Pool, PoolError, PoolOptions, ToDevice,
};
use domaind_client::{Access, Error, Iova, Role, Session};
use domaind_tests::effort::rounds;
use domaind_tests::node::{domain_id, spec};
use domaind_tests::{Code, Node, P};
use tokio::time::{Instant, sleep, timeout};

const MIB: u64 = 1 << 20;
/// The same for buffers.
const WHOLE: usize = 1 << 20;
/// Nothing here takes longer.
const SOON: Duration = Duration::from_secs(20);

/// One lease of a MiB, and no more than is asked for.
fn one_lease() -> PoolOptions {
    PoolOptions {
        lease_bytes: MIB,
        most_bytes: MIB,
        keep_bytes: MIB,
        spare_bytes: 0,
        idle_after: Duration::from_millis(50),
    }
}

struct Bench {
    node: Node,
    driver: Session,
    device: Session,
}

impl Bench {
    async fn new() -> Bench {
        let node = Node::start().await;
        node.create("d0", spec(4 * MIB, 0)).await.unwrap();
        let driver = attach(&node, Role::Driver).await;
        let device = attach(&node, Role::Device).await;
        Bench {
            node,
            driver,
            device,
        }
    }

    async fn pool(&self) -> Pool {
        self.driver.pool(one_lease()).await.unwrap()
    }

    /// What the device finds, through the page table.
    fn seen(&self, iova: Iova, len: usize) -> Vec<u8> {
        let mut bytes = vec![0xee; len];
        let pin = self.device.pin().unwrap();
        pin.read(iova, &mut bytes).unwrap();
        bytes
    }

    fn wrote(&self, iova: Iova, bytes: &[u8]) {
        self.device.pin().unwrap().write(iova, bytes).unwrap();
    }

    async fn leases(&self) -> u64 {
        self.node.usage("d0").await.leases
    }

    async fn until_leases(&self, wanted: u64) {
        let come = async {
            while self.leases().await != wanted {
                sleep(Duration::from_millis(5)).await;
            }
        };
        timeout(SOON, come).await.expect("so many leases");
    }
}

async fn attach(node: &Node, role: Role) -> Session {
    attach_to(node, "d0", role).await
}

async fn attach_to(node: &Node, domain: &str, role: Role) -> Session {
    let (client, domain) = (node.client().await, domain_id(domain));
    let session = client.attach(&domain, role, Access::ReadWrite);
    session.await.unwrap()
}

/// Says stop also when the test has failed: threads would be waited for.
struct StopOnDrop<'s>(&'s AtomicBool);

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Release);
    }
}

fn pattern(seed: usize, len: usize) -> Vec<u8> {
    let byte = |at| u8::try_from((at * 7 + seed * 31 + 1) % 251).unwrap();
    (0..len).map(byte).collect()
}

/// To the end of what a mapping may have beside it: a page, or 256 bytes.
fn slack(len: usize) -> usize {
    let unit = if len > 2048 { 4096 } else { 256 };
    len.next_multiple_of(unit) - len
}

/// D5, for what a driver copies.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn exactly_the_bytes_of_the_buffer_travel_and_zeros_lie_behind_them() {
    let bench = Bench::new().await;
    let pool = bench.pool().await;
    for len in [
        1, 2, 64, 255, 256, 257, 1000, 1536, 2048, 2049, 4095, 4096, 4097, 8192, 8193, 40_000,
        65_536, 200_000,
    ] {
        // Somebody has been there before.
        let dirty = pool.map(vec![0xd1_u8; len], ToDevice).unwrap();
        let behind = slack(len);
        bench.wrote(dirty.iova(), &vec![0xd2; len + behind]);
        drop(dirty);

        let bytes = pattern(len, len);
        let to = pool.map(bytes.clone(), ToDevice).unwrap();
        let seen = bench.seen(to.iova(), len + behind);
        assert_eq!(seen[..len], bytes, "{len}");
        assert!(seen[len..].iter().all(|byte| *byte == 0), "{len}");
        bench.wrote(to.iova(), &vec![0xd3; len]);
        assert_eq!(to.unmap().unwrap(), bytes, "nothing flows back");

        let both = pool.map(bytes.clone(), Bidirectional).unwrap();
        assert_eq!(bench.seen(both.iova(), len), bytes);
        let answer = pattern(len + 1, len);
        bench.wrote(both.iova(), &answer);
        assert_eq!(both.unmap().unwrap(), answer, "{len}");
    }
}

/// D6, for what a driver copies.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn from_device_begins_with_zeros_and_only_what_was_written_flows_back() {
    let bench = Bench::new().await;
    let pool = bench.pool().await;
    for len in [1, 300, 4096, 10_000] {
        let before = pattern(3, len);
        let written = pattern(4, len);
        for count in [0, 1, len / 2, len] {
            let from = pool.map(before.clone(), FromDevice).unwrap();
            let seen = bench.seen(from.iova(), len);
            assert!(seen.iter().all(|byte| *byte == 0), "nothing of the buffer");
            bench.wrote(from.iova(), &written);

            let after = from.unmap(count).unwrap();

            assert_eq!(after[..count], written[..count]);
            assert_eq!(after[count..], before[count..], "as it was");
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_wrong_count_changes_nothing_and_the_mapping_can_be_unmapped_again() {
    let bench = Bench::new().await;
    let pool = bench.pool().await;
    let from = pool.map(vec![1_u8; 100], FromDevice).unwrap();
    bench.wrote(from.iova(), &[7; 100]);

    let refused = from.unmap(101).unwrap_err();

    let wrong = PoolError::WrittenTooLarge {
        written_bytes: 101,
        len_bytes: 100,
    };
    assert_eq!(refused.error, wrong);
    assert_eq!(refused.kept.unmap(100).unwrap(), vec![7; 100]);
    let both = pool.map(vec![1_u8; 100], Bidirectional).unwrap();
    bench.wrote(both.iova(), &[7; 100]);
    let refused = both.unmap_written(usize::MAX).unwrap_err();
    let halves = refused.kept.unmap_written(50).unwrap();
    assert_eq!(halves, [[7; 50], [1; 50]].concat());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn sync_copies_the_part_it_names_and_nothing_else() {
    let bench = Bench::new().await;
    let pool = bench.pool().await;
    let mut buffer = vec![1_u8; 100];
    let mut both = pool.map(buffer.as_mut_slice(), Bidirectional).unwrap();

    both.buffer_mut().fill(2);
    both.sync_for_device(10..20).unwrap();
    let seen = bench.seen(both.iova(), 100);
    assert_eq!(seen, [vec![1; 10], vec![2; 10], vec![1; 80]].concat());
    bench.wrote(both.iova(), &[3; 100]);
    both.sync_for_cpu(95..100).unwrap();
    assert_eq!(both.buffer()[..], [[2; 95].as_slice(), &[3; 5]].concat());
    for part in [99..101, 101..101, usize::MAX..usize::MAX] {
        let outside = both.sync_for_cpu(part.clone()).unwrap_err();
        assert!(
            matches!(outside, PoolError::OutsideMapping { len_bytes: 100, .. }),
            "{part:?}"
        );
        assert_eq!(both.sync_for_device(part), Err(outside));
    }
    drop(both);
    assert_eq!(
        buffer,
        [[2; 95].as_slice(), &[3; 5]].concat(),
        "nothing flows back"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn nothing_and_more_than_all_are_refused_and_say_so() {
    let bench = Bench::new().await;
    let pool = bench.pool().await;
    // So that its thread has slots of the shortest class.
    pool.map([1_u8], ToDevice).unwrap().unmap().unwrap();

    assert_eq!(
        pool.map([0_u8; 0], ToDevice).unwrap_err().error,
        PoolError::ZeroLength
    );
    let long = vec![0_u8; WHOLE + 1];
    let refused = pool.map(long, FromDevice).unwrap_err();

    let too_long = PoolError::TooLong {
        len_bytes: MIB + 1,
        most_bytes: MIB,
    };
    assert_eq!((refused.error, refused.kept.len()), (too_long, WHOLE + 1));
    let whole = pool.map(vec![5_u8; WHOLE], ToDevice).unwrap();
    assert_eq!(bench.seen(whole.iova(), WHOLE), vec![5; WHOLE]);
}

/// D3, for what a driver copies.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_full_pool_says_so_and_one_that_unmaps_makes_room_for_one() {
    let bench = Bench::new().await;
    let pool = bench.pool().await;
    let map = || pool.map(vec![1_u8; 4096], ToDevice);
    let mut live: Vec<_> = (0..256).map(|_| map().unwrap()).collect();
    let places: BTreeSet<_> = live.iter().map(Mapping::iova).collect();
    assert_eq!(places.len(), 256, "every page once");

    let full = map().unwrap_err().error;
    live.pop();
    let one = map().unwrap();
    assert!(map().is_err());

    let expected = PoolError::Full {
        len_bytes: 4096,
        leased_bytes: MIB,
        most_bytes: MIB,
    };
    assert_eq!(full, expected);
    drop(one);
    drop(live);
    // What was cut small can be had as a whole again.
    assert!(pool.map(vec![1_u8; WHOLE], ToDevice).is_ok());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_waits_gets_what_another_thread_unmaps_and_not_past_the_deadline() {
    let bench = Bench::new().await;
    let pool = bench.pool().await;
    let held = pool.map(vec![1_u8; WHOLE], ToDevice).unwrap().into_owned();

    let early = pool.map_by([1_u8; 64], ToDevice, Instant::now()).await;
    let soon = Instant::now() + Duration::from_millis(30);
    let late = pool.map_by([1_u8; 64], ToDevice, soon).await;
    assert!(matches!(early.unwrap_err().error, PoolError::Full { .. }));
    assert!(matches!(late.unwrap_err().error, PoolError::Full { .. }));
    assert!(Instant::now() >= soon);

    let unmaps = tokio::spawn(async move {
        sleep(Duration::from_millis(30)).await;
        drop(held);
    });
    let got = pool
        .map_by([1_u8; 64], ToDevice, Instant::now() + SOON)
        .await;
    assert!(got.is_ok());
    unmaps.await.unwrap();
}

/// What a thread keeps for itself and does not use is found by who needs it.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn what_other_threads_keep_is_no_reason_to_be_full() {
    let bench = Bench::new().await;
    let pool = bench.pool().await;
    let (ready, stop) = (AtomicUsize::new(0), AtomicBool::new(false));
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                let live: Vec<_> = (0..32)
                    .map(|_| pool.map([1; 4096], ToDevice).unwrap())
                    .collect();
                drop(live);
                ready.fetch_add(1, Release);
                while !stop.load(Acquire) {
                    std::thread::yield_now();
                }
            });
        }
        let _stop = StopOnDrop(&stop);
        while ready.load(Acquire) < 4 {
            std::thread::yield_now();
        }
        let whole = pool.map(vec![1_u8; WHOLE], ToDevice);
        assert!(whole.is_ok(), "{whole:?}");
    });
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn it_leases_what_it_needs_up_to_its_bound_and_gives_back_what_is_idle() {
    let bench = Bench::new().await;
    let options = PoolOptions {
        lease_bytes: MIB / 4,
        most_bytes: MIB,
        keep_bytes: MIB / 4,
        spare_bytes: MIB / 8,
        ..one_lease()
    };
    let pool = bench.driver.pool(options).await.unwrap();
    assert_eq!(bench.leases().await, 1);
    let deadline = Instant::now() + SOON;
    let mut live = Vec::new();
    for _ in 0..256 {
        let mapping = pool.map_by([1_u8; 4096], ToDevice, deadline).await;
        live.push(mapping.unwrap());
    }
    assert_eq!(pool.usage().leased_bytes, MIB);
    assert_eq!(bench.leases().await, 4);

    drop(live);
    bench.until_leases(1).await;

    // Longer than one lease: one of its own length.
    let long = pool.map_by(vec![1_u8; 600_000], ToDevice, deadline).await;
    assert_eq!(bench.seen(long.unwrap().iova(), 600_000), vec![1; 600_000]);
    drop(pool);
    bench.until_leases(0).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn two_sessions_share_no_page() {
    let bench = Bench::new().await;
    let other = attach(&bench.node, Role::Driver).await;
    let pools = [bench.pool().await, other.pool(one_lease()).await.unwrap()];
    let mut pages = [BTreeSet::new(), BTreeSet::new()];
    let mut live = Vec::new();
    for turn in 0..400 {
        let which = turn % 2;
        let mapping = pools[which]
            .map(vec![1_u8; turn * 13 % 900 + 1], ToDevice)
            .unwrap();
        let (first, last) = (mapping.iova().get() / P, (mapping.iova().get() + 899) / P);
        pages[which].extend([first, last]);
        live.push(mapping);
    }
    assert!(pages[0].is_disjoint(&pages[1]));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn scattered_buffers_are_mapped_together_or_not_at_all() {
    let bench = Bench::new().await;
    let pool = bench.pool().await;
    let buffers: Vec<_> = [10, 4096, 300].map(|len| pattern(len, len)).into();
    let to = pool.map_all(buffers.clone(), ToDevice).unwrap();
    for ((iova, len), buffer) in to.segments().zip(&buffers) {
        assert_eq!(bench.seen(iova, len), *buffer);
    }
    assert_eq!(to.total(), 4406);
    assert_eq!(to.unmap().unwrap(), buffers);

    // The device fills one after the other.
    let empty: Vec<_> = [10, 4096, 300].map(|len| vec![9_u8; len]).into();
    let from = pool.map_all(empty.clone(), FromDevice).unwrap();
    for ((iova, len), buffer) in from.segments().zip(&buffers) {
        assert_eq!(len, buffer.len());
        bench.wrote(iova, buffer);
    }
    let refused = from.unmap(4407).unwrap_err();
    assert!(matches!(
        refused.error,
        PoolError::WrittenTooLarge {
            len_bytes: 4406,
            ..
        }
    ));
    let got = refused.kept.unmap(110).unwrap();
    assert_eq!(got[0], buffers[0]);
    assert_eq!(got[1][..100], buffers[1][..100]);
    assert_eq!((&got[1][100..], &got[2]), (&empty[1][100..], &empty[2]));

    let before = pool.usage();
    let too_much = vec![vec![1_u8; 600_000]; 2];
    let refused = pool.map_all(too_much.clone(), Bidirectional).unwrap_err();
    assert_eq!(refused.kept, too_much, "all come back");
    assert!(
        pool.map(vec![1_u8; 900_000], ToDevice).is_ok(),
        "{before:?}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn only_drivers_have_pools_and_only_where_there_is_an_aperture() {
    let bench = Bench::new().await;
    let refused = bench.device.pool(one_lease()).await.unwrap_err();
    assert_eq!(refused.code(), Some(Code::PermissionDenied), "{refused}");

    bench.node.create("bare", spec(0, MIB)).await.unwrap();
    let driver = attach_to(&bench.node, "bare", Role::Driver).await;
    let refused = driver.pool(one_lease()).await.unwrap_err();
    assert!(matches!(refused, Error::Refused(_)), "{refused:?}");
    assert_eq!(bench.leases().await, 0);
}

/// The data path needs no daemon.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_killed_daemon_ends_no_mapping_and_hinders_none() {
    let mut bench = Bench::new().await;
    let pool = bench.pool().await;
    let before = pool.map(pattern(1, 5000), Bidirectional).unwrap();

    bench.node.kill();
    timeout(SOON, bench.driver.ended()).await.unwrap();

    let after = pool.map(pattern(2, 5000), Bidirectional).unwrap();
    assert_ne!(before.iova(), after.iova());
    assert_eq!(before.unmap().unwrap(), pattern(1, 5000));
    assert_eq!(after.unmap().unwrap(), pattern(2, 5000));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn nothing_is_copied_once_the_session_was_evicted() {
    let bench = Bench::new().await;
    let pool = bench.pool().await;
    let live = pool.map(vec![1_u8; 100], Bidirectional).unwrap();

    bench.node.evict(&bench.driver.name()).await.unwrap();

    let refused = live.unmap().unwrap_err();
    assert_eq!(refused.error, PoolError::Ended);
    assert_eq!(refused.kept.cancel(), vec![1; 100], "the buffer comes back");
    assert_eq!(
        pool.map([1_u8; 4], ToDevice).unwrap_err().error,
        PoolError::Ended
    );
}

/// Threads map, check that the device sees just their bytes, and unmap.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn threads_never_see_each_others_bytes() {
    let bench = Bench::new().await;
    let pool = bench.pool().await;
    std::thread::scope(|scope| {
        for thread in 0..4 {
            let (pool, bench) = (&pool, &bench);
            scope.spawn(move || hammer(bench, pool, thread));
        }
    });
    drop(pool);
    bench.until_leases(0).await;
}

fn hammer(bench: &Bench, pool: &Pool, thread: usize) {
    let mut live = Vec::new();
    let mut random = thread * 7919 + 1;
    let mut next = || {
        random = random
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        random >> 33
    };
    for turn in 0..usize::try_from(rounds(3000)).unwrap() {
        let len = match next() % 10 {
            0 => next() % 70_000 + 1,
            _ => next() % 5000 + 1,
        };
        if let Ok(mapping) = pool.map(pattern(turn + thread, len), Bidirectional) {
            live.push((turn, mapping));
        }
        if live.len() > next() % 16 {
            let (turn, mapping) = live.swap_remove(next() % live.len());
            let bytes = pattern(turn + thread, mapping.len());
            assert_eq!(bench.seen(mapping.iova(), mapping.len()), bytes);
            assert_eq!(mapping.unmap().unwrap(), bytes);
        }
    }
}

/// D11, and what a reset must not do: let a driver write where its lease was.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reset_takes_the_leases_away_and_nobody_writes_there_any_more() {
    let bench = Bench::new().await;
    let pool = bench.pool().await;
    let owner = bench.node.client().await.as_owner(&domain_id("d0"));
    let live = pool.map(vec![1_u8; 100], Bidirectional).unwrap();
    let refused = owner.reset_bounce(false).await.unwrap_err();
    assert_eq!(refused.code(), Some(Code::FailedPrecondition), "{refused}");

    owner.reset_bounce(true).await.unwrap();

    let lost = live.unmap().unwrap_err();
    assert_eq!(lost.error, PoolError::Revoked);
    assert_eq!(lost.kept.cancel(), vec![1; 100], "nothing flows back");
    let aperture = bench.driver.bounce().unwrap();
    let hole = bench.device.pin().unwrap().lookup(aperture);
    assert_eq!(hole, Ok(None), "nothing is mapped");

    // Others' memory now, while this driver's threads go on as if nothing had been.
    let other = attach(&bench.node, Role::Driver).await;
    let stop = AtomicBool::new(false);
    let mapped = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while !stop.load(Acquire) {
                    if let Ok(mapping) = pool.map([0xbd_u8; 3000], Bidirectional) {
                        mapped.fetch_add(1, Relaxed);
                        let _ = mapping.unmap();
                    }
                }
            });
        }
        let _stop = StopOnDrop(&stop);
        let turns = tokio::task::block_in_place(|| {
            let run = resets(&bench, &other, &owner);
            tokio::runtime::Handle::current().block_on(run)
        });
        assert_eq!(turns, rounds(60));
    });
    assert!(mapped.load(Relaxed) > 0, "the pool leases anew");
}

/// Takes everything away, leases it as another driver, and looks whether it stays as it is.
async fn resets(bench: &Bench, other: &Session, owner: &domaind_client::Owner) -> u64 {
    let mut turns = 0;
    for turn in 0..rounds(60) {
        owner.reset_bounce(true).await.unwrap();
        let pool = other.pool(one_lease()).await.unwrap();
        let colour = u8::try_from(turn % 128).unwrap() | 1;
        let bytes = vec![colour; WHOLE];
        let mapping = pool.map(bytes, ToDevice).unwrap();
        sleep(Duration::from_millis(2)).await;
        let mut seen = vec![0; WHOLE];
        bench
            .device
            .pin()
            .unwrap()
            .read(mapping.iova(), &mut seen)
            .unwrap();
        assert!(seen.iter().all(|byte| *byte == colour), "turn {turn}");
        turns += 1;
    }
    turns
}
