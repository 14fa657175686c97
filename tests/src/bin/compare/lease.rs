//! What a driver pays to bounce a buffer by itself, beside the copy alone.
//!
//! The session is a real one, of a daemon; no call is made while it is measured.
//! The floor is `memcpy` of the same bytes between two ordinary buffers, or what
//! one thread does.

use std::cell::Cell;
use std::hint::black_box;
use std::io;
use std::rc::Rc;
use std::time::{Duration, Instant};

use domaind_client::Session;
use domaind_client::pool::{Bidirectional, Pool, PoolOptions, ToDevice};

use crate::clock::{Batch, race};
use crate::report::{Limit, Report, Row, Unit};
use crate::rounds::{Contender, Role, Scale, interleave};
use crate::world::World;

const LENGTHS: [(usize, &str); 5] = [
    (64, "64 B"),
    (256, "256 B"),
    (1536, "1536 B"),
    (PAGE, "4 KiB"),
    (BLOCK, "64 KiB"),
];
const PAGE: usize = 4 << 10;
const BLOCK: usize = 64 << 10;
/// What a mapping may cost beside its copy.
const BESIDE_NS: f64 = 15.0;
const STREAM_BYTES: usize = 64 << 20;
/// For one of two threads to be as fast as 0.9 of one alone.
const NINE_TENTHS: f64 = 1.0 / 0.9;

/// Prints all rows of this family.
pub(crate) fn rows(report: &Report, scale: &Scale) -> io::Result<()> {
    let mut all: Vec<_> = LENGTHS.iter().map(to_device).collect();
    all.extend([bidirectional(), two_threads(), two_sessions(), stream()]);
    let names: Vec<_> = all.iter().map(|one| one.name.clone()).collect();
    if !report.wants_any(&names) {
        return Ok(());
    }
    let world = World::start()?;
    let sessions = ["lease-one", "lease-two"].map(|domain| world.driver(domain));
    let pools = sessions.each_ref().map(|driver| pool(&world, driver));
    for one in all.iter().filter(|one| report.wants(&one.name)) {
        let outcomes = interleave(scale.rounds, (one.contenders)(&pools, scale));
        let row = Row::new(
            one.name.clone(),
            Unit::Nanoseconds,
            outcomes,
            one.goal.clone(),
        );
        report.print(&row)?;
    }
    Ok(())
}

fn pool(world: &World, driver: &Session) -> Pool {
    let pool = driver.pool(PoolOptions::default());
    world.run(pool).expect("a lease")
}

/// One pool for each of two sessions.
type Pools = [Pool; 2];
type Contenders = dyn for<'p> Fn(&'p Pools, &Scale) -> Vec<Contender<'p>>;

struct Measure {
    name: String,
    goal: Vec<Limit>,
    contenders: Box<Contenders>,
}

fn to_device((len, name): &(usize, &str)) -> Measure {
    let len = *len;
    let mut goal = vec![Limit::Beyond(BESIDE_NS)];
    if len == PAGE {
        goal.push(Limit::Floor(1.4));
    }
    Measure {
        name: format!("lease/to device/{name}"),
        goal,
        contenders: Box::new(move |pools, scale| {
            let bytes = vec![7; len];
            let ours = batched(scale, move || bounce(&pools[0], &bytes));
            vec![
                Contender::new(Role::Ours, "domaind", ours),
                copies(scale, len, 1),
            ]
        }),
    }
}

fn bidirectional() -> Measure {
    Measure {
        name: "lease/bidirectional/4 KiB".to_owned(),
        goal: vec![Limit::Floor(1.4)],
        contenders: Box::new(|pools, scale| {
            let mut bytes = vec![7; PAGE];
            let ours = batched(scale, move || {
                let buffer = black_box(bytes.as_mut_slice());
                let mapping = pools[0].map(buffer, Bidirectional).expect("room");
                black_box(mapping.iova());
                mapping.unmap().expect("a live lease");
            });
            vec![
                Contender::new(Role::Ours, "domaind", ours),
                copies(scale, PAGE, 2),
            ]
        }),
    }
}

