//! Free runs of a space of numbered granules, in order of address.
//!
//! A B+-tree (Bayer and McCreight; Comer, "The Ubiquitous B-Tree") whose branches
//! know of each child the longest hole and the set of size classes below it, as
//! in any augmented search tree (Cormen et al., "Augmenting data structures").
//! The lowest hole that is long enough, or the lowest of a class, is then found
//! by going down once. For a window that is all it takes: if the lowest place
//! that fits does not end inside the window, no place does.
//!
//! An alignment makes holes shorter, and how much depends on where they lie. So
//! each alignment ever asked for has a column of its own with the longest
//! *aligned* length per child, and an aligned request is answered as exactly and
//! as fast as any other. The column is built when the alignment is asked for the
//! first time: the one thing here that looks at every hole.
//!
//! | operation | cost with n holes |
//! |---|---|
//! | `first_fit`, `take_first`, `take_good`, `take`, `give`, `hole_at`, `largest_in` | O(log n), and a change times the number of alignments in use |
//! | `largest`, `total`, `count` | O(1) |
//! | the first request for an alignment, `from_sorted` | O(n) |
//!
//! A node has 28 rows and never fewer than 7: four levels hold 100,000 holes. A
//! hole costs 18 bytes in a full leaf and 24 in one that is as full as random
//! work leaves it, both times the slack of a growing vector. Memory is kept for
//! the next holes when these are gone.

mod class;
mod node;
mod path;
#[cfg(test)]
mod tests;

use std::ops::RangeInclusive;

use self::class::{class_of, roomy_classes};
use self::node::{FEW, FULL, Node};
use self::path::{Path, Step};

/// A free run: first granule and number of granules.
type Hole = (u64, u64);

/// Free runs, disjoint and never touching. Granule numbers lie below 2^63.
#[derive(Debug)]
pub struct Holes {
    nodes: Vec<Node>,
    /// Places in `nodes` that are not part of the tree.
    spare: Vec<usize>,
    root: usize,
    /// Branches between the root and any leaf, the root included.
    height: usize,
    /// The alignment of each column. The first is 0: the plain lengths.
    shifts: Vec<u32>,
    count: usize,
    total: u64,
}

impl Default for Holes {
    fn default() -> Holes {
        Holes::new()
    }
}

impl Holes {
    /// No hole at all.
    #[must_use]
    pub fn new() -> Holes {
        Holes {
            nodes: vec![Node::leaf()],
            spare: Vec::new(),
            root: 0,
            height: 0,
            shifts: vec![0],
            count: 0,
            total: 0,
        }
    }

    /// Holes from runs of (start, length) in order of address; runs that touch
    /// become one.
    ///
    /// # Panics
    /// If they are not in order, overlap, are empty or leave 2^63.
    #[must_use]
    pub fn from_sorted(runs: impl Iterator<Item = (u64, u64)>) -> Holes {
        let mut holes = Holes::new();
        let rows = joined(runs);
        holes.count = rows.len();
        holes.total = rows.iter().map(|(_, len)| len).sum();
        let mut level = holes.leaves_of(&rows);
        while level.len() > 1 {
            level = holes.branches_over(&level);
            holes.height += 1;
        }
        if let Some(&(_, root)) = level.first() {
            holes.root = root;
            holes.retire(0);
        }
        holes
    }

    /// The lowest place for `want` granules that lies inside of `window` and
    /// starts at a multiple of 2^`align_shift` granules. `None` only if there is
    /// none. Nothing is taken; what may change is that the alignment is
    /// remembered.
    ///
    /// # Panics
    /// If `want` is 0.
    pub fn first_fit(
        &mut self,
        want: u64,
        align_shift: u32,
        window: RangeInclusive<u64>,
    ) -> Option<u64> {
        self.find(want, align_shift, &window).map(|(_, at)| at)
    }

    /// As [`first_fit`](Holes::first_fit), and takes it.
    ///
    /// # Panics
    /// If `want` is 0.
    pub fn take_first(
        &mut self,
        want: u64,
        align_shift: u32,
        window: RangeInclusive<u64>,
    ) -> Option<u64> {
        let (path, at) = self.find(want, align_shift, &window)?;
        self.cut(path, at, want);
        Some(at)
    }

