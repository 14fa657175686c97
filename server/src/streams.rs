//! Streams that may stay as long as they like: watchers of domains, and pipelines
//! of sessions. Counted, so that nobody has too many.

use std::collections::HashMap;
use std::fmt::Debug;
use std::hash::Hash;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use domain_core::limits::{PIPELINES_PER_SESSION, PIPELINES_PER_USER, WATCHERS, WATCHERS_PER_USER};
use domain_core::session::SessionId;
use domaind_proto::v1::{ErrorReason, Refusal};
use tonic::Code;

use crate::registry::Principal;
use crate::tenant::Tenant;

/// Watchers of domains, counted for their users, and for all behind a door.
pub(crate) type Watchers = Streams<Principal>;
/// A watcher that counts, until this is dropped.
pub(crate) type Watching = Open<Principal>;
/// Pipelines, counted for their sessions, and for all sessions of a user.
pub(crate) type Pipelines = Streams<Piping>;

/// Whose pipeline it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Piping {
    pub(crate) session: SessionId,
    pub(crate) tenant: Tenant,
}

/// Who has streams of one kind, and how many there may be.
pub(crate) trait Holder: Copy + Debug + Eq + Hash {
    /// What the quota is called, and the streams themselves.
    const QUOTA: &'static str;
    /// Of one holder.
    const EACH: usize;
    /// Of all that share with one another.
    const TOGETHER: usize;

    fn shares_with(&self, other: &Self) -> bool;

    /// The holder, for people.
    fn who(&self) -> String;

    /// All that share with it, for people.
    fn all(&self) -> String;
}

impl Holder for Principal {
    const QUOTA: &'static str = "watchers";
    const EACH: usize = WATCHERS_PER_USER;
    const TOGETHER: usize = WATCHERS;

    fn shares_with(&self, other: &Principal) -> bool {
        self.door == other.door
    }

    fn who(&self) -> String {
        format!("{} has", self.tenant)
    }

    fn all(&self) -> String {
        "all users together have".to_owned()
    }
}

impl Holder for Piping {
    const QUOTA: &'static str = "pipelines";
    const EACH: usize = PIPELINES_PER_SESSION;
    const TOGETHER: usize = PIPELINES_PER_USER;

    fn shares_with(&self, other: &Piping) -> bool {
        self.tenant == other.tenant
    }

    fn who(&self) -> String {
        format!("session {} has", self.session)
    }

    fn all(&self) -> String {
        format!("the sessions of {} have", self.tenant)
    }
}

/// How many streams of one kind everybody has. Clones share the counts.
#[derive(Clone, Debug)]
pub(crate) struct Streams<H: Holder> {
    /// Only those who have at least one. Held for one look; a panic leaves it
    /// whole.
    counts: Arc<Mutex<HashMap<H, usize>>>,
}

/// A stream that counts, until this is dropped.
#[derive(Debug)]
pub(crate) struct Open<H: Holder> {
    streams: Streams<H>,
    holder: H,
}

impl<H: Holder> Default for Streams<H> {
    fn default() -> Streams<H> {
        Streams {
            counts: Arc::default(),
        }
    }
}

impl<H: Holder> Streams<H> {
    /// Counts one more.
    ///
    /// # Errors
    /// `RESOURCE_EXHAUSTED` if its holder has too many, or all that share with
    /// it.
    pub(crate) fn enter(&self, holder: H) -> Result<Open<H>, Refusal> {
        let mut counts = self.lock();
        let own = counts.get(&holder).copied().unwrap_or(0);
        if own >= H::EACH {
            return Err(exhausted::<H>(&holder.who(), H::EACH, own));
        }
        let sharing = counts.iter().filter(|(other, _)| holder.shares_with(other));
        let all: usize = sharing.map(|(_, count)| count).sum();
        if all >= H::TOGETHER {
            return Err(exhausted::<H>(&holder.all(), H::TOGETHER, all));
        }
        counts.insert(holder, own + 1);
        Ok(Open {
            streams: self.clone(),
            holder,
        })
    }

