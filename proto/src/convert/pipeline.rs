//! Batches of a pipeline: from columns to entries of the core, and from what
//! came of them to columns again. Nothing is allocated for an entry that is
//! sound; what the caller lends grows to the largest batch and stays so.

use domain_core::addr::Iova;
use domain_core::batch::{BatchError, BatchMode};
use domain_core::mapping::MappingId;
use domain_core::memory::MemoryId;
use domain_core::streaming::{MapSpec, Mapped, SyncSpec, UnmapSpec};

use super::{Malformed, batch_mode, count, direction, sync_target};
use crate::v1::PipelineOperation::{Map, Sync, Unmap};
use crate::v1::{self, EntryRefusal, PipelineOperation, Refusal};

/// In a column of optional numbers: this entry has none.
const UNSET: u64 = u64::MAX;

/// An entry that goes through a pipeline; one type for each operation.
pub trait Piped: Copy + 'static {
    /// What a batch of them does.
    const OPERATION: PipelineOperation;

    /// What comes of one.
    type Outcome;

    /// The entry at this place of a batch that was checked.
    ///
    /// # Errors
    /// [`Malformed`], as the entry of a call would be.
    fn read(columns: &v1::PipelineRequest, index: usize) -> Result<Self, Malformed>;

    /// Writes the columns of a batch into an empty request. What is the same
    /// for all entries is written once.
    fn write(entries: &[Self], columns: &mut v1::PipelineRequest);

    /// Adds what came of the next entry; `None` if it was refused.
    fn answer(outcome: Option<Self::Outcome>, columns: &mut v1::PipelineResponse);
}

/// A batch whose columns fit together.
#[derive(Clone, Copy, Debug)]
pub struct PipelineBatch<'a> {
    /// What it does; never unspecified.
    pub operation: PipelineOperation,
    /// What one refused entry means for the others.
    pub mode: BatchMode,
    /// How many entries it has.
    pub entries: usize,
    columns: &'a v1::PipelineRequest,
}

/// Checks everything about a batch that is not about one entry.
///
/// # Errors
/// [`Malformed`] for an operation that does not exist, a column that it does not
/// have, no entries or too many, and a column of another length.
pub fn pipeline_batch(request: &v1::PipelineRequest) -> Result<PipelineBatch<'_>, Malformed> {
    let operation = operation(request.operation)?;
    let columns = columns(request);
    let is_foreign = |column: &&Column| column.values > 0 && !column.of.contains(&operation);
    if let Some(&Column { name, values, .. }) = columns.iter().find(is_foreign) {
        return Err(Malformed::ForeignColumn {
            column: name,
            values,
        });
    }
    let entries = columns.iter().map(|column| column.values).max();
    let entries = entries.unwrap_or(0);
    let mode = batch_mode(entries, request.partial)?;
    let is_odd = |column: &&Column| ![0, 1, entries].contains(&column.values);
    if let Some(&Column { name, values, .. }) = columns.iter().find(is_odd) {
        return Err(Malformed::ColumnLength {
            column: name,
            values,
            entries,
        });
    }
    Ok(PipelineBatch {
        operation,
        mode,
        entries,
        columns: request,
    })
}

