//! Watching a domain from outside, over gRPC.

use std::fmt;

use domain_core::addr::IovaRange;
use domain_core::mapping::MappingView;
use domain_core::session::SessionId;
use domaind_proto::names::{DomainId, parse_session};
use domaind_proto::v1::watch_domain_response::Event;
use domaind_proto::{convert, v1};
use tonic::Streaming;

use crate::answers;
use crate::client::Client;
use crate::error::{Error, ProtocolError};

/// What happens in a domain.
#[derive(Clone, Debug, PartialEq)]
pub enum DomainEvent {
    /// All there is, or a part of it. Comes first, and behind every resync.
    Snapshot(DomainSnapshot),
    /// The next change.
    Change(DomainChange),
    /// Sessions and quarantine. Comes behind a snapshot, and when they have
    /// changed.
    Status(DomainStatus),
    /// Changes were lost, because this side was too slow or asked for what is not
    /// known any more. A snapshot follows.
    Resync {
        /// The present state.
        generation: u64,
    },
}

/// A part of what is mapped in a domain.
#[derive(Clone, Debug, PartialEq)]
pub struct DomainSnapshot {
    /// The state that it shows.
    pub generation: u64,
    /// Visible mappings, by address.
    pub mappings: Vec<MappingView>,
    /// More of the same snapshot follows.
    pub more: bool,
}

/// A change of what is mapped in a domain.
#[derive(Clone, Debug, PartialEq)]
pub struct DomainChange {
    /// Number of the state after it.
    pub generation: u64,
    /// What is visible now.
    pub added: Vec<MappingView>,
    /// What is not visible any more, whole mappings.
    pub removed: Vec<IovaRange>,
}

/// Who is in a domain, and what is held back.
#[derive(Clone, Debug, PartialEq)]
pub struct DomainStatus {
    /// What the domain holds.
    pub usage: v1::DomainUsage,
    /// Sessions that owe an Ack or that hold something in quarantine.
    pub sessions: Vec<WaitedFor>,
}

/// One session that others may have to wait for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WaitedFor {
    /// Which session.
    pub id: SessionId,
    /// It has ended, and may still reach what is in quarantine.
    pub fenced: bool,
    /// Its newest acknowledgment.
    pub acked_generation: u64,
    /// What it was asked to acknowledge.
    pub asked_generation: u64,
    /// Mappings in quarantine because of it.
    pub quarantined_mappings: u64,
}

/// The events of a domain, from [`Client::watch_domain`] on. Dropping it ends
/// the watch.
pub struct DomainWatch {
    events: Streaming<v1::WatchDomainResponse>,
    /// No change at or below it can come any more.
    newest: u64,
}

impl Client {
    /// Watches a domain: what it holds, and then every change as it happens.
    /// With a generation only what came after it, if that is still known.
    /// Cancelling leaves nothing.
    ///
    /// # Errors
    /// [`Error::Refused`] (no such domain, or not the caller's),
    /// [`Error::Transport`].
    pub async fn watch_domain(
        &self,
        domain: &DomainId,
        generation: Option<u64>,
    ) -> Result<DomainWatch, Error> {
        let request = v1::WatchDomainRequest {
            name: domain.name(),
            generation,
        };
        let events = self.domains().watch_domain(request).await?.into_inner();
        Ok(DomainWatch {
            events,
            newest: generation.unwrap_or(0),
        })
    }
}

impl DomainWatch {
    /// The next event; `None` when the daemon ends the watch. Cancel safe.
    ///
    /// # Errors
    /// [`Error::Refused`] with NOT_FOUND when the domain was deleted,
    /// [`Error::Transport`] when the connection is lost; the newest generation
    /// that was heard of is where a new watch goes on.
    pub async fn next(&mut self) -> Result<Option<DomainEvent>, Error> {
        let Some(message) = self.events.message().await? else {
            return Ok(None);
        };
        let event = event(&message)?;
        self.check_order(&event)?;
        Ok(Some(event))
    }

    /// The newest generation that was heard of.
    #[must_use]
    pub fn generation(&self) -> u64 {
        self.newest
    }

    fn check_order(&mut self, event: &DomainEvent) -> Result<(), ProtocolError> {
        let newest = self.newest;
        match *event {
            DomainEvent::Snapshot(DomainSnapshot { generation, .. })
            | DomainEvent::Resync { generation } => self.newest = generation,
            DomainEvent::Change(DomainChange { generation, .. }) => {
                if generation <= newest {
                    return Err(ProtocolError::Generation { generation, newest });
                }
                self.newest = generation;
            }
            DomainEvent::Status(_) => {}
        }
        Ok(())
    }
}

impl fmt::Debug for DomainWatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DomainWatch")
            .field("newest", &self.newest)
            .finish_non_exhaustive()
    }
}

fn event(wire: &v1::WatchDomainResponse) -> Result<DomainEvent, ProtocolError> {
    match &wire.event {
        Some(Event::Snapshot(snapshot)) => Ok(DomainEvent::Snapshot(DomainSnapshot {
            generation: snapshot.generation,
            mappings: mappings(&snapshot.mappings)?,
            more: snapshot.more,
        })),
        Some(Event::Change(change)) => Ok(DomainEvent::Change(DomainChange {
            generation: change.generation,
            added: mappings(&change.added)?,
            removed: ranges(&change.removed)?,
        })),
        Some(Event::Status(wire)) => Ok(DomainEvent::Status(status(wire)?)),
        Some(Event::Resync(v1::WatchResync { generation })) => Ok(DomainEvent::Resync {
            generation: *generation,
        }),
        None => Err(ProtocolError::Missing { field: "event" }),
    }
}

