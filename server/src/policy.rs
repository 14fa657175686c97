//! Who may do what: the rules of the configuration file.
//!
//! A peer gets what all rules that select it give together, one role and access
//! at a time. Whoever owns a domain may do all with it, and so may the operator.
//! Of the others those whom a rule lets near a domain see it (get, list, watch,
//! translate, look up) and attach as the rule says; to manage it (update, delete,
//! evict, change its direct mappings without a session) is not for them.

use std::fmt;

use domain_core::region::Access;
use domain_core::session::Role;
use domaind_proto::names::DomainId;
use domaind_proto::v1::{ErrorReason, Refusal};
use tonic::Code;

use crate::glob::Glob;
use crate::peer::Peer;
use crate::placement::PodUid;

/// Rules that a refusal names at most.
const NAMED: usize = 8;

/// Who is let in, and to what.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Policy {
    /// What holds for peers that no rule selects.
    pub default: Fallback,
    /// Read-only access is given to peers that could undo it, too.
    pub advisory_read_only: bool,
    /// Peers of whom the kernel cannot say who they are or where they run are
    /// served, too, as users without a pod and a unit.
    pub allow_unattested: bool,
    pub(crate) rules: Vec<Rule>,
}

/// What holds without a rule.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Fallback {
    /// Who may connect may create domains, and do all with its own.
    #[default]
    Owner,
    /// Nothing.
    Deny,
}

/// One rule, checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Rule {
    pub(crate) name: String,
    pub(crate) selectors: Selectors,
    /// At least one.
    pub(crate) domains: Vec<Glob>,
    pub(crate) roles: Roles,
    /// The most that it gives.
    pub(crate) access: Access,
    /// May domains of such names be created, too?
    pub(crate) create: bool,
}

/// Whom a rule is for: each list that is there must have the peer in it. At least
/// one is there, and none is empty.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Selectors {
    pub(crate) uids: Option<Vec<u32>>,
    pub(crate) gids: Option<Vec<u32>>,
    pub(crate) pods: Option<Vec<PodUid>>,
    pub(crate) units: Option<Vec<Glob>>,
}

/// Which roles a rule gives; at least one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Roles {
    pub(crate) driver: bool,
    pub(crate) device: bool,
}

/// What somebody wants to be in a domain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Wish {
    pub(crate) role: Role,
    pub(crate) access: Access,
}

impl Selectors {
    fn include(&self, peer: &Peer) -> bool {
        let uid = is_any(&self.uids, |uid| *uid == peer.uid());
        let gid = is_any(&self.gids, |gid| peer.is_in_group(*gid));
        let pod = is_any(&self.pods, |pod| peer.pod() == Some(*pod));
        let unit = is_any(&self.units, |glob| {
            peer.unit().is_some_and(|unit| glob.matches(unit))
        });
        uid && gid && pod && unit
    }
}

/// A list that is not there excludes nobody.
fn is_any<T>(list: &Option<Vec<T>>, is_it: impl Fn(&T) -> bool) -> bool {
    list.as_ref().is_none_or(|list| list.iter().any(is_it))
}

impl Rule {
    fn covers(&self, domain: &DomainId) -> bool {
        self.domains
            .iter()
            .any(|glob| glob.matches(domain.as_str()))
    }

    fn gives(&self, wish: Wish) -> bool {
        let role = match wish.role {
            Role::Driver => self.roles.driver,
            Role::Device => self.roles.device,
        };
        role && (self.access == Access::ReadWrite || wish.access == Access::ReadOnly)
    }
}

impl Policy {
    /// May somebody whom the kernel knows that well be served?
    ///
    /// # Errors
    /// `PERMISSION_DENIED` if not.
    pub(crate) fn check_attested(&self, peer: &Peer) -> Result<(), Refusal> {
        if peer.is_attested() || self.allow_unattested {
            return Ok(());
        }
        let message = format!(
            "the kernel cannot say who {peer} is and where it runs; policy.allow_unattested would let it in"
        );
        Err(Refusal::because(
            Code::PermissionDenied,
            ErrorReason::Unattested,
            message,
        ))
    }

