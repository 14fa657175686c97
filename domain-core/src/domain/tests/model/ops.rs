//! What may happen to a domain, and how likely it is.

use proptest::prelude::*;

use super::*;

/// Numbers that name something are taken modulo what there is.
#[derive(Clone, Debug)]
pub(super) enum Op {
    Join(u64, Role),
    Leave(u64),
    Register(u64, u64, bool),
    Unregister(u64, usize),
    Map(u64, BatchMode, Vec<MapWish>),
    Unmap(u64, BatchMode, Vec<EndWish>),
    Sync(u64, BatchMode, Vec<SyncWish>),
    Alloc(u64, CoherentSpec),
    Free(u64, usize, Twist),
    Scrub(Scrub),
    DeviceWrites(u64, u64, u8),
    DriverWrites(usize, u64, u64, u8),
    SealMemory(usize),
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

pub(super) fn ops() -> impl Strategy<Value = Op> {
    use prop::collection::vec;
    let roles = prop_oneof![4 => Just(Role::Driver), 1 => Just(Role::Device)];
    prop_oneof![
        3 => (1_u64..=5, roles).prop_map(|(who, role)| Op::Join(who, role)),
        1 => (1_u64..=5).prop_map(Op::Leave),
        3 => (sessions(), 1_u64..=3, prop::bool::weighted(0.8))
            .prop_map(|(who, pages, writable)| Op::Register(who, pages, writable)),
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
        1 => prop_oneof![Just(Scrub::OnMap), Just(Scrub::OnUnmap)].prop_map(Op::Scrub),
        5 => device_writes_anywhere(),
        3 => (0_usize..6, lens(), lens(), any::<u8>())
            .prop_map(|(which, at, len, byte)| Op::DriverWrites(which, at, len, byte)),
        1 => (0_usize..6).prop_map(Op::SealMemory),
    ]
}
