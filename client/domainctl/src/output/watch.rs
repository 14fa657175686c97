//! Events of a domain as people see them.

use domaind_proto::v1::watch_domain_response::Event;
use domaind_proto::v1::{self, IovaRange};
use serde::Serialize;

use super::list::Row;
use super::{Style, View, bare, json, name, word, yaml};
use crate::cli::Format;
use crate::exit::Exit;
use crate::failure::Failure;
use crate::range::hex;
use domaind_proto::size::human;

/// One event. Serialises as itself; as JSON in one line, which is how streams of
/// objects are read.
#[derive(Debug, Serialize)]
#[serde(transparent)]
pub(crate) struct Watched {
    event: v1::WatchDomainResponse,
    #[serde(skip)]
    domain: String,
}

/// What stands above the events. Their widths are fixed: what is still to come
/// is not known.
pub(crate) fn watch_headers() -> String {
    let more = ["KIND", "PERM", "ID", "MEMORY", "OFFSET", "SESSION"];
    line("EVENT", "GENERATION", "RANGE", &more)
}

impl Watched {
    /// An event of this domain.
    pub(crate) fn new(event: v1::WatchDomainResponse, domain: &str) -> Watched {
        let domain = domain.to_owned();
        Watched { event, domain }
    }
}

impl View for Watched {
    fn text(&self, _style: &Style) -> String {
        match &self.event.event {
            None => String::new(),
            Some(Event::Snapshot(part)) => lines("=", part.generation, &part.mappings),
            Some(Event::Change(change)) => {
                let gone = change.removed.iter().map(|range| removed(change, range));
                let gone: String = gone.collect();
                gone + &lines("+", change.generation, &change.added)
            }
            Some(Event::Resync(resync)) => line(
                "resync",
                &resync.generation.to_string(),
                "changes were missed",
                &NO_CELLS,
            ),
            Some(Event::Status(status)) => said(status),
        }
    }

    /// Of what is there now.
    fn names(&self) -> Vec<String> {
        let mappings = match &self.event.event {
            Some(Event::Snapshot(part)) => &part.mappings[..],
            Some(Event::Change(change)) => &change.added[..],
            _ => &[],
        };
        let name = |mapping: &v1::Mapping| format!("{}/{}", self.domain, mapping.name());
        mappings.iter().map(name).collect()
    }

    fn render(&self, style: &Style) -> Result<String, Failure> {
        match style.format {
            Format::Table | Format::Wide => Ok(self.text(style)),
            Format::Json => json::line(self).map_err(|error| Failure::of(Exit::Error, &error)),
            Format::Yaml => yaml::render(self).map_err(|error| Failure::of(Exit::Error, &error)),
            Format::Name => Ok(name::render(&self.names())),
        }
    }
}

const NO_CELLS: [&str; 0] = [];

fn lines(event: &str, generation: u64, mappings: &[v1::Mapping]) -> String {
    let generation = generation.to_string();
    let one = |mapping: &v1::Mapping| line(event, &generation, &range(mapping), &cells(mapping));
    mappings.iter().map(one).collect()
}

fn removed(change: &v1::WatchChange, range: &IovaRange) -> String {
    let generation = change.generation.to_string();
    line("-", &generation, &hex(range.start, range.last), &NO_CELLS)
}

/// Columns for eyes and for awk, without blanks at the end.
fn line(event: &str, generation: &str, range: &str, more: &[impl AsRef<str>]) -> String {
    const WIDTHS: [usize; 6] = [9, 10, 8, 6, 12, 0];
    let mut text = format!("{event:6}   {generation:>10}   {range:29}");
    for (cell, width) in more.iter().zip(WIDTHS) {
        text.push_str(&format!("   {:width$}", cell.as_ref()));
    }
    text.truncate(text.trim_end().len());
    text + "\n"
}

fn range(mapping: &v1::Mapping) -> String {
    let last = mapping.iova.saturating_add(mapping.len_bytes.max(1) - 1);
    hex(mapping.iova, last)
}

fn cells(mapping: &v1::Mapping) -> [String; 6] {
    let (is_named, has_memory) = match mapping.kind() {
        v1::MappingKind::Direct => (false, true),
        v1::MappingKind::Streaming => (true, true),
        v1::MappingKind::Coherent | v1::MappingKind::Lease | v1::MappingKind::Unspecified => {
            (true, false)
        }
    };
    let or_none = |shown: bool, text: String| if shown { text } else { "-".to_owned() };
    [
        word(mapping.kind().as_str_name(), "MAPPING_KIND_"),
        word(mapping.perm().as_str_name(), "PERM_"),
        or_none(is_named, mapping.mapping_id.to_string()),
        or_none(has_memory, mapping.memory_id.to_string()),
        or_none(has_memory, format!("{:#x}", mapping.offset)),
        bare(&mapping.session).to_owned(),
    ]
}

