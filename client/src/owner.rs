//! A domain as its owner changes it, without being a session of it.

use std::fmt;

use domain_core::addr::IovaRange;
use domain_core::batch::BatchMode;
use domain_core::direct::{DirectMapping, DirectSpec, Removed, TableSet};
use domain_core::mapping::MappingView;
use domain_core::perm::Perm;
use domaind_proto::names::DomainId;

use crate::answers::{BounceReset, Translation};
use crate::client::Client;
use crate::direct::{SetMapOptions, Way};
use crate::error::Error;
use crate::token::Token;

/// One domain, in the hands of its owner or, over
/// [`Client::connect_admin`], of the operator. Attaches nothing and holds
/// nothing in the daemon. Cheap to clone.
///
/// Its methods have the names, meanings and errors of [`Session`]'s, but for
/// [`Error::Ended`], and may use and end what belongs to any session. To who is
/// neither owner nor operator the domain looks absent.
///
/// [`Session`]: crate::Session
#[derive(Clone)]
pub struct Owner {
    domain: DomainId,
    way: Way,
}

impl Client {
    /// The domain, as its owner changes it without a session. Asks nothing:
    /// that there is no such domain, or not for the caller, is an error of
    /// what is then done.
    #[must_use]
    pub fn as_owner(&self, domain: &DomainId) -> Owner {
        let way = Way {
            calls: self.domain_calls(Token::none()),
            domain: domain.name(),
            session: None,
        };
        Owner {
            domain: domain.clone(),
            way,
        }
    }
}

impl Owner {
    /// Which domain it is.
    #[must_use]
    pub fn domain(&self) -> &DomainId {
        &self.domain
    }

    /// See [`Session::map_direct`](crate::Session::map_direct).
    ///
    /// # Errors
    /// As there.
    pub async fn map_direct(&self, spec: DirectSpec) -> Result<DirectMapping, Error> {
        self.way.clone().map_direct(spec).await
    }

    /// See [`Session::map_direct_batch`](crate::Session::map_direct_batch).
    ///
    /// # Errors
    /// As there.
    pub async fn map_direct_batch(
        &self,
        specs: &[DirectSpec],
        mode: BatchMode,
    ) -> Result<Vec<Result<DirectMapping, Error>>, Error> {
        self.way.clone().map_direct_batch(specs, mode).await
    }

    /// See [`Session::unmap_direct`](crate::Session::unmap_direct).
    ///
    /// # Errors
    /// As there.
    pub async fn unmap_direct(&self, ranges: &[IovaRange]) -> Result<Removed, Error> {
        self.way.clone().unmap_direct(ranges).await
    }

    /// See [`Session::set_map`](crate::Session::set_map).
    ///
    /// # Errors
    /// As there.
    pub async fn set_map(
        &self,
        entries: &[DirectMapping],
        options: SetMapOptions,
    ) -> Result<TableSet, Error> {
        self.way.clone().set_map(entries, options).await
    }

    /// See [`Session::stream_set_map`](crate::Session::stream_set_map).
    ///
    /// # Errors
    /// As there.
    pub async fn stream_set_map<I>(
        &self,
        entries: I,
        options: SetMapOptions,
    ) -> Result<TableSet, Error>
    where
        I: IntoIterator<Item = DirectMapping, IntoIter: Send + 'static>,
    {
        self.way.clone().stream_set_map(entries, options).await
    }

    /// See [`Session::clear_map`](crate::Session::clear_map).
    ///
    /// # Errors
    /// As there.
    pub async fn clear_map(&self, ranges: &[IovaRange]) -> Result<Removed, Error> {
        self.way.clone().clear_map(ranges).await
    }

    /// See [`Session::reset_bounce`](crate::Session::reset_bounce).
    ///
    /// # Errors
    /// As there.
    pub async fn reset_bounce(&self, force: bool) -> Result<BounceReset, Error> {
        self.way.clone().reset_bounce(force).await
    }

    /// See [`Session::translate`](crate::Session::translate).
    ///
    /// # Errors
    /// As there.
    pub async fn translate(&self, range: IovaRange, want: Perm) -> Result<Translation, Error> {
        self.way.clone().translate(range, want).await
    }

    /// See [`Session::lookup`](crate::Session::lookup).
    ///
    /// # Errors
    /// As there.
    pub async fn lookup(&self, range: IovaRange) -> Result<MappingView, Error> {
        self.way.clone().lookup(range).await
    }
}

impl fmt::Debug for Owner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Owner")
            .field("domain", &self.domain)
            .finish_non_exhaustive()
    }
}
