//! Many threads on one domain.

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::time::Duration;

use super::*;
use crate::coherent::CoherentSpec;

/// What is live according to the threads themselves, start to last.
#[derive(Default)]
struct Claims(Mutex<BTreeMap<Iova, Iova>>);

impl Claims {
    /// Called when a range has been given.
    fn take(&self, range: IovaRange) {
        let mut live = self.0.lock().unwrap();
        let before = live.range(..=range.last()).next_back();
        assert!(
            before.is_none_or(|(_, last)| *last < range.start()),
            "{range} is given while somebody holds a part of it"
        );
        live.insert(range.start(), range.last());
    }

    /// Called before a range is given back.
    fn leave(&self, range: IovaRange) {
        self.0.lock().unwrap().remove(&range.start());
    }
}

/// Runs `work` in one thread per session and checks the domain meanwhile.
fn side_by_side(domain: &Domain, sessions: u64, work: impl Fn(SessionId) + Sync) {
    std::thread::scope(|scope| {
        let work = &work;
        let workers: Vec<_> = (1..=sessions)
            .map(|number| scope.spawn(move || work(SessionId::new(number))))
            .collect();
        while workers.iter().any(|worker| !worker.is_finished()) {
            domain.check_invariants();
            // Not at once again: whoever spins on a lock starves the others.
            std::thread::sleep(Duration::from_micros(100));
        }
    });
}

/// One transfer each way with its own bytes; the shape varies with `round`.
fn transfer(domain: &Domain, session: SessionId, buffer: &Buffer, round: u64, claims: &Claims) {
    let (offset, len) = (round * 37 % P, round * 911 % (3 * P) + 1);
    let spec = MapSpec {
        keep_offset: round.is_multiple_of(2),
        ..buffer.spec(offset, len, Direction::Bidirectional)
    };
    // Different in every round and thread: bytes of another would show.
    let (sent, answer) = (
        pattern(len, session.get() * 31 + round),
        pattern(len, session.get() * 57 + round),
    );
    buffer.write(offset, &sent);
    let mapped = map(domain, session, spec).unwrap();
    claims.take(granules(visible(mapped)));

    assert!(seen(domain, visible(mapped)) == sent);
    device_writes(domain, mapped.iova, &answer);
    if round.is_multiple_of(3) {
        let request = part(mapped, 0, len.min(9), SyncTarget::ForCpu);
        sync(domain, session, request).unwrap();
    }

    claims.leave(granules(visible(mapped)));
    unmap(domain, session, ending(mapped)).unwrap();
    assert!(buffer.bytes(offset, len) == answer);
}

/// Zero when given, its own bytes as long as it is held.
fn allocate(domain: &Domain, session: SessionId, round: u64, claims: &Claims) {
    let len = round * 613 % (2 * P) + 1;
    let made = domain
        .alloc_coherent(session, &CoherentSpec::of(len))
        .unwrap();
    let whole = granules(made.range);
    claims.take(whole);
    assert!(seen(domain, whole).iter().all(|byte| *byte == 0));
    let mine = pattern(whole.len_bytes().unwrap(), session.get());
    device_writes(domain, whole.start(), &mine);
    std::thread::yield_now();
    assert!(seen(domain, whole) == mine);
    claims.leave(whole);
    domain.free_coherent(session, made.iova(), made.id).unwrap();
}

/// D13.
#[test]
fn drivers_side_by_side_never_share_a_range_or_a_byte() {
    let domain = empty_domain(64, 64, Scrub::OnMap);
    let claims = Claims::default();
    side_by_side(&domain, 4, |session| {
        domain.join(session, Role::Driver).unwrap();
        let buffer = Buffer::register(&domain, session, 4);
        for round in 0..200 {
            transfer(&domain, session, &buffer, round, &claims);
            allocate(&domain, session, round, &claims);
        }
        domain.unregister(session, buffer.id).unwrap();
        domain.leave(session);
    });
    assert_is_as_new(&domain);
}