    /// Would the kernel hold this peer to its access? False if not, and it may have
    /// it all the same.
    ///
    /// # Errors
    /// `PERMISSION_DENIED` if it may not.
    pub(crate) fn check_access(&self, peer: &Peer, access: Access) -> Result<bool, Refusal> {
        let enforced = access == Access::ReadWrite || !peer.can_undo_read_only();
        if enforced || self.advisory_read_only {
            return Ok(enforced);
        }
        let message = format!(
            "a read-only grant would not hold against {peer}: it has the daemon's uid, or a capability such as CAP_DAC_OVERRIDE; \
             the daemon's policy.advisory_read_only would allow it unenforced"
        );
        Err(Refusal::because(
            Code::PermissionDenied,
            ErrorReason::Unenforceable,
            message,
        ))
    }

    /// The rules that let a peer near a domain of this name, there or not.
    pub(crate) fn near<'a>(
        &'a self,
        peer: &'a Peer,
        domain: &'a DomainId,
    ) -> impl Iterator<Item = &'a Rule> {
        self.rules_for(peer).filter(|rule| rule.covers(domain))
    }

    /// May the peer create a domain of this name?
    pub(crate) fn lets_create(&self, peer: &Peer, domain: &DomainId) -> bool {
        self.default == Fallback::Owner || self.near(peer, domain).any(|rule| rule.create)
    }

    /// The first rule by which the peer may be that in a domain of this name.
    pub(crate) fn lets_attach(&self, peer: &Peer, domain: &DomainId, wish: Wish) -> Option<&Rule> {
        self.rules
            .iter()
            .find(|rule| rule.selectors.include(peer) && rule.covers(domain) && rule.gives(wish))
    }

    fn rules_for<'a>(&'a self, peer: &'a Peer) -> impl Iterator<Item = &'a Rule> {
        let rules = self.rules.iter();
        rules.filter(|rule| rule.selectors.include(peer))
    }

    /// No rule lets the peer near a domain of this name. Says the same whether
    /// it is there or not.
    pub(crate) fn not_near(&self, peer: &Peer, domain: &DomainId) -> Refusal {
        let rules: Vec<_> = self.rules_for(peer).collect();
        let message = format!(
            "no rule of the daemon's policy lets {peer} near a domain {domain}; {}",
            for_it(&rules)
        );
        not_allowed(message, &rules, domain)
    }

    /// No rule lets the peer create a domain of this name.
    pub(crate) fn no_create(&self, peer: &Peer, domain: &DomainId) -> Refusal {
        let rules: Vec<_> = self.rules_for(peer).collect();
        let message = format!(
            "no rule of the daemon's policy lets {peer} create a domain {domain}; {}",
            for_it(&rules)
        );
        not_allowed(message, &rules, domain)
    }

    /// The rules that let the peer near the domain do not give it that.
    pub(crate) fn no_attach(&self, peer: &Peer, domain: &DomainId, wish: Wish) -> Refusal {
        let rules: Vec<_> = self.near(peer, domain).collect();
        let (role, access) = (role_word(wish.role), access_word(wish.access));
        let message = format!(
            "no rule of the daemon's policy lets {peer} attach to domain {domain} as {role}, {access}; {}",
            for_it(&rules)
        );
        not_allowed(message, &rules, domain)
            .with("role", role)
            .with("access", access)
    }

    /// The peer sees the domain and may not manage it.
    pub(crate) fn no_managing(&self, peer: &Peer, domain: &DomainId) -> Refusal {
        let rules: Vec<_> = self.near(peer, domain).collect();
        let message = format!(
            "to manage domain {domain} is for its owner and the operator, and {peer} is neither; {}",
            for_it(&rules)
        );
        not_allowed(message, &rules, domain)
    }
}

/// What there is for a peer, in words; never what there is for others.
fn for_it(rules: &[&Rule]) -> String {
    if rules.is_empty() {
        return "no rule is for it".to_owned();
    }
    let named: Vec<_> = rules.iter().take(NAMED).map(ToString::to_string).collect();
    let named = named.join("; ");
    match rules.len().saturating_sub(NAMED) {
        0 => format!("for it there is {named}"),
        more => format!("for it there is {named}; and {more} more"),
    }
}

fn not_allowed(message: String, rules: &[&Rule], domain: &DomainId) -> Refusal {
    let names: Vec<_> = rules.iter().take(NAMED).map(|rule| &*rule.name).collect();
    Refusal::because(Code::PermissionDenied, ErrorReason::NotAllowed, message)
        .with("rules", names.join(","))
        .with("domain", domain)
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Rule { name, create, .. } = self;
        let domains: Vec<_> = self.domains.iter().map(ToString::to_string).collect();
        let (domains, roles) = (domains.join(", "), self.roles);
        let access = access_word(self.access);
        let create = if *create { ", may create" } else { "" };
        write!(f, "rule {name:?} ({domains}: {roles}, {access}{create})")
    }
}

