//! Ours and everybody else behind one small trait a family, each used as its
//! own documentation says.

mod allocators;
mod tables;

pub(crate) use allocators::{
    Bitmap, Buddy, Nodit, OffsetAllocator, Ours, PAGE, PageAllocator, RangeMap, VmAllocator,
};
pub(crate) use tables::{
    BTreeTable, Editable, FlatTable, IotlbTable, Mapping, NoditTable, RangeMapTable, Table,
    VmIotlb, VmMemory,
};
