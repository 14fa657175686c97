//! The daemon's flags and variables.

use std::path::PathBuf;

use clap::Args;
use clap::builder::BoolishValueParser;
use domaind_proto::paths::RUNTIME_DIR_VAR;
use domaind_proto::size;

use super::{ACK_TIMEOUT_MS, LogFormat, WORKER_THREADS};
use crate::http::Listen;
use crate::policy::Fallback;

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
    #[arg(long, env = "DOMAIND_LIMITS_REGION_BYTES", value_name = "SIZE", value_parser = size::parse)]
    pub limits_region_bytes: Option<u64>,
    /// Milliseconds that a session may take to acknowledge a removal [default: 5000]
    #[arg(long, env = "DOMAIND_LIMITS_ACK_TIMEOUT_MS", value_name = "MS")]
    #[arg(value_parser = clap::value_parser!(u64).range(ACK_TIMEOUT_MS))]
    pub limits_ack_timeout_ms: Option<u64>,
    /// What holds for peers that no rule selects [default: owner]
    #[arg(long, env = "DOMAIND_POLICY_DEFAULT", value_name = "WHAT")]
    pub policy_default: Option<Fallback>,
    /// Allow read-only access to peers that could undo it
    #[arg(long, env = "DOMAIND_POLICY_ADVISORY_READ_ONLY", value_name = "BOOL")]
    #[arg(num_args = 0..=1, require_equals = true, default_missing_value = "true", value_parser = BoolishValueParser::new())]
    pub policy_advisory_read_only: Option<bool>,
    /// Serve peers of which the kernel cannot say who they are or where they run
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