    /// Takes `want` granules wherever they do least harm: from the start of the
    /// lowest hole of the smallest class that surely fits, or else of the lowest
    /// that fits. `None` only if none does.
    ///
    /// # Panics
    /// If `want` is 0.
    pub fn take_good(&mut self, want: u64) -> Option<u64> {
        assert!(want > 0, "a place for nothing");
        let path = self
            .good_fit(want)
            .or_else(|| self.first_from(0, want, 0))?;
        let (at, _) = self.hole(&path);
        self.cut(path, at, want);
        Some(at)
    }

    /// Takes exactly `len` granules from `start` on. `false` if they are not
    /// all free, and then nothing is taken.
    ///
    /// # Panics
    /// If `len` is 0.
    #[must_use]
    pub fn take(&mut self, start: u64, len: u64) -> bool {
        assert!(len > 0, "nothing to take");
        let Some(path) = self.covering(start) else {
            return false;
        };
        let (hole, hole_len) = self.hole(&path);
        if hole_len - (start - hole) < len {
            return false;
        }
        self.cut(path, start, len);
        true
    }

    /// Makes a run free, and one with the holes that it touches.
    ///
    /// # Panics
    /// If it is empty, leaves 2^63 or overlaps a hole: the caller promises that
    /// it was taken.
    pub fn give(&mut self, start: u64, len: u64) {
        let end = end_of((start, len));
        let here = self.seek(start);
        let (before, after) = (self.before(here), self.at_or_after(here));
        let joins_before = before.filter(|path| {
            let hole_end = end_of(self.hole(path));
            assert!(hole_end <= start, "granule {start} was free already");
            hole_end == start
        });
        let joins_after = after.filter(|path| {
            let (hole, _) = self.hole(path);
            assert!(hole >= end, "granule {hole} was free already");
            hole == end
        });
        self.total += len;
        match (joins_before, joins_after) {
            (None, None) => self.insert(here, (start, len)),
            (Some(before), None) => {
                let (hole, hole_len) = self.hole(&before);
                self.change(&before, (hole, hole_len + len));
            }
            (None, Some(after)) => {
                let (_, hole_len) = self.hole(&after);
                self.reach_down(&after, start);
                self.change(&after, (start, len + hole_len));
            }
            (Some(before), Some(after)) => {
                let ((hole, hole_len), (_, after_len)) = (self.hole(&before), self.hole(&after));
                self.change(&before, (hole, hole_len + len + after_len));
                self.remove(&after);
            }
        }
    }

    /// The hole that `granule` lies in, as (start, length).
    #[must_use]
    pub fn hole_at(&self, granule: u64) -> Option<(u64, u64)> {
        self.covering(granule).map(|path| self.hole(&path))
    }

    /// Length of the longest hole; 0 if there is none.
    #[must_use]
    pub fn largest(&self) -> u64 {
        self.longest(self.root, 0)
    }

    /// Length of the longest run of free granules inside of `window`.
    #[must_use]
    pub fn largest_in(&self, window: RangeInclusive<u64>) -> u64 {
        let (low, high) = (*window.start(), *window.end());
        if high < low || self.count == 0 {
            return 0;
        }
        // The holes that the window's ends cut, and whole ones between them.
        let (first, last) = (self.hole_at(low), self.hole_at(high));
        if first.is_some() && first == last {
            return (high - low).saturating_add(1);
        }
        let from = first.map_or(low, end_of);
        let to = last.map_or(high.saturating_add(1), |(start, _)| start);
        let cut_first = first.map_or(0, |hole| end_of(hole) - low);
        let cut_last = last.map_or(0, |(start, _)| high - start + 1);
        self.longest_between(from, to).max(cut_first).max(cut_last)
    }

