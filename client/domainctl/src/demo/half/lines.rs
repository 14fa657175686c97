//! What a half tells, one line for each event: for people, or as JSON.

use std::fmt;
use std::io::{self, Write};

use serde::{Serialize, Serializer};

use super::Half;
use crate::cli::Format;
use crate::exit::Exit;
use crate::failure::Failure;

/// What has happened.
#[derive(Debug, Serialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub(super) enum Line<'a> {
    /// There is a session.
    Attached {
        domain: &'a str,
        session: &'a str,
        #[serde(serialize_with = "by_name")]
        half: Half,
    },
    /// All memory behind the apertures has been read, and written as it was.
    Touched { bytes: u64 },
    /// To the driver: a device has taken a seat.
    Seated { seat: usize, device: &'a str },
    /// To the device: it has taken a seat.
    Sat { seat: u64, driver: &'a str },
    /// To the driver: all bytes of the file were sent and have come back right.
    Passed {
        pass: u64,
        bytes: u64,
        blocks: u64,
        verdict: &'a str,
    },
    /// To the device: so much of this driver was right so far.
    Served { bytes: u64, blocks: u64 },
    /// The driver is through with this device.
    Dismissed { bytes: u64, blocks: u64 },
    /// Something is not there, or not any more.
    Lost { why: &'a str },
    /// It was told to.
    Stopped,
}

impl fmt::Display for Line<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Line::Attached {
                domain,
                session,
                half,
            } => write!(f, "attached to {domain} as {session}, {}", name(*half)),
            Line::Touched { bytes } => write!(f, "touched {bytes} bytes"),
            Line::Seated { seat, device } => write!(f, "device {seat} has come: {device}"),
            Line::Sat { seat, driver } => write!(f, "device {seat} of the driver {driver}"),
            Line::Passed {
                pass,
                bytes,
                blocks,
                verdict,
            } => write!(f, "pass {pass}: {bytes} bytes, {blocks} blocks: {verdict}"),
            Line::Served { bytes, blocks } => write!(
                f,
                "{bytes} bytes, {blocks} blocks so far, each as the driver has sent it"
            ),
            Line::Dismissed { bytes, blocks } => {
                write!(f, "dismissed after {bytes} bytes, {blocks} blocks")
            }
            Line::Lost { why } => write!(f, "lost: {why}; trying again"),
            Line::Stopped => write!(f, "stopped"),
        }
    }
}

/// Writes lines as `-o` says, at once.
pub(super) struct Teller {
    json: bool,
}

impl Teller {
    /// Lines are no table, and no document.
    pub(super) fn new(format: Format) -> Result<Teller, Failure> {
        match format {
            Format::Table | Format::Wide => Ok(Teller { json: false }),
            Format::Json => Ok(Teller { json: true }),
            Format::Yaml | Format::Name => Err(Failure::new(
                Exit::Usage,
                "one half alone prints lines: -o table or -o json",
            )),
        }
    }

    /// Nobody needs to read it.
    pub(super) fn say(&self, line: &Line<'_>) -> io::Result<()> {
        let text = match self.json {
            true => serde_json::to_string(line)?,
            false => line.to_string(),
        };
        let mut out = io::stdout().lock();
        match writeln!(out, "{text}").and_then(|()| out.flush()) {
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
            written => written,
        }
    }
}

fn name(half: Half) -> &'static str {
    match half {
        Half::Driver => "driver",
        Half::Device => "device",
    }
}

fn by_name<S: Serializer>(half: &Half, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(name(*half))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_one_line_for_people_and_for_programs() {
        let attached = Line::Attached {
            domain: "domains/d",
            session: "sessions/7",
            half: Half::Device,
        };
        let text = attached.to_string();
        assert_eq!(text, "attached to domains/d as sessions/7, device");
        let json = serde_json::to_string(&attached).unwrap();
        let same =
            r#"{"event":"attached","domain":"domains/d","session":"sessions/7","half":"device"}"#;
        assert_eq!(json, same);
    }

    #[test]
    fn documents_are_refused_since_lines_are_none() {
        for format in [Format::Yaml, Format::Name] {
            assert_eq!(Teller::new(format).err().unwrap().exit(), Exit::Usage);
        }
    }
}
