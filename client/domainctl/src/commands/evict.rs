//! `evict`.

use domain_core::session::SessionId;
use domaind_proto::names::session_name;
use domaind_proto::v1;

use super::each;
use crate::cli::Evict;
use crate::context::Context;
use crate::exit::Exit;
use crate::failure::Failure;
use crate::output::Verdict;

pub(super) async fn run(args: Evict, context: &mut Context) -> Result<Exit, Failure> {
    let client = context.connect().await?;
    let evict = async |id: SessionId, context: &mut Context| {
        let name = session_name(id);
        let request = v1::EvictSessionRequest {
            name: name.clone(),
            request_id: String::new(),
        };
        let answer = context
            .call(client.sessions().evict_session(request))
            .await?;
        context.show(&Verdict::new(answer, name, "evicted"))
    };
    Ok(each(args.sessions, context, evict).await)
}
