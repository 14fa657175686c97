//! `domaind`: the daemon's command line.

use std::process::ExitCode;

use anyhow::Context;
use clap::{Parser, Subcommand};
use domaind_server::config::{ConfigArgs, DEFAULT_CONFIG};
use domaind_server::{Daemon, logging};
use rustix::process::DumpableBehavior;
use tokio::signal::unix::{SignalKind, signal};

/// Owns IOVA domains and shares their memory between processes.
#[derive(Debug, Parser)]
#[command(version, arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Serve until SIGTERM or SIGINT
    Serve(ConfigArgs),
    /// Read the configuration as `serve` would, and say whether it is sound
    CheckConfig(ConfigArgs),
    /// Print a configuration file that says the defaults
    DefaultConfig,
    /// Print the version
    Version,
}

fn main() -> ExitCode {
    match run(Cli::parse().command) {
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
            println!("{:#?}", args.resolve()?);
            Ok(())
        }
        Command::DefaultConfig => {
            print!("{DEFAULT_CONFIG}");
            Ok(())
        }
        Command::Version => {
            println!("domaind {}", env!("CARGO_PKG_VERSION"));
            Ok(())
        }
    }
}

fn serve(args: &ConfigArgs) -> anyhow::Result<()> {
    let config = args.resolve()?;
    logging::init(&config.log).with_context(|| format!("log level {:?}", config.log.level))?;
    // Nobody of our uid may take our fds, which are the originals of all regions.
    rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable)
        .context("PR_SET_DUMPABLE")?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .context("the runtime")?;
    runtime.block_on(async {
        // Before the first socket is there: a stop is never lost.
        let mut terminate = signal(SignalKind::terminate())?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        let daemon = Daemon::start(config).await?;
        tokio::select! {
            _ = terminate.recv() => tracing::info!("SIGTERM: stopping"),
            _ = interrupt.recv() => tracing::info!("SIGINT: stopping"),
        }
        daemon.stop().await;
        Ok(())
    })
}
