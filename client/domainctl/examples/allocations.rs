//! How often the heap is asked in the steady state, by both sides of a mapping
//! together: a daemon and a driver in this one process, whose allocator counts.
//!
//! Prints one JSON object. A pair is a buffer that is mapped and unmapped again,
//! and so is an entry of a batch; `per_entry` is what one more of them in a batch
//! adds. Each number is the median of several windows, because tasks in the
//! background allocate now and then; before the first window everything is done
//! some thousand times.
//!
//! Pipelines are counted twice: with a client that does all on one thread, and
//! with one whose messages are written on other threads than they are made on.
//! The copies of a batch of 1024 are divided among threads, which costs some
//! allocations for each of them, whatever the number of entries; so that it is the
//! same everywhere all runs on two processors.

use std::alloc::System;
use std::hint::black_box;

use domain_core::batch::BatchMode;
use domain_core::limits::BATCH_ENTRIES;
use domain_core::perm::Direction;
use domain_core::region::Access;
use domain_core::session::Role;
use domain_core::streaming::{MapSpec, UnmapSpec};
use domaind_client::pool::{Bidirectional, FromDevice, Pool, PoolOptions, ToDevice};
use domaind_client::{Answer, Buffer, Client, Error, Pipeline, PipelineOptions, Session, v1};
use domaind_proto::names::DomainId;
use domaind_proto::paths::RuntimeDir;
use domaind_server::{Config, Daemon};
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
use serde::Serialize;
use stats_alloc::{INSTRUMENTED_SYSTEM, Region, StatsAlloc};
use tempfile::TempDir;
use tokio::runtime::{Builder, Runtime};
use tonic::transport::Channel;
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_client::HealthClient;

#[global_allocator]
static ALLOCATOR: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

const PROCESSORS: usize = 2;
/// Windows of which the median counts.
const WINDOWS: usize = 9;
/// Pairs of a window through a pool.
const LEASE_PAIRS: u32 = 10_000;
/// Calls of a window, of one kind.
const CALLS: u32 = 300;
/// Times that a window is run before anything is counted.
const WARM_UP: u32 = 10;
/// Batches of a window, and how many of them are in flight.
const BATCHES: u32 = 32;
const IN_FLIGHT: u32 = 8;
const FEW: usize = 64;
const BUFFER_BYTES: u64 = 64;
/// A granule for each entry in flight, and as much for those that have just ended.
const BOUNCE_BYTES: u64 = 2 * IN_FLIGHT as u64 * BATCH_ENTRIES as u64 * 4096;
const DOMAIN: &str = "allocations";
const MODE: BatchMode = BatchMode::AllOrNothing;

/// The object. Its keys are stable.
#[derive(Debug, Serialize)]
struct Report {
    lease: PerPair,
    pipeline: PerBatch,
    pipeline_on_one_thread: PerBatch,
    unary: PerCall,
}

/// Of one pair in leased memory.
#[derive(Debug, Serialize)]
struct PerPair {
    to_device: f64,
    from_device: f64,
    bidirectional: f64,
}

/// Of one batch that is mapped and unmapped: two messages, two answers.
#[derive(Debug, Serialize)]
struct PerBatch {
    per_batch_64: f64,
    per_batch_1024: f64,
    per_entry: f64,
}

#[derive(Debug, Serialize)]
struct PerCall {
    map: f64,
    unmap: f64,
    /// A health check: the least that any call costs.
    empty_call: f64,
}

fn main() -> anyhow::Result<()> {
    stay_on_few_processors()?;
    let host = Host::start()?;
    let one_thread = Builder::new_current_thread().enable_all().build()?;
    let threads = Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()?;
    let report = Report {
        lease: Driver::attach(&host, &one_thread)?.lease()?,
        pipeline: Driver::attach(&host, &threads)?.pipeline()?,
        pipeline_on_one_thread: Driver::attach(&host, &one_thread)?.pipeline()?,
        unary: Driver::attach(&host, &one_thread)?.unary()?,
    };
    host.stop()?;
    println!("{}", serde_json::to_string(&report)?);
    Ok(())
}

/// This thread and all that it starts.
fn stay_on_few_processors() -> anyhow::Result<()> {
    let allowed = sched_getaffinity(None)?;
    let mut few = CpuSet::new();
    let numbers = (0..CpuSet::MAX_CPU).filter(|number| allowed.is_set(*number));
    numbers.take(PROCESSORS).for_each(|number| few.set(number));
    Ok(sched_setaffinity(None, &few)?)
}

