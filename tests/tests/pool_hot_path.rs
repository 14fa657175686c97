//! What a pool promises of map and unmap when it has slots: no allocation, and no system call. Both are
//! counted exactly.

use std::fs;
use std::os::fd::OwnedFd;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use domaind_client::pool::{Bidirectional, FromDevice, Pool, PoolOptions, ToDevice};
use domaind_client::{Access, Role, Session};
use domaind_tests::Node;
use domaind_tests::node::{domain_id, spec};
use rustix::thread::{SecureComputingMode, gettid, set_secure_computing_mode};
use tokio::time::{Instant, sleep};

const MIB: u64 = 1 << 20;
const TIMES: usize = 100_000;
/// One of each way to copy: less than a slot, a whole one, several pages with slack.
const LENGTHS: [usize; 3] = [64, 4096, 9000];
/// Nothing here takes longer.
const SOON: Duration = Duration::from_secs(60);

/// The node, and a pool of one lease that nobody else wants anything of.
async fn pool() -> (Node, Pool) {
    let node = Node::start().await;
    node.create("d0", spec(4 * MIB, 0)).await.unwrap();
    let client = node.client().await;
    let domain = domain_id("d0");
    let driver = client.attach(&domain, Role::Driver, Access::ReadWrite);
    let driver: Session = driver.await.unwrap();
    let options = PoolOptions {
        lease_bytes: MIB,
        most_bytes: MIB,
        keep_bytes: MIB,
        spare_bytes: 0,
        // Who tidies up does so at another time.
        idle_after: Duration::from_secs(3600),
    };
    let pool = driver.pool(options).await.unwrap();
    (node, pool)
}

/// Maps and unmaps in each direction, so many times each.
fn bounce(pool: &Pool, buffer: &mut [u8], times: usize) {
    for _ in 0..times {
        pool.map(&*buffer, ToDevice).unwrap().unmap().unwrap();
        let from = pool.map(&mut *buffer, FromDevice).unwrap();
        from.unmap(1).unwrap();
        let both = pool.map(&mut *buffer, Bidirectional).unwrap();
        both.unmap().unwrap();
        drop(pool.map(&*buffer, ToDevice).unwrap());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn map_and_unmap_of_slots_that_a_thread_keeps_allocate_nothing() {
    let (_node, pool) = pool().await;
    for len in LENGTHS {
        let mut buffer = vec![7; len];
        bounce(&pool, &mut buffer, 1);

        let counted =
            allocation_counter::measure(|| bounce(&pool, &mut buffer, TIMES / LENGTHS.len() + 1));

        assert_eq!(counted.count_total, 0, "{len} bytes: {counted:?}");
    }
}

/// The kernel counts: a thread in strict mode may read, write and exit, and is killed for anything else.
#[tokio::test(flavor = "multi_thread")]
async fn map_and_unmap_of_slots_that_a_thread_keeps_make_no_system_call() {
    let (_node, pool) = pool().await;
    let times = TIMES / LENGTHS.len() + 1;
    let outcome = strictly(move |is_strict| {
        for len in LENGTHS {
            let mut buffer = [7; LENGTHS[2]];
            bounce(&pool, &mut buffer[..len], if is_strict { times } else { 1 });
        }
    });
    assert_eq!(outcome.await, Outcome::Finished);
}

/// Else the test above proves nothing.
#[tokio::test]
async fn found_a_single_system_call() {
    let outcome = strictly(|is_strict| {
        if is_strict {
            thread::yield_now();
        }
    });
    assert_eq!(outcome.await, Outcome::Killed);
}

#[derive(Debug, PartialEq, Eq)]
enum Outcome {
    Finished,
    Killed,
}

/// Runs this on a thread, and then once more with no system call allowed. The thread does not come back
/// from there in any case: to end it would take some.
async fn strictly(mut run: impl FnMut(bool) + Send + 'static) -> Outcome {
    let (finished, says) = rustix::pipe::pipe().unwrap();
    rustix::io::ioctl_fionbio(&finished, true).unwrap();
    let (tell, told) = mpsc::channel();
    thread::spawn(move || {
        run(false);
        tell.send(gettid()).unwrap();
        set_secure_computing_mode(SecureComputingMode::Strict).unwrap();
        run(true);
        let _ = rustix::io::write(&says, b"!");
        // Killed here, and not with a lock in its hand while it drops what it has.
        thread::yield_now();
    });
    let strict = told.recv().unwrap();
    let task = format!("/proc/self/task/{}", strict.as_raw_nonzero());
    let deadline = Instant::now() + SOON;
    loop {
        // Before the pipe: who has gone has said before what it had to say.
        let is_gone = !fs::exists(&task).unwrap();
        if has_said(&finished) {
            return Outcome::Finished;
        }
        if is_gone {
            return Outcome::Killed;
        }
        assert!(Instant::now() < deadline, "neither finished nor killed");
        sleep(Duration::from_millis(5)).await;
    }
}

fn has_said(pipe: &OwnedFd) -> bool {
    let mut byte = [0];
    rustix::io::read(pipe, &mut byte) == Ok(1)
}
