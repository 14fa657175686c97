//! The way from the root of the tree of holes to one row of a leaf.

/// Every node but the root has at least eight rows, so that this many branches
/// above a leaf are enough for more holes than memory can hold.
pub(super) const TALLEST: usize = 12;

/// A branch, and the row of it that was followed.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Step {
    pub(super) node: u32,
    pub(super) row: u32,
}

/// Good until the shape of the tree changes.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Path {
    steps: [Step; TALLEST],
    height: usize,
    pub(super) leaf: usize,
    /// May be one past the last row: where a hole would be inserted.
    pub(super) row: usize,
}

impl Step {
    pub(super) fn node(self) -> usize {
        self.node as usize
    }

    pub(super) fn row(self) -> usize {
        self.row as usize
    }
}

impl Path {
    pub(super) fn push(&mut self, node: usize, row: usize) {
        self.steps[self.height] = Step::new(node, row);
        self.height += 1;
    }

    pub(super) fn pop(&mut self) -> Option<Step> {
        self.height = self.height.checked_sub(1)?;
        Some(self.steps[self.height])
    }

    /// The same branches, and below them that row.
    pub(super) fn to(self, leaf: usize, row: usize) -> Path {
        Path { leaf, row, ..self }
    }

    /// From the root down.
    pub(super) fn steps(&self) -> &[Step] {
        &self.steps[..self.height]
    }

    pub(super) fn set(&mut self, depth: usize, node: usize, row: usize) {
        self.steps[depth] = Step::new(node, row);
    }

    /// Above all: the tree has grown.
    pub(super) fn push_root(&mut self, node: usize) {
        self.steps.copy_within(0..self.height, 1);
        self.height += 1;
        self.set(0, node, 0);
    }
}

impl Step {
    fn new(node: usize, row: usize) -> Step {
        Step {
            node: u32::try_from(node).expect("fewer nodes than 2^32"),
            row: u32::try_from(row).expect("fewer rows than 2^32"),
        }
    }
}
