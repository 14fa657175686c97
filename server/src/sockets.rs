//! The runtime directory, and sockets that replace one another without a gap.
//!
//! A socket is bound under a private name, given its mode and group, and only
//! then renamed over its public name: nobody ever connects to one that is not
//! ready, and a restart leaves no moment without one.

use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use domaind_proto::paths::RuntimeDir;
use rustix::fs::{FlockOperation, flock};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

use crate::passed::{Passed, PassedError, Which};
use crate::rights::pass_fds;

/// Connections that may wait to be accepted. The kernel's own limit
/// (`net.core.somaxconn`) may be lower.
const BACKLOG: i32 = 4096;

/// In the runtime directory.
pub(crate) const LOCK_FILE: &str = "domaind.lock";

/// Why the sockets are not there.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)] // the messages are the docs
pub enum SocketError {
    #[error("another daemon (pid {pid}) serves {dir:?}")]
    Locked { dir: PathBuf, pid: String },
    #[error("{path:?} is not a directory")]
    NotADirectory { path: PathBuf },
    #[error("{path:?} belongs to uid {owner}, this daemon runs as uid {uid}")]
    ForeignDirectory { path: PathBuf, owner: u32, uid: u32 },
    #[error("{path:?} has mode {mode:o}: others than its owner may write to it")]
    WritableByOthers { path: PathBuf, mode: u32 },
    #[error(transparent)]
    Passed(#[from] PassedError),
    #[error("{what} {path:?}")]
    Io {
        what: &'static str,
        path: PathBuf,
        #[source]
        cause: io::Error,
    },
}

fn failed<'p>(what: &'static str, path: &'p Path) -> impl FnOnce(io::Error) -> SocketError + 'p {
    move |cause| SocketError::Io {
        what,
        path: path.to_owned(),
        cause,
    }
}

/// The runtime directory, ours alone while this lives.
#[derive(Debug)]
pub(crate) struct Claim {
    dir: RuntimeDir,
    client_gid: Option<u32>,
    /// What a service manager has bound already.
    passed: Passed,
    /// Holds the lock. Never unlinked: whoever waits for it holds the same file.
    _lock: File,
}

/// A listening socket under its public name; dropping it takes the name away,
/// unless it is another daemon's by now.
#[derive(Debug)]
pub(crate) struct Bound {
    path: PathBuf,
    /// Device and inode of the name.
    identity: (u64, u64),
}

/// What there is to serve.
#[derive(Debug)]
pub(crate) struct Served {
    pub(crate) listener: UnixListener,
    /// None of a socket that was passed: its name belongs to who has bound it.
    pub(crate) bound: Option<Bound>,
}

impl Claim {
    /// Makes the directories and takes the lock.
    pub(crate) fn take(
        dir: &RuntimeDir,
        client_gid: Option<u32>,
        passed: Passed,
    ) -> Result<Claim, SocketError> {
        make_own_dir(dir.path())?;
        let lock = take_lock(dir.path())?;
        make_dir(&dir.public(), 0o750)?;
        protect(&dir.public(), 0o750, client_gid)?;
        make_dir(&dir.admin(), 0o700)?;
        protect(&dir.admin(), 0o700, None)?;
        Ok(Claim {
            dir: dir.clone(),
            client_gid,
            passed,
            _lock: lock,
        })
    }

