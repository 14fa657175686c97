//! The file, read ahead on a thread of its own: a pipe that stalls holds up
//! neither what is under way nor the look after the devices.

use std::io::{self, Read};
use std::sync::mpsc::{Receiver, TryRecvError, sync_channel};
use std::thread;

/// Blocks that are read ahead of the driver.
const AHEAD: usize = 2;

/// The blocks of a file, in order.
pub(crate) struct Input {
    blocks: Receiver<io::Result<Vec<u8>>>,
}

/// What there is right now.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Next {
    /// A block; only the last one may be shorter than the others.
    Block(Vec<u8>),
    /// Nothing yet.
    Later,
    /// Nothing any more.
    End,
}

impl Input {
    /// Begins to read. `bell` is rung whenever there is something new. The
    /// thread ends with the input, or with the process.
    pub(crate) fn open(
        mut file: impl Read + Send + 'static,
        block_bytes: u64,
        bell: impl Fn() + Send + 'static,
    ) -> Input {
        let (sender, blocks) = sync_channel(AHEAD);
        thread::spawn(move || {
            loop {
                let mut block = Vec::new();
                let read = file.by_ref().take(block_bytes).read_to_end(&mut block);
                let is_last = !matches!(read, Ok(1..));
                if sender.send(read.map(|_| block)).is_err() {
                    return;
                }
                bell();
                if is_last {
                    return;
                }
            }
        });
        Input { blocks }
    }

    /// Never waits.
    pub(crate) fn next(&self) -> io::Result<Next> {
        match self.blocks.try_recv() {
            Ok(Ok(block)) if block.is_empty() => Ok(Next::End),
            Ok(Ok(block)) => Ok(Next::Block(block)),
            Ok(Err(error)) => Err(error),
            Err(TryRecvError::Empty) => Ok(Next::Later),
            Err(TryRecvError::Disconnected) => Ok(Next::End),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(input: &Input) -> Vec<Vec<u8>> {
        let mut blocks = Vec::new();
        loop {
            match input.next().unwrap() {
                Next::Block(block) => blocks.push(block),
                Next::Later => thread::yield_now(),
                Next::End => return blocks,
            }
        }
    }

    #[test]
    fn a_file_comes_in_blocks_of_which_only_the_last_may_be_short() {
        let file: &[u8] = &[1, 2, 3, 4, 5];
        assert_eq!(
            all(&Input::open(file, 2, || ())),
            [vec![1, 2], vec![3, 4], vec![5]]
        );
        assert_eq!(
            all(&Input::open(&file[..4], 2, || ())),
            [vec![1, 2], vec![3, 4]]
        );
        assert!(all(&Input::open(io::empty(), 2, || ())).is_empty());
    }

    #[test]
    fn a_stalled_pipe_is_later_and_not_the_end() {
        let (reader, writer) = io::pipe().unwrap();
        let input = Input::open(reader, 2, || ());
        assert_eq!(input.next().unwrap(), Next::Later);
        drop(writer);
        assert!(all(&input).is_empty());
    }

    #[test]
    fn a_file_that_cannot_be_read_is_an_error() {
        struct Broken;
        impl Read for Broken {
            fn read(&mut self, _: &mut [u8]) -> io::Result<usize> {
                Err(io::Error::other("broken"))
            }
        }
        let input = Input::open(Broken, 2, || ());
        let refused = loop {
            match input.next() {
                Ok(Next::Later) => thread::yield_now(),
                other => break other,
            }
        };
        assert_eq!(refused.unwrap_err().to_string(), "broken");
    }
}
