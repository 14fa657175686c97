//! What a program of these tests measures or storms, built as that program was.

use std::env;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, ensure};

/// Builds `domaind` into the directory where this program lies: `cargo run` of
/// this crate builds only what it runs. Nothing is done if it is up to date.
pub fn domaind() -> anyhow::Result<()> {
    build(["--package", "domaind-server", "--bin", "domaind"])
}

/// Builds the program that counts allocations in the same way; where it is then.
pub fn allocations() -> anyhow::Result<PathBuf> {
    build(["--package", "domainctl", "--example", "allocations"])?;
    let me = env::current_exe().context("the path of this program")?;
    Ok(me.with_file_name("examples").join("allocations"))
}

fn build(what: [&str; 4]) -> anyhow::Result<()> {
    let me = env::current_exe().context("the path of this program")?;
    let dir = me.parent().context("a program lies somewhere")?;
    let profile = match dir.file_name().and_then(|name| name.to_str()) {
        Some("debug") | None => "dev",
        Some(name) => name,
    };
    let target = dir.parent().context("a profile's directory lies in one")?;
    let cargo = env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let built = Command::new(cargo)
        .args(["build", "--quiet", "--locked"])
        .args(what)
        .args(["--profile", profile])
        .arg("--target-dir")
        .arg(target)
        .current_dir(workspace)
        .stdin(Stdio::null())
        // Standard output is for the result.
        .stdout(Stdio::null())
        .status()
        .with_context(|| format!("cargo, which is to build {}", what[3]))?;
    ensure!(built.success(), "{} cannot be built: {built}", what[3]);
    Ok(())
}

/// Says clearly that it is not there.
pub fn check() -> anyhow::Result<()> {
    let me = env::current_exe().context("the path of this program")?;
    let domaind = me.with_file_name("domaind");
    ensure!(
        domaind.is_file(),
        "{} is not there: build it first",
        domaind.display()
    );
    Ok(())
}
