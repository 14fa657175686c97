//! `[[domains]]`, as written and as checked.

use std::collections::BTreeSet;

use domain_core::limits::DOMAINS;
use domaind_proto::names::{DomainId, NameError};
use domaind_proto::range::{self, NotARange};
use domaind_proto::v1;
use serde::Deserialize;

use super::sizes::Size;
use crate::declared::Declared;
use crate::registry::Plan;

/// A domain as written. What is not written is as it is without it in
/// CreateDomain.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct DomainTable {
    name: Option<String>,
    bounce_bytes: Option<Size>,
    coherent_bytes: Option<Size>,
    iova_limit: Option<Size>,
    aperture_base: Option<Size>,
    granule_bytes: Option<Size>,
    backing: Option<BackingWord>,
    scrub: Option<ScrubWord>,
    reserved: Vec<String>,
    allowed: Vec<String>,
    quotas: QuotaTable,
    owner_uid: Option<u32>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct QuotaTable {
    sessions: Option<u32>,
    mappings: Option<u32>,
    memories: Option<u32>,
    direct: Option<u32>,
    leases: Option<u32>,
    lease_bytes: Option<Size>,
}

// As on domainctl's command line.
#[derive(Clone, Copy, Debug, Deserialize)]
enum BackingWord {
    #[serde(rename = "memfd")]
    Memfd,
    #[serde(rename = "hugetlb-2m")]
    Hugetlb2m,
}

#[derive(Clone, Copy, Debug, Deserialize)]
enum ScrubWord {
    #[serde(rename = "on-map")]
    OnMap,
    #[serde(rename = "on-unmap")]
    OnUnmap,
}

/// Why the domains are not what domains can be.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs)] // the messages are the docs
pub enum DomainError {
    #[error("domains: domain {number} of the file has no name")]
    NoName { number: usize },
    #[error("domains: domain {number} of the file")]
    BadName {
        number: usize,
        #[source]
        cause: NameError,
    },
    #[error("domains: two domains are named {name:?}")]
    SameName { name: String },
    #[error("domains: the file has {found} domains, a node may have {DOMAINS}")]
    TooMany { found: usize },
    #[error("domains: domain {name:?} has in {key} {value:?}")]
    Range {
        name: String,
        key: &'static str,
        value: String,
        #[source]
        cause: NotARange,
    },
    #[error("domains: domain {name:?}: {message}")]
    Plan { name: String, message: String },
}

/// All domains, or what is wrong with the first that is.
pub(super) fn check(tables: Vec<DomainTable>) -> Result<Vec<Declared>, DomainError> {
    let found = tables.len();
    if found > DOMAINS as usize {
        return Err(DomainError::TooMany { found });
    }
    let mut names = BTreeSet::new();
    let mut domains = Vec::with_capacity(found);
    for (table, number) in tables.into_iter().zip(1..) {
        let domain = table.check(number)?;
        let name = domain.plan.id.to_string();
        if !names.insert(name.clone()) {
            return Err(DomainError::SameName { name });
        }
        domains.push(domain);
    }
    Ok(domains)
}

impl DomainTable {
    fn check(self, number: usize) -> Result<Declared, DomainError> {
        let name = self.name.clone().ok_or(DomainError::NoName { number })?;
        let id = DomainId::new(&name).map_err(|cause| DomainError::BadName { number, cause })?;
        let spec = self.spec(&name)?;
        let plan = Plan::new(id, &spec).map_err(|refusal| DomainError::Plan {
            name,
            message: refusal.message,
        })?;
        Ok(Declared {
            plan,
            owner_uid: self.owner_uid,
        })
    }

    fn spec(&self, name: &str) -> Result<v1::DomainSpec, DomainError> {
        let bytes = |size: Option<Size>| size.map(|size| size.0);
        let backing = self.backing.map(|word| match word {
            BackingWord::Memfd => v1::Backing::Memfd,
            BackingWord::Hugetlb2m => v1::Backing::Hugetlb2m,
        });
        let scrub = self.scrub.map(|word| match word {
            ScrubWord::OnMap => v1::Scrub::OnMap,
            ScrubWord::OnUnmap => v1::Scrub::OnUnmap,
        });
        Ok(v1::DomainSpec {
            bounce_bytes: bytes(self.bounce_bytes),
            coherent_bytes: bytes(self.coherent_bytes),
            iova_limit: bytes(self.iova_limit),
            aperture_base: bytes(self.aperture_base).unwrap_or(0),
            granule_bytes: bytes(self.granule_bytes).unwrap_or(0),
            backing: backing.unwrap_or_default().into(),
            scrub: scrub.unwrap_or_default().into(),
            quotas: Some((&self.quotas).into()),
            reserved: ranges(name, "reserved", &self.reserved)?,
            allowed: ranges(name, "allowed", &self.allowed)?,
        })
    }
}

