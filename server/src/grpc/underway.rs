//! Calls under way, counted with their connection: a daemon that stops waits for
//! them, and not for whoever never reads the answers.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};

use http::Request;
use tower::{Layer, Service};

use crate::accept::Caller;

/// Counts each call from when it begins until it is answered.
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

impl<S, B> Service<Request<B>> for Counted<S>
where
    S: Service<Request<B>>,
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
        let call = self.inner.call(request);
        Box::pin(async move {
            let answered = call.await;
            drop(under_way);
            answered
        })
    }
}
