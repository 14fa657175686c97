//! A daemon to work on for a while: one that is there, or our own.

use std::path::PathBuf;

use anyhow::Context;
use domaind_client::{Client, v1};
use domaind_proto::names::DomainId;
use domaind_proto::paths::{RUNTIME_DIR_VAR, RuntimeDir};
use domaind_server::{Config, Daemon};
use tempfile::TempDir;

use crate::cli::Global;
use crate::time;

/// A daemon, and the name of a domain in it that is for us alone.
pub(crate) struct Host {
    pub(crate) client: Client,
    pub(crate) domain: DomainId,
    own: Option<Own>,
}

/// A daemon inside of this process.
struct Own {
    daemon: Daemon,
    /// Its runtime directory; goes away with this.
    dir: TempDir,
}

impl Host {
    /// The daemon of `--runtime-dir` or `DOMAIND_RUNTIME_DIR`, else our own.
    /// The domain's name begins with `purpose`; it is not created yet.
    pub(crate) async fn find(global: &Global, purpose: &str) -> anyhow::Result<Host> {
        let variable = std::env::var_os(RUNTIME_DIR_VAR)
            .filter(|dir| !dir.is_empty())
            .map(PathBuf::from);
        match global.runtime_dir.clone().or(variable) {
            Some(dir) => Ok(Host {
                client: Client::connect(&RuntimeDir::new(&dir)?).await?,
                domain: nobody_elses(purpose)?,
                own: None,
            }),
            None => Host::embedded(purpose).await,
        }
    }

    /// Our own, whatever else there is.
    pub(crate) async fn embedded(purpose: &str) -> anyhow::Result<Host> {
        let (dir, runtime_dir) = temporary_runtime_dir(purpose)?;
        let daemon = Daemon::start(Config::for_runtime_dir(runtime_dir)).await?;
        Ok(Host {
            client: Client::connect(daemon.runtime_dir()).await?,
            domain: DomainId::new(purpose)?,
            own: Some(Own { daemon, dir }),
        })
    }

    /// Is it inside of this process?
    pub(crate) fn is_embedded(&self) -> bool {
        self.own.is_some()
    }

    /// Leaves the daemon as it was found, and stops it if it is our own.
    pub(crate) async fn close(self, owns_domain: bool) -> anyhow::Result<()> {
        let deleted = match owns_domain {
            true => self.delete_domain().await,
            false => Ok(()),
        };
        drop(self.client);
        if let Some(Own { daemon, dir }) = self.own {
            daemon.stop().await;
            dir.close().context("removing the temporary directory")?;
        }
        Ok(deleted?)
    }

    async fn delete_domain(&self) -> Result<(), domaind_client::Error> {
        let request = v1::DeleteDomainRequest {
            name: self.domain.name(),
            force: true,
            allow_missing: true,
            request_id: String::new(),
        };
        self.client.domains().delete_domain(request).await?;
        Ok(())
    }
}

/// A process id alone may be another container's, too.
fn nobody_elses(purpose: &str) -> anyhow::Result<DomainId> {
    let (pid, now) = (std::process::id(), time::now_ms());
    Ok(DomainId::new(&format!("{purpose}-{pid}-{now:x}"))?)
}

/// A directory of our own. `TMPDIR` may be too long for the path of a socket.
fn temporary_runtime_dir(purpose: &str) -> anyhow::Result<(TempDir, RuntimeDir)> {
    let places = [std::env::temp_dir(), "/tmp".into(), "/dev/shm".into()];
    let mut failure = None;
    for place in places {
        let made = tempfile::Builder::new()
            .prefix(&format!("domaind-{purpose}-"))
            .tempdir_in(place)
            .context("a temporary directory")
            .and_then(|dir| {
                let runtime_dir = RuntimeDir::new(dir.path())?;
                Ok((dir, runtime_dir))
            });
        match made {
            Ok(made) => return Ok(made),
            Err(error) => failure.get_or_insert(error),
        };
    }
    Err(failure.expect("there were places to try"))
}
