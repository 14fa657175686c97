#!/usr/bin/env bash
# The rendered chart's pods, as a node would run them: containerd's CRI, real cgroups,
# users, seccomp, probes. Needs root on Debian 12, with Rust, Python 3 and a C compiler;
# containerd and runc it installs, what else it needs comes below target/ci.
#
# DOMAIND_IMAGE_ARCHIVE is an image to test; unset, what deploy/image makes of the tree as
# it is.
set -euo pipefail
cd -- "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/.."

ci=$PWD/target/ci
venv=$ci/containers-venv
stubs=$ci/cri-stubs
programs=$ci/containers-programs
wanted=tests/containers/requirements.txt
archive=${DOMAIND_IMAGE_ARCHIVE:-}
limit_seconds=600
export PIP_CACHE_DIR=${PIP_CACHE_DIR:-$ci/pip-cache} PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONDONTWRITEBYTECODE=1
# Nothing of the caller's own domaind decides what is checked here.
for variable in "${!DOMAIND_@}"; do unset "$variable"; done

# The crate that the protos of the CRI come from. Cargo checks the crate, this the file.
cri_crate=k8s-cri
cri_version=0.11.0
cri_sha256=3dc2870f633d933739027de3c8920b265e2b7258124f6dd4729e9c75b7f7bc5c

main() {
    [[ $EUID -eq 0 ]] || { echo "containers: only root can run containers as others" >&2; exit 1; }
    install_runtime
    install_packages
    generate_stubs
    compile_programs
    if [[ -z $archive ]]; then
        deploy/image
        archive=$PWD/target/image/domaind.oci.tar
    fi
    run_checks "$@"
}

# Where something starts services the package starts the machine's own containerd, too:
# that one is not used here.
install_runtime() {
    if ! command -v containerd >/dev/null || ! command -v runc >/dev/null || ! command -v ctr >/dev/null; then
        echo "containers: installing containerd and runc"
        apt-get update -qq
        DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends containerd runc >/dev/null
    fi
}

install_packages() {
    if ! installed; then
        echo "containers: installing the packages of $wanted"
        python3 -m venv --clear "$venv"
        "$venv/bin/python" -m pip install --quiet --requirement "$wanted"
        installed || { echo "containers: $wanted is not what pip installs" >&2; exit 1; }
    fi
}

installed() {
    cmp -s <("$venv/bin/python" -m pip freeze 2>/dev/null | sort) <(grep -v '^#' "$wanted" | sort)
}

generate_stubs() {
    local proto
    proto=$(find_proto)
    if [[ -z $proto ]]; then
        # It is fetched to be looked at, whole.
        cargo info --quiet "$cri_crate@$cri_version" >/dev/null
        proto=$(find_proto)
    fi
    [[ -n $proto ]] || { echo "containers: no protos in $cri_crate $cri_version" >&2; exit 1; }
    echo "$cri_sha256  $proto" | sha256sum --quiet --check
    rm -rf "$stubs"
    mkdir -p "$stubs/cri"
    cp "$proto" "$stubs/cri/v1.proto"
    "$venv/bin/python" -m grpc_tools.protoc -I "$stubs" --python_out="$stubs" --grpc_python_out="$stubs" cri/v1.proto
}

find_proto() {
    find "${CARGO_HOME:-$HOME/.cargo}/registry/src" -path "*/$cri_crate-$cri_version/proto/v1.proto" 2>/dev/null | head -n 1
}

compile_programs() {
    local program
    mkdir -p "$programs"
    for program in pause intruder; do
        cc -O2 -Wall -Wextra -Werror -static -o "$programs/$program" "tests/containers/$program.c"
    done
}

# In a process group of its own, so that the limit and a Ctrl-C reach only Python,
# which then takes down what it started.
run_checks() {
    local status=0
    CRI_STUBS=$stubs PYTHONPATH=tests/containers PATH=$PATH:/usr/sbin:/sbin \
        timeout --foreground --kill-after=60 --signal=INT "$limit_seconds" \
        "$venv/bin/python" tests/containers/run.py --image "$archive" --programs "$programs" "$@" </dev/null || status=$?
    [[ $status -ne 124 ]] || echo "containers: out of time ($limit_seconds s)" >&2
    exit "$status"
}

main "$@"
