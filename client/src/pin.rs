//! Translating without a call: what a thread finds while it is pinned stays
//! what it was.

use std::fmt;
use std::iter;
use std::sync::Arc;

use domain_core::addr::{Iova, IovaRange, RangeError};
use domain_core::iotlb::{Hit, Piece, RegionId, TranslateError};
use domain_core::perm::Perm;
use domain_core::region::{Access, SharedSlice};
use domaind_proto::v1;
use domaind_proto::v1::client_frame::Body as Ask;
use domaind_proto::v1::server_frame::Body as Answer;
use tonic::Code;

use crate::error::{EndReason, Ended, Error, ProtocolError};
use crate::handshake::out_of_turn;
use crate::live::Live;
use crate::opened::Opened;
use crate::pins::PinGuard;
use crate::session::{Inner, Session};

/// How often a range may lead to yet another memory while it is being opened.
const OPENINGS_MOST: usize = 5000;

/// Why a [`Pin`] leads nowhere. Nothing was read, written or handed out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs)] // the messages are the docs
pub enum PinError {
    /// A hole, or less is allowed than was wanted.
    #[error(transparent)]
    Translate(#[from] TranslateError),
    #[error(transparent)]
    Range(#[from] RangeError),
    /// [`Session::open`] fetches it.
    #[error("{at} leads to the memory of region {region}, which is not open")]
    NotOpen { at: Iova, region: u32 },
    #[error("{at} leads behind the end of the memory of region {region}")]
    NotBacked { at: Iova, region: u32 },
    #[error("the memory at {at} can only be read by this session")]
    ReadOnly { at: Iova },
    #[error("a word of {size_bytes} bytes at {at}, which is not a multiple of {size_bytes}")]
    Misaligned { at: Iova, size_bytes: u64 },
    #[error("the session has ended")]
    Ended,
}

impl PinError {
    pub(crate) fn code(self) -> Option<Code> {
        match self {
            PinError::Translate(TranslateError::Hole { .. }) => Some(Code::NotFound),
            PinError::Translate(TranslateError::Perm { .. }) | PinError::ReadOnly { .. } => {
                Some(Code::PermissionDenied)
            }
            PinError::Range(_) => Some(Code::OutOfRange),
            PinError::Misaligned { .. } => Some(Code::InvalidArgument),
            PinError::NotOpen { .. } => Some(Code::FailedPrecondition),
            PinError::NotBacked { .. } => Some(Code::Internal),
            PinError::Ended => Some(Code::Unavailable),
        }
    }
}

/// While it lives, whatever it has translated stays as it is: nothing of that
/// memory is used for anything else.
///
/// Made and dropped on one thread, for a few nanoseconds, without a lock or a
/// system call; several may be alive, on one thread or on many. Keep it short:
/// whoever removes a mapping waits for the pins that are older, and a session
/// that keeps one for longer than the daemon's ack timeout (5 s, mostly) is
/// ended. Nothing that is found through it may be used when it is gone, which
/// the lifetimes see to, but for raw pointers.
///
/// Not to be held across an await: it stays on its thread, and the daemon waits.
#[must_use = "what is found after it is dropped may be anything"]
pub struct Pin<'s> {
    session: &'s Session,
    /// Of `session`, to have it near.
    live: &'s Live,
    guard: PinGuard<'s>,
}

/// Part of a translation, mapped into this process.
#[derive(Clone, Copy, Debug)]
pub struct MappedPiece<'p> {
    /// The part of what was asked for.
    pub range: IovaRange,
    /// What the device side may do there.
    pub perm: Perm,
    /// Its bytes, as many as `range` has. Read-only where `perm` or the access
    /// of the session says so.
    pub memory: SharedSlice<'p>,
}

/// Pieces that together cover a range, in order. Never empty, and no
/// allocation if it is one.
#[derive(Clone, Debug)]
pub struct Pieces<'p> {
    first: MappedPiece<'p>,
    rest: Vec<MappedPiece<'p>>,
}

