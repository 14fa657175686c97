//! `health`.

use serde::Serialize;
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;

use crate::cli::Health;
use crate::context::Context;
use crate::exit::Exit;
use crate::failure::Failure;
use crate::output::{Style, View};

/// What `grpc.health.v1` says of the daemon as a whole.
#[derive(Debug, Serialize)]
struct Verdict {
    status: &'static str,
}

/// Whoever serves is fine; everything else is as good as no daemon.
pub(super) async fn run(args: Health, context: &mut Context) -> Result<Exit, Failure> {
    let socket = args.socket.unwrap_or_else(|| context.socket());
    let client = context.connect_to(socket).await?;
    let mut health = HealthClient::new(client.channel());
    let whole = HealthCheckRequest::default();
    let status = context.call(health.check(whole)).await?.status();
    context.show(&Verdict {
        status: status.as_str_name(),
    })?;
    Ok(match status {
        ServingStatus::Serving => Exit::Ok,
        ServingStatus::Unknown | ServingStatus::NotServing | ServingStatus::ServiceUnknown => {
            Exit::Unavailable
        }
    })
}

impl View for Verdict {
    fn text(&self, _style: &Style) -> String {
        format!("{}\n", self.status)
    }

    fn names(&self) -> Vec<String> {
        vec![self.status.to_owned()]
    }
}
