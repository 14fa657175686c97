//! `alloc` and `free`: coherent memory that belongs to its domain.
//!
//! Only drivers may, so each becomes one for the length of the call.

use domain_core::addr::Iova;
use domain_core::alloc::AllocRequest;
use domain_core::coherent::CoherentSpec;
use domain_core::mapping::MappingId;
use domaind_proto::v1;

use super::driver;
use crate::cli::{Alloc, Free};
use crate::context::Context;
use crate::exit::Exit;
use crate::failure::Failure;
use crate::output::{One, Verdict};

pub(super) async fn alloc(args: Alloc, context: &mut Context) -> Result<Exit, Failure> {
    let session = driver::attach(&args.domain, context).await?;
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
    driver::leave(session, context).await;
    Ok(Exit::Ok)
}

pub(super) async fn free(args: Free, context: &mut Context) -> Result<Exit, Failure> {
    let session = driver::attach(&args.domain, context).await?;
    let (iova, id) = (Iova::new(args.iova), MappingId::new(args.id));
    context.within(session.free_coherent(iova, id)).await?;
    let name = format!("{}/mappings/{id}", args.domain.name());
    let answer = v1::FreeCoherentResponse::default();
    context.show(&Verdict::new(answer, name, "freed"))?;
    driver::leave(session, context).await;
    Ok(Exit::Ok)
}
