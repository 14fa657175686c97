//! The one way to stdout.

use std::io::{self, ErrorKind, Write};

use crate::cli::Format;

/// The one way to stdout. A reader that closes the pipe has seen enough: the
/// rest goes nowhere, and what the command does goes on.
pub(crate) struct Printer<W> {
    out: W,
    closed: bool,
    documents: usize,
}

impl<W: Write> Printer<W> {
    pub(crate) fn new(out: W) -> Printer<W> {
        Printer {
            out,
            closed: false,
            documents: 0,
        }
    }

    /// Prints one document. YAML needs a line between two of them.
    pub(crate) fn document(&mut self, text: &str, format: Format) -> io::Result<()> {
        if self.documents > 0 && format == Format::Yaml {
            self.text("---\n")?;
        }
        self.documents += 1;
        self.text(text)
    }

    /// Prints.
    pub(crate) fn text(&mut self, text: &str) -> io::Result<()> {
        if self.closed {
            return Ok(());
        }
        let written = self.out.write_all(text.as_bytes());
        self.unless_closed(written)
    }

    /// Has the reader closed the pipe?
    pub(crate) fn is_closed(&self) -> bool {
        self.closed
    }

    /// Nothing may stay in a buffer.
    pub(crate) fn finish(&mut self) -> io::Result<()> {
        if self.closed {
            return Ok(());
        }
        let flushed = self.out.flush();
        self.unless_closed(flushed)
    }

    fn unless_closed(&mut self, result: io::Result<()>) -> io::Result<()> {
        match result {
            Err(error) if error.kind() == ErrorKind::BrokenPipe => {
                self.closed = true;
                Ok(())
            }
            other => other,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Takes so many bytes, then fails like this for ever.
    struct Fails {
        room: usize,
        kind: ErrorKind,
    }

    impl Write for Fails {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            if self.room == 0 {
                return Err(self.kind.into());
            }
            let taken = bytes.len().min(self.room);
            self.room -= taken;
            Ok(taken)
        }

        fn flush(&mut self) -> io::Result<()> {
            match self.room {
                0 => Err(self.kind.into()),
                _ => Ok(()),
            }
        }
    }

    #[test]
    fn a_closed_pipe_is_success() {
        let kind = ErrorKind::BrokenPipe;
        let mut printer = Printer::new(Fails { room: 3, kind });
        printer.text("domains/d0\n").unwrap();
        printer.text("domains/d1\n").unwrap();
        printer.finish().unwrap();
        assert!(printer.is_closed());
    }

    #[test]
    fn a_pipe_that_closes_before_the_flush_is_success() {
        let kind = ErrorKind::BrokenPipe;
        let mut printer = Printer::new(Fails { room: 0, kind });
        printer.finish().unwrap();
    }

    #[test]
    fn a_full_disk_is_an_error() {
        let kind = ErrorKind::StorageFull;
        let mut printer = Printer::new(Fails { room: 3, kind });
        assert_eq!(printer.text("domains/d0\n").unwrap_err().kind(), kind);
        assert_eq!(printer.finish().unwrap_err().kind(), kind);
    }

    #[test]
    fn documents_of_yaml_are_told_apart() {
        let mut text = Vec::new();
        let mut printer = Printer::new(&mut text);
        printer.document("a: 1\n", Format::Yaml).unwrap();
        printer.document("b: 2\n", Format::Yaml).unwrap();
        assert_eq!(text, b"a: 1\n---\nb: 2\n");
    }
}
