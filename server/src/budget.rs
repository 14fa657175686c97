//! Bytes of regions, counted before the kernel is asked for them: past a
//! cgroup's limit an allocation is no error but the end of the process.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use domain_core::iotlb::Allowance;
use domain_core::limits::TABLE_BYTES_UNCOUNTED;

/// How many bytes of regions the daemon may hold. Clones share the count.
#[derive(Clone, Debug)]
pub(crate) struct Budget(
    /// Held for one addition or subtraction.
    Arc<Mutex<Counts>>,
);

/// What may be held at most. What is held already may be more, after a change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Limits {
    /// Of all pages: `limits.region_bytes`.
    pub(crate) all_bytes: u64,
    /// Of ordinary pages: what the memory of this process (machine or cgroup) has
    /// room for. Huge pages come from a pool of their own, which no cgroup's memory
    /// limit counts.
    pub(crate) ordinary_bytes: u64,
}

#[derive(Debug)]
struct Counts {
    limits: Limits,
    all_bytes: u64,
    ordinary_bytes: u64,
}

/// Which pages are counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Pages {
    Ordinary,
    Huge,
}

/// A part of the budget; dropping it gives the part back.
#[derive(Debug)]
pub(crate) struct Share {
    budget: Budget,
    bytes: u64,
    pages: Pages,
}

impl Limits {
    /// What memory leaves for regions of ordinary pages: all but an eighth of it,
    /// or 32 MiB if that is more, and half of it at the most, which the daemon
    /// needs for itself.
    pub(crate) fn within(region_bytes: u64, memory_bytes: u64) -> Limits {
        const LEAST_FOR_ITSELF: u64 = 32 << 20;
        let for_itself = (memory_bytes / 8)
            .max(LEAST_FOR_ITSELF)
            .min(memory_bytes / 2);
        Limits {
            all_bytes: region_bytes,
            ordinary_bytes: memory_bytes - for_itself,
        }
    }
}

impl Counts {
    /// Counts `new` bytes where `old` were.
    fn exchange(&mut self, old: u64, new: u64, pages: Pages) -> Result<(), OverBudget> {
        let all = sum(
            self.all_bytes - old,
            new,
            self.limits.all_bytes,
            Whose::Daemon,
        );
        let ordinary = match pages {
            Pages::Ordinary => {
                let others = self.ordinary_bytes - old;
                sum(others, new, self.limits.ordinary_bytes, Whose::Memory)
            }
            Pages::Huge => Ok(self.ordinary_bytes),
        };
        // To give back is always allowed, also above a limit that came later.
        match (all, ordinary) {
            (Ok(all), Ok(ordinary)) => (self.all_bytes, self.ordinary_bytes) = (all, ordinary),
            (Err(over), _) | (_, Err(over)) if new > old => return Err(over),
            _ => self.give_back(old - new, pages),
        }
        Ok(())
    }

    fn give_back(&mut self, bytes: u64, pages: Pages) {
        self.all_bytes -= bytes;
        if pages == Pages::Ordinary {
            self.ordinary_bytes -= bytes;
        }
    }
}

fn sum(
    used_bytes: u64,
    want_bytes: u64,
    limit_bytes: u64,
    whose: Whose,
) -> Result<u64, OverBudget> {
    let sum = used_bytes.checked_add(want_bytes);
    sum.filter(|sum| *sum <= limit_bytes).ok_or(OverBudget {
        want_bytes,
        used_bytes,
        limit_bytes,
        whose,
    })
}

/// What a domain's page table takes of the budget: what it has grown to beyond
/// its first bytes.
#[derive(Debug)]
pub(crate) struct TableShare(Mutex<Share>);

impl TableShare {
    pub(crate) fn new(budget: &Budget) -> TableShare {
        TableShare(Mutex::new(Share {
            budget: budget.clone(),
            bytes: 0,
            pages: Pages::Ordinary,
        }))
    }
}

impl Allowance for TableShare {
    fn allow(&self, total_bytes: u64) -> bool {
        let mut share = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        share.resize(total_bytes.saturating_sub(TABLE_BYTES_UNCOUNTED))
    }
}

impl Share {
    /// Makes it so many bytes, if the budget allows it.
    fn resize(&mut self, bytes: u64) -> bool {
        let resized = self.budget.lock().exchange(self.bytes, bytes, self.pages);
        if resized.is_ok() {
            self.bytes = bytes;
        }
        resized.is_ok()
    }
}

/// The budget does not allow it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{want_bytes} bytes of regions, {used_bytes} of {limit_bytes} are in use: {whose}")]
pub(crate) struct OverBudget {
    pub(crate) want_bytes: u64,
    pub(crate) used_bytes: u64,
    pub(crate) limit_bytes: u64,
    pub(crate) whose: Whose,
}

/// Which limit it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Whose {
    /// What the daemon was told.
    Daemon,
    /// What there is.
    Memory,
}

impl fmt::Display for Whose {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Whose::Daemon => "the daemon's limits.region_bytes",
            Whose::Memory => "what the daemon's memory (machine or cgroup) has room for",
        })
    }
}

impl Budget {
    pub(crate) fn new(limits: Limits) -> Budget {
        Budget(Arc::new(Mutex::new(Counts {
            limits,
            all_bytes: 0,
            ordinary_bytes: 0,
        })))
    }

    pub(crate) fn limit_bytes(&self) -> u64 {
        self.lock().limits.all_bytes
    }