fn mappings(wire: &[v1::Mapping]) -> Result<Vec<MappingView>, ProtocolError> {
    wire.iter().map(answers::mapping).collect()
}

fn ranges(wire: &[v1::IovaRange]) -> Result<Vec<IovaRange>, ProtocolError> {
    let range = |wire: &v1::IovaRange| convert::range(*wire).map_err(ProtocolError::Range);
    wire.iter().map(range).collect()
}

fn status(wire: &v1::WatchStatus) -> Result<DomainStatus, ProtocolError> {
    let missing = ProtocolError::Missing { field: "usage" };
    let sessions = wire.sessions.iter().map(waited_for);
    Ok(DomainStatus {
        usage: wire.usage.ok_or(missing)?,
        sessions: sessions.collect::<Result<_, _>>()?,
    })
}

fn waited_for(wire: &v1::WatchSession) -> Result<WaitedFor, ProtocolError> {
    Ok(WaitedFor {
        id: parse_session(&wire.name).map_err(ProtocolError::Name)?,
        fenced: wire.fenced,
        acked_generation: wire.acked_generation,
        asked_generation: wire.asked_generation,
        quarantined_mappings: wire.quarantined_mappings,
    })
}

#[cfg(test)]
mod tests {
    use domain_core::addr::Iova;
    use domain_core::mapping::{Phase, ViewKind};
    use domain_core::perm::Perm;
    use tokio::time::timeout;
    use tonic::Code;

    use super::*;
    use crate::fake::{FakeDaemon, SOON};

    fn wire(event: Event) -> v1::WatchDomainResponse {
        v1::WatchDomainResponse { event: Some(event) }
    }

    fn coherent() -> MappingView {
        MappingView {
            id: None,
            owner: Some(SessionId::new(2)),
            visible: IovaRange::from_len(Iova::new(0x1000), 64).unwrap(),
            perm: Perm::ReadWrite,
            phase: Phase::Quarantined,
            kind: ViewKind::Coherent,
            blocked_by: Some(SessionId::new(3)),
        }
    }

    fn change(generation: u64) -> Event {
        Event::Change(v1::WatchChange {
            generation,
            added: vec![coherent().into()],
            removed: vec![coherent().visible.into()],
        })
    }

    fn snapshot(generation: u64) -> Event {
        Event::Snapshot(v1::WatchSnapshot {
            generation,
            mappings: vec![coherent().into()],
            more: false,
        })
    }

    /// What a watch makes of these messages, and how it ends.
    async fn watched(said: Vec<Event>) -> (Vec<DomainEvent>, Error) {
        let fake = FakeDaemon::start().await;
        let said = said.into_iter().map(wire).collect();
        *fake.calls.watch.lock().unwrap() = said;
        let domain = DomainId::new("d").unwrap();
        let mut watch = fake.client.watch_domain(&domain, Some(4)).await.unwrap();
        let asked = fake.calls.watched.lock().unwrap().clone();
        assert_eq!(
            (&*asked[0].name, asked[0].generation),
            ("domains/d", Some(4))
        );
        let mut events = Vec::new();
        loop {
            match timeout(SOON, watch.next()).await.unwrap() {
                Ok(event) => events.push(event.unwrap()),
                Err(error) => return (events, error),
            }
        }
    }

    #[tokio::test]
    async fn a_watch_tells_all_in_order_until_the_domain_is_deleted() {
        let waited_for = v1::WatchSession {
            name: "sessions/3".to_owned(),
            fenced: true,
            acked_generation: 5,
            asked_generation: 8,
            quarantined_mappings: 1,
        };
        let status = Event::Status(v1::WatchStatus {
            usage: Some(v1::DomainUsage::default()),
            sessions: vec![waited_for],
        });
        let resync = Event::Resync(v1::WatchResync { generation: 20 });

        let said = vec![
            change(5),
            status,
            change(6),
            resync,
            snapshot(20),
            change(21),
        ];
        let (events, end) = watched(said).await;

        let changed = |generation| {
            DomainEvent::Change(DomainChange {
                generation,
                added: vec![coherent()],
                removed: vec![coherent().visible],
            })
        };
        assert_eq!(events[0], changed(5));
        let DomainEvent::Status(status) = &events[1] else {
            panic!("{:?}", events[1])
        };
        assert_eq!(status.sessions[0].id, SessionId::new(3));
        assert!(status.sessions[0].fenced);
        assert_eq!(events[2], changed(6));
        assert_eq!(events[3], DomainEvent::Resync { generation: 20 });
        let DomainEvent::Snapshot(snapshot) = &events[4] else {
            panic!("{:?}", events[4])
        };
        assert_eq!(snapshot.mappings, [coherent()]);
        assert_eq!(events[5], changed(21));
        assert_eq!(end.code(), Some(Code::NotFound));
    }

    #[tokio::test]
    async fn changes_that_go_back_and_events_that_say_nothing_are_not_believed() {
        let wrong_name = Event::Status(v1::WatchStatus {
            usage: Some(v1::DomainUsage::default()),
            sessions: vec![v1::WatchSession::default()],
        });
        let without_usage = Event::Status(v1::WatchStatus::default());
        for said in [
            vec![change(4)],
            vec![change(6), change(6)],
            vec![snapshot(9), change(9)],
            vec![wrong_name],
            vec![without_usage],
        ] {
            let (_, error) = watched(said).await;
            assert!(matches!(error, Error::Protocol(_)), "{error:?}");
        }
        assert!(event(&v1::WatchDomainResponse::default()).is_err());
    }
}
