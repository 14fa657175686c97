//! The runtime directory, made or mended for a daemon that has no rights to do
//! so itself: `domaind prepare-dir`, run by root before it.
//!
//! Whatever is there may have been put there by somebody else. So nothing is
//! done to a path: each directory is opened below the one before it, symlinks
//! refused, and owner and mode are set through what was opened. The runtime
//! directory itself is made ours first; from then on nobody can exchange what
//! lies in it.

use std::ffi::{OsStr, OsString};
use std::fmt;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};

use domaind_proto::paths::RuntimeDir;
use rustix::fs::{
    AtFlags, Dir, FileType, Gid, Mode, OFlags, Stat, Uid, fchmod, fchown, fstat, mkdirat, openat,
    statat,
};
use rustix::io::Errno;

use crate::sockets::LOCK_FILE;

/// What of the mode is set and compared.
const MODE_BITS: u32 = 0o7777;

/// Whose the directory shall be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Owners {
    /// The daemon's user.
    pub uid: u32,
    /// The daemon's group.
    pub gid: u32,
    /// Group that may enter `public/`.
    pub client_gid: u32,
}

/// Owner, group and mode of one name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rights {
    uid: u32,
    gid: u32,
    mode: u32,
}

/// What was done about one name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Step {
    path: PathBuf,
    was: Found,
    now: Rights,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Found {
    Nothing,
    There(Rights),
}

/// Why the directory is not prepared. What was mended before stays mended; the
/// next run goes on from there.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)] // the messages are the docs
pub enum PrepareError {
    #[error("{path:?} is the root of the file system")]
    Root { path: PathBuf },
    #[error("{path:?} is a symlink; name the directory that it leads to")]
    Symlink { path: PathBuf },
    #[error("{path:?} is not a directory")]
    NotADirectory { path: PathBuf },
    #[error("{path:?} is not a regular file of one name, so it is no lock of a daemon")]
    NotALock { path: PathBuf },
    #[error(
        "{path:?} belongs to uid {owner} and holds {entry:?}, which is nothing of a daemon's: \
         not given to uid {uid}"
    )]
    Foreign {
        path: PathBuf,
        owner: u32,
        entry: OsString,
        uid: u32,
    },
    #[error("uid and gid 4294967295 mean nobody")]
    NoSuchUser,
    #[error("{what} {path:?}")]
    Io {
        what: &'static str,
        path: PathBuf,
        #[source]
        cause: std::io::Error,
    },
}

fn failed<'p>(what: &'static str, path: &'p Path) -> impl FnOnce(Errno) -> PrepareError + 'p {
    move |errno| PrepareError::Io {
        what,
        path: path.to_owned(),
        cause: errno.into(),
    }
}

/// Makes or mends the runtime directory, `public/` and `admin/`, and gives a
/// lock file that another user's daemon has left to the new owner. Answers what
/// it found and did, name by name. Does nothing where nothing is to do.
///
/// # Errors
/// [`PrepareError`].
pub fn prepare(dir: &RuntimeDir, owners: Owners) -> Result<Vec<Step>, PrepareError> {
    let Owners {
        uid,
        gid,
        client_gid,
    } = owners;
    // To the kernel that is "leave it as it is".
    if [uid, gid, client_gid].contains(&u32::MAX) {
        return Err(PrepareError::NoSuchUser);
    }
    let rights = |gid, mode| Rights { uid, gid, mode };
    let (parent, name) = parent_of(dir.path())?;
    let own = Place::open(parent.as_fd(), &name, dir.path().to_owned())?;
    own.check_is_no_other(uid)?;
    let mut steps = vec![own.give(rights(gid, 0o755))?];
    for (path, rights) in [
        (dir.public(), rights(client_gid, 0o750)),
        (dir.admin(), rights(gid, 0o700)),
    ] {
        let name = path.file_name().unwrap_or_default().to_owned();
        steps.push(Place::open(own.fd.as_fd(), &name, path)?.give(rights)?);
    }
    if let Some(lock) = Place::lock(own.fd.as_fd(), dir.path().join(LOCK_FILE))? {
        steps.push(lock.give(rights(gid, 0o600))?);
    }
    Ok(steps)
}