impl PipelineBatch<'_> {
    /// Reads the entries into `specs`, and those of a partial batch that cannot
    /// be read into `refused`; both are emptied first.
    ///
    /// # Errors
    /// The refusal of the first entry that cannot be read, if the batch is all
    /// or nothing.
    pub fn read<S: Piped>(
        &self,
        specs: &mut Vec<S>,
        refused: &mut Vec<EntryRefusal>,
    ) -> Result<(), Refusal> {
        specs.clear();
        refused.clear();
        for index in 0..self.entries {
            match (S::read(self.columns, index), self.mode) {
                (Ok(spec), _) => specs.push(spec),
                (Err(error), BatchMode::Partial) => refused.push(entry(index, error.into())),
                (Err(error), BatchMode::AllOrNothing) => {
                    return Err(BatchError { index, error }.into());
                }
            }
        }
        Ok(())
    }

    /// Fills an empty answer: with the entries that could not be read, and with
    /// what the core says of the others, in their order. `refused` is empty
    /// afterwards.
    ///
    /// # Panics
    /// If there are not as many results as entries were read.
    pub fn answer<S: Piped>(
        &self,
        refused: &mut Vec<EntryRefusal>,
        results: impl IntoIterator<Item = Result<S::Outcome, Refusal>>,
        response: &mut v1::PipelineResponse,
    ) {
        response.operation = S::OPERATION.into();
        response.entries = count(self.entries);
        let mut unread = refused.drain(..).peekable();
        let mut results = results.into_iter();
        for index in 0..self.entries {
            let is_unread = |refused: &EntryRefusal| refused.index == count(index);
            if let Some(unread) = unread.next_if(is_unread) {
                S::answer(None, response);
                response.refused.push(unread);
                continue;
            }
            match results.next().expect("the core answers every entry") {
                Ok(outcome) => S::answer(Some(outcome), response),
                Err(refusal) => {
                    S::answer(None, response);
                    response.refused.push(entry(index, refusal));
                }
            }
        }
    }
}

impl Piped for MapSpec {
    const OPERATION: PipelineOperation = Map;
    type Outcome = Mapped;

    fn read(columns: &v1::PipelineRequest, index: usize) -> Result<MapSpec, Malformed> {
        Ok(MapSpec {
            memory: MemoryId::new(at(&columns.memory_id, index)),
            offset: at(&columns.offset, index),
            len_bytes: at(&columns.len_bytes, index),
            direction: direction(at(&columns.direction, index))?,
            keep_offset: at(&columns.keep_offset, index),
            preserve: at(&columns.preserve, index),
            skip_sync: at(&columns.skip_sync, index),
            align_bytes: at(&columns.align_bytes, index),
            limit: set_at(&columns.limit, index).map(Iova::new),
        })
    }

    fn write(specs: &[MapSpec], columns: &mut v1::PipelineRequest) {
        let unset = |limit: Option<Iova>| limit.map_or(UNSET, Iova::get);
        let wire = |spec: &MapSpec| v1::Direction::from(spec.direction).into();
        // Says how many there are.
        columns.offset.extend(specs.iter().map(|spec| spec.offset));
        fill(&mut columns.memory_id, specs, |spec| spec.memory.get());
        fill(&mut columns.len_bytes, specs, |spec| spec.len_bytes);
        fill(&mut columns.direction, specs, wire);
        fill(&mut columns.keep_offset, specs, |spec| spec.keep_offset);
        fill(&mut columns.preserve, specs, |spec| spec.preserve);
        fill(&mut columns.skip_sync, specs, |spec| spec.skip_sync);
        fill(&mut columns.align_bytes, specs, |spec| spec.align_bytes);
        fill(&mut columns.limit, specs, |spec| unset(spec.limit));
        columns.operation = Map.into();
    }

    fn answer(mapped: Option<Mapped>, columns: &mut v1::PipelineResponse) {
        columns
            .mapping_id
            .push(mapped.map_or(0, |mapped| mapped.id.get()));
        columns
            .iova
            .push(mapped.map_or(0, |mapped| mapped.iova.get()));
    }
}

impl Piped for UnmapSpec {
    const OPERATION: PipelineOperation = Unmap;
    /// Bytes that were copied back.
    type Outcome = u64;

    fn read(columns: &v1::PipelineRequest, index: usize) -> Result<UnmapSpec, Malformed> {
        Ok(UnmapSpec {
            iova: Iova::new(at(&columns.iova, index)),
            id: MappingId::new(at(&columns.mapping_id, index)),
            written_bytes: set_at(&columns.written_bytes, index),
            skip_sync: at(&columns.skip_sync, index),
        })
    }

