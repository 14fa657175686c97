//! One transfer of one buffer through a slot.

use std::borrow::Borrow;
use std::fmt;
use std::ops::Range;

use domain_core::addr::Iova;

use super::inner::{Inner, Place};
use super::{Pool, PoolError, Refused};

/// The device reads the buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ToDevice;
/// The device writes the buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FromDevice;
/// The device reads the buffer and writes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bidirectional;

/// A direction in which a buffer of this type can be mapped. Nobody else can make one.
pub trait Way<B>: Copy + sealed::Sealed {
    /// Does the device see what the buffer holds?
    const COPIES_IN: bool;
}

/// A direction in which the device sees what the buffer holds.
pub trait CopiesIn: sealed::Sealed {}
impl CopiesIn for ToDevice {}
impl CopiesIn for Bidirectional {}

/// A direction in which the driver sees what the device wrote.
pub trait CopiesBack: sealed::Sealed {}
impl CopiesBack for FromDevice {}
impl CopiesBack for Bidirectional {}

mod sealed {
    pub trait Sealed {}
    impl Sealed for super::ToDevice {}
    impl Sealed for super::FromDevice {}
    impl Sealed for super::Bidirectional {}
}

impl<B: AsRef<[u8]>> Way<B> for ToDevice {
    const COPIES_IN: bool = true;
}

impl<B: AsRef<[u8]> + AsMut<[u8]>> Way<B> for FromDevice {
    const COPIES_IN: bool = false;
}

impl<B: AsRef<[u8]> + AsMut<[u8]>> Way<B> for Bidirectional {
    const COPIES_IN: bool = true;
}

/// A buffer that is mapped through a slot of a pool.
///
/// Dropping it ends the mapping and copies nothing back: nobody said what the device wrote. The
/// device must not use it any more by then, nor when it is unmapped: the slot is used again at once.
#[must_use = "a dropped mapping is unmapped, and nothing flows back"]
pub struct Mapping<P: Borrow<Pool>, B, W> {
    hold: Hold<P>,
    buffer: B,
    way: W,
}

/// A slot. Given back when it is dropped, unless that was done.
struct Hold<P: Borrow<Pool>> {
    pool: P,
    /// `None` when it was given back. No flag: one byte, written alone and then moved with the rest
    /// of its word, was measured to cost more than all the rest of a mapping.
    place: Option<Place>,
}

impl<P: Borrow<Pool>> Hold<P> {
    #[inline(always)]
    fn inner(&self) -> &Inner {
        &self.pool.borrow().inner
    }

    #[inline(always)]
    fn place(&self) -> Place {
        self.place.expect("a mapping has its slot until it ends")
    }
}

impl<P: Borrow<Pool>> Drop for Hold<P> {
    #[inline(always)]
    fn drop(&mut self) {
        if let Some(place) = self.place {
            self.inner().give(place);
        }
    }
}

impl<P: Borrow<Pool>, B: AsRef<[u8]>, W: Way<B>> Mapping<P, B, W> {
    #[inline(always)]
    pub(super) fn new(pool: P, buffer: B, way: W) -> Result<Mapping<P, B, W>, Refused<B>> {
        let bytes = buffer.as_ref();
        let inner = &pool.borrow().inner;
        let placed = match W::COPIES_IN {
            true => inner.place_bytes(bytes),
            false => inner.place_zeros(bytes.len()),
        };
        match placed {
            Ok(place) => {
                let place = Some(place);
                let hold = Hold { pool, place };
                Ok(Mapping { hold, buffer, way })
            }
            Err(error) => Err(Refused {
                kept: buffer,
                error,
            }),
        }
    }
}

impl<P: Borrow<Pool>, B, W> Mapping<P, B, W> {
    /// Where the first byte of the buffer appears in the domain. Never 0.
    #[inline(always)]
    #[must_use]
    pub fn iova(&self) -> Iova {
        // 0 is what nobody sees: a mapping has its slot until it ends. For `Inner::iova`'s reason, no panic.
        let place = self.hold.place;
        place.map_or(Iova::new(0), |place| self.hold.inner().iova(place))
    }

    /// Length in bytes, that of the buffer when it was mapped.
    #[inline(always)]
    #[must_use]
    #[allow(clippy::len_without_is_empty)] // it never is
    pub fn len(&self) -> usize {
        self.hold.place().len
    }

    /// The driver's buffer.
    #[must_use]
    pub fn buffer(&self) -> &B {
        &self.buffer
    }

    /// The driver's buffer. What is written there the device does not see before
    /// `sync_for_device`.
    pub fn buffer_mut(&mut self) -> &mut B {
        &mut self.buffer
    }

    /// Ends the mapping as dropping does, and gives the buffer back.
    pub fn cancel(self) -> B {
        self.buffer
    }

    /// With one look at the lease for the copy and for the slot.
    #[inline(always)]
    fn end(
        mut self,
        written: impl FnOnce(&mut B) -> Option<&mut [u8]>,
    ) -> Result<B, Refused<Self>> {
        let into = written(&mut self.buffer);
        match self.hold.inner().end(self.hold.place(), into) {
            Ok(()) => {
                self.hold.place = None;
                Ok(self.buffer)
            }
            Err(error) => Err(Refused { kept: self, error }),
        }
    }

