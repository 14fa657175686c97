//! What may happen to a domain, and how likely it is.

use proptest::prelude::*;

use super::*;

/// Numbers that name something are taken modulo what there is.
#[derive(Clone, Debug)]
pub(super) enum Op {
    Join(u64, Role, Kind),
    Leave(u64),
    Fence(u64),
    Ack(u64, AckWish),
    /// A view so far back; None: no view any more.
    Pin(u64, Option<u64>),
    Open(u64, usize),
    Register(u64, u64, bool, bool),
    Unregister(u64, usize),
    Map(u64, BatchMode, Vec<MapWish>),
    Unmap(u64, BatchMode, Vec<EndWish>),
    Sync(u64, BatchMode, Vec<SyncWish>),
    Alloc(u64, CoherentSpec),
    Free(u64, usize, Twist),
    Lease(u64, LeaseSpec),
    Release(u64, usize, Twist),
    Scrub(Scrub),
    DeviceWrites(u64, u64, u8),
    DriverWrites(usize, u64, u64, u8),
    SealMemory(usize),
    MapDirect(u64, BatchMode, Vec<DirectWish>),
    UnmapDirect(u64, Vec<IovaRange>),
    ClearMap(u64, Vec<IovaRange>),
    /// None: the table as it is.
    SetMap(u64, Option<Vec<EntryWish>>, Expect),
    ResetBounce(u64, bool),
    Update(u32, Scrub, Vec<IovaRange>, Vec<IovaRange>),
    Translate(IovaRange, Perm),
    Lookup(IovaRange),
}

/// How a session acknowledges.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Frames,
    Pins,
    /// It never translates.
    Nothing,
}

#[derive(Clone, Copy, Debug)]
pub(super) enum AckWish {
    Now,
    Asked,
    Back(u64),
    Ahead(u64),
}

#[derive(Clone, Debug)]
pub(super) struct DirectWish {
    pub(super) memory: usize,
    pub(super) offset: u64,
    pub(super) len_bytes: u64,
    pub(super) perm: Perm,
    pub(super) place: PlaceWish,
}

#[derive(Clone, Copy, Debug)]
pub(super) enum PlaceWish {
    At(u64),
    /// Alignment and limit.
    Anywhere(u64, Option<Iova>),
}

#[derive(Clone, Debug)]
pub(super) struct EntryWish {
    pub(super) range: IovaRange,
    pub(super) memory: usize,
    pub(super) offset: u64,
    pub(super) perm: Perm,
}

/// Which generation a table is expected to have.
#[derive(Clone, Copy, Debug)]
pub(super) enum Expect {
    Anything,
    Now,
    Older(u64),
}

#[derive(Clone, Debug)]
pub(super) struct MapWish {
    pub(super) memory: usize,
    pub(super) spec: MapSpec,
}

#[derive(Clone, Debug)]
pub(super) struct EndWish {
    pub(super) mapping: usize,
    pub(super) twist: Twist,
    pub(super) written_bytes: Option<u64>,
    pub(super) skip_sync: bool,
}

#[derive(Clone, Debug)]
pub(super) struct SyncWish {
    pub(super) mapping: usize,
    pub(super) twist: Twist,
    pub(super) offset: u64,
    pub(super) len_bytes: u64,
    pub(super) target: SyncTarget,
}

/// How a name is made wrong, most often not at all.
#[derive(Clone, Copy, Debug)]
pub(super) enum Twist {
    None,
    Iova,
    Id,
}

fn sessions() -> impl Strategy<Value = u64> {
    prop_oneof![8 => 1_u64..=2, 1 => 3_u64..=5]
}

fn modes() -> impl Strategy<Value = BatchMode> {
    prop_oneof![Just(BatchMode::AllOrNothing), Just(BatchMode::Partial)]
}

fn twists() -> impl Strategy<Value = Twist> {
    prop_oneof![8 => Just(Twist::None), 1 => Just(Twist::Iova), 1 => Just(Twist::Id)]
}

/// Lengths and offsets that love the borders of pages, 0 included.
fn lens() -> impl Strategy<Value = u64> {
    prop_oneof![
        Just(0),
        Just(1),
        Just(P - 1),
        Just(P),
        Just(P + 1),
        Just(2 * P),
        0..3 * P
    ]
}

fn aligns() -> impl Strategy<Value = u64> {
    prop_oneof![6 => Just(0), 1 => Just(1), 1 => Just(2 * P), 1 => Just(4 * P), 1 => Just(3)]
}

