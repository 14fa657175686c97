//! What the daemon was told: flags before `DOMAIND_*` variables before the
//! TOML file before defaults. A setting has one name in all three: `[log]
//! format` in the file is `DOMAIND_LOG_FORMAT` and `--log-format`.

use std::fs;
use std::io;
use std::num::NonZero;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::thread::available_parallelism;
use std::time::Duration;

use clap::builder::BoolishValueParser;
use clap::{Args, ValueEnum};
use domaind_proto::paths::{RUNTIME_DIR_VAR, RuntimeDir, RuntimeDirError};
use domaind_proto::v1::{ErrorReason, Refusal};
use serde::Deserialize;
use tonic::Code;

use crate::http::{Listen, ListenError};
use crate::peer::Peer;
use crate::proc;

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
pub const DEFAULT_CONFIG: &str = r#"# domaind.toml. Every setting is also a flag and a variable: [log] format is
# --log-format and DOMAIND_LOG_FORMAT. Flags win over variables, variables over
# this file. What is commented out shows the default.

config_version = 1

# Where the sockets are: public/api.sock, public/fd.sock, admin/admin.sock.
# Unset: /run/domaind for root or if it is there, else $XDG_RUNTIME_DIR/domaind.
#runtime_dir = "/run/domaind"

# For tests: memory that is freed is overwritten with 0xa5 instead of zeroes, so
# that whoever is ever shown old bytes finds out.
#poison = false

[server]
# Group that may enter public/ and connect to its sockets. Unset: the daemon's.
#client_gid = 4242
# Threads that serve calls, 1 to 256. Unset: one for each core, at most 8.
#worker_threads = 8

[metrics]
# Where /livez, /readyz and /metrics are answered over HTTP: "IP:port", or
# "unix:/path" outside of public/. Unset or empty: nowhere.
#listen = ""

[limits]
# Bytes of regions that all domains together may have. Unset: half of the
# memory that this process may use (machine or cgroup).
#region_bytes = 1073741824
# How long a session may take to acknowledge that something was removed, in
# milliseconds, 10 to 600000. Who takes longer is ended, and what it could reach
# is not used again before it is gone.
#ack_timeout_ms = 5000

[policy]
# Allow read-only access to peers that could undo it (the daemon's own uid,
# CAP_DAC_OVERRIDE). GetSession then says that it is not enforced.
#advisory_read_only = false
# Serve peers whose user the kernel cannot name (other user namespaces).
#allow_unattested = false

[log]
# text or json, on standard error.
#format = "text"
# off, error, warn, info, debug, trace; or per target: "info,h2=warn".
#level = "info"
"#;

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
}

/// Who is let in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Policy {
    /// Read-only access is given to peers that could undo it, too.
    pub advisory_read_only: bool,
    /// Peers whose user the kernel cannot name are served, too.
    pub allow_unattested: bool,
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

