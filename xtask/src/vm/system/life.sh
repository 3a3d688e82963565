#!/bin/bash
# The package's life under systemd, a few parts of it a boot; runs in the guest as a service, and tells on the second serial line. All the
# while attacker.service attacks as nobody, and writes down every attempt: each part looks through those that fell into it.
set -u
export DEBIAN_FRONTEND=noninteractive
results=/dev/ttyS1
state=/var/lib/life
attempts=$state/attempts
settings=/var/vcap/bosh/settings/settings.json
all_ways='monit mapped monit-6 bus next-bus'
# Seconds that a part may take; less than the silence that is taken for a hang of the guest.
limit=$(cat /life/limit)

tell() { printf '%s\n' "$1" >"$results"; }
quoted() { printf '%s\n' "$1" | tail -c 3000 | tr '\t' ' ' | tr -cd '[:print:]\n' | sed 's/\\/\\\\/g; s/"/\\"/g; s/$/\\n/' | tr -d '\n'; }
# A named part, with what it printed if it failed: in a shell of its own, as the first command that fails ends no function whose
# outcome is asked for.
failed=0
part() {
    local name=$1 began=$SECONDS said code=0 error=null
    tell "{\"began\":\"$name\"}"
    said=$(timeout --kill-after=5 "$limit" "$0" "$name" 2>&1) || code=$?
    case $code in 124 | 137) said+=$'\n'"it did not end within $limit s" ;; esac
    if [ "$code" != 0 ]; then
        error="\"$(quoted "$said")\""
        failed=1
    fi
    tell "{\"ended\":\"$name\",\"seconds\":$((SECONDS - began)),\"error\":$error}"
}

# What outlives a boot: `ways` that are guarded, the `word` for an attempt that is not let through, when a boot `ended`.
remember() { printf '%s' "$2" >"$state/$1"; }
recall() { cat "$state/$1"; }
# Microseconds since boot, as the attacker and systemd tell them.
now() { awk '{ printf "%.0f\n", $1 * 1000000 }' /proc/uptime; }
entered() { systemctl show --value --property ActiveEnterTimestampMonotonic "$1"; }
# Waits until a command succeeds; says what is amiss if it never does.
until_true() {
    local what=$1
    shift
    for _ in $(seq 300); do
        "$@" >/dev/null 2>&1 && return
        sleep 0.2
    done
    echo "not within 60 s: $what"
    "$@" || true
    journal
    return 1
}
journal() {
    journalctl --no-pager --boot --output cat --lines 15 --unit enforcer --unit enforcer-early
    enforcer status
}

# All attempts on these ways that began from one time to another came to this word, and there were enough.
all_came_to() {
    local word=$1 from=$2 to=$3
    shift 3
    awk -v word="$word" -v from="$from" -v to="$to" -v least="${least:-10}" -v ways="$*" '
        BEGIN { split(ways, list); for (i in list) wanted[list[i]] = 1 }
        $1 < from || $1 > to || !($2 in wanted) { next }
        { number[$2]++ }
        $3 !~ "^(" word ")" { if (wrong++ < 5) print "an attempt did not come to " word ": " $0 }
        END {
            if (wrong) print wrong " attempts did not, from " from " to " to
            for (way in wanted) if (number[way] < least) { wrong++; print number[way] + 0 " attempts on " way " from " from " to " to }
            exit wrong > 0
        }' "${record:-$attempts}" || { journal; return 1; }
}
# From a time to this one nobody got through to what is guarded, and other traffic was left alone.
guarded_since() {
    sleep 0.5
    all_came_to "$(recall word)" "$1" "$(now)" $(recall ways)
    all_came_to open "$1" "$(now)" other
}
under_attack() {
    local since
    since=$(now)
    "$@"
    guarded_since "$since"
}
came_last() { tail -n 12 "$attempts" | grep -q "^[0-9]* $1 $2"; }
root_passes() {
    local way outcome
    for way in $(recall ways); do
        outcome=$(/life/attacker.pl "$way")
        [ "$outcome" = open ] || { echo "root, $way: $outcome"; return 1; }
    done
}
# `!` alone ends no shell.
fails() { ! "$@" || { echo "succeeds: $*"; return 1; }; }
main_process() { systemctl show --value --property MainPID enforcer; }
is_active() { [ "$(systemctl is-active enforcer)" = active ]; }
is_another() { [ "$(main_process)" != "$1" ] && is_active; }

