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

#[test]
fn what_waits_in_magazines_strands_no_memory() {
    let mut iovas = mib_at_zero();
    let pages: Vec<_> = (0..255)
        .map(|_| iovas.alloc(AllocRequest::of(P)).unwrap())
        .collect();
    for page in pages {
        iovas.free(page).unwrap();
    }
    assert_eq!(iovas.largest_hole_bytes(), 255 * P);
    let all = iovas.alloc(AllocRequest::of(255 * P)).unwrap();
    assert_eq!(all.start(), Iova::new(P));
    iovas.check_invariants();
}

#[test]
fn asking_for_the_largest_hole_changes_no_later_answer() {
    let (mut asked, mut other) = (mib_at_zero(), mib_at_zero());
    for iovas in [&mut asked, &mut other] {
        let pages: Vec<_> = (0..9)
            .map(|_| iovas.alloc(AllocRequest::of(P)).unwrap())
            .collect();
        for at in [2, 7, 4, 3] {
            iovas.free(pages[at]).unwrap();
        }
    }
    assert_eq!(asked.largest_hole_bytes(), 246 * P);
    let next = |iovas: &mut IovaAllocator| iovas.alloc(AllocRequest::of(P)).unwrap();
    assert_eq!(next(&mut asked), next(&mut other));
}

#[test]
fn what_waits_in_a_magazine_can_be_allocated_at_its_place_and_not_freed() {
    let mut iovas = mib_at_zero();
    let first = iovas.alloc(AllocRequest::of(2 * P)).unwrap();
    let second = iovas.alloc(AllocRequest::of(2 * P)).unwrap();
    iovas.free(first).unwrap();
    iovas.free(second).unwrap();
    let start = first.start();
    assert_eq!(iovas.free(first), Err(FreeError::NotAllocated { start }));
    let both = IovaRange::new(first.start(), second.last()).unwrap();
    iovas.alloc_at(both).unwrap();
    assert_eq!(iovas.live().collect::<Vec<_>>(), [both]);
    iovas.check_invariants();
}

#[test]
fn neighbours_are_not_freed_as_one() {
    let mut iovas = mib_at_zero();
    for (first_len, second_len) in [(1, 1), (3, 90), (70, 70), (64, 64), (100, 1)] {
        let first = iovas.alloc(AllocRequest::of(first_len * P)).unwrap();
        let second = iovas.alloc(AllocRequest::of(second_len * P)).unwrap();
        let range = IovaRange::new(first.start(), second.last()).unwrap();
        let allocated = first;
        let refused = iovas.free(range);
        assert_eq!(refused, Err(FreeError::WrongSize { range, allocated }));
        iovas.free(first).unwrap();
        iovas.free(second).unwrap();
        // Nothing waits in magazines: the next pair begins at page 1 again.
        assert!(iovas.alloc(AllocRequest::of(256 * P)).is_err());
    }
}

#[test]
fn long_allocations_are_checked_and_named_as_short_ones_are() {
    let aperture = IovaRange::from_len(Iova::new(1 << 60), 1 << 43).unwrap();
    let mut iovas = IovaAllocator::new(aperture, Granule::Size4K).unwrap();
    let range = |start: u64, len| IovaRange::from_len(Iova::new((1 << 60) + start), len).unwrap();
    let long = iovas.alloc(AllocRequest::of(1 << 42)).unwrap();
    iovas.alloc_at(range((1 << 43) - P, P)).unwrap();
    assert_eq!(iovas.live_count(), 2);
    let part = range(0, P);
    assert_eq!(
        iovas.free(part),
        Err(FreeError::WrongSize {
            range: part,
            allocated: long
        })
    );
    let inside = range(1 << 30, P);
    assert!(matches!(iovas.alloc_at(inside), Err(AllocAtError::Taken { hit, .. }) if hit == long));
    assert!(matches!(
        iovas.free(inside),
        Err(FreeError::NotAllocated { .. })
    ));
    assert!(iovas.heap_bytes() < 8 << 10, "{}", iovas.heap_bytes());
    iovas.free(long).unwrap();
    iovas.check_invariants();
}

