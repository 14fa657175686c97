//! From an address to a pointer, as a device's thread gets it: pinned, walked,
//! checked, unpinned.
//!
//! The session is a real one, of a daemon; no call is made. The pointers are
//! not followed: that costs the same everywhere. The floor has no guard, so
//! that nothing of it can ever be removed.

use std::hint::black_box;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering, fence};
use std::time::{Duration, Instant};

use domaind_client::{Iova, IovaRange, Perm, Session};

use crate::clock::{Batch, race};
use crate::peers::{FlatTable, Mapping, PAGE, Table, VmMemory};
use crate::random::Random;
use crate::report::{Limit, Report, Row, Unit};
use crate::rounds::{Contender, Role, Scale, interleave};
use crate::world::World;

const ENTRIES: [(u64, &str); 2] = [(1 << 10, "1k"), (1 << 16, "64k")];
/// Addresses are drawn at least this many at a time.
const QUERIES: u64 = 1 << 16;
/// What is wanted at each address.
const LEN: u64 = 8;
const PIN: &str = "pin+unpin";
/// The peer's goal is for a table that fits into caches.
const IN_CACHES: u64 = 1 << 10;

/// Prints all rows of this family.
pub(crate) fn rows(report: &Report, scale: &Scale) -> io::Result<()> {
    let all: Vec<Kind> = ENTRIES.iter().flat_map(|(_, name)| kinds(name)).collect();
    let mut names: Vec<String> = all.iter().map(Kind::row).collect();
    names.push(PIN.to_owned());
    if !report.wants_any(&names) {
        return Ok(());
    }
    let world = World::start()?;
    for (entries, name) in ENTRIES {
        let driver = world.driver(&format!("table-{name}"));
        let paths = Paths::build(&world, &driver, entries);
        for kind in kinds(name) {
            let row = kind.row();
            if report.wants(&row) {
                let outcomes = interleave(scale.rounds, paths.contenders(&kind, scale));
                let row = Row::new(row, Unit::Nanoseconds, outcomes, kind.goal(entries));
                report.print(&row)?;
            }
        }
    }
    if report.wants(PIN) {
        let driver = world.driver("pin");
        let outcomes = interleave(scale.rounds, vec![pin(&driver, scale), fences(scale)]);
        let row = Row::new(
            PIN.to_owned(),
            Unit::Nanoseconds,
            outcomes,
            [Limit::AtMost(5.0)],
        );
        report.print(&row)?;
    }
    Ok(())
}

/// How translations are made.
struct Kind {
    entries: &'static str,
    manner: Manner,
    threads: usize,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Manner {
    /// A pin for each.
    Pinned,
    /// One pin for many.
    Held,
    /// The pieces of a range, a pin for each.
    Pieces,
}

fn kinds(entries: &'static str) -> Vec<Kind> {
    let manners = [Manner::Pinned, Manner::Held, Manner::Pieces];
    let kind = |manner| {
        [1, 2].map(|threads| Kind {
            entries,
            manner,
            threads,
        })
    };
    manners.into_iter().flat_map(kind).collect()
}

impl Kind {
    fn row(&self) -> String {
        let Kind {
            entries, threads, ..
        } = self;
        let manner = match self.manner {
            Manner::Pinned => "",
            Manner::Held => "/pin held",
            Manner::Pieces => "/range",
        };
        let plural = if *threads == 1 { "" } else { "s" };
        format!("translate{manner}/{entries}/{threads} thread{plural}")
    }

    fn goal(&self, entries: u64) -> Vec<Limit> {
        let mut goal = Vec::new();
        if self.manner == Manner::Pinned {
            goal.push(Limit::Floor(2.0));
            if entries <= IN_CACHES {
                goal.push(Limit::Peer(VmMemory::NAME, 1.0 / 10.0));
            }
        }
        goal
    }
}

/// Everybody with the same mappings.
struct Paths<'w> {
    session: &'w Session,
    vm_memory: VmMemory,
    flat: FlatTable,
    /// Where the memory behind the flat table begins.
    memory: Vec<u8>,
    queries: Vec<u64>,
}

