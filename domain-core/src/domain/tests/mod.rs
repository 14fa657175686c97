//! The domain against its promises.
//!
//! The driver's side is a real memfd, of which each test keeps a second
//! description to look at; the device's side is `seen` and `device_writes`.

mod batch;
mod coherent;
mod concurrency;
mod memory;
mod model;
mod sessions;
mod space;
mod streaming;
mod transit;

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;

use rustix::fs::{SealFlags, fcntl_add_seals};

use super::{Close, Domain, Occupancy, Scrub, Settings, UpdateError, Usage};
use crate::addr::{Iova, IovaRange};
use crate::aperture::ScrubWith;
use crate::batch::{BatchMode, BatchResult};
use crate::iotlb::{Entry, RegionId, Target};
use crate::layout::{ApertureKind, LayoutSpec};
use crate::limits::Quotas;
use crate::mapping::MappingMissing;
use crate::memory::MemoryId;
use crate::perm::Direction;
use crate::region::{ClientMemory, CopyError, driver_memfd};
use crate::session::{Denied, Role, SessionId};
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

/// The same with two drivers and a device.
fn domain(bounce_pages: u64, coherent_pages: u64) -> Domain {
    let domain = empty_domain(bounce_pages, coherent_pages, Scrub::OnMap);
    domain.join(DRIVER, Role::Driver).unwrap();
    domain.join(OTHER, Role::Driver).unwrap();
    domain.join(DEVICE, Role::Device).unwrap();
    domain
}

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
    let entries = domain.look().iotlb.entries().copied().collect();
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
