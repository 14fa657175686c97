//! Watchers of domains, counted per user: each may stay as long as it likes.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use domain_core::limits::{WATCHERS, WATCHERS_PER_USER};
use domaind_proto::v1::{ErrorReason, Refusal};
use tonic::Code;

use crate::registry::Principal;

/// How many watchers everybody has. Clones share the counts.
#[derive(Clone, Debug, Default)]
pub(crate) struct Watchers {
    /// Only those who have at least one. Held for one look; a panic leaves it
    /// whole.
    counts: Arc<Mutex<HashMap<Principal, usize>>>,
}

/// A watcher that counts, until this is dropped.
#[derive(Debug)]
pub(crate) struct Watching {
    watchers: Watchers,
    who: Principal,
}

impl Watchers {
    /// Counts one more.
    ///
    /// # Errors
    /// `RESOURCE_EXHAUSTED` if its user has too many, or if there are too many
    /// behind its door.
    pub(crate) fn enter(&self, who: Principal) -> Result<Watching, Refusal> {
        let mut counts = self.lock();
        let own = counts.get(&who).copied().unwrap_or(0);
        if own >= WATCHERS_PER_USER {
            let message = format!("user {} has {own} watchers already", who.uid);
            return Err(exhausted(message, WATCHERS_PER_USER, own));
        }
        let beside = counts.iter().filter(|(other, _)| other.door == who.door);
        let all: usize = beside.map(|(_, count)| count).sum();
        if all >= WATCHERS {
            let message = format!("all users together have {all} watchers already");
            return Err(exhausted(message, WATCHERS, all));
        }
        counts.insert(who, own + 1);
        Ok(Watching {
            watchers: self.clone(),
            who,
        })
    }

    /// How many there are.
    pub(crate) fn count(&self) -> usize {
        self.lock().values().sum()
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Principal, usize>> {
        self.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn exhausted(message: String, limit: usize, used: usize) -> Refusal {
    Refusal::because(Code::ResourceExhausted, ErrorReason::QuotaExceeded, message)
        .with("quota", "watchers")
        .with("limit", limit)
        .with("used", used)
}

impl Drop for Watching {
    fn drop(&mut self) {
        let mut counts = self.watchers.lock();
        let own = counts.get_mut(&self.who).expect("it has this one");
        *own -= 1;
        if *own == 0 {
            counts.remove(&self.who);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::registry::Door;

    fn user(uid: u32) -> Principal {
        let door = Door::Public;
        Principal { uid, door }
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
            uid: 0,
            door: Door::Admin,
        };
        assert!(watchers.enter(operator).is_ok());
        drop(held);
        assert!(watchers.enter(user(u32::MAX)).is_ok());
    }
}
