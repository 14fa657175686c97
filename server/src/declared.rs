//! Domains that stand in the configuration file: made before the daemon serves,
//! and brought in line with the file at each reload. None is ever destroyed while
//! it is used.

use domain_core::domain::{Close, UpdateError};
use domaind_proto::names::DomainId;
use domaind_proto::refusal::sentence;

use crate::hosted::Hosted;
use crate::registry::{CreateError, Plan, Registry};
use crate::tenant::Tenant;

/// One domain of the file, checked.
#[derive(Clone, Debug)]
pub(crate) struct Declared {
    pub(crate) plan: Plan,
    /// `None`: the daemon's own user, so that only the operator and those whom
    /// rules let near it reach it.
    pub(crate) owner_uid: Option<u32>,
}

/// A domain that the daemon cannot start with.
#[derive(Debug, thiserror::Error)]
#[error("creating the domain {id} of the configuration file")]
pub(crate) struct NotMade {
    id: DomainId,
    #[source]
    cause: CreateError,
}

/// What came of a reload, by names.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Reconciled {
    pub(crate) created: Vec<DomainId>,
    pub(crate) updated: Vec<DomainId>,
    /// Deleted and made anew, because their layout or their owner is another.
    pub(crate) recreated: Vec<DomainId>,
    pub(crate) deleted: Vec<DomainId>,
    /// Not as the file has them, and why. The next reload tries again.
    pub(crate) kept: Vec<(DomainId, String)>,
}

/// What a domain needs to be as the file has it.
enum Step {
    Nothing,
    Create,
    Update,
    Recreate,
    /// Not possible.
    Keep(String),
}

impl Declared {
    fn owner(&self) -> Tenant {
        let own = || rustix::process::geteuid().as_raw();
        Tenant::user(self.owner_uid.unwrap_or_else(own))
    }

    fn id(&self) -> &DomainId {
        &self.plan.id
    }

    fn step(&self, there: Option<&Hosted>) -> Step {
        let Some(there) = there else {
            return Step::Create;
        };
        if !there.declared {
            let owner = there.owner;
            return Step::Keep(format!("a domain of this name was created by {owner}"));
        }
        if *there.core.layout() != self.plan.layout || there.owner != self.owner() {
            return Step::Recreate;
        }
        match there.core.settings() == self.plan.settings {
            true => Step::Nothing,
            false => Step::Update,
        }
    }
}

/// Makes all of them, or says which one could not be.
pub(crate) fn make_all(registry: &Registry, domains: &[Declared]) -> Result<(), NotMade> {
    for domain in domains {
        let made = registry.declare(domain.owner(), domain.plan.clone());
        made.map_err(|cause| NotMade {
            id: domain.id().clone(),
            cause,
        })?;
        tracing::info!(domain = %domain.id(), owner = %domain.owner(), "declared");
    }
    Ok(())
}

/// Brings what is there in line with the file, as far as that destroys nothing.
/// What the file has no more goes first, and makes room.
pub(crate) fn reconcile(registry: &Registry, domains: &[Declared]) -> Reconciled {
    let mut done = Reconciled::default();
    for there in registry.declared() {
        if domains.iter().any(|domain| *domain.id() == there.id) {
            continue;
        }
        match registry.delete(&there, Close::IfUnused) {
            Ok(_) => done.deleted.push(there.id.clone()),
            Err(in_use) => {
                let why = format!("it is not in the file any more, and in use: {in_use}");
                done.kept.push((there.id.clone(), why));
            }
        }
    }
    for domain in domains {
        bring(registry, domain, &mut done);
    }
    done
}

fn bring(registry: &Registry, domain: &Declared, done: &mut Reconciled) {
    let id = domain.id().clone();
    let there = registry.find(&id);
    let outcome = match (domain.step(there.as_deref()), there) {
        (Step::Nothing, _) => return,
        (Step::Keep(why), _) => Err(why),
        (Step::Update, Some(there)) => update(&there, domain).map(|()| &mut done.updated),
        (Step::Recreate, Some(there)) => {
            recreate(registry, there, domain).map(|()| &mut done.recreated)
        }
        (Step::Create | Step::Update | Step::Recreate, _) => {
            create(registry, domain).map(|()| &mut done.created)
        }
    };
    match outcome {
        Ok(list) => list.push(id),
        Err(why) => done.kept.push((id, why)),
    }
}

