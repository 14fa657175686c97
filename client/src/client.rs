//! The daemon's control plane over gRPC.

use std::io;
use std::path::PathBuf;

use domain_core::limits::{REQUEST_BYTES, RESPONSE_BYTES};
use domain_core::region::Access;
use domain_core::session::Role;
use domaind_proto::names::DomainId;
use domaind_proto::paths::RuntimeDir;
use domaind_proto::v1::admin_service_client::AdminServiceClient;
use domaind_proto::v1::domain_service_client::DomainServiceClient;
use domaind_proto::v1::mapping_service_client::MappingServiceClient;
use domaind_proto::v1::session_service_client::SessionServiceClient;
use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::{Channel, Endpoint, Uri};
use tower::{Service, service_fn};

use crate::error::Error;
use crate::session::Session;
use crate::token::Token;

/// h2 refuses a path as authority, so every Unix target is "localhost".
const AUTHORITY: &str = "http://localhost";
/// Headers and trailers of one answer, in bytes: error details travel there.
const HEADER_BYTES: u32 = 64 << 10;

/// Calls on a domain, which act for a session or for its owner.
pub(crate) type DomainCalls = MappingServiceClient<InterceptedService<Channel, Token>>;

/// What a process is to be in a domain, and what it wants to hear.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AttachOptions {
    /// As what it attaches.
    pub role: Role,
    /// How it may touch the domain's memory.
    pub access: Access,
    /// [`Session::changes`] tells of every removal.
    pub removals: bool,
    /// [`Session::changes`] tells of every addition.
    pub additions: bool,
}

impl AttachOptions {
    /// Of a session that wants to hear of nothing.
    #[must_use]
    pub fn new(role: Role, access: Access) -> AttachOptions {
        AttachOptions {
            role,
            access,
            removals: false,
            additions: false,
        }
    }
}

/// The control plane of one daemon. Cheap to clone; clones share one
/// connection, which is made anew when a call finds it broken.
///
/// Must be made inside a tokio runtime with I/O and time.
#[derive(Clone, Debug)]
pub struct Client {
    dir: RuntimeDir,
    channel: Channel,
}

impl Client {
    /// Connects to `public/api.sock`, now, so that a missing daemon is an
    /// error here and not of the first call. Cancelling leaves nothing.
    ///
    /// # Errors
    /// [`Error::NoDaemon`], [`Error::Transport`].
    pub async fn connect(dir: &RuntimeDir) -> Result<Client, Error> {
        Client::connect_to(dir, dir.api_socket()).await
    }

    /// Connects to the operator's socket, `admin/admin.sock`. Otherwise as
    /// [`Client::connect`].
    ///
    /// # Errors
    /// [`Error::NoDaemon`], [`Error::Transport`].
    pub async fn connect_admin(dir: &RuntimeDir) -> Result<Client, Error> {
        Client::connect_to(dir, dir.admin_socket()).await
    }

    /// Becomes a session of the domain: connects the fd socket, attaches, and
    /// maps the domain's memory. Cancelling ends what was begun.
    ///
    /// # Errors
    /// [`Error::NoDaemon`], [`Error::Refused`] (no such domain, quota, a
    /// read-only grant that would not hold), [`Error::Region`] when the memory
    /// cannot be mapped, [`Error::Timeout`], [`Error::Protocol`].
    pub async fn attach(
        &self,
        domain: &DomainId,
        role: Role,
        access: Access,
    ) -> Result<Session, Error> {
        self.attach_with(domain, AttachOptions::new(role, access))
            .await
    }

    /// As [`Client::attach`], for a session that wants to hear of changes.
    ///
    /// # Errors
    /// As [`Client::attach`].
    pub async fn attach_with(
        &self,
        domain: &DomainId,
        options: AttachOptions,
    ) -> Result<Session, Error> {
        Session::attach(self, domain, options).await
    }

    /// Where the daemon's sockets are.
    #[must_use]
    pub fn runtime_dir(&self) -> &RuntimeDir {
        &self.dir
    }

    /// Creates, shows, changes and deletes domains.
    #[must_use]
    pub fn domains(&self) -> DomainServiceClient<Channel> {
        DomainServiceClient::new(self.channel())
            .max_decoding_message_size(RESPONSE_BYTES)
            .max_encoding_message_size(REQUEST_BYTES)
    }

