//! `alloc` and `free`: coherent memory that belongs to its domain.
//!
//! Only drivers may, so each becomes one for the length of the call.

use domain_core::addr::Iova;
use domain_core::alloc::AllocRequest;
use domain_core::coherent::CoherentSpec;
use domain_core::mapping::MappingId;
use domain_core::region::Access;
use domain_core::session::Role;
use domaind_client::Session;
use domaind_proto::names::DomainId;
use domaind_proto::v1;

use crate::cli::{Alloc, Free};
use crate::context::Context;
use crate::exit::Exit;
use crate::failure::Failure;
use crate::output::{One, Verdict};

pub(super) async fn alloc(args: Alloc, context: &mut Context) -> Result<Exit, Failure> {
    let session = attach(&args.domain, context).await?;
    let spec = CoherentSpec {
        place: AllocRequest {
            len_bytes: args.len_bytes,
            align_bytes: args.align_bytes,
            limit: args.limit.map(Iova::new),
        },
        // Else it would end with this process.
        persistent: true,
    };
    let kept = context.within(session.alloc_coherent(spec)).await?;
    let allocated = v1::AllocCoherentResponse {
        mapping_id: kept.id().get(),
        iova: kept.iova().get(),
        len_bytes: kept.len_bytes(),
    };
    context.show(&One::within(&args.domain.name(), allocated))?;
    leave(session, context).await;
    Ok(Exit::Ok)
}

pub(super) async fn free(args: Free, context: &mut Context) -> Result<Exit, Failure> {
    let session = attach(&args.domain, context).await?;
    let (iova, id) = (Iova::new(args.iova), MappingId::new(args.id));
    context.within(session.free_coherent(iova, id)).await?;
    let name = format!("{}/mappings/{id}", args.domain.name());
    let answer = v1::FreeCoherentResponse {};
    context.show(&Verdict::new(answer, name, "freed"))?;
    leave(session, context).await;
    Ok(Exit::Ok)
}

async fn attach(domain: &DomainId, context: &Context) -> Result<Session, Failure> {
    let client = context.connect().await?;
    context
        .within(client.attach(domain, Role::Driver, Access::ReadWrite))
        .await
}

/// Ends the session in order. What was done stays done if that fails, and the
/// session ends with this process anyhow.
async fn leave(session: Session, context: &Context) {
    let _ = context.within(session.detach()).await;
}
