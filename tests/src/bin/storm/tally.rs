//! What the processes count, in a file that outlives them.

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;

use anyhow::Context;
use rustix::process::{Pid, getppid};

/// Bytes of a row.
const ROW: u64 = 64;

/// What one process, or all together, have done.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Counts {
    /// Operations that changed the domain, or looks at it.
    pub cycles: u64,
    /// Bytes that were looked at.
    pub checked_bytes: u64,
    /// Bytes that nobody but another could have written there.
    pub foreign_bytes: u64,
    /// Removals that somebody killed had not acknowledged.
    pub unacknowledged: u64,
    /// Refused for want of space.
    pub full: u64,
}

/// One process's row. Row 0 is the storm's own: not 0 when it is over.
#[derive(Debug)]
pub(crate) struct Tally {
    file: File,
    row: u64,
    pub counts: Counts,
    parent: Option<Pid>,
}

impl Tally {
    /// In a process of the storm: the file is its standard input.
    pub(crate) fn inherited(row: u64) -> anyhow::Result<Tally> {
        let file = std::io::stdin().as_fd().try_clone_to_owned();
        Ok(Tally {
            file: file.context("the tally")?.into(),
            row,
            counts: Counts::default(),
            parent: getppid(),
        })
    }

    /// Leaves the numbers for whoever adds them up.
    pub(crate) fn write(&self) -> anyhow::Result<()> {
        let Counts {
            cycles,
            checked_bytes,
            foreign_bytes,
            unacknowledged,
            full,
        } = self.counts;
        let words = [cycles, checked_bytes, foreign_bytes, unacknowledged, full];
        let bytes: Vec<u8> = words.into_iter().flat_map(u64::to_ne_bytes).collect();
        self.file.write_all_at(&bytes, self.row * ROW)?;
        Ok(())
    }

    /// Whether the storm is over, or has died.
    pub(crate) fn is_over(&self) -> bool {
        let mut word = [0; 8];
        let read = self.file.read_exact_at(&mut word, 0);
        read.is_err() || word != [0; 8] || getppid() != self.parent
    }

    /// Counts bytes that are not as they must be, and says where the first is.
    pub(crate) fn check(
        &mut self,
        what: &str,
        at: u64,
        bytes: &[u8],
        is_right: impl Fn(u8) -> bool,
    ) {
        self.counts.checked_bytes += bytes.len() as u64;
        let Some(first) = bytes.iter().position(|byte| !is_right(*byte)) else {
            return;
        };
        let wrong = bytes.iter().filter(|byte| !is_right(**byte)).count();
        self.counts.foreign_bytes += wrong as u64;
        eprintln!(
            "storm: row {}: {what}: {wrong} of {} bytes from {at:#x} are foreign, the first at {first:#x}: {:#04x}",
            self.row,
            bytes.len(),
            bytes[first],
        );
        // Not lost if it is killed now.
        let _ = self.write();
    }
}

/// Makes the file.
pub(crate) fn create() -> anyhow::Result<File> {
    let file = tempfile::tempfile().context("a file for the tally")?;
    file.set_len(ROW)?;
    Ok(file)
}

/// Tells all that it is over.
pub(crate) fn end(file: &File) -> anyhow::Result<()> {
    Ok(file.write_all_at(&1_u64.to_ne_bytes(), 0)?)
}

/// One row.
pub(crate) fn read(file: &File, row: u64) -> Counts {
    let word = |index: u64| {
        let mut word = [0; 8];
        let read = file.read_exact_at(&mut word, row * ROW + index * 8);
        read.map_or(0, |()| u64::from_ne_bytes(word))
    };
    Counts {
        cycles: word(0),
        checked_bytes: word(1),
        foreign_bytes: word(2),
        unacknowledged: word(3),
        full: word(4),
    }
}