    /// All free granules together.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.total
    }

    /// Number of holes.
    #[must_use]
    pub fn count(&self) -> usize {
        self.count
    }

    /// The holes as (start, length), in order of address.
    pub fn iter(&self) -> impl Iterator<Item = (u64, u64)> {
        let mut next = self.seek(0);
        std::iter::from_fn(move || {
            let path = self.at_or_after(next)?;
            next = path.to(path.leaf(), path.row() + 1);
            Some(self.hole(&path))
        })
    }

    /// Bytes of memory held beside the value itself.
    #[must_use]
    pub fn heap_bytes(&self) -> usize {
        self.nodes.capacity() * size_of::<Node>()
            + self.spare.capacity() * size_of::<usize>()
            + self.shifts.capacity() * size_of::<u32>()
            + self.nodes.iter().map(Node::heap_bytes).sum::<usize>()
    }

    /// Checks that holes are in order, disjoint and apart, that every look-up
    /// and every maximum agrees with the leaves, and that no node is too empty.
    ///
    /// # Panics
    /// If not.
    pub fn check_invariants(&self) {
        let mut last_end = None;
        let (mut count, mut total) = (0, 0);
        for (start, len) in self.iter() {
            assert!(len > 0, "the hole at {start} is not empty");
            assert!(
                last_end.is_none_or(|end| end < start),
                "the hole at {start} stands apart"
            );
            let found = self.seek(start);
            let row = self.nodes[found.leaf()].starts().get(found.row());
            assert_eq!(row, Some(&start), "the hole at {start} is found");
            last_end = Some(end_of((start, len)));
            count += 1;
            total += len;
        }
        assert_eq!((count, total), (self.count, self.total), "all is counted");
        let in_tree = self.check_node(self.root, self.height);
        let known = in_tree + self.spare.len();
        assert_eq!(known, self.nodes.len(), "every node has its place");
    }

    fn check_node(&self, node: usize, height: usize) -> usize {
        let rows = self.nodes[node].rows();
        let least = match (node == self.root, height) {
            (false, _) => FEW,
            (true, 0) => 0,
            (true, _) => 2,
        };
        assert!((least..=FULL).contains(&rows), "{rows} rows in a node");
        if height == 0 {
            return 1;
        }
        for row in 0..rows {
            let child = self.nodes[node].child(row);
            let classes = self.nodes[child].all_classes();
            assert_eq!(self.nodes[node].classes()[row], classes, "classes below");
            for column in 0..self.shifts.len() {
                let known = self.nodes[node].column(column)[row];
                assert_eq!(known, self.longest(child, column), "the longest below");
            }
        }
        let below = (0..rows).map(|row| self.check_node(self.nodes[node].child(row), height - 1));
        1 + below.sum::<usize>()
    }
}

/// Finding.
impl Holes {
    fn find(
        &mut self,
        want: u64,
        align_shift: u32,
        window: &RangeInclusive<u64>,
    ) -> Option<(Path, u64)> {
        assert!(want > 0, "a place for nothing");
        let (low, high) = (*window.start(), *window.end());
        // Granules lie below 2^63, so that nothing but 0 is a multiple of it.
        if align_shift >= 63 {
            return None;
        }
        let column = self.column_of(align_shift);
        let ends_inside = |at: u64| at <= high && want - 1 <= high - at;
        // Only the hole that the window begins in starts too low to be searched.
        if low > 0
            && let Some(path) = self.covering(low)
        {
            let hole = self.hole(&path);
            let at = align_up(low.max(hole.0), align_shift);
            if at < end_of(hole) && end_of(hole) - at >= want {
                return ends_inside(at).then_some((path, at));
            }
        }
        let path = self.first_from(low, want, column)?;
        let at = align_up(self.hole(&path).0, align_shift);
        ends_inside(at).then_some((path, at))
    }

    /// The lowest hole of the smallest class in which all are long enough.
    fn good_fit(&self, want: u64) -> Option<Path> {
        let roomy = self.nodes[self.root].all_classes() & roomy_classes(want);
        let smallest = u8::try_from(roomy.trailing_zeros()).ok();
        let smallest = smallest.filter(|_| roomy != 0)?;
        let mut path = Path::default();
        let mut node = self.root;
        while path.height() < self.height {
            let row = self.nodes[node].class_row(smallest)?;
            path.push(node, row);
            node = self.nodes[node].child(row);
        }
        Some(path.to(node, self.nodes[node].class_row(smallest)?))
    }

