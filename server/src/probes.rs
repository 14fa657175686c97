//! What probes are told: whether the daemon lives, and whether it serves; and
//! what scrapers are.
//!
//! A daemon that is killed costs everybody their sessions; one that is slow costs
//! time. So it lives as long as the runtime that serves beats, whatever clients
//! do, and whatever else is wrong.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::Duration;

use http::header::ACCEPT;
use http::{HeaderMap, StatusCode};

use crate::http::{Page, Pages};
use crate::metrics::{Exposition, Form};
use crate::pulse::Pulse;
use crate::registry::Registry;

/// A runtime that has not beaten for so long is stuck.
const PULSE_LIMIT: Duration = Duration::from_secs(10);
const TEXT: &str = "text/plain; charset=utf-8";

/// How far the daemon is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stage {
    /// Not everything is bound, or declared domains are being made.
    Starting = 0,
    Serving = 1,
    Stopping = 2,
}

/// Answers probes.
#[derive(Debug)]
pub(crate) struct Probes {
    pulse: Arc<Pulse>,
    /// A [`Stage`].
    stage: AtomicU8,
    exposition: Exposition,
}

impl Probes {
    pub(crate) fn new(pulse: Arc<Pulse>, registry: Arc<Registry>) -> Probes {
        Probes {
            exposition: Exposition::new(registry),
            pulse,
            stage: AtomicU8::new(Stage::Starting as u8),
        }
    }

    pub(crate) fn enter(&self, stage: Stage) {
        self.stage.store(stage as u8, Ordering::Relaxed);
    }

    fn metrics(&self, headers: &HeaderMap) -> Page {
        let accept = headers.get(ACCEPT).and_then(|accept| accept.to_str().ok());
        let form = Form::accepted(accept.unwrap_or_default());
        match self.exposition.text(form) {
            Ok(text) => Page {
                status: StatusCode::OK,
                content_type: form.content_type(),
                text,
            },
            Err(error) => said(StatusCode::INTERNAL_SERVER_ERROR, format_args!("{error}")),
        }
    }

    fn stage(&self) -> Stage {
        match self.stage.load(Ordering::Relaxed) {
            0 => Stage::Starting,
            1 => Stage::Serving,
            _ => Stage::Stopping,
        }
    }
}

impl Pages for Probes {
    fn page(&self, path: &str, headers: &HeaderMap) -> Option<Page> {
        match path {
            "/livez" => Some(alive(self.pulse.age())),
            "/readyz" => Some(ready(self.stage())),
            "/metrics" => Some(self.metrics(headers)),
            _ => None,
        }
    }
}

fn alive(age: Duration) -> Page {
    let age_s = age.as_secs_f64();
    match age < PULSE_LIMIT {
        true => said(StatusCode::OK, format_args!("ok")),
        false => said(
            StatusCode::SERVICE_UNAVAILABLE,
            format_args!(
                "the runtime that serves was last alive {age_s:.1} s ago, the limit is {} s",
                PULSE_LIMIT.as_secs()
            ),
        ),
    }
}

fn ready(stage: Stage) -> Page {
    let no = StatusCode::SERVICE_UNAVAILABLE;
    match stage {
        Stage::Starting => said(no, format_args!("the daemon starts: not all is served yet")),
        Stage::Serving => said(StatusCode::OK, format_args!("ok")),
        Stage::Stopping => said(no, format_args!("the daemon stops")),
    }
}

fn said(status: StatusCode, text: fmt::Arguments<'_>) -> Page {
    Page {
        status,
        content_type: TEXT,
        text: format!("{text}\n"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_has_not_beaten_for_ten_seconds_does_not_live_and_it_is_said_since_when() {
        assert_eq!(alive(Duration::from_millis(9_999)).status, StatusCode::OK);
        let stuck = alive(Duration::from_millis(12_340));
        assert_eq!(stuck.status, StatusCode::SERVICE_UNAVAILABLE);
        assert!(stuck.text.contains("12.3 s"), "{}", stuck.text);
    }

    #[test]
    fn only_a_daemon_that_serves_is_ready() {
        for (stage, status) in [
            (Stage::Starting, StatusCode::SERVICE_UNAVAILABLE),
            (Stage::Serving, StatusCode::OK),
            (Stage::Stopping, StatusCode::SERVICE_UNAVAILABLE),
        ] {
            assert_eq!(ready(stage).status, status);
        }
    }
}
