//! Registered memory that this session has fetched, by the number of its
//! region in the page table.

use std::collections::HashMap;
use std::fmt;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use domain_core::iotlb::RegionId;
use domain_core::limits::MEMORIES_PER_DOMAIN_MOST;
use domain_core::region::{Access, MapError, Window, Windows};
use domaind_proto::v1;

use crate::apertures::{HUGE_PAGE_BYTES, page_bytes};

/// Numbers that regions can have: the apertures', and those of registered
/// memory.
const REGIONS: usize = MEMORIES_PER_DOMAIN_MOST as usize + 2;
/// Fetches of as many different regions run at a time, at most.
const STRIPES: usize = 16;

/// Memory that is mapped whole, once, at an address of its own. Memory that was
/// closed and is opened again lies elsewhere.
pub(crate) struct Opened {
    windows: Windows,
    /// What can be found in `windows`. Held for single operations and a
    /// mapping.
    open: Mutex<HashMap<RegionId, Arc<Window>>>,
    /// Held by who asks the daemon for a region of this remainder.
    fetching: [tokio::sync::Mutex<()>; STRIPES],
}

impl Opened {
    pub(crate) fn new() -> Opened {
        Opened {
            windows: Windows::new(REGIONS),
            open: Mutex::default(),
            fetching: [(); STRIPES].map(|()| tokio::sync::Mutex::default()),
        }
    }

    /// The memory behind a region, if it is open. Takes no lock.
    #[inline]
    pub(crate) fn get(&self, region: RegionId) -> Option<&Window> {
        self.windows.get(region.get() as usize)
    }

    /// Can there be such a region of registered memory?
    pub(crate) fn can_be(region: RegionId) -> bool {
        region.slot().is_some() && (region.get() as usize) < REGIONS
    }

    /// Let in one at a time: who waited finds open what the other has fetched.
    pub(crate) async fn fetch_alone(&self, region: RegionId) -> tokio::sync::MutexGuard<'_, ()> {
        self.fetching[region.get() as usize % STRIPES].lock().await
    }

    /// Maps what the daemon has sent, so far as it is whole pages: direct
    /// mappings are. The fd is closed. What is open already stays.
    pub(crate) fn put(
        &self,
        region: RegionId,
        opened: &v1::MemoryOpened,
        fd: OwnedFd,
        access: Access,
    ) -> Result<(), MapError> {
        let mut open = self.open();
        if open.contains_key(&region) {
            return Ok(());
        }
        let access = match opened.writable {
            true => access,
            false => Access::ReadOnly,
        };
        let align_bytes = match opened.hugetlb {
            true => HUGE_PAGE_BYTES,
            false => page_bytes(),
        };
        let len_bytes = opened.size_bytes - opened.size_bytes % page_bytes();
        let window = Arc::new(Window::map(fd.as_fd(), len_bytes, align_bytes, access)?);
        self.windows.put(region.get() as usize, Arc::clone(&window));
        open.insert(region, window);
        Ok(())
    }

    /// From now on nobody finds it here. Who has, may go on until the answer
    /// is revoked.
    pub(crate) fn retire(&self, region: RegionId) -> Option<Arc<Window>> {
        let retired = self.open().remove(&region)?;
        self.windows.take(region.get() as usize);
        Some(retired)
    }

    pub(crate) fn retire_all(&self) -> Vec<Arc<Window>> {
        let mut open = self.open();
        for region in open.keys() {
            self.windows.take(region.get() as usize);
        }
        open.drain().map(|(_, window)| window).collect()
    }

    fn open(&self) -> MutexGuard<'_, HashMap<RegionId, Arc<Window>>> {
        // A map after a panic is still a map.
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Opened {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Opened")
            .field("regions", &self.open().len())
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use domain_core::region::driver_memfd;

    use super::*;

    const PAGE: u64 = 4096;
    const REGION: RegionId = RegionId::memory_slot(0);

    fn put(opened: &Opened, size_bytes: u64, writable: bool) -> Result<(), MapError> {
        let fd = driver_memfd("opened-test", 2 * PAGE).unwrap();
        let answer = v1::MemoryOpened {
            memory_id: 1,
            size_bytes,
            writable,
            hugetlb: false,
            access_enforced: true,
        };
        opened.put(REGION, &answer, fd, Access::ReadWrite)
    }

    fn address(opened: &Opened) -> Option<*const u8> {
        Some(opened.get(REGION)?.rest(0)?.as_ptr())
    }

    #[test]
    fn what_is_open_is_opened_once_and_what_was_closed_is_opened_elsewhere() {
        let opened = Opened::new();
        put(&opened, 2 * PAGE, true).unwrap();
        let first = address(&opened).unwrap();

        put(&opened, 2 * PAGE, true).unwrap();
        assert_eq!(address(&opened), Some(first));

        let retired = opened.retire(REGION).unwrap();
        assert_eq!(address(&opened), None);
        assert!(opened.retire(REGION).is_none());
        retired.revoke().unwrap();
        put(&opened, 2 * PAGE, true).unwrap();
        assert_ne!(address(&opened), Some(first));
        assert_eq!(opened.retire_all().len(), 1);
        assert_eq!(address(&opened), None);
    }

    #[test]
    fn a_part_of_a_page_is_not_mapped_and_memory_without_a_whole_one_is_refused() {
        let opened = Opened::new();
        assert!(put(&opened, PAGE - 1, true).is_err());
        assert!(put(&opened, 3 * PAGE, true).is_err(), "more than there is");

        put(&opened, 2 * PAGE - 1, false).unwrap();

        let window = opened.get(REGION).unwrap();
        assert_eq!(window.len_bytes(), PAGE);
        assert_eq!(window.rest(0).unwrap().access(), Access::ReadOnly);
    }

    #[test]
    fn apertures_and_numbers_that_no_domain_has_are_no_registered_memory() {
        let last = u32::try_from(REGIONS).unwrap() - 1;
        let can_be = |number| Opened::can_be(RegionId::from_number(number).unwrap());
        assert!(can_be(2) && can_be(last));
        assert!(!can_be(0) && !can_be(1) && !can_be(last + 1));
    }
}
