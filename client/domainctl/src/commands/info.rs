//! `info`.

use domaind_proto::v1;

use crate::cli::Socket;
use crate::context::Context;
use crate::exit::Exit;
use crate::failure::Failure;

/// Only the operator's socket has this service, whatever `--admin` says.
pub(super) async fn run(context: &mut Context) -> Result<Exit, Failure> {
    let info = ask(context).await?;
    context.show(&info)?;
    Ok(Exit::Ok)
}

pub(super) async fn ask(context: &Context) -> Result<v1::Info, Failure> {
    let client = context.connect_to(Socket::Admin).await?;
    let request = v1::GetInfoRequest {};
    context.call(client.admin().get_info(request)).await
}
