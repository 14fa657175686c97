//! Sockets that a service manager has bound for us and passes at the start
//! (`LISTEN_FDS`): clients may connect before the daemon is there, and wait for
//! it across a restart.

use std::env;
use std::fmt;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process;

use listenfd::ListenFd;
use rustix::net::sockopt::socket_acceptconn;

/// The public and the operator's sockets are three.
const MOST: usize = 3;

/// Sockets that were passed; each may be there or not.
#[derive(Debug, Default)]
pub struct Passed {
    api: Option<UnixListener>,
    fd: Option<UnixListener>,
    admin: Option<UnixListener>,
}

/// Which of the daemon's sockets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Which {
    /// gRPC for clients.
    Api,
    /// Sessions and their fds.
    Fd,
    /// gRPC for the operator.
    Admin,
}

/// Why what was passed is not taken.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)] // the messages are the docs
pub enum PassedError {
    #[error("LISTEN_FDS is {value:?}, which is no number")]
    NoNumber { value: String },
    #[error("LISTEN_FDS says that {count} sockets are passed, this daemon has {MOST}: {names:?}")]
    TooMany { count: usize, names: String },
    #[error("LISTEN_FDS says {fds} and LISTEN_FDNAMES {names:?} names {count}")]
    NamesDiffer {
        fds: usize,
        names: String,
        count: usize,
    },
    #[error(
        "socket {fd} is passed as {name:?}; this daemon knows \"public\" and \"admin\" (FileDescriptorName=)"
    )]
    UnknownName { fd: usize, name: String },
    #[error("fd {fd}, passed as {name:?}, is no {wanted}")]
    WrongKind {
        fd: usize,
        name: String,
        wanted: &'static str,
        #[source]
        cause: io::Error,
    },
    #[error("{which} is passed a second time, as fd {fd}")]
    Twice { fd: usize, which: Which },
    #[error("{which}: the socket that was passed does not listen")]
    Deaf { which: Which },
    #[error("{which}: the socket that was passed lies at {found:?}, the daemon's own at {own:?}")]
    Elsewhere {
        which: Which,
        found: Option<PathBuf>,
        own: PathBuf,
    },
    #[error("{which}: looking at the socket that was passed")]
    Io {
        which: Which,
        #[source]
        cause: io::Error,
    },
}

impl Passed {
    /// What this process was passed: nothing, unless `LISTEN_PID` says that it
    /// is meant. Must be called before there are other threads: it takes the
    /// variables away, and makes the sockets end with this program.
    ///
    /// # Errors
    /// [`PassedError`], naming the socket: one that nobody would serve keeps
    /// clients waiting without an answer.
    pub fn from_env() -> Result<Passed, PassedError> {
        // listenfd would take an unset variable for ours.
        if env::var("LISTEN_PID").ok().and_then(|pid| pid.parse().ok()) != Some(process::id()) {
            return Ok(Passed::default());
        }
        let Ok(value) = env::var("LISTEN_FDS") else {
            return Ok(Passed::default());
        };
        let names = env::var("LISTEN_FDNAMES").unwrap_or_default();
        let names = named(&value, &names)?;
        let mut fds = ListenFd::from_env();
        let mut passed = Passed::default();
        for (index, name) in names.iter().enumerate() {
            passed.take(&mut fds, index, name)?;
        }
        Ok(passed)
    }

    fn take(&mut self, fds: &mut ListenFd, index: usize, name: &str) -> Result<(), PassedError> {
        let fd = FIRST + index;
        let (which, socket) = match name {
            "public" => match stream(fds, index) {
                Ok(socket) => (Which::Api, Ok(socket)),
                Err(_) => (Which::Fd, seqpacket(fds, index)),
            },
            "admin" => (Which::Admin, stream(fds, index)),
            _ => {
                let name = name.to_owned();
                return Err(PassedError::UnknownName { fd, name });
            }
        };
        let socket = socket.map_err(|cause| PassedError::WrongKind {
            fd,
            name: name.to_owned(),
            wanted: match which {
                Which::Admin => "Unix stream socket",
                _ => "Unix stream or sequential-packet socket",
            },
            cause,
        })?;
        match self.place(which).replace(UnixListener::from(socket)) {
            None => Ok(()),
            Some(_) => Err(PassedError::Twice { fd, which }),
        }
    }

    fn place(&mut self, which: Which) -> &mut Option<UnixListener> {
        match which {
            Which::Api => &mut self.api,
            Which::Fd => &mut self.fd,
            Which::Admin => &mut self.admin,
        }
    }

