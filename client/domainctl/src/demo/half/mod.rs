//! One half of the demo: a driver or a device of a domain that is there already,
//! for people and pods that start the other half somewhere else.
//!
//! The halves share nothing but the domain. A driver lays out a board in coherent
//! memory and puts a sign on it; devices look through the coherent mappings of the
//! domain for such signs ([`device`]), and take a seat. Both verify every block.
//! What is not there yet, or has gone away, is waited for.

mod device;
mod driver;
mod lines;
mod touch;

use std::cell::Cell;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Context;
use clap::{Args, ValueEnum};
use domain_core::region::Access;
use domain_core::session::Role;
use domaind_client::blocking::{Client, Session};
use domaind_proto::names::DomainId;
use domaind_proto::paths::RuntimeDir;
use domaind_proto::refusal::sentence;

use self::lines::{Line, Teller};
use super::DemoArgs;
use crate::cli::Global;
use crate::exit::Exit;
use crate::failure::Failure;
use crate::scoped::domain_id;
use crate::signals::Signals;
use crate::time::parse_duration;

/// The first pause after something was not there, and the longest.
const PAUSE: Duration = Duration::from_millis(100);
const PAUSE_MOST: Duration = Duration::from_secs(2);
/// How fast a half that was told to stop does so.
const STEP: Duration = Duration::from_millis(50);
/// A connection that breaks in the middle of a call is known to be the session's
/// end only a moment later.
const END_KNOWN_AFTER: Duration = Duration::from_millis(500);

/// What only halves are told.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "One half alone")]
pub(super) struct HalfArgs {
    /// Be this half, in a domain that exists; start the other one elsewhere
    #[arg(long, value_enum, requires = "domain")]
    pub(super) role: Option<Half>,
    /// The domain, which is left as it is found
    #[arg(long, value_name = "DOMAIN", value_parser = domain_id, requires = "role")]
    domain: Option<DomainId>,
    /// How long to wait for a daemon, a domain or another half that is not there
    /// (0: for ever)
    #[arg(long, value_name = "DURATION", default_value = "1m", value_parser = parse_duration, requires = "role")]
    wait: Duration,
    /// Pass the file again and again, and attach anew after a loss, until told to
    /// stop
    #[arg(long, requires = "role")]
    repeat: bool,
    /// With --repeat: the pause between passes
    #[arg(long, value_name = "DURATION", default_value = "1s", value_parser = parse_duration, requires = "repeat")]
    every: Duration,
    /// First touch every page of the domain's memory, which changes nothing
    #[arg(long, requires = "role")]
    touch: bool,
}

/// Which half.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum Half {
    /// Owns the bytes: maps them, and compares what comes back
    Driver,
    /// Checks and transforms them where they lie
    Device,
}

impl From<Half> for Role {
    fn from(half: Half) -> Role {
        match half {
            Half::Driver => Role::Driver,
            Half::Device => Role::Device,
        }
    }
}

/// Why a half does not go on as it was. The domain is as if it had never been.
#[derive(Debug, thiserror::Error)]
enum Setback {
    /// From outside, in order.
    #[error("told to stop")]
    Told,
    /// Waited for as long as may be.
    #[error("{what} within {limit:?} (--wait)")]
    GaveUp { what: String, limit: Duration },
    /// May be otherwise next time.
    #[error("{0}")]
    Passing(String),
}

/// Is this half until the other one is through, or until it is told to stop.
pub(super) async fn run(args: DemoArgs, global: &Global) -> Result<ExitCode, Failure> {
    // From the first moment: nobody interrupts before there is somebody to hear it.
    let mut signals = Signals::new().map_err(|error| Failure::of(Exit::Error, &error))?;
    let told = Arc::new(AtomicBool::new(false));
    let actor = Actor::new(args, global, Arc::clone(&told))?;
    let repeat = actor.repeat();
    let mut work = tokio::task::spawn_blocking(move || actor.run());
    let (done, signal) = tokio::select! {
        done = &mut work => (done, None),
        signal = signals.any() => {
            told.store(true, Ordering::Release);
            (work.await, Some(signal))
        }
    };
    done.map_err(|panic| Failure::of(Exit::Error, &panic))??;
    match signal {
        // A pass that was asked for has not come to its end.
        Some(signal) if !repeat => Err(Failure::new(Exit::Error, signal)),
        _ => Ok(Exit::Ok.into()),
    }
}

/// A half, and what it has to heed.
struct Actor {
    args: DemoArgs,
    half: Half,
    /// What the driver passes; a device has none.
    file: PathBuf,
    domain: DomainId,
    dir: RuntimeDir,
    teller: Teller,
    /// Somebody wants it to stop.
    told: Arc<AtomicBool>,
    /// Since when something has been missing.
    missing_since: Cell<Instant>,
    /// The other half was there once.
    has_met: Cell<bool>,
}

impl Actor {
    fn new(args: DemoArgs, global: &Global, told: Arc<AtomicBool>) -> Result<Actor, Failure> {
        let usage = |what: &str| Err(Failure::new(Exit::Usage, what));
        let (Some(half), Some(domain)) = (args.half.role, args.half.domain.clone()) else {
            return usage("--role and --domain belong together");
        };
        let file = match half {
            Half::Driver => args.file()?.to_owned(),
            Half::Device if args.file.is_some() => return usage("a device takes no FILE"),
            Half::Device if args.devices.is_some() => return usage("--devices is the driver's"),
            Half::Device => PathBuf::new(),
        };
        if file.as_os_str() == "-" && args.half.repeat {
            return usage("standard input cannot be passed again (--repeat)");
        }
        let dir = RuntimeDir::resolve(global.runtime_dir.as_deref());
        Ok(Actor {
            half,
            file,
            domain,
            dir: dir.map_err(|error| Failure::of(Exit::Usage, &error))?,
            teller: Teller::new(global.output)?,
            told,
            missing_since: Cell::new(Instant::now()),
            has_met: Cell::new(false),
            args,
        })
    }

