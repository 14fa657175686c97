//! Which parts of a reservation are mapped, and what may be done there.

/// What may be done with memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Access {
    /// Loads only.
    ReadOnly,
    /// Loads and stores.
    ReadWrite,
}

impl Access {
    /// Whether memory with this access may be used as `wanted` says.
    pub fn allows(self, wanted: Access) -> bool {
        self == Access::ReadWrite || wanted == Access::ReadOnly
    }
}

/// One mapped part of a reservation: `offset_bytes..offset_bytes + len_bytes`, never empty.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Where it starts, in bytes from the start of the reservation.
    pub offset_bytes: u64,
    /// Its length in bytes.
    pub len_bytes: u64,
    /// What may be done there.
    pub access: Access,
}

impl Piece {
    /// The first offset after the piece. Pieces lie inside a reservation, so the sum cannot
    /// overflow.
    fn end(&self) -> u64 {
        self.offset_bytes + self.len_bytes
    }
}

/// Why an access to shared memory was refused. Nothing was read or written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs)] // the messages are the docs
pub enum AccessError {
    #[error("{len} bytes at offset {offset}: nothing is mapped at offset {unmapped_at}")]
    OutOfBounds {
        offset: u64,
        len: u64,
        unmapped_at: u64,
    },
    #[error("write of {len} bytes at offset {offset}: mapped read-only at offset {read_only_at}")]
    ReadOnly {
        offset: u64,
        len: u64,
        read_only_at: u64,
    },
    #[error("word at offset {offset}, which is not a multiple of {align}")]
    Misaligned { offset: u64, align: u64 },
}

/// The mapped pieces of one reservation: sorted, disjoint, none empty, none past 2^64-1.
#[derive(Debug, Default)]
pub(super) struct Pieces(Vec<Piece>);

impl Pieces {
    pub(super) fn as_slice(&self) -> &[Piece] {
        &self.0
    }

    /// The lowest piece that shares a byte with `offset..end`.
    pub(super) fn overlapping(&self, offset: u64, end: u64) -> Option<Piece> {
        let first = self.0.partition_point(|piece| piece.end() <= offset);
        self.0
            .get(first)
            .filter(|piece| piece.offset_bytes < end)
            .copied()
    }

    /// The piece that `offset` lies in.
    #[inline]
    pub(super) fn holding(&self, offset: u64) -> Option<Piece> {
        let first = match self.0.as_slice() {
            // What is mapped as a whole need not be searched.
            [_] => 0,
            many => many.partition_point(|piece| piece.end() <= offset),
        };
        self.0
            .get(first)
            .filter(|piece| piece.offset_bytes <= offset && offset < piece.end())
            .copied()
    }

    /// Adds a piece. That it overlaps none is the caller's promise.
    pub(super) fn insert(&mut self, piece: Piece) {
        assert!(
            self.overlapping(piece.offset_bytes, piece.end()).is_none(),
            "pieces never overlap"
        );
        let place = self
            .0
            .partition_point(|other| other.offset_bytes < piece.offset_bytes);
        self.0.insert(place, piece);
    }

