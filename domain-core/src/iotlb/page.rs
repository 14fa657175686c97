//! The session page: what a session's threads still hold, said without a call.
//!
//! A page of 64-bit words in native byte order, one for each session, written by both sides. The
//! service reads from it that a session has let go of what was removed, and need not ask.
//!
//! | word | |
//! |---|---|
//! | 0 | `"domsess\x01"` as a big-endian number, written by the service |
//! | 1 | 0 while the session lives; fenced: its last generation + 1. Written by the service, once |
//! | 2 | how many slots were ever used, at most [`SLOTS`]. Written by the client before it uses one |
//! | 3 | how many times the service took leases of this session away. Written by the service |
//! | 4 | 1: when the service takes leases of this session away, it asks by a frame, whatever is pinned. Written by the service, before the client has the page |
//! | 8 (i + 1) | slot i, in a cache line of its own. 0: not pinned; else the view + 1. One thread at a time writes it |
//!
//! # Why it is enough
//!
//! A reader stores its view and then walks; the service stores what it hides and then looks at the
//! slots. Between the two steps both have a `SeqCst` fence, so that one of them sees the other:
//! either the walk finds the entry gone, or the service finds the slot taken. A slot that holds a
//! view of the new generation has loaded that, and its walk finds the entry gone as well. And who
//! reads a slot after its owner went on sees all that the owner did with the old view as done,
//! because every store to a slot releases. That includes the one of the *next* view: it is the one
//! that the service reads if it never saw the slot empty.
//!
//! A reader looks at the fence word *after* its walk. What the service makes after it has fenced a
//! session is linked by a later store, with release: a walk that found it finds the fence word set,
//! and so a fenced session never reaches anything that is newer than its fence.
//!
//! Whoever writes into a lease without a walk, because it knows its place, reads the count of
//! revocations (word 3) while it is pinned, and writes only if that is still what it was when it was given the
//! lease. A service that takes a lease away stores the next count, then hides the entry, which publishes a generation,
//! and then looks at the slots, behind the same fence; a client stores its slot, and reads the count behind the other. So
//! either the client reads the new count and writes nothing, or the service finds the slot taken. If that holds
//! an older view, the service waits. If it holds the new one, its owner has loaded the new generation, and with
//! it the count that was stored before: had the count been stored after the entry was hidden, such a client would write
//! and nobody would wait for it. If word 4 says so the service does not look, but asks; then a pin that is there for leases alone
//! needs no fence, because only its own process looks ([`barrier`](super::barrier) argues it).
//!
//! # What the service believes
//!
//! Nothing. Whatever a client writes there changes but the answer of
//! [`SessionPage::holds_older_than`] for this client, and what it has itself counted in word 3.

use std::sync::atomic::Ordering::{self, Release, SeqCst};
#[cfg(not(all(loom, test)))]
use std::sync::atomic::fence;

#[cfg(all(loom, test))]
use ::loom::sync::atomic::fence;

use super::barrier::{Barrier, Registered, Unfenced};
use super::words::{HeapWords, LoadWord, WordSink, WordSource};
use crate::region::{
    Access, Backing, Grant, Region, RegionError, SharedCell, SharedCellsMut, SharedU64Mut,
    SharedWords,
};

/// Words of a session page. Few under loom, whose every word is a model.
pub const WORDS: usize = if cfg!(loom) { 12 } else { 512 };
/// Slots of a session page.
pub const SLOTS: usize = WORDS / SLOT_WORDS - 1;
/// Bytes of a session page.
pub const BYTES: u64 = 4096;

/// Words from one slot to the next: a cache line.
const SLOT_WORDS: usize = if cfg!(loom) { 4 } else { 8 };
const MAGIC_WORD: usize = 0;
const FENCE_WORD: usize = 1;
const MARK_WORD: usize = 2;
const REVOKED_WORD: usize = 3;
/// Under loom the first word of a slot, and not used: its models fence.
const ASKS_WORD: usize = 4;

/// Stands first in a session page. The last byte is the version of this format.
const MAGIC: u64 = u64::from_be_bytes(*b"domsess\x01");

