//! Costly calls, which wait their turn: few at a time of one user and of all.
//!
//! Who has one place after the other to take takes them in this order: in the
//! user's own line, then in the line of all. So at most as many of a user's
//! calls stand before another's as run of one user at a time.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use domain_core::limits::{
    LARGE_CALLS, LARGE_CALLS_PER_USER, LARGE_CALLS_WAITING_PER_USER, TABLE_STREAMS,
    TABLE_STREAMS_PER_USER,
};
use domaind_proto::v1::{ErrorReason, Refusal};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tonic::Code;

use crate::tenant::Tenant;

/// The calls of one kind. Clones share the lines.
#[derive(Clone, Debug)]
pub(crate) struct Queue {
    limits: Limits,
    running: Arc<Semaphore>,
    /// Only users with at least one call. Held for one look-up; a panic leaves
    /// it whole.
    users: Arc<Mutex<HashMap<Tenant, User>>>,
}

#[derive(Clone, Copy, Debug)]
struct Limits {
    /// What a refusal calls it.
    quota: &'static str,
    /// Of one user, under way: waiting or running.
    calls_per_user: usize,
    /// Of one user, running.
    running_per_user: usize,
    /// Of all users, running.
    running: usize,
}

/// One user's line.
#[derive(Debug)]
struct User {
    calls: usize,
    running: Arc<Semaphore>,
}

/// A call that counts among its user's; dropping it gives the place up.
#[derive(Debug)]
pub(crate) struct Queued {
    queue: Queue,
    tenant: Tenant,
    running_of_user: Arc<Semaphore>,
}

/// A call that may run, until this is dropped.
#[derive(Debug)]
pub(crate) struct Place {
    _of_all: OwnedSemaphorePermit,
    _of_user: OwnedSemaphorePermit,
    _queued: Queued,
}

impl Queue {
    /// For calls that take as long as a table is large or an aperture is long.
    pub(crate) fn of_large_calls() -> Queue {
        Queue::new(Limits {
            quota: "large_calls",
            calls_per_user: LARGE_CALLS_WAITING_PER_USER,
            running_per_user: LARGE_CALLS_PER_USER,
            running: LARGE_CALLS,
        })
    }

    /// For tables that are on their way.
    pub(crate) fn of_table_streams() -> Queue {
        Queue::new(Limits {
            quota: "table_streams",
            calls_per_user: TABLE_STREAMS_PER_USER,
            running_per_user: TABLE_STREAMS_PER_USER,
            running: TABLE_STREAMS,
        })
    }

    fn new(limits: Limits) -> Queue {
        Queue {
            limits,
            running: Arc::new(Semaphore::new(limits.running)),
            users: Arc::default(),
        }
    }

