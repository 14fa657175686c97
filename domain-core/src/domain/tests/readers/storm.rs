//! Threads that change a domain beside threads that translate without asking it,
//! and are fenced in the middle of it.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use super::*;
use crate::iotlb::page::WORDS;
use crate::iotlb::{Barrier, HeapWords, RegionWords, SessionPage, Walker};

const DRIVERS: u64 = 3;
const READERS: usize = 2;
/// What each driver does.
const STEPS: u64 = 2_000;
/// How often somebody is fenced, or comes and goes.
const BLOWS: u64 = 600;
/// Pages of the coherent aperture.
const COHERENT_PAGES: u64 = 24;
/// Pages of a driver's memory and of its window.
const WINDOW_PAGES: u64 = 8;

/// A pseudo-random number below `below`: an xorshift, of which each thread has its
/// own.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, below: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % below
    }
}

/// What a reader has found and may use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Token {
    /// Coherent memory, by what its owner has written there.
    Colour(u64),
    /// Registered memory, by the page that led there.
    Direct(u64, MemoryId),
}

/// A session with a session page, as the daemon has it.
#[derive(Debug)]
struct Paged {
    page: SessionPage,
    asked: AtomicU64,
}

impl Reader for Paged {
    fn by_frames(&self) -> bool {
        false
    }

    fn holds_older_than(&self, generation: u64, barrier: &Barrier) -> bool {
        self.page.holds_older_than(generation, barrier)
    }

    fn ask(&self, generation: u64) {
        self.asked.fetch_max(generation, Ordering::SeqCst);
    }

    fn fence(&self, generation: u64) {
        self.page.fence(generation);
    }

    fn revoke(&self) {
        self.page.revoke();
    }
}

struct Storm {
    domain: Domain,
    walker: Walker<Arc<RegionWords>>,
    /// Whose memory is which.
    owners: Mutex<BTreeMap<MemoryId, u64>>,
    /// What the readers may use.
    held: [Mutex<Vec<Token>>; READERS],
    /// Their sessions.
    reading: [AtomicU64; READERS],
    next_session: AtomicU64,
    next_colour: AtomicU64,
    /// Drivers and the other one at work.
    busy: AtomicUsize,
    is_over: AtomicBool,
    /// So that what is shown is not shown by nothing: what readers found, and
    /// removals that came to their end while it was looked at.
    found: AtomicU64,
    done: AtomicU64,
}

impl Storm {
    fn new() -> Storm {
        let domain = empty_domain(2, COHERENT_PAGES, Scrub::OnMap);
        Storm {
            walker: domain.walker(),
            domain,
            owners: Mutex::default(),
            held: Default::default(),
            reading: Default::default(),
            next_session: AtomicU64::new(100),
            next_colour: AtomicU64::new(1),
            busy: AtomicUsize::new(0),
            is_over: AtomicBool::new(false),
            found: AtomicU64::new(0),
            done: AtomicU64::new(0),
        }
    }

    fn new_session(&self) -> SessionId {
        SessionId::new(self.next_session.fetch_add(1, Ordering::Relaxed))
    }

    /// If a removal comes to its end soon, nobody may use any of this.
    fn expect_unused(&self, removal: Removal, is_gone: impl Fn(Token) -> bool) {
        for _ in 0..50 {
            if self.domain.progress(removal) != Progress::Done {
                std::thread::yield_now();
                continue;
            }
            for held in &self.held {
                let held = held.lock().unwrap();
                let used = held.iter().find(|token| is_gone(**token));
                assert_eq!(used, None, "{removal:?} is done");
            }
            self.done.fetch_add(1, Ordering::Relaxed);
            return;
        }
    }

    fn coherent_word(&self, offset: u64) -> u64 {
        let memory = self.domain.aperture(ApertureKind::Coherent).unwrap();
        let word = memory.memory().word64(offset).unwrap();
        word.load(Ordering::Acquire)
    }
}

/// A driver at work: what it holds, and how it was dealt.
struct Driver<'s> {
    storm: &'s Storm,
    number: u64,
    session: SessionId,
    dice: Dice,
    buffer: Buffer,
    allocated: Vec<(Allocated, u64)>,
}

