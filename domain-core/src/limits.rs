//! Everything that a client can make grow, with its unit and its default.

use std::fmt;

/// Domains that one user may own.
pub const DOMAINS_PER_OWNER: u32 = 1024;
/// Domains on one node.
pub const DOMAINS: u32 = 4096;
/// Sessions attached to one domain.
pub const SESSIONS_PER_DOMAIN: u32 = 512;
/// Streaming mappings, coherent allocations and leases of one domain.
pub const MAPPINGS_PER_DOMAIN: u32 = 65_536;
/// Memories registered in one domain; each holds one fd of the daemon.
pub const MEMORIES_PER_DOMAIN: u32 = 1024;
/// Direct mappings of one domain: a table of 10^5 entries, which other services
/// cannot hold, needs no permission first.
pub const DIRECT_PER_DOMAIN: u32 = 1 << 17;
/// Leases of one session.
pub const LEASES_PER_SESSION: u32 = 1024;
/// Bytes that one session may hold in leases: no bound but the aperture, which
/// belongs to whoever made the domain, and its drivers trust one another.
pub const LEASE_BYTES_PER_SESSION: u64 = u64::MAX;
/// What an owner may raise the numbers above to.
pub const SESSIONS_PER_DOMAIN_MOST: u32 = 4096;
/// See [`SESSIONS_PER_DOMAIN_MOST`].
pub const MAPPINGS_PER_DOMAIN_MOST: u32 = 1 << 20;
/// See [`SESSIONS_PER_DOMAIN_MOST`].
pub const MEMORIES_PER_DOMAIN_MOST: u32 = 4096;
/// See [`SESSIONS_PER_DOMAIN_MOST`].
pub const DIRECT_PER_DOMAIN_MOST: u32 = 1 << 20;
/// See [`SESSIONS_PER_DOMAIN_MOST`].
pub const LEASES_PER_SESSION_MOST: u32 = 1 << 16;
/// Pieces of one translation.
pub const TRANSLATE_PIECES: usize = 16_384;
/// Entries of one batch.
pub const BATCH_ENTRIES: usize = 1024;
/// Connections to the fd socket from one user, attached or not.
pub const FD_CONNECTIONS_PER_USER: u32 = 512;
/// Connections to one gRPC socket from one user.
pub const GRPC_CONNECTIONS_PER_USER: u32 = 1024;
/// Bytes of one frame on the fd socket.
pub const FRAME_BYTES: usize = 4096;
/// Bytes of one gRPC request; a full batch is below 64 KiB.
pub const REQUEST_BYTES: usize = 256 << 10;
/// Bytes of one gRPC answer; the largest page of a list is below this.
pub const RESPONSE_BYTES: usize = 4 << 20;
/// Bytes of a `request_id`.
pub const REQUEST_ID_BYTES: usize = 64;
/// Answers that are kept for each caller, in case it repeats its request.
pub const ANSWERS_PER_CALLER: usize = 128;
/// Bytes of these answers together. The last one is kept however large it is,
/// up to [`RESPONSE_BYTES`].
pub const ANSWER_BYTES_PER_CALLER: usize = 256 << 10;
/// Users whose answers are kept; sessions have their own.
pub const USERS_WITH_ANSWERS: usize = 256;
/// Tables that one user may stream in at a time. The largest takes 64 MiB while
/// it grows, one of the default quota 8 MiB.
pub const TABLE_STREAMS_PER_USER: usize = 4;
/// Tables that all users together may stream in at a time; the next one waits.
/// More than a few users can fill.
pub const TABLE_STREAMS: usize = 32;
/// Entries of a SetMap in one request. One of 16 bytes each fills
/// [`REQUEST_BYTES`]; empty ones of 2 bytes would become 20 times as much when
/// they are decoded.
pub const TABLE_ENTRIES_PER_REQUEST: usize = 16_384;
/// Large calls that one user may have under way, those that wait included: each
/// holds its request, decoded. Those are large that walk a direct table or an
/// aperture: UnmapDirect, SetMap, StreamSetMap, ClearMap and ResetBounce.
pub const LARGE_CALLS_WAITING_PER_USER: usize = 64;
/// Large calls of one user that run at a time: while one waits for its domain's
/// lock the other can work.
pub const LARGE_CALLS_PER_USER: usize = 2;
/// Large calls of all users together that run at a time; each takes a thread
/// that may block, of which other calls need some, too.
pub const LARGE_CALLS: usize = 8;
/// Bytes of one domain's page table beside what its apertures need, in nodes of 4 KiB: address space, of which only what is used is
/// memory. Enough for a million neighbouring pages and for the 65,536 mappings of the default quota,
/// unless more than 16,000 of them each lie alone in 2 MiB of the address space.
pub const TABLE_BYTES_PER_DOMAIN: u64 = 64 << 20;
/// Bytes of a page table that are the domain's own; what it grows by beyond them counts in the
/// daemon's budget of bytes.
pub const TABLE_BYTES_UNCOUNTED: u64 = 64 << 10;
/// Changes of one domain that are remembered for those who watch it; who is further behind looks at
/// everything anew.
pub const WATCH_CHANGES: usize = 1024;
/// Mappings, ranges and regions of one such change; a larger one is not remembered.
pub const WATCH_CHANGE_ITEMS: usize = 256;
/// The same of all changes together, at some hundred bytes each.
pub const WATCH_ITEMS: usize = 16_384;
/// Watchers of domains that one user may have at a time, through each door.
pub const WATCHERS_PER_USER: usize = 64;
/// Watchers that come through one door at a time: users leave room for the operator.
pub const WATCHERS: usize = 1024;
/// Pipelines that one session may have open at a time: one for each of a few
/// threads, which beyond that would only wait for the domain's lock.
pub const PIPELINES_PER_SESSION: usize = 4;
/// Pipelines of all sessions of one user. Each holds a batch as it was sent, and
/// as the core takes it: some 300 KiB together.
pub const PIPELINES_PER_USER: usize = 256;
/// Bytes of a domain's id.
pub const DOMAIN_ID_BYTES: usize = 63;

