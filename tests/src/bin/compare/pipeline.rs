//! What a batch on a pipeline costs beyond the stream that carries it: eight
//! batches in flight are mapped and unmapped in turn, nothing is copied. The floor
//! is a server that makes answers of the same size up.

use std::io;
use std::path::Path;
use std::time::{Duration, Instant};

use domain_core::limits::BATCH_ENTRIES;
use domain_core::streaming::Mapped;
use domaind_client::{
    Answer, BatchMode, Buffer, Direction, MapSpec, Pipeline, PipelineOptions, Session, UnmapSpec,
};
use domaind_proto::codec::{MessageCodec, give_back, take};
use domaind_proto::v1::mapping_service_client::MappingServiceClient;
use domaind_proto::v1::{PipelineOperation, PipelineRequest, PipelineResponse, Refusal};
use domaind_tests::files::good_memfd;
use tokio::net::{UnixListener, UnixStream};
use tokio::runtime::Builder;
use tokio::sync::mpsc;
use tokio_stream::StreamExt;
use tokio_stream::wrappers::{ReceiverStream, UnixListenerStream};
use tonic::body::Body;
use tonic::codegen::http::{Request as HttpRequest, Response as HttpResponse};
use tonic::server::{Grpc, StreamingService};
use tonic::transport::{Channel, Endpoint, Server};
use tonic::{Request, Response, Status, Streaming};

use crate::attend::say_there;
use crate::clock::as_f64;
use crate::peers::PAGE;
use crate::report::{Limit, Report, Row, Unit};
use crate::rounds::{Contender, Role, Scale, interleave};
use crate::world::World;

/// Entries of a batch, and what is asked of ours.
const BATCHES: [(usize, &str, Option<f64>); 2] = [
    // At least 60 % of what the stream alone can do.
    (64, "pipeline/8 x 64", Some(1.0 / 0.6)),
    (BATCH_ENTRIES, "pipeline/8 x 1024", None),
];
/// A batch whose copies several threads share.
const COPIED: &str = "pipeline/64 MiB in one batch";
const COPIED_BYTES: u64 = 64 << 20;
/// Twice what is mapped at a time, and more.
const BOUNCE_BYTES: u64 = 192 << 20;
const IN_FLIGHT: usize = 8;
/// Batches of one turn.
const TURN: usize = 64;
const DOMAIN: &str = "pipeline";

/// Prints all rows of this family.
pub(crate) fn rows(report: &Report, scale: &Scale) -> io::Result<()> {
    let mut names: Vec<_> = BATCHES.map(|(_, name, _)| name.to_owned()).into();
    names.push(COPIED.to_owned());
    if !report.wants_any(&names) {
        return Ok(());
    }
    let world = World::start()?;
    let driver = world.driver_in(DOMAIN, BOUNCE_BYTES);
    let path = world.path().join("echo-stream");
    let _echo = world.attendants(
        &crate::attend::Attendance::EchoStream { path: path.clone() },
        1,
    );
    for (entries, name, most) in BATCHES.iter().filter(|(_, name, _)| report.wants(name)) {
        let mut ours = world.run(Ours::open(&driver, *entries));
        let mut floor = world.run(Floor::open(&path, *entries));
        let contenders = vec![
            Contender::new(Role::Ours, "domaind", || {
                per_entry(*entries, || world.run(ours.turn()))
            }),
            Contender::new(Role::Floor, "echo stream", || {
                per_entry(*entries, || world.run(floor.turn()))
            }),
        ];
        let outcomes = interleave(scale.rounds, contenders);
        let goal: Vec<_> = most.map(Limit::Floor).into_iter().collect();
        let row = Row::new((*name).to_owned(), Unit::Nanoseconds, outcomes, goal);
        report.print(&row)?;
    }
    match report.wants(COPIED) {
        true => copied(report, scale, &world, &driver),
        false => Ok(()),
    }
}