impl Driver<'_> {
    fn work(storm: &Storm, number: u64) {
        let session = SessionId::new(number + 1);
        storm.domain.join(session, Role::Driver).unwrap();
        let mut driver = Driver {
            storm,
            number,
            session,
            dice: Dice(0x9e37_79b9 + number),
            buffer: Driver::register(storm, number, session),
            allocated: Vec::new(),
        };
        for _ in 0..STEPS {
            match driver.dice.roll(16) {
                0..4 => driver.alloc(),
                4..8 => driver.free(),
                8..11 => driver.map(),
                11..13 => driver.unmap(),
                13..15 => driver.set_map(),
                _ => driver.move_out(),
            }
        }
        while !driver.allocated.is_empty() {
            driver.free();
        }
        driver.clear();
        storm.domain.unregister(session, driver.buffer.id).unwrap();
        storm.domain.leave(session);
    }

    /// Shared: anybody may set the whole table.
    fn register(storm: &Storm, number: u64, session: SessionId) -> Buffer {
        // Nobody finds it before its owner is known.
        let mut owners = storm.owners.lock().unwrap();
        let buffer = Buffer::persistent(&storm.domain, session, WINDOW_PAGES);
        owners.insert(buffer.id, number);
        buffer
    }

    fn window(&self) -> IovaRange {
        window(self.number)
    }

    fn alloc(&mut self) {
        let domain = &self.storm.domain;
        let pages = 1 + self.dice.roll(2);
        // What is gone and waits may be in the way.
        let Ok(made) = domain.alloc_coherent(self.session, &CoherentSpec::of(pages * P)) else {
            return;
        };
        let colour = self.storm.next_colour.fetch_add(1, Ordering::Relaxed);
        let aperture = domain.aperture(ApertureKind::Coherent).unwrap();
        let start = made.range.start().offset_from(aperture.range().start());
        for page in 0..pages {
            let word = aperture.memory().word64_mut(start.unwrap() + page * P);
            let word = word.unwrap();
            assert_eq!(word.load(Ordering::Acquire), 0, "it was zeroed");
            word.store(colour, Ordering::Release);
        }
        self.allocated.push((made, colour));
    }

    fn free(&mut self) {
        if self.allocated.is_empty() {
            return;
        }
        let which = self.dice.roll(self.allocated.len() as u64);
        let (made, colour) = self.allocated.swap_remove(size(which));
        let freed = self
            .storm
            .domain
            .free_coherent(self.session, made.iova(), made.id);
        let is_gone = |token| token == Token::Colour(colour);
        self.storm.expect_unused(freed.unwrap(), is_gone);
    }

    fn map(&mut self) {
        let first = self.dice.roll(WINDOW_PAGES);
        let count = 1 + self.dice.roll(WINDOW_PAGES - first);
        let at = self.window().start().get() + first * P;
        // It overlaps what is there, or what is gone and waits.
        let _ = map_direct(
            &self.storm.domain,
            Actor::Session(self.session),
            self.buffer.at(at, count),
        );
    }

    fn unmap(&mut self) {
        let first = self.window().start().get() / P + self.dice.roll(WINDOW_PAGES);
        self.clear_pages(pages(first, first));
    }

    fn clear(&mut self) {
        self.clear_pages(self.window());
    }

    fn clear_pages(&self, range: IovaRange) {
        let actor = Actor::Session(self.session);
        let live = direct_live(&self.storm.domain);
        let doomed = live.iter().filter(|entry| entry.range.overlaps(range));
        let doomed: Vec<_> = doomed.map(|entry| entry.range).collect();
        let cleared = self.storm.domain.clear_map(actor, &[range]);
        let (_, removal) = cleared.unwrap();
        let is_gone = |token| match token {
            Token::Direct(page, _) => doomed.iter().any(|at| at.overlaps(pages(page, page))),
            Token::Colour(_) => false,
        };
        self.storm.expect_unused(removal, is_gone);
    }

    /// The table as it is, with one of the own mappings cut, moved, or left out.
    fn set_map(&mut self) {
        let domain = &self.storm.domain;
        let generation = domain.generation();
        let mut table = direct_live(domain);
        let window = self.window();
        let own = table.iter().position(|entry| window.contains(entry.range));
        let Some(at) = own else {
            return;
        };
        let entry = table[at];
        let first = pages(entry.range.start().get() / P, entry.range.start().get() / P);
        match self.dice.roll(4) {
            0 => drop(table.remove(at)),
            1 => table[at].range = first,
            2 => table[at].offset = (entry.offset + P) % (4 * P),
            _ => table[at].perm = Perm::Read,
        }
        // Another one may have been faster.
        let _ = domain.set_map(Actor::Owner, &table, Some(generation));
    }

    /// Another memory in place of the own one; it may get its number.
    fn move_out(&mut self) {
        self.clear();
        let unregistered = self.storm.domain.unregister(self.session, self.buffer.id);
        unregistered.unwrap();
        self.buffer = Driver::register(self.storm, self.number, self.session);
    }
}

