//! What the daemon was told: flags before `DOMAIND_*` variables before the
//! TOML file before defaults. A setting has one name in all three: `[log]
//! format` in the file is `DOMAIND_LOG_FORMAT` and `--log-format`.

mod args;
mod domains;
mod file;
mod rules;
mod sizes;

use std::fmt;
use std::io;
use std::num::NonZero;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::available_parallelism;
use std::time::Duration;

use clap::ValueEnum;
use domaind_proto::paths::{RuntimeDir, RuntimeDirError};
use domaind_proto::size;
use serde::Deserialize;

pub use self::args::ConfigArgs;
pub use self::domains::DomainError;
use self::file::File;
pub use self::rules::RuleError;
use crate::declared::Declared;
use crate::http::{Listen, ListenError};
use crate::policy::Rule;
pub use crate::policy::{Fallback, Policy};
use crate::proc;
use crate::reload::ReloadError;
use crate::terms::Terms;

/// Read when `--config` names no other; need not be there.
pub const DEFAULT_FILE: &str = "/etc/domaind/domaind.toml";

/// What [`Config::ack_timeout`] may be: a busy machine takes some milliseconds
/// to run everybody, and who is not heard of for ten minutes is gone.
const ACK_TIMEOUT_MS: RangeInclusive<u64> = 10..=600_000;
const DEFAULT_ACK_TIMEOUT_MS: u64 = 5000;
/// What [`Config::worker_threads`] may be.
const WORKER_THREADS: RangeInclusive<u64> = 1..=256;
/// More would do the calls of a node's control plane no faster, and each call that
/// finds a sleeping one takes a core from a data plane: see ARCHITECTURE.md.
const DEFAULT_WORKER_THREADS_MOST: usize = 8;

/// The file that says nothing but the defaults, for people to start from.
pub const DEFAULT_CONFIG: &str = include_str!("default.toml");

/// Everything the daemon needs to know.
#[derive(Clone, Debug)]
pub struct Config {
    /// Where its sockets are.
    pub runtime_dir: RuntimeDir,
    /// Group of the public directory and its sockets; `None`: the daemon's.
    pub client_gid: Option<u32>,
    /// Threads of the runtime that serves calls; for whoever makes the runtime.
    pub worker_threads: usize,
    /// Where probes and metrics are answered.
    pub metrics_listen: Listen,
    /// Bytes of regions that all domains together may have.
    pub region_bytes: u64,
    /// How long a session may take to acknowledge a removal before it is ended.
    pub ack_timeout: Duration,
    /// Who is let in.
    pub policy: Policy,
    /// What it logs.
    pub log: Log,
    /// For tests: what is freed is overwritten with a byte that is not zero.
    pub poison: bool,
    /// Domains that are there as long as the daemon.
    pub(crate) domains: Vec<Declared>,
    /// From where all this is read again; `None` for a daemon that is embedded.
    source: Option<Source>,
}

/// What a configuration was made of.
#[derive(Clone)]
struct Source(Arc<ConfigArgs>);

impl fmt::Debug for Source {
    /// Its flags are in the configuration already.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Source({:?})", self.0.file())
    }
}

/// One setting, to be compared and shown.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Setting {
    pub(crate) key: &'static str,
    pub(crate) value: String,
}

/// What is logged.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Log {
    /// In which form.
    pub format: LogFormat,
    /// Levels by target, as `tracing_subscriber::filter::Targets` reads them.
    pub level: String,
}

/// In which form log lines are written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// One JSON object a line.
    Json,
}

