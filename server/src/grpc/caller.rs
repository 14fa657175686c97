//! Who calls: the peer of the connection, and the session that a token names.

use std::sync::Arc;

use domain_core::direct::Actor;
use domaind_proto::SESSION_METADATA;
use domaind_proto::names::DomainId;
use domaind_proto::v1::{ErrorReason, Refusal};
use tonic::{Code, Request};

use crate::accept::Caller;
use crate::audit::{self, Decision, Event, Outcome};
use crate::hosted::Hosted;
use crate::live::{Live, Token};
use crate::peer::Peer;
use crate::registry::{Missing, Registry};
use crate::replay::{Fingerprint, Repeatable, Turn};
use crate::tenant::Tenant;
use crate::terms::InForce;
use crate::visitor::{Need, Visitor};

/// Who makes the request, without a session.
pub(crate) fn visitor<T>(request: &Request<T>, terms: &InForce) -> Result<Visitor, Refusal> {
    let caller = caller(request);
    Visitor::new(caller, terms.get()).inspect_err(|refusal| turned_away(&caller.peer, refusal))
}

/// Somebody who is nobody, or not who its token says.
fn turned_away(peer: &Peer, refusal: &Refusal) {
    audit::record(&Decision {
        event: Event::Call,
        peer,
        domain: None,
        wish: None,
        outcome: Outcome::Denied(refusal),
    });
}

/// The session that the request is made for. Its policy was asked when it was
/// let in, and is not asked again.
pub(crate) fn session<T>(
    request: &Request<T>,
    registry: &Registry,
    terms: &InForce,
) -> Result<Arc<Live>, Refusal> {
    let peer = &caller(request).peer;
    let found = session_of(request, peer, registry).or_else(|refusal| {
        // Who may do nothing here shall hear that first.
        if !peer.is_attested() {
            terms.get().policy.check_attested(peer)?;
        }
        Err(refusal)
    });
    found.inspect_err(|refusal| turned_away(peer, refusal))
}

fn session_of<T>(
    request: &Request<T>,
    peer: &Peer,
    registry: &Registry,
) -> Result<Arc<Live>, Refusal> {
    let text = request.metadata().get(SESSION_METADATA).ok_or_else(|| {
        let message =
            format!("the call acts for a session, and its metadata have no {SESSION_METADATA}");
        Refusal::because(Code::PermissionDenied, ErrorReason::NoSession, message)
    })?;
    let token = Token::from_hex(text.as_bytes()).ok_or_else(|| {
        let message = format!("{SESSION_METADATA} is not a session's token in hexadecimal");
        Refusal::because(Code::InvalidArgument, ErrorReason::Malformed, message)
    })?;
    registry.authenticate(&token, peer)
}

/// Who may change a domain's direct mappings and ask what it shows.
#[derive(Clone, Debug)]
pub(crate) struct Agent {
    pub(crate) registry: Arc<Registry>,
    who: Who,
}

#[derive(Clone, Debug)]
enum Who {
    /// The request has a token: for its own domain, as far as its role goes.
    Session(Arc<Live>),
    /// It has none: for domains that the policy lets it see or manage.
    Visitor(Visitor),
}

impl Agent {
    /// A token decides, if there is one: who has a session does not act as the
    /// owner by the way.
    pub(crate) fn of<T>(
        request: &Request<T>,
        registry: &Arc<Registry>,
        terms: &InForce,
    ) -> Result<Agent, Refusal> {
        let who = if request.metadata().contains_key(SESSION_METADATA) {
            Who::Session(session(request, registry, terms)?)
        } else {
            Who::Visitor(visitor(request, terms)?)
        };
        let registry = Arc::clone(registry);
        Ok(Agent { registry, who })
    }

    /// The domain that a request names, and as whom it is used. A session may
    /// leave the name out, and what it may do there its role says.
    pub(crate) fn domain(&self, name: &str, need: Need) -> Result<(Arc<Hosted>, Actor), Refusal> {
        match &self.who {
            Who::Session(live) => {
                let own = &live.domain;
                if !name.is_empty() && DomainId::parse(name)? != own.id {
                    return Err(Missing::Domain(DomainId::parse(name)?).into());
                }
                Ok((Arc::clone(own), Actor::Session(live.id)))
            }
            Who::Visitor(who) => {
                let domain = who.domain(&self.registry, &DomainId::parse(name)?, need)?;
                Ok((domain, Actor::Owner))
            }
        }
    }

    /// The domain that a request changes, for who only wants to wait for it:
    /// whether the request may be made is said elsewhere.
    pub(crate) fn managed(&self, name: &str) -> Option<Arc<Hosted>> {
        match &self.who {
            Who::Session(live) => Some(Arc::clone(&live.domain)),
            Who::Visitor(who) => who.managed(&self.registry, &DomainId::parse(name).ok()?),
        }
    }

    /// See [`Answers::turn`](crate::replay::Answers::turn).
    pub(crate) async fn turn(&self, request: &impl Repeatable) -> Result<Turn, Refusal> {
        match &self.who {
            Who::Session(live) => live.answers.turn(request).await,
            Who::Visitor(who) => self.registry.users.turn(who.principal(), request).await,
        }
    }

    /// See [`Answers::turn_of`](crate::replay::Answers::turn_of).
    pub(crate) async fn turn_of(
        &self,
        id: &str,
        fingerprint: impl FnOnce() -> Fingerprint,
    ) -> Result<Turn, Refusal> {
        match &self.who {
            Who::Session(live) => live.answers.turn_of(id, fingerprint).await,
            Who::Visitor(who) => {
                let users = &self.registry.users;
                users.turn_of(who.principal(), id, fingerprint).await
            }
        }
    }

    /// Whose quota the request counts against.
    pub(crate) fn tenant(&self) -> Tenant {
        match &self.who {
            Who::Session(live) => live.peer.as_ref().into(),
            Who::Visitor(who) => who.tenant(),
        }
    }
}

fn caller<T>(request: &Request<T>) -> &Caller {
    request
        .extensions()
        .get()
        .expect("every connection is accepted by our own loop")
}
