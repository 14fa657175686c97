//! Registered memory, and what becomes of fds.

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

use super::*;
use crate::memory::{MemoryMissing, MemoryView, UnregisterError};

fn accepted(name: &str) -> ClientMemory {
    ClientMemory::accept(driver_memfd(name, P).unwrap(), true).unwrap()
}

#[test]
fn memory_in_use_stays_and_says_by_how_many() {
    let domain = domain(8, 0);
    let buffer = Buffer::register(&domain, DRIVER, 1);
    let spec = buffer.spec(0, 1, Direction::ToDevice);
    let mapped = [0, 1].map(|_| map(&domain, DRIVER, spec).unwrap());

    for (ended, mappings) in mapped.into_iter().zip([2, 1]) {
        let id = buffer.id;
        assert_eq!(
            domain.unregister(DRIVER, id),
            Err(UnregisterError::InUse {
                id,
                mappings,
                direct: 0
            })
        );
        assert_eq!(domain.memories(MemoryId::new(0), 9)[0].mappings, mappings);
        unmap(&domain, DRIVER, ending(ended)).unwrap();
    }
    domain.unregister(DRIVER, buffer.id).unwrap();
    assert_eq!(domain.holdings(DRIVER).unwrap().memories, 0);
    domain.check_invariants();
}

#[test]
fn a_refused_map_does_not_keep_memory_in_use() {
    let domain = domain(4, 0);
    let buffer = Buffer::register(&domain, DRIVER, 8);
    let fits = buffer.spec(0, P, Direction::ToDevice);
    let too_large = buffer.spec(0, 8 * P, Direction::ToDevice);

    let batch = [fits, fits, too_large];
    domain
        .map(DRIVER, &batch, BatchMode::AllOrNothing)
        .unwrap_err();

    domain.unregister(DRIVER, buffer.id).unwrap();
}

#[test]
fn memory_of_others_and_unknown_memory_cannot_be_unregistered_or_mapped() {
    let domain = domain(8, 0);
    let buffer = Buffer::register(&domain, DRIVER, 1);
    let gone = Buffer::register(&domain, OTHER, 1);
    domain.unregister(OTHER, gone.id).unwrap();

    for (id, missing) in [
        (buffer.id, MemoryMissing::NotYours { id: buffer.id }),
        (gone.id, MemoryMissing::NoSuchMemory { id: gone.id }),
        (
            MemoryId::new(99),
            MemoryMissing::NoSuchMemory {
                id: MemoryId::new(99),
            },
        ),
    ] {
        assert_eq!(
            domain.unregister(OTHER, id),
            Err(UnregisterError::Missing(missing))
        );
        let spec = MapSpec::new(id, 0, 1, Direction::ToDevice);
        let refused = map(&domain, OTHER, spec).unwrap_err();
        assert!(
            matches!(refused, MapError::Memory(m) if m == missing),
            "{refused}"
        );
    }
    assert_eq!(domain.usage().memories, 1);
}

#[test]
fn the_id_of_a_memory_is_never_used_for_another() {
    let domain = domain(8, 0);
    let mut seen = std::collections::BTreeSet::new();
    for _ in 0..10 {
        let buffer = Buffer::register(&domain, DRIVER, 1);
        assert!(seen.insert(buffer.id));
        domain.unregister(DRIVER, buffer.id).unwrap();
    }
}

#[test]
fn memories_are_listed_by_id_with_their_owners() {
    let domain = domain(8, 0);
    let first = Buffer::register(&domain, DRIVER, 1);
    let second = Buffer::register(&domain, OTHER, 2);
    let view = |id, owner, pages| MemoryView {
        id,
        owner: Some(owner),
        size_bytes: pages * P,
        writable: true,
        hugetlb: false,
        mappings: 0,
        direct: 0,
    };
    let views = [view(first.id, DRIVER, 1), view(second.id, OTHER, 2)];

    assert_eq!(domain.memories(MemoryId::new(0), 9), views);
    assert_eq!(domain.memories(MemoryId::new(0), 1), views[..1]);
    assert_eq!(domain.memories(second.id, 9), views[1..]);
}

#[test]
fn unregistering_closes_the_fd() {
    let domain = domain(8, 0);
    let id = domain
        .register(DRIVER, accepted("unregister-closes"), false)
        .unwrap();
    assert_eq!(open_fds("unregister-closes"), 1);

    domain.unregister(DRIVER, id).unwrap();

    assert_eq!(open_fds("unregister-closes"), 0);
}

