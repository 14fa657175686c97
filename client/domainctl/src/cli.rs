//! What can be typed. The comments here are the help.

use std::path::PathBuf;
use std::time::Duration;

use clap::{ArgGroup, Args, Parser, Subcommand, ValueEnum};
use domain_core::addr::{Granule, IovaRange};
use domain_core::memory::MemoryId;
use domain_core::session::SessionId;
use domaind_proto::names::{DomainId, NameError, parse_session_lenient};
use domaind_proto::v1;

use crate::bench::BenchArgs;
use crate::demo::{DemoArgs, DeviceArgs, DriverArgs};
use crate::exit::EXIT_CODES;
use crate::range::{self, NotScoped};
use crate::scoped::{self, Scoped, domain_id};
use crate::time;
use domaind_proto::size::{self, SizeError};

/// Shows and changes what the daemon domaind holds on this node.
#[derive(Debug, Parser)]
#[command(name = "domainctl", version, after_help = EXIT_CODES)]
pub(crate) struct Cli {
    #[command(flatten)]
    pub(crate) global: Global,
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// What every command takes.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Global options")]
pub(crate) struct Global {
    /// Where the daemon's sockets are; unset: DOMAIND_RUNTIME_DIR, else
    /// /run/domaind, else $XDG_RUNTIME_DIR/domaind
    #[arg(long, value_name = "DIR", global = true)]
    pub(crate) runtime_dir: Option<PathBuf>,
    /// Use the operator's socket, which shows the domains of all users
    #[arg(long, global = true)]
    pub(crate) admin: bool,
    /// Give up a call after this long (500ms, 10s, 2m; 0: never)
    #[arg(long, value_name = "DURATION", default_value = "10s", global = true, value_parser = time::parse_duration)]
    pub(crate) timeout: Duration,
    /// How to print
    #[arg(
        short,
        long,
        value_name = "FORMAT",
        value_enum,
        default_value_t,
        global = true
    )]
    pub(crate) output: Format,
    /// Print tables without their headers
    #[arg(long, global = true)]
    pub(crate) no_headers: bool,
    /// Say on stderr which socket is used, and all that is known of an error
    #[arg(short, long, global = true)]
    pub(crate) verbose: bool,
}

/// How to print.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    /// For people
    #[default]
    Table,
    /// For people with wide terminals
    Wide,
    /// Canonical proto3 JSON with all fields: 64-bit numbers are strings
    Json,
    /// The same as YAML
    Yaml,
    /// Only names, one a line
    Name,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Create a domain, or memory in one
    #[command(subcommand)]
    Create(Create),
    /// List domains, sessions, mappings or memories
    #[command(subcommand)]
    Get(Get),
    /// Show all that is known of a domain or session
    #[command(subcommand)]
    Describe(Describe),
    /// Print what changes in a domain, as it happens
    #[command(subcommand)]
    Watch(Watch),
    /// Change a domain
    #[command(subcommand)]
    Update(Update),
    /// Delete domains, or memory in one
    #[command(subcommand)]
    Delete(Delete),
    /// End sessions as if their connections had closed
    Evict(Evict),
    /// Allocate coherent memory that belongs to the domain and stays
    ///
    /// Attaches as a driver for as long as it takes, so the domain must be one
    /// that the caller may attach to; --admin does not help.
    Alloc(Alloc),
    /// Free coherent memory that belongs to the domain
    Free(Free),
    /// Map registered memory directly, without a bounce
    ///
    /// Prints where it appears. The mapping stays until it is unmapped, or until
    /// the session or domain ends that its memory belongs to.
    Map(Map),
    /// End the direct mappings that lie inside ranges
    ///
    /// Never cuts a mapping: a range that would is refused, and so is one in
    /// which nothing is mapped.
    #[command(
        override_usage = "domainctl unmap [OPTIONS] [DOMAIN] <RANGE>...\n       domainctl unmap [OPTIONS] [DOMAIN] --all"
    )]
    Unmap(Unmap),
    /// Replace the whole table of direct mappings at once
    SetMap(SetMap),
    /// End the direct mappings that overlap ranges, whole mappings
    #[command(override_usage = "domainctl clear-map [OPTIONS] [DOMAIN] <RANGE>...")]
    ClearMap(ClearMap),
    /// Take back the bounce aperture after a device reset
    ///
    /// All streaming mappings and leases end, nothing is copied back, the memory
    /// is zeroed. Coherent and direct mappings stay.
    ResetBounce(ResetBounce),
    /// Show where the bytes of a range are
    #[command(override_usage = "domainctl translate [OPTIONS] [DOMAIN] <RANGE>")]
    Translate(Translate),
    /// Show the lowest mapping that overlaps a range
    #[command(override_usage = "domainctl lookup [OPTIONS] [DOMAIN] <RANGE>")]
    Lookup(Lookup),
    /// Move a file through a domain, with nothing installed
    Demo(DemoArgs),
    /// Measure the daemon, each number beside the least it could be here
    ///
    /// By turns in one run: an operation of domaind's, and the floor, what the
    /// machine itself takes for the least that such an operation has to do.
    /// Uses the daemon of --runtime-dir or of DOMAIND_RUNTIME_DIR, else one
    /// inside of itself, and a domain of its own in it.
    Bench(BenchArgs),
    /// The driver of the demo
    #[command(hide = true)]
    DemoDriver(DriverArgs),
    /// A device of the demo
    #[command(hide = true)]
    DemoDevice(DeviceArgs),
    /// Ask the daemon whether it serves
    Health(Health),
    /// Show the daemon itself (operator)
    Info,
    /// Have the daemon read its configuration again (operator)
    ///
    /// Policy, limits, the log's level and the declared domains come into force;
    /// what needs a restart is said. A file that is not good changes nothing.
    Reload,
    /// Print the versions of this program and of the daemon
    Version(Version),
    /// Print a completion script for a shell
    Completion(Completion),
}

