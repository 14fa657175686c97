//! Refusals: what was asked wrongly must be said exactly.

use std::fmt::Debug;

use domaind_proto::v1::{ErrorReason, Refusal};
use tonic::{Code, Status};

/// What a call that may be refused returns.
pub type Refused<T> = Result<T, Refusal>;

/// What a status says, in the words of the table.
#[must_use]
pub fn of_status(status: &Status) -> Refusal {
    Refusal::from_status(status)
}

/// Takes a gRPC answer apart.
pub fn answer<T>(answer: Result<tonic::Response<T>, Status>) -> Refused<T> {
    match answer {
        Ok(response) => Ok(response.into_inner()),
        Err(status) => Err(of_status(&status)),
    }
}

/// The refusal, which must have this code and this reason.
///
/// # Panics
/// If it was no refusal, or another one.
#[track_caller]
pub fn refused<T: Debug>(answer: Refused<T>, code: Code, reason: ErrorReason) -> Refusal {
    match answer {
        Err(refusal) => {
            assert_eq!(
                (refusal.grpc_code(), refusal.reason()),
                (code, reason),
                "{refusal:?}"
            );
            assert!(!refusal.message.is_empty(), "a refusal says something");
            refusal
        }
        Ok(value) => panic!("expected {code:?} {reason:?}, got {value:?}"),
    }
}

/// The metadata hold these numbers, and the sentence holds them too.
///
/// # Panics
/// If one is missing.
#[track_caller]
pub fn assert_numbers(refusal: &Refusal, numbers: &[(&str, &str)]) {
    for (key, value) in numbers {
        assert_eq!(
            refusal.metadata.get(*key).map(String::as_str),
            Some(*value),
            "{key} in {refusal:?}"
        );
        assert!(
            refusal.message.contains(value),
            "{key} {value} in the sentence of {refusal:?}"
        );
    }
}