fn limits() -> impl Strategy<Value = Option<Iova>> {
    prop_oneof![6 => Just(None), 1 => (0..PAGES * P).prop_map(|at| Some(Iova::new(at)))]
}

fn map_wishes() -> impl Strategy<Value = MapWish> {
    let flags = (
        any::<bool>(),
        prop::bool::weighted(0.2),
        prop::bool::weighted(0.2),
    );
    let directions = prop::sample::select(&DIRECTIONS[..]);
    let places = (aligns(), limits());
    (0_usize..6, lens(), lens(), directions, flags, places).prop_map(
        |(memory, offset, len_bytes, direction, flags, (align_bytes, limit))| {
            let (keep_offset, preserve, skip_sync) = flags;
            let spec = MapSpec {
                keep_offset,
                preserve,
                skip_sync,
                align_bytes,
                limit,
                ..MapSpec::new(MemoryId::new(0), offset, len_bytes, direction)
            };
            MapWish { memory, spec }
        },
    )
}

fn end_wishes() -> impl Strategy<Value = EndWish> {
    let written = prop::option::of(lens());
    (0_usize..8, twists(), written, prop::bool::weighted(0.3)).prop_map(
        |(mapping, twist, written_bytes, skip_sync)| EndWish {
            mapping,
            twist,
            written_bytes,
            skip_sync,
        },
    )
}

fn sync_wishes() -> impl Strategy<Value = SyncWish> {
    let targets = prop_oneof![Just(SyncTarget::ForCpu), Just(SyncTarget::ForDevice)];
    (0_usize..8, twists(), lens(), lens(), targets).prop_map(
        |(mapping, twist, offset, len_bytes, target)| SyncWish {
            mapping,
            twist,
            offset,
            len_bytes,
            target,
        },
    )
}

fn leases() -> impl Strategy<Value = LeaseSpec> {
    // Now and then more than there is, or than can be rounded up.
    let lens = prop_oneof![12 => lens(), 1 => 3 * P..9 * P, 1 => Just(u64::MAX)];
    (lens, aligns(), limits()).prop_map(|(len_bytes, align_bytes, limit)| LeaseSpec {
        place: AllocRequest {
            len_bytes,
            align_bytes,
            limit,
        },
    })
}

fn allocations() -> impl Strategy<Value = CoherentSpec> {
    (lens(), aligns(), limits(), any::<bool>()).prop_map(
        |(len_bytes, align_bytes, limit, persistent)| CoherentSpec {
            place: AllocRequest {
                len_bytes,
                align_bytes,
                limit,
            },
            persistent,
        },
    )
}

/// Inside one aperture: behind its end another memory begins.
fn device_writes_anywhere() -> impl Strategy<Value = Op> {
    (0..PAGES * P, lens(), any::<u8>()).prop_map(|(at, len, byte)| {
        let is_bounce = at < BOUNCE_PAGES * P;
        let end = if is_bounce { BOUNCE_PAGES } else { PAGES } * P;
        Op::DeviceWrites(at, len.min(end - at), byte)
    })
}

/// Sessions 1 and 2 drive, mostly; 0 is the owner.
fn actors() -> impl Strategy<Value = u64> {
    prop_oneof![8 => 0_u64..=2, 1 => 3_u64..=5]
}

fn perms() -> impl Strategy<Value = Perm> {
    prop_oneof![
        4 => Just(Perm::ReadWrite),
        1 => Just(Perm::Read),
        1 => Just(Perm::Write)
    ]
}

/// Mostly whole pages of a small space, and now and then a number that is wrong
/// by itself.
fn numbers(pages: u64) -> impl Strategy<Value = u64> {
    prop_oneof![
        30 => (0..pages).prop_map(|page| page * P),
        1 => Just(1),
        1 => 0..pages * P,
        1 => Just(u64::MAX - P + 1),
        1 => Just(u64::MAX),
        1 => Just(1 << 63),
    ]
}

fn direct_wishes() -> impl Strategy<Value = DirectWish> {
    let align = prop_oneof![8 => aligns(), 1 => Just(1 << 63)];
    let limit =
        prop_oneof![3 => Just(None), 1 => (0..=LIMIT + P).prop_map(|at| Some(Iova::new(at)))];
    let places = prop_oneof![
        numbers(LIMIT / P + 2).prop_map(PlaceWish::At),
        (align, limit).prop_map(|(align, limit)| PlaceWish::Anywhere(align, limit)),
    ];
    let offsets = prop_oneof![3 => Just(0), 1 => numbers(3)];
    let lens = prop_oneof![3 => Just(P), 1 => numbers(4)];
    (0_usize..6, offsets, lens, perms(), places).prop_map(
        |(memory, offset, len_bytes, perm, place)| DirectWish {
            memory,
            offset,
            len_bytes,
            perm,
            place,
        },
    )
}

