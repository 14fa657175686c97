//! `domaind prepare-dir`: what root makes, a daemon without any right takes.

use std::fs::{self, Permissions};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, chown, symlink};
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use domaind_client::{Client, RuntimeDir};
use domaind_tests::node::{domaind, greet, without_settings};
use domaind_tests::{children, users, wait};
use rustix::process::Signal;
use tempfile::TempDir;

/// As in the image and the chart.
const UID: u32 = 65532;
const CLIENT_GID: u32 = 4242;

fn open_dir() -> TempDir {
    let dir = tempfile::Builder::new()
        .prefix("domaind-t")
        .tempdir_in("/tmp");
    let dir = dir.expect("a temporary directory");
    fs::set_permissions(dir.path(), Permissions::from_mode(0o755)).expect("chmod");
    dir
}

fn prepare_with(command: &mut Command, dir: &Path) -> Output {
    let output = command
        .arg("prepare-dir")
        .arg("--runtime-dir")
        .arg(dir)
        .args(["--uid", "65532", "--gid", "65532", "--client-gid", "4242"])
        .output();
    output.expect("it runs")
}

fn prepare(dir: &Path) -> Output {
    prepare_with(&mut domaind(), dir)
}

fn said(output: &Output) -> String {
    let both = [&output.stdout[..], &output.stderr[..]].concat();
    String::from_utf8(both).expect("text")
}

fn rights(path: &Path) -> (u32, u32, u32) {
    let meta = fs::symlink_metadata(path).expect("it is there");
    (meta.uid(), meta.gid(), meta.mode() & 0o7777)
}

fn assert_prepared(dir: &RuntimeDir) {
    assert_eq!(rights(dir.path()), (UID, UID, 0o755));
    assert_eq!(rights(&dir.public()), (UID, CLIENT_GID, 0o750));
    assert_eq!(rights(&dir.admin()), (UID, UID, 0o700));
}

/// Whoever may not give files away learns what could not be done.
fn assert_refused_to_others(dir: &Path) {
    let output = prepare(dir);
    assert!(!output.status.success());
    assert!(
        said(&output).contains("setting the owner of"),
        "{}",
        said(&output)
    );
}

#[test]
fn root_prepares_what_was_whoevers_before_and_finds_nothing_to_do_a_second_time() {
    let dir = open_dir();
    let run = RuntimeDir::new(&dir.path().join("run")).expect("short");
    if !users::is_root() {
        return assert_refused_to_others(run.path());
    }
    let made = prepare(run.path());
    assert!(made.status.success(), "{}", said(&made));
    assert_eq!(
        said(&made).matches(": made, ").count(),
        3,
        "{}",
        said(&made)
    );
    assert_prepared(&run);

    for (path, uid) in [(run.path(), 0), (&run.public(), 1), (&run.admin(), 2)] {
        chown(path, Some(uid), Some(uid)).expect("chown");
        fs::set_permissions(path, Permissions::from_mode(0o777)).expect("chmod");
    }
    fs::write(run.path().join("domaind.lock"), "1").expect("written");
    let mended = prepare(run.path());
    assert!(mended.status.success(), "{}", said(&mended));
    assert_eq!(
        said(&mended).matches(": was ").count(),
        4,
        "{}",
        said(&mended)
    );
    assert_prepared(&run);
    assert_eq!(rights(&run.path().join("domaind.lock")), (UID, UID, 0o600));

    let again = said(&prepare(run.path()));
    assert_eq!(again.matches(": is ").count(), 4, "{again}");
    assert_eq!(
        again.matches("made").count() + again.matches("was").count(),
        0,
        "{again}"
    );
}

/// An init container has no more than these.
#[test]
fn three_capabilities_are_enough() {
    let dir = open_dir();
    let run = RuntimeDir::new(&dir.path().join("run")).expect("short");
    if !users::is_root() {
        return assert_refused_to_others(run.path());
    }
    let program = children::program_for_all(dir.path(), "domaind");
    let few = || {
        let mut command = without_settings(Command::new("setpriv"));
        command.args(["--bounding-set", "-all,+chown,+fowner,+dac_override"]);
        command.arg("--inh-caps=-all").arg(&program);
        command
    };
    let made = prepare_with(&mut few(), run.path());
    assert!(made.status.success(), "{}", said(&made));
    // Now it belongs to somebody else, and root without rights is nobody.
    fs::set_permissions(run.admin(), Permissions::from_mode(0o000)).expect("chmod");
    let mended = prepare_with(&mut few(), run.path());
    assert!(mended.status.success(), "{}", said(&mended));
    assert_prepared(&run);
}

#[test]
fn a_directory_with_things_of_others_is_not_given_away() {
    let dir = open_dir();
    fs::write(dir.path().join("passwd"), "").expect("written");
    fs::create_dir(dir.path().join("link-target")).expect("made");
    symlink(dir.path().join("link-target"), dir.path().join("link")).expect("linked");
    let refused = prepare(dir.path());
    assert!(!refused.status.success());
    assert!(said(&refused).contains("holds"), "{}", said(&refused));
    assert_eq!(rights(dir.path()).0, users::own_uid());
    let refused = prepare(&dir.path().join("link"));
    assert!(
        said(&refused).contains("is a symlink"),
        "{}",
        said(&refused)
    );
    assert_eq!(rights(&dir.path().join("link-target")).0, users::own_uid());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_daemon_without_rights_serves_what_was_prepared_also_over_what_a_killed_one_left() {
    let dir = open_dir();
    let run = RuntimeDir::new(&dir.path().join("run")).expect("short");
    if !users::is_root() {
        return assert_refused_to_others(run.path());
    }
    let program = children::program_for_all(dir.path(), "domaind");
    let mut before = [0; 3];
    for round in 0..3 {
        // As an init container does, before each.
        assert!(prepare(run.path()).status.success());
        let mut child = without_settings(Command::new("setpriv"))
            .args(["--reuid=65532", "--regid=65532", "--groups=4242"])
            .args(["--bounding-set=-all", "--inh-caps=-all", "--no-new-privs"])
            .arg(&program)
            .arg("serve")
            .arg("--runtime-dir")
            .arg(run.path())
            .arg("--server-client-gid=4242")
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("setpriv is there");
        let sockets = [run.api_socket(), run.fd_socket(), run.admin_socket()];
        wait::until("sockets of its own", || {
            assert!(child.try_wait().expect("a child").is_none(), "it ended");
            let inodes = sockets
                .iter()
                .map(|path| fs::symlink_metadata(path).map_or(0, |m| m.ino()));
            inodes
                .zip(before)
                .all(|(now, then)| now != 0 && now != then)
        });
        before = [0, 1, 2].map(|k: usize| fs::symlink_metadata(&sockets[k]).expect("there").ino());
        for (path, wanted) in sockets.iter().zip([
            (UID, CLIENT_GID, 0o660),
            (UID, CLIENT_GID, 0o660),
            (UID, UID, 0o600),
        ]) {
            assert_eq!(rights(path), wanted, "{path:?}");
        }
        greet(&Client::connect(&run).await.expect("connected")).await;
        assert_prepared(&run);
        match round {
            2 => {
                children::signal(child.id(), Signal::TERM);
                let status = children::end_of(&mut child, Duration::from_secs(20));
                assert!(status.success(), "{}", children::describe(status));
                assert!(!sockets[0].exists());
            }
            _ => {
                children::kill(&mut child);
                let left = fs::symlink_metadata(&sockets[0]).expect("left behind");
                assert!(left.file_type().is_socket());
            }
        }
    }
}
