//! Pins without fences, on this machine's processors: Dekker's game, which a reader with no fence loses
//! without the writer's barrier.
//!
//! The reader stores one view after the other into its slot, and loads the service's word behind each. The writer
//! counts up the word, runs a barrier, and looks at the slot. Never may both miss the other: the view that
//! follows the one that the writer saw must have seen the writer's word. No round waits for the
//! other side, so that the two meet at every distance.

use std::os::fd::AsFd;
use std::sync::atomic::Ordering::SeqCst;
use std::sync::atomic::fence;
use std::thread;
use std::time::{Duration, Instant};

use domain_core::iotlb::page::BYTES;
use domain_core::iotlb::{Barrier, PageRegion, Registered, SessionPage};
use domain_core::region::{Access, SharedMemory, SharedWords};

type ServicePage = SessionPage<PageRegion>;
type ClientPage = SessionPage<SharedWords>;

const ROUNDS: u64 = 1_000_000;
/// Where the reader has its fences, and nothing new is tried.
const FEW: u64 = 100_000;
const SLOT: usize = 0;

fn open(fd: impl AsFd) -> ClientPage {
    let mut memory = SharedMemory::reserve(BYTES, BYTES).unwrap();
    let mapped = memory.map_at(0, BYTES, fd.as_fd(), Access::ReadWrite);
    mapped.unwrap();
    SessionPage::open(memory.into_words(Access::ReadWrite).unwrap()).unwrap()
}

fn pages() -> (ServicePage, ClientPage) {
    let service = SessionPage::create("barrier-test").unwrap();
    let client = open(service.grant().unwrap().as_fd());
    (service, client)
}

/// Pins as the client library does. Answers for each round the first view that saw it.
fn read(page: &ClientPage, registered: Option<Registered>, rounds: u64) -> Vec<u64> {
    let unfenced = registered.and_then(|process| page.unfenced(process));
    match unfenced {
        Some(unfenced) => play(page, rounds, |view| {
            page.enter_unfenced(SLOT, view, unfenced)
        }),
        None => play(page, rounds, |view| page.enter(SLOT, view)),
    }
}

fn play(page: &ClientPage, rounds: u64, pin: impl Fn(u64)) -> Vec<u64> {
    page.announce(1);
    let mut first = vec![];
    let mut view = 0;
    while (first.len() as u64) < rounds {
        view += 1;
        pin(view);
        let seen = page.revocations();
        while (first.len() as u64) < seen {
            first.push(view);
        }
    }
    first
}

/// Answers for each round the view that it saw, once there was one.
fn write(page: &ServicePage, rounds: u64, barrier: impl Fn()) -> Vec<u64> {
    while page.view(SLOT).is_none() {
        thread::yield_now();
    }
    let round = |_| {
        page.revoke();
        barrier();
        page.view(SLOT).unwrap()
    };
    (0..rounds).map(round).collect()
}

/// How many rounds both sides have missed.
fn missed(first: &[u64], seen: &[u64]) -> usize {
    assert_eq!(first.len(), seen.len());
    let both = first.iter().zip(seen);
    both.filter(|(first, seen)| **first > **seen + 1).count()
}

fn barrier() {
    let _barrier = Barrier::run_within().expect("memory is not short");
}

fn between_threads(promises: bool, registers: bool, rounds: u64, barrier: fn()) -> usize {
    let (service, client) = pages();
    if promises {
        service.promise_to_ask();
    }
    let registered = Registered::register().filter(|_| registers);
    thread::scope(|scope| {
        let reader = scope.spawn(|| read(&client, registered, rounds));
        let seen = write(&service, rounds, barrier);
        missed(&reader.join().unwrap(), &seen)
    })
}

#[test]
fn who_pins_without_a_fence_and_who_looks_behind_a_barrier_never_miss_each_other() {
    assert_eq!(between_threads(true, true, ROUNDS, barrier), 0);
}

/// A service that promises nothing may look with a fence of its own, and so may who looks at pins that have one.
#[test]
fn if_one_side_says_nothing_both_have_their_fences() {
    let fence = || fence(SeqCst);
    assert_eq!(between_threads(false, true, FEW, fence), 0);
    assert_eq!(between_threads(false, false, FEW, fence), 0);
    assert_eq!(between_threads(true, false, FEW, fence), 0);
}

/// Else the first test proves nothing. Only where two processors are to be had at the same time, and where pins do without.
#[test]
fn found_a_look_with_a_fence_in_place_of_the_barrier() {
    let processors = thread::available_parallelism().map_or(1, usize::from);
    if Registered::register().is_none() || processors < 2 {
        eprintln!("pins have their fences here, or never meet a look");
        return;
    }
    let start = Instant::now();
    while between_threads(true, true, FEW, || fence(SeqCst)) == 0 {
        let waited = start.elapsed();
        assert!(waited < Duration::from_secs(60), "both have their fences?");
    }
}
