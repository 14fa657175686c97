//! What surrounds every call: a span, one log line for a refusal, and a wall
//! against panics.

use std::any::Any;
use std::time::Duration;

use http::{Request, Response};
use tonic::body::Body;
use tonic::{Code, Status};
use tower_http::catch_panic::CatchPanicLayer;
use tower_http::classify::{GrpcErrorsAsFailures, SharedClassifier};
use tower_http::trace::{DefaultOnBodyChunk, DefaultOnEos, TraceLayer};
use tracing::Span;

use crate::accept::Caller;
use crate::offload::bug;

type MakeSpan<B> = fn(&Request<B>) -> Span;
type OnRequest<B> = fn(&Request<B>, &Span);
type OnResponse<B> = fn(&Response<B>, Duration, &Span);
type OnFailure = ();
type OnPanic = fn(Box<dyn Any + Send>) -> Response<Body>;
type Trace<Q, R> = TraceLayer<
    SharedClassifier<GrpcErrorsAsFailures>,
    MakeSpan<Q>,
    OnRequest<Q>,
    OnResponse<R>,
    DefaultOnBodyChunk,
    DefaultOnEos,
    OnFailure,
>;

/// A span that says who calls what, and one line for each refusal.
pub(crate) fn trace<Q, R>() -> Trace<Q, R> {
    TraceLayer::new_for_grpc()
        .make_span_with(span as MakeSpan<Q>)
        .on_request(silent as OnRequest<Q>)
        .on_response(answered as OnResponse<R>)
        .on_failure(())
}

fn span<B>(request: &Request<B>) -> Span {
    let path = request.uri().path();
    match request.extensions().get::<Caller>() {
        Some(Caller { peer, door, .. }) => tracing::info_span!("call", path, %peer, ?door),
        None => tracing::info_span!("call", path),
    }
}

fn silent<B>(_: &Request<B>, _: &Span) {}

/// A refused unary call has its status in the headers.
fn answered<B>(response: &Response<B>, latency: Duration, _: &Span) {
    match Status::from_header_map(response.headers()) {
        Some(status) if status.code() != Code::Ok => {
            tracing::info!(code = ?status.code(), message = status.message(), ?latency, "refused");
        }
        _ => tracing::debug!(?latency, "answered"),
    }
}

/// A panic is our own bug: the call is answered INTERNAL, the daemon goes on.
/// The panic hook has logged it with its backtrace.
pub(crate) fn contain_panics() -> CatchPanicLayer<OnPanic> {
    CatchPanicLayer::custom(internal as OnPanic)
}

fn internal(_: Box<dyn Any + Send>) -> Response<Body> {
    Status::from(bug()).into_http()
}
