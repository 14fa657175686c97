//! `update`.

use domain_core::addr::IovaRange;
use domaind_proto::v1;

use super::create::wire_ranges;
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
    let request = request(args);
    let domain = context
        .call(client.domains().update_domain(request))
        .await?;
    match context.format() {
        Format::Wide => context.show(&One::of(domain))?,
        _ => context.show(&Verdict::new(domain, args.name.name(), "updated"))?,
    }
    Ok(Exit::Ok)
}

fn request(args: &UpdateDomain) -> v1::UpdateDomainRequest {
    v1::UpdateDomainRequest {
        name: args.name.name(),
        scrub: args.policy.scrub().into(),
        quotas: Some(args.policy.quotas()),
        reserved: list(&args.reserved, args.clear_reserved),
        allowed: list(&args.allowed, args.clear_allowed),
        request_id: String::new(),
    }
}

/// What is not named stays, which is not the same as an empty list.
fn list(ranges: &[IovaRange], clear: bool) -> Option<v1::IovaRangeList> {
    let ranges = wire_ranges(ranges);
    (clear || !ranges.is_empty()).then_some(v1::IovaRangeList { ranges })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::{Cli, Command};
    use clap::Parser;

    fn request_of(line: &str) -> v1::UpdateDomainRequest {
        let words = ["domainctl", "update", "domain", "d0"].into_iter();
        let cli = Cli::parse_from(words.chain(line.split_whitespace()));
        match cli.command {
            Command::Update(Update::Domain(args)) => request(&args),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_list_stays_unless_it_is_named_or_cleared() {
        let request = request_of("--scrub on-map --quota-lease-bytes none");
        assert_eq!(request.quotas.unwrap().lease_bytes, u64::MAX);
        assert_eq!((request.reserved, request.allowed), (None, None));
        let request = request_of("--reserve 0x1000+4KiB --clear-allowed");
        let page = v1::IovaRange {
            start: 0x1000,
            last: 0x1fff,
        };
        let reserved = v1::IovaRangeList { ranges: vec![page] };
        assert_eq!(request.reserved, Some(reserved));
        assert_eq!(request.allowed, Some(v1::IovaRangeList::default()));
    }
}
