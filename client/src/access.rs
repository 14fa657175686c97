//! What a device does with memory under a pin, beside reading and writing
//! bytes: copies within the domain, and words that it shares with a driver.

use std::sync::atomic::Ordering;

use domain_core::addr::{Iova, IovaRange};
use domain_core::perm::Perm;
use domain_core::region::{
    SharedSlice, SharedU16, SharedU16Mut, SharedU32, SharedU32Mut, SharedU64, SharedU64Mut,
};

use crate::pin::{AS_LONG, Pieces, Pin, PinError};

/// Bytes on their way from one place to another. They stay in the first cache.
const CHUNK_BYTES: usize = 4096;
/// A chunk is zeroed first, which would take longer than to copy a little.
const LITTLE_BYTES: usize = 256;

impl Pin<'_> {
    /// Copies bytes from one place of the domain to another, all or none, as a
    /// device would that reads them and writes them.
    ///
    /// The ranges may overlap: then the target holds what the source was. That
    /// two addresses lead to the same memory is not noticed, and the result is
    /// a mixture, as it is when others write meanwhile. Of memory it takes some
    /// KiB of stack, whatever the length.
    ///
    /// # Errors
    /// [`PinError`] at the first address that cannot be read, else at the first
    /// that cannot be written.
    pub fn copy(&self, from: Iova, to: Iova, len_bytes: u64) -> Result<(), PinError> {
        if len_bytes == 0 {
            return Ok(());
        }
        let source_range = IovaRange::from_len(from, len_bytes)?;
        let target_range = IovaRange::from_len(to, len_bytes)?;
        let source = self.translate(source_range, Perm::Read)?;
        let target = self.translate(target_range, Perm::Write)?;
        // What is still to be read must not be written before.
        let end = match from < to && source_range.overlaps(target_range) {
            true => End::Last,
            false => End::First,
        };
        match len_bytes <= LITTLE_BYTES as u64 {
            true => copy_through::<LITTLE_BYTES>(&source, &target, end),
            false => copy_through::<CHUNK_BYTES>(&source, &target, end),
        }
        Ok(())
    }

    /// The memory of a naturally aligned word, which no piece ends in.
    #[inline]
    fn word(&self, at: Iova, size_bytes: u64, want: Perm) -> Result<SharedSlice<'_>, PinError> {
        if !at.get().is_multiple_of(size_bytes) {
            return Err(PinError::Misaligned { at, size_bytes });
        }
        match self.address(at, want) {
            Some(memory) if memory.len() >= size_bytes => Ok(memory),
            // It says why; or it was mapped this very moment.
            _ => {
                let range = IovaRange::from_len(at, size_bytes)?;
                Ok(self.translate(range, want)?.first().memory)
            }
        }
    }
}

macro_rules! words {
    ($bits:literal, $int:ident, $read:ident, $write:ident, $word:ident, $word_mut:ident, $load_le:ident, $store_le:ident) => {
        impl Pin<'_> {
            #[doc = concat!("The ", $bits, "-bit word at an address, to load. Native byte order.")]
            ///
            /// # Errors
            /// [`PinError::Misaligned`], and as [`Pin::translate`] if it may not
            /// be read.
            #[inline]
            pub fn $word(&self, iova: Iova) -> Result<$read<'_>, PinError> {
                let word = self.word(iova, size_of::<$int>() as u64, Perm::Read)?;
                Ok(word.$word(0).expect(A_WORD))
            }

            #[doc = concat!("The ", $bits, "-bit word at an address, to load and store. Native byte order.")]
            ///
            /// # Errors
            /// [`PinError::Misaligned`], and as [`Pin::translate`] unless it may
            /// be read and written.
            #[inline]
            pub fn $word_mut(&self, iova: Iova) -> Result<$write<'_>, PinError> {
                let word = self.word(iova, size_of::<$int>() as u64, Perm::ReadWrite)?;
                Ok(word.$word_mut(0).expect(A_WORD))
            }

            #[doc = concat!("Loads the little-endian ", $bits, "-bit word at an address, as one access.")]
            ///
            /// # Errors
            #[doc = concat!("As [`Pin::", stringify!($word), "`].")]
            ///
            /// # Panics
            /// When `order` is `Release` or `AcqRel`.
            #[inline]
            pub fn $load_le(&self, iova: Iova, order: Ordering) -> Result<$int, PinError> {
                Ok($int::from_le(self.$word(iova)?.load(order)))
            }

            #[doc = concat!("Stores a little-endian ", $bits, "-bit word at an address, as one access.")]
            ///
            /// # Errors
            /// [`PinError::Misaligned`], and as [`Pin::translate`] if it may not
            /// be written. Nothing was stored.
            ///
            /// # Panics
            /// When `order` is `Acquire` or `AcqRel`.
            #[inline]
            pub fn $store_le(&self, iova: Iova, value: $int, order: Ordering) -> Result<(), PinError> {
                let word = self.word(iova, size_of::<$int>() as u64, Perm::Write)?;
                word.$word_mut(0).expect(A_WORD).store(value.to_le(), order);
                Ok(())
            }
        }
    };
}

