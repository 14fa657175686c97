//! `reload`.

use domaind_proto::v1;

use crate::cli::Socket;
use crate::context::Context;
use crate::exit::Exit;
use crate::failure::Failure;

/// Only the operator's socket has this service, whatever `--admin` says.
pub(super) async fn run(context: &mut Context) -> Result<Exit, Failure> {
    let client = context.connect_to(Socket::Admin).await?;
    let request = v1::ReloadConfigRequest {};
    let reloaded = context.call(client.admin().reload_config(request)).await?;
    context.show(&reloaded)?;
    Ok(Exit::Ok)
}
