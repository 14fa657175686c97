//! `map`.

use domain_core::addr::Iova;
use domain_core::direct::{DirectSpec, Placement};
use domain_core::memory::MemoryId;
use domaind_proto::v1;

use super::target;
use crate::cli::Map;
use crate::context::Context;
use crate::exit::Exit;
use crate::failure::Failure;
use crate::output::One;

pub(super) async fn run(args: Map, context: &mut Context) -> Result<Exit, Failure> {
    let (named, memory) = target::of_thing(args.domain.clone(), args.memory.clone())?;
    let spec = spec(&args, memory);
    let client = context.connect().await?;
    let domain = target::domain(named, &client, context).await?;
    let owner = client.as_owner(&domain);
    let mapped = context.within(owner.map_direct(spec)).await?;
    context.show(&One::of(v1::DirectMapping::from(&mapped)))?;
    Ok(Exit::Ok)
}

fn spec(args: &Map, memory: MemoryId) -> DirectSpec {
    let placement = match args.iova {
        Some(iova) => Placement::At(Iova::new(iova)),
        None => Placement::Anywhere {
            align_bytes: args.align_bytes.unwrap_or(0),
            limit: args.limit.map(Iova::new),
        },
    };
    DirectSpec {
        memory,
        offset: args.offset,
        len_bytes: args.len_bytes,
        perm: args.perm.into(),
        placement,
    }
}
