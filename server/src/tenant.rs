//! Whom domains belong to and quotas are for.

use std::fmt;

use crate::peer::Peer;
use crate::placement::PodUid;

/// A user; of a user in pods, each pod for itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Tenant {
    pub(crate) uid: u32,
    /// `None` outside of pods, and of peers that could not be placed.
    pub(crate) pod: Option<PodUid>,
}

impl Tenant {
    /// Outside of pods.
    pub(crate) fn user(uid: u32) -> Tenant {
        Tenant { uid, pod: None }
    }
}

impl From<&Peer> for Tenant {
    fn from(peer: &Peer) -> Tenant {
        Tenant {
            uid: peer.uid(),
            pod: peer.pod(),
        }
    }
}

impl fmt::Display for Tenant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.pod {
            Some(pod) => write!(f, "user {} of pod {pod}", self.uid),
            None => write!(f, "user {}", self.uid),
        }
    }
}
