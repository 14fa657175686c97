//! What must not depend on how many sessions are attached, nor on how large the
//! table is.

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use domain_core::aperture::ScrubWith;
use domain_core::coherent::{Allocated, CoherentSpec};
use domain_core::direct::Actor;
use domain_core::domain::{Domain, Settings};
use domain_core::iotlb::Barrier;
use domain_core::layout::LayoutSpec;
use domain_core::region::ClientMemory;
use domain_core::session::{Account, Joining, Reader, Role as SessionRole, SessionId};
use domaind_client::Session;
use domaind_tests::files::good_memfd;

use crate::attend::Manner;
use crate::clock::Batch;
use crate::peers::PAGE;
use crate::removal::sessions;
use crate::report::{Limit, Report, Row, Unit};
use crate::rounds::{Contender, Role, Scale, interleave};
use crate::world::{World, alloc_free, direct, scattered, typical};

const ENTRIES: u64 = 100_000;
const SESSIONS: [u64; 3] = [1, 16, 256];
/// The service's own apertures are as small as those of the domains that it
/// makes here.
const COHERENT_BYTES: u64 = 4 << 20;
/// Allocations that are made together, and then freed: the clock is slow.
const AT_A_TIME: usize = 32;
const DRIVER: SessionId = SessionId::new(1);

/// The same with next to nothing.
const LEAST: &str = "1 session, no entries";
/// What does not depend on something differs by no more than noise.
const SAME: f64 = 1.25;
const EMPTY: &str = "no entries";
const ATTACH: &str = "attach/100k entries";

/// Prints all rows of this family.
pub(crate) fn rows(report: &Report, scale: &Scale) -> io::Result<()> {
    let goal = [Limit::Peer(LEAST, SAME)];
    for (part, way) in [(Part::Alloc, "core alloc"), (Part::Both, "core")] {
        for count in SESSIONS {
            let name = row(way, count);
            if report.wants(&name) {
                let contenders = vec![
                    in_process(Role::Ours, "domaind", (count, ENTRIES), part, scale),
                    in_process(Role::Peer, LEAST, (1, 0), part, scale),
                ];
                let outcomes = interleave(scale.rounds, contenders);
                report.print(&Row::new(name, Unit::Nanoseconds, outcomes, goal))?;
            }
        }
    }
    let grpc = SESSIONS.map(|count| (count, row("grpc", count)));
    let mut names: Vec<String> = grpc.iter().map(|(_, row)| row.clone()).collect();
    names.push(ATTACH.to_owned());
    if !report.wants_any(&names) {
        return Ok(());
    }
    let world = World::start()?;
    let mut echo = world.echo()?;
    let least = world.driver("least");
    for (count, name) in grpc {
        if !report.wants(&name) {
            continue;
        }
        let domain = format!("with-{count}");
        let driver = world.driver(&domain);
        world.set_map(&driver, ENTRIES);
        let others = usize::try_from(count - 1).expect("few");
        let attendance = sessions(&world, &domain, others, Manner::Idle);
        let _others = world.attendants(&attendance, 1);
        let contenders = vec![
            through_service(&world, Role::Ours, "domaind", &driver),
            through_service(&world, Role::Peer, LEAST, &least),
            echo.floor(),
        ];
        let outcomes = interleave(scale.rounds, contenders);
        report.print(&Row::new(name, Unit::Nanoseconds, outcomes, goal))?;
    }
    if report.wants(ATTACH) {
        let full = world.driver("full");
        world.set_map(&full, ENTRIES);
        let contenders = vec![
            attaching(&world, Role::Ours, "domaind", "full"),
            attaching(&world, Role::Peer, EMPTY, "least"),
            echo.floor(),
        ];
        let outcomes = interleave(scale.rounds, contenders);
        let goal = [Limit::Peer(EMPTY, SAME)];
        report.print(&Row::new(
            ATTACH.to_owned(),
            Unit::Nanoseconds,
            outcomes,
            goal,
        ))?;
    }
    Ok(())
}

