//! `create`.

use domain_core::addr::{Granule, IovaRange};
use domain_core::region::driver_memfd;
use domaind_proto::v1;

use super::driver;
use crate::cli::{Create, CreateDomain, CreateMemory, Format};
use crate::context::Context;
use crate::exit::Exit;
use crate::failure::Failure;
use crate::output::{One, Verdict};

pub(super) async fn run(what: Create, context: &mut Context) -> Result<Exit, Failure> {
    match what {
        Create::Domain(args) => domain(args, context).await,
        Create::Memory(args) => memory(args, context).await,
    }
}

/// With `-o wide` it shows the domain as it came out: sizes are rounded up.
async fn domain(args: CreateDomain, context: &mut Context) -> Result<Exit, Failure> {
    let what = match args.dry_run {
        true => "created (dry run)",
        false => "created",
    };
    let client = context.connect().await?;
    let request = request(&args);
    let domain = context
        .call(client.domains().create_domain(request))
        .await?;
    match context.format() {
        Format::Wide => context.show(&One::of(domain))?,
        _ => context.show(&Verdict::new(domain, args.name.name(), what))?,
    }
    Ok(Exit::Ok)
}

/// The daemon keeps it; what this process has of it goes with the process.
async fn memory(args: CreateMemory, context: &mut Context) -> Result<Exit, Failure> {
    // What cannot be rounded up is refused by its unrounded length.
    let size_bytes = args.size_bytes;
    let size_bytes = Granule::Size4K.round_up(size_bytes).unwrap_or(size_bytes);
    let session = driver::attach(&args.domain, context).await?;
    let memfd = driver_memfd("domainctl-memory", size_bytes)
        .map_err(|error| Failure::of(Exit::Error, &error))?;
    let register = session.register_persistent(memfd, !args.read_only);
    let memory = context.within(register).await?;
    let answer = v1::MemoryRegistered {
        memory_id: memory.id().get(),
        size_bytes: memory.len_bytes(),
    };
    let name = format!("{}/memories/{}", args.domain.name(), memory.id());
    context.show(&Verdict::new(answer, name, "created"))?;
    driver::leave(session, context).await;
    Ok(Exit::Ok)
}

pub(super) fn wire_ranges(ranges: &[IovaRange]) -> Vec<v1::IovaRange> {
    ranges.iter().copied().map(Into::into).collect()
}

fn request(args: &CreateDomain) -> v1::CreateDomainRequest {
    let backing = args.backing.map(v1::Backing::from).unwrap_or_default();
    let spec = v1::DomainSpec {
        bounce_bytes: args.bounce_bytes,
        coherent_bytes: args.coherent_bytes,
        iova_limit: args.iova_limit,
        aperture_base: args.aperture_base,
        granule_bytes: args.granule_bytes.unwrap_or(0),
        backing: backing.into(),
        scrub: args.policy.scrub().into(),
        quotas: Some(args.policy.quotas()),
        reserved: wire_ranges(&args.reserved),
        allowed: wire_ranges(&args.allowed),
    };
    v1::CreateDomainRequest {
        domain_id: args.name.to_string(),
        spec: Some(spec),
        validate_only: args.dry_run,
        request_id: String::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::{Cli, Command};
    use clap::Parser;

    fn request_of(line: &str) -> v1::CreateDomainRequest {
        let words = ["domainctl", "create", "domain"].into_iter();
        let cli = Cli::parse_from(words.chain(line.split_whitespace()));
        match cli.command {
            Command::Create(Create::Domain(args)) => request(&args),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn what_is_not_named_stays_unset() {
        let request = request_of("d0");
        let spec = v1::DomainSpec {
            quotas: Some(v1::Quotas::default()),
            ..v1::DomainSpec::default()
        };
        assert_eq!(
            (request.domain_id.as_str(), request.spec),
            ("d0", Some(spec))
        );
        assert!(!request.validate_only);
    }

    #[test]
    fn what_is_named_reaches_the_request() {
        let request = request_of(
            "d0 --bounce 1GiB --coherent 0 --iova-limit 0xffffffff --aperture-base 64K \
             --granule 64KiB --backing hugetlb-2m --scrub on-unmap --quota-sessions 3 \
             --quota-direct 4 --reserve 0x1000+4KiB,0x3000+4KiB --reserve 1GiB+1 \
             --allow 0x100000-0x1fffff --dry-run",
        );
        let spec = request.spec.unwrap();
        assert_eq!(
            (spec.bounce_bytes, spec.coherent_bytes),
            (Some(1 << 30), Some(0))
        );
        assert_eq!(spec.iova_limit, Some(u64::from(u32::MAX)));
        assert_eq!((spec.aperture_base, spec.granule_bytes), (65536, 65536));
        assert_eq!(spec.backing(), v1::Backing::Hugetlb2m);
        assert_eq!(spec.scrub(), v1::Scrub::OnUnmap);
        let quotas = spec.quotas.unwrap();
        assert_eq!((quotas.sessions, quotas.direct), (3, 4));
        assert_eq!((spec.reserved.len(), spec.allowed.len()), (3, 1));
        assert_eq!(spec.allowed[0].last, 0x1f_ffff);
        assert!(request.validate_only);
    }
}
