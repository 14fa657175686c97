//! The commands, one a file.

mod alloc;
mod completion;
mod create;
mod delete;
mod describe;
mod driver;
mod evict;
mod get;
mod health;
mod info;
mod map;
mod pages;
mod reload;
mod reset_bounce;
mod set_map;
mod target;
mod translate;
mod unmap;
mod update;
mod version;
mod watch;

use std::fmt::Display;
use std::process::ExitCode;

use crate::bench;
use crate::cli::{Cli, Command};
use crate::context::Context;
use crate::demo;
use crate::exit::Exit;
use crate::failure::Failure;

/// Does what was typed, and says how the program ends.
pub(crate) async fn run(cli: Cli) -> Result<ExitCode, Failure> {
    let Cli { global, command } = cli;
    match command {
        Command::Demo(args) => demo::run(args, &global).await,
        Command::Bench(args) => bench::run(args, &global).await,
        Command::DemoDriver(args) => demo::driver(args).await,
        Command::DemoDevice(args) => demo::device(args).await,
        command => {
            let mut context = Context::new(global);
            let exit = dispatch(command, &mut context).await?;
            context.finish()?;
            Ok(exit.into())
        }
    }
}

async fn dispatch(command: Command, context: &mut Context) -> Result<Exit, Failure> {
    match command {
        Command::Create(what) => create::run(what, context).await,
        Command::Get(what) => get::run(what, context).await,
        Command::Describe(what) => describe::run(what, context).await,
        Command::Watch(what) => watch::run(what, context).await,
        Command::Update(what) => update::run(what, context).await,
        Command::Delete(what) => delete::run(what, context).await,
        Command::Evict(args) => evict::run(args, context).await,
        Command::Alloc(args) => alloc::alloc(args, context).await,
        Command::Free(args) => alloc::free(args, context).await,
        Command::Map(args) => map::run(args, context).await,
        Command::Unmap(args) => unmap::unmap(args, context).await,
        Command::SetMap(args) => set_map::run(args, context).await,
        Command::ClearMap(args) => unmap::clear(args, context).await,
        Command::ResetBounce(args) => reset_bounce::run(args, context).await,
        Command::Translate(args) => translate::translate(args, context).await,
        Command::Lookup(args) => translate::lookup(args, context).await,
        Command::Health(args) => health::run(args, context).await,
        Command::Info => info::run(context).await,
        Command::Reload => reload::run(context).await,
        Command::Version(args) => version::run(args, context).await,
        Command::Completion(args) => completion::run(&args, context),
        Command::Demo(_) | Command::Bench(_) | Command::DemoDriver(_) | Command::DemoDevice(_) => {
            unreachable!("run() has taken it")
        }
    }
}

/// Does the same for each name: one that fails is reported, the others are
/// done all the same, and the first failure decides how the program ends.
async fn each<T: Display>(
    names: Vec<T>,
    context: &mut Context,
    mut work: impl AsyncFnMut(T, &mut Context) -> Result<(), Failure>,
) -> Exit {
    let mut exit = Exit::Ok;
    let several = names.len() > 1;
    for name in names {
        let title = several.then(|| name.to_string());
        let Err(failure) = work(name, context).await else {
            continue;
        };
        let failure = failure.about(title);
        context.report(&failure);
        if exit == Exit::Ok {
            exit = failure.exit();
        }
    }
    exit
}
