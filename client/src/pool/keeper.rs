//! The task that leases what a pool lacks, and gives back what it does not use.

use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Weak};
use std::time::Duration;

use domain_core::addr::Iova;
use domain_core::lease::LeaseSpec;
use domain_core::region::Access;
use tokio::sync::Notify;
use tokio::time::{Instant, sleep, timeout_at};
use tonic::Code;

use super::inner::{Added, Inner};
use super::{PoolError, PoolOptions};
use crate::error::{Error, ProtocolError};
use crate::session::Session;

/// How long the task leaves the daemon alone after a refusal; after each further one twice as long.
const PAUSE_MIN: Duration = Duration::from_millis(5);
/// And at most so long.
const PAUSE_MAX: Duration = Duration::from_millis(500);

/// Wakes the task.
#[derive(Debug, Default)]
pub(super) struct Bell {
    rung: Notify,
    /// The most bytes in one piece that were not found since the task looked.
    wanted: AtomicU64,
}

impl Bell {
    /// More is needed: so many bytes in one piece, or some before they are needed.
    pub(super) fn ring_for(&self, wanted: u64) {
        self.wanted.fetch_max(wanted, Relaxed);
        self.rung.notify_one();
    }
}

/// A pool with its first lease, and its task.
pub(super) async fn start(session: &Session, options: PoolOptions) -> Result<Arc<Inner>, Error> {
    if session.access() != Access::ReadWrite {
        return Err(PoolError::ReadOnly.into());
    }
    let base = session.bounce().map(|aperture| aperture.start());
    // Without an aperture it is for the daemon to say so.
    let inner = Arc::new(Inner::new(session, base.unwrap_or(Iova::new(0)), options));
    lease(&inner, options.lease_bytes.min(options.most_bytes)).await?;
    let bell = Arc::clone(&inner.bell);
    session.spawn(keep(Arc::downgrade(&inner), bell, options.idle_after));
    Ok(inner)
}

/// Runs until the pool is gone.
async fn keep(pool: Weak<Inner>, bell: Arc<Bell>, idle_after: Duration) {
    let mut tidy_at = Instant::now() + idle_after;
    let mut pause = PAUSE_MIN;
    loop {
        let rung = timeout_at(tidy_at, bell.rung.notified()).await.is_ok();
        let Some(inner) = pool.upgrade() else {
            return;
        };
        if !rung {
            inner.tidy();
            tidy_at = Instant::now() + idle_after;
            continue;
        }
        let refilled = refill(&inner, bell.wanted.swap(0, Relaxed)).await;
        drop(inner);
        match refilled {
            Ok(()) => pause = PAUSE_MIN,
            Err(_) => {
                sleep(pause).await;
                pause = PAUSE_MAX.min(pause * 2);
            }
        }
    }
}

/// Leases until nothing is lacking, or no more is allowed.
async fn refill(inner: &Inner, mut wanted: u64) -> Result<(), Error> {
    while let Some(bytes) = inner.lacks(wanted) {
        match lease(inner, bytes).await {
            Ok(()) => {}
            // There is less than a whole lease left: what is wanted may still be had.
            Err(error) if wanted > 0 && wanted < bytes && is_exhausted(&error) => {
                return lease(inner, wanted).await;
            }
            Err(error) => return Err(error),
        }
        wanted = 0;
    }
    Ok(())
}

/// Leases so many bytes, in whole granules.
async fn lease(inner: &Inner, bytes: u64) -> Result<(), Error> {
    loop {
        let epoch = inner.epoch();
        let lease = inner.session().lease(LeaseSpec::of(bytes)).await?;
        match inner.add(lease, epoch) {
            Added::Done => return Ok(()),
            Added::TooLate(lease) => drop(lease),
            Added::Useless(lease) => {
                let (iova, got, wanted) = (lease.iova(), lease.len_bytes(), bytes);
                return Err(ProtocolError::Place { iova, got, wanted }.into());
            }
        }
    }
}

fn is_exhausted(error: &Error) -> bool {
    error.code() == Some(Code::ResourceExhausted)
}

#[cfg(test)]
mod tests {
    use domain_core::session::Role;

    use super::*;
    use crate::client::AttachOptions;
    use crate::fake::FakeDaemon;

    #[tokio::test]
    async fn who_cannot_write_has_no_pool_and_asks_for_no_lease() {
        let options = AttachOptions::new(Role::Driver, Access::ReadOnly);
        let fake = FakeDaemon::start_with(options).await;

        let refused = fake.session.pool(PoolOptions::default()).await.unwrap_err();

        assert!(
            matches!(refused, Error::Pool(PoolError::ReadOnly)),
            "{refused:?}"
        );
        assert_eq!(refused.code(), Some(Code::PermissionDenied));
        assert_eq!(*fake.calls.released.lock().unwrap(), []);
    }
}
