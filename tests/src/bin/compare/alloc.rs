//! Allocating and freeing single pages, and requests that must fail.

use std::hint::black_box;
use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::clock::{Batch, race};
use crate::peers::{
    Bitmap, Buddy, Nodit, OffsetAllocator, Ours, PageAllocator, RangeMap, VmAllocator,
};
use crate::random::{Random, run_of_pages};
use crate::report::{Limit, Report, Row, Unit};
use crate::rounds::{Contender, Scale, interleave};

/// 64 GiB.
pub(crate) const SPACE_PAGES: u32 = 1 << 24;
const LIVE: [(u32, &str); 2] = [(1 << 10, "1k"), (1 << 16, "64k")];
/// A checkerboard of 2 M pages.
pub(crate) const BOARD_PAGES: u32 = 1 << 21;
/// Order in which live pages are freed and replaced, in a row of this length.
const ORDER: usize = 1 << 16;
/// Requests that must fail are drawn so many at a time.
const RUNS: usize = 1 << 10;
const OFFSET: &str = OffsetAllocator::NAME;

/// Prints all rows of this family.
pub(crate) fn rows(report: &Report, scale: &Scale) -> io::Result<()> {
    for (live, name) in LIVE {
        // Linux's cached path takes 9.5 to 16 ns, where the bitmap takes 6.
        let goal = [Limit::Peer(OFFSET, 0.5), Limit::Floor(16.0 / 6.0)];
        let row = format!("alloc+free/{name}/1 thread");
        if report.wants(&row) {
            let outcomes = interleave(scale.rounds, alone(live, scale));
            report.print(&Row::new(row, Unit::Nanoseconds, outcomes, goal))?;
        }
        let row = format!("alloc+free/{name}/2 threads");
        if report.wants(&row) {
            let outcomes = interleave(scale.rounds, together(live, scale));
            report.print(&Row::new(row, Unit::Nanoseconds, outcomes, goal))?;
        }
    }
    let row = "alloc/must fail".to_owned();
    if report.wants(&row) {
        let outcomes = interleave(scale.rounds, failing(scale));
        let goal = [Limit::Peer(OFFSET, 2.0)];
        report.print(&Row::new(row, Unit::Nanoseconds, outcomes, goal))?;
    }
    Ok(())
}

fn alone(live: u32, scale: &Scale) -> Vec<Contender<'static>> {
    vec![
        one_thread::<Ours>(live, scale),
        one_thread::<OffsetAllocator>(live, scale),
        one_thread::<Buddy>(live, scale),
        one_thread::<RangeMap>(live, scale),
        one_thread::<Nodit>(live, scale),
        one_thread::<VmAllocator>(live, scale),
        one_thread::<Bitmap>(live, scale),
    ]
}

fn together(live: u32, scale: &Scale) -> Vec<Contender<'static>> {
    vec![
        two_threads::<Ours>(live, scale),
        two_threads::<OffsetAllocator>(live, scale),
        two_threads::<Buddy>(live, scale),
        two_threads::<RangeMap>(live, scale),
        two_threads::<Nodit>(live, scale),
        two_threads::<VmAllocator>(live, scale),
        two_bitmaps(live, scale),
    ]
}

fn failing(scale: &Scale) -> Vec<Contender<'static>> {
    vec![
        must_fail::<Ours>(scale),
        must_fail::<OffsetAllocator>(scale),
        must_fail::<Buddy>(scale),
        must_fail::<RangeMap>(scale),
        must_fail::<Nodit>(scale),
        must_fail::<VmAllocator>(scale),
    ]
}

/// An allocator of the space and pages of it, each freed and replaced in its
/// turn. On cache lines of its own, because each thread has one.
#[repr(align(128))]
struct Pages<A: PageAllocator> {
    live: Vec<A::Run>,
    order: Vec<u16>,
    at: usize,
}

impl<A: PageAllocator> Pages<A> {
    /// `stream`: which random order.
    fn new(live: Vec<A::Run>, stream: u64) -> Pages<A> {
        let mut random = Random::stream(stream);
        let place = |_| u16::try_from(random.index(live.len())).expect("at most 64 k are live");
        Pages {
            order: (0..ORDER).map(place).collect(),
            live,
            at: 0,
        }
    }

    /// `replace` frees one page and allocates another.
    fn replace(&mut self, ops: u64, mut replace: impl FnMut(A::Run) -> A::Run) -> Duration {
        let start = Instant::now();
        for _ in 0..ops {
            let place = usize::from(self.order[self.at]);
            self.at = (self.at + 1) % ORDER;
            self.live[place] = black_box(replace(self.live[place]));
        }
        start.elapsed()
    }
}