/// Something that was opened, and whether it was made for that.
struct Place {
    fd: OwnedFd,
    path: PathBuf,
    is_new: bool,
}

impl Place {
    /// The directory of this name, made if it is not there.
    fn open(parent: BorrowedFd<'_>, name: &OsStr, path: PathBuf) -> Result<Place, PrepareError> {
        // Nobody but its owner sees it before it has its mode.
        let is_new = match mkdirat(parent, name, Mode::RWXU) {
            Ok(()) => true,
            Err(Errno::EXIST) => false,
            Err(errno) => return Err(failed("creating", &path)(errno)),
        };
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        match openat(parent, name, flags, Mode::empty()) {
            Ok(fd) => Ok(Place { fd, path, is_new }),
            Err(errno) => Err(refusal(parent, name, path, errno)),
        }
    }

    /// The lock file, if a daemon has left one.
    fn lock(parent: BorrowedFd<'_>, path: PathBuf) -> Result<Option<Place>, PrepareError> {
        // A fifo would otherwise keep whoever opens it.
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let fd = match openat(parent, LOCK_FILE, flags, Mode::empty()) {
            Ok(fd) => fd,
            Err(Errno::NOENT) => return Ok(None),
            Err(Errno::LOOP) => return Err(PrepareError::Symlink { path }),
            Err(Errno::NXIO) => return Err(PrepareError::NotALock { path }),
            Err(errno) => return Err(failed("opening", &path)(errno)),
        };
        let stat = fstat(&fd).map_err(failed("looking at", &path))?;
        // A second name could be a file of somebody else's that is to change hands.
        if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile || stat.st_nlink != 1 {
            return Err(PrepareError::NotALock { path });
        }
        let is_new = false;
        Ok(Some(Place { fd, path, is_new }))
    }

    /// Somebody else's directory that holds somebody else's files was named by
    /// mistake: `--runtime-dir /etc` shall not cost a node.
    fn check_is_no_other(&self, uid: u32) -> Result<(), PrepareError> {
        let owner = self.stat()?.st_uid;
        if owner == uid {
            return Ok(());
        }
        let entries = Dir::read_from(&self.fd).map_err(failed("reading", &self.path))?;
        for entry in entries {
            let entry = entry.map_err(failed("reading", &self.path))?;
            let name = OsStr::from_bytes(entry.file_name().to_bytes());
            if !is_a_daemons(name) {
                return Err(PrepareError::Foreign {
                    path: self.path.clone(),
                    owner,
                    entry: name.to_owned(),
                    uid,
                });
            }
        }
        Ok(())
    }

    /// Sets what is not as it shall be.
    fn give(&self, wanted: Rights) -> Result<Step, PrepareError> {
        let found = Rights::of(&self.stat()?);
        if (found.uid, found.gid) != (wanted.uid, wanted.gid) {
            let (uid, gid) = (Uid::from_raw(wanted.uid), Gid::from_raw(wanted.gid));
            fchown(&self.fd, Some(uid), Some(gid))
                .map_err(failed("setting the owner of", &self.path))?;
        }
        // Behind the owner: a change of that takes bits of the mode away.
        if Rights::of(&self.stat()?).mode != wanted.mode {
            fchmod(&self.fd, Mode::from_raw_mode(wanted.mode))
                .map_err(failed("setting the mode of", &self.path))?;
        }
        Ok(Step {
            path: self.path.clone(),
            was: match self.is_new {
                true => Found::Nothing,
                false => Found::There(found),
            },
            now: wanted,
        })
    }

    fn stat(&self) -> Result<Stat, PrepareError> {
        fstat(&self.fd).map_err(failed("looking at", &self.path))
    }
}