/// Why there is no configuration.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)] // the messages are the docs
pub enum ConfigError {
    #[error("reading {path:?}")]
    Read {
        path: PathBuf,
        #[source]
        cause: io::Error,
    },
    #[error("{path:?} is not TOML of the right shape")]
    Syntax {
        path: PathBuf,
        #[source]
        cause: Box<toml::de::Error>,
    },
    #[error("{path:?}: there is no setting {key:?}; the nearest is {nearest:?}")]
    UnknownKey {
        path: PathBuf,
        key: String,
        nearest: String,
    },
    #[error(
        "{path:?}: limits.ack_timeout_ms is {found}, it must be {} to {}",
        ACK_TIMEOUT_MS.start(),
        ACK_TIMEOUT_MS.end()
    )]
    AckTimeout { path: PathBuf, found: u64 },
    #[error(
        "{path:?}: server.worker_threads is {found}, it must be {} to {}",
        WORKER_THREADS.start(),
        WORKER_THREADS.end()
    )]
    WorkerThreads { path: PathBuf, found: u64 },
    #[error("{path:?}")]
    Rule {
        path: PathBuf,
        #[source]
        cause: Box<RuleError>,
    },
    #[error("{path:?}")]
    Domain {
        path: PathBuf,
        #[source]
        cause: Box<DomainError>,
    },
    #[error("{path:?}: config_version is {found}, this daemon reads version 1")]
    Version { path: PathBuf, found: i64 },
    #[error("metrics.listen")]
    Listen(#[from] ListenError),
    #[error(transparent)]
    RuntimeDir(#[from] RuntimeDirError),
}

impl Config {
    /// Defaults for everything but the runtime directory; for a daemon that is
    /// embedded.
    #[must_use]
    pub fn for_runtime_dir(runtime_dir: RuntimeDir) -> Config {
        Config::merge(runtime_dir, &ConfigArgs::default(), File::default())
    }

    fn merge(runtime_dir: RuntimeDir, args: &ConfigArgs, file: File) -> Config {
        let flag = |flag: Option<bool>, file: Option<bool>| flag.or(file).unwrap_or(false);
        Config {
            runtime_dir,
            client_gid: args.server_client_gid.or(file.server.client_gid),
            worker_threads: args
                .server_worker_threads
                .or(file.server.worker_threads)
                .and_then(|threads| usize::try_from(threads).ok())
                .unwrap_or_else(default_worker_threads),
            metrics_listen: args
                .metrics_listen
                .clone()
                .or(file.metrics.listen)
                .unwrap_or_default(),
            region_bytes: args
                .limits_region_bytes
                .or(file.limits.region_bytes.map(|size| size.0))
                .unwrap_or_else(|| proc::memory_bytes() / 2),
            ack_timeout: Duration::from_millis(
                args.limits_ack_timeout_ms
                    .or(file.limits.ack_timeout_ms)
                    .unwrap_or(DEFAULT_ACK_TIMEOUT_MS),
            ),
            policy: Policy {
                default: args
                    .policy_default
                    .or(file.policy.default)
                    .unwrap_or_default(),
                rules: file.policy.checked,
                advisory_read_only: flag(
                    args.policy_advisory_read_only,
                    file.policy.advisory_read_only,
                ),
                allow_unattested: flag(args.policy_allow_unattested, file.policy.allow_unattested),
            },
            log: Log {
                format: args.log_format.or(file.log.format).unwrap_or_default(),
                level: args
                    .log_level
                    .clone()
                    .or(file.log.level)
                    .unwrap_or_else(|| "info".to_owned()),
            },
            poison: flag(args.poison, file.poison),
            domains: file.declared,
            source: None,
        }
    }
}

impl Config {
    /// What of it may change while the daemon runs, and holds for everybody who
    /// comes.
    pub(crate) fn terms(&self) -> Terms {
        Terms {
            policy: self.policy.clone(),
            ack_timeout: self.ack_timeout,
        }
    }

    /// The same settings read once more.
    ///
    /// # Errors
    /// [`ReloadError`]; a daemon that is embedded has none to read.
    pub(crate) fn read_again(&self) -> Result<Config, ReloadError> {
        let Source(args) = self.source.as_ref().ok_or(ReloadError::NoSource)?;
        Ok(args.resolve()?)
    }

    /// What comes into force while the daemon runs, as long as it is in
    /// [`take_over`](Config::take_over), too. The domains are compared one by one.
    pub(crate) fn reloadable(&self) -> Vec<Setting> {
        let Policy {
            default,
            advisory_read_only,
            allow_unattested,
            rules,
        } = &self.policy;
        let rules: Vec<_> = rules.iter().map(Rule::in_full).collect();
        vec![
            setting("limits.region_bytes", size::exact(self.region_bytes)),
            setting("limits.ack_timeout_ms", self.ack_timeout.as_millis()),
            setting("policy.default", default),
            setting("policy.advisory_read_only", advisory_read_only),
            setting("policy.allow_unattested", allow_unattested),
            setting("policy.rules", rules.join("; ")),
            setting("log.level", &self.log.level),
        ]
    }

    /// What needs a restart.
    pub(crate) fn fixed(&self) -> Vec<Setting> {
        let unset = || "unset".to_owned();
        let client_gid = self.client_gid.map_or_else(unset, |gid| gid.to_string());
        vec![
            setting("runtime_dir", self.runtime_dir.path().display()),
            setting("server.client_gid", client_gid),
            setting("server.worker_threads", self.worker_threads),
            setting("metrics.listen", &self.metrics_listen),
            setting(
                "log.format",
                format!("{:?}", self.log.format).to_lowercase(),
            ),
            setting("poison", self.poison),
        ]
    }

    /// Takes what comes into force of what was read again; the rest stays.
    pub(crate) fn take_over(&mut self, new: Config) {
        self.region_bytes = new.region_bytes;
        self.ack_timeout = new.ack_timeout;
        self.policy = new.policy;
        self.log.level = new.log.level;
        self.domains = new.domains;
    }
}

fn setting(key: &'static str, value: impl fmt::Display) -> Setting {
    Setting {
        key,
        value: value.to_string(),
    }
}

fn default_worker_threads() -> usize {
    let cores = available_parallelism().map_or(1, NonZero::get);
    cores.min(DEFAULT_WORKER_THREADS_MOST)
}

impl ConfigArgs {
    /// Reads the file and merges everything.
    ///
    /// # Errors
    /// [`ConfigError`], naming the file and the key.
    pub fn resolve(&self) -> Result<Config, ConfigError> {
        let file = match self.file() {
            Some(path) => File::read(path)?,
            None => File::default(),
        };
        let asked = self.runtime_dir.as_deref().or(file.runtime_dir.as_deref());
        let runtime_dir = RuntimeDir::resolve(asked)?;
        let config = Config {
            source: Some(Source(Arc::new(self.clone()))),
            ..Config::merge(runtime_dir, self, file)
        };
        config
            .metrics_listen
            .check_is_not_in(&config.runtime_dir.public())?;
        Ok(config)
    }

    /// The file that is read.
    fn file(&self) -> Option<&Path> {
        let default = Path::new(DEFAULT_FILE);
        let named = self.config.as_deref();
        named.or_else(|| default.exists().then_some(default))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;
    use std::path::Path;

    #[derive(Parser)]
    struct Flags {
        #[command(flatten)]
        args: ConfigArgs,
    }

    fn parse(text: &str) -> Result<File, ConfigError> {
        File::parse(text, Path::new("test.toml"))
    }

    fn merged(args: &ConfigArgs, text: &str) -> Config {
        Config::merge(
            RuntimeDir::new(Path::new("/tmp/x")).unwrap(),
            args,
            parse(text).unwrap(),
        )
    }

    #[test]
    fn a_flag_wins_over_the_file_and_the_file_over_the_default() {
        let text = "[limits]\nregion_bytes = 5\n[log]\nlevel = 'warn'\n[policy]\nadvisory_read_only = true";
        let args = ConfigArgs {
            limits_region_bytes: Some(7),
            policy_advisory_read_only: Some(false),
            ..ConfigArgs::default()
        };
        let config = merged(&args, text);
        assert_eq!(config.region_bytes, 7);
        assert_eq!(
            config.log,
            Log {
                format: LogFormat::Text,
                level: "warn".to_owned()
            }
        );
        assert!(!config.policy.advisory_read_only);
        assert_eq!(merged(&ConfigArgs::default(), text).region_bytes, 5);
    }

    #[test]
    fn the_time_to_acknowledge_is_five_seconds_unless_it_is_said_to_be_other() {
        let ack_timeout = |args: &[&str], text| {
            let args = Flags::parse_from(["domaind"].iter().chain(args)).args;
            merged(&args, text).ack_timeout.as_millis()
        };
        let text = "[limits]\nack_timeout_ms = 250";
        assert_eq!(ack_timeout(&[], ""), 5000);
        assert_eq!(ack_timeout(&[], text), 250);
        let flag = "--limits-ack-timeout-ms=600000";
        assert_eq!(ack_timeout(&[flag], text), 600_000);
    }

    #[test]
    fn there_is_a_worker_for_each_core_up_to_eight_unless_it_is_said() {
        let workers = |args: &[&str], text| {
            let args = Flags::parse_from(["domaind"].iter().chain(args)).args;
            merged(&args, text).worker_threads
        };
        let text = "[server]\nworker_threads = 3";
        assert!((1..=8).contains(&workers(&[], "")));
        assert_eq!(workers(&[], text), 3);
        assert_eq!(workers(&["--server-worker-threads=256"], text), 256);
        for wrong in [0, 257] {
            let parsed = parse(&format!("[server]\nworker_threads = {wrong}"));
            let refused = parsed.err().unwrap();
            assert!(matches!(refused, ConfigError::WorkerThreads { found, .. } if found == wrong));
            let flag = format!("--server-worker-threads={wrong}");
            assert!(Flags::try_parse_from(["domaind", &flag]).is_err());
        }
    }

    #[test]
    fn a_time_to_acknowledge_out_of_range_is_refused_wherever_it_stands() {
        for (value, is_good) in [(0, false), (9, false), (10, true), (600_001, false)] {
            let parsed = parse(&format!("[limits]\nack_timeout_ms = {value}"));
            match parsed {
                Ok(_) => assert!(is_good, "{value}"),
                Err(ConfigError::AckTimeout { found, .. }) => assert_eq!(found, value),
                Err(other) => panic!("{value}: {other}"),
            }
            let flag = format!("--limits-ack-timeout-ms={value}");
            let flags = Flags::try_parse_from(["domaind", &flag]);
            assert_eq!(flags.is_ok(), is_good, "{flag}");
        }
    }

    #[test]
    fn a_wrong_value_or_version_is_refused() {
        assert!(matches!(
            parse("[log]\nformat = 'xml'"),
            Err(ConfigError::Syntax { .. })
        ));
        assert!(matches!(
            parse("[limits]\nregion_bytes = -1"),
            Err(ConfigError::Syntax { .. })
        ));
        assert!(matches!(
            parse("config_version = 2"),
            Err(ConfigError::Version { found: 2, .. })
        ));
    }

    #[test]
    fn the_default_file_says_the_defaults() {
        let as_is = merged(&ConfigArgs::default(), DEFAULT_CONFIG);
        let nothing = merged(&ConfigArgs::default(), "");
        assert_eq!(format!("{as_is:?}"), format!("{nothing:?}"));
    }
}