/// What can be created.
#[derive(Debug, Subcommand)]
pub(crate) enum Create {
    /// Create a domain and its memory
    ///
    /// Sizes are rounded up to the granule; -o wide shows what came out.
    #[command(aliases = ["domains", "dom"])]
    Domain(CreateDomain),
    /// Create memory that belongs to a domain and stays, to be mapped
    ///
    /// Attaches as a driver for as long as it takes, so the domain must be one
    /// that the caller may attach to; --admin does not help.
    ///
    /// If it fails or is interrupted before its id is printed, it is taken back.
    /// What kill -9, or a daemon that does not answer, may leave behind shows in
    /// `get memories`.
    #[command(aliases = ["memories", "mem"])]
    Memory(CreateMemory),
}

/// New memory.
#[derive(Debug, Args)]
pub(crate) struct CreateMemory {
    /// In which domain
    #[arg(value_parser = domain_id)]
    pub(crate) domain: DomainId,
    /// How much, rounded up to the domain's granule
    #[arg(long = "size", value_name = "SIZE", value_parser = size::parse)]
    pub(crate) size_bytes: u64,
    /// Let no mapping write it
    #[arg(long)]
    pub(crate) read_only: bool,
}

/// A new domain.
#[derive(Debug, Args)]
pub(crate) struct CreateDomain {
    /// Its name: lower-case letters, digits and inner hyphens, a letter first
    #[arg(value_parser = domain_id)]
    pub(crate) name: DomainId,
    /// Size of the bounce aperture, 0 for none [default: 64MiB]
    #[arg(long = "bounce", value_name = "SIZE", value_parser = size::parse)]
    pub(crate) bounce_bytes: Option<u64>,
    /// Size of the coherent aperture, 0 for none [default: 64MiB]
    #[arg(long = "coherent", value_name = "SIZE", value_parser = size::parse)]
    pub(crate) coherent_bytes: Option<u64>,
    /// Last address of the domain, included [default: 0xffffffffffff]
    #[arg(long, value_name = "ADDRESS", value_parser = size::parse)]
    pub(crate) iova_limit: Option<u64>,
    /// First address of the apertures
    #[arg(long, value_name = "ADDRESS", value_parser = size::parse, default_value = "0")]
    pub(crate) aperture_base: u64,
    /// Unit of allocation: 4KiB, 64KiB or 2MiB [default: 4KiB]
    #[arg(long = "granule", value_name = "SIZE", value_parser = granule_bytes)]
    pub(crate) granule_bytes: Option<u64>,
    /// The memory behind the apertures [default: memfd]
    #[arg(long, value_enum)]
    pub(crate) backing: Option<Backing>,
    #[command(flatten)]
    pub(crate) policy: Policy,
    /// Where no direct mapping may lie: 0x1000-0x1fff, both included, or
    /// 0x1000+4KiB
    #[arg(long = "reserve", value_name = "RANGE", value_delimiter = ',', value_parser = range::parse)]
    pub(crate) reserved: Vec<IovaRange>,
    /// Where direct mappings are placed that name no iova [default: anywhere]
    #[arg(long = "allow", value_name = "RANGE", value_delimiter = ',', value_parser = range::parse)]
    pub(crate) allowed: Vec<IovaRange>,
    /// Check everything and say what would be, but create nothing
    #[arg(long)]
    pub(crate) dry_run: bool,
}