impl<'w> Paths<'w> {
    fn build(world: &World, session: &'w Session, entries: u64) -> Paths<'w> {
        let mappings = world.set_map(session, entries);
        let open = session.open(mappings[0].entry().range, Perm::Read);
        world.run(open).expect("opened");
        Paths {
            session,
            vm_memory: VmMemory::build(&mappings, entries * PAGE),
            flat: FlatTable::build(&mappings),
            memory: vec![0],
            queries: queries(&mappings),
        }
    }

    fn contenders<'a>(&'a self, kind: &Kind, scale: &Scale) -> Vec<Contender<'a>> {
        let (queries, threads) = (&self.queries[..], kind.threads);
        let contender = |role, name, run: Run<'a>| {
            let mut readers = [0, queries.len() / 2].map(|at| Draw { queries, at });
            let mut batch = Batch::lasting(scale.turn);
            Contender::new(role, name, move || {
                let [one, other] = &mut readers;
                match threads {
                    1 => batch.run(|ops| run(one, ops)),
                    _ => batch.run(|ops| race(|| run(one, ops), || run(other, ops))),
                }
            })
        };
        let ours: Run<'a> = match kind.manner {
            Manner::Pinned => {
                Box::new(|draw, ops| draw.run(ops, |iova| pinned(self.session, iova)))
            }
            Manner::Held => Box::new(|draw, ops| self.held(draw, ops)),
            Manner::Pieces => {
                Box::new(|draw, ops| draw.run(ops, |iova| pieces(self.session, iova)))
            }
        };
        let vm_memory = |iova| self.vm_memory.pointer(iova, 8);
        // The table is what costs: any pointer will do.
        let start = self.memory.as_ptr();
        let base = start.addr();
        let flat = move |iova| {
            let (target, _) = self.flat.lookup(iova)?;
            Some(std::ptr::without_provenance(
                base.wrapping_add(usize::try_from(target).ok()?),
            ))
        };
        vec![
            contender(Role::Ours, "domaind", ours),
            contender(
                Role::Peer,
                VmMemory::NAME,
                Box::new(move |draw, ops| draw.run(ops, vm_memory)),
            ),
            contender(
                FlatTable::ROLE,
                FlatTable::NAME,
                Box::new(move |draw, ops| draw.run(ops, flat)),
            ),
        ]
    }

    fn held(&self, draw: &mut Draw<'_>, ops: u64) -> Duration {
        let pin = self.session.pin().expect("it lives");
        draw.run(ops, |iova| {
            let memory = pin.address(Iova::new(iova), Perm::Read)?;
            Some(memory.as_ptr())
        })
    }
}

type Run<'a> = Box<dyn Fn(&mut Draw<'_>, u64) -> Duration + Sync + 'a>;

#[inline]
fn pinned(session: &Session, iova: u64) -> Option<*const u8> {
    let pin = session.pin().ok()?;
    let memory = pin.address(Iova::new(iova), Perm::Read)?;
    Some(memory.as_ptr())
}

#[inline]
fn pieces(session: &Session, iova: u64) -> Option<*const u8> {
    let pin = session.pin().ok()?;
    let range = IovaRange::from_len(Iova::new(iova), LEN).ok()?;
    let pieces = pin.translate(range, Perm::Read).ok()?;
    Some(pieces.single()?.memory.as_ptr())
}

/// Words in random order, none of which crosses the end of its page.
fn queries(mappings: &[Mapping]) -> Vec<u64> {
    let mut random = Random::stream(41);
    let words = PAGE / LEN;
    let count = QUERIES.max(mappings.len() as u64);
    let mut word = |_| mappings[random.index(mappings.len())].start + random.below(words) * LEN;
    (0..count).map(&mut word).collect()
}

/// What one thread translates next. On cache lines of its own.
#[repr(align(128))]
struct Draw<'q> {
    queries: &'q [u64],
    at: usize,
}

impl Draw<'_> {
    #[inline]
    fn run(&mut self, ops: u64, translate: impl Fn(u64) -> Option<*const u8>) -> Duration {
        let queries = self.queries;
        assert!(translate(queries[self.at]).is_some(), "it is mapped");
        let mut at = self.at;
        let start = Instant::now();
        for _ in 0..ops {
            at = if at + 1 < queries.len() { at + 1 } else { 0 };
            black_box(translate(black_box(queries[at])));
        }
        let took = start.elapsed();
        self.at = at;
        took
    }
}

fn pin<'a>(session: &'a Session, scale: &Scale) -> Contender<'a> {
    // In registers, as where it is used.
    repeated(Role::Ours, "domaind", scale, move || {
        black_box(black_box(session).pin().is_ok());
    })
}

/// Without it nobody can know that nobody is reading.
fn fences(scale: &Scale) -> Contender<'static> {
    // Fences with nothing between them would be taken for one.
    let slot = AtomicU64::new(0);
    repeated(Role::Floor, "store and SeqCst fence", scale, move || {
        black_box(&slot).store(1, Ordering::Release);
        fence(Ordering::SeqCst)
    })
}

fn repeated<'a>(
    role: Role,
    name: &'static str,
    scale: &Scale,
    work: impl Fn() + 'a,
) -> Contender<'a> {
    let mut batch = Batch::lasting(scale.turn);
    Contender::new(role, name, move || {
        batch.run(|ops| {
            let start = Instant::now();
            (0..ops).for_each(|_| work());
            start.elapsed()
        })
    })
}
