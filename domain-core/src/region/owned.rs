//! Memory that the daemon owns and gives to clients.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use memfd::{FileSeal, Memfd};
use rustix::fs::{Mode, OFlags, fstat, open};

use super::mapping::SharedMemory;
use super::mark;
use super::memfd::{Backing, RegionError, allocated, seal};
use super::pieces::Access;

/// A memfd that the daemon owns: created, given mode 0600, sized, allocated, sealed, then mapped;
/// only then can anybody be given it.
///
/// Its size and seals never change. Dropping it unmaps and closes; the memory lives on while a
/// client holds it.
#[derive(Debug)]
pub struct Region {
    /// The original description. It never leaves the process: whoever shares a description shares
    /// its flags.
    memfd: Memfd,
    memory: SharedMemory,
    backing: Backing,
    identity: FileIdentity,
}

/// Names a file for as long as anybody has it open.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FileIdentity {
    /// The device number of the file system.
    pub dev: u64,
    /// The inode number there.
    pub ino: u64,
}

impl Region {
    /// Makes a region of `len_bytes` zeroes. `name` shows in `/proc` only.
    ///
    /// `len_bytes` is a positive multiple of [`Backing::page_bytes`]. All pages are allocated
    /// before this returns. Past a cgroup's limit that is an OOM kill and not an error, so check a
    /// budget first.
    ///
    /// # Errors
    ///
    /// [`RegionError::NoMemory`] when the pages cannot be had: for hugetlb, when the pool is too
    /// small.
    pub fn create(name: &str, len_bytes: u64, backing: Backing) -> Result<Region, RegionError> {
        let memfd = allocated(name, len_bytes, backing)?;
        // Sealed before it is mapped: `map_at` maps nothing that could still shrink, not even our
        // own.
        seal(
            &memfd,
            &[FileSeal::SealShrink, FileSeal::SealGrow, FileSeal::SealSeal],
        )?;
        let mut memory = SharedMemory::reserve(len_bytes, backing.page_bytes())?;
        memory.map_at(0, len_bytes, memfd.as_file().as_fd(), Access::ReadWrite)?;
        let stat = fstat(memfd.as_file()).map_err(|errno| RegionError::Inspect(errno.into()))?;
        let identity = FileIdentity {
            dev: stat.st_dev,
            ino: stat.st_ino,
        };
        Ok(Region {
            memfd,
            memory,
            backing,
            identity,
        })
    }

    /// Opens the memory once more, for one client.
    ///
    /// A description of its own, so that nothing a client does to its flags or offset reaches us or
    /// another client. Close-on-exec. A read-only grant stays read-only for peers of another uid,
    /// because of mode 0600; one of our own uid, or with `CAP_DAC_OVERRIDE`, can open it again for
    /// writing.
    ///
    /// # Errors
    ///
    /// [`RegionError::Reopen`], without `/proc` or without a free descriptor.
    pub fn grant(&self, access: Access) -> Result<Grant, RegionError> {
        reopen(&self.memfd, access)
    }

    /// As [`Region::grant`], with a mark that the grant has for as long as it exists: until its last
    /// descriptor is closed and nothing is mapped through it any more, in whatever process. Several
    /// grants may have the same one.
    ///
    /// # Errors
    ///
    /// As [`Region::grant`], and [`RegionError::Mark`] where the kernel has no locks left, or no
    /// file can be longer than `mark` bytes.
    pub fn grant_marked(&self, access: Access, mark: u64) -> Result<Grant, RegionError> {
        reopen_marked(&self.memfd, access, mark)
    }

    /// Does a grant with this mark still exist? A client that wants to hide its own can; for all
    /// others, "no" is certain. "Yes" may be a process that is being forked just now.
    ///
    /// # Errors
    ///
    /// What the kernel answers, for no mark that a grant could have.
    pub fn is_marked(&self, mark: u64) -> io::Result<bool> {
        mark::is_set(self.memfd.as_file(), mark)
    }

    /// The daemon's own mapping of all of it, read-write.
    pub fn memory(&self) -> &SharedMemory {
        &self.memory
    }

    /// Its length in bytes.
    pub fn len_bytes(&self) -> u64 {
        self.memory.len_bytes()
    }

    /// What kind of pages it has.
    pub fn backing(&self) -> Backing {
        self.backing
    }

    /// The identity that every grant of it shows to `fstat`.
    pub fn identity(&self) -> FileIdentity {
        self.identity
    }
}

/// A descriptor of a region that may be sent to a client. [`Region::grant`] and
/// [`SparseRegion::grant`](super::SparseRegion::grant) alone make one.
#[derive(Debug)]
pub struct Grant(OwnedFd);

