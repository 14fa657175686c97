//! Whole tables of direct mappings.

use super::*;

#[test]
fn a_table_is_built_from_entries_in_any_order_and_names_those_that_overlap_as_given() {
    let given = vec![
        entry(1030, 10, 0, 0),
        entry(1000, 10, 0, 0),
        entry(1010, 10, 0, 0),
    ];
    let built = DirectTable::build(given.clone()).unwrap();
    assert_eq!(built.entries(), [given[1], given[2], given[0]]);
    assert_eq!((built.len(), built.is_empty()), (3, false));
    let clash = [given, vec![entry(900, 1, 0, 0), entry(1035, 1, 0, 0)]].concat();
    let expected = BuildError {
        index: 4,
        range: granules(1035, 1),
        hit_index: 0,
        hit: granules(1030, 10),
    };
    assert_eq!(DirectTable::build(clash), Err(expected));
    assert!(DirectTable::build(Vec::new()).unwrap().is_empty());
}

#[test]
fn replacing_tells_what_came_and_what_went_and_leaves_the_apertures_alone() {
    let mut iotlb = iotlb(64);
    let streaming = entry(5, 3, 9, 0);
    iotlb.insert(streaming).unwrap();
    let stays = entry(1000, 10, 0, 0);
    let goes = entry(1010, 10, 0, 10);
    let (was, is) = (entry(2000, 1, 0, 0), entry(2000, 2, 0, 0));
    let comes = entry(TOP - 1, 1, 0, 0);
    iotlb.replace_direct(&table(&[stays, goes, was])).unwrap();
    let generation = iotlb.generation();

    let replaced = iotlb.replace_direct(&table(&[comes, is, stays])).unwrap();

    assert_eq!(replaced.added, [is, comes]);
    assert_eq!(replaced.removed, [goes, was]);
    assert_eq!(iotlb.generation(), generation + 1);
    let entries: Vec<_> = iotlb.entries().collect();
    assert_eq!(entries, [streaming, stays, is, comes]);
    iotlb.check_invariants();
    let all = iotlb.replace_direct(&DirectTable::default()).unwrap();
    assert_eq!((all.added.len(), all.removed.len()), (0, 3));
    assert_eq!(
        used(&mut iotlb),
        2,
        "only the apertures have nodes: their root and one below"
    );
    iotlb.check_invariants();
}

#[test]
fn the_same_table_again_changes_nothing() {
    let mut iotlb = iotlb(64);
    let same = [entry(1000, 10, 0, 0), entry(5000, 10, 0, 0)];
    iotlb.replace_direct(&table(&same)).unwrap();
    let before = (iotlb.generation(), iotlb.table_usage());
    let replaced = iotlb.replace_direct(&table(&same)).unwrap();
    assert_eq!(replaced, Replaced::default());
    assert_eq!(before, (iotlb.generation(), iotlb.table_usage()));
}

#[test]
fn a_refused_table_leaves_the_old_one() {
    let mut iotlb = iotlb(64);
    let old = entry(1000, 10, 0, 0);
    iotlb.insert(old).unwrap();
    let inside = entry(5, 1, 0, 0);
    let skewed = Entry {
        range: bytes(5000 * P, 5),
        ..old
    };
    for bad in [inside, skewed] {
        let generation = iotlb.generation();
        iotlb
            .replace_direct(&table(&[entry(2000, 1, 0, 0), bad]))
            .unwrap_err();
        assert_eq!(iotlb.generation(), generation);
        assert_eq!(iotlb.entries().collect::<Vec<_>>(), [old]);
        iotlb.check_invariants();
    }
}

#[test]
fn what_follows_a_replacement_changes_the_new_table() {
    let mut iotlb = iotlb(64);
    iotlb
        .replace_direct(&table(&[entry(1000, 10, 0, 0), entry(5000, 10, 0, 0)]))
        .unwrap();
    iotlb.insert(entry(3000, 1, 1, 0)).unwrap();
    iotlb.remove(Iova::new(5000 * P)).unwrap();
    iotlb.check_invariants();
    let first = iotlb
        .direct_entries()
        .map(|entry| entry.range.start().get() / P);
    assert_eq!(first.collect::<Vec<_>>(), [1000, 3000]);
}
