//! `version`.

use serde::Serialize;

use super::info;
use crate::cli::Version;
use crate::context::Context;
use crate::exit::Exit;
use crate::failure::{Failure, remark};
use crate::output::{Sheet, Style, View};

/// Versions of the two programs.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Versions {
    client_version: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    daemon_version: Option<String>,
}

/// A daemon that cannot be asked is no error: the question was for versions.
pub(super) async fn run(args: Version, context: &mut Context) -> Result<Exit, Failure> {
    let daemon_version = match args.client {
        true => None,
        false => daemon(context).await,
    };
    context.show(&Versions {
        client_version: env!("CARGO_PKG_VERSION"),
        daemon_version,
    })?;
    Ok(Exit::Ok)
}

async fn daemon(context: &Context) -> Option<String> {
    match info::ask(context).await {
        Ok(info) => Some(info.version),
        Err(failure) => {
            remark(&format!("the daemon's version is not known: {failure}"));
            None
        }
    }
}

impl View for Versions {
    fn text(&self, _style: &Style) -> String {
        let mut sheet = Sheet::default();
        sheet.value("Client version", self.client_version);
        if let Some(daemon) = &self.daemon_version {
            sheet.value("Daemon version", daemon);
        }
        sheet.render()
    }

    fn names(&self) -> Vec<String> {
        vec![self.client_version.to_owned()]
    }
}
