//! What is printed: one JSON object a row, or a table for people.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::fmt;
use std::io::{self, Write};

use serde_json::{Map, Value, json};

use crate::rounds::{Outcome, Role};

/// What a row counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Unit {
    Nanoseconds,
    Milliseconds,
    Bytes,
    Percent,
    Count,
}

impl fmt::Display for Unit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Unit::Nanoseconds => "ns",
            Unit::Milliseconds => "ms",
            Unit::Bytes => "bytes",
            Unit::Percent => "%",
            Unit::Count => "count",
        })
    }
}

/// One thing that is asked of our value.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Limit {
    /// At most so many times the peer's. Met if the peer cannot do it at all.
    Peer(&'static str, f64),
    /// At most so many times the floor.
    Floor(f64),
    /// At most so much more than the floor.
    Beyond(f64),
    AtMost(f64),
    AtLeast(f64),
}

impl Limit {
    fn holds(self, row: &Row, ours: f64) -> bool {
        match self {
            Limit::Peer(name, times) => row.peer(name).is_none_or(|peer| ours <= times * peer),
            Limit::Floor(times) => row.floor().is_some_and(|floor| ours <= times * floor),
            Limit::Beyond(most) => row.floor().is_some_and(|floor| ours <= floor + most),
            Limit::AtMost(most) => ours <= most,
            Limit::AtLeast(least) => ours >= least,
        }
    }
}

impl fmt::Display for Limit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Limit::Peer(name, times) => write!(f, "<= {times:.3} x {name}"),
            Limit::Floor(times) => write!(f, "<= {times:.3} x floor"),
            Limit::Beyond(most) => write!(f, "<= floor + {most}"),
            Limit::AtMost(most) => write!(f, "<= {most}"),
            Limit::AtLeast(least) => write!(f, ">= {least}"),
        }
    }
}

/// One line of the comparison.
#[derive(Clone, Debug)]
pub(crate) struct Row {
    name: String,
    unit: Unit,
    outcomes: Vec<Outcome>,
    /// All must hold. None: the row is there to be read.
    goal: Vec<Limit>,
}

impl Row {
    pub(crate) fn new(
        name: String,
        unit: Unit,
        outcomes: Vec<Outcome>,
        goal: impl Into<Vec<Limit>>,
    ) -> Row {
        Row {
            name,
            unit,
            outcomes,
            goal: goal.into(),
        }
    }

    fn of(&self, role: Role) -> impl Iterator<Item = &Outcome> {
        self.outcomes
            .iter()
            .filter(move |outcome| outcome.role == role)
    }

    fn ours(&self) -> Option<f64> {
        self.of(Role::Ours).find_map(|outcome| outcome.value)
    }

    fn floor(&self) -> Option<f64> {
        self.of(Role::Floor).find_map(|outcome| outcome.value)
    }

    fn peer(&self, name: &str) -> Option<f64> {
        self.of(Role::Peer)
            .find(|peer| peer.name == name)
            .and_then(|peer| peer.value)
    }

    /// The best of the others.
    fn nearest(&self) -> Option<(&'static str, f64)> {
        let able = self
            .of(Role::Peer)
            .filter_map(|peer| Some((peer.name, peer.value?)));
        match self.unit {
            Unit::Percent => able.max_by(|a, b| a.1.total_cmp(&b.1)),
            _ => able.min_by(|a, b| a.1.total_cmp(&b.1)),
        }
    }

    fn met(&self) -> bool {
        self.ours()
            .is_some_and(|ours| self.goal.iter().all(|limit| limit.holds(self, ours)))
    }

    fn goal(&self) -> String {
        let limits: Vec<String> = self.goal.iter().map(Limit::to_string).collect();
        match limits.is_empty() {
            true => "none, to be read".to_owned(),
            false => limits.join(" and "),
        }
    }

    fn notes(&self) -> impl Iterator<Item = (&'static str, &str)> {
        self.outcomes
            .iter()
            .filter_map(|outcome| Some((outcome.name, outcome.note.as_deref()?)))
    }

    /// Notes are there only if there are any.
    fn to_json(&self) -> Value {
        let peers: Map<String, Value> = self
            .of(Role::Peer)
            .map(|peer| (peer.name.to_owned(), json!(peer.value.map(rounded))))
            .collect();
        let mut object = json!({
            "row": self.name,
            "unit": self.unit.to_string(),
            "ours": self.ours().map(rounded),
            "peers": peers,
            "floor": self.floor().map(rounded),
            "goal": self.goal(),
            "met": self.met(),
        });
        let notes: Map<String, Value> = self
            .notes()
            .map(|(name, note)| (name.to_owned(), json!(note)))
            .collect();
        if !notes.is_empty() {
            object["notes"] = Value::Object(notes);
        }
        object
    }
}

impl fmt::Display for Row {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ours = self.ours();
        let times = |other: f64| match ours {
            Some(ours) => format!("{:.2}x", ours / other),
            None => "-".to_owned(),
        };
        let nearest = self.nearest().map_or("-".to_owned(), |(name, value)| {
            format!("{} {name}", times(value))
        });
        let floor = self.floor().map_or("-".to_owned(), times);
        let mark = if self.met() { "met" } else { "NOT MET" };
        write!(
            f,
            "{:<30} {:>10} {:<5}  {nearest:<29} {floor:>8}  {mark:<7}  {}",
            self.name,
            number(ours),
            self.unit.to_string(),
            self.goal()
        )?;
        let others: Vec<String> = self
            .outcomes
            .iter()
            .filter(|outcome| outcome.role != Role::Ours || outcome.note.is_some())
            .map(listed)
            .collect();
        match others.is_empty() {
            true => Ok(()),
            false => write!(f, "\n    {}", others.join(", ")),
        }
    }
}