#[test]
fn an_aperture_of_one_usable_granule_works() {
    for granule in [Granule::Size4K, Granule::Size64K, Granule::Size2M] {
        let aperture = IovaRange::from_len(Iova::new(0), 2 * granule.bytes()).unwrap();
        let mut iovas = IovaAllocator::new(aperture, granule).unwrap();
        let only = iovas.alloc(AllocRequest::of(1)).unwrap();
        assert_eq!(only.start(), Iova::new(granule.bytes()));
        assert!(iovas.alloc(AllocRequest::of(1)).is_err());
        iovas.free(only).unwrap();
        let aligned_twice = AllocRequest {
            align_bytes: 2 * granule.bytes(),
            ..AllocRequest::of(1)
        };
        assert!(iovas.alloc(aligned_twice).is_err());
        iovas.alloc_at(only).unwrap();
        iovas.check_invariants();
    }
}

#[test]
fn memory_grows_with_what_is_allocated_and_not_with_the_space() {
    let idle = |bytes: u64| {
        let aperture = IovaRange::from_len(Iova::new(0), bytes).unwrap();
        let iovas = IovaAllocator::new(aperture, Granule::Size4K).unwrap();
        size_of::<IovaAllocator>() + iovas.heap_bytes()
    };
    assert!(idle(64 << 20) < 3 << 10, "{}", idle(64 << 20));
    assert_eq!(idle(64 << 20), idle(1 << 62));

    let mut iovas = mib_at_zero();
    let fresh = iovas.heap_bytes();
    while iovas.alloc(AllocRequest::of(P)).is_ok() {}
    assert!(iovas.heap_bytes() - fresh < 255 * 36);
}

#[test]
fn of_an_aperture_beyond_2_to_the_32_granules_the_lower_part_is_given() {
    let aperture = IovaRange::from_len(Iova::new(0), 1 << 52).unwrap();
    let mut iovas = IovaAllocator::new(aperture, Granule::Size4K).unwrap();
    let most = iovas.largest_hole_bytes();
    assert_eq!(most, ((1 << 32) - 4) * P);
    let all = iovas.alloc(AllocRequest::of(most)).unwrap();
    assert_eq!(all.len_bytes(), Some(most));
    let beyond = IovaRange::from_len(Iova::new(1 << 50), P).unwrap();
    let start = beyond.start();
    let refused = iovas.alloc_at(beyond);
    assert!(matches!(refused, Err(AllocAtError::Outside { usable, .. }) if usable == all));
    assert_eq!(iovas.free(beyond), Err(FreeError::NotAllocated { start }));
    assert!(iovas.alloc(AllocRequest::of(1 << 50)).is_err());
    iovas.free(all).unwrap();
    iovas.check_invariants();
}

/// Holes of those lengths, with live granules between, in their order and with
/// the last of them freed last.
fn with_holes(lens: impl Iterator<Item = u64>) -> IovaAllocator {
    let aperture = IovaRange::from_len(Iova::new(0), 1 << 32).unwrap();
    let mut iovas = IovaAllocator::new(aperture, Granule::Size4K).unwrap();
    let mut alloc = |granules: u64| iovas.alloc(AllocRequest::of(granules * P)).unwrap();
    let mut holes = Vec::new();
    for len in lens {
        holes.push(alloc(len));
        alloc(1);
    }
    let rest = iovas.largest_hole_bytes();
    iovas.alloc(AllocRequest::of(rest)).unwrap();
    holes.iter().for_each(|hole| iovas.free(*hole).unwrap());
    iovas
}