    /// The first hole from `low` on that offers `want` granules.
    fn first_from(&self, low: u64, want: u64, column: usize) -> Option<Path> {
        if low == 0 {
            return self.descend(Path::default(), self.root, want, column);
        }
        let mut path = self.seek(low);
        if let Some(row) = self.fitting_row(path.leaf(), path.row(), want, column) {
            return Some(path.to(path.leaf(), row));
        }
        while let Some(step) = path.pop() {
            let later = &self.nodes[step.node].column(column)[step.row + 1..];
            if let Some(on) = later.iter().position(|longest| *longest >= want) {
                let row = step.row + 1 + on;
                path.push(step.node, row);
                let child = self.nodes[step.node].child(row);
                return self.descend(path, child, want, column);
            }
        }
        None
    }

    /// The first hole below `node` that offers `want` granules.
    fn descend(&self, mut path: Path, mut node: usize, want: u64, column: usize) -> Option<Path> {
        while path.height() < self.height {
            let longest = self.nodes[node].column(column);
            let row = longest.iter().position(|longest| *longest >= want)?;
            path.push(node, row);
            node = self.nodes[node].child(row);
        }
        let row = self.fitting_row(node, 0, want, column)?;
        Some(path.to(node, row))
    }

    fn fitting_row(&self, leaf: usize, from: usize, want: u64, column: usize) -> Option<usize> {
        let (leaf, shift) = (&self.nodes[leaf], self.shifts[column]);
        let mut rows = from..leaf.rows();
        if shift == 0 {
            return rows.find(|row| leaf.lens()[*row] >= want);
        }
        rows.find(|row| aligned_len(leaf.row(*row), shift) >= want)
    }

    /// Where `start` is, or would be inserted.
    fn seek(&self, start: u64) -> Path {
        let mut path = Path::default();
        let mut node = self.root;
        for _ in 0..self.height {
            let row = self.nodes[node].child_row(start);
            path.push(node, row);
            node = self.nodes[node].child(row);
        }
        path.to(node, self.nodes[node].starts_below(start))
    }

    fn covering(&self, granule: u64) -> Option<Path> {
        let here = self.seek(granule);
        let is_here = self.nodes[here.leaf()].starts().get(here.row()) == Some(&granule);
        let path = if is_here { here } else { self.before(here)? };
        (granule < end_of(self.hole(&path))).then_some(path)
    }

    /// The last hole before a path.
    fn before(&self, mut path: Path) -> Option<Path> {
        if path.row() > 0 {
            return Some(path.to(path.leaf(), path.row() - 1));
        }
        loop {
            let Step { mut node, row } = path.pop()?;
            let Some(mut row) = row.checked_sub(1) else {
                continue;
            };
            while path.height() < self.height {
                path.push(node, row);
                node = self.nodes[node].child(row);
                row = self.nodes[node].rows() - 1;
            }
            return Some(path.to(node, row));
        }
    }

    /// The hole at a path, or the first one after it.
    fn at_or_after(&self, mut path: Path) -> Option<Path> {
        if path.row() < self.nodes[path.leaf()].rows() {
            return Some(path);
        }
        loop {
            let step = path.pop()?;
            let (mut node, mut row) = (step.node, step.row + 1);
            if row == self.nodes[node].rows() {
                continue;
            }
            while path.height() < self.height {
                path.push(node, row);
                (node, row) = (self.nodes[node].child(row), 0);
            }
            return Some(path.to(node, 0));
        }
    }

    fn hole(&self, path: &Path) -> Hole {
        self.nodes[path.leaf()].row(path.row())
    }

    /// The longest hole or aligned part of one below a node.
    fn longest(&self, node: usize, column: usize) -> u64 {
        let (table, shift) = (&self.nodes[node], self.shifts[column]);
        if shift == 0 || !table.is_leaf() {
            return table.column(column).iter().copied().fold(0, u64::max);
        }
        let offers = |row| aligned_len(table.row(row), shift);
        (0..table.rows()).map(offers).fold(0, u64::max)
    }

