//! What ends a command from outside while it has something to clean up, or
//! while nothing happens that it could print.

use std::io;
use std::thread;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::stdio::stdout;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::oneshot;

/// What ends a command from outside. From the moment it exists the signals kill
/// nobody any more.
pub(crate) struct Signals {
    interrupt: Signal,
    terminate: Signal,
    hangup: Signal,
}

impl Signals {
    pub(crate) fn new() -> io::Result<Signals> {
        Ok(Signals {
            interrupt: signal(SignalKind::interrupt())?,
            terminate: signal(SignalKind::terminate())?,
            hangup: signal(SignalKind::hangup())?,
        })
    }

    /// Resolves when the next one arrives, and says which.
    pub(crate) async fn any(&mut self) -> &'static str {
        tokio::select! {
            _ = self.interrupt.recv() => "interrupted",
            _ = self.terminate.recv() => "terminated",
            _ = self.hangup.recv() => "the terminal has gone",
        }
    }
}

/// Resolves when nobody can read standard output any more; never if it is
/// something that does not tell, such as a file.
pub(crate) struct Unread(oneshot::Receiver<()>);

impl Unread {
    /// Looks from a thread of its own, which ends with the process: tokio can
    /// only be told of fds that nobody else owns.
    pub(crate) fn new() -> io::Result<Unread> {
        let (tell, told) = oneshot::channel();
        let look = move || {
            // No event is asked for: errors and the end are told all the same.
            let mut fds = [PollFd::from_borrowed_fd(stdout(), PollFlags::empty())];
            while poll(&mut fds, None) == Err(Errno::INTR) {}
            let _ = tell.send(());
        };
        thread::Builder::new().spawn(look)?;
        Ok(Unread(told))
    }

    /// Waits for it. Cancel safe, but not to be called again when it was so.
    pub(crate) async fn unread(&mut self) {
        let _ = (&mut self.0).await;
    }
}
