#!/usr/bin/env bash
# Everything about helm/domaind that can be checked without a cluster, one line for each thing.
#
#   tests/chart.sh            checks
#   tests/chart.sh --update   first writes anew what is generated: README.md and examples/*/rendered
#
# Needs Python 3.11 and npm; what else it needs it installs below target/ci. The rendered configurations are read by
# the real daemon: DOMAIND_BIN, else the one that deploy/image has built, else one that is built now.
set -euo pipefail
cd -- "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/.."

ci=$PWD/target/ci
venv=$ci/chart-venv
node=$ci/chart-node
readme_generator=2.7.2
wanted=tests/chart/requirements.txt
export PIP_CACHE_DIR=${PIP_CACHE_DIR:-$ci/pip-cache} PIP_DISABLE_PIP_VERSION_CHECK=1
export PYTHONDONTWRITEBYTECODE=1

domaind=${DOMAIND_BIN:-}
# Nothing of the caller's own domaind decides what the daemon says of a configuration.
for variable in "${!DOMAIND_@}"; do unset "$variable"; done

installed() {
    cmp -s <("$venv/bin/python" -m pip freeze 2>/dev/null | sort) <(grep -v '^#' "$wanted" | sort)
}

if ! installed; then
    echo "installing the packages of $wanted"
    python3 -m venv --clear "$venv"
    "$venv/bin/python" -m pip install --quiet --requirement="$wanted"
    installed || { echo "$wanted is not what pip installs" >&2; exit 1; }
fi

generator=$node/node_modules/.bin/readme-generator
if [[ $("$generator" --version 2>/dev/null) != "Version: $readme_generator" ]]; then
    echo "installing readme-generator $readme_generator"
    npm install "@bitnami/readme-generator-for-helm@$readme_generator" --prefix "$node" \
        --cache "${npm_config_cache:-$ci/npm-cache}" --no-save --ignore-scripts --no-audit --no-fund \
        --no-update-notifier --loglevel error
fi

if [[ -z $domaind ]]; then
    domaind=target/image/rootfs/usr/bin/domaind
    if [[ ! -x $domaind ]]; then
        cargo build --locked -p domaind-server
        domaind=${CARGO_TARGET_DIR:-target}/debug/domaind
    fi
fi

exec "$venv/bin/python" tests/chart/check.py --readme-generator "$generator" --domaind "$domaind" "$@"