    /// The socket that was passed, or one of our own.
    pub(crate) fn serve(&mut self, which: Which) -> Result<Served, SocketError> {
        let (path, kind, mode, gid) = match which {
            Which::Api => (
                self.dir.api_socket(),
                SocketType::STREAM,
                0o660,
                self.client_gid,
            ),
            // Accepts like any Unix listener; what it accepts keeps packets apart.
            Which::Fd => (
                self.dir.fd_socket(),
                SocketType::SEQPACKET,
                0o660,
                self.client_gid,
            ),
            Which::Admin => (self.dir.admin_socket(), SocketType::STREAM, 0o600, None),
        };
        if let Some(listener) = self.passed.listener(which, &path)? {
            adopt(&listener).map_err(failed("taking over", &path))?;
            let bound = None;
            return Ok(Served { listener, bound });
        }
        let (bound, listener) = bind(path, kind, mode, gid)?;
        let bound = Some(bound);
        Ok(Served { listener, bound })
    }
}

/// Binds under a private name, gives it its rights, and renames it.
pub(crate) fn bind(
    path: PathBuf,
    kind: SocketType,
    mode: u32,
    gid: Option<u32>,
) -> Result<(Bound, UnixListener), SocketError> {
    let private = private_name(&path);
    remove_if_there(&private).map_err(failed("removing", &private))?;
    let listener = listen(&private, kind).map_err(failed("binding", &private))?;
    protect(&private, mode, gid)?;
    let meta = fs::symlink_metadata(&private).map_err(failed("looking at", &private))?;
    fs::rename(&private, &path).map_err(failed("renaming a socket to", &path))?;
    Ok((
        Bound {
            identity: (meta.dev(), meta.ino()),
            path,
        },
        listener,
    ))
}

/// Makes a socket that was passed like one of our own. Its backlog is that of
/// whoever has bound it.
fn adopt(listener: &UnixListener) -> io::Result<()> {
    listener.set_nonblocking(true)?;
    // Before Linux 6.16 this cannot be refused; GetInfo says so.
    let _ = pass_fds(listener, false);
    Ok(())
}

impl Drop for Bound {
    fn drop(&mut self) {
        let ours = fs::symlink_metadata(&self.path)
            .is_ok_and(|meta| (meta.dev(), meta.ino()) == self.identity);
        if ours {
            let _ = fs::remove_file(&self.path);
        }
    }
}

fn take_lock(dir: &Path) -> Result<File, SocketError> {
    let path = dir.join(LOCK_FILE);
    let open = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(&path);
    let mut lock = open.map_err(failed("opening", &path))?;
    match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => {}
        Err(rustix::io::Errno::WOULDBLOCK) => {
            let mut pid = String::new();
            let _ = lock.take(32).read_to_string(&mut pid);
            return Err(SocketError::Locked {
                dir: dir.to_owned(),
                pid: pid.trim().to_owned(),
            });
        }
        Err(errno) => return Err(failed("locking", &path)(errno.into())),
    }
    // For people, and for the message above.
    let noted = lock
        .set_len(0)
        .and_then(|()| writeln!(lock, "{}", std::process::id()));
    noted.map_err(failed("writing", &path))?;
    Ok(lock)
}

/// The runtime directory itself. One that somebody else has made keeps its
/// mode, and must not be open to others.
fn make_own_dir(path: &Path) -> Result<(), SocketError> {
    if make_dir(path, 0o755)? {
        return protect(path, 0o755, None);
    }
    let meta = fs::symlink_metadata(path).map_err(failed("looking at", path))?;
    let mode = meta.permissions().mode() & 0o7777;
    if mode & 0o022 != 0 {
        let path = path.to_owned();
        return Err(SocketError::WritableByOthers { path, mode });
    }
    Ok(())
}

/// Makes a directory, or takes the one of ours that is there; true if it was
/// made.
fn make_dir(path: &Path, mode: u32) -> Result<bool, SocketError> {
    let is_there = path.symlink_metadata().is_ok();
    match fs::DirBuilder::new()
        .recursive(true)
        .mode(mode)
        .create(path)
    {
        Err(cause) if cause.kind() != io::ErrorKind::AlreadyExists => {
            return Err(failed("creating", path)(cause));
        }
        _ => {}
    }
    let meta = fs::symlink_metadata(path).map_err(failed("looking at", path))?;
    if !meta.is_dir() {
        return Err(SocketError::NotADirectory {
            path: path.to_owned(),
        });
    }
    let uid = rustix::process::geteuid().as_raw();
    if meta.uid() != uid {
        return Err(SocketError::ForeignDirectory {
            path: path.to_owned(),
            owner: meta.uid(),
            uid,
        });
    }
    Ok(!is_there)
}

fn protect(path: &Path, mode: u32, gid: Option<u32>) -> Result<(), SocketError> {
    if gid.is_some() {
        std::os::unix::fs::chown(path, None, gid)
            .map_err(failed("giving to the client group", path))?;
    }
    fs::set_permissions(path, Permissions::from_mode(mode))
        .map_err(failed("setting the mode of", path))
}

fn listen(path: &Path, kind: SocketType) -> io::Result<UnixListener> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket: OwnedFd = rustix::net::socket_with(AddressFamily::UNIX, kind, flags, None)?;
    // Before Linux 6.16 this cannot be refused; GetInfo says so.
    let _ = pass_fds(&socket, false);
    rustix::net::bind(&socket, &SocketAddrUnix::new(path)?)?;
    rustix::net::listen(&socket, BACKLOG)?;
    Ok(UnixListener::from(socket))
}

