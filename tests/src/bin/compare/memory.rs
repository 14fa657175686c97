//! Bytes for each allocation, range and idle domain.
//!
//! A counting allocator would slow down all other rows, and would not see what
//! an allocator rounds up or what lies in memfds. So each load is weighed by a
//! child process: how much of its heap became resident, and how much memory its
//! memfds took.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::process::Command;
use std::time::Duration;

use domain_core::aperture::ScrubWith;
use domain_core::domain::{Domain, Settings};
use domain_core::layout::{Layout, LayoutSpec};

use crate::alloc::{BOARD_PAGES, SPACE_PAGES, checkerboard, take};
use crate::clock::as_f64;
use crate::lookup::{adjacent, spaced};
use crate::mixed::filled;
use crate::peers::{
    BTreeTable, Buddy, FlatTable, IotlbTable, Mapping, NoditTable, OffsetAllocator, Ours,
    PageAllocator, RangeMapTable, Table, VmIotlb,
};
use crate::random::Random;
use crate::report::{Limit, Report, Row, Unit};
use crate::rounds::{Outcome, Role};

const PAGES: u32 = 1 << 20;
const RANGES: u64 = 1 << 16;
const DOMAINS: u64 = 2;

/// Prints all rows of this family.
pub(crate) fn rows(report: &Report) -> io::Result<()> {
    for Load {
        row,
        most,
        weighings,
    } in loads()
    {
        if report.wants(row) {
            let outcomes = weighings.iter().map(|weighing| weighing.outcome(row));
            let goal: Vec<Limit> = most.map(Limit::AtMost).into_iter().collect();
            let row = Row::new(row.to_owned(), Unit::Bytes, outcomes.collect(), goal);
            report.print(&row)?;
        }
    }
    Ok(())
}

/// Weighs one load of one contender, in the child process.
pub(crate) fn weigh(id: &str) -> io::Result<()> {
    // A huge page would count whole.
    rustix::thread::disable_transparent_huge_pages(true)?;
    for Load { row, weighings, .. } in loads() {
        for weighing in weighings {
            if weighing.id(row) == id {
                println!("{}", (weighing.bytes)());
                return Ok(());
            }
        }
    }
    Err(io::Error::other(format!(
        "nothing to weigh is called {id:?}"
    )))
}

/// A row and who stands in it.
struct Load {
    row: &'static str,
    most: Option<f64>,
    weighings: Vec<Weighing>,
}

struct Weighing {
    name: &'static str,
    role: Role,
    /// Bytes for each thing; only in a process of its own.
    bytes: fn() -> f64,
}

fn loads() -> Vec<Load> {
    vec![
        Load {
            row: "memory/allocation/4 KiB",
            most: Some(32.0),
            weighings: vec![
                allocator::<Ours>(single::<Ours>),
                allocator::<OffsetAllocator>(single::<OffsetAllocator>),
                allocator::<Buddy>(single::<Buddy>),
            ],
        },
        Load {
            row: "memory/allocation/checkerboard",
            most: Some(32.0),
            weighings: vec![
                allocator::<Ours>(every_other::<Ours>),
                allocator::<OffsetAllocator>(every_other::<OffsetAllocator>),
                allocator::<Buddy>(every_other::<Buddy>),
            ],
        },
        Load {
            row: "memory/allocation/mixed 50 %",
            most: Some(32.0),
            weighings: vec![
                allocator::<Ours>(mixed::<Ours>),
                allocator::<OffsetAllocator>(mixed::<OffsetAllocator>),
                allocator::<Buddy>(mixed::<Buddy>),
            ],
        },
        Load {
            row: "memory/range/adjacent",
            // 64 and a leaf of 8.
            most: Some(72.0),
            weighings: vec![
                table::<IotlbTable>(ranges::<IotlbTable, true>),
                table::<VmIotlb>(ranges::<VmIotlb, true>),
                table::<RangeMapTable>(ranges::<RangeMapTable, true>),
                table::<NoditTable>(ranges::<NoditTable, true>),
                table::<BTreeTable>(ranges::<BTreeTable, true>),
                table::<FlatTable>(ranges::<FlatTable, true>),
            ],
        },
        Load {
            row: "memory/range/spaced",
            most: None,
            weighings: vec![
                table::<IotlbTable>(ranges::<IotlbTable, false>),
                table::<VmIotlb>(ranges::<VmIotlb, false>),
                table::<RangeMapTable>(ranges::<RangeMapTable, false>),
                table::<NoditTable>(ranges::<NoditTable, false>),
                table::<BTreeTable>(ranges::<BTreeTable, false>),
                table::<FlatTable>(ranges::<FlatTable, false>),
            ],
        },
        Load {
            row: "memory/idle domain",
            most: Some(65_536.0),
            weighings: vec![Weighing {
                name: "domaind",
                role: Role::Ours,
                bytes: idle_domain,
            }],
        },
    ]
}

