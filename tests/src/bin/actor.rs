//! A client process for the tests: reads one `Ask` a line from standard input
//! and answers one `Reply` a line on standard output.

use std::collections::HashMap;
use std::io::Write;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::process::{Command, Stdio};

use anyhow::{Context, bail};
use domaind_client::{
    Access, AllocRequest, Answer, BatchMode, Buffer, Client, CoherentSpec, Direction, DomainId,
    Error, Iova, IovaRange, LeaseSpec, MapSpec, Mapped, MappingId, MemoryId, PipelineOptions, Role,
    RuntimeDir, Session, UnmapSpec, v1,
};
use domaind_proto::frame::FrameSocket;
use domaind_proto::v1::server_frame::Body as AnswerBody;
use domaind_tests::knock;
use domaind_tests::node::{greet, name, spec};
use domaind_tests::raw::{self, Wire};
use domaind_tests::script::{Ask, Reply};
use domaind_tests::{files, grant, wait};
use serde_json::{Value, json};

/// Bytes that are looked at together when everything is looked at.
const WINDOW: u64 = 1 << 20;
/// Second argument of a child that has its parent's fd socket as standard
/// error.
const INHERITED: &str = "inherited";

#[tokio::main(flavor = "current_thread")]
async fn main() -> anyhow::Result<()> {
    let mut args = std::env::args_os().skip(1);
    let dir = PathBuf::from(args.next().context("the runtime directory")?);
    let inherited = args.next().is_some_and(|word| word == INHERITED);
    let mut actor = Actor {
        dir: RuntimeDir::new(&dir)?,
        session: None,
        buffers: HashMap::new(),
        wire: inherited.then(inherited_wire).transpose()?,
    };
    let (lines, mut asks) = tokio::sync::mpsc::unbounded_channel();
    std::thread::spawn(move || {
        for line in std::io::stdin().lines().map_while(Result::ok) {
            let is_last = line.contains(r#""ask":"inherit""#);
            if lines.send(line).is_err() {
                return;
            }
            if is_last {
                // What comes now is for the child.
                loop {
                    std::thread::park();
                }
            }
        }
    });
    while let Some(line) = asks.recv().await {
        let reply = actor.reply(&line).await;
        let mut stdout = std::io::stdout().lock();
        writeln!(stdout, "{}", serde_json::to_string(&reply)?)?;
        stdout.flush()?;
    }
    // Like a process that ends without a word: nothing is undone.
    std::process::exit(0)
}

/// Ends a mapping whose bytes went to the device.
fn end_of(mapped: Mapped) -> UnmapSpec {
    UnmapSpec {
        iova: mapped.iova,
        id: mapped.id,
        written_bytes: None,
        skip_sync: false,
    }
}

fn inherited_wire() -> anyhow::Result<Wire> {
    let socket = std::io::stderr().as_fd().try_clone_to_owned()?;
    Ok(Wire::new(FrameSocket::new(socket)?))
}

struct Actor {
    dir: RuntimeDir,
    session: Option<Session>,
    buffers: HashMap<u64, Buffer>,
    wire: Option<Wire>,
}

impl Actor {
    async fn reply(&mut self, line: &str) -> Reply {
        let done = match serde_json::from_str(line) {
            Ok(ask) => self.act(ask).await,
            Err(error) => Err(error.into()),
        };
        match done {
            Ok(value) => Reply::Done(value),
            Err(error) => match error.downcast::<Error>() {
                Ok(Error::Refused(refusal)) => Reply::Refused(refusal),
                Ok(error) => Reply::Failed(format!("{:#}", anyhow::Error::from(error))),
                Err(error) => Reply::Failed(format!("{error:#}")),
            },
        }
    }

    async fn act(&mut self, ask: Ask) -> anyhow::Result<Value> {
        match ask {
            Ask::Create { domain } => {
                let request = v1::CreateDomainRequest {
                    domain_id: domain,
                    spec: Some(spec(1 << 20, 1 << 20)),
                    ..Default::default()
                };
                let client = Client::connect(&self.dir).await?;
                let created = client.domains().create_domain(request).await;
                created.map_err(Error::from)?;
                Ok(Value::Null)
            }
            Ask::Attach {
                domain,
                role,
                access,
            } => self.attach(&domain, role, access).await,
            Ask::Buffer { len } => {
                let buffer = self.session()?.buffer(len).await?;
                let memory = buffer.memory().id().get();
                self.buffers.insert(memory, buffer);
                Ok(json!({ "memory": memory }))
            }
            Ask::Fill {
                memory,
                offset,
                bytes,
            } => {
                self.buffer(memory)?.copy_in(offset, &bytes.to_vec())?;
                Ok(Value::Null)
            }
            Ask::Compare {
                memory,
                offset,
                bytes,
            } => {
                let wanted = bytes.to_vec();
                let mut held = vec![0; wanted.len()];
                self.buffer(memory)?.copy_out(offset, &mut held)?;
                Ok(first_difference(&held, &wanted))
            }
            Ask::Map {
                memory,
                offset,
                len,
                direction,
                count,
            } => self.map(memory, offset, len, direction, count).await,
            Ask::Unmap { iova, id, written } => {
                let spec = UnmapSpec {
                    iova: Iova::new(iova),
                    id: MappingId::new(id),
                    written_bytes: written,
                    skip_sync: false,
                };
                Ok(json!(self.session()?.unmap(spec).await?))
            }
            Ask::Pipe {
                memory,
                len,
                entries,
            } => self.pipe(memory, len, entries).await,
            Ask::Lease { len } => {
                let lease = self.session()?.lease(LeaseSpec::of(len)).await?;
                let (iova, id) = lease.into_parts();
                Ok(json!({ "iova": iova.get(), "id": id.get() }))
            }
            Ask::Alloc { len, persistent } => {
                let spec = CoherentSpec {
                    place: AllocRequest {
                        len_bytes: len,
                        align_bytes: 0,
                        limit: None,
                    },
                    persistent,
                };
                let (iova, id) = self.session()?.alloc_coherent(spec).await?.into_parts();
                Ok(json!({ "iova": iova.get(), "id": id.get() }))
            }
            Ask::Free { iova, id } => {
                let (iova, id) = (Iova::new(iova), MappingId::new(id));
                self.session()?.free_coherent(iova, id).await?;
                Ok(Value::Null)
            }
            Ask::Write { iova, bytes } => {
                self.session()?.write(Iova::new(iova), &bytes.to_vec())?;
                Ok(Value::Null)
            }
            Ask::See { iova, bytes } => {
                let wanted = bytes.to_vec();
                let mut seen = vec![0; wanted.len()];
                self.session()?.read(Iova::new(iova), &mut seen)?;
                Ok(first_difference(&seen, &wanted))
            }
            Ask::Search { bytes } => {
                let needle = bytes.to_vec();
                self.look(needle.len(), |window| files::position(window, &needle))
            }
            Ask::FirstOther { byte } => {
                self.look(1, |window| window.iter().position(|b| *b != byte))
            }
            Ask::Ended => {
                let session = self.session()?.clone();
                let ended = wait::soon("the end of the session", session.ended()).await;
                Ok(json!({ "reason": format!("{:?}", ended.reason), "message": ended.message }))
            }
            Ask::Detach => {
                let session = self.session.take().context("attached")?;
                self.buffers.clear();
                session.detach().await?;
                Ok(Value::Null)
            }
            Ask::Names { domain, session } => {
                let client = Client::connect(&self.dir).await?;
                let mut verdicts = knock::names(&client, &domain, &session).await;
                verdicts.extend(knock::changes(&client, &domain, &session).await);
                Ok(serde_json::to_value(verdicts)?)
            }
            Ask::Knock { token, admin } => {
                let client = match admin {
                    false => Client::connect(&self.dir).await?,
                    true => Client::connect_admin(&self.dir).await?,
                };
                let verdicts = knock::mapping_calls(client.channel(), token.as_deref()).await;
                Ok(serde_json::to_value(verdicts)?)
            }
            Ask::Inspect {
                domain,
                role,
                access,
            } => self.inspect(&domain, role, access).await,
            Ask::AttachByHand { domain } => self.attach_by_hand(&domain).await,
            Ask::Inherit { domain } => self.inherit(&domain).await,
            Ask::SpeakInherited => self.speak_inherited().await,
            Ask::Colour {
                colour,
                rounds,
                seed,
                max_len,
            } => {
                let mut painter = Painter::new(self.session()?, colour, seed, max_len).await?;
                for _ in 0..rounds {
                    painter.round().await?;
                }
                painter.finish().await
            }
            Ask::Storm {
                colour,
                seed,
                max_len,
            } => {
                let mut painter = Painter::new(self.session()?, colour, seed, max_len).await?;
                loop {
                    painter.round().await?;
                }
            }
        }
    }

    fn session(&self) -> anyhow::Result<&Session> {
        self.session.as_ref().context("not attached")
    }

    fn buffer(&self, memory: u64) -> anyhow::Result<&Buffer> {
        self.buffers.get(&memory).context("no such buffer")
    }

    async fn attach(
        &mut self,
        domain: &str,
        role: v1::Role,
        access: v1::Access,
    ) -> anyhow::Result<Value> {
        let role = match role {
            v1::Role::Device => Role::Device,
            _ => Role::Driver,
        };
        let access = match access {
            v1::Access::ReadOnly => Access::ReadOnly,
            _ => Access::ReadWrite,
        };
        let client = Client::connect(&self.dir).await?;
        greet(&client).await;
        let session = client.attach(&DomainId::new(domain)?, role, access).await?;
        settle(&session).await?;
        let answer = json!({
            "session": session.name(),
            "enforced": session.access_enforced(),
        });
        self.session = Some(session);
        Ok(answer)
    }

    async fn map(
        &self,
        memory: u64,
        offset: u64,
        len: u64,
        direction: v1::Direction,
        count: usize,
    ) -> anyhow::Result<Value> {
        let direction = match direction {
            v1::Direction::Unspecified => bail!("no direction"),
            v1::Direction::ToDevice => Direction::ToDevice,
            v1::Direction::FromDevice => Direction::FromDevice,
            v1::Direction::Bidirectional => Direction::Bidirectional,
        };
        let spec = MapSpec::new(MemoryId::new(memory), offset, len, direction);
        let specs = vec![spec; count];
        let mode = BatchMode::AllOrNothing;
        let mapped = self.session()?.map_batch(&specs, mode).await?;
        let mut places = Vec::new();
        for mapping in mapped {
            let (iova, id) = mapping?.into_parts();
            places.push(json!({ "iova": iova.get(), "id": id.get() }));
        }
        Ok(Value::Array(places))
    }

    /// Keeps a pipeline full of batches, until one fails.
    async fn pipe(&self, memory: u64, len: u64, entries: usize) -> anyhow::Result<Value> {
        let spec = MapSpec::new(MemoryId::new(memory), 0, len, Direction::ToDevice);
        let (specs, mode) = (vec![spec; entries], BatchMode::AllOrNothing);
        let mut pipeline = self.session()?.pipeline(PipelineOptions::default()).await?;
        while let Ok(()) = pipeline.map(&specs, mode) {}
        loop {
            let ends: Vec<_> = match pipeline.next().await? {
                Some(Answer::Mapped(batch)) => batch.iter().flatten().map(end_of).collect(),
                _ => Vec::new(),
            };
            match ends.is_empty() {
                true => pipeline.map(&specs, mode)?,
                false => pipeline.unmap(&ends, mode)?,
            }
        }
    }

    /// Looks at all memory of the domain in windows that overlap by so much
    /// that nothing of `len` bytes is cut.
    fn look(&self, len: usize, find: impl Fn(&[u8]) -> Option<usize>) -> anyhow::Result<Value> {
        let session = self.session()?;
        let overlap = len as u64 - 1;
        for range in [session.bounce(), session.coherent()].into_iter().flatten() {
            let mut at = range.start().get();
            while at <= range.last().get() {
                let last = range.last().get().min(at + WINDOW + overlap - 1);
                let mut window = vec![0; usize::try_from(last - at + 1)?];
                session.read(Iova::new(at), &mut window)?;
                if let Some(found) = find(&window) {
                    return Ok(json!(at + found as u64));
                }
                at += WINDOW;
            }
        }
        Ok(Value::Null)
    }

    async fn inspect(
        &self,
        domain: &str,
        role: v1::Role,
        access: v1::Access,
    ) -> anyhow::Result<Value> {
        let mut wire = Wire::connect(&self.dir.fd_socket());
        wire.hello().await;
        let given = wire.attach(&name(domain), role, access).await;
        let given = given.map_err(Error::Refused)?;
        let regions: Vec<_> = given
            .regions
            .iter()
            .map(|(_, fd)| grant::inspect(fd))
            .collect();
        Ok(json!({ "enforced": given.attached.access_enforced, "regions": regions }))
    }

    async fn attach_by_hand(&mut self, domain: &str) -> anyhow::Result<Value> {
        let mut wire = Wire::connect(&self.dir.fd_socket());
        wire.hello().await;
        let role = v1::Role::Driver;
        let given = wire
            .attach(&name(domain), role, v1::Access::ReadWrite)
            .await;
        let given = given.map_err(Error::Refused)?;
        let memory = files::good_memfd(4096);
        let registered = wire.ask(raw::register(true), Some(memory.as_fd())).await;
        registered.map_err(Error::Refused)?;
        self.wire = Some(wire);
        Ok(json!({
            "session": given.attached.session,
            "token": raw::hex(&given.attached.token),
        }))
    }

    async fn inherit(&mut self, domain: &str) -> anyhow::Result<Value> {
        let mut wire = Wire::connect(&self.dir.fd_socket());
        wire.hello().await;
        let role = v1::Role::Driver;
        let given = wire
            .attach(&name(domain), role, v1::Access::ReadWrite)
            .await;
        let given = given.map_err(Error::Refused)?;
        let socket: OwnedFd = wire.as_fd().try_clone_to_owned()?;
        let child = Command::new(std::env::current_exe()?)
            .arg(self.dir.path())
            .arg(INHERITED)
            .stderr(Stdio::from(socket))
            .spawn()?;
        self.wire = Some(wire);
        Ok(json!({
            "child": child.id(),
            "session": given.attached.session,
            "token": raw::hex(&given.attached.token),
        }))
    }

    async fn speak_inherited(&mut self) -> anyhow::Result<Value> {
        let wire = self.wire.as_mut().context("a child that inherited")?;
        let memfd = files::good_memfd(4096);
        // It may be closed before or after this.
        let sent = wire.send(raw::register(false), Some(memfd.as_fd())).await;
        let mut registered = false;
        let mut reason = None;
        while let Some(packet) = wire.receive().await {
            match packet.frame.body {
                Some(AnswerBody::MemoryRegistered(_)) => registered = true,
                Some(AnswerBody::SessionEnded(ended)) => {
                    reason = Some(ended.reason().as_str_name());
                }
                _ => {}
            }
        }
        Ok(json!({ "sent": sent.is_ok(), "registered": registered, "reason": reason }))
    }
}

/// As [`Wire::settle`], through the library.
async fn settle(session: &Session) -> anyhow::Result<()> {
    let no_memory = std::fs::File::open("/dev/null")?;
    match session.register(no_memory.into(), false).await {
        Err(Error::Refused(_)) => Ok(()),
        other => bail!("/dev/null was not refused: {other:?}"),
    }
}

/// Maps its own colour, and looks whether anything else is seen.
struct Painter {
    session: Session,
    buffer: Buffer,
    colour: u8,
    max_len: u64,
    random: u64,
    maps: u64,
    foreign: u64,
    live: Vec<domaind_client::Mapping>,
    rings: Vec<domaind_client::Coherent>,
}

impl Painter {
    async fn new(
        session: &Session,
        colour: u8,
        seed: u64,
        max_len: u64,
    ) -> anyhow::Result<Painter> {
        let buffer = session.buffer(max_len).await?;
        buffer.copy_in(0, &vec![colour; usize::try_from(max_len)?])?;
        Ok(Painter {
            session: session.clone(),
            buffer,
            colour,
            max_len,
            random: seed | 1,
            maps: 0,
            foreign: 0,
            live: Vec::new(),
            rings: Vec::new(),
        })
    }

    async fn round(&mut self) -> anyhow::Result<()> {
        let len = 1 + self.next(self.max_len);
        let direction = match self.next(3) {
            0 => Direction::ToDevice,
            1 => Direction::FromDevice,
            _ => Direction::Bidirectional,
        };
        let spec = MapSpec::new(self.buffer.memory().id(), 0, len, direction);
        let mapping = self.session.map(spec).await?;
        self.maps += 1;
        let fresh = if direction == Direction::FromDevice {
            0
        } else {
            self.colour
        };
        self.check(mapping.range(), fresh)?;
        self.paint(mapping.range())?;
        self.live.push(mapping);
        if self.live.len() > 4 {
            let oldest = self.next(self.live.len() as u64);
            let mapping = self.live.swap_remove(usize::try_from(oldest)?);
            self.unmap(mapping).await?;
        }
        if self.next(4) == 0 {
            self.ring(len).await?;
        }
        Ok(())
    }

    async fn unmap(&mut self, mapping: domaind_client::Mapping) -> anyhow::Result<()> {
        // Nobody else was given it meanwhile.
        self.check(mapping.range(), self.colour)?;
        let written = match mapping.direction() {
            Direction::FromDevice => Some(mapping.len_bytes()),
            _ => None,
        };
        mapping.unmap(written).await.map_err(Error::from)?;
        Ok(())
    }

    /// Coherent memory: fresh is zero, and it stays what it was painted.
    async fn ring(&mut self, len: u64) -> anyhow::Result<()> {
        let spec = CoherentSpec {
            place: AllocRequest {
                len_bytes: len,
                align_bytes: 0,
                limit: None,
            },
            persistent: false,
        };
        let ring = self.session.alloc_coherent(spec).await?;
        self.check(ring.range(), 0)?;
        self.paint(ring.range())?;
        self.rings.push(ring);
        if self.rings.len() > 2 {
            let ring = self.rings.remove(0);
            self.check(ring.range(), self.colour)?;
            ring.free().await.map_err(Error::from)?;
        }
        Ok(())
    }

    async fn finish(mut self) -> anyhow::Result<Value> {
        for mapping in std::mem::take(&mut self.live) {
            self.unmap(mapping).await?;
        }
        for ring in std::mem::take(&mut self.rings) {
            self.check(ring.range(), self.colour)?;
            ring.free().await.map_err(Error::from)?;
        }
        let mut held = vec![0; usize::try_from(self.max_len)?];
        self.buffer.copy_out(0, &mut held)?;
        self.foreign += held.iter().filter(|byte| **byte != self.colour).count() as u64;
        Ok(json!({ "maps": self.maps, "foreign": self.foreign }))
    }

    fn paint(&self, range: IovaRange) -> anyhow::Result<()> {
        let bytes = vec![self.colour; len_of(range)?];
        Ok(self.session.write(range.start(), &bytes)?)
    }

    fn check(&mut self, range: IovaRange, wanted: u8) -> anyhow::Result<()> {
        let mut bytes = vec![0; len_of(range)?];
        self.session.read(range.start(), &mut bytes)?;
        self.foreign += bytes.iter().filter(|byte| **byte != wanted).count() as u64;
        Ok(())
    }

    fn next(&mut self, below: u64) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.random % below
    }
}

fn len_of(range: IovaRange) -> anyhow::Result<usize> {
    let bytes = range.len_bytes().context("a length")?;
    Ok(usize::try_from(bytes)?)
}

/// Where two equally long runs of bytes differ first.
fn first_difference(left: &[u8], right: &[u8]) -> Value {
    let differs = left.iter().zip(right).position(|(l, r)| l != r);
    json!(differs)
}
