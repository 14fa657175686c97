//! Calls by method. Which there are is known from the descriptors, so a path
//! that somebody made up is one more of "unknown".

use std::sync::LazyLock;
use std::time::Instant;

use domaind_proto::Message;
use http::{HeaderMap, Response};
use prost_types::FileDescriptorSet;
use tonic::Code;

use super::Counter;
use super::histogram::Histogram;

const CODES: usize = 17;

/// Calls of one method.
#[derive(Debug)]
pub(super) struct Method {
    /// `/package.Service/Method`.
    path: String,
    pub(super) service: String,
    pub(super) name: String,
    /// How long each took until it was answered; of a stream, until it began.
    pub(super) took: Histogram,
    /// By code, those that were fine left out: they are the rest.
    failed: [Counter; CODES],
}

/// All that are served behind any door, by path.
static METHODS: LazyLock<Vec<Method>> = LazyLock::new(known);
static UNKNOWN: LazyLock<Method> = LazyLock::new(|| Method::new("unknown", "unknown"));

/// A call until it is answered; one that is dropped before was given up.
#[derive(Debug)]
pub(crate) struct Call {
    method: &'static Method,
    begun: Instant,
    code: Code,
}

impl Method {
    fn new(service: &str, name: &str) -> Method {
        Method {
            path: format!("/{service}/{name}"),
            service: service.to_owned(),
            name: name.to_owned(),
            took: Histogram::new(),
            failed: [const { Counter::new() }; CODES],
        }
    }

    /// How many of them ended with each code.
    pub(super) fn by_code(&self) -> impl Iterator<Item = (Code, u64)> + '_ {
        let all = self.took.snapshot().count();
        let failed = self.failed.iter().map(Counter::get).sum::<u64>();
        // Counted one after the other: in between there may seem to be more.
        let fine = all.saturating_sub(failed);
        let failed = (0..).zip(&self.failed).skip(1);
        let failed = failed.map(|(code, count)| (Code::from_i32(code), count.get()));
        std::iter::once((Code::Ok, fine)).chain(failed)
    }
}

/// Every method, and what is none.
pub(super) fn all() -> impl Iterator<Item = &'static Method> {
    METHODS.iter().chain([&*UNKNOWN])
}

/// The method of one of our services.
pub(super) fn named(service: &str, name: &str) -> Option<&'static Method> {
    all().find(|method| method.service == service && method.name == name)
}

impl Call {
    /// A call that begins.
    pub(crate) fn begin(path: &str) -> Call {
        let found = METHODS.binary_search_by(|method| method.path.as_str().cmp(path));
        Call {
            method: found.map_or(&UNKNOWN, |index| &METHODS[index]),
            begun: Instant::now(),
            code: Code::Cancelled,
        }
    }

    /// What was answered to it.
    pub(crate) fn answered<B>(&mut self, response: &Response<B>) {
        self.code = code(response.headers());
    }
}

impl Drop for Call {
    fn drop(&mut self) {
        self.method.took.observe(self.begun.elapsed());
        if self.code != Code::Ok {
            self.method.failed[self.code as usize].count();
        }
    }
}

/// A call that failed has its status in the headers; one that went well has it
/// behind its answer.
fn code(headers: &HeaderMap) -> Code {
    let status = headers.get("grpc-status");
    status.map_or(Code::Ok, |status| Code::from_bytes(status.as_bytes()))
}

fn known() -> Vec<Method> {
    let sets = [
        domaind_proto::DESCRIPTORS,
        tonic_health::pb::FILE_DESCRIPTOR_SET,
        tonic_reflection::pb::v1::FILE_DESCRIPTOR_SET,
        tonic_reflection::pb::v1alpha::FILE_DESCRIPTOR_SET,
    ];
    let mut methods: Vec<_> = sets.into_iter().flat_map(methods_of).collect();
    methods.sort_by(|one, other| one.path.cmp(&other.path));
    methods.dedup_by(|one, other| one.path == other.path);
    methods
}

fn methods_of(set: &[u8]) -> Vec<Method> {
    let set = FileDescriptorSet::decode(set).expect("the descriptors were made at build time");
    let files = set.file.iter().flat_map(|file| {
        let services = file.service.iter();
        services.flat_map(move |service| {
            let name = format!("{}.{}", file.package(), service.name());
            let methods = service.method.iter();
            methods.map(move |method| Method::new(&name, method.name()))
        })
    });
    files.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_method_is_known_by_its_path_and_what_is_made_up_is_unknown() {
        for path in [
            "/domaind.v1.MappingService/Map",
            "/domaind.v1.AdminService/GetInfo",
            "/grpc.health.v1.Health/Check",
            "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
            "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
        ] {
            assert_eq!(Call::begin(path).method.path, path);
        }
        for path in ["/", "", "/domaind.v1.MappingService/Map/", "/a.B/C"] {
            assert_eq!(Call::begin(path).method.path, "/unknown/unknown");
        }
    }

    #[test]
    fn a_call_counts_once_with_its_code_and_as_cancelled_if_it_was_given_up() {
        let path = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo";
        let mut refused = Response::new(());
        let status = http::HeaderValue::from_static("7");
        refused.headers_mut().insert("grpc-status", status);
        Call::begin(path).answered(&refused);
        Call::begin(path).answered(&Response::new(()));
        Call::begin(path).answered(&Response::new(()));
        drop(Call::begin(path));
        let method = Call::begin(path).method;
        // That last one was given up, too.
        let counted: Vec<_> = method.by_code().filter(|(_, count)| *count > 0).collect();
        let expected = [
            (Code::Ok, 2),
            (Code::Cancelled, 2),
            (Code::PermissionDenied, 1),
        ];
        assert_eq!(counted, expected);
    }
}
