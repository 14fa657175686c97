//! The allocator: promises one by one, then random operations against a model.

use super::*;
use proptest::prelude::*;

const P: u64 = 4096;

fn mib_at_zero() -> IovaAllocator {
    let aperture = IovaRange::from_len(Iova::new(0), 1 << 20).unwrap();
    IovaAllocator::new(aperture, Granule::Size4K).unwrap()
}

fn aligned(len_bytes: u64, align_bytes: u64) -> AllocRequest {
    AllocRequest {
        align_bytes,
        ..AllocRequest::of(len_bytes)
    }
}

#[test]
fn a_mib_at_zero_holds_255_pages_and_never_gives_page_zero() {
    let mut iovas = mib_at_zero();
    let got: Vec<_> = (0..255)
        .map(|_| iovas.alloc(AllocRequest::of(1)).unwrap())
        .collect();
    assert!(got.iter().all(|range| range.start().get() >= P));
    let full = iovas.alloc(AllocRequest::of(P)).unwrap_err();
    assert_eq!(
        full,
        AllocError::NoSpace {
            want_bytes: P,
            align_bytes: P,
            largest_hole_bytes: 0
        }
    );
    iovas.free(got[77]).unwrap();
    assert_eq!(iovas.alloc(AllocRequest::of(P)).unwrap(), got[77]);
    assert!(iovas.alloc(AllocRequest::of(P)).is_err());
    iovas.check_invariants();
}

#[test]
fn a_request_takes_exactly_its_granules() {
    let mut iovas = mib_at_zero();
    assert_eq!(
        iovas.alloc(AllocRequest::of(255 * P)).unwrap().bytes(),
        u128::from(255 * P)
    );
    let mut iovas = mib_at_zero();
    for _ in 0..15 {
        iovas.alloc(AllocRequest::of(17 * P)).unwrap();
    }
    assert_eq!(iovas.used_bytes(), 255 * P);
    assert_eq!(iovas.largest_hole_bytes(), 0);
}

#[test]
fn natural_alignment_is_given_on_request() {
    for pages in 1..=64u64 {
        let align = (pages * P).next_power_of_two();
        let mut iovas = mib_at_zero();
        iovas.alloc(AllocRequest::of(P)).unwrap();
        let range = iovas.alloc(aligned(pages * P, align)).unwrap();
        assert_eq!(range.start().get() % align, 0, "{pages} pages");
    }
    let odd = mib_at_zero().alloc(aligned(P, 3 * P)).unwrap_err();
    assert_eq!(odd, AllocError::BadAlignment { align_bytes: 3 * P });
}

#[test]
fn a_limit_is_kept_and_the_largest_hole_is_the_one_below_it() {
    let mut iovas = mib_at_zero();
    let limit = Some(Iova::new(8 * P - 1));
    let below = AllocRequest {
        limit,
        ..AllocRequest::of(7 * P)
    };
    let too_long = AllocRequest {
        limit,
        ..AllocRequest::of(8 * P)
    };
    let refused = iovas.alloc(too_long).unwrap_err();
    assert!(
        matches!(refused, AllocError::NoSpace { largest_hole_bytes, .. } if largest_hole_bytes == 7 * P)
    );
    assert!(iovas.alloc(below).unwrap().last() <= Iova::new(8 * P - 1));
    // One byte short of the granule's end: the granule is not to be had.
    let cut = AllocRequest {
        limit: Some(Iova::new(9 * P - 2)),
        ..AllocRequest::of(1)
    };
    assert!(iovas.alloc(cut).is_err());
}

#[test]
fn a_double_or_wrong_size_free_changes_nothing() {
    let mut iovas = mib_at_zero();
    let range = iovas.alloc(AllocRequest::of(2 * P)).unwrap();
    let half = IovaRange::from_len(range.start(), P).unwrap();
    assert_eq!(
        iovas.free(half),
        Err(FreeError::WrongSize {
            range: half,
            allocated: range
        })
    );
    iovas.free(range).unwrap();
    assert_eq!(
        iovas.free(range),
        Err(FreeError::NotAllocated {
            start: range.start()
        })
    );
    iovas.check_invariants();
}

