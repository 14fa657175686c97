//! A client of the daemon on a thread of its own.

use domain_core::region::Access;
use domain_core::session::Role;
use domaind_client::{Client, Session};
use domaind_proto::names::DomainId;
use domaind_proto::paths::RuntimeDir;
use tokio::runtime::{Builder, Runtime};

/// Where the work is done, and how much of it.
#[derive(Clone, Debug)]
pub(super) struct Place {
    pub(super) dir: RuntimeDir,
    pub(super) domain: DomainId,
    /// At least one.
    pub(super) threads: usize,
    /// What `--size` says.
    pub(super) size_bytes: u64,
}

/// One connection to the daemon. All of its work is done on the thread that
/// waits for it, as in a process that has nothing else to do.
///
/// A session of it must go first: it needs the runtime to say goodbye.
#[derive(Debug)]
pub(super) struct Party {
    client: Client,
    domain: DomainId,
    runtime: Runtime,
}

impl Place {
    /// A connection of its own for somebody.
    pub(super) fn party(&self) -> anyhow::Result<Party> {
        let runtime = Builder::new_current_thread().enable_all().build()?;
        let client = runtime.block_on(Client::connect(&self.dir))?;
        Ok(Party {
            client,
            domain: self.domain.clone(),
            runtime,
        })
    }
}

impl Party {
    pub(super) fn client(&self) -> &Client {
        &self.client
    }

    /// Waits for it, and meanwhile does what else there is to do.
    pub(super) fn run<F: Future>(&self, future: F) -> F::Output {
        self.runtime.block_on(future)
    }

    /// A session in the domain of the measurement.
    pub(super) async fn attach(&self, role: Role) -> Result<Session, domaind_client::Error> {
        let access = Access::ReadWrite;
        self.client.attach(&self.domain, role, access).await
    }
}
