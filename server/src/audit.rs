//! The one place where it is written down who was let in and who was not.
//!
//! One line at INFO for each decision, with the target `domaind::audit`, and
//! one more in the metrics.

use domaind_proto::names::DomainId;
use domaind_proto::v1::Refusal;

use crate::metrics::COUNTS;
use crate::peer::Peer;
use crate::policy::{Wish, access_word, role_word};

/// What somebody wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Event {
    /// A session.
    Attach,
    /// A new domain.
    Create,
    /// Anything else.
    Call,
}

/// What was decided about one peer.
#[derive(Clone, Debug)]
pub(crate) struct Decision<'a> {
    pub(crate) event: Event,
    pub(crate) peer: &'a Peer,
    pub(crate) domain: Option<&'a DomainId>,
    pub(crate) wish: Option<Wish>,
    pub(crate) outcome: Outcome<'a>,
}

/// How it was decided.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Outcome<'a> {
    Granted {
        /// By which rule.
        rule: &'a str,
        session: u64,
    },
    Denied(&'a Refusal),
}

impl Event {
    pub(crate) fn word(self) -> &'static str {
        match self {
            Event::Attach => "attach",
            Event::Create => "create",
            Event::Call => "call",
        }
    }
}

/// Counts a decision and writes it down.
pub(crate) fn record(decision: &Decision<'_>) {
    let Decision {
        event,
        peer,
        domain,
        wish,
        outcome,
    } = decision;
    match (event, outcome) {
        (Event::Attach, Outcome::Granted { .. }) => COUNTS.attached.count(),
        (Event::Attach, Outcome::Denied(_)) => COUNTS.not_attached.count(),
        (Event::Create | Event::Call, _) => {}
    }
    if let Outcome::Denied(refusal) = outcome {
        COUNTS.denied(refusal);
    }
    let event = event.word();
    let (result, reason, rule, session) = match outcome {
        Outcome::Granted { rule, session } => ("granted", None, Some(*rule), Some(*session)),
        Outcome::Denied(refusal) => ("denied", Some(reason(refusal)), None, None),
    };
    // Those that nearly fit.
    let rule = rule.or_else(|| match outcome {
        Outcome::Denied(refusal) => refusal.metadata.get("rules").map(String::as_str),
        Outcome::Granted { .. } => None,
    });
    tracing::info!(
        target: "domaind::audit",
        event,
        result,
        reason,
        rule = rule.filter(|rule| !rule.is_empty()),
        pid = peer.pid(),
        uid = peer.uid(),
        gid = peer.gid(),
        pod_uid = peer.pod().map(tracing::field::display),
        container_id = peer.container(),
        unit = peer.unit(),
        domain = domain.map(|domain| domain.as_str()),
        role = wish.map(|wish| role_word(wish.role)),
        access = wish.map(|wish| access_word(wish.access)),
        session,
        "{event} {result}"
    );
}

/// As it travels in `google.rpc.ErrorInfo`.
pub(crate) fn reason(refusal: &Refusal) -> &'static str {
    let name = refusal.reason().as_str_name();
    name.strip_prefix("ERROR_REASON_").unwrap_or(name)
}
