//! A client process whose pins its test holds: reads one `Say` a line from
//! standard input and answers one line each.

use std::io::Write;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use domain_core::region::SharedMemory;
use domaind_client::{
    Access, Client, DomainId, Iova, IovaRange, Perm, Pin, Role, RuntimeDir, Session, v1,
};
use domaind_proto::frame::FrameSocket;
use domaind_proto::v1::client_frame::Body as AskBody;
use domaind_tests::P;
use domaind_tests::accessor::{Said, Say};
use domaind_tests::actor::text;
use domaind_tests::frames::{by_frames, handshake};
use domaind_tests::raw::{Attachment, Wire};
use rustix::net::{AddressFamily, SocketFlags, SocketType};
use sendfd::SendWithFd;
use serde_json::{Value, json};
use tokio::runtime::Runtime;

/// Second argument of a child that keeps what its parent was given.
const HEIR: &str = "heir";
/// How long such a child lives if nobody ends it.
const HEIR_LIMIT: Duration = Duration::from_secs(120);

fn main() -> anyhow::Result<()> {
    let mut args = std::env::args_os().skip(1);
    let dir = args.next().context("the runtime directory")?;
    let dir = RuntimeDir::new(Path::new(&dir))?;
    // Its connection is served while this thread waits.
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()?;
    if args.next().is_some_and(|word| word == HEIR) {
        return runtime.block_on(inherit());
    }
    let mut asks = std::io::stdin().lines().map_while(Result::ok);
    let mut next = || Some(serde_json::from_str::<Say>(&asks.next()?));
    match next().context("something to do")?? {
        Say::Attach { domain } => {
            let session = runtime.block_on(attach(&dir, &domain))?;
            say(&Ok(json!(session.name())))?;
            obey(&runtime, session, || next()?.ok())?;
        }
        Say::Leave { domain } => {
            let (left, wire) = runtime.block_on(leave(&dir, &domain))?;
            say(&Ok(left))?;
            while next().is_some() {}
            drop(wire);
        }
        Say::Post { domain, to } => {
            let (session, wire) = runtime.block_on(post(&dir, &domain, &to))?;
            say(&Ok(json!(session)))?;
            while next().is_some() {}
            drop(wire);
        }
        other => bail!("{other:?} before it is attached"),
    }
    // Like a process that ends without a word: nothing is undone.
    std::process::exit(0)
}

fn say(said: &Said) -> anyhow::Result<()> {
    let mut stdout = std::io::stdout().lock();
    writeln!(stdout, "{}", serde_json::to_string(said)?)?;
    Ok(stdout.flush()?)
}

async fn attach(dir: &RuntimeDir, domain: &str) -> anyhow::Result<Session> {
    let client = Client::connect(dir).await?;
    let domain = DomainId::new(domain)?;
    let session = client.attach(&domain, Role::Device, Access::ReadWrite);
    Ok(session.await?)
}

fn obey(
    runtime: &Runtime,
    session: Session,
    mut next: impl FnMut() -> Option<Say>,
) -> anyhow::Result<()> {
    let mut pin = None;
    while let Some(ask) = next() {
        let done = match ask {
            Say::Detach => break,
            Say::Unpin => {
                pin = None;
                Ok(Value::Null)
            }
            Say::Pin => session.pin().map_err(anyhow::Error::from).map(|new| {
                let view = new.view();
                pin = Some(new);
                json!(view)
            }),
            other => act(runtime, &session, pin.as_ref(), other),
        };
        say(&done.map_err(|error| format!("{error:#}")))?;
    }
    drop(pin);
    let done = runtime.block_on(session.detach());
    say(&done
        .map(|()| Value::Null)
        .map_err(|error| error.to_string()))
}

