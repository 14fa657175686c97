//! What is removed, while others are attached: who frees coherent memory waits
//! until none of them can reach it any more.

use std::io;
use std::time::{Duration, Instant};

use domaind_client::{Direction, MapSpec, Session};

use crate::attend::{Attendance, Manner};
use crate::peers::PAGE;
use crate::report::{Limit, Report, Row, Unit};
use crate::rounds::{Contender, Outcome, Role, Scale, interleave};
use crate::world::{Attendant, Echo, World, alloc_free, typical};

const SESSIONS: [usize; 3] = [1, 4, 16];
const MANNERS: [(Manner, &str); 4] = [
    (Manner::Idle, "pins, none held"),
    (Manner::Holding, "pins held"),
    (Manner::Apart, "pins held apart"),
    (Manner::Frames, "frames"),
];
/// Round trips on a plain socket.
const MOST: f64 = 3.0;
const ALONE: &str = "no other session";
const UNMAP: &str = "unmap/4 sessions";

/// Prints all rows of this family.
pub(crate) fn rows(report: &Report, scale: &Scale) -> io::Result<()> {
    let kinds: Vec<Kind> = kinds().collect();
    let mut names: Vec<String> = kinds
        .iter()
        .flat_map(|kind| [kind.whole(), kind.added()])
        .collect();
    names.push(UNMAP.to_owned());
    if !report.wants_any(&names) {
        return Ok(());
    }
    let world = World::start()?;
    let mut echo = world.echo()?;
    let alone = world.driver("alone");
    for kind in &kinds {
        if report.wants_any(&[kind.whole(), kind.added()]) {
            kind.print(report, scale, &world, &alone, &mut echo)?;
        }
    }
    if report.wants(UNMAP) {
        let driver = world.driver("unmap");
        let _others = world.attendants(&sessions(&world, "unmap", 1, Manner::Idle), 4);
        let contenders = vec![
            unmapping(&world, Role::Ours, "domaind", &driver),
            unmapping(&world, Role::Peer, ALONE, &alone),
            echo.floor(),
        ];
        let outcomes = interleave(scale.rounds, contenders);
        let goal = [Limit::Floor(MOST)];
        report.print(&Row::new(
            UNMAP.to_owned(),
            Unit::Nanoseconds,
            outcomes,
            goal,
        ))?;
    }
    Ok(())
}

/// Who else is attached.
struct Kind {
    manner: Manner,
    name: &'static str,
    others: usize,
}

fn kinds() -> impl Iterator<Item = Kind> {
    MANNERS.into_iter().flat_map(|(manner, name)| {
        SESSIONS.map(|others| Kind {
            manner,
            name,
            others,
        })
    })
}

impl Kind {
    fn whole(&self) -> String {
        format!("removal/{}/{}", self.name, self.others)
    }

    fn added(&self) -> String {
        format!("removal/{}/{}/acks", self.name, self.others)
    }

    fn print(
        &self,
        report: &Report,
        scale: &Scale,
        world: &World,
        alone: &Session,
        echo: &mut Echo,
    ) -> io::Result<()> {
        let domain = self.whole().replace(['/', ' ', ','], "-");
        let driver = world.driver(&domain);
        let attendance = sessions(world, &domain, 1, self.manner);
        let _others: Vec<Attendant> = world.attendants(&attendance, self.others);
        let contenders = vec![
            freeing(world, Role::Ours, "domaind", &driver),
            freeing(world, Role::Peer, ALONE, alone),
            echo.floor(),
        ];
        let outcomes = interleave(scale.rounds, contenders);
        let goal = [Limit::Floor(MOST)];
        let added = added(&outcomes);
        report.print(&Row::new(self.whole(), Unit::Nanoseconds, outcomes, goal))?;
        report.print(&Row::new(self.added(), Unit::Nanoseconds, added, goal))
    }
}

/// What the others add to the whole.
fn added(outcomes: &[Outcome]) -> Vec<Outcome> {
    let value = |role| {
        let found = outcomes.iter().find(|outcome| outcome.role == role);
        found.and_then(|outcome| outcome.value)
    };
    let whole = value(Role::Ours).zip(value(Role::Peer));
    let outcomes = outcomes.iter().filter(|outcome| outcome.role != Role::Peer);
    let added = |outcome: &Outcome| match outcome.role {
        Role::Ours => Outcome {
            value: whole.map(|(ours, alone)| ours - alone),
            note: whole.map(|(ours, alone)| format!("{ours:.0} less {alone:.0}")),
            ..outcome.clone()
        },
        _ => outcome.clone(),
    };
    outcomes.map(added).collect()
}

/// Such sessions, so many in each process.
pub(crate) fn sessions(world: &World, domain: &str, count: usize, manner: Manner) -> Attendance {
    Attendance::Sessions {
        dir: world.runtime_dir().path().to_owned(),
        domain: domain.to_owned(),
        count,
        manner,
    }
}

fn freeing<'a>(
    world: &'a World,
    role: Role,
    name: &'static str,
    driver: &'a Session,
) -> Contender<'a> {
    Contender::new(role, name, move || {
        typical(|| world.run(alloc_free(driver)).1)
    })
}

fn unmapping<'a>(
    world: &'a World,
    role: Role,
    name: &'static str,
    driver: &'a Session,
) -> Contender<'a> {
    let buffer = world.run(driver.buffer(PAGE)).expect("registered");
    let spec = MapSpec::new(buffer.memory().id(), 0, PAGE, Direction::ToDevice);
    let unmap = async move || -> Duration {
        let mapping = driver.map(spec).await.expect("there is room");
        let start = Instant::now();
        mapping.unmap(None).await.expect("it is live");
        start.elapsed()
    };
    Contender::new(role, name, move || {
        let _kept = &buffer;
        typical(|| world.run(unmap()))
    })
}