/// Ranges that love the borders of pages, and some that are everything.
fn ranges() -> impl Strategy<Value = IovaRange> {
    let pages = 0..=LIMIT / P + 1;
    let edges = (pages, 0_u64..12, 0_u64..6, 0_u64..6);
    let odd = |odd| if odd < 2 { odd } else { 0 };
    let around = edges.prop_map(move |(page, count, before, behind)| {
        let start = (page * P).saturating_sub(odd(before));
        let last = (page + count) * P + P - 1 - odd(behind);
        range(start, last.max(start))
    });
    prop_oneof![
        12 => around,
        2 => (0..LIMIT + P).prop_map(|at| range(at, at)),
        1 => Just(range(0, u64::MAX)),
        1 => Just(range(0, LIMIT)),
        1 => Just(range(u64::MAX, u64::MAX)),
    ]
}

fn entry_wishes() -> impl Strategy<Value = EntryWish> {
    let whole = (0..=LIMIT / P, 0_u64..2);
    let ranges = prop_oneof![
        20 => whole.prop_map(|(page, more)| pages(page, page + more)),
        1 => ranges(),
    ];
    let offsets = prop_oneof![6 => Just(0), 1 => numbers(3)];
    (ranges, 0_usize..6, offsets, perms()).prop_map(|(range, memory, offset, perm)| EntryWish {
        range,
        memory,
        offset,
        perm,
    })
}

fn restrictions() -> impl Strategy<Value = Vec<IovaRange>> {
    prop_oneof![
        2 => Just(Vec::new()),
        3 => prop::collection::vec(ranges(), 1..4)
    ]
}

fn direct_ops() -> impl Strategy<Value = Op> {
    use prop::collection::vec;
    let expect = prop_oneof![
        2 => Just(Expect::Anything),
        1 => Just(Expect::Now),
        1 => (0_u64..5).prop_map(Expect::Older)
    ];
    let tables = prop_oneof![
        1 => Just(None),
        4 => vec(entry_wishes(), 0..5).prop_map(Some)
    ];
    let scrubs = prop_oneof![Just(Scrub::OnMap), Just(Scrub::OnUnmap)];
    prop_oneof![
        16 => (actors(), modes(), vec(direct_wishes(), 1..4))
            .prop_map(|(who, mode, wishes)| Op::MapDirect(who, mode, wishes)),
        4 => (actors(), vec(ranges(), 0..3)).prop_map(|(who, ranges)| Op::UnmapDirect(who, ranges)),
        3 => (actors(), vec(ranges(), 0..3)).prop_map(|(who, ranges)| Op::ClearMap(who, ranges)),
        4 => (actors(), tables, expect)
            .prop_map(|(who, table, expect)| Op::SetMap(who, table, expect)),
        1 => (actors(), any::<bool>()).prop_map(|(who, force)| Op::ResetBounce(who, force)),
        3 => (0_u32..10, scrubs, restrictions(), restrictions())
            .prop_map(|(quota, scrub, reserved, allowed)| {
                Op::Update(quota, scrub, reserved, allowed)
            }),
        8 => (ranges(), perms()).prop_map(|(range, want)| Op::Translate(range, want)),
        4 => ranges().prop_map(Op::Lookup),
    ]
}

pub(super) fn kinds() -> impl Strategy<Value = Kind> {
    prop_oneof![
        2 => Just(Kind::Nothing),
        2 => Just(Kind::Pins),
        1 => Just(Kind::Frames),
    ]
}

fn reader_ops() -> impl Strategy<Value = Op> {
    let acks = prop_oneof![
        8 => Just(AckWish::Now),
        4 => Just(AckWish::Asked),
        4 => (0_u64..6).prop_map(AckWish::Back),
        1 => (1_u64..3).prop_map(AckWish::Ahead),
    ];
    let views = prop_oneof![2 => Just(None), 3 => (0_u64..4).prop_map(Some)];
    prop_oneof![
        8 => (1_u64..=5, acks).prop_map(|(who, wish)| Op::Ack(who, wish)),
        4 => (1_u64..=5, views).prop_map(|(who, back)| Op::Pin(who, back)),
        4 => (1_u64..=5, 0_usize..6).prop_map(|(who, which)| Op::Open(who, which)),
        1 => (1_u64..=5).prop_map(Op::Fence),
    ]
}

