//! The writer's side of the page table.
//!
//! # What readers see
//!
//! There is one writer at a time (`&mut self`) and any number of readers, which only load. The
//! writer never changes what a reader could misread:
//!
//! * A node is filled before it is linked. The link is one store with release semantics, of a
//!   pointer or of a root, and readers load every word with acquire semantics: who sees the link
//!   sees the node. Hence a word is never a mixture, and a path never ends in memory that was
//!   something else.
//! * Leaves appear and vanish one by one. An entry of many granules is visible in parts until the
//!   generation moves. The generation is stored last, with release: who loads generation *g* and
//!   then walks sees all of state *g*, or newer. Conversely, who has seen *g* holds nothing that was
//!   removed before *g*, provided that it dropped what it had derived.
//! * A whole tree is replaced by one store of its root: a walk that began before it ends in the old
//!   tree, whose nodes stay as they were, and one that begins later is in the new one.
//! * A node that is unlinked keeps its contents until all readers have said that they saw the
//!   generation in which it is unlinked (retired), or one after it. Only then is it zeroed and used
//!   again, so a walk that is still in it cannot be led astray. What readers say travels over a
//!   channel that orders memory: a socket, a lock.
//!
//! # Two trees
//!
//! Addresses inside the apertures have a tree of their own. Its nodes are never unlinked, except
//! where one leaf takes the place of an empty node: they are at most 1/510 of the apertures' size,
//! mappings there come and go all the time, and a mapping whose copy back failed must find the room
//! that it had. The tree of direct mappings shrinks to what it needs.

use std::sync::Arc;
use std::sync::atomic::Ordering::Release;

use super::entry::Entry;
use super::format::{Leaf, MAGIC, NODE_BITS, NODE_WORDS, Root, Slot, Word, header, slot_index};
use super::nodes::{NoRoom, Nodes, TableUsage};
use super::span::Span;
use super::words::{LoadWord, Words};
use crate::addr::{Granule, IovaRange};

/// Which tree.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Tree {
    Apertures,
    Direct,
}

/// What the granules of an entry lead to: granule `first` to `leaf`, the next one to the next in
/// the same region, and so on.
#[derive(Clone, Copy, Debug)]
pub(super) struct Run {
    pub(super) span: Span,
    pub(super) leaf: Leaf,
}

/// Something is mapped in a span that should be free.
#[derive(Debug)]
pub(super) struct Occupied;

#[derive(Debug)]
pub(super) struct Table<W> {
    nodes: Nodes<W>,
    generation: u64,
}

/// A node as [`Table::survey`] sees it, before anything is built.
#[derive(Clone, Copy)]
enum View {
    /// To be built, empty.
    Absent,
    /// To be built above a root that does not reach far enough: that root will be its only child.
    Above(Root),
    Node(u32),
}

impl<W: Words> Table<W> {
    /// An empty table. The words are all zero.
    pub(super) fn new(
        words: Arc<W>,
        granule: Granule,
        apertures: Option<IovaRange>,
    ) -> Result<Table<W>, NoRoom> {
        let nodes = Nodes::new(words)?;
        let mut table = Table {
            nodes,
            generation: 0,
        };
        table.put(header::GRANULE_SHIFT, u64::from(granule.shift()));
        if let Some(range) = apertures {
            let bytes = range.len_bytes();
            table.put(header::APERTURES_START, range.start().get());
            table.put(
                header::APERTURES_BYTES,
                bytes.expect("apertures are shorter than the space"),
            );
            let root = table.extend(None, Span::of(range, granule));
            table.publish(Tree::Apertures, Some(root));
        }
        // Last: who sees it sees a table.
        table.put(header::MAGIC, MAGIC);
        Ok(table)
    }

    pub(super) fn words(&self) -> &Arc<W> {
        self.nodes.words()
    }

    pub(super) fn generation(&self) -> u64 {
        self.generation
    }

    pub(super) fn usage(&self) -> TableUsage {
        self.nodes.usage()
    }

    /// All readers have seen `generation`, or will never read again.
    pub(super) fn reclaim(&mut self, generation: u64) {
        self.nodes.reclaim(generation);
    }

    /// Ends a change: from now on readers can know that all of it is visible.
    pub(super) fn commit(&mut self) {
        self.generation += 1;
        self.put(header::GENERATION, self.generation);
    }

    /// How many nodes must be built before `span` can be mapped.
    pub(super) fn missing(&self, tree: Tree, span: Span) -> Result<usize, Occupied> {
        if let Some(node) = self.around(tree, span) {
            let mut places = places(span);
            let is_free = places.all(|place| self.nodes.word(node, place).is_empty());
            return if is_free { Ok(0) } else { Err(Occupied) };
        }
        self.missing_below(self.root(tree), span)
    }