without_the_package_every_attack_succeeds() { all_came_to open 0 "$(now)" $all_ways other; }
without_a_sign_of_bosh_the_package_guards_nothing() {
    local since
    dpkg -i /life/first.deb
    since=$(now)
    sleep 1
    fails is_active
    systemctl start enforcer
    fails is_active
    all_came_to open "$since" "$(now)" $all_ways other
}
on_a_bosh_vm_the_package_guards_monit() {
    # As the image has it, before there are any settings.
    mkdir -p /var/vcap/bosh
    systemctl start enforcer
    is_active
    # The unit's filter of system calls lets it.
    journalctl --no-pager --boot --output cat --unit enforcer | grep 'confined by Landlock to /'
    # Ready is told when the kernel enforces; without a word of configuration that is monit, for root alone.
    sleep 1
    all_came_to denied "$(entered enforcer)" "$(now)" monit mapped
    # Its log has fields.
    journalctl --no-pager --boot --output json ENFORCER_VERDICT=deny | grep '"ENFORCER_TARGET":"monit"'
    remember word denied
    remember ways 'monit mapped'
    root_passes
}
a_configuration_is_taken() {
    cat >/etc/enforcer/enforcer.toml <<'TOML'
[bosh]

[target.monit]
endpoints = ["tcp://127.0.0.1:2822", "tcp://[::1]:2822"]
allow = ["root"]
TOML
    under_attack systemctl restart enforcer
    remember ways 'monit mapped monit-6'
    under_attack sleep 0.5
    root_passes
}
# As on a stemcell: the agent mounts a tmpfs for its settings when the daemon runs, which must see it.
the_agents_settings_are_followed() {
    local before
    before=$(main_process)
    systemctl start names
    until_true 'the name of the bus is known' getent ahosts bus.test
    under_attack settings_appear
    [ "$(main_process)" = "$before" ] || { echo 'the daemon was started again'; journal; return 1; }
    remember ways 'monit mapped monit-6 bus'
    under_attack sleep 0.5
    root_passes
    enforcer status
}
settings_appear() {
    mkdir -p "${settings%/*}"
    mount -t tmpfs -o mode=0700 tmpfs "${settings%/*}"
    write_settings '{"mbus": "nats://nats:secret@bus.test:4222"}'
    until_true 'the bus is guarded' came_last bus denied
    until_true 'the daemon runs' is_active
}
write_settings() {
    (umask 077 && echo "$1" >"$settings.new")
    mv "$settings.new" "$settings"
}
restart_opens_nothing() {
    under_attack systemctl restart enforcer
    root_passes
}
stop_opens_nothing() {
    under_attack stop_and_start
    root_passes
}
stop_and_start() {
    systemctl stop enforcer
    sleep 1
    systemctl start enforcer
}
# A unit's mount namespace ends with the unit. With the host's bpffs in it, what the unit enforces is seen outside and stays; without,
# nothing is mounted there, and the unit fails with the reason.
a_private_unit_is_visible_or_refused() {
    local place=/run/second
    mkdir -p $place
    cat >$place/enforcer.toml <<TOML
backend = "ebpf"
pin_dir = "/sys/fs/bpf/second"
state_dir = "$place/state"
socket = "$place/control.sock"
nft_table = "second"
[target.second]
endpoints = ["tcp://127.9.9.9:9"]
allow = ["root"]
TOML
    run_private ''
    [ "$(private_code)" = 0 ] || { private_said; return 1; }
    enforcer --config $place/enforcer.toml status
    fails enforcer --config $place/enforcer.toml check nobody 127.9.9.9:9
    enforcer --config $place/enforcer.toml unload
    run_private TemporaryFileSystem=/sys/fs/bpf
    [ "$(private_code)" = 2 ] || { private_said; return 1; }
    private_said | grep -q 'mount -t bpf bpf /sys/fs/bpf' || { private_said; return 1; }
    fails enforcer --config $place/enforcer.toml status
    rm -r $place /run/systemd/system/private.service
    systemctl daemon-reload
}
# Orders that administrators add: a boot breaks a circle by leaving a unit out.
an_ordering_cycle_is_named() {
    local dir=/run/systemd/system/enforcer.service.d
    fails finds_a_cycle
    mkdir -p $dir
    for unit in network-online.target bosh-agent.service nss-user-lookup.target; do
        printf '[Unit]\nAfter=%s\n' $unit >$dir/order.conf
        # As sssd and winbind may have it.
        [ $unit != nss-user-lookup.target ] || {
            mkdir -p /run/systemd/system/$unit.d
            printf '[Unit]\nAfter=network-online.target\n' >/run/systemd/system/$unit.d/order.conf
        }
        systemctl daemon-reload
        finds_a_cycle | grep "enforcer.service after $unit.*$dir/order.conf" || { enforcer doctor; return 1; }
    done
    rm -r $dir /run/systemd/system/nss-user-lookup.target.d
    systemctl daemon-reload
    fails finds_a_cycle
}
finds_a_cycle() { enforcer doctor --json | tr -d '\n' | grep -o '"id": *"ordering-cycle".*'; }
run_private() {
    cat >/run/systemd/system/private.service <<UNIT
[Service]
Type=oneshot
PrivateTmp=yes
$1
ExecStart=/usr/sbin/enforcer --config /run/second/enforcer.toml apply
UNIT
    systemctl daemon-reload
    systemctl start private || true
}
private_code() { systemctl show --value --property ExecMainStatus private; }
private_said() { journalctl --no-pager --boot --output cat --lines 15 --unit private; }
# systemd starts whatever else ends again, and everything would be active again.
unload_is_not_undone() {
    local since
    enforcer unload
    sleep 3
    since=$(now)
    sleep 1
    all_came_to open "$since" "$(now)" $(recall ways) other
    fails is_active
    systemctl start enforcer
    under_attack sleep 0.5
    root_passes
}
crash_opens_nothing() {
    local before
    before=$(main_process)
    under_attack crash "$before"
    root_passes
}
crash() {
    systemctl kill --signal=KILL --kill-whom=main enforcer
    until_true 'systemd starts another daemon' is_another "$1"
}
upgrade_opens_nothing() {
    local before file version
    before=$(main_process)
    file=$(stat -c %i /usr/sbin/enforcer)
    version=$(dpkg-query --show --showformat '${Version}' enforcer)
    under_attack dpkg -i /life/second.deb
    until_true 'another daemon runs' is_another "$before"
    [ "$(dpkg-query --show --showformat '${Version}' enforcer)" != "$version" ] || { echo "still $version"; return 1; }
    # dpkg has put another file there; that is what the daemon runs.
    [ "$(stat -c %i /usr/sbin/enforcer)" != "$file" ] || { echo 'the program is still the same file'; return 1; }
    [ "$(stat -L -c %i "/proc/$(main_process)/exe")" = "$(stat -c %i /usr/sbin/enforcer)" ] || {
        ls -l "/proc/$(main_process)/exe"
        return 1
    }
    grep -q '^\[bosh\]$' /etc/enforcer/enforcer.toml || { echo 'the configuration is lost'; return 1; }
    root_passes
}
a_bad_configuration_opens_nothing() {
    echo 'nonsense = ' >>/etc/enforcer/enforcer.toml
    fails enforcer config check
    under_attack fails systemctl reload enforcer
    under_attack systemctl restart enforcer
    until_true 'status says degraded' is_degraded
    root_passes
}
is_degraded() { enforcer status 2>&1 | grep -i degraded; }

