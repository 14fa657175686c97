//! Who comes without a session, and what the policy in force gives them.

use std::sync::Arc;

use domain_core::session::SessionId;
use domaind_proto::names::DomainId;
use domaind_proto::v1::Refusal;

use crate::accept::Caller;
use crate::audit::{self, Decision, Event, Outcome};
use crate::hosted::Hosted;
use crate::live::Live;
use crate::peer::Peer;
use crate::policy::{Fallback, Policy, Wish};
use crate::registry::{Door, Missing, Principal, Registry};
use crate::tenant::Tenant;
use crate::terms::Terms;

/// Why somebody is let in whom no rule has to let in. No rule has such a name.
const BY_OWNERSHIP: &str = "(owner)";
const BY_OFFICE: &str = "(operator)";

/// Somebody at a door, with the terms of the moment when it came.
#[derive(Clone, Debug)]
pub(crate) struct Visitor {
    peer: Arc<Peer>,
    door: Door,
    terms: Arc<Terms>,
}

/// What somebody wants of a domain that is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Need {
    /// Look at it.
    See,
    /// Change or end it, or what is in it.
    Manage,
}

/// A domain that somebody may attach to, and by which rule.
#[derive(Debug)]
pub(crate) struct Leave {
    pub(crate) domain: Arc<Hosted>,
    pub(crate) rule: String,
}

impl Visitor {
    /// # Errors
    /// `PERMISSION_DENIED` for a peer that the kernel does not know well enough.
    pub(crate) fn new(caller: &Caller, terms: Arc<Terms>) -> Result<Visitor, Refusal> {
        let visitor = Visitor {
            peer: Arc::clone(&caller.peer),
            door: caller.door,
            terms,
        };
        visitor.policy().check_attested(&visitor.peer)?;
        Ok(visitor)
    }

    /// Would a session that is attached be let in now as what it is?
    ///
    /// # Errors
    /// What it would be told if not.
    pub(crate) fn check_attached(live: &Live, terms: &Arc<Terms>) -> Result<(), Refusal> {
        let visitor = Visitor {
            peer: Arc::clone(&live.peer),
            door: Door::Public,
            terms: Arc::clone(terms),
        };
        let policy = visitor.policy();
        policy.check_attested(&live.peer)?;
        let wish = Wish {
            role: live.role,
            access: live.access,
        };
        visitor.rule_to_attach(&live.domain, wish)?;
        policy.check_access(&live.peer, live.access).map(drop)
    }

    /// Whose quotas and answers are touched.
    pub(crate) fn principal(&self) -> Principal {
        Principal {
            tenant: self.tenant(),
            door: self.door,
        }
    }

    pub(crate) fn tenant(&self) -> Tenant {
        self.peer.as_ref().into()
    }

    fn policy(&self) -> &Policy {
        &self.terms.policy
    }

    /// May it do all with this domain?
    pub(crate) fn may_manage(&self, domain: &Hosted) -> bool {
        self.door == Door::Admin || self.stands_as_owner(domain)
    }

    /// Whose domain it is may do all with it. Where nothing is given without a
    /// rule that takes the rule by which it was made, or the configuration file
    /// that says whose it is.
    fn stands_as_owner(&self, domain: &Hosted) -> bool {
        self.tenant() == domain.owner
            && match domain.declared {
                true => !self.may_only_look_like_us(),
                false => self.policy().lets_create(&self.peer, &domain.id),
            }
    }

    /// Of our uid, and nobody can tell where: in uid mode a pod may run as any uid,
    /// and ours is a common one. What is declared for us is not for it.
    fn may_only_look_like_us(&self) -> bool {
        !self.peer.is_attested() && self.peer.uid() == rustix::process::geteuid().as_raw()
    }

    /// May it know that this domain is there?
    pub(crate) fn may_see(&self, domain: &Hosted) -> bool {
        self.may_manage(domain) || self.is_near(&domain.id)
    }

    fn is_near(&self, id: &DomainId) -> bool {
        self.policy().near(&self.peer, id).next().is_some()
    }

    /// The domain of a name, for somebody who needs that of it.
    ///
    /// # Errors
    /// `NOT_FOUND` if it is not there, or must not be known to be;
    /// `PERMISSION_DENIED` for whom the policy denies it.
    pub(crate) fn domain(
        &self,
        registry: &Registry,
        id: &DomainId,
        need: Need,
    ) -> Result<Arc<Hosted>, Refusal> {
        let found = registry.find(id);
        let refusal = match found {
            Some(domain) if self.may(need, &domain) => return Ok(domain),
            Some(domain) if self.may_see(&domain) => self.policy().no_managing(&self.peer, id),
            // Nobody is denied what is not there.
            None if self.knows_names(id) => return Err(Missing::Domain(id.clone()).into()),
            _ => self.hidden(id),
        };
        self.denied(Event::Call, Some(id), &refusal);
        Err(refusal)
    }

    /// As [`domain`](Visitor::domain), where nobody is told of a refusal.
    pub(crate) fn managed(&self, registry: &Registry, id: &DomainId) -> Option<Arc<Hosted>> {
        registry.find(id).filter(|domain| self.may_manage(domain))
    }

    fn may(&self, need: Need, domain: &Hosted) -> bool {
        match need {
            Need::See => self.may_see(domain),
            Need::Manage => self.may_manage(domain),
        }
    }

    /// May it be told that there is no domain of this name?
    fn knows_names(&self, id: &DomainId) -> bool {
        self.door == Door::Admin || self.policy().default == Fallback::Owner || self.is_near(id)
    }