#[test]
fn alloc_at_names_what_is_in_the_way() {
    let mut iovas = mib_at_zero();
    let range = |start, len| IovaRange::from_len(Iova::new(start), len).unwrap();
    iovas.alloc_at(range(16 * P, 2 * P)).unwrap();
    for (start, len) in [(16, 2), (16, 1), (17, 1), (15, 2), (15, 3)] {
        let refused = iovas.alloc_at(range(start * P, len * P)).unwrap_err();
        assert!(matches!(refused, AllocAtError::Taken { hit, .. } if hit == range(16 * P, 2 * P)));
    }
    iovas.alloc_at(range(15 * P, P)).unwrap();
    iovas.alloc_at(range(18 * P, P)).unwrap();
    assert!(matches!(
        iovas.alloc_at(range(0, P)),
        Err(AllocAtError::Outside { .. })
    ));
    assert!(matches!(
        iovas.alloc_at(range(P + 1, P)),
        Err(AllocAtError::Misaligned { .. })
    ));
    iovas.check_invariants();
}

#[test]
fn a_partial_granule_at_the_end_is_never_given() {
    let aperture = IovaRange::new(Iova::new(0), Iova::new(4 * P - 2)).unwrap();
    let mut iovas = IovaAllocator::new(aperture, Granule::Size4K).unwrap();
    assert_eq!(iovas.largest_hole_bytes(), 2 * P);
    assert_eq!(
        iovas.alloc(AllocRequest::of(2 * P)).unwrap().last(),
        Iova::new(3 * P - 1)
    );
    let nothing = IovaRange::new(Iova::new(0), Iova::new(2 * P - 2)).unwrap();
    assert!(IovaAllocator::new(nothing, Granule::Size4K).is_none());
}

#[test]
fn the_top_of_the_64_bit_space_can_be_allocated() {
    let top = IovaRange::new(Iova::new(u64::MAX - 4 * P + 1), Iova::new(u64::MAX)).unwrap();
    let mut iovas = IovaAllocator::new(top, Granule::Size4K).unwrap();
    assert_eq!(iovas.alloc(AllocRequest::of(4 * P)).unwrap(), top);
    iovas.free(top).unwrap();
    iovas.check_invariants();
}

/// The slow, obvious model: one flag a page.
struct Pages(Vec<bool>);

impl Pages {
    fn fits(&self, want: usize, align: usize, end: usize) -> bool {
        (1..=256 - want.min(255)).any(|at| {
            at % align == 0
                && at + want <= end
                && self.0[at..(at + want).min(256)].iter().all(|used| !used)
        })
    }

    fn set(&mut self, range: IovaRange, used: bool) {
        let page = |iova: Iova| usize::try_from(iova.get() / P).unwrap();
        for slot in &mut self.0[page(range.start())..=page(range.last())] {
            assert_ne!(*slot, used, "{range} was given twice or freed twice");
            *slot = used;
        }
    }
}

#[derive(Clone, Debug)]
enum Op {
    Alloc {
        pages: usize,
        align_log2: u32,
        end: usize,
    },
    Free(prop::sample::Index),
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        (
            1usize..24,
            0u32..5,
            prop_oneof![Just(256usize), 1usize..=256]
        )
            .prop_map(|(pages, align_log2, end)| Op::Alloc {
                pages,
                align_log2,
                end
            }),
        any::<prop::sample::Index>().prop_map(Op::Free),
    ]
}

proptest! {
    #[test]
    fn random_operations_agree_with_a_page_by_page_model(ops in prop::collection::vec(op(), 1..200)) {
        let mut iovas = mib_at_zero();
        let mut model = Pages(vec![false; 256]);
        let mut live: Vec<IovaRange> = Vec::new();
        for op in ops {
            match op {
                Op::Alloc { pages, align_log2, end } => {
                    let align = 1usize << align_log2;
                    let got = iovas.alloc(AllocRequest {
                        len_bytes: pages as u64 * P,
                        align_bytes: align as u64 * P,
                        limit: Some(Iova::new(end as u64 * P - 1)),
                    });
                    prop_assert_eq!(got.is_ok(), model.fits(pages, align, end));
                    if let Ok(range) = got {
                        prop_assert!(range.start().get() % (align as u64 * P) == 0);
                        prop_assert!(range.last().get() < end as u64 * P);
                        model.set(range, true);
                        live.push(range);
                    }
                }
                Op::Free(index) if !live.is_empty() => {
                    let range = live.swap_remove(index.index(live.len()));
                    iovas.free(range).unwrap();
                    model.set(range, false);
                }
                Op::Free(_) => {}
            }
            iovas.check_invariants();
        }
    }
}
