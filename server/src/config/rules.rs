//! `[[policy.rules]]`, as written and as checked.

use std::collections::BTreeSet;

use domain_core::region::Access;
use domaind_proto::names::DomainId;
use serde::Deserialize;

use crate::glob::Glob;
use crate::placement::PodUid;
use crate::policy::{Roles, Rule, Selectors};

/// As many characters as a domain's name may have.
const NAME_CHARS: usize = 63;
/// How the name of a systemd unit ends that processes can belong to.
const UNIT_KINDS: [&str; 5] = [".service", ".scope", ".socket", ".mount", ".swap"];

/// A rule as written.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct RuleTable {
    name: Option<String>,
    uids: Option<Vec<u32>>,
    gids: Option<Vec<u32>>,
    pod_uids: Option<Vec<String>>,
    units: Option<Vec<String>>,
    domains: Option<Vec<String>>,
    roles: Option<Vec<RoleWord>>,
    access: Option<AccessWord>,
    create: Option<bool>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum RoleWord {
    Driver,
    Device,
}

#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum AccessWord {
    ReadOnly,
    ReadWrite,
}

/// Why the rules are not what rules can be.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs)] // the messages are the docs
pub enum RuleError {
    #[error("policy.rules: rule {number} of the file has no name")]
    NoName { number: usize },
    #[error(
        "policy.rules: rule {number} of the file is named {name:?}; a name is 1 to {NAME_CHARS} letters, digits, \".\", \"_\" or \"-\""
    )]
    BadName { number: usize, name: String },
    #[error("policy.rules: two rules are named {name:?}")]
    SameName { name: String },
    #[error(
        "policy.rules: rule {rule:?} selects nobody; give at least one of uids, gids, pod_uids, units"
    )]
    NoSelector { rule: String },
    #[error("policy.rules: rule {rule:?} has an empty list {key}; leave it out, or name something")]
    Empty { rule: String, key: &'static str },
    #[error("policy.rules: rule {rule:?} names no domains; domains = [\"*\"] would be all of them")]
    NoDomains { rule: String },
    #[error(
        "policy.rules: rule {rule:?} has the pod uid {value:?}; one is lower-case hexadecimal, 8-4-4-4-12 digits or 32 in one"
    )]
    BadPodUid { rule: String, value: String },
    #[error(
        "policy.rules: rule {rule:?} has the unit {value:?}; a unit is named in full (spdk.service), \"*\" and \"?\" stand for anything and for one character"
    )]
    BadUnit { rule: String, value: String },
    #[error(
        "policy.rules: rule {rule:?} has the domain {value:?}, which no name of a domain can fit: names are [a-z]([a-z0-9-]*[a-z0-9])?, 63 characters at most, \"*\" and \"?\" stand for anything and for one character"
    )]
    BadDomain { rule: String, value: String },
}

/// All rules, or what is wrong with the first that is.
pub(super) fn check(tables: Vec<RuleTable>) -> Result<Vec<Rule>, RuleError> {
    let mut names = BTreeSet::new();
    let mut rules = Vec::with_capacity(tables.len());
    for (table, number) in tables.into_iter().zip(1..) {
        let rule = table.check(number)?;
        if !names.insert(rule.name.clone()) {
            return Err(RuleError::SameName { name: rule.name });
        }
        rules.push(rule);
    }
    Ok(rules)
}

