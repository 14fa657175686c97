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

/// One level of fullness: who reaches it, and the tails there.
fn mixed(report: &Report, scale: &Scale, clock: Clock, percent: u8) -> io::Result<()> {
    let mut players = vec![
        Player::new::<Ours>(Ours::NAME, percent),
        Player::new::<OffsetAllocator>(OffsetAllocator::NAME, percent),
        Player::new::<Buddy>(Buddy::NAME, percent),
        Player::new::<RangeMap>(RangeMap::NAME, percent),
        Player::new::<Nodit>(Nodit::NAME, percent),
        Player::new::<VmAllocator>(VmAllocator::NAME, percent),
    ];
    for player in &mut players {
        player.fill(clock, scale.setup);
    }
    play(&mut players, scale, clock);
    let outcomes = players.iter().map(Player::reached).collect();
    // A hair less, because percents are rounded.
    let goal = [Limit::AtLeast(f64::from(percent) - 0.01)];
    let name = reached_name(percent);
    report.print(&Row::new(name, Unit::Percent, outcomes, goal))?;
    let ops: [(&str, Samples); 2] = [
        ("alloc", |timed| &mut timed.allocs),
        ("free", |timed| &mut timed.frees),
    ];
    for (op, samples) in ops {
        players.iter_mut().for_each(|player| player.sort(samples));
        for (share, name) in SHARES {
            let outcomes = players
                .iter_mut()
                .map(|player| player.share(samples, share));
            let row = share_name(percent, op, name);
            let row = Row::new(
                row,
                Unit::Nanoseconds,
                outcomes.collect(),
                goal_of(op, share),
            );
            report.print(&row)?;
        }
    }
    Ok(())
}

fn goal_of(op: &str, share: Share) -> Vec<Limit> {
    match (op, share) {
        (_, Share::P99_9) | ("free", Share::P99) => vec![Limit::Peer(OFFSET, 1.0)],
        _ => Vec::new(),
    }
}

/// The tail of one that has done much, beside that of one that has just been
/// filled the same way.
fn ageing(report: &Report, scale: &Scale, clock: Clock, names: [String; 2]) -> io::Result<()> {
    let mut players = vec![
        Player::new::<Ours>(Ours::NAME, FULLEST),
        Player::new::<Ours>(AT_START, FULLEST).into_peer(),
        Player::new::<OffsetAllocator>(OffsetAllocator::NAME, FULLEST),
        Player::new::<OffsetAllocator>("offset-allocator at the start", FULLEST),
    ];
    for (place, player) in players.iter_mut().enumerate() {
        // Alone, it takes as long as it takes.
        player.fill(clock, Duration::MAX);
        if place % 2 == 0 {
            player
                .space
                .operate(clock, scale.ageing_ops, Duration::MAX, None);
        }
    }
    play(&mut players, scale, clock);
    let goal = [Limit::Peer(AT_START, 1.2)];
    let ops: [Samples; 2] = [|timed| &mut timed.allocs, |timed| &mut timed.frees];
    for (name, samples) in names.into_iter().zip(ops) {
        players.iter_mut().for_each(|player| player.sort(samples));
        let outcomes = players
            .iter_mut()
            .map(|player| player.share(samples, Share::P99_9));
        report.print(&Row::new(name, Unit::Nanoseconds, outcomes.collect(), goal))?;
    }
    Ok(())
}

/// An allocator of a space that has been filled so far, and how many runs are
/// live in it.
pub(crate) fn filled<A: PageAllocator>(percent: u8) -> (A, usize) {
    let mut churn = Churn::<A>::new(percent);
    churn.fill(Clock::calibrate(), Duration::MAX);
    (churn.allocator, churn.live.len())
}

/// Everybody who could fill the space has their turns.
fn play(players: &mut [Player], scale: &Scale, clock: Clock) {
    // Who takes milliseconds for an operation shows it with fewer of them.
    let within = scale.setup / 10;
    for at in turns(scale.single_rounds, players.len()) {
        players[at].turn(clock, scale.singles, within);
    }
}

/// What single operations took, in nanoseconds.
#[derive(Debug, Default)]
struct Timed {
    allocs: Vec<u32>,
    frees: Vec<u32>,
}

/// Which of them.
type Samples = fn(&mut Timed) -> &mut Vec<u32>;

/// Somebody with a space of their own.
struct Player {
    name: &'static str,
    role: Role,
    percent: u8,
    space: Box<dyn Space>,
    timed: Timed,
}

