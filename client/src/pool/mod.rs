//! Bouncing without a call: a driver copies its buffers into leased memory by itself.
//!
//! A [`Pool`] leases parts of the bounce aperture and cuts them into slots. [`Pool::map`] takes a
//! slot, copies the buffer into it as the direction says, and answers the iova; the daemon hears
//! nothing of it. Any bytes of this process can be mapped: nothing needs to be registered.
//!
//! ```no_run
//! use domaind_client::pool::{FromDevice, PoolOptions, ToDevice};
//! # async fn example(driver: domaind_client::Session) -> Result<(), domaind_client::Error> {
//! let pool = driver.pool(PoolOptions::default()).await?;
//!
//! let request = pool.map(b"read block 7", ToDevice)?;
//! let answer = pool.map([0; 4096], FromDevice)?;
//! // Tell the device `request.iova()`, `answer.iova()`; it says how many bytes it wrote.
//! # let written = 512;
//! request.unmap()?;
//! let bytes = answer.unmap(written)?;
//! # Ok(())
//! # }
//! ```
//!
//! # What is promised
//!
//! As for mappings that the daemon copies ([`Session::map`]): every byte of a slot is a byte of the
//! buffer or zero when the device gets to know it; `FROM_DEVICE` starts from zeros, and only what
//! the device says it wrote flows back; a mapping can be unmapped once. Two sessions never share a
//! page. Within one session slots shorter than a page do, and a device that was told of one can
//! reach all of the domain, as always.
//!
//! # What it costs
//!
//! A pin, a look into what this thread keeps, and the copy; no lock, no system call, no allocation,
//! and nothing that another thread writes. A thread that has run out of slots takes some more under
//! a lock, and one that has too many gives some back. When leases run low, a task asks for another
//! in the background; what is idle goes back to the daemon.

mod cache;
mod class;
mod heap;
mod inner;
mod keeper;
mod mapping;
mod scatter;

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use domain_core::perm::Direction;
use tokio::time::{Instant, timeout_at};
use tonic::Code;

use self::inner::Inner;
pub use self::mapping::{Bidirectional, CopiesBack, CopiesIn, FromDevice, Mapping, ToDevice, Way};
pub use self::scatter::Scatter;
use crate::error::Error;
use crate::session::Session;

/// How often one who waits looks for what threads keep that have nothing to do.
const LOOK_EVERY: Duration = Duration::from_millis(1);

/// How much a pool leases, and when.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PoolOptions {
    /// Bytes that are leased at a time. More for a single mapping that is longer.
    pub lease_bytes: u64,
    /// Bytes that are leased at most.
    pub most_bytes: u64,
    /// Bytes that stay leased although nobody uses them.
    pub keep_bytes: u64,
    /// With fewer bytes free another lease is asked for, before it is needed.
    pub spare_bytes: u64,
    /// What was not used for so long is given back: slots by threads, leases by the pool.
    pub idle_after: Duration,
}

impl Default for PoolOptions {
    /// Leases of 2 MiB, up to 32 MiB.
    fn default() -> PoolOptions {
        const MIB: u64 = 1 << 20;
        PoolOptions {
            lease_bytes: 2 * MIB,
            most_bytes: 32 * MIB,
            keep_bytes: 2 * MIB,
            spare_bytes: MIB / 2,
            idle_after: Duration::from_secs(2),
        }
    }
}

/// Why nothing was mapped, or a mapping did not end. Nothing was copied.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs)] // the messages are the docs
pub enum PoolError {
    #[error("a buffer of zero bytes")]
    ZeroLength,
    #[error("a buffer of {len_bytes} bytes in a pool that leases {most_bytes} at most")]
    TooLong { len_bytes: u64, most_bytes: u64 },
    /// Another lease was asked for, unless all is leased that may be.
    #[error("no room for {len_bytes} bytes in the {leased_bytes} leased, of at most {most_bytes}")]
    Full {
        len_bytes: u64,
        leased_bytes: u64,
        most_bytes: u64,
    },
    #[error("{written_bytes} bytes written to a mapping of {len_bytes}")]
    WrittenTooLarge { written_bytes: u64, len_bytes: u64 },
    #[error("bytes {start}..{end} of a mapping of {len_bytes}")]
    OutsideMapping {
        start: u64,
        end: u64,
        len_bytes: u64,
    },
    /// The bounce aperture was reset: what the device wrote is lost.
    #[error("the lease was taken away by a reset of the bounce aperture")]
    Revoked,
    #[error("the session has ended")]
    Ended,
    /// Only when a pool is made.
    #[error("the session is attached read-only")]
    ReadOnly,
}

impl PoolError {
    /// What gRPC would call it.
    pub(crate) fn code(self) -> Code {
        match self {
            PoolError::ZeroLength
            | PoolError::WrittenTooLarge { .. }
            | PoolError::OutsideMapping { .. } => Code::InvalidArgument,
            PoolError::TooLong { .. } | PoolError::Full { .. } => Code::ResourceExhausted,
            PoolError::Revoked => Code::FailedPrecondition,
            PoolError::Ended => Code::Unavailable,
            PoolError::ReadOnly => Code::PermissionDenied,
        }
    }
}

