//! Everything that there is to tell, in the words of those who scrape.

use std::fmt;
use std::sync::Arc;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{
    DescriptorEncoder, EncodeGaugeValue, EncodeLabelSet, MetricEncoder, NoLabelSet,
    prometheus_text, text,
};
use prometheus_client::metrics::MetricType;
use prometheus_client::registry::Registry as Families;
use tonic::Code;

use super::histogram::Snapshot;
use super::process::Process;
use super::{COUNTS, Counter, REASONS, methods};
use crate::registry::{Registry, Stock};
use crate::version::{VERSION, commit};

const SERVICE: &str = "domaind.v1.MappingService";
/// Operations on mappings, each with the methods that do it.
const OPERATIONS: [(&str, &[&str]); 12] = [
    ("map", &["Map"]),
    ("unmap", &["Unmap"]),
    ("sync", &["Sync"]),
    ("lease", &["Lease"]),
    ("release", &["Release"]),
    ("alloc_coherent", &["AllocCoherent"]),
    ("free_coherent", &["FreeCoherent"]),
    ("map_direct", &["MapDirect"]),
    ("unmap_direct", &["UnmapDirect"]),
    ("set_map", &["SetMap", "StreamSetMap"]),
    ("clear_map", &["ClearMap"]),
    ("reset_bounce", &["ResetBounce"]),
];

/// In which words.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Form {
    /// Prometheus' text format 0.0.4, which everybody reads.
    Prometheus,
    /// OpenMetrics 1.0, for who asks for it.
    OpenMetrics,
}

impl Form {
    /// What a scraper asked for.
    pub(crate) fn accepted(accept: &str) -> Form {
        match accept.contains("application/openmetrics-text") {
            true => Form::OpenMetrics,
            false => Form::Prometheus,
        }
    }

    pub(crate) fn content_type(self) -> &'static str {
        match self {
            Form::Prometheus => prometheus_text::CONTENT_TYPE,
            Form::OpenMetrics => "application/openmetrics-text; version=1.0.0; charset=utf-8",
        }
    }
}

/// Tells all.
#[derive(Debug)]
pub(crate) struct Exposition(Families);

impl Exposition {
    pub(crate) fn new(registry: Arc<Registry>) -> Exposition {
        let mut families = Families::default();
        families.register_collector(Box::new(Now(registry)));
        Exposition(families)
    }

    pub(crate) fn text(&self, form: Form) -> Result<String, fmt::Error> {
        let mut out = String::new();
        match form {
            Form::Prometheus => prometheus_text::encode(&mut out, &self.0)?,
            Form::OpenMetrics => text::encode(&mut out, &self.0)?,
        }
        Ok(out)
    }
}

/// Reads the tables when somebody asks.
#[derive(Debug)]
struct Now(Arc<Registry>);

impl Collector for Now {
    fn encode(&self, encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let mut out = Out(encoder);
        out.build()?;
        out.stock(&self.0.stock())?;
        out.counts()?;
        out.operations()?;
        out.calls()?;
        out.process(&Process::read())
    }
}

struct Out<'e>(DescriptorEncoder<'e>);

