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
use crate::live::Live;
use crate::reader::Patience;
use crate::signal::Changes;

/// Changes that are looked at in one go.
const CHANGES: usize = 64;
/// Ranges of one frame: each takes 24 bytes at most, and 28 with its permission.
const RANGES: usize = 100;
/// Closed regions of one frame, beside ranges: each takes two bytes.
const CLOSED: usize = 500;

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
        held: None,
    };
    let mut patience = Patience::new(ack_timeout);
    // Who wants to know nothing is not rung for: every map and unmap would.
    let wants = live.wants.any();
    let mut changes = wants.then(|| live.domain.signal.subscribe());
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
            () = heard(changes.as_mut()) => {}
            () = sleep_until(deadline.unwrap_or_else(far)), if deadline.is_some() => return fenced(),
        }
    }
}

/// Resolves when something has changed, for who wants to know.
async fn heard(changes: Option<&mut Changes>) {
    match changes {
        // A domain is there as long as it has sessions.
        Some(changes) => _ = changes.changed().await,
        None => std::future::pending().await,
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
    /// A frame that may become the one that asks, if no other comes behind it.
    held: Option<v1::Change>,
}

impl Teller<'_> {
    /// Tells what has changed, and asks for what is owed. Cancelled, it has told a
    /// part, and is not used again.
    async fn tell(&mut self, owed: Option<Owed>) -> Result<(), Over> {
        if let Some(owed) = owed.filter(|owed| owed.generation > self.asked) {
            // Who answers by frames must know what to drop.
            if self.live.wants.any() || self.live.by_frames() {
                // And not more: generations do not go back.
                self.tell_up_to(owed.generation).await?;
            }
            self.ask(owed).await?;
        }
        // Without an occasion, only who wants to know everything is told.
        if self.live.wants.any() {
            self.tell_up_to(u64::MAX).await?;
        }
        match self.held.take() {
            Some(last) => self.send(last).await,
            None => Ok(()),
        }
    }

    /// All changes up to a generation, but for the last frame, which is held.
    async fn tell_up_to(&mut self, generation: u64) -> Result<(), Over> {
        loop {
            let Ok(changes) = self.live.domain.core.changes(self.told, CHANGES) else {
                // Too much has changed to be told.
                self.told = self.live.domain.core.generation().min(generation);
                let everything = v1::Change {
                    generation: self.told,
                    everything: true,
                    ..v1::Change::default()
                };
                return self.say(everything).await;
            };
            let before = self.told;
            for change in &changes {
                if change.generation <= generation {
                    self.tell_one(change).await?;
                }
            }
            if self.told == before {
                return Ok(());
            }
        }
    }

    /// With the last of what it was told of the same generation, if that is held.
    async fn ask(&mut self, owed: Owed) -> Result<(), Over> {
        let generation = owed.generation;
        self.asked = generation;
        if self.held.as_ref().map(|held| held.generation) != Some(generation) {
            let nothing = v1::Change {
                generation,
                ..v1::Change::default()
            };
            self.say(nothing).await?;
        }
        for part in owed.closed.chunks(CLOSED) {
            let closed = part.iter().map(|region| region.get()).collect();
            match &mut self.held {
                Some(held) if held.closed.is_empty() => held.closed = closed,
                _ => {
                    self.say(v1::Change {
                        generation,
                        closed,
                        ..v1::Change::default()
                    })
                    .await?;
                }
            }
        }
        match self.held.take() {
            Some(last) => self.send(v1::Change { ack: true, ..last }).await,
            None => Ok(()),
        }
    }

    /// In as many frames as it takes.
    async fn tell_one(&mut self, change: &Change) -> Result<(), Over> {
        let generation = change.generation;
        self.told = generation;
        if self.live.wants.removals || self.live.by_frames() {
            for part in change.removed.chunks(RANGES) {
                let removed = part.iter().map(|range| (*range).into()).collect();
                self.say(v1::Change {
                    generation,
                    removed,
                    ..v1::Change::default()
                })
                .await?;
            }
        }
        if self.live.wants.additions {
            for part in change.added.chunks(RANGES) {
                let added = part.iter().map(|view| v1::AddedRange {
                    range: Some(view.visible.into()),
                    perm: v1::Perm::from(view.perm).into(),
                });
                let added = added.collect();
                self.say(v1::Change {
                    generation,
                    added,
                    ..v1::Change::default()
                })
                .await?;
            }
        }
        Ok(())
    }

    /// Holds a frame, and sends the one that was held.
    async fn say(&mut self, change: v1::Change) -> Result<(), Over> {
        match self.held.replace(change) {
            Some(before) => self.send(before).await,
            None => Ok(()),
        }
    }

    async fn send(&self, change: v1::Change) -> Result<(), Over> {
        send(self.frames, 0, Answer::Change(change), None).await
    }
}