fn row(way: &str, sessions: u64) -> String {
    let plural = if sessions == 1 { "" } else { "s" };
    format!("coherent/{way}/{sessions} session{plural}")
}

/// Somebody who never holds anything, and takes no time to say so.
#[derive(Debug)]
struct Nothing;

impl Reader for Nothing {
    fn by_frames(&self) -> bool {
        false
    }

    fn holds_older_than(&self, _generation: u64, _barrier: &Barrier) -> bool {
        false
    }

    fn ask(&self, _generation: u64) {}

    fn fence(&self, _generation: u64) {}

    fn revoke(&self) {}
}

/// What of it is timed.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Part {
    /// The page table and the allocator: nobody is asked for anything.
    Alloc,
    /// And the removal, for which every session's page is looked at.
    Both,
}

/// Without a daemon, with so many sessions and direct entries.
fn in_process(
    role: Role,
    name: &'static str,
    (sessions, entries): (u64, u64),
    part: Part,
    scale: &Scale,
) -> Contender<'static> {
    let domain = domain(sessions, entries);
    let spec = CoherentSpec::of(PAGE);
    let alloc = move |domain: &Domain| {
        let allocated = domain.alloc_coherent(DRIVER, &spec);
        allocated.expect("there is room")
    };
    let free = |domain: &Domain, allocated: Allocated| {
        let freed = domain.free_coherent(DRIVER, allocated.iova(), allocated.id);
        freed.expect("it is live");
    };
    let mut batch = Batch::lasting(scale.turn);
    let mut live = Vec::with_capacity(AT_A_TIME);
    let mut work = move |handfuls: u64| {
        let mut took = Duration::ZERO;
        for _ in 0..handfuls {
            let start = Instant::now();
            live.extend((0..AT_A_TIME).map(|_| alloc(&domain)));
            let allocated = start.elapsed();
            live.drain(..)
                .for_each(|allocated| free(&domain, allocated));
            took += match part {
                Part::Alloc => allocated,
                Part::Both => start.elapsed(),
            };
        }
        took
    };
    Contender::new(role, name, move || batch.run(&mut work) / AT_A_TIME as f64)
}

fn domain(sessions: u64, entries: u64) -> Domain {
    let layout = LayoutSpec {
        coherent_bytes: COHERENT_BYTES,
        ..LayoutSpec::default()
    };
    let layout = layout.plan().expect("a good layout");
    let domain = Domain::create("compare", layout, Settings::default(), ScrubWith::Zero);
    let domain = domain.expect("memory for a domain");
    for session in 1..=sessions {
        let who = Joining {
            role: SessionRole::Driver,
            account: Account::default(),
            reader: Some(Arc::new(Nothing)),
        };
        domain
            .join(SessionId::new(session), who)
            .expect("it is not full");
    }
    if entries > 0 {
        let memory = ClientMemory::accept(good_memfd(entries * PAGE), true);
        let memory = memory.expect("a sealed memfd");
        let memory = domain.register(DRIVER, memory, false).expect("it is empty");
        let table: Vec<_> = scattered(entries)
            .iter()
            .map(|mapping| direct(mapping, memory))
            .collect();
        let set = domain.set_map(Actor::Session(DRIVER), &table, None);
        set.expect("a good table");
    }
    domain
}

fn through_service<'a>(
    world: &'a World,
    role: Role,
    name: &'static str,
    driver: &'a Session,
) -> Contender<'a> {
    Contender::new(role, name, move || {
        typical(|| {
            let (alloc, free) = world.run(alloc_free(driver));
            alloc + free
        })
    })
}

/// Until all is mapped and the daemon has said that it is ready.
pub(crate) fn attaching<'a>(
    world: &'a World,
    role: Role,
    name: &'static str,
    domain: &'static str,
) -> Contender<'a> {
    Contender::new(role, name, move || {
        typical(|| {
            world.run(async {
                let start = Instant::now();
                let session = world.attach(domain, SessionRole::Device).await;
                let took = start.elapsed();
                session.detach().await.expect("nothing is pinned");
                took
            })
        })
    })
}
