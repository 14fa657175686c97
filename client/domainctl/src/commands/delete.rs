//! `delete`.

use domain_core::memory::MemoryId;
use domaind_client::Client;
use domaind_proto::names::DomainId;
use domaind_proto::v1;

use super::target::Target;
use super::{driver, each};
use crate::cli::{Delete, DeleteDomains, DeleteMemories};
use crate::context::Context;
use crate::exit::Exit;
use crate::failure::Failure;
use crate::output::Verdict;

pub(super) async fn run(what: Delete, context: &mut Context) -> Result<Exit, Failure> {
    match what {
        Delete::Domain(args) => domains(args, context).await,
        Delete::Memory(args) => memories(args, context).await,
    }
}

async fn memories(args: DeleteMemories, context: &mut Context) -> Result<Exit, Failure> {
    let (domain, memories) = named(args)?;
    let session = driver::attach(&domain, context).await?;
    let delete = async |id: MemoryId, context: &mut Context| {
        context.within(session.unregister(id)).await?;
        let name = format!("{}/memories/{id}", domain.name());
        let answer = v1::MemoryUnregistered {};
        context.show(&Verdict::new(answer, name, "deleted"))
    };
    let exit = each(memories, context, delete).await;
    driver::leave(session, context).await;
    Ok(exit)
}

/// Never the only domain because none is named: what is deleted is gone.
fn named(args: DeleteMemories) -> Result<(DomainId, Vec<MemoryId>), Failure> {
    let target = Target::of(args.words)?;
    match target.domain {
        Some(domain) if !target.things.is_empty() => Ok((domain, target.things)),
        Some(_) => Err(Failure::new(Exit::Usage, "name memories")),
        None => Err(Failure::new(Exit::Usage, "say in which domain")),
    }
}

async fn domains(args: DeleteDomains, context: &mut Context) -> Result<Exit, Failure> {
    let DeleteDomains {
        names,
        force,
        ignore_not_found,
    } = args;
    let client = context.connect().await?;
    let delete = async |id: DomainId, context: &mut Context| match domain(
        &client, &id, force, context,
    )
    .await
    {
        Ok(answer) => context.show(&verdict(answer, &id)),
        // Not `allow_missing`: its answer does not tell whether there was one.
        Err(failure) if ignore_not_found && failure.exit() == Exit::NotFound => Ok(()),
        Err(failure) => Err(failure),
    };
    Ok(each(names, context, delete).await)
}

async fn domain(
    client: &Client,
    id: &DomainId,
    force: bool,
    context: &Context,
) -> Result<v1::DeleteDomainResponse, Failure> {
    let request = v1::DeleteDomainRequest {
        name: id.name(),
        force,
        allow_missing: false,
        request_id: String::new(),
    };
    context.call(client.domains().delete_domain(request)).await
}

fn verdict(answer: v1::DeleteDomainResponse, id: &DomainId) -> Verdict<v1::DeleteDomainResponse> {
    let what = match answer.ended_sessions {
        0 => "deleted".to_owned(),
        1 => "deleted (1 session ended)".to_owned(),
        ended => format!("deleted ({ended} sessions ended)"),
    };
    Verdict::new(answer, id.name(), what)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::{Cli, Command};
    use clap::Parser;

    fn named_in(line: &str) -> Result<(DomainId, Vec<MemoryId>), Failure> {
        let words = ["domainctl", "delete", "memory"].into_iter();
        let cli = Cli::parse_from(words.chain(line.split_whitespace()));
        match cli.command {
            Command::Delete(Delete::Memory(args)) => named(args),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn memories_are_deleted_where_their_names_say() {
        for line in [
            "d1 3 4",
            "domains/d1/memories/3 domains/d1/memories/4",
            "d1 3 domains/d1/memories/4",
        ] {
            let (domain, memories) = named_in(line).unwrap();
            assert_eq!(domain.as_str(), "d1", "{line}");
            assert_eq!(memories, [3, 4].map(MemoryId::new), "{line}");
        }
        for line in ["d1", "3", "memories/3", "d1 x", "victim d1/memories/3"] {
            assert_eq!(named_in(line).unwrap_err().exit(), Exit::Usage, "{line}");
        }
    }
}