impl Rule {
    /// With whom it selects, which is the operator's to know.
    pub(crate) fn in_full(&self) -> String {
        format!("{self} for {}", self.selectors)
    }
}

impl fmt::Display for Selectors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fn list<T: fmt::Display>(key: &str, list: Option<&Vec<T>>) -> Option<String> {
            let words: Vec<_> = list?.iter().map(ToString::to_string).collect();
            Some(format!("{key} {}", words.join(", ")))
        }
        let lists = [
            list("uids", self.uids.as_ref()),
            list("gids", self.gids.as_ref()),
            list("pod_uids", self.pods.as_ref()),
            list("units", self.units.as_ref()),
        ];
        let lists: Vec<_> = lists.into_iter().flatten().collect();
        f.write_str(&lists.join(" and "))
    }
}

impl fmt::Display for Roles {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match (self.driver, self.device) {
            (true, false) => "driver",
            (false, true) => "device",
            _ => "driver or device",
        })
    }
}

impl fmt::Display for Fallback {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Fallback::Owner => "owner",
            Fallback::Deny => "deny",
        })
    }
}

/// As the configuration file and the command line write it.
pub(crate) fn role_word(role: Role) -> &'static str {
    match role {
        Role::Driver => "driver",
        Role::Device => "device",
    }
}

