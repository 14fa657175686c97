//! The same for programs without an async runtime: each type owns a share of
//! one, with a single thread, and waits on it.
//!
//! Not for async code: every method panics there, and so may a drop. Methods
//! have the names, meanings and errors of their async counterparts; what does
//! not wait is reached through `Deref`.

use std::io;
use std::ops::Deref;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Instant;

use domain_core::addr::{Iova, IovaRange};
use domain_core::batch::BatchMode;
use domain_core::coherent::CoherentSpec;
use domain_core::direct::{DirectMapping, DirectSpec, Removed, TableSet};
use domain_core::lease::LeaseSpec;
use domain_core::mapping::{MappingId, MappingView};
use domain_core::memory::MemoryId;
use domain_core::perm::Perm;
use domain_core::region::Access;
use domain_core::session::Role;
use domain_core::streaming::{MapSpec, SyncSpec, UnmapSpec};
use domaind_proto::names::DomainId;
use domaind_proto::paths::RuntimeDir;
use tokio::runtime::{Builder, Runtime};

use crate::answers::{BounceReset, Translation};
use crate::changes::Change;
use crate::client::AttachOptions;
use crate::direct::SetMapOptions;
use crate::error::{Ended, Error, Kept};
use crate::memory::Memory;
use crate::pin::Pin;
use crate::pipeline::{Answer, PipelineOptions};
use crate::pool::{self, PoolOptions, Refused, Way};
use crate::watch::DomainEvent;

/// See [`crate::Client`].
#[derive(Clone, Debug)]
pub struct Client {
    inner: crate::Client,
    runtime: Arc<Runtime>,
}

/// See [`crate::Session`].
#[derive(Clone, Debug)]
pub struct Session {
    inner: crate::Session,
    runtime: Arc<Runtime>,
}

/// See [`crate::Owner`].
#[derive(Clone, Debug)]
pub struct Owner {
    inner: crate::Owner,
    runtime: Arc<Runtime>,
}

/// See [`crate::Mapping`].
#[derive(Debug)]
#[must_use = "a dropped mapping is unmapped, and nothing flows back"]
pub struct Mapping {
    inner: crate::Mapping,
    runtime: Arc<Runtime>,
}

/// See [`crate::Coherent`].
#[derive(Debug)]
#[must_use = "dropped coherent memory is freed, unless it is persistent"]
pub struct Coherent {
    inner: crate::Coherent,
    runtime: Arc<Runtime>,
}

/// See [`crate::Lease`].
#[derive(Debug)]
#[must_use = "a dropped lease is released"]
pub struct Lease {
    inner: crate::Lease,
    runtime: Arc<Runtime>,
}

/// See [`crate::pool::Pool`]. What does not wait is there, `map` above all.
#[derive(Clone, Debug)]
pub struct Pool {
    inner: pool::Pool,
    runtime: Arc<Runtime>,
}

/// See [`crate::Pipeline`].
#[derive(Debug)]
pub struct Pipeline {
    inner: crate::Pipeline,
    runtime: Arc<Runtime>,
}

/// See [`crate::Buffer`].
#[derive(Debug)]
pub struct Buffer {
    inner: crate::Buffer,
    /// The session that the buffer keeps alive needs it.
    _runtime: Arc<Runtime>,
}

/// See [`crate::Changes`].
#[derive(Debug)]
pub struct Changes {
    inner: crate::Changes,
    runtime: Arc<Runtime>,
}

/// See [`crate::DomainWatch`].
#[derive(Debug)]
pub struct DomainWatch {
    inner: crate::DomainWatch,
    runtime: Arc<Runtime>,
}

/// Adds the runtime to what came from it.
macro_rules! with_runtime {
    ($name:ident, $inner:expr, $runtime:expr) => {
        $name {
            inner: $inner,
            runtime: Arc::clone($runtime),
        }
    };
}