    /// Makes sure that so many nodes can be built. Readers see nothing of it.
    pub(super) fn ensure(&mut self, nodes: usize) -> Result<(), NoRoom> {
        self.nodes.ensure(nodes)
    }

    /// Maps a run; the nodes that [`Table::missing`] counts are there.
    pub(super) fn fill(&mut self, tree: Tree, run: Run) {
        if let Some(node) = self.around(tree, run.span) {
            for granule in run.span.first..=run.span.last {
                self.nodes.set(node, slot_index(granule), run.word(granule));
            }
            return;
        }
        self.build(tree, run.span, Some(run));
    }

    /// Builds the nodes that a run needs and leaves them empty: filling it needs no more room.
    pub(super) fn prepare(&mut self, tree: Tree, span: Span) {
        self.build(tree, span, None);
    }

    /// Unmaps all granules of a span, and unlinks what is prepared there. Entries are never cut: it begins and ends where runs do.
    pub(super) fn clear(&mut self, tree: Tree, span: Span) {
        if tree == Tree::Apertures
            && let Some(node) = self.around(tree, span)
        {
            places(span).for_each(|place| self.nodes.set(node, place, Word::EMPTY));
            return;
        }
        let Some(root) = self.root(tree) else { return };
        self.clear_below(tree, root.node, root.shift(), span);
        if tree == Tree::Direct {
            self.shrink(root);
        }
    }

    /// Builds a tree aside that readers do not see. The runs ascend and do not touch each other.
    pub(super) fn build_aside(
        &mut self,
        runs: impl Iterator<Item = Run>,
    ) -> Result<Option<Root>, NoRoom> {
        let mut root = None;
        let mut lowest = None;
        for run in runs {
            // Most runs of a large table follow one another in the same node.
            if let Some(node) = lowest.filter(|lowest: &Root| lowest.covers_all(run.span)) {
                self.fill_below(node.node, node.shift(), run.span, Some(run));
                continue;
            }
            let want = self.missing_below(root, run.span);
            let want = want.expect("runs do not touch each other");
            if let Err(no_room) = self.nodes.ensure(want) {
                self.take_down(root, Nodes::give_back);
                return Err(no_room);
            }
            root = Some(self.build_below(root, run.span, Some(run)));
            lowest = self.lowest(root, run.span.last);
        }
        Ok(root)
    }

    /// Puts a tree that was built aside in place of the present one.
    pub(super) fn replace(&mut self, tree: Tree, root: Option<Root>) {
        let old = self.root(tree);
        self.publish(tree, root);
        let next = self.generation + 1;
        self.take_down(old, |nodes, node| nodes.retire(node, next));
    }
}

impl<W: Words> Table<W> {
    fn put(&mut self, place: usize, value: u64) {
        self.words().store(place, value, Release);
    }

    fn root(&self, tree: Tree) -> Option<Root> {
        Root::from_bits(self.words().words()[root_place(tree)].load_acquire())
    }

    fn publish(&mut self, tree: Tree, root: Option<Root>) {
        self.put(root_place(tree), Root::bits(root));
    }

    /// The lowest node around all of a span, if there is one and more is in it: most spans are short,
    /// and need nothing but its words. Where such a node is, no leaf of a higher one is.
    #[inline]
    fn around(&self, tree: Tree, span: Span) -> Option<u32> {
        let root = self.root(tree).filter(|root| root.covers_all(span));
        let lowest = self.lowest(root, span.first)?;
        let is_part = lowest.covers_all(span) && span.granules() < NODE_WORDS as u64;
        is_part.then_some(lowest.node)
    }

    /// As `missing`, below any root.
    fn missing_below(&self, root: Option<Root>, span: Span) -> Result<usize, Occupied> {
        let Some(root) = root else {
            let height = span.common_height(span);
            return Ok(1 + self.survey(View::Absent, height * NODE_BITS, span)?);
        };
        let height = height_over(root, span);
        let above = height - root.height;
        let top = if above == 0 {
            View::Node(root.node)
        } else {
            View::Above(root)
        };
        Ok(above as usize + self.survey(top, height * NODE_BITS, span)?)
    }

    /// As `missing_below`, below a node that stands for `1 << shift` granules.
    fn survey(&self, view: View, shift: u32, span: Span) -> Result<usize, Occupied> {
        let shift = shift - NODE_BITS;
        let mut missing = 0;
        for part in span.slots(shift) {
            match self.child(view, part.slot, shift)? {
                View::Absent if part.whole => {}
                child @ View::Absent => missing += 1 + self.survey(child, shift, part.span)?,
                child if part.whole => self.expect_empty(child)?,
                child => missing += self.survey(child, shift, part.span)?,
            }
        }
        Ok(missing)
    }