impl Out<'_> {
    fn family<'o>(
        &'o mut self,
        kind: MetricType,
        name: &'o str,
        help: &str,
    ) -> Result<MetricEncoder<'o>, fmt::Error> {
        self.0.encode_descriptor(name, help, None, kind)
    }

    fn gauge(&mut self, name: &str, help: &str, value: impl EncodeGaugeValue) -> fmt::Result {
        self.family(MetricType::Gauge, name, help)?
            .encode_gauge(&value)
    }

    fn gauges<const N: usize>(
        &mut self,
        name: &str,
        label: &str,
        help: &str,
        values: [(&str, u64); N],
    ) -> fmt::Result {
        let mut family = self.family(MetricType::Gauge, name, help)?;
        for (value, number) in values {
            family
                .encode_family(&[(label, value)])?
                .encode_gauge(&number)?;
        }
        Ok(())
    }

    fn counter(&mut self, name: &str, help: &str, counter: &Counter) -> fmt::Result {
        let mut family = self.family(MetricType::Counter, name, help)?;
        count(&mut family, counter.get())
    }

    fn build(&mut self) -> fmt::Result {
        let help = "The version of domaind, and the commit that it was built from.";
        let labels = [
            ("version", VERSION),
            ("commit", commit().unwrap_or("unknown")),
        ];
        self.family(MetricType::Info, "domaind_build", help)?
            .encode_info(&labels)
    }

    fn stock(&mut self, stock: &Stock) -> fmt::Result {
        let Stock {
            totals,
            drivers,
            devices,
            ghosts,
            regions,
        } = stock;
        let number = |number: usize| number as u64;
        self.gauge(
            "domaind_domains",
            "Domains that are there.",
            number(totals.domains),
        )?;
        self.gauges(
            "domaind_clients",
            "role",
            "Attached sessions.",
            [("driver", number(*drivers)), ("device", number(*devices))],
        )?;
        self.gauges(
            "domaind_regions",
            "kind",
            "Regions of memory of the domains that are there.",
            regions.map(|(kind, tally)| (kind, tally.count)),
        )?;
        self.gauges(
            "domaind_region_bytes",
            "kind",
            "Bytes of the regions of the domains that are there.",
            regions.map(|(kind, tally)| (kind, tally.bytes)),
        )?;
        self.gauge(
            "domaind_quota_bytes",
            "Bytes of regions that all domains together may have.",
            totals.region_budget_bytes,
        )?;
        self.gauge(
            "domaind_quota_used_bytes",
            "Bytes of it that are in use, also by domains that were deleted and are still held.",
            totals.region_bytes,
        )?;
        self.gauges(
            "domaind_mappings",
            "kind",
            "Mappings of all domains.",
            [
                ("streaming", number(totals.streaming)),
                ("coherent", number(totals.coherent)),
                ("direct", number(totals.direct)),
                ("lease", number(totals.leases.count)),
            ],
        )?;
        self.gauge(
            "domaind_lease_bytes",
            "Bytes that drivers have leased.",
            totals.leases.bytes,
        )?;
        self.gauge(
            "domaind_memories",
            "Memories that drivers have registered.",
            number(totals.memories),
        )?;
        self.gauge(
            "domaind_watchers",
            "Watches of domains.",
            number(totals.watchers),
        )?;
        self.gauge(
            "domaind_invalidating_mappings",
            "Mappings that were removed and that a session has not acknowledged yet.",
            number(totals.invalidating),
        )?;
        self.gauge(
            "domaind_ghosts",
            "Sessions that have ended and are not proven to be gone.",
            number(*ghosts),
        )?;
        self.gauge(
            "domaind_fenced_sessions",
            "Sessions that have ended and may still reach memory.",
            number(totals.fenced),
        )?;
        self.gauge(
            "domaind_quarantined_mappings",
            "Mappings that are not used again while such sessions may reach them.",
            number(totals.quarantined.mappings),
        )?;
        self.gauge(
            "domaind_quarantined_bytes",
            "Bytes of the apertures among them.",
            totals.quarantined.bytes,
        )
    }

    fn counts(&mut self) -> fmt::Result {
        let counts = &COUNTS;
        self.counter(
            "domaind_fds_passed",
            "File descriptors that were handed to clients.",
            &counts.fds_passed,
        )?;
        self.counters(
            "domaind_attach",
            "result",
            "Attempts to attach, by how they ended.",
            [
                ("granted", &counts.attached),
                ("refused", &counts.not_attached),
            ],
        )?;
        let help = "Requests and attempts to attach of somebody who may not, by why.";
        let denied = std::array::from_fn::<_, { REASONS.len() }, _>(|index| {
            (REASONS[index].0, &counts.denied[index])
        });
        self.counters("domaind_auth_denied", "reason", help, denied)?;
        self.counter(
            "domaind_rate_limited",
            "Connections that were closed because their user had no seat left.",
            &counts.seats_refused,
        )?;
        self.counters(
            "domaind_bounce_copied_bytes",
            "direction",
            "Bytes that the daemon copied between drivers' buffers and the bounce aperture.",
            [
                ("to_device", &counts.copied_to_device),
                ("from_device", &counts.copied_from_device),
            ],
        )
    }

    fn counters<const N: usize>(
        &mut self,
        name: &str,
        label: &str,
        help: &str,
        counters: [(&str, &Counter); N],
    ) -> fmt::Result {
        let mut family = self.family(MetricType::Counter, name, help)?;
        for (value, counter) in counters {
            count(&mut family.encode_family(&[(label, value)])?, counter.get())?;
        }
        Ok(())
    }

    fn operations(&mut self) -> fmt::Result {
        let all = OPERATIONS.map(|(op, methods)| (op, Operation::of(op, methods)));
        let help = "Calls and batches of pipelines that change mappings, by how they ended.";
        let mut family = self.family(MetricType::Counter, "domaind_map_operations", help)?;
        for (op, Operation { took, refused }) in &all {
            let done = took.count().saturating_sub(*refused);
            for (result, number) in [("ok", done), ("refused", *refused)] {
                let labels = [("op", *op), ("result", result)];
                count(&mut family.encode_family(&labels)?, number)?;
            }
        }
        let help = "How long they took, with all that they waited for.";
        let mut family =
            self.family(MetricType::Histogram, "domaind_map_duration_seconds", help)?;
        for (op, Operation { took, .. }) in &all {
            duration(&mut family, &[("op", *op)], took)?;
        }
        Ok(())
    }

    fn calls(&mut self) -> fmt::Result {
        let help = "Calls that were answered, by code; a stream counts when it begins.";
        let mut family = self.family(MetricType::Counter, "grpc_server_handled", help)?;
        for method in methods::all() {
            let is_told = |(code, number): &(Code, u64)| *code == Code::Ok || *number > 0;
            for (code, number) in method.by_code().filter(is_told) {
                let labels = [
                    ("grpc_service", method.service.as_str()),
                    ("grpc_method", method.name.as_str()),
                    ("grpc_code", name_of(code)),
                ];
                count(&mut family.encode_family(&labels)?, number)?;
            }
        }
        let help = "How long they took until they were answered; methods that were called.";
        let mut family =
            self.family(MetricType::Histogram, "grpc_server_handling_seconds", help)?;
        for method in methods::all() {
            let took = method.took.snapshot();
            if took.count() > 0 {
                let labels = [
                    ("grpc_service", method.service.as_str()),
                    ("grpc_method", method.name.as_str()),
                ];
                duration(&mut family, &labels, &took)?;
            }
        }
        Ok(())
    }

    fn process(&mut self, process: &Process) -> fmt::Result {
        if let Some(seconds) = process.cpu_seconds {
            let help = "Time that the process has spent on a CPU.";
            self.family(MetricType::Counter, "process_cpu_seconds", help)?
                .encode_counter::<NoLabelSet, _, f64>(&seconds, None)?;
        }
        let gauges = [
            (
                "process_resident_memory_bytes",
                "Resident memory.",
                process.resident_bytes,
            ),
            (
                "process_virtual_memory_bytes",
                "Virtual memory.",
                process.virtual_bytes,
            ),
            (
                "process_open_fds",
                "Open file descriptors.",
                Some(process.open_fds as u64),
            ),
            (
                "process_max_fds",
                "File descriptors that may be open.",
                process.max_fds,
            ),
            ("process_threads", "Threads.", Some(process.threads as u64)),
        ];
        for (name, help, value) in gauges {
            if let Some(value) = value {
                self.gauge(name, help, value)?;
            }
        }
        match process.start_seconds {
            Some(seconds) => self.gauge(
                "process_start_time_seconds",
                "When the process began, in seconds since 1970.",
                seconds,
            ),
            None => Ok(()),
        }
    }
}

