//! The daemon itself, as people see it.

use domaind_proto::v1;

use super::{Sheet, Style, View, leases, yes_no};
use crate::time::{age, utc};
use domaind_proto::size::exact;

impl View for v1::Info {
    fn text(&self, style: &Style) -> String {
        let mut sheet = Sheet::default();
        process(&mut sheet, self, style);
        holdings(&mut sheet, self);
        let features = self.features.unwrap_or_default();
        sheet
            .title("Kernel")
            .under("MFD_NOEXEC_SEAL (6.3)", yes_no(features.memfd_noexec_seal))
            .under("SO_PEERPIDFD (6.5)", yes_no(features.peer_pidfd))
            .under("pidfd inodes (6.9)", yes_no(features.pidfd_inode))
            .under("SO_PASSRIGHTS (6.16)", yes_no(features.pass_rights_off));
        sheet.render()
    }

    /// There is one daemon; its name is its instance.
    fn names(&self) -> Vec<String> {
        vec![format!("instances/{}", self.instance)]
    }
}

fn process(sheet: &mut Sheet, info: &v1::Info, style: &Style) {
    let started = info.start_time_unix_ms;
    sheet
        .value("Version", &info.version)
        .value("Instance", &info.instance)
        .value("Pid", info.pid)
        .value(
            "Started",
            format!("{} ({} ago)", utc(started), age(started, style.now_ms)),
        )
        .value("Runtime directory", &info.runtime_dir)
        .value("Open fds", info.open_fds)
        .value("Threads", info.threads);
    // For tests only, so that nobody else needs to hear of it.
    if info.poison {
        sheet.value("Poison", "freed memory is overwritten");
    }
}

fn holdings(sheet: &mut Sheet, info: &v1::Info) {
    sheet
        .title("Holds")
        .under("Domains", info.domains)
        .under("Sessions", info.sessions)
        .under("Streaming mappings", info.streaming_mappings)
        .under("Coherent allocations", info.coherent_allocations)
        .under("Leases", leases(info.leases, info.lease_bytes))
        .under("Direct mappings", info.direct_mappings)
        .under("Memories", info.memories)
        .under("Region memory", exact(info.region_bytes))
        .under("Region budget", exact(info.region_budget_bytes))
        .under("Watchers", info.watchers)
        .title("Held back")
        .under("Invalidating", info.invalidating_mappings)
        .under("Quarantined", info.quarantined_mappings)
        .under("In apertures", exact(info.quarantined_bytes))
        .under("Fenced sessions", info.fenced_sessions);
}
