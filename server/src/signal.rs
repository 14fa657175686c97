//! That something has changed in a domain, told to whoever waits for it.

use domain_core::domain::Listener;
use tokio::sync::watch;

/// That something has changed in one domain: rung by the domain under its lock,
/// heard by tasks. What has changed is for them to ask.
///
/// While nobody listens, ringing is one relaxed load. That nobody is missed by
/// it is the lock's doing: who listens does so before it looks at the domain
/// under the same lock, so a change that it did not see is rung behind that.
#[derive(Debug)]
pub(crate) struct Signal {
    bell: watch::Sender<()>,
}

/// Hears every change from now on, those that come one upon the other as one.
#[derive(Debug)]
pub(crate) struct Changes {
    bell: watch::Receiver<()>,
}

/// The domain is not there any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Gone;

impl Signal {
    pub(crate) fn new() -> Signal {
        Signal {
            bell: watch::Sender::new(()),
        }
    }

    /// To be called before the first look at the domain.
    pub(crate) fn subscribe(&self) -> Changes {
        Changes {
            bell: self.bell.subscribe(),
        }
    }
}

impl Listener for Signal {
    fn changed(&self) {
        if self.bell.receiver_count() > 0 {
            self.bell.send_replace(());
        }
    }
}

impl Changes {
    /// Waits for a change since the subscription, or since the last time that
    /// this or [`seen`](Changes::seen) told of one. Cancel safe.
    ///
    /// # Errors
    /// [`Gone`] if the domain is not there any more.
    pub(crate) async fn changed(&mut self) -> Result<(), Gone> {
        self.bell.changed().await.map_err(|_| Gone)
    }

    /// What has changed up to now is about to be looked at. Answers whether
    /// anything has.
    pub(crate) fn seen(&mut self) -> bool {
        let has_changed = self.bell.has_changed().unwrap_or(false);
        if has_changed {
            self.bell.mark_unchanged();
        }
        has_changed
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::future::Future;
    use std::pin::pin;
    use std::task::{Context, Poll, Waker};

    /// Has something changed?
    fn heard(changes: &mut Changes) -> Option<Result<(), Gone>> {
        let changed = pin!(changes.changed());
        match changed.poll(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(heard) => Some(heard),
            Poll::Pending => None,
        }
    }

    #[test]
    fn nothing_is_missed_between_the_subscription_and_the_waiting() {
        let signal = Signal::new();
        signal.changed();
        let mut changes = signal.subscribe();
        assert_eq!(heard(&mut changes), None, "that was before");
        signal.changed();
        signal.changed();
        assert_eq!(heard(&mut changes), Some(Ok(())));
        assert_eq!(heard(&mut changes), None, "two at once are one");
    }

    #[test]
    fn what_was_seen_is_not_told_again() {
        let signal = Signal::new();
        let mut changes = signal.subscribe();
        signal.changed();
        assert!(changes.seen());
        assert!(!changes.seen());
        assert_eq!(heard(&mut changes), None);
        signal.changed();
        assert_eq!(heard(&mut changes), Some(Ok(())));
    }

    #[test]
    fn a_change_that_nobody_hears_is_not_kept() {
        let signal = Signal::new();
        drop(signal.subscribe());
        signal.changed();
        assert_eq!(heard(&mut signal.subscribe()), None);
    }

    #[tokio::test]
    async fn everybody_who_waits_is_told() {
        let signal = Signal::new();
        let waiting = (0..3).map(|_| {
            let mut changes = signal.subscribe();
            tokio::spawn(async move { changes.changed().await })
        });
        let waiting: Vec<_> = waiting.collect();
        signal.changed();
        for task in waiting {
            assert_eq!(task.await.unwrap(), Ok(()));
        }
    }

    #[test]
    fn the_end_of_the_domain_is_told() {
        let signal = Signal::new();
        let mut changes = signal.subscribe();
        drop(signal);
        assert_eq!(heard(&mut changes), Some(Err(Gone)));
    }
}
