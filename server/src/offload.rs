//! Work that may block, off the runtime's workers.

use domaind_proto::v1::{ErrorReason, Refusal};
use tokio::runtime::{Handle, RuntimeFlavor};
use tonic::Code;

/// Copies above this many bytes make room for other calls first.
pub(crate) const LARGE_BYTES: u64 = 1 << 20;

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

/// Runs `work`, which copies so many bytes, on this thread; if they are many,
/// other calls get another thread meanwhile.
pub(crate) fn copying<R>(bytes: u64, work: impl FnOnce() -> R) -> R {
    yielding(bytes > LARGE_BYTES, work)
}

/// Runs `work` on this thread; if it is long, other calls get another thread
/// meanwhile.
pub(crate) fn yielding<R>(is_long: bool, work: impl FnOnce() -> R) -> R {
    let can_move = || Handle::current().runtime_flavor() == RuntimeFlavor::MultiThread;
    match is_long && can_move() {
        true => tokio::task::block_in_place(work),
        false => work(),
    }
}

/// What a client is told of a bug of ours: nothing but that it is one.
pub(crate) fn bug() -> Refusal {
    Refusal::because(
        Code::Internal,
        ErrorReason::Bug,
        "a bug in domaind; its log has the backtrace",
    )
}
