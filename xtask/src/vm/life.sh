#!/bin/bash
# The package's life under systemd, a part of it a boot; runs in the guest as a service, and tells on the second serial line. What this
# asks of every part: as long as rules are in force, no attempt by another user gets through.
set -u
results=/dev/ttyS1
state=/var/lib/life

tell() { printf '%s\n' "$1" >"$results"; }
quoted() { printf '%s' "$1" | tail -c 3000 | sed 's/\\/\\\\/g; s/"/\\"/g; s/\t/ /g' | tr '\n' '|'; }
failed=0
# A named part, with what it printed if it failed: in a shell of its own, as the first command that fails ends no function whose
# outcome is asked for.
part() {
    local name=$1 began=$SECONDS said error=null
    tell "{\"began\":\"$name\"}"
    if ! said=$("$0" "$2" 2>&1); then
        error="\"$(quoted "$said")\""
        failed=1
    fi
    tell "{\"ended\":\"$name\",\"seconds\":$((SECONDS - began)),\"error\":$error}"
}

# One attempt as nobody: nobody listens there, so that what is let through is refused by TCP.
attempt() {
    setpriv --reuid 65534 --regid 65534 --clear-groups bash -c ': </dev/tcp/127.0.0.1/2822' 2>&1 |
        grep -oEm 1 'Operation not permitted|Connection refused' || echo other
}
is_open() { [ "$(attempt)" = 'Connection refused' ] || { echo "not open: $(attempt)"; return 1; }; }
is_guarded() { [ "$(attempt)" = 'Operation not permitted' ] || { echo "not guarded: $(attempt)"; return 1; }; }
root_passes() {
    local said
    said=$(bash -c ': </dev/tcp/127.0.0.1/2822' 2>&1 || true)
    case $said in *'Connection refused'*) ;; *) echo "root: $said"; return 1 ;; esac
}
is_active() {
    for _ in $(seq 300); do
        [ "$(systemctl is-active enforcer)" = active ] && return 0
        sleep 0.2
    done
    systemctl status --no-pager enforcer
    journalctl --no-pager -u enforcer -n 20
    return 1
}
# Attempts without pause while something goes on; a single one that is not denied fails it.
under_attack() {
    rm -f /run/stop /run/through /run/denied
    setpriv --reuid 65534 --regid 65534 --clear-groups bash -c '
        while [ ! -e /run/stop ]; do
            result=$({ : </dev/tcp/127.0.0.1/2822; } 2>&1)
            case $result in *"Operation not permitted"*) echo denied ;; *) echo "through: $result" ;; esac
        done' >/run/attempts 2>&1 &
    local attacker=$! code=0
    "$@" || code=$?
    touch /run/stop
    wait "$attacker"
    ! grep -m 3 through /run/attempts || return 1
    [ "$(wc -l </run/attempts)" -gt 10 ] || { echo "too few attempts: $(wc -l </run/attempts)"; return 1; }
    return "$code"
}

installs() {
    is_open
    DEBIAN_FRONTEND=noninteractive dpkg -i /packages/first.deb
    cat >/etc/enforcer/enforcer.toml <<'TOML'
[target.monit]
endpoints = ["tcp://127.0.0.1:2822", "tcp://[::1]:2822"]
allow = ["root"]
TOML
    systemctl restart enforcer
    is_active
    is_guarded
    root_passes
    enforcer status
}
crash() { systemctl kill --signal=KILL --kill-whom=main enforcer && sleep 2 && is_active; }
stop() { systemctl stop enforcer && sleep 1 && systemctl start enforcer && is_active; }
upgrade() { DEBIAN_FRONTEND=noninteractive dpkg -i /packages/second.deb && is_active; }
crashes() { under_attack crash; is_guarded; }
restarts() { under_attack systemctl restart enforcer; is_active; is_guarded; root_passes; }
stops() { under_attack stop; is_guarded; }
upgrades() { under_attack upgrade; is_guarded; root_passes; dpkg -s enforcer | grep '^Version'; }
rejects() {
    echo 'nonsense = ' >>/etc/enforcer/enforcer.toml
    under_attack systemctl reload enforcer || true
    sleep 1
    is_guarded
}

# Written down by a unit of its own before the network is up.
before_network() {
    cat /run/early
    [ "$(cat /run/early)" = 'Operation not permitted' ] && return 0
    ls -l /var/lib/enforcer
    journalctl --no-pager -b -u enforcer-early -u enforcer -n 12
    return 1
}
last_good() {
    # The configuration is still the bad one: the rules are those known good.
    is_guarded
    root_passes
}
mended() { sed -i '/nonsense/d' /etc/enforcer/enforcer.toml; systemctl restart enforcer; is_active; is_guarded; enforcer status; }
purges() {
    DEBIAN_FRONTEND=noninteractive dpkg --purge enforcer
    is_open
    for left in /sys/fs/bpf/enforcer /var/lib/enforcer /run/enforcer /etc/enforcer; do
        [ ! -e "$left" ] || { echo "left: $left"; return 1; }
    done
    ! nft list tables | grep enforcer
}

if [ $# -gt 0 ]; then
    set -e
    "$@"
    exit
fi

mkdir -p "$state"
boot=$(($(cat "$state/boot" 2>/dev/null || echo 0) + 1))
echo "$boot" >"$state/boot"

read -r up _ </proc/uptime
tell "{\"booted\":\"$(uname -r)\",\"seconds\":$up}"
tell "{\"hierarchy\":\"systemd\"}"
tell "{\"suite\":\"boot $boot\"}"
began=$SECONDS
case $boot in
1)
    part installed_and_started installs
    part restart_opens_nothing restarts
    part stop_opens_nothing stops
    part crash_opens_nothing crashes
    part upgrade_opens_nothing upgrades
    part a_bad_configuration_opens_nothing rejects
    ;;
2)
    part guarded_before_the_network_is_up before_network
    part the_last_good_rules_are_in_force last_good
    part a_mended_configuration_is_taken mended
    part purge_removes_all purges
    ;;
esac
tell "{\"suite_ended\":\"boot $boot\",\"code\":$((failed ? 101 : 0)),\"seconds\":$((SECONDS - began))}"
tell '{"done":true}'
sync
systemctl reboot
