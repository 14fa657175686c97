//! Memory that a driver registers: the source and target of bounces.

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

/// A registration. Stays until it is given back or the session ends, however
/// many copies of this there are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Memory {
    id: MemoryId,
    len_bytes: u64,
    writable: bool,
}

impl Memory {
    /// Its name in the domain, for [`MapSpec`](crate::MapSpec).
    #[must_use]
    pub fn id(&self) -> MemoryId {
        self.id
    }

    /// Its length in bytes when it was registered.
    #[must_use]
    pub fn len_bytes(&self) -> u64 {
        self.len_bytes
    }

    /// Whether bytes may flow back into it.
    #[must_use]
    pub fn is_writable(&self) -> bool {
        self.writable
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
        let (memory, mut guard) = self.register_guarded(memfd, writable).await?;
        guard.disarm();
        Ok(memory)
    }

    /// Gives a registration back. Goes on if it is cancelled.
    ///
    /// # Errors
    /// [`Error::Refused`] while mappings use it, and if it is not there;
    /// [`Error::Ended`].
    pub async fn unregister(&self, memory: Memory) -> Result<(), Error> {
        let inner = Arc::clone(&self.inner);
        let work = async move { unregister(&inner, memory.id).await };
        self.inner.finish(work).await?
    }

    /// A registration that is given back when the guard is dropped.
    pub(crate) async fn register_guarded(
        &self,
        memfd: OwnedFd,
        writable: bool,
    ) -> Result<(Memory, Guard), Error> {
        let inner = Arc::clone(&self.inner);
        let work = async move { register(&inner, memfd, writable).await };
        self.inner.finish(work).await?
    }
}

async fn register(
    session: &Arc<Inner>,
    memfd: OwnedFd,
    writable: bool,
) -> Result<(Memory, Guard), Error> {
    let ask = Ask::RegisterMemory(v1::RegisterMemory { writable });
    let answer = session.connection.request(ask, Some(memfd.as_fd())).await?;
    let registered = match answer {
        Answer::MemoryRegistered(registered) => registered,
        other => return Err(out_of_turn(&other, "MemoryRegistered").into()),
    };
    let memory = Memory {
        id: MemoryId::new(registered.memory_id),
        len_bytes: registered.size_bytes,
        writable,
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
