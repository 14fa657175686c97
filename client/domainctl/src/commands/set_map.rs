//! `set-map`.

use domain_core::direct::{DirectMapping, TableSet};
use domaind_client::{Owner, SetMapOptions};
use domaind_proto::v1;
use indicatif::ProgressBar;

use super::target;
use crate::cli::SetMap;
use crate::context::Context;
use crate::exit::Exit;
use crate::failure::Failure;
use crate::output::Verdict;
use crate::progress;
use crate::table_file::{TableError, TableFile};

/// The file is read and understood before the daemon is asked.
pub(super) async fn run(args: SetMap, context: &mut Context) -> Result<Exit, Failure> {
    let file = TableFile::read(&args.file).map_err(unread)?;
    let domain = agreed(args.domain, file.domain, "the domain")?;
    let generation = agreed(
        args.expected_generation,
        file.expected_generation,
        "the expected generation",
    )?;
    let client = context.connect().await?;
    let domain = target::domain(domain, &client, context).await?;
    let options = SetMapOptions {
        expected_generation: generation,
        request_id: file.request_id,
    };
    let count = file.entries.len();
    let owner = client.as_owner(&domain);
    let set = stream(&owner, file.entries, options, context).await;
    let set = set.map_err(counted)?;
    let what = said(count, set);
    let answer = v1::SetMapResponse::from(set);
    context.show(&Verdict::new(answer, domain.name(), what))?;
    Ok(Exit::Ok)
}

async fn stream(
    owner: &Owner,
    entries: Vec<DirectMapping>,
    options: SetMapOptions,
    context: &Context,
) -> Result<TableSet, Failure> {
    let bar = bar(entries.len(), context);
    let entries = bar.wrap_iter(entries.into_iter());
    let set = context.within(owner.stream_set_map(entries, options)).await;
    bar.finish_and_clear();
    set
}

fn bar(entries: usize, context: &Context) -> ProgressBar {
    let template = "{bar:40} {human_pos}/{human_len} entries {eta}";
    progress::bar(u64::try_from(entries).ok(), template, context.format())
}

/// What is said at the command line and in the file must be the same.
fn agreed<T: PartialEq>(
    here: Option<T>,
    there: Option<T>,
    what: &str,
) -> Result<Option<T>, Failure> {
    match (here, there) {
        (Some(here), Some(there)) if here != there => Err(Failure::new(
            Exit::Usage,
            format!("{what} of the command line is not that of the file"),
        )),
        (here, there) => Ok(here.or(there)),
    }
}

/// A file that cannot be read is trouble, one that says nothing is wrong usage.
fn unread(error: TableError) -> Failure {
    let exit = match error {
        TableError::Read { .. } => Exit::Error,
        TableError::Json { .. } | TableError::Yaml { .. } => Exit::Usage,
    };
    Failure::of(exit, &error)
}

/// The daemon refuses an entry, and perhaps for another one, by their numbers.
fn counted(failure: Failure) -> Failure {
    match failure.has_detail("entry_index") {
        true => failure.remarking("entries are counted from 0"),
        false => failure,
    }
}

/// `set 3 entries: 1 added, 0 removed, generation 7`.
fn said(count: usize, set: TableSet) -> String {
    let entries = if count == 1 { "entry" } else { "entries" };
    let TableSet {
        generation,
        added,
        removed,
    } = set;
    format!("set {count} {entries}: {added} added, {removed} removed, generation {generation}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use domain_core::addr::{Iova, IovaRange};
    use domain_core::direct::{MapDirectError, SetMapError};
    use domaind_proto::v1::Refusal;
    use tonic::Status;

    #[test]
    fn what_is_said_twice_must_be_the_same() {
        assert_eq!(agreed(Some(1), None, "n").unwrap(), Some(1));
        assert_eq!(agreed(None, Some(1), "n").unwrap(), Some(1));
        assert_eq!(agreed(Some(1), Some(1), "n").unwrap(), Some(1));
        assert_eq!(agreed::<u64>(None, None, "n").unwrap(), None);
        let refused = agreed(Some(1), Some(2), "n").unwrap_err();
        assert_eq!(refused.exit(), Exit::Usage);
    }

    #[test]
    fn a_refused_entry_is_counted_from_0_and_that_is_said() {
        let page = |number: u64| IovaRange::from_len(Iova::new(number << 12), 4096).unwrap();
        let overlaps = SetMapError::Entry {
            index: 3,
            error: MapDirectError::OverlapsEntry {
                range: page(1),
                other: page(1),
                index: 2,
            },
        };
        let refused = Failure::from(Status::from(Refusal::from(overlaps)));
        assert_eq!(
            counted(refused).to_string(),
            "entry 3: [0x1000, 0x1fff] overlaps [0x1000, 0x1fff] of entry 2 of the same \
             request (entries are counted from 0)"
        );
        let stale = SetMapError::Stale {
            expected: 1,
            current: 2,
        };
        let refused = Failure::from(Status::from(Refusal::from(stale)));
        assert!(!counted(refused).to_string().contains("counted"));
    }

    #[test]
    fn the_verdict_says_what_changed() {
        let set = TableSet {
            generation: 7,
            added: 100_000,
            removed: 0,
        };
        assert_eq!(
            said(100_000, set),
            "set 100000 entries: 100000 added, 0 removed, generation 7"
        );
    }
}