    fn repeat(&self) -> bool {
        self.args.half.repeat
    }

    /// Attaches, and again when that or what followed from it has come to nothing.
    fn run(&self) -> Result<(), Failure> {
        let mut pause = PAUSE;
        let mut said = String::new();
        loop {
            let Err(error) = self.attempt() else {
                return Ok(());
            };
            let passing = match error.downcast_ref::<Setback>() {
                Some(Setback::Told) => return Ok(self.tell(&Line::Stopped)?),
                Some(Setback::GaveUp { .. }) => {
                    return Err(Failure::of(Exit::Unavailable, error.as_ref()));
                }
                Some(Setback::Passing(_)) => true,
                None => false,
            };
            // What was half way through is not begun anew in silence.
            if !passing || (self.has_met.get() && !self.repeat()) {
                return Err(error.into());
            }
            let why = sentence(error.as_ref());
            if self.is_patience_over() {
                return Err(Failure::new(
                    Exit::Unavailable,
                    self.gave_up(why).to_string(),
                ));
            }
            if said != why {
                self.tell(&Line::Lost { why: &why })?;
                said = why;
            }
            if self.has_met.replace(false) {
                (pause, said) = (PAUSE, String::new());
            }
            if self.sleep(pause).is_err() {
                return Ok(self.tell(&Line::Stopped)?);
            }
            pause = (pause * 2).min(PAUSE_MOST);
        }
    }

    /// One session, from its beginning to its end.
    fn attempt(&self) -> anyhow::Result<()> {
        let (client, session) = self.attach().map_err(passing)?;
        self.tell(&Line::Attached {
            domain: &self.domain.name(),
            session: &session.name(),
            half: self.half,
        })?;
        if self.args.half.touch {
            let bytes = touch::all(&session).map_err(|error| in_session(error, &session))?;
            self.tell(&Line::Touched { bytes })?;
        }
        let played = match self.half {
            Half::Driver => driver::play(self, &session),
            Half::Device => device::play(self, &session),
        };
        played.map_err(|error| in_session(error, &session))?;
        session.detach().map_err(passing)?;
        drop(client);
        Ok(())
    }

    fn attach(&self) -> Result<(Client, Session), domaind_client::Error> {
        let client = Client::connect(&self.dir)?;
        let session = client.attach(&self.domain, self.half.into(), Access::ReadWrite)?;
        Ok((client, session))
    }

    /// The other half is there.
    fn meets(&self) {
        self.has_met.set(true);
        self.still_there();
    }

    /// Nothing is missing just now.
    fn still_there(&self) {
        self.missing_since.set(Instant::now());
    }

    fn is_patience_over(&self) -> bool {
        let limit = self.args.half.wait;
        limit != Duration::ZERO && self.missing_since.get().elapsed() >= limit
    }

    fn gave_up(&self, what: String) -> Setback {
        let limit = self.args.half.wait;
        Setback::GaveUp { what, limit }
    }

    /// Whether to wait on for something that is not there.
    fn waits_on(&self, what: impl Fn() -> String) -> Result<(), Setback> {
        self.goes_on()?;
        match self.is_patience_over() {
            true => Err(self.gave_up(what())),
            false => Ok(()),
        }
    }

    /// Whether nobody has said to stop.
    fn goes_on(&self) -> Result<(), Setback> {
        match self.told.load(Ordering::Acquire) {
            true => Err(Setback::Told),
            false => Ok(()),
        }
    }

    fn sleep(&self, pause: Duration) -> Result<(), Setback> {
        let started = Instant::now();
        while started.elapsed() < pause {
            self.goes_on()?;
            thread::sleep(STEP.min(pause));
        }
        Ok(())
    }

    fn tell(&self, line: &Line<'_>) -> anyhow::Result<()> {
        self.teller.say(line).context("write to stdout")
    }
}

/// An error of the client, as one that may pass if it may.
fn passing(error: domaind_client::Error) -> anyhow::Error {
    let may_pass = matches!(
        error.code().map(Exit::from),
        // A daemon that starts, a domain that is declared later, and room that
        // somebody gives back.
        Some(Exit::Unavailable | Exit::NotFound | Exit::Conflict | Exit::Quota)
    );
    match may_pass {
        true => Setback::Passing(Failure::from(error).to_string()).into(),
        false => error.into(),
    }
}

/// What went wrong in a session: all is forgiven if the session has ended.
fn in_session(error: anyhow::Error, session: &Session) -> anyhow::Error {
    if error.is::<Setback>() {
        return error;
    }
    let error = match error.downcast::<domaind_client::Error>() {
        Ok(error) => passing(error),
        Err(error) => error,
    };
    if error.is::<Setback>() {
        return error;
    }
    let started = Instant::now();
    while started.elapsed() < END_KNOWN_AFTER {
        if let Some(ended) = session.is_ended() {
            return Setback::Passing(format!("the session has ended: {ended}")).into();
        }
        thread::sleep(STEP);
    }
    error
}