impl RuleTable {
    fn check(self, number: usize) -> Result<Rule, RuleError> {
        let name = self.name.ok_or(RuleError::NoName { number })?;
        if !is_name(&name) {
            return Err(RuleError::BadName { number, name });
        }
        let rule = || name.clone();
        let selectors = Selectors {
            uids: filled(self.uids, "uids", &name)?,
            gids: filled(self.gids, "gids", &name)?,
            pods: filled(self.pod_uids, "pod_uids", &name)?
                .map(|pods| pods.into_iter().map(|value| pod(&name, value)).collect())
                .transpose()?,
            units: filled(self.units, "units", &name)?
                .map(|units| units.into_iter().map(|value| unit(&name, value)).collect())
                .transpose()?,
        };
        if selectors == Selectors::default() {
            return Err(RuleError::NoSelector { rule: rule() });
        }
        let domains = filled(self.domains, "domains", &name)?;
        let domains = domains.ok_or_else(|| RuleError::NoDomains { rule: rule() })?;
        let domains = domains.into_iter().map(|value| domain(&name, value));
        let roles = filled(self.roles, "roles", &name)?;
        let has = |role| roles.as_ref().is_none_or(|roles| roles.contains(&role));
        Ok(Rule {
            selectors,
            domains: domains.collect::<Result<_, _>>()?,
            roles: Roles {
                driver: has(RoleWord::Driver),
                device: has(RoleWord::Device),
            },
            access: match self.access {
                Some(AccessWord::ReadOnly) => Access::ReadOnly,
                Some(AccessWord::ReadWrite) | None => Access::ReadWrite,
            },
            create: self.create.unwrap_or(false),
            name,
        })
    }
}

/// A list that is there names something.
fn filled<T>(
    list: Option<Vec<T>>,
    key: &'static str,
    rule: &str,
) -> Result<Option<Vec<T>>, RuleError> {
    match list {
        Some(list) if list.is_empty() => Err(RuleError::Empty {
            rule: rule.to_owned(),
            key,
        }),
        list => Ok(list),
    }
}

fn is_name(name: &str) -> bool {
    let is_good = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-');
    (1..=NAME_CHARS).contains(&name.len()) && name.bytes().all(is_good)
}

fn pod(rule: &str, value: String) -> Result<PodUid, RuleError> {
    PodUid::parse(&value).ok_or_else(|| RuleError::BadPodUid {
        rule: rule.to_owned(),
        value,
    })
}

fn unit(rule: &str, value: String) -> Result<Glob, RuleError> {
    let is_good = |byte: u8| byte.is_ascii_alphanumeric() || br":-_.\@*?".contains(&byte);
    let is_full =
        value.ends_with(['*', '?']) || UNIT_KINDS.iter().any(|kind| value.ends_with(kind));
    match is_full && value.bytes().all(is_good) {
        true => Ok(Glob::new(&value)),
        false => Err(RuleError::BadUnit {
            rule: rule.to_owned(),
            value,
        }),
    }
}

/// A pattern that a name can fit: a name comes of it when something stands in for
/// what is left open.
fn domain(rule: &str, value: String) -> Result<Glob, RuleError> {
    let named = value.replace('*', "").replace('?', "x");
    let is_open = value.contains('*');
    let can_fit = match (is_open, named.as_str()) {
        (true, "") => true,
        // A "*" may give it its first and its last character.
        (true, part) => DomainId::new(&format!("{}{part}{}", lead(&value), tail(&value))).is_ok(),
        (false, name) => DomainId::new(name).is_ok(),
    };
    match can_fit {
        true => Ok(Glob::new(&value)),
        false => Err(RuleError::BadDomain {
            rule: rule.to_owned(),
            value,
        }),
    }
}

fn lead(value: &str) -> &'static str {
    if value.starts_with('*') { "x" } else { "" }
}