/// As it stands below a row.
fn listed(outcome: &Outcome) -> String {
    let note = match &outcome.note {
        Some(note) => format!(" ({note})"),
        None => String::new(),
    };
    format!("{} {}{note}", outcome.name, number(outcome.value))
}

/// Of what is next to nothing the first digits matter.
fn rounded(value: f64) -> f64 {
    let parts = if value < 0.1 { 1e5 } else { 1e2 };
    (value * parts).round() / parts
}

fn number(value: Option<f64>) -> String {
    match value {
        None => "-".to_owned(),
        Some(value) if value >= 1000.0 => format!("{value:.0}"),
        Some(value) if value > 0.0 && value < 0.1 => format!("{value:.4}"),
        Some(value) => format!("{value:.1}"),
    }
}

/// Where the rows go, each as soon as it is known.
#[derive(Debug)]
pub(crate) struct Report {
    json: bool,
    filter: Option<String>,
    /// Names of rows: no two are the same.
    printed: RefCell<BTreeSet<String>>,
}

impl Report {
    pub(crate) fn new(json: bool, filter: Option<String>) -> Report {
        Report {
            json,
            filter,
            printed: RefCell::default(),
        }
    }

    /// The machine and the method. Beside the objects, if those are wanted.
    pub(crate) fn heading(&self, lines: &[String]) -> io::Result<()> {
        if self.json {
            lines.iter().for_each(|line| eprintln!("{line}"));
            return Ok(());
        }
        let mut out = io::stdout().lock();
        for line in lines {
            writeln!(out, "{line}")?;
        }
        writeln!(
            out,
            "\n{:<30} {:>10} {:<5}  {:<29} {:>8}  {:<7}  goal",
            "row", "ours", "unit", "x nearest peer", "x floor", ""
        )
    }

    /// Is this row asked for?
    pub(crate) fn wants(&self, name: &str) -> bool {
        self.filter
            .as_deref()
            .is_none_or(|filter| name.contains(filter))
    }

    /// Is any of these rows asked for?
    pub(crate) fn wants_any(&self, names: &[String]) -> bool {
        names.iter().any(|name| self.wants(name))
    }

    /// Prints a row that is asked for.
    pub(crate) fn print(&self, row: &Row) -> io::Result<()> {
        if !self.wants(&row.name) {
            return Ok(());
        }
        let is_new = self.printed.borrow_mut().insert(row.name.clone());
        assert!(is_new, "there are two rows {}", row.name);
        let mut out = io::stdout().lock();
        match self.json {
            true => writeln!(out, "{}", row.to_json())?,
            false => writeln!(out, "{row}")?,
        }
        out.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outcome(role: Role, name: &'static str, value: Option<f64>) -> Outcome {
        Outcome {
            name,
            role,
            value,
            note: value.is_none().then(|| "stops at 80 %".to_owned()),
        }
    }

    fn row(goal: Vec<Limit>) -> Row {
        let outcomes = vec![
            outcome(Role::Ours, "domaind", Some(10.004)),
            outcome(Role::Peer, "fast", Some(20.0)),
            outcome(Role::Peer, "unable", None),
            outcome(Role::Floor, "floor", Some(5.0)),
        ];
        Row::new("a/row".into(), Unit::Nanoseconds, outcomes, goal)
    }

    #[test]
    fn a_row_is_one_object_with_the_agreed_fields() {
        let object = row(vec![Limit::Peer("fast", 0.5), Limit::Floor(2.5)]).to_json();
        let wanted = json!({
            "row": "a/row", "unit": "ns", "ours": 10.0,
            "peers": { "fast": 20.0, "unable": null }, "floor": 5.0,
            "goal": "<= 0.500 x fast and <= 2.500 x floor", "met": false,
            "notes": { "unable": "stops at 80 %" },
        });
        assert_eq!(object, wanted);
        assert!(!object.to_string().contains('\n'));
    }

    #[test]
    fn a_goal_is_met_when_all_its_limits_hold() {
        assert!(row(vec![]).met());
        assert!(row(vec![Limit::Peer("fast", 1.0), Limit::Floor(2.5)]).met());
        assert!(row(vec![Limit::Peer("unable", 1.0), Limit::AtMost(11.0)]).met());
        assert!(!row(vec![Limit::Peer("fast", 1.0), Limit::Floor(2.0)]).met());
        assert!(!row(vec![Limit::AtLeast(11.0)]).met());
    }

    #[test]
    fn the_table_names_the_nearest_peer_and_hides_no_failure() {
        let text = row(vec![]).to_string();
        assert!(text.contains("0.50x fast") && text.contains("2.00x"));
        assert!(text.contains("unable - (stops at 80 %)"));
    }

    #[test]
    fn what_is_next_to_nothing_keeps_its_first_digits() {
        let table = [
            (0.0, 0.0, "0.0"),
            (0.007_684, 0.00768, "0.0077"),
            (0.1, 0.1, "0.1"),
            (79.064, 79.06, "79.1"),
        ];
        for (value, in_json, in_table) in table {
            assert!((rounded(value) - in_json).abs() < 1e-9, "{value}");
            assert_eq!(number(Some(value)), in_table);
        }
    }
}