impl Client {
    /// See [`crate::Client::connect`].
    ///
    /// # Errors
    /// As there, and [`Error::Runtime`] when no thread can be had.
    pub fn connect(dir: &RuntimeDir) -> Result<Client, Error> {
        let runtime = runtime().map_err(Error::Runtime)?;
        let inner = runtime.block_on(crate::Client::connect(dir))?;
        Ok(with_runtime!(Client, inner, &runtime))
    }

    /// See [`crate::Client::connect_admin`].
    ///
    /// # Errors
    /// As there, and [`Error::Runtime`] when no thread can be had.
    pub fn connect_admin(dir: &RuntimeDir) -> Result<Client, Error> {
        let runtime = runtime().map_err(Error::Runtime)?;
        let inner = runtime.block_on(crate::Client::connect_admin(dir))?;
        Ok(with_runtime!(Client, inner, &runtime))
    }

    /// See [`crate::Client::attach`].
    ///
    /// # Errors
    /// As there.
    pub fn attach(&self, domain: &DomainId, role: Role, access: Access) -> Result<Session, Error> {
        let attach = self.inner.attach(domain, role, access);
        let inner = self.runtime.block_on(attach)?;
        Ok(with_runtime!(Session, inner, &self.runtime))
    }

    /// See [`crate::Client::attach_with`].
    ///
    /// # Errors
    /// As there.
    pub fn attach_with(&self, domain: &DomainId, options: AttachOptions) -> Result<Session, Error> {
        let attach = self.inner.attach_with(domain, options);
        let inner = self.runtime.block_on(attach)?;
        Ok(with_runtime!(Session, inner, &self.runtime))
    }

    /// See [`crate::Client::watch_domain`].
    ///
    /// # Errors
    /// As there.
    pub fn watch_domain(
        &self,
        domain: &DomainId,
        generation: Option<u64>,
    ) -> Result<DomainWatch, Error> {
        let watch = self.inner.watch_domain(domain, generation);
        let inner = self.runtime.block_on(watch)?;
        Ok(with_runtime!(DomainWatch, inner, &self.runtime))
    }

    /// See [`crate::Client::as_owner`].
    #[must_use]
    pub fn as_owner(&self, domain: &DomainId) -> Owner {
        with_runtime!(Owner, self.inner.as_owner(domain), &self.runtime)
    }

    /// Waits for anything else on the client's runtime, such as a call of
    /// [`crate::Client::domains`].
    pub fn block_on<F: Future>(&self, future: F) -> F::Output {
        self.runtime.block_on(future)
    }
}

impl Session {
    /// See [`crate::Session::register`].
    ///
    /// # Errors
    /// As there.
    pub fn register(&self, memfd: OwnedFd, writable: bool) -> Result<Memory, Error> {
        self.runtime.block_on(self.inner.register(memfd, writable))
    }

    /// See [`crate::Session::register_persistent`].
    ///
    /// # Errors
    /// As there.
    pub fn register_persistent(&self, memfd: OwnedFd, writable: bool) -> Result<Memory, Error> {
        self.runtime
            .block_on(self.inner.register_persistent(memfd, writable))
    }

    /// See [`crate::Session::unregister`].
    ///
    /// # Errors
    /// As there.
    pub fn unregister(&self, memory: impl Into<MemoryId>) -> Result<(), Error> {
        self.runtime.block_on(self.inner.unregister(memory))
    }

    /// See [`crate::Session::buffer`].
    ///
    /// # Errors
    /// As there.
    pub fn buffer(&self, len_bytes: u64) -> Result<Buffer, Error> {
        let inner = self.runtime.block_on(self.inner.buffer(len_bytes))?;
        Ok(Buffer {
            inner,
            _runtime: Arc::clone(&self.runtime),
        })
    }

    /// See [`crate::Session::map`].
    ///
    /// # Errors
    /// As there.
    pub fn map(&self, spec: MapSpec) -> Result<Mapping, Error> {
        let inner = self.runtime.block_on(self.inner.map(spec))?;
        Ok(with_runtime!(Mapping, inner, &self.runtime))
    }

