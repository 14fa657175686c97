//! Arranges the demo: a daemon, a domain, the processes, and their end.

use std::fs::File;
use std::path::Path;
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use clap::ValueEnum;
use domaind_client::v1;
use domaind_proto::names::DomainId;
use indicatif::ProgressBar;
use tokio::io::{AsyncBufReadExt, BufReader, Lines};
use tokio::process::{Child, ChildStdout, Command};
use tokio::time::timeout;
use tonic::Code;

use super::board::board_bytes;
use super::mover::slots;
use super::notes::{Note, Outcome};
use super::report::Report;
use super::{DemoArgs, Way};
use crate::cli::Global;
use crate::host::Host;
use crate::progress;
use crate::signals::Signals;

const BOUNCE_BYTES: u64 = 64 << 20;
const COHERENT_BYTES: u64 = 16 << 20;
const GRANULE_BYTES: u64 = 4096;
/// When a device is gone the driver has so long to notice and to say so.
const NOTICE_LIMIT: Duration = Duration::from_secs(5);
/// A process that was told to stop has so long to do so.
const STOP_LIMIT: Duration = Duration::from_secs(10);

/// What the driver says, line by line.
type Notes = Lines<BufReader<ChildStdout>>;

/// Runs the whole demo. Whatever happens, no process, no domain and no file of
/// it stays behind.
pub(crate) async fn run(args: &DemoArgs, file: &Path, global: &Global) -> anyhow::Result<Report> {
    // From the first moment: nobody interrupts before there is somebody to clean up.
    let mut signals = Signals::new()?;
    let (input, input_bytes) = open(file)?;
    let bar = progress(input_bytes, global);
    let mut stage = Stage::default();
    let played = tokio::select! {
        // The children die of the same signal: its own name comes first.
        biased;
        signal = signals.any() => Err(anyhow::anyhow!("{signal}")),
        played = stage.play(args, global, input, &bar) => played,
    };
    bar.finish_and_clear();
    // Also when it failed, and that failure is the one to tell.
    let cleared = stage.clear().await;
    let report = played?;
    cleared?;
    Ok(report)
}

/// The file, and its length where it has one.
fn open(path: &Path) -> anyhow::Result<(Stdio, Option<u64>)> {
    if path == Path::new("-") {
        return Ok((Stdio::inherit(), None));
    }
    let opening = || format!("opening {}", path.display());
    let file = File::open(path).with_context(opening)?;
    let meta = file.metadata().with_context(opening)?;
    ensure!(!meta.is_dir(), "{} is a directory", path.display());
    let len = meta.is_file().then_some(meta.len());
    Ok((file.into(), len))
}

fn progress(len: Option<u64>, global: &Global) -> ProgressBar {
    let template = match len {
        Some(_) => "{bar:40} {bytes}/{total_bytes} {binary_bytes_per_sec} {eta}",
        None => "{spinner} {bytes} {binary_bytes_per_sec}",
    };
    progress::bar(len, template, global.output)
}

/// Everything that must be cleared away, however far it came.
#[derive(Default)]
struct Stage {
    host: Option<Host>,
    /// The domain is ours, or will be: to be deleted.
    owns_domain: bool,
    driver: Option<Child>,
    devices: Vec<Child>,
}

impl Stage {
    /// Cancelling leaves what [`clear`](Stage::clear) takes away.
    async fn play(
        &mut self,
        args: &DemoArgs,
        global: &Global,
        input: Stdio,
        bar: &ProgressBar,
    ) -> anyhow::Result<Report> {
        let host = self.host.insert(Host::find(global, "demo").await?);
        let client = host.client.clone();
        let request = create_request(args, &host.domain);
        self.owns_domain = true;
        let created = client.domains().create_domain(request).await;
        let domain = created.map_err(|status| {
            // It is somebody else's.
            self.owns_domain = status.code() != Code::AlreadyExists;
            domaind_client::Error::from(status)
        })?;
        let mut notes = self.start(args, input).await?;
        let outcome = self.watch(&mut notes, bar).await?;
        self.dismiss().await?;
        Ok(Report::new(args, domain.get_ref(), outcome))
    }

    /// Starts the driver, and the devices when it has laid out the rings.
    async fn start(&mut self, args: &DemoArgs, input: Stdio) -> anyhow::Result<Notes> {
        let host = self.host.as_ref().expect("found by play()");
        let driver = actor("demo-driver", args.direction, host)?
            .args(["--devices", &args.devices().to_string()])
            .args(["--block", &args.block.to_string()])
            .args(args.copying.calls.then_some("--calls"))
            .stdin(input)
            .stdout(Stdio::piped())
            .spawn()
            .context("starting the driver")?;
        let driver = self.driver.insert(driver);
        let stdout = driver.stdout.take().expect("it is piped");
        let mut notes = BufReader::new(stdout).lines();
        let Some(Note::Board { iova }) = next_note(&mut notes).await? else {
            return Err(driver_failed(driver).await);
        };
        for index in 0..args.devices() {
            let device = actor("demo-device", args.direction, host)?
                .args(["--index", &index.to_string()])
                .args(["--board", &iova.to_string()])
                .stdin(Stdio::null())
                .stdout(Stdio::null())
                .spawn()
                .with_context(|| format!("starting device {index}"))?;
            self.devices.push(device);
        }
        Ok(notes)
    }

