//! What a service manager hears of the daemon (`sd_notify`): that it serves,
//! reloads, stops, what it does, and that it is alive.
//!
//! Written by hand: the crate `sd-notify` knows no abstract sockets, which is
//! what containers get, and waits for as long as the manager does not read.

use std::env;
use std::ffi::OsStr;
use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::SocketAddr;
use std::process;
use std::sync::Arc;
use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};
use tokio::net::UnixDatagram;
use tokio::time::{MissedTickBehavior, interval, timeout};
use tokio_util::task::AbortOnDropHandle;

use crate::pulse::{Census, Pulse};

/// A manager that does not read what it is told for so long is not told.
const SEND_LIMIT: Duration = Duration::from_secs(2);
/// How often `STATUS` is looked at; it is sent when it has changed.
const STATUS_INTERVAL: Duration = Duration::from_secs(5);

/// The service manager, if one started us and wants to hear of us.
#[derive(Clone, Debug, Default)]
pub struct ServiceManager {
    address: Option<SocketAddr>,
    /// It kills us when it has not heard of us for so long.
    watchdog: Option<Duration>,
}

/// Tells how the daemon is, and that it lives, while it lives itself.
#[derive(Debug)]
pub struct Attending {
    manager: ServiceManager,
    status: Option<AbortOnDropHandle<()>>,
    _beating: Option<AbortOnDropHandle<()>>,
}

impl Attending {
    /// The daemon stops. It goes on telling that it lives: stopping takes a
    /// while, too.
    pub async fn stopping(&mut self) {
        self.status = None;
        self.manager.tell("STOPPING=1\nSTATUS=Stopping").await;
    }
}

/// Why nobody can be told.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)] // the messages are the docs
pub enum ManagerError {
    #[error("NOTIFY_SOCKET is {value:?}, which is no address of a Unix socket")]
    Address {
        value: String,
        #[source]
        cause: io::Error,
    },
    #[error("WATCHDOG_USEC is {value:?}, which is no number of microseconds above 0")]
    Watchdog { value: String },
}

impl ServiceManager {
    /// The one that the environment names; nobody if it names none.
    ///
    /// # Errors
    /// [`ManagerError`]: a manager that waits for READY would wait in vain.
    pub fn from_env() -> Result<ServiceManager, ManagerError> {
        let address = match env::var_os("NOTIFY_SOCKET") {
            Some(value) if !value.is_empty() => Some(address(&value)?),
            _ => None,
        };
        let text = |name| env::var(name).ok().filter(|value| !value.is_empty());
        let for_us = match text("WATCHDOG_PID") {
            Some(pid) => pid.parse() == Ok(process::id()),
            None => true,
        };
        let watchdog = match text("WATCHDOG_USEC") {
            Some(value) if for_us => Some(microseconds(value)?),
            _ => None,
        };
        Ok(ServiceManager { address, watchdog })
    }

    /// Everything is bound and served, at the start and behind a reload.
    pub async fn ready(&self) {
        self.tell("READY=1").await;
    }

    /// The configuration is read again; [`ready`](ServiceManager::ready) must
    /// follow, also when it was refused.
    pub async fn reloading(&self) {
        // The manager tells by it this reload from one that it asks for later.
        let now = clock_gettime(ClockId::Monotonic);
        let microseconds = i128::from(now.tv_sec) * 1_000_000 + i128::from(now.tv_nsec) / 1_000;
        self.tell(&format!("RELOADING=1\nMONOTONIC_USEC={microseconds}"))
            .await;
    }

    /// One line for people, shown by `systemctl status`.
    pub async fn status(&self, text: &str) {
        let line = text.replace('\n', " ");
        self.tell(&format!("STATUS={line}")).await;
    }

    /// Keeps telling how the daemon is, and that it lives, until what this
    /// answers is dropped, which is when the daemon has stopped. Must be called inside the runtime that serves: it is
    /// that one whose life is told. Each beat also looks into the tables, so a
    /// daemon that is stuck there is as good as dead.
    #[must_use]
    pub fn attend(&self, pulse: Arc<Pulse>) -> Attending {
        let is_told = self.address.is_some();
        let status = is_told.then(|| tokio::spawn(self.clone().tell_status(Arc::clone(&pulse))));
        let beats = self.watchdog.filter(|_| is_told);
        let beating = beats.map(|limit| tokio::spawn(self.clone().beat(pulse, limit / 2)));
        Attending {
            manager: self.clone(),
            status: status.map(AbortOnDropHandle::new),
            _beating: beating.map(AbortOnDropHandle::new),
        }
    }

