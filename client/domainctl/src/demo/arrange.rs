//! Arranges the demo: a daemon, a domain, the processes, and their end.

use std::fs::File;
use std::io::{self, IsTerminal};
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use clap::ValueEnum;
use domaind_client::{Client, v1};
use domaind_proto::names::DomainId;
use domaind_proto::paths::{RUNTIME_DIR_VAR, RuntimeDir};
use domaind_server::{Config, Daemon};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use tempfile::TempDir;
use tokio::io::{AsyncBufReadExt, BufReader, Lines};
use tokio::process::{Child, ChildStdout, Command};
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::timeout;

use super::board::board_bytes;
use super::driver::slots;
use super::notes::{Note, Outcome};
use super::report::Report;
use super::{DemoArgs, Way};
use crate::cli::{Format, Global};

const BOUNCE_BYTES: u64 = 64 << 20;
const COHERENT_BYTES: u64 = 16 << 20;
const GRANULE_BYTES: u64 = 4096;
/// When a device is gone the driver has so long to notice and to say so.
const NOTICE_LIMIT: Duration = Duration::from_secs(5);
/// A process that was told to stop has so long to do so.
const STOP_LIMIT: Duration = Duration::from_secs(10);

/// Runs the whole demo. Whatever happens, no process, no domain and no file of
/// it stays behind.
pub(crate) async fn run(args: &DemoArgs, global: &Global) -> anyhow::Result<Report> {
    let (input, input_bytes) = open(&args.file)?;
    let host = Host::find(global).await?;
    let moved = host
        .move_file(args, input, progress(input_bytes, global))
        .await;
    // Also when it failed, and that failure is the one to tell.
    let closed = host.close().await;
    let report = moved?;
    closed?;
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
    let quiet =
        !io::stderr().is_terminal() || !matches!(global.output, Format::Table | Format::Wide);
    let target = if quiet {
        ProgressDrawTarget::hidden()
    } else {
        ProgressDrawTarget::stderr()
    };
    let bar = ProgressBar::with_draw_target(len, target);
    let template = match len {
        Some(_) => "{bar:40} {bytes}/{total_bytes} {binary_bytes_per_sec} {eta}",
        None => "{spinner} {bytes} {binary_bytes_per_sec}",
    };
    match ProgressStyle::with_template(template) {
        Ok(style) => bar.with_style(style),
        Err(_) => bar,
    }
}

/// A daemon to run the demo on: one that is there, or our own.
struct Host {
    client: Client,
    domain: DomainId,
    own: Option<Own>,
}

/// A daemon inside of this process.
struct Own {
    daemon: Daemon,
    /// Its runtime directory; goes away with this.
    dir: TempDir,
}

impl Host {
    /// The daemon of `--runtime-dir` or `DOMAIND_RUNTIME_DIR`, else our own.
    async fn find(global: &Global) -> anyhow::Result<Host> {
        let variable = std::env::var_os(RUNTIME_DIR_VAR)
            .filter(|dir| !dir.is_empty())
            .map(PathBuf::from);
        if let Some(dir) = global.runtime_dir.clone().or(variable) {
            let client = Client::connect(&RuntimeDir::new(&dir)?).await?;
            let domain = DomainId::new(&format!("demo-{}", std::process::id()))?;
            return Ok(Host {
                client,
                domain,
                own: None,
            });
        }
        let (dir, runtime_dir) = temporary_runtime_dir()?;
        let daemon = Daemon::start(Config::for_runtime_dir(runtime_dir)).await?;
        let client = Client::connect(daemon.runtime_dir()).await?;
        Ok(Host {
            client,
            domain: DomainId::new("demo")?,
            own: Some(Own { daemon, dir }),
        })
    }

    async fn move_file(
        &self,
        args: &DemoArgs,
        input: Stdio,
        bar: ProgressBar,
    ) -> anyhow::Result<Report> {
        let domain = self.create_domain(args).await?;
        let mut cast = Cast::start(args, input, self).await?;
        let outcome = cast.watch(&bar).await;
        bar.finish_and_clear();
        let outcome = match outcome {
            Ok(outcome) => cast.leave(outcome).await?,
            Err(failure) => {
                cast.kill().await;
                return Err(failure);
            }
        };
        Ok(Report::new(args, &domain, outcome))
    }

    async fn create_domain(&self, args: &DemoArgs) -> anyhow::Result<v1::Domain> {
        let granules = args.block.div_ceil(GRANULE_BYTES) + 1;
        let bounce_bytes =
            slots(args.devices, args.block) * granules * GRANULE_BYTES + GRANULE_BYTES;
        let coherent_bytes = board_bytes(args.devices) + GRANULE_BYTES;
        let request = v1::CreateDomainRequest {
            domain_id: self.domain.to_string(),
            spec: Some(v1::DomainSpec {
                bounce_bytes: Some(bounce_bytes.max(BOUNCE_BYTES)),
                coherent_bytes: Some(coherent_bytes.max(COHERENT_BYTES)),
                ..v1::DomainSpec::default()
            }),
            validate_only: false,
        };
        let created = self.client.domains().create_domain(request).await;
        Ok(created.map_err(domaind_client::Error::from)?.into_inner())
    }