/// What may be changed later, too.
#[derive(Debug, Args)]
pub(crate) struct Policy {
    /// When bounce memory is zeroed
    #[arg(long, value_enum)]
    pub(crate) scrub: Option<Scrub>,
    /// Most sessions at a time
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) quota_sessions: Option<u32>,
    /// Most mappings, allocations and leases at a time
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) quota_mappings: Option<u32>,
    /// Most registered memories at a time
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) quota_memories: Option<u32>,
    /// Most direct mappings at a time, with those that are removed and may still be in use
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) quota_direct: Option<u32>,
    /// Most leases of one session at a time
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) quota_leases: Option<u32>,
    /// Most bytes in the leases of one session, or none: no bound but the aperture
    #[arg(long, value_name = "SIZE", value_parser = size::parse_bound)]
    pub(crate) quota_lease_bytes: Option<u64>,
}

/// The memory behind the apertures.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Backing {
    /// Ordinary pages
    Memfd,
    /// Huge pages of 2 MiB from the node's pool
    #[value(name = "hugetlb-2m")]
    Hugetlb2m,
}

/// When bounce memory is zeroed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Scrub {
    /// Before a new mapping can show it
    OnMap,
    /// Also when it is freed
    OnUnmap,
}

/// What can be listed.
#[derive(Debug, Subcommand)]
pub(crate) enum Get {
    /// List domains
    #[command(aliases = ["domain", "dom"])]
    Domains(GetDomains),
    /// List sessions: who is attached
    #[command(aliases = ["session", "sess"])]
    Sessions(GetSessions),
    /// List what is mapped and allocated in a domain
    #[command(aliases = ["mapping", "map"])]
    Mappings(GetMappings),
    /// List the leases of a domain: bounce memory that drivers divide up themselves
    #[command(aliases = ["lease"])]
    Leases(GetLeases),
    /// List the memories that are registered in a domain
    #[command(aliases = ["memory", "mem"])]
    Memories(GetMemories),
}

/// Which domains.
#[derive(Debug, Args)]
pub(crate) struct GetDomains {
    /// Only these
    #[arg(value_name = "NAME", value_parser = domain_id)]
    pub(crate) names: Vec<DomainId>,
}

/// Which sessions.
#[derive(Debug, Args)]
pub(crate) struct GetSessions {
    /// Only these
    #[arg(value_name = "SESSION", value_parser = session_id)]
    pub(crate) sessions: Vec<SessionId>,
    /// Only those of this domain
    #[arg(long, value_name = "DOMAIN", value_parser = domain_id, conflicts_with = "sessions")]
    pub(crate) domain: Option<DomainId>,
}

/// Which mappings.
#[derive(Debug, Args)]
pub(crate) struct GetMappings {
    #[command(flatten)]
    pub(crate) domain: InDomain,
    /// Only those of this session
    #[arg(long, value_parser = session_id)]
    pub(crate) session: Option<SessionId>,
    /// Only this kind
    #[arg(long, value_enum)]
    pub(crate) kind: Option<Kind>,
    /// Only what leads to this memory
    #[arg(long, value_name = "ID", value_parser = memory_id)]
    pub(crate) memory: Option<Scoped<MemoryId>>,
    /// Only what shows this byte of the memory
    #[arg(long, value_name = "BYTES", value_parser = size::parse, requires = "memory")]
    pub(crate) offset: Option<u64>,
    /// Only what overlaps these addresses: 0x1000-0x1fff, 0x1000+4KiB, or one
    #[arg(long, value_name = "RANGE", value_parser = range::parse_scoped_or_address)]
    pub(crate) range: Option<Scoped<IovaRange>>,
}

/// Which leases.
#[derive(Debug, Args)]
pub(crate) struct GetLeases {
    #[command(flatten)]
    pub(crate) domain: InDomain,
    /// Only those of this session
    #[arg(long, value_parser = session_id)]
    pub(crate) session: Option<SessionId>,
}

/// Which memories.
#[derive(Debug, Args)]
pub(crate) struct GetMemories {
    #[command(flatten)]
    pub(crate) domain: InDomain,
}

/// One domain, with or without the flag.
#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
pub(crate) struct InDomain {
    /// Of which domain
    #[arg(value_name = "DOMAIN", value_parser = domain_id)]
    bare: Option<DomainId>,
    /// Of which domain
    #[arg(long = "domain", value_name = "DOMAIN", value_parser = domain_id)]
    flag: Option<DomainId>,
}

/// What a mapping is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Kind {
    /// Bounced buffers
    Streaming,
    /// Coherent allocations
    Coherent,
    /// Registered memory, without a bounce
    Direct,
    /// Bounce memory that drivers divide up themselves
    Lease,
}

/// What can be described.
#[derive(Debug, Subcommand)]
pub(crate) enum Describe {
    /// Show all that is known of domains
    #[command(aliases = ["domains", "dom"])]
    Domain {
        #[arg(value_name = "NAME", required = true, value_parser = domain_id)]
        names: Vec<DomainId>,
    },
    /// Show all that is known of sessions
    #[command(aliases = ["sessions", "sess"])]
    Session {
        #[arg(value_name = "SESSION", required = true, value_parser = session_id)]
        sessions: Vec<SessionId>,
    },
}

