//! How often a mapping asks the heap, on both sides together, counted by
//! `examples/allocations.rs` in a program of its own.

use std::path::PathBuf;
use std::process::Command;

use serde_json::Value;

/// What a Map or an Unmap may allocate beyond an empty call, both sides together.
/// It is 10; 12 with debug assertions, with which tokio boxes futures beyond 2 KiB
/// that are spawned or waited for; and two more for a tokio or tonic that boxes more
/// than today's.
///
/// The ten: the lists of one entry and of one result, as they are written and as
/// they are read (4); what the daemon has made of the entry, and two lists of the
/// core's desk (3); the task that goes on when the caller is cancelled (1); a
/// clone of the channel, and its place in line (2); name and value of the token,
/// which HTTP/2 keeps in no table because it is secret (2); less the codec that
/// the empty call boxes on each side, and ours has no need to (-2).
const CALL_BEYOND_EMPTY: f64 = 14.5;
/// A batch allocates for its messages; one entry more must not.
const ENTRY_MOST: f64 = 0.01;
/// Of whatever size: a batch of 64, both messages and both answers.
const BATCH_OF_64_MOST: f64 = 4.0;

/// Cargo builds examples before it runs tests, beside the directory of the tests;
/// not if it was told which tests (`--test allocations`).
fn example() -> PathBuf {
    let me = std::env::current_exe().expect("the path of this test");
    let dir = me
        .ancestors()
        .nth(2)
        .expect("it lies in target/PROFILE/deps");
    let example = dir.join("examples/allocations");
    assert!(
        example.is_file(),
        "{} is not there: cargo build -p domainctl --example allocations",
        example.display()
    );
    example
}

fn count() -> Value {
    let counted = Command::new(example()).output().expect("it runs");
    let (out, err) = (&counted.stdout, String::from_utf8_lossy(&counted.stderr));
    assert!(counted.status.success(), "{err}");
    serde_json::from_slice(out).unwrap_or_else(|error| panic!("{error}: {err}"))
}

#[test]
fn mappings_ask_the_heap_for_nothing_but_what_a_call_or_a_batch_needs() {
    let counted = count();
    let number = |pointer: &str| {
        let value = counted.pointer(pointer).and_then(Value::as_f64);
        value.unwrap_or_else(|| panic!("{pointer} in {counted}"))
    };

    for direction in ["to_device", "from_device", "bidirectional"] {
        let per_pair = number(&format!("/lease/{direction}"));
        assert!(per_pair.abs() < f64::EPSILON, "{direction}: {counted}");
    }
    for pipeline in ["pipeline", "pipeline_on_one_thread"] {
        let per_entry = number(&format!("/{pipeline}/per_entry"));
        assert!(per_entry < ENTRY_MOST, "{pipeline}: {counted}");
        let per_batch = number(&format!("/{pipeline}/per_batch_64"));
        assert!(per_batch <= BATCH_OF_64_MOST, "{pipeline}: {counted}");
    }
    let empty = number("/unary/empty_call");
    assert!(empty > 0.0, "it counts: {counted}");
    for call in ["map", "unmap"] {
        let beyond = number(&format!("/unary/{call}")) - empty;
        assert!(beyond <= CALL_BEYOND_EMPTY, "{call}: {beyond} in {counted}");
    }
}
