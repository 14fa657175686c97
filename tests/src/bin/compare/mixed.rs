//! Runs of 4 KiB to 1 MiB in a space that is 10, 50 or 90 % full, and whether
//! an allocator ages.

use std::io;
use std::time::{Duration, Instant};

use crate::alloc::SPACE_PAGES;
use crate::clock::{Clock, Share, as_f64};
use crate::peers::{Buddy, Nodit, OffsetAllocator, Ours, PageAllocator, RangeMap, VmAllocator};
use crate::random::{Random, run_of_pages};
use crate::report::{Limit, Report, Row, Unit};
use crate::rounds::{Outcome, Role, Scale, turns};

const PERCENTS: [u8; 3] = [10, 50, 90];
const FULLEST: u8 = 90;
/// More runs than this are never live; a run is 43 pages on average.
const RUNS: u32 = SPACE_PAGES / 32;
/// Of the operations while a space fills up, one of so many frees.
const FILL_FREES: u64 = 4;
const SHARES: [(Share, &str); 4] = [
    (Share::HALF, "p50"),
    (Share::P99, "p99"),
    (Share::P99_9, "p99.9"),
    (Share::ALL, "max"),
];
const AT_START: &str = "domaind at the start";
const OFFSET: &str = OffsetAllocator::NAME;

/// Prints all rows of this family.
pub(crate) fn rows(report: &Report, scale: &Scale, clock: Clock) -> io::Result<()> {
    for percent in PERCENTS {
        if report.wants_any(&row_names(percent)) {
            mixed(report, scale, clock, percent)?;
        }
    }
    let names = ["alloc", "free"].map(|op| format!("ageing/{op} p99.9"));
    if report.wants_any(&names) {
        ageing(report, scale, clock, names)?;
    }
    Ok(())
}

fn reached_name(percent: u8) -> String {
    format!("mixed/{percent} %/reached")
}

fn share_name(percent: u8, op: &str, share: &str) -> String {
    format!("mixed/{percent} %/{op} {share}")
}

fn row_names(percent: u8) -> Vec<String> {
    let ops = ["alloc", "free"].into_iter();
    let shares = ops.flat_map(|op| SHARES.map(|(_, share)| share_name(percent, op, share)));
    shares.chain([reached_name(percent)]).collect()
}

/// An allocator of a space that is kept so full.
struct Churn<A: PageAllocator> {
    allocator: A,
    live: Vec<(A::Run, u32)>,
    used_pages: u64,
    target_pages: u64,
    random: Random,
    refused: u64,
    /// Of those, for how many the allocator itself says that there was room.
    falsely: u64,
}

/// One operation of a churn, to be timed.
enum Op<R> {
    Alloc(u32),
    Free(R),
}

impl<A: PageAllocator> Churn<A> {
    fn new(percent: u8) -> Churn<A> {
        Churn {
            allocator: A::new(SPACE_PAGES, RUNS),
            live: Vec::new(),
            used_pages: 0,
            target_pages: u64::from(SPACE_PAGES) * u64::from(percent) / 100,
            random: Random::stream(u64::from(percent)),
            refused: 0,
            falsely: 0,
        }
    }

    /// With frees in between, so that holes are there from the start. Stops at
    /// the first refusal.
    fn fill(&mut self, within: Duration) {
        let start = Instant::now();
        while self.used_pages < self.target_pages && self.refused == 0 {
            let op = match self.random.below(FILL_FREES) {
                0 if !self.live.is_empty() => self.victim(),
                _ => Op::Alloc(run_of_pages(&mut self.random)),
            };
            self.act(op, |_, work| work());
            if start.elapsed() > within {
                return;
            }
        }
    }

    /// Around the target: frees above it, allocates below.
    fn next(&mut self) -> Op<A::Run> {
        let pages = run_of_pages(&mut self.random);
        if self.used_pages < self.target_pages {
            return Op::Alloc(pages);
        }
        self.victim()
    }

    fn victim(&mut self) -> Op<A::Run> {
        let place = self.random.index(self.live.len());
        let (run, pages) = self.live.swap_remove(place);
        self.used_pages -= u64::from(pages);
        Op::Free(run)
    }

    /// `time` runs the operation itself, and nothing else.
    fn act(&mut self, op: Op<A::Run>, time: impl FnOnce(Kind, &mut dyn FnMut())) {
        todo!()
    }
}
