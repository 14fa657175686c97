//! A direct table as it stands in a file: the canonical proto3 JSON of a
//! SetMapRequest, or the same as YAML, and what people write instead of it.

use std::fmt;
use std::io::{self, Read};
use std::path::Path;

use clap::ValueEnum;
use domain_core::addr::{Iova, IovaRange};
use domain_core::direct::DirectMapping;
use domain_core::memory::MemoryId;
use domaind_proto::names::DomainId;
use serde::de::{Deserialize, Deserializer, Error, MapAccess, SeqAccess, Visitor};

use crate::cli::Perm;
use domaind_proto::size;

/// A table, and what else a SetMapRequest may say.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct TableFile {
    /// In which domain.
    pub(crate) domain: Option<DomainId>,
    /// Only if the direct table has not changed since.
    pub(crate) expected_generation: Option<u64>,
    /// One effect for the same id.
    pub(crate) request_id: String,
    /// The table.
    pub(crate) entries: Vec<DirectMapping>,
}

/// Why a file is not a table. The daemon was not asked. The parsers say which
/// entry, counted from 0, and where in the file.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TableError {
    #[error("read {path}")]
    Read {
        path: String,
        #[source]
        cause: io::Error,
    },
    #[error("{path}: {cause}")]
    Json {
        path: String,
        cause: serde_json::Error,
    },
    #[error("{path}: {what}")]
    Yaml { path: String, what: String },
}

/// What a file holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Language {
    Json,
    Yaml,
}

impl TableFile {
    /// Reads a file, or standard input for `-`.
    ///
    /// # Errors
    /// [`TableError`].
    pub(crate) fn read(path: &Path) -> Result<TableFile, TableError> {
        let (name, text) = match path.as_os_str().as_encoded_bytes() {
            b"-" => ("standard input".to_owned(), io::read_to_string(io::stdin())),
            _ => (path.display().to_string(), read_file(path)),
        };
        match text {
            Ok(text) => TableFile::parse(&text, language(path, &text), name),
            Err(cause) => Err(TableError::Read { path: name, cause }),
        }
    }

    fn parse(text: &str, language: Language, path: String) -> Result<TableFile, TableError> {
        match language {
            Language::Json => {
                serde_json::from_str(text).map_err(|cause| TableError::Json { path, cause })
            }
            Language::Yaml => {
                serde_saphyr::from_str_with_options(text, yaml_options()).map_err(|error| {
                    let what = innermost(&error.to_string()).to_owned();
                    TableError::Yaml { path, what }
                })
            }
        }
    }
}

/// Every level that an error passes adds its own place; only the first helps.
fn innermost(message: &str) -> &str {
    let (mut placed, mut rest) = (message, message);
    while let Some(shorter) = without_place(rest) {
        (placed, rest) = (rest, shorter);
    }
    placed
}

/// What stands before ` at line 3, column 1`.
fn without_place(message: &str) -> Option<&str> {
    let (before, column) = message.rsplit_once(", column ")?;
    let (before, line) = before.rsplit_once(" at line ")?;
    let numeric = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit());
    (numeric(line) && numeric(column)).then_some(before)
}

fn read_file(path: &Path) -> io::Result<String> {
    let mut text = String::new();
    std::fs::File::open(path)?.read_to_string(&mut text)?;
    Ok(text)
}

/// The name says it, else the first character.
fn language(path: &Path, text: &str) -> Language {
    let extension = path.extension().and_then(|extension| extension.to_str());
    match extension.map(str::to_ascii_lowercase).as_deref() {
        Some("json") => Language::Json,
        Some("yaml" | "yml") => Language::Yaml,
        _ if text.trim_start().starts_with(['{', '[']) => Language::Json,
        _ => Language::Yaml,
    }
}

