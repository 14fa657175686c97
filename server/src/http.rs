//! HTTP for probes and scrapes, on a thread with a runtime of its own: whoever
//! asks whether the daemon lives is answered also when the runtime that serves
//! does not.
//!
//! Anybody who reaches the port may ask. So nothing is kept for who is slow: a
//! connection is for one request without a body, and one too many takes the
//! place of the oldest.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::fmt;
use std::fs;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use http::header::{ALLOW, CACHE_CONTROL, CONTENT_TYPE};
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode};
use http_body_util::Full;
use hyper::body::{Body, Bytes, Incoming};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use rustix::net::SocketType;
use serde::Deserialize;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, UnixListener};
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::timeout;
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::sockets::{Bound, SocketError, bind};

/// Connections at a time.
const CONNECTIONS: usize = 32;
/// All headers of a request must be there by then.
const HEADER_LIMIT: Duration = Duration::from_secs(5);
/// A connection ends then, whatever it is doing.
const CONNECTION_LIMIT: Duration = Duration::from_secs(15);
/// Bytes of a request's head, which is also the least that hyper takes.
const HEAD_BYTES: usize = 8 << 10;
const HEADERS: usize = 64;
/// How long to wait when the process is out of file descriptors.
const EXHAUSTED_PAUSE: Duration = Duration::from_millis(100);
/// Of a socket for whoever shares the daemon's group.
const SOCKET_MODE: u32 = 0o660;
/// A Unix socket's path, its terminating zero not counted.
const SOCKET_PATH_BYTES: usize = 107;

/// Where probes and metrics are to be had.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub enum Listen {
    /// Nowhere.
    #[default]
    Nowhere,
    /// At an address and port.
    Tcp(SocketAddr),
    /// At a Unix socket.
    Unix(PathBuf),
}

/// What is no such place.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)] // the messages are the docs
pub enum ListenError {
    #[error("{text:?} is neither IP:port, nor unix:/path, nor empty")]
    Malformed { text: String },
    #[error("the path {path:?} needs {bytes} bytes; a Unix socket takes {SOCKET_PATH_BYTES}")]
    TooLong { path: PathBuf, bytes: usize },
    #[error("{path:?} lies in {public:?}, which clients are given")]
    InPublic { path: PathBuf, public: PathBuf },
}