fn allocator<A: PageAllocator>(bytes: fn() -> f64) -> Weighing {
    Weighing {
        name: A::NAME,
        role: A::ROLE,
        bytes,
    }
}

fn table<T: Table>(bytes: fn() -> f64) -> Weighing {
    Weighing {
        name: T::NAME,
        role: T::ROLE,
        bytes,
    }
}

impl Weighing {
    fn id(&self, row: &str) -> String {
        format!("{row}/{}", self.name)
    }

    fn outcome(&self, row: &str) -> Outcome {
        let weighed = self.ask_child(row);
        Outcome {
            name: self.name,
            role: self.role,
            note: weighed.as_ref().err().map(io::Error::to_string),
            value: weighed.ok(),
        }
    }

    fn ask_child(&self, row: &str) -> io::Result<f64> {
        let child = Command::new(std::env::current_exe()?)
            .args(["--weigh", &self.id(row)])
            .output()?;
        let printed = String::from_utf8_lossy(&child.stdout);
        printed.trim().parse().map_err(|_| {
            let trouble = String::from_utf8_lossy(&child.stderr).into_owned();
            io::Error::other(format!("the child process failed: {}", trouble.trim()))
        })
    }
}

fn single<A: PageAllocator>() -> f64 {
    for_each(|| {
        let mut allocator = A::new(SPACE_PAGES, PAGES);
        let runs = take(&mut allocator, PAGES, Duration::MAX).expect("there is time");
        (allocator, runs.len())
    })
}

fn every_other<A: PageAllocator>() -> f64 {
    for_each(|| {
        let board = checkerboard::<A>(Duration::MAX).expect("there is time");
        (board, size(BOARD_PAGES / 2))
    })
}

fn mixed<A: PageAllocator>() -> f64 {
    for_each(|| filled::<A>(50))
}

fn ranges<T: Table, const ADJACENT: bool>() -> f64 {
    let mut mappings: Vec<Mapping> = match ADJACENT {
        true => adjacent(RANGES),
        false => spaced(RANGES),
    };
    Random::stream(12).shuffle(&mut mappings);
    for_each(|| (T::build(&mappings), mappings.len()))
}

/// Without its regions.
fn idle_domain() -> f64 {
    let layout: Layout = LayoutSpec::default().plan().expect("the default is a plan");
    let create = |_| {
        let domain = Domain::create("compare", layout, Settings::default(), ScrubWith::Zero);
        domain.expect("memory for a domain")
    };
    let all = for_each(|| ((0..DOMAINS).map(create).collect::<Vec<_>>(), 1));
    all / as_f64(DOMAINS) - as_f64(layout.region_bytes())
}

/// Bytes that what is made takes, by the number of things in it.
fn for_each<T>(make: impl FnOnce() -> (T, usize)) -> f64 {
    let me = std::process::id();
    let before = taken(me).expect("/proc is mounted");
    let (made, things) = make();
    let after = taken(me).expect("/proc is mounted");
    drop(made);
    as_f64(after.saturating_sub(before)) / as_f64(u64::try_from(things).expect("64 bits"))
}

/// Bytes of a process that are its own, in memory of whatever kind.
pub(crate) fn taken(pid: u32) -> io::Result<u64> {
    Ok(status_bytes(pid, "RssAnon:")? + memfds(pid)?)
}

/// Bytes of a process that are in memory, whosever they are.
pub(crate) fn resident(pid: u32) -> io::Result<u64> {
    status_bytes(pid, "VmRSS:")
}

fn status_bytes(pid: u32, key: &str) -> io::Result<u64> {
    let path = format!("/proc/{pid}/status");
    let status = fs::read_to_string(&path)?;
    let line = status.lines().find_map(|line| line.strip_prefix(key));
    let kib = line.and_then(|line| line.trim().strip_suffix(" kB")?.parse::<u64>().ok());
    let kib = kib.ok_or_else(|| io::Error::other(format!("no {key} in {path}")))?;
    Ok(kib << 10)
}

fn memfds(pid: u32) -> io::Result<u64> {
    let mut bytes = 0;
    for fd in fs::read_dir(format!("/proc/{pid}/fd"))? {
        let path = fd?.path();
        // The directory itself is open too, and gone when it is asked.
        let leads = fs::read_link(&path).unwrap_or_default();
        if leads.as_os_str().as_encoded_bytes().starts_with(b"/memfd:") {
            bytes += fs::metadata(&path)?.blocks() * 512;
        }
    }
    Ok(bytes)
}

fn size(count: u32) -> usize {
    usize::try_from(count).expect("64 bits")
}