    /// What is said of a domain that must not be known to be there: the same as
    /// if it were not.
    fn hidden(&self, id: &DomainId) -> Refusal {
        match self.knows_names(id) {
            true => Missing::Domain(id.clone()).into(),
            false => self.policy().not_near(&self.peer, id),
        }
    }

    /// May it create a domain of this name?
    ///
    /// # Errors
    /// `PERMISSION_DENIED` if not.
    pub(crate) fn check_create(&self, id: &DomainId) -> Result<(), Refusal> {
        if self.door == Door::Admin || self.policy().lets_create(&self.peer, id) {
            return Ok(());
        }
        let refusal = self.policy().no_create(&self.peer, id);
        self.denied(Event::Create, Some(id), &refusal);
        Err(refusal)
    }

    /// The domain of a name, for somebody who wants to be that in it. Refusals
    /// are for the caller to write down.
    ///
    /// # Errors
    /// As [`domain`](Visitor::domain).
    pub(crate) fn to_attach(
        &self,
        registry: &Registry,
        id: &DomainId,
        wish: Wish,
    ) -> Result<Leave, Refusal> {
        let Some(domain) = registry.find(id) else {
            return Err(self.hidden(id));
        };
        let rule = self.rule_to_attach(&domain, wish)?.to_owned();
        Ok(Leave { domain, rule })
    }

    /// By which rule it may be that in a domain.
    ///
    /// # Errors
    /// As [`domain`](Visitor::domain).
    pub(crate) fn rule_to_attach(&self, domain: &Hosted, wish: Wish) -> Result<&str, Refusal> {
        if self.door == Door::Admin {
            return Ok(BY_OFFICE);
        }
        if self.stands_as_owner(domain) {
            return Ok(BY_OWNERSHIP);
        }
        match self.policy().lets_attach(&self.peer, &domain.id, wish) {
            Some(rule) => Ok(&rule.name),
            None if self.may_see(domain) => {
                Err(self.policy().no_attach(&self.peer, &domain.id, wish))
            }
            None => Err(self.hidden(&domain.id)),
        }
    }

    /// A session, attached or ended, of a domain that it may see.
    ///
    /// # Errors
    /// `NOT_FOUND`, also of one that it may not know to be there.
    pub(crate) fn session(&self, registry: &Registry, id: SessionId) -> Result<Arc<Live>, Refusal> {
        self.seen(registry.session(id), id)
    }

    /// A session that has not ended, of a domain that it may manage.
    ///
    /// # Errors
    /// `NOT_FOUND`; `PERMISSION_DENIED` if it may only see it.
    pub(crate) fn session_to_end(
        &self,
        registry: &Registry,
        id: SessionId,
    ) -> Result<Arc<Live>, Refusal> {
        let live = self.seen(registry.attached(id), id)?;
        if self.may_manage(&live.domain) {
            return Ok(live);
        }
        let domain = &live.domain.id;
        let refusal = self.policy().no_managing(&self.peer, domain);
        self.denied(Event::Call, Some(domain), &refusal);
        Err(refusal)
    }

    fn seen(&self, found: Option<Arc<Live>>, id: SessionId) -> Result<Arc<Live>, Refusal> {
        let missing = || Refusal::from(Missing::Session(id));
        let live = found.ok_or_else(missing)?;
        if self.may_see(&live.domain) {
            return Ok(live);
        }
        let refusal = missing();
        self.denied(Event::Call, Some(&live.domain.id), &refusal);
        Err(refusal)
    }

    fn denied(&self, event: Event, domain: Option<&DomainId>, refusal: &Refusal) {
        audit::record(&Decision {
            event,
            peer: &self.peer,
            domain,
            wish: None,
            outcome: Outcome::Denied(refusal),
        });
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use domain_core::aperture::ScrubWith;
    use domaind_proto::v1;

    use super::*;
    use crate::budget::Limits;
    use crate::placement::Placement;
    use crate::registry::Plan;

    const MIB: u64 = 1 << 20;

    fn visitor(uid: u32, placement: Option<Placement>) -> Visitor {
        let policy = Policy {
            allow_unattested: true,
            ..Policy::default()
        };
        Visitor {
            peer: Arc::new(Peer::pretending(uid, uid, placement)),
            door: Door::Public,
            terms: Arc::new(Terms {
                policy,
                ack_timeout: Duration::from_secs(1),
            }),
        }
    }

    fn declared(owner_uid: u32) -> Arc<Hosted> {
        let limits = Limits {
            all_bytes: 4 * MIB,
            ordinary_bytes: 4 * MIB,
        };
        let spec = v1::DomainSpec {
            bounce_bytes: Some(MIB),
            coherent_bytes: Some(0),
            ..v1::DomainSpec::default()
        };
        let plan = Plan::new(DomainId::new("d0").unwrap(), &spec).unwrap();
        let registry = Registry::new(limits, ScrubWith::Zero);
        registry.declare(Tenant::user(owner_uid), plan).unwrap()
    }

    #[test]
    fn a_uid_like_ours_of_somebody_who_cannot_be_placed_owns_nothing_that_is_declared() {
        let own_uid = rustix::process::geteuid().as_raw();
        let known = Some(Placement::default());
        let ours = declared(own_uid);
        assert!(visitor(own_uid, known.clone()).may_manage(&ours));
        assert!(!visitor(own_uid, None).may_see(&ours));
        // Whom the file names is meant, in uid mode, too.
        let theirs = declared(own_uid + 4711);
        assert!(visitor(own_uid + 4711, None).may_manage(&theirs));
        assert!(!visitor(own_uid, known).may_see(&theirs));
    }
}
