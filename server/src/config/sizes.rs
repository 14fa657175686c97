//! A size in the file: bytes as a number, or a text with a unit.

use std::fmt;

use domaind_proto::size;
use serde::de::{Error, Unexpected, Visitor};
use serde::{Deserialize, Deserializer};

/// Bytes, or an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Size(pub(super) u64);

impl<'de> Deserialize<'de> for Size {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Size, D::Error> {
        deserializer.deserialize_any(ReadSize)
    }
}

struct ReadSize;

impl Visitor<'_> for ReadSize {
    type Value = Size;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a size: bytes (4096), or a text with a unit (\"64MiB\")")
    }

    fn visit_i64<E: Error>(self, number: i64) -> Result<Size, E> {
        let bytes = u64::try_from(number);
        let refused = |_| E::invalid_value(Unexpected::Signed(number), &self);
        bytes.map(Size).map_err(refused)
    }

    fn visit_u64<E: Error>(self, bytes: u64) -> Result<Size, E> {
        Ok(Size(bytes))
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<Size, E> {
        let refused = |cause| E::custom(format!("{text:?}: {cause}"));
        size::parse(text).map(Size).map_err(refused)
    }
}
