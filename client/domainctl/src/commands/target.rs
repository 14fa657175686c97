//! In which domain, where it may be left unsaid, and at which addresses.

use domain_core::addr::IovaRange;
use domaind_client::Client;
use domaind_proto::names::DomainId;

use super::get::all_domains;
use crate::cli::Word;
use crate::context::Context;
use crate::exit::Exit;
use crate::failure::Failure;

/// Domains that a refusal lists.
const LISTED: usize = 10;

/// What was typed where a domain may stand before ranges.
#[derive(Debug)]
pub(super) struct Target {
    pub(super) domain: Option<DomainId>,
    pub(super) ranges: Vec<IovaRange>,
}

impl Target {
    pub(super) fn of(words: Vec<Word>) -> Result<Target, Failure> {
        let mut target = Target {
            domain: None,
            ranges: Vec::new(),
        };
        for word in words {
            match word {
                Word::Range(range) => target.ranges.push(range),
                Word::Domain(id) if target.domain.is_none() && target.ranges.is_empty() => {
                    target.domain = Some(id);
                }
                Word::Domain(id) => {
                    let message = format!("{id}: one domain is named, before the ranges");
                    return Err(Failure::new(Exit::Usage, message));
                }
            }
        }
        Ok(target)
    }

    /// Where exactly one range makes sense.
    pub(super) fn range(&self) -> Result<IovaRange, Failure> {
        match self.ranges.as_slice() {
            [range] => Ok(*range),
            _ => Err(Failure::new(Exit::Usage, "name one range")),
        }
    }
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
    use crate::range;

    fn domain_word(id: &str) -> Word {
        Word::Domain(DomainId::new(id).unwrap())
    }

    #[test]
    fn the_domain_stands_first_or_nowhere() {
        let range = range::parse("0x1000+1").unwrap();
        let target = Target::of(vec![domain_word("d0"), Word::Range(range)]).unwrap();
        assert_eq!(target.domain.as_ref().unwrap().as_str(), "d0");
        assert_eq!(target.range().unwrap(), range);
        for wrong in [
            vec![Word::Range(range), domain_word("d0")],
            vec![domain_word("d0"), domain_word("d1")],
        ] {
            assert_eq!(Target::of(wrong).unwrap_err().exit(), Exit::Usage);
        }
        let none = Target::of(Vec::new()).unwrap();
        assert!(none.domain.is_none() && none.range().is_err());
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
