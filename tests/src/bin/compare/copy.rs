//! What the service pays to copy a driver's buffer in, beside `pread` alone.

use std::fs::File;
use std::hint::black_box;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::time::Instant;

use domain_core::Direction;
use domain_core::aperture::ScrubWith;
use domain_core::batch::BatchMode;
use domain_core::domain::{Domain, Settings};
use domain_core::layout::LayoutSpec;
use domain_core::memory::MemoryId;
use domain_core::region::{Backing, ClientMemory, Region, driver_memfd};
use domain_core::session::{Role as SessionRole, SessionId};
use domain_core::streaming::{MapSpec, UnmapSpec};

use crate::clock::Batch;
use crate::report::{Limit, Report, Row, Unit};
use crate::rounds::{Contender, Role, Scale, interleave};

const LENGTHS: [(u64, &str); 3] = [(4 << 10, "4 KiB"), (64 << 10, "64 KiB"), (1 << 20, "1 MiB")];
/// Buffers are taken one after the other from so much memory.
const MEMORY_BYTES: u64 = 8 << 20;
const DRIVER: SessionId = SessionId::new(1);

/// Prints all rows of this family.
pub(crate) fn rows(report: &Report, scale: &Scale) -> io::Result<()> {
    for (len, name) in LENGTHS {
        let row = format!("copy/{name}");
        if report.wants(&row) {
            let contenders = vec![read_from(len, scale), pread(len, scale)];
            let outcomes = interleave(scale.rounds, contenders);
            let goal = [Limit::Floor(1.15)];
            report.print(&Row::new(row, Unit::Nanoseconds, outcomes, goal))?;
        }
        let row = format!("map+unmap/{name}");
        if report.wants(&row) {
            let contenders = vec![map_unmap(len, scale), pread(len, scale)];
            let outcomes = interleave(scale.rounds, contenders);
            report.print(&Row::new(row, Unit::Nanoseconds, outcomes, []))?;
        }
    }
    Ok(())
}

/// The service's copy into a region.
fn read_from(len: u64, scale: &Scale) -> Contender<'static> {
    let file = filled();
    let region = Region::create("compare", MEMORY_BYTES, Backing::Memfd).expect("a region");
    copying("domaind", Role::Ours, len, scale, move |offset| {
        let copied = region.memory().read_from(offset, len, file.as_fd(), offset);
        copied.expect("both are long enough");
    })
}

/// The same bytes into an ordinary buffer: the least that it can cost.
fn pread(len: u64, scale: &Scale) -> Contender<'static> {
    let file = File::from(filled());
    let mut buffer = vec![1; size(MEMORY_BYTES)];
    copying("pread", Role::Floor, len, scale, move |offset| {
        let into = &mut buffer[size(offset)..][..size(len)];
        file.read_exact_at(into, offset).expect("it is long enough");
        black_box(into);
    })
}

/// All that a mapping `TO_DEVICE` costs in the domain, copy included.
fn map_unmap(len: u64, scale: &Scale) -> Contender<'static> {
    let layout = LayoutSpec::default().plan().expect("the default is a plan");
    let domain = Domain::create("compare", layout, Settings::default(), ScrubWith::Zero);
    let domain = domain.expect("memory for a domain");
    domain
        .join(DRIVER, SessionRole::Driver)
        .expect("it is empty");
    let memory = ClientMemory::accept(filled(), true).expect("a sealed memfd");
    let memory = domain.register(DRIVER, memory, false).expect("it is empty");
    copying("domaind", Role::Ours, len, scale, move |offset| {
        bounce(&domain, memory, offset, len);
    })
}

fn bounce(domain: &Domain, memory: MemoryId, offset: u64, len: u64) {
    let spec = MapSpec::new(memory, offset, len, Direction::ToDevice);
    let mapped = domain.map(DRIVER, &[spec], BatchMode::AllOrNothing);
    let mapped = mapped
        .expect("there is room")
        .remove(0)
        .expect("all or nothing");
    let spec = UnmapSpec {
        iova: mapped.iova,
        id: mapped.id,
        written_bytes: None,
        skip_sync: false,
    };
    let unmapped = domain.unmap(DRIVER, &[spec], BatchMode::AllOrNothing);
    unmapped.expect("it is live");
}

/// `copy` copies `len` bytes from an offset that moves through the memory.
fn copying(
    name: &'static str,
    role: Role,
    len: u64,
    scale: &Scale,
    mut copy: impl FnMut(u64) + 'static,
) -> Contender<'static> {
    // Every page is touched once before.
    (0..MEMORY_BYTES).step_by(size(len)).for_each(&mut copy);
    let mut offset = 0;
    let mut batch = Batch::lasting(scale.turn);
    let mut work = move |ops| {
        let start = Instant::now();
        for _ in 0..ops {
            copy(offset);
            offset = (offset + len) % MEMORY_BYTES;
        }
        start.elapsed()
    };
    Contender::new(role, name, move || batch.run(&mut work))
}

/// A driver's memory, all of it written.
fn filled() -> OwnedFd {
    let file = File::from(driver_memfd("compare", MEMORY_BYTES).expect("a memfd"));
    let page = [0x5A; 4096];
    for offset in (0..MEMORY_BYTES).step_by(page.len()) {
        file.write_all_at(&page, offset).expect("it is long enough");
    }
    file.into()
}

fn size(bytes: u64) -> usize {
    usize::try_from(bytes).expect("64 bits")
}
