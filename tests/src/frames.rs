//! A session that acknowledges by hand, frame by frame, or never.

use std::os::fd::OwnedFd;
use std::time::Duration;

use domaind_proto::v1;
use domaind_proto::v1::client_frame::Body as AskBody;
use domaind_proto::v1::mapping_service_client::MappingServiceClient;
use domaind_proto::v1::server_frame::Body as AnswerBody;

use crate::node::{Node, name};
use crate::raw::{Attachment, Raw, Wire};

/// An attached session that hears what changes and says what it is told to.
#[derive(Debug)]
pub struct Acker {
    /// The session.
    pub raw: Raw,
}

impl Acker {
    /// A device that acknowledges with frames.
    pub async fn device(node: &Node, domain: &str) -> Acker {
        let mut attach = by_frames(domain);
        attach.role = v1::Role::Device.into();
        Acker::attach(node, attach).await
    }

    /// A driver that acknowledges with frames.
    pub async fn driver(node: &Node, domain: &str) -> Acker {
        Acker::attach(node, by_frames(domain)).await
    }

    /// Whatever it says.
    ///
    /// # Panics
    /// If it is refused.
    pub async fn attach(node: &Node, attach: v1::Attach) -> Acker {
        let mut wire = Wire::connect(&node.runtime_dir().fd_socket());
        wire.hello().await;
        let given = handshake(&mut wire, attach).await;
        wire.settle().await;
        let calls = MappingServiceClient::new(node.client().await.channel());
        let raw = Raw { wire, given, calls };
        Acker { raw }
    }

    /// The next change that is to be acknowledged, with all that was told
    /// before it.
    ///
    /// # Panics
    /// If anything else comes but changes.
    pub async fn asked(&self) -> v1::Change {
        let mut told = v1::Change::default();
        loop {
            let next = self.change().await;
            told.generation = next.generation;
            told.everything |= next.everything;
            told.removed.extend(next.removed);
            told.closed.extend(next.closed);
            told.added.extend(next.added);
            if next.ack {
                told.ack = true;
                return told;
            }
        }
    }

    /// The next change.
    ///
    /// # Panics
    /// If anything else comes.
    pub async fn change(&self) -> v1::Change {
        let packet = self
            .raw
            .wire
            .receive()
            .await
            .expect("a change, not the end");
        assert_eq!(packet.frame.request_id, 0, "a change answers nothing");
        match packet.frame.body {
            Some(AnswerBody::Change(change)) => change,
            other => panic!("{other:?} instead of a change"),
        }
    }

    /// Whether nothing comes for a while.
    pub async fn hears_nothing(&self, within: Duration) -> bool {
        let heard = tokio::time::timeout(within, self.raw.wire.receive()).await;
        heard.is_err()
    }

    /// Says that it holds nothing older.
    ///
    /// # Panics
    /// If the connection is closed.
    pub async fn ack(&mut self, generation: u64) {
        let ack = AskBody::Ack(v1::Ack { generation });
        self.raw.wire.send(ack, None).await.expect("sent");
    }

    /// Says that it holds nothing any more.
    ///
    /// # Panics
    /// If the connection is closed.
    pub async fn detach(&mut self) {
        let detach = AskBody::Detach(v1::Detach {});
        self.raw.wire.send(detach, None).await.expect("sent");
    }

    /// Waits until it is told that it has ended; why.
    ///
    /// # Panics
    /// If that is not said.
    pub async fn end(&self) -> v1::EndReason {
        loop {
            let packet = self.raw.wire.receive().await.expect("the reason first");
            if let Some(AnswerBody::SessionEnded(ended)) = packet.frame.body {
                return ended.reason();
            }
        }
    }
}

/// An Attach as driver, with acknowledgments by frames.
#[must_use]
pub fn by_frames(domain: &str) -> v1::Attach {
    v1::Attach {
        domain: name(domain),
        role: v1::Role::Driver.into(),
        access: v1::Access::ReadWrite.into(),
        ack_mode: v1::AckMode::Frames.into(),
        ..v1::Attach::default()
    }
}

/// Attaches after hello.
///
/// # Panics
/// If it is refused.
pub async fn handshake(wire: &mut Wire, attach: v1::Attach) -> Attachment {
    let attached = match wire.ask(AskBody::Attach(attach), None).await {
        Ok(AnswerBody::Attached(attached)) => attached,
        other => panic!("{other:?} instead of Attached"),
    };
    let mut regions = Vec::new();
    for _ in 0..attached.regions {
        let packet = wire.receive().await.expect("a region");
        match (packet.frame.body, packet.fd) {
            (Some(AnswerBody::Region(region)), Some(fd)) => regions.push((region, fd)),
            other => panic!("{other:?} instead of a region with its fd"),
        }
    }
    let packet = wire.receive().await.expect("ready");
    let shows_iovas = |(region, _): &(v1::Region, OwnedFd)| region.range.is_some();
    let (regions, tables) = regions.into_iter().partition(shows_iovas);
    match packet.frame.body {
        Some(AnswerBody::Ready(ready)) => Attachment {
            attached,
            regions,
            tables,
            ready,
        },
        other => panic!("{other:?} instead of Ready"),
    }
}
