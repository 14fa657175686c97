#!/usr/bin/env bash
# The example client in Python against a real daemon: the example itself, and what a
# session that translates and acknowledges by frames may rely on.
set -euo pipefail
cd -- "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/.."
source tests/python-env.sh

# Long enough for a busy machine to acknowledge, short enough to wait for who does not.
# Advisory, because the daemon and the sessions here are of one user.
against_a_daemon python tests/python/check.py \
    --limits-ack-timeout-ms=2000 --policy-advisory-read-only=true