/// One batch of which every byte is copied, beside one thread that copies as much.
fn copied(report: &Report, scale: &Scale, world: &World, driver: &Session) -> io::Result<()> {
    let entries = BATCH_ENTRIES as u64;
    let each = COPIED_BYTES / entries;
    let memfd = good_memfd(COPIED_BYTES);
    let file = memfd.try_clone()?;
    let memory = world.run(driver.register(memfd, true)).expect("registered");
    let spec = |entry| MapSpec::new(memory.id(), entry * each, each, Direction::ToDevice);
    let maps: Vec<_> = (0..entries).map(spec).collect();
    let options = PipelineOptions { in_flight: 1 };
    let mut pipeline = world.run(driver.pipeline(options)).expect("opened");
    let mut unmaps = Vec::new();
    let mut into = vec![0; usize::try_from(each).expect("it fits")];
    let contenders = vec![
        Contender::new(Role::Ours, "domaind", || {
            world.run(map_and_unmap(&mut pipeline, &maps, &mut unmaps))
        }),
        Contender::new(Role::Floor, "pread by one thread", || {
            let start = Instant::now();
            for entry in 0..entries {
                let read = rustix::io::pread(&file, &mut into, entry * each);
                assert_eq!(read, Ok(into.len()));
            }
            start.elapsed().as_secs_f64() * 1e9
        }),
    ];
    let outcomes = interleave(scale.rounds.min(15), contenders);
    let row = Row::new(COPIED.to_owned(), Unit::Nanoseconds, outcomes, []);
    report.print(&row)
}

/// Nanoseconds of the first.
async fn map_and_unmap(
    pipeline: &mut Pipeline,
    maps: &[MapSpec],
    unmaps: &mut Vec<UnmapSpec>,
) -> f64 {
    let mode = BatchMode::AllOrNothing;
    let start = Instant::now();
    pipeline.map(maps, mode).expect("nothing is in flight");
    let answer = pipeline.next().await.expect("the daemon answers");
    let took = start.elapsed();
    let Some(Answer::Mapped(mapped)) = answer else {
        panic!("{answer:?}");
    };
    unmaps.clear();
    unmaps.extend(mapped.iter().map(ending));
    pipeline.unmap(unmaps, mode).expect("it was answered");
    let answer = pipeline.next().await.expect("the daemon answers");
    assert!(matches!(answer, Some(Answer::Unmapped(_))), "{answer:?}");
    took.as_secs_f64() * 1e9
}

fn ending(mapped: Result<Mapped, &Refusal>) -> UnmapSpec {
    let Mapped { iova, id, .. } = mapped.expect("there is room");
    UnmapSpec {
        iova,
        id,
        written_bytes: None,
        skip_sync: false,
    }
}

/// Nanoseconds for one entry of one operation.
fn per_entry(entries: usize, mut turn: impl FnMut()) -> f64 {
    let start = Instant::now();
    turn();
    let count = u64::try_from(entries * TURN).expect("64 bits");
    start.elapsed().as_secs_f64() * 1e9 / as_f64(count)
}

/// A driver that maps the same pages again and again.
struct Ours {
    pipeline: Pipeline,
    maps: Vec<MapSpec>,
    unmaps: Vec<UnmapSpec>,
    _buffer: Buffer,
}

impl Ours {
    async fn open(driver: &Session, entries: usize) -> Ours {
        let count = u64::try_from(entries).expect("64 bits");
        let buffer = driver.buffer(count * PAGE).await.expect("registered");
        let memory = buffer.memory().id();
        let spec = |entry| MapSpec {
            skip_sync: true,
            ..MapSpec::new(memory, entry * PAGE, PAGE, Direction::ToDevice)
        };
        let options = PipelineOptions {
            in_flight: IN_FLIGHT,
        };
        Ours {
            pipeline: driver.pipeline(options).await.expect("opened"),
            maps: (0..count).map(spec).collect(),
            unmaps: Vec::with_capacity(entries),
            _buffer: buffer,
        }
    }

    /// Some batches are mapped, and each that is mapped is unmapped; at the end nothing is.
    async fn turn(&mut self) {
        let Ours {
            pipeline,
            maps,
            unmaps,
            ..
        } = self;
        let mode = BatchMode::AllOrNothing;
        let mut left = TURN / 2;
        for _ in 0..IN_FLIGHT {
            pipeline.map(maps, mode).expect("there is room");
            left -= 1;
        }
        while let Some(answer) = match pipeline.in_flight() {
            0 => None,
            _ => pipeline.next().await.expect("the daemon answers"),
        } {
            match answer {
                Answer::Mapped(mapped) => {
                    unmaps.clear();
                    unmaps.extend(mapped.iter().map(ending));
                    pipeline.unmap(unmaps, mode).expect("one was answered");
                }
                Answer::Unmapped(_) if left > 0 => {
                    left -= 1;
                    pipeline.map(maps, mode).expect("one was answered");
                }
                Answer::Unmapped(_) => {}
                other => panic!("{other:?}"),
            }
        }
    }
}

