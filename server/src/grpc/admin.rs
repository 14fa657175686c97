//! `AdminService`, on the admin socket only.

use std::sync::Arc;

use domaind_proto::convert::count;
use domaind_proto::paths::RuntimeDir;
use domaind_proto::v1::admin_service_server::AdminService;
use domaind_proto::v1::{self, Refusal};
use tonic::{Request, Response, Status};

use super::caller::visitor;
use crate::features::Features;
use crate::offload::off_worker;
use crate::proc;
use crate::registry::Registry;
use crate::reload::Reloader;
use crate::terms::InForce;
use crate::version::VERSION;

#[derive(Debug)]
pub(crate) struct Admin {
    pub(crate) registry: Arc<Registry>,
    pub(crate) identity: Arc<Identity>,
    pub(crate) terms: InForce,
    pub(crate) reloader: Arc<Reloader>,
}

/// What stays the same for one run of the daemon.
#[derive(Debug)]
pub(crate) struct Identity {
    /// Differs between two runs.
    pub(crate) instance: String,
    pub(crate) start_time_unix_ms: u64,
    pub(crate) runtime_dir: RuntimeDir,
    pub(crate) features: Features,
    /// [`crate::Config::poison`].
    pub(crate) poison: bool,
}

#[tonic::async_trait]
impl AdminService for Admin {
    async fn get_info(&self, _: Request<v1::GetInfoRequest>) -> Result<Response<v1::Info>, Status> {
        let totals = self.registry.totals();
        let Features {
            memfd_noexec_seal,
            peer_pidfd,
            pass_rights_off,
            pidfd_inode,
        } = self.identity.features;
        Ok(Response::new(v1::Info {
            version: VERSION.to_owned(),
            instance: self.identity.instance.clone(),
            pid: std::process::id(),
            start_time_unix_ms: self.identity.start_time_unix_ms,
            runtime_dir: self.identity.runtime_dir.path().display().to_string(),
            features: Some(v1::Features {
                memfd_noexec_seal,
                peer_pidfd,
                pass_rights_off,
                pidfd_inode,
            }),
            domains: count(totals.domains),
            sessions: count(totals.sessions),
            streaming_mappings: totals.streaming as u64,
            coherent_allocations: totals.coherent as u64,
            memories: totals.memories as u64,
            region_bytes: totals.region_bytes,
            region_budget_bytes: totals.region_budget_bytes,
            open_fds: count(proc::open_fds()),
            threads: count(proc::threads()),
            direct_mappings: totals.direct as u64,
            poison: self.identity.poison,
            invalidating_mappings: totals.invalidating as u64,
            quarantined_mappings: totals.quarantined.mappings as u64,
            quarantined_bytes: totals.quarantined.bytes,
            fenced_sessions: count(totals.fenced),
            watchers: count(totals.watchers),
            leases: totals.leases.count as u64,
            lease_bytes: totals.leases.bytes,
        }))
    }

    async fn reload_config(
        &self,
        request: Request<v1::ReloadConfigRequest>,
    ) -> Result<Response<v1::ReloadConfigResponse>, Status> {
        visitor(&request, &self.terms)?;
        let reloader = Arc::clone(&self.reloader);
        let reloaded = off_worker(move || reloader.reload()).await?;
        Ok(Response::new(reloaded.map_err(Refusal::from)?.into()))
    }
}
