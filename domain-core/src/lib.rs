//! IOVA domains as a library: address plan, allocators, IOTLB, bounce and
//! coherent memory, and the rules by which several sessions share them.
//!
//! The crate knows no runtime, wire format, clock, randomness, environment or
//! log. Given the same calls it is in the same state, which is what makes
//! replay and simulation possible. One noun, one file:
//!
//! | module | noun |
//! |---|---|
//! | [`addr`] | addresses, inclusive ranges, granules |
//! | [`perm`] | direction and permission |
//! | [`layout`] | where the apertures of a domain lie |
//! | [`alloc`] | who gets which iovas of an aperture |
//! | [`iotlb`] | what is visible where |
//! | [`aperture`] | iovas and the region that backs them |
//! | [`mapping`] | what is allocated in an aperture, and for whom |
//! | [`region`] | the memory itself: memfds, seals, mappings (home of all unsafe code) |
//! | [`session`] | who is attached, and in which role |
//! | [`memory`] | what a driver has registered |
//! | [`streaming`] | bounced buffers: directions, copies, lengths |
//! | [`direct`] | registered memory in the IOTLB without a bounce |
//! | [`space`] | where direct mappings may lie |
//! | [`coherent`] | shared memory without copies |
//! | [`lease`] | bounce memory that a driver divides up by itself |
//! | [`batch`] | all of a request, or each entry for itself |
//! | [`crew`] | who copies the bytes of a batch |
//! | [`limits`] | everything that a client can make grow |
//! | [`domain`] | the one place where they meet |

pub mod addr;
pub mod alloc;
pub mod aperture;
pub mod batch;
mod by_granule;
pub mod coherent;
pub mod crew;
pub mod direct;
pub mod domain;
pub mod iotlb;
pub mod layout;
pub mod lease;
pub mod limits;
pub mod mapping;
pub mod memory;
pub mod perm;
pub mod region;
pub mod session;
pub mod space;
pub mod streaming;

pub use addr::{Granule, Iova, IovaRange};
pub use domain::Domain;
pub use perm::{Direction, Perm};
