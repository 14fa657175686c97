#!/usr/bin/env bash
# The Debian package under a real systemd: installed, started by its sockets, reloaded, restarted, killed, upgraded,
# removed. systemd is PID 1 of a container (systemd-nspawn) that is made for it from Debian's own packages.
#
# Needs root, Debian, Rust and Python 3; installs systemd-container and debootstrap. What it makes lies below target/
# and goes away again, but for the bare Debian in target/ci/systemd, which the next run takes a copy of. Prints a line
# for each thing that it has verified, and fails with the journal at the first that is not so.
#
#   tests/systemd.sh              everything
#   tests/systemd.sh STEP...      some of the steps below, for whoever works on one; `installed` comes first
#   RELEASE=trixie tests/systemd.sh    in another Debian than this machine's, and so with another systemd
# shellcheck disable=SC2016 # what stands in single quotes is read by apt, dpkg or a shell inside
set -euo pipefail
cd -- "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/.."
for variable in "${!DOMAIND_@}"; do unset "$variable"; done

ci=$PWD/target/ci/systemd
public=/run/domaind/public
dropins=/run/systemd/system/domaind.service.d
run='' nspawn='' init='' memory=''
failed=''
verified=0

# In this order, because each finds what those before it have left.
steps=(installed started_by_its_socket confined bytes_move outsiders_are_refused clients_have_units reloaded restarted watched killed
    limited measured upgraded booted_again stopped nothing_was_wrong removed)