impl From<&QuotaTable> for v1::Quotas {
    fn from(table: &QuotaTable) -> v1::Quotas {
        v1::Quotas {
            sessions: table.sessions.unwrap_or(0),
            mappings: table.mappings.unwrap_or(0),
            memories: table.memories.unwrap_or(0),
            direct: table.direct.unwrap_or(0),
            leases: table.leases.unwrap_or(0),
            lease_bytes: table.lease_bytes.map_or(0, |size| size.0),
        }
    }
}

fn ranges(
    name: &str,
    key: &'static str,
    texts: &[String],
) -> Result<Vec<v1::IovaRange>, DomainError> {
    let read = |text: &String| {
        let range = range::parse(text).map_err(|cause| DomainError::Range {
            name: name.to_owned(),
            key,
            value: text.clone(),
            cause,
        });
        range.map(v1::IovaRange::from)
    };
    texts.iter().map(read).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use domain_core::layout::ApertureKind;
    use domaind_proto::refusal::sentence;

    fn parse(text: &str) -> Result<Vec<Declared>, DomainError> {
        #[derive(Deserialize)]
        struct Domains {
            domains: Vec<DomainTable>,
        }
        let Domains { domains } = toml::from_str(text).unwrap();
        check(domains)
    }

    #[test]
    fn what_is_not_written_is_as_create_domain_has_it() {
        let [domain] = &parse("[[domains]]\nname = 'd'").unwrap()[..] else {
            panic!("one");
        };
        let id = DomainId::new("d").unwrap();
        let created = Plan::new(id, &v1::DomainSpec::default()).unwrap();
        assert_eq!(domain.plan.layout, created.layout);
        assert_eq!(domain.plan.settings, created.settings);
        assert_eq!(domain.owner_uid, None);
    }

    #[test]
    fn everything_that_create_domain_has_can_be_written() {
        let text = "[[domains]]\nname = 'd'\nbounce_bytes = '8MiB'\ncoherent_bytes = 0\n\
            iova_limit = '0xffffffff'\naperture_base = '1MiB'\ngranule_bytes = '64KiB'\n\
            backing = 'memfd'\nscrub = 'on-unmap'\nreserved = ['0x10000000-0x1000ffff']\n\
            allowed = ['0x20000000+1MiB']\nowner_uid = 1000\n\
            [domains.quotas]\nsessions = 4\nmappings = 5\nmemories = 6\ndirect = 7\n\
            leases = 8\nlease_bytes = '1MiB'";
        let domain = parse(text).unwrap().remove(0);
        let Plan {
            layout, settings, ..
        } = &domain.plan;
        let bounce = layout.aperture(ApertureKind::Bounce).unwrap();
        assert_eq!(bounce.start().get(), 1 << 20);
        assert_eq!(bounce.len_bytes(), Some(8 << 20));
        assert!(layout.aperture(ApertureKind::Coherent).is_none());
        assert_eq!(layout.granule().bytes(), 64 << 10);
        assert_eq!(settings.quotas.sessions, 4);
        assert_eq!(settings.quotas.lease_bytes, 1 << 20);
        assert_eq!(settings.restrictions.reserved().len(), 1);
        assert_eq!(settings.restrictions.allowed().len(), 1);
        assert_eq!(domain.owner_uid, Some(1000));
    }

    #[test]
    fn what_is_wrong_with_a_domain_is_said_with_its_name_and_the_value() {
        for (text, says) in [
            ("bounce_bytes = 1", "domain 1 of the file has no name"),
            ("name = 'D'", "domain 1 of the file: "),
            (
                "name = 'd'\n[[domains]]\nname = 'd'",
                "two domains are named \"d\"",
            ),
            (
                "name = 'd'\nreserved = ['x']",
                "domain \"d\" has in reserved \"x\": not a range",
            ),
            ("name = 'd'\ngranule_bytes = 5", "domain \"d\": "),
            ("name = 'd'\nbounce_bytes = '4KiB'", "domain \"d\": "),
            ("name = 'd'\nreserved = ['0x0-0xfff']", "domain \"d\": "),
        ] {
            let error = parse(&format!("[[domains]]\n{text}")).unwrap_err();
            let told = sentence(&error);
            assert!(told.contains(says), "{text}: {told}");
        }
        let many: String = (0..=DOMAINS)
            .map(|number| format!("[[domains]]\nname = 'd{number}'\n"))
            .collect();
        assert!(matches!(parse(&many), Err(DomainError::TooMany { .. })));
    }
}
