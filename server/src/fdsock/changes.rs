//! What a session is told of changes, and how long it may owe an answer.

use domain_core::domain::Change;
use domain_core::session::Owed;
use domaind_proto::frame::FrameSocket;
use domaind_proto::v1::server_frame::Body as Answer;
use domaind_proto::v1::{self, EndReason};
use std::sync::Arc;
use std::time::Duration;
use tokio::time::{sleep_until, timeout_at};

use super::{Over, explain, send};
use crate::live::{Live, Wants};
use crate::reader::Patience;

/// Changes that are looked at in one go.
const CHANGES: usize = 64;
/// Ranges of one frame: each takes 24 bytes at most, and 28 with its permission.
const RANGES: usize = 120;

/// Tells the session what it must know, until it owes an acknowledgment for too
/// long.
pub(super) async fn tell(
    frames: &FrameSocket,
    live: &Arc<Live>,
    joined: u64,
    ack_timeout: Duration,
) -> Over {
    let mut teller = Teller {
        frames,
        live,
        told: joined,
        asked: joined,
    };
    let mut patience = Patience::new(ack_timeout);
    let mut changes = live.domain.signal.subscribe();
    loop {
        let owed = live.domain.core.owed(live.id);
        let deadline = owed.as_ref().map(|owed| patience.until(owed.acked));
        if owed.is_none() {
            patience.renew();
        }
        let telling = teller.tell(owed);
        let told = match deadline {
            Some(deadline) => timeout_at(deadline, telling)
                .await
                .unwrap_or_else(|_| Err(fenced())),
            None => telling.await,
        };
        if let Err(over) = told {
            return over;
        }
        tokio::select! {
            () = live.reader.rung() => {}
            _ = changes.changed(), if live.wants.any() => {}
            () = sleep_until(deadline.unwrap_or_else(far)), if deadline.is_some() => return fenced(),
        }
    }
}

fn fenced() -> Over {
    Over::Ended(EndReason::Fenced, explain(EndReason::Fenced).into())
}

fn far() -> tokio::time::Instant {
    tokio::time::Instant::now() + Duration::from_secs(3600)
}

struct Teller<'a> {
    frames: &'a FrameSocket,
    live: &'a Arc<Live>,
    /// What it has been told of.
    told: u64,
    /// What it has been asked to acknowledge.
    asked: u64,
}

impl Teller<'_> {
    /// Tells what has changed, and asks for what is owed. Cancelled, it has told a
    /// part, and is not used again.
    async fn tell(&mut self, owed: Option<Owed>) -> Result<(), Over> {
        let owed = owed.filter(|owed| owed.generation > self.asked);
        let wants = Wants {
            // Who answers by frames must know what to drop.
            removals: self.live.wants.removals || self.live.by_frames(),
            ..self.live.wants
        };
        if !wants.any() {
            return match owed {
                Some(owed) => self.ask(owed, v1::Change::default()).await,
                None => Ok(()),
            };
        }
        // Without an occasion, only who wants to know everything is told.
        if owed.is_none() && !self.live.wants.any() {
            return Ok(());
        }
        loop {
            let Ok(changes) = self.live.domain.core.changes(self.told, CHANGES) else {
                return self.give_up_counting(owed).await;
            };
            for change in &changes {
                self.tell_one(change, wants).await?;
            }
            if changes.is_empty() {
                break;
            }
        }
        match owed {
            Some(owed) => self.ask(owed, v1::Change::default()).await,
            None => Ok(()),
        }
    }

    /// Too much has changed to be told.
    async fn give_up_counting(&mut self, owed: Option<Owed>) -> Result<(), Over> {
        let everything = v1::Change {
            everything: true,
            ..v1::Change::default()
        };
        self.told = self.live.domain.core.generation();
        match owed {
            Some(owed) => self.ask(owed, everything).await,
            None => {
                let generation = self.told;
                self.send(v1::Change {
                    generation,
                    ..everything
                })
                .await
            }
        }
    }

    async fn ask(&mut self, owed: Owed, change: v1::Change) -> Result<(), Over> {
        self.asked = owed.generation;
        let closed = owed.closed.iter().map(|region| region.get());
        self.send(v1::Change {
            generation: owed.generation,
            ack: true,
            closed: closed.collect(),
            ..change
        })
        .await
    }

    /// In as many frames as it takes.
    async fn tell_one(&mut self, change: &Change, wants: Wants) -> Result<(), Over> {
        let generation = change.generation;
        self.told = generation;
        if wants.removals {
            for part in change.removed.chunks(RANGES) {
                let removed = part.iter().map(|range| (*range).into()).collect();
                self.send(v1::Change {
                    generation,
                    removed,
                    ..v1::Change::default()
                })
                .await?;
            }
        }
        if wants.additions {
            for part in change.added.chunks(RANGES) {
                let added = part.iter().map(|view| v1::AddedRange {
                    range: Some(view.visible.into()),
                    perm: v1::Perm::from(view.perm).into(),
                });
                let added = added.collect();
                self.send(v1::Change {
                    generation,
                    added,
                    ..v1::Change::default()
                })
                .await?;
            }
        }
        Ok(())
    }

    async fn send(&self, change: v1::Change) -> Result<(), Over> {
        send(self.frames, 0, Answer::Change(change), None).await
    }
}
