//! Sizes and addresses as people write and read them, on the command line and in
//! the configuration file.

/// Why a text is not a size.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs)] // the messages are the docs
pub enum SizeError {
    #[error("not a size: write bytes (4096, 0x1000) or whole units (64KiB, 64MiB, 1GiB)")]
    NotASize,
    #[error("a size is a whole number: instead of a fraction, write it in a smaller unit")]
    Fraction,
    #[error(
        "there is no unit {unit:?}; units are powers of 1024: B, KiB, MiB, GiB, TiB, PiB, EiB, or K, M, G, T, P, E"
    )]
    UnknownUnit { unit: String },
    #[error("larger than 2^64-1 bytes")]
    TooLarge,
    #[error("a bound is at least one byte, or none")]
    NoBound,
}

const UNITS: [&str; 7] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];

/// Reads `4096`, `64KiB`, `64 KiB`, `64Ki`, `64K`, `0x1000`: exactly, or not at all.
///
/// # Errors
/// [`SizeError`].
pub fn parse(text: &str) -> Result<u64, SizeError> {
    if let Some(digits) = text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        return digits_of(digits, 16);
    }
    let end = text
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(text.len());
    let (digits, unit) = text.split_at(end);
    if unit.starts_with('.') || unit.starts_with(',') {
        return Err(SizeError::Fraction);
    }
    let number = digits_of(digits, 10)?;
    let factor = factor(unit.trim_start())?;
    number.checked_mul(factor).ok_or(SizeError::TooLarge)
}

/// Reads what something may not grow beyond: a size, or `none` for no bound.
///
/// # Errors
/// [`SizeError`]; also for 0, which asks for nothing on the wire.
pub fn parse_bound(text: &str) -> Result<u64, SizeError> {
    match text {
        "none" => Ok(u64::MAX),
        text => match parse(text)? {
            0 => Err(SizeError::NoBound),
            bytes => Ok(bytes),
        },
    }
}

/// `from_str_radix` alone would take a sign.
fn digits_of(digits: &str, radix: u32) -> Result<u64, SizeError> {
    if digits.is_empty() || !digits.chars().all(|digit| digit.is_digit(radix)) {
        return Err(SizeError::NotASize);
    }
    u64::from_str_radix(digits, radix).map_err(|_| SizeError::TooLarge)
}

/// What one unit is in bytes. `KB` is not among them: some mean 1000 by it.
fn factor(unit: &str) -> Result<u64, SizeError> {
    let power = match unit.to_ascii_lowercase().as_str() {
        "" | "b" => 0,
        "k" | "ki" | "kib" => 1,
        "m" | "mi" | "mib" => 2,
        "g" | "gi" | "gib" => 3,
        "t" | "ti" | "tib" => 4,
        "p" | "pi" | "pib" => 5,
        "e" | "ei" | "eib" => 6,
        _ => {
            return Err(SizeError::UnknownUnit {
                unit: unit.to_owned(),
            });
        }
    };
    Ok(1 << (10 * power))
}

/// `64 MiB`; exact if that takes no more than four digits, else with one
/// decimal.
#[must_use]
pub fn human(bytes: u64) -> String {
    let exact = (0..UNITS.len()).rev().find(|power| {
        let unit = 1_u64 << (10 * power);
        bytes.is_multiple_of(unit) && (1..10_000).contains(&(bytes / unit))
    });
    match exact {
        Some(power) => format!("{} {}", bytes >> (10 * power), UNITS[power]),
        None => rounded(bytes),
    }
}

fn rounded(bytes: u64) -> String {
    let power = bytes.checked_ilog2().unwrap_or(0) / 10;
    let tenths = (u128::from(bytes) * 10) >> (10 * power);
    if power == 0 {
        return format!("{bytes} B");
    }
    format!("{}.{} {}", tenths / 10, tenths % 10, UNITS[power as usize])
}

/// `64 MiB (67108864 bytes)`, where the exact number matters.
#[must_use]
pub fn exact(bytes: u64) -> String {
    match bytes {
        0..1024 => human(bytes),
        _ => format!("{} ({bytes} bytes)", human(bytes)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_size_is_read_exactly() {
        let same = [
            ("0", 0),
            ("4096", 4096),
            ("4096B", 4096),
            ("0x1000", 4096),
            ("0XfF", 255),
            ("64K", 65536),
            ("64Ki", 65536),
            ("64KiB", 65536),
            ("64kib", 65536),
            ("64 KiB", 65536),
            ("1GiB", 1 << 30),
            ("15EiB", 15 << 60),
            ("18446744073709551615", u64::MAX),
            ("0xffffffffffffffff", u64::MAX),
        ];
        for (text, bytes) in same {
            assert_eq!(parse(text), Ok(bytes), "{text}");
        }
    }

    #[test]
    fn what_is_not_exact_is_refused_and_never_rounded() {
        assert_eq!(parse("1.5GiB"), Err(SizeError::Fraction));
        assert_eq!(parse("1,5GiB"), Err(SizeError::Fraction));
        for text in ["", "K", "-1", "+1", "0x", "0x+1", "0x10K", "ten", "٣"] {
            assert_eq!(parse(text), Err(SizeError::NotASize), "{text}");
        }
        for text in ["64KB", "64MB", "64kb", "64Q", "1 2"] {
            assert!(
                matches!(parse(text), Err(SizeError::UnknownUnit { .. })),
                "{text}"
            );
        }
    }

    #[test]
    fn a_size_past_64_bits_is_refused_and_never_wraps() {
        for text in [
            "16EiB",
            "18446744073709551616",
            "18446744073709551615K",
            "0x10000000000000000",
        ] {
            assert_eq!(parse(text), Err(SizeError::TooLarge), "{text}");
        }
    }

    #[test]
    fn a_size_is_printed_in_the_unit_in_which_it_is_whole() {
        let table = [
            (0, "0 B"),
            (1, "1 B"),
            (4097, "4097 B"),
            (4096, "4 KiB"),
            (64 << 20, "64 MiB"),
            (3 << 29, "1536 MiB"),
            (100_001, "97.6 KiB"),
            ((64 << 20) - 4096, "63.9 MiB"),
            (u64::MAX, "15.9 EiB"),
        ];
        for (bytes, text) in table {
            assert_eq!(human(bytes), text);
        }
    }

    #[test]
    fn what_is_printed_as_exact_can_be_typed_back() {
        for bytes in [1, 4097, 4096, 65536, 64 << 20, 3 << 29, 1 << 48] {
            assert_eq!(parse(&human(bytes)), Ok(bytes));
        }
        assert_eq!(exact(64 << 20), "64 MiB (67108864 bytes)");
    }
}
