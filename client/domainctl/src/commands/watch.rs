//! `watch`.

use domaind_proto::v1;

use crate::cli::{Watch, WatchDomain};
use crate::context::Context;
use crate::exit::Exit;
use crate::failure::Failure;
use crate::output::{Watched, watch_headers};
use crate::signals::Unread;

pub(super) async fn run(what: Watch, context: &mut Context) -> Result<Exit, Failure> {
    match what {
        Watch::Domain(args) => domain(args, context).await?,
    }
    Ok(Exit::Ok)
}

/// Prints events until there are no more, or nobody reads them. An interrupt
/// ends the program as it ends any other: what was printed is out.
async fn domain(args: WatchDomain, context: &mut Context) -> Result<(), Failure> {
    let mut unread = Unread::new()
        .map_err(|error| Failure::new(Exit::Error, format!("watch stdout: {error}")))?;
    let client = context.connect().await?;
    let domain = args.name.name();
    let request = v1::WatchDomainRequest {
        name: domain.clone(),
        generation: args.generation,
    };
    let mut events = context.call(client.domains().watch_domain(request)).await?;
    if context.wants_headers() {
        context.print(&watch_headers())?;
    }
    while context.has_reader() {
        let event = tokio::select! {
            event = events.message() => event?,
            () = unread.unread() => return Ok(()),
        };
        let Some(event) = event else {
            let message = "the daemon has ended the watch";
            return Err(Failure::new(Exit::Unavailable, message));
        };
        context.show(&Watched::new(event, &domain))?;
        context.flush()?;
    }
    Ok(())
}
