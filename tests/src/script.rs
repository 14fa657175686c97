//! What a test and its actors say to each other: one JSON line each way.

use domaind_proto::v1;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::files;

/// What an actor shall do.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(tag = "ask", rename_all = "snake_case")]
#[allow(missing_docs)] // fields are those of the calls
pub enum Ask {
    /// Create a domain, which then belongs to the actor's user.
    Create { domain: String },
    /// Attach with the client library -> `{session}`.
    Attach {
        domain: String,
        role: v1::Role,
        access: v1::Access,
    },
    /// Make and register a buffer -> `{memory}`.
    Buffer { len: u64 },
    /// Write into a buffer.
    Fill {
        memory: u64,
        offset: u64,
        bytes: Bytes,
    },
    /// Compare a part of a buffer -> index of the first difference, or null.
    Compare {
        memory: u64,
        offset: u64,
        bytes: Bytes,
    },
    /// Map `count` times -> list of `{iova, id}`.
    Map {
        memory: u64,
        offset: u64,
        len: u64,
        direction: v1::Direction,
        count: usize,
    },
    /// Unmap -> bytes that flowed back.
    Unmap {
        iova: u64,
        id: u64,
        written: Option<u64>,
    },
    /// Map and unmap so many at a time through a pipeline, without end.
    Pipe {
        memory: u64,
        len: u64,
        entries: usize,
    },
    /// Lease -> `{iova, id}`.
    Lease { len: u64 },
    /// Allocate -> `{iova, id}`.
    Alloc { len: u64, persistent: bool },
    /// Free what was allocated.
    Free { iova: u64, id: u64 },
    /// Write at an iova.
    Write { iova: u64, bytes: Bytes },
    /// Compare at an iova -> index of the first difference, or null.
    See { iova: u64, bytes: Bytes },
    /// Look for bytes in all memory of the domain -> the iova, or null.
    Search { bytes: Bytes },
    /// Look for any other byte in all memory -> the iova, or null.
    FirstOther { byte: u8 },
    /// Wait for the session's end -> `{reason, message}`.
    Ended,
    /// Detach in order.
    Detach,
    /// Everything that a peer may ask for by name -> list of
    /// `{call, found}` or `{call, code, reason}`.
    Names { domain: String, session: String },
    /// Every call of `MappingService`, with this token or none, on this
    /// socket -> list of `{call, code, reason}`.
    Knock { token: Option<String>, admin: bool },
    /// Attach by hand and try out the fds that come -> `{enforced, regions}`.
    Inspect {
        domain: String,
        role: v1::Role,
        access: v1::Access,
    },
    /// Attach by hand and register a page -> `{session, token}`.
    AttachByHand { domain: String },
    /// Attach by hand on a socket that children inherit, start one, and obey
    /// no more; the child obeys from now on -> `{child, session}`.
    Inherit { domain: String },
    /// In such a child: register memory on the inherited socket -> how the
    /// daemon closed it.
    SpeakInherited,
    /// Map and unmap in this colour, checking that nobody else's is seen
    /// -> `{maps, foreign}`.
    Colour {
        colour: u8,
        rounds: u64,
        seed: u64,
        max_len: u64,
    },
    /// The same, without end.
    Storm { colour: u8, seed: u64, max_len: u64 },
}

/// Bytes, in few characters.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[allow(missing_docs)] // the names are the docs
pub enum Bytes {
    Text(String),
    Same { byte: u8, len: u64 },
    Pattern { seed: u64, len: u64 },
}

/// How it went.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reply {
    /// Done; what came of it.
    Done(Value),
    /// The daemon said no.
    Refused(v1::Refusal),
    /// Anything else went wrong.
    Failed(String),
}

impl Bytes {
    /// So many of one.
    #[must_use]
    pub fn same(byte: u8, len: u64) -> Bytes {
        Bytes::Same { byte, len }
    }

    /// Zeros.
    #[must_use]
    pub fn zeros(len: u64) -> Bytes {
        Bytes::same(0, len)
    }

    /// Bytes that differ from place to place.
    #[must_use]
    pub fn pattern(seed: u64, len: u64) -> Bytes {
        Bytes::Pattern { seed, len }
    }

    /// The bytes themselves.
    #[must_use]
    pub fn to_vec(&self) -> Vec<u8> {
        let size = |len: &u64| usize::try_from(*len).unwrap_or(usize::MAX);
        match self {
            Bytes::Text(text) => text.clone().into_bytes(),
            Bytes::Same { byte, len } => vec![*byte; size(len)],
            Bytes::Pattern { seed, len } => files::pattern(*seed, size(len)),
        }
    }
}

impl From<&str> for Bytes {
    fn from(text: &str) -> Bytes {
        Bytes::Text(text.to_owned())
    }
}