    /// See [`crate::Session::map_batch`].
    ///
    /// # Errors
    /// As there.
    pub fn map_batch(
        &self,
        specs: &[MapSpec],
        mode: BatchMode,
    ) -> Result<Vec<Result<Mapping, Error>>, Error> {
        let mapped = self.runtime.block_on(self.inner.map_batch(specs, mode))?;
        let wrap = |mapping| with_runtime!(Mapping, mapping, &self.runtime);
        Ok(mapped.into_iter().map(|one| one.map(wrap)).collect())
    }

    /// See [`crate::Session::unmap`].
    ///
    /// # Errors
    /// As there.
    pub fn unmap(&self, spec: UnmapSpec) -> Result<u64, Error> {
        self.runtime.block_on(self.inner.unmap(spec))
    }

    /// See [`crate::Session::lease`].
    ///
    /// # Errors
    /// As there.
    pub fn lease(&self, spec: LeaseSpec) -> Result<Lease, Error> {
        let inner = self.runtime.block_on(self.inner.lease(spec))?;
        Ok(with_runtime!(Lease, inner, &self.runtime))
    }

    /// See [`crate::Session::alloc_coherent`].
    ///
    /// # Errors
    /// As there.
    pub fn alloc_coherent(&self, spec: CoherentSpec) -> Result<Coherent, Error> {
        let inner = self.runtime.block_on(self.inner.alloc_coherent(spec))?;
        Ok(with_runtime!(Coherent, inner, &self.runtime))
    }

    /// See [`crate::Session::pool`].
    ///
    /// # Errors
    /// As there.
    pub fn pool(&self, options: PoolOptions) -> Result<Pool, Error> {
        let inner = self.runtime.block_on(self.inner.pool(options))?;
        Ok(with_runtime!(Pool, inner, &self.runtime))
    }

    /// See [`crate::Session::pipeline`].
    ///
    /// # Errors
    /// As there.
    pub fn pipeline(&self, options: PipelineOptions) -> Result<Pipeline, Error> {
        let inner = self.runtime.block_on(self.inner.pipeline(options))?;
        Ok(with_runtime!(Pipeline, inner, &self.runtime))
    }

    /// See [`crate::Session::free_coherent`].
    ///
    /// # Errors
    /// As there.
    pub fn free_coherent(&self, iova: Iova, id: MappingId) -> Result<(), Error> {
        self.runtime.block_on(self.inner.free_coherent(iova, id))
    }

    /// See [`crate::Session::open`].
    ///
    /// # Errors
    /// As there.
    pub fn open(&self, range: IovaRange, want: Perm) -> Result<(), Error> {
        self.runtime.block_on(self.inner.open(range, want))
    }

    /// See [`crate::Session::resolve`].
    ///
    /// # Errors
    /// As there.
    pub fn resolve(&self, range: IovaRange, want: Perm) -> Result<Pin<'_>, Error> {
        self.runtime.block_on(self.inner.resolve(range, want))
    }

    /// See [`crate::Session::changes`].
    #[must_use]
    pub fn changes(&self) -> Changes {
        with_runtime!(Changes, self.inner.changes(), &self.runtime)
    }

    /// See [`crate::Session::ended`].
    #[must_use]
    pub fn ended(&self) -> Ended {
        self.runtime.block_on(self.inner.ended())
    }

    /// See [`crate::Session::detach`].
    ///
    /// # Errors
    /// As there.
    pub fn detach(self) -> Result<(), Error> {
        self.runtime.block_on(self.inner.detach())
    }
}

impl Changes {
    /// See [`crate::Changes::recv`].
    #[must_use]
    pub fn recv(&mut self) -> Option<Change> {
        self.runtime.block_on(self.inner.recv())
    }
}

/// Ends with the session.
impl Iterator for Changes {
    type Item = Change;

    fn next(&mut self) -> Option<Change> {
        self.recv()
    }
}

