//! The configuration file, key by key.

use std::fs;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::domains::{self, DomainTable};
use super::rules::RuleTable;
use super::sizes::Size;
use super::{ACK_TIMEOUT_MS, ConfigError, LogFormat, WORKER_THREADS, rules};
use crate::declared::Declared;
use crate::http::Listen;
use crate::policy::{Fallback, Rule};

/// The file, key by key. Keep [`KEYS`] and `default.toml` in step.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct File {
    config_version: Option<i64>,
    pub(super) runtime_dir: Option<PathBuf>,
    pub(super) poison: Option<bool>,
    pub(super) server: ServerTable,
    pub(super) metrics: MetricsTable,
    pub(super) limits: LimitsTable,
    pub(super) policy: PolicyTable,
    pub(super) log: LogTable,
    domains: Vec<DomainTable>,
    /// What `domains` says, checked.
    #[serde(skip)]
    pub(super) declared: Vec<Declared>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct ServerTable {
    pub(super) client_gid: Option<u32>,
    pub(super) worker_threads: Option<u64>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct MetricsTable {
    pub(super) listen: Option<Listen>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct LimitsTable {
    pub(super) region_bytes: Option<Size>,
    pub(super) ack_timeout_ms: Option<u64>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct PolicyTable {
    pub(super) default: Option<Fallback>,
    pub(super) advisory_read_only: Option<bool>,
    pub(super) allow_unattested: Option<bool>,
    rules: Vec<RuleTable>,
    /// What `rules` says, checked.
    #[serde(skip)]
    pub(super) checked: Vec<Rule>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct LogTable {
    pub(super) format: Option<LogFormat>,
    pub(super) level: Option<String>,
}

/// Every key that a file may have; those of a list of tables without a number.
const KEYS: [&str; 39] = [
    "config_version",
    "runtime_dir",
    "poison",
    "server.client_gid",
    "server.worker_threads",
    "metrics.listen",
    "limits.region_bytes",
    "limits.ack_timeout_ms",
    "policy.default",
    "policy.advisory_read_only",
    "policy.allow_unattested",
    "policy.rules.name",
    "policy.rules.uids",
    "policy.rules.gids",
    "policy.rules.pod_uids",
    "policy.rules.units",
    "policy.rules.domains",
    "policy.rules.roles",
    "policy.rules.access",
    "policy.rules.create",
    "log.format",
    "log.level",
    "domains.name",
    "domains.bounce_bytes",
    "domains.coherent_bytes",
    "domains.iova_limit",
    "domains.aperture_base",
    "domains.granule_bytes",
    "domains.backing",
    "domains.scrub",
    "domains.reserved",
    "domains.allowed",
    "domains.owner_uid",
    "domains.quotas.sessions",
    "domains.quotas.mappings",
    "domains.quotas.memories",
    "domains.quotas.direct",
    "domains.quotas.leases",
    "domains.quotas.lease_bytes",
];

impl File {
    pub(super) fn read(path: &Path) -> Result<File, ConfigError> {
        let text = fs::read_to_string(path).map_err(|cause| ConfigError::Read {
            path: path.to_owned(),
            cause,
        })?;
        File::parse(&text, path)
    }

    pub(super) fn parse(text: &str, path: &Path) -> Result<File, ConfigError> {
        let path = path.to_owned();
        let syntax = |cause| ConfigError::Syntax {
            path: path.clone(),
            cause: Box::new(cause),
        };
        let table: toml::Table = toml::from_str(text).map_err(syntax)?;
        if let Some(key) = flatten(&table).into_iter().find(|key| !is_known(key)) {
            return Err(ConfigError::UnknownKey {
                path,
                nearest: nearest(&key).to_owned(),
                key,
            });
        }
        // From the text, not from the table: its errors show the line.
        let mut file: File = toml::from_str(text).map_err(syntax)?;
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
        let written = std::mem::take(&mut file.policy.rules);
        let rules = rules::check(written);
        file.policy.checked = rules.map_err(|cause| ConfigError::Rule {
            path: path.clone(),
            cause: Box::new(cause),
        })?;
        let written = std::mem::take(&mut file.domains);
        let domains = domains::check(written);
        file.declared = domains.map_err(|cause| ConfigError::Domain {
            path,
            cause: Box::new(cause),
        })?;
        Ok(file)
    }
}

/// `table.key` for every value; a table that is empty has no keys. The tables of a
/// list are all called by the list's name.
fn flatten(table: &toml::Table) -> Vec<String> {
    table
        .iter()
        .flat_map(|(key, value)| keys(key, value))
        .collect()
}

fn keys(key: &str, value: &toml::Value) -> Vec<String> {
    let below = |table: &toml::Table| {
        let inner = flatten(table).into_iter();
        inner.map(|sub| format!("{key}.{sub}")).collect::<Vec<_>>()
    };
    match value {
        toml::Value::Table(table) => below(table),
        toml::Value::Array(list) if list.iter().any(toml::Value::is_table) => {
            let tables = list.iter().filter_map(toml::Value::as_table);
            tables.flat_map(below).collect()
        }
        _ => vec![key.to_owned()],
    }
}

/// A value where a table belongs is known, too: what is wrong with it is its
/// shape.
fn is_known(key: &str) -> bool {
    let is_above = |known: &&str| {
        known
            .strip_prefix(key)
            .is_some_and(|rest| rest.starts_with('.'))
    };
    KEYS.contains(&key) || KEYS.iter().any(is_above)
}

fn nearest(key: &str) -> &'static str {
    KEYS.into_iter()
        .min_by_key(|known| strsim::damerau_levenshtein(key, known))
        .unwrap_or("config_version")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::DEFAULT_CONFIG;

    fn parse(text: &str) -> Result<File, ConfigError> {
        File::parse(text, Path::new("test.toml"))
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
            (
                "[[policy.rules]]\nname = 'r'\n[[policy.rules]]\nnmae = 's'",
                "policy.rules.nmae",
                "policy.rules.name",
            ),
            (
                "[policy]\nrules = [{ pod_uid = 'x' }]",
                "policy.rules.pod_uid",
                "policy.rules.pod_uids",
            ),
        ] {
            let refused = parse(text).unwrap_err();
            assert!(
                matches!(&refused, ConfigError::UnknownKey { key: k, nearest: n, .. } if k == key && n == nearest),
                "{refused}"
            );
        }
    }

    #[test]
    fn a_value_where_a_table_belongs_is_of_the_wrong_shape_and_not_unknown() {
        for text in ["log = 3", "[policy]\nrules = 3", "[policy]\nrules = [3]"] {
            let refused = parse(text).unwrap_err();
            assert!(matches!(refused, ConfigError::Syntax { .. }), "{refused}");
        }
        assert!(parse("[policy]\nrules = []").is_ok());
    }

    #[test]
    fn a_size_is_a_number_or_a_text_with_a_unit() {
        let bytes = |value: &str| {
            let file = parse(&format!("[limits]\nregion_bytes = {value}"));
            file.map(|file| file.limits.region_bytes.unwrap().0)
        };
        assert_eq!(bytes("4096").unwrap(), 4096);
        assert_eq!(bytes("'64 MiB'").unwrap(), 64 << 20);
        assert_eq!(bytes("'0x1000'").unwrap(), 4096);
        for wrong in ["-1", "'1.5GiB'", "'64MB'", "true", "[]", "1.0"] {
            let refused = bytes(wrong).unwrap_err();
            assert!(matches!(refused, ConfigError::Syntax { .. }), "{wrong}");
        }
    }

    #[test]
    fn a_rule_that_is_wrong_is_named_with_the_file() {
        let refused = parse("[[policy.rules]]\nname = 'r'\nuids = [1]").unwrap_err();
        let text = domaind_proto::refusal::sentence(&refused);
        assert!(
            text.starts_with("\"test.toml\": policy.rules: rule \"r\" names no domains"),
            "{text}"
        );
    }

    #[test]
    fn the_default_file_shows_every_key() {
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
