//! What of a domain its owner may choose and change: quotas, scrubbing,
//! reserved and allowed ranges.

use domain_core::domain::{Scrub, Settings};
use domain_core::limits::{
    DIRECT_PER_DOMAIN_MOST, LEASES_PER_SESSION_MOST, MAPPINGS_PER_DOMAIN_MOST,
    MEMORIES_PER_DOMAIN_MOST, Quotas, SESSIONS_PER_DOMAIN_MOST,
};
use domain_core::space::Restrictions;

use super::Malformed;
use super::direct::ranges;
use crate::v1::{self, Refusal};

/// The settings of a new domain.
///
/// # Errors
/// A refusal for a quota above its ceiling, a policy that does not exist, and
/// ranges that cannot stand in one list.
pub fn settings(spec: &v1::DomainSpec) -> Result<Settings, Refusal> {
    let reserved = ranges("reserved", &spec.reserved)?;
    let allowed = ranges("allowed", &spec.allowed)?;
    Ok(Settings {
        quotas: quotas(spec.quotas.as_ref(), Quotas::default())?,
        scrub: scrub(spec.scrub)?.unwrap_or_default(),
        restrictions: Restrictions::new(reserved, allowed)?,
    })
}

/// The settings in force, changed as asked; what is unset stays.
///
/// # Errors
/// As [`settings`].
pub fn change(asked: &v1::UpdateDomainRequest, in_force: Settings) -> Result<Settings, Refusal> {
    let list = |field, asked: &Option<v1::IovaRangeList>, in_force: &[_]| match asked {
        Some(list) => ranges(field, &list.ranges),
        None => Ok(in_force.to_vec()),
    };
    let there = &in_force.restrictions;
    let reserved = list("reserved", &asked.reserved, there.reserved())?;
    let allowed = list("allowed", &asked.allowed, there.allowed())?;
    Ok(Settings {
        quotas: quotas(asked.quotas.as_ref(), in_force.quotas)?,
        scrub: scrub(asked.scrub)?.unwrap_or(in_force.scrub),
        restrictions: Restrictions::new(reserved, allowed)?,
    })
}

/// The asked limits; what is unset or zero stays as in `base`.
fn quotas(asked: Option<&v1::Quotas>, base: Quotas) -> Result<Quotas, Malformed> {
    let Some(asked) = asked else {
        return Ok(base);
    };
    let pick = |quota, asked: u32, base: u32, most: u32| match asked {
        0 => Ok(base),
        asked if asked <= most => Ok(asked),
        asked => Err(Malformed::Quota { quota, asked, most }),
    };
    let v1::Quotas {
        sessions,
        mappings,
        memories,
        direct,
        leases,
        lease_bytes,
    } = *asked;
    Ok(Quotas {
        sessions: pick(
            "sessions",
            sessions,
            base.sessions,
            SESSIONS_PER_DOMAIN_MOST,
        )?,
        mappings: pick(
            "mappings",
            mappings,
            base.mappings,
            MAPPINGS_PER_DOMAIN_MOST,
        )?,
        memories: pick(
            "memories",
            memories,
            base.memories,
            MEMORIES_PER_DOMAIN_MOST,
        )?,
        direct: pick("direct", direct, base.direct, DIRECT_PER_DOMAIN_MOST)?,
        leases: pick("leases", leases, base.leases, LEASES_PER_SESSION_MOST)?,
        lease_bytes: match lease_bytes {
            0 => base.lease_bytes,
            asked => asked,
        },
    })
}

