//! The daemon and all its clients die at once, again and again: whatever comes
//! after them in the same directory begins from nothing.
//!
//! Nothing else may run in this process: it counts its descendants.

use std::fs;

use domaind_tests::accessor::{Accessor, Say};
use domaind_tests::actor::Place;
use domaind_tests::node::{scrubbed, spec};
use domaind_tests::v1::Direction::FromDevice;
use domaind_tests::{Actor, Ask, Bytes, Node, P, Raw, children, rounds, v1, wait};
use rustix::process::Signal;
use serde_json::json;

const BOUNCE: u64 = 4 << 20;
const COHERENT: u64 = 1 << 20;
/// What each driver writes; an accessor reads the last one's ring.
const COLOURS: [u8; 3] = [0x11, 0x22, 0x33];

/// Changes until the storm begins.
const RINGS: u64 = COLOURS.len() as u64;

/// Everybody who works with a domain.
struct Crowd {
    drivers: Vec<Actor>,
    accessors: Vec<Accessor>,
}

impl Crowd {
    /// Drivers in a storm, each in its colour, and accessors that have pinned, and
    /// hold their pins or not.
    fn start(node: &Node, seed: u64, holds_pins: bool) -> Crowd {
        let mut drivers: Vec<_> = COLOURS.map(|_| Actor::driver(node, "d0")).into();
        let mut rings = Vec::new();
        for (driver, colour) in drivers.iter_mut().zip(COLOURS) {
            let ring = driver.alloc(4 * P, true);
            driver.write(ring.iova, Bytes::same(colour, 4 * P));
            rings.push((ring, colour));
        }
        let mut accessors = Vec::new();
        for (ring, colour) in &rings[1..] {
            let mut accessor = pinned(node, *ring, *colour);
            if !holds_pins {
                accessor.must(&Say::Unpin);
            }
            accessors.push(accessor);
        }
        for (driver, colour) in drivers.iter_mut().zip(COLOURS) {
            driver.begin(&Ask::Storm {
                colour,
                seed: seed + u64::from(colour),
                max_len: 40_000,
            });
        }
        Crowd { drivers, accessors }
    }

    fn pids(&self) -> Vec<u32> {
        let drivers = self.drivers.iter().map(Actor::pid);
        drivers
            .chain(self.accessors.iter().map(Accessor::pid))
            .collect()
    }

    /// Collects the corpses.
    fn reap(&mut self) {
        self.drivers.iter_mut().for_each(Actor::kill);
        self.accessors.iter_mut().for_each(Accessor::kill);
    }
}

/// A process that looks at a ring under a pin, and keeps the pin.
fn pinned(node: &Node, ring: Place, colour: u8) -> Accessor {
    let (mut accessor, _) = Accessor::device(node, "d0");
    accessor.must(&Say::Pin);
    let seen = accessor.must(&Say::Read {
        iova: ring.iova,
        len: 8,
    });
    assert_eq!(seen, json!(vec![colour; 8]));
    accessor
}

/// K-03, D15.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn kill_both_sides() {
    let mut node = Node::start().await;
    let empty = node.counts().await;
    let own = std::process::id();
    assert_eq!(children::descendants(own), [node.pid()]);
    for round in 0..rounds(20) {
        node.create("d0", spec(BOUNCE, COHERENT)).await.unwrap();
        // Every second time frees have to wait for pins, and soon nothing goes on
        // any more until somebody dies.
        let holds_pins = round % 2 == 0;
        let most = if holds_pins { 50 } else { 150 };
        let begun = node.get("d0").await.unwrap().generation;
        let mut crowd = Crowd::start(&node, round * 1_000, holds_pins);
        // A moment that is different each time: so many changes later.
        let enough = begun + RINGS + 1 + (round * 37) % most;
        let until = std::time::Instant::now() + wait::DEADLINE;
        while node.get("d0").await.unwrap().generation < enough {
            assert!(std::time::Instant::now() < until, "no storm");
        }
        // In another order each time, and nobody is waited for in between.
        let mut doomed = crowd.pids();
        doomed.push(node.pid());
        let first = usize::try_from(round).unwrap() % doomed.len();
        doomed.rotate_left(first);
        for pid in &doomed {
            children::signal(*pid, Signal::KILL);
        }
        node.kill();
        crowd.reap();
        let left = children::descendants(own);
        assert!(left.is_empty(), "{left:?} are left");

        node.restart().await;

        assert_begins_from_nothing(&node).await;
        assert_eq!(children::descendants(own), [node.pid()]);
        node.until_counts(empty).await;
    }
}

/// No domain is there, and one that is made anew is whole and has no byte of
/// those before.
async fn assert_begins_from_nothing(node: &Node) {
    let request = v1::ListDomainsRequest::default();
    let domains = node.admin().domains().list_domains(request).await;
    assert_eq!(domains.unwrap().into_inner().domains, []);
    let info = node.info().await;
    let held = (
        info.domains,
        info.sessions,
        info.memories,
        info.region_bytes,
    );
    assert_eq!(held, (0, 0, 0, 0));
    let dir = node.runtime_dir();
    let sockets = [dir.public(), dir.admin()].map(|dir| fs::read_dir(dir).unwrap().count());
    assert_eq!(sockets, [2, 1], "something is left beside the sockets");

    node.create("d0", spec(BOUNCE, COHERENT)).await.unwrap();
    let usage = node.usage("d0").await;
    let mut heir = Raw::driver(node, "d0").await;
    for (start, bytes) in heir.view() {
        let foreign = bytes
            .iter()
            .position(|byte| *byte != 0 && *byte != scrubbed());
        assert_eq!(foreign, None, "a foreign byte above {start:#x}");
    }
    // No range is lost: all of it can be had.
    let ring = heir.alloc_len(COHERENT).await.unwrap();
    let memory = heir.memory(BOUNCE).await;
    let mapping = heir
        .map(memory.entry(0, BOUNCE - P, FromDevice))
        .await
        .unwrap();
    for (iova, len) in [(ring.iova, COHERENT), (mapping.iova, BOUNCE - P)] {
        let seen = heir.read(iova, usize::try_from(len).unwrap());
        assert!(seen.iter().all(|byte| *byte == 0), "not zero");
    }
    drop(heir);
    node.until_usage("d0", usage).await;
    node.delete("d0", true).await.unwrap();
}
