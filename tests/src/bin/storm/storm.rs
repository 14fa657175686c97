//! Starts, kills, adds up, and looks what is left.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::hash::{BuildHasher, RandomState};
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use domaind_tests::node::{name, spec, without_settings};
use domaind_tests::{Node, build, v1};
use serde_json::json;

use crate::random::Random;
use crate::tally::{self, Counts};
use crate::{Cli, Role};

/// Where all meet.
pub(crate) const DOMAIN: &str = "storm";
/// Small, so that what is freed is soon used again.
const BOUNCE_BYTES: u64 = 4 << 20;
const COHERENT_BYTES: u64 = 2 << 20;
/// Between two looks at the clock.
const TICK: Duration = Duration::from_millis(5);
/// For those that end by themselves.
const ENDING: Duration = Duration::from_secs(20);
/// For what the dead have left.
const CLEARING: Duration = Duration::from_secs(10);
/// A run that counts cycles and makes none.
const STUCK: Duration = Duration::from_secs(60);

#[tokio::main(flavor = "multi_thread", worker_threads = 1)]
pub(crate) async fn run(cli: &Cli) -> anyhow::Result<ExitCode> {
    match cli.no_build {
        false => build::domaind()?,
        true => build::check()?,
    }
    let seed = cli
        .seed
        .unwrap_or_else(|| RandomState::new().hash_one(0) >> 32);
    eprintln!("storm: seed {seed}");
    let timeout = cli
        .ack_timeout_ms
        .map(|ms| format!("--limits-ack-timeout-ms={ms}"));
    let flags: Vec<&str> = timeout.iter().map(String::as_str).collect();
    let poison: &[(&str, &str)] = if cli.poison {
        &[("DOMAIND_POISON", "1")]
    } else {
        &[]
    };
    let node = Node::configured(&flags, poison).await;
    let created = node
        .create(DOMAIN, spec(BOUNCE_BYTES, COHERENT_BYTES))
        .await;
    created.map_err(|refusal| anyhow::anyhow!("{refusal:?}"))?;

    let mut storm = Storm {
        cli,
        node: &node,
        tally: tally::create()?,
        random: Random::new(seed),
        rows: 0,
        children: Vec::new(),
        kills: 0,
        failures: 0,
    };
    // What the first clients ever cost stays: buffers, threads.
    storm.warm_up().await?;
    let before = Left::of(&node).await;
    let fds = fds(&node)?;
    let start = Instant::now();
    let deaths = storm.rage().await?;
    let raged = start.elapsed();
    storm.calm(deaths).await?;

    let after = Left::settled(&node, &before, fds).await?;
    let counts = storm.sum();
    let leaked_fds = self::fds(&node)?.saturating_sub(fds);
    let mut faults = after.faults(&before);
    if node.log().contains("panicked") {
        faults.push("the daemon's log tells of a panic".to_owned());
    }
    if storm.failures > 0 {
        faults.push(format!("{} processes failed", storm.failures));
    }
    let audit = match faults.is_empty() {
        true => "clean".to_owned(),
        false => faults.join("; "),
    };
    let (kills, leaked) = (storm.kills, after.ranges());
    let is_good = counts.foreign_bytes == 0 && leaked == 0 && leaked_fds == 0 && faults.is_empty();
    let report = json!({
        "foreign_bytes": counts.foreign_bytes,
        "cycles": counts.cycles,
        "kills": kills,
        "leaked_ranges": leaked,
        "leaked_fds": leaked_fds,
        "audit": audit,
        "checked_bytes": counts.checked_bytes,
        "unacknowledged": counts.unacknowledged,
        "full": counts.full,
        "processes": cli.processes,
        "devices": cli.devices,
        "seconds": raged.as_secs_f64(),
        "seed": seed,
    });
    if cli.json {
        println!("{report}");
    } else {
        println!(
            "seed {seed}: {} cycles in {raged:.1?}, {kills} kills",
            counts.cycles
        );
        println!(
            "{} foreign bytes of {}",
            counts.foreign_bytes, counts.checked_bytes
        );
        println!("left: {leaked} ranges, {leaked_fds} fds; audit: {audit}");
    }
    Ok(if is_good {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

struct Storm<'a> {
    cli: &'a Cli,
    node: &'a Node,
    tally: File,
    random: Random,
    /// So many have been started.
    rows: u64,
    children: Vec<Running>,
    kills: u64,
    failures: u64,
}

#[derive(Debug)]
struct Running {
    role: Role,
    child: Child,
}

impl Drop for Running {
    fn drop(&mut self) {
        // An error means that it is dead.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Storm<'_> {
    async fn warm_up(&mut self) -> anyhow::Result<()> {
        let idle = Left::of(self.node).await;
        for role in [Role::Driver, Role::Device] {
            let running = self.spawn(role)?;
            let row = self.rows;
            self.until("the first cycles", |storm| {
                tally::read(&storm.tally, row).cycles > 20
            })
            .await?;
            drop(running);
        }
        let fds = fds(self.node)?;
        Left::settled(self.node, &idle, fds).await?;
        Ok(())
    }

    /// Until it has lasted or done enough.
    async fn rage(&mut self) -> anyhow::Result<BTreeSet<usize>> {
        let (drivers, devices) = (self.cli.processes, self.cli.devices);
        let roles = (0..drivers)
            .map(|_| Role::Driver)
            .chain((0..devices).map(|_| Role::Device));
        for role in roles.collect::<Vec<_>>() {
            let running = self.spawn(role)?;
            self.children.push(running);
        }
        let seconds = self.cli.seconds.or(self.cli.cycles.is_none().then_some(30));
        let end = seconds.map(|seconds| Instant::now() + Duration::from_secs(seconds));
        let pause = Duration::from_millis(self.cli.kill_every_ms);
        let (mut next_kill, mut progress) = (Instant::now() + pause, (0, Instant::now()));
        loop {
            tokio::time::sleep(TICK).await;
            self.replace_failed()?;
            let cycles = self.sum().cycles;
            if cycles > progress.0 {
                progress = (cycles, Instant::now());
            }
            if progress.1.elapsed() > STUCK {
                bail!("nobody has done anything for {STUCK:?}");
            }
            let is_enough = self.cli.cycles.is_some_and(|wanted| cycles >= wanted);
            if is_enough || end.is_some_and(|end| Instant::now() >= end) {
                break;
            }
            if !pause.is_zero() && Instant::now() >= next_kill {
                next_kill += pause;
                let index = self.random.index(self.children.len());
                self.kill(index)?;
            }
        }
        // Half of them end by force.
        let doomed = (0..self.children.len()).filter(|index| index % 2 == 1);
        Ok(doomed.collect())
    }

    /// Some are killed, the others told to stop.
    async fn calm(&mut self, doomed: BTreeSet<usize>) -> anyhow::Result<()> {
        for index in doomed {
            let running = &mut self.children[index];
            running.child.kill()?;
            running.child.wait()?;
            self.kills += 1;
        }
        tally::end(&self.tally)?;
        let until = Instant::now() + ENDING;
        for mut running in std::mem::take(&mut self.children) {
            let ended = loop {
                match running.child.try_wait()? {
                    Some(status) => break Some(status),
                    None if Instant::now() > until => break None,
                    None => tokio::time::sleep(TICK).await,
                }
            };
            let is_killed = ended.is_some_and(|status| status.code().is_none());
            if !is_killed && !ended.is_some_and(|status| status.success()) {
                eprintln!(
                    "storm: a {:?} that was told to stop: {ended:?}",
                    running.role
                );
                self.failures += 1;
            }
        }
        Ok(())
    }

    fn kill(&mut self, index: usize) -> anyhow::Result<()> {
        let role = self.children[index].role;
        self.children[index].child.kill()?;
        self.children[index].child.wait()?;
        self.kills += 1;
        self.children[index] = self.spawn(role)?;
        Ok(())
    }

    /// Nobody ends by itself.
    fn replace_failed(&mut self) -> anyhow::Result<()> {
        for index in 0..self.children.len() {
            let Some(status) = self.children[index].child.try_wait()? else {
                continue;
            };
            let role = self.children[index].role;
            eprintln!("storm: a {role:?} ended by itself: {status}");
            self.failures += 1;
            if self.failures > 20 {
                bail!("too many processes end by themselves");
            }
            self.children[index] = self.spawn(role)?;
        }
        Ok(())
    }

    fn spawn(&mut self, role: Role) -> anyhow::Result<Running> {
        self.rows += 1;
        // Read as zeros before the first is written.
        self.tally.set_len((self.rows + 1) * 64)?;
        let seed = (self.rows << 32) | (self.random.next() & 0xffff_ffff);
        let role_name = match role {
            Role::Driver => "driver",
            Role::Device => "device",
        };
        let child = without_settings(Command::new(std::env::current_exe()?))
            .args(["--child", role_name])
            .arg("--runtime-dir")
            .arg(self.node.runtime_dir().path())
            .args(["--row", &self.rows.to_string(), "--seed", &seed.to_string()])
            .stdin(Stdio::from(self.tally.try_clone()?))
            .stdout(Stdio::null())
            .spawn()
            .context("starting a process of the storm")?;
        Ok(Running { role, child })
    }

    fn sum(&self) -> Counts {
        let rows = (1..=self.rows).map(|row| tally::read(&self.tally, row));
        rows.fold(Counts::default(), |sum, one| Counts {
            cycles: sum.cycles + one.cycles,
            checked_bytes: sum.checked_bytes + one.checked_bytes,
            foreign_bytes: sum.foreign_bytes + one.foreign_bytes,
            unacknowledged: sum.unacknowledged + one.unacknowledged,
            full: sum.full + one.full,
        })
    }

    async fn until(&self, what: &str, is_so: impl Fn(&Self) -> bool) -> anyhow::Result<()> {
        let until = Instant::now() + ENDING;
        while !is_so(self) {
            if Instant::now() > until {
                bail!("gave up waiting for {what}");
            }
            tokio::time::sleep(TICK).await;
        }
        Ok(())
    }
}

/// What a domain and its daemon hold.
#[derive(Clone, Debug, PartialEq)]
struct Left {
    usage: v1::DomainUsage,
    /// What is listed.
    mappings: usize,
    sessions: usize,
    memories: usize,
    /// What the daemon counts.
    counted: [u64; 5],
}

impl Left {
    async fn of(node: &Node) -> Left {
        let counts = node.counts().await;
        let request = v1::ListMemoriesRequest {
            domain: name(DOMAIN),
            ..Default::default()
        };
        let memories = node.admin().sessions().list_memories(request).await;
        Left {
            usage: node.usage(DOMAIN).await,
            mappings: node.mappings(DOMAIN).await.len(),
            sessions: node.sessions(DOMAIN).await.len(),
            memories: memories.map_or(usize::MAX, |page| page.into_inner().memories.len()),
            counted: [
                counts.domains.into(),
                counts.sessions.into(),
                counts.streaming_mappings,
                counts.coherent_allocations,
                counts.memories,
            ],
        }
    }

    /// When it is what it was, or will not be.
    async fn settled(node: &Node, wanted: &Left, wanted_fds: u64) -> anyhow::Result<Left> {
        let until = Instant::now() + CLEARING;
        loop {
            let left = Left::of(node).await;
            let is_settled = left == *wanted && fds(node)? <= wanted_fds;
            if is_settled || Instant::now() > until {
                return Ok(left);
            }
            tokio::time::sleep(TICK).await;
        }
    }

    /// Everything that is mapped, held back, or taken.
    fn ranges(&self) -> u64 {
        let usage = &self.usage;
        let mapped = usage.streaming_mappings + usage.coherent_allocations + usage.direct_mappings;
        let held_back = usage.invalidating_mappings + usage.quarantined_mappings;
        let bytes = usage.bounce_used_bytes + usage.coherent_used_bytes + usage.quarantined_bytes;
        let listed = self.mappings as u64;
        (mapped + held_back).max(listed).max(u64::from(bytes > 0))
    }

    /// What is not as it was, by name.
    fn faults(&self, before: &Left) -> Vec<String> {
        let mut faults = Vec::new();
        let usage = &self.usage;
        if *usage != before.usage {
            faults.push(format!("the usage is {usage:?}, it was {:?}", before.usage));
        }
        for (what, left) in [
            ("mappings", self.mappings),
            ("sessions", self.sessions),
            ("memories", self.memories),
        ] {
            if left > 0 {
                faults.push(format!("{left} {what} are listed"));
            }
        }
        if self.counted != before.counted {
            faults.push(format!(
                "GetInfo counts {:?}, it was {:?}",
                self.counted, before.counted
            ));
        }
        faults
    }
}

/// Open files of the daemon, as the kernel says.
fn fds(node: &Node) -> anyhow::Result<u64> {
    let dir = fs::read_dir(format!("/proc/{}/fd", node.pid()))?;
    Ok(dir.count() as u64)
}