words!(
    "16",
    u16,
    SharedU16,
    SharedU16Mut,
    word16,
    word16_mut,
    load_le16,
    store_le16
);
words!(
    "32",
    u32,
    SharedU32,
    SharedU32Mut,
    word32,
    word32_mut,
    load_le32,
    store_le32
);
words!(
    "64",
    u64,
    SharedU64,
    SharedU64Mut,
    word64,
    word64_mut,
    load_le64,
    store_le64
);

const A_WORD: &str = "an aligned iova leads to an aligned word, and allows what was wanted";

/// Where a copy begins.
#[derive(Clone, Copy)]
enum End {
    First,
    Last,
}

/// Pieces of the same length in all, by way of `CHUNK` bytes of stack.
fn copy_through<const CHUNK: usize>(source: &Pieces<'_>, target: &Pieces<'_>, end: End) {
    let (from, to) = (
        source.iter().map(|piece| piece.memory),
        target.iter().map(|piece| piece.memory),
    );
    match end {
        End::First => copy_runs::<CHUNK>(Left::new(from, end), Left::new(to, end)),
        End::Last => copy_runs::<CHUNK>(Left::new(from.rev(), end), Left::new(to.rev(), end)),
    }
}

fn copy_runs<'p, const CHUNK: usize>(
    mut source: Left<'p, impl Iterator<Item = SharedSlice<'p>>>,
    mut target: Left<'p, impl Iterator<Item = SharedSlice<'p>>>,
) {
    let mut chunk = [0; CHUNK];
    while let (Some(from), Some(to)) = (source.run_bytes(), target.run_bytes()) {
        let run = from.min(to).min(CHUNK as u64);
        let part = &mut chunk[..usize::try_from(run).expect("at most a chunk")];
        source.take(run).copy_out(0, part).expect(AS_LONG);
        target.take(run).copy_in(0, part).expect(AS_LONG);
    }
}

/// What is left of one side of a copy.
struct Left<'p, I> {
    /// The present one, until nothing of it is left.
    run: Option<SharedSlice<'p>>,
    behind: I,
    end: End,
}