/// A daemon with a runtime of its own, as if it were another process.
struct Host {
    runtime: Runtime,
    daemon: Daemon,
    dir: TempDir,
}

impl Host {
    fn start() -> anyhow::Result<Host> {
        // Short enough for the path of a socket.
        let dir = tempfile::Builder::new()
            .prefix("domaind-a")
            .tempdir_in("/tmp")?;
        let runtime = Builder::new_multi_thread().enable_all().build()?;
        let config = Config::for_runtime_dir(RuntimeDir::new(dir.path())?);
        let daemon = runtime.block_on(Daemon::start(config))?;
        let host = Host {
            runtime,
            daemon,
            dir,
        };
        host.create_domain()?;
        Ok(host)
    }

    fn create_domain(&self) -> anyhow::Result<()> {
        let request = v1::CreateDomainRequest {
            domain_id: DOMAIN.to_owned(),
            spec: Some(v1::DomainSpec {
                bounce_bytes: Some(BOUNCE_BYTES),
                ..v1::DomainSpec::default()
            }),
            validate_only: false,
            request_id: String::new(),
        };
        self.runtime.block_on(async {
            let client = Client::connect(self.daemon.runtime_dir()).await?;
            client.domains().create_domain(request).await?;
            Ok(())
        })
    }

    fn stop(self) -> anyhow::Result<()> {
        self.runtime.block_on(self.daemon.stop());
        Ok(self.dir.close()?)
    }
}

/// A session, and memory that it maps.
struct Driver<'r> {
    buffer: Buffer,
    session: Session,
    health: HealthClient<Channel>,
    runtime: &'r Runtime,
}

impl Driver<'_> {
    fn attach<'r>(host: &Host, runtime: &'r Runtime) -> anyhow::Result<Driver<'r>> {
        runtime.block_on(async {
            let client = Client::connect(host.daemon.runtime_dir()).await?;
            let domain = DomainId::new(DOMAIN)?;
            let session = client.attach(&domain, Role::Driver, Access::ReadWrite);
            let session = session.await?;
            Ok(Driver {
                buffer: session.buffer(BUFFER_BYTES * BATCH_ENTRIES as u64).await?,
                session,
                health: HealthClient::new(client.channel()),
                runtime,
            })
        })
    }

    fn specs(&self, entries: usize) -> Vec<MapSpec> {
        let memory = self.buffer.memory().id();
        let spec = |entry| {
            let offset = entry * BUFFER_BYTES;
            MapSpec::new(memory, offset, BUFFER_BYTES, Direction::ToDevice)
        };
        (0..entries as u64).map(spec).collect()
    }

    // ---- Leases

    fn lease(self) -> anyhow::Result<PerPair> {
        let pool = self.session.pool(PoolOptions::default());
        let pool = self.runtime.block_on(pool)?;
        let mut bytes = vec![7; 1536];
        Ok(PerPair {
            to_device: pairs(|| bounce_to(&pool, &bytes))?,
            from_device: pairs(|| bounce_from(&pool, &mut bytes))?,
            bidirectional: pairs(|| bounce_both(&pool, &mut bytes))?,
        })
    }

    // ---- Pipelines

    fn pipeline(self) -> anyhow::Result<PerBatch> {
        let (few, many) = (self.batches(FEW)?, self.batches(BATCH_ENTRIES)?);
        Ok(PerBatch {
            per_batch_64: few,
            per_batch_1024: many,
            per_entry: (many - few) / (BATCH_ENTRIES - FEW) as f64,
        })
    }

    fn batches(&self, entries: usize) -> anyhow::Result<f64> {
        let specs = self.specs(entries);
        let mut unmaps = Vec::with_capacity(entries);
        let options = PipelineOptions {
            in_flight: IN_FLIGHT as usize,
        };
        let mut pipeline = self.runtime.block_on(self.session.pipeline(options))?;
        steady(BATCHES, || {
            self.runtime
                .block_on(batches(&mut pipeline, &specs, &mut unmaps))
        })
    }

    // ---- Calls

    fn unary(self) -> anyhow::Result<PerCall> {
        let spec = self.specs(1)[0];
        let mut mapped = Vec::with_capacity(CALLS as usize);
        let (mut maps, mut unmaps) = (Vec::new(), Vec::new());
        for window in 0..WINDOWS + WARM_UP as usize {
            let map = counted(|| self.map_all(spec, &mut mapped))?;
            let unmap = counted(|| self.unmap_all(&mut mapped))?;
            if window >= WARM_UP as usize {
                maps.push(map / f64::from(CALLS));
                unmaps.push(unmap / f64::from(CALLS));
            }
        }
        Ok(PerCall {
            map: median(maps),
            unmap: median(unmaps),
            empty_call: steady(CALLS, || self.check_all())?,
        })
    }

    fn map_all(&self, spec: MapSpec, mapped: &mut Vec<UnmapSpec>) -> anyhow::Result<()> {
        for _ in 0..CALLS {
            let mapping = self.runtime.block_on(self.session.map(spec))?;
            let (iova, id) = mapping.into_parts();
            mapped.push(UnmapSpec {
                iova,
                id,
                written_bytes: None,
                skip_sync: false,
            });
        }
        Ok(())
    }

    fn unmap_all(&self, mapped: &mut Vec<UnmapSpec>) -> anyhow::Result<()> {
        for spec in mapped.drain(..) {
            self.runtime.block_on(self.session.unmap(spec))?;
        }
        Ok(())
    }

    fn check_all(&self) -> anyhow::Result<()> {
        let mut health = self.health.clone();
        for _ in 0..CALLS {
            let asked = health.check(HealthCheckRequest::default());
            self.runtime.block_on(asked)?;
        }
        Ok(())
    }
}

