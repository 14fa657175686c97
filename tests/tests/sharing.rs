//! One domain, shared by a driver and two devices, each its own process.

use domaind_tests::node::spec;
use domaind_tests::v1::Direction::{Bidirectional, FromDevice, ToDevice};
use domaind_tests::{Actor, Bytes, Code, Node, P, Raw, Reason, refused};

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn two_devices_work_in_place_on_one_drivers_data() {
    let node = Node::start().await;
    node.domain("d0").await;
    let mut driver = Actor::driver(&node, "d0");
    let (mut left, mut right) = (Actor::device(&node, "d0"), Actor::device(&node, "d0"));
    let memory = driver.buffer(64 << 10);
    let data = Bytes::pattern(1, 10_000);
    driver.fill(memory, 100, data.clone());

    let place = driver.map(memory, 100, 10_000, Bidirectional);
    left.assert_sees(place.iova, data.clone());
    right.assert_sees(place.iova, data);
    left.write(place.iova, Bytes::same(b'L', 5_000));
    right.assert_sees(place.iova, Bytes::same(b'L', 5_000));
    right.write(place.iova + 5_000, Bytes::same(b'R', 5_000));
    // Nothing flows back before the driver says so.
    driver.assert_holds(memory, 100, Bytes::pattern(1, 10_000));

    assert_eq!(driver.unmap(place, None), 10_000);
    driver.assert_holds(memory, 100, Bytes::same(b'L', 5_000));
    driver.assert_holds(memory, 5_100, Bytes::same(b'R', 5_000));
    driver.assert_holds(memory, 0, Bytes::zeros(100));
    driver.assert_holds(memory, 10_100, Bytes::zeros(1_000));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_device_that_writes_gives_back_exactly_what_it_says_it_wrote() {
    let node = Node::start().await;
    node.domain("d0").await;
    let mut driver = Actor::driver(&node, "d0");
    let mut device = Actor::device(&node, "d0");
    let memory = driver.buffer(3 * P);
    driver.fill(memory, 0, Bytes::same(b'o', 3 * P));

    for written in [0, 1, 4_095, 4_096, 4_097, 6_000] {
        driver.fill(memory, 0, Bytes::same(b'o', 3 * P));
        let place = driver.map(memory, 50, 6_000, FromDevice);
        device.assert_sees(place.iova, Bytes::zeros(6_000));
        device.write(place.iova, Bytes::same(b'n', 6_000));

        assert_eq!(driver.unmap(place, Some(written)), written);

        driver.assert_holds(memory, 0, Bytes::same(b'o', 50));
        driver.assert_holds(memory, 50, Bytes::same(b'n', written));
        driver.assert_holds(
            memory,
            50 + written,
            Bytes::same(b'o', 3 * P - 50 - written),
        );
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_to_device_buffer_is_never_written_back() {
    let node = Node::start().await;
    node.domain("d0").await;
    let mut driver = Actor::driver(&node, "d0");
    let mut device = Actor::device(&node, "d0");
    let memory = driver.buffer(P);
    driver.fill(memory, 0, "the driver's words");

    let place = driver.map(memory, 0, 18, ToDevice);
    device.assert_sees(place.iova, "the driver's words");
    device.write(place.iova, "DEVICE WAS HERE!!!");

    assert_eq!(driver.unmap(place, None), 0);
    driver.assert_holds(memory, 0, "the driver's words");
}

/// The reason for bouncing at all: what lies beside the buffer, even in its
/// first and last page, is nowhere in the memory that a device has mapped.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn the_drivers_other_memory_is_nowhere_in_a_devices_view() {
    let secret = "TOP-SECRET-0123456789";
    let node = Node::start().await;
    node.domain("d0").await;
    let mut driver = Actor::driver(&node, "d0");
    let mut device = Actor::device(&node, "d0");
    let memory = driver.buffer(16 * P);
    for page in 0..16 {
        driver.fill(memory, page * P + 10, secret);
        driver.fill(memory, page * P + 4_000, secret);
    }
    // In one page, between two secrets; and across pages, between two more.
    driver.fill(memory, P + 100, "in the middle of a page");
    driver.fill(memory, 4 * P + 4_021, Bytes::pattern(3, 85));

    let mut places = Vec::new();
    for direction in [ToDevice, Bidirectional, FromDevice] {
        places.push((direction, driver.map(memory, P + 100, 23, direction)));
        places.push((direction, driver.map(memory, 4 * P + 4_021, 85, direction)));
    }
    driver.alloc(3 * P, false);
    device.assert_never_sees(secret);
    // The search does find what is there.
    let shown = device.must(&domaind_tests::Ask::Search {
        bytes: "in the middle of a page".into(),
    });
    assert_eq!(shown, places[0].1.iova);
    // Tails are zero to the end of the granule.
    device.assert_sees(places[0].1.iova + 23, Bytes::zeros(P - 23));
    device.assert_sees(places[1].1.iova + 85, Bytes::zeros(P - 85));

    for (direction, place) in places {
        driver.unmap(place, (direction == FromDevice).then_some(0));
    }
    device.assert_never_sees(secret);
    driver.assert_holds(memory, P + 10, secret);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn what_one_driver_left_behind_is_never_seen_through_anothers_mapping() {
    let node = Node::start().await;
    // Half of it is not enough for what comes second.
    node.create("d0", spec(2 << 20, 1 << 20)).await.unwrap();
    let mut first = Actor::driver(&node, "d0");
    let mut second = Actor::driver(&node, "d0");
    let mut device = Actor::device(&node, "d0");
    let old = first.buffer(1 << 20);
    first.fill(old, 0, Bytes::same(0x5b, 1 << 20));
    let place = first.map(old, 0, 1 << 20, ToDevice);
    first.unmap(place, None);

    // Pages of the old range are taken again, with one byte each.
    let new = second.buffer(P);
    second.fill(new, 0, Bytes::same(1, P));
    let places = second.map_many(new, 0, 1, ToDevice, 400);
    let reused = places
        .iter()
        .filter(|p| place.iova <= p.iova && p.iova < place.iova + (1 << 20))
        .count();
    assert!(
        reused > 0,
        "no address was used again, this test shows nothing"
    );
    for place in places {
        device.assert_sees(place.iova, Bytes::same(1, 1));
        device.assert_sees(place.iova + 1, Bytes::zeros(P - 1));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn coherent_memory_is_zeroed_seen_by_all_and_lies_above_the_bounce_aperture() {
    let node = Node::start().await;
    let domain = node.domain("d0").await;
    let mut driver = Actor::driver(&node, "d0");
    let (mut left, mut right) = (Actor::device(&node, "d0"), Actor::device(&node, "d0"));

    let ring = driver.alloc(5_000, false);
    assert!(ring.iova > domain.bounce.unwrap().last && ring.iova.is_multiple_of(P));
    left.assert_sees(ring.iova, Bytes::zeros(2 * P));
    left.write(ring.iova + 4_990, "from left!");
    right.assert_sees(ring.iova + 4_990, "from left!");
    driver.assert_sees(ring.iova + 4_990, "from left!");
    driver.must(&domaind_tests::Ask::Free {
        iova: ring.iova,
        id: ring.id,
    });

    let again = driver.alloc(5_000, false);
    assert_ne!(again.id, ring.id, "an id is never used again");
    right.assert_sees(again.iova, Bytes::zeros(2 * P));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_device_may_neither_map_nor_allocate_nor_register() {
    let node = Node::start().await;
    node.domain("d0").await;
    let mut driver = Raw::driver(&node, "d0").await;
    let mut device = Raw::device(&node, "d0").await;
    let memory = driver.memory(P).await;
    let mapping = driver.map(memory.entry(0, P, Bidirectional)).await.unwrap();
    let ring = driver.alloc_len(P).await.unwrap();
    let before = node.usage("d0").await;

    let denied = |refusal: domaind_tests::v1::Refusal| {
        assert_eq!(
            refusal.metadata["role"].to_lowercase(),
            "device",
            "{refusal:?}"
        );
    };
    let (code, reason) = (Code::PermissionDenied, Reason::WrongRole);
    denied(refused(
        device.map(memory.entry(0, 1, ToDevice)).await,
        code,
        reason,
    ));
    denied(refused(device.unmap(&mapping, None).await, code, reason));
    let target = domaind_tests::v1::SyncTarget::ForCpu;
    denied(refused(
        device.sync(&mapping, 0, 1, target).await,
        code,
        reason,
    ));
    denied(refused(device.alloc_len(P).await, code, reason));
    denied(refused(
        device.free(ring.iova, ring.mapping_id).await,
        code,
        reason,
    ));
    let memfd = domaind_tests::files::good_memfd(P);
    denied(refused(device.register(&memfd, false).await, code, reason));
    denied(refused(device.unregister(memory.id).await, code, reason));

    assert_eq!(node.usage("d0").await, before);
    // The device is still attached and still sees.
    device.write(mapping.iova, b"still here");
    assert_eq!(driver.unmap(&mapping, Some(10)).await.unwrap(), 10);
    assert_eq!(domaind_tests::files::peek(&memory.fd, 0, 10), b"still here");
}