/// A session page, from either side.
#[derive(Debug)]
pub struct SessionPage<W = HeapWords> {
    words: W,
}

/// Why words are not a session page that this code can use.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs)] // the messages are the docs
pub enum PageError {
    #[error("a session page begins with {MAGIC:#018x}, this with {found:#018x}")]
    Magic { found: u64 },
    #[error("{words} words cannot hold a session page, which has {WORDS}")]
    TooShort { words: usize },
}

/// Reading.
impl<W: WordSource> SessionPage<W> {
    /// Does any thread of the session hold a view older than `generation`?
    ///
    /// Asked after a removal was published as `generation`, and a barrier was run after that: `false`
    /// says that no thread of the session works with what it removed, nor ever will.
    #[must_use]
    pub fn holds_older_than(&self, generation: u64, barrier: &Barrier) -> bool {
        self.oldest(barrier).is_some_and(|view| view < generation)
    }

    /// The oldest view that a thread of the session holds; `None` while none is pinned. The barrier
    /// as for [`SessionPage::holds_older_than`].
    #[must_use]
    pub fn oldest(&self, _barrier: &Barrier) -> Option<u64> {
        self.oldest_seen()
    }

    /// Is a view older than `generation` to be seen, without a barrier? `true` is to be believed:
    /// it was held a moment ago. `false` says nothing.
    #[must_use]
    pub fn is_seen_older_than(&self, generation: u64) -> bool {
        self.oldest_seen().is_some_and(|view| view < generation)
    }

    /// Has the service given this session up? Asked after each walk: what a walk has found counts
    /// only if this is `false` afterwards.
    #[inline]
    #[must_use]
    pub fn is_fenced(&self) -> bool {
        self.load(FENCE_WORD) != 0
    }

    /// The last generation that a fenced session could see; `None` while it lives.
    #[must_use]
    pub fn fenced_at(&self) -> Option<u64> {
        self.load(FENCE_WORD).checked_sub(1)
    }

    /// How many times the service took leases of this session away. What a lease's owner knows of it
    /// counts only while this is what it was before it was given it, read under a pin.
    #[inline]
    #[must_use]
    pub fn revocations(&self) -> u64 {
        self.load(REVOKED_WORD)
    }

    /// The view in a slot, if it is pinned.
    ///
    /// # Panics
    /// If there is no such slot.
    #[inline]
    #[must_use]
    pub fn view(&self, slot: usize) -> Option<u64> {
        assert!(slot < SLOTS, "a session page has {SLOTS} slots");
        self.load(slot_word(slot)).checked_sub(1)
    }

    /// Does the service ask by a frame when it takes leases away?
    #[must_use]
    pub fn promises_to_ask(&self) -> bool {
        self.load(ASKS_WORD) == 1
    }

    fn oldest_seen(&self) -> Option<u64> {
        (0..self.used()).filter_map(|slot| self.view(slot)).min()
    }

    /// How many slots to look at, whatever the page says.
    fn used(&self) -> usize {
        let mark = usize::try_from(self.load(MARK_WORD));
        mark.unwrap_or(SLOTS).min(SLOTS)
    }

    /// Its words, for those who break its rules on purpose.
    #[cfg(all(loom, test))]
    pub(super) fn words(&self) -> &W {
        &self.words
    }

    #[inline]
    fn load(&self, index: usize) -> u64 {
        self.words.words()[index].load_acquire()
    }
}

/// The service's side.
impl<W: WordSink> SessionPage<W> {
    /// Makes a session page of words that are all zero.
    ///
    /// # Panics
    /// If there are fewer than [`WORDS`].
    #[must_use]
    pub fn format(words: W) -> SessionPage<W> {
        assert!(words.words().len() >= WORDS, "a session page has room");
        words.store(MAGIC_WORD, MAGIC, Release);
        SessionPage { words }
    }

    /// Says that the service asks by a frame when it takes leases away. Before anybody else has the page.
    pub fn promise_to_ask(&self) {
        self.words.store(ASKS_WORD, 1, Release);
    }

