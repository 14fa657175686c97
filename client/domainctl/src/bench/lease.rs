//! Scenario `lease`: one buffer is mapped and unmapped through a pool of leased
//! memory, without a call. The floor is a copy of the same bytes.

use std::hint::black_box;
use std::time::Instant;

use domain_core::session::Role;
use domaind_client::pool::{Pool, PoolOptions, ToDevice};
use domaind_client::{Error, Session};
use tokio::task::yield_now;

use super::latency::Lap;
use super::party::{Party, Place};
use super::turns::Work;
use super::{BOUNCE_BYTES, Facts};

pub(super) const FACTS: Facts = Facts {
    operation: "map, unmap",
    floor: "memcpy",
    size_bytes_most: 1 << 20,
    batch: BATCH,
    bounce_bytes,
};

/// To read the clock takes longer than one operation.
const BATCH: usize = 100;
/// What a pool leases at least.
const LEASE_BYTES: u64 = 256 << 10;

struct Bouncer {
    bytes: Vec<u8>,
    copy: Vec<u8>,
    pool: Pool,
    session: Session,
    party: Party,
}

pub(super) fn crew(place: &Place) -> anyhow::Result<Vec<Box<dyn Work>>> {
    let bouncer = |_| -> anyhow::Result<Box<dyn Work>> { Ok(Box::new(Bouncer::new(place)?)) };
    (0..place.threads).map(bouncer).collect()
}

/// One lease for each thread.
fn bounce_bytes(threads: u64, size_bytes: u64) -> u64 {
    BOUNCE_BYTES + lease_bytes(size_bytes) * threads
}

fn lease_bytes(size_bytes: u64) -> u64 {
    LEASE_BYTES.max(size_bytes.next_multiple_of(4096))
}

impl Bouncer {
    fn new(place: &Place) -> anyhow::Result<Bouncer> {
        let party = place.party()?;
        let session = party.run(party.attach(Role::Driver))?;
        let lease_bytes = lease_bytes(place.size_bytes);
        let options = PoolOptions {
            lease_bytes,
            most_bytes: lease_bytes,
            keep_bytes: lease_bytes,
            spare_bytes: 0,
            ..PoolOptions::default()
        };
        let len = usize::try_from(place.size_bytes)?;
        Ok(Bouncer {
            bytes: vec![7; len],
            copy: vec![1; len],
            pool: party.run(session.pool(options))?,
            session,
            party,
        })
    }
}

impl Work for Bouncer {
    fn ours(&mut self) -> anyhow::Result<Lap> {
        // Nothing here asks the daemon, and so would notice that it has gone.
        self.party.run(yield_now());
        if let Some(ended) = self.session.is_ended() {
            return Err(Error::Ended(ended).into());
        }
        let start = Instant::now();
        for _ in 0..BATCH {
            let bytes = black_box(self.bytes.as_slice());
            let mapping = self.pool.map(bytes, ToDevice).map_err(Error::from)?;
            black_box(mapping.iova());
            mapping.unmap().map_err(Error::from)?;
        }
        Ok(lap(start))
    }

    fn floor(&mut self) -> anyhow::Result<Lap> {
        let start = Instant::now();
        for _ in 0..BATCH {
            black_box(&mut self.copy[..]).copy_from_slice(black_box(&self.bytes));
        }
        Ok(lap(start))
    }
}

fn lap(start: Instant) -> Lap {
    Lap {
        took: start.elapsed(),
        ops: BATCH as u64,
    }
}