impl<'p, I: Iterator<Item = SharedSlice<'p>>> Left<'p, I> {
    fn new(mut pieces: I, end: End) -> Self {
        Left {
            run: pieces.next(),
            behind: pieces,
            end,
        }
    }

    /// How many bytes lie together next; `None` at the end of it all.
    fn run_bytes(&self) -> Option<u64> {
        self.run.map(|run| run.len())
    }

    /// `len_bytes` of the run, from the end that the copy begins with.
    fn take(&mut self, len_bytes: u64) -> SharedSlice<'p> {
        let run = self.run.expect("who takes has asked how much there is");
        let rest_bytes = run.len() - len_bytes;
        let (taken_at, rest_at) = match self.end {
            End::First => (0, len_bytes),
            End::Last => (rest_bytes, 0),
        };
        let part = |at, len| run.slice(at, len).expect("it lies in the run");
        self.run = match rest_bytes {
            0 => self.behind.next(),
            _ => Some(part(rest_at, rest_bytes)),
        };
        part(taken_at, len_bytes)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering::{AcqRel, Acquire, Relaxed, Release};

    use domain_core::iotlb::{RegionId, Target, TranslateError};
    use domain_core::region::Access;
    use domain_core::session::Role;
    use tonic::Code;

    use super::*;
    use crate::client::AttachOptions;
    use crate::fake::{BOUNCE, COHERENT, FakeDaemon, PAGE};

    /// Where no aperture is, and nothing adjoins.
    const SCATTERED: u64 = 0x4000_0000;

    fn in_region(region: RegionId, page: u64) -> Target {
        Target {
            region,
            offset_bytes: page * PAGE,
        }
    }

    /// Four pages at `SCATTERED` that lie in another order, so that each is a
    /// piece; the last two can only be read.
    async fn with_pages() -> FakeDaemon {
        let mut fake = FakeDaemon::start().await;
        let pages = [
            (RegionId::BOUNCE, 2, Perm::ReadWrite),
            (RegionId::COHERENT, 0, Perm::ReadWrite),
            (RegionId::BOUNCE, 1, Perm::Read),
            (RegionId::COHERENT, 1, Perm::Read),
        ];
        for (number, (region, page, perm)) in (0..).zip(pages) {
            let target = in_region(region, page);
            fake.memory.map(SCATTERED + number * PAGE, 1, target, perm);
        }
        fake.memory
            .map(BOUNCE, 1, in_region(RegionId::BOUNCE, 0), Perm::ReadWrite);
        fake
    }

    fn iova(offset: u64) -> Iova {
        Iova::new(SCATTERED + offset)
    }

    /// No two of its bytes that lie near each other are equal.
    fn pattern(len: usize) -> Vec<u8> {
        (0..251).cycle().take(len).collect()
    }

    fn bytes_at(pin: &Pin<'_>, at: Iova, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        pin.read(at, &mut bytes).unwrap();
        bytes
    }

    // Copies.

    #[tokio::test]
    async fn a_copy_crosses_pieces_on_both_sides() {
        let fake = with_pages().await;
        let pin = fake.session.pin().unwrap();
        // Two pieces to one, one to two, and little.
        for (from, to, len) in [
            (iova(PAGE - 100), Iova::new(BOUNCE + 7), 200),
            (Iova::new(BOUNCE + 7), iova(PAGE - 1), 300),
            (iova(PAGE - 2), Iova::new(BOUNCE), 4),
        ] {
            let sent = pattern(len);
            pin.write(from, &sent).unwrap();

            pin.copy(from, to, len as u64).unwrap();

            assert_eq!(bytes_at(&pin, to, len), sent, "{from} {to}");
        }
    }

    #[tokio::test]
    async fn of_ranges_that_overlap_the_target_holds_what_the_source_was() {
        let fake = with_pages().await;
        let pin = fake.session.pin().unwrap();
        // More than a chunk, and over the edge of a piece.
        const LEN: usize = 6000;
        for (from, to) in [(0, 1), (1, 0), (500, 1500), (1500, 500), (9, 9)] {
            let sent = pattern(LEN);
            pin.write(iova(from), &sent).unwrap();

            pin.copy(iova(from), iova(to), LEN as u64).unwrap();

            assert!(bytes_at(&pin, iova(to), LEN) == sent, "{from} {to}");
        }
    }

    #[tokio::test]
    async fn a_copy_that_cannot_be_whole_copies_nothing() {
        let fake = with_pages().await;
        let pin = fake.session.pin().unwrap();
        pin.write(Iova::new(BOUNCE), &[0xff; 4096]).unwrap();
        let before = bytes_at(&pin, iova(0), 4 * 4096);
        let copy = |from, to, len| pin.copy(from, to, len).unwrap_err();

        let no_source = copy(iova(3 * PAGE), iova(0), PAGE + 1);
        let no_target = copy(Iova::new(BOUNCE), iova(2 * PAGE - 4), 8);
        let no_range = copy(iova(0), Iova::new(u64::MAX), 2);

        let hole = TranslateError::Hole { at: iova(4 * PAGE) };
        assert_eq!(no_source, hole.into());
        assert_eq!(no_target.code(), Some(Code::PermissionDenied));
        assert!(matches!(no_range, PinError::Range(_)));
        assert!(bytes_at(&pin, iova(0), 4 * 4096) == before);
        pin.copy(Iova::new(0), Iova::new(0), 0).unwrap();
    }

    // Words.

    #[tokio::test]
    async fn words_of_every_width_are_little_endian_in_memory() {
        let fake = with_pages().await;
        let pin = fake.session.pin().unwrap();

        pin.store_le16(iova(PAGE + 2), 0x0102, Release).unwrap();
        pin.store_le32(iova(PAGE + 4), 0x0304_0506, Relaxed)
            .unwrap();
        pin.store_le64(iova(PAGE + 8), 0x0708_090a_0b0c_0d0e, Release)
            .unwrap();

        let expected = [0, 0, 2, 1, 6, 5, 4, 3, 0xe, 0xd, 0xc, 0xb, 0xa, 9, 8, 7_u8];
        assert_eq!(bytes_at(&pin, iova(PAGE), 16), expected);
        assert_eq!(pin.load_le16(iova(PAGE + 2), Acquire), Ok(0x0102));
        assert_eq!(pin.load_le32(iova(PAGE + 4), Relaxed), Ok(0x0304_0506));
        let last = pin.load_le64(iova(PAGE + 8), Acquire);
        assert_eq!(last, Ok(0x0708_090a_0b0c_0d0e));
    }

    #[tokio::test]
    async fn cells_are_the_words_that_others_see() {
        let fake = with_pages().await;
        let pin = fake.session.pin().unwrap();

        // The last of a page, as a ring may have it.
        pin.word16_mut(iova(PAGE - 2)).unwrap().store(7, Release);
        pin.word32_mut(iova(0)).unwrap().fetch_add(8, AcqRel);
        pin.word64_mut(iova(8)).unwrap().store(9, Release);

        let mut seen = [0; 2];
        rustix::io::pread(&fake.memory.bounce, &mut seen, 3 * PAGE - 2).unwrap();
        assert_eq!(u16::from_ne_bytes(seen), 7);
        assert_eq!(pin.word16(iova(PAGE - 2)).unwrap().load(Acquire), 7);
        assert_eq!(pin.word32(iova(0)).unwrap().load(Acquire), 8);
        assert_eq!(pin.word64(iova(8)).unwrap().load(Acquire), 9);
    }

    #[tokio::test]
    async fn a_word_at_an_odd_place_is_refused_with_the_numbers() {
        let fake = with_pages().await;
        let pin = fake.session.pin().unwrap();
        let misaligned = |offset, size_bytes| PinError::Misaligned {
            at: iova(offset),
            size_bytes,
        };

        assert_eq!(pin.word16(iova(1)).unwrap_err(), misaligned(1, 2));
        assert_eq!(pin.word32_mut(iova(2)).unwrap_err(), misaligned(2, 4));
        // It would lie in two pieces.
        let refused = pin.store_le64(iova(PAGE - 4), u64::MAX, Relaxed);
        assert_eq!(refused, Err(misaligned(PAGE - 4, 8)));
        assert_eq!(bytes_at(&pin, iova(PAGE - 4), 8), [0; 8]);
        let text = refused.unwrap_err().to_string();
        assert_eq!(
            text,
            "a word of 8 bytes at 0x40000ffc, which is not a multiple of 8"
        );
    }

    #[tokio::test]
    async fn a_word_that_may_not_be_used_so_is_refused_as_bytes_are() {
        let fake = with_pages().await;
        let pin = fake.session.pin().unwrap();
        let denied = Some(Code::PermissionDenied);
        let read_only = iova(2 * PAGE);

        assert_eq!(pin.load_le32(read_only, Relaxed), Ok(0));
        assert_eq!(pin.word32_mut(read_only).unwrap_err().code(), denied);
        let stored = pin.store_le32(read_only, 1, Relaxed).unwrap_err();
        assert_eq!(stored.code(), denied);
        assert_eq!(pin.load_le32(read_only, Relaxed), Ok(0));
        let hole = TranslateError::Hole { at: iova(4 * PAGE) };
        assert_eq!(pin.word16(iova(4 * PAGE)).unwrap_err(), hole.into());
        fake.memory.page.fence(fake.memory.table.generation());
        assert_eq!(pin.load_le16(iova(0), Relaxed), Err(PinError::Ended));
        assert_eq!(pin.copy(iova(0), iova(8), 8), Err(PinError::Ended));
    }

    #[tokio::test]
    async fn what_may_only_be_written_is_stored_to_and_not_loaded() {
        let mut fake = FakeDaemon::start().await;
        fake.memory
            .map(BOUNCE, 1, in_region(RegionId::BOUNCE, 0), Perm::Write);
        let (pin, at) = (fake.session.pin().unwrap(), Iova::new(BOUNCE));

        pin.store_le16(at, 0x0102, Release).unwrap();

        let mut seen = [0; 2];
        rustix::io::pread(&fake.memory.bounce, &mut seen, 0).unwrap();
        assert_eq!(seen, [2, 1]);
        let denied = Some(Code::PermissionDenied);
        assert_eq!(pin.word16_mut(at).unwrap_err().code(), denied);
        assert_eq!(pin.load_le16(at, Acquire).unwrap_err().code(), denied);
        let copied = pin.copy(at, Iova::new(BOUNCE + 8), 8);
        assert_eq!(copied.unwrap_err().code(), denied);
    }

    #[tokio::test]
    async fn a_session_that_only_reads_has_no_words_to_store() {
        let options = AttachOptions::new(Role::Device, Access::ReadOnly);
        let mut fake = FakeDaemon::start_with(options).await;
        let target = in_region(RegionId::COHERENT, 0);
        fake.memory.map(COHERENT, 1, target, Perm::ReadWrite);
        let (pin, at) = (fake.session.pin().unwrap(), Iova::new(COHERENT));

        assert_eq!(pin.load_le64(at, Acquire), Ok(0));
        let refused = pin.store_le64(at, 1, Release).unwrap_err();
        assert_eq!(refused, PinError::ReadOnly { at });
    }
}
