//! `update`.

use domaind_proto::v1;

use crate::cli::{Format, Update, UpdateDomain};
use crate::context::Context;
use crate::exit::Exit;
use crate::failure::Failure;
use crate::output::{One, Verdict};

pub(super) async fn run(what: Update, context: &mut Context) -> Result<Exit, Failure> {
    match what {
        Update::Domain(args) => domain(&args, context).await,
    }
}

async fn domain(args: &UpdateDomain, context: &mut Context) -> Result<Exit, Failure> {
    let client = context.connect().await?;
    let request = v1::UpdateDomainRequest {
        name: args.name.name(),
        scrub: args.policy.scrub().into(),
        quotas: Some(args.policy.quotas()),
    };
    let domain = context
        .call(client.domains().update_domain(request))
        .await?;
    match context.format() {
        Format::Wide => context.show(&One::of(domain))?,
        _ => context.show(&Verdict::new(domain, args.name.name(), "updated"))?,
    }
    Ok(Exit::Ok)
}