fn tail(value: &str) -> &'static str {
    if value.ends_with('*') { "x" } else { "" }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Vec<Rule>, RuleError> {
        #[derive(Deserialize)]
        struct Rules {
            rules: Vec<RuleTable>,
        }
        let Rules { rules } = toml::from_str(text).unwrap();
        check(rules)
    }

    /// One rule, of these lines.
    fn one(lines: &str) -> Result<Rule, RuleError> {
        parse(&format!("[[rules]]\n{lines}")).map(|rules| rules[0].clone())
    }

    #[test]
    fn a_rule_gives_both_roles_and_all_access_unless_it_says_less() {
        let rule = one("name = 'r'\nuids = [1]\ndomains = ['d']").unwrap();
        assert!(rule.roles.driver && rule.roles.device && !rule.create);
        assert_eq!(rule.access, Access::ReadWrite);
        let less = "name = 'r'\ngids = [1]\ndomains = ['d']\nroles = ['device']\naccess = 'read-only'\ncreate = true";
        let rule = one(less).unwrap();
        assert!(!rule.roles.driver && rule.roles.device && rule.create);
        assert_eq!(rule.access, Access::ReadOnly);
    }

    #[test]
    fn what_a_rule_must_have_is_asked_for_by_the_rules_name() {
        let rule = || "r".to_owned();
        for (lines, error) in [
            ("uids = [1]", RuleError::NoName { number: 1 }),
            (
                "name = 'r'\ndomains = ['d']",
                RuleError::NoSelector { rule: rule() },
            ),
            (
                "name = 'r'\nuids = []\ndomains = ['d']",
                RuleError::Empty {
                    rule: rule(),
                    key: "uids",
                },
            ),
            (
                "name = 'r'\nuids = [1]\npod_uids = []\ndomains = ['d']",
                RuleError::Empty {
                    rule: rule(),
                    key: "pod_uids",
                },
            ),
            (
                "name = 'r'\nuids = [1]",
                RuleError::NoDomains { rule: rule() },
            ),
            (
                "name = 'r'\nuids = [1]\ndomains = []",
                RuleError::Empty {
                    rule: rule(),
                    key: "domains",
                },
            ),
            (
                "name = 'r'\nuids = [1]\ndomains = ['d']\nroles = []",
                RuleError::Empty {
                    rule: rule(),
                    key: "roles",
                },
            ),
        ] {
            assert_eq!(one(lines).unwrap_err(), error, "{lines}");
        }
    }

    #[test]
    fn two_rules_of_one_name_are_refused() {
        let same = "[[rules]]\nname = 'r'\nuids = [1]\ndomains = ['d']\n".repeat(2);
        let error = parse(&same).unwrap_err();
        assert_eq!(error, RuleError::SameName { name: "r".into() });
        let error = parse("[[rules]]\nname = 'r s'").unwrap_err();
        assert!(matches!(error, RuleError::BadName { number: 1, .. }));
        assert!(!is_name("") && !is_name("(owner)") && !is_name(&"x".repeat(64)));
    }

    #[test]
    fn a_pod_uid_that_is_none_is_refused_with_rule_and_value() {
        for value in ["0f3c", "0F3C2A91-7d54-4b1e-9c88-3f5be1a2d007", ""] {
            let lines = format!("name = 'r'\npod_uids = ['{value}']\ndomains = ['d']");
            let (rule, value) = ("r".to_owned(), value.to_owned());
            assert_eq!(one(&lines), Err(RuleError::BadPodUid { rule, value }));
        }
        let good = "0f3c2a91-7d54-4b1e-9c88-3f5be1a2d007";
        assert!(
            one(&format!(
                "name = 'r'\npod_uids = ['{good}']\ndomains = ['d']"
            ))
            .is_ok()
        );
    }

    #[test]
    fn a_pattern_that_nothing_can_fit_is_refused() {
        let fits = |value: &str| domain("r", value.to_owned()).is_ok();
        for value in ["d", "disk-*", "*", "**", "?", "*-0", "d*-", "-*"] {
            assert_eq!(fits(value), value != "d*-" && value != "-*", "{value}");
        }
        for value in ["", "Disk", "disk_0", "0*", "disk-", "d[0-9]", "d0/x", "dä"] {
            assert!(!fits(value), "{value}");
        }
        assert!(!fits(&"x".repeat(64)) && fits(&"x".repeat(63)));
        let fits = |value: &str| unit("r", value.to_owned()).is_ok();
        for value in ["spdk.service", "vhost-*", "user@?.service", "*", "a.scope"] {
            assert!(fits(value), "{value}");
        }
        for value in ["", "spdk", "system.slice", "a/b.service", "a b.service"] {
            assert!(!fits(value), "{value}");
        }
    }
}