    /// What is, or will be, in a slot of `view` that stands for `1 << shift` granules.
    #[inline]
    fn child(&self, view: View, slot: u64, shift: u32) -> Result<View, Occupied> {
        match view {
            View::Absent => Ok(View::Absent),
            View::Above(root) if slot != root.prefix >> (shift - root.shift()) => Ok(View::Absent),
            View::Above(root) if shift == root.shift() => Ok(View::Node(root.node)),
            View::Above(root) => Ok(View::Above(root)),
            View::Node(node) => match self.nodes.word(node, slot_index(slot)).slot() {
                Slot::Empty => Ok(View::Absent),
                Slot::Node(child) => Ok(View::Node(child)),
                Slot::Leaf(_) => Err(Occupied),
            },
        }
    }

    fn expect_empty(&self, view: View) -> Result<(), Occupied> {
        match view {
            View::Node(node) if !self.maps_anything(node) => Ok(()),
            _ => Err(Occupied),
        }
    }

    /// Is there a leaf below this node?
    fn maps_anything(&self, node: u32) -> bool {
        let slots = || (0..NODE_WORDS).map(|place| self.nodes.word(node, place).slot());
        self.nodes.filled(node) > 0
            && slots().any(|slot| match slot {
                Slot::Empty => false,
                Slot::Leaf(_) => true,
                Slot::Node(child) => self.maps_anything(child),
            })
    }

    /// Builds what is missing for a span in a tree that readers see, and maps the run, if given.
    fn build(&mut self, tree: Tree, span: Span, run: Option<Run>) {
        let old = self.root(tree);
        let root = self.build_below(old, span, run);
        if old != Some(root) {
            self.publish(tree, Some(root));
        }
    }

    /// As `build`; answers the root to publish.
    fn build_below(&mut self, root: Option<Root>, span: Span, run: Option<Run>) -> Root {
        let root = self.extend(root, span);
        self.fill_below(root.node, root.shift(), span, run);
        root
    }

    /// A root that reaches over `span`, above the one that there is.
    fn extend(&mut self, root: Option<Root>, span: Span) -> Root {
        let Some(mut root) = root else {
            let height = span.common_height(span);
            let prefix = span.first >> (height * NODE_BITS);
            let node = self.nodes.take();
            return Root {
                node,
                height,
                prefix,
            };
        };
        let height = height_over(root, span);
        while root.height < height {
            let node = self.nodes.take();
            let place = slot_index(root.prefix);
            self.nodes.set(node, place, Word::pointer(root.node));
            root = Root {
                node,
                height: root.height + 1,
                prefix: root.prefix >> NODE_BITS,
            };
        }
        root
    }

    /// The node of height 1 around a granule, if there is one, as the root of what is below it.
    fn lowest(&self, root: Option<Root>, granule: u64) -> Option<Root> {
        let mut root = root?;
        while root.height > 1 {
            let height = root.height - 1;
            let prefix = granule >> (height * NODE_BITS);
            let node = self
                .nodes
                .word(root.node, slot_index(prefix))
                .as_pointer()?;
            root = Root {
                node,
                height,
                prefix,
            };
        }
        Some(root)
    }

    fn fill_below(&mut self, node: u32, shift: u32, span: Span, run: Option<Run>) {
        let shift = shift - NODE_BITS;
        for part in span.slots(shift) {
            match run {
                Some(run) if part.whole => {
                    self.put_leaf(node, part.place, run.word(part.span.first))
                }
                None if part.whole => {}
                _ => self.fill_child(node, part.place, shift, part.span, run),
            }
        }
    }

    fn put_leaf(&mut self, node: u32, place: usize, leaf: Word) {
        let old = self.nodes.word(node, place);
        self.nodes.set(node, place, leaf);
        if let Some(child) = old.as_pointer() {
            self.retire_below(child);
        }
    }

    fn fill_child(&mut self, node: u32, place: usize, shift: u32, span: Span, run: Option<Run>) {
        if let Some(child) = self.nodes.word(node, place).as_pointer() {
            return self.fill_below(child, shift, span, run);
        }
        let child = self.nodes.take();
        self.fill_below(child, shift, span, run);
        self.nodes.set(node, place, Word::pointer(child));
    }

    fn clear_below(&mut self, tree: Tree, node: u32, shift: u32, span: Span) {
        let shift = shift - NODE_BITS;
        for part in span.slots(shift) {
            match self.nodes.word(node, part.place).slot() {
                Slot::Empty => {}
                Slot::Leaf(_) => {
                    assert!(part.whole, "entries are never cut");
                    self.nodes.set(node, part.place, Word::EMPTY);
                }
                Slot::Node(child) => {
                    self.clear_below(tree, child, shift, part.span);
                    if tree == Tree::Direct && self.nodes.filled(child) == 0 {
                        self.nodes.set(node, part.place, Word::EMPTY);
                        self.retire(child);
                    }
                }
            }
        }
    }