    fn outside(&self, part: &Range<usize>) -> PoolError {
        PoolError::OutsideMapping {
            start: part.start as u64,
            end: part.end as u64,
            len_bytes: self.len() as u64,
        }
    }
}

impl<B, W> Mapping<&Pool, B, W> {
    /// The same mapping with a share of the pool instead of a borrow, to be kept anywhere.
    #[must_use = "a dropped mapping is unmapped, and nothing flows back"]
    pub fn into_owned(self) -> Mapping<Pool, B, W> {
        let Mapping {
            mut hold,
            buffer,
            way,
        } = self;
        let hold = Hold {
            pool: hold.pool.clone(),
            place: hold.place.take(),
        };
        Mapping { hold, buffer, way }
    }
}

impl<P: Borrow<Pool>, B, W: CopiesIn> Mapping<P, B, W>
where
    B: AsRef<[u8]>,
{
    /// Copies a part of the buffer to the domain again: the device sees what the driver has
    /// written since.
    ///
    /// # Errors
    /// [`PoolError::OutsideMapping`], [`PoolError::Revoked`], [`PoolError::Ended`]; nothing was
    /// copied.
    pub fn sync_for_device(&mut self, part: Range<usize>) -> Result<(), PoolError> {
        let outside = self.outside(&part);
        let (skip, end) = (part.start, part.end);
        let from = self.buffer.as_ref().get(part).ok_or(outside)?;
        if end > self.hold.place().len {
            return Err(outside);
        }
        self.hold.inner().copy_in(self.hold.place(), skip, from)
    }
}

impl<P: Borrow<Pool>, B, W: CopiesBack> Mapping<P, B, W>
where
    B: AsMut<[u8]>,
{
    /// Copies a part from the domain to the buffer: the driver sees what the device wrote.
    ///
    /// # Errors
    /// As [`sync_for_device`](Mapping::sync_for_device).
    pub fn sync_for_cpu(&mut self, part: Range<usize>) -> Result<(), PoolError> {
        let outside = self.outside(&part);
        let (skip, end) = (part.start, part.end);
        let into = self.buffer.as_mut().get_mut(part).ok_or(outside)?;
        if end > self.hold.place().len {
            return Err(outside);
        }
        self.hold.inner().copy_out(self.hold.place(), skip, into)
    }
}

impl<P: Borrow<Pool>, B> Mapping<P, B, ToDevice> {
    /// Ends the mapping. The buffer is as it was.
    ///
    /// # Errors
    /// [`PoolError::Revoked`], [`PoolError::Ended`]: the device may not have seen all of it.
    #[inline(always)]
    pub fn unmap(self) -> Result<B, Refused<Self>> {
        self.end(|_| None)
    }
}

impl<P: Borrow<Pool>, B: AsMut<[u8]>> Mapping<P, B, FromDevice> {
    /// Copies back the first `written` bytes, as many as the device says it wrote, and ends the
    /// mapping. The rest of the buffer is as it was.
    ///
    /// # Errors
    /// [`PoolError::WrittenTooLarge`], [`PoolError::Revoked`], [`PoolError::Ended`]; nothing was
    /// copied.
    #[inline(always)]
    pub fn unmap(self, written: usize) -> Result<B, Refused<Self>> {
        self.end_written(written)
    }
}

impl<P: Borrow<Pool>, B: AsMut<[u8]>> Mapping<P, B, Bidirectional> {
    /// Copies back all bytes, and ends the mapping.
    ///
    /// # Errors
    /// [`PoolError::Revoked`], [`PoolError::Ended`]; nothing was copied.
    #[inline(always)]
    pub fn unmap(self) -> Result<B, Refused<Self>> {
        let len = self.len();
        self.end_written(len)
    }

    /// Copies back the first `written` bytes, and ends the mapping.
    ///
    /// # Errors
    /// As [`unmap`](Self::unmap), and [`PoolError::WrittenTooLarge`].
    #[inline(always)]
    pub fn unmap_written(self, written: usize) -> Result<B, Refused<Self>> {
        self.end_written(written)
    }
}

impl<P: Borrow<Pool>, B: AsMut<[u8]>, W> Mapping<P, B, W> {
    #[inline(always)]
    fn end_written(mut self, written: usize) -> Result<B, Refused<Self>> {
        // A buffer that can grow may be shorter by now than it was.
        let most = self.len().min(self.buffer.as_mut().len());
        if written > most {
            let error = PoolError::WrittenTooLarge {
                written_bytes: written as u64,
                len_bytes: most as u64,
            };
            return Err(Refused { kept: self, error });
        }
        self.end(|buffer| buffer.as_mut().get_mut(..written))
    }
}

/// Says no byte of the buffer.
impl<P: Borrow<Pool>, B, W> fmt::Debug for Mapping<P, B, W> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Mapping")
            .field("iova", &self.iova())
            .field("len", &self.len())
            .finish_non_exhaustive()
    }
}
