//! Being a driver, for the length of a call that only drivers may make.

use domain_core::region::Access;
use domain_core::session::Role;
use domaind_client::Session;
use domaind_proto::names::DomainId;

use crate::context::Context;
use crate::failure::Failure;

pub(super) async fn attach(domain: &DomainId, context: &Context) -> Result<Session, Failure> {
    let client = context.connect().await?;
    context
        .within(client.attach(domain, Role::Driver, Access::ReadWrite))
        .await
}

/// Ends the session in order. What was done stays done if that fails, and the
/// session ends with this process anyhow.
pub(super) async fn leave(session: Session, context: &Context) {
    let _ = context.within(session.detach()).await;
}
