//! Where the sockets are: one rule for daemon, command line and library.

use std::path::{Path, PathBuf};
use std::{env, io};

/// Names the runtime directory for daemon, command line and library alike.
pub const RUNTIME_DIR_VAR: &str = "DOMAIND_RUNTIME_DIR";

const SYSTEM_DIR: &str = "/run/domaind";
/// A Unix socket's path, its terminating zero not counted.
const SOCKET_PATH_BYTES: usize = 107;

/// The sockets of one daemon.
///
/// ```text
/// {runtime}/public/api.sock    gRPC for clients
/// {runtime}/public/fd.sock     sessions and their fds
/// {runtime}/admin/admin.sock   gRPC for the operator
/// ```
///
/// Clients are given the *directory* `public`, never a socket file: a restart
/// replaces the files.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RuntimeDir(PathBuf);

/// Why there is no runtime directory.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)] // the messages are the docs
pub enum RuntimeDirError {
    #[error(
        "no runtime directory: set {RUNTIME_DIR_VAR} or --runtime-dir ({SYSTEM_DIR} is not there, and XDG_RUNTIME_DIR is unset)"
    )]
    Unknown,
    #[error(
        "the runtime directory {path:?} makes a socket path of {bytes} bytes; a Unix socket takes {SOCKET_PATH_BYTES}"
    )]
    TooLong { path: PathBuf, bytes: usize },
    #[error("the current directory, to make {path:?} absolute")]
    CurrentDir {
        path: PathBuf,
        #[source]
        cause: io::Error,
    },
}

impl RuntimeDir {
    /// The given directory, made absolute, if its sockets' paths are short
    /// enough.
    ///
    /// # Errors
    /// [`RuntimeDirError::TooLong`], [`RuntimeDirError::CurrentDir`].
    pub fn new(path: &Path) -> Result<RuntimeDir, RuntimeDirError> {
        let absolute = std::path::absolute(path).map_err(|cause| RuntimeDirError::CurrentDir {
            path: path.to_owned(),
            cause,
        })?;
        let dir = RuntimeDir(absolute);
        // The daemon binds `.{name}.{pid}` first and renames it.
        let longest = dir.admin_socket().as_os_str().len() + "..4194304".len();
        if longest > SOCKET_PATH_BYTES {
            return Err(RuntimeDirError::TooLong {
                path: path.to_owned(),
                bytes: longest,
            });
        }
        Ok(dir)
    }

    /// What was asked for, else `DOMAIND_RUNTIME_DIR`, else `/run/domaind` for
    /// root and wherever that directory is, else `$XDG_RUNTIME_DIR/domaind`.
    ///
    /// # Errors
    /// [`RuntimeDirError`], naming the choices.
    pub fn resolve(asked: Option<&Path>) -> Result<RuntimeDir, RuntimeDirError> {
        let named = |var| {
            env::var_os(var)
                .filter(|value| !value.is_empty())
                .map(PathBuf::from)
        };
        if let Some(path) = asked.map(Path::to_owned).or_else(|| named(RUNTIME_DIR_VAR)) {
            return RuntimeDir::new(&path);
        }
        if rustix::process::geteuid().is_root() || Path::new(SYSTEM_DIR).is_dir() {
            return RuntimeDir::new(Path::new(SYSTEM_DIR));
        }
        let user = named("XDG_RUNTIME_DIR").ok_or(RuntimeDirError::Unknown)?;
        RuntimeDir::new(&user.join("domaind"))
    }

    /// The directory itself.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// The directory that clients are given.
    #[must_use]
    pub fn public(&self) -> PathBuf {
        self.0.join("public")
    }

    /// The operator's directory.
    #[must_use]
    pub fn admin(&self) -> PathBuf {
        self.0.join("admin")
    }

    /// gRPC for clients.
    #[must_use]
    pub fn api_socket(&self) -> PathBuf {
        self.public().join("api.sock")
    }

    /// Sessions and their fds.
    #[must_use]
    pub fn fd_socket(&self) -> PathBuf {
        self.public().join("fd.sock")
    }

    /// gRPC for the operator.
    #[must_use]
    pub fn admin_socket(&self) -> PathBuf {
        self.admin().join("admin.sock")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_too_long_for_a_socket_is_refused_before_anything_is_made() {
        let long = Path::new("/tmp").join("x".repeat(100));
        assert!(
            matches!(RuntimeDir::new(&long), Err(RuntimeDirError::TooLong { bytes, .. }) if bytes > 107)
        );
    }

    #[test]
    fn what_was_asked_for_wins_and_becomes_absolute() {
        let dir = RuntimeDir::resolve(Some(Path::new("here"))).unwrap();
        assert!(dir.path().is_absolute() && dir.path().ends_with("here"));
        assert!(dir.fd_socket().ends_with("here/public/fd.sock"));
    }
}
