//! The table of errors, DESIGN.md section 4, row by row: code, reason and
//! numbers; and that what was refused leaves no trace.

use domaind_tests::node::{self, spec};
use domaind_tests::raw::{Memory, Wire, attach, hello, register, unmap_entry};
use domaind_tests::refusal::{answer, assert_numbers};
use domaind_tests::v1::Direction::{Bidirectional, FromDevice, ToDevice};
use domaind_tests::v1::client_frame::Body as Ask;
use domaind_tests::v1::domain_service_client::DomainServiceClient;
use domaind_tests::v1::{self, DomainSpec, MapEntry, SyncTarget, map_result};
use domaind_tests::{Code, Node, P, Raw, Reason, Refused, files, refused};

const HALF_MEMORY: u64 = 4 * P;

/// A driver that holds one mapping and one ring, so that nothing is empty.
struct Bench {
    node: Node,
    driver: Raw,
    memory: Memory,
    mapping: v1::StreamingMapping,
    ring: v1::AllocCoherentResponse,
}

impl Bench {
    async fn new() -> Bench {
        let node = Node::start().await;
        node.domain("d0").await;
        let mut driver = Raw::driver(&node, "d0").await;
        let memory = driver.memory(2 * HALF_MEMORY).await;
        let entry = memory.entry(0, 5_000, Bidirectional);
        let mapping = driver.map(entry).await.unwrap();
        let ring = driver.alloc_len(100).await.unwrap();
        Bench {
            node,
            driver,
            memory,
            mapping,
            ring,
        }
    }

    fn entry(&self) -> MapEntry {
        self.memory.entry(0, P, ToDevice)
    }

    /// Where a mapping would go now: a good map, undone.
    async fn next_iova(&self) -> u64 {
        let mapping = self.driver.map(self.entry()).await.unwrap();
        self.driver.unmap(&mapping, None).await.unwrap();
        mapping.iova
    }

    /// This map is refused, and leaves no trace: the usage is the same, and
    /// the next map goes where it would have gone.
    async fn map_refused(&self, entry: MapEntry, code: Code, reason: Reason) -> v1::Refusal {
        let (usage, next) = (self.node.usage("d0").await, self.next_iova().await);
        let refusal = refused(self.driver.map(entry).await, code, reason);
        assert_eq!(self.node.usage("d0").await, usage, "{refusal:?}");
        assert_eq!(self.next_iova().await, next, "{refusal:?}");
        assert_eq!(refusal.metadata["entry_index"], "0", "{refusal:?}");
        refusal
    }

    /// This unmap is refused, and the mapping is as it was.
    async fn unmap_refused(
        &self,
        entry: v1::UnmapEntry,
        code: Code,
        reason: Reason,
    ) -> v1::Refusal {
        let usage = self.node.usage("d0").await;
        let refusal = refused(
            self.driver.unmap_all(vec![entry], false).await,
            code,
            reason,
        );
        assert_eq!(self.node.usage("d0").await, usage, "{refusal:?}");
        assert_eq!(refusal.metadata["entry_index"], "0", "{refusal:?}");
        refusal
    }
}

// ---- Domains

/// D1: each refused plan, with the rounded numbers; nothing is created.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn plans_that_cannot_be_are_refused_with_the_rounded_numbers() {
    let node = Node::start().await;
    let before = node.counts().await;
    let good = spec(1 << 20, 1 << 20);
    type Row = (
        DomainSpec,
        Code,
        Reason,
        &'static [(&'static str, &'static str)],
    );
    let table: Vec<Row> = vec![
        (
            DomainSpec {
                bounce_bytes: Some(P),
                ..good.clone()
            },
            Code::InvalidArgument,
            Reason::ApertureTooSmall,
            &[("aperture_bytes", "4096"), ("granule_bytes", "4096")],
        ),
        (
            DomainSpec {
                coherent_bytes: Some(1),
                ..good.clone()
            },
            Code::InvalidArgument,
            Reason::ApertureTooSmall,
            &[("aperture_bytes", "4096"), ("granule_bytes", "4096")],
        ),
        (
            DomainSpec {
                bounce_bytes: Some(40_000),
                granule_bytes: 65_536,
                ..good.clone()
            },
            Code::InvalidArgument,
            Reason::ApertureTooSmall,
            &[("aperture_bytes", "65536"), ("granule_bytes", "65536")],
        ),
        (
            DomainSpec {
                aperture_base: 4_097,
                ..good.clone()
            },
            Code::InvalidArgument,
            Reason::Misaligned,
            &[("aperture_base", "0x1001"), ("granule_bytes", "4096")],
        ),
        (
            DomainSpec {
                aperture_base: 4_096,
                granule_bytes: 2 << 20,
                bounce_bytes: Some(4 << 20),
                ..good.clone()
            },
            Code::InvalidArgument,
            Reason::Misaligned,
            &[("aperture_base", "0x1000"), ("granule_bytes", "2097152")],
        ),
        (
            // One byte too many, after rounding up.
            DomainSpec {
                bounce_bytes: Some((1 << 20) + 1),
                coherent_bytes: Some(0),
                iova_limit: Some((1 << 20) + 4_094),
                ..good.clone()
            },
            Code::OutOfRange,
            Reason::PastIovaLimit,
            &[("aperture_last", "0x100fff"), ("iova_limit", "0x100ffe")],
        ),
        (
            DomainSpec {
                iova_limit: Some((2 << 20) - 2),
                ..good.clone()
            },
            Code::OutOfRange,
            Reason::PastIovaLimit,
            &[("aperture_last", "0x1fffff"), ("iova_limit", "0x1ffffe")],
        ),
        (
            DomainSpec {
                aperture_base: u64::MAX - 4_095,
                iova_limit: Some(u64::MAX),
                ..good.clone()
            },
            Code::OutOfRange,
            Reason::AddressOverflow,
            &[],
        ),
        (
            DomainSpec {
                bounce_bytes: Some(u64::MAX),
                iova_limit: Some(u64::MAX),
                ..good.clone()
            },
            Code::OutOfRange,
            Reason::AddressOverflow,
            &[],
        ),
        (
            DomainSpec {
                granule_bytes: 8_192,
                ..good.clone()
            },
            Code::InvalidArgument,
            Reason::Malformed,
            &[],
        ),
        (
            DomainSpec {
                backing: 99,
                ..good.clone()
            },
            Code::InvalidArgument,
            Reason::Malformed,
            &[],
        ),
        (
            DomainSpec {
                scrub: -1,
                ..good.clone()
            },
            Code::InvalidArgument,
            Reason::Malformed,
            &[],
        ),
    ];
    for (spec, code, reason, numbers) in table {
        let refusal = refused(node.create("d0", spec.clone()).await, code, reason);
        assert_numbers(&refusal, numbers);
        assert_eq!(node.counts().await, before, "{refusal:?}");
        // Asking whether it would be says the same.
        let request = v1::CreateDomainRequest {
            domain_id: "d0".into(),
            spec: Some(spec),
            validate_only: true,
            ..Default::default()
        };
        let dry = refused(
            answer(node.admin().domains().create_domain(request).await),
            code,
            reason,
        );
        assert_eq!(dry, refusal);
    }
    node.create("d0", good)
        .await
        .expect("the corrected one succeeds at once");
}

