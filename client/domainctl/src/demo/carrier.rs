//! The two ways in which a block gets into the domain and back: the driver
//! copies it by itself, into memory that it has leased, or the daemon copies it
//! from registered memory.

use std::sync::Arc;

use anyhow::ensure;
use domain_core::Direction;
use domain_core::addr::Iova;
use domain_core::streaming::MapSpec;
use domaind_client::blocking::{self, Buffer, Mapping, Session};
use domaind_client::pool::{self, Bidirectional, FromDevice, Pool, PoolOptions, ToDevice};
use domaind_client::{Error, IovaRange};

use super::{Copying, Way};

/// Guards before and behind every block in the driver's memory.
const GUARD: [u8; 61] = [0xc5; 61];
const GUARD_BYTES: u64 = GUARD.len() as u64;

/// How blocks travel.
pub(super) enum Carrier<'s> {
    /// Blocks lie in registered memory, one behind the other.
    Daemon {
        session: &'s Session,
        buffer: Arc<Buffer>,
        block_bytes: u64,
    },
    /// Blocks lie in memory of the driver's own.
    Lease(blocking::Pool),
}

/// A block that lies where it is mapped from.
pub(super) enum Staged<'c> {
    Daemon {
        session: &'c Session,
        buffer: Arc<Buffer>,
        place: u64,
        len: u64,
    },
    Own {
        pool: &'c Pool,
        block: Guarded,
    },
}

/// A block on its way.
pub(super) struct Carried(Hold);

enum Hold {
    Daemon {
        mapping: Mapping,
        buffer: Arc<Buffer>,
        place: u64,
    },
    To(pool::Mapping<Pool, Guarded, ToDevice>),
    From(pool::Mapping<Pool, Guarded, FromDevice>),
    Both(pool::Mapping<Pool, Guarded, Bidirectional>),
}

/// A block that has come back.
pub(super) enum Arrived {
    Daemon { buffer: Arc<Buffer>, place: u64 },
    Own(Guarded),
}

/// A block between two guards, at an odd place.
pub(super) struct Guarded {
    bytes: Vec<u8>,
}

impl<'s> Carrier<'s> {
    /// For so many blocks of so many bytes at a time, leasing as `pool` says.
    pub(super) fn new(
        session: &'s Session,
        copying: Copying,
        slots: u64,
        block_bytes: u64,
        pool: PoolOptions,
    ) -> anyhow::Result<Carrier<'s>> {
        if copying.is_by_driver() {
            return Ok(Carrier::Lease(session.pool(pool)?));
        }
        let buffer = session.buffer(slots * (block_bytes + 2 * GUARD_BYTES))?;
        Ok(Carrier::Daemon {
            session,
            buffer: Arc::new(buffer),
            block_bytes,
        })
    }

    /// Puts a block where it is mapped from.
    pub(super) fn stage(&self, slot: usize, block: &[u8]) -> anyhow::Result<Staged<'_>> {
        let guarded = Guarded::new(block);
        Ok(match self {
            Carrier::Lease(pool) => {
                let block = guarded;
                Staged::Own { pool, block }
            }
            Carrier::Daemon {
                session,
                buffer,
                block_bytes,
            } => {
                let place = slot as u64 * (block_bytes + 2 * GUARD_BYTES);
                buffer.copy_in(place, &guarded.bytes)?;
                Staged::Daemon {
                    session,
                    buffer: Arc::clone(buffer),
                    place,
                    len: block.len() as u64,
                }
            }
        })
    }
}

/// For the driver of a domain of its own: it leases all that there is.
pub(super) fn whole_aperture(session: &Session) -> PoolOptions {
    once(aperture_bytes(session))
}

/// For a driver that is not alone: as much as so many blocks need, if there is
/// so much.
pub(super) fn share_of_aperture(session: &Session, slots: u64, block_bytes: u64) -> PoolOptions {
    once((slots * slot_bytes(session, block_bytes)).min(aperture_bytes(session)))
}

/// What one block needs of the aperture at most: it may begin in the middle of
/// a granule, and the slot of a lease is up to a quarter longer than its block.
pub(super) fn slot_bytes(session: &Session, block_bytes: u64) -> u64 {
    let granule_bytes = session.granule().bytes();
    let granules = block_bytes.div_ceil(granule_bytes) + 1;
    let bytes = granules * granule_bytes;
    bytes + (bytes / 4).next_multiple_of(granule_bytes)
}

