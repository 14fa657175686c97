//! Who calls: the peer of the connection, and the session that a token names.

use std::sync::Arc;

use domain_core::direct::Actor;
use domaind_proto::SESSION_METADATA;
use domaind_proto::names::DomainId;
use domaind_proto::v1::{ErrorReason, Refusal};
use tonic::{Code, Request};

use crate::accept::Caller;
use crate::config::Policy;
use crate::hosted::Hosted;
use crate::live::{Live, Token};
use crate::metrics::COUNTS;
use crate::registry::{Missing, Principal, Registry};
use crate::replay::{Fingerprint, Repeatable, Turn};

/// On whose behalf the request is made.
pub(crate) fn principal<T>(request: &Request<T>, policy: &Policy) -> Result<Principal, Refusal> {
    let Caller { peer, door, .. } = caller(request);
    let attested = policy.check_attested(peer);
    attested.inspect_err(|refusal| COUNTS.denied(refusal))?;
    Ok(Principal {
        uid: peer.uid(),
        door: *door,
    })
}

/// The session that the request is made for.
pub(crate) fn session<T>(
    request: &Request<T>,
    registry: &Registry,
    policy: &Policy,
) -> Result<Arc<Live>, Refusal> {
    session_of(request, registry, policy).inspect_err(|refusal| COUNTS.denied(refusal))
}

fn session_of<T>(
    request: &Request<T>,
    registry: &Registry,
    policy: &Policy,
) -> Result<Arc<Live>, Refusal> {
    let peer = &caller(request).peer;
    policy.check_attested(peer)?;
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
    /// It has none: for domains that are its own, or as the operator.
    Owner(Principal),
}

impl Agent {
    /// A token decides, if there is one: who has a session does not act as the
    /// owner by the way.
    pub(crate) fn of<T>(
        request: &Request<T>,
        registry: &Arc<Registry>,
        policy: &Policy,
    ) -> Result<Agent, Refusal> {
        let who = if request.metadata().contains_key(SESSION_METADATA) {
            Who::Session(session(request, registry, policy)?)
        } else {
            Who::Owner(principal(request, policy)?)
        };
        let registry = Arc::clone(registry);
        Ok(Agent { registry, who })
    }

    /// The domain that a request names, and as whom it is used. A session may
    /// leave the name out.
    pub(crate) fn domain(&self, name: &str) -> Result<(Arc<Hosted>, Actor), Refusal> {
        match &self.who {
            Who::Session(live) => {
                let own = &live.domain;
                if !name.is_empty() && DomainId::parse(name)? != own.id {
                    return Err(Missing::Domain(DomainId::parse(name)?).into());
                }
                Ok((Arc::clone(own), Actor::Session(live.id)))
            }
            Who::Owner(who) => {
                let domain = self.registry.domain(*who, &DomainId::parse(name)?)?;
                Ok((domain, Actor::Owner))
            }
        }
    }

    /// See [`Answers::turn`](crate::replay::Answers::turn).
    pub(crate) async fn turn(&self, request: &impl Repeatable) -> Result<Turn, Refusal> {
        match &self.who {
            Who::Session(live) => live.answers.turn(request).await,
            Who::Owner(who) => self.registry.users.turn(*who, request).await,
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
            Who::Owner(who) => self.registry.users.turn_of(*who, id, fingerprint).await,
        }
    }

    /// Whose quota the request counts against.
    pub(crate) fn uid(&self) -> u32 {
        match &self.who {
            Who::Session(live) => live.peer.uid(),
            Who::Owner(who) => who.uid,
        }
    }
}

fn caller<T>(request: &Request<T>) -> &Caller {
    request
        .extensions()
        .get()
        .expect("every connection is accepted by our own loop")
}
