//! Making memfds: created, protected, sized, allocated, sealed; in this order, before anybody else
//! can hold them.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;

use memfd::{FileSeal, Memfd};
use rustix::fs::{FallocateFlags, MemfdFlags, Mode, fallocate, fchmod, ftruncate, memfd_create};
use rustix::io::{Errno, retry_on_intr};

use super::mapping::MapError;
use super::seals::Seals;

/// The kernel's limit for a memfd's name, in bytes.
const NAME_BYTES_MAX: usize = 249;

/// How much is allocated in one system call, in bytes: about 1 ms of work. A signal makes the
/// kernel give back all that the call had allocated, so that with large steps a profiler's timer
/// could keep us here for ever.
const ALLOCATE_STEP_BYTES: u64 = 4 << 20;

/// What kind of pages is behind a memfd.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Backing {
    /// Ordinary pages of 4 KiB.
    Memfd,
    /// Huge pages of 2 MiB, from the pool that the administrator has set aside. Sparing with TLB
    /// entries.
    Hugetlb2M,
}

impl Backing {
    /// The unit of allocation in bytes: lengths are multiples of it.
    pub fn page_bytes(self) -> u64 {
        match self {
            Backing::Memfd => 4 << 10,
            Backing::Hugetlb2M => 2 << 20,
        }
    }

    fn flags(self) -> MemfdFlags {
        match self {
            Backing::Memfd => MemfdFlags::empty(),
            Backing::Hugetlb2M => MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB,
        }
    }
}