/// What can be watched.
#[derive(Debug, Subcommand)]
pub(crate) enum Watch {
    /// Print what is mapped in a domain, and then every change of it
    ///
    /// Until it is interrupted, nobody reads any more, or the domain is deleted.
    /// At the left: = was there, + is new, - is gone, resync (changes were
    /// missed, all that is there follows), status (sessions, and what is held
    /// back because of them). -o json prints one object a line.
    #[command(aliases = ["domains", "dom"])]
    Domain(WatchDomain),
}

/// Which domain to watch, and from when on.
#[derive(Debug, Args)]
pub(crate) struct WatchDomain {
    /// Which
    #[arg(value_parser = domain_id)]
    pub(crate) name: DomainId,
    /// Only what has come after this generation, if that is still known
    #[arg(long, value_name = "N")]
    pub(crate) generation: Option<u64>,
}

/// What can be changed.
#[derive(Debug, Subcommand)]
pub(crate) enum Update {
    /// Change a domain's scrubbing, quotas, reserved and allowed ranges
    #[command(aliases = ["domains", "dom"])]
    Domain(UpdateDomain),
}

/// What of a domain to change. What is not named stays.
#[derive(Debug, Args)]
#[command(group(
    ArgGroup::new("change")
        .args([
            "scrub", "quota_sessions", "quota_mappings", "quota_memories", "quota_direct",
            "reserved", "clear_reserved", "allowed", "clear_allowed",
        ])
        .required(true)
        .multiple(true)
))]
pub(crate) struct UpdateDomain {
    /// Which domain
    #[arg(value_parser = domain_id)]
    pub(crate) name: DomainId,
    #[command(flatten)]
    pub(crate) policy: Policy,
    /// Where from now on no direct mapping may lie, in place of the former
    /// ranges
    #[arg(long = "reserve", value_name = "RANGE", value_delimiter = ',', value_parser = range::parse)]
    pub(crate) reserved: Vec<IovaRange>,
    /// Reserve nothing any more
    #[arg(long, conflicts_with = "reserved")]
    pub(crate) clear_reserved: bool,
    /// Where from now on direct mappings are placed that name no iova, in place
    /// of the former ranges
    #[arg(long = "allow", value_name = "RANGE", value_delimiter = ',', value_parser = range::parse)]
    pub(crate) allowed: Vec<IovaRange>,
    /// Place direct mappings anywhere
    #[arg(long, conflicts_with = "allowed")]
    pub(crate) clear_allowed: bool,
}

/// What can be deleted.
#[derive(Debug, Subcommand)]
pub(crate) enum Delete {
    /// Delete domains
    #[command(aliases = ["domains", "dom"])]
    Domain(DeleteDomains),
    /// Delete memory that belongs to a domain and is not mapped any more
    ///
    /// Attaches as a driver for as long as it takes, so the domain must be one
    /// that the caller may attach to; --admin does not help.
    #[command(
        aliases = ["memories", "mem"],
        override_usage = "domainctl delete memory [OPTIONS] [DOMAIN] <ID>..."
    )]
    Memory(DeleteMemories),
}

/// Which memories to delete.
#[derive(Debug, Args)]
pub(crate) struct DeleteMemories {
    /// The domain, which may be left out if the memories are named with it, and
    /// then the memories: 3, or domains/d0/memories/3 as -o name prints it
    #[arg(value_name = "DOMAIN|ID", required = true, value_parser = memory_word)]
    pub(crate) words: Vec<Word<MemoryId>>,
}

/// Which domains to delete.
#[derive(Debug, Args)]
pub(crate) struct DeleteDomains {
    /// Which
    #[arg(value_name = "NAME", required = true, value_parser = domain_id)]
    pub(crate) names: Vec<DomainId>,
    /// End their sessions and drop what they hold
    #[arg(long)]
    pub(crate) force: bool,
    /// Succeed for those that are not there
    #[arg(long)]
    pub(crate) ignore_not_found: bool,
}

/// Whom to evict.
#[derive(Debug, Args)]
pub(crate) struct Evict {
    /// Which, as `get sessions` shows
    #[arg(value_name = "SESSION", required = true, value_parser = session_id)]
    pub(crate) sessions: Vec<SessionId>,
}