/// Why nobody is answered.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)] // the messages are the docs
pub enum HttpError {
    #[error("metrics.listen")]
    Listen(#[from] ListenError),
    #[error(transparent)]
    Socket(#[from] SocketError),
    #[error("listening at {address}")]
    Tcp {
        address: SocketAddr,
        #[source]
        cause: io::Error,
    },
    #[error("starting the thread that answers probes")]
    Thread(#[source] io::Error),
}

/// What a path answers.
#[derive(Debug)]
pub(crate) struct Page {
    pub(crate) status: StatusCode,
    pub(crate) content_type: &'static str,
    pub(crate) text: String,
}

/// What is to be had.
pub(crate) trait Pages: Send + Sync + 'static {
    /// `None`: there is no such path.
    fn page(&self, path: &str, headers: &HeaderMap) -> Option<Page>;
}

/// Answers until it is dropped.
#[derive(Debug)]
pub(crate) struct Http {
    _stop: DropGuard,
    _bound: Option<Bound>,
}

enum Listener {
    Tcp(std::net::TcpListener),
    Unix(std::os::unix::net::UnixListener),
}

impl Http {
    /// Binds, and answers from then on. `None` if that is to be nowhere.
    ///
    /// # Errors
    /// [`HttpError`].
    pub(crate) fn start(
        listen: &Listen,
        public: &Path,
        pages: Arc<dyn Pages>,
    ) -> Result<Option<Http>, HttpError> {
        let (listener, bound) = match listen {
            Listen::Nowhere => return Ok(None),
            Listen::Tcp(address) => {
                let failed = |cause| HttpError::Tcp {
                    address: *address,
                    cause,
                };
                let listener = std::net::TcpListener::bind(address).map_err(failed)?;
                listener.set_nonblocking(true).map_err(failed)?;
                // Says which port, if any was to be taken.
                let address = listener.local_addr().map_err(failed)?;
                tracing::info!(%address, "answering probes");
                (Listener::Tcp(listener), None)
            }
            Listen::Unix(path) => {
                listen.check_is_not_in(public)?;
                let (bound, listener) = bind(path.clone(), SocketType::STREAM, SOCKET_MODE, None)?;
                tracing::info!(?path, "answering probes");
                (Listener::Unix(listener), Some(bound))
            }
        };
        let stop = CancellationToken::new();
        let stopped = stop.clone();
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(HttpError::Thread)?;
        thread::Builder::new()
            .name("probes".to_owned())
            .spawn(move || runtime.block_on(stopped.run_until_cancelled(serve(listener, pages))))
            .map_err(HttpError::Thread)?;
        Ok(Some(Http {
            _stop: stop.drop_guard(),
            _bound: bound,
        }))
    }
}

async fn serve(listener: Listener, pages: Arc<dyn Pages>) {
    let served = match listener {
        Listener::Tcp(listener) => match TcpListener::from_std(listener) {
            Ok(listener) => accept(async || Ok(listener.accept().await?.0), pages).await,
            Err(cause) => cause,
        },
        Listener::Unix(listener) => match UnixListener::from_std(listener) {
            Ok(listener) => accept(async || Ok(listener.accept().await?.0), pages).await,
            Err(cause) => cause,
        },
    };
    tracing::error!(cause = %served, "probes are no longer answered");
}

/// Accepts for ever; answers what stops it.
async fn accept<S>(next: impl AsyncFn() -> io::Result<S>, pages: Arc<dyn Pages>) -> io::Error
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let mut connections = JoinSet::new();
    let mut in_order: VecDeque<AbortHandle> = VecDeque::new();
    loop {
        let stream = tokio::select! {
            accepted = next() => accepted,
            Some(_) = connections.join_next() => continue,
        };
        match stream {
            Ok(stream) => {
                in_order.retain(|connection| !connection.is_finished());
                if in_order.len() >= CONNECTIONS
                    && let Some(oldest) = in_order.pop_front()
                {
                    oldest.abort();
                }
                in_order.push_back(connections.spawn(converse(stream, Arc::clone(&pages))));
            }
            Err(cause) => {
                tracing::warn!(%cause, "cannot accept a probe, pausing");
                tokio::time::sleep(EXHAUSTED_PAUSE).await;
            }
        }
    }
}

async fn converse<S>(stream: S, pages: Arc<dyn Pages>)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let answer = service_fn(move |request| {
        let response = respond(pages.as_ref(), &request);
        async move { Ok::<_, Infallible>(response) }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADER_LIMIT)
        .max_buf_size(HEAD_BYTES)
        .max_headers(HEADERS)
        .keep_alive(false)
        .serve_connection(TokioIo::new(stream), answer);
    match timeout(CONNECTION_LIMIT, connection).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::debug!(%error, "a probe that was not understood"),
        Err(_) => tracing::debug!(limit = ?CONNECTION_LIMIT, "a probe that did not end"),
    }
}

fn respond(pages: &dyn Pages, request: &Request<Incoming>) -> Response<Full<Bytes>> {
    answer(pages, request, !request.body().is_end_stream())
}

fn answer<B>(pages: &dyn Pages, request: &Request<B>, has_body: bool) -> Response<Full<Bytes>> {
    let says = |status, text: &str| Page {
        status,
        content_type: "text/plain; charset=utf-8",
        text: format!("{text}\n"),
    };
    let is_read = [Method::GET, Method::HEAD].contains(request.method());
    let page = match pages.page(request.uri().path(), request.headers()) {
        None => says(StatusCode::NOT_FOUND, "there is no such path"),
        Some(_) if !is_read => says(StatusCode::METHOD_NOT_ALLOWED, "only GET and HEAD"),
        Some(_) if has_body => says(StatusCode::PAYLOAD_TOO_LARGE, "no body is taken"),
        Some(page) => page,
    };
    let mut response = Response::new(Full::from(page.text));
    *response.status_mut() = page.status;
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static(page.content_type));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    if page.status == StatusCode::METHOD_NOT_ALLOWED {
        headers.insert(ALLOW, HeaderValue::from_static("GET, HEAD"));
    }
    response
}

