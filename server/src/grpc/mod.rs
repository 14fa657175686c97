//! The gRPC services. One file each, one short method per RPC: who calls,
//! parse, one call into the core, answer.
//!
//! A call that is cancelled drops its handler at the next `.await`. No handler
//! awaits between its first change and its answer, so a cancelled call has
//! done everything or nothing; what runs on a thread of its own goes on to its
//! end. Answers to requests with an id are kept before the caller gets them
//! (see `replay`).

mod admin;
mod batch;
mod bounced;
mod caller;
mod deadline;
mod direct;
mod domains;
mod layers;
mod mappings;
mod page;
mod pipeline;
mod room;
mod sessions;
mod table;
mod translation;
mod underway;
mod watch;

use std::sync::Arc;
use std::time::Duration;

use domain_core::limits::{REQUEST_BYTES, RESPONSE_BYTES};
use domaind_proto::v1::admin_service_server::AdminServiceServer;
use domaind_proto::v1::domain_service_server::DomainServiceServer;
use domaind_proto::v1::mapping_service_server::MappingServiceServer;
use domaind_proto::v1::session_service_server::SessionServiceServer;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::service::RoutesBuilder;
use tonic::transport::Server;
use tonic_health::server::HealthReporter;

pub(crate) use self::admin::{Admin, Identity};
use self::deadline::DeadlineLayer;
use self::domains::Domains;
use self::mappings::Mappings;
pub(crate) use self::mappings::Queues;
use self::sessions::Sessions;
use self::underway::UnderWayLayer;
use crate::accept::{Acceptor, Connection};
use crate::registry::{Door, Registry};
use crate::reload::Reloader;
use crate::terms::InForce;

/// Calls of one connection that may run at a time.
const CALLS_PER_CONNECTION: usize = 64;
/// Streams that a connection may have open; those above the line before wait.
const STREAMS_PER_CONNECTION: u32 = 64;
/// A call without a deadline of its own is ended then. That is also all the
/// time that a table has to be streamed in: one of 2^20 entries takes a second
/// or two, and a client that trickles holds its memory no longer.
const CALL_LIMIT: Duration = Duration::from_secs(30);
/// Bytes a peer may send ahead on one stream, and on all of one connection.
const STREAM_WINDOW_BYTES: u32 = 64 << 10;
const CONNECTION_WINDOW_BYTES: u32 = 256 << 10;
/// Bytes of all headers of one request.
const HEADER_BYTES: u32 = 8 << 10;
const FRAME_BYTES: u32 = 16 << 10;
/// Silent connections are asked for a sign of life, and closed without one.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);
const KEEPALIVE_LIMIT: Duration = Duration::from_secs(5);
/// Streams that were reset but not yet noticed (rapid reset).
const PENDING_RESETS: usize = 16;
const LOCAL_RESETS: usize = 64;
/// Accepted connections that tonic has not taken yet.
const ACCEPTED_AHEAD: usize = 16;

/// What every service needs.
#[derive(Clone, Debug)]
pub(crate) struct Services {
    pub(crate) registry: Arc<Registry>,
    pub(crate) terms: InForce,
    pub(crate) reloader: Arc<Reloader>,
    pub(crate) queues: Queues,
    pub(crate) identity: Arc<Identity>,
    pub(crate) health: HealthReporter,
}

/// Serves one gRPC socket until the daemon stops, then lets calls that are
/// under way come to their end.
pub(crate) async fn serve(
    services: Services,
    acceptor: Acceptor,
    door: Door,
    stop: CancellationToken,
) -> Result<(), tonic::transport::Error> {
    let (accepted, incoming) = mpsc::channel::<std::io::Result<Connection>>(ACCEPTED_AHEAD);
    tokio::spawn(async move {
        while let Some(connection) = acceptor.next().await {
            if accepted.send(Ok(connection)).await.is_err() {
                return;
            }
        }
    });
    limited_server()
        .layer(UnderWayLayer)
        .layer(layers::trace())
        .layer(layers::contain_panics())
        .layer(DeadlineLayer { limit: CALL_LIMIT })
        .add_routes(routes(services, door, stop.clone()))
        .serve_with_incoming_shutdown(ReceiverStream::new(incoming), stop.cancelled_owned())
        .await
}

/// Limits are set, not inherited.
fn limited_server() -> Server {
    Server::builder()
        .concurrency_limit_per_connection(CALLS_PER_CONNECTION)
        .load_shed(true)
        .timeout(CALL_LIMIT)
        .max_concurrent_streams(STREAMS_PER_CONNECTION)
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .http2_max_header_list_size(HEADER_BYTES)
        .max_frame_size(FRAME_BYTES)
        .http2_keepalive_interval(Some(KEEPALIVE_INTERVAL))
        .http2_keepalive_timeout(Some(KEEPALIVE_LIMIT))
        .http2_max_pending_accept_reset_streams(Some(PENDING_RESETS))
        .http2_max_local_error_reset_streams(Some(LOCAL_RESETS))
}

/// What is to be had behind a door.
fn routes(services: Services, door: Door, stop: CancellationToken) -> tonic::service::Routes {
    let Services {
        registry,
        terms,
        reloader,
        queues,
        identity,
        health,
    } = services;
    let mut routes = RoutesBuilder::default();
    routes.add_service(
        DomainServiceServer::new(Domains {
            registry: Arc::clone(&registry),
            terms: terms.clone(),
            stop: stop.clone(),
        })
        .max_decoding_message_size(REQUEST_BYTES)
        .max_encoding_message_size(RESPONSE_BYTES),
    );
    routes.add_service(
        MappingServiceServer::new(Mappings {
            registry: Arc::clone(&registry),
            terms: terms.clone(),
            queues,
            stop,
        })
        .max_decoding_message_size(REQUEST_BYTES)
        .max_encoding_message_size(RESPONSE_BYTES),
    );
    routes.add_service(
        SessionServiceServer::new(Sessions {
            registry: Arc::clone(&registry),
            terms: terms.clone(),
        })
        .max_decoding_message_size(REQUEST_BYTES)
        .max_encoding_message_size(RESPONSE_BYTES),
    );
    routes.add_service(tonic_health::pb::health_server::HealthServer::new(
        tonic_health::server::HealthService::from_health_reporter(health),
    ));
    if door == Door::Admin {
        routes.add_service(
            AdminServiceServer::new(Admin {
                registry,
                identity,
                terms,
                reloader,
            })
            .max_decoding_message_size(REQUEST_BYTES),
        );
        routes.add_service(reflection(tonic_reflection::server::Builder::build_v1));
        routes.add_service(reflection(tonic_reflection::server::Builder::build_v1alpha));
    }
    routes.routes()
}

/// Reflection of everything there is, in one of its two versions.
fn reflection<S>(
    build: impl FnOnce(
        tonic_reflection::server::Builder<'static>,
    ) -> Result<S, tonic_reflection::server::Error>,
) -> S {
    let builder = tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(domaind_proto::DESCRIPTORS)
        .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET);
    build(builder).expect("the descriptors were made at build time")
}
