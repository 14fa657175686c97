//! Deadlines that say what they are.
//!
//! tonic has a timer of its own, for the caller's `grpc-timeout` and for the
//! server's limit, and answers CANCELLED when it runs out. This one runs out
//! first, and answers DEADLINE_EXCEEDED.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use http::{HeaderMap, Request, Response};
use tonic::Status;
use tonic::body::Body;
use tower::{Layer, Service};

/// So much earlier than tonic's: its timer and ours count whole milliseconds.
const HEAD_START: Duration = Duration::from_millis(2);

/// Ends calls at the caller's deadline, or after a limit.
#[derive(Clone, Copy, Debug)]
pub(crate) struct DeadlineLayer {
    pub(crate) limit: Duration,
}

#[derive(Clone, Debug)]
pub(crate) struct Deadline<S> {
    inner: S,
    limit: Duration,
}

impl<S> Layer<S> for DeadlineLayer {
    type Service = Deadline<S>;

    fn layer(&self, inner: S) -> Deadline<S> {
        Deadline {
            inner,
            limit: self.limit,
        }
    }
}

impl<S, B> Service<Request<B>> for Deadline<S>
where
    S: Service<Request<B>, Response = Response<Body>>,
    S::Future: Send + 'static,
{
    type Response = Response<Body>;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Response<Body>, S::Error>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        let asked = asked(request.headers());
        let limit = asked.map_or(self.limit, |asked| asked.min(self.limit));
        let call = self.inner.call(request);
        Box::pin(async move {
            match tokio::time::timeout(limit.saturating_sub(HEAD_START), call).await {
                Ok(answered) => answered,
                Err(_) => {
                    let message = format!("the call did not end within {limit:?}");
                    Ok(Status::deadline_exceeded(message).into_http())
                }
            }
        })
    }
}

/// The caller's `grpc-timeout`: up to eight digits and a unit. One that cannot
/// be read is as if there were none.
fn asked(headers: &HeaderMap) -> Option<Duration> {
    let text = headers.get("grpc-timeout")?.to_str().ok()?;
    let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    let is_number =
        (1..=8).contains(&digits.len()) && digits.bytes().all(|byte| byte.is_ascii_digit());
    let number: u64 = digits.parse().ok().filter(|_| is_number)?;
    match unit {
        "H" => Some(Duration::from_secs(number * 3600)),
        "M" => Some(Duration::from_secs(number * 60)),
        "S" => Some(Duration::from_secs(number)),
        "m" => Some(Duration::from_millis(number)),
        "u" => Some(Duration::from_micros(number)),
        "n" => Some(Duration::from_nanos(number)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tonic::Code;
    use tower::ServiceExt;

    fn headers(timeout: &str) -> HeaderMap {
        HeaderMap::from_iter([("grpc-timeout".parse().unwrap(), timeout.parse().unwrap())])
    }

    #[test]
    fn a_timeout_is_read_in_each_unit_and_nonsense_is_none() {
        for (text, expected) in [
            ("2H", Some(Duration::from_secs(7200))),
            ("3M", Some(Duration::from_secs(180))),
            ("4S", Some(Duration::from_secs(4))),
            ("99999999m", Some(Duration::from_millis(99_999_999))),
            ("5u", Some(Duration::from_micros(5))),
            ("6n", Some(Duration::from_nanos(6))),
            ("123456789S", None),
            ("S", None),
            ("", None),
            ("-1S", None),
            ("1x", None),
        ] {
            assert_eq!(asked(&headers(text)), expected, "{text:?}");
        }
        assert_eq!(asked(&HeaderMap::new()), None);
    }

    #[tokio::test(start_paused = true)]
    async fn a_call_that_takes_too_long_is_answered_before_tonic_would() {
        let slow = tower::service_fn(|_: Request<()>| async {
            tokio::time::sleep(Duration::from_secs(60)).await;
            Ok::<_, std::convert::Infallible>(Response::new(Body::empty()))
        });
        let limit = Duration::from_secs(30);
        let service = DeadlineLayer { limit }.layer(slow);
        for (asked, earliest, latest) in [("1S", 990, 999), ("99S", 29_990, 29_999)] {
            let mut request = Request::new(());
            *request.headers_mut() = headers(asked);
            let started = tokio::time::Instant::now();
            let response = service.clone().oneshot(request).await.unwrap();
            let status = Status::from_header_map(response.headers()).unwrap();
            assert_eq!(status.code(), Code::DeadlineExceeded);
            let took = started.elapsed().as_millis();
            assert!((earliest..=latest).contains(&took), "{took} ms");
        }
    }
}
