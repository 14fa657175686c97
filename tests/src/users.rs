//! Other users. Tests that need one run it for real as root, and check what
//! the daemon promises about peers of its own user else.

/// Who runs the tests.
#[must_use]
pub fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// Effective user of this process.
#[must_use]
pub fn own_uid() -> u32 {
    rustix::process::geteuid().as_raw()
}

/// Somebody without any right here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct User {
    /// Real and effective user.
    pub uid: u32,
    /// Real and effective group, and the only one.
    pub gid: u32,
}

/// The group that may connect to the public sockets of [`crate::Node::shared`].
pub const CLIENT_GID: u32 = 12345;
/// One stranger.
pub const ALICE: User = User {
    uid: 12345,
    gid: CLIENT_GID,
};
/// Another one.
pub const BOB: User = User {
    uid: 65533,
    gid: CLIENT_GID,
};