main() {
    [[ $(id -u) -eq 0 ]] || { echo "tests/systemd.sh: needs root, because it boots a container" >&2; exit 1; }
    trap finish EXIT
    trap 'exit 130' INT
    trap 'exit 143' TERM
    install_tools
    make_packages
    make_base
    prepare
    boot
    printf 'Debian %s, %s\n' "$release" "$(inside systemctl --version | head -n 1)"

    local step
    [[ $# -gt 0 ]] || set -- "${steps[@]}"
    for step in "$@"; do "$step"; done
    printf 'systemd: %d things verified in %d:%02d\n' "$verified" $((SECONDS / 60)) $((SECONDS % 60))
}

# ---- what is verified ------------------------------------------------------------------------------------------------

installed() {
    inside dpkg --install "/root/$(basename "$package")" >"$run/install.log" 2>&1 || fail "dpkg: $(<"$run/install.log")"
    local unit
    for unit in domaind.socket domaind-admin.socket; do
        [[ $(inside systemctl is-enabled $unit) == enabled ]] || fail "$unit is not enabled"
        [[ $(inside systemctl is-active $unit) == active ]] || fail "$unit does not listen"
    done
    same "$(inside stat -c '%n %F %a %U:%G' /run/domaind $public /run/domaind/admin $public/{api,fd}.sock \
        /run/domaind/admin/admin.sock)" "\
/run/domaind directory 755 domaind:domaind
$public directory 750 domaind:domaind-clients
/run/domaind/admin directory 700 domaind:domaind
$public/api.sock socket 660 domaind:domaind-clients
$public/fd.sock socket 660 domaind:domaind-clients
/run/domaind/admin/admin.sock socket 600 domaind:domaind"
    [[ $(state) == inactive ]] || fail "the daemon is $(state) before anybody has connected"
    verified "the package installs; its sockets are enabled and listen before there is a daemon"

    local complaints
    complaints=$(inside systemd-analyze verify domaind.service domaind.socket domaind-admin.socket domaind.slice 2>&1) ||
        fail "systemd-analyze verify: $complaints"
    [[ -z $complaints ]] || fail "systemd-analyze verify: $complaints"
    verified "systemd-analyze verify has nothing to say"
    inside systemd-analyze security --no-pager --threshold=10 domaind.service >"$run/security.log" ||
        fail "$(tail -n 1 "$run/security.log")"
    verified "systemd-analyze security: $(sed -n 's/.*level for domaind.service: //p' "$run/security.log" | cut -d' ' -f1), at most 1.0"
}

started_by_its_socket() {
    local names
    names=$(inodes)
    as alice domainctl get domains >"$run/out" 2>&1 || fail "the first domainctl: $(<"$run/out")"
    [[ $(state) == active ]] || fail "the daemon is $(state) after the first call"
    same "$(inodes)" "$names"
    verified "the first domainctl starts the daemon through the socket, which stays the one that systemd has made"
    [[ $(property StatusText) != "" ]] || fail "the daemon tells systemd no status"
    [[ $(property WatchdogUSec) == 10s && $(property WatchdogTimestamp) != "" ]] || fail "the watchdog is not fed"
    verified "systemd knows that it is ready (\"$(property StatusText)\") and watches it"
}

confined() {
    local pid
    pid=$(property MainPID)
    # 2 is a filter; the bounding set is empty, too, so that nothing can be gained by starting something.
    same "$(inside grep -E '^(CapPrm|CapEff|CapBnd|NoNewPrivs|Seccomp):' "/proc/$pid/status" | tr -d '\t')" "\
CapPrm:0000000000000000
CapEff:0000000000000000
CapBnd:0000000000000000
NoNewPrivs:1
Seccomp:2"
    same "$(inside stat -c %U "/proc/$pid/ns")" root
    verified "it runs without any capability, behind the filter of system calls, and is not dumpable"
}

bytes_move() {
    local flag
    as alice domainctl create domain disk-0 --bounce 1MiB --coherent 1MiB >"$run/out" 2>&1 || fail "create: $(<"$run/out")"
    for flag in --lease --calls; do
        # shellcheck disable=SC2086 # one word
        as alice domainctl demo $flag /usr/bin/domaind >"$run/out" 2>&1 || fail "demo $flag: $(<"$run/out")"
        grep -q '^verified ' "$run/out" || fail "demo $flag has verified nothing: $(<"$run/out")"
    done
    # The demo has a daemon inside of itself for whoever has none; this one must have seen its three processes.
    local attached
    attached=$(daemon_log | grep -c 'attached.*uid 1001 ' || true)
    [[ $attached -eq 6 ]] || fail "the daemon has seen $attached attaches of alice's, not 6"
    verified "a member of domaind-clients creates a domain, and three of its processes move $(inside stat -c %s /usr/bin/domaind) bytes through one: all came back right"
}

outsiders_are_refused() {
    local status=0
    as mallory domainctl get domains >"$run/out" 2>&1 || status=$?
    [[ $status -eq 4 ]] || fail "mallory's domainctl ended with $status, not 4: $(<"$run/out")"
    grep -q 'Permission denied (os error 13)' "$run/out" || fail "mallory was refused otherwise: $(<"$run/out")"
    # Nor by the other names: not the directory, not the operator's socket.
    ! as mallory ls $public >/dev/null 2>&1 || fail "mallory can list $public"
    ! as alice domainctl --admin get domains >"$run/out" 2>&1 || fail "alice reaches the operator's socket"
    verified "who is not in the group is refused by the kernel (EACCES), and so is a member at the operator's socket"
}

clients_have_units() {
    start_mover mover
    inside domainctl --admin get sessions -o wide >"$run/out"
    grep -q '\bmover\.service\b' "$run/out" || fail "no session of mover.service: $(<"$run/out")"
    inside domainctl --admin get sessions -o json >"$run/out"
    grep -q '"unit": *"mover.service"' "$run/out" || fail "peer.unit is not in the JSON: $(<"$run/out")"
    verified "get sessions -o wide names the unit of a client: mover.service"
    stop_mover mover
}

reloaded() {
    local pid status=0
    pid=$(property MainPID)
    config_with '[policy]' 'default = "deny"'
    reload
    as alice domainctl create domain disk-1 >"$run/out" 2>&1 || status=$?
    [[ $status -eq 4 ]] || fail "alice creates under default = \"deny\", status $status: $(<"$run/out")"
    config_with '[policy]' 'default = "deny"' '[[policy.rules]]' 'name = "alice"' 'uids = [1001]' 'domains = ["disk-*"]' 'create = true'
    reload
    as alice domainctl create domain disk-1 >"$run/out" 2>&1 || fail "alice is not let in by her rule: $(<"$run/out")"
    as alice domainctl delete domain disk-1 >"$run/out" 2>&1 || fail "delete: $(<"$run/out")"
    config_with '[polizy]' 'default = "deny"'
    if reload 2>/dev/null; then fail "systemctl reload takes a broken file for done"; fi
    inside journalctl --unit domaind --no-pager --lines 50 | grep -F polizy >/dev/null || fail "the journal does not name the wrong key"
    as alice domainctl get domains >"$run/out" 2>&1 || fail "a broken configuration ends the service: $(<"$run/out")"
    same "$(property MainPID)" "$pid"
    config_with
    reload
    as alice domainctl get domain disk-0 >"$run/out" 2>&1 || fail "disk-0 is gone after the reloads: $(<"$run/out")"
    verified "systemctl reload changes the policy both ways, keeps domains and process, fails on a broken file and survives it"
}

restarted() {
    local names pid began
    names=$(inodes) pid=$(property MainPID)
    start_mover old
    # So long that whoever connects now certainly finds no daemon.
    drop_in slow '[Service]' 'ExecStartPre=/bin/sleep 3'
    inside systemctl --no-block restart domaind.service
    wait_for 10 "the daemon to start again" in_state activating
    began=$(date +%s%N)
    as alice domainctl get domains >"$run/out" 2>&1 || fail "a call during the restart: $(<"$run/out")"
    local waited=$((($(date +%s%N) - began) / 1000000))
    [[ $waited -ge 500 ]] || fail "the call during the restart was answered after $waited ms: by whom?"
    [[ $(property MainPID) != "$pid" ]] || fail "restarted, and the same process"
    same "$(inodes)" "$names"
    verified "systemctl restart: the sockets stay, and who connects meanwhile waits ($waited ms) and is served"
    drop_in slow

    wait_for 10 "the client to notice" mover_failed old
    mover_log old >"$run/out"
    grep -qE '^error: .+' "$run/out" || fail "the client has said nothing: $(<"$run/out")"
    verified "a client of before is told: $(grep -m 1 '^error: ' "$run/out")"
    as alice domainctl demo /usr/bin/domainctl >"$run/out" 2>&1 || fail "demo after the restart: $(<"$run/out")"
    verified "and attaches anew: $(inside stat -c %s /usr/bin/domainctl) bytes moved and compared"
}

watched() {
    local pid restarts
    drop_in watchdog '[Service]' WatchdogSec=2s
    inside systemctl restart domaind.service
    pid=$(property MainPID) restarts=$(property NRestarts)
    sleep 5
    same "$(property MainPID)" "$pid"
    signal STOP "$pid"
    wait_for 15 "the watchdog to kill the daemon" other_process "$pid"
    daemon_journal >"$run/out"
    grep -q 'Watchdog timeout (limit 2s)!' "$run/out" || fail "another process, and not because of the watchdog"
    as alice domainctl get domains >"$run/out" 2>&1 || fail "after the watchdog: $(<"$run/out")"
    [[ $(property NRestarts) -gt $restarts ]] || fail "systemd has not counted a restart"
    drop_in watchdog
    verified "fed for 5 s it lives with a watchdog of 2 s; stopped (SIGSTOP) it is killed and started again, and serves"
}

killed() {
    local pid began
    inside systemctl restart domaind.service
    pid=$(property MainPID)
    signal KILL "$pid"
    began=$(date +%s%N)
    as alice domainctl get domains >"$run/out" 2>&1 || fail "after SIGKILL: $(<"$run/out")"
    verified "killed (SIGKILL) it is started again: who connects at once is served after $((($(date +%s%N) - began) / 1000000)) ms"
    other_process "$pid" || fail "the killed process answers"
}

limited() {
    local pid status=0
    drop_in memory '[Service]' MemoryMax=64M
    inside systemctl restart domaind.service
    pid=$(property MainPID)
    same "$(memory_limit)" $((64 << 20))
    as alice domainctl create domain big --bounce 128MiB --coherent 0 >"$run/out" 2>&1 || status=$?
    [[ $status -eq 7 ]] || fail "128 MiB in 64 MiB ended with $status, not 7: $(<"$run/out")"
    as alice domainctl create domain small --bounce 16MiB --coherent 0 >"$run/small" 2>&1 || fail "16 MiB in 64: $(<"$run/small")"
    same "$(property MainPID)" "$pid"
    same "$(oom_kills)" 0
    verified "in 64 MiB (MemoryMax) a domain of 128 MiB is refused, nothing is killed, one of 16 MiB fits: $(grep -m 1 '^error: ' "$run/out")"
    drop_in memory
    inside systemctl restart domaind.service
}

measured() {
    inside mkdir -p /etc/systemd/system/domaind.service.d
    inside cp /usr/share/doc/domaind/examples/metrics.conf /etc/systemd/system/domaind.service.d/
    inside systemctl daemon-reload
    inside systemctl restart domaind.service
    http /livez >"$run/out"
    head -n 1 "$run/out" | grep -q '^HTTP/1.1 200' || fail "/livez: $(<"$run/out")"
    http /metrics >"$run/out"
    grep -q '^domaind_build_info{' "$run/out" || fail "/metrics has no domaind_build_info: $(<"$run/out")"
    inside rm /etc/systemd/system/domaind.service.d/metrics.conf
    inside rmdir /etc/systemd/system/domaind.service.d
    inside systemctl daemon-reload
    inside systemctl restart domaind.service
    ! http /livez >"$run/out" 2>&1 || fail "metrics are served without being asked for"
    verified "the example of a drop-in opens /livez and /metrics over TCP; without it there is no network"
}

upgraded() {
    local names pid
    names=$(inodes) pid=$(property MainPID)
    # What an administrator has changed must stay.
    config_with '[limits]' 'ack_timeout_ms = 4321'
    inside dpkg --install "/root/$(basename "$upgrade")" >"$run/upgrade.log" 2>&1 || fail "dpkg: $(<"$run/upgrade.log")"
    same "$(inside dpkg-query --show --showformat '${Version}' domaind)" "$upgrade_version"
    other_process "$pid" || fail "the old daemon still runs after the upgrade"
    same "$(inodes)" "$names"
    inside grep -q '^ack_timeout_ms = 4321' /etc/domaind/domaind.toml || fail "the upgrade has taken the administrator's setting"
    as alice domainctl demo /usr/bin/domaind >"$run/out" 2>&1 || fail "demo after the upgrade: $(<"$run/out")"
    # Who has disabled it does not find it enabled by the next version.
    inside systemctl disable --quiet domaind-admin.socket
    inside dpkg --install "/root/$(basename "$package")" >>"$run/upgrade.log" 2>&1 || fail "dpkg: $(<"$run/upgrade.log")"
    [[ $(inside systemctl is-enabled domaind-admin.socket) == disabled ]] || fail "a disabled socket is enabled again"
    inside systemctl enable --quiet domaind-admin.socket
    verified "upgrade to $upgrade_version and back: the sockets stay, the daemon is another, settings and what was disabled are kept"
}

booted_again() {
    shut_down
    boot
    [[ $(state) == inactive ]] || fail "the daemon is $(state) after the boot"
    as alice domainctl demo /usr/bin/domaind >"$run/out" 2>&1 || fail "demo after the boot: $(<"$run/out")"
    verified "after a boot the sockets are there and start the daemon"
}

stopped() {
    local status=0
    inside systemctl stop domaind.socket domaind-admin.socket domaind.service
    [[ $(state) == inactive ]] || fail "stopped, and $(state): $(property Result)"
    same "$(property Result)" success
    same "$(inside find /run/domaind -type s)" ""
    as alice domainctl get domains >"$run/out" 2>&1 || status=$?
    [[ $status -eq 5 ]] || fail "without a daemon domainctl ends with $status, not 5: $(<"$run/out")"
    verified "stop: the daemon ends well, the sockets are gone: $(grep -m 1 '^error: ' "$run/out")"
    inside systemctl start domaind.socket domaind-admin.socket
    as alice domainctl get domains >"$run/out" 2>&1 || fail "stopped and started: $(<"$run/out")"
}

# Looked at boot by boot, because a boot ends its journal.
nothing_was_wrong() {
    # What was done to it on purpose: the watchdog, and the file that is none.
    if grep -hE ' ERROR | panicked |\bBUG\b' "$run"/journal.* <(daemon_journal) | grep -v polizy; then
        fail "the daemon reports errors"
    fi
    # The reload of the broken file. The kernel keeps no other namespace's lo for a container that may not, and systemd goes on.
    if cat "$run"/errors.* <(unit_errors) | grep -vE 'Watchdog timeout|Reload failed for|Failed to configure loopback network device'; then
        fail "systemd reports errors of the units"
    fi
    [[ $(inside systemctl --failed --no-legend --plain | wc -l) -eq 0 ]] || fail "failed: $(inside systemctl --failed --no-legend)"
    verified "no errors in the journal beyond those that were made, and no failed unit"
}

removed() {
    start_mover last
    inside dpkg --remove domaind >"$run/remove.log" 2>&1 || fail "dpkg: $(<"$run/remove.log")"
    [[ $(state) == inactive ]] || fail "removed, and $(state)"
    ! inside test -e /run/domaind || fail "/run/domaind is still there: $(inside find /run/domaind)"
    inside test -e /etc/domaind/domaind.toml || fail "remove has taken the configuration"
    wait_for 10 "the client to notice" mover_failed last
    inside dpkg --purge domaind >"$run/remove.log" 2>&1 || fail "dpkg: $(<"$run/remove.log")"
    inside systemctl reset-failed
    local left
    # dpkg's own books and the journal are nobody's to take away.
    left=$(comm -13 "$run/before" <(everything) | grep -vE '^/var/(lib/dpkg|log)/' || true)
    same "$left" ""
    same "$(inside systemctl list-unit-files --no-legend 'domaind*')" ""
    same "$(inside getent group domaind-clients | cut -d: -f4)" alice
    verified "remove under a running client stops everything, purge takes the configuration: no file is left, user and group stay"
}

# ---- the container ---------------------------------------------------------------------------------------------------

install_tools() {
    local wanted=()
    [[ -x /usr/bin/systemd-nspawn && -x /usr/bin/systemd-analyze ]] || wanted+=(systemd-container)
    [[ -x /usr/sbin/debootstrap ]] || wanted+=(debootstrap)
    [[ ${#wanted[@]} -gt 0 ]] || return 0
    echo "installing ${wanted[*]}"
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends "${wanted[@]}" >/dev/null
}

make_packages() {
    deploy/image
    package=$(deploy/deb)
    local version
    version=$(dpkg-deb --field "$package" Version)
    upgrade_version=$version.1
    upgrade=$(deploy/deb --version "$upgrade_version")
}

# A bare Debian, of this machine's release unless another one is asked for, from where its apt gets what it installs.
make_base() {
    local own mirror
    # shellcheck disable=SC1091 # of the machine
    own=$(. /etc/os-release && echo "$VERSION_CODENAME")
    release=${RELEASE:-$own} base=$ci/$release
    [[ ! -e $base/.complete ]] || return 0
    mirror=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' "Codename: $own" 'Component: main' | head -n 1)
    [[ -n $mirror ]] || { echo "tests/systemd.sh: apt knows no mirror of $own; apt-get update?" >&2; exit 1; }
    echo "installing Debian $release below target/ci/systemd"
    rm -rf "$base"
    mkdir -p "$ci"
    debootstrap --variant=minbase --include=systemd,systemd-sysv,dbus "$release" "$base" "$mirror" >"$ci/debootstrap.log" 2>&1 ||
        { tail -n 20 "$ci/debootstrap.log" >&2; exit 1; }
    touch "$base/.complete"
}

prepare() {
    run=$(mktemp -d "$ci/run.XXXXXX")
    cp -a "$base" "$run/root"
    cp "$package" "$upgrade" "$run/root/root/"
    # A group of the same name is taken by the package as it is.
    chroot "$run/root" groupadd --system domaind-clients
    chroot "$run/root" useradd --uid 1001 --user-group --groups domaind-clients alice
    chroot "$run/root" useradd --uid 1002 --user-group mallory
}

boot() {
    local log=$run/nspawn.log
    memory=
    # A memory cgroup of its own, so that systemd's limits are real and all that it makes is below one directory.
    # Where all controllers are in one hierarchy nspawn hands them on by itself.
    if [[ -d /sys/fs/cgroup/memory ]]; then
        memory=/sys/fs/cgroup/memory/domaind-systemd.$$
        mkdir -p "$memory"
    elif [[ -e /sys/fs/cgroup/cgroup.subtree_control ]]; then
        memory=/sys/fs/cgroup/domaind-systemd.$$
        mkdir -p "$memory"
    fi
    # The network is its own, so that nothing here meets a port of the machine's.
    bash -c '[[ -z $1 ]] || echo $$ >"$1/cgroup.procs"
        exec systemd-nspawn --directory="$2" --boot --private-network --register=no --keep-unit --link-journal=no \
            --console=pipe --resolv-conf=off --machine=domaind-test' boot "$memory" "$run/root" </dev/null >"$log" 2>&1 &
    nspawn=$!
    wait_for 20 "systemd-nspawn to start" found_init
    wait_for 60 "the container to boot" has_booted
    if [[ $memory == /sys/fs/cgroup/memory/* ]]; then
        # nspawn mounts what it does not delegate read-only; systemd looks for its controllers when it begins.
        inside mount -o remount,bind,rw /sys/fs/cgroup/memory
        inside systemctl daemon-reexec
    fi
    [[ -e $run/before ]] || everything >"$run/before"
}

found_init() {
    kill -0 "$nspawn" 2>/dev/null || { cat "$run/nspawn.log" >&2; fail "systemd-nspawn has ended"; }
    init=$(ps -o pid= --ppid "$nspawn" | head -n 1 | tr -d ' ')
    [[ -n $init && $(readlink "/proc/$init/ns/pid") != $(readlink /proc/self/ns/pid) ]]
}

has_booted() {
    [[ $(inside systemctl is-system-running 2>/dev/null) == running ]]
}

shut_down() {
    daemon_journal >"$run/journal.$init"
    unit_errors >"$run/errors.$init"
    end_container
}

end_container() {
    [[ -n $nspawn ]] || return 0
    local pid=$nspawn i
    kill -TERM "$pid" 2>/dev/null || true
    for ((i = 0; i < 100; i++)); do
        kill -0 "$pid" 2>/dev/null || break
        sleep 0.1
    done
    # The container ends with its first process, whatever that is doing.
    if kill -0 "$pid" 2>/dev/null; then
        [[ -z $init ]] || kill -KILL "$init" 2>/dev/null || true
        kill -KILL "$pid" 2>/dev/null || true
    fi
    wait "$pid" 2>/dev/null || true
    nspawn='' init=''
    [[ -z $memory ]] || find "$memory" -depth -type d -exec rmdir {} + 2>/dev/null || true
}

finish() {
    local status=$?
    # What `fail` has not said already.
    [[ $status -eq 0 || -n $failed ]] || echo "tests/systemd.sh: ended with status $status after \"ok $verified\"" >&2
    end_container
    [[ -z $run ]] || rm -rf --one-file-system "$run"
}

inside() {
    nsenter -t "$init" -m -u -i -n -p -C -- "$@"
}

# as USER COMMAND...
as() {
    local user=$1
    shift
    inside setpriv --reuid="$user" --regid="$user" --init-groups \
        env -i PATH=/usr/bin:/bin DOMAIND_RUNTIME_DIR=/run/domaind "$@" </dev/null
}

# start_mover NAME: a unit of alice's whose processes are attached and move bytes for a minute.
start_mover() {
    inside systemd-run --quiet --unit="$1" --uid=alice --setenv=DOMAIND_RUNTIME_DIR=/run/domaind \
        sh -c 'for i in $(seq 600); do head -c 65536 /dev/urandom || exit; sleep 0.1; done | domainctl demo -'
    wait_for 10 "$1 to attach" has_sessions 3
}

stop_mover() {
    inside systemctl stop "$1"
    wait_for 10 "the sessions of $1 to end" has_sessions 0
}

has_sessions() {
    [[ $(inside domainctl --admin get sessions --no-headers 2>/dev/null | wc -l) -eq $1 ]]
}

mover_failed() {
    [[ $(inside systemctl is-active "$1") == failed ]]
}

mover_log() {
    inside journalctl --no-pager -o cat -u "$1"
}

# config_with LINE...: what is installed, and these lines.
config_with() {
    { cat deploy/systemd/domaind.toml; printf '%s\n' "$@"; } >"$run/root/etc/domaind/domaind.toml"
}

reload() {
    inside systemctl reload domaind.service || return
    same "$(state)" active
}

# drop_in NAME LINE...: without lines the drop-in goes. Takes effect with the next start.
drop_in() {
    local name=$1
    shift
    inside mkdir -p $dropins
    if [[ $# -gt 0 ]]; then
        printf '%s\n' "$@" | inside tee "$dropins/$name.conf" >/dev/null
    else
        inside rm -f "$dropins/$name.conf"
    fi
    inside systemctl daemon-reload
}

state() {
    inside systemctl is-active domaind.service || true
}

in_state() {
    [[ $(state) == "$1" ]]
}

property() {
    inside systemctl show --value --property="$1" domaind.service
}

# signal NAME PID. There is no /bin/kill in a bare Debian.
signal() {
    inside sh -c 'kill -"$1" "$2"' - "$@"
}

other_process() {
    local pid
    pid=$(property MainPID)
    [[ $pid -ne 0 && $pid -ne $1 ]] && in_state active
}

inodes() {
    inside stat -c '%n %i' $public/api.sock $public/fd.sock /run/domaind/admin/admin.sock
}

cgroup() {
    local path
    path=$(property ControlGroup)
    [[ $memory == /sys/fs/cgroup/memory/* ]] && echo "/sys/fs/cgroup/memory$path" || echo "/sys/fs/cgroup$path"
}

memory_limit() {
    inside sh -c 'cat "$1/memory.limit_in_bytes" 2>/dev/null || cat "$1/memory.max"' - "$(cgroup)"
}

oom_kills() {
    inside sh -c 'cat "$1/memory.oom_control" 2>/dev/null || cat "$1/memory.events"' - "$(cgroup)" | sed -n 's/^oom_kill //p'
}

http() {
    inside bash -c 'exec 3<>/dev/tcp/127.0.0.1/9464 && printf "GET %s HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n" "$1" >&3 && cat <&3' - "$1"
}

daemon_journal() {
    inside journalctl --no-pager -o cat -u domaind.service
}

daemon_log() {
    inside journalctl --no-pager -o cat _COMM=domaind
}

unit_errors() {
    inside journalctl --no-pager -o cat -p err -u domaind.service -u domaind.socket -u domaind-admin.socket
}

# Every file and directory of the container that outlives a boot, and what it runs on.
everything() {
    inside find / -xdev -ignore_readdir_race ! -path '/proc/*' ! -path '/sys/*' ! -path '/root/*' ! -path '/tmp/*' ! -path '/var/tmp/*' | LC_ALL=C sort
}

# ---- saying so -------------------------------------------------------------------------------------------------------

verified() {
    verified=$((verified + 1))
    printf 'ok %2d  %s\n' "$verified" "$*"
}

same() {
    [[ $1 == "$2" ]] || fail "found:"$'\n'"$1"$'\n'"expected:"$'\n'"$2"
}

# wait_for SECONDS WHAT COMMAND...
wait_for() {
    local deadline=$((SECONDS + $1)) what=$2
    shift 2
    until "$@"; do
        [[ $SECONDS -lt $deadline ]] || fail "waited in vain for $what"
        sleep 0.1
    done
}

fail() {
    failed=yes
    printf 'FAILED  %s\n' "$*" >&2
    if [[ -n $init ]]; then
        echo "the end of the journal:" >&2
        inside journalctl --no-pager -n 40 -o short-precise >&2 || true
    fi
    exit 1
}

main "$@"
