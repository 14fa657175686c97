//! Names with `*` (anything, nothing included) and `?` (one character) in them.

use std::fmt;

/// A pattern that a whole name has to fit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Glob(String);

impl Glob {
    /// Every text is a pattern; who may write which is for the caller to say.
    pub(crate) fn new(pattern: &str) -> Glob {
        Glob(pattern.to_owned())
    }

    /// In a time that is bounded by the product of the two lengths: only the
    /// last `*` is ever tried again.
    pub(crate) fn matches(&self, name: &str) -> bool {
        let (pattern, name) = (self.0.as_bytes(), name.as_bytes());
        let (mut at, mut here) = (0, 0);
        // Behind the last `*`, and where it was assumed to end.
        let mut star = None;
        while here < name.len() {
            match pattern.get(at) {
                Some(b'*') => {
                    at += 1;
                    star = Some((at, here));
                }
                Some(wanted) if *wanted == b'?' || *wanted == name[here] => {
                    at += 1;
                    here += 1;
                }
                _ => {
                    let Some((behind, end)) = star else {
                        return false;
                    };
                    (at, here) = (behind, end + 1);
                    star = Some((behind, end + 1));
                }
            }
        }
        pattern[at..].iter().all(|rest| *rest == b'*')
    }
}

impl fmt::Display for Glob {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pattern_fits_whole_names_only() {
        for (pattern, fits, others) in [
            ("disk-0", &["disk-0"][..], &["disk-00", "xdisk-0", ""][..]),
            ("disk-*", &["disk-", "disk-0"], &["disk", "xdisk-0"]),
            ("*", &["", "x"], &[]),
            ("**", &["", "x"], &[]),
            ("?", &["x"], &["", "xy"]),
            (
                "a*b*c",
                &["abc", "axxbbxc", "abcbc"],
                &["ab", "acb", "abcd"],
            ),
            ("*ab", &["ab", "aab", "abab"], &["abb", "b"]),
            ("a?c*", &["abc", "abcd"], &["ac", "a"]),
            ("vhost-*.service", &["vhost-0.service"], &["vhost-0.scope"]),
            ("", &[""], &["x"]),
        ] {
            let glob = Glob::new(pattern);
            for name in fits {
                assert!(glob.matches(name), "{pattern} {name}");
            }
            for name in others {
                assert!(!glob.matches(name), "{pattern} {name}");
            }
        }
    }

    #[test]
    fn many_stars_do_not_take_for_ever() {
        let glob = Glob::new(&"a*".repeat(200));
        assert!(!glob.matches(&format!("{}b", "a".repeat(150))));
        assert!(glob.matches(&"a".repeat(4000)));
    }
}