impl Session {
    /// Marks that this thread uses translations, from now on until the answer
    /// is dropped.
    ///
    /// # Errors
    /// [`Error::Ended`].
    #[inline(always)] // see Pins::pin
    pub fn pin(&self) -> Result<Pin<'_>, Error> {
        let live = self.live();
        match live.pins.pin(live.table.generation()) {
            Some(guard) => Ok(Pin {
                session: self,
                live,
                guard,
            }),
            None => Err(Error::Ended(self.inner.why_no_pin())),
        }
    }

    /// Fetches and maps all registered memory that a range leads to and that is
    /// not open yet, so that [`Pin::translate`] finds it. Without a call if
    /// there is none. Each memory is mapped once, as a whole, until nothing
    /// leads to it any more. If it is cancelled, some of it may be open.
    ///
    /// # Errors
    /// [`Error::Pin`] for a hole in the range and where less is allowed than
    /// wanted; [`Error::Refused`] (the memory cannot be opened by this session),
    /// [`Error::Opened`] when it cannot be mapped, [`Error::Ended`].
    pub async fn open(&self, range: IovaRange, want: Perm) -> Result<(), Error> {
        for _ in 0..OPENINGS_MOST {
            let unopened = self.pin()?.unopened(range, want)?;
            match unopened {
                None => return Ok(()),
                Some(region) => fetch(&self.inner, region).await?,
            }
        }
        let number = OPENINGS_MOST as u64;
        Err(ProtocolError::Count { number }.into())
    }

    /// As [`Session::open`], and then a pin under which the range translates.
    /// The only wait is for memory that is not open.
    ///
    /// # Errors
    /// As [`Session::open`].
    pub async fn resolve(&self, range: IovaRange, want: Perm) -> Result<Pin<'_>, Error> {
        loop {
            self.open(range, want).await?;
            let pin = self.pin()?;
            // It may have been changed, or closed, in between.
            if pin.unopened(range, want)?.is_none() {
                return Ok(pin);
            }
        }
    }
}

impl Inner {
    #[cold]
    fn why_no_pin(&self) -> Ended {
        let detached = || Ended::new(EndReason::Detached, "the session detaches");
        self.connection.is_ended().unwrap_or_else(detached)
    }
}

impl<'s> Pin<'s> {
    /// A state of the IOTLB that all translations are at least as new as.
    #[must_use]
    pub fn view(&self) -> u64 {
        self.guard.view()
    }

