//! Scenario `invalidate`: a direct mapping is ended while another session pins
//! and unpins without a pause, until nobody can reach it any more. The floor is
//! a message to another thread and back.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Instant;

use anyhow::{Context, ensure};
use domain_core::addr::IovaRange;
use domain_core::direct::{DirectSpec, Placement};
use domain_core::perm::Perm;
use domain_core::session::Role;
use domaind_client::{Buffer, Session};

use super::echo::Echo;
use super::latency::Lap;
use super::party::{Device, Party, Place};
use super::turns::Work;
use super::{BOUNCE_BYTES, Facts};

pub(super) const FACTS: Facts = Facts {
    operation: "UnmapDirect beside a session that pins",
    floor: "socket round trip",
    // Each thread has memory of twice as much.
    size_bytes_most: 2 << 20,
    batch: 1,
    bounce_bytes: |_, _| BOUNCE_BYTES,
};

const PAGE: u64 = 4096;
const MESSAGE_BYTES: usize = 64;

/// Maps a piece of its memory and ends that again. Another piece stays, so that
/// the memory is never closed, which would take the device longer.
struct Remover {
    /// The first one has it. It is dropped first, and so is what stands first
    /// here: before the memory that is pinned.
    _pinning: Option<Pinning>,
    still_pins: Arc<AtomicBool>,
    spec: DirectSpec,
    echo: Echo<MESSAGE_BYTES>,
    _buffer: Buffer,
    session: Session,
    party: Party,
}

pub(super) fn crew(place: &Place) -> anyhow::Result<Vec<Box<dyn Work>>> {
    let first = Prepared::new(place)?;
    let pinning = Pinning::start(place, first.stays)?;
    let still_pins = Arc::clone(&pinning.still_pins);
    let mut work: Vec<Box<dyn Work>> = vec![Box::new(first.beside(&still_pins, Some(pinning))?)];
    for _ in 1..place.threads {
        work.push(Box::new(Prepared::new(place)?.beside(&still_pins, None)?));
    }
    Ok(work)
}

/// A remover that has nobody to take anything from yet.
struct Prepared {
    spec: DirectSpec,
    stays: IovaRange,
    buffer: Buffer,
    session: Session,
    party: Party,
}

impl Prepared {
    fn new(place: &Place) -> anyhow::Result<Prepared> {
        let party = place.party()?;
        let session = party.run(party.attach(Role::Driver))?;
        let len_bytes = place.size_bytes.next_multiple_of(PAGE);
        let buffer = party.run(session.buffer(2 * len_bytes))?;
        let piece = |offset| DirectSpec {
            memory: buffer.memory().id(),
            offset,
            len_bytes,
            perm: Perm::ReadWrite,
            placement: Placement::Anywhere {
                align_bytes: 0,
                limit: None,
            },
        };
        let stays = party.run(session.map_direct(piece(0)))?.range;
        Ok(Prepared {
            spec: piece(len_bytes),
            stays,
            buffer,
            session,
            party,
        })
    }

    fn beside(
        self,
        still_pins: &Arc<AtomicBool>,
        pinning: Option<Pinning>,
    ) -> anyhow::Result<Remover> {
        Ok(Remover {
            _pinning: pinning,
            still_pins: Arc::clone(still_pins),
            spec: self.spec,
            echo: Echo::start(|_| {})?,
            _buffer: self.buffer,
            session: self.session,
            party: self.party,
        })
    }
}

impl Work for Remover {
    fn ours(&mut self) -> anyhow::Result<Lap> {
        let Remover { session, spec, .. } = self;
        let lap = self.party.run(async {
            let mapped = session.map_direct(*spec).await?;
            let start = Instant::now();
            session.unmap_direct(&[mapped.range]).await?;
            let took = start.elapsed();
            Ok::<_, domaind_client::Error>(Lap { took, ops: 1 })
        })?;
        let still_pins = self.still_pins.load(Ordering::Relaxed);
        ensure!(still_pins, "the device pins no more");
        Ok(lap)
    }

    fn floor(&mut self) -> anyhow::Result<Lap> {
        let start = Instant::now();
        round_trip(&mut self.echo).context("the floor's message")?;
        let took = start.elapsed();
        Ok(Lap { took, ops: 1 })
    }
}

/// A device that pins, translates and unpins, over and over, on a thread of its
/// own.
struct Pinning {
    stop: Arc<AtomicBool>,
    /// Until it was stopped, or something is wrong.
    still_pins: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Pinning {
    fn start(place: &Place, range: IovaRange) -> anyhow::Result<Pinning> {
        let device = Device::attach(place)?;
        device.open(range, Perm::Read)?;
        let stop = Arc::new(AtomicBool::new(false));
        let still_pins = Arc::new(AtomicBool::new(true));
        let (told, tell) = (Arc::clone(&stop), Arc::clone(&still_pins));
        let pinning = move || {
            let translates = || {
                device
                    .pin()
                    .is_ok_and(|pin| pin.translate(range, Perm::Read).is_ok())
            };
            while !told.load(Ordering::Relaxed) && translates() {}
            tell.store(false, Ordering::Relaxed);
        };
        Ok(Pinning {
            stop,
            still_pins,
            thread: Some(thread::Builder::new().spawn(pinning)?),
        })
    }
}

impl Drop for Pinning {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn round_trip(echo: &mut Echo<MESSAGE_BYTES>) -> io::Result<()> {
    echo.send(&[1; MESSAGE_BYTES])?;
    echo.receive()?;
    Ok(())
}
