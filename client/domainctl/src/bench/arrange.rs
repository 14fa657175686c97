//! Arranges a measurement: a daemon, a domain, the threads, and their end.

use std::sync::Arc;
use std::thread;
use std::time::Duration;

use anyhow::{Context, bail};
use domaind_client::{Error, v1};
use indicatif::ProgressBar;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio::time::{interval, timeout};
use tonic::{Code, Status};

use super::party::Place;
use super::report::Report;
use super::turns::{Measured, Watch, measure};
use super::{BenchArgs, COHERENT_BYTES};
use crate::cli::Global;
use crate::failure::remark;
use crate::host::Host;
use crate::progress;
use crate::signals::Signals;

/// Whoever was told to stop has so long to do so, and the daemon to take the
/// domain away.
const STOP_LIMIT: Duration = Duration::from_secs(10);
const PROGRESS_EVERY: Duration = Duration::from_millis(100);

/// Measures. Whatever happens, no domain and no file of it stays behind.
pub(super) async fn run(args: &BenchArgs, global: &Global) -> anyhow::Result<Report> {
    // From the first moment: nobody interrupts before there is somebody to clean up.
    let mut signals = Signals::new()?;
    let bar = progress(args, global);
    let mut stage = Stage::default();
    let played = tokio::select! {
        biased;
        signal = signals.any() => Err(anyhow::anyhow!("{signal}")),
        played = stage.play(args, global, &bar) => played,
    };
    bar.finish_and_clear();
    // Also when it failed, and that failure is the one to tell.
    let cleared = stage.clear().await;
    let report = played?;
    cleared?;
    Ok(report)
}

fn progress(args: &BenchArgs, global: &Global) -> ProgressBar {
    let template = "{bar:40} {elapsed} of {msg}";
    let bar = progress::bar(Some(millis(args.seconds)), template, global.output);
    bar.with_message(format!("{:?}", args.seconds))
}

/// Everything that must be cleared away, however far it came.
#[derive(Default)]
struct Stage {
    host: Option<Host>,
    /// The call that makes the domain: never cancelled, or the daemon might
    /// create it when it has been deleted already.
    creating: Option<JoinHandle<Result<(), Status>>>,
    /// The domain is ours, or will be: to be deleted.
    owns_domain: bool,
    crew: Option<Crew>,
}

/// The threads at work.
struct Crew {
    watch: Arc<Watch>,
    done: oneshot::Receiver<anyhow::Result<Measured>>,
}

impl Stage {
    /// Cancelling leaves what [`clear`](Stage::clear) takes away.
    async fn play(
        &mut self,
        args: &BenchArgs,
        global: &Global,
        bar: &ProgressBar,
    ) -> anyhow::Result<Report> {
        let host = self.host.insert(find(global).await?);
        let daemon = whose(host);
        remark(&format!("measuring against {daemon}"));
        let place = Place {
            dir: host.client.runtime_dir().clone(),
            domain: host.domain.clone(),
            threads: usize::try_from(args.threads)?,
            size_bytes: args.size,
        };
        self.create_domain(args).await?;
        let crew = self.crew.insert(Crew::start(args, place)?);
        let measured = crew.follow(bar).await;
        self.crew = None;
        Ok(Report::new(args, daemon, &measured?))
    }

    async fn create_domain(&mut self, args: &BenchArgs) -> anyhow::Result<()> {
        let host = self.host.as_ref().expect("found by play()");
        let mut domains = host.client.domains();
        let request = create_request(args, host);
        self.owns_domain = true;
        let creating =
            tokio::spawn(async move { domains.create_domain(request).await.map(|_| ()) });
        let created = self.creating.insert(creating).await;
        self.creating = None;
        created?.map_err(|status| {
            // It is somebody else's.
            self.owns_domain = status.code() != Code::AlreadyExists;
            Error::from(status).into()
        })
    }

    /// Ends whoever is still at work, and takes everything away.
    async fn clear(mut self) -> anyhow::Result<()> {
        if let Some(crew) = &mut self.crew {
            crew.watch.stop();
            // One that hangs in a call ends with this process.
            let _ = timeout(STOP_LIMIT, &mut crew.done).await;
        }
        if let Some(creating) = self.creating {
            let _ = timeout(STOP_LIMIT, creating).await;
        }
        let Some(host) = self.host else { return Ok(()) };
        let name = host.domain.name();
        let closed = timeout(STOP_LIMIT, host.close(self.owns_domain)).await;
        closed.unwrap_or_else(|_| bail!("the daemon did not delete {name} within {STOP_LIMIT:?}"))
    }
}

impl Crew {
    /// On threads of their own: that one may hang must keep nobody from
    /// clearing up.
    fn start(args: &BenchArgs, place: Place) -> anyhow::Result<Crew> {
        let (scenario, length) = (args.scenario, args.seconds);
        let watch = Arc::new(Watch::default());
        let (tell, done) = oneshot::channel();
        let watched = Arc::clone(&watch);
        let work = move || {
            let crew = scenario.crew(&place);
            let measured = crew.and_then(|crew| measure(crew, length, &watched));
            let _ = tell.send(measured);
        };
        thread::Builder::new().spawn(work)?;
        Ok(Crew { watch, done })
    }

    /// Waits for what it measures.
    async fn follow(&mut self, bar: &ProgressBar) -> anyhow::Result<Measured> {
        let mut tick = interval(PROGRESS_EVERY);
        loop {
            tokio::select! {
                done = &mut self.done => return done.context("a thread of the bench panicked")?,
                _ = tick.tick() => bar.set_position(millis(self.watch.elapsed())),
            }
        }
    }
}

/// The daemon that was named, or one of our own. What a variable names need not
/// be there; an option is meant.
async fn find(global: &Global) -> anyhow::Result<Host> {
    match Host::find(global, "bench").await {
        Err(error) if global.runtime_dir.is_none() && is_no_daemon(&error) => {
            Host::embedded("bench").await
        }
        found => found,
    }
}

fn is_no_daemon(error: &anyhow::Error) -> bool {
    matches!(error.downcast_ref(), Some(Error::NoDaemon { .. }))
}

fn whose(host: &Host) -> String {
    match host.is_embedded() {
        true => "a daemon inside of this process".to_owned(),
        false => format!(
            "the daemon in {}",
            host.client.runtime_dir().path().display()
        ),
    }
}

fn create_request(args: &BenchArgs, host: &Host) -> v1::CreateDomainRequest {
    let bounce_bytes = (args.scenario.facts().bounce_bytes)(args.threads, args.size);
    v1::CreateDomainRequest {
        domain_id: host.domain.to_string(),
        spec: Some(v1::DomainSpec {
            bounce_bytes: Some(bounce_bytes),
            coherent_bytes: Some(COHERENT_BYTES),
            ..v1::DomainSpec::default()
        }),
        validate_only: false,
        request_id: String::new(),
    }
}

fn millis(length: Duration) -> u64 {
    u64::try_from(length.as_millis()).unwrap_or(u64::MAX)
}