/// An operation on mappings: unary calls, and batches of pipelines.
struct Operation {
    took: Snapshot,
    refused: u64,
}

impl Operation {
    fn of(op: &str, methods: &[&str]) -> Operation {
        let batches = match op {
            "map" => Some(&COUNTS.maps),
            "unmap" => Some(&COUNTS.unmaps),
            "sync" => Some(&COUNTS.syncs),
            _ => None,
        };
        let start = Operation {
            took: batches.map_or_else(Snapshot::default, |batches| batches.took.snapshot()),
            refused: batches.map_or(0, |batches| batches.refused.get()),
        };
        let calls = methods
            .iter()
            .filter_map(|name| methods::named(SERVICE, name));
        calls.fold(start, |sum, method| {
            let failed = method.by_code().filter(|(code, _)| *code != Code::Ok);
            Operation {
                took: sum.took.plus(&method.took.snapshot()),
                refused: sum.refused + failed.map(|(_, number)| number).sum::<u64>(),
            }
        })
    }
}

fn count(metric: &mut MetricEncoder<'_>, number: u64) -> fmt::Result {
    metric.encode_counter::<NoLabelSet, _, f64>(&number, None)
}

fn duration(
    family: &mut MetricEncoder<'_>,
    labels: &impl EncodeLabelSet,
    took: &Snapshot,
) -> fmt::Result {
    family
        .encode_family(labels)?
        .encode_histogram::<NoLabelSet>(took.sum_seconds(), took.count(), &took.buckets(), None)
}

/// As gRPC's own documents spell them.
fn name_of(code: Code) -> &'static str {
    match code {
        Code::Ok => "OK",
        Code::Cancelled => "CANCELLED",
        Code::Unknown => "UNKNOWN",
        Code::InvalidArgument => "INVALID_ARGUMENT",
        Code::DeadlineExceeded => "DEADLINE_EXCEEDED",
        Code::NotFound => "NOT_FOUND",
        Code::AlreadyExists => "ALREADY_EXISTS",
        Code::PermissionDenied => "PERMISSION_DENIED",
        Code::ResourceExhausted => "RESOURCE_EXHAUSTED",
        Code::FailedPrecondition => "FAILED_PRECONDITION",
        Code::Aborted => "ABORTED",
        Code::OutOfRange => "OUT_OF_RANGE",
        Code::Unimplemented => "UNIMPLEMENTED",
        Code::Internal => "INTERNAL",
        Code::Unavailable => "UNAVAILABLE",
        Code::DataLoss => "DATA_LOSS",
        Code::Unauthenticated => "UNAUTHENTICATED",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_operation_has_its_methods() {
        for (op, methods) in OPERATIONS {
            for name in methods {
                assert!(methods::named(SERVICE, name).is_some(), "{op}: {name}");
            }
        }
    }

    #[test]
    fn who_asks_for_openmetrics_gets_it_and_everybody_else_the_plain_form() {
        let prometheus = "application/openmetrics-text;version=1.0.0;q=0.5,text/plain;q=0.2";
        assert_eq!(Form::accepted(prometheus), Form::OpenMetrics);
        assert_eq!(Form::accepted("*/*"), Form::Prometheus);
        assert_eq!(Form::accepted(""), Form::Prometheus);
    }
}
