//! Domains as people see them.

use domain_core::addr::Iova;
use domain_core::limits::LEASE_BYTES_PER_SESSION;
use domaind_proto::v1;
use serde::Serialize;

use super::list::{Row, rows};
use super::{Sheet, Style, View, bare, leases, wire_range, word, yes_no};
use crate::range::hex;
use crate::time::{age, utc};
use domaind_proto::size::{exact, human};

/// Ranges in one cell of a table.
const RANGES_SHOWN: usize = 2;

impl Row for v1::Domain {
    const PLURAL: &'static str = "domains";

    fn headers(style: &Style) -> Vec<&'static str> {
        let mut headers = vec![
            "NAME", "BOUNCE", "COHERENT", "SESSIONS", "MAPPINGS", "DIRECT", "AGE",
        ];
        if style.wide() {
            headers.extend([
                "OWNER",
                "GRANULE",
                "BACKING",
                "SCRUB",
                "BOUNCE-RANGE",
                "COHERENT-RANGE",
                "MEMORIES",
                "GENERATION",
                "DIRECT-GENERATION",
                "TABLE",
                "RESERVED",
                "ALLOWED",
                "INVALIDATING",
                "QUARANTINED",
                "QUARANTINED-BYTES",
                "FENCED",
            ]);
        }
        headers
    }

    fn cells(&self, style: &Style) -> Vec<String> {
        let usage = self.usage.unwrap_or_default();
        let mut cells = vec![
            bare(&self.name).to_owned(),
            filled(usage.bounce_used_bytes, self.bounce_bytes),
            filled(usage.coherent_used_bytes, self.coherent_bytes),
            usage.sessions.to_string(),
            mappings(&usage).to_string(),
            usage.direct_mappings.to_string(),
            age(self.create_time_unix_ms, style.now_ms),
        ];
        if style.wide() {
            cells.extend([
                self.owner_uid.to_string(),
                human(self.granule_bytes),
                backing(self),
                scrub(self),
                wire_range(self.bounce.as_ref()),
                wire_range(self.coherent.as_ref()),
                usage.memories.to_string(),
                self.generation.to_string(),
                self.direct_generation.to_string(),
                human(usage.table_bytes),
                some_ranges(&self.reserved),
                some_ranges(&self.allowed),
                usage.invalidating_mappings.to_string(),
                usage.quarantined_mappings.to_string(),
                human(usage.quarantined_bytes),
                usage.fenced_sessions.to_string(),
            ]);
        }
        cells
    }

    fn name(&self) -> String {
        self.name.clone()
    }
}

/// All that is known of a domain, and who is attached to it. Serialises as the
/// domain alone.
#[derive(Debug, Serialize)]
#[serde(transparent)]
pub(crate) struct DomainSheet {
    domain: v1::Domain,
    #[serde(skip)]
    sessions: Vec<v1::Session>,
}

impl DomainSheet {
    pub(crate) fn new(domain: v1::Domain, sessions: Vec<v1::Session>) -> DomainSheet {
        DomainSheet { domain, sessions }
    }
}

impl View for DomainSheet {
    fn text(&self, style: &Style) -> String {
        let mut sheet = Sheet::default();
        identity(&mut sheet, &self.domain, style);
        apertures(&mut sheet, &self.domain);
        direct(&mut sheet, &self.domain);
        quotas(&mut sheet, &self.domain);
        held_back(&mut sheet, &self.domain.usage.unwrap_or_default());
        if self.sessions.is_empty() {
            sheet.value("Sessions", "none");
        } else {
            sheet.title("Sessions").block(&rows(&self.sessions, style));
        }
        sheet.render()
    }

    fn names(&self) -> Vec<String> {
        vec![self.domain.name.clone()]
    }
}

fn identity(sheet: &mut Sheet, domain: &v1::Domain, style: &Style) {
    let created = domain.create_time_unix_ms;
    sheet
        .value("Name", bare(&domain.name))
        .value("Uid", &domain.uid)
        .value("Owner", owner(domain))
        .value("Declared", yes_no(domain.declared))
        .value(
            "Created",
            format!("{} ({} ago)", utc(created), age(created, style.now_ms)),
        )
        .value("Iova limit", Iova::new(domain.iova_limit))
        .value("Granule", exact(domain.granule_bytes))
        .value("Backing", backing(domain))
        .value("Scrub", scrub(domain))
        .value("Generation", domain.generation);
}

fn owner(domain: &v1::Domain) -> String {
    let uid = domain.owner_uid;
    match domain.owner_pod_uid.as_str() {
        "" => format!("uid {uid}"),
        pod => format!("uid {uid} of pod {pod}"),
    }
}

