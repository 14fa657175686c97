//! Ranges of addresses as people write and read them.

use domain_core::addr::{Iova, IovaRange, RangeError};
use domaind_proto::names::NameError;

use crate::scoped::{self, Scoped};
use crate::size::{self, SizeError};

/// What a range has its name in.
const COLLECTION: &[&str] = &["mappings/"];

/// Why a text is not a range.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum NotARange {
    #[error("not a range: write 0x1000-0x1fff (both included) or 0x1000+4KiB")]
    Form,
    #[error("{part:?}: {error}")]
    Number { part: String, error: SizeError },
    #[error(transparent)]
    Range(#[from] RangeError),
    #[error(transparent)]
    Domain(#[from] NameError),
}

/// Reads `0x1000-0x1fff`, both included, or `0x1000+4KiB`.
///
/// # Errors
/// [`NotARange`].
pub(crate) fn parse(text: &str) -> Result<IovaRange, NotARange> {
    if let Some((start, len)) = text.split_once('+') {
        return Ok(IovaRange::from_len(
            Iova::new(number(start)?),
            number(len)?,
        )?);
    }
    let (start, last) = text.split_once('-').ok_or(NotARange::Form)?;
    Ok(IovaRange::new(
        Iova::new(number(start)?),
        Iova::new(number(last)?),
    )?)
}

/// Reads a range, also behind `domains/d0/mappings/`, as `-o name` prints it.
///
/// # Errors
/// [`NotARange`].
pub(crate) fn parse_scoped(text: &str) -> Result<Scoped<IovaRange>, NotARange> {
    let Scoped { domain, thing } = scoped::split(COLLECTION, text)?;
    let thing = parse(thing)?;
    Ok(Scoped { domain, thing })
}

/// Reads a range as [`parse_scoped`] does, or one address, which stands alone:
/// a number behind `mappings/` is an id.
///
/// # Errors
/// [`NotARange`].
pub(crate) fn parse_scoped_or_address(text: &str) -> Result<Scoped<IovaRange>, NotARange> {
    match size::parse(text) {
        Ok(address) => Ok(Scoped {
            domain: None,
            thing: IovaRange::from_len(Iova::new(address), 1)?,
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

/// `0x1000-0x1fff`, both included.
pub(crate) fn hex(start: u64, last: u64) -> String {
    format!("{start:#x}-{last:#x}")
}

fn number(part: &str) -> Result<u64, NotARange> {
    let part = part.trim();
    size::parse(part).map_err(|error| NotARange::Number {
        part: part.to_owned(),
        error,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(start: u64, last: u64) -> IovaRange {
        IovaRange::new(Iova::new(start), Iova::new(last)).unwrap()
    }

    #[test]
    fn a_range_has_two_ends_or_a_length() {
        let same = [
            ("0x1000-0x1fff", range(0x1000, 0x1fff)),
            ("4096-8191", range(0x1000, 0x1fff)),
            ("0x1000+4KiB", range(0x1000, 0x1fff)),
            ("1MiB+1", range(1 << 20, 1 << 20)),
            ("0x0-0xffffffffffffffff", everything()),
            ("0xffffffffffffffff+1", range(u64::MAX, u64::MAX)),
        ];
        for (text, expected) in same {
            assert_eq!(parse(text), Ok(expected), "{text}");
        }
    }

    #[test]
    fn what_is_printed_can_be_typed_back() {
        for expected in [range(0x1000, 0x1fff), everything()] {
            let text = hex(expected.start().get(), expected.last().get());
            assert_eq!(parse(&text), Ok(expected));
        }
    }

    #[test]
    fn a_range_that_is_none_is_refused_by_what_is_wrong() {
        for text in ["", "0x1000", "x", "mappings/"] {
            assert_eq!(parse_scoped(text), Err(NotARange::Form), "{text}");
        }
        for text in ["-", "+", "0x1000-", "-0x1000", "0x1000+1.5K", "1-2-3"] {
            assert!(
                matches!(parse(text), Err(NotARange::Number { .. })),
                "{text}"
            );
        }
        for text in ["0x2000-0x1fff", "0x1000+0", "0xffffffffffffffff+2"] {
            assert!(matches!(parse(text), Err(NotARange::Range(_))), "{text}");
        }
    }

    #[test]
    fn an_address_alone_is_a_range_only_where_one_is_enough() {
        let parse = |text| parse_scoped_or_address(text).map(|scoped| scoped.thing);
        assert_eq!(parse("0x1000"), Ok(range(0x1000, 0x1000)));
        assert_eq!(parse("0x1000+2"), Ok(range(0x1000, 0x1001)));
        // The id of a streaming mapping is no address.
        for text in ["d0", "domains/d0/mappings/9"] {
            assert_eq!(parse(text), Err(NotARange::Form), "{text}");
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
        assert!(matches!(refused, Err(NotARange::Domain(_))));
        // Nothing is named that a domain could be dropped from.
        assert!(parse("domains/d0/mappings/0x1000-0x1fff").is_err());
    }

    #[test]
    fn a_range_is_told_from_a_domain_by_its_first_character() {
        assert!(looks_like("0x1000-0x1fff") && looks_like("d0/mappings/7+1"));
        assert!(!looks_like("d0") && !looks_like("domains/d0") && !looks_like("domains/mappings"));
    }
}