/// Without the default ceilings on length, which a table of 10^5 entries is
/// above; those on depth and on aliases stay.
fn yaml_options() -> serde_saphyr::Options {
    serde_saphyr::options! {
        budget: serde_saphyr::budget! {
            max_reader_input_bytes: None,
            max_events: usize::MAX,
            max_nodes: usize::MAX,
            max_total_scalar_bytes: usize::MAX,
            max_total_comment_bytes: usize::MAX,
        },
        // Refused by what reads the keys, which knows the entry.
        duplicate_keys: serde_saphyr::DuplicateKeyPolicy::PassThrough,
        with_snippet: false,
    }
}

impl<'de> Deserialize<'de> for TableFile {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<TableFile, D::Error> {
        deserializer.deserialize_any(TableVisitor)
    }
}

struct TableVisitor;

impl<'de> Visitor<'de> for TableVisitor {
    type Value = TableFile;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object with \"entries\"")
    }

    fn visit_map<M: MapAccess<'de>>(self, mut map: M) -> Result<TableFile, M::Error> {
        let mut domain: Option<String> = None;
        let mut expected_generation = None;
        let mut request_id = None;
        let mut entries: Option<Entries> = None;
        while let Some(key) = map.next_key::<String>()? {
            match key.as_str() {
                "entries" => {
                    not_twice(&entries, &key)?;
                    entries = map.next_value()?;
                }
                "domain" => fill(&mut domain, &key, &mut map)?,
                "expectedGeneration" | "expected_generation" => {
                    fill(&mut expected_generation, &key, &mut map)?;
                }
                "requestId" | "request_id" => fill(&mut request_id, &key, &mut map)?,
                _ => {
                    return Err(unknown(
                        &key,
                        "domain, entries, expectedGeneration, requestId",
                    ));
                }
            }
        }
        // proto3 JSON would read nothing as an empty table, which clears all.
        let entries = entries.ok_or_else(|| {
            M::Error::custom("there is no \"entries\"; a table that shall be empty has []")
        })?;
        let domain = domain.filter(|name| !name.is_empty());
        let domain = domain.map(|name| DomainId::parse_lenient(&name));
        Ok(TableFile {
            domain: domain.transpose().map_err(M::Error::custom)?,
            expected_generation: expected_generation.map(|Plain(number)| number),
            request_id: request_id.unwrap_or_default(),
            entries: entries.0,
        })
    }
}

/// The value behind a key, which may be null (unset), but not given twice.
fn fill<'de, T: Deserialize<'de>, M: MapAccess<'de>>(
    slot: &mut Option<T>,
    key: &str,
    map: &mut M,
) -> Result<(), M::Error> {
    not_twice(slot, key)?;
    let value = map.next_value::<Option<T>>();
    *slot = value.map_err(|error| M::Error::custom(format_args!("{key}: {error}")))?;
    Ok(())
}

fn not_twice<T, E: Error>(slot: &Option<T>, key: &str) -> Result<(), E> {
    match slot {
        None => Ok(()),
        Some(_) => Err(E::custom(format_args!("{key:?} is given twice"))),
    }
}

fn unknown<E: Error>(key: &str, known: &str) -> E {
    E::custom(format_args!("unknown key {key:?}; there are {known}"))
}

/// Entries, of which a wrong one is named by its place.
struct Entries(Vec<DirectMapping>);

impl<'de> Deserialize<'de> for Entries {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Entries, D::Error> {
        deserializer.deserialize_seq(EntriesVisitor)
    }
}

struct EntriesVisitor;

impl<'de> Visitor<'de> for EntriesVisitor {
    type Value = Entries;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a list of entries")
    }

    fn visit_seq<S: SeqAccess<'de>>(self, mut seq: S) -> Result<Entries, S::Error> {
        let mut entries = Vec::new();
        loop {
            let entry = seq.next_element::<Entry>().map_err(|error| {
                S::Error::custom(format_args!("entry {}: {error}", entries.len()))
            })?;
            match entry {
                Some(Entry(mapping)) => entries.push(mapping),
                None => return Ok(Entries(entries)),
            }
        }
    }
}

