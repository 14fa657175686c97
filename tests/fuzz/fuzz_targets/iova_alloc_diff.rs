//! The allocator against one flag a granule.
#![no_main]

use arbitrary::Arbitrary;
use domain_core::addr::{Granule, Iova, IovaRange};
use domain_core::alloc::{AllocError, AllocRequest, FreeError, IovaAllocator};
use libfuzzer_sys::fuzz_target;

const P: u64 = 4096;

#[derive(Arbitrary, Debug)]
struct Plan {
    /// Where the aperture begins: at 0, at 1 granule, in the middle, at the top.
    base: u8,
    granules: u16,
    ops: Vec<Op>,
}

#[derive(Arbitrary, Debug)]
enum Op {
    Alloc {
        granules: u16,
        align_shift: u8,
        limit: Option<u16>,
    },
    /// Small ones, as the magazines keep them.
    AllocSmall { granules: u8 },
    AllocAt { first: u16, granules: u8 },
    Free { which: u16 },
    FreeWrong { first: u16, granules: u8 },
    Largest,
}

/// One aperture, granule by granule: the number of the allocation, or none.
struct Model {
    first: u64,
    owners: Vec<Option<u32>>,
    live: Vec<(u64, u64)>,
    next: u32,
}

impl Model {
    fn is_free(&self, at: u64, len: u64) -> bool {
        let inside = at >= self.first && at + len <= self.first + self.owners.len() as u64;
        inside && (at..at + len).all(|g| self.owners[(g - self.first) as usize].is_none())
    }

    fn fits(&self, want: u64, align: u64, last: u64) -> bool {
        let end = self.first + self.owners.len() as u64;
        (self.first..end)
            .filter(|at| at % align == 0)
            .any(|at| want <= end - at && at + want - 1 <= last && self.is_free(at, want))
    }

    fn largest(&self) -> u64 {
        let runs = self.owners.split(Option::is_some);
        runs.map(|run| run.len() as u64).max().unwrap_or(0)
    }

    fn take(&mut self, at: u64, len: u64) {
        for granule in at..at + len {
            self.owners[(granule - self.first) as usize] = Some(self.next);
        }
        self.next += 1;
        self.live.push((at, len));
    }

    fn free(&mut self, at: u64, len: u64) {
        for granule in at..at + len {
            self.owners[(granule - self.first) as usize] = None;
        }
        self.live.retain(|there| *there != (at, len));
    }
}

fn range(at: u64, len: u64) -> IovaRange {
    IovaRange::from_len(Iova::new(at * P), len * P).expect("inside the space")
}

fuzz_target!(|plan: Plan| {
    let granules = u64::from(plan.granules % 600) + 2;
    let base = match plan.base % 4 {
        0 => 0,
        1 => 1,
        2 => 1 << 36,
        _ => (1 << 52) - granules,
    };
    let Some(mut iovas) = IovaAllocator::new(range(base, granules), Granule::Size4K) else {
        return;
    };
    // 0 is never given.
    let first = base.max(1);
    let mut model = Model {
        first,
        owners: vec![None; (base + granules - first) as usize],
        live: Vec::new(),
        next: 0,
    };
    for op in &plan.ops {
        step(op, &mut iovas, &mut model);
    }
    iovas.check_invariants();
    let live: Vec<_> = iovas.live().collect();
    let mut expected: Vec<_> = model.live.iter().map(|&(at, len)| range(at, len)).collect();
    expected.sort_by_key(|range| range.start());
    assert_eq!(live, expected);
});

fn step(op: &Op, iovas: &mut IovaAllocator, model: &mut Model) {
    match *op {
        Op::Alloc {
            granules,
            align_shift,
            limit,
        } => alloc(
            iovas,
            model,
            u64::from(granules % 700),
            1 << (align_shift % 12),
            limit.map(|limit| (model.first + u64::from(limit % 700)).min((1 << 52) - 1)),
        ),
        Op::AllocSmall { granules } => {
            alloc(iovas, model, u64::from(granules % 20), 1, None);
        }
        Op::AllocAt { first, granules } => {
            let at = model.first.saturating_sub(2) + u64::from(first % 700);
            let len = u64::from(granules) + 1;
            if at.checked_add(len).is_none_or(|end| end > 1 << 52) {
                return;
            }
            let taken = iovas.alloc_at(range(at, len));
            assert_eq!(taken.is_ok(), model.is_free(at, len), "{at} {len} {taken:?}");
            if taken.is_ok() {
                model.take(at, len);
            }
        }
        Op::Free { which } => {
            if model.live.is_empty() {
                return;
            }
            let (at, len) = model.live[usize::from(which) % model.live.len()];
            iovas.free(range(at, len)).expect("it is live");
            model.free(at, len);
            let again = iovas.free(range(at, len)).expect_err("freed twice");
            assert!(matches!(again, FreeError::NotAllocated { .. }), "{again:?}");
        }
        Op::FreeWrong { first, granules } => {
            let at = model.first.saturating_sub(2) + u64::from(first % 700);
            let len = u64::from(granules) + 1;
            if at.checked_add(len).is_none_or(|end| end > 1 << 52) {
                return;
            }
            if !model.live.contains(&(at, len)) {
                let refused = iovas.free(range(at, len)).expect_err("it is not live");
                let there = model.live.iter().find(|(start, _)| *start == at);
                let expected = match there {
                    Some(&(start, len)) => Some(range(start, len)),
                    None => None,
                };
                match refused {
                    FreeError::WrongSize { allocated, .. } => {
                        assert_eq!(Some(allocated), expected);
                    }
                    FreeError::NotAllocated { .. } => assert_eq!(None, expected),
                }
            }
        }
        Op::Largest => {
            assert_eq!(iovas.largest_hole_bytes(), model.largest() * P);
        }
    }
    assert_eq!(iovas.live_count(), model.live.len());
}

fn alloc(
    iovas: &mut IovaAllocator,
    model: &mut Model,
    want: u64,
    align: u64,
    last: Option<u64>,
) {
    let request = AllocRequest {
        len_bytes: want * P,
        align_bytes: align * P,
        limit: last.map(|last| Iova::new(last * P + (P - 1))),
    };
    let last = last.unwrap_or(u64::MAX);
    match iovas.alloc(request) {
        Ok(given) => {
            let at = given.start().get() / P;
            assert_eq!(given, range(at, want));
            assert!(at != 0 && at % align == 0 && at + want - 1 <= last);
            assert!(model.is_free(at, want), "{given:?} is taken");
            model.take(at, want);
        }
        Err(AllocError::ZeroLength) => assert_eq!(want, 0),
        Err(AllocError::NoSpace {
            largest_hole_bytes, ..
        }) => {
            assert!(!model.fits(want, align, last), "{request:?} would fit");
            if last == u64::MAX {
                assert_eq!(largest_hole_bytes, model.largest() * P);
            }
        }
        Err(other) => panic!("{other:?}"),
    }
}