    async fn close(self) -> anyhow::Result<()> {
        let request = v1::DeleteDomainRequest {
            name: self.domain.name(),
            force: true,
            allow_missing: true,
        };
        let deleted = self.client.domains().delete_domain(request).await;
        drop(self.client);
        if let Some(Own { daemon, dir }) = self.own {
            daemon.stop().await;
            dir.close().context("removing the temporary directory")?;
        }
        deleted.map_err(domaind_client::Error::from)?;
        Ok(())
    }
}

/// A directory of our own. `TMPDIR` may be too long for the path of a socket.
fn temporary_runtime_dir() -> anyhow::Result<(TempDir, RuntimeDir)> {
    let places = [std::env::temp_dir(), "/tmp".into(), "/dev/shm".into()];
    let mut failure = None;
    for place in places {
        let made = tempfile::Builder::new()
            .prefix("domaind-demo-")
            .tempdir_in(place)
            .context("a temporary directory")
            .and_then(|dir| {
                let runtime_dir = RuntimeDir::new(dir.path())?;
                Ok((dir, runtime_dir))
            });
        match made {
            Ok(made) => return Ok(made),
            Err(error) => failure.get_or_insert(error),
        };
    }
    Err(failure.expect("there were places to try"))
}

/// The processes.
struct Cast {
    driver: Child,
    notes: Lines<BufReader<ChildStdout>>,
    devices: Vec<Child>,
}

impl Cast {
    /// Starts the driver, and the devices when it has laid out the rings.
    async fn start(args: &DemoArgs, input: Stdio, host: &Host) -> anyhow::Result<Cast> {
        let mut driver = actor("demo-driver", args.direction, host)?
            .args(["--devices", &args.devices.to_string()])
            .args(["--block", &args.block.to_string()])
            .stdin(input)
            .stdout(Stdio::piped())
            .spawn()
            .context("starting the driver")?;
        let stdout = driver.stdout.take().expect("it is piped");
        let notes = BufReader::new(stdout).lines();
        let mut cast = Cast {
            driver,
            notes,
            devices: Vec::new(),
        };
        let Some(Note::Board { iova }) = cast.note().await? else {
            return Err(cast.driver_failed().await);
        };
        for index in 0..args.devices {
            let device = actor("demo-device", args.direction, host)?
                .args(["--index", &index.to_string()])
                .args(["--board", &iova.to_string()])
                .stdin(Stdio::null())
                .stdout(Stdio::null())
                .spawn()
                .with_context(|| format!("starting device {index}"))?;
            cast.devices.push(device);
        }
        Ok(cast)
    }

    /// Follows the driver to its outcome.
    async fn watch(&mut self, bar: &ProgressBar) -> anyhow::Result<Outcome> {
        let mut interrupt = signal(SignalKind::interrupt())?;
        let mut terminate = signal(SignalKind::terminate())?;
        tokio::select! {
            outcome = follow(&mut self.notes, bar) => match outcome? {
                Some(outcome) => Ok(outcome),
                None => Err(driver_failed(&mut self.driver).await),
            },
            lost = first_end(&mut self.devices) => {
                // The driver says so itself; this is for one that cannot.
                let _ = timeout(NOTICE_LIMIT, self.driver.wait()).await;
                Err(lost)
            }
            _ = interrupt.recv() => bail!("interrupted"),
            _ = terminate.recv() => bail!("terminated"),
        }
    }

    /// Lets everybody go home.
    async fn leave(mut self, outcome: Outcome) -> anyhow::Result<Outcome> {
        let left = async {
            check("the driver", self.driver.wait().await?)?;
            for (index, device) in self.devices.iter_mut().enumerate() {
                check(&format!("device {index}"), device.wait().await?)?;
            }
            Ok(outcome)
        };
        let left = timeout(STOP_LIMIT, left).await;
        let result = left.unwrap_or_else(|_| bail!("a process did not stop within {STOP_LIMIT:?}"));
        if result.is_err() {
            self.kill().await;
        }
        result
    }

    /// Ends whoever is still there, and waits for it.
    async fn kill(mut self) {
        for child in self.devices.iter_mut().chain([&mut self.driver]) {
            // One that has ended already is no trouble.
            let _ = child.kill().await;
        }
    }

    async fn note(&mut self) -> anyhow::Result<Option<Note>> {
        next_note(&mut self.notes).await
    }

    async fn driver_failed(&mut self) -> anyhow::Error {
        driver_failed(&mut self.driver).await
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
async fn follow(
    notes: &mut Lines<BufReader<ChildStdout>>,
    bar: &ProgressBar,
) -> anyhow::Result<Option<Outcome>> {
    while let Some(note) = next_note(notes).await? {
        match note {
            Note::Progress { bytes } => bar.set_position(bytes),
            Note::Done(outcome) => return Ok(Some(outcome)),
            Note::Board { .. } => bail!("the driver laid out its rings twice"),
        }
    }
    Ok(None)
}

async fn next_note(notes: &mut Lines<BufReader<ChildStdout>>) -> anyhow::Result<Option<Note>> {
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
async fn first_end(devices: &mut [Child]) -> anyhow::Error {
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
