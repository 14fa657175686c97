//! `describe`.

use domain_core::session::SessionId;
use domaind_client::Client;
use domaind_proto::names::DomainId;

use super::get::{all_sessions, one_domain, one_session};
use crate::cli::{Describe, Format};
use crate::context::Context;
use crate::exit::Exit;
use crate::failure::Failure;
use crate::output::{DomainSheet, SessionSheet, View};

pub(super) async fn run(what: Describe, context: &mut Context) -> Result<Exit, Failure> {
    match what {
        Describe::Domain { names } => domains(names, context).await?,
        Describe::Session { sessions } => each_session(sessions, context).await?,
    }
    Ok(Exit::Ok)
}

async fn domains(names: Vec<DomainId>, context: &mut Context) -> Result<(), Failure> {
    let client = context.connect().await?;
    let mut sheets = Vec::new();
    for name in &names {
        sheets.push(domain(&client, name, context).await?);
    }
    show_all(&sheets, context)
}

async fn domain(
    client: &Client,
    name: &DomainId,
    context: &Context,
) -> Result<DomainSheet, Failure> {
    let domain = one_domain(client, name, context).await?;
    let sessions = all_sessions(client, Some(name), context).await?;
    Ok(DomainSheet::new(domain, sessions))
}

async fn each_session(ids: Vec<SessionId>, context: &mut Context) -> Result<(), Failure> {
    let client = context.connect().await?;
    let mut sheets = Vec::new();
    for id in ids {
        sheets.push(SessionSheet(one_session(&client, id, context).await?));
    }
    show_all(&sheets, context)
}

/// For people with an empty line between two.
fn show_all(sheets: &[impl View], context: &mut Context) -> Result<(), Failure> {
    for (number, sheet) in sheets.iter().enumerate() {
        if number > 0 && matches!(context.format(), Format::Table | Format::Wide) {
            context.print("\n")?;
        }
        context.show(sheet)?;
    }
    Ok(())
}