/// What to allocate.
#[derive(Debug, Args)]
pub(crate) struct Alloc {
    /// In which domain
    #[arg(value_parser = domain_id)]
    pub(crate) domain: DomainId,
    /// How much
    #[arg(value_name = "LEN", value_parser = size::parse)]
    pub(crate) len_bytes: u64,
    /// Alignment, a power of two [default: the granule]
    #[arg(long = "align", value_name = "SIZE", value_parser = size::parse, default_value = "0", hide_default_value = true)]
    pub(crate) align_bytes: u64,
    /// Last address that may be used
    #[arg(long, value_name = "ADDRESS", value_parser = size::parse)]
    pub(crate) limit: Option<u64>,
}

/// What to free.
#[derive(Debug, Args)]
pub(crate) struct Free {
    /// In which domain
    #[arg(value_parser = domain_id)]
    pub(crate) domain: DomainId,
    /// Its first address, as `alloc` printed
    #[arg(value_parser = size::parse)]
    pub(crate) iova: u64,
    /// Its id, as `alloc` printed
    #[arg(long, value_name = "N")]
    pub(crate) id: u64,
}

/// What to map.
#[derive(Debug, Args)]
pub(crate) struct Map {
    /// In which domain; may be left out if the memory is named with it, or if
    /// there is only one
    #[arg(value_parser = domain_id)]
    pub(crate) domain: Option<DomainId>,
    /// Which memory, as `get memories` shows
    #[arg(long, value_name = "ID", value_parser = memory_id)]
    pub(crate) memory: Scoped<MemoryId>,
    /// Where in the memory to begin
    #[arg(long, value_name = "BYTES", value_parser = size::parse, default_value = "0")]
    pub(crate) offset: u64,
    /// How much of it
    #[arg(long = "length", value_name = "SIZE", value_parser = size::parse)]
    pub(crate) len_bytes: u64,
    /// What devices may do with it
    #[arg(long, value_enum)]
    pub(crate) perm: Perm,
    /// Where it shall appear [default: wherever there is room]
    #[arg(long, value_name = "ADDRESS", value_parser = size::parse, conflicts_with_all = ["align_bytes", "limit"])]
    pub(crate) iova: Option<u64>,
    /// Alignment, a power of two [default: the granule]
    #[arg(long = "align", value_name = "SIZE", value_parser = size::parse)]
    pub(crate) align_bytes: Option<u64>,
    /// Last address that may be used
    #[arg(long, value_name = "ADDRESS", value_parser = size::parse)]
    pub(crate) limit: Option<u64>,
}

/// What devices may do with memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Perm {
    /// Read it
    #[value(name = "r", alias = "read")]
    Read,
    /// Write it
    #[value(name = "w", alias = "write")]
    Write,
    /// Both
    #[value(name = "rw", aliases = ["read-write", "read_write"])]
    ReadWrite,
}

/// What to unmap.
#[derive(Debug, Args)]
pub(crate) struct Unmap {
    /// The domain, which may be left out if the ranges are named with it or if
    /// there is only one, and then the ranges: 0x1000-0x1fff, both included, or
    /// 0x1000+4KiB, or domains/d0/mappings/0x1000-0x1fff as -o name prints it
    #[arg(value_name = "DOMAIN|RANGE", value_parser = word)]
    pub(crate) words: Vec<Word<IovaRange>>,
    /// Everything that is mapped directly
    #[arg(long)]
    pub(crate) all: bool,
}

/// The new table.
#[derive(Debug, Args)]
pub(crate) struct SetMap {
    /// In which domain; may be left out if the file says it, or if there is
    /// only one
    #[arg(value_parser = domain_id)]
    pub(crate) domain: Option<DomainId>,
    /// The table as JSON or YAML, - for standard input
    ///
    /// {"entries": [{"range": {"start": "0x100000", "last": "0x100fff"},
    /// "memoryId": 1, "offset": 0, "perm": "rw"}]}; instead of range also iova
    /// and length. Entries are counted from 0.
    #[arg(short, long = "file", value_name = "FILE")]
    pub(crate) file: PathBuf,
    /// Only if the table has not changed since this generation
    #[arg(long, value_name = "N")]
    pub(crate) expected_generation: Option<u64>,
}

/// What to clear.
#[derive(Debug, Args)]
pub(crate) struct ClearMap {
    /// The domain, which may be left out if the ranges are named with it or if
    /// there is only one, and then the ranges: 0x1000-0x1fff, both included, or
    /// 0x1000+4KiB, or domains/d0/mappings/0x1000-0x1fff as -o name prints it
    #[arg(value_name = "DOMAIN|RANGE", required = true, value_parser = word)]
    pub(crate) words: Vec<Word<IovaRange>>,
}

/// What to reset.
#[derive(Debug, Args)]
pub(crate) struct ResetBounce {
    /// Of which domain
    #[arg(value_parser = domain_id)]
    pub(crate) domain: DomainId,
    /// Also while drivers hold streaming mappings and leases, which lose what
    /// has not flowed back
    #[arg(long)]
    pub(crate) force: bool,
}