/// A client of the echo.
struct Floor {
    requests: mpsc::Sender<PipelineRequest>,
    answers: Streaming<PipelineResponse>,
    entries: u64,
}

impl Floor {
    async fn open(path: &Path, entries: usize) -> Floor {
        let (requests, sent) = mpsc::channel(IN_FLIGHT);
        let mut calls = MappingServiceClient::new(connect(path).await);
        let opened = calls.pipeline(ReceiverStream::new(sent)).await;
        Floor {
            requests,
            answers: opened.expect("it listens").into_inner(),
            entries: entries as u64,
        }
    }

    /// The same messages as those of ours.
    async fn turn(&mut self) {
        for _ in 0..IN_FLIGHT {
            self.map().await;
        }
        let mut left = TURN / 2 - IN_FLIGHT;
        for _ in 0..TURN {
            let answer = self.answers.message().await.expect("it answers");
            let answer = answer.expect("it goes on");
            if answer.operation() == PipelineOperation::Map {
                self.unmap(&answer).await;
            } else if left > 0 {
                left -= 1;
                self.map().await;
            }
            give_back(answer);
        }
    }

    async fn map(&self) {
        let mut request: PipelineRequest = take();
        request.set_operation(PipelineOperation::Map);
        request.memory_id.push(1);
        request
            .offset
            .extend((0..self.entries).map(|entry| entry * PAGE));
        request.len_bytes.push(PAGE);
        request.direction.push(1);
        request.skip_sync.push(true);
        self.requests.send(request).await.expect("it listens");
    }

    async fn unmap(&self, answer: &PipelineResponse) {
        let mut request: PipelineRequest = take();
        request.set_operation(PipelineOperation::Unmap);
        request.iova.extend(&answer.iova);
        request.mapping_id.extend(&answer.mapping_id);
        self.requests.send(request).await.expect("it listens");
    }
}

async fn connect(path: &Path) -> Channel {
    let path = path.to_owned();
    let endpoint = Endpoint::from_static("http://localhost");
    let connect = move |_| {
        let path = path.clone();
        async move {
            let stream = UnixStream::connect(path).await?;
            io::Result::Ok(hyper_util::rt::TokioIo::new(stream))
        }
    };
    let connected = endpoint
        .connect_with_connector(tower::service_fn(connect))
        .await;
    connected.expect("the echo listens")
}

/// Answers pipelines until its input ends, with the limits that the daemon has.
pub(crate) fn echo(path: &Path) -> io::Result<()> {
    let runtime = Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(async {
        let listener = UnixListener::bind(path)?;
        say_there()?;
        let served = Server::builder()
            .initial_stream_window_size(64 << 10)
            .initial_connection_window_size(256 << 10)
            .timeout(Duration::from_secs(3600))
            .serve_with_incoming(tower::service_fn(serve), UnixListenerStream::new(listener));
        served.await.map_err(io::Error::other)
    })
}

async fn serve(request: HttpRequest<Body>) -> Result<HttpResponse<Body>, std::convert::Infallible> {
    let codec = MessageCodec::<PipelineResponse, PipelineRequest>::default();
    Ok(Grpc::new(codec).streaming(Echo, request).await)
}

/// Makes answers up.
struct Echo;

impl StreamingService<PipelineRequest> for Echo {
    type Response = PipelineResponse;
    type ResponseStream = std::pin::Pin<
        Box<dyn tokio_stream::Stream<Item = Result<PipelineResponse, Status>> + Send>,
    >;
    type Future = std::future::Ready<Result<Response<Self::ResponseStream>, Status>>;

    fn call(&mut self, request: Request<Streaming<PipelineRequest>>) -> Self::Future {
        let mut next = 1_u64;
        let answers = request.into_inner().map(move |request| {
            let request = request?;
            let mut response: PipelineResponse = take();
            response.operation = request.operation;
            let entries = request.offset.len().max(request.iova.len());
            response.entries = u32::try_from(entries).expect("a batch is short");
            if request.operation() == PipelineOperation::Map {
                response
                    .iova
                    .extend(request.offset.iter().map(|offset| offset + PAGE));
                let ids = next..;
                next += request.offset.len() as u64;
                response.mapping_id.extend(ids.take(entries));
            } else {
                response.copied_bytes.extend(request.iova.iter().map(|_| 0));
            }
            give_back(request);
            Ok(response)
        });
        std::future::ready(Ok(Response::new(Box::pin(answers))))
    }
}