#[test]
fn leaving_closes_the_fds_even_of_memory_in_use() {
    let domain = domain(8, 0);
    let id = domain
        .register(DRIVER, accepted("leave-closes"), false)
        .unwrap();
    domain
        .register(DRIVER, accepted("leave-closes"), false)
        .unwrap();
    let spec = MapSpec::new(id, 0, P, Direction::Bidirectional);
    map(&domain, DRIVER, spec).unwrap();
    assert_eq!(open_fds("leave-closes"), 2);

    domain.leave(DRIVER);

    assert_eq!(open_fds("leave-closes"), 0);
}

#[test]
fn memory_that_a_device_or_stranger_registers_is_closed() {
    let domain = domain(8, 0);
    for session in [DEVICE, SessionId::new(99)] {
        assert!(
            domain
                .register(session, accepted("refused-closes"), false)
                .is_err()
        );
        assert_eq!(open_fds("refused-closes"), 0);
    }
}

#[test]
fn dropping_a_domain_closes_its_regions_and_all_registered_memory() {
    let layout = LayoutSpec {
        bounce_bytes: 4 * P,
        coherent_bytes: 4 * P,
        ..LayoutSpec::default()
    };
    let layout = layout.plan().unwrap();
    let domain = Domain::create("dropped", layout, Settings::default(), ScrubWith::Zero).unwrap();
    domain.join(DRIVER, Role::Driver).unwrap();
    domain
        .register(DRIVER, accepted("drop-closes"), false)
        .unwrap();
    let names = [
        "domaind:dropped:bounce",
        "domaind:dropped:coherent",
        "drop-closes",
    ];
    assert_eq!(names.map(open_fds), [1, 1, 1]);

    drop(domain);

    assert_eq!(names.map(open_fds), [0, 0, 0]);
}

/// The second region has the longer name: 251 bytes, where a memfd may have 249.
#[test]
fn a_domain_whose_second_region_cannot_be_made_leaves_nothing_of_the_first() {
    let name = "x".repeat(249 - "domaind::bounce".len());
    let layout = LayoutSpec {
        bounce_bytes: 4 * P,
        coherent_bytes: 4 * P,
        ..LayoutSpec::default()
    };
    let layout = layout.plan().unwrap();

    let refused = Domain::create(&name, layout, Settings::default(), ScrubWith::Zero);

    assert!(refused.is_err());
    let first = format!("domaind:{name}:bounce");
    assert_eq!(open_fds(&first), 0);
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    assert!(!maps.contains(&first));
}

/// Two registrations of one file, in one domain and in another.
#[test]
fn the_same_memory_may_be_registered_many_times_and_aliases() {
    let (here, there) = (domain(8, 0), domain(8, 0));
    let buffer = Buffer::register(&here, DRIVER, 1);
    let again = |domain: &Domain, session| {
        let fd = OwnedFd::from(buffer.file.try_clone().unwrap());
        let memory = ClientMemory::accept(fd, true).unwrap();
        domain.register(session, memory, false).unwrap()
    };
    let ids = [again(&here, OTHER), again(&there, DRIVER)];

    for (domain, session, id) in [(&here, OTHER, ids[0]), (&there, DRIVER, ids[1])] {
        let spec = MapSpec::new(id, 5, 100, Direction::Bidirectional);
        let mapped = map(domain, session, spec).unwrap();
        device_writes(domain, mapped.iova, &pattern(100, id.get() + 5));
        unmap(domain, session, ending(mapped)).unwrap();
        assert_eq!(buffer.bytes(5, 100), pattern(100, id.get() + 5));
    }
    here.unregister(DRIVER, buffer.id).unwrap();
    assert!(here.memories(ids[0], 1)[0].id == ids[0]);
}

/// Sparse: no huge page is needed to have a hugetlb file.
#[test]
fn memory_on_huge_pages_is_registered_but_not_bounced() {
    let flags = MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB | MemfdFlags::ALLOW_SEALING;
    let Ok(fd) = memfd_create("huge", flags | MemfdFlags::CLOEXEC) else {
        return; // no such pages in this kernel
    };
    ftruncate(&fd, 2 << 20).unwrap();
    fcntl_add_seals(&fd, SealFlags::SHRINK).unwrap();
    let domain = domain(8, 0);
    let memory = ClientMemory::accept(fd, true).unwrap();
    let id = domain.register(DRIVER, memory, false).unwrap();
    let before = table(&domain);

    for direction in DIRECTIONS {
        let refused = map(&domain, DRIVER, MapSpec::new(id, 0, P, direction)).unwrap_err();
        assert!(
            matches!(refused, MapError::HugetlbMemory { id: huge } if huge == id),
            "{refused}"
        );
    }
    assert_eq!(table(&domain), before);
    assert!(domain.memories(id, 1)[0].hugetlb);
}