impl DomainWatch {
    /// See [`crate::DomainWatch::next`].
    ///
    /// # Errors
    /// As there.
    #[allow(clippy::should_implement_trait)] // it fails and ends, which are two things
    pub fn next(&mut self) -> Result<Option<DomainEvent>, Error> {
        self.runtime.block_on(self.inner.next())
    }
}

/// What sessions and owners have in common.
macro_rules! changes_a_domain {
    ($($name:ident),*) => {$(
        impl $name {
            /// See [`crate::Session::map_direct`].
            ///
            /// # Errors
            /// As there.
            pub fn map_direct(&self, spec: DirectSpec) -> Result<DirectMapping, Error> {
                self.runtime.block_on(self.inner.map_direct(spec))
            }

            /// See [`crate::Session::map_direct_batch`].
            ///
            /// # Errors
            /// As there.
            pub fn map_direct_batch(
                &self,
                specs: &[DirectSpec],
                mode: BatchMode,
            ) -> Result<Vec<Result<DirectMapping, Error>>, Error> {
                self.runtime.block_on(self.inner.map_direct_batch(specs, mode))
            }

            /// See [`crate::Session::unmap_direct`].
            ///
            /// # Errors
            /// As there.
            pub fn unmap_direct(&self, ranges: &[IovaRange]) -> Result<Removed, Error> {
                self.runtime.block_on(self.inner.unmap_direct(ranges))
            }

            /// See [`crate::Session::set_map`].
            ///
            /// # Errors
            /// As there.
            pub fn set_map(
                &self,
                entries: &[DirectMapping],
                options: SetMapOptions,
            ) -> Result<TableSet, Error> {
                self.runtime.block_on(self.inner.set_map(entries, options))
            }

            /// See [`crate::Session::stream_set_map`].
            ///
            /// # Errors
            /// As there.
            pub fn stream_set_map<I>(
                &self,
                entries: I,
                options: SetMapOptions,
            ) -> Result<TableSet, Error>
            where
                I: IntoIterator<Item = DirectMapping, IntoIter: Send + 'static>,
            {
                self.runtime.block_on(self.inner.stream_set_map(entries, options))
            }

            /// See [`crate::Session::clear_map`].
            ///
            /// # Errors
            /// As there.
            pub fn clear_map(&self, ranges: &[IovaRange]) -> Result<Removed, Error> {
                self.runtime.block_on(self.inner.clear_map(ranges))
            }

            /// See [`crate::Session::reset_bounce`].
            ///
            /// # Errors
            /// As there.
            pub fn reset_bounce(&self, force: bool) -> Result<BounceReset, Error> {
                self.runtime.block_on(self.inner.reset_bounce(force))
            }

            /// See [`crate::Session::translate`].
            ///
            /// # Errors
            /// As there.
            pub fn translate(&self, range: IovaRange, want: Perm) -> Result<Translation, Error> {
                self.runtime.block_on(self.inner.translate(range, want))
            }

            /// See [`crate::Session::lookup`].
            ///
            /// # Errors
            /// As there.
            pub fn lookup(&self, range: IovaRange) -> Result<MappingView, Error> {
                self.runtime.block_on(self.inner.lookup(range))
            }
        }
    )*};
}

changes_a_domain!(Session, Owner);

impl Mapping {
    /// See [`crate::Mapping::unmap`].
    ///
    /// # Errors
    /// As there.
    pub fn unmap(self, written_bytes: Option<u64>) -> Result<u64, Kept<Mapping>> {
        let Mapping { inner, runtime } = self;
        let unmapped = runtime.block_on(inner.unmap(written_bytes));
        unmapped.map_err(|kept| Kept {
            guard: with_runtime!(Mapping, kept.guard, &runtime),
            error: kept.error,
        })
    }

    /// See [`crate::Mapping::sync_for_cpu`].
    ///
    /// # Errors
    /// As there.
    pub fn sync_for_cpu(&self, offset: u64, len_bytes: u64) -> Result<(), Error> {
        self.runtime
            .block_on(self.inner.sync_for_cpu(offset, len_bytes))
    }

