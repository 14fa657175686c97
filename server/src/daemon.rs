//! One running daemon: starts everything, stops everything.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use domain_core::aperture::{POISON, ScrubWith};
use domain_core::limits::{FD_CONNECTIONS_PER_USER, GRPC_CONNECTIONS_PER_USER};
use domaind_proto::paths::RuntimeDir;
use domaind_proto::v1::EndReason;
use rustix::rand::{GetRandomFlags, getrandom};
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;
use tonic_health::ServingStatus;
use tonic_health::server::HealthReporter;

use crate::accept::{Acceptor, Seats};
use crate::budget::Limits;
use crate::config::Config;
use crate::declared::{self, Declared};
use crate::fdsock::FdSocket;
use crate::features::Features;
use crate::grpc::{self, Identity, Queues, Services};
use crate::hosted::now_unix_ms;
use crate::http::{Http, HttpError, Pages};
use crate::passed::{Passed, Which};
use crate::probes::{Probes, Stage};
use crate::proc;
use crate::pulse::Pulse;
use crate::queue::Queue;
use crate::registry::{Door, Registry};
use crate::reload::{ReloadError, Reloader};
use crate::sockets::{Bound, Claim, Served, SocketError};
use crate::terms::InForce;

/// Calls and sessions that are under way have so long to come to their end.
const STOP_LIMIT: Duration = Duration::from_secs(10);

/// The service that health checks ask for by name; "" is the daemon as a whole.
const HEALTH_NAMES: [&str; 2] = ["", "domaind.v1.DomainService"];

/// A running daemon. It serves from the moment it is started.
///
/// Dropping it without [`stop`](Daemon::stop) ends it at once: sockets go,
/// calls are cut off, sessions end.
#[derive(Debug)]
pub struct Daemon {
    config: Config,
    registry: Arc<Registry>,
    reloader: Arc<Reloader>,
    health: HealthReporter,
    stop: CancellationToken,
    /// Each answers which socket it has served.
    tasks: JoinSet<&'static str>,
    pulse: Arc<Pulse>,
    _beating: AbortOnDropHandle<()>,
    probes: Arc<Probes>,
    /// Until nothing else is left: a daemon that stops is asked, too.
    _http: Option<Http>,
    // The names go before the lock does.
    bound: Vec<Bound>,
    claim: Claim,
}

