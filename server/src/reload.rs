//! The configuration read once more while the daemon runs: what of it comes into
//! force, and what has to wait for a restart.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use domaind_proto::convert::count;
use domaind_proto::names::{DomainId, session_name};
use domaind_proto::refusal::sentence;
use domaind_proto::v1::{self, ErrorReason, Refusal};
use tonic::Code;
use tracing_subscriber::filter::ParseError;

use crate::budget::Limits;
use crate::config::{Config, ConfigError, Setting};
use crate::declared::{self, Reconciled};
use crate::live::Live;
use crate::logging;
use crate::proc;
use crate::registry::Registry;
use crate::terms::InForce;
use crate::visitor::Visitor;

/// Sessions that an answer names at most; the log names all.
const NAMED: usize = 1000;

/// Reads the configuration again.
#[derive(Debug)]
pub(crate) struct Reloader {
    registry: Arc<Registry>,
    terms: InForce,
    /// What is in force. Held for a whole reload: one after the other.
    config: Mutex<Config>,
}

/// What a reload has changed, and what it could not.
#[derive(Debug)]
pub(crate) struct Reloaded {
    /// In force now.
    applied: Vec<Change>,
    /// Not in force: the daemon has to be started again.
    restart_required: Vec<Change>,
    domains: Reconciled,
    /// Sessions that would not be let in any more, and why. They stay.
    unwelcome: Vec<(Arc<Live>, Refusal)>,
}

/// A setting that is not what it was.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Change {
    key: &'static str,
    from: String,
    to: String,
}

/// Why nothing was changed at all.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)] // the messages are the docs
pub enum ReloadError {
    #[error("this daemon is embedded in a program and has no configuration to read again")]
    NoSource,
    #[error("the configuration is not good, all stays as it was")]
    Config(#[from] ConfigError),
    #[error("the configuration is not good, all stays as it was: log.level is {level:?}")]
    Level {
        level: String,
        #[source]
        cause: ParseError,
    },
}

impl Reloader {
    pub(crate) fn new(registry: Arc<Registry>, terms: InForce, config: Config) -> Reloader {
        Reloader {
            registry,
            terms,
            config: Mutex::new(config),
        }
    }

    /// May take long: domains are made. Not to be called on a worker.
    ///
    /// # Errors
    /// [`ReloadError`]; then all is as it was.
    pub(crate) fn reload(&self) -> Result<Reloaded, ReloadError> {
        let mut in_force = self.config.lock().unwrap_or_else(PoisonError::into_inner);
        let read = in_force.read_again();
        let reloaded = read.and_then(|new| self.apply(&mut in_force, new));
        match &reloaded {
            Ok(reloaded) => reloaded.log(),
            Err(error) => tracing::error!(error = sentence(error), "reloading the configuration"),
        }
        reloaded
    }

    fn apply(&self, in_force: &mut Config, new: Config) -> Result<Reloaded, ReloadError> {
        logging::set_level(&new.log).map_err(|cause| ReloadError::Level {
            level: new.log.level.clone(),
            cause,
        })?;
        // From here on nothing fails as a whole.
        let applied = changes(&in_force.reloadable(), &new.reloadable());
        let restart_required = changes(&in_force.fixed(), &new.fixed());
        let limits = Limits::within(new.region_bytes, proc::memory_bytes());
        self.registry.set_limits(limits);
        self.terms.set(new.terms());
        let domains = declared::reconcile(&self.registry, &new.domains);
        in_force.take_over(new);
        Ok(Reloaded {
            applied,
            restart_required,
            domains,
            unwelcome: self.unwelcome(),
        })
    }

    fn unwelcome(&self) -> Vec<(Arc<Live>, Refusal)> {
        let terms = self.terms.get();
        let refused = |live: Arc<Live>| {
            let refusal = Visitor::check_attached(&live, &terms).err()?;
            Some((live, refusal))
        };
        let sessions = self.registry.all_attached().into_iter();
        sessions.filter_map(refused).collect()
    }
}

/// Both lists have the same keys in the same order.
fn changes(old: &[Setting], new: &[Setting]) -> Vec<Change> {
    let pairs = old.iter().zip(new);
    let changed = pairs.filter(|(old, new)| old.value != new.value);
    changed
        .map(|(old, new)| Change {
            key: old.key,
            from: old.value.clone(),
            to: new.value.clone(),
        })
        .collect()
}

impl Reloaded {
    fn log(&self) {
        let Reconciled {
            created,
            updated,
            recreated,
            deleted,
            kept,
        } = &self.domains;
        tracing::info!(
            applied = self.applied.len(),
            restart_required = self.restart_required.len(),
            created = created.len(),
            updated = updated.len(),
            recreated = recreated.len(),
            deleted = deleted.len(),
            kept = kept.len(),
            unwelcome = self.unwelcome.len(),
            "configuration reloaded"
        );
        for change in &self.applied {
            tracing::info!(%change, "in force");
        }
        for change in &self.restart_required {
            tracing::warn!(%change, "in force only after a restart");
        }
        for (domain, reason) in kept {
            tracing::warn!(%domain, reason, "not as the configuration has it");
        }
        for (live, refusal) in &self.unwelcome {
            let (session, domain, peer) = (live.id, &live.domain.id, &live.peer);
            let reason = &refusal.message;
            tracing::warn!(%session, %domain, %peer, reason, "a session that would not be let in any more");
        }
    }
}

impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Change { key, from, to } = self;
        write!(f, "{key}: {from} -> {to}")
    }
}

impl From<Change> for v1::SettingChange {
    fn from(change: Change) -> v1::SettingChange {
        let Change { key, from, to } = change;
        v1::SettingChange {
            key: key.to_owned(),
            from,
            to,
        }
    }
}

impl From<Reloaded> for v1::ReloadConfigResponse {
    fn from(reloaded: Reloaded) -> v1::ReloadConfigResponse {
        let Reloaded {
            applied,
            restart_required,
            domains,
            unwelcome,
        } = reloaded;
        let names = |ids: Vec<DomainId>| ids.iter().map(DomainId::name).collect();
        let kept = domains.kept.into_iter();
        let unwelcome_count = count(unwelcome.len());
        let unwelcome = unwelcome.into_iter().take(NAMED);
        v1::ReloadConfigResponse {
            applied: applied.into_iter().map(Into::into).collect(),
            restart_required: restart_required.into_iter().map(Into::into).collect(),
            created_domains: names(domains.created),
            updated_domains: names(domains.updated),
            recreated_domains: names(domains.recreated),
            deleted_domains: names(domains.deleted),
            kept_domains: kept
                .map(|(id, reason)| v1::KeptDomain {
                    name: id.name(),
                    reason,
                })
                .collect(),
            unwelcome_sessions: unwelcome
                .map(|(live, refusal)| v1::UnwelcomeSession {
                    name: session_name(live.id),
                    domain: live.domain.id.name(),
                    peer: Some(live.peer.as_ref().into()),
                    reason: refusal.message,
                })
                .collect(),
            unwelcome_count,
        }
    }
}

impl From<ReloadError> for Refusal {
    fn from(error: ReloadError) -> Refusal {
        Refusal::of(Code::FailedPrecondition, ErrorReason::ConfigRefused, &error)
    }
}