    /// Lets go of the old view and takes the newest: for loops that work for
    /// long. Where this thread has other pins of the session, the oldest of
    /// them still counts.
    ///
    /// # Errors
    /// [`Error::Ended`].
    #[inline]
    pub fn refresh(self) -> Result<Pin<'s>, Error> {
        let session = self.session;
        drop(self);
        session.pin()
    }

    /// Where the bytes of a range are in this process: pieces that together
    /// cover it, or nothing.
    ///
    /// # Errors
    /// [`PinError`] at the first address that leads nowhere.
    #[inline]
    pub fn translate(&self, range: IovaRange, want: Perm) -> Result<Pieces<'_>, PinError> {
        let hit = self.live.table.translate(range.start());
        match hit.filter(|hit| hit.last >= range.last() && hit.perm.allows(want)) {
            // One leaf covers it, as mostly.
            Some(Hit { target, perm, .. }) => {
                let piece = Piece {
                    range,
                    target,
                    perm,
                };
                let (first, rest) = (self.mapped(piece, want)?, Vec::new());
                self.check_fence()?;
                Ok(Pieces { first, rest })
            }
            None => self.translate_pieces(range, want),
        }
    }

    /// With another look at the first leaf, whatever is wrong with that.
    fn translate_pieces(&self, range: IovaRange, want: Perm) -> Result<Pieces<'_>, PinError> {
        let mut pieces = self.live.table.pieces(range, want);
        let hole = TranslateError::Hole { at: range.start() };
        let first = self.mapped(pieces.next().ok_or(hole)??, want)?;
        let mut rest = Vec::new();
        if first.range != range {
            for piece in pieces {
                rest.push(self.mapped(piece?, want)?);
            }
        }
        self.check_fence()?;
        Ok(Pieces { first, rest })
    }

    /// The memory at one address, as far as one entry of the page table leads:
    /// the quickest way, one look at the table. `None` where
    /// [`Pin::translate`] has an error to tell.
    #[inline]
    #[must_use]
    pub fn address(&self, iova: Iova, want: Perm) -> Option<SharedSlice<'_>> {
        let live = self.live;
        let hit = live.table.translate(iova)?;
        if !hit.perm.allows(want) {
            return None;
        }
        let memory = live.memory(hit.target)?.first(len_of(hit, iova));
        let memory = limited(memory, hit.perm);
        if !memory.access().allows(access_for(want)) || live.pins.is_fenced() {
            return None;
        }
        Some(memory)
    }

    /// The lowest run of addresses in a range that leads to one memory without a
    /// gap, as the page table has it: in whole granules, and clipped to the
    /// range. `None` if nothing is mapped there.
    ///
    /// # Errors
    /// [`PinError::Ended`].
    pub fn lookup(&self, range: IovaRange) -> Result<Option<(IovaRange, Perm)>, PinError> {
        let table = &self.live.table;
        let run = table.next_mapped(range).map(|(at, hit)| {
            let rest = IovaRange::new(at, range.last()).expect("it lies in the range");
            // As far as it leads on, unless it has changed meanwhile.
            let whole = table.pieces(rest, hit.perm).next().and_then(Result::ok);
            let last = whole.map_or(hit.last.min(range.last()), |piece| piece.range.last());
            let run = IovaRange::new(at, last).expect("it begins with what it is");
            (run, hit.perm)
        });
        self.check_fence()?;
        Ok(run)
    }

    /// Copies bytes out of the domain, all or none, as a device would read
    /// them. Other processes may write meanwhile, and then it is a mixture.
    ///
    /// # Errors
    /// [`PinError`] at the first address that cannot be read.
    pub fn read(&self, iova: Iova, into: &mut [u8]) -> Result<(), PinError> {
        if into.is_empty() {
            return Ok(());
        }
        let range = IovaRange::from_len(iova, into.len() as u64)?;
        let mut left = into;
        for piece in self.translate(range, Perm::Read)?.iter() {
            let (part, behind) = left.split_at_mut(len_in(piece.memory));
            piece.memory.copy_out(0, part).expect(AS_LONG);
            left = behind;
        }
        Ok(())
    }

    /// Copies bytes into the domain, all or none, as a device would write them.
    ///
    /// # Errors
    /// [`PinError`] at the first address that cannot be written.
    pub fn write(&self, iova: Iova, from: &[u8]) -> Result<(), PinError> {
        if from.is_empty() {
            return Ok(());
        }
        let range = IovaRange::from_len(iova, from.len() as u64)?;
        let mut left = from;
        for piece in self.translate(range, Perm::Write)?.iter() {
            let (part, behind) = left.split_at(len_in(piece.memory));
            piece.memory.copy_in(0, part).expect(AS_LONG);
            left = behind;
        }
        Ok(())
    }

    /// Not yet good for anything: the fence is to be looked at when all has been
    /// walked.
    #[inline]
    fn mapped(&self, piece: Piece, want: Perm) -> Result<MappedPiece<'_>, PinError> {
        let Piece {
            range,
            target,
            perm,
        } = piece;
        let (at, region) = (range.start(), target.region.get());
        let memory = match self.live.memory(target) {
            Some(memory) => limited(memory, perm),
            None if self.live.is_open(target.region) => {
                return Err(PinError::NotBacked { at, region });
            }
            None => return Err(PinError::NotOpen { at, region }),
        };
        if !memory.access().allows(access_for(want)) {
            return Err(PinError::ReadOnly { at });
        }
        let len = range.len_bytes().filter(|len| *len <= memory.len());
        let len = len.ok_or(PinError::NotBacked { at, region })?;
        Ok(MappedPiece {
            range,
            perm,
            memory: memory.first(len),
        })
    }

    /// The first memory of a range that is to be opened.
    fn unopened(&self, range: IovaRange, want: Perm) -> Result<Option<RegionId>, PinError> {
        let live = self.live;
        for piece in live.table.pieces(range, want) {
            let region = piece?.target.region;
            if !live.is_open(region) {
                return Ok(Some(region));
            }
        }
        self.check_fence()?;
        Ok(None)
    }

    /// What a walk has found counts only if this is well afterwards.
    #[inline]
    fn check_fence(&self) -> Result<(), PinError> {
        match self.live.pins.is_fenced() {
            true => Err(PinError::Ended),
            false => Ok(()),
        }
    }
}

impl fmt::Debug for Pin<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pin")
            .field("view", &self.view())
            .finish_non_exhaustive()
    }
}

impl<'p> Pieces<'p> {
    /// The first, which is all there is, mostly.
    #[must_use]
    pub fn first(&self) -> &MappedPiece<'p> {
        &self.first
    }

    /// If it is one piece: all of what was asked for in one run of addresses.
    #[must_use]
    pub fn single(&self) -> Option<&MappedPiece<'p>> {
        self.rest.is_empty().then_some(&self.first)
    }

    /// How many there are.
    #[must_use]
    #[allow(clippy::len_without_is_empty)] // it never is
    pub fn len(&self) -> usize {
        self.rest.len() + 1
    }

    /// All of them, in order.
    pub fn iter(&self) -> impl DoubleEndedIterator<Item = &MappedPiece<'p>> {
        iter::once(&self.first).chain(&self.rest)
    }
}