    /// The socket that shall be served at `own`, if it was passed: listening,
    /// and lying there.
    ///
    /// # Errors
    /// [`PassedError`].
    pub(crate) fn listener(
        &mut self,
        which: Which,
        own: &Path,
    ) -> Result<Option<UnixListener>, PassedError> {
        let Some(listener) = self.place(which).take() else {
            return Ok(None);
        };
        let failed = |cause| PassedError::Io { which, cause };
        if !socket_acceptconn(&listener).map_err(|errno| failed(errno.into()))? {
            return Err(PassedError::Deaf { which });
        }
        let found = listener.local_addr().map_err(failed)?;
        let found = found.as_pathname().map(Path::to_owned);
        // To the letter: what only leads there may lead elsewhere tomorrow.
        if found.as_ref().map(|found| found.as_os_str()) != Some(own.as_os_str()) {
            let own = own.to_owned();
            return Err(PassedError::Elsewhere { which, found, own });
        }
        Ok(Some(listener))
    }
}

impl fmt::Display for Which {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Which::Api => "public/api.sock",
            Which::Fd => "public/fd.sock",
            Which::Admin => "admin/admin.sock",
        })
    }
}

/// Where passed fds begin (`SD_LISTEN_FDS_START`).
const FIRST: usize = 3;

/// One name for each fd.
fn named(fds: &str, names: &str) -> Result<Vec<String>, PassedError> {
    let count: usize = fds.parse().map_err(|_| PassedError::NoNumber {
        value: fds.to_owned(),
    })?;
    if count > MOST {
        let names = names.to_owned();
        return Err(PassedError::TooMany { count, names });
    }
    let each: Vec<String> = match names {
        "" => Vec::new(),
        names => names.split(':').map(str::to_owned).collect(),
    };
    if each.len() != count {
        return Err(PassedError::NamesDiffer {
            fds: count,
            count: each.len(),
            names: names.to_owned(),
        });
    }
    Ok(each)
}

fn stream(fds: &mut ListenFd, index: usize) -> io::Result<OwnedFd> {
    taken(fds.take_custom(index, libc::AF_UNIX, libc::SOCK_STREAM, "stream socket"))
}

fn seqpacket(fds: &mut ListenFd, index: usize) -> io::Result<OwnedFd> {
    taken(fds.take_custom(
        index,
        libc::AF_UNIX,
        libc::SOCK_SEQPACKET,
        "sequential-packet socket",
    ))
}

fn taken(taken: io::Result<Option<OwnedFd>>) -> io::Result<OwnedFd> {
    taken?.ok_or_else(|| io::ErrorKind::NotFound.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_socket_has_its_name_and_numbers_that_do_not_fit_are_refused() {
        assert_eq!(named("0", "").unwrap(), Vec::<String>::new());
        assert_eq!(named("2", "public:admin").unwrap(), ["public", "admin"]);
        for (fds, names, why) in [
            ("x", "", "no number"),
            ("-1", "", "no number"),
            ("4", "a:b:c:d", "4 sockets"),
            ("1", "", "names 0"),
            ("1", "public:admin", "names 2"),
        ] {
            let refused = named(fds, names).unwrap_err().to_string();
            assert!(refused.contains(why), "{refused}");
        }
    }

    #[test]
    fn a_listener_elsewhere_and_one_that_does_not_listen_are_refused() {
        let dir = tempfile::tempdir_in("/tmp").unwrap();
        let (here, there) = (dir.path().join("here"), dir.path().join("there"));
        let passed = |path: &Path| Passed {
            api: Some(UnixListener::bind(path).unwrap()),
            ..Passed::default()
        };
        let elsewhere = passed(&there).listener(Which::Api, &here).unwrap_err();
        let text = elsewhere.to_string();
        assert!(text.contains("here") && text.contains("there"), "{text}");
        let taken = passed(&here).listener(Which::Api, &here).unwrap();
        assert!(taken.is_some());
        assert!(
            Passed::default()
                .listener(Which::Fd, &here)
                .unwrap()
                .is_none()
        );

        let deaf = rustix::net::socket(
            rustix::net::AddressFamily::UNIX,
            rustix::net::SocketType::STREAM,
            None,
        );
        let mut deaf = Passed {
            admin: Some(UnixListener::from(deaf.unwrap())),
            ..Passed::default()
        };
        let refused = deaf.listener(Which::Admin, &here).unwrap_err();
        assert!(matches!(refused, PassedError::Deaf { .. }));
    }
}
