//! What a child process does until its input ends: it attends a domain, or
//! answers on a plain socket.

use std::future;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::thread;

use domaind_client::{Access, AttachOptions, Client, DomainId, Role, RuntimeDir, Session, v1};
use domaind_proto::frame::FrameSocket;
use domaind_proto::v1::client_frame::Body as Ask;
use domaind_proto::v1::server_frame::Body as Answer;
use domaind_tests::node::name;
use domaind_tests::raw;
use serde::{Deserialize, Serialize};
use tokio::runtime::Builder;

use crate::handover::hand;
use crate::pipeline;
use crate::world::{MESSAGE_BYTES, least_spec};

/// What it says when it is there.
pub(crate) const THERE: &str = "there\n";

/// Who attends.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) enum Attendance {
    /// Sends back what comes to a socket.
    Echo { path: PathBuf },
    /// Makes up answers to pipelines.
    EchoStream { path: PathBuf },
    /// Hands memory to whoever connects.
    Hand { path: PathBuf },
    /// Makes domains, which stay.
    Domains {
        dir: PathBuf,
        prefix: String,
        count: u32,
    },
    /// Sessions in a domain.
    Sessions {
        dir: PathBuf,
        domain: String,
        count: usize,
        manner: Manner,
    },
}

/// How a session holds what it has seen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Manner {
    /// Pins, and holds none.
    Idle,
    /// Holds a pin all the time, on the thread that also hears of changes, and
    /// takes another one when it is asked to.
    Holding,
    /// The same, on a thread of its own, that the thread that hears wakes.
    Apart,
    /// Answers a frame for each removal.
    Frames,
}

impl Attendance {
    pub(crate) fn to_json(&self) -> String {
        serde_json::to_string(self).expect("it can be said in JSON")
    }

    /// In the child process.
    pub(crate) fn attend(json: &str) -> io::Result<()> {
        thread::spawn(|| {
            let _ = io::copy(&mut io::stdin(), &mut io::sink());
            // Whatever it holds ends with it.
            std::process::exit(0);
        });
        match serde_json::from_str(json)? {
            Attendance::Echo { path } => echo(&path),
            Attendance::EchoStream { path } => pipeline::echo(&path),
            Attendance::Hand { path } => hand(&path),
            Attendance::Domains { dir, prefix, count } => {
                let runtime = Builder::new_current_thread().enable_all().build()?;
                let making = make_domains(dir, &prefix, count);
                runtime.block_on(making).map_err(io::Error::other)
            }
            Attendance::Sessions {
                dir,
                domain,
                count,
                manner,
            } => {
                let dir = RuntimeDir::new(&dir).map_err(io::Error::other)?;
                let runtime = Builder::new_current_thread().enable_all().build()?;
                let attending = attend(dir, &domain, count, manner);
                runtime.block_on(attending).map_err(io::Error::other)
            }
        }
    }
}

/// Until the other side closes.
fn echo(path: &Path) -> io::Result<()> {
    let mut socket = UnixStream::connect(path)?;
    let mut message = [0; MESSAGE_BYTES];
    while socket.read_exact(&mut message).is_ok() {
        socket.write_all(&message)?;
    }
    Ok(())
}

async fn make_domains(dir: PathBuf, prefix: &str, count: u32) -> anyhow::Result<()> {
    let client = Client::connect(&RuntimeDir::new(&dir)?).await?;
    for number in 0..count {
        let request = v1::CreateDomainRequest {
            domain_id: format!("{prefix}-{number}"),
            spec: Some(least_spec()),
            ..Default::default()
        };
        client.domains().create_domain(request).await?;
    }
    say_there()?;
    future::pending().await
}

async fn attend(dir: RuntimeDir, domain: &str, count: usize, manner: Manner) -> anyhow::Result<()> {
    if manner == Manner::Frames {
        return answer_frames(&dir, domain).await;
    }
    let client = Client::connect(&dir).await?;
    let options = AttachOptions::new(Role::Device, Access::ReadWrite);
    let domain = DomainId::new(domain)?;
    let mut sessions = Vec::new();
    for _ in 0..count {
        sessions.push(client.attach_with(&domain, options).await?);
    }
    match manner {
        Manner::Holding => hold(&sessions[0]).await,
        Manner::Apart => hold_apart(&sessions[0]).await,
        Manner::Idle | Manner::Frames => {
            say_there()?;
            future::pending().await
        }
    }
}

pub(crate) fn say_there() -> io::Result<()> {
    let mut stdout = io::stdout().lock();
    stdout.write_all(THERE.as_bytes())?;
    stdout.flush()
}

async fn hold(session: &Session) -> anyhow::Result<()> {
    let mut changes = session.changes();
    let mut pin = session.pin()?;
    say_there()?;
    while changes.recv().await.is_some() {
        pin = pin.refresh()?;
    }
    Ok(())
}

async fn hold_apart(session: &Session) -> anyhow::Result<()> {
    let mut changes = session.changes();
    let held = session.clone();
    let holder = thread::spawn(move || {
        let mut pin = held.pin().ok();
        while let Some(old) = pin {
            thread::park();
            pin = old.refresh().ok();
        }
    });
    say_there()?;
    while changes.recv().await.is_some() {
        holder.thread().unpark();
    }
    Ok(())
}

/// Without the client library, which knows only pins.
async fn answer_frames(dir: &RuntimeDir, domain: &str) -> anyhow::Result<()> {
    let socket = FrameSocket::connect(&dir.fd_socket())?;
    let attach = v1::Attach {
        domain: name(domain),
        role: v1::Role::Device.into(),
        access: v1::Access::ReadWrite.into(),
        ack_mode: v1::AckMode::Frames.into(),
        ..Default::default()
    };
    let mut fds = Vec::new();
    for (request_id, ask) in [(1, raw::hello(1, 1)), (2, Ask::Attach(attach))] {
        say(&socket, request_id, ask).await?;
    }
    while let Some(packet) = socket.receive::<v1::ServerFrame>().await? {
        fds.extend(packet.fd);
        match packet.frame.body {
            Some(Answer::Ready(_)) => say_there()?,
            Some(Answer::Change(v1::Change {
                ack: true,
                generation,
                ..
            })) => say(&socket, 0, Ask::Ack(v1::Ack { generation })).await?,
            Some(Answer::Refusal(refusal)) => anyhow::bail!("{refusal:?}"),
            _ => {}
        }
    }
    Ok(())
}

async fn say(socket: &FrameSocket, request_id: u64, ask: Ask) -> anyhow::Result<()> {
    let frame = v1::ClientFrame {
        request_id,
        body: Some(ask),
    };
    Ok(socket.send(&frame, None).await?)
}
