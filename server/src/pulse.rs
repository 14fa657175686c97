//! Whether the daemon lives: the runtime that serves beats, and whoever asks,
//! from whichever thread, learns how long ago.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use tokio::time::{MissedTickBehavior, interval};

use crate::registry::Registry;

/// How often it beats by itself.
const INTERVAL: Duration = Duration::from_secs(1);

/// The last sign of life.
#[derive(Debug)]
pub struct Pulse {
    registry: Arc<Registry>,
    began: Instant,
    /// Milliseconds after `began`.
    last_ms: AtomicU64,
}

/// How much there is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Census {
    pub(crate) domains: usize,
    pub(crate) sessions: usize,
}

impl Pulse {
    pub(crate) fn new(registry: Arc<Registry>) -> Pulse {
        Pulse {
            registry,
            began: Instant::now(),
            last_ms: AtomicU64::new(0),
        }
    }

    /// Beats. Looks into the tables first: if they are locked for ever, nothing
    /// is served any more, and nothing beats either.
    pub(crate) fn beat(&self) -> Census {
        let census = self.registry.census();
        self.last_ms.store(self.now_ms(), Ordering::Relaxed);
        census
    }

    /// How long ago the last beat was.
    #[must_use]
    pub fn age(&self) -> Duration {
        let last_ms = self.last_ms.load(Ordering::Relaxed);
        Duration::from_millis(self.now_ms().saturating_sub(last_ms))
    }

    /// Beats for ever. Cancelling it is the end of it.
    pub(crate) async fn go_on(self: Arc<Self>) {
        let mut ticks = interval(INTERVAL);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            self.beat();
        }
    }

    fn now_ms(&self) -> u64 {
        u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX)
    }
}
