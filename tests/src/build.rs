//! The daemon that a program of these tests measures or storms, built as that
//! program was.

use std::env;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, ensure};

/// Builds `domaind` into the directory where this program lies: `cargo run` of
/// this crate builds only what it runs. Nothing is done if it is up to date.
pub fn domaind() -> anyhow::Result<()> {
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
        .args([
            "build",
            "--quiet",
            "--locked",
            "--package",
            "domaind-server",
            "--bin",
            "domaind",
        ])
        .args(["--profile", profile])
        .arg("--target-dir")
        .arg(target)
        .current_dir(workspace)
        .stdin(Stdio::null())
        // Standard output is for the result.
        .stdout(Stdio::null())
        .status()
        .context("cargo, which is to build domaind")?;
    ensure!(built.success(), "domaind cannot be built: {built}");
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
