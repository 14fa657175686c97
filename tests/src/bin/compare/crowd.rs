//! What the daemon weighs, and what must not depend on how many domains and
//! sessions there are.

use std::io;
use std::time::Duration;

use domaind_client::{Buffer, Direction, MapSpec, Session};
use domaind_tests::node::greet;
use domaind_tests::users::is_root;

use crate::attend::{Attendance, Manner};
use crate::clock::as_f64;
use crate::memory::{resident, taken};
use crate::peers::PAGE;
use crate::removal::sessions;
use crate::report::{Limit, Report, Row, Unit};
use crate::rounds::{Contender, Outcome, Role, Scale, interleave};
use crate::world::{Attendant, World, typical};

const IDLE: &str = "daemon/idle RSS";
const CONNECTION: &str = "daemon/RSS per connection";
const DOMAIN: &str = "daemon/bytes per domain";
const SESSIONS_RSS: &str = "daemon/RSS of 512 sessions";
const KIB: f64 = 1024.0;
const MIB: f64 = 1024.0 * 1024.0;
/// Of which the growth is taken.
const CONNECTIONS: u32 = 256;
const DOMAINS_WEIGHED: u32 = 64;

/// Domains in the same daemon, of which one is worked in.
const DOMAINS: [u32; 3] = [16, 256, 4096];
/// Sessions in the same domain, of which one works.
const SESSIONS: [u32; 3] = [16, 128, 512];
/// A user may own fewer than there can be.
const DOMAINS_PER_USER: u32 = 1024;
/// Users that nobody is.
const FIRST_UID: u32 = 20_001;
/// Flat.
const SAME: f64 = 1.2;
const ONE_DOMAIN: &str = "1 domain";
const ONE_SESSION: &str = "1 session";

/// Prints all rows of this family.
pub(crate) fn rows(report: &Report, scale: &Scale) -> io::Result<()> {
    weights(report)?;
    domains(report, scale)?;
    more_sessions(report, scale)
}

fn weights(report: &Report) -> io::Result<()> {
    if !report.wants_any(&[IDLE, CONNECTION, DOMAIN].map(str::to_owned)) {
        return Ok(());
    }
    let world = World::start()?;
    let pid = world.daemon_pid();
    let idle = resident(pid)?;
    print(report, IDLE, as_f64(idle), 12.0 * MIB)?;
    if report.wants(CONNECTION) {
        let _warm = connections(&world, 8);
        let before = resident(pid)?;
        let _held = connections(&world, CONNECTIONS);
        let each = grown(before, resident(pid)?, CONNECTIONS);
        print(report, CONNECTION, each, 32.0 * KIB)?;
    }
    if report.wants(DOMAIN) {
        world.small_domains("warm", 8);
        let before = taken(pid)? - world.region_bytes();
        world.small_domains("weighed", DOMAINS_WEIGHED);
        let after = taken(pid)? - world.region_bytes();
        print(
            report,
            DOMAIN,
            grown(before, after, DOMAINS_WEIGHED),
            64.0 * KIB,
        )?;
    }
    Ok(())
}

/// Connections that have made a call each.
fn connections(world: &World, count: u32) -> Vec<domaind_client::Client> {
    let connected = (0..count).map(|_| {
        world.run(async {
            let client = world.connect().await;
            greet(&client).await;
            client
        })
    });
    connected.collect()
}

fn grown(before: u64, after: u64, by: u32) -> f64 {
    as_f64(after.saturating_sub(before)) / f64::from(by)
}

fn print(report: &Report, name: &str, bytes: f64, most: f64) -> io::Result<()> {
    if !report.wants(name) {
        return Ok(());
    }
    let ours = Outcome {
        name: "domaind",
        role: Role::Ours,
        value: Some(bytes),
        note: None,
    };
    let goal = [Limit::AtMost(most)];
    report.print(&Row::new(name.to_owned(), Unit::Bytes, vec![ours], goal))
}