    /// Follows the driver to its outcome.
    async fn watch(&mut self, notes: &mut Notes, bar: &ProgressBar) -> anyhow::Result<Outcome> {
        let driver = self.driver.as_mut().expect("started by play()");
        tokio::select! {
            outcome = follow(notes, bar) => match outcome? {
                Some(outcome) => Ok(outcome),
                None => Err(driver_failed(driver).await),
            },
            lost = first_failure(&mut self.devices) => {
                // The driver says so itself; this is for one that cannot.
                let _ = timeout(NOTICE_LIMIT, driver.wait()).await;
                Err(lost)
            }
        }
    }

    /// Lets everybody go home by themselves.
    async fn dismiss(&mut self) -> anyhow::Result<()> {
        let left = async {
            if let Some(driver) = &mut self.driver {
                check("the driver", driver.wait().await?)?;
            }
            for (index, device) in self.devices.iter_mut().enumerate() {
                check(&format!("device {index}"), device.wait().await?)?;
            }
            Ok(())
        };
        let left = timeout(STOP_LIMIT, left).await;
        left.unwrap_or_else(|_| bail!("a process did not stop within {STOP_LIMIT:?}"))
    }

    /// Ends whoever is still there, and takes everything away.
    async fn clear(mut self) -> anyhow::Result<()> {
        for child in self.devices.iter_mut().chain(&mut self.driver) {
            // One that has ended already is no trouble.
            let _ = child.kill().await;
        }
        match self.host {
            Some(host) => host.close(self.owns_domain).await,
            None => Ok(()),
        }
    }
}

fn create_request(args: &DemoArgs, domain: &DomainId) -> v1::CreateDomainRequest {
    // A block at an odd place may need a granule more than its length says.
    let granules = args.block.div_ceil(GRANULE_BYTES) + 1;
    let slots = slots(args.devices(), args.block) + 1;
    let bounce_bytes = slots * granules * GRANULE_BYTES;
    // Slots of a lease are up to a quarter longer than their blocks.
    let bounce_bytes = bounce_bytes + bounce_bytes / 4;
    let coherent_bytes = board_bytes(args.devices()) + GRANULE_BYTES;
    v1::CreateDomainRequest {
        domain_id: domain.to_string(),
        spec: Some(v1::DomainSpec {
            bounce_bytes: Some(bounce_bytes.max(BOUNCE_BYTES)),
            coherent_bytes: Some(coherent_bytes.max(COHERENT_BYTES)),
            ..v1::DomainSpec::default()
        }),
        validate_only: false,
        request_id: String::new(),
    }
}

/// One of the processes of the demo: this program again.
fn actor(command: &str, way: Way, host: &Host) -> anyhow::Result<Command> {
    let this = std::env::current_exe().context("finding this program")?;
    let way = way.to_possible_value().expect("every way has a name");
    let mut actor = Command::new(this);
    actor
        .arg(command)
        .arg("--dir")
        .arg(host.client.runtime_dir().path())
        .args(["--domain", &host.domain.name()])
        .args(["--parent", &std::process::id().to_string()])
        .args(["--direction", way.get_name()])
        .kill_on_drop(true);
    Ok(actor)
}

/// Reads what the driver says, up to its outcome; `None` if it says no more.
async fn follow(notes: &mut Notes, bar: &ProgressBar) -> anyhow::Result<Option<Outcome>> {
    while let Some(note) = next_note(notes).await? {
        match note {
            Note::Progress { bytes } => bar.set_position(bytes),
            Note::Done(outcome) => return Ok(Some(outcome)),
            Note::Board { .. } => bail!("the driver laid out its rings twice"),
        }
    }
    Ok(None)
}

async fn next_note(notes: &mut Notes) -> anyhow::Result<Option<Note>> {
    let line = notes.next_line().await.context("listening to the driver")?;
    line.map(|line| serde_json::from_str(&line).context("understanding the driver"))
        .transpose()
}

/// The driver has fallen silent: it has said why on standard error.
async fn driver_failed(driver: &mut Child) -> anyhow::Error {
    match timeout(STOP_LIMIT, driver.wait()).await {
        Ok(Ok(status)) => anyhow::anyhow!("the driver failed ({status})"),
        Ok(Err(error)) => anyhow::Error::new(error).context("waiting for the driver"),
        Err(_) => anyhow::anyhow!("the driver has closed its output and goes on"),
    }
}

/// Resolves when a device has failed. One that ends well has been told to.
async fn first_failure(devices: &mut [Child]) -> anyhow::Error {
    loop {
        for (index, device) in devices.iter_mut().enumerate() {
            let pid = device.id();
            match device.try_wait() {
                Ok(Some(status)) if !status.success() => {
                    let pid = pid.map_or_else(|| "unknown".to_owned(), |pid| pid.to_string());
                    return anyhow::anyhow!("device {index} (pid {pid}) has ended: {status}");
                }
                Ok(_) => {}
                Err(error) => return anyhow::Error::new(error).context("waiting for a device"),
            }
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

fn check(who: &str, status: ExitStatus) -> anyhow::Result<()> {
    ensure!(status.success(), "{who} failed ({status})");
    Ok(())
}
