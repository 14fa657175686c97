//! Room that is about to be free: who finds none waits until what was removed is
//! acknowledged, and tries once more.

use std::sync::Arc;

use domain_core::session::Removal;
use domaind_proto::Message;
use domaind_proto::v1::{ErrorReason, Refusal};

use crate::live::Live;
use crate::replay::{Repeatable, Turn};
use crate::settle;

/// Maps, leases or allocates; if there is no room, once more when what was
/// removed is acknowledged.
pub(super) async fn finding<Q: Repeatable, R: Message + Default>(
    session: &Arc<Live>,
    request: &Q,
    turn: Turn,
    mut work: impl FnMut(&Live, &Q) -> Result<R, Refusal>,
) -> Result<R, Refusal> {
    let first = turn.take(|| work(session, request));
    match awaited(session, &first) {
        Some(removal) => once_more(session, request, removal, work).await,
        None => first,
    }
}

/// The removal that makes room for what was just refused for want of it.
pub(super) fn awaited<R>(session: &Live, first: &Result<R, Refusal>) -> Option<Removal> {
    let is_full = |refusal: &Refusal| refusal.reason() == ErrorReason::NoSpace;
    match first.as_ref().is_err_and(is_full) {
        true => session.domain.core.awaits_iovas(),
        false => None,
    }
}

/// Waits for a removal, and tries again. Cancelling leaves all as it was.
pub(super) async fn once_more<Q: Repeatable, R: Message + Default>(
    session: &Arc<Live>,
    request: &Q,
    removal: Removal,
    mut work: impl FnMut(&Live, &Q) -> Result<R, Refusal>,
) -> Result<R, Refusal> {
    // Whatever came of it: there is more room, or there is not.
    let _ = settle::acknowledged(&session.domain, removal.generation).await;
    let turn = session.answers.turn(request).await?;
    turn.take(|| work(session, request))
}