#[test]
fn the_one_long_hole_that_fits_is_found_below_many_that_almost_do() {
    let mut iovas = with_holes(std::iter::once(285).chain([260; 100]));
    assert_eq!(iovas.largest_hole_bytes(), 285 * P);
    let refused = iovas.alloc(AllocRequest::of(286 * P)).unwrap_err();
    assert!(
        matches!(refused, AllocError::NoSpace { largest_hole_bytes, .. } if largest_hole_bytes == 285 * P)
    );
    iovas.alloc(AllocRequest::of(285 * P)).unwrap();
    assert!(iovas.alloc(AllocRequest::of(261 * P)).is_err());
    assert_eq!(iovas.largest_hole_bytes(), 260 * P);
    iovas.check_invariants();
}

#[test]
fn plain_requests_are_refused_without_an_index_of_addresses() {
    let mut iovas = with_holes((1..=200).map(|at| 1 + at % 7));
    let before = iovas.heap_bytes();
    assert!(iovas.alloc(AllocRequest::of(8 * P)).is_err());
    assert_eq!(iovas.heap_bytes(), before);
    assert!(iovas.alloc(aligned(7 * P, 1 << 20)).is_err());
    assert!(iovas.heap_bytes() > before, "that took one");
    iovas.check_invariants();
}

/// Small spaces of every kind, each with at most 400 granules.
fn spaces() -> impl Strategy<Value = (IovaRange, Granule)> {
    let granules = prop_oneof![
        3 => Just(Granule::Size4K),
        1 => Just(Granule::Size64K),
        1 => Just(Granule::Size2M)
    ];
    let places = 0..4_u8;
    (granules, places, 2..400_u64, 0..3_u64, 0..3_u64).prop_map(
        |(granule, place, count, head, tail)| {
            let (size, len) = (granule.bytes(), count * granule.bytes());
            let start = match place {
                0 => 0,
                1 => 4000 * size,
                2 => (1 << 45) + 300 * size,
                _ => u64::MAX - len + 1,
            };
            let (start, last) = (start + head, start + (len - 1) - tail);
            let range = IovaRange::new(Iova::new(start), Iova::new(last)).unwrap();
            (range, granule)
        },
    )
}

/// The slow, obvious model: one flag a granule, and a list of what is live.
struct Model {
    granule: u64,
    first: u64,
    free: Vec<bool>,
    live: Vec<IovaRange>,
    dead: Vec<IovaRange>,
}

impl Model {
    fn new(space: IovaRange, granule: Granule) -> Model {
        let size = u128::from(granule.bytes());
        let (start, end) = (
            u128::from(space.start().get()),
            u128::from(space.last().get()) + 1,
        );
        let first = start.div_ceil(size).max(1);
        let count = (end / size).saturating_sub(first);
        Model {
            granule: granule.bytes(),
            first: u64::try_from(first).unwrap(),
            free: vec![true; usize::try_from(count).unwrap()],
            live: Vec::new(),
            dead: Vec::new(),
        }
    }

    /// What may be used below a limit, from each granule on.
    fn run(&self, at: usize, limit: Option<Iova>) -> usize {
        let is_below = |at: usize| {
            let last = (self.first + at as u64) * self.granule + (self.granule - 1);
            limit.is_none_or(|limit| last <= limit.get())
        };
        let rest = self.free[at..].iter().enumerate();
        rest.take_while(|(on, free)| **free && is_below(at + on))
            .count()
    }