/// Where the direct mappings of a driver lie.
fn window(number: u64) -> IovaRange {
    let first = 1000 * (number + 1);
    pages(first, first + WINDOW_PAGES - 1)
}

fn direct_live(domain: &Domain) -> Vec<DirectMapping> {
    let filter = MappingFilter {
        kind: Some(MappingKind::Direct),
        ..MappingFilter::default()
    };
    let listed = domain.mappings(filter, Iova::new(0), usize::MAX);
    let live = listed.iter().filter(|view| view.phase == Phase::Live);
    let entry = |view: &MappingView| {
        let source = view.source().unwrap();
        DirectMapping {
            range: view.visible,
            memory: source.memory,
            offset: source.offset,
            perm: view.perm,
        }
    };
    live.map(entry).collect()
}

/// One life of a reader, until it is fenced or all is over.
fn read(storm: &Storm, which: usize, dice: &mut Dice) {
    let session = storm.new_session();
    let paged = Arc::new(Paged {
        page: SessionPage::format(HeapWords::new(WORDS)),
        asked: AtomicU64::new(0),
    });
    paged.page.announce(1);
    let joining = Joining {
        role: Role::Device,
        account: Account(u32::try_from(which).unwrap()),
        reader: Some(Arc::clone(&paged) as Arc<dyn Reader>),
    };
    let mut acked = storm.domain.join(session, joining).unwrap();
    storm.reading[which].store(session.get(), Ordering::Relaxed);
    while !paged.page.is_fenced() && !storm.is_over.load(Ordering::Relaxed) {
        // Some views are old when they are pinned.
        let view = storm.walker.generation();
        paged.page.enter(0, view);
        let found: Vec<_> = (0..1 + dice.roll(4))
            .filter_map(|_| look(storm, which, session, &paged.page, dice))
            .collect();
        for _ in 0..dice.roll(20) {
            found.iter().for_each(|found| found.check(storm));
            std::thread::yield_now();
        }
        // A ghost does not know yet that it is one.
        for _ in 0..30 * u64::from(paged.page.is_fenced()) {
            found.iter().for_each(|found| found.check(storm));
            std::thread::sleep(Duration::from_micros(100));
        }
        found.iter().for_each(|found| found.check(storm));
        storm.held[which].lock().unwrap().clear();
        paged.page.leave(0);
        let asked = paged.asked.load(Ordering::SeqCst);
        if asked > acked && dice.roll(3) > 0 {
            storm.domain.acknowledge(session, asked).unwrap();
            acked = asked;
        }
    }
    // A ghost may still say that it holds nothing, before it is found gone.
    if dice.roll(2) == 0 {
        let generation = storm.domain.generation();
        storm.domain.acknowledge(session, generation).unwrap();
    }
    storm.domain.leave(session);
}

/// A place that a reader may use, and what it found there.
struct Found {
    /// Of coherent memory; `None` for registered memory, which does not change.
    offset: Option<u64>,
    colour: AtomicU64,
    which: usize,
}

impl Found {
    /// What is used by nobody else says the same, from when it is first said.
    fn check(&self, storm: &Storm) {
        let Some(offset) = self.offset else {
            return;
        };
        let (before, now) = (
            self.colour.load(Ordering::Relaxed),
            storm.coherent_word(offset),
        );
        if before == 0 && now != 0 {
            self.colour.store(now, Ordering::Relaxed);
            storm.held[self.which]
                .lock()
                .unwrap()
                .push(Token::Colour(now));
        } else {
            assert_eq!(now, before, "it is used again while somebody is pinned");
        }
    }
}