impl Listen {
    /// Clients shall not find it among their sockets, under whatever name.
    ///
    /// # Errors
    /// [`ListenError::InPublic`].
    pub(crate) fn check_is_not_in(&self, public: &Path) -> Result<(), ListenError> {
        let Listen::Unix(path) = self else {
            return Ok(());
        };
        let real = |dir: &Path| fs::canonicalize(dir).unwrap_or_else(|_| dir.to_owned());
        let dir = path.parent().unwrap_or(path);
        if path.starts_with(public) || real(dir).starts_with(real(public)) {
            return Err(ListenError::InPublic {
                path: path.clone(),
                public: public.to_owned(),
            });
        }
        Ok(())
    }
}

impl FromStr for Listen {
    type Err = ListenError;

    fn from_str(text: &str) -> Result<Listen, ListenError> {
        let malformed = || ListenError::Malformed {
            text: text.to_owned(),
        };
        if text.is_empty() {
            return Ok(Listen::Nowhere);
        }
        let Some(path) = text.strip_prefix("unix:") else {
            return text.parse().map(Listen::Tcp).map_err(|_| malformed());
        };
        let path = PathBuf::from(path);
        if !path.is_absolute() || path.file_name().is_none() {
            return Err(malformed());
        }
        // Bound as `.{name}.new` first.
        let bytes = path.as_os_str().len() + "..new".len();
        if bytes > SOCKET_PATH_BYTES {
            return Err(ListenError::TooLong { path, bytes });
        }
        Ok(Listen::Unix(path))
    }
}

impl TryFrom<String> for Listen {
    type Error = ListenError;

    fn try_from(text: String) -> Result<Listen, ListenError> {
        text.parse()
    }
}

impl fmt::Display for Listen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Listen::Nowhere => Ok(()),
            Listen::Tcp(address) => write!(f, "{address}"),
            Listen::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct One;

    impl Pages for One {
        fn page(&self, path: &str, _: &HeaderMap) -> Option<Page> {
            (path == "/one").then(|| Page {
                status: StatusCode::OK,
                content_type: "text/plain",
                text: "1".to_owned(),
            })
        }
    }

    #[test]
    fn places_are_addresses_and_absolute_paths_and_nothing_else() {
        for text in ["", "127.0.0.1:9464", "[::]:1", "unix:/run/domaind/m.sock"] {
            assert_eq!(text.parse::<Listen>().unwrap().to_string(), text);
        }
        let long = format!("unix:/{}", "x".repeat(102));
        for wrong in [
            "9464",
            ":9464",
            "localhost:9464",
            "unix:m",
            "unix:",
            "unix:/",
            &long,
        ] {
            let refused = wrong.parse::<Listen>().unwrap_err().to_string();
            assert!(
                refused.contains(wrong.trim_start_matches("unix:")),
                "{refused}"
            );
        }
    }

    #[test]
    fn a_socket_among_those_of_clients_is_refused_whatever_it_is_called() {
        let dir = tempfile::tempdir_in("/tmp").unwrap();
        let public = dir.path().join("public");
        let is_refused = |path: &Path| Listen::Unix(path.into()).check_is_not_in(&public).is_err();
        assert!(is_refused(&public.join("m.sock")));
        fs::create_dir(&public).unwrap();
        let link = dir.path().join("link");
        std::os::unix::fs::symlink(&public, &link).unwrap();
        assert!(is_refused(&link.join("m.sock")));
        assert!(is_refused(&dir.path().join("public/../public/m.sock")));
        assert!(!is_refused(&dir.path().join("m.sock")));
        assert!(!is_refused(&dir.path().join("public.sock")));
    }

    #[test]
    fn what_is_not_read_is_refused_by_what_is_wrong_with_it() {
        for (method, path, has_body, status) in [
            (Method::GET, "/one", false, 200),
            (Method::HEAD, "/one", false, 200),
            (Method::POST, "/one", false, 405),
            (Method::GET, "/one", true, 413),
            (Method::GET, "/two", false, 404),
            (Method::POST, "/two", true, 404),
        ] {
            let mut request = Request::new(());
            *request.method_mut() = method.clone();
            *request.uri_mut() = path.parse().unwrap();
            let response = answer(&One, &request, has_body);
            assert_eq!(response.status(), status, "{method} {path}");
            assert_eq!(response.headers().contains_key(ALLOW), status == 405);
        }
    }
}
