//! Calls under way, counted with their connection: a daemon that stops waits for
//! them, and not for whoever never reads the answers. Metrics count them here, too:
//! in the outermost layer, which sees what every other one has answered.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};

use http::{Request, Response};
use tower::{Layer, Service};

use crate::accept::Caller;
use crate::metrics::Call;

/// Counts each call from when it begins until it is answered, and measures it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct UnderWayLayer;

#[derive(Clone, Debug)]
pub(crate) struct Counted<S> {
    inner: S,
}

impl<S> Layer<S> for UnderWayLayer {
    type Service = Counted<S>;

    fn layer(&self, inner: S) -> Counted<S> {
        Counted { inner }
    }
}

impl<S, B, R> Service<Request<B>> for Counted<S>
where
    S: Service<Request<B>, Response = Response<R>>,
    S::Future: Send + 'static,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<S::Response, S::Error>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        let caller = request.extensions().get::<Caller>();
        let under_way = caller.map(|caller| caller.calls.begin());
        let mut counted = Call::begin(request.uri().path());
        let call = self.inner.call(request);
        Box::pin(async move {
            let answered = call.await;
            if let Ok(response) = &answered {
                counted.answered(response);
            }
            drop((counted, under_way));
            answered
        })
    }
}
