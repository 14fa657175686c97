//! Why a command failed, in words for people and as an exit code.

use std::fmt;
use std::io::{self, IsTerminal, Write};

use domaind_client::Error;
use domaind_proto::refusal::sentence;
use domaind_proto::v1::Refusal;
use tonic::{Code, Status};

use crate::exit::Exit;

/// Why a command failed. Nothing of it was printed yet.
#[derive(Debug)]
pub(crate) struct Failure {
    exit: Exit,
    message: String,
    /// What else is known, for `-v`: a key and a value.
    details: Vec<(String, String)>,
}

impl Failure {
    /// A failure that is known by its sentence alone.
    pub(crate) fn new(exit: Exit, message: impl Into<String>) -> Failure {
        Failure {
            exit,
            message: message.into(),
            details: Vec::new(),
        }
    }

    /// A failure whose sentence is that of an error and its causes.
    pub(crate) fn of(exit: Exit, error: &dyn std::error::Error) -> Failure {
        Failure::new(exit, sentence(error))
    }

    /// Says in front what it is about, where that is not clear.
    pub(crate) fn about(mut self, what: Option<String>) -> Failure {
        if let Some(what) = what {
            self.message = format!("{what}: {}", self.message);
        }
        self
    }

    /// Says at the end what helps to read it.
    pub(crate) fn remarking(mut self, what: &str) -> Failure {
        self.message = format!("{} ({what})", self.message);
        self
    }

    /// Does the daemon's refusal have a detail of this name?
    pub(crate) fn has_detail(&self, name: &str) -> bool {
        self.details.iter().any(|(key, _)| key == name)
    }

    /// How the program ends for this.
    pub(crate) fn exit(&self) -> Exit {
        self.exit
    }

    /// Says it on stderr. If even that cannot be written, the exit code has
    /// to do.
    pub(crate) fn report(&self, verbose: bool) {
        let mut stderr = io::stderr().lock();
        let word = if colourful() {
            "\x1b[1;31merror:\x1b[0m"
        } else {
            "error:"
        };
        let _ = stderr.write_all(self.text(word, verbose).as_bytes());
    }

    fn text(&self, word: &str, verbose: bool) -> String {
        let mut text = format!("{word} {}\n", self.message);
        let details = self.details.iter().filter(|_| verbose);
        for (key, value) in details {
            text.push_str(&format!("  {key}: {value}\n"));
        }
        text
    }
}

/// Colours are for terminals whose owner did not switch them off.
fn colourful() -> bool {
    let refused = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
    io::stderr().is_terminal() && !refused
}

/// A remark on stderr that is not an error.
pub(crate) fn remark(text: &str) {
    let _ = writeln!(io::stderr(), "{text}");
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl From<Refusal> for Failure {
    fn from(refusal: Refusal) -> Failure {
        let code = refusal.grpc_code();
        let reason = refusal.reason().as_str_name();
        let reason = reason.strip_prefix("ERROR_REASON_").unwrap_or(reason);
        let mut details = vec![
            ("code".to_owned(), code_name(code)),
            ("reason".to_owned(), reason.to_owned()),
        ];
        // A server that is not ours may say nothing at all.
        let message = match refusal.message.as_str() {
            "" => format!("the daemon answered {}", code_name(code)),
            message => message.to_owned(),
        };
        details.extend(refusal.metadata);
        Failure {
            exit: Exit::from(code),
            message,
            details,
        }
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Failure {
        match error {
            Error::Refused(refusal) => Failure::from(refusal),
            // tonic's code says little, and of its causes each repeats the next.
            Error::Transport { cause, .. } => Failure::new(
                Exit::Unavailable,
                format!("the connection to the daemon broke: {}", last(&*cause)),
            ),
            other => Failure::of(other.code().map_or(Exit::Error, Exit::from), &other),
        }
    }
}

impl From<Status> for Failure {
    fn from(status: Status) -> Failure {
        Failure::from(Error::from(status))
    }
}

/// The demo fails with whatever happened to it.
impl From<anyhow::Error> for Failure {
    fn from(error: anyhow::Error) -> Failure {
        match error.downcast::<Error>() {
            Ok(error) => Failure::from(error),
            Err(error) => Failure::of(Exit::Error, error.as_ref()),
        }
    }
}

/// What began it.
fn last<'a>(
    mut error: &'a (dyn std::error::Error + 'static),
) -> &'a (dyn std::error::Error + 'static) {
    while let Some(cause) = error.source() {
        error = cause;
    }
    error
}

/// `NotFound` to `NOT_FOUND`, as the protocol writes it.
fn code_name(code: Code) -> String {
    let mut name = String::new();
    for letter in format!("{code:?}").chars() {
        if letter.is_ascii_uppercase() && !name.is_empty() {
            name.push('_');
        }
        name.push(letter.to_ascii_uppercase());
    }
    name
}

#[cfg(test)]
mod tests {
    use super::*;
    use domaind_proto::v1::ErrorReason;

    fn no_such_domain() -> Status {
        Refusal::because(
            Code::NotFound,
            ErrorReason::NoSuchDomain,
            "no domain \"d9\"",
        )
        .with("domain", "d9")
        .into()
    }

    #[test]
    fn an_error_is_one_line_unless_more_is_asked_for() {
        let failure = Failure::from(no_such_domain());
        assert_eq!(failure.exit(), Exit::NotFound);
        assert_eq!(failure.text("error:", false), "error: no domain \"d9\"\n");
        assert_eq!(
            failure.text("error:", true),
            "error: no domain \"d9\"\n  code: NOT_FOUND\n  reason: NO_SUCH_DOMAIN\n  domain: d9\n"
        );
    }

    #[test]
    fn a_connection_that_breaks_is_no_daemon() {
        let broken = std::io::Error::from(std::io::ErrorKind::BrokenPipe);
        let failure = Failure::from(Status::from_error(Box::new(broken)));
        assert_eq!(failure.exit(), Exit::Unavailable);
        assert_eq!(
            failure.to_string(),
            "the connection to the daemon broke: broken pipe"
        );
    }

    #[test]
    fn a_status_without_words_still_says_something() {
        let failure = Failure::from(Status::new(Code::ResourceExhausted, ""));
        assert_eq!(failure.exit(), Exit::Quota);
        assert_eq!(failure.message, "the daemon answered RESOURCE_EXHAUSTED");
    }
}