    fn check_alloc(&mut self, request: AllocRequest, answer: Result<IovaRange, AllocError>) {
        let want = usize::try_from(request.len_bytes.div_ceil(self.granule)).unwrap();
        let align = request.align_bytes.max(self.granule);
        let start = |at: usize| (self.first + at as u64) * self.granule;
        let mut places = (0..self.free.len())
            .filter(|at| start(*at).is_multiple_of(align) && self.run(*at, request.limit) >= want);
        match answer {
            Ok(range) => {
                assert!(places.any(|at| start(at) == range.start().get()), "{range}");
                assert_eq!(range.len_bytes(), Some(want as u64 * self.granule));
                assert_ne!(range.start().get(), 0);
                self.set(range, false);
            }
            Err(refused) => {
                assert_eq!(places.next(), None, "{refused}");
                let longest = (0..self.free.len())
                    .map(|at| self.run(at, request.limit))
                    .max();
                let expected = AllocError::NoSpace {
                    want_bytes: request.len_bytes,
                    align_bytes: align,
                    largest_hole_bytes: longest.unwrap_or(0) as u64 * self.granule,
                };
                assert_eq!(refused, expected);
            }
        }
    }

    fn check_alloc_at(&mut self, range: IovaRange, answer: Result<(), AllocAtError>) {
        let hit = self
            .live
            .iter()
            .copied()
            .filter(|live| live.overlaps(range));
        match hit.min_by_key(|live| live.start()) {
            Some(hit) => assert_eq!(answer, Err(AllocAtError::Taken { range, hit })),
            None => {
                assert_eq!(answer, Ok(()));
                self.set(range, false);
            }
        }
    }

    fn check_free(&mut self, range: IovaRange, answer: Result<(), FreeError>) {
        let start = range.start();
        match self.live.iter().copied().find(|live| live.start() == start) {
            Some(live) if live == range => {
                assert_eq!(answer, Ok(()));
                self.set(range, true);
            }
            Some(allocated) => {
                assert_eq!(answer, Err(FreeError::WrongSize { range, allocated }));
            }
            None => assert_eq!(answer, Err(FreeError::NotAllocated { start })),
        }
    }

    fn set(&mut self, range: IovaRange, free: bool) {
        let at = |iova: Iova| usize::try_from(iova.get() / self.granule - self.first).unwrap();
        for slot in &mut self.free[at(range.start())..=at(range.last())] {
            assert_ne!(*slot, free, "{range} was given twice or freed twice");
            *slot = free;
        }
        if free {
            self.live.retain(|live| *live != range);
            self.dead.push(range);
        } else {
            self.live.push(range);
        }
    }

    /// So many granules of the space from one of them on, or up to its end.
    fn range(&self, from: usize, count: usize) -> IovaRange {
        let (from, len) = (from % self.free.len(), self.free.len());
        let last = (from + count).min(len) - 1;
        let start = (self.first + from as u64) * self.granule;
        let last = (self.first + last as u64) * self.granule + (self.granule - 1);
        IovaRange::new(Iova::new(start), Iova::new(last)).unwrap()
    }

    fn check_whole(&mut self, iovas: &IovaAllocator) {
        iovas.check_invariants();
        self.live.sort_by_key(|live| live.start());
        assert!(iovas.live().eq(self.live.iter().copied()));
        assert_eq!(iovas.live_count(), self.live.len());
        let used = self.free.iter().filter(|free| !**free).count();
        assert_eq!(iovas.used_bytes(), used as u64 * self.granule);
        let longest = (0..self.free.len()).map(|at| self.run(at, None)).max();
        assert_eq!(
            iovas.largest_hole_bytes(),
            longest.unwrap_or(0) as u64 * self.granule
        );
    }
}

#[derive(Clone, Debug)]
enum Op {
    /// Granules, binary logarithm of the alignment in granules, last granule.
    Alloc(u64, u32, Option<usize>),
    AllocAt(usize, usize),
    Free(prop::sample::Index),
    /// Of a live range so many granules, or what was freed already.
    FreeWrongly(prop::sample::Index, usize),
    FreeAll,
}

