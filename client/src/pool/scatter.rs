//! Several buffers that are one transfer.

use std::borrow::Borrow;

use domain_core::addr::Iova;

use super::mapping::{Bidirectional, FromDevice, Mapping, ToDevice, Way};
use super::{Pool, PoolError, Refused};

/// Buffers that were mapped together, in their order. Dropping it ends all mappings and copies
/// nothing back.
#[derive(Debug)]
#[must_use = "dropped mappings are unmapped, and nothing flows back"]
pub struct Scatter<P: Borrow<Pool>, B, W> {
    /// Buffers of mappings that have ended, before those that have not.
    done: Vec<B>,
    mappings: Vec<Mapping<P, B, W>>,
}

impl<'p, B: AsRef<[u8]>, W: Way<B>> Scatter<&'p Pool, B, W> {
    pub(super) fn new(pool: &'p Pool, buffers: Vec<B>, way: W) -> Result<Self, Refused<Vec<B>>> {
        let mut mappings = Vec::with_capacity(buffers.len());
        let mut buffers = buffers.into_iter();
        while let Some(buffer) = buffers.next() {
            match pool.map(buffer, way) {
                Ok(mapping) => mappings.push(mapping),
                Err(Refused { kept, error }) => {
                    let before = mappings.into_iter().map(Mapping::cancel);
                    let kept = before.chain([kept]).chain(buffers).collect();
                    return Err(Refused { kept, error });
                }
            }
        }
        let done = Vec::new();
        Ok(Scatter { done, mappings })
    }
}

impl<P: Borrow<Pool>, B, W> Scatter<P, B, W> {
    /// Where the buffers appear, and how long they are.
    pub fn segments(&self) -> impl Iterator<Item = (Iova, usize)> {
        self.mappings.iter().map(|one| (one.iova(), one.len()))
    }

    /// Bytes of all together.
    #[must_use]
    pub fn total(&self) -> usize {
        self.mappings.iter().map(Mapping::len).sum()
    }

    /// Ends all mappings as dropping does, and gives all buffers back.
    pub fn cancel(self) -> Vec<B> {
        let left = self.mappings.into_iter().map(Mapping::cancel);
        self.done.into_iter().chain(left).collect()
    }

    /// Ends them in order, up to the first refusal.
    fn end(
        mut self,
        mut end: impl FnMut(Mapping<P, B, W>) -> Result<B, Refused<Mapping<P, B, W>>>,
    ) -> Result<Vec<B>, Refused<Self>> {
        let mut left = self.mappings.into_iter();
        while let Some(mapping) = left.next() {
            match end(mapping) {
                Ok(buffer) => self.done.push(buffer),
                Err(Refused { kept, error }) => {
                    let mappings = [kept].into_iter().chain(left).collect();
                    let done = self.done;
                    let kept = Scatter { done, mappings };
                    return Err(Refused { kept, error });
                }
            }
        }
        Ok(self.done)
    }

    fn check_written(&self, written: usize) -> Result<(), PoolError> {
        let total = self.total();
        match written <= total {
            true => Ok(()),
            false => Err(PoolError::WrittenTooLarge {
                written_bytes: written as u64,
                len_bytes: total as u64,
            }),
        }
    }
}

impl<P: Borrow<Pool>, B> Scatter<P, B, ToDevice> {
    /// Ends the mappings.
    ///
    /// # Errors
    /// As [`Mapping::unmap`]. [`cancel`](Scatter::cancel) gives the buffers back.
    pub fn unmap(self) -> Result<Vec<B>, Refused<Self>> {
        self.end(Mapping::<P, B, ToDevice>::unmap)
    }
}

impl<P: Borrow<Pool>, B: AsMut<[u8]>> Scatter<P, B, FromDevice> {
    /// Copies back the first `written` bytes, counted through the buffers in their order, as a
    /// device counts them that fills one after the other; and ends the mappings.
    ///
    /// # Errors
    /// [`PoolError::WrittenTooLarge`] for more than all buffers have, and then nothing has ended.
    /// Otherwise as [`Mapping::unmap`]: mappings before the refused one have ended.
    /// [`cancel`](Scatter::cancel) gives the buffers back.
    pub fn unmap(self, written: usize) -> Result<Vec<B>, Refused<Self>> {
        if let Err(error) = self.check_written(written) {
            return Err(Refused { kept: self, error });
        }
        let mut left = written;
        self.end(|mapping| {
            let part = left.min(mapping.len());
            left -= part;
            mapping.unmap(part)
        })
    }
}

impl<P: Borrow<Pool>, B: AsMut<[u8]>> Scatter<P, B, Bidirectional> {
    /// Copies back all bytes, and ends the mappings.
    ///
    /// # Errors
    /// As [`Mapping::unmap`]. [`cancel`](Scatter::cancel) gives the buffers back.
    pub fn unmap(self) -> Result<Vec<B>, Refused<Self>> {
        self.end(Mapping::<P, B, Bidirectional>::unmap)
    }
}
