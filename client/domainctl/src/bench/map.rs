//! Scenario `map`: one buffer is mapped and unmapped, a call for each. The floor
//! is as many empty calls on the same connection.

use std::time::Instant;

use anyhow::Context;
use domain_core::Direction;
use domain_core::session::Role;
use domain_core::streaming::MapSpec;
use domaind_client::{Buffer, Session};
use tonic::transport::Channel;
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_client::HealthClient;

use super::latency::Lap;
use super::party::{Party, Place};
use super::turns::Work;
use super::{BOUNCE_BYTES, Facts};

pub(super) const FACTS: Facts = Facts {
    operation: "Map and Unmap",
    floor: "empty RPC x 2",
    // More would not leave the aperture small.
    size_bytes_most: 64 << 20,
    batch: 1,
    bounce_bytes,
};

struct Mapper {
    spec: MapSpec,
    health: HealthClient<Channel>,
    _buffer: Buffer,
    session: Session,
    party: Party,
}

pub(super) fn crew(place: &Place) -> anyhow::Result<Vec<Box<dyn Work>>> {
    let mapper = |_| -> anyhow::Result<Box<dyn Work>> { Ok(Box::new(Mapper::new(place)?)) };
    (0..place.threads).map(mapper).collect()
}

/// Twice what is mapped at a time: what was unmapped may wait for a moment.
fn bounce_bytes(threads: u64, size_bytes: u64) -> u64 {
    let each = size_bytes.next_multiple_of(4096) * 2;
    (each * threads).max(BOUNCE_BYTES)
}

impl Mapper {
    fn new(place: &Place) -> anyhow::Result<Mapper> {
        let party = place.party()?;
        let session = party.run(party.attach(Role::Driver))?;
        let buffer = party.run(session.buffer(place.size_bytes))?;
        let memory = buffer.memory().id();
        Ok(Mapper {
            spec: MapSpec::new(memory, 0, place.size_bytes, Direction::ToDevice),
            health: HealthClient::new(party.client().channel()),
            _buffer: buffer,
            session,
            party,
        })
    }
}

impl Work for Mapper {
    fn ours(&mut self) -> anyhow::Result<Lap> {
        let Mapper { session, spec, .. } = self;
        self.party.run(async {
            let start = Instant::now();
            let mapping = session.map(*spec).await?;
            mapping
                .unmap(None)
                .await
                .map_err(domaind_client::Error::from)?;
            let took = start.elapsed();
            Ok(Lap { took, ops: 1 })
        })
    }

    fn floor(&mut self) -> anyhow::Result<Lap> {
        let health = &mut self.health;
        self.party.run(async {
            let start = Instant::now();
            for _ in 0..2 {
                let asked = health.check(HealthCheckRequest::default()).await;
                asked.context("asking for the daemon's health")?;
            }
            let took = start.elapsed();
            Ok(Lap { took, ops: 1 })
        })
    }
}
