//! `reset-bounce`.

use domaind_client::BounceReset;
use domaind_proto::v1;

use crate::cli::ResetBounce;
use crate::context::Context;
use crate::exit::Exit;
use crate::failure::Failure;
use crate::output::Verdict;

pub(super) async fn run(args: ResetBounce, context: &mut Context) -> Result<Exit, Failure> {
    let client = context.connect().await?;
    let owner = client.as_owner(&args.domain);
    let ended = context.within(owner.reset_bounce(args.force)).await?;
    let what = match said(ended) {
        None => "bounce aperture reset".to_owned(),
        Some(said) => format!("bounce aperture reset ({said} ended)"),
    };
    let answer = v1::ResetBounceResponse {
        ended_mappings: ended.mappings,
        ended_leases: ended.leases,
        ..v1::ResetBounceResponse::default()
    };
    context.show(&Verdict::new(answer, args.domain.name(), what))?;
    Ok(Exit::Ok)
}

/// `2 streaming mappings, 1 lease`; nothing if nothing has ended.
fn said(ended: BounceReset) -> Option<String> {
    let one_or_more = |count, one: &str| match count {
        0 => None,
        1 => Some(format!("1 {one}")),
        count => Some(format!("{count} {one}s")),
    };
    let mappings = one_or_more(ended.mappings, "streaming mapping");
    let leases = one_or_more(ended.leases, "lease");
    let said: Vec<_> = mappings.into_iter().chain(leases).collect();
    (!said.is_empty()).then(|| said.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_has_ended_is_counted_in_words() {
        let ended = |mappings, leases| said(BounceReset { mappings, leases });
        assert_eq!(ended(0, 0), None);
        assert_eq!(ended(1, 0).unwrap(), "1 streaming mapping");
        assert_eq!(ended(0, 2).unwrap(), "2 leases");
        assert_eq!(ended(3, 1).unwrap(), "3 streaming mappings, 1 lease");
    }
}