    fn write(specs: &[UnmapSpec], columns: &mut v1::PipelineRequest) {
        // Says how many there are.
        columns
            .iova
            .extend(specs.iter().map(|spec| spec.iova.get()));
        fill(&mut columns.mapping_id, specs, |spec| spec.id.get());
        fill(&mut columns.written_bytes, specs, |spec| {
            spec.written_bytes.unwrap_or(UNSET)
        });
        fill(&mut columns.skip_sync, specs, |spec| spec.skip_sync);
        columns.operation = Unmap.into();
    }

    fn answer(copied_bytes: Option<u64>, columns: &mut v1::PipelineResponse) {
        columns.copied_bytes.push(copied_bytes.unwrap_or(0));
    }
}

impl Piped for SyncSpec {
    const OPERATION: PipelineOperation = Sync;
    type Outcome = ();

    fn read(columns: &v1::PipelineRequest, index: usize) -> Result<SyncSpec, Malformed> {
        Ok(SyncSpec {
            iova: Iova::new(at(&columns.iova, index)),
            id: MappingId::new(at(&columns.mapping_id, index)),
            offset: at(&columns.offset, index),
            len_bytes: at(&columns.len_bytes, index),
            target: sync_target(at(&columns.target, index))?,
        })
    }

    fn write(specs: &[SyncSpec], columns: &mut v1::PipelineRequest) {
        let wire = |spec: &SyncSpec| v1::SyncTarget::from(spec.target).into();
        // Says how many there are.
        columns
            .iova
            .extend(specs.iter().map(|spec| spec.iova.get()));
        fill(&mut columns.mapping_id, specs, |spec| spec.id.get());
        fill(&mut columns.offset, specs, |spec| spec.offset);
        fill(&mut columns.len_bytes, specs, |spec| spec.len_bytes);
        fill(&mut columns.target, specs, wire);
        columns.operation = Sync.into();
    }

    fn answer(_: Option<()>, _: &mut v1::PipelineResponse) {}
}

/// In what an answer does not fit what was asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs)] // the messages are the docs
pub enum AnswerMismatch {
    #[error("an answer to operation {got} where {wanted:?} is the next")]
    Operation { got: i32, wanted: PipelineOperation },
    #[error("{got} answers to a batch of {wanted} entries")]
    Entries { got: u32, wanted: usize },
    #[error("{got} values of {column} where {wanted} are due")]
    Column {
        column: &'static str,
        got: usize,
        wanted: usize,
    },
    #[error("entry {index} of {entries} is refused out of turn, without a reason, or in vain")]
    Refused { index: u32, entries: usize },
}

/// Is this an answer to such a batch, with every count as it must be?
///
/// # Errors
/// In what it is not.
pub fn check_answer(
    response: &v1::PipelineResponse,
    wanted: PipelineOperation,
    mode: BatchMode,
    entries: usize,
) -> Result<(), AnswerMismatch> {
    let got = response.operation;
    if got != i32::from(wanted) {
        return Err(AnswerMismatch::Operation { got, wanted });
    }
    let answered = match response.refusal {
        Some(_) => 0,
        None => entries,
    };
    let got = response.entries;
    if got != count(answered) {
        let wanted = answered;
        return Err(AnswerMismatch::Entries { got, wanted });
    }
    let due = |operation| if wanted == operation { answered } else { 0 };
    check_column("mapping_id", &response.mapping_id, due(Map))?;
    check_column("iova", &response.iova, due(Map))?;
    check_column("copied_bytes", &response.copied_bytes, due(Unmap))?;
    check_refused(&response.refused, mode, answered)
}

fn check_column(column: &'static str, got: &[u64], wanted: usize) -> Result<(), AnswerMismatch> {
    let got = got.len();
    match got == wanted {
        true => Ok(()),
        false => Err(AnswerMismatch::Column {
            column,
            got,
            wanted,
        }),
    }
}

