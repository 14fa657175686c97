//! What the black-box tests of domaind share: a real daemon ([`Node`]), real
//! client processes ([`Actor`]), a session without the client library's
//! manners ([`Raw`]), and the command line ([`Ctl`]).
//!
//! The tests are derived from DESIGN.md and the comments of the protos. They
//! start the programs that lie beside them in the target directory and link
//! nothing of the daemon.
//!
//! Rules: every test ends what it started, by pid; what it waits for is a
//! condition with a deadline, never a time. Tests run on a runtime with a
//! worker thread, so that connections are served while the test itself waits
//! for a process (a daemon that stops says goodbye to each connection, and
//! waits for the answer).

// A harness fails loudly: what is not as it must be ends the test.
#![allow(clippy::missing_errors_doc)]

pub mod accessor;
pub mod actor;
pub mod build;
pub mod bytes;
pub mod children;
pub mod ctl;
pub mod direct;
pub mod effort;
pub mod files;
pub mod frames;
pub mod grant;
pub mod knock;
pub mod namespace;
pub mod node;
pub mod pipe;
pub mod pod;
pub mod raw;
pub mod refusal;
pub mod script;
pub mod users;
pub mod wait;

pub use actor::Actor;
pub use ctl::{Ctl, Output};
pub use direct::Caller;
pub use effort::rounds;
pub use node::{Counts, Node};
pub use pipe::Pipe;
pub use raw::Raw;
pub use refusal::{Refused, refused};
pub use script::{Ask, Bytes};

pub use domaind_proto::v1;
pub use domaind_proto::v1::ErrorReason as Reason;
pub use tonic::Code;

/// The usual granule, and the page of every machine that these tests run on.
pub const P: u64 = 4096;
