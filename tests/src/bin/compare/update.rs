//! Removing one range of many and entering it again.

use std::io;
use std::time::Instant;

use crate::clock::Batch;
use crate::lookup::spaced;
use crate::peers::{BTreeTable, Editable, IotlbTable, NoditTable, RangeMapTable, Table, VmIotlb};
use crate::random::Random;
use crate::report::{Limit, Report, Row, Unit};
use crate::rounds::{Contender, Scale, interleave};

const RANGES: [(u64, &str); 2] = [(1 << 10, "1k"), (1 << 16, "64k")];

/// Prints all rows of this family.
pub(crate) fn rows(report: &Report, scale: &Scale) -> io::Result<()> {
    for (ranges, name) in RANGES {
        let row = format!("remove+insert/{name}");
        if report.wants(&row) {
            let outcomes = interleave(scale.rounds, contenders(ranges, scale));
            let goal = [Limit::Peer(RangeMapTable::NAME, 1.0)];
            report.print(&Row::new(row, Unit::Nanoseconds, outcomes, goal))?;
        }
    }
    Ok(())
}

fn contenders(ranges: u64, scale: &Scale) -> Vec<Contender<'static>> {
    vec![
        contender::<IotlbTable>(ranges, scale),
        contender::<VmIotlb>(ranges, scale),
        contender::<RangeMapTable>(ranges, scale),
        contender::<NoditTable>(ranges, scale),
        contender::<BTreeTable>(ranges, scale),
    ]
}

fn contender<T: Editable + 'static>(ranges: u64, scale: &Scale) -> Contender<'static> {
    let mut mappings = spaced(ranges);
    Random::stream(20).shuffle(&mut mappings);
    let mut table = T::build(&mappings);
    let mut at = 0;
    let mut work = move |ops| {
        let start = Instant::now();
        for _ in 0..ops {
            let mapping = mappings[at];
            at = (at + 1) % mappings.len();
            table.remove(mapping);
            table.insert(mapping);
        }
        start.elapsed()
    };
    let mut batch = Batch::lasting(scale.turn);
    Contender::new(T::ROLE, T::NAME, move || batch.run(&mut work))
}
