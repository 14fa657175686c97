#!/usr/bin/env bash
# A foreign client, grpcio, against a real daemon: every service, every refusal, and a
# whole driver and device session over the fd socket in Python.
set -euo pipefail
cd -- "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/.."
source tests/python-env.sh

against_a_daemon grpcio tests/grpcio/check.py --limits-ack-timeout-ms=300