/// As the configuration file and the command line write it.
pub(crate) fn access_word(access: Access) -> &'static str {
    match access {
        Access::ReadOnly => "read-only",
        Access::ReadWrite => "read-write",
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::placement::Placement;

    pub(crate) fn rule(name: &str, domains: &[&str]) -> Rule {
        Rule {
            name: name.to_owned(),
            selectors: Selectors {
                uids: Some(vec![1000]),
                ..Selectors::default()
            },
            domains: domains.iter().map(|glob| Glob::new(glob)).collect(),
            roles: Roles {
                driver: true,
                device: true,
            },
            access: Access::ReadWrite,
            create: false,
        }
    }

    pub(crate) fn deny(rules: &[Rule]) -> Policy {
        Policy {
            default: Fallback::Deny,
            rules: rules.to_vec(),
            ..Policy::default()
        }
    }

    pub(crate) fn id(text: &str) -> DomainId {
        DomainId::new(text).unwrap()
    }

    fn wish(role: Role, access: Access) -> Wish {
        Wish { role, access }
    }

    const POD: &str = "0f3c2a91-7d54-4b1e-9c88-3f5be1a2d007";

    fn peers() -> [Peer; 4] {
        let place = |pod: Option<&str>, unit: Option<&str>, groups: &[u32]| Placement {
            pod: pod.and_then(PodUid::parse),
            container: None,
            unit: unit.map(str::to_owned),
            groups: groups.to_vec(),
        };
        [
            Peer::pretending(1000, 100, Some(place(Some(POD), None, &[4242]))),
            Peer::pretending(1000, 4242, Some(place(None, Some("spdk.service"), &[]))),
            Peer::pretending(2000, 100, Some(place(None, Some("vhost-7.service"), &[7]))),
            Peer::pretending(1000, 100, None),
        ]
    }

    #[test]
    fn every_selector_that_is_given_must_fit_and_of_a_list_any_entry_does() {
        let peers = peers();
        let pod = || Some(vec![PodUid::parse(POD).unwrap()]);
        let units = || {
            Some(vec![
                Glob::new("spdk.service"),
                Glob::new("vhost-*.service"),
            ])
        };
        let (uids, none) = (|uid| Some(vec![3, uid]), Selectors::default);
        let selects = |selectors: Selectors| peers.each_ref().map(|peer| selectors.include(peer));
        let (uids1000, gids) = (uids(1000), Some(vec![4242]));
        assert_eq!(
            selects(Selectors {
                uids: uids1000.clone(),
                ..none()
            }),
            [true, true, false, true]
        );
        assert_eq!(
            selects(Selectors {
                gids: gids.clone(),
                ..none()
            }),
            [true, true, false, false]
        );
        assert_eq!(
            selects(Selectors {
                pods: pod(),
                ..none()
            }),
            [true, false, false, false]
        );
        assert_eq!(
            selects(Selectors {
                units: units(),
                ..none()
            }),
            [false, true, true, false]
        );
        assert_eq!(
            selects(Selectors {
                uids: uids1000,
                gids,
                units: units(),
                ..none()
            }),
            [false, true, false, false]
        );
        assert_eq!(
            selects(Selectors {
                uids: uids(2000),
                pods: pod(),
                ..none()
            }),
            [false; 4]
        );
    }

    #[test]
    fn a_peer_gets_what_each_rule_gives_and_not_the_best_of_both() {
        let [peer, ..] = peers();
        let policy = deny(&[
            Rule {
                roles: Roles {
                    driver: true,
                    device: false,
                },
                access: Access::ReadOnly,
                ..rule("reads", &["d*"])
            },
            Rule {
                roles: Roles {
                    driver: false,
                    device: true,
                },
                ..rule("writes", &["*0"])
            },
        ]);
        let by = |domain, role, access| {
            let rule = policy.lets_attach(&peer, &id(domain), wish(role, access));
            rule.map(|rule| rule.name.as_str())
        };
        use {Access::*, Role::*};
        assert_eq!(by("d0", Driver, ReadOnly), Some("reads"));
        assert_eq!(by("d0", Device, ReadOnly), Some("writes"));
        assert_eq!(by("d0", Device, ReadWrite), Some("writes"));
        assert_eq!(by("d0", Driver, ReadWrite), None);
        assert_eq!(by("d1", Device, ReadOnly), None);
        assert_eq!(by("x0", Driver, ReadOnly), None);
    }

    #[test]
    fn to_create_takes_a_rule_that_says_so_unless_everybody_may() {
        let [peer, _, other, _] = peers();
        let creates = Rule {
            create: true,
            ..rule("creates", &["new-*"])
        };
        let policy = deny(&[rule("uses", &["*"]), creates]);
        assert!(policy.lets_create(&peer, &id("new-1")));
        assert!(!policy.lets_create(&peer, &id("old-1")));
        assert!(!policy.lets_create(&other, &id("new-1")));
        assert!(Policy::default().lets_create(&other, &id("new-1")));
    }

    #[test]
    fn a_refusal_names_the_rules_for_that_peer_and_none_for_others() {
        let [peer, _, other, _] = peers();
        let policy = deny(&[
            rule("storage", &["disk-*", "d?"]),
            Rule {
                selectors: Selectors {
                    uids: Some(vec![1]),
                    ..Selectors::default()
                },
                ..rule("secret", &["*"])
            },
        ]);
        let refusal = policy.not_near(&peer, &id("net-0"));
        assert_eq!(refusal.grpc_code(), Code::PermissionDenied);
        assert_eq!(refusal.reason(), ErrorReason::NotAllowed);
        assert_eq!(refusal.metadata["rules"], "storage");
        let told = "for it there is rule \"storage\" (disk-*, d?: driver or device, read-write)";
        assert!(refusal.message.ends_with(told), "{}", refusal.message);
        let refusal = policy.not_near(&other, &id("net-0"));
        assert!(refusal.message.ends_with("; no rule is for it"));
        assert_eq!(refusal.metadata["rules"], "");
        let read_write = wish(Role::Driver, Access::ReadWrite);
        let refusal = policy.no_attach(&peer, &id("disk-1"), read_write);
        assert_eq!(refusal.metadata["role"], "driver");
        assert_eq!(refusal.metadata["access"], "read-write");
        for refusal in [
            policy.no_create(&peer, &id("disk-1")),
            policy.no_managing(&peer, &id("disk-1")),
        ] {
            assert!(refusal.message.contains("\"storage\""));
            assert!(!refusal.message.contains("secret"));
        }
    }

    #[test]
    fn a_refusal_does_not_grow_with_the_policy() {
        let [peer, ..] = peers();
        let rules: Vec<_> = (0..100)
            .map(|number| rule(&format!("r{number}"), &["x"]))
            .collect();
        let refusal = deny(&rules).not_near(&peer, &id("d0"));
        assert_eq!(refusal.metadata["rules"].split(',').count(), NAMED);
        assert!(refusal.message.ends_with("; and 92 more"));
    }

    #[test]
    fn whom_nothing_is_known_of_is_served_only_if_that_is_allowed() {
        let [known, .., unknown] = peers();
        let mut policy = Policy::default();
        assert!(policy.check_attested(&known).is_ok());
        let refusal = policy.check_attested(&unknown).unwrap_err();
        assert_eq!(refusal.reason(), ErrorReason::Unattested);
        policy.allow_unattested = true;
        assert!(policy.check_attested(&unknown).is_ok());
    }
}