pub(super) fn ops() -> impl Strategy<Value = Op> {
    use prop::collection::vec;
    let roles = prop_oneof![4 => Just(Role::Driver), 1 => Just(Role::Device)];
    prop_oneof![
        4 => (1_u64..=5, roles, kinds()).prop_map(|(who, role, kind)| Op::Join(who, role, kind)),
        16 => reader_ops(),
        1 => (1_u64..=5).prop_map(Op::Leave),
        3 => (sessions(), 1_u64..=3, prop::bool::weighted(0.8), prop::bool::weighted(0.3))
            .prop_map(|(who, pages, writable, persistent)| {
                Op::Register(who, pages, writable, persistent)
            }),
        1 => (sessions(), 0_usize..6).prop_map(|(who, which)| Op::Unregister(who, which)),
        10 => (sessions(), modes(), vec(map_wishes(), 1..4))
            .prop_map(|(who, mode, wishes)| Op::Map(who, mode, wishes)),
        6 => (sessions(), modes(), vec(end_wishes(), 1..4))
            .prop_map(|(who, mode, wishes)| Op::Unmap(who, mode, wishes)),
        5 => (sessions(), modes(), vec(sync_wishes(), 1..4))
            .prop_map(|(who, mode, wishes)| Op::Sync(who, mode, wishes)),
        3 => (sessions(), allocations()).prop_map(|(who, spec)| Op::Alloc(who, spec)),
        2 => (sessions(), 0_usize..8, twists())
            .prop_map(|(who, which, twist)| Op::Free(who, which, twist)),
        5 => (sessions(), leases()).prop_map(|(who, spec)| Op::Lease(who, spec)),
        3 => (sessions(), 0_usize..8, twists())
            .prop_map(|(who, which, twist)| Op::Release(who, which, twist)),
        1 => prop_oneof![Just(Scrub::OnMap), Just(Scrub::OnUnmap)].prop_map(Op::Scrub),
        5 => device_writes_anywhere(),
        3 => (0_usize..6, lens(), lens(), any::<u8>())
            .prop_map(|(which, at, len, byte)| Op::DriverWrites(which, at, len, byte)),
        1 => (0_usize..6).prop_map(Op::SealMemory),
        16 => direct_ops(),
    ]
}

/// Few pages, two memories, and devices that come, open them, and are fenced: what
/// a ghost can reach is decided here.
pub(super) fn haunting_ops() -> impl Strategy<Value = Op> {
    use prop::collection::vec;
    // Above the apertures, wherever they begin.
    let some_pages = || (24_u64..32, 0_u64..3).prop_map(|(page, more)| pages(page, page + more));
    let offsets = || prop_oneof![4 => Just(0), 1 => (0_u64..2).prop_map(|page| page * P)];
    let wishes =
        (0_usize..2, offsets(), 1_u64..=2, 24_u64..32).prop_map(|(memory, offset, count, page)| {
            DirectWish {
                memory,
                offset,
                len_bytes: count * P,
                perm: Perm::ReadWrite,
                place: PlaceWish::At(page * P),
            }
        });
    let entries =
        (some_pages(), 0_usize..2, offsets()).prop_map(|(range, memory, offset)| EntryWish {
            range,
            memory,
            offset,
            perm: Perm::ReadWrite,
        });
    let kinds = prop_oneof![Just(Kind::Pins), Just(Kind::Frames)];
    let acks = prop_oneof![3 => Just(AckWish::Now), 1 => (0_u64..4).prop_map(AckWish::Back)];
    prop_oneof![
        4 => (3_u64..=5, kinds).prop_map(|(who, kind)| Op::Join(who, Role::Device, kind)),
        8 => (3_u64..=5, 0_usize..2).prop_map(|(who, which)| Op::Open(who, which)),
        3 => (3_u64..=5).prop_map(Op::Fence),
        1 => (3_u64..=5).prop_map(Op::Leave),
        4 => (3_u64..=5, acks).prop_map(|(who, wish)| Op::Ack(who, wish)),
        8 => vec(wishes, 1..3)
            .prop_map(|wishes| Op::MapDirect(0, BatchMode::AllOrNothing, wishes)),
        4 => vec(some_pages(), 1..3).prop_map(|ranges| Op::ClearMap(0, ranges)),
        8 => vec(entries, 0..3)
            .prop_map(|table| Op::SetMap(0, Some(table), Expect::Anything)),
        1 => (6_u32..24).prop_map(|quota| Op::Update(quota, Scrub::OnMap, vec![], vec![])),
    ]
}