fn apertures(sheet: &mut Sheet, domain: &v1::Domain) {
    let usage = domain.usage.unwrap_or_default();
    match &domain.bounce {
        None => sheet.value("Bounce", "none"),
        Some(_) => sheet
            .title("Bounce")
            .under("Range", wire_range(domain.bounce.as_ref()))
            .under("Size", exact(domain.bounce_bytes))
            .under("Used", exact(usage.bounce_used_bytes))
            .under("Leases", leases(usage.leases, usage.lease_bytes))
            .under("Largest hole", exact(usage.bounce_largest_hole_bytes))
            .under("Largest mapping", exact(domain.max_mapping_bytes)),
    };
    match &domain.coherent {
        None => sheet.value("Coherent", "none"),
        Some(_) => sheet
            .title("Coherent")
            .under("Range", wire_range(domain.coherent.as_ref()))
            .under("Size", exact(domain.coherent_bytes))
            .under("Used", exact(usage.coherent_used_bytes))
            .under("Largest hole", exact(usage.coherent_largest_hole_bytes)),
    };
}

fn direct(sheet: &mut Sheet, domain: &v1::Domain) {
    let usage = domain.usage.unwrap_or_default();
    sheet
        .title("Direct")
        .under("Mappings", usage.direct_mappings)
        .under("Generation", domain.direct_generation)
        .under("Page table", exact(usage.table_bytes));
    ranges(sheet, "Reserved", &domain.reserved, "nothing");
    ranges(sheet, "Allowed", &domain.allowed, "anywhere");
    ranges(sheet, "May lie in", &domain.direct_ranges, "nowhere");
}

/// One a line, under the key.
fn ranges(sheet: &mut Sheet, key: &str, ranges: &[v1::IovaRange], none: &str) {
    if ranges.is_empty() {
        sheet.under(key, none);
    }
    for (place, range) in ranges.iter().enumerate() {
        // Further ranges stand under the first.
        match place {
            0 => sheet.under(key, said(range)),
            _ => sheet.more(said(range)),
        };
    }
}

fn quotas(sheet: &mut Sheet, domain: &v1::Domain) {
    let usage = domain.usage.unwrap_or_default();
    let quotas = domain.quotas.unwrap_or_default();
    let (streaming, coherent) = (usage.streaming_mappings, usage.coherent_allocations);
    let leases = usage.leases;
    sheet
        .title("Quotas")
        .under(
            "Sessions",
            format!("{} of {}", usage.sessions, quotas.sessions),
        )
        .under(
            "Mappings",
            format!(
                "{} of {} ({streaming} streaming, {coherent} coherent, {leases} leases)",
                mappings(&usage),
                quotas.mappings
            ),
        )
        .under(
            "Memories",
            format!("{} of {}", usage.memories, quotas.memories),
        )
        .under(
            "Direct mappings",
            format!("{} of {}", usage.direct_mappings, quotas.direct),
        )
        .under("Leases each", format!("{} a session", quotas.leases))
        .under("Leased bytes", lease_bytes(quotas.lease_bytes));
}

/// What was removed and cannot be used again yet.
fn held_back(sheet: &mut Sheet, usage: &v1::DomainUsage) {
    sheet
        .title("Held back")
        .under("Invalidating", usage.invalidating_mappings)
        .under("Quarantined", usage.quarantined_mappings)
        .under("In apertures", exact(usage.quarantined_bytes))
        .under("Fenced sessions", usage.fenced_sessions);
}

/// What the quota on mappings counts.
fn mappings(usage: &v1::DomainUsage) -> u64 {
    usage.streaming_mappings + usage.coherent_allocations + usage.leases
}

fn lease_bytes(most: u64) -> String {
    match most {
        LEASE_BYTES_PER_SESSION => "no bound but the aperture".to_owned(),
        most => format!("{} a session", exact(most)),
    }
}

/// `4 KiB/64 MiB`, or `none` for an aperture that is not there.
fn filled(used_bytes: u64, bytes: u64) -> String {
    match bytes {
        0 => "none".to_owned(),
        _ => format!("{}/{}", human(used_bytes), human(bytes)),
    }
}

fn backing(domain: &v1::Domain) -> String {
    word(domain.backing().as_str_name(), "BACKING_")
}

fn scrub(domain: &v1::Domain) -> String {
    word(domain.scrub().as_str_name(), "SCRUB_")
}

/// For a cell of a table: a few, and how many more there are.
fn some_ranges(ranges: &[v1::IovaRange]) -> String {
    let shown: Vec<_> = ranges.iter().take(RANGES_SHOWN).map(said).collect();
    match ranges.len() - shown.len() {
        0 if shown.is_empty() => "-".to_owned(),
        0 => shown.join(","),
        more => format!("{} and {more} more", shown.join(",")),
    }
}

fn said(range: &v1::IovaRange) -> String {
    hex(range.start, range.last)
}

#[cfg(test)]
mod tests {
    use super::super::{List, One};
    use super::*;
    use crate::cli::Format;

    const NOW_MS: u64 = 1_767_225_600_000;

    fn wire(start: u64, last: u64) -> v1::IovaRange {
        v1::IovaRange { start, last }
    }

