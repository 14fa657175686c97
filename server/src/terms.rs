//! What is in force now of all that may change while the daemon runs.

use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use crate::policy::Policy;

/// On what terms peers are served. Whoever asks keeps those of that moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Terms {
    pub(crate) policy: Policy,
    /// How long a session may owe an acknowledgment. One that is attached keeps
    /// what it was told.
    pub(crate) ack_timeout: Duration,
}

/// The terms in force. Clones show the same.
#[derive(Clone, Debug)]
pub(crate) struct InForce(
    /// Held for one look or one exchange; what is in it is always whole.
    Arc<RwLock<Arc<Terms>>>,
);

impl InForce {
    pub(crate) fn new(terms: Terms) -> InForce {
        InForce(Arc::new(RwLock::new(Arc::new(terms))))
    }

    pub(crate) fn get(&self) -> Arc<Terms> {
        Arc::clone(&self.0.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// From now on these; for calls that are under way still the old ones.
    pub(crate) fn set(&self, terms: Terms) {
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(terms);
    }
}