impl Player {
    fn new<A: PageAllocator + 'static>(name: &'static str, percent: u8) -> Player {
        Player {
            name,
            role: A::ROLE,
            percent,
            space: Box::new(Churn::<A>::new(percent)),
            timed: Timed::default(),
        }
    }

    fn into_peer(self) -> Player {
        Player {
            role: Role::Peer,
            ..self
        }
    }

    fn fill(&mut self, clock: Clock, within: Duration) {
        self.space.fill(clock, within);
    }

    fn turn(&mut self, clock: Clock, ops: u64, within: Duration) {
        if self.space.is_filled() {
            // The others have had the caches.
            self.space.operate(clock, ops / 10, within, None);
            let timed = Some(&mut self.timed);
            self.space.operate(clock, ops, within, timed);
        }
    }

    fn reached(&self) -> Outcome {
        let (refused, falsely) = self.space.refused();
        let note = (refused > 0).then(|| {
            let kind = if falsely > 0 { "falsely " } else { "" };
            format!("{kind}refused {} requests", falsely.max(refused))
        });
        Outcome {
            name: self.name,
            role: self.role,
            value: (falsely == 0).then(|| self.space.filled_percent()),
            note: note.or_else(|| (!self.space.is_filled()).then(|| "too slow to fill".to_owned())),
        }
    }

    fn sort(&mut self, samples: Samples) {
        samples(&mut self.timed).sort_unstable();
    }

    fn share(&mut self, samples: Samples, share: Share) -> Outcome {
        let sorted = samples(&mut self.timed);
        let enough = sorted.len() >= share.least_samples();
        let why = match self.space.is_filled() {
            false => format!(
                "filled {:.1} of {} %",
                self.space.filled_percent(),
                self.percent
            ),
            true => format!("only {} operations", sorted.len()),
        };
        Outcome {
            name: self.name,
            role: self.role,
            value: enough.then(|| f64::from(share.of(sorted))),
            note: (!enough).then_some(why),
        }
    }
}

/// A space, whoever allocates it.
trait Space {
    /// Stops at the first refusal or when the time is up.
    fn fill(&mut self, clock: Clock, within: Duration);
    fn is_filled(&self) -> bool;
    /// How full it was when filling ended.
    fn filled_percent(&self) -> f64;
    /// Refused requests, and for how many of them the allocator says itself
    /// that there was room.
    fn refused(&self) -> (u64, u64);
    fn operate(&mut self, clock: Clock, ops: u64, within: Duration, timed: Option<&mut Timed>);
}

/// An allocator whose space is kept so full.
struct Churn<A: PageAllocator> {
    allocator: A,
    live: Vec<(A::Run, u32)>,
    used_pages: u64,
    target_pages: u64,
    filled_pages: u64,
    random: Random,
    refused: u64,
    refused_falsely: u64,
}

impl<A: PageAllocator> Churn<A> {
    fn new(percent: u8) -> Churn<A> {
        Churn {
            allocator: A::new(SPACE_PAGES, RUNS),
            live: Vec::new(),
            used_pages: 0,
            target_pages: u64::from(SPACE_PAGES) * u64::from(percent) / 100,
            filled_pages: 0,
            random: Random::stream(u64::from(percent)),
            refused: 0,
            refused_falsely: 0,
        }
    }

    /// `None` if it was refused.
    fn alloc(&mut self, clock: Clock) -> Option<u32> {
        let pages = run_of_pages(&mut self.random);
        let (run, took) = clock.time(|| self.allocator.alloc(pages));
        if let Some(run) = run {
            self.live.push((run, pages));
            self.used_pages += u64::from(pages);
            return Some(took);
        }
        self.refused += 1;
        self.refused_falsely += u64::from(self.allocator.claims_room(pages));
        None
    }

    fn free(&mut self, clock: Clock) -> u32 {
        let place = self.random.index(self.live.len());
        let (run, pages) = self.live.swap_remove(place);
        self.used_pages -= u64::from(pages);
        clock.time(|| self.allocator.free(run)).1
    }

    /// Allocates below the target, frees above it and after a refusal.
    fn step(&mut self, clock: Clock, timed: Option<&mut Timed>) {
        let below = self.used_pages < self.target_pages;
        let allocated = below.then(|| self.alloc(clock)).flatten();
        let freed = allocated.is_none().then(|| self.free(clock));
        if let Some(timed) = timed {
            timed.allocs.extend(allocated);
            timed.frees.extend(freed);
        }
    }
}

impl<A: PageAllocator> Space for Churn<A> {
    fn fill(&mut self, clock: Clock, within: Duration) {
        let start = Instant::now();
        while self.used_pages < self.target_pages && self.refused == 0 && start.elapsed() < within {
            match self.random.below(FILL_FREES) {
                // Holes are there from the start.
                0 if !self.live.is_empty() => drop(self.free(clock)),
                _ => drop(self.alloc(clock)),
            }
        }
        self.filled_pages = self.used_pages;
    }

    fn is_filled(&self) -> bool {
        self.filled_pages >= self.target_pages
    }

    fn filled_percent(&self) -> f64 {
        100.0 * as_f64(self.filled_pages) / f64::from(SPACE_PAGES)
    }

    fn refused(&self) -> (u64, u64) {
        (self.refused, self.refused_falsely)
    }

    fn operate(&mut self, clock: Clock, ops: u64, within: Duration, mut timed: Option<&mut Timed>) {
        let start = Instant::now();
        for done in 0..ops {
            if done % 64 == 0 && start.elapsed() > within {
                return;
            }
            self.step(clock, timed.as_deref_mut());
        }
    }
}
