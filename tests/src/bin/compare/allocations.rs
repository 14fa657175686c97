//! How often the heap is asked for one mapping, by daemon and driver together.
//!
//! A counting allocator would slow down all other rows, and only `domainctl` may
//! hold a daemon in its own process. So its example `allocations` counts, in a
//! child process, and prints what it has found.

use std::io;
use std::process::Command;

use domaind_tests::build;
use serde_json::Value;

use crate::report::{Limit, Report, Row, Unit};
use crate::rounds::{Outcome, Role};

const LEASE: &str = "allocations/lease";
const ENTRY: &str = "allocations/pipeline entry";
const UNARY: &str = "allocations/unary map+unmap";
/// A batch asks for its buffers; an entry more of it for nothing.
const ENTRY_MOST: f64 = 0.01;

/// Prints all rows of this family.
pub(crate) fn rows(report: &Report) -> io::Result<()> {
    if !report.wants_any(&[LEASE, ENTRY, UNARY].map(str::to_owned)) {
        return Ok(());
    }
    let counted = count()?;
    let all = |paths: &[&str]| -> Vec<f64> {
        let numbers = paths.iter().map(|path| number(&counted, path));
        numbers.collect()
    };
    let most = |paths| all(paths).into_iter().fold(f64::MIN, f64::max);
    let lease = most(&[
        "/lease/to_device",
        "/lease/from_device",
        "/lease/bidirectional",
    ]);
    report.print(&row(LEASE, lease, None, vec![Limit::AtMost(0.0)]))?;
    let entry = most(&["/pipeline/per_entry", "/pipeline_on_one_thread/per_entry"]);
    report.print(&row(ENTRY, entry, None, vec![Limit::AtMost(ENTRY_MOST)]))?;
    let calls = all(&["/unary/map", "/unary/unmap"]).iter().sum();
    let empty = 2.0 * number(&counted, "/unary/empty_call");
    report.print(&row(UNARY, calls, Some(empty), vec![]))
}

fn row(name: &str, ours: f64, empty_calls: Option<f64>, goal: Vec<Limit>) -> Row {
    let outcome = |role, name, value| Outcome {
        name,
        role,
        value: Some(value),
        note: None,
    };
    let mut outcomes = vec![outcome(Role::Ours, "domaind", ours)];
    outcomes.extend(empty_calls.map(|empty| outcome(Role::Floor, "empty RPC x 2", empty)));
    Row::new(name.to_owned(), Unit::Count, outcomes, goal)
}

fn count() -> io::Result<Value> {
    let example = build::allocations().map_err(|error| io::Error::other(format!("{error:#}")))?;
    let counted = Command::new(example).output()?;
    serde_json::from_slice(&counted.stdout).map_err(|_| {
        let trouble = String::from_utf8_lossy(&counted.stderr).into_owned();
        io::Error::other(format!("nothing was counted: {}", trouble.trim()))
    })
}

/// What stands there; a key that has gone is a bug of ours.
fn number(counted: &Value, path: &str) -> f64 {
    let number = counted.pointer(path).and_then(Value::as_f64);
    number.unwrap_or_else(|| panic!("no number {path} in {counted}"))
}
