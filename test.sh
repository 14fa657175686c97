#!/usr/bin/env bash
# Builds the programs and runs every test. Needs nothing but Rust.
#
#   ./test.sh                     everything
#   ./test.sh -p domain-core      one crate
#   ./test.sh set_map             tests whose names contain a word
#   ./test.sh --release           with the release profile
#
# Arguments go to `cargo test` as they are.
set -euo pipefail

# A relative target directory is meant from where the caller stands.
case "${CARGO_TARGET_DIR:-/}" in
/*) ;;
*) export CARGO_TARGET_DIR="$PWD/$CARGO_TARGET_DIR" ;;
esac
cd -- "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")"

# The tests in tests/ start the programs that lie beside them in the target
# directory, and cargo does not know: build those programs first, with what
# decides where they lie and how they are made.
build=()
packages=()
expect=
for argument in "$@"; do
    case "$expect$argument" in
    package:*) packages+=("$argument") expect= ;;
    build:*) build+=("$argument") expect= ;;
    --) break ;;
    -p | --package) expect=package: ;;
    -p*) packages+=("${argument#-p}") ;;
    --package=*) packages+=("${argument#*=}") ;;
    --profile | --target | --target-dir | --config | -j | --jobs) build+=("$argument") expect=build: ;;
    -r | --release | --profile=* | --target=* | --target-dir=* | --config=*) build+=("$argument") ;;
    -j* | --jobs=* | --offline | --frozen | -q | --quiet | -v | -vv | --verbose) build+=("$argument") ;;
    esac
done

# `--workspace` would outvote `-p`.
scope=(--workspace)
[[ ${#packages[@]} -eq 0 ]] || scope=()

if [[ ${#packages[@]} -eq 0 || " ${packages[*]} " == *" domaind-tests "* ]]; then
    cargo build --locked --workspace --bins "${build[@]}"
fi
cargo test --locked "${scope[@]}" "$@"
