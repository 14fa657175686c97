#!/usr/bin/env bash
# What the daemon tells scrapers, read by Prometheus' own tool: the families that
# are promised are there, promtool finds nothing to say, and counters move by what
# domainctl does. Needs Rust, curl and root or promtool: it installs what is missing.
set -euo pipefail
cd -- "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/.."

target=${CARGO_TARGET_DIR:-target}/debug
# Nothing of the caller's own domaind decides what is checked here.
for variable in "${!DOMAIND_@}"; do unset "$variable"; done
dir= daemon=

fail() {
    echo "metrics: $*" >&2
    [[ -z $dir ]] || tail -n 20 "$dir/log" >&2
    exit 1
}

finish() {
    [[ -z $daemon ]] || kill -KILL "$daemon" 2>/dev/null || true
    [[ -z $daemon ]] || wait "$daemon" 2>/dev/null || true
    [[ -z $dir ]] || rm -rf "$dir"
}

# Debian starts what it installs; nothing shall run that was not running before.
install_promtool() {
    command -v promtool >/dev/null && return
    echo "installing promtool (Debian's prometheus)"
    local had_policy=
    [[ -e /usr/sbin/policy-rc.d ]] && had_policy=1
    if [[ -z $had_policy ]]; then
        printf '#!/bin/sh\nexit 101\n' >/usr/sbin/policy-rc.d
        chmod +x /usr/sbin/policy-rc.d
    fi
    local status=0
    { apt-get update -q && DEBIAN_FRONTEND=noninteractive \
        apt-get install -qy --no-install-recommends prometheus; } >"$dir/apt" 2>&1 || status=$?
    [[ -n $had_policy ]] || rm -f /usr/sbin/policy-rc.d
    [[ $status -eq 0 ]] || { cat "$dir/apt" >&2; fail "promtool cannot be installed"; }
    command -v promtool >/dev/null || fail "Debian's prometheus brought no promtool"
}

start_daemon() {
    "$target/domaind" default-config >"$dir/domaind.toml"
    "$target/domaind" serve --config "$dir/domaind.toml" --runtime-dir "$dir/run" \
        --metrics-listen "unix:$dir/metrics.sock" 2>"$dir/log" &
    daemon=$!
    for _ in {1..200}; do
        [[ $(scrape readyz 2>/dev/null) == ok ]] && return
        kill -0 "$daemon" 2>/dev/null || fail "the daemon has ended"
        sleep 0.05
    done
    fail "the daemon is not ready"
}

scrape() {
    curl --silent --show-error --fail --max-time 5 --unix-socket "$dir/metrics.sock" \
        "${@:2}" "http://domaind/$1"
}

ctl() {
    "$target/domainctl" --runtime-dir "$dir/run" "$@" >"$dir/out" 2>&1 \
        || { cat "$dir/out" >&2; fail "domainctl $*"; }
}

# value FILE SAMPLE: the sample's name with its labels, as it stands there.
value() {
    local found
    found=$(awk -v name="$2" 'index($0, name " ") == 1 { print $NF }' "$1")
    [[ -n $found ]] || fail "there is no sample $2"
    echo "$found"
}

# moved SAMPLE BY
moved() {
    local before after
    before=$(value "$dir/before" "$1")
    after=$(value "$dir/after" "$1")
    awk -v a="$after" -v b="$before" -v by="$2" 'BEGIN { exit !(a - b == by) }' \
        || fail "$1 went from $before to $after, and should have gone up by $2"
}

families=(
    "domaind_build_info gauge" "domaind_domains gauge" "domaind_regions gauge"
    "domaind_region_bytes gauge" "domaind_quota_bytes gauge" "domaind_quota_used_bytes gauge"
    "domaind_mappings gauge" "domaind_clients gauge" "domaind_ghosts gauge"
    "domaind_fenced_sessions gauge" "domaind_quarantined_bytes gauge"
    "domaind_fds_passed_total counter" "domaind_attach_total counter"
    "domaind_auth_denied_total counter" "domaind_rate_limited_total counter"
    "domaind_map_operations_total counter" "domaind_map_duration_seconds histogram"
    "domaind_bounce_copied_bytes_total counter"
    "grpc_server_handled_total counter" "grpc_server_handling_seconds histogram"
    "process_cpu_seconds_total counter" "process_resident_memory_bytes gauge"
    "process_open_fds gauge" "process_max_fds gauge" "process_start_time_seconds gauge"
)

dir=$(mktemp -d "/tmp/domaind-metrics.XXXXXX")
trap finish EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
install_promtool
command -v curl >/dev/null || fail "curl is not there"
cargo build --locked -p domaind-server -p domainctl
start_daemon

scrape metrics >"$dir/before"
ctl create domain d0 --bounce 4MiB --coherent 1MiB
ctl get domains
ctl get domains
"$target/domainctl" --runtime-dir "$dir/run" get domain none >/dev/null 2>&1 \
    && fail "a domain that is not there was found"
scrape metrics >"$dir/after"

for family in "${families[@]}"; do
    grep -qxF "# TYPE $family" "$dir/after" || fail "there is no family $family"
done
moved domaind_domains 1
moved 'domaind_region_bytes{kind="bounce"}' $((4 << 20))
moved 'domaind_regions{kind="coherent"}' 1
service='grpc_service="domaind.v1.DomainService"'
moved "grpc_server_handled_total{$service,grpc_method=\"CreateDomain\",grpc_code=\"OK\"}" 1
moved "grpc_server_handled_total{$service,grpc_method=\"ListDomains\",grpc_code=\"OK\"}" 2
[[ $(value "$dir/after" "grpc_server_handled_total{$service,grpc_method=\"GetDomain\",grpc_code=\"NOT_FOUND\"}") == 1 ]] \
    || fail "the domain that is not there was not counted"

# Sessions, maps and copies: a whole demo in one domain.
cp "$dir/after" "$dir/before"
head -c 1M /dev/urandom >"$dir/blocks"
ctl demo --calls "$dir/blocks"
scrape metrics >"$dir/after"
for sample in 'domaind_attach_total{result="granted"}' domaind_fds_passed_total \
    'domaind_map_operations_total{op="map",result="ok"}' \
    'domaind_map_duration_seconds_count{op="unmap"}' \
    'domaind_bounce_copied_bytes_total{direction="to_device"}' \
    'domaind_bounce_copied_bytes_total{direction="from_device"}'; do
    awk -v a="$(value "$dir/after" "$sample")" -v b="$(value "$dir/before" "$sample")" \
        'BEGIN { exit !(a > b) }' || fail "$sample has not moved"
done

promtool check metrics <"$dir/after" || fail "promtool has something to say"
# The same in the words of OpenMetrics, which end so.
scrape metrics --header 'Accept: application/openmetrics-text; version=1.0.0' >"$dir/open"
[[ $(tail -n 1 "$dir/open") == "# EOF" ]] || fail "OpenMetrics without its end"

kill -TERM "$daemon"
status=0
wait "$daemon" || status=$?
daemon=
[[ $status -eq 0 ]] || fail "the daemon ended with status $status"
[[ ! -e $dir/metrics.sock ]] || fail "the daemon has left its socket"
echo "metrics: ${#families[@]} families, $(grep -vc '^#' "$dir/after") samples; promtool has nothing to say"
