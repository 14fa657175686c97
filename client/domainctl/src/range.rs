//! Ranges of addresses as people write and read them, alone or behind the name of
//! a domain.

use domain_core::addr::{Iova, IovaRange};
use domaind_proto::names::NameError;
pub(crate) use domaind_proto::range::{NotARange, hex, parse};
use domaind_proto::size;

use crate::scoped::{self, Scoped};

/// What a range has its name in.
const COLLECTION: &[&str] = &["mappings/"];

/// Why a text is not a range, or not one of a domain.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum NotScoped {
    #[error(transparent)]
    Range(#[from] NotARange),
    #[error(transparent)]
    Domain(#[from] NameError),
}

/// Reads a range, also behind `domains/d0/mappings/`, as `-o name` prints it.
///
/// # Errors
/// [`NotScoped`].
pub(crate) fn parse_scoped(text: &str) -> Result<Scoped<IovaRange>, NotScoped> {
    let Scoped { domain, thing } = scoped::split(COLLECTION, text)?;
    let thing = parse(thing)?;
    Ok(Scoped { domain, thing })
}

/// Reads a range as [`parse_scoped`] does, or one address, which stands alone:
/// a number behind `mappings/` is an id.
///
/// # Errors
/// [`NotScoped`].
pub(crate) fn parse_scoped_or_address(text: &str) -> Result<Scoped<IovaRange>, NotScoped> {
    match size::parse(text) {
        Ok(address) => Ok(Scoped {
            domain: None,
            thing: IovaRange::from_len(Iova::new(address), 1).map_err(NotARange::from)?,
        }),
        Err(_) => parse_scoped(text),
    }
}

/// Could this be a range rather than a domain, whose name begins with a letter?
pub(crate) fn looks_like(text: &str) -> bool {
    text.starts_with(|c: char| c.is_ascii_digit()) || scoped::is_in(COLLECTION, text)
}

/// All addresses there are.
pub(crate) fn everything() -> IovaRange {
    IovaRange::new(Iova::new(0), Iova::new(u64::MAX)).expect("0 is the lowest address")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(start: u64, last: u64) -> IovaRange {
        IovaRange::new(Iova::new(start), Iova::new(last)).unwrap()
    }

    #[test]
    fn a_text_that_is_no_range_is_refused_by_what_is_wrong() {
        for text in ["", "0x1000", "x", "mappings/"] {
            let refused = Err(NotScoped::Range(NotARange::Form));
            assert_eq!(parse_scoped(text), refused, "{text}");
        }
        assert_eq!(parse(&hex(0, u64::MAX)), Ok(everything()));
    }

    #[test]
    fn an_address_alone_is_a_range_only_where_one_is_enough() {
        let parse = |text| parse_scoped_or_address(text).map(|scoped| scoped.thing);
        assert_eq!(parse("0x1000"), Ok(range(0x1000, 0x1000)));
        assert_eq!(parse("0x1000+2"), Ok(range(0x1000, 0x1001)));
        // The id of a streaming mapping is no address.
        for text in ["d0", "domains/d0/mappings/9"] {
            assert_eq!(
                parse(text),
                Err(NotScoped::Range(NotARange::Form)),
                "{text}"
            );
        }
    }

    #[test]
    fn a_range_keeps_the_domain_of_its_name() {
        for (text, domain) in [
            ("domains/d0/mappings/0x1000-0x1fff", Some("d0")),
            ("mappings/0x1000-0x1fff", None),
            ("0x1000-0x1fff", None),
        ] {
            let scoped = parse_scoped(text).unwrap();
            assert_eq!(scoped.thing, range(0x1000, 0x1fff));
            assert_eq!(scoped.domain.as_ref().map(|id| id.as_str()), domain);
            assert_eq!(parse_scoped_or_address(text), Ok(scoped));
        }
        let refused = parse_scoped("sessions/7/mappings/0x1000-0x1fff");
        assert!(matches!(refused, Err(NotScoped::Domain(_))));
        // Nothing is named that a domain could be dropped from.
        assert!(parse("domains/d0/mappings/0x1000-0x1fff").is_err());
    }

    #[test]
    fn a_range_is_told_from_a_domain_by_its_first_character() {
        assert!(looks_like("0x1000-0x1fff") && looks_like("d0/mappings/7+1"));
        assert!(!looks_like("d0") && !looks_like("domains/d0") && !looks_like("domains/mappings"));
    }
}