fn act(
    runtime: &Runtime,
    session: &Session,
    pin: Option<&Pin<'_>>,
    ask: Say,
) -> anyhow::Result<Value> {
    match ask {
        Say::Open { start, len } => {
            let range = IovaRange::from_len(Iova::new(start), len)?;
            runtime.block_on(session.open(range, Perm::Read))?;
            Ok(Value::Null)
        }
        Say::Read { iova, len } => {
            let mut bytes = vec![0; len];
            match pin {
                Some(pin) => pin.read(Iova::new(iova), &mut bytes)?,
                None => session.pin()?.read(Iova::new(iova), &mut bytes)?,
            }
            Ok(json!(bytes))
        }
        Say::Ended => {
            let ended = runtime.block_on(session.ended());
            Ok(json!(format!("{:?}", ended.reason)))
        }
        other => bail!("{other:?} is not for a session"),
    }
}

async fn by_hand(dir: &RuntimeDir, domain: &str) -> (Wire, Attachment) {
    let mut wire = Wire::connect(&dir.fd_socket());
    wire.hello().await;
    let attach = v1::Attach {
        role: v1::Role::Device.into(),
        ..by_frames(domain)
    };
    let given = handshake(&mut wire, attach).await;
    (wire, given)
}

fn bounce(given: &Attachment) -> anyhow::Result<&OwnedFd> {
    let mut regions = given.regions.iter();
    let bounce = regions.find(|(region, _)| region.kind() == v1::RegionKind::Bounce);
    bounce.map(|(_, fd)| fd).context("a bounce aperture")
}

/// All but the bounce region is closed when the process ends.
async fn leave(dir: &RuntimeDir, domain: &str) -> anyhow::Result<(Value, Wire)> {
    let (wire, given) = by_hand(dir, domain).await;
    let flags = SocketFlags::CLOEXEC;
    let (family, kind) = (AddressFamily::UNIX, SocketType::SEQPACKET);
    let (near, far) = rustix::net::socketpair(family, kind, flags, None)?;
    let child = Command::new(std::env::current_exe()?)
        .arg(dir.path())
        .arg(HEIR)
        .stdin(Stdio::from(far))
        .stderr(Stdio::from(wire.as_fd().try_clone_to_owned()?))
        .spawn()?;
    let near = FrameSocket::new(near)?;
    // An empty packet would look like the end.
    let frame = v1::ClientFrame {
        request_id: 1,
        ..v1::ClientFrame::default()
    };
    near.send(&frame, Some(bounce(&given)?.as_fd())).await?;
    let session = given.attached.session;
    Ok((json!({ "child": child.id(), "session": session }), wire))
}

/// Keeps the mapping, and no fd. When the parent has died it speaks in its name.
async fn inherit() -> anyhow::Result<()> {
    let parent = rustix::process::getppid();
    let socket = std::io::stdin().as_fd().try_clone_to_owned()?;
    let given = FrameSocket::new(socket)?
        .receive::<v1::ClientFrame>()
        .await?;
    let fd = given.and_then(|packet| packet.fd).context("a region")?;
    let mut memory = SharedMemory::reserve(P, P)?;
    memory.map_at(0, P, fd.as_fd(), Access::ReadWrite)?;
    drop(fd);
    say(&Ok(json!("holds")))?;
    let until = Instant::now() + HEIR_LIMIT;
    while rustix::process::getppid() == parent && Instant::now() < until {
        std::thread::sleep(Duration::from_millis(2));
    }
    let socket = std::io::stderr().as_fd().try_clone_to_owned()?;
    let mut wire = Wire::new(FrameSocket::new(socket)?);
    // It may be closed by now.
    for generation in [1, 2, 3] {
        let ack = AskBody::Ack(v1::Ack { generation });
        let _ = wire.send(ack, None).await;
    }
    let _ = wire.send(AskBody::Detach(v1::Detach {}), None).await;
    say(&Ok(json!("spoke")))?;
    while Instant::now() < until {
        std::thread::sleep(Duration::from_millis(20));
    }
    drop(memory);
    Ok(())
}

async fn post(dir: &RuntimeDir, domain: &str, to: &str) -> anyhow::Result<(String, Wire)> {
    use std::os::fd::AsRawFd;
    let (wire, given) = by_hand(dir, domain).await;
    let socket = UnixDatagram::unbound()?;
    socket.connect(to)?;
    socket.send_with_fd(b"keep this", &[bounce(&given)?.as_raw_fd()])?;
    Ok((text(&json!(given.attached.session)), wire))
}