/// The directory that the runtime directory lies in, made if need be, and the
/// last name. No part of the way may be a symlink.
fn parent_of(path: &Path) -> Result<(OwnedFd, OsString), PrepareError> {
    let names: Vec<_> = path
        .components()
        .filter(|part| !matches!(part, Component::RootDir | Component::CurDir))
        .collect();
    let Some((Component::Normal(last), above)) = names.split_last() else {
        let path = path.to_owned();
        return Err(PrepareError::Root { path });
    };
    // Only to look up names below it, which no right to read is needed for.
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let mut way = PathBuf::from("/");
    let root = rustix::fs::open(&way, flags, Mode::empty());
    let mut fd = root.map_err(failed("opening", &way))?;
    for name in above {
        way.push(name);
        let mode = Mode::RWXU | Mode::RGRP | Mode::XGRP | Mode::ROTH | Mode::XOTH;
        let opened = match openat(&fd, name.as_os_str(), flags, Mode::empty()) {
            Err(Errno::NOENT) => {
                mkdirat(&fd, name.as_os_str(), mode).map_err(failed("creating", &way))?;
                openat(&fd, name.as_os_str(), flags, Mode::empty())
            }
            opened => opened,
        };
        fd = match opened {
            Ok(opened) => opened,
            Err(errno) => return Err(refusal(fd.as_fd(), name.as_os_str(), way, errno)),
        };
    }
    Ok((fd, (*last).to_owned()))
}

/// Says why a directory could not be opened: of a symlink and of a file the
/// kernel says the same.
fn refusal(parent: BorrowedFd<'_>, name: &OsStr, path: PathBuf, errno: Errno) -> PrepareError {
    if !matches!(errno, Errno::NOTDIR | Errno::LOOP) {
        return failed("opening", &path)(errno);
    }
    let stat = statat(parent, name, AtFlags::SYMLINK_NOFOLLOW);
    match stat.map(|stat| FileType::from_raw_mode(stat.st_mode)) {
        Ok(FileType::Symlink) => PrepareError::Symlink { path },
        _ => PrepareError::NotADirectory { path },
    }
}

/// Is it a name that a daemon makes in its runtime directory? Sockets lie there
/// under names of the operator's choice.
fn is_a_daemons(name: &OsStr) -> bool {
    let bytes = name.as_bytes();
    let known: [&[u8]; 5] = [b".", b"..", b"public", b"admin", LOCK_FILE.as_bytes()];
    let is_socket = bytes.ends_with(b".sock") || bytes.ends_with(b".sock.new");
    known.contains(&bytes) || is_socket
}

impl Rights {
    fn of(stat: &Stat) -> Rights {
        Rights {
            uid: stat.st_uid,
            gid: stat.st_gid,
            mode: stat.st_mode & MODE_BITS,
        }
    }
}

impl Step {
    /// Was anything to do?
    #[must_use]
    pub fn has_changed(&self) -> bool {
        self.was != Found::There(self.now)
    }
}

