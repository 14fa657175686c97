//! The domain against its promises.
//!
//! The driver's side is a real memfd, of which each test keeps a second
//! description to look at; the device's side is `seen` and `device_writes`.

mod batch;
mod coherent;
mod concurrency;
mod direct;
mod lease;
mod memory;
mod model;
mod poison;
mod readers;
mod reset;
mod sessions;
mod set_map;
mod space;
mod steps;
mod streaming;
mod transit;

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;

use rustix::fs::{SealFlags, fcntl_add_seals};

use super::{Close, Domain, Occupancy, Scrub, Settings, UpdateError, Usage};
use crate::addr::{Granule, Iova, IovaRange};
use crate::aperture::ScrubWith;
use crate::batch::{BatchMode, BatchResult};
use crate::direct::{Actor, DirectMapping, DirectSpec, MapDirectError, Placement};
use crate::iotlb::{Entry, RegionId, Target};
use crate::layout::{ApertureKind, LayoutSpec};
use crate::limits::Quotas;
use crate::mapping::{MappingFilter, MappingKind, MappingMissing, ViewKind};
use crate::memory::MemoryId;
use crate::perm::{Direction, Perm};
use crate::region::{ClientMemory, CopyError, driver_memfd};
use crate::session::{Denied, Role, SessionId};
use crate::space::Restrictions;
use crate::streaming::{
    MapError, MapSpec, Mapped, SyncError, SyncSpec, SyncTarget, UnmapError, UnmapSpec,
};

const P: u64 = 4096;

const DRIVER: SessionId = SessionId::new(1);
const OTHER: SessionId = SessionId::new(2);
const DEVICE: SessionId = SessionId::new(3);

const DIRECTIONS: [Direction; 3] = [
    Direction::ToDevice,
    Direction::FromDevice,
    Direction::Bidirectional,
];

/// What an earlier owner left behind.
const DIRT: u8 = 0xA5;
/// What a device writes where it has no business.
const INTRUSION: u8 = 0xEE;

/// A domain with apertures of so many pages from address 0 on; nobody there.
fn empty_domain(bounce_pages: u64, coherent_pages: u64, scrub: Scrub) -> Domain {
    let layout = LayoutSpec {
        bounce_bytes: bounce_pages * P,
        coherent_bytes: coherent_pages * P,
        ..LayoutSpec::default()
    };
    let layout = layout.plan().unwrap();
    let settings = Settings {
        scrub,
        ..Settings::default()
    };
    Domain::create("test", layout, settings, ScrubWith::Zero).unwrap()
}

/// The same, where memory that is freed or was never used is poison.
fn poisoned_domain(bounce_pages: u64, coherent_pages: u64) -> Domain {
    let layout = LayoutSpec {
        bounce_bytes: bounce_pages * P,
        coherent_bytes: coherent_pages * P,
        ..LayoutSpec::default()
    };
    let layout = layout.plan().unwrap();
    Domain::create("poisoned", layout, Settings::default(), ScrubWith::Poison).unwrap()
}

/// An empty domain with two drivers and a device.
fn domain(bounce_pages: u64, coherent_pages: u64) -> Domain {
    let domain = empty_domain(bounce_pages, coherent_pages, Scrub::OnMap);
    domain.join(DRIVER, Role::Driver).unwrap();
    domain.join(OTHER, Role::Driver).unwrap();
    domain.join(DEVICE, Role::Device).unwrap();
    domain
}

/// The fresh domain of the cases: no apertures, every address up to 2^64-1; two
/// drivers and a device.
fn bare() -> Domain {
    bare_with(u64::MAX, Granule::Size4K)
}

fn bare_with(iova_limit: u64, granule: Granule) -> Domain {
    let layout = LayoutSpec {
        bounce_bytes: 0,
        coherent_bytes: 0,
        iova_limit,
        granule,
        ..LayoutSpec::default()
    };
    let layout = layout.plan().unwrap();
    let domain = Domain::create("bare", layout, Settings::default(), ScrubWith::Zero).unwrap();
    for (session, role) in [
        (DRIVER, Role::Driver),
        (OTHER, Role::Driver),
        (DEVICE, Role::Device),
    ] {
        domain.join(session, role).unwrap();
    }
    domain
}

const AS_DRIVER: Actor = Actor::Session(DRIVER);
const AS_OTHER: Actor = Actor::Session(OTHER);

/// Memory of a driver and the driver's own way to it.
struct Buffer {
    id: MemoryId,
    file: File,
}

impl Buffer {
    /// Registers so many pages, writable, filled with [`pattern`] 1.
    fn register(domain: &Domain, owner: SessionId, pages: u64) -> Buffer {
        let fd = driver_memfd("domain-test", pages * P).unwrap();
        let file = File::from(fd.try_clone().unwrap());
        file.write_all_at(&pattern(pages * P, 1), 0).unwrap();
        let memory = ClientMemory::accept(fd, true).unwrap();
        let id = domain.register(owner, memory, false).unwrap();
        Buffer { id, file }
    }

