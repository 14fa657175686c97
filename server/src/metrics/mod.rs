//! What the daemon counts, and how it is told to whoever scrapes.
//!
//! Counters belong to the process, as `process_*` do: they are reached from
//! everywhere without being handed through everything, and cost one or two
//! relaxed additions where something happens. There is one daemon in a process
//! that is scraped; two that are embedded would share them. Everything else is
//! read from the tables when somebody asks.
//!
//! No label is ever taken from what a client said: all that there can be are
//! known when this is compiled. So nobody can make them grow, and there is none
//! for domains, whose names are their owners'.

mod exposition;
mod histogram;
mod methods;
mod process;

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use domain_core::streaming::{MapSpec, SyncSpec, SyncTarget};
use domaind_proto::v1::{ErrorReason, PipelineOperation, Refusal};
use tonic::Code;

pub(crate) use self::exposition::{Exposition, Form};
use self::histogram::Histogram;
pub(crate) use self::methods::Call;

/// Everything that this process counts.
pub(crate) static COUNTS: Counts = Counts::new();

/// A number that only grows.
#[derive(Debug)]
pub(crate) struct Counter(AtomicU64);

/// Batches of one operation on pipelines.
#[derive(Debug)]
pub(crate) struct Batches {
    /// How long each took, from when it was read until its answer.
    took: Histogram,
    refused: Counter,
}

/// See [`COUNTS`].
#[derive(Debug)]
pub(crate) struct Counts {
    pub(crate) attached: Counter,
    pub(crate) not_attached: Counter,
    pub(crate) fds_passed: Counter,
    pub(crate) seats_refused: Counter,
    pub(crate) copied_to_device: Counter,
    pub(crate) copied_from_device: Counter,
    denied: [Counter; REASONS.len()],
    maps: Batches,
    unmaps: Batches,
    syncs: Batches,
}

/// For what somebody is denied something, and what stands for all others.
const REASONS: [(&str, Option<ErrorReason>); 11] = [
    ("unattested", Some(ErrorReason::Unattested)),
    ("not_allowed", Some(ErrorReason::NotAllowed)),
    ("not_yours", Some(ErrorReason::NotYours)),
    ("admin_only", Some(ErrorReason::AdminOnly)),
    ("wrong_peer", Some(ErrorReason::WrongPeer)),
    ("no_session", Some(ErrorReason::NoSession)),
    ("no_such_session", Some(ErrorReason::NoSuchSession)),
    ("unenforceable", Some(ErrorReason::Unenforceable)),
    ("read_only", Some(ErrorReason::ReadOnly)),
    ("wrong_role", Some(ErrorReason::WrongRole)),
    ("other", None),
];

impl Counter {
    const fn new() -> Counter {
        Counter(AtomicU64::new(0))
    }

    pub(crate) fn add(&self, more: u64) {
        self.0.fetch_add(more, Ordering::Relaxed);
    }

    pub(crate) fn count(&self) {
        self.add(1);
    }

    fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

impl Batches {
    const fn new() -> Batches {
        Batches {
            took: Histogram::new(),
            refused: Counter::new(),
        }
    }
}

impl Counts {
    const fn new() -> Counts {
        Counts {
            attached: Counter::new(),
            not_attached: Counter::new(),
            fds_passed: Counter::new(),
            seats_refused: Counter::new(),
            copied_to_device: Counter::new(),
            copied_from_device: Counter::new(),
            denied: [const { Counter::new() }; REASONS.len()],
            maps: Batches::new(),
            unmaps: Batches::new(),
            syncs: Batches::new(),
        }
    }

    /// Counts a refusal, if it says that somebody may not, or is not who he says.
    pub(crate) fn denied(&self, refusal: &Refusal) {
        let reason = refusal.reason();
        let known = REASONS.iter().position(|(_, known)| *known == Some(reason));
        match (known, refusal.grpc_code()) {
            (Some(index), _) => self.denied[index].count(),
            (None, Code::PermissionDenied) => self.denied[REASONS.len() - 1].count(),
            (None, _) => {}
        }
    }

    /// Counts a batch of a pipeline.
    pub(crate) fn batch(&self, operation: i32, took: Duration, is_done: bool) {
        let Some(batches) = self.batches(operation) else {
            return;
        };
        batches.took.observe(took);
        if !is_done {
            batches.refused.count();
        }
    }

    fn batches(&self, operation: i32) -> Option<&Batches> {
        match PipelineOperation::try_from(operation) {
            Ok(PipelineOperation::Map) => Some(&self.maps),
            Ok(PipelineOperation::Unmap) => Some(&self.unmaps),
            Ok(PipelineOperation::Sync) => Some(&self.syncs),
            Ok(PipelineOperation::Unspecified) | Err(_) => None,
        }
    }
}

/// Adds up the bytes of a batch, and counts them once, when it is dropped.
#[derive(Debug, Default)]
struct Copied {
    to_device: u64,
    from_device: u64,
}

// Methods, so that closures take the whole of it and not a copy of one field.
impl Copied {
    fn to_device(&mut self, bytes: u64) {
        self.to_device += bytes;
    }

    fn from_device(&mut self, bytes: u64) {
        self.from_device += bytes;
    }
}

impl Drop for Copied {
    fn drop(&mut self) {
        let sums = [
            (self.to_device, &COUNTS.copied_to_device),
            (self.from_device, &COUNTS.copied_from_device),
        ];
        for (bytes, counter) in sums {
            if bytes > 0 {
                counter.add(bytes);
            }
        }
    }
}

/// Counts what maps have copied in, while somebody reads their results.
pub(crate) fn mapping<T, E>(
    specs: &[MapSpec],
    results: impl Iterator<Item = Result<T, E>>,
) -> impl Iterator<Item = Result<T, E>> {
    let mut copied = Copied::default();
    results.zip(specs).map(move |(result, spec)| {
        if result.is_ok() && spec.copies_in() {
            copied.to_device(spec.len_bytes);
        }
        result
    })
}

/// Counts what unmaps have copied back: their results say how much.
pub(crate) fn unmapping<E>(
    results: impl Iterator<Item = Result<u64, E>>,
) -> impl Iterator<Item = Result<u64, E>> {
    let mut copied = Copied::default();
    results.inspect(move |result| {
        if let Ok(bytes) = result {
            copied.from_device(*bytes);
        }
    })
}

/// Counts what syncs have copied.
pub(crate) fn syncing<E>(
    specs: &[SyncSpec],
    results: impl Iterator<Item = Result<(), E>>,
) -> impl Iterator<Item = Result<(), E>> {
    let mut copied = Copied::default();
    results.zip(specs).map(move |(result, spec)| {
        match (&result, spec.target) {
            (Ok(()), SyncTarget::ForDevice) => copied.to_device(spec.len_bytes),
            (Ok(()), SyncTarget::ForCpu) => copied.from_device(spec.len_bytes),
            (Err(_), _) => {}
        }
        result
    })
}