    /// The longest of the holes that start at `from` or later and before `to`.
    fn longest_between(&self, from: u64, to: u64) -> u64 {
        let (low, high) = (self.seek(from), self.seek(to));
        let longest = |lens: &[u64]| lens.iter().copied().fold(0, u64::max);
        let steps = || low.steps().zip(high.steps());
        let Some(fork) = steps().position(|(low, high)| low.row != high.row) else {
            return longest(&self.nodes[low.leaf()].lens()[low.row()..high.row()]);
        };
        let lens = |node: usize| self.nodes[node].lens();
        let (left, right) = (low.step(fork), high.step(fork));
        let between = longest(&lens(left.node)[left.row + 1..right.row]);
        let in_leaves =
            longest(&lens(low.leaf())[low.row()..]).max(longest(&lens(high.leaf())[..high.row()]));
        steps()
            .skip(fork + 1)
            .map(|(low, high)| {
                longest(&lens(low.node)[low.row + 1..]).max(longest(&lens(high.node)[..high.row]))
            })
            .fold(between.max(in_leaves), u64::max)
    }

    /// The column of an alignment, built if it was never asked for.
    fn column_of(&mut self, align_shift: u32) -> usize {
        let known = self.shifts.iter().position(|shift| *shift == align_shift);
        known.unwrap_or_else(|| {
            self.shifts.push(align_shift);
            self.add_column(self.root, self.height);
            self.shifts.len() - 1
        })
    }

    fn add_column(&mut self, node: usize, height: usize) {
        if height == 0 {
            return;
        }
        self.nodes[node].add_column();
        for row in 0..self.nodes[node].rows() {
            self.add_column(self.nodes[node].child(row), height - 1);
            self.measure(node, row);
        }
    }
}

/// Changing holes. What is known above a leaf is brought up to date by
/// [`settle`](Holes::settle), which stops where nothing changes.
impl Holes {
    /// Takes a part of the hole at `path`, in which it lies.
    fn cut(&mut self, mut path: Path, at: u64, want: u64) {
        let (hole, hole_len) = self.hole(&path);
        let (head, tail) = (at - hole, hole_len - (at - hole) - want);
        self.total -= want;
        match (head, tail) {
            (0, 0) => self.remove(&path),
            (0, _) => {
                self.reach_up(&path, at + want);
                self.change(&path, (at + want, tail));
            }
            (_, 0) => self.change(&path, (hole, head)),
            _ => {
                self.change(&path, (hole, head));
                path = path.to(path.leaf(), path.row() + 1);
                self.insert(path, (at + want, tail));
            }
        }
    }

    fn change(&mut self, path: &Path, to: Hole) {
        let was = self.hole(path);
        self.nodes[path.leaf()].set_hole(path.row(), to.0, to.1);
        self.settle(path, Some(was), Some(to));
    }

    fn insert(&mut self, mut path: Path, hole: Hole) {
        self.count += 1;
        self.make_room(&mut path);
        self.reach_up(&path, hole.0);
        self.nodes[path.leaf()].insert_hole(path.row(), hole.0, hole.1);
        self.settle(&path, None, Some(hole));
    }

    fn remove(&mut self, path: &Path) {
        self.count -= 1;
        let was = self.hole(path);
        self.nodes[path.leaf()].remove(path.row());
        self.settle(path, Some(was), None);
        self.mend(path);
    }

    /// Brings up to date what is known above a leaf in which `was` became `now`.
    fn settle(&mut self, path: &Path, was: Option<Hole>, now: Option<Hole>) {
        let class = |hole: Option<Hole>| hole.map(|(_, len)| class_of(len));
        self.settle_classes(path, class(was), class(now));
        let len = |hole: Option<Hole>| hole.map_or(0, |(_, len)| len);
        self.settle_column(path, 0, len(was), len(now));
        for column in 1..self.shifts.len() {
            let shift = self.shifts[column];
            let offers = |hole: Option<Hole>| hole.map_or(0, |hole| aligned_len(hole, shift));
            self.settle_column(path, column, offers(was), offers(now));
        }
    }

    fn settle_classes(&mut self, path: &Path, was: Option<u8>, now: Option<u8>) {
        if was == now {
            return;
        }
        let mut child = path.leaf();
        let mut gone = was;
        let come = now.map_or(0, |class| 1 << class);
        for step in path.steps().rev() {
            let known = self.nodes[step.node].classes()[step.row];
            gone = gone.filter(|class| self.nodes[child].class_row(*class).is_none());
            let classes = (known | come) & !gone.map_or(0, |class| 1 << class);
            if classes == known {
                return;
            }
            self.nodes[step.node].set_classes(step.row, classes);
            child = step.node;
        }
    }

