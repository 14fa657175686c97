//! One attached session: its secret, its peer, its end.

use std::fmt;
use std::hint::black_box;
use std::io;
use std::sync::{Arc, OnceLock};

use domain_core::region::Access;
use domain_core::session::{Holdings, Reader as _, Role, SessionId};
use domaind_proto::convert::count;
use domaind_proto::names::session_name;
use domaind_proto::v1;
use rustix::rand::{GetRandomFlags, getrandom};
use tokio_util::sync::CancellationToken;

use crate::hosted::Hosted;
use crate::peer::Peer;
use crate::reader::SessionReader;
use crate::replay::Answers;

/// An attached session.
#[derive(Debug)]
pub(crate) struct Live {
    pub(crate) id: SessionId,
    pub(crate) token: Token,
    pub(crate) domain: Arc<Hosted>,
    pub(crate) role: Role,
    pub(crate) access: Access,
    /// False when a read-only grant is advisory.
    pub(crate) access_enforced: bool,
    pub(crate) peer: Arc<Peer>,
    pub(crate) attach_time_unix_ms: u64,
    pub(crate) end: End,
    /// What it was answered, in case it asks again.
    pub(crate) answers: Arc<Answers>,
    /// How its domain waits for it.
    pub(crate) reader: Arc<SessionReader>,
    pub(crate) wants: Wants,
}

/// What a session is told of changes that it need not acknowledge.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Wants {
    pub(crate) removals: bool,
    pub(crate) additions: bool,
}

impl Wants {
    pub(crate) fn any(self) -> bool {
        self.removals || self.additions
    }
}

impl Live {
    /// Does it acknowledge every removal by a frame?
    pub(crate) fn by_frames(&self) -> bool {
        self.reader.by_frames()
    }

    pub(crate) fn view(&self) -> v1::Session {
        // A session that has just left holds nothing.
        let Holdings {
            streaming,
            coherent,
            leases,
            memories,
        } = self.domain.core.holdings(self.id).unwrap_or_default();
        let standing = self.domain.core.standing(self.id);
        let quarantined = standing.map(|standing| standing.quarantined);
        let quarantined = quarantined.unwrap_or_default();
        let state = match standing.is_some_and(|standing| standing.fenced) {
            true => v1::SessionState::Fenced,
            false => v1::SessionState::Attached,
        };
        v1::Session {
            name: session_name(self.id),
            domain: self.domain.id.name(),
            role: v1::Role::from(self.role).into(),
            access: v1::Access::from(self.access).into(),
            access_enforced: self.access_enforced,
            peer: Some(self.peer.as_ref().into()),
            attach_time_unix_ms: self.attach_time_unix_ms,
            streaming_mappings: streaming as u64,
            coherent_allocations: coherent as u64,
            memories: count(memories),
            state: state.into(),
            acked_generation: standing.map_or(0, |standing| standing.acked),
            asked_generation: standing.map_or(0, |standing| standing.asked),
            quarantined_mappings: quarantined.mappings as u64,
            quarantined_bytes: quarantined.bytes,
            leases: leases.count as u64,
            lease_bytes: leases.bytes,
        }
    }
}

/// The end of a session: said once, heard by the task that serves its connection
/// and by its pipelines. Clones are the same end, for whoever must not keep the
/// session.
#[derive(Clone, Debug, Default)]
pub(crate) struct End {
    /// The first reason stands.
    reason: Arc<OnceLock<v1::EndReason>>,
    called: CancellationToken,
}

impl End {
    pub(crate) fn call(&self, reason: v1::EndReason) {
        let _ = self.reason.set(reason);
        self.called.cancel();
    }

    /// Waits until the session ends. Cancelling leaves nothing behind.
    pub(crate) async fn called(&self) -> v1::EndReason {
        self.called.cancelled().await;
        self.reason.get().copied().unwrap_or_default()
    }
}

/// What proves on gRPC that a call is for a session: its number and a secret.
#[derive(Clone, Copy)]
pub(crate) struct Token([u8; Token::BYTES]);

impl Token {
    const BYTES: usize = 24;
    const NUMBER_BYTES: usize = 8;

    /// A new secret for a session.
    ///
    /// # Errors
    /// If the kernel has no randomness.
    pub(crate) fn new(session: SessionId) -> io::Result<Token> {
        let mut bytes = [0; Token::BYTES];
        bytes[..Token::NUMBER_BYTES].copy_from_slice(&session.get().to_be_bytes());
        let secret = &mut bytes[Token::NUMBER_BYTES..];
        let got = getrandom(&mut *secret, GetRandomFlags::empty())?;
        // Below 256 bytes the kernel gives all or an error.
        assert_eq!(got, Token::BYTES - Token::NUMBER_BYTES);
        Ok(Token(bytes))
    }

    /// Reads what a client sent in its metadata; `None` if it is no token.
    pub(crate) fn from_hex(text: &[u8]) -> Option<Token> {
        if text.len() != 2 * Token::BYTES {
            return None;
        }
        let digit = |ascii: u8| {
            char::from(ascii)
                .to_digit(16)
                .and_then(|digit| u8::try_from(digit).ok())
        };
        let mut bytes = [0; Token::BYTES];
        for (byte, pair) in bytes.iter_mut().zip(text.chunks_exact(2)) {
            *byte = digit(pair[0])? << 4 | digit(pair[1])?;
        }
        Some(Token(bytes))
    }

    pub(crate) fn session(&self) -> SessionId {
        let mut number = [0; Token::NUMBER_BYTES];
        number.copy_from_slice(&self.0[..Token::NUMBER_BYTES]);
        SessionId::new(u64::from_be_bytes(number))
    }

    pub(crate) fn bytes(&self) -> Vec<u8> {
        self.0.to_vec()
    }

    /// Compares in a time that does not depend on where the first difference is.
    pub(crate) fn matches(&self, other: &Token) -> bool {
        let pairs = self.0.iter().zip(&other.0);
        black_box(pairs.fold(0, |difference, (a, b)| difference | (a ^ b))) == 0
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Token({}, secret)", self.session())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hex(token: &Token) -> String {
        token
            .bytes()
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect()
    }

    #[test]
    fn a_token_names_its_session_and_matches_only_itself() {
        let token = Token::new(SessionId::new(7)).unwrap();
        let read = Token::from_hex(hex(&token).as_bytes()).unwrap();
        assert_eq!(read.session(), SessionId::new(7));
        assert!(read.matches(&token));
        assert!(!Token::new(SessionId::new(7)).unwrap().matches(&token));
    }

    #[test]
    fn what_is_no_token_is_none() {
        let good = hex(&Token::new(SessionId::new(1)).unwrap());
        for bad in [
            "",
            "00",
            &good[1..],
            &format!("{good}00"),
            &format!("+{}", &good[1..]),
            &"ä".repeat(24),
        ] {
            assert!(Token::from_hex(bad.as_bytes()).is_none(), "{bad:?}");
        }
    }

    #[test]
    fn a_token_never_shows_its_secret() {
        let token = Token::new(SessionId::new(1)).unwrap();
        assert_eq!(format!("{token:?}"), "Token(1, secret)");
    }
}