/// How much may exist in one domain, and of each session in it, at a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Quotas {
    /// Attached sessions.
    pub sessions: u32,
    /// Streaming mappings, coherent allocations and leases together.
    pub mappings: u32,
    /// Registered memories.
    pub memories: u32,
    /// Direct mappings, those included that were removed and that some session may
    /// still use.
    pub direct: u32,
    /// Leases of one session, those included that were released and are not free
    /// yet.
    pub leases: u32,
    /// Bytes of these leases, in whole granules; `u64::MAX` is no bound but the
    /// aperture.
    pub lease_bytes: u64,
}

impl Default for Quotas {
    fn default() -> Quotas {
        Quotas {
            sessions: SESSIONS_PER_DOMAIN,
            mappings: MAPPINGS_PER_DOMAIN,
            memories: MEMORIES_PER_DOMAIN,
            direct: DIRECT_PER_DOMAIN,
            leases: LEASES_PER_SESSION,
            lease_bytes: LEASE_BYTES_PER_SESSION,
        }
    }
}

/// Which limit was hit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Quota {
    /// [`Quotas::sessions`].
    Sessions,
    /// [`Quotas::mappings`].
    Mappings,
    /// [`Quotas::memories`].
    Memories,
    /// [`Quotas::direct`].
    Direct,
    /// [`Quotas::leases`].
    Leases,
}

impl fmt::Display for Quota {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Quota::Sessions => "sessions",
            Quota::Mappings => "mappings",
            Quota::Memories => "memories",
            Quota::Direct => "direct mappings",
            Quota::Leases => "leases of one session",
        })
    }
}

/// A quota is used up, or would be set below its use.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the quota of {limit} {quota} does not allow it, {used} are in use")]
pub struct QuotaExceeded {
    /// Which.
    pub quota: Quota,
    /// How many there may be.
    pub limit: u32,
    /// How many there are.
    pub used: usize,
}

impl Quotas {
    /// Is there room for one more, now that there are `used`?
    ///
    /// # Errors
    /// [`QuotaExceeded`] if not.
    pub fn admit(&self, quota: Quota, used: usize) -> Result<(), QuotaExceeded> {
        let limit = self.limit(quota);
        if used < usize::try_from(limit).unwrap_or(usize::MAX) {
            return Ok(());
        }
        Err(QuotaExceeded { quota, limit, used })
    }

    fn limit(&self, quota: Quota) -> u32 {
        match quota {
            Quota::Sessions => self.sessions,
            Quota::Mappings => self.mappings,
            Quota::Memories => self.memories,
            Quota::Direct => self.direct,
            Quota::Leases => self.leases,
        }
    }
}