struct Entry(DirectMapping);

impl<'de> Deserialize<'de> for Entry {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Entry, D::Error> {
        deserializer.deserialize_any(EntryVisitor)
    }
}

struct EntryVisitor;

impl<'de> Visitor<'de> for EntryVisitor {
    type Value = Entry;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object with range (or iova and length), memoryId, offset, perm")
    }

    fn visit_map<M: MapAccess<'de>>(self, mut map: M) -> Result<Entry, M::Error> {
        let mut fields = Fields::default();
        while let Some(key) = map.next_key::<String>()? {
            match key.as_str() {
                "range" => fill(&mut fields.range, &key, &mut map)?,
                "iova" => fill(&mut fields.iova, &key, &mut map)?,
                "length" | "lenBytes" | "len_bytes" => fill(&mut fields.length, &key, &mut map)?,
                "memoryId" | "memory_id" => fill(&mut fields.memory, &key, &mut map)?,
                "offset" => fill(&mut fields.offset, &key, &mut map)?,
                "perm" => fill(&mut fields.perm, &key, &mut map)?,
                _ => {
                    return Err(unknown(
                        &key,
                        "range (or iova and length), memoryId, offset, perm",
                    ));
                }
            }
        }
        fields.entry().map(Entry).map_err(M::Error::custom)
    }
}

/// What an entry said.
#[derive(Default)]
struct Fields {
    range: Option<WireRange>,
    iova: Option<Bytes>,
    length: Option<Bytes>,
    memory: Option<Plain>,
    offset: Option<Bytes>,
    perm: Option<PermWord>,
}

impl Fields {
    fn entry(self) -> Result<DirectMapping, String> {
        let range = self.place()?;
        let Plain(memory) = self.memory.ok_or("memoryId is missing")?;
        // proto3 JSON leaves zeros out.
        let Bytes(offset) = self.offset.unwrap_or(Bytes(0));
        let PermWord(perm) = self.perm.ok_or("perm is missing")?;
        Ok(DirectMapping {
            range,
            memory: MemoryId::new(memory),
            offset,
            perm: perm.into(),
        })
    }

    fn place(&self) -> Result<IovaRange, String> {
        let range = match (&self.range, &self.iova, &self.length) {
            (Some(WireRange { start, last }), None, None) => {
                IovaRange::new(Iova::new(*start), Iova::new(*last))
            }
            (None, Some(Bytes(iova)), Some(Bytes(length))) => {
                IovaRange::from_len(Iova::new(*iova), *length)
            }
            (Some(_), ..) => return Err("range and iova with length exclude each other".into()),
            _ => return Err("range (or iova and length) is missing".into()),
        };
        range.map_err(|error| error.to_string())
    }
}

struct WireRange {
    start: u64,
    last: u64,
}

impl<'de> Deserialize<'de> for WireRange {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<WireRange, D::Error> {
        deserializer.deserialize_any(RangeVisitor)
    }
}

struct RangeVisitor;

impl<'de> Visitor<'de> for RangeVisitor {
    type Value = WireRange;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object with start and last")
    }

    fn visit_map<M: MapAccess<'de>>(self, mut map: M) -> Result<WireRange, M::Error> {
        let (mut start, mut last) = (None, None);
        while let Some(key) = map.next_key::<String>()? {
            match key.as_str() {
                "start" => fill(&mut start, &key, &mut map)?,
                "last" => fill(&mut last, &key, &mut map)?,
                _ => return Err(unknown(&key, "start, last")),
            }
        }
        // proto3 JSON leaves zeros out; a last address of 0 is no table's.
        let Bytes(start) = start.unwrap_or(Bytes(0));
        let Bytes(last) = last.ok_or_else(|| M::Error::custom("last is missing"))?;
        Ok(WireRange { start, last })
    }
}

