//! Bytes of regions, counted before the kernel is asked for them: past a
//! cgroup's limit an allocation is no error but the end of the process.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use domain_core::iotlb::Allowance;
use domain_core::limits::TABLE_BYTES_UNCOUNTED;

/// How many bytes of regions the daemon may hold. Clones share the count.
#[derive(Clone, Debug)]
pub(crate) struct Budget(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    limit_bytes: u64,
    /// Never above `limit_bytes`. Held for one addition or subtraction.
    used_bytes: Mutex<u64>,
}

/// A part of the budget; dropping it gives the part back.
#[derive(Debug)]
pub(crate) struct Share {
    budget: Budget,
    bytes: u64,
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
        let mut used = self.budget.lock();
        let others = *used - self.bytes;
        let sum = others.checked_add(bytes);
        let Some(sum) = sum.filter(|sum| bytes <= self.bytes || *sum <= self.budget.limit_bytes())
        else {
            return false;
        };
        *used = sum;
        drop(used);
        self.bytes = bytes;
        true
    }
}

/// The budget does not allow it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{want_bytes} bytes of regions, {used_bytes} of the daemon's {limit_bytes} are in use")]
pub(crate) struct OverBudget {
    pub(crate) want_bytes: u64,
    pub(crate) used_bytes: u64,
    pub(crate) limit_bytes: u64,
}

impl Budget {
    pub(crate) fn new(limit_bytes: u64) -> Budget {
        Budget(Arc::new(Shared {
            limit_bytes,
            used_bytes: Mutex::new(0),
        }))
    }

    pub(crate) fn limit_bytes(&self) -> u64 {
        self.0.limit_bytes
    }

    pub(crate) fn used_bytes(&self) -> u64 {
        *self.lock()
    }

    /// Sets `bytes` aside.
    ///
    /// # Errors
    /// [`OverBudget`]; nothing is set aside.
    pub(crate) fn take(&self, bytes: u64) -> Result<Share, OverBudget> {
        let mut used = self.lock();
        let limit_bytes = self.0.limit_bytes;
        let over = OverBudget {
            want_bytes: bytes,
            used_bytes: *used,
            limit_bytes,
        };
        *used = used
            .checked_add(bytes)
            .filter(|sum| *sum <= limit_bytes)
            .ok_or(over)?;
        Ok(Share {
            budget: self.clone(),
            bytes,
        })
    }

    fn lock(&self) -> MutexGuard<'_, u64> {
        self.0
            .used_bytes
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        *self.budget.lock() -= self.bytes;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_share_counts_until_it_is_dropped() {
        let budget = Budget::new(100);
        let share = budget.take(60).unwrap();
        let refused = OverBudget {
            want_bytes: 41,
            used_bytes: 60,
            limit_bytes: 100,
        };
        assert_eq!(budget.take(41).unwrap_err(), refused);
        assert_eq!(budget.take(u64::MAX).unwrap_err().used_bytes, 60);
        drop(share);
        assert_eq!(budget.used_bytes(), 0);
        assert!(budget.take(100).is_ok());
    }

    #[test]
    fn a_table_counts_for_what_it_has_grown_to() {
        const FREE: u64 = TABLE_BYTES_UNCOUNTED;
        let budget = Budget::new(100);
        let table = TableShare::new(&budget);
        assert!(table.allow(FREE));
        assert_eq!(budget.used_bytes(), 0);
        assert!(table.allow(FREE + 60) && table.allow(FREE + 70));
        assert_eq!(budget.used_bytes(), 70);
        let regions = budget.take(30).unwrap();
        assert!(!table.allow(FREE + 71));
        assert!(table.allow(FREE + 40));
        assert_eq!(budget.used_bytes(), 70);
        drop((table, regions));
        assert_eq!(budget.used_bytes(), 0);
    }
}
