//! `domainctl`: domaind at the command line.

mod bench;
mod cli;
mod commands;
mod context;
mod demo;
mod exit;
mod failure;
mod host;
mod output;
mod progress;
mod range;
mod scoped;
mod signals;
mod table_file;
mod time;

use std::io;
use std::process::ExitCode;

use clap::Parser;
use tokio::runtime::{Builder, Runtime};

use crate::cli::{Cli, Command};
use crate::exit::Exit;
use crate::failure::Failure;

fn main() -> ExitCode {
    let cli = Cli::parse();
    let verbose = cli.global.verbose;
    run(cli).unwrap_or_else(|failure| {
        failure.report(verbose);
        failure.exit().into()
    })
}

fn run(cli: Cli) -> Result<ExitCode, Failure> {
    let runtime = runtime(&cli.command)
        .map_err(|error| Failure::new(Exit::Error, format!("start the runtime: {error}")))?;
    runtime.block_on(commands::run(cli))
}

/// One call at a time needs one thread. These may have a daemon inside.
fn runtime(command: &Command) -> io::Result<Runtime> {
    match command {
        Command::Demo(_) | Command::Bench(_) => Builder::new_multi_thread().enable_all().build(),
        _ => Builder::new_current_thread().enable_all().build(),
    }
}
