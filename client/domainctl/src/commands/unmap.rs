//! `unmap` and `clear-map`: direct mappings that end.

use domain_core::direct::Removed;
use domaind_client::Owner;
use domaind_proto::names::DomainId;
use domaind_proto::v1;

use super::target::{self, Target};
use crate::cli::{ClearMap, Unmap};
use crate::context::Context;
use crate::exit::Exit;
use crate::failure::Failure;
use crate::output::Verdict;
use crate::range;
use domaind_proto::size::human;

pub(super) async fn unmap(args: Unmap, context: &mut Context) -> Result<Exit, Failure> {
    let target = Target::of(args.words)?;
    let ranges = match (args.all, target.things) {
        (true, ranges) if ranges.is_empty() => vec![range::everything()],
        (false, ranges) if !ranges.is_empty() => ranges,
        _ => return Err(Failure::new(Exit::Usage, "name ranges, or --all")),
    };
    let (domain, owner) = owner(target.domain, context).await?;
    let removed = context.within(owner.unmap_direct(&ranges)).await?;
    let answer = v1::UnmapDirectResponse {
        unmapped_mappings: removed.mappings,
        unmapped_bytes: removed.bytes,
        ..v1::UnmapDirectResponse::default()
    };
    let what = format!("unmapped {}", said(removed));
    context.show(&Verdict::new(answer, domain.name(), what))?;
    Ok(Exit::Ok)
}

pub(super) async fn clear(args: ClearMap, context: &mut Context) -> Result<Exit, Failure> {
    let Target {
        domain,
        things: ranges,
    } = Target::of(args.words)?;
    if ranges.is_empty() {
        return Err(Failure::new(Exit::Usage, "name ranges"));
    }
    let (domain, owner) = owner(domain, context).await?;
    let removed = context.within(owner.clear_map(&ranges)).await?;
    let answer = v1::ClearMapResponse {
        removed_mappings: removed.mappings,
        removed_bytes: removed.bytes,
        ..v1::ClearMapResponse::default()
    };
    let what = format!("cleared {}", said(removed));
    context.show(&Verdict::new(answer, domain.name(), what))?;
    Ok(Exit::Ok)
}

async fn owner(named: Option<DomainId>, context: &Context) -> Result<(DomainId, Owner), Failure> {
    let client = context.connect().await?;
    let domain = target::domain(named, &client, context).await?;
    let owner = client.as_owner(&domain);
    Ok((domain, owner))
}

/// `2 mappings (8 KiB)`.
fn said(removed: Removed) -> String {
    let bytes = human(removed.bytes);
    match removed.mappings {
        0 => "no mappings".to_owned(),
        1 => format!("1 mapping ({bytes})"),
        several => format!("{several} mappings ({bytes})"),
    }
}