#[test]
fn a_full_aperture_refuses_and_recovers_under_contention() {
    // 7 pages for 4 threads that hold up to 3 each.
    let domain = empty_domain(8, 0, Scrub::OnUnmap);
    side_by_side(&domain, 4, |session| {
        domain.join(session, Role::Driver).unwrap();
        let buffer = Buffer::register(&domain, session, 1);
        let spec = buffer.spec(0, P, Direction::ToDevice);
        let mode = BatchMode::AllOrNothing;
        for _ in 0..200 {
            let Ok(mapped) = domain.map(session, &[spec; 3], mode) else {
                continue;
            };
            let ends: Vec<_> = mapped.into_iter().map(|one| ending(one.unwrap())).collect();
            domain.unmap(session, &ends, mode).unwrap();
        }
        domain.leave(session);
    });
    assert_is_as_new(&domain);
}

/// Each session is ended by another thread in the middle of its work, while a
/// steady neighbour must not notice.
#[test]
fn a_session_that_is_ended_amid_its_work_leaves_nothing_behind() {
    let domain = empty_domain(64, 64, Scrub::OnMap);
    let steady = SessionId::new(1);
    domain.join(steady, Role::Driver).unwrap();
    let buffer = Buffer::register(&domain, steady, 4);
    let claims = Claims::default();
    side_by_side(&domain, 3, |thread| {
        if thread == steady {
            (0..300).for_each(|round| transfer(&domain, steady, &buffer, round, &claims));
            return;
        }
        for number in 1..=60 {
            let session = SessionId::new(thread.get() * 1000 + number);
            domain.join(session, Role::Driver).unwrap();
            std::thread::scope(|scope| {
                scope.spawn(|| work_until_ended(&domain, session));
                // Sometimes early, sometimes late: a round takes some 50 µs.
                std::thread::sleep(Duration::from_micros(number * 20));
                domain.leave(session);
            });
        }
    });
    domain.leave(steady);
    assert_is_as_new(&domain);
    assert_eq!(open_fds("amid-its-work"), 0);
}

/// Maps, syncs and unmaps, and leaves some mappings and allocations lying about.
fn work_until_ended(domain: &Domain, session: SessionId) {
    let fd = driver_memfd("amid-its-work", 16 * P).unwrap();
    let memory = ClientMemory::accept(fd, true).unwrap();
    let Ok(id) = domain.register(session, memory, false) else {
        return;
    };
    let spec = MapSpec::new(id, 1, 4 * P, Direction::Bidirectional);
    for round in 0.. {
        let mapped = match map(domain, session, spec) {
            Ok(mapped) => mapped,
            Err(MapError::Denied(Denied::SessionEnded { .. })) => return,
            Err(unexpected) => panic!("{unexpected}"),
        };
        // The session may end before or in any of these.
        let request = part(mapped, 0, 4 * P, SyncTarget::ForCpu);
        let _ = sync(domain, session, request);
        if round < 8 {
            let _ = domain.alloc_coherent(session, &CoherentSpec::of(1));
            let _ = map(
                domain,
                session,
                MapSpec {
                    len_bytes: 1,
                    ..spec
                },
            );
        }
        let _ = unmap(domain, session, ending(mapped));
    }
}

fn assert_is_as_new(domain: &Domain) {
    domain.check_invariants();
    let fresh = empty_domain(2, 0, Scrub::OnMap).usage();
    let usage = domain.usage();
    assert_eq!(
        (
            usage.sessions,
            usage.streaming,
            usage.coherent,
            usage.memories
        ),
        (
            fresh.sessions,
            fresh.streaming,
            fresh.coherent,
            fresh.memories
        )
    );
    assert_eq!(usage.bounce.used_bytes, 0);
    assert_eq!(usage.coherent_aperture.used_bytes, 0);
}