pub(crate) const AS_LONG: &str =
    "a piece is as long as its part of the range, and allows what was wanted";

/// Fetches the memory of one region, once for all who want it at the same time.
/// It may be closed again already.
async fn fetch(session: &Arc<Inner>, region: RegionId) -> Result<(), Error> {
    let live = session.live();
    let number = region.get();
    if !Opened::can_be(region) {
        return Err(ProtocolError::NoMemory { region: number }.into());
    }
    let _alone = live.opened.fetch_alone(region).await;
    if live.is_open(region) {
        return Ok(());
    }
    let ask = Ask::OpenMemory(v1::OpenMemory { region: number });
    match session.connection.request(ask, None).await? {
        Answer::MemoryOpened(_) => Ok(()),
        other => Err(out_of_turn(&other, "MemoryOpened").into()),
    }
}

#[inline]
fn access_for(want: Perm) -> Access {
    match want {
        Perm::Read => Access::ReadOnly,
        Perm::Write | Perm::ReadWrite => Access::ReadWrite,
    }
}

#[inline]
fn limited(memory: SharedSlice<'_>, perm: Perm) -> SharedSlice<'_> {
    match perm {
        Perm::Read => memory.read_only(),
        Perm::Write | Perm::ReadWrite => memory,
    }
}

/// How many bytes a hit leads to, from `iova` on. All of the space is more than
/// any memory has.
#[inline]
fn len_of(hit: Hit, iova: Iova) -> u64 {
    (hit.last.get() - iova.get()).saturating_add(1)
}

/// Lossless: such a slice lies in this process.
fn len_in(memory: SharedSlice<'_>) -> usize {
    usize::try_from(memory.len()).unwrap_or(usize::MAX)
}

#[cfg(test)]
mod tests {
    use std::hint::black_box;
    use std::os::fd::OwnedFd;
    use std::time::{Duration, Instant};

    use domain_core::iotlb::{Barrier, Target};
    use domain_core::session::Role;
    use tokio::time::timeout;

    use super::*;
    use crate::client::AttachOptions;
    use crate::fake::{A_MOMENT, BOUNCE, COHERENT, FakeDaemon, PAGE, SOON, in_memory, memfd};

    /// Where no aperture is.
    const DIRECT: u64 = 0x4000_0000;

    fn bytes(start: u64, len: u64) -> IovaRange {
        IovaRange::from_len(Iova::new(start), len).unwrap()
    }

    fn in_bounce(page: u64) -> Target {
        Target {
            region: RegionId::BOUNCE,
            offset_bytes: page * PAGE,
        }
    }

    /// Four pages of registered memory at `DIRECT`, which has been opened.
    async fn with_memory() -> (FakeDaemon, OwnedFd) {
        let mut fake = FakeDaemon::start().await;
        let memory = memfd(4);
        fake.memory.map(DIRECT, 4, in_memory(0, 0), Perm::ReadWrite);
        let opening = fake.session.open(bytes(DIRECT, 1), Perm::Read);
        let (opening, region) = tokio::join!(opening, fake.peer.open(&memory, 4));
        opening.unwrap();
        assert_eq!(region, 2);
        (fake, memory)
    }

    fn hole(at: u64) -> PinError {
        TranslateError::Hole { at: Iova::new(at) }.into()
    }

    #[tokio::test]
    async fn what_an_aperture_shows_is_found_where_the_session_has_it() {
        let mut fake = FakeDaemon::start().await;
        let view = fake.memory.map(BOUNCE, 2, in_bounce(0), Perm::ReadWrite);
        fake.session
            .write(Iova::new(BOUNCE + PAGE), b"abc")
            .unwrap();

        let pin = fake.session.pin().unwrap();

        assert_eq!(pin.view(), view);
        let pieces = pin.translate(bytes(BOUNCE, 2 * PAGE), Perm::Read).unwrap();
        let piece = pieces.single().unwrap();
        assert_eq!(piece.range, bytes(BOUNCE, 2 * PAGE));
        assert_eq!(piece.memory.len(), 2 * PAGE);
        let mut got = [0; 3];
        piece.memory.copy_out(PAGE, &mut got).unwrap();
        assert_eq!(&got, b"abc");
        let at = pin.address(Iova::new(BOUNCE + PAGE + 1), Perm::Write);
        let at = at.unwrap();
        assert_eq!(at.as_ptr(), piece.memory.as_ptr().wrapping_add(4097));
        assert_eq!(at.len(), PAGE - 1);
        assert_eq!(
            pin.translate(bytes(BOUNCE, 2 * PAGE + 1), Perm::Read)
                .unwrap_err(),
            hole(BOUNCE + 2 * PAGE)
        );
    }

    #[tokio::test]
    async fn registered_memory_is_opened_once_and_then_found_without_a_call() {
        let (mut fake, memory) = with_memory().await;
        rustix::io::pwrite(&memory, b"abc", PAGE + 5).unwrap();
        // Others of its pages need no call.
        fake.memory
            .map(DIRECT + 8 * PAGE, 1, in_memory(0, 1), Perm::Read);
        let both = [DIRECT + PAGE + 5, DIRECT + 8 * PAGE + 5];

        for iova in both {
            fake.session.open(bytes(iova, 3), Perm::Read).await.unwrap();
            let mut got = [0; 3];
            let pin = fake.session.pin().unwrap();
            pin.read(Iova::new(iova), &mut got).unwrap();
            assert_eq!(&got, b"abc");
        }

        let pin = fake.session.pin().unwrap();
        let [first, second] = both.map(|at| pin.address(Iova::new(at), Perm::Read).unwrap());
        assert_eq!(first.as_ptr(), second.as_ptr(), "it is mapped once");
        drop(pin);
        fake.peer.hear_nothing().await;
    }

    #[tokio::test]
    async fn memory_that_is_not_open_is_named_and_nothing_is_handed_out() {
        let (mut fake, _memory) = with_memory().await;
        fake.memory
            .map(DIRECT + 4 * PAGE, 1, in_memory(7, 0), Perm::ReadWrite);
        let pin = fake.session.pin().unwrap();
        let not_open = PinError::NotOpen {
            at: Iova::new(DIRECT + 4 * PAGE),
            region: 9,
        };

        let refused = pin.translate(bytes(DIRECT, 5 * PAGE), Perm::Read);

        assert_eq!(refused.unwrap_err(), not_open);
        assert!(
            pin.address(Iova::new(DIRECT + 4 * PAGE), Perm::Read)
                .is_none()
        );
        let written = pin.write(Iova::new(DIRECT + 4 * PAGE - 1), b"ab");
        assert_eq!(written.unwrap_err(), not_open);
        let mut last = [0xff];
        pin.read(Iova::new(DIRECT + 4 * PAGE - 1), &mut last)
            .unwrap();
        assert_eq!(last, [0], "all or none");
    }

    #[tokio::test]
    async fn bytes_are_copied_across_memories() {
        let (mut fake, memory) = with_memory().await;
        // Below an aperture in the table lies what is above it in the space.
        fake.memory
            .map(BOUNCE - PAGE, 1, in_memory(0, 3), Perm::ReadWrite);
        fake.memory.map(BOUNCE, 1, in_bounce(0), Perm::ReadWrite);
        let across = Iova::new(BOUNCE - 2);
        let pin = fake.session.pin().unwrap();

        pin.write(across, b"abcd").unwrap();

        let mut got = [0; 4];
        pin.read(across, &mut got).unwrap();
        assert_eq!(&got, b"abcd");
        let mut halves = [[0; 2]; 2];
        rustix::io::pread(&memory, &mut halves[0], 4 * PAGE - 2).unwrap();
        fake.session
            .read(Iova::new(BOUNCE), &mut halves[1])
            .unwrap();
        assert_eq!(halves, [*b"ab", *b"cd"]);
        let pieces = pin.translate(bytes(BOUNCE - 2, 4), Perm::Read).unwrap();
        let ranges: Vec<_> = pieces.iter().map(|piece| piece.range).collect();
        assert_eq!(ranges, [bytes(BOUNCE - 2, 2), bytes(BOUNCE, 2)]);
        assert!(pieces.single().is_none() && pieces.len() == 2);
    }

    #[tokio::test]
    async fn nothing_and_more_than_the_space_are_no_ranges_to_copy() {
        let fake = FakeDaemon::start().await;
        let pin = fake.session.pin().unwrap();

        pin.read(Iova::new(0), &mut []).unwrap();
        pin.write(Iova::new(0), &[]).unwrap();
        let beyond = pin.read(Iova::new(u64::MAX), &mut [0; 2]).unwrap_err();
        assert!(matches!(beyond, PinError::Range(_)), "{beyond:?}");
    }

    #[tokio::test]
    async fn what_may_not_be_written_is_read_only() {
        let options = AttachOptions::new(Role::Device, Access::ReadOnly);
        let mut fake = FakeDaemon::start_with(options).await;
        let (readable, both) = (BOUNCE, COHERENT);
        let in_coherent = Target {
            region: RegionId::COHERENT,
            offset_bytes: 0,
        };
        fake.memory.map(readable, 1, in_bounce(0), Perm::Read);
        fake.memory.map(both, 1, in_coherent, Perm::ReadWrite);
        let pin = fake.session.pin().unwrap();

        let by_perm = pin.translate(bytes(readable, 1), Perm::Write).unwrap_err();
        let by_access = pin.translate(bytes(both, 1), Perm::Write).unwrap_err();

        assert_eq!(by_perm.code(), Some(Code::PermissionDenied));
        assert_eq!(
            by_access,
            PinError::ReadOnly {
                at: Iova::new(both)
            }
        );
        for iova in [readable, both] {
            let found = pin.address(Iova::new(iova), Perm::Read).unwrap();
            assert_eq!(found.access(), Access::ReadOnly);
            assert!(pin.address(Iova::new(iova), Perm::Write).is_none());
        }
        assert_eq!(pin.write(Iova::new(both), b"a").unwrap_err(), by_access);
    }

    #[tokio::test]
    async fn an_entry_that_may_only_be_read_gives_slices_that_only_read() {
        let mut fake = FakeDaemon::start().await;
        fake.memory.map(BOUNCE, 1, in_bounce(0), Perm::Read);
        let pin = fake.session.pin().unwrap();

        let found = pin.address(Iova::new(BOUNCE), Perm::Read).unwrap();

        assert_eq!(found.access(), Access::ReadOnly);
        assert!(found.copy_in(0, b"a").is_err());
    }

    #[tokio::test]
    async fn the_lowest_run_is_found_and_clipped() {
        let mut fake = FakeDaemon::start().await;
        fake.memory.map(BOUNCE + PAGE, 2, in_bounce(1), Perm::Write);
        let pin = fake.session.pin().unwrap();
        let run = |start, len| pin.lookup(bytes(start, len)).unwrap();

        let whole = Some((bytes(BOUNCE + PAGE, 2 * PAGE), Perm::Write));
        assert_eq!(run(0, 1 << 40), whole);
        let part = Some((bytes(BOUNCE + PAGE + 1, 9), Perm::Write));
        assert_eq!(run(BOUNCE + PAGE + 1, 9), part);
        assert_eq!(run(BOUNCE, PAGE), None);
    }

    #[tokio::test]
    async fn a_leaf_that_leads_behind_its_memory_leads_nowhere() {
        let (mut fake, _memory) = with_memory().await;
        fake.memory
            .map(DIRECT + 8 * PAGE, 2, in_memory(0, 3), Perm::Read);
        let pin = fake.session.pin().unwrap();
        let last = bytes(DIRECT + 8 * PAGE, PAGE);
        assert!(pin.translate(last, Perm::Read).is_ok());

        for (start, len) in [(8, 2 * PAGE), (9, 1)] {
            let start = DIRECT + start * PAGE;
            let refused = pin.translate(bytes(start, len), Perm::Read).unwrap_err();
            assert!(
                matches!(refused, PinError::NotBacked { region: 2, .. }),
                "{refused:?}"
            );
        }
        assert!(
            pin.address(Iova::new(DIRECT + 9 * PAGE), Perm::Read)
                .is_none()
        );
    }

    #[tokio::test]
    async fn a_fenced_session_translates_nothing_although_the_table_still_has_it() {
        let (fake, _memory) = with_memory().await;
        let pin = fake.session.pin().unwrap();
        let range = bytes(DIRECT, 1);
        assert!(pin.translate(range, Perm::Read).is_ok());

        fake.memory.page.fence(fake.memory.table.generation());

        assert!(fake.memory.table.lookup(range).is_some());
        assert_eq!(
            pin.translate(range, Perm::Read).unwrap_err(),
            PinError::Ended
        );
        assert!(pin.address(Iova::new(DIRECT), Perm::Read).is_none());
        assert_eq!(pin.lookup(range), Err(PinError::Ended));
        assert_eq!(pin.read(Iova::new(DIRECT), &mut [0]), Err(PinError::Ended));
        assert!(fake.session.write(Iova::new(BOUNCE), b"a").is_err());
    }

    #[tokio::test]
    async fn refreshing_takes_the_newest_view_and_lets_go_of_the_old() {
        let mut fake = FakeDaemon::start().await;
        let pin = fake.session.pin().unwrap();
        let old = pin.view();
        let new = fake.memory.map(BOUNCE, 1, in_bounce(0), Perm::Read);
        assert!(fake.memory.page.holds_older_than(new, &Barrier::run()));

        let pin = pin.refresh().unwrap();

        assert!(pin.view() == new && old < new);
        assert!(!fake.memory.page.holds_older_than(new, &Barrier::run()));
        assert_eq!(fake.memory.page.oldest(&Barrier::run()), Some(new));
    }

    #[tokio::test]
    async fn those_who_open_the_same_memory_share_one_fetch() {
        let mut fake = FakeDaemon::start().await;
        fake.memory.map(DIRECT, 1, in_memory(0, 0), Perm::Read);
        let range = bytes(DIRECT, 1);
        let memory = memfd(1);
        let open = || fake.session.open(range, Perm::Read);
        let daemon = async {
            tokio::time::sleep(A_MOMENT).await;
            fake.peer.open(&memory, 1).await;
            fake.peer.hear_nothing().await;
        };

        let (one, two, three, ()) = tokio::join!(open(), open(), open(), daemon);

        one.and(two).and(three).unwrap();
        let pin = fake.session.resolve(range, Perm::Read).await.unwrap();
        assert!(pin.translate(range, Perm::Read).is_ok());
    }

    #[tokio::test]
    async fn a_cancelled_opening_leaves_the_memory_open() {
        let mut fake = FakeDaemon::start().await;
        fake.memory.map(DIRECT, 1, in_memory(0, 0), Perm::Read);
        let range = bytes(DIRECT, 1);
        let opening = fake.session.open(range, Perm::Read);
        assert!(timeout(Duration::from_millis(20), opening).await.is_err());

        fake.peer.open(&memfd(1), 1).await;

        let opened = async {
            while fake
                .session
                .pin()
                .unwrap()
                .translate(range, Perm::Read)
                .is_err()
            {
                tokio::task::yield_now().await;
            }
        };
        timeout(SOON, opened).await.unwrap();
    }

    #[tokio::test]
    async fn what_cannot_be_opened_is_told_and_can_be_tried_again() {
        let mut fake = FakeDaemon::start().await;
        fake.memory.map(DIRECT, 1, in_memory(0, 0), Perm::Read);
        let range = bytes(DIRECT, 1);
        let open = || fake.session.open(range, Perm::Read);
        let refuse = async {
            let asked = fake.peer.hear().await.unwrap();
            let reason = v1::ErrorReason::MemoryNotShareable;
            let refusal = v1::Refusal::because(Code::FailedPrecondition, reason, "its mode");
            fake.peer
                .say(asked.request_id, Answer::Refusal(refusal), None)
                .await;
        };
        let (refused, ()) = tokio::join!(open(), refuse);
        let reason = refused.unwrap_err().reason();
        assert_eq!(reason, v1::ErrorReason::MemoryNotShareable);

        // Less than the daemon says.
        let short = memfd(1);
        let (failed, _) = tokio::join!(open(), fake.peer.open(&short, 2));
        let failed = failed.unwrap_err();
        assert!(
            matches!(failed, Error::Opened { region: 2, .. }),
            "{failed:?}"
        );

        let memory = memfd(1);
        let (opened, _) = tokio::join!(open(), fake.peer.open(&memory, 1));
        opened.unwrap();
        let hole_behind = fake.session.open(bytes(DIRECT, PAGE + 1), Perm::Read).await;
        let hole_behind = hole_behind.unwrap_err();
        assert_eq!(hole_behind.code(), Some(Code::NotFound), "{hole_behind}");
    }

    #[tokio::test]
    async fn opened_memory_comes_with_an_fd_to_who_asked_for_it() {
        let fake = FakeDaemon::start().await;
        fake.peer
            .say(99, crate::fake::opened(1), Some(&memfd(1)))
            .await;
        let ended = timeout(SOON, fake.session.ended()).await.unwrap();
        assert_eq!(ended.reason, EndReason::DaemonProtocol);

        let mut fake = FakeDaemon::start().await;
        fake.memory.map(DIRECT, 1, in_memory(0, 0), Perm::Read);
        let without = async {
            let asked = fake.peer.hear().await.unwrap();
            let answer = crate::fake::opened(1);
            fake.peer.say(asked.request_id, answer, None).await;
        };
        let (opening, ()) = tokio::join!(fake.session.open(bytes(DIRECT, 1), Perm::Read), without);
        let error = opening.unwrap_err();
        assert!(
            matches!(&error, Error::Ended(ended) if ended.reason == EndReason::DaemonProtocol),
            "{error:?}"
        );
    }

    #[tokio::test]
    async fn nobody_can_pin_when_the_session_has_ended_and_is_told_why() {
        let fake = FakeDaemon::start().await;
        fake.peer.say_ended(v1::EndReason::Fenced).await;
        timeout(SOON, fake.session.ended()).await.unwrap();

        let error = fake.session.pin().unwrap_err();

        assert!(
            matches!(&error, Error::Ended(ended) if ended.reason == EndReason::Fenced),
            "{error:?}"
        );
        assert!(
            fake.session
                .open(bytes(DIRECT, 1), Perm::Read)
                .await
                .is_err()
        );
    }

    /// The best of many rounds: others work on the machine, too.
    fn measure(what: &str, run: impl Fn(u64)) {
        const TIMES: u32 = 200_000;
        let rounds = (0..100).map(|_| {
            let start = Instant::now();
            (0..TIMES.into()).for_each(&run);
            start.elapsed()
        });
        let each = rounds.min().unwrap().as_secs_f64() / f64::from(TIMES) * 1e9;
        println!("{what}: {each:.2} ns");
    }

    /// `cargo test --release -p domaind-client what_a_translation -- --ignored --nocapture`
    #[tokio::test]
    #[ignore = "a measurement"]
    async fn what_a_translation_costs() {
        const PAGES: u64 = 1 << 13;
        let mut fake = FakeDaemon::start().await;
        let memory = memfd(2 * PAGES);
        // Every second page of the memory, so that no two lead on.
        for page in 0..PAGES {
            let (iova, target) = (DIRECT + page * PAGE, in_memory(0, page * 2));
            fake.memory.map(iova, 1, target, Perm::ReadWrite);
        }
        fake.memory.map(BOUNCE, 4, in_bounce(0), Perm::ReadWrite);
        let opening = fake.session.open(bytes(DIRECT, 1), Perm::Read);
        let (opened, _) = tokio::join!(opening, fake.peer.open(&memory, 2 * PAGES));
        opened.unwrap();

        let session = &fake.session;
        let one = |_| black_box(Iova::new(DIRECT + 8));
        let bounce = |_| black_box(Iova::new(BOUNCE + 8));
        // Odd, so that all pages come, in no order.
        let any = |n: u64| black_box(Iova::new(DIRECT + n.wrapping_mul(5_167) % PAGES * PAGE + 8));
        let address = |pin: &Pin<'_>, iova| {
            black_box(pin.address(iova, Perm::Read).unwrap().as_ptr());
        };
        let translate = |pin: &Pin<'_>, iova| {
            let range = IovaRange::from_len(iova, 64).unwrap();
            let pieces = pin.translate(range, Perm::Read).unwrap();
            black_box(pieces.first().memory.as_ptr());
        };
        let pin = || session.pin().unwrap();
        let read = |iova| session.read(iova, &mut [0; 64]).unwrap();

        let held = pin();
        let walk = |iova| {
            black_box(held.live.table.translate(iova));
        };
        measure("the walk alone, one address", |n| walk(one(n)));
        measure("the walk alone, any address", |n| walk(any(n)));
        measure("address, pin held, one address", |n| address(&held, one(n)));
        measure("address, pin held, any address", |n| address(&held, any(n)));
        measure("address, pin held, bounce", |n| address(&held, bounce(n)));
        measure("translate, pin held, any address", |n| {
            translate(&held, any(n))
        });
        drop(held);
        // Through memory a pin costs more than it does in a caller's registers.
        measure("pin, unpin", |_| {
            black_box(black_box(session).pin().is_ok());
        });
        measure("pin, address, unpin: one address", |n| {
            address(&pin(), one(n))
        });
        measure("pin, address, unpin: any address", |n| {
            address(&pin(), any(n))
        });
        measure("pin, address, unpin: bounce", |n| {
            address(&pin(), bounce(n))
        });
        measure("pin, translate, unpin: any address", |n| {
            translate(&pin(), any(n))
        });
        measure("Session::read of 64 bytes", |n| read(bounce(n)));
        measure("pin, Pin::read of 64 bytes, unpin", |n| {
            pin().read(one(n), &mut [0; 64]).unwrap();
        });
    }

    /// Compiles, that is all.
    #[allow(dead_code)]
    fn opening_works_from_several_tasks(session: &Session) {
        fn may_be_spawned<T: Send>(_: &T) {}
        let range = bytes(DIRECT, 1);
        may_be_spawned(&session.open(range, Perm::Read));
        may_be_spawned(&async move {
            let pin = session.resolve(range, Perm::Read).await;
            pin.is_ok_and(|pin| pin.read(Iova::new(DIRECT), &mut [0]).is_ok())
        });
    }
}
