//! The secret that calls of a session carry.

use std::fmt::Write;

use domaind_proto::SESSION_METADATA;
use tonic::metadata::{Ascii, MetadataValue};
use tonic::service::Interceptor;
use tonic::{Request, Status};

use crate::error::ProtocolError;

/// What the daemon chooses is opaque; this is as long as it may be.
const TOKEN_BYTES_MOST: usize = 64;

/// A session's token, as metadata, or none for who calls as a domain's owner.
/// Never printed: the value is sensitive.
#[derive(Clone, Debug)]
pub(crate) struct Token(Option<MetadataValue<Ascii>>);

impl Token {
    pub(crate) fn new(bytes: &[u8]) -> Result<Token, ProtocolError> {
        let wrong = ProtocolError::TokenLength { bytes: bytes.len() };
        if bytes.is_empty() || bytes.len() > TOKEN_BYTES_MOST {
            return Err(wrong);
        }
        let hexadecimal = bytes.iter().fold(String::new(), |mut text, byte| {
            let _ = write!(text, "{byte:02x}"); // a String takes everything
            text
        });
        let mut value: MetadataValue<Ascii> = hexadecimal.parse().map_err(|_| wrong)?;
        value.set_sensitive(true);
        Ok(Token(Some(value)))
    }

    /// Of nobody: the daemon goes by who the caller is.
    pub(crate) fn none() -> Token {
        Token(None)
    }
}

impl Interceptor for Token {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        if let Some(value) = &self.0 {
            request
                .metadata_mut()
                .insert(SESSION_METADATA, value.clone());
        }
        Ok(request)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_travels_as_hexadecimal_and_is_never_printed() {
        let mut token = Token::new(&[0xab; TOKEN_BYTES_MOST]).unwrap();

        let request = token.call(Request::new(())).unwrap();

        let sent = request.metadata().get(SESSION_METADATA).unwrap();
        assert_eq!(sent.to_str().unwrap(), "ab".repeat(TOKEN_BYTES_MOST));
        assert!(!format!("{token:?} {request:?}").contains("abab"));
    }

    #[test]
    fn an_empty_or_endless_token_is_refused() {
        for bytes in [0, TOKEN_BYTES_MOST + 1] {
            assert!(Token::new(&vec![0; bytes]).is_err(), "{bytes}");
        }
    }
}
