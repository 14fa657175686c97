//! Who calls: the peer of the connection, and the session that a token names.

use std::sync::Arc;

use domaind_proto::SESSION_METADATA;
use domaind_proto::v1::{ErrorReason, Refusal};
use tonic::{Code, Request};

use crate::accept::Caller;
use crate::config::Policy;
use crate::live::{Live, Token};
use crate::registry::{Principal, Registry};

/// On whose behalf the request is made.
pub(crate) fn principal<T>(request: &Request<T>, policy: &Policy) -> Result<Principal, Refusal> {
    let Caller { peer, door } = caller(request);
    policy.check_attested(peer)?;
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

fn caller<T>(request: &Request<T>) -> &Caller {
    request
        .extensions()
        .get()
        .expect("every connection is accepted by our own loop")
}