    pub(crate) fn used_bytes(&self) -> u64 {
        self.lock().all_bytes
    }

    /// From now on these. What is held stays, also above them.
    pub(crate) fn set_limits(&self, limits: Limits) {
        self.lock().limits = limits;
    }

    /// Sets `bytes` aside.
    ///
    /// # Errors
    /// [`OverBudget`]; nothing is set aside.
    pub(crate) fn take(&self, bytes: u64, pages: Pages) -> Result<Share, OverBudget> {
        self.lock().exchange(0, bytes, pages)?;
        Ok(Share {
            budget: self.clone(),
            bytes,
            pages,
        })
    }

    /// Could `bytes` be set aside if this share were given back first?
    ///
    /// # Errors
    /// [`OverBudget`] if not.
    pub(crate) fn check_instead_of(
        &self,
        share: &Share,
        bytes: u64,
        pages: Pages,
    ) -> Result<(), OverBudget> {
        let counts = self.lock();
        let mut without = Counts { ..*counts };
        drop(counts);
        without.give_back(share.bytes, share.pages);
        without.exchange(0, bytes, pages)
    }

    fn lock(&self) -> MutexGuard<'_, Counts> {
        // A panic leaves it whole: numbers are changed after they are checked.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.budget.lock().give_back(self.bytes, self.pages);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn budget(all_bytes: u64) -> Budget {
        Budget::new(Limits {
            all_bytes,
            ordinary_bytes: u64::MAX,
        })
    }

    #[test]
    fn a_share_counts_until_it_is_dropped() {
        let budget = budget(100);
        let share = budget.take(60, Pages::Ordinary).unwrap();
        let refused = OverBudget {
            want_bytes: 41,
            used_bytes: 60,
            limit_bytes: 100,
            whose: Whose::Daemon,
        };
        assert_eq!(budget.take(41, Pages::Huge).unwrap_err(), refused);
        let whole = budget.take(u64::MAX, Pages::Ordinary).unwrap_err();
        assert_eq!(whole.used_bytes, 60);
        drop(share);
        assert_eq!(budget.used_bytes(), 0);
        assert!(budget.take(100, Pages::Ordinary).is_ok());
    }

    #[test]
    fn a_table_counts_for_what_it_has_grown_to() {
        const FREE: u64 = TABLE_BYTES_UNCOUNTED;
        let budget = budget(100);
        let table = TableShare::new(&budget);
        assert!(table.allow(FREE));
        assert_eq!(budget.used_bytes(), 0);
        assert!(table.allow(FREE + 60) && table.allow(FREE + 70));
        assert_eq!(budget.used_bytes(), 70);
        let regions = budget.take(30, Pages::Ordinary).unwrap();
        assert!(!table.allow(FREE + 71));
        assert!(table.allow(FREE + 40));
        assert_eq!(budget.used_bytes(), 70);
        drop((table, regions));
        assert_eq!(budget.used_bytes(), 0);
    }

    #[test]
    fn a_limit_below_what_is_used_stops_what_is_new_and_nothing_else() {
        const FREE: u64 = TABLE_BYTES_UNCOUNTED;
        let budget = budget(100);
        let table = TableShare::new(&budget);
        let share = budget.take(60, Pages::Ordinary).unwrap();
        assert!(table.allow(FREE + 30));
        budget.set_limits(Limits {
            all_bytes: 50,
            ordinary_bytes: 50,
        });
        assert_eq!(budget.take(1, Pages::Huge).unwrap_err().used_bytes, 90);
        assert!(!table.allow(FREE + 31));
        assert!(table.allow(FREE + 20), "giving back");
        assert_eq!(budget.used_bytes(), 80);
        drop(share);
        assert!(table.allow(FREE + 50));
        assert!(budget.take(1, Pages::Ordinary).is_err());
    }

    #[test]
    fn ordinary_pages_have_no_more_than_memory_has_room_for_whatever_was_told() {
        let budget = Budget::new(Limits::within(1024 * MIB, 64 * MIB));
        let refused = budget.take(128 * MIB, Pages::Ordinary).unwrap_err();
        assert_eq!(refused.whose, Whose::Memory);
        assert_eq!(refused.limit_bytes, 32 * MIB);
        // They come from a pool of their own.
        let huge = budget.take(128 * MIB, Pages::Huge).unwrap();
        assert!(budget.take(32 * MIB, Pages::Ordinary).is_ok());
        drop(huge);
        assert_eq!((budget.used_bytes(), budget.lock().ordinary_bytes), (0, 0));
    }

    #[test]
    fn memory_leaves_something_for_the_daemon_itself() {
        for (memory, ordinary) in [(0, 0), (16, 8), (64, 32), (128, 96), (1024, 896)] {
            let limits = Limits::within(u64::MAX, memory * MIB);
            assert_eq!(limits.ordinary_bytes, ordinary * MIB, "{memory} MiB");
            // The default, half of it, always has room.
            assert!(limits.ordinary_bytes >= memory * MIB / 2);
        }
    }

    #[test]
    fn what_would_be_given_back_first_is_not_in_the_way() {
        let budget = budget(100);
        let old = budget.take(60, Pages::Ordinary).unwrap();
        assert!(budget.check_instead_of(&old, 100, Pages::Ordinary).is_ok());
        assert!(budget.check_instead_of(&old, 101, Pages::Ordinary).is_err());
        assert_eq!(budget.used_bytes(), 60);
    }
}
