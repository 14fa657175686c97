//! The daemon `domaind` as a library: everything between the sockets and
//! `domain-core`. The binary adds a command line, the environment and signals;
//! `domainctl demo` embeds it.
//!
//! | module | noun |
//! |---|---|
//! | [`daemon`] | one running daemon: starts everything, stops everything |
//! | [`config`] | what it was told: flags, environment, file, defaults |
//! | [`features`] | what the kernel offers |
//! | [`version`] | which build this is |
//! | [`logging`] | where its log lines go |
//! | [`prepare_dir`] | the runtime directory, made by root for a daemon without rights |
//! | [`passed`] | sockets that a service manager has bound for us |
//! | [`service_manager`] | what that manager hears of us |
//! | [`pulse`] | whether the daemon lives |
//! | [`http`] | requests for probes and metrics, on a thread of their own |
//! | `probes` | what probes are told |
//! | `metrics` | what is counted, and how it is told |
//! | `sockets` | the runtime directory, and sockets that replace one another |
//! | `peer` | who is at the other end, as the kernel says |
//! | `placement` | where a process runs: pod and container, or systemd unit |
//! | `policy` | the rules: who may create, see and attach to what |
//! | `glob` | names with `*` and `?` in them |
//! | `terms` | what is in force now: policy, and the limits that a reload changes |
//! | `visitor` | who comes without a session, and what the terms give them |
//! | `tenant` | whom domains belong to and quotas are for: a user, or one of its pods |
//! | `audit` | who was let in and who was not, one line each |
//! | `rights` | whether a socket takes fds at all |
//! | `accept` | connections, counted per user |
//! | `registry` | domains and sessions by name |
//! | `hosted` | one domain with its owner and its share of the budget |
//! | `declared` | the domains of the configuration file |
//! | [`reload`] | the configuration read once more |
//! | `streams` | watchers of domains and pipelines of sessions, counted |
//! | `live` | one attached session: its secret, its peer, its end |
//! | `reader` | a session as its domain has to wait for it |
//! | `settle` | waiting until nobody can still use what was removed |
//! | `ghost` | sessions that have ended, until they are proven gone |
//! | `signal` | that something has changed in a domain |
//! | `replay` | repeated requests: one effect and one answer |
//! | `budget` | bytes of regions, counted before the kernel is asked |
//! | `queue` | costly calls, few at a time of one user and of all |
//! | `offload` | work that may block, off the runtime's workers |
//! | `fdsock` | the protocol of the fd socket |
//! | `grpc` | the services, one file each |

mod accept;
mod audit;
mod budget;
pub mod config;
mod crew;
pub mod daemon;
mod declared;
mod fdsock;
pub mod features;
mod ghost;
mod glob;
mod grpc;
mod hosted;
pub mod http;
mod live;
pub mod logging;
mod metrics;
mod offload;
pub mod passed;
mod peer;
mod placement;
mod policy;
pub mod prepare_dir;
mod probes;
mod proc;
pub mod pulse;
mod queue;
mod reader;
mod registry;
pub mod reload;
mod replay;
mod rights;
pub mod service_manager;
mod settle;
mod signal;
mod sockets;
mod streams;
mod tenant;
mod terms;
pub mod version;
mod visitor;

pub use config::Config;
pub use daemon::Daemon;