/// Refused entries stand in order, inside of the batch, none twice, each with
/// its reason, and only where each entry stands for itself.
fn check_refused(
    refused: &[EntryRefusal],
    mode: BatchMode,
    entries: usize,
) -> Result<(), AnswerMismatch> {
    let mut least = 0;
    for EntryRefusal { index, refusal } in refused {
        let is_due = mode == BatchMode::Partial && (least..count(entries)).contains(index);
        if !is_due || refusal.is_none() {
            let index = *index;
            return Err(AnswerMismatch::Refused { index, entries });
        }
        least = index + 1;
    }
    Ok(())
}

/// How long a column of a request is, and who has it.
struct Column {
    name: &'static str,
    values: usize,
    of: &'static [PipelineOperation],
}

fn columns(request: &v1::PipelineRequest) -> [Column; 13] {
    let column = |name, values, of| Column { name, values, of };
    [
        column("memory_id", request.memory_id.len(), &[Map]),
        column("offset", request.offset.len(), &[Map, Sync]),
        column("len_bytes", request.len_bytes.len(), &[Map, Sync]),
        column("direction", request.direction.len(), &[Map]),
        column("keep_offset", request.keep_offset.len(), &[Map]),
        column("preserve", request.preserve.len(), &[Map]),
        column("skip_sync", request.skip_sync.len(), &[Map, Unmap]),
        column("align_bytes", request.align_bytes.len(), &[Map]),
        column("limit", request.limit.len(), &[Map]),
        column("iova", request.iova.len(), &[Unmap, Sync]),
        column("mapping_id", request.mapping_id.len(), &[Unmap, Sync]),
        column("written_bytes", request.written_bytes.len(), &[Unmap]),
        column("target", request.target.len(), &[Sync]),
    ]
}

fn operation(value: i32) -> Result<PipelineOperation, Malformed> {
    match PipelineOperation::try_from(value) {
        Ok(known @ (Map | Unmap | Sync)) => Ok(known),
        Ok(PipelineOperation::Unspecified) | Err(_) => Err(Malformed::UnknownValue {
            field: "operation",
            value,
        }),
    }
}

/// The value of one entry: its own, the one for all, or the default.
fn at<T: Copy + Default>(column: &[T], index: usize) -> T {
    match column {
        [] => T::default(),
        [all] => *all,
        each => each[index],
    }
}

/// The same for a value that may be unset.
fn set_at(column: &[u64], index: usize) -> Option<u64> {
    match column {
        [] => None,
        column => Some(at(column, index)).filter(|value| *value != UNSET),
    }
}

/// Writes a column; a single value if all are the same.
fn fill<S, T: PartialEq>(column: &mut Vec<T>, specs: &[S], value: impl Fn(&S) -> T) {
    let Some((first, others)) = specs.split_first() else {
        return;
    };
    let first = value(first);
    let is_for_all = others.iter().all(|spec| value(spec) == first);
    let others = if is_for_all { &[] } else { others };
    column.push(first);
    column.extend(others.iter().map(value));
}