fn bounce_to(pool: &Pool, bytes: &[u8]) -> anyhow::Result<()> {
    let mapping = pool.map(black_box(bytes), ToDevice).map_err(Error::from)?;
    black_box(mapping.iova());
    mapping.unmap().map_err(Error::from)?;
    Ok(())
}

fn bounce_from(pool: &Pool, bytes: &mut [u8]) -> anyhow::Result<()> {
    let len = bytes.len();
    let mapping = pool
        .map(black_box(bytes), FromDevice)
        .map_err(Error::from)?;
    black_box(mapping.iova());
    mapping.unmap(len).map_err(Error::from)?;
    Ok(())
}

fn bounce_both(pool: &Pool, bytes: &mut [u8]) -> anyhow::Result<()> {
    let mapping = pool
        .map(black_box(bytes), Bidirectional)
        .map_err(Error::from)?;
    black_box(mapping.iova());
    mapping.unmap().map_err(Error::from)?;
    Ok(())
}

fn pairs(mut one: impl FnMut() -> anyhow::Result<()>) -> anyhow::Result<f64> {
    steady(LEASE_PAIRS, || (0..LEASE_PAIRS).try_for_each(|_| one()))
}

/// All batches of a window: each that is mapped is unmapped, and at the end
/// nothing is in flight.
async fn batches(
    pipeline: &mut Pipeline,
    specs: &[MapSpec],
    unmaps: &mut Vec<UnmapSpec>,
) -> anyhow::Result<()> {
    let mut left = BATCHES - IN_FLIGHT;
    for _ in 0..IN_FLIGHT {
        pipeline.map(specs, MODE)?;
    }
    while let Some(answer) = pipeline.next().await? {
        match answer {
            Answer::Mapped(mapped) => {
                unmaps.clear();
                unmaps.extend(mapped.iter().flatten().map(|mapped| UnmapSpec {
                    iova: mapped.iova,
                    id: mapped.id,
                    written_bytes: None,
                    skip_sync: false,
                }));
                pipeline.unmap(unmaps, MODE)?;
            }
            Answer::Unmapped(_) if left > 0 => {
                left -= 1;
                pipeline.map(specs, MODE)?;
            }
            Answer::Unmapped(_) => {}
            other => anyhow::bail!("{other:?}"),
        }
    }
    Ok(())
}

/// Allocations for each of so many things that a window does, in the steady
/// state.
fn steady(things: u32, mut window: impl FnMut() -> anyhow::Result<()>) -> anyhow::Result<f64> {
    for _ in 0..WARM_UP {
        window()?;
    }
    let windows = (0..WINDOWS).map(|_| Ok(counted(&mut window)? / f64::from(things)));
    Ok(median(windows.collect::<anyhow::Result<_>>()?))
}

/// How often the heap was asked for memory, or for more of it.
fn counted(work: impl FnOnce() -> anyhow::Result<()>) -> anyhow::Result<f64> {
    let region = Region::new(ALLOCATOR);
    work()?;
    let change = region.change();
    Ok((change.allocations + change.reallocations) as f64)
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}
