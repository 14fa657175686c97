//! Nodes of the page table that wait for an acknowledgment, and are needed.

use std::sync::atomic::{AtomicU64, Ordering};

use super::*;
use crate::coherent::AllocCoherentError as Refused;
use crate::iotlb::{Allowance, NoRoom, TableUsage};

/// Bytes that one node of leaves covers.
const LEAVES: u64 = 512 * P;
/// Where direct mappings are far from everything else.
const FAR: u64 = 1 << 40;

/// As much memory for the page table as it says.
#[derive(Debug)]
struct Budget(AtomicU64);

impl Allowance for Budget {
    fn allow(&self, total_bytes: u64) -> bool {
        total_bytes <= self.0.load(Ordering::Relaxed)
    }
}

/// A page table without a free node and without memory for one more. Some wait: a
/// table that only adds has replaced another, which nobody is asked to acknowledge.
/// The coherent aperture needs a node for each of its two parts.
struct Tight {
    domain: Domain,
    fake: Arc<Fake>,
    buffer: Buffer,
    /// Where the next direct mapping needs a node.
    next: u64,
}

fn tight(pinned: bool) -> Tight {
    let layout = LayoutSpec {
        bounce_bytes: 2 * P,
        coherent_bytes: 2 * LEAVES,
        ..LayoutSpec::default()
    };
    let layout = layout.plan().unwrap();
    let budget = Arc::new(Budget(AtomicU64::new(u64::MAX)));
    let allowance = Arc::clone(&budget) as Arc<dyn Allowance>;
    let (settings, scrub_with) = (Settings::default(), ScrubWith::Zero);
    let domain =
        Domain::create_within("tight", layout, settings, scrub_with, Some(allowance)).unwrap();
    domain.join(DRIVER, Role::Driver).unwrap();
    let fake = join_by_pins(&domain, FIRST);
    let buffer = Buffer::register(&domain, DRIVER, 1);
    let page = |at: u64| IovaRange::from_len(Iova::new(at), P).unwrap();
    let mut table = vec![buffer.entry(page(FAR)), buffer.entry(page(2 * FAR))];
    domain.set_map(AS_DRIVER, &table, None).unwrap();
    if pinned {
        fake.pin(generation(&domain));
    }
    table.push(buffer.entry(page(FAR + P)));
    domain.set_map(AS_DRIVER, &table, None).unwrap();
    budget.0.store(0, Ordering::Relaxed);
    let mut next = FAR + LEAVES;
    while usage(&domain).free > 0 {
        direct(&domain, buffer.at(next, 1));
        next += LEAVES;
    }
    domain.check_invariants();
    assert!(usage(&domain).retired > 0);
    assert_eq!(fake.asked(), [], "nothing was removed");
    Tight {
        domain,
        fake,
        buffer,
        next,
    }
}

fn usage(domain: &Domain) -> TableUsage {
    domain.look().iotlb.table_usage()
}

impl Tight {
    fn map_direct(&self) -> Option<NoRoom> {
        match map_direct(&self.domain, AS_DRIVER, self.buffer.at(self.next, 1)) {
            Ok(_) => None,
            Err(MapDirectError::NoRoom(refused)) => Some(refused),
            Err(other) => panic!("{other}"),
        }
    }

    fn alloc(&self) -> Option<NoRoom> {
        match alloc(&self.domain, 1) {
            Ok(_) => None,
            Err(Refused::NoRoom(refused)) => Some(refused),
            Err(other) => panic!("{other}"),
        }
    }

    /// A table of which the new tree fits into what waits.
    fn set_map(&self) -> Option<NoRoom> {
        let page = IovaRange::from_len(Iova::new(FAR), P).unwrap();
        let table = [self.buffer.entry(page)];
        match self.domain.set_map(AS_DRIVER, &table, None) {
            Ok(_) => None,
            Err(crate::direct::SetMapError::NoRoom(refused)) => Some(refused),
            Err(other) => panic!("{other}"),
        }
    }
}

/// Whatever needs a node that is not there.
const NEEDY: [fn(&Tight) -> Option<NoRoom>; 3] = [Tight::map_direct, Tight::alloc, Tight::set_map];

#[test]
fn nodes_that_wait_are_used_as_soon_as_they_are_needed_if_nobody_holds_an_older_view() {
    for needy in NEEDY {
        let tight = tight(false);

        assert_eq!(needy(&tight), None);

        tight.domain.check_invariants();
        assert_eq!(tight.fake.asked(), [], "its pins say enough");
    }
}

#[test]
fn nodes_that_somebody_may_still_look_at_are_refused_until_that_is_acknowledged() {
    for needy in NEEDY {
        let tight = tight(true);
        let (before, retired) = (generation(&tight.domain), usage(&tight.domain).retired);

        assert!(needy(&tight).is_some());

        tight.domain.check_invariants();
        assert_eq!(generation(&tight.domain), before);
        assert_eq!(usage(&tight.domain).retired, retired);
        assert_eq!(tight.fake.asked(), [before], "somebody has to say it");
        assert!(needy(&tight).is_some());
        assert_eq!(tight.fake.asked(), [], "once");
        ack(&tight.domain, FIRST, before);
        assert_eq!(usage(&tight.domain).retired, 0);
        assert_eq!(needy(&tight), None);
    }
}