fn entry(index: usize, refusal: Refusal) -> EntryRefusal {
    EntryRefusal {
        index: count(index),
        refusal: Some(refusal),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::v1::ErrorReason;
    use domain_core::limits::BATCH_ENTRIES;
    use domain_core::perm::Direction;
    use domain_core::streaming::SyncTarget;
    use tonic::Code;

    fn written<S: Piped>(specs: &[S]) -> v1::PipelineRequest {
        let mut request = v1::PipelineRequest::default();
        S::write(specs, &mut request);
        request
    }

    /// What the daemon reads of a request; refusals by their place.
    fn read<S: Piped>(request: &v1::PipelineRequest) -> Result<(Vec<S>, Vec<u32>), Refusal> {
        let (mut specs, mut refused) = (Vec::new(), vec![EntryRefusal::default()]);
        pipeline_batch(request)?.read(&mut specs, &mut refused)?;
        let refused = refused.iter().map(|refused| refused.index);
        Ok((specs, refused.collect()))
    }

    fn map(index: u64) -> MapSpec {
        MapSpec {
            memory: MemoryId::new(index + 1),
            offset: index * 7,
            len_bytes: index + 3,
            direction: [Direction::ToDevice, Direction::FromDevice][(index % 2) as usize],
            keep_offset: index.is_multiple_of(2),
            preserve: index.is_multiple_of(3),
            skip_sync: index.is_multiple_of(5),
            align_bytes: 4096 << (index % 3),
            limit: (index % 2 == 1).then_some(Iova::new(index)),
        }
    }

    #[test]
    fn what_a_client_asks_is_what_the_daemon_reads() {
        for count in [1, 2, 30] {
            let each: Vec<_> = (0..count).map(map).collect();
            let alike = vec![map(4); each.len()];
            for specs in [each, alike] {
                assert_eq!(read(&written(&specs)), Ok((specs, vec![])));
            }
        }
        let unmap = |index: u64| UnmapSpec {
            iova: Iova::new(index + 4096),
            id: MappingId::new(index + 1),
            written_bytes: (index != 1).then_some(index),
            skip_sync: index == 2,
        };
        let unmaps: Vec<_> = (0..4).map(unmap).collect();
        assert_eq!(read(&written(&unmaps)), Ok((unmaps, vec![])));
        let sync = |index: u64| SyncSpec {
            iova: Iova::new(4096),
            id: MappingId::new(1),
            offset: index,
            len_bytes: 2,
            target: [SyncTarget::ForCpu, SyncTarget::ForDevice][(index % 2) as usize],
        };
        let syncs: Vec<_> = (0..4).map(sync).collect();
        assert_eq!(read(&written(&syncs)), Ok((syncs, vec![])));
    }

    #[test]
    fn what_is_the_same_for_all_is_written_once() {
        let request = written(&[map(2); 5]);
        assert_eq!((request.offset.len(), request.memory_id.len()), (5, 1));
        assert_eq!(pipeline_batch(&request).unwrap().entries, 5);
        assert_eq!(request.limit, [UNSET]);
    }

    #[test]
    fn a_column_has_a_value_for_each_or_one_or_none() {
        let batch = v1::PipelineRequest {
            operation: Sync.into(),
            iova: vec![4096; 3],
            mapping_id: vec![1],
            target: vec![1; 2],
            ..v1::PipelineRequest::default()
        };
        let refusal = read::<SyncSpec>(&batch).unwrap_err();
        let invalid = (Code::InvalidArgument, ErrorReason::Malformed);
        assert_eq!((refusal.grpc_code(), refusal.reason()), invalid);
        assert_eq!(refusal.metadata["column"], "target");
        assert_eq!(refusal.metadata["values"], "2");
        assert_eq!(refusal.metadata["entries"], "3");

        let foreign = v1::PipelineRequest {
            target: vec![1],
            written_bytes: vec![1],
            ..batch.clone()
        };
        let refusal = read::<SyncSpec>(&foreign).unwrap_err();
        assert_eq!(refusal.metadata["column"], "written_bytes");
        assert_eq!(refusal.metadata["most"], "0");

        let sound = v1::PipelineRequest {
            target: vec![1],
            ..batch
        };
        let (specs, _) = read::<SyncSpec>(&sound).unwrap();
        assert_eq!(specs.len(), 3);
        assert_eq!((specs[2].id.get(), specs[2].offset), (1, 0));
    }

    #[test]
    fn no_entries_too_many_and_no_operation_are_refused() {
        let of = |operation: i32, entries| v1::PipelineRequest {
            operation,
            iova: vec![1; entries],
            ..v1::PipelineRequest::default()
        };
        let most = BATCH_ENTRIES;
        assert!(pipeline_batch(&of(2, most)).is_ok());
        for entries in [0, most + 1] {
            let refused = pipeline_batch(&of(2, entries)).unwrap_err();
            assert_eq!(refused, Malformed::BatchSize { entries });
        }
        for value in [0, 4] {
            let field = "operation";
            let refused = pipeline_batch(&of(value, 1)).unwrap_err();
            assert_eq!(refused, Malformed::UnknownValue { field, value });
        }
    }

    #[test]
    fn an_entry_that_cannot_be_read_is_refused_alone_or_with_all() {
        let all = v1::PipelineRequest {
            direction: vec![1, 9, 2],
            ..written(&[map(2); 3])
        };
        let refusal = read::<MapSpec>(&all).unwrap_err();
        assert_eq!(refusal.reason(), ErrorReason::UnknownDirection);
        assert_eq!(refusal.metadata["entry_index"], "1");
        let partial = v1::PipelineRequest {
            partial: true,
            ..all
        };
        let (specs, refused) = read::<MapSpec>(&partial).unwrap();
        assert_eq!((specs.len(), refused), (2, vec![1]));
    }

    #[test]
    fn answers_stand_where_their_entries_stood() {
        let no = |name: &str| Refusal::because(Code::NotFound, ErrorReason::NoSuchMapping, name);
        let request = v1::PipelineRequest {
            partial: true,
            ..written(&[map(2); 5])
        };
        let batch = pipeline_batch(&request).unwrap();
        let mut unread = vec![entry(0, no("zero")), entry(3, no("three"))];
        let mapped = |id| Mapped {
            id: MappingId::new(id),
            iova: Iova::new(id << 12),
            len_bytes: 5,
        };
        let results = [Ok(mapped(1)), Err(no("two")), Ok(mapped(4))];
        let mut response = v1::PipelineResponse::default();

        batch.answer::<MapSpec>(&mut unread, results, &mut response);

        assert_eq!(response.mapping_id, [0, 1, 0, 0, 4]);
        assert_eq!(response.iova, [0, 1 << 12, 0, 0, 4 << 12]);
        let refused: Vec<_> = response.refused.iter().map(|one| one.index).collect();
        assert_eq!(refused, [0, 2, 3]);
        assert_eq!(response.refused[1].refusal.as_ref().unwrap().message, "two");
        assert_eq!(check_answer(&response, Map, BatchMode::Partial, 5), Ok(()));
    }

    #[test]
    fn an_answer_that_does_not_fit_is_not_believed() {
        let sound = v1::PipelineResponse {
            operation: Map.into(),
            mapping_id: vec![1, 0],
            iova: vec![4096, 0],
            entries: 2,
            refused: vec![entry(1, Refusal::default())],
            ..v1::PipelineResponse::default()
        };
        let check = |response: &_| check_answer(response, Map, BatchMode::Partial, 2);
        assert_eq!(check(&sound), Ok(()));
        let alone = check_answer(&sound, Map, BatchMode::AllOrNothing, 2);
        assert!(alone.is_err(), "no entry is refused alone");
        let broken: [fn(&mut v1::PipelineResponse); 9] = [
            |answer| answer.operation = Unmap.into(),
            |answer| answer.entries = 3,
            |answer| answer.mapping_id.push(1),
            |answer| answer.iova.clear(),
            |answer| answer.copied_bytes.push(1),
            |answer| answer.refused[0].index = 2,
            |answer| answer.refused[0].refusal = None,
            |answer| answer.refused.push(entry(1, Refusal::default())),
            |answer| answer.refusal = Some(Refusal::default()),
        ];
        for (index, break_it) in broken.iter().enumerate() {
            let mut answer = sound.clone();
            break_it(&mut answer);
            assert!(check(&answer).is_err(), "{index}: {answer:?}");
        }
        let whole = v1::PipelineResponse {
            operation: Map.into(),
            refusal: Some(Refusal::default()),
            ..v1::PipelineResponse::default()
        };
        assert_eq!(check(&whole), Ok(()));
    }
}
