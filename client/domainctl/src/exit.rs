//! How a command ends: the exit codes, and the one table that leads to them.

use std::process::ExitCode;

use tonic::Code;

/// What the shell learns. The numbers are documented and never change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Exit {
    /// Done. A reader that closed the pipe early counts as done, too.
    Ok = 0,
    /// Whatever has no number of its own.
    Error = 1,
    /// The command line makes no sense, or leaves out which of several domains
    /// it means: that takes a look at the daemon, but nothing was changed.
    Usage = 2,
    /// No such domain, session or mapping.
    NotFound = 3,
    /// The caller may not.
    Denied = 4,
    /// No daemon, or none that answers in time.
    Unavailable = 5,
    /// It is there already, or in a state that does not allow this.
    Conflict = 6,
    /// A quota, an aperture or the memory is used up.
    Quota = 7,
}

/// Listed in `--help`.
pub(crate) const EXIT_CODES: &str = "\
Exit codes:
  0  done
  1  any other error
  2  wrong usage
  3  not found
  4  permission denied
  5  no daemon, or no answer in time
  6  exists already, or is in a state that does not allow it
  7  quota, aperture or memory exhausted";

/// Exhaustive, so that a new code cannot end up somewhere by accident.
impl From<Code> for Exit {
    fn from(code: Code) -> Exit {
        match code {
            Code::Ok => Exit::Ok,
            Code::NotFound => Exit::NotFound,
            Code::PermissionDenied | Code::Unauthenticated => Exit::Denied,
            Code::Unavailable | Code::DeadlineExceeded => Exit::Unavailable,
            Code::AlreadyExists | Code::FailedPrecondition | Code::Aborted => Exit::Conflict,
            Code::ResourceExhausted => Exit::Quota,
            // The daemon refused what we took for good: not the user's usage
            // error, which we see ourselves.
            Code::InvalidArgument | Code::OutOfRange => Exit::Error,
            Code::Cancelled
            | Code::Unknown
            | Code::Unimplemented
            | Code::Internal
            | Code::DataLoss => Exit::Error,
        }
    }
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> ExitCode {
        ExitCode::from(exit as u8)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_grpc_code_has_its_documented_exit_code() {
        let table = [
            (Code::Ok, 0),
            (Code::Cancelled, 1),
            (Code::Unknown, 1),
            (Code::InvalidArgument, 1),
            (Code::DeadlineExceeded, 5),
            (Code::NotFound, 3),
            (Code::AlreadyExists, 6),
            (Code::PermissionDenied, 4),
            (Code::ResourceExhausted, 7),
            (Code::FailedPrecondition, 6),
            (Code::Aborted, 6),
            (Code::OutOfRange, 1),
            (Code::Unimplemented, 1),
            (Code::Internal, 1),
            (Code::Unavailable, 5),
            (Code::DataLoss, 1),
            (Code::Unauthenticated, 4),
        ];
        for (number, (code, exit)) in table.into_iter().enumerate() {
            assert_eq!(code as usize, number, "gRPC has the codes 0 to 16");
            assert_eq!(Exit::from(code) as u8, exit, "{code:?}");
        }
    }

    #[test]
    fn the_help_lists_every_exit_code() {
        for code in 0..=Exit::Quota as u8 {
            assert!(EXIT_CODES.contains(&format!("\n  {code}  ")), "{code}");
        }
    }
}
