//! `-o json`: canonical proto3 JSON, indented.

use serde::Serialize;

pub(super) fn render(value: &impl Serialize) -> Result<String, serde_json::Error> {
    Ok(serde_json::to_string_pretty(value)? + "\n")
}

/// The same in one line, for streams.
pub(super) fn line(value: &impl Serialize) -> Result<String, serde_json::Error> {
    Ok(serde_json::to_string(value)? + "\n")
}
