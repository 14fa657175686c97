//! Work that may block, off the runtime's workers.

use domaind_proto::v1::{ErrorReason, Refusal};
use tonic::Code;

/// Runs `work` on a thread that may block, to its end even if the caller is
/// cancelled.
///
/// # Errors
/// `INTERNAL` if it panics; the panic hook has logged it.
pub(crate) async fn off_worker<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, Refusal> {
    tokio::task::spawn_blocking(work).await.map_err(|_| bug())
}

/// What a client is told of a bug of ours: nothing but that it is one.
pub(crate) fn bug() -> Refusal {
    Refusal::because(
        Code::Internal,
        ErrorReason::Bug,
        "a bug in domaind; its log has the backtrace",
    )
}