/// D1: a size that is not a multiple of the granule is reported rounded.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn sizes_are_rounded_up_and_reported_rounded() {
    let node = Node::start().await;
    let odd = DomainSpec {
        bounce_bytes: Some(100_000),
        coherent_bytes: Some(8_193),
        iova_limit: Some(0x1ffff + 5),
        aperture_base: 0x1000,
        ..Default::default()
    };
    let request = v1::CreateDomainRequest {
        domain_id: "d0".into(),
        spec: Some(odd.clone()),
        validate_only: true,
        ..Default::default()
    };
    let before = node.counts().await;
    let dry = node
        .admin()
        .domains()
        .create_domain(request)
        .await
        .unwrap()
        .into_inner();
    assert_eq!(node.counts().await, before, "validate_only creates nothing");
    let domain = node.create("d0", odd).await.unwrap();
    for domain in [dry, domain] {
        assert_eq!(
            (domain.bounce_bytes, domain.coherent_bytes),
            (102_400, 12_288)
        );
        let (bounce, coherent) = (domain.bounce.unwrap(), domain.coherent.unwrap());
        assert_eq!((bounce.start, bounce.last), (0x1000, 0x19fff));
        assert_eq!((coherent.start, coherent.last), (0x1a000, 0x1cfff));
        assert_eq!((domain.iova_limit, domain.granule_bytes), (0x20004, 4_096));
        assert_eq!(
            (domain.name.as_str(), domain.backing()),
            ("domains/d0", v1::Backing::Memfd)
        );
        assert_eq!(domain.owner_uid, domaind_tests::users::own_uid());
    }
    let after = node.counts().await;
    assert_eq!(after.region_bytes - before.region_bytes, 102_400 + 12_288);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn unset_means_the_documented_defaults() {
    let node = Node::start().await;
    let domain = node.create("d0", DomainSpec::default()).await.unwrap();
    assert_eq!(
        (domain.bounce_bytes, domain.coherent_bytes),
        (64 << 20, 64 << 20)
    );
    assert_eq!(
        (domain.iova_limit, domain.granule_bytes),
        ((1 << 48) - 1, 4_096)
    );
    assert_eq!(
        (domain.backing(), domain.scrub()),
        (v1::Backing::Memfd, v1::Scrub::OnMap)
    );
    let quotas = domain.quotas.unwrap();
    assert_eq!(
        (quotas.sessions, quotas.mappings, quotas.memories),
        (512, 65_536, 1_024)
    );
    assert_eq!(quotas.direct, 131_072);
}

