//! `domaind`: the daemon's command line.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context;
use clap::{Args, Parser, Subcommand};
use domaind_proto::paths::{RUNTIME_DIR_VAR, RuntimeDir};
use domaind_server::config::{ConfigArgs, DEFAULT_CONFIG};
use domaind_server::passed::Passed;
use domaind_server::prepare_dir::{Owners, prepare};
use domaind_server::service_manager::ServiceManager;
use domaind_server::version::{self, VERSION};
use domaind_server::{Daemon, logging};
use rustix::process::{DumpableBehavior, Resource, Rlimit, getrlimit, setrlimit};
use tokio::signal::unix::{SignalKind, signal};

/// Threads that are still copying or zeroing have so long to come to their end.
const THREADS_LIMIT: Duration = Duration::from_secs(2);

/// Owns IOVA domains and shares their memory between processes. Without a
/// command it serves.
#[derive(Debug, Parser)]
#[command(version, args_conflicts_with_subcommands = true)]
struct Cli {
    #[command(flatten)]
    serve: ConfigArgs,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Serve until SIGTERM or SIGINT; read the configuration again at SIGHUP
    Serve(ConfigArgs),
    /// Read the configuration as `serve` would, and say whether it is sound
    CheckConfig(ConfigArgs),
    /// As root: make or mend the runtime directory for a daemon of another user
    PrepareDir(PrepareArgs),
    /// Print a configuration file that says the defaults
    DefaultConfig,
    /// Print the version
    Version,
}

#[derive(Debug, Args)]
struct PrepareArgs {
    /// Directory of the sockets [default: /run/domaind]
    #[arg(long, env = RUNTIME_DIR_VAR, value_name = "DIR")]
    runtime_dir: Option<PathBuf>,
    /// The daemon's user
    #[arg(long, value_name = "UID")]
    uid: u32,
    /// The daemon's group
    #[arg(long, value_name = "GID")]
    gid: u32,
    /// Group that may connect to the public sockets [default: the daemon's]
    #[arg(long, env = "DOMAIND_SERVER_CLIENT_GID", value_name = "GID")]
    client_gid: Option<u32>,
}

fn main() -> ExitCode {
    if let Some(commit) = option_env!("DOMAIND_COMMIT") {
        version::built_from(commit);
    }
    let Cli { serve, command } = Cli::parse();
    match run(command.unwrap_or(Command::Serve(serve))) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command) -> anyhow::Result<()> {
    match command {
        Command::Serve(args) => serve(&args),
        Command::CheckConfig(args) => {
            let config = args.resolve()?;
            logging::check(&config.log)
                .with_context(|| format!("log level {:?}", config.log.level))?;
            println!("{config:#?}");
            Ok(())
        }
        Command::PrepareDir(args) => prepare_dir(&args),
        Command::DefaultConfig => {
            print!("{DEFAULT_CONFIG}");
            Ok(())
        }
        Command::Version => {
            let commit = version::commit().map(|commit| format!(" ({commit})"));
            println!("domaind {VERSION}{}", commit.unwrap_or_default());
            Ok(())
        }
    }
}

fn prepare_dir(args: &PrepareArgs) -> anyhow::Result<()> {
    let dir = RuntimeDir::resolve(args.runtime_dir.as_deref())?;
    let owners = Owners {
        uid: args.uid,
        gid: args.gid,
        client_gid: args.client_gid.unwrap_or(args.gid),
    };
    for step in prepare(&dir, owners)? {
        println!("{step}");
    }
    Ok(())
}

fn serve(args: &ConfigArgs) -> anyhow::Result<()> {
    // While there are no other threads: it changes the environment.
    let passed = Passed::from_env()?;
    let manager = ServiceManager::from_env()?;
    let config = args.resolve()?;
    logging::init(&config.log).with_context(|| format!("log level {:?}", config.log.level))?;
    // Nobody of our uid may take our fds, which are the originals of all regions.
    rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable)
        .context("PR_SET_DUMPABLE")?;
    raise_fd_limit();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(config.worker_threads)
        .enable_all()
        .build()
        .context("the runtime")?;
    let served = runtime.block_on(async {
        // Before the first socket is there: a stop is never lost.
        let mut terminate = signal(SignalKind::terminate())?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        // Would end the process otherwise.
        let mut hangup = signal(SignalKind::hangup())?;
        let mut daemon = Daemon::start_with(config, passed).await?;
        manager.ready().await;
        let mut attending = manager.attend(daemon.pulse());
        loop {
            tokio::select! {
                socket = daemon.failed() => anyhow::bail!("the daemon no longer serves its {socket} socket"),
                _ = terminate.recv() => tracing::info!("SIGTERM: stopping"),
                _ = interrupt.recv() => tracing::info!("SIGINT: stopping"),
                _ = hangup.recv() => {
                    tracing::info!("SIGHUP: reloading");
                    manager.reloading().await;
                    // What came of it is in the log.
                    let _ = daemon.reload().await;
                    manager.ready().await;
                    continue;
                }
            }
            break;
        }
        attending.stopping().await;
        daemon.stop().await;
        Ok(())
    });
    // A thread that is stuck in a client's file must not keep us.
    runtime.shutdown_timeout(THREADS_LIMIT);
    served
}

/// Sessions, connections and registered memory hold an fd each; the soft limit
/// is often 1024. Where it cannot be raised, clients run into it earlier.
fn raise_fd_limit() {
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit {
        current: limit.maximum,
        ..limit
    };
    if let Err(cause) = setrlimit(Resource::Nofile, raised) {
        tracing::warn!(%cause, ?limit, "cannot raise the limit of file descriptors");
    }
}