/// Bytes or an address, or a text that is one: `4096`, `"4096"`, `"0x1000"`,
/// `"4KiB"`.
struct Bytes(u64);

/// A number that counts no bytes, or a text that is one: `1`, `"1"`.
struct Plain(u64);

impl<'de> Deserialize<'de> for Bytes {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Bytes, D::Error> {
        let visitor = NumberVisitor {
            forms: "4096, \"4096\", \"0x1000\" or \"4KiB\"",
            read: |text| size::parse(text).map_err(|error| error.to_string()),
        };
        deserializer.deserialize_any(visitor).map(Bytes)
    }
}

impl<'de> Deserialize<'de> for Plain {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Plain, D::Error> {
        let visitor = NumberVisitor {
            forms: "1 or \"1\"",
            read: plain,
        };
        deserializer.deserialize_any(visitor).map(Plain)
    }
}

/// `parse` alone would take a sign.
fn plain(text: &str) -> Result<u64, String> {
    let number = text.parse().ok();
    let digits = text.bytes().all(|byte| byte.is_ascii_digit());
    let number = number.filter(|_| digits);
    number.ok_or_else(|| "not a plain number from 0 to 2^64-1, without a unit".to_owned())
}

struct NumberVisitor {
    /// How it may be written.
    forms: &'static str,
    /// Reads a text.
    read: fn(&str) -> Result<u64, String>,
}

impl Visitor<'_> for NumberVisitor {
    type Value = u64;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "a number from 0 to 2^64-1, as {}", self.forms)
    }

    fn visit_u64<E: Error>(self, number: u64) -> Result<u64, E> {
        Ok(number)
    }

    fn visit_i64<E: Error>(self, number: i64) -> Result<u64, E> {
        let unexpected = |_| E::invalid_value(serde::de::Unexpected::Signed(number), &self);
        u64::try_from(number).map_err(unexpected)
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<u64, E> {
        (self.read)(text).map_err(|error| E::custom(format_args!("{text:?}: {error}")))
    }
}

/// `PERM_READ_WRITE`, `3`, `rw`, `read-write` and the like.
struct PermWord(Perm);

impl<'de> Deserialize<'de> for PermWord {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<PermWord, D::Error> {
        deserializer.deserialize_any(PermVisitor)
    }
}

struct PermVisitor;

