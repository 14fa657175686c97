//! What a call costs beyond an empty one on the same connection: Map and Unmap,
//! one in flight and from many connections.

use std::cell::RefCell;
use std::io;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use domaind_client::{Access, Buffer, Client, Direction, MapSpec, Role as SessionRole, Session};
use domaind_tests::files::good_memfd;
use domaind_tests::node::domain_id;
use tokio::task::JoinSet;
use tonic::transport::Channel;
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_client::HealthClient;

use crate::clock::{Share, as_f64};
use crate::peers::PAGE;
use crate::report::{Limit, Report, Row, Unit};
use crate::rounds::{Contender, Outcome, Role, Scale, interleave};
use crate::world::{World, typical};

const MAP: &str = "unary/map 4 KiB";
const UNMAP: &str = "unary/unmap 4 KiB";
const MANY: &str = "unary/16 connections";
const MANY_P99: &str = "unary/16 connections/p99";
/// An empty call and the copy, on the same server and connection.
const ALONE: f64 = 1.25;
/// At least 60 % of the calls in the same time.
const TOGETHER: f64 = 1.0 / 0.6;
const TAIL: f64 = 3.0;
const CONNECTIONS: usize = 16;
const DOMAIN: &str = "unary";
/// Map and Unmap, or two empty calls, of each connection in one turn.
const PAIRS: usize = 8;

/// Prints all rows of this family.
pub(crate) fn rows(report: &Report, scale: &Scale) -> io::Result<()> {
    if !report.wants_any(&[MAP, UNMAP, MANY, MANY_P99].map(str::to_owned)) {
        return Ok(());
    }
    let world = World::start()?;
    let _first = world.driver(DOMAIN);
    let lane = world.run(Lane::open(world.client().clone()));
    for (name, part) in [(MAP, Part::Map), (UNMAP, Part::Unmap)] {
        if report.wants(name) {
            let contenders = vec![ours(&world, &lane, part), empty(&world, &lane, part)];
            let outcomes = interleave(scale.rounds, contenders);
            let goal = [Limit::Floor(ALONE)];
            report.print(&Row::new(
                name.to_owned(),
                Unit::Nanoseconds,
                outcomes,
                goal,
            ))?;
        }
    }
    if report.wants_any(&[MANY, MANY_P99].map(str::to_owned)) {
        together(report, scale, &world)?;
    }
    Ok(())
}

/// Which call is timed.
#[derive(Clone, Copy)]
enum Part {
    Map,
    Unmap,
}

/// A connection with a driver's session.
struct Lane {
    session: Session,
    spec: MapSpec,
    health: HealthClient<Channel>,
    _buffer: Buffer,
}

impl Lane {
    /// In a domain that is there.
    async fn open(client: Client) -> Lane {
        let domain = domain_id(DOMAIN);
        let session = client.attach(&domain, SessionRole::Driver, Access::ReadWrite);
        let session = session.await.expect("attached");
        let buffer = session.buffer(PAGE).await.expect("registered");
        let memory = buffer.memory().id();
        Lane {
            session,
            // Both calls copy.
            spec: MapSpec::new(memory, 0, PAGE, Direction::Bidirectional),
            health: HealthClient::new(client.channel()),
            _buffer: buffer,
        }
    }
}

/// Maps and unmaps; what each took.
async fn pair(session: &Session, spec: MapSpec) -> [Duration; 2] {
    let start = Instant::now();
    let mapping = session.map(spec).await.expect("there is room");
    let map = start.elapsed();
    let start = Instant::now();
    mapping.unmap(None).await.expect("it is live");
    [map, start.elapsed()]
}

async fn check(health: &mut HealthClient<Channel>) -> Duration {
    let start = Instant::now();
    let answer = health.check(HealthCheckRequest::default()).await;
    let took = start.elapsed();
    answer.expect("it is healthy");
    took
}

fn ours<'a>(world: &'a World, lane: &'a Lane, part: Part) -> Contender<'a> {
    Contender::new(Role::Ours, "domaind", move || {
        typical(|| {
            let [map, unmap] = world.run(pair(&lane.session, lane.spec));
            match part {
                Part::Map => map,
                Part::Unmap => unmap,
            }
        })
    })
}

