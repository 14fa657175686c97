//! Tables from ranges of addresses to where they lead.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard};

use domain_core::iotlb::{
    DirectTable, Entry, Hit, Iotlb, RegionId, RegionWords, Replaced, Target, Walker,
};
use domain_core::layout::DEFAULT_APERTURE_BYTES;
use domain_core::limits::TABLE_BYTES_PER_DOMAIN;
use domain_core::{Granule, Iova, IovaRange, Perm};
use nodit::interval::ii;
use nodit::{Interval, NoditMap};
use rangemap::RangeMap;
pub(crate) use vm_memory::Iotlb as VmIotlb;
use vm_memory::iommu::{self, Iommu, IotlbIterator, IovaRange as VmRange};
use vm_memory::{GuestAddress, GuestMemory, GuestMemoryMmap, IommuMemory, Permissions};

use crate::rounds::Role;

use super::PAGE;

/// One range that leads somewhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Mapping {
    pub(crate) start: u64,
    /// Whole pages.
    pub(crate) len_bytes: u64,
    /// Where its first byte leads; whole pages too.
    pub(crate) target: u64,
}

impl Mapping {
    pub(crate) fn entry(self) -> Entry {
        let range = IovaRange::from_len(Iova::new(self.start), self.len_bytes);
        Entry {
            range: range.expect("it is not empty"),
            target: Target {
                region: RegionId::memory_slot(0),
                offset_bytes: self.target,
            },
            perm: Perm::ReadWrite,
        }
    }

    fn end(self) -> u64 {
        self.start + self.len_bytes
    }

    fn range(self) -> Range<u64> {
        self.start..self.end()
    }

    fn interval(self) -> Interval<u64> {
        ii(self.start, self.end() - 1)
    }

    fn leads(self) -> Leads {
        Leads {
            diff: self.target.wrapping_sub(self.start),
            perm: READ_WRITE,
        }
    }
}

/// What the ordered maps hold: as vm-memory does it, what is to be added to an
/// address. The key is then not needed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Leads {
    diff: u64,
    perm: u8,
}

/// Where one address leads, and what may be done there.
type Found = (u64, u8);

const READ_WRITE: u8 = 3;

impl Leads {
    fn at(self, iova: u64) -> Found {
        (iova.wrapping_add(self.diff), self.perm)
    }
}

/// Translates addresses.
pub(crate) trait Table: Send + Sync + Sized {
    const NAME: &'static str;
    const ROLE: Role = Role::Peer;
    /// Must each of several readers take a lock, because there is a writer?
    const LOCKS: bool = true;
    type Found;

    /// Of mappings that do not overlap, in any order.
    fn build(mappings: &[Mapping]) -> Self;
    fn lookup(&self, iova: u64) -> Option<Self::Found>;
}

/// One that can be changed range by range.
pub(crate) trait Editable: Table {
    /// Where nothing is mapped.
    fn insert(&mut self, mapping: Mapping);
    /// What was inserted exactly so.
    fn remove(&mut self, mapping: Mapping);
}

pub(crate) type RangeMapTable = RangeMap<u64, Leads>;
pub(crate) type NoditTable = NoditMap<u64, Interval<u64>, Leads>;
/// By start: last byte, and where it leads.
pub(crate) type BTreeTable = BTreeMap<u64, (u64, Leads)>;

/// Ours, in a memfd as the service has it, with the apertures of a default
/// domain.
pub(crate) struct IotlbTable {
    iotlb: Iotlb<RegionWords>,
    walker: Walker<Arc<RegionWords>>,
}

impl IotlbTable {
    pub(crate) fn walker(&self) -> Walker<Arc<RegionWords>> {
        self.walker.clone()
    }

    pub(crate) fn generation(&self) -> u64 {
        self.iotlb.generation()
    }

    pub(crate) fn replace(&mut self, table: &DirectTable) -> Replaced {
        self.iotlb.replace_direct(table).expect("there is room")
    }

