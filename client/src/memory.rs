//! Memory that a driver registers: the source and target of bounces, and what
//! direct mappings show.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use domain_core::memory::MemoryId;
use domaind_proto::v1;
use domaind_proto::v1::client_frame::Body as Ask;
use domaind_proto::v1::server_frame::Body as Answer;

use crate::error::Error;
use crate::handshake::out_of_turn;
use crate::session::{Inner, Session};
use crate::undo::{Guard, Undo};

/// A registration. Stays until it is given back or the session ends (the
/// persistent: until the domain is deleted), however many copies of this there
/// are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Memory {
    id: MemoryId,
    len_bytes: u64,
    writable: bool,
    persistent: bool,
}

impl From<Memory> for MemoryId {
    fn from(memory: Memory) -> MemoryId {
        memory.id
    }
}

impl Memory {
    /// Its name in the domain, for [`MapSpec`](crate::MapSpec) and
    /// [`DirectSpec`](crate::DirectSpec).
    #[must_use]
    pub fn id(&self) -> MemoryId {
        self.id
    }

    /// Its length in bytes when it was registered.
    #[must_use]
    pub fn len_bytes(&self) -> u64 {
        self.len_bytes
    }

    /// Whether bytes may flow back into it, and devices be allowed to write it.
    #[must_use]
    pub fn is_writable(&self) -> bool {
        self.writable
    }

    /// Whether it belongs to the domain, and stays when the session ends.
    #[must_use]
    pub fn is_persistent(&self) -> bool {
        self.persistent
    }
}

impl Session {
    /// Registers a memfd, sealed against shrinking, as source of mappings and,
    /// if `writable`, as their target. For drivers. The daemon gets a copy of
    /// the fd; this one is closed.
    ///
    /// If this is cancelled, the registration is given back.
    ///
    /// # Errors
    /// [`Error::Refused`] (the fd is no memory that can be registered, quota,
    /// role), [`Error::Ended`].
    pub async fn register(&self, memfd: OwnedFd, writable: bool) -> Result<Memory, Error> {
        let spec = v1::RegisterMemory {
            writable,
            persistent: false,
        };
        self.register_and_keep(memfd, spec).await
    }

    /// As [`Session::register`], but the memory belongs to the domain: it stays
    /// when the session ends, and any driver of the domain may use it and give
    /// it back.
    ///
    /// If this is cancelled, the registration is given back; it is not if the
    /// session ends at once.
    ///
    /// # Errors
    /// As [`Session::register`].
    pub async fn register_persistent(
        &self,
        memfd: OwnedFd,
        writable: bool,
    ) -> Result<Memory, Error> {
        let spec = v1::RegisterMemory {
            writable,
            persistent: true,
        };
        self.register_and_keep(memfd, spec).await
    }

    /// Gives a registration back: one of this session, or persistent memory,
    /// whoever registered it. Goes on if it is cancelled.
    ///
    /// # Errors
    /// [`Error::Refused`] while mappings use it, and if it is not there;
    /// [`Error::Ended`].
    pub async fn unregister(&self, memory: impl Into<MemoryId>) -> Result<(), Error> {
        let (inner, id) = (Arc::clone(&self.inner), memory.into());
        let work = async move { unregister(&inner, id).await };
        self.inner.finish(work).await?
    }

    async fn register_and_keep(
        &self,
        memfd: OwnedFd,
        spec: v1::RegisterMemory,
    ) -> Result<Memory, Error> {
        let (memory, mut guard) = self.register_guarded(memfd, spec).await?;
        guard.disarm();
        Ok(memory)
    }

    /// A registration that is given back when the guard is dropped.
    pub(crate) async fn register_guarded(
        &self,
        memfd: OwnedFd,
        spec: v1::RegisterMemory,
    ) -> Result<(Memory, Guard), Error> {
        let inner = Arc::clone(&self.inner);
        let work = async move { register(&inner, memfd, spec).await };
        self.inner.finish(work).await?
    }
}

async fn register(
    session: &Arc<Inner>,
    memfd: OwnedFd,
    spec: v1::RegisterMemory,
) -> Result<(Memory, Guard), Error> {
    let ask = Ask::RegisterMemory(spec);
    let answer = session.connection.request(ask, Some(memfd.as_fd())).await?;
    let registered = match answer {
        Answer::MemoryRegistered(registered) => registered,
        other => return Err(out_of_turn(&other, "MemoryRegistered").into()),
    };
    let memory = Memory {
        id: MemoryId::new(registered.memory_id),
        len_bytes: registered.size_bytes,
        writable: spec.writable,
        persistent: spec.persistent,
    };
    let undo = Undo::Unregister { memory: memory.id };
    Ok((memory, Guard::new(Arc::clone(session), undo)))
}

async fn unregister(session: &Inner, memory: MemoryId) -> Result<(), Error> {
    let memory_id = memory.get();
    let ask = Ask::UnregisterMemory(v1::UnregisterMemory { memory_id });
    match session.connection.request(ask, None).await? {
        Answer::MemoryUnregistered(_) => Ok(()),
        other => Err(out_of_turn(&other, "MemoryUnregistered").into()),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::time::timeout;

    use super::*;
    use crate::fake::{FakeDaemon, FakePeer, PAGE, memfd};

    const PERSISTENT: v1::RegisterMemory = v1::RegisterMemory {
        writable: true,
        persistent: true,
    };

    /// Lets one memory in, as number 5; answers what was asked for.
    async fn admit(peer: &FakePeer) -> Option<Ask> {
        let asked = peer.hear().await.unwrap();
        let registered = v1::MemoryRegistered {
            memory_id: 5,
            size_bytes: PAGE,
        };
        let answer = Answer::MemoryRegistered(registered);
        peer.say(asked.request_id, answer, None).await;
        asked.body
    }

    #[tokio::test]
    async fn persistent_memory_stays_when_all_handles_are_gone() {
        let mut fake = FakeDaemon::start().await;
        let registering = fake.session.register_persistent(memfd(1), true);
        let (memory, asked) = tokio::join!(registering, admit(&fake.peer));
        assert!(memory.unwrap().is_persistent());
        assert_eq!(asked, Some(Ask::RegisterMemory(PERSISTENT)));

        // The only handle of the session goes.
        let other = FakeDaemon::start().await;
        fake.session = other.session.clone();

        // Nothing is given back.
        fake.peer.hear_the_end().await;
    }

    #[tokio::test]
    async fn persistent_memory_that_nobody_learned_of_is_given_back() {
        let fake = FakeDaemon::start().await;
        let registering = fake.session.register_persistent(memfd(1), true);

        let cancelled = timeout(Duration::from_millis(50), registering).await;

        assert!(cancelled.is_err());
        admit(&fake.peer).await;
        let given_back = Ask::UnregisterMemory(v1::UnregisterMemory { memory_id: 5 });
        assert_eq!(fake.peer.hear().await.unwrap().body, Some(given_back));
    }
}