    /// The same, for the domain.
    fn persistent(domain: &Domain, session: SessionId, pages: u64) -> Buffer {
        let fd = driver_memfd("domain-test", pages * P).unwrap();
        let file = File::from(fd.try_clone().unwrap());
        file.write_all_at(&pattern(pages * P, 1), 0).unwrap();
        let memory = ClientMemory::accept(fd, true).unwrap();
        let id = domain.register(session, memory, true).unwrap();
        Buffer { id, file }
    }

    /// Sparse: as large as you like, and nothing in it.
    fn sparse(domain: &Domain, owner: SessionId, bytes: u64) -> Buffer {
        let fd = driver_memfd("domain-test", bytes).unwrap();
        let file = File::from(fd.try_clone().unwrap());
        let memory = ClientMemory::accept(fd, true).unwrap();
        let id = domain.register(owner, memory, false).unwrap();
        Buffer { id, file }
    }

    /// So many pages of it from its start on, at that iova.
    fn at(&self, iova: u64, pages: u64) -> DirectSpec {
        DirectSpec {
            placement: Placement::At(Iova::new(iova)),
            ..self.anywhere(pages)
        }
    }

    /// So many pages of it from its start on, wherever there is room.
    fn anywhere(&self, pages: u64) -> DirectSpec {
        DirectSpec {
            memory: self.id,
            offset: 0,
            len_bytes: pages * P,
            perm: Perm::ReadWrite,
            placement: Placement::Anywhere {
                align_bytes: 0,
                limit: None,
            },
        }
    }

    /// An entry of a table: all pages of a range from the start of the memory on.
    fn entry(&self, range: IovaRange) -> DirectMapping {
        DirectMapping {
            range,
            memory: self.id,
            offset: 0,
            perm: Perm::ReadWrite,
        }
    }

    fn bytes(&self, offset: u64, len: u64) -> Vec<u8> {
        let mut bytes = vec![0; size(len)];
        self.file.read_exact_at(&mut bytes, offset).unwrap();
        bytes
    }

    fn all(&self) -> Vec<u8> {
        self.bytes(0, self.file.metadata().unwrap().len())
    }

    fn write(&self, offset: u64, bytes: &[u8]) {
        self.file.write_all_at(bytes, offset).unwrap();
    }

    /// The client's right, at any time: from now on nobody writes to it.
    fn seal_against_writing(&self) {
        fcntl_add_seals(&self.file, SealFlags::FUTURE_WRITE).unwrap();
    }

    fn spec(&self, offset: u64, len: u64, direction: Direction) -> MapSpec {
        MapSpec::new(self.id, offset, len, direction)
    }
}

fn size(bytes: u64) -> usize {
    usize::try_from(bytes).unwrap()
}

/// Bytes that are never 0 and differ from one place, and one `seed`, to another.
fn pattern(len: u64, seed: u64) -> Vec<u8> {
    let byte = |at| u8::try_from((at * 7 + seed * 83) % 251 + 1).unwrap();
    (0..len).map(byte).collect()
}

/// Other quotas, and nothing else changed.
fn set_quotas(domain: &Domain, quotas: Quotas) -> Result<(), UpdateError> {
    domain.update(|settings| Ok(Settings { quotas, ..settings }))
}

/// Another scrubbing policy, and nothing else changed.
fn set_scrub(domain: &Domain, scrub: Scrub) {
    let change = |settings| Ok::<_, UpdateError>(Settings { scrub, ..settings });
    domain.update(change).unwrap();
}

/// The answer to a batch of one.
fn one<T, E>(answers: BatchResult<T, E>) -> Result<T, E> {
    match answers {
        Ok(mut answers) if answers.len() == 1 => answers.remove(0),
        Ok(answers) => panic!("{} answers to one entry", answers.len()),
        Err(refused) => Err(refused.error),
    }
}

fn map(domain: &Domain, session: SessionId, spec: MapSpec) -> Result<Mapped, MapError> {
    one(domain.map(session, &[spec], BatchMode::AllOrNothing))
}

fn unmap(domain: &Domain, session: SessionId, spec: UnmapSpec) -> Result<u64, UnmapError> {
    one(domain.unmap(session, &[spec], BatchMode::AllOrNothing))
}

fn sync(domain: &Domain, session: SessionId, spec: SyncSpec) -> Result<(), SyncError> {
    one(domain.sync(session, &[spec], BatchMode::AllOrNothing))
}

fn map_direct(
    domain: &Domain,
    actor: Actor,
    spec: DirectSpec,
) -> Result<DirectMapping, MapDirectError> {
    one(domain.map_direct(actor, &[spec], BatchMode::AllOrNothing))
}

fn range(start: u64, last: u64) -> IovaRange {
    IovaRange::new(Iova::new(start), Iova::new(last)).unwrap()
}