fn empty<'a>(world: &'a World, lane: &Lane, part: Part) -> Contender<'a> {
    let (mut health, memfd) = (lane.health.clone(), good_memfd(PAGE));
    Contender::new(Role::Floor, "empty RPC + copy", move || {
        typical(|| world.run(check(&mut health)) + copy(&memfd, part))
    })
}

/// What the daemon does with a driver's file.
fn copy(memfd: &OwnedFd, part: Part) -> Duration {
    let mut bytes = [0; 4096];
    let start = Instant::now();
    let copied = match part {
        Part::Map => rustix::io::pread(memfd, &mut bytes, 0),
        Part::Unmap => rustix::io::pwrite(memfd, &bytes, 0),
    };
    let took = start.elapsed();
    assert_eq!(copied, Ok(bytes.len()));
    took
}

/// All at the same time, each with one call in flight.
fn together(report: &Report, scale: &Scale, world: &World) -> io::Result<()> {
    let lanes: Vec<Lane> = (0..CONNECTIONS)
        .map(|_| world.run(async { Lane::open(world.connect().await).await }))
        .collect();
    let samples = [const { RefCell::new(Vec::new()) }; 2];
    let contenders = vec![
        Contender::new(Role::Ours, "domaind", || {
            let (took, calls) = world.run(race(&lanes, Kind::Pairs));
            per_call(took, calls, &samples[0])
        }),
        Contender::new(Role::Floor, "empty RPC", || {
            let (took, calls) = world.run(race(&lanes, Kind::Empty));
            per_call(took, calls, &samples[1])
        }),
    ];
    let outcomes = interleave(scale.rounds, contenders);
    let names = [(Role::Ours, "domaind"), (Role::Floor, "empty RPC")];
    let tails = names.iter().zip(samples).map(|((role, name), samples)| {
        let mut samples = samples.into_inner();
        samples.sort_unstable();
        Outcome {
            name,
            role: *role,
            value: Some(f64::from(Share::P99.of(&samples))),
            note: None,
        }
    });
    let tails = tails.collect();
    if report.wants(MANY) {
        let goal = [Limit::Floor(TOGETHER)];
        report.print(&Row::new(
            MANY.to_owned(),
            Unit::Nanoseconds,
            outcomes,
            goal,
        ))?;
    }
    if report.wants(MANY_P99) {
        let goal = [Limit::Floor(TAIL)];
        report.print(&Row::new(
            MANY_P99.to_owned(),
            Unit::Nanoseconds,
            tails,
            goal,
        ))?;
    }
    Ok(())
}

#[derive(Clone, Copy)]
enum Kind {
    Pairs,
    Empty,
}

/// How long it took until all had done their calls, and what each call took.
async fn race(lanes: &[Lane], kind: Kind) -> (Duration, Vec<Duration>) {
    let mut running = JoinSet::new();
    let start = Instant::now();
    for lane in lanes {
        let (session, spec, mut health) = (lane.session.clone(), lane.spec, lane.health.clone());
        running.spawn(async move {
            let mut calls = Vec::with_capacity(2 * PAIRS);
            for _ in 0..PAIRS {
                calls.extend(match kind {
                    Kind::Pairs => pair(&session, spec).await,
                    Kind::Empty => [check(&mut health).await, check(&mut health).await],
                });
            }
            calls
        });
    }
    let calls = running.join_all().await;
    (start.elapsed(), calls.concat())
}

/// Nanoseconds of the whole for each call; each goes to the samples, too.
fn per_call(took: Duration, calls: Vec<Duration>, samples: &RefCell<Vec<u32>>) -> f64 {
    let count = u64::try_from(calls.len()).expect("64 bits");
    let nanos = |call: Duration| u32::try_from(call.as_nanos()).unwrap_or(u32::MAX);
    samples.borrow_mut().extend(calls.into_iter().map(nanos));
    took.as_secs_f64() * 1e9 / as_f64(count)
}
