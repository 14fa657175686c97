//! Ranges of addresses as people write and read them, on the command line and in
//! the configuration file.

use domain_core::addr::{Iova, IovaRange, RangeError};

use crate::size::{self, SizeError};

/// Why a text is not a range.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs)] // the messages are the docs
pub enum NotARange {
    #[error("not a range: write 0x1000-0x1fff (both included) or 0x1000+4KiB")]
    Form,
    #[error("{part:?}: {error}")]
    Number { part: String, error: SizeError },
    #[error(transparent)]
    Range(#[from] RangeError),
}

/// Reads `0x1000-0x1fff`, both included, or `0x1000+4KiB`.
///
/// # Errors
/// [`NotARange`].
pub fn parse(text: &str) -> Result<IovaRange, NotARange> {
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

/// `0x1000-0x1fff`, both included.
#[must_use]
pub fn hex(start: u64, last: u64) -> String {
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
            ("0x0-0xffffffffffffffff", range(0, u64::MAX)),
            ("0xffffffffffffffff+1", range(u64::MAX, u64::MAX)),
        ];
        for (text, expected) in same {
            assert_eq!(parse(text), Ok(expected), "{text}");
        }
    }

    #[test]
    fn what_is_printed_can_be_typed_back() {
        for expected in [range(0x1000, 0x1fff), range(0, u64::MAX)] {
            let text = hex(expected.start().get(), expected.last().get());
            assert_eq!(parse(&text), Ok(expected));
        }
    }

    #[test]
    fn a_range_that_is_none_is_refused_by_what_is_wrong() {
        for text in ["", "0x1000", "x", "mappings/"] {
            assert_eq!(parse(text), Err(NotARange::Form), "{text}");
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
}
