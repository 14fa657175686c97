//! In which domain, where it may be left unsaid, and what of it.

use domaind_client::Client;
use domaind_proto::names::DomainId;

use super::get::all_domains;
use crate::cli::Word;
use crate::context::Context;
use crate::exit::Exit;
use crate::failure::Failure;
use crate::scoped::Scoped;

/// Domains that a refusal lists.
const LISTED: usize = 10;

/// What was typed where a domain may stand before ranges or ids.
#[derive(Debug)]
pub(super) struct Target<T> {
    /// What stood first, or what the things are named with.
    pub(super) domain: Option<DomainId>,
    pub(super) things: Vec<T>,
}

impl<T: Copy> Target<T> {
    pub(super) fn of(words: Vec<Word<T>>) -> Result<Target<T>, Failure> {
        let (mut domains, mut things) = (Vec::new(), Vec::new());
        for word in words {
            match word {
                Word::Thing(scoped) => {
                    domains.push(scoped.domain);
                    things.push(scoped.thing);
                }
                Word::Domain(id) if domains.is_empty() => domains.push(Some(id)),
                Word::Domain(id) => {
                    let message = format!("{id}: one domain is named, before all else");
                    return Err(Failure::new(Exit::Usage, message));
                }
            }
        }
        let domain = agreed(domains)?;
        Ok(Target { domain, things })
    }

    /// Where exactly one range makes sense.
    pub(super) fn range(&self) -> Result<T, Failure> {
        match self.things.as_slice() {
            [range] => Ok(*range),
            _ => Err(Failure::new(Exit::Usage, "name one range")),
        }
    }
}

/// The domain that is named, however often: a thing of one domain is never
/// taken for that of another.
pub(super) fn agreed(
    named: impl IntoIterator<Item = Option<DomainId>>,
) -> Result<Option<DomainId>, Failure> {
    let mut agreed: Option<DomainId> = None;
    for next in named.into_iter().flatten() {
        match &agreed {
            Some(first) if *first != next => return Err(two_domains(first, &next)),
            _ => agreed = Some(next),
        }
    }
    Ok(agreed)
}

/// The domain in which a thing is, beside which one may be named.
pub(super) fn of_thing<T>(
    named: Option<DomainId>,
    scoped: Scoped<T>,
) -> Result<(Option<DomainId>, T), Failure> {
    let domain = agreed([named, scoped.domain])?;
    Ok((domain, scoped.thing))
}

fn two_domains(one: &DomainId, other: &DomainId) -> Failure {
    let (one, other) = (one.name(), other.name());
    let message = format!("{one} and {other} are named: a command acts in one domain");
    Failure::new(Exit::Usage, message)
}

/// The domain that was named, else the only one that the caller may see.
pub(super) async fn domain(
    named: Option<DomainId>,
    client: &Client,
    context: &Context,
) -> Result<DomainId, Failure> {
    if let Some(named) = named {
        return Ok(named);
    }
    let domains = all_domains(client, context).await?;
    only(domains.iter().map(|domain| domain.name.as_str()).collect())
}

fn only(names: Vec<&str>) -> Result<DomainId, Failure> {
    match names.as_slice() {
        [] => Err(Failure::new(Exit::NotFound, "there is no domain")),
        [name] => DomainId::parse(name).map_err(|error| Failure::of(Exit::Error, &error)),
        several => Err(Failure::new(Exit::Usage, say_which(several))),
    }
}

fn say_which(names: &[&str]) -> String {
    let listed: Vec<_> = names.iter().copied().take(LISTED).collect();
    let more = match names.len() - listed.len() {
        0 => String::new(),
        more => format!(" and {more} more"),
    };
    format!("say in which domain: there are {}{more}", listed.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::{Cli, Command};
    use clap::Parser;
    use domain_core::addr::IovaRange;

    /// What `unmap` would act on.
    fn target(line: &str) -> Result<Target<IovaRange>, Failure> {
        let words = ["domainctl", "unmap"].into_iter();
        let cli = Cli::parse_from(words.chain(line.split_whitespace()));
        match cli.command {
            Command::Unmap(args) => Target::of(args.words),
            other => panic!("{other:?}"),
        }
    }

    fn domain_of(line: &str) -> Option<String> {
        let domain = target(line).unwrap().domain;
        domain.map(|id| id.to_string())
    }

    #[test]
    fn the_domain_stands_first_or_nowhere() {
        assert_eq!(domain_of("d0 0x1000+1").as_deref(), Some("d0"));
        assert!(target("d0 0x1000+1").unwrap().range().is_ok());
        for wrong in ["0x1000+1 d0", "d0 d1", "d0 d0"] {
            assert_eq!(target(wrong).unwrap_err().exit(), Exit::Usage, "{wrong}");
        }
        let none = target("").unwrap();
        assert!(none.domain.is_none() && none.range().is_err());
    }

    #[test]
    fn the_domain_of_a_name_is_the_one_acted_in() {
        for line in [
            "domains/d1/mappings/0x1000+1",
            "d1 domains/d1/mappings/0x1000+1",
            "d1/mappings/0x1000+1 domains/d1/mappings/0x2000+1",
            "0x1000+1 domains/d1/mappings/0x2000+1",
        ] {
            assert_eq!(domain_of(line).as_deref(), Some("d1"), "{line}");
        }
        assert_eq!(domain_of("mappings/0x1000+1"), None);
    }

    #[test]
    fn a_name_in_another_domain_is_refused_by_both_names() {
        for line in [
            "victim domains/d0/mappings/0x1000-0x1fff",
            "victim/mappings/0x1000+1 domains/d0/mappings/0x2000+1",
            "victim 0x3000+1 domains/d0/mappings/0x2000+1",
        ] {
            let refused = target(line).unwrap_err();
            assert_eq!(refused.exit(), Exit::Usage);
            let message = refused.to_string();
            assert!(
                message.contains("domains/victim and domains/d0"),
                "{message}"
            );
        }
    }

    #[test]
    fn a_domain_left_unsaid_is_the_only_one() {
        assert_eq!(only(vec!["domains/d0"]).unwrap().as_str(), "d0");
        assert_eq!(only(vec![]).unwrap_err().exit(), Exit::NotFound);
        let several = only(vec!["domains/d0", "domains/d1"]).unwrap_err();
        assert_eq!(several.exit(), Exit::Usage);
        assert!(several.to_string().contains("domains/d0, domains/d1"));
        let many: Vec<_> = vec!["domains/d"; LISTED + 3];
        assert!(only(many).unwrap_err().to_string().ends_with(" and 3 more"));
    }
}