/// Why the daemon did not start. Nothing is left behind.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)] // the messages are the docs
pub enum StartError {
    #[error(transparent)]
    Socket(#[from] SocketError),
    #[error(transparent)]
    Http(#[from] HttpError),
    #[error("listening")]
    Listen(#[source] io::Error),
    #[error("no randomness for the daemon's instance")]
    Randomness(#[source] io::Error),
    #[error(transparent)]
    Domain(Box<dyn std::error::Error + Send + Sync>),
}

impl Daemon {
    /// Makes the runtime directory, binds the sockets and serves them. Must be
    /// called inside a tokio runtime, which should have several threads.
    ///
    /// # Errors
    /// [`StartError`], for instance when another daemon serves the directory.
    pub async fn start(config: Config) -> Result<Daemon, StartError> {
        Daemon::start_with(config, Passed::default()).await
    }

    /// The same with sockets that a service manager has bound already.
    ///
    /// # Errors
    /// [`StartError`], also when one of them is none of ours.
    pub async fn start_with(config: Config, passed: Passed) -> Result<Daemon, StartError> {
        let features = Features::probe();
        let claim = Claim::take(&config.runtime_dir, config.client_gid, passed)?;
        let stop = CancellationToken::new();
        let registry = Arc::new(Registry::new(limits(&config), scrub_with(&config)));
        declare(&registry, config.domains.clone()).await?;
        let identity = Arc::new(Identity {
            instance: instance().map_err(StartError::Randomness)?,
            start_time_unix_ms: now_unix_ms(),
            runtime_dir: config.runtime_dir.clone(),
            features,
            poison: config.poison,
        });
        let health = HealthReporter::new();
        for name in HEALTH_NAMES {
            health
                .set_service_status(name, ServingStatus::Serving)
                .await;
        }
        let pulse = Arc::new(Pulse::new(Arc::clone(&registry)));
        let beating = tokio::spawn(Arc::clone(&pulse).go_on());
        let probes = Arc::new(Probes::new(Arc::clone(&pulse), Arc::clone(&registry)));
        let http = Http::start(
            &config.metrics_listen,
            &config.runtime_dir.public(),
            Arc::clone(&probes) as Arc<dyn Pages>,
        )?;
        let terms = InForce::new(config.terms());
        let reloader = Reloader::new(Arc::clone(&registry), terms.clone(), config.clone());
        let reloader = Arc::new(reloader);
        let mut daemon = Daemon {
            probes,
            _http: http,
            pulse,
            _beating: AbortOnDropHandle::new(beating),
            registry: Arc::clone(&registry),
            reloader: Arc::clone(&reloader),
            health: health.clone(),
            stop,
            tasks: JoinSet::new(),
            bound: Vec::new(),
            claim,
            config,
        };
        let services = Services {
            registry,
            terms: terms.clone(),
            reloader,
            queues: Queues {
                large_calls: Queue::of_large_calls(),
                table_streams: Queue::of_table_streams(),
            },
            identity: Arc::clone(&identity),
            health,
        };
        daemon.serve_fd(&identity, terms, features)?;
        daemon.serve_grpc(&services, Door::Admin, features)?;
        daemon.serve_grpc(&services, Door::Public, features)?;
        daemon.probes.enter(Stage::Serving);
        tracing::info!(dir = ?daemon.config.runtime_dir.path(), instance = identity.instance, ?features, "serving");
        Ok(daemon)
    }

    /// Where its sockets are.
    #[must_use]
    pub fn runtime_dir(&self) -> &RuntimeDir {
        &self.config.runtime_dir
    }

    /// Its signs of life.
    #[must_use]
    pub fn pulse(&self) -> Arc<Pulse> {
        Arc::clone(&self.pulse)
    }

    /// Reads the configuration again and puts into force what can be without a
    /// restart. What came of it is in the log. Cancelling leaves it to come to its
    /// end.
    ///
    /// # Errors
    /// [`ReloadError`]; then all is as it was.
    ///
    /// # Panics
    /// If reloading does, which is a bug.
    pub async fn reload(&self) -> Result<(), ReloadError> {
        let reloader = Arc::clone(&self.reloader);
        let reloaded = tokio::task::spawn_blocking(move || reloader.reload().map(drop)).await;
        reloaded.unwrap_or_else(|panicked| panic!("{panicked}"))
    }

    /// Waits until a socket is no longer served, which is a bug, and names it.
    /// Cancel safe.
    pub async fn failed(&mut self) -> &'static str {
        match self.tasks.join_next().await {
            Some(Ok(socket)) => socket,
            Some(Err(panicked)) => {
                tracing::error!(%panicked, "serving a socket");
                "unknown"
            }
            None => std::future::pending().await,
        }
    }

    /// Stops in order: says NOT_SERVING, takes the sockets away, ends the
    /// sessions, lets calls under way come to their end, for at most ten
    /// seconds. Streams end; who does not read that is not waited for.
    /// Everything that the domains held is gone then.
    pub async fn stop(mut self) {
        self.probes.enter(Stage::Stopping);
        for name in HEALTH_NAMES {
            self.health
                .set_service_status(name, ServingStatus::NotServing)
                .await;
        }
        self.bound.clear();
        for name in HEALTH_NAMES {
            // Ends the streams that watch it, behind their NOT_SERVING.
            self.health.clear_service_status(name).await;
        }
        self.stop.cancel();
        self.registry.end_all(EndReason::Shutdown);
        let ended = timeout(STOP_LIMIT, async {
            while self.tasks.join_next().await.is_some() {}
        })
        .await;
        if ended.is_err() {
            tracing::warn!(limit = ?STOP_LIMIT, "calls or sessions did not end in time");
        }
        tracing::info!("stopped");
    }

    fn serve_fd(
        &mut self,
        identity: &Identity,
        terms: InForce,
        features: Features,
    ) -> Result<(), StartError> {
        let Served { listener, bound } = self.claim.serve(Which::Fd)?;
        let seats = Seats::new(FD_CONNECTIONS_PER_USER);
        let acceptor = Acceptor::new(listener, Door::Public, features, seats, self.stop.clone());
        let socket = Arc::new(FdSocket {
            registry: Arc::clone(&self.registry),
            terms,
            instance: identity.instance.clone(),
            stop: self.stop.clone(),
        });
        let serving = socket.run(acceptor.map_err(StartError::Listen)?);
        self.tasks.spawn(async move {
            serving.await;
            "fd"
        });
        self.bound.extend(bound);
        Ok(())
    }

    fn serve_grpc(
        &mut self,
        services: &Services,
        door: Door,
        features: Features,
    ) -> Result<(), StartError> {
        let Served { listener, bound } = self.claim.serve(match door {
            Door::Public => Which::Api,
            Door::Admin => Which::Admin,
        })?;
        let seats = Seats::new(GRPC_CONNECTIONS_PER_USER);
        let acceptor = Acceptor::new(listener, door, features, seats, self.stop.clone());
        let serving = grpc::serve(
            services.clone(),
            acceptor.map_err(StartError::Listen)?,
            door,
            self.stop.clone(),
        );
        self.tasks.spawn(async move {
            if let Err(error) = serving.await {
                tracing::error!(?door, %error, "serving gRPC");
            }
            match door {
                Door::Public => "api",
                Door::Admin => "admin",
            }
        });
        self.bound.extend(bound);
        Ok(())
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

/// Makes the domains of the configuration file. It takes long, and whoever has
/// nothing to connect to yet waits for it.
async fn declare(registry: &Arc<Registry>, domains: Vec<Declared>) -> Result<(), StartError> {
    let registry = Arc::clone(registry);
    let make = move || declared::make_all(&registry, &domains);
    let made = tokio::task::spawn_blocking(make).await;
    let made = made.map_err(|panicked| StartError::Domain(Box::new(panicked)))?;
    made.map_err(|not_made| StartError::Domain(Box::new(not_made)))
}

fn limits(config: &Config) -> Limits {
    let limits = Limits::within(config.region_bytes, proc::memory_bytes());
    let Limits {
        all_bytes,
        ordinary_bytes,
    } = limits;
    if all_bytes > ordinary_bytes {
        tracing::warn!(
            "limits.region_bytes is {all_bytes}, and the memory of this process (machine or cgroup) has room for \
             {ordinary_bytes} bytes of ordinary pages: more of them than that is refused, huge pages are not"
        );
    }
    limits
}

fn scrub_with(config: &Config) -> ScrubWith {
    if config.poison {
        tracing::warn!("for tests: freed memory is overwritten with {POISON:#x}, not with zeroes");
        return ScrubWith::Poison;
    }
    ScrubWith::Zero
}

/// Sixteen random hexadecimal digits.
fn instance() -> io::Result<String> {
    let mut bytes = [0u8; 8];
    getrandom(&mut bytes, GetRandomFlags::empty())?;
    Ok(format!("{:016x}", u64::from_be_bytes(bytes)))
}