# The bad configuration, and neither settings nor a server of names: nothing is known but what is in the state.
nothing_but_the_state_is_there() {
    fails enforcer config check
    fails getent ahosts bus.test
    [ ! -e "$settings" ] || { echo "$settings is there"; return 1; }
    # What the early unit has loaded is taken over, and names are followed.
    enforcer status | grep 'the last known good rules are active instead' || { enforcer status; return 1; }
}
# The early unit is done before any network; the daemon is ready before whoever waits for the network or for it.
boot_is_in_order() {
    in_order enforcer-early.service sysinit.target
    in_order enforcer-early.service network-pre.target systemd-networkd.service network.target enforcer.service network-online.target
    in_order enforcer.service bosh-agent.service
}
in_order() {
    local unit at before='' last=0
    for unit in "$@"; do
        at=$(entered "$unit")
        if [ "$at" = 0 ] || [ "$at" -lt "$last" ]; then
            echo "$unit came at $at us, $before at $last us"
            systemctl status --no-pager "$unit"
            return 1
        fi
        before=$unit last=$at
    done
}
guarded_before_the_network_is_up() {
    local start end network
    start=$(systemctl show --value --property ExecMainStartTimestampMonotonic enforcer-early)
    end=$(entered enforcer-early.service)
    network=$(entered network.target)
    # Until then the attack succeeds in this boot, too.
    least=1 all_came_to open 0 "$start" $(recall ways)
    least=1 all_came_to "$(recall word)" "$end" "$network" $(recall ways)
    guarded_since "$end"
    root_passes
}
# The kernel goes on: so do the rules, and whatever survives the end of user space is refused all the while.
a_soft_reboot_opened_nothing() {
    all_came_to denied "$(recall ended)" "$(now)" $(recall ways)
    all_came_to open "$(recall ended)" "$(now)" other
    [ "$(systemctl show --value --property SoftRebootsCount)" = 1 ] || { echo 'that was no soft reboot'; return 1; }
    is_active
    systemctl is-active enforcer-early
    root_passes
}
shutdown_opened_nothing() {
    # The attacker's listeners may end before it.
    record=$attempts.former least=1 all_came_to 'denied|refused|other' "$(recall ended)" 1e15 $(recall ways)
}
a_mended_configuration_is_taken() {
    sed -i '/nonsense/d' /etc/enforcer/enforcer.toml
    sync /etc/enforcer/enforcer.toml
    enforcer config check
    under_attack systemctl restart enforcer
    root_passes
}
another_bus_is_learnt() {
    under_attack settings_change
    remember ways "$all_ways"
    until_true 'the state has it' grep -q '192\.0\.2\.11' /var/lib/enforcer/last-good.json
    under_attack sleep 0.5
    root_passes
}
settings_change() {
    settings_appear
    write_settings '{"env": {"bosh": {"mbus": {"urls": ["nats://bus.test:4222", "nats://192.0.2.11:4222"]}}}}'
    until_true 'the other bus is guarded' came_last next-bus denied
}
a_change_of_backend_opens_nothing() {
    programs | grep -q '/sys/fs/bpf/enforcer/' || { echo 'no pin is seen'; return 1; }
    programs | grep -q bpf_prog_ || { echo 'no program is seen'; programs; return 1; }
    sed -i '1i backend = "nftables"' /etc/enforcer/enforcer.toml
    remember word 'denied|refused'
    under_attack systemctl restart enforcer
    remember word refused
    under_attack sleep 0.5
    root_passes
    [ -z "$(programs)" ] || { echo 'left of eBPF:'; programs; return 1; }
}
# Pins, and programs that the kernel has, by their names.
programs() {
    sysctl --quiet --write net.core.bpf_jit_kallsyms=1
    find /sys/fs/bpf -path '*enforcer*'
    grep -E 'bpf_prog_[0-9a-f]+_(connect|sendmsg)[46]' /proc/kallsyms
}
removal_opens_nothing() { under_attack dpkg --remove enforcer; }
purge_leaves_nothing() {
    local since left
    dpkg --purge enforcer
    sleep 1
    since=$(now)
    sleep 1
    all_came_to open "$since" "$(now)" $all_ways other
    left=$(
        find / /run /sys/fs/bpf /sys/fs/cgroup -xdev \( -path /proc -o -path /life -o -path /var/log \) -prune -o -iname '*enforcer*' -print
        programs
        nft list tables
        systemctl list-unit-files --no-legend 'enforcer*'
        pgrep -a enforcer
    ) || true
    [ -z "$left" ] || { echo "left: $left"; return 1; }
}