/// What to translate.
#[derive(Debug, Args)]
pub(crate) struct Translate {
    /// The domain, which may be left out if the range is named with it or if
    /// there is only one, and then the range: 0x1000-0x1fff, both included,
    /// 0x1000+4KiB, domains/d0/mappings/0x1000-0x1fff, or one address
    #[arg(value_name = "DOMAIN|RANGE", required = true, num_args = 1..=2, value_parser = word_or_address)]
    pub(crate) words: Vec<Word<IovaRange>>,
    /// What shall be done with it
    #[arg(long, value_enum, default_value = "r")]
    pub(crate) want: Perm,
}

/// What to look up.
#[derive(Debug, Args)]
pub(crate) struct Lookup {
    /// The domain, which may be left out if the range is named with it or if
    /// there is only one, and then the range: 0x1000-0x1fff, both included,
    /// 0x1000+4KiB, domains/d0/mappings/0x1000-0x1fff, or one address
    #[arg(value_name = "DOMAIN|RANGE", required = true, num_args = 1..=2, value_parser = word_or_address)]
    pub(crate) words: Vec<Word<IovaRange>>,
}

/// A domain or something in one: no domain begins with a digit, and every range
/// and id does, or has it behind the name of what it is in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Word<T> {
    /// In which domain.
    Domain(DomainId),
    /// What.
    Thing(Scoped<T>),
}

/// Which daemon to ask for its health.
#[derive(Debug, Args)]
pub(crate) struct Health {
    /// Over which socket [default: public, or admin with --admin]
    #[arg(long, value_enum)]
    pub(crate) socket: Option<Socket>,
}

/// A gRPC socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Socket {
    /// The clients'
    Public,
    /// The operator's
    Admin,
}

/// Whose version.
#[derive(Debug, Args)]
pub(crate) struct Version {
    /// Only of this program; ask no daemon
    #[arg(long)]
    pub(crate) client: bool,
}

/// For which shell.
#[derive(Debug, Args)]
pub(crate) struct Completion {
    /// Which
    #[arg(value_enum)]
    pub(crate) shell: Shell,
}

/// A shell that can complete.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Shell {
    /// `source <(domainctl completion bash)`
    Bash,
    /// `source <(domainctl completion zsh)`
    Zsh,
    /// `domainctl completion fish | source`
    Fish,
}

impl InDomain {
    /// Which it is.
    pub(crate) fn id(self) -> DomainId {
        let id = self.bare.or(self.flag);
        id.expect("clap lets nobody through without one of the two")
    }
}

impl Policy {
    /// On the wire a zero means the default, or in an update what is there.
    pub(crate) fn quotas(&self) -> v1::Quotas {
        v1::Quotas {
            sessions: self.quota_sessions.unwrap_or(0),
            mappings: self.quota_mappings.unwrap_or(0),
            memories: self.quota_memories.unwrap_or(0),
            direct: self.quota_direct.unwrap_or(0),
            leases: self.quota_leases.unwrap_or(0),
            lease_bytes: self.quota_lease_bytes.unwrap_or(0),
        }
    }

    /// Unspecified if not asked for.
    pub(crate) fn scrub(&self) -> v1::Scrub {
        match self.scrub {
            None => v1::Scrub::Unspecified,
            Some(Scrub::OnMap) => v1::Scrub::OnMap,
            Some(Scrub::OnUnmap) => v1::Scrub::OnUnmap,
        }
    }
}

impl From<Backing> for v1::Backing {
    fn from(backing: Backing) -> v1::Backing {
        match backing {
            Backing::Memfd => v1::Backing::Memfd,
            Backing::Hugetlb2m => v1::Backing::Hugetlb2m,
        }
    }
}

impl From<Kind> for v1::MappingKind {
    fn from(kind: Kind) -> v1::MappingKind {
        match kind {
            Kind::Streaming => v1::MappingKind::Streaming,
            Kind::Coherent => v1::MappingKind::Coherent,
            Kind::Direct => v1::MappingKind::Direct,
            Kind::Lease => v1::MappingKind::Lease,
        }
    }
}

impl From<Perm> for domain_core::Perm {
    fn from(perm: Perm) -> domain_core::Perm {
        match perm {
            Perm::Read => domain_core::Perm::Read,
            Perm::Write => domain_core::Perm::Write,
            Perm::ReadWrite => domain_core::Perm::ReadWrite,
        }
    }
}

/// `7`, `sessions/7` or `session/7`.
fn session_id(text: &str) -> Result<SessionId, NameError> {
    parse_session_lenient(text.strip_prefix("session/").unwrap_or(text))
}

