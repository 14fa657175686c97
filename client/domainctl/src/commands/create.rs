//! `create`.

use std::future::{Future, ready};
use std::pin::pin;
use std::time::Duration;

use domain_core::addr::{Granule, IovaRange};
use domain_core::region::driver_memfd;
use domaind_client::{Error, Memory, Session};
use domaind_proto::names::DomainId;
use domaind_proto::v1;

use super::driver;
use crate::cli::{Create, CreateDomain, CreateMemory, Format};
use crate::context::Context;
use crate::exit::Exit;
use crate::failure::{Failure, remark};
use crate::output::{One, Verdict};
use crate::signals::Signals;
use domaind_proto::size::human;

/// Memory that nobody learned of has so long to go away again.
const TAKE_BACK_LIMIT: Duration = Duration::from_secs(5);

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
/// Memory whose id is not out would serve nobody, and is taken back.
async fn memory(args: CreateMemory, context: &mut Context) -> Result<Exit, Failure> {
    let session = driver::attach(&args.domain, context).await?;
    let size_bytes = rounded_up(args.size_bytes, session.granule());
    let memfd = driver_memfd("domainctl-memory", size_bytes)
        .map_err(|error| Failure::of(Exit::Error, &error))?;
    // Up to here a signal may kill us; from here on there is something to clean up.
    let mut signals = Signals::new().map_err(|error| Failure::of(Exit::Error, &error))?;
    let given_up = given_up(&mut signals, context);
    let registering = session.register_persistent(memfd, !args.read_only);
    let memory = registered(&session, registering, given_up).await?;
    if let Err(failure) = show_memory(&memory, &args.domain, context) {
        take_back(&session, ready(Ok(memory))).await;
        return Err(failure);
    }
    driver::leave(session, context).await;
    Ok(Exit::Ok)
}

/// What cannot be rounded up is refused by its unrounded length.
fn rounded_up(size_bytes: u64, granule: Granule) -> u64 {
    granule.round_up(size_bytes).unwrap_or(size_bytes)
}

/// Resolves when nobody waits any longer.
async fn given_up(signals: &mut Signals, context: &Context) -> Failure {
    tokio::select! {
        signal = signals.any() => Failure::new(Exit::Error, signal),
        late = context.late() => late,
    }
}

/// The memory, unless it is given up first.
async fn registered(
    session: &Session,
    registering: impl Future<Output = Result<Memory, Error>>,
    given_up: impl Future<Output = Failure>,
) -> Result<Memory, Failure> {
    let mut registering = pin!(registering);
    let failure = tokio::select! {
        biased; // an answer that came says what there is
        registered = registering.as_mut() => return Ok(registered?),
        failure = given_up => failure,
    };
    take_back(session, registering).await;
    Err(failure)
}

/// Waits for the answer even now: a call that is dropped undoes itself only as
/// long as the session lives, and it would end with this process.
async fn take_back(session: &Session, registering: impl Future<Output = Result<Memory, Error>>) {
    let taking = async {
        match registering.await {
            Ok(memory) => session.unregister(memory).await,
            Err(Error::Refused(_)) => Ok(()),
            Err(other) => Err(other),
        }
    };
    let taken = tokio::time::timeout(TAKE_BACK_LIMIT, taking).await;
    if !matches!(taken, Ok(Ok(()))) {
        let domain = session.domain();
        remark(&format!(
            "the memory may have stayed: `domainctl get memories {domain}` shows it"
        ));
    }
}

/// Succeeds when the id is out.
fn show_memory(memory: &Memory, domain: &DomainId, context: &mut Context) -> Result<(), Failure> {
    let answer = v1::MemoryRegistered {
        memory_id: memory.id().get(),
        size_bytes: memory.len_bytes(),
    };
    let name = format!("{}/memories/{}", domain.name(), memory.id());
    let what = format!("created ({})", human(memory.len_bytes()));
    context.show(&Verdict::new(answer, name, what))?;
    context.flush()
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
    use domain_core::region::Access;
    use domain_core::session::Role;
    use domaind_client::Client;
    use domaind_proto::paths::RuntimeDir;
    use domaind_server::{Config, Daemon};
    use rustix::process::{Signal, getpid, kill_process};
    use tempfile::TempDir;

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
             --quota-direct 4 --quota-leases 5 --quota-lease-bytes 64KiB --reserve 0x1000+4KiB,0x3000+4KiB --reserve 1GiB+1 \
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
        assert_eq!((quotas.leases, quotas.lease_bytes), (5, 65536));
        assert_eq!((spec.reserved.len(), spec.allowed.len()), (3, 1));
        assert_eq!(spec.allowed[0].last, 0x1f_ffff);
        assert!(request.validate_only);
    }

    #[test]
    fn memory_is_as_large_as_its_domain_can_map() {
        assert_eq!(rounded_up(1 << 20, Granule::Size2M), 2 << 20);
        assert_eq!(rounded_up(1, Granule::Size4K), 4096);
        assert_eq!(rounded_up(u64::MAX, Granule::Size4K), u64::MAX);
    }

    /// A daemon with a small domain, and a driver in it.
    async fn driver_of_d0(dir: &TempDir) -> (Daemon, Client, Session) {
        let dir = RuntimeDir::new(&dir.path().join("run")).unwrap();
        let daemon = Daemon::start(Config::for_runtime_dir(dir)).await.unwrap();
        let client = Client::connect(daemon.runtime_dir()).await.unwrap();
        let request = request_of("d0 --bounce 8KiB --coherent 0");
        client.domains().create_domain(request).await.unwrap();
        let d0 = DomainId::new("d0").unwrap();
        let attach = client.attach(&d0, Role::Driver, Access::ReadWrite);
        let session = attach.await.unwrap();
        (daemon, client, session)
    }

    async fn memories(client: &Client) -> Vec<v1::Memory> {
        let request = v1::ListMemoriesRequest {
            domain: "domains/d0".to_owned(),
            ..v1::ListMemoriesRequest::default()
        };
        let listed = client.sessions().list_memories(request).await;
        listed.unwrap().into_inner().memories
    }

    #[tokio::test]
    async fn memory_that_is_given_up_before_the_answer_is_taken_back() {
        let dir = TempDir::new().unwrap();
        let (daemon, client, session) = driver_of_d0(&dir).await;
        let memfd = || driver_memfd("test", 4096).unwrap();

        let registering = session.register_persistent(memfd(), true);
        let given_up = ready(Failure::new(Exit::Error, "interrupted"));
        let refused = registered(&session, registering, given_up).await;

        assert_eq!(refused.unwrap_err().to_string(), "interrupted");
        assert_eq!(memories(&client).await, []);

        let registering = session.register_persistent(memfd(), true);
        let kept = registered(&session, registering, std::future::pending()).await;
        assert_eq!(
            memories(&client).await[0].memory_id,
            kept.unwrap().id().get()
        );
        session.detach().await.unwrap();
        daemon.stop().await;
    }

    #[tokio::test]
    async fn a_signal_gives_up() {
        let cli = Cli::parse_from(["domainctl", "--timeout", "0", "info"]);
        let context = Context::new(cli.global);
        let mut signals = Signals::new().unwrap();
        for (signal, said) in [(Signal::INT, "interrupted"), (Signal::TERM, "terminated")] {
            kill_process(getpid(), signal).unwrap();
            let failure = given_up(&mut signals, &context).await;
            assert_eq!(
                (failure.to_string().as_str(), failure.exit()),
                (said, Exit::Error)
            );
        }
    }
}