    /// Counts a call of a user, which does not run yet.
    ///
    /// # Errors
    /// `RESOURCE_EXHAUSTED` for a user that has too many.
    pub(crate) fn enter(&self, tenant: Tenant) -> Result<Queued, Refusal> {
        let Limits {
            calls_per_user,
            running_per_user,
            ..
        } = self.limits;
        let mut users = self.lock();
        let user = users.entry(tenant).or_insert_with(|| User {
            calls: 0,
            running: Arc::new(Semaphore::new(running_per_user)),
        });
        if user.calls >= calls_per_user {
            return Err(self.limits.refusal(tenant));
        }
        user.calls += 1;
        Ok(Queued {
            queue: self.clone(),
            tenant,
            running_of_user: Arc::clone(&user.running),
        })
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Tenant, User>> {
        self.users.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Limits {
    fn refusal(&self, tenant: Tenant) -> Refusal {
        let Limits {
            quota,
            calls_per_user: most,
            ..
        } = self;
        let message = format!("{tenant} has {most} of {quota} under way already");
        Refusal::because(Code::ResourceExhausted, ErrorReason::QuotaExceeded, message)
            .with("quota", quota)
            .with("limit", most)
            .with("used", most)
    }
}

impl Queued {
    /// Waits until the call may run. Cancelling leaves the line and gives the
    /// user's count back.
    pub(crate) async fn place(self) -> Place {
        // The user's first: who waits for the other users holds nothing of theirs.
        let of_user = Arc::clone(&self.running_of_user).acquire_owned().await;
        let of_all = Arc::clone(&self.queue.running).acquire_owned().await;
        Place {
            _of_all: of_all.expect("nobody closes it"),
            _of_user: of_user.expect("nobody closes it"),
            _queued: self,
        }
    }
}

impl Drop for Queued {
    fn drop(&mut self) {
        let mut users = self.queue.lock();
        let user = users.get_mut(&self.tenant).expect("it has this call");
        user.calls -= 1;
        if user.calls == 0 {
            users.remove(&self.tenant);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::future::Future;
    use std::pin::pin;
    use std::task::{Context, Poll, Waker};

    fn user(uid: u32) -> Tenant {
        Tenant::user(uid)
    }

    /// Three calls a user, of which one runs; two of all.
    fn queue() -> Queue {
        Queue::new(Limits {
            quota: "tests",
            calls_per_user: 3,
            running_per_user: 1,
            running: 2,
        })
    }

    /// The place, if it is to be had without waiting.
    fn at_once(queued: Queued) -> Option<Place> {
        ready(pin!(queued.place()))
    }

    fn ready<F: Future>(future: std::pin::Pin<&mut F>) -> Option<F::Output> {
        match future.poll(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(output) => Some(output),
            Poll::Pending => None,
        }
    }

    #[test]
    fn a_user_that_has_too_many_is_refused_and_others_are_not() {
        let queue = queue();
        let held: Vec<_> = (0..3).map(|_| queue.enter(user(1)).unwrap()).collect();
        let refusal = queue.enter(user(1)).unwrap_err();
        assert_eq!(refusal.grpc_code(), Code::ResourceExhausted);
        assert_eq!(refusal.reason(), ErrorReason::QuotaExceeded);
        assert_eq!(refusal.metadata["quota"], "tests");
        assert_eq!(refusal.metadata["limit"], "3");
        assert!(queue.enter(user(2)).is_ok());
        drop(held);
        assert!(queue.enter(user(1)).is_ok());
        assert!(queue.lock().is_empty());
    }

    #[test]
    fn one_users_line_does_not_stand_before_another_user() {
        let queue = queue();
        let running = at_once(queue.enter(user(1)).unwrap()).unwrap();
        let mut second = pin!(queue.enter(user(1)).unwrap().place());
        let mut third = pin!(queue.enter(user(1)).unwrap().place());
        assert!(ready(second.as_mut()).is_none() && ready(third.as_mut()).is_none());
        // The second of two places is not for those who wait for the first.
        let other = at_once(queue.enter(user(2)).unwrap()).unwrap();
        let mut late = pin!(queue.enter(user(3)).unwrap().place());
        assert!(ready(late.as_mut()).is_none());
        drop(other);
        assert!(ready(late.as_mut()).is_some());
        drop(running);
        assert!(ready(third.as_mut()).is_none(), "before its turn");
        assert!(ready(second.as_mut()).is_some());
    }

    #[test]
    fn who_is_cancelled_while_it_waits_leaves_the_line() {
        let queue = queue();
        let running = at_once(queue.enter(user(1)).unwrap()).unwrap();
        {
            let mut cancelled = pin!(queue.enter(user(1)).unwrap().place());
            assert!(ready(cancelled.as_mut()).is_none());
        }
        let other = at_once(queue.enter(user(2)).unwrap()).unwrap();
        {
            let mut cancelled = pin!(queue.enter(user(3)).unwrap().place());
            assert!(ready(cancelled.as_mut()).is_none());
        }
        assert_eq!(queue.lock().len(), 2);
        assert_eq!(queue.lock()[&user(1)].calls, 1);
        drop((running, other));
        assert!(queue.lock().is_empty());
        assert!(at_once(queue.enter(user(1)).unwrap()).is_some());
        assert_eq!(queue.running.available_permits(), 2);
    }

    #[test]
    fn one_user_cannot_take_all_the_places() {
        for queue in [Queue::of_large_calls(), Queue::of_table_streams()] {
            let places = (0..queue.limits.calls_per_user)
                .filter_map(|_| at_once(queue.enter(user(1)).unwrap()))
                .collect::<Vec<_>>();
            assert!(!places.is_empty());
            assert!(places.len() <= queue.limits.running / 4);
        }
    }
}