    /// Makes the tree as low as it can be.
    fn shrink(&mut self, old: Root) {
        let mut root = old;
        while let Some(lower) = self.only_child(root) {
            self.retire(root.node);
            root = lower;
        }
        if self.nodes.filled(root.node) == 0 {
            self.retire(root.node);
            self.publish(Tree::Direct, None);
        } else if root != old {
            self.publish(Tree::Direct, Some(root));
        }
    }

    /// The node below `root` if that holds nothing else.
    fn only_child(&self, root: Root) -> Option<Root> {
        if root.height == 1 || self.nodes.filled(root.node) != 1 {
            return None;
        }
        let word = |place: &usize| self.nodes.word(root.node, *place);
        let place = (0..NODE_WORDS).find(|place| !word(place).is_empty())?;
        Some(Root {
            node: word(&place).as_pointer()?,
            height: root.height - 1,
            prefix: root.prefix << NODE_BITS | place as u64,
        })
    }

    fn retire(&mut self, node: u32) {
        self.nodes.retire(node, self.generation + 1);
    }

    /// Retires a node and all below it.
    fn retire_below(&mut self, node: u32) {
        let next = self.generation + 1;
        let mut retire = |nodes: &mut Nodes<W>, node| nodes.retire(node, next);
        self.take_down_below(node, &mut retire);
    }

    /// Gives every node of a tree to `done`.
    fn take_down(&mut self, root: Option<Root>, mut done: impl FnMut(&mut Nodes<W>, u32)) {
        if let Some(root) = root {
            self.take_down_below(root.node, &mut done);
        }
    }

    fn take_down_below(&mut self, node: u32, done: &mut impl FnMut(&mut Nodes<W>, u32)) {
        if self.nodes.filled(node) > 0 {
            for place in 0..NODE_WORDS {
                if let Slot::Node(child) = self.nodes.word(node, place).slot() {
                    self.take_down_below(child, done);
                }
            }
        }
        done(&mut self.nodes, node);
    }
}

impl<W: Words> Table<W> {
    /// Checks the trees and the nodes. Answers how many granules are mapped in each tree.
    pub(super) fn check_invariants(&self) -> [u64; 2] {
        let mut used = Vec::new();
        let granules = [Tree::Apertures, Tree::Direct].map(|tree| {
            let Some(root) = self.root(tree) else {
                return 0;
            };
            if tree == Tree::Direct {
                assert!(
                    self.only_child(root).is_none(),
                    "no tree is higher than it must be"
                );
            }
            self.check_below(tree, root.node, root.shift(), &mut used)
        });
        self.nodes.check_invariants(&used);
        granules
    }

    fn check_below(&self, tree: Tree, node: u32, shift: u32, used: &mut Vec<u32>) -> u64 {
        used.push(node);
        let shift = shift
            .checked_sub(NODE_BITS)
            .expect("no tree is deeper than its root says");
        let words = (0..NODE_WORDS).map(|place| self.nodes.word(node, place));
        let filled = words.clone().filter(|word| !word.is_empty()).count();
        assert_eq!(
            filled,
            usize::from(self.nodes.filled(node)),
            "node {node} is counted"
        );
        assert!(
            filled > 0 || tree == Tree::Apertures,
            "node {node} is of use"
        );
        words
            .map(|word| match word.slot() {
                Slot::Empty => 0,
                Slot::Leaf(_) => 1 << shift,
                Slot::Node(child) => self.check_below(tree, child, shift, used),
            })
            .sum()
    }
}

impl Run {
    /// The granules that an entry touches. Its offset is not checked.
    pub(super) fn of(entry: &Entry, granule: Granule) -> Run {
        let leaf = Leaf {
            region: entry.target.region,
            offset_granules: entry.target.offset_bytes >> granule.shift(),
            perm: entry.perm,
        };
        let span = Span::of(entry.range, granule);
        Run { span, leaf }
    }

    /// The leaf word for the slot that begins with `granule`.
    fn word(&self, granule: u64) -> Word {
        let offset_granules = self.leaf.offset_granules + (granule - self.span.first);
        Word::leaf(Leaf {
            offset_granules,
            ..self.leaf
        })
    }
}

/// Where the granules of a span have their words, in the lowest node around it.
fn places(span: Span) -> impl Iterator<Item = usize> {
    (span.first..=span.last).map(slot_index)
}

/// How high a tree must be to hold `span` and what it holds now.
fn height_over(root: Root, span: Span) -> u32 {
    if root.covers_all(span) {
        return root.height;
    }
    let first = root.prefix << root.shift();
    let last = first | ((1 << root.shift()) - 1);
    span.common_height(Span { first, last })
}

fn root_place(tree: Tree) -> usize {
    match tree {
        Tree::Apertures => header::APERTURES_ROOT,
        Tree::Direct => header::DIRECT_ROOT,
    }
}