fn domains(report: &Report, scale: &Scale) -> io::Result<()> {
    let row = |count: u32| format!("scaling/{count} domains");
    if !report.wants_any(&DOMAINS.map(row)) {
        return Ok(());
    }
    let (lonely, crowded) = (World::start()?, World::shared()?);
    let (alone, among) = (Pairs::new(&lonely, "pairs"), Pairs::new(&crowded, "pairs"));
    // The one that is worked in is there.
    let (mut there, mut owners) = (1, Vec::new());
    for count in DOMAINS
        .into_iter()
        .filter(|count| report.wants(&row(*count)))
    {
        let made = crowd(&crowded, count - there, &mut owners);
        let ours = match made {
            Ok(()) => among.contender(Role::Ours, "domaind"),
            Err(why) => Contender::unable(Role::Ours, "domaind", why),
        };
        there = count;
        let contenders = vec![ours, alone.contender(Role::Peer, ONE_DOMAIN)];
        let outcomes = interleave(scale.rounds, contenders);
        let goal = [Limit::Peer(ONE_DOMAIN, SAME)];
        report.print(&Row::new(row(count), Unit::Nanoseconds, outcomes, goal))?;
    }
    Ok(())
}

/// So many domains more, of users who each have some left.
fn crowd(world: &World, mut count: u32, owners: &mut Vec<Attendant>) -> Result<(), String> {
    if count >= DOMAINS_PER_USER && !is_root() {
        return Err("more domains than a user may have: run as root".to_owned());
    }
    while count > 0 {
        let number = u32::try_from(owners.len()).expect("few");
        let some = count.min(DOMAINS_PER_USER);
        let attendance = Attendance::Domains {
            dir: world.runtime_dir().path().to_owned(),
            prefix: format!("crowd-{number}"),
            count: some,
        };
        let uid = is_root().then_some(FIRST_UID + number);
        owners.push(world.attendant_as(&attendance, uid));
        count -= some;
    }
    Ok(())
}

fn more_sessions(report: &Report, scale: &Scale) -> io::Result<()> {
    let row = |count: u32| format!("scaling/{count} sessions");
    let mut names: Vec<String> = SESSIONS.map(row).to_vec();
    names.push(SESSIONS_RSS.to_owned());
    if !report.wants_any(&names) {
        return Ok(());
    }
    let (lonely, crowded) = (World::start()?, World::start()?);
    let (alone, among) = (Pairs::new(&lonely, "pairs"), Pairs::new(&crowded, "pairs"));
    let before = resident(crowded.daemon_pid())?;
    let (mut there, mut others) = (1, Vec::new());
    for count in SESSIONS {
        let more = usize::try_from(count - there).expect("64 bits");
        let attendance = sessions(&crowded, "pairs", more, Manner::Idle);
        others.extend(crowded.attendants(&attendance, 1));
        there = count;
        if !report.wants(&row(count)) {
            continue;
        }
        let contenders = vec![
            among.contender(Role::Ours, "domaind"),
            alone.contender(Role::Peer, ONE_SESSION),
        ];
        let outcomes = interleave(scale.rounds, contenders);
        let goal = [Limit::Peer(ONE_SESSION, SAME)];
        report.print(&Row::new(row(count), Unit::Nanoseconds, outcomes, goal))?;
    }
    let grown = grown(before, resident(crowded.daemon_pid())?, 1);
    print(report, SESSIONS_RSS, grown, 32.0 * MIB)
}

/// A driver that maps and unmaps a page, over and over.
struct Pairs<'w> {
    world: &'w World,
    spec: MapSpec,
    _buffer: Buffer,
    session: Session,
}

impl<'w> Pairs<'w> {
    fn new(world: &'w World, domain: &str) -> Pairs<'w> {
        let session = world.driver(domain);
        let buffer = world.run(session.buffer(PAGE)).expect("registered");
        let memory = buffer.memory().id();
        Pairs {
            world,
            spec: MapSpec::new(memory, 0, PAGE, Direction::ToDevice),
            _buffer: buffer,
            session,
        }
    }

    fn contender(&self, role: Role, name: &'static str) -> Contender<'_> {
        let pair = async || -> Duration {
            let start = std::time::Instant::now();
            let mapping = self.session.map(self.spec).await.expect("there is room");
            mapping.unmap(None).await.expect("it is live");
            start.elapsed()
        };
        Contender::new(role, name, move || typical(|| self.world.run(pair())))
    }
}