    /// Gives the session up, whose last generation is `generation`. What is published after this is
    /// out of its reach. Once is enough; the first time counts for readers.
    pub fn fence(&self, generation: u64) {
        self.words
            .store(FENCE_WORD, generation.saturating_add(1), Release);
    }
}

/// The service's side, where it reads as well.
impl<W: WordSink> SessionPage<W> {
    /// Says that leases of the session are taken away. They are hidden after this, and the slots are
    /// looked at after that. By one thread at a time.
    pub fn revoke(&self) {
        let count = self.load(REVOKED_WORD).wrapping_add(1);
        self.words.store(REVOKED_WORD, count, Release);
    }
}

/// The client's side.
impl<W: WordSink> SessionPage<W> {
    /// The page that the service has made, in words that can be written.
    ///
    /// # Errors
    /// [`PageError`] if it is none, or one of another version.
    pub fn open(words: W) -> Result<SessionPage<W>, PageError> {
        let all = words.words();
        if all.len() < WORDS {
            return Err(PageError::TooShort { words: all.len() });
        }
        match all[MAGIC_WORD].load_acquire() {
            MAGIC => Ok(SessionPage { words }),
            found => Err(PageError::Magic { found }),
        }
    }

    /// Slots below `slots` are going to be used. Never fewer than before, and by one thread at a
    /// time; whoever enters such a slot does so after this.
    pub fn announce(&self, slots: usize) {
        assert!(slots <= SLOTS, "a session page has {SLOTS} slots");
        self.words.store(MARK_WORD, slots as u64, Release);
    }

    /// Pins: from now on, and until it leaves the slot, this thread may work with what it finds in
    /// a table whose generation it has seen to be `view`.
    ///
    /// # Panics
    /// If there is no such slot.
    #[inline]
    pub fn enter(&self, slot: usize, view: u64) {
        self.hold(slot, view);
        // On x86 this is a locked `or` on our own stack. Measured: two thirds of what
        // exchanging the slot costs, as crossbeam-epoch does it there.
        fence(SeqCst);
    }

    /// As [`SessionPage::enter`], to work with nothing but leased memory.
    ///
    /// # Panics
    /// If there is no such slot.
    #[inline]
    pub fn enter_unfenced(&self, slot: usize, view: u64, unfenced: Unfenced) {
        self.hold(slot, view);
        unfenced.fence();
    }

    /// Need pins for leased memory have no fence in this process, which has registered? As long as it has the page.
    #[must_use]
    pub fn unfenced(&self, _process: Registered) -> Option<Unfenced> {
        self.promises_to_ask().then_some(Unfenced(()))
    }

    #[inline]
    fn hold(&self, slot: usize, view: u64) {
        assert!(slot < SLOTS, "a session page has {SLOTS} slots");
        // Releases: the service may never see the slot empty between two views, see above.
        self.words
            .store(slot_word(slot), view.saturating_add(1), Release);
    }

    /// Unpins: this thread is done with all that it found since it entered the slot.
    ///
    /// # Panics
    /// If there is no such slot.
    #[inline]
    pub fn leave(&self, slot: usize) {
        assert!(slot < SLOTS, "a session page has {SLOTS} slots");
        self.words.store(slot_word(slot), 0, Release);
    }
}

/// A slot of the client's page with all that a pin looks at, found once.
#[derive(Clone, Copy, Debug)]
pub struct OwnSlot<'p> {
    words: SharedCellsMut<'p, WORDS>,
    slot: SharedU64Mut<'p>,
}

impl SessionPage<SharedWords> {
    /// A slot of this thread; `None` if there is no such slot.
    #[inline(always)]
    #[must_use]
    pub fn own_slot(&self, slot: usize) -> Option<OwnSlot<'_>> {
        let words = self.words.first_cells_mut::<WORDS>()?;
        let slot = (slot < SLOTS).then(|| words.word_mut(slot_word(slot)))?;
        Some(OwnSlot { words, slot })
    }
}

