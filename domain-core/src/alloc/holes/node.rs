//! A node of the tree of holes: a short sorted table.
//!
//! Leaves and branches are the same table of (start, length). In a leaf a row
//! is a hole. In a branch a row stands for a child: `start` divides it from the
//! child before, and `len` is the longest hole below it. What only branches
//! have hangs off them in a box, so that the many leaves stay small.

use super::class::class_of;

/// Rows of a full node: as many as make it eight cache lines.
pub(super) const FULL: usize = 28;

/// Rows below which a node that is not the root is filled up from a neighbour.
/// A quarter and not a half, so that a node that was just split or joined is
/// far from being joined or split again.
pub(super) const FEW: usize = FULL / 4;

/// One value a row.
pub(super) type Column = [u64; FULL];

/// The order of the fields is kept and begins on a cache line, so that a search
/// touches four of them, at once.
#[derive(Debug)]
#[repr(C, align(64))]
pub(super) struct Node {
    rows: usize,
    branch: Option<Box<Branch>>,
    starts: Column,
    lens: Column,
    /// In a leaf, the class of each row. Eight are looked at at once.
    bins: [u8; BINS],
}

/// Whole words of bins for all rows.
const BINS: usize = FULL.next_multiple_of(8);

/// What a branch has beside its table.
#[derive(Debug)]
struct Branch {
    children: [u32; FULL],
    /// The classes of the holes below each child.
    classes: Column,
    /// For each alignment ever asked for, the longest aligned hole per child.
    aligned: Vec<Column>,
}

impl Node {
    pub(super) fn leaf() -> Node {
        Node {
            rows: 0,
            starts: [0; FULL],
            lens: [0; FULL],
            bins: [0; BINS],
            branch: None,
        }
    }

    /// A branch without children, with a column for each of so many alignments.
    pub(super) fn branch(alignments: usize) -> Node {
        let branch = Branch {
            children: [0; FULL],
            classes: [0; FULL],
            aligned: vec![[0; FULL]; alignments],
        };
        Node {
            branch: Some(Box::new(branch)),
            ..Node::leaf()
        }
    }

    pub(super) fn rows(&self) -> usize {
        self.rows
    }

    pub(super) fn is_leaf(&self) -> bool {
        self.branch.is_none()
    }

    pub(super) fn is_full(&self) -> bool {
        self.rows == FULL
    }

    pub(super) fn starts(&self) -> &[u64] {
        &self.starts[..self.rows]
    }

    pub(super) fn lens(&self) -> &[u64] {
        &self.lens[..self.rows]
    }

    pub(super) fn row(&self, at: usize) -> (u64, u64) {
        (self.starts()[at], self.lens()[at])
    }

    pub(super) fn set_hole(&mut self, at: usize, start: u64, len: u64) {
        (self.starts[at], self.lens[at]) = (start, len);
        self.bins[at] = class_of(len);
    }

    pub(super) fn set_start(&mut self, at: usize, start: u64) {
        self.starts[at] = start;
    }

    pub(super) fn child(&self, at: usize) -> usize {
        self.as_branch().children[at] as usize
    }

    /// The classes below each child.
    pub(super) fn classes(&self) -> &[u64] {
        &self.as_branch().classes[..self.rows]
    }

    pub(super) fn set_classes(&mut self, at: usize, classes: u64) {
        self.as_branch_mut().classes[at] = classes;
    }

    /// The classes of all holes here and below.
    pub(super) fn all_classes(&self) -> u64 {
        match &self.branch {
            Some(_) => self.classes().iter().fold(0, |all, below| all | below),
            None => self.bins[..self.rows]
                .iter()
                .fold(0, |all, bin| all | 1 << bin),
        }
    }

    /// The first row with a hole of that class.
    pub(super) fn class_row(&self, class: u8) -> Option<usize> {
        if self.branch.is_some() {
            let bit = 1 << class;
            return self.classes().iter().position(|below| below & bit != 0);
        }
        first_byte(&self.bins, class).filter(|row| *row < self.rows)
    }

    /// Column 0 is the plain lengths, the others are alignments.
    pub(super) fn column(&self, column: usize) -> &[u64] {
        match column {
            0 => self.lens(),
            _ => &self.as_branch().aligned[column - 1][..self.rows],
        }
    }

    pub(super) fn set_cell(&mut self, column: usize, at: usize, len: u64) {
        match column {
            0 => self.lens[at] = len,
            _ => self.as_branch_mut().aligned[column - 1][at] = len,
        }
    }

    /// Makes place for one more alignment.
    pub(super) fn add_column(&mut self) {
        self.as_branch_mut().aligned.push([0; FULL]);
    }

    /// The row of the child in which `start` belongs. What lies below every
    /// divide belongs to the first.
    pub(super) fn child_row(&self, start: u64) -> usize {
        count(self.starts(), |divide| divide <= start).saturating_sub(1)
    }

    /// How many rows start below `start`.
    pub(super) fn starts_below(&self, start: u64) -> usize {
        count(self.starts(), |hole| hole < start)
    }