    /// Whether all of `len` bytes at `offset` lie in adjacent pieces that allow `wanted`. An empty
    /// span always does.
    pub(super) fn check(&self, offset: u64, len: u64, wanted: Access) -> Result<(), AccessError> {
        // Mostly there is one, and all of it may be used.
        if let [only] = &self.0[..]
            && only.offset_bytes <= offset
            && offset.checked_add(len).is_some_and(|end| end <= only.end())
            && only.access.allows(wanted)
        {
            return Ok(());
        }
        let mut missing = offset;
        let mut left = len;
        let mut next = self.0.partition_point(|piece| piece.end() <= offset);
        while left > 0 {
            let Some(piece) = self
                .0
                .get(next)
                .filter(|piece| piece.offset_bytes <= missing)
            else {
                return Err(AccessError::OutOfBounds {
                    offset,
                    len,
                    unmapped_at: missing,
                });
            };
            if !piece.access.allows(wanted) {
                return Err(AccessError::ReadOnly {
                    offset,
                    len,
                    read_only_at: missing,
                });
            }
            left = left.saturating_sub(piece.end() - missing);
            missing = piece.end();
            next += 1;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn pieces(list: &[(u64, u64, Access)]) -> Pieces {
        let mut pieces = Pieces::default();
        for &(offset_bytes, len_bytes, access) in list {
            pieces.insert(Piece {
                offset_bytes,
                len_bytes,
                access,
            });
        }
        pieces
    }

    #[test]
    fn a_span_may_end_exactly_where_the_piece_ends_and_not_one_byte_later() {
        let pieces = pieces(&[(100, 50, Access::ReadWrite)]);

        assert_eq!(pieces.check(100, 50, Access::ReadWrite), Ok(()));
        assert_eq!(
            pieces.check(100, 51, Access::ReadOnly),
            Err(AccessError::OutOfBounds {
                offset: 100,
                len: 51,
                unmapped_at: 150
            })
        );
        assert_eq!(
            pieces.check(99, 1, Access::ReadOnly),
            Err(AccessError::OutOfBounds {
                offset: 99,
                len: 1,
                unmapped_at: 99
            })
        );
    }

    #[test]
    fn a_span_whose_end_overflows_is_out_of_bounds() {
        let pieces = pieces(&[(0, 4096, Access::ReadWrite)]);

        assert_eq!(
            pieces.check(1, u64::MAX, Access::ReadOnly),
            Err(AccessError::OutOfBounds {
                offset: 1,
                len: u64::MAX,
                unmapped_at: 4096
            })
        );
    }

    #[test]
    fn a_write_across_into_a_read_only_piece_names_its_first_byte() {
        let pieces = pieces(&[(0, 10, Access::ReadWrite), (10, 10, Access::ReadOnly)]);

        assert_eq!(pieces.check(5, 10, Access::ReadOnly), Ok(()));
        assert_eq!(
            pieces.check(5, 10, Access::ReadWrite),
            Err(AccessError::ReadOnly {
                offset: 5,
                len: 10,
                read_only_at: 10
            })
        );
    }

    proptest! {
        /// The model is one slot for each byte.
        #[allow(clippy::cast_possible_truncation)] // small numbers
        #[test]
        fn check_agrees_with_a_byte_by_byte_model(
            tries in prop::collection::vec((0u64..56, 1u64..9, any::<bool>()), 0..12),
            spans in prop::collection::vec((0u64..70, 0u64..70, any::<bool>()), 1..40),
        ) {
            let access = |write| if write { Access::ReadWrite } else { Access::ReadOnly };
            let mut pieces = Pieces::default();
            let mut model = [None; 160];
            for (offset_bytes, len_bytes, write) in tries {
                let bytes = offset_bytes as usize..(offset_bytes + len_bytes) as usize;
                let is_free = model[bytes.clone()].iter().all(Option::is_none);
                let hit = pieces.overlapping(offset_bytes, offset_bytes + len_bytes);
                prop_assert_eq!(hit.is_none(), is_free);
                if is_free {
                    pieces.insert(Piece { offset_bytes, len_bytes, access: access(write) });
                    model[bytes].fill(Some(access(write)));
                }
            }
            for (offset, len, write) in spans {
                let wanted = access(write);
                let expected = (offset..offset + len).find_map(|at| match model[at as usize] {
                    None => Some(AccessError::OutOfBounds { offset, len, unmapped_at: at }),
                    Some(has) if !has.allows(wanted) => {
                        Some(AccessError::ReadOnly { offset, len, read_only_at: at })
                    }
                    Some(_) => None,
                });
                prop_assert_eq!(pieces.check(offset, len, wanted), expected.map_or(Ok(()), Err));
            }
        }
    }
}
