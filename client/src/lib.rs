//! Client library of domaind: attach to a domain, map buffers, reach its
//! memory.
//!
//! A [`Client`] is the daemon's control plane. [`Client::attach`] makes this
//! process a [`Session`] of one domain; from then on the domain's memory is
//! mapped here, and reading and writing it by iova costs a subtraction and a
//! copy, no call. Drivers map buffers ([`Session::map`]) and allocate shared
//! memory ([`Session::alloc_coherent`]); both come as guards that undo
//! themselves when they are dropped. Memory that devices shall work on itself,
//! without a copy, is mapped directly ([`Session::map_direct`], whole tables
//! with [`Session::set_map`]); a domain's owner may do that without a session,
//! too ([`Client::as_owner`]).
//!
//! ```no_run
//! use domaind_client::{Access, Client, Direction, DomainId, MapSpec, Role, RuntimeDir};
//!
//! # async fn example() -> Result<(), Box<dyn std::error::Error>> {
//! let client = Client::connect(&RuntimeDir::resolve(None)?).await?;
//! let domain = DomainId::new("disk0")?;
//! let driver = client.attach(&domain, Role::Driver, Access::ReadWrite).await?;
//!
//! let buffer = driver.buffer(4096).await?;
//! buffer.copy_in(0, b"to the device")?;
//! let spec = MapSpec::new(buffer.memory().id(), 0, 13, Direction::Bidirectional);
//! let mapping = driver.map(spec).await?;
//! // Tell a device `mapping.iova()`; in its own session it does:
//! //     device.read(iova, &mut bytes)?; device.write(iova, &answer)?;
//! mapping.unmap(None).await?;
//!
//! let mut answer = [0; 13];
//! buffer.copy_out(0, &mut answer)?;
//! driver.detach().await?;
//! # Ok(())
//! # }
//! ```
//!
//! Devices reach whatever is mapped, direct mappings included, through the
//! domain's page table, which is mapped here, too: under a [`Pin`] an address
//! becomes memory in some nanoseconds, and stays it until the pin is dropped.
//! Whoever removes a mapping waits for the pins that may use it.
//!
//! ```no_run
//! # use domaind_client::{Error, Iova, IovaRange, Perm, Session};
//! # async fn example(device: Session, iova: Iova) -> Result<(), Box<dyn std::error::Error>> {
//! let range = IovaRange::from_len(iova, 4096)?;
//! // Fetches registered memory when it is needed for the first time.
//! let pin = device.resolve(range, Perm::ReadWrite).await?;
//! for piece in pin.translate(range, Perm::ReadWrite)?.iter() {
//!     piece.memory.copy_in(0, b"done")?;
//! }
//! // Short: before the next await.
//! drop(pin);
//! # Ok(())
//! # }
//! ```
//!
//! Everything is usable from a tokio runtime with I/O and time, of either
//! flavour; [`blocking`] is for programs without one.

mod access;
mod answers;
mod apertures;
pub mod blocking;
mod buffer;
mod changes;
mod client;
mod coherent;
mod connection;
mod direct;
mod error;
#[cfg(test)]
mod fake;
mod handshake;
mod lease;
mod live;
mod mapping;
mod memory;
mod opened;
mod owner;
mod pin;
mod pins;
mod pipeline;
pub mod pool;
mod session;
#[allow(dead_code)]
mod token;
mod undo;
mod watch;

pub use answers::{BounceReset, Translation};
pub use apertures::AddressError;
pub use buffer::Buffer;
pub use changes::{AddedRange, Change, Changes};
pub use client::{AttachOptions, Client};
pub use coherent::Coherent;
pub use direct::SetMapOptions;
pub use error::{EndReason, Ended, Error, Kept, ProtocolError};
pub use lease::Lease;
pub use mapping::Mapping;
pub use memory::Memory;
pub use owner::Owner;
pub use pin::{MappedPiece, Pieces, Pin, PinError};
pub use pipeline::{
    Answer, MappedBatch, Pipeline, PipelineOptions, PipelineReceiver, PipelineSender, SyncedBatch,
    UnmappedBatch,
};
pub use session::Session;
pub use watch::{DomainChange, DomainEvent, DomainSnapshot, DomainStatus, DomainWatch, WaitedFor};

pub use domain_core::addr::{Granule, Iova, IovaRange};
pub use domain_core::alloc::AllocRequest;
pub use domain_core::batch::BatchMode;
pub use domain_core::coherent::CoherentSpec;
pub use domain_core::direct::{DirectMapping, DirectSpec, Placement, Removed, TableSet};
pub use domain_core::domain::{Behind, Translated};
pub use domain_core::layout::ApertureKind;
pub use domain_core::lease::LeaseSpec;
pub use domain_core::mapping::{MappingId, MappingKind, MappingView, Phase, Source, ViewKind};
pub use domain_core::memory::MemoryId;
pub use domain_core::perm::{Direction, Perm};
pub use domain_core::region::{
    Access, AccessError, SharedSlice, SharedU16, SharedU16Mut, SharedU32, SharedU32Mut, SharedU64,
    SharedU64Mut, WaitOutcome, driver_memfd,
};
pub use domain_core::session::{Role, SessionId};
pub use domain_core::streaming::{MapSpec, Mapped, SyncSpec, SyncTarget, UnmapSpec};
pub use domaind_proto::names::{DomainId, NameError};
pub use domaind_proto::paths::{RuntimeDir, RuntimeDirError};
pub use domaind_proto::v1;

/// The README's example compiles.
#[cfg(doctest)]
#[doc = include_str!("../../README.md")]
struct Readme;