/// The asked scrubbing policy; `None` if unspecified.
fn scrub(asked: i32) -> Result<Option<Scrub>, Malformed> {
    match v1::Scrub::try_from(asked) {
        Ok(v1::Scrub::Unspecified) => Ok(None),
        Ok(v1::Scrub::OnMap) => Ok(Some(Scrub::OnMap)),
        Ok(v1::Scrub::OnUnmap) => Ok(Some(Scrub::OnUnmap)),
        Err(_) => Err(Malformed::UnknownValue {
            field: "scrub",
            value: asked,
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::v1::ErrorReason;

    fn list(ranges: &[(u64, u64)]) -> Vec<v1::IovaRange> {
        let wire = |&(start, last): &(u64, u64)| v1::IovaRange { start, last };
        ranges.iter().map(wire).collect()
    }

    #[test]
    fn an_unset_spec_is_the_documented_default() {
        let spec = v1::DomainSpec::default();
        assert_eq!(settings(&spec), Ok(Settings::default()));
        assert!(scrub(9).is_err());
    }

    #[test]
    fn a_quota_has_a_ceiling() {
        let most = v1::Quotas {
            sessions: SESSIONS_PER_DOMAIN_MOST,
            mappings: MAPPINGS_PER_DOMAIN_MOST,
            memories: MEMORIES_PER_DOMAIN_MOST,
            direct: DIRECT_PER_DOMAIN_MOST,
            leases: LEASES_PER_SESSION_MOST,
            lease_bytes: 1,
        };
        assert!(quotas(Some(&most), Quotas::default()).is_ok());
        let memories = MEMORIES_PER_DOMAIN_MOST + 1;
        let asked = v1::Quotas { memories, ..most };
        let refused = quotas(Some(&asked), Quotas::default()).unwrap_err();
        assert!(
            matches!(refused, Malformed::Quota { quota: "memories", asked, .. } if asked == memories)
        );
        let direct = DIRECT_PER_DOMAIN_MOST + 1;
        let asked = v1::Quotas { direct, ..most };
        assert!(quotas(Some(&asked), Quotas::default()).is_err());
        let leases = LEASES_PER_SESSION_MOST + 1;
        let asked = v1::Quotas { leases, ..most };
        assert!(quotas(Some(&asked), Quotas::default()).is_err());
    }

    #[test]
    fn a_zero_quota_leaves_the_one_in_force() {
        let base = Quotas {
            sessions: 5,
            mappings: 6,
            memories: 7,
            direct: 8,
            leases: 9,
            lease_bytes: 10,
        };
        let asked = v1::Quotas {
            mappings: 9,
            ..v1::Quotas::default()
        };
        let expected = Quotas {
            mappings: 9,
            ..base
        };
        assert_eq!(quotas(Some(&asked), base), Ok(expected));
        assert_eq!(quotas(None, base), Ok(base));
    }

    #[test]
    fn a_list_that_is_set_replaces_and_one_that_is_unset_leaves() {
        let spec = v1::DomainSpec {
            reserved: list(&[(0, 0), (4096, 8191)]),
            allowed: list(&[(8192, 65_535)]),
            ..v1::DomainSpec::default()
        };
        let in_force = settings(&spec).unwrap();
        let nothing = v1::UpdateDomainRequest::default();
        assert_eq!(change(&nothing, in_force.clone()), Ok(in_force.clone()));
        let lifted = v1::UpdateDomainRequest {
            allowed: Some(v1::IovaRangeList::default()),
            ..nothing
        };
        let lifted = change(&lifted, in_force.clone()).unwrap();
        assert_eq!(lifted.restrictions.allowed(), []);
        assert_eq!(
            lifted.restrictions.reserved(),
            in_force.restrictions.reserved()
        );
    }

    #[test]
    fn ranges_that_cannot_stand_in_one_list_are_refused() {
        let spec = |reserved: &[_], allowed: &[_]| v1::DomainSpec {
            reserved: list(reserved),
            allowed: list(allowed),
            ..v1::DomainSpec::default()
        };
        let backwards = settings(&spec(&[(0, 1)], &[(0, 9), (12, 11)])).unwrap_err();
        assert_eq!(backwards.reason(), ErrorReason::InvalidRange);
        assert_eq!(backwards.metadata["field"], "allowed");
        assert_eq!(backwards.metadata["entry_index"], "1");
        let single = settings(&spec(&[], &[(5, 5)])).unwrap_err();
        assert_eq!(single.reason(), ErrorReason::InvalidRange);
        let overlapping = settings(&spec(&[(0, 5), (5, 6)], &[])).unwrap_err();
        assert_eq!(overlapping.reason(), ErrorReason::OverlappingEntries);
    }
}
