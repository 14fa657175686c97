//! Where the daemon's log lines go: standard error, as text or JSON.

use std::io::IsTerminal;
use std::sync::OnceLock;

use tracing_subscriber::filter::{ParseError, Targets};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{Layer, Registry, fmt, reload};

use crate::config::{Log, LogFormat};

/// The levels of this process's log, to be changed.
static LEVELS: OnceLock<reload::Handle<Targets, Registry>> = OnceLock::new();

/// Can these levels be read?
///
/// # Errors
/// [`ParseError`] if not.
pub fn check(log: &Log) -> Result<(), ParseError> {
    log.level.parse::<Targets>().map(drop)
}

/// Installs the log for this process, panics included.
///
/// # Errors
/// [`ParseError`] if the levels cannot be read.
pub fn init(log: &Log) -> Result<(), ParseError> {
    let levels: Targets = log.level.parse()?;
    let (levels, handle) = reload::Layer::new(levels);
    let lines = match log.format {
        LogFormat::Text => fmt::layer()
            .with_writer(std::io::stderr)
            .with_ansi(colours())
            .boxed(),
        LogFormat::Json => fmt::layer().json().with_writer(std::io::stderr).boxed(),
    };
    tracing_subscriber::registry()
        .with(lines.with_filter(levels))
        .init();
    // There is one log in a process, and init() panics the second time.
    let _ = LEVELS.set(handle);
    std::panic::set_hook(Box::new(|panic| {
        let backtrace = std::backtrace::Backtrace::force_capture();
        tracing::error!(%panic, %backtrace, "a bug: a call panicked");
    }));
    Ok(())
}

/// From now on these levels. Does nothing for a process that has a log of its own.
///
/// # Errors
/// [`ParseError`] if the levels cannot be read; they stay then.
pub fn set_level(log: &Log) -> Result<(), ParseError> {
    let levels: Targets = log.level.parse()?;
    if let Some(handle) = LEVELS.get()
        && let Err(error) = handle.reload(levels)
    {
        tracing::error!(%error, "changing the levels of the log");
    }
    Ok(())
}

fn colours() -> bool {
    std::io::stderr().is_terminal()
        && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty())
}
