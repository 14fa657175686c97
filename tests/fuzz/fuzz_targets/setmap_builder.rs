//! Whole tables into a real domain, against one flag a granule: a table that is
//! taken is there whole, one that is refused leaves the old one as it was.
#![no_main]

use std::sync::OnceLock;

use arbitrary::Arbitrary;
use domain_core::addr::{Iova, IovaRange};
use domain_core::aperture::ScrubWith;
use domain_core::direct::{Actor, DirectMapping, SetMapError};
use domain_core::domain::Settings;
use domain_core::layout::LayoutSpec;
use domain_core::mapping::{MappingFilter, MappingView};
use domain_core::memory::MemoryId;
use domain_core::perm::Perm;
use domain_core::region::{ClientMemory, driver_memfd};
use domain_core::session::{Role, SessionId};
use domain_core::space::Restrictions;
use domain_core::Domain;
use libfuzzer_sys::fuzz_target;

const P: u64 = 4096;
/// Granules of the registered memory.
const MEMORY: u64 = 16;
/// Reserved, apertures above it.
const RESERVED: u64 = 40;

#[derive(Arbitrary, Debug)]
struct Plan {
    tables: Vec<Vec<Row>>,
}

#[derive(Arbitrary, Debug)]
struct Row {
    start: u16,
    granules: u8,
    /// Bytes that spoil the alignment, mostly none.
    skew: u8,
    memory: u8,
    offset: u8,
    perm: u8,
    /// Mostly a low address; some at the top of the space, some anywhere.
    place: u8,
    anywhere: u64,
}

fn domain() -> &'static (Domain, MemoryId, MemoryId) {
    static DOMAIN: OnceLock<(Domain, MemoryId, MemoryId)> = OnceLock::new();
    DOMAIN.get_or_init(|| {
        let layout = LayoutSpec {
            bounce_bytes: 4 * P,
            coherent_bytes: 4 * P,
            aperture_base: 64 * P,
            iova_limit: u64::MAX,
            ..LayoutSpec::default()
        };
        let reserved = IovaRange::from_len(Iova::new(RESERVED * P), P).expect("a range");
        let settings = Settings {
            restrictions: Restrictions::new(vec![reserved], Vec::new()).expect("one range"),
            ..Settings::default()
        };
        let layout = layout.plan().expect("a plan");
        let domain = Domain::create("fuzz", layout, settings, ScrubWith::Zero).expect("a domain");
        let session = SessionId::new(1);
        domain.join(session, Role::Driver).expect("a driver");
        let memory = |writable| {
            let fd = driver_memfd("fuzz", MEMORY * P).expect("a memfd");
            let memory = ClientMemory::accept(fd, writable).expect("accepted");
            domain.register(session, memory, false).expect("registered")
        };
        let (rw, ro) = (memory(true), memory(false));
        (domain, rw, ro)
    })
}

impl Row {
    fn mapping(&self, rw: MemoryId, ro: MemoryId) -> Option<DirectMapping> {
        let start = match self.place % 8 {
            0..6 => u64::from(self.start % 128) * P,
            6 => (u64::MAX - 64 * P + 1) + u64::from(self.start % 64) * P,
            _ => self.anywhere,
        };
        let skew = match self.skew {
            0..240 => 0,
            more => u64::from(more - 239),
        };
        let len = u64::from(self.granules % 20) * P + skew;
        let range = IovaRange::from_len(Iova::new(start), len).ok()?;
        let memory = match self.memory % 16 {
            0..10 => rw,
            10..15 => ro,
            _ => MemoryId::new(99),
        };
        let perm = [Perm::Read, Perm::Write, Perm::ReadWrite][usize::from(self.perm % 3)];
        Some(DirectMapping {
            range,
            memory,
            offset: u64::from(self.offset % 20) * P,
            perm,
        })
    }
}

/// May this entry be in a table, by the letter of the specification?
fn is_sound(mapping: &DirectMapping, rw: MemoryId, ro: MemoryId) -> bool {
    let (start, last) = (mapping.range.start().get(), mapping.range.last().get());
    let aligned = start % P == 0 && last % P == P - 1;
    let len = last - start;
    let inside = u128::from(mapping.offset) + u128::from(len) < u128::from(MEMORY * P);
    let known = mapping.memory == rw || mapping.memory == ro && mapping.perm == Perm::Read;
    let touches = |first: u64, granules: u64| start < (first + granules) * P && last >= first * P;
    aligned && inside && known && !touches(RESERVED, 1) && !touches(64, 8)
}

fuzz_target!(|plan: Plan| {
    let (domain, rw, ro) = domain();
    domain.set_map(Actor::Owner, &[], None).expect("an empty table");
    for rows in &plan.tables {
        let table: Vec<_> = rows.iter().filter_map(|row| row.mapping(*rw, *ro)).collect();
        let before = listed(domain);
        let set = domain.set_map(Actor::Owner, &table, None);
        let mut order: Vec<_> = table.clone();
        order.sort_by_key(|mapping| mapping.range.start());
        let overlap = order.windows(2).any(|pair| pair[0].range.overlaps(pair[1].range));
        let bad = table.iter().position(|mapping| !is_sound(mapping, *rw, *ro));
        match set {
            Ok(set) => {
                assert!(!overlap && bad.is_none(), "{table:?}");
                let now = listed(domain);
                assert_eq!(now.len(), order.len());
                for (view, mapping) in now.iter().zip(&order) {
                    assert_eq!((view.visible, view.perm), (mapping.range, mapping.perm));
                    let source = view.source().expect("direct");
                    assert_eq!((source.memory, source.offset), (mapping.memory, mapping.offset));
                }
                let kept = before.iter().filter(|view| now.contains(view)).count();
                assert_eq!((set.added, set.removed), (now.len() - kept, before.len() - kept));
            }
            Err(SetMapError::Entry { index, .. }) => {
                assert!(index < table.len());
                assert!(overlap || bad.is_some(), "{table:?}");
                assert!(overlap || !is_sound(&table[index], *rw, *ro), "{table:?}");
                assert_eq!(listed(domain), before);
            }
            Err(other) => panic!("{other:?}"),
        }
    }
    domain.check_invariants();
});

fn listed(domain: &Domain) -> Vec<MappingView> {
    domain.mappings(MappingFilter::default(), Iova::new(0), usize::MAX)
}