/// Takes part, or says why not.
fn contender<A: PageAllocator>(
    turn: Result<impl FnMut() -> f64 + 'static, String>,
) -> Contender<'static> {
    match turn {
        Ok(turn) => Contender::new(A::ROLE, A::NAME, turn),
        Err(why) => Contender::unable(A::ROLE, A::NAME, why),
    }
}

fn one_thread<A: PageAllocator + 'static>(live: u32, scale: &Scale) -> Contender<'static> {
    contender::<A>(
        with_pages::<A>(live, 1, scale).map(|(mut allocator, mut pages)| {
            let mut batch = Batch::lasting(scale.turn);
            move || batch.run(|ops| pages.replace(ops, |old| swap(&mut allocator, old)))
        }),
    )
}

/// One allocator for both threads, behind a lock that each call takes; each
/// thread replaces pages of its own. What a thread waits for a pair counts.
fn two_threads<A: PageAllocator + 'static>(live: u32, scale: &Scale) -> Contender<'static> {
    contender::<A>(with_pages::<A>(live, 1, scale).map(|(allocator, first)| {
        let shared = Mutex::new(allocator);
        let (mine, others) = first.live.split_at(first.live.len() / 2);
        let mut second = Pages::<A>::new(others.to_vec(), 2);
        let mut first = Pages::<A>::new(mine.to_vec(), 1);
        let mut batch = Batch::lasting(scale.turn);
        move || {
            let replace = |old| {
                lock(&shared).free(old);
                page(&mut *lock(&shared))
            };
            let turn = |ops| {
                race(
                    || first.replace(ops, replace),
                    || second.replace(ops, replace),
                )
            };
            batch.run(turn)
        }
    }))
}

/// The floor for two threads: a bitmap for each, nothing shared.
fn two_bitmaps(live: u32, scale: &Scale) -> Contender<'static> {
    let new = |stream| with_pages::<Bitmap>(live / 2, stream, scale).map(Apart);
    contender::<Bitmap>(new(1).and_then(|mut first| {
        let mut second = new(2)?;
        let mut batch = Batch::lasting(scale.turn);
        let turn = |ops, Apart((bitmap, pages)): &mut Apart<(Bitmap, Pages<Bitmap>)>| {
            pages.replace(ops, |old| swap(bitmap, old))
        };
        Ok(move || batch.run(|ops| race(|| turn(ops, &mut first), || turn(ops, &mut second))))
    }))
}

/// On cache lines of its own.
#[repr(align(128))]
struct Apart<T>(T);

fn with_pages<A: PageAllocator>(
    live: u32,
    stream: u64,
    scale: &Scale,
) -> Result<(A, Pages<A>), String> {
    let mut allocator = A::new(SPACE_PAGES, live);
    let live = take(&mut allocator, live, scale.setup)?;
    Ok((allocator, Pages::new(live, stream)))
}

/// Allocates single pages.
pub(crate) fn take<A: PageAllocator>(
    allocator: &mut A,
    pages: u32,
    within: Duration,
) -> Result<Vec<A::Run>, String> {
    let start = Instant::now();
    let mut taken = Vec::new();
    for done in 0..pages {
        if start.elapsed() > within {
            return Err(format!("{done} of {pages} pages allocated in {within:?}"));
        }
        taken.push(page(allocator));
    }
    Ok(taken)
}

#[inline]
fn swap<A: PageAllocator>(allocator: &mut A, old: A::Run) -> A::Run {
    allocator.free(old);
    page(allocator)
}

fn lock<T>(shared: &Mutex<T>) -> MutexGuard<'_, T> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Every other page is free, and runs of two pages up to 1 MiB are asked for.
fn must_fail<A: PageAllocator + 'static>(scale: &Scale) -> Contender<'static> {
    contender::<A>(checkerboard::<A>(scale.setup).map(|mut board| {
        let mut batch = Batch::lasting(scale.turn);
        let mut random = Random::stream(3);
        let runs: Vec<u32> = (0..RUNS)
            .map(|_| run_of_pages(&mut random).max(2))
            .collect();
        let mut at = 0;
        let mut refuse = move |ops| {
            let start = Instant::now();
            for _ in 0..ops {
                at = (at + 1) % RUNS;
                let given = board.alloc(black_box(runs[at]));
                assert!(given.is_none(), "no two pages are free");
            }
            start.elapsed()
        };
        move || batch.run(&mut refuse)
    }))
}

/// Every other page is free.
pub(crate) fn checkerboard<A: PageAllocator>(within: Duration) -> Result<A, String> {
    let mut board = A::new(BOARD_PAGES, BOARD_PAGES);
    let mut live = take(&mut board, BOARD_PAGES, within)?;
    live.sort_unstable_by_key(|run| A::start(*run));
    live.into_iter().step_by(2).for_each(|run| board.free(run));
    Ok(board)
}

fn page<A: PageAllocator>(allocator: &mut A) -> A::Run {
    allocator.alloc(1).expect("the space is hardly used")
}