/// Pages `first..=last`.
fn pages(first: u64, last: u64) -> IovaRange {
    range(first * P, last * P + P - 1)
}

/// The direct table as a listing shows it, by address.
fn direct_table(domain: &Domain) -> Vec<DirectMapping> {
    let filter = MappingFilter {
        kind: Some(MappingKind::Direct),
        ..MappingFilter::default()
    };
    let listed = domain.mappings(filter, Iova::new(0), usize::MAX);
    let entry = |view: &crate::mapping::MappingView| {
        let ViewKind::Direct { source } = view.kind else {
            panic!("{view:?} is not direct");
        };
        assert_eq!(view.id, None);
        DirectMapping {
            range: view.visible,
            memory: source.memory,
            offset: source.offset,
            perm: view.perm,
        }
    };
    listed.iter().map(entry).collect()
}

fn direct_ranges(domain: &Domain) -> Vec<IovaRange> {
    direct_table(domain)
        .iter()
        .map(|entry| entry.range)
        .collect()
}

/// Replaces reserved and allowed ranges, and nothing else.
fn restrict(
    domain: &Domain,
    reserved: Vec<IovaRange>,
    allowed: Vec<IovaRange>,
) -> Result<(), UpdateError> {
    let restrictions = Restrictions::new(reserved, allowed)?;
    domain.update(|settings| {
        Ok(Settings {
            restrictions,
            ..settings
        })
    })
}

/// Everything that the domain has decided, to the last byte.
fn dump(domain: &Domain) -> String {
    format!("{:?}", *domain.look())
}

/// The end of a mapping with nothing said about it.
fn ending(mapped: Mapped) -> UnmapSpec {
    UnmapSpec {
        iova: mapped.iova,
        id: mapped.id,
        written_bytes: None,
        skip_sync: false,
    }
}

fn written(mapped: Mapped, bytes: u64) -> UnmapSpec {
    UnmapSpec {
        written_bytes: Some(bytes),
        ..ending(mapped)
    }
}

/// The end that copies nothing, which every mapping allows.
fn discarding(mapped: Mapped) -> UnmapSpec {
    UnmapSpec {
        skip_sync: true,
        ..ending(mapped)
    }
}

fn part(mapped: Mapped, offset: u64, len_bytes: u64, target: SyncTarget) -> SyncSpec {
    SyncSpec {
        iova: mapped.iova,
        id: mapped.id,
        offset,
        len_bytes,
        target,
    }
}

fn visible(mapped: Mapped) -> IovaRange {
    IovaRange::from_len(mapped.iova, mapped.len_bytes).unwrap()
}

/// All there is in the granules that a range lies in.
fn granules(range: IovaRange) -> IovaRange {
    let start = Iova::new(range.start().get() / P * P);
    IovaRange::new(start, Iova::new(range.last().get() | (P - 1))).unwrap()
}

/// What a device finds at these addresses, mapped or not.
fn seen(domain: &Domain, range: IovaRange) -> Vec<u8> {
    let (memory, offset) = backing(domain, range.start());
    let mut bytes = vec![0; size(range.len_bytes().unwrap())];
    memory.copy_out(offset, &mut bytes).unwrap();
    bytes
}

/// A device stores there, mapped or not.
fn device_writes(domain: &Domain, start: Iova, bytes: &[u8]) {
    let (memory, offset) = backing(domain, start);
    memory.copy_in(offset, bytes).unwrap();
}

/// A device stores the same byte all over an aperture.
fn device_floods(domain: &Domain, kind: ApertureKind, byte: u8) {
    let memory = domain.aperture(kind).unwrap().memory();
    memory.fill(0, memory.len_bytes(), byte).unwrap();
}

fn backing(domain: &Domain, iova: Iova) -> (&crate::region::SharedMemory, u64) {
    let kinds = [ApertureKind::Bounce, ApertureKind::Coherent];
    let apertures = kinds.iter().filter_map(|kind| domain.aperture(*kind));
    let at = IovaRange::from_len(iova, 1).unwrap();
    let aperture = apertures
        .into_iter()
        .find(|aperture| aperture.range().contains(at))
        .unwrap();
    let offset = iova.offset_from(aperture.range().start()).unwrap();
    (aperture.memory(), offset)
}

/// Everything that a refused request must leave as it was.
fn table(domain: &Domain) -> (Usage, Vec<Entry>) {
    let entries = domain.look().iotlb.entries().collect();
    (domain.usage(), entries)
}

/// How many fds of this process have a memfd of that name open.
fn open_fds(name: &str) -> usize {
    let target = format!("/memfd:{name} (deleted)");
    std::fs::read_dir("/proc/self/fd")
        .unwrap()
        .filter_map(|entry| std::fs::read_link(entry.ok()?.path()).ok())
        .filter(|link| link.as_os_str() == target.as_str())
        .count()
}
