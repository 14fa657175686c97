#!/usr/bin/env bash
# A foreign client, PyPI's grpcio, against a real daemon: every service, every
# refusal, and a whole driver and device session over the fd socket in Python.
# Needs Rust and Python 3; what else it needs it installs below target/ci.
set -euo pipefail
cd -- "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/.."

ci=$PWD/target/ci
venv=$ci/grpcio-venv
stubs=$ci/grpcio-stubs
wanted=tests/grpcio/requirements.txt
export PIP_CACHE_DIR=${PIP_CACHE_DIR:-$ci/pip-cache} PIP_DISABLE_PIP_VERSION_CHECK=1
export PYTHONDONTWRITEBYTECODE=1
# Nothing of the caller's own domaind decides what is checked here.
for variable in "${!DOMAIND_@}"; do unset "$variable"; done

installed() {
    cmp -s <("$venv/bin/python" -m pip freeze 2>/dev/null) <(grep -v '^#' "$wanted")
}

if ! installed; then
    echo "installing the packages of $wanted"
    python3 -m venv --clear "$venv"
    "$venv/bin/python" -m pip install --quiet -r "$wanted"
    installed || { echo "grpcio: $wanted is not what pip installs" >&2; exit 1; }
fi

rm -rf "$stubs"
mkdir -p "$stubs"
"$venv/bin/python" -m grpc_tools.protoc -I proto \
    --python_out="$stubs" --grpc_python_out="$stubs" proto/domaind/v1/*.proto

cargo build --locked -p domaind-server
domaind=${CARGO_TARGET_DIR:-target}/debug/domaind

dir=$(mktemp -d /tmp/domaind-grpcio.XXXXXX)
daemon= check=
finish() {
    local pid
    # `timeout` hands a TERM on to what it started, and cannot hand on a KILL.
    [[ -z $check ]] || kill -TERM "$check" 2>/dev/null || true
    [[ -z $daemon ]] || kill -KILL "$daemon" 2>/dev/null || true
    for pid in $check $daemon; do wait "$pid" 2>/dev/null || true; done
    rm -rf "$dir"
}
trap finish EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

# A configuration of its own: a file in /etc must not decide, either.
"$domaind" default-config >"$dir/domaind.toml"
"$domaind" serve --config "$dir/domaind.toml" --runtime-dir "$dir/run" --limits-ack-timeout-ms 300 2>"$dir/log" &
daemon=$!

# In the background, because bash hears a signal only while it waits.
PYTHONPATH=$stubs timeout --foreground --kill-after=10 300 \
    "$venv/bin/python" tests/grpcio/check.py "$dir/run" "$daemon" </dev/null &
check=$!
status=0
wait "$check" || status=$?
check=

if [[ $status -eq 0 ]]; then
    # The last check has asked the daemon to stop.
    wait "$daemon" || status=$?
    daemon=
    [[ $status -eq 0 ]] || echo "grpcio: the daemon ended with status $status" >&2
fi
if [[ $status -ne 0 ]]; then
    echo "grpcio: the end of the daemon's log:" >&2
    tail -n 40 "$dir/log" >&2
fi
exit "$status"
