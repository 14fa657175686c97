//! The way from the root of the tree of holes to one row of a leaf.

/// Every node but the root has at least seven rows, so that this many branches
/// above a leaf are enough for 2^30 holes, which is 20 GB of them.
pub(super) const TALLEST: usize = 10;

/// A branch, and the row of it that was followed.
#[derive(Clone, Copy, Debug)]
pub(super) struct Step {
    pub(super) node: usize,
    pub(super) row: usize,
}

/// Good until the shape of the tree changes. In small numbers, because paths
/// are copied a lot: all of it is one cache line.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Path {
    nodes: [u32; TALLEST],
    rows: [u8; TALLEST],
    height: u8,
    row: u8,
    leaf: u32,
}

impl Path {
    pub(super) fn leaf(&self) -> usize {
        self.leaf as usize
    }

    /// May be one past the last row: where a hole would be inserted.
    pub(super) fn row(&self) -> usize {
        usize::from(self.row)
    }

    pub(super) fn height(&self) -> usize {
        usize::from(self.height)
    }

    /// The same branches, and below them that row.
    pub(super) fn to(mut self, leaf: usize, row: usize) -> Path {
        (self.leaf, self.row) = (small_node(leaf), small_row(row));
        self
    }

    pub(super) fn push(&mut self, node: usize, row: usize) {
        let depth = self.height();
        self.height += 1;
        self.set(depth, node, row);
    }

    pub(super) fn pop(&mut self) -> Option<Step> {
        self.height = self.height.checked_sub(1)?;
        Some(self.step(self.height()))
    }

    pub(super) fn step(&self, depth: usize) -> Step {
        Step {
            node: self.nodes[depth] as usize,
            row: usize::from(self.rows[depth]),
        }
    }

    /// From the root down.
    pub(super) fn steps(&self) -> impl DoubleEndedIterator<Item = Step> + ExactSizeIterator {
        (0..self.height()).map(|depth| self.step(depth))
    }

    pub(super) fn set(&mut self, depth: usize, node: usize, row: usize) {
        (self.nodes[depth], self.rows[depth]) = (small_node(node), small_row(row));
    }

    /// Above all: the tree has grown.
    pub(super) fn push_root(&mut self, node: usize) {
        let all = 0..self.height();
        self.nodes.copy_within(all.clone(), 1);
        self.rows.copy_within(all, 1);
        self.height += 1;
        self.set(0, node, 0);
    }
}

fn small_node(node: usize) -> u32 {
    u32::try_from(node).expect("fewer nodes than 2^32")
}

fn small_row(row: usize) -> u8 {
    u8::try_from(row).expect("fewer rows than 2^8")
}