/// The daemon's flags, each with its variable.
#[derive(Clone, Debug, Default, Args)]
pub struct ConfigArgs {
    /// Configuration file [default: /etc/domaind/domaind.toml, if it is there]
    #[arg(long, env = "DOMAIND_CONFIG", value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Directory of the sockets [default: /run/domaind, else $XDG_RUNTIME_DIR/domaind]
    #[arg(long, env = RUNTIME_DIR_VAR, value_name = "DIR")]
    pub runtime_dir: Option<PathBuf>,
    /// Group that may connect to the public sockets
    #[arg(long, env = "DOMAIND_SERVER_CLIENT_GID", value_name = "GID")]
    pub server_client_gid: Option<u32>,
    /// Threads that serve calls [default: one for each core, at most 8]
    #[arg(long, env = "DOMAIND_SERVER_WORKER_THREADS", value_name = "N")]
    #[arg(value_parser = clap::value_parser!(u64).range(WORKER_THREADS))]
    pub server_worker_threads: Option<u64>,
    /// Where probes and metrics are answered over HTTP: IP:port or unix:/path [default: nowhere]
    #[arg(long, env = "DOMAIND_METRICS_LISTEN", value_name = "PLACE")]
    pub metrics_listen: Option<Listen>,
    /// Bytes of regions that all domains together may have [default: half of the memory]
    #[arg(long, env = "DOMAIND_LIMITS_REGION_BYTES", value_name = "BYTES")]
    pub limits_region_bytes: Option<u64>,
    /// Milliseconds that a session may take to acknowledge a removal [default: 5000]
    #[arg(long, env = "DOMAIND_LIMITS_ACK_TIMEOUT_MS", value_name = "MS")]
    #[arg(value_parser = clap::value_parser!(u64).range(ACK_TIMEOUT_MS))]
    pub limits_ack_timeout_ms: Option<u64>,
    /// Allow read-only access to peers that could undo it
    #[arg(long, env = "DOMAIND_POLICY_ADVISORY_READ_ONLY", value_name = "BOOL")]
    #[arg(num_args = 0..=1, require_equals = true, default_missing_value = "true", value_parser = BoolishValueParser::new())]
    pub policy_advisory_read_only: Option<bool>,
    /// Serve peers whose user the kernel cannot name
    #[arg(long, env = "DOMAIND_POLICY_ALLOW_UNATTESTED", value_name = "BOOL")]
    #[arg(num_args = 0..=1, require_equals = true, default_missing_value = "true", value_parser = BoolishValueParser::new())]
    pub policy_allow_unattested: Option<bool>,
    /// Form of the log lines on standard error [default: text]
    #[arg(long, env = "DOMAIND_LOG_FORMAT", value_name = "FORMAT")]
    pub log_format: Option<LogFormat>,
    /// For tests: overwrite freed memory with 0xa5 instead of zeroes
    #[arg(
        long,
        env = "DOMAIND_POISON",
        value_name = "BOOL",
        hide_short_help = true
    )]
    #[arg(num_args = 0..=1, require_equals = true, default_missing_value = "true", value_parser = BoolishValueParser::new())]
    pub poison: Option<bool>,
    /// Levels of the log, such as "info" or "info,h2=warn" [default: info]
    #[arg(long, env = "DOMAIND_LOG_LEVEL", value_name = "LEVELS")]
    pub log_level: Option<String>,
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
    #[error("{path:?}: config_version is {found}, this daemon reads version 1")]
    Version { path: PathBuf, found: i64 },
    #[error("metrics.listen")]
    Listen(#[from] ListenError),
    #[error(transparent)]
    RuntimeDir(#[from] RuntimeDirError),
}

/// The file, key by key. Keep [`KEYS`] and [`DEFAULT_CONFIG`] in step.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct File {
    config_version: Option<i64>,
    runtime_dir: Option<PathBuf>,
    poison: Option<bool>,
    server: ServerTable,
    metrics: MetricsTable,
    limits: LimitsTable,
    policy: PolicyTable,
    log: LogTable,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct ServerTable {
    client_gid: Option<u32>,
    worker_threads: Option<u64>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct MetricsTable {
    listen: Option<Listen>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct LimitsTable {
    region_bytes: Option<u64>,
    ack_timeout_ms: Option<u64>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct PolicyTable {
    advisory_read_only: Option<bool>,
    allow_unattested: Option<bool>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct LogTable {
    format: Option<LogFormat>,
    level: Option<String>,
}

/// Every key that a file may have.
const KEYS: [&str; 12] = [
    "config_version",
    "runtime_dir",
    "poison",
    "server.client_gid",
    "server.worker_threads",
    "metrics.listen",
    "limits.region_bytes",
    "limits.ack_timeout_ms",
    "policy.advisory_read_only",
    "policy.allow_unattested",
    "log.format",
    "log.level",
];

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
                .or(file.limits.region_bytes)
                .unwrap_or_else(|| proc::memory_bytes() / 2),
            ack_timeout: Duration::from_millis(
                args.limits_ack_timeout_ms
                    .or(file.limits.ack_timeout_ms)
                    .unwrap_or(DEFAULT_ACK_TIMEOUT_MS),
            ),
            policy: Policy {
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
        }
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
        let file = match &self.config {
            Some(path) => File::read(path)?,
            None if Path::new(DEFAULT_FILE).exists() => File::read(Path::new(DEFAULT_FILE))?,
            None => File::default(),
        };
        let asked = self.runtime_dir.as_deref().or(file.runtime_dir.as_deref());
        let runtime_dir = RuntimeDir::resolve(asked)?;
        let config = Config::merge(runtime_dir, self, file);
        config
            .metrics_listen
            .check_is_not_in(&config.runtime_dir.public())?;
        Ok(config)
    }
}

impl File {
    fn read(path: &Path) -> Result<File, ConfigError> {
        let text = fs::read_to_string(path).map_err(|cause| ConfigError::Read {
            path: path.to_owned(),
            cause,
        })?;
        File::parse(&text, path)
    }

    fn parse(text: &str, path: &Path) -> Result<File, ConfigError> {
        let path = path.to_owned();
        let syntax = |cause| ConfigError::Syntax {
            path: path.clone(),
            cause: Box::new(cause),
        };
        let table: toml::Table = toml::from_str(text).map_err(syntax)?;
        if let Some(key) = flatten(&table)
            .into_iter()
            .find(|key| !KEYS.contains(&key.as_str()))
        {
            return Err(ConfigError::UnknownKey {
                path,
                nearest: nearest(&key).to_owned(),
                key,
            });
        }
        // From the text, not from the table: its errors show the line.
        let file: File = toml::from_str(text).map_err(syntax)?;
        if let Some(found) = file.config_version.filter(|version| *version != 1) {
            return Err(ConfigError::Version { path, found });
        }
        let ack_timeout_ms = file.limits.ack_timeout_ms;
        if let Some(found) = ack_timeout_ms.filter(|found| !ACK_TIMEOUT_MS.contains(found)) {
            return Err(ConfigError::AckTimeout { path, found });
        }
        let worker_threads = file.server.worker_threads;
        if let Some(found) = worker_threads.filter(|found| !WORKER_THREADS.contains(found)) {
            return Err(ConfigError::WorkerThreads { path, found });
        }
        Ok(file)
    }
}

/// `table.key` for every value; a table that is empty has no keys.
fn flatten(table: &toml::Table) -> Vec<String> {
    let below = |(key, value): (&String, &toml::Value)| match value {
        toml::Value::Table(inner) => inner.keys().map(|sub| format!("{key}.{sub}")).collect(),
        _ => vec![key.clone()],
    };
    table.iter().flat_map(below).collect()
}

fn nearest(key: &str) -> &'static str {
    KEYS.into_iter()
        .min_by_key(|known| strsim::damerau_levenshtein(key, known))
        .unwrap_or("config_version")
}

impl Policy {
    /// May somebody whom the kernel knows that well be served?
    pub(crate) fn check_attested(&self, peer: &Peer) -> Result<(), Refusal> {
        if peer.is_attested() || self.allow_unattested {
            return Ok(());
        }
        let message = format!(
            "the kernel cannot say which user {peer} is; policy.allow_unattested would let it in"
        );
        Err(Refusal::because(
            Code::PermissionDenied,
            ErrorReason::Unattested,
            message,
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

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
    fn an_unknown_key_is_refused_with_the_nearest_one() {
        for (text, key, nearest) in [
            ("[log]\nfromat = 'json'", "log.fromat", "log.format"),
            (
                "[limit]\nregion_bytes = 1",
                "limit.region_bytes",
                "limits.region_bytes",
            ),
            ("runtimedir = '/x'", "runtimedir", "runtime_dir"),
        ] {
            let refused = parse(text).unwrap_err();
            assert!(
                matches!(&refused, ConfigError::UnknownKey { key: k, nearest: n, .. } if k == key && n == nearest),
                "{refused}"
            );
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
    fn the_default_file_says_the_defaults_and_shows_every_key() {
        let as_is = merged(&ConfigArgs::default(), DEFAULT_CONFIG);
        let nothing = merged(&ConfigArgs::default(), "");
        assert_eq!(format!("{as_is:?}"), format!("{nothing:?}"));
        let uncommented: String = DEFAULT_CONFIG
            .lines()
            .map(|line| match line.strip_prefix('#') {
                Some(setting) if !setting.starts_with(' ') => format!("{setting}\n"),
                _ => format!("{line}\n"),
            })
            .collect();
        parse(&uncommented).unwrap();
        let table: toml::Table = toml::from_str(&uncommented).unwrap();
        let shown: std::collections::BTreeSet<_> = flatten(&table).into_iter().collect();
        assert_eq!(shown, KEYS.iter().map(|key| (*key).to_owned()).collect());
    }
}