    fn domain() -> v1::Domain {
        v1::Domain {
            name: "domains/d0".to_owned(),
            uid: "8c5f".to_owned(),
            owner_uid: 1000,
            create_time_unix_ms: NOW_MS - 300_000,
            bounce_bytes: 64 << 20,
            bounce: Some(v1::IovaRange {
                start: 0,
                last: 0x3ff_ffff,
            }),
            iova_limit: (1 << 48) - 1,
            granule_bytes: 4096,
            backing: v1::Backing::Memfd.into(),
            scrub: v1::Scrub::OnMap.into(),
            quotas: Some(v1::Quotas {
                sessions: 512,
                mappings: 65536,
                memories: 1024,
                direct: 131_072,
                leases: 1024,
                lease_bytes: u64::MAX,
            }),
            usage: Some(v1::DomainUsage {
                sessions: 1,
                streaming_mappings: 3,
                bounce_used_bytes: 12288,
                bounce_largest_hole_bytes: (64 << 20) - 16384,
                direct_mappings: 2,
                table_bytes: 16384,
                quarantined_mappings: 2,
                quarantined_bytes: 8192,
                fenced_sessions: 1,
                ..v1::DomainUsage::default()
            }),
            max_mapping_bytes: (64 << 20) - 16384,
            generation: 7,
            direct_generation: 5,
            reserved: vec![wire(0, 0xfff), wire(0x1000_0000, 0x1fff_ffff)],
            direct_ranges: vec![wire(0x400_0000, 0xfff_ffff)],
            ..v1::Domain::default()
        }
    }

    fn style(format: Format) -> Style {
        Style {
            format,
            headers: true,
            now_ms: NOW_MS,
        }
    }

    #[test]
    fn a_domain_is_a_line_of_a_table() {
        let text = List::of(vec![domain()]).text(&style(Format::Table));
        assert_eq!(
            text,
            "NAME   BOUNCE          COHERENT   SESSIONS   MAPPINGS   DIRECT   AGE\n\
             d0     12 KiB/64 MiB   none       1          3          2        5m\n"
        );
    }

    #[test]
    fn every_column_has_a_header() {
        for format in [Format::Table, Format::Wide] {
            let style = style(format);
            let headers = <v1::Domain as Row>::headers(&style);
            assert_eq!(headers.len(), domain().cells(&style).len());
        }
    }

    #[test]
    fn a_description_shows_exact_numbers() {
        let text = DomainSheet::new(domain(), Vec::new()).text(&style(Format::Table));
        for line in [
            "Name:               d0\n",
            "Created:            2025-12-31T23:55:00Z (5m ago)\n",
            "Iova limit:         0xffffffffffff\n",
            "Bounce:\n  Range:            0x0-0x3ffffff\n  Size:             64 MiB (67108864 bytes)\n",
            "  Used:             12 KiB (12288 bytes)\n",
            "Coherent:           none\n",
            "  Mappings:         3 of 65536 (3 streaming, 0 coherent, 0 leases)\n",
            "  Leases each:      1024 a session\n",
            "  Leased bytes:     no bound but the aperture\n",
            "  Leases:           0\n",
            "  Direct mappings:  2 of 131072\n",
            "  Page table:       16 KiB (16384 bytes)\n",
            "  Reserved:         0x0-0xfff\n                    0x10000000-0x1fffffff\n",
            "  Allowed:          anywhere\n",
            "  May lie in:       0x4000000-0xfffffff\n",
            "Held back:\n  Invalidating:     0\n  Quarantined:      2\n",
            "  In apertures:     8 KiB (8192 bytes)\n  Fenced sessions:  1\n",
            "Sessions:           none\n",
        ] {
            assert!(text.contains(line), "{line:?} in\n{text}");
        }
    }

    /// Scripts depend on every byte of this.
    #[test]
    fn json_is_canonical_proto3_and_stable() {
        let text = One::of(domain()).render(&style(Format::Json)).unwrap();
        assert_eq!(text, include_str!("domain.golden.json"));
    }

    #[test]
    fn an_empty_list_is_a_list_in_json_and_a_remark_for_people() {
        let none = List::<v1::Domain>::of(Vec::new());
        let json = none.render(&style(Format::Json)).unwrap();
        assert_eq!(json, "{\n  \"domains\": []\n}\n");
        assert_eq!(none.nothing().unwrap(), "No domains found.");
    }

    #[test]
    fn a_cell_shows_a_few_ranges_and_counts_the_others() {
        let many = vec![wire(0, 1); RANGES_SHOWN + 3];
        assert_eq!(some_ranges(&many), "0x0-0x1,0x0-0x1 and 3 more");
        assert_eq!(some_ranges(&many[..1]), "0x0-0x1");
        assert_eq!(some_ranges(&[]), "-");
    }

    #[test]
    fn names_are_resource_names() {
        let list = List::of(vec![domain()]);
        let text = list.render(&style(Format::Name)).unwrap();
        assert_eq!(text, "domains/d0\n");
    }
}
