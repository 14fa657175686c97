//! Things that have their names in a domain, as people type them and as
//! `-o name` prints them.

use domaind_proto::names::{DomainId, NameError};

/// A thing, and the domain that its name puts it in: none for `3`, `d0` for
/// `domains/d0/memories/3`.
///
/// The domain must reach whoever acts on the thing: the same range or number
/// means something else in another domain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Scoped<T> {
    pub(crate) domain: Option<DomainId>,
    pub(crate) thing: T,
}

/// `d0`, or `domains/d0` as `-o name` prints it, or `domain/d0` as kubectl
/// would.
///
/// # Errors
/// [`NameError`] for anything else.
pub(crate) fn domain_id(text: &str) -> Result<DomainId, NameError> {
    DomainId::parse_lenient(text.strip_prefix("domain/").unwrap_or(text))
}

/// Is this the name of something in one of the collections (`memories/`), with
/// or without its domain?
pub(crate) fn is_in(collections: &[&str], text: &str) -> bool {
    cut(collections, text).is_some()
}

/// Cuts a name behind its collection; what is no such name stays whole.
///
/// # Errors
/// [`NameError`] if what stands before the collection is no domain.
pub(crate) fn split<'a>(collections: &[&str], text: &'a str) -> Result<Scoped<&'a str>, NameError> {
    let (parent, thing) = cut(collections, text).unwrap_or(("", text));
    let domain = match parent {
        "" => None,
        parent => Some(domain_id(parent.strip_suffix('/').unwrap_or(parent))?),
    };
    Ok(Scoped { domain, thing })
}

fn cut<'a>(collections: &[&str], text: &'a str) -> Option<(&'a str, &'a str)> {
    let mut cuts = collections.iter().filter_map(|name| text.rsplit_once(name));
    cuts.find(|(parent, _)| parent.is_empty() || parent.ends_with('/'))
}

#[cfg(test)]
mod tests {
    use super::*;

    const MEMORIES: &[&str] = &["memories/", "memory/"];

    #[test]
    fn a_name_keeps_its_domain() {
        for (text, domain) in [
            ("3", None),
            ("memories/3", None),
            ("memory/3", None),
            ("d0/memories/3", Some("d0")),
            ("domains/d0/memories/3", Some("d0")),
            ("domain/d0/memory/3", Some("d0")),
            ("domains/memories/memories/3", Some("memories")),
        ] {
            let split = split(MEMORIES, text).unwrap();
            let found = split.domain.as_ref().map(DomainId::as_str);
            assert_eq!((found, split.thing), (domain, "3"), "{text}");
        }
    }

    #[test]
    fn what_is_no_domain_before_a_collection_is_refused() {
        for text in ["/memories/3", "sessions/7/memories/3", "D0/memories/3"] {
            assert!(split(MEMORIES, text).is_err(), "{text}");
        }
    }

    #[test]
    fn another_collection_is_none_of_these() {
        for text in [
            "domains/d0",
            "domains/memories",
            "xmemories/3",
            "mappings/3",
        ] {
            assert!(!is_in(MEMORIES, text), "{text}");
            assert_eq!(split(MEMORIES, text).unwrap().thing, text);
        }
    }
}