    /// Nobody reads what is older than the present state.
    pub(crate) fn reclaim(&mut self) {
        self.iotlb.reclaim(self.iotlb.generation());
    }
}

impl Table for IotlbTable {
    const NAME: &'static str = "domaind";
    const ROLE: Role = Role::Ours;
    const LOCKS: bool = false;
    type Found = Hit;

    fn build(mappings: &[Mapping]) -> IotlbTable {
        let words = RegionWords::create("compare", TABLE_BYTES_PER_DOMAIN, None).expect("a memfd");
        let apertures = IovaRange::from_len(Iova::new(0), 2 * DEFAULT_APERTURE_BYTES);
        let iotlb = Iotlb::new(words, Granule::Size4K, apertures.ok()).expect("there is room");
        let walker = iotlb.walker();
        built(IotlbTable { iotlb, walker }, mappings)
    }

    #[inline]
    fn lookup(&self, iova: u64) -> Option<Hit> {
        self.walker.translate(Iova::new(iova))
    }
}

impl Editable for IotlbTable {
    fn insert(&mut self, mapping: Mapping) {
        self.iotlb.insert(mapping.entry()).expect("there is room");
    }

    fn remove(&mut self, mapping: Mapping) {
        let removed = self.iotlb.remove(Iova::new(mapping.start));
        removed.expect("it is there");
        self.reclaim();
    }
}

impl Table for VmIotlb {
    const NAME: &'static str = "vm-memory";
    type Found = u64;

    fn build(mappings: &[Mapping]) -> VmIotlb {
        built(VmIotlb::new(), mappings)
    }

    #[inline]
    fn lookup(&self, iova: u64) -> Option<u64> {
        let found = VmIotlb::lookup(self, GuestAddress(iova), 1, Permissions::Read);
        Some(found.ok()?.next()?.base.0)
    }
}

impl Editable for VmIotlb {
    fn insert(&mut self, mapping: Mapping) {
        let (iova, target) = (GuestAddress(mapping.start), GuestAddress(mapping.target));
        self.set_mapping(iova, target, bytes(mapping), Permissions::ReadWrite)
            .expect("it never fails");
    }

    fn remove(&mut self, mapping: Mapping) {
        self.invalidate_mapping(GuestAddress(mapping.start), bytes(mapping));
    }
}

/// vm-memory's IOTLB and the memory behind it, as a device model uses them: one
/// lock, because mappings come and go.
pub(crate) struct VmMemory(IommuMemory<GuestMemoryMmap, Locked>);

#[derive(Debug)]
pub(crate) struct Locked(RwLock<VmIotlb>);

impl Iommu for Locked {
    type IotlbGuard<'a> = RwLockReadGuard<'a, VmIotlb>;

    fn translate(
        &self,
        base: GuestAddress,
        length: usize,
        access: Permissions,
    ) -> Result<IotlbIterator<RwLockReadGuard<'_, VmIotlb>>, iommu::Error> {
        let iotlb = self.0.read().unwrap_or_else(PoisonError::into_inner);
        VmIotlb::lookup(iotlb, base, length, access).map_err(|_| iommu::Error::CannotResolve {
            iova_range: VmRange { base, length },
            reason: "nobody knows more".to_owned(),
        })
    }
}

impl VmMemory {
    pub(crate) const NAME: &'static str = "IommuMemory + lock";

    /// Of mappings that lead to the first `bytes` of the memory.
    pub(crate) fn build(mappings: &[Mapping], bytes: u64) -> VmMemory {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), size(bytes))]);
        let iommu = Locked(RwLock::new(VmIotlb::build(mappings)));
        VmMemory(IommuMemory::new(
            memory.expect("addresses"),
            iommu,
            true,
            (),
        ))
    }

    /// The memory that a device reads at this address.
    #[inline]
    pub(crate) fn pointer(&self, iova: u64, len: usize) -> Option<*const u8> {
        let slices = self
            .0
            .get_slices(GuestAddress(iova), len, Permissions::Read);
        let slice = slices.ok()?.next()?.ok()?;
        Some(slice.ptr_guard().as_ptr())
    }
}

