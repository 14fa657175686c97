//! A thread at the other end of a socket that sends back what comes: what it
//! costs to ask anybody at all.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::thread::{self, JoinHandle};

/// Messages of so many bytes, answered in order.
pub(super) struct Echo<const BYTES: usize> {
    socket: UnixStream,
    thread: Option<JoinHandle<()>>,
}

impl<const BYTES: usize> Echo<BYTES> {
    /// The thread does `work` for a message before it sends it back.
    pub(super) fn start(
        mut work: impl FnMut(&[u8; BYTES]) + Send + 'static,
    ) -> io::Result<Echo<BYTES>> {
        let (socket, mut other) = UnixStream::pair()?;
        let answering = move || {
            let mut message = [0; BYTES];
            while other.read_exact(&mut message).is_ok() {
                work(&message);
                if other.write_all(&message).is_err() {
                    return;
                }
            }
        };
        Ok(Echo {
            socket,
            thread: Some(thread::Builder::new().spawn(answering)?),
        })
    }

    /// Waits only if the socket is full.
    pub(super) fn send(&mut self, message: &[u8; BYTES]) -> io::Result<()> {
        self.socket.write_all(message)
    }

    /// The answer to the oldest message that is not answered.
    pub(super) fn receive(&mut self) -> io::Result<[u8; BYTES]> {
        let mut message = [0; BYTES];
        self.socket.read_exact(&mut message)?;
        Ok(message)
    }
}

impl<const BYTES: usize> Drop for Echo<BYTES> {
    fn drop(&mut self) {
        // The thread reads the end.
        let _ = self.socket.shutdown(Shutdown::Both);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;

    #[test]
    fn messages_come_back_in_order_each_after_its_work_and_the_thread_ends() {
        let sum = Arc::new(AtomicU32::new(0));
        let adding = Arc::clone(&sum);
        let add = move |message: &[u8; 3]| {
            adding.fetch_add(message[0].into(), Ordering::Relaxed);
        };
        let mut echo = Echo::start(add).unwrap();

        for number in 1..=8 {
            echo.send(&[number; 3]).unwrap();
        }

        for number in 1..=8 {
            assert_eq!(echo.receive().unwrap(), [number; 3]);
        }
        drop(echo);
        assert_eq!(sum.load(Ordering::Relaxed), 36);
        assert_eq!(Arc::strong_count(&sum), 1, "the thread has let go of it");
    }
}
