//! The wire of domaind, and nothing else: the generated protobuf types, the
//! only conversion between them and `domain-core`, the one table of errors,
//! the frames of the fd socket, where the sockets are, and how people write
//! sizes and ranges.

pub mod codec;
pub mod convert;
pub mod frame;
pub mod names;
pub mod paths;
pub mod range;
pub mod refusal;
pub mod size;

/// Generated from `domaind/v1/*.proto`: messages, clients, servers, and
/// canonical proto3 JSON for every message.
#[allow(missing_docs, unreachable_pub, clippy::all, clippy::pedantic)]
pub mod v1 {
    tonic::include_proto!("domaind.v1");
    include!(concat!(env!("OUT_DIR"), "/domaind.v1.serde.rs"));
}

/// What every message in [`v1`] can: be encoded and decoded.
pub use prost::Message;

/// The encoded descriptors of everything in [`v1`], for reflection.
pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));

/// Metadata key that carries a session's token, in hexadecimal.
pub const SESSION_METADATA: &str = "domaind-session";

/// Newest version of the fd socket's protocol that this build speaks.
pub const FD_PROTOCOL_MAX: u32 = 1;
/// Oldest version of the fd socket's protocol that this build speaks.
pub const FD_PROTOCOL_MIN: u32 = 1;
