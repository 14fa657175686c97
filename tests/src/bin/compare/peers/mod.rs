//! Ours and everybody else behind one small trait a family, each used as its
//! own documentation says.

mod allocators;

pub(crate) use allocators::{
    Bitmap, Buddy, Nodit, OffsetAllocator, Ours, PageAllocator, RangeMap, VmAllocator,
};
