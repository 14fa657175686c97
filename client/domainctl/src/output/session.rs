//! Sessions as people see them.

use domaind_proto::v1;

use super::list::Row;
use super::{Sheet, Style, View, bare, leases, word, yes_no};
use crate::time::{age, utc};
use domaind_proto::size::{exact, human};

impl Row for v1::Session {
    const PLURAL: &'static str = "sessions";

    fn headers(style: &Style) -> Vec<&'static str> {
        let mut headers = vec![
            "SESSION", "DOMAIN", "ROLE", "ACCESS", "PID", "UID", "MAPPINGS", "STATE", "AGE",
        ];
        if style.wide() {
            headers.extend([
                "STREAMING",
                "COHERENT",
                "LEASES",
                "LEASED",
                "MEMORIES",
                "GID",
                "POD",
                "CONTAINER",
                "UNIT",
                "ENFORCED",
                "ACKED",
                "ASKED",
                "QUARANTINED",
                "QUARANTINED-BYTES",
            ]);
        }
        headers
    }

    fn cells(&self, style: &Style) -> Vec<String> {
        let peer = self.peer.clone().unwrap_or_default();
        let mut cells = vec![
            bare(&self.name).to_owned(),
            bare(&self.domain).to_owned(),
            role(self),
            access(self),
            peer.pid.to_string(),
            peer.uid.to_string(),
            mappings(self).to_string(),
            state(self),
            age(self.attach_time_unix_ms, style.now_ms),
        ];
        if style.wide() {
            cells.extend([
                self.streaming_mappings.to_string(),
                self.coherent_allocations.to_string(),
                self.leases.to_string(),
                human(self.lease_bytes),
                self.memories.to_string(),
                peer.gid.to_string(),
                or_dash(&peer.pod_uid),
                or_dash(short(&peer.container_id)),
                or_dash(&peer.unit),
                yes_no(self.access_enforced).to_owned(),
                self.acked_generation.to_string(),
                self.asked_generation.to_string(),
                self.quarantined_mappings.to_string(),
                human(self.quarantined_bytes),
            ]);
        }
        cells
    }

    fn name(&self) -> String {
        self.name.clone()
    }
}

/// All that is known of a session. Serialises as the session.
#[derive(Debug, serde::Serialize)]
#[serde(transparent)]
pub(crate) struct SessionSheet(pub(crate) v1::Session);

impl View for SessionSheet {
    fn text(&self, style: &Style) -> String {
        let session = &self.0;
        let attached = session.attach_time_unix_ms;
        let mut sheet = Sheet::default();
        sheet
            .value("Session", bare(&session.name))
            .value("Domain", bare(&session.domain))
            .value("State", state(session))
            .value("Role", role(session))
            .value("Access", access(session))
            .value("Access enforced", yes_no(session.access_enforced))
            .value(
                "Attached",
                format!("{} ({} ago)", utc(attached), age(attached, style.now_ms)),
            );
        peer(&mut sheet, session);
        sheet
            .title("Holds")
            .under("Streaming mappings", session.streaming_mappings)
            .under("Coherent allocations", session.coherent_allocations)
            .under("Leases", leases(session.leases, session.lease_bytes))
            .under("Memories", session.memories)
            .title("Acknowledges")
            .under("Acknowledged", session.acked_generation)
            .under("Asked for", asked(session))
            .title("Holds back")
            .under("Quarantined", session.quarantined_mappings)
            .under("In apertures", exact(session.quarantined_bytes));
        sheet.render()
    }

    fn names(&self) -> Vec<String> {
        vec![self.0.name.clone()]
    }
}

fn peer(sheet: &mut Sheet, session: &v1::Session) {
    let peer = session.peer.clone().unwrap_or_default();
    sheet
        .title("Process")
        .under("Pid", peer.pid)
        .under("Uid", peer.uid)
        .under("Gid", peer.gid);
    if peer.pidfd_inode != 0 {
        sheet.under("Pidfd inode", peer.pidfd_inode);
    }
    let places = [
        ("Pod", &peer.pod_uid),
        ("Container", &peer.container_id),
        ("Unit", &peer.unit),
    ];
    for (title, place) in places.into_iter().filter(|(_, place)| !place.is_empty()) {
        sheet.under(title, place);
    }
}

/// What other tools show of a container's id, too.
fn short(container_id: &str) -> &str {
    container_id.get(..12).unwrap_or(container_id)
}

/// A cell that is never empty: columns are told apart by what stands in them.
fn or_dash(text: &str) -> String {
    match text {
        "" => "-".to_owned(),
        text => text.to_owned(),
    }
}