    /// Lists mappings. What drivers do with them is on [`Session`], because
    /// the calls need its token; what owners do, on
    /// [`Owner`](crate::Owner).
    #[must_use]
    pub fn mappings(&self) -> MappingServiceClient<Channel> {
        MappingServiceClient::new(self.channel())
            .max_decoding_message_size(RESPONSE_BYTES)
            .max_encoding_message_size(REQUEST_BYTES)
    }

    /// Shows and ends sessions.
    #[must_use]
    pub fn sessions(&self) -> SessionServiceClient<Channel> {
        SessionServiceClient::new(self.channel())
            .max_decoding_message_size(RESPONSE_BYTES)
            .max_encoding_message_size(REQUEST_BYTES)
    }

    /// Asks about the daemon; on the operator's socket only.
    #[must_use]
    pub fn admin(&self) -> AdminServiceClient<Channel> {
        AdminServiceClient::new(self.channel())
            .max_decoding_message_size(RESPONSE_BYTES)
            .max_encoding_message_size(REQUEST_BYTES)
    }

    /// The connection itself, for standard services (health, reflection).
    #[must_use]
    pub fn channel(&self) -> Channel {
        self.channel.clone()
    }

    /// What the calls of a session go through, or of an owner.
    pub(crate) fn domain_calls(&self, token: Token) -> DomainCalls {
        MappingServiceClient::with_interceptor(self.channel(), token)
            .max_decoding_message_size(RESPONSE_BYTES)
            .max_encoding_message_size(REQUEST_BYTES)
    }

    async fn connect_to(dir: &RuntimeDir, socket: PathBuf) -> Result<Client, Error> {
        // Connected here and not in the connector: tonic would wrap the cause.
        let first = UnixStream::connect(&socket)
            .await
            .map_err(|cause| Error::NoDaemon {
                path: socket.clone(),
                cause,
            })?;
        let endpoint = Endpoint::from_static(AUTHORITY).http2_max_header_list_size(HEADER_BYTES);
        let channel = endpoint
            .connect_with_connector(connector(first, socket))
            .await
            .map_err(Error::from_transport)?;
        Ok(Client {
            dir: dir.clone(),
            channel,
        })
    }
}

/// Gives tonic the connection that is there already, and later new ones.
fn connector(
    first: UnixStream,
    socket: PathBuf,
) -> impl Service<Uri, Response = TokioIo<UnixStream>, Error = io::Error, Future: Send> + Send + 'static
{
    let mut first = Some(first);
    service_fn(move |_: Uri| {
        let (ready, socket) = (first.take(), socket.clone());
        async move {
            let stream = match ready {
                Some(stream) => stream,
                None => UnixStream::connect(socket).await?,
            };
            Ok(TokioIo::new(stream))
        }
    })
}

#[cfg(test)]
mod tests {
    use tonic::Code;

    use super::*;

    #[tokio::test]
    async fn a_missing_daemon_is_an_error_of_connect_and_names_the_socket() {
        let temp = tempfile::tempdir_in("/tmp").unwrap();
        let dir = RuntimeDir::new(temp.path()).unwrap();

        let error = Client::connect(&dir).await.unwrap_err();

        assert_eq!(error.code(), Some(Code::Unavailable));
        assert!(error.to_string().contains("public/api.sock"), "{error}");
        let admin = Client::connect_admin(&dir).await.unwrap_err();
        assert!(admin.to_string().contains("admin/admin.sock"), "{admin}");
    }

    /// The first connection is there already; a daemon that was restarted is
    /// reached by a new one.
    #[tokio::test]
    async fn the_connector_hands_out_what_it_has_and_then_connects_anew() {
        let temp = tempfile::tempdir_in("/tmp").unwrap();
        let path = temp.path().join("api.sock");
        let listener = tokio::net::UnixListener::bind(&path).unwrap();
        let first = UnixStream::connect(&path).await.unwrap();
        let mut connector = connector(first, path.clone());
        listener.accept().await.unwrap();

        connector.call(Uri::default()).await.unwrap();
        connector.call(Uri::default()).await.unwrap();

        listener.accept().await.unwrap();
        drop(listener);
        std::fs::remove_file(path).unwrap();
        assert!(connector.call(Uri::default()).await.is_err());
    }
}
