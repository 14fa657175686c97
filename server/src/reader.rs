//! A session as its domain has to wait for it.

use std::time::Duration;

use domain_core::iotlb::{Barrier, PageRegion, SessionPage};
use domain_core::region::{Grant, RegionError};
use domain_core::session::{Reader, SessionId};
use domaind_proto::v1::AckMode;
use tokio::sync::Notify;
use tokio::time::Instant;

/// How a session acknowledges, and who is to tell it to.
#[derive(Debug)]
pub(crate) struct SessionReader {
    page: SessionPage<PageRegion>,
    by_frames: bool,
    /// Rung when there is something to acknowledge, and when something was.
    bell: Notify,
}

impl SessionReader {
    /// Makes the session page.
    ///
    /// # Errors
    /// [`RegionError`]; nothing is left behind.
    pub(crate) fn new(session: SessionId, mode: AckMode) -> Result<SessionReader, RegionError> {
        let page = SessionPage::create(&format!("domaind:session-{session}"))?;
        // The core does so.
        page.promise_to_ask();
        Ok(SessionReader {
            page,
            by_frames: mode != AckMode::Pins,
            bell: Notify::new(),
        })
    }

    /// The page, for the session.
    pub(crate) fn grant_page(&self) -> Result<Grant, RegionError> {
        self.page.grant()
    }

    /// Waits for the bell. Rung before, it resolves at once. Cancel safe.
    pub(crate) async fn rung(&self) {
        self.bell.notified().await;
    }

    pub(crate) fn ring(&self) {
        self.bell.notify_one();
    }
}

impl Reader for SessionReader {
    fn by_frames(&self) -> bool {
        self.by_frames
    }

    fn holds_older_than(&self, generation: u64, barrier: &Barrier) -> bool {
        self.page.holds_older_than(generation, barrier)
    }

    fn ask(&self, _generation: u64) {
        self.ring();
    }

    fn fence(&self, generation: u64) {
        self.page.fence(generation);
    }

    fn revoke(&self) {
        self.page.revoke();
    }
}

/// How long a session may owe an acknowledgment. What it does acknowledge gives
/// it the whole time again.
#[derive(Debug)]
pub(crate) struct Patience {
    limit: Duration,
    /// What it had acknowledged, and when it must have acknowledged more.
    waiting: Option<(u64, Instant)>,
}

impl Patience {
    pub(crate) fn new(limit: Duration) -> Patience {
        Patience {
            limit,
            waiting: None,
        }
    }

    /// It owes something and has acknowledged `acked`: until when may it?
    pub(crate) fn until(&mut self, acked: u64) -> Instant {
        let known = self.waiting.filter(|(before, _)| *before == acked);
        let (_, deadline) = *self
            .waiting
            .insert(known.unwrap_or((acked, Instant::now() + self.limit)));
        deadline
    }

    /// It owes nothing.
    pub(crate) fn renew(&mut self) {
        self.waiting = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn patience_ends_when_nothing_more_is_acknowledged_and_begins_anew_when_something_is() {
        let mut patience = Patience::new(Duration::from_secs(5));
        let first = patience.until(3);
        tokio::time::advance(Duration::from_secs(4)).await;
        assert_eq!(patience.until(3), first, "asked again, it is the same debt");
        let second = patience.until(4);
        assert_eq!(
            second - first,
            Duration::from_secs(4),
            "it has acknowledged more"
        );
        patience.renew();
        tokio::time::advance(Duration::from_secs(4)).await;
        assert!(patience.until(4) > second, "a new debt");
    }
}