fn create(registry: &Registry, domain: &Declared) -> Result<(), String> {
    let made = registry.declare(domain.owner(), domain.plan.clone());
    made.map(drop)
        .map_err(|error| format!("it cannot be created: {}", sentence(&error)))
}

fn update(there: &Hosted, domain: &Declared) -> Result<(), String> {
    let settings = domain.plan.settings.clone();
    let updated = there.core.update(|_| Ok::<_, UpdateError>(settings));
    updated.map_err(|error| format!("it cannot be changed: {}", sentence(&error)))
}

/// Looks first whether the new one finds room: the old one is not given up for
/// one that cannot be.
fn recreate(
    registry: &Registry,
    there: std::sync::Arc<Hosted>,
    domain: &Declared,
) -> Result<(), String> {
    let fits = registry.check_instead_of(&there, &domain.plan);
    fits.map_err(|error| format!("it has no room to be made anew: {}", sentence(&error)))?;
    let deleted = registry.delete(&there, Close::IfUnused);
    deleted.map_err(|in_use| {
        format!("its layout or owner can only change by making it anew, and it is in use: {in_use}")
    })?;
    // Its bytes are given back with it.
    drop(there);
    create(registry, domain)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::budget::Limits;
    use domain_core::aperture::ScrubWith;
    use domain_core::session::{Joining, Role, SessionId};
    use domaind_proto::v1;

    const MIB: u64 = 1 << 20;

    fn registry() -> Registry {
        let limits = Limits {
            all_bytes: 16 * MIB,
            ordinary_bytes: 16 * MIB,
        };
        Registry::new(limits, ScrubWith::Zero)
    }

    fn spec(bounce_bytes: u64) -> v1::DomainSpec {
        v1::DomainSpec {
            bounce_bytes: Some(bounce_bytes),
            coherent_bytes: Some(0),
            ..v1::DomainSpec::default()
        }
    }

    fn domain(name: &str, spec: &v1::DomainSpec) -> Declared {
        Declared {
            plan: Plan::new(DomainId::new(name).unwrap(), spec).unwrap(),
            owner_uid: None,
        }
    }

    fn names(ids: &[DomainId]) -> Vec<&str> {
        ids.iter().map(DomainId::as_str).collect()
    }

    fn id(name: &str) -> DomainId {
        DomainId::new(name).unwrap()
    }

    #[test]
    fn a_domain_that_cannot_be_made_is_named_with_the_reason() {
        let registry = registry();
        let domains = [domain("a", &spec(MIB)), domain("b", &spec(64 * MIB))];
        let error = make_all(&registry, &domains).unwrap_err();
        let told = sentence(&error);
        assert!(told.starts_with("creating the domain b of"), "{told}");
        assert!(told.contains("67108864 bytes of regions"), "{told}");
    }

    #[test]
    fn what_is_new_is_made_what_is_gone_goes_and_the_rest_stays_as_it_is() {
        let registry = registry();
        let old = [domain("a", &spec(MIB)), domain("b", &spec(15 * MIB))];
        make_all(&registry, &old).unwrap();
        let before = registry.find(&id("a")).unwrap().uid.clone();
        // Only when b has gone there is room for c.
        let new = [domain("c", &spec(14 * MIB)), domain("a", &spec(MIB))];
        let done = reconcile(&registry, &new);
        assert_eq!(names(&done.created), ["c"]);
        assert_eq!(names(&done.deleted), ["b"]);
        assert!(done.updated.is_empty() && done.recreated.is_empty() && done.kept.is_empty());
        assert_eq!(registry.find(&id("a")).unwrap().uid, before);
        assert_eq!(reconcile(&registry, &new), Reconciled::default());
    }

    #[test]
    fn settings_change_in_place_and_layouts_by_making_it_anew() {
        let registry = registry();
        make_all(
            &registry,
            &[domain("a", &spec(MIB)), domain("b", &spec(MIB))],
        )
        .unwrap();
        let uid = |name| registry.find(&id(name)).unwrap().uid.clone();
        let (a, b) = (uid("a"), uid("b"));
        let quotas = v1::Quotas {
            sessions: 3,
            ..v1::Quotas::default()
        };
        let changed = v1::DomainSpec {
            quotas: Some(quotas),
            scrub: v1::Scrub::OnUnmap.into(),
            ..spec(MIB)
        };
        let done = reconcile(
            &registry,
            &[domain("a", &changed), domain("b", &spec(2 * MIB))],
        );
        assert_eq!(names(&done.updated), ["a"]);
        assert_eq!(names(&done.recreated), ["b"]);
        let there = registry.find(&id("a")).unwrap();
        assert_eq!(there.core.settings().quotas.sessions, 3);
        assert_eq!(there.uid, a);
        assert_ne!(uid("b"), b);
        let theirs = Declared {
            owner_uid: Some(4711),
            ..domain("b", &spec(2 * MIB))
        };
        let done = reconcile(&registry, &[domain("a", &changed), theirs]);
        assert_eq!(names(&done.recreated), ["b"]);
        assert_eq!(registry.find(&id("b")).unwrap().owner.uid, 4711);
    }

    #[test]
    fn nothing_is_destroyed_while_it_is_used_and_the_next_reload_tries_again() {
        let registry = registry();
        make_all(
            &registry,
            &[domain("a", &spec(MIB)), domain("b", &spec(MIB))],
        )
        .unwrap();
        let used = ["a", "b"].map(|name| registry.find(&id(name)).unwrap());
        for domain in &used {
            domain
                .core
                .join(SessionId::new(1), Joining::from(Role::Driver))
                .unwrap();
        }
        let file = [domain("b", &spec(2 * MIB))];
        let done = reconcile(&registry, &file);
        let [(a, gone), (b, other)] = &done.kept[..] else {
            panic!("{done:?}");
        };
        assert_eq!((a.as_str(), b.as_str()), ("a", "b"));
        assert!(
            gone.contains("not in the file") && gone.contains("1 session"),
            "{gone}"
        );
        assert!(
            other.contains("layout") && other.contains("1 session"),
            "{other}"
        );
        assert!(done.deleted.is_empty() && done.recreated.is_empty());
        for domain in &used {
            domain.core.leave(SessionId::new(1));
        }
        drop(used);
        let done = reconcile(&registry, &file);
        assert_eq!(names(&done.deleted), ["a"]);
        assert_eq!(names(&done.recreated), ["b"]);
    }

    #[test]
    fn the_old_one_is_not_given_up_for_one_that_finds_no_room() {
        let registry = registry();
        make_all(
            &registry,
            &[domain("a", &spec(8 * MIB)), domain("b", &spec(6 * MIB))],
        )
        .unwrap();
        let done = reconcile(
            &registry,
            &[domain("a", &spec(12 * MIB)), domain("b", &spec(6 * MIB))],
        );
        assert_eq!(done.kept.len(), 1);
        assert!(done.kept[0].1.contains("no room"), "{}", done.kept[0].1);
        let there = registry.find(&id("a")).unwrap();
        assert_eq!(there.core.layout().region_bytes(), 8 * MIB);
    }

    #[test]
    fn a_name_that_somebody_has_taken_stays_theirs() {
        let registry = registry();
        let plan = domain("a", &spec(MIB)).plan;
        registry.create(Tenant::user(4711), plan).unwrap();
        let done = reconcile(&registry, &[domain("a", &spec(MIB))]);
        assert!(done.kept[0].1.contains("user 4711"), "{done:?}");
        assert!(!registry.find(&id("a")).unwrap().declared);
        // And goes with nobody's file.
        assert_eq!(reconcile(&registry, &[]), Reconciled::default());
    }
}