/// `3`, or `memories/3` with or without its domain, as `-o name` prints it.
fn memory_id(text: &str) -> Result<Scoped<MemoryId>, NotAMemory> {
    let Scoped { domain, thing } = scoped::split(MEMORIES, text)?;
    let number = thing.parse().map_err(|_| NotAMemory::Number)?;
    let thing = MemoryId::new(number);
    Ok(Scoped { domain, thing })
}

/// What a memory has its name in.
const MEMORIES: &[&str] = &["memories/", "memory/"];

/// Why a text names no memory.
#[derive(Clone, Debug, thiserror::Error)]
enum NotAMemory {
    #[error("not the number of a memory: `get memories` shows them")]
    Number,
    #[error(transparent)]
    Domain(#[from] NameError),
}

/// Why a text is neither a domain nor something in one.
#[derive(Clone, Debug, thiserror::Error)]
enum NotAWord {
    #[error(transparent)]
    Range(#[from] NotScoped),
    #[error(transparent)]
    Memory(#[from] NotAMemory),
    #[error(transparent)]
    Domain(#[from] NameError),
}

fn word(text: &str) -> Result<Word<IovaRange>, NotAWord> {
    match range::looks_like(text) {
        true => Ok(Word::Thing(range::parse_scoped(text)?)),
        false => Ok(Word::Domain(domain_id(text)?)),
    }
}

fn word_or_address(text: &str) -> Result<Word<IovaRange>, NotAWord> {
    match range::looks_like(text) {
        true => Ok(Word::Thing(range::parse_scoped_or_address(text)?)),
        false => Ok(Word::Domain(domain_id(text)?)),
    }
}

fn memory_word(text: &str) -> Result<Word<MemoryId>, NotAWord> {
    let has_number = text.starts_with(|c: char| c.is_ascii_digit());
    match has_number || scoped::is_in(MEMORIES, text) {
        true => Ok(Word::Thing(memory_id(text)?)),
        false => Ok(Word::Domain(domain_id(text)?)),
    }
}

/// Why a size is not a granule.
#[derive(Clone, Debug, thiserror::Error)]
enum GranuleError {
    #[error(transparent)]
    Size(#[from] SizeError),
    #[error("there are granules of 4KiB, 64KiB and 2MiB")]
    NoSuchGranule,
}

fn granule_bytes(text: &str) -> Result<u64, GranuleError> {
    let bytes = size::parse(text)?;
    match Granule::from_bytes(bytes) {
        Some(_) => Ok(bytes),
        None => Err(GranuleError::NoSuchGranule),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;
    use clap::error::ErrorKind;

    fn parse(line: &str) -> Result<Cli, clap::Error> {
        Cli::try_parse_from(["domainctl"].into_iter().chain(line.split_whitespace()))
    }

    #[test]
    fn the_definition_holds_together() {
        Cli::command().debug_assert();
    }

    #[test]
    fn resources_are_known_in_singular_plural_and_short() {
        for word in ["domain", "domains", "dom"] {
            parse(&format!("get {word}")).unwrap();
            parse(&format!("create {word} d0")).unwrap();
            parse(&format!("describe {word} d0")).unwrap();
            parse(&format!("delete {word} d0 d1")).unwrap();
            parse(&format!("update {word} d0 --scrub on-map")).unwrap();
            parse(&format!("watch {word} d0 --generation 7")).unwrap();
        }
        for word in ["session", "sessions", "sess"] {
            parse(&format!("get {word} --domain d0")).unwrap();
            parse(&format!("describe {word} 7")).unwrap();
        }
        for word in ["mapping", "mappings", "map", "memory", "memories", "mem"] {
            parse(&format!("get {word} d0")).unwrap();
        }
        for word in ["memory", "memories", "mem"] {
            parse(&format!("create {word} d0 --size 1MiB")).unwrap();
            parse(&format!("delete {word} d0 1 2")).unwrap();
        }
    }

    #[test]
    fn what_o_name_prints_can_be_typed_back() {
        for name in ["d0", "domains/d0", "domain/d0"] {
            assert_eq!(domain_id(name).unwrap().as_str(), "d0");
        }
        for name in ["7", "sessions/7", "session/7"] {
            assert_eq!(session_id(name).unwrap(), SessionId::new(7));
        }
        let d0 = DomainId::new("d0").ok();
        for (name, domain) in [
            ("3", None),
            ("memories/3", None),
            ("memory/3", None),
            ("domains/d0/memories/3", d0.clone()),
        ] {
            let thing = MemoryId::new(3);
            let memory = Scoped { domain, thing };
            assert_eq!(memory_id(name).unwrap(), memory);
            assert_eq!(memory_word(name).unwrap(), Word::Thing(memory));
        }
        for (name, domain) in [
            ("0x1000-0x1fff", None),
            ("domains/d0/mappings/0x1000-0x1fff", d0),
        ] {
            let thing = range::parse("0x1000+4KiB").unwrap();
            let range = Word::Thing(Scoped { domain, thing });
            assert_eq!(word(name).unwrap(), range);
            assert_eq!(word_or_address(name).unwrap(), range);
        }
    }

    #[test]
    fn ranges_are_told_from_the_domain_before_them() {
        let Command::Unmap(args) = parse("unmap d0 0x1000+4KiB 0x3000-0x3fff").unwrap().command
        else {
            panic!("it is unmap");
        };
        assert_eq!(args.words.len(), 3);
        assert_eq!(args.words[0], Word::Domain(DomainId::new("d0").unwrap()));
        parse("unmap --all").unwrap();
        parse("clear-map 0x1000+4KiB").unwrap();
        parse("translate d0 0x1000 --want rw").unwrap();
        parse("lookup 0x1000").unwrap();
    }

    #[test]
    fn direct_mappings_have_a_place_or_wishes_for_one() {
        let map = "map d0 --memory 1 --length 64KiB --perm";
        for rest in [
            "rw",
            "read",
            "w --iova 0x1000",
            "r --align 2MiB --limit 4GiB",
        ] {
            parse(&format!("{map} {rest}")).unwrap();
        }
        for rest in [
            "x",
            "rw --iova 0x1000 --align 4KiB",
            "rw --iova 1 --limit 2",
        ] {
            assert_eq!(parse(&format!("{map} {rest}")).unwrap_err().exit_code(), 2);
        }
    }

    #[test]
    fn a_domain_is_named_once_with_or_without_the_flag() {
        for line in ["get mappings d0", "get mappings --domain d0"] {
            let Command::Get(Get::Mappings(args)) = parse(line).unwrap().command else {
                panic!("{line} lists mappings");
            };
            assert_eq!(args.domain.id().as_str(), "d0");
        }
        let refused = |line| parse(line).unwrap_err().kind();
        assert_eq!(refused("get mappings"), ErrorKind::MissingRequiredArgument);
        assert_eq!(
            refused("get mappings d0 --domain d0"),
            ErrorKind::ArgumentConflict
        );
    }

    #[test]
    fn an_update_must_change_something() {
        let refused = parse("update domain d0").unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::MissingRequiredArgument);
        parse("update domain d0 --quota-sessions 3 --quota-memories 4").unwrap();
        parse("update domain d0 --reserve 0x1000+4KiB --clear-allowed").unwrap();
        for line in [
            "update domain d0 --reserve 0x1000+4KiB --clear-reserved",
            "update domain d0 --allow 0x1000+4KiB --clear-allowed",
        ] {
            let refused = parse(line).unwrap_err();
            assert_eq!(refused.kind(), ErrorKind::ArgumentConflict, "{line}");
        }
    }

    #[test]
    fn nonsense_is_refused_before_the_daemon_is_asked() {
        for line in [
            "create domain D0",
            "create domain d0 --bounce 1.5GiB",
            "create domain d0 --bounce 16EiB",
            "create domain d0 --granule 8KiB",
            "create domain d0 --quota-sessions 0",
            "evict x",
            "evict",
            "alloc d0",
            "free d0 0x1000",
            "create memory d0",
            "delete memory",
            "delete memory d0 1x",
            "delete memory d0 memories/x",
            "delete memory d0 sessions/7/memories/1",
            "map d0 --memory 1 --perm rw",
            "unmap d0 0x1000",
            "unmap d0 0x1fff-0x1000",
            "unmap D0/mappings/0x1000-0x1fff",
            "unmap domains/d0/mappings/9",
            "clear-map",
            "set-map d0",
            "translate d0 0x1000 0x2000 0x3000",
            "lookup D0 0x1000",
            "get mappings d0 --offset 0",
            "get mappings d0 --range x",
            "create domain d0 --reserve 0x1000",
            "create domain d0 --reserve domains/d1/mappings/0x1000-0x1fff",
            "delete domain",
            "describe domain",
            "watch",
            "watch domain",
            "watch domain d0 d1",
            "watch domain d0 --generation -1",
            "get sessions 7 --domain d0",
            "completion tcsh",
        ] {
            let refused = parse(line).unwrap_err();
            assert_eq!(refused.exit_code(), 2, "{line}");
        }
    }

    #[test]
    fn global_options_stand_before_or_after_the_command() {
        for line in [
            "--runtime-dir /tmp/x -o json get domains",
            "get domains -o json --runtime-dir /tmp/x",
        ] {
            let global = parse(line).unwrap().global;
            assert_eq!(global.output, Format::Json, "{line}");
            assert_eq!(global.runtime_dir, Some(PathBuf::from("/tmp/x")));
            assert_eq!(global.timeout, Duration::from_secs(10));
        }
    }
}