/// Opens a memfd of ours once more.
pub(super) fn reopen(memfd: &Memfd, access: Access) -> Result<Grant, RegionError> {
    let mode = match access {
        Access::ReadOnly => OFlags::RDONLY,
        Access::ReadWrite => OFlags::RDWR,
    };
    let path = format!("/proc/self/fd/{}", memfd.as_raw_fd());
    open(path, mode | OFlags::CLOEXEC, Mode::empty())
        .map(Grant)
        .map_err(|errno| RegionError::Reopen(io::Error::from(errno)))
}

/// As `reopen`, with a mark before anybody else has it.
pub(super) fn reopen_marked(
    memfd: &Memfd,
    access: Access,
    mark: u64,
) -> Result<Grant, RegionError> {
    let grant = reopen(memfd, access)?;
    mark::set(&grant, mark).map_err(|source| RegionError::Mark { mark, source })?;
    Ok(grant)
}

impl AsFd for Grant {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl From<Grant> for OwnedFd {
    fn from(grant: Grant) -> OwnedFd {
        grant.0
    }
}

#[cfg(test)]
mod tests {
    use rustix::fs::{
        FallocateFlags, SealFlags, SeekFrom, fallocate, fchmod, fcntl_add_seals, fcntl_get_seals,
        fcntl_getfl, fcntl_setfl, ftruncate, seek, tell,
    };
    use rustix::io::{Errno, FdFlags, fcntl_getfd, pread, pwrite};

    use super::*;
    use crate::region::MapError;

    const LEN: u64 = 8 * 4096;

    fn region() -> Region {
        Region::create("owned-test", LEN, Backing::Memfd).unwrap()
    }

    fn both_grants(region: &Region) -> [Grant; 2] {
        [
            region.grant(Access::ReadOnly).unwrap(),
            region.grant(Access::ReadWrite).unwrap(),
        ]
    }

    #[test]
    fn a_new_region_is_zeroed_allocated_private_and_mapped_whole() {
        let region = region();

        let stat = fstat(region.memfd.as_file()).unwrap();
        let mut bytes = [0xFF; 8 * 4096];
        region.memory().copy_out(0, &mut bytes).unwrap();
        assert!(bytes.iter().all(|&byte| byte == 0));
        assert_eq!(stat.st_mode & 0o777, 0o600);
        assert!(u64::try_from(stat.st_blocks).unwrap() * 512 >= LEN);
        assert_eq!(
            (region.len_bytes(), region.backing()),
            (LEN, Backing::Memfd)
        );
    }

    #[test]
    fn a_grant_cannot_be_resized_or_sealed() {
        let region = region();

        for grant in both_grants(&region) {
            let seals = fcntl_get_seals(&grant).unwrap();
            assert!(seals.contains(SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL));
            assert_eq!(
                fcntl_add_seals(&grant, SealFlags::FUTURE_WRITE),
                Err(Errno::PERM)
            );
        }
        let grant = region.grant(Access::ReadWrite).unwrap();
        assert_eq!(ftruncate(&grant, LEN - 4096), Err(Errno::PERM));
        assert_eq!(ftruncate(&grant, LEN + 4096), Err(Errno::PERM));
        assert_eq!(
            fallocate(&grant, FallocateFlags::empty(), LEN, 4096),
            Err(Errno::PERM)
        );
        assert_eq!(fstat(&grant).unwrap().st_size, i64::try_from(LEN).unwrap());
    }

    #[test]
    fn a_hole_punched_through_a_grant_reads_as_zero_and_leaves_the_mapping_alive() {
        let region = region();
        region.memory().fill(0, LEN, 0xA5).unwrap();
        let grant = region.grant(Access::ReadWrite).unwrap();

        fallocate(
            &grant,
            FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE,
            4096,
            4096,
        )
        .unwrap();

        let mut bytes = [0xFF; 2];
        region.memory().copy_out(4095, &mut bytes).unwrap();
        assert_eq!(bytes, [0xA5, 0]);
        region.memory().fill(0, LEN, 0x5A).unwrap();
    }

    #[test]
    fn a_grant_can_never_be_made_executable() {
        let region = region();
        let has_exec_seal = fcntl_get_seals(region.memfd.as_file())
            .unwrap()
            .contains(SealFlags::EXEC);

        for grant in both_grants(&region) {
            assert_eq!(fstat(&grant).unwrap().st_mode & 0o111, 0);
            if has_exec_seal {
                assert_eq!(fchmod(&grant, Mode::RWXU), Err(Errno::PERM));
            }
        }
    }