impl fmt::Display for Rights {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{} {:04o}", self.uid, self.gid, self.mode)
    }
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (path, now) = (self.path.display(), self.now);
        match self.was {
            Found::Nothing => write!(f, "{path}: made, {now}"),
            Found::There(was) if was == now => write!(f, "{path}: is {now}"),
            Found::There(was) => write!(f, "{path}: was {was}, is {now}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::passed::Passed;
    use crate::sockets::Claim;
    use std::fs::{self, Permissions};
    use std::os::unix::fs::{PermissionsExt, symlink};

    fn runtime() -> (tempfile::TempDir, RuntimeDir) {
        let dir = tempfile::tempdir_in("/tmp").unwrap();
        let runtime = RuntimeDir::new(&dir.path().join("a/run")).unwrap();
        (dir, runtime)
    }

    fn own() -> Owners {
        let gid = rustix::process::getegid().as_raw();
        Owners {
            uid: rustix::process::geteuid().as_raw(),
            gid,
            client_gid: gid,
        }
    }

    fn mode(path: &Path) -> u32 {
        fs::symlink_metadata(path).unwrap().permissions().mode() & MODE_BITS
    }

    fn text(steps: &[Step]) -> Vec<String> {
        steps.iter().map(Step::to_string).collect()
    }

    #[test]
    fn what_is_missing_is_made_and_a_second_time_nothing_is_done() {
        let (_dir, runtime) = runtime();
        let made = prepare(&runtime, own()).unwrap();
        assert!(made.iter().all(Step::has_changed), "{made:?}");
        assert!(text(&made)[1].ends_with("0750") && text(&made)[1].contains("made"));
        assert_eq!(mode(runtime.path()), 0o755);
        assert_eq!(mode(&runtime.public()), 0o750);
        assert_eq!(mode(&runtime.admin()), 0o700);
        let again = prepare(&runtime, own()).unwrap();
        assert!(!again.iter().any(Step::has_changed), "{again:?}");
    }

    #[test]
    fn modes_are_mended_and_a_daemon_takes_what_was_prepared() {
        let (_dir, runtime) = runtime();
        prepare(&runtime, own()).unwrap();
        for path in [runtime.path(), &runtime.public(), &runtime.admin()] {
            fs::set_permissions(path, Permissions::from_mode(0o1777)).unwrap();
        }
        fs::write(runtime.path().join(LOCK_FILE), "7").unwrap();
        let mended = prepare(&runtime, own()).unwrap();
        assert_eq!(mended.len(), 4);
        assert!(mended.iter().all(Step::has_changed), "{mended:?}");
        assert!(text(&mended)[0].contains("1777, is"), "{mended:?}");
        assert_eq!(mode(&runtime.admin()), 0o700);
        Claim::take(&runtime, None, Passed::default()).unwrap();
    }

    #[test]
    fn a_symlink_is_refused_wherever_it_stands_and_what_it_leads_to_is_left_alone() {
        let (dir, runtime) = runtime();
        let elsewhere = dir.path().join("elsewhere");
        fs::create_dir(&elsewhere).unwrap();
        fs::set_permissions(&elsewhere, Permissions::from_mode(0o711)).unwrap();
        prepare(&runtime, own()).unwrap();
        for link in [
            runtime.public(),
            runtime.admin(),
            runtime.path().to_owned(),
            dir.path().join("a"),
        ] {
            fs::remove_dir_all(&link).unwrap();
            symlink(&elsewhere, &link).unwrap();
            let refused = prepare(&runtime, own()).unwrap_err();
            assert!(
                matches!(&refused, PrepareError::Symlink { path } if *path == link),
                "{refused}"
            );
            assert_eq!(mode(&elsewhere), 0o711);
            assert_eq!(fs::read_dir(&elsewhere).unwrap().count(), 0);
            fs::remove_file(&link).unwrap();
            prepare(&runtime, own()).unwrap();
        }
    }

    #[test]
    fn what_is_no_directory_and_what_is_no_lock_is_refused_by_name() {
        let (dir, runtime) = runtime();
        prepare(&runtime, own()).unwrap();
        let lock = runtime.path().join(LOCK_FILE);
        let secret = dir.path().join("secret");
        fs::write(&secret, "").unwrap();
        let refused = || prepare(&runtime, own()).unwrap_err();

        symlink(&secret, &lock).unwrap();
        assert!(matches!(refused(), PrepareError::Symlink { path } if path == lock));
        fs::remove_file(&lock).unwrap();
        fs::hard_link(&secret, &lock).unwrap();
        assert!(matches!(refused(), PrepareError::NotALock { path } if path == lock));
        fs::remove_file(&lock).unwrap();
        rustix::fs::mknodat(rustix::fs::CWD, &lock, FileType::Fifo, Mode::RWXU, 0).unwrap();
        assert!(matches!(refused(), PrepareError::NotALock { path } if path == lock));
        fs::remove_file(&lock).unwrap();

        fs::remove_dir(runtime.admin()).unwrap();
        fs::write(runtime.admin(), "").unwrap();
        assert!(
            matches!(refused(), PrepareError::NotADirectory { path } if path == runtime.admin())
        );
    }

    #[test]
    fn the_root_and_users_that_mean_nobody_are_refused() {
        let root = RuntimeDir::new(Path::new("/")).unwrap();
        assert!(matches!(
            prepare(&root, own()),
            Err(PrepareError::Root { .. })
        ));
        let (_dir, runtime) = runtime();
        let nobody = Owners {
            client_gid: u32::MAX,
            ..own()
        };
        let refused = prepare(&runtime, nobody);
        assert!(matches!(refused, Err(PrepareError::NoSuchUser)));
        assert!(!runtime.path().exists());
    }
}
