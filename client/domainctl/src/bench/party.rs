//! A client of the daemon on a thread of its own.

use std::ops::Deref;

use domain_core::region::Access;
use domain_core::session::Role;
use domaind_client::{Client, Session, blocking};
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

/// A device that says goodbye when it is dropped, before whoever it has memory
/// from may go. Of a session that has opened memory, and has not acknowledged
/// that it is gone, the daemon knows only by the end of its process that it can
/// reach nothing any more.
///
/// It hears of what the daemon asks on a thread of its own, whatever the one that
/// uses it does.
#[derive(Debug)]
pub(super) struct Device {
    /// `None` only in the drop.
    session: Option<blocking::Session>,
}

impl Device {
    pub(super) fn attach(place: &Place) -> anyhow::Result<Device> {
        let client = blocking::Client::connect(&place.dir)?;
        let session = client.attach(&place.domain, Role::Device, Access::ReadWrite)?;
        Ok(Device {
            session: Some(session),
        })
    }
}

impl Deref for Device {
    type Target = blocking::Session;

    fn deref(&self) -> &blocking::Session {
        self.session.as_ref().expect("it is there until the drop")
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        if let Some(session) = self.session.take() {
            // If it has ended already that is no trouble.
            let _ = session.detach();
        }
    }
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