    fn settle_column(&mut self, path: &Path, column: usize, mut was: u64, mut now: u64) {
        let mut child = path.leaf();
        for step in path.steps().rev() {
            let known = self.nodes[step.node].column(column)[step.row];
            let longest = match () {
                () if now >= known => now,
                () if was < known => known,
                () => self.longest(child, column),
            };
            if longest == known {
                return;
            }
            let parent = &mut self.nodes[step.node];
            parent.set_cell(column, step.row, longest);
            (was, now, child) = (known, longest, step.node);
        }
    }

    /// A hole that grows or is cut may come to start past the next leaf's
    /// divide, which may be lower than that leaf's first hole. It is raised.
    fn reach_up(&mut self, path: &Path, start: u64) {
        if path.row() + 1 < self.nodes[path.leaf()].rows() {
            return;
        }
        for step in path.steps().rev() {
            let (node, next) = (&mut self.nodes[step.node], step.row + 1);
            if next < node.rows() {
                if node.starts()[next] <= start {
                    node.set_start(next, start + 1);
                }
                return;
            }
        }
    }

    /// The first hole of a leaf may come to start below the leaf's divide.
    fn reach_down(&mut self, path: &Path, start: u64) {
        if path.row() > 0 {
            return;
        }
        for step in path.steps().rev() {
            if step.row > 0 {
                let (node, row) = (&mut self.nodes[step.node], step.row);
                if node.starts()[row] > start {
                    node.set_start(row, start);
                }
                return;
            }
        }
    }
}

/// Keeping the tree in shape. The holes stay what they are, so that nothing
/// above the nodes that are split or joined needs to be looked at.
impl Holes {
    /// Splits full nodes from the top down until the leaf at `path` has room.
    fn make_room(&mut self, path: &mut Path) {
        if !self.nodes[path.leaf()].is_full() {
            return;
        }
        let has_room = |node: usize| !self.nodes[node].is_full();
        let roomy = path.steps().rposition(|step| has_room(step.node));
        let top = roomy.unwrap_or_else(|| {
            self.grow();
            path.push_root(self.root);
            0
        });
        for depth in top..self.height {
            self.split_below(path, depth);
        }
    }

    fn grow(&mut self) {
        let mut root = Node::branch(self.shifts.len() - 1);
        root.insert_child(0, 0, self.root);
        self.root = self.settle_in(root);
        self.height += 1;
        self.measure(self.root, 0);
    }

    /// Splits the child on the path; the path goes on to where it went.
    fn split_below(&mut self, path: &mut Path, depth: usize) {
        let Step { node, row } = path.step(depth);
        let is_leaf = depth + 1 == self.height;
        // What is filled from the low end up, as at first all is, stays dense.
        let keep = match is_leaf && path.row() == FULL {
            true => FULL - FEW,
            false => FULL / 2,
        };
        let child = self.nodes[node].child(row);
        let upper = self.nodes[child].split(keep);
        let kept = self.nodes[child].rows();
        let divide = upper.starts()[0];
        let new = self.settle_in(upper);
        self.nodes[node].insert_child(row + 1, divide, new);
        self.measure(node, row);
        self.measure(node, row + 1);
        if !is_leaf {
            let below = path.step(depth + 1).row;
            if below >= kept {
                path.set(depth, node, row + 1);
                path.set(depth + 1, new, below - kept);
            }
        } else if path.row() > kept {
            // What is inserted at the divide lies below it and stays here.
            path.set(depth, node, row + 1);
            *path = path.to(new, path.row() - kept);
        }
    }

    /// Fills up nodes that have become too empty, from the leaf at `path` on
    /// upwards.
    fn mend(&mut self, path: &Path) {
        let mut child = path.leaf();
        for step in path.steps().rev() {
            if self.nodes[child].rows() >= FEW {
                return;
            }
            self.even_out(step.node, step.row.saturating_sub(1));
            child = step.node;
        }
        if self.height > 0 && self.nodes[self.root].rows() == 1 {
            let old = self.root;
            self.root = self.nodes[old].child(0);
            self.height -= 1;
            self.retire(old);
        }
    }

