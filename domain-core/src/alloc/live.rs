//! What is allocated, so that a free can be checked.
//!
//! Two bits a granule mark where allocations start and where they end, in pages
//! of 4,096 granules that exist only where something is allocated. A free then
//! touches one or two words, and a wrong length is found in five words at most,
//! because allocations longer than 256 granules are not marked: they stand in
//! an ordered map of (start, length), so that a long allocation costs neither
//! marks along its way nor a walk over them.
//!
//! An allocation of n granules costs n/4 bytes of marks, 64 at most; a longer
//! one about 30 bytes of the map.

use std::collections::BTreeMap;

/// Granules of the longest allocation that is marked.
const LONGEST_MARKED: u64 = 256;

/// Granules of a page, as a power of two.
const PAGE_SHIFT: u32 = 12;
const WORDS: usize = 1 << (PAGE_SHIFT - 6);

/// Pages that are found by their number; further up they are searched for. So
/// many cover 128 GiB of 4 KiB granules and cost 64 KiB, in use up to the last.
const NEAR_PAGES: u64 = 8192;

/// Marks of 64 granules.
#[derive(Clone, Copy, Debug, Default)]
struct Word {
    starts: u64,
    ends: u64,
}

#[derive(Debug)]
struct Page {
    /// Number of allocations that start or end here, each counted.
    marks: u32,
    words: [Word; WORDS],
}

/// Live allocations: first granule and number of granules.
#[derive(Debug)]
pub(super) struct Live {
    /// The page that `near` begins with.
    first_page: u64,
    near: Vec<Option<Box<Page>>>,
    far: BTreeMap<u64, Box<Page>>,
    /// An emptied page, kept so that a domain with a single allocation that
    /// comes and goes does not ask for memory each time.
    spare: Option<Box<Page>>,
    long: BTreeMap<u64, u64>,
    count: usize,
}

impl Live {
    /// Nothing is allocated; nothing will be below `first`.
    pub(super) fn new(first: u64) -> Live {
        Live {
            first_page: first >> PAGE_SHIFT,
            near: Vec::new(),
            far: BTreeMap::new(),
            spare: None,
            long: BTreeMap::new(),
            count: 0,
        }
    }

    pub(super) fn count(&self) -> usize {
        self.count
    }

    /// Length of the allocation that starts at `start`.
    pub(super) fn len_at(&self, start: u64) -> Option<u64> {
        match self.word(start) {
            Some(word) if word.starts & bit(start) != 0 => Some(self.marked_len(start)),
            _ => self.long.get(&start).copied(),
        }
    }

    /// The granules must be free.
    pub(super) fn insert(&mut self, start: u64, len: u64) {
        self.count += 1;
        if len > LONGEST_MARKED {
            self.long.insert(start, len);
            return;
        }
        let last = start + len - 1;
        let page = self.page_mut(start);
        page.words[word_of(start)].starts |= bit(start);
        if start >> PAGE_SHIFT == last >> PAGE_SHIFT {
            page.words[word_of(last)].ends |= bit(last);
            page.marks += 2;
            return;
        }
        page.marks += 1;
        let page = self.page_mut(last);
        page.words[word_of(last)].ends |= bit(last);
        page.marks += 1;
    }

    /// Forgets an allocation of exactly that length. `false` if there is none,
    /// and then nothing is changed.
    pub(super) fn remove(&mut self, start: u64, len: u64) -> bool {
        let last = start + len - 1;
        if len > LONGEST_MARKED || start >> PAGE_SHIFT != last >> PAGE_SHIFT {
            return self.remove_long(start, len);
        }
        let Some(page) = self.near_page_mut(start) else {
            return self.remove_long(start, len);
        };
        let (first_word, last_word) = (word_of(start), word_of(last));
        // End marks from `start` to `last`: there must be one, the last.
        let from_start = page.words[first_word].ends & (u64::MAX << (start % 64));
        let ends = |at: usize| match at == first_word {
            true => from_start,
            false => page.words[at].ends,
        };
        let early = (first_word..last_word).any(|at| ends(at) != 0);
        let in_last = ends(last_word);
        let is_start = page.words[first_word].starts & bit(start) != 0;
        if early || !is_start || in_last & in_last.wrapping_neg() != bit(last) {
            return false;
        }
        page.words[first_word].starts &= !bit(start);
        page.words[last_word].ends &= !bit(last);
        page.marks -= 2;
        if page.marks == 0 {
            self.give_back(start >> PAGE_SHIFT);
        }
        self.count -= 1;
        true
    }

    /// As [`remove`](Live::remove), for what lies in more than one page, far up
    /// or in the map.
    fn remove_long(&mut self, start: u64, len: u64) -> bool {
        if self.len_at(start) != Some(len) {
            return false;
        }
        self.count -= 1;
        if len > LONGEST_MARKED {
            self.long.remove(&start);
            return true;
        }
        let last = start + len - 1;
        self.clear(start, |word| word.starts &= !bit(start));
        self.clear(last, |word| word.ends &= !bit(last));
        true
    }

    fn near_page_mut(&mut self, granule: u64) -> Option<&mut Page> {
        let slot = self.near_slot(granule >> PAGE_SHIFT)?;
        self.near.get_mut(slot)?.as_deref_mut()
    }

    /// The allocation that a granule belongs to.
    pub(super) fn covering(&self, granule: u64) -> Option<(u64, u64)> {
        let long = self.long.range(..=granule).next_back();
        let marked = self.last_marked_start(granule);
        let start = marked.max(long.map(|(start, _)| *start))?;
        let len = self.len_at(start)?;
        (granule - start < len).then_some((start, len))
    }