fn two_threads() -> Measure {
    beside_one("lease/2 threads, 1 session/4 KiB", 0)
}

fn two_sessions() -> Measure {
    beside_one("lease/2 threads, 2 sessions/4 KiB", 1)
}

/// Two threads, the second one with this pool.
fn beside_one(name: &str, other: usize) -> Measure {
    Measure {
        name: name.to_owned(),
        goal: vec![Limit::Floor(NINE_TENTHS)],
        contenders: Box::new(move |pools, scale| {
            let bytes = || vec![7; PAGE];
            let (one, two) = (bytes(), bytes());
            let mut batch = Batch::lasting(scale.turn);
            let both = move || {
                batch.run(|ops| {
                    let run = |pool, bytes| move || timed(ops, || bounce(pool, bytes));
                    race(run(&pools[0], &one), run(&pools[other], &two))
                })
            };
            let alone = bytes();
            let floor = batched(scale, move || bounce(&pools[0], &alone));
            vec![
                Contender::new(Role::Ours, "domaind", both),
                Contender::new(Role::Floor, "one thread", floor),
            ]
        }),
    }
}

/// A long buffer through short mappings, one after the other: at least nine
/// tenths of what a loop of copies does.
fn stream() -> Measure {
    Measure {
        name: "lease/64 MiB through 64 KiB".to_owned(),
        goal: vec![Limit::Floor(NINE_TENTHS)],
        contenders: Box::new(|pools, scale| {
            // One source, through which both go on where the other stopped: with one each, who
            // was slower came round less often, and found less of his in the caches.
            let bytes = Rc::new(vec![7; STREAM_BYTES]);
            let at = Rc::new(Cell::new(0));
            let (same, mut next) = (Rc::clone(&bytes), blocks(&at));
            let ours = batched(scale, move || bounce(&pools[0], &bytes[next()..][..BLOCK]));
            let (mut next, mut into) = (blocks(&at), vec![1; BLOCK + PAGE]);
            // As a slot does: the fastest place for it.
            let start = into.as_ptr().align_offset(PAGE);
            let floor = batched(scale, move || {
                let into = black_box(&mut into[start..][..BLOCK]);
                into.copy_from_slice(black_box(&same[next()..][..BLOCK]));
            });
            vec![
                Contender::new(Role::Ours, "domaind", ours),
                Contender::new(Role::Floor, "memcpy", floor),
            ]
        }),
    }
}

/// Where the next block begins.
fn blocks(at: &Rc<Cell<usize>>) -> impl FnMut() -> usize + use<> {
    let at = Rc::clone(at);
    move || {
        at.set((at.get() + BLOCK) % STREAM_BYTES);
        at.get()
    }
}

#[inline]
fn bounce(pool: &Pool, bytes: &[u8]) {
    let mapping = pool.map(black_box(bytes), ToDevice).expect("room");
    black_box(mapping.iova());
    mapping.unmap().expect("a live lease");
}

/// So many copies of so many bytes.
fn copies(scale: &Scale, len: usize, count: usize) -> Contender<'static> {
    let (from, mut into) = (vec![7_u8; len], vec![1; len]);
    let floor = batched(scale, move || {
        for _ in 0..count {
            black_box(&mut into[..]).copy_from_slice(black_box(&from));
        }
    });
    Contender::new(Role::Floor, "memcpy", floor)
}

fn batched<'a>(scale: &Scale, mut one: impl FnMut() + 'a) -> impl FnMut() -> f64 + 'a {
    let mut batch = Batch::lasting(scale.turn);
    move || batch.run(|ops| timed(ops, &mut one))
}

fn timed(ops: u64, mut one: impl FnMut()) -> Duration {
    let start = Instant::now();
    for _ in 0..ops {
        one();
    }
    start.elapsed()
}