/// The counts, and a line for each session that others may have to wait for.
fn said(status: &v1::WatchStatus) -> String {
    let usage = status.usage.unwrap_or_default();
    let counts = format!(
        "{} sessions, {} invalidating, {} quarantined ({}), {} fenced",
        usage.sessions,
        usage.invalidating_mappings,
        usage.quarantined_mappings,
        human(usage.quarantined_bytes),
        usage.fenced_sessions
    );
    let sessions = status.sessions.iter().map(session);
    line("status", "", &counts, &NO_CELLS) + &sessions.collect::<String>()
}

fn session(session: &v1::WatchSession) -> String {
    let fenced = if session.fenced { ", fenced" } else { "" };
    let text = format!(
        "session {}{fenced}: acknowledged {}, asked for {}, {} quarantined",
        bare(&session.name),
        session.acked_generation,
        session.asked_generation,
        session.quarantined_mappings
    );
    line("status", "", &text, &NO_CELLS)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mapping(kind: v1::MappingKind, iova: u64) -> v1::Mapping {
        v1::Mapping {
            kind: kind.into(),
            mapping_id: 9,
            iova,
            len_bytes: 4096,
            perm: v1::Perm::Read.into(),
            session: "sessions/7".to_owned(),
            memory_id: 1,
            offset: 512,
            state: v1::MappingState::Live.into(),
            ..v1::Mapping::default()
        }
    }

    fn watched(event: Event) -> Watched {
        Watched::new(v1::WatchDomainResponse { event: Some(event) }, "domains/d0")
    }

    fn rendered(event: Event, format: Format) -> String {
        let style = Style {
            format,
            headers: true,
            now_ms: 0,
        };
        watched(event).render(&style).unwrap()
    }

    fn snapshot() -> Event {
        Event::Snapshot(v1::WatchSnapshot {
            generation: 12,
            mappings: vec![
                mapping(v1::MappingKind::Streaming, 0x1000),
                mapping(v1::MappingKind::Coherent, 0x40_0000),
            ],
            more: false,
        })
    }

    fn change() -> Event {
        Event::Change(v1::WatchChange {
            generation: 13,
            added: vec![mapping(v1::MappingKind::Direct, 0xffff_ffff_f000)],
            removed: vec![IovaRange {
                start: 0x1000,
                last: 0x1fff,
            }],
        })
    }

    #[test]
    fn what_was_there_is_new_and_is_gone_stands_in_columns() {
        let text = watch_headers()
            + &rendered(snapshot(), Format::Table)
            + &rendered(change(), Format::Table);
        assert_eq!(
            text,
            "EVENT    GENERATION   RANGE                           KIND        PERM         ID         MEMORY   OFFSET         SESSION\n\
             =                12   0x1000-0x1fff                   streaming   read         9          1        0x200          7\n\
             =                12   0x400000-0x400fff               coherent    read         9          -        -              7\n\
             -                13   0x1000-0x1fff\n\
             +                13   0xfffffffff000-0xffffffffffff   direct      read         -          1        0x200          7\n"
        );
    }

    #[test]
    fn a_status_names_those_whom_others_wait_for() {
        let status = Event::Status(v1::WatchStatus {
            usage: Some(v1::DomainUsage {
                sessions: 2,
                invalidating_mappings: 1,
                quarantined_mappings: 3,
                quarantined_bytes: 8192,
                fenced_sessions: 1,
                ..v1::DomainUsage::default()
            }),
            sessions: vec![v1::WatchSession {
                name: "sessions/4".to_owned(),
                fenced: true,
                acked_generation: 5,
                asked_generation: 8,
                quarantined_mappings: 3,
            }],
        });
        assert_eq!(
            rendered(status, Format::Table),
            "status                2 sessions, 1 invalidating, 3 quarantined (8 KiB), 1 fenced\n\
             status                session 4, fenced: acknowledged 5, asked for 8, 3 quarantined\n"
        );
        let resync = Event::Resync(v1::WatchResync { generation: 99 });
        assert_eq!(
            rendered(resync, Format::Table),
            "resync           99   changes were missed\n"
        );
    }

    #[test]
    fn json_is_one_object_a_line_and_the_wire_message() {
        for event in [snapshot(), change()] {
            let text = rendered(event.clone(), Format::Json);
            assert_eq!(text.matches('\n').count(), 1, "{text}");
            let read: v1::WatchDomainResponse = serde_json::from_str(&text).unwrap();
            assert_eq!(read.event, Some(event));
        }
    }

    #[test]
    fn names_are_those_of_what_is_there_now() {
        let names = "domains/d0/mappings/9\ndomains/d0/mappings/9\n";
        assert_eq!(rendered(snapshot(), Format::Name), names);
        let name = "domains/d0/mappings/0xfffffffff000-0xffffffffffff\n";
        assert_eq!(rendered(change(), Format::Name), name);
    }
}