    #[test]
    fn a_read_only_grant_can_be_read_but_not_written() {
        let region = region();
        region.memory().copy_in(10, b"shared").unwrap();
        let grant = region.grant(Access::ReadOnly).unwrap();

        let mut bytes = [0; 6];
        assert_eq!(pread(&grant, &mut bytes, 10), Ok(6));
        assert_eq!(&bytes, b"shared");
        assert_eq!(pwrite(&grant, b"x", 10), Err(Errno::BADF));
        let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        assert_eq!(fallocate(&grant, punch, 0, 4096), Err(Errno::BADF));
    }

    #[test]
    fn a_read_only_grant_maps_read_only_alone() {
        let region = region();
        let grant = region.grant(Access::ReadOnly).unwrap();
        let mut client = SharedMemory::reserve(LEN, 4096).unwrap();

        let refused = client
            .map_at(0, LEN, grant.as_fd(), Access::ReadWrite)
            .unwrap_err();

        assert!(
            matches!(
                refused,
                MapError::NotPermitted {
                    wanted: Access::ReadWrite
                }
            ),
            "{refused}"
        );
        client
            .map_at(0, LEN, grant.as_fd(), Access::ReadOnly)
            .unwrap();
    }

    #[test]
    fn both_sides_see_each_others_bytes() {
        let region = region();
        let grant = region.grant(Access::ReadWrite).unwrap();
        let mut client = SharedMemory::reserve(LEN, 4096).unwrap();
        client
            .map_at(0, LEN, grant.as_fd(), Access::ReadWrite)
            .unwrap();

        region.memory().copy_in(4090, b"to the client").unwrap();
        client.copy_in(LEN - 4, b"back").unwrap();

        let (mut there, mut back) = ([0; 13], [0; 4]);
        client.copy_out(4090, &mut there).unwrap();
        region.memory().copy_out(LEN - 4, &mut back).unwrap();
        assert_eq!((&there, &back), (b"to the client", b"back"));
    }

    /// Offset and status flags belong to the description: if they differ, so do the descriptions.
    #[test]
    fn what_a_client_does_to_its_description_reaches_nobody_else() {
        let region = region();
        let grant = region.grant(Access::ReadWrite).unwrap();
        let other = region.grant(Access::ReadWrite).unwrap();

        seek(&grant, SeekFrom::Start(77)).unwrap();
        fcntl_setfl(&grant, OFlags::APPEND).unwrap();

        for untouched in [region.memfd.as_file().as_fd(), other.as_fd()] {
            assert_eq!(tell(untouched), Ok(0));
            assert!(!fcntl_getfl(untouched).unwrap().contains(OFlags::APPEND));
        }
    }

    #[test]
    fn every_grant_is_the_same_file_and_is_closed_on_exec() {
        let region = region();

        for grant in both_grants(&region) {
            let stat = fstat(&grant).unwrap();
            assert_eq!(
                FileIdentity {
                    dev: stat.st_dev,
                    ino: stat.st_ino
                },
                region.identity()
            );
            assert!(fcntl_getfd(&grant).unwrap().contains(FdFlags::CLOEXEC));
        }
        assert_ne!(region.identity(), self::region().identity());
    }

    #[test]
    fn a_grant_keeps_the_memory_when_the_region_is_gone() {
        let region = region();
        region.memory().copy_in(0, b"still here").unwrap();
        let grant = OwnedFd::from(region.grant(Access::ReadOnly).unwrap());

        drop(region);

        let mut bytes = [0; 10];
        assert_eq!(pread(&grant, &mut bytes, 0), Ok(10));
        assert_eq!(&bytes, b"still here");
    }

    /// Machines differ in whether they have huge pages; none may do anything else than say so.
    #[test]
    fn a_hugetlb_region_is_made_and_mapped_or_refused_for_want_of_memory() {
        const LEN: u64 = 4 << 20;
        match Region::create("owned-huge", LEN, Backing::Hugetlb2M) {
            Ok(region) => {
                region.memory().copy_in(LEN - 3, b"end").unwrap();
                let grant = region.grant(Access::ReadWrite).unwrap();
                let mut client = SharedMemory::reserve(3 * LEN, 2 << 20).unwrap();
                client
                    .map_at(LEN, LEN, grant.as_fd(), Access::ReadOnly)
                    .unwrap();
                let mut bytes = [0; 3];
                client.copy_out(2 * LEN - 3, &mut bytes).unwrap();
                assert_eq!(&bytes, b"end");
            }
            Err(RegionError::NoMemory { want_bytes }) => assert_eq!(want_bytes, LEN),
            Err(other) => panic!("{other:?}"),
        }
    }
}