fn op() -> impl Strategy<Value = Op> {
    let lens = prop_oneof![4 => 1..4_u64, 2 => 1..40_u64, 1 => 1..400_u64];
    let aligns = prop_oneof![3 => Just(0_u32), 1 => 0..10_u32];
    let limits = prop_oneof![3 => Just(None), 1 => (0..400_usize).prop_map(Some)];
    prop_oneof![
        12 => (lens, aligns, limits).prop_map(|(len, align, limit)| Op::Alloc(len, align, limit)),
        2 => (0..400_usize, 1..20_usize).prop_map(|(from, len)| Op::AllocAt(from, len)),
        10 => any::<prop::sample::Index>().prop_map(Op::Free),
        2 => (any::<prop::sample::Index>(), 0..300_usize)
            .prop_map(|(which, len)| Op::FreeWrongly(which, len)),
        1 => Just(Op::FreeAll),
    ]
}

/// What no address is asked for.
fn plain_op() -> impl Strategy<Value = Op> {
    let lens = prop_oneof![4 => 1..4_u64, 2 => 1..40_u64];
    prop_oneof![
        12 => lens.prop_map(|len| Op::Alloc(len, 0, None)),
        8 => any::<prop::sample::Index>().prop_map(Op::Free),
    ]
}

fn run(iovas: &mut IovaAllocator, model: &mut Model, op: &Op) {
    match *op {
        Op::Alloc(granules, align, limit) => {
            let request = AllocRequest {
                len_bytes: (granules - 1) * model.granule + 1,
                align_bytes: if align == 0 {
                    0
                } else {
                    model.granule << align
                },
                limit: limit.map(|at| model.range(at, 1).last()),
            };
            model.check_alloc(request, iovas.alloc(request));
        }
        Op::AllocAt(from, count) => {
            let range = model.range(from, count);
            model.check_alloc_at(range, iovas.alloc_at(range));
        }
        Op::Free(which) if !model.live.is_empty() => {
            let range = *which.get(&model.live);
            model.check_free(range, iovas.free(range));
        }
        Op::FreeWrongly(which, count) if !model.live.is_empty() && count > 0 => {
            let at = which.get(&model.live).start().get() / model.granule - model.first;
            let range = model.range(usize::try_from(at).unwrap(), count);
            model.check_free(range, iovas.free(range));
        }
        Op::FreeWrongly(which, _) if !model.dead.is_empty() => {
            let range = *which.get(&model.dead);
            model.check_free(range, iovas.free(range));
        }
        Op::FreeAll => {
            for range in model.live.clone() {
                model.check_free(range, iovas.free(range));
            }
        }
        Op::Free(_) | Op::FreeWrongly(..) => {}
    }
}

proptest! {
    #[test]
    fn random_operations_agree_with_a_list_of_granules(
        (space, granule) in spaces(),
        ops in prop::collection::vec(op(), 1..150),
    ) {
        let mut model = Model::new(space, granule);
        let Some(mut iovas) = IovaAllocator::new(space, granule) else {
            prop_assert!(model.free.is_empty());
            return Ok(());
        };
        for op in &ops {
            run(&mut iovas, &mut model, op);
            model.check_whole(&iovas);
        }
    }

    #[test]
    fn addresses_may_be_asked_for_at_any_time(
        (space, granule) in spaces(),
        before in prop::collection::vec(plain_op(), 50..200),
        after in prop::collection::vec(op(), 1..50),
    ) {
        let mut model = Model::new(space, granule);
        let Some(mut iovas) = IovaAllocator::new(space, granule) else {
            return Ok(());
        };
        before.iter().for_each(|op| run(&mut iovas, &mut model, op));
        for op in &after {
            run(&mut iovas, &mut model, op);
            model.check_whole(&iovas);
        }
    }

    #[test]
    fn the_same_calls_get_the_same_answers(
        (space, granule) in spaces(),
        ops in prop::collection::vec(op(), 1..150),
    ) {
        let again = || {
            let mut model = Model::new(space, granule);
            let mut iovas = IovaAllocator::new(space, granule)?;
            ops.iter().for_each(|op| run(&mut iovas, &mut model, op));
            Some((model.live, model.dead))
        };
        prop_assert_eq!(again(), again());
    }
}