impl Table for RangeMapTable {
    const NAME: &'static str = "rangemap";
    type Found = Found;

    fn build(mappings: &[Mapping]) -> Self {
        built(RangeMap::new(), mappings)
    }

    #[inline]
    fn lookup(&self, iova: u64) -> Option<Found> {
        self.get(&iova).map(|leads| leads.at(iova))
    }
}

impl Editable for RangeMapTable {
    fn insert(&mut self, mapping: Mapping) {
        self.insert(mapping.range(), mapping.leads());
    }

    fn remove(&mut self, mapping: Mapping) {
        self.remove(mapping.range());
    }
}

impl Table for NoditTable {
    const NAME: &'static str = "nodit";
    type Found = Found;

    fn build(mappings: &[Mapping]) -> Self {
        built(NoditMap::new(), mappings)
    }

    #[inline]
    fn lookup(&self, iova: u64) -> Option<Found> {
        self.get_at_point(&iova).map(|leads| leads.at(iova))
    }
}

impl Editable for NoditTable {
    fn insert(&mut self, mapping: Mapping) {
        self.insert_strict(mapping.interval(), mapping.leads())
            .expect("nothing is mapped there");
    }

    fn remove(&mut self, mapping: Mapping) {
        self.remove_overlapping(&mapping.interval()).for_each(drop);
    }
}

impl Table for BTreeTable {
    const NAME: &'static str = "BTreeMap";
    type Found = Found;

    fn build(mappings: &[Mapping]) -> Self {
        built(BTreeMap::new(), mappings)
    }

    #[inline]
    fn lookup(&self, iova: u64) -> Option<Found> {
        let (_, (last, leads)) = self.range(..=iova).next_back()?;
        (iova <= *last).then(|| leads.at(iova))
    }
}

impl Editable for BTreeTable {
    fn insert(&mut self, mapping: Mapping) {
        self.insert(mapping.start, (mapping.end() - 1, mapping.leads()));
    }

    fn remove(&mut self, mapping: Mapping) {
        self.remove(&mapping.start);
    }
}

/// The floor: a word for each page from the first mapping to the last.
pub(crate) struct FlatTable {
    base: u64,
    /// Target and permission; 0: nothing.
    pages: Vec<u64>,
}

impl Table for FlatTable {
    const NAME: &'static str = "flat page table";
    const ROLE: Role = Role::Floor;
    const LOCKS: bool = false;
    type Found = Found;

    fn build(mappings: &[Mapping]) -> FlatTable {
        let starts = mappings.iter().map(|mapping| mapping.start);
        let base = starts.min().unwrap_or(0);
        let ends = mappings.iter().map(|mapping| mapping.end());
        let end = ends.max().unwrap_or(base);
        let mut pages = vec![0; size((end - base) / PAGE)];
        for mapping in mappings {
            let first = (mapping.start - base) / PAGE;
            for page in 0..mapping.len_bytes / PAGE {
                pages[size(first + page)] = (mapping.target + page * PAGE) | u64::from(READ_WRITE);
            }
        }
        FlatTable { base, pages }
    }

    #[inline]
    fn lookup(&self, iova: u64) -> Option<Found> {
        let page = iova.checked_sub(self.base)? / PAGE;
        let word = *self.pages.get(size(page))?;
        let perm = u8::try_from(word % PAGE).ok()?;
        (perm != 0).then_some((word - word % PAGE + iova % PAGE, perm))
    }
}

fn built<T: Editable>(mut table: T, mappings: &[Mapping]) -> T {
    mappings.iter().for_each(|mapping| table.insert(*mapping));
    table
}

fn bytes(mapping: Mapping) -> usize {
    size(mapping.len_bytes)
}

fn size(count: u64) -> usize {
    usize::try_from(count).expect("64 bits")
}