    /// How many there are.
    pub(crate) fn count(&self) -> usize {
        self.lock().values().sum()
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<H, usize>> {
        self.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn exhausted<H: Holder>(who: &str, limit: usize, used: usize) -> Refusal {
    let message = format!("{who} {used} {} already", H::QUOTA);
    Refusal::because(Code::ResourceExhausted, ErrorReason::QuotaExceeded, message)
        .with("quota", H::QUOTA)
        .with("limit", limit)
        .with("used", used)
}

impl<H: Holder> Drop for Open<H> {
    fn drop(&mut self) {
        let mut counts = self.streams.lock();
        let own = counts.get_mut(&self.holder).expect("it has this one");
        *own -= 1;
        if *own == 0 {
            counts.remove(&self.holder);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::registry::Door;

    fn user(uid: u32) -> Principal {
        Principal {
            tenant: Tenant::user(uid),
            door: Door::Public,
        }
    }

    #[test]
    fn a_user_that_has_too_many_is_refused_and_others_are_not() {
        let watchers = Watchers::default();
        let held: Vec<_> = (0..WATCHERS_PER_USER)
            .map(|_| watchers.enter(user(1)).unwrap())
            .collect();
        let refusal = watchers.enter(user(1)).unwrap_err();
        assert_eq!(refusal.grpc_code(), Code::ResourceExhausted);
        assert_eq!(refusal.metadata["quota"], "watchers");
        assert_eq!(refusal.metadata["limit"], WATCHERS_PER_USER.to_string());
        assert_eq!(refusal.metadata["used"], WATCHERS_PER_USER.to_string());
        assert!(watchers.enter(user(2)).is_ok());
        drop(held);
        assert_eq!(watchers.count(), 0);
        assert!(watchers.lock().is_empty());
    }

    #[test]
    fn when_there_are_too_many_the_operator_still_gets_in() {
        let watchers = Watchers::default();
        let users = 0..u32::try_from(WATCHERS / WATCHERS_PER_USER).unwrap();
        let each = users.flat_map(|uid| std::iter::repeat_n(uid, WATCHERS_PER_USER));
        let held: Vec<_> = each.map(|uid| watchers.enter(user(uid)).unwrap()).collect();
        assert_eq!(watchers.count(), WATCHERS);
        let refusal = watchers.enter(user(u32::MAX)).unwrap_err();
        assert_eq!(refusal.metadata["limit"], WATCHERS.to_string());
        let operator = Principal {
            tenant: Tenant::user(0),
            door: Door::Admin,
        };
        assert!(watchers.enter(operator).is_ok());
        drop(held);
        assert!(watchers.enter(user(u32::MAX)).is_ok());
    }

    #[test]
    fn a_sessions_pipelines_are_bounded_and_so_are_those_of_a_users_sessions() {
        let pipelines = Pipelines::default();
        let of = |session, uid| {
            pipelines.enter(Piping {
                session: SessionId::new(session),
                tenant: Tenant::user(uid),
            })
        };
        let sessions = 0..(PIPELINES_PER_USER / PIPELINES_PER_SESSION) as u64;
        let each = sessions.flat_map(|one| std::iter::repeat_n(one, PIPELINES_PER_SESSION));
        let held: Vec<_> = each.map(|one| of(one, 1).unwrap()).collect();
        let own = of(0, 1).unwrap_err();
        assert_eq!(own.metadata["quota"], "pipelines");
        assert_eq!(own.metadata["limit"], PIPELINES_PER_SESSION.to_string());
        let all = of(u64::MAX, 1).unwrap_err();
        assert_eq!(all.metadata["limit"], PIPELINES_PER_USER.to_string());
        assert_eq!(all.metadata["used"], PIPELINES_PER_USER.to_string());
        assert!(of(u64::MAX, 2).is_ok(), "another user's");
        drop(held);
        assert!(pipelines.lock().is_empty());
    }
}