/// D1: an aperture of 0 means none.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn an_aperture_of_zero_is_none_and_what_would_need_it_is_refused() {
    let node = Node::start().await;
    let none = node.create("none", spec(0, 0)).await.unwrap();
    assert_eq!((none.bounce, none.coherent), (None, None));
    assert_eq!(
        (
            none.bounce_bytes,
            none.coherent_bytes,
            none.max_mapping_bytes
        ),
        (0, 0, 0)
    );
    let mut driver = Raw::driver(&node, "none").await;
    assert!(driver.given.regions.is_empty());
    assert_eq!(
        (driver.given.attached.bounce, driver.given.attached.coherent),
        (None, None)
    );
    let memory = driver.memory(P).await;
    let map = driver.map(memory.entry(0, 1, ToDevice)).await;
    refused(map, Code::InvalidArgument, Reason::NoAperture);
    refused(
        driver.alloc_len(1).await,
        Code::InvalidArgument,
        Reason::NoAperture,
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn names_are_checked_everywhere() {
    let node = Node::start().await;
    let before = node.counts().await;
    let (ok, long) = ("a".repeat(63), "a".repeat(64));
    let huge = "a".repeat(10_000);
    let (code, reason) = (Code::InvalidArgument, Reason::InvalidName);
    let bad = [
        "", "A", "1a", "-a", "a-", "a_b", "a.b", "a/b", "ä", " a", "a\n", &long, &huge,
    ];
    for id in bad {
        let refusal = refused(node.create(id, spec(0, 0)).await, code, reason);
        assert!(
            refusal.message.len() < 1_000,
            "an error does not repeat {} bytes",
            id.len()
        );
    }
    for id in bad {
        refused(node.get(id).await, code, reason);
        refused(node.delete(id, true).await, code, reason);
    }
    let plain = v1::GetDomainRequest { name: "d0".into() };
    refused(
        answer(node.admin().domains().get_domain(plain).await),
        code,
        reason,
    );
    for name in [
        "",
        "7",
        "sessions/",
        "sessions/x",
        "sessions/-1",
        "sessions/99999999999999999999",
    ] {
        let request = v1::GetSessionRequest { name: name.into() };
        refused(
            answer(node.admin().sessions().get_session(request).await),
            code,
            reason,
        );
        // An empty filter means all; in a request for one it is no name.
        refused(node.evict(name).await, code, reason);
    }
    assert_eq!(node.counts().await, before);
    for id in ["a", "a1", "a-b", "x--y", &ok] {
        node.create(id, spec(0, 0)).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn what_is_not_there_is_not_found() {
    let node = Node::start().await;
    node.domain("d0").await;
    let (code, reason) = (Code::NotFound, Reason::NoSuchDomain);
    refused(node.get("d1").await, code, reason);
    refused(node.delete("d1", false).await, code, reason);
    refused(node.delete("d1", true).await, code, reason);
    let update = v1::UpdateDomainRequest {
        name: "domains/d1".into(),
        ..Default::default()
    };
    refused(
        answer(node.admin().domains().update_domain(update).await),
        code,
        reason,
    );
    let list = v1::ListSessionsRequest {
        domain: "domains/d1".into(),
        ..Default::default()
    };
    refused(
        answer(node.admin().sessions().list_sessions(list).await),
        code,
        reason,
    );
    let list = v1::ListMemoriesRequest {
        domain: "domains/d1".into(),
        ..Default::default()
    };
    refused(
        answer(node.admin().sessions().list_memories(list).await),
        code,
        reason,
    );
    let list = v1::ListMappingsRequest {
        domain: "domains/d1".into(),
        ..Default::default()
    };
    refused(
        answer(node.admin().mappings().list_mappings(list).await),
        code,
        reason,
    );
    let (code, reason) = (Code::NotFound, Reason::NoSuchSession);
    let get = v1::GetSessionRequest {
        name: "sessions/4711".into(),
    };
    refused(
        answer(node.admin().sessions().get_session(get).await),
        code,
        reason,
    );
    refused(node.evict("sessions/4711").await, code, reason);

    let missing = v1::DeleteDomainRequest {
        name: "domains/d1".into(),
        allow_missing: true,
        ..Default::default()
    };
    let deleted = node
        .admin()
        .domains()
        .delete_domain(missing)
        .await
        .unwrap()
        .into_inner();
    assert_eq!(deleted.ended_sessions, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_name_in_use_is_refused_and_the_first_domain_stays() {
    let node = Node::start().await;
    let first = node.domain("d0").await;
    let counts = node.counts().await;
    let again = node.create("d0", spec(0, 0)).await;
    let refusal = refused(again, Code::AlreadyExists, Reason::DomainExists);
    assert!(refusal.message.contains("d0"), "{refusal:?}");
    assert_eq!(node.get("d0").await.unwrap().uid, first.uid);
    assert_eq!(node.counts().await, counts);
    // One after the other they are not the same.
    node.delete("d0", false).await.unwrap();
    assert_ne!(node.domain("d0").await.uid, first.uid);
}

/// D12, case 67: with clients attached.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn deleting_a_domain_in_use_says_what_is_there_and_changes_nothing() {
    let bench = Bench::new().await;
    let counts = bench.node.counts().await;
    let refusal = refused(
        bench.node.delete("d0", false).await,
        Code::FailedPrecondition,
        Reason::DomainInUse,
    );
    let numbers = [
        ("sessions", "1"),
        ("streaming_mappings", "1"),
        ("coherent_allocations", "1"),
        ("memories", "1"),
    ];
    assert_numbers(&refusal, &numbers);
    assert_eq!(bench.node.counts().await, counts);
    assert_eq!(
        bench.driver.unmap(&bench.mapping, None).await.unwrap(),
        5_000
    );
    // The driver does not listen, and is named.
    let refusal = refused(
        bench.node.delete("d0", true).await,
        Code::DeadlineExceeded,
        Reason::NotAcknowledged,
    );
    assert_eq!(refusal.metadata["sessions"], bench.driver.name());
    let gone = bench.node.get("d0").await;
    refused(gone, Code::NotFound, Reason::NoSuchDomain);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_persistent_allocation_alone_keeps_a_domain_in_use() {
    let node = Node::start().await;
    node.domain("d0").await;
    let driver = Raw::driver(&node, "d0").await;
    let request = v1::AllocCoherentRequest {
        len_bytes: 1,
        persistent: true,
        ..Default::default()
    };
    driver.alloc(request).await.unwrap();
    // Taken before: a session that has just ended may still count for a moment.
    let wanted = v1::DomainUsage {
        sessions: 0,
        ..node.usage("d0").await
    };
    drop(driver);
    node.until_usage("d0", wanted).await;
    let refusal = refused(
        node.delete("d0", false).await,
        Code::FailedPrecondition,
        Reason::DomainInUse,
    );
    assert_numbers(&refusal, &[("coherent_allocations", "1")]);
    assert_eq!(node.delete("d0", true).await.unwrap().ended_sessions, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn quotas_are_kept_and_name_their_limit_and_use() {
    let node = Node::start().await;
    let quotas = v1::Quotas {
        sessions: 2,
        mappings: 3,
        memories: 1,
        direct: 5,
        leases: 6,
        lease_bytes: 7 * P,
    };
    let limited = DomainSpec {
        quotas: Some(quotas),
        ..spec(1 << 20, 1 << 20)
    };
    node.create("d0", limited).await.unwrap();
    let mut driver = Raw::driver(&node, "d0").await;
    let _device = Raw::device(&node, "d0").await;
    let memory = driver.memory(P).await;
    let exhausted = |refusal: Refused<()>, quota: &str, limit: &str| {
        let refusal = refused(refusal, Code::ResourceExhausted, Reason::QuotaExceeded);
        assert_numbers(
            &refusal,
            &[("quota", quota), ("limit", limit), ("used", limit)],
        );
    };

    let access = v1::Access::ReadWrite;
    let third = Raw::try_attach(&node, "d0", v1::Role::Device, access).await;
    exhausted(third.map(drop), "sessions", "2");
    let memfd = files::good_memfd(P);
    exhausted(
        driver.register(&memfd, true).await.map(drop),
        "memories",
        "1",
    );
    // Mappings and allocations count together.
    let ring = driver.alloc_len(1).await.unwrap();
    let entry = memory.entry(0, 1, ToDevice);
    driver.map_all(vec![entry; 2], false).await.unwrap();
    exhausted(driver.map(entry).await.map(drop), "mappings", "3");
    exhausted(driver.alloc_len(1).await.map(drop), "mappings", "3");
    driver.free(ring.iova, ring.mapping_id).await.unwrap();
    driver.map(entry).await.unwrap();
    // Below what is in use a quota cannot go; above it can.
    let mut update = v1::UpdateDomainRequest {
        name: "domains/d0".into(),
        quotas: Some(v1::Quotas {
            mappings: 2,
            ..Default::default()
        }),
        ..Default::default()
    };
    let refusal = answer(node.admin().domains().update_domain(update.clone()).await)
        .expect_err("below what is in use");
    assert_eq!(refusal.grpc_code(), Code::FailedPrecondition, "{refusal:?}");
    assert_numbers(&refusal, &[("used", "3")]);
    assert_eq!(node.get("d0").await.unwrap().quotas.unwrap(), quotas);
    update.quotas = Some(v1::Quotas {
        mappings: 4,
        ..Default::default()
    });
    let updated = node
        .admin()
        .domains()
        .update_domain(update)
        .await
        .unwrap()
        .into_inner();
    assert_eq!(
        updated.quotas.unwrap(),
        v1::Quotas {
            mappings: 4,
            ..quotas
        }
    );
    driver.alloc_len(1).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn huge_pages_that_the_node_has_not_are_an_error_of_create() {
    let node = Node::start().await;
    let before = node.counts().await;
    let huge = DomainSpec {
        backing: v1::Backing::Hugetlb2m.into(),
        ..spec(1 << 40, 0)
    };
    // Past our own budget, and past any pool.
    refused(
        node.create("d0", huge).await,
        Code::ResourceExhausted,
        Reason::NoMemory,
    );
    let pool = std::fs::read_to_string("/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages");
    let small = DomainSpec {
        backing: v1::Backing::Hugetlb2m.into(),
        ..spec(4 << 20, 0)
    };
    let created = node.create("d0", small).await;
    if pool.is_ok_and(|pages| pages.trim() == "0") {
        let refusal = refused(created, Code::ResourceExhausted, Reason::NoMemory);
        assert_numbers(&refusal, &[("want_bytes", "4194304")]);
        assert_eq!(node.counts().await, before);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn quotas_have_ceilings() {
    let node = Node::start().await;
    let most = v1::Quotas {
        sessions: 4_096,
        mappings: 1_048_576,
        memories: 4_096,
        direct: 1_048_576,
        leases: 65_536,
        lease_bytes: u64::MAX,
    };
    let with = |quotas| DomainSpec {
        quotas: Some(quotas),
        ..spec(0, 0)
    };
    let created = node.create("d0", with(most)).await.unwrap();
    assert_eq!(created.quotas, Some(most));
    for (quotas, number) in [
        (
            v1::Quotas {
                sessions: 4_097,
                ..most
            },
            "4097",
        ),
        (
            v1::Quotas {
                mappings: 1_048_577,
                ..most
            },
            "1048577",
        ),
        (
            v1::Quotas {
                memories: u32::MAX,
                ..most
            },
            "4294967295",
        ),
        (
            v1::Quotas {
                direct: 1_048_577,
                ..most
            },
            "1048577",
        ),
        (
            v1::Quotas {
                leases: 65_537,
                ..most
            },
            "65537",
        ),
    ] {
        let (code, reason) = (Code::InvalidArgument, Reason::Malformed);
        let refusal = refused(node.create("d1", with(quotas)).await, code, reason);
        assert!(refusal.message.contains(number), "{refusal:?}");
        let update = v1::UpdateDomainRequest {
            name: node::name("d0"),
            quotas: Some(quotas),
            ..Default::default()
        };
        let update = node.admin().domains().update_domain(update).await;
        refused(answer(update), code, reason);
    }
    assert_eq!(node.get("d0").await.unwrap(), created);
}

// ---- Map

/// D7: an unknown direction, and whatever else is wrong without more.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_map_that_is_wrong_in_itself_is_an_invalid_argument() {
    let bench = Bench::new().await;
    let (entry, size) = (bench.entry(), 2 * HALF_MEMORY);
    let invalid = Code::InvalidArgument;
    bench
        .map_refused(
            MapEntry {
                len_bytes: 0,
                ..entry
            },
            invalid,
            Reason::ZeroLength,
        )
        .await;
    for direction in [0, 4, 77, -1] {
        let entry = MapEntry { direction, ..entry };
        bench
            .map_refused(entry, invalid, Reason::UnknownDirection)
            .await;
    }
    for align_bytes in [3, 4_097, 12_288, u64::MAX] {
        let entry = MapEntry {
            align_bytes,
            ..entry
        };
        let refusal = bench.map_refused(entry, invalid, Reason::Misaligned).await;
        assert_numbers(&refusal, &[("align_bytes", &align_bytes.to_string())]);
    }
    for (offset, len_bytes) in [(size, 1), (size - 1, 2), (0, size + 1), (1, size)] {
        let entry = MapEntry {
            offset,
            len_bytes,
            ..entry
        };
        let refusal = bench
            .map_refused(entry, invalid, Reason::OutsideMemory)
            .await;
        let numbers = [
            ("offset", &*offset.to_string()),
            ("len_bytes", &*len_bytes.to_string()),
            ("size_bytes", &*size.to_string()),
        ];
        assert_numbers(&refusal, &numbers);
    }
    // The last byte is inside.
    let last = MapEntry {
        offset: size - 1,
        len_bytes: 1,
        ..entry
    };
    bench.driver.map(last).await.unwrap();
}

/// P-01.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn sums_that_leave_64_bits_are_out_of_range() {
    let bench = Bench::new().await;
    let usage = bench.node.usage("d0").await;
    let (code, reason) = (Code::OutOfRange, Reason::AddressOverflow);
    for (offset, len_bytes) in [
        (u64::MAX, 1),
        (u64::MAX, u64::MAX),
        (1, u64::MAX),
        (u64::MAX - 4_095, 4_097),
    ] {
        let numbers = [
            ("offset", &*offset.to_string()),
            ("len_bytes", &*len_bytes.to_string()),
        ];
        let entry = MapEntry {
            offset,
            len_bytes,
            ..bench.entry()
        };
        let refusal = bench.map_refused(entry, code, reason).await;
        assert_numbers(&refusal, &numbers);
        let target = SyncTarget::ForCpu;
        let sync = bench.driver.sync(&bench.mapping, offset, len_bytes, target);
        assert_numbers(&refused(sync.await, code, reason), &numbers);
    }
    // Lengths that only their rounding takes out of the space, too.
    for len_bytes in [u64::MAX, 1 << 63, (1 << 63) + 1, u64::MAX - 4_095] {
        let refusal = bench.driver.alloc_len(len_bytes).await.unwrap_err();
        let codes = [
            Code::OutOfRange,
            Code::ResourceExhausted,
            Code::InvalidArgument,
        ];
        assert!(codes.contains(&refusal.grpc_code()), "{refusal:?}");
    }
    assert_eq!(bench.node.usage("d0").await, usage);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn memory_must_be_there_be_the_callers_and_allow_the_direction() {
    let mut bench = Bench::new().await;
    let unknown = MapEntry {
        memory_id: 4_711,
        ..bench.entry()
    };
    let refusal = bench
        .map_refused(unknown, Code::NotFound, Reason::NoSuchMemory)
        .await;
    assert_numbers(&refusal, &[("memory_id", "4711")]);

    let mut other = Raw::driver(&bench.node, "d0").await;
    let theirs = other.memory(P).await;
    let foreign = theirs.entry(0, 1, ToDevice);
    bench
        .map_refused(foreign, Code::PermissionDenied, Reason::NotYours)
        .await;
    let refusal = bench.driver.unregister(theirs.id).await;
    refused(refusal, Code::PermissionDenied, Reason::NotYours);

    let read_only = bench
        .driver
        .register(files::good_memfd(P), false)
        .await
        .unwrap();
    for direction in [FromDevice, Bidirectional] {
        let entry = MapEntry {
            memory_id: read_only.memory_id,
            direction: direction.into(),
            ..bench.entry()
        };
        let refusal = bench
            .map_refused(entry, Code::PermissionDenied, Reason::ReadOnly)
            .await;
        assert_numbers(&refusal, &[("memory_id", &read_only.memory_id.to_string())]);
    }
    let entry = MapEntry {
        memory_id: read_only.memory_id,
        ..bench.entry()
    };
    bench.driver.map(entry).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn an_aperture_that_is_full_names_its_largest_hole() {
    let node = Node::start().await;
    node.create("d0", spec(1 << 20, 1 << 20)).await.unwrap();
    let mut driver = Raw::driver(&node, "d0").await;
    let memory = driver.memory(256 * P).await;
    let entry = memory.entry(0, 100 * P, ToDevice);
    driver.map_all(vec![entry; 2], false).await.unwrap();
    let usage = node.usage("d0").await;

    let exhausted = Code::ResourceExhausted;
    let refusal = refused(driver.map(entry).await, exhausted, Reason::NoSpace);
    let numbers = [("want_bytes", "409600"), ("largest_hole_bytes", "225280")];
    assert_numbers(&refusal, &numbers);
    assert_eq!(node.usage("d0").await, usage);
    assert_eq!(usage.bounce_largest_hole_bytes, 55 * P);
    // A batch that would fit only in part leaves nothing.
    let refusal = driver
        .map_all(vec![memory.entry(0, 30 * P, ToDevice); 2], false)
        .await;
    let refusal = refused(refusal, exhausted, Reason::NoSpace);
    assert_eq!(refusal.metadata["entry_index"], "1");
    assert_eq!(node.usage("d0").await, usage);
    // Limits and alignments that nothing can meet.
    for entry in [
        MapEntry {
            limit: Some(4_094),
            ..memory.entry(0, 1, ToDevice)
        },
        MapEntry {
            limit: Some(0),
            ..memory.entry(0, 1, ToDevice)
        },
        MapEntry {
            align_bytes: 1 << 40,
            ..memory.entry(0, 1, ToDevice)
        },
    ] {
        refused(driver.map(entry).await, exhausted, Reason::NoSpace);
    }
    let coherent = refused(
        driver.alloc_len((1 << 20) + 1).await,
        exhausted,
        Reason::NoSpace,
    );
    assert_numbers(&coherent, &[("largest_hole_bytes", "1048576")]);
    let hole = memory.entry(0, 55 * P, ToDevice);
    driver.map(hole).await.expect("exactly what was named fits");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn memory_on_huge_pages_is_not_bounced() {
    let Some(huge) = files::huge_memfd(2 << 20) else {
        println!("not tried: this kernel makes no hugetlb memfds");
        return;
    };
    let mut bench = Bench::new().await;
    let memory = bench.driver.register(&huge, true).await.unwrap();
    let entry = MapEntry {
        memory_id: memory.memory_id,
        ..bench.entry()
    };
    bench
        .map_refused(entry, Code::InvalidArgument, Reason::MemoryRefused)
        .await;
    let request = v1::ListMemoriesRequest {
        domain: node::name("d0"),
        ..Default::default()
    };
    let listed = bench
        .node
        .admin()
        .sessions()
        .list_memories(request)
        .await
        .unwrap();
    let flags: Vec<_> = listed
        .into_inner()
        .memories
        .iter()
        .map(|m| m.hugetlb)
        .collect();
    assert_eq!(flags, [false, true]);
}

// ---- Batches

/// P-02.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn batches_have_one_to_1024_entries() {
    let bench = Bench::new().await;
    let usage = bench.node.usage("d0").await;
    let (code, reason) = (Code::InvalidArgument, Reason::Malformed);
    for partial in [false, true] {
        for count in [0, 1_025] {
            let entries = vec![bench.memory.entry(0, 1, ToDevice); count];
            let map = bench.driver.map_all(entries, partial).await.map(drop);
            let unmap = vec![unmap_entry(&bench.mapping, None); count];
            let unmap = bench.driver.unmap_all(unmap, partial).await.map(drop);
            let sync = vec![v1::SyncEntry::default(); count];
            let sync = bench.driver.sync_all(sync, partial).await.map(drop);
            for refusal in [map, unmap, sync] {
                let refusal = refused(refusal, code, reason);
                assert!(refusal.message.contains(&count.to_string()), "{refusal:?}");
            }
        }
    }
    assert_eq!(bench.node.usage("d0").await, usage);
    let full = vec![bench.memory.entry(0, 1, ToDevice); 1_024];
    let mapped = bench.driver.map_all(full, false).await.unwrap();
    assert_eq!(mapped.results.len(), 1_024);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn one_bad_entry_fails_the_batch_by_its_index_and_nothing_is_changed() {
    let bench = Bench::new().await;
    let (usage, next) = (bench.node.usage("d0").await, bench.next_iova().await);
    for bad in [0, 1, 4] {
        let mut entries = vec![bench.entry(); 5];
        entries[bad].len_bytes = 0;
        let refusal = bench.driver.map_all(entries, false).await;
        let refusal = refused(refusal, Code::InvalidArgument, Reason::ZeroLength);
        assert_eq!(refusal.metadata["entry_index"], bad.to_string());
        assert!(refusal.message.contains(&bad.to_string()), "{refusal:?}");
        assert_eq!(bench.node.usage("d0").await, usage);
    }
    assert_eq!(bench.next_iova().await, next);

    // Unmap: the good ones stay mapped, and nothing has flowed back.
    let other = bench
        .driver
        .map(bench.memory.entry(0, 8, Bidirectional))
        .await
        .unwrap();
    bench.driver.write(bench.mapping.iova, b"from the device");
    let mut entries = vec![unmap_entry(&bench.mapping, None), unmap_entry(&other, None)];
    entries[1].mapping_id += 1_000;
    let refusal = bench.driver.unmap_all(entries, false).await;
    let refusal = refused(refusal, Code::NotFound, Reason::NoSuchMapping);
    assert_eq!(refusal.metadata["entry_index"], "1");
    assert_eq!(files::peek(&bench.memory.fd, 0, 15), [0; 15]);
    assert_eq!(
        bench.driver.unmap(&bench.mapping, None).await.unwrap(),
        5_000
    );
    assert_eq!(files::peek(&bench.memory.fd, 0, 15), b"from the device");
    bench.driver.unmap(&other, None).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn with_partial_each_entry_stands_for_itself() {
    let bench = Bench::new().await;
    let bad = MapEntry {
        direction: 9,
        ..bench.entry()
    };
    let entries = vec![bench.entry(), bad, bench.entry()];
    let results = bench.driver.map_all(entries, true).await.unwrap().results;
    let mut good = Vec::new();
    for (index, result) in results.into_iter().enumerate() {
        match (index, result.outcome) {
            (1, Some(map_result::Outcome::Refusal(refusal))) => {
                assert_eq!(refusal.grpc_code(), Code::InvalidArgument);
                assert_eq!(refusal.reason(), Reason::UnknownDirection);
            }
            (0 | 2, Some(map_result::Outcome::Mapping(mapping))) => good.push(mapping),
            other => panic!("{other:?}"),
        }
    }
    let mut entries: Vec<_> = good
        .iter()
        .map(|mapping| unmap_entry(mapping, None))
        .collect();
    entries.insert(
        1,
        v1::UnmapEntry {
            iova: 4_096,
            mapping_id: 4_711,
            ..Default::default()
        },
    );
    let results = bench.driver.unmap_all(entries, true).await.unwrap().results;
    let reasons: Vec<_> = results
        .iter()
        .map(|result| result.refusal.as_ref().map(v1::Refusal::reason))
        .collect();
    assert_eq!(reasons, [None, Some(Reason::NoSuchMapping), None]);
    assert_eq!(bench.node.usage("d0").await.streaming_mappings, 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn naming_one_mapping_twice_is_refused() {
    let bench = Bench::new().await;
    let entries = vec![unmap_entry(&bench.mapping, None); 2];
    let refusal = bench.driver.unmap_all(entries, false).await;
    let refusal = refused(refusal, Code::InvalidArgument, Reason::DuplicateEntry);
    assert_eq!(refusal.metadata["entry_index"], "1");
    assert_numbers(
        &refusal,
        &[("mapping_id", &bench.mapping.mapping_id.to_string())],
    );
    bench.driver.unmap(&bench.mapping, None).await.unwrap();
}

// ---- Unmap, Sync, coherent

/// D8.
/// D8.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn unmap_of_what_is_not_exactly_there_is_refused_and_the_mapping_stays() {
    let bench = Bench::new().await;
    let good = unmap_entry(&bench.mapping, None);
    let (code, reason) = (Code::NotFound, Reason::NoSuchMapping);
    for (iova, mapping_id) in [
        (good.iova + 1, good.mapping_id),
        (good.iova + P, good.mapping_id),
        (good.iova - 1, good.mapping_id),
        (good.iova, good.mapping_id + 1),
        (good.iova, 0),
        (0, 0),
        (u64::MAX, u64::MAX),
        // A coherent allocation is not unmapped.
        (bench.ring.iova, bench.ring.mapping_id),
    ] {
        let entry = v1::UnmapEntry {
            iova,
            mapping_id,
            ..good
        };
        let refusal = bench.unmap_refused(entry, code, reason).await;
        let (iova, id) = (format!("{iova:#x}"), mapping_id.to_string());
        assert_numbers(&refusal, &[("iova", &iova), ("mapping_id", &id)]);
    }
    let other = Raw::driver(&bench.node, "d0").await;
    let refusal = other.unmap(&bench.mapping, None).await;
    refused(refusal, Code::PermissionDenied, Reason::NotYours);
    let refusal = other.sync(&bench.mapping, 0, 1, SyncTarget::ForCpu).await;
    refused(refusal, Code::PermissionDenied, Reason::NotYours);

    bench.driver.unmap(&bench.mapping, None).await.unwrap();
    bench.unmap_refused(good, code, reason).await;
    // A stale id on an address that is used again: when all of them are.
    let mut iovas = Vec::new();
    let mut is_full = false;
    while !is_full {
        let batch = vec![bench.entry(); 1_024];
        for result in bench.driver.map_all(batch, true).await.unwrap().results {
            match result.outcome {
                Some(map_result::Outcome::Mapping(mapping)) => iovas.push(mapping.iova),
                _ => is_full = true,
            }
        }
    }
    assert!(iovas.contains(&good.iova), "the address is used again");
    iovas.sort_unstable();
    iovas.dedup();
    let pages = (16 << 20) / P - 1;
    assert_eq!(
        iovas.len() as u64,
        pages,
        "a second unmap frees nothing twice"
    );
    bench.unmap_refused(good, code, reason).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn written_bytes_are_refused_where_they_are_wrong_and_the_mapping_stays() {
    let bench = Bench::new().await;
    let (code, reason) = (Code::InvalidArgument, Reason::WrittenBytes);
    let driver = &bench.driver;
    let from = driver
        .map(bench.memory.entry(0, 100, FromDevice))
        .await
        .unwrap();
    let to = driver
        .map(bench.memory.entry(0, 100, ToDevice))
        .await
        .unwrap();
    let both = driver
        .map(bench.memory.entry(0, 100, Bidirectional))
        .await
        .unwrap();

    let missing = bench
        .unmap_refused(unmap_entry(&from, None), code, reason)
        .await;
    assert_numbers(&missing, &[("len_bytes", "100")]);
    for mapping in [&from, &both] {
        for written in [101, u64::MAX] {
            let entry = unmap_entry(mapping, Some(written));
            let refusal = bench.unmap_refused(entry, code, reason).await;
            let said = written.to_string();
            assert_numbers(&refusal, &[("written_bytes", &said), ("len_bytes", "100")]);
        }
    }
    for written in [0, 100] {
        bench
            .unmap_refused(unmap_entry(&to, Some(written)), code, reason)
            .await;
    }
    assert_eq!(driver.unmap(&from, Some(100)).await.unwrap(), 100);
    assert_eq!(driver.unmap(&to, None).await.unwrap(), 0);
    assert_eq!(driver.unmap(&both, None).await.unwrap(), 100);
}

/// D7.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn sync_is_refused_outside_the_mapping_and_against_its_direction() {
    let bench = Bench::new().await;
    let driver = &bench.driver;
    let invalid = Code::InvalidArgument;
    let map = &bench.mapping;
    let zero = driver.sync(map, 0, 0, SyncTarget::ForCpu).await;
    refused(zero, invalid, Reason::ZeroLength);
    for (offset, len) in [(5_000, 1), (4_999, 2), (0, 5_001)] {
        let refusal = driver.sync(map, offset, len, SyncTarget::ForDevice).await;
        let refusal = refused(refusal, invalid, Reason::OutsideMapping);
        let (offset, len) = (offset.to_string(), len.to_string());
        let numbers = [
            ("offset", &*offset),
            ("len_bytes", &*len),
            ("mapping_bytes", "5000"),
        ];
        assert_numbers(&refusal, &numbers);
    }
    for target in [0, 3, -7] {
        let entry = v1::SyncEntry {
            iova: map.iova,
            mapping_id: map.mapping_id,
            offset: 0,
            len_bytes: 1,
            target,
        };
        refused(
            driver.sync_all(vec![entry], false).await,
            invalid,
            Reason::Malformed,
        );
    }
    let to = driver
        .map(bench.memory.entry(0, 10, ToDevice))
        .await
        .unwrap();
    let from = driver
        .map(bench.memory.entry(0, 10, FromDevice))
        .await
        .unwrap();
    for (mapping, target) in [(&to, SyncTarget::ForCpu), (&from, SyncTarget::ForDevice)] {
        let refusal = driver.sync(mapping, 0, 10, target).await;
        refused(refusal, invalid, Reason::WrongDirection);
    }
    driver
        .sync(&to, 0, 10, SyncTarget::ForDevice)
        .await
        .unwrap();
    driver.sync(&from, 0, 10, SyncTarget::ForCpu).await.unwrap();
    let gone = v1::StreamingMapping {
        mapping_id: 4_711,
        ..*map
    };
    let refusal = driver.sync(&gone, 0, 1, SyncTarget::ForCpu).await;
    refused(refusal, Code::NotFound, Reason::NoSuchMapping);
}

/// D9.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn coherent_memory_is_freed_exactly_or_not_at_all() {
    let bench = Bench::new().await;
    let (driver, ring) = (&bench.driver, &bench.ring);
    let usage = bench.node.usage("d0").await;
    refused(
        driver.alloc_len(0).await,
        Code::InvalidArgument,
        Reason::ZeroLength,
    );
    let odd = v1::AllocCoherentRequest {
        len_bytes: 1,
        align_bytes: 6_000,
        ..Default::default()
    };
    let refusal = refused(
        driver.alloc(odd).await,
        Code::InvalidArgument,
        Reason::Misaligned,
    );
    assert_numbers(&refusal, &[("align_bytes", "6000")]);
    for (iova, id) in [
        (ring.iova + P, ring.mapping_id),
        (ring.iova + 1, ring.mapping_id),
        (ring.iova, ring.mapping_id + 1),
        (bench.mapping.iova, bench.mapping.mapping_id),
    ] {
        refused(
            driver.free(iova, id).await,
            Code::NotFound,
            Reason::NoSuchMapping,
        );
    }
    let other = Raw::driver(&bench.node, "d0").await;
    let refusal = other.free(ring.iova, ring.mapping_id).await;
    refused(refusal, Code::PermissionDenied, Reason::NotYours);
    let usage = v1::DomainUsage {
        sessions: 2,
        ..usage
    };
    assert_eq!(bench.node.usage("d0").await, usage);

    driver.free(ring.iova, ring.mapping_id).await.unwrap();
    let again = driver.free(ring.iova, ring.mapping_id).await;
    refused(again, Code::NotFound, Reason::NoSuchMapping);
    // Persistent memory may be freed by any driver of the domain.
    let persistent = v1::AllocCoherentRequest {
        len_bytes: 1,
        persistent: true,
        ..Default::default()
    };
    let ring = driver.alloc(persistent).await.unwrap();
    other.free(ring.iova, ring.mapping_id).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn memory_in_use_is_not_unregistered() {
    let mut bench = Bench::new().await;
    let id = bench.memory.id;
    let refusal = bench.driver.unregister(id).await;
    let refusal = refused(refusal, Code::FailedPrecondition, Reason::MemoryInUse);
    assert_numbers(
        &refusal,
        &[("memory_id", &id.to_string()), ("mappings", "1")],
    );
    bench.driver.unmap(&bench.mapping, None).await.unwrap();
    bench.driver.unregister(id).await.unwrap();
    let gone = bench.driver.unregister(id).await;
    refused(gone, Code::NotFound, Reason::NoSuchMemory);
    let map = bench.driver.map(bench.entry()).await;
    refused(map, Code::NotFound, Reason::NoSuchMemory);
}

// ---- Lists

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn lists_come_in_pages_and_foreign_page_tokens_are_refused() {
    let node = Node::start().await;
    for id in ["e", "a", "c", "b", "d"] {
        node.create(id, spec(0, 0)).await.unwrap();
    }
    let mut request = v1::ListDomainsRequest {
        page_size: 2,
        ..Default::default()
    };
    let mut pages = Vec::new();
    loop {
        let page = node
            .admin()
            .domains()
            .list_domains(request.clone())
            .await
            .unwrap()
            .into_inner();
        pages.push(
            page.domains
                .into_iter()
                .map(|domain| domain.name)
                .collect::<Vec<_>>(),
        );
        if page.next_page_token.is_empty() {
            break;
        }
        request.page_token = page.next_page_token;
    }
    let wanted = [
        vec!["domains/a", "domains/b"],
        vec!["domains/c", "domains/d"],
        vec!["domains/e"],
    ];
    assert_eq!(pages, wanted);

    let (code, reason) = (Code::InvalidArgument, Reason::Malformed);
    for token in ["x!", "\u{1F600}", "-1", "0x", "%%%%", &"9".repeat(1_000)] {
        let page_token = token.to_owned();
        let domains = v1::ListDomainsRequest {
            page_token: page_token.clone(),
            page_size: 0,
        };
        let domains = answer(node.admin().domains().list_domains(domains).await).map(drop);
        let sessions = v1::ListSessionsRequest {
            page_token: page_token.clone(),
            ..Default::default()
        };
        let sessions = answer(node.admin().sessions().list_sessions(sessions).await).map(drop);
        let memories = v1::ListMemoriesRequest {
            domain: node::name("a"),
            page_token: page_token.clone(),
            page_size: 0,
        };
        let memories = answer(node.admin().sessions().list_memories(memories).await).map(drop);
        let mappings = v1::ListMappingsRequest {
            domain: node::name("a"),
            page_token,
            ..Default::default()
        };
        let mappings = answer(node.admin().mappings().list_mappings(mappings).await).map(drop);
        for list in [domains, sessions, memories, mappings] {
            refused(list, code, reason);
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn mappings_are_listed_by_iova_and_can_be_filtered() {
    let bench = Bench::new().await;
    let mut other = Raw::driver(&bench.node, "d0").await;
    let memory = other.memory(P).await;
    for _ in 0..5 {
        other.map(memory.entry(7, 9, FromDevice)).await.unwrap();
    }
    let all = bench.node.mappings("d0").await;
    assert_eq!(all.len(), 7);
    assert!(all.windows(2).all(|pair| pair[0].iova < pair[1].iova));
    let one = all
        .iter()
        .find(|mapping| mapping.iova == bench.mapping.iova)
        .unwrap();
    assert_eq!(one.kind(), v1::MappingKind::Streaming);
    assert_eq!(
        (one.len_bytes, one.offset, one.memory_id),
        (5_000, 0, bench.memory.id)
    );
    assert_eq!(
        (one.direction(), one.perm()),
        (Bidirectional, v1::Perm::ReadWrite)
    );
    assert_eq!(
        (one.session.as_str(), one.state()),
        (bench.driver.name(), v1::MappingState::Live)
    );

    let filter = |session: &str, kind: v1::MappingKind, page_size| v1::ListMappingsRequest {
        domain: node::name("d0"),
        session: session.to_owned(),
        kind: kind.into(),
        page_size,
        ..Default::default()
    };
    let count = async |request| {
        let page = bench
            .node
            .admin()
            .mappings()
            .list_mappings(request)
            .await
            .unwrap();
        page.into_inner().mappings.len()
    };
    let any = v1::MappingKind::Unspecified;
    assert_eq!(count(filter(other.name(), any, 0)).await, 5);
    assert_eq!(count(filter(bench.driver.name(), any, 0)).await, 2);
    assert_eq!(count(filter("", v1::MappingKind::Coherent, 0)).await, 1);
    assert_eq!(count(filter("", any, 3)).await, 3);
    let unknown = v1::ListMappingsRequest {
        kind: 9,
        ..filter("", any, 0)
    };
    let unknown = answer(bench.node.admin().mappings().list_mappings(unknown).await);
    refused(unknown, Code::InvalidArgument, Reason::Malformed);
}

// ---- Messages

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_request_that_is_too_large_is_refused_and_the_next_is_served() {
    let bench = Bench::new().await;
    let usage = bench.node.usage("d0").await;
    // The library's own client would not send it.
    let mut domains = DomainServiceClient::new(bench.node.client().await.channel());
    for bytes in [300 << 10, 8 << 20] {
        let request = v1::GetDomainRequest {
            name: "a".repeat(bytes),
        };
        let status = domains.get_domain(request).await.unwrap_err();
        let codes = [
            Code::OutOfRange,
            Code::ResourceExhausted,
            Code::InvalidArgument,
        ];
        assert!(codes.contains(&status.code()), "{status:?}");
    }
    // A full batch of the longest entries is not too large.
    let longest = MapEntry {
        memory_id: u64::MAX,
        offset: u64::MAX,
        len_bytes: u64::MAX,
        direction: ToDevice.into(),
        keep_offset: true,
        preserve: true,
        skip_sync: true,
        align_bytes: u64::MAX,
        limit: Some(u64::MAX),
    };
    let refusal = bench
        .driver
        .map_all(vec![longest; 1_024], false)
        .await
        .unwrap_err();
    assert_ne!(refusal.reason(), Reason::Unspecified, "{refusal:?}");
    assert_eq!(bench.node.usage("d0").await, usage);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_flood_of_metadata_is_refused_and_the_daemon_serves_on() {
    let node = Node::start().await;
    node.domain("d0").await;
    let client = node.client().await;
    let mut request = tonic::Request::new(v1::GetDomainRequest {
        name: node::name("d0"),
    });
    request
        .metadata_mut()
        .insert("flood", "x".repeat(100 << 10).parse().unwrap());
    client.domains().get_domain(request).await.unwrap_err();
    node.get("d0").await.unwrap();
    // Claims about who calls are not believed, nor are they in the way.
    let mut request = tonic::Request::new(v1::GetDomainRequest {
        name: node::name("d0"),
    });
    for (key, value) in [
        ("uid", "0"),
        ("x-forwarded-uid", "0"),
        ("domaind-peer", "1"),
    ] {
        request.metadata_mut().insert(key, value.parse().unwrap());
    }
    node.client()
        .await
        .domains()
        .get_domain(request)
        .await
        .unwrap();
}

// ---- The fd socket

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn attach_is_refused_by_name_role_and_access_and_can_be_repeated() {
    let node = Node::start().await;
    node.domain("d0").await;
    let mut wire = Wire::connect(&node.runtime_dir().fd_socket());
    wire.hello().await;
    let rw = v1::Access::ReadWrite;
    let driver = v1::Role::Driver;
    let table = [
        (
            attach("domains/d1", driver, rw),
            Code::NotFound,
            Reason::NoSuchDomain,
        ),
        (
            attach("d0", driver, rw),
            Code::InvalidArgument,
            Reason::InvalidName,
        ),
        (
            attach("", driver, rw),
            Code::InvalidArgument,
            Reason::InvalidName,
        ),
        (
            attach("domains/d0", v1::Role::Unspecified, rw),
            Code::InvalidArgument,
            Reason::Malformed,
        ),
        (
            attach("domains/d0", driver, v1::Access::Unspecified),
            Code::InvalidArgument,
            Reason::Malformed,
        ),
        (
            Ask::Attach(v1::Attach {
                domain: "domains/d0".into(),
                role: 7,
                access: rw.into(),
                ..v1::Attach::default()
            }),
            Code::InvalidArgument,
            Reason::Malformed,
        ),
    ];
    for (ask, code, reason) in table {
        refused(wire.ask(ask, None).await, code, reason);
        assert_eq!(node.counts().await.sessions, 0);
    }
    // A refusal leaves the connection as it was.
    wire.attach("domains/d0", driver, rw).await.unwrap();
    assert_eq!(node.counts().await.sessions, 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn frames_out_of_turn_are_refused() {
    let node = Node::start().await;
    node.domain("d0").await;
    let (code, reason) = (Code::FailedPrecondition, Reason::OutOfTurn);
    let attach = || attach("domains/d0", v1::Role::Driver, v1::Access::ReadWrite);
    let unregister = || Ask::UnregisterMemory(v1::UnregisterMemory { memory_id: 1 });
    // There is no session yet that could be left as it was: that is the end.
    for (after_hello, ask) in [
        (false, attach()),
        (false, unregister()),
        (false, Ask::Detach(v1::Detach {})),
        (true, hello(1, 1)),
        (true, unregister()),
    ] {
        let mut wire = Wire::connect(&node.runtime_dir().fd_socket());
        if after_hello {
            wire.hello().await;
        }
        wire.send(ask, None).await.unwrap();
        let closed = wire.closed().await;
        assert_eq!(closed.ended.unwrap().reason(), v1::EndReason::Protocol);
        assert_eq!(closed.fds, 0);
    }
    // A session is left as it was.
    let mut wire = Wire::connect(&node.runtime_dir().fd_socket());
    wire.hello().await;
    wire.attach("domains/d0", v1::Role::Driver, v1::Access::ReadWrite)
        .await
        .unwrap();
    refused(wire.ask(hello(1, 1), None).await, code, reason);
    refused(wire.ask(attach(), None).await, code, reason);
    assert_eq!(node.counts().await.sessions, 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn versions_are_negotiated_or_refused() {
    let node = Node::start().await;
    for (min, max) in [(2, 9), (0, 0), (3, 2)] {
        let mut wire = Wire::connect(&node.runtime_dir().fd_socket());
        wire.send(hello(min, max), None).await.unwrap();
        let ended = wire.closed().await.ended.expect("it says why");
        assert_eq!(ended.reason(), v1::EndReason::Protocol);
        let (offered, spoken) = (max.to_string(), "1 to 1");
        assert!(
            ended.message.contains(&offered) && ended.message.contains(spoken),
            "{ended:?}"
        );
    }
    let mut wire = Wire::connect(&node.runtime_dir().fd_socket());
    match wire.ask(hello(1, 9), None).await.unwrap() {
        v1::server_frame::Body::Welcome(welcome) => {
            assert_eq!((welcome.version, welcome.max_frame_bytes), (1, 4_096));
            assert_eq!(welcome.instance, node.info().await.instance);
        }
        other => panic!("{other:?}"),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_long_agent_is_read_in_part_and_welcome() {
    let node = Node::start().await;
    let mut wire = Wire::connect(&node.runtime_dir().fd_socket());
    let hello = Ask::Hello(v1::Hello {
        min_version: 1,
        max_version: 1,
        agent: "a\n\u{1b}[31m".repeat(400),
    });
    wire.ask(hello, None).await.expect("welcome");
    let log = node.log();
    assert!(
        !log.contains('\u{1b}'),
        "a client's escape sequence is in the log"
    );
    assert!(
        log.lines().all(|line| line.starts_with('{')),
        "a client's line is in the log"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn registering_needs_an_fd_that_comes_with_the_frame() {
    let node = Node::start().await;
    node.domain("d0").await;
    let mut driver = Raw::driver(&node, "d0").await;
    driver.wire.send(register(true), None).await.unwrap();
    let closed = driver.wire.closed().await;
    let reason = closed.ended.expect("it says why").reason();
    assert_eq!(reason, v1::EndReason::Protocol);
    // It has ended, and could still reach what it was given.
    assert_eq!(node.usage("d0").await.fenced_sessions, 1);
    drop(driver);
    node.until_usage(
        "d0",
        v1::DomainUsage {
            bounce_largest_hole_bytes: (16 << 20) - P,
            coherent_largest_hole_bytes: 4 << 20,
            ..Default::default()
        },
    )
    .await;
}