/// What the quota on mappings counts.
fn mappings(session: &v1::Session) -> u64 {
    session.streaming_mappings + session.coherent_allocations + session.leases
}

/// What it was asked to acknowledge, and whether it still owes that.
fn asked(session: &v1::Session) -> String {
    match session.asked_generation > session.acked_generation {
        true => format!("{} (owed)", session.asked_generation),
        false => session.asked_generation.to_string(),
    }
}

fn state(session: &v1::Session) -> String {
    word(session.state().as_str_name(), "SESSION_STATE_")
}

fn role(session: &v1::Session) -> String {
    word(session.role().as_str_name(), "ROLE_")
}

fn access(session: &v1::Session) -> String {
    word(session.access().as_str_name(), "ACCESS_")
}

#[cfg(test)]
mod tests {
    use super::super::List;
    use super::*;
    use crate::cli::Format;

    fn session() -> v1::Session {
        v1::Session {
            name: "sessions/7".to_owned(),
            domain: "domains/d0".to_owned(),
            role: v1::Role::Driver.into(),
            access: v1::Access::ReadWrite.into(),
            access_enforced: true,
            peer: Some(v1::Peer {
                pid: 4242,
                uid: 1000,
                gid: 100,
                pidfd_inode: 99,
                ..v1::Peer::default()
            }),
            attach_time_unix_ms: 1000,
            streaming_mappings: 2,
            coherent_allocations: 1,
            leases: 1,
            lease_bytes: 65536,
            memories: 1,
            state: v1::SessionState::Attached.into(),
            acked_generation: 5,
            asked_generation: 5,
            ..v1::Session::default()
        }
    }

    fn style(format: Format) -> Style {
        Style {
            format,
            headers: true,
            now_ms: 31_000,
        }
    }

    #[test]
    fn a_session_is_a_line_of_a_table() {
        let text = List::of(vec![session()]).text(&style(Format::Table));
        assert_eq!(
            text,
            "SESSION   DOMAIN   ROLE     ACCESS       PID    UID    MAPPINGS   STATE      AGE\n\
             7         d0       driver   read-write   4242   1000   4          attached   30s\n"
        );
    }

    #[test]
    fn every_column_has_a_header() {
        for format in [Format::Table, Format::Wide] {
            let style = style(format);
            let headers = <v1::Session as Row>::headers(&style);
            assert_eq!(headers.len(), session().cells(&style).len());
        }
    }

    #[test]
    fn a_session_that_was_fenced_shows_what_it_owes_and_holds_back() {
        let fenced = v1::Session {
            state: v1::SessionState::Fenced.into(),
            asked_generation: 9,
            quarantined_mappings: 2,
            quarantined_bytes: 8192,
            ..session()
        };
        let text = SessionSheet(fenced).text(&style(Format::Table));
        for line in [
            "State:                   fenced\n",
            "  Acknowledged:          5\n",
            "  Asked for:             9 (owed)\n",
            "  Quarantined:           2\n",
            "  In apertures:          8 KiB (8192 bytes)\n",
        ] {
            assert!(text.contains(line), "{line:?} in\n{text}");
        }
        assert_eq!(asked(&session()), "5");
    }

    #[test]
    fn where_the_process_runs_is_shown_as_far_as_it_is_known() {
        let peer = v1::Peer {
            pod_uid: "0f3c2a91-7d54-4b1e-9c88-3f5be1a2d007".to_owned(),
            container_id: "c0ffee00".repeat(8),
            ..session().peer.unwrap()
        };
        let in_pod = v1::Session {
            peer: Some(peer),
            ..session()
        };
        let text = List::of(vec![in_pod.clone()]).text(&style(Format::Wide));
        assert!(
            text.contains(" 0f3c2a91-7d54-4b1e-9c88-3f5be1a2d007   c0ffee00c0ff   -  "),
            "{text}"
        );
        let text = SessionSheet(in_pod).text(&style(Format::Table));
        assert!(
            text.contains(&"c0ffee00".repeat(8)) && !text.contains("Unit"),
            "{text}"
        );
    }

    #[test]
    fn a_description_says_who_the_kernel_says_it_is() {
        let text = SessionSheet(session()).text(&style(Format::Table));
        assert!(text.contains("Process:\n  Pid:"), "{text}");
        assert!(text.contains("4242\n"), "{text}");
        let leases = "  Leases:                1 (64 KiB)\n";
        assert!(text.contains(leases), "{text}");
    }
}