/// What a driver may lease of the bounce aperture.
pub(super) fn aperture_bytes(session: &Session) -> u64 {
    let whole = session.bounce().and_then(IovaRange::len_bytes);
    // The first granule of a space that begins at 0 is nobody's.
    whole.unwrap_or(0).saturating_sub(session.granule().bytes())
}

/// One lease, which is kept.
fn once(lease_bytes: u64) -> PoolOptions {
    PoolOptions {
        lease_bytes,
        most_bytes: lease_bytes,
        keep_bytes: lease_bytes,
        spare_bytes: 0,
        ..PoolOptions::default()
    }
}

impl Staged<'_> {
    pub(super) fn map(self, way: Way) -> anyhow::Result<Carried> {
        Ok(Carried(match self {
            Staged::Own { pool, block } => match way {
                Way::ToDevice => Hold::To(pool.map(block, ToDevice)?.into_owned()),
                Way::FromDevice => Hold::From(pool.map(block, FromDevice)?.into_owned()),
                Way::Both => Hold::Both(pool.map(block, Bidirectional)?.into_owned()),
            },
            Staged::Daemon {
                session,
                buffer,
                place,
                len,
            } => {
                let memory = buffer.memory().id();
                let spec = MapSpec::new(memory, place + GUARD_BYTES, len, Direction::from(way));
                let mapping = session.map(MapSpec {
                    keep_offset: true,
                    ..spec
                })?;
                Hold::Daemon {
                    mapping,
                    buffer,
                    place,
                }
            }
        }))
    }
}

impl Carried {
    /// Where devices find it.
    pub(super) fn iova(&self) -> Iova {
        match &self.0 {
            Hold::Daemon { mapping, .. } => mapping.iova(),
            Hold::To(mapping) => mapping.iova(),
            Hold::From(mapping) => mapping.iova(),
            Hold::Both(mapping) => mapping.iova(),
        }
    }

    /// Unmaps a block, all of which was written if devices write.
    pub(super) fn unmap(self, len: usize) -> anyhow::Result<Arrived> {
        Ok(match self.0 {
            Hold::Daemon {
                mapping,
                buffer,
                place,
            } => {
                let from_device = mapping.direction() == Direction::FromDevice;
                let written = from_device.then_some(len as u64);
                mapping.unmap(written).map_err(Error::from)?;
                Arrived::Daemon { buffer, place }
            }
            Hold::To(mapping) => Arrived::Own(mapping.unmap()?),
            Hold::From(mapping) => Arrived::Own(mapping.unmap(len)?),
            Hold::Both(mapping) => Arrived::Own(mapping.unmap()?),
        })
    }
}

impl Arrived {
    /// The block, if nothing beside it was changed.
    pub(super) fn open(self, block: u64, len: usize) -> anyhow::Result<Vec<u8>> {
        let came = match self {
            Arrived::Own(came) => came,
            Arrived::Daemon { buffer, place } => {
                let mut bytes = vec![0; len + 2 * GUARD.len()];
                buffer.copy_out(place, &mut bytes)?;
                Guarded { bytes }
            }
        };
        ensure!(
            came.is_untouched(),
            "block {block}: bytes beside the buffer were changed"
        );
        Ok(came.into_block())
    }
}

impl Guarded {
    fn new(block: &[u8]) -> Guarded {
        Guarded {
            bytes: [&GUARD, block, &GUARD].concat(),
        }
    }

    fn is_untouched(&self) -> bool {
        self.bytes.starts_with(&GUARD) && self.bytes.ends_with(&GUARD)
    }

    fn into_block(mut self) -> Vec<u8> {
        self.bytes.truncate(self.bytes.len() - GUARD.len());
        self.bytes.drain(..GUARD.len());
        self.bytes
    }
}

impl AsRef<[u8]> for Guarded {
    fn as_ref(&self) -> &[u8] {
        &self.bytes[GUARD.len()..self.bytes.len() - GUARD.len()]
    }
}

impl AsMut<[u8]> for Guarded {
    fn as_mut(&mut self) -> &mut [u8] {
        let end = self.bytes.len() - GUARD.len();
        &mut self.bytes[GUARD.len()..end]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guarded_block_is_the_block_and_knows_what_was_changed_beside_it() {
        let mut block = Guarded::new(b"block");
        block.as_mut()[0] = b'c';
        assert_eq!(block.as_ref(), b"clock");
        assert!(block.is_untouched());
        let mut changed = Guarded::new(b"block");
        changed.bytes[GUARD.len() - 1] = 0;
        assert!(!changed.is_untouched());
        assert_eq!(block.into_block(), b"clock");
    }
}
