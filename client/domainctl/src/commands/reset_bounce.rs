//! `reset-bounce`.

use domaind_proto::v1;

use crate::cli::ResetBounce;
use crate::context::Context;
use crate::exit::Exit;
use crate::failure::Failure;
use crate::output::Verdict;

pub(super) async fn run(args: ResetBounce, context: &mut Context) -> Result<Exit, Failure> {
    let client = context.connect().await?;
    let owner = client.as_owner(&args.domain);
    let ended_mappings = context.within(owner.reset_bounce(args.force)).await?;
    let what = match ended_mappings {
        0 => "bounce aperture reset".to_owned(),
        1 => "bounce aperture reset (1 streaming mapping ended)".to_owned(),
        ended => format!("bounce aperture reset ({ended} streaming mappings ended)"),
    };
    let answer = v1::ResetBounceResponse {
        ended_mappings,
        ..v1::ResetBounceResponse::default()
    };
    context.show(&Verdict::new(answer, args.domain.name(), what))?;
    Ok(Exit::Ok)
}