/// Walks the table to some address, and fetches the memory behind it.
fn look(
    storm: &Storm,
    which: usize,
    session: SessionId,
    page: &SessionPage,
    dice: &mut Dice,
) -> Option<Found> {
    let coherent = storm.domain.aperture(ApertureKind::Coherent).unwrap();
    let owner = dice.roll(DRIVERS);
    let start = match dice.roll(2) {
        0 => coherent.range().start().get() + dice.roll(COHERENT_PAGES) * P,
        _ => window(owner).start().get() + dice.roll(WINDOW_PAGES) * P,
    };
    let hit = storm.walker.translate(Iova::new(start))?;
    if page.is_fenced() {
        return None;
    }
    let mut found = Found {
        offset: None,
        colour: AtomicU64::new(0),
        which,
    };
    if hit.target.region == RegionId::COHERENT {
        found.offset = Some(hit.target.offset_bytes);
        found.check(storm);
    } else {
        // Unless it is gone meanwhile, or the session.
        let (id, _) = storm.domain.open_memory(session, hit.target.region).ok()?;
        let owners = storm.owners.lock().unwrap();
        assert_eq!(owners.get(&id), Some(&owner), "{hit:?} at {start:#x}");
        let token = Token::Direct(start / P, id);
        storm.held[which].lock().unwrap().push(token);
    }
    storm.found.fetch_add(1, Ordering::Relaxed);
    Some(found)
}

/// Fences readers, and lets others come and go that never translate, and
/// acknowledge late or never.
fn blow(storm: &Storm) {
    let domain = &storm.domain;
    let mut dice = Dice(0xda44_2d24);
    let mut others: Vec<SessionId> = Vec::new();
    for _ in 0..BLOWS {
        match dice.roll(6) {
            0..3 => {
                let which = size(dice.roll(READERS as u64));
                let session = storm.reading[which].load(Ordering::Relaxed);
                domain.fence(SessionId::new(session));
            }
            3 if others.len() < 3 => {
                let session = storm.new_session();
                let joining = reading(Role::Device, 7, &Fake::frames());
                domain.join(session, joining).unwrap();
                others.push(session);
            }
            4 if !others.is_empty() => {
                let which = size(dice.roll(others.len() as u64));
                match dice.roll(2) {
                    0 => domain.leave(others.swap_remove(which)),
                    _ => domain.fence(others[which]),
                }
            }
            _ => {
                let generation = domain.generation();
                let ack = |session: &SessionId| domain.acknowledge(*session, generation);
                others.iter().for_each(|session| ack(session).unwrap());
                domain.check_invariants();
            }
        }
        std::thread::sleep(Duration::from_micros(300));
    }
    others.into_iter().for_each(|session| domain.leave(session));
}

#[test]
fn whoever_translates_under_a_pin_keeps_what_it_found_until_it_unpins() {
    let storm = Storm::new();
    storm.busy.store(size(DRIVERS) + 1, Ordering::Relaxed);
    std::thread::scope(|scope| {
        let storm = &storm;
        for which in 0..READERS {
            scope.spawn(move || {
                let mut dice = Dice(0x51_7cc1 + which as u64);
                while !storm.is_over.load(Ordering::Relaxed) {
                    read(storm, which, &mut dice);
                }
            });
        }
        let mut workers: Vec<_> = (0..DRIVERS)
            .map(|number| scope.spawn(move || Driver::work(storm, number)))
            .collect();
        workers.push(scope.spawn(|| blow(storm)));
        // Also when one of them has failed: the readers must come to their end.
        let outcomes: Vec<_> = workers.into_iter().map(|worker| worker.join()).collect();
        storm.is_over.store(true, Ordering::Relaxed);
        outcomes.into_iter().for_each(|outcome| outcome.unwrap());
    });

    let Storm { domain, .. } = &storm;
    domain.check_invariants();
    let usage = domain.usage();
    assert_eq!(limbo(domain), []);
    assert_eq!((usage.invalidating, usage.quarantined.mappings), (0, 0));
    assert_eq!((usage.sessions, usage.fenced), (0, 0));
    assert_eq!((usage.memories, usage.direct), (0, 0));
    assert_eq!(usage.coherent_aperture.used_bytes, 0);
    let state = domain.look();
    assert_eq!(state.limbo.direct_records(), 0);
    assert_eq!(state.known_memories(), 0);
    assert_eq!(state.made.iter().count(), 0);
    assert_eq!(state.iotlb.table_usage().retired, 0);
    let counts = [&storm.found, &storm.done].map(|count| count.load(Ordering::Relaxed));
    assert!(counts.iter().all(|count| *count > 0), "{counts:?}");
}