/// Why a memfd could not be made or granted. A half-made one is gone.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)] // the messages are the docs
pub enum RegionError {
    #[error("a memfd's name has no NUL and at most {NAME_BYTES_MAX} bytes (this has {bytes})")]
    BadName { bytes: usize },
    #[error("length {len} is not a positive multiple of {unit} bytes")]
    BadLength { len: u64, unit: u64 },
    #[error("no memory for {want_bytes} bytes")]
    NoMemory { want_bytes: u64 },
    #[error("create the memfd")]
    Create(#[source] io::Error),
    #[error("set the memfd's mode to 0600")]
    Protect(#[source] io::Error),
    #[error("set the memfd's size to {len} bytes")]
    Resize { len: u64, source: io::Error },
    #[error("allocate the memfd's pages")]
    Allocate(#[source] io::Error),
    #[error("seal the memfd")]
    Seal(#[source] io::Error),
    #[error("the memfd did not take the seals (it has: {seals})")]
    NotSealed { seals: Seals },
    #[error("map the memfd")]
    Map(#[from] MapError),
    #[error("look up the memfd's inode")]
    Inspect(#[source] io::Error),
    #[error("open the memfd again through /proc/self/fd")]
    Reopen(#[source] io::Error),
    #[error("mark the grant with {mark}")]
    Mark { mark: u64, source: io::Error },
}

/// Makes a memfd that a driver can register: `len_bytes` of zeroes, mode 0600, close-on-exec,
/// allocated, of fixed size. `name` shows in `/proc` only.
///
/// `len_bytes` is a positive multiple of 4 KiB. The pages are charged to the caller's cgroup.
///
/// # Errors
///
/// [`RegionError::NoMemory`] when the pages cannot be had; past a cgroup's limit the kernel may
/// kill instead.
pub fn driver_memfd(name: &str, len_bytes: u64) -> Result<OwnedFd, RegionError> {
    let memfd = allocated(name, len_bytes, Backing::Memfd)?;
    seal(&memfd, &[FileSeal::SealShrink, FileSeal::SealGrow])?;
    Ok(memfd.into_file().into())
}

/// A memfd of mode 0600 that has its size and its pages, and no seals yet but the one against
/// execution.
///
/// Pages are allocated here, not touched later: then running out is an error of this call and never
/// a SIGBUS, and the pages are charged to us, not to the client that touches them first.
pub(super) fn allocated(
    name: &str,
    len_bytes: u64,
    backing: Backing,
) -> Result<Memfd, RegionError> {
    let memfd = sized(name, len_bytes, backing)?;
    allocate(memfd.as_file(), 0, len_bytes)?;
    Ok(memfd)
}

/// As `allocated`, but without pages.
pub(super) fn sized(name: &str, len_bytes: u64, backing: Backing) -> Result<Memfd, RegionError> {
    let unit = backing.page_bytes();
    if len_bytes == 0 || !len_bytes.is_multiple_of(unit) {
        return Err(RegionError::BadLength {
            len: len_bytes,
            unit,
        });
    }
    if name.len() > NAME_BYTES_MAX || name.contains('\0') {
        return Err(RegionError::BadName { bytes: name.len() });
    }
    let memfd = create(name, backing)?;
    let file = memfd.as_file();
    fchmod(file, Mode::RUSR | Mode::WUSR).map_err(|errno| RegionError::Protect(errno.into()))?;
    ftruncate(file, len_bytes).map_err(|errno| RegionError::Resize {
        len: len_bytes,
        source: errno.into(),
    })?;
    Ok(memfd)
}

/// Adds the seals, and asks the kernel whether they are there.
pub(super) fn seal(memfd: &Memfd, wanted: &[FileSeal]) -> Result<(), RegionError> {
    memfd.add_seals(wanted).map_err(seal_error)?;
    let present = memfd.seals().map_err(seal_error)?;
    if wanted.iter().all(|seal| present.contains(seal)) {
        return Ok(());
    }
    let seals = Seals::of(std::os::fd::AsFd::as_fd(memfd.as_file()))
        .map_err(|errno| RegionError::Seal(errno.into()))?;
    Err(RegionError::NotSealed { seals })
}

/// Created with rustix: the memfd crate makes mode 0777 and has no `NOEXEC_SEAL`. Its types do the
/// rest.
fn create(name: &str, backing: Backing) -> Result<Memfd, RegionError> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING | backing.flags();
    let created = match memfd_create(name, flags | MemfdFlags::NOEXEC_SEAL) {
        // Kernels before 6.3. The mode will lack the x bits all the same, but the owner could set
        // them.
        Err(Errno::INVAL) => memfd_create(name, flags),
        answer => answer,
    };
    let file = File::from(created.map_err(|errno| RegionError::Create(errno.into()))?);
    Memfd::try_from_file(file).map_err(|_| RegionError::Create(io::ErrorKind::Unsupported.into()))
}

/// Allocates the pages from `start` to `end`, those that are there already not again.
pub(super) fn allocate(file: &File, start: u64, end: u64) -> Result<(), RegionError> {
    let mut done = start;
    while done < end {
        let step = ALLOCATE_STEP_BYTES.min(end - done);
        match retry_on_intr(|| fallocate(file, FallocateFlags::empty(), done, step)) {
            Ok(()) => done += step,
            Err(Errno::NOSPC | Errno::NOMEM) => {
                return Err(RegionError::NoMemory { want_bytes: end });
            }
            Err(errno) => return Err(RegionError::Allocate(errno.into())),
        }
    }
    Ok(())
}

/// The operating system's error alone: ours already says what was tried.
fn seal_error(error: memfd::Error) -> RegionError {
    match error {
        memfd::Error::Create(source)
        | memfd::Error::AddSeals(source)
        | memfd::Error::GetSeals(source) => RegionError::Seal(source),
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use rustix::fs::{SealFlags, fcntl_add_seals, fcntl_get_seals, fstat};
    use rustix::io::{FdFlags, fcntl_getfd};

    use super::*;

    #[test]
    fn a_driver_memfd_has_a_fixed_size_and_can_still_be_sealed_further() {
        let fd = driver_memfd("driver", 3 * 4096).unwrap();

        assert_eq!(ftruncate(&fd, 4096), Err(Errno::PERM));
        assert_eq!(ftruncate(&fd, 4 * 4096), Err(Errno::PERM));
        assert_eq!(fcntl_add_seals(&fd, SealFlags::FUTURE_WRITE), Ok(()));
    }

    #[test]
    fn a_driver_memfd_is_private_allocated_and_closed_on_exec() {
        let fd = driver_memfd("driver", 3 * 4096).unwrap();

        let stat = fstat(&fd).unwrap();
        assert_eq!(stat.st_mode & 0o777, 0o600);
        assert_eq!(stat.st_blocks * 512, 3 * 4096);
        assert!(fcntl_getfd(&fd).unwrap().contains(FdFlags::CLOEXEC));
    }

    #[test]
    fn where_the_kernel_can_forbid_execution_for_good_it_is_asked_to() {
        let fd = driver_memfd("noexec", 4096).unwrap();
        let is_sealed = fcntl_get_seals(&fd).unwrap().contains(SealFlags::EXEC);
        let can_be_sealed = memfd_create("probe", MemfdFlags::NOEXEC_SEAL).is_ok();

        assert_eq!(is_sealed, can_be_sealed);
        if can_be_sealed {
            assert_eq!(fchmod(&fd, Mode::RWXU), Err(Errno::PERM));
        }
    }

    #[test]
    fn memory_larger_than_one_allocation_step_is_allocated_to_its_end() {
        // One step and a page.
        let len_bytes = ALLOCATE_STEP_BYTES + 4096;

        let fd = driver_memfd("steps", len_bytes).unwrap();

        let stat = fstat(&fd).unwrap();
        assert_eq!(u64::try_from(stat.st_size).unwrap(), len_bytes);
        assert_eq!(u64::try_from(stat.st_blocks).unwrap() * 512, len_bytes);
    }

    #[test]
    fn lengths_that_are_not_whole_pages_are_refused_with_the_unit() {
        for len in [0, 1, 4095, 4097] {
            let refused = driver_memfd("length", len).unwrap_err();
            assert!(
                matches!(refused, RegionError::BadLength { len: l, unit: 4096 } if l == len),
                "{refused}"
            );
        }
        let refused = allocated("length", 4096, Backing::Hugetlb2M).unwrap_err();
        assert!(
            matches!(
                refused,
                RegionError::BadLength {
                    len: 4096,
                    unit: 0x20_0000
                }
            ),
            "{refused}"
        );
    }

    #[test]
    fn a_length_beyond_what_files_can_have_is_an_error_and_not_a_wrapped_sum() {
        let refused = driver_memfd("huge", u64::MAX - 4095).unwrap_err();

        assert!(matches!(refused, RegionError::Resize { .. }), "{refused}");
    }

    #[test]
    fn names_that_the_kernel_would_not_take_are_refused() {
        let long = "x".repeat(NAME_BYTES_MAX + 1);

        assert!(matches!(
            driver_memfd("a\0b", 4096),
            Err(RegionError::BadName { bytes: 3 })
        ));
        assert!(matches!(
            driver_memfd(&long, 4096),
            Err(RegionError::BadName { bytes: 250 })
        ));
        assert!(driver_memfd(&long[..NAME_BYTES_MAX], 4096).is_ok());
    }

    #[test]
    fn sealing_a_file_that_takes_no_seals_is_an_error() {
        let memfd = allocated("sealed", 4096, Backing::Memfd).unwrap();
        seal(&memfd, &[FileSeal::SealSeal]).unwrap();

        let refused = seal(&memfd, &[FileSeal::SealShrink]).unwrap_err();

        assert!(
            matches!(&refused, RegionError::Seal(e) if e.raw_os_error() == Some(libc::EPERM)),
            "{refused}"
        );
        assert!(
            !Seals::of(memfd.as_file().as_fd())
                .unwrap()
                .forbid_shrinking()
        );
    }
}