impl OwnSlot<'_> {
    /// Does it hold a view?
    #[inline(always)]
    #[must_use]
    pub fn is_pinned(self) -> bool {
        // Nobody but this thread writes it.
        self.slot.load(Ordering::Relaxed) != 0
    }

    /// As [`SessionPage::enter`], or as [`SessionPage::enter_unfenced`].
    #[inline(always)]
    pub fn enter(self, view: u64, unfenced: Option<Unfenced>) {
        self.slot.store(view.saturating_add(1), Release);
        match unfenced {
            Some(unfenced) => unfenced.fence(),
            None => fence(SeqCst),
        }
    }

    /// As [`SessionPage::leave`].
    #[inline(always)]
    pub fn leave(self) {
        self.slot.store(0, Release);
    }

    /// As [`SessionPage::is_fenced`].
    #[inline(always)]
    #[must_use]
    pub fn is_fenced(self) -> bool {
        self.words.word_mut(FENCE_WORD).load(Ordering::Acquire) != 0
    }

    /// As [`SessionPage::revocations`].
    #[inline(always)]
    #[must_use]
    pub fn revocations(self) -> u64 {
        self.words.word_mut(REVOKED_WORD).load(Ordering::Acquire)
    }
}

/// The memory of a session page that the service makes.
#[derive(Debug)]
pub struct PageRegion(Region);

impl SessionPage<PageRegion> {
    /// Makes a session page in a memfd of its own. `name` shows in `/proc` only.
    ///
    /// # Errors
    /// [`RegionError`]; nothing is left behind.
    pub fn create(name: &str) -> Result<SessionPage<PageRegion>, RegionError> {
        let region = Region::create(name, BYTES, Backing::Memfd)?;
        Ok(SessionPage::format(PageRegion(region)))
    }

    /// Opens the page once more, for its session.
    ///
    /// # Errors
    /// [`RegionError::Reopen`], without `/proc` or without a free descriptor.
    pub fn grant(&self) -> Result<Grant, RegionError> {
        self.words.0.grant(Access::ReadWrite)
    }

    /// The memfd behind it.
    #[must_use]
    pub fn region(&self) -> &Region {
        &self.words.0
    }
}

impl PageRegion {
    fn word(&self, index: usize) -> SharedU64Mut<'_> {
        let word = self.0.memory().word64_mut(index as u64 * 8);
        word.expect("a session page stays inside its memory")
    }
}

impl WordSource for PageRegion {
    type Word = SharedCell;

    fn words(&self) -> &[SharedCell] {
        self.0.memory().cells().expect("a region is mapped whole")
    }
}

impl WordSink for PageRegion {
    fn store(&self, index: usize, value: u64, order: Ordering) {
        self.word(index).store(value, order);
    }
}

/// Which word a slot is.
pub(super) const fn slot_word(slot: usize) -> usize {
    (slot + 1) * SLOT_WORDS
}

#[cfg(all(test, not(loom)))]
mod tests {
    use std::os::fd::AsFd;

    use super::*;
    use crate::region::SharedMemory;

    fn heap() -> SessionPage {
        SessionPage::format(HeapWords::new(WORDS))
    }

    fn barrier() -> Barrier {
        Barrier::run()
    }

    fn oldest<W: WordSource>(page: &SessionPage<W>) -> Option<u64> {
        page.oldest(&barrier())
    }

    /// The service's page and what its session makes of the grant.
    fn shared() -> (SessionPage<PageRegion>, SessionPage<SharedWords>) {
        let service = SessionPage::create("session-page").unwrap();
        let grant = service.grant().unwrap();
        let mut memory = SharedMemory::reserve(BYTES, BYTES).unwrap();
        memory
            .map_at(0, BYTES, grant.as_fd(), Access::ReadWrite)
            .unwrap();
        let words = memory.into_words(Access::ReadWrite).unwrap();
        (service, SessionPage::open(words).unwrap())
    }

    #[test]
    fn the_layout_is_what_the_protocol_says() {
        let page = heap();
        page.announce(SLOTS);
        page.enter(0, 4);
        page.enter(62, 9);
        page.fence(20);
        page.revoke();
        page.revoke();

        let words = page.words.words();
        let word = |index: usize| words[index].load_acquire();
        assert_eq!(word(0).to_be_bytes(), *b"domsess\x01");
        assert_eq!((word(1), word(2), word(3)), (21, 63, 2));
        assert_eq!((word(8), word(504)), (5, 10));
        let set = words.iter().filter(|word| word.load_acquire() != 0);
        assert_eq!(set.count(), 6);
    }