    async fn beat(self, pulse: Arc<Pulse>, every: Duration) {
        let mut ticks = interval(every);
        // Beats that were missed say nothing about now.
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            pulse.beat();
            self.tell("WATCHDOG=1").await;
        }
    }

    async fn tell_status(self, pulse: Arc<Pulse>) {
        let mut told = None;
        let mut ticks = interval(STATUS_INTERVAL);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            let now = pulse.beat();
            if told != Some(now) {
                let Census { domains, sessions } = now;
                self.status(&format!("Serving {domains} domains, {sessions} sessions"))
                    .await;
                told = Some(now);
            }
        }
    }

    /// What cannot be told is lost; the daemon serves all the same.
    async fn tell(&self, lines: &str) {
        let Some(address) = &self.address else {
            return;
        };
        let said = lines.replace('\n', " ");
        match timeout(SEND_LIMIT, send(address, lines)).await {
            Ok(Ok(())) => tracing::trace!(said, "told the service manager"),
            Ok(Err(cause)) => tracing::warn!(said, %cause, "cannot tell the service manager"),
            Err(_) => {
                tracing::warn!(said, limit = ?SEND_LIMIT, "the service manager does not read");
            }
        }
    }
}

async fn send(address: &SocketAddr, lines: &str) -> io::Result<()> {
    let socket = std::os::unix::net::UnixDatagram::unbound()?;
    socket.set_nonblocking(true)?;
    socket.connect_addr(address)?;
    UnixDatagram::from_std(socket)?
        .send(lines.as_bytes())
        .await?;
    Ok(())
}

/// A path, or a name behind an `@` that is in no file system.
fn address(value: &OsStr) -> Result<SocketAddr, ManagerError> {
    let address = match value.as_bytes() {
        [b'@', name @ ..] => SocketAddr::from_abstract_name(name),
        [b'/', ..] => SocketAddr::from_pathname(value),
        _ => Err(io::ErrorKind::InvalidInput.into()),
    };
    address.map_err(|cause| ManagerError::Address {
        value: value.to_string_lossy().into_owned(),
        cause,
    })
}

fn microseconds(value: String) -> Result<Duration, ManagerError> {
    match value.parse() {
        // Half of one microsecond would be no pause at all.
        Ok(number @ 2..) => Ok(Duration::from_micros(number)),
        _ => Err(ManagerError::Watchdog { value }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn manager(address: SocketAddr) -> ServiceManager {
        ServiceManager {
            address: Some(address),
            watchdog: None,
        }
    }

    #[test]
    fn addresses_are_paths_or_abstract_and_nothing_else() {
        let abstract_one = address(OsStr::new("@a/b")).unwrap();
        assert_eq!(abstract_one.as_abstract_name(), Some(&b"a/b"[..]));
        let path = address(OsStr::new("/run/n")).unwrap();
        assert!(path.as_pathname().is_some());
        for wrong in ["run/n", "vsock:2:1234", &format!("/{}", "x".repeat(200))] {
            let refused = address(OsStr::new(wrong)).unwrap_err();
            assert!(refused.to_string().contains(wrong), "{refused}");
        }
    }

    #[test]
    fn a_watchdog_without_time_is_refused() {
        assert_eq!(
            microseconds("3000000".into()).unwrap(),
            Duration::from_secs(3)
        );
        for wrong in ["0", "1", "-3", "soon"] {
            assert!(microseconds(wrong.into()).is_err(), "{wrong}");
        }
    }

    /// Systemd reads it all; a manager that does not must not hold us up.
    #[tokio::test(start_paused = true)]
    async fn a_manager_that_does_not_read_is_waited_for_no_longer_than_the_limit() {
        let name = format!("domaind-test-{}", process::id());
        let bound = SocketAddr::from_abstract_name(&name).unwrap();
        let socket = std::os::unix::net::UnixDatagram::bind_addr(&bound).unwrap();
        let manager = manager(bound);
        let begun = tokio::time::Instant::now();
        // More than net.unix.max_dgram_qlen, which is 10 to 512.
        let mut waited = 0;
        for _ in 0..600 {
            manager.status("more\nthan one line").await;
            waited += 1;
            if begun.elapsed() >= SEND_LIMIT {
                break;
            }
        }
        assert!(begun.elapsed() >= SEND_LIMIT && waited < 600, "{waited}");
        let mut told = [0; 64];
        let len = socket.recv(&mut told).unwrap();
        assert_eq!(&told[..len], b"STATUS=more than one line");
    }
}