/// A refusal, with what was to be mapped or unmapped.
///
/// As a [`PoolError`] or an [`Error`] (`?` converts) it loses that; a mapping then ends as by
/// dropping.
#[derive(thiserror::Error)]
#[error("{error}")]
pub struct Refused<T> {
    /// What came.
    pub kept: T,
    /// Why it could not be done.
    pub error: PoolError,
}

/// Says no byte of a buffer.
impl<T> fmt::Debug for Refused<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Refused").field(&self.error).finish()
    }
}

impl<T> From<Refused<T>> for Error {
    fn from(refused: Refused<T>) -> Error {
        refused.error.into()
    }
}

impl<T> From<Refused<T>> for PoolError {
    fn from(refused: Refused<T>) -> PoolError {
        refused.error
    }
}

/// How much a pool has at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PoolUsage {
    /// Leases.
    pub leases: usize,
    /// Bytes of all leases.
    pub leased_bytes: u64,
    /// Bytes that belong to no slot: neither mapped, nor kept by a thread, nor beside such.
    pub free_bytes: u64,
}

/// Leased bounce memory of one session, for all its threads. Cheap to clone.
///
/// When the last clone and the last mapping are dropped the leases go back, in the background.
#[derive(Clone, Debug)]
pub struct Pool {
    inner: Arc<Inner>,
}

impl Session {
    /// Makes a pool, with one lease to begin with. For drivers that are attached read-write.
    ///
    /// It keeps the session alive. If this is cancelled, the lease goes back.
    ///
    /// # Errors
    /// [`Error::Refused`] (no bounce aperture, no room, a quota, not a driver),
    /// [`PoolError::ReadOnly`], [`Error::Ended`], [`Error::Transport`].
    pub async fn pool(&self, options: PoolOptions) -> Result<Pool, Error> {
        let inner = keeper::start(self, options).await?;
        Ok(Pool { inner })
    }
}

impl Pool {
    /// Copies a buffer into the domain as the direction says, and shows where. Does not wait.
    ///
    /// The buffer is anything that has bytes: a slice, an array, a `Vec`. It is kept until the
    /// mapping is unmapped, and comes back then; a `&mut [u8]` cannot be touched meanwhile but
    /// through the mapping. The iova is a multiple of 256, and of 4096 for more than 2048 bytes.
    ///
    /// # Errors
    /// [`PoolError`], with the buffer. [`PoolError::Full`] may pass: another lease is on its way if
    /// the bound allows one.
    #[inline(always)]
    pub fn map<B: AsRef<[u8]>, W: Way<B>>(
        &self,
        buffer: B,
        direction: W,
    ) -> Result<Mapping<&Pool, B, W>, Refused<B>> {
        Mapping::new(self, buffer, direction)
    }

    /// As [`map`](Pool::map), and waits while the pool is full, for others to unmap or for another
    /// lease, but not past the deadline. Cancelling leaves nothing.
    ///
    /// # Errors
    /// As [`map`](Pool::map); [`PoolError::Full`] at the deadline.
    pub async fn map_by<B: AsRef<[u8]>, W: Way<B>>(
        &self,
        buffer: B,
        direction: W,
        deadline: Instant,
    ) -> Result<Mapping<&Pool, B, W>, Refused<B>> {
        let mut outcome = self.map(buffer, direction);
        while let Err(refused) = outcome {
            let passes = matches!(refused.error, PoolError::Full { .. });
            if !passes || Instant::now() >= deadline {
                return Err(refused);
            }
            let _waits = self.inner.waits();
            // Before the look, so that what comes back between the two is not missed.
            let room = self.inner.room();
            outcome = self.map(refused.kept, direction);
            if outcome.is_err() {
                let look = deadline.min(Instant::now() + LOOK_EVERY);
                let _ = timeout_at(look, room).await;
            }
        }
        outcome
    }

    /// Maps several buffers for one transfer: all or none.
    ///
    /// # Errors
    /// As [`map`](Pool::map), with all buffers.
    pub fn map_all<B: AsRef<[u8]>, W: Way<B>>(
        &self,
        buffers: Vec<B>,
        direction: W,
    ) -> Result<Scatter<&Pool, B, W>, Refused<Vec<B>>> {
        Scatter::new(self, buffers, direction)
    }

    /// What it has at this moment.
    #[must_use]
    pub fn usage(&self) -> PoolUsage {
        let stock = self.inner.stock();
        PoolUsage {
            leases: stock.leases,
            leased_bytes: stock.leased_bytes,
            free_bytes: stock.free_bytes,
        }
    }

    /// The session whose leases these are.
    #[must_use]
    pub fn session(&self) -> &Session {
        self.inner.session()
    }
}

/// Which way bytes travel, as the rest of the library says it.
impl From<ToDevice> for Direction {
    fn from(_: ToDevice) -> Direction {
        Direction::ToDevice
    }
}

impl From<FromDevice> for Direction {
    fn from(_: FromDevice) -> Direction {
        Direction::FromDevice
    }
}

impl From<Bidirectional> for Direction {
    fn from(_: Bidirectional) -> Direction {
        Direction::Bidirectional
    }
}