    pub(super) fn insert_hole(&mut self, at: usize, start: u64, len: u64) {
        self.open(at);
        self.set_hole(at, start, len);
    }

    /// The longest holes of the child are for the caller to fill in.
    pub(super) fn insert_child(&mut self, at: usize, divide: u64, child: usize) {
        self.open(at);
        self.starts[at] = divide;
        let child = u32::try_from(child).expect("fewer nodes than 2^32");
        self.as_branch_mut().children[at] = child;
    }

    pub(super) fn remove(&mut self, at: usize) {
        self.shift(at + 1..self.rows, at);
        self.rows -= 1;
    }

    /// Takes all rows from `keep` on off into a new node.
    pub(super) fn split(&mut self, keep: usize) -> Node {
        let alignments = self.branch.as_ref().map(|branch| branch.aligned.len());
        let mut upper = alignments.map_or_else(Node::leaf, Node::branch);
        upper.copy_from(0, self, keep..self.rows);
        upper.rows = self.rows - keep;
        self.rows = keep;
        upper
    }

    /// Evens out with the node after, and leaves that empty if all fits here.
    /// `divide` is what stood between the two.
    pub(super) fn even_out(&mut self, after: &mut Node, divide: u64) {
        if after.branch.is_some() {
            // Below its first divide a branch is only bounded by its parent's.
            after.starts[0] = divide;
        }
        let all = self.rows + after.rows;
        let here = if all <= FULL * 3 / 4 { all } else { all / 2 };
        if here > self.rows {
            let moved = here - self.rows;
            self.copy_from(self.rows, after, 0..moved);
            after.shift(moved..after.rows, 0);
        } else {
            after.shift(0..after.rows, self.rows - here);
            after.copy_from(0, self, here..self.rows);
        }
        self.rows = here;
        after.rows = all - here;
    }

    fn open(&mut self, at: usize) {
        self.shift(at..self.rows, at + 1);
        self.rows += 1;
    }

    fn shift(&mut self, rows: std::ops::Range<usize>, to: usize) {
        self.starts.copy_within(rows.clone(), to);
        self.lens.copy_within(rows.clone(), to);
        self.bins.copy_within(rows.clone(), to);
        if let Some(branch) = &mut self.branch {
            branch.children.copy_within(rows.clone(), to);
            branch.classes.copy_within(rows.clone(), to);
            for column in &mut branch.aligned {
                column.copy_within(rows.clone(), to);
            }
        }
    }

    fn copy_from(&mut self, to: usize, other: &Node, rows: std::ops::Range<usize>) {
        let target = to..to + rows.len();
        self.starts[target.clone()].copy_from_slice(&other.starts[rows.clone()]);
        self.lens[target.clone()].copy_from_slice(&other.lens[rows.clone()]);
        self.bins[target.clone()].copy_from_slice(&other.bins[rows.clone()]);
        if let (Some(ours), Some(theirs)) = (&mut self.branch, &other.branch) {
            ours.children[target.clone()].copy_from_slice(&theirs.children[rows.clone()]);
            ours.classes[target.clone()].copy_from_slice(&theirs.classes[rows.clone()]);
            for (ours, theirs) in ours.aligned.iter_mut().zip(&theirs.aligned) {
                ours[target.clone()].copy_from_slice(&theirs[rows.clone()]);
            }
        }
    }

    fn as_branch(&self) -> &Branch {
        self.branch.as_ref().expect("asked of branches only")
    }

    fn as_branch_mut(&mut self) -> &mut Branch {
        self.branch.as_mut().expect("asked of branches only")
    }

    /// Bytes that hang off the node.
    pub(super) fn heap_bytes(&self) -> usize {
        self.branch.as_ref().map_or(0, |branch| {
            size_of::<Branch>() + branch.aligned.capacity() * size_of::<Column>()
        })
    }
}

/// How many of the lowest are meant. All are looked at: the comparisons of a
/// bisection would wait for each other's cache line.
fn count(starts: &[u64], is_meant: impl Fn(u64) -> bool) -> usize {
    // Wrapping, because checked sums would be as many branches.
    let add = |sum: usize, start: &u64| sum.wrapping_add(usize::from(is_meant(*start)));
    starts.iter().fold(0, add)
}

/// Where a byte stands first, found a word at a time: the lowest zero byte of
/// `word ^ wanted` is where the borrow of a subtraction begins.
fn first_byte(bytes: &[u8; BINS], byte: u8) -> Option<usize> {
    const LOW: u64 = u64::from_le_bytes([1; 8]);
    let wanted = u64::from_le_bytes([byte; 8]);
    let words = bytes.as_chunks::<8>().0.iter();
    words.enumerate().find_map(|(at, word)| {
        let differs = u64::from_le_bytes(*word) ^ wanted;
        let zeros = differs.wrapping_sub(LOW) & !differs & (LOW << 7);
        (zeros != 0).then(|| at * 8 + zeros.trailing_zeros() as usize / 8)
    })
}