if [ $# -gt 0 ]; then
    set -e
    "$@"
    exit
fi

boot=$(($(cat "$state/boot" 2>/dev/null || echo 0) + 1))
remember boot "$boot"
sync "$state/boot"
read -r up _ </proc/uptime
tell "{\"booted\":\"$(uname -r)\",\"seconds\":$up}"
tell "{\"hierarchy\":\"systemd\"}"
tell "{\"suite\":\"boot $boot\"}"
began=$SECONDS
leave=(systemctl reboot)
machine_ends=1
case $boot in
1)
    part without_the_package_every_attack_succeeds
    part without_a_sign_of_bosh_the_package_guards_nothing
    part on_a_bosh_vm_the_package_guards_monit
    part a_configuration_is_taken
    part a_private_unit_is_visible_or_refused
    part an_ordering_cycle_is_named
    part the_agents_settings_are_followed
    part restart_opens_nothing
    part stop_opens_nothing
    part unload_is_not_undone
    part crash_opens_nothing
    part upgrade_opens_nothing
    part a_bad_configuration_opens_nothing
    ;;
2)
    part nothing_but_the_state_is_there
    part boot_is_in_order
    part guarded_before_the_network_is_up
    part shutdown_opened_nothing
    part a_mended_configuration_is_taken
    part another_bus_is_learnt
    # The power is cut: nobody is told, and only what enforcer has synced is sure to be there.
    leave=(eval 'echo b >/proc/sysrq-trigger')
    ;;
3)
    remember ways "$all_ways"
    part boot_is_in_order
    part guarded_before_the_network_is_up
    leave=(systemctl soft-reboot)
    machine_ends=
    ;;
4)
    part a_soft_reboot_opened_nothing
    part boot_is_in_order
    part a_change_of_backend_opens_nothing
    ;;
5)
    part boot_is_in_order
    part guarded_before_the_network_is_up
    part shutdown_opened_nothing
    part removal_opens_nothing
    part purge_leaves_nothing
    ;;
esac
remember ended "$(now)"
tell "{\"suite_ended\":\"boot $boot\",\"code\":$((failed ? 101 : 0)),\"seconds\":$((SECONDS - began))}"
[ -z "$machine_ends" ] || tell '{"done":true}'
"${leave[@]}"