    /// See [`crate::Mapping::sync_for_device`].
    ///
    /// # Errors
    /// As there.
    pub fn sync_for_device(&self, offset: u64, len_bytes: u64) -> Result<(), Error> {
        self.runtime
            .block_on(self.inner.sync_for_device(offset, len_bytes))
    }

    /// See [`crate::Mapping::into_parts`].
    #[must_use]
    pub fn into_parts(self) -> (Iova, MappingId) {
        self.inner.into_parts()
    }
}

impl Coherent {
    /// See [`crate::Coherent::free`].
    ///
    /// # Errors
    /// As there.
    pub fn free(self) -> Result<(), Kept<Coherent>> {
        let Coherent { inner, runtime } = self;
        let freed = runtime.block_on(inner.free());
        freed.map_err(|kept| Kept {
            guard: with_runtime!(Coherent, kept.guard, &runtime),
            error: kept.error,
        })
    }

    /// See [`crate::Coherent::into_parts`].
    #[must_use]
    pub fn into_parts(self) -> (Iova, MappingId) {
        self.inner.into_parts()
    }
}

impl Lease {
    /// See [`crate::Lease::release`].
    ///
    /// # Errors
    /// As there.
    pub fn release(self) -> Result<(), Kept<Lease>> {
        let Lease { inner, runtime } = self;
        let released = runtime.block_on(inner.release());
        released.map_err(|kept| Kept {
            guard: with_runtime!(Lease, kept.guard, &runtime),
            error: kept.error,
        })
    }
}

impl Pipeline {
    /// See [`crate::Pipeline::map`].
    ///
    /// # Errors
    /// As there.
    pub fn map(&mut self, specs: &[MapSpec], mode: BatchMode) -> Result<(), Error> {
        self.inner.map(specs, mode)
    }

    /// See [`crate::Pipeline::unmap`].
    ///
    /// # Errors
    /// As there.
    pub fn unmap(&mut self, specs: &[UnmapSpec], mode: BatchMode) -> Result<(), Error> {
        self.inner.unmap(specs, mode)
    }

    /// See [`crate::Pipeline::sync`].
    ///
    /// # Errors
    /// As there.
    pub fn sync(&mut self, specs: &[SyncSpec], mode: BatchMode) -> Result<(), Error> {
        self.inner.sync(specs, mode)
    }

    /// See [`crate::Pipeline::next`].
    ///
    /// # Errors
    /// As there.
    // It is no iterator: an answer is borrowed until the next one.
    #[allow(clippy::should_implement_trait)]
    pub fn next(&mut self) -> Result<Option<Answer<'_>>, Error> {
        self.runtime.block_on(self.inner.next())
    }

    /// See [`crate::Pipeline::in_flight`].
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.inner.in_flight()
    }
}

macro_rules! reaches {
    ($($name:ident),*) => {$(
        impl Deref for $name {
            type Target = crate::$name;

            fn deref(&self) -> &crate::$name {
                &self.inner
            }
        }
    )*};
}

reaches!(
    Client,
    Session,
    Owner,
    Mapping,
    Coherent,
    Lease,
    Buffer,
    DomainWatch
);

/// One thread that receives, undoes and answers.
fn runtime() -> io::Result<Arc<Runtime>> {
    let runtime = Builder::new_multi_thread()
        .worker_threads(1)
        .thread_name("domaind-client")
        .enable_all()
        .build()?;
    Ok(Arc::new(runtime))
}

impl Pool {
    /// See [`pool::Pool::map_by`].
    ///
    /// # Errors
    /// As there.
    pub fn map_by<B: AsRef<[u8]>, W: Way<B>>(
        &self,
        buffer: B,
        direction: W,
        deadline: Instant,
    ) -> Result<pool::Mapping<&pool::Pool, B, W>, Refused<B>> {
        let mapped = self.inner.map_by(buffer, direction, deadline.into());
        self.runtime.block_on(mapped)
    }
}

impl Deref for Pool {
    type Target = pool::Pool;

    fn deref(&self) -> &pool::Pool {
        &self.inner
    }
}
