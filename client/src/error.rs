//! What can go wrong, for the caller's next step.

use std::fmt;
use std::io;
use std::path::PathBuf;
use std::time::Duration;

use domain_core::addr::{Iova, IovaRange, RangeError};
use domain_core::iotlb::{HeaderError, PageError};
use domain_core::region::{MapError, RegionError};
use domaind_proto::convert::{AnswerMismatch, Malformed};
use domaind_proto::frame::FrameError;
use domaind_proto::names::NameError;
use domaind_proto::v1;
use tonic::{Code, Status};

use crate::pin::PinError;
use crate::pool::PoolError;

/// Why something did not happen.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
#[allow(missing_docs)] // the messages are the docs
pub enum Error {
    /// The daemon said no. The numbers are in the refusal's metadata.
    #[error("{}", .0.message)]
    Refused(v1::Refusal),
    #[error("no daemon can be reached at {path:?}")]
    NoDaemon {
        path: PathBuf,
        #[source]
        cause: io::Error,
    },
    /// Whether the call was carried out is not known.
    #[error("the gRPC connection to the daemon")]
    Transport {
        code: Code,
        #[source]
        cause: Box<dyn std::error::Error + Send + Sync>,
    },
    #[error("the daemon did not finish {what} within {after:?}")]
    Timeout { what: &'static str, after: Duration },
    #[error("the daemon broke the protocol")]
    Protocol(#[from] ProtocolError),
    #[error("the session has ended: {0}")]
    Ended(Ended),
    #[error("map the domain's memory at {range}")]
    Region {
        range: IovaRange,
        #[source]
        cause: MapError,
    },
    #[error("map the {what}")]
    SharedWords {
        what: &'static str,
        #[source]
        cause: MapError,
    },
    #[error("map the registered memory of region {region}")]
    Opened {
        region: u32,
        #[source]
        cause: MapError,
    },
    /// What a [`Pin`](crate::Pin) was asked for is not there.
    #[error(transparent)]
    Pin(#[from] PinError),
    /// A [`Pool`](crate::pool::Pool) could not do it.
    #[error(transparent)]
    Pool(#[from] PoolError),
    /// A [`Pin`](crate::Pin) is alive that must go first. Then the session ends
    /// by itself.
    #[error("a pin of the session was still held after {after:?}")]
    Pinned { after: Duration },
    #[error("make a buffer of {len_bytes} bytes")]
    Buffer {
        len_bytes: u64,
        #[source]
        cause: RegionError,
    },
    /// Read an answer of the [`Pipeline`](crate::Pipeline) first.
    #[error("{in_flight} batches of the pipeline are not answered yet")]
    PipelineFull { in_flight: usize },
    /// Nobody reads its answers any more, or it has failed; then reading them has
    /// said why.
    #[error("the pipeline has ended")]
    PipelineClosed,
    /// Only from [`blocking`](crate::blocking).
    #[error("start a runtime")]
    Runtime(#[source] io::Error),
}

impl Error {
    /// What gRPC would call it; `None` for trouble on this side.
    #[must_use]
    pub fn code(&self) -> Option<Code> {
        match self {
            Error::Refused(refusal) => Some(refusal.grpc_code()),
            Error::NoDaemon { cause, .. } if cause.kind() == io::ErrorKind::PermissionDenied => {
                Some(Code::PermissionDenied)
            }
            Error::NoDaemon { .. } | Error::Ended(_) => Some(Code::Unavailable),
            Error::Transport { code, .. } => Some(*code),
            Error::Timeout { .. } => Some(Code::DeadlineExceeded),
            Error::Protocol(_) => Some(Code::Internal),
            Error::Pin(error) => error.code(),
            Error::Pool(error) => Some(error.code()),
            Error::Region { .. }
            | Error::SharedWords { .. }
            | Error::Opened { .. }
            | Error::Pinned { .. }
            | Error::Buffer { .. }
            | Error::PipelineFull { .. }
            | Error::PipelineClosed
            | Error::Runtime(_) => None,
        }
    }

    /// Which refusal it is; `Unspecified` if it is none.
    #[must_use]
    pub fn reason(&self) -> v1::ErrorReason {
        match self {
            Error::Refused(refusal) => refusal.reason(),
            _ => v1::ErrorReason::Unspecified,
        }
    }

    pub(crate) fn from_transport(cause: tonic::transport::Error) -> Error {
        Error::Transport {
            code: Code::Unavailable,
            cause: cause.into(),
        }
    }

    /// What a failed exchange on the fd socket means.
    pub(crate) fn from_frame(error: FrameError) -> Error {
        match error {
            FrameError::Io(cause) => Error::Ended(Ended::lost(&cause)),
            other => Error::Protocol(ProtocolError::Frame(other)),
        }
    }
}

impl From<Status> for Error {
    fn from(status: Status) -> Error {
        // A status from the wire has no source: one with a source was made on
        // this side, by a connection that failed.
        if std::error::Error::source(&status).is_some() {
            return Error::Transport {
                code: status.code(),
                cause: status.into(),
            };
        }
        Error::Refused(v1::Refusal::from_status(&status))
    }
}

/// What the daemon sent that no daemon should.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
#[allow(missing_docs)] // the messages are the docs
pub enum ProtocolError {
    #[error("it chose version {version}, which was not offered")]
    Version { version: u32 },
    #[error("it sent {got} where {wanted} was due")]
    OutOfTurn {
        got: &'static str,
        wanted: &'static str,
    },
    #[error("its frame")]
    Frame(#[source] FrameError),
    #[error("an fd came with a {frame} frame")]
    UnwantedFd { frame: &'static str },
    #[error("memory came without its fd")]
    MissingFd,
    #[error("an answer to request {request_id}, which nobody made")]
    UnknownRequest { request_id: u64 },
    #[error("a token of {bytes} bytes")]
    TokenLength { bytes: usize },
    #[error("a granule of {bytes} bytes")]
    Granule { bytes: u64 },
    #[error("a session's name")]
    Name(#[source] NameError),
    #[error("a range")]
    Range(#[source] RangeError),
    #[error("the {field} is missing")]
    Missing { field: &'static str },
    #[error("an aperture {range} that is not made of whole granules of {granule_bytes} bytes")]
    Aperture {
        range: IovaRange,
        granule_bytes: u64,
    },
    #[error("{regions} regions")]
    TooManyRegions { regions: u32 },
    #[error("a region of kind {kind}, for which there is no aperture")]
    RegionKind { kind: i32 },
    #[error("a second region of kind {kind}")]
    RegionTwice { kind: i32 },
    #[error("{size_bytes} bytes for a region of kind {kind}")]
    RegionSize { kind: i32, size_bytes: u64 },
    #[error("its page table")]
    Table(#[source] HeaderError),
    #[error("its session page")]
    SessionPage(#[source] PageError),
    #[error("change {generation} after {newest}")]
    Generation { generation: u64, newest: u64 },
    #[error("region {region}, which is no registered memory")]
    NoMemory { region: u32 },
    #[error("region {region} outside its aperture {aperture}")]
    RegionOutside {
        region: IovaRange,
        aperture: IovaRange,
    },
    #[error("{got} answers to {wanted} entries")]
    AnswerCount { got: usize, wanted: usize },
    #[error("{got} bytes at {iova} where {wanted} were asked for in that aperture")]
    Place { iova: Iova, got: u64, wanted: u64 },
    #[error("a direct mapping at {range} that is not what was asked for")]
    Direct { range: IovaRange },
    #[error("pieces that do not cover {range}")]
    Pieces { range: IovaRange },
    #[error("{number} entries of a table")]
    Count { number: u64 },
    #[error("its answer to a batch of a pipeline")]
    Batch(#[from] AnswerMismatch),
    #[error("a message")]
    Malformed(#[from] Malformed),
}

/// How a session ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ended {
    /// Why.
    pub reason: EndReason,
    /// The same for people.
    pub message: String,
}

/// Why a session ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum EndReason {
    /// [`Session::detach`](crate::Session::detach).
    Detached,
    /// Somebody evicted it.
    Evicted,
    /// Its domain was deleted.
    DomainDeleted,
    /// The daemon stops.
    Shutdown,
    /// The daemon says that this side broke the protocol.
    Protocol,
    /// The daemon says that the process that attached has died.
    PeerGone,
    /// It did not acknowledge in time what was removed.
    Fenced,
    /// The daemon broke the protocol.
    DaemonProtocol,
    /// The connection is gone, and nobody said why: the daemon has died.
    ConnectionLost,
    /// The tokio runtime in which the session was attached has shut down.
    RuntimeGone,
    /// Memory of the domain could not be given back: this process still has it
    /// mapped. The daemon keeps it in quarantine.
    NotGivenBack,
    /// A reason that this build does not know.
    Unknown,
}

impl Ended {
    pub(crate) fn new(reason: EndReason, message: impl Into<String>) -> Ended {
        Ended {
            reason,
            message: message.into(),
        }
    }

    pub(crate) fn closed() -> Ended {
        Ended::new(
            EndReason::ConnectionLost,
            "the daemon closed the connection",
        )
    }

    pub(crate) fn lost(cause: &io::Error) -> Ended {
        Ended::new(EndReason::ConnectionLost, format!("the fd socket: {cause}"))
    }

    pub(crate) fn runtime_gone() -> Ended {
        Ended::new(
            EndReason::RuntimeGone,
            "the tokio runtime of the session has shut down",
        )
    }
}

impl From<v1::SessionEnded> for Ended {
    fn from(wire: v1::SessionEnded) -> Ended {
        let reason = match wire.reason() {
            v1::EndReason::Evicted => EndReason::Evicted,
            v1::EndReason::DomainDeleted => EndReason::DomainDeleted,
            v1::EndReason::Shutdown => EndReason::Shutdown,
            v1::EndReason::Protocol => EndReason::Protocol,
            v1::EndReason::PeerGone => EndReason::PeerGone,
            v1::EndReason::Fenced => EndReason::Fenced,
            v1::EndReason::Unspecified => EndReason::Unknown,
        };
        Ended::new(reason, wire.message)
    }
}

impl From<ProtocolError> for Ended {
    fn from(error: ProtocolError) -> Ended {
        let message = domaind_proto::refusal::sentence(&error);
        Ended::new(EndReason::DaemonProtocol, message)
    }
}

impl fmt::Display for Ended {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({:?})", self.message, self.reason)
    }
}

/// The end of a guard's life was refused: the guard is given back, and all is
/// as it was. Try again, or drop it.
///
/// As an [`Error`] (`?` converts) it loses the guard, which is then undone as
/// by dropping.
#[derive(Debug)]
pub struct Kept<G> {
    /// What would have ended.
    pub guard: G,
    /// Why it did not. Boxed, because guards are large already.
    pub error: Box<Error>,
}

impl<G> Kept<G> {
    pub(crate) fn new(guard: G, error: Error) -> Kept<G> {
        Kept {
            guard,
            error: Box::new(error),
        }
    }
}

impl<G> From<Kept<G>> for Error {
    fn from(kept: Kept<G>) -> Error {
        *kept.error
    }
}

impl<G> fmt::Display for Kept<G> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.error.fmt(f)
    }
}

impl<G: fmt::Debug> std::error::Error for Kept<G> {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.error.source()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_status_from_the_wire_is_a_refusal_with_its_numbers() {
        let refusal = v1::Refusal::because(Code::NotFound, v1::ErrorReason::NoSuchMemory, "no 7")
            .with("memory_id", 7);

        let error = Error::from(Status::from(refusal));

        let Error::Refused(got) = &error else {
            panic!("{error:?}")
        };
        assert_eq!(got.metadata["memory_id"], "7");
        assert_eq!(error.code(), Some(Code::NotFound));
        assert_eq!(error.reason(), v1::ErrorReason::NoSuchMemory);
        assert_eq!(error.to_string(), "no 7");
    }

    #[test]
    fn a_status_made_by_a_failed_connection_is_not_a_refusal() {
        let status = Status::from_error(Box::new(io::Error::from(io::ErrorKind::BrokenPipe)));

        let error = Error::from(status);

        assert!(matches!(error, Error::Transport { .. }), "{error:?}");
        assert_eq!(error.reason(), v1::ErrorReason::Unspecified);
    }

    #[test]
    fn a_socket_without_a_daemon_is_unavailable_and_one_not_ours_is_denied() {
        let with = |kind: io::ErrorKind| Error::NoDaemon {
            path: "/run/domaind/public/api.sock".into(),
            cause: kind.into(),
        };

        assert_eq!(
            with(io::ErrorKind::NotFound).code(),
            Some(Code::Unavailable)
        );
        assert_eq!(
            with(io::ErrorKind::PermissionDenied).code(),
            Some(Code::PermissionDenied)
        );
    }
}
