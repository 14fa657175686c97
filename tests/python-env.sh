# Sourced by the checks that are written in Python: packages, stubs, a daemon of
# its own. Needs Rust and Python 3; what else it needs it installs below target/ci.
# shellcheck shell=bash

ci=$PWD/target/ci
venv=$ci/python-venv
stubs=$ci/python-stubs
example=client/examples/python
# The second says what it needs beside the first.
wanted=("$example/requirements.txt" tests/grpcio/requirements.txt)
export PIP_CACHE_DIR=${PIP_CACHE_DIR:-$ci/pip-cache} PIP_DISABLE_PIP_VERSION_CHECK=1
export PYTHONDONTWRITEBYTECODE=1
# Nothing of the caller's own domaind decides what is checked here.
for variable in "${!DOMAIND_@}"; do unset "$variable"; done

dir= daemon= check=

# against_a_daemon NAME SCRIPT [FLAG...]: runs the script with the runtime directory
# and the pid of a fresh daemon. Exits with its status, or the daemon's.
against_a_daemon() {
    local name=$1 script=$2 status=0
    shift 2
    install_packages
    generate_stubs
    cargo build --locked -p domaind-server
    start_daemon "$name" "$@"

    # In the background, because bash hears a signal only while it waits.
    PYTHONPATH=$stubs:$example:tests/grpcio timeout --foreground --kill-after=10 300 \
        "$venv/bin/python" "$script" "$dir/run" "$daemon" </dev/null &
    check=$!
    wait "$check" || status=$?
    check=

    if [[ $status -eq 0 ]]; then
        # Unless the last check has asked it to stop.
        kill -TERM "$daemon" 2>/dev/null || true
        wait "$daemon" || status=$?
        daemon=
        [[ $status -eq 0 ]] || echo "$name: the daemon ended with status $status" >&2
    fi
    if [[ $status -ne 0 ]]; then
        echo "$name: the end of the daemon's log:" >&2
        tail -n 40 "$dir/log" >&2
    fi
    exit "$status"
}

install_packages() {
    if ! installed; then
        echo "installing the packages of ${wanted[*]}"
        python3 -m venv --clear "$venv"
        "$venv/bin/python" -m pip install --quiet "${wanted[@]/#/--requirement=}"
        installed || { echo "${wanted[*]} are not what pip installs" >&2; exit 1; }
    fi
}

installed() {
    cmp -s <("$venv/bin/python" -m pip freeze 2>/dev/null | sort) \
        <(grep -hv '^#' "${wanted[@]}" | sort)
}

generate_stubs() {
    rm -rf "$stubs"
    mkdir -p "$stubs"
    "$venv/bin/python" -m grpc_tools.protoc -I proto \
        --python_out="$stubs" --grpc_python_out="$stubs" proto/domaind/v1/*.proto
}

start_daemon() {
    local name=$1 domaind=${CARGO_TARGET_DIR:-target}/debug/domaind
    shift
    dir=$(mktemp -d "/tmp/domaind-$name.XXXXXX")
    trap finish EXIT
    trap 'exit 130' INT
    trap 'exit 143' TERM
    # A configuration of its own: a file in /etc must not decide, either.
    "$domaind" default-config >"$dir/domaind.toml"
    "$domaind" serve --config "$dir/domaind.toml" --runtime-dir "$dir/run" "$@" 2>"$dir/log" &
    daemon=$!
}

finish() {
    local pid
    # `timeout` hands a TERM on to what it started, and cannot hand on a KILL.
    [[ -z $check ]] || kill -TERM "$check" 2>/dev/null || true
    [[ -z $daemon ]] || kill -KILL "$daemon" 2>/dev/null || true
    for pid in $check $daemon; do wait "$pid" 2>/dev/null || true; done
    rm -rf "$dir"
}