impl Visitor<'_> for PermVisitor {
    type Value = PermWord;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("r, w or rw")
    }

    fn visit_u64<E: Error>(self, number: u64) -> Result<PermWord, E> {
        match number {
            1 => Ok(PermWord(Perm::Read)),
            2 => Ok(PermWord(Perm::Write)),
            3 => Ok(PermWord(Perm::ReadWrite)),
            _ => Err(E::invalid_value(
                serde::de::Unexpected::Unsigned(number),
                &self,
            )),
        }
    }

    fn visit_i64<E: Error>(self, number: i64) -> Result<PermWord, E> {
        self.visit_u64(u64::try_from(number).unwrap_or(0))
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<PermWord, E> {
        let word = text.strip_prefix("PERM_").unwrap_or(text);
        Perm::from_str(word, true).map(PermWord).map_err(|_| {
            E::custom(format_args!(
                "{text:?} is no permission; there are r, w and rw (PERM_READ, PERM_WRITE, PERM_READ_WRITE)"
            ))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use domain_core::perm;

    const PAGE: u64 = 4096;

    fn json(text: &str) -> Result<TableFile, TableError> {
        TableFile::parse(text, Language::Json, "t.json".to_owned())
    }

    fn yaml(text: &str) -> Result<TableFile, TableError> {
        TableFile::parse(text, Language::Yaml, "t.yaml".to_owned())
    }

    fn entry(number: u64) -> DirectMapping {
        DirectMapping {
            range: IovaRange::from_len(Iova::new(0x10_0000 + number * 2 * PAGE), PAGE).unwrap(),
            memory: MemoryId::new(1),
            offset: number * PAGE,
            perm: perm::Perm::ReadWrite,
        }
    }

    /// As the daemon's own JSON has it.
    fn canonical(mapping: &DirectMapping) -> String {
        serde_json::to_string(&domaind_proto::v1::DirectMapping::from(mapping)).unwrap()
    }

    fn table_of(entries: &[String]) -> String {
        format!("{{\"entries\": [{}]}}", entries.join(",\n"))
    }

    #[test]
    fn canonical_json_of_a_request_is_read() {
        let request = domaind_proto::v1::SetMapRequest {
            domain: "domains/d0".to_owned(),
            entries: (0..3).map(|number| (&entry(number)).into()).collect(),
            expected_generation: Some(7),
            request_id: "once".to_owned(),
        };
        let expected = TableFile {
            domain: DomainId::new("d0").ok(),
            expected_generation: Some(7),
            request_id: "once".to_owned(),
            entries: (0..3).map(entry).collect(),
        };
        let text = serde_json::to_string_pretty(&request).unwrap();
        assert_eq!(json(&text).unwrap(), expected);
        // JSON is YAML.
        assert_eq!(yaml(&text).unwrap(), expected);
        let text = serde_saphyr::to_string(&request).unwrap();
        assert_eq!(yaml(&text).unwrap(), expected);
    }

    #[test]
    fn what_people_write_means_the_same() {
        let expected = [entry(0)];
        for one in [
            r#"{"range":{"start":"0x100000","last":"0x100fff"},"memoryId":1,"offset":0,"perm":"rw"}"#,
            r#"{"range":{"start":1048576,"last":1052671},"memory_id":"1","perm":"PERM_READ_WRITE"}"#,
            r#"{"iova":"1MiB","length":"4KiB","memoryId":"1","offset":null,"perm":3}"#,
            r#"{"iova":1048576,"len_bytes":4096,"memoryId":1,"perm":"READ-WRITE"}"#,
        ] {
            let text = table_of(&[one.to_owned()]);
            assert_eq!(json(&text).unwrap().entries, expected, "{one}");
            assert_eq!(yaml(&text).unwrap().entries, expected, "{one}");
        }
        let text = "\
# a table
domain: d0
entries:
- range: {start: 0x100000, last: 0x100fff}
  memoryId: 1
  offset: 0
  perm: rw
";
        assert_eq!(yaml(text).unwrap().entries, expected);
    }

    #[test]
    fn the_third_entry_broken_in_every_way_is_named() {
        let good = canonical(&entry(0));
        let with = |from: &str, to: &str| {
            assert!(good.contains(from), "{good}");
            good.replace(from, to)
        };
        let broken = [
            (
                with("PERM_READ_WRITE", "PERM_EXECUTE"),
                "\"PERM_EXECUTE\" is no permission",
            ),
            (with("\"PERM_READ_WRITE\"", "4"), "r, w or rw"),
            (with("\"PERM_READ_WRITE\"", "0"), "r, w or rw"),
            (with("PERM_READ_WRITE", "PERM_UNSPECIFIED"), "no permission"),
            (
                with("\"perm\":\"PERM_READ_WRITE\"", "\"perm\":null"),
                "perm is missing",
            ),
            (with("\"1052671\"", "\"0xfffff\""), "below its start"),
            (with(",\"last\":\"1052671\"", ""), "last is missing"),
            (with("\"memoryId\":\"1\",", ""), "memoryId is missing"),
            (with("\"memoryId\":\"1\"", "\"memoryId\":-1"), "memoryId"),
            (with("\"memoryId\":\"1\"", "\"memoryId\":1.5"), "memoryId"),
            (with("\"memoryId\":\"1\"", "\"memoryId\":[]"), "memoryId"),
            (
                with("\"memoryId\":\"1\"", "\"memoryId\":\"one\""),
                "\"one\"",
            ),
            (
                with("\"memoryId\":\"1\"", "\"memoryId\":\"1KiB\""),
                "memoryId: \"1KiB\": not a plain number",
            ),
            (
                with("\"memoryId\":\"1\"", "\"memoryId\":\"+1\""),
                "not a plain number",
            ),
            (with("memoryId", "memory"), "unknown key \"memory\""),
            (with("\"start\"", "\"begin\""), "unknown key \"begin\""),
            (
                with("\"offset\":", "\"memoryId\":1,\"offset\":"),
                "given twice",
            ),
            (
                with("\"offset\":", "\"iova\":1,\"offset\":"),
                "exclude each other",
            ),
            ("{}".to_owned(), "range (or iova and length) is missing"),
            (
                r#"{"iova":1,"memoryId":1,"perm":"r"}"#.to_owned(),
                "missing",
            ),
            (
                r#"{"iova":1,"length":0,"memoryId":1,"perm":"r"}"#.to_owned(),
                "zero bytes",
            ),
            (
                r#"{"iova":1,"length":"16EiB"}"#.to_owned(),
                "larger than 2^64-1",
            ),
            ("7".to_owned(), "an object"),
            ("null".to_owned(), "an object"),
        ];
        for (third, what) in broken {
            let entries = [good.clone(), good.clone(), third.clone(), good.clone()];
            let text = table_of(&entries);
            for refused in [json(&text), yaml(&text)] {
                let refused = refused.expect_err(&third).to_string();
                assert!(refused.contains(": entry 2: "), "{third}: {refused}");
                assert!(refused.contains(what), "{third}: {refused}");
                assert_eq!(refused.matches(" at line ").count(), 1, "{refused}");
                assert!(refused.contains("line 3"), "{third}: {refused}");
                assert_eq!(refused.lines().count(), 1, "{refused}");
            }
        }
    }

    #[test]
    fn what_is_no_table_is_refused() {
        for (text, what) in [
            ("", "t.json"),
            ("{\"entries\": [", "line 1"),
            ("[]", "entries"),
            ("{}", "there is no \"entries\""),
            ("{\"entries\": null}", "there is no \"entries\""),
            ("{\"entries\": {}}", "a list of entries"),
            ("{\"entires\": []}", "unknown key \"entires\""),
            ("{\"entries\": [], \"entries\": []}", "given twice"),
            ("{\"entries\": [], \"domain\": \"D0\"}", "not a domain id"),
            (
                "{\"entries\": [], \"expectedGeneration\": \"1KiB\"}",
                "not a plain number",
            ),
            ("{\"entries\": []} x", "line 1"),
        ] {
            let refused = json(text).expect_err(text).to_string();
            assert!(refused.contains(what), "{text}: {refused}");
        }
        for text in [
            "",
            "entries",
            "- a",
            "{entries: [",
            "entries: []\nentries: []",
        ] {
            assert!(yaml(text).is_err(), "{text}");
        }
        assert_eq!(json("{\"entries\": []}").unwrap(), TableFile::default());
        assert_eq!(yaml("entries: []").unwrap(), TableFile::default());
    }

    #[test]
    fn a_table_of_1e5_entries_is_read() {
        let expected: Vec<_> = (0..100_000).map(entry).collect();
        let entries: Vec<_> = expected.iter().map(canonical).collect();
        let text = table_of(&entries);
        assert_eq!(json(&text).unwrap().entries, expected);
        assert_eq!(yaml(&text).unwrap().entries, expected);
    }

    #[test]
    fn the_language_is_in_the_name_or_in_the_first_character() {
        let of = |name: &str, text: &str| language(Path::new(name), text);
        assert_eq!(of("t.json", "entries:"), Language::Json);
        assert_eq!(of("t.YAML", "{}"), Language::Yaml);
        assert_eq!(of("t.yml", "{}"), Language::Yaml);
        assert_eq!(of("-", " \n{}"), Language::Json);
        assert_eq!(of("-", "entries:"), Language::Yaml);
    }
}
