//! `translate` and `lookup`: what is at an address.

use domain_core::Perm;
use domaind_proto::v1;

use super::target::{self, Target};
use crate::cli::{Lookup, Translate};
use crate::context::Context;
use crate::exit::Exit;
use crate::failure::Failure;
use crate::output::One;

pub(super) async fn translate(args: Translate, context: &mut Context) -> Result<Exit, Failure> {
    let target = Target::of(args.words)?;
    let range = target.range()?;
    let client = context.connect().await?;
    let domain = target::domain(target.domain, &client, context).await?;
    let owner = client.as_owner(&domain);
    let translated = context.within(owner.translate(range, Perm::from(args.want)));
    let translated = translated.await?;
    context.show(&v1::TranslateResponse {
        pieces: translated.pieces.iter().map(Into::into).collect(),
        generation: translated.generation,
    })?;
    Ok(Exit::Ok)
}

pub(super) async fn lookup(args: Lookup, context: &mut Context) -> Result<Exit, Failure> {
    let target = Target::of(args.words)?;
    let range = target.range()?;
    let client = context.connect().await?;
    let domain = target::domain(target.domain, &client, context).await?;
    let found = context
        .within(client.as_owner(&domain).lookup(range))
        .await?;
    context.show(&One::within(&domain.name(), v1::Mapping::from(found)))?;
    Ok(Exit::Ok)
}
