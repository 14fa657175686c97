//! Waiting until nobody can still use what was removed.

use domain_core::session::{Progress, Removal, SessionId};
use domaind_proto::names::session_name;
use domaind_proto::v1::{ErrorReason, Refusal};
use tonic::Code;

use crate::hosted::Hosted;
use crate::signal::Gone;

/// Resolves when every session that could have seen what was removed has
/// acknowledged it or has ended. Each session's own conversation sees to it that
/// it does not owe for ever. Cancelling changes nothing but that nobody waits.
///
/// # Errors
/// `DEADLINE_EXCEEDED` naming the sessions that have ended without
/// acknowledging, and may still use it.
pub(crate) async fn acknowledged(domain: &Hosted, generation: u64) -> Result<(), Refusal> {
    let removal = Removal { generation };
    let mut changes = domain.signal.subscribe();
    loop {
        match domain.core.progress(removal) {
            Progress::Done => return Ok(()),
            Progress::Quarantined(sessions) if !domain.parting.includes(&sessions) => {
                return Err(not_acknowledged(&sessions));
            }
            Progress::Quarantined(_) | Progress::Waiting(_) => {}
        }
        if let Err(Gone) = changes.changed().await {
            return Ok(());
        }
    }
}

/// Resolves when all of these sessions hold nothing any more, or `limit` has
/// passed.
///
/// # Errors
/// `DEADLINE_EXCEEDED` naming those that may still use something.
pub(crate) async fn gone(
    domain: &Hosted,
    sessions: &[SessionId],
    limit: std::time::Duration,
) -> Result<(), Refusal> {
    let mut changes = domain.signal.subscribe();
    let left = || {
        let there = sessions.iter().filter(|id| domain.core.is_known(**id));
        there.copied().collect::<Vec<_>>()
    };
    // What they held is zeroed by then, too.
    let is_settled = || left().is_empty() && domain.core.usage().invalidating == 0;
    let all_gone = async {
        while !is_settled() {
            if changes.changed().await.is_err() {
                return;
            }
        }
    };
    match tokio::time::timeout(limit, all_gone).await {
        Ok(()) => Ok(()),
        Err(_) => Err(not_acknowledged(&left())),
    }
}

fn not_acknowledged(sessions: &[SessionId]) -> Refusal {
    let names: Vec<_> = sessions.iter().map(|id| session_name(*id)).collect();
    let names = names.join(",");
    let message = format!(
        "it is removed, and {names} did not acknowledge that: what they may still reach is in quarantine until they do or are gone"
    );
    let reason = ErrorReason::NotAcknowledged;
    Refusal::because(Code::DeadlineExceeded, reason, message).with("sessions", names)
}
