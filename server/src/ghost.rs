//! Sessions that have ended and may still reach something, until they are
//! proven gone.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;

use crate::live::Live;
use crate::offload::off_worker;
use crate::peer::Peer;
use crate::registry::Registry;

/// Looking costs a system call for each region of the domain.
const PAUSE_MIN: Duration = Duration::from_millis(1);
const PAUSE_MAX: Duration = Duration::from_millis(250);
/// A process that was killed lets go of its files a moment after its sockets
/// have closed; of much memory, after a longer one.
const PARTING: Duration = Duration::from_secs(1);

/// Looks whether a session that has just ended is gone already; of one that ended
/// by itself for a moment, because it soon is. Answers so.
pub(crate) async fn looks_gone(
    registry: &Arc<Registry>,
    live: &Arc<Live>,
    by_itself: bool,
) -> bool {
    let until = Instant::now() + PARTING;
    let mut pause = PAUSE_MIN;
    let gone = loop {
        if bury(registry, live).await {
            break true;
        }
        if !by_itself || Instant::now() > until {
            break false;
        }
        sleep(pause).await;
        pause *= 2;
    };
    registry.parted(live);
    gone
}

/// Looks again and again until a session is gone, or the daemon stops. No time
/// that passes frees anything: only what the kernel says does.
pub(crate) async fn keep_looking(
    registry: Arc<Registry>,
    live: Arc<Live>,
    stop: CancellationToken,
) {
    tracing::warn!(session = %live.id, peer = %live.peer, "it has ended and may still reach the domain's memory");
    let mut pause = PAUSE_MIN;
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            () = sleep(pause) => {}
        }
        if bury(&registry, &live).await {
            tracing::info!(session = %live.id, "it can reach nothing any more");
            return;
        }
        pause = PAUSE_MAX.min(pause * 2);
    }
}

/// Forgets a session that can reach nothing any more; answers whether it can.
async fn bury(registry: &Arc<Registry>, live: &Arc<Live>) -> bool {
    if !is_gone(live) {
        return false;
    }
    // What it held back may be much to zero.
    let (registry, live) = (Arc::clone(registry), Arc::clone(live));
    off_worker(move || registry.forget(&live)).await.is_ok()
}

/// Has everybody let go of what the session was given? Of client memory that is
/// known when the process has ended, whose children have no part in it unless they have one
/// in the domain's memory, too.
fn is_gone(live: &Live) -> bool {
    let core = &live.domain.core;
    if !core.is_fenced(live.id) {
        return true;
    }
    let is_granted = core.is_granted(live.id.get());
    match is_granted {
        Ok(is_granted) => !is_granted && (!core.has_opened(live.id) || live.peer.is_dead()),
        // Without such locks it takes the process to end, and its word for its children.
        Err(error) => {
            tracing::debug!(session = %live.id, %error, "asking who holds its grants");
            Peer::is_dead(&live.peer)
        }
    }
}