/// `.{name}.new` beside the public name.
/// The same for every daemon: whoever has the lock is the only one, and takes away
/// what a killed one has left.
fn private_name(path: &Path) -> PathBuf {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    path.with_file_name(format!(".{name}.new"))
}

fn remove_if_there(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(cause) if cause.kind() != io::ErrorKind::NotFound => Err(cause),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixStream;

    fn runtime() -> (tempfile::TempDir, RuntimeDir) {
        let dir = tempfile::tempdir_in("/tmp").unwrap();
        let runtime = RuntimeDir::new(&dir.path().join("run")).unwrap();
        (dir, runtime)
    }

    fn mode(path: &Path) -> u32 {
        fs::symlink_metadata(path).unwrap().permissions().mode() & 0o7777
    }

    #[test]
    fn everything_has_its_mode_whatever_the_umask() {
        let (_dir, runtime) = runtime();
        let mut claim = Claim::take(&runtime, None, Passed::default()).unwrap();
        let bound = [
            claim.serve(Which::Api).unwrap(),
            claim.serve(Which::Fd).unwrap(),
            claim.serve(Which::Admin).unwrap(),
        ];
        assert_eq!(mode(&runtime.public()), 0o750);
        assert_eq!(mode(&runtime.admin()), 0o700);
        assert_eq!(mode(&runtime.api_socket()), 0o660);
        assert_eq!(mode(&runtime.admin_socket()), 0o600);
        UnixStream::connect(runtime.api_socket()).unwrap();
        drop(bound);
        assert!(!runtime.fd_socket().exists());
    }

    /// Of a daemon that was killed between the two.
    #[test]
    fn a_socket_that_was_bound_and_not_renamed_is_in_nobodys_way_and_goes() {
        let (_dir, runtime) = runtime();
        let mut claim = Claim::take(&runtime, None, Passed::default()).unwrap();
        let left = private_name(&runtime.api_socket());
        drop(listen(&left, SocketType::STREAM).unwrap());
        assert!(left.exists());

        let _bound = claim.serve(Which::Api).unwrap();

        assert!(!left.exists());
        UnixStream::connect(runtime.api_socket()).unwrap();
    }

    #[test]
    fn a_second_daemon_is_refused_naming_the_first() {
        let (_dir, runtime) = runtime();
        let first = Claim::take(&runtime, None, Passed::default()).unwrap();
        let refused = Claim::take(&runtime, None, Passed::default()).unwrap_err();
        let own = std::process::id().to_string();
        assert!(matches!(refused, SocketError::Locked { pid, .. } if pid == own));
        drop(first);
        Claim::take(&runtime, None, Passed::default()).unwrap();
    }

    #[test]
    fn a_name_that_is_another_daemons_by_now_stays() {
        let (_dir, runtime) = runtime();
        let mut claim = Claim::take(&runtime, None, Passed::default()).unwrap();
        let old = claim.serve(Which::Api).unwrap();
        let new = claim.serve(Which::Api).unwrap();
        drop(old);
        UnixStream::connect(runtime.api_socket()).unwrap();
        drop(new);
        assert!(!runtime.api_socket().exists());
    }

    #[test]
    fn a_directory_that_is_there_keeps_its_mode_and_must_not_be_open_to_others() {
        let (_dir, runtime) = runtime();
        fs::create_dir(runtime.path()).unwrap();
        for (found, is_taken) in [
            (0o700, true),
            (0o755, true),
            (0o777, false),
            (0o1777, false),
        ] {
            fs::set_permissions(runtime.path(), Permissions::from_mode(found)).unwrap();
            let claimed = Claim::take(&runtime, None, Passed::default());
            assert_eq!(claimed.is_ok(), is_taken, "{found:o}: {claimed:?}");
            assert_eq!(mode(runtime.path()), found);
        }
    }

    #[test]
    fn a_file_where_a_directory_should_be_is_refused() {
        let (_dir, runtime) = runtime();
        fs::create_dir(runtime.path()).unwrap();
        fs::write(runtime.public(), "").unwrap();
        assert!(matches!(
            Claim::take(&runtime, None, Passed::default()),
            Err(SocketError::NotADirectory { .. })
        ));
    }
}