    /// Evens out the children in `row` and the row after it.
    fn even_out(&mut self, parent: usize, row: usize) {
        let (left, right) = (
            self.nodes[parent].child(row),
            self.nodes[parent].child(row + 1),
        );
        let divide = self.nodes[parent].starts()[row + 1];
        let [low, high] = self
            .nodes
            .get_disjoint_mut([left, right])
            .expect("children are different nodes");
        low.even_out(high, divide);
        let divide = high.starts().first().copied();
        self.measure(parent, row);
        match divide {
            Some(divide) => {
                self.nodes[parent].set_start(row + 1, divide);
                self.measure(parent, row + 1);
            }
            None => {
                self.nodes[parent].remove(row + 1);
                self.retire(right);
            }
        }
    }

    /// Writes down the longest holes and the classes of the child in `row`.
    fn measure(&mut self, node: usize, row: usize) {
        let child = self.nodes[node].child(row);
        let classes = self.nodes[child].all_classes();
        self.nodes[node].set_classes(row, classes);
        for column in 0..self.shifts.len() {
            let longest = self.longest(child, column);
            self.nodes[node].set_cell(column, row, longest);
        }
    }

    fn settle_in(&mut self, node: Node) -> usize {
        if let Some(place) = self.spare.pop() {
            self.nodes[place] = node;
            return place;
        }
        self.nodes.push(node);
        self.nodes.len() - 1
    }

    fn retire(&mut self, node: usize) {
        self.nodes[node] = Node::leaf();
        self.spare.push(node);
    }
}

/// Building from sorted runs. Nodes are filled to three quarters, so that the
/// first change does not split them.
impl Holes {
    fn leaves_of(&mut self, rows: &[Hole]) -> Vec<(u64, usize)> {
        let leaf = |rows: &[Hole]| {
            let mut leaf = Node::leaf();
            for (at, (start, len)) in rows.iter().enumerate() {
                leaf.insert_hole(at, *start, *len);
            }
            (rows[0].0, self.settle_in(leaf))
        };
        shares(rows).map(leaf).collect()
    }

    fn branches_over(&mut self, level: &[(u64, usize)]) -> Vec<(u64, usize)> {
        let branch = |children: &[(u64, usize)]| {
            let mut branch = Node::branch(0);
            for (at, (divide, child)) in children.iter().enumerate() {
                branch.insert_child(at, *divide, *child);
            }
            let place = self.settle_in(branch);
            (0..children.len()).for_each(|row| self.measure(place, row));
            (children[0].0, place)
        };
        shares(level).map(branch).collect()
    }
}

/// Cuts into parts of about three quarters of a node, none of them small.
fn shares<T>(all: &[T]) -> impl Iterator<Item = &[T]> {
    let parts = all.len().div_ceil(FULL * 3 / 4);
    let bound = move |part: usize| part * all.len() / parts;
    (0..parts).map(move |part| &all[bound(part)..bound(part + 1)])
}

fn joined(runs: impl Iterator<Item = Hole>) -> Vec<Hole> {
    let mut rows: Vec<Hole> = Vec::with_capacity(runs.size_hint().0);
    for (start, len) in runs {
        end_of((start, len));
        match rows.last_mut() {
            Some(last) if end_of(*last) >= start => {
                assert_eq!(end_of(*last), start, "runs are sorted and disjoint");
                last.1 += len;
            }
            _ => rows.push((start, len)),
        }
    }
    rows
}

/// One past the last granule of a run.
///
/// # Panics
/// If the run is empty or leaves 2^63. Below that no sum here overflows.
fn end_of((start, len): Hole) -> u64 {
    let end = start.checked_add(len).expect("a run inside of 2^63");
    assert!(len > 0 && end <= 1 << 63, "a run inside of 2^63");
    end
}

fn align_up(granule: u64, shift: u32) -> u64 {
    let mask = (1 << shift) - 1;
    (granule + mask) & !mask
}

/// How many granules a hole offers from its first aligned one on.
fn aligned_len((start, len): Hole, shift: u32) -> u64 {
    (start + len).saturating_sub(align_up(start, shift))
}
