//! Resource names: `domains/{domain}` and `sessions/{session}`.

use std::fmt;

use domain_core::limits::DOMAIN_ID_BYTES;
use domain_core::session::SessionId;

/// The id of a domain: `[a-z]([a-z0-9-]*[a-z0-9])?`, at most 63 bytes.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DomainId(String);

/// Why a text is not a resource name.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs)] // the messages are the docs
pub enum NameError {
    #[error(
        "{id:?} is not a domain id: lower-case letters, digits and inner hyphens, a letter first, 1 to {DOMAIN_ID_BYTES} bytes"
    )]
    BadDomainId { id: String },
    #[error("{name:?} is not of the form domains/{{domain}}")]
    NotADomainName { name: String },
    #[error("{name:?} is not of the form sessions/{{number}}")]
    NotASessionName { name: String },
}

impl DomainId {
    /// Checks an id.
    ///
    /// # Errors
    /// [`NameError::BadDomainId`].
    pub fn new(id: &str) -> Result<DomainId, NameError> {
        let inner = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
        let bytes = id.as_bytes();
        let good = bytes.first().is_some_and(u8::is_ascii_lowercase)
            && bytes.last().is_some_and(|last| *last != b'-')
            && bytes.len() <= DOMAIN_ID_BYTES
            && bytes.iter().all(|byte| inner(*byte));
        if good {
            Ok(DomainId(id.to_owned()))
        } else {
            Err(NameError::BadDomainId { id: shorten(id) })
        }
    }

    /// Reads `domains/{domain}`.
    ///
    /// # Errors
    /// [`NameError`] for anything else.
    pub fn parse(name: &str) -> Result<DomainId, NameError> {
        match name.strip_prefix("domains/") {
            Some(id) => DomainId::new(id),
            None => Err(NameError::NotADomainName {
                name: shorten(name),
            }),
        }
    }

    /// Reads `domains/{domain}` or just `{domain}`, as people type it.
    ///
    /// # Errors
    /// [`NameError`] for anything else.
    pub fn parse_lenient(text: &str) -> Result<DomainId, NameError> {
        DomainId::new(text.strip_prefix("domains/").unwrap_or(text))
    }

    /// The bare id.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// `domains/{domain}`.
    #[must_use]
    pub fn name(&self) -> String {
        format!("domains/{}", self.0)
    }
}

impl fmt::Display for DomainId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// `sessions/{session}`.
#[must_use]
pub fn session_name(session: SessionId) -> String {
    format!("sessions/{session}")
}

/// Reads `sessions/{session}`.
///
/// # Errors
/// [`NameError::NotASessionName`] for anything else.
pub fn parse_session(name: &str) -> Result<SessionId, NameError> {
    let number = name
        .strip_prefix("sessions/")
        .and_then(|number| number.parse().ok());
    number
        .map(SessionId::new)
        .ok_or_else(|| NameError::NotASessionName {
            name: shorten(name),
        })
}

/// Reads `sessions/{session}` or just the number, as people type it.
///
/// # Errors
/// [`NameError::NotASessionName`] for anything else.
pub fn parse_session_lenient(text: &str) -> Result<SessionId, NameError> {
    match text.parse() {
        Ok(number) => Ok(SessionId::new(number)),
        Err(_) => parse_session(text),
    }
}

/// What somebody sent may be long; an error shows the beginning of it.
fn shorten(text: &str) -> String {
    text.chars().take(2 * DOMAIN_ID_BYTES).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_what_a_dns_label_with_a_letter_first_is() {
        for good in ["d", "d0", "a-b", "tenant-7", &"x".repeat(63)] {
            assert_eq!(DomainId::new(good).unwrap().as_str(), good);
        }
        for bad in [
            "",
            "0d",
            "-d",
            "d-",
            "D",
            "a_b",
            "a/b",
            "ä",
            "a b",
            &"x".repeat(64),
        ] {
            assert!(DomainId::new(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn names_carry_their_collection() {
        assert_eq!(DomainId::parse("domains/d0").unwrap().name(), "domains/d0");
        assert!(matches!(
            DomainId::parse("d0"),
            Err(NameError::NotADomainName { .. })
        ));
        assert_eq!(
            DomainId::parse_lenient("d0").unwrap(),
            DomainId::parse_lenient("domains/d0").unwrap()
        );
        assert_eq!(parse_session("sessions/7").unwrap(), SessionId::new(7));
        assert!(parse_session("sessions/x").is_err() && parse_session("7").is_err());
        assert_eq!(parse_session_lenient("7").unwrap(), SessionId::new(7));
    }

    #[test]
    fn an_error_never_repeats_a_megabyte() {
        let refused = DomainId::parse(&"y".repeat(1 << 20)).unwrap_err();
        assert!(refused.to_string().len() < 256);
    }
}
