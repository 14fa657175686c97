//! What the driver tells the process that watches it: one JSON object a line.

use std::io::{self, Write};

use serde::{Deserialize, Serialize};

/// One line.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Note {
    /// The rings are there: devices may come.
    Board { iova: u64 },
    /// So many bytes have come back and were right.
    Progress { bytes: u64 },
    /// All of them have.
    Done(Outcome),
}

/// What came of it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Outcome {
    pub(crate) bytes: u64,
    pub(crate) blocks: u64,
    /// From the first read to the last comparison.
    pub(crate) elapsed_ns: u64,
    pub(crate) map_latency_ns: Latency,
    pub(crate) unmap_latency_ns: Latency,
    /// The driver first, then the devices in order.
    pub(crate) sharers: Vec<Sharer>,
}

/// One process that was attached to the domain, as the daemon said.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Sharer {
    pub(crate) pid: i32,
    pub(crate) session: String,
    /// Blocks that it worked on; the driver saw all of them.
    pub(crate) blocks: u64,
}

/// How long calls took, in nanoseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Latency {
    pub(crate) p50: u64,
    pub(crate) p99: u64,
    pub(crate) max: u64,
}

impl Note {
    /// Says it on standard output, at once.
    pub(crate) fn say(&self) -> io::Result<()> {
        let mut line = serde_json::to_vec(self)?;
        line.push(b'\n');
        let mut out = io::stdout().lock();
        out.write_all(&line)?;
        out.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_note_is_one_line_and_comes_back_as_it_was() {
        let sharer = Sharer {
            pid: 7,
            session: "sessions/1".into(),
            blocks: 3,
        };
        let latency = Latency {
            p50: 1,
            p99: 2,
            max: 3,
        };
        let done = Note::Done(Outcome {
            bytes: 1,
            blocks: 1,
            elapsed_ns: 9,
            map_latency_ns: latency,
            unmap_latency_ns: latency,
            sharers: vec![sharer],
        });
        for note in [
            Note::Board { iova: u64::MAX },
            Note::Progress { bytes: 5 },
            done,
        ] {
            let line = serde_json::to_string(&note).unwrap();
            assert!(!line.contains('\n'));
            assert_eq!(serde_json::from_str::<Note>(&line).unwrap(), note);
        }
    }
}