    #[test]
    fn views_are_held_from_entering_to_leaving_and_the_oldest_counts() {
        let (service, client) = shared();
        client.announce(3);
        assert_eq!(oldest(&service), None);

        client.enter(0, 7);
        client.enter(2, 5);
        assert_eq!((oldest(&service), oldest(&client)), (Some(5), Some(5)));
        assert!(service.holds_older_than(6, &barrier()));
        assert!(!service.holds_older_than(5, &barrier()));

        client.leave(2);
        assert_eq!(oldest(&service), Some(7));
        client.leave(0);
        assert!(!service.holds_older_than(u64::MAX, &barrier()));
    }

    #[test]
    fn the_view_of_generation_0_is_a_view() {
        let page = heap();
        page.announce(1);
        page.enter(0, 0);

        assert_eq!(oldest(&page), Some(0));
        assert!(page.holds_older_than(1, &barrier()) && !page.holds_older_than(0, &barrier()));
    }

    #[test]
    fn fences_are_needed_unless_both_sides_say_otherwise() {
        let (service, client) = shared();
        let Some(registered) = Registered::register() else {
            return;
        };
        assert!(client.unfenced(registered).is_none(), "nothing is promised");

        service.promise_to_ask();

        assert!(client.unfenced(registered).is_some());
        let word = service.words.words()[4].load_acquire();
        assert_eq!(word, 1, "the protocol's word");
    }

    #[test]
    fn a_pin_without_a_fence_is_a_pin() {
        let (service, client) = shared();
        let Some(registered) = Registered::register() else {
            return;
        };
        service.promise_to_ask();
        let unfenced = client.unfenced(registered).unwrap();
        client.announce(1);

        client.enter_unfenced(0, 7, unfenced);

        assert_eq!(oldest(&service), Some(7));
        assert!(service.is_seen_older_than(8) && !service.is_seen_older_than(7));
    }

    #[test]
    fn a_fence_reaches_the_client() {
        let (service, client) = shared();
        assert!(!client.is_fenced());

        service.fence(0);

        assert!(client.is_fenced());
        assert_eq!(client.fenced_at(), Some(0));
    }

    #[test]
    fn a_revocation_reaches_the_client_each_time() {
        let (service, client) = shared();
        assert_eq!(client.revocations(), 0);

        service.revoke();
        assert_eq!(client.revocations(), 1);
        service.revoke();
        assert_eq!((client.revocations(), service.revocations()), (2, 2));
        assert!(!client.is_fenced() && oldest(&client).is_none());
    }

    #[test]
    fn what_is_no_session_page_is_refused() {
        let short = SessionPage::open(HeapWords::new(WORDS - 1));
        let zeroes = SessionPage::open(HeapWords::new(WORDS));

        assert_eq!(short.unwrap_err(), PageError::TooShort { words: 511 });
        assert_eq!(zeroes.unwrap_err(), PageError::Magic { found: 0 });
    }

    /// The client owns every word of it. All it can change is what it is believed to hold.
    #[test]
    fn a_page_full_of_garbage_harms_nobody() {
        for garbage in [1, 63, 64, 1 << 40, u64::MAX] {
            let page = heap();
            for index in 0..WORDS {
                page.words.store(index, garbage, Release);
            }
            assert_eq!(oldest(&page), Some(garbage - 1));
            assert!(page.holds_older_than(u64::MAX, &barrier()));
        }
        let page = heap();
        page.words.store(MARK_WORD, u64::MAX, Release);
        assert!(!page.holds_older_than(u64::MAX, &barrier()));
    }

    #[test]
    fn slots_above_the_mark_are_not_looked_at() {
        let page = heap();
        page.announce(1);
        page.enter(1, 3);
        assert_eq!(oldest(&page), None);

        page.announce(2);
        assert_eq!(oldest(&page), Some(3));
    }
}