    /// All of them in order of address.
    pub(super) fn iter(&self) -> impl Iterator<Item = (u64, u64)> {
        let mut marked = self
            .marked_starts()
            .map(|start| (start, self.marked_len(start)))
            .peekable();
        let mut long = self.long.iter().map(|(s, l)| (*s, *l)).peekable();
        std::iter::from_fn(move || match (marked.peek(), long.peek()) {
            (Some(marks), Some(run)) if run < marks => long.next(),
            (Some(_), _) => marked.next(),
            (None, _) => long.next(),
        })
    }

    /// Bytes of memory held beside the value itself; those of maps estimated
    /// from how full their nodes are on average.
    pub(super) fn heap_bytes(&self) -> usize {
        let near = self.near.iter().flatten().count();
        let pages = near + self.far.len() + usize::from(self.spare.is_some());
        pages * size_of::<Page>()
            + self.near.capacity() * size_of::<Option<Box<Page>>>()
            + (self.far.len() + self.long.len()) * 30
    }

    /// Checks that the marks are in pairs and all is counted.
    ///
    /// # Panics
    /// If not.
    pub(super) fn check_invariants(&self) {
        let near = self.near.iter().flatten();
        for page in near.chain(self.far.values()) {
            let bits = |word: &Word| word.starts.count_ones() + word.ends.count_ones();
            let marks: u32 = page.words.iter().map(bits).sum();
            assert_eq!(marks, page.marks, "marks are counted");
            assert!(marks > 0, "a page without marks is given back");
        }
        assert_eq!(self.iter().count(), self.count, "allocations are counted");
    }

    /// From a start mark to the first end mark.
    fn marked_len(&self, start: u64) -> u64 {
        let mut at = start;
        loop {
            let ends = self.word(at).map_or(0, |word| word.ends >> (at % 64));
            if ends != 0 {
                return at + u64::from(ends.trailing_zeros()) - start + 1;
            }
            at = (at | 63) + 1;
            assert!(at - start < LONGEST_MARKED, "every start has its end");
        }
    }

    fn last_marked_start(&self, granule: u64) -> Option<u64> {
        let mut at = granule;
        while granule - at < LONGEST_MARKED {
            let starts = self.word(at).map_or(0, |word| word.starts);
            let below = starts & (u64::MAX >> (63 - at % 64));
            if below != 0 {
                return Some((at | 63) - u64::from(below.leading_zeros()));
            }
            at = (at & !63).checked_sub(1)?;
        }
        None
    }

    fn marked_starts(&self) -> impl Iterator<Item = u64> {
        let near = (self.first_page..).zip(&self.near);
        let near = near.filter_map(|(number, page)| Some((number, page.as_ref()?)));
        let far = self.far.iter().map(|(number, page)| (*number, page));
        near.chain(far).flat_map(|(number, page)| {
            let words = (number << (PAGE_SHIFT - 6)..).zip(&page.words);
            words.flat_map(|(at, word)| bits(word.starts).map(move |bit| at * 64 + bit))
        })
    }

    fn word(&self, granule: u64) -> Option<&Word> {
        let number = granule >> PAGE_SHIFT;
        let page = match self.near_slot(number) {
            Some(slot) => self.near.get(slot)?.as_ref()?,
            None => self.far.get(&number)?,
        };
        Some(&page.words[word_of(granule)])
    }

    fn page_mut(&mut self, granule: u64) -> &mut Page {
        let number = granule >> PAGE_SHIFT;
        let spare = &mut self.spare;
        let fresh = || spare.take().unwrap_or_else(Page::empty);
        match Live::slot_in(self.first_page, number) {
            Some(slot) => {
                if slot >= self.near.len() {
                    self.near.resize_with(slot + 1, || None);
                }
                self.near[slot].get_or_insert_with(fresh)
            }
            None => self.far.entry(number).or_insert_with(fresh),
        }
    }

    fn clear(&mut self, granule: u64, mark: impl Fn(&mut Word)) {
        let page = self.page_mut(granule);
        mark(&mut page.words[word_of(granule)]);
        page.marks -= 1;
        if page.marks == 0 {
            self.give_back(granule >> PAGE_SHIFT);
        }
    }

    fn give_back(&mut self, number: u64) {
        self.spare = match self.near_slot(number) {
            Some(slot) => self.near[slot].take(),
            None => self.far.remove(&number),
        };
    }

    fn near_slot(&self, number: u64) -> Option<usize> {
        Live::slot_in(self.first_page, number)
    }

    fn slot_in(first_page: u64, number: u64) -> Option<usize> {
        let slot = number.checked_sub(first_page)?;
        usize::try_from(slot).ok().filter(|_| slot < NEAR_PAGES)
    }
}

impl Page {
    fn empty() -> Box<Page> {
        Box::new(Page {
            marks: 0,
            words: [Word::default(); WORDS],
        })
    }
}

fn bit(granule: u64) -> u64 {
    1 << (granule % 64)
}

fn word_of(granule: u64) -> usize {
    let word = (granule >> 6) % WORDS as u64;
    usize::try_from(word).expect("one of a page's words")
}

/// The set bits of a word, from the lowest up.
fn bits(mut word: u64) -> impl Iterator<Item = u64> {
    std::iter::from_fn(move || {
        let lowest = (word != 0).then(|| u64::from(word.trailing_zeros()))?;
        word &= word - 1;
        Some(lowest)
    })
}
